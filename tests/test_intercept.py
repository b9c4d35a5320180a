"""Doors for code that knows nothing of us: what a request needs, and leases that end whatever happens."""

from __future__ import annotations

# ruff: noqa: E402
import pytest

pytestmark = pytest.mark.core

for _library in ("httpx", "ollama", "openai", "starlette", "uvicorn"):
    pytest.importorskip(_library, reason=f"{_library} is not installed; it comes with the extra test")

import asyncio
import base64
import contextlib
import functools
import gc
import json
import threading
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import ollama
import openai
import requests
from hypothesis import given
from hypothesis import strategies as st

from gpu_fsm import GPUResourceConfig, Hold, errors
from gpu_fsm.gateway import relay
from gpu_fsm.intercept import httpx_transport, needs, requests_adapter
from gpu_fsm.intercept.doors import Manager, Rules, aliases_of
from gpu_fsm.intercept.httpx_transport import VLMTransport
from gpu_fsm.intercept.needs import Ask, Need, read
from gpu_fsm.simulation import Exchange, SimulatedOllama
from gpu_fsm.simulation import ollama as simulated
from tests.gateways import EMBEDDER, OTHER, VLM, Street, street
from tests.waiting import PATIENCE_S, in_thread, until

PROMPT = {"model": VLM, "prompt": "hi", "stream": False}


@pytest.fixture
def world() -> Iterator[Street]:
    """A manager in IDLE over a simulated Ollama behind a real socket."""
    with street() as made:
        yield made


