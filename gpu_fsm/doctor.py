"""`examine`: everything a user would otherwise ask about, each line with its mend.

It looks and changes nothing: no model is loaded or unloaded, no setting touched.  Whatever it looks at may be broken in
any way, so every look is bounded in time and a check that fails itself becomes a line like the others.  torch is
imported in a child process: the import takes seconds, may crash, and what it does to the GPU ends with the child.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from attrs import define, field, frozen

from gpu_fsm.appconfig import Loaded
from gpu_fsm.cardlock import CardLock
from gpu_fsm.errors import ConfigError, one_line
from gpu_fsm.observer import DISK_TO_VRAM
from gpu_fsm.ollama import Health, OllamaManager, canonical_name
from gpu_fsm.ports import RealClock
from gpu_fsm.settings import GPUResourceConfig, is_loopback
from gpu_fsm.status import Answer, Catalog, Holder, LoadedModel, Residency, VRAMInfo
from gpu_fsm.vram import (
    GPU_IS_LOST,
    GPU_NOT_FOUND,
    IN_WORDS,
    LIB_RM_VERSION_MISMATCH,
    NO_PERMISSION,
    NOT_SUPPORTED,
    RESET_REQUIRED,
    UNINITIALIZED,
    UNKNOWN,
    VRAMMonitor,
)

Level = Literal["ok", "warning", "problem", "skipped"]

IMPORT_S: Final = 120.0
"""For importing torch and sentence-transformers in a child: 6 s on two busy cores, a minute from a cold disk."""

_DRIVER_MENDS: Final = {
    LIB_RM_VERSION_MISMATCH: "Reboot, or unload and load the driver's modules.",
    GPU_IS_LOST: "Switch the machine off and on; the kernel's log tells more (look for Xid).",
    GPU_NOT_FOUND: "Switch the machine off and on; the kernel's log tells more (look for Xid).",
    RESET_REQUIRED: "Run nvidia-smi --gpu-reset as root, or reboot.",
    NO_PERMISSION: "Set gpu_uuid to the UUID of the MIG slice (nvidia-smi -L), or give the container the card.",
    UNKNOWN: "Run `rmmod nvidia_uvm; modprobe nvidia_uvm` as root and restart Ollama; start a container anew.",
    UNINITIALIZED: "Start the program again.",
    NOT_SUPPORTED: "Set vram_budget_mib to what Ollama and CLIP may share; releases are waited for blindly then.",
}
_RELOAD_UVM: Final = "Restart Ollama; after a suspend run `rmmod nvidia_uvm; modprobe nvidia_uvm` as root first."

_OLLAMA_FLOORS: Final[tuple[tuple[tuple[int, int, int], Level, str], ...]] = (
    ((0, 3, 11), "problem", "it has no unload: the request for one loads the model"),
    ((0, 7, 1), "warning", "it leaves runners behind and models stuck in `Stopping...`"),
    ((0, 11, 5), "warning", "the sizes it reports are estimates, often wrong in both directions"),
    ((0, 17, 1), "warning", "whoever reaches it can read its memory (CVE-2026-7482)"),
)
"""Below each version: how bad, and why.  The first that fits is told."""
_EXPOSED_FLOOR: Final = (0, 17, 1)


@frozen(kw_only=True)
class Check:
    """One line: what was looked at, how it is, what to do."""

    name: str
    level: Level
    says: str
    mend: str = ""
    """What to do; with every warning and problem."""
    facts: Mapping[str, Any] = field(factory=dict)
    """The figures, for programs."""

    def as_json(self) -> dict[str, Any]:
        """The same for `json.dumps`."""
        facts = dict(self.facts)
        return {"name": self.name, "level": self.level, "says": self.says, "mend": self.mend, "facts": facts}


@frozen(kw_only=True)
class Machine:
    """Where to look: a test arranges its own, and a container's doctor may be shown its host."""

    root: Path = Path("/")
    """`proc`, `sys` and `etc` are looked for below it."""
    environ: Mapping[str, str] = field(factory=lambda: dict(os.environ))
    python: str = sys.executable
    """The interpreter whose torch is looked at."""

    def read(self, place: str) -> str | None:
        """A small file's text, or None where it is not there or not ours to read."""
        try:
            with (self.root / place).open("rb") as file:
                return file.read(1 << 20).decode(errors="replace")
        except OSError:
            return None


def examine(
    loaded: Loaded, machine: Machine | None = None, *, import_torch: bool = True, timeout_s: float = IMPORT_S
) -> Iterator[Check]:
    """Look at everything, one line after the other.  Never raises.

    `import_torch` False leaves out what needs seconds; `timeout_s` bounds that part.
    """
    patient = _Patient(loaded, machine or Machine(), import_torch, timeout_s)
    try:
        for check in _CHECKS:
            try:
                yield from check(patient)
            except Exception as error:
                name = check.__name__.strip("_").replace("_", "-")
                yield Check(
                    name=name,
                    level="warning",
                    says=f"this check failed itself: {one_line(error, 200)}",
                    mend="Please report it with the output of `gpu-fsm doctor --json`.",
                )
    finally:
        patient.close()


