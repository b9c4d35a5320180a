"""The live suite against `gpu-fsm simulate-ollama` in another process, as a user would run both."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from gpu_fsm.cli import ExitCode, main

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def simulated(*options: str) -> Iterator[str]:
    """Start the server in a process of its own; gives its URL."""
    command = [sys.executable, "-W", "error", "-m", "gpu_fsm", "simulate-ollama", "--port", "0", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://[^\s\"]+", line)
            assert found, process.stderr.read() if process.stderr else line
            if "--json" in options:
                assert json.loads(line)["url"] == found[0]
            yield found[0]
        finally:
            process.terminate()
            said, complaint = process.communicate(timeout=30)
    assert process.returncode == 0, complaint
    assert (said, complaint) == ("", "")


def suite(*options: str) -> tuple[int, str]:
    """Run the live suite; its exit code and its output."""
    command = [sys.executable, "-m", "pytest", "-m", "live", "tests/live", "-q", "-p", "no:cacheprovider", *options]
    environ = {**os.environ, "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stdout + done.stderr


MODELS = ("--model", "tiny-a=2", "--model", "tiny-b=2", "--model", "big-c=1000", "--load-ms", "50")


@pytest.mark.parametrize("version", ["0.24", "0.32"])
def test_the_live_suite_passes_on_the_simulated_server_and_leaves_it_as_it_was(version: str) -> None:
    """Nothing skipped, nothing failed; one model pinned and one with a timer are so afterwards."""
    with simulated("--version", version, "--json", *MODELS) as url, requests.Session() as session:
        session.trust_env = False
        for name, keep_alive in (("tiny-b", -1), ("tiny-a", 3000)):
            session.post(f"{url}/api/generate", json={"model": name, "keep_alive": keep_alive}, timeout=30)
        before = session.get(f"{url}/api/ps", timeout=30).json()["models"]
        code, said = suite("--ollama", url, "--model", "tiny-a")
        after = session.get(f"{url}/api/ps", timeout=30).json()["models"]
    assert code == 0, said
    assert re.search(r"tests: \d\d passed, 0 failed, 0 skipped", said), said
    assert [(m["name"], m["digest"], m["expires_at"][:15]) for m in after] == [
        (m["name"], m["digest"], m["expires_at"][:15]) for m in before
    ]


def test_the_live_suite_is_skipped_visibly_where_there_is_no_server() -> None:
    """With what to give in the reason."""
    code, said = suite()
    assert code == 0, said
    assert re.search(r"tests: 0 passed, 0 failed, \d\d skipped", said), said
    assert "give --ollama URL and --model NAME" in said


def test_the_simulated_server_runs_out_of_memory_and_goes_wrong_as_told() -> None:
    """A context that fits nowhere, a machine without a card, and a share of requests that fail."""
    with simulated("--model", "oom-d=2", "--vram-mib", "0", "--load-ms", "10") as url, requests.Session() as session:
        session.trust_env = False
        body = {"model": "oom-d", "options": {"num_ctx": 1_000_000}}
        answer = session.post(f"{url}/api/generate", json=body, timeout=30)
        assert (answer.status_code, "insufficient memory" in answer.json()["error"]) == (500, True)
        assert session.post(f"{url}/api/generate", json={"model": "oom-d"}, timeout=30).status_code == 200
        assert [m["size_vram"] for m in session.get(f"{url}/api/ps", timeout=30).json()["models"]] == [0]
    with simulated("--fault", "ps.http_503=1", "--fault", "load.oom=1") as url, requests.Session() as session:
        session.trust_env = False
        assert session.get(f"{url}/api/ps", timeout=30).status_code == 503
        assert session.get(f"{url}/api/tags", timeout=30).json()["models"][0]["name"] == "qwen2.5vl:7b"
        answer = session.post(f"{url}/api/generate", json={"model": "qwen2.5vl:7b"}, timeout=30)
        assert "out of memory" in answer.json()["error"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "tiny"], "NAME=NUMBER"),
        (["--model", "tiny=0"], "above 0"),
        (["--fault", "oom=2"], "at most 1"),
        (["--fault", "flood=0.1"], "is not known"),
        (["--fault", "ps.oom=0.1"], "is not known"),
        (["--version", "0.1"], "0.24"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing listens."""
    assert main(["simulate-ollama", "--port", "0", *options]) == ExitCode.USAGE
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


def test_a_port_that_is_taken_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """With the system's word for it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["simulate-ollama", "--port", str(port)]) == ExitCode.USAGE
    assert f"port {port} cannot be used: Address already in use" in capsys.readouterr().err
