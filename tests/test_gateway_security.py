"""Who may use the gateway, and what nobody can make it do: hosts, pages, tokens, bodies, clients that say nothing."""

from __future__ import annotations

# ruff: noqa: E402
import pytest

for _library in ("httpx", "ollama", "openai", "starlette", "uvicorn"):
    pytest.importorskip(_library, reason=f"{_library} is not installed; it comes with the extra test")

import asyncio
import contextlib
import hmac
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx

from gpu_fsm import GPUResourceConfig, GPUResourceManager, errors
from gpu_fsm.appconfig import GatewayConfig
from gpu_fsm.gateway.guard import Doorkeeper
from gpu_fsm.gateway.serve import Gateway
from gpu_fsm.simulation import RunningClock, SimulatedProbe
from tests.gateways import VLM, Street, street
from tests.raw_server import http, serving
from tests.waiting import PATIENCE_S, until

TOKEN = "c4nary-t0ken-of-the-gateway"
PROMPT = {"model": VLM, "prompt": "hi", "stream": False}


@pytest.fixture(scope="module")
def shared() -> Iterator[Street]:
    """One street for the whole file; what a test adds to it is a gateway of its own."""
    with street() as made:
        yield made


@pytest.fixture
def world(shared: Street) -> Iterator[Street]:
    """The street, with the gateways of this test."""
    with contextlib.ExitStack() as gateways:
        shared.gateways, kept = gateways, shared.gateways
        yield shared
    shared.gateways = kept


@contextlib.contextmanager
def dialled(gateway: Gateway) -> Iterator[socket.socket]:
    """A bare connection."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=PATIENCE_S) as made:
        yield made


def said(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    parts = []
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            part = b""
        if not part:
            return b"".join(parts)
        parts.append(part)


def status_of(answer: bytes) -> int:
    """The status of a raw answer."""
    return int(answer.split(b" ", 2)[1])


def raw(gateway: Gateway, head: str, body: bytes = b"") -> int:
    """Send exactly this, and read the status."""
    with dialled(gateway) as connection:
        connection.sendall(head.replace("\n", "\r\n").replace("PORT", str(gateway.port)).encode() + b"\r\n\r\n" + body)
        return status_of(said(connection))


def nothing_came_through(world: Street, before: int) -> bool:
    """Ollama was asked nothing meanwhile, by whatever client (the manager's own looks are no client's)."""
    return not [entry for entry in tuple(world.ollama.log)[before:] if entry.path not in ("/api/ps", "/api/tags")]


# --- Host -------------------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("127.0.0.1:PORT", True),
        ("localhost:PORT", True),
        ("LOCALHOST:PORT", True),
        ("[::1]:PORT", True),
        ("gpu.lan:8080", True),
        ("127.0.0.1", False),
        ("127.0.0.1:1", False),
        ("evil.example", False),
        ("evil.example:PORT", False),
        ("127.0.0.1.evil.example:PORT", False),
        ("localhost.evil.example:PORT", False),
        ("evil.localhost:PORT", False),
        ("evil.local:PORT", False),
        ("x.gpu.lan:8080", False),
        ("192.168.1.1:PORT", False),
        ("2130706433:PORT", False),
        ("localhost:PORT@evil.example", False),
        ("", False),
    ],
)
def test_only_exact_hosts_are_served(world: Street, host: str, served: bool) -> None:
    """A page that rebinds a name of its own to loopback still names itself."""
    gateway = world.gateway(allowed_hosts=("gpu.lan:8080",))
    before = len(world.ollama.log)
    status = raw(gateway, f"GET /api/version HTTP/1.1\nConnection: close\nHost: {host}")
    assert status == (200 if served else 403)
    assert served or nothing_came_through(world, before)


@pytest.mark.parametrize(
    "head",
    [
        "GET /api/version HTTP/1.0",
        "GET /api/version HTTP/1.1\nConnection: close",
        "GET /api/version HTTP/1.1\nConnection: close\nHost: 127.0.0.1:PORT\nHost: evil.example",
        "GET http://evil.example/ HTTP/1.1\nConnection: close\nHost: 127.0.0.1:PORT",
        "GET //evil.example/ HTTP/1.1\nConnection: close\nHost: evil.example",
        "OPTIONS * HTTP/1.1\nConnection: close\nHost: 127.0.0.1:PORT",
        "CONNECT evil.example:443 HTTP/1.1\nConnection: close\nHost: 127.0.0.1:PORT",
    ],
)
def test_a_request_without_one_clear_target_is_refused(world: Street, head: str) -> None:
    """No Host, two, or a target that is somebody else's."""
    before = len(world.ollama.log)
    assert raw(world.gateway(), head) in (400, 403)
    assert nothing_came_through(world, before)


