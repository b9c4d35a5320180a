"""Builders that the tests of the Ollama client share: clients, answers, and a world without sockets."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import requests

from gpu_fsm.ollama import OllamaManager, Transport
from gpu_fsm.ports import Completion, LoadReport
from gpu_fsm.settings import GPUResourceConfig
from tests.raw_server import RawServer

CANARY = "c4nary-s3cret"
PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 32
DIGEST = "f3231584d73b8674fcacd0fa8f6bad320c5c2846285540104c54e6232e5a6377"
OTHER_DIGEST = "0" * 64
LOADED = {
    "model": "tiny-a",
    "created_at": "2026-11-23T03:15:49.3Z",
    "response": "",
    "done": True,
    "done_reason": "load",
}
FINAL = {
    "model": "tiny-a",
    "response": "a login form",
    "done": True,
    "done_reason": "stop",
    "total_duration": 852_294_471,
    "load_duration": 772_530_895,
    "prompt_eval_count": 4,
    "eval_count": 3,
    "context": [1, 2, 3],
}


class WallClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        threading.Event().wait(seconds)

    def wait(self, condition: threading.Condition, timeout_s: float | None) -> None:
        condition.wait(timeout_s)


class VirtualClock:
    """A clock that moves only when somebody sleeps or an answer takes its time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds

    def wait(self, condition: threading.Condition, timeout_s: float | None) -> None:
        raise AssertionError("the client does not wait on conditions")


class Wire:
    """A world without sockets: answers by path, each after some virtual seconds; notes what was asked."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.answers: dict[str, list[Any]] = {}
        self.asked: list[tuple[str, Any]] = []
        self.timeouts: list[float] = []

    def say(self, path: str, *answers: Any) -> None:
        """The answers of a path in order, the last one again and again: JSON, (status, JSON), or an exception."""
        self.answers[path] = list(answers)

    def __call__(self) -> Transport:
        return _WireTransport(self)


class _WireTransport:
    simulated = True
    expired = False
    limit = 0

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def send(
        self,
        request: Any,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        wire, path = self.wire, request.path_url
        wire.asked.append((path, json.loads(request.body) if request.body else None))
        wire.timeouts.append(timeout)
        queue = wire.answers[path]
        answer = queue.pop(0) if len(queue) > 1 else queue[0]
        if callable(answer) and not isinstance(answer, type):
            answer = answer(timeout)
        if isinstance(answer, Exception):
            raise answer
        status, body = answer if isinstance(answer, tuple) else (200, answer)
        response = requests.Response()
        response.status_code = status
        response.headers["Content-Type"] = "application/json"
        response.raw = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        return response

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def hang(clock: VirtualClock) -> Callable[[float], Exception]:
    """An answer that never comes: the whole timeout passes."""

    def answer(timeout: float) -> Exception:
        clock.now += timeout
        return requests.ReadTimeout("read timed out")

    return answer


def config(url: str = "http://127.0.0.1:11434", **settings: Any) -> GPUResourceConfig:
    """A configuration for the recorded model."""
    return GPUResourceConfig(**{"ollama_url": url, "vlm_model": "tiny-a", "vlm_options": {"num_ctx": 2048}, **settings})


def client(server: RawServer | str, **settings: Any) -> OllamaManager:
    """A client with real sockets."""
    url = server if isinstance(server, str) else server.url
    return OllamaManager(config(url, **settings), clock=WallClock())


def entry(name: str, digest: str = DIGEST, **fields: Any) -> dict[str, Any]:
    """One entry of `/api/ps` or `/api/tags`."""
    return {
        "name": name,
        "model": name,
        "size": 8 << 20,
        "digest": digest,
        "expires_at": "2026-11-23T03:28:15.232378034Z",
        "size_vram": 8 << 20,
        **fields,
    }


def ps(*entries: Mapping[str, Any]) -> dict[str, Any]:
    """An answer of `/api/ps`."""
    return {"models": list(entries)}


def load(manager: OllamaManager, deadline_s: float = 10.0, **more: Any) -> LoadReport:
    """Load with a keep_alive of six minutes."""
    return manager.load_model(keep_alive_s=360, deadline_s=deadline_s, **more)


def ask(manager: OllamaManager, timeout_s: float = 10.0, **more: Any) -> list[Completion]:
    """Ask the model something and return all parts of its answer."""
    return list(manager.generate("What is this?", keep_alive_s=360, timeout_s=timeout_s, **more))


class Stopwatch:
    """Real seconds since its making; generous bounds, since the machine may be busy."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def s(self) -> float:
        return time.monotonic() - self.start


def line(value: Mapping[str, Any]) -> bytes:
    """One line of a stream."""
    return json.dumps(value).encode() + b"\n"


def part(text: str) -> bytes:
    """One part of a streamed answer."""
    return line({"response": text, "done": False})
