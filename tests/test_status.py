"""The status: complete at every moment, read without any lock and without any I/O."""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Any

import attrs
import pytest

from gpu_fsm import ExecutionMode, GPUResourceStatus, Hold, ModelState
from gpu_fsm.errors import InsufficientVRAM
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.states import STEPS, State
from tests.waiting import PATIENCE_S, Gate, in_thread, until
from tests.worlds import inline, threaded

pytestmark = pytest.mark.core


@pytest.mark.parametrize("op", ["", "probe.read", "ollama.ps", "ollama.load", "clip.to_gpu", "clip.to_cpu"])
def test_the_status_answers_while_every_lock_is_held_and_every_port_hangs(op: str) -> None:
    """Another thread holds all locks, the driver is stuck in NVML, HTTP or CLIP: `get_status()` still answers."""
    world = SimulatedWorld()
    manager = threaded(world)
    manager.set_execution_mode("autopilot", timeout_s=PATIENCE_S)
    gate = Gate(world, op)
    asked = [manager.submit_execution_mode(mode) for mode in ("recording", "autopilot")]
    gate.wait()
    driver = manager._driver
    held, release = threading.Event(), threading.Event()
    locks: tuple[Any, ...] = (driver.mailbox._lock, driver.leases._lock, driver._wake, driver._post_lock)
    if not driver._drive_lock.locked():
        locks = (*locks, driver._drive_lock)

    def hold_all() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            release.wait(PATIENCE_S)

    holder = in_thread(hold_all)
    try:
        assert held.wait(PATIENCE_S)
        assert driver._drive_lock.locked()
        statuses = [in_thread(manager.get_status).result(PATIENCE_S) for _ in range(3)]
        assert in_thread(repr, manager).result(PATIENCE_S).startswith("<GPUResourceManager")
        assert statuses[-1].vlm_model == world.vlm.name
        assert statuses[-1].vram.total_mib == world.card.total_mib
    finally:
        release.set()
        gate.open()
    holder.result(PATIENCE_S)
    for future in asked:
        assert future.result(PATIENCE_S).granted
    manager.close()


def test_reading_the_status_does_no_io() -> None:
    """No port is asked, however often the status is read."""
    world = SimulatedWorld()
    manager = inline(world)
    manager.set_execution_mode("recording")
    asked: list[str] = []
    world.on_io.append(lambda op, phase: asked.append(op))
    for _ in range(1000):
        manager.get_status()
        manager.explain("autopilot")
        manager.get_clip_device()
    assert asked == []


def test_the_status_is_complete_in_every_state_also_in_the_middle_of_a_step() -> None:
    """At every I/O of a life with all steps: VRAM, both models, mode, state, since when; a step shows as itself."""
    world = SimulatedWorld()
    manager = inline(world)
    manager.drive_for(1)
    seen: dict[State, GPUResourceStatus] = {}

    def look(op: str, phase: str) -> None:
        status = manager.get_status()
        seen[status.state] = status
        assert status.vram.total_mib == world.card.total_mib
        assert status.vram.free_mib is not None
        assert status.clip_device in ("cpu", "sim:0")
        assert isinstance(status.vlm_state, ModelState)
        assert status.execution_mode is not None
        assert status.since_at <= status.now_at
        assert status.observed_at is not None
        assert status.vlm_size_mib
        assert status.simulated == ("ollama", "clip", "card")
        json.dumps(status.to_dict(), allow_nan=False)

    world.on_io.append(look)
    manager.set_execution_mode("recording")
    manager.set_execution_mode("autopilot")
    world.faults.arm("clip.to_cpu", "before", times=1)
    manager.set_execution_mode("recording")
    manager.drive_for(60)
    assert set(STEPS) <= set(seen)
    assert seen[State.LOADING].vlm_state is ModelState.LOADING
    assert seen[State.LOADING].execution_mode is not ExecutionMode.RECORDING
    assert seen[State.LOADING].asked_mode is ExecutionMode.RECORDING


