"""The driver at its edges: what it starts, whom it refuses, what a loan remembers."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import itertools
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest

from gpu_fsm import ExecutionMode, errors
from gpu_fsm.cardlock import CardLock
from gpu_fsm.events import Event
from gpu_fsm.guards import Snapshot
from gpu_fsm.machine import ModeMachine
from gpu_fsm.simulation import SimulatedClock, SimulatedWorld
from gpu_fsm.states import TABLE, Row
from gpu_fsm.status import State
from gpu_fsm.testing.stateful import elsewhere, inline_manager
from gpu_fsm.tickets import Group, Outcome
from tests.waiting import PATIENCE_S, Gate, until
from tests.worlds import threaded

T = TypeVar("T")

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
def test_a_clip_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """In the host's words, or at least that there is none."""
    world = SimulatedWorld(clip=False)
    manager = inline_manager(world)
    monkeypatch.setattr(type(world.clip), "gpu_unusable_reason", reason)
    with pytest.raises(errors.ClipUnavailable) as refusal, manager.clip():
        pass

    assert refusal.value.detail == (reason or "no CLIP is managed")


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


def test_an_answer_without_a_lease_that_nobody_waits_for_gives_nothing_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one that grants none nor an error: somebody else's lease stays, be it the first one of all."""
    monkeypatch.setattr("gpu_fsm.leases._IDS", itertools.count(1))
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

    assert caplog.text == ""
    assert [info.holder for info in manager.get_status().leases] == ["somebody"]
    elsewhere(lambda: lease.__exit__(None, None, None))
    assert manager.get_status().leases == ()


def test_a_card_that_another_manager_has_is_asked_for_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verb says who has it; it can be closed all the same, and a card that has become free is taken at once."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    first, second = CardLock(), CardLock()
    for lock in (first, second):
        lock.watch("GPU-0000cafe-0000-0000-0000-000000000000")
    managers = [inline_manager(SimulatedWorld()) for _ in range(2)]
    for manager in managers:
        manager._driver.card_lock = second
        for verb in (
            functools.partial(manager.set_execution_mode, "idle"),
            manager.ensure_vlm_loaded,
            manager.ensure_vlm_unloaded,
            manager.migrate_clip_to_gpu,
        ):
            with pytest.raises(errors.CardHeld, match="another manager in this process"):
                verb()
    first.close()
    assert managers[0].set_execution_mode("recording").granted
    for manager in managers:
        assert manager.close() == ()


def test_nothing_remembers_a_loan_that_is_over() -> None:
    """A program that lends for years grows by nothing, also where a block ends in another task than it began in."""
    manager = inline_manager(SimulatedWorld())
    with manager.lend("whisper") as loan:
        in_one_task = weakref.ref(loan)
    block = contextlib.ExitStack()
    loan = contextvars.copy_context().run(block.enter_context, manager.lend("blender"))
    in_two = weakref.ref(loan)
    block.close()
    del loan, block
    gc.collect()
    assert in_one_task() is None
    assert in_two() is None


def test_a_refused_request_is_not_what_comes_back() -> None:
    """What a borrower has to ask for again is what stood, not what was never given."""
    world = SimulatedWorld()
    manager = inline_manager(world, on_shortage="refuse")
    manager.set_execution_mode(AUTOPILOT)
    world.card.take("game", 6500.0)
    with pytest.raises(errors.InsufficientVRAM):
        manager.set_execution_mode(RECORDING)
    with manager.lend("whisper") as loan:
        assert loan.mode is AUTOPILOT


