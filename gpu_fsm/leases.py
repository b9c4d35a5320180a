"""Leases: who uses which model now, and the gate that lets users drain before a model is moved.

Counting leases and closing the gate is one atomic step, so no lease can slip in between the count and the effect.
A gate has two strengths.  *Draining*: newcomers wait, but a holder of any lease still passes, because its own end may
depend on the new one.  *Moving*: the effect is under way and nobody passes; it never waits for a lease, so this ends.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Literal

import attrs
from attrs import define, field, frozen

from gpu_fsm.status import LeaseInfo

Model = Literal["vlm", "clip"]

_IDS = itertools.count(1)
"""One numbering for the process: `held_here` knows leases by number, whichever manager gave them."""

_held: ContextVar[frozenset[int]] = ContextVar("gpu_fsm_leases", default=frozenset())


def held_here() -> frozenset[int]:
    """Leases taken by the calling thread or task (or by the task that started it)."""
    return _held.get()


def remember(lease: int) -> None:
    """Note that the calling context holds `lease`."""
    _held.set(_held.get() | {lease})


def forget(lease: int) -> None:
    """The opposite of `remember`; harmless in another context."""
    _held.set(_held.get() - {lease})


@define(eq=False, kw_only=True)
class _Waiter:
    model: Model
    holder: str
    held: frozenset[int]
    future: Future[int] = field(factory=Future)


@frozen(kw_only=True)
class Holders:
    """Who holds what, at the moment the gate was closed."""

    vlm: frozenset[int] = frozenset()
    clip: frozenset[int] = frozenset()


_NOBODY = Holders()


class LeaseBook:
    """All leases of one manager.  Thread-safe; never calls out while its lock is held."""

    def __init__(self, now: Callable[[], float], changed: Callable[[], None]) -> None:
        self._now = now
        self._changed = changed
        self._lock = threading.RLock()
        self._owner = 0
        self._late: deque[int] = deque()
        """Given back by the garbage collector, which ran in the thread that holds the lock."""
        self._leases: Mapping[int, LeaseInfo] = {}
        """Replaced as a whole: it is read without the lock, and a Ctrl-C leaves the old one or the new one."""
        self._draining: frozenset[str] = frozenset()
        self._moving: frozenset[str] = frozenset()
        self._waiters: deque[_Waiter] = deque()
        self._vlm_ready_until = float("-inf")
        self.last_vlm_use = float("-inf")
        self.version = 0
        """Counts the leases that have ended; the driver compares it to know that waiting may be over."""

    # --- taking and giving back, from any thread ---

    def try_vlm(self, holder: str) -> int | None:
        """The fast path: a VLM that is resident and was verified lately needs no ticket."""
        with self._locked():
            if self._now() > self._vlm_ready_until or not self._open("vlm", held_here()):
                return None
            return self._grant("vlm", holder)

    def ask_clip(self, holder: str) -> Future[int]:
        """A CLIP lease: at once where the gate is open, else when it opens, in order of asking."""
        waiter = _Waiter(model="clip", holder=holder, held=held_here())
        with self._locked():
            if self._open("clip", waiter.held):
                waiter.future.set_result(self._grant("clip", holder))
            else:
                self._waiters.append(waiter)
        return waiter.future

    @staticmethod
    def number() -> int:
        """A new lease's number."""
        return next(_IDS)

    def grant_vlm(self, holder: str, lease: int | None = None) -> int:
        """The driver's own door, for a ticket whose VLM it has just observed; `lease` is a number taken before."""
        with self._locked():
            return self._grant("vlm", holder, lease)

    def release(self, lease: int) -> None:
        """Give a lease back; idempotent."""
        if self._owner == threading.get_ident():
            self._late.append(lease)  # an abandoned stream, finished in the middle of what this thread does here
            return
        with self._locked():
            ended = self._end(lease)
        if ended:
            self._changed()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = 0
        while self._late:
            with contextlib.suppress(IndexError):
                self.release(self._late.popleft())

    def _end(self, lease: int) -> bool:
        info = self._leases.get(lease)
        if info is None:
            return False
        if info.model == "vlm":
            self.last_vlm_use = self._now()
        self._leases = {other: kept for other, kept in self._leases.items() if other != lease}
        self.version += 1
        return True

    def touch(self) -> None:
        """The VLM was used now."""
        self.last_vlm_use = self._now()

    def is_lost(self, lease: int) -> bool:
        """Whether the model under this lease was taken away."""
        info = self._leases.get(lease)
        return info is None or info.lost

    # --- the driver's side ---

    def drain(self, models: Iterable[str]) -> Holders:
        """Close the gate of `models` to newcomers and count, in one step."""
        with self._locked():
            self._draining = frozenset(models)
            return self._holders()

    def claim(self, models: Iterable[str]) -> bool:
        """Begin to move `models`: True if nobody holds one, and from then on nobody passes until `open`."""
        wanted = frozenset(models)
        with self._locked():
            holders = self._holders()
            if ("vlm" in wanted and holders.vlm) or ("clip" in wanted and holders.clip):
                return False
            self._moving = wanted
            return True

    def force(self, models: Iterable[str]) -> Holders:
        """Begin to move `models` whoever holds them (shedding the VLM); their leases are marked lost."""
        wanted = frozenset(models)
        with self._locked():
            self._moving = wanted
            self.version += any(info.model in wanted and not info.lost for info in self._leases.values())
            self._leases = {
                lease: attrs.evolve(info, lost=True) if info.model in wanted else info
                for lease, info in self._leases.items()
            }
            return self._holders()

    def open(self, draining: Iterable[str] = ()) -> None:
        """The effect is over: keep only `draining` closed and let waiters in, in order."""
        with self._locked():
            self._moving = frozenset()
            self._draining = frozenset(draining)
            ready: list[tuple[_Waiter, int]] = []
            still: deque[_Waiter] = deque()
            for waiter in self._waiters:
                if not self._open(waiter.model, waiter.held):
                    still.append(waiter)
                elif waiter.future.set_running_or_notify_cancel():
                    ready.append((waiter, self._grant(waiter.model, waiter.holder)))
            self._waiters = still
        for waiter, lease in ready:
            waiter.future.set_result(lease)

    def vlm_ready(self, until: float) -> None:
        """The VLM was seen resident; leases need no ticket until then (`-inf`: not ready)."""
        self._vlm_ready_until = until

    def close(self, error: Callable[[], Exception]) -> None:
        """The manager closed: no fast path any more, and an `error()` of his own for each who waits."""
        with self._locked():
            self._vlm_ready_until = float("-inf")
            waiters, self._waiters = self._waiters, deque()
        for waiter in waiters:
            if waiter.future.set_running_or_notify_cancel():
                waiter.future.set_exception(error())

    @property
    def snapshot(self) -> tuple[LeaseInfo, ...]:
        """All leases now; takes no lock."""
        return tuple(self._leases.values())

    def holders(self) -> Holders:
        """Who holds what now."""
        with self._locked():
            return self._holders()

    def held_by_caller(self) -> frozenset[int]:
        """Leases of this book that the calling thread or task holds, and that have not ended elsewhere; no lock."""
        held = held_here()
        return held & self._leases.keys() if held else held

    @property
    def vlm_held(self) -> bool:
        """Whether somebody holds the VLM; takes no lock."""
        leases = self._leases
        return bool(leases) and any(info.model == "vlm" and not info.lost for info in leases.values())

    def names(self, models: Iterable[str]) -> tuple[str, ...]:
        """The holders of `models`, for messages."""
        wanted = frozenset(models)
        return tuple(f"{info.model} lease {info.id} ({info.holder})" for info in self.snapshot if info.model in wanted)

    # --- under the lock ---

    def _open(self, model: Model, held: frozenset[int]) -> bool:
        if model in self._moving:
            return False
        return model not in self._draining or any(lease in self._leases for lease in held)

    def _grant(self, model: Model, holder: str, lease: int | None = None) -> int:
        lease = self.number() if lease is None else lease
        now = self._now()
        if model == "vlm":
            self.last_vlm_use = now
        self._leases = {**self._leases, lease: LeaseInfo(id=lease, model=model, holder=holder, since_at=now)}
        return lease

    def _holders(self) -> Holders:
        if not self._leases:
            return _NOBODY
        # A lost lease protects nothing any more: its model is gone already.
        live = [info for info in self._leases.values() if not info.lost]
        return Holders(
            vlm=frozenset(info.id for info in live if info.model == "vlm"),
            clip=frozenset(info.id for info in live if info.model == "clip"),
        )
