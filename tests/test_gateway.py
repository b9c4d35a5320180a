"""The gateway: every client's answers as from Ollama itself, and leases that end with their clients."""

from __future__ import annotations

# ruff: noqa: E402
import pytest

for _library in ("httpx", "ollama", "openai", "starlette", "uvicorn"):
    pytest.importorskip(_library, reason=f"{_library} is not installed; it comes with the extra test")

import asyncio
import base64
import contextlib
import contextvars
import hashlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
from openai import types
from openai.pagination import SyncPage

from gpu_fsm import GPUResourceConfig, GPUResourceManager, errors
from gpu_fsm.appconfig import GatewayConfig
from gpu_fsm.gateway.serve import Gateway
from gpu_fsm.simulation import RunningClock, SimulatedProbe
from tests.gateways import EMBEDDER, OTHER, VLM, Street, street
from tests.raw_server import http as answering
from tests.raw_server import serving
from tests.waiting import PATIENCE_S, ROOT, in_thread, until

PROMPT = {"model": VLM, "prompt": "hi", "stream": False}


@pytest.fixture
def world() -> Iterator[Street]:
    """A manager in IDLE over a simulated Ollama behind a real socket."""
    with street() as made:
        yield made


def post(url: str, body: Any, **more: Any) -> httpx.Response:
    """One POST without the environment's proxies."""
    return httpx.post(url, json=body, trust_env=False, timeout=PATIENCE_S, **more)


def opened(url: str, body: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A request whose answer is read by the caller, part by part."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE_S)
    connection.request("POST", "/api/generate", json.dumps(body))
    return connection, connection.getresponse()


def idle_deadline(world: Street) -> float:
    """When the idle timer would fire as things stand; 0 where it is not armed."""
    return world.manager._driver.engine.timers().get("idle", 0.0)


# --- what goes through, goes through unchanged ------------------------------------------------------------------------

ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("GET", "/", None),
    ("HEAD", "/", None),
    ("GET", "/api/version", None),
    ("HEAD", "/api/tags", None),
    ("GET", "/api/tags", None),
    ("HEAD", "/api/ps", None),
    ("GET", "/api/status", None),
    ("GET", "/v1/models", None),
    ("GET", f"/v1/models/{VLM}", None),
    ("GET", "/v1/models/nope", None),
    ("GET", "/no/such/route", None),
    ("PUT", "/api/tags", {"x": 1}),
    ("POST", "/api/show", {"model": VLM}),
    ("POST", "/api/show", {"model": "nope"}),
    ("POST", "/api/pull", {"model": "tiny:1b", "stream": False}),
    ("DELETE", "/api/delete", {"model": "nope"}),
    ("POST", "/api/generate", b""),
    ("POST", "/api/generate", b"{"),
    ("POST", "/api/generate", {"prompt": "x"}),
    ("POST", "/api/generate", {"model": "nope", "prompt": "x"}),
    ("POST", "/api/chat", {"model": "nope"}),
    ("POST", "/api/generate", {"model": VLM}),
    ("POST", "/api/generate", {"model": VLM, "prompt": "hi"}),
    ("POST", "/api/generate", {"model": VLM, "prompt": "hi", "stream": False, "keep_alive": "5m"}),
    ("POST", "/api/generate", {"model": VLM, "prompt": "hi", "keep_alive": "x"}),
    ("POST", "/api/generate", {"model": VLM, "prompt": "hi", "images": ["not base64!"]}),
    ("POST", "/api/generate", {"model": VLM, "prompt": "hi", "options": {"num_ctx": "many"}}),
    ("POST", "/api/generate", {"model": VLM, "keep_alive": 0}),
    ("POST", "/api/chat", {"model": VLM, "messages": [{"role": "user", "content": "hi"}]}),
    ("POST", "/api/embed", {"model": EMBEDDER, "input": ["a", "b"]}),
    ("POST", "/api/embed", {"model": VLM, "input": "a"}),
    ("POST", "/api/embeddings", {"model": EMBEDDER, "prompt": "a"}),
    ("POST", "/v1/chat/completions", {"model": VLM, "messages": [{"role": "user", "content": "hi"}], "stream": True}),
    ("POST", "/v1/chat/completions", {"model": "nope", "messages": [{"role": "user", "content": "hi"}]}),
    ("POST", "/v1/completions", {"model": VLM, "prompt": "hi"}),
    ("POST", "/v1/embeddings", {"model": EMBEDDER, "input": "a"}),
)


