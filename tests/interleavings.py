"""Every interleaving of two public calls on the mailbox, the tickets, the leases and the driver's doors.

`python -m tests.interleavings [--json] [--seconds N] [--more N]` explores each pair below twice: cut between lines,
with at most two preemptions (one where a call is long), and cut between bytecodes, with at most one.  Then it explores
what was broken on purpose (`interleavings_broken.py`) with the same pairs, and each must be found.  Exit code 1 for a
broken rule, for a planted defect that nobody saw, and where the time did not suffice for all schedules.
"""

from __future__ import annotations

import argparse
import concurrent.futures._base
import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar

import gpu_fsm.driver
import gpu_fsm.leases
import gpu_fsm.tickets
from gpu_fsm import ExecutionMode
from gpu_fsm.driver import Driver, Loan
from gpu_fsm.errors import CardHeld, GPUFSMError, ManagerClosed, Superseded
from gpu_fsm.events import Event
from gpu_fsm.leases import LeaseBook
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.status import State
from gpu_fsm.tickets import Group, Kind, Mailbox, Outcome, Ticket
from tests import interleavings_broken as broken
from tests.interleavings_explorer import Grain, Verdict, explore

CORE = frozenset(
    str(module.__file__)
    for module in (gpu_fsm.tickets, gpu_fsm.leases, gpu_fsm.driver, concurrent.futures._base, broken)
)
"""The files that are cut."""

OUTCOME = Outcome(asked="IDLE", state=State.IDLE)
Call = Callable[[], object]


class Pair:
    """Two calls and the rule that holds however they interleave (the docstring of each)."""

    mailbox_type: ClassVar[type[Mailbox]] = Mailbox
    ticket_type: ClassVar[type[Ticket]] = Ticket
    book_type: ClassVar[type[LeaseBook]] = LeaseBook
    driver_type: ClassVar[type[Driver]] = Driver
    preemptions: ClassVar[dict[Grain, int]] = {"line": 2, "opcode": 1}
    """How the core is cut, and how many preemptions go with it."""

    def calls(self) -> Sequence[Call]:
        """The two calls."""
        return (self.one, self.two)

    def one(self) -> object:
        """The first call."""
        raise NotImplementedError

    def two(self) -> object:
        """The second call."""
        raise NotImplementedError

    def check(self) -> None:
        """The rule, once both have returned."""
        raise NotImplementedError

    def ticket(
        self,
        mode: ExecutionMode | None = ExecutionMode.RECORDING,
        *,
        kind: Kind = "request",
        preempt: bool = False,
        holds: Sequence[int] = (),
        lease_for: str | None = None,
    ) -> Ticket:
        """A request, of the type under test."""
        ticket_type = self.ticket_type
        return ticket_type(kind=kind, mode=mode, preempt=preempt, holds=frozenset(holds), lease_for=lease_for)


# --- the mailbox ---


class WithMailbox(Pair):
    """One ticket is in the mailbox already."""

    def __init__(self) -> None:
        self.mailbox = self.mailbox_type()
        self.old = self.ticket()
        self.mailbox.post(self.old)
        self.new = self.ticket(ExecutionMode.IDLE)
        self.got: list[Ticket] = []
        self.displaced: list[Ticket] = []

    def one(self) -> None:
        self.displaced += self.mailbox.post(self.new)

    def rest(self) -> list[Ticket]:
        """What lies in the mailbox at the end."""
        left: list[Ticket] = []
        while group := self.mailbox.take():
            left += group
        return left

    def once_each(self) -> None:
        """Nothing is lost, nothing comes twice."""
        everywhere = [*self.got, *self.displaced, *self.rest()]
        assert sorted(t.seq for t in everywhere) == [1, 2], [t.seq for t in everywhere]


class PostAgainstTake(WithMailbox):
    """A ticket that is posted while another is taken is neither lost nor doubled, and both keep their order."""

    def two(self) -> None:
        self.got += self.mailbox.take()

    def check(self) -> None:
        assert self.got[0] is self.old
        self.once_each()


class PreemptAgainstTake(WithMailbox):
    """A ticket is taken or thrown out by a preempting one, never both and never neither."""

    def __init__(self) -> None:
        super().__init__()
        self.new = self.ticket(ExecutionMode.IDLE, preempt=True)

    def two(self) -> None:
        self.got += self.mailbox.take()

    def check(self) -> None:
        assert self.old in self.got or self.old in self.displaced
        self.once_each()