@define(eq=False, slots=False)
class _Patient:
    """What is known so far; every look is made once, when it is first needed."""

    loaded: Loaded
    machine: Machine
    import_torch: bool
    timeout_s: float

    def __attrs_post_init__(self) -> None:
        self.clock = RealClock()
        self.monitor = VRAMMonitor(self.config, clock=self.clock)
        self.server = OllamaManager(self.config, clock=self.clock)

    @property
    def config(self) -> GPUResourceConfig:
        return self.loaded.config.gpu

    def close(self) -> None:
        self.monitor.close()
        self.server.close()

    @functools.cached_property
    def card(self) -> VRAMInfo | ConfigError:
        try:
            return self.monitor.prepare()
        except ConfigError as error:
            return error

    @property
    def card_is_there(self) -> bool:
        return isinstance(self.card, VRAMInfo) and self.card.present and not self.card.lost

    @functools.cached_property
    def driver_told(self) -> tuple[str, str]:
        return self.monitor.versions()

    @functools.cached_property
    def holders(self) -> tuple[Holder, ...] | None:
        return self.monitor.holders() if self.card_is_there else None

    @functools.cached_property
    def health(self) -> Health:
        return self.server.health(2 * self.config.observe_timeout_s)

    @functools.cached_property
    def residency(self) -> Residency:
        return self.server.residency(self.config.observe_timeout_s)

    @functools.cached_property
    def catalog(self) -> Catalog:
        return self.server.catalog(self.config.observe_timeout_s)

    @property
    def ollama_is_local(self) -> bool:
        return is_loopback(self.config.ollama_url)

    @functools.cached_property
    def server_environ(self) -> tuple[Mapping[str, str], str] | None:
        """What the server was started with, as far as that can be seen, and where."""
        return _server_environ(self.machine) if self.ollama_is_local else None

    @functools.cached_property
    def packages(self) -> dict[str, Any]:
        return _ask_python(self.machine, self.config.clip_model or "", self.timeout_s)


# --- settings and Python ----------------------------------------------------------------------------------------------


def _settings(patient: _Patient) -> Iterator[Check]:
    for problem in patient.loaded.problems:
        yield Check(
            name="settings",
            level="problem",
            says=one_line(problem.summary(), 300),
            mend=problem.remedy or f"Change it in {problem.source}.",
            facts={"setting": problem.name, "source": problem.source},
        )
    if not patient.loaded.problems:
        files = [str(file) for file in patient.loaded.files]
        changed = sum(value.source != "default" for value in patient.loaded.values)
        says = f"{changed} not as they come, from {', '.join(files) or 'no file'}, the environment and options"
        yield Check(name="settings", level="ok", says=says, facts={"files": files, "changed": changed})


def _python(patient: _Patient) -> Iterator[Check]:
    says = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Check(name="python", level="ok", says=says, facts={"version": platform.python_version()})


# --- the card ---------------------------------------------------------------------------------------------------------


def _nvml(patient: _Patient) -> Iterator[Check]:
    try:
        version = importlib.metadata.version("nvidia-ml-py")
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            name="nvml",
            level="problem",
            says="the package nvidia-ml-py is not installed",
            mend="Run: pip install nvidia-ml-py",
        )
        return
    facts = {"nvidia-ml-py": version}
    try:
        old = importlib.metadata.version("pynvml")
    except importlib.metadata.PackageNotFoundError:
        yield Check(name="nvml", level="ok", says=f"nvidia-ml-py {version}", facts=facts)
        return
    yield Check(
        name="nvml",
        level="warning",
        says=f"nvidia-ml-py {version}, and beside it the deprecated package pynvml {old}, which warns at every import",
        mend="Run: pip uninstall pynvml",
        facts=facts | {"pynvml": old},
    )


def _driver(patient: _Patient) -> Iterator[Check]:
    card = patient.card
    driver, cuda = patient.driver_told
    facts = {"driver": driver, "cuda": cuda}
    if isinstance(card, ConfigError) or (card.present and card.bucket in ("none", "settle")):
        newest = f", CUDA up to {cuda}" if cuda else ""
        yield Check(name="driver", level="ok", says=f"NVIDIA {driver or 'driver'}{newest}", facts=facts)
        return
    if card.lost or card.present:
        code = next((code for code, words in IN_WORDS.items() if words == card.detail), UNKNOWN)
        mend = _DRIVER_MENDS.get(code, "Look into the kernel's log.")
        yield Check(name="driver", level="problem", says=card.detail, mend=mend, facts=facts)
        return
    wanted = patient.config.gpu_uuid is not None or patient.config.clip_device.startswith("cuda")
    in_container = (patient.machine.root / ".dockerenv").exists()
    install = "give this container the card (--gpus all)" if in_container else "install its driver"
    yield Check(
        name="driver",
        level="problem" if wanted else "warning",
        says=f"{card.detail}; everything runs on the CPU" + (", and the settings name a card" if wanted else ""),
        mend=f"Where there is an NVIDIA card, {install}; else nothing is to be done.",
        facts=facts,
    )