@pytest.mark.core
def test_every_route_answers_as_ollama_does(world: Street) -> None:
    """Status, body and every header but the Date, for what works and for what fails; one difference is meant.

    A keep_alive that Ollama cannot read is not sent on, since the VLM's is the manager's.
    """
    gateway = world.gateway()
    with httpx.Client(trust_env=False, timeout=PATIENCE_S) as client:
        for method, path, body in ROUTES:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            seen = []
            for base in (world.front.url, gateway.url):
                answer = client.request(method, base + path, content=data)
                headers = {k: v for k, v in answer.headers.items() if k != "date"}
                seen.append((answer.status_code, answer.content, headers))
            if body is not None and isinstance(body, dict) and body.get("keep_alive") == "x":
                assert (seen[0][0], seen[1][0]) == (400, 200)
            else:
                assert seen[0] == seen[1], (method, path)
    until(lambda: world.leases() == ())


def test_a_request_in_parts_arrives_whole(world: Street) -> None:
    """Of unknown length, as programs send what they make while they send it."""
    gateway = world.gateway()
    for path, body in (("/api/show", {"model": VLM}), ("/api/generate", PROMPT)):
        seen = []
        for base in (world.front.url, gateway.url):
            parts = (json.dumps(body).encode()[at : at + 7] for at in range(0, 200, 7))
            seen.append(httpx.post(base + path, content=(part for part in parts if part), trust_env=False))
        assert seen[0].status_code == 200
        assert seen[0].content == seen[1].content


@pytest.mark.core
def test_health_and_lists_neither_wake_the_model_nor_reset_its_timer(world: Street) -> None:
    """Also while it is in: its idle deadline stays where it was."""
    gateway = world.gateway()
    for loaded in (False, True):
        if loaded:
            world.manager.ensure_vlm_loaded()
        before = idle_deadline(world)
        for path in ("/", "/api/version", "/api/tags", "/api/ps", "/v1/models", "/gpu-fsm/status", "/gpu-fsm/lease"):
            assert httpx.get(gateway.url + path, trust_env=False).status_code == 200
        assert world.resident is loaded
        assert idle_deadline(world) == before
    assert post(f"{gateway.url}/api/generate", PROMPT).status_code == 200
    until(lambda: world.leases() == ())
    assert idle_deadline(world) > before, "a use does count"


@pytest.mark.core
def test_another_model_passes_or_is_refused_as_the_policy_says(world: Street) -> None:
    """The refusal names the one that may run."""
    body = {**PROMPT, "model": OTHER}
    assert post(f"{world.gateway().url}/api/generate", body).json()["model"] == OTHER
    strict = world.gateway(other_models="refuse")
    refused = post(f"{strict.url}/api/generate", body)
    assert refused.status_code == 403
    assert VLM in refused.json()["error"]
    assert VLM in post(f"{strict.url}/v1/completions", body).json()["error"]["message"]
    assert post(f"{strict.url}/api/show", body).status_code == 200, "to look is not to run"


def test_an_ollama_that_is_not_there_is_a_clear_error(world: Street) -> None:
    """502 with a remedy, for what runs a model and for what does not."""
    gateway = world.gateway()
    world.ollama.stop()
    for path in ("/api/tags", "/api/generate"):
        method = "GET" if path.endswith("tags") else "POST"
        answer = httpx.request(method, gateway.url + path, json=PROMPT, trust_env=False, timeout=PATIENCE_S)
        assert answer.status_code in (502, 503), path
        assert "Ollama" in answer.json()["error"] or "connection" in answer.json()["error"]
    assert world.leases() == ()
    world.ollama.start()


def test_an_answer_that_ollama_breaks_off_is_broken_off_and_not_ended(world: Street) -> None:
    """A client must be able to tell half an answer from a whole one."""
    world.ollama.generate_s = 20.0
    gateway = world.gateway()
    connection, answer = opened(gateway.url, {**PROMPT, "stream": True})
    answer.readline()
    world.ollama.stop()
    with pytest.raises(http.client.IncompleteRead):
        answer.read()
    connection.close()
    until(lambda: world.leases() == ())
    world.ollama.start()
    world.ollama.generate_s = 0.04
    until(lambda: post(f"{gateway.url}/api/generate", PROMPT).status_code == 200)


