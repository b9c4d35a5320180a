"""The driver at its edges: what it starts, whom it refuses, what a loan remembers."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from gpu_fsm import ExecutionMode, errors
from gpu_fsm.guards import Snapshot
from gpu_fsm.machine import ModeMachine
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.states import TABLE, Row
from gpu_fsm.status import State
from gpu_fsm.testing.stateful import elsewhere, inline_manager
from tests.worlds import threaded

RECORDING, AUTOPILOT, IDLE = ExecutionMode.RECORDING, ExecutionMode.AUTOPILOT, ExecutionMode.IDLE


def test_a_manager_that_nobody_closes_keeps_no_process_alive() -> None:
    """Every thread that it starts is a daemon."""
    before = set(threading.enumerate())
    with threaded(SimulatedWorld()):
        started = set(threading.enumerate()) - before
        assert len(started) == 2
        assert all(thread.daemon for thread in started)


@pytest.mark.parametrize("by", [-1, 1])
def test_another_process_is_refused_whatever_its_number(monkeypatch: pytest.MonkeyPatch, by: int) -> None:
    """A child may have a higher or a lower one than its parent; its own equal one is not refused."""
    manager = inline_manager(SimulatedWorld())
    ours = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: int(str(ours)))
    manager.set_execution_mode("idle")
    monkeypatch.setattr(os, "getpid", lambda: ours + by)
    with pytest.raises(errors.ForkedProcess):
        manager.set_execution_mode("idle")


def test_from_the_moment_that_the_end_is_asked_for_nothing_else_is_taken() -> None:
    """The close has not been served yet."""
    manager = inline_manager(SimulatedWorld())
    manager._driver.post_close()
    assert not manager.get_status().closed
    with pytest.raises(errors.ManagerClosed):
        manager.submit_execution_mode("recording")


@pytest.mark.parametrize("reason", ["", "torch is not installed"])
def test_a_clip_that_is_not_there_says_why(reason: str) -> None:
    """In words of its own, or at least that there is none."""
    world = SimulatedWorld(clip=False)
    manager = inline_manager(world)
    world.clip.poisoned = reason
    with pytest.raises(errors.ClipUnavailable) as refusal, manager.clip():
        pass

    assert refusal.value.detail == (world.clip.gpu_unusable_reason or "no CLIP is managed")


def test_listeners_that_failed_are_counted_from_nothing() -> None:
    """Each failure once."""
    manager = inline_manager(SimulatedWorld())
    assert manager.get_status().listener_errors == 0

    def fail(event: object) -> None:
        raise ZeroDivisionError

    unsubscribe = manager.subscribe(fail, "mode_changed")
    manager.set_execution_mode("recording")
    assert manager.get_status().listener_errors == 1
    unsubscribe()


def test_a_driver_with_nothing_to_do_sleeps() -> None:
    """It does not spin: between two requests its thread uses no processor time to speak of."""
    world = SimulatedWorld()
    with threaded(world) as manager:
        manager.set_execution_mode("recording")
        driver = manager._driver
        looked = [0]
        original = driver._has_work

        def count() -> bool:
            looked[0] += 1
            return original()

        driver._has_work = count  # type: ignore[method-assign]
        threading.Event().wait(0.05)
        assert looked[0] < 20


def test_a_borrower_that_makes_room_says_nothing_of_what_comes_back() -> None:
    """Nor the second of two; what is asked for afterwards is what comes back to the next."""
    manager = inline_manager(SimulatedWorld())
    manager.set_execution_mode(RECORDING)
    with manager.lend("whisper") as loan:
        manager.set_execution_mode(IDLE)
        assert loan.mode is RECORDING
        with manager.lend("blender") as second:
            manager.set_execution_mode(IDLE)
            assert second.mode is RECORDING
    manager.set_execution_mode(AUTOPILOT)
    with manager.lend("whisper") as loan:
        assert loan.mode is AUTOPILOT


def test_somebody_else_who_asks_meanwhile_is_remembered() -> None:
    """From outside the borrower's block: IDLE is what comes back, for every loan there is."""
    manager = inline_manager(SimulatedWorld())
    manager.set_execution_mode(RECORDING)
    with manager.lend("whisper") as first, manager.lend("blender") as second:
        moved_on = threading.Thread(target=manager.submit_execution_mode, args=(IDLE,))
        moved_on.start()
        moved_on.join()
        assert (first.mode, second.mode) == (IDLE, IDLE)
        with manager.lend("a third") as third:
            assert third.mode is IDLE
    with manager.lend("whisper") as alone:
        assert alone.mode is IDLE