def asked(path: str, body: Any, *, method: str = "POST", options: dict[str, Any] | None = None, **more: Any) -> Ask:
    """What a request needs."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    settings = {"vlm": "llava:7b", "keep_alive_s": 360.0, "options": options or {}, "encoded": False, **more}
    return read(method, path, data, **settings)


# --- what a request needs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "need"),
    [
        ("/api/generate", {"model": "llava:7b", "prompt": "x"}, Need.VLM),
        ("/api/generate", {"model": "LLaVA:7B"}, Need.VLM),
        ("/api/generate", {"model": "registry.ollama.ai/library/llava:7b", "prompt": "x"}, Need.VLM),
        ("/api/generate", {"MODEL": "llava:7b", "prompt": "x"}, Need.VLM),
        ("/api/generate", b' {"model":"llava:7b"} and what Ollama does not read', Need.VLM),
        ("/api/generate", b'{"model":"llava:7b","prompt":"\xff"}', Need.VLM),
        ("/api/chat", {"model": "llava:7b", "messages": [{"role": "user", "content": "x"}]}, Need.VLM),
        ("/api/chat", {"model": "llava:7b", "messages": [], "keep_alive": "5m"}, Need.VLM),
        ("/api/embed", {"model": "llava:7b", "input": "x"}, Need.VLM),
        ("/api/embed", {"model": "llava:7b", "keep_alive": 0}, Need.VLM),
        ("/api/embeddings", {"model": "llava:7b", "prompt": "x"}, Need.VLM),
        ("/v1/chat/completions", {"model": "llava:7b", "messages": []}, Need.VLM),
        ("/v1/completions", {"model": "llava:7b"}, Need.VLM),
        ("/v1/embeddings", {"model": "llava:7b"}, Need.VLM),
        ("/v1/responses", {"model": "llava:7b"}, Need.VLM),
        ("/v1/messages", {"model": "llava:7b"}, Need.VLM),
        ("/v1/some/day", {"model": "llava:7b"}, Need.VLM),
        ("/api/generate", {"model": "llava:7b", "keep_alive": 0}, Need.UNLOAD),
        ("/api/generate", {"model": "llava:7b", "keep_alive": "0s", "prompt": ""}, Need.UNLOAD),
        ("/api/generate", {"model": "llava:7b", "Keep_Alive": 0.0}, Need.UNLOAD),
        ("/api/chat", {"model": "llava:7b", "keep_alive": "0", "messages": []}, Need.UNLOAD),
        ("/api/generate", {"model": "llava:7b", "keep_alive": 0, "prompt": "x"}, Need.VLM),
        ("/api/generate", {"model": "llava:7b", "keep_alive": False}, Need.VLM),
        ("/api/generate", {"model": "llava", "prompt": "x"}, Need.OTHER),
        ("/api/generate", {"model": "me/llava:7b", "prompt": "x"}, Need.OTHER),
        ("/api/generate", {"model": "llama3", "keep_alive": 0}, Need.NOTHING),
        ("/api/generate", {"prompt": "x"}, Need.NOTHING),
        ("/api/generate", {"model": 7}, Need.NOTHING),
        ("/api/generate", b"no JSON", Need.NOTHING),
        ("/api/generate", b'{"model":"llava:7b",}', Need.NOTHING),
        ("/api/generate", b'{"model":"llava:7b" "x":1}', Need.NOTHING),
        ("/api/generate", b'{"model":"llava:7b"', Need.NOTHING),
        ("/api/generate", b"{}", Need.NOTHING),
        ("/api/generate", b"{1:2}", Need.NOTHING),
        ("/api/generate", b'\n{ "model" :\t"llava:7b"\r\n}', Need.VLM),
        ("/api/generate", b"[]", Need.NOTHING),
        ("/api/generate", b"", Need.NOTHING),
        ("/api/show", {"model": "llava:7b"}, Need.NOTHING),
        ("/api/pull", {"model": "llava:7b"}, Need.NOTHING),
        ("/api/create", {"model": "llava:7b"}, Need.NOTHING),
        ("/api/blobs/sha256:00", b"\x00", Need.NOTHING),
        ("/elsewhere", {"model": "llava:7b"}, Need.NOTHING),
    ],
)
def test_the_need_is_read_as_ollama_reads_the_request(path: str, body: Any, need: Need) -> None:
    """What would run the model in Ollama is seen to run it, however it is written; nothing else wakes it."""
    assert asked(path, body).need is need


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS"])
def test_only_a_post_runs_a_model(method: str) -> None:
    """Health and lists neither wake the model nor reset its timer."""
    assert asked("/api/generate", PROMPT, method=method).need is Need.NOTHING


@pytest.mark.parametrize(
    ("body", "more"),
    [
        (b'{"model":"other","Model":"llava:7b"}', {}),
        (b'{"model":"llava:7b","model":null}', {}),
        (b'{"model":"llava:7b","x":' + b"[" * 100_000, {}),
        (b'{"model":"llava:7b","x":' + b"9" * 5000 + b"}", {}),
        (b"\x28\xb5\x2f\xfd", {"encoded": True}),
        (b'{"model":"llava:7b","x":[' + b"{}," * 600_000 + b"{}]}", {}),
    ],
)
def test_what_ollama_could_read_in_another_way_is_refused(body: bytes, more: dict[str, Any]) -> None:
    """A request that is judged as one thing and run as another would run without a lease."""
    with pytest.raises(errors.BadArgument):
        asked("/api/generate", body, **more)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    given_options=st.none() | st.dictionaries(st.sampled_from(["num_ctx", "seed"]), st.integers(1, 9)),
    keep_alive=st.none() | json_values,
    more=st.dictionaries(st.text(max_size=6).map("x".__add__), json_values, max_size=3),
)
def test_only_keep_alive_and_missing_options_are_put_right(
    given_options: dict[str, int] | None, keep_alive: Any, more: dict[str, Any]
) -> None:
    """The client's own options win, its keep_alive does not, and everything else is as it was."""
    body = {"model": "llava:7b", "prompt": "x", **more}
    if given_options is not None:
        body["options"] = given_options
    if keep_alive is not None:
        body["keep_alive"] = keep_alive
    if len({key.casefold() for key in body}) < len(body):
        return
    sent = json.loads(asked("/api/generate", body, options={"num_ctx": 4096}).body)
    assert sent.get("keep_alive", 360) == 360
    assert sent["options"] == {"num_ctx": 4096, **(given_options or {})}
    untouched = {"keep_alive", "options"}
    assert {k: v for k, v in sent.items() if k not in untouched} == {
        k: v for k, v in body.items() if k not in untouched
    }


@given(body=st.dictionaries(st.text(max_size=6), json_values, max_size=5), blanks=st.sampled_from([None, 2]))
def test_a_request_is_read_as_json_is(body: dict[str, Any], blanks: int | None) -> None:
    """Whatever is in it, the standard library's own reading is ours."""
    text = json.dumps(body, indent=blanks, ensure_ascii=False).encode("utf-8", "surrogatepass")
    assert needs._object(text) == json.loads(text.decode("utf-8", "replace"))