@pytest.mark.parametrize("listen", ["127.0.0.1:PORT", "localhost:PORT", "[::1]:PORT", "0.0.0.0:PORT"])
def test_a_gateway_that_is_told_to_relay_to_itself_says_so(listen: str) -> None:
    """With one OLLAMA_HOST for every program each request would come back to it for ever."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    config = GPUResourceConfig(ollama_url=f"http://localhost:{port}", vlm_model=VLM, clip_model=None)
    here = GatewayConfig(listen=listen.replace("PORT", str(port)), token="a-token-of-some-length")
    with GPUResourceManager(config, vram_probe=SimulatedProbe(clock=RunningClock(), card=None)) as manager:
        with pytest.raises(errors.BadArgument, match="where it is told that Ollama is"):
            Gateway(manager, here)


def test_any_free_port_is_not_the_one_that_goes_without_saying() -> None:
    """Ollama behind a web server at port 80, and a gateway at port 0, which is none."""
    config = GPUResourceConfig(ollama_url="http://127.0.0.1", vlm_model=VLM, clip_model=None)
    with (
        GPUResourceManager(config, vram_probe=SimulatedProbe(clock=RunningClock(), card=None)) as manager,
        Gateway(manager, GatewayConfig(listen="127.0.0.1:0")) as gateway,
    ):
        assert gateway.port


# --- clients that leave -----------------------------------------------------------------------------------------------


@pytest.mark.core
def test_a_client_that_leaves_in_the_middle_frees_its_lease_and_ends_its_request(world: Street) -> None:
    """At once, not when the answer would have ended."""
    world.ollama.generate_s = 800.0  # a part every 100 s: nothing but its leaving ends it
    gateway = world.gateway()
    connection, answer = opened(gateway.url, {**PROMPT, "stream": True})
    answer.readline()
    assert len(world.leases()) == 1
    assert world.leases()[0].startswith("gateway client 127.0.0.1:")
    answer.close()
    connection.close()
    until(lambda: world.leases() == () and world.ollama.running() == 0)
    assert world.resident


@pytest.mark.core
def test_a_client_that_leaves_while_the_model_loads_does_not_kill_the_load(world: Street) -> None:
    """Others wait for it; with Ollama's own clients, the first to leave would end it for all."""
    world.ollama.models[VLM] = type(world.ollama.models[VLM])(name=VLM, size_mib=5000.0, load_s=0.6).normal()
    gateway = world.gateway()
    body = json.dumps(PROMPT).encode()
    first = http.client.HTTPConnection(gateway.url.removeprefix("http://"))
    first.request("POST", "/api/generate", body)
    until(lambda: world.ollama.loading() is not None)
    second = in_thread(post, f"{gateway.url}/api/generate", PROMPT)
    first.close()
    assert second.result(PATIENCE_S).json()["done"]
    assert world.ollama.counts["loads"] == 1
    assert world.ollama.counts["load_aborts"] == 0
    until(lambda: world.leases() == ())


def test_a_client_that_reads_nothing_loses_its_lease(world: Street) -> None:
    """Nobody can keep the model in by not listening."""
    world.ollama.responder = lambda model, prompt, images: "w" * 16_000_000
    gateway = world.gateway(idle_client_s=0.3)
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", gateway.port))
        body = json.dumps(PROMPT).encode()
        head = f"POST /api/generate HTTP/1.1\r\nHost: 127.0.0.1:{gateway.port}\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        until(world.leases)
        until(lambda: world.leases() == ())


# --- strangers' clients -----------------------------------------------------------------------------------------------


