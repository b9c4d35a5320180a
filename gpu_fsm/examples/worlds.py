"""Where the examples run: on the real card, or with `--simulated` in a world that needs none of it."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gpu_fsm import GPUResourceManager, load_config
from gpu_fsm.agent import Screen
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation import SimulatedWorld

if TYPE_CHECKING:
    from fastapi import FastAPI


def arguments(about: str | None) -> list[str]:
    """What was typed, after a look at it: `--help` shows what the example is about."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulated", action="store_true", help="without a GPU, Ollama and CLIP: they are simulated")
    return ["--simulated"] if parser.parse_args().simulated else []


@contextlib.contextmanager
def manager_for(argv: Sequence[str]) -> Iterator[GPUResourceManager]:
    """A manager as the command line asks for it; says what is simulated."""
    if "--simulated" not in argv:
        with GPUResourceManager(load_config()) as manager:
            yield manager
        return
    print("Simulated: the card, Ollama, CLIP, and the time that they take.")
    world = SimulatedWorld(responder=_answer)
    config = world.config()
    ollama = OllamaManager(config, clock=world.clock, transport=world.transport)
    with GPUResourceManager(config, **world.ports(ollama)) as manager:
        yield manager


def _answer(_model: str, _prompt: str, images: list[bytes]) -> str:
    """A VLM that tells screens by how many bytes they have."""
    size = len(images[0]) if images else 0
    return json.dumps({"label": f"screen of {size} bytes", "summary": "Its size is all that is known."})


def three_screens() -> list[Screen]:
    """Drawn here, so that every example has something to look at."""
    from PIL import Image, ImageDraw

    screens = []
    for number, word in enumerate(("sign in", "inbox with two letters", "settings"), 1):
        image = Image.new("RGB", (320, 200), (30 * number, 60, 90))
        ImageDraw.Draw(image).text((20, 20), word, fill="white")
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        screens.append(Screen(name=f"{number}.png", data=buffer.getvalue(), text=word))
    return screens


async def call(app: FastAPI, requests: Sequence[tuple[str, str, bytes]]) -> list[Any]:
    """Start a web application, send it requests (method, path, body) without a network, end it; the answers' JSON."""
    from httpx import ASGITransport, AsyncClient

    async with app.router.lifespan_context(app), AsyncClient(transport=ASGITransport(app), base_url="http://app") as it:
        answers = [await it.request(method, path, content=body) for method, path, body in requests]
    return [answer.raise_for_status().json() for answer in answers]
