"""`gpu-fsm run` in front of an Ollama in another process, killed at any point and started again.

Twenty points are tried in every run of the tests.  `python -m pytest tests/test_run_kill.py --kill-seed 7` tries twenty
others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.needs_torch
pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

from gpu_fsm.agent import FusionEngine  # noqa: E402
from gpu_fsm.control import ControlClient, ControlRefused  # noqa: E402
from gpu_fsm.simulation import LogEntry, RunningClock, SimulatedCard, SimulatedModel, SimulatedOllama, serve  # noqa: E402
from tests.tools.forker import Forker, Run  # noqa: E402
from tests.tools.hub import Hub  # noqa: E402
from tests.waiting import PATIENCE_S, ROOT, until  # noqa: E402

DATA = Path(__file__).resolve().parents[1] / "gpu_fsm" / "data"
VLM = "kill-vlm:7b"
VLM_MIB, DRIVER_MIB = 5000.0, 300.0
LOAD_S = 0.3
KILLS = 20


class Bench:
    """The server, which lives through everything, and the agent, which does not."""

    def __init__(self, forker: Forker, folder: Path) -> None:
        entries = json.loads((DATA / "screens" / "manifest.json").read_text(encoding="utf-8"))["screens"]
        self.files = [entry["file"] for entry in entries if entry["kind"] in ("base", "unknown")]
        self.files += [entry["file"] for entry in entries if entry["kind"] == "variation"]
        self.labels = {entry["sha256"]: entry["label"] for entry in entries}
        self.digests = {entry["file"]: entry["sha256"] for entry in entries}
        self.forker = forker
        self.folder = folder
        self.screens = folder / "screens"
        self.screens.mkdir()
        self.memory = folder / "memory.npz"
        self.clock = RunningClock()
        self.card = SimulatedCard(8192.0, clock=self.clock, driver_mib=DRIVER_MIB)
        self.server = SimulatedOllama(
            [SimulatedModel(name=VLM, size_mib=VLM_MIB, load_s=LOAD_S)],
            clock=self.clock,
            card=self.card,
            reclaim_s=0.02,
            unload_s=0.02,
            generate_s=0.01,
            responder=self._look,
        )
        self.runs = 0

    def _look(self, _model: str, _prompt: str, images: list[bytes]) -> str:
        label = self.labels.get(hashlib.sha256(images[0]).hexdigest(), "unknown") if images else "unknown"
        return json.dumps({"label": label, "summary": "a screen"})

    def show(self, count: int) -> None:
        """Have this many screens in the folder."""
        for file in self.files[:count]:
            if not (self.screens / file).exists():
                shutil.copy(DATA / "screens" / file, self.screens)

    def start(self, url: str, mode: str | None, die: tuple[str, int, float] | None, *more: str) -> Run:
        """Start the agent over the folder."""
        self.runs += 1
        options = {
            "--screens": self.screens,
            "--memory": self.memory,
            "--ollama-url": url,
            "--vlm-model": VLM,
            "--clip-model": DATA / "tiny-clip",
            "--settle-timeout-s": 1,
            "--blind-settle-s": 0,
        }
        argv = ["run", *(str(word) for pair in options.items() for word in pair)]
        argv += [*(["--mode", mode] if mode else []), *more]
        return self.forker.start(argv, self.folder / f"{self.runs}.log", die=die)

    def kill_in_a_load(self, run: Run, begun: int, share: float) -> None:
        """Kill it when so much of a load is over that has come after the first `begun` requests."""
        until(lambda: run.ended.is_set() or any(_loads(entry) for entry in self.log()[begun:]))
        threading.Event().wait(share * LOAD_S)
        run.kill()

    def log(self) -> list[LogEntry]:
        """What the server has seen."""
        with self.clock.turn:
            return list(self.server.log)

    def remembered(self) -> dict[str, str]:
        """Digest -> label, as the file says; an empty one where there is none yet."""
        if not self.memory.exists():
            return {}
        memory = FusionEngine.load(self.memory)
        digests = json.loads(bytes(_member(self.memory, "about")))["digests"]
        return dict(zip(digests, memory.labels, strict=True))


def _member(path: Path, name: str) -> Any:
    import numpy as np

    with np.load(path, allow_pickle=False) as stored:
        return stored[name]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Where `somebody/tiny` can be fetched from; the hub's client reads these variables when it is imported."""
    with Hub(DATA / "tiny-clip") as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HUB_OFFLINE", "0")  # other tests of the same run forbid it
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        yield hub


@pytest.fixture(scope="module")
def forker(hub: Hub) -> Iterator[Forker]:
    """torch, imported once."""
    with Forker() as forker:
        yield forker


@pytest.fixture
def bench(forker: Forker, tmp_path: Path) -> Iterator[Bench]:
    """A server with nothing loaded."""
    bench = Bench(forker, tmp_path)
    yield bench
    bench.clock.close()