class Recorder:
    """Handlers of a machine that write down what they are told; the first step raises its outcome at once."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.machine: ModeMachine | None = None

    def observe(self, trigger: str, facts: Any) -> Snapshot:
        self.told.append(f"look for {trigger}")
        return Snapshot()

    def take(self, row: Row, *rest: object) -> None:
        self.told.append(f"take {row.name}")

    def announce(self, old: State, new: State, row: Row) -> None:
        self.told.append(f"{old.value} -> {new.value}")

    def work(self, state: State) -> None:
        if state is State.RELEASING and self.machine is not None:
            self.machine.raise_event("step_done")
            self.told.append("the work is over")


def test_a_steps_outcome_waits_until_its_work_is_over() -> None:
    """Events are queued: a state is never left in the middle of its own work."""
    handlers = Recorder()
    handlers.machine = machine = ModeMachine(handlers)
    taken = machine.fire("idle_timeout") and machine.fire("close")

    assert taken is not None
    over = handlers.told.index("the work is over")
    assert "look for step_done" not in handlers.told[:over]
    assert "look for step_done" in handlers.told[over:]


def test_the_machine_knows_the_tables_triggers_and_no_other() -> None:
    """No door leads into a state without a row."""
    assert set(ModeMachine(Recorder()).wrapped.events) == {row.trigger for row in TABLE}


@pytest.mark.parametrize("limit_s", [0.0, 2.0])
def test_a_time_out_tells_how_long_it_was(limit_s: float) -> None:
    """In words and as a figure; none at all is one of 0 s."""
    manager = inline_manager(SimulatedWorld(card_mib=6400.0))
    manager.set_execution_mode("autopilot")
    lease = manager.clip(holder="somebody")
    elsewhere(lease.__enter__)
    with pytest.raises(errors.OperationTimeout, match=f"within {limit_s:g} s") as late:
        manager.set_execution_mode("recording", timeout_s=limit_s)

    assert late.value.timeout_s == limit_s
    elsewhere(lambda: lease.__exit__(None, None, None))


def test_driving_for_a_time_lets_exactly_that_pass() -> None:
    """Neither more nor less, however short it is."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    for seconds in (0.25, 0.0, 0.5):
        before = world.clock.monotonic()
        manager.drive_for(seconds)
        assert world.clock.monotonic() - before == pytest.approx(seconds, abs=0.02)


def test_an_answer_without_a_lease_that_nobody_waits_for_gives_nothing_back() -> None:
    """Neither one that grants none, nor an error, nor a cancelled one; somebody else's lease stays."""
    manager = inline_manager(SimulatedWorld())
    lease = manager.clip(holder="somebody")
    elsewhere(lease.__enter__)
    empty: Future[object] = Future()
    failed: Future[object] = Future()
    for future in (empty, failed):
        future.set_running_or_notify_cancel()
        manager._driver.abandon(future, lambda answer: None)
    empty.set_result(None)
    failed.set_exception(errors.ManagerClosed(detail="too late"))

    assert [info.holder for info in manager.get_status().leases] == ["somebody"]
    elsewhere(lambda: lease.__exit__(None, None, None))
    assert manager.get_status().leases == ()
