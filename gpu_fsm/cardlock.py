"""One manager per card: an advisory lock by the card's UUID, among the processes of one user.

Two managers on one card would undo each other's placements for ever, so the second one only looks.  The lock is the
kernel's (`flock`, through the package filelock): it ends with its holder however that dies, so it is never stale, and a
forked child does not inherit it.  The file beside it, which says who holds the card, is for messages only.

Where no folder can be trusted the manager works without a lock and says so in the log: a lock that cannot be had must
not cost anybody the card.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gpu_fsm.errors import CardHeld, one_line

if TYPE_CHECKING:
    from filelock import FileLock

log = logging.getLogger("gpu_fsm")

NOTE_BYTES: Final = 4096
"""Longer notes are not ours."""


class CardLock:
    """The lock of whichever card `watch` is told of.  From any thread; nothing here waits."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._uuid = ""
        self._lock: FileLock | None = None
        self._held = False
        self._gave_up = False
        self.held_by = ""
        """Another manager that has the card, in words; empty where this one may act."""

    def watch(self, uuid: str) -> None:
        """Learn which card it is, and take its lock where it is free.  Never raises."""
        with self._guard:
            if uuid and not self._uuid:
                self._uuid = uuid
            with contextlib.suppress(CardHeld):
                self._take()

    def permit(self) -> None:
        """Raise `CardHeld` where another manager has the card.  A card that has become free is taken at once."""
        with self._guard:
            self._take()

    def close(self) -> None:
        """Let go of the card.  Idempotent."""
        with self._guard:
            if self._held and self._lock is not None:
                self._held = False
                with contextlib.suppress(OSError):
                    self._note().unlink(missing_ok=True)  # while the lock is ours: afterwards the note is another's
                self._lock.release()
            self._gave_up = True

    # --- under the guard ---

    def _take(self) -> None:
        if self._held or self._gave_up or not self._uuid:
            return
        try:
            if self._lock is None:
                self._lock = _lock_file(runtime_folder(), self._uuid)
            self._held = _acquire(self._lock)
            if self._held:
                self.held_by = ""
                self._write_note()
                return
        except Exception as error:  # a file system without locks, a folder of somebody else's, no room for a note
            if not self._held:
                self._gave_up = True
                self.held_by = ""
            log.warning("gpu_fsm: the lock of %s is not whole: %s", one_line(self._uuid), one_line(error))
            return
        pid, name = self._read_note()
        who = "another process" if pid is None else f"{name or 'a process'} (pid {pid})"
        if pid == os.getpid():
            who = f"another manager in this process (pid {pid})"
        self.held_by = who
        raise CardHeld(
            detail=f"{who} holds the card {self._uuid}; this manager only observes",
            remedy="Use that manager, or end it: this one takes over at the next request.",
            pid=pid,
            name=name,
            device_uuid=self._uuid,
        )

    def _note(self) -> Path:
        assert self._lock is not None
        return Path(self._lock.lock_file).with_suffix(".json")

    def _write_note(self) -> None:
        name = one_line(Path(sys.argv[0] if sys.argv and sys.argv[0] else sys.executable).name, 80)
        fresh = self._note().with_suffix(f".{os.getpid()}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(fresh, flags, 0o600), "w", encoding="utf-8") as file:
            json.dump({"pid": os.getpid(), "name": name}, file)
        fresh.replace(self._note())

    def _read_note(self) -> tuple[int | None, str]:
        """Pid and name of the holder; nobody where the note is missing, spoilt, or older than the holder."""
        try:
            flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)
            with os.fdopen(os.open(self._note(), flags), "rb") as file:
                said = json.loads(file.read(NOTE_BYTES))
            pid, name = int(said["pid"]), one_line(str(said["name"]), 80)
        except (OSError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError):
            return None, ""
        return (pid, name) if _lives(pid) else (None, "")


def _lives(pid: int) -> bool:
    if pid <= 0 or os.name != "posix":
        return pid > 0
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _lock_file(folder: Path, uuid: str) -> FileLock:
    from filelock import FileLock

    # No soft lock where flock is missing: a file that outlives its owner is what must not happen here.
    path = folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', uuid)[:100]}.lock"
    return FileLock(path, mode=0o600, thread_local=False, fallback_to_soft=False, preserve_lock_file=True)


def _acquire(lock: FileLock) -> bool:
    from filelock import Timeout

    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def _candidates() -> Iterator[Path]:
    """The user's runtime folder, then one of their own among the temporary files."""
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if Path(given).is_absolute():
        yield Path(given) / "gpu_fsm"
    if hasattr(os, "getuid"):
        # Also where the environment does not name it: a cron job must meet the desktop's manager.
        yield Path(f"/run/user/{os.getuid()}/gpu_fsm")
        yield Path(tempfile.gettempdir()) / f"gpu_fsm-{os.getuid()}"
    else:
        yield Path(tempfile.gettempdir()) / "gpu_fsm-of-this-user"


def runtime_folders() -> tuple[Path, ...]:
    """The folders that `runtime_folder` may have made, in this process or in one with another environment."""
    return tuple(dict.fromkeys(folder for folder in _candidates() if _is_private(folder)))


def runtime_folder() -> Path:
    """A folder that only this user can enter, made where needed.  Raises `OSError` where there is none."""
    trouble = "no folder"
    for folder in _candidates():
        try:
            if folder.name == "gpu_fsm" and not _ours(folder.parent):
                continue  # a runtime folder of another user's (sudo keeps the variable)
            folder.mkdir(mode=0o700, exist_ok=True)
            if _is_private(folder):
                return folder
            trouble = f"{one_line(folder)} is a link, another user's, or open to others"
        except OSError as error:
            trouble = f"{one_line(folder)}: {error.strerror or one_line(error)}"
    raise PermissionError(trouble)


def _is_private(folder: Path) -> bool:
    try:
        return _ours(folder) and not folder.lstat().st_mode & 0o077
    except OSError:
        return False


def _ours(folder: Path) -> bool:
    """A folder itself, no link to one, and this user's."""
    facts = folder.lstat()
    return stat.S_ISDIR(facts.st_mode) and (not hasattr(os, "getuid") or facts.st_uid == os.getuid())
