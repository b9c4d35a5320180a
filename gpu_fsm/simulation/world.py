"""The whole world on one clock: a card, an Ollama, a CLIP, a probe, and what goes wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.simulation.card import SimulatedCard
from gpu_fsm.simulation.clip import SimulatedCLIP, SimulatedProbe
from gpu_fsm.simulation.clock import SimulatedClock
from gpu_fsm.simulation.faults import Faults
from gpu_fsm.simulation.ollama import Responder, SimulatedModel, SimulatedOllama

VLM = "sim-vlm:7b"
"""The name of the configured VLM."""


class SimulatedWorld:
    """Everything the manager's ports lead to, in virtual time.  MiB and seconds.

    `on_io` holds callbacks (operation, phase) that run in the caller's thread before and after every I/O call, and with
    phase "during" at every quarter of a load and after every weight of CLIP that moved: the place to post a request in
    the middle of a step or to look at invariants.  `faults` is the switchboard for all parts.
    """

    def __init__(
        self,
        *,
        card_mib: float = 8192.0,
        driver_mib: float = 300.0,
        vlm_mib: float = 5000.0,
        vlm_load_s: float = 4.0,
        clip_mib: float = 600.0,
        context_mib: float = 200.0,
        gpu: bool = True,
        clip: bool = True,
        models: Mapping[str, float] | None = None,
        version: str = "0.32.15",
        reclaim_s: float = 0.3,
        unload_s: float = 0.08,
        latency_s: float = 0.001,
        generate_s: float = 0.5,
        encode_s: float = 0.01,
        tells_holders: bool = True,
        responder: Responder | None = None,
        seed: int = 0,
    ) -> None:
        self.clock = SimulatedClock()
        self.faults = Faults(seed)
        self.card = SimulatedCard(card_mib, clock=self.clock, driver_mib=driver_mib)
        """Always there to be read by tests; with `gpu=False` no part of the world uses it."""
        card = self.card if gpu else None
        self.gpu = gpu
        self.on_io: list[Callable[[str, str], None]] = []
        self.vlm = SimulatedModel(name=VLM, size_mib=vlm_mib, disk_mib=vlm_mib / 1.25, load_s=vlm_load_s).normal()
        others = [SimulatedModel(name=n, size_mib=m, load_s=vlm_load_s / 2) for n, m in (models or {}).items()]
        self.ollama = SimulatedOllama(
            [self.vlm, *others],
            clock=self.clock,
            card=card,
            faults=self.faults,
            version=version,
            reclaim_s=reclaim_s,
            unload_s=unload_s,
            latency_s=latency_s,
            generate_s=generate_s,
            responder=responder,
        )
        self.clip = SimulatedCLIP(
            clock=self.clock,
            card=card,
            faults=self.faults,
            clip_mib=clip_mib,
            context_mib=context_mib,
            encode_s=encode_s,
            exists=clip,
        )
        self.probe = SimulatedProbe(clock=self.clock, card=card, faults=self.faults, tells_holders=tells_holders)
        self.ollama.on_io = self.clip.on_io = self.probe.on_io = self._io

    @property
    def transport(self) -> Callable[[], Any]:
        """What `OllamaManager(config, clock=world.clock, transport=world.transport)` wants."""
        return self.ollama.transport()

    def config(self, **overrides: Any) -> GPUResourceConfig:
        """Settings that match this world."""
        settings: dict[str, Any] = {
            "vlm_model": self.vlm.name,
            "vlm_size_mib": self.vlm.size_mib,
            "clip_model": None if self.clip.place == "none" else "simulated-clip",
        }
        return GPUResourceConfig(**{**settings, **overrides})

    def ports(self, vlm_server: Any = None) -> dict[str, Any]:
        """The manager's keyword arguments; `vlm_server` is the caller's client on `transport`."""
        ports = {"clip_host": self.clip, "vram_probe": self.probe, "clock": self.clock}
        return ports if vlm_server is None else {"vlm_server": vlm_server, **ports}

    def vlm_resident(self) -> bool:
        """The truth: the VLM's runner lives, is ready and is not on its way out."""
        return self.vlm.name in self.ollama.loaded()

    def vlm_held_mib(self) -> float:
        """The truth: what the VLM holds on the card, also while it loads."""
        return self.ollama.resident_mib(self.vlm.name)

    def lose_gpu(self) -> None:
        """The card falls off the bus."""
        self.card.lost = True
        self.clip.poisoned = "the GPU has fallen off the bus"

    def _io(self, op: str, phase: str) -> None:
        for hook in tuple(self.on_io):
            hook(op, phase)

    def __repr__(self) -> str:
        now_s = self.clock.monotonic()
        return f"<SimulatedWorld at {now_s:.3f} s: {self.card!r}, {self.ollama!r}, CLIP on {self.clip.device}>"


__all__ = ["VLM", "SimulatedWorld"]
