"""`gpu-fsm completion`."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from gpu_fsm.cli.codes import ExitCode
from gpu_fsm.errors import BadArgument

SHELLS = ("bash", "zsh", "fish")


@click.command("completion", short_help="Print what makes a shell complete our commands.")
@click.argument("shell", type=click.Choice(SHELLS), required=False)
def completion(shell: str | None) -> int:
    """Print the script that makes a shell complete commands and options; without SHELL for the one of $SHELL.

    \b
    Examples:
      eval "$(gpu-fsm completion bash)"                                 in ~/.bashrc
      eval "$(gpu-fsm completion zsh)"                                  in ~/.zshrc
      gpu-fsm completion fish > ~/.config/fish/completions/gpu-fsm.fish
    """  # noqa: D301
    shell = shell or Path(os.environ.get("SHELL", "")).name
    kind = get_completion_class(shell) if shell in SHELLS else None
    if kind is None:
        raise BadArgument(detail="the shell is not known from $SHELL", remedy=f"Name it: {', '.join(SHELLS)}.")
    program = click.get_current_context().find_root().command
    click.echo(kind(program, {}, "gpu-fsm", "_GPU_FSM_COMPLETE").source())
    return ExitCode.FINE
