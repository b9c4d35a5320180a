"""Train the tiny CLIP that ships in `gpu_fsm/data/tiny-clip/`: a real CLIP, small enough to live in the package.

    python tests/tools/train_tiny_clip.py [--out DIR] [--layouts 9000] [--epochs 14] [--judge FOLDER]

It learns one thing: two screenshots of the same layout belong together, whatever their theme, size, scroll, texts or a
dialog over them.  All it ever sees are random layouts drawn here with Pillow; the shipped screenshots take no part, and
the recognition thresholds, stored beside the model, come from further random layouts.  `--judge` applies model and
thresholds to a folder written by `render_screens.py --development` and only prints.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import field, frozen
from PIL import Image, ImageDraw
from torch.nn import functional

SIDE = 96
"""Pixels of the model's square input."""
SHRINK = 4
"""CSS pixels that make one pixel of the drawings."""
SEED = 20310
BOUNDARY = 0.6
"""The similarity that training puts between the same and another layout."""

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]


# --- random layouts: the identity of a screen ----------------------------------------------------------------------------


@frozen
class Node:
    """A part of a layout: a split with children, or a leaf that `Painter` knows by its kind.  Sizes in CSS pixels."""

    kind: str
    size: float = 0.0
    """Along the parent's direction; 0 takes what is left."""
    back: str = ""
    line: bool = False
    pad: float = 0.0
    gap: float = 0.0
    children: tuple[Node, ...] = ()
    facts: dict[str, Any] = field(factory=dict)


def leaf(r: random.Random, kinds: tuple[str, ...], size: float = 0.0, back: str = "", **more: Any) -> Node:
    """A leaf with everything that stays the same in all views of its layout."""
    facts = {
        "row": r.choice((20, 24, 30, 38, 46, 58, 72)),
        "dot": r.choice((0, 0, 16, 36, 48)),
        "square": r.random() < 0.4,
        "lines": r.choice((1, 1, 2, 3)),
        "rule": r.random() < 0.4,
        "right": r.random() < 0.35,
        "columns": r.randint(2, 7),
        "tile": (r.randint(60, 260), r.randint(50, 240)),
        "gap": r.randint(6, 28),
        "image": r.random() < 0.5,
        "fill": r.choice(("accent", "muted", "panel", "panel")),
        "bars": r.randint(5, 24),
        "grid": r.random() < 0.6,
        "font": r.choice((13, 14, 15, 18, 22)),
        "align": r.choice(("left", "left", "left", "center", "right")),
        "count": r.randint(2, 14),
        "icon": r.choice((14, 22, 30, 40)),
        "boxed": r.random() < 0.4,
        "width": r.choice((0, 0, 320, 420, 560, 680)),
        "scrolls": r.random() < 0.75,
        "aspect": r.choice((0.56, 0.62, 0.75, 1.0)),
        "both": r.random() < 0.5,
        "indent": r.choice((0, 14, 28)),
        "switch": r.random() < 0.4,
    }
    return Node(r.choice(kinds), size, back, r.random() < 0.4, r.choice((0, 10, 16, 24, 36)), 0.0, (), facts, **more)


MAIN = ("list", "list", "tiles", "tiles", "table", "table", "text", "form", "code", "bubbles", "sections", "picture")
MAIN += ("keys", "month", "charts", "columns", "empty")
SIDE_KINDS = ("list", "list", "icons", "text", "form", "pictures", "list", "empty", "cards")
BAR_KINDS = ("tools", "words", "title", "search", "title", "steps", "empty")


def content(r: random.Random, depth: int) -> Node:
    """What fills the middle of a window: one thing, or a few beside or above each other."""
    roll = r.random()
    if depth >= 2 or roll < 0.55:
        return leaf(r, MAIN)
    direction = "row" if r.random() < 0.5 else "column"
    parts = [content(r, depth + 1) for _ in range(r.choice((2, 2, 3)))]
    if direction == "column" and r.random() < 0.7:
        parts[0] = leaf(r, ("cards", "title", "charts", "picture", "tools", "keys"), r.choice((60, 90, 130, 190, 260)))
    if direction == "row" and r.random() < 0.7:
        parts[r.choice((0, -1))] = leaf(r, SIDE_KINDS, r.choice((150, 200, 260, 300, 360)))
    return Node(direction, 0.0, "", False, r.choice((0, 0, 16, 30)), r.choice((0, 0, 14, 24)), tuple(parts))


