"""The asyncio face: the same verbs, awaitable, from any number of event loops.

A waiter costs a future, not a thread.  Cancelling a waiter leaves the transition unharmed; only a lease that nobody
waits for any more is given back.  Model calls run in the loop's default executor, so the loop never blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from gpu_fsm import errors
from gpu_fsm.arguments import as_mode, as_timeout, default_holder
from gpu_fsm.driver import Driver
from gpu_fsm.handles import CLIP, VLM
from gpu_fsm.leases import forget, remember
from gpu_fsm.ports import Completion
from gpu_fsm.status import ClipPlace, ExecutionMode, GPUResourceStatus
from gpu_fsm.tickets import Outcome

if TYPE_CHECKING:
    from gpu_fsm.ports import Embeddings

T = TypeVar("T")


class AsyncVerbs:
    """`manager.aio`: needs a threaded manager, since something has to drive while the loop goes on."""

    def __init__(self, driver: Driver, close: Callable[[], tuple[str, ...]]) -> None:
        if not driver.threaded:
            raise errors.BadArgument(detail="the asyncio face needs a threaded manager", remedy="Leave threaded=True.")
        self._driver = driver
        self._close = close

    async def set_execution_mode(
        self, mode: ExecutionMode | str, *, preempt: bool = False, timeout_s: float | None = None
    ) -> Outcome:
        """See `GPUResourceManager.set_execution_mode`."""
        timeout_s = as_timeout(timeout_s)
        return await self._wait(self._driver.post("request", mode=as_mode(mode), preempt=preempt).future, timeout_s)

    async def ensure_vlm_loaded(self, *, timeout_s: float | None = None) -> None:
        """See `GPUResourceManager.ensure_vlm_loaded`."""
        timeout_s = as_timeout(timeout_s)
        await self._wait(self._driver.post("vlm_wanted").future, timeout_s)

    async def ensure_vlm_unloaded(self, *, timeout_s: float | None = None) -> None:
        """See `GPUResourceManager.ensure_vlm_unloaded`."""
        timeout_s = as_timeout(timeout_s)
        await self._wait(self._driver.post("vlm_unwanted").future, timeout_s)

    async def migrate_clip_to_gpu(self, *, timeout_s: float | None = None) -> None:
        """See `GPUResourceManager.migrate_clip_to_gpu`."""
        await self._migrate("gpu", timeout_s)

    async def migrate_clip_to_cpu(self, *, timeout_s: float | None = None) -> None:
        """See `GPUResourceManager.migrate_clip_to_cpu`."""
        await self._migrate("cpu", timeout_s)

    async def _migrate(self, place: ClipPlace, timeout_s: float | None) -> None:
        timeout_s = as_timeout(timeout_s)
        await self._wait(self._driver.post("migrate_clip", place=place).future, timeout_s)

    def get_status(self) -> GPUResourceStatus:
        """The status; never waits, so it is not a coroutine."""
        return self._driver.status()

    @contextlib.asynccontextmanager
    async def vlm(self, *, holder: str = "", timeout_s: float | None = None) -> AsyncIterator[AsyncVLM]:
        """Lease the VLM, loading it first where it is out."""
        driver, timeout_s = self._driver, as_timeout(timeout_s)
        driver.check_usable()
        holder = holder or default_holder()
        lease = driver.leases.try_vlm(holder)
        if lease is None:
            outcome = await self._lease(driver.post("vlm_wanted", lease_for=holder).future, timeout_s, _lease_of)
            lease = _lease_of(outcome)
        assert lease is not None
        remember(lease)
        try:
            yield AsyncVLM(VLM(driver, lease))
        finally:
            forget(lease)
            driver.leases.release(lease)

    @contextlib.asynccontextmanager
    async def clip(self, *, holder: str = "", timeout_s: float | None = None) -> AsyncIterator[AsyncCLIP]:
        """Lease CLIP where it is."""
        driver, timeout_s = self._driver, as_timeout(timeout_s)
        lease = await self._lease(driver.ask_clip(holder or default_holder()), timeout_s, int)
        remember(lease)
        try:
            yield AsyncCLIP(CLIP(driver))
        finally:
            forget(lease)
            driver.leases.release(lease)

    async def close(self) -> tuple[str, ...]:
        """See `GPUResourceManager.close`."""
        return await asyncio.to_thread(self._close)

    async def _wait(self, future: Future[T], timeout_s: float | None) -> T:
        answer = asyncio.wrap_future(future)
        answer.add_done_callback(_seen)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(answer)
        except TimeoutError as error:
            if isinstance(error, errors.GPUFSMError):
                raise
            raise errors.OperationTimeout(
                detail=f"no answer within {timeout_s:g} s; the operation goes on",
                remedy="Wait longer, or look at get_status().",
                timeout_s=timeout_s or 0.0,
            ) from error

    async def _lease(self, future: Future[T], timeout_s: float | None, lease_of: Callable[[T], int | None]) -> T:
        """Wait for a lease; one that is granted after its waiter has gone is given back."""
        try:
            return await self._wait(future, timeout_s)
        except BaseException:
            self._driver.abandon(future, lease_of)
            raise


def _lease_of(outcome: Outcome) -> int | None:
    return outcome.lease


class AsyncVLM:
    """`VLM` with awaitable calls."""

    def __init__(self, vlm: VLM) -> None:
        self._vlm = vlm
        self.model = vlm.model

    async def generate(
        self,
        prompt: str,
        *,
        images: Sequence[object] = (),
        format: Mapping[str, Any] | str | None = None,  # noqa: A002 - Ollama's word
        timeout_s: float | None = None,
    ) -> Completion:
        """See `VLM.generate`."""
        return await asyncio.to_thread(self._vlm.generate, prompt, images=images, format=format, timeout_s=timeout_s)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        format: Mapping[str, Any] | str | None = None,  # noqa: A002 - Ollama's word
        timeout_s: float | None = None,
    ) -> Completion:
        """See `VLM.chat`."""
        return await asyncio.to_thread(self._vlm.chat, messages, format=format, timeout_s=timeout_s)

    async def stream(
        self,
        prompt: str,
        *,
        images: Sequence[object] = (),
        format: Mapping[str, Any] | str | None = None,  # noqa: A002 - Ollama's word
        timeout_s: float | None = None,
    ) -> AsyncIterator[Completion]:
        """See `VLM.stream`; use `contextlib.aclosing` where you stop early."""
        parts = self._vlm.stream(prompt, images=images, format=format, timeout_s=timeout_s)
        async with contextlib.aclosing(_parts(parts)) as following:
            async for part in following:
                yield part

    async def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        format: Mapping[str, Any] | str | None = None,  # noqa: A002 - Ollama's word
        timeout_s: float | None = None,
    ) -> AsyncIterator[Completion]:
        """See `VLM.stream_chat`; use `contextlib.aclosing` where you stop early."""
        async with contextlib.aclosing(
            _parts(self._vlm.stream_chat(messages, format=format, timeout_s=timeout_s))
        ) as following:
            async for part in following:
                yield part


def _seen(answer: asyncio.Future[Any]) -> None:
    """Take note of an error that comes after its waiter has gone; asyncio would report it as overlooked."""
    if not answer.cancelled():
        answer.exception()


async def _parts(parts: Generator[Completion, None, None]) -> AsyncGenerator[Completion, None]:
    """The parts of a stream, each waited for in a thread."""
    running: asyncio.Future[Completion | None] | None = None
    try:
        while True:
            running = asyncio.ensure_future(asyncio.to_thread(next, parts, None))
            part = await asyncio.shield(running)
            running = None
            if part is None:
                return
            yield part
    finally:
        if running is None or running.done():
            parts.close()
        else:
            # A thread still waits for the next part: the stream is closed as soon as it has it, and nobody waits.
            running.add_done_callback(_seen)
            running.add_done_callback(lambda _: parts.close())


class AsyncCLIP:
    """`CLIP` with awaitable calls."""

    def __init__(self, clip: CLIP) -> None:
        self._clip = clip

    @property
    def device(self) -> str:
        """See `CLIP.device`."""
        return self._clip.device

    async def encode(
        self,
        items: Sequence[object],
        *,
        batch_size: int = 32,
        normalize: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> Embeddings:
        """See `CLIP.encode`; `progress` is called in the working thread."""
        encode = self._clip.encode
        options: dict[str, Any] = {"batch_size": batch_size, "normalize": normalize, "progress": progress}
        # A cancelled waiter must not end the lease under a running encode, so the call is waited out.
        running = asyncio.ensure_future(asyncio.to_thread(encode, items, **options))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                await running
            raise
