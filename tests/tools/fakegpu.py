"""A second torch device without a GPU: `native/fakegpu.cpp`, compiled here and kept between runs.

gpu = fakegpu.load()                     # once per process; `torch.device("fakegpu:0")` exists from then on
gpu.reset(total_mib=64, context_mib=8)
gpu.fail_allocation(3); gpu.break_down(); gpu.figures().used
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import types
from pathlib import Path
from typing import Any, NamedTuple

from tests.tools.fake_nvml import MIB, FakeNVML, cache_folder

SOURCE = Path(__file__).parents[1] / "native" / "fakegpu.cpp"


class Figures(NamedTuple):
    """The device's books: bytes and counts.  Counts leave out what happens inside kernels, but `all_allocations`."""

    used: int
    allocated: int
    reserved: int
    peak: int
    allocations: int
    all_allocations: int
    h2d: int
    h2d_bytes: int
    d2h: int
    d2h_bytes: int
    d2d: int


def missing() -> str:
    """Why the device cannot be built here; empty where it can."""
    if os.name != "posix" or os.uname().sysname != "Linux":
        return "the fake device is for Linux"
    if not shutil.which("g++"):
        return "g++ is not installed"
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if (Path(torch.__file__).parent / "include" / "ATen").is_dir() else "torch came without its headers"


def build() -> Path:
    """Compile once per version of the source and of torch (about 20 s); returns the library."""
    import torch

    root = Path(torch.__file__).parent
    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = cache_folder() / f"fakegpu-{digest}.so"
    if not library.exists():
        fresh = library.with_suffix(f".{os.getpid()}")
        include = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
        flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", *include]
        links = [f"-L{root}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root}/lib"]
        subprocess.run(["g++", *flags, "-o", str(fresh), str(SOURCE), *links], check=True)
        fresh.replace(library)
    return library


class FakeGPU:
    """The device's knobs."""

    name = "fakegpu:0"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.fakegpu_reset.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        library.fakegpu_link.argtypes = [ctypes.c_void_p] * 4
        library.fakegpu_fail_allocation.argtypes = [ctypes.c_int64]
        library.fakegpu_break.argtypes = [ctypes.c_int]
        library.fakegpu_figures.argtypes = [ctypes.POINTER(ctypes.c_int64)]
        for name in ("reset", "link", "fail_allocation", "break", "figures", "init"):
            getattr(library, f"fakegpu_{name}").restype = None

    def reset(self, *, total_mib: float = 8192.0, context_mib: float = 0.0) -> None:
        """A card of this size, its context unpaid, its counters at zero, its errors forgotten."""
        self._library.fakegpu_reset(int(total_mib * MIB), int(context_mib * MIB))

    def link(self, nvml: FakeNVML, index: int = 0) -> None:
        """Draw on a card of the fake NVML, together with every other process that does."""
        device = nvml.state.device[index]
        base = ctypes.addressof(device)
        at = {name: base + getattr(type(device), name).offset for name in ("total", "used", "reserved", "peak")}
        self._library.fakegpu_link(at["total"], at["used"], at["reserved"], at["peak"])

    def unlink(self) -> None:
        self._library.fakegpu_link(None, None, None, None)

    def fail_allocation(self, n: int) -> None:
        """Let the n-th allocation from now run out of memory, kernels' included; 0 is the next, -1 none."""
        self._library.fakegpu_fail_allocation(n)

    def break_down(self, broken: bool = True) -> None:
        """Fail every operation from now on, as after a device-side assert."""
        self._library.fakegpu_break(int(broken))

    def figures(self) -> Figures:
        values = (ctypes.c_int64 * len(Figures._fields))()
        self._library.fakegpu_figures(values)
        return Figures(*values)


@functools.cache
def load() -> FakeGPU:
    """Register the device with this process's torch, for good."""
    import torch

    torch.utils.rename_privateuse1_backend("fakegpu")
    library = ctypes.CDLL(str(build()))
    library.fakegpu_init()
    module: Any = types.ModuleType("torch.fakegpu")
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    torch._register_device_module("fakegpu", module)
    return FakeGPU(library)
