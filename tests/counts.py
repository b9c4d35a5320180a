"""What a run has counted, printed at its end beside `tests:`."""

from __future__ import annotations

import pytest

_NAME = "counts"


class _Counts:
    """The plugin that keeps the lines until the end."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self.lines:
            terminalreporter.write_line(line)


def say(config: pytest.Config, line: str) -> None:
    """Have `line` printed at the end of the run, whether the tests pass or not."""
    counts = config.pluginmanager.get_plugin(_NAME)
    if counts is None:
        counts = _Counts()
        config.pluginmanager.register(counts, _NAME)
    counts.lines.append(line)