def test_one_who_takes_it_for_a_proxy_is_told_so(world: Street) -> None:
    """`http_proxy` set to its address by mistake: a sentence, and not somebody else's page that is missing."""
    with dialled(gateway := world.gateway()) as connection:
        head = f"GET http://evil.example/ HTTP/1.1\r\nHost: 127.0.0.1:{gateway.port}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        answer = said(connection)
    assert status_of(answer) == 400
    assert b"It is no proxy." in answer


LINE = b'"model":"sim-vlm:7b"'
ASKED = json.dumps({**PROMPT, "stream": True}).encode()


@pytest.mark.core
@pytest.mark.parametrize(
    ("head", "body", "heads"),
    [
        pytest.param("POST /api/generate HTTP/1.0\nContent-Length: SIZE", ASKED, 1, id="an old one"),
        pytest.param(
            "POST /api/generate HTTP/1.1\nExpect: 100-continue\nContent-Length: SIZE",
            ASKED,
            2,
            id="one that asks first",
        ),
        pytest.param(
            "POST /api/generate HTTP/1.1\nTransfer-Encoding: chunked\nTrailer: X-A",
            b"%x;a=b\r\n%b\r\n0\r\nX-A: 1\r\nHost: evil.example\r\n\r\n" % (len(ASKED), ASKED),
            1,
            id="one in parts with an extension and trailers",
        ),
        pytest.param(
            "POST /api/generate HTTP/1.1\nUpgrade: websocket\nConnection: Upgrade, close\nContent-Length: SIZE",
            ASKED,
            1,
            id="one that would rather talk WebSocket",
        ),
        pytest.param(
            "GET /api/version HTTP/1.1\nHost: 127.0.0.1:PORT\n\nPOST /api/generate HTTP/1.1\nContent-Length: SIZE",
            ASKED,
            2,
            id="two at once",
        ),
    ],
)
def test_rare_but_right_requests_get_the_whole_answer(world: Street, head: str, body: bytes, heads: int) -> None:
    """HTTP allows them; each answer is there to its end, and the lease is over."""
    gateway = world.gateway(idle_client_s=0.5)
    text = f"{head}\nHost: 127.0.0.1:PORT\n\n".replace("\n", "\r\n").replace("PORT", str(gateway.port))
    with dialled(gateway) as connection:
        connection.sendall(text.replace("SIZE", str(len(body))).encode() + body)
        answer = said(connection)
    assert answer.count(b"HTTP/1.1 ") == heads
    assert answer.count(LINE) == 9
    assert b'"done":true' in answer
    until(lambda: world.leases() == ())


def test_what_clients_do_wrong_fills_no_log(world: Street, caplog: pytest.LogCaptureFixture) -> None:
    """They are told; a log that anybody can write into is no log."""
    gateway = world.gateway(max_connections=2)
    for head in ("no HTTP", "GET / HTTP/1.1\nHost: 127.0.0.1:PORT\nUpgrade: websocket\nConnection: Upgrade, close"):
        assert raw(gateway, head) in (200, 400)
    with dialled(gateway), dialled(gateway):
        assert raw(gateway, "GET / HTTP/1.1\nHost: 127.0.0.1:PORT\nConnection: close") == 503
    assert caplog.records == []


