"""Whatever the server sends: only our errors, inside the deadline, inside the memory bound."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_fsm.errors import GPUFSMError, OllamaError
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation.wire import dumps
from gpu_fsm.status import Answer
from tests.contract.replay import RECORDINGS
from tests.hostile import FLOOD, Script, scripted
from tests.ollama_clients import FINAL, LOADED, Stopwatch, VirtualClock, client, config, entry, ps
from tests.raw_server import RawServer, Visit

THOROUGH = settings().max_examples >= 1000
BRIEF = settings().max_examples < 100
CASES = 200_000 if THOROUGH else 2_000 if BRIEF else 20_000
SOCKET_CASES = 500
LIMIT_S = 5.0
CONTROL_BYTES = (1 << 20) + (1 << 18) + (1 << 16)
"""Read of a control answer at most: its body, a quarter more for chunks, 64 KiB for the head."""
ANSWER_BYTES = (64 << 20) + (16 << 20) + (1 << 16)
BLOCK = 1 << 16
"""The last read may take so much more before the bound is looked at."""


def operations(manager: OllamaManager, limit_s: float) -> dict[str, Callable[[], object]]:
    """Every call of the client."""
    chat = [{"role": "user", "content": "x"}]
    limits: dict[str, Any] = {"keep_alive_s": 60, "timeout_s": limit_s}
    return {
        "residency": lambda: manager.residency(limit_s),
        "catalog": lambda: manager.catalog(limit_s),
        "health": lambda: manager.health(limit_s),
        "load": lambda: manager.load_model(keep_alive_s=60, deadline_s=limit_s),
        "unload": lambda: manager.unload_model(timeout_s=limit_s),
        "renew": lambda: manager.renew(**limits),
        "generate": lambda: list(manager.generate("x", **limits)),
        "stream": lambda: list(manager.generate("x", stream=True, **limits)),
        "chat": lambda: list(manager.chat(chat, stream=True, **limits)),
    }


# --- recorded answers, cut --------------------------------------------------------------------------------------------


def recorded() -> dict[str, bytes]:
    """Every different answer of the recordings as bytes on the wire, by the request that it was given to."""

    def answers(tree: Any) -> Iterator[dict[str, Any]]:
        if isinstance(tree, dict) and "response" in tree and "request" in tree:
            yield tree
        elif isinstance(tree, dict | list):
            for value in tree.values() if isinstance(tree, dict) else tree:
                yield from answers(value)

    found: dict[str, bytes] = {}
    shapes = set()
    for path in sorted(RECORDINGS.glob("*.json")):
        for one in answers(json.loads(path.read_text(encoding="utf-8"))):
            request, response = one["request"], one["response"]
            if request["method"] == "HEAD":
                continue
            body = response.get("body_text", "").encode() or dumps(response.get("body"))
            shape = (request["path"], response["status"], len(body))
            if shape in shapes:
                continue  # the same answer at another moment
            shapes.add(shape)
            headers = dict(response["headers"])
            if "Transfer-Encoding" in headers:
                body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            else:
                headers["Content-Length"] = str(len(body))
            head = f"HTTP/1.1 {response['status']} {response['reason']}\r\n"
            head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            found[f"{request['method']} {request['path']} {response['status']} {len(found)}"] = (
                head.encode() + b"\r\n" + body
            )
    return found


RECORDED = recorded()


def asked_for(key: str, whole: bytes) -> tuple[str, ...]:
    """The calls that such an answer belongs to."""
    path = key.split()[1]
    if path == "/api/ps":
        return ("residency",)
    if path == "/api/tags":
        return ("catalog",)
    if path == "/api/version":
        return ("health",)
    if b"duration" in whole:
        return ("generate", "stream")
    return ("unload",) if b'"unload"' in whole else ("renew",)


@pytest.mark.parametrize("key", RECORDED)
def test_a_recorded_answer_cut_at_every_byte_is_one_of_our_errors(key: str) -> None:
    """Closed or silent after the cut: never a foreign exception, never past the deadline, never a false no."""
    whole = RECORDED[key]
    both = ("close", "hang")
    for cut in range(len(whole)):
        for end in both if cut < 1000 else both[cut % 2 :][:1]:
            clock = VirtualClock()
            make, _ = scripted(clock, Script(pieces=((0.0, whole[:cut]),), end=end))
            manager = OllamaManager(config(vlm_load_retries=0), clock=clock, transport=make)
            calls = operations(manager, LIMIT_S)
            for name in asked_for(key, whole):
                start, answer = clock.now, None
                with contextlib.suppress(OllamaError):
                    answer = calls[name]()
                assert clock.now - start <= LIMIT_S + 1e-6
                if name == "residency" and cut < len(whole) - 7:
                    assert getattr(answer, "answer", None) is Answer.UNKNOWN


def test_recorded_answers_cut_over_a_socket_are_our_errors_too() -> None:
    """A sample of the same cuts, with a real connection behind each."""
    cuts = [(key, cut) for key, whole in RECORDED.items() for cut in range(3, len(whole), max(1, len(whole) // 6))]
    waiting = iter(cuts)

    def answer(visit: Visit) -> None:
        key, cut = next(waiting)
        visit.send(RECORDED[key][:cut])

    watch = Stopwatch()
    with RawServer(answer) as server:
        manager = client(server, vlm_load_retries=0)
        for _ in cuts:
            with contextlib.suppress(OllamaError):
                manager.renew(keep_alive_s=60, timeout_s=LIMIT_S)
    assert watch.s < 60
    assert len(cuts) > 200


# --- a hostile server -------------------------------------------------------------------------------------------------

STATUS = st.sampled_from(
    [200] * 8 + [204, 206, 301, 307, 400, 401, 403, 404, 405, 429, 499, 500, 501, 502, 503, 504, 999]
)
KIND = st.sampled_from(
    ["application/json", "application/json; charset=utf-8", "application/x-ndjson", "text/html", "text/plain", ""]
)
HEADERS = st.sampled_from(
    [""] * 6
    + [
        "Content-Encoding: gzip\r\n",
        "Content-Encoding: identity\r\n",
        "Content-Length: 5\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 99999999999999999999\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Location: http://169.254.169.254/\r\n",
        "Set-Cookie: a=b\r\n",
        "Connection: keep-alive\r\n",
        ": no name\r\n",
        "X: \xff\x00\x1b[31m\r\n",
        "\r\n",
        "X-Long: " + "x" * 70_000 + "\r\n",
        "X-Many: y\r\n" * 150,
    ]
)
GOOD: list[Any] = [
    ps(entry("tiny-a:latest")),
    ps(),
    {"models": None},
    LOADED,
    FINAL,
    {"version": "0.32.15"},
    {"response": "a", "done": False},
    {"message": {"role": "assistant", "content": "a"}, "done": True},
    {"error": "model 'tiny-a' not found"},
    {"error": {"code": 400, "message": "x"}},
]
VALUE = st.sampled_from(
    [
        *(None, True, -1, 0, 1.5, 10**18, 10**30, 10**400, float("nan"), float("inf")),
        *("", "x", "\x1b[2J\n", "\ud800", "y" * 5000, '{"error":{"message":"deep"}}', "llava:cloud"),
        *([], {}, [[[]]], {"error": {"error": "{"}}),
    ]
)
KEYS = ["models", "name", "digest", "size", "size_vram", "expires_at", "error", "done", "done_reason", "response"]
KEYS += ["message", "content", "eval_count", "total_duration", "version", "capabilities", "remote_host", "details"]


NO_ANSWER = st.sampled_from(
    [b"", b"[" * 50_000, b'{"a":' * 50_000, b"<html>no</html>", b"null", b"\xef\xbb\xbf{}", b'"x', b"9" * 5000]
)
NO_HEAD = st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"SSH-2.0-x\r\n", b"HTTP/9.9 x\r\n", b"\r\n" * 9])


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A good answer with something wrong in it, or no answer at all."""
    how = draw(st.integers(0, 9))
    if how == 0:
        return draw(st.binary(max_size=40))
    if how == 1:
        return draw(NO_ANSWER)
    value = json.loads(json.dumps(draw(st.sampled_from(GOOD))))
    for _ in range(draw(st.integers(0, 2))):
        inner = value
        models = value.get("models")
        if isinstance(models, list) and models and isinstance(models[0], dict) and draw(st.booleans()):
            inner = models[0]
        inner[draw(st.sampled_from(KEYS))] = draw(VALUE)
    data = json.dumps(value).encode("utf-8", "surrogatepass")
    if how == 2:
        data = data[: draw(st.integers(0, len(data)))]
    elif how == 3:
        data = (data + b"\n") * draw(st.integers(1, 300))
    elif how == 4:
        data = data.replace(b'"', draw(st.sampled_from([b"'", b"\x00", b'"\xff', b""])), 3)
    return data


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """Bytes of an answer, whole or broken, at once or in parts, with an end of some kind."""
    status, body, framing = draw(STATUS), draw(bodies()), draw(st.integers(0, 9))
    kind, more = draw(KIND), draw(HEADERS)
    head = f"HTTP/1.1 {status} Said\r\n" + (f"Content-Type: {kind}\r\n" if kind else "") + more
    end = draw(st.sampled_from(["close"] * 14 + ["reset", "hang", "drip", "flood"]))
    flood = FLOOD
    if framing <= 4:
        data = f"{head}Content-Length: {len(body) + (0, 0, 0, 7, -3)[framing]}\r\n\r\n".encode("latin-1") + body
    elif framing <= 6:
        size = draw(st.sampled_from([b"%x", b"%x;x=y", b"-%x", b"%xz", b"0%x"])) % len(body)
        data = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode("latin-1") + size + b"\r\n" + body + b"\r\n"
        data += draw(st.sampled_from([b"0\r\n\r\n", b"0\r\nTrailer: x\r\n", b"", b"ffffffffff\r\n"]))
        flood = draw(st.sampled_from([FLOOD, b"1" * 65536, b"T: x\r\n" * 10_000, b"1\r\n \r\n" * 10_000]))
    elif framing == 7:
        data = f"{head}\r\n".encode("latin-1") + body
    elif framing == 8:
        data = draw(NO_HEAD) + body
        flood = draw(st.sampled_from([FLOOD, b"HTTP/1.1 100 Continue\r\n\r\n" * 2000, b"X: y\r\n" * 10_000]))
    else:
        data = head.encode("latin-1")
        flood = draw(st.sampled_from([b"X: " + b"y" * 60_000 + b"\r\n", b"z" * 65536]))
    cut, pause_s = draw(st.sampled_from([0, 1, 20, 90, 200])), draw(st.sampled_from([0.0, 0.0, 0.001, 4.99, 1e6]))
    return Script(pieces=((0.0, data[:cut]), (pause_s, data[cut:])), end=end, more=flood)


