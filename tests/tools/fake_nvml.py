"""Drive a fake NVIDIA driver: `native/fake_nvml.c`, built here and used by the unmodified `pynvml`.

    fake = FakeNVML.create(tmp_path)
    fake.add_gpu(total_mib=8192, used_mib=1024)
    with fake.active(): ...                  # pynvml in this process
    subprocess.run(..., env=fake.env())      # pynvml in another one: the same cards, the same counters

Values, errors, delays and counters live in one mapped file and may be changed while the library is in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "native" / "fake_nvml.c"
SONAME = "libnvidia-ml.so.1"
MIB = 1024 * 1024
NOT_TOLD = 2**64 - 1
"""What a driver gives for a process whose memory it does not know."""
FUNCTIONS = ("INIT", "SHUTDOWN", "COUNT", "HANDLE", "UUID", "NAME", "MEM", "COMPUTE", "GRAPHICS", "PROCESS_NAME", "MIG")
FOREVER = -1


class _Function(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("error", "after", "times", "delay_us", "calls", "unused")]


class _Process(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint32),
        ("lists", ctypes.c_uint32),
        ("used", ctypes.c_uint64),
        ("name", ctypes.c_char * 48),
    ]


class _Device(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("total", "reserved", "used", "peak", "refused")),
        *((name, ctypes.c_int32) for name in ("mem_error", "handle_error", "parent", "mig", "processes", "unused")),
        ("uuid", ctypes.c_char * 96),
        ("name", ctypes.c_char * 64),
        ("pci", ctypes.c_char * 32),
        ("process", _Process * 8),
    ]


class _State(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("references", "devices", "old_driver", "peak_references")),
        ("function", _Function * 16),
        ("device", _Device * 8),
    ]


def missing() -> str:
    """Why the library cannot be built here; empty where it can."""
    if os.name != "posix" or os.uname().sysname != "Linux":
        return "the fake NVML is for Linux"
    return "" if shutil.which("gcc") else "gcc is not installed"


def cache_folder() -> Path:
    """Where built libraries are kept between runs: outside the repository, the user's own."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(root) / "gpu_fsm-tests"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="gpu_fsm-tests-"))
    return folder


def build() -> Path:
    """Compile once per version of the source; returns the library, whose file has the driver's own name."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = cache_folder() / f"fake_nvml-{digest}" / SONAME
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        fresh = library.with_name(f"{SONAME}.{os.getpid()}")
        flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-Wl,-soname,{SONAME}"]
        subprocess.run(["gcc", *flags, "-o", str(fresh), str(SOURCE)], check=True)
        fresh.replace(library)
    return library


class FakeNVML:
    """The cards, and the knobs."""

    def __init__(self, library: Path, path: Path) -> None:
        self.library, self.path = library, path
        if not path.exists():
            path.write_bytes(bytes(ctypes.sizeof(_State)))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.state = _State.from_buffer(self._map)

    @classmethod
    def create(cls, folder: Path) -> FakeNVML:
        """Start a driver without cards, its state in `folder`."""
        return cls(build(), folder / "nvml.state")

    @classmethod
    def attach(cls, path: Path) -> FakeNVML:
        """Join a driver that another process has started."""
        return cls(build(), path)

    def add_gpu(
        self,
        *,
        total_mib: float = 8192.0,
        used_mib: float = 0.0,
        reserved_mib: float = 0.0,
        uuid: str = "",
        name: str = "Fake GPU",
        parent: int = -1,
    ) -> int:
        """Plug a card in, or with `parent` a MIG slice of that card; returns its index."""
        index = self.state.devices
        device = self.state.device[index]
        device.total, device.used = int(total_mib * MIB), int(used_mib * MIB)
        device.reserved, device.parent = int(reserved_mib * MIB), parent
        device.uuid = (uuid or f"{'GPU' if parent < 0 else 'MIG'}-{index:08x}-0000-0000-0000-000000000000").encode()
        device.name, device.pci, device.mig = name.encode(), f"00000000:{index + 1:02X}:00.0".encode(), -1
        if parent >= 0:
            self.state.device[parent].mig = 1
        self.state.devices += 1
        return index

    def add_process(self, index: int, pid: int, mib: float | None, *, name: str = "", lists: str = "compute") -> None:
        """Put a process on the card's lists; `mib=None` for a share that the driver does not tell."""
        device = self.state.device[index]
        process = device.process[device.processes]
        process.pid, process.name = pid, name.encode()
        process.lists = {"compute": 1, "graphics": 2, "both": 3}[lists]
        process.used = NOT_TOLD if mib is None else int(mib * MIB)
        device.processes += 1

    def set_used(self, index: int, mib: float) -> None:
        self.state.device[index].used = int(mib * MIB)

    def fail(self, function: str, code: int, *, after: int = 0, times: int = FOREVER) -> None:
        """Let a function fail with `code`: not for the next `after` calls, then `times` times."""
        knob = self.state.function[FUNCTIONS.index(function)]
        knob.after, knob.times, knob.error = knob.calls + after, times, code

    def mend(self, function: str) -> None:
        self.state.function[FUNCTIONS.index(function)].error = 0

    def delay(self, function: str, seconds: float) -> None:
        self.state.function[FUNCTIONS.index(function)].delay_us = int(seconds * 1e6)

    def calls(self, function: str) -> int:
        """How often a function was called, by all processes together."""
        return int(self.state.function[FUNCTIONS.index(function)].calls)

    @property
    def references(self) -> int:
        """Inits less shutdowns."""
        return int(self.state.references)

    def env(self) -> dict[str, str]:
        """The environment of a process that shall find this driver, and nothing else of ours."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
        found = os.environ.get("LD_LIBRARY_PATH")
        path = f"{self.library.parent}{':' + found if found else ''}"
        return {**kept, "LD_LIBRARY_PATH": path, "FAKE_NVML_STATE": str(self.path)}

    def load(self) -> ctypes.CDLL:
        """The library in this process, over this driver's cards."""
        library = ctypes.CDLL(str(self.library))
        library.fake_nvml_attach.argtypes = [ctypes.c_char_p]
        library.fake_nvml_take.argtypes = library.fake_nvml_give.argtypes = [ctypes.c_int, ctypes.c_uint64]
        library.fake_nvml_give.restype = None
        assert library.fake_nvml_attach(str(self.path).encode()) == ctypes.sizeof(_State), "the layouts differ"
        return library

    @contextlib.contextmanager
    def active(self) -> Iterator[FakeNVML]:
        """Let this process's pynvml use the library, as if it had loaded it itself."""
        import pynvml

        library = self.load()
        before = pynvml.nvmlLib, dict(pynvml._nvmlGetFunctionPointer_cache)
        pynvml.nvmlLib = library
        pynvml._nvmlGetFunctionPointer_cache.clear()
        try:
            yield self
        finally:
            pynvml.nvmlLib = before[0]
            pynvml._nvmlGetFunctionPointer_cache.clear()
            pynvml._nvmlGetFunctionPointer_cache.update(before[1])