def test_a_request_that_needs_no_change_goes_on_to_the_letter() -> None:
    """Not even its spaces change."""
    body = b'{ "model" : "llava:7b",  "prompt":"x" }'
    assert asked("/api/generate", body).body is body
    v1 = b'{"model":"llava:7b","messages":[]}'
    assert asked("/v1/chat/completions", v1, options={"num_ctx": 1}).body is v1


@pytest.mark.parametrize("path", ["/v1/systemone", "/v1/some/day", "/api/some/day"])
def test_no_route_pins_the_vlm(path: str) -> None:
    """Also one that is not known yet may take a keep_alive; runner options go only where they are known to belong."""
    sent = asked(path, {"model": "llava:7b", "keep_alive": -1, "options": {"x": 1}}, options={"num_ctx": 1}).body
    assert json.loads(sent) == {"model": "llava:7b", "options": {"x": 1}, "keep_alive": 360}


@pytest.mark.parametrize(
    "tags",
    [
        {"models": [{"name": "me/eyes:latest", "digest": "a"}]},
        {"models": [{"name": "me/eyes:latest", "digest": "a"}, {"name": "llava:7b", "digest": "b"}]},
        {"models": [{"name": "me/eyes:latest", "digest": ""}, {"name": "llava:7b", "digest": ""}]},
        {"models": [{"name": "me/eyes:latest", "digest": None}, {"name": "llava:7b", "digest": None}]},
        {"models": [{"name": 7}]},
        {"models": None},
        [],
        None,
    ],
)
def test_only_an_equal_digest_makes_an_alias(tags: Any) -> None:
    """An answer that tells nothing tells of no alias."""
    assert not needs.is_alias(json.dumps(tags).encode(), "me/eyes", "llava:7b")
    right = {"models": [{"name": "me/Eyes:latest", "digest": "a"}, {"name": "llava:7b", "digest": "a"}]}
    assert needs.is_alias(json.dumps(right).encode(), "me/eyes", "llava:7b")
    assert not needs.is_alias(b"<html>", "me/eyes", "llava:7b")


def test_an_ollama_on_loopback_is_known_by_its_three_names() -> None:
    """A client may say localhost where the settings say 127.0.0.1."""
    assert "http://localhost:11434" in aliases_of("http://127.0.0.1:11434")
    assert aliases_of("https://gpu.lan/ollama") == ("https://gpu.lan:443/ollama",)


@pytest.mark.parametrize(
    ("ollama_url", "asked_url", "is_ours"),
    [
        ("http://gpu.lan:80", "http://gpu.lan/api/chat", True),
        ("http://gpu.lan:80", "http://gpu.lan:80/api/chat", True),
        ("http://gpu.lan:80", "http://gpu.lan:8080/api/chat", False),
        ("https://gpu.lan/ollama", "https://gpu.lan/ollama/api/chat", True),
        ("https://gpu.lan/ollama", "https://GPU.lan:443/ollama/api/chat", True),
        ("https://gpu.lan/ollama", "https://gpu.lan/ollama2/api/chat", False),
        ("http://me:s3cret@gpu.lan:11434", "http://me:s3cret@gpu.lan:11434/api/chat", True),
        ("http://127.0.0.1:11434", "http://me:s3cret@[::1]:11434/api/chat", True),
        ("http://127.0.0.1:11434", "https://127.0.0.1:11434/api/chat", False),
    ],
)
def test_ollama_is_known_however_its_address_is_written(ollama_url: str, asked_url: str, is_ours: bool) -> None:
    """A port that goes without saying, credentials, capitals; and what only begins alike is somebody else's."""
    remote: dict[str, Any] = {"allow_remote": True} if "lan" in ollama_url else {}
    config = GPUResourceConfig(ollama_url=ollama_url, vlm_model=VLM, clip_model=None, **remote)
    rules = Rules()
    manager = cast("Manager", SimpleNamespace(config=config))
    with requests_adapter.session(manager, rules) as session:
        prepared = requests.Request("POST", asked_url).prepare()
        assert isinstance(session.get_adapter(str(prepared.url)), requests_adapter.VLMAdapter) is is_ours
    with contextlib.closing(VLMTransport(manager, rules)) as transport:
        assert transport._door.is_ours(httpx.Request("POST", asked_url)) is is_ours


# --- requests ---------------------------------------------------------------------------------------------------------


