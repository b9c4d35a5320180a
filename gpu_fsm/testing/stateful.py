"""A Hypothesis state machine over a real manager in a simulated world.

Its rules ask for modes, take leases, use the models, cancel, break things, use Ollama as other clients do, fill the
card, stop and start Ollama, let time pass and restart the manager; an oracle looks between any two I/O calls, after
every weight of CLIP that moves, and after every rule.

Subclass it to test a program that embeds the manager:

    class MyStories(GPUStateMachine):
        def agent_starts(self) -> None:       # a manager has been made: build the agent over it
            self.agent = MyAgent(self.manager)

        def agent_works(self) -> None:        # its usual work once, at any moment; assert what it owes its user
            assert self.agent.look() ...

        def agent_rests(self) -> None:        # give back every lease; called wherever all must come to rest
            self.agent.stop()

        @rule()                               # Hypothesis' own: rules and invariants of yours, mixed into ours
        def agent_pauses(self) -> None: ...

        @invariant()
        def agent_keeps_its_word(self) -> None: ...

    TestMyStories = MyStories.TestCase        # for pytest; or: gpu-fsm fuzz --machine my_module:MyStories

A failing story prints as a program that can be pasted and run.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, TypeVar

from hypothesis import currently_in_test_context, note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_fsm import errors
from gpu_fsm.leases import remember
from gpu_fsm.manager import GPUResourceManager
from gpu_fsm.simulation import KINDS, SimulatedWorld
from gpu_fsm.states import STANDING
from gpu_fsm.status import ExecutionMode, State
from gpu_fsm.testing.oracle import Oracle
from gpu_fsm.testing.simulated import MODES, NEIGHBOUR, OTHER, WAIT_S, inline_manager

FAULTS = sorted((op, kind) for op, kinds in KINDS.items() for kind in kinds if op in {
    "ollama.load", "ollama.unload", "ollama.generate", "ollama.ps", "ollama.tags", "ollama.show", "ollama.renew",
    "clip.to_gpu", "clip.to_cpu", "clip.encode", "probe.read",
} and kind != "gpu_lost")  # fmt: skip
"""Every fault that the manager's own calls can meet; a lost GPU never heals, so it has rules of its own."""

RULES = (
    "begin", "request", "burst", "cancel", "request_in_a_step", "happens_in_a_step", "ensure_loaded",
    "ensure_unloaded", "migrate", "take_lease", "give_lease_back", "lease_ends_later", "work", "use",
    "ask_behind_a_lease", "fill_the_card", "break_something", "meet_a_fault", "meet_a_moment", "heal", "stop_ollama",
    "start_ollama", "neighbour_takes", "neighbour_gives", "other_client", "time_passes", "converge", "nobody_uses_it",
    "lose_the_gpu", "stray_event", "close_in_the_middle",
)  # fmt: skip
"""Every rule; a run that leaves one out has proven less than it says."""

CALLS: dict[str, dict[str, Any]] = {
    "load": {"kind": "vlm_wanted"},
    "unload": {"kind": "vlm_unwanted"},
    "up": {"kind": "migrate_clip", "place": "gpu"},
    "down": {"kind": "migrate_clip", "place": "cpu"},
}
"""What may be asked for besides a mode, as the driver knows it."""

EFFECTS = ("", "ollama.load", "clip.to_gpu", "clip.to_cpu", "ollama.unload")
"""Where something may happen in the middle of a step; empty: at any call."""

STRAY = ("idle_timeout", "recover", "renew", "check", "poisoned")
"""Events that come when nobody expects them."""

HAPPENINGS = (
    "encode", "generate", "lease_clip", "lease_vlm", "stop", "restart", "other", "unload", "neighbour", "heal",
    "unplug", "fault", "blind",
)  # fmt: skip
"""What others do in the middle of a step."""

MOMENTS = (
    "went_deaf", "memory_stolen", "unload_lost", "lease_half_way", "lease_in_the_way", "vlm_gone_under_a_lease",
    "closing",
)  # fmt: skip
"""What chance alone brings about too seldom."""

TROUBLES = ("faults", "faults ", "outages", "neighbours", "others", "moments", "doom")
"""Kinds of trouble that a story may know; without one it is calm, and everything must be granted."""

T = TypeVar("T")

modes = st.sampled_from(MODES)
wishes = st.sampled_from((*MODES, *CALLS))


