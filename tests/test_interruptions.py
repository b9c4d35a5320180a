"""Ctrl-C, `SystemExit`, cancellation, fork at every point: nothing is split, wedged or leaked; the next call works.

A point is any I/O call of any public operation, before it and after it, and every pause between two of them.  What can
strike in the middle of moving CLIP's weights is in `test_clip.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterator
from typing import Any, Self

import pytest
from hypothesis import settings

from gpu_fsm.aio import AsyncCLIP, AsyncVerbs, AsyncVLM
from gpu_fsm.errors import GPUFSMError
from gpu_fsm.leases import LeaseBook
from gpu_fsm.manager import GPUResourceManager
from gpu_fsm.states import STABLE
from gpu_fsm.testing.oracle import Oracle
from tests.counts import say
from tests.operations import OPERATIONS, PNG, Stage, generate, street, verbs_called, verbs_of
from tests.test_lifecycle import FORKING, IN_A_WORLD
from tests.waiting import PATIENCE_S, in_thread, let_time_pass, run_python, threads_of, until

EXITS: tuple[type[BaseException], ...] = (KeyboardInterrupt, SystemExit)

DRIVEN = [name for name, operation in OPERATIONS.items() if not operation.drives]
"""What can be asked of a manager that drives itself."""


def thinned(points: range) -> range:
    """All of them; in a brief run every third."""
    return points[:: 3 if settings.get_current_profile_name() == "brief" else 1]


# --- points ---


class Points:
    """Counts the points that an operation passes, and does something at one of them."""

    def __init__(
        self, stage: Stage, at: int = -1, strike: Callable[[], None] = lambda: None, *, pauses: bool = True
    ) -> None:
        self.passed = 0
        self._at, self._strike = at, strike
        self._in_clip = False
        self._pauses = pauses
        self._sleep = stage.world.clock.sleep
        self._stage = stage

    def __enter__(self) -> Self:
        # First in line before a call and last after it, so that the oracle sees either the whole call or nothing of it.
        self._stage.world.on_io.insert(0, self._before)
        self._stage.world.on_io.append(self._after)
        if self._pauses:
            self._stage.world.clock.sleep = self._pause  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._stage.world.on_io.remove(self._before)
        self._stage.world.on_io.remove(self._after)
        self._stage.world.clock.sleep = self._sleep  # type: ignore[method-assign]

    def _before(self, op: str, phase: str) -> None:
        if phase == "before":
            self._pass()
            self._in_clip = op.startswith("clip.")

    def _after(self, op: str, phase: str) -> None:
        if phase == "after":
            self._in_clip = False
            self._pass()

    def _pause(self, seconds: float) -> None:
        if not self._in_clip:  # what the simulated CLIP sleeps is its own affair
            self._pass()
        self._sleep(seconds)

    def _pass(self) -> None:
        self.passed += 1
        if self.passed - 1 == self._at:
            self._strike()


def points_of(name: str, *, threaded: bool = False) -> int:
    """How many points an undisturbed operation passes."""
    stage = OPERATIONS[name].stage(threaded=threaded)
    OPERATIONS[name].before(stage)
    with Points(stage) as points:
        OPERATIONS[name].act(stage)
    if threaded:
        stage.manager.close()
    return points.passed


def is_whole(stage: Stage) -> None:
    """Nothing is wedged or leaked, and whatever is asked next works, to the very end."""
    manager, world = stage.manager, stage.world
    status = manager.get_status()
    assert (status.leases, status.queued) == ((), 0), f"{manager!r}"
    assert status.state in STABLE, f"{manager!r}"
    assert not stage.open_connections
    assert world.clip.violations == []
    if manager._driver._closing is None:
        assert manager.set_execution_mode("autopilot", timeout_s=PATIENCE_S).granted
        assert (world.vlm_resident(), world.clip.place) == (False, "gpu")
        with manager.clip(timeout_s=PATIENCE_S) as clip:
            clip.encode(["x"])
        generate(stage)
        assert manager.close() == ()
    else:
        manager.close()  # a close that was cut off can be ended
        assert manager.get_status().closed, "a close that was cut off and ended, and the manager is not closed"
    world.clock.advance(100.0)  # Ollama's own timer, for what a close that was cut off had no time to unload
    assert stage.is_empty(), f"{world!r}"
    assert not stage.open_connections


# --- a manager that is driven by whoever waits ---


def cut_off(name: str, at: int, kind: type[BaseException]) -> None:
    """One story: `kind` is raised at a point of the operation."""
    stage = OPERATIONS[name].stage()
    oracle = Oracle(stage.manager, stage.world)
    OPERATIONS[name].before(stage)

    def strike() -> None:
        raise kind

    with Points(stage, at, strike), pytest.raises(kind):
        OPERATIONS[name].act(stage)
    if not stage.manager.get_status().closed:
        stage.manager.drive_for(0.0)
    oracle.check()
    is_whole(stage)
    oracle.check()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_exit_at_every_point_of(name: str, request: pytest.FixtureRequest) -> None:
    """Ctrl-C and `SystemExit` come out as themselves, wherever they strike, and the manager is whole afterwards."""
    points = thinned(range(points_of(name)))
    wrong = []
    for at in points:
        for kind in EXITS:
            try:
                cut_off(name, at, kind)
            except (AssertionError, GPUFSMError, pytest.fail.Exception) as broken:
                wrong.append(f"{kind.__name__} at point {at} of {name}: {type(broken).__name__} {broken}")
    say(request.config, f"exits: {len(EXITS) * len(points)} in {name}")
    assert not wrong, "\n".join(wrong)


# --- a manager with a thread of its own, and somebody who waits for it ---


@contextlib.contextmanager
def exits_on_signal(kind: type[BaseException]) -> Iterator[Callable[[], None]]:
    """A call, for any thread, that makes `kind` strike in the main thread wherever that is, as Ctrl-C does."""
    struck: list[int] = []

    def handler(number: int, _: object) -> None:
        if not struck:
            struck.append(number)
            raise kind

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        yield lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def waiter_exits(name: str, at: int, kind: type[BaseException]) -> None:
    """One story: the waiting thread exits while the driver stands at a point."""
    stage = OPERATIONS[name].stage(threaded=True)
    OPERATIONS[name].before(stage)
    left = threading.Event()

    with exits_on_signal(kind) as exit_main:

        def strike() -> None:
            if threading.current_thread() is threading.main_thread():
                raise kind
            end = time.monotonic() + PATIENCE_S
            while not left.is_set() and time.monotonic() < end:
                exit_main()  # again: one that comes in the moment before a wait begins does not end it
                left.wait(0.01)

        with Points(stage, at, strike) as points:
            try:
                OPERATIONS[name].act(stage)
                # The signal may come late: it is for this block, and for nobody after it.
                if points.passed > at:
                    until(left.is_set)
            except kind:
                pass
            finally:
                left.set()
            until(lambda: settled(stage.manager))
    is_whole(stage)
    until(lambda: threads_of(stage.manager) == [])


def settled(manager: GPUResourceManager) -> bool:
    """Nothing is under way, nobody waits, nobody holds anything."""
    status = manager.get_status()
    driver = manager._driver
    idle = status.state in STABLE and not status.queued and not driver.engine.waiting and driver._driving is None
    return idle and not status.leases and (driver._closing is None or driver.closed)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
@pytest.mark.parametrize("name", DRIVEN)
def test_a_waiter_that_exits_at_every_point_of(name: str, request: pytest.FixtureRequest) -> None:
    """Whoever waits may leave at any moment: the operation goes on unharmed, and leaves nothing to nobody."""
    points = thinned(range(points_of(name, threaded=True)))
    for at in points:
        waiter_exits(name, at, EXITS[at % len(EXITS)])
    say(request.config, f"waiters that left: {len(points)} in {name}")


@pytest.mark.parametrize("name", DRIVEN)
def test_an_exit_in_the_driver_s_own_thread_at_every_point_of(
    name: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """A `SystemExit` in the thread that drives must not end the driving: everybody is answered all the same."""
    caplog.set_level("CRITICAL")
    points = thinned(range(points_of(name, threaded=True)))
    for at in points:
        stage = OPERATIONS[name].stage(threaded=True)
        OPERATIONS[name].before(stage)

        def strike() -> None:
            if threading.current_thread().name == "gpu_fsm-driver":
                raise SystemExit

        with Points(stage, at, strike, pauses=False), contextlib.suppress(GPUFSMError):
            # A ticket that is cut off before any row was taken is answered by the next check, so time has to pass.
            let_time_pass(stage.world, in_thread(OPERATIONS[name].act, stage), step_s=1.0)
        until(lambda stage=stage: settled(stage.manager))  # type: ignore[misc]
        is_whole(stage)
        until(lambda stage=stage: threads_of(stage.manager) == [])  # type: ignore[misc]
    say(request.config, f"exits in the driver: {len(points)} in {name}")


# --- tasks ---

Verb = Callable[[GPUResourceManager], Coroutine[Any, Any, object]]


async def use_vlm(manager: GPUResourceManager) -> None:
    """Lease the VLM, ask it in every way."""
    async with manager.aio.vlm() as vlm:
        await vlm.generate("x", images=[PNG])
        await vlm.chat([{"role": "user", "content": "x"}])
        for stream in (vlm.stream("x"), vlm.stream_chat([{"role": "user", "content": "x"}])):
            async with contextlib.aclosing(stream) as parts:
                async for _ in parts:
                    await asyncio.sleep(0)


async def use_clip(manager: GPUResourceManager) -> None:
    """Lease CLIP and encode twice."""
    async with manager.aio.clip() as clip:
        await clip.encode(["x"])
        await clip.encode(["y"])


async def lend(manager: GPUResourceManager) -> None:
    """Room for somebody else, for a while."""
    with manager.lend("a game"):
        assert not manager.aio.get_status().closed
        await manager.aio.ensure_vlm_unloaded()
        await asyncio.sleep(0)


async def decorated(manager: GPUResourceManager) -> None:
    """A coroutine function and an asynchronous generator that need a model each."""

    @manager.needs_vlm
    async def describe() -> None:
        await asyncio.sleep(0)

    @manager.needs_clip
    async def encode() -> AsyncGenerator[str, None]:
        yield manager.get_clip_device()
        await asyncio.sleep(0)

    await describe()
    async with contextlib.aclosing(encode()) as devices:
        async for device in devices:
            assert device != "mixed"


async def knock(manager: GPUResourceManager) -> None:
    """Code that calls Ollama with `httpx`, from a task."""
    import httpx

    async with httpx.AsyncClient(transport=manager.async_httpx_transport(), trust_env=False) as client:
        await client.post(f"{street()}/api/generate", json={"model": manager.config.vlm_model, "prompt": "x"})


async def use_all(manager: GPUResourceManager) -> None:
    """Everything there is, one after the other."""
    await manager.aio.migrate_clip_to_gpu()
    await manager.aio.migrate_clip_to_cpu()
    await manager.aio.set_execution_mode("recording")
    await use_vlm(manager)
    await manager.aio.ensure_vlm_unloaded()
    await manager.aio.ensure_vlm_loaded()
    await manager.aio.set_execution_mode("autopilot", preempt=True)
    await use_clip(manager)
    await manager.aio.close()


VERBS: dict[str, Verb] = {
    "record": lambda manager: manager.aio.set_execution_mode("recording"),
    "automate": lambda manager: manager.aio.set_execution_mode("autopilot"),
    "load": lambda manager: manager.aio.ensure_vlm_loaded(),
    "unload": lambda manager: manager.aio.ensure_vlm_unloaded(),
    "clip-up": lambda manager: manager.aio.migrate_clip_to_gpu(),
    "use-vlm": use_vlm,
    "use-clip": use_clip,
    "close": lambda manager: manager.aio.close(),
    "lend": lend,
    "decorated": decorated,
    "everything": use_all,
}
if importlib.util.find_spec("httpx"):
    VERBS["httpx-door"] = knock

ASYNC_FACES = (AsyncVerbs, AsyncVLM, AsyncCLIP)


def staged(name: str) -> Stage:
    """Where a verb plays."""
    return Stage(threaded=True, doors=name == "httpx-door")


def test_the_verbs_are_all_that_tasks_can_ask_for() -> None:
    """Every public call of the asyncio face; else "every await" would be a lie."""
    with verbs_called(GPUResourceManager, *ASYNC_FACES) as called:
        for name in VERBS:
            stepped(name, -1, "cancel")
    wanted = verbs_of(*ASYNC_FACES) | {f"GPUResourceManager.{verb}" for verb in ("aio", "lend", "needs_vlm")}
    if "httpx-door" in VERBS:
        wanted.add("GPUResourceManager.async_httpx_transport")
    assert wanted - called == {"AsyncCLIP.device"}, "it only tells where CLIP is"


class Stepped:
    """A coroutine that is driven step by step; at its n-th suspension something befalls it.

    `how`: `cancel` there and then, `late` in the very moment in which the answer has come, or an exception thrown in.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, object], at: int, how: str | type[BaseException]) -> None:
        self._coroutine, self._at, self._how = coroutine, at, how
        self.suspensions = 0

    def __await__(self) -> Generator[Any, Any, object]:
        send: Callable[[], Any] = lambda: self._coroutine.send(None)  # noqa: E731
        task = asyncio.current_task()
        assert task is not None
        while True:
            try:
                waited_for = send()
            except StopIteration as end:
                return end.value
            self.suspensions += 1
            if self.suspensions - 1 == self._at:
                if isinstance(self._how, type):
                    if waited_for is not None:
                        waited_for.cancel()
                    send = self._thrown(self._how())
                    continue
                if self._how == "late" and waited_for is not None:
                    waited_for.add_done_callback(lambda _: task.cancel())
                else:
                    task.cancel()
            try:
                yield waited_for
            except BaseException as error:
                send = self._thrown(error)
            else:
                send = lambda: self._coroutine.send(None)  # noqa: E731

    def _thrown(self, error: BaseException) -> Callable[[], Any]:
        return lambda: self._coroutine.throw(error)


