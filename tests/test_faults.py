"""Every fault, at every I/O call of every public operation: no promise breaks, and all is well afterwards."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest
from hypothesis import settings

from gpu_fsm import GPUResourceManager, errors
from gpu_fsm.handles import CLIP, VLM
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation import KINDS
from gpu_fsm.states import STABLE, STANDING
from gpu_fsm.status import ExecutionMode, State
from gpu_fsm.testing.oracle import Oracle
from gpu_fsm.testing.stateful import FAULTS, GPUStateMachine
from tests.counts import say
from tests.operations import (
    CONVERGES_S,
    ELSEWHERE,
    IDLE_TIMEOUT_S,
    NEW,
    OLD,
    OPERATIONS,
    WAIT_S,
    Stage,
    io_calls,
    verbs_called,
    verbs_of,
)

EVERY = 5
"""Of so many faults a brief run meets one; any other run meets all."""

ORPHANED_S = IDLE_TIMEOUT_S + 60.0 + 1.0
"""What nobody unloaded has gone by then: Ollama's own timer."""


HANGS_S = 45.0
"""CLIP's own calls know no deadline: what hangs in one goes on after so many virtual seconds."""

Point = tuple[int, str, str]
"""Which call of the operation, what it is, how it goes wrong."""

FACES = (GPUResourceManager, VLM, CLIP)
"""What the operations have to cover."""


# --- once, at every call ---


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_fault_at_every_call_of(name: str, request: pytest.FixtureRequest) -> None:
    """Met singly: the answer is one that was promised, nothing breaks, the asked mode comes back, and all works."""
    points = [(nth, op, kind) for nth, op in enumerate(io_calls(name)) for kind in sorted(KINDS[op])]
    if settings.get_current_profile_name() == "brief":
        points = points[len(name) % EVERY :: EVERY]
    wrong = []
    for nth, op, kind in points:
        try:
            play(name, (nth, op, kind))
        except (AssertionError, errors.GPUFSMError) as broken:
            wrong.append(f"{name}, call {nth}, {op} {kind}: {type(broken).__name__} {broken}")
    say(request.config, f"single faults: {len(points)} met in {name}")
    assert not wrong, f"{len(wrong)} of {len(points)}\n" + "\n".join(wrong)


def play(name: str, *armed: Point, judged: bool = True) -> list[str]:
    """Tell an operation with faults at some of its calls; returns all calls until it stood, or nothing came any more.

    Judged, what went wrong is healed after the last fault, and all must be well soon.
    """
    operation = OPERATIONS[name]
    stage = operation.stage()
    world, manager = stage.world, stage.manager
    oracle = Oracle(manager, world)
    operation.before(stage)
    calls: list[str] = []
    points = {nth: (op, kind) for nth, op, kind in armed}

    def arm(what: str, phase: str) -> None:
        if phase != "before":
            return
        if len(calls) in points:
            op, kind = points[len(calls)]
            assert what == op, f"another call than without the fault: {what}"
            world.faults.arm(op, kind)
            if kind == "hang":
                world.clock.after(HANGS_S, world.faults.heal)
        calls.append(what)

    world.on_io.insert(0, arm)
    try:
        operation.act(stage)
    except (errors.OperationTimeout, errors.InternalError) as defect:
        raise AssertionError(f"a hang or a defect: {defect!r}") from defect
    except errors.GPUFSMError as told:
        assert str(told), f"{told!r} says nothing"
    assert manager.get_status().state in STABLE
    last = armed[-1][0]
    recovers_until = world.clock.monotonic() + CONVERGES_S
    while manager.get_status().state is State.DEGRADED and world.clock.monotonic() < recovers_until:
        if judged and len(calls) > last:
            break
        manager.drive_for(0.5)
    world.on_io.remove(arm)
    if not judged:
        manager._at_exit.detach()
        return calls
    assert world.faults.fired == Counter((op, kind) for _, op, kind in armed), f"not met: {world.faults.fired}"
    oracle.check()
    oracle.degraded_placement()
    kinds = {kind for _, _, kind in armed}
    world.faults.heal()
    if kinds & {"runner_dies", "silent"}:
        world.ollama.stop()  # else it lists the dead until somebody asks for them
        world.ollama.start()
    if not manager.get_status().closed:
        poisoned = any(op.startswith("clip.") and kind == "gpu_lost" for _, op, kind in armed)
        all_is_well(stage, poisoned=poisoned)
        oracle.check()
    world.clock.advance(ORPHANED_S)
    assert stage.is_empty(), f"{world!r}"
    assert not stage.open_connections
    return calls