def test_the_ollama_client_runs_through_it_unchanged(world: Street) -> None:
    """Chat, generate, embed, list, ps and show, as that package documents them; sync, async and streamed."""
    gateway, stories = world.gateway(), []

    def story(client: ollama.Client) -> list[Any]:
        told: list[Any] = []
        message = {"role": "user", "content": "Why is the sky blue?"}
        answer = client.chat(VLM, messages=[message])
        told.append(answer["message"]["content"])
        told.append(client.chat(model=VLM, messages=[message]).message.content)
        told += [part["message"]["content"] for part in client.chat(VLM, messages=[message], stream=True)]
        history = [message, {"role": "assistant", "content": told[0]}]
        told.append(client.chat(VLM, messages=[*history, message]).message.content)
        picture = base64.b64decode("iVBORw0KGgo=")
        seen = {"role": "user", "content": "What is in this image?", "images": [picture]}
        told.append(client.chat(model=VLM, messages=[seen]).message.content)
        told.append(client.chat(model=VLM, messages=[message], format={"type": "object"}, options={"temperature": 0}))
        told.append(client.generate(VLM, "Why is the sky blue?")["response"])
        told += [part["response"] for part in client.generate(VLM, "Why is the sky blue?", stream=True)]
        told.append(client.generate(VLM, "explain this", images=[picture], stream=False).response)
        told.append(client.embed(model=EMBEDDER, input="Hello, world!")["embeddings"])
        told.append(client.embed(model=EMBEDDER, input=["The sky is blue", "Grass is green"]).embeddings)
        told += [(model.model, model.size and model.size.real, model.details) for model in client.list().models]
        told += [(m.model, m.digest, m.size_vram, m.context_length) for m in client.ps().models if m.model == VLM]
        shown = client.show(VLM)
        told += [shown.modified_at, shown.template, shown.modelinfo, shown.capabilities]
        with pytest.raises(ollama.ResponseError) as caught:
            client.chat("does-not-yet-exist", messages=[message])
        told.append((caught.value.error, caught.value.status_code))
        return told

    stories += [story(world.client(base)) for base in (world.front.url, gateway.url)]
    assert stories[0] == stories[1]

    async def later() -> None:
        client = ollama.AsyncClient(host=gateway.url)
        answer = await client.chat(model=VLM, messages=[{"role": "user", "content": "hi"}])
        parts = [p async for p in await client.generate(model=VLM, prompt="hi", stream=True)]
        assert answer.message.content == "".join(part.response for part in parts)
        await client._client.aclose()

    asyncio.run(later())
    until(lambda: world.leases() == ())


def test_the_openai_client_runs_through_it_unchanged(world: Street) -> None:
    """Chat, streamed chat with usage, completions, embeddings, models, and its own errors."""
    gateway, stories = world.gateway(), []
    for base in (world.front.url, gateway.url):
        with openai.OpenAI(base_url=f"{base}/v1", api_key="any", max_retries=0) as client:
            message: Any = {"role": "user", "content": "hi"}
            parts = client.chat.completions.create(
                model=VLM, messages=[message], stream=True, stream_options={"include_usage": True}
            )
            told: list[Any] = [client.chat.completions.create(model=VLM, messages=[message], max_tokens=3), *parts]
            told.append(client.completions.create(model=VLM, prompt="hi"))
            told.append(client.embeddings.create(model=EMBEDDER, input=["a", "b"]))
            told += [*client.models.list(), client.models.retrieve(VLM)]
            with pytest.raises(openai.NotFoundError) as caught:
                client.chat.completions.create(model="nope", messages=[message])
            told.append(caught.value.body)
            stories.append(told)
    assert stories[0] == stories[1]


def extras(value: Any) -> list[str]:
    """Fields that a type of the openai package does not know, in it and in all that it holds."""
    if isinstance(value, list):
        return [name for entry in value for name in extras(entry)]
    if not isinstance(value, openai.BaseModel):
        return []
    return [
        *(value.model_extra or {}),
        *(name for key in type(value).model_fields for name in extras(getattr(value, key))),
    ]


CHAT = {"model": VLM, "messages": [{"role": "user", "content": "hi"}]}
V1_SHAPES: tuple[tuple[str, Any, Any], ...] = (
    ("/v1/chat/completions", CHAT, types.chat.ChatCompletion),
    ("/v1/chat/completions", CHAT | {"max_tokens": 2}, types.chat.ChatCompletion),
    ("/v1/chat/completions", CHAT | {"stream": True}, types.chat.ChatCompletionChunk),
    (
        "/v1/chat/completions",
        CHAT | {"stream": True, "stream_options": {"include_usage": True}},
        types.chat.ChatCompletionChunk,
    ),
    ("/v1/completions", {"model": VLM, "prompt": "hi"}, types.Completion),
    ("/v1/embeddings", {"model": EMBEDDER, "input": ["a", "b"]}, types.CreateEmbeddingResponse),
    (f"/v1/models/{VLM}", None, types.Model),
    ("/v1/models", None, SyncPage[types.Model]),
    ("/v1/chat/completions", {"model": "nope", "messages": CHAT["messages"]}, types.shared.ErrorObject),
    ("/v1/chat/completions", {"model": VLM, "messages": []}, types.shared.ErrorObject),
    ("/v1/models/nope", None, types.shared.ErrorObject),
)


