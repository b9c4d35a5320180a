"""The asyncio face: waiting costs no thread, cancelling harms nothing, the loop never blocks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from gpu_fsm import ExecutionMode, GPUResourceManager
from gpu_fsm.errors import BadArgument, ClipUnavailable, GPUFSMError, LeaseHeld, ManagerClosed, OperationTimeout
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.states import State
from tests.waiting import PATIENCE_S, Gate, in_thread, journal_is_whole, threads_of
from tests.worlds import inline, threaded

Body = Callable[[GPUResourceManager, SimulatedWorld], Coroutine[Any, Any, None]]


async def until(holds: Callable[[], bool]) -> None:
    """Let the loop run until `holds()`."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.001)


def run(body: Body, world: SimulatedWorld | None = None, **settings: Any) -> GPUResourceManager:
    """Run a test's coroutine with a threaded manager, closed at its end."""
    world = world or SimulatedWorld()
    manager = threaded(world, **settings)

    async def whole() -> None:
        async with manager:
            async with asyncio.timeout(PATIENCE_S):
                await body(manager, world)

    asyncio.run(whole())
    assert threads_of(manager) == []
    journal_is_whole(manager)
    return manager


def test_every_verb_is_awaitable() -> None:
    """The asyncio face has the blocking face's verbs, with the same answers."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        aio = manager.aio
        assert (await aio.set_execution_mode("recording")).state is State.RECORDING
        assert world.vlm_resident()
        async with aio.vlm(holder="me") as vlm:
            assert vlm.model == world.vlm.name
            assert (await vlm.generate("what is this?")).text == "ok"
            assert (await vlm.chat([{"role": "user", "content": "hello"}])).done
            assert "".join([part.text async for part in vlm.stream("go on")]) == "ok"
        await aio.ensure_vlm_unloaded()
        assert not world.vlm_resident()
        await aio.ensure_vlm_loaded()
        assert (await aio.set_execution_mode(ExecutionMode.IDLE, preempt=True)).granted
        await aio.ensure_vlm_unloaded()
        await aio.migrate_clip_to_gpu()
        async with aio.clip() as clip:
            assert clip.device == "sim:0"
            assert (await clip.encode(["a", "b"])).shape == (2, 32)
        await aio.migrate_clip_to_cpu()
        assert aio.get_status().clip_device == "cpu"

    run(body)


def test_the_verbs_of_both_faces_are_the_same() -> None:
    """What can be called can be awaited, with the same parameters."""
    import inspect

    from gpu_fsm.aio import AsyncVerbs

    names = (
        "set_execution_mode", "ensure_vlm_loaded", "ensure_vlm_unloaded", "migrate_clip_to_gpu", "migrate_clip_to_cpu",
        "vlm", "clip", "get_status",
    )  # fmt: skip
    for name in names:
        blocking, awaitable = (inspect.signature(getattr(face, name)) for face in (GPUResourceManager, AsyncVerbs))
        assert blocking.parameters == awaitable.parameters, name


def test_wait_for_times_out_and_the_load_goes_on() -> None:
    """`asyncio.wait_for` raises `TimeoutError` as it should; the load it gave up on is there afterwards, once."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        gate = Gate(world, "ollama.load")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(manager.aio.set_execution_mode("recording"), 0.02)
        gate.open()
        assert (await manager.aio.set_execution_mode("recording")).granted
        assert world.ollama.counts["loads"] == 1

    run(body)


def test_its_own_time_out_is_an_operation_timeout() -> None:
    """`timeout_s` raises `OperationTimeout`, which is a `TimeoutError` that says how long and what to do."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        gate = Gate(world, "ollama.load")
        with pytest.raises(OperationTimeout) as caught:
            await manager.aio.ensure_vlm_loaded(timeout_s=0.02)
        assert isinstance(caught.value, TimeoutError)
        assert (caught.value.timeout_s, bool(caught.value.remedy)) == (0.02, True)
        gate.open()
        await manager.aio.ensure_vlm_loaded()
        assert world.ollama.counts["loads"] == 1

    run(body)


def test_a_time_out_around_several_calls_is_not_swallowed() -> None:
    """`asyncio.timeout` around a call of ours ends as a plain `TimeoutError`, never as a normal return."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        gate = Gate(world, "ollama.load")
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.02):
                await manager.aio.ensure_vlm_loaded(timeout_s=PATIENCE_S)
        assert not isinstance(caught.value, GPUFSMError)
        gate.open()

    run(body)


