"""Trying mutants: tests are collected once, and each mutant has a fork of that process.

In the fork the code of one function is exchanged, and the tests run that reach the changed lines, those first that have
noticed most so far, until one fails.  A mutant outside functions (a row of the table, a default, a decorator) cannot
be exchanged later: its fork comes from an earlier point, before anything of `gpu_fsm` is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import os
import resource
import select
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from tests.automutants.mutants import Mutant

ROOT = Path(__file__).parents[2]

LIBRARIES = (
    "_pytest.assertion.rewrite", "asyncio", "attrs", "click", "filelock", "httpx", "hypothesis", "hypothesis.stateful",
    "numpy", "platformdirs", "pynvml", "requests", "rich.console", "rich.table", "transitions", "typed_settings",
    "urllib3",
)  # fmt: skip
"""Imported once, before the forks; whichever is missing is not needed either."""

SLOWEST_CPU_S = 0.3
"""A test that takes longer is left out: every survivor would pay for it."""
PATIENCE_S = 5.0
PATIENCE = 4.0
"""So long, or so many times its usual time, may a test take before the mutant counts as one that finds no end."""
MEMORY = 4 << 30
"""Bytes of address space: some mutants fill lists for ever."""


@frozen
class Known:
    """What a test is like without any mutant."""

    name: str
    cpu_s: float
    wall_s: float
    lines: dict[str, list[int]]
    """Module -> the lines that it reaches."""


@frozen
class Verdict:
    """What became of a mutant."""

    word: str
    """`killed`, `endless` (killed too: a test found no end), `survived`, or `impossible` to try in this way."""
    killer: str = ""
    ran: int = 0
    """So many tests."""


def preload() -> None:
    """Import what does not change from mutant to mutant."""
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def arguments(files: Sequence[str]) -> list[str]:
    """For pytest."""
    return [
        *files, "-q", "-s", "-p", "no:cacheprovider", "--hypothesis-profile=mutants", "-m", "not needs_torch",
        "-W", "ignore::pytest.PytestAssertRewriteWarning",  # the libraries are imported already
    ]  # fmt: skip


def register_profile() -> None:
    """Few examples, always the same, and no shrinking."""
    from hypothesis import HealthCheck, Phase, settings

    settings.register_profile(
        "mutants",
        deadline=None,
        derandomize=True,
        database=None,
        max_examples=3,
        report_multiple_bugs=False,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


# --- in a fork ---


class _Report:
    """Lines of JSON to the process that watches."""

    def __init__(self, to: int) -> None:
        self.to = to

    def __call__(self, **what: Any) -> None:
        os.write(self.to, (json.dumps(what) + "\n").encode())


class _Failures:
    """Remembers whether the test that runs has failed."""

    failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.failed = self.failed or report.failed


def _run_items(items: Sequence[pytest.Item], failures: _Failures, known: dict[str, Known], report: _Report) -> None:
    """Until one fails."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        usual = known[item.nodeid].wall_s if item.nodeid in known else 1.0
        report(start=item.nodeid, limit_s=PATIENCE_S + PATIENCE * usual)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if failures.failed:
            report(failed=item.nodeid)
            return
    report(passed=len(items))


class NoTable(Exception):
    """The mutated file makes no table of rows: nothing could be imported."""


def _exchange(mutant: Mutant) -> bool:
    """Give a function of the running interpreter other code, or everybody another table; False where it has no such."""
    module = importlib.import_module(f"gpu_fsm.{mutant.module}")
    if mutant.is_row:
        scratch = types.ModuleType(module.__name__)
        try:
            exec(compile(mutant.source, str(module.__file__), "exec", dont_inherit=True), vars(scratch))
            new_by_name = {row.name: row for row in scratch.TABLE}
        except Exception as error:
            raise NoTable from error
        table, new = module.TABLE, scratch.TABLE
        by_name = {row.name: row for row in table}
        ours = [one for one in list(sys.modules.values()) if str(getattr(one, "__file__", "")).startswith(str(ROOT))]
        for holder in ours:
            for name, value in list(vars(holder).items()):
                if value is table:
                    setattr(holder, name, new)
                elif isinstance(value, dict) and value == by_name:
                    setattr(holder, name, new_by_name)
        return True
    found: Any = module
    for step in mutant.function.split("."):
        found = vars(found).get(step)
        if found is None:
            return False
    found = found.fget if isinstance(found, property) else found
    found = getattr(found, "__func__", found)
    function = inspect.unwrap(found)
    code: types.CodeType | None = compile(mutant.source, str(module.__file__), "exec", dont_inherit=True)
    for step in mutant.function.split("."):
        inner = code.co_consts if code is not None else ()
        code = next((c for c in inner if isinstance(c, types.CodeType) and c.co_name == step), None)
    if code is None or code.co_freevars != function.__code__.co_freevars:
        return False
    function.__code__ = code
    return True


