"""The simulated world keeps the laws of the real one.

Ids such as `1.4-...` name the section of the notes on Ollama's observed behaviour that a case rests on: 1 shapes and
errors, 3 the scheduler, 4 names, 5 offload.
"""

from __future__ import annotations

import gc
import json
import math
import re
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from gpu_fsm.errors import ClipError, ClipOutOfMemory, CudaPoisoned, GPUFSMError
from gpu_fsm.ports import CLIPHost, Clock, RealClock, VRAMProbe
from gpu_fsm.simulation import (
    KINDS,
    VLM,
    CardFull,
    Exchange,
    Faults,
    OllamaHTTPServer,
    RunningClock,
    SharedCard,
    SimulatedCard,
    SimulatedCLIP,
    SimulatedClock,
    SimulatedModel,
    SimulatedOllama,
    SimulatedWorld,
    WorldStuck,
    run_server,
    serve,
)
from tests import bench_day

URL = "http://127.0.0.1:11434"


def eventually(predicate: Callable[[], bool], within_s: float = 10.0) -> bool:
    """Wait in real time, for what another thread or process does."""
    never = threading.Event()
    clock = RealClock()
    deadline = clock.monotonic() + within_s
    while not predicate():
        if clock.monotonic() > deadline:
            return False
        never.wait(0.005)
    return True


class Client:
    """A program that talks to the world's Ollama, without sockets."""

    def __init__(self, world: SimulatedWorld, name: str = "us") -> None:
        self.adapter = world.ollama.transport(name)()

    def call(self, method: str, path: str, body: Any = None, timeout: float | None = 600.0) -> requests.Response:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = requests.Request(method, URL + path, data=data).prepare()
        answer: requests.Response = self.adapter.send(request, stream=True, timeout=timeout)
        return answer

    def post(self, path: str = "/api/generate", timeout: float | None = 600.0, **body: Any) -> requests.Response:
        return self.call("POST", path, body, timeout)

    def load(self, name: str = VLM, **body: Any) -> requests.Response:
        return self.post(model=name, stream=False, **body)

    def unload(self, name: str = VLM) -> requests.Response:
        return self.post(model=name, keep_alive=0)

    def ps(self) -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = self.call("GET", "/api/ps").json()["models"]
        return models

    def names(self) -> list[str]:
        return [model["name"] for model in self.ps()]


@pytest.fixture
def world() -> SimulatedWorld:
    """A card of 8 GiB, a VLM of 5000 MiB that loads in 4 s, two other models of 1000 MiB that load in 2 s."""
    return SimulatedWorld(models={"llava": 1000, "moondream:v2": 1000})


@pytest.fixture
def client(world: SimulatedWorld) -> Client:
    """A program on that world."""
    return Client(world)


# --- the clock --------------------------------------------------------------------------------------------------------


