"""A time limit is kept: no call that was given one comes back two seconds later than that, whatever the server does.

In virtual time the caller is a thread or a task of its own beside a manager that drives itself.  What is replaced is
the clock under the standard library's waiting, and the world stands still while the caller, whose moment has come, gets
to run; so the figure is that of the program and not of the machine's scheduling.  One test measures in real time.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpu_fsm import GPUResourceManager
from gpu_fsm.errors import GPUFSMError, InternalError, OperationTimeout
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.ports import NoCLIP
from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.simulation import KINDS, SimulatedClock, SimulatedWorld
from tests.ollama_clients import LOADED, WallClock, entry, ps
from tests.raw_server import RawServer, Visit, http
from tests.waiting import PATIENCE_S, in_thread
from tests.worlds import inline, threaded

GRACE_S = 2.0
"""What a call may be late by."""
STUCK_S = 5.0
"""Real seconds for a caller to leave while the world stands still for it; more is a lock that it should not need."""

FAULTS = sorted((op, kind) for op, kinds in KINDS.items() for kind in kinds)
TROUBLES = [
    *FAULTS,
    ("server", "vanishes"),
    ("server", "stops"),
    ("server", "starts"),
    ("card", "full"),
    ("lease", "held"),
]


# --- the caller's side, in virtual time -------------------------------------------------------------------------------


class Watch:
    """Takes the virtual time of one call made by the current thread."""

    def __init__(self, clock: SimulatedClock) -> None:
        self.clock = clock
        self.began = self.left_at = 0.0
        self.stuck = False
        self.holding = threading.Event()
        """The world stands still."""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The world stands still until the caller waits; a wait with a time limit counts virtual seconds."""
        real, me, clock = Future.result, threading.get_ident(), self.clock
        held = [True]
        clock.turn.acquire()
        self.holding.set()

        def let_go() -> None:
            if held.pop() if held else False:
                clock.turn.release()

        def result(future: Future[Any], timeout: float | None = None) -> Any:
            if threading.get_ident() != me or timeout is None or future.done():
                return real(future, timeout)
            come, left = threading.Event(), threading.Event()

            def stop(*_: object) -> None:
                if threading.get_ident() != me and not come.is_set():
                    with clock.turn:
                        self.left_at = clock.monotonic()
                        come.set()
                        self.stuck = not left.wait(STUCK_S) or self.stuck
                come.set()

            alarm = clock.after(timeout, stop)
            future.add_done_callback(stop)
            let_go()
            try:
                assert come.wait(PATIENCE_S)
            finally:
                alarm.cancel()
                left.set()
            return real(future, 0)

        self.began = self.left_at = clock.monotonic()
        Future.result = result  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            Future.result = real  # type: ignore[method-assign]
            if held:
                self.left_at = clock.monotonic()
            let_go()

    @property
    def took_s(self) -> float:
        """From the call to the end of its last wait."""
        return self.left_at - self.began


class Selector(selectors.DefaultSelector):
    """Waits for real things, and for virtual time."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        """As the standard one; where the loop has nothing to do its next timer is an appointment of the world's."""
        if timeout is not None and timeout <= 0:
            return super().select(0)
        loop = self.loop
        alarm = None if timeout is None else loop.clock.after(timeout, loop.ring)  # before the world goes on
        loop.idle.set()
        loop.let_the_world_go_on()
        try:
            return super().select(None)
        finally:
            if alarm is not None:
                alarm.cancel()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that lives in the world's time; the world stands still while it has something to do."""

    def __init__(self, clock: SimulatedClock, holding: threading.Event) -> None:
        self.clock = clock
        self.holding = holding
        """Set when the world stands still for this loop."""
        self.idle = threading.Event()
        self.measuring = False
        self.stuck = False
        self._holds_the_world = False
        self._thread = 0
        selector = Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        """Virtual seconds."""
        return self.clock.monotonic()

    def hold_the_world(self) -> None:
        """Until the loop has nothing to do."""
        self.clock.turn.acquire()
        self._holds_the_world = self.measuring = True
        self._thread = threading.get_ident()
        self.holding.set()

    def let_the_world_go_on(self) -> None:
        """What was held is free."""
        if self._holds_the_world:
            self._holds_the_world = False
            self.clock.turn.release()

    def ring(self) -> None:
        """The next timer is due: wake up, and have the world wait for what follows."""
        self.idle.clear()
        super().call_soon_threadsafe(lambda: None)
        self._wait_until_idle()

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        """An answer has come, from a thread that moves the world's time: it waits until the loop has dealt with it."""
        if not self.measuring or threading.get_ident() == self._thread:
            return super().call_soon_threadsafe(callback, *args, context=context)
        with self.clock.turn:
            self.idle.clear()
            handle = super().call_soon_threadsafe(callback, *args, context=context)
            self._wait_until_idle()
        return handle

    def _wait_until_idle(self) -> None:
        self.stuck = (self.measuring and not self.idle.wait(STUCK_S)) or self.stuck


