"""The catalogue's rows of concurrency and time, and what a search of public trackers added: one row, one story.

What a story shows is compared with the table in `fault_rows.py`: where the manager stands at its end, which error a
caller got first, which event told of it.  The other groups have files of their own; that none is missing is the last
test here.
"""

from __future__ import annotations

import ast
import asyncio
import functools
import gc
import logging
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import attrs
import pytest

from gpu_fsm import GPUResourceManager, State
from gpu_fsm.cardlock import CardLock
from gpu_fsm.errors import CardHeld, ConfigError, GPUFSMError, OperationTimeout
from gpu_fsm.events import Event, ForeignEvicted, IdleUnload, ModeChanged, ResourceChanged
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.simulation import VLM, SimulatedWorld
from gpu_fsm.states import STEPS
from gpu_fsm.status import Answer, GPUResourceStatus, Holder
from tests import worlds
from tests.counts import Counts
from tests.fault_rows import GROUPS, ROWS, Row
from tests.ollama_clients import FINAL, LOADED, client, entry, load, ps
from tests.raw_server import http, serving
from tests.waiting import PATIENCE_S, ROOT, Gate, in_thread, journal_is_whole, threads_of, until

Story = Callable[["Stage"], None]

PHASES = ("before", "during", "after")
OURS = ("before", "after")
"""The phases that run in our own code; "during" is the server's, in which nobody presses Ctrl-C."""


class Stage:
    """Where a story plays; it keeps what the table is compared with."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        self.tmp_path, self.monkeypatch, self.caplog = tmp_path, monkeypatch, caplog
        self.errors: list[str] = []
        self.events: list[Event] = []
        self._made: list[tuple[SimulatedWorld, GPUResourceManager]] = []

    @property
    def manager(self) -> GPUResourceManager:
        """The newest one; the table's state is its."""
        return self._made[-1][1]

    def inline(self, world: SimulatedWorld, **settings: Any) -> GPUResourceManager:
        """A manager that is driven by whoever waits."""
        return self._keep(world, worlds.inline(world, **settings))

    def threaded(self, world: SimulatedWorld, **settings: Any) -> GPUResourceManager:
        """A manager with its own driver."""
        return self._keep(world, worlds.threaded(world, **settings))

    def _keep(self, world: SimulatedWorld, manager: GPUResourceManager) -> GPUResourceManager:
        manager.subscribe(self.events.append)
        self._made.append((world, manager))
        return manager

    def attempt(self, call: Callable[[], object]) -> BaseException | None:
        """Do what may be refused, and keep the error."""
        try:
            call()
        except (GPUFSMError, KeyboardInterrupt) as error:
            self.errors.append(type(error).__name__)
            return error
        return None

    def of_kind(self, kind: type[Event]) -> list[Any]:
        """The events of one kind, in order."""
        return [event for event in self.events if isinstance(event, kind)]

    def state(self) -> str:
        """Where the newest manager stands, in the table's words; nothing where no manager was made."""
        if not self._made:
            return ""
        status = self.manager.get_status()
        return status.state.name + (f"({status.reason.code})" if status.reason else "")

    def compare(self, row: Row) -> None:
        """The table's words are the story's."""
        self._wait_for_events(row)
        seen = (self.state(), self.errors[0] if self.errors else "")
        assert seen == (row.state, row.error)
        kinds = {event.kind for event in self.events}
        assert not row.event or row.event in kinds
        assert ("degraded" in kinds) == ("DEGRADED" in row.state or row.event in ("degraded", "recovered"))
        if self._made:
            self._everything_was_told()

    def _wait_for_events(self, row: Row) -> None:
        if self._made and threads_of(self.manager) and row.event:
            until(lambda: any(event.kind == row.event for event in self.events))

    def _everything_was_told(self) -> None:
        """The last mode told is the mode that stands; the memory told is no further off than the threshold."""
        status, modes, told = self.manager.get_status(), self.of_kind(ModeChanged), self.of_kind(ResourceChanged)
        if len(self._made) > 1:
            return  # the events of several managers are one list
        if threads_of(self.manager) and modes:
            until(lambda: self.of_kind(ModeChanged)[-1].new is status.execution_mode)
            return
        if modes and not status.closed:
            assert modes[-1].new is status.execution_mode
        if told and status.vram.free_mib is not None and told[-1].free_mib is not None:
            assert abs(told[-1].free_mib - status.vram.free_mib) < self.manager.config.resource_event_mib

    def clear(self) -> None:
        """Heal and close whatever was made."""
        while self._made:
            world, manager = self._made.pop()
            world.on_io.clear()
            world.faults.heal()
            manager.close()


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Stage]:
    """A stage that is cleared afterwards."""
    stage = Stage(tmp_path, monkeypatch, caplog)
    yield stage
    stage.clear()


STORIES: dict[str, Story] = {}
TORCH: set[str] = set()
"""Rows whose story needs torch."""
DEFECTS: dict[str, str] = {}
"""Rows that do not hold yet, and why."""


def row(id: str, *, torch: bool = False, defect: str = "") -> Callable[[Story], Story]:  # noqa: A002
    """Make a function the story of a row."""

    def put(story: Story) -> Story:
        assert id not in STORIES
        STORIES[id] = story
        if torch:
            TORCH.add(id)
        if defect:
            DEFECTS[id] = defect
        return story

    return put


def run(body: Coroutine[Any, Any, None]) -> None:
    """A story of tasks, bounded."""

    async def whole() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await body

    asyncio.run(whole())


def at_moment(world: SimulatedWorld, n: int, act: Callable[[], object], phases: tuple[str, ...] = PHASES) -> list[str]:
    """Have something happen at the n-th moment before, in or after an I/O call; the list grows with the moments."""
    seen: list[str] = []

    def hook(op: str, phase: str) -> None:
        if phase in phases:
            seen.append(op)
            if len(seen) == n:
                act()

    world.on_io.append(hook)
    return seen


