"""Many threads at one manager: every request is answered once, effects come one at a time, the journal is whole."""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from gpu_fsm import GPUResourceManager
from gpu_fsm.errors import GPUFSMError, InternalError, OperationTimeout, Superseded, WouldDeadlock
from gpu_fsm.events import Event
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.states import State
from gpu_fsm.tickets import Outcome
from tests.waiting import PATIENCE_S, Gate, in_thread, journal_is_whole, let_time_pass, threads_of, until
from tests.worlds import inline, threaded

THREADS = 8
REQUESTS = 200
MODES = ("idle", "recording", "autopilot")


class Effects:
    """What the world itself says about effects: when each begins and when it ends."""

    def __init__(self, world: SimulatedWorld) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self.most_at_once = 0
        self.count: Counter[str] = Counter()
        world.on_io.append(self)

    def __call__(self, op: str, phase: str) -> None:
        if phase == "during" or op not in (
            "ollama.load", "ollama.unload", "ollama.renew", "clip.to_gpu", "clip.to_cpu"
        ):  # fmt: skip
            return
        with self._lock:
            if phase == "before":
                self._running += 1
                self.most_at_once = max(self.most_at_once, self._running)
                self.count[op] += 1
            else:
                self._running -= 1


@pytest.fixture
def hasty() -> Iterator[None]:
    """Let threads take turns every ten microseconds instead of every five milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def one_request(manager: GPUResourceManager, rng: random.Random, number: int) -> str:
    """Ask for something; returns how it was answered, in one word."""
    try:
        if number % 3 == 0:
            outcome = manager.set_execution_mode(rng.choice(MODES), preempt=True, timeout_s=PATIENCE_S)
            return "granted" if outcome.granted else "degraded"
        match rng.randrange(6):
            case 0 | 1:
                outcome = manager.set_execution_mode(rng.choice(MODES), timeout_s=PATIENCE_S)
                return "granted" if outcome.granted else "degraded"
            case 2:
                manager.ensure_vlm_loaded(timeout_s=PATIENCE_S)
            case 3:
                manager.ensure_vlm_unloaded(timeout_s=PATIENCE_S)
            case 4:
                with manager.vlm(timeout_s=PATIENCE_S):
                    pass
            case _:
                with manager.clip(timeout_s=PATIENCE_S) as clip:
                    clip.encode(["a screen"])
        return "granted"
    except GPUFSMError as error:
        assert not isinstance(error, InternalError | OperationTimeout), error
        return error.code


def storm(manager: GPUResourceManager) -> Counter[str]:
    """8 threads x 200 requests, a third of them preempting; returns how they were answered."""
    answers: Counter[str] = Counter()
    lock, start = threading.Lock(), threading.Barrier(THREADS)

    def client(seed: int) -> None:
        rng = random.Random(seed)
        start.wait(PATIENCE_S)
        for number in range(REQUESTS):
            answer = one_request(manager, rng, number)
            with lock:
                answers[answer] += 1

    for client_done in [in_thread(client, seed) for seed in range(THREADS)]:
        client_done.result(4 * PATIENCE_S)
    return answers


@pytest.mark.usefixtures("hasty")
def test_a_storm_of_requests_is_answered_once_each_with_one_effect_at_a_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """1600 requests of 8 threads get 1600 answers; effects never overlap; the journal has no gap; nothing degrades."""
    world = SimulatedWorld()
    effects = Effects(world)
    manager = threaded(world, journal_size=1_000_000)
    answers = storm(manager)
    last = manager.set_execution_mode("autopilot", preempt=True, timeout_s=PATIENCE_S)
    status = manager.get_status()
    assert answers.total() == THREADS * REQUESTS
    assert set(answers) <= {"granted", "superseded", "degraded", "lease_timeout"}
    assert answers["granted"] > 0
    assert answers["superseded"] > 0
    assert effects.most_at_once == 1
    assert last.granted, last.reason
    assert (status.queued, status.leases) == (0, ())
    assert not world.vlm_resident()
    assert world.clip.place == "gpu"
    assert world.clip.violations == []
    journal_is_whole(manager)
    # Degraded only for cause, and here is one at most: a CLIP lease in the way of a half-done release.  Virtual time
    # runs out while the thread that holds it waits for its turn in real time.
    degraded_by = {r.row for r in manager.journal if r.dest is State.SHEDDING and r.source is not State.DEGRADED}
    assert degraded_by <= {"aborted"}
    manager.close()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.usefixtures("hasty")
def test_a_storm_that_hits_loads_midway_leaves_the_journal_whole(caplog: pytest.LogCaptureFixture) -> None:
    """Preempting requests in the middle of loads cut them off; nobody is left without an answer, nothing overlaps."""
    world = SimulatedWorld()
    effects = Effects(world)
    manager = threaded(world, journal_size=1_000_000)
    posted, moments = threading.Event(), threading.Semaphore(THREADS)

    def hold_up(op: str, phase: str) -> None:
        if phase == "during":  # in every quarter of a load two clients may post, and get a moment of real time for it
            posted.clear()
            moments.release(2)
            posted.wait(0.02)

    world.on_io.append(hold_up)
    answers: Counter[str] = Counter()
    start = threading.Barrier(THREADS)

    def client(seed: int) -> list[Future[Outcome]]:
        rng = random.Random(1000 + seed)
        start.wait(PATIENCE_S)
        futures = []
        for number in range(REQUESTS):
            assert moments.acquire(timeout=PATIENCE_S)
            mode = "recording" if number % 3 else rng.choice(MODES)
            futures.append(manager.submit_execution_mode(mode, preempt=number % 3 == 0))
            # The superseded make no room for others: else everything is posted in one burst and hits nothing.
            futures[-1].add_done_callback(lambda done: None if done.exception() else moments.release())
            posted.set()
        return futures

    for client_done in [in_thread(client, seed) for seed in range(THREADS)]:
        for future in client_done.result(4 * PATIENCE_S):
            error = future.exception(PATIENCE_S)
            answers["granted" if error is None else getattr(error, "code", repr(error))] += 1
    rows = Counter(record.row for record in manager.journal)
    assert answers.total() == THREADS * REQUESTS
    assert set(answers) == {"granted", "superseded"}
    assert rows["aborted-superseded"] > 0
    assert [entry for entry in world.ollama.log if entry.op == "ollama.load" and "client left" in entry.outcome]
    assert effects.most_at_once == 1
    assert manager.set_execution_mode("recording", timeout_s=PATIENCE_S).granted
    assert world.vlm_resident()
    journal_is_whole(manager)
    manager.close()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_many_identical_requests_at_once_cost_one() -> None:
    """Requests that queue up behind a running load and ask for the same share its one effect."""
    world = SimulatedWorld()
    gate = Gate(world, "ollama.load")
    manager = threaded(world)
    first = in_thread(manager.ensure_vlm_loaded)
    gate.wait()
    others = [in_thread(manager.ensure_vlm_loaded) for _ in range(50)]
    until(lambda: manager.get_status().queued == len(others))
    gate.open()
    for waiter in (first, *others):
        waiter.result(PATIENCE_S)
    assert world.ollama.counts["loads"] == 1
    assert len([record for record in manager.journal if record.trigger == "vlm_wanted"]) == 2
    manager.close()


def test_a_preempting_request_cuts_off_a_load_that_it_does_not_want() -> None:
    """AUTOPILOT with `preempt` in the middle of a load: the load's client leaves, the loser gets `Superseded`."""
    world = SimulatedWorld()
    manager = threaded(world)
    posted: list[Future[Outcome]] = []

    def preempt(op: str, phase: str) -> None:
        if phase == "during" and not posted:
            posted.append(manager.submit_execution_mode("autopilot", preempt=True))

    world.on_io.append(preempt)
    with pytest.raises(Superseded):
        manager.set_execution_mode("recording", timeout_s=PATIENCE_S)
    assert posted[0].result(PATIENCE_S).granted
    assert [entry.op for entry in world.ollama.log if "client left" in entry.outcome] == ["ollama.load"]
    assert world.ollama.counts["loads"] == 0
    assert world.vlm_held_mib() == 0
    manager.close()


