"""The command line; a command is a file, `program.py` lists them.

Nothing is imported here that takes time: from the first moment on Ctrl-C ends a command in one line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_fsm.cli.codes import EXIT_CODES, ExitCode


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        from gpu_fsm.cli.program import run_command

        return run_command(argv)
    except KeyboardInterrupt:  # while modules were being imported
        sys.stderr.write("\ngpu-fsm: interrupted\n")  # below the ^C, as click has it later
        return 130  # ExitCode.INTERRUPTED, without another import to be interrupted


def __getattr__(name: str) -> Any:
    if name in __all__:
        from gpu_fsm.cli import codes

        return getattr(codes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["EXIT_CODES", "ExitCode", "main"]
