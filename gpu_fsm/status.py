"""What is: the words of the domain and the frozen snapshot that `get_status()` returns.

Values only.  A status is replaced as a whole, never changed, so reading one needs no lock and no I/O.  All memory in
MiB, all times in seconds; `*_at` are readings of the manager's monotonic clock.
"""

from __future__ import annotations

import enum
from typing import Any, Literal

import attrs
from attrs import frozen

from gpu_fsm.errors import Bucket, ClipUnavailable, ConfigError, GPUFSMError, ModelNotFound, one_line


class ExecutionMode(enum.Enum):
    """What the agent asks for, and what it gets.  DEGRADED cannot be asked for."""

    IDLE = "idle"
    RECORDING = "recording"
    AUTOPILOT = "autopilot"
    DEGRADED = "degraded"


class State(enum.Enum):
    """The four modes and the four steps of the machine; `states.py` says what each promises."""

    IDLE = "idle"
    RECORDING = "recording"
    AUTOPILOT = "autopilot"
    DEGRADED = "degraded"
    RELEASING = "releasing"
    MIGRATING = "migrating"
    LOADING = "loading"
    SHEDDING = "shedding"


class Hold(enum.Enum):
    """A departure from the mode's own target that does not change the mode."""

    WANTED = "wanted"
    """The VLM is in, on demand, in IDLE or AUTOPILOT."""
    PARKED = "parked"
    """The VLM is out, for want of use, in RECORDING."""


class Answer(enum.Enum):
    """Three-valued: a question that was not answered is not a no."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


class ModelState(enum.Enum):
    """Where the VLM is, as far as it is known."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"
    UNKNOWN = "unknown"


ClipPlace = Literal["cpu", "gpu", "none"]
"""On which side CLIP is; `none` where no CLIP is managed."""

Evidence = Literal["measured", "reported", "none"]
"""Why we believe the VLM's state: our own load with matching bytes, `/api/ps` alone, or nothing."""


@frozen(kw_only=True)
class Reason:
    """Why the manager is DEGRADED, in a form that a person and a program can act on."""

    code: str
    detail: str = ""
    step: str = ""
    remedy: str = ""
    bucket: Bucket = "retry"
    permanent: bool = False
    """True where waiting does not help: recovery only probes, it never loads."""

    @classmethod
    def of(cls, error: GPUFSMError, *, step: str = "") -> Reason:
        """Derive the reason from an error of ours."""
        permanent = error.bucket == "restart_process" or isinstance(
            error, ModelNotFound | ClipUnavailable | ConfigError
        )
        return cls(
            code=error.code,
            detail=one_line(error.summary()),
            step=step,
            remedy=error.remedy,
            bucket=error.bucket,
            permanent=permanent,
        )

    def __str__(self) -> str:
        where = f" while {self.step}" if self.step else ""
        mend = f" {self.remedy}" if self.remedy else ""
        return f"{self.code}{where}: {self.detail}.{mend}"


@frozen(kw_only=True)
class Holder:
    """A process that holds memory on the card; `mib` is None where the driver does not tell."""

    pid: int
    name: str = ""
    mib: float | None = None

    def __str__(self) -> str:
        return f"{self.name or 'process'} (pid {self.pid}): {'?' if self.mib is None else f'{self.mib:.0f}'} MiB"


@frozen(kw_only=True)
class VRAMInfo:
    """One reading of the card.  `free_mib` is None when it is unknown; unknown is never zero."""

    total_mib: float | None = None
    free_mib: float | None = None
    source: str = "none"
    """Who answered: `nvml`, `simulated`, `unified`, `torch`, `assumed`, `none`."""
    scope: Literal["card", "process", "assumed", "none"] = "none"
    """What the figures cover: all programs, this process only, or a size from the settings."""
    device_uuid: str = ""
    name: str = ""
    present: bool = False
    """Is there a card at all?  False with `lost` False is a machine without a GPU."""
    lost: bool = False
    """A card that was there and has gone."""
    detail: str = ""
    """Why something is unknown, in words."""
    bucket: Bucket = "none"
    """What would mend what is the matter; `none` where nothing is."""
    at: float = 0.0

    @property
    def used_mib(self) -> float | None:
        """Total less free: what all programs and the driver hold."""
        if self.total_mib is None or self.free_mib is None:
            return None
        return self.total_mib - self.free_mib


