"""The command line: `gpu-fsm demo`, `run`, `diagram`, `simulate-ollama`.

What a person types wrongly ends in one line that names the thing and the mend, and in exit code 2; a traceback means a
bug in this package.  Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import enum
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from gpu_fsm import __version__
from gpu_fsm.arguments import as_mode
from gpu_fsm.errors import BadArgument, ClipUnavailable, ConfigError, GPUFSMError, one_line
from gpu_fsm.settings import DEFAULT_OLLAMA_URL, GPUResourceConfig, load_config, parse_setting, settings_table


class ExitCode(enum.IntEnum):
    """What the shell is told."""

    FINE = 0
    FAILED = 1
    USAGE = 2
    MISSING = 3
    INTERRUPTED = 130


EXIT_CODES: dict[ExitCode, str] = {
    ExitCode.FINE: "everything did what it should",
    ExitCode.FAILED: "a phase of the demo or a job failed, or the output could not be written",
    ExitCode.USAGE: "bad input: an option, a setting, a file, a folder",
    ExitCode.MISSING: "something that must be installed is not there; the message says what",
    ExitCode.INTERRUPTED: "interrupted from the keyboard; what was loaded has been given back",
}

_EXTRA = frozenset({"PIL", "numpy", "sentence_transformers", "torch", "transformers"})
"""What comes with the extra `clip` and not with the package alone."""

_EXIT_TABLE = "\b\nExit codes:\n" + "\n".join(f"  {code.value:>3}  {text}" for code, text in EXIT_CODES.items())

_CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file with a section [gpu-fsm], or a pyproject.toml with [tool.gpu-fsm].",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else on stdout.")


def _settings_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command an option for every setting; their text arrives under the settings' names."""
    for setting in reversed(settings_table()):
        optional_value: dict[str, Any] = (
            {"is_flag": False, "flag_value": "true"} if setting.bound == "true or false" else {}
        )
        command = click.option(
            setting.option,
            setting.name,
            metavar="[VALUE]" if optional_value else "VALUE",
            help=f"{setting.about}  [default: {setting.default}]",
            **optional_value,
        )(command)
    return command


def _load(
    config_path: Path | None, texts: dict[str, str | None], renamed: dict[str, str] | None = None
) -> GPUResourceConfig:
    """Make the configuration; `texts` by setting, `renamed` gives the options that are not called like theirs."""
    options = {setting.name: setting.option for setting in settings_table()} | (renamed or {})
    given = {name: text for name, text in texts.items() if text is not None}
    overrides = {name: parse_setting(name, text, f"option {options[name]}") for name, text in given.items()}
    return load_config(config_path, overrides=overrides, override_source=lambda name: f"option {options[name]}")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=_EXIT_TABLE)
