"""The doctor: in one healthy arrangement it has nothing to say; each arranged fault is named with its mend.

The card is that of the fake NVML under the real `pynvml`, Ollama is the simulated one behind a real socket, torch and
sentence-transformers are packages of a few lines that a child process really imports, and the rest of the machine is a
folder that looks like `/`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from gpu_fsm.appconfig import load_app_config
from gpu_fsm.cardlock import CardLock
from gpu_fsm.cli import ExitCode, main
from gpu_fsm.doctor import Check, Machine, examine
from gpu_fsm.simulation import Faults, OllamaHTTPServer, RunningClock, SimulatedModel, SimulatedOllama
from gpu_fsm.simulation.card import Card
from tests.tools import building, fake_nvml
from tests.tools.fake_nvml import FakeNVML
from tests.tools.ledger_card import LedgerCard
from tests.waiting import until

pytestmark = pytest.mark.core

VLM, OTHER, BLIND, HUGE = "sim-vlm:7b", "other:3b", "blind:7b", "huge:90b"
SIZE_MIB = 6000.0
FOR_EVER = -1

TORCH = """
__version__ = "{version}"
class version:
    cuda, hip = {cuda!r}, None
class cuda:
    @staticmethod
    def is_available():
        return {available}
"""
HUB = "def try_to_load_from_cache(name, file):\n    return '/cache/' + name if {cached} else None\n"


class Bench:
    """A healthy machine, and the means to spoil it."""

    def __init__(self, root: Path, nvml: FakeNVML) -> None:
        self.nvml, self.root, self.site = nvml, root / "root", root / "site"
        self.clock, self.faults = RunningClock(), Faults()
        nvml.add_gpu(total_mib=24000, used_mib=400, name="Fake 24G")
        self.uuid = nvml.state.device[0].uuid.decode()
        self.card = LedgerCard(nvml, clock=self.clock, slots=(0, 4))
        models = [
            SimulatedModel(name=VLM, size_mib=SIZE_MIB, disk_mib=SIZE_MIB / 1.25, load_s=0.01),
            SimulatedModel(name=OTHER, size_mib=3000, load_s=0.01),
            SimulatedModel(name=BLIND, size_mib=3000, load_s=0.01, capabilities=("completion",)),
            SimulatedModel(name=HUGE, size_mib=60000, load_s=0.01),
        ]
        self.ollama = SimulatedOllama(
            models, clock=self.clock, card=cast(Card, self.card), faults=self.faults, reclaim_s=0.0, unload_s=0.0
        )
        self.front = OllamaHTTPServer(self.ollama)
        self.settings: dict[str, Any] = {"ollama_url": self.front.url, "vlm_model": VLM, "observe_timeout_s": 5.0}
        self.environ: dict[str, str] = {}
        self.timeout_s = 60.0
        self.write("sys/power/state", "freeze mem disk\n")
        self.write("proc/driver/nvidia/params", "EnableMSI: 1\nPreserveVideoMemoryAllocations: 1\n")
        self.write("proc/self/limits", "Limit  Soft Limit\nMax locked memory  unlimited  unlimited  bytes\n")
        self.listen("0100007F")
        self.serve_with()
        self.write("proc/17/comm", "ollama\n")  # a client, whose environment says nothing about the server
        self.write("proc/17/cmdline", "/usr/bin/ollama\0run\0" + VLM)
        self.write("proc/17/environ", "OLLAMA_KEEP_ALIVE=-1")
        self.install("torch", TORCH.format(version="2.13.0+cu128", cuda="12.8", available=True))
        self.install("sentence_transformers", "__version__ = '6.2.0'\n")
        self.install("PIL", "")
        (self.site / "PIL" / "Image.py").touch()
        self.install("huggingface_hub", HUB.format(cached=True))

    def write(self, place: str, text: str) -> None:
        """A file of the machine."""
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def listen(self, *hosts: str) -> None:
        """Ollama's listening sockets as the kernel lists them."""
        lines = [f"   {n}: {host}:{self.front.port:04X} 00000000:0000 0A x" for n, host in enumerate(hosts)]
        lines.append("   9: 00000000:0016 00000000:0000 0A x")  # somebody else's port
        for table, length in (("tcp", 8), ("tcp6", 32)):
            chosen = [line for line in lines if len(line.split()[1].partition(":")[0]) == length]
            self.write(f"proc/net/{table}", "\n".join(["  sl  local_address ...", *chosen]) + "\n")

    def serve_with(self, **environ: str) -> None:
        """The environment of Ollama's process."""
        self.write("proc/4242/comm", "ollama\n")
        self.write("proc/4242/cmdline", "/usr/bin/ollama\0serve\0")
        self.write("proc/4242/environ", "\0".join(f"{k}={v}" for k, v in {"HOME": "/x", **environ}.items()))

    def install(self, package: str, text: str) -> None:
        """A package for the child that imports torch."""
        (self.site / package).mkdir(parents=True, exist_ok=True)
        (self.site / package / "__init__.py").write_text(text, encoding="utf-8")

    def claim(self, package: str, version: str) -> None:
        """Say that a package is installed, as its metadata would."""
        folder = self.site / f"{package}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", "utf-8")

    def load(self, name: str, *, keep_alive: object = None) -> None:
        """Have another program load a model."""
        self.ollama.foreign_load(name, keep_alive=keep_alive)
        until(lambda: name in self.ollama.loaded())

    def examine(self, *, import_torch: bool = True) -> dict[str, list[Check]]:
        """What the doctor says, by check."""
        environ = {"PATH": "", "PYTHONPATH": str(self.site), **self.environ}
        found: dict[str, list[Check]] = {}
        loaded = load_app_config(environ={}, overrides=self.settings, folder=self.root, go_on=True)
        machine = Machine(root=self.root, environ=environ)
        for check in examine(loaded, machine, import_torch=import_torch, timeout_s=self.timeout_s):
            found.setdefault(check.name, []).append(check)
        return found

    def close(self) -> None:
        """Stop what runs."""
        self.front.close()
        self.clock.close()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A healthy machine, whose card this process's pynvml sees."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    nvml = FakeNVML.create(tmp_path)
    made = Bench(tmp_path, nvml)
    try:
        with nvml.active():
            yield made
    finally:
        made.close()