def test_a_degraded_status_says_why_and_what_next() -> None:
    """Reason with code, detail, step and remedy; the asked mode is remembered; recovery is armed."""
    world = SimulatedWorld()
    world.card.take("a game", 6000)
    manager = inline(world)
    outcome = manager.set_execution_mode("recording")
    status = manager.get_status()
    assert not outcome.granted
    assert status.state is State.DEGRADED
    assert status.asked_mode is ExecutionMode.RECORDING
    assert status.reason == outcome.reason
    assert status.reason is not None
    assert (status.reason.code, bool(status.reason.detail), bool(status.reason.remedy)) == (
        "vram_insufficient",
        True,
        True,
    )
    assert status.reason.remedy in str(status.reason)
    assert "recover" in {timer.name for timer in status.timers}


def test_a_hold_and_its_timers_are_in_the_status() -> None:
    """On-demand loads show as a hold; the idle deadline is there, and none while the VLM is leased."""
    world = SimulatedWorld()
    manager = inline(world, idle_timeout_s=50)
    manager.set_execution_mode("autopilot")
    manager.ensure_vlm_loaded()
    status = manager.get_status()
    assert (status.hold, status.execution_mode) == (Hold.WANTED, ExecutionMode.AUTOPILOT)
    due = {timer.name: timer.due_at for timer in status.timers}
    assert 0 < due["idle"] - status.now_at <= 50
    with manager.vlm():
        manager.drive_for(manager.config.check_interval_s + 1)  # a check publishes anew
        assert "idle" not in {timer.name for timer in manager.get_status().timers}
    manager.set_execution_mode("recording")
    manager.ensure_vlm_unloaded()
    assert manager.get_status().hold is Hold.PARKED


def test_a_status_never_changes() -> None:
    """A status is a picture: the next one is another object, the old one stays and cannot be written to."""
    manager = inline(SimulatedWorld())
    before = manager.get_status()
    copy = attrs.asdict(before, recurse=False)
    manager.set_execution_mode("recording")
    assert attrs.asdict(before, recurse=False) == copy
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        before.state = State.DEGRADED  # type: ignore[misc]


def test_the_status_is_published_before_the_effect_begins() -> None:
    """S11: who looks when the load's request is sent sees LOADING, not the state before."""
    world = SimulatedWorld()
    manager = inline(world)
    states: dict[str, State] = {}
    world.on_io.append(lambda op, phase: states.setdefault(op, manager.get_status().state))
    manager.set_execution_mode("recording")
    assert states["ollama.load"] is State.LOADING
    manager.set_execution_mode("autopilot")
    assert states["ollama.unload"] is State.RELEASING
    assert states["clip.to_gpu"] is State.MIGRATING


def test_queued_requests_and_leases_are_counted_at_once() -> None:
    """What changes without the driver is in the status although the driver is stuck."""
    world = SimulatedWorld()
    gate = Gate(world, "ollama.load")
    manager = threaded(world)
    first = manager.submit_execution_mode("recording")
    gate.wait()
    manager.submit_execution_mode("idle")
    manager.submit_execution_mode("recording")
    with manager.clip(holder="me"):
        status = manager.get_status()
        assert (status.queued, [lease.holder for lease in status.leases]) == (2, ["me"])
        assert "queued=2" in repr(manager)
        assert "LOADING" in repr(manager)
    gate.open()
    first.result(PATIENCE_S)
    until(lambda: manager.get_status().queued == 0)
    manager.close()


def test_without_a_card_nothing_is_invented() -> None:
    """No GPU: figures are None, `cpu_only` is true and says why; the modes work."""
    world = SimulatedWorld(gpu=False)
    manager = inline(world)
    assert manager.set_execution_mode("recording").granted
    assert manager.set_execution_mode("autopilot").granted
    status = manager.get_status()
    assert status.cpu_only
    assert status.cpu_only_reason
    assert (status.vram.total_mib, status.vram.free_mib, status.vram.used_mib) == (None, None, None)
    assert status.clip_device == "cpu"