class PostAgainstPost(WithMailbox):
    """Every ticket has a number of its own, and the queue is in the order of the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.third = self.ticket(ExecutionMode.AUTOPILOT)

    def two(self) -> None:
        self.displaced += self.mailbox.post(self.third)

    def check(self) -> None:
        assert [t.seq for t in self.rest()] == [1, 2, 3]


class PreemptAgainstPutBack(WithMailbox):
    """A group that goes back to the head is refused where something newer has preempted it."""

    def __init__(self) -> None:
        super().__init__()
        self.new = self.ticket(ExecutionMode.IDLE, preempt=True)
        self.group: Group = self.mailbox.take()

    def two(self) -> None:
        self.displaced += self.mailbox.put_back(self.group)

    def check(self) -> None:
        assert self.displaced == [self.old]
        assert self.rest() == [self.new]


class CloseAgainstPost(WithMailbox):
    """Nothing comes after a close: a ticket is in the queue before it and thrown out, or handed back."""

    def two(self) -> None:
        self.displaced += self.mailbox.post(self.ticket(None, kind="close", preempt=True))

    def check(self) -> None:
        assert sorted(self.displaced, key=id) == sorted([self.old, self.new], key=id)
        assert [t.kind for t in self.rest()] == ["close"]


class PreemptAgainstHeadPreempts(WithMailbox):
    """Who sees a preempting ticket at the head sees its number, too: else it drops what waits and serves nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.new = self.ticket(ExecutionMode.IDLE, preempt=True)
        self.seen = (False, 0)

    def two(self) -> None:
        self.seen = (self.mailbox.head_preempts(()), self.mailbox.newest_preempt)

    def check(self) -> None:
        assert self.seen != (True, 0)


class PreemptAgainstSuperseded(WithMailbox):
    """A step that finds itself superseded finds the newer ticket at the head, at once."""

    def __init__(self) -> None:
        super().__init__()
        self.mailbox.take()
        self.new = self.ticket(ExecutionMode.IDLE, preempt=True)

    def two(self) -> None:
        if self.mailbox.newest_preempt > 1:
            self.got += self.mailbox.take()
            assert self.got == [self.new]

    def check(self) -> None:
        assert self.got == [self.new] or self.rest() == [self.new]


class PostAgainstTakeOfAHolder(WithMailbox):
    """The ticket of somebody who holds a lease is taken past the others, or thrown out by a preempting one: once."""

    def __init__(self) -> None:
        self.mailbox = self.mailbox_type()
        self.old = self.ticket(holds=[1])
        self.mailbox.post(self.old)
        self.new = self.ticket(ExecutionMode.IDLE, preempt=True)
        self.got, self.displaced = [], []

    def two(self) -> None:
        self.got += self.mailbox.take_of_a_holder(0, 0.0)

    def check(self) -> None:
        self.once_each()


class PostAgainstLooking(WithMailbox):
    """Looking through the queue while it changes raises nothing and misses nothing that was there all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[bool, ...] = ()

    def two(self) -> None:
        self.seen = (self.mailbox.wants_vlm(), self.mailbox.has_a_holder(0, 0.0))

    def check(self) -> None:
        assert self.seen == (True, False)


# --- tickets ---


class GrantAgainstCancel(Pair):
    """A ticket is granted or cancelled, and who granted it knows which."""

    def __init__(self) -> None:
        self.it = self.ticket()
        self.granted = self.cancelled = False

    def one(self) -> None:
        self.granted = self.it.grant(OUTCOME)

    def two(self) -> None:
        self.cancelled = self.it.future.cancel()

    def check(self) -> None:
        assert self.granted is not self.cancelled
        assert self.it.future.done()


class RefuseAgainstCancel(GrantAgainstCancel):
    """A ticket is refused or cancelled; refusing what was cancelled harms nobody."""

    def one(self) -> None:
        self.it.refuse(Superseded(detail="newer"))

    def check(self) -> None:
        assert self.it.future.done()
        assert self.it.future.cancelled() is self.cancelled


# --- leases ---


class WithBook(Pair):
    """An open gate, and a VLM that was seen lately."""

    def __init__(self) -> None:
        self.woken = 0
        self.book = self.book_type(lambda: 0.0, self.wake)
        self.book.vlm_ready(1.0)
        self.future: Future[int] = Future()
        self.lease: int | None = None
        self.counted: frozenset[int] = frozenset()
        self.claimed = False

    def wake(self) -> None:
        """What the book tells the driver when a lease has ended."""
        self.woken += 1

    def ids(self) -> set[int]:
        """The leases that everybody sees."""
        return {info.id for info in self.book.snapshot}


class AskAgainstClaim(WithBook):
    """A CLIP lease or CLIP's move: who comes second waits."""

    def one(self) -> None:
        self.future = self.book.ask_clip("somebody")

    def two(self) -> None:
        self.claimed = self.book.claim(["clip"])

    def check(self) -> None:
        assert self.claimed is not self.future.done()


