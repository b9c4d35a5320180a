"""The control socket: who may use it, what it answers while the machine is busy, what it does with bad input."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_fsm import ExecutionMode, GPUResourceManager, State
from gpu_fsm.cli import ExitCode, main
from gpu_fsm.control import LINE_BYTES, ControlClient, ControlRefused, ControlServer, NothingRuns
from gpu_fsm.errors import BadArgument
from gpu_fsm.simulation import SimulatedWorld
from tests.waiting import Gate, in_thread, let_time_pass, until
from tests.worlds import threaded

pytestmark = pytest.mark.core

ROOT = Path(__file__).resolve().parents[1]


class Bench:
    """A threaded manager in a simulated world, served."""

    def __init__(self) -> None:
        self.world = SimulatedWorld()
        self.manager: GPUResourceManager = threaded(self.world)
        self.followed: list[ExecutionMode] = []
        self.server = ControlServer(self.manager, on_mode=self.followed.append)


@pytest.fixture(autouse=True)
def _own_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else's sockets, and a path that is short enough for one."""
    folder = Path(os.environ["XDG_RUNTIME_DIR"]) / f"t{time.monotonic_ns()}"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setattr("gpu_fsm.cardlock._candidates", lambda: iter([folder / "gpu_fsm"]))


@pytest.fixture
def bench() -> Iterator[Bench]:
    """One for each test."""
    bench = Bench()
    yield bench
    bench.server.close()
    bench.manager.close()


@contextlib.contextmanager
def loading(bench: Bench) -> Iterator[Gate]:
    """A load that does not go on before the gate is opened."""
    gate = Gate(bench.world, "ollama.load", "during")
    asking = in_thread(bench.manager.set_execution_mode, ExecutionMode.RECORDING)
    gate.wait()
    yield gate
    assert not asking.done()
    gate.open()
    assert let_time_pass(bench.world, asking).granted


def raw(bench: Bench, *lines: bytes) -> list[dict[str, Any]]:
    """Send lines as they are and read until the server hangs up or has answered each."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(10.0)
        client.connect(str(bench.server.path))
        with client.makefile("rb") as reader:
            said = [json.loads(reader.readline())]
            for line in lines:
                with contextlib.suppress(BrokenPipeError):
                    client.sendall(line)
                answer = b""
                with contextlib.suppress(ConnectionResetError):  # it has hung up on what it did not read
                    answer = reader.readline()
                if not answer:
                    break
                said.append(json.loads(answer))
            return said


def test_twenty_clients_get_the_status_in_the_middle_of_a_load(bench: Bench) -> None:
    """The load stands still until all have their answers, so none can have waited for it."""
    with loading(bench):

        def look() -> list[str]:
            with ControlClient() as client:
                return [client.ask("status")["state"] for _ in range(10)]

        begun = time.monotonic()
        answers = [in_thread(look) for _ in range(20)]
        states = {state for answer in answers for state in answer.result(20.0)}
        assert states == {"loading"}
        assert time.monotonic() - begun < 10.0


def test_status_from_another_process_comes_in_the_middle_of_a_load(bench: Bench) -> None:
    """`gpu-fsm status --json` is complete and does not wait."""
    with loading(bench):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "gpu_fsm", "status", "--json", "--socket", str(bench.server.path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        status = json.loads(done.stdout)
        assert (status["state"], status["asked_mode"], status["vlm_state"]) == ("loading", "recording", "loading")
        assert set(status) == {*bench.manager.get_status().to_dict(), "doing"}


@contextlib.contextmanager
def starting(bench: Bench) -> Iterator[ControlServer]:
    """The same manager, served by a program that is not ready yet."""
    bench.server.close()
    with ControlServer(
        bench.manager, on_mode=bench.followed.append, doing=lambda: "loading CLIP: 3 s", starting=True
    ) as server:
        yield server


def test_a_program_that_starts_is_looked_at_and_asked_for_nothing_yet(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it is doing is said at once; a change is waited for, as long as the asker likes; the world is untouched."""
    with starting(bench) as server:
        assert main(["status"]) == ExitCode.FINE
        assert "doing      loading CLIP: 3 s\n" in capsys.readouterr().out
        assert main(["explain", "recording"]) == main(["events"]) == ExitCode.FINE
        for command in (["mode", "autopilot"], ["vlm", "load"], ["vlm", "unload"]):
            assert main([*command, "--timeout-s", "0.02"]) == ExitCode.REFUSED
            assert "still starting: loading CLIP: 3 s" in capsys.readouterr().err
        assert bench.followed == [ExecutionMode.AUTOPILOT], "the program may begin with it"
        asking = in_thread(main, ["mode", "recording"])
        until(lambda: len(bench.followed) == 2)
        assert bench.manager.get_status().asked_mode is ExecutionMode.IDLE
        server.started()
        assert let_time_pass(bench.world, asking) == ExitCode.FINE
        assert bench.manager.get_status().state is State.RECORDING