class _Mutated(importlib.abc.MetaPathFinder):
    """Gives one module another source."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.name = f"gpu_fsm.{mutant.module}"

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        mutant = self.mutant

        class Loader(importlib.machinery.SourceFileLoader):
            source = mutant.source

            def get_code(self, fullname: str) -> types.CodeType:
                return compile(mutant.source, self.path, "exec", dont_inherit=True)

        place = str(ROOT / "gpu_fsm" / f"{mutant.module}.py")
        return importlib.util.spec_from_file_location(name, place, loader=Loader(name, place))


def _source_of(module: str) -> str | None:
    """What a module was made of, if it was by us."""
    return getattr(sys.modules[f"gpu_fsm.{module}"].__loader__, "source", None)


def _silence() -> None:
    """Tests print into nothing."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)


@contextlib.contextmanager
def _fork(work: Callable[[_Report], None]) -> Iterator[Iterator[dict[str, Any] | None]]:
    """`work` in a child; yields what it reports, None when a test takes too long.  The child is gone afterwards."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            os.close(reading)
            _silence()
            work(_Report(writing))
        finally:
            os._exit(0)
    os.close(writing)
    try:
        yield _listen(reading)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)  # with what it has started itself
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _listen(reading: int) -> Iterator[dict[str, Any] | None]:
    rest, until = b"", time.monotonic() + 120.0
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            yield None
            return
        piece = os.read(reading, 1 << 16)
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "limit_s" in message:
                until = time.monotonic() + message["limit_s"]
            yield message


def _judge(messages: Iterator[dict[str, Any] | None], already: int = 0, unborn: str = "killed") -> Verdict:
    running, ran = "", already
    for message in messages:
        if message is None:
            return Verdict("endless", running or "import", ran)
        if "start" in message:
            running, ran = message["start"], ran + 1
        elif "failed" in message:
            return Verdict("killed", message["failed"], ran)
        elif "passed" in message:
            return Verdict("survived", "", ran)
        elif "impossible" in message:
            return Verdict("impossible")
    # The process itself died; if before any test, by what cannot even be imported.
    return Verdict("killed" if running else unborn, running or "import", ran)


# --- the two ways ---


class Order:
    """Which tests first: those that have noticed most for their time, in the same function above all; then as given."""

    def __init__(self, known: dict[str, Known], seconds: float) -> None:
        self.known = known
        self.seconds = seconds
        """For one mutant, by what the tests take without it."""
        self.kills: dict[tuple[str, str], int] = {}
        self.last: dict[str, str] = {}
        """Key of a mutant -> who killed it in an earlier run."""

    def note(self, mutant: Mutant, killer: str) -> None:
        """Somebody has noticed."""
        for place in (f"{mutant.module}:{mutant.function}", mutant.module):
            self.kills[place, killer] = self.kills.get((place, killer), 0) + 1

    def of(self, mutant: Mutant, names: Sequence[str]) -> list[str]:
        """The tests that reach the mutant, in the order in which to try them."""
        first = self.last.get(mutant.key)

        def rank(name: str) -> tuple[bool, float]:
            near = self.kills.get((f"{mutant.module}:{mutant.function}", name), 0)
            far = self.kills.get((mutant.module, name), 0)
            return (name != first, -(5 * near + far) / (self.known[name].cpu_s + 0.02))

        reaching = [name for name in names if name in self.known and self._reaches(self.known[name], mutant)]
        chosen, left = [], self.seconds
        for name in sorted(reaching, key=rank):
            left -= self.known[name].cpu_s
            if left < 0:
                break
            chosen.append(name)
        return chosen

    @staticmethod
    def _reaches(test: Known, mutant: Mutant) -> bool:
        return mutant.is_row or not mutant.in_place or not {*test.lines.get(mutant.module, ())}.isdisjoint(mutant.lines)


class _Collected:
    """A pytest plugin: instead of running the collected tests, do something with them."""

    def __init__(self, work: Callable[[list[pytest.Item], _Failures], None]) -> None:
        self.work = work
        self.failures = _Failures()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        session.config.pluginmanager.register(self.failures)
        self.work(session.items, self.failures)
        return True


def _pytest(files: Sequence[str], work: Callable[[list[pytest.Item], _Failures], None]) -> None:
    register_profile()
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):  # it belongs to the report
        pytest.main(arguments(files), plugins=[_Collected(work)])


def learn(
    files: Sequence[str], modules: Sequence[str], slow: set[str], done: Callable[[str, list[Known], list[str]], None]
) -> None:
    """Run each file without a mutant; `done` gets the file, what its tests are like, and which failed, if any.

    `slow` names tests that need not be measured again.
    """
    for file in files:
        learnt: list[Known] = []
        failing: list[str] = []

        def work(report: _Report, file: str = file) -> None:
            _pytest(
                [file],
                lambda items, failures: _measure(
                    [item for item in items if item.nodeid not in slow], failures, modules, report
                ),
            )

        with _fork(work) as messages:
            for message in messages:
                if message is None:
                    failing.append(file)
                elif "known" in message:
                    learnt.append(Known(**message["known"]))
                elif "failed" in message:
                    failing.append(message["failed"])
        done(file, learnt, failing)


def _measure(items: list[pytest.Item], failures: _Failures, modules: Sequence[str], report: _Report) -> None:
    files = {str(ROOT / "gpu_fsm" / f"{name}.py"): name for name in modules}
    reached: dict[str, set[int]] = {}

    def enter(frame: types.FrameType, event: str, arg: Any) -> Any:
        name = files.get(frame.f_code.co_filename)
        if name is None:
            return None
        lines = reached.setdefault(name, set())
        lines.add(frame.f_code.co_firstlineno)

        def step(frame: types.FrameType, event: str, arg: Any) -> Any:
            lines.add(frame.f_lineno)
            return step

        lines.add(frame.f_lineno)
        return step

    for item, following in zip(items, [*items[1:], None], strict=True):
        reached = {}
        cpu, wall = time.process_time(), time.monotonic()
        report(start=item.nodeid, limit_s=600.0)
        threading.settrace(enter)
        sys.settrace(enter)
        try:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
        if failures.failed:
            report(failed=item.nodeid)
            failures.failed = False
            continue
        report(
            known={
                "name": item.nodeid,
                "cpu_s": round(time.process_time() - cpu, 3),
                "wall_s": round(time.monotonic() - wall, 3),
                "lines": {name: sorted(lines) for name, lines in reached.items()},
            }
        )


def try_in_place(
    mutants: Sequence[Mutant], files: Sequence[str], order: Order, done: Callable[[Mutant, Verdict], bool]
) -> None:
    """Collect once, then a fork for each mutant; `done` answers whether to go on.  Returns in the same process."""

    def work(items: list[pytest.Item], failures: _Failures) -> None:
        named = {item.nodeid: item for item in items}
        for mutant in mutants:
            chosen = [named[name] for name in order.of(mutant, list(named))]

            def run(report: _Report, mutant: Mutant = mutant, chosen: list[pytest.Item] = chosen) -> None:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                try:
                    if not _exchange(mutant):
                        report(impossible=True)
                        return
                except NoTable:
                    report(failed="import")
                    return
                _run_items(chosen, failures, order.known, report)

            verdict = Verdict("survived")
            if chosen:
                with _fork(run) as messages:
                    verdict = _judge(messages, unborn="impossible")
            if not done(mutant, verdict):
                return

    _pytest(files, work)


def try_imported(
    mutants: Sequence[Mutant], stages: Sequence[Sequence[str]], order: Order, done: Callable[[Mutant, Verdict], bool]
) -> None:
    """Everything of ours imported anew for each mutant; what survives the first stage's tests goes to the next."""
    for mutant in mutants:
        verdict = Verdict("survived")
        last = order.last.get(mutant.key, "").partition("::")[0]
        for files in sorted(stages, key=lambda stage: not any(last and file.startswith(last) for file in stage)):

            def run(report: _Report, mutant: Mutant = mutant, files: Sequence[str] = files) -> None:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                sys.meta_path.insert(0, _Mutated(mutant))
                importlib.import_module(f"gpu_fsm.{mutant.module}")  # now: pytest's own loader is for plugins' packages
                if mutant.source != _source_of(mutant.module):
                    report(impossible=True)
                    return

                def work(items: list[pytest.Item], failures: _Failures) -> None:
                    named = {item.nodeid: item for item in items}
                    chosen = [named[name] for name in order.of(mutant, list(named))]
                    _run_items(chosen, failures, order.known, report)

                _pytest(files, work)

            with _fork(run) as messages:
                verdict = _judge(messages, verdict.ran)
            tried = sum(test.cpu_s for name, test in order.known.items() if name.startswith(tuple(stages[0])))
            if verdict.word != "survived" or tried > order.seconds / 2:
                break
        if not done(mutant, verdict):
            return