@pytest.mark.parametrize("at", ["ollama", "gateway"])
def test_every_v1_answer_fits_the_openai_packages_own_types(world: Street, at: str) -> None:
    """Strictly: no type is bent, no field is missing, none is there that they do not know; parts of a stream too."""
    base = world.front.url if at == "ollama" else world.gateway().url
    for path, body, kind in V1_SHAPES:
        answer = httpx.request("GET" if body is None else "POST", base + path, json=body, trust_env=False)
        said = [answer.text]
        if answer.headers["content-type"] == "text/event-stream":
            *said, end, rest = [event.removeprefix("data: ") for event in answer.text.split("\n\n")]
            assert (end, rest) == ("[DONE]", "")
        if kind is types.shared.ErrorObject:
            assert answer.status_code >= 400
            said = [json.dumps(answer.json()["error"])]
        for part in said:
            assert extras(kind.model_validate_json(part, strict=True)) == [], (path, part)
    until(lambda: world.leases() == ())


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_runs_through_it_unchanged(world: Street) -> None:
    """As people try things in a shell, its `Expect: 100-continue` for large bodies included."""
    gateway = world.gateway()
    large = json.dumps({"model": VLM, "prompt": "hi", "images": [base64.b64encode(b"x" * 2_000_000).decode()]})
    said = []
    for base in (world.front.url, gateway.url):
        options = ["curl", "-sS", "--noproxy", "*", "-d", "@-", f"{base}/api/generate"]
        for body in (json.dumps(PROMPT), large):
            done = subprocess.run(options, input=body.encode(), capture_output=True, check=True, timeout=PATIENCE_S)
            said.append(done.stdout)
    assert said[:2] == said[2:]
    assert said[1].count(b"\n") == 9


# --- many at once, with disconnects, while modes change ---------------------------------------------------------------

REQUESTS = 200
WAYS = (
    "ollama",
    "ollama streamed",
    "ollama sync",
    "ollama sync streamed",
    "openai",
    "openai streamed",
    *(["curl"] if shutil.which("curl") else []),
)
_came: contextvars.ContextVar[bytearray] = contextvars.ContextVar("came")
"""What the body of an answer was on the wire, whatever the client makes of it."""


class _Tee(httpx.AsyncByteStream, httpx.SyncByteStream):
    def __init__(self, inner: Any) -> None:
        self._inner, self._came = inner, _came.get()

    def __iter__(self) -> Iterator[bytes]:
        for part in self._inner:
            self._came += part
            yield part

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._inner:
            self._came += part
            yield part

    def close(self) -> None:
        self._inner.close()

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Listening(httpx.HTTPTransport):
    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        response.stream = _Tee(response.stream)
        return response


class _AsyncListening(httpx.AsyncHTTPTransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        response.stream = _Tee(response.stream)
        return response


class Left(Exception):
    """The client has gone on purpose."""


class Callers:
    """The official clients and curl at one address, each answer noted as it came over the wire."""

    def __init__(self, base: str) -> None:
        self.base = base
        wide = httpx.Limits(max_connections=None)
        self._later = ollama.AsyncClient(host=base, transport=_AsyncListening(limits=wide))
        self._now = ollama.Client(host=base, transport=_Listening(limits=wide))
        http = httpx.AsyncClient(transport=_AsyncListening(limits=wide), timeout=PATIENCE_S)
        self._openai = openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="any", max_retries=0, http_client=http)

    async def close(self) -> None:
        await self._later._client.aclose()
        self._now._client.close()
        await self._openai.close()

    async def ask(self, way: str, prompt: str, *, leaves: bool = False) -> bytes:
        """Ask in one of the `WAYS`; with `leaves` go after the first part of a streamed answer."""
        came = bytearray()
        _came.set(came)
        message: Any = [{"role": "user", "content": prompt}]
        match way:
            case "ollama":
                await self._later.chat(VLM, message)
            case "ollama streamed":
                async with contextlib.aclosing(await self._later.generate(VLM, prompt, stream=True)) as parts:
                    async for _ in parts:
                        if leaves:
                            raise Left
            case "ollama sync" | "ollama sync streamed":
                await asyncio.to_thread(self._ask_now, prompt, way.endswith("streamed"), leaves)
            case "openai":
                await self._openai.chat.completions.create(model=VLM, messages=message)
            case "openai streamed":
                chunks = await self._openai.chat.completions.create(model=VLM, messages=message, stream=True)
                async with chunks:
                    async for _ in chunks:
                        if leaves:
                            raise Left
            case "curl":
                body = json.dumps({"model": VLM, "prompt": prompt})
                words = ("curl", "-sSN", "--noproxy", "*", "-d", body, f"{self.base}/api/generate")
                process = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE)
                assert process.stdout is not None
                try:
                    came += await process.stdout.readline()
                    if leaves:
                        raise Left
                    came += await process.stdout.read()
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
        return bytes(came)

    def _ask_now(self, prompt: str, streamed: bool, leaves: bool) -> None:
        if not streamed:
            self._now.generate(VLM, prompt)
            return
        with contextlib.closing(self._now.generate(VLM, prompt, stream=True)) as parts:
            for _ in parts:
                if leaves:
                    raise Left