def test_an_agent_killed_at_twenty_points_loses_only_the_screen_in_hand(
    bench: Bench, pytestconfig: pytest.Config
) -> None:
    """Each restart finds what is resident, keeps what was recorded, asks about nothing twice, and goes on."""
    rng = random.Random(int(pytestconfig.getoption("--kill-seed")))
    points = ["load", "encode", "write", "any"] * (KILLS // 4)
    rng.shuffle(points)
    killed: Counter[str] = Counter()
    told: set[str] = set()  # screens that an agent has said to be recorded
    with serve(bench.server) as front:
        for number, point in enumerate(points, 1):
            bench.show(2 * number)
            before, resident = bench.remembered(), bench.server.loaded()
            assert {bench.digests[name] for name in told} <= set(before), "a recorded screen was forgotten"
            if point == "load" and resident:
                bench.server.foreign_unload(VLM)
                until(lambda: not bench.server.loaded())
                resident = ()
            begun = len(bench.log())
            die = {"encode": ("encode", rng.randint(1, 250), 0.0), "write": ("write", rng.randint(1, 4), rng.random())}
            run = bench.start(front.url, "recording", die.get(point))
            if point == "load":
                bench.kill_in_a_load(run, begun, rng.random())
            elif point == "any":
                asked = rng.randint(1, 6)
                until(lambda: run.ended.is_set() or len(bench.log()) >= begun + asked)  # noqa: B023 - within the turn
                run.kill()
            code = run.wait()
            said = run.out.read_text(encoding="utf-8")
            assert code in (0, -signal.SIGKILL), said
            killed[point] += code == -signal.SIGKILL
            _check(bench, bench.log()[begun:], before, resident, said)
            told |= set(re.findall(r"^  (\S+) +labelled by the VLM", said, re.MULTILINE))
        assert sum(killed.values()) >= KILLS - 3, killed  # a run may be over before its point
        assert set(killed) == set(points)

        until(lambda: all(entry.ended_at is not None for entry in bench.log()))
        last = bench.start(front.url, None, None)
        assert last.wait() == 0, last.out.read_text(encoding="utf-8")
        said = last.out.read_text(encoding="utf-8")
        after = bench.remembered()
        assert len(after) == 2 * KILLS
        assert all(bench.labels[digest] == label for digest, label in after.items())
        assert re.search(rf"recognised: {2 * KILLS}\b", said), said
        assert [path.name for path in bench.folder.glob(".*")] == [], "writers that were killed left nothing behind"
        until(lambda: bench.card.used_mib <= DRIVER_MIB + 1.0)
        assert not bench.server.loaded(), "the last one gave back what it had taken over"


def _check(bench: Bench, log: list[LogEntry], before: dict[str, str], resident: tuple[str, ...], said: str) -> None:
    after = bench.remembered()
    assert before.items() <= after.items(), "what was saved stays as it was"
    assert all(bench.labels[digest] == label for digest, label in after.items())
    asked = Counter(_picture(entry) for entry in log if entry.op == "ollama.generate")
    assert not set(asked) & set(before), "a screen that is remembered is not asked about again"
    assert max(asked.values(), default=0) <= 1
    assert len(set(asked) - set(after)) <= 1, "more than the screen in hand was lost"
    loads = [entry for entry in log if _loads(entry)]
    if resident and "RECORDING, CLIP" in said:
        assert not loads, "a VLM that is resident is taken over, not loaded again"
    assert len(loads) <= 1
    assert all(entry.outcome in ("ok", "client left", "pending") for entry in log), [entry.outcome for entry in log]


def _loads(entry: LogEntry) -> bool:
    return entry.op == "ollama.load"


def _picture(entry: LogEntry) -> str:
    import base64

    with contextlib.suppress(LookupError, TypeError):
        return hashlib.sha256(base64.b64decode(entry.body["images"][0])).hexdigest()
    return ""


# --- the same command, ended in other ways ----------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_in_the_middle_of_a_load_ends_the_command_and_gives_everything_back(
    bench: Bench, number: signal.Signals, code: int
) -> None:
    """No traceback, the counts at the end, nothing on the card."""
    bench.show(4)
    with serve(bench.server) as front:
        run = bench.start(front.url, None, None)
        until(lambda: run.ended.is_set() or any(_loads(entry) for entry in bench.log()))
        os.kill(run.pid, number)
        said = run.out.read_text(encoding="utf-8") if run.wait() != code else ""
        assert run.code == code, said
        assert "Traceback" not in run.out.read_text(encoding="utf-8")
        until(lambda: bench.card.used_mib <= DRIVER_MIB + 1.0)
        assert not bench.server.loaded()