def test_cancelled_waiters_harm_nothing() -> None:
    """Cancelling who waits raises `CancelledError` in the task; the transition ends as if nothing had happened."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        gate = Gate(world, "ollama.load")
        waiters = [asyncio.create_task(manager.aio.set_execution_mode("recording")) for _ in range(20)]
        await until(gate.reached.is_set)
        for waiter in waiters[::2]:
            waiter.cancel()
        ended = await asyncio.gather(*waiters[::2], return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ended)
        assert all(waiter.cancelled() for waiter in waiters[::2])
        gate.open()
        for outcome in await asyncio.gather(*waiters[1::2]):
            assert outcome.granted
        assert world.ollama.counts["loads"] == 1
        assert manager.get_status().state is State.RECORDING

    run(body)


def test_a_request_whose_waiter_left_before_it_began_is_served_all_the_same() -> None:
    """Cancelling ends a waiting, it takes no request back: the last mode asked for is the one that stands."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        gate = Gate(world, "ollama.load")
        first = asyncio.create_task(manager.aio.set_execution_mode("recording"))
        await until(gate.reached.is_set)
        second = asyncio.create_task(manager.aio.set_execution_mode("autopilot"))
        await until(lambda: manager.get_status().queued == 1)
        second.cancel()
        gate.open()
        assert (await first).granted
        await until(lambda: manager.get_status().state is State.AUTOPILOT)

    run(body)


def test_two_event_loops_in_two_threads_are_served_at_once() -> None:
    """A manager belongs to no loop: requests of two loops wait side by side and both are answered."""
    world = SimulatedWorld()
    gate = Gate(world, "ollama.load")
    manager = threaded(world)

    async def client() -> list[bool]:
        tasks = [asyncio.create_task(manager.aio.ensure_vlm_loaded()) for _ in range(10)]
        await asyncio.gather(*tasks)
        async with manager.aio.vlm() as vlm:
            return [(await vlm.generate("x")).done for _ in range(3)]

    loops = [in_thread(asyncio.run, client()) for _ in range(2)]
    gate.wait()
    gate.open()
    for loop in loops:
        assert loop.result(PATIENCE_S) == [True] * 3
    assert world.ollama.counts["loads"] == 1
    assert manager.get_status().leases == ()
    manager.close()


def test_the_loop_keeps_ticking_during_a_load() -> None:
    """The load ends only when the loop has ticked a hundred times, so a loop that stood still would never see it."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        gate = Gate(world, "ollama.load")
        load = asyncio.create_task(manager.aio.set_execution_mode("recording"))
        await until(gate.reached.is_set)
        for _ in range(100):
            await asyncio.sleep(0)
            assert not load.done()
            assert manager.get_status().state is State.LOADING
        gate.open()
        assert (await load).granted

    run(body)


def test_the_loop_keeps_ticking_while_the_vlm_answers_and_clip_encodes() -> None:
    """Model calls run off the loop: it goes on while both are under way."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        gates = [Gate(world, "ollama.generate"), Gate(world, "clip.encode")]

        async def ask() -> None:
            async with manager.aio.vlm() as vlm:
                await vlm.generate("x")

        async def encode() -> None:
            async with manager.aio.clip() as clip:
                await clip.encode(["x"])

        tasks = [asyncio.create_task(ask()), asyncio.create_task(encode())]
        for gate in gates:
            await until(gate.reached.is_set)
        for _ in range(100):
            await asyncio.sleep(0)
        for gate in gates:
            gate.open()
        await asyncio.gather(*tasks)

    run(body)


def test_a_hundred_waiters_cost_no_thread() -> None:
    """Waiting is a future: with a hundred tasks at the gate there are as many threads as with one."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        gate = Gate(world, "ollama.load")
        waiters = [asyncio.create_task(manager.aio.ensure_vlm_loaded())]
        await until(gate.reached.is_set)
        threads = set(threading.enumerate())  # some of them may be ending
        waiters += [asyncio.create_task(manager.aio.ensure_vlm_loaded(timeout_s=PATIENCE_S)) for _ in range(99)]
        await until(lambda: manager.get_status().queued == 99)
        assert set(threading.enumerate()) <= threads
        gate.open()
        await asyncio.gather(*waiters)
        assert world.ollama.counts["loads"] == 1

    run(body)


def test_waiters_survive_a_garbage_collection() -> None:
    """What is under way is held by more than weak references."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        gate = Gate(world, "ollama.load")
        waiter = asyncio.create_task(manager.aio.ensure_vlm_loaded())
        await until(gate.reached.is_set)
        gc.collect()
        gate.open()
        await waiter

    run(body)