def moments(story: Callable[[SimulatedWorld, GPUResourceManager], object], phases: tuple[str, ...] = PHASES) -> range:
    """The moments of a story, from 1 on."""
    world = SimulatedWorld()
    manager = worlds.inline(world)
    seen = at_moment(world, 0, lambda: None, phases)
    story(world, manager)
    last = len(seen)
    manager.close()
    return range(1, last + 1)


# --- D: concurrency and life cycle ------------------------------------------------------------------------------------


@row("D01")
def modes_race(stage: Stage) -> None:
    """Three clients in three threads: each future resolves, in the order of asking, and the last one wins."""
    world = SimulatedWorld()
    manager, order, answers = stage.threaded(world), list[str](), list[Future[Any]]()
    gate = Gate(world, "ollama.load")
    for mode in ("recording", "autopilot", "idle"):
        answers.append(in_thread(manager.submit_execution_mode, mode).result(PATIENCE_S))
        answers[-1].add_done_callback(lambda done: order.append(done.result().asked))
        gate.wait()
    gate.open()
    outcomes = [answer.result(PATIENCE_S) for answer in answers]
    assert all(outcome.granted for outcome in outcomes)
    assert order == ["RECORDING", "AUTOPILOT", "IDLE"]
    until(lambda: len(stage.of_kind(ModeChanged)) == 3)
    assert [event.new.name for event in stage.of_kind(ModeChanged)] == order
    journal_is_whole(manager)


@row("D03")
def idle_timer_under_use(stage: Stage) -> None:
    """An answer that takes longer than the idle time-out, and a request that waits when the timer is due.

    The wait for the idle time-out begins anew when the use ends, so the VLM goes then and not before.
    """
    world = SimulatedWorld(generate_s=100.0)
    manager = stage.inline(world, idle_timeout_s=20.0)
    manager.set_execution_mode("recording")
    with manager.vlm() as vlm:
        vlm.generate("a long story")
    ended = world.clock.monotonic()
    assert stage.of_kind(IdleUnload) == []
    assert world.ollama.counts["loads"] == 1
    # A request for it is in the mailbox at the moment in which the timer is due.
    world.clock.advance(20.0)
    asked = manager._driver.post("vlm_wanted").future
    manager.drive_for(0.5)
    assert asked.done()
    assert world.ollama.counts["loads"] == 1
    assert stage.of_kind(IdleUnload) == []
    manager.drive_for(60.0)
    assert [event.at > ended + 20.0 for event in stage.of_kind(IdleUnload)] == [True]
    assert not world.vlm_resident()


@row("D04")
def callbacks_raise(stage: Stage) -> None:
    """A done-callback that raises, and an adapter with a defect in the middle of a step.

    What was asked afterwards is served.  The mode in whose step the adapter raised is not given, with a reason and the
    way back; nothing of the step is half done.
    """
    world = SimulatedWorld()
    manager = stage.inline(world)
    stage.caplog.set_level(logging.CRITICAL, "concurrent.futures")

    def raises(_: Future[Any]) -> None:
        raise ZeroDivisionError("a callback of the user")

    first, second = manager.submit_execution_mode("recording"), manager.submit_execution_mode("autopilot")
    first.add_done_callback(raises)
    manager.drive_for(60.0)
    assert (first.result(0).granted, second.result(0).granted) == (True, True)

    real = world.clip.to_cpu
    broken = [True]

    def to_cpu() -> None:
        if broken.pop() if broken else False:
            raise ZeroDivisionError("a defect of the adapter")
        real()

    stage.monkeypatch.setattr(world.clip, "to_cpu", to_cpu)
    third, fourth = manager.submit_execution_mode("recording"), manager.submit_execution_mode("autopilot")
    manager.drive_for(120.0)
    assert not third.result(0).granted
    assert "ZeroDivisionError" in str(third.result(0).reason)
    assert fourth.result(0).granted
    assert (world.clip.place, world.vlm_resident()) == ("gpu", False)


@row("D05")
def return_after_the_work(stage: Stage) -> None:
    """From another thread, while something is under way: the call returns when the world is as asked."""
    world = SimulatedWorld()
    manager = stage.threaded(world)
    gate = Gate(world, "ollama.load")
    first = in_thread(manager.set_execution_mode, "recording")
    gate.wait()
    seen: list[tuple[str, bool]] = []
    asked = manager.submit_execution_mode("autopilot")
    asked.add_done_callback(lambda _: seen.append((world.clip.place, world.vlm_resident())))
    waiting = in_thread(manager.set_execution_mode, "autopilot")
    assert not asked.done()
    assert not waiting.done()
    gate.open()
    assert first.result(PATIENCE_S).granted
    assert waiting.result(PATIENCE_S).granted
    assert seen == [("gpu", False)]


@row("D06")
def second_request_waits(stage: Stage) -> None:
    """In every quarter of a load another mode is asked for: the load is finished, counted once, and then left."""
    for quarter in (1, 2, 3, 4):
        world = SimulatedWorld()
        manager = stage.inline(world)
        late: list[Future[Any]] = []
        ask = functools.partial(manager.submit_execution_mode, "autopilot")
        at_moment(world, quarter, lambda late=late, ask=ask: late.append(ask()), ("during",))  # type: ignore[misc]
        assert manager.set_execution_mode("recording").granted
        manager.drive_for(60.0)
        assert late[0].result(0).granted
        assert (world.ollama.counts["loads"], world.ollama.counts["load_aborts"]) == (1, 0)


