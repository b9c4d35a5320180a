"""Exceptions, with the facts as attributes and the mend in the message.

Two families: *refusals* (the machine works, the answer is no) and *failures* (something outside broke).  Every class
says three things once, for everybody who has to react: `code` (a stable word for events and JSON), `retryable` (may the
same call succeed later without a human?) and `bucket` (what recovery needs).  Foreign exceptions are translated at the
adapters' edge; nothing of `requests`, `pynvml` or `torch` leaves this package.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import attrs
from attrs import define

Bucket = Literal["none", "retry", "settle", "cpu_only", "restart_process", "user"]
"""What recovery needs: nothing, another try, memory to settle, a life on the CPU, a new process, a person."""


def _rebuild(cls: type[GPUFSMError], facts: dict[str, Any]) -> GPUFSMError:
    return cls(**facts)


@define(kw_only=True, eq=False, slots=False)
class GPUFSMError(Exception):
    """Root of everything this package raises on purpose."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    bucket: ClassVar[Bucket] = "none"

    detail: str = ""
    remedy: str = ""

    def summary(self) -> str:
        """The sentence without the mend."""
        return self.detail or self.code.replace("_", " ")

    def __str__(self) -> str:
        return f"{self.summary()}. {self.remedy}" if self.remedy else self.summary()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), attrs.asdict(self, recurse=False))


# --- what the caller did ---


@define(kw_only=True, eq=False, slots=False)
class ConfigError(GPUFSMError, ValueError):
    """A setting cannot be used: which, what it was, what it must be, and where it came from."""

    code: ClassVar[str] = "config"
    bucket: ClassVar[Bucket] = "user"

    name: str
    value: str = ""
    bound: str = ""
    source: str = "argument"

    def summary(self) -> str:
        if self.detail:
            return f"{self.name} ({self.source}): {self.detail}"
        return f"{self.name} ({self.source}): {self.value} is not {self.bound}"


@define(kw_only=True, eq=False, slots=False)
class BadArgument(GPUFSMError, ValueError):
    """A call got a value that cannot be meant: an unknown mode, a negative timeout, an image that is none."""

    code: ClassVar[str] = "bad_argument"
    bucket: ClassVar[Bucket] = "user"


@define(kw_only=True, eq=False, slots=False)
class WouldDeadlock(GPUFSMError, RuntimeError):
    """A blocking call from the thread that would have to answer it."""

    code: ClassVar[str] = "would_deadlock"


@define(kw_only=True, eq=False, slots=False)
class ForkedProcess(GPUFSMError, RuntimeError):
    """The manager belongs to the parent process; CUDA and threads do not survive a fork."""

    code: ClassVar[str] = "forked_process"
    bucket: ClassVar[Bucket] = "restart_process"


@define(kw_only=True, eq=False, slots=False)
class ManagerClosed(GPUFSMError, RuntimeError):
    """The manager was closed before this request took effect."""

    code: ClassVar[str] = "manager_closed"


# --- refusals: the machine works, the answer is no ---


@define(kw_only=True, eq=False, slots=False)
class Refused(GPUFSMError):
    """Root of the refusals: state, hold and asked mode are as before the call."""

    code: ClassVar[str] = "refused"


@define(kw_only=True, eq=False, slots=False)
class Superseded(Refused):
    """A newer request with `preempt=True` took this one's place."""

    code: ClassVar[str] = "superseded"


@define(kw_only=True, eq=False, slots=False)
class ModeConflict(Refused):
    """The mode that stands promises the opposite; `ask_for` names the mode that would allow it."""

    code: ClassVar[str] = "mode_conflict"

    mode: str
    ask_for: str


@define(kw_only=True, eq=False, slots=False)
class LeaseTimeout(Refused, TimeoutError):
    """Leases stood in the way for longer than `drain_timeout_s`."""

    code: ClassVar[str] = "lease_timeout"
    retryable: ClassVar[bool] = True

    holders: tuple[str, ...] = ()
    waited_s: float = 0.0


@define(kw_only=True, eq=False, slots=False)
class LeaseHeld(Refused):
    """The caller asked to move what it holds itself; waiting for it would never end."""

    code: ClassVar[str] = "lease_held"

    holders: tuple[str, ...] = ()


@define(kw_only=True, eq=False, slots=False)
class LeaseLost(GPUFSMError):
    """The VLM under this lease was taken away (shedding, or it died); take a new lease."""

    code: ClassVar[str] = "lease_lost"
    retryable: ClassVar[bool] = True


