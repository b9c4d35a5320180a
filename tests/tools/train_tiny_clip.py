"""Train the tiny CLIP that ships in `gpu_fsm/data/tiny-clip/`: a real CLIP, small enough to live in the package.

    python tests/tools/train_tiny_clip.py [--out DIR] [--judge FOLDER]

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

WIDTH, HEADS, FILTERS, VECTOR = 256, 8, 96, 64
PATCH = 16
PATCHES = SIDE // PATCH
WINDOWS = (4, 2)
"""Each head looks at one part of the screen to begin with: so many across and down."""


def build() -> Any:
    """The CLIP before training.  The vision tower does the work; the text tower is there because a CLIP has one."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(SEED)
    ids = len(vocabulary())
    config = CLIPConfig(
        text_config=dict(
            vocab_size=ids, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, projection_dim=VECTOR, bos_token_id=ids - 2, eos_token_id=ids - 1,
            pad_token_id=ids - 1,
        ),
        vision_config=dict(
            hidden_size=WIDTH, intermediate_size=2 * FILTERS, num_hidden_layers=2, num_attention_heads=HEADS,
            image_size=SIDE, patch_size=PATCH, projection_dim=VECTOR,
        ),
        projection_dim=VECTOR,
    )  # fmt: skip
    model = CLIPModel(config)
    with torch.no_grad():
        start(model)
    return model


def filters() -> torch.Tensor:
    """Cosine filters of shape (FILTERS, PATCH, PATCH), lowest frequencies first, without the mean: it is the theme's."""
    waves = [(u, v) for u in range(PATCH) for v in range(PATCH) if u + v]
    waves.sort(key=lambda wave: wave[0] ** 2 + wave[1] ** 2)
    x = (torch.arange(PATCH) + 0.5) / PATCH * math.pi
    made = [torch.outer(torch.cos(u * x), torch.cos(v * x)) for u, v in waves[:FILTERS]]
    return torch.stack([f / f.norm() for f in made])