ODD_FIELDS: list[dict[str, Any]] = [
    {"options": [1]},
    {"options": {"num_ctx": 1e400}},
    {"options": {"num_predict": 1e400}},
    {"images": 5},
    {"messages": 5},
    {"messages": [1]},
    {"messages": [{"role": "user", "content": [1]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"messages": [{"role": "user", "images": 5}]},
    {"tools": 5},
    {"tools": [1]},
    {"tools": [{"function": {"name": "f", "parameters": {"type": "object", "properties": [1]}}}]},
    {"format": {"enum": {"a": 1}}},
    {"format": {"type": "object", "properties": 5}},
    {"prompt": "\ud800", "input": "\ud800"},
]


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/api/embed", "/v1/chat/completions"])
def test_a_field_of_another_kind_is_answered_and_stops_nothing(path: str) -> None:
    """A stranger's program may send what it likes: the world goes on for all others."""
    capable = SimulatedModel(name="all", size_mib=100, capabilities=("completion", "embedding", "tools", "vision"))
    world = SimulatedWorld()
    world.ollama.add_model(capable)
    client = Client(world)
    for odd in ODD_FIELDS:
        plain = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x", "stream": False}
        assert client.call("POST", path, {"model": "all", **plain, **odd}).status_code in (200, 400, 500), odd
    assert client.post(model="all", prompt="x", stream=False).status_code == 200


@given(st.lists(st.floats(0, 1e6), max_size=30), st.floats(0, 2e6))
def test_appointments_are_kept_in_order_and_on_time(moments: list[float], target: float) -> None:
    """Each callback runs once, at its moment, in order of time and then of making; later ones wait."""
    clock = SimulatedClock()
    kept: list[tuple[float, int]] = []

    def keep(moment: float, number: int) -> None:
        assert clock.monotonic() == moment
        kept.append((moment, number))

    for number, moment in enumerate(moments):
        clock.at(moment, partial(keep, moment, number))
    clock.advance(target)
    assert clock.monotonic() == target
    assert kept == sorted((m, n) for n, m in enumerate(moments) if m <= target)


@given(st.lists(st.tuples(st.sampled_from(["sleep", "at", "nested", "until"]), st.floats(0, 100)), max_size=30))
def test_time_never_runs_backwards(steps: list[tuple[str, float]]) -> None:
    """Also when a callback sleeps past other appointments and they are kept late."""
    clock = SimulatedClock()
    seen = [0.0]

    def look() -> None:
        assert clock.monotonic() >= seen[-1]
        seen.append(clock.monotonic())

    def oversleep(seconds: float) -> None:
        look()
        clock.sleep(seconds)
        look()

    for what, value in steps:
        if what == "sleep":
            before = clock.monotonic()
            clock.sleep(value)
            assert clock.monotonic() >= before + value
        elif what == "at":
            clock.at(value, look)
        elif what == "nested":
            clock.after(value, partial(oversleep, value / 3))
        else:
            clock.run_until(lambda: False, deadline=value)
        look()


@pytest.mark.parametrize("seconds", [-1.0, -1e-9, math.nan, math.inf])
def test_a_clock_refuses_to_go_anywhere_but_forward(seconds: float) -> None:
    """Negative, NaN and infinite sleeps are errors of the test, not requests."""
    with pytest.raises(ValueError, match="forward"):
        SimulatedClock().sleep(seconds)


def test_run_until_stops_at_the_event_that_made_it_true() -> None:
    """The clock stands at the moment at which the predicate began to hold, or at the deadline."""
    clock = SimulatedClock()
    came: list[float] = []
    clock.after(2.0, lambda: came.append(clock.monotonic()))
    clock.after(3.0, lambda: came.append(clock.monotonic()))
    assert clock.run_until(lambda: bool(came), deadline=10.0)
    assert clock.monotonic() == 2.0
    assert not clock.run_until(lambda: len(came) == 3, deadline=10.0)
    assert (clock.monotonic(), came) == (10.0, [2.0, 3.0])


def test_a_wait_that_cannot_end_is_an_error() -> None:
    """Nothing scheduled, no other thread: a test hangs nowhere."""
    clock = SimulatedClock()
    clock.stuck_after_s = 0.01
    with pytest.raises(WorldStuck):
        clock.run_until(lambda: False)


def test_a_cancelled_appointment_does_not_happen() -> None:
    """Cancelling is idempotent and harmless when late."""
    clock = SimulatedClock()
    happened: list[int] = []
    first, second = clock.after(1, lambda: happened.append(1)), clock.after(2, lambda: happened.append(2))
    first.cancel()
    clock.advance(5)
    second.cancel()
    assert (happened, first.pending, second.pending) == ([2], False, False)


def test_a_waiting_thread_is_woken_when_its_time_has_passed() -> None:
    """`wait` counts virtual seconds: no real second passes, and not one virtual second too few."""
    clock = SimulatedClock()
    condition = threading.Condition()
    woken: list[float] = []

    def wait() -> None:
        with condition:
            clock.wait(condition, 100.0)
        woken.append(clock.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    assert eventually(lambda: clock.next_at() is not None)
    clock.advance(99.0)
    assert woken == []
    clock.advance(1.0)
    thread.join(10)
    assert woken == [100.0]


def test_a_notified_wait_leaves_no_alarm_behind() -> None:
    """A wait that was notified in time cancels its own time-out."""
    clock = SimulatedClock()
    condition = threading.Condition()

    def wait() -> None:
        with condition:
            clock.wait(condition, 100.0)

    thread = threading.Thread(target=wait)
    thread.start()
    assert eventually(lambda: clock.next_at() is not None)
    with condition:
        condition.notify_all()
    thread.join(10)
    assert clock.next_at() is None


def test_threads_that_sleep_share_one_time() -> None:
    """Eight threads, each sleeping 50 times 1 s: every sleep lasts at least as long as asked."""
    clock = SimulatedClock()
    short: list[float] = []

    def live() -> None:
        for _ in range(50):
            before = clock.monotonic()
            clock.sleep(1.0)
            if clock.monotonic() < before + 1.0:
                short.append(before)

    threads = [threading.Thread(target=live) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert short == []
    assert 50.0 <= clock.monotonic() <= 400.0


@pytest.mark.parametrize("make", [SimulatedClock, RunningClock, RealClock])
def test_every_clock_keeps_the_port(make: Callable[[], Clock]) -> None:
    """`monotonic`, `sleep` and `wait` behave alike on the simulated, the running and the real clock."""
    clock = make()
    assert isinstance(clock, Clock)
    start = clock.monotonic()
    clock.sleep(0.002)
    assert clock.monotonic() - start >= 0.002
    condition = threading.Condition()
    with condition:
        clock.wait(condition, 0)


def test_the_running_clock_keeps_appointments_by_itself() -> None:
    """In real time, in order, cancelled ones left out; `close` ends its thread."""
    clock = RunningClock()
    kept: list[int] = []
    made = threading.Event()
    clock.after(0.0, lambda: made.wait(10.0))  # nothing is kept before all are made
    now = clock.monotonic()
    clock.at(now + 0.02, lambda: kept.append(2))
    clock.at(now + 0.001, lambda: kept.append(1))
    clock.at(now + 0.01, lambda: kept.append(3)).cancel()
    made.set()
    assert eventually(lambda: len(kept) == 2)
    clock.close()
    assert kept == [1, 2]


# --- the card ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["one process", "shared"])
def card(request: pytest.FixtureRequest, tmp_path: Path) -> SimulatedCard | SharedCard:
    """Either ledger, 1000 MiB of which the driver holds 100."""
    clock = SimulatedClock()
    if request.param == "shared":
        return SharedCard(tmp_path / "card.db", 1000, clock=clock, driver_mib=100)
    return SimulatedCard(1000, clock=clock, driver_mib=100)


_moves = st.lists(
    st.tuples(st.sampled_from(["take", "give", "give all"]), st.sampled_from("abc"), st.floats(0, 700)), max_size=40
)


@given(_moves)
def test_the_ledger_adds_up(moves: list[tuple[str, str, float]]) -> None:
    """Never more than there is, all or nothing, and the history retells it."""
    card = SimulatedCard(1000, clock=SimulatedClock(), driver_mib=100)
    held = {"a": 0.0, "b": 0.0, "c": 0.0}
    for what, owner, mib in moves:
        before = dict(held)
        if what == "take":
            if mib <= 900 - sum(held.values()):
                card.take(owner, mib)
                held[owner] += mib
            elif mib > 900 - sum(held.values()) + 1e-3:
                with pytest.raises(CardFull) as full:
                    card.take(owner, mib)
                assert full.value.asked_mib == mib
        else:
            freed = card.give_back(owner, None if what == "give all" else mib)
            held[owner] -= freed
            assert freed <= before[owner] + 1e-3
        assert card.used_mib == pytest.approx(100 + sum(held.values()), abs=1e-3)
    used = 0.0
    for change in card.history:
        used += change.delta_mib
        assert change.used_mib == pytest.approx(used, abs=1e-3)
        assert change.used_mib <= 1000 + 1e-3
    assert card.peak_mib == max(change.used_mib for change in card.history)


def test_an_allocation_that_does_not_fit_takes_nothing(card: SimulatedCard | SharedCard) -> None:
    """`CardFull` names owner, asked and free."""
    card.take("game", 500)
    with pytest.raises(CardFull, match=r"vlm asked for 401 MiB, 400 MiB are free"):
        card.take("vlm", 401)
    assert (card.free_mib, card.held_mib("vlm"), card.peak_mib) == (400, 0, 600)


def test_memory_can_come_back_late_while_its_process_is_gone(card: SimulatedCard | SharedCard) -> None:
    """The owner leaves the process list at once, its memory later."""
    clock = card.clock
    assert isinstance(clock, SimulatedClock)
    card.take("runner", 300, name="llama-server")
    assert [(h.name, h.mib) for h in card.holders() or ()] == [("llama-server", 300)]
    card.release_after("runner", 1.5)
    assert card.holders() == ()
    clock.advance(1.4)
    assert card.free_mib == 600
    clock.advance(0.2)
    assert card.free_mib == 900


def test_a_release_that_never_comes_stays_taken(card: SimulatedCard | SharedCard) -> None:
    """A driver that keeps the memory of a dead process for ever."""
    card.take("runner", 300)
    card.release_after("runner", math.inf)
    assert isinstance(card.clock, SimulatedClock)
    card.clock.advance(1e6)
    assert card.held_mib("runner") == 300


@pytest.mark.parametrize("mib", [-1.0, math.nan, math.inf])
def test_a_size_is_a_number_of_mib(card: SimulatedCard | SharedCard, mib: float) -> None:
    """Nonsense is refused before it gets into the ledger."""
    with pytest.raises(ValueError, match="MiB"):
        card.take("x", mib)


def test_what_a_dead_process_held_vanishes(tmp_path: Path) -> None:
    """Another process takes memory on the shared card and dies without giving it back."""
    path = tmp_path / "card.db"
    card = SharedCard(path, 1000, clock=SimulatedClock(), driver_mib=0)
    code = (
        "import sys; from gpu_fsm.simulation import *; "
        "SharedCard(sys.argv[1], clock=SimulatedClock()).take('vlm', 700, name='llama-server'); "
        "print('taken', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        assert card.free_mib == 300
        assert [(h.pid, h.name, h.mib) for h in card.holders()] == [(other.pid, "llama-server", 700)]
        with pytest.raises(CardFull):
            card.take("clip", 400)
        other.kill()
    assert card.free_mib == 1000
    card.take("clip", 400)


# --- Ollama: words ----------------------------------------------------------------------------------------------------

ANSWERS: dict[str, tuple[str, str, Any, int, str, str]] = {
    # id: method, path, body, status, content type, text or error
    "1.1-root": ("GET", "/", None, 200, "text/plain; charset=utf-8", "Ollama is running"),
    "1.1-root-head": ("HEAD", "/", None, 200, "text/plain; charset=utf-8", ""),
    "1.1-version": ("GET", "/api/version", None, 200, "application/json; charset=utf-8", '{"version":"0.32.15"}'),
    "1.1-version-head": ("HEAD", "/api/version", None, 200, "application/json; charset=utf-8", ""),
    "1.1-tags-head": ("HEAD", "/api/tags", None, 200, "application/json; charset=utf-8", ""),
    "1.1-ps": ("GET", "/api/ps", None, 200, "application/json; charset=utf-8", '{"models":[]}'),
    "1.1-ps-head-is-405": ("HEAD", "/api/ps", None, 405, "text/plain", ""),
    "1.1-wrong-method": ("PUT", "/api/ps", b"{}", 405, "text/plain", "405 method not allowed"),
    "1.1-get-generate": ("GET", "/api/generate", None, 405, "text/plain", "405 method not allowed"),
    "1.1-unknown-path": ("GET", "/api/nothing", None, 404, "text/plain", "404 page not found"),
    "1.7-show-unknown": ("POST", "/api/show", {"model": "nope"}, 404, "json", "model 'nope:latest' not found"),
    "1.7-show-nothing": ("POST", "/api/show", {}, 400, "json", "model is required"),
    "1.8-no-body": ("POST", "/api/generate", b"", 400, "json", "missing request body"),
    "1.8-cut-body": ("POST", "/api/generate", b"{", 400, "json", "unexpected EOF"),
    "1.8-wrong-type": (
        "POST",
        "/api/generate",
        {"model": 5},
        400,
        "json",
        "json: cannot unmarshal number into Go struct field GenerateRequest.model of type string",
    ),
    "1.8-bad-name": ("POST", "/api/generate", {"model": "a b"}, 400, "json", "invalid model name"),
    "1.8-empty-tag": ("POST", "/api/generate", {"model": "m:"}, 400, "json", "invalid model name"),
    "1.8-chat-without-model": ("POST", "/api/chat", {"messages": []}, 400, "json", "model is required"),
    "1.8-generate-without-model": ("POST", "/api/generate", {}, 404, "json", "model '' not found"),
    "1.8-missing-model": ("POST", "/api/generate", {"model": "nope"}, 404, "json", "model 'nope' not found"),
    "1.8-unload-missing": (
        "POST",
        "/api/chat",
        {"model": "nope", "keep_alive": 0},
        404,
        "json",
        "model 'nope' not found",
    ),
    "1.8-embed-missing": (
        "POST",
        "/api/embed",
        {"model": "nope", "input": "x"},
        404,
        "json",
        'model "nope" not found, try pulling it first',
    ),
    "1.8-no-thinking": (
        "POST",
        "/api/generate",
        {"model": "llava", "think": True},
        400,
        "json",
        '"llava" does not support thinking',
    ),
    "1.8-no-insert": (
        "POST",
        "/api/generate",
        {"model": "llava", "suffix": "x", "prompt": "y"},
        400,
        "json",
        "registry.ollama.ai/library/llava:latest does not support insert",
    ),
    "1.8-bad-image": (
        "POST",
        "/api/generate",
        {"model": "llava", "images": ["!!!notbase64"], "prompt": "x"},
        400,
        "json",
        "illegal base64 data at input byte 0",
    ),
    "1.8-cloud": (
        "POST",
        "/api/generate",
        {"model": "llava:cloud"},
        403,
        "json",
        "ollama cloud is disabled: remote model is unavailable",
    ),
    "1.8-option-type-is-500": (
        "POST",
        "/api/generate",
        {"model": "llava", "options": {"num_ctx": "x"}},
        500,
        "json",
        'option "num_ctx" must be of type integer',
    ),
    "1.4-minus-one-as-text": (
        "POST",
        "/api/generate",
        {"model": "llava", "keep_alive": "-1"},
        400,
        "json",
        'time: missing unit in duration "-1"',
    ),
    "1.4-300-as-text": (
        "POST",
        "/api/generate",
        {"model": "llava", "keep_alive": "300"},
        400,
        "json",
        'time: missing unit in duration "300"',
    ),
    "1.4-abc": (
        "POST",
        "/api/generate",
        {"model": "llava", "keep_alive": "abc"},
        400,
        "json",
        'time: invalid duration "abc"',
    ),
    "1.4-empty": (
        "POST",
        "/api/generate",
        {"model": "llava", "keep_alive": ""},
        400,
        "json",
        'time: invalid duration ""',
    ),
    "1.4-bool": (
        "POST",
        "/api/generate",
        {"model": "llava", "keep_alive": True},
        400,
        "json",
        "Unsupported type: 'bool'",
    ),
    "1.4-list": (
        "POST",
        "/api/generate",
        {"model": "llava", "keep_alive": []},
        400,
        "json",
        "Unsupported type: '[]interface {}'",
    ),
    "1.7-delete-missing": ("DELETE", "/api/delete", {"model": "nope"}, 404, "json", "model 'nope' not found"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_the_server_answers_in_the_recorded_words(client: Client, case: str) -> None:
    """Status, content type and text of one request to an idle server."""
    method, path, body, status, content_type, text = ANSWERS[case]
    answer = client.call(method, path, body)
    assert answer.status_code == status
    if content_type == "json":
        assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
        assert answer.json() == {"error": text}
    else:
        assert (answer.headers["Content-Type"], answer.text) == (content_type, text)


class Watched(Exchange):
    """One that a weak reference can follow."""

    __slots__ = ("__weakref__",)


@pytest.mark.parametrize("path", ["/api/ps", "/api/tags", "/api/version", "/nowhere"])
@pytest.mark.parametrize("leaves", [False, True])
def test_what_was_answered_or_left_goes_at_once(world: SimulatedWorld, path: str, leaves: bool) -> None:
    """A day holds thousands of requests; one that knew itself would wait for the garbage collector."""
    gc.disable()
    try:
        exchange = Watched("GET", path)
        still_there = weakref.ref(exchange)
        world.ollama.submit(exchange)
        if leaves:
            exchange.leave()
        world.clock.sleep(1.0)
        assert exchange.closed
        del exchange
        assert still_there() is None
    finally:
        gc.enable()


def test_a_day_of_agent_life_is_watched_throughout() -> None:
    """The benchmark's day: a look every 15 s, and more at its switches."""
    assert bench_day.day() > 86_400 / 15


@pytest.mark.parametrize("host", ["localhost:11434", "127.0.0.1", "[::1]:11434", "10.0.0.5", "box.local", "x.internal"])
def test_1_1_a_local_host_header_passes(world: SimulatedWorld, host: str) -> None:
    """Loopback, private addresses and local names."""
    assert _with_host(world, host).status == 200


@pytest.mark.parametrize("host", ["evil.example", "8.8.8.8", "localhost.evil.example"])
def test_1_1_a_foreign_host_header_is_an_empty_403(world: SimulatedWorld, host: str) -> None:
    """The guard against DNS rebinding."""
    exchange = _with_host(world, host)
    assert (exchange.status, list(exchange.chunks), "Content-Type" in exchange.headers) == (403, [], False)


def _with_host(world: SimulatedWorld, host: str) -> Exchange:
    exchange = Exchange("GET", "/api/ps", headers={"Host": host})
    world.ollama.submit(exchange)
    world.clock.advance(1)
    return exchange


def test_1_2_a_load_answers_one_object_with_the_name_as_sent(client: Client, world: SimulatedWorld) -> None:
    """Whatever `stream` says; `done_reason` is load; no durations."""
    answer = client.post(model="LLaVA", stream=True)
    body = answer.json()
    assert re.fullmatch(r"2026-01-01T00:00:02(\.\d{1,9})?Z", body.pop("created_at"))
    assert body == {"model": "LLaVA", "response": "", "done": True, "done_reason": "load"}
    assert client.post("/api/chat", model="llava").json()["message"] == {"role": "assistant", "content": ""}
    assert world.ollama.counts["loads"] == 1


def test_1_2_an_embedding_model_is_not_loaded_by_generate(world: SimulatedWorld, client: Client) -> None:
    """It answers 400 to generate and chat, and loads through embed."""
    world.ollama.add_model(SimulatedModel(name="embed", size_mib=100, capabilities=("embedding",)))
    assert client.load("embed").json() == {"error": '"embed" does not support generate'}
    assert client.post("/api/chat", model="embed").json() == {"error": '"embed" does not support chat'}
    assert client.post("/api/embed", model="embed").json() == {"model": "embed", "embeddings": []}
    assert client.names() == ["embed:latest"]
    assert len(client.post("/api/embed", model="embed", input=["a", "b"]).json()["embeddings"]) == 2
    assert client.unload("embed").json()["done_reason"] == "unload"


def test_1_3_an_unload_of_a_cold_model_says_unload_and_loads_nothing(client: Client, world: SimulatedWorld) -> None:
    """It is idempotent."""
    assert client.unload().json()["done_reason"] == "unload"
    world.clock.advance(60)
    assert world.ollama.counts["loads"] == 0


def test_1_3_embed_with_keep_alive_0_loads_a_cold_model_and_drops_it(client: Client, world: SimulatedWorld) -> None:
    """`/api/embed` has no unload branch."""
    client.post("/api/embed", model="llava", keep_alive=0)
    assert world.ollama.counts["loads"] == 1
    world.clock.advance(1)
    assert client.names() == []


def test_1_3_a_prompt_with_keep_alive_0_is_answered_and_then_unloaded(client: Client, world: SimulatedWorld) -> None:
    """Generate, then unload."""
    answer = client.post(model="llava", prompt="hi", keep_alive=0, stream=False).json()
    assert (answer["done_reason"], answer["response"]) == ("stop", "ok")
    world.clock.advance(0.2)
    assert client.names() == []


def test_1_3_a_deleted_model_stays_resident_and_cannot_be_unloaded(client: Client, world: SimulatedWorld) -> None:
    """404 although it is listed."""
    client.load("llava")
    assert client.call("DELETE", "/api/delete", {"model": "llava"}).status_code == 200
    assert client.unload("llava").status_code == 404
    assert client.names() == ["llava:latest"]


KEEP_ALIVE: dict[str, tuple[Any, float | None]] = {
    "1.4-absent-is-the-default": (..., 300.0),
    "1.4-null-is-the-default": (None, 300.0),
    "1.4-number": (10, 10.0),
    "1.4-fraction": (10.5, 10.5),
    "1.4-duration": ("10s", 10.0),
    "1.4-compound-duration": ("1h30m", 5400.0),
    "1.4-fraction-of-an-hour": ("1.5h", 5400.0),
    "1.4-negative-number": (-1, math.inf),
    "1.4-negative-fraction": (-1.5, math.inf),
    "1.4-negative-duration": ("-1m", math.inf),
    "1.4-tiny-loads-then-expires": (0.0001, 0.0),
    "1.4-overflow-is-dropped-at-once": (1e10, 0.0),
    "1.4-absurd-is-dropped-at-once": (1e300, 0.0),
    "1.4-1e9-is-31-years": (1e9, 1e9),
    "1.4-zero": (0, None),
    "1.4-zero-float": (0.0, None),
    "1.4-zero-text": ("0", None),
    "1.4-zero-seconds": ("0s", None),
}


@pytest.mark.parametrize("case", KEEP_ALIVE)
def test_keep_alive_forms(client: Client, world: SimulatedWorld, case: str) -> None:
    """How long a freshly loaded model stays; None: the request was an unload."""
    value, stays_s = KEEP_ALIVE[case]
    answer = client.load("llava", **({} if value is ... else {"keep_alive": value}))
    assert answer.json()["done_reason"] == ("unload" if stays_s is None else "load")
    if stays_s is None or stays_s == 0:
        world.clock.advance(0.15)
        assert client.names() == []
        return
    world.clock.advance(min(stays_s, 1e7) - 1)
    (listed,) = client.ps()
    if stays_s == math.inf:
        assert listed["expires_at"].startswith("2318")
    elif stays_s < 1e7:
        world.clock.advance(2)
        assert client.names() == []


def test_1_2_an_omitted_keep_alive_keeps_the_value_and_re_arms_the_timer(client: Client, world: SimulatedWorld) -> None:
    """Not reset to five minutes."""
    client.load("llava", keep_alive=100)
    world.clock.advance(90)
    client.load("llava")
    world.clock.advance(90)
    assert client.names() == ["llava:latest"]
    world.clock.advance(20)
    assert client.names() == []


def test_1_6_the_listing_has_the_recorded_shape(client: Client, world: SimulatedWorld) -> None:
    """Sizes in bytes, the digest of `/api/tags` without a prefix, name twice."""
    client.load(keep_alive=600)
    (listed,) = client.ps()
    assert list(listed) == ["name", "model", "size", "digest", "details", "expires_at", "size_vram", "context_length"]
    assert listed["name"] == listed["model"] == VLM
    assert listed["size"] == listed["size_vram"] == 5000 * 1024 * 1024
    tags = {tag["name"]: tag for tag in client.call("GET", "/api/tags").json()["models"]}
    assert listed["digest"] == tags[VLM]["digest"]
    assert re.fullmatch(r"[0-9a-f]{64}", listed["digest"])
    assert set(tags) == {VLM, "llava:latest", "moondream:v2"}


def test_1_6_a_loading_model_is_invisible(client: Client, world: SimulatedWorld) -> None:
    """0.32 lists a model only after its load completed."""
    world.ollama.foreign_load(VLM)
    world.clock.advance(3.9)
    assert (client.names(), world.ollama.loading()) == ([], VLM)
    world.clock.advance(0.2)
    assert client.names() == [VLM]


def test_1_6_in_0_24_a_loading_model_is_listed_and_an_unload_waits_for_it() -> None:
    """Presence is not readiness there; the unload that met the listed load works."""
    world = SimulatedWorld(version="0.24")
    client = Client(world)
    world.ollama.foreign_load(VLM)
    world.clock.advance(2)
    assert client.names() == [VLM]
    assert world.vlm_resident() is False
    before = world.clock.monotonic()
    assert client.unload().json()["done_reason"] == "unload"
    assert world.clock.monotonic() - before > 1.9
    world.clock.advance(0.5)
    assert client.names() == []


def test_1_6_the_expiry_of_a_busy_model_lies_in_the_past(client: Client, world: SimulatedWorld) -> None:
    """It is updated when the runner goes idle, so a past expiry means busy or going."""
    world.ollama.generate_s = 60
    client.load("llava", keep_alive=10)
    world.ollama.foreign_generate("llava")
    world.clock.advance(30)
    (listed,) = client.ps()
    assert listed["expires_at"] < "2026-01-01T00:00:30"


# --- Ollama: the scheduler --------------------------------------------------------------------------------------------


def test_3_eight_loads_of_one_model_are_one_runner(world: SimulatedWorld) -> None:
    """All are answered together."""
    loads = [world.ollama.foreign_load(VLM) for _ in range(8)]
    world.clock.advance(4.1)
    assert [load.status for load in loads] == [200] * 8
    assert world.ollama.counts["loads"] == 1
    assert world.card.used_mib == 5300


def test_3_one_load_at_a_time(world: SimulatedWorld) -> None:
    """The second waits for the first; a loaded model answers meanwhile."""
    world.ollama.foreign_load("llava")
    world.clock.advance(2.1)
    big, small = world.ollama.foreign_load(VLM), world.ollama.foreign_load("moondream:v2")
    world.clock.advance(1)
    quick = world.ollama.foreign_generate("llava")
    world.clock.advance(1)
    assert (quick.status, big.status, small.status) == (200, None, None)
    world.clock.advance(2.1)
    assert (big.status, small.status) == (200, None)
    world.clock.advance(2.1)
    assert small.status == 200


def test_3_memory_is_taken_in_the_course_of_a_load(world: SimulatedWorld) -> None:
    """Not all at its end."""
    world.ollama.foreign_load(VLM)
    world.clock.advance(2.01)
    assert world.card.used_mib == 300 + 2500


def test_3_an_unload_sent_during_the_load_is_lost(client: Client, world: SimulatedWorld) -> None:
    """200 unload, and the model stays with the load's keep_alive."""
    world.ollama.foreign_load(VLM, keep_alive=-1)
    world.clock.advance(1)
    assert client.unload().json()["done_reason"] == "unload"
    world.clock.advance(1000)
    assert client.names() == [VLM]


def test_3_an_unload_is_acknowledged_before_it_happens(client: Client, world: SimulatedWorld) -> None:
    """Right after the answer the model is still listed, then a listing waits for the exit, then memory is late."""
    client.load()
    client.unload()
    assert client.names() == [VLM]
    world.clock.advance(0.005)
    before = world.clock.monotonic()
    assert client.names() == []
    assert world.clock.monotonic() - before > 0.05
    assert world.card.used_mib == 5300
    world.clock.advance(0.3)
    assert world.card.used_mib == 300


def test_3_a_busy_model_goes_when_its_last_request_ends(client: Client, world: SimulatedWorld) -> None:
    """The request is answered whole."""
    client.load()
    work = world.ollama.foreign_generate(VLM)
    world.clock.advance(0.1)
    client.unload()
    assert client.names() == [VLM]
    world.clock.advance(1)
    assert (work.status, client.names()) == (200, [])


def test_3_a_later_keep_alive_cancels_a_pending_unload(client: Client, world: SimulatedWorld) -> None:
    """While the model is busy and marked for going."""
    client.load()
    world.ollama.foreign_generate(VLM)
    world.clock.advance(0.1)
    client.unload()
    world.ollama.foreign_load(VLM, keep_alive=60)
    world.clock.advance(10)
    assert client.names() == [VLM]


def test_3_a_client_that_leaves_kills_its_load(client: Client, world: SimulatedWorld) -> None:
    """Within one poll of 250 ms; nothing is listed, the memory comes back."""
    with pytest.raises(requests.exceptions.ReadTimeout):
        client.post(model=VLM, timeout=1.1)
    assert client.adapter.expired
    assert world.card.used_mib > 300
    world.clock.advance(1)
    assert (world.card.used_mib, client.names(), world.ollama.counts["load_aborts"]) == (300, [], 1)
    assert world.ollama.log[0].status == 499


def test_3_the_next_waiter_begins_the_load_again(client: Client, world: SimulatedWorld) -> None:
    """It starts from zero."""
    world.clock.after(0.5, lambda: waiting.append(world.ollama.foreign_load(VLM)))
    waiting: list[Exchange] = []
    with pytest.raises(requests.exceptions.ReadTimeout):
        client.post(model=VLM, timeout=2.0)
    world.clock.advance(4.0)
    assert waiting[0].status is None
    world.clock.advance(1.5)
    assert waiting[0].status == 200


def test_3_a_cancelled_request_in_the_queue_loads_nothing(client: Client, world: SimulatedWorld) -> None:
    """It is skipped."""
    world.ollama.foreign_load(VLM)
    world.clock.advance(0.1)
    with pytest.raises(requests.exceptions.ReadTimeout):
        client.post(model="llava", timeout=1.0)
    world.clock.advance(20)
    assert client.names() == [VLM]


def test_3_an_abort_from_elsewhere_ends_the_load(client: Client, world: SimulatedWorld) -> None:
    """`abort()` closes the socket: a connection error here, a killed load there, and no later use."""
    world.clock.after(1.0, client.adapter.abort)
    with pytest.raises(requests.exceptions.ConnectionError):
        client.load()
    assert world.clock.monotonic() == 1.0
    world.clock.advance(1)
    assert world.ollama.counts == {"load_aborts": 1}
    with pytest.raises(requests.exceptions.ConnectionError):
        client.ps()


def test_3_a_dead_runner_stays_listed_and_the_next_load_revives_it(client: Client, world: SimulatedWorld) -> None:
    """`/api/ps` is no sign of life."""
    client.load(keep_alive=-1)
    assert world.ollama.kill_runner()
    world.clock.advance(3)
    assert (client.names(), world.card.used_mib, world.vlm_resident()) == ([VLM], 300, False)
    assert client.load().status_code == 200
    assert (world.vlm_resident(), world.card.used_mib) == (True, 5300)


def test_3_a_frozen_runner_takes_20_s_to_find_out_and_then_loads_anew(client: Client, world: SimulatedWorld) -> None:
    """The next load waits for two pings; ps blocks for as long; an unload of it works at once."""
    client.load()
    assert world.ollama.freeze_runner(VLM)
    load = world.ollama.foreign_load(VLM)
    world.clock.advance(1)
    asked = world.clock.monotonic()
    assert client.names() == []
    assert world.clock.monotonic() - asked == pytest.approx(19, abs=0.5)
    world.clock.advance(6)
    assert (load.status, client.names(), world.ollama.counts["loads"]) == (200, [VLM], 2)
    assert world.ollama.freeze_runner(VLM)
    client.unload()
    world.clock.advance(1)
    assert (client.names(), world.card.used_mib) == ([], 300)
    assert not world.ollama.freeze_runner(VLM)


def test_3_what_runs_on_a_frozen_runner_holds_up_its_unload_until_the_client_leaves(
    client: Client, world: SimulatedWorld
) -> None:
    """There is no time limit on the server's side."""
    client.load()
    busy = world.ollama.foreign_generate(VLM)
    world.clock.advance(0.1)
    world.ollama.freeze_runner(VLM)
    client.unload()
    world.clock.advance(1000)
    assert (client.names(), busy.closed) == ([VLM], False)
    with world.clock.turn:
        busy.leave()
    world.clock.advance(1)
    assert client.names() == []


@pytest.mark.parametrize("stream", [False, True])
def test_1_8_a_runner_killed_before_the_first_byte_is_a_500(
    client: Client, world: SimulatedWorld, stream: bool
) -> None:
    """With the recorded text."""
    client.load()
    world.ollama.generate_s = 5
    if not stream:
        world.clock.after(1.0, world.ollama.kill_runner)
        answer = client.post(model=VLM, prompt="x", stream=False)
        assert answer.status_code == 500
    else:
        busy = world.ollama.foreign_generate(VLM)
        world.clock.after(1.0, world.ollama.kill_runner)
        answer = client.post(model=VLM, prompt="x")
        assert (answer.status_code, busy.status) == (500, 500)
    assert answer.json() == {"error": "an error was encountered while running the model: unexpected EOF"}


def test_1_8_a_runner_killed_in_a_stream_is_an_error_line_in_a_200(client: Client, world: SimulatedWorld) -> None:
    """The status cannot be changed any more."""
    world.ollama.responder = lambda *_: "one two three four five six"
    client.load()
    world.clock.after(0.2, world.ollama.kill_runner)
    answer = client.post(model=VLM, prompt="x")
    lines = [json.loads(line) for line in answer.iter_lines()]
    assert answer.status_code == 200
    assert lines[-1] == {"error": "an error was encountered while running the model: unexpected EOF"}
    assert not any(line.get("done") for line in lines)


def test_1_8_a_runner_killed_while_loading_is_a_500(client: Client, world: SimulatedWorld) -> None:
    """And nothing is listed."""
    world.clock.after(1.0, world.ollama.kill_runner)
    answer = client.load()
    assert (answer.status_code, answer.json()) == (
        500,
        {"error": "llama-server process has terminated: signal: killed"},
    )
    assert client.names() == []


def test_3_a_load_evicts_the_idle_model_with_the_shortest_keep_alive() -> None:
    """And no more than it must."""
    world = SimulatedWorld(models={"a": 1500, "b": 1500})
    client = Client(world)
    client.load("a", keep_alive=-1)
    client.load("b", keep_alive=100)
    assert client.load().status_code == 200
    assert client.names() == ["a:latest", VLM]
    assert world.ollama.counts["evictions"] == 1


def test_3_a_model_pinned_for_ever_is_evicted(world: SimulatedWorld, client: Client) -> None:
    """keep_alive -1 is not a pin."""
    client.load(keep_alive=-1)
    world.ollama.add_model(SimulatedModel(name="big", size_mib=6000))
    assert client.load("big").status_code == 200
    assert client.names() == ["big:latest"]


def test_3_a_second_model_stays_beside_only_within_80_percent_of_the_free_memory() -> None:
    """5000 + 300 of 8192 used: 2892 are free, 2313 of them for a neighbour."""
    for size, stays in ((2300, True), (2330, False)):
        world = SimulatedWorld(models={"second": size})
        client = Client(world)
        client.load()
        client.load("second")
        assert (VLM in client.names()) is stays


def test_3_eviction_waits_for_a_busy_victim(world: SimulatedWorld, client: Client) -> None:
    """The running request is answered first."""
    client.load()
    world.ollama.generate_s = 3
    busy = world.ollama.foreign_generate(VLM)
    world.ollama.add_model(SimulatedModel(name="big", size_mib=6000, load_s=1))
    assert client.load("big").status_code == 200
    assert busy.status == 200
    assert world.ollama.counts["evictions"] == 1


def test_3_a_load_that_fails_for_memory_evicts_the_others_all_the_same(world: SimulatedWorld, client: Client) -> None:
    """And they do not come back."""
    client.load("llava")
    answer = client.load(options={"num_gpu": 99, "num_ctx": 131072})
    assert answer.status_code == 500
    assert "cudaMalloc failed: out of memory" in answer.json()["error"]
    assert client.names() == []


def test_3_the_next_load_waits_for_memory_to_come_back_but_no_longer_than_5_s() -> None:
    """Then it carries on regardless, with what there is."""
    world = SimulatedWorld(reclaim_s=60, models={"big": 6000})
    client = Client(world)
    client.load()
    before = world.clock.monotonic()
    answer = client.load("big")
    assert answer.status_code == 200
    assert 5.0 <= world.clock.monotonic() - before - 2.0 <= 5.5
    (listed,) = client.ps()
    assert 0 < listed["size_vram"] < listed["size"]


@pytest.mark.parametrize(
    ("first", "second", "reloads"),
    [
        pytest.param({}, {}, 0, id="1.2-same"),
        pytest.param({}, {"num_ctx": 1024}, 1, id="3-other-context"),
        pytest.param({"num_ctx": 1024}, {}, 1, id="3-back-to-the-default"),
        pytest.param({}, {"num_ctx": 4096}, 0, id="3-the-default-named"),
        pytest.param({"num_ctx": 131072}, {"num_ctx": 999999}, 0, id="3-clipped-to-the-trained-context"),
        pytest.param({}, {"num_gpu": 99}, 1, id="3-none-to-99"),
        pytest.param({"num_gpu": 99}, {}, 0, id="3-99-to-none"),
        pytest.param({"num_gpu": 99}, {"num_gpu": -1}, 0, id="3-99-to-do-not-care"),
        pytest.param({"num_gpu": 0}, {}, 0, id="3-cpu-stays-cpu"),
        pytest.param({}, {"temperature": 0.9, "seed": 5, "nonsense": 1}, 0, id="3-sampling-options"),
        pytest.param({"num_batch": 512}, {"num_batch": 256}, 1, id="3-batch"),
    ],
)
def test_which_options_reload_a_model(
    world: SimulatedWorld, client: Client, first: dict[str, Any], second: dict[str, Any], reloads: int
) -> None:
    """Other runner options are another runner."""
    client.load("moondream:v2", options=first, keep_alive=-1)
    client.load("moondream:v2", options=second)
    assert world.ollama.counts["reloads"] == reloads
    assert client.names() == ["moondream:v2"]


def test_3_a_reload_waits_for_running_requests(world: SimulatedWorld, client: Client) -> None:
    """They are answered by the runner they began on."""
    client.load("llava")
    busy = world.ollama.foreign_generate("llava")
    before = world.clock.monotonic()
    client.load("llava", options={"num_ctx": 1024})
    assert (busy.status, world.ollama.counts["reloads"]) == (200, 1)
    assert world.clock.monotonic() - before > 0.5 + 2.0


def test_1_8_a_full_queue_is_503(world: SimulatedWorld, client: Client) -> None:
    """With the two spaces in its text; requests to a loaded model pass."""
    world.ollama.max_queue = 3
    client.load("llava")
    for _ in range(5):
        world.ollama.foreign_load(VLM)
    world.clock.advance(0.5)
    full = client.load("moondream:v2")
    assert full.status_code == 503
    assert full.json() == {"error": "server busy, please try again.  maximum pending requests exceeded"}
    assert client.load("llava").status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "llava",
        "llava:latest",
        "LLaVA",
        "registry.ollama.ai/library/llava",
        "library/llava",
        "http://registry.ollama.ai/library/llava",
    ],
)
def test_4_a_name_has_many_spellings_and_one_listing(client: Client, world: SimulatedWorld, name: str) -> None:
    """The short form, with the tag, in the stored case."""
    assert client.load(name).status_code == 200
    assert client.names() == ["llava:latest"]


@pytest.mark.parametrize("name", ["", ":x", "llava:", "a b", "qwen2.5vl:7b@sha256:abc", "a/b/c/d"])
def test_4_what_cannot_be_a_name_is_refused(client: Client, name: str) -> None:
    """400, or 404 for the empty one."""
    assert client.load(name).status_code == (400 if name else 404)


@pytest.mark.parametrize("name", ["user/llava", "hf.co/user/Repo-GGUF:Q4_K_M", "localhost:5000/me/llava:latest"])
def test_4_a_host_or_namespace_that_is_not_the_default_is_shown(world: SimulatedWorld, name: str) -> None:
    """Only the default ones are left out."""
    model = world.ollama.add_model(SimulatedModel(name=name, size_mib=10))
    assert model.name == (name if ":" in name.rpartition("/")[2] else f"{name}:latest")


def test_3_two_names_of_one_blob_share_a_runner(world: SimulatedWorld, client: Client) -> None:
    """The listing keeps the first name, and an unload by the other works."""
    world.ollama.add_model(SimulatedModel(name="alias", size_mib=1000, blob=world.ollama.models["llava:latest"].blob))
    client.load("llava")
    client.load("alias")
    assert (client.names(), world.ollama.counts["loads"]) == (["llava:latest"], 1)
    client.unload("alias")
    world.clock.advance(0.2)
    assert client.names() == []


def test_5_a_load_without_room_is_partial_and_silent(world: SimulatedWorld, client: Client) -> None:
    """200, and only `size_vram` tells."""
    world.card.take("game", 4892)
    assert client.load().json()["done_reason"] == "load"
    (listed,) = client.ps()
    assert (listed["size_vram"], listed["size"]) == (3000 * 2**20, 5000 * 2**20)


def test_5_all_layers_demanded_without_room_is_out_of_memory(world: SimulatedWorld, client: Client) -> None:
    """A large num_gpu turns the silent slowdown into a 500."""
    world.card.take("game", 4892)
    answer = client.load(options={"num_gpu": 99})
    assert (answer.status_code, client.names()) == (500, [])
    world.clock.advance(1)
    assert world.card.used_mib == 5192


def test_5_num_gpu_0_and_a_machine_without_a_card_run_on_the_cpu(world: SimulatedWorld, client: Client) -> None:
    """`size_vram` is 0 and the card is untouched."""
    client.load(options={"num_gpu": 0})
    assert (client.ps()[0]["size_vram"], world.card.used_mib) == (0, 300)
    bare = SimulatedWorld(gpu=False)
    Client(bare).load()
    assert (Client(bare).ps()[0]["size_vram"], bare.card.used_mib) == (0, 300)
    assert not bare.probe.read(1).present


def test_memory_taken_by_others_in_the_middle_of_a_load_is_an_oom(world: SimulatedWorld, client: Client) -> None:
    """The room was there when the load began; the ledger never goes over."""
    world.clock.after(2.0, lambda: world.card.take("game", 4000))
    answer = client.load()
    assert answer.status_code == 500
    assert "out of memory" in answer.json()["error"]
    world.clock.advance(1)
    assert (world.card.used_mib, max(c.used_mib for c in world.card.history) <= 8192) == (4300, True)


def test_3_a_stopped_server_refuses_and_a_started_one_has_nothing_loaded(world: SimulatedWorld, client: Client) -> None:
    """In-flight requests break, runners die, memory comes back."""
    client.load("llava")
    world.clock.after(1.0, world.ollama.stop)
    with pytest.raises(requests.exceptions.ConnectionError):
        client.load()
    with pytest.raises(requests.exceptions.ConnectionError) as refused:
        client.ps()
    assert isinstance(refused.value.args[0], ConnectionRefusedError)
    assert world.ollama.foreign_load(VLM).broken
    world.clock.advance(1)
    assert world.card.used_mib == 300
    world.ollama.start()
    assert client.names() == []


def test_3_a_killed_server_leaves_orphans_that_hold_memory(world: SimulatedWorld, client: Client) -> None:
    """An empty listing does not mean free memory."""
    client.load()
    world.ollama.stop(kill=True)
    world.ollama.start()
    world.clock.advance(60)
    assert (client.names(), world.card.used_mib) == ([], 5300)
    assert [holder.name for holder in world.probe.holders() or ()] == ["llama-server"]
    world.ollama.reap_orphans()
    world.clock.advance(1)
    assert world.card.used_mib == 300


def test_1_1_a_starting_server_accepts_and_does_not_answer(world: SimulatedWorld, client: Client) -> None:
    """Connected but silent is starting."""
    world.ollama.stop()
    world.ollama.start(starting_s=1.5)
    with pytest.raises(requests.exceptions.ReadTimeout):
        client.call("GET", "/api/version", timeout=1.0)
    assert client.call("GET", "/api/version", timeout=1.0).status_code == 200


def test_a_server_behind_a_dead_network_is_a_connect_timeout(world: SimulatedWorld, client: Client) -> None:
    """Packets vanish; the call ends when its time is over."""
    world.ollama.unreachable = True
    with pytest.raises(requests.exceptions.ConnectTimeout):
        client.call("GET", "/api/ps", timeout=3.0)
    assert (world.clock.monotonic(), client.adapter.expired) == (3.0, True)


def test_a_stream_comes_in_parts_and_adds_up(world: SimulatedWorld, client: Client) -> None:
    """Newline-delimited JSON; only the last object is done, with tokens and durations."""
    world.ollama.responder = lambda model, prompt, images: f"{prompt} seen in {len(images)} image"
    answer = client.post(
        "/api/chat", model=VLM, messages=[{"role": "user", "content": "a button", "images": ["aGVsbG8="]}]
    )
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.iter_lines()]
    assert "".join(line["message"]["content"] for line in lines) == "a button seen in 1 image"
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert len(lines) > 3
    assert lines[-1]["done_reason"] == "stop"
    assert lines[-1]["total_duration"] == pytest.approx(4.5e9, rel=0.01)
    assert lines[-1]["load_duration"] == pytest.approx(4.0e9, rel=0.01)


def test_a_closed_stream_frees_the_runner(world: SimulatedWorld, client: Client) -> None:
    """The server stops working for a client that has left."""
    world.ollama.generate_s = 100
    client.load()
    answer = client.post(model=VLM, prompt="x")
    assert world.ollama.running() == 1
    answer.close()
    assert world.ollama.running() == 0
    assert world.ollama.log[-1].outcome == "client left"


@pytest.mark.parametrize("how", ["abort", "timeout"])
def test_a_stream_that_is_given_up_in_the_middle_frees_the_runner(
    world: SimulatedWorld, client: Client, how: str
) -> None:
    """By `abort()` from elsewhere or by the time-out of the whole call; the reader gets a connection error."""
    world.ollama.generate_s = 100
    world.ollama.responder = lambda *_: "one two three"
    client.load()
    began = world.clock.monotonic()
    answer = client.post(model=VLM, prompt="x", timeout=50.0 if how == "timeout" else 600.0)
    if how == "abort":
        world.clock.after(50, client.adapter.abort)
    with pytest.raises(requests.RequestException):
        _ = answer.content
    assert world.clock.monotonic() - began == pytest.approx(50, abs=0.01)
    assert world.ollama.running() == 0
    assert client.adapter.expired is (how == "timeout")


def test_threads_share_the_world_without_harm(world: SimulatedWorld) -> None:
    """Eight threads load, ask, unload and look, all in one virtual time: every call ends, the ledger holds."""
    failures: list[object] = []

    def live(number: int) -> None:
        client = Client(world, f"thread {number}")
        for turn in range(25):
            name = (VLM, "llava", "moondream:v2")[(number + turn) % 3]
            try:
                client.load(name)
                client.post(model=name, prompt="x", stream=False).json()
                client.ps()
                client.unload(name)
            except Exception as problem:  # any kind is a failure here
                failures.append(problem)

    threads = [threading.Thread(target=live, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    world.clock.advance(400)
    assert world.card.owners() == {"driver": 300}
    assert len(world.ollama.log) == 8 * 25 * 4
    assert all(change.used_mib <= 8192 for change in world.card.history)


def test_3_one_runner_answers_one_prompt_after_the_other(world: SimulatedWorld, client: Client) -> None:
    """OLLAMA_NUM_PARALLEL is 1."""
    client.load()
    work = [world.ollama.foreign_generate(VLM) for _ in range(3)]
    world.clock.advance(0.6)
    assert [w.status for w in work] == [200, None, None]
    world.clock.advance(1.0)
    assert [w.status for w in work] == [200] * 3


def test_1_8_an_image_for_a_text_model_is_a_nested_error(world: SimulatedWorld, client: Client) -> None:
    """JSON inside the error's string, after the load."""
    world.ollama.add_model(SimulatedModel(name="text", size_mib=10, capabilities=("completion",)))
    answer = client.post(model="text", prompt="x", images=["aGVsbG8="], stream=False)
    assert answer.status_code == 400
    inner = json.loads(answer.json()["error"])
    assert inner["error"]["message"] == "Multimodal data provided, but model does not support multimodal requests."


def test_the_log_holds_every_request(world: SimulatedWorld, client: Client) -> None:
    """Who, when, what, how it ended."""
    client.load()
    client.ps()
    client.load("nope")
    world.ollama.foreign_unload(VLM)
    world.clock.advance(1)
    assert [(e.client, e.op, e.path, e.status, e.outcome) for e in world.ollama.log] == [
        ("us", "ollama.load", "/api/generate", 200, "ok"),
        ("us", "ollama.ps", "/api/ps", 200, "ok"),
        ("us", "ollama.load", "/api/generate", 404, "HTTP 404"),
        ("foreign", "ollama.unload", "/api/generate", 200, "ok"),
    ]
    first = world.ollama.log[0]
    assert first.body == {"model": VLM, "stream": False}
    assert first.at == 0.001
    assert first.ended_at == pytest.approx(4.001)


# --- faults -----------------------------------------------------------------------------------------------------------


def _do(world: SimulatedWorld, op: str) -> Any:
    """Carry out an operation; returns what came, or the exception."""
    client = Client(world)
    acts: dict[str, Callable[[], Any]] = {
        "ollama.load": lambda: client.post(model="llava", timeout=30.0).status_code,
        "ollama.renew": lambda: client.post(model=VLM, keep_alive=600, timeout=30.0).status_code,
        "ollama.unload": lambda: client.unload().status_code,
        "ollama.generate": lambda: client.post(model=VLM, prompt="x", stream=False, timeout=30.0).json(),
        "ollama.ps": lambda: client.call("GET", "/api/ps", timeout=2.0).json(),
        "ollama.tags": lambda: client.call("GET", "/api/tags", timeout=2.0).json(),
        "ollama.show": lambda: client.call("POST", "/api/show", {"model": VLM}, timeout=2.0).json(),
        "ollama.version": lambda: client.call("GET", "/api/version", timeout=2.0).json(),
        "ollama.other": lambda: client.call("GET", "/api/status", timeout=2.0).json(),
        "clip.to_gpu": world.clip.to_gpu,
        "clip.to_cpu": world.clip.to_cpu,
        "clip.encode": lambda: world.clip.encode(["x"]).tolist(),
        "probe.read": lambda: world.probe.read(2.0),
    }
    try:
        return acts[op]()
    except (requests.exceptions.RequestException, GPUFSMError, ValueError) as problem:
        return problem


@pytest.mark.parametrize(("op", "kind"), [(op, kind) for op in KINDS for kind in sorted(KINDS[op])])
def test_every_fault_fires_once_and_heals(op: str, kind: str) -> None:
    """Armed once it fires once, is counted, and after `heal` the operation works as if nothing had been."""
    world = SimulatedWorld(models={"llava": 1000})
    Client(world).load(keep_alive=-1)
    if op == "clip.to_cpu":
        world.clip.to_gpu()
    world.faults.arm(op, kind)
    _do(world, op)
    assert world.faults.fired == {(op, kind): 1}
    assert world.faults.armed == []
    world.faults.heal()
    world.clip.poisoned = ""
    world.clock.advance(10)
    Client(world).load(keep_alive=-1)
    assert not isinstance(_do(world, op), Exception)
    assert world.faults.fired.total() == 1


def test_a_fault_is_refused_where_it_makes_no_sense() -> None:
    """With the list of what the operation knows."""
    with pytest.raises(ValueError, match=r"'probe.read' has no fault 'oom'; known: after, before, gpu_lost"):
        Faults().arm("probe.read", "oom")
    with pytest.raises(ValueError, match=r"operations: ollama\.load"):
        Faults().arm("ollama.lode", "oom")


def test_faults_can_skip_repeat_and_be_disarmed() -> None:
    """`skip` good calls first, `times` bad ones, None for all until `heal`."""
    faults = Faults()
    faults.arm("ollama.ps", "hang", 2, skip=1)
    kinds = [fault.kind if (fault := faults.take("ollama.ps")) else None for _ in range(4)]
    assert kinds == [None, "hang", "hang", None]
    faults.arm("ollama.ps", "before", None)
    assert all(faults.take("ollama.ps") for _ in range(50))
    faults.disarm("ollama.ps")
    assert faults.take("ollama.ps") is None
    faults.arm("ollama.ps", "before", None, rate=0.3)
    assert 10 < sum(faults.take("ollama.ps") is not None for _ in range(100)) < 50


def test_a_fault_before_a_load_has_no_effect_and_one_after_it_has(world: SimulatedWorld, client: Client) -> None:
    """The client sees the same broken connection."""
    world.faults.arm("ollama.load", "before")
    with pytest.raises(requests.exceptions.ConnectionError):
        client.load()
    world.clock.advance(10)
    assert not world.vlm_resident()
    world.faults.arm("ollama.load", "after")
    with pytest.raises(requests.exceptions.ConnectionError):
        client.load()
    assert world.vlm_resident()


def test_a_silent_load_and_a_silent_unload_only_say_so(world: SimulatedWorld, client: Client) -> None:
    """200 with the right words, and the world as before."""
    world.faults.arm("ollama.load", "silent")
    assert client.load().json()["done_reason"] == "load"
    assert client.names() == []
    client.load()
    world.faults.arm("ollama.unload", "silent")
    assert client.unload().json()["done_reason"] == "unload"
    world.clock.advance(10)
    assert client.names() == [VLM]


def test_a_late_unload_is_acknowledged_at_once_and_happens_later(world: SimulatedWorld, client: Client) -> None:
    """Sending it again does not hurry it."""
    client.load()
    world.faults.arm("ollama.unload", "late", delay_s=5)
    client.unload()
    world.clock.advance(2)
    client.unload()
    world.clock.advance(2)
    assert client.names() == [VLM]
    world.clock.advance(2)
    assert client.names() == []


def test_a_late_answer_is_late(world: SimulatedWorld, client: Client) -> None:
    """By `delay_s`."""
    world.faults.arm("ollama.ps", "late", delay_s=1.5)
    client.ps()
    assert world.clock.monotonic() == pytest.approx(1.501)


def test_a_hanging_load_goes_on_when_the_world_heals(world: SimulatedWorld, client: Client) -> None:
    """While it hangs everything else answers."""
    world.faults.arm("ollama.load", "hang")
    hanging = world.ollama.foreign_load(VLM)
    world.clock.advance(1000)
    assert (hanging.status, client.names()) == (None, [])
    world.faults.heal()
    world.clock.advance(5)
    assert (hanging.status, client.names()) == (200, [VLM])


def test_a_load_out_of_memory_evicts_and_gives_its_memory_back(world: SimulatedWorld, client: Client) -> None:
    """As section 3 says of a failed load."""
    client.load("llava")
    world.faults.arm("ollama.load", "oom")
    assert client.load().status_code == 500
    world.clock.advance(5)
    assert (client.names(), world.card.used_mib, world.ollama.counts["load_failures"]) == ([], 300, 1)


def test_a_partial_load_takes_its_share(world: SimulatedWorld, client: Client) -> None:
    """`share` of what it needs."""
    world.faults.arm("ollama.load", "partial", share=0.6)
    client.load()
    assert world.vlm_held_mib() == pytest.approx(3000)
    assert client.ps()[0]["size_vram"] == pytest.approx(3000 * 2**20)


def test_memory_that_never_comes_back_comes_back_when_healed(world: SimulatedWorld, client: Client) -> None:
    """The model is gone from the listing, the card stays full."""
    client.load()
    world.faults.arm("ollama.unload", "reclaim_never")
    client.unload()
    world.clock.advance(1000)
    assert (client.names(), world.card.used_mib, world.probe.holders()) == ([], 5300, ())
    world.faults.heal()
    world.clock.advance(1)
    assert world.card.used_mib == 300


def test_a_truncated_answer_fails_while_it_is_read(world: SimulatedWorld, client: Client) -> None:
    """The head is fine."""
    world.faults.arm("ollama.tags", "truncated")
    answer = client.call("GET", "/api/tags")
    assert answer.status_code == 200
    with pytest.raises(requests.exceptions.ChunkedEncodingError, match="IncompleteRead"):
        _ = answer.content


# --- CLIP and probe ---------------------------------------------------------------------------------------------------


def test_the_simulated_parts_are_what_the_ports_ask_for(world: SimulatedWorld) -> None:
    """Checked by the type checker as well, through these annotations."""
    clip: CLIPHost = world.clip
    probe: VRAMProbe = world.probe
    clock: Clock = world.clock
    assert clip.simulated
    assert probe.simulated
    assert isinstance(clock, Clock)
    assert set(world.ports("server")) == {"vlm_server", "clip_host", "vram_probe", "clock"}


def test_clip_pays_for_its_context_once_and_for_ever(world: SimulatedWorld) -> None:
    """The first move up costs more, a move down gives the weights back only."""
    clip = world.clip
    assert (clip.device, clip.needed_mib, clip.held_mib) == ("cpu", 800, 0)
    clip.to_gpu()
    assert (clip.device, clip.place, clip.held_mib, world.card.used_mib) == ("sim:0", "gpu", 600, 1100)
    clip.to_cpu()
    assert (clip.device, clip.needed_mib, world.card.used_mib) == ("cpu", 600, 500)


def test_clip_that_does_not_fit_stays_where_it_is(world: SimulatedWorld) -> None:
    """All or nothing."""
    world.card.take("game", 7300)
    with pytest.raises(ClipOutOfMemory):
        world.clip.to_gpu()
    assert (world.clip.place, world.card.held_mib("clip")) == ("cpu", 0)


def test_vectors_are_unit_and_the_same_on_both_sides(world: SimulatedWorld) -> None:
    """Of equal content; different content differs."""
    items = ["a", b"a", {"text": "a"}, "b"]
    low = world.clip.encode(items)
    world.clip.to_gpu()
    high = world.clip.encode(items)
    assert (low.shape, str(low.dtype)) == ((4, 32), "float32")
    assert (low == high).all()
    assert ((low**2).sum(axis=1)) == pytest.approx([1, 1, 1, 1])
    assert abs(float(low[0] @ low[3])) < 0.9
    assert world.clip.encode([]).shape == (0, 32)


def test_a_move_during_an_encode_is_recorded_as_the_crash_it_would_be(world: SimulatedWorld) -> None:
    """A real CLIP would crash or answer wrongly."""
    world.clip.on_encode.append(lambda items: world.clip.to_gpu())
    world.clip.encode(["x"])
    assert len(world.clip.violations) >= 1


def test_clip_faults_fail_before_or_after_the_move(world: SimulatedWorld) -> None:
    """`before` leaves it, `after` moves it and fails, `silent` says nothing and does nothing."""
    world.faults.arm("clip.to_gpu", "before")
    with pytest.raises(ClipError):
        world.clip.to_gpu()
    world.faults.arm("clip.to_gpu", "silent")
    world.clip.to_gpu()
    assert world.clip.device == "cpu"
    world.faults.arm("clip.to_gpu", "after")
    with pytest.raises(ClipError):
        world.clip.to_gpu()
    assert world.clip.device == "sim:0"


def test_a_lost_gpu_is_lost_for_the_process(world: SimulatedWorld) -> None:
    """CLIP falls back to its master on the CPU, the probe says lost."""
    world.clip.to_gpu()
    world.lose_gpu()
    info = world.probe.read(1)
    assert (info.lost, info.present, info.free_mib) == (True, False, None)
    with pytest.raises(CudaPoisoned):
        world.clip.encode(["x"])
    world.clip.to_cpu()
    world.clip.encode(["x"])
    assert not world.clip.gpu_usable


def test_a_world_without_clip_has_a_host_that_says_none() -> None:
    """And settings that manage none."""
    world = SimulatedWorld(clip=False)
    assert (world.clip.place, world.clip.device, world.clip.gpu_usable) == ("none", "none", False)
    assert world.config().clip_model is None


def test_the_probe_never_raises_and_never_invents(world: SimulatedWorld) -> None:
    """Unknown is None, a hang is unknown after the time-out, the rest is the ledger."""
    world.card.take("game", 1000)
    info = world.probe.read(1)
    assert (info.free_mib, info.total_mib, info.source, info.present) == (6892, 8192, "simulated", True)
    for kind in ("unknown", "before", "after"):
        world.faults.arm("probe.read", kind)
        assert world.probe.read(1).free_mib is None
    world.faults.arm("probe.read", "hang")
    before = world.clock.monotonic()
    assert world.probe.read(1.5).free_mib is None
    assert world.clock.monotonic() - before == pytest.approx(1.5)
    world.card.take("game", 1000)
    world.faults.arm("probe.read", "silent")
    assert world.probe.read(1).free_mib is None


# --- the world --------------------------------------------------------------------------------------------------------


def test_hooks_run_around_every_io_and_inside_a_load(world: SimulatedWorld, client: Client) -> None:
    """The place to post requests in the middle of steps."""
    seen: list[tuple[str, str]] = []
    world.on_io.append(lambda op, phase: seen.append((op, phase)))
    client.load()
    world.clip.encode(["x"])
    world.probe.read(1)
    assert seen == [
        ("ollama.load", "before"),
        *[("ollama.load", "during")] * 5,
        ("ollama.load", "after"),
        ("clip.encode", "before"),
        ("clip.encode", "after"),
        ("probe.read", "before"),
        ("probe.read", "after"),
    ]


def test_a_hook_may_act_on_the_world_in_the_middle_of_a_load(world: SimulatedWorld, client: Client) -> None:
    """Here it stops the server, calls it, and moves CLIP: nothing deadlocks, the ledger holds."""
    phases: list[str] = []

    def hook(op: str, phase: str) -> None:
        if op == "ollama.load" and phase == "during":
            phases.append(phase)
            if len(phases) == 2:
                world.clip.to_gpu()
                assert Client(world).names() == []
            if len(phases) == 3:
                world.ollama.stop()

    world.on_io.append(hook)
    with pytest.raises(requests.exceptions.ConnectionError):
        client.load()
    world.clock.advance(1)
    assert world.card.used_mib == 300 + 800


def test_the_settings_match_the_world(world: SimulatedWorld) -> None:
    """And can be overridden."""
    config = world.config(idle_timeout_s=7.0)
    assert (config.vlm_model, config.vlm_size_mib, config.idle_timeout_s) == (VLM, 5000, 7.0)


@given(
    st.lists(
        st.sampled_from(
            [
                "load",
                "other",
                "third",
                "unload",
                "generate",
                "ask",
                "kill",
                "stop",
                "start",
                "game",
                "free",
                "leave",
                "wait",
            ]
        ),
        max_size=40,
    ),
    st.booleans(),
)
def test_no_memory_is_lost_whatever_happens(steps: list[str], old: bool) -> None:
    """After any story, with everything unloaded and idle, the card holds what it held at first."""
    world = SimulatedWorld(models={"llava": 2500, "big": 7000}, version="0.24" if old else "0.32")
    open_ones: list[Exchange] = []
    for step in steps:
        if step in ("load", "other", "third"):
            name = {"load": VLM, "other": "llava", "third": "big"}[step]
            open_ones.append(world.ollama.foreign_load(name, keep_alive=-1))
        elif step == "unload":
            world.ollama.foreign_unload(VLM)
        elif step == "generate":
            open_ones.append(world.ollama.foreign_generate(VLM))
        elif step == "ask":
            open_ones.append(world.ollama.foreign_generate("llava", stream=True, options={"num_ctx": 1024}))
        elif step == "kill":
            world.ollama.kill_runner()
        elif step == "stop":
            world.ollama.stop()
        elif step == "start":
            world.ollama.start()
        elif step == "game" and world.card.free_mib > 3000:
            world.card.take("game", 3000)
        elif step == "free":
            world.card.give_back("game")
        elif step == "leave" and open_ones:
            open_ones.pop(0).leave()
        world.clock.advance(0.7)
    world.card.give_back("game")
    world.ollama.start()
    world.clock.advance(200)
    for name in (VLM, "llava", "big"):
        world.ollama.foreign_unload(name)
    world.clock.advance(20)
    assert world.card.owners() == {"driver": 300}
    assert all(exchange.closed for exchange in open_ones)
    assert world.ollama.loaded() == ()
    assert world.ollama.loading() is None
    assert all(change.used_mib <= 8192 for change in world.card.history)
    assert all(entry.outcome != "pending" for entry in world.ollama.log)


# --- on a socket ------------------------------------------------------------------------------------------------------


@pytest.fixture
def front() -> Iterator[OllamaHTTPServer]:
    """The simulated Ollama on loopback; its VLM loads in 50 ms, `slow` in 60 s."""
    clock = RunningClock()
    models = [
        SimulatedModel(name=VLM, size_mib=5000, load_s=0.05),
        SimulatedModel(name="slow", size_mib=2000, load_s=60),
    ]
    server = SimulatedOllama(
        models, clock=clock, card=SimulatedCard(8192, clock=clock), reclaim_s=0.01, unload_s=0.01, generate_s=0.02
    )
    with serve(server) as front:
        yield front
    clock.close()


@pytest.fixture
def http() -> Iterator[requests.Session]:
    """A session that heeds no proxy of the environment."""
    with requests.Session() as session:
        session.trust_env = False
        yield session


def test_the_server_on_a_socket_gives_the_same_answers(
    front: OllamaHTTPServer, http: requests.Session, world: SimulatedWorld
) -> None:
    """Every recorded word, over TCP."""
    front.server.add_model(SimulatedModel(name="llava", size_mib=10))
    for method, path, body, status, content_type, text in ANSWERS.values():
        answer = http.request(
            method, front.url + path, data=body if isinstance(body, bytes | None) else json.dumps(body), timeout=10
        )
        assert answer.status_code == status
        if content_type == "json":
            assert answer.json() == {"error": text}
        else:
            assert (answer.headers["Content-Type"], answer.text) == (content_type, text)


def test_a_load_and_an_unload_over_a_socket(front: OllamaHTTPServer, http: requests.Session) -> None:
    """The main road, in real time."""
    load = http.post(front.url + "/api/generate", json={"model": VLM, "keep_alive": 60}, timeout=10)
    assert load.json()["done_reason"] == "load"
    assert [m["name"] for m in http.get(front.url + "/api/ps", timeout=10).json()["models"]] == [VLM]
    with http.post(front.url + "/api/generate", json={"model": VLM, "prompt": "a"}, stream=True, timeout=10) as stream:
        assert stream.headers["Transfer-Encoding"] == "chunked"
        assert json.loads(list(stream.iter_lines())[-1])["done"] is True
    http.post(front.url + "/api/generate", json={"model": VLM, "keep_alive": 0}, timeout=10)
    assert eventually(lambda: http.get(front.url + "/api/ps", timeout=10).json() == {"models": []})
    assert eventually(lambda: front.server.card is not None and front.server.card.used_mib == 300)


def test_3_a_socket_closed_during_a_load_aborts_it(front: OllamaHTTPServer) -> None:
    """The server notices without being told."""
    body = b'{"model":"slow"}'
    with socket.create_connection((front.host, front.port), timeout=10) as connection:
        head = f"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection.sendall(head + body)
        assert eventually(lambda: front.server.loading() == "slow:latest")
    assert eventually(lambda: front.server.counts["load_aborts"] == 1)
    assert front.server.loading() is None


def test_a_read_timeout_of_a_real_client_aborts_the_load_too(front: OllamaHTTPServer, http: requests.Session) -> None:
    """A client that gives up first kills the load."""
    with pytest.raises(requests.exceptions.ReadTimeout):
        http.post(front.url + "/api/generate", json={"model": "slow"}, timeout=0.3)
    assert eventually(lambda: front.server.counts["load_aborts"] == 1)


@pytest.mark.parametrize("kind", ["before", "after", "truncated"])
def test_broken_connections_are_broken_on_a_socket_too(
    front: OllamaHTTPServer, http: requests.Session, kind: str
) -> None:
    """`requests` raises the kind of error that it raises without sockets."""
    front.server.faults.arm("ollama.tags", kind)
    expected = requests.exceptions.ChunkedEncodingError if kind == "truncated" else requests.exceptions.ConnectionError
    with pytest.raises(expected):
        _ = http.get(front.url + "/api/tags", timeout=10).content
    assert http.get(front.url + "/api/tags", timeout=10).status_code == 200


def test_run_server_says_its_url_and_ends_when_told() -> None:
    """In a thread, with a stop event."""
    lines: list[str] = []
    stop = threading.Event()
    codes: list[int] = []
    models = [SimulatedModel(name="tiny", size_mib=2, load_s=0.01)]
    thread = threading.Thread(target=lambda: codes.append(run_server(0, models, say=lines.append, stop=stop)))
    thread.start()
    assert eventually(lambda: bool(lines))
    found = re.search(r"http://127\.0\.0\.1:\d+", lines[0])
    assert found is not None
    with requests.Session() as session:
        session.trust_env = False
        answer = session.post(found[0] + "/api/generate", json={"model": "tiny"}, timeout=10)
        assert answer.json()["created_at"][:2] == "20"
    stop.set()
    thread.join(10)
    assert codes == [0]


def test_the_server_process_ends_on_sigterm_and_its_memory_is_back(tmp_path: Path) -> None:
    """As a child process on a shared card."""
    path = tmp_path / "card.db"
    card = SharedCard(path, 8192, clock=SimulatedClock(), driver_mib=300)
    code = (
        "import sys; from gpu_fsm.simulation import *; "
        "sys.exit(run_server(0, [SimulatedModel(name='tiny', size_mib=500, load_s=0.01)], card_path=sys.argv[1]))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with requests.Session() as session:
            session.trust_env = False
            assert session.post(url + "/api/generate", json={"model": "tiny"}, timeout=10).status_code == 200
        assert card.used_mib == 800
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert card.used_mib == 300


def test_an_unused_clip_never_touches_the_card() -> None:
    """The context is paid on the way up, not on being there."""
    world = SimulatedWorld()
    clip = SimulatedCLIP(clock=world.clock, card=world.card)
    clip.encode(["x"])
    clip.close()
    assert world.card.used_mib == 300
