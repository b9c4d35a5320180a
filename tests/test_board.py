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
from gpu_fsm.agent import ExecutionLoop, FusionEngine, Screen, Stopper, UIDetector
from gpu_fsm.appconfig import AgentConfig, AppConfig
from gpu_fsm.cli import running
from gpu_fsm.cli.board import Board
from gpu_fsm.errors import BadArgument
from gpu_fsm.events import StateChanged
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.testing.stateful import inline_manager
from tests.waiting import in_thread, until

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
    assert lines[0] == "vlm: pulling 1234: 0 s (0 % of 100 MiB)"
    assert lines[3] == "vlm: pulling 1234: 0 s (30 % of 100 MiB; about 0 s left)"
    assert lines[10] == "vlm: pulling 1234: 0 s (100 % of 100 MiB)"
    assert lines[11:] == ["vlm: success", "done"]


class Pipe(io.StringIO):
    """A pipe that knows when it was flushed."""

    def __init__(self) -> None:
        super().__init__()
        self.read = ""

    def flush(self) -> None:
        self.read = self.getvalue()


def test_whoever_reads_a_pipe_learns_of_a_long_wait_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time and what is known of the rest, again and again but ever more seldom; nothing once it is over."""
    monkeypatch.setattr("sys.stdout", pipe := Pipe())
    with Board(pulse_s=0.01) as board:
        board.wait_for("loading the VLM", limit_s=360.0)
        until(lambda: pipe.read.count("loading the VLM: 0 s (at most 360 s)\n") == 2)
        logging.getLogger("gpu_fsm").info("CLIP's weights: 30 % of 350 MiB fetched")
        assert "(at most 360 s; CLIP's weights: 30 % of 350 MiB fetched)\n" in pipe.read
        board.wait_for("")
        assert board._pulse is None


def test_a_warning_goes_to_stderr_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Once, with our name in front; what is piped on is the results."""
    with Board():
        logging.getLogger("gpu_fsm").warning("gpu_fsm: something is odd")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "gpu_fsm: something is odd\n")


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
        assert board.waiting() == "vlm: pulling 1234: 0 s (50 % of 100 MiB; about 0 s left)"
    assert "vlm: pulling 1234" in shown(console)
    assert "0:00:00" in shown(console), "the time it has taken"
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


def test_settings_that_are_read_again_reach_an_agent_at_work() -> None:
    """What it looks at, waits for, keeps and judges by holds from the next screen on."""
    live = {"interval_s": 9.0, "largest_side_px": 64, "vlm_timeout_s": 5.0, "cache_size": 2, "text_weight": 0.5}
    with inline_manager(SimulatedWorld()) as manager:
        config = AppConfig(gpu=manager.config)
        newer = AppConfig(gpu=manager.config, agent=AgentConfig(**live))
        program = running._Program(config, Board(), Stopper(), lambda: newer)
        loop = program._made(manager, FusionEngine())
        assert program._read_again() == {f"agent.{name}": value for name, value in live.items()}
    detector = loop._detector
    assert (detector.largest_side, detector.timeout_s, detector.cache_size) == (64, 5.0, 2)
    assert (loop.memory.weights.text, program._agent.interval_s) == (0.5, 9.0)


def test_settings_that_do_not_fit_the_model_change_nothing() -> None:
    """`accept` alone is sound, and below the model's own `unsure`: what was changed with it stays as it was, too."""
    with inline_manager(SimulatedWorld()) as manager:
        config = AppConfig(gpu=manager.config)
        newer = AppConfig(gpu=manager.config, agent=AgentConfig(accept=0.5, interval_s=9.0))
        program = running._Program(config, Board(), Stopper(), lambda: newer)
        program._made(manager, FusionEngine())
        with pytest.raises(BadArgument, match="unsure"):
            program._read_again()
    assert program._interval_s() == config.agent.interval_s


def test_the_live_screen_asks_for_its_pause_and_so_lets_a_pause_begin() -> None:
    """Where nothing moves no screen comes before which the agent could look."""
    world = SimulatedWorld()
    with inline_manager(world) as manager:
        program = running._Program(AppConfig(gpu=manager.config), Board(), Stopper(), AppConfig)
        program._loop = loop = program._made(manager, FusionEngine())
        manager.ensure_vlm_loaded()
        assert world.vlm_held_mib()
        loop.follow(ExecutionMode.IDLE)
        ask = in_thread(program._interval_s)
        until(lambda: not world.vlm_held_mib())
        assert not ask.done()
        loop.follow(ExecutionMode.AUTOPILOT)
        assert ask.result(10.0) == 1.0


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
