"""The `ollama` package's own example programs, unchanged, at a simulated Ollama and at the gateway in front of it.

`python -m tests.strangers` runs each and says which agree.  They come from the package's source distribution, which pip
fetches into a temporary folder: nothing of it is kept here.  With frozen times an example has to print the same to the
letter at both doors.  `--suite` runs the package's own test suite through a gateway instead.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from attrs import frozen

from gpu_fsm import GPUResourceConfig, GPUResourceManager
from gpu_fsm.appconfig import GatewayConfig
from gpu_fsm.gateway.relay import Relay
from gpu_fsm.gateway.serve import Gateway
from gpu_fsm.intercept.doors import TAGS
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.ports import RealClock
from gpu_fsm.simulation import (
    RunningClock,
    SimulatedCard,
    SimulatedModel,
    SimulatedOllama,
    SimulatedProbe,
    serve,
)
from gpu_fsm.simulation.faults import Fault, Faults
from tests.gateways import QUICK, answer_text
from tests.waiting import ROOT, until

ABILITIES = ("completion", "vision", "tools", "thinking", "insert", "embedding")
MODELS = (
    "gemma4",
    "codellama:7b-code",
    "deepseek-r1",
    "gpt-oss:20b",
    "llama3.1",
    "llama3.1:8b",
    "llama3.2",
    "qwen3",
)
"""What the examples want, and the server has; each is the managed one in turn."""
NEEDS_WEB = re.compile(r"\bweb_(search|fetch)|httpx\.get")
CHANGES_BY_THE_CLOCK = re.compile(rb"(?m)^  Expires at: .*$")
"""A moment of the real clock, and by whose keep_alive is what the gateway is there to decide."""
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc000000301010018dd8db0"
    "0000000049454e44ae426082"
)
TYPED = {"chat-with-history": "And in Oslo?\nAnd in Rome?\n", "multimodal-chat": "seen.png\n"}
TYPED["structured-outputs-image"] = TYPED["multimodal-chat"]
"""What a person would type; `chat-with-history` asks for ever and ends with its input."""

RUNNER = """
import gc, os, random, runpy, signal, sys, traceback
import ollama
gc.freeze()
for line in sys.stdin:
    example, typed, out, err = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        for target, path, flags in ((0, typed, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
            os.dup2(os.open(path, flags), target)
        sys.stdin = open(0)
        random.seed(7)
        sys.argv = [example]
        code = 1
        try:
            runpy.run_path(example, run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)  # taking the copied process apart would take longer than the example
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""Imports the package once; every example runs in a copy of that process."""


class Unreachable(Exception):
    """The registry cannot be reached, or does not have it."""


@frozen(kw_only=True)
class Run:
    """What came of one example at one door."""

    code: int
    out: bytes
    problem: str
    """The last line of a traceback."""
    ran: int
    """Requests that ran a model."""
    leased: int
    """Those of them that ran under a lease of the managed one."""


@frozen(kw_only=True)
class Verdict:
    """One example at all doors."""

    name: str
    model: str
    direct: Run
    as_vlm: Run
    """Through the gateway, the model it wants being the managed one."""
    as_other: Run
    """Through the gateway, another one being the managed one."""

    @property
    def agrees(self) -> bool:
        """Whether nobody can tell the doors apart, and the managed model ran under leases only."""
        seen = {(run.code, run.out, run.problem, run.ran) for run in (self.direct, self.as_vlm, self.as_other)}
        return len(seen) == 1 and self.as_vlm.leased == (self.as_vlm.ran if self.model in MODELS else 0)


def fetch(folder: Path) -> Path:
    """The source distribution of the installed version, unpacked in `folder`; raises `Unreachable`."""
    wanted = f"ollama=={importlib.metadata.version('ollama')}"
    options = ["--no-deps", "--no-binary", "ollama", "--disable-pip-version-check", "--retries", "1", "--timeout", "10"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", *options, "-d", folder, wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    found = list(folder.glob("ollama-*.tar.gz"))
    if not found:
        said = done.stderr.strip().splitlines() or ["no file came"]
        raise Unreachable(f"pip cannot fetch the source distribution of {wanted}: {said[-1]}")
    with tarfile.open(found[0]) as packed:
        packed.extractall(folder, filter="data")
    return next(path for path in folder.glob("ollama-*") if path.is_dir())


class Watched(Faults):
    """No faults; tells of every request before it is served."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def take(self, op: str) -> Fault | None:
        """See `Faults.take`."""
        self._tell(op)
        return super().take(op)


class Street:
    """A simulated Ollama that has all of `MODELS`, and at one address a gateway for one of them after the other."""

    def __init__(self) -> None:
        self.leases: list[bool] = []
        """For each request since the last reset that runs a model, whether it was leased."""
        self.manager: GPUResourceManager | None = None
        self._clock = RunningClock()
        self._card = SimulatedCard(8192.0, clock=self._clock)
        self._has = [SimulatedModel(name=name, size_mib=2000.0, load_s=0.02, capabilities=ABILITIES) for name in MODELS]
        self.ollama = SimulatedOllama(
            self._has,
            clock=self._clock,
            card=self._card,
            unload_s=0.01,
            reclaim_s=0.01,
            latency_s=0.0,
            generate_s=0.02,
            frozen=True,
            registry=self._has,
            pull_s=0.02,
            faults=Watched(self._look),
        )
        self._fitting = self.ollama.responder
        self._models = dict(self.ollama.models)
        self.front = serve(self.ollama)
        self._port = 0

    def close(self) -> None:
        """End the server."""
        self.front.close()
        self._clock.close()

    def _look(self, op: str) -> None:
        if op == "ollama.generate":
            self.leases.append(self.manager is not None and bool(self.manager.get_status().leases))

    def reset(self, *, fitting: bool) -> None:
        """Nothing is loaded, nothing was made; `fitting` answers fit the schema that is asked for."""
        if self.manager is not None:
            self.manager.ensure_vlm_unloaded()
        for name in self.ollama.loaded():
            self.ollama.foreign_unload(name)
        until(lambda: not self.ollama.loaded())
        self.ollama.models.clear()
        self.ollama.models.update(self._models)
        self.ollama.responder = self._fitting if fitting else answer_text
        self.ollama.log.clear()
        self.leases.clear()

    def wanted(self) -> str:
        """The first model that somebody has asked for since the last reset."""
        bodies = [entry.body for entry in self.ollama.log if isinstance(entry.body, dict)]
        names = [str(body.get("from") or body.get("model")) for body in bodies if body.get("model")]
        return names[0] if names else ""

    @contextlib.contextmanager
    def gateway(self, vlm: str) -> Iterator[str]:
        """A manager of `vlm` alone and its gateway, whose address is always the same."""
        settings = {"ollama_url": self.front.url, "vlm_model": vlm, "vlm_size_mib": 2000.0, "clip_model": None, **QUICK}
        probe = SimulatedProbe(clock=self._clock, card=self._card)
        with GPUResourceManager(GPUResourceConfig(**settings), vram_probe=probe) as self.manager:
            listen = GatewayConfig(listen=f"127.0.0.1:{self._port}", shutdown_s=1.0)
            with Gateway(self.manager, listen) as made:
                self._port = made.port
                yield made.url
            assert self.manager.get_status().leases == ()
        self.manager = None


class Door:
    """A process that runs examples against one address."""

    def __init__(self, url: str, folder: Path) -> None:
        self._folder = folder
        environ = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUNNER],
            cwd=folder,
            env={**environ, "OLLAMA_HOST": url, "PYTHONHASHSEED": "0", "NO_COLOR": "1", "COLUMNS": "120"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, example: Path, street: Street) -> Run:
        """Run one."""
        street.reset(fitting="format=" in example.read_text(encoding="utf-8"))
        talk: tuple[IO[str] | None, ...] = (self._process.stdin, self._process.stdout)
        asked, told = talk
        assert asked is not None
        assert told is not None
        files = [self._folder / name for name in ("typed", "out", "err")]
        for path, text in zip(files, (TYPED.get(example.stem, ""), "", ""), strict=True):
            path.write_text(text, encoding="utf-8")
        asked.write("\t".join(map(str, (example, *files))) + "\n")
        asked.flush()
        code = int(told.readline())
        problem = (files[2].read_text(encoding="utf-8").strip().splitlines() or [""])[-1] if code else ""
        out = CHANGES_BY_THE_CLOCK.sub(b"", files[1].read_bytes())
        return Run(code=code, out=out, problem=problem, ran=len(street.leases), leased=sum(street.leases))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def examples_of(source: Path) -> dict[bool, list[Path]]:
    """Every example, by whether it needs web services."""
    found: dict[bool, list[Path]] = {True: [], False: []}
    for path in sorted((source / "examples").glob("*.py")):
        found[NEEDS_WEB.search(path.read_text(encoding="utf-8")) is not None].append(path)
    return found


def compare(examples: list[Path]) -> list[Verdict]:
    """Run every example at every door."""
    runs: dict[Path, dict[str, Run]] = {path: {} for path in examples}
    models: dict[Path, str] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "seen.png").write_bytes(PNG)
        street = stack.enter_context(contextlib.closing(Street()))
        direct = stack.enter_context(contextlib.closing(Door(street.front.url, folder)))
        for path in examples:
            runs[path]["direct"] = direct.run(path, street)
            models[path] = street.wanted()
        through: Door | None = None
        for vlm in MODELS:
            other = MODELS[MODELS.index(vlm) - 1]
            with street.gateway(vlm) as url:
                if through is None:
                    through = stack.enter_context(contextlib.closing(Door(url, folder)))
                for path in examples:
                    model = models[path] if models[path] in MODELS else MODELS[0]
                    if model in (vlm, other):
                        runs[path]["as_vlm" if model == vlm else "as_other"] = through.run(path, street)
    return [Verdict(name=path.stem, model=models[path], **runs[path]) for path in examples]


