"""The machine's memory and hands: what the rows' actions do, and what each step does to the world.

Everything here runs on the one driving thread, one event at a time.  `observe` looks (and never raises), `take` keeps
the books of a row, `announce` publishes, `work` acts.  The table decides; the engine only carries out.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import attrs
from attrs import frozen

from gpu_fsm import errors, guards
from gpu_fsm.errors import GPUFSMError, ModelNotFound, one_line
from gpu_fsm.events import (
    Degraded,
    Event,
    IdleUnload,
    ModeChanged,
    Recovered,
    StateChanged,
    VLMLost,
)
from gpu_fsm.guards import Aim, Plan, Snapshot, hold_of, target
from gpu_fsm.leases import LeaseBook
from gpu_fsm.machine import ModeMachine
from gpu_fsm.observer import Observer
from gpu_fsm.ports import CLIPHost, Clock, VLMServer, VRAMProbe
from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.states import STABLE, STANDING, STEPS, Row
from gpu_fsm.status import (
    Answer,
    ExecutionMode,
    GPUResourceStatus,
    Hold,
    ModelState,
    Reason,
    State,
    TimerInfo,
)
from gpu_fsm.steps import Steps
from gpu_fsm.tickets import Group, Mailbox, Outcome, Ticket, newest

log = logging.getLogger("gpu_fsm")

_VLM_STATES = {Answer.YES: ModelState.LOADED, Answer.NO: ModelState.UNLOADED, Answer.UNKNOWN: ModelState.UNKNOWN}


@frozen(kw_only=True)
class JournalRecord:
    """One row taken: the journal is the machine's whole life, in order and without gaps."""

    n: int
    at: float
    trigger: str
    source: State
    dest: State
    row: str
    verdicts: Mapping[str, bool]
    plan: Plan
    tickets: tuple[int, ...] = ()


class Manager(Protocol):
    """What the engine needs from its owner."""

    def tell(self, event: Event) -> None:
        """Hand an event to the listeners, elsewhere and later."""

    def publish(self, status: GPUResourceStatus) -> None:
        """Replace the status."""