async def soon(holds: Callable[[], object]) -> None:
    """Let the loop turn until `holds()`."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.0005)


async def after_a_cut(stage: Stage) -> None:
    """No task, no lease, no queue is left over."""
    await soon(lambda: settled(stage.manager))
    await soon(lambda: len(asyncio.all_tasks()) == 1)
    await soon(lambda: not stage.open_connections)
    assert stage.world.clip.violations == []


def stepped(name: str, at: int, how: str | type[BaseException]) -> int:
    """One story; returns how often the coroutine was suspended."""
    stage = staged(name)
    steps: list[Stepped] = []

    async def body() -> None:
        steps.append(Stepped(VERBS[name](stage.manager), at, how))
        task = asyncio.ensure_future(guarded(steps[0]))
        error = await task
        if isinstance(error, BaseExceptionGroup):  # a foreign library's task group wraps what was thrown into it
            assert error.split(how)[1] is None, error  # type: ignore[arg-type]
            error = error.exceptions[0]
        reached = steps[0].suspensions > at >= 0
        # What the thrown-out task was waiting for is cancelled, and clearing up may meet that.
        kind = (how, asyncio.CancelledError) if isinstance(how, type) else asyncio.CancelledError
        assert isinstance(error, kind) if reached and how != "late" else error is None or isinstance(error, kind)
        await after_a_cut(stage)

    asyncio.run(body())
    is_whole(stage)
    until(lambda: threads_of(stage.manager) == [])
    return steps[0].suspensions


async def guarded(awaitable: Awaitable[object]) -> BaseException | None:
    """What came out of it, as a value: a loop stops at a `KeyboardInterrupt`."""
    try:
        await awaitable
    except BaseException as error:
        return error
    return None


@pytest.mark.parametrize("how", ["cancel", "late", KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("name", VERBS)
def test_a_task_cut_at_every_await_of(
    name: str, how: str | type[BaseException], request: pytest.FixtureRequest
) -> None:
    """Cancelled at once, cancelled as the answer comes, or thrown out: no task, thread, socket or lease is left."""
    awaits = stepped(name, -1, "cancel")
    assert awaits > 0
    for at in thinned(range(awaits)):
        stepped(name, at, how)
    said = how if isinstance(how, str) else how.__name__
    say(request.config, f"awaits: {awaits} cut by {said} in {name}")


def cancelled_while(name: str, at: int) -> bool:
    """One story: the task is cancelled while the driver, or a model's thread, is at a point; False past the last."""
    stage = staged(name)
    reached = threading.Event()

    async def body() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(VERBS[name](stage.manager))
        turned = threading.Event()

        def cancel() -> None:
            task.cancel()
            loop.call_soon(loop.call_soon, turned.set)

        def strike() -> None:
            reached.set()
            loop.call_soon_threadsafe(cancel)
            assert turned.wait(PATIENCE_S), "the loop stands still"

        with Points(stage, at, strike):
            await asyncio.wait([task])
            await soon(lambda: settled(stage.manager))
        assert task.cancelled() or task.exception() is None
        await after_a_cut(stage)

    asyncio.run(body())
    is_whole(stage)
    return reached.is_set()