SUITE = """
import pytest
from tests.strangers import relayed

@pytest.fixture(scope="session")
def door(make_httpserver):
    with relayed(make_httpserver.url_for("")) as url:
        yield url

@pytest.fixture
def httpserver(httpserver, door):
    httpserver.url_for = lambda suffix: door + suffix
    yield httpserver
"""
"""Laid beside the package's tests: their fake server is told under the gateway's address."""


@contextlib.contextmanager
def relayed(url: str) -> Iterator[str]:
    """A gateway in front of the server at `url`, whose manager takes `dummy` into a simulated Ollama of its own."""
    clock = RunningClock()
    model = SimulatedModel(name="dummy", size_mib=2000.0, load_s=0.0)
    own = SimulatedOllama([model], clock=clock, unload_s=0.0, latency_s=0.0)
    settings = {"vlm_model": "dummy", "clip_model": None, **QUICK}
    with serve(own) as front:
        at_own = OllamaManager(GPUResourceConfig(ollama_url=front.url, **settings), clock=RealClock())
        config = GPUResourceConfig(ollama_url=url, **settings)

        async def tags(relay: Relay) -> bytes:
            return (await relay._http.get(front.url + TAGS)).content

        with GPUResourceManager(config, vlm_server=at_own) as manager, pytest.MonkeyPatch.context() as patch:
            # Their server wants its requests in a strict order, so the gateway's own question goes elsewhere.
            patch.setattr(Relay, "_tags", tags)
            with Gateway(manager, GatewayConfig(listen="127.0.0.1:0", shutdown_s=1.0)) as made:
                yield made.url
            sys.stderr.write(f"\nloads of dummy: {own.counts['loads']}, left over: {manager.get_status().leases}\n")
    clock.close()


