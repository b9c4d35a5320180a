"""Leases: what they forbid, who passes the gate, who is told what."""

from __future__ import annotations

import contextvars
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from gpu_fsm import GPUResourceManager
from gpu_fsm.errors import (
    BadArgument,
    ClipUnavailable,
    CudaPoisoned,
    LeaseHeld,
    LeaseLost,
    LeaseTimeout,
    ManagerClosed,
    OperationTimeout,
    Superseded,
)
from gpu_fsm.events import Degraded, Event
from gpu_fsm.leases import LeaseBook
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.states import State
from gpu_fsm.tickets import Outcome
from tests.waiting import PATIENCE_S, Gate, in_thread, until
from tests.worlds import inline, threaded

pytestmark = pytest.mark.core


class Elsewhere:
    """A lease that somebody else holds: taken in a context of its own, kept until `end()`."""

    def __init__(self, manager: GPUResourceManager, model: str, holder: str = "somebody") -> None:
        self._context = contextvars.Context()
        self._lease = getattr(manager, model)(holder=holder)
        self.model: Any = self._context.run(self._lease.__enter__)

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call as the holder."""
        return self._context.run(call, *args)

    def end(self) -> None:
        """Give it back."""
        self._context.run(self._lease.__exit__, None, None, None)


def models(manager: GPUResourceManager) -> list[str]:
    """Which models are leased."""
    return [lease.model for lease in manager.get_status().leases]


def test_a_lease_is_in_the_status_while_its_block_runs() -> None:
    """Model, holder and since when; gone with the block, also when that ends in an error."""
    world = SimulatedWorld()
    manager = inline(world)
    with manager.vlm(holder="reader"), manager.clip(holder="matcher"):
        leases = manager.get_status().leases
        assert [(lease.model, lease.holder, lease.lost) for lease in leases] == [
            ("vlm", "reader", False),
            ("clip", "matcher", False),
        ]
        assert all(lease.since_at <= world.clock.monotonic() for lease in leases)
    assert models(manager) == []
    with pytest.raises(ZeroDivisionError), manager.clip():
        raise ZeroDivisionError
    assert models(manager) == []


def test_a_vlm_lease_brings_the_vlm_in_and_the_second_one_asks_nobody() -> None:
    """The first lease loads; while the VLM is known to be in, leases are taken without any I/O."""
    world = SimulatedWorld()
    manager = inline(world)
    with manager.vlm():
        assert world.vlm_resident()
    asked = len(world.ollama.log)
    with manager.vlm() as vlm:
        assert vlm.model == world.vlm.name
    assert len(world.ollama.log) == asked


def test_a_request_waits_for_the_lease_and_names_its_holder_when_that_takes_too_long() -> None:
    """After `drain_timeout_s` the caller gets `LeaseTimeout` with the holders; state and placement are as before."""
    world = SimulatedWorld()
    manager = inline(world, drain_timeout_s=7)
    manager.set_execution_mode("autopilot")
    other = Elsewhere(manager, "clip", "a long encode")
    began = world.clock.monotonic()
    with pytest.raises(LeaseTimeout) as caught:
        manager.set_execution_mode("recording")
    assert 7 <= world.clock.monotonic() - began < 8
    assert caught.value.waited_s == 7
    assert len(caught.value.holders) == 1
    assert "a long encode" in caught.value.holders[0]
    assert "a long encode" in str(caught.value)
    assert isinstance(caught.value, TimeoutError)
    status = manager.get_status()
    assert (status.state, status.asked_mode.name, world.clip.place) == (State.AUTOPILOT, "AUTOPILOT", "gpu")
    other.end()
    assert manager.set_execution_mode("recording").granted


def test_only_the_model_that_would_move_matters() -> None:
    """A CLIP lease does not stand in the way of an unload, nor a VLM lease in that of a CLIP move."""
    world = SimulatedWorld()
    manager = inline(world)
    manager.set_execution_mode("recording")
    clip = Elsewhere(manager, "clip")
    began = world.clock.monotonic()
    manager.ensure_vlm_unloaded()
    clip.end()
    manager.set_execution_mode("idle")
    vlm = Elsewhere(manager, "vlm")
    manager.migrate_clip_to_gpu()
    assert world.clip.place == "gpu"
    assert world.vlm_resident()
    assert world.clock.monotonic() - began < 10
    vlm.end()


def test_the_gate_closes_to_newcomers_while_a_request_waits() -> None:
    """Who comes later waits behind the request, so that a stream of short leases cannot hold it up for ever."""
    world = SimulatedWorld()
    manager = threaded(world, drain_timeout_s=1000)
    manager.set_execution_mode("autopilot", timeout_s=PATIENCE_S)
    first = Elsewhere(manager, "clip", "first")
    request = manager.submit_execution_mode("recording")
    until(lambda: manager._driver.engine.waiting)
    places: Future[str] = Future()

    def newcomer() -> None:
        with manager.clip(holder="newcomer", timeout_s=PATIENCE_S):
            places.set_result(world.clip.place)

    coming = in_thread(newcomer)
    until(lambda: manager._driver.leases._waiters)
    assert not places.done()
    first.end()
    assert request.result(PATIENCE_S).granted
    coming.result(PATIENCE_S)
    assert places.result() == "cpu"
    manager.close()


def test_a_holder_passes_the_closed_gate() -> None:
    """Who holds a lease already may take another: its own end may depend on it, and waiting would be a deadlock."""
    world = SimulatedWorld()
    manager = threaded(world, drain_timeout_s=1000)
    manager.set_execution_mode("autopilot", timeout_s=PATIENCE_S)
    with manager.clip(holder="outer"):
        other = in_thread(manager.set_execution_mode, "recording")
        until(lambda: manager._driver.engine.waiting)
        with manager.clip(holder="inner", timeout_s=PATIENCE_S) as clip:
            assert clip.encode(["x"]).shape == (1, 32)
        assert not other.done()
    assert other.result(PATIENCE_S).granted
    manager.close()


def test_nobody_passes_while_the_model_moves() -> None:
    """Once the move has begun even a holder of another lease waits for its end."""
    world = SimulatedWorld()
    gate = Gate(world, "clip.to_cpu")
    manager = threaded(world)
    manager.set_execution_mode("autopilot", timeout_s=PATIENCE_S)
    manager.ensure_vlm_loaded(timeout_s=PATIENCE_S)
    with manager.vlm(holder="me"):
        moving = in_thread(manager.set_execution_mode, "recording")
        gate.wait()
        with pytest.raises(OperationTimeout), manager.clip(timeout_s=0.02):
            pytest.fail("CLIP is under way")
        assert models(manager) == ["vlm"]
        gate.open()
        assert moving.result(PATIENCE_S).granted
        with manager.clip(timeout_s=PATIENCE_S) as clip:
            assert clip.device == "cpu"
    manager.close()


@pytest.mark.parametrize(
    ("stands", "model", "call"),
    [
        ("recording", "vlm", lambda manager: manager.set_execution_mode("autopilot")),
        ("recording", "vlm", lambda manager: manager.ensure_vlm_unloaded()),
        ("autopilot", "clip", lambda manager: manager.set_execution_mode("recording")),
        ("idle", "clip", lambda manager: manager.migrate_clip_to_gpu()),
    ],
)
def test_who_asks_to_move_what_it_holds_is_told_at_once(
    stands: str, model: str, call: Callable[[GPUResourceManager], object]
) -> None:
    """`LeaseHeld` without any waiting, with the holder and the mend; afterwards the same call works."""
    world = SimulatedWorld()
    manager = inline(world)
    manager.set_execution_mode(stands)
    with getattr(manager, model)(holder="myself"):
        began = world.clock.monotonic()
        with pytest.raises(LeaseHeld) as caught:
            call(manager)
        assert world.clock.monotonic() - began < 1
        assert "myself" in caught.value.holders[0]
        assert "with" in caught.value.remedy
        assert manager.get_status().execution_mode.value == stands
    call(manager)


def test_only_the_holder_is_told_that_it_holds() -> None:
    """Two ask for the same, the first holds the lease in the way: it is told so at once, the other one waits."""
    world = SimulatedWorld()
    manager = inline(world, drain_timeout_s=60)
    manager.set_execution_mode("autopilot")
    holder = Elsewhere(manager, "clip")
    own = holder.run(manager.submit_execution_mode, "recording")
    other = manager.submit_execution_mode("recording")
    manager.drive_for(1)
    assert isinstance(own.exception(0), LeaseHeld)
    assert not other.done()
    holder.end()
    manager.drive_for(30)
    assert other.result(0).granted


@pytest.mark.parametrize("asks", ["the same", "another model"])
def test_a_holder_is_not_queued_behind_who_waits_for_it(asks: str) -> None:
    """One request waits for a lease; whatever its holder asks then is answered before, or both wait for each other."""
    world = SimulatedWorld()
    manager = inline(world, drain_timeout_s=60)
    manager.set_execution_mode("autopilot")
    holder = Elsewhere(manager, "clip")
    first = manager.submit_execution_mode("recording")
    manager.drive_for(1)
    assert not first.done()
    if asks == "the same":
        own = holder.run(manager.submit_execution_mode, "recording")
        manager.drive_for(1)
        assert isinstance(own.exception(0), LeaseHeld)
    else:
        began = world.clock.monotonic()
        second = manager.vlm(holder="also the holder")
        holder.run(second.__enter__)
        assert world.clock.monotonic() - began < 30
        holder.run(second.__exit__, None, None, None)
    holder.end()
    manager.drive_for(30)
    assert first.result(0).granted


def test_a_lease_that_ended_elsewhere_gives_nobody_a_place_in_front() -> None:
    """Taken here, given back by a callback of somebody else's: who took it waits for its turn like everybody."""
    world = SimulatedWorld()
    manager = inline(world, drain_timeout_s=60)

    def lend() -> None:
        manager.set_execution_mode("autopilot")
        taken = manager.clip(holder="a while ago")
        taken.__enter__()
        contextvars.Context().run(taken.__exit__, None, None, None)
        other = Elsewhere(manager, "clip")
        first = manager.submit_execution_mode("recording")
        second = manager.submit_execution_mode("autopilot")
        manager.drive_for(1)
        assert (first.done(), second.done()) == (False, False)
        other.end()
        manager.drive_for(30)
        assert first.result(0).granted

    contextvars.Context().run(lend)


