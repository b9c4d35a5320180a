"""Real processes: the host is killed in the middle, forks, or ends with everything running.

The simulated Ollama is a process of its own behind a real socket, so that nothing but the program under test dies with
it.  What is judged is what that server lists, and how the program ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from gpu_fsm import GPUResourceConfig, GPUResourceManager
from gpu_fsm.simulation import SimulatedWorld
from tests.waiting import PATIENCE_S, ROOT, run_python, until

VLM = "sim-vlm:7b"
LOAD_S = 0.6

QUICK: dict[str, Any] = {
    "vlm_model": VLM,
    "clip_model": None,
    "on_partial_offload": "accept",
    "idle_timeout_s": 1.0,
    "keep_alive_margin_s": 0.5,
    "settle_timeout_s": 1.0,
    "settle_poll_s": 0.02,
    "drain_timeout_s": 0.3,
    "shed_drain_s": 0.2,
    "check_interval_s": 0.3,
}
KEPT_S = 1.5
"""Idle time-out and margin: how long anything of ours may outlive us."""


class Server:
    """`gpu-fsm simulate-ollama` in a process of its own."""

    def __init__(self, *options: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpu_fsm", "simulate-ollama", "--port", "0", "--model", f"{VLM}=4000", *options],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().rsplit(" ", 1)[-1].strip()
        assert self.url.startswith("http://127.0.0.1:")

    def listed(self) -> list[dict[str, Any]]:
        """What `/api/ps` says."""
        with urllib.request.urlopen(f"{self.url}/api/ps", timeout=PATIENCE_S) as answer:
            models: list[dict[str, Any]] = json.load(answer)["models"]
            return models

    def close(self) -> None:
        """End it, and see that it ended well."""
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate(timeout=PATIENCE_S)
        assert self._process.returncode == 0


@contextlib.contextmanager
def simulated_ollama(*options: str) -> Iterator[Server]:
    """A server for the time of a block."""
    server = Server(*options)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def ollama() -> Iterator[Server]:
    """One server for the tests that need nothing special of it, empty before each."""
    with simulated_ollama("--load-ms", str(int(LOAD_S * 1e3)), "--unload-ms", "100", "--reclaim-ms", "50") as server:
        yield server


@pytest.fixture
def empty(ollama: Server) -> Server:
    """The server, with nothing loaded."""
    until(lambda: not ollama.listed())
    return ollama


def config(url: str, **settings: Any) -> GPUResourceConfig:
    """Settings whose time limits a test can wait for."""
    return GPUResourceConfig(ollama_url=url, **{**QUICK, **settings})


PROLOGUE = f"""
import asyncio, atexit, contextlib, os, signal, sys, threading
from gpu_fsm.errors import GPUFSMError, LeaseLost, ManagerClosed
from gpu_fsm import GPUResourceConfig, GPUResourceManager
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation import RunningClock, SimulatedCLIP, SimulatedWorld

SETTINGS = {QUICK!r}

def made(url, clip=None, **settings):
    config = GPUResourceConfig(ollama_url=url, **{{**SETTINGS, **settings}})
    world = SimulatedWorld(gpu=False)
    return GPUResourceManager(config, vram_probe=world.probe, clip_host=clip)

def say(*words):
    print(*words, flush=True)
"""
"""What every process under test begins with.  It has no card, so there is no lock to share with other tests."""


class Host:
    """A program that embeds the manager, to be killed."""

    def __init__(self, code: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROLOGUE + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def wait_for(self, word: str) -> None:
        """Read until the program says this."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == word:
                return
        pytest.fail(f"it ended without saying {word}")

    def kill(self) -> float:
        """SIGKILL; returns when, on the monotonic clock."""
        self._process.kill()
        self._process.communicate(timeout=PATIENCE_S)
        assert self._process.returncode == -signal.SIGKILL
        return time.monotonic()


def restarted(url: str) -> str:
    """Start again after a death: the mode is given, what is found is adopted, and a close leaves nothing.

    Returns the evidence: `reported` where the VLM of the dead one was taken over, `measured` or `none` otherwise.
    """
    world = SimulatedWorld(gpu=False)
    with GPUResourceManager(config(url, idle_timeout_s=60.0), vram_probe=world.probe) as manager:
        assert manager.set_execution_mode("recording", timeout_s=PATIENCE_S).granted
        with manager.vlm(timeout_s=PATIENCE_S) as vlm:
            assert vlm.generate("x").done
        evidence = manager.get_status().evidence
        assert manager.set_execution_mode("autopilot", timeout_s=PATIENCE_S).granted
    return evidence


# --- SIGKILL ----------------------------------------------------------------------------------------------------------

