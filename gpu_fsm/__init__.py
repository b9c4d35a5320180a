"""A finite-state-machine engine that decides what is on the GPU of a local agent, and makes it so.

Start with `GPUResourceManager`.  To understand the package, read `states.py` first.

The map: imports point up this list only, from a later line to an earlier one; files on one line do not know each other.

forking - whether CUDA was there before a fork
errors - exceptions with facts as attributes
status - the words of the domain, and what is
events - what happened
ports - the Protocols to read to plug something else in
rules - what the value of a setting must be
settings - every setting of the manager, with its reason
appconfig - the settings of a whole program
guards - the snapshot of one event, and the predicates on it
states - the states, their promises, the table of all moves: read first
tickets, leases - requests on their way; who uses which model
machine - the table, running: the only file that knows transitions
observer - looking: what the ports answer, and what is remembered between looks
steps - acting: what the four steps do to the world, and how they prove it
engine - the machine's memory: aims, tickets, reasons, timers; it carries out what the table decides
ollama, vram, clip - the adapters to Ollama, NVML and sentence-transformers
cardlock - one manager per card
driver - the one writer: mailbox, threads, timers, listeners
arguments, handles - what callers hand in; what a lease gives them
aio - the asyncio face
intercept - doors through which code that knows nothing of us reaches the VLM
manager - the public face
gateway - the same door for other programs, over HTTP
control - the control socket: server and client
agent - the reference agent: loop, detector, screen memory
telling - what it did and what happened, in words
simulation - the simulated card, Ollama, CLIP and clock
testing - the fuzz kit
diagrams - drawing the running definition
demo - the main job, told as a story
examples - programs that embed the manager, to read, to copy and to run
doctor - what a user would ask about, looked at
cli - the command line
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gpu_fsm import forking as forking  # notes what a child cannot find out any more

if TYPE_CHECKING:
    from gpu_fsm.errors import GPUFSMError
    from gpu_fsm.events import Event
    from gpu_fsm.manager import GPUResourceManager
    from gpu_fsm.settings import GPUResourceConfig, load_config
    from gpu_fsm.status import ExecutionMode, GPUResourceStatus, Hold, ModelState, Reason, State, VRAMInfo
    from gpu_fsm.tickets import Outcome

__version__ = "0.1.0"

__all__ = [
    "Event",
    "ExecutionMode",
    "GPUFSMError",
    "GPUResourceConfig",
    "GPUResourceManager",
    "GPUResourceStatus",
    "Hold",
    "ModelState",
    "Outcome",
    "Reason",
    "State",
    "VRAMInfo",
    "__version__",
    "load_config",
]

_HOMES = {
    "errors": ("GPUFSMError",),
    "events": ("Event",),
    "manager": ("GPUResourceManager",),
    "settings": ("GPUResourceConfig", "load_config"),
    "status": ("ExecutionMode", "GPUResourceStatus", "Hold", "ModelState", "Reason", "State", "VRAMInfo"),
    "tickets": ("Outcome",),
}


if not TYPE_CHECKING:  # a type checker would take every misspelt name for something that is there

    def __getattr__(name: str) -> Any:
        """Import what is asked for, when it is: a command that is interrupted before that ends in one line."""
        for home, names in _HOMES.items():
            if name == home or name in names:
                module = importlib.import_module(f"{__name__}.{home}")
                globals()[name] = value = module if name == home else getattr(module, name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