@row("D07")
def cancellation_comes_out(stage: Stage) -> None:
    """Every verb, cancelled while it waits, ends as cancelled; and its own time limit ends as its own error."""
    world = SimulatedWorld()
    manager = stage.threaded(world)
    gate = Gate(world, "ollama.load")

    async def body() -> None:
        aio = manager.aio

        async def hold(lease: Any) -> None:
            async with lease:
                pass

        begun = asyncio.create_task(aio.set_execution_mode("recording"))
        while not gate.reached.is_set():
            await asyncio.sleep(0.001)
        verbs: dict[str, Callable[..., Coroutine[Any, Any, Any]]] = {
            "set_execution_mode": lambda **more: aio.set_execution_mode("recording", **more),
            "ensure_vlm_loaded": aio.ensure_vlm_loaded,
            "ensure_vlm_unloaded": aio.ensure_vlm_unloaded,
            "migrate_clip_to_cpu": aio.migrate_clip_to_cpu,
            "vlm": lambda **more: hold(aio.vlm(**more)),
        }
        for name, verb in verbs.items():
            task = asyncio.create_task(verb())
            await asyncio.sleep(0.002)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelled(), name
            with pytest.raises(TimeoutError) as outside:
                async with asyncio.timeout(0.002):
                    await verb()
            assert not isinstance(outside.value, GPUFSMError), name
            with pytest.raises(OperationTimeout) as own:
                await verb(timeout_s=0.002)
            stage.errors.append(type(own.value).__name__)
        gate.open()
        assert (await begun).granted
        assert (await aio.set_execution_mode("recording")).granted

    run(body())
    assert manager.get_status().leases == ()


@row("D08")
def no_half_transitions(stage: Stage) -> None:
    """Three clients, and somebody who looks at every moment: one writer, and every snapshot agrees with itself."""
    world = SimulatedWorld()
    manager = stage.threaded(world)
    writers: Counter[int] = Counter()
    snapshots: list[GPUResourceStatus] = []

    def look(op: str, phase: str) -> None:
        if not op.startswith("clip.encode"):
            writers[threading.get_ident()] += 1
        snapshots.append(manager.get_status())

    world.on_io.append(look)

    def ask() -> None:
        for mode in ("recording", "autopilot", "recording"):
            manager.set_execution_mode(mode, timeout_s=PATIENCE_S)

    for client_ in [in_thread(ask) for _ in range(3)]:
        client_.result(PATIENCE_S)
    assert manager.set_execution_mode("recording", timeout_s=PATIENCE_S).granted
    assert len(writers) == 1
    for status in snapshots:
        assert (status.state is State.DEGRADED) == (status.execution_mode.value == "degraded")
        assert status.state in STEPS or status.state.value == status.execution_mode.value
        assert status.reason is None
    journal_is_whole(manager)


@row("D09")
def evil_listeners(stage: Stage) -> None:
    """One raises, one blocks, one asks for a mode: the machine waits for none of them."""
    world = SimulatedWorld()
    manager = stage.threaded(world)
    stage.caplog.set_level(logging.CRITICAL, "gpu_fsm")
    release, blocked, asked = threading.Event(), threading.Event(), list[Future[Any]]()

    def raises(event: Event) -> None:
        raise ZeroDivisionError(event.kind)

    def blocks(event: Event) -> None:
        blocked.set()
        assert release.wait(PATIENCE_S)

    def asks(event: Event) -> None:
        if isinstance(event, ModeChanged) and event.new.name == "AUTOPILOT":
            asked.append(manager.submit_execution_mode("idle"))
            assert asked[0].result(PATIENCE_S).granted  # it may even wait: it does not run on the driver's thread

    for listener in (raises, blocks, asks):
        manager.subscribe(listener, "mode_changed")
    for mode in ("recording", "autopilot"):
        assert manager.set_execution_mode(mode, timeout_s=PATIENCE_S).granted
    assert blocked.wait(PATIENCE_S)
    assert asked == []
    release.set()
    until(lambda: asked and asked[0].done())
    until(lambda: manager.get_status().listener_errors >= 3)


@row("D10")
def caller_cancelled(stage: Stage) -> None:
    """The waiter is cancelled at each I/O call of its operation: the next call works, no lease is left, none stuck.

    A request that has not begun is served all the same: what was asked for is not taken back by losing interest.
    """
    for n in moments(lambda _, manager: manager.set_execution_mode("recording")):
        world = SimulatedWorld()
        manager = stage.threaded(world)

        async def body(n: int = n, world: SimulatedWorld = world, manager: GPUResourceManager = manager) -> None:
            loop, struck = asyncio.get_running_loop(), asyncio.Event()

            async def hold() -> None:
                async with manager.aio.vlm():
                    await asyncio.sleep(0)

            tasks = [asyncio.create_task(manager.aio.set_execution_mode("recording")), asyncio.create_task(hold())]

            def cancel() -> None:
                for task in tasks:
                    task.cancel()
                struck.set()

            at_moment(world, n, lambda: loop.call_soon_threadsafe(cancel))
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (await manager.aio.set_execution_mode("autopilot")).granted

        run(body())
        assert manager.get_status().leases == ()
        assert (world.clip.place, world.vlm_resident()) == ("gpu", False)
        journal_is_whole(manager)


@row("D11")
def two_limits(stage: Stage) -> None:
    """The task's limit and the call's own: the nearer one fires, and a lease granted in that moment is given back."""
    world = SimulatedWorld()
    manager = stage.threaded(world)
    gate = Gate(world, "ollama.load")

    async def body() -> None:
        aio = manager.aio
        with pytest.raises(OperationTimeout) as own:
            async with asyncio.timeout(PATIENCE_S):
                await aio.ensure_vlm_loaded(timeout_s=0.01)
        stage.errors.append(type(own.value).__name__)
        with pytest.raises(TimeoutError) as outer:
            await asyncio.wait_for(aio.ensure_vlm_loaded(timeout_s=PATIENCE_S), 0.01)
        assert not isinstance(outer.value, OperationTimeout)

        async def lease() -> None:
            async with aio.vlm(timeout_s=0.01):
                pytest.fail("it is still being loaded")

        with pytest.raises(OperationTimeout):
            await lease()

        def blocking() -> None:
            with manager.vlm(timeout_s=0.01):
                pytest.fail("it is still being loaded")

        with pytest.raises(OperationTimeout):
            await asyncio.to_thread(blocking)
        gate.open()
        await aio.ensure_vlm_loaded()

    run(body())
    assert world.ollama.counts["loads"] == 1
    until(lambda: manager.get_status().leases == ())


