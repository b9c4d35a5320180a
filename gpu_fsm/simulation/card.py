"""The card: a ledger of who holds how many MiB, in this process or shared by several."""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from attrs import define, frozen

from gpu_fsm.simulation.clock import WorldClock
from gpu_fsm.status import Holder

DRIVER = "driver"
"""The owner of what the driver and the desktop hold for good."""

_SLACK_MIB = 1e-6
"""Sums of fractions of MiB are not exact; a byte is not worth an out-of-memory."""


class CardFull(MemoryError):
    """An allocation did not fit; nothing was taken."""

    def __init__(self, owner: str, asked_mib: float, free_mib: float) -> None:
        super().__init__(f"{owner} asked for {asked_mib:.0f} MiB, {free_mib:.0f} MiB are free")
        self.owner = owner
        self.asked_mib = asked_mib
        self.free_mib = free_mib


@frozen
class Change:
    """One entry of the card's history: at `at` seconds `owner` took (or gave, negative) `delta_mib`."""

    at: float
    owner: str
    delta_mib: float
    used_mib: float


@define
class _Entry:
    mib: float
    pid: int
    name: str
    listed: bool = True


class SimulatedCard:
    """A card of `total_mib`, seen by one process.  All sizes in MiB; `used_mib <= total_mib` always."""

    def __init__(self, total_mib: float = 8192.0, *, clock: WorldClock, driver_mib: float = 300.0) -> None:
        self.total_mib = float(total_mib)
        self.clock = clock
        self.lost = False
        """True while the card has fallen off the bus; the ledger itself goes on."""
        self.history: list[Change] = []
        self.peak_mib = 0.0
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._used = 0.0
        if driver_mib:
            self.take(DRIVER, driver_mib)

    @property
    def used_mib(self) -> float:
        """What all owners hold."""
        return self._used

    @property
    def free_mib(self) -> float:
        """What is left."""
        return max(0.0, self.total_mib - self._used)

    def held_mib(self, owner: str) -> float:
        """What `owner` holds; 0 for a stranger."""
        entry = self._entries.get(owner)
        return entry.mib if entry else 0.0

    def owners(self) -> dict[str, float]:
        """Who holds how much, the driver included."""
        with self._lock:
            return {owner: entry.mib for owner, entry in self._entries.items()}

    def take(self, owner: str, mib: float, *, pid: int = 0, name: str = "") -> None:
        """Allocate `mib` more for `owner`, all or nothing; raises `CardFull`.  `pid` and `name` show in `holders`."""
        _size(mib)
        with self._lock:
            if mib > self.total_mib - self._used + _SLACK_MIB:
                raise CardFull(owner, mib, self.total_mib - self._used)
            entry = self._entries.setdefault(owner, _Entry(0.0, pid, name or owner))
            entry.mib += mib
            self._note(owner, mib)

    def give_back(self, owner: str, mib: float | None = None) -> float:
        """Free `mib` of what `owner` holds, or all of it; returns what was freed.  Never more than it holds."""
        with self._lock:
            entry = self._entries.get(owner)
            if entry is None:
                return 0.0
            freed = entry.mib if mib is None else min(_size(mib), entry.mib)
            entry.mib -= freed
            if entry.mib <= _SLACK_MIB:
                del self._entries[owner]
            self._note(owner, -freed)
            return freed

    def release_after(self, owner: str, delay_s: float, mib: float | None = None) -> None:
        """The owner's process has gone from the process list; its memory returns `delay_s` later (inf: never)."""
        self.leave_list(owner)
        if delay_s <= 0:
            self.give_back(owner, mib)
        elif not math.isinf(delay_s):
            self.clock.after(delay_s, lambda: self.give_back(owner, mib))

    def leave_list(self, owner: str) -> None:
        """Take `owner` off the list of processes; what it holds stays taken."""
        with self._lock:
            if owner in self._entries:
                self._entries[owner].listed = False

    def holders(self) -> tuple[Holder, ...]:
        """The processes that hold memory, as a driver lists them: not the driver itself, not those that have exited."""
        with self._lock:
            return tuple(
                Holder(pid=e.pid, name=e.name, mib=e.mib) for o, e in self._entries.items() if e.listed and o != DRIVER
            )

    def _note(self, owner: str, delta_mib: float) -> None:
        self._used = math.fsum(entry.mib for entry in self._entries.values())
        self.peak_mib = max(self.peak_mib, self._used)
        self.history.append(Change(self.clock.monotonic(), owner, delta_mib, self._used))

    def __repr__(self) -> str:
        held = ", ".join(f"{owner} {mib:.0f}" for owner, mib in self.owners().items())
        return f"<{type(self).__name__} {self.used_mib:.0f}/{self.total_mib:.0f} MiB: {held}>"