MOMENTS = {
    "loading": "manager.set_execution_mode('recording')",
    "recording": """
manager.set_execution_mode('recording')
with manager.vlm() as vlm:
    vlm.generate('x')
say('recording')
threading.Event().wait()
""",
    "releasing": """
manager.set_execution_mode('recording')
armed.append(1)
manager.set_execution_mode('autopilot')
""",
    "leased": """
lease = manager.vlm()
lease.__enter__()
say('leased')
threading.Event().wait()
""",
}
KILL = """
armed = [1] if {moment!r} == 'loading' else []
manager = made({url!r})
manager.subscribe(lambda event: armed and event.new.value == {moment!r} and say({moment!r}), 'state_changed')
{act}
"""


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("loading", id="F24-killed-in-a-load"),
        pytest.param("recording", id="E07-killed-with-the-vlm-in"),
        pytest.param("releasing", id="E07-killed-in-a-release"),
    ],
)
def test_what_a_killed_program_leaves_behind_goes_by_itself(empty: Server, moment: str) -> None:
    """Nobody is left to give anything back, and nothing stays: no keep_alive of ours is for ever."""
    host = Host(KILL.format(url=empty.url, moment=moment, act=MOMENTS[moment]))
    host.wait_for(moment)
    died_at = host.kill()
    assert all(
        not model["expires_at"].startswith("2") or int(model["expires_at"][:4]) < 2100 for model in empty.listed()
    )
    until(lambda: not empty.listed())
    assert time.monotonic() - died_at < KEPT_S + LOAD_S + 3.0


@pytest.mark.parametrize(
    "moment",
    [pytest.param(m, id=f"{'F24' if m == 'loading' else 'E07'}-{m}") for m in ("loading", "leased", "releasing")],
)
def test_the_next_program_finds_a_whole_world(empty: Server, moment: str) -> None:
    """Started at once, while the dead one's traces are still there: it adopts or loads, and leaves nothing."""
    host = Host(KILL.format(url=empty.url, moment=moment, act=MOMENTS[moment]))
    host.wait_for(moment)
    host.kill()
    evidence = restarted(empty.url)
    assert evidence in ("reported", "measured", "none")
    assert moment not in ("recording", "leased") or evidence == "reported"
    assert empty.listed() == []


# --- fork -------------------------------------------------------------------------------------------------------------

FORKING = ("-W", "ignore::DeprecationWarning")
"""Newer Pythons warn of a fork beside threads; that it is safe here is what is tested."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("mode", ["recording", "autopilot"])
def test_a_forked_child_that_ends_takes_nothing_away(empty: Server, mode: str) -> None:
    """At every stable point: the child ends as a program ends, exit handlers and all, and the parent works on."""
    run_python(
        PROLOGUE
        + f"""
manager = made({empty.url!r}, idle_timeout_s=60)
assert manager.set_execution_mode({mode!r}, timeout_s=30).granted
lease = manager.vlm() if {mode!r} == 'recording' else None
if lease:
    vlm = lease.__enter__()
pid = os.fork()
if pid == 0:
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert manager.get_status().state.value == {mode!r}
if lease:
    assert vlm.generate('x').done
    lease.__exit__(None, None, None)
assert manager.set_execution_mode('recording', timeout_s=30).granted
""",
        options=FORKING,
    )
    assert empty.listed() == []


# --- the interpreter ends ---------------------------------------------------------------------------------------------

ENDINGS = {
    "a load": """
manager = made(URL, vlm_load_deadline_s=60)
loading = threading.Event()
manager.subscribe(lambda event: event.new.value == 'loading' and loading.set(), 'state_changed')
manager.submit_execution_mode('recording')
assert loading.wait(20)
""",
    "an answer and an encode": """
class Slow(SimulatedCLIP):
    def encode(self, items, **options):
        encoding.set()
        threading.Event().wait(60)
manager = made(URL, Slow(clock=RunningClock(), card=None), clip_model='x')
encoding, asking = threading.Event(), threading.Event()
def encode():
    with manager.clip() as clip:
        clip.encode(['x'])
def ask():
    try:
        with manager.vlm() as vlm:
            asking.set()
            while True:
                vlm.generate('x')
    except (LeaseLost, ManagerClosed):
        pass
for work in (encode, ask):
    threading.Thread(target=work, daemon=True).start()
assert encoding.wait(20) and asking.wait(20)
""",
    "a listener": """
manager = made(URL)
listening = threading.Event()
def listen(event):
    listening.set()
    threading.Event().wait(60)
manager.subscribe(listen)
manager.set_execution_mode('recording', timeout_s=20)
assert listening.wait(20)
""",
    "everything": """
manager = made(URL)
def agent(mode):
    while True:
        try:
            manager.set_execution_mode(mode, preempt=mode == 'idle', timeout_s=5)
            with manager.vlm(timeout_s=5) as vlm:
                vlm.generate('x')
        except ManagerClosed:
            return
        except GPUFSMError:
            pass
for mode in ('recording', 'autopilot', 'idle'):
    threading.Thread(target=agent, args=(mode,), daemon=True).start()
manager.subscribe(lambda event: None)
manager.submit_execution_mode('recording')
""",
}


NOISY = """
manager = made(URL, drain_timeout_s=1)
lease = manager.vlm()
lease.__enter__()
threading.Thread(target=manager.set_execution_mode, args=('autopilot',), daemon=True).start()
while not manager._driver.engine.waiting:
    pass
