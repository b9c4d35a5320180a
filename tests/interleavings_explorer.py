"""A systematic explorer of interleavings: every schedule of a few calls with at most so many forced switches.

Threads really run, one at a time, and hand over only at *points*: before each line (or each bytecode) of the watched
files, before a lock is taken and after it is given back.  A run is the list of choices made at its points; depth-first
search over these lists visits each schedule once.  A switch that nobody was forced into by a lock counts as a
preemption, and their number is bounded: few bugs need more than two.

Locks made under `explore` (also those inside conditions, events, queues and futures) belong to the explorer, so a
thread that waits for one is known to wait, a wait for ever is found as a deadlock, and a time-out is over when nobody
else can go on.  It needs no knowledge of what a line reads or writes: a reduction that judges by accesses must know
every container written in C and every pair of critical sections, and what it does not know it leaves out in silence.
"""

from __future__ import annotations

import contextvars
import sys
import threading
import time
from _thread import allocate_lock, start_new_thread  # never replaced, unlike the names in `threading`
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal, Protocol

from attrs import define, field, frozen

Grain = Literal["line", "opcode"]
"""How finely the watched files are cut.  CPython from 3.12 on tells of fewer bytecodes; lines are the same on all."""

MOST_POINTS = 20_000
"""Points of one run; a run that makes more does not end."""


class Case(Protocol):
    """What is explored; made anew for every run."""

    def calls(self) -> Sequence[Callable[[], object]]:
        """The calls that run at once, each in a thread of its own."""

    def check(self) -> None:
        """After all calls have returned: raise AssertionError where a rule is broken."""


@frozen(kw_only=True)
class Verdict:
    """What exploring has shown."""

    runs: int
    complete: bool
    """Every schedule within the bound was run; False where the first failure or the limit ended the search."""
    failure: str = ""
    schedule: tuple[int, ...] = ()
    """The choices of the failing run: `explore(..., replay=schedule)` runs it again."""


class Deadlock(Exception):
    """Nobody can go on."""


class _Abandoned(BaseException):
    """Unwinds the threads of a run that has failed already."""


@define(eq=False)
class _Worker:
    number: int
    call: Callable[[], object]
    go: Any = field(factory=allocate_lock)
    ready: Callable[[], bool] | None = None
    """What it waits for; None while it can run."""
    timed: bool = False
    rang: bool = False
    done: bool = False


class _Run:
    """One schedule."""

    def __init__(self, calls: Sequence[Callable[[], object]], prefix: Sequence[int], bound: int) -> None:
        self.workers = [_Worker(number, call) for number, call in enumerate(calls)]
        self.choices: list[tuple[int, int]] = []
        """(taken, how many there were) at every point with more than one way to go on."""
        self.failure: BaseException | None = None
        self._prefix, self._left = prefix, bound
        self._points = 0
        self._over = allocate_lock()

    def run(self, grain: Grain, files: Collection[str]) -> None:
        """Run to the end; `failure` is set where a call raised or nobody could go on."""
        self._over.acquire()
        for worker in self.workers:
            worker.go.acquire()
            start_new_thread(self._live, (worker, grain, files))
        self._hand_over(None, self._choose(None))
        self._over.acquire()

    def _live(self, worker: _Worker, grain: Grain, files: Collection[str]) -> None:
        worker.go.acquire()
        _here.run = (self, worker)
        try:
            sys.settrace(_tracer(self, worker, grain, files))
            contextvars.Context().run(worker.call)  # leases are remembered by context: each run begins with none
        except _Abandoned:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            sys.settrace(None)
            _here.run = None
            worker.done = True
            self._hand_over(None, self._choose(None))

    def point(self, me: _Worker) -> None:
        """Somebody else may go on here."""
        self._points += 1
        if self._points > MOST_POINTS and self.failure is None:
            self.failure = AssertionError("a call does not end")
        if self.failure is not None:
            raise _Abandoned
        self._hand_over(me, self._choose(me))
        if self.failure is not None:
            raise _Abandoned

    def wait(self, me: _Worker, ready: Callable[[], bool], *, timed: bool) -> bool:
        """Stand still until `ready()`; False where the time ran out first."""
        me.ready, me.timed, me.rang = ready, timed, False
        self._hand_over(me, self._choose(me))
        me.ready = None
        if self.failure is not None:
            raise _Abandoned
        return not me.rang

    def _choose(self, me: _Worker | None) -> _Worker | None:
        """Who goes on; None where all have ended."""
        alive = [worker for worker in self.workers if not worker.done]
        if not alive:
            return None
        if self.failure is not None:
            return alive[0]  # to unwind
        able = [worker for worker in alive if worker.ready is None or worker.ready()]
        if not able:
            sleeper = next((worker for worker in alive if worker.timed), None)
            if sleeper is None:
                self.failure = Deadlock(f"{len(alive)} of {len(self.workers)} calls wait for ever")
                return alive[0]
            sleeper.rang = True
            return sleeper
        forced = me is None or me not in able
        if not forced and me is not None:
            able = [me, *(worker for worker in able if worker is not me)]
        if len(able) == 1 or (not forced and self._left == 0):
            return able[0]
        at = len(self.choices)
        taken = self._prefix[at] if at < len(self._prefix) else 0
        self.choices.append((taken, len(able)))
        self._left -= not forced and taken > 0
        return able[taken]

    def _hand_over(self, me: _Worker | None, to: _Worker | None) -> None:
        if me is not None and to is me:
            return
        (self._over if to is None else to.go).release()
        if me is not None:
            me.go.acquire()