# --- Origin -----------------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"Origin": "http://127.0.0.1:PORT"}, True),
        ({"Origin": "http://localhost:PORT"}, False),
        ({"Origin": "http://127.0.0.1:1"}, False),
        ({"Origin": "https://127.0.0.1:PORT"}, False),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "file://"}, False),
        ({"Origin": ""}, False),
        ({"Origin": "https://app.lan"}, True),
        ({"Origin": "https://app.lan.evil.example"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "none"}, True),
    ],
)
def test_a_web_page_may_call_only_where_it_is_allowed(world: Street, headers: dict[str, str], allowed: bool) -> None:
    """For looking and for acting alike; the preflight of a page that may not is refused too."""
    gateway = world.gateway(allowed_origins=("https://app.lan",))
    sent = {name: value.replace("PORT", str(gateway.port)) for name, value in headers.items()}
    before = len(world.ollama.log)
    expected = 200 if allowed else 403
    assert httpx.get(f"{gateway.url}/api/version", headers=sent, trust_env=False).status_code == expected
    unload = {"model": VLM, "keep_alive": 0}
    answer = httpx.post(f"{gateway.url}/api/generate", json=unload, headers=sent, trust_env=False)
    assert answer.status_code == expected
    if not allowed:
        assert nothing_came_through(world, before)
        asked = {**sent, "Access-Control-Request-Method": "POST"}
        preflight = httpx.options(f"{gateway.url}/api/generate", headers=asked, trust_env=False)
        assert preflight.status_code == 403
        assert "access-control-allow-origin" not in preflight.headers


@pytest.mark.core
def test_no_cors_headers_unless_they_are_set(world: Street) -> None:
    """And then only for the page that was named."""
    page = {"Origin": "https://app.lan", "Access-Control-Request-Method": "POST"}
    plain = world.gateway()
    own = {"Origin": plain.url}
    for answer in (
        httpx.get(f"{plain.url}/api/version", headers=own, trust_env=False),
        httpx.options(f"{plain.url}/api/version", headers=page, trust_env=False),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]
    open_to_one = world.gateway(allowed_origins=("https://app.lan",))
    preflight = httpx.options(f"{open_to_one.url}/api/generate", headers=page, trust_env=False)
    assert preflight.headers["access-control-allow-origin"] == "https://app.lan"


# --- token ------------------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer wrong", 401),
        (f"bearer {TOKEN}", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        (f"Bearer {TOKEN}x", 401),
        (f"Basic {TOKEN}", 401),
        (f"Bearer {TOKEN}", 200),
    ],
)
def test_with_a_token_every_route_asks_for_it(world: Street, authorization: str | None, status: int) -> None:
    """Ollama's routes and ours; the token itself is not passed on."""
    gateway = world.gateway(token=TOKEN)
    headers = {} if authorization is None else {"Authorization": authorization}
    before = len(world.ollama.log)
    for path in ("/api/version", "/gpu-fsm/status", "/v1/models"):
        assert httpx.get(gateway.url + path, headers=headers, trust_env=False).status_code == status
    assert status == 200 or nothing_came_through(world, before)


@pytest.mark.parametrize("where", ["token", "access_token", "Authorization"])
def test_a_token_in_the_address_is_none(world: Street, where: str) -> None:
    """Addresses end up in logs and histories."""
    gateway = world.gateway(token=TOKEN)
    assert httpx.get(f"{gateway.url}/api/version", params={where: TOKEN}, trust_env=False).status_code == 401


def test_the_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the standard library's own comparison, for wrong answers of every length."""
    compared: list[tuple[bytes, bytes]] = []
    honest = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or honest(a, b))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    for given in (b"", b"Bearer w", b"Bearer " + b"w" * 1000):
        scope = {"type": "http", "path": "/", "headers": [(b"authorization", given)]}
        asyncio.run(Doorkeeper(None, TOKEN)(scope, None, send))  # type: ignore[arg-type]
    assert [message["status"] for message in sent if "status" in message] == [401] * 3
    assert [expected for _, expected in compared] == [f"Bearer {TOKEN}".encode()] * 3


