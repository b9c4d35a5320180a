"""The real server under test: how it is reached, and how it is put back."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import requests
from attrs import define, field

from gpu_fsm.ollama import OllamaManager, canonical_name
from gpu_fsm.ports import RealClock
from gpu_fsm.settings import GPUResourceConfig

PATIENCE_S = 600.0
"""For one request: a big model from a slow disk."""


@define(eq=False)
class Live:
    """A server, a model that it has, and a plain HTTP client to look over the shoulder of ours."""

    url: str
    model: str
    session: requests.Session = field(factory=requests.Session)
    clock: RealClock = field(factory=RealClock)

    def call(self, method: str, path: str, body: Any = None, *, stream: bool = False) -> requests.Response:
        """Send one request; bytes and text go out as they are, everything else as JSON."""
        data = body if isinstance(body, bytes | str | None) else json.dumps(body)
        return self.session.request(
            method, self.url + path, data=data, stream=stream, timeout=PATIENCE_S, allow_redirects=False
        )

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Send a request that must succeed."""
        answer = self.call("POST", path, body)
        assert answer.status_code == 200, answer.text
        value: dict[str, Any] = answer.json()
        return value

    def resident(self) -> dict[str, dict[str, Any]]:
        """What `/api/ps` lists, by canonical name."""
        return {canonical_name(m["name"]): m for m in self.call("GET", "/api/ps").json()["models"]}

    def on_disk(self) -> dict[str, str]:
        """Digests by name."""
        return {m["name"]: m["digest"] for m in self.call("GET", "/api/tags").json()["models"]}

    def entry(self) -> dict[str, Any] | None:
        """What `/api/ps` says of the model."""
        return self.resident().get(canonical_name(self.model))

    def wait_gone(self, name: str | None = None) -> None:
        """Unload a model and wait until it is not listed."""
        deadline = self.clock.monotonic() + 60.0
        while canonical_name(name or self.model) in self.resident():
            self.post("/api/generate", model=name or self.model, keep_alive=0)
            assert self.clock.monotonic() < deadline, "the model does not go"
            self.clock.sleep(0.1)

    def client(self) -> OllamaManager:
        """The client under test."""
        config = GPUResourceConfig(ollama_url=self.url, allow_remote=True, vlm_model=self.model)
        return OllamaManager(config, clock=self.clock)


def seconds(stamp: str) -> float:
    """Seconds since 1970 of a time that the server told."""
    return datetime.fromisoformat(stamp).timestamp()


def pinned(entry: dict[str, Any]) -> bool:
    """Whether it was loaded with a negative keep_alive: then it ends in 292 years."""
    return str(entry["expires_at"]) >= "2200"


def put_back(live: Live, before: dict[str, dict[str, Any]]) -> None:
    """Unload what was not there, load what was, with the context and the time that it had left."""
    for name in live.resident():
        if name not in before:
            live.wait_gone(name)
    ours = canonical_name(live.model)
    for name, entry in before.items():
        if name != ours and name in live.resident():
            continue
        options = {"num_ctx": entry["context_length"]} if entry.get("context_length") else {}
        now = seconds(live.post("/api/generate", model=entry["name"], options=options)["created_at"])
        left = seconds(entry["expires_at"]) - now
        keep_alive = -1 if pinned(entry) else max(1, int(left))
        live.post("/api/generate", model=entry["name"], options=options, keep_alive=keep_alive)
