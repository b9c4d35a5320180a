"""The command line: bad input is one line that names the thing and the mend, and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from gpu_fsm import __version__, diagrams
from gpu_fsm.cli import EXIT_CODES, ExitCode, main
from gpu_fsm.errors import BadArgument, ClipUnavailable, OllamaUnavailable
from gpu_fsm.settings import settings_table
from gpu_fsm.states import PROMISES, TABLE
from gpu_fsm.status import ExecutionMode

SECRET = "s3cret-canary"
ROOT = Path(__file__).resolve().parents[1]
SCREENS = ROOT / "gpu_fsm" / "data" / "screens"


def complaint(capsys: pytest.CaptureFixture[str], *argv: str, code: ExitCode = ExitCode.USAGE) -> str:
    """Run a command that must be refused and return its one line."""
    assert main(argv) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gpu-fsm: ")
    assert said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    return said.err


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    """One place says it."""
    assert main(["--version"]) == ExitCode.FINE
    assert capsys.readouterr().out == f"gpu-fsm {__version__}\n"


def test_the_diagram_is_that_of_the_running_definition(capsys: pytest.CaptureFixture[str]) -> None:
    """Both views, byte for byte."""
    assert main(["diagram"]) == ExitCode.FINE
    assert capsys.readouterr().out == diagrams.overview()
    assert main(["diagram", "--detail"]) == ExitCode.FINE
    assert capsys.readouterr().out == diagrams.detail()


def test_the_diagram_as_json_is_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """States with their promises, rows in their order: enough to draw another picture."""
    assert main(["diagram", "--json"]) == ExitCode.FINE
    facts = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in facts["rows"]] == [row.name for row in TABLE]
    assert facts["states"] == {state.name: promise for state, promise in PROMISES.items()}


@pytest.mark.parametrize("argv", [["--help"], ["diagram", "--help"], ["demo", "--help"], ["run", "--help"]])
def test_every_help_has_an_example(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A person copies the example first."""
    assert main(argv) == ExitCode.FINE
    text = capsys.readouterr().out
    assert "Example" in text
    assert "gpu-fsm " in text


def test_the_help_lists_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """One table, here and in the README."""
    main(["--help"])
    text = capsys.readouterr().out
    for code, about in EXIT_CODES.items():
        assert f"{code.value:>3}  {about}" in text


