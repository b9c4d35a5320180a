"""A Hypothesis state machine over a real manager in a simulated world.

Subclass it and add rules for your own agent; every invariant of the oracle is checked after each step.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_fsm import errors
from gpu_fsm.manager import GPUResourceManager
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation import KINDS, SimulatedWorld
from gpu_fsm.states import STANDING
from gpu_fsm.status import ExecutionMode, State
from gpu_fsm.testing.oracle import Oracle

MODES = (ExecutionMode.IDLE, ExecutionMode.RECORDING, ExecutionMode.AUTOPILOT)

WAIT_S = 1000.0
"""Longer than every deadline together: a call that takes longer has hung."""

FAULTS = sorted((op, kind) for op, kinds in KINDS.items() for kind in kinds if op in {
    "ollama.load", "ollama.unload", "ollama.generate", "ollama.ps", "ollama.tags", "ollama.renew",
    "clip.to_gpu", "clip.to_cpu", "clip.encode", "probe.read",
} and kind != "gpu_lost")  # fmt: skip
"""Every fault that the manager's own calls can meet; a lost GPU never heals, so it has rules of its own."""

RULES = (
    "begin", "request", "burst", "request_in_a_step", "ensure_loaded", "ensure_unloaded", "migrate", "take_lease",
    "give_lease_back", "lease_ends_later", "use", "break_something", "meet_a_fault", "heal", "stop_ollama",
    "start_ollama", "neighbour_takes", "neighbour_gives", "other_client", "time_passes", "converge", "nobody_uses_it",
    "lose_the_gpu", "stray_event", "close_in_the_middle",
)  # fmt: skip
"""Every rule; a run that leaves one out has proven less than it says."""

T = TypeVar("T")

modes = st.sampled_from(MODES)


def inline_manager(world: SimulatedWorld, **settings: Any) -> GPUResourceManager:
    """A manager that drives in the calling thread, over the real HTTP client on the simulated server."""
    config = world.config(**{"journal_size": 100_000, **settings})
    server = OllamaManager(config, clock=world.clock, transport=world.transport)
    return GPUResourceManager(config, **world.ports(server), threaded=False)


