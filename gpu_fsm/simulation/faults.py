"""Fault switches: what is to go wrong, at which operation, how often."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from attrs import define, field

OPERATIONS = (
    "ollama.load",
    "ollama.renew",
    "ollama.unload",
    "ollama.generate",
    "ollama.ps",
    "ollama.tags",
    "ollama.show",
    "ollama.version",
    "ollama.other",
    "clip.to_gpu",
    "clip.to_cpu",
    "clip.encode",
    "probe.read",
)
"""`renew` is a load request for a model that is resident and well; `other` is every remaining route of the server."""

_GENERAL = frozenset({"before", "after", "silent", "hang", "late"})
_HTTP = frozenset({"http_500", "http_503", "http_404", "html", "truncated"})

KINDS: dict[str, frozenset[str]] = {
    "ollama.load": _GENERAL | _HTTP | {"oom", "partial", "runner_dies"},
    "ollama.renew": _GENERAL | _HTTP | {"runner_dies"},
    "ollama.unload": _GENERAL | _HTTP | {"reclaim_never"},
    "ollama.generate": _GENERAL | _HTTP | {"runner_dies"},
    "ollama.ps": _GENERAL | _HTTP,
    "ollama.tags": _GENERAL | _HTTP,
    "ollama.show": _GENERAL | _HTTP,
    "ollama.version": _GENERAL | _HTTP,
    "ollama.other": _GENERAL | _HTTP,
    "clip.to_gpu": _GENERAL | {"oom", "gpu_lost"},
    "clip.to_cpu": _GENERAL | {"gpu_lost"},
    "clip.encode": _GENERAL | {"oom", "gpu_lost"},
    "probe.read": _GENERAL | {"gpu_lost", "unknown"},
}
"""Which kinds of fault each operation knows.

`before`: fails without effect.  `after`: takes effect, then fails.  `silent`: claims success without effect; a read
repeats its last answer or says "nothing".  `hang`: no answer until the caller gives up or `heal()`.  `late`: `delay_s`
later (an unload is acknowledged at once and happens later).  The rest speak for themselves; `partial` takes `share`.
"""


@define(eq=False)
class Fault:
    """One armed fault."""

    op: str
    kind: str
    left: float = 1
    skip: int = 0
    rate: float = 1.0
    args: dict[str, Any] = field(factory=dict)

    @property
    def delay_s(self) -> float:
        """How much later, for `late`."""
        return float(self.args.get("delay_s", 1.0))


class Faults:
    """The switchboard.  `fired` counts by (operation, kind)."""

    def __init__(self, seed: int = 0) -> None:
        self.fired: Counter[tuple[str, str]] = Counter()
        self.armed: list[Fault] = []
        self._random = random.Random(seed)
        self._on_heal: list[Callable[[], None]] = []
        self.healings = 0

    def arm(
        self, op: str, kind: str, times: float | None = 1, *, skip: int = 0, rate: float = 1.0, **args: Any
    ) -> Fault:
        """Have the next `times` calls of `op` go wrong (None: all until `heal`), after `skip` good ones.

        `rate` lets only that share of the calls go wrong.  `args`: `delay_s` for `late`, `share` for `partial`,
        `text` for the errors; `status`, `body` and `content_type` make any answer of `html`.  Raises ValueError for a
        kind that the operation does not know.
        """
        if kind not in KINDS.get(op, ()):
            known = ", ".join(sorted(KINDS.get(op, ()))) or f"operations: {', '.join(OPERATIONS)}"
            raise ValueError(f"{op!r} has no fault {kind!r}; known: {known}")
        fault = Fault(op=op, kind=kind, left=math.inf if times is None else times, skip=skip, rate=rate, args=args)
        self.armed.append(fault)
        return fault

    def disarm(self, op: str) -> None:
        """Call off what is armed for `op`; what has gone wrong already stays so until `heal`."""
        self.armed = [fault for fault in self.armed if fault.op != op]

    def heal(self) -> None:
        """Call off everything and end what hangs or leaks because of a fault."""
        self.armed.clear()
        self.healings += 1
        callbacks, self._on_heal = self._on_heal, []
        for callback in callbacks:
            callback()

    def on_heal(self, callback: Callable[[], None]) -> None:
        """Have `callback` run once, at the next `heal`."""
        self._on_heal.append(callback)

    def take(self, op: str) -> Fault | None:
        """Ask, at the moment of a call, whether and how it goes wrong."""
        if not self.armed:
            return None
        for fault in self.armed:
            if fault.op != op:
                continue
            if fault.skip > 0:
                fault.skip -= 1
                continue
            if fault.rate < 1.0 and self._random.random() >= fault.rate:
                continue
            fault.left -= 1
            if fault.left <= 0:
                self.armed.remove(fault)
            self.fired[op, fault.kind] += 1
            return fault
        return None


__all__ = ["KINDS", "OPERATIONS", "Fault", "Faults"]