def _card(patient: _Patient) -> Iterator[Check]:
    card = patient.card
    if isinstance(card, ConfigError):
        yield Check(name="card", level="problem", says=one_line(card.summary(), 400), mend=card.remedy)
    elif not patient.card_is_there or not card.device_uuid:
        yield Check(name="card", level="skipped", says="there is no card to look at")
    else:
        size = "size unknown" if card.total_mib is None else f"{card.total_mib:.0f} MiB"
        facts = {"uuid": card.device_uuid, "name": card.name, "total_mib": card.total_mib}
        yield Check(name="card", level="ok", says=f"{card.name}, {size}, {card.device_uuid}", facts=facts)


def _memory(patient: _Patient) -> Iterator[Check]:
    card, config = patient.card, patient.config
    if isinstance(card, ConfigError) or not patient.card_is_there:
        yield Check(name="memory", level="skipped", says="there is no card to look at")
        return
    holders = patient.holders
    listed = [{"pid": h.pid, "name": h.name, "mib": h.mib} for h in holders or ()]
    facts: dict[str, Any] = {"free_mib": card.free_mib, "total_mib": card.total_mib, "holders": listed}
    if card.free_mib is None or card.total_mib is None:
        yield Check(
            name="memory",
            level="warning",
            says=f"how much is free cannot be told ({card.detail}); releases are waited for blindly",
            mend=_DRIVER_MENDS[NOT_SUPPORTED],
            facts=facts,
        )
        return
    ours = _resident_mib(patient)
    needed = _needed_mib(patient)
    facts |= {"needed_mib": needed, "resident_mib": ours}
    who = _names(holders)
    says = f"{card.free_mib:.0f} of {card.total_mib:.0f} MiB free{who}"
    if needed + config.reserve_mib > card.total_mib:
        yield Check(
            name="memory",
            level="problem",
            says=f"{says}; {config.vlm_model} needs about {needed:.0f} MiB and a reserve of {config.reserve_mib:.0f}",
            mend="Take a smaller model or quantisation, or set on_partial_offload to accept.",
            facts=facts,
        )
    elif needed + config.reserve_mib > card.free_mib + ours:
        yield Check(
            name="memory",
            level="warning",
            says=f"{says}; {config.vlm_model} needs about {needed:.0f} MiB and a reserve of {config.reserve_mib:.0f}",
            mend="End what else holds memory, or RECORDING will be DEGRADED for want of room.",
            facts=facts,
        )
    else:
        yield Check(name="memory", level="ok", says=says, facts=facts)


def _names(holders: tuple[Holder, ...] | None) -> str:
    if holders is None:
        return "; the driver does not tell who holds the rest"
    if not holders:
        return ""
    shown = [f"{h.name or 'a process'} ({h.pid}) {'?' if h.mib is None else f'{h.mib:.0f}'} MiB" for h in holders[:4]]
    more = f" and {len(holders) - 4} more" if len(holders) > 4 else ""
    return f"; held by {', '.join(shown)}{more}"


def _resident_mib(patient: _Patient) -> float:
    """What the VLM itself holds of our card already."""
    if patient.health.level != "up" or not patient.server.on_our_card or patient.residency.ours is None:
        return 0.0
    return patient.residency.ours.size_vram_mib


def _needed_mib(patient: _Patient) -> float:
    if not patient.server.on_our_card:
        return 0.0
    if patient.health.level == "up" and patient.residency.ours is not None:
        return patient.residency.ours.size_mib
    on_disk = patient.catalog.size_mib if patient.health.level == "up" else None
    return patient.config.vlm_size_mib if on_disk is None else on_disk * DISK_TO_VRAM


def _card_lock(patient: _Patient) -> Iterator[Check]:
    card = patient.card
    if isinstance(card, ConfigError) or not card.device_uuid:
        yield Check(name="card-lock", level="skipped", says="there is no card to look at")
        return
    lock = CardLock()
    try:
        lock.watch(card.device_uuid)
        holder = lock.held_by
    finally:
        lock.close()
    if holder:
        yield Check(
            name="card-lock",
            level="warning",
            says=f"{holder} manages this card; another manager would only look",
            mend="Use that one, or end it: the next request of another takes over.",
            facts={"held_by": holder},
        )
    else:
        yield Check(name="card-lock", level="ok", says="no other manager acts on this card")


