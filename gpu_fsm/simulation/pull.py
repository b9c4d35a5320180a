"""`/api/pull` of the simulated Ollama: what a registry has, fetched layer by layer, in the server's own words."""

from __future__ import annotations

from typing import Any, Protocol

from gpu_fsm.simulation.clock import Appointment, WorldClock
from gpu_fsm.simulation.scheduler import MIB, SimulatedModel
from gpu_fsm.simulation.wire import Exchange, dumps, short_name

_STEPS = 20
"""Lines that tell the progress of the large layer; the real server says something every 60 ms."""
_TEMPLATE_BYTES = 1_200
"""The small layers, templates and licences, are told as one."""


class Server(Protocol):
    """What a pull needs of the server."""

    models: dict[str, SimulatedModel]
    registry: dict[str, SimulatedModel]
    fetched: dict[str, int]
    clock: WorldClock
    pull_s: float

    def add_model(self, model: SimulatedModel) -> object:
        """The model is there from now on."""


def no_network(name: str) -> str:
    """What a server says that reaches no registry, as recorded."""
    path, _, tag = name.partition(":")
    return (
        f'pull model manifest: Get "https://registry.ollama.ai/v2/library/{path}/manifests/{tag}": '
        "dial tcp: lookup registry.ollama.ai on 10.255.255.53:53: no such host"
    )


def pull(server: Server, exchange: Exchange, name: str, *, stream: bool) -> None:
    """Serve one pull.  A client that leaves ends it; the next one goes on from there, as the real server does."""
    model = server.registry.get(short_name(name).casefold())

    def say(**line: Any) -> None:
        if stream:
            exchange.push(dumps(line) + b"\n")

    if stream:
        exchange.begin(200, "application/x-ndjson")
    say(status="pulling manifest")
    if model is None:
        error = {"error": "pull model manifest: file does not exist" if server.registry else no_network(name)}
        if stream:
            say(**error)
            exchange.finish()
        else:
            exchange.json(500, error, content_type="application/json")
        return
    wanted = model
    total = int((wanted.disk_mib or wanted.size_mib) * MIB)
    pending: list[Appointment] = []

    def left() -> None:
        for appointment in pending:
            appointment.cancel()

    def later(done: int) -> None:
        pending[:] = [server.clock.after(server.pull_s / _STEPS, lambda: more(done))]

    def more(done: int) -> None:
        done = server.fetched[wanted.blob] = min(total, done + -(-total // _STEPS))
        say(status=f"pulling {wanted.blob[:12]}", digest=f"sha256:{wanted.blob}", total=total, completed=done)
        if done < total:
            later(done)
            return
        say(status=f"pulling {'7' * 12}", digest=f"sha256:{'7' * 64}", total=_TEMPLATE_BYTES, completed=_TEMPLATE_BYTES)
        say(status="verifying sha256 digest")
        say(status="writing manifest")
        server.add_model(wanted)
        say(status="success")
        if stream:
            exchange.finish()
        else:
            exchange.json(200, {"status": "success"})

    exchange.on_leave = left
    if wanted.name.casefold() in server.models:
        server.fetched[wanted.blob] = total
    say(status=f"pulling {wanted.blob[:12]}", digest=f"sha256:{wanted.blob}", total=total)
    later(server.fetched.get(wanted.blob, 0))