class AskAgainstDrain(WithBook):
    """A lease is counted, or it waits behind the closed gate: none slips through a drain."""

    def one(self) -> None:
        self.future = self.book.ask_clip("somebody")

    def two(self) -> None:
        self.counted = self.book.drain(["clip"]).clip

    def check(self) -> None:
        assert self.counted == ({self.future.result(0)} if self.future.done() else set())


class TryVlmAgainstDrain(WithBook):
    """The fast path is counted, or it does not pass."""

    def one(self) -> None:
        self.lease = self.book.try_vlm("somebody")

    def two(self) -> None:
        self.counted = self.book.drain(["vlm"]).vlm

    def check(self) -> None:
        assert self.counted == (set() if self.lease is None else {self.lease})


class TryVlmAgainstClaim(WithBook):
    """A VLM lease or the VLM's unload, never both."""

    def one(self) -> None:
        self.lease = self.book.try_vlm("somebody")

    def two(self) -> None:
        self.claimed = self.book.claim(["vlm"])

    def check(self) -> None:
        assert self.claimed is (self.lease is None)


class GrantVlmAgainstRelease(WithBook):
    """A lease that is granted while another ends is there afterwards, for those who look without the lock as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.book.grant_vlm("first")

    def one(self) -> None:
        self.lease = self.book.grant_vlm("second")

    def two(self) -> None:
        self.book.release(self.first)

    def check(self) -> None:
        assert self.lease is not None
        assert self.ids() == self.book.holders().vlm == {self.lease}


class ReleaseAgainstClaim(WithBook):
    """A model is claimed only when its last lease is back; a claim that fails is woken for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.book.grant_vlm("first")
        self.version = self.book.version

    def one(self) -> None:
        self.book.release(self.first)

    def two(self) -> None:
        self.claimed = self.book.claim(["vlm"])
        if self.claimed:
            assert self.ids() == set(), "it moves what is leased"

    def check(self) -> None:
        assert self.ids() == set()
        assert (self.woken, self.book.version) == (1, self.version + 1)


class ReleaseAgainstRelease(WithBook):
    """A lease ends once, however often it is given back."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.book.grant_vlm("first")
        self.version = self.book.version

    def one(self) -> None:
        self.book.release(self.first)

    def two(self) -> None:
        self.book.release(self.first)

    def check(self) -> None:
        assert (self.woken, self.book.version) == (1, self.version + 1)


class ReleaseAgainstCount(WithBook):
    """A lease that was counted and then ends is told of by a new version: nobody sleeps through its end.

    The driver's order: it remembers the version first and counts afterwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = self.book.grant_vlm("first")
        self.version = -1

    def one(self) -> None:
        self.book.release(self.first)

    def two(self) -> None:
        self.version = self.book.version
        self.counted = self.book.drain(["vlm"]).vlm

    def check(self) -> None:
        assert not self.counted or self.version != self.book.version


class ReleaseAgainstForce(WithBook):
    """A lease that ends while the VLM is taken away from it does not come back to life."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.book.grant_vlm("first")

    def one(self) -> None:
        self.book.release(self.first)

    def two(self) -> None:
        self.book.force(["vlm"])

    def check(self) -> None:
        assert self.ids() == set()
        assert self.book.is_lost(self.first)


class OpenAgainstAsk(WithBook):
    """Whoever asks while the gate opens gets the lease: at once, or from the opening."""

    def __init__(self) -> None:
        super().__init__()
        self.book.drain(["clip"])

    def one(self) -> None:
        self.future = self.book.ask_clip("somebody")

    def two(self) -> None:
        self.book.open()

    def check(self) -> None:
        assert {self.future.result(0)} == self.book.holders().clip


class OpenAgainstCancel(WithBook):
    """A waiter that leaves while the gate opens has its lease or has left, and then there is no lease."""

    def __init__(self) -> None:
        super().__init__()
        self.book.drain(["clip"])
        self.future = self.book.ask_clip("somebody")

    def one(self) -> None:
        self.future.cancel()

    def two(self) -> None:
        self.book.open()

    def check(self) -> None:
        leases = set() if self.future.cancelled() else {self.future.result(0)}
        assert self.ids() == leases


class CloseAgainstOpen(WithBook):
    """Who waits for a lease when the manager closes gets it or an error, and never nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.book.drain(["clip"])
        self.future = self.book.ask_clip("somebody")

    def one(self) -> None:
        self.book.close(lambda: ManagerClosed(detail="closed"))

    def two(self) -> None:
        self.book.open()

    def check(self) -> None:
        assert self.future.done()
        assert len(self.ids()) == (self.future.exception(0) is None)


