"""`gpu-fsm explore`."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from gpu_fsm.cli.base import Number, json_option
from gpu_fsm.cli.codes import ExitCode

if TYPE_CHECKING:
    from gpu_fsm.testing.walk import Walked


@click.command("explore", short_help="Walk every configuration of the manager in a simulated world.")
@click.option("--queue", type=click.IntRange(1, 10), metavar="N", help="Most requests that wait at once.  [default: 1]")
@click.option(
    "--faults", type=click.IntRange(0, 10), metavar="N", help="Most things that are wrong at once.  [default: 1]"
)
@click.option(
    "--seconds", type=Number(0, 1e6, min_open=True), metavar="N", help="Stop after so long.  [default: never]"
)
@click.option("--thorough", is_flag=True, help="Also two leases, leases in trouble, every kind of fault: hours.")
@click.option("--stories", is_flag=True, help="Print the shortest story to every row of the table.")
@json_option
def explore(
    queue: int | None, faults: int | None, seconds: float | None, *, thorough: bool, stories: bool, as_json: bool
) -> int:
    """Lead the real manager into every configuration that it can get into, and judge it there.

    Each is reached by its shortest story in a world of its own.  From each, everything that a user, another program or
    the world can do is done; promises must be kept, and every mode that fits must still be to be had.  Exit code 1
    where one is broken.

    \b
    Examples:
      gpu-fsm explore
      gpu-fsm explore --stories
      gpu-fsm explore --faults 2 --seconds 600 --json
    """  # noqa: D301
    from gpu_fsm.testing.walk import THOROUGH, Bounds, explore_manager

    bounds = (THOROUGH if thorough else Bounds()).but(queue=queue, faults=faults)
    with _quiet(), _progress() as show:
        walked = explore_manager(bounds, seconds=seconds, progress=show)
    if as_json:
        click.echo(json.dumps(walked.to_dict(), indent=2))
    else:
        _tell(walked, stories=stories)
    return ExitCode.FAILED if walked.violations else ExitCode.FINE


def _tell(walked: Walked, *, stories: bool) -> None:
    report = walked.to_dict()
    end = "all of them" if walked.closed else "stopped early, there may be more"
    click.echo(
        f"{report['configurations']} configurations ({end}), {report['edges']} edges, depth {report['depth']}, "
        f"{report['rows_taken']} of {report['rows_total']} rows, {report['violations']} violations, "
        f"{report['seconds']} s"
    )
    if stories:
        for row, story in report["stories"].items():
            told = "not taken" if story is None else ", ".join(story)
            click.echo(f"  {row}: {told}")
    for name, reason in report["defensive"].items():
        click.echo(f"  defensive: {name}: {reason}")
    if walked.closed:
        for name in walked.missing:
            click.echo(f"  never met: {name}")
    for violation in walked.violations:
        click.echo(f"  VIOLATION {violation}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the manager logs about the faults that it meets here is not news."""
    logger = logging.getLogger("gpu_fsm")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int, int], None]]:
    """A line on stderr, where that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda configurations, edges, waiting: None
        return
    with console.status("exploring") as line:
        yield lambda configurations, edges, waiting: line.update(
            f"{configurations} configurations, {edges} edges, {waiting} to look at"
        )