"""


def test_a_daemon_thread_that_waits_dies_silently_with_its_program(empty: Server) -> None:
    """As daemon threads do: what it waited for will never come, and nobody is there to be told."""
    try:
        run_python(PROLOGUE + f"URL = {empty.url!r}\n" + NOISY)
    finally:
        until(lambda: not empty.listed())


@pytest.mark.parametrize("running", ENDINGS)
def test_a_program_may_end_with_this_under_way(empty: Server, running: str) -> None:
    """Exit code 0, not a word on stderr, soon, and the server is empty."""
    began = time.monotonic()
    run_python(PROLOGUE + f"URL = {empty.url!r}\n" + ENDINGS[running])
    assert time.monotonic() - began < 20.0
    until(lambda: not empty.listed())


LOOPS = {
    "F23-tasks-left-when-run-ends": """
async def main():
    manager = made(URL)
    tasks = [asyncio.create_task(manager.aio.set_execution_mode(mode)) for mode in ('recording', 'autopilot')]
    await asyncio.sleep(0.1)
asyncio.run(main())
""",
    "F23-an-answer-in-the-executor": """
async def main():
    manager = made(URL)
    async with manager.aio.vlm() as vlm:
        task = asyncio.create_task(vlm.generate('x'))
        await asyncio.sleep(0.05)
        task.cancel()
asyncio.run(main())
""",
    "F23-a-loop-in-a-daemon-thread": """
manager = made(URL)
begun = threading.Event()
async def main():
    begun.set()
    with contextlib.suppress(ManagerClosed):
        await manager.aio.set_execution_mode('recording')
    await asyncio.Event().wait()
threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
assert begun.wait(20)
""",
    "F23-closed-by-its-own-loop": """
async def main():
    async with made(URL) as manager:
        await manager.aio.set_execution_mode('recording')
asyncio.run(main())
""",
}


@pytest.mark.parametrize("case", [pytest.param(code, id=name) for name, code in LOOPS.items()])
def test_a_program_may_end_with_a_loop_alive(empty: Server, case: str) -> None:
    """The loop's own rules say what becomes of its tasks; of ours there is no traceback and no delay."""
    began = time.monotonic()
    run_python(PROLOGUE + f"URL = {empty.url!r}\n" + case)
    assert time.monotonic() - began < 20.0
    until(lambda: not empty.listed())


@pytest.mark.parametrize("dev", [pytest.param(False, id="F22-plainly"), pytest.param(True, id="F22-with-all-warnings")])
def test_at_exit_no_thread_is_needed_that_is_not_there_yet(empty: Server, dev: bool) -> None:
    """Newer Pythons refuse to start one then, so here every Python does."""
    run_python(
        PROLOGUE
        + f"""
manager = made({empty.url!r}, idle_timeout_s=60)
assert manager.set_execution_mode('recording', timeout_s=30).granted
def refuse(self):
    raise RuntimeError("can't create new thread at interpreter shutdown")
atexit.register(setattr, threading.Thread, 'start', refuse)
""",
        options=("-W", "error") if dev else (),
    )
    assert empty.listed() == []


def test_ctrl_c_ends_a_program_with_everything_given_back(empty: Server) -> None:
    """SIGINT while the main thread waits for a load: the user's traceback, no other, and the server is empty."""
    host = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PROLOGUE
            + f"""
manager = made({empty.url!r})
manager.subscribe(lambda event: event.new.value == 'loading' and say('loading'), 'state_changed')
try:
    manager.set_execution_mode('recording')
except KeyboardInterrupt:
    sys.exit(130)
""",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert host.stdout is not None
    assert host.stdout.readline() == "loading\n"
    host.send_signal(signal.SIGINT)
    _, said = host.communicate(timeout=PATIENCE_S)
    assert (host.returncode, said) == (130, "")
    until(lambda: not empty.listed())


@pytest.mark.needs_torch
def test_a_program_may_end_in_the_middle_of_a_real_encode(empty: Server) -> None:
    """Torch at work in a daemon thread when the interpreter goes."""
    # Far fewer threads than cores: what is tested is the end and not the work.
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HOME": "/nonexistent",
    }
    run_python(
        PROLOGUE
        + f"""
import warnings
warnings.simplefilter('ignore')
from gpu_fsm.clip import CLIPManager
from tests.tools.storm import tiny
config = GPUResourceConfig(ollama_url={empty.url!r}, **{{**SETTINGS, 'clip_model': 'tiny', 'clip_device': 'cpu'}})
host = CLIPManager(config, model=tiny())
host.prepare()
manager = GPUResourceManager(config, clip_host=host, vram_probe=SimulatedWorld(gpu=False).probe)
encoding = threading.Event()
def encode():
    with manager.clip() as clip:
        with contextlib.suppress(ManagerClosed):
            while True:
                clip.encode(['a window'] * 8)
                encoding.set()
threading.Thread(target=encode, daemon=True).start()
assert encoding.wait(20)
manager.set_execution_mode('recording', timeout_s=20)
""",
        env=quiet,
    )
    until(lambda: not empty.listed())