# --- the driver's doors ---


class WithDriver(Pair):
    """A driver in a simulated world, that nobody drives until the end."""

    def __init__(self) -> None:
        world = SimulatedWorld()
        self.driver = self.driver_type(world.config(), **_ports(world), threaded=False)
        self.driver.mailbox.__class__ = self.mailbox_type
        self.driver.leases.__class__ = self.book_type
        self.refused: list[GPUFSMError] = []
        self.asked: list[Future[Any]] = []

    def ask(self, call: Callable[[], Any]) -> None:
        """Call, and keep the future or the refusal."""
        try:
            asked = call()
            self.asked.append(asked.future if isinstance(asked, Ticket) else asked)
        except GPUFSMError as error:
            self.refused.append(error)

    def all_answered(self) -> None:
        """Let the driver serve what there is: everybody has an answer."""
        self.driver.drive_for(0)
        assert all(future.done() for future in self.asked), "somebody has no answer"


def _ports(world: SimulatedWorld) -> dict[str, Any]:
    ports = world.ports()
    return {"server": _Server(), "clip": ports["clip_host"], "probe": ports["vram_probe"], "clock": ports["clock"]}


class _Server:
    """Enough of a VLM server for calls that load nothing: it never has the model."""

    simulated, on_our_card, model = True, True, "sim-vlm:7b"

    def residency(self, timeout_s: float) -> Any:
        from gpu_fsm.status import Answer, Residency

        return Residency(answer=Answer.NO)

    def catalog(self, timeout_s: float) -> Any:
        from gpu_fsm.status import Catalog

        return Catalog()


class PostAgainstClose(WithDriver):
    """Whoever asks while the manager closes is answered: served, refused at the door, or thrown out."""

    preemptions = {"line": 1, "opcode": 1}  # noqa: RUF012 - the driver's part is long

    def one(self) -> None:
        self.ask(lambda: self.driver.post("request", mode=ExecutionMode.IDLE))

    def two(self) -> None:
        self.ask(self.driver.post_close)

    def check(self) -> None:
        self.all_answered()
        errors = [*self.refused, *(e for f in self.asked if (e := f.exception(0)) is not None)]
        assert all(isinstance(error, ManagerClosed) for error in errors), errors


class CloseAgainstClose(WithDriver):
    """Everybody who closes waits for the same end."""

    preemptions = {"line": 1, "opcode": 1}  # noqa: RUF012

    def one(self) -> None:
        self.ask(self.driver.post_close)

    two = one

    def check(self) -> None:
        assert self.asked[0] is self.asked[1]
        assert len(self.driver.mailbox) == 1
        self.all_answered()


class CloseAgainstAskClip(WithDriver):
    """Whoever asks for CLIP, which is about to be moved, while the manager closes gets it, or hears of the end."""

    def __init__(self) -> None:
        super().__init__()
        self.driver.leases.drain(["clip"])

    def one(self) -> None:
        self.ask(lambda: self.driver.ask_clip("somebody"))

    preemptions = {"line": 1}  # noqa: RUF012 - the driver drives, so the second call is long

    def two(self) -> None:
        self.ask(self.driver.post_close)
        self.driver.drive_for(0)

    def check(self) -> None:
        self.all_answered()
        assert self.driver.closed


class WithABorrower(WithDriver):
    """The second call borrows the card, and keeps it until the rule has been judged."""

    preemptions = {"line": 1}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.kept = contextlib.ExitStack()
        self.loan: Loan | None = None
        self.waited_before = 0

    def two(self) -> None:
        try:
            self.loan = self.kept.enter_context(self.driver.lend("a game"))
        except ManagerClosed as error:
            self.refused.append(error)
        self.waited_before = len(self.driver.mailbox)

    def check(self) -> None:
        assert (self.loan is not None) == (self.loan in self.driver._loans), "not lent, and the borrower thinks so"
        self.kept.close()
        assert self.driver._loans == ()