def test_a_preempting_request_that_wants_the_vlm_lets_the_load_finish() -> None:
    """Preempting a load with a request that needs the same VLM costs no second load."""
    world = SimulatedWorld()
    manager = threaded(world)
    posted: list[Future[Outcome]] = []

    def preempt(op: str, phase: str) -> None:
        if phase == "during" and not posted:
            posted.append(manager.submit_execution_mode("recording", preempt=True))

    world.on_io.append(preempt)
    with pytest.raises(Superseded):
        manager.ensure_vlm_loaded(timeout_s=PATIENCE_S)
    assert posted[0].result(PATIENCE_S).granted
    assert world.ollama.counts["loads"] == 1
    manager.close()


@pytest.mark.parametrize("then", ["idle", "recording"])
def test_memory_on_its_way_back_is_not_a_shortage(then: str) -> None:
    """A release that a newer request interrupts still returns its memory; who asks in that moment is not degraded.

    The VLM is asked out, and in again by a preempting request (directly, or by one that comes after a preempting
    IDLE) while Ollama denies it already and the driver still counts its bytes.
    """
    world = SimulatedWorld(reclaim_s=0.3)
    manager = inline(world)
    manager.set_execution_mode("recording")
    posted: list[Future[Outcome]] = []

    def preempt(op: str, phase: str) -> None:
        if (op, phase) == ("ollama.unload", "after") and not posted:
            posted.append(manager.submit_execution_mode(then, preempt=True))

    world.on_io.append(preempt)
    with pytest.raises(Superseded):
        manager.set_execution_mode("autopilot")
    outcome = manager.set_execution_mode("recording")
    assert outcome.granted, outcome.reason


