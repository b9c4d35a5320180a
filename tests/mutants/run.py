"""Run tests in a mutated copy of the tree: a fork of this process each, in which the heavy libraries are loaded."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

ROOT = Path(__file__).parents[2]
EACH_S = 60
"""For one test; one that finds no end has noticed something too: a broken guard can make the machine spin."""
CPU_S = 300
"""For one mutant; many tests without an end."""
WALL_S = 1200
EVERY_FILE = 10**6
"""Never enough: run everything."""

LIGHT = ("hypothesis.stateful", "requests", "transitions", "typed_settings", "numpy", "PIL.Image", "httpx")
HEAVY = ("torch", "sentence_transformers")


@frozen
class Job:
    """Tests to be run against one patch."""

    name: str
    patch: Path | None
    files: tuple[str, ...]
    only: str
    """A pattern for the tests' names; empty for all."""
    torch: bool
    examples: int
    """Of Hypothesis, for each test that leaves it open."""
    enough_files: int
    """Stop when tests of so many files have failed."""


@frozen
class Ran:
    """What came of a job; `trouble` where that cannot be told."""

    name: str
    failed: tuple[str, ...] = ()
    tests: int = 0
    trouble: str = ""
    cpu_s: float = 0.0


def run_all(jobs: Sequence[Job], at_a_time: int, done: Callable[[Ran], None] = lambda ran: None) -> list[Ran]:
    """Run jobs, `at_a_time` of them at once; those that need torch come last, when it is loaded."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what runs is cleared away then, too
    found = []
    for heavy in (False, True):
        chosen = [job for job in jobs if job.torch is heavy]
        if chosen:
            for name in (*LIGHT, *(HEAVY if heavy else ())):
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
        for ran in _run(chosen, at_a_time):
            done(ran)
            found.append(ran)
    return found


def _run(jobs: Sequence[Job], at_a_time: int) -> Iterator[Ran]:
    waiting, running = deque(jobs), dict[int, tuple[Job, Path, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                job, place = waiting.popleft(), Path(tempfile.mkdtemp(prefix="mutant-"))
                trouble = _prepare(job, place / "tree")
                if trouble:
                    shutil.rmtree(place)
                    yield Ran(job.name, trouble=trouble)
                else:
                    running[_fork(job, place)] = (job, place, time.monotonic())
            for child, (job, place, since) in [*running.items()]:
                ended, status, used = os.wait4(child, os.WNOHANG)
                if ended:
                    del running[child]
                    yield _read(job, place, status, used.ru_utime + used.ru_stime)
                    _clear(child, place)
                elif time.monotonic() - since > WALL_S:
                    os.killpg(child, signal.SIGKILL)
            time.sleep(0.1)
    finally:
        for child, (_, place, _) in running.items():
            _clear(child, place)


def _clear(child: int, place: Path) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # with whatever its tests have left running
    shutil.rmtree(place, ignore_errors=True)


def _prepare(job: Job, tree: Path) -> str:
    """Copy what the tests need of the tree, and apply the patch.  Returns what went wrong."""
    tree.mkdir()
    for name in ("gpu_fsm", "tests", "diagrams"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "mutants", ".*"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    if job.patch is None:
        return ""
    # Outside any repository, or git would look for the files there.
    apart = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    command = ["git", "apply", "--whitespace=nowarn", str(job.patch)]
    applied = subprocess.run(command, cwd=tree, env=apart, capture_output=True, text=True, check=False)
    return f"does not apply: {applied.stderr.strip().splitlines()[0]}" if applied.returncode else ""


def _read(job: Job, place: Path, status: int, cpu_s: float) -> Ran:
    try:
        told = json.loads((place / "told.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = {"failed": [], "tests": 0, "code": None}
    failed, tests, code = tuple(told["failed"]), told["tests"], told["code"]
    trouble = ""
    if not failed and code not in (0, 1):
        output = (place / "output.txt").read_text(encoding="utf-8", errors="replace").strip()
        trouble = f"pytest broke ({code or status}): {output[-300:]}"
    return Ran(job.name, failed, tests, trouble, round(cpu_s, 1))


# --- in the child ---


class _Judge:
    """A plugin of pytest: a bound for each test, and an early end."""

    def __init__(self, job: Job, told: Path) -> None:
        self._job, self._told = job, told
        self.failed: list[str] = []
        self.tests = 0
        self._session: pytest.Session | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> None:
        """Settle how Hypothesis searches: after the conftest, and before the tests are read."""
        from hypothesis import HealthCheck, Phase, settings

        self._session = session
        settings.register_profile(
            "brief", deadline=None, derandomize=True, database=None, max_examples=self._job.examples,
            report_multiple_bugs=False, phases=[Phase.explicit, Phase.generate], suppress_health_check=[*HealthCheck],
        )  # fmt: skip
        settings.load_profile("brief")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep the tests that are asked for by name."""
        if self._job.only:
            items[:] = [item for item in items if re.search(self._job.only, item.name)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Pass over the rest of a file that has noticed already, where another one is still to be heard."""
        if self._job.enough_files < EVERY_FILE and item.nodeid.partition("::")[0] in self._files():
            pytest.skip("this file has noticed")

    def _files(self) -> set[str]:
        return {name.partition("::")[0] for name in self.failed}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        """Ring again and again: the replay of an endless example has no end either."""
        signal.signal(signal.SIGALRM, _ring)
        signal.setitimer(signal.ITIMER_REAL, EACH_S, 5)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note who failed, and end when that is enough."""
        self.tests += report.when == "call"
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)
            self.write(None)
            if len(self._files()) >= self._job.enough_files and self._session:
                self._session.shouldstop = "enough"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot even be read has noticed something, too."""
        if report.failed:
            self.failed.append(f"{report.nodeid}::(collection)")

    def write(self, code: int | None) -> None:
        """Tell the parent, also in the middle: the end may not be reached."""
        told = {"failed": self.failed, "tests": self.tests, "code": code}
        self._told.write_text(json.dumps(told), encoding="utf-8")


def _ring(*_: Any) -> None:
    pytest.fail(f"no end within {EACH_S} s")


def _fork(job: Job, place: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        _child(job, place)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(3)


def _child(job: Job, place: Path) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
    tree = place / "tree"
    with (place / "output.txt").open("wb") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    # Nothing of the tree that this process was started in.
    os.chdir(tree)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("gpu_fsm", "tests")]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(entry for entry in sys.path if entry and Path(entry).resolve() != ROOT)]
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    judge = _Judge(job, place / "told.json")
    which = "core" if job.torch else "core and not needs_torch"
    options = ["-q", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider", "-m", which]
    options += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]  # on purpose
    code = pytest.main([*job.files, *options, f"--basetemp={place / 'tmp'}"], plugins=[judge])
    judge.write(int(code))
    os._exit(0)