class LendAgainstPost(WithABorrower):
    """Whoever asks for the VLM has asked before the card was lent, or hears that it is."""

    def one(self) -> None:
        self.ask(lambda: self.driver.post("vlm_wanted"))

    def check(self) -> None:
        assert len(self.asked) == self.waited_before, "somebody takes room that is lent"
        assert len(self.asked) + len(self.refused) == 1
        assert all(isinstance(error, CardHeld) for error in self.refused)
        super().check()


class LendAgainstRequest(LendAgainstPost):
    """The mode that a loan remembers is the last one asked for before it, also of a request still on its way."""

    def one(self) -> None:
        self.ask(lambda: self.driver.post("request", mode=ExecutionMode.RECORDING))

    def check(self) -> None:
        assert self.loan is not None
        asked_before = ExecutionMode.RECORDING if self.waited_before else ExecutionMode.IDLE
        assert self.loan.mode is asked_before, "the mode that was asked for before is forgotten"
        super().check()


class LendAgainstClose(WithABorrower):
    """A close while the card is lent, or about to be, ends all the same; who comes too late with a loan is told so."""

    def one(self) -> None:
        self.ask(self.driver.post_close)

    def check(self) -> None:
        assert len(self.asked) == 1, self.refused
        self.all_answered()
        assert self.driver.closed
        super().check()


class LendAgainstLend(WithABorrower):
    """The end of one loan is not the end of another."""

    preemptions = {"line": 1, "opcode": 1}  # noqa: RUF012

    def one(self) -> None:
        with self.driver.lend("another game"):
            pass


class WithNewSettings(WithDriver):
    """Settings have been changed, and the driver has not gone by them yet."""

    preemptions = {"line": 1}  # noqa: RUF012 - the driver's part is long

    def __init__(self) -> None:
        super().__init__()
        self.driver.drive_for(0)
        self.driver.engine._check_at = 1e9
        self.driver.reconfigure({"idle_timeout_s": 77.0})

    def one(self) -> None:
        self.driver.reconfigure({"check_interval_s": 7.0})

    def check(self) -> None:
        self.driver.drive_for(0)
        for config in (self.driver.newest_config, self.driver.config, self.driver.engine.config):
            assert (config.idle_timeout_s, config.check_interval_s) == (77.0, 7.0), "a setting is lost"


class ReconfigureAgainstRequest(WithNewSettings):
    """Settings that come while the driver takes up others, on its way to a request, are taken up after them."""

    def two(self) -> None:
        self.ask(lambda: self.driver.post("request", mode=ExecutionMode.IDLE))
        self.driver.drive_for(0)

    def check(self) -> None:
        super().check()
        self.all_answered()
        assert self.refused == []


class ReconfigureAgainstReconfigure(WithNewSettings):
    """Of two who change different settings at once neither undoes what the other did."""

    def __init__(self) -> None:
        super().__init__()
        self.driver.drive_for(0)

    def two(self) -> None:
        self.driver.reconfigure({"idle_timeout_s": 66.0})
        self.driver.reconfigure({"idle_timeout_s": 77.0})


class AbandonAgainstGrant(WithDriver):
    """A lease that nobody waits for any more goes back, whether it comes before, after or while its waiter leaves."""

    preemptions = {"line": 1, "opcode": 1}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.driver.leases.drain(["clip"])
        self.future = self.driver.ask_clip("somebody")

    def one(self) -> None:
        self.driver.abandon(self.future, int)

    def two(self) -> None:
        self.driver.leases.open()

    def check(self) -> None:
        assert self.driver.leases.snapshot == ()


class AbandonAgainstVlmGrant(WithDriver):
    """The same for a VLM lease, that comes with the answer to a ticket; the driver's own order."""

    preemptions = {"line": 1, "opcode": 1}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.it = self.ticket(None, kind="vlm_wanted", lease_for="somebody")

    def one(self) -> None:
        self.driver.abandon(self.it.future, lambda outcome: outcome.lease)

    def two(self) -> None:
        lease = self.driver.leases.grant_vlm("somebody")
        if not self.it.grant(Outcome(asked="vlm_wanted", state=State.IDLE, lease=lease)):
            self.driver.leases.release(lease)

    def check(self) -> None:
        assert self.driver.leases.snapshot == ()