def test_run_has_an_option_for_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """They are made from the settings class."""
    main(["run", "--help"])
    text = capsys.readouterr().out
    for setting in settings_table():
        assert setting.option in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["demmo"], "demmo"),
        (["run", "--screens", ".", "--idle-timeout-s", "-1"], "option --idle-timeout-s"),
        (["run", "--screens", ".", "--idle-timeout-s", "nan"], "option --idle-timeout-s"),
        (["run", "--screens", ".", "--vlm-model", ""], "option --vlm-model"),
        (["run", "--screens", ".", "--vlm-load-retries", "1.5"], "option --vlm-load-retries"),
        (["run", "--screens", ".", "--on-shortage", "degrad"], "Did you mean degrade?"),
        (["run", "--screens", ".", "--mode", "recordin"], "recordin"),
        (["run", "--screens", ".", "--idle-timout-s", "3"], "--idle-timeout-s"),
        (["run", "--screens", ".", "--config", "missing.toml"], "missing.toml"),
        (["run", "--screens", "no-such-folder"], "no-such-folder"),
        (["run", "--screens", ".", "--clip-model", "none"], "clip_model"),
        (["run", "--screens", ".", "--clip-model", "./no-such-model"], "there is no folder ./no-such-model"),
        (["run", "--screens", str(SCREENS), "--memory", "no-such-folder/x.npz"], "no-such-folder is no folder"),
        (["gateway", "--clip-model", "~/no-such-model"], "there is no folder ~/no-such-model"),
        (["status", "--jsn"], "See gpu-fsm status --help."),
        (["demo", "--clip", "/no/such/model"], "there is no folder /no/such/model"),
        (["config", "check", "a.toml", "--config", "b.toml"], "one of them"),
        (["simulate-ollama", "--port", "0", "--vram-mib", "nan"], "--vram-mib"),
        (["demo", "--screens", "no-such-folder"], "no-such-folder"),
        (["run"], "--screens"),
        (["demo", "--ollama", "ftp://x"], "ftp://x"),
    ],
)
def test_bad_input_is_one_line_that_names_it(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown words, numbers out of bounds, files and folders that are not there."""
    assert said in complaint(capsys, *argv)


@pytest.mark.parametrize("command", [["demo"], ["run", "--screens", "."]])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OLLAMA_HOST", "ftp://x"),
        ("GPU_FSM_IDLE_TIMEOUT_S", "nan"),
        ("GPU_FSM_IDLE_TIMOUT_S", "3"),
        ("GPU_FSM_VLM_MODEL", ""),
        ("GPU_FSM_CONFIG", "missing.toml"),
    ],
)
def test_a_bad_variable_is_named(
    command: list[str], name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is started."""
    monkeypatch.setenv(name, value)
    assert (value if name == "GPU_FSM_CONFIG" else name) in complaint(capsys, *command)


def test_a_typo_in_the_file_is_named_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what was probably meant."""
    path = tmp_path / "gpu-fsm.toml"
    path.write_text("[gpu-fsm]\nidle_timout_s = 3\n", encoding="utf-8")
    line = complaint(capsys, "run", "--screens", ".", "--config", str(path))
    assert str(path) in line
    assert "Did you mean idle_timeout_s?" in line


@pytest.mark.parametrize("command", ["demo", "run"])
@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\nbroken"])
def test_a_folder_without_a_whole_picture_is_refused(
    command: str, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Empty, or with a picture that cannot be read: the file is named."""
    pytest.importorskip("PIL", reason="pillow not installed")
    if content is not None:
        (tmp_path / "shot.png").write_bytes(content)
    line = complaint(capsys, command, "--screens", str(tmp_path))
    assert (str(tmp_path) if content is None else "shot.png") in line


class Stage(types.ModuleType):
    """Stands where `gpu_fsm.demo` stands: keeps what the command line hands over and ends as told."""

    def __init__(self) -> None:
        super().__init__("gpu_fsm.demo")
        self.given: dict[str, Any] = {}
        self.ending: BaseException | int = 0

    def DemoOptions(self, **options: Any) -> dict[str, Any]:  # noqa: N802 - the class it stands for
        """The options as they came."""
        return options

    def run_demo(self, options: dict[str, Any]) -> int:
        """End as told."""
        self.given = options
        if isinstance(self.ending, BaseException):
            raise self.ending
        return self.ending

    def run_agent(self, config: Any, screens: Path, **options: Any) -> int:
        """The same for `run`."""
        return self.run_demo({"config": config, "screens": screens, **options})


@pytest.fixture(name="stage")
def _stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    monkeypatch.setitem(sys.modules, "gpu_fsm.demo", stage)
    monkeypatch.setitem(sys.modules, "gpu_fsm.cli.running", stage)
    return stage


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        (0, ExitCode.FINE, ""),
        (1, ExitCode.FAILED, ""),
        (ModuleNotFoundError("no", name="torch.nn"), ExitCode.MISSING, "torch.nn is not installed"),
        (ClipUnavailable(detail="no weights"), ExitCode.MISSING, "no weights"),
        (BadArgument(detail="no such folder"), ExitCode.USAGE, "no such folder"),
        (OllamaUnavailable(detail="nobody listens"), ExitCode.FAILED, "nobody listens"),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED, "interrupted"),
    ],
)
def test_each_ending_has_its_exit_code(
    stage: Stage, ending: BaseException | int, code: ExitCode, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one line where something went wrong."""
    stage.ending = ending
    assert main(["demo"]) == code
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == bool(said)


def test_a_defect_is_not_dressed_up_as_bad_input(stage: Stage) -> None:
    """A bug keeps its traceback, a missing module of ours too."""
    for defect in (ZeroDivisionError(), ModuleNotFoundError("no", name="gpu_fsm.nothing")):
        stage.ending = defect
        with pytest.raises(type(defect)):
            main(["demo"])


def test_the_simulated_demo_does_not_care_where_the_real_ollama_is(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An OLLAMA_HOST on another machine is no reason to refuse a simulation; a broken one still is."""
    monkeypatch.setenv("OLLAMA_HOST", "example.com")
    assert main(["demo"]) == ExitCode.FINE
    assert stage.given["real_ollama"] is False
    assert main(["run", "--screens", "."]) == ExitCode.USAGE
    assert main(["run", "--screens", str(SCREENS), "--allow-remote", "--mode", "Recording"]) == ExitCode.FINE
    assert stage.given["config"].gpu.ollama_url == "http://example.com:11434"
    assert stage.given["modes"] == (ExecutionMode.RECORDING,)


def test_a_control_character_from_outside_never_reaches_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """An escape sequence in an argument is shown, not obeyed."""
    assert "\x1b" not in complaint(capsys, "run", "--screens", "\x1b[31mred")


def test_credentials_never_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Not even when the address is refused."""
    line = complaint(capsys, "run", "--screens", ".", "--ollama-url", f"http://user:{SECRET}@example.com")
    assert SECRET not in line


INTERRUPTED = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {at!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv = ["gpu-fsm", "diagram"]
"""
HOW = {
    "as the console script": "from gpu_fsm.cli import main; sys.exit(main())",
    "as a module": "runpy.run_module('gpu_fsm', run_name='__main__')",
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("at", ["attr", "gpu_fsm.cli.program", "rich.console", "gpu_fsm.diagrams"])
def test_ctrl_c_while_modules_are_imported_is_no_traceback(how: str, at: str) -> None:
    """An impatient person at the first moment gets one line and the code of an interruption."""
    code = INTERRUPTED.format(at=at) + HOW[how]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ngpu-fsm: interrupted\n")


def test_the_module_runs_as_a_program_and_a_closed_pipe_is_no_traceback() -> None:
    """`python -m gpu_fsm` is `gpu-fsm`; whoever reads may stop reading."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "gpu_fsm", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"gpu-fsm {__version__}\n"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        closed = subprocess.run(
            [sys.executable, "-m", "gpu_fsm", "diagram"], stdout=gone, stderr=subprocess.PIPE, text=True, check=False
        )
    assert closed.returncode == ExitCode.FAILED
    assert closed.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line() -> None:
    """A report that was not written must not look like one that was."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gpu_fsm", "diagram"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == ExitCode.FAILED
    assert done.stderr == "gpu-fsm: the output cannot be written: the disk is full\n"