@pytest.mark.parametrize("steps", [*range(1, 13), 20, 40, 80])
def test_a_lease_is_given_back_wherever_its_task_is_cancelled(steps: int) -> None:
    """After so many turns of the loop the task is cancelled, wherever it is; soon no lease is left."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        async def use() -> None:
            async with manager.aio.vlm() as vlm:
                await asyncio.sleep(0)
                async with manager.aio.clip() as clip:
                    await clip.encode(["x"])
                await vlm.generate("x")
                async with contextlib.aclosing(vlm.stream("x")) as parts:
                    async for _ in parts:
                        await asyncio.sleep(0)

        task = asyncio.create_task(use())
        for _ in range(steps):
            await asyncio.sleep(0.0005)
        cancelled = task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled() or not cancelled or task.exception() is None
        await until(lambda: manager.get_status().leases == ())
        # A thread of the cancelled task may still move the clock, past the end of a look that another one has begun.
        while not (await manager.aio.set_execution_mode("autopilot")).granted:
            await asyncio.sleep(0.001)

    run(body)


def test_an_answer_that_nobody_waits_for_any_more_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    """The waiter was cancelled, the request is refused later: asyncio logs nothing of an exception never retrieved."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        gate = Gate(world, "ollama.load")
        first = asyncio.create_task(manager.aio.set_execution_mode("recording"))
        await asyncio.to_thread(gate.wait)
        waiter = asyncio.create_task(manager.aio.set_execution_mode("autopilot"))
        await until(lambda: manager.get_status().queued == 1)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        newest = manager.submit_execution_mode("idle", preempt=True)
        gate.open()
        await asyncio.gather(first, asyncio.wrap_future(newest), return_exceptions=True)
        await until(lambda: manager.get_status().queued == 0)
        del waiter, first
        gc.collect()

    with caplog.at_level(logging.ERROR, logger="asyncio"):
        run(body)
        gc.collect()
    assert not caplog.records


def test_a_lease_granted_to_a_task_that_was_cancelled_while_waiting_is_given_back() -> None:
    """The VLM comes in for nobody: the ticket ends without a lease."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        gate = Gate(world, "ollama.load")

        async def use() -> None:
            async with manager.aio.vlm():
                pytest.fail("it was cancelled")

        task = asyncio.create_task(use())
        await until(gate.reached.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        await manager.aio.ensure_vlm_loaded()
        assert manager.get_status().leases == ()

    run(body)


def test_a_lease_granted_in_the_same_moment_as_the_cancellation_is_given_back() -> None:
    """The answer is there, the task has not run yet, and is cancelled: nobody holds what nobody will return."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        await manager.aio.ensure_vlm_loaded()
        await until(lambda: manager.get_status().state is State.IDLE)
        manager._driver.leases.vlm_ready(float("-inf"))  # no fast path: the lease has to come by ticket

        async def use() -> None:
            async with manager.aio.vlm(holder="late"):
                await asyncio.sleep(PATIENCE_S)

        task = asyncio.create_task(use())
        await asyncio.sleep(0)
        granted = threading.Event()
        leased = in_thread(granted.wait, 0.2)
        while not manager.get_status().leases and not leased.done():
            pass  # on purpose without giving the loop a turn: the task must not see its answer before it is cancelled
        assert manager.get_status().leases
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: manager.get_status().leases == ())

    run(body)


def test_a_clip_lease_granted_to_a_cancelled_task_is_given_back() -> None:
    """Waiting at the closed gate and leaving makes no holder."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        gate = Gate(world, "clip.to_gpu")
        mode = asyncio.create_task(manager.aio.set_execution_mode("autopilot"))
        await until(gate.reached.is_set)

        async def use() -> None:
            async with manager.aio.clip():
                pytest.fail("it was cancelled")

        task = asyncio.create_task(use())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        assert (await mode).granted
        assert manager.get_status().leases == ()

    run(body)


def test_a_cancelled_encode_keeps_its_lease_until_it_has_ended() -> None:
    """CLIP must not move under a running encode, so the lease outlives the cancellation by that much."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        gate = Gate(world, "clip.encode")

        async def use() -> None:
            async with manager.aio.clip() as clip:
                await clip.encode(["x"])

        task = asyncio.create_task(use())
        await until(gate.reached.is_set)
        task.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert [lease.model for lease in manager.get_status().leases] == ["clip"]
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert manager.get_status().leases == ()
        assert world.clip.violations == []

    run(body)


def test_an_abandoned_stream_gives_the_lease_back() -> None:
    """Leaving a stream early, by `break` or by an exception, ends its connection and the lease."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        async with manager.aio.vlm() as vlm:
            async with contextlib.aclosing(vlm.stream("a long story")) as parts:
                async for part in parts:
                    assert not part.done
                    break
        assert manager.get_status().leases == ()
        with pytest.raises(ZeroDivisionError):
            async with manager.aio.vlm() as vlm:
                async for _ in vlm.stream("a long story"):
                    raise ZeroDivisionError
        assert manager.get_status().leases == ()
        assert (await manager.aio.set_execution_mode("autopilot")).granted

    run(body, SimulatedWorld(responder=lambda *_: "word " * 200))


def test_a_stream_cancelled_while_it_waits_for_a_part_raises_the_cancellation() -> None:
    """A cancelled `async for` ends as cancelled, not as an error of the clearing up, and the lease comes back."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        gate = Gate(world, "ollama.generate")

        async def use() -> None:
            async with manager.aio.vlm() as vlm:
                async for _ in vlm.stream("x"):
                    pytest.fail("there is no part yet")

        task = asyncio.create_task(use())
        await until(gate.reached.is_set)
        task.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: manager.get_status().leases == ())

    run(body)