def test_two_hundred_mixed_requests_with_disconnects_while_modes_change() -> None:
    """Every answer that is completed is the direct one to the byte; no lease is left; loads are not more than causes.

    The causes of a load are the changes of mode, the expiries, and the leases themselves.
    """
    rng = random.Random(20261123)
    plan = [(rng.choice(WAYS), "x" * rng.randint(1, 9), rng.random(), rng.random() * 0.02) for _ in range(REQUESTS)]

    async def modes(world: Street, over: asyncio.Event) -> int:
        changes = 0
        while not over.is_set():
            mode = rng.choice(["recording", "autopilot", "idle"])
            with contextlib.suppress(errors.LeaseTimeout):
                await world.manager.aio.set_execution_mode(mode)
                changes += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.03):
                    await over.wait()
        return changes

    async def story(world: Street, url: str) -> tuple[list[str], int, int]:
        direct, relayed = Callers(world.front.url), Callers(url)
        known = {(way, prompt): await direct.ask(way, prompt) for way, prompt in sorted({p[:2] for p in plan})}
        await world.manager.aio.ensure_vlm_unloaded()
        loads = world.ollama.counts["loads"]

        async def one(way: str, prompt: str, mood: float, pause_s: float) -> str:
            await asyncio.sleep(pause_s)
            try:
                # A quarter of them give up very soon, often while the model loads; a thread cannot be given up.
                async with asyncio.timeout(0.04 if mood > 0.75 and "sync" not in way else None):
                    answer = await relayed.ask(way, prompt, leaves=mood < 0.2)
            except TimeoutError:
                return "gave up"
            except Left:
                return "left in the middle"
            except (ollama.ResponseError, openai.APIError) as error:
                return f"{way}: {error}"
            assert answer == known[way, prompt], (way, prompt)
            return "whole"

        over, ended = asyncio.Event(), []
        changing = asyncio.create_task(modes(world, over))
        for start in range(0, REQUESTS, 20):  # in waves, so that the model idles and modes change between
            ended += await asyncio.gather(*(one(*entry) for entry in plan[start : start + 20]))
        over.set()
        changes = await changing
        await direct.close()
        await relayed.close()
        return ended, changes, loads

    with street(load_s=0.03, generate_s=0.03, idle_timeout_s=0.4, num_parallel=8) as world:
        ended, changes, loads = asyncio.run(story(world, world.gateway().url))
        until(lambda: world.leases() == () and world.ollama.running() == 0)
        tally = {how: ended.count(how) for how in set(ended)}
        assert set(tally) == {"whole", "left in the middle", "gave up"}, tally
        assert tally["whole"] > REQUESTS / 2, tally
        rows = [record.row for record in world.manager.journal]
        causes = changes + rows.count("idle") + rows.count("wanted") + rows.count("wanted-recovers")
        assert 0 < world.ollama.counts["loads"] - loads <= causes
        assert world.clip.violations == []


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_close", ["release", "leave"])
def test_a_gateway_that_is_stopped_lets_answers_end_within_its_grace(on_close: str) -> None:
    """A short stream ends whole; what does not end is broken off; then the manager closes as `on_close` says."""
    with street(generate_s=0.5, on_close=on_close, clip_model=None) as world:
        gateway = world.gateway(shutdown_s=2.0)
        connection, answer = opened(gateway.url, {**PROMPT, "stream": True})
        answer.readline()
        stopping = in_thread(gateway.close)
        lines = answer.read().splitlines()
        assert json.loads(lines[-1])["done"]
        stopping.result(PATIENCE_S)
        connection.close()
        with pytest.raises(httpx.ConnectError):
            httpx.get(gateway.url, trust_env=False)
        assert world.leases() == ()
        world.manager.close()
        assert world.resident is (on_close == "leave")


