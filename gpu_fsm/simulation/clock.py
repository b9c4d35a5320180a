"""Time: a clock that only tests move, and its twin that runs by itself.

Both take appointments (`at`, `after`) and keep them in order of time, one after the other under `turn`, the lock of the
world.  A callback must not wait for another thread: that thread may need `turn` to answer.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable
from typing import Protocol


class Appointment:
    """Something that is to happen at a moment; `cancel()` makes it not happen."""

    __slots__ = ("callback", "due_at")

    def __init__(self, due_at: float, callback: Callable[[], object]) -> None:
        self.due_at = due_at
        self.callback: Callable[[], object] | None = callback

    @property
    def pending(self) -> bool:
        """Neither kept nor cancelled."""
        return self.callback is not None

    def cancel(self) -> None:
        """Call it off; harmless when it is too late."""
        self.callback = None


class WorldClock(Protocol):
    """What the parts of the world need from time."""

    turn: threading.RLock
    """Held while appointments are kept and while anything of the world changes."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment."""

    def sleep(self, seconds: float) -> None:
        """Wait."""

    def wait(self, condition: threading.Condition, timeout_s: float | None) -> None:
        """Wait on a held condition until notified or until the time is over."""

    def at(self, moment: float, callback: Callable[[], object]) -> Appointment:
        """Have `callback` run at `moment`, or as soon as possible if that has passed."""

    def after(self, delay_s: float, callback: Callable[[], object]) -> Appointment:
        """Have `callback` run `delay_s` from now."""


class WorldStuck(RuntimeError):
    """Somebody waits, nothing is scheduled and no other thread stirs: the wait would never end."""


def _seconds(value: float) -> float:
    if not value >= 0 or math.isinf(value):  # NaN compares false
        raise ValueError(f"a clock moves forward by a finite number of seconds, not by {value!r}")
    return value


class SimulatedClock:
    """Virtual time in seconds.  It stands still until somebody sleeps, and it cannot run backwards.

    `sleep`, `advance` and `run_until` keep the appointments on their way in order of time (same moment: first made,
    first kept).  A callback may itself sleep, advance or make appointments; those that it overslept are kept late,
    without time going back.
    """

    stuck_after_s = 10.0
    """Real seconds for which `run_until` without a deadline waits for other threads before it raises `WorldStuck`."""

    def __init__(self, start_s: float = 0.0) -> None:
        self.turn = threading.RLock()
        self._now = start_s
        self._heap: list[tuple[float, int, Appointment]] = []
        self._numbers = itertools.count()
        # Never held while a callback runs or another lock is taken: `at` and `wait` are called with a condition held.
        self._changed = threading.Condition(threading.Lock())

    def monotonic(self) -> float:
        return self._now

    def at(self, moment: float, callback: Callable[[], object]) -> Appointment:
        """Have `callback` run at `moment`; a moment that has passed is kept at the next step."""
        if math.isnan(moment):
            raise ValueError("an appointment needs a moment, not NaN")
        appointment = Appointment(moment, callback)
        with self._changed:
            heapq.heappush(self._heap, (moment, next(self._numbers), appointment))
            self._changed.notify_all()
        return appointment

    def after(self, delay_s: float, callback: Callable[[], object]) -> Appointment:
        """Have `callback` run `delay_s` seconds from now."""
        return self.at(self._now + delay_s, callback)

    def poke(self) -> None:
        """Have blocked `run_until` calls look at their predicate again (call after a change from another thread)."""
        with self._changed:
            self._changed.notify_all()

    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass; the world moves on meanwhile."""
        self._run_to(self._now + _seconds(seconds))

    def advance(self, seconds: float) -> None:
        """The same, under the name that tests read best."""
        self.sleep(seconds)

    def advance_to(self, moment: float) -> None:
        """Let time pass until `moment`; nothing happens if that has passed."""
        self._run_to(max(moment, self._now))

    def next_at(self) -> float | None:
        """When the next appointment is due, or None if there is none."""
        with self._changed:
            return self._peek()

    def run_until(self, predicate: Callable[[], bool], deadline: float | None = None) -> bool:
        """Keep one appointment after the other until `predicate()` holds.

        Returns True then, with the clock at the moment it began to hold; False with the clock at `deadline` (a moment,
        not a duration).  Without a deadline and without appointments it waits for other threads, and raises
        `WorldStuck` if they do nothing for `stuck_after_s` real seconds.
        """
        while True:
            with self.turn:
                if predicate():
                    return True
                if self._step(math.inf if deadline is None else deadline):
                    continue
                if deadline is not None:
                    self._now = max(self._now, deadline)
                    return predicate()
            with self._changed:
                if self._peek() is not None or predicate():
                    continue
                if not self._changed.wait(self.stuck_after_s):
                    raise WorldStuck(f"at {self._now:.3f} s nothing is scheduled that could end this wait")

    def wait(self, condition: threading.Condition, timeout_s: float | None) -> None:
        """Wait on a held `condition`; some other thread must notify it or move the clock past the time-out."""
        if timeout_s is None:
            condition.wait()
            return
        if timeout_s <= 0:
            condition.wait(0)
            return

        def ring() -> None:
            with condition:
                condition.notify_all()

        alarm = self.at(self._now + timeout_s, ring)
        try:
            condition.wait()
        finally:
            alarm.cancel()

    def _run_to(self, target: float) -> None:
        while True:
            with self.turn:
                if not self._step(target):
                    self._now = max(self._now, target)
                    return

    def _peek(self) -> float | None:
        heap = self._heap
        while heap and heap[0][2].callback is None:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def _step(self, limit: float) -> bool:
        """Keep the next appointment if it is due by `limit`; the caller holds `turn`."""
        with self._changed:
            due = self._peek()
            if due is None or due > limit:
                return False
            appointment = heapq.heappop(self._heap)[2]
            callback, appointment.callback = appointment.callback, None
            if due > self._now:
                self._now = due
        if callback is not None:
            callback()
        return True

    def __repr__(self) -> str:
        return f"<SimulatedClock {self._now:.3f} s, {sum(a.pending for _, _, a in self._heap)} appointments>"


class RunningClock:
    """Real monotonic time with appointments, kept by one daemon thread.  For the simulated Ollama behind a socket."""

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self._heap: list[tuple[float, int, Appointment]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition(threading.Lock())
        self._thread: threading.Thread | None = None
        self._closed = False

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, condition: threading.Condition, timeout_s: float | None) -> None:
        condition.wait(timeout_s)

    def at(self, moment: float, callback: Callable[[], object]) -> Appointment:
        """Have `callback` run at `moment` of the monotonic clock, in the clock's thread."""
        appointment = Appointment(moment, callback)
        with self._changed:
            heapq.heappush(self._heap, (moment, next(self._numbers), appointment))
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._keep, name="simulated-world", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return appointment

    def after(self, delay_s: float, callback: Callable[[], object]) -> Appointment:
        """Have `callback` run `delay_s` seconds from now."""
        return self.at(self.monotonic() + delay_s, callback)

    def close(self) -> None:
        """Keep no further appointments and end the thread."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _keep(self) -> None:
        while True:
            with self._changed:
                while not self._closed:
                    wait_s = self._heap[0][0] - self.monotonic() if self._heap else None
                    if wait_s is not None and wait_s <= 0:
                        break
                    self._changed.wait(wait_s)
                if self._closed:
                    return
                appointment = heapq.heappop(self._heap)[2]
            with self.turn:
                callback, appointment.callback = appointment.callback, None
                if callback is not None:
                    callback()
