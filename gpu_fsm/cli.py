"""The command line: `gpu-fsm demo`, `run`, `diagram`.

What a person types wrongly ends in one line that names the thing and the mend, and in exit code 2; a traceback means a
bug in this package.  Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import enum
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from gpu_fsm import __version__
from gpu_fsm.errors import BadArgument, ClipUnavailable, ConfigError, GPUFSMError, one_line
from gpu_fsm.settings import GPUResourceConfig, load_config, parse_setting, settings_table


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

_EXIT_TABLE = "\b\nExit codes:\n" + "\n".join(f"  {code.value:>3}  {text}" for code, text in EXIT_CODES.items())

_CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file with a section [gpu-fsm], or a pyproject.toml with [tool.gpu-fsm].",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else on stdout.")


def _settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every setting; their text arrives under the settings' names."""
    for setting in reversed(settings_table()):
        optional_value: dict[str, Any] = (
            {"is_flag": False, "flag_value": "true"} if setting.bound == "true or false" else {}
        )
        command = click.option(
            setting.option,
            setting.name,
            metavar="VALUE",
            help=f"{setting.about}  [default: {setting.default}]",
            **optional_value,
        )(command)
    return command


def _load(config_path: Path | None, texts: dict[str, str | None]) -> GPUResourceConfig:
    options = {setting.name: setting.option for setting in settings_table()}
    overrides = {
        name: parse_setting(name, text, f"option {options[name]}") for name, text in texts.items() if text is not None
    }
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
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines


@_cli.command("diagram")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    logging.captureWarnings(capture=True)
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
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not try to flush it again on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    return result if isinstance(result, int) else ExitCode.FINE


def _complain(message: str, code: ExitCode) -> ExitCode:
    # No wrapping and no markup: one line stays one line, and square brackets are the user's.
    Console(stderr=True, highlight=False, markup=False).print(f"gpu-fsm: {one_line(message, 500)}", soft_wrap=True)
    return code


__all__ = ["EXIT_CODES", "ExitCode", "main"]
