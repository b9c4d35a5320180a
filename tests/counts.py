"""What a run has counted, printed at its end beside `tests:`."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from tests.fault_rows import GROUPS, ROWS

_NAME = "counts"

SECURITY = "S"
"""The group of rows that is counted by itself."""


class Counts:
    """The plugin that keeps the lines until the end, and counts the rows of the catalogue whose tests were run."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._ended: defaultdict[str, list[str]] = defaultdict(list)
        """Row -> how each of its tests has ended."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how a row's test has ended: one that breaks while it is set up or taken down has not passed either."""
        if (report.when == "call" or not report.passed) and (row := row_of(report.nodeid)):
            self._ended[row].append("xfailed" if hasattr(report, "wasxfail") else report.outcome)

    def rows(self, groups: str) -> str:
        """How many rows of these groups hold: each of their tests that was run has passed, and one was."""
        known = [row.id for name in groups for row in GROUPS[name]]
        ended = {row: self._ended.get(row, []) for row in known}
        held = [row for row in known if "passed" in ended[row] and not {"failed", "xfailed"} & set(ended[row])]
        not_run = [row for row in known if set(ended[row]) <= {"skipped"}]
        broken = [row for row in known if row not in held and row not in not_run]
        passed = sum(outcomes.count("passed") for outcomes in ended.values())
        by_group = " ".join(f"{name}={sum(row in held for row in known if row[0] == name)}" for name in groups)
        said = f"{len(held)} of {len(known)} hold ({by_group}) in {passed} tests"
        return said + "".join(
            f"; {what}: {' '.join(rows)}" for what, rows in (("BROKEN", broken), ("not run", not_run)) if rows
        )

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """All lines."""
        faults = "".join(name for name in GROUPS if name != SECURITY)
        for what, groups in (("fault rows", faults), ("security rows", SECURITY)):
            if any(row[0] in groups for row in self._ended):
                terminalreporter.write_line(f"{what}: {self.rows(groups)}")
        for line in self.lines:
            terminalreporter.write_line(line)


_TEST = re.compile(r"([^/]+\.py)::(?:\w+::)*(\w+)(?:\[(.*)\])?$", re.DOTALL)
_ID = re.compile(r"(?:^|-)([A-Z]\d\d)(?=-|$)")


def row_of(nodeid: str) -> str:
    """The row that a test proves: its id stands in the test's, or the row names the test; empty where there is none."""
    test = _TEST.search(nodeid)
    if test is None:
        return ""
    file, function, parameters = test.groups()
    ids = _ID.findall(parameters or "")
    return next(
        (row.id for row in ROWS.values() if row.where == file and (row.id in ids or function in row.tests)),
        "",
    )


def counts(config: pytest.Config) -> Counts:
    """The plugin of this run."""
    plugin = config.pluginmanager.get_plugin(_NAME)
    if plugin is None:
        plugin = Counts()
        config.pluginmanager.register(plugin, _NAME)
    return plugin


def say(config: pytest.Config, line: str) -> None:
    """Have `line` printed at the end of the run, whether the tests pass or not."""
    counts(config).lines.append(line)
