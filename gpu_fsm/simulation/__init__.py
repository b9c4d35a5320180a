"""The simulated world: a card, an Ollama, a CLIP and a clock that the manager runs in unchanged.

It is the world, not an echo of the manager: nothing here imports the machine, its states or its guards, so a wrong
belief there cannot be confirmed here.  Start with `SimulatedWorld`; `serve` and `run_server` put the simulated Ollama
on a real socket.
"""

from __future__ import annotations

from gpu_fsm.simulation.card import CardFull, SharedCard, SimulatedCard
from gpu_fsm.simulation.clip import SimulatedCLIP, SimulatedProbe
from gpu_fsm.simulation.clock import Appointment, RunningClock, SimulatedClock, WorldClock, WorldStuck
from gpu_fsm.simulation.faults import KINDS, OPERATIONS, Fault, Faults
from gpu_fsm.simulation.http import OllamaHTTPServer, run_server, serve
from gpu_fsm.simulation.ollama import LogEntry, SimulatedModel, SimulatedOllama
from gpu_fsm.simulation.wire import Exchange
from gpu_fsm.simulation.world import VLM, SimulatedWorld

__all__ = [
    "KINDS",
    "OPERATIONS",
    "VLM",
    "Appointment",
    "CardFull",
    "Exchange",
    "Fault",
    "Faults",
    "LogEntry",
    "OllamaHTTPServer",
    "RunningClock",
    "SharedCard",
    "SimulatedCLIP",
    "SimulatedCard",
    "SimulatedClock",
    "SimulatedModel",
    "SimulatedOllama",
    "SimulatedProbe",
    "SimulatedWorld",
    "WorldClock",
    "WorldStuck",
    "run_server",
    "serve",
]
