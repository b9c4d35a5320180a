"""`gpu-fsm run`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpu_fsm.arguments import as_mode
from gpu_fsm.cli.base import app_options, check_clip_model, config_option, json_option, load_app
from gpu_fsm.errors import BadArgument
from gpu_fsm.status import ExecutionMode

if TYPE_CHECKING:
    from gpu_fsm.agent import Screen
    from gpu_fsm.appconfig import AppConfig


@click.command("run", short_help="The agent on the real card and the real Ollama.")
@click.option("--screens", type=click.Path(path_type=Path), metavar="DIR", help="Folder with screenshots (PNG, JPEG).")
@click.option("--live", is_flag=True, help="The live screen instead, until interrupted; needs the extra `screen`.")
@click.option("--monitor", type=click.IntRange(0), metavar="N", default=1, show_default=True, help="Which, for --live.")
@click.option("--mode", metavar="MODE", help="Only this mode: recording or autopilot.  [default: both, in this order]")
@click.option("--memory", metavar="FILE", help="Short for --agent-index-path.")
@click.option("--pull", is_flag=True, help="Have Ollama fetch the VLM first, where it does not have it.")
@json_option
@config_option
@app_options("gpu", "agent", "control")
def run(
    screens: Path | None,
    live: bool,
    monitor: int,
    mode: str | None,
    memory: str | None,
    pull: bool,
    as_json: bool,
    config_path: Path | None,
    **settings: str | None,
) -> int:
    """Run the agent on the real card and the real Ollama; nothing is simulated.

    Without Ollama or a GPU it runs DEGRADED or on the CPU, and says so.  With --memory FILE what was recorded is kept
    and found again.  Meanwhile `gpu-fsm status`, `mode`, `vlm`, `events` and `explain` reach it from outside.

    \b
    Examples:
      gpu-fsm run --screens shots/
      gpu-fsm run --screens shots/ --pull --memory screens.npz --mode recording
      gpu-fsm run --live --mode autopilot --memory screens.npz --idle-timeout-s 60
    """  # noqa: D301
    if (screens is None) is not live:
        raise click.UsageError("Give --screens DIR or --live, one of them.")
    if live and mode is None:
        raise click.UsageError("--live has no end: say with --mode which of the two modes it is for.")
    if memory is not None:
        settings["agent_index_path"] = memory
    config = load_app(config_path, settings).config
    modes = (ExecutionMode.RECORDING, ExecutionMode.AUTOPILOT) if mode is None else (as_mode(mode),)
    if ExecutionMode.IDLE in modes:
        raise BadArgument(detail="in IDLE there is nothing to run", remedy="Use recording or autopilot.")
    check_clip_model(config.gpu)
    if config.gpu.clip_model is None:
        raise BadArgument(detail="clip_model is none, and the agent knows screens by CLIP", remedy="Set clip_model.")
    from gpu_fsm.cli.running import run_agent

    def read() -> AppConfig:
        return load_app(config_path, settings).config

    source = _source(screens, monitor)
    return run_agent(config, source, modes=modes, pull=pull, as_json=as_json, read=read)


def _source(folder: Path | None, monitor: int) -> Callable[[Callable[[], float]], Iterable[Screen]]:
    from gpu_fsm.agent import find_screens, live, load_screens

    if folder is None:
        return lambda interval_s: live(every_s=interval_s, monitor=monitor)
    find_screens(folder)  # at once; whether each is a whole picture is seen when they are read
    return lambda _: load_screens(folder)