class Turns(ThreadPoolExecutor):
    """Runs what a task sends to a thread with the world to itself, and notes when that ended."""

    def __init__(self, clock: SimulatedClock) -> None:
        super().__init__(max_workers=2)
        self.clock, self.ended_at = clock, 0.0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        """As the standard one."""

        def run() -> Any:
            with self.clock.turn:
                try:
                    return fn(*args, **kwargs)
                finally:
                    self.ended_at = self.clock.monotonic()

        return super().submit(run)


# --- what is called ---------------------------------------------------------------------------------------------------


def enter(lease: Any) -> None:
    """Take a lease and end it."""
    with lease:
        pass


async def aenter(lease: Any) -> None:
    """The same in a task."""
    async with lease:
        pass


BLOCKING: dict[str, Callable[[GPUResourceManager, float], object]] = {
    "recording": lambda m, s: m.set_execution_mode("recording", timeout_s=s),
    "autopilot": lambda m, s: m.set_execution_mode("autopilot", timeout_s=s),
    "idle, preempting": lambda m, s: m.set_execution_mode("idle", preempt=True, timeout_s=s),
    "ensure_vlm_loaded": lambda m, s: m.ensure_vlm_loaded(timeout_s=s),
    "ensure_vlm_unloaded": lambda m, s: m.ensure_vlm_unloaded(timeout_s=s),
    "migrate_clip_to_gpu": lambda m, s: m.migrate_clip_to_gpu(timeout_s=s),
    "migrate_clip_to_cpu": lambda m, s: m.migrate_clip_to_cpu(timeout_s=s),
    "vlm": lambda m, s: enter(m.vlm(timeout_s=s)),
    "clip": lambda m, s: enter(m.clip(timeout_s=s)),
    "close": lambda m, s: m.close(timeout_s=s),
}
AWAITABLE: dict[str, Callable[[GPUResourceManager, float], Coroutine[Any, Any, object]]] = {
    "recording": lambda m, s: m.aio.set_execution_mode("recording", timeout_s=s),
    "autopilot": lambda m, s: m.aio.set_execution_mode("autopilot", timeout_s=s),
    "idle, preempting": lambda m, s: m.aio.set_execution_mode("idle", preempt=True, timeout_s=s),
    "ensure_vlm_loaded": lambda m, s: m.aio.ensure_vlm_loaded(timeout_s=s),
    "ensure_vlm_unloaded": lambda m, s: m.aio.ensure_vlm_unloaded(timeout_s=s),
    "migrate_clip_to_gpu": lambda m, s: m.aio.migrate_clip_to_gpu(timeout_s=s),
    "migrate_clip_to_cpu": lambda m, s: m.aio.migrate_clip_to_cpu(timeout_s=s),
    "vlm": lambda m, s: aenter(m.aio.vlm(timeout_s=s)),
    "clip": lambda m, s: aenter(m.aio.clip(timeout_s=s)),
}
ASKING: dict[str, Callable[[Any, float], object]] = {
    "generate": lambda vlm, s: vlm.generate("x", timeout_s=s),
    "chat": lambda vlm, s: vlm.chat([{"role": "user", "content": "x"}], timeout_s=s),
    "stream": lambda vlm, s: list(vlm.stream("x", timeout_s=s)),
    "stream_chat": lambda vlm, s: list(vlm.stream_chat([{"role": "user", "content": "x"}], timeout_s=s)),
}

limits = st.sampled_from((0.0, 0.05, 0.7, 3.0, 20.0, 90.0))
troubles = st.lists(st.sampled_from(TROUBLES), min_size=1, max_size=2)
beginnings = st.sampled_from(("idle", "recording", "autopilot"))


