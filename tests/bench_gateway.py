"""What the gateway adds to an answer: `python -m tests.bench_gateway`.

A simulated Ollama in a process of its own, a gateway in another, and a client that asks both in turn.  The model is in,
so what is measured is the relaying: the time to the first token, the time of the whole answer, and answers a second.
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 200

SERVER = """
import sys
from tests.gateways import street
with street(generate_s=float(sys.argv[1]), clip_model=None) as world:
    world.manager.ensure_vlm_loaded()
    print(world.front.url, flush=True)
    sys.stdin.read()
"""
GATEWAY = """
import sys
from gpu_fsm import GPUResourceConfig, GPUResourceManager
from gpu_fsm.appconfig import GatewayConfig
from gpu_fsm.gateway.serve import Gateway
from tests.gateways import VLM
config = GPUResourceConfig(ollama_url=sys.argv[1], vlm_model=VLM, clip_model=None, vlm_size_mib=5000.0)
listen = GatewayConfig(listen="127.0.0.1:0", shutdown_s=1.0)
with GPUResourceManager(config) as manager, Gateway(manager, listen) as gateway:
    manager.ensure_vlm_loaded()
    print(gateway.url, flush=True)
    sys.stdin.read()
"""


def start(code: str, *words: str) -> tuple[subprocess.Popen[str], str]:
    """A process that says its address and ends when its input does."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def ask(connection: http.client.HTTPConnection) -> tuple[float, float]:
    """One streamed answer: ms to its first line, ms to its end."""
    began = time.perf_counter()
    body = json.dumps({"model": "sim-vlm:7b", "prompt": "hi"})
    connection.request("POST", "/api/generate", body)
    answer = connection.getresponse()
    answer.readline()
    first = time.perf_counter()
    answer.read()
    return (first - began) * 1e3, (time.perf_counter() - began) * 1e3


def compare(title: str, generate_s: float, rounds: int = ROUNDS, say: Callable[[str], object] = print) -> None:
    """Ask directly and through the gateway in turn, and say the medians and their ratios."""
    ollama, url = start(SERVER, str(generate_s))
    gateway, relayed_url = start(GATEWAY, url)
    ways = {
        name: http.client.HTTPConnection(u.removeprefix("http://"))
        for name, u in (("direct", url), ("relayed", relayed_url))
    }
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 10):
        for name, connection in ways.items():
            took = ask(connection)
            if number >= 10:
                seen[name].append(took)
    for connection in ways.values():
        connection.close()
    for process in (gateway, ollama):
        process.communicate(timeout=60)
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in seen.items()}
    for index, what in enumerate(("first token", "whole answer")):
        direct, relayed = medians["direct"][index], medians["relayed"][index]
        say(f"{title}, {what}: direct {direct:.2f} ms, relayed {relayed:.2f} ms, ratio {relayed / direct:.3f}")


if __name__ == "__main__":
    compare("8 parts at once", 0.0)
    compare("8 parts over 0.4 s", 0.4, rounds=25)
