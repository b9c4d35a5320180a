"""`GPUResourceManager`: the public face.  It checks arguments, posts tickets and waits; it decides nothing.

Blocking methods are here, the same verbs for asyncio under `manager.aio`.  See `states.py` for what may happen when.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, overload

from gpu_fsm import errors
from gpu_fsm.arguments import as_mode, as_timeout, default_holder
from gpu_fsm.cardlock import CardLock
from gpu_fsm.driver import Driver, Listener, Loan
from gpu_fsm.engine import JournalRecord
from gpu_fsm.events import KINDS, Event
from gpu_fsm.forking import Fork
from gpu_fsm.handles import CLIP, VLM
from gpu_fsm.leases import forget, remember
from gpu_fsm.ports import CLIPHost, Clock, NoCLIP, RealClock, VLMServer, VRAMProbe
from gpu_fsm.settings import GPUResourceConfig, load_config
from gpu_fsm.status import ClipPlace, ExecutionMode, GPUResourceStatus
from gpu_fsm.tickets import Outcome

if TYPE_CHECKING:
    from gpu_fsm.aio import AsyncVerbs
    from gpu_fsm.intercept.doors import OtherModels, Rules
    from gpu_fsm.intercept.httpx_transport import AsyncVLMTransport, VLMTransport
    from gpu_fsm.intercept.requests_adapter import DoorSession

F = TypeVar("F", bound=Callable[..., Any])


class _Anchor:
    """Lives as long as the interpreter; the exit handlers of open managers hang on it."""


_ANCHOR = _Anchor()

CLOSE_MARGIN_S = 5.0
"""Beyond all of a close's own deadlines; a close that takes longer is a defect, and the process must still end."""