def start(model: Any) -> None:
    """Set the vision tower to a layout descriptor, from which training needs minutes; from noise it needs hours.

    Patch embedding: cosine filters beside a one-hot position.  First layer: its MLP adds the filters' absolute values,
    which a dark theme leaves as they are.  Second layer: each head averages them over one part of the screen, by
    position, and the class token ends up holding eight parts of 32 values.  A little noise lets all weights learn.
    """
    tower = model.vision_model
    for weights in tower.parameters():
        weights.zero_()
    for part in tower.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.weight.fill_(1)
    count, size = PATCHES**2, WIDTH // HEADS
    tower.embeddings.patch_embedding.weight[:FILTERS] = filters()[:, None] / 3
    loud = 0.75 * math.sqrt(WIDTH)  # so that a token's norm is mostly its position's, the same for all
    for patch in range(count):
        tower.embeddings.position_embedding.weight[patch + 1, FILTERS + patch] = loud
    tower.embeddings.class_embedding[FILTERS + count] = loud
    absolute = FILTERS + count + 1
    first, second = tower.encoder.layers
    for i in range(FILTERS):
        first.mlp.fc1.weight[i, i], first.mlp.fc1.weight[FILTERS + i, i] = 4.0, -4.0
        first.mlp.fc2.weight[absolute + i, i] = first.mlp.fc2.weight[absolute + i, FILTERS + i] = 1.0
    values = torch.zeros(size, FILTERS)
    single = size * 5 // 8
    values[range(single), range(single)] = 1.0
    for row, chunk in enumerate(torch.arange(single, FILTERS).chunk(size - single)):
        values[single + row, chunk] = 1 / math.sqrt(len(chunk))
    attention = second.self_attn
    x = (torch.arange(count) % PATCHES + 0.5) / PATCHES
    y = (torch.arange(count) // PATCHES + 0.5) / PATCHES
    across, down = WINDOWS
    for head in range(HEADS):
        row = head * size
        centre_x, centre_y = (head % across + 0.5) / across, (head // across + 0.5) / down
        nearness = -(((x - centre_x) * across) ** 2 + ((y - centre_y) * down) ** 2)
        attention.k_proj.weight[row, FILTERS : FILTERS + count] = nearness / math.sqrt(size)
        attention.k_proj.weight[row, FILTERS + count] = -60 / math.sqrt(size)
        attention.q_proj.bias[row] = size / math.sqrt(WIDTH)
        attention.v_proj.weight[row : row + size, absolute : absolute + FILTERS] = values
    attention.out_proj.weight.copy_(torch.eye(WIDTH))
    for name, weights in tower.named_parameters():
        if weights.dim() == 2 and not name.endswith(("out_proj.weight", "fc2.weight", "position_embedding.weight")):
            weights.add_(torch.randn(weights.shape) * 0.005)


def discriminate(model: Any, data: torch.Tensor) -> None:
    """Set the projection in closed form: the directions in which layouts differ and views of one layout do not."""
    with torch.inference_mode():
        pooled = torch.stack([model.vision_model(pixel_values=scaled(views)).pooler_output for views in data])
    mean = pooled.mean((0, 1))
    centred = (pooled - mean).double()
    middle = centred.mean(1, keepdim=True)
    noise = (centred - middle).flatten(0, 1)
    within = noise.T @ noise / (len(noise) * (data.shape[1] - 1) / data.shape[1])
    within += 0.01 * within.diagonal().mean() * torch.eye(WIDTH)
    between = middle[:, 0].T @ middle[:, 0] / len(middle)
    sizes, axes = torch.linalg.eigh(within)
    whiten = axes / sizes.sqrt()
    _, best = torch.linalg.eigh(whiten.T @ between @ whiten)
    with torch.no_grad():
        model.vision_model.post_layernorm.bias.sub_(mean)
        model.visual_projection.weight.copy_((whiten @ best[:, -VECTOR:]).T)


def vocabulary() -> list[str]:
    """The byte alphabet of a CLIP tokenizer, once inside and once at the end of a word: enough to take any text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    return [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]


def save(model: Any, out: Path) -> None:
    """Write the folder that `SentenceTransformer(folder)` loads without a network."""
    from transformers import CLIPImageProcessorPil, CLIPProcessor, CLIPTokenizer

    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(vocabulary())}, merges=[], model_max_length=32)
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written for the owner alone, which a package must not be
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(out)


def scaled(images: torch.Tensor) -> torch.Tensor:
    """Bytes to -1..1, as the image processor does it."""
    return images.float() / 127.5 - 1


def embed(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Unit vectors of shape (n, VECTOR) for uint8 images of shape (n, 3, SIDE, SIDE)."""
    seen = model.vision_model(pixel_values=scaled(images))
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


def train(model: Any, data: torch.Tensor, epochs: int, batch: int, rate: float) -> None:
    """Pull two views of one layout together, push all other layouts in the batch away."""
    random_ = torch.Generator().manual_seed(SEED)
    scale = torch.nn.Parameter(torch.tensor(math.log(12.0)))
    weights = [*model.vision_model.parameters(), model.visual_projection.weight, scale]
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.02)
    steps = epochs * (len(data) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 40) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    began = time.monotonic()
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=random_)
        total = right = 0.0
        for at in range(0, len(order) - batch + 1, batch):
            chosen = order[at : at + batch]
            pair = torch.rand(batch, data.shape[1], generator=random_).topk(2).indices
            images = torch.cat([data[chosen, pair[:, 0]], data[chosen, pair[:, 1]]])
            vectors = embed(model, recoloured(images, random_))
            logits = vectors[:batch] @ vectors[batch:].T * scale.exp().clamp(max=40)
            truth = torch.arange(batch)
            loss = (functional.cross_entropy(logits, truth) + functional.cross_entropy(logits.T, truth)) / 2
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() / (len(order) // batch)
            right += (logits.argmax(1) == truth).float().mean().item() / (len(order) // batch)
        print(f"epoch {epoch + 1}: loss {total:.3f}, right {right:.3f}, {time.monotonic() - began:.0f} s", flush=True)
    model.eval()


# --- thresholds: from further random layouts ----------------------------------------------------------------------------------

MARGIN = 0.05
STRANGE = 0.01
"""The share of strange views that may pass."""


def calibrate(model: Any, data: torch.Tensor, screens: int = 12) -> dict[str, Any]:
    """Derive the thresholds from layouts that training did not see.

    Episodes: `screens` layouts are recorded by one view each; the other views of these and the views of as many
    strange layouts are asked.
    """
    with torch.inference_mode():
        vectors = torch.stack([embed(model, views) for views in data]).numpy()
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
    passing = np.sort([best for best, gap in strange if gap >= MARGIN])
    accept = math.ceil(float(passing[-int(len(strange) * STRANGE) - 1]) * 1000) / 1000
    unsure = math.ceil(float(np.quantile([best for best, _ in strange], 0.9)) * 1000) / 1000

    def share(cases: list[bool]) -> float:
        return round(sum(cases) / len(cases), 4)

    return {
        "version": 1,
        "accept": accept,
        "unsure": min(unsure, accept),
        "margin": MARGIN,
        "derived_from": {
            "data": f"{len(vectors)} random layouts of {vectors.shape[1]} views each, drawn by "
            "tests/tools/train_tiny_clip.py and not used in training; no screenshot took part",
            "recorded_at_a_time": screens,
            "rule": f"accept: {STRANGE:.0%} of the views of layouts that were not recorded pass; "
            "unsure: 10 % of them are this near to a recorded one; margin: chosen before",
            "right_layout_nearest": share([ok for _, _, ok in known]),
            "recognised": share([ok and best >= accept and gap >= MARGIN for best, gap, ok in known]),
            "taken_for_another": share([not ok and best >= accept and gap >= MARGIN for best, gap, ok in known]),
            "strange_taken_for_known": share([best >= accept and gap >= MARGIN for best, gap in strange]),
        },
    }


def judge(folder: Path, model_folder: Path) -> None:
    """Print how the model does on rendered screens; each is also asked with its own screen left out of the memory."""
    from sentence_transformers import SentenceTransformer

    limits = json.loads((model_folder / "recognition.json").read_text())
    pipeline = SentenceTransformer(str(model_folder), device="cpu", local_files_only=True)
    entries = json.loads((folder / "manifest.json").read_text())["screens"]
    images = [Image.open(folder / e["file"]).convert("RGB") for e in entries]
    vectors = np.asarray(pipeline.encode(images, normalize_embeddings=True))
    bases = {e["screen"]: vectors[i] for i, e in enumerate(entries) if e["kind"] == "base"}

    def verdict(vector: Any, left_out: str = "") -> tuple[str, float, bool]:
        ranked = sorted(
            ((float(base @ vector), name) for name, base in bases.items() if name != left_out), reverse=True
        )
        (best, name), (second, _) = ranked[:2]
        return name, best, best >= limits["accept"] and best - second >= limits["margin"]

    right = wrong = asked = taken = 0
    for entry, vector in zip(entries, vectors, strict=True):
        if entry["kind"] == "variation":
            name, best, passed = verdict(vector)
            asked += 1
            right += passed and name == entry["screen"]
            wrong += passed and name != entry["screen"]
            if not passed or name != entry["screen"]:
                print(f"  {entry['file']}: {name} {best:.3f}")
        name, best, passed = verdict(vector, entry["screen"])
        taken += passed
        if passed:
            print(f"  {entry['file']} without its own screen: {name} {best:.3f}")
    print(f"{folder}: recognised {right}/{asked}, as another {wrong}, strange taken for known {taken}/{len(entries)}")


def main() -> int:
    """Draw, train, calibrate, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    home = Path(__file__).resolve().parents[2]
    parser.add_argument("--out", type=Path, default=home / "gpu_fsm" / "data" / "tiny-clip")
    parser.add_argument("--layouts", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=120)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--judge", type=Path, action="append", default=[])
    parser.add_argument("--only-judge", action="store_true", help="use the model that is in the folder")
    asked = parser.parse_args()
    if not asked.only_judge:
        torch.set_num_threads(asked.processes)
        began = time.monotonic()
        views = len(CHANGES)
        data = draw(0, asked.layouts, views, asked.processes)
        print(f"drew {tuple(data.shape)} in {time.monotonic() - began:.0f} s", flush=True)
        model = build()
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
        discriminate(model, data[:1500])
        train(model, data, asked.epochs, asked.batch, asked.rate)
        limits = calibrate(model, draw(1_000_000, 1000, views, asked.processes))
        asked.out.mkdir(parents=True, exist_ok=True)
        save(model, asked.out)
        (asked.out / "recognition.json").write_text(json.dumps(limits, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(limits, indent=1), f"{time.monotonic() - began:.0f} s", flush=True)
    for folder in asked.judge:
        judge(folder, asked.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
