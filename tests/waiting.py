"""How tests of threads wait: bounded, on futures and events, and never by sleeping."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

from gpu_fsm import GPUResourceManager
from gpu_fsm.simulation import SimulatedWorld

T = TypeVar("T")

PATIENCE_S = 30.0
"""Real seconds after which a test takes a wait for endless; a good run never comes near it."""

ROOT = Path(__file__).resolve().parent.parent


def in_thread(call: Callable[..., T], *args: Any, **options: Any) -> Future[T]:
    """Run `call` in a daemon thread of its own, so that one that never ends fails a test and not the run."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args, **options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def let_time_pass(world: SimulatedWorld, future: Future[T], *, step_s: float = 0.05) -> T:
    """Move virtual time in small steps, as a threaded manager that waits for a timer needs it, until the answer."""
    end = time.monotonic() + PATIENCE_S
    while not future.done():
        assert time.monotonic() < end, "no answer, however much virtual time passes"
        world.clock.advance(step_s)
        wait([future], timeout=0.001)
    return future.result()


class Gate:
    """A hook for `SimulatedWorld.on_io` that stops the caller of one operation until it is opened."""

    def __init__(self, world: SimulatedWorld, op: str = "", phase: str = "before") -> None:
        self._op, self._phase = op, phase
        self.reached = threading.Event()
        """Somebody stands at the gate."""
        self._open = threading.Event()
        self._world = world
        world.on_io.append(self)

    def __call__(self, op: str, phase: str) -> None:
        if phase == self._phase and (not self._op or op == self._op) and not self._open.is_set():
            self.reached.set()
            assert self._open.wait(PATIENCE_S), "the gate was never opened"

    def open(self) -> None:
        """Let everybody pass from now on."""
        self._open.set()

    def wait(self) -> None:
        """Wait until somebody stands at the gate."""
        assert self.reached.wait(PATIENCE_S), f"nobody came to {self._op or 'any call'}"


def threads_of(manager: GPUResourceManager) -> list[str]:
    """Names of the living threads that a manager has started."""
    return [thread.name for thread in manager._driver._threads if thread.is_alive()]


def until(holds: Callable[[], object]) -> None:
    """Wait until `holds()`, for what tells nobody when it happens."""
    end, never = time.monotonic() + PATIENCE_S, threading.Event()
    while not holds():
        assert time.monotonic() < end, "it never came about"
        never.wait(0.001)


def journal_is_whole(manager: GPUResourceManager) -> None:
    """No number is missing, every record is a row of the table, and each begins where the one before it ended."""
    from gpu_fsm.states import TABLE, State

    table = {row.name: row for row in TABLE}
    state = State.IDLE
    for n, record in enumerate(manager.journal, start=1):
        row = table[record.row]
        assert record.n == n
        assert record.source is state
        assert record.trigger == row.trigger
        assert record.source in row.sources
        assert record.dest is (row.dest or record.source)
        state = record.dest


def run_python(code: str, *, env: dict[str, str] | None = None, options: tuple[str, ...] = ()) -> str:
    """Run `code` in a new interpreter; returns what it printed.  It must end with 0 and say nothing on stderr."""
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT), **(env or {})}
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", done.stderr
    return done.stdout
