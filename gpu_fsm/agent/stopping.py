"""SIGINT and SIGTERM end the agent cleanly, in the middle of anything that can be cut off.

Waiting for a model, for a load or for the next screen is cut off at once.  What must not be left half done (a hook that
acts, the writing of the memory) is finished first.  A second SIGINT ends that too.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self


class Stopped(KeyboardInterrupt):
    """A signal ended the work; like Ctrl-C it is no error and passes through everything."""


class Stopper:
    """A wish to end, from `stop` or from a signal while the `with` block runs; may be entered again inside itself.

    Signals are heard in the main thread only, as Python has it; elsewhere there is `stop`.
    """

    def __init__(self, *numbers: signal.Signals) -> None:
        """Listen to these signals: SIGINT and SIGTERM where none is named."""
        self.requested = False
        self.signal: signal.Signals | None = None
        """Which signal asked to end, if one did."""
        self._numbers = numbers or (signal.SIGINT, signal.SIGTERM)
        self._before: dict[signal.Signals, Any] = {}
        self._depth = 0
        self._cutting = False
        self._cancel: Callable[[], object] | None = None

    def stop(self) -> None:
        """End after the screen in hand; from any thread or hook."""
        self.requested = True

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                # None: a handler that Python did not set could not be put back.  Under nohup, ignored stays ignored.
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            while self._before:
                signal.signal(*self._before.popitem())

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """In this block a signal raises `Stopped`, or cancels the task, at once; one that came before it, too."""
        before, self._cutting = self._cutting, True
        try:
            if self.signal is not None and self._depth:
                # A KeyboardInterrupt that leaves a task would end the whole event loop.
                raise Stopped if self._cancel is None else asyncio.CancelledError
            yield
        finally:
            self._cutting = before

    @contextlib.contextmanager
    def cancelling(self, task: asyncio.Future[Any]) -> Iterator[None]:
        """Under asyncio: a signal cancels `task` where it may be cut, instead of raising somewhere in the loop."""
        loop = asyncio.get_running_loop()
        # The loop sleeps in a call that a signal alone does not end: it must be woken to see the cancelling.
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            yield
        finally:
            self._cancel = None

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        impatient = self.requested and number == signal.SIGINT
        self.requested = True
        self.signal = self.signal or signal.Signals(number)
        if self._cancel is not None:
            if self._cutting or impatient:
                self._cancel()
        elif self._cutting or impatient:
            raise Stopped