@frozen(kw_only=True)
class LoadedModel:
    """One entry of Ollama's `/api/ps`, with its sizes in MiB."""

    name: str
    digest: str = ""
    size_mib: float = 0.0
    size_vram_mib: float = 0.0
    expires_at: str = ""
    """Ollama's own text, for people: its clock is not ours and nothing is decided from it."""
    forever: bool = False
    """Pinned by somebody with a negative keep_alive."""


@frozen(kw_only=True)
class Residency:
    """Is the configured VLM resident in Ollama?  Yes, no, or not known and why."""

    answer: Answer = Answer.UNKNOWN
    ours: LoadedModel | None = None
    others: tuple[LoadedModel, ...] = ()
    refused: bool = False
    """The connection was refused: nobody listens."""
    detail: str = ""
    at: float = 0.0


@frozen(kw_only=True)
class Catalog:
    """Does Ollama have the configured VLM on disk, and how big is it there?"""

    present: Answer = Answer.UNKNOWN
    size_mib: float | None = None
    digest: str = ""
    vision: Answer = Answer.UNKNOWN
    detail: str = ""


@frozen(kw_only=True)
class LeaseInfo:
    """One lease: which model, who holds it, since when."""

    id: int
    model: Literal["vlm", "clip"]
    holder: str
    since_at: float
    lost: bool = False


@frozen(kw_only=True)
class TimerInfo:
    """A deadline of the machine, on the manager's clock."""

    name: str
    due_at: float


@frozen(kw_only=True)
class GPUResourceStatus:
    """Everything about the manager at one moment."""

    execution_mode: ExecutionMode = ExecutionMode.IDLE
    """The last settled mode; during a step it is the one being left."""
    asked_mode: ExecutionMode = ExecutionMode.IDLE
    state: State = State.IDLE
    since_at: float = 0.0
    reason: Reason | None = None
    hold: Hold | None = None
    vram: VRAMInfo = VRAMInfo()
    vlm_model: str = ""
    vlm_state: ModelState = ModelState.UNKNOWN
    vlm_size_mib: float | None = None
    vlm_size_vram_mib: float | None = None
    vlm_size_source: str = "setting"
    """Where the size for the next load comes from: `measured`, `tags`, `setting`."""
    vlm_ours: bool = False
    """This manager loaded it or used it."""
    evidence: Evidence = "none"
    proof: str = ""
    """What this machine can prove about the VLM, in words (an Ollama elsewhere is not on our card)."""
    clip_device: str = "none"
    clip_context_mib: float | None = None
    """What this process keeps on the card for life since CLIP's first move up, as measured; no move gives it back."""
    cpu_only: bool = False
    cpu_only_reason: str = ""
    others: tuple[LoadedModel, ...] = ()
    leftovers: tuple[str, ...] = ()
    leases: tuple[LeaseInfo, ...] = ()
    timers: tuple[TimerInfo, ...] = ()
    queued: int = 0
    observed_at: float | None = None
    now_at: float = 0.0
    closed: bool = False
    listener_errors: int = 0
    card_held_by: str = ""
    """Another manager that acts on this card, in words; this one observes only.  Empty where this one may act."""
    simulated: tuple[str, ...] = ()
    """Which parts of the world are simulations; empty on a real machine."""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types; enums as their values."""
        return plain(self)  # type: ignore[no-any-return]


def plain(value: Any) -> Any:
    """Turn a record of this package into plain JSON types."""
    if isinstance(value, enum.Enum):
        return value.value
    if attrs.has(type(value)):
        return {a.name: plain(getattr(value, a.name)) for a in attrs.fields(type(value))}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    return value
