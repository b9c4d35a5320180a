"""Pulling a model: what the client makes of the server's lines, and the simulated registry behind it."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from gpu_fsm.errors import ModelNotFound, OllamaError, OllamaProtocolError, OllamaTimeout, OllamaUnavailable
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation import VLM, SimulatedModel, SimulatedWorld
from gpu_fsm.status import Answer

MIB = 1 << 20


def client(world: SimulatedWorld, name: str = "new:7b") -> OllamaManager:
    """A client for a model that the server may not have."""
    return OllamaManager(world.config(vlm_model=name), clock=world.clock, transport=world.transport)


def world_with_registry() -> SimulatedWorld:
    """A server that can pull `new:7b`, of 200 MiB, in ten virtual seconds."""
    world = SimulatedWorld()
    world.ollama.registry["new:7b"] = SimulatedModel(name="new:7b", size_mib=200.0).normal()
    world.ollama.pull_s = 10.0
    return world


def test_a_pull_tells_its_progress_and_ends_with_the_model_there() -> None:
    """Bytes only rise, up to the whole; the last word is success."""
    world = world_with_registry()
    ollama = client(world)
    assert ollama.catalog(1.0).present is Answer.NO
    parts = list(ollama.pull())
    big = [part for part in parts if part.total_bytes == 200 * MIB]
    assert [part.done_bytes for part in big] == sorted(part.done_bytes for part in big)
    assert (big[0].done_bytes, big[-1].done_bytes) == (0, 200 * MIB)
    assert (parts[0].status, parts[-1].status) == ("pulling manifest", "success")
    assert ollama.catalog(1.0).present is Answer.YES
    assert world.clock.monotonic() >= 10.0


def test_a_pull_that_was_given_up_goes_on_where_it_was() -> None:
    """Closing the iterator hangs up; the server keeps what it has."""
    world = world_with_registry()
    with contextlib.closing(client(world).pull()) as parts:
        next(part for part in parts if part.done_bytes >= 100 * MIB)
    world.clock.advance(60.0)
    assert client(world).catalog(1.0).present is Answer.NO, "nobody waits, so nothing is fetched"
    again = [part.done_bytes for part in client(world).pull() if part.total_bytes == 200 * MIB]
    assert min(done for done in again if done) > 100 * MIB


def test_a_model_that_is_there_is_pulled_at_once() -> None:
    """The server compares the manifest and fetches nothing."""
    world = world_with_registry()
    world.ollama.registry[VLM] = world.vlm
    before = world.clock.monotonic()
    assert [*client(world, VLM).pull()][-1].status == "success"
    assert world.clock.monotonic() - before < 1.0


@pytest.mark.parametrize(
    ("registry", "error", "said"),
    [(True, ModelNotFound, "the registry has no other:7b"), (False, OllamaUnavailable, "cannot reach its registry")],
)
def test_what_cannot_be_pulled_is_said_with_its_mend(registry: bool, error: type[OllamaError], said: str) -> None:
    """Errors come inside an answer that began with 200."""
    world = world_with_registry() if registry else SimulatedWorld()
    with pytest.raises(error, match=said) as caught:
        list(client(world, "other:7b").pull())
    assert caught.value.remedy


@pytest.mark.parametrize("kind", ["before", "truncated", "http_500", "html"])
def test_a_pull_that_breaks_is_an_error_of_ours(kind: str) -> None:
    """Never a success that was none, never a foreign exception."""
    world = world_with_registry()
    world.faults.arm("ollama.other", kind)
    with pytest.raises(OllamaError):
        list(client(world).pull())


@pytest.mark.parametrize(
    "line",
    [
        b'{"status": 7}\n',
        b'{"status": "x", "total": -1}\n',
        b'{"status": "x", "total": "1"}\n',
        b'{"digest": "x"}\n',
        b"[]\n",
        b"{\n",
        b'{"status": "verifying"}\n',
        b"",
    ],
)
def test_strange_progress_is_refused(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is an end without success."""

    def post(_self: Any, exchange: Any, _body: Any, _fault: Any) -> None:
        exchange.begin(200, "application/x-ndjson")
        exchange.push(line)
        exchange.finish()

    world = world_with_registry()
    monkeypatch.setitem(world.ollama.__class__._handle.__globals__["_ROUTES"]["/api/pull"], "POST", post)
    with pytest.raises(OllamaProtocolError):
        list(client(world).pull())


def test_a_pull_has_an_end() -> None:
    """`timeout_s` is for all of it."""
    with pytest.raises(OllamaTimeout):
        list(client(world_with_registry()).pull(timeout_s=5.0))