@pytest.mark.core
@pytest.mark.parametrize(
    ("token", "userinfo", "arrives"),
    [
        (TOKEN, "", None),
        (None, "", f"Bearer {TOKEN}"),
        (TOKEN, "me:s3cret@", "Basic bWU6czNjcmV0"),
        (None, "me:s3cret@", "Basic bWU6czNjcmV0"),
    ],
)
def test_neither_token_nor_credentials_go_where_they_do_not_belong(
    token: str | None, userinfo: str, arrives: str | None
) -> None:
    """The gateway's token stays here, Ollama's credentials go there and nowhere else, and hop-by-hop headers end."""
    with serving(http({"version": "0.32.15"})) as upstream:
        url = upstream.url.replace("://", f"://{userinfo}")
        quick: dict[str, Any] = {"observe_timeout_s": 0.1, "unload_deadline_s": 0.2, "shed_deadline_s": 0.2}
        config = GPUResourceConfig(ollama_url=url, vlm_model=VLM, clip_model=None, **quick)
        with GPUResourceManager(config, vram_probe=SimulatedProbe(clock=RunningClock(), card=None)) as manager:
            listen = GatewayConfig(listen="127.0.0.1:0", shutdown_s=0, token=token)
            with Gateway(manager, listen) as gateway:
                sent = {
                    "Authorization": f"Bearer {TOKEN}",
                    "Connection": "x-hop",
                    "X-Hop": "1",
                    "X-Kept": "1",
                    "Origin": gateway.url,
                }
                answer = httpx.get(f"{gateway.url}/api/version?a=%20b", headers=sent, trust_env=False)
                assert answer.json() == {"version": "0.32.15"}
        (visit,) = [visit for visit in upstream.visits if visit.header("X-Kept")]
        assert visit.line == "GET /api/version?a=%20b"
        assert visit.header("Authorization") == arrives
        assert visit.header("Host") == f"127.0.0.1:{upstream.port}"
        assert (visit.header("X-Hop"), visit.header("Origin")) == (None, None)
        assert visit.header("Accept-Encoding") == answer.request.headers["Accept-Encoding"]


@pytest.mark.core
@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.168.1.5"])
def test_beyond_loopback_a_token_is_a_must(host: str) -> None:
    """Said before anything is bound."""
    with pytest.raises(errors.ConfigError, match="token"):
        GatewayConfig(listen=f"{host}:0")
    assert GatewayConfig(listen=f"{host}:0", token=TOKEN).token


def test_an_open_gateway_serves_the_names_it_is_given_and_its_token(world: Street) -> None:
    """On all interfaces it listens, and only the allowed Host with the token comes in."""
    gateway = world.gateway(listen="0.0.0.0:0", token=TOKEN, allowed_hosts=("gpu.lan",))
    with_token = f"\nAuthorization: Bearer {TOKEN}"
    for host, token, status in (
        ("gpu.lan:PORT", with_token, 200),
        ("gpu.lan", with_token, 200),
        ("gpu.lan:PORT", "", 401),
        ("127.0.0.1:PORT", with_token, 403),
    ):
        assert raw(gateway, f"GET /api/version HTTP/1.1\nConnection: close\nHost: {host}{token}") == status


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.core
def test_an_oversized_body_is_refused_by_its_own_word(world: Street) -> None:
    """Without reading it."""
    gateway = world.gateway(max_body_mib=1.0)
    head = "POST /api/generate HTTP/1.1\nHost: 127.0.0.1:PORT\nContent-Length: 1000000000000"
    assert raw(gateway, head) == 413


