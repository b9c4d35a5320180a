"""Write what is made from code: the diagrams, and the README's generated sections.

`python -m tests.tools.generate` writes them; `tests/test_packaging.py` fails when they are stale.
"""

from __future__ import annotations

import re
from pathlib import Path

from gpu_fsm import diagrams
from gpu_fsm.appconfig import app_settings_table
from gpu_fsm.cli import EXIT_CODES
from gpu_fsm.states import PROMISES
from tests import reliability

ROOT = Path(__file__).resolve().parents[2]


def _settings() -> str:
    lines = ["| setting | default | must be | what for | live |", "|---|---|---|---|---|"]
    lines += [
        f"| `{s.name}` | `{s.default}` | {s.bound} | {s.about} | {'yes' if s.live else ''} |"
        for s in app_settings_table()
    ]
    return "\n".join(lines)


def _promises() -> str:
    lines = ["| state | promise |", "|---|---|"]
    lines += [f"| {state.name} | {promise} |" for state, promise in PROMISES.items()]
    return "\n".join(lines)


def _exit_codes() -> str:
    lines = ["| code | means |", "|---|---|"]
    lines += [f"| {code.value} | {about} |" for code, about in EXIT_CODES.items()]
    return "\n".join(lines)


def readme(text: str) -> str:
    """The README with its generated sections written anew."""
    sections = {
        "diagram": f"```mermaid\n{diagrams.overview()}```",
        "promises": _promises(),
        "settings": _settings(),
        "exit codes": _exit_codes(),
        "reliability": reliability.table(reliability.Ledger.read(reliability.FILE)),
    }
    for name, content in sections.items():
        begin, end = f"<!-- generated: {name} -->", "<!-- end -->"
        text, count = re.subn(
            f"{begin}.*?{end}", lambda _, new=f"{begin}\n{content}\n{end}": new, text, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"the README has {count} sections {begin!r}")
    return text


def files() -> dict[Path, str]:
    """Every generated file with what it must contain."""
    return {
        ROOT / "README.md": readme((ROOT / "README.md").read_text(encoding="utf-8")),
        ROOT / "diagrams" / "states.mmd": diagrams.overview(),
        ROOT / "diagrams" / "rows.mmd": diagrams.detail(),
    }


if __name__ == "__main__":
    for path, content in files().items():
        path.write_text(content, encoding="utf-8")
