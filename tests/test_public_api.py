"""The public API, pinned: a change here is a change for users, and belongs into the changelog."""

from __future__ import annotations

import inspect
import subprocess
import sys

import attrs
import pytest

import gpu_fsm
from gpu_fsm import GPUResourceManager, GPUResourceStatus
from gpu_fsm.aio import AsyncVerbs
from gpu_fsm.handles import CLIP, VLM
from tests.waiting import ROOT, run_python

NAMES = [
    "Event", "ExecutionMode", "GPUFSMError", "GPUResourceConfig", "GPUResourceManager", "GPUResourceStatus", "Hold",
    "ModelState", "Outcome", "Reason", "State", "VRAMInfo", "__version__", "load_config",
]  # fmt: skip

MANAGER = {
    "__init__": "(self, config: 'GPUResourceConfig | None' = None, *, vlm_server: 'VLMServer | None' = None, "
    "clip_host: 'CLIPHost | None' = None, vram_probe: 'VRAMProbe | None' = None, clock: 'Clock | None' = None, "
    "threaded: 'bool' = True) -> 'None'",
    "aio": "property",
    "async_httpx_transport": "(self, *, holder: 'str' = '', other_models: 'OtherModels' = 'pass', "
    "timeout_s: 'float | None' = None) -> 'AsyncVLMTransport'",
    "clip": "(self, *, holder: 'str' = '', timeout_s: 'float | None' = None) -> 'Iterator[CLIP]'",
    "config": "property",
    "close": "(self, *, timeout_s: 'float | None' = None) -> 'tuple[str, ...]'",
    "drive_for": "(self, seconds: 'float') -> 'None'",
    "ensure_vlm_loaded": "(self, *, timeout_s: 'float | None' = None) -> 'None'",
    "ensure_vlm_unloaded": "(self, *, timeout_s: 'float | None' = None) -> 'None'",
    "explain": "(self, mode: 'ExecutionMode | str') -> 'str'",
    "get_clip_device": "(self) -> 'str'",
    "get_status": "(self) -> 'GPUResourceStatus'",
    "httpx_transport": "(self, *, holder: 'str' = '', other_models: 'OtherModels' = 'pass', "
    "timeout_s: 'float | None' = None) -> 'VLMTransport'",
    "journal": "property",
    "lend": "(self, holder: 'str') -> 'Iterator[Loan]'",
    "migrate_clip_to_cpu": "(self, *, timeout_s: 'float | None' = None) -> 'None'",
    "migrate_clip_to_gpu": "(self, *, timeout_s: 'float | None' = None) -> 'None'",
    "needs_clip": "(self, function: 'Any' = None, /, *, holder: 'str' = '', timeout_s: 'float | None' = None) -> 'Any'",
    "needs_vlm": "(self, function: 'Any' = None, /, *, holder: 'str' = '', timeout_s: 'float | None' = None) -> 'Any'",
    "reconfigure": "(self, config: 'GPUResourceConfig | None' = None, /, **settings: 'Any') -> 'dict[str, Any]'",
    "requests_session": "(self, *, holder: 'str' = '', other_models: 'OtherModels' = 'pass', "
    "timeout_s: 'float | None' = None) -> 'DoorSession'",
    "set_execution_mode": "(self, mode: 'ExecutionMode | str', *, preempt: 'bool' = False, "
    "timeout_s: 'float | None' = None) -> 'Outcome'",
    "shared": "(config: 'GPUResourceConfig | None' = None, **ports: 'Any') -> 'GPUResourceManager'",
    "submit_execution_mode": "(self, mode: 'ExecutionMode | str', *, preempt: 'bool' = False) -> 'Future[Outcome]'",
    "subscribe": "(self, callback: 'Listener', *kinds: 'str | type[Event]') -> 'Callable[[], None]'",
    "vlm": "(self, *, holder: 'str' = '', timeout_s: 'float | None' = None) -> 'Iterator[VLM]'",
}

ASYNC = {
    "clip", "close", "ensure_vlm_loaded", "ensure_vlm_unloaded", "get_status", "migrate_clip_to_cpu",
    "migrate_clip_to_gpu", "set_execution_mode", "vlm",
}  # fmt: skip

STATUS = [
    "execution_mode", "asked_mode", "state", "since_at", "reason", "hold", "vram", "vlm_model", "vlm_state",
    "vlm_size_mib", "vlm_size_vram_mib", "vlm_size_source", "vlm_ours", "evidence", "proof", "clip_device",
    "clip_context_mib", "cpu_only",
    "cpu_only_reason", "others", "leftovers", "leases", "timers", "queued", "observed_at", "now_at", "closed",
    "listener_errors", "card_held_by", "simulated",
]  # fmt: skip

HEAVY = (
    "torch", "sentence_transformers", "transformers", "transitions.extensions", "requests", "urllib3", "pynvml", "rich",
    "click", "numpy", "PIL", "typed_settings", "hypothesis",
)  # fmt: skip


def public(kind: type) -> dict[str, str]:
    """A class's public members with their signatures as text."""
    members = {}
    for name, member in vars(kind).items():
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(member, property):
            members[name] = "property"
        elif isinstance(member, classmethod):
            members[name] = str(inspect.signature(member.__get__(None, kind)))
        elif callable(member):
            members[name] = str(inspect.signature(member))
    return members


def test_the_top_level_names_are_these() -> None:
    """`gpu_fsm.__all__`, sorted, and every one of them is there."""
    assert gpu_fsm.__all__ == NAMES
    assert sorted(gpu_fsm.__all__) == gpu_fsm.__all__
    assert all(hasattr(gpu_fsm, name) for name in NAMES)