@pytest.mark.core
def test_a_body_without_end_is_cut_at_its_bound(world: Street) -> None:
    """Chunk after chunk, it never says how long it is."""
    gateway = world.gateway(max_body_mib=1.0)
    with dialled(gateway) as connection:
        head = f"POST /api/generate HTTP/1.1\r\nHost: 127.0.0.1:{gateway.port}\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(200):
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        answer = said(connection)
    assert answer == b"" or status_of(answer) == 413, "a reset may overtake the answer"
    until(lambda: world.leases() == ())


def test_a_body_that_drips_is_given_up(world: Street) -> None:
    """It must be there within its time; no lease is held meanwhile."""
    gateway = world.gateway(idle_client_s=0.3)
    before = len(world.ollama.log)
    with dialled(gateway) as connection:
        head = f"POST /api/generate HTTP/1.1\r\nHost: 127.0.0.1:{gateway.port}\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b'{"model": "sim-vlm:7b", ')
        assert world.leases() == ()
        assert status_of(said(connection)) == 408
    assert nothing_came_through(world, before)


@pytest.mark.core
@pytest.mark.parametrize("encoding", ["gzip", "zstd", "identity, gzip"])
def test_a_compressed_request_is_refused(world: Street, encoding: str) -> None:
    """It could name a model that was not judged."""
    headers = {"Content-Encoding": encoding}
    answer = httpx.post(f"{world.gateway().url}/api/generate", content=b"x", headers=headers, trust_env=False)
    assert answer.status_code == 400


def test_a_path_cannot_be_judged_as_one_and_sent_as_another(world: Street) -> None:
    """Escapes and dots: what is judged is what goes on."""
    gateway = world.gateway(other_models="refuse")
    body = json.dumps({**PROMPT, "model": "other:1b"}).encode()
    for path in (
        "/api/%67enerate",
        "/api%2Fgenerate",
        "//api/generate",
        "/api//generate",
        "//api///generate",
        "/x/../api/generate",
        "/api/./generate",
        "/api/show/../generate",
    ):
        head = f"POST {path} HTTP/1.1\nConnection: close\nHost: 127.0.0.1:PORT\nContent-Length: {len(body)}"
        assert raw(gateway, head, body) in (400, 403, 404), path
    assert "other:1b" not in world.ollama.loaded()


@pytest.mark.parametrize("method", ["post", "Post", "pOST"])
def test_a_method_in_small_letters_is_judged_as_what_it_becomes(world: Street, method: str) -> None:
    """It goes on in capitals, so another model must not run by it."""
    gateway = world.gateway(other_models="refuse")
    body = json.dumps({**PROMPT, "model": "other:1b"}).encode()
    head = f"{method} /api/generate HTTP/1.1\nConnection: close\nHost: 127.0.0.1:PORT\nContent-Length: {len(body)}"
    assert raw(gateway, head, body) == 403
    assert "other:1b" not in world.ollama.loaded()


@pytest.mark.core
@pytest.mark.parametrize("path", ["/api/generate", "/api/create", "/api/tags"])
def test_a_length_told_in_two_ways_is_refused(world: Street, path: str) -> None:
    """Two servers in a row could each believe another one."""
    before = len(world.ollama.log)
    head = f"POST {path} HTTP/1.1\nHost: 127.0.0.1:PORT\nContent-Length: 5\nTransfer-Encoding: chunked"
    assert raw(world.gateway(), head, b"3\r\nabc\r\n0\r\n\r\n") == 400
    assert nothing_came_through(world, before)


@contextlib.contextmanager
def before(upstream: str, **options: Any) -> Iterator[Gateway]:
    """A gateway before a server at `upstream` that may be anything."""
    quick: dict[str, Any] = {"observe_timeout_s": 0.1, "unload_deadline_s": 0.2, "shed_deadline_s": 0.2}
    config = GPUResourceConfig(ollama_url=upstream, vlm_model=VLM, clip_model=None, **quick)
    with GPUResourceManager(config, vram_probe=SimulatedProbe(clock=RunningClock(), card=None)) as manager:
        with Gateway(manager, GatewayConfig(listen="127.0.0.1:0", shutdown_s=0, **options)) as gateway:
            yield gateway


