"""What a long run shows: lines, and on a terminal below them what is being waited for and what is known of the rest."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.spinner import Spinner

log = logging.getLogger("gpu_fsm")

PULSE_S = 10.0
"""To a pipe or a file, a wait is told after so long, then after twice as long, and so on."""
_MIB = 2**20


class Board(logging.Handler):
    """A context manager; from any thread.  To a pipe or a file it writes lines only, one for a tenth of a download."""

    def __init__(
        self, *, to_stderr: bool = False, console: Console | None = None, pulse_s: float | None = PULSE_S
    ) -> None:
        """`pulse_s` None: a pipe is not told how long a wait takes."""
        super().__init__(logging.INFO)
        self._console = console or Console(stderr=to_stderr, highlight=False, markup=False)
        self._out = sys.stderr if to_stderr else sys.stdout
        self._pulse_s = pulse_s
        self._pulse: threading.Timer | None = None
        self._lock_of_what = threading.Lock()
        self._what = ""
        self._since = 0.0
        self._limit_s: float | None = None
        self._note = ""
        self._took_s: dict[str, float] = {}
        self._tenth = ("", -1)
        self._spinner = Spinner("dots")
        columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
        self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._draw, console=self._console, refresh_per_second=8, transient=True)
            self._live.start()
        log.addHandler(self)
        self._level_before = log.level
        log.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        log.removeHandler(self)
        log.setLevel(self._level_before)
        self.wait_for("")
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """One thing that happened."""
        if self._live is None:
            self._out.write(line + "\n")
            self._out.flush()  # whoever reads a pipe or a log wants it now
        else:
            self._console.print(line, soft_wrap=True)

    def wait_for(self, what: str, *, limit_s: float | None = None) -> None:
        """Something takes a while from now on, at most `limit_s`; an empty text ends it."""
        with self._lock_of_what:
            now = time.monotonic()
            if self._what and what != self._what:
                self._took_s[self._what] = now - self._since
            if what != self._what:
                self._since = now
                self._beat(what)
            self._what, self._limit_s, self._note = what, limit_s, ""

    def fetch(self, what: str, done_bytes: int, total_bytes: int | None) -> None:
        """A download's progress; each `what` has a bar of its own."""
        self.wait_for(what)
        known = ""
        if total_bytes:
            with self._lock_of_what:
                took_s = time.monotonic() - self._since
            known = f"{100 * done_bytes // total_bytes} % of {total_bytes / _MIB:.0f} MiB"
            if 0 < done_bytes < total_bytes:
                known += f"; about {took_s * (total_bytes - done_bytes) / done_bytes:.0f} s left"
            self._note = known
        if self._live is None:
            tenth = 10 * done_bytes // total_bytes if total_bytes else 0
            if (what, tenth) != self._tenth:
                self._tenth = (what, tenth)
                self.say(self.waiting() if known else what)
            return
        if total_bytes is None:
            return
        task = next((task.id for task in self._progress.tasks if task.description == what), None)
        if task is None:
            task = self._progress.add_task(what, total=total_bytes)
        self._progress.update(task, completed=done_bytes)

    def emit(self, record: logging.LogRecord) -> None:
        """What the package logs meanwhile stands beside what is being waited for: how much of CLIP has come."""
        with contextlib.suppress(OSError):  # nobody reads any more: the next line of the run itself ends it for that
            if record.levelno > logging.INFO:
                self._warn(f"gpu_fsm: {self.format(record).removeprefix('gpu_fsm: ')}")
            elif self._what and record.module != "engine":  # its steps are told as events
                self._note = record.getMessage()
                if self._live is None:
                    self.say(self.waiting())

    def waiting(self) -> str:
        """What is being waited for, for how long, and what is known of the rest; empty where nothing is."""
        with self._lock_of_what:
            if not self._what:
                return ""
            known = []
            if self._what in self._took_s:
                known.append(f"last time {self._took_s[self._what]:.0f} s")
            if self._limit_s is not None:
                known.append(f"at most {self._limit_s:.0f} s")
            if self._note:
                known.append(self._note)
            told = f" ({'; '.join(known)})" if known else ""
            return f"{self._what}: {time.monotonic() - self._since:.0f} s{told}"

    def _warn(self, line: str) -> None:
        if self._live is None:
            sys.stderr.write(line + "\n")
        else:
            self.say(line)

    def _beat(self, what: str, after_s: float | None = None) -> None:
        """Where there is no terminal, tell of a wait that goes on; the lock is held."""
        if self._pulse is not None:
            self._pulse.cancel()
            self._pulse = None
        after_s = after_s or self._pulse_s
        if not what or after_s is None or self._live is not None:
            return
        self._pulse = threading.Timer(after_s, self._tell_again, [what, after_s])
        self._pulse.daemon = True
        self._pulse.start()

    def _tell_again(self, what: str, after_s: float) -> None:
        with self._lock_of_what:
            if what != self._what:
                return
            self._beat(what, 2 * after_s)
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            self.say(self.waiting())

    def _draw(self) -> RenderableType:
        if any(not task.finished for task in self._progress.tasks):
            return self._progress.get_renderable()
        waiting = self.waiting()
        if not waiting:
            return ""
        self._spinner.update(text=waiting)
        return self._spinner