@pytest.mark.parametrize("moment", ["in the middle of streams", "in the middle of a load"])
def test_a_gateway_that_is_stopped_breaks_off_what_outlives_its_grace(moment: str) -> None:
    """It is gone within the bound, its leases too, and the model with the manager."""
    load = moment.endswith("load")
    with street(load_s=30.0 if load else 0.03, generate_s=30.0, vlm_load_deadline_s=60.0) as world:
        gateway = world.gateway(shutdown_s=1.0)
        with ThreadPoolExecutor() as pool:
            asking = [pool.submit(post, f"{gateway.url}/api/generate", PROMPT | {"stream": True}) for _ in range(3)]
            until(lambda: world.ollama.loading() if load else len(world.leases()) == 3)
            began = time.monotonic()
            gateway.close()
            assert time.monotonic() - began < 1.0 + 2.0
            until(lambda: world.leases() == ())
            for one in asking:
                with contextlib.suppress(httpx.HTTPError):  # broken off, where the answer had begun
                    assert one.result(PATIENCE_S).status_code == 503
        began = time.monotonic()
        world.manager.close()
        assert time.monotonic() - began < 5.0
        until(lambda: not world.ollama.loaded() and world.ollama.loading() is None)
        assert world.card.held_mib("clip") == 0.0


def test_the_upload_of_a_model_file_goes_through_in_parts(world: Street) -> None:
    """It is larger than any request that runs a model may be, and is never held whole."""
    gateway = world.gateway(max_body_mib=0.1)
    size = 32 * 65536
    parts = (b"x" * 65536 for _ in range(32))
    url = f"{gateway.url}/api/blobs/sha256:{hashlib.sha256(b'x').hexdigest()}"
    answer = httpx.post(url, content=parts, headers={"Content-Length": str(size)}, trust_env=False)
    assert (answer.status_code, answer.text) == (404, "404 page not found"), "the simulated Ollama has no such route"
    (entry,) = [entry for entry in world.ollama.log if entry.path.startswith("/api/blobs/")]
    assert len(entry.body) == size


# --- the command ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def command(*words: str, env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of the command line, and the address that it says first."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "gpu_fsm", *words],
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://" in line, line + (process.communicate(timeout=PATIENCE_S)[1] if not line else "")
        yield process, line[line.index("http://") :].split()[0]
    finally:
        process.kill()
        process.communicate()


