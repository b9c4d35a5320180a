"""The one writer: a mailbox in front, the machine behind, tickets and records out.

`threads / tasks -> mailbox -> driver -> machine -> tickets and events`.  A threaded driver has two daemon threads, one
that drives and one that calls listeners.  An inline driver drives in the thread that waits; it serves tests and
simulations, where virtual time passes only while somebody waits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, TypeVar

import attrs
from attrs import define

from gpu_fsm import errors
from gpu_fsm.cardlock import CardLock
from gpu_fsm.engine import Engine
from gpu_fsm.events import Event
from gpu_fsm.leases import LeaseBook
from gpu_fsm.ports import CLIPHost, Clock, VLMServer, VRAMProbe
from gpu_fsm.settings import GPUResourceConfig, changes
from gpu_fsm.status import ClipPlace, ExecutionMode, GPUResourceStatus
from gpu_fsm.tickets import Group, Kind, Mailbox, Outcome, Ticket

log = logging.getLogger("gpu_fsm")

T = TypeVar("T")

BACKLOG = 10_000
"""Events that a stuck listener may leave lying before the oldest are lost."""

DEFECT_PAUSE_S = 0.1
"""After an exception that nothing expected: not to spin, and still to answer."""

Listener = Callable[[Event], None]


@define(eq=False)
class Loan:
    """Room on the card that is kept for a program that is not ours."""

    holder: str
    mode: ExecutionMode
    """To ask for again: what was last asked for before the card was lent, or meanwhile, which can only be IDLE."""


_making_room: ContextVar[frozenset[Loan]] = ContextVar("making_room", default=frozenset())
"""Whose blocks of `making_room` the code is in; some may be over: a task that was begun in one, or ended another's."""


@contextlib.contextmanager
def making_room(loan: Loan) -> Iterator[None]:
    """Requests from inside the block make room for a borrower, and say nothing of what should come back."""
    _making_room.set(_making_room.get() | {loan})
    try:
        yield
    finally:
        _making_room.set(_making_room.get() - {loan})