def lines_of(found: dict[str, list[Check]], *levels: str) -> set[str]:
    """Names of the checks that have a line of one of these levels."""
    return {name for name, checks in found.items() for check in checks if check.level in levels}


needs_gcc = building.needs(fake_nvml.missing())


@needs_gcc
@pytest.mark.parametrize("resident", [False, True])
def test_a_healthy_machine_has_no_problem_and_no_warning(bench: Bench, resident: bool) -> None:
    """Every line is ok, but for what the model that is not loaded cannot show."""
    if resident:
        bench.load(VLM)
    found = bench.examine()
    assert lines_of(found, "problem", "warning") == set()
    assert lines_of(found, "skipped") == (set() if resident else {"offload"})
    (memory,) = found["memory"]
    assert memory.facts["free_mib"] == 24000 - 400 - (SIZE_MIB if resident else 0)
    assert [holder["mib"] for holder in memory.facts["holders"]] == ([SIZE_MIB] if resident else [])
    (card,) = found["card"]
    assert card.facts["uuid"] == bench.uuid


@needs_gcc
def test_what_the_model_holds_itself_is_no_want_of_room(bench: Bench) -> None:
    """A card that the resident model and a neighbour fill together is as it should be."""
    bench.load(VLM)
    LedgerCard(bench.nvml, clock=bench.clock, slots=(7, 8)).take("game", 16500, pid=77)
    assert bench.card.free_mib < SIZE_MIB
    (memory,) = bench.examine(import_torch=False)["memory"]
    assert memory.level == "ok"
    assert "game (77) 16500 MiB" in memory.says


# --- arranged faults --------------------------------------------------------------------------------------------------

Arrange = Callable[[Bench], object]