def test_the_command_serves_is_controlled_and_ends_on_sigterm(tmp_path: Path) -> None:
    """In the middle of a stream: exit within the bound, the model released, and the stream told so."""
    env = {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
    served = ("simulate-ollama", "--port", "0", "--model", f"{VLM}=5000", "--load-ms", "50", "--vram-mib", "0")
    with command(*served, env=env) as (_, ollama_url):
        asked = ("gateway", "--listen", "127.0.0.1:0", "--gateway-shutdown-s", "1", "--ollama-url", ollama_url)
        with command(*asked, "--vlm-model", VLM, "--clip-model", "none", env=env) as (gateway, url):
            assert post(f"{url}/api/generate", PROMPT).json()["done"]
            assert [m["name"] for m in httpx.get(f"{ollama_url}/api/ps", trust_env=False).json()["models"]] == [VLM]
            status = [sys.executable, "-m", "gpu_fsm", "status", "--json"]
            done = subprocess.run(status, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)
            assert json.loads(done.stdout)["vlm_state"] == "loaded", done.stderr
            connection, answer = opened(url, {**PROMPT, "stream": True})
            answer.readline()
            began = time.monotonic()
            gateway.send_signal(signal.SIGTERM)
            assert json.loads(answer.read().splitlines()[-1])["done"], "it was short enough to end"
            connection.close()
            assert gateway.wait(PATIENCE_S) == 0
            assert time.monotonic() - began < 10.0
            assert httpx.get(f"{ollama_url}/api/ps", trust_env=False).json() == {"models": []}


# --- in short: what each of its parts has tests of its own for -------------------------------------------------------


@pytest.mark.core
def test_what_would_undo_the_managers_work_is_put_right_on_the_way() -> None:
    """An unload is the manager's, keep_alive and options are its own, and what could be read in two ways is refused."""
    with street(vlm_options={"num_ctx": 4096}) as world:
        url = f"{world.gateway().url}/api/generate"
        world.manager.set_execution_mode("recording")
        assert post(url, {"model": VLM, "keep_alive": 0}).json()["done_reason"] == "unload"
        hold = world.manager.get_status().hold
        assert (world.resident, hold and hold.value) == (False, "parked")
        assert post(url, {**PROMPT, "keep_alive": -1}).status_code == 200
        body = [entry.body for entry in world.ollama.log if entry.op == "ollama.generate"][-1]
        config = world.manager.config
        assert body["keep_alive"] == config.idle_timeout_s + config.keep_alive_margin_s
        assert body["options"] == {"num_ctx": 4096}
        asked = world.asked("/api/generate")
        twice = json.dumps({"model": OTHER, "Model": VLM, "prompt": "hi"})
        assert httpx.post(url, content=twice, trust_env=False).status_code == 400
        assert world.asked("/api/generate") == asked


@pytest.mark.core
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "evil-localhost:PORT"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Authorization": "Bearer a-whole"}, 401),
        ({"Authorization": ""}, 401),
    ],
)
def test_a_stranger_is_turned_away(world: Street, headers: dict[str, str], status: int) -> None:
    """By the name it calls, the page it comes from, the token it lacks: before Ollama hears of it."""
    gateway = world.gateway(token="a-whole-token-of-ours")
    headers = {"Authorization": "Bearer a-whole-token-of-ours", **headers}
    headers = {name: value.replace("PORT", str(gateway.port)) for name, value in headers.items()}
    asked = world.asked("/api/version")
    assert httpx.get(f"{gateway.url}/api/version", headers=headers, trust_env=False).status_code == status
    assert world.asked("/api/version") == asked + (status == 200)


@pytest.mark.core
def test_the_gateways_token_is_not_told_to_ollama() -> None:
    """It is for this door."""
    with serving(answering({"version": "0.32.15"})) as upstream:
        config = GPUResourceConfig(ollama_url=upstream.url, vlm_model=VLM, clip_model=None, unload_deadline_s=0.2)
        probe = SimulatedProbe(clock=RunningClock(), card=None)
        with GPUResourceManager(config, vram_probe=probe) as manager:
            with Gateway(
                manager, GatewayConfig(listen="127.0.0.1:0", shutdown_s=0, token="a-whole-token-of-ours")
            ) as gateway:
                headers = {"Authorization": "Bearer a-whole-token-of-ours"}
                assert httpx.get(f"{gateway.url}/api/version", headers=headers, trust_env=False).status_code == 200
    assert [visit.line for visit in upstream.visits if "a-whole-token-of-ours" in visit.head] == []
    assert "GET /api/version" in {visit.line for visit in upstream.visits}


@pytest.mark.core
def test_room_that_is_lent_is_not_taken_by_a_prompt(world: Street) -> None:
    """Not even by another model's."""
    gateway = world.gateway()
    lent = post(f"{gateway.url}/gpu-fsm/lease", {"holder": "a game", "needed_mib": 100, "ttl_s": 30, "wait_s": 10})
    assert lent.status_code in (200, 201)
    for model in (VLM, OTHER):
        assert post(f"{gateway.url}/api/generate", {**PROMPT, "model": model}).status_code == 503
    assert world.ollama.loaded() == ()


@pytest.mark.core
def test_a_door_in_this_process_holds_its_lease_as_long_as_the_gateway_does(world: Street) -> None:
    """Until the answer has been read."""
    world.ollama.generate_s = 0.5
    gateway = world.gateway()
    asking = in_thread(world.session().post, f"{world.front.url}/api/generate", json=PROMPT)
    until(lambda: world.ollama.running() == 1)
    assert len(world.leases()) == 1
    beside = in_thread(post, f"{gateway.url}/api/generate", PROMPT)
    until(lambda: world.ollama.running() == 2)
    assert len(world.leases()) == 2
    assert (asking.result(PATIENCE_S).status_code, beside.result(PATIENCE_S).status_code) == (200, 200)
    until(lambda: world.leases() == ())
