"""The command line; a command is a file, `main.py` lists them."""

from gpu_fsm.cli.base import EXIT_CODES, ExitCode
from gpu_fsm.cli.main import main

__all__ = ["EXIT_CODES", "ExitCode", "main"]