class GPUStateMachine(RuleBasedStateMachine):
    """Requests, leases, faults, neighbours and time, in any order."""

    executed: ClassVar[Counter[str]] = Counter()
    """How often each rule ran, over all examples; with the next four what a run must cover."""
    rows: ClassVar[Counter[str]] = Counter()
    fired: ClassVar[Counter[tuple[str, str]]] = Counter()
    verdicts: ClassVar[set[tuple[str, bool]]] = set()
    states: ClassVar[set[State]] = set()

    world: SimulatedWorld
    manager: GPUResourceManager
    oracle: Oracle

    def __init__(self) -> None:
        super().__init__()
        if currently_in_test_context():
            # Printed where a story fails, above Hypothesis' own lines: together they are a program.
            note("from gpu_fsm.status import ExecutionMode")
            note(f"from {type(self).__module__} import {type(self).__name__}")

    # --- for those who embed ---

    def agent_starts(self) -> None:
        """Build your agent over `self.manager`; called when a manager has been made, at first and after a restart."""

    def agent_works(self) -> None:
        """Have your agent do its usual work once; called by a rule, and just before and after something breaks."""

    def agent_rests(self) -> None:
        """Have your agent give back every lease; called wherever the story must come to rest.  Must not raise."""

    # --- the beginning and the end ---

    @initialize(
        gpu=st.sampled_from((True, True, True, False)),
        clip=st.sampled_from((True, True, True, False)),
        card_mib=st.sampled_from((6400.0, 8192.0, 6400.0, 12288.0)),
        tells_holders=st.booleans(),
        version=st.sampled_from(("0.32.15", "0.24.0")),
        on_shortage=st.sampled_from(("degrade", "degrade", "refuse")),
        on_partial_offload=st.sampled_from(("reload", "accept", "degrade")),
        idle_timeout_s=st.sampled_from((20.0, 120.0)),
        troubles=st.sets(st.sampled_from(TROUBLES)),
        reclaim_s=st.sampled_from((0.3, 0.0, 2.5)),
    )
    def begin(
        self,
        *,
        gpu: bool,
        clip: bool,
        card_mib: float,
        tells_holders: bool,
        version: str,
        on_shortage: str,
        on_partial_offload: str,
        idle_timeout_s: float,
        troubles: set[str],
        reclaim_s: float = 0.3,
    ) -> None:
        """Build a world and a manager in it; `troubles` are the kinds of trouble that this story knows."""
        self.troubles = {trouble.strip() for trouble in troubles}
        self.world = SimulatedWorld(
            gpu=gpu,
            clip=clip,
            card_mib=card_mib,
            tells_holders=tells_holders,
            version=version,
            models={OTHER: 1500.0},
            reclaim_s=reclaim_s,
        )
        self.settings = {
            "on_shortage": on_shortage,
            "on_partial_offload": on_partial_offload,
            "idle_timeout_s": idle_timeout_s,
            "unload_deadline_s": 10.0,
        }
        self._start_manager()
        self.leases: list[tuple[str, contextlib.ExitStack, Any]] = []
        self.troubled = False
        """Something was broken, lied or taken away since the last calm."""
        self.doomed = False
        """The GPU is lost to this process, for good."""
        self.note("begin")
        self.agent_starts()

    def _start_manager(self) -> None:
        self.manager = inline_manager(self.world, **self.settings)
        self.oracle = Oracle(self.manager, self.world)

    def teardown(self) -> None:
        """End what is open; whatever the story did, the manager can be closed."""
        if not hasattr(self, "oracle"):
            return
        if not self.manager.get_status().closed:
            self.calm_down()
            self.manager.close()
            self.oracle.check()
            assert self.world.clip.place != "gpu", "closed, and CLIP is on the GPU"
        self._count()
        type(self).fired.update(self.world.faults.fired)

    def _count(self) -> None:
        type(self).rows.update(self.oracle.rows_taken)
        type(self).verdicts.update(self.oracle.verdicts_seen)
        type(self).states.update(self.oracle.states_seen)

    def note(self, name: str) -> None:
        """Count a rule that ran."""
        type(self).executed[name] += 1

    # --- asking ---

    @rule(mode=modes, preempt=st.booleans(), myself=st.booleans())
    def request(self, mode: ExecutionMode, preempt: bool, myself: bool) -> None:
        """Ask for a mode and wait; `myself` is the one who holds the leases."""
        self.note("request")
        promised = self.must_be_granted()
        future = (
            self._submit(mode, preempt=preempt) if myself else elsewhere(lambda: self._submit(mode, preempt=preempt))
        )
        outcome = self._outcome(future)
        assert not promised or (outcome and outcome.granted), f"L1: {mode.name} without cause: {future!r} {outcome}"

    @rule(
        asked=st.lists(
            st.tuples(wishes, st.sampled_from((False, False, True)), st.integers(-1, 1)), min_size=2, max_size=6
        ),
        leased=st.booleans(),
    )
    def burst(self, asked: list[tuple[ExecutionMode | str, bool, int]], leased: bool) -> None:
        """Many ask at once, each as the holder of one lease or of none; both models may be `leased` first."""
        self.note("burst")
        if leased and not self.leases:
            self.take_lease(model="vlm")
            self.take_lease(model="clip")
        futures = [self._as_holder(who, partial(self._post, what, preempt)) for what, preempt, who in asked]
        for future in futures:
            self._outcome(future)

    @rule(
        first=modes,
        then=modes,
        preempt=st.booleans(),
        at=st.integers(0, 12),
        op=st.sampled_from(EFFECTS),
    )
    def request_in_a_step(self, first: ExecutionMode, then: ExecutionMode, preempt: bool, at: int, op: str) -> None:
        """While one request is served, another arrives between two I/O calls, or within one."""
        self.note("request_in_a_step")
        late: list[Any] = []
        with self._in_a_step(op, at, lambda: late.append(self._submit(then, preempt=preempt))):
            self._outcome(elsewhere(lambda: self._submit(first)))
        for future in late:
            self._outcome(future)

    @rule(mode=modes, preempt=st.booleans(), at=st.integers(-1, 12), then=modes)
    def cancel(self, mode: ExecutionMode, preempt: bool, at: int, then: ExecutionMode) -> None:
        """Somebody asks and goes away before the answer: at once, or in the middle of the step that serves it."""
        self.note("cancel")
        future = elsewhere(lambda: self._submit(mode, preempt=preempt))
        if at < 0:
            assert future.cancel(), "a request that nobody has looked at could not be cancelled"
        with self._in_a_step("", at, future.cancel):
            self._outcome(elsewhere(lambda: self._submit(then)))

    @rule(
        first=st.sampled_from((*MODES, None)),
        what=st.sampled_from(HAPPENINGS),
        fault=st.sampled_from(FAULTS),
        at=st.integers(0, 12),
        op=st.sampled_from(EFFECTS),
    )
    def happens_in_a_step(
        self, first: ExecutionMode | None, what: str, fault: tuple[str, str], at: int, op: str
    ) -> None:
        """While a request (None: a wish for the VLM) is served, others go on: threads, programs, what breaks."""
        self.note("happens_in_a_step")
        ensure = lambda: self._ours(lambda: self.manager.ensure_vlm_loaded(timeout_s=WAIT_S))  # noqa: E731
        with self._in_a_step(op, at, lambda: self._happens(what, fault)):
            elsewhere(ensure if first is None else lambda: self._outcome(self._submit(first)))

    def _happens(self, what: str, fault: tuple[str, str]) -> None:
        world, manager = self.world, self.manager
        match what:
            case "encode":
                # In this thread a lease that is not free now is given up at once, as with a timeout of 0.
                self._ours(self._encode)
            case "generate":
                self._ours(self._generate)
            case "lease_clip" | "lease_vlm":
                self._lease_for(what.removeprefix("lease_"), 5.0)
            case "heal":
                world.faults.heal()
            case "fault" | "blind" if "faults" in self.troubles:
                self.troubled = True
                world.faults.arm(*(fault if what == "fault" else ("ollama.ps", "hang")), times=None)
            case "stop" | "restart" if "outages" in self.troubles:
                self.troubled = True
                world.ollama.stop(kill=what == "stop")
                if what == "restart":
                    world.ollama.start(starting_s=1.0)
            case "other" | "unload" if "others" in self.troubles:
                self.troubled = True
                if what == "other":
                    world.ollama.foreign_load(OTHER)
                else:
                    world.ollama.foreign_unload(world.vlm.name)
            case "neighbour" if world.gpu and "neighbours" in self.troubles:
                self.troubled = True
                world.card.take(NEIGHBOUR, min(2000.0, world.card.free_mib))
            case "unplug" if world.gpu and "doom" in self.troubles:
                self.troubled = self.doomed = True
                world.lose_gpu()
            case _:
                manager.get_status()  # this story does not know that trouble

    @contextlib.contextmanager
    def _in_a_step(self, op: str, at: int, act: Callable[[], object], phase: str = "") -> Iterator[None]:
        """Have somebody else `act` once, at the `at`-th look into `op` (any call if empty; any phase if empty)."""
        left = [at]

        def hook(running: str, now: str) -> None:
            if left[0] >= 0 and op in ("", running) and phase in ("", now):
                left[0] -= 1
                if left[0] < 0:
                    elsewhere(act)

        self.world.on_io.append(hook)
        try:
            yield
        finally:
            self.world.on_io.remove(hook)

    @rule(myself=st.booleans())
    def ensure_loaded(self, myself: bool) -> None:
        """The VLM on demand."""
        self.note("ensure_loaded")
        ensure = lambda: self.manager.ensure_vlm_loaded(timeout_s=WAIT_S)  # noqa: E731
        if self._ours(ensure if myself else lambda: elsewhere(ensure)):
            assert self.world.vlm_resident() or self.oracle.shown(True), "10: told loaded, and it is not"

    @rule(myself=st.booleans())
    def ensure_unloaded(self, myself: bool) -> None:
        """The VLM out."""
        self.note("ensure_unloaded")
        ensure = lambda: self.manager.ensure_vlm_unloaded(timeout_s=WAIT_S)  # noqa: E731
        if self._ours(ensure if myself else lambda: elsewhere(ensure)):
            assert not self.world.vlm_resident() or self.oracle.shown(False), "11: told gone, and it is in"

    @rule(place=st.sampled_from(("gpu", "cpu")), myself=st.booleans())
    def migrate(self, place: str, myself: bool) -> None:
        """CLIP by hand."""
        self.note("migrate")
        move = self.manager.migrate_clip_to_gpu if place == "gpu" else self.manager.migrate_clip_to_cpu
        if self._ours(lambda: move(timeout_s=WAIT_S) if myself else elsewhere(lambda: move(timeout_s=WAIT_S))):
            assert self.world.clip.place == place

    # --- using ---

    @rule()
    def work(self) -> None:
        """The embedder's agent goes on."""
        self.note("work")
        self.agent_works()

    @rule(model=st.sampled_from(("vlm", "clip")))
    @precondition(lambda self: len(self.leases) < 3)
    def take_lease(self, model: str) -> None:
        """Take a lease and keep it."""
        self.note("take_lease")
        stack = contextlib.ExitStack()
        lease = self.manager.vlm if model == "vlm" else self.manager.clip
        self._ours(lambda: self.leases.append((model, stack, stack.enter_context(lease(timeout_s=WAIT_S)))))

    @rule(which=st.integers(0, 2))
    @precondition(lambda self: self.leases)
    def give_lease_back(self, which: int) -> None:
        """End a lease."""
        self.note("give_lease_back")
        self.leases.pop(which % len(self.leases))[1].close()

    @rule(which=st.integers(0, 2), after_s=st.sampled_from((0.5, 3.0, 9.0)))
    @precondition(lambda self: self.leases)
    def lease_ends_later(self, which: int, after_s: float) -> None:
        """A lease ends by itself while something else goes on."""
        self.note("lease_ends_later")
        _, stack, _ = self.leases.pop(which % len(self.leases))
        self.world.clock.after(after_s, stack.close)

    @rule(
        mode=modes,
        model=st.sampled_from(("vlm", "clip")),
        ask=wishes,
        after_s=st.sampled_from((3.0, 0.5, 20.0)),
        myself=st.booleans(),
        gone=st.booleans(),
    )
    def ask_behind_a_lease(
        self, mode: ExecutionMode, model: str, ask: ExecutionMode | str, after_s: float, myself: bool, gone: bool
    ) -> None:
        """In `mode`, with the VLM `gone` meanwhile or not, somebody asks for what a lease may stand in the way of."""
        self.note("ask_behind_a_lease")
        self.calm_down()
        self._outcome(self._submit(mode))
        stack = contextlib.ExitStack()
        lease = self.manager.vlm if model == "vlm" else self.manager.clip
        if not self._ours(lambda: stack.enter_context(lease(timeout_s=WAIT_S))):
            return
        if gone and "others" in self.troubles:
            self.troubled = True
            self.world.ollama.foreign_unload(self.world.vlm.name)
            self.manager.drive_for(self.manager.config.check_interval_s)
        self.world.clock.after(after_s, stack.close)
        if myself:
            self._ours(lambda: self._ask(ask))
        else:
            elsewhere(lambda: self._ours(lambda: self._ask(ask)))
        self.manager.drive_for(after_s)

    def _ask(self, what: ExecutionMode | str) -> None:
        match what:
            case "load":
                self.manager.ensure_vlm_loaded(timeout_s=WAIT_S)
            case "unload":
                self.manager.ensure_vlm_unloaded(timeout_s=WAIT_S)
            case "up":
                self.manager.migrate_clip_to_gpu(timeout_s=WAIT_S)
            case "down":
                self.manager.migrate_clip_to_cpu(timeout_s=WAIT_S)
            case _:
                self.manager.set_execution_mode(what, timeout_s=WAIT_S)

    @rule(which=st.integers(0, 2), how=st.sampled_from(("generate", "chat", "stream", "cut")))
    @precondition(lambda self: self.leases)
    def use(self, which: int, how: str = "generate") -> None:
        """Run the model under a lease; `cut` stops listening to a streamed answer before its end."""
        self.note("use")
        model, _, handle = self.leases[which % len(self.leases)]
        self._use(model, handle, how)

    def _use(self, model: str, handle: Any, how: str = "generate") -> None:
        with contextlib.suppress(errors.OllamaError, errors.ClipError, errors.LeaseLost):
            if model == "vlm" and how == "chat":
                handle.chat([{"role": "user", "content": "what is this?"}])
            elif model == "vlm" and how in ("stream", "cut"):
                with contextlib.closing(handle.stream("what is this?")) as parts:
                    for _ in parts:
                        if how == "cut":
                            break
            elif model == "vlm":
                handle.generate("what is this?")
            else:
                assert handle.encode(["a", "b"]).shape == (2, self.world.clip.dimensions)

    # --- the world ---

    @rule(
        fault=st.sampled_from(FAULTS),
        times=st.sampled_from((1, 1, 2, 5, None)),
        skip=st.integers(0, 3),
        delay_s=st.sampled_from((1.0, 0.1, 6.0, 30.0)),
    )
    @precondition(lambda self: "faults" in self.troubles)
    def break_something(self, fault: tuple[str, str], times: int | None, skip: int, delay_s: float = 1.0) -> None:
        """Arm a fault; `delay_s` is for those that are late."""
        self.note("break_something")
        self.troubled = True
        self.world.faults.arm(*fault, times=times, skip=skip, delay_s=delay_s)

    @rule(
        fault=st.sampled_from(FAULTS),
        times=st.sampled_from((1, 1, 2, 5, None)),
        way=st.integers(0, 1),
        healed=st.booleans(),
        agent_first=st.booleans(),
    )
    @precondition(lambda self: "faults" in self.troubles)
    def meet_a_fault(
        self, fault: tuple[str, str], times: int | None, way: int, healed: bool, agent_first: bool = False
    ) -> None:
        """Arm a fault and do what meets it, from a place where that works; or leave it to the agent to meet it."""
        self.note("meet_a_fault")
        self.calm_down()
        before, action = self._meeting(fault[0], way)
        for step in before:
            self._ours(step)
        self.agent_works()
        self.troubled = True
        self.world.faults.arm(*fault, times=times)
        if agent_first:
            self.agent_works()
        self._ours(action)
        self.agent_works()
        if healed:
            self.world.faults.heal()

    def _meeting(self, op: str, way: int) -> tuple[list[Callable[[], object]], Callable[[], object]]:
        """How to bring `op` about: what to do first, and then."""
        manager, config = self.manager, self.manager.config
        record = lambda: manager.set_execution_mode("recording", timeout_s=WAIT_S)  # noqa: E731
        automate = lambda: manager.set_execution_mode("autopilot", timeout_s=WAIT_S)  # noqa: E731
        idle = lambda: manager.set_execution_mode("idle", timeout_s=WAIT_S)  # noqa: E731
        load = lambda: manager.ensure_vlm_loaded(timeout_s=WAIT_S)  # noqa: E731
        unload = lambda: manager.ensure_vlm_unloaded(timeout_s=WAIT_S)  # noqa: E731
        up = lambda: manager.migrate_clip_to_gpu(timeout_s=WAIT_S)  # noqa: E731
        down = lambda: manager.migrate_clip_to_cpu(timeout_s=WAIT_S)  # noqa: E731
        match op:
            case "ollama.load":
                return [idle, unload, *([] if way else [automate])], record if way else load
            case "ollama.unload":
                return [record], automate if way else unload
            case "ollama.renew":
                return [record], lambda: self._hold_vlm(config.idle_timeout_s + config.keep_alive_margin_s)
            case "ollama.generate":
                return [record], self._generate
            case "ollama.tags":
                return [idle, unload], record if way else load
            case "ollama.show":
                # Only an old Ollama is asked, and only until it has answered once: by a new manager.
                return [self._restart], lambda: self._ask(ExecutionMode.RECORDING if way else "load")
            case "clip.to_gpu":
                return [record, idle], automate if way else up
            case "clip.to_cpu":
                return [automate, *([] if way else [idle])], record if way else down
            case "clip.encode":
                return [automate if way else record], self._encode
            case _:
                return [record if way else automate], automate if way else lambda: manager.drive_for(200.0)

    def _hold_vlm(self, seconds: float) -> None:
        with self.manager.vlm(timeout_s=WAIT_S):
            self.manager.drive_for(seconds)

    def _generate(self) -> None:
        with self.manager.vlm(timeout_s=WAIT_S) as vlm:
            self._use("vlm", vlm)

    def _encode(self) -> None:
        with self.manager.clip(timeout_s=WAIT_S) as clip:
            self._use("clip", clip)

    @rule(moment=st.sampled_from(MOMENTS), wish=st.booleans(), long=st.booleans(), healed=st.booleans())
    @precondition(lambda self: "moments" in self.troubles)
    def meet_a_moment(self, moment: str, wish: bool, long: bool, healed: bool) -> None:
        """One of the rare moments, for a `wish` for the VLM or a request, with leases that last `long` or not."""
        self.note("meet_a_moment")
        self.calm_down()
        self.troubled = True
        manager, world = self.manager, self.world
        lease_s = 30.0 if long else 3.0
        self._outcome(self._submit(ExecutionMode.AUTOPILOT))
        match moment:
            case "went_deaf":
                deaf = lambda: world.faults.arm("ollama.ps", "hang", times=None)  # noqa: E731
                with self._in_a_step("ollama.load", 0, deaf, phase="after"):
                    self._fetch_vlm("load" if wish else ExecutionMode.RECORDING)
            case "memory_stolen":
                leave = lambda: world.card.take(NEIGHBOUR, max(0.0, world.card.free_mib - 4000.0))  # noqa: E731
                with self._in_a_step("clip.to_cpu", 0, leave, phase="after"):
                    self._fetch_vlm("load" if wish else ExecutionMode.RECORDING)
            case "unload_lost":
                self._fetch_vlm(ExecutionMode.RECORDING)
                world.faults.arm("ollama.unload", "silent", times=None)
                self._outcome(self._submit(ExecutionMode.AUTOPILOT))
                self._ours(lambda: self._ask("unload"))
            case "lease_half_way":
                late: list[Any] = []

                def interfere() -> None:
                    self._lease_for("clip", lease_s)
                    late.append(elsewhere(lambda: self._submit(ExecutionMode.AUTOPILOT, preempt=True)))

                with self._in_a_step("ollama.load", 0, interfere, phase="during"):
                    self._fetch_vlm(ExecutionMode.RECORDING)
                for future in late:
                    self._outcome(future)
            case "lease_in_the_way":
                # Whoever holds CLIP itself is told at once; others wait.
                world.card.take(NEIGHBOUR, max(0.0, world.card.free_mib - world.vlm.size_mib - 200.0))
                if wish:
                    with contextlib.suppress(errors.GPUFSMError), manager.clip(timeout_s=WAIT_S):
                        self._ours(lambda: self._ask("load"))
                self._lease_for("clip", lease_s)
                self._fetch_vlm("load")
            case "closing":
                # While the close waits for the lease, somebody's VLM appears and a look falls due.
                self._lease_for("clip", 9.0)
                world.clock.after(0.1, lambda: world.ollama.foreign_load(world.vlm.name))
                seen = errors.OllamaTimeout(detail="met by a user")
                world.clock.after(world.vlm.load_s + 1.0, lambda: manager._driver.report(seen))
                self.close_in_the_middle(blind=False)
            case _:
                world.card.take(NEIGHBOUR, max(0.0, world.card.free_mib - world.vlm.size_mib - 200.0))
                self._fetch_vlm("load")
                self._lease_for("clip", lease_s)
                world.ollama.foreign_unload(world.vlm.name)
                manager.drive_for(manager.config.check_interval_s + 1.0)
        if healed:
            world.faults.heal()

    def _fetch_vlm(self, how: ExecutionMode | str) -> None:
        elsewhere(lambda: self._ours(lambda: self._ask(how)))

    def _lease_for(self, model: str, seconds: float) -> None:
        """Somebody else takes a lease for so long."""
        stack = contextlib.ExitStack()
        lease = self.manager.vlm if model == "vlm" else self.manager.clip
        if elsewhere(lambda: self._ours(lambda: stack.enter_context(lease(timeout_s=WAIT_S)))):
            self.world.clock.after(seconds, stack.close)

    @rule()
    @precondition(lambda self: self.world.faults.armed)
    def heal(self) -> None:
        """Call off all faults."""
        self.note("heal")
        self.world.faults.heal()

    @rule(kill=st.booleans())
    @precondition(lambda self: "outages" in self.troubles)
    def stop_ollama(self, kill: bool) -> None:
        """Ollama ends; killed, its runners stay behind."""
        self.note("stop_ollama")
        self.troubled = True
        self.world.ollama.stop(kill=kill)

    @rule(starting_s=st.sampled_from((0.0, 3.0)))
    @precondition(lambda self: not self.world.ollama.up)
    def start_ollama(self, starting_s: float) -> None:
        """Ollama starts, empty."""
        self.note("start_ollama")
        self.world.ollama.start(starting_s=starting_s)

    @rule(mib=st.sampled_from((200.0, 1500.0, 4000.0, 99999.0)))
    @precondition(lambda self: self.world.gpu and "neighbours" in self.troubles)
    def neighbour_takes(self, mib: float) -> None:
        """Another program takes memory."""
        self.note("neighbour_takes")
        self.troubled = True
        self.world.card.take(NEIGHBOUR, min(mib, self.world.card.free_mib))

    @rule(mode=modes, left_mib=st.sampled_from((0.0, 100.0, 400.0)), leased=st.booleans())
    @precondition(lambda self: self.world.gpu and "neighbours" in self.troubles)
    def fill_the_card(self, mode: ExecutionMode, left_mib: float, leased: bool) -> None:
        """In `mode` another program leaves only so much of the card, until the manager has had to notice."""
        self.note("fill_the_card")
        self.calm_down()
        self._outcome(self._submit(mode))
        self.agent_works()
        self.troubled = True
        with contextlib.ExitStack() as stack:
            if leased:
                self._ours(lambda: stack.enter_context(self.manager.vlm(timeout_s=WAIT_S)))
            self.world.card.take(NEIGHBOUR, max(0.0, self.world.card.free_mib - left_mib))
            config = self.manager.config
            self.manager.drive_for(config.check_interval_s * 2 + config.pressure_s)
        self.agent_works()

    @rule()
    @precondition(lambda self: NEIGHBOUR in self.world.card.owners())
    def neighbour_gives(self) -> None:
        """It gives all of it back."""
        self.note("neighbour_gives")
        self.world.card.give_back(NEIGHBOUR)

    @rule(what=st.sampled_from(("load", "unload", "other", "generate")))
    @precondition(lambda self: "others" in self.troubles)
    def other_client(self, what: str) -> None:
        """Another client uses the same Ollama."""
        self.note("other_client")
        self.troubled = True
        ollama, name = self.world.ollama, self.world.vlm.name
        match what:
            case "load":
                ollama.foreign_load(name, keep_alive=-1)
            case "unload":
                ollama.foreign_unload(name)
            case "other":
                ollama.foreign_load(OTHER)
            case _:
                ollama.foreign_generate(name)

    @rule(seconds=st.sampled_from((0.05, 1.0, 6.0, 30.0, 130.0, 700.0)))
    def time_passes(self, seconds: float) -> None:
        """The manager goes on by itself."""
        self.note("time_passes")
        self.manager.drive_for(seconds)

    @rule(mode=modes)
    def converge(self, mode: ExecutionMode) -> None:
        """L2: when everything is well again, the asked mode comes by itself."""
        self.note("converge")
        with contextlib.suppress(errors.GPUFSMError):
            self._outcome(self._submit(mode))
        self.calm_down()
        status = self.manager.get_status()
        if self._out_of_reach(status.asked_mode):
            return
        assert status.state in STANDING, f"L2: still {status.state.name}: {status.reason}"
        assert status.execution_mode is status.asked_mode, "L2: another mode than the asked one"
        self.troubled = False

    def _out_of_reach(self, mode: ExecutionMode) -> bool:
        """A lost card comes back with a new process, not before; a poisoned CUDA keeps only CLIP from it."""
        if mode is ExecutionMode.AUTOPILOT:
            return self.doomed
        return mode is ExecutionMode.RECORDING and self.world.card.lost

    @rule()
    def nobody_uses_it(self) -> None:
        """L5: with nobody using it, the VLM goes; in IDLE only one that is ours, which another client's is not."""
        self.note("nobody_uses_it")
        self.calm_down()
        config = self.manager.config
        loads = self.world.ollama.counts["loads"]
        self.manager.drive_for(config.idle_timeout_s + config.check_interval_s + 10)
        if self.world.ollama.counts["loads"] > loads:  # a promise put right, after a use that never reached the server
            self.manager.drive_for(config.idle_timeout_s + config.check_interval_s + 10)
        self.troubled = False
        engine = self.manager._driver.engine
        promised = engine.mode is not ExecutionMode.IDLE and engine._standing.plan.vlm is not None
        if engine._observer.vlm_ours or promised:
            assert not self.world.vlm_resident(), "L5: the VLM is idle and still in"

    @rule(encoding=st.booleans())
    @precondition(lambda self: self.world.gpu and "doom" in self.troubles)
    def lose_the_gpu(self, encoding: bool) -> None:
        """The card falls off the bus, or CUDA breaks under an encode: the rest of the story plays without it."""
        self.note("lose_the_gpu")
        self.troubled = self.doomed = True
        if encoding:
            self.world.faults.arm("clip.encode", "gpu_lost")
            self._ours(self._encode)
        else:
            self.world.lose_gpu()

    @rule(what=st.sampled_from(STRAY))
    def stray_event(self, what: str) -> None:
        """A timer fires late, in a state that does not want it; a user reports an error that nobody can see."""
        self.note("stray_event")
        if what == "poisoned":
            self.troubled = True
            self.manager._driver.report(errors.CudaPoisoned(detail="reported by a user"))
            self.manager.drive_for(0.0)
        else:
            self.oracle.engine.fire(what)

    @rule(blind=st.booleans())
    def close_in_the_middle(self, blind: bool) -> None:
        """The agent ends, whatever is going on; what it leaves behind is named."""
        self.note("close_in_the_middle")
        if blind:
            self.troubled = True
            self.world.faults.arm("ollama.ps", "hang", times=None)
        self._restart()
        self.troubled = True

    def _restart(self) -> None:
        leftovers = self.manager.close()
        self.oracle.check()
        if self.world.clip.place == "gpu":
            assert leftovers, "closed with CLIP on the GPU, and nobody was told"
        self._give_leases_back()
        self.world.faults.heal()
        self._count()
        self.oracle.leave()
        self._start_manager()
        self.agent_starts()

    # --- helpers ---

    def calm_down(self) -> None:
        """Mend everything that can be mended, and give the manager its bound to notice."""
        self._give_leases_back()
        self.world.faults.heal()
        self.world.ollama.start()
        self.world.ollama.reap_orphans()
        if self.world.gpu and NEIGHBOUR in self.world.card.owners():
            self.world.card.give_back(NEIGHBOUR)
        if "others" in self.troubles:
            # An unload that meets a load is lost; and a load that turns a model out waits for its memory first.
            self.manager.drive_for(self.world.vlm.load_s + self.world.ollama.reclaim_s + 1)
            self.world.ollama.foreign_unload(OTHER)
        config = self.manager.config
        # The bound of L2; re-assertions that were used up come back only when their window has passed.
        window_s = config.reassert_window_s if self.oracle.engine._reassertions else 0.0
        self.manager.drive_for(window_s + config.recover_cap_s + self.world.vlm.load_s + 5)

    def _give_leases_back(self) -> None:
        self.agent_rests()
        for _, stack, _ in self.leases:
            stack.close()
        self.leases.clear()

    def must_be_granted(self) -> bool:
        """L1's premise: nothing has been wrong, so nothing may be refused."""
        return not (self.troubled or self.doomed or self.manager.get_status().leases)

    def _submit(self, mode: ExecutionMode, *, preempt: bool = False) -> Any:
        return self.manager.submit_execution_mode(mode, preempt=preempt)

    def _post(self, what: ExecutionMode | str, preempt: bool) -> Any:
        """Ask without waiting; only a mode can preempt."""
        if isinstance(what, ExecutionMode):
            return self._submit(what, preempt=preempt)
        return self.manager._driver.post(**CALLS[what]).future

    def _as_holder(self, which: int, call: Callable[[], T]) -> T:
        """Run `call` as somebody who holds that lease alone; as a stranger where there is none of that number."""
        leases = sorted(self.manager._driver.leases.held_by_caller())

        def as_holder() -> T:
            if 0 <= which < len(leases):
                remember(leases[which])
            return call()

        return elsewhere(as_holder)

    def _outcome(self, future: Any) -> Any:
        """The outcome of a ticket, None for a refusal; an answer that never comes is a violation."""
        got: list[Any] = []
        self._ours(lambda: got.append(self.manager._driver.wait(future, WAIT_S)))
        return got[0] if got else None

    def _ours(self, call: Callable[[], object]) -> bool:
        """True if the call succeeded; only errors that an embedder is told to expect may come out of it."""
        try:
            call()
        except errors.OperationTimeout as error:
            raise AssertionError(f"no answer within {WAIT_S:g} s") from error
        except errors.InternalError as error:
            raise AssertionError(f"a defect: {error!r}") from error
        except errors.GPUFSMError:
            return False
        return True

    # --- always ---

    @invariant()
    def every_promise_is_kept(self) -> None:
        """S1-S11, L3, L4 and the ledger; and what was asked is remembered."""
        if hasattr(self, "oracle"):
            self.oracle.check()
            assert self.manager.get_status().asked_mode is not ExecutionMode.DEGRADED


def elsewhere(call: Callable[[], T]) -> T:
    """Run `call` as somebody who holds no lease: another thread or task, as far as leases know."""
    return contextvars.Context().run(call)