def test_requests_that_run_the_vlm_load_it_and_hold_a_lease_until_they_are_read(world: Street) -> None:
    """The lease is there from before the request reaches Ollama until the last byte, and not longer."""
    session = world.session(holder="old script")
    answer = session.post(f"{world.front.url}/api/generate", json={**PROMPT, "stream": True}, stream=True)
    assert world.resident
    (holder,) = world.leases()
    assert holder == "old script: POST /api/generate"
    lines = [json.loads(line) for line in answer.iter_lines()]
    assert lines[-1]["done"]
    assert world.leases() == ()
    assert world.ollama.counts["loads"] == 1


@pytest.mark.parametrize("path", ["/", "/api/version", "/api/tags", "/api/ps", "/v1/models"])
def test_health_and_lists_wake_nothing(world: Street, path: str) -> None:
    """A monitor that asks every second must not keep the model in."""
    answer = world.session().get(world.front.url + path)
    assert answer.status_code == 200
    assert not world.resident
    assert {record.trigger for record in world.manager.journal} <= {"check"}


# The collector may end urllib3's generator after we have closed its connection, of which that one complains to nobody.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["closed", "left in the middle", "forgotten", "forgotten in a ring"])
def test_an_answer_that_is_not_read_to_its_end_frees_its_lease(world: Street, how: str) -> None:
    """Closed or merely dropped: the lease and the request in Ollama end, also where only the collector finds them."""
    session = world.session()
    world.ollama.generate_s = 20.0
    answer = session.post(f"{world.front.url}/api/generate", json={**PROMPT, "stream": True}, stream=True)
    lines = answer.iter_lines()
    next(lines)
    assert len(world.leases()) == 1
    if how == "closed":
        answer.close()
    elif how == "left in the middle":
        with answer:
            pass
    elif how == "forgotten":
        del answer, lines
    else:
        ring: list[Any] = [answer, lines]
        ring.append(ring)
        del answer, lines, ring
        gc.collect()
    until(lambda: world.leases() == ())
    until(lambda: world.ollama.running() == 0)


def test_a_refusal_comes_in_ollamas_own_shape(world: Street) -> None:
    """Code that knows nothing of us knows how to read an HTTP error."""
    world.card.take("game", world.card.free_mib - 100.0)
    answer = world.session().post(f"{world.front.url}/api/generate", json=PROMPT)
    assert answer.status_code == 503
    assert "100 MiB are free" in answer.json()["error"]
    assert "Retry-After" in answer.headers
    with pytest.raises(requests.HTTPError):
        answer.raise_for_status()
    assert world.asked("/api/generate") == 0


def test_a_broken_connection_frees_the_lease(world: Street) -> None:
    """And the caller gets the library's own exception."""
    session = world.session()
    world.manager.ensure_vlm_loaded()
    world.ollama.faults.arm("ollama.generate", "before")
    with pytest.raises(requests.ConnectionError):
        session.post(f"{world.front.url}/api/generate", json=PROMPT)
    assert world.leases() == ()


def test_a_body_that_comes_in_parts_is_judged_too(world: Street) -> None:
    """A generator of bytes runs the VLM like any other body."""
    data = json.dumps({**PROMPT, "keep_alive": -1}).encode()
    answer = world.session().post(f"{world.front.url}/api/generate", data=iter([data[:10], data[10:]]))
    assert answer.json()["done"]
    (sent,) = [e.body for e in world.ollama.log if e.path == "/api/generate" and e.body.get("prompt")]
    assert sent["keep_alive"] == 360, "a stranger's pin would outlive us"


def test_another_model_passes_or_is_refused_as_the_policy_says(world: Street) -> None:
    """Both without waking ours."""
    body = {"model": OTHER, "prompt": "hi", "stream": False}
    url = f"{world.front.url}/api/generate"
    assert world.session().post(url, json=body).json()["model"] == OTHER
    refused = world.session(other_models="refuse").post(url, json=body)
    assert refused.status_code == 403
    assert VLM in refused.json()["error"]
    assert not world.resident


def test_a_strangers_unload_is_the_managers_to_do(world: Street) -> None:
    """In RECORDING it parks the VLM, where an unload behind the manager's back would only be undone."""
    world.manager.set_execution_mode("recording")
    answer = world.session().post(f"{world.front.url}/api/generate", json={"model": VLM, "keep_alive": 0})
    assert answer.json()["done_reason"] == "unload"
    assert not world.resident
    status = world.manager.get_status()
    assert (status.execution_mode.value, status.hold and status.hold.value) == ("recording", "parked")