@pytest.mark.core
@pytest.mark.parametrize("path", ["/../secret", "/..", "/%2e%2e/secret", "/a/..%2F..%2fsecret", "/a/..\\..\\secret"])
def test_no_path_leads_out_of_ollamas_part_of_a_server(path: str) -> None:
    """Other things are behind the same address, and they would be asked with Ollama's credentials."""
    with serving(http({"version": "0.32.15"})) as upstream:
        with before(f"{upstream.url.replace('://', '://me:s3cret@')}/ollama") as gateway:
            assert raw(gateway, f"GET {path} HTTP/1.1\nConnection: close\nHost: 127.0.0.1:PORT") == 400
            assert raw(gateway, "GET /api/x..y HTTP/1.1\nConnection: close\nHost: 127.0.0.1:PORT") == 200
        assert all(visit.line.split()[1].startswith("/ollama/api/") for visit in upstream.visits)


# --- slow and silent clients ------------------------------------------------------------------------------------------


def test_a_hundred_clients_that_say_nothing_disturb_nobody(world: Street) -> None:
    """Others are served meanwhile, and the silent ones are let go."""
    gateway = world.gateway(idle_client_s=0.6)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(dialled(gateway)) for _ in range(100)]
        for connection in silent[::2]:
            connection.sendall(b"GET / HT")
        began = time.monotonic()
        answer = httpx.post(f"{gateway.url}/api/generate", json=PROMPT, trust_env=False, timeout=PATIENCE_S)
        assert answer.status_code == 200
        for connection in silent:
            assert said(connection) == b""
        assert time.monotonic() - began < 10.0
    until(lambda: not gateway._server.server_state.connections)


def test_parts_of_an_answer_do_not_wait_for_each_other(world: Street) -> None:
    """With Nagle's algorithm and delayed acknowledgements on one path, each small part waits 40 ms."""
    gateway = world.gateway()
    with dialled(gateway):
        until(lambda: gateway._server.server_state.connections)
        (protocol,) = gateway._server.server_state.connections
        sock = protocol.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_head_that_drips_is_given_up_also_on_a_connection_that_was_used(world: Street) -> None:
    """Each byte in time, the whole never."""
    gateway = world.gateway(idle_client_s=0.5)
    with dialled(gateway) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{gateway.port}\r\n\r\n".encode())
        connection.settimeout(0.05)
        end, got = time.monotonic() + 10.0, b""
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                part = connection.recv(4096)
                if not part:
                    break
                got += part
            try:
                connection.sendall(b"G")
            except OSError:
                break
        assert time.monotonic() < end, "it was never given up"
        assert status_of(got) == 200


def test_a_head_without_end_is_refused(world: Street) -> None:
    """Its size is bounded too."""
    gateway = world.gateway()
    with dialled(gateway) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(b"GET / HTTP/1.1\r\n" + b"X-A: " + b"x" * 200_000)
        answer = said(connection)
    assert answer == b"" or status_of(answer) in (400, 431)


def test_more_connections_than_are_allowed_are_told_so(world: Street) -> None:
    """Memory and files are bounded; those who are in go on."""
    gateway = world.gateway(max_connections=5)
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(dialled(gateway))
        until(lambda: len(gateway._server.server_state.connections) == 5)
        assert httpx.get(f"{gateway.url}/api/version", trust_env=False).status_code == 503


def test_a_client_that_never_reads_its_answer_is_let_go(world: Street) -> None:
    """Not only its request ends: its connection does too, though what it was sent still lies there."""
    with serving(http({"text": "x" * 8_000_000})) as upstream, before(upstream.url, idle_client_s=0.3) as gateway:
        with dialled(gateway) as connection:
            connection.sendall(f"GET /api/x HTTP/1.1\r\nHost: 127.0.0.1:{gateway.port}\r\n\r\n".encode())
            until(lambda: any("/api/x" in visit.line for visit in upstream.visits))
            until(lambda: not gateway._server.server_state.connections)