def layout(seed: int) -> Node:
    """A random window: bars above and below, panels beside, something in the middle."""
    r = random.Random(seed)
    if r.random() < 0.12:  # one card in the middle of nothing: sign-in pages, alerts, small tools
        card = leaf(r, ("form", "text", "keys", "sections"), 0.0, r.choice(("", "panel")))
        card.facts.update(card=(r.randint(280, 620), r.randint(260, 620)))
        return Node("column", children=(Node("card", back=r.choice(("panel", "", "accent")), children=(card,)),))
    middle = [content(r, 0)]
    if r.random() < 0.55:
        back = r.choice(("panel", "panel", "", "accent"))
        middle.insert(0, leaf(r, SIDE_KINDS, r.choice((60, 72, 150, 190, 220, 260, 300, 380)), back))
    if r.random() < 0.2:
        middle.append(leaf(r, SIDE_KINDS, r.choice((180, 230, 280, 330)), r.choice(("panel", ""))))
    rows = [Node("row", children=tuple(middle))]
    for _ in range(r.choice((0, 1, 1, 1, 2, 3))):
        rows.insert(0, leaf(r, BAR_KINDS, r.choice((28, 38, 48, 60, 80, 120, 180)), r.choice(("", "panel", "accent"))))
    if r.random() < 0.4:
        rows.append(leaf(r, BAR_KINDS, r.choice((24, 34, 60, 110)), r.choice(("panel", "", "accent"))))
    return Node("column", children=tuple(rows))


# --- views: what may change without making another screen ----------------------------------------------------------------


def palette(r: random.Random) -> dict[str, Colour]:
    """A theme: light, dark or tinted, with any accent."""

    def tint(base: int, spread: int) -> Colour:
        return tuple(max(0, min(255, base + r.randint(-spread, spread))) for _ in range(3))  # type: ignore[return-value]

    dark = r.random() < 0.45
    bg = tint(r.randint(8, 48), 8) if dark else tint(r.randint(232, 255), 12)
    step = 1 if dark else -1
    shift, rule = r.randint(5, 20) * step, r.randint(26, 52) * step

    def moved(by: int) -> Colour:
        return tuple(max(0, min(255, c + by)) for c in bg)  # type: ignore[return-value]

    hue = [r.randint(0, 110), r.randint(40, 180), r.randint(150, 255)]
    r.shuffle(hue)
    return {
        "bg": bg,
        "panel": moved(shift),
        "line": moved(rule),
        "fg": tint(228, 10) if dark else tint(36, 16),
        "muted": tint(140, 14),
        "accent": (hue[0], hue[1], hue[2]),
        "white": (255, 255, 255),
    }