async def through_asyncio(world: Street, url: str, body: Any, **rules: Any) -> httpx.Response:
    """One POST on the asynchronous transport."""
    async with httpx.AsyncClient(transport=world.manager.async_httpx_transport(**rules)) as client:
        return await client.post(url, json=body)


def post_through(door: str, world: Street, path: str, body: Any, **rules: Any) -> Any:
    """One POST through one of the doors."""
    url = f"{world.front.url}{path}"
    if door == "requests":
        return world.session(**rules).post(url, json=body)
    if door == "asyncio":
        return asyncio.run(through_asyncio(world, url, body, **rules))
    if door == "gateway":
        return httpx.post(f"{world.gateway(**rules).url}{path}", json=body, trust_env=False)
    with httpx.Client(transport=world.manager.httpx_transport(**rules)) as client:
        return client.post(url, json=body)


@pytest.mark.parametrize("door", ["requests", "httpx", "asyncio", "gateway"])
def test_an_alias_of_the_vlm_is_the_vlm(world: Street, door: str) -> None:
    """`ollama cp` gives the same weights another name: loaded by the manager, leased, its keep_alive ruled, parked."""
    world.client(world.front.url).copy(VLM, "me/eyes")
    held: list[tuple[str, ...]] = []
    world.ollama.responder = lambda model, prompt, images: held.append(world.leases()) or "ok"
    world.manager.set_execution_mode("recording")
    world.manager.ensure_vlm_unloaded()
    body = {**PROMPT, "model": "Me/Eyes", "keep_alive": -1}
    said = post_through(door, world, "/api/generate", body, other_models="refuse").json()
    assert (said["model"], said["response"], len(held[0])) == ("Me/Eyes", "ok", 1)
    assert world.ollama.loaded() == (VLM,)
    loads = [entry.body["model"] for entry in world.ollama.log if entry.op == "ollama.load"]
    assert set(loads) == {VLM}, "loaded by nobody but the manager"
    assert [e.body["keep_alive"] for e in world.ollama.log if e.op == "ollama.generate"] == [360]
    refused = post_through(door, world, "/api/generate", {**body, "model": OTHER}, other_models="refuse")
    assert refused.status_code == 403
    post_through(door, world, "/api/generate", {"model": "me/eyes", "keep_alive": 0})
    assert not world.resident
    assert world.manager.get_status().hold is Hold.PARKED


@pytest.mark.parametrize("door", ["requests", "httpx", "asyncio", "gateway"])
def test_without_an_answer_to_compare_a_name_is_what_it_says(world: Street, door: str) -> None:
    """A list that does not come holds nobody up for long, and nobody's request is lost."""
    world.ollama.faults.arm("ollama.tags", "before", times=None)
    answer = post_through(door, world, "/api/generate", {**PROMPT, "model": OTHER})
    assert answer.json()["model"] == OTHER


