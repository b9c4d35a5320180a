"""`gpu-fsm doctor`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from gpu_fsm.cli.base import app_options, config_option, json_option, load_app
from gpu_fsm.cli.codes import ExitCode
from gpu_fsm.errors import one_line

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}


@click.command("doctor", short_help="Look at the card, torch and Ollama, and say what to mend.")
@json_option
@click.option("--quick", is_flag=True, help="Leave out torch and sentence-transformers, whose import takes seconds.")
@click.option("--root", type=click.Path(path_type=Path), default=Path("/"), hidden=True, help="Where /proc lies.")
@config_option
@app_options("gpu", hidden=True)
def doctor(as_json: bool, quick: bool, root: Path, config_path: Path | None, **settings: str | None) -> int:
    """Look at the driver, the card, torch, sentence-transformers and Ollama, and say what to mend.

    It only looks; nothing is loaded, unloaded or changed.  Takes every setting as an option too.  Exit code 1 where
    there is a problem; warnings alone are fine.

    \b
    Examples:
      gpu-fsm doctor
      gpu-fsm doctor --quick --vlm-model llava:7b
      gpu-fsm doctor --json > report.json
    """  # noqa: D301
    from gpu_fsm.doctor import Machine, examine

    loaded = load_app(config_path, settings, go_on=True)
    console = Console(highlight=False, markup=False)
    found = []
    for check in examine(loaded, Machine(root=root), import_torch=not quick):
        found.append(check)
        if not as_json:
            line = Text(f"{check.level:<8}", _STYLES[check.level])
            line.append(f" {check.name:<21} ", "bold")
            line.append(one_line(check.says, 600))
            console.print(line, soft_wrap=True)
            if check.mend:
                console.print(Text(f"{'':<31}{one_line(check.mend, 600)}", "cyan"), soft_wrap=True)
    count = Counter(check.level for check in found)
    if as_json:
        counts = {level: count[level] for level in ("ok", "warning", "problem", "skipped")}
        checks = [check.as_json() for check in found]
        click.echo(json.dumps({"ok": not count["problem"], "counts": counts, "checks": checks}, indent=2))
    else:
        problems, warnings = (
            f"{count[name]} {name}{'' if count[name] == 1 else 's'}" for name in ("problem", "warning")
        )
        console.print(f"{problems}, {warnings}", soft_wrap=True)
    return ExitCode.FAILED if count["problem"] else ExitCode.FINE