@row("D12")
def closed_at_any_moment(stage: Stage) -> None:
    """`close` at every I/O call of two switches with a queue: all are answered, nothing of ours stays."""

    def asking(world: SimulatedWorld, manager: GPUResourceManager) -> list[Future[Any]]:
        futures = [manager.submit_execution_mode(mode) for mode in ("recording", "autopilot", "recording")]
        futures.append(manager._driver.post("vlm_unwanted").future)
        manager.drive_for(60.0)
        return futures

    for n in moments(asking):
        world = SimulatedWorld()
        manager = stage.inline(world)
        at_moment(world, n, manager._driver.post_close)
        futures = asking(world, manager)
        began = world.clock.monotonic()
        assert manager.close() == ()
        assert world.clock.monotonic() - began < 60
        assert all(future.done() for future in futures)
        for future in futures:
            stage.attempt(future.result)
        assert (world.vlm_held_mib(), world.clip.place) == (0, "cpu")
    assert set(stage.errors) == {"ManagerClosed"}


@row("D14")
def interrupted_at_any_moment(stage: Stage) -> None:
    """Ctrl-C at every I/O call of switches, an answer and an encode: it comes out, and the machine is whole."""

    def working(_: SimulatedWorld, manager: GPUResourceManager) -> None:
        manager.set_execution_mode("recording")
        with manager.vlm() as vlm:
            vlm.generate("x")
        manager.set_execution_mode("autopilot")
        with manager.clip() as clip:
            clip.encode(["x"])
        with manager.vlm():  # out by now, so it is waited for
            pass

    def strike() -> None:
        raise KeyboardInterrupt

    for n in moments(working, OURS):
        world = SimulatedWorld()
        manager = stage.inline(world)
        at_moment(world, n, strike, OURS)
        stage.attempt(lambda world=world, manager=manager: working(world, manager))  # type: ignore[misc]
        world.on_io.clear()
        manager.drive_for(10.0)
        assert manager.get_status().leases == (), n
        for mode in ("recording", "autopilot"):
            assert manager.set_execution_mode(mode).granted, n
        assert (world.clip.place, world.vlm_resident(), world.clip.violations) == ("gpu", False, [])
        assert manager.get_status().leases == ()


@row("D15")
def two_programs_one_card(stage: Stage) -> None:
    """A lock by the card's UUID, held by another process until that ends, however it does."""
    stage.monkeypatch.setenv("XDG_RUNTIME_DIR", str(stage.tmp_path))
    stage.tmp_path.chmod(0o700)
    code = (
        "import sys\nfrom gpu_fsm.cardlock import CardLock\nlock = CardLock()\nlock.watch('GPU-two')\n"
        "lock.permit()\nprint('held', flush=True)\nsys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert other.stdin is not None
    assert other.stdout is not None
    with other:
        assert other.stdout.readline() == "held\n"
        mine, elsewhere = CardLock(), CardLock()
        mine.watch("GPU-two")
        met = stage.attempt(mine.permit)
        assert isinstance(met, CardHeld)
        assert (met.pid, met.device_uuid) == (other.pid, "GPU-two")
        elsewhere.watch("GPU-another")
        elsewhere.permit()
        other.kill()
        other.wait(PATIENCE_S)
        mine.permit()
    for lock in (mine, elsewhere):
        lock.close()


@row("D17")
def two_loops_two_threads(stage: Stage) -> None:
    """At once, with the same objects: whoever asks is served, in whatever loop or thread."""
    world = SimulatedWorld()
    manager = stage.threaded(world)
    start, served = threading.Barrier(4), list[str]()

    def from_a_thread() -> None:
        start.wait(PATIENCE_S)
        for _ in range(5):
            assert manager.set_execution_mode("autopilot", timeout_s=PATIENCE_S).granted
            with manager.clip() as clip:
                clip.encode(["x"])
        served.append("thread")

    def from_a_loop() -> None:
        start.wait(PATIENCE_S)

        async def body() -> None:
            for _ in range(5):
                assert (await manager.aio.set_execution_mode("autopilot")).granted
                async with manager.aio.clip() as clip:
                    await clip.encode(["x"])

        run(body())
        served.append("loop")

    for user in [in_thread(who) for who in (from_a_thread, from_a_loop, from_a_thread, from_a_loop)]:
        user.result(PATIENCE_S)
    assert sorted(served) == ["loop", "loop", "thread", "thread"]
    assert world.clip.encodes == 20


@row("D18")
def the_loop_goes_on(stage: Stage) -> None:
    """While CLIP moves and cannot be disturbed the loop makes its rounds: half of them within 50 ms at the least."""
    world = SimulatedWorld()
    manager = stage.threaded(world)
    gate = Gate(world, "clip.to_gpu")
    lags: list[float] = []

    async def body() -> None:
        moving = asyncio.create_task(manager.aio.set_execution_mode("autopilot"))
        while not gate.reached.is_set():
            await asyncio.sleep(0.001)
        for _ in range(50):
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - before)
            assert not moving.done()
            assert manager.get_status().state is State.MIGRATING
        gate.open()
        assert (await moving).granted

    run(body())
    assert sorted(lags)[len(lags) // 2] < 0.05


@row("D20")
def nobody_refers_to_it(stage: Stage) -> None:
    """No reference is kept to a future, a task or the manager's face, and the collector runs all the time."""
    world = SimulatedWorld()
    manager = stage.threaded(world)

    def collect(op: str, phase: str) -> None:
        gc.collect(1)

    world.on_io.append(collect)

    async def body() -> None:
        manager.submit_execution_mode("recording")
        asyncio.get_running_loop().call_soon(lambda: manager.submit_execution_mode("autopilot") and None)
        while manager.get_status().execution_mode.name != "AUTOPILOT":
            gc.collect()
            await asyncio.sleep(0.002)

    run(body())
    assert (world.ollama.counts["loads"], world.clip.place) == (1, "gpu")


# --- E: time ----------------------------------------------------------------------------------------------------------


@row("E01")
def wall_clock_jumps(stage: Stage) -> None:
    """Our wall clock jumps by days and the server's is years off: the same journal, to the microsecond."""

    def story(manager: GPUResourceManager) -> list[tuple[float, str]]:
        manager.set_execution_mode("recording")
        with manager.vlm() as vlm:
            vlm.generate("x")
        manager.drive_for(100.0)
        return [(round(record.at, 6), record.row) for record in manager.journal]

    straight = story(stage.inline(SimulatedWorld(), idle_timeout_s=30.0))
    offsets = iter(86400.0 * math.sin(n) * 1e3 for n in range(10**6))
    real = time.time
    for epoch_s in (0.0, 4e9):
        world = SimulatedWorld()
        world.ollama.epoch_s = epoch_s
        with stage.monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: real() + next(offsets))
            assert story(stage.inline(world, idle_timeout_s=30.0)) == straight