def make_trouble(world: SimulatedWorld, trouble: tuple[str, str], manager: GPUResourceManager) -> Callable[[], None]:
    """Something goes wrong, for good; returns what ends it where `heal` does not."""
    match trouble:
        case ("server", "vanishes"):
            world.ollama.unreachable = True
        case ("server", "stops"):
            world.ollama.stop(kill=True)
        case ("server", "starts"):
            world.ollama.stop()
            world.ollama.start(starting_s=1e6)
        case ("card", "full"):
            world.card.take("game", world.card.free_mib)
        case ("lease", "held"):
            stack = contextlib.ExitStack()
            with contextlib.suppress(GPUFSMError):
                in_thread(lambda: stack.enter_context(manager.clip(holder="somebody", timeout_s=0.5))).result(
                    PATIENCE_S
                )
            return stack.close
        case (op, kind):
            late: dict[str, Any] = {"delay_s": 500.0} if kind == "late" else {}
            world.faults.arm(op, kind, times=None, **late)
    return lambda: None


@contextlib.contextmanager
def staged(beginning: str, wrong: list[tuple[str, str]]) -> Iterator[tuple[SimulatedWorld, GPUResourceManager]]:
    """A manager with its own driver, in trouble; afterwards the trouble is over and the manager closed."""
    world = SimulatedWorld()
    manager = threaded(world, clip_model="simulated-clip")
    assert manager.set_execution_mode(beginning, timeout_s=PATIENCE_S).granted
    ends = [make_trouble(world, trouble, manager) for trouble in wrong]
    try:
        yield world, manager
    finally:
        for end in ends:
            end()
        world.faults.heal()
        world.ollama.unreachable = False
        world.ollama.start()
        closing = in_thread(manager.close)
        move(world.clock, closing)
        with contextlib.suppress(GPUFSMError):
            closing.result(PATIENCE_S)


def move(clock: SimulatedClock, future: Future[Any]) -> None:
    """Let virtual time pass for those who wait for it, until there is an answer."""
    end = time.monotonic() + PATIENCE_S
    while not future.done():
        assert time.monotonic() < end, "no answer, however much virtual time passes"
        clock.run_until(future.done, clock.monotonic() + 0.25)
        wait([future], timeout=0.0005)


def ask(
    world: SimulatedWorld, manager: GPUResourceManager, busy: bool, call: Callable[[], None], holding: threading.Event
) -> None:
    """Make the call in a thread of its own, and have time pass; `busy`: in the middle of another one's request."""
    asking: list[Future[None]] = []
    once = threading.Lock()

    def begin(op: str = "", phase: str = "") -> None:
        if phase != "during" and once.acquire(blocking=False):
            asking.append(in_thread(call))
            holding.wait(STUCK_S)

    if busy:
        world.on_io.append(begin)
        other = "autopilot" if manager.get_status().execution_mode.value == "recording" else "recording"
        manager.submit_execution_mode(other)
        end = time.monotonic() + 1.0
        while not asking and time.monotonic() < end:
            holding.wait(0.001)
        world.on_io.remove(begin)
    begin()
    assert holding.wait(STUCK_S)  # until then time would pass before the call
    move(world.clock, asking[0])
    asking[0].result(0)


def quietly(call: Callable[[], object]) -> None:
    """Any error of ours is an answer, but for a defect."""
    try:
        call()
    except InternalError:
        raise
    except GPUFSMError:
        pass


# --- the tests --------------------------------------------------------------------------------------------------------


@given(name=st.sampled_from(sorted(BLOCKING)), limit_s=limits, beginning=beginnings, wrong=troubles, busy=st.booleans())
@example(name="recording", limit_s=3.0, beginning="idle", wrong=[("ollama.load", "hang")], busy=True)
@example(name="autopilot", limit_s=3.0, beginning="recording", wrong=[("clip.to_gpu", "hang")], busy=True)
@example(name="vlm", limit_s=20.0, beginning="autopilot", wrong=[("ollama.ps", "hang"), ("lease", "held")], busy=False)
@example(name="close", limit_s=0.7, beginning="recording", wrong=[("server", "starts")], busy=True)
@settings(max_examples=120)
def test_no_blocking_call_is_later_than_its_limit(
    name: str, limit_s: float, beginning: str, wrong: list[tuple[str, str]], busy: bool
) -> None:
    """A thread that asks; the work may go on for minutes without it."""
    with staged(beginning, wrong) as (world, manager):
        watch = Watch(world.clock)

        def call() -> None:
            with watch.running():
                quietly(lambda: BLOCKING[name](manager, limit_s))

        ask(world, manager, busy, call, watch.holding)
        assert not watch.stuck, "it could not leave while the world stood still"
        assert watch.took_s <= limit_s + GRACE_S