class GPUStateMachine(RuleBasedStateMachine):
    """Requests, leases, faults, neighbours and time, in any order."""

    executed: ClassVar[Counter[str]] = Counter()
    """How often each rule ran, over all examples; with `rows` and `fired` what a run must cover."""
    rows: ClassVar[Counter[str]] = Counter()
    fired: ClassVar[Counter[tuple[str, str]]] = Counter()
    verdicts: ClassVar[set[tuple[str, bool]]] = set()

    world: SimulatedWorld
    manager: GPUResourceManager
    oracle: Oracle

    # --- the beginning and the end ---

    @initialize(
        gpu=st.sampled_from((True, True, True, False)),
        clip=st.sampled_from((True, True, True, False)),
        card_mib=st.sampled_from((6400.0, 8192.0, 12288.0)),
        tells_holders=st.booleans(),
        version=st.sampled_from(("0.32.15", "0.24.0")),
        on_shortage=st.sampled_from(("degrade", "degrade", "refuse")),
        on_partial_offload=st.sampled_from(("reload", "accept", "degrade")),
        idle_timeout_s=st.sampled_from((20.0, 120.0)),
        troubles=st.sets(st.sampled_from(("faults", "faults ", "outages", "neighbours", "others", "doom"))),
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
    ) -> None:
        """Build a world and a manager in it; `troubles` are the kinds of trouble that this story knows."""
        self.troubles = {trouble.strip() for trouble in troubles}
        self.world = SimulatedWorld(
            gpu=gpu,
            clip=clip,
            card_mib=card_mib,
            tells_holders=tells_holders,
            version=version,
            models={"other": 1500.0},
        )
        self.manager = inline_manager(
            self.world,
            on_shortage=on_shortage,
            on_partial_offload=on_partial_offload,
            idle_timeout_s=idle_timeout_s,
            unload_deadline_s=10.0,
        )
        self.oracle = Oracle(self.manager, self.world)
        self.leases: list[tuple[str, contextlib.ExitStack, Any]] = []
        self.pending_hooks: list[Callable[[str, str], None]] = []
        self.troubled = False
        """Something was broken, lied or taken away since the last calm."""
        self.doomed = False
        """The GPU is lost to this process, for good."""
        self.note("begin")

    def teardown(self) -> None:
        """End what is open; whatever the story did, the manager can be closed."""
        if not hasattr(self, "oracle"):
            return
        if not self.manager.get_status().closed:
            self.calm_down()
            self.manager.close()
            self.oracle.check()
            assert self.world.clip.place != "gpu", "closed, and CLIP is on the GPU"
        type(self).rows.update(self.oracle.rows_taken)
        type(self).fired.update(self.world.faults.fired)
        type(self).verdicts |= self.oracle.verdicts_seen

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
        self.oracle.degraded_placement()

    @rule(asked=st.lists(st.tuples(modes, st.booleans()), min_size=2, max_size=6))
    def burst(self, asked: list[tuple[ExecutionMode, bool]]) -> None:
        """Ask for many at once, wait for all."""
        self.note("burst")
        futures = elsewhere(lambda: [self._submit(mode, preempt=preempt) for mode, preempt in asked])
        for future in futures:
            self._outcome(future)

    @rule(
        first=modes,
        then=modes,
        preempt=st.booleans(),
        at=st.integers(0, 12),
        op=st.sampled_from(("", "ollama.load", "clip.to_gpu", "ollama.unload")),
    )
    def request_in_a_step(self, first: ExecutionMode, then: ExecutionMode, preempt: bool, at: int, op: str) -> None:
        """While one request is served, another arrives between two I/O calls, or within one."""
        self.note("request_in_a_step")
        late: list[Any] = []
        left = [at]

        def hook(running: str, phase: str) -> None:
            if not late and (not op or running == op):
                left[0] -= 1
                if left[0] < 0:
                    late.append(elsewhere(lambda: self._submit(then, preempt=preempt)))

        self.world.on_io.append(hook)
        try:
            self._outcome(elsewhere(lambda: self._submit(first)))
        finally:
            self.world.on_io.remove(hook)
        for future in late:
            self._outcome(future)

    @rule(myself=st.booleans())
    def ensure_loaded(self, myself: bool) -> None:
        """The VLM on demand."""
        self.note("ensure_loaded")
        self.oracle.nothing_to_acquire_for = False
        self.oracle.inputs += 1
        ensure = lambda: self.manager.ensure_vlm_loaded(timeout_s=WAIT_S)  # noqa: E731
        if self._ours(ensure if myself else lambda: elsewhere(ensure)):
            assert self.world.vlm_resident() or self.oracle.hearsay(), "10: told loaded, and it is not"

    @rule(myself=st.booleans())
    def ensure_unloaded(self, myself: bool) -> None:
        """The VLM out."""
        self.note("ensure_unloaded")
        ensure = lambda: self.manager.ensure_vlm_unloaded(timeout_s=WAIT_S)  # noqa: E731
        if self._ours(ensure if myself else lambda: elsewhere(ensure)):
            assert not self.world.vlm_resident() or self.oracle.hearsay(), "11: told gone, and it is in"

    @rule(place=st.sampled_from(("gpu", "cpu")), myself=st.booleans())
    def migrate(self, place: str, myself: bool) -> None:
        """CLIP by hand."""
        self.note("migrate")
        self.oracle.nothing_to_acquire_for = False
        move = self.manager.migrate_clip_to_gpu if place == "gpu" else self.manager.migrate_clip_to_cpu
        if self._ours(lambda: move(timeout_s=WAIT_S) if myself else elsewhere(lambda: move(timeout_s=WAIT_S))):
            assert self.world.clip.place == place

    # --- using ---

    @rule(model=st.sampled_from(("vlm", "clip")))
    @precondition(lambda self: len(self.leases) < 3)
    def take_lease(self, model: str) -> None:
        """Take a lease and keep it."""
        self.note("take_lease")
        stack = contextlib.ExitStack()
        self.oracle.inputs += model == "vlm"
        if model == "vlm":
            self.oracle.nothing_to_acquire_for = False
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

    @rule(which=st.integers(0, 2))
    @precondition(lambda self: self.leases)
    def use(self, which: int) -> None:
        """Run the model under a lease."""
        self.note("use")
        model, _, handle = self.leases[which % len(self.leases)]
        self._use(model, handle)

    def _use(self, model: str, handle: Any) -> None:
        with contextlib.suppress(errors.OllamaError, errors.ClipError, errors.LeaseLost):
            if model == "vlm":
                handle.generate("what is this?")
            else:
                assert handle.encode(["a", "b"]).shape == (2, self.world.clip.dimensions)

    # --- the world ---

    @rule(fault=st.sampled_from(FAULTS), times=st.sampled_from((1, 1, 2, 5, None)), skip=st.integers(0, 3))
    @precondition(lambda self: "faults" in self.troubles)
    def break_something(self, fault: tuple[str, str], times: int | None, skip: int) -> None:
        """Arm a fault."""
        self.note("break_something")
        self.troubled = True
        self.world.faults.arm(*fault, times=times, skip=skip)

    @rule(
        fault=st.sampled_from(FAULTS),
        times=st.sampled_from((1, 1, 2, 5, None)),
        way=st.integers(0, 1),
        healed=st.booleans(),
    )
    @precondition(lambda self: "faults" in self.troubles)
    def meet_a_fault(self, fault: tuple[str, str], times: int | None, way: int, healed: bool) -> None:
        """Arm a fault and do what meets it, from a place where that works."""
        self.note("meet_a_fault")
        self.calm_down()
        self.oracle.inputs += 4
        before, action = self._meeting(fault[0], way)
        for step in before:
            self._ours(step)
        self.troubled = True
        self.world.faults.arm(*fault, times=times)
        self._ours(action)
        self.oracle.degraded_placement()
        if healed:
            self.world.faults.heal()

    def _meeting(self, op: str, way: int) -> tuple[list[Callable[[], object]], Callable[[], object]]:
        """How to bring `op` about: what to do first, and then."""
        self.oracle.nothing_to_acquire_for = False
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

    @rule()
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
        self.world.card.take("game", min(mib, self.world.card.free_mib))

    @rule()
    @precondition(lambda self: self.world.gpu and "neighbours" in self.troubles)
    def neighbour_gives(self) -> None:
        """It gives all of it back."""
        self.note("neighbour_gives")
        self.world.card.give_back("game")

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
                ollama.foreign_load("other")
            case _:
                ollama.foreign_generate(name)

    @rule(seconds=st.sampled_from((0.05, 1.0, 6.0, 30.0, 130.0, 700.0)))
    def time_passes(self, seconds: float) -> None:
        """The manager goes on by itself."""
        self.note("time_passes")
        self.manager.drive_for(seconds)
        self.oracle.degraded_placement()

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
        """L5: with nobody using it, the VLM goes."""
        self.note("nobody_uses_it")
        self.calm_down()
        config = self.manager.config
        self.manager.drive_for(config.idle_timeout_s + config.check_interval_s + 10)
        self.troubled = False
        engine = self.manager._driver.engine
        if engine._observer.vlm_ours or engine._standing.plan.vlm is not None:
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

    @rule(what=st.sampled_from(("idle_timeout", "recover", "renew", "check", "poisoned")))
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
        leftovers = self.manager.close()
        self.oracle.check()
        if self.world.clip.place == "gpu":
            assert leftovers, "closed with CLIP on the GPU, and nobody was told"
        for _, stack, _ in self.leases:
            stack.close()
        self.leases.clear()
        self.world.faults.heal()
        type(self).rows.update(self.oracle.rows_taken)
        self.manager = inline_manager(self.world, idle_timeout_s=self.manager.config.idle_timeout_s)
        self.world.on_io.remove(self.oracle.on_io)
        self.oracle = Oracle(self.manager, self.world)
        self.troubled = True

    # --- helpers ---

    def calm_down(self) -> None:
        """Mend everything that can be mended, and give the manager its bound to notice."""
        for _, stack, _ in self.leases:
            stack.close()
        self.leases.clear()
        self.world.faults.heal()
        self.world.ollama.start()
        self.world.ollama.reap_orphans()
        if self.world.gpu and "game" in self.world.card.owners():
            self.world.card.give_back("game")
        if "others" in self.troubles:
            self.manager.drive_for(self.world.vlm.load_s)  # an unload that meets a load is lost
            self.world.ollama.foreign_unload("other")
        self.oracle.nothing_to_acquire_for = False
        config = self.manager.config
        # The bound of L2; re-assertions that were used up come back only when their window has passed.
        window_s = config.reassert_window_s if self.oracle.engine._reassertions else 0.0
        self.manager.drive_for(window_s + config.recover_cap_s + self.world.vlm.load_s + 5)

    def must_be_granted(self) -> bool:
        """L1's premise: nothing has been wrong, so nothing may be refused."""
        return not self.troubled and not self.leases and not self.doomed

    def _submit(self, mode: ExecutionMode, *, preempt: bool = False) -> Any:
        self.oracle.nothing_to_acquire_for = preempt and mode is ExecutionMode.IDLE
        future = self.manager.submit_execution_mode(mode, preempt=preempt)
        self.oracle.expect(future, wants_vlm=mode is ExecutionMode.RECORDING)
        return future

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
        """S1-S11 and the ledger."""
        if hasattr(self, "oracle"):
            self.oracle.check()

    @invariant()
    def degraded_is_never_the_asked_mode(self) -> None:
        """What was asked is remembered."""
        if hasattr(self, "manager"):
            assert self.manager.get_status().asked_mode is not ExecutionMode.DEGRADED
            assert self.manager.get_status().state in State


def elsewhere(call: Callable[[], T]) -> T:
    """Run `call` as somebody who holds no lease: another thread or task, as far as leases know."""
    return contextvars.Context().run(call)