class GPUResourceManager:
    """Decides what is on the GPU and makes it so.

    `config` None reads the environment and the configuration file.  The four ports default to the real ones; a
    simulation passes its own.  `threaded=False` drives in the calling thread, for tests in virtual time.

    One manager acts on a card.  Another one of the same user, in this or any process, only looks: its requests raise
    `CardHeld`, `get_status().card_held_by` says who acts, CLIP serves from the CPU, and it takes over when the first
    has been closed or has died.
    """

    _shared: ClassVar[GPUResourceManager | None] = None
    _shared_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        config: GPUResourceConfig | None = None,
        *,
        vlm_server: VLMServer | None = None,
        clip_host: CLIPHost | None = None,
        vram_probe: VRAMProbe | None = None,
        clock: Clock | None = None,
        threaded: bool = True,
    ) -> None:
        config = load_config() if config is None else config
        clock = clock or RealClock()
        if vlm_server is None:
            from gpu_fsm.ollama import OllamaManager

            vlm_server = OllamaManager(config, clock=clock)
        if vram_probe is None:
            from gpu_fsm.vram import VRAMMonitor

            vram_probe = VRAMMonitor(config, clock=clock)
            vram_probe.prepare()  # more than one card and no choice is for the user to settle, now
        if clip_host is None:
            clip_host = _real_clip(config)
        card_lock = None
        if not vram_probe.simulated:
            _introduce(clip_host, vram_probe)
            card_lock = CardLock()
            card_lock.watch(vram_probe.read(config.observe_timeout_s).device_uuid)
        self._driver = Driver(
            config,
            server=vlm_server,
            clip=clip_host,
            probe=vram_probe,
            clock=clock,
            threaded=threaded,
            card_lock=card_lock,
        )
        self._aio: AsyncVerbs | None = None
        self._ports_closed = False
        # Finalizers run newest first: ours before the adapters', which the close still needs.  It refers to this
        # manager strongly, since one that was dropped without closing still drives.
        self._at_exit = weakref.finalize(_ANCHOR, _close_at_exit, self)

    # --- modes ---

    def set_execution_mode(
        self, mode: ExecutionMode | str, *, preempt: bool = False, timeout_s: float | None = None
    ) -> Outcome:
        """Ask for IDLE, RECORDING or AUTOPILOT and wait until it stands.

        Returns an `Outcome`; where the mode cannot be given and the settings say `degrade`, `granted` is False and
        `reason` says why.  `preempt` supersedes everything asked before.  Raises `Superseded`, `LeaseTimeout`,
        `LeaseHeld`, `InsufficientVRAM` (with `on_shortage = refuse`), `ManagerClosed`, `OperationTimeout`.
        """
        timeout_s = as_timeout(timeout_s)
        return self._driver.wait(self.submit_execution_mode(mode, preempt=preempt), timeout_s)

    def submit_execution_mode(self, mode: ExecutionMode | str, *, preempt: bool = False) -> Future[Outcome]:
        """The same without waiting: returns a future at once."""
        return self._driver.post("request", mode=as_mode(mode), preempt=preempt).future

    def ensure_vlm_loaded(self, *, timeout_s: float | None = None) -> None:
        """Return when the VLM is resident; the mode stays.

        Raises why it cannot be: `InsufficientVRAM`, `ModelNotFound`, `OllamaUnavailable`, `LoadFailed`,
        `DegradedError` ... or `OperationTimeout` after `timeout_s` (the load goes on then).
        """
        self._ask("vlm_wanted", timeout_s)

    def ensure_vlm_unloaded(self, *, timeout_s: float | None = None) -> None:
        """Return when the VLM is gone and its memory is back; the mode stays.

        Raises `UnloadStuck`, `ReleaseUnproven`, `ResidencyUnknown`, `LeaseTimeout`, `OperationTimeout`.
        """
        self._ask("vlm_unwanted", timeout_s)

    def migrate_clip_to_gpu(self, *, timeout_s: float | None = None) -> None:
        """Move CLIP up, in IDLE; elsewhere `ModeConflict` unless it is there."""
        self._migrate("gpu", timeout_s)

    def migrate_clip_to_cpu(self, *, timeout_s: float | None = None) -> None:
        """Move CLIP down, in IDLE; elsewhere `ModeConflict` unless it is there."""
        self._migrate("cpu", timeout_s)

    # --- using the models ---

    @contextlib.contextmanager
    def vlm(self, *, holder: str = "", timeout_s: float | None = None) -> Iterator[VLM]:
        """Lease the VLM, loading it first where it is out.  It is not unloaded while the block runs."""
        driver, timeout_s = self._driver, as_timeout(timeout_s)
        driver.check_usable()
        holder = holder or default_holder()
        lease = driver.leases.try_vlm(holder)
        if lease is None:
            future = driver.post("vlm_wanted", lease_for=holder).future
            lease = self._lease(future, timeout_s, lambda outcome: outcome.lease or 0)
        remember(lease)
        try:
            yield VLM(driver, lease)
        finally:
            forget(lease)
            driver.leases.release(lease)

    @contextlib.contextmanager
    def clip(self, *, holder: str = "", timeout_s: float | None = None) -> Iterator[CLIP]:
        """Lease CLIP where it is.  It is not moved while the block runs."""
        driver, timeout_s = self._driver, as_timeout(timeout_s)
        lease = self._lease(driver.ask_clip(holder or default_holder()), timeout_s, int)
        remember(lease)
        try:
            yield CLIP(driver)
        finally:
            forget(lease)
            driver.leases.release(lease)

    @contextlib.contextmanager
    def lend(self, holder: str) -> Iterator[Loan]:
        """Keep the room that is made on the card for `holder`, a program of somebody else's, while the block runs.

        Whoever asks meanwhile for RECORDING, AUTOPILOT, the VLM, or CLIP on the GPU gets `CardHeld`.  What is there
        stays, so make the room inside the block: IDLE, `ensure_vlm_unloaded()`, `migrate_clip_to_cpu()`.  At the end
        nothing is restored; `loan.mode` is what to ask for again: what was last asked for outside of such blocks.
        """
        with self._driver.lend(errors.one_line(holder, 80)) as loan:
            yield loan

    # --- doors for code that knows nothing of us ---

    def requests_session(
        self, *, holder: str = "", other_models: OtherModels = "pass", timeout_s: float | None = None
    ) -> DoorSession:
        """A session for code that calls Ollama with `requests`: what runs the VLM loads it first and holds a lease.

        The lease lasts until the answer is read, closed or forgotten.  `timeout_s` bounds the wait for it.  A refusal
        comes as an HTTP answer with `{"error": ...}`.
        """
        from gpu_fsm.intercept import requests_adapter

        return requests_adapter.session(self, self._door(other_models, timeout_s), holder=holder)

    def httpx_transport(
        self, *, holder: str = "", other_models: OtherModels = "pass", timeout_s: float | None = None
    ) -> VLMTransport:
        """The same for clients on `httpx`: `ollama.Client(transport=manager.httpx_transport())`."""
        from gpu_fsm.intercept.httpx_transport import VLMTransport

        return VLMTransport(self, self._door(other_models, timeout_s), holder=holder)

    def async_httpx_transport(
        self, *, holder: str = "", other_models: OtherModels = "pass", timeout_s: float | None = None
    ) -> AsyncVLMTransport:
        """The same for asyncio: `ollama.AsyncClient(transport=manager.async_httpx_transport())`."""
        from gpu_fsm.intercept.httpx_transport import AsyncVLMTransport

        return AsyncVLMTransport(self, self._door(other_models, timeout_s), holder=holder)

    @overload
    def needs_vlm(self, function: F, /) -> F: ...
    @overload
    def needs_vlm(self, /, *, holder: str = "", timeout_s: float | None = None) -> Callable[[F], F]: ...
    def needs_vlm(self, function: Any = None, /, *, holder: str = "", timeout_s: float | None = None) -> Any:
        """Decorate a function, coroutine function or generator: it runs under a lease on the VLM, loaded first.

        `@manager.needs_vlm` or `@manager.needs_vlm(holder="caption", timeout_s=60)`.
        """
        return self._leased("vlm", function, holder, timeout_s)

    @overload
    def needs_clip(self, function: F, /) -> F: ...
    @overload
    def needs_clip(self, /, *, holder: str = "", timeout_s: float | None = None) -> Callable[[F], F]: ...
    def needs_clip(self, function: Any = None, /, *, holder: str = "", timeout_s: float | None = None) -> Any:
        """The same with a lease on CLIP, which stays where it is."""
        return self._leased("clip", function, holder, timeout_s)

    # --- looking ---

    def get_status(self) -> GPUResourceStatus:
        """Everything at this moment, complete also in the middle of a step.  Takes no lock and does no I/O."""
        return self._driver.status()

    def get_clip_device(self) -> str:
        """The device that every tensor of CLIP is on: `cpu`, `cuda:0`, `none` where no CLIP is managed."""
        device = self._driver.clip.device
        # While the pointers are being swapped the tensors are on two devices; the last settled one is the answer.
        return self._driver.status().clip_device if device == "mixed" else device

    def explain(self, mode: ExecutionMode | str) -> str:
        """In words, with the figures of the last look: why `mode` is or is not available now."""
        return self._driver.engine.explain(as_mode(mode))

    @property
    def journal(self) -> tuple[JournalRecord, ...]:
        """The last `journal_size` rows taken, oldest first."""
        return tuple(self._driver.engine.journal)

    def subscribe(self, callback: Listener, *kinds: str | type[Event]) -> Callable[[], None]:
        """Call `callback(event)` for events of these kinds (all if none is named); returns the unsubscriber.

        Listeners run on a thread of their own.  One that raises or is slow harms nobody: it is logged and counted.
        """
        known = {kind.kind for kind in KINDS}
        wanted = frozenset(kind if isinstance(kind, str) else getattr(kind, "kind", repr(kind)) for kind in kinds)
        if not wanted <= known:
            unknown = ", ".join(sorted(wanted - known))
            raise errors.BadArgument(detail=f"unknown event {unknown}", remedy=f"Use {', '.join(sorted(known))}.")
        if not callable(callback):
            raise errors.BadArgument(detail=f"{callback!r} cannot be called")
        return self._driver.subscribe(callback, wanted)

    @property
    def config(self) -> GPUResourceConfig:
        """The settings it goes by."""
        return self._driver.newest_config

    def reconfigure(self, config: GPUResourceConfig | None = None, /, **settings: Any) -> dict[str, Any]:
        """Change settings while it runs: to those of `config`, or the ones that are named.  Waits for nothing.

        They hold from the next event on; a step under way ends with the old ones.  `idle_timeout_s` counts from the
        last use, and a longer one is told to Ollama before its own timer fires.  Returns what differs.  Raises
        `ConfigError`, and changes nothing, for a value that cannot be used and for a setting that cannot change under
        way, with the reason; `Setting.live` tells which can.
        """
        return self._driver.reconfigure(settings if config is None else config)

    @property
    def aio(self) -> AsyncVerbs:
        """The same verbs for asyncio, usable from several event loops at once."""
        if self._aio is None:
            from gpu_fsm.aio import AsyncVerbs  # asyncio costs a third of the import, and many never need it

            self._aio = AsyncVerbs(self._driver, self.close)
        return self._aio

    # --- the end ---

    def close(self, *, timeout_s: float | None = None) -> tuple[str, ...]:
        """Give back what is ours (our VLM out, CLIP on the CPU) and stop; idempotent.

        Waits for leases up to `drain_timeout_s`, then goes on.  Returns what had to be left behind, in words.
        """
        timeout_s = as_timeout(timeout_s)
        driver = self._driver
        if os.getpid() != driver.pid:
            return ()
        config = driver.config
        bound = config.drain_timeout_s + config.unload_deadline_s * 2 + config.shed_deadline_s + config.settle_timeout_s
        limit = bound + config.vlm_load_deadline_s + CLOSE_MARGIN_S if timeout_s is None else timeout_s
        outcome = driver.wait(driver.post_close(), limit)
        driver.join(CLOSE_MARGIN_S)
        self._at_exit.detach()
        with GPUResourceManager._shared_lock:
            first, self._ports_closed = not self._ports_closed, True
            if GPUResourceManager._shared is self:
                GPUResourceManager._shared = None
        if first:
            for port in (driver.server, driver.clip, driver.probe):
                port.close()
            if driver.card_lock is not None:
                driver.card_lock.close()  # last: the next manager finds the card as we leave it
        return outcome.leftovers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        _ = self.aio
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aio.close()

    # --- one for the process ---

    @classmethod
    def shared(cls, config: GPUResourceConfig | None = None, **ports: Any) -> GPUResourceManager:
        """The process-wide manager, made at the first call.  A forked child gets its own."""
        with cls._shared_lock:
            if cls._shared is None:
                if Fork.cuda_before:
                    raise errors.ForkedProcess(
                        detail="CUDA was initialised before the fork, and does not survive one",
                        remedy="Start workers with the spawn method, or fork before the first use of the GPU.",
                    )
                cls._shared = cls(config, **ports)
            return cls._shared

    # --- for simulations ---

    def drive_for(self, seconds: float) -> None:
        """With `threaded=False`: let `seconds` of the manager's clock pass and serve what falls due."""
        if self._driver.threaded:
            raise errors.BadArgument(detail="a threaded manager drives itself")
        self._driver.drive_for(as_timeout(seconds) or 0.0)

    # --- helpers ---

    def _ask(self, kind: Any, timeout_s: float | None) -> None:
        timeout_s = as_timeout(timeout_s)
        self._driver.wait(self._driver.post(kind).future, timeout_s)

    def _door(self, other_models: OtherModels, timeout_s: float | None) -> Rules:
        from gpu_fsm.intercept.doors import Rules

        return Rules(other_models=other_models, timeout_s=as_timeout(timeout_s))

    def _leased(self, model: Literal["vlm", "clip"], function: Any, holder: str, timeout_s: float | None) -> Any:
        from gpu_fsm.intercept.decorators import leased

        decorate: Callable[[Any], Any] = leased(self, model, holder=holder, timeout_s=as_timeout(timeout_s))
        return decorate if function is None else decorate(function)

    def _migrate(self, place: ClipPlace, timeout_s: float | None) -> None:
        timeout_s = as_timeout(timeout_s)
        self._driver.wait(self._driver.post("migrate_clip", place=place).future, timeout_s)

    def _lease(self, future: Future[Any], timeout_s: float | None, lease_of: Callable[[Any], int]) -> int:
        """Wait for a lease; one that is granted after we gave up is given back."""
        try:
            return lease_of(self._driver.wait(future, timeout_s))
        except BaseException:
            self._driver.abandon(future, lease_of)
            raise

    def __repr__(self) -> str:
        status = self.get_status()
        return (
            f"<GPUResourceManager {status.state.name} mode={status.execution_mode.name} vlm={status.vlm_state.value} "
            f"clip={status.clip_device} leases={len(status.leases)} queued={status.queued}>"
        )