@click.version_option(__version__, "--version", message="gpu-fsm %(version)s")
def _cli() -> None:
    """Decide which model, an Ollama-served VLM or CLIP, is on the one GPU.

    \b
    Examples:
      gpu-fsm demo                      see it work; needs no GPU and no Ollama
      gpu-fsm run --screens shots/      the same agent on the real card
      gpu-fsm diagram > states.mmd      the state machine as a Mermaid diagram
      gpu-fsm simulate-ollama --port 0  an Ollama to try things on
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines


@_cli.command("demo", short_help="Watch it work; needs no GPU and no Ollama.")
@click.option("--screens", type=click.Path(path_type=Path), metavar="DIR", help="Your own screenshots (PNG, JPEG).")
@click.option("--ollama", metavar="URL", help="Use this Ollama instead of the simulated one.")
@click.option(
    "--clip", metavar="NAME_OR_PATH", help="Use this CLIP instead of the tiny one that ships with the package."
)
@_JSON
@click.option("--shuffle-index", is_flag=True, hidden=True, help="Spoil the screen memory: the demo must then fail.")
@_CONFIG
def _demo(
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
    config = _load(config_path, texts, {"ollama_url": "--ollama", "clip_model": "--clip"})
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


@_cli.command("run", short_help="The same agent on the real card and the real Ollama.")
@click.option(
    "--screens",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="Folder with screenshots (PNG, JPEG).",
)
@click.option("--mode", metavar="MODE", help="Only this mode: recording or autopilot.  [default: both, in this order]")
@_JSON
@_CONFIG
@_settings_options
def _run(screens: Path, mode: str | None, as_json: bool, config_path: Path | None, **settings: str | None) -> int:
    """Run the same agent on the real card and the real Ollama; nothing is simulated.

    Without Ollama or a GPU it runs DEGRADED or on the CPU, and says so.

    \b
    Examples:
      gpu-fsm run --screens shots/
      gpu-fsm run --screens shots/ --mode autopilot --vlm-model llava:7b --idle-timeout-s 60
    """  # noqa: D301
    config = _load(config_path, settings)
    only = None if mode is None else as_mode(mode)
    from gpu_fsm.demo import run_agent

    return run_agent(config, screens, mode=only, as_json=as_json)


@_cli.command("diagram", short_help="Print the state machine as a Mermaid diagram.")
@click.option("--detail", is_flag=True, help="One arrow for each row of the table, with its guards.")
def _diagram(detail: bool) -> None:
    """Print the Mermaid diagram of the machine that runs.

    \b
    Examples:
      gpu-fsm diagram
      gpu-fsm diagram --detail > rows.mmd
    """  # noqa: D301
    from gpu_fsm import diagrams

    click.echo(diagrams.detail() if detail else diagrams.overview(), nl=False)


# --- the simulated Ollama as a server --------------------------------------------------------------------------------


def _pairs(most: float) -> Callable[[click.Context, click.Parameter, Sequence[str]], tuple[tuple[str, float], ...]]:
    """Read values of the form NAME=NUMBER, with a number above 0 and up to `most`."""

    def read(_: click.Context, __: click.Parameter, values: Sequence[str]) -> tuple[tuple[str, float], ...]:
        pairs = []
        for value in values:
            name, separator, text = value.rpartition("=")
            try:
                number = float(text)
            except ValueError:
                number = -1.0
            if not (separator and name and 0.0 < number <= most):
                raise click.BadParameter(f"{value!r} is not NAME=NUMBER with a number above 0, at most {most:g}")
            pairs.append((name, number))
        return tuple(pairs)

    return read


def _milliseconds(name: str, default: int, about: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    return click.option(
        name, type=click.IntRange(0, 3_600_000), metavar="MS", default=default, show_default=True, help=about
    )


@_cli.command("simulate-ollama", short_help="Serve a simulated Ollama on loopback; needs no GPU and no models.")
@click.option("--port", type=click.IntRange(0, 65535), required=True, metavar="N", help="0 takes any free port.")
@click.option("--version", type=click.Choice(["0.24", "0.32"]), default="0.32", show_default=True, help="Behave as.")
@click.option(
    "--model",
    "models",
    callback=_pairs(1e6),
    multiple=True,
    metavar="NAME=MIB",
    help="A model and what it takes on the card; repeat for more.  [default: qwen2.5vl:7b=6144]",
)
@_milliseconds("--load-ms", 2000, "How long a load takes.")
@_milliseconds("--unload-ms", 80, "From an unload's answer to the end of its runner.")
@_milliseconds("--reclaim-ms", 300, "From there until the memory is back.")
@click.option(
    "--vram-mib",
    type=click.FloatRange(0, 1e7),
    metavar="MIB",
    default=8192.0,
    show_default=True,
    help="The card's memory; 0 is a machine without a GPU.",
)
@click.option(
    "--fault",
    "faults",
    callback=_pairs(1.0),
    multiple=True,
    metavar="KIND=RATE",
    help="Have this share of the requests go wrong: http_503=0.1, or only at one operation: load.oom=0.5.",
)
def _simulate_ollama(
    port: int,
    version: str,
    models: tuple[tuple[str, float], ...],
    load_ms: int,
    unload_ms: int,
    reclaim_ms: int,
    vram_mib: float,
    faults: tuple[tuple[str, float], ...],
) -> int:
    """Serve a simulated Ollama over HTTP on 127.0.0.1 until it is interrupted.

    It answers like the real server of that version, errors and timing included.  A num_ctx that fits neither on the
    card nor in 32 GiB of main memory is a load that runs out of memory.

    \b
    Examples:
      gpu-fsm simulate-ollama --port 11500
      gpu-fsm simulate-ollama --port 0 --model tiny-a=2 --model big-c=1000 --load-ms 250 --version 0.24
      gpu-fsm simulate-ollama --port 11500 --fault load.oom=0.5 --fault http_503=0.1
    """  # noqa: D301
    from gpu_fsm.simulation import KINDS, Faults, SimulatedModel, run_server

    switches = Faults()
    for fault, rate in faults:
        operation, _, kind = fault.rpartition(".")
        wanted = [f"ollama.{operation}"] if operation else [op for op in KINDS if op.startswith("ollama.")]
        at = [op for op in wanted if kind in KINDS.get(op, ())]
        if not at:
            known = ", ".join(sorted(set().union(*(KINDS[op] for op in KINDS if op.startswith("ollama.")))))
            raise BadArgument(detail=f"--fault {one_line(fault, 60)} is not known", remedy=f"Kinds: {known}.")
        for op in at:
            switches.arm(op, kind, times=None, rate=rate)
    served = [
        SimulatedModel(name=name, size_mib=mib, load_s=load_ms / 1e3, trained_context=1 << 20)
        for name, mib in models or (("qwen2.5vl:7b", 6144.0),)
    ]
    try:
        return run_server(
            port,
            served,
            version=version,
            vram_mib=vram_mib or None,
            unload_s=unload_ms / 1e3,
            reclaim_s=reclaim_ms / 1e3,
            faults=switches,
        )
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise BadArgument(detail=f"port {port} cannot be used: {os.strerror(error.errno)}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        result = _cli.main(args=argv, prog_name="gpu-fsm", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return ExitCode.USAGE
    except click.ClickException as error:
        return _complain(error.format_message(), ExitCode.USAGE)
    except (ConfigError, BadArgument) as error:
        return _complain(str(error), ExitCode.USAGE)
    except ClipUnavailable as error:
        return _complain(str(error), ExitCode.MISSING)
    except GPUFSMError as error:
        return _complain(str(error), ExitCode.FAILED)
    except (KeyboardInterrupt, click.Abort):
        return _complain("interrupted", ExitCode.INTERRUPTED)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        return _complain(f"{error.name} is not installed. Run: pip install 'gpu-fsm[clip]'", ExitCode.MISSING)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # The interpreter must not try to flush the rest on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        gone = error.errno == errno.EPIPE  # whoever read our output has seen enough
        return ExitCode.FAILED if gone else _complain("the output cannot be written: the disk is full", ExitCode.FAILED)
    return result if isinstance(result, int) else ExitCode.FINE


def _complain(message: str, code: ExitCode) -> ExitCode:
    # No wrapping and no markup: one line stays one line, and square brackets are the user's.
    Console(stderr=True, highlight=False, markup=False).print(f"gpu-fsm: {one_line(message, 500)}", soft_wrap=True)
    return code


__all__ = ["EXIT_CODES", "ExitCode", "main"]