class Engine:
    """The private model of one manager.  See the module's first lines for the order of its life."""

    def __init__(
        self,
        config: GPUResourceConfig,
        *,
        server: VLMServer,
        clip: CLIPHost,
        probe: VRAMProbe,
        clock: Clock,
        mailbox: Mailbox,
        leases: LeaseBook,
        owner: Manager,
    ) -> None:
        self.config = config
        self._server, self._clip, self._probe, self._clock = server, clip, probe, clock
        self._mailbox, self._leases, self._owner = mailbox, leases, owner
        self.machine = ModeMachine(self)
        self._observer = Observer(config, server=server, clip=clip, probe=probe, clock=clock, tell=owner.tell)
        self._steps = Steps(
            config,
            server=server,
            clip=clip,
            probe=probe,
            clock=clock,
            leases=leases,
            observer=self._observer,
            superseded=self._superseded,
            tell=owner.tell,
        )
        self._simulated = tuple(
            name for name, port in (("ollama", server), ("clip", clip), ("card", probe)) if port.simulated
        )
        self.journal: deque[JournalRecord] = deque(maxlen=config.journal_size)
        self._records = 0

        now = clock.monotonic()
        # What stands and what is pursued
        self.mode = ExecutionMode.IDLE
        self.asked_mode = ExecutionMode.IDLE
        self._standing = Aim(mode=ExecutionMode.IDLE)
        self._aim = self._standing
        self._previous: Aim | None = None
        self._seq = 0
        self._since = self._stood_since = now
        # Who is served
        self._serving: Group = ()
        self.waiting: Group = ()
        self._waiting_models: frozenset[str] = frozenset()
        self._lease_version = self._waits_at = leases.version
        """The lease book's, at the last look for a ticket, and at that for the one that waits."""
        # What is known
        self._snapshot = Snapshot()
        # What went wrong
        self._failure: GPUFSMError | None = None
        self._reason: Reason | None = None
        self._failed_in = State.IDLE
        self._leftovers: tuple[str, ...] = ()
        self._degraded_at = now
        self._attempt = 0
        self._looked_recoverable = False
        self._reassertions: deque[float] = deque()
        # Timers
        self._check_at = now  # the first look is at once: what is resident may be older than we are
        self._recover_at = now
        self._idle_not_before = now
        # The running step
        self._idle_since: float | None = None

    # --- Events in ---

    @property
    def state(self) -> State:
        """The machine's state."""
        return self.machine.state

    def deliver(self, group: Group) -> None:
        """Serve a group of equal tickets, and everything that follows from it, to the next stable state."""
        self._serving = group  # at every moment in one place or the other, whenever a Ctrl-C comes
        if group is self.waiting:
            self.waiting = ()
        self._seq = max(self._seq, newest(group))
        self._run(group[0].kind, ticket=group[0])
        self._finish_event()

    def fire(self, trigger: str, **facts: Any) -> None:
        """Deliver an event that nobody waits for: a timer, or a fault that somebody saw."""
        self._run(trigger, **facts)
        self._finish_event()

    def _run(self, trigger: str, **facts: Any) -> None:
        try:
            row = self.machine.fire(trigger, **facts)
            if row is None:
                self._failure = errors.InternalError(detail=f"no row for {trigger} in {self.state.name}")
        except Exception as error:
            log.exception("gpu_fsm: %s broke in %s", trigger, self.state.name)
            self._failure = errors.InternalError(detail=one_line(repr(error)), remedy="Please report it.")
            self.repair()

    @property
    def torn(self) -> bool:
        """Whether the last drive was cut off in the middle of an event."""
        return self.state in STEPS or bool(self._serving)

    def resume(self) -> None:
        """After a drive that was cut off: a close that did nothing yet is delivered again, the rest repaired."""
        if self.state in STABLE and self._serving and self._serving[0].kind == "close":
            self.deliver(self._serving)
        else:
            self.repair()

    def repair(self) -> None:
        """Bring a machine that was torn out of an event back to a stable state, and refuse whom it served.

        Needed after a `KeyboardInterrupt` in an inline drive, and after a defect of ours: `transitions` has lost its
        queue then, and the step's outcome with it.
        """
        self._failure = self._failure or errors.InternalError(
            detail="the drive was cut off in the middle", remedy="Ask again."
        )
        if self.state in STEPS:
            if self.state is State.SHEDDING:
                self.work(State.SHEDDING)
            else:
                self.machine.fire("fault")
        self._finish_event()

    def _finish_event(self) -> None:
        served, self._serving = self._serving, ()
        for ticket in served:
            if ticket not in self.waiting and not ticket.future.done():
                self._leases.release(ticket.lease or 0)
                ticket.refuse(self._failure or errors.InternalError(detail=f"{ticket.asked} ended without an answer"))
        self._failure = None
        self._leases.open(self._waiting_models if self.waiting else ())
        self.publish()

    def fault(self, failure: GPUFSMError) -> None:
        """Deliver an error that a user of a model met, and that no look can see."""
        self._failure = failure
        self.fire("fault")

    def waiting_is_due(self) -> bool:
        """Whether the waiting ticket deserves another look: a lease ended, or its time is over."""
        if not self.waiting:
            return False
        return self._leases.version != self._waits_at or self._clock.monotonic() >= self._drain_due()

    def drop_waiting(self) -> Group:
        """Take the waiting tickets away (superseded, or the manager closes)."""
        waiting, self.waiting = self.waiting, ()
        return waiting

    def interrupt(self, ticket: Ticket) -> None:
        """From the posting thread: a preempting ticket arrived.  Cuts off a load that it has no use for."""
        running = self._steps.running_load  # fetched first: a load that begins later is not the one that is meant
        if running is not None and ticket.seq > self._seq and not ticket.wants_vlm:
            running.set()

    # --- Looking ---

    def observe(self, trigger: str, facts: Mapping[str, Any]) -> Snapshot:
        """Build the one snapshot of an event.  `fault` and `shed` reuse the last look."""
        ticket: Ticket | None = facts.get("ticket")
        state = self.state
        if trigger not in ("fault", "shed"):
            wants_vlm = trigger == "vlm_wanted" or (ticket is not None and ticket.wants_vlm)
            quiet = trigger == "check" and state in STABLE
            self._observer.look(catalog=wants_vlm or state is State.DEGRADED, quiet=quiet, patient=ticket is not None)
        snapshot = self._snapshot_of(trigger, ticket)
        if isinstance(guards.why_not(snapshot), errors.InsufficientVRAM):
            snapshot = attrs.evolve(snapshot, seen=self._observer.look_at_holders())
        if state in STABLE and trigger not in ("fault", "shed"):
            # Counting leases and closing the gate is one step; `_finish_event` opens it again.  What ends after this
            # moment was not counted here, so it has to wake who waits.
            if ticket is not None:
                self._lease_version = self._leases.version
            closed = self._waiting_models if self.waiting else frozenset()
            holders = self._leases.drain(snapshot.models_to_move | closed)
            mine = ticket.holds if ticket else frozenset()
            if holders.vlm or holders.clip:
                snapshot = attrs.evolve(
                    snapshot,
                    vlm_leased=bool(holders.vlm),
                    clip_leased=bool(holders.clip),
                    vlm_held_by_caller=bool(holders.vlm & mine),
                    clip_held_by_caller=bool(holders.clip & mine),
                )
            if trigger == "check" and guards.hold_lapsed(snapshot):
                without = Aim(mode=self.mode, plan=target(self.mode, None, snapshot))
                snapshot = attrs.evolve(snapshot, aim=without)
        self._snapshot = snapshot
        return snapshot

    def _snapshot_of(self, trigger: str, ticket: Ticket | None) -> Snapshot:
        config, now, state = self.config, self._clock.monotonic(), self.state
        idle_due = self._leases.last_vlm_use + config.idle_timeout_s
        while self._reassertions and self._reassertions[0] < now - config.reassert_window_s:
            self._reassertions.popleft()
        stays = state in STANDING and trigger in ("check", "renew")
        snapshot = Snapshot(
            trigger=trigger,
            state=state,
            mode=self.mode,
            asked=ticket.mode if ticket else None,
            hold=self._standing.hold,
            # A standing mode's own timers pursue what stands; what others pursue is worked out from the facts below.
            aim=self._standing if stays else self._aim,
            seen=self._observer.seen,
            # Recovery by itself heeds the last failure; a person who asks again gets a try.
            vlm_needed_mib=self._observer.vlm_needed_mib(after_failure=ticket is None and state is State.DEGRADED),
            reserve_mib=config.reserve_mib,
            returning_mib=self._steps.returning_mib(self._observer.seen.vram),
            floor_mib=config.floor_mib,
            accept_partial=config.on_partial_offload == "accept",
            on_our_card=self._server.on_our_card,
            clip_managed=config.clip_model is not None,
            refuse_on_shortage=config.on_shortage == "refuse",
            drain_over=ticket is not None and ticket.waits_until <= now,
            vlm_ours=self._observer.vlm_ours,
            used_since=idle_due > now,
            vlm_ticket_queued=self._mailbox.wants_vlm() or any(waiting.wants_vlm for waiting in self.waiting),
            superseded=self._superseded(),
            outdated=self._mailbox.closed or any(waiting.kind == "request" for waiting in self.waiting),
            came_from_plan=self._previous is not None,
            unknown_too_long=self._observer.unknown_for(now) >= config.unknown_max_s,
            pressed_too_long=self._observer.pressed_for(now) >= config.pressure_s,
            reassertions_left=len(self._reassertions) < config.reassert_limit,
            model_missing=self._model_missing(),
            leftovers=bool(self._leftovers) and not self._hands_off(),
        )
        if state in STABLE and not stays:
            snapshot = attrs.evolve(snapshot, aim=self._aim_of(trigger, ticket, snapshot))
        return snapshot

    def _superseded(self) -> bool:
        return self._mailbox.newest_preempt > self._seq and len(self._mailbox) > 0

    def _model_missing(self) -> bool:
        """The model was not found, and nobody has seen it since: a look is cheap, another load is not."""
        missing = self._reason is not None and self._reason.code == ModelNotFound.code
        return missing and self._observer.seen.catalog.present is not Answer.YES

    def _aim_of(self, trigger: str, ticket: Ticket | None, s: Snapshot) -> Aim:
        """What an event in a stable state would pursue.  DEGRADED stands for the mode that was asked."""
        degraded = self.state is State.DEGRADED
        mode = self.asked_mode if degraded else self.mode
        match trigger:
            case "request":
                assert ticket is not None
                assert ticket.mode is not None
                return Aim(mode=ticket.mode, plan=target(ticket.mode, None, s))
            case "vlm_wanted":
                hold = hold_of(mode, Hold.WANTED)
                promised = hold is not None and self._standing.hold is hold and self._standing.plan.vlm is True
                if not degraded and promised and guards.placed(attrs.evolve(s, aim=self._standing)):
                    return self._standing
                return Aim(mode=mode, hold=hold, plan=target(mode, Hold.WANTED, s), fallback=self._fallback(s))
            case "vlm_unwanted" if degraded:
                return Aim(mode=mode, plan=Plan(vlm=False))
            case "idle_timeout":
                parked = Aim(mode=mode, hold=hold_of(mode, Hold.PARKED), plan=target(mode, Hold.PARKED, s), idle=True)
                return attrs.evolve(parked, fallback=self._still_in_use(parked))
            case "vlm_unwanted":
                return Aim(mode=mode, hold=hold_of(mode, Hold.PARKED), plan=target(mode, Hold.PARKED, s))
            case "migrate_clip":
                assert ticket is not None
                # A VLM that has gone, or that nobody can see, is not fetched back because CLIP moves.
                kept = self._standing.hold if self._standing.hold is Hold.WANTED and s.resident else None
                vlm = self._standing.plan.vlm if kept else None
                return Aim(mode=self.mode, hold=kept, plan=Plan(clip=ticket.place, vlm=vlm))
            case "close":
                stuck = s.drain_over and bool(self._leases.holders().clip)
                release = self._observer.vlm_ours and self.config.on_close == "release"
                clip: Literal["cpu"] | None = None if stuck or not s.clip_managed else "cpu"
                return Aim(mode=ExecutionMode.IDLE, plan=Plan(clip=clip, vlm=False if release else None))
            case _ if degraded:
                return Aim(mode=mode, plan=target(mode, None, s))
            case _:
                return self._standing

    def _still_in_use(self, parked: Aim) -> Aim:
        """Where an idle unload returns to that Ollama does not carry out: somebody else's request may run in the VLM.

        The mode no longer promises it then, so that an unload which comes late is no loss to be put right.
        """
        stays = parked if parked.mode is ExecutionMode.RECORDING else self._standing
        return attrs.evolve(stays, plan=attrs.evolve(stays.plan, vlm=None), idle=False)

    def _fallback(self, s: Snapshot) -> Aim | None:
        """Where an on-demand attempt returns to when it fails; None where the mode itself hangs on it."""
        if self.state is State.DEGRADED:
            return None
        if self.mode is ExecutionMode.RECORDING:
            if self._standing.hold is not Hold.PARKED:
                return None
            return Aim(mode=self.mode, hold=Hold.PARKED, plan=target(self.mode, Hold.PARKED, s))
        return Aim(mode=self.mode, plan=target(self.mode, None, s))

    # --- The rows' actions: bookkeeping before the state changes ---

    def take(self, row: Row, snapshot: Snapshot, verdicts: Mapping[str, bool]) -> None:
        """Write the journal and run the row's action."""
        self._records += 1
        record = JournalRecord(
            n=self._records,
            at=self._clock.monotonic(),
            trigger=row.trigger,
            source=self.state,
            dest=row.dest or self.state,
            row=row.name,
            verdicts=verdicts,
            plan=snapshot.aim.plan,
            tickets=tuple(ticket.seq for ticket in self._serving),
        )
        self.journal.append(record)
        if row.dest is State.SHEDDING:
            self._failed_in = self.state
        if row.dest is not None:
            log.info("gpu_fsm: %s -> %s (%s)", self.state.name, row.dest.name, row.name)
        action: Callable[[Snapshot], None] = getattr(self, f"act_{row.action}")
        action(snapshot)

    # --- tickets ---

    def act_acknowledge(self, s: Snapshot) -> None:
        """It stands already: take over the hold and the number."""
        if s.trigger == "request":
            self.asked_mode = s.aim.mode
        self._stand(s.aim)
        self.publish()  # whoever is answered may look at once
        self._resolve_granted()

    def act_acknowledge_in_place(self, s: Snapshot) -> None:
        """It is so; nothing stands differently for it."""
        self._resolve_granted()

    def act_wait(self, s: Snapshot) -> None:
        """Wait in the stable state, with the gate closed, until the leases have ended."""
        now = self._clock.monotonic()
        self._waits_at = self._lease_version
        for ticket in self._serving:
            ticket.waits_at = self._waits_at
            ticket.waits_until = min(ticket.waits_until, now + self.config.drain_timeout_s)
        if self.waiting:
            # Somebody it waits for has to wait, too: that one first.
            for ticket in self._mailbox.put_back(self.waiting):
                ticket.refuse(errors.displaced_by("close" if self._mailbox.closed else "request"))
        self.waiting = self._serving
        self._waiting_models = s.models_to_move

    def act_refuse_lease_held(self, s: Snapshot) -> None:
        """The caller holds what would have to move."""
        self._refuse(self._lease_held(s))

    def _lease_held(self, s: Snapshot) -> errors.LeaseHeld:
        return errors.LeaseHeld(
            detail="you hold a lease on what this request would move",
            remedy="End the `with` block first, then ask.",
            holders=self._leases.names(s.models_to_move),
        )

    def act_refuse_lease_timeout(self, s: Snapshot) -> None:
        """Leases stood in the way for `drain_timeout_s`."""
        holders = self._leases.names(s.models_to_move)
        self._refuse(
            errors.LeaseTimeout(
                detail=f"still in use after {self.config.drain_timeout_s:g} s: {', '.join(holders)}",
                remedy="Shorten the work inside the lease, or raise drain_timeout_s.",
                holders=holders,
                waited_s=self.config.drain_timeout_s,
            )
        )

    def act_refuse(self, s: Snapshot) -> None:
        """No, with the figures; nothing changes."""
        self._refuse(self._why(s))
        self._doubt_size(s)

    def act_refuse_degraded(self, s: Snapshot) -> None:
        """No, for the reason that made us DEGRADED; look sooner whether it is gone."""
        self._recover_at = min(self._recover_at, self._clock.monotonic())
        reason = self._reason or Reason(code="degraded")
        self._refuse(
            errors.DegradedError(
                detail=f"degraded: {reason.detail or reason.code}", remedy=reason.remedy, reason_code=reason.code
            )
        )

    def act_refuse_conflict(self, s: Snapshot) -> None:
        """An explicit CLIP move against the mode's promise."""
        place = s.aim.plan.clip
        ask = "AUTOPILOT" if place == "gpu" else "RECORDING or IDLE"
        self._refuse(
            errors.ModeConflict(
                detail=f"{self.mode.name} does not allow CLIP on the {place}",
                remedy=f"Ask for {ask} with set_execution_mode.",
                mode=self.mode.name,
                ask_for=ask,
            )
        )

    # --- beginning, and turning back ---

    def act_begin(self, s: Snapshot) -> None:
        """Pursue the snapshot's aim; the plan is frozen from here on."""
        if s.trigger == "request" or s.trigger == "close":
            self.asked_mode = s.aim.mode
        if s.trigger == "idle_timeout":
            self._idle_since = self._leases.last_vlm_use
        if s.trigger == "check" and s.absent and self._standing.plan.vlm is True:
            self._tell_lost(s)
        self._pursue(s.aim, previous=self._standing if self.state in STANDING else None)

    def act_reassert(self, s: Snapshot) -> None:
        """The world has left the plan: put it right, and count how often."""
        self._reassertions.append(self._clock.monotonic())
        if s.aim.plan.vlm is True and s.absent:
            self._tell_lost(s)
        fallback = self._fallback(s) if s.aim.hold is Hold.WANTED else None
        self._pursue(attrs.evolve(s.aim, fallback=fallback), previous=self._standing)

    def act_begin_recovery(self, s: Snapshot) -> None:
        """Try the asked mode again."""
        self._pursue(s.aim, previous=None)

    def act_begin_refused(self, s: Snapshot) -> None:
        """The request cannot be given: be safe and remember it."""
        if s.asked is not None:
            self.asked_mode = s.asked
        self._aim = s.aim
        self._failure = self._why(s)
        self._doubt_size(s)

    def act_adopt(self, s: Snapshot) -> None:
        """A preempting request takes over in the middle of a move."""
        successors = self._mailbox.take()
        head = successors[0]
        displaced = errors.displaced_by(head.kind)
        self._refuse(displaced)
        for ticket in self.waiting:
            ticket.refuse(displaced)
        self.drop_waiting()
        self._serving = successors
        for_stable = attrs.evolve(s, trigger=head.kind, asked=head.mode)
        aim = self._aim_of(head.kind, head, for_stable)
        holders = self._leases.holders()
        of_caller = attrs.evolve(
            for_stable,
            aim=aim,
            vlm_held_by_caller=bool(holders.vlm & head.holds),
            clip_held_by_caller=bool(holders.clip & head.holds),
        )
        if head.kind != "close" and guards.blocked_by_caller(of_caller):
            for ticket in successors:  # told once IDLE stands: whoever is answered may look at once
                ticket.refusal = self._lease_held(of_caller)
            self._seq = max(self._seq, newest(successors))
            self._pursue(Aim(mode=ExecutionMode.IDLE), previous=None, keep_released=True)
            self.asked_mode = ExecutionMode.IDLE
            return
        if head.mode is not None:
            self.asked_mode = head.mode
        if aim.plan.vlm is True:  # what it takes over may be an idle unload
            self._idle_since = None
            self._leases.touch()
        self._pursue(aim, previous=None, keep_released=True)
        self._seq = newest(self._serving)

    def act_proceed(self, s: Snapshot) -> None:
        """Go on to the next step of the same plan."""

    def act_fall_back(self, s: Snapshot) -> None:
        """The on-demand attempt failed: an error for the caller, then back to what the mode is without it."""
        assert self._aim.fallback is not None
        failure = self._failure or (errors_for_unplaced(s) if guards.known(s) else guards.unknown(s))
        if self._aim.idle:
            log.warning("gpu_fsm: the idle VLM is still in: %s", failure)
            self._idle_since = None
            self._idle_not_before = self._clock.monotonic() + self.config.idle_timeout_s
        self._refuse(failure)
        self._failure = None
        self._pursue(self._aim.fallback, previous=None)

    def act_go_back(self, s: Snapshot) -> None:
        """A lease won the race before anything happened: stand as before, and let the ticket wait."""
        assert self._previous is not None
        self.act_wait(s)
        self._serving = ()
        self._pursue(self._previous, previous=None)

    def _pursue(self, aim: Aim, *, previous: Aim | None, keep_released: bool = False) -> None:
        self._aim = aim
        self._previous = previous
        self._steps.released = self._steps.released and keep_released
        self._steps.unproven = None
        self._failure = None

    # --- the way down ---

    def act_degrade_fault(self, s: Snapshot) -> None:
        """The step's own error is the reason."""
        self._failure = self._failure or errors.InternalError(detail="a fault without an error")

    def act_degrade_unknown(self, s: Snapshot) -> None:
        """No definite answer by the step's deadline."""
        self._failure = guards.unknown(s)

    def act_degrade_unreachable(self, s: Snapshot) -> None:
        """Ollama has been silent for too long."""
        self._failure = errors.OllamaUnavailable(
            detail=f"no definite answer for {self.config.unknown_max_s:g} s ({s.seen.residency.detail or 'silent'})",
            remedy=guards.START_OLLAMA,
            model=self._server.model,
        )

    def act_degrade_gpu_lost(self, s: Snapshot) -> None:
        """The card has gone under what was promised."""
        self._failure = errors.GpuLost(
            detail=s.seen.vram.detail or "the GPU has gone", remedy="Restart the agent once it is back."
        )

    def act_degrade_pressure(self, s: Snapshot) -> None:
        """The card has been full for too long."""
        holders = self._observer.look_at_holders().foreign_holders
        held = f"; held by {', '.join(holders)}" if holders else ""
        self._failure = errors.InsufficientVRAM(
            detail=f"less than {self.config.floor_mib:g} MiB free for {self.config.pressure_s:g} s{held}",
            remedy="Close a program that uses the GPU.",
            needed_mib=self.config.floor_mib,
            free_mib=s.seen.vram.free_mib,
            holders=holders,
        )

    def act_degrade_lost(self, s: Snapshot) -> None:
        """The placement cannot be put right, or not again."""
        if s.aim.plan.vlm is True and s.absent:
            self._tell_lost(s)
        if not s.reassertions_left:
            self._failure = errors.ExternalClient(
                detail=f"something undid the placement {self.config.reassert_limit} times",
                remedy="Find the other client of this model (ollama ps, the server's log) and stop it.",
                model=self._server.model,
            )
        else:
            self._failure = guards.why_not(s) or errors.PlacementLost(detail="the placement was undone from outside")

    def act_degrade_unplaced(self, s: Snapshot) -> None:
        """The step ended and the world is not as planned."""
        self._failure = errors_for_unplaced(s)

    def act_degrade_aborted(self, s: Snapshot) -> None:
        """A lease won the race when something had been given back already."""
        holders = self._leases.names(s.models_to_move)
        self._failure = errors.LeaseTimeout(detail=f"in use: {', '.join(holders)}", holders=holders)

    def act_shed_again(self, s: Snapshot) -> None:
        """Try once more to get rid of what is left; settling in DEGRADED again arms the next try."""

    # --- standing ---

    def act_settle(self, s: Snapshot) -> None:
        """The promise has been observed: from here on it stands."""
        self._stand(self._aim)

    def act_settle_degraded(self, s: Snapshot) -> None:
        """DEGRADED: keep the reason, arm recovery."""
        now = self._clock.monotonic()
        failure = self._failure
        if failure is not None:
            self._reason = Reason.of(failure, step=self._failed_in.value)
        if self.mode is not ExecutionMode.DEGRADED:
            self._degraded_at = now
            if now - self._stood_since >= self.config.stable_s:
                self._attempt = 0
        self._standing = Aim(mode=ExecutionMode.DEGRADED)
        self._recover_at = self._next_try()
        self._looked_recoverable = guards.recoverable(attrs.evolve(s, aim=self._asked_aim(s)))

    def _asked_aim(self, s: Snapshot) -> Aim:
        return Aim(mode=self.asked_mode, plan=target(self.asked_mode, None, s))

    def act_look_for_recovery(self, s: Snapshot) -> None:
        """A cause that has gone ends the wait; one that a look cannot see (failing loads) does not."""
        can = guards.recoverable(s)
        if can and not self._looked_recoverable:
            self._recover_at = min(self._recover_at, self._clock.monotonic())
        self._looked_recoverable = can

    def act_back_off(self, s: Snapshot) -> None:
        """Not yet: try again later, and less often; and say what stands in the way now, if that has changed."""
        self._looked_recoverable = guards.recoverable(s)
        obstacle = guards.unknown(s) if not guards.known(s) else guards.why_not(s)
        self._doubt_size(s)
        if obstacle is not None and self._reason is not None and obstacle.code != self._reason.code:
            self._reason = Reason.of(self._named(obstacle), step=self._failed_in.value)
            self._tell_degraded()
        self._recover_at = self._next_try()

    def act_rearm_idle(self, s: Snapshot) -> None:
        """Look again when the next check is due."""
        if not s.used_since:
            self._idle_not_before = self._clock.monotonic() + self.config.check_interval_s

    def act_renew_keep_alive(self, s: Snapshot) -> None:
        """Extend Ollama's own timer; a failure is for the next check to see."""
        try:
            self._server.renew(keep_alive_s=self._steps.keep_alive_s, timeout_s=self.config.observe_timeout_s)
        except GPUFSMError as error:
            log.warning("gpu_fsm: renewal failed: %s", error)
            self._steps.server_until = self._clock.monotonic() + self.config.check_interval_s + self._renew_margin
        else:
            self._steps.used_server()

    def act_note(self, s: Snapshot) -> None:
        """Seen; nothing to do."""

    def _stand(self, aim: Aim) -> None:
        if aim.mode is ExecutionMode.IDLE and aim.hold is None:
            aim = attrs.evolve(aim, plan=Plan())  # IDLE promises nothing
        if aim.plan.vlm is True and self._standing.plan.vlm is not True:
            self._leases.touch()  # being asked for is the first use; else a model found resident would be idle at once
        self._standing = attrs.evolve(aim, fallback=None, idle=False)

    def _doubt_size(self, s: Snapshot) -> None:
        if guards.known(s) and isinstance(guards.why_not(s), errors.InsufficientVRAM):
            self._observer.doubt_size()

    def _why(self, s: Snapshot) -> GPUFSMError:
        why = guards.why_not(s) if guards.known(s) else None
        return self._named(why or guards.unknown(s))

    def _named(self, error: GPUFSMError) -> GPUFSMError:
        if isinstance(error, errors.OllamaError) and not error.model:
            remedy = error.remedy.replace("NAME", self._server.model)
            return type(error)(**{**attrs.asdict(error, recurse=False), "model": self._server.model, "remedy": remedy})
        return error

    # --- Publishing ---

    def announce(self, old: State, new: State, row: Row) -> None:
        """The first thing a state does: be seen."""
        now = self._clock.monotonic()
        self._since = now
        if new in STABLE:
            self._arrive(old, new, now)
        self.publish()
        if old is not new:
            self._owner.tell(StateChanged(at=now, old=old, new=new, trigger=row.trigger))

    def _arrive(self, old: State, new: State, now: float) -> None:
        before, mode = self.mode, ExecutionMode(new.value)
        if mode is not before:
            self._stood_since = now
        self.mode = mode
        self._aim = self._standing
        self._previous = None
        self._check_at = now + self.config.check_interval_s
        self._idle_not_before = max(now, self._idle_not_before)
        if mode is not ExecutionMode.DEGRADED:
            self._reason, self._leftovers, self._failure = None, (), None
        if mode is not before:
            self._owner.tell(ModeChanged(at=now, old=before, new=mode, reason=self._reason))
            if mode is ExecutionMode.DEGRADED:
                self._tell_degraded()
            elif before is ExecutionMode.DEGRADED:
                self._owner.tell(Recovered(at=now, mode=mode, after_s=now - self._degraded_at))

    def _tell_degraded(self) -> None:
        reason = self._reason or Reason(code="internal_error", detail="degraded without a reason")
        now = self._clock.monotonic()
        self._owner.tell(Degraded(at=now, reason=reason, asked=self.asked_mode, leftovers=self._leftovers))

    def publish(self) -> None:
        """Replace the status by one that tells everything."""
        seen, residency, state = self._observer.seen, self._observer.seen.residency, self.state
        model = residency.ours
        size, source = self._observer.vlm_size()
        listed = residency.answer is Answer.YES and not seen.vlm_dead
        vlm_ready = self._standing.plan.vlm is True and listed and state in STANDING
        self._leases.vlm_ready(seen.at + 2 * self.config.check_interval_s if vlm_ready else float("-inf"))
        present = seen.vram.present
        self._owner.publish(
            GPUResourceStatus(
                execution_mode=self.mode,
                asked_mode=self.asked_mode,
                state=state,
                since_at=self._since,
                reason=self._reason,
                hold=self._standing.hold,
                vram=seen.vram,
                vlm_model=self._server.model,
                vlm_state=self._vlm_state(state),
                vlm_size_mib=size,
                vlm_size_vram_mib=model.size_vram_mib if model else None,
                vlm_size_source=source,
                vlm_ours=self._observer.vlm_ours,
                evidence=self._observer.evidence,
                proof=self._proof(),
                clip_context_mib=seen.clip_context_mib,
                clip_device=seen.clip_device if seen.at else self._clip.device,
                cpu_only=self._observer.looked and not present and not seen.vram.lost,
                cpu_only_reason="" if present or seen.vram.lost else seen.vram.detail or seen.gpu_unusable_reason,
                others=residency.others,
                leftovers=self._leftovers,
                timers=tuple(TimerInfo(name=name, due_at=due) for name, due in sorted(self.timers().items())),
                observed_at=seen.at if self._observer.looked else None,
                simulated=self._simulated,
            )
        )

    def _vlm_state(self, state: State) -> ModelState:
        answer = self._observer.seen.residency.answer
        if state is State.LOADING:
            return ModelState.LOADING
        if self._observer.seen.vlm_dead:
            return ModelState.UNKNOWN
        if state in (State.RELEASING, State.SHEDDING) and answer is Answer.YES and self._aim.plan.vlm is False:
            return ModelState.UNLOADING
        return _VLM_STATES[answer]

    def _proof(self) -> str:
        if not self._observer.looked:
            return "nothing has been looked at yet"
        if not self._server.on_our_card:
            return "Ollama runs on another machine or card: proof rests on /api/ps alone"
        if not self._observer.seen.vram.present:
            return "no GPU: proof rests on /api/ps alone"
        if self._observer.seen.vram.free_mib is None:
            return "the driver does not tell the free memory: proof rests on /api/ps and a fixed wait"
        if self._observer.seems_elsewhere:
            return "Ollama's last load took nothing of this card: if it has its own, set ollama_card to other"
        return "/api/ps and the driver's bytes"

    def _tell_lost(self, s: Snapshot) -> None:
        detail = s.seen.residency.detail or "Ollama no longer lists it"
        self._owner.tell(VLMLost(at=s.seen.at, model=self._server.model, detail=detail))

    def _resolve_granted(self) -> None:
        for ticket in self._serving:
            lease = None
            if ticket.lease_for is not None:
                lease = ticket.lease = self._leases.number()
                self._leases.grant_vlm(ticket.lease_for, lease)
            if ticket.kind == "vlm_wanted":
                self._observer.vlm_ours = True
                self._leases.touch()
            outcome = Outcome(asked=ticket.asked, state=self.state, lease=lease, leftovers=self._left_leased(ticket))
            if not ticket.grant(outcome) and lease is not None:
                self._leases.release(lease)
        self._serving = ()

    def _left_leased(self, ticket: Ticket) -> tuple[str, ...]:
        """What a close had to leave behind."""
        if ticket.kind != "close" or self._observer.seen.clip != "gpu":
            return ()
        holders = ", ".join(self._leases.names({"clip"})) or "nobody"
        return (f"CLIP on {self._observer.seen.clip_device}, leased by {holders}",)

    def _refuse(self, error: GPUFSMError) -> None:
        for ticket in self._serving:
            ticket.refuse(self._named(error))
        self._serving = ()

    # --- Working: what each state does when it is entered ---

    def work(self, state: State) -> None:
        """Run a state's own work; a step ends in exactly one event, whatever happens in it."""
        if state in STANDING:
            self._on_standing()
        elif state is State.DEGRADED:
            self._on_degraded()
        elif state is State.SHEDDING:
            self._on_shedding()
        else:
            self._step(state)

    def _step(self, state: State) -> None:
        try:
            outcome = self._do_step(state)
        except GPUFSMError as error:
            self._failure = self._with_holders(self._named(error))
            outcome = "fault"
        except Exception as error:
            log.exception("gpu_fsm: %s broke", state.name)
            self._failure = errors.InternalError(detail=one_line(repr(error)), remedy="Please report it.")
            outcome = "fault"
        self.machine.raise_event(outcome)

    def _with_holders(self, error: GPUFSMError) -> GPUFSMError:
        """Add who holds memory, where the driver tells, to what ran out of it in a step."""
        if error.code != errors.InsufficientVRAM.code or isinstance(error, errors.InsufficientVRAM):
            return error
        holders = self._observer.look_at_holders().foreign_holders
        remedy = f"{error.remedy} Held by {', '.join(holders)}.".strip()
        return attrs.evolve(error, remedy=remedy) if holders else error

    def _do_step(self, state: State) -> str:
        try:
            if state is State.LOADING:
                return self._steps.load(self._current())
            if self._steps.prove_cut_off() or self._snapshot.trigger == "fault":
                self._observer.look()  # whatever failed may have happened all the same
            models = self._current().models_to_move
            if not self._leases.claim(models) and not self._drain(models):
                return "aborted"
            return self._steps.migrate() if state is State.MIGRATING else self._steps.release(self._current())
        finally:
            # The effect is over: CLIP serves while the VLM loads, unless it has yet to move itself.
            to_move = {"clip"} if self._aim.plan.clip not in (None, self._clip.place) else set()
            self._leases.open(to_move | (self._waiting_models if self.waiting else set()))

    def _drain(self, models: frozenset[str]) -> bool:
        """A lease won the race for what has to move now.  True once it is ours to move.

        Straight from a mode there is a place to wait in, so the step gives way at once.  Half-way there is none, and
        the step itself waits, as long as the ticket would have.
        """
        closing = next((ticket for ticket in self._serving if ticket.kind == "close"), None)
        if closing is None:
            return self._previous is None and self._steps.drain(models)
        if closing.waits_until < math.inf or not self._steps.drain(models):
            # Closing has waited long enough: a leased CLIP stays, a leased VLM finishes what it runs.
            if not self._leases.claim({"clip"}):
                self._aim = attrs.evolve(self._aim, plan=attrs.evolve(self._aim.plan, clip=None))
            self._leases.force(self._current().models_to_move)
        return True

    def _current(self) -> Snapshot:
        return attrs.evolve(self._snapshot, aim=self._aim, seen=self._observer.seen)

    def _on_standing(self) -> None:
        idle_since, self._idle_since = self._idle_since, None
        unproven, self._steps.unproven = self._steps.unproven, None
        gone = self._steps.released and unproven is None and self._observer.seen.residency.answer is Answer.NO
        if idle_since is not None and gone:
            now = self._clock.monotonic()
            self._owner.tell(IdleUnload(at=now, model=self._server.model, idle_s=now - idle_since))
        if unproven is not None and self._serving and self._serving[0].kind == "vlm_unwanted":
            self._refuse(unproven)
        else:
            self._resolve_granted()
        self._steps.released = False

    def _on_degraded(self) -> None:
        self._idle_since = None
        self._steps.released = False
        unproven, self._steps.unproven = self._steps.unproven, None
        for ticket in self._serving:
            match ticket.kind:
                case "request" | "close":
                    ticket.grant(
                        Outcome(
                            asked=ticket.asked,
                            state=self.state,
                            reason=self._reason,
                            granted=ticket.kind == "close",
                            leftovers=self._leftovers,
                        )
                    )
                case "vlm_unwanted" if unproven is not None:
                    ticket.refuse(unproven)
                case "vlm_unwanted" if self._observer.seen.residency.answer is Answer.NO:
                    ticket.grant(Outcome(asked=ticket.asked, state=self.state))
                case "vlm_unwanted":
                    ticket.refuse(self._steps.stuck())
                case _:
                    ticket.refuse(self._failure or errors.DegradedError(reason_code="degraded"))

    def _hands_off(self) -> bool:
        """Another client's fight for the VLM is not fought on; a lease that was waited for in vain is not broken.

        A person who asks for the unload gets it: leases have been waited for then.
        """
        if any(ticket.kind == "vlm_unwanted" for ticket in self._serving):
            return False
        cause = self._failure.code if self._failure else self._reason.code if self._reason else ""
        return cause in (errors.ExternalClient.code, errors.LeaseTimeout.code)

    def _leaves_the_vlm(self) -> bool:
        """A close that has nothing of ours to give back in Ollama sends it nothing."""
        closing = any(ticket.kind == "close" for ticket in self._serving)
        return closing and not (self._observer.vlm_ours and self.config.on_close == "release")

    def _on_shedding(self) -> None:
        try:
            self._leftovers = self._steps.shed(hands_off_vlm=self._hands_off() or self._leaves_the_vlm())
        except Exception:
            log.exception("gpu_fsm: shedding broke")
            self._leftovers = ("unknown: shedding itself broke",)
        self.machine.raise_event("shed")

    # --- Timers: data, a function of the state ---

    @property
    def keep_alive_s(self) -> float:
        """What every request of ours tells Ollama, in seconds."""
        return self._steps.keep_alive_s

    def reconfigure(self, config: GPUResourceConfig) -> None:
        """Go by other settings from the next event on; no timer runs longer than they allow."""
        self.config = config
        self._steps.reconfigure(config)
        self._observer.reconfigure(config)
        now = self._clock.monotonic()
        self._check_at = min(self._check_at, now + config.check_interval_s)
        self._recover_at = min(self._recover_at, now + config.recover_cap_s)
        self._idle_not_before = min(self._idle_not_before, now + config.idle_timeout_s)
        self.publish()

    def used_server(self, keep_alive_s: float) -> None:
        """A request that carried this keep_alive has just been answered."""
        self._steps.used_server(keep_alive_s)
        self._observer.vlm_ours = True

    @property
    def _renew_margin(self) -> float:
        return self.config.keep_alive_margin_s / 2

    def timers(self) -> dict[str, float]:
        """Every armed timer and when it is due."""
        state = self.state
        if state not in STABLE:
            return {}
        armed = {"check": self._check_at}
        if self.waiting:
            armed["drain"] = min(self._drain_due(), self._mailbox.waits_until())
        if state is State.DEGRADED:
            armed["recover"] = self._recover_at
            return armed
        leased = self._leases.vlm_held
        idle_at = self._leases.last_vlm_use + self.config.idle_timeout_s
        promised = self._standing.plan.vlm is True
        may_be_in = self._observer.seen.residency.answer is not Answer.NO
        outstanding = self._standing.hold is not None and self._standing.plan.vlm is None  # an idle unload is late
        if may_be_in and (self._observer.vlm_ours or promised or outstanding) and not leased:
            armed["idle"] = max(idle_at, self._idle_not_before)
        if promised and (leased or idle_at > self._steps.server_until):
            armed["renew"] = self._steps.server_until - self._renew_margin
        return armed

    def fire_timer(self, name: str) -> None:
        """Deliver a timer that is due."""
        now = self._clock.monotonic()
        if name == "check":
            self._check_at = now + self.config.check_interval_s
            self.fire("check")
        elif name == "idle":
            self.fire("idle_timeout")
        elif name == "recover":
            self.fire("recover")
        elif name == "renew":
            # Whatever comes of it, not again at once.
            self._steps.server_until = max(
                self._steps.server_until, now + self._renew_margin + self.config.check_interval_s
            )
            self.fire("renew")

    def check_soon(self) -> None:
        """Somebody saw an error: look at once."""
        self._check_at = self._clock.monotonic()

    def _drain_due(self) -> float:
        """When the next of those who wait has waited long enough."""
        return min((ticket.waits_until for ticket in self.waiting), default=math.inf)

    def _next_try(self) -> float:
        delay = min(self.config.recover_cap_s, self.config.recover_base_s * 2.0 ** min(self._attempt, 30))
        self._attempt += 1
        # Not long after the moment from which a load may be tried again.
        return min(self._clock.monotonic() + delay, self._observer.doubts_until)

    # --- Words ---

    @property
    def sees_images(self) -> Answer:
        """Whether the VLM has the vision capability, as far as Ollama has told."""
        return self._observer.seen.catalog.vision

    def explain(self, mode: ExecutionMode) -> str:
        """Why `mode` is available now or is not, in words, from the last look."""
        if not self._observer.looked:
            return f"{mode.name}: nothing has been looked at yet."
        snapshot = attrs.evolve(
            self._snapshot, trigger="request", state=self.state, seen=self._observer.seen, mode=self.mode
        )
        aim = Aim(mode=mode, plan=target(mode, None, snapshot))
        snapshot = attrs.evolve(snapshot, aim=aim)
        holders = self._leases.holders()
        snapshot = attrs.evolve(snapshot, vlm_leased=bool(holders.vlm), clip_leased=bool(holders.clip))
        if self.mode is mode and self.state.value == mode.value:
            return f"{mode.name} stands."
        if mode is ExecutionMode.IDLE:
            return "IDLE is available: it needs nothing."
        if guards.undecided(snapshot):
            return f"{mode.name} is not available: {guards.unknown(snapshot)}"
        why = guards.why_not(snapshot)
        if why is not None:
            return f"{mode.name} is not available: {self._named(why)}"
        if guards.blocked(snapshot):
            names = ", ".join(self._leases.names(snapshot.models_to_move))
            return f"{mode.name} has to wait for leases: {names}."
        free = self._observer.seen.vram.free_mib
        return (
            f"{mode.name} is available: it needs {snapshot.acquire_mib:.0f} MiB more, "
            f"{'an unknown amount is' if free is None else f'{free:.0f} MiB are'} free and "
            f"{snapshot.reclaimable_mib:.0f} MiB can be given up."
        )


def errors_for_unplaced(s: Snapshot) -> GPUFSMError:
    """Why the world is not as planned after the steps: short, stuck, or undone."""
    why = guards.why_not(s)
    if why is not None:
        return why
    if not guards.fits(s):
        return guards.shortage(s)
    if s.vlm_surplus:
        return errors.UnloadStuck(detail="the VLM is in again after its unload", remedy="Another client may use it.")
    return errors.PlacementLost(detail="the world did not follow the plan")
