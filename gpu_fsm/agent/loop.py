"""`ExecutionLoop`: the agent itself.  It drives the manager's modes and decides which model a screen needs."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import frozen

from gpu_fsm.agent.detector import Classification, UIDetector
from gpu_fsm.agent.doors import AsyncDoor, BlockingDoor, Door, Manager, at_once
from gpu_fsm.agent.memory import FusionEngine, Match, Verdict
from gpu_fsm.agent.screens import Screen
from gpu_fsm.agent.stopping import Stopped, Stopper
from gpu_fsm.errors import CardHeld, GPUFSMError, ManagerClosed, one_line
from gpu_fsm.status import ExecutionMode, State

if TYPE_CHECKING:
    from gpu_fsm.agent.doors import Vector

log = logging.getLogger("gpu_fsm")

Result = Literal["recorded", "kept", "recognised", "asked", "unavailable", "failed"]
"""`kept`: recorded before; `asked`: the VLM was asked and answered; `unavailable`: it could not be asked."""

_HOLDER = "ExecutionLoop"
_NO_MORE = object()
_PAUSE_LOOK_S = 0.1
"""How often a pause looks whether it is over."""


@frozen(kw_only=True)
class Step:
    """How one screen was handled."""

    screen: str
    mode: ExecutionMode
    """As which mode says it was handled."""
    state: State
    """The manager's state when the screen had been handled."""
    result: Result
    label: str | None = None
    match: Match | None = None
    classification: Classification | None = None
    detail: str = ""
    elapsed_s: float = 0.0


Action = Callable[[Screen, str], Awaitable[None] | None]
"""Called with a screen and its label, for every screen that autopilot recognised; `arun` awaits what it returns."""
Listener = Callable[[Step], Awaitable[None] | None]


