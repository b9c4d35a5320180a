"""`gpu-fsm` in processes that start at once: torch is imported before the fork, not after it.

with Forker() as forker:
    run = forker.start(["run", "--screens", "shots"], out, die=("write", 3, 0.5))
    run.wait(); run.kill()
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0


class Run:
    """One forked command."""

    def __init__(self, pid: int, out: Path) -> None:
        self.pid = pid
        self.out = out
        self.ended = threading.Event()
        self.code: int | None = None
        """The exit code, negative for a signal."""

    def kill(self) -> None:
        """SIGKILL, if it still lives."""
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end; returns the exit code."""
        if not self.ended.wait(PATIENCE_S):
            self.kill()
            raise AssertionError(f"it did not end: {self.out.read_text(encoding='utf-8')}")
        assert self.code is not None
        return self.code


class Forker:
    """The parent's side."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.tools.forker"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._runs: dict[int, Run] = {}
        self._started: list[Run] = []
        self._turn = threading.Condition()
        self._out = Path()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(self, argv: list[str], out: Path, *, die: tuple[str, int, float] | None = None) -> Run:
        """Run `gpu-fsm ARGV...`, its output in `out`; with `die` it kills itself at that point, see `arm`."""
        assert self._process.stdin is not None
        with self._turn:
            self._out = out
            count = len(self._started)
            self._process.stdin.write(json.dumps({"argv": argv, "out": str(out), "die": die}) + "\n")
            assert self._turn.wait_for(lambda: len(self._started) > count, PATIENCE_S), "the forker does not answer"
            return self._started[-1]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, pid, code = json.loads(line)
            with self._turn:
                if word == "began":
                    self._runs[pid] = Run(pid, self._out)
                    self._started.append(self._runs[pid])
                    self._turn.notify_all()
                else:
                    run = self._runs.pop(pid)
                    run.code = code
                    run.ended.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for run in tuple(self._runs.values()):
            run.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()


def arm(where: str, nth: int, share: float) -> None:
    """Have this process die by SIGKILL at a point.

    `encode`: in the middle of the forward pass, at the nth layer that has run since the start.  `write`: at the nth
    `fsync`; of a file, with only `share` of it on the disk.
    """
    counted = 0

    def count(*_: object) -> None:
        nonlocal counted
        counted += 1
        if counted == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    if where == "encode":
        from torch.nn.modules.module import register_module_forward_hook

        register_module_forward_hook(count)
    elif where == "write":
        real = os.fsync

        def fsync(handle: int) -> None:
            with contextlib.suppress(OSError):  # a folder has no length
                if counted == nth - 1:
                    os.ftruncate(handle, int(os.fstat(handle).st_size * share))
            count()
            real(handle)

        os.fsync = fsync


def _child(order: dict[str, Any]) -> None:
    from gpu_fsm.cli import main

    null, out = os.open(os.devnull, os.O_RDONLY), os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for source, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    if order["die"]:
        arm(*order["die"])
    code = 1
    try:
        code = main(order["argv"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by returning: the parent's pipes and exit handlers are not ours.  What is open is the manager's business.
        os._exit(code)


def main() -> None:
    """The forker's own process: orders come in, `began` and `ended` go out."""
    import sentence_transformers  # noqa: F401
    import transformers.models.clip.modeling_clip  # noqa: F401

    import gpu_fsm.cli.running
    import gpu_fsm.clip
    import gpu_fsm.control
    import gpu_fsm.ollama
    import gpu_fsm.vram  # noqa: F401

    warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside OpenBLAS's idle threads
    lock = threading.Lock()

    def say(*words: object) -> None:
        with lock:
            sys.stdout.write(json.dumps(words) + "\n")
            sys.stdout.flush()

    pids: set[int] = set()
    for line in sys.stdin:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _child(json.loads(line))
        pids.add(pid)
        say("began", pid, None)
        _, status = os.waitpid(pid, 0)
        say("ended", pid, os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
