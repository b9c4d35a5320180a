"""`gpu-fsm demo`."""

from __future__ import annotations

from pathlib import Path

import click

from gpu_fsm.cli.base import check_clip_model, config_option, json_option, load_settings
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
    if clip is not None:
        check_clip_model(config)
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