class SharedCard:
    """The same ledger in a file, for several processes.  What a dead process held vanishes, as a driver does it.

    Every process opens the same `path`; the first one fixes the size.  `history` holds this process's changes only.
    """

    def __init__(
        self, path: str | Path, total_mib: float = 8192.0, *, clock: WorldClock, driver_mib: float = 300.0
    ) -> None:
        self.path = str(path)
        self.clock = clock
        self.lost = False
        self.history: list[Change] = []
        with self._ledger() as db:
            db.execute("CREATE TABLE IF NOT EXISTS card (total_mib REAL, peak_mib REAL)")
            db.execute(
                "CREATE TABLE IF NOT EXISTS held "
                "(owner TEXT, pid INTEGER, born TEXT, name TEXT, mib REAL, listed INTEGER, PRIMARY KEY (owner, pid))"
            )
            if db.execute("SELECT count(*) FROM card").fetchone()[0] == 0:
                db.execute("INSERT INTO card VALUES (?, ?)", (float(total_mib), float(driver_mib)))
                db.execute("INSERT INTO held VALUES (?, 0, '', ?, ?, 1)", (DRIVER, DRIVER, float(driver_mib)))
            self.total_mib = float(db.execute("SELECT total_mib FROM card").fetchone()[0])

    @property
    def used_mib(self) -> float:
        """What all owners of all living processes hold."""
        with self._ledger() as db:
            return self._used(db)

    @property
    def free_mib(self) -> float:
        """What is left."""
        return max(0.0, self.total_mib - self.used_mib)

    @property
    def peak_mib(self) -> float:
        """The most that was ever held."""
        with self._ledger() as db:
            return float(db.execute("SELECT peak_mib FROM card").fetchone()[0])

    def held_mib(self, owner: str) -> float:
        """What `owner` holds; 0 for a stranger."""
        return self.owners().get(owner, 0.0)

    def owners(self) -> dict[str, float]:
        """Who holds how much, the driver included."""
        with self._ledger() as db:
            return dict(db.execute("SELECT owner, sum(mib) FROM held GROUP BY owner"))

    def take(self, owner: str, mib: float, *, pid: int = 0, name: str = "") -> None:
        """Allocate `mib` more for `owner` of this process, all or nothing; raises `CardFull`."""
        _size(mib)
        me = os.getpid()
        with self._ledger() as db:
            used = self._used(db)
            if mib > self.total_mib - used + _SLACK_MIB:
                raise CardFull(owner, mib, self.total_mib - used)
            db.execute(
                "INSERT INTO held VALUES (?, ?, ?, ?, ?, 1) ON CONFLICT (owner, pid) DO UPDATE SET mib = mib + ?",
                (owner, me, _born(me) or "", name or owner, mib, mib),
            )
            self._note(db, owner, mib)

    def give_back(self, owner: str, mib: float | None = None) -> float:
        """Free `mib` of what this process's `owner` holds, or all of it; returns what was freed."""
        with self._ledger() as db:
            row = db.execute("SELECT mib FROM held WHERE owner = ? AND pid = ?", (owner, os.getpid())).fetchone()
            if row is None:
                return 0.0
            freed = float(row[0]) if mib is None else min(_size(mib), float(row[0]))
            db.execute("UPDATE held SET mib = mib - ? WHERE owner = ? AND pid = ?", (freed, owner, os.getpid()))
            db.execute("DELETE FROM held WHERE mib <= ?", (_SLACK_MIB,))
            self._note(db, owner, -freed)
            return freed

    def release_after(self, owner: str, delay_s: float, mib: float | None = None) -> None:
        """The owner has gone from the process list; its memory returns `delay_s` later (inf: never)."""
        self.leave_list(owner)
        if delay_s <= 0:
            self.give_back(owner, mib)
        elif not math.isinf(delay_s):
            self.clock.after(delay_s, lambda: self.give_back(owner, mib))

    def leave_list(self, owner: str) -> None:
        """Take `owner` off the list of processes; what it holds stays taken."""
        with self._ledger() as db:
            db.execute("UPDATE held SET listed = 0 WHERE owner = ? AND pid = ?", (owner, os.getpid()))

    def holders(self) -> tuple[Holder, ...]:
        """The living processes that hold memory, the driver not among them."""
        with self._ledger() as db:
            rows = db.execute("SELECT pid, name, mib FROM held WHERE listed = 1 AND owner != ?", (DRIVER,)).fetchall()
        return tuple(Holder(pid=pid, name=name, mib=mib) for pid, name, mib in rows)

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.path, timeout=10.0, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous = OFF")  # a ledger of a simulation need not survive a power cut
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def _used(self, db: sqlite3.Connection) -> float:
        for pid, born in db.execute("SELECT DISTINCT pid, born FROM held WHERE pid != 0").fetchall():
            if not _lives(pid, born):
                db.execute("DELETE FROM held WHERE pid = ? AND born = ?", (pid, born))
        return math.fsum(row[0] for row in db.execute("SELECT mib FROM held"))

    def _note(self, db: sqlite3.Connection, owner: str, delta_mib: float) -> None:
        used = self._used(db)
        db.execute("UPDATE card SET peak_mib = max(peak_mib, ?)", (used,))
        self.history.append(Change(self.clock.monotonic(), owner, delta_mib, used))

    def __repr__(self) -> str:
        return f"<SharedCard {self.used_mib:.0f}/{self.total_mib:.0f} MiB in {self.path}>"


Card = SimulatedCard | SharedCard
"""Either ledger; the rest of the world does not care which."""


def _size(mib: float) -> float:
    if not mib >= 0 or math.isinf(mib):
        raise ValueError(f"a size in MiB, not {mib!r}")
    return float(mib)


def _born(pid: int) -> str | None:
    """A word that tells this process from a later one with the same pid; None if there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _lives(pid: int, born: str) -> bool:
    if born:
        return _born(pid) == born
    if os.name == "nt":
        return True  # os.kill(pid, 0) would end the process there; entries go only when they are given back
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


__all__ = ["DRIVER", "Card", "CardFull", "Change", "SharedCard", "SimulatedCard"]