def test_two_holders_who_wait_do_not_take_turns_for_ever() -> None:
    """Each may pass the other once; then both wait, and nobody asks Ollama again and again meanwhile."""
    world = SimulatedWorld(card_mib=16384)
    manager = inline(world, drain_timeout_s=60)
    manager.set_execution_mode("recording")
    other = Elsewhere(manager, "vlm")
    before = len(world.ollama.log)
    with manager.clip(holder="me"):
        for _ in range(2):
            asked_at = world.clock.monotonic()
            with pytest.raises(OperationTimeout):
                manager.ensure_vlm_unloaded(timeout_s=1.0)
            assert world.clock.monotonic() - asked_at < 1.5
    assert len(world.ollama.log) - before < 5
    other.end()
    manager.drive_for(10)
    assert manager.get_status().queued == 0
    assert not world.vlm_resident()


def test_who_was_displaced_while_it_waited_waits_no_longer_than_its_own_time() -> None:
    """The first is told in time, gives its lease back, and the second gets what it waits for."""
    world = SimulatedWorld(card_mib=16384)
    manager = inline(world, drain_timeout_s=10.0)
    manager.set_execution_mode("autopilot")
    manager.ensure_vlm_loaded()
    first, second = Elsewhere(manager, "clip", "first"), Elsewhere(manager, "vlm", "second")
    asked_at = world.clock.monotonic()
    unload = first.run(lambda: manager._driver.post("vlm_unwanted").future)
    manager.drive_for(8.0)
    recording = second.run(manager.submit_execution_mode, "recording")
    answered: list[float] = []
    unload.add_done_callback(lambda _: answered.append(world.clock.monotonic() - asked_at))
    manager.drive_for(3.0)
    assert isinstance(unload.exception(0), LeaseTimeout)
    assert 10.0 <= answered[0] < 10.5
    first.end()
    manager.drive_for(5.0)
    assert recording.result(0).granted
    second.end()


