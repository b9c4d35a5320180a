"""`gpu-fsm demo` and `gpu-fsm run`."""

from __future__ import annotations

from pathlib import Path

import click

from gpu_fsm.arguments import as_mode
from gpu_fsm.cli.base import config_option, json_option, load_settings, settings_options
from gpu_fsm.settings import DEFAULT_OLLAMA_URL


@click.command("demo", short_help="Watch it work; needs no GPU and no Ollama.")
@click.option("--screens", type=click.Path(path_type=Path), metavar="DIR", help="Your own screenshots (PNG, JPEG).")
@click.option("--ollama", metavar="URL", help="Use this Ollama instead of the simulated one.")
@click.option(
    "--clip", metavar="NAME_OR_PATH", help="Use this CLIP instead of the tiny one that ships with the package."
)
@json_option
@click.option("--shuffle-index", is_flag=True, hidden=True, help="Spoil the screen memory: the demo must then fail.")
@config_option
def demo(
    screens: Path | None,
    ollama: str | None,
    clip: str | None,
    as_json: bool,
    shuffle_index: bool,
    config_path: Path | None,
) -> int:
    """Watch the agent record with the VLM and run on autopilot with CLIP; says what is simulated.

    \b
    Examples:
      gpu-fsm demo
      gpu-fsm demo --json > report.json
      gpu-fsm demo --screens shots/ --ollama http://127.0.0.1:11434
    """  # noqa: D301
    # The simulated Ollama has an address of its own, so one that is set for the real one need not be reachable.
    texts = {"ollama_url": DEFAULT_OLLAMA_URL if ollama is None else ollama, "clip_model": clip}
    config = load_settings(config_path, texts, {"ollama_url": "--ollama", "clip_model": "--clip"})
    from gpu_fsm.demo import DemoOptions, run_demo

    return run_demo(
        DemoOptions(
            config=config,
            screens=screens,
            real_ollama=ollama is not None,
            real_clip=clip is not None,
            as_json=as_json,
            shuffle_index=shuffle_index,
        )
    )


@click.command("run", short_help="The same agent on the real card and the real Ollama.")
@click.option(
    "--screens",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="Folder with screenshots (PNG, JPEG).",
)
@click.option("--mode", metavar="MODE", help="Only this mode: recording or autopilot.  [default: both, in this order]")
@json_option
@config_option
@settings_options
def run(screens: Path, mode: str | None, as_json: bool, config_path: Path | None, **settings: str | None) -> int:
    """Run the same agent on the real card and the real Ollama; nothing is simulated.

    Without Ollama or a GPU it runs DEGRADED or on the CPU, and says so.

    \b
    Examples:
      gpu-fsm run --screens shots/
      gpu-fsm run --screens shots/ --mode autopilot --vlm-model llava:7b --idle-timeout-s 60
    """  # noqa: D301
    config = load_settings(config_path, settings)
    only = None if mode is None else as_mode(mode)
    from gpu_fsm.demo import run_agent

    return run_agent(config, screens, mode=only, as_json=as_json)