class _Here(threading.local):
    run: tuple[_Run, _Worker] | None = None


_here = _Here()


def _tracer(run: _Run, worker: _Worker, grain: Grain, files: Collection[str]) -> Callable[..., Any]:
    def inside(frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
        if event == grain:
            run.point(worker)
        return inside

    def entered(frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = grain == "opcode", grain == "line"
        return inside

    return entered


class _Lock:
    """`threading.Lock` for explored code.  Outside a run (setting up, checking) nobody else can hold it."""

    def __init__(self) -> None:
        self._owner: object | None = None

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take it; a time-out is over when nobody else can go on."""
        here = _here.run
        if here is None:
            if self._owner is not None and blocking:
                raise Deadlock("a lock was left behind taken")
            free = self._owner is None
            self._owner = self._owner or "outside"
            return free
        run, me = here
        run.point(me)
        while self._owner is not None:
            if not blocking or not run.wait(me, lambda: self._owner is None, timed=timeout >= 0):
                return False
        self._owner = me
        return True

    def release(self) -> None:
        """Give it back, whoever holds it."""
        here = _here.run
        if self._owner is None and (here is None or here[0].failure is None):
            raise RuntimeError("release unlocked lock")
        self._owner = None
        if here is not None and here[0].failure is None:
            here[0].point(here[1])

    def locked(self) -> bool:
        """Whether somebody holds it."""
        return self._owner is not None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


class _RLock(_Lock):
    """`threading.RLock` for explored code, with what `threading.Condition` wants of it."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if not self._is_owned() and not super().acquire(blocking, timeout):
            return False
        self._depth += 1
        return True

    def release(self) -> None:
        if self._depth > 1:
            self._depth -= 1
        else:
            self._depth = 0
            super().release()

    def _is_owned(self) -> bool:
        here = _here.run
        return self._owner is not None and self._owner is ("outside" if here is None else here[1])

    def _release_save(self) -> int:
        depth, self._depth = self._depth, 1
        self.release()
        return depth

    def _acquire_restore(self, depth: int) -> None:
        self.acquire()
        self._depth = depth


@contextmanager
def our_locks() -> Iterator[None]:
    """Whoever makes a lock, a condition, an event, a queue or a future in here gets one that the explorer knows."""
    names = {"Lock": _Lock, "RLock": _RLock, "_allocate_lock": _Lock}
    before = {name: getattr(threading, name) for name in names}
    try:
        for name, ours in names.items():
            setattr(threading, name, ours)
        yield
    finally:
        for name, theirs in before.items():
            setattr(threading, name, theirs)


def explore(
    make: Callable[[], Case],
    *,
    files: Collection[str],
    grain: Grain = "line",
    preemptions: int = 2,
    limit: int = 100_000,
    until: float = float("inf"),
    replay: Sequence[int] | None = None,
) -> Verdict:
    """Run `make()`'s calls in every order with at most `preemptions` forced switches, and check after each run.

    `files` are the source files between whose lines (or bytecodes) a switch may happen; `limit` bounds the runs and
    `until` (of `time.monotonic`) the time.  Ends at the first failure.
    """
    prefix: list[int] = list(replay or ())
    runs = 0
    while True:
        with our_locks():
            case = make()
            run = _Run(case.calls(), prefix, preemptions)
            run.run(grain, files)
            failure = run.failure
            if failure is None:
                try:
                    case.check()
                except Exception as error:
                    failure = error
        runs += 1
        if failure is not None:
            said = f"{type(failure).__name__}: {failure}".strip(": ")
            return Verdict(runs=runs, complete=False, failure=said, schedule=tuple(taken for taken, _ in run.choices))
        while run.choices and run.choices[-1][0] + 1 == run.choices[-1][1]:
            run.choices.pop()
        if not run.choices or replay is not None:
            return Verdict(runs=runs, complete=replay is None)
        if runs >= limit or time.monotonic() >= until:
            return Verdict(runs=runs, complete=False)
        prefix = [taken for taken, _ in run.choices]
        prefix[-1] += 1
