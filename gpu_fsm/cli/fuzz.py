"""`gpu-fsm fuzz`."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpu_fsm.cli.base import Number, json_option
from gpu_fsm.cli.codes import ExitCode
from gpu_fsm.errors import BadArgument

if TYPE_CHECKING:
    from gpu_fsm.testing.fuzz import FuzzReport


@click.command("fuzz", short_help="Tell random stories in a simulated world and look for one that breaks a promise.")
@click.option("--seconds", type=Number(0, 1e6, min_open=True), metavar="N", help="For so long.  [default: 60]")
@click.option("--examples", type=click.IntRange(1), metavar="N", help="So many stories of 30 rules, however long.")
@click.option("--seed", type=click.IntRange(0), metavar="S", help="Decides the stories.  [default: any, and told]")
@click.option("--machine", "name", metavar="MODULE:CLASS", help="Your own subclass of gpu_fsm.testing.GPUStateMachine.")
@click.option("--story", type=click.Path(path_type=Path), metavar="FILE", help="Where to save a story that breaks one.")
@click.option("--replay", type=click.Path(path_type=Path), metavar="FILE", help="Run a saved story (a program) again.")
@json_option
def fuzz(
    seconds: float | None,
    examples: int | None,
    seed: int | None,
    name: str | None,
    story: Path | None,
    replay: Path | None,
    as_json: bool,
) -> int:
    """Tell the manager, and your agent, random stories of requests, faults and neighbours in a simulated world.

    A story that breaks a promise is made as short as it gets (for 20 s at most), printed as a program, saved, and
    ends the run with exit code 1.  Needs the extra `testing`.

    \b
    Examples:
      gpu-fsm fuzz --seconds 60 --seed 7
      gpu-fsm fuzz --machine my_agent.stories:MyStories
      gpu-fsm fuzz --replay gpu-fsm-story-7.py
    """  # noqa: D301
    if sum(given is not None for given in (seconds, examples, replay)) > 1:
        raise click.UsageError("give one of --seconds, --examples and --replay")
    if os.getcwd() not in sys.path:  # noqa: PTH109 - sys.path holds strings
        sys.path.insert(0, os.getcwd())  # noqa: PTH109 - a console script does not look where it is called
    if replay is not None:
        return _replay(replay, as_json=as_json)

    from gpu_fsm.testing.fuzz import fuzz as tell
    from gpu_fsm.testing.fuzz import load_machine
    from gpu_fsm.testing.stateful import GPUStateMachine

    machine = GPUStateMachine if name is None else load_machine(name)
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    path = story or Path(f"gpu-fsm-story-{seed}.py")
    if not path.parent.is_dir():
        raise BadArgument(detail=f"{path} cannot be written: there is no folder {path.parent}")
    if seconds is None and examples is None:
        seconds = 60.0
    with _progress(seconds, examples) as show:
        report = tell(machine, seconds=seconds, examples=examples, seed=seed, progress=show)
    saved = _save(path, report.program) if report.program else None
    if as_json:
        click.echo(json.dumps(report.to_dict() | {"story": None if saved is None else str(saved)}, indent=2))
    else:
        click.echo(report.summary())
        if report.violation:
            click.echo(f"\n{report.violation}\n\n{report.program}")
    if report.violation:
        version = f"gpu_fsm {report.to_dict()['gpu_fsm']}, commit {report.to_dict()['commit'] or 'unknown'}"
        where = f"; saved: gpu-fsm fuzz --replay {saved}" if saved else ""
        click.echo(f"gpu-fsm: a story breaks a promise (seed {seed}, {version}){where}", err=True)
    return ExitCode.FAILED if report.violation else ExitCode.FINE


def _replay(path: Path, *, as_json: bool) -> int:
    from gpu_fsm.testing.fuzz import replay, versions

    broken = replay(path)
    if as_json:
        found = {"replay": str(path), **versions(), "violations": int(bool(broken)), "violation": broken or None}
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(f"{path} still breaks a promise:\n{broken}" if broken else f"{path} breaks nothing any more")
    return ExitCode.FAILED if broken else ExitCode.FINE


def _save(path: Path, program: str) -> Path | None:
    try:
        path.write_text(program, encoding="utf-8")
    except OSError as error:
        click.echo(f"gpu-fsm: the story cannot be saved to {path}: {os.strerror(error.errno or 0)}", err=True)
        return None
    return path


@contextlib.contextmanager
def _progress(seconds: float | None, examples: int | None) -> Iterator[Callable[[FuzzReport], object]]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda report: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("fuzzing", total=seconds if examples is None else examples)
        began = time.monotonic()

        def show(report: FuzzReport) -> None:
            done = time.monotonic() - began if examples is None else report.examples
            per_s = report.steps / max(report.seconds, 1e-3)
            bar.update(task, completed=done, description=f"{report.steps} steps, {per_s:.0f}/s, seed {report.seed}")

        yield show
