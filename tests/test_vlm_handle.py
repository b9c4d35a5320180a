"""The VLM under a lease: what `manager.vlm()` gives, over the real client and the simulated server."""

from __future__ import annotations

import io
from typing import Any

import pytest

from gpu_fsm.errors import LeaseLost, OllamaTimeout
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.status import State
from tests.ollama_clients import PNG
from tests.worlds import inline

pytestmark = pytest.mark.core


@pytest.fixture
def seen() -> list[tuple[str, list[bytes]]]:
    """Prompts and images as they came to the model."""
    return []


@pytest.fixture
def world(seen: list[tuple[str, list[bytes]]]) -> SimulatedWorld:
    """A model that says eight words."""

    def answer(model: str, prompt: str, images: list[bytes]) -> str:
        seen.append((prompt, images))
        return "one two three four five six seven eight"

    return SimulatedWorld(responder=answer)


def test_an_answer_comes_with_its_tokens_and_durations(world: SimulatedWorld, seen: list[Any]) -> None:
    """By prompt and by conversation, with pictures of every kind that is taken."""
    manager = inline(world)
    with manager.vlm() as vlm:
        whole = vlm.generate("What is this?", images=[PNG], format={"type": "object"})
        talked = vlm.chat([{"role": "user", "content": "And this?", "images": [PNG]}])
    for answer in (whole, talked):
        assert answer.text == "one two three four five six seven eight"
        assert (answer.done, answer.done_reason, answer.output_tokens) == (True, "stop", 8)
        assert answer.prompt_tokens is not None
        assert answer.total_s == pytest.approx(0.5, abs=0.1)
        assert answer.load_s is not None
    assert [images for _, images in seen] == [[PNG], [PNG]]


def test_a_picture_may_be_a_pil_image(world: SimulatedWorld, seen: list[Any]) -> None:
    """It arrives as a PNG of the same pixels."""
    image_module = pytest.importorskip("PIL.Image", reason="pillow not installed")
    picture = image_module.new("RGB", (3, 2), (1, 2, 3))
    with inline(world).vlm() as vlm:
        vlm.generate("x", images=[picture])
    came = image_module.open(io.BytesIO(seen[0][1][0]))
    assert (came.format, came.size, came.getpixel((2, 1))) == ("PNG", (3, 2), (1, 2, 3))


def test_a_stream_comes_in_parts(world: SimulatedWorld) -> None:
    """They add up to the whole, and the last one counts the tokens."""
    with inline(world).vlm() as vlm:
        parts = list(vlm.stream("x"))
    assert "".join(part.text for part in parts) == "one two three four five six seven eight"
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].output_tokens == 8


def test_an_abandoned_stream_gives_its_lease_back(world: SimulatedWorld) -> None:
    """The server stops working for it, the lease is gone, and the model can be unloaded at once."""
    world.ollama.generate_s = 1000.0
    manager = inline(world)
    with pytest.raises(RuntimeError, match="lost interest"), manager.vlm() as vlm:
        parts = vlm.stream("x")
        next(parts)
        assert world.ollama.running() == 1
        assert len(manager.get_status().leases) == 1
        parts.close()
        raise RuntimeError("lost interest")
    assert manager.get_status().leases == ()
    assert world.ollama.running() == 0
    started = world.clock.monotonic()
    manager.ensure_vlm_unloaded()
    assert world.clock.monotonic() - started < 5.0


def test_a_stream_that_is_only_forgotten_ends_too(world: SimulatedWorld) -> None:
    """When the last reference to it goes."""
    world.ollama.generate_s = 1000.0
    manager = inline(world)
    with manager.vlm() as vlm:
        parts = vlm.stream("x")
        next(parts)
        del parts
        assert world.ollama.running() == 0
    assert manager.get_status().leases == ()


def test_a_use_puts_the_idle_unload_off(world: SimulatedWorld) -> None:
    """The timer counts from the last part of the last answer."""
    manager = inline(world, idle_timeout_s=60)
    assert manager.set_execution_mode("recording").granted
    manager.drive_for(50)
    with manager.vlm() as vlm:
        list(vlm.stream("x"))
    manager.drive_for(50)
    assert world.vlm_resident()
    manager.drive_for(20)
    assert not world.vlm_resident()
    assert manager.get_status().state is State.RECORDING


def test_a_lease_that_has_ended_gives_nothing(world: SimulatedWorld) -> None:
    """The handle outlives the block, its right does not."""
    with inline(world).vlm() as vlm:
        pass
    with pytest.raises(LeaseLost):
        vlm.generate("x")


def test_an_answer_that_takes_too_long_is_given_up(world: SimulatedWorld) -> None:
    """At the caller's own limit; the model stays."""
    world.ollama.generate_s = 1000.0
    manager = inline(world)
    with manager.vlm() as vlm:
        with pytest.raises(OllamaTimeout):
            vlm.generate("x", timeout_s=3)
        assert world.ollama.running() == 0
    assert world.vlm_resident()


def test_a_vlm_that_was_taken_away_is_not_asked(world: SimulatedWorld, seen: list[Any]) -> None:
    """An emergency may unload it under its lease; a prompt would bring it back onto the full card."""
    manager = inline(world, floor_mib=200.0, pressure_s=1.0, check_interval_s=1.0)
    manager.set_execution_mode("recording")
    with manager.vlm() as vlm:
        world.card.take("game", world.card.free_mib - 50.0)
        manager.drive_for(30.0)
        assert not world.vlm_resident()
        for ask in (lambda: vlm.generate("x"), lambda: vlm.chat([{"role": "user", "content": "x"}])):
            with pytest.raises(LeaseLost):
                ask()
    assert seen == []
    assert not world.vlm_resident()


def test_a_lease_outlives_ollamas_own_timer_and_brings_nothing_back(world: SimulatedWorld) -> None:
    """The renewal keeps the VLM in; where another client has taken it out meanwhile, no renewal loads it again."""
    manager = inline(world, idle_timeout_s=40.0, check_interval_s=1000.0)
    manager.set_execution_mode("recording")
    with manager.vlm():
        manager.drive_for(300.0)
        assert world.vlm_resident()
        world.ollama.foreign_unload(world.vlm.name)
        manager.drive_for(300.0)
        assert not world.vlm_resident(), "the next check is for that"
    assert [entry.op for entry in world.ollama.log if entry.client == "us"].count("ollama.load") == 1
