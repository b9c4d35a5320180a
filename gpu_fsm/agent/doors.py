"""What the agent needs of a manager, once for both faces.

The agent's logic is written as coroutines against `Door`.  `AsyncDoor` leads to `manager.aio`.  `BlockingDoor` leads to
the manager itself: nothing behind it ever suspends, so `at_once` can run such a coroutine without an event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from gpu_fsm.status import ExecutionMode, GPUResourceStatus

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gpu_fsm.ports import Completion

    Vector = NDArray[np.float32]

T = TypeVar("T")


class VLMSession(Protocol):
    """A VLM lease as the agent uses it."""

    def generate(
        self,
        prompt: str,
        *,
        images: Sequence[object] = (),
        format: Mapping[str, Any] | str | None = None,  # noqa: A002 - Ollama's word
    ) -> Completion:
        """Run the VLM once."""


class CLIPSession(Protocol):
    """A CLIP lease as the agent uses it."""

    def encode(self, items: Sequence[object]) -> Vector:
        """Embed images and texts; float32 of shape (n, d), unit length."""


class Manager(Protocol):
    """The part of `GPUResourceManager` that an agent needs; anything with these verbs will do."""

    def set_execution_mode(self, mode: ExecutionMode) -> object:
        """Ask for a mode; returns when it stands or was turned down."""

    def get_status(self) -> GPUResourceStatus:
        """The state of everything, at once."""

    def ensure_vlm_unloaded(self) -> None:
        """Unload the VLM, for a pause."""

    def migrate_clip_to_cpu(self) -> None:
        """Take CLIP off the card, for a pause."""

    def vlm(self, *, holder: str = "", timeout_s: float | None = None) -> contextlib.AbstractContextManager[VLMSession]:
        """Lease the VLM, loading it where need be."""

    def clip(
        self, *, holder: str = "", timeout_s: float | None = None
    ) -> contextlib.AbstractContextManager[CLIPSession]:
        """Lease CLIP where it is."""


class Answering(Protocol):
    """A VLM that is asked once more or not at all, under one lease."""

    async def generate(self, prompt: str, images: Sequence[object], form: Mapping[str, Any]) -> Completion:
        """Run the VLM once; `form` is the JSON schema of the answer."""


class Door(Protocol):
    """The way to the models, and to work that takes a while."""

    async def set_mode(self, mode: ExecutionMode) -> None:
        """Ask for a mode."""

    async def unload_vlm(self) -> None:
        """Free the card of the VLM."""

    async def lower_clip(self) -> None:
        """Free the card of CLIP."""

    async def rest(self, pause_s: float) -> None:
        """Do nothing for so long."""

    def vlm(self, holder: str, timeout_s: float | None) -> contextlib.AbstractAsyncContextManager[Answering]:
        """Lease the VLM."""

    async def embed(self, items: Sequence[object], holder: str) -> Vector:
        """Embed under a lease of CLIP."""

    async def do(self, work: Callable[..., T], *args: Any) -> T:
        """Run something that computes or writes, where it holds up nobody."""


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine whose door is a `BlockingDoor`; an exception comes through as it is."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise RuntimeError("a coroutine behind a blocking door has suspended")


class BlockingDoor:
    """Calls the manager's blocking verbs, in the thread that asks."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    async def set_mode(self, mode: ExecutionMode) -> None:
        self._manager.set_execution_mode(mode)

    async def unload_vlm(self) -> None:
        self._manager.ensure_vlm_unloaded()

    async def lower_clip(self) -> None:
        self._manager.migrate_clip_to_cpu()

    async def rest(self, pause_s: float) -> None:
        threading.Event().wait(pause_s)

    @contextlib.asynccontextmanager
    async def vlm(self, holder: str, timeout_s: float | None) -> AsyncIterator[Answering]:
        with self._manager.vlm(holder=holder, timeout_s=timeout_s) as vlm:
            yield _Blocking(vlm)

    async def embed(self, items: Sequence[object], holder: str) -> Vector:
        with self._manager.clip(holder=holder) as clip:
            return clip.encode(items)

    async def do(self, work: Callable[..., T], *args: Any) -> T:
        return work(*args)


class _Blocking:
    def __init__(self, vlm: VLMSession) -> None:
        self._vlm = vlm

    async def generate(self, prompt: str, images: Sequence[object], form: Mapping[str, Any]) -> Completion:
        return self._vlm.generate(prompt, images=images, format=form)


class AsyncDoor:
    """Awaits the verbs of `manager.aio`; pictures and files are worked on in a thread."""

    def __init__(self, aio: Any) -> None:
        self._aio = aio

    async def set_mode(self, mode: ExecutionMode) -> None:
        await self._aio.set_execution_mode(mode)

    async def unload_vlm(self) -> None:
        await self._aio.ensure_vlm_unloaded()

    async def lower_clip(self) -> None:
        await self._aio.migrate_clip_to_cpu()

    async def rest(self, pause_s: float) -> None:
        await asyncio.sleep(pause_s)

    @contextlib.asynccontextmanager
    async def vlm(self, holder: str, timeout_s: float | None) -> AsyncIterator[Answering]:
        async with self._aio.vlm(holder=holder, timeout_s=timeout_s) as vlm:
            yield _Awaited(vlm)

    async def embed(self, items: Sequence[object], holder: str) -> Vector:
        async with self._aio.clip(holder=holder) as clip:
            vectors: Vector = await clip.encode(items)
        return vectors

    async def do(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.to_thread(work, *args)


class _Awaited:
    def __init__(self, vlm: Any) -> None:
        self._vlm = vlm

    async def generate(self, prompt: str, images: Sequence[object], form: Mapping[str, Any]) -> Completion:
        said: Completion = await self._vlm.generate(prompt, images=images, format=form)
        return said
