"""The judge: watches a simulated world between any two I/O calls and says which promise was broken.

It judges by the world (the card's ledger, the server's log, where CLIP really is) and by the journal's shape, never by
the manager's own opinion of what is resident.  Violations are collected, since an exception inside a port call would be
taken for a broken port, and raised by `check`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

from gpu_fsm.events import Event, StateChanged
from gpu_fsm.manager import GPUResourceManager
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.states import STABLE, STANDING, STEPS, TABLE
from gpu_fsm.status import ExecutionMode, State
from gpu_fsm.tickets import Group, Ticket

EFFECTS = frozenset({"ollama.load", "ollama.unload", "clip.to_gpu", "clip.to_cpu"})
"""The calls that change what is on the card."""
ACQUIRING = frozenset({"ollama.load", "clip.to_gpu"})

_ROWS = {row.name: row for row in TABLE}

MOST_TRANSITIONS = 7
"""Between two inputs from outside; the longest story is a request that fails in its last step and is shed."""
MOST_WAITS = 50
"""Looks of one request that then waits on; each is for a lease that ended, and no story has so many."""


class Oracle:
    """Watches one manager in its world, from now on; attach it before the first request.

    It sees every request that is posted and every I/O call.  `violations` holds what was broken so far, in words.
    """

    def __init__(self, manager: GPUResourceManager, world: SimulatedWorld) -> None:
        self.manager, self.world = manager, world
        self.violations: list[str] = []
        self.calls: Counter[str] = Counter()
        self.rows_taken: Counter[str] = Counter()
        self.states_seen: set[State] = {manager.get_status().state}
        self.verdicts_seen: set[tuple[str, bool]] = set()
        self.futures: list[Future[Any]] = []
        self.inputs = 0
        """Requests and wishes for the VLM that were posted: what loads are counted against.  Tests may add to it."""
        self.unwanted: frozenset[str] = frozenset()
        """What the last preempting request does without, and nobody has asked for since: it may not be acquired."""
        self._running: list[str] = []
        journal = manager.journal
        self._records = journal[0].n - 1 if journal else 0
        self._moved = 0
        self._waits: Counter[int] = Counter()
        self._loads_before = self._loads_logged()
        self._loads = 0
        """Sent since the step began; what follows the first is another try."""
        self._seen_free_mib = world.card.free_mib
        self._probe_faults = 0
        self._blind = False
        """The last look at the card met a fault."""
        self._listed = world.vlm_resident()
        self._log_length = 0
        self._shown = frozenset({world.vlm_resident()})
        world.on_io.append(self.on_io)
        manager.subscribe(self._entered, StateChanged)
        self._watch_posts()

    @classmethod
    def of(cls, manager: GPUResourceManager, world: SimulatedWorld) -> Oracle:
        """The one that watches this manager in this world; a new one if there is none yet."""
        for hook in world.on_io:
            oracle = getattr(hook, "__self__", None)
            if isinstance(oracle, Oracle) and oracle.manager is manager:
                return oracle
        return cls(manager, world)

    def leave(self) -> None:
        """Watch no longer."""
        self.world.on_io.remove(self.on_io)

    # --- what is asked ---

    def expect(self, future: Future[Any], *, wants_vlm: bool = False) -> None:
        """Have this future answered, once.  Those of posted requests are known already."""
        if future not in self.futures:
            self.futures.append(future)
            self.inputs += wants_vlm

    def _watch_posts(self) -> None:
        mailbox = self.manager._driver.mailbox
        post = mailbox.post

        def watched(ticket: Ticket) -> Group:
            self._posted(ticket)
            return post(ticket)

        mailbox.post = watched  # type: ignore[method-assign]  # the one place that every request passes

    def _posted(self, ticket: Ticket) -> None:
        self.futures.append(ticket.future)
        self.inputs += ticket.wants_vlm
        wants = {"ollama.load"} if ticket.wants_vlm else set()
        if ticket.mode is ExecutionMode.AUTOPILOT or (ticket.kind == "migrate_clip" and ticket.place == "gpu"):
            wants.add("clip.to_gpu")
        if not ticket.preempt:
            if self.unwanted & wants:  # else the same set stays, by which its own request knows it
                self.unwanted -= wants
            return
        self.unwanted = unwanted = ACQUIRING - wants

        def refused(done: Future[Any]) -> None:
            if (done.cancelled() or done.exception() is not None) and self.unwanted is unwanted:
                self.unwanted = frozenset()  # what stood before stands again

        ticket.future.add_done_callback(refused)

    @property
    def engine(self) -> Any:
        """The engine under test; the oracle reads its timers and plan, and believes neither."""
        return self.manager._driver.engine

    # --- between any two I/O calls ---

    def on_io(self, op: str, phase: str) -> None:
        """Look at everything that must hold at any moment."""
        self.calls[op] += phase == "before"
        status = self.manager.get_status()
        # A user's own call may fall between the machine's move and its word of it; the driver's calls may not.
        driving = self.manager._driver._driving == threading.get_ident()
        if driving and status.state is not self.engine.state:
            self._broken(
                "S11", f"{op}: the status says {status.state.name}, the machine is in {self.engine.state.name}"
            )
        if "mixed" in (self.manager.get_clip_device(), status.clip_device):
            self._broken("12", f"{op}: CLIP is said to be on two devices")
        # What the manager could see; the world may change between this and what it does about it.
        if op == "probe.read" and phase == "before":
            self._probe_faults = self._faults_of("probe.read")
        elif op == "probe.read":
            self._seen_free_mib = self.world.card.free_mib
            self._blind = self._faults_of("probe.read") > self._probe_faults
        elif op == "ollama.ps" and phase == "before":
            self._listed, self._log_length = self._lists_the_vlm(), len(self.world.ollama.log)
        elif op == "ollama.ps":
            self._note_the_listing()
        if op in EFFECTS:
            if phase == "before":
                self._begin(op, status.leases)
            elif phase == "during" and op.startswith("clip.to"):
                self._weight_moved(op, status.leases)
            elif phase == "after" and op in self._running:
                self._running.remove(op)
        if phase == "after":
            self._loads = self._loads + (op == "ollama.load") if self.engine.state is State.LOADING else 0
        if self.world.card.used_mib > self.world.card.total_mib:
            self._broken("ledger", f"{self.world.card!r} is over-full")

    def _begin(self, op: str, leases: Iterable[Any]) -> None:
        if self._running:
            self._broken("S1", f"{op} began while {self._running} was running")
        self._running.append(op)
        if self.engine.state not in STEPS and not self._renewal_became_a_load():
            self._broken("S11", f"{op} in the stable state {self.engine.state.name}")
        held = {lease.model for lease in leases if not lease.lost}
        if op == "ollama.unload" and "vlm" in held and not self._closing:
            self._broken("S10", "an unload under a VLM lease")
        if op.startswith("clip.to") and "clip" in held:
            self._broken("S10", f"{op} under a CLIP lease")
        if op in ACQUIRING:
            if op in self.unwanted:
                self._broken("S6", f"{op} after a preempting request that does without")
            self._room(op)

    def _weight_moved(self, op: str, leases: Iterable[Any]) -> None:
        """Some weights are here, others there: nobody may be using CLIP."""
        if self.world.clip.encoding:
            self._broken("S10", f"{op} during an encode")
        if any(lease.model == "clip" and not lease.lost for lease in leases):
            self._broken("S10", f"a CLIP lease was given in the middle of {op}")

    @property
    def _closing(self) -> bool:
        return self.manager._driver.mailbox.closed

    def _faults_of(self, op: str) -> int:
        return sum(count for (broken, _), count in self.world.faults.fired.items() if broken == op)

    def _lists_the_vlm(self) -> bool:
        """Whether an honest `/api/ps` lists it now: also where its runner is dead, and on 0.24 while it loads."""
        ollama = self.world.ollama
        loading = [ollama._load.runner] if ollama._load is not None and ollama._load.listed else []
        return any(runner.model.name == self.world.vlm.name for runner in (*ollama._runners, *loading))

    def _note_the_listing(self) -> None:
        asked = [entry for entry in self.world.ollama.log[self._log_length :] if entry.op == "ollama.ps"]
        for entry in asked:
            if entry.client == "us" and entry.fault in ("silent", "html"):
                self._shown = frozenset({True, False})
            elif entry.client == "us" and entry.fault in ("", "late") and entry.status == 200:
                self._shown = frozenset({self._listed, self._lists_the_vlm()})

    def shown(self, resident: bool) -> bool:
        """Whether the last answer to `/api/ps` may have said so; what has changed since then is nobody's fault."""
        return resident in self._shown

    def _renewal_became_a_load(self) -> bool:
        """The model was listed, dead, loading or about to go: a renewal of such a one starts or joins a load."""
        journal = self.manager.journal
        return bool(journal) and journal[-1].row == "renew" and self.shown(True)

    def _room(self, op: str) -> None:
        """S5: the snapshot had room; here the world's own figures say whether that can have been true."""
        card, world = self.world.card, self.world
        if not world.gpu or self._blind or card.lost:
            return
        need = world.vlm.size_mib if op == "ollama.load" else world.clip.needed_mib
        if op == "ollama.load" and (world.vlm_held_mib() or self._loads):
            return
        free_mib = max(card.free_mib, self._seen_free_mib)
        if op == "ollama.load" and self._renewal_became_a_load():
            # Nobody decided on it: Ollama finds the runner dead and puts another one in its place.
            free_mib += sum(
                mib for owner, mib in card.owners().items() if owner.startswith(f"ollama:{world.vlm.name}#")
            )
        if free_mib < need:
            self._broken("S5", f"{op} needs {need:.0f} MiB, {free_mib:.0f} were free")

    # --- on entering a state ---

    def _entered(self, event: Event) -> None:
        assert isinstance(event, StateChanged)
        if self.engine.state is not event.new:
            return
        if event.new is State.DEGRADED:
            self.degraded_placement()
        if event.new not in STANDING:
            return
        plan = self.engine._standing.plan
        if plan.clip is not None and plan.clip != self.world.clip.place:
            self._broken("S3", f"{event.new.name} entered with CLIP on the {self.world.clip.place}")
        if plan.vlm is not None and plan.vlm is not self.world.vlm_resident() and not self.shown(plan.vlm):
            self._broken("S3", f"{event.new.name} entered with the VLM {'in' if not plan.vlm else 'out'}")

    # --- after every step of a story ---

    def check(self) -> None:
        """Raise AssertionError with every broken promise so far."""
        self._journal()
        status = self.manager.get_status()
        if status.state is State.DEGRADED:
            self._safe(status)
        if self.manager._driver._driving is None:  # else something is under way, and will be answered
            self._at_rest(status)
        self.futures = [future for future in self.futures if not future.done()]
        for violation in self.world.clip.violations:
            self._broken("S10", violation)
        self._loads_paid_for()
        if self.violations:
            raise AssertionError("\n".join(self.violations))

    def _at_rest(self, status: Any) -> None:
        mailbox = self.manager._driver.mailbox
        if not len(mailbox) and status.state not in STABLE:
            self._broken("S2", f"the mailbox is empty and the state is {status.state.name}")
        queued = {ticket.future for ticket in (*mailbox._queue, *self.engine.waiting)}
        for future in self.futures:
            if not future.done() and future not in queued:
                self._broken("S7", "a ticket has no answer")

    def _safe(self, status: Any) -> None:
        if status.reason is None:
            self._broken("S4", "DEGRADED without a reason")
        if status.asked_mode is ExecutionMode.DEGRADED:
            self._broken("S4", "DEGRADED without an asked mode")
        if "recover" not in {timer.name for timer in status.timers} and not status.closed:
            self._broken("S4", "DEGRADED without recovery armed")

    def degraded_placement(self) -> None:
        """S4, right after entering DEGRADED: the safe placement, or a list of what is left."""
        status = self.manager.get_status()
        if status.state is not State.DEGRADED:
            return
        leftovers = " ".join(status.leftovers)
        if self.world.clip.place == "gpu" and "CLIP" not in leftovers:
            self._broken("S4", "CLIP is on the GPU in DEGRADED and not listed")
        resident = self.world.vlm_resident() and not self.shown(False)
        if resident and self.world.vlm.name not in leftovers and self.world.ollama.up:
            self._broken("S4", "the VLM is resident in DEGRADED and not listed")

    def _journal(self) -> None:
        journal = self.manager.journal
        fresh = [record for record in journal if record.n > self._records]
        if fresh and fresh[0] is journal[0] and len(journal) == self.manager.config.journal_size:
            self._records = fresh[0].n - 1  # what came before has been forgotten, as the settings say
        for record in fresh:
            if record.n != self._records + 1:
                self._broken("S8", f"the journal jumps from {self._records} to {record.n}")
            self._records = record.n
            self.rows_taken[record.row] += 1
            self.states_seen |= {record.source, record.dest}
            self.verdicts_seen |= {(name, verdict) for name, verdict in record.verdicts.items()}
            self._record(record)

    def _record(self, record: Any) -> None:
        row = _ROWS.get(record.row)
        if row is None or record.source not in row.sources or record.dest is not (row.dest or record.source):
            self._broken("S8", f"{record} is no row of the table")
            return
        if record.dest is State.DEGRADED is not record.source and record.source is not State.SHEDDING:
            self._broken("S9", f"{record.row} leads to DEGRADED past SHEDDING")
        if record.source in STABLE and record.dest in STABLE and record.source is not record.dest:
            self._broken("S9", f"{record.row} is a shortcut")
        if record.row in ("load", "migrate") and not record.verdicts.get("fits"):
            self._broken("S5", f"{record.row} without room")
        if record.source in STABLE:
            self._moved = 0
        elif record.row in ("superseded", "aborted-superseded"):
            self._moved = 0  # an input from outside
        if record.dest is not record.source or record.row in ("aborted-back",):
            self._moved += 1
        if self._moved > MOST_TRANSITIONS:
            self._broken("L3", f"{self._moved} transitions for one input, the last by {record.row}")
        if record.row.endswith("-wait"):
            self._waits.update(record.tickets)
            if any(self._waits[ticket] > MOST_WAITS for ticket in record.tickets):
                self._broken("L3", f"a request looks again and again, and waits on, by {record.row}")

    def _loads_paid_for(self) -> None:
        """L4: loads are paid for by requests, recoveries and re-assertions."""
        loads = self._loads_logged() - self._loads_before
        reasons = self.inputs + sum(self.rows_taken[row] for row in ("recover", "check-reassert", "renew"))
        twice = 2 if self.manager.config.on_partial_offload == "reload" else 1
        most = twice * (1 + self.manager.config.vlm_load_retries) * reasons
        if loads > most:
            self._broken("L4", f"{loads} loads for {reasons} reasons")

    def _loads_logged(self) -> int:
        return sum(entry.op == "ollama.load" and entry.client == "us" for entry in self.world.ollama.log)

    def _broken(self, rule: str, what: str) -> None:
        text = f"{rule}: {what} (at {self.world.clock.monotonic():.3f} s, {self.manager!r})"
        if text not in self.violations:
            self.violations.append(text)