def test_a_preempting_request_that_was_displaced_throws_out_nobody_who_came_after_it() -> None:
    """The holder of what it waits for asks for something that has to wait, too: neither is superseded."""
    world = SimulatedWorld(card_mib=16384)
    manager = inline(world, drain_timeout_s=10.0)
    manager.set_execution_mode("autopilot")
    manager.ensure_vlm_loaded()
    first, second = Elsewhere(manager, "clip", "first"), Elsewhere(manager, "vlm", "second")
    asked_at, answered = world.clock.monotonic(), []
    preempts = manager.submit_execution_mode("autopilot", preempt=True)
    preempts.add_done_callback(lambda _: answered.append(world.clock.monotonic() - asked_at))
    manager.drive_for(3.0)
    recording = second.run(manager.submit_execution_mode, "recording")
    manager.drive_for(8.0)
    assert isinstance(preempts.exception(0), LeaseTimeout)
    assert 10.0 <= answered[0] < 10.5
    first.end()
    manager.drive_for(5.0)
    assert recording.result(0).granted
    second.end()


def test_who_is_displaced_while_the_manager_closes_hears_of_the_close() -> None:
    """Nobody asked for anything newer."""
    world = SimulatedWorld(card_mib=16384)
    manager = inline(world, drain_timeout_s=10.0)
    manager.set_execution_mode("autopilot")
    manager.ensure_vlm_loaded()
    first, second = Elsewhere(manager, "clip", "first"), Elsewhere(manager, "vlm", "second")
    unload = manager._driver.post("vlm_unwanted").future
    manager.drive_for(1.0)
    second.run(manager.submit_execution_mode, "recording")
    closing: list[Any] = []

    def close(op: str, phase: str) -> None:
        if not closing:
            closing.append(manager._driver.post_close())

    world.on_io.append(close)
    manager.drive_for(1.0)
    assert isinstance(unload.exception(0), ManagerClosed)
    first.end()
    second.end()
    manager.drive_for(60.0)
    assert closing[0].result(0).granted