def test_a_program_that_ends_before_it_has_started_lets_everybody_go(bench: Bench) -> None:
    """Who waits for it to be ready is told that it never will be."""
    with starting(bench) as server:
        asking = in_thread(main, ["mode", "recording"])
        until(lambda: bench.followed)
        server.close()
        assert asking.result(10.0) == ExitCode.ABSENT
    assert bench.manager.get_status().asked_mode is ExecutionMode.IDLE


def test_the_last_of_those_who_ask_while_it_starts_is_heard(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever of them wakes first; one that was overruled is told, and who wanted the same as the last is served."""
    with starting(bench) as server:
        asking = []
        for number, mode in enumerate(("recording", "idle", "recording"), 1):
            asking.append(in_thread(main, ["mode", mode]))
            until(lambda number=number: len(bench.followed) == number)
        server.started()
        answers = [let_time_pass(bench.world, each) for each in asking]
        assert answers == [ExitCode.FINE, ExitCode.REFUSED, ExitCode.FINE]
        assert "another mode was asked for" in capsys.readouterr().err
    assert bench.manager.get_status().state is State.RECORDING
    assert bench.followed[-1] is ExecutionMode.RECORDING


def test_a_program_that_starts_reads_no_settings_again(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """What they are for is not there yet."""
    bench.server.close()
    with ControlServer(bench.manager, on_reload=dict, starting=True):
        assert main(["config", "reload"]) == ExitCode.REFUSED
        assert "still starting" in capsys.readouterr().err


def test_the_socket_is_its_owners_and_goes_with_the_server(bench: Bench) -> None:
    """Nobody else may connect; after the end nothing is left lying."""
    path = bench.server.path
    facts = path.lstat()
    assert stat.S_ISSOCK(facts.st_mode)
    assert stat.S_IMODE(facts.st_mode) == 0o600
    assert stat.S_IMODE(path.parent.lstat().st_mode) == 0o700
    bench.server.close()
    bench.server.close()
    assert not path.exists()
    with pytest.raises(NothingRuns):
        ControlClient()


def test_modes_and_the_vlm_are_asked_for_from_outside(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """What was asked for is true when the command returns, and the agent is told the mode."""
    passing = in_thread(main, ["mode", "autopilot"])
    assert let_time_pass(bench.world, passing) == ExitCode.FINE
    assert bench.manager.get_status().state is State.AUTOPILOT
    assert bench.followed == [ExecutionMode.AUTOPILOT]
    assert let_time_pass(bench.world, in_thread(main, ["vlm", "load"])) == ExitCode.FINE
    assert bench.world.vlm_resident()
    assert let_time_pass(bench.world, in_thread(main, ["vlm", "unload"])) == ExitCode.FINE
    assert not bench.world.vlm_resident()
    assert main(["explain", "recording"]) == ExitCode.FINE
    assert main(["status"]) == ExitCode.FINE
    assert main(["events", "--json"]) == ExitCode.FINE
    said = capsys.readouterr().out
    assert "AUTOPILOT stands" in said
    assert "RECORDING is available" in said
    assert "state      AUTOPILOT" in said
    events = [json.loads(line) for line in said.splitlines() if line.startswith('{"time"')]
    assert [event["new"] for event in events if event["kind"] == "mode_changed"] == ["autopilot"]


def test_a_mode_that_cannot_be_given_is_said_with_a_code_of_its_own(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manager degrades and says why; the agent follows the wish."""
    bench.world.card.take("game", 5000.0)
    assert let_time_pass(bench.world, in_thread(main, ["mode", "recording"])) == ExitCode.REFUSED
    assert "vram_insufficient" in capsys.readouterr().out
    bench.world.card.give_back("game")


def test_a_refusal_keeps_its_words(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """The manager's own error, with its code and its remedy; the exit code says that it was a no."""
    bench.world.faults.arm("ollama.load", "http_404", times=None)
    assert let_time_pass(bench.world, in_thread(main, ["vlm", "load"])) == ExitCode.REFUSED
    assert "ollama pull" in capsys.readouterr().err
    with ControlClient() as client, pytest.raises(ControlRefused) as caught:
        let_time_pass(bench.world, in_thread(client.ask, "vlm_load", wait_s=None))
    assert caught.value.said == "model_not_found"
    bench.world.faults.heal()


def test_a_timeout_ends_the_waiting_and_not_the_load(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """`--timeout-s` gives the asker back, and the load goes on."""
    gate = Gate(bench.world, "ollama.load", "during")
    assert main(["vlm", "load", "--timeout-s", "0.05"]) == ExitCode.REFUSED
    said = capsys.readouterr().err
    assert "look at `gpu-fsm status`" in said, said
    assert "()" not in said, "what a program would call is no help to who types commands"
    gate.wait()
    gate.open()
    until(lambda: bench.world.clock.advance(0.05) or bench.world.vlm_resident())


def test_an_agent_follows_a_mode_whose_asker_waits_no_longer(bench: Bench) -> None:
    """What goes on after `--timeout-s` is the whole change: the manager's and the agent's."""
    gate = Gate(bench.world, "ollama.load", "during")
    assert main(["mode", "recording", "--timeout-s", "0.05"]) == ExitCode.REFUSED
    gate.wait()
    assert bench.followed == [ExecutionMode.RECORDING]
    gate.open()
    until(lambda: bench.world.clock.advance(0.05) or bench.manager.get_status().state is State.RECORDING)


@pytest.mark.parametrize("text", ["nan", "-1", "inf", "soon"])
@pytest.mark.parametrize("command", [("mode", "idle"), ("vlm", "load"), ("vlm", "unload")])
def test_a_time_that_is_none_is_refused_before_anybody_is_asked(
    bench: Bench, command: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the option; nan is a float, and no time to wait."""
    assert main([*command, "--timeout-s", text]) == ExitCode.USAGE
    assert "--timeout-s" in capsys.readouterr().err
    assert bench.manager.get_status().state is State.IDLE


def test_preempt_gives_a_load_under_way_up(bench: Bench) -> None:
    """A mode asked for with --preempt does not wait for the load that it makes needless."""
    gate = Gate(bench.world, "ollama.load", "during")
    asking = in_thread(bench.manager.set_execution_mode, ExecutionMode.RECORDING)
    gate.wait()
    preempting = in_thread(main, ["mode", "idle", "--preempt"])
    until(lambda: bench.manager.get_status().queued)
    gate.open()
    assert let_time_pass(bench.world, preempting) == ExitCode.FINE
    assert asking.exception(10.0) is not None
    assert bench.manager.get_status().state is State.IDLE


def test_followers_hear_everything_in_order_and_the_end(bench: Bench) -> None:
    """Several at once; they end by themselves when the manager does."""

    def follow() -> list[dict[str, Any]]:
        with ControlClient() as client:
            return list(client.follow())

    following = [in_thread(follow) for _ in range(3)]
    until(lambda: len(bench.server._followers) == 3)
    let_time_pass(bench.world, in_thread(bench.manager.set_execution_mode, ExecutionMode.AUTOPILOT))
    until(lambda: any(told["kind"] == "mode_changed" for told in list(bench.server._history)))
    bench.server.close()
    heard = [answer.result(10.0) for answer in following]
    assert heard[0] == heard[1] == heard[2] == list(bench.server._history)
    assert [told["new"] for told in heard[0] if told["kind"] == "mode_changed"] == ["autopilot"]


def test_a_follower_that_does_not_read_loses_the_oldest_and_holds_up_nobody() -> None:
    """It is told how many."""
    from gpu_fsm.control import BACKLOG, _Follower

    follower = _Follower()
    for number in range(BACKLOG + 5):
        follower.put({"number": number})
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert follower.next(ours) == {"lost": 5}
        assert follower.next(ours) == {"event": {"number": 5}}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\n", "no JSON"),
        (b"status\n", "no JSON"),
        (b"[" * 50_000 + b"\n", "no JSON"),
        (b"[1]\n", "no object"),
        (b'{"do": 3}\n', "no object"),
        (b'{"do": "status"}\n', "protocol"),
        (b'{"do": "status", "protocol": 2}\n', "protocol"),
        (b'{"do": "\\u001b[31m", "protocol": 1}\n', "nothing that can be done"),
        (b'{"do": "mode", "protocol": 1}\n', "unknown mode"),
        (b'{"do": "mode", "protocol": 1, "mode": "degraded"}\n', "cannot be asked for"),
        (b'{"do": "mode", "protocol": 1, "mode": "idle", "preempt": 1}\n', "preempt"),
        (b'{"do": "mode", "protocol": 1, "mode": "idle", "timeout_s": "x"}\n', "timeout_s"),
        (b'{"do": "vlm_load", "protocol": 1, "timeout_s": -1}\n', "timeout_s"),
        (b"\xff\xfe\n", "no JSON"),
    ],
)
def test_bad_input_is_answered_and_the_connection_goes_on(bench: Bench, line: bytes, said: str) -> None:
    """One line of nonsense costs its sender an error and nothing else."""
    _, answer, status = raw(bench, line, b'{"do": "status", "protocol": 1}\n')
    assert answer["ok"] is False
    assert said in answer["error"]["detail"]
    assert answer["error"]["detail"].isprintable()
    assert status["ok"] is True
    assert bench.manager.get_status().state is State.IDLE


def test_a_line_without_end_is_cut_off(bench: Bench) -> None:
    """Input is bounded; the next client is served."""
    _, answer = raw(bench, b"x" * (LINE_BYTES + 2), b"\n")
    assert "bytes" in answer["error"]["detail"]
    assert raw(bench, b'{"do": "status", "protocol": 1}\n')[1]["ok"]


def test_more_clients_than_allowed_are_told_to_come_again() -> None:
    """The first ones are served on."""
    world = SimulatedWorld()
    with threaded(world) as manager, ControlServer(manager, max_clients=2):
        first, second = ControlClient(), ControlClient()
        assert first.ask("status")["state"] == second.ask("status")["state"] == "idle"
        with pytest.raises(ControlRefused, match="2 clients"):
            ControlClient()
        first.close()
        until(_answered)
        second.close()


def _answered() -> bool:
    with contextlib.suppress(ControlRefused), ControlClient() as client:
        return bool(client.ask("status"))
    return False


def test_without_a_running_manager_a_command_says_where_it_looked(capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and an exit code of its own."""
    for argv in (["status"], ["mode", "idle"], ["vlm", "load"], ["events", "--follow"], ["explain", "idle"]):
        assert main(argv) == ExitCode.ABSENT
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert "no running gpu_fsm" in said.err
        assert "gpu-fsm run" in said.err


def test_several_managers_have_to_be_named(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is guessed; --socket decides."""
    with ControlServer(bench.manager) as other:
        assert main(["status"]) == ExitCode.USAGE
        assert "--socket" in capsys.readouterr().err
        assert main(["status", "--socket", str(other.path)]) == ExitCode.FINE


def test_a_socket_left_behind_by_a_killed_process_is_no_manager(bench: Bench) -> None:
    """Whoever looks passes it by, and the next server removes it."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stale = bench.server.path.parent / f"control-{gone.pid}-1.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(stale))
    assert main(["status"]) == ExitCode.FINE
    with ControlServer(bench.manager):
        assert not stale.exists()


def test_a_link_in_the_place_of_a_socket_is_not_followed(bench: Bench, tmp_path: Path) -> None:
    """Neither by a client nor by a server."""
    link = bench.server.path.parent / "x.sock"
    link.symlink_to(bench.server.path)
    with pytest.raises(NothingRuns):
        ControlClient(link)
    with pytest.raises(BadArgument, match="is no socket"):
        ControlServer(bench.manager, link)
    assert link.is_symlink()


def test_a_place_that_others_can_write_to_or_that_is_taken_is_refused(bench: Bench, tmp_path: Path) -> None:
    """A file of somebody's is never replaced, nor a living server's socket."""
    with pytest.raises(BadArgument, match="another manager"):
        ControlServer(bench.manager, bench.server.path)
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(BadArgument, match="is no socket"):
        ControlServer(bench.manager, file)
    assert file.read_text() == "precious"
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    with pytest.raises(BadArgument, match="others may write"):
        ControlServer(bench.manager, open_folder / "x.sock")
    with pytest.raises(BadArgument, match="cannot be"):
        ControlServer(bench.manager, tmp_path / ("x" * 200))
    assert raw(bench, b'{"do": "status", "protocol": 1}\n')[1]["ok"]


@pytest.mark.parametrize("eventful", [False, True])
def test_a_follower_that_leaves_is_no_defect(bench: Bench, eventful: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Ctrl-C at `events --follow` is how it ends, in a quiet hour and amid events; the agent's log stays empty."""
    client = ControlClient()
    client.ask("events", follow=True)
    client.close()
    if eventful:
        for mode in (ExecutionMode.AUTOPILOT, ExecutionMode.IDLE, ExecutionMode.RECORDING):
            assert let_time_pass(bench.world, in_thread(bench.manager.set_execution_mode, mode)).granted
    until(lambda: not bench.server._clients)
    assert caplog.records == []


def test_a_client_that_leaves_in_the_middle_harms_nobody(bench: Bench) -> None:
    """What it asked for goes on, as with any waiter that gives up."""
    gate = Gate(bench.world, "ollama.load", "during")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(bench.server.path))
        client.sendall(b'{"do": "vlm_load", "protocol": 1}\n')
        gate.wait()
    gate.open()
    until(lambda: bench.world.clock.advance(0.05) or bench.world.vlm_resident())
    assert raw(bench, b'{"do": "status", "protocol": 1}\n')[1]["ok"]