def test_a_close_waits_for_nothing_that_was_asked_before() -> None:
    """What has not begun is refused, and never begins."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    asked = manager.submit_execution_mode("recording")
    assert manager.close() == ()
    assert isinstance(asked.exception(), errors.ManagerClosed)
    assert world.ollama.counts["loads"] == 0


def test_a_callback_of_an_inline_manager_neither_waits_nor_drives(caplog: pytest.LogCaptureFixture) -> None:
    """It runs in the middle of a drive: both would wait for themselves.  Who waits is told what to use instead."""
    manager = inline_manager(SimulatedWorld())
    answer = manager.submit_execution_mode("recording")
    refusals: list[errors.WouldDeadlock] = []

    def call_back(answer: Future[Outcome]) -> None:
        for call in (lambda: manager.drive_for(1.0), lambda: manager.set_execution_mode("idle")):
            with pytest.raises(errors.WouldDeadlock) as refusal:
                call()
            refusals.append(refusal.value)

    answer.add_done_callback(call_back)
    manager.drive_for(10.0)
    assert answer.result(0).granted
    assert len(refusals) == 2, caplog.text
    assert "submit_" in refusals[1].remedy


def test_only_the_thread_that_drives_may_not_wait() -> None:
    """The callback of an answer runs there; a listener does not, and is served."""
    world = SimulatedWorld()
    gate = Gate(world, "probe.read")
    with threaded(world) as manager:
        said: dict[str, BaseException | Outcome] = {}

        def ask(who: str) -> None:
            try:
                said[who] = manager.set_execution_mode("autopilot", timeout_s=PATIENCE_S)
            except Exception as error:
                said[who] = error

        manager.subscribe(lambda event: None if said.get("listener") else ask("listener"), "mode_changed")
        gate.wait()
        answer = manager.submit_execution_mode("recording")
        answer.add_done_callback(lambda answer: ask("callback"))
        gate.open()
        until(lambda: len(said) == 2)
        assert isinstance(said["callback"], errors.WouldDeadlock)
        assert isinstance(said["listener"], Outcome)


def test_a_time_out_in_virtual_time_costs_no_real_second() -> None:
    """Whoever waits has driven for that long already."""

    class Watched(Future[T]):
        real_s = 0.0

        def result(self, timeout: float | None = None) -> T:
            assert timeout is not None
            self.real_s += max(0.0, timeout)
            return super().result(timeout)

    never: Watched[None] = Watched()
    manager = inline_manager(SimulatedWorld())
    with pytest.raises(errors.OperationTimeout):
        manager._driver.wait(never, 100.0)
    assert never.real_s == 0.0


class Suspended(SimulatedClock):
    """A machine that somebody shuts the lid of, at one look at the clock."""

    looks = 0
    shut_at = 0

    def monotonic(self) -> float:
        self.looks += 1
        if self.looks == self.shut_at:
            self.advance(8.0)
        return super().monotonic()


def test_a_machine_may_be_suspended_between_any_two_looks_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timer that was due meanwhile is served late; nothing else comes of it."""
    monkeypatch.setattr("gpu_fsm.simulation.world.SimulatedClock", Suspended)
    world = SimulatedWorld()
    manager = inline_manager(world)
    assert isinstance(world.clock, Suspended)
    world.clock.looks = 0
    manager.drive_for(20.0)
    for shut_at in range(1, world.clock.looks + 1):
        world.clock.looks, world.clock.shut_at = 0, shut_at
        looked = len(manager.journal)
        manager.drive_for(20.0)
        assert len(manager.journal) > looked


def test_a_preempting_request_takes_the_place_of_one_that_waits_for_a_lease() -> None:
    """At once, and not when the lease ends or the patience with it."""
    world = SimulatedWorld(card_mib=6400.0)
    manager = inline_manager(world)
    manager.set_execution_mode("autopilot")
    lease = manager.clip(holder="somebody")
    elsewhere(lease.__enter__)
    waiting = manager.submit_execution_mode("recording")
    manager.drive_for(1.0)
    assert not waiting.done()
    before = world.clock.monotonic()
    assert manager.set_execution_mode("autopilot", preempt=True).granted
    assert world.clock.monotonic() - before < 1.0
    assert isinstance(waiting.exception(0), errors.Superseded)
    elsewhere(lambda: lease.__exit__(None, None, None))


def test_of_two_losses_the_first_is_named() -> None:
    """What came first may have brought about what came second."""
    manager = inline_manager(SimulatedWorld())
    manager.set_execution_mode("recording")
    manager._driver.report(errors.CudaPoisoned(detail="an illegal address"))
    manager._driver.report(errors.GpuLost(detail="it has fallen off the bus"))
    manager.drive_for(0.0)
    reason = manager.get_status().reason
    assert reason is not None
    assert reason.code == "cuda_poisoned"


def test_a_request_after_a_loss_waits_for_no_timer() -> None:
    """What was reported is served, and then at once what was asked."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.drive_for(1.0)
    before = world.clock.monotonic()
    manager._driver.report(errors.CudaPoisoned(detail="an illegal address"))
    manager.set_execution_mode("idle")
    assert world.clock.monotonic() - before < 0.1


def test_the_driver_sleeps_until_the_next_timer_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither shorter, which costs processor time, nor longer, which leaves a lost VLM unseen."""
    world = SimulatedWorld()
    sleeps: list[tuple[float, float | None]] = []
    wait = world.clock.wait

    def watch(condition: threading.Condition, timeout_s: float | None) -> None:
        sleeps.append((world.clock.monotonic(), timeout_s))
        wait(condition, timeout_s)

    monkeypatch.setattr(world.clock, "wait", watch)
    with threaded(world) as manager:

        def asleep() -> tuple[float, float | None]:
            seen = len(sleeps)
            manager._driver.notify()
            until(lambda: len(sleeps) > seen)
            return sleeps[-1]

        until(lambda: sleeps)
        (due,) = (timer.due_at for timer in manager.get_status().timers)
        for before_s in (12.0, 0.25):
            world.clock.advance_to(due - before_s)
            since, timeout_s = asleep()
            assert timeout_s is not None
            assert since + timeout_s == pytest.approx(due)


