"""The command line as a whole: its commands, and what becomes of an error.

What a person types wrongly ends in one line that names the thing and the mend, and in exit code 2; a traceback means a
bug in this package.  Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import click
from rich.console import Console

from gpu_fsm import __version__
from gpu_fsm.cli.codes import EXIT_CODES, ExitCode
from gpu_fsm.cli.completion import completion
from gpu_fsm.cli.config import config
from gpu_fsm.cli.control import events, explain, mode, status, vlm
from gpu_fsm.cli.demo import demo
from gpu_fsm.cli.diagram import diagram
from gpu_fsm.cli.doctor import doctor
from gpu_fsm.cli.explore import explore
from gpu_fsm.cli.fuzz import fuzz
from gpu_fsm.cli.gateway import gateway
from gpu_fsm.cli.run import run
from gpu_fsm.cli.simulate import simulate_ollama
from gpu_fsm.errors import BadArgument, ClipUnavailable, ConfigError, GPUFSMError, one_line

_EXTRA = {
    **dict.fromkeys(("PIL", "numpy", "sentence_transformers", "torch", "transformers"), "clip"),
    **dict.fromkeys(("httpx", "starlette", "uvicorn"), "gateway"),
    "hypothesis": "testing",
    "mss": "screen",
}
"""What comes with an extra and not with the package alone."""

_BY_CODE = {"nothing_runs": ExitCode.ABSENT, "control_refused": ExitCode.REFUSED}
"""Errors of modules that not every command imports."""

_EXIT_TABLE = "\b\nExit codes:\n" + "\n".join(f"  {code.value:>3}  {text}" for code, text in EXIT_CODES.items())


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_EXIT_TABLE,
    commands=[
        demo,
        run,
        gateway,
        diagram,
        simulate_ollama,
        fuzz,
        explore,
        doctor,
        config,
        completion,
        status,
        mode,
        vlm,
        events,
        explain,
    ],
)
@click.version_option(__version__, "--version", message="gpu-fsm %(version)s")
def _cli() -> None:
    """Decide which model, an Ollama-served VLM or CLIP, is on the one GPU.

    \b
    Examples:
      gpu-fsm demo                      see it work; needs no GPU and no Ollama
      gpu-fsm run --screens shots/      the same agent on the real card
      gpu-fsm doctor                    what is missing or wrong, and how to mend it
      gpu-fsm diagram > states.mmd      the state machine as a Mermaid diagram
      gpu-fsm simulate-ollama --port 0  an Ollama to try things on
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines


def run_command(argv: Sequence[str] | None) -> int:
    """Run one command and return the exit code."""
    try:
        result = _cli.main(args=argv, prog_name="gpu-fsm", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return ExitCode.USAGE
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" See {context.command_path} --help." if context is not None else ""
        return _complain(error.format_message() + hint, ExitCode.USAGE)
    except (ConfigError, BadArgument) as error:
        return _complain(str(error), ExitCode.USAGE)
    except ClipUnavailable as error:
        return _complain(str(error), ExitCode.MISSING)
    except GPUFSMError as error:
        return _complain(str(error), _BY_CODE.get(error.code, ExitCode.FAILED))
    except (KeyboardInterrupt, click.Abort):
        return _complain("interrupted", ExitCode.INTERRUPTED)
    except ModuleNotFoundError as error:
        extra = _EXTRA.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _complain(f"{error.name} is not installed. Run: pip install 'gpu-fsm[{extra}]'", ExitCode.MISSING)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # The interpreter must not try to flush the rest on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        gone = error.errno == errno.EPIPE  # whoever read our output has seen enough
        return ExitCode.FAILED if gone else _complain("the output cannot be written: the disk is full", ExitCode.FAILED)
    return result if isinstance(result, int) else ExitCode.FINE


_AS_COMMANDS = {
    "get_status()": "`gpu-fsm status`",
    "set_execution_mode": "`gpu-fsm mode`",
    "allow_pickle_weights=True": "--allow-pickle-weights",
}
"""What a program would call, in the words of the command line."""


def _complain(message: str, code: ExitCode) -> ExitCode:
    for call, command in _AS_COMMANDS.items():
        message = message.replace(call, command)
    # No wrapping and no markup: one line stays one line, and square brackets are the user's.
    Console(stderr=True, highlight=False, markup=False).print(f"gpu-fsm: {one_line(message, 500)}", soft_wrap=True)
    return code