@row("E03")
def timers_are_late(stage: Stage) -> None:
    """Nobody drives for a minute: what was due happens once, after a look; in between nothing drifts."""
    world = SimulatedWorld()
    manager = stage.inline(world, idle_timeout_s=30.0)
    manager.set_execution_mode("recording")
    world.clock.advance(60.0)
    manager.drive_for(5.0)
    assert len(stage.of_kind(IdleUnload)) == 1
    assert (world.vlm_resident(), world.ollama.counts["loads"]) == (False, 1)
    # Late, and used in the meantime: it is looked at again and not done.
    used = SimulatedWorld()
    second = stage.inline(used, idle_timeout_s=30.0)
    second.set_execution_mode("recording")
    with second.vlm():
        used.clock.advance(3600.0)
    second.drive_for(25.0)
    assert used.vlm_resident()
    assert len(stage.of_kind(IdleUnload)) == 1
    # No drift: looks come as often in the last of a hundred periods as in the first.
    calm = SimulatedWorld()
    third = stage.inline(calm, idle_timeout_s=1e5, check_interval_s=10.0)
    third.set_execution_mode("recording")
    looks: list[float] = []
    calm.on_io.append(
        lambda op, phase: looks.append(calm.clock.monotonic()) if (op, phase) == ("ollama.ps", "before") else None
    )
    third.drive_for(1000.0)
    assert 95 <= len({round(at) // 10 for at in looks}) <= 101


BAD: tuple[Any, ...] = (-1, -0.001, math.nan, math.inf, -math.inf, True, False, "5", b"1", [1], 1j)


@row("E04")
def odd_limits(stage: Stage) -> None:
    """Refused as `BadArgument`, before anything is asked; 0 asks and does not wait; None waits.

    A call's argument is no setting, so it is not a `ConfigError`; the settings' own numbers raise that.
    """
    world = SimulatedWorld()
    manager = stage.inline(world)
    for bad in BAD:
        for call in (
            lambda limit: manager.set_execution_mode("recording", timeout_s=limit),
            lambda limit: manager.ensure_vlm_loaded(timeout_s=limit),
            lambda limit: manager.ensure_vlm_unloaded(timeout_s=limit),
            lambda limit: manager.migrate_clip_to_gpu(timeout_s=limit),
            lambda limit: manager.migrate_clip_to_cpu(timeout_s=limit),
            lambda limit: manager.vlm(timeout_s=limit).__enter__(),
            lambda limit: manager.clip(timeout_s=limit).__enter__(),
            lambda limit: manager.close(timeout_s=limit),
        ):
            error = stage.attempt(lambda call=call, bad=bad: call(bad))  # type: ignore[misc]
            assert type(error).__name__ == "BadArgument", (bad, error)
            assert "timeout_s" in str(error)
        with pytest.raises(ConfigError):
            GPUResourceConfig(idle_timeout_s=bad)
    assert (manager.get_status().queued, manager.get_status().closed) == (0, False)
    assert len(world.ollama.log) == 0
    met = stage.attempt(lambda: manager.set_execution_mode("idle", timeout_s=0))
    assert met is None or isinstance(met, OperationTimeout)
    assert manager.set_execution_mode("idle", timeout_s=10**12).granted


@row("E06")
def two_timers(stage: Stage) -> None:
    """Used for far longer than any keep_alive: renewed.  Cut short by another client: loaded again.  Idle: out."""
    world = SimulatedWorld()
    manager = stage.inline(world, idle_timeout_s=60.0)
    manager.set_execution_mode("recording")
    with manager.vlm():
        manager.drive_for(1000.0)
        assert world.vlm_resident()
    assert world.ollama.counts["loads"] == 1
    world.ollama.foreign_load(VLM, keep_alive=1)
    manager.drive_for(40.0)
    assert (world.vlm_resident(), world.ollama.counts["loads"]) == (True, 2)
    manager.drive_for(100.0)
    (told,) = stage.of_kind(IdleUnload)
    assert told.idle_s == pytest.approx(60.0, abs=manager.config.check_interval_s + 1)
    assert not world.vlm_resident()


# --- F: found in public trackers --------------------------------------------------------------------------------------


@row("F01")
def size_vram_left_out(stage: Stage) -> None:
    """By the client's reading, and by what the manager makes of it."""
    bare = {key: value for key, value in entry("tiny-a:latest").items() if key != "size_vram"}
    with serving(http(ps(bare))) as server:
        seen = client(server).residency(5.0)
    assert seen.answer is Answer.YES
    assert seen.ours is not None
    assert seen.ours.size_vram_mib == 0.0
    world = SimulatedWorld()
    world.ollama.card = None
    listing = world.ollama._listing
    stage.monkeypatch.setattr(
        world.ollama, "_listing", lambda runner: {k: v for k, v in listing(runner).items() if k != "size_vram"}
    )
    assert not stage.inline(world).set_execution_mode("recording").granted


@row("F02")
def runner_dies_in_an_answer(stage: Stage) -> None:
    """The listing goes on showing a dead runner; the error of the answer is what is believed."""
    world = SimulatedWorld()
    manager = stage.inline(world)
    manager.set_execution_mode("recording")
    world.faults.arm("ollama.generate", "runner_dies")
    with manager.vlm() as vlm:
        stage.attempt(lambda: vlm.generate("x"))
    manager.drive_for(60.0)
    with manager.vlm() as vlm:
        assert vlm.generate("x").text == "ok"
    assert world.vlm_resident()


@row("F03")
def forgotten_runners(stage: Stage) -> None:
    """What no listing shows is on the card all the same."""
    world = SimulatedWorld()
    world.card.take("old-runner", 5000.0, pid=1990922, name="ollama_llama_server")
    manager = stage.inline(world)
    outcome = manager.set_execution_mode("recording")
    assert outcome.reason is not None
    assert "1990922" in str(outcome.reason)
    assert world.ollama.counts["loads"] == 0
    world.card.give_back("old-runner")
    manager.drive_for(120.0)


@row("F04")
def endless_answer(stage: Stage) -> None:
    """The call's own deadline ends it; the runner is free as soon as its connection is closed."""
    world = SimulatedWorld(generate_s=1e7)
    manager = stage.inline(world)
    manager.set_execution_mode("recording")
    began = world.clock.monotonic()
    with manager.vlm() as vlm:
        stage.attempt(lambda: vlm.generate("say G for ever", timeout_s=30.0))
        assert world.clock.monotonic() - began < 32.0
        stage.attempt(lambda: list(vlm.stream("say G for ever", timeout_s=30.0)))
    assert manager.set_execution_mode("autopilot").granted
    assert world.clock.monotonic() - began < 120.0


@row("F05")
def pinned_by_another(stage: Stage) -> None:
    """RECORDING acts on the configured model whoever re-armed it."""
    world = SimulatedWorld()
    manager = stage.inline(world, idle_timeout_s=30.0)
    manager.set_execution_mode("recording")
    world.ollama.foreign_load(VLM, keep_alive=-1)
    manager.drive_for(60.0)
    assert not world.vlm_resident()


@row("F06")
def nothing_but_a_system_turn(stage: Stage) -> None:
    """The server takes it for a load and says so; that is an error, never an empty text as if it were an answer."""
    world = SimulatedWorld()
    manager = stage.inline(world)
    manager.set_execution_mode("recording")
    route = world.ollama._route

    def load_only(exchange: Any, path: str, *rest: Any) -> None:
        if path != "/api/chat":
            route(exchange, path, *rest)
            return
        exchange.json(200, LOADED | {"message": {"role": "assistant", "content": ""}})

    stage.monkeypatch.setattr(world.ollama, "_route", load_only)
    with manager.vlm() as vlm:
        met = stage.attempt(lambda: vlm.chat([{"role": "system", "content": "be brief"}]))
        assert "message" in str(met)
        stage.attempt(lambda: list(vlm.stream_chat([{"role": "system", "content": "be brief"}])))
    assert len(stage.errors) == 2


@row("F07")
def context_is_full(stage: Stage) -> None:
    """The same prompt would be cut the same way, so nothing here asks again."""
    cut = FINAL | {"response": "", "done_reason": "length", "prompt_eval_count": 2047, "eval_count": 1}
    with serving(http(cut)) as server:
        (got,) = client(server).generate("a long prompt", keep_alive_s=5, timeout_s=5.0)
        assert len(server.visits) == 1
    assert (got.text, got.done_reason, got.prompt_tokens) == ("", "length", 2047)
    world = SimulatedWorld()
    stage.inline(world).set_execution_mode("recording")


@row("F08")
def reloaded_by_another(stage: Stage) -> None:
    """One runner a model: the other client's larger one replaces ours, and the other way round."""
    world = SimulatedWorld()
    manager = stage.inline(world, vlm_options={"num_ctx": 2048}, idle_timeout_s=1000.0)
    manager.set_execution_mode("recording")
    ours = manager.get_status().vlm_size_vram_mib
    world.ollama.foreign_load(VLM, options={"num_ctx": 16384})
    manager.drive_for(60.0)
    theirs = manager.get_status().vlm_size_vram_mib
    assert ours is not None
    assert theirs is not None
    assert theirs > ours
    assert world.vlm_resident()
    with manager.vlm() as vlm:
        assert vlm.generate("x").text == "ok"
    manager.drive_for(60.0)
    assert manager.get_status().vlm_size_vram_mib == pytest.approx(ours)
    assert {str(e.body["options"]) for e in world.ollama.log if e.client == "us" and e.op == "ollama.generate"} == {
        "{'num_ctx': 2048}"
    }


@row("F09")
def we_evict_another(stage: Stage) -> None:
    """Ollama does it to make room for our load; we say whom it hit, and send nothing in their name."""
    world = SimulatedWorld(vlm_mib=6200.0, models={"theirs:1b": 400.0})
    world.ollama.foreign_load("theirs:1b", keep_alive=-1)
    world.clock.advance(10.0)
    manager = stage.inline(world)
    assert manager.set_execution_mode("recording").granted
    assert [event.models for event in stage.of_kind(ForeignEvicted)] == [("theirs:1b",)]
    assert all(e.body["model"] == VLM for e in world.ollama.log if e.client == "us" and e.method == "POST")


@row("F10")
def forbidden(stage: Stage) -> None:
    """A guard in front of the server answers 403 and nothing else."""
    with serving(http(b"", status=403, kind="")) as server:
        with pytest.raises(GPUFSMError) as caught:
            load(client(server, retry_base_s=0.0))
        assert caught.value.code == "ollama_rejected"
        assert len(server.visits) == 1
        assert server.visits[0].header("Origin") is None
        assert str(server.port) in (server.visits[0].header("Host") or "")
    world = SimulatedWorld()
    route = world.ollama._route

    def guard(exchange: Any, path: str, *rest: Any) -> None:
        exchange.answer(403, b"", "") if path == "/api/generate" else route(exchange, path, *rest)

    stage.monkeypatch.setattr(world.ollama, "_route", guard)
    manager = stage.inline(world, recover_base_s=1000.0, recover_cap_s=1000.0)
    manager.set_execution_mode("recording")
    assert len([e for e in world.ollama.log if e.op == "ollama.load"]) == 1
    assert "403" in str(manager.get_status().reason)


@row("F11")
def unreadable_model(stage: Stage) -> None:
    """The server's words reach the reason, and the number of tries is the setting's."""
    world = SimulatedWorld()
    text = "unable to load model: /srv/models/blobs/sha256-ea5d: permission denied"
    world.faults.arm("ollama.load", "http_500", times=None, text=text)
    manager = stage.inline(world, vlm_load_retries=2, recover_base_s=1000.0, recover_cap_s=1000.0)
    manager.set_execution_mode("recording")
    assert "permission denied" in str(manager.get_status().reason)
    assert len([e for e in world.ollama.log if e.op == "ollama.load"]) == 3


@row("F12")
def stopped_after_all(stage: Stage) -> None:
    """The unload happens and its answer is lost."""
    world = SimulatedWorld()
    manager = stage.inline(world)
    manager.set_execution_mode("recording")
    world.faults.arm("ollama.unload", "after")
    manager.ensure_vlm_unloaded()
    assert (world.vlm_resident(), world.vlm_held_mib()) == (False, 0)


@row("F13")
def left_without_a_restart(stage: Stage) -> None:
    """The VLM cannot be had for good; CLIP's mode needs nothing of it."""
    world = SimulatedWorld()
    manager = stage.inline(world)
    world.faults.arm("ollama.load", "runner_dies", times=None)
    assert not manager.set_execution_mode("recording").granted
    assert manager.set_execution_mode("autopilot").granted
    assert manager.get_status().reason is None


@row("F14")
def a_hundred_switches(stage: Stage) -> None:
    """As fast as they can be asked, then a pause, then again."""
    world = SimulatedWorld(vlm_load_s=0.3)
    manager = stage.inline(world)
    for _ in range(3):
        futures = [manager.submit_execution_mode(("recording", "autopilot")[n % 2]) for n in range(34)]
        manager.drive_for(120.0)
        assert all(future.result(0).granted for future in futures)
        assert world.clip.place == "gpu"
    assert world.ollama.counts["loads"] <= 51


class Shareless:
    """A probe whose driver lists processes and keeps their shares to itself, or mixes the fields up."""

    def __init__(self, world: SimulatedWorld, *, mixed: bool = False) -> None:
        self._world, self._mixed = world, mixed
        self._real = world.probe.holders

    def __call__(self) -> tuple[Holder, ...] | None:
        holders = self._real() or ()
        if self._mixed:
            return tuple(attrs.evolve(h, pid=int((h.mib or 0) * 2**20), mib=h.pid / 2**20) for h in holders)
        return tuple(attrs.evolve(h, mib=None) for h in holders)


@row("F15")
def shares_not_told(stage: Stage) -> None:
    """As where the system's own driver model keeps them."""
    world = SimulatedWorld()
    stage.monkeypatch.setattr(world.probe, "holders", Shareless(world))
    manager = stage.inline(world, on_shortage="refuse")
    manager.set_execution_mode("recording")
    manager.ensure_vlm_unloaded()
    assert world.vlm_held_mib() == 0
    world.card.take("game", 6000.0, pid=79, name="game.exe")
    met = stage.attempt(lambda: manager.set_execution_mode("recording"))
    assert "? MiB" in str(met)
    assert "game.exe" in str(met)
    world.card.give_back("game")
    assert manager.set_execution_mode("recording").granted


@row("F16")
def mixed_up_list(stage: Stage) -> None:
    """A version of the driver's record that is read with another version's fields."""
    world = SimulatedWorld(reclaim_s=2.0)
    stage.monkeypatch.setattr(world.probe, "holders", Shareless(world, mixed=True))
    manager = stage.inline(world)
    for mode in ("recording", "autopilot", "recording", "autopilot"):
        assert manager.set_execution_mode(mode).granted
        assert world.card.used_mib <= world.card.total_mib
    (back,) = [max(c.at for c in world.card.history if c.owner.startswith("ollama"))]
    assert min(c.at for c in world.card.history if c.owner == "clip" and c.at > back - 2.0) >= back


@row("F17", torch=True)
def memory_without_a_context(stage: Stage) -> None:
    """In a new process with torch imported: reading the card initialises nothing of CUDA's."""
    import torch

    from gpu_fsm.vram import VRAMMonitor
    from tests.ollama_clients import WallClock

    asked: list[str] = []
    for name in ("mem_get_info", "init", "_lazy_init", "current_device"):
        stage.monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))
    world = SimulatedWorld()
    manager = stage.inline(world)
    monitor = VRAMMonitor(GPUResourceConfig(), clock=WallClock())
    for _ in range(3):
        info = monitor.read(2.0)
    assert info.source != "torch"
    monitor.close()
    manager.set_execution_mode("idle")
    assert asked == []


