"""Render the demo's screenshots with a real browser and write `gpu_fsm/data/screens/` with its manifest.

    python tests/tools/render_screens.py [--browser chromium] [--out DIR] [--development DIR]

Every page is a small design of its own, made from a theme, a text seed, a window size, a scroll offset and perhaps a
dialog.  A *base* is what the demo records; its *variations* change one of these each; the *unknown* pages are never
recorded.  `--development DIR` renders other designs instead, which are not shipped: a model or its training data may be
judged on those, never on the shipped ones.  The PNGs depend on the browser and its fonts, so a new run gives new
digests; the manifest is written in the same run.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from attrs import evolve, frozen
from PIL import Image

THEMES = {
    "light": dict(bg="#ffffff", panel="#f3f4f6", line="#d5d8dd", fg="#20242b", muted="#7d8590", accent="#2563c9"),
    "dark": dict(bg="#16181d", panel="#22262e", line="#383e49", fg="#e4e7ec", muted="#8b93a1", accent="#5b9dff"),
    "warm": dict(bg="#fbf3e2", panel="#f0e2c4", line="#d6c19a", fg="#3f3222", muted="#8f7a58", accent="#b5481d"),
}
WORDS = (
    "account annual archive backup balance branch budget calendar camera client colour comment contract copy customer "
    "delivery design draft east engine event export factory figures folder garden history holiday image import invoice "
    "journal kitchen language letter library market meeting minutes model monday network note number office order page "
    "paper partner payment people photo plan point postcard price printer profile project quarter question receipt "
    "region release report research result review river sample schedule screen search season server shelf station "
    "storage street summary supplier system table team ticket today topic travel update vendor version village visit"
).split()
OTHER_WORDS = (
    "abend antwort aufgabe auftrag ausgabe bahnhof beispiel bericht betrag bild brief datei daten datum drucker ende "
    "entwurf ergebnis farbe fenster firma frage garten gebiet geschichte gruppe hafen haus heute inhalt jahr kapitel "
    "karte kasse kunde lager lieferung liste markt meldung mittwoch monat morgen nachricht name neu ordner ort papier "
    "plan preis probe projekt quartal rechnung reise sache schule seite sommer spalte stadt stelle strasse stunde "
    "tabelle tag teil termin thema titel umsatz urlaub verein verlag vertrag verwaltung vorlage wagen wasser werk woche"
).split()


@frozen(kw_only=True)
class Look:
    """One rendering of a page: sizes in CSS pixels, two of which make one pixel of the PNG."""

    theme: str = "light"
    width: int = 960
    height: int = 720
    scroll: int = 0
    text: int = 1
    dialog: bool = False


class Writer:
    """Seeded text, so that a page's content is its seed and nothing else."""

    def __init__(self, seed: str, other: bool) -> None:
        self._random = random.Random(seed)
        self._words = OTHER_WORDS if other else WORDS

    def words(self, low: int, high: int) -> str:
        n = self._random.randint(low, high)
        return html.escape(" ".join(self._random.choice(self._words) for _ in range(n)).capitalize())

    def number(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def money(self) -> str:
        return f"{self._random.uniform(1, 9000):,.2f}"

    def pick(self, *choices: str) -> str:
        return self._random.choice(choices)


STYLE = """
*{box-sizing:border-box;margin:0;padding:0}
html,body{height:100%;overflow:hidden}
body{font:14px/1.35 "DejaVu Sans",sans-serif;background:var(--bg);color:var(--fg);display:flex;flex-direction:column}
.row{display:flex;align-items:center;gap:10px}.col{display:flex;flex-direction:column}.grow{flex:1;min-width:0;min-height:0}
.panel{background:var(--panel)}.muted{color:var(--muted)}.box{border:1px solid var(--line);border-radius:6px}
.btn{background:var(--accent);color:#fff;border-radius:6px;padding:8px 16px;display:inline-block}
.ghost{border:1px solid var(--line);border-radius:6px;padding:6px 12px;display:inline-block}
.field{border:1px solid var(--line);border-radius:6px;padding:9px 12px;background:var(--bg);color:var(--muted)}
.scroll{overflow-y:scroll;scrollbar-width:none}.cut{white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.dot{width:38px;height:38px;border-radius:50%;background:var(--accent);flex:none}
.veil{position:fixed;inset:0;background:#0006;display:flex;align-items:center;justify-content:center}
.dialog{background:var(--bg);border:1px solid var(--line);border-radius:10px;width:360px;padding:22px;
box-shadow:0 12px 40px #0007}
"""

Page = Callable[[Writer, Look], str]


def login(w: Writer, _look: Look) -> str:
    return f"""<div class="grow col panel" style="align-items:center;justify-content:center">
<div class="box col" style="background:var(--bg);width:430px;padding:38px;gap:16px">
<div class="dot" style="width:70px;height:70px;align-self:center"></div>
<h1 style="text-align:center">{w.words(2, 3)}</h1><p class="muted" style="text-align:center">{w.words(6, 10)}</p>
<label>{w.words(1, 2)}</label><div class="field">{w.words(1, 2)}</div>
<label>{w.words(1, 1)}</label><div class="field">&bull;&bull;&bull;&bull;&bull;&bull;&bull;</div>
<div class="row"><div style="width:16px;height:16px;border:2px solid var(--accent)"></div>{w.words(2, 4)}</div>
<div class="btn" style="text-align:center;padding:13px">{w.words(1, 2)}</div>
<p class="muted" style="text-align:center">{w.words(3, 5)}</p></div></div>
<div class="muted" style="padding:14px;text-align:center">{w.words(5, 8)}</div>"""


def files(w: Writer, _look: Look) -> str:
    tree = "".join(
        f'<div class="row cut" style="padding:6px 0 6px {14 * w.number(0, 2)}px"><div style="width:14px;height:11px;'
        f'background:var(--accent)"></div>{w.words(1, 2)}</div>'
        for _ in range(18)
    )
    tiles = "".join(
        f'<div class="col" style="align-items:center;gap:6px;width:104px"><div style="width:66px;height:54px;'
        f'background:{w.pick("var(--accent)", "var(--accent)", "var(--muted)")};border-radius:5px"></div>'
        f'<span class="cut" style="max-width:100px">{w.words(1, 2)}</span></div>'
        for _ in range(72)
    )
    return f"""<div class="row panel" style="padding:9px;border-bottom:1px solid var(--line)"><span class="ghost">&larr;</span>
<span class="ghost">&rarr;</span><span class="ghost">&uarr;</span><div class="field grow">/ {w.words(1, 1)} / {w.words(1, 1)}</div>
<div class="field" style="width:170px">{w.words(1, 1)}</div></div><div class="row grow" style="gap:0;align-items:stretch">
<div class="panel" style="width:205px;padding:14px;overflow:hidden">{tree}</div>
<div class="grow scroll" style="padding:18px"><div style="display:flex;flex-wrap:wrap;gap:20px">{tiles}</div></div></div>
<div class="panel row" style="padding:6px 14px;border-top:1px solid var(--line)">{w.words(3, 5)}</div>"""


def sheet(w: Writer, _look: Look) -> str:
    cell = "border:1px solid var(--line);padding:4px 8px;"
    head = "".join(f'<td style="{cell}text-align:center" class="panel">{c}</td>' for c in " ABCDEFGHIJKL")
    lines = ""
    for r in range(1, 60):
        cells = "".join(
            f'<td style="{cell}text-align:{"left" if c == 0 else "right"}" class="cut">'
            f"{w.words(1, 3) if c == 0 else w.money() if w.number(0, 9) else ''}</td>"
            for c in range(12)
        )
        lines += f'<tr><td class="panel" style="{cell}">{r}</td>{cells}</tr>'
    menu = "".join(f"<span>{w.words(1, 1)}</span>" for _ in range(8))
    tools = "".join(
        '<div style="width:22px;height:22px;border-radius:4px;background:var(--muted)"></div>' for _ in range(20)
    )
    tabs = "".join(f'<span class="ghost">{w.words(1, 1)}</span>' for _ in range(4))
    return f"""<div class="row" style="padding:8px 14px;gap:20px">{menu}</div>
<div class="row panel" style="padding:8px 14px">{tools}</div>
<div class="row" style="padding:6px 14px"><span class="ghost">C7</span><div class="field grow" style="padding:5px">= {w.words(2, 4)}</div></div>
<div class="grow scroll"><table style="border-collapse:collapse;font-size:13px;table-layout:fixed;width:125%">
<tr>{head}</tr>{lines}</table></div><div class="row panel" style="padding:5px 14px">{tabs}</div>"""


def mail(w: Writer, _look: Look) -> str:
    folders = "".join(f'<div style="padding:9px 16px" class="cut">{w.words(1, 2)}</div>' for _ in range(9))
    messages = "".join(
        f'<div style="padding:12px 14px;border-bottom:1px solid var(--line);{"background:var(--panel)" if i == 1 else ""}">'
        f'<div class="row"><b class="grow cut">{w.words(2, 2)}</b><span class="muted">{w.number(1, 28)}.</span></div>'
        f'<div class="cut">{w.words(3, 6)}</div><div class="cut muted">{w.words(6, 9)}</div></div>'
        for i in range(26)
    )
    text = "".join(f'<p style="margin:14px 0">{w.words(18, 48)}.</p>' for _ in range(7))
    return f"""<div class="row" style="background:var(--accent);color:#fff;padding:12px 16px"><b>{w.words(1, 1)}</b>
<div class="grow"></div><div style="background:#fff3;border-radius:6px;padding:7px 90px 7px 12px">{w.words(1, 2)}</div></div>
<div class="row grow" style="align-items:stretch;gap:0"><div class="panel" style="width:150px;padding-top:12px">
<div style="padding:0 14px 12px"><div class="btn" style="width:100%">{w.words(1, 1)}</div></div>{folders}</div>
<div class="scroll" style="width:285px;border-right:1px solid var(--line)">{messages}</div>
<div class="grow" style="padding:22px"><h2>{w.words(3, 6)}</h2><div class="row" style="margin:14px 0"><div class="dot"></div>
<div><b>{w.words(2, 2)}</b><div class="muted">{w.words(3, 4)}</div></div></div>{text}
<span class="ghost">{w.words(1, 1)}</span> <span class="ghost">{w.words(1, 1)}</span></div></div>"""


def settings(w: Writer, _look: Look) -> str:
    def switch() -> str:
        on = w.number(0, 1)
        knob = "margin-left:22px" if on else ""
        back = "var(--accent)" if on else "var(--muted)"
        return (
            f'<div style="width:46px;height:24px;border-radius:12px;background:{back};padding:3px;flex:none">'
            f'<div style="width:18px;height:18px;border-radius:50%;background:#fff;{knob}"></div></div>'
        )

    def section() -> str:
        lines = "".join(
            f'<div class="row" style="padding:15px 0;border-top:1px solid var(--line)"><div class="grow"><div>{w.words(2, 4)}'
            f'</div><div class="muted cut">{w.words(6, 11)}</div></div>{switch()}</div>'
            for _ in range(3)
        )
        return f'<div class="box" style="padding:18px 22px;margin-bottom:22px"><h3 style="margin-bottom:12px">{w.words(1, 2)}</h3>{lines}</div>'

    sections = "".join(section() for _ in range(6))
    return f"""<div class="row panel" style="padding:16px 28px"><span style="font-size:20px">&larr;</span>
<h2>{w.words(1, 2)}</h2></div><div class="grow scroll"><div style="width:640px;max-width:94%;margin:26px auto">{sections}</div></div>"""


def chat(w: Writer, _look: Look) -> str:
    people = "".join(
        f'<div class="row" style="padding:11px 14px;{"background:var(--line)" if i == 2 else ""}"><div class="dot"></div><div class="grow">'
        f'<b class="cut">{w.words(2, 2)}</b><div class="cut muted">{w.words(4, 6)}</div></div></div>'
        for i in range(12)
    )
    talk = ""
    for i in range(26):
        mine = i % 3 == 1
        look = "margin-left:auto;background:var(--accent);color:#fff" if mine else "background:var(--panel)"
        talk += f'<div style="max-width:62%;width:fit-content;border-radius:16px;padding:11px 16px;margin:11px 0;{look}">{w.words(5, 22)}</div>'
    return f"""<div class="row grow" style="align-items:stretch;gap:0"><div class="panel" style="width:290px;overflow:hidden">
<div style="padding:16px"><div class="field">{w.words(1, 1)}</div></div>{people}</div><div class="grow col">
<div class="row" style="padding:12px 20px;border-bottom:1px solid var(--line)"><div class="dot"></div><b>{w.words(2, 2)}</b></div>
<div class="grow scroll" style="padding:8px 24px">{talk}</div>
<div class="row" style="padding:14px 20px;border-top:1px solid var(--line)"><div class="field grow" style="border-radius:20px">{w.words(2, 3)}</div>
<div class="dot"></div></div></div></div>"""


def dashboard(w: Writer, _look: Look) -> str:
    cards = "".join(
        f'<div class="box grow panel" style="padding:16px"><div class="muted">{w.words(1, 2)}</div>'
        f'<div style="font-size:26px">{w.number(10, 999)}</div></div>'
        for _ in range(4)
    )

    def chart(height: int) -> str:
        bars = "".join(
            f'<div class="grow" style="height:{w.number(20, 96)}%;background:var(--accent)"></div>' for _ in range(14)
        )
        return (
            f'<div class="box grow" style="padding:16px"><b>{w.words(2, 3)}</b>'
            f'<div class="row" style="height:{height}px;align-items:flex-end;gap:6px;margin-top:10px">{bars}</div></div>'
        )

    def ranking() -> str:
        lines = "".join(
            f'<div style="margin-top:12px"><div class="cut">{w.words(1, 2)}</div><div style="height:9px;background:var(--line)">'
            f'<div style="height:9px;width:{w.number(15, 95)}%;background:var(--accent)"></div></div></div>'
            for _ in range(5)
        )
        return f'<div class="box" style="width:32%;padding:16px"><b>{w.words(2, 2)}</b>{lines}</div>'

    icons = "".join(
        '<div style="width:30px;height:30px;border-radius:8px;background:var(--muted);margin:12px auto"></div>'
        for _ in range(7)
    )
    return f"""<div class="row grow" style="align-items:stretch;gap:0"><div class="panel" style="width:66px;padding-top:10px">{icons}</div>
<div class="grow scroll" style="padding:22px"><div class="row"><h1 class="grow">{w.words(2, 3)}</h1><span class="ghost">{w.words(1, 1)}</span></div>
<div class="row" style="margin:18px 0;align-items:stretch">{cards}</div>
<div class="row" style="align-items:stretch;gap:16px">{chart(220)}{ranking()}</div>
<div class="row" style="margin-top:18px;gap:16px;align-items:stretch">{chart(150)}{chart(150)}</div>
<div class="row" style="margin-top:18px;gap:16px;align-items:stretch">{chart(150)}{chart(150)}</div></div></div>"""


def editor(w: Writer, _look: Look) -> str:
    tree = "".join(
        f'<div class="cut" style="padding:4px 0 4px {16 + 16 * w.number(0, 2)}px">{w.words(1, 1).lower()}.py</div>'
        for _ in range(20)
    )
    code = ""
    depth = 0
    for n in range(1, 90):
        depth = max(0, min(4, depth + w.number(-1, 1)))
        said = w.words(2, 8).lower().split()
        rest = f'<span style="color:var(--muted)">{" ".join(said[2:])}</span>' if len(said) > 4 else " ".join(said[2:])
        line = "" if w.number(0, 7) == 0 else f'<span style="color:var(--accent)">{said[0]}</span> {said[1]}({rest})'
        code += (
            f'<div style="white-space:pre;height:21px"><span class="muted">{n:4d}  </span>{"    " * depth}{line}</div>'
        )
    tabs = "".join(
        f'<div style="padding:10px 20px;border-right:1px solid var(--line)">{w.words(1, 1)}</div>' for _ in range(4)
    )
    out = "".join(f"<div>$ {w.words(4, 9).lower()}</div>" for _ in range(6))
    return f"""<div class="row grow" style="align-items:stretch;gap:0"><div class="panel" style="width:210px;padding:14px 0;overflow:hidden">{tree}</div>
<div class="grow col"><div class="row panel" style="gap:0">{tabs}</div>
<div class="grow scroll" style="font:13px/1.6 'DejaVu Sans Mono',monospace;padding:10px">{code}</div>
<div class="panel" style="height:140px;padding:10px 16px;font:13px/1.5 'DejaVu Sans Mono',monospace;border-top:1px solid var(--line)">{out}</div></div></div>
<div class="row" style="background:var(--accent);color:#fff;padding:3px 14px"><span class="grow">{w.words(2, 3)}</span>{w.words(1, 1)}</div>"""


# --- never recorded --------------------------------------------------------------------------------------------------


def calendar(w: Writer, _look: Look) -> str:
    days = ""
    for day in range(35):
        marks = "".join(
            f'<div class="cut" style="background:var(--accent);color:#fff;border-radius:4px;padding:1px 6px;margin-top:4px">{w.words(1, 2)}</div>'
            for _ in range(max(0, w.number(-2, 2)))
        )
        days += f'<div style="border:1px solid var(--line);padding:7px;overflow:hidden">{day % 31 + 1}{marks}</div>'
    return f"""<div class="row" style="padding:18px 24px"><h1 class="grow">{w.words(1, 1)} 2031</h1><span class="ghost">&lt;</span>
<span class="ghost">&gt;</span><span class="btn">{w.words(1, 1)}</span></div>
<div class="grow" style="display:grid;grid-template-columns:repeat(7,1fr);grid-template-rows:repeat(5,1fr);padding:0 24px 24px">{days}</div>"""


def player(w: Writer, _look: Look) -> str:
    queue = "".join(
        f'<div class="row" style="margin-bottom:14px"><div style="width:112px;height:64px;background:var(--muted);flex:none"></div>'
        f'<div class="grow">{w.words(3, 5)}<div class="muted">{w.number(2, 59)}:{w.number(10, 59)}</div></div></div>'
        for _ in range(10)
    )
    return f"""<div class="row grow" style="align-items:flex-start;padding:22px;gap:22px"><div class="grow"><div style="background:#0b0d10;
aspect-ratio:16/9;display:flex;align-items:center;justify-content:center"><div style="border:26px solid transparent;
border-left:44px solid #fff;border-right:0"></div></div><div style="height:8px;background:var(--line)"><div style="height:8px;width:37%;background:var(--accent)">
</div></div><h2 style="margin:16px 0 8px">{w.words(4, 7)}</h2><p class="muted">{w.words(20, 34)}</p></div><div style="width:265px">{queue}</div></div>"""


def calculator(w: Writer, _look: Look) -> str:
    keys = "".join(
        f'<div class="box" style="display:flex;align-items:center;justify-content:center;font-size:28px;'
        f'background:{"var(--accent)" if k in "/x-+=" else "var(--panel)"}">{k}</div>'
        for k in "C()/789x456-123+0.%="
    )
    return f"""<div style="padding:30px;text-align:right;font-size:64px" class="panel">{w.money()}<div class="muted" style="font-size:20px">
{w.money()} + {w.money()}</div></div><div class="grow" style="display:grid;grid-template-columns:repeat(4,1fr);gap:12px;padding:20px">{keys}</div>"""


def checkout(w: Writer, _look: Look) -> str:
    steps = "".join(
        f'<div class="row grow"><div class="dot" style="background:var({"--accent" if i < 2 else "--line"})"></div>{w.words(1, 1)}</div>'
        for i in range(4)
    )
    fields = "".join(
        f'<div style="width:calc(50% - 8px)"><label>{w.words(1, 2)}</label><div class="field">{w.words(1, 2)}</div></div>'
        for _ in range(8)
    )
    items = "".join(
        f'<div class="row" style="padding:10px 0"><div style="width:48px;height:48px;background:var(--muted)"></div>'
        f'<span class="grow">{w.words(2, 2)}</span>{w.money()}</div>'
        for _ in range(4)
    )
    return f"""<div class="row" style="padding:26px 60px;border-bottom:1px solid var(--line)">{steps}</div>
<div class="row grow" style="padding:30px 60px;gap:36px;align-items:flex-start"><div class="grow" style="display:flex;flex-wrap:wrap;gap:18px 16px">
<h2 style="width:100%">{w.words(2, 3)}</h2>{fields}<div class="btn" style="margin-left:auto;padding:14px 44px">{w.words(1, 1)}</div></div>
<div class="panel box" style="width:300px;padding:20px"><b>{w.words(1, 2)}</b>{items}<div class="row" style="border-top:1px solid var(--line);padding-top:12px">
<b class="grow">{w.words(1, 1)}</b><b>{w.money()}</b></div></div></div>"""


# --- development designs, never shipped --------------------------------------------------------------------------------


def article(w: Writer, _look: Look) -> str:
    links = "".join(f'<div style="color:var(--accent);padding:5px 0">{w.words(1, 3)}</div>' for _ in range(10))
    text = "".join(f'<h2 style="margin:20px 0 8px">{w.words(2, 4)}</h2><p>{w.words(60, 110)}.</p>' for _ in range(6))
    return f"""<div class="row" style="padding:12px 40px;border-bottom:1px solid var(--line)"><b class="grow">{w.words(1, 2)}</b><div class="field">{w.words(2, 2)}</div></div>
<div class="row grow scroll" style="align-items:flex-start;padding:20px 40px;gap:30px"><div style="width:170px;flex:none">{links}</div><div class="grow"><h1>{w.words(2, 4)}</h1>{text}</div>
<div class="box panel" style="width:190px;flex:none;padding:12px"><div style="height:130px;background:var(--muted)"></div><p>{w.words(20, 30)}</p></div></div>"""


def shop(w: Writer, _look: Look) -> str:
    cards = "".join(
        f'<div class="box" style="padding:12px"><div style="height:130px;background:var(--panel)"></div><div class="cut">{w.words(2, 4)}</div><b>{w.money()}</b>'
        f'<div class="btn" style="float:right">+</div></div>'
        for _ in range(24)
    )
    return f"""<div class="row" style="background:var(--accent);color:#fff;padding:20px 30px"><h2 class="grow">{w.words(1, 2)}</h2>{w.words(1, 1)} {w.words(1, 1)}</div>
<div class="grow scroll" style="padding:20px 30px"><div style="display:grid;grid-template-columns:repeat(4,1fr);gap:18px">{cards}</div></div>"""


def terminal(w: Writer, _look: Look) -> str:
    lines = "".join(f'<div class="cut">{w.words(1, 2).lower()} $ {w.words(1, 14).lower()}</div>' for _ in range(70))
    return f"""<div class="row panel" style="padding:8px 14px"><div class="dot" style="width:14px;height:14px"></div>{w.words(1, 2)}</div>
<div class="grow scroll" style="font:14px/1.5 'DejaVu Sans Mono',monospace;padding:12px">{lines}</div>"""


def slides(w: Writer, _look: Look) -> str:
    thumbs = "".join(
        f'<div class="row" style="margin-bottom:14px">{i}<div class="box" style="height:84px;background:var(--bg);width:140px"></div></div>'
        for i in range(1, 9)
    )
    points = "".join(f'<li style="margin:16px 0">{w.words(3, 6)}</li>' for _ in range(4))
    tools = "".join('<div style="width:26px;height:26px;background:var(--muted)"></div>' for _ in range(12))
    return f"""<div class="row" style="padding:10px 16px">{tools}</div><div class="row grow panel" style="align-items:stretch;gap:0"><div style="width:190px;padding:14px;overflow:hidden">{thumbs}</div>
<div class="grow" style="padding:40px;display:flex;align-items:center"><div class="box" style="background:var(--bg);width:100%;aspect-ratio:16/10;padding:40px;font-size:22px"><h1>{w.words(2, 4)}</h1><ul>{points}</ul></div></div></div>"""


def music(w: Writer, _look: Look) -> str:
    songs = "".join(
        f'<div class="row" style="padding:9px 20px;border-bottom:1px solid var(--line)"><span class="muted">{i}</span><span class="grow cut">{w.words(2, 4)}</span>'
        f'<span class="grow cut muted">{w.words(1, 2)}</span>{w.number(2, 6)}:{w.number(10, 59)}</div>'
        for i in range(1, 40)
    )
    return f"""<div class="row panel" style="padding:24px;gap:24px;align-items:flex-end"><div style="width:150px;height:150px;background:var(--accent)"></div><div><h1>{w.words(2, 3)}</h1><span class="muted">{w.words(3, 5)}</span></div></div>
<div class="grow scroll">{songs}</div><div class="panel row" style="padding:16px;justify-content:center"><span class="ghost">&lt;</span><div class="dot"></div><span class="ghost">&gt;</span></div>"""


def kanban(w: Writer, _look: Look) -> str:
    columns = ""
    for _ in range(4):
        cards = "".join(
            f'<div class="box" style="background:var(--bg);padding:12px;margin-top:12px">{w.words(4, 12)}<div class="muted">{w.words(1, 2)}</div></div>'
            for _ in range(w.number(3, 6))
        )
        columns += f'<div class="panel grow" style="padding:12px;border-radius:8px"><b>{w.words(1, 1)}</b>{cards}</div>'
    return f"""<div class="row" style="padding:14px 20px"><h2 class="grow">{w.words(2, 3)}</h2><span class="btn">{w.words(1, 1)}</span></div>
<div class="row grow" style="align-items:stretch;padding:0 20px 20px;gap:14px">{columns}</div>"""


def forum(w: Writer, _look: Look) -> str:
    posts = "".join(
        f'<div class="row box" style="padding:16px;margin-bottom:16px;align-items:flex-start"><div class="dot" style="width:60px;height:60px"></div><div class="grow"><b>{w.words(1, 2)}</b>'
        f'<p style="margin:8px 0">{w.words(18, 50)}.</p><span class="muted">{w.words(2, 3)}</span></div></div>'
        for _ in range(10)
    )
    return f"""<div class="panel" style="padding:18px 90px"><h2>{w.words(4, 7)}</h2><span class="muted">{w.words(3, 4)}</span></div><div class="grow scroll" style="padding:20px 90px">{posts}</div>"""


def signup(w: Writer, _look: Look) -> str:
    fields = "".join(f'<label>{w.words(1, 2)}</label><div class="field">{w.words(1, 2)}</div>' for _ in range(5))
    return f"""<div class="row grow" style="align-items:stretch;gap:0"><div style="width:42%;background:var(--accent);color:#fff;padding:60px"><h1>{w.words(3, 5)}</h1><p style="margin-top:20px">{w.words(16, 24)}</p></div>
<div class="grow col" style="padding:50px;gap:14px;justify-content:center"><h2>{w.words(2, 3)}</h2>{fields}<div class="btn" style="text-align:center">{w.words(1, 2)}</div></div></div>"""


RECORDED: dict[str, tuple[Page, str]] = {
    "login": (login, "sign-in form"),
    "files": (files, "file manager"),
    "sheet": (sheet, "spreadsheet"),
    "mail": (mail, "mail reader"),
    "settings": (settings, "settings page"),
    "chat": (chat, "chat window"),
    "dashboard": (dashboard, "dashboard with charts"),
    "editor": (editor, "code editor"),
}
UNKNOWN: dict[str, tuple[Page, str]] = {
    "calendar": (calendar, "month calendar"),
    "player": (player, "video player"),
    "calculator": (calculator, "calculator"),
    "checkout": (checkout, "checkout form"),
}
DEVELOPMENT: dict[str, tuple[Page, str]] = {
    page.__name__: (page, page.__name__) for page in (article, shop, terminal, slides, music, kanban, forum, signup)
}
UNSCROLLED = frozenset({"login", "slides", "kanban", "signup"})
BASE = Look()


def variations(name: str) -> dict[str, Look]:
    """What is done to a base, one thing each; a page that does not scroll gets another window size instead."""
    made = {
        "dark": evolve(BASE, theme="dark"),
        "text": evolve(BASE, text=2, theme="warm"),
        "size": evolve(BASE, width=800, height=680),
        "dialog": evolve(BASE, dialog=True),
    }
    made["wide" if name in UNSCROLLED else "scroll"] = (
        evolve(BASE, width=1120, height=700) if name in UNSCROLLED else evolve(BASE, scroll=210)
    )
    return made


def document(name: str, page: Page, look: Look) -> str:
    """The whole HTML file for one look of a page."""
    w = Writer(f"{name}/{look.text}", other=look.text > 1)
    body = page(w, look)
    if look.dialog:
        body += (
            f'<div class="veil"><div class="dialog"><h2>{w.words(2, 3)}</h2><p style="margin:14px 0 22px">{w.words(10, 16)}.</p>'
            f'<div class="row" style="justify-content:flex-end"><span class="ghost">{w.words(1, 1)}</span>'
            f'<span class="btn">{w.words(1, 1)}</span></div></div></div>'
        )
    colours = "".join(f"--{key}:{value};" for key, value in THEMES[look.theme].items())
    script = f"for(const e of document.querySelectorAll('.scroll'))e.scrollTop={look.scroll}"
    return (
        f'<!doctype html><meta charset="utf-8"><style>:root{{{colours}}}{STYLE}</style>'
        f"<body>{body}<script>{script}</script></body>"
    )


def shoot(browser: str, work: Path, source: str, look: Look, target: Path) -> None:
    """Let the browser draw one document and store it as a palette PNG of half its CSS size."""
    page, shot = work / "page.html", work / "shot.png"
    page.write_text(source, encoding="utf-8")
    shot.unlink(missing_ok=True)
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
        "--no-first-run --hide-scrollbars --force-device-scale-factor=0.5"
    ).split()
    subprocess.run(
        [
            browser,
            *flags,
            f"--user-data-dir={work / 'profile'}",
            f"--window-size={look.width},{look.height}",
            f"--screenshot={shot}",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    with Image.open(shot) as image:
        small = image.convert("RGB").quantize(48, dither=Image.Dither.NONE)
    small.save(target, optimize=True)


def main() -> int:
    """Render everything asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--browser", default=shutil.which("chromium") or "chromium")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "gpu_fsm" / "data" / "screens"
    )
    parser.add_argument("--development", type=Path, help="render the development designs into this folder instead")
    asked = parser.parse_args()
    recorded, unknown, out = (
        (DEVELOPMENT, {}, asked.development) if asked.development else (RECORDED, UNKNOWN, asked.out)
    )
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.png"):
        old.unlink()
    jobs = [(name, "base", BASE, page, label) for name, (page, label) in recorded.items()]
    jobs += [
        (n, change, look, p, label) for n, (p, label) in recorded.items() for change, look in variations(n).items()
    ]
    jobs += [(name, "unknown", BASE, page, label) for name, (page, label) in unknown.items()]
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        for name, change, look, page, label in jobs:
            target = out / (f"{name}.png" if change in ("base", "unknown") else f"{name}-{change}.png")
            shoot(asked.browser, Path(folder), document(name, page, look), look, target)
            kind = change if change in ("base", "unknown") else "variation"
            entries.append(
                {
                    "file": target.name,
                    "kind": kind,
                    "screen": name,
                    "change": change if kind == "variation" else "",
                    "label": label,
                    "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
                }
            )
    (out / "manifest.json").write_text(
        json.dumps({"version": 1, "screens": entries}, indent=1) + "\n", encoding="utf-8"
    )
    print(f"{len(entries)} screens, {sum(p.stat().st_size for p in out.glob('*.png')) // 1024} KiB, in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
