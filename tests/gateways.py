"""A simulated Ollama behind a real socket, a manager over it, and a gateway in front: what the door tests share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import requests
from attrs import define, field

from gpu_fsm import GPUResourceConfig, GPUResourceManager
from gpu_fsm.appconfig import GatewayConfig
from gpu_fsm.gateway.serve import Gateway
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.ports import RealClock
from gpu_fsm.simulation import (
    OllamaHTTPServer,
    RunningClock,
    SimulatedCard,
    SimulatedCLIP,
    SimulatedModel,
    SimulatedOllama,
    SimulatedProbe,
    serve,
)

VLM, EMBEDDER, OTHER = "sim-vlm:7b", "sim-embed:latest", "other:1b"
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
CARD_MIB, VLM_MIB, CLIP_MIB = 8192.0, 5000.0, 600.0

QUICK: dict[str, Any] = {
    "settle_timeout_s": 1.0,
    "settle_poll_s": 0.01,
    "observe_timeout_s": 2.0,
    "unload_deadline_s": 5.0,
    "unload_resend_s": 0.3,
    "vlm_load_deadline_s": 10.0,
    "retry_base_s": 0.02,
    "drain_timeout_s": 5.0,
    "recover_base_s": 0.1,
}


def answer_text(model: str, prompt: str, images: list[bytes]) -> str:
    """An answer of several parts that depends on the question."""
    return " ".join(f"{word}-{len(prompt)}-{len(images)}" for word in WORDS)


@define(eq=False)
class Street:
    """Everything, and the truth about it."""

    ollama: SimulatedOllama
    front: OllamaHTTPServer
    card: SimulatedCard
    clip: SimulatedCLIP
    manager: GPUResourceManager
    gateways: contextlib.ExitStack = field(factory=contextlib.ExitStack)

    def gateway(self, **options: Any) -> Gateway:
        """A gateway on a free port, closed with the street."""
        made = Gateway(self.manager, GatewayConfig(**{"listen": "127.0.0.1:0", "shutdown_s": 1.0, **options}))
        return self.gateways.enter_context(made)

    def session(self, **rules: Any) -> requests.Session:
        """`manager.requests_session(...)`, closed with the street."""
        return self.gateways.enter_context(self.manager.requests_session(**rules))

    def http(self) -> httpx.Client:
        """An `httpx` client on the manager's transport, closed with the street."""
        return self.gateways.enter_context(httpx.Client(transport=self.manager.httpx_transport()))

    def client(self, url: str = "") -> ollama.Client:
        """The official client on the manager's transport, or at `url` without it; closed with the street."""
        options = {} if url else {"transport": self.manager.httpx_transport()}
        made = ollama.Client(host=url or self.front.url, **options)
        self.gateways.callback(made._client.close)
        return made

    @property
    def resident(self) -> bool:
        """Whether the VLM is in, by the server's own word."""
        return VLM in self.ollama.loaded()

    def asked(self, path: str) -> int:
        """How many requests came to Ollama at `path`."""
        return sum(entry.path.partition("?")[0] == path for entry in tuple(self.ollama.log))

    def leases(self) -> tuple[str, ...]:
        """Who holds something now."""
        return tuple(lease.holder for lease in self.manager.get_status().leases)


@contextlib.contextmanager
def street(
    *, load_s: float = 0.05, generate_s: float = 0.04, num_parallel: int = 4, frozen: bool = True, **settings: Any
) -> Iterator[Street]:
    """Build one; `settings` go to the manager.  The closing order is gateways, manager, server."""
    clock = RunningClock()
    card = SimulatedCard(CARD_MIB, clock=clock, driver_mib=300.0)
    embedder = SimulatedModel(name=EMBEDDER, size_mib=200.0, load_s=0.02, capabilities=("embedding",))
    ollama = SimulatedOllama(
        [
            SimulatedModel(name=VLM, size_mib=VLM_MIB, load_s=load_s),
            embedder,
            SimulatedModel(name=OTHER, size_mib=500.0, load_s=0.02),
        ],
        clock=clock,
        card=card,
        unload_s=0.01,
        reclaim_s=0.02,
        latency_s=0.0,
        generate_s=generate_s,
        num_parallel=num_parallel,
        frozen=frozen,
        responder=answer_text,
    )
    with serve(ollama) as front:
        config = GPUResourceConfig(
            **{"ollama_url": front.url, "vlm_model": VLM, "vlm_size_mib": VLM_MIB, **QUICK, **settings}
        )
        clip = SimulatedCLIP(clock=clock, card=card, clip_mib=CLIP_MIB, move_s=0.001, encode_s=0.001)
        manager = GPUResourceManager(
            config,
            vlm_server=OllamaManager(config, clock=RealClock()),
            clip_host=clip,
            vram_probe=SimulatedProbe(clock=clock, card=card),
        )
        with contextlib.ExitStack() as gateways:
            try:
                yield Street(ollama, front, card, clip, manager, gateways)
            finally:
                gateways.close()
                manager.close()
    clock.close()