def test_equal_requests_of_one_holder_wait_each_its_own_time_and_ask_nobody_meanwhile() -> None:
    """They came at different moments, and somebody passed them: each is answered when its own time is over."""
    world = SimulatedWorld(card_mib=16384)
    manager = inline(world, drain_timeout_s=10.0)
    manager.set_execution_mode("autopilot")
    manager.ensure_vlm_loaded()
    first, second = Elsewhere(manager, "clip", "first"), Elsewhere(manager, "vlm", "second")
    began_at, waited = world.clock.monotonic(), []

    def ask(holder: Elsewhere, call: Callable[..., Any], *args: Any) -> None:
        asked_at = world.clock.monotonic()
        future = holder.run(call, *args)
        future.add_done_callback(lambda _: waited.append(world.clock.monotonic() - asked_at))

    for _ in range(2):
        ask(first, lambda: manager._driver.post("vlm_unwanted").future)
        manager.drive_for(5.0 if world.clock.monotonic() < began_at + 1.0 else 0.1)
    ask(second, manager.submit_execution_mode, "recording")
    before = len(world.ollama.log)
    manager.drive_for(30.0)
    assert [round(seconds) for seconds in waited] == [10, 10, 10]
    assert len(world.ollama.log) - before < 20


def test_a_lease_that_ends_in_the_look_of_somebody_elses_request_wakes_who_waits() -> None:
    """That look counted it still; the one who waits for it has not been told."""
    world = SimulatedWorld()
    manager = inline(world, drain_timeout_s=60)
    manager.set_execution_mode("recording")
    vlm, clip = Elsewhere(manager, "vlm"), Elsewhere(manager, "clip")
    waiting = manager.submit_execution_mode("autopilot")
    manager.drive_for(1)
    ends = [vlm, clip]

    def end(op: str, phase: str) -> None:
        while (op, phase) == ("ollama.ps", "before") and ends:
            ends.pop().end()

    passing = clip.run(manager.submit_execution_mode, "recording")
    world.on_io.append(end)
    manager.drive_for(5)
    assert passing.result(0).granted
    assert waiting.result(0).granted