def real_clip(stage: Stage) -> tuple[SimulatedWorld, GPUResourceManager, Any]:
    """A manager over a simulated world without a GPU, with a real CLIP on the CPU."""
    import warnings

    from sentence_transformers import SentenceTransformer

    from gpu_fsm.clip import CLIPManager
    from tests.tools import tiny_clip

    world = SimulatedWorld(gpu=False)
    config = world.config(clip_device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SentenceTransformer(str(tiny_clip.build(stage.tmp_path / "tiny")), device="cpu", local_files_only=True)
    host = CLIPManager(config, model=model)
    host.prepare()
    ports = world.ports(OllamaManager(config, clock=world.clock, transport=world.transport))
    manager = stage._keep(world, GPUResourceManager(config, **{**ports, "clip_host": host}, threaded=False))
    assert manager.set_execution_mode("autopilot").granted
    return world, manager, host


@row("F18", torch=True)
def broken_picture(stage: Stage) -> None:
    """A truncated file between two good items."""
    import io

    import numpy as np
    from PIL import Image

    whole = io.BytesIO()
    Image.effect_noise((64, 64), 90.0).save(whole, "PNG")
    cut = whole.getvalue()[: len(whole.getvalue()) // 2]
    _, manager, _ = real_clip(stage)
    with manager.clip() as clip:
        reference = clip.encode(["a", "b"])
        met = stage.attempt(lambda: clip.encode(["a", whole.getvalue(), cut, "b"]))
        assert "item 2" in str(met)
        assert np.array_equal(clip.encode(["a", "b"]), reference)
    manager.drive_for(30.0)


@row("F19", torch=True)
def no_numbers(stage: Stage) -> None:
    """The model's last layer gives NaN for one batch."""
    import torch

    _, manager, host = real_clip(stage)
    with manager.clip() as clip:
        reference = clip.encode(["a"])
        spoil = host._model.register_forward_hook(
            lambda _, __, features: features | {"sentence_embedding": features["sentence_embedding"] * torch.nan}
        )
        stage.attempt(lambda: clip.encode(["a"]))
        spoil.remove()
        assert (clip.encode(["a"]) == reference).all()


@row("F20", torch=True)
def long_text(stage: Stage) -> None:
    """Ten times what the model takes."""
    import numpy as np

    _, manager, _ = real_clip(stage)
    with manager.clip() as clip:
        vectors = clip.encode(["a window with two buttons " * 100, "a window"])
    assert np.isfinite(vectors).all()
    manager.set_execution_mode("idle")


@row("F21")
def failing_encode(stage: Stage) -> None:
    """Whoever waits behind it is served."""
    world = SimulatedWorld()
    manager = stage.inline(world)
    manager.set_execution_mode("autopilot")
    world.faults.arm("clip.encode", "before", times=2)
    with manager.clip() as clip:
        for _ in range(2):
            stage.attempt(lambda: clip.encode(["x"]))
        assert clip.encode(["x"]).shape[0] == 1
    assert manager.set_execution_mode("recording").granted
    assert manager.set_execution_mode("autopilot").granted
    assert manager.get_status().leases == ()


# --- the tests --------------------------------------------------------------------------------------------------------


def _params() -> Iterator[Any]:
    for id_, story in STORIES.items():
        marks = [pytest.mark.needs_torch] if id_ in TORCH else []
        if id_ in DEFECTS:
            marks.append(pytest.mark.xfail(strict=True, reason=DEFECTS[id_]))
        yield pytest.param(ROWS[id_], id=f"{id_}-{story.__name__}", marks=marks)


@pytest.mark.parametrize("row", list(_params()))
def test_a_fault_of_the_catalogue_ends_as_the_table_says(stage: Stage, row: Row) -> None:
    """State, error and event are the table's; what else is promised stands in the row's own story."""
    STORIES[row.id](stage)
    stage.compare(row)


def test_a_late_driver_does_not_fetch_back_a_vlm_that_nobody_uses() -> None:
    """E03: the process was stopped for an hour, Ollama's own timer has let the VLM go, and so would ours have."""
    world = SimulatedWorld()
    manager = worlds.inline(world, idle_timeout_s=30.0)
    manager.set_execution_mode("recording")
    world.clock.advance(3600.0)
    manager.drive_for(100.0)
    loads = world.ollama.counts["loads"]
    manager.close()
    assert loads == 1


_ID = re.compile(r"([A-F]\d\d|S\d\d)(?:-|$)")


def ids_in(file: str) -> set[str]:
    """The row ids that a test file names, read without importing it: some need what may not be installed.

    A docstring that begins with one is no test.
    """
    tree = tree_of(file)
    said = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in said)
    return {found[1] for text in texts if isinstance(text, str) and (found := _ID.match(text))}


def tree_of(file: str) -> ast.Module:
    """A test file, read without running it."""
    return ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))