def _real_clip(config: GPUResourceConfig) -> CLIPHost:
    if config.clip_model is None:
        return NoCLIP()
    from gpu_fsm.clip import CLIPManager

    return CLIPManager(config)


def _introduce(clip: CLIPHost, probe: VRAMProbe) -> None:
    """Let the two real adapters help each other.

    A context that CLIP pays for can tell the card's memory, and the driver can tell what that context took.
    """
    from gpu_fsm.clip import CLIPManager
    from gpu_fsm.vram import VRAMMonitor

    if isinstance(clip, CLIPManager) and isinstance(probe, VRAMMonitor):
        probe.process_view, clip.measure_free_mib = clip.card_memory, probe.free_mib


def _close_at_exit(manager: GPUResourceManager) -> None:
    """Nothing of ours stays on the card because the interpreter ends.

    A daemon thread that waits for us dies with its program; that the close answers it first is not for it to print.
    """
    told = threading.excepthook

    def tell(args: threading.ExceptHookArgs) -> None:
        if not (args.thread is not None and args.thread.daemon and issubclass(args.exc_type, errors.GPUFSMError)):
            told(args)

    threading.excepthook = tell
    with contextlib.suppress(Exception):
        manager.close()


def _start_anew() -> None:
    """In a forked child: nothing of the parent's is ours."""
    GPUResourceManager._shared = None
    GPUResourceManager._shared_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