def test_a_running_agent_is_reached_from_outside(bench: Bench) -> None:
    """Its status comes in the middle of its load; a mode asked for from outside is the agent's from then on."""
    bench.show(12)
    bench.server.generate_s = 0.2
    with serve(bench.server) as front:
        run = bench.start(front.url, "recording", None)
        until(lambda: run.ended.is_set() or any(_loads(entry) for entry in bench.log()))
        with ControlClient() as client:
            status = client.ask("status")
            assert status["asked_mode"] == "recording"
            assert client.ask("mode", wait_s=30.0, mode="autopilot")["granted"]
        run.wait()
        said = run.out.read_text(encoding="utf-8")
        assert "not recognised" in said, said


def gpu_fsm(*argv: str) -> dict[str, Any]:
    """Run a command in a process of its own; what it says as JSON."""
    command = [sys.executable, "-m", "gpu_fsm", *argv, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize("end", [signal.SIGINT, None])
def test_a_run_is_looked_at_and_ended_while_its_clip_is_fetched(
    bench: Bench, hub: Hub, end: signal.Signals | None
) -> None:
    """The download stands still meanwhile: the status says what is done and for how long, and Ctrl-C ends it at once.

    A mode that is asked for is what the agent begins with when CLIP is there, also where the asker waits no longer.
    """
    hub.hold()
    bench.show(2)
    with serve(bench.server) as front:
        run = bench.start(front.url, "recording", None, "--clip-model", "somebody/tiny")
        assert hub.held.wait(PATIENCE_S)
        status = gpu_fsm("status")
        assert re.match(r"loading CLIP somebody/tiny: \d+ s", status["doing"])
        with ControlClient() as client:
            until(lambda: re.search(r"[1-9]0 % of 2\d MiB fetched", client.ask("status")["doing"]))
        assert (status["state"], status["clip_device"]) == ("idle", "cpu")
        if end is not None:
            os.kill(run.pid, end)
            assert run.wait() == 130
            assert "Traceback" not in run.out.read_text(encoding="utf-8")
            return
        with ControlClient() as client:
            for question in ({"do": "vlm_load"}, {"do": "mode", "mode": "autopilot"}):
                with pytest.raises(ControlRefused, match="still starting: loading CLIP"):
                    client.ask(**question, timeout_s=0.01)
        assert not any(_loads(entry) for entry in bench.log())
        hub.let_go()
        assert run.wait() == 0
        said = run.out.read_text(encoding="utf-8")
    for tenth in r"[1-9]0", "100":
        assert re.search(rf"loading CLIP somebody/tiny: \d+ s \(CLIP's weights: {tenth} % of 2\d MiB", said), said
    assert "AUTOPILOT, CLIP on cpu" in said
    assert "RECORDING" not in said


def test_mode_idle_from_outside_pauses_a_run_until_another_mode_is_asked_for(bench: Bench) -> None:
    """The card is free meanwhile, and no screen is lost or asked about twice."""
    bench.show(6)
    bench.server.generate_s = 1.0
    with serve(bench.server) as front:
        run = bench.start(front.url, "recording", None)
        until(lambda: run.ended.is_set() or bench.server.loaded())
        with ControlClient() as client:  # at once, in the middle of the first question
            assert client.ask("mode", wait_s=PATIENCE_S, mode="idle")["granted"]
        bench.server.generate_s = 0.01
        until(lambda: bench.card.used_mib <= DRIVER_MIB + 1.0)
        until(lambda: gpu_fsm("status")["doing"].startswith("paused, since IDLE was asked for"))
        kept = len(bench.remembered())
        assert not bench.server.loaded()
        assert kept < 6
        assert gpu_fsm("mode", "recording")["granted"]
        assert run.wait() == 0
        said = run.out.read_text(encoding="utf-8")
    assert len(bench.remembered()) == 6
    assert "recorded: 6" in said, said
    assert max(Counter(_picture(entry) for entry in bench.log() if entry.op == "ollama.generate").values()) == 1


def test_a_memory_of_another_model_is_refused_and_kept(bench: Bench) -> None:
    """Bad input, in one line; the file is as it was."""
    import numpy as np

    bench.show(1)
    memory = FusionEngine(probe=np.arange(1, 65, dtype=np.float32))
    memory.add("a", np.ones(64, np.float32))
    memory.save(bench.memory)
    before = bench.memory.read_bytes()
    run = bench.start("http://127.0.0.1:9", None, None)
    assert run.wait() == 2
    assert "another CLIP model" in run.out.read_text(encoding="utf-8")
    assert bench.memory.read_bytes() == before


def test_a_missing_model_is_pulled_first(bench: Bench) -> None:
    """With --pull; progress is told, and the agent then works."""
    bench.show(2)
    model = bench.server.models.pop(VLM)
    bench.server.registry[VLM] = model
    bench.server.pull_s = 0.2
    with serve(bench.server) as front:
        run = bench.start(front.url, "recording", None, "--pull")
        assert run.wait() == 0
        said = run.out.read_text(encoding="utf-8")
    assert "50 % of 5000 MiB" in said
    assert "has been pulled" in said
    assert "recorded: 2" in said
