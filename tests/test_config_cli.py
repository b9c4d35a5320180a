"""`config show`, `init`, `check`, `reload` and `completion`, and what colours and exit codes the command line has."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_fsm import GPUResourceManager
from gpu_fsm.agent import FusionEngine, Limits
from gpu_fsm.appconfig import AgentConfig, AppConfig, Reloader, app_settings_table, load_app_config
from gpu_fsm.cli import EXIT_CODES, ExitCode, main
from gpu_fsm.control import ControlServer
from gpu_fsm.simulation import SimulatedWorld
from tests.worlds import threaded

CANARY = "s3cret-canary-of-the-gateway"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder and a user of the test's own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "system"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def said(capsys: pytest.CaptureFixture[str], *argv: str, code: ExitCode = ExitCode.FINE) -> tuple[str, str]:
    """Run a command and return what it wrote to stdout and stderr."""
    assert main(argv) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out, captured.err


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The settings that `config show --json` prints, by name."""
    return dict(json.loads(said(capsys, "config", "show", "--json", *argv)[0])["settings"])


# --- show -------------------------------------------------------------------------------------------------------------


def test_show_tells_the_winner_and_the_origin_from_each_of_four_places(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One value set in one place, one in two, ... one in all four: pyproject, gpu-fsm.toml, environment, option."""
    names = ["pressure_s", "stable_s", "check_interval_s", "idle_timeout_s"]
    (here / "pyproject.toml").write_text("[tool.gpu-fsm]\n" + "".join(f"{name} = 1\n" for name in names), "utf-8")
    (here / "gpu-fsm.toml").write_text("[gpu-fsm]\n" + "".join(f"{name} = 2\n" for name in names[1:]), "utf-8")
    for name in names[2:]:
        monkeypatch.setenv(f"GPU_FSM_{name.upper()}", "3")
    found = shown(capsys, "--idle-timeout-s", "4")
    assert [found[name]["value"] for name in names] == [1.0, 2.0, 3.0, 4.0]
    origins = [
        f"{here / 'pyproject.toml'}:2",
        f"{here / 'gpu-fsm.toml'}:2",
        "environment GPU_FSM_CHECK_INTERVAL_S",
        "option --idle-timeout-s",
    ]
    assert [found[name]["source"] for name in names] == origins
    assert [entry["value"] for entry in found["idle_timeout_s"]["beaten"]] == ["3", "2", "1"]
    assert set(found) == {setting.name for setting in app_settings_table()}


def test_show_prints_one_line_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """Not wrapped however long, so that it can be searched."""
    out, _ = said(capsys, "config", "show", "--agent-prompt", "long " * 40)
    lines = out.splitlines()
    assert len(lines) == len(app_settings_table())
    assert re.search(r"^idle_timeout_s +300 +default$", out, flags=re.MULTILINE)
    out, _ = said(capsys, "config", "show", "--changed", "--agent-prompt", "what?")
    assert re.fullmatch(r"agent.prompt +what\? +option --agent-prompt\n", out)


@pytest.mark.parametrize("as_json", [False, True])
def test_show_never_prints_a_secret(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the token nor the password in Ollama's address, in whichever place they stand."""
    monkeypatch.setenv("GPU_FSM_GATEWAY_TOKEN", CANARY)
    monkeypatch.setenv("OLLAMA_HOST", f"http://user:{CANARY}@127.0.0.1:1")
    argv = ["config", "show", "--gateway-token", CANARY + "2", *(["--json"] if as_json else [])]
    out, err = said(capsys, *argv)
    assert "***" in out
    assert CANARY not in out + err


def test_show_refuses_what_the_program_would_refuse(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the place and the mend, and exit code 2."""
    (here / "gpu-fsm.toml").write_text("[gpu-fsm.agent]\nacept = 1\n", "utf-8")
    out, err = said(capsys, "config", "show", code=ExitCode.USAGE)
    assert out == ""
    assert f"{here / 'gpu-fsm.toml'}:2" in err
    assert "Did you mean agent.accept?" in err


# --- init -------------------------------------------------------------------------------------------------------------


def test_init_writes_a_file_that_changes_nothing_until_a_mark_is_removed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is, and with every mark removed, it gives the defaults; each setting stands in it with its meaning."""
    out, _ = said(capsys, "config", "init", "gpu-fsm.toml")
    path = here / "gpu-fsm.toml"
    assert out == "gpu-fsm.toml\n"
    assert load_app_config(path, {}).config == AppConfig()
    text = path.read_text("utf-8")
    bare = re.sub(r"^# (?=[a-z_]+ = )", "", text, flags=re.MULTILINE)
    path.write_text(bare, "utf-8")
    loaded = load_app_config(path, {})
    assert loaded.config == AppConfig()
    assert "default" not in {value.source for value in loaded.values}
    assert all(setting.about in text for setting in app_settings_table())
    tomllib.loads(text)


def test_init_without_a_path_writes_the_users_own_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which every command then reads, and nobody else may."""
    out, _ = said(capsys, "config", "init")
    path = tmp_path / "user" / "gpu-fsm" / "gpu-fsm.toml"
    assert out == f"{path}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    document = json.loads(said(capsys, "config", "show", "--json")[0])
    assert document["files"] == [str(path)]
    assert list(path.parent.iterdir()) == [path]


def test_init_overwrites_nothing_without_force(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also not a link, whatever it leads to."""
    (here / "gpu-fsm.toml").write_text("mine", "utf-8")
    (here / "link.toml").symlink_to("elsewhere.toml")
    for name in ("gpu-fsm.toml", "link.toml"):
        _, err = said(capsys, "config", "init", name, code=ExitCode.USAGE)
        assert "--force" in err
    assert (here / "gpu-fsm.toml").read_text("utf-8") == "mine"
    assert not (here / "elsewhere.toml").exists()
    said(capsys, "config", "init", "--force", "gpu-fsm.toml")
    assert load_app_config(here / "gpu-fsm.toml", {}).config == AppConfig()


def test_init_tells_a_program_where_the_file_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON document, as everywhere."""
    assert json.loads(said(capsys, "config", "init", "new.toml", "--json")[0]) == {"file": "new.toml"}
    assert (here / "new.toml").exists()


def test_init_leaves_a_pyproject_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is more than ours, even with --force."""
    (here / "pyproject.toml").write_text("[project]\n", "utf-8")
    _, err = said(capsys, "config", "init", "--force", "pyproject.toml", code=ExitCode.USAGE)
    assert "[tool.gpu-fsm]" in err
    assert (here / "pyproject.toml").read_text("utf-8") == "[project]\n"


def test_init_where_nothing_can_be_written_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line."""
    (here / "file").touch()
    _, err = said(capsys, "config", "init", "file/gpu-fsm.toml", code=ExitCode.USAGE)
    assert err.count("\n") == 1
    assert "cannot be written" in err


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_of_good_settings_is_fine(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says what was read."""
    said(capsys, "config", "init", "gpu-fsm.toml")
    out, err = said(capsys, "config", "check")
    assert (err, out) == ("", f"fine: {here / 'gpu-fsm.toml'}, the environment\n")
    report = json.loads(said(capsys, "config", "check", "gpu-fsm.toml", "--json")[0])
    assert report == {"ok": True, "files": ["gpu-fsm.toml"], "problems": []}


def test_check_lists_every_problem_with_its_place_and_mend(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each on stderr, exit code 2; the same as JSON."""
    text = f'[gpu-fsm]\nidle_timout_s = 1\npressure_s = "x"\n[gpu-fsm.gateway]\ntoken = "{CANARY}\\n"\n'
    (here / "bad.toml").write_text(text, "utf-8")
    monkeypatch.setenv("GPU_FSM_ON_CLOSE", "leaf")
    out, err = said(capsys, "config", "check", "bad.toml", code=ExitCode.USAGE)
    assert out == ""
    assert [re.sub(r": .*", "", line.removeprefix("gpu-fsm: ")) for line in err.splitlines()] == [
        "idle_timout_s (bad.toml:2)",
        "pressure_s (bad.toml:3)",
        "gateway.token (bad.toml:5)",
        "on_close (environment GPU_FSM_ON_CLOSE)",
    ]
    report = json.loads(said(capsys, "config", "check", "bad.toml", "--json", code=ExitCode.USAGE)[0])
    assert report["ok"] is False
    assert report["problems"][0]["remedy"] == "Did you mean idle_timeout_s?"
    assert report["problems"][3]["remedy"] == "Did you mean leave?"
    assert CANARY not in err + json.dumps(report)


def test_check_of_a_file_that_is_not_there_is_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    """Not silence."""
    _, err = said(capsys, "config", "check", "nothing.toml", code=ExitCode.USAGE)
    assert "nothing.toml" in err


# --- reload -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def running(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[GPUResourceManager, FusionEngine]]:
    """A manager and a screen memory that are reached from outside and read `gpu-fsm.toml`."""
    folder = Path(os.environ["XDG_RUNTIME_DIR"]) / f"r{time.monotonic_ns()}"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr("gpu_fsm.cardlock._candidates", lambda: iter([folder / "gpu_fsm"]))
    manager, memory = threaded(SimulatedWorld()), FusionEngine()
    options = {name: getattr(manager.config, name) for name in ("vlm_model", "vlm_size_mib", "clip_model")}

    def read() -> AppConfig:
        return load_app_config(environ={}, overrides=options).config

    def judge_by(agent: AgentConfig) -> None:
        memory.limits = Limits(accept=agent.accept or 0.92)

    reload = Reloader(read(), read, control=lambda _: None, agent=judge_by, gpu=manager.reconfigure)
    with ControlServer(manager, on_reload=reload):
        yield manager, memory
    manager.close()


def test_a_running_manager_reads_its_settings_again(
    running: tuple[GPUResourceManager, FusionEngine], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What changed is told and holds; the same again is nothing."""
    manager, memory = running
    (here / "gpu-fsm.toml").write_text("[gpu-fsm]\nidle_timeout_s = 7\n[gpu-fsm.agent]\naccept = 0.95\n", "utf-8")
    changed = json.loads(said(capsys, "config", "reload", "--json")[0])["changed"]
    assert changed == {"idle_timeout_s": 7.0, "agent.accept": 0.95}
    assert manager.config.idle_timeout_s == 7.0
    assert memory.limits.accept == 0.95
    assert said(capsys, "config", "reload")[0] == "nothing changed\n"
    (here / "gpu-fsm.toml").unlink()
    assert said(capsys, "config", "reload")[0] == "agent.accept is now none\nidle_timeout_s is now 300\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[gpu-fsm]\nidle_timeout_s = 7\njournal_size = 3\n", "it is read once, at the start"),
        ("[gpu-fsm]\nidle_timeout_s = 7\n[gpu-fsm.control]\nmax_clients = 3\n", "control.max_clients (reload)"),
        ("[gpu-fsm]\nidle_timeout_s = 7\nreserve_mib = -1\n", "gpu-fsm.toml:3"),
        ("[gpu-fsm]\nidle_timeout_s = 7\n[gpu-fsm.agent]\nprompt = 'x'\n", "given to the one of before"),
        ("[gpu-fsm]\nidle_timeout_s = 7\n[gpu-fsm.agent]\nindex_path = 'x.npz'\n", "in the file it began with"),
        ("[gpu-fsm]\nidle_timeout_s = 7\n[gpu-fsm.agent]\nlabels = ['x']\n", "the labels of before"),
    ],
)
def test_what_cannot_be_reloaded_changes_nothing(
    text: str,
    why: str,
    running: tuple[GPUResourceManager, FusionEngine],
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Refused with the reason and exit code 5; also what stood beside it and could change."""
    manager, _ = running
    before = manager.config
    (here / "gpu-fsm.toml").write_text(text, "utf-8")
    _, err = said(capsys, "config", "reload", code=ExitCode.REFUSED)
    assert why in err
    assert manager.config == before


def test_where_nothing_runs_nothing_is_reloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 4."""
    monkeypatch.setattr("gpu_fsm.cardlock._candidates", lambda: iter([tmp_path / "gpu_fsm"]))
    said(capsys, "config", "reload", code=ExitCode.ABSENT)


# --- completion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named, or taken from $SHELL."""
    out, _ = said(capsys, "completion", shell)
    assert f"_GPU_FSM_COMPLETE={shell}_complete" in out
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    assert said(capsys, "completion")[0] == out


def test_completion_for_an_unknown_shell_asks_for_a_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As bad input."""
    monkeypatch.setenv("SHELL", "/bin/dash")
    assert "bash, zsh, fish" in said(capsys, "completion", code=ExitCode.USAGE)[1]
    said(capsys, "completion", "dash", code=ExitCode.USAGE)


def test_what_the_script_calls_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The shell asks the program itself, which lists commands and options."""
    asked = {"_GPU_FSM_COMPLETE": "bash_complete", "COMP_WORDS": "gpu-fsm config s", "COMP_CWORD": "2"}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == ["plain,show"]


# --- colours and exit codes -------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stdout that calls itself a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "terminal", "coloured"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": "xterm"}, False, False),
    ],
    ids=["terminal", "NO_COLOR", "dumb", "pipe"],
)
def test_colours_are_for_terminals_and_for_who_wants_them(
    environ: dict[str, str], terminal: bool, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Escape sequences of colour reach neither a pipe nor a person who set NO_COLOR."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    stdout = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["config", "show", "--changed", "--idle-timeout-s", "3"]) == ExitCode.FINE
    text = stdout.getvalue()
    assert "option --idle-timeout-s" in text
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]", text)) == coloured
    if not terminal:
        assert "\x1b" not in text


def test_each_exit_code_stands_in_the_table_once() -> None:
    """The table is the only place that explains them."""
    assert set(EXIT_CODES) == set(ExitCode)
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)
    assert (ExitCode.FINE, ExitCode.USAGE) == (0, 2)


def test_the_process_ends_with_the_code_of_its_command(here: Path) -> None:
    """As the shell sees it."""
    done = subprocess.run(
        [sys.executable, "-m", "gpu_fsm", "config", "check", "nothing.toml"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == ExitCode.USAGE


def test_a_group_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    """As bad usage, and with the examples that lead on."""
    _, err = said(capsys, "config", code=ExitCode.USAGE)
    assert "gpu-fsm config init" in err
