"""What a long run shows, on a terminal and elsewhere."""

from __future__ import annotations

import io
import logging
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from gpu_fsm import ExecutionMode, GPUResourceConfig, State
from gpu_fsm.agent import ExecutionLoop, FusionEngine, Screen, UIDetector
from gpu_fsm.cli import running
from gpu_fsm.cli.board import Board
from gpu_fsm.errors import BadArgument
from gpu_fsm.events import StateChanged
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.testing.stateful import inline_manager

MIB = 1 << 20


def red_png() -> bytes:
    """A picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


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


def test_what_happens_is_heard_also_where_nobody_reads_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """`gpu-fsm run | head -1`: the run ends at its own next line, and no listener's traceback comes before."""
    reader, writer = os.pipe()
    os.close(reader)
    states: list[State] = []
    with os.fdopen(writer, "wb", buffering=0) as nobody:
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(nobody, write_through=True))
        with Board() as board:
            event = StateChanged(at=0.0, old=State.IDLE, new=State.LOADING, trigger="request")
            running._hear(event, board, states, GPUResourceConfig())
            assert states == [State.LOADING]
            assert "loading qwen2.5vl:7b" in board.waiting()
            with pytest.raises(BrokenPipeError):
                board.say("the agent's own")


def test_two_runs_do_not_write_one_screen_memory(tmp_path: Path) -> None:
    """Each would put what it knows in the place of what the other recorded; others and later ones are let in."""
    memory = tmp_path / "screens.npz"
    (tmp_path / "link.npz").symlink_to(memory)
    with running._alone_with(memory), running._alone_with(tmp_path / "others.npz"), running._alone_with(None):
        for same in (memory, tmp_path / "link.npz"):
            with pytest.raises(BadArgument, match="in use by another run"), running._alone_with(same):
                pass
    with running._alone_with(memory):
        assert [path.name for path in tmp_path.iterdir()] == ["link.npz"]


def test_a_memory_that_cannot_be_saved_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last writing is tried once more at the end; only then it is said to be lost, and counts as a failure."""
    with inline_manager(SimulatedWorld()) as manager:
        path = tmp_path / "gone" / "screens.npz"
        loop = ExecutionLoop(manager, UIDetector(manager), FusionEngine(), memory_path=path)
        loop.set_mode(ExecutionMode.RECORDING)
        step = loop.handle(Screen(name="one", data=red_png()))
    assert (step.result, loop.unsaved) == ("recorded", True)
    counts: Counter[str] = Counter()
    with Board() as board:
        running._save_the_rest(loop, path, board, counts)
        assert counts["unsaved"] == 1
        assert "cannot be saved: No such file" in capsys.readouterr().out
        path.parent.mkdir()
        running._save_the_rest(loop, path, board, again := Counter())
    assert not again
    assert len(FusionEngine.load(path)) == 1