@pytest.mark.parametrize("name", VERBS)
def test_a_task_cancelled_at_every_point_of(name: str, request: pytest.FixtureRequest) -> None:
    """Wherever the driver is when its waiter is cancelled, it ends what it does."""
    step = thinned(range(3)).step
    at = 0
    while cancelled_while(name, at):
        at += step
    assert at > 0
    say(request.config, f"tasks cancelled: {at // step} in {name}")


# --- fork ---

STABLE_POINTS = {
    "fresh": "",
    "idle": "mode('recording'); mode('idle')",
    "idle, the VLM wanted": "manager.ensure_vlm_loaded(timeout_s=30)",
    "idle, CLIP up": "manager.migrate_clip_to_gpu(timeout_s=30)",
    "recording": "mode('recording')",
    "recording, parked": "mode('recording'); manager.ensure_vlm_unloaded(timeout_s=30)",
    "recording, leased": "mode('recording'); hold('vlm')",
    "autopilot": "mode('autopilot')",
    "autopilot, the VLM wanted": "mode('autopilot'); manager.ensure_vlm_loaded(timeout_s=30)",
    "autopilot, leased": "mode('autopilot'); hold('clip')",
    "degraded": "world.ollama.stop(); mode('recording'); world.ollama.start()",
    "closed": "mode('recording'); manager.close()",
}