def test_a_lease_that_ends_right_after_it_was_counted_ends_the_waiting() -> None:
    """Counting leases and waiting for them is one step: no end may slip in between and be slept through."""
    world = SimulatedWorld()
    manager = inline(world, drain_timeout_s=60)
    manager.set_execution_mode("autopilot")
    lease = manager._driver.leases.ask_clip("elsewhere").result()
    real = world.clock.monotonic

    def ends_now() -> float:
        # The clock is read when the row is written down: after the count, before the driver goes to sleep.
        if manager._driver.leases.holders().clip and manager._driver.leases._draining:
            manager._driver.leases.release(lease)
        return real()

    world.clock.monotonic = ends_now  # type: ignore[method-assign]
    began = real()
    assert manager.set_execution_mode("recording").granted
    assert real() - began < 30


def test_requests_are_served_in_the_order_they_came() -> None:
    """First in, first out: the modes entered follow the order of asking."""
    world = SimulatedWorld()
    gate = Gate(world, "probe.read")
    manager = threaded(world)
    gate.wait()
    asked = ["recording", "autopilot", "idle", "recording", "idle", "autopilot"]
    futures = [manager.submit_execution_mode(mode) for mode in asked]
    gate.open()
    outcomes = [future.result(PATIENCE_S) for future in futures]
    assert [outcome.state.value for outcome in outcomes] == asked
    entered = [record.dest.value for record in manager.journal if record.row.startswith("landed-")]
    assert entered == asked
    manager.close()


def test_a_time_out_ends_the_waiting_and_not_the_load() -> None:
    """`timeout_s` raises `OperationTimeout` with the time; the load goes on and is there for the next caller."""
    world = SimulatedWorld()
    gate = Gate(world, "ollama.load")
    manager = threaded(world)
    with pytest.raises(OperationTimeout) as caught:
        manager.ensure_vlm_loaded(timeout_s=0.01)
    assert caught.value.timeout_s == 0.01
    assert isinstance(caught.value, TimeoutError)
    gate.wait()
    gate.open()
    manager.ensure_vlm_loaded(timeout_s=PATIENCE_S)
    assert world.ollama.counts["loads"] == 1
    manager.close()


def test_a_time_out_of_zero_asks_without_waiting() -> None:
    """Zero seconds is an answer now or `OperationTimeout`; the request stands all the same."""
    world = SimulatedWorld()
    gate = Gate(world, "ollama.load")
    manager = threaded(world)
    with pytest.raises(OperationTimeout):
        manager.set_execution_mode("recording", timeout_s=0)
    gate.open()
    assert manager.set_execution_mode("recording", timeout_s=PATIENCE_S).granted
    assert world.ollama.counts["loads"] == 1
    manager.close()