def all_is_well(stage: Stage, *, poisoned: bool) -> None:
    """The asked mode comes back within the bound, and another can be had; a poisoned CUDA keeps CLIP home."""
    manager, world = stage.manager, stage.world
    manager.drive_for(CONVERGES_S)
    status = manager.get_status()
    if not (poisoned and status.asked_mode is ExecutionMode.AUTOPILOT):
        assert status.state in STANDING, f"still {status.state.name}: {status.reason}"
        assert status.execution_mode is status.asked_mode
    assert (status.leases, status.queued) == ((), 0)
    if poisoned or status.state is not State.RECORDING:
        assert manager.set_execution_mode("recording", timeout_s=WAIT_S).granted
        assert (world.vlm_resident(), world.clip.place) == (True, "cpu")
    else:
        assert manager.set_execution_mode("autopilot", timeout_s=WAIT_S).granted
        assert (world.vlm_resident(), world.clip.place) == (False, "gpu")
    assert manager.close() == ()


# --- until it is healed ---


def fresh_machine(**changes: object) -> GPUStateMachine:
    """The stateful machine in a quiet 8 GiB world, to be driven by hand."""
    machine = GPUStateMachine()
    world = {
        "gpu": True,
        "clip": True,
        "card_mib": 8192.0,
        "tells_holders": True,
        "version": "0.32.15",
        "on_shortage": "degrade",
        "on_partial_offload": "reload",
        "idle_timeout_s": 120.0,
        "troubles": {"faults"},
    }
    machine.begin(**(world | changes))  # type: ignore[arg-type]
    return machine


def meet(fault: tuple[str, str], *, times: int | None, way: int) -> None:
    """One story: the fault, what it does to the machine, and the way back."""
    machine = fresh_machine(version=OLD if fault[0] == "ollama.show" else NEW)
    try:
        machine.meet_a_fault(fault, times, way, healed=False)
        machine.every_promise_is_kept()
        assert machine.world.faults.fired[fault], f"{fault} was not met this way"
        machine.converge(ExecutionMode.AUTOPILOT if way else ExecutionMode.RECORDING)
        machine.every_promise_is_kept()
    finally:
        machine.teardown()


@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize("fault", FAULTS, ids="-".join)
def test_invariants_hold_around_every_fault(fault: tuple[str, str], way: int) -> None:
    """Met for good, on either way: safe while it lasts, and back within the bound when it is healed."""
    meet(fault, times=None, way=way)


# --- was it every call? ---


def test_the_operations_are_all_that_the_manager_can_be_asked_for() -> None:
    """Every verb, every kind of call, every trigger, every state of a manager: else "every" would be a lie."""
    seen: set[str] = set()
    called: set[str] = set()
    states: set[State] = set()
    with verbs_called(*FACES) as verbs:
        for name in OPERATIONS:
            stage = OPERATIONS[name].stage()
            called.update(io_calls(name))
            OPERATIONS[name].before(stage)
            known = len(stage.manager.journal)
            OPERATIONS[name].act(stage)
            seen.update(record.trigger for record in stage.manager.journal[known:])
            states.update(record.dest for record in stage.manager.journal)
    if not importlib.util.find_spec("httpx"):
        verbs.add("GPUResourceManager.httpx_transport")
    assert verbs_of(*FACES) - verbs == set(ELSEWHERE), "a public verb without an operation"
    # `/api/version` is for the doctor: no verb and no timer of a manager asks for it.
    assert called == set(KINDS) - {"ollama.other", "ollama.version"}
    assert {op for op, _ in FAULTS} == called
    assert states == set(State)
    assert seen >= {"request", "vlm_wanted", "vlm_unwanted", "migrate_clip", "close", "idle_timeout", "check", "renew"}
    assert seen >= {"recover", "step_done"}


def test_a_fault_that_did_harm_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes every answer for a yes does not get through."""
    monkeypatch.setattr(OllamaManager, "unload_model", lambda self, *, timeout_s: None)
    with pytest.raises(AssertionError):
        play("unload", (0, "ollama.ps", "late"))
