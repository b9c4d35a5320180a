"""What callers hand in, checked once: a clear error now instead of a strange one later."""

from __future__ import annotations

import contextlib
import math
import sys
import threading

from gpu_fsm.errors import BadArgument
from gpu_fsm.status import ExecutionMode

ASKABLE = (ExecutionMode.IDLE, ExecutionMode.RECORDING, ExecutionMode.AUTOPILOT)


def as_mode(mode: object) -> ExecutionMode:
    """An `ExecutionMode` that can be asked for, or its name in any case."""
    names = ", ".join(known.name for known in ASKABLE)
    if isinstance(mode, str):
        with contextlib.suppress(KeyError):
            mode = ExecutionMode[mode.strip().upper()]
    if not isinstance(mode, ExecutionMode):
        raise BadArgument(detail=f"unknown mode {mode!r}", remedy=f"Use one of {names}.")
    if mode not in ASKABLE:
        raise BadArgument(detail=f"{mode.name} cannot be asked for; it is what happens", remedy=f"Use one of {names}.")
    return mode


def as_timeout(timeout_s: object) -> float | None:
    """None (wait for ever) or a finite number of seconds, zero or more; more than a system can count is for ever."""
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
        raise BadArgument(detail=f"timeout_s is {timeout_s!r}", remedy="Give seconds as a number, or None.")
    if timeout_s < 0 or (isinstance(timeout_s, float) and not math.isfinite(timeout_s)):
        raise BadArgument(detail=f"timeout_s is {timeout_s!r}", remedy="Give a finite number >= 0, or None.")
    return None if timeout_s > threading.TIMEOUT_MAX else float(timeout_s)


def default_holder() -> str:
    """A name for a lease that was given none: the task's or the thread's."""
    asyncio = sys.modules.get("asyncio")  # where nobody has imported it there is no task
    with contextlib.suppress(RuntimeError):
        task = asyncio.current_task() if asyncio else None
        if task is not None:
            return str(task.get_name())
    return threading.current_thread().name