def test_a_lease_that_is_lost_wakes_who_waits() -> None:
    """An emergency takes the VLM away under its lease: the request that waited for that need not wait on."""
    world = SimulatedWorld()
    manager = inline(world, drain_timeout_s=60)
    manager.set_execution_mode("recording")
    lost = Elsewhere(manager, "vlm")
    unwanted = manager._driver.post("vlm_unwanted").future
    manager.drive_for(1)
    assert not unwanted.done()
    manager._driver.report(CudaPoisoned(detail="a broken card"))
    manager.drive_for(1)
    assert unwanted.result(0).granted
    assert not world.vlm_resident()
    lost.end()


def test_a_waiting_request_is_superseded_by_a_preempting_one() -> None:
    """Waiting for leases ends with `Superseded` when something newer comes."""
    world = SimulatedWorld()
    manager = inline(world, drain_timeout_s=60)
    manager.set_execution_mode("autopilot")
    other = Elsewhere(manager, "clip")
    waiting = manager.submit_execution_mode("recording")
    manager.drive_for(1)
    assert not waiting.done()
    assert manager.set_execution_mode("idle", preempt=True).granted
    assert isinstance(waiting.exception(0), Superseded)
    other.end()


def test_a_lease_keeps_the_idle_timer_off() -> None:
    """A leased VLM is not idle, however long nothing is asked of it; after the lease the time runs anew."""
    world = SimulatedWorld()
    manager = inline(world, idle_timeout_s=30)
    manager.set_execution_mode("recording")
    with manager.vlm():
        manager.drive_for(300)
        assert world.vlm_resident()
    manager.drive_for(25)
    assert world.vlm_resident()
    manager.drive_for(20)
    assert not world.vlm_resident()


def test_a_lease_whose_vlm_was_taken_away_is_lost() -> None:
    """Shedding takes the VLM from its holder: the lease is marked, its next call raises `LeaseLost`."""
    world = SimulatedWorld()
    manager = inline(world, pressure_s=5, floor_mib=128)
    manager.set_execution_mode("recording")
    with manager.vlm(holder="unlucky") as vlm:
        world.card.take("a game", world.card.free_mib - 10)
        manager.drive_for(60)
        assert manager.get_status().state is State.DEGRADED
        assert [lease.lost for lease in manager.get_status().leases] == [True]
        with pytest.raises(LeaseLost) as caught:
            vlm.generate("still there?")
        assert "new lease" in caught.value.remedy
        assert caught.value.retryable
    world.card.give_back("a game")
    manager.drive_for(120)
    with manager.vlm() as vlm:
        assert vlm.generate("and now?").done


def test_a_handle_is_dead_after_its_block() -> None:
    """Using the VLM after the lease ended raises `LeaseLost`: nothing would keep it there."""
    manager = inline(SimulatedWorld())
    with manager.vlm() as vlm:
        pass
    with pytest.raises(LeaseLost):
        vlm.generate("too late")


def test_a_lease_that_was_waited_for_too_short_is_not_left_behind() -> None:
    """The waiter's time is over, the VLM comes in later: nobody holds it then."""
    world = SimulatedWorld()
    gate = Gate(world, "ollama.load")
    manager = threaded(world)
    with pytest.raises(OperationTimeout), manager.vlm(timeout_s=0.02):
        pytest.fail("it cannot be in yet")
    gate.open()
    manager.ensure_vlm_loaded(timeout_s=PATIENCE_S)
    assert models(manager) == []
    manager.close()


