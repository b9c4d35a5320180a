"""Requests on their way to the machine: the ticket, its outcome, and the mailbox they wait in.

Posting never blocks.  A ticket's number is given under the mailbox's lock, and "superseded" is a comparison of numbers,
never a flag set after posting: a flag can hit a request that has already been taken out.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Literal

import attrs
from attrs import define, field, frozen

from gpu_fsm.errors import GPUFSMError
from gpu_fsm.status import ClipPlace, ExecutionMode, Reason, State

Kind = Literal["request", "vlm_wanted", "vlm_unwanted", "migrate_clip", "close"]


@frozen(kw_only=True)
class Outcome:
    """How a request ended.

    `granted` is False where the manager is DEGRADED instead; `reason` then says why.  Refusals are exceptions.
    """

    asked: str
    state: State
    reason: Reason | None = None
    granted: bool = True
    lease: int | None = field(default=None, repr=False)
    leftovers: tuple[str, ...] = ()


@define(eq=False, kw_only=True)
class Ticket:
    """One request.  Its future is resolved exactly once, by the driver."""

    kind: Kind
    mode: ExecutionMode | None = None
    place: ClipPlace | None = None
    preempt: bool = False
    lease_for: str | None = None
    """Grant a VLM lease to this holder in the same breath as the acknowledgement."""
    holds: frozenset[int] = frozenset()
    """Leases that the caller holds itself."""
    posted_at: float = 0.0
    seq: int = 0
    waits_until: float = math.inf
    """When it has waited long enough for leases; `inf` as long as it has not begun to wait."""
    waits_at: int | None = None
    """The lease book's version that made it wait: until that is another one, looking again is of no use."""
    lease: int | None = None
    """The number kept for the lease that the answer brings; a drive that is cut off before it leaves none behind."""
    refusal: GPUFSMError | None = None
    """Decided half-way, and the answer whatever comes next: to be told in a stable state."""
    future: Future[Outcome] = field(factory=Future)

    @property
    def asked(self) -> str:
        """The request in words."""
        match self.kind:
            case "request":
                return self.mode.name if self.mode else "?"
            case "migrate_clip":
                return f"CLIP on {self.place}"
            case kind:
                return kind

    @property
    def wants_vlm(self) -> bool:
        """Whether a load that is under way serves this request too."""
        return self.kind == "vlm_wanted" or self.mode is ExecutionMode.RECORDING

    def may_pass(self, version: int, now: float) -> bool:
        """Whether it may go past somebody who waits for leases, which are at this version.

        Its caller holds one and it has not looked yet, or its own time is over.
        """
        fresh = bool(self.holds) and self.waits_at != version and not self.preempt
        return fresh or self.waits_until <= now

    def same_as(self, other: Ticket) -> bool:
        """Adjacent requests that ask for the same, and hold the same, cost one."""
        mine, others = (
            (self.kind, self.mode, self.place, self.holds, self.waits_until),
            (other.kind, other.mode, other.place, other.holds, other.waits_until),
        )
        return mine == others

    def grant(self, outcome: Outcome) -> bool:
        """Resolve; False if the waiter has gone, or was to be refused."""
        if self.refusal is not None:
            self.refuse(self.refusal)
            return False
        if not self._is_open():
            return False
        self.future.set_result(outcome)
        return True

    def refuse(self, error: GPUFSMError) -> None:
        """Resolve with an error of its own: a shared exception object would collect tracebacks."""
        error = self.refusal or error
        if self._is_open():
            self.future.set_exception(type(error)(**attrs.asdict(error, recurse=False)))

    def _is_open(self) -> bool:
        """Whether there is to be an answer; one that a Ctrl-C cut off may have begun."""
        return self.future.running() or (not self.future.done() and self.future.set_running_or_notify_cancel())


Group = tuple[Ticket, ...]
"""Adjacent equal tickets, served as one."""