FORKS = """
import contextlib, contextvars

for number, (name, story) in enumerate(POINTS.items()):
    world, manager = made()
    held = contextlib.ExitStack()

    def mode(name):
        return manager.set_execution_mode(name, timeout_s=30)

    def hold(model):
        contextvars.Context().run(held.enter_context, getattr(manager, model)(holder="the parent", timeout_s=30))

    exec(story)
    before = manager.get_status()

    def check():
        for call in (
            lambda: mode("idle"),
            manager.ensure_vlm_loaded,
            manager.ensure_vlm_unloaded,
            manager.migrate_clip_to_gpu,
            lambda: manager.vlm().__enter__(),
            lambda: manager.clip().__enter__(),
        ):
            try:
                call()
            except ForkedProcess as error:
                assert "shared()" in error.remedy, error
            else:
                raise AssertionError("no ForkedProcess")
        assert manager.get_status().state is before.state
        assert manager.close() == ()
        mine_world, mine = made(shared=True)
        assert mine.set_execution_mode("recording", timeout_s=30).granted
        assert mine_world.vlm_resident()
        assert mine.close() == ()

    resident, place = world.vlm_resident(), world.clip.place
    in_child(check)
    assert (world.vlm_resident(), world.clip.place) == (resident, place), name
    held.close()
    if name != "closed":
        world.faults.heal()
        assert manager.get_status().leases == ()
        for wanted in ("recording", "autopilot"):
            assert mode(wanted).granted, name
        assert manager.close() == ()
        assert world.vlm_held_mib() == 0 and world.clip.place == "cpu"
print(number + 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_fork_at_every_stable_point(request: pytest.FixtureRequest) -> None:
    """The child is told and can have a manager of its own; to the parent nothing has happened."""
    said = run_python(f"{IN_A_WORLD}\nPOINTS = {STABLE_POINTS!r}\n{FORKS}", options=FORKING)
    say(request.config, f"forks: {said.strip()} stable points")
    assert int(said) == len(STABLE_POINTS)


# --- would it be seen? ---


def test_a_lease_that_an_exit_left_behind_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A manager that forgets to give back what came too late does not get through."""
    monkeypatch.setattr(LeaseBook, "release", lambda *_: None)
    with pytest.raises(AssertionError):
        for at in range(points_of("generate")):
            cut_off("generate", at, KeyboardInterrupt)
    gc.collect()