def test_a_lease_granted_while_its_waiter_gives_up_is_given_back() -> None:
    """Between "I resolve this" and the result lies a moment; a waiter that leaves in it must not leave a lease."""
    world = SimulatedWorld()
    manager = threaded(world)
    book = manager._driver.leases
    future: Future[int] = Future()
    future.set_running_or_notify_cancel()
    with pytest.raises(OperationTimeout):
        manager._lease(future, 0.0, int)
    lease = in_thread(book.ask_clip, "late").result(PATIENCE_S).result(PATIENCE_S)
    future.set_result(lease)
    assert models(manager) == []
    book.release(lease)
    manager.close()


@pytest.mark.parametrize("model", ["vlm", "clip"])
def test_a_move_begins_only_when_nobody_holds_the_model(model: str) -> None:
    """Looking and closing are one step; who comes while it moves waits, and a lease on the other one is no matter."""
    book = LeaseBook(lambda: 0.0, lambda: None)
    other = book.ask_clip("other").result(0) if model == "vlm" else book.grant_vlm("other")
    held = book.grant_vlm("holder") if model == "vlm" else book.ask_clip("holder").result(0)
    assert not book.claim({model})
    book.release(held)
    assert book.claim({model})
    book.vlm_ready(1.0)
    late = book.try_vlm("late") if model == "vlm" else book.ask_clip("late")
    assert late is None or not late.done()
    book.open()
    assert {info.id for info in book.snapshot} >= {other}


def test_a_lease_may_be_released_twice() -> None:
    """Giving back what was given back harms nobody else's lease."""
    manager = inline(SimulatedWorld())
    book = manager._driver.leases
    first, second = book.ask_clip("a").result(), book.ask_clip("b").result()
    book.release(first)
    book.release(first)
    assert [lease.id for lease in manager.get_status().leases] == [second]


def test_without_clip_there_is_no_clip_lease() -> None:
    """`ClipUnavailable` with the mend, at once."""
    manager = inline(SimulatedWorld(clip=False))
    with pytest.raises(ClipUnavailable, match="clip_model"), manager.clip():
        pytest.fail("there is no CLIP")


def test_a_lease_is_named_after_its_thread() -> None:
    """Without a name of its own a lease bears its thread's."""
    manager = inline(SimulatedWorld())
    with manager.clip():
        assert manager.get_status().leases[0].holder == "MainThread"


def test_clip_is_never_moved_under_an_encode() -> None:
    """A mode change asked for in the middle of an encode moves CLIP after it; vectors and world are unharmed."""
    world = SimulatedWorld()
    manager = threaded(world, drain_timeout_s=1000)
    manager.set_execution_mode("autopilot", timeout_s=PATIENCE_S)
    asked: list[Future[Outcome]] = []

    def ask(_: object) -> None:
        if not asked:
            asked.append(in_thread(manager.set_execution_mode, "recording"))
            until(lambda: manager._driver.engine.waiting)

    world.clip.on_encode.append(ask)
    with manager.clip() as clip:
        before = clip.encode(["a screen"])
    assert asked[0].result(PATIENCE_S).granted
    with manager.clip() as clip:
        assert (clip.encode(["a screen"]) == before).all()
    assert world.clip.violations == []
    manager.close()


def test_a_lease_in_the_way_of_a_preempting_request_is_waited_for() -> None:
    """The VLM is on its way out when RECORDING preempts; a leased CLIP then costs a wait, not the mode."""
    world = SimulatedWorld()
    manager = inline(world)
    manager.set_execution_mode("autopilot")
    manager.ensure_vlm_loaded()
    other = Elsewhere(manager, "clip", "a short encode")
    posted: list[Future[Outcome]] = []

    def preempt(op: str, phase: str) -> None:
        if (op, phase) == ("ollama.unload", "after") and not posted:
            posted.append(manager.submit_execution_mode("recording", preempt=True))
            world.clock.after(1.0, other.end)

    world.on_io.append(preempt)
    with pytest.raises(Superseded):
        manager.set_execution_mode("autopilot")
    manager.drive_for(15)
    outcome = posted[0].result(0)
    assert outcome.granted, outcome.reason