@pytest.mark.parametrize("door", ["asyncio", "gateway"])
def test_a_list_that_comes_drop_by_drop_holds_nobody_up_for_long(
    world: Street, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each drop is in time, and there is no last one."""

    def drip(server: SimulatedOllama, exchange: Exchange, *_: object) -> None:
        if exchange.status is None:
            exchange.begin(200, "application/json")
        exchange.push(b" ")
        if not exchange.closed:
            server.clock.after(0.1, lambda: drip(server, exchange))

    monkeypatch.setitem(simulated._ROUTES["/api/tags"], "GET", drip)
    monkeypatch.setattr(httpx_transport, "TAGS_S", 0.5)
    monkeypatch.setattr(relay, "TAGS_S", 0.5)
    answer = in_thread(post_through, door, world, "/api/generate", {**PROMPT, "model": OTHER}).result(PATIENCE_S)
    assert answer.json()["model"] == OTHER


def test_other_hosts_are_none_of_our_business(world: Street) -> None:
    """The same session may call anything else."""
    with pytest.raises(requests.ConnectionError):
        world.session().post("http://127.0.0.1:9/api/generate", json=PROMPT, timeout=1)
    assert not world.resident


# --- httpx: the official clients --------------------------------------------------------------------------------------


def test_the_official_client_works_through_the_transport(world: Street) -> None:
    """Its code is unchanged; only a transport is passed in."""
    client = world.client()
    assert client.list().models
    assert not world.resident
    assert client.generate(model=VLM, prompt="hi").response.startswith("one-2")
    parts = client.chat(model=VLM, messages=[{"role": "user", "content": "hey"}], stream=True)
    assert "".join(part.message.content or "" for part in parts).endswith("eight-3-0")
    assert len(client.embed(model=EMBEDDER, input=["a", "b"]).embeddings) == 2
    assert world.leases() == ()
    assert world.ollama.counts["loads"] == 2, "ours and the embedder's"


def test_a_stream_of_the_official_client_that_is_dropped_frees_its_lease(world: Street) -> None:
    """`for part in client.generate(...): break` is how people stop early."""
    world.ollama.generate_s = 20.0
    client = world.client()
    for _ in client.generate(model=VLM, prompt="hi", stream=True):
        assert len(world.leases()) == 1
        break
    gc.collect()
    until(lambda: world.leases() == () and world.ollama.running() == 0)


def test_the_official_client_sees_a_refusal_as_its_own_error(world: Street) -> None:
    """`ollama.ResponseError`, with our reason in it."""
    world.card.take("game", world.card.free_mib - 100.0)
    client = world.client()
    with pytest.raises(ollama.ResponseError, match="are free") as caught:
        client.generate(model=VLM, prompt="hi")
    assert caught.value.status_code == 503


def test_the_openai_client_works_through_the_transport(world: Street) -> None:
    """`/v1` has its own shape of errors."""
    http = world.http()
    client = openai.OpenAI(base_url=f"{world.front.url}/v1", api_key="any", http_client=http, max_retries=0)
    image = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    content: Any = [{"type": "text", "text": "hey"}, {"type": "image_url", "image_url": {"url": image}}]
    answer = client.chat.completions.create(model=VLM, messages=[{"role": "user", "content": content}])
    assert (answer.choices[0].message.content or "").startswith("one-3-1")
    world.manager.ensure_vlm_unloaded()
    world.card.take("game", world.card.free_mib - 100.0)
    with pytest.raises(openai.InternalServerError, match="are free"):
        client.chat.completions.create(model=VLM, messages=[{"role": "user", "content": "hey"}])


def test_the_asynchronous_client_works_and_a_cancelled_task_frees_its_lease(world: Street) -> None:
    """Also one that is cancelled while the model loads: it stops waiting and the load goes on."""

    async def story() -> None:
        client = ollama.AsyncClient(host=world.front.url, transport=world.manager.async_httpx_transport())
        waiting = asyncio.create_task(client.generate(model=VLM, prompt="hi"))
        while world.ollama.loading() is None:
            await asyncio.sleep(0.005)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert world.leases() == ()
        answer = await client.generate(model=VLM, prompt="hi")
        assert answer.response.startswith("one-2")
        world.ollama.generate_s = 20.0
        parts = await client.generate(model=VLM, prompt="hi", stream=True)
        async for _ in parts:
            assert len(world.leases()) == 1
            break
        await parts.aclose()
        assert world.leases() == ()
        forgotten = await client.generate(model=VLM, prompt="hi", stream=True)
        await anext(forgotten)
        del forgotten, parts
        gc.collect()
        while world.leases():
            await asyncio.sleep(0.005)
        running = asyncio.create_task(client.generate(model=VLM, prompt="hi"))
        while not world.leases():
            await asyncio.sleep(0.005)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert world.leases() == ()
        await client._client.aclose()

    asyncio.run(story())
    assert world.ollama.counts["loads"] == 1
    until(lambda: world.ollama.running() == 0)


# --- one's own functions ----------------------------------------------------------------------------------------------


def test_a_decorated_function_runs_under_a_lease(world: Street) -> None:
    """With its name as the holder, and its lease ends with it, also by an exception."""

    @world.manager.needs_vlm
    def caption(word: str, *, fail: bool = False) -> str:
        assert world.resident
        assert [h.rpartition(".")[2] for h in world.leases()] == ["caption"]
        if fail:
            raise KeyError(word)
        return word

    @world.manager.needs_clip(holder="lookup")
    def look_up() -> tuple[str, ...]:
        return world.leases()

    assert caption("a") == "a"
    with pytest.raises(KeyError):
        caption("b", fail=True)
    assert look_up() == ("lookup",)
    assert world.leases() == ()
    assert caption.__name__ == "caption"


def test_a_decorated_generator_holds_its_lease_from_its_first_step_to_its_end(world: Street) -> None:
    """Ended, closed or forgotten; what is sent to it and what it returns goes through."""

    @world.manager.needs_vlm(holder="stream")
    def stream() -> Iterator[int]:
        got = yield 1
        yield got or 2

    @world.manager.needs_vlm(holder="outer")
    def outer() -> Any:
        return (yield from stream())

    running = stream()
    assert world.leases() == ()
    assert next(running) == 1
    assert world.leases() == ("stream",)
    assert running.send(7) == 7  # type: ignore[attr-defined]
    assert list(running) == []
    assert world.leases() == ()
    for end in (lambda g: g.close(), lambda g: None):
        running = outer()
        next(running)
        assert world.leases() == ("outer", "stream")
        end(running)
        del running
        assert world.leases() == ()


def test_decorated_coroutines_and_asynchronous_generators_do_the_same(world: Street) -> None:
    """Cancelled, closed, thrown into, or forgotten."""

    @world.manager.needs_vlm(holder="task")
    async def wait(for_ever: bool) -> str:
        assert world.leases()
        if for_ever:
            await asyncio.Event().wait()
        return "done"

    @world.manager.needs_vlm(holder="agen")
    async def numbers() -> AsyncIterator[int]:
        caught = 0
        while True:
            try:
                yield caught
            except ValueError:
                caught += 1

    async def story() -> None:
        assert await wait(False) == "done"
        task = asyncio.create_task(wait(True))
        while world.leases() != ("task",):
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert world.leases() == ()
        running: Any = numbers()
        assert await anext(running) == 0
        assert await running.athrow(ValueError()) == 1
        assert world.leases() == ("agen",)
        await running.aclose()
        assert world.leases() == ()
        running = numbers()
        await anext(running)
        del running
        while world.leases():
            await asyncio.sleep(0.001)
        left_over = numbers()
        await anext(left_over)  # the loop ends it

    asyncio.run(story())
    assert world.leases() == ()


def test_whatever_can_be_called_can_be_decorated_and_nothing_runs_without_its_lease(world: Street) -> None:
    """Methods of every kind and objects; work that only begins after the return is refused, not done without."""
    manager = world.manager

    class Coroutine:
        async def __call__(self) -> int:
            return len(world.leases())

    class Generated:
        def __call__(self) -> Iterator[int]:
            yield len(world.leases())

    class Home:
        @manager.needs_vlm
        def method(self, a: int, b: int = 2, *, c: int = 3) -> tuple[int, ...]:
            return a, b, c, len(world.leases())

        @classmethod
        @manager.needs_vlm
        def of_class(cls) -> int:
            return len(world.leases())

        @staticmethod
        @manager.needs_vlm
        def static(a: int = 1) -> int:
            return a + len(world.leases())

    assert Home().method(1, c=4) == (1, 2, 4, 1)
    assert (Home.of_class(), Home.static()) == (1, 2)
    assert asyncio.run(manager.needs_vlm(Coroutine())()) == 1
    assert list(manager.needs_vlm(Generated())()) == [1]
    assert asyncio.run(manager.needs_vlm(functools.partial(Coroutine.__call__, Coroutine()))()) == 1
    for kind in (Coroutine, Generated):
        with pytest.raises(errors.BadArgument, match="after the lease has ended"):
            manager.needs_vlm(lambda kind=kind: kind()())()
    with pytest.raises(errors.BadArgument, match="below @classmethod"):
        manager.needs_vlm(cast("Any", classmethod(lambda _: None)))
    assert world.leases() == ()


def test_many_doors_at_once_cost_one_load(world: Street) -> None:
    """Requests through every door meet in one load, and none is lost."""
    sync = world.client()
    session = world.session()

    @world.manager.needs_vlm
    def own() -> bool:
        return world.resident

    start = threading.Barrier(12)

    def through(door: int) -> Any:
        start.wait(10)
        if door % 3 == 0:
            return sync.generate(model=VLM, prompt="hi").done
        if door % 3 == 1:
            return session.post(f"{world.front.url}/api/generate", json=PROMPT).json()["done"]
        return own()

    futures = [in_thread(through, door) for door in range(12)]
    assert all(future.result(20) for future in futures)
    assert world.ollama.counts["loads"] == 1
    assert world.leases() == ()