NAMES = list(operations(client("http://127.0.0.1:1"), 1.0))


@given(scripts(), st.sampled_from(NAMES))
@settings(max_examples=CASES)
def test_no_server_makes_the_client_late_or_greedy_or_raise_what_is_not_ours(script: Script, name: str) -> None:
    """In process, with the whole HTTP stack, in virtual time."""
    clock = VirtualClock()
    make, used = scripted(clock, script)
    told = config(vlm_load_retries=1, retry_base_s=0.5)
    manager = OllamaManager(told, clock=clock, transport=make, jitter=lambda: 0.0)
    start = clock.now
    with contextlib.suppress(GPUFSMError):
        operations(manager, LIMIT_S)[name]()
    assert clock.now - start <= LIMIT_S + 1e-6
    bound = ANSWER_BYTES if name in ("generate", "stream", "chat") else CONTROL_BYTES
    assert max(transport.bytes_read for transport in used) <= bound + BLOCK


def test_a_hostile_server_behind_a_socket_is_no_worse() -> None:
    """The same scripts over real connections; each call ends within its short timeout and what a busy machine adds."""
    current: list[Script] = []
    late: list[float] = []

    def answer(visit: Visit) -> None:
        current[-1].play(visit)

    with RawServer(answer) as server:
        manager = client(server, vlm_load_retries=0)
        calls = operations(manager, 0.15)

        @given(scripts(), st.sampled_from(NAMES))
        @settings(max_examples=SOCKET_CASES)
        def run(script: Script, name: str) -> None:
            current.append(script)
            watch = Stopwatch()
            with contextlib.suppress(GPUFSMError):
                calls[name]()
            late.append(watch.s - 0.15)

        run()
    assert len(late) >= SOCKET_CASES
    assert max(late) < 10.0