def test_at_every_call_the_named_device_is_the_one_that_clip_is_on() -> None:
    """`get_clip_device` asks CLIP itself: the published status is as old as the last look."""
    world = SimulatedWorld()
    manager = inline(world)
    wrong: list[str] = []

    def look(op: str, phase: str) -> None:
        place = {"cpu": "cpu", "gpu": "sim:0"}[world.clip.place]
        if not (op.startswith("clip.to_") and phase == "during") and manager.get_clip_device() != place:
            wrong.append(f"{op} {phase}: CLIP is on {place}, {manager.get_clip_device()} is named")

    world.on_io.append(look)
    for mode in ("autopilot", "recording", "idle"):
        manager.set_execution_mode(mode)
    manager.migrate_clip_to_gpu()
    manager.close()
    assert wrong == []


def test_nothing_moves_for_a_second_driver_in_the_middle_of_a_step() -> None:
    """Time that another thread lets pass begins when the step is over, and finds it done."""
    world = SimulatedWorld()
    manager = inline(world)
    gate = Gate(world, "clip.to_gpu", "during")
    asked = in_thread(manager.set_execution_mode, "autopilot")
    gate.wait()
    before, calls = manager.get_status(), len(world.ollama.log)
    passing = in_thread(manager.drive_for, 1.0)
    with pytest.raises(TimeoutError):
        passing.result(0.3)
    assert (manager.get_status().state, manager.get_status().since_at) == (State.MIGRATING, before.since_at)
    assert len(world.ollama.log) == calls
    gate.open()
    assert asked.result(PATIENCE_S).granted
    passing.result(PATIENCE_S)
    assert manager.get_status().state is State.AUTOPILOT


def test_a_refusal_for_want_of_room_leaves_the_status_as_it_was() -> None:
    """Where the settings say `refuse`: the asked mode, too, or recovery would go for it one day."""
    world = SimulatedWorld()
    manager = inline(world, on_shortage="refuse")
    manager.set_execution_mode("autopilot")
    world.card.take("game", world.card.free_mib - 600.0)
    before = manager.get_status()
    with pytest.raises(InsufficientVRAM):
        manager.set_execution_mode("recording")
    after = manager.get_status()
    assert (after.state, after.asked_mode, after.reason) == (before.state, before.asked_mode, None)
    assert world.clip.place == "gpu"


def test_a_runner_that_outlived_its_server_is_not_shown_as_unloaded() -> None:
    """Nobody listens, but a process of Ollama's still holds the memory: it is not known what that is."""
    world = SimulatedWorld()
    manager = inline(world)
    manager.set_execution_mode("recording")
    world.ollama.stop(kill=True)
    manager.drive_for(manager.config.check_interval_s)
    assert manager.get_status().vlm_state is ModelState.UNKNOWN
    world.ollama.reap_orphans()
    manager.drive_for(manager.config.check_interval_s)
    assert manager.get_status().vlm_state is ModelState.UNLOADED


def test_a_dead_runner_is_not_shown_as_loaded() -> None:
    """Ollama lists it until the next request finds out; the driver, which names all who hold memory, knows better."""
    world = SimulatedWorld()
    manager = inline(world)
    manager.ensure_vlm_loaded()
    assert manager.get_status().vlm_state is ModelState.LOADED
    world.ollama.kill_runner()
    world.clock.advance(5.0)
    seen: list[ModelState] = []

    def look(op: str, phase: str) -> None:
        if op in ("ollama.load", "ollama.unload") and phase == "before":
            seen.append(manager.get_status().vlm_state)

    world.on_io.append(look)
    manager.drive_for(2 * manager.config.check_interval_s)
    assert ModelState.LOADED not in seen
    assert seen
    with manager.vlm() as vlm:
        assert vlm.generate("x").done
    assert world.vlm_resident()