@pytest.mark.parametrize("bad", [-0.001, float("nan"), float("inf"), True, "1", object()])
def test_a_bad_time_out_is_refused(bad: Any) -> None:
    """Seconds are a finite number, zero or more; nothing is leased for any other."""
    manager = inline(SimulatedWorld())
    for lease in (manager.vlm, manager.clip):
        with pytest.raises(BadArgument, match="timeout_s"), lease(timeout_s=bad):
            pytest.fail("it was refused")
    assert models(manager) == []


def test_whoever_waits_at_the_end_gets_an_error_of_his_own() -> None:
    """A shared exception object would collect the tracebacks of all who raise it."""
    book = LeaseBook(lambda: 0.0, lambda: None)
    book.drain(["clip"])
    waiting = [book.ask_clip(name) for name in ("one", "another")]
    book.close(lambda: ManagerClosed(detail="closed"))
    first, second = (future.exception(0) for future in waiting)
    assert isinstance(first, ManagerClosed)
    assert isinstance(second, ManagerClosed)
    assert first is not second


def test_a_lease_that_the_garbage_collector_gives_back_waits_for_nothing() -> None:
    """An abandoned stream in a cycle ends at any allocation, also in the middle of granting another lease."""
    armed: list[bool] = []

    def now() -> float:
        if armed:
            gc.collect()  # as the interpreter may do by itself
        return 0.0

    book = LeaseBook(now, lambda: None)

    def stream() -> Iterator[None]:
        lease = book.grant_vlm("stream")
        try:
            yield
        finally:
            book.release(lease)

    enabled = gc.isenabled()
    gc.disable()
    try:
        ring: list[Any] = [stream()]
        next(ring[0])
        ring.append(ring)
        del ring
        armed.append(True)
        lease = in_thread(lambda: book.grant_vlm("another")).result(PATIENCE_S)
        assert [info.id for info in book.snapshot] == [lease]
    finally:
        if enabled:
            gc.enable()


def test_nobody_who_waits_for_a_lease_is_forgotten_when_a_load_of_its_holder_is_preempted() -> None:
    """Each of them is told that it was superseded: the one who waits, and the holder who asked past it."""
    world = SimulatedWorld(vlm_load_s=30.0)
    manager = inline(world, drain_timeout_s=1000.0)
    manager.set_execution_mode("autopilot")
    futures: list[Future[Outcome]] = []

    def another(mode: str, *, preempt: bool = False) -> None:
        futures.append(contextvars.Context().run(manager.submit_execution_mode, mode, preempt=preempt))

    with manager.clip():
        another("recording")
        manager.drive_for(1.0)
        world.clock.after(5.0, lambda: another("autopilot", preempt=True))
        with pytest.raises(Superseded):
            manager.ensure_vlm_loaded()
        manager.drive_for(100.0)
    waited, preempting = futures
    assert preempting.result(0).granted
    assert isinstance(waited.exception(0), Superseded)


def test_an_emergency_leaves_a_leased_clip_where_it_is() -> None:
    """Moving it under an encode would crash the process; it is listed, and goes when the lease has ended."""
    world = SimulatedWorld()
    manager = inline(world, pressure_s=5, floor_mib=128)
    manager.set_execution_mode("autopilot")
    told: list[Event] = []
    manager.subscribe(told.append, Degraded)
    with manager.clip() as clip:
        world.card.take("a game", world.card.free_mib - 10)
        manager.drive_for(60)
        (degraded, *_) = told
        assert isinstance(degraded, Degraded)
        assert "CLIP" in " ".join(degraded.leftovers)
        assert world.clip.place == "gpu"
        assert [lease.lost for lease in manager.get_status().leases] == [False]
        assert clip.encode(["x"]).shape[0] == 1
    manager.drive_for(60)
    assert world.clip.place == "cpu"