class Driver:
    """Everything that moves, without the public names."""

    def __init__(
        self,
        config: GPUResourceConfig,
        *,
        server: VLMServer,
        clip: CLIPHost,
        probe: VRAMProbe,
        clock: Clock,
        threaded: bool,
        card_lock: CardLock | None = None,
    ) -> None:
        """`card_lock` None: nobody else can be on this card (a simulated one)."""
        self.config, self.server, self.clip, self.probe, self.clock = config, server, clip, probe, clock
        self.threaded = threaded
        self.card_lock = card_lock
        self.pid = os.getpid()
        self.mailbox = Mailbox()
        self._wake = threading.Condition()
        self._pokes = 0
        """Counts the wake-ups, so that none is lost between looking for work and waiting for it."""
        self.leases = LeaseBook(clock.monotonic, self.notify)
        self._status = GPUResourceStatus()
        self._listeners: tuple[tuple[Listener, frozenset[str]], ...] = ()
        self._listener_errors = 0
        self._events: queue.Queue[Event | None] = queue.Queue(maxsize=BACKLOG)
        self._reports: list[errors.GPUFSMError] = []
        self._post_lock = threading.RLock()  # a signal handler may post while its thread does
        self._closing: Ticket | None = None
        self._loans: tuple[Loan, ...] = ()
        self._owed: ExecutionMode | None = None
        """What borrowers have to ask for again; None where somebody has asked for a mode since the last of them."""
        self._newest_request: Ticket | None = None
        self._new_config: GPUResourceConfig | None = None
        self.closed = False
        self._drive_lock = threading.Lock()
        self._driving: int | None = None
        self._soonest: float | None = None
        """When the next timer was due, at the last look at what there is to do."""
        self._torn = False
        """The last drive did not come to its end: a KeyboardInterrupt, or a defect of ours."""
        self.engine = Engine(
            config,
            server=server,
            clip=clip,
            probe=probe,
            clock=clock,
            mailbox=self.mailbox,
            leases=self.leases,
            owner=self,
        )
        self.engine.publish()
        self._threads: tuple[threading.Thread, ...] = ()
        if threaded:
            self._threads = (
                threading.Thread(target=self._drive_forever, name="gpu_fsm-driver", daemon=True),
                threading.Thread(target=self._dispatch_forever, name="gpu_fsm-events", daemon=True),
            )
            for thread in self._threads:
                thread.start()

    # --- posting: from any thread, never blocks ---

    def post(
        self,
        kind: Kind,
        *,
        mode: ExecutionMode | None = None,
        place: ClipPlace | None = None,
        preempt: bool = False,
        lease_for: str | None = None,
    ) -> Ticket:
        """Put a request into the mailbox.  Raises `CardHeld` where another manager acts on the card, or it is lent."""
        self.check_usable()
        # The one place for it: without a ticket a manager in IDLE takes, moves and unloads nothing.
        if self.card_lock is not None:
            self.card_lock.permit()
        ticket = Ticket(
            kind=kind,
            mode=mode,
            place=place,
            preempt=preempt,
            lease_for=lease_for,
            holds=self.leases.held_by_caller(),
            posted_at=self.clock.monotonic(),
        )
        self._enqueue(ticket)
        return ticket

    @contextlib.contextmanager
    def lend(self, holder: str) -> Iterator[Loan]:
        """Let nobody take room on the card while the block runs; what is there stays."""
        self.check_usable()
        loan = Loan(holder, ExecutionMode.IDLE)
        try:  # already here, for a Ctrl-C before the block begins
            with self._post_lock:
                newest = self._newest_request
                on_its_way = None if newest is None or newest.future.done() else newest.mode
                if self._owed is None:
                    self._owed = self.engine.asked_mode if on_its_way is None else on_its_way
                loan.mode = self._owed
                self._loans = (*self._loans, loan)
            with making_room(loan):
                yield loan
        finally:
            with self._post_lock:
                self._loans = tuple(other for other in self._loans if other is not loan)

    def _respect_loans(self, ticket: Ticket) -> None:
        """Under the lock."""
        idle = ticket.mode is ExecutionMode.IDLE
        takes_room = ticket.wants_vlm or ticket.place == "gpu" or (ticket.kind == "request" and not idle)
        if self._loans and takes_room:
            names = ", ".join(loan.holder for loan in self._loans)
            raise errors.CardHeld(
                detail=f"the card is lent to {names}", remedy="Ask again when it has been given back.", name=names
            )
        makes_room = not _making_room.get().isdisjoint(self._loans)
        if ticket.mode is not None and not makes_room:  # only a request has a mode
            self._newest_request = ticket
            self._owed = ticket.mode if self._loans else None
            for loan in self._loans:
                loan.mode = ticket.mode

    def _enqueue(self, ticket: Ticket) -> None:
        with self._post_lock:  # between looking at the loans and posting no new one may come
            self._respect_loans(ticket)
            displaced_by_it = self.mailbox.post(ticket)
        for displaced in displaced_by_it:  # under no lock: it runs their callbacks
            displaced.refuse(errors.displaced_by("close" if self.mailbox.closed else ticket.kind))
        if ticket.preempt:
            self.engine.interrupt(ticket)
        self.notify()

    def post_close(self) -> Future[Outcome]:
        """Ask for the end, once; everybody who asks gets the same future."""
        with self._post_lock:
            first = self._closing is None
            if self._closing is None:
                now = self.clock.monotonic()
                self._closing = Ticket(kind="close", preempt=True, holds=self.leases.held_by_caller(), posted_at=now)
            ticket = self._closing
        if first:
            self._enqueue(ticket)  # under no lock of ours: it runs the callbacks of those it displaces
        return ticket.future

    def ask_clip(self, holder: str) -> Future[int]:
        """A CLIP lease, as soon as the gate is open."""
        self.check_usable()
        if self.clip.place == "none":
            raise errors.ClipUnavailable(
                detail=self.clip.gpu_unusable_reason or "no CLIP is managed", remedy="Set clip_model."
            )
        return self.leases.ask_clip(holder)

    def abandon(self, future: Future[T], lease_of: Callable[[T], int | None]) -> None:
        """Nobody waits for this lease any more: if it comes all the same, it goes back."""

        def give_back(late: Future[T]) -> None:
            if late.exception() is None:
                self.leases.release(lease_of(late.result()) or 0)

        if not future.cancel():
            future.add_done_callback(give_back)

    def report(self, error: errors.GPUFSMError) -> None:
        """Somebody met an error while using a model: look at once, and take the loss of the GPU at its word."""
        if isinstance(error, errors.CudaPoisoned | errors.GpuLost):
            self._reports.append(error)
        self.engine.check_soon()
        self.notify()

    def notify(self) -> None:
        """Wake the driver."""
        with self._wake:
            self._pokes += 1
            self._wake.notify_all()

    def check_usable(self) -> None:
        """Raise where this manager cannot serve any more."""
        if os.getpid() != self.pid:
            raise errors.ForkedProcess(
                detail="this manager belongs to the parent process",
                remedy="Make a new one after the fork, or use GPUResourceManager.shared() in the child.",
            )
        if self.closed or self._closing is not None:
            raise errors.ManagerClosed(detail="the manager is closed", remedy="Make a new one.")

    @property
    def newest_config(self) -> GPUResourceConfig:
        """The settings that hold or are about to."""
        return self._new_config or self.config

    def reconfigure(self, given: GPUResourceConfig | Mapping[str, Any]) -> dict[str, Any]:
        """Go by other settings from the next event on; a step under way ends with those it began with.

        Returns what differs.  Raises `ConfigError` and changes nothing where a setting cannot change under way.
        """
        self.check_usable()
        with self._post_lock:
            new = given if isinstance(given, GPUResourceConfig) else _evolved(self.newest_config, given)
            differing = changes(self.newest_config, new)
            self._new_config = new
        self.notify()
        return differing

    # --- waiting ---

    def wait(self, future: Future[T], timeout_s: float | None) -> T:
        """Wait for a future; an inline driver drives meanwhile.  The timeout ends the waiting, not the work."""
        if future.done():
            return future.result()
        me = threading.get_ident()
        if me == self._driving or (self._threads and me == self._threads[0].ident):
            raise errors.WouldDeadlock(
                detail="a blocking call from the thread that drives the machine",
                remedy="Use the submit_ methods there, or call from another thread.",
            )
        if not self.threaded:
            self._drive_until(future.done, timeout_s)
        try:
            return future.result(timeout_s if self.threaded else 0)
        except TimeoutError as error:
            if future.done():
                return future.result()  # it came in the same moment; or the error is the answer
            raise errors.OperationTimeout(
                detail=f"no answer within {timeout_s or 0:g} s; the operation goes on",
                remedy="Wait longer, or look at get_status().",
                timeout_s=timeout_s or 0.0,
            ) from error

    def drive_for(self, seconds: float) -> None:
        """Inline only: let `seconds` of the clock pass, serving whatever falls due."""
        self._drive_until(lambda: False, seconds)

    def _drive_until(self, done: Callable[[], bool], timeout_s: float | None) -> None:
        if self._driving == threading.get_ident():
            raise errors.WouldDeadlock(detail="this thread is driving the machine already")
        deadline = None if timeout_s is None else self.clock.monotonic() + timeout_s
        while not done():
            with self._drive():
                if done():
                    return
                if self._next():
                    continue
                due = None if self.closed else self._soonest
            now = self.clock.monotonic()
            if deadline is not None and now >= deadline:
                return
            ends = [moment for moment in (due, deadline) if moment is not None]
            if not ends:
                return  # closed: nothing will ever happen again
            self.clock.sleep(max(0.0, min(ends) - now))

    @contextlib.contextmanager
    def _drive(self) -> Iterator[None]:
        with self._drive_lock:
            try:
                self._driving = threading.get_ident()
                if self._torn:  # the last drive was cut off by a KeyboardInterrupt
                    if self.engine.torn:
                        self.engine.resume()
                        self._after()
                    self._refuse(self.mailbox.put_back(self.mailbox.lost(self.engine.waiting)))
                self._torn = True
                yield
                self._torn = False
            finally:
                self._driving = None
        if not self.threaded:
            self._dispatch_pending()

    # --- driving ---

    def _next(self) -> bool:
        """Do the next thing there is to do: reports, waiting, mailbox, timers.  False if none is due."""
        engine = self.engine
        if self.closed:
            return False
        new = self._new_config
        if new is not None:
            self.config = new
            engine.reconfigure(new)  # once more where a Ctrl-C cuts it off
            with self._post_lock:
                if self._new_config is new:
                    self._new_config = None
            return True
        if self._reports:
            engine.fault(self._reports.pop(0))
            return True
        if engine.waiting and self.mailbox.head_preempts(engine.waiting):
            self._refuse(engine.waiting)
            engine.drop_waiting()
        if engine.waiting_is_due():
            engine.deliver(engine.waiting)
            return self._after()
        now = self.clock.monotonic()
        group = self.mailbox.take_of_a_holder(self.leases.version, now) if engine.waiting else self.mailbox.take()
        if group:
            engine.deliver(group)
            return self._after()
        timers = engine.timers()
        due = [(at, name) for name, at in timers.items() if at <= now and name != "drain"]
        if due:
            # Woken late: a VLM whose idle time is over is not fetched back by the check that misses it.
            engine.fire_timer("idle" if "idle" in {name for _, name in due} else min(due)[1])
            self._mind_the_card()
            return self._after()
        self._soonest = min(timers.values(), default=None)
        return False

    def _mind_the_card(self) -> None:
        """After a look in a standing mode: whose card it is."""
        if self.card_lock is not None:
            self.card_lock.watch(self._status.vram.device_uuid)

    def _after(self) -> bool:
        """Close for good once the close ticket has been answered."""
        if self._closing is not None and self._closing.future.done() and not self.closed:
            self.closed = True
            self.leases.close(lambda: errors.ManagerClosed(detail="the manager is closed"))
        return True

    def _refuse(self, group: Group) -> None:
        error = errors.displaced_by("close" if self.mailbox.closed else "request")
        for ticket in group:
            ticket.refuse(error)

    def _due(self) -> float | None:
        if self.closed:
            return None
        return min(self.engine.timers().values(), default=None)

    def _has_work(self) -> bool:
        if self._torn or self._new_config is not None or self._reports or self.engine.waiting_is_due():
            return True
        if len(self.mailbox):
            now = self.clock.monotonic()
            passing = self.mailbox.head_preempts(self.engine.waiting) or self.mailbox.has_a_holder(
                self.leases.version, now
            )
            if passing or not self.engine.waiting:
                return True
        due = self._due()
        return due is not None and due <= self.clock.monotonic()

    def _drive_forever(self) -> None:
        while not self.closed:
            # Looking for work takes other locks, and `notify` may come out of the garbage collector, under any of them:
            # so nothing else is taken while `_wake` is held.
            pokes = self._pokes
            if not self._has_work():
                due = self._due()
                with self._wake:
                    if self._pokes == pokes:
                        self.clock.wait(self._wake, None if due is None else max(0.0, due - self.clock.monotonic()))
                continue
            try:
                with self._drive():
                    self._next()
            except BaseException:
                # A defect of ours, or a `SystemExit` in somebody's callback, must not end the driving: whoever waits
                # would wait for ever.
                log.exception("gpu_fsm: the driver met a defect; please report it")
                self.clock.sleep(DEFECT_PAUSE_S)
        self.tell(None)

    # --- telling ---

    def publish(self, status: GPUResourceStatus) -> None:
        """Replace the status as a whole."""
        self._status = status

    def status(self) -> GPUResourceStatus:
        """The last published status with what changes without the driver.  Takes no lock, does no I/O."""
        return attrs.evolve(
            self._status,
            leases=self.leases.snapshot,
            queued=len(self.mailbox) + len(self.engine.waiting),
            now_at=self.clock.monotonic(),
            closed=self.closed,
            listener_errors=self._listener_errors,
            card_held_by=self.card_lock.held_by if self.card_lock is not None else "",
        )

    def tell(self, event: Event | None) -> None:
        """Queue an event for the listeners; None ends them.  Where one of them is stuck, the oldest event is lost."""
        while True:
            try:
                return self._events.put_nowait(event)
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._events.get_nowait()

    def subscribe(self, listener: Listener, kinds: frozenset[str]) -> Callable[[], None]:
        """Call `listener` for events of `kinds` (all if empty), from the dispatch thread."""
        entry = (listener, kinds)
        with self._post_lock:
            self._listeners = (*self._listeners, entry)

        def unsubscribe() -> None:
            with self._post_lock:
                self._listeners = tuple(other for other in self._listeners if other is not entry)

        return unsubscribe

    def _dispatch_forever(self) -> None:
        while (event := self._events.get()) is not None:
            self._dispatch(event)

    def _dispatch_pending(self) -> None:
        while not self._events.empty():
            with contextlib.suppress(queue.Empty):  # somebody else's drive was faster
                event = self._events.get_nowait()
                if event is not None:
                    self._dispatch(event)

    def _dispatch(self, event: Event) -> None:
        for listener, kinds in self._listeners:
            if kinds and event.kind not in kinds:
                continue
            try:
                listener(event)
            except Exception:
                self._listener_errors += 1
                log.exception("gpu_fsm: a listener of %s raised", event.kind)

    def join(self, timeout_s: float) -> None:
        """Wait for the threads to end after a close."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s)


def _evolved(config: GPUResourceConfig, given: Mapping[str, Any]) -> GPUResourceConfig:
    for name in given:
        if name not in attrs.fields_dict(GPUResourceConfig):
            raise errors.ConfigError(name=errors.one_line(name, 80), detail="there is no such setting")
    return attrs.evolve(config, **given)