def _suspend(patient: _Patient) -> Iterator[Check]:
    name = "suspend"
    if not patient.card_is_there:
        yield Check(name=name, level="skipped", says="there is no card to look at")
        return
    states = patient.machine.read("sys/power/state")
    if states is None or "mem" not in states.split():
        yield Check(name=name, level="ok", says="this machine does not suspend to memory")
        return
    keeps = re.search(r"PreserveVideoMemoryAllocations:\s*1", patient.machine.read("proc/driver/nvidia/params") or "")
    if keeps:
        yield Check(name=name, level="ok", says="the driver keeps the card's memory over a suspend")
    else:
        yield Check(
            name=name,
            level="warning",
            says="after a suspend Ollama may compute on the CPU and still say GPU",
            mend="Set NVreg_PreserveVideoMemoryAllocations=1 for the module nvidia and enable nvidia-suspend.service; "
            "after a suspend restart Ollama.",
        )


def _pinned_memory(patient: _Patient) -> Iterator[Check]:
    name = "pinned-memory"
    if not patient.card_is_there or patient.config.clip_model is None:
        yield Check(name=name, level="skipped", says="CLIP moves to no card here")
        return
    limits = re.search(r"^Max locked memory\s+(\S+)", patient.machine.read("proc/self/limits") or "", re.MULTILINE)
    if limits is None:
        yield Check(name=name, level="skipped", says="the limit of locked memory cannot be told")
        return
    mib = float("inf") if limits[1] == "unlimited" else int(limits[1]) / 2**20
    facts = {"limit_mib": None if mib == float("inf") else mib}
    if mib >= PINNED_MIB:
        says = "CLIP's weights may be locked for fast moves"
        yield Check(name=name, level="ok", says=says, facts=facts)
    else:
        yield Check(
            name=name,
            level="warning",
            says=f"{mib:.0f} MiB of memory may be locked; moving CLIP to the card may take two to four times as long",
            mend="Raise it (`ulimit -l unlimited`, LimitMEMLOCK=infinity, docker --ulimit memlock=-1).",
            facts=facts,
        )


PINNED_MIB: Final = 600.0
"""What a CLIP ViT-B/32 at float32 locks."""


# --- torch and CLIP ---------------------------------------------------------------------------------------------------

_PROBE: Final = r"""
import importlib.metadata, json, os, sys, warnings
said = {"warnings": []}
def look(name, action):
    try:
        said[name] = action()
    except BaseException as error:
        said[name + "_error"] = f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError):
            said[name + "_missing"] = error.name or ""
def torch_facts():
    import torch
    facts = {"version": str(torch.__version__), "cuda": torch.version.cuda, "hip": getattr(torch.version, "hip", None)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        facts["available"] = bool(torch.cuda.is_available())
    said["warnings"] += [str(warning.message) for warning in caught]
    return facts
def pipeline_facts():
    import PIL.Image, sentence_transformers
    return {"version": str(sentence_transformers.__version__)}
def model_facts():
    import huggingface_hub
    name = sys.argv[1]
    name = name if "/" in name else "sentence-transformers/" + name
    return {"cached": isinstance(huggingface_hub.try_to_load_from_cache(name, "modules.json"), str)}
stdout, sys.stdout = sys.stdout, sys.stderr
warnings.simplefilter("ignore")
look("torch", torch_facts)
if "torch" in said:
    look("pipeline", pipeline_facts)
if "pipeline" in said and sys.argv[1] and not os.path.isdir(os.path.expanduser(sys.argv[1])):
    look("model", model_facts)
try:
    said["torchvision"] = importlib.metadata.version("torchvision")
except Exception:
    pass
print(json.dumps(said), file=stdout, flush=True)
os._exit(0)
"""
"""Run by a child; what its libraries print goes to stderr, and it ends without their goodbyes."""