def test_a_docstring_alone_covers_no_row(tmp_path: Path) -> None:
    """A row is covered by a test that carries its id."""
    file = tmp_path / "test_it.py"
    file.write_text('def test_it():\n    """A01"""\n\n\nIDS = ["A02-done"]\n', encoding="utf-8")
    assert ids_in(str(file)) == {"A02"}


def test_every_row_of_the_catalogue_has_its_test() -> None:
    """By id or by name, in the file that the table names; and no test has a row that the table does not know."""
    files = {row.where for row in ROWS.values()}
    named = {file: ids_in(file) for file in files}
    functions = {
        file: {node.name for node in tree_of(file).body if isinstance(node, ast.FunctionDef)} for file in files
    }
    assert [row.id for row in ROWS.values() if not row.tests and row.id not in named[row.where]] == []
    assert [name for row in ROWS.values() for name in row.tests if name not in functions[row.where]] == []
    assert set(STORIES) == {row.id for row in ROWS.values() if row.where == Path(__file__).name}
    assert set().union(*named.values()) <= set(ROWS)


def test_a_row_is_counted_when_all_of_its_tests_that_ran_have_passed() -> None:
    """What is printed at the end is what was run: a failure, also in taking down, or a known defect holds nothing."""

    def ended(counts: Counts, id_: str, outcome: Any, when: Any = "call", name: str = "test_it", **marks: str) -> None:
        file = ROWS[id_].where
        report = pytest.TestReport(f"tests/{file}::{name}[{id_}-x]", (file, 1, name), {}, outcome, None, when)
        vars(report).update(marks)
        counts.pytest_runtest_logreport(report)

    counts = Counts()
    total = len(GROUPS["S"])
    assert counts.rows("S") == f"0 of {total} hold (S=0) in 0 tests; not run: {' '.join(row.id for row in GROUPS['S'])}"
    for row in GROUPS["S"]:
        for name in row.tests or ("test_it",):
            ended(counts, row.id, "passed", name=name)
    assert counts.rows("S").startswith(f"{total} of {total} hold (S={total}) in ")
    ended(counts, "S01", "failed")
    ended(counts, "S02", "failed", "teardown")
    ended(counts, "S03", "skipped", wasxfail="known")
    ended(counts, "S04", "skipped")
    assert counts.rows("S").startswith(f"{total - 3} of {total} hold")
    assert counts.rows("S").endswith("; BROKEN: S01 S02 S03")


def test_what_was_found_elsewhere_says_where() -> None:
    """Each row of our own has a thread to read, and no two rows the same one."""
    links = [link for row in GROUPS["F"] for link in row.links]
    assert len(GROUPS["F"]) >= 15
    assert all(row.links for row in GROUPS["F"])
    assert len(set(links)) == len(links)
    assert all(re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", link) for link in links)