@given(
    name=st.sampled_from(sorted(AWAITABLE)), limit_s=limits, beginning=beginnings, wrong=troubles, busy=st.booleans()
)
@example(name="recording", limit_s=3.0, beginning="idle", wrong=[("ollama.load", "hang")], busy=True)
@example(name="clip", limit_s=0.7, beginning="recording", wrong=[("clip.to_gpu", "hang")], busy=True)
@settings(max_examples=120)
def test_no_awaited_call_is_later_than_its_limit(
    name: str, limit_s: float, beginning: str, wrong: list[tuple[str, str]], busy: bool
) -> None:
    """A task that asks, in a loop that lives in virtual time."""
    with staged(beginning, wrong) as (world, manager):
        took: list[float] = []
        loops: list[VirtualLoop] = []
        held = threading.Event()

        def make() -> VirtualLoop:
            loops.append(VirtualLoop(world.clock, held))
            return loops[0]

        async def body() -> None:
            loops[0].hold_the_world()
            began = loops[0].time()
            try:
                await AWAITABLE[name](manager, limit_s)
            except InternalError:
                raise
            except GPUFSMError:
                pass
            finally:
                took.append(loops[0].time() - began)
                loops[0].let_the_world_go_on()
                loops[0].measuring = False
                loops[0].idle.set()

        def call() -> None:
            with asyncio.Runner(loop_factory=make) as runner:
                runner.run(body())

        ask(world, manager, busy, call, held)
        assert not loops[0].stuck, "it could not leave while the world stood still"
        assert took[0] <= limit_s + GRACE_S


INFERENCE = [("ollama.generate", kind) for kind in sorted(KINDS["ollama.generate"])]


@given(
    name=st.sampled_from(sorted(ASKING)),
    limit_s=st.sampled_from((0.05, 0.7, 3.0, 20.0)),
    wrong=st.sampled_from([*INFERENCE, ("server", "vanishes"), ("server", "stops"), ("server", "starts")]),
    generate_s=st.sampled_from((0.5, 1e6)),
    awaited=st.booleans(),
)
@settings(max_examples=80)
def test_no_answer_is_waited_for_longer_than_its_limit(
    name: str, limit_s: float, wrong: tuple[str, str], generate_s: float, awaited: bool
) -> None:
    """The model's own calls, under a lease: one limit for the whole answer."""
    world = SimulatedWorld(generate_s=generate_s)
    manager = threaded(world)
    try:
        assert manager.set_execution_mode("recording", timeout_s=PATIENCE_S).granted
        turns = Turns(world.clock)
        began: list[float] = []

        def blocking() -> None:
            with manager.vlm() as vlm, world.clock.turn:
                make_trouble(world, wrong, manager)
                began.append(world.clock.monotonic())
                quietly(lambda: ASKING[name](vlm, limit_s))
                turns.ended_at = world.clock.monotonic()

        async def body() -> None:
            asyncio.get_running_loop().set_default_executor(turns)
            async with manager.aio.vlm() as vlm:
                make_trouble(world, wrong, manager)
                began.append(world.clock.monotonic())
                with contextlib.suppress(GPUFSMError):
                    if name.startswith("stream"):
                        parts = vlm.stream("x", timeout_s=limit_s)
                        async with contextlib.aclosing(parts):  # type: ignore[type-var]
                            async for _ in parts:
                                pass
                    else:
                        await ASKING[name](vlm, limit_s)  # type: ignore[misc]

        asking = in_thread(lambda: asyncio.run(body())) if awaited else in_thread(blocking)
        asking.result(PATIENCE_S)
        assert turns.ended_at - began[0] <= limit_s + GRACE_S
    finally:
        world.faults.heal()
        world.ollama.unreachable = False
        world.ollama.start()
        closing = in_thread(manager.close)
        move(world.clock, closing)


SHORT: dict[str, Any] = {
    "vlm_load_deadline_s": 20.0,
    "unload_deadline_s": 5.0,
    "shed_deadline_s": 8.0,
    "drain_timeout_s": 3.0,
}


bounded = st.sampled_from([t for t in TROUBLES[:-1] if not (t[0].startswith("clip.") and t[1] in ("hang", "late"))])