def test_what_is_asked_between_looking_and_sleeping_is_not_overlooked() -> None:
    """The driver has just seen that there is nothing to do; the request wakes it all the same."""
    with threaded(SimulatedWorld()) as manager:
        manager.set_execution_mode("idle")
        driver = manager._driver
        look, answers = driver._has_work, list[Future[Outcome]]()

        def look_and_be_asked() -> bool:
            found = look()
            if not found and not answers:
                answers.append(manager.submit_execution_mode("recording"))
            return found

        driver._has_work = look_and_be_asked  # type: ignore[method-assign]
        driver.notify()
        until(lambda: answers)
        assert answers[0].result(PATIENCE_S).granted


def test_what_runs_in_the_drivers_thread_between_two_drives_may_not_wait_either() -> None:
    """The garbage collector may run anything there: it is refused, and the driver lives."""
    with threaded(SimulatedWorld()) as manager:
        manager.set_execution_mode("idle")
        driver = manager._driver
        look, refusals = driver._has_work, list[errors.WouldDeadlock]()

        def look_and_finalize() -> bool:
            if not refusals:
                with pytest.raises(errors.WouldDeadlock) as refusal:
                    manager.set_execution_mode("autopilot")
                refusals.append(refusal.value)
            return look()

        driver._has_work = look_and_finalize  # type: ignore[method-assign]
        driver.notify()
        until(lambda: refusals)
        assert manager.set_execution_mode("recording").granted


def test_the_status_counts_all_who_wait() -> None:
    """One for a lease, the others for their turn."""
    manager = inline_manager(SimulatedWorld(card_mib=6400.0))
    manager.set_execution_mode("autopilot")
    lease = manager.clip(holder="somebody")
    elsewhere(lease.__enter__)
    counted = []
    for mode in ("recording", "autopilot", "recording", "idle"):
        manager.submit_execution_mode(mode)
        manager.drive_for(0.0)
        counted.append(manager.get_status().queued)
    assert counted == [1, 2, 3, 4]
    elsewhere(lambda: lease.__exit__(None, None, None))


def test_events_that_nobody_fetches_make_room_for_newer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are lost, and the machine does not notice."""
    monkeypatch.setattr("gpu_fsm.driver.BACKLOG", 2)
    manager = inline_manager(SimulatedWorld())
    told: list[Event] = []
    everything: list[Event] = []
    tell: Callable[[Event | None], None] = manager._driver.tell

    def watch(event: Event | None) -> None:
        assert event is not None
        everything.append(event)
        tell(event)

    manager.subscribe(told.append)
    monkeypatch.setattr(manager._driver, "tell", watch)
    assert manager.set_execution_mode("recording").granted
    assert len(told) == 2
    assert told == everything[-2:]


def test_a_setting_that_does_not_exist_is_named_in_at_most_80_characters() -> None:
    """However long the name is, the message stays a line."""
    manager = inline_manager(SimulatedWorld())
    with pytest.raises(errors.ConfigError) as refusal:
        manager.reconfigure(**{"vlm_modell" * 100: "llava"})
    assert refusal.value.name == ("vlm_modell" * 8)[:77] + "..."


def test_a_defect_of_ours_does_not_end_the_driving(caplog: pytest.LogCaptureFixture) -> None:
    """It is told, and whoever asks next is served."""
    manager = threaded(SimulatedWorld())
    engine = manager._driver.engine
    deliver = engine.deliver

    def break_once(group: Group) -> None:
        engine.deliver = deliver  # type: ignore[method-assign]
        deliver(group)
        raise KeyError("a defect")

    engine.deliver = break_once  # type: ignore[method-assign]
    assert manager.set_execution_mode("recording", timeout_s=PATIENCE_S).granted
    assert manager.set_execution_mode("autopilot", timeout_s=PATIENCE_S).granted
    assert "the driver met a defect" in caplog.text
    manager.close()
