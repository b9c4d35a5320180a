"""What happened: frozen records, handed to listeners and kept in the journal.

`at` is a reading of the manager's monotonic clock in seconds; `kind` is the word to subscribe to.
"""

from __future__ import annotations

from typing import Any, ClassVar

from attrs import frozen

from gpu_fsm.status import ExecutionMode, Reason, State, plain


@frozen(kw_only=True)
class Event:
    """Root of the events."""

    kind: ClassVar[str] = "event"

    at: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the kind."""
        return {"kind": self.kind, **plain(self)}


@frozen(kw_only=True)
class ModeChanged(Event):
    """The settled mode changed; the new mode's promise has been observed."""

    kind: ClassVar[str] = "mode_changed"

    old: ExecutionMode
    new: ExecutionMode
    reason: Reason | None = None


@frozen(kw_only=True)
class StateChanged(Event):
    """The machine entered a state, steps included; published before the state's effects begin."""

    kind: ClassVar[str] = "state_changed"

    old: State
    new: State
    trigger: str


@frozen(kw_only=True)
class ResourceChanged(Event):
    """The card's free memory moved by at least `resource_event_mib` since the last value told."""

    kind: ClassVar[str] = "resource_changed"

    free_mib: float | None
    told_mib: float | None
    total_mib: float | None


@frozen(kw_only=True)
class IdleUnload(Event):
    """The VLM was unloaded for want of use, and it is gone."""

    kind: ClassVar[str] = "idle_unload"

    model: str
    idle_s: float


@frozen(kw_only=True)
class Degraded(Event):
    """The asked mode could not be given."""

    kind: ClassVar[str] = "degraded"

    reason: Reason
    asked: ExecutionMode
    leftovers: tuple[str, ...] = ()


@frozen(kw_only=True)
class Recovered(Event):
    """A mode stands again after DEGRADED."""

    kind: ClassVar[str] = "recovered"

    mode: ExecutionMode
    after_s: float


@frozen(kw_only=True)
class VLMLost(Event):
    """The VLM that was promised has gone without our doing."""

    kind: ClassVar[str] = "vlm_lost"

    model: str
    detail: str = ""


@frozen(kw_only=True)
class ForeignEvicted(Event):
    """Ollama evicted another client's model to make room for our load."""

    kind: ClassVar[str] = "foreign_evicted"

    models: tuple[str, ...]


@frozen(kw_only=True)
class ForeignConsumer(Event):
    """Somebody else took at least `resource_event_mib` of the card while nothing of ours moved."""

    kind: ClassVar[str] = "foreign_consumer"

    taken_mib: float
    free_mib: float
    holders: tuple[str, ...] = ()
    """Processes other than this one that hold memory, largest first, where the driver tells."""


@frozen(kw_only=True)
class VRAMLow(Event):
    """Less than `floor_mib` is free: the card is as good as full, and some drivers page now instead of failing.

    Told once for each time that free memory falls under the floor; lasting pressure leads to DEGRADED.
    """

    kind: ClassVar[str] = "vram_low"

    free_mib: float
    floor_mib: float
    total_mib: float | None
    holders: tuple[str, ...] = ()
    """Processes other than this one that hold memory, largest first, where the driver tells."""


KINDS: tuple[type[Event], ...] = (
    ModeChanged,
    StateChanged,
    ResourceChanged,
    IdleUnload,
    Degraded,
    Recovered,
    VLMLost,
    ForeignEvicted,
    ForeignConsumer,
    VRAMLow,
)
"""Every event there is."""