class Mailbox:
    """First in, first out; a preempting ticket throws out what was asked before it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may post while its thread does
        self._queue: deque[Ticket] = deque()
        self._last = 0
        self._closed = False
        self._in_hand: Group = ()
        """What was taken last."""
        self.newest_preempt = 0
        """Number of the newest preempting ticket; read without the lock."""

    def post(self, ticket: Ticket) -> Group:
        """Number and enqueue a ticket.  Returns the tickets that have to be refused for it.

        Those are the ones it supersedes; and the ticket itself where something newer has superseded it already, since
        a signal handler may post in the middle of this, or where the manager closes.
        """
        with self._lock:
            if self._closed:
                return (ticket,)
            self._closed = ticket.kind == "close"
            self._last += 1
            ticket.seq = self._last
            superseded: list[Ticket] = []
            if ticket.preempt:
                while self._queue and self._queue[0].seq < ticket.seq:
                    superseded.append(self._queue.popleft())
            if self.newest_preempt > ticket.seq:  # a signal handler's, posted in between
                return (*superseded, ticket)
            if ticket.preempt:
                self.newest_preempt = ticket.seq
                self._queue.appendleft(ticket)
            else:
                self._queue.append(ticket)
            return tuple(superseded)

    def take(self) -> Group:
        """Take the oldest ticket with its equal neighbours; empty if there is none."""
        with self._lock:
            if not self._queue:
                return ()
            self._in_hand = tuple(itertools.takewhile(self._queue[0].same_as, self._queue))
            for _ in self._in_hand:
                self._queue.popleft()
            return self._in_hand

    def take_of_a_holder(self, version: int, now: float) -> Group:
        """Take the oldest ticket that may go past those who wait: of a holder, or of one who has waited long enough.

        None that has waited at this `version` of the lease book already.
        """
        with self._lock:
            for ticket in self._queue:
                if ticket.may_pass(version, now):
                    self._in_hand = (ticket,)
                    self._queue.remove(ticket)
                    return self._in_hand
            return ()

    def lost(self, kept: Group) -> Group:
        """What was taken last and is neither answered, nor here, nor `kept`: a Ctrl-C came before it was served.

        What is `kept` is here no longer: it went back to make room for somebody who then was not served.
        """
        with self._lock:
            for ticket in kept:
                if ticket in self._queue:
                    self._queue.remove(ticket)
            return tuple(
                ticket
                for ticket in self._in_hand
                if not ticket.future.done() and ticket not in kept and ticket not in self._queue
            )

    def put_back(self, group: Group) -> Group:
        """Let a group wait at the head again.  Returns it where it has been superseded meanwhile."""
        with self._lock:
            if newest(group) < self.newest_preempt:
                return group
            self._queue.extendleft(reversed(group))
            return ()

    def has_a_holder(self, version: int, now: float) -> bool:
        """Whether `take_of_a_holder` would take something."""
        with self._lock:
            return any(ticket.may_pass(version, now) for ticket in self._queue)

    def waits_until(self) -> float:
        """When the first of those has waited long enough who were displaced while they waited; `inf` if nobody was."""
        with self._lock:
            return min((ticket.waits_until for ticket in self._queue), default=math.inf)

    @property
    def closed(self) -> bool:
        """Whether a close was posted: nothing is accepted after it."""
        return self._closed

    def wants_vlm(self) -> bool:
        """Whether a queued ticket needs the VLM."""
        with self._lock:
            return any(ticket.wants_vlm for ticket in self._queue)

    def head_preempts(self, waiting: Group) -> bool:
        """Whether the oldest ticket preempts those who wait; one that was asked for before them does not."""
        with self._lock:
            return bool(self._queue) and self._queue[0].preempt and self._queue[0].seq > newest(waiting)

    def __len__(self) -> int:
        return len(self._queue)


def newest(group: Iterable[Ticket]) -> int:
    """The highest number in a group; the plan that serves it is as new as that."""
    return max((ticket.seq for ticket in group), default=0)