@given(name=st.sampled_from(sorted(set(BLOCKING) - {"close"})), limit_s=limits, beginning=beginnings, trouble=bounded)
@example(name="recording", limit_s=3.0, beginning="idle", trouble=("ollama.load", "hang"))
@settings(max_examples=150)
def test_an_inline_manager_is_late_by_the_work_in_hand_at_most(
    name: str, limit_s: float, beginning: str, trouble: tuple[str, str]
) -> None:
    """Where the caller's own thread drives, nobody else can leave a call of a port: it is left when that ends.

    So the settings' deadlines are the bound, and not the two seconds.  A call of CLIP has no deadline at all, so a CLIP
    that hangs is left out here.
    """
    world = SimulatedWorld()
    manager = inline(world, **SHORT)
    assert manager.set_execution_mode(beginning).granted
    end = make_trouble(world, trouble, manager)
    began = world.clock.monotonic()
    quietly(lambda: BLOCKING[name](manager, limit_s))
    config = manager.config
    work_s = config.vlm_load_deadline_s + config.unload_deadline_s + config.shed_deadline_s + config.settle_timeout_s
    assert world.clock.monotonic() - began <= limit_s + work_s + GRACE_S
    end()
    world.faults.heal()
    world.ollama.unreachable = False
    world.ollama.start()
    manager.close()


BRIEF: dict[str, Any] = {
    "observe_timeout_s": 0.3,
    "unload_deadline_s": 1.0,
    "shed_deadline_s": 1.0,
    "settle_timeout_s": 0.2,
    "drain_timeout_s": 0.2,
    "vlm_load_deadline_s": 1.0,
}


def hanging(visit: Visit) -> None:
    """Says nothing."""
    visit.hang()


def dripping(visit: Visit) -> None:
    """A byte now and then, for ever."""
    visit.send(http(b"", length=10**9))
    visit.drip(b" ", 0.01)


def flooding(visit: Visit) -> None:
    """More than anybody can read, for ever."""
    visit.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\n")
    visit.flood(b'{"response": "G", "done": false}\n' * 100)


def test_in_real_time_calls_are_as_punctual(capsys: pytest.CaptureFixture[str]) -> None:
    """Real sockets, a server that hangs, drips or floods, and a limit of 80 ms on every call; the worst is printed."""
    worst: dict[str, float] = {}
    limit_s = 0.08
    for name, badly in (("hang", hanging), ("drip", dripping), ("flood", flooding)):
        healthy = threading.Event()
        healthy.set()

        def answer(visit: Visit, badly: Callable[[Visit], None] = badly, healthy: threading.Event = healthy) -> None:
            if not healthy.is_set():
                badly(visit)
            elif visit.line.endswith("/api/ps"):
                visit.send(http(ps(entry("tiny-a:latest"))))
            elif visit.line.endswith("/api/tags"):
                visit.send(http({"models": [entry("tiny-a:latest")]}))
            else:
                visit.send(http(LOADED))

        with RawServer(answer) as server:
            config = GPUResourceConfig(
                ollama_url=server.url, vlm_model="tiny-a", clip_model=None, on_partial_offload="accept", **BRIEF
            )
            world = SimulatedWorld(gpu=False)
            ours = OllamaManager(config, clock=WallClock())
            manager = GPUResourceManager(config, vlm_server=ours, clip_host=NoCLIP(), vram_probe=world.probe)
            assert manager.set_execution_mode("recording", timeout_s=PATIENCE_S).granted
            with manager.vlm() as vlm:
                healthy.clear()
                for verb, ask in ASKING.items():
                    worst[f"{name} {verb}"] = late(lambda ask=ask, vlm=vlm: ask(vlm, limit_s), limit_s)  # type: ignore[misc]
            for verb, call in BLOCKING.items():
                if verb not in ("clip", "close"):
                    worst[f"{name} {verb}"] = late(lambda call=call, m=manager: call(m, limit_s), limit_s)  # type: ignore[misc]
            for verb, awaitable in AWAITABLE.items():
                if verb != "clip":

                    async def body(
                        awaitable: Callable[..., Coroutine[Any, Any, object]] = awaitable,
                        m: GPUResourceManager = manager,
                    ) -> None:
                        await awaitable(m, limit_s)

                    worst[f"{name} {verb}, awaited"] = late(lambda body=body: asyncio.run(body()), limit_s)  # type: ignore[misc]
            worst[f"{name} close"] = late(lambda m=manager: m.close(timeout_s=limit_s), limit_s)  # type: ignore[misc]
            healthy.set()
            with contextlib.suppress(OperationTimeout):
                manager.close(timeout_s=PATIENCE_S)
    latest = max(worst, key=lambda key: worst[key])
    with capsys.disabled():
        sys.stdout.write(
            f"\nreal deadlines: {len(worst)} calls of {limit_s} s, worst {worst[latest] * 1e3:.0f} ms late ({latest})\n"
        )
    assert worst[latest] < GRACE_S


def late(call: Callable[[], object], limit_s: float) -> float:
    """Real seconds beyond the limit."""
    began = time.perf_counter()
    quietly(call)
    return time.perf_counter() - began - limit_s
