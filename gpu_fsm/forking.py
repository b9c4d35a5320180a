"""Whether this process was forked from one that had initialised CUDA, which does not survive that.

Noted from the first import of the package on: once the fork has been made, the child cannot tell any more.
"""

from __future__ import annotations

import os
import sys


class Fork:
    """What is known of the fork that made this process."""

    cuda_before = False
    """The parent had initialised CUDA."""
    _cuda_in_parent = False

    @classmethod
    def note(cls) -> None:
        """Before a fork, in the parent."""
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        cls._cuda_in_parent = bool(cuda is not None and cuda.is_initialized())

    @classmethod
    def inherit(cls) -> None:
        """After it, in the child."""
        cls.cuda_before = cls._cuda_in_parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=Fork.note, after_in_child=Fork.inherit)