def test_a_blocking_call_from_the_driver_s_own_thread_would_deadlock() -> None:
    """A future's callback may run in the driver's thread: a blocking call there raises `WouldDeadlock`."""
    world = SimulatedWorld()
    gate = Gate(world, "probe.read")
    manager = threaded(world)
    gate.wait()
    calls = (
        lambda: manager.set_execution_mode("idle"),
        manager.ensure_vlm_loaded,
        manager.ensure_vlm_unloaded,
        manager.migrate_clip_to_cpu,
    )
    raised: Future[list[type[BaseException] | None]] = Future()

    def try_all(done: Future[Outcome]) -> None:
        kinds: list[type[BaseException] | None] = []
        for call in calls:
            try:
                call()
            except WouldDeadlock as error:
                assert error.remedy
                kinds.append(type(error))
        raised.set_result(kinds)

    manager.submit_execution_mode("recording").add_done_callback(try_all)
    gate.open()
    assert raised.result(PATIENCE_S) == [WouldDeadlock] * len(calls)
    assert manager.set_execution_mode("autopilot", timeout_s=PATIENCE_S).granted
    manager.close()


def test_submitting_from_the_driver_s_own_thread_is_allowed() -> None:
    """What does not wait cannot deadlock: a callback may submit the next request."""
    world = SimulatedWorld()
    manager = threaded(world)
    chained: Future[Future[Outcome]] = Future()
    first = manager.submit_execution_mode("recording")
    first.add_done_callback(lambda _: chained.set_result(manager.submit_execution_mode("autopilot")))
    assert chained.result(PATIENCE_S).result(PATIENCE_S).state is State.AUTOPILOT
    manager.close()


def test_a_listener_may_block_on_the_manager_since_it_runs_elsewhere() -> None:
    """Listeners have a thread of their own, so a blocking call in one is served."""
    world = SimulatedWorld()
    manager = threaded(world)
    answered: Future[Outcome] = Future()

    def answer(event: Event) -> None:
        if not answered.done():
            answered.set_result(manager.set_execution_mode("autopilot", timeout_s=PATIENCE_S))

    manager.subscribe(answer, "mode_changed")
    manager.set_execution_mode("recording", timeout_s=PATIENCE_S)
    assert answered.result(PATIENCE_S).state is State.AUTOPILOT
    manager.close()


def test_a_driver_that_waits_for_a_timer_is_woken_by_the_clock_and_by_requests() -> None:
    """Idle unloading needs no caller: virtual time alone brings it about; a request is served at once."""
    world = SimulatedWorld()
    manager = threaded(world, idle_timeout_s=30)
    gone: Future[Event] = Future()
    manager.subscribe(gone.set_result, "idle_unload")
    manager.set_execution_mode("recording", timeout_s=PATIENCE_S)
    let_time_pass(world, gone, step_s=0.5)
    assert not world.vlm_resident()
    manager.ensure_vlm_loaded(timeout_s=PATIENCE_S)
    assert world.vlm_resident()
    manager.close()


def test_several_threads_may_share_an_inline_manager() -> None:
    """An inline driver is driven by whoever waits; several may wait at once and each gets its answer."""
    world = SimulatedWorld()
    effects = Effects(world)
    manager = inline(world)
    waiters = [in_thread(manager.set_execution_mode, MODES[n % 3]) for n in range(24)]
    for n, waiter in enumerate(waiters):
        assert waiter.result(PATIENCE_S).state.value == MODES[n % 3]
    assert effects.most_at_once == 1
    journal_is_whole(manager)


def test_a_manager_has_two_threads_however_many_wait() -> None:
    """One thread drives, one calls listeners; a waiter brings its own."""
    world = SimulatedWorld()
    before = set(threading.enumerate())  # some of them may be ending
    manager = threaded(world)
    assert threads_of(manager) == ["gpu_fsm-driver", "gpu_fsm-events"]
    for _ in range(100):
        manager.submit_execution_mode("recording")
    assert len(set(threading.enumerate()) - before) == 2
    manager.close()
    assert threads_of(manager) == []


def test_a_driver_that_was_torn_out_of_a_step_goes_on_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    """A `SystemExit` in the driver's own thread: whoever waits is answered, without another request."""
    world = SimulatedWorld()
    manager = threaded(world)

    def strike(op: str, phase: str) -> None:
        if (op, phase) == ("ollama.load", "before"):
            world.on_io.remove(strike)
            raise SystemExit

    world.on_io.append(strike)
    future = manager.submit_execution_mode("recording")
    assert not future.result(PATIENCE_S).granted
    assert "defect" in caplog.text
    manager.close()
