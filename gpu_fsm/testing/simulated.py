"""A card, an Ollama, a CLIP and a clock in one line, for the tests of a program that embeds the manager.

    with simulated_world(card_mib=6400.0, idle_timeout_s=60.0) as sim:
        agent = MyAgent(sim.manager)
        sim.faults.arm("ollama.load", "http_500")
        agent.record()
        sim.drive_for(120.0)
        assert not sim.world.vlm_resident()

Needs nothing beyond the package itself.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Iterator
from typing import Any

import attrs
from attrs import frozen

from gpu_fsm.errors import BadArgument
from gpu_fsm.manager import GPUResourceManager
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.simulation import Faults, SimulatedCard, SimulatedCLIP, SimulatedClock, SimulatedOllama, SimulatedWorld
from gpu_fsm.status import ExecutionMode
from gpu_fsm.testing.oracle import Oracle

NEIGHBOUR = "game"
"""The other program on the card."""

OTHER = "other"
"""A second model that Ollama has; other clients use it."""

MODES = (ExecutionMode.IDLE, ExecutionMode.RECORDING, ExecutionMode.AUTOPILOT)

WAIT_S = 1000.0
"""Longer than every deadline together: a call that takes longer has hung."""

JOURNAL_SIZE = 100_000
"""The journal is judged without gaps, so it must not forget anything between two looks."""

WORLD_OPTIONS = frozenset(inspect.signature(SimulatedWorld).parameters)
MANAGER_SETTINGS = frozenset(field.name for field in attrs.fields(GPUResourceConfig))


@frozen(kw_only=True, eq=False)
class Simulation:
    """A real manager in a simulated world, and the oracle that watches both."""

    world: SimulatedWorld
    manager: GPUResourceManager
    oracle: Oracle

    @property
    def card(self) -> SimulatedCard:
        """The ledger: who holds how many MiB."""
        return self.world.card

    @property
    def ollama(self) -> SimulatedOllama:
        """The server: its log, its runners, what other clients do, stopping and starting it."""
        return self.world.ollama

    @property
    def clip(self) -> SimulatedCLIP:
        """Where CLIP is, how often it moved and encoded."""
        return self.world.clip

    @property
    def clock(self) -> SimulatedClock:
        """Virtual seconds; they pass while something waits."""
        return self.world.clock

    @property
    def faults(self) -> Faults:
        """The switchboard: `arm(operation, kind)`, `heal()`."""
        return self.world.faults

    def drive_for(self, seconds: float) -> None:
        """Let `seconds` pass; the manager serves what falls due."""
        self.manager.drive_for(seconds)

    def neighbour_takes(self, mib: float) -> None:
        """Another program takes `mib` of the card, or what is left of it."""
        self.card.take(NEIGHBOUR, min(mib, self.card.free_mib))

    def neighbour_leaves(self) -> None:
        """It gives all of it back."""
        self.card.give_back(NEIGHBOUR)

    def generate(self, prompt: str = "what is this?") -> str:
        """Lease the VLM, ask it something, and give it back; returns its answer."""
        with self.manager.vlm() as vlm:
            return vlm.generate(prompt).text

    def encode(self, *texts: str) -> Any:
        """Lease CLIP, embed, and give it back; float32 of shape (n, d)."""
        with self.manager.clip() as clip:
            return clip.encode(list(texts))

    def check(self) -> None:
        """Raise AssertionError with every promise of the manager that was broken so far."""
        self.oracle.check()


@contextlib.contextmanager
def simulated_world(*, threaded: bool = False, **settings: Any) -> Iterator[Simulation]:
    """Make a world with a real manager in it; close and judge it at the end.

    `settings` are those of `GPUResourceConfig` and of `SimulatedWorld` (`card_mib`, `vlm_mib`, `gpu`, `clip`,
    `version`, `tells_holders` ...), by name.  The manager is driven by whoever waits and time is virtual;
    `threaded=True` gives it its own thread, and then only the test moves the clock.

    At the end the manager is closed; a promise that it broke is an AssertionError, unless the block failed already.
    Raises `BadArgument` for an unknown setting.
    """
    simulation = open_simulation(threaded=threaded, **settings)
    try:
        yield simulation
    except BaseException:
        with contextlib.suppress(Exception):
            simulation.manager.close()
        raise
    close_simulation(simulation)


def open_simulation(*, threaded: bool = False, **settings: Any) -> Simulation:
    """The same without the end: whoever calls it calls `close_simulation`."""
    unknown = [name for name in settings if name not in WORLD_OPTIONS | MANAGER_SETTINGS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(WORLD_OPTIONS | MANAGER_SETTINGS), n=1)
        raise BadArgument(
            detail=f"{unknown[0]} is neither a setting of the manager nor one of the simulated world",
            remedy=f"Did you mean {near[0]}?" if near else f"The world knows {', '.join(sorted(WORLD_OPTIONS))}.",
        )
    about_world = {"models": {OTHER: 1500.0}} | {n: v for n, v in settings.items() if n in WORLD_OPTIONS}
    world = SimulatedWorld(**about_world)
    about_manager = {name: value for name, value in settings.items() if name in MANAGER_SETTINGS}
    manager = _manager(world, threaded=threaded, **about_manager)
    return Simulation(world=world, manager=manager, oracle=Oracle(manager, world))


def close_simulation(simulation: Simulation) -> None:
    """Judge, close and judge again; raises AssertionError with every broken promise."""
    try:
        simulation.check()
    finally:
        simulation.manager.close()
    simulation.check()


def assert_invariants(manager: GPUResourceManager, world: SimulatedWorld) -> None:
    """Raise AssertionError with every promise that `manager` has broken in `world`.

    The first call begins the watching, so make it before the first request; a world from `simulated_world` is watched
    from its beginning.  What holds only between two requests is judged only where none is under way.
    """
    Oracle.of(manager, world).check()


def inline_manager(world: SimulatedWorld, **settings: Any) -> GPUResourceManager:
    """A manager that drives in the calling thread, over the real HTTP client on the simulated server."""
    return _manager(world, threaded=False, **settings)


def _manager(world: SimulatedWorld, *, threaded: bool, **settings: Any) -> GPUResourceManager:
    config = world.config(**{"journal_size": JOURNAL_SIZE, **settings})
    server = OllamaManager(config, clock=world.clock, transport=world.transport)
    return GPUResourceManager(config, **world.ports(server), threaded=threaded)


__all__ = [
    "Simulation",
    "assert_invariants",
    "close_simulation",
    "inline_manager",
    "open_simulation",
    "simulated_world",
]