def test_a_stream_that_nobody_finishes_is_closed_with_its_loop() -> None:
    """A stream left lying is cleared up by asyncio at the end of the loop, without a sound."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        left: list[AsyncIterator[object]] = []
        async with manager.aio.vlm() as vlm:
            left.append(vlm.stream("a long story"))
            await anext(left[0])
        assert manager.get_status().leases == ()

    run(body, SimulatedWorld(responder=lambda *_: "word " * 200))


def test_an_answer_that_comes_after_its_loop_has_ended_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """A waiter that gave up, and its whole loop with it, leaves nothing that fails when the answer comes."""
    world = SimulatedWorld()
    gate = Gate(world, "ollama.load")
    manager = threaded(world)

    async def gives_up() -> None:
        with pytest.raises(OperationTimeout):
            await manager.aio.ensure_vlm_loaded(timeout_s=0.01)

    asyncio.run(gives_up())
    gate.open()
    manager.ensure_vlm_loaded(timeout_s=PATIENCE_S)
    manager.close()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_caller_that_would_move_what_it_holds_is_told_at_once() -> None:
    """A task's own lease is known by context, also when other tasks hold leases."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        async with manager.aio.vlm(holder="me"):
            with pytest.raises(LeaseHeld) as caught:
                await manager.aio.set_execution_mode("autopilot")
            assert "me" in caught.value.holders[0]
        assert (await manager.aio.set_execution_mode("autopilot")).granted

    run(body)


def test_the_holder_of_a_lease_is_named_after_its_task() -> None:
    """Without a name of its own a lease bears the task's, so that a timeout can say who stands in the way."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        async def use() -> str:
            async with manager.aio.vlm():
                return manager.get_status().leases[0].holder

        assert await asyncio.create_task(use(), name="the watcher") == "the watcher"

    run(body)


def test_there_is_no_lease_on_a_clip_that_is_not_there() -> None:
    """Without a CLIP both faces raise `ClipUnavailable` instead of handing out a lease on nothing."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        with pytest.raises(ClipUnavailable):
            with manager.clip():
                pass
        with pytest.raises(ClipUnavailable):
            async with manager.aio.clip():
                pass

    run(body, SimulatedWorld(clip=False))


def test_waiters_are_told_that_the_manager_closes() -> None:
    """`close()` from another task ends every waiting with `ManagerClosed`; so do later calls."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        gate = Gate(world, "ollama.load")
        waiters = [asyncio.create_task(manager.aio.set_execution_mode("recording"))]
        await until(gate.reached.is_set)
        waiters += [asyncio.create_task(manager.aio.set_execution_mode(mode)) for mode in ("idle", "autopilot")]
        await until(lambda: manager.get_status().queued == 2)
        closing = asyncio.create_task(manager.aio.close())
        await until(lambda: manager._driver.mailbox.newest_preempt > 0)
        gate.open()
        assert await closing == ()
        ended = await asyncio.gather(*waiters, return_exceptions=True)
        assert [type(end) for end in ended] == [ManagerClosed] * 3
        with pytest.raises(ManagerClosed):
            await manager.aio.ensure_vlm_loaded()
        assert world.vlm_held_mib() == 0

    run(body)


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), True, "3"])
def test_a_bad_time_out_is_refused_before_anything_is_asked(bad: Any) -> None:
    """A timeout that cannot be meant raises `BadArgument`; no request is left behind."""

    async def body(manager: GPUResourceManager, world: SimulatedWorld) -> None:
        with pytest.raises(BadArgument):
            await manager.aio.set_execution_mode("recording", timeout_s=bad)
        with pytest.raises(BadArgument):
            await manager.aio.ensure_vlm_loaded(timeout_s=bad)
        with pytest.raises(BadArgument):
            async with manager.aio.vlm(timeout_s=bad):
                pass
        assert (await manager.aio.set_execution_mode("idle")).granted
        assert world.ollama.counts["loads"] == 0

    run(body)


def test_an_inline_manager_has_no_asyncio_face() -> None:
    """Something has to drive while the loop goes on: the inline driver says so, with the mend."""
    with pytest.raises(BadArgument, match="threaded"):
        _ = inline(SimulatedWorld()).aio
