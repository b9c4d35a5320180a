"""The fake NVML's card as a place where a simulated Ollama, or any other program, can hold memory.

    card = LedgerCard(nvml, clock=clock)          # in the server's process: what SimulatedOllama(card=...) wants
    game = LedgerCard(nvml, clock=clock, slots=(7, 8)); game.take("game", 2000, pid=77, name="game")

Every allocation is all or nothing on the shared ledger, whichever process makes it.  What a killed process held stays:
the test that kills one has to say what its driver does about it.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

from gpu_fsm.simulation import CardFull
from gpu_fsm.status import Holder
from tests.tools.fake_nvml import MIB, FakeNVML


class Later(Protocol):
    """The part of a world's clock that is used here."""

    def monotonic(self) -> float: ...

    def after(self, delay_s: float, callback: Callable[[], object]) -> Any: ...


class LedgerCard:
    """One card of a fake driver; `slots` are the lines of its process list that this process may fill."""

    lost = False

    def __init__(self, nvml: FakeNVML, *, clock: Later, index: int = 0, slots: tuple[int, int] = (0, 6)) -> None:
        self.clock = clock
        self._index, self._device, self._library = index, nvml.state.device[index], nvml.load()
        self._device.processes = len(self._device.process)  # lines that are not filled are on no list
        self._lock = threading.Lock()
        self._free_lines = list(range(*slots))
        self._bytes: dict[str, int] = {}
        self._lines: dict[str, int] = {}

    @property
    def total_mib(self) -> float:
        """The card's size, without what the driver keeps."""
        return float((self._device.total - self._device.reserved) / MIB)

    @property
    def used_mib(self) -> float:
        """What all processes hold."""
        return float(self._device.used / MIB)

    @property
    def free_mib(self) -> float:
        """What is left."""
        return self.total_mib - self.used_mib

    @property
    def peak_mib(self) -> float:
        """The most that was ever held."""
        return float(self._device.peak / MIB)

    def held_mib(self, owner: str) -> float:
        """What `owner` of this process holds."""
        return self._bytes.get(owner, 0) / MIB

    def take(self, owner: str, mib: float, *, pid: int = 0, name: str = "") -> None:
        """Allocate, all or nothing; raises `CardFull`."""
        size = round(mib * MIB)
        with self._lock:
            if not self._library.fake_nvml_take(self._index, size):
                raise CardFull(owner, mib, self.free_mib)
            self._bytes[owner] = self._bytes.get(owner, 0) + size
            if owner not in self._lines:
                self._lines[owner] = self._free_lines.pop(0)
                line = self._device.process[self._lines[owner]]
                line.pid, line.name, line.lists = pid or os.getpid(), (name or owner).encode(), 1
            self._device.process[self._lines[owner]].used = self._bytes[owner]

    def give_back(self, owner: str, mib: float | None = None) -> float:
        """Free `mib` of what `owner` holds, or all of it; returns what was freed."""
        with self._lock:
            held = self._bytes.get(owner, 0)
            size = held if mib is None else min(held, round(mib * MIB))
            self._library.fake_nvml_give(self._index, size)
            self._bytes[owner] = held - size
            if owner in self._lines:
                self._device.process[self._lines[owner]].used = held - size
        if held == size:
            self.leave_list(owner)
            self._bytes.pop(owner, None)
        return size / MIB

    def release_after(self, owner: str, delay_s: float, mib: float | None = None) -> None:
        """The owner's process has ended; its memory returns `delay_s` later (inf: never)."""
        self.leave_list(owner)
        if delay_s <= 0:
            self.give_back(owner, mib)
        elif not math.isinf(delay_s):
            self.clock.after(delay_s, lambda: self.give_back(owner, mib))

    def leave_list(self, owner: str) -> None:
        """Take `owner` off the list of processes; what it holds stays taken."""
        with self._lock:
            line = self._lines.pop(owner, None)
            if line is not None:
                self._device.process[line].lists = 0
                self._free_lines.append(line)

    def holders(self) -> tuple[Holder, ...]:
        """What of this process is on the list."""
        return tuple(Holder(pid=0, name=owner, mib=self.held_mib(owner)) for owner in self._lines)