@define(kw_only=True, eq=False, slots=False)
class InsufficientVRAM(Refused):
    """There is no room, even after giving up all that is ours and not wanted.  All figures in MiB."""

    code: ClassVar[str] = "vram_insufficient"
    retryable: ClassVar[bool] = True
    bucket: ClassVar[Bucket] = "settle"

    needed_mib: float = 0.0
    free_mib: float | None = None
    reclaimable_mib: float = 0.0
    reserve_mib: float = 0.0
    holders: tuple[str, ...] = ()


@define(kw_only=True, eq=False, slots=False)
class CardHeld(Refused):
    """Another manager, of process `pid`, acts on this card; this one only observes."""

    code: ClassVar[str] = "card_held"
    retryable: ClassVar[bool] = True
    bucket: ClassVar[Bucket] = "retry"

    pid: int | None = None
    name: str = ""
    device_uuid: str = ""


@define(kw_only=True, eq=False, slots=False)
class DegradedError(Refused):
    """The manager is DEGRADED; `reason_code` says why, recovery has been pulled forward."""

    code: ClassVar[str] = "degraded"
    retryable: ClassVar[bool] = True

    reason_code: str = ""


@define(kw_only=True, eq=False, slots=False)
class ResidencyUnknown(Refused):
    """Ollama gave no definite answer, so nothing was decided on a guess."""

    code: ClassVar[str] = "ollama_unknown"
    retryable: ClassVar[bool] = True
    bucket: ClassVar[Bucket] = "retry"


@define(kw_only=True, eq=False, slots=False)
class OperationTimeout(GPUFSMError, TimeoutError):
    """The caller's own `timeout_s` ended the waiting; the operation itself goes on."""

    code: ClassVar[str] = "timeout"
    retryable: ClassVar[bool] = True

    timeout_s: float = 0.0


# --- failures: something outside broke ---


@define(kw_only=True, eq=False, slots=False)
class InternalError(GPUFSMError):
    """A broken promise of this package.  Please report it with the journal."""

    code: ClassVar[str] = "internal_error"


@define(kw_only=True, eq=False, slots=False)
class OllamaError(GPUFSMError):
    """Root of all that can go wrong with Ollama.  `url` holds no credentials; `text` is the server's, cut to 200."""

    code: ClassVar[str] = "ollama_error"
    bucket: ClassVar[Bucket] = "retry"

    url: str = ""
    model: str = ""
    status: int | None = None
    text: str = ""
    attempts: int = 1
    elapsed_s: float = 0.0

    def summary(self) -> str:
        said = f" (HTTP {self.status})" if self.status else ""
        text = f": {self.text}" if self.text else ""
        return f"{self.detail or self.code.replace('_', ' ')}{said}{text}"


@define(kw_only=True, eq=False, slots=False)
class OllamaUnavailable(OllamaError):
    """No connection, or the connection broke."""

    code: ClassVar[str] = "ollama_unreachable"
    retryable: ClassVar[bool] = True


@define(kw_only=True, eq=False, slots=False)
class OllamaTimeout(OllamaUnavailable):
    """Connected, but no whole answer before the call's deadline."""

    code: ClassVar[str] = "ollama_timeout"
    retryable: ClassVar[bool] = True


@define(kw_only=True, eq=False, slots=False)
class OllamaProtocolError(OllamaError):
    """The answer is not one of Ollama's: HTML, a redirect, broken JSON, absurd numbers, too long."""

    code: ClassVar[str] = "ollama_protocol"
    retryable: ClassVar[bool] = True


@define(kw_only=True, eq=False, slots=False)
class OllamaBusy(OllamaError):
    """503: the queue is full.  Not down."""

    code: ClassVar[str] = "ollama_busy"
    retryable: ClassVar[bool] = True


@define(kw_only=True, eq=False, slots=False)
class OllamaRequestRejected(OllamaError):
    """400/403/405/501: asking again changes nothing."""

    code: ClassVar[str] = "ollama_rejected"
    bucket: ClassVar[Bucket] = "user"


@define(kw_only=True, eq=False, slots=False)
class ModelNotFound(OllamaError):
    """Ollama does not have the model."""

    code: ClassVar[str] = "model_not_found"
    bucket: ClassVar[Bucket] = "user"


@define(kw_only=True, eq=False, slots=False)
class LoadFailed(OllamaError):
    """The runner died or the server reported an error while loading or running the model."""

    code: ClassVar[str] = "load_failed"
    retryable: ClassVar[bool] = True