def _ask_python(machine: Machine, clip_model: str, timeout_s: float) -> dict[str, Any]:
    """What the child found, or why it found nothing, under `died`."""
    try:
        done = subprocess.run(
            [machine.python, "-P", "-c", _PROBE, clip_model],
            env={**machine.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"died": f"importing it took more than {timeout_s:g} s"}
    except OSError as error:
        return {"died": one_line(error.strerror or error)}
    try:
        said = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        last = one_line(done.stderr.strip().rpartition("\n")[2], 200)
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return {"died": f"importing it ended the interpreter with {how}{': ' + last if last else ''}"}
    return said if isinstance(said, dict) else {"died": "the child said something else"}


_EXTRA: Final = 'Run: pip install "gpu-fsm[clip]", or set clip_model to none.'


def _torch(patient: _Patient) -> Iterator[Check]:
    if patient.config.clip_model is None or not patient.import_torch:
        why = "clip_model is none" if patient.config.clip_model is None else "left out"
        yield Check(name="torch", level="skipped", says=why)
        return
    said = patient.packages
    if "died" in said:
        mend = "Install torch anew; `python -c 'import torch, sentence_transformers'` shows the same."
        yield Check(name="torch", level="problem", says=said["died"], mend=mend)
        return
    if "torch" not in said:
        if said.get("torch_missing") == "torch":
            yield Check(name="torch", level="warning", says="not installed, so there is no CLIP", mend=_EXTRA)
        else:
            says = f"it cannot be imported: {one_line(said.get('torch_error'), 200)}"
            yield Check(name="torch", level="problem", says=says, mend="Install torch anew.")
        return
    yield _torch_and_card(patient, said["torch"], [one_line(text, 200) for text in said["warnings"]])


def _torch_and_card(patient: _Patient, facts: dict[str, Any], warnings: list[str]) -> Check:
    version, built = facts["version"], facts["cuda"]
    cuda = patient.driver_told[1]
    build = f"CUDA {built}" if built else f"ROCm {facts['hip']}" if facts["hip"] else "the CPU"
    says = f"{version}, built for {build}"
    facts = facts | {"driver_cuda": cuda}
    if not patient.card_is_there or patient.config.clip_device == "cpu":
        return Check(name="torch", level="ok", says=says, facts=facts)
    if not built:
        return Check(
            name="torch",
            level="ok" if facts["available"] else "warning",
            says=f"{says}: CLIP stays on the CPU" if not facts["available"] else says,
            mend="" if facts["available"] else "Install a torch that is built for CUDA to have CLIP on the card.",
            facts=facts,
        )
    if cuda and int(built.partition(".")[0]) > int(cuda.partition(".")[0]):
        return Check(
            name="torch",
            level="problem",
            says=f"{says}, and the driver runs CUDA up to {cuda}",
            mend=f"Upgrade the driver, or install a torch that is built for CUDA {cuda.partition('.')[0]}.",
            facts=facts,
        )
    if not facts["available"]:
        hidden = patient.machine.environ.get("CUDA_VISIBLE_DEVICES")
        why = f" (CUDA_VISIBLE_DEVICES is {hidden!r})" if hidden is not None else ""
        return Check(
            name="torch",
            level="problem",
            says=f"{says}, and it sees no card{why}{': ' + warnings[0] if warnings else ''}",
            mend="Unset CUDA_VISIBLE_DEVICES, or set it to the card's UUID."
            if hidden is not None
            else "Load the module nvidia_uvm (`modprobe nvidia_uvm`); a container needs --gpus all.",
            facts=facts,
        )
    return Check(name="torch", level="ok", says=says, facts=facts)


def _sentence_transformers(patient: _Patient) -> Iterator[Check]:
    name = "sentence-transformers"
    said = patient.packages if patient.config.clip_model is not None and patient.import_torch else {}
    if "torch" not in said:
        yield Check(name=name, level="skipped", says="it needs torch" if patient.import_torch else "left out")
        return
    if "pipeline" not in said:
        missing = said.get("pipeline_missing", "")
        error = one_line(said.get("pipeline_error"), 240)
        vision = said.get("torchvision")
        if missing in ("sentence_transformers", "PIL"):
            yield Check(name=name, level="warning", says=f"the package {missing} is not installed", mend=_EXTRA)
        elif vision is not None:
            yield Check(
                name=name,
                level="problem",
                says=f"it cannot be imported, most likely for a torchvision ({vision}) that is not torch's: {error}",
                mend="Run: pip uninstall torchvision. CLIP does not need it.",
                facts={"torchvision": vision},
            )
        else:
            mend = "Install sentence-transformers anew."
            yield Check(name=name, level="problem", says=f"it cannot be imported: {error}", mend=mend)
        return
    version = said["pipeline"]["version"]
    facts = {"version": version}
    if _numbers(version)[0] < 6:
        yield Check(
            name=name,
            level="problem",
            says=f"{version}, which moves models by itself; 6.0 is the least that works",
            mend='Run: pip install "sentence-transformers>=6.2,<7"',
            facts=facts,
        )
    else:
        yield Check(name=name, level="ok", says=version, facts=facts)


def _clip_model(patient: _Patient) -> Iterator[Check]:
    name, model = "clip-model", patient.config.clip_model
    said = patient.packages if model is not None and patient.import_torch else {}
    if model is None or "pipeline" not in said:
        why = "left out" if not patient.import_torch else "it needs sentence-transformers"
        yield Check(name=name, level="skipped", says="clip_model is none" if model is None else why)
    elif Path(model).expanduser().is_dir():
        yield Check(name=name, level="ok", says=f"the folder {one_line(model)}")
    elif said.get("model", {}).get("cached"):
        yield Check(name=name, level="ok", says=f"{one_line(model)} is on this machine")
    else:
        yield Check(
            name=name,
            level="warning",
            says=f"{one_line(model)} is not on this machine; the first use fetches it (about 600 MB)",
            mend="Let the first start take its time, or fetch it elsewhere and set clip_model to its folder.",
        )


# --- Ollama -----------------------------------------------------------------------------------------------------------


def _ollama(patient: _Patient) -> Iterator[Check]:
    health, url = patient.health, patient.server.url
    facts = {"url": url, "level": health.level, "version": health.version}
    start = f"Start it (`ollama serve`) or set ollama_url, if it listens elsewhere than {url}."
    if health.level == "up":
        yield Check(name="ollama", level="ok", says=f"{health.version} at {url}", facts=facts)
    elif health.level == "down":
        yield Check(name="ollama", level="problem", says=f"no answer: {health.detail}", mend=start, facts=facts)
    elif health.level == "starting":
        mend = "Wait until it has looked at its cards (up to 30 s); if it stays so, restart it."
        yield Check(name="ollama", level="problem", says=f"it is starting or hangs: {health.detail}", mend=mend)
    else:
        mend = "A load may be running: try again. If it stays so, restart Ollama."
        yield Check(name="ollama", level="problem", says=f"/api/ps does not answer: {health.detail}", mend=mend)


def _numbers(version: str) -> tuple[int, int, int]:
    found = [int(number) for number in re.findall(r"\d{1,9}", version.partition("-")[0])[:3]]
    return (*found, 0, 0, 0)[:3]  # type: ignore[return-value]  # three, whatever was found


def _ollama_version(patient: _Patient) -> Iterator[Check]:
    name, version = "ollama-version", patient.health.version
    if not version:
        yield Check(name=name, level="skipped", says="Ollama does not answer")
        return
    have = _numbers(version)
    if have == (0, 0, 0):
        yield Check(name=name, level="ok", says=f"{version}: built from source, so nothing is known of it")
        return
    for floor, level, why in _OLLAMA_FLOORS:
        if have < floor:
            below = ".".join(map(str, floor))
            mend = "Upgrade Ollama; 0.32 is what this was proven on."
            yield Check(
                name=name,
                level=level,
                says=f"{version} is older than {below}: {why}",
                mend=mend,
                facts={"floor": below},
            )
            return
    yield Check(name=name, level="ok", says=version)


def _ollama_exposure(patient: _Patient) -> Iterator[Check]:
    name, config = "ollama-exposure", patient.config
    if not patient.ollama_is_local:
        plain = config.ollama_url.startswith("http://")
        yield Check(
            name=name,
            level="warning",
            says=f"screenshots are sent to {patient.server.url}{', in plain text' if plain else ''}",
            mend="Use an Ollama on this machine, or reach the other one by https or a tunnel.",
        )
        return
    parts = urlsplit(patient.server.url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    listening = _listeners(patient.machine, port) if patient.health.version else None
    if listening is None:
        yield Check(name=name, level="skipped", says="where it listens cannot be told")
    elif all(listening):
        yield Check(name=name, level="ok", says="it listens on this machine only")
    else:
        old = (0, 0, 0) < _numbers(patient.health.version) < _EXPOSED_FLOOR
        yield Check(
            name=name,
            level="problem" if old else "warning",
            says="it listens beyond this machine and has no password: whoever reaches it uses and unloads your models"
            + (", and read its memory (CVE-2026-7482)" if old else ""),
            mend="Start it with OLLAMA_HOST=127.0.0.1, or close the port to others.",
            facts={"port": port},
        )


def _listeners(machine: Machine, port: int) -> list[bool] | None:
    """For each socket that listens on the port, whether it is on loopback; None where that cannot be told."""
    found = []
    for table in ("proc/net/tcp", "proc/net/tcp6"):
        for line in (machine.read(table) or "").splitlines()[1:]:
            words = line.split()
            if len(words) > 3 and words[3] == "0A":
                host, _, number = words[1].partition(":")
                if int(number, 16) == port:
                    # Each 32 bits are in the machine's own order, which is little-endian wherever NVIDIA has drivers.
                    inner = bytes.fromhex(host)[-4:][::-1]
                    six = len(host) == 32
                    mapped = not six or host[:24] == "0000000000000000FFFF0000"
                    found.append(inner[0] == 127 if mapped else host == "00000000000000000000000001000000")
    return found or None


def _model(patient: _Patient) -> Iterator[Check]:
    name, model = "model", patient.config.vlm_model
    if patient.health.level not in ("up", "busy_or_wedged"):
        yield Check(name=name, level="skipped", says="Ollama does not answer")
        return
    catalog = patient.catalog
    facts = {"model": model, "disk_mib": catalog.size_mib}
    if catalog.present is Answer.YES:
        size = "" if catalog.size_mib is None else f", {catalog.size_mib:.0f} MiB on disk"
        yield Check(name=name, level="ok", says=f"{canonical_name(model)}{size}", facts=facts)
    elif catalog.present is Answer.NO:
        mend = f"Run: ollama pull {model}; `ollama list` shows what is there."
        yield Check(name=name, level="problem", says=catalog.detail, mend=mend, facts=facts)
    else:
        mend = "Try again; if it stays so, restart Ollama."
        yield Check(name=name, level="warning", says=f"it cannot be told: {catalog.detail}", mend=mend, facts=facts)


def _vision(patient: _Patient) -> Iterator[Check]:
    model = patient.config.vlm_model
    if patient.health.level != "up" or patient.catalog.present is not Answer.YES:
        yield Check(name="vision", level="skipped", says="the model cannot be looked at")
    elif patient.catalog.vision is Answer.YES:
        yield Check(name="vision", level="ok", says=f"{model} takes images")
    elif patient.catalog.vision is Answer.NO:
        mend = "Set vlm_model to a model that sees, such as qwen2.5vl:7b."
        yield Check(name="vision", level="problem", says=f"{model} takes no images", mend=mend)
    else:
        mend = "Upgrade Ollama to 0.6.4 or later to be told."
        yield Check(name="vision", level="warning", says=f"whether {model} takes images is not told", mend=mend)


def _offload(patient: _Patient) -> Iterator[Check]:
    ours = patient.residency.ours if patient.health.level == "up" else None
    if ours is None:
        yield Check(name="offload", level="skipped", says=f"{patient.config.vlm_model} is not loaded now")
        return
    facts = {"size_mib": ours.size_mib, "size_vram_mib": ours.size_vram_mib}
    share = f"{ours.size_vram_mib:.0f} of {ours.size_mib:.0f} MiB on the GPU"
    card = patient.card if patient.card_is_there and patient.server.on_our_card else None
    used = card.used_mib if isinstance(card, VRAMInfo) else None
    if ours.size_vram_mib == 0:
        if card is None:
            yield Check(name="offload", level="ok", says=f"{share}, as on a machine without one", facts=facts)
        else:
            yield Check(
                name="offload", level="problem", says=f"{share}: it runs on the CPU", mend=_RELOAD_UVM, facts=facts
            )
    elif ours.size_vram_mib < ours.size_mib:
        accepted = patient.config.on_partial_offload == "accept"
        yield Check(
            name="offload",
            level="ok" if accepted else "problem",
            says=f"{share}: the rest is on the CPU, many times slower",
            mend="" if accepted else "Make room on the card and load it again, or lower num_ctx in vlm_options.",
            facts=facts,
        )
    elif used is not None and used < ours.size_vram_mib / 2:
        yield Check(
            name="offload",
            level="problem",
            says=f"Ollama says {share}, and only {used:.0f} MiB of this card are used",
            mend=f"{_RELOAD_UVM} If it has another card, set gpu_uuid to that, or ollama_card to other.",
            facts=facts | {"used_mib": used},
        )
    else:
        yield Check(name="offload", level="ok", says=share, facts=facts)


def _pins(patient: _Patient) -> Iterator[Check]:
    if patient.health.level != "up":
        yield Check(name="pins", level="skipped", says="Ollama does not answer")
        return
    others = [model for model in patient.residency.others if model.forever]
    ours = patient.residency.ours
    for model in others:
        yield Check(
            name="pins",
            level="warning",
            says=f"{one_line(model.name, 80)} is loaded for ever by another program and holds "
            f"{model.size_vram_mib:.0f} MiB of the GPU",
            mend=f"Run: ollama stop {one_line(model.name, 80)}; find who sends keep_alive -1.",
            facts=_model_facts(model),
        )
    if ours is not None and ours.forever:
        yield Check(
            name="pins",
            level="warning",
            says=f"{one_line(ours.name, 80)} is loaded for ever by another program",
            mend="Our next request puts it right; find who sends keep_alive -1, or unset OLLAMA_KEEP_ALIVE.",
            facts=_model_facts(ours),
        )
    if not others and not (ours and ours.forever):
        count = len(patient.residency.others)
        says = f"nothing is loaded for ever; {count} other model{'' if count == 1 else 's'} loaded"
        yield Check(name="pins", level="ok", says=says, facts={"others": count})


def _model_facts(model: LoadedModel) -> dict[str, Any]:
    return {"model": model.name, "size_vram_mib": model.size_vram_mib}


def _orphans(patient: _Patient) -> Iterator[Check]:
    if patient.health.level != "up" or patient.holders is None or not patient.ollama_is_local:
        yield Check(name="orphans", level="skipped", says="who holds the card cannot be compared with Ollama's list")
        return
    runners = [h for h in patient.holders if re.match(r"ollama|llama-server", h.name)]
    listed = len(patient.residency.others) + (patient.residency.ours is not None)
    if runners and not listed and patient.residency.answer is not Answer.UNKNOWN:
        who = ", ".join(f"{h.name} ({h.pid})" for h in runners)
        yield Check(
            name="orphans",
            level="problem",
            says=f"{who} holds memory of the card, and Ollama has nothing loaded",
            mend=f"It was left behind by a server that was killed. Run: kill {' '.join(str(h.pid) for h in runners)}",
            facts={"pids": [h.pid for h in runners]},
        )
    else:
        yield Check(name="orphans", level="ok", says="no runner was left behind")


# --- the server's own environment -------------------------------------------------------------------------------------


def _server_environ(machine: Machine) -> tuple[Mapping[str, str], str] | None:
    """The server's environment from its process, or from its unit's files; None where neither can be read."""
    for place in sorted((machine.root / "proc").glob("[0-9]*")):
        pid = place.name
        if (machine.read(f"proc/{pid}/comm") or "").strip() != "ollama":
            continue
        if "serve" not in (machine.read(f"proc/{pid}/cmdline") or "").split("\0"):
            continue
        said = machine.read(f"proc/{pid}/environ")
        if said:
            return dict(part.split("=", 1) for part in said.split("\0") if "=" in part), f"process {pid}"
    found: dict[str, str] = {}
    units = machine.root / "etc/systemd/system"
    files = [units / "ollama.service", *sorted((units / "ollama.service.d").glob("*.conf"))]
    for file in files:
        for line in (machine.read(str(file.relative_to(machine.root))) or "").splitlines():
            if line.strip().startswith("Environment="):
                try:
                    parts = shlex.split(line.partition("=")[2])
                except ValueError:
                    continue
                found |= dict(part.split("=", 1) for part in parts if "=" in part)
    return (found, str(units / "ollama.service")) if any(file.exists() for file in files) else None


def _server_settings(patient: _Patient) -> Iterator[Check]:
    seen = patient.server_environ
    if seen is None:
        why = "it is another machine's" if not patient.ollama_is_local else "its process and unit cannot be read"
        yield Check(name="ollama-environment", level="skipped", says=f"it is not seen: {why}")
        return
    environ, where = seen
    for name, variable, trap in _TRAPS:
        value = environ.get(variable, "").strip().strip("\"'")
        bad = trap(value, patient) if value else None
        facts = {"variable": variable, "value": value, "where": where}
        if bad is None:
            says = f"{variable} is {one_line(value, 40) or 'not set'} ({where})"
            yield Check(name=name, level="ok", says=says, facts=facts)
        else:
            says = f"{variable}={one_line(value, 40)} ({where}): {bad[0]}"
            yield Check(name=name, level="warning", says=says, mend=bad[1], facts=facts)


_Trap = Callable[[str, _Patient], "tuple[str, str] | None"]


_DURATION: Final = re.compile(r"[0-9]+|(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:ns|us|µs|ms|s|m|h))+")


def _keep_alive_trap(value: str, _: _Patient) -> tuple[str, str] | None:
    unset = "Unset it; who wants another time sends it with the request."
    amount = value.removeprefix("-")
    if not _DURATION.fullmatch(amount):
        return "it cannot be read, so Ollama silently takes 5 minutes", "Write it like 10m, or as seconds."
    if not re.search("[1-9]", amount):
        return "models of other programs are unloaded after every request", unset
    if value.startswith("-"):
        return "whatever another program loads stays for ever", unset
    return None


def _loaded_models_trap(value: str, _: _Patient) -> tuple[str, str] | None:
    if value == "1":
        return "another program's model puts ours out, also where both would fit", "Unset it, or set it to 2 or more."
    return None


def _parallel_trap(value: str, _: _Patient) -> tuple[str, str] | None:
    if value.isdigit() and int(value) > 1:
        return (
            "every model takes the memory of that many contexts",
            "Unset it, or set vlm_size_mib to what the model takes then.",
        )
    return None


def _overhead_trap(value: str, patient: _Patient) -> tuple[str, str] | None:
    if value.strip("0") and (0, 30, 0) <= _numbers(patient.health.version):
        return (
            "since Ollama 0.30 it keeps no room free",
            "Use LLAMA_ARG_FIT_TARGET (MiB to leave free) in Ollama's environment instead.",
        )
    return None


def _devices_trap(value: str, patient: _Patient) -> tuple[str, str] | None:
    card = patient.card
    if not isinstance(card, VRAMInfo) or not card.device_uuid or patient.config.ollama_card == "other":
        return None
    entries = [entry.strip() for entry in value.split(",")]
    if value == "-1" or (
        all(entry.startswith("GPU-") for entry in entries)
        and not any(card.device_uuid.startswith(entry) for entry in entries)
    ):
        return (
            f"Ollama does not use the card {card.device_uuid}",
            "Let it name that card, or set gpu_uuid to Ollama's, or ollama_card to other.",
        )
    return None


_TRAPS: Final[tuple[tuple[str, str, _Trap], ...]] = (
    ("keep-alive", "OLLAMA_KEEP_ALIVE", _keep_alive_trap),
    ("max-loaded-models", "OLLAMA_MAX_LOADED_MODELS", _loaded_models_trap),
    ("num-parallel", "OLLAMA_NUM_PARALLEL", _parallel_trap),
    ("gpu-overhead", "OLLAMA_GPU_OVERHEAD", _overhead_trap),
    ("ollama-devices", "CUDA_VISIBLE_DEVICES", _devices_trap),
)

_CHECKS: Final[tuple[Callable[[_Patient], Iterator[Check]], ...]] = (
    _settings,
    _python,
    _driver,
    _nvml,
    _card,
    _memory,
    _card_lock,
    _suspend,
    _pinned_memory,
    _torch,
    _sentence_transformers,
    _clip_model,
    _ollama,
    _ollama_version,
    _ollama_exposure,
    _model,
    _vision,
    _offload,
    _pins,
    _orphans,
    _server_settings,
)

__all__ = ["Check", "Level", "Machine", "examine"]