def run_suite(source: Path, folder: Path) -> int:
    """The package's own tests with the gateway between its client and its fake server; pytest's exit code."""
    needed = ["pytest-httpserver", "werkzeug", "markupsafe"]
    quiet = ["-q", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, "--target", folder, *needed], check=True)
    (source / "tests" / "conftest.py").write_text(SUITE, encoding="utf-8")
    paths = os.pathsep.join((str(folder), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", "--rootdir", source, source / "tests"],
        cwd=source,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    return done.returncode


def main() -> int:
    """Say which examples agree; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="store_true", help="the package's test suite instead of its examples")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.suite:
            return run_suite(fetch(Path(folder)), Path(folder, "more"))
        examples = examples_of(fetch(Path(folder)))
        verdicts = compare(examples[False])
    for verdict in verdicts:
        how = "agrees" if verdict.agrees else "DIFFERS"
        problem = f"; ends with {verdict.direct.problem}" if verdict.direct.code else ""
        leases = f"{verdict.as_vlm.leased} of {verdict.as_vlm.ran} leased"
        print(f"{verdict.name:26} {verdict.model:18} {how}, {len(verdict.direct.out)} bytes, {leases}{problem}")
        if not verdict.agrees:
            for run in (verdict.direct, verdict.as_vlm, verdict.as_other):
                print("   ", run)
    print(f"left out, they need web services: {', '.join(path.stem for path in examples[True])}")
    return not all(verdict.agrees for verdict in verdicts)


if __name__ == "__main__":
    sys.exit(main())