@define(kw_only=True, eq=False, slots=False)
class LoadOutOfMemory(LoadFailed):
    """The load ran out of memory; it makes sense again only after memory was freed."""

    code: ClassVar[str] = "vram_insufficient"
    bucket: ClassVar[Bucket] = "settle"


@define(kw_only=True, eq=False, slots=False)
class LoadTimeout(LoadFailed, TimeoutError):
    """The load did not end within `vlm_load_deadline_s`, however green the health routes are."""

    code: ClassVar[str] = "load_stalled"
    retryable: ClassVar[bool] = False


@define(kw_only=True, eq=False, slots=False)
class LoadAborted(OllamaError):
    """We closed the load's socket ourselves, on purpose: something newer does not want the VLM."""

    code: ClassVar[str] = "load_aborted"


@define(kw_only=True, eq=False, slots=False)
class PartialOffload(LoadFailed):
    """The model is loaded but not wholly on the GPU: `size_vram_mib` of `size_mib`."""

    code: ClassVar[str] = "gpu_not_used"
    retryable: ClassVar[bool] = False
    bucket: ClassVar[Bucket] = "settle"

    size_mib: float = 0.0
    size_vram_mib: float = 0.0


@define(kw_only=True, eq=False, slots=False)
class UnloadStuck(OllamaError):
    """Ollama still lists the model after every unload request and the deadline."""

    code: ClassVar[str] = "unload_stuck"
    retryable: ClassVar[bool] = True


@define(kw_only=True, eq=False, slots=False)
class ReleaseUnproven(GPUFSMError):
    """Ollama no longer lists the model, but the card's memory did not come back in time."""

    code: ClassVar[str] = "release_unproven"
    retryable: ClassVar[bool] = True
    bucket: ClassVar[Bucket] = "settle"

    expected_mib: float = 0.0
    returned_mib: float = 0.0


@define(kw_only=True, eq=False, slots=False)
class ExternalClient(OllamaError):
    """Another client of Ollama keeps undoing the placement."""

    code: ClassVar[str] = "external_client"
    retryable: ClassVar[bool] = True


@define(kw_only=True, eq=False, slots=False)
class PlacementLost(GPUFSMError):
    """The placement was undone from outside and cannot be put right now."""

    code: ClassVar[str] = "placement_lost"
    retryable: ClassVar[bool] = True
    bucket: ClassVar[Bucket] = "retry"


@define(kw_only=True, eq=False, slots=False)
class ClipError(GPUFSMError):
    """CLIP could not be loaded, moved or used."""

    code: ClassVar[str] = "clip_failed"
    retryable: ClassVar[bool] = True
    bucket: ClassVar[Bucket] = "retry"


@define(kw_only=True, eq=False, slots=False)
class ClipUnavailable(ClipError):
    """CLIP cannot exist here: package or weights are missing, or the weights are refused."""

    code: ClassVar[str] = "clip_unavailable"
    retryable: ClassVar[bool] = False
    bucket: ClassVar[Bucket] = "user"


@define(kw_only=True, eq=False, slots=False)
class ClipOutOfMemory(ClipError):
    """The move to the GPU ran out of memory and was undone."""

    code: ClassVar[str] = "vram_insufficient"
    bucket: ClassVar[Bucket] = "settle"

    needed_mib: float = 0.0


@define(kw_only=True, eq=False, slots=False)
class CudaPoisoned(ClipError):
    """A CUDA error other than out-of-memory: this process cannot use the GPU again."""

    code: ClassVar[str] = "cuda_poisoned"
    retryable: ClassVar[bool] = False
    bucket: ClassVar[Bucket] = "restart_process"


@define(kw_only=True, eq=False, slots=False)
class GpuLost(GPUFSMError):
    """A GPU that was there has gone."""

    code: ClassVar[str] = "gpu_lost"
    bucket: ClassVar[Bucket] = "restart_process"


def displaced_by(kind: str) -> GPUFSMError:
    """The answer to what a preempting request pushed aside."""
    if kind == "close":
        return ManagerClosed(detail="the manager was closed before this took effect")
    return Superseded(detail="a newer request took this one's place")


def one_line(text: object, limit: int = 200) -> str:
    """Make foreign text safe for a log line: control characters escaped, cut to `limit` characters."""
    line = str(text)[: limit * 2]
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= limit else line[: limit - 3] + "..."


__all__ = [name for name, thing in list(globals().items()) if isinstance(thing, type) and issubclass(thing, Exception)]