class Painter:
    """One view of one layout, drawn with Pillow at a quarter of its CSS size."""

    def __init__(self, r: random.Random, change: str) -> None:
        self.r = r
        self.colours = palette(r)
        self.width, self.height = r.randint(760, 1180), r.randint(620, 800)
        if change != "size" and r.random() < 0.5:
            self.width, self.height = 960, 720
        self.scroll = r.randint(40, 420) if change == "scroll" or r.random() < 0.25 else 0
        self.dialog = change == "dialog" or r.random() < 0.08
        self.image = Image.new("RGB", (self.width // SHRINK, self.height // SHRINK), self.colours["bg"])
        self.draw = ImageDraw.Draw(self.image)
        self.under = self.colours["bg"]
        self.ink = r.uniform(0.35, 0.6)

    def fill(self, box: Box, colour: Colour, outline: Colour | None = None, round_by: float = 0) -> None:
        x0, y0, x1, y1 = (v / SHRINK for v in box)
        if x1 - x0 < 0.6 or y1 - y0 < 0.5:
            return
        left, top, right, bottom = round(x0), round(y0), max(round(x0), round(x1) - 1), max(round(y0), round(y1) - 1)
        # Pillow refuses corners that leave no straight part
        corner = min(round(round_by / SHRINK), (min(right - left, bottom - top) - 2) // 2)
        if corner > 0:
            self.draw.rounded_rectangle((left, top, right, bottom), corner, colour, outline)
        else:
            self.draw.rectangle((left, top, right, bottom), colour, outline)

    def mix(self, front: Colour, share: float) -> Colour:
        return tuple(int(f * share + b * (1 - share)) for f, b in zip(front, self.under, strict=True))  # type: ignore[return-value]

    def text(self, x: float, y: float, width: float, font: float = 14, name: str = "fg", align: str = "left") -> None:
        """One line of text: words as bars, since that is what is left of letters at this size."""
        if width < 6:
            return
        colour = self.mix(self.colours[name], self.ink)
        words, used = [], 0.0
        while used < width - font:
            w = min(font * 0.6 * self.r.randint(2, 9), width - used)
            words.append((used, w))
            used += w + font * 0.45
        left = {"left": x, "center": x, "right": x}[align]
        for at, w in words:
            top = y + font * 0.15
            self.fill((left + at, top, left + at + w, top + max(font * 0.62, SHRINK)), colour)

    def phrase(self, x: float, y: float, room: float, font: float = 14, name: str = "fg", align: str = "left") -> None:
        """A line of random length inside `room`."""
        width = min(room, font * self.r.uniform(3, 16))
        left = {"left": x, "center": x + (room - width) / 2, "right": x + room - width}[align]
        self.text(left, y, width, font, name)

    # containers

    def node(self, n: Node, box: Box) -> None:
        x0, y0, x1, y1 = box
        if x1 - x0 < 8 or y1 - y0 < 8:
            return
        outer = self.under
        if n.back:
            self.under = self.colours[n.back]
            self.fill(box, self.under)
        if n.kind in ("row", "column"):
            self.split(n, (x0 + n.pad, y0 + n.pad, x1 - n.pad, y1 - n.pad))
        elif n.kind == "card":
            child = n.children[0]
            w, h = child.facts["card"]
            cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
            inner = (cx - w / 2, max(y0 + 8, cy - h / 2), cx + w / 2, min(y1 - 8, cy + h / 2))
            keep, self.under = self.under, self.colours[child.back or "bg"]
            self.fill(inner, self.under, self.colours["line"], 8)
            if child.facts["dot"]:
                self.fill((cx - 35, inner[1] + 24, cx + 35, inner[1] + 94), self.colours["accent"], None, 35)
                inner = (inner[0], inner[1] + 100, inner[2], inner[3])
            self.clip(child, (inner[0] + 34, inner[1] + 30, inner[2] - 34, inner[3] - 20))
            self.under = keep
        else:
            self.clip(n, box)
            if n.line:
                self.fill((x0, y1 - SHRINK, x1, y1), self.colours["line"])
        self.under = outer

    def split(self, n: Node, box: Box) -> None:
        x0, y0, x1, y1 = box
        across = n.kind == "row"
        length = (x1 - x0 if across else y1 - y0) - n.gap * (len(n.children) - 1)
        fixed = sum(c.size for c in n.children)
        flexible = sum(1 for c in n.children if not c.size) or 1
        shrink = min(1.0, length * 0.8 / fixed) if fixed else 1.0
        rest = max(0.0, (length - fixed * shrink) / flexible)
        at = x0 if across else y0
        for child in n.children:
            size = child.size * shrink if child.size else rest
            self.node(child, (at, y0, at + size, y1) if across else (x0, at, x1, at + size))
            at += size + n.gap

    def clip(self, n: Node, box: Box) -> None:
        """Draw a leaf on its own canvas, so that scrolled content ends at the leaf's edge."""
        x0, y0, x1, y1 = (round(v / SHRINK) for v in box)
        if x1 - x0 < 2 or y1 - y0 < 2:
            return
        image, draw = self.image, self.draw
        self.image = Image.new("RGB", (x1 - x0, y1 - y0), self.under)
        self.draw = ImageDraw.Draw(self.image)
        facts = n.facts
        width, height = box[2] - box[0], box[3] - box[1]
        pad = min(n.pad, width / 5, height / 5)
        left = pad
        if facts["width"] and width > facts["width"] + 60 and n.kind in ("form", "sections", "text", "list"):
            left, width = (width - facts["width"]) / 2, facts["width"] + 2 * pad
            width = min(width, box[2] - box[0])
        offset = self.scroll if facts["scrolls"] and height > 300 else 0
        getattr(self, f"paint_{n.kind}")(
            facts, left, pad - offset, max(10.0, width - 2 * pad), height - 2 * pad, offset
        )
        image.paste(self.image, (x0, y0))
        self.image, self.draw = image, draw

    # leaves: x, y, width, height in CSS pixels; y already scrolled, `extra` is by how much

    def paint_empty(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        return

    def paint_list(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        row = max(f["row"], f["lines"] * 19 + 8, f["dot"] + 6)
        chosen = self.r.randint(0, 8)
        for i in range(int((h + extra) / row) + 1):
            top = y + i * row
            if i == chosen and f["boxed"]:
                self.fill((x - 6, top, x + w, top + row), self.colours["line"])
            at = x + f["indent"] * self.r.randint(0, 2)
            if f["dot"]:
                colour = self.colours["accent" if f["fill"] == "accent" else "muted"]
                self.fill(
                    (at, top + 3, at + f["dot"], top + 3 + f["dot"]), colour, None, 0 if f["square"] else f["dot"] / 2
                )
                at += f["dot"] + 10
            for k in range(f["lines"]):
                name = "fg" if k == 0 else "muted"
                self.phrase(at, top + 6 + k * 19, max(0.0, x + w - at - (60 if f["right"] else 0)), 14, name)
            if f["right"] and f["switch"]:
                self.fill(
                    (x + w - 46, top + 8, x + w, top + 30), self.colours[self.r.choice(("accent", "muted"))], None, 11
                )
            elif f["right"]:
                self.phrase(x + w - 55, top + 6, 55, 14, "muted", "right")
            if f["rule"]:
                self.fill((x, top + row - SHRINK / 2, x + w, top + row), self.colours["line"])

    def paint_tiles(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        tw, th = f["tile"]
        gap = f["gap"]
        n = max(1, int((w + gap) / (tw + gap)))
        if f["both"]:  # a fixed number of columns that stretch, else tiles of a fixed size that wrap
            n = f["columns"]
            tw = max(20.0, (w - gap * (n - 1)) / n)
        step = th + gap + (22 * f["lines"] if f["lines"] < 3 else 44)
        for j in range(int((h + extra) / step) + 1):
            for i in range(n):
                left, top = x + i * (tw + gap), y + j * step
                if f["boxed"]:
                    self.fill((left, top, left + tw, top + step - gap), self.under, self.colours["line"], 6)
                name = self.r.choice((f["fill"], f["fill"], "muted")) if f["fill"] == "accent" else f["fill"]
                self.fill((left + 8, top + 8, left + tw - 8, top + th), self.colours[name], None, 5)
                for k in range(min(2, f["lines"])):
                    self.phrase(left + 6, top + th + 4 + 20 * k, tw - 12, 13, "fg", f["align"])

    def paint_table(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        n = f["columns"] + (5 if f["both"] else 0)
        row, wide = min(f["row"], 46), w / n
        self.fill((x, y, x + w, y + row), self.colours["panel"])
        for j in range(int((h + extra) / row) + 1):
            top = y + j * row
            for i in range(n):
                if f["right"] and i:
                    self.text(x + (i + 1) * wide - 50, top + 5, min(44, wide - 6))
                else:
                    self.phrase(x + i * wide + 5, top + 5, wide - 12)
            if f["rule"] or f["grid"]:
                self.fill((x, top, x + w, top + SHRINK / 1.5), self.colours["line"])
        if f["grid"]:
            for i in range(n + 1):
                self.fill((x + i * wide, y, x + i * wide + SHRINK, y + h + extra), self.colours["line"])

    def paint_text(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        self.phrase(x, y, w, 26 if f["both"] else 20)
        at, step = y + 48.0, f["font"] * 1.4
        while at < y + h + extra:
            if f["image"] and self.r.random() < 0.4:
                self.phrase(x, at, w, 20)
                at += 34
            for _ in range(self.r.randint(2, 8)):
                self.text(x, at, w - self.r.uniform(0, 60), f["font"])
                at += step
            self.text(x, at, w * self.r.uniform(0.2, 0.9), f["font"])
            at += step + 16

    def paint_form(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        self.phrase(x, y, w, 26, "fg", f["align"])
        at = y + 52.0
        two = f["both"] and w > 380
        for i in range(f["count"]):
            wide = (w - 16) / 2 if two else w
            left = x + (wide + 16) * (i % 2) if two else x
            self.phrase(left, at, wide, 14)
            self.fill((left, at + 20, left + wide, at + 58), self.colours["bg"], self.colours["line"], 6)
            self.phrase(left + 12, at + 30, wide - 24, 14, "muted")
            if not two or i % 2:
                at += 76
        self.fill(
            (x if f["align"] != "right" else x + w - 140, at + 14, x + (w if f["grid"] else 140), at + 56),
            self.colours["accent"],
            None,
            6,
        )
        self.phrase(x, at + 74, w, 14, "muted", f["align"])

    def paint_code(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        depth, step = 0, f["font"] * 1.55
        for i in range(int((h + extra) / step) + 1):
            depth = max(0, min(5, depth + self.r.randint(-1, 1)))
            top, left = y + i * step, x
            if f["both"]:
                self.text(left, top, 22, 13, "muted")
                left += 36
            if self.r.random() < 0.14:
                continue
            left += depth * 30 * bool(f["indent"])
            self.text(left, top, 40, f["font"], "accent" if f["image"] else "fg")
            self.phrase(
                left + 50,
                top,
                max(0.0, w - 130) * self.r.uniform(0.3, 1),
                f["font"] + 4,
                self.r.choice(("fg", "muted")),
            )

    def paint_bubbles(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        at, i = y, 0
        while at < y + h + extra:
            lines = self.r.randint(1, 4)
            wide = w * (0.62 if lines > 1 else self.r.uniform(0.2, 0.6))
            mine = self.r.random() < 0.4
            left = x + w - wide if mine else x
            colour = self.colours["accent" if mine else "panel"]
            self.fill((left, at, left + wide, at + lines * 19 + 20), colour, None, 14)
            keep, self.under = self.under, colour
            for k in range(lines):
                self.text(
                    left + 14,
                    at + 10 + 19 * k,
                    (wide - 28) * (1 if k < lines - 1 else self.r.uniform(0.3, 1)),
                    14,
                    "white" if mine else "fg",
                )
            self.under = keep
            at += lines * 19 + 32
            i += 1

    def paint_sections(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        n, row = f["columns"] // 2 + 1, max(46, f["row"])
        at = y
        while at < y + h + extra:
            tall = 46 + n * row
            if f["boxed"] or f["grid"]:
                self.fill(
                    (x, at, x + w, at + tall), self.colours["bg" if f["image"] else "panel"], self.colours["line"], 6
                )
            self.phrase(x + 18, at + 14, w, 17)
            for i in range(n):
                top = at + 46 + i * row
                left = x + 18
                if f["dot"]:
                    self.fill((left, top, left + f["dot"], top + f["dot"]), self.colours["muted"], None, f["dot"] / 2)
                    left += f["dot"] + 10
                self.phrase(left, top, w - 100)
                self.phrase(left, top + 19, w - 120, 14, "muted")
                if f["switch"]:
                    self.fill(
                        (x + w - 66, top + 4, x + w - 20, top + 28),
                        self.colours[self.r.choice(("accent", "muted"))],
                        None,
                        12,
                    )
                if f["rule"]:
                    self.fill((x + 18, top - 8, x + w - 18, top - 8 + SHRINK / 1.5), self.colours["line"])
            at += tall + f["gap"]

    def paint_picture(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        tall = min(h * 0.8, w * f["aspect"])
        colour = self.colours[f["fill"]] if not f["image"] else (14, 16, 20)
        self.fill((x, y, x + w, y + tall), colour)
        if f["both"]:
            self.fill((x + w / 2 - 22, y + tall / 2 - 26, x + w / 2 + 22, y + tall / 2 + 26), self.colours["white"])
        self.phrase(x, y + tall + 16, w, 22)
        for k in range(3):
            self.text(x, y + tall + 50 + 20 * k, w * self.r.uniform(0.5, 1), 14, "muted")

    def paint_pictures(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        tall = min(140, w * f["aspect"]) if not f["both"] else 62
        for j in range(int((h + extra) / (tall + 16)) + 1):
            top = y + j * (tall + 16)
            wide = w if not f["both"] else w * 0.45
            self.fill((x, top, x + wide, top + tall), self.colours[f["fill"]], self.colours["line"])
            if f["both"]:
                self.phrase(x + wide + 10, top + 4, w - wide - 10)
                self.phrase(x + wide + 10, top + 24, w - wide - 10, 14, "muted")

    def paint_keys(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        n, m = f["columns"], max(2, f["count"] // 2)
        y += extra
        for j in range(m):
            for i in range(n):
                wide, tall = (w - 10 * (n - 1)) / n, (h - 10 * (m - 1)) / m
                left, top = x + i * (wide + 10), y + j * (tall + 10)
                accent = f["both"] and i == n - 1
                self.fill(
                    (left, top, left + wide, top + tall),
                    self.colours["accent" if accent else "panel"],
                    self.colours["line"],
                    6,
                )
                self.text(left + wide / 2 - 8, top + tall / 2 - 12, 16, 24)

    def paint_month(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        y += extra
        m = 5 if f["both"] else 6
        for j in range(m):
            for i in range(7):
                left, top = x + i * w / 7, y + j * h / m
                self.fill((left, top, left + w / 7 + SHRINK, top + h / m + SHRINK), self.under, self.colours["line"])
                self.text(left + 6, top + 6, 14)
                for k in range(max(0, self.r.randint(-2, 2))):
                    self.fill(
                        (left + 6, top + 26 + 24 * k, left + w / 7 - 6, top + 46 + 24 * k),
                        self.colours["accent"],
                        None,
                        4,
                    )

    def paint_charts(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        n = 1 if w < 300 else 1 + f["columns"] % 3
        tall = f["tile"][1] + 40.0
        for j in range(int((h + extra) / (tall + 16)) + 1):
            wide = (w - 16 * (n - 1)) / n
            for i in range(n):
                left, top = x + i * (wide + 16), y + j * (tall + 16)
                if f["boxed"] or f["grid"]:
                    self.fill((left, top, left + wide, top + tall), self.under, self.colours["line"], 6)
                self.phrase(left + 14, top + 12, wide - 28)
                slot = (wide - 28) / f["bars"]
                for b in range(f["bars"]):
                    high = (tall - 56) * self.r.uniform(0.15, 1)
                    if f["square"]:
                        self.fill(
                            (
                                left + 14 + b * slot,
                                top + tall - 12 - high,
                                left + 14 + (b + 0.75) * slot,
                                top + tall - 12,
                            ),
                            self.colours["accent"],
                        )
                    else:
                        self.fill(
                            (
                                left + 14 + b * slot,
                                top + tall - 12 - high,
                                left + 14 + (b + 1) * slot,
                                top + tall - 6 - high,
                            ),
                            self.colours["accent"],
                        )

    def paint_columns(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        n = 2 + f["columns"] % 4
        wide = (w - 14 * (n - 1)) / n
        for i in range(n):
            left = x + i * (wide + 14)
            if f["grid"]:
                self.fill((left, y, left + wide, y + h + extra), self.colours["panel"], None, 8)
            self.phrase(left + 12, y + 12, wide - 24, 16)
            at = y + 44
            for _ in range(self.r.randint(2, 7)):
                lines = self.r.randint(1, 4)
                self.fill(
                    (left + 12, at, left + wide - 12, at + 22 + 19 * lines), self.colours["bg"], self.colours["line"], 6
                )
                for k in range(lines):
                    self.text(left + 24, at + 10 + 19 * k, (wide - 48) * self.r.uniform(0.5, 1))
                at += 36 + 19 * lines

    def paint_cards(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        n = f["columns"] if w > h else 1
        m = 1 if w > h else f["columns"]
        y += extra
        for i in range(n):
            for j in range(m):
                wide, tall = (w - 12 * (n - 1)) / n, (h - 12 * (m - 1)) / m
                left, top = x + i * (wide + 12), y + j * (tall + 12)
                self.fill(
                    (left, top, left + wide, top + tall),
                    self.colours["panel" if f["image"] else "bg"],
                    self.colours["line"],
                    6,
                )
                self.phrase(left + 14, top + 12, wide - 28, 14, "muted")
                self.text(left + 14, top + 32, min(wide - 28, 50), 26)

    def paint_icons(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        size = min(w * 0.7, f["icon"] + 8)
        y += extra
        for j in range(f["count"]):
            top = y + j * (size + f["gap"])
            self.fill(
                (x + (w - size) / 2, top, x + (w + size) / 2, top + size),
                self.colours["muted"],
                None,
                size / 2 if f["square"] else 6,
            )

    def paint_tools(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        size = min(f["icon"], h)
        for i in range(f["count"] + 4):
            left = x + i * (size + 10)
            if left + size < x + w:
                self.fill(
                    (left, (h + 2 * y - size) / 2, left + size, (h + 2 * y + size) / 2), self.colours["muted"], None, 4
                )

    def paint_words(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        at = x
        for _ in range(f["count"]):
            wide = self.r.uniform(36, 90)
            if at + wide > x + w:
                return
            if f["boxed"]:
                self.fill((at - 10, y, at + wide + 10, y + h), self.under, self.colours["line"], 6)
            self.text(at, y + h / 2 - 8, wide, 14, "white" if self.under == self.colours["accent"] else "fg")
            at += wide + (34 if f["boxed"] else 22)

    def paint_title(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        name = "white" if self.under == self.colours["accent"] else "fg"
        if f["image"] and h > 90:
            self.fill((x, y, x + h, y + h), self.colours["muted" if name == "white" else "accent"])
            x, w = x + h + 20, w - h - 20
        elif f["dot"]:
            self.fill(
                (x, y + h / 2 - 18, x + 36, y + h / 2 + 18),
                self.colours["accent" if name == "fg" else "white"],
                None,
                18,
            )
            x, w = x + 50, w - 50
        self.phrase(x, y + h / 2 - 14, w * 0.6, 24 if h > 44 else 14, name, f["align"])
        if f["right"]:
            self.fill(
                (x + w - 90, y + h / 2 - 16, x + w, y + h / 2 + 16),
                self.colours["accent" if name == "fg" else "white"],
                None,
                6,
            )

    def paint_search(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        for i in range(f["columns"] // 2):
            self.fill((x + i * 42, y, x + i * 42 + 34, y + h), self.under, self.colours["line"], 6)
        left = x + f["columns"] // 2 * 42
        right = x + w if f["both"] else min(x + w, left + 320)
        back = self.colours["bg"] if self.under != self.colours["bg"] else self.under
        self.fill((left, y, right, y + h), back, self.colours["line"], h / 2 if f["square"] else 6)
        self.phrase(left + 12, y + h / 2 - 8, right - left - 20, 14, "muted")

    def paint_steps(self, f: dict[str, Any], x: float, y: float, w: float, h: float, extra: float) -> None:
        n = 2 + f["columns"] % 4
        done = self.r.randint(1, n)
        for i in range(n):
            left = x + i * w / n
            self.fill(
                (left, y + h / 2 - 18, left + 36, y + h / 2 + 18),
                self.colours["accent" if i < done else "line"],
                None,
                18,
            )
            self.phrase(left + 46, y + h / 2 - 8, w / n - 60)

    def finish(self) -> Image.Image:
        """A dialog over it where there is one, then the size of the model's input."""
        if self.dialog:
            if self.r.random() < 0.8:
                self.image = Image.blend(self.image, Image.new("RGB", self.image.size), self.r.uniform(0.2, 0.6))
                self.draw = ImageDraw.Draw(self.image)
            w, h = self.r.randint(260, 460), self.r.randint(120, 280)
            cx = self.width / 2 + self.r.choice((0, 0, self.r.randint(-160, 160)))
            cy = self.height / 2 + self.r.choice((0, 0, self.r.randint(-120, 120)))
            self.under = self.colours["bg"]
            self.fill((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), self.under, self.colours["line"], 10)
            self.phrase(cx - w / 2 + 22, cy - h / 2 + 20, w - 44, 20)
            for k in range(max(1, int((h - 110) / 20))):
                self.text(cx - w / 2 + 22, cy - h / 2 + 56 + 20 * k, (w - 44) * self.r.uniform(0.5, 1))
            self.fill(
                (cx + w / 2 - 102, cy + h / 2 - 56, cx + w / 2 - 22, cy + h / 2 - 20), self.colours["accent"], None, 6
            )
        return self.image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


CHANGES = ("none", "theme", "size", "scroll", "dialog", "theme")


def view(seed: int, number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """View `number` of layout `seed`: uint8 of shape (SIDE, SIDE, 3)."""
    painter = Painter(random.Random(seed * 1009 + number), CHANGES[number % len(CHANGES)])
    painter.node(layout(seed), (0.0, 0.0, float(painter.width), float(painter.height)))
    return np.asarray(painter.finish(), dtype=np.uint8)


def _views(job: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.stack([view(job[0], number) for number in range(job[1])])


def draw(first: int, count: int, views: int, processes: int) -> torch.Tensor:
    """Views of `count` layouts: uint8 of shape (count, views, 3, SIDE, SIDE)."""
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        made = pool.map(_views, [(first + i, views) for i in range(count)], chunksize=32)
    return torch.from_numpy(np.stack(made)).permute(0, 1, 4, 2, 3).contiguous()


# --- the model --------------------------------------------------------------------------------------------------------------


def build() -> Any:
    """The untrained CLIP.  The vision tower does the work; the text tower is there because a CLIP has one."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(SEED)
    ids = len(vocabulary())
    config = CLIPConfig(
        text_config=dict(
            vocab_size=ids, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, projection_dim=64, bos_token_id=ids - 2, eos_token_id=ids - 1, pad_token_id=ids - 1,
        ),
        vision_config=dict(
            hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
            patch_size=16, projection_dim=64,
        ),
        projection_dim=64,
    )  # fmt: skip
    return CLIPModel(config)


def vocabulary() -> list[str]:
    """The byte alphabet of a CLIP tokenizer and a few merges; enough to take any text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
    return [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]


def save(model: Any, out: Path) -> None:
    """Write the folder that `SentenceTransformer(folder)` loads without a network."""
    from transformers import CLIPImageProcessorPil, CLIPProcessor, CLIPTokenizer

    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(vocabulary())}, merges=[], model_max_length=32)
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    model.save_pretrained(out)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(out)


def embed(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Unit vectors of shape (n, 64) for uint8 images of shape (n, 3, SIDE, SIDE)."""
    seen = model.vision_model(pixel_values=images.float() / 127.5 - 1)
    return functional.normalize(model.visual_projection(seen.pooler_output), dim=-1)


def recoloured(images: torch.Tensor, random_: torch.Generator) -> torch.Tensor:
    """More themes for nothing: channels exchanged, brightness turned over, contrast changed; uint8 in and out."""
    n = len(images)
    mixed = images[:, torch.randperm(3, generator=random_)].float()
    turned = torch.rand(n, 1, 1, 1, generator=random_) < 0.2
    mixed = torch.where(turned, 255 - mixed, mixed)
    mean = mixed.mean(dim=(2, 3), keepdim=True)
    scale = 0.75 + 0.5 * torch.rand(n, 1, 1, 1, generator=random_)
    return (mean + (mixed - mean) * scale).clamp(0, 255).to(torch.uint8)


def train(model: Any, data: torch.Tensor, epochs: int, batch: int, judge: Path | None = None) -> None:
    """Pull two views of one layout together, push all other layouts in the batch away."""
    random_ = torch.Generator().manual_seed(SEED)
    scale = torch.nn.Parameter(torch.tensor(math.log(10.0)))
    weights = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    optimiser = torch.optim.AdamW(
        [{"params": weights}, {"params": [scale], "weight_decay": 0.0}], lr=1e-3, weight_decay=0.05
    )
    steps = epochs * (len(data) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps, pct_start=0.1)
    model.train()
    start, step = time.monotonic(), 0
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=random_)
        total = 0.0
        for at in range(0, len(order) - batch + 1, batch):
            chosen = order[at : at + batch]
            absolute_weight = min(1.0, step / (0.3 * steps))
            pair = torch.rand(batch, data.shape[1], generator=random_).topk(2).indices
            images = torch.cat([data[chosen, pair[:, 0]], data[chosen, pair[:, 1]]])
            vectors = embed(model, recoloured(images, random_))
            likeness = vectors[:batch] @ vectors[batch:].T
            truth = torch.arange(batch)
            logits = likeness * scale.exp().clamp(max=40)
            ranking = (functional.cross_entropy(logits, truth) + functional.cross_entropy(logits.T, truth)) / 2
            # a ranking alone lets each layout have its own scale; a threshold needs one boundary for all of them
            off = likeness[~torch.eye(batch, dtype=torch.bool)].view(batch, batch - 1)
            near = off.topk(8, dim=1).values
            absolute = functional.softplus(8 * (BOUNDARY - likeness.diagonal())).mean() + functional.softplus(8 * (near - BOUNDARY)).mean()
            loss = ranking + absolute * absolute_weight
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
            step += 1
        print(
            f"epoch {epoch + 1}: loss {total / (len(order) // batch):.3f}, {time.monotonic() - start:.0f} s", flush=True
        )
    model.eval()


# --- thresholds: from further random layouts ----------------------------------------------------------------------------------


def calibrate(model: Any, data: torch.Tensor, screens: int = 12) -> dict[str, Any]:
    """Derive `accept` and `margin` from layouts that training did not see.

    Episodes: `screens` layouts are recorded by one view each; the other views of these and all views of as many strange
    layouts are asked.  `accept` is the least similarity at which fewer than one strange view in 1000 passes together
    with the margin.
    """
    with torch.inference_mode():
        vectors = torch.stack([embed(model, layout_views) for layout_views in data]).numpy()
    rng = np.random.default_rng(SEED)
    known, strange = [], []
    for _ in range(400):
        chosen = rng.permutation(len(vectors))[: 2 * screens]
        index = vectors[chosen[:screens], 0]
        for place, which in enumerate(chosen):
            for vector in vectors[which, 1:]:
                scores = index @ vector
                best, second = np.sort(scores)[-1:-3:-1]
                if place < screens:
                    known.append((best, best - second, bool(scores.argmax() == place)))
                else:
                    strange.append((best, best - second))
    margin = 0.05
    passing = np.sort([best for best, gap in strange if gap >= margin])
    allowed = len(strange) // 1000
    accept = math.ceil(float(passing[-allowed - 1]) * 1000) / 1000
    right = sum(1 for best, gap, ok in known if ok and best >= accept and gap >= margin) / len(known)
    wrong = sum(1 for best, gap, ok in known if not ok and best >= accept and gap >= margin) / len(known)
    taken = sum(1 for best, gap in strange if best >= accept and gap >= margin) / len(strange)
    unsure = round(float(np.quantile([best for best, _ in strange], 0.95)), 3)
    return {
        "version": 1,
        "accept": accept,
        "unsure": min(unsure, accept),
        "margin": margin,
        "derived_from": {
            "what": "views of random layouts drawn by tests/tools/train_tiny_clip.py, none of them used in training; "
            "no real screenshot took part",
            "layouts": len(vectors),
            "views_per_layout": int(vectors.shape[1]),
            "recorded_at_a_time": screens,
            "rule": "accept: under 1 in 1000 views of strange layouts pass; unsure: their 95th percentile",
            "recognised_share": round(right, 4),
            "taken_for_another_share": round(wrong, 5),
            "strange_taken_share": round(taken, 5),
        },
    }


def judge_folder(folder: Path, model_folder: Path, limits: dict[str, Any]) -> None:
    """Leave one screen out at a time: its pictures must stay unknown, all others be recognised."""
    from sentence_transformers import SentenceTransformer

    pipeline = SentenceTransformer(str(model_folder), device="cpu", local_files_only=True)
    entries = json.loads((folder / "manifest.json").read_text())["screens"]
    vectors = np.asarray(
        pipeline.encode([Image.open(folder / e["file"]).convert("RGB") for e in entries], normalize_embeddings=True)
    )
    bases = [i for i, e in enumerate(entries) if e["kind"] == "base"]
    right = asked = false = strange = 0
    for i, entry in enumerate(entries):
        scores = {entries[b]["screen"]: float(vectors[b] @ vectors[i]) for b in bases if b != i}
        ranked = sorted(scores.items(), key=lambda item: -item[1])
        if entry["kind"] == "variation":
            asked += 1
            ok = ranked[0][1] >= limits["accept"] and ranked[0][1] - ranked[1][1] >= limits["margin"]
            right += ok and ranked[0][0] == entry["screen"]
            print(
                f"{entry['file']:24} {'ok ' if ok and ranked[0][0] == entry['screen'] else 'NO '} own {scores[entry['screen']]:.3f} others {[(n, round(s, 2)) for n, s in ranked[:3] if n != entry['screen']][:2]}"
            )
        others = [s for n, s in ranked if n != entry["screen"]]
        strange += 1
        false += others[0] >= limits["accept"] and others[0] - others[1] >= limits["margin"]
    print(f"{folder}: recognised {right}/{asked}, strange taken for known {false}/{strange}, {limits['accept']=}")


def main() -> int:
    """Draw, train, calibrate, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "gpu_fsm" / "data" / "tiny-clip"
    )
    parser.add_argument("--layouts", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--views", type=int, default=6)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--judge", type=Path, action="append", default=[])
    asked = parser.parse_args()
    torch.set_num_threads(asked.processes)
    start = time.monotonic()
    data = draw(0, asked.layouts, asked.views, asked.processes)
    print(f"drew {tuple(data.shape)} in {time.monotonic() - start:.0f} s", flush=True)
    model = build()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, data, asked.epochs, asked.batch)
    limits = calibrate(model, draw(1_000_000, 1000, asked.views, asked.processes))
    asked.out.mkdir(parents=True, exist_ok=True)
    save(model, asked.out)
    (asked.out / "recognition.json").write_text(json.dumps(limits, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(limits, indent=1), f"{time.monotonic() - start:.0f} s", flush=True)
    for folder in asked.judge:
        judge_folder(folder, asked.out, limits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