def _crash(bench: Bench) -> None:
    bench.install("torch", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")


def _hang(bench: Bench) -> None:
    bench.install("torch", "import threading\nthreading.Event().wait(60)\n")
    bench.timeout_s = 0.3


def _torchvision(bench: Bench) -> None:
    bench.claim("torchvision", "0.28.0")
    text = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    bench.install("sentence_transformers", text)


def _closed_port(bench: Bench) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    bench.settings["ollama_url"] = f"http://127.0.0.1:{port}"


def _patient_no_more(bench: Bench, op: str, kind: str) -> None:
    bench.settings["observe_timeout_s"] = 0.3
    bench.faults.arm(op, kind, times=None)


def _partly(bench: Bench, share: float) -> None:
    bench.faults.arm("ollama.load", "partial", share=share)
    bench.load(VLM)


def _no_longer_there(bench: Bench) -> None:
    bench.load(VLM)
    bench.nvml.set_used(0, 300)


def _unit(bench: Bench, value: str) -> None:
    for name in ("comm", "cmdline", "environ"):
        (bench.root / "proc/4242" / name).unlink()
    bench.write("etc/systemd/system/ollama.service", "[Service]\nExecStart=/usr/bin/ollama serve\n")
    text = f'[Service]\nEnvironment="A=b c" "OLLAMA_KEEP_ALIVE={value}"\n'
    bench.write("etc/systemd/system/ollama.service.d/override.conf", text)


DRIVER: dict[str, tuple[Arrange, str, str, str]] = {
    "driver-upgraded-under-the-system": (lambda b: b.nvml.fail("INIT", 18), "driver", "problem", "Reboot"),
    "driver-silent-after-a-suspend": (lambda b: b.nvml.fail("MEM", 999), "driver", "problem", "rmmod nvidia_uvm"),
    "gpu-fell-off-the-bus": (lambda b: b.nvml.fail("MEM", 15), "driver", "problem", "off and on"),
    "driver-hangs": (
        lambda b: (b.settings.update(observe_timeout_s=0.3), b.nvml.delay("MEM", 1.0)), "driver", "problem", "rmmod",
    ),
    "no-driver-where-a-card-is-named": (
        lambda b: (b.nvml.fail("INIT", 12), b.settings.update(gpu_uuid=b.uuid)), "driver", "problem", "install its",
    ),
    "no-driver": (lambda b: b.nvml.fail("INIT", 12), "driver", "warning", "nothing is to be done"),
    "uuid-of-no-card": (lambda b: b.settings.update(gpu_uuid="GPU-ffff"), "card", "problem", "Set gpu_uuid"),
    "two-cards-and-no-choice": (lambda b: b.nvml.add_gpu(), "card", "problem", "Set gpu_uuid"),
    "memory-not-told": (lambda b: b.nvml.fail("MEM", 13), "memory", "warning", "vram_budget_mib"),
    "card-too-small": (lambda b: b.settings.update(vlm_model=HUGE), "memory", "problem", "smaller model"),
    "memory-held-by-a-game": (
        lambda b: LedgerCard(b.nvml, clock=b.clock, slots=(7, 8)).take("game", 20000, pid=77),
        "memory", "warning", "End what else holds memory",
    ),
    "suspend-loses-the-card-s-memory": (
        lambda b: b.write("proc/driver/nvidia/params", "PreserveVideoMemoryAllocations: 0\n"),
        "suspend", "warning", "NVreg_PreserveVideoMemoryAllocations=1",
    ),
    "little-memory-may-be-locked": (
        lambda b: b.write("proc/self/limits", "Max locked memory  8388608  8388608  bytes\n"),
        "pinned-memory", "warning", "ulimit -l",
    ),
}  # fmt: skip
TORCHES: dict[str, tuple[Arrange, str, str, str]] = {
    "torch-for-a-newer-cuda": (
        lambda b: b.install("torch", TORCH.format(version="2.13.0", cuda="13.0", available=False)),
        "torch", "problem", "built for CUDA 12",
    ),
    "torch-for-the-cpu": (
        lambda b: b.install("torch", TORCH.format(version="2.13.0+cpu", cuda=None, available=False)),
        "torch", "warning", "built for CUDA",
    ),
    "torch-sees-no-card": (
        lambda b: b.install("torch", TORCH.format(version="2.13.0", cuda="12.6", available=False)),
        "torch", "problem", "modprobe nvidia_uvm",
    ),
    "cards-hidden-from-torch": (
        lambda b: (
            b.install("torch", TORCH.format(version="2.13.0", cuda="12.6", available=False)),
            b.environ.update(CUDA_VISIBLE_DEVICES=""),
        ),
        "torch", "problem", "Unset CUDA_VISIBLE_DEVICES",
    ),
    "torch-crashes-the-interpreter": (_crash, "torch", "problem", "Install torch anew"),
    "torch-never-ends-its-import": (_hang, "torch", "problem", "Install torch anew"),
    "torch-is-broken": (lambda b: b.install("torch", "import libmissing_so\n"), "torch", "problem", "torch anew"),
    "torch-not-installed": (
        lambda b: b.install("torch", "raise ModuleNotFoundError('no', name='torch')\n"),
        "torch", "warning", "gpu-fsm[clip]",
    ),
    "broken-torchvision": (_torchvision, "sentence-transformers", "problem", "pip uninstall torchvision"),
    "sentence-transformers-too-old": (
        lambda b: b.install("sentence_transformers", "__version__ = '5.1.2'\n"),
        "sentence-transformers", "problem", "sentence-transformers>=6.2",
    ),
    "sentence-transformers-not-installed": (
        lambda b: b.install("sentence_transformers", "raise ModuleNotFoundError('x', name='sentence_transformers')\n"),
        "sentence-transformers", "warning", "gpu-fsm[clip]",
    ),
    "clip-not-fetched-yet": (
        lambda b: b.install("huggingface_hub", HUB.format(cached=False)), "clip-model", "warning", "set clip_model",
    ),
}  # fmt: skip
OLLAMAS: dict[str, tuple[Arrange, str, str, str]] = {
    "ollama-down": (_closed_port, "ollama", "problem", "ollama serve"),
    "something-else-answers": (
        lambda b: b.faults.arm("ollama.version", "html", times=None), "ollama", "problem", "set ollama_url",
    ),
    "ollama-still-starting": (
        lambda b: _patient_no_more(b, "ollama.version", "hang"), "ollama", "problem", "Wait until",
    ),
    "ollama-wedged": (lambda b: _patient_no_more(b, "ollama.ps", "hang"), "ollama", "problem", "restart Ollama"),
    "ollama-without-unload": (
        lambda b: setattr(b.ollama, "version", "0.3.10"), "ollama-version", "problem", "Upgrade",
    ),
    "ollama-that-leaks-memory": (
        lambda b: setattr(b.ollama, "version", "0.17.0"), "ollama-version", "warning", "Upgrade",
    ),
    "ollama-open-to-the-network": (lambda b: b.listen("00000000"), "ollama-exposure", "warning", "OLLAMA_HOST=127"),
    "ollama-open-to-the-network-by-ipv6": (
        lambda b: b.listen("00000000000000000000000000000000"), "ollama-exposure", "warning", "OLLAMA_HOST=127",
    ),
    "model-missing": (lambda b: b.settings.update(vlm_model="gone:1b"), "model", "problem", "ollama pull gone:1b"),
    "model-without-eyes": (lambda b: b.settings.update(vlm_model=BLIND), "vision", "problem", "qwen2.5vl:7b"),
    "partly-on-the-cpu": (lambda b: _partly(b, 0.6), "offload", "problem", "num_ctx"),
    "wholly-on-the-cpu": (lambda b: _partly(b, 0.0), "offload", "problem", "Restart Ollama"),
    "says-gpu-and-is-not-there": (_no_longer_there, "offload", "problem", "rmmod nvidia_uvm"),
    "another-model-pinned": (lambda b: b.load(OTHER, keep_alive=FOR_EVER), "pins", "warning", f"ollama stop {OTHER}"),
    "our-model-pinned": (lambda b: b.load(VLM, keep_alive=FOR_EVER), "pins", "warning", "keep_alive -1"),
    "runner-left-behind": (
        lambda b: LedgerCard(b.nvml, clock=b.clock, slots=(7, 8)).take("llama-server", 5000, pid=77),
        "orphans", "problem", "kill 77",
    ),
    "keep-alive-for-ever": (lambda b: b.serve_with(OLLAMA_KEEP_ALIVE="-1"), "keep-alive", "warning", "Unset it"),
    "keep-alive-for-ever-in-the-unit": (lambda b: _unit(b, "-1m"), "keep-alive", "warning", "Unset it"),
    "keep-alive-of-nothing": (lambda b: b.serve_with(OLLAMA_KEEP_ALIVE="0"), "keep-alive", "warning", "Unset it"),
    "keep-alive-unreadable": (lambda b: b.serve_with(OLLAMA_KEEP_ALIVE="1 h"), "keep-alive", "warning", "like 10m"),
    "one-model-at-a-time": (
        lambda b: b.serve_with(OLLAMA_MAX_LOADED_MODELS="1"), "max-loaded-models", "warning", "2 or more",
    ),
    "many-contexts": (lambda b: b.serve_with(OLLAMA_NUM_PARALLEL="4"), "num-parallel", "warning", "vlm_size_mib"),
    "overhead-without-effect": (
        lambda b: b.serve_with(OLLAMA_GPU_OVERHEAD="1000000000"), "gpu-overhead", "warning", "LLAMA_ARG_FIT_TARGET",
    ),
    "ollama-on-another-card": (
        lambda b: b.serve_with(CUDA_VISIBLE_DEVICES="GPU-ffff"), "ollama-devices", "warning", "ollama_card",
    ),
    "ollama-elsewhere": (
        lambda b: b.settings.update(ollama_url="http://ollama.invalid:11434", allow_remote=True),
        "ollama-exposure", "warning", "tunnel",
    ),
    "settings-of-nobody": (
        lambda b: b.write("gpu-fsm.toml", "[gpu-fsm]\nidle_timout_s = 3\n"), "settings", "problem", "idle_timeout_s?",
    ),
}  # fmt: skip
ALSO: dict[str, set[str]] = {
    "driver-upgraded-under-the-system": {"memory"},
    "driver-silent-after-a-suspend": {"memory"},
    "driver-hangs": {"memory"},
    "ollama-elsewhere": {"ollama"},
}
"""What a fault makes go wrong besides."""


def fault_is_named(bench: Bench, fault: tuple[Arrange, str, str, str], also: set[str], *, import_torch: bool) -> None:
    """One line says it, with its mend; nothing else is called wrong."""
    arrange, name, level, mend = fault
    arrange(bench)
    found = bench.examine(import_torch=import_torch)
    bench.faults.heal()
    said = [check for check in found[name] if check.level == level]
    assert [check for check in said if mend in check.mend], found[name]
    assert all(check.says and "failed itself" not in check.says for checks in found.values() for check in checks)
    assert lines_of(found, "problem", "warning") <= {name} | also
    assert lines_of(found, "problem") >= ({name} if level == "problem" else set())


@needs_gcc
@pytest.mark.parametrize("name", DRIVER)
def test_a_fault_of_the_card_is_named_with_its_mend(bench: Bench, name: str) -> None:
    """One line says it; nothing else is called wrong but what follows from it."""
    fault_is_named(bench, DRIVER[name], ALSO.get(name, set()), import_torch=False)


@needs_gcc
@pytest.mark.parametrize("name", TORCHES)
def test_a_fault_of_torch_is_named_with_its_mend(bench: Bench, name: str) -> None:
    """One line says it; nothing else is called wrong but what follows from it."""
    fault_is_named(bench, TORCHES[name], ALSO.get(name, set()), import_torch=True)


@needs_gcc
@pytest.mark.parametrize("name", OLLAMAS)
def test_a_fault_of_ollama_is_named_with_its_mend(bench: Bench, name: str) -> None:
    """One line says it; nothing else is called wrong but what follows from it."""
    fault_is_named(bench, OLLAMAS[name], ALSO.get(name, set()), import_torch=False)


@needs_gcc
@pytest.mark.parametrize("value", ["5m", "300", "1h30m", "1.5h", " '24h' ", ".5s"])
def test_a_keep_alive_that_ollama_understands_is_no_trap(bench: Bench, value: str) -> None:
    """Spaces and quotes round it are taken off, as Ollama does."""
    bench.serve_with(OLLAMA_KEEP_ALIVE=value)
    (line,) = bench.examine(import_torch=False)["keep-alive"]
    assert line.level == "ok"


@needs_gcc
def test_an_old_ollama_that_is_open_to_the_network_is_a_problem(bench: Bench) -> None:
    """Two warnings that are worse together."""
    bench.ollama.version = "0.17.0"
    bench.listen("0100007F", "00000000")
    (exposure,) = bench.examine(import_torch=False)["ollama-exposure"]
    assert exposure.level == "problem"
    assert "CVE-2026-7482" in exposure.says


@needs_gcc
@pytest.mark.parametrize(
    "hosts", [("0100007F",), ("00000000000000000000000001000000",), ("0000000000000000FFFF00000100007F", "0200007F")]
)
def test_loopback_is_loopback_in_every_notation(bench: Bench, hosts: tuple[str, ...]) -> None:
    """127.0.0.0/8, ::1 and an IPv4 address in IPv6's clothes."""
    bench.listen(*hosts)
    (exposure,) = bench.examine(import_torch=False)["ollama-exposure"]
    assert exposure.level == "ok"


@needs_gcc
def test_a_card_that_somebody_manages_is_told_and_stays_theirs(bench: Bench) -> None:
    """The doctor lets go of a lock that it got, and takes none that is held."""
    lock = CardLock()
    lock.watch(bench.uuid)
    try:
        (line,) = bench.examine(import_torch=False)["card-lock"]
        assert line.level == "warning"
        assert "another manager in this process" in line.says
        lock.permit()
    finally:
        lock.close()
    assert bench.examine(import_torch=False)["card-lock"][0].level == "ok"
    other = CardLock()
    other.watch(bench.uuid)
    assert other.held_by == ""
    other.close()


@needs_gcc
def test_the_doctor_only_looks(bench: Bench) -> None:
    """No request of it changes anything at the server, and the driver is given back."""
    bench.load(OTHER)
    before = len(bench.ollama.log)
    bench.examine(import_torch=False)
    asked = {(entry.method, entry.path) for entry in bench.ollama.log[before:]}
    assert asked <= {("GET", "/api/version"), ("GET", "/api/ps"), ("GET", "/api/tags"), ("POST", "/api/show")}
    assert bench.ollama.loaded() == (OTHER,)
    assert bench.nvml.references == 0


@needs_gcc
def test_a_check_that_fails_is_a_line_like_the_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine shows it, the doctor goes on to the end."""
    monkeypatch.setattr(Machine, "read", lambda self, place: 1 / 0)
    found = bench.examine(import_torch=False)
    broken = {name for name, checks in found.items() if any("failed itself" in check.says for check in checks)}
    assert broken == {"suspend", "pinned-memory", "ollama-exposure", "server-settings"}
    assert lines_of(found, "problem") == set()
    assert all(check.mend for name in broken for check in found[name])


# --- the command ------------------------------------------------------------------------------------------------------


def report(capsys: pytest.CaptureFixture[str], *argv: str, code: ExitCode) -> dict[str, Any]:
    """Run `doctor --json` and return its document."""
    assert main(["doctor", "--json", *argv]) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return dict(json.loads(captured.out))


@needs_gcc
def test_the_command_ends_with_0_where_nothing_is_wrong_and_with_1_otherwise(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As JSON and for people; warnings alone are fine."""
    monkeypatch.setenv("PYTHONPATH", str(bench.site))
    argv = ["--root", str(bench.root), "--ollama-url", bench.front.url, "--vlm-model", VLM]
    document = report(capsys, *argv, code=ExitCode.FINE)
    assert document["ok"] is True
    assert document["counts"]["problem"] == document["counts"]["warning"] == 0
    assert {"name", "level", "says", "mend", "facts"} == set(document["checks"][0])
    bench.serve_with(OLLAMA_KEEP_ALIVE="-1")
    assert report(capsys, *argv, "--quick", code=ExitCode.FINE)["counts"]["warning"] == 1
    bench.nvml.fail("INIT", 18)
    document = report(capsys, *argv, "--quick", code=ExitCode.FAILED)
    assert document["ok"] is False
    assert main(["doctor", "--quick", *argv]) == ExitCode.FAILED
    out = capsys.readouterr().out
    assert "problem  driver  " in out
    assert "Reboot, or unload and load the driver's modules." in out
    assert "\x1b" not in out
    assert out.splitlines()[-1].startswith("1 problem, ")


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA driver")
@pytest.mark.parametrize(
    "extra", ["without", pytest.param("with", marks=pytest.mark.needs_torch)], ids=["without-clip", "with-clip"]
)
def test_without_a_gpu_and_without_ollama_each_line_says_what_is_missing(extra: str, tmp_path: Path) -> None:
    """With nothing but the core, and with the extra `clip`; the real torch is imported where there is one."""
    places = [str(Path(__file__).resolve().parents[1])]
    if extra == "without":
        (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('none', name='torch')\n", "utf-8")
        places.append(str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    # A process of its own: once a fake driver has been loaded, this one cannot be without a driver.
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "gpu_fsm", "doctor", "--json", "--ollama-url", url],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (ExitCode.FAILED, "")
    document = json.loads(done.stdout)
    levels = {check["name"]: check["level"] for check in document["checks"]}
    assert [name for name, level in levels.items() if level == "problem"] == ["ollama"]
    assert levels["driver"] == "warning"
    assert levels["torch"] == ("warning" if extra == "without" else "ok")
    assert levels["sentence-transformers"] == ("skipped" if extra == "without" else "ok")
    assert all(check["mend"] for check in document["checks"] if check["level"] in ("warning", "problem"))


def test_a_bad_option_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """What a person types wrongly is no finding about the machine."""
    assert main(["doctor", "--idle-timeout-s", "x"]) == ExitCode.USAGE
    assert "option --idle-timeout-s" in capsys.readouterr().err


def test_a_dead_server_costs_no_patience(capsys: pytest.CaptureFixture[str]) -> None:
    """A refused connection is an answer: the rest about Ollama is left out at once."""
    start = time.monotonic()
    report(capsys, "--quick", "--ollama-url", "http://127.0.0.1:1", code=ExitCode.FAILED)
    assert time.monotonic() - start < 5.0
