"""Broken on purpose: each class has one lock too few, or one step in the wrong order, for the explorer to find."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import attrs

from gpu_fsm.driver import Driver, Listener, Loan
from gpu_fsm.errors import CardHeld, displaced_by
from gpu_fsm.leases import Holders, LeaseBook, _Waiter, held_here
from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.tickets import Group, Mailbox, Outcome, Ticket, newest

T = TypeVar("T")


class PeekingMailbox(Mailbox):
    """Looks at the head under the lock, and takes it out under the lock, but lets go between."""

    def take(self) -> Group:
        with self._lock:
            if not self._queue:
                return ()
            head = self._queue[0]
        with self._lock:
            if self._queue:
                self._queue.popleft()
        return (head,)


class CopyingMailbox(Mailbox):
    """Takes from a copy of the queue, and puts what is left in its place."""

    def take(self) -> Group:
        left = list(self._queue)
        self._queue = deque(left[1:])
        return tuple(left[:1])


class LateNumbersMailbox(Mailbox):
    """Gives numbers before it takes the lock."""

    def post(self, ticket: Ticket) -> Group:
        self._last += 1
        ticket.seq = self._last
        with self._lock:
            superseded: Group = ()
            if ticket.preempt:
                superseded = tuple(self._queue)
                self._queue.clear()
                self.newest_preempt = ticket.seq
            self._queue.append(ticket)
            return superseded


class TrustingMailbox(Mailbox):
    """Asks whether a group has been superseded before it takes the lock to put it back."""

    def put_back(self, group: Group) -> Group:
        if newest(group) < self.newest_preempt:
            return group
        with self._lock:
            self._queue.extendleft(reversed(group))
            return ()


class HospitableMailbox(Mailbox):
    """Asks whether it is closed before it takes the lock."""

    def post(self, ticket: Ticket) -> Group:
        if self._closed:
            return (ticket,)
        with self._lock:
            self._closed = self._closed or ticket.kind == "close"
            self._last += 1
            ticket.seq = self._last
            superseded: Group = ()
            if ticket.preempt:
                superseded = tuple(self._queue)
                self._queue.clear()
                self.newest_preempt = ticket.seq
            self._queue.append(ticket)
            return superseded


class LateFlagMailbox(Mailbox):
    """Tells of the preemption after the ticket is in the queue, when the lock is free again."""

    def post(self, ticket: Ticket) -> Group:
        with self._lock:
            self._last += 1
            ticket.seq = self._last
            superseded: Group = ()
            if ticket.preempt:
                superseded = tuple(self._queue)
                self._queue.clear()
            self._queue.append(ticket)
        if ticket.preempt:
            self.newest_preempt = ticket.seq
        return superseded


class EarlyFlagMailbox(Mailbox):
    """Tells of the preemption before the ticket is in the queue."""

    def post(self, ticket: Ticket) -> Group:
        if ticket.preempt:
            self.newest_preempt = self._last + 1
        return super().post(ticket)


class UnlockedMailbox(Mailbox):
    """Reads the queue without the lock."""

    def has_a_holder(self, version: int, now: float) -> bool:
        for ticket in self._queue:  # noqa: SIM110 - line by line, for the explorer to cut
            if ticket.may_pass(version, now):
                return True
        return False

    def wants_vlm(self) -> bool:
        for ticket in self._queue:  # noqa: SIM110
            if ticket.wants_vlm:
                return True
        return False

    def take_of_a_holder(self, version: int, now: float) -> Group:
        found = next((ticket for ticket in self._queue if ticket.may_pass(version, now)), None)
        if found is None:
            return ()
        with self._lock:
            if found in self._queue:
                self._queue.remove(found)
        return (found,)


class HopefulTicket(Ticket):
    """Grants where the future was not done a moment ago."""

    def grant(self, outcome: Outcome) -> bool:
        if self.future.done():
            return False
        self.future.set_result(outcome)
        return True

    def refuse(self, error: Any) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class LeakyGrantTicket(Ticket):
    """Says that it granted, whether the waiter was there or not."""

    def grant(self, outcome: Outcome) -> bool:
        super().grant(outcome)
        return True


class GatelessBook(LeaseBook):
    """Asks whether the gate is open first, and grants later."""

    def try_vlm(self, holder: str) -> int | None:
        with self._lock:
            if self._now() > self._vlm_ready_until or not self._open("vlm", held_here()):
                return None
        with self._lock:
            return self._grant("vlm", holder)

    def ask_clip(self, holder: str) -> Future[int]:
        waiter = _Waiter(model="clip", holder=holder, held=held_here())
        with self._lock:
            opened = self._open("clip", waiter.held)
        with self._lock:
            if opened:
                waiter.future.set_result(self._grant("clip", holder))
            else:
                self._waiters.append(waiter)
        return waiter.future


class CountFirstBook(LeaseBook):
    """Counts the leases first and closes the gate afterwards."""

    def drain(self, models: Iterable[str]) -> Holders:
        with self._lock:
            holders = self._holders()
        with self._lock:
            self._draining = frozenset(models)
        return holders

    def claim(self, models: Iterable[str]) -> bool:
        wanted = frozenset(models)
        with self._lock:
            holders = self._holders()
        if ("vlm" in wanted and holders.vlm) or ("clip" in wanted and holders.clip):
            return False
        self._moving = wanted
        return True


class ForgetfulBook(LeaseBook):
    """Gives a lease back in two parts, and tells of neither that it is under way."""

    def release(self, lease: int) -> None:
        if lease not in self._leases:
            return
        self.version += 1
        with self._lock:
            self._leases = {other: info for other, info in self._leases.items() if other != lease}
        self._changed()


class SharedPublishBook(LeaseBook):
    """Publishes the leases outside the lock."""

    def release(self, lease: int) -> None:
        with self._lock:
            if lease not in self._leases:
                return
            self.version += 1
            left = {other: info for other, info in self._leases.items() if other != lease}
        self._leases = left
        self._changed()


class StaleClaimBook(LeaseBook):
    """Writes back the leases that it saw before it took the lock."""

    def claim(self, models: Iterable[str]) -> bool:
        seen = self._leases
        claimed = super().claim(models)
        self._leases = seen
        return claimed


class EarlyWakeBook(LeaseBook):
    """Tells of the end of a lease before it has ended."""

    def release(self, lease: int) -> None:
        self._changed()
        with self._lock:
            self._end(lease)


class ImpoliteBook(LeaseBook):
    """Looks whether a waiter is still there, and gives the lease without asking again."""

    def open(self, draining: Iterable[str] = ()) -> None:
        with self._lock:
            self._moving, self._draining = frozenset(), frozenset(draining)
            ready = [waiter for waiter in self._waiters if not waiter.future.cancelled()]
            self._waiters = deque()
        for waiter in ready:
            waiter.future.set_result(self._grant(waiter.model, waiter.holder))


class CarelessForceBook(LeaseBook):
    """Marks leases as lost outside the lock."""

    def force(self, models: Iterable[str]) -> Holders:
        wanted = frozenset(models)
        marked = {
            lease: attrs.evolve(info, lost=True) if info.model in wanted else info
            for lease, info in self._leases.items()
        }
        with self._lock:
            self._moving = wanted
            self._leases = marked
            return self._holders()


class AskingAnywayBook(LeaseBook):
    """Sweeps the waiters out without the lock when it closes."""

    def close(self, error: Callable[[], Exception]) -> None:
        self._vlm_ready_until = float("-inf")
        waiters = tuple(self._waiters)
        for waiter in waiters:
            if waiter.future.set_running_or_notify_cancel():
                waiter.future.set_exception(error())
        self._waiters = deque()


class LeakyDriver(Driver):
    """Gives a late lease back only where it has come already."""

    def abandon(self, future: Future[T], lease_of: Callable[[T], int | None]) -> None:
        if future.done():
            if not future.cancelled() and future.exception() is None:
                self.leases.release(lease_of(future.result()) or 0)
            return
        future.cancel()


class TwiceClosingDriver(Driver):
    """Asks whether somebody is closing it without the lock."""

    def post_close(self) -> Future[Outcome]:
        if self._closing is None:
            self._closing = Ticket(kind="close", preempt=True)
            self._enqueue(self._closing)
        return self._closing.future


class SilentDriver(Driver):
    """Drops what a close has displaced, without an answer."""

    def _enqueue(self, ticket: Ticket) -> None:
        for displaced in self.mailbox.post(ticket):
            if displaced is not ticket:
                displaced.refuse(displaced_by(ticket.kind))
        self.notify()


class UnlockedListenersDriver(Driver):
    """Adds listeners without the lock."""

    def subscribe(self, listener: Listener, kinds: frozenset[str]) -> Callable[[], None]:
        entry = (listener, kinds)
        before = self._listeners
        self._listeners = (*before, entry)

        def unsubscribe() -> None:
            now = self._listeners
            self._listeners = tuple(other for other in now if other is not entry)

        return unsubscribe


class QuietDriver(Driver):
    """Looks whether there is work before it takes the lock to sleep."""

    def _drive_forever(self) -> None:
        while not self.closed:
            while not self._has_work():
                with self._wake:
                    due = self._due()
                    self.clock.wait(self._wake, None if due is None else max(0.0, due - self.clock.monotonic()))
            with self._drive():
                self._next()
        self.tell(None)


class LateLoanDriver(Driver):
    """Looks at the loans before it takes the lock to post."""

    def _enqueue(self, ticket: Ticket) -> None:
        self._respect_loans(ticket)
        with self._post_lock:
            displaced_by_it = self.mailbox.post(ticket)
        for displaced in displaced_by_it:
            displaced.refuse(displaced_by(ticket.kind))
        self.notify()


class ForgetfulLenderDriver(Driver):
    """Asks for the newest request before it takes the lock to lend."""

    @contextlib.contextmanager
    def lend(self, holder: str) -> Iterator[Loan]:
        self.check_usable()
        newest = self._newest_request
        on_its_way = None if newest is None or newest.future.done() else newest.mode
        with self._post_lock:
            mode = self.engine.asked_mode if on_its_way is None else on_its_way
            loan = Loan(holder, mode)
            self._loans = (*self._loans, loan)
        try:
            yield loan
        finally:
            with self._post_lock:
                self._loans = tuple(other for other in self._loans if other is not loan)


class StubbornLenderDriver(Driver):
    """Lets nobody in while the card is lent, not even a close."""

    def _respect_loans(self, ticket: Ticket) -> None:
        if self._loans:
            raise CardHeld(detail="the card is lent")
        super()._respect_loans(ticket)


class OneBorrowerDriver(Driver):
    """Gives a loan back without the lock."""

    @contextlib.contextmanager
    def lend(self, holder: str) -> Iterator[Loan]:
        loan = Loan(holder, self.engine.asked_mode)
        with self._post_lock:
            self._loans = (*self._loans, loan)
        try:
            yield loan
        finally:
            left = tuple(other for other in self._loans if other is not loan)
            self._loans = left


class ForgetfulSettingsDriver(Driver):
    """Takes up the new settings, and then forgets that there were some."""

    def _next(self) -> bool:
        if self._new_config is not None and not self.closed:
            self.config = self._new_config
            self.engine.reconfigure(self.config)
            self._new_config = None
            return True
        return super()._next()


class UnlockedSettingsDriver(Driver):
    """Reads the settings that it changes before it takes the lock."""

    def reconfigure(self, given: GPUResourceConfig | Mapping[str, Any]) -> dict[str, Any]:
        before = self.newest_config
        new = given if isinstance(given, GPUResourceConfig) else attrs.evolve(before, **given)
        with self._post_lock:
            self._new_config = new
        self.notify()
        return {}
