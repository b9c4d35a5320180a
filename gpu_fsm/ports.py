"""The four doors to the world: read this to plug something else in.

The manager knows the world only through these Protocols, so the same manager runs on a real card and in a simulation.
`observe`-like calls never raise: they answer with a typed unknown.  Acting calls raise errors of `gpu_fsm.errors` and
nothing else.  No port call is made while a lock of the manager is held.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from attrs import field, frozen

from gpu_fsm.errors import ClipUnavailable
from gpu_fsm.status import Catalog, ClipPlace, Holder, LoadedModel, Residency, VRAMInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Embeddings = NDArray[np.float32]


class Interrupt:
    """A one-shot "stop what you are doing", set by another thread while a port call runs.

    A port that can stop early wraps the blocking part in `calling(stop)`; `stop` then runs in the setting thread, at
    once if the interrupt was set before, and must not block.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = False
        self._callbacks: list[Callable[[], None]] = []

    def is_set(self) -> bool:
        """Whether somebody asked to stop."""
        return self._set

    def set(self) -> None:
        """Ask to stop; every registered callback runs once, here."""
        with self._lock:
            if self._set:
                return
            self._set = True
            callbacks = tuple(self._callbacks)
        for callback in callbacks:
            callback()

    @contextlib.contextmanager
    def calling(self, callback: Callable[[], None]) -> Iterator[None]:
        """Have `callback` run when the interrupt is set during the block."""
        with self._lock:
            late = self._set
            self._callbacks.append(callback)
        try:
            if late:
                callback()
            yield
        finally:
            with self._lock:
                self._callbacks.remove(callback)


@runtime_checkable
class Clock(Protocol):
    """Monotonic time.  The simulated twin cannot run backwards either."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment."""

    def sleep(self, seconds: float) -> None:
        """Wait; in a simulation the world moves on meanwhile."""

    def wait(self, condition: threading.Condition, timeout_s: float | None) -> None:
        """Wait on a held `condition` until notified or until `timeout_s` of *this clock* has passed."""


class RealClock:
    """The machine's own monotonic time."""

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, condition: threading.Condition, timeout_s: float | None) -> None:
        condition.wait(timeout_s)


@frozen(kw_only=True)
class LoadReport:
    """How a load ended: what is resident now and what it took."""

    model: LoadedModel | None
    """As `/api/ps` shows it right after the load; None if that question got no answer."""
    attempts: int = 1
    elapsed_s: float = 0.0


@frozen(kw_only=True)
class Completion:
    """One answer of the VLM: the text, how it ended, what it cost.  `done` is False for a part of a stream."""

    text: str
    done: bool = True
    done_reason: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    total_s: float | None = None
    load_s: float | None = None
    raw: Mapping[str, Any] = field(factory=dict, repr=False)
    """The server's own object, for what this record does not carry (tool calls, thinking)."""


class VLMServer(Protocol):
    """Ollama, seen as the owner of one VLM's residency."""

    model: str
    on_our_card: bool
    """False for an Ollama on another machine: our card proves nothing about it."""
    simulated: bool

    def residency(self, timeout_s: float) -> Residency:
        """Ask `/api/ps`.  Never raises."""

    def catalog(self, timeout_s: float) -> Catalog:
        """Ask whether the model exists on the server's disk, and its size.  Never raises."""

    def load_model(
        self,
        *,
        keep_alive_s: float,
        deadline_s: float,
        interrupt: Interrupt,
        before_retry: Callable[[], None],
    ) -> LoadReport:
        """Load the model and return when it is ready, with the allowed retries inside `deadline_s` of the clock.

        `before_retry` is called between a failed attempt and the next (memory must settle first).  `interrupt` closes
        the load's socket, which kills the load in the server, and raises `LoadAborted`.
        """

    def unload_model(self, *, timeout_s: float) -> None:
        """Send one unload request.  Returning means *accepted*, never *gone*; ask `residency` for that."""

    def renew(self, *, keep_alive_s: float, timeout_s: float) -> None:
        """Extend the server's own timer for a model that is resident (else this would be a load)."""

    def generate(
        self,
        prompt: str,
        *,
        images: Sequence[object] = (),
        format: Mapping[str, Any] | str | None = None,  # noqa: A002 - Ollama's word
        keep_alive_s: float,
        timeout_s: float,
        stream: bool = False,
    ) -> Iterator[Completion]:
        """Run the model on a prompt and images (PNG/JPEG bytes, paths or PIL images).

        Yields one whole `Completion`, or with `stream` its parts, the last with `done=True`.  Closing the iterator
        closes the connection.
        """

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        format: Mapping[str, Any] | str | None = None,  # noqa: A002 - Ollama's word
        keep_alive_s: float,
        timeout_s: float,
        stream: bool = False,
    ) -> Iterator[Completion]:
        """The same for a conversation; each message has `role`, `content` and perhaps `images`."""

    def close(self) -> None:
        """Drop connections.  Sends nothing."""


class CLIPHost(Protocol):
    """CLIP in this process.  Only `encode` may be called from any thread; the rest is the driver's."""

    simulated: bool

    @property
    def place(self) -> ClipPlace:
        """Which side CLIP is on, read from every tensor; `none` where there is no CLIP.  Never raises."""

    @property
    def device(self) -> str:
        """The device by name: `cpu`, `cuda:0`, `sim:0`, `none`.  Never raises."""

    @property
    def gpu_usable(self) -> bool:
        """Whether CLIP could go to a GPU at all in this process."""

    @property
    def gpu_unusable_reason(self) -> str:
        """Why not, in words; empty where it can."""

    @property
    def needed_mib(self) -> float:
        """What a move to the GPU takes from the card: weights, activations, a context not yet paid for."""

    @property
    def held_mib(self) -> float:
        """What a move to the CPU gives back."""

    def to_gpu(self) -> None:
        """Move up, all or nothing.  Raises `ClipOutOfMemory`, `CudaPoisoned`, `ClipError`."""

    def to_cpu(self) -> None:
        """Move down; idempotent."""

    def encode(self, items: Sequence[object], *, batch_size: int = 32, normalize: bool = True) -> Embeddings:
        """Embed images and texts, in order.  Returns float32 of shape (n, d)."""

    def close(self) -> None:
        """Let go of the model."""


class NoCLIP:
    """The CLIPHost of a manager that manages no CLIP (`clip_model = None`)."""

    simulated = False
    place: ClipPlace = "none"
    device = "none"
    gpu_usable = False
    gpu_unusable_reason = "no CLIP is managed"
    needed_mib = 0.0
    held_mib = 0.0

    def to_gpu(self) -> None:
        """There is nothing to move."""

    def to_cpu(self) -> None:
        """There is nothing to move."""

    def encode(self, items: Sequence[object], *, batch_size: int = 32, normalize: bool = True) -> Embeddings:
        """Always `ClipUnavailable`."""
        raise ClipUnavailable(detail="no CLIP is managed", remedy="Set clip_model.")

    def close(self) -> None:
        """There is nothing to let go of."""


class VRAMProbe(Protocol):
    """The card as its driver reports it."""

    simulated: bool

    def read(self, timeout_s: float) -> VRAMInfo:
        """Read total and free memory.  Never raises, never invents a number."""

    def holders(self) -> tuple[Holder, ...] | None:
        """Who holds memory, or None where the driver does not tell.  Never raises.  Slow: on demand only."""

    def close(self) -> None:
        """Shut the driver library down, once."""