class SubscribeAgainstSubscribe(WithDriver):
    """No listener is lost because another one comes or goes at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.leave = self.driver.subscribe(_listener, frozenset())

    def one(self) -> None:
        self.driver.subscribe(_listener, frozenset({"mode_changed"}))

    def two(self) -> None:
        self.leave()

    def check(self) -> None:
        assert self.driver._listeners == ((_listener, frozenset({"mode_changed"})),)


def _listener(event: Event) -> None:
    """Hear nothing."""


class PostAgainstSleep(WithDriver):
    """A driver that is about to sleep does not sleep through a ticket."""

    preemptions = {"line": 1}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.driver.drive_for(0)  # the first look; then there is nothing to do for a while
        self.driver.engine._check_at = 1e9

    def one(self) -> None:
        self.ask(self.driver.post_close)

    def two(self) -> None:
        self.driver._drive_forever()

    def check(self) -> None:
        assert self.driver.closed
        self.all_answered()


class ReleaseAgainstSleep(WithDriver):
    """A driver that is about to sleep does not sleep through the end of the lease that a ticket waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.driver.drive_for(0)
        self.driver.engine._check_at = 1e9
        self.lease = self.driver.ask_clip("somebody").result(0)
        self.began = self.driver.clock.monotonic()

    def one(self) -> None:
        self.driver.leases.release(self.lease)

    def two(self) -> None:
        with self.driver._wake:
            while self.driver.leases.snapshot:
                self.driver.clock.wait(self.driver._wake, None)

    def check(self) -> None:
        assert self.driver.leases.snapshot == ()


PAIRS: tuple[type[Pair], ...] = (
    PostAgainstTake,
    PreemptAgainstTake,
    PostAgainstPost,
    PreemptAgainstPutBack,
    CloseAgainstPost,
    PreemptAgainstHeadPreempts,
    PreemptAgainstSuperseded,
    PostAgainstTakeOfAHolder,
    PostAgainstLooking,
    GrantAgainstCancel,
    RefuseAgainstCancel,
    AskAgainstClaim,
    AskAgainstDrain,
    TryVlmAgainstDrain,
    TryVlmAgainstClaim,
    GrantVlmAgainstRelease,
    ReleaseAgainstClaim,
    ReleaseAgainstRelease,
    ReleaseAgainstCount,
    ReleaseAgainstForce,
    OpenAgainstAsk,
    OpenAgainstCancel,
    CloseAgainstOpen,
    PostAgainstClose,
    CloseAgainstClose,
    CloseAgainstAskClip,
    LendAgainstPost,
    LendAgainstRequest,
    LendAgainstClose,
    LendAgainstLend,
    ReconfigureAgainstRequest,
    ReconfigureAgainstReconfigure,
    AbandonAgainstGrant,
    AbandonAgainstVlmGrant,
    SubscribeAgainstSubscribe,
    PostAgainstSleep,
    ReleaseAgainstSleep,
)