def test_the_modules_of_the_top_level_names_are_there_too() -> None:
    """`except gpu_fsm.errors.CardHeld` works before anything else was asked for."""
    said = run_python("import gpu_fsm\nprint(gpu_fsm.errors.CardHeld.__name__, gpu_fsm.status.State.IDLE.name)\n")
    assert said == "CardHeld IDLE\n"


def test_a_type_checker_sees_the_names_that_are_there_and_no_others() -> None:
    """It would take any name for something that is there, were it shown that names are looked up late."""
    said = run_python(
        "import importlib, typing, gpu_fsm.manager\n"
        "del gpu_fsm.__getattr__\n"
        "typing.TYPE_CHECKING = True\n"
        "print(*vars(importlib.reload(gpu_fsm)))\n"
    ).split()
    assert set(NAMES) <= set(said)
    assert "__getattr__" not in said


def test_the_manager_s_methods_have_these_signatures() -> None:
    """Names, order, defaults, keyword-only marks and types."""
    assert public(GPUResourceManager) == MANAGER


def test_the_asyncio_face_has_these_verbs() -> None:
    """The same words, awaitable."""
    assert {name for name in public(AsyncVerbs) if not name.startswith("_")} == ASYNC


def test_leases_give_these_calls() -> None:
    """What the holder of a VLM or a CLIP can do."""
    assert {name for name in public(VLM) if not name.startswith("_")} == {
        "model",
        "generate",
        "chat",
        "stream",
        "stream_chat",
    }
    assert {name for name in public(CLIP) if not name.startswith("_")} == {"device", "encode"}


def test_the_status_has_these_fields() -> None:
    """Programs read them by name, and `to_dict` writes them by name."""
    assert [field.name for field in attrs.fields(GPUResourceStatus)] == STATUS
    assert list(GPUResourceStatus().to_dict()) == STATUS


def test_the_specification_s_words_are_kept() -> None:
    """Names that users know: classes, verbs and events."""
    from gpu_fsm import clip, events, ollama, vram

    assert ollama.OllamaManager.load_model
    assert ollama.OllamaManager.unload_model
    assert ollama.OllamaManager.is_model_loaded
    assert vram.VRAMMonitor
    assert clip.CLIPManager
    assert [mode.name for mode in gpu_fsm.ExecutionMode] == ["IDLE", "RECORDING", "AUTOPILOT", "DEGRADED"]
    assert {"mode_changed", "resource_changed", "idle_unload"} <= {kind.kind for kind in events.KINDS}


def test_every_public_thing_has_a_docstring() -> None:
    """What is public is explained."""
    for name in MANAGER:
        assert name == "__init__" or inspect.getdoc(getattr(GPUResourceManager, name)), name
    for name in NAMES:
        assert name == "__version__" or inspect.getdoc(getattr(gpu_fsm, name)), name


def test_importing_pulls_in_nothing_heavy() -> None:
    """Adapters and their libraries load when they are used."""
    said = run_python(f"import sys, gpu_fsm\nprint([name for name in {HEAVY!r} if name in sys.modules])\n")
    assert said == "[]\n"


def test_importing_works_without_nvml_torch_and_a_home() -> None:
    """In a process where these cannot be imported and HOME is not set, the package imports and a simulation runs."""
    run_python(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('pynvml', 'torch', 'sentence_transformers', 'transformers'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from gpu_fsm import GPUResourceManager\n"
        "from gpu_fsm.ollama import OllamaManager\n"
        "from gpu_fsm.simulation import SimulatedWorld\n"
        "world = SimulatedWorld()\n"
        "config = world.config()\n"
        "server = OllamaManager(config, clock=world.clock, transport=world.transport)\n"
        "manager = GPUResourceManager(config, threaded=False, **world.ports(server))\n"
        "assert manager.set_execution_mode('recording').granted\n"
        "manager.close()\n",
        options=("-W", "error"),
    )


def test_a_real_manager_opens_without_nvml() -> None:
    """Without the NVML binding the card is absent and the status says so; nothing raises."""
    run_python(
        "import sys\n"
        "sys.modules['pynvml'] = None\n"
        "from gpu_fsm import GPUResourceManager, GPUResourceConfig\n"
        "config = GPUResourceConfig(ollama_url='http://127.0.0.1:9', clip_model=None)\n"
        "manager = GPUResourceManager(config)\n"
        "outcome = manager.set_execution_mode('idle', timeout_s=30)\n"
        "assert outcome.granted\n"
        "status = manager.get_status()\n"
        "assert status.cpu_only and status.cpu_only_reason, status\n"
        "manager.close()\n"
    )


def test_importing_starts_no_thread_and_opens_no_file_or_socket() -> None:
    """Import is for names: no thread, no socket, nothing printed."""
    run_python(
        "import socket, threading\n"
        "def refuse(*args, **options): raise AssertionError('a socket at import')\n"
        "socket.socket.connect = refuse\n"
        "import gpu_fsm, gpu_fsm.ollama, gpu_fsm.vram, gpu_fsm.clip, gpu_fsm.simulation\n"
        "assert threading.active_count() == 1\n"
    )


@pytest.mark.parametrize("options", [(), ("-O",), ("-W", "error", "-bb")], ids=["plain", "optimised", "strict"])
def test_the_package_imports_in_every_temper_of_python(options: tuple[str, ...]) -> None:
    """Asserts off, warnings as errors: the version is printed all the same."""
    done = subprocess.run(
        [sys.executable, *options, "-c", "import gpu_fsm; print(gpu_fsm.__version__)"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == gpu_fsm.__version__
