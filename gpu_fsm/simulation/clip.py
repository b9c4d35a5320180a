"""The simulated CLIP host and the simulated probe: for tests of the machine, not of embeddings."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gpu_fsm.errors import ClipError, ClipOutOfMemory, CudaPoisoned
from gpu_fsm.simulation.card import Card, CardFull
from gpu_fsm.simulation.clock import WorldClock
from gpu_fsm.simulation.faults import Fault, Faults
from gpu_fsm.status import ClipPlace, Holder, VRAMInfo

if TYPE_CHECKING:
    from gpu_fsm.ports import Embeddings

WEIGHTS = 4
"""In so many parts CLIP moves; between any two of them somebody may look."""

_HANG_LIMIT_S = 3600.0
"""A call that hangs and cannot be interrupted gives up after this long in the simulation."""

CLIP_OWNER = "clip"
CONTEXT_OWNER = "clip-context"


class SimulatedCLIP:
    """A CLIP whose vectors are digests of what it is shown.  Implements `ports.CLIPHost`; the GPU is called `sim:0`.

    The first move up pays for a context of `context_mib` that this process keeps for life.  `violations` collects what
    a real CLIP would have answered with a crash: a move during an encode.
    """

    simulated = True

    def __init__(
        self,
        *,
        clock: WorldClock,
        card: Card | None,
        faults: Faults | None = None,
        clip_mib: float = 600.0,
        context_mib: float = 200.0,
        dimensions: int = 32,
        move_s: float = 0.05,
        encode_s: float = 0.01,
        exists: bool = True,
    ) -> None:
        self.clock = clock
        self.card = card
        self.faults = faults or Faults()
        self.clip_mib = clip_mib
        self.context_mib = context_mib
        self.dimensions = dimensions
        self.move_s = move_s
        self.encode_s = encode_s
        self.violations: list[str] = []
        self.on_encode: list[Callable[[Sequence[object]], None]] = []
        """Called in the middle of every encode, with the items."""
        self.on_io: Callable[[str, str], None] | None = None
        self.ups = 0
        self.downs = 0
        self.encodes = 0
        self.closed = False
        self.poisoned = ""
        self._place: ClipPlace = "cpu" if exists else "none"
        self._context_paid = False
        self._under_way = False
        self._encoding = 0
        self._lock = threading.Lock()

    @property
    def place(self) -> ClipPlace:
        """Which side it is on; `none` where there is no CLIP."""
        return self._place

    @property
    def device(self) -> str:
        """`cpu`, `sim:0` or `none`; `mixed` while some weights have moved and others have not."""
        return "mixed" if self._under_way else "sim:0" if self._place == "gpu" else self._place

    @property
    def gpu_usable(self) -> bool:
        """Whether it could go to the card at all."""
        return not self.gpu_unusable_reason

    @property
    def gpu_unusable_reason(self) -> str:
        """Why not; empty where it can."""
        if self._place == "none":
            return "no CLIP is managed"
        if self.card is None:
            return "this simulated machine has no GPU"
        return self.poisoned

    @property
    def needed_mib(self) -> float:
        """What a move up takes, with the context where that is not paid yet."""
        return self.clip_mib + (0.0 if self._context_paid else self.context_mib)

    @property
    def held_mib(self) -> float:
        """What a move down gives back."""
        return self.clip_mib if self._place == "gpu" else 0.0

    @property
    def encoding(self) -> bool:
        """Whether an encode is under way."""
        return self._encoding > 0

    def to_gpu(self) -> None:
        """Move up, all or nothing; idempotent.  Raises `ClipOutOfMemory`, `CudaPoisoned`, `ClipError`."""
        self._io("clip.to_gpu", self._to_gpu)

    def to_cpu(self) -> None:
        """Move down; idempotent."""
        self._io("clip.to_cpu", self._to_cpu)

    def encode(self, items: Sequence[object], *, batch_size: int = 32, normalize: bool = True) -> Embeddings:
        """Unit vectors, float32 of shape (n, `dimensions`), the same for the same content wherever CLIP is."""
        result: list[Embeddings] = []
        self._io("clip.encode", lambda: result.append(self._encode(items)))
        if not result:  # a silent fault
            import numpy as np

            return np.zeros((len(items), self.dimensions), dtype=np.float32)
        return result[0]

    def close(self) -> None:
        """Let go; what it holds on the card goes, the context stays until the process ends."""
        if self.card is not None:
            self.card.give_back(CLIP_OWNER)
        if self._place == "gpu":
            self._place = "cpu"
        self.closed = True

    def _io(self, op: str, act: Callable[[], object]) -> None:
        if self.on_io is not None:
            self.on_io(op, "before")
        try:
            fault = self.faults.take(op)
            if fault is None:
                act()
            else:
                self._misbehave(op, act, fault)
        finally:
            if self.on_io is not None:
                self.on_io(op, "after")

    def _misbehave(self, op: str, act: Callable[[], object], fault: Fault) -> None:
        text = str(fault.args.get("text", f"simulated fault in {op}"))
        if fault.kind == "silent":
            return
        if fault.kind == "before":
            raise ClipError(detail=text)
        if fault.kind == "oom":
            raise ClipOutOfMemory(detail=text, needed_mib=self.needed_mib)
        if fault.kind == "gpu_lost":
            self.poisoned = "a CUDA error has made the GPU unusable for this process"
            if self.card is not None:
                self.card.give_back(CLIP_OWNER)
            self._place = "cpu"
            raise CudaPoisoned(detail=text)
        if fault.kind == "hang":
            healings = self.faults.healings
            limit = self.clock.monotonic() + _HANG_LIMIT_S
            while self.faults.healings == healings:
                if self.clock.monotonic() >= limit:
                    raise ClipError(detail=f"{text}: no answer for {_HANG_LIMIT_S:.0f} s")
                self.clock.sleep(0.25)
        elif fault.kind == "late":
            self.clock.sleep(fault.delay_s)
        act()
        if fault.kind == "after":
            raise ClipError(detail=text)

    def _to_gpu(self) -> None:
        if self._place == "gpu":
            return
        if self.poisoned:
            raise CudaPoisoned(detail=self.poisoned)
        if self._place == "none" or self.card is None:
            raise ClipError(detail=self.gpu_unusable_reason)
        try:
            if not self._context_paid:
                self.card.take(CONTEXT_OWNER, self.context_mib, name="python")
                self._context_paid = True
            self.card.take(CLIP_OWNER, self.clip_mib, name="python")
        except CardFull as full:
            raise ClipOutOfMemory(detail="CLIP does not fit on the card", needed_mib=full.asked_mib) from None
        self._move("gpu", self.move_s)
        self._place = "gpu"
        self.ups += 1

    def _to_cpu(self) -> None:
        if self._place != "gpu":
            return
        self._move("cpu", self.move_s / 10)
        self._place = "cpu"
        if self.card is not None:
            self.card.give_back(CLIP_OWNER)
        self.downs += 1

    def _move(self, target: ClipPlace, seconds: float) -> None:
        """Weight by weight; the hook runs after each, with phase "during"."""
        self._watch(target)
        try:
            for weight in range(1, WEIGHTS + 1):
                self.clock.sleep(seconds / WEIGHTS)
                self._under_way = weight < WEIGHTS
                self._watch(target)
                if self.on_io is not None:
                    self.on_io(f"clip.to_{target}", "during")
        finally:
            self._under_way = False

    def _watch(self, target: str) -> None:
        if self._encoding:
            self.violations.append(f"moved to the {target} during an encode at {self.clock.monotonic():.3f} s")

    def _encode(self, items: Sequence[object]) -> Embeddings:
        import numpy as np

        if self._place == "none":
            raise ClipError(detail="no CLIP is managed")
        if self._place == "gpu" and self.card is not None and self.card.lost:
            self.poisoned = "the GPU has fallen off the bus"
            raise CudaPoisoned(detail=self.poisoned)
        with self._lock:
            self._encoding += 1
            self.encodes += 1
        try:
            before = self._place
            for hook in tuple(self.on_encode):
                hook(items)
            if self.encode_s:
                self.clock.sleep(self.encode_s)
            if self._place != before:
                self.violations.append(f"an encode began on the {before} and ended on the {self._place}")
            raw = b"".join(hashlib.shake_256(content(item)).digest(self.dimensions) for item in items)
            vectors = np.frombuffer(raw, dtype=np.uint8).reshape(len(items), self.dimensions).astype(np.float32) - 127.5
            unit: Embeddings = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            return unit
        finally:
            with self._lock:
                self._encoding -= 1


def content(item: Any) -> bytes:
    """The bytes that make an item what it is: an image's pixels, a text, an array's values."""
    if isinstance(item, bytes | bytearray):
        return bytes(item)
    if isinstance(item, str):
        return item.encode()
    if isinstance(item, dict):
        return b"".join(str(key).encode() + b"=" + content(item[key]) + b";" for key in sorted(item))
    if hasattr(item, "tobytes"):
        shape = getattr(item, "size", "") if hasattr(item, "mode") else getattr(item, "shape", "")
        return f"{shape}".encode() + bytes(item.tobytes())
    return repr(item).encode()


class SimulatedProbe:
    """The driver's view of the simulated card.  Implements `ports.VRAMProbe`."""

    simulated = True

    def __init__(
        self, *, clock: WorldClock, card: Card | None, faults: Faults | None = None, tells_holders: bool = True
    ) -> None:
        self.clock = clock
        self.card = card
        self.faults = faults or Faults()
        self.tells_holders = tells_holders
        self.on_io: Callable[[str, str], None] | None = None
        self.reads = 0
        self.closed = False
        self._last: VRAMInfo | None = None

    def read(self, timeout_s: float) -> VRAMInfo:
        """Total and free memory now.  Never raises."""
        if self.on_io is not None:
            self.on_io("probe.read", "before")
        self.reads += 1
        fault = self.faults.take("probe.read")
        info = self._read() if fault is None else self._misbehave(fault, timeout_s)
        self._last = info
        if self.on_io is not None:
            self.on_io("probe.read", "after")
        return info

    def holders(self) -> tuple[Holder, ...] | None:
        """Who holds memory, or None where this driver does not tell."""
        return self.card.holders() if self.card is not None and self.tells_holders else None

    def close(self) -> None:
        """Nothing is open."""
        self.closed = True

    def _read(self) -> VRAMInfo:
        card = self.card
        if card is None:
            return VRAMInfo(detail="this simulated machine has no GPU", at=self.clock.monotonic())
        if card.lost:
            return self._unknown("the GPU has fallen off the bus", lost=True)
        return VRAMInfo(
            total_mib=card.total_mib,
            free_mib=card.free_mib,
            source="simulated",
            scope="card",
            device_uuid="GPU-simulated-0",
            name="simulated card",
            present=True,
            at=self.clock.monotonic(),
        )

    def _unknown(self, detail: str, *, lost: bool = False) -> VRAMInfo:
        return VRAMInfo(
            source="simulated",
            device_uuid="GPU-simulated-0",
            name="simulated card",
            present=self.card is not None and not lost,
            lost=lost,
            detail=detail,
            at=self.clock.monotonic(),
        )

    def _misbehave(self, fault: Fault, timeout_s: float) -> VRAMInfo:
        if fault.kind == "gpu_lost":
            return self._unknown("simulated: the GPU is lost", lost=True)
        if fault.kind == "silent":
            return self._last or self._read()
        if fault.kind == "late" and fault.delay_s <= timeout_s:
            self.clock.sleep(fault.delay_s)
            return self._read()
        if fault.kind in ("hang", "late"):
            healings = self.faults.healings
            deadline = self.clock.monotonic() + timeout_s
            while self.clock.monotonic() < deadline:
                self.clock.sleep(min(0.25, deadline - self.clock.monotonic()))
                if self.faults.healings != healings:
                    return self._read()
            return self._unknown(f"the driver did not answer within {timeout_s:g} s")
        return self._unknown(f"simulated fault {fault.kind}")


__all__ = ["CLIP_OWNER", "CONTEXT_OWNER", "SimulatedCLIP", "SimulatedProbe", "content"]