class ExecutionLoop:
    """Takes screens one after the other and handles each as the asked mode says.

    RECORDING: the VLM labels a new screen and its embedding is remembered.  AUTOPILOT: a screen that is recognised is
    acted on; any other is a question to the VLM, on demand.  IDLE, once asked for, is a pause: the VLM is unloaded,
    CLIP leaves the card, and no screen is taken until another mode is asked for.  In DEGRADED it goes on with what is
    there, which is CLIP on the CPU.  One thread or task drives it; `stop` and `follow` may be called from any other, or
    from a hook.

    A pause begins before a screen is handled: one that came after IDLE was asked for is handled when the pause is over.
    A source that may wait long for a screen lets it begin earlier by calling `rest` now and then.

    While `run` or `arun` runs in the main thread, SIGINT and SIGTERM end it: at once where it waits for a model or for
    a screen, else when the hook or the writing in hand is over.  `stopper.signal` says which signal it was.
    """

    def __init__(
        self,
        manager: Manager,
        detector: UIDetector,
        memory: FusionEngine,
        *,
        on_action: Action | None = None,
        on_step: Listener | None = None,
        on_pause: Callable[[bool], object] | None = None,
        memory_path: Path | str | None = None,
        stopper: Stopper | None = None,
    ) -> None:
        """With `memory_path` the memory is saved after each recorded screen, so a killed process loses at most one.

        `on_pause` is called with True when a pause begins and with False when it is over.
        """
        self._manager = manager
        self._detector = detector
        self.memory = memory
        self._on_action = on_action
        self._on_step = on_step
        self._on_pause = on_pause
        self._memory_path = memory_path
        self._mode = ExecutionMode.IDLE
        self.paused = False
        """IDLE was asked for, and nothing since."""
        self._idle_asked = 0
        self._ask_again = False
        """The manager could not be asked: the card was lent, or another manager's."""
        self.stopper = stopper or Stopper()
        self.unsaved = False
        """The last writing of the memory failed, so its file lacks something."""

    @property
    def mode(self) -> ExecutionMode:
        """The mode asked for last."""
        return self._mode

    def follow(self, mode: ExecutionMode) -> None:
        """Handle screens as `mode` says from now on; for somebody who has asked the manager for it himself."""
        self._idle_asked += mode is ExecutionMode.IDLE
        self._mode, self.paused = mode, mode is ExecutionMode.IDLE

    def stop(self) -> None:
        """End after the screen in hand."""
        self.stopper.stop()

    # --- blocking ---

    def set_mode(self, mode: ExecutionMode) -> None:
        """Change the agent's mode and have the manager arrange the card for it.

        A refusal or a degraded manager does not stop the agent: it goes on with what there is, and the manager
        remembers what was asked.
        """
        at_once(self._set_mode(BlockingDoor(self._manager), mode))

    def run(self, mode: ExecutionMode, screens: Iterable[Screen]) -> tuple[Step, ...]:
        """Set a mode and handle screens until they end, somebody calls `stop`, or a signal comes.

        The steps are kept for the answer: for screens without end, use `steps` in a `with loop.stopper:` block.
        """
        done: list[Step] = []
        with self.stopper, contextlib.suppress(Stopped):
            self.set_mode(mode)
            done.extend(self.steps(screens))
        return tuple(done)

    def steps(self, screens: Iterable[Screen]) -> Iterator[Step]:
        """Handle screens in the mode that is set, yielding how each went."""
        source = iter(screens)
        while not self.stopper.requested and self.rest():
            with self.stopper.cut():
                screen: Any = next(source, _NO_MORE)
            if screen is _NO_MORE or not self.rest():  # IDLE may have been asked for while the source waited
                return
            try:
                step = self.handle(screen)
            except ManagerClosed:
                return
            yield step

    def rest(self) -> bool:
        """Wait out a pause, if one was asked for; False where it ended with `stop` or with the manager's end."""
        return at_once(self._rest(BlockingDoor(self._manager)))

    def handle(self, screen: Screen, mode: ExecutionMode | None = None) -> Step:
        """Handle one screen as `mode` says, or as the asked mode does; the manager is not asked for another mode.

        Raises only `ManagerClosed`, `Stopped`, and what a hook raises.
        """
        step = at_once(self._handle(BlockingDoor(self._manager), screen, mode or self._mode))
        for told in self._tell(screen, step):
            if inspect.isawaitable(told):
                raise TypeError("an async hook needs arun()")
        return step

    # --- asyncio: the same, for a manager with the face `aio` ---

    async def aset_mode(self, mode: ExecutionMode) -> None:
        """See `set_mode`."""
        await self._set_mode(self._async_door(), mode)

    async def arun(self, mode: ExecutionMode, screens: Iterable[Screen] | AsyncIterable[Screen]) -> tuple[Step, ...]:
        """See `run`.  Blocking screens are fetched in a thread; hooks may be coroutine functions."""
        done: list[Step] = []

        async def work() -> None:
            await self.aset_mode(mode)
            async with contextlib.aclosing(self.asteps(screens)) as steps:
                async for step in steps:
                    done.append(step)  # noqa: PERF401 - what is done must be there when the rest is cancelled

        task = asyncio.ensure_future(work())
        with self.stopper, self.stopper.cancelling(task):
            try:
                await task
            except (asyncio.CancelledError, Stopped):
                if not (task.done() and self.stopper.requested):
                    raise
        return tuple(done)

    async def asteps(self, screens: Iterable[Screen] | AsyncIterable[Screen]) -> AsyncGenerator[Step, None]:
        """See `steps`."""
        source, door = _flowing(screens), self._async_door()
        while not self.stopper.requested and await self._rest(door):
            with self.stopper.cut():
                screen: Any = await anext(source, _NO_MORE)
            if screen is _NO_MORE or not await self._rest(door):
                return
            try:
                step = await self.ahandle(screen)
            except ManagerClosed:
                return
            yield step

    async def ahandle(self, screen: Screen, mode: ExecutionMode | None = None) -> Step:
        """See `handle`."""
        step = await self._handle(self._async_door(), screen, mode or self._mode)
        for told in self._tell(screen, step):
            if told is not None:
                await told
        return step

    # --- what both faces share ---

    def _async_door(self) -> AsyncDoor:
        manager: Any = self._manager
        return AsyncDoor(manager.aio)

    async def _set_mode(self, door: Door, mode: ExecutionMode) -> None:
        self.follow(mode)
        self._ask_again = False
        try:
            with self.stopper.cut():
                await door.set_mode(mode)
        except GPUFSMError as error:
            self._ask_again = isinstance(error, CardHeld)

    async def _rest(self, door: Door) -> bool:
        """See `rest`."""
        if not self.paused:
            return True
        if self._on_pause is not None:
            self._on_pause(True)
        seen = 0
        while self.paused and not self.stopper.requested and not self._manager.get_status().closed:
            if seen != self._idle_asked:  # once more for who asks again: something may have been loaded meanwhile
                seen = self._idle_asked
                await self._give_back(door)
            with self.stopper.cut():
                await door.rest(_PAUSE_LOOK_S)
        if self._on_pause is not None:
            self._on_pause(False)
        return not self.paused

    async def _give_back(self, door: Door) -> None:
        for free in (door.unload_vlm, door.lower_clip):
            try:
                with self.stopper.cut():
                    await free()
            except GPUFSMError as error:  # it is IDLE all the same, and the idle timer tries again
                log.warning("the card could not be given back for the pause: %s", one_line(error))

    async def _handle(self, door: Door, screen: Screen, mode: ExecutionMode) -> Step:
        start = time.monotonic()
        if self._ask_again:
            await self._set_mode(door, self._mode)
        handler = self._record if mode is ExecutionMode.RECORDING else self._recognise
        try:
            facts = await handler(door, screen)
        except ManagerClosed:
            raise
        except GPUFSMError as error:
            facts = {"result": "failed", "detail": one_line(error)}
        return Step(
            screen=screen.name,
            mode=mode,
            state=self._manager.get_status().state,
            elapsed_s=time.monotonic() - start,
            **facts,
        )

    def _tell(self, screen: Screen, step: Step) -> Iterator[Awaitable[None] | None]:
        if step.result == "recognised" and self._on_action is not None and step.label is not None:
            yield self._on_action(screen, step.label)
        if self._on_step is not None:
            yield self._on_step(step)

    async def _record(self, door: Door, screen: Screen) -> dict[str, Any]:
        if self.memory.knows(screen.digest):
            return {"result": "kept"}
        with self.stopper.cut():
            seen = await self._detector.through(door, screen)
        if not seen.tells or seen.label is None:
            # A screen without a name is not remembered: it will be asked about again when the VLM is back.
            result = "unavailable" if not seen.available else "asked"
            return {"result": result, "label": seen.label, "classification": seen, "detail": seen.reason}
        vector, text = await self._embed(door, screen)
        self.memory.add(seen.label, vector, text=text, digest=screen.digest)
        if self._memory_path is not None:
            try:
                await door.do(self.memory.save, self._memory_path)
                self.unsaved = False
            except OSError as error:
                self.unsaved = True
                detail = f"remembered, but not saved: {one_line(error.strerror or error)}"
                return {"result": "recorded", "label": seen.label, "classification": seen, "detail": detail}
        return {"result": "recorded", "label": seen.label, "classification": seen}

    async def _recognise(self, door: Door, screen: Screen) -> dict[str, Any]:
        vector, text = await self._embed(door, screen)
        found = self.memory.match(vector, text=text)
        if found.verdict is Verdict.RECOGNISED:
            return {"result": "recognised", "label": found.label, "match": found}
        with self.stopper.cut():
            seen = await self._detector.through(door, screen)
        result = "asked" if seen.available else "unavailable"
        return {"result": result, "label": seen.label, "match": found, "classification": seen, "detail": seen.reason}

    async def _embed(self, door: Door, screen: Screen) -> tuple[Vector, Vector | None]:
        with self.stopper.cut():
            image = await door.do(screen.image)
            wants_text = bool(screen.text) and self.memory.weights.text > 0
            vectors = await door.embed([image, screen.text] if wants_text else [image], _HOLDER)
        return vectors[0], vectors[1] if wants_text else None


async def _flowing(screens: Iterable[Screen] | AsyncIterable[Screen]) -> AsyncIterator[Screen]:
    """Screens of either kind, awaitable one by one; a blocking source waits in a thread of its own."""
    if isinstance(screens, AsyncIterable):
        async for screen in screens:
            yield screen
        return
    source = iter(screens)
    while True:
        screen_or_end: Any = await _in_daemon_thread(lambda: next(source, _NO_MORE))
        if screen_or_end is _NO_MORE:
            return
        yield screen_or_end


async def _in_daemon_thread(call: Callable[[], Any]) -> Any:
    """As `asyncio.to_thread`; but a source that waits for ever must not keep the program from ending."""
    loop, answer = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not answer.done():
            setter(value)

    def work() -> None:
        setter: Callable[[Any], None]
        try:
            setter, value = answer.set_result, call()
        except BaseException as error:
            setter, value = answer.set_exception, error
        with contextlib.suppress(RuntimeError):  # the event loop has ended meanwhile
            loop.call_soon_threadsafe(settle, setter, value)

    threading.Thread(target=work, name="gpu_fsm-screens", daemon=True).start()
    return await answer
