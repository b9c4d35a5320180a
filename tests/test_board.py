"""What a long run shows, on a terminal and elsewhere."""

from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

from gpu_fsm.cli.board import Board

MIB = 1 << 20


def shown(console: Console) -> str:
    """What a terminal got, without its control sequences."""
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def terminal() -> Console:
    """One that writes down what it is told."""
    return Console(file=io.StringIO(), force_terminal=True, width=120, markup=False)


def test_to_a_pipe_go_lines_only(capsys: pytest.CaptureFixture[str]) -> None:
    """One for each tenth of a download, none for what is waited for, no control sequences."""
    with Board() as board:
        board.wait_for("loading the VLM", limit_s=360.0)
        for done in range(101):
            board.fetch("vlm: pulling 1234", done * MIB, 100 * MIB)
        board.fetch("vlm: success", 0, None)
        board.say("done")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "vlm: pulling 1234 0 % of 100 MiB"
    assert lines[10] == "vlm: pulling 1234 100 % of 100 MiB"
    assert lines[11:] == ["vlm: success", "done"]


def test_on_a_terminal_waiting_shows_its_time_and_what_is_known_of_the_rest() -> None:
    """How long already, how long the last time, how long at most; what the package logs; nothing afterwards."""
    with Board(console=(console := terminal())) as board:
        board.wait_for("loading the VLM", limit_s=360.0)
        assert board.waiting() == "loading the VLM: 0 s (at most 360 s)"
        board.wait_for("")
        assert board.waiting() == ""
        board.wait_for("loading the VLM", limit_s=360.0)
        assert board.waiting() == "loading the VLM: 0 s (last time 0 s; at most 360 s)"
        logging.getLogger("gpu_fsm").info("CLIP's weights: 30 % of 350 MiB fetched")
        assert "30 % of 350 MiB" in board.waiting()
        board.say("a line above it")
    assert "a line above it" in shown(console)
    assert not logging.getLogger("gpu_fsm").handlers


def test_on_a_terminal_a_download_has_a_bar() -> None:
    """With bytes, speed and the time that is left."""
    with Board(console=(console := terminal())) as board:
        board.fetch("vlm: pulling 1234", 50 * MIB, 100 * MIB)
        assert board._live is not None
        board._live.refresh()
    assert "vlm: pulling 1234" in shown(console)
    assert re.search(r"52\.4/104\.9 MB", shown(console))
