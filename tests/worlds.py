"""Builders that tests share: a manager in a simulated world, driven inline in virtual time or by its own thread."""

from __future__ import annotations

from typing import Any

from gpu_fsm import GPUResourceManager
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation import SimulatedWorld


def build(world: SimulatedWorld, *, threaded: bool, **settings: Any) -> GPUResourceManager:
    """A manager over the real `OllamaManager` and the world's other parts; `settings` go to `world.config`."""
    config = world.config(**settings)
    server = OllamaManager(config, clock=world.clock, transport=world.transport)
    return GPUResourceManager(config, **world.ports(server), threaded=threaded)


def inline(world: SimulatedWorld, **settings: Any) -> GPUResourceManager:
    """A manager that is driven by whoever waits, and by `drive_for`."""
    return build(world, threaded=False, **settings)


def threaded(world: SimulatedWorld, **settings: Any) -> GPUResourceManager:
    """A manager with its own driver thread; close it at the end of the test."""
    return build(world, threaded=True, **settings)
