"""What every test run shares: Hypothesis profiles, skips that give their reason, skips that are failures."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import signal
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.counts import counts

# `--hypothesis-profile=thorough` chooses another one.  A slow machine is not a failed test, so no deadline.
settings.register_profile(
    "ci", deadline=None, max_examples=100, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("ci"), max_examples=2000, derandomize=False)
settings.register_profile("brief", parent=settings.get_profile("ci"), max_examples=20)
settings.load_profile("ci")

# Settings of the person who runs the tests must not decide how they end.
for _name in [name for name in os.environ if name.startswith("GPU_FSM_") or name == "OLLAMA_HOST"]:
    del os.environ[_name]

# Two runs on one machine have fake cards of the same UUID, and nothing of theirs belongs in the user's own folder.
_runtime = tempfile.TemporaryDirectory(prefix="gpu_fsm-tests-")
os.environ["XDG_RUNTIME_DIR"] = _runtime.name
os.environ["XDG_CONFIG_HOME"] = os.environ["XDG_CONFIG_DIRS"] = str(pathlib.Path(_runtime.name, "no-settings"))

# A suite that a shell put into the background ignores Ctrl-C, and so would every child; tests send some.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_NEEDED = ("torch", "sentence_transformers")
_PROPERTY = re.compile(r"\btest_property_(0[1-9]|1[0-3])_|\btest_(invariant|s\d+|l\d+)_", re.IGNORECASE)
_forbidden_skips: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the live tests find a real server."""
    group = parser.getgroup("live", "tests against a real Ollama (-m live)")
    group.addoption("--ollama", metavar="URL", help="the server's address")
    group.addoption("--model", metavar="NAME", help="a model that it has, small enough to load a dozen times")
    parser.addoption("--kill-seed", metavar="N", default=20, help="where test_run_kill.py kills the agent")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker beside its options, and begin to count."""
    counts(config)
    config.addinivalue_line("markers", "live: talks to the server given with --ollama; skipped without one")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs torch where torch is missing, and mark what must never be skipped."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    for item in items:
        if missing and item.get_closest_marker("needs_torch"):
            item.add_marker(pytest.mark.skip(reason=f"{' and '.join(missing)} not installed"))
        if _PROPERTY.search(item.nodeid):
            item.add_marker("must_run")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Note the skip of a test that must run: thirteen properties and the invariants are the point of the suite."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("must_run"):  # type: ignore[attr-defined]
        _forbidden_skips.append(item.nodeid)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Turn forbidden skips into a failed run."""
    if _forbidden_skips and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which skip failed the run, and print the three counts even where they are zero."""
    for nodeid in _forbidden_skips:
        terminalreporter.write_line(f"SKIP IS A FAILURE: {nodeid}", red=True)
    stats = terminalreporter.stats
    failed = len(stats.get("failed", [])) + len(stats.get("error", [])) + len(_forbidden_skips)
    passed, skipped = len(stats.get("passed", [])), len(stats.get("skipped", [])) - len(_forbidden_skips)
    terminalreporter.write_line(f"tests: {passed} passed, {failed} failed, {skipped} skipped")