PLANTED: tuple[tuple[type[Pair], str, type], ...] = (
    (PostAgainstTake, "mailbox_type", broken.CopyingMailbox),
    (PreemptAgainstTake, "mailbox_type", broken.PeekingMailbox),
    (PostAgainstPost, "mailbox_type", broken.LateNumbersMailbox),
    (PreemptAgainstPutBack, "mailbox_type", broken.TrustingMailbox),
    (CloseAgainstPost, "mailbox_type", broken.HospitableMailbox),
    (PreemptAgainstHeadPreempts, "mailbox_type", broken.LateFlagMailbox),
    (PreemptAgainstSuperseded, "mailbox_type", broken.EarlyFlagMailbox),
    (PostAgainstTakeOfAHolder, "mailbox_type", broken.UnlockedMailbox),
    (PostAgainstLooking, "mailbox_type", broken.UnlockedMailbox),
    (GrantAgainstCancel, "ticket_type", broken.HopefulTicket),
    (RefuseAgainstCancel, "ticket_type", broken.HopefulTicket),
    (AskAgainstClaim, "book_type", broken.GatelessBook),
    (AskAgainstDrain, "book_type", broken.CountFirstBook),
    (TryVlmAgainstDrain, "book_type", broken.GatelessBook),
    (TryVlmAgainstClaim, "book_type", broken.CountFirstBook),
    (GrantVlmAgainstRelease, "book_type", broken.SharedPublishBook),
    (ReleaseAgainstClaim, "book_type", broken.StaleClaimBook),
    (ReleaseAgainstRelease, "book_type", broken.ForgetfulBook),
    (ReleaseAgainstCount, "book_type", broken.ForgetfulBook),
    (ReleaseAgainstForce, "book_type", broken.CarelessForceBook),
    (OpenAgainstAsk, "book_type", broken.GatelessBook),
    (OpenAgainstCancel, "book_type", broken.ImpoliteBook),
    (CloseAgainstOpen, "book_type", broken.AskingAnywayBook),
    (PostAgainstClose, "driver_type", broken.SilentDriver),
    (CloseAgainstClose, "driver_type", broken.TwiceClosingDriver),
    (CloseAgainstAskClip, "book_type", broken.GatelessBook),
    (LendAgainstPost, "driver_type", broken.LateLoanDriver),
    (LendAgainstRequest, "driver_type", broken.ForgetfulLenderDriver),
    (LendAgainstClose, "driver_type", broken.StubbornLenderDriver),
    (LendAgainstLend, "driver_type", broken.OneBorrowerDriver),
    (ReconfigureAgainstRequest, "driver_type", broken.ForgetfulSettingsDriver),
    (ReconfigureAgainstReconfigure, "driver_type", broken.UnlockedSettingsDriver),
    (AbandonAgainstGrant, "driver_type", broken.LeakyDriver),
    (AbandonAgainstVlmGrant, "ticket_type", broken.LeakyGrantTicket),
    (SubscribeAgainstSubscribe, "driver_type", broken.UnlockedListenersDriver),
    (PostAgainstSleep, "driver_type", broken.QuietDriver),
    (ReleaseAgainstSleep, "book_type", broken.EarlyWakeBook),
)
"""Each must be found by the pair that it stands with, and every pair must have shown that it finds something."""


def check_pair(pair: type[Pair], until: float, more: int) -> tuple[Verdict, ...]:
    """Explore one pair in every grain, with `more` preemptions than it asks for; ends at the first failure."""
    verdicts: list[Verdict] = []
    for grain, preemptions in pair.preemptions.items():
        verdicts.append(explore(pair, files=CORE, grain=grain, preemptions=preemptions + more, until=until))
        if verdicts[-1].failure:
            break
    return tuple(verdicts)


def main() -> int:
    """Explore everything; 0 if the rules hold and every planted defect was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.interleavings", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="not longer than this (default 300)")
    parser.add_argument("--more", type=int, default=0, help="preemptions beyond the usual ones (default 0)")
    parser.add_argument("--json", action="store_true", help="nothing but one JSON object on stdout")
    args = parser.parse_args()
    logging.disable()  # what is broken on purpose may complain
    began = time.monotonic()
    until = began + args.seconds
    violations: list[str] = []
    cut_short: list[str] = []
    missed: list[str] = []
    unproven = sorted({pair.__name__ for pair in PAIRS} - {pair.__name__ for pair, _, _ in PLANTED})
    runs = 0
    for pair in PAIRS:
        verdicts = check_pair(pair, until, args.more)
        runs += sum(verdict.runs for verdict in verdicts)
        violations += [f"{pair.__name__}: {v.failure} (schedule {v.schedule})" for v in verdicts if v.failure]
        cut_short += [pair.__name__ for v in verdicts if not v.complete and not v.failure]
        counts = "+".join(str(verdict.runs) for verdict in verdicts)
        _say(args.json, f"{pair.__name__:28} {counts:>11} schedules: {(pair.__doc__ or '').splitlines()[0]}")
    for pair, attribute, kind in PLANTED:
        planted = type(f"{pair.__name__}With{kind.__name__}", (pair,), {attribute: kind})
        verdicts = check_pair(planted, until, args.more)
        if not verdicts[-1].failure:
            missed.append(planted.__name__)
        _say(args.json, f"planted: {planted.__name__}: {verdicts[-1].failure or 'NOT FOUND'}")
    result = {
        "pairs": len(PAIRS),
        "schedules": runs,
        "violations": violations,
        "cut_short": cut_short,
        "planted": len(PLANTED),
        "unproven": unproven,
        "planted_missed": missed,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(result) if args.json else f"interleavings: {result}")
    return 1 if violations or cut_short or missed or unproven else 0


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
