"""The Ollama client: exact bytes over loopback where bytes matter, virtual time where only time does."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_fsm.errors import (
    BadArgument,
    ConfigError,
    LoadAborted,
    LoadFailed,
    LoadOutOfMemory,
    LoadTimeout,
    ManagerClosed,
    ModelNotFound,
    OllamaBusy,
    OllamaError,
    OllamaProtocolError,
    OllamaRequestRejected,
    OllamaTimeout,
    OllamaUnavailable,
)
from gpu_fsm.ollama import OllamaManager, SocketTransport, canonical_name
from gpu_fsm.ports import Interrupt, VLMServer
from gpu_fsm.status import Answer, Catalog, Residency
from tests.ollama_clients import (
    DIGEST,
    FINAL,
    LOADED,
    OTHER_DIGEST,
    PNG,
    Stopwatch,
    VirtualClock,
    Wire,
    ask,
    client,
    config,
    entry,
    hang,
    line,
    load,
    part,
    ps,
)
from tests.raw_server import RawServer, Visit, chunked, http, serving

pytestmark = pytest.mark.core


@pytest.fixture
def clock() -> VirtualClock:
    """Time that stands still."""
    return VirtualClock()


@pytest.fixture
def wire(clock: VirtualClock) -> Wire:
    """A server that has the model, loaded, and answers at once."""
    wire = Wire(clock)
    wire.say("/api/generate", LOADED)
    wire.say("/api/ps", ps(entry("tiny-a:latest")))
    wire.say("/api/tags", {"models": [entry("tiny-a:latest")]})
    wire.say("/api/version", {"version": "0.32.15"})
    wire.say("/api/show", {"license": ""})
    return wire


@pytest.fixture
def virtual(wire: Wire, clock: VirtualClock) -> OllamaManager:
    """A client without sockets, in virtual time."""
    return OllamaManager(config(), clock=clock, transport=wire, jitter=lambda: 0.0)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("llava", "llava:latest"),
        ("llava:7b", "llava:7b"),
        ("LLaVA:7B", "llava:7b"),
        ("user/llava", "user/llava:latest"),
        ("hf.co/user/Repo-GGUF:Q4_K_M", "hf.co/user/repo-gguf:q4_k_m"),
        ("registry.ollama.ai/library/llava:latest", "llava:latest"),
        ("http://registry.ollama.ai/library/llava", "llava:latest"),
        ("localhost:5000/me/llava", "localhost:5000/me/llava:latest"),
        ("library/llava", "llava:latest"),
        ("registry.ollama.ai/me/llava", "me/llava:latest"),
    ],
)
def test_a_name_is_brought_into_the_form_that_ollama_shows(name: str, shown: str) -> None:
    """Default registry, namespace and tag are not shown, a tag always is, and case does not count."""
    assert canonical_name(name) == shown


NAME_TEXT = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(["registry.ollama.ai", "library", "http:", "https://", "/", ":", "latest", "a", "B", "7b", ""]),
        max_size=9,
    ).map("".join),
)


@given(NAME_TEXT)
def test_a_canonical_name_is_its_own_canonical_name(name: str) -> None:
    """Idempotent and total, also for what is no name at all."""
    once = canonical_name(name)
    assert canonical_name(once) == once


PART = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}", fullmatch=True)
FULL_NAME = st.tuples(st.sampled_from(["registry.ollama.ai", "hf.co"]), st.sampled_from(["library", "me"]), PART, PART)


@given(FULL_NAME, FULL_NAME)
def test_two_names_match_only_where_every_part_matches(a: tuple[str, ...], b: tuple[str, ...]) -> None:
    """No prefix, no substring: a loose match unloads somebody else's model."""

    def full(parts: tuple[str, ...]) -> str:
        return canonical_name("{}/{}/{}:{}".format(*parts))

    assert (full(a) == full(b)) == (a == b)


# --- the port --------------------------------------------------------------------------------------------------------


def test_the_client_is_a_vlm_server(virtual: OllamaManager) -> None:
    """What the manager needs is all there, with the Protocol's names."""
    server: VLMServer = virtual
    assert (server.model, server.on_our_card, server.simulated) == ("tiny-a", True, True)


def test_an_ollama_elsewhere_is_not_on_our_card(clock: VirtualClock, wire: Wire) -> None:
    """Only loopback shares this machine's card."""
    far = OllamaManager(config("http://10.1.2.3:11434", allow_remote=True), clock=clock, transport=wire)
    assert not far.on_our_card


@pytest.mark.parametrize("name", ["qwen3-vl:cloud", "gpt-oss:120b-cloud"])
def test_a_cloud_model_is_refused_at_construction(name: str) -> None:
    """It holds no memory here, so its residency cannot be managed."""
    with pytest.raises(ConfigError):
        client("http://127.0.0.1:1", vlm_model=name)


# --- residency -------------------------------------------------------------------------------------------------------


def test_residency_is_yes_with_both_sizes(virtual: OllamaManager, wire: Wire) -> None:
    """Sizes come in MiB, the other models beside ours."""
    wire.say("/api/ps", ps(entry("other:1b", OTHER_DIGEST), entry("tiny-a:latest", size_vram=2 << 20)))
    seen = virtual.residency(2.0)
    assert seen.answer is Answer.YES
    assert seen.ours is not None
    assert (seen.ours.size_mib, seen.ours.size_vram_mib) == (8.0, 2.0)
    assert [model.name for model in seen.others] == ["other:1b"]


def test_an_empty_list_is_a_definite_no(virtual: OllamaManager, wire: Wire) -> None:
    """And so is Go's null for an empty list."""
    empty: list[list[object] | None] = [[], None]
    for models in empty:
        wire.say("/api/ps", {"models": models})
        assert virtual.residency(2.0) == Residency(answer=Answer.NO, at=1000.0)
        assert virtual.is_model_loaded(2.0) is Answer.NO


def test_our_model_is_found_by_digest_under_another_name(virtual: OllamaManager, wire: Wire) -> None:
    """Two tags of one blob share a runner, and only the first one's name is listed."""
    wire.say("/api/ps", ps(entry("alias:latest")))
    seen = virtual.residency(2.0)
    assert seen.answer is Answer.YES
    assert seen.others == ()


def test_the_digest_is_asked_for_only_when_names_do_not_decide(virtual: OllamaManager, wire: Wire) -> None:
    """One question more where another model is listed, and not again within a minute."""
    wire.say("/api/tags", {"models": []})
    wire.say("/api/ps", ps())
    virtual.residency(2.0)
    assert [path for path, _ in wire.asked] == ["/api/ps"]
    wire.say("/api/ps", ps(entry("other:1b", OTHER_DIGEST)))
    for _ in range(3):
        assert virtual.residency(2.0).answer is Answer.NO
    assert [path for path, _ in wire.asked].count("/api/tags") == 1


def test_a_blocked_ps_is_unknown_at_its_own_deadline(virtual: OllamaManager, wire: Wire, clock: VirtualClock) -> None:
    """Silence is not a no."""
    wire.say("/api/ps", hang(clock))
    seen = virtual.residency(2.5)
    assert (seen.answer, seen.refused, clock.now) == (Answer.UNKNOWN, False, 1002.5)
    assert "no whole answer" in seen.detail


def test_only_a_refused_connection_is_marked_refused() -> None:
    """Nobody listening is a proof of a kind; every other failure is not."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        seen = client(f"http://127.0.0.1:{unused.getsockname()[1]}").residency(2.0)
    assert (seen.answer, seen.refused) == (Answer.UNKNOWN, True)
    with serving(lambda visit: visit.reset()) as server:
        seen = client(server).residency(2.0)
    assert (seen.answer, seen.refused) == (Answer.UNKNOWN, False)


@pytest.mark.parametrize(
    ("expires_at", "forever"),
    [
        ("2319-03-05T03:10:30.684830437Z", True),
        ("2026-11-23T03:28:15.2-07:00", False),
        ("0001-01-01T00:00:00Z", False),
        ("12026-01-01T00:00:00Z", True),
        ("soon", False),
        (17, False),
        (None, False),
    ],
)
def test_a_pin_is_seen_and_an_odd_expiry_harms_nothing(
    virtual: OllamaManager, wire: Wire, expires_at: Any, forever: bool
) -> None:
    """A negative keep_alive shows as a far year; nothing else is read from the server's clock."""
    wire.say("/api/ps", ps(entry("tiny-a:latest", expires_at=expires_at)))
    seen = virtual.residency(2.0)
    assert seen.ours is not None
    assert seen.ours.forever is forever


@given(st.text(max_size=40))
def test_no_expiry_text_raises(expires_at: str) -> None:
    """It is shown on one line and not understood."""
    wire = Wire(VirtualClock())
    wire.say("/api/ps", ps(entry("tiny-a:latest", expires_at=expires_at)))
    ours = OllamaManager(config(), clock=wire.clock, transport=wire).residency(1.0).ours
    assert ours is not None
    assert "\n" not in ours.expires_at


ABSURD = [
    '{"models": [{"name": "a", "size": NaN}]}',
    '{"models": [{"name": "a", "size": 1e999}]}',
    '{"models": [{"name": "a", "size": -Infinity}]}',
    '{"models": [{"name": "a", "size": -1}]}',
    '{"models": [{"name": "a", "size": true}]}',
    '{"models": [{"name": "a", "size": 1.5}]}',
    '{"models": [{"name": "a", "size": "8"}]}',
    '{"models": [{"name": "a", "size": %s}]}' % ("9" * 400),
    '{"models": [{"name": "a", "size": %s}]}' % ("9" * 5000),
    '{"models": [{"name": "a", "size": 99999999999999999}]}',
    '{"models": [{"name": 7}]}',
    '{"models": [{}]}',
    '{"models": [{"name": "%s"}]}' % ("a" * 300),
    '{"models": [{"name": "a\\nb"}]}',
    '{"models": [1]}',
    '{"models": {}}',
    json.dumps({"models": [{"name": "a"}] * 300}),
    "{}",
    "[]",
    "null",
    "",
    '{"models": []',
    '{"models": []} trailing',
    "[" * 100_000,
    '{"a":' * 100_000,
    "\ufeff{}",
]


@pytest.mark.parametrize("body", ABSURD, ids=range(len(ABSURD)))
def test_an_absurd_answer_is_unknown_and_never_believed(virtual: OllamaManager, wire: Wire, body: str) -> None:
    """Strict JSON, bounded numbers, bounded lists, bounded depth."""
    wire.say("/api/ps", body.encode())
    wire.say("/api/tags", body.encode())
    assert virtual.residency(1.0).answer is Answer.UNKNOWN
    assert virtual.catalog(1.0).present is Answer.UNKNOWN
    assert virtual.health(1.0).level == "busy_or_wedged"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["models", "name", "size", "size_vram", "digest", "error", "message", "done", "response"])
            | st.text(max_size=4),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(
    st.sampled_from([200, 204, 301, 400, 401, 403, 404, 405, 418, 429, 499, 500, 501, 502, 503, 504, 600]),
    JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60),
)
def test_no_answer_makes_the_client_raise_anything_but_its_own(status: int, body: bytes) -> None:
    """Whatever the server says: observing answers, acting raises one of ours."""
    wire = Wire(VirtualClock())
    for path in ("/api/ps", "/api/tags", "/api/version", "/api/generate", "/api/chat"):
        wire.say(path, (status, body))
    manager = OllamaManager(config(vlm_load_retries=0), clock=wire.clock, transport=wire)
    assert isinstance(manager.residency(1.0), Residency)
    assert isinstance(manager.catalog(1.0), Catalog)
    assert manager.health(1.0).level in ("down", "busy_or_wedged", "up")
    acts: list[Callable[[], object]] = [
        lambda: load(manager),
        lambda: manager.unload_model(timeout_s=1.0),
        lambda: manager.renew(keep_alive_s=60, timeout_s=1.0),
        lambda: ask(manager),
        lambda: ask(manager, stream=True),
        lambda: list(manager.chat([{"role": "user", "content": "x"}], keep_alive_s=60, timeout_s=1.0)),
    ]
    for act in acts:
        with contextlib.suppress(OllamaError):
            act()


# --- catalog ---------------------------------------------------------------------------------------------------------


def test_the_catalog_knows_size_digest_and_sight(virtual: OllamaManager, wire: Wire) -> None:
    """Capabilities are told by newer servers only; missing is unknown, not no."""
    wire.say("/api/tags", {"models": [entry("tiny-a:latest", capabilities=["completion", "vision"])]})
    assert virtual.catalog(1.0) == Catalog(present=Answer.YES, size_mib=8.0, digest=DIGEST, vision=Answer.YES)
    wire.say("/api/tags", {"models": [entry("Tiny-A:latest", capabilities=["completion"])]})
    assert virtual.catalog(1.0).vision is Answer.NO
    wire.say("/api/tags", {"models": [entry("tiny-a:latest", OTHER_DIGEST)]})
    assert virtual.catalog(1.0).vision is Answer.UNKNOWN


def test_sight_is_asked_for_where_the_catalog_does_not_tell(virtual: OllamaManager, wire: Wire) -> None:
    """Once for each digest; no answer is unknown, and a server that tells nothing is too."""
    gone = (404, {"error": "model 'tiny-a' not found"})
    wire.say("/api/show", gone, {"capabilities": []}, {"capabilities": ["vision"]})
    assert virtual.catalog(1.0).vision is Answer.UNKNOWN
    assert virtual.catalog(1.0).vision is Answer.UNKNOWN
    assert [virtual.catalog(1.0).vision for _ in range(3)] == [Answer.YES] * 3
    assert [path for path, _ in wire.asked].count("/api/show") == 3


def test_the_digest_is_learned_from_the_list_too(virtual: OllamaManager, wire: Wire) -> None:
    """Seen once by name, it is found under an alias, also while `/api/tags` is silent."""
    wire.say("/api/tags", (503, {"error": "busy"}))
    assert virtual.residency(1.0).answer is Answer.YES
    wire.say("/api/ps", ps(entry("alias:latest")))
    assert virtual.residency(1.0).answer is Answer.YES


def test_a_model_that_is_not_there_or_not_here_is_not_present(virtual: OllamaManager, wire: Wire) -> None:
    """A cloud stub is a name without a model."""
    wire.say("/api/tags", {"models": [entry("tiny-a:7b")]})
    assert virtual.catalog(1.0).present is Answer.NO
    wire.say("/api/tags", {"models": [entry("tiny-a:latest", remote_host="https://ollama.com")]})
    seen = virtual.catalog(1.0)
    assert seen.present is Answer.NO
    assert "cloud" in seen.detail


# --- load ------------------------------------------------------------------------------------------------------------


def test_a_load_is_one_request_and_one_look(virtual: OllamaManager, wire: Wire) -> None:
    """No prompt, no stream, numbers for keep_alive, our options; then `/api/ps` must agree."""
    report = load(virtual)
    assert wire.asked == [
        ("/api/generate", {"model": "tiny-a", "keep_alive": 360, "stream": False, "options": {"num_ctx": 2048}}),
        ("/api/ps", None),
    ]
    assert isinstance(wire.asked[0][1]["keep_alive"], int)
    assert report.model is not None
    assert (report.model.name, report.attempts) == ("tiny-a:latest", 1)


def test_done_without_a_reason_is_a_load_too(virtual: OllamaManager, wire: Wire) -> None:
    """Servers before done_reason said only done."""
    wire.say("/api/generate", {"model": "tiny-a", "response": "", "done": True})
    assert load(virtual).attempts == 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({**LOADED, "done_reason": "unload"}, LoadFailed),
        ({**LOADED, "done": False}, OllamaProtocolError),
        ({"models": []}, OllamaProtocolError),
        ({"error": "llama-server process has terminated: signal: killed"}, LoadFailed),
    ],
)
def test_a_200_that_is_no_load_is_a_failure(
    virtual: OllamaManager, wire: Wire, answer: Any, error: type[OllamaError]
) -> None:
    """And one that another try may mend: one try and three retries."""
    wire.say("/api/generate", answer)
    with pytest.raises(error) as caught:
        load(virtual, 100.0)
    assert type(caught.value) is error
    assert caught.value.attempts == 4


def test_a_load_that_ps_does_not_show_is_tried_again(virtual: OllamaManager, wire: Wire) -> None:
    """A 200 at once with nothing loaded must be caught."""
    wire.say("/api/ps", ps(), ps(entry("tiny-a:latest")))
    assert load(virtual).attempts == 2
    wire.say("/api/ps", ps())
    with pytest.raises(LoadFailed, match="does not list"):
        load(virtual, 100.0)


def test_a_load_stands_when_the_look_gets_no_answer(virtual: OllamaManager, wire: Wire, clock: VirtualClock) -> None:
    """The report then has no sizes; the load itself was answered."""
    wire.say("/api/ps", hang(clock))
    assert load(virtual).model is None


def test_a_partial_offload_is_reported_not_judged(virtual: OllamaManager, wire: Wire) -> None:
    """Policy is the manager's."""
    wire.say("/api/ps", ps(entry("tiny-a:latest", size_vram=0)))
    model = load(virtual).model
    assert model is not None
    assert (model.size_mib, model.size_vram_mib) == (8.0, 0.0)


def test_retries_back_off_and_tell_before_each(virtual: OllamaManager, wire: Wire, clock: VirtualClock) -> None:
    """1 s, 2 s, 4 s between four tries, and memory may settle before each."""
    busy = (503, {"error": "server busy, please try again.  maximum pending requests exceeded"})
    wire.say("/api/generate", busy, busy, busy, LOADED)
    told: list[float] = []
    report = load(virtual, 60.0, before_retry=lambda: told.append(clock.now))
    assert told == pytest.approx([1001.0, 1003.0, 1007.0])
    assert report.attempts == 4
    assert report.elapsed_s == pytest.approx(7.0)


@given(st.floats(0, 1, exclude_max=True))
def test_jitter_shortens_a_pause_by_half_at_most(jitter: float) -> None:
    """Many clients that failed together do not come back together."""
    wire = Wire(VirtualClock())
    wire.say("/api/generate", (503, {"error": "busy"}), LOADED)
    wire.say("/api/ps", ps(entry("tiny-a")))
    load(OllamaManager(config(), clock=wire.clock, transport=wire, jitter=lambda: jitter))
    assert 0.5 <= wire.clock.now - 1000.0 <= 1.0 + 1e-6


def test_a_missing_model_is_not_tried_again(virtual: OllamaManager, wire: Wire) -> None:
    """404 is final, and the mend is named."""
    wire.say("/api/generate", (404, {"error": "model 'tiny-a' not found"}))
    with pytest.raises(ModelNotFound, match="`ollama pull tiny-a`") as caught:
        load(virtual)
    assert (caught.value.attempts, len(wire.asked)) == (1, 1)


def test_out_of_memory_is_tried_once_more(virtual: OllamaManager, wire: Wire) -> None:
    """After memory had a chance to settle; a third try would meet the same card."""
    wire.say("/api/generate", (500, {"error": "cudaMalloc failed: out of memory"}))
    with pytest.raises(LoadOutOfMemory) as caught:
        load(virtual, 100.0)
    assert caught.value.attempts == 2


def test_a_load_that_hangs_ends_at_the_deadline(virtual: OllamaManager, wire: Wire, clock: VirtualClock) -> None:
    """The whole deadline is the request's own timeout: a shorter one would kill the load."""
    wire.say("/api/generate", hang(clock))
    with pytest.raises(LoadTimeout) as caught:
        load(virtual, 360.0)
    assert wire.timeouts == [360.0]
    assert (clock.now, caught.value.elapsed_s, caught.value.attempts) == (1360.0, 360.0, 1)


def test_no_try_begins_after_the_deadline(virtual: OllamaManager, wire: Wire, clock: VirtualClock) -> None:
    """The last real error says more than a timeout would."""
    wire.say("/api/generate", (503, {"error": "busy"}))
    with pytest.raises(OllamaBusy):
        load(virtual, 2.5)
    assert clock.now <= 1002.5

    with pytest.raises(OllamaBusy):
        load(virtual, 2.5, before_retry=lambda: clock.sleep(5.0))
    assert len(wire.asked) == 3


def test_an_interrupt_ends_a_pause_between_tries(virtual: OllamaManager, wire: Wire, clock: VirtualClock) -> None:
    """Within a slice of the pause, and nothing more is sent."""
    interrupt = Interrupt()

    def busy(_: float) -> tuple[int, dict[str, str]]:
        interrupt_at.append(clock.now)
        return 503, {"error": "busy"}

    interrupt_at: list[float] = []
    slept = clock.sleep

    def sleep(seconds: float) -> None:
        slept(seconds)
        if clock.now > interrupt_at[0] + 0.3:
            interrupt.set()

    clock.sleep = sleep  # type: ignore[method-assign]
    wire.say("/api/generate", busy)
    with pytest.raises(LoadAborted):
        load(virtual, 60.0, interrupt=interrupt)
    assert clock.now < 1000.5
    assert len(wire.asked) == 1


def test_an_interrupt_set_before_sends_nothing(virtual: OllamaManager, wire: Wire) -> None:
    """Nothing was started, so nothing needs to be undone."""
    interrupt = Interrupt()
    interrupt.set()
    with pytest.raises(LoadAborted):
        load(virtual, interrupt=interrupt)
    assert wire.asked == []


def test_a_blocked_load_is_aborted_from_another_thread() -> None:
    """The socket closes at once, which is what makes the server give the load up; and it is no retry."""
    with serving(Visit.hang) as server:
        interrupt = Interrupt()
        watch = Stopwatch()

        def stop() -> None:
            server.wait_for_visits(1)
            interrupt.set()

        thread = threading.Thread(target=stop)
        thread.start()
        with pytest.raises(LoadAborted):
            load(client(server), 60.0, interrupt=interrupt)
        thread.join()
        assert watch.s < 10.0
        assert server.visits[0].gone.wait(10)
        assert len(server.visits) == 1


@pytest.mark.parametrize(
    "beginning", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b'HTTP/1.1 200 OK\r\n\r\n{"d']
)
def test_a_load_is_aborted_wherever_its_answer_has_got_to(beginning: bytes) -> None:
    """Without a length the end of the connection looks like the end of the body; it is not."""

    def answer(visit: Visit) -> None:
        visit.send(beginning)
        begun.set()
        visit.hang()

    begun = threading.Event()
    with serving(answer) as server:
        interrupt = Interrupt()

        def stop() -> None:
            begun.wait(10)
            interrupt.set()

        thread = threading.Thread(target=stop)
        thread.start()
        with pytest.raises(LoadAborted):
            load(client(server, vlm_load_retries=0), 60.0, interrupt=interrupt)
        thread.join()


def test_an_abort_before_the_connection_exists_is_not_lost() -> None:
    """A transport that was aborted never connects."""
    with serving(http(LOADED)) as server:
        transport = SocketTransport()
        transport.abort()
        request = requests.Request("GET", server.url).prepare()
        with pytest.raises(requests.ConnectionError):
            transport.send(request, timeout=5.0)
        transport.close()
        assert server.visits == []


def test_an_abort_hits_only_its_own_call() -> None:
    """While a load is given up, a question under way gets its answer."""
    asked, answered = threading.Event(), threading.Event()

    def answer(visit: Visit) -> None:
        if visit.line.startswith("POST"):
            visit.hang()
            return
        asked.set()
        answered.wait(10)
        visit.send(http(ps(entry("tiny-a:latest"))))

    with RawServer(answer) as server:
        manager, interrupt, seen = client(server), Interrupt(), []
        looking = threading.Thread(target=lambda: seen.append(manager.residency(10.0)))
        looking.start()

        def stop() -> None:
            server.wait_for_visits(2)
            interrupt.set()

        stopping = threading.Thread(target=stop)
        stopping.start()
        assert asked.wait(10)
        with pytest.raises(LoadAborted):
            load(manager, 60.0, interrupt=interrupt)
        answered.set()
        looking.join()
        stopping.join()
        assert seen[0].answer is Answer.YES


# --- unload and renewal ----------------------------------------------------------------------------------------------


def test_an_unload_is_one_request_with_the_number_zero(virtual: OllamaManager, wire: Wire) -> None:
    """Accepted is all it says."""
    wire.say("/api/generate", {**LOADED, "done_reason": "unload"})
    virtual.unload_model(timeout_s=2.0)
    assert wire.asked == [("/api/generate", {"model": "tiny-a", "keep_alive": 0, "stream": False})]


def test_404_to_an_unload_is_accepted(virtual: OllamaManager, wire: Wire) -> None:
    """A model deleted while it was loaded answers so; `/api/ps` decides."""
    wire.say("/api/generate", (404, {"error": "model 'tiny-a' not found"}))
    virtual.unload_model(timeout_s=2.0)


def test_another_error_to_an_unload_is_raised(virtual: OllamaManager, wire: Wire) -> None:
    """503 means it was not even noted."""
    wire.say("/api/generate", (503, {"error": "server busy"}))
    with pytest.raises(OllamaBusy):
        virtual.unload_model(timeout_s=2.0)


def test_every_request_carries_the_same_options_and_a_numeric_keep_alive(virtual: OllamaManager, wire: Wire) -> None:
    """Other options would reload the model; text without a unit is a 400."""
    wire.say("/api/generate", LOADED, LOADED, FINAL)
    wire.say("/api/chat", {**FINAL, "message": {"role": "assistant", "content": "x"}})
    load(virtual)
    virtual.renew(keep_alive_s=90.5, timeout_s=2.0)
    ask(virtual)
    list(virtual.chat([{"role": "user", "content": "x"}], keep_alive_s=60, timeout_s=2.0))
    bodies = [body for _, body in wire.asked if body]
    assert len(bodies) == 4
    assert all(body["options"] == {"num_ctx": 2048} for body in bodies)
    assert [body["keep_alive"] for body in bodies] == [360, 90.5, 360, 60]
    assert {path for path, _ in wire.asked} <= {"/api/generate", "/api/chat", "/api/ps"}


def test_options_changed_later_change_nothing() -> None:
    """They are taken once."""
    options = {"num_ctx": 2048, "stop": ["x"]}
    wire = Wire(VirtualClock())
    wire.say("/api/generate", LOADED)
    manager = OllamaManager(config(vlm_options=options), clock=wire.clock, transport=wire)
    options["num_ctx"] = 9
    manager.renew(keep_alive_s=60, timeout_s=1.0)
    assert wire.asked[0][1]["options"] == {"num_ctx": 2048, "stop": ["x"]}


@pytest.mark.parametrize("keep_alive_s", [0, -1, float("inf"), float("nan"), 1e10, "300", True, None])
def test_a_keep_alive_that_would_mean_something_else_is_refused(virtual: OllamaManager, keep_alive_s: Any) -> None:
    """0 unloads, a negative one pins, a huge one drops the model at once, text is a 400."""
    with pytest.raises(BadArgument):
        virtual.load_model(keep_alive_s=keep_alive_s, deadline_s=1.0)
    with pytest.raises(BadArgument):
        virtual.renew(keep_alive_s=keep_alive_s, timeout_s=1.0)
    with pytest.raises(BadArgument):
        virtual.generate("x", keep_alive_s=keep_alive_s, timeout_s=1.0)


@pytest.mark.parametrize("timeout_s", [-1, float("inf"), float("nan"), "1", True, None])
def test_a_timeout_that_cannot_be_meant_is_refused(virtual: OllamaManager, timeout_s: Any) -> None:
    """Acting calls raise, observing ones answer unknown."""
    with pytest.raises(BadArgument):
        virtual.unload_model(timeout_s=timeout_s)
    with pytest.raises(BadArgument):
        virtual.generate("x", keep_alive_s=1, timeout_s=timeout_s)
    assert virtual.residency(timeout_s).answer is Answer.UNKNOWN


def test_no_time_left_sends_nothing(virtual: OllamaManager, wire: Wire) -> None:
    """A deadline of zero is over."""
    with pytest.raises(OllamaTimeout):
        virtual.unload_model(timeout_s=0)
    assert virtual.residency(0).answer is Answer.UNKNOWN
    assert wire.asked == []


# --- running ---------------------------------------------------------------------------------------------------------


def test_a_completion_tells_what_it_cost(virtual: OllamaManager, wire: Wire) -> None:
    """Nanoseconds become seconds; the server's own object is kept."""
    wire.say("/api/generate", FINAL)
    (answer,) = ask(virtual, images=[PNG], format={"type": "object"})
    assert (answer.text, answer.done, answer.done_reason) == ("a login form", True, "stop")
    assert (answer.prompt_tokens, answer.output_tokens) == (4, 3)
    assert answer.total_s == pytest.approx(0.852294471)
    assert answer.load_s == pytest.approx(0.772530895)
    assert answer.raw["context"] == [1, 2, 3]
    body = wire.asked[0][1]
    assert body["images"] == [base64.b64encode(PNG).decode()]
    assert (body["prompt"], body["format"], body["stream"]) == ("What is this?", {"type": "object"}, False)


def test_images_are_taken_as_bytes_paths_and_pictures(virtual: OllamaManager, wire: Wire, tmp_path: Path) -> None:
    """Also pictures of a kind that PNG cannot hold."""
    image_module = pytest.importorskip("PIL.Image")
    wire.say("/api/generate", FINAL)
    path = tmp_path / "screen.png"
    path.write_bytes(PNG)
    images = [PNG, bytearray(PNG), memoryview(PNG), str(path), path, b"\xff\xd8\xff\xe0", b"RIFF1234WEBPVP8 "]
    pictures = [image_module.new(mode, (2, 2)) for mode in ("RGB", "CMYK", "F", "LA")]
    ask(virtual, images=[*images, *pictures])
    sent = [base64.b64decode(text) for text in wire.asked[0][1]["images"]]
    assert sent[:5] == [PNG] * 5
    assert all(data.startswith(b"\x89PNG") for data in sent[-4:])


@pytest.mark.parametrize("image", [b"", b"GIF89a", b"hello", 7, None, "no/such/file.png", "\0", "/", object()])
def test_what_is_no_image_is_refused_before_anything_is_sent(virtual: OllamaManager, wire: Wire, image: Any) -> None:
    """In the call itself, not when the answer is read."""
    with pytest.raises(BadArgument):
        virtual.generate("x", images=[image], keep_alive_s=1, timeout_s=1.0)
    with pytest.raises(BadArgument):
        virtual.chat([{"role": "user", "content": "x", "images": [image]}], keep_alive_s=1, timeout_s=1.0)
    assert wire.asked == []


def test_what_would_only_load_the_model_is_refused(virtual: OllamaManager, wire: Wire) -> None:
    """An empty prompt and an empty conversation are Ollama's way to say load."""
    for prompt in ("", None):
        with pytest.raises(BadArgument):
            virtual.generate(prompt, keep_alive_s=1, timeout_s=1.0)  # type: ignore[arg-type]
    for messages in ([], ["hello"], [{"content": "x"}]):
        with pytest.raises(BadArgument):
            virtual.chat(messages, keep_alive_s=1, timeout_s=1.0)  # type: ignore[arg-type]
    with pytest.raises(BadArgument):
        virtual.generate("x", format={"a": object()}, keep_alive_s=1, timeout_s=1.0)
    with pytest.raises(BadArgument):
        virtual.generate("x", format={"a": float("nan")}, keep_alive_s=1, timeout_s=1.0)


def test_a_conversation_keeps_its_messages_and_encodes_their_images(virtual: OllamaManager, wire: Wire) -> None:
    """The caller's own messages stay as they are."""
    wire.say("/api/chat", {"message": {"role": "assistant", "content": "yes"}, "done": True, "done_reason": "stop"})
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "x", "images": [PNG]},
    ]
    (answer,) = virtual.chat(messages, keep_alive_s=1, timeout_s=1.0)
    assert (answer.text, answer.prompt_tokens, answer.total_s) == ("yes", None, None)
    assert wire.asked[0][1]["messages"][1]["images"] == [base64.b64encode(PNG).decode()]
    assert messages[1]["images"] == [PNG]


def test_a_stream_gives_its_parts_as_they_come() -> None:
    """The first part is there before the last was sent."""
    first_read = threading.Event()

    def answer(visit: Visit) -> None:
        visit.send(chunked(part("a log"), end=False))
        assert first_read.wait(10)
        visit.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(line(FINAL)), line(FINAL)))

    with serving(answer) as server:
        parts = client(server).generate("x", keep_alive_s=1, timeout_s=10.0, stream=True)
        first = next(parts)
        first_read.set()
        rest = list(parts)
    assert (first.text, first.done) == ("a log", False)
    assert [(p.text, p.done, p.output_tokens) for p in rest] == [("a login form", True, 3)]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_lines_may_be_cut_anywhere_by_the_chunks(cut: int) -> None:
    """Chunks are the transport's, lines are Ollama's."""
    data = part("a") + b"\n" + part("b") + line(FINAL)
    pieces = [data[i : i + cut] for i in range(0, len(data), cut)]
    with serving(chunked(*pieces)) as server:
        assert [p.text for p in ask(client(server), stream=True)] == ["a", "b", "a login form"]


def test_closing_the_iterator_closes_the_connection() -> None:
    """Which is what ends the work in the server."""

    def answer(visit: Visit) -> None:
        visit.send(chunked(part("a"), end=False))
        visit.hang()

    with serving(answer) as server:
        parts = client(server).generate("x", keep_alive_s=1, timeout_s=60.0, stream=True)
        assert next(parts).text == "a"
        parts.close()  # type: ignore[attr-defined]
        assert server.visits[0].gone.wait(10)


def test_an_iterator_that_is_never_asked_sends_nothing(virtual: OllamaManager, wire: Wire) -> None:
    """So an abandoned call costs nothing."""
    virtual.generate("x", keep_alive_s=1, timeout_s=1.0, stream=True)
    assert wire.asked == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("tail", "error"),
    [
        (b"", OllamaProtocolError),
        (line({"error": "an error was encountered while running the model: unexpected EOF"}), LoadFailed),
        (line({"error": "CUDA error: out of memory"}), LoadOutOfMemory),
        (b'{"response":"b","do', OllamaProtocolError),
        (b"not json\n", OllamaProtocolError),
        (line({"response": "b"}), OllamaProtocolError),
        (line({"response": 5, "done": True}), OllamaProtocolError),
        (line({**FINAL, "eval_count": -1}), OllamaProtocolError),
        (line({**FINAL, "something": float("nan")}), OllamaProtocolError),
        (line({**FINAL, "something": 10**40}), OllamaProtocolError),
        (line({**FINAL, "total_duration": 1.5}), OllamaProtocolError),
        (line({**FINAL, "response": "\ud800"}), OllamaProtocolError),
    ],
)
def test_an_answer_that_does_not_end_well_raises(stream: bool, tail: bytes, error: type[OllamaError]) -> None:
    """No part of an answer is taken for all of it, and an error within a 200 is an error."""
    parts = [part("a"), tail] if stream else [tail]
    with serving(chunked(*[p for p in parts if p])) as server:
        answers = client(server).generate("x", keep_alive_s=1, timeout_s=10.0, stream=stream)
        if stream:
            assert next(answers).text == "a"
        with pytest.raises(error) as caught:
            next(answers)
    assert type(caught.value) is error


def test_a_line_without_end_is_cut_off() -> None:
    """A stream's memory is bounded by its longest line."""

    def answer(visit: Visit) -> None:
        visit.send(b"HTTP/1.1 200 OK\r\n\r\n")
        visit.flood(b"x" * 65536)

    with serving(answer) as server, pytest.raises(OllamaProtocolError, match="too long"):
        ask(client(server), 60.0, stream=True)


# --- errors beside the table of the server, whose rows are in test_ollama_rows.py -------------------------------------

MORE_ERRORS: list[tuple[int, str, type[OllamaError], str]] = [
    (400, 'time: missing unit in duration "-1"', OllamaRequestRejected, "number of seconds"),
    (
        500,
        'invalid format: "\\"xml\\""; expected "json" or a valid JSON Schema object',
        OllamaRequestRejected,
        "schema",
    ),
    (500, "hipMalloc failed", LoadOutOfMemory, ""),
    (500, "ErrorOutOfDeviceMemory vk_error_out_of_device_memory", LoadOutOfMemory, ""),
    (401, "unauthorized", OllamaRequestRejected, "credentials"),
    (404, "no such route", OllamaRequestRejected, ""),
    (408, "too slow", OllamaUnavailable, ""),
    (429, "slow down", OllamaBusy, ""),
    (502, "bad gateway", OllamaUnavailable, ""),
    (504, "gateway timeout", OllamaUnavailable, ""),
]


@pytest.mark.parametrize(
    ("status", "text", "error", "remedy"), MORE_ERRORS, ids=[f"{r[0]} {r[1][:40]}" for r in MORE_ERRORS]
)
def test_an_error_beside_the_table_has_its_class_too(
    virtual: OllamaManager, wire: Wire, status: int, text: str, error: type[OllamaError], remedy: str
) -> None:
    """What proxies and rarer requests meet."""
    wire.say("/api/generate", (status, {"error": text}))
    with pytest.raises(OllamaError) as caught:
        virtual.unload_model(timeout_s=1.0)
    assert type(caught.value) is error
    assert remedy in caught.value.remedy
    assert caught.value.status == status


NOT_OLLAMA: list[tuple[str, bytes, type[OllamaError]]] = [
    ("plain 404", http("404 page not found", status=404, kind="text/plain"), OllamaRequestRejected),
    ("plain 405", http("405 method not allowed", status=405, kind="text/plain"), OllamaRequestRejected),
    ("empty 403", http(b"", status=403, kind=""), OllamaRequestRejected),
    ("plain 401", http("who are you", status=401, kind="text/plain"), OllamaRequestRejected),
    ("HTML 200", http("<html>Log in</html>", kind="text/html"), OllamaProtocolError),
    ("HTML 404", http("<html>", status=404, kind="text/html"), OllamaProtocolError),
    ("HTML 500", http("<html>", status=500, kind="text/html"), OllamaProtocolError),
    ("HTML 502", http("<html>", status=502, kind="text/html"), OllamaProtocolError),
    ("HTML 503", http("<html>", status=503, kind="text/html"), OllamaProtocolError),
    ("204", http(b"", status=204, kind=""), OllamaProtocolError),
    ("empty 200", http(b""), OllamaProtocolError),
    ("JSON list", http(b"[]"), OllamaProtocolError),
    ("compressed", http(b"\x1f\x8b", headers="Content-Encoding: gzip\r\n"), OllamaProtocolError),
    ("shorter than said", http(LOADED, length=9999), OllamaProtocolError),
    ("longer than said", http(LOADED, length=20), OllamaProtocolError),
    ("no length, cut", b"HTTP/1.1 200 OK\r\n\r\n" + b'{"done": tr', OllamaProtocolError),
    ("two lengths", http(LOADED, headers="Content-Length: 3\r\n"), OllamaProtocolError),
    ("bad chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", OllamaProtocolError),
    ("not HTTP", b"SSH-2.0-OpenSSH_9.6\r\n", OllamaProtocolError),
    ("nothing", b"", OllamaUnavailable),
    ("half a head", b"HTTP/1.1 200 OK\r\nContent-", OllamaProtocolError),
]


@pytest.mark.parametrize(("data", "error"), [row[1:] for row in NOT_OLLAMA], ids=[row[0] for row in NOT_OLLAMA])
def test_an_answer_that_is_not_ollamas_is_told_as_such(data: bytes, error: type[OllamaError]) -> None:
    """Proxies, login pages and other programs answer too."""
    with serving(data) as server:
        with pytest.raises(OllamaError) as caught:
            load(client(server, vlm_load_retries=0))
        assert client(server).residency(5.0).answer is Answer.UNKNOWN
    assert type(caught.value) is error


def test_a_request_asks_for_plain_json_on_a_connection_of_its_own() -> None:
    """A compressed answer has a size that no bound sees; a kept connection may be dead when it is used again."""
    with serving(http(ps())) as server:
        client(server).residency(5.0)
        (visit,) = server.visits
    asked = [visit.header(name) for name in ("Accept", "Accept-Encoding", "Connection", "Host")]
    assert asked == ["application/json", "identity", "close", f"127.0.0.1:{server.port}"]


def test_cookies_are_not_kept() -> None:
    """There is no session to fixate."""
    with serving(http({"version": "1"}, headers="Set-Cookie: a=b; Path=/\r\n")) as server:
        manager = client(server)
        manager.health(5.0)
        manager.health(5.0)
        assert all(visit.header("Cookie") is None for visit in server.visits)


@pytest.mark.parametrize("kind", ["plain", "chunked", "close"])
def test_an_answer_cut_at_every_byte_is_never_a_no(kind: str) -> None:
    """Half of a list is no list."""
    body = json.dumps(ps(entry("tiny-a:latest"))).encode()
    whole = {
        "plain": http(body),
        "chunked": chunked(body[:50], body[50:]),
        "close": b"HTTP/1.1 200 OK\r\n\r\n" + body,
    }[kind]
    cuts = iter(range(len(whole)))
    with RawServer(lambda visit: visit.send(whole[: next(cuts)])) as server:
        manager = client(server)
        answers = [manager.residency(10.0).answer for _ in whole]
    assert Answer.NO not in answers
    # The body is whole before the last bytes of the framing are.
    assert answers.count(Answer.YES) <= (5 if kind == "chunked" else 0)


PIECES = st.lists(
    st.sampled_from(
        [
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.1 500 No\r\n",
            b"HTTP/9.9 abc\r\n",
            b"Content-Type: application/json\r\n",
            b"Content-Length: 13\r\n",
            b"Content-Length: -1\r\n",
            b"Content-Length: x\r\n",
            b"Content-Encoding: deflate\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"Transfer-Encoding: gzip, chunked\r\n",
            b"Set-Cookie: =;=;expires=never\r\n",
            b"Location: http://[\r\n",
            b": no name\r\n",
            b"\r\n",
            b'{"models":[]}',
            b"ffffffffffffffff\r\n",
            b"-1\r\n",
            b"d\r\n",
            b"0\r\n\r\n",
            b"\xff\xfe",
        ]
    )
    | st.binary(max_size=20),
    max_size=9,
).map(b"".join)


@given(st.lists(PIECES, min_size=20, max_size=20))
@settings(max_examples=25)
def test_no_bytes_make_the_client_raise_anything_but_its_own(answers: list[bytes]) -> None:
    """Also below JSON: broken heads, lengths, encodings and chunks; always within the deadline."""
    watch = Stopwatch()
    with serving(*answers) as server:
        manager = client(server, vlm_load_retries=0)
        for number in range(len(answers)):
            if number % 2:
                assert isinstance(manager.residency(5.0), Residency)
            else:
                with contextlib.suppress(OllamaError):
                    load(manager, 5.0)
    assert watch.s < 60.0


# --- one deadline for all of a call ----------------------------------------------------------------------------------


def dripping(start: bytes, data: bytes, pause_s: float = 0.02) -> Callable[[Visit], None]:
    """An answer that begins at once and then comes byte by byte, without end."""

    def answer(visit: Visit) -> None:
        visit.send(start)
        visit.drip(data, pause_s)

    return answer


SLOW: dict[str, Callable[[Visit], None]] = {
    "silent": Visit.hang,
    "head": dripping(b"", b"HTTP/1.1 200 OK\r\nX-Filler: " + b"x" * 50_000),
    "body": dripping(http(b"", length=10**9), b" "),
    "chunks": dripping(chunked(end=False), b"1\r\n \r\n"),
    "without length": dripping(b"HTTP/1.1 200 OK\r\n\r\n{", b" "),
    "error": dripping(http(b"", status=500, length=10**9), b" "),
    "continue for ever": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001),
}


@pytest.mark.parametrize("kind", SLOW)
def test_one_deadline_holds_for_the_whole_answer(kind: str) -> None:
    """A byte now and then keeps no call alive."""
    with serving(SLOW[kind]) as server:
        manager, watch = client(server, vlm_load_retries=0), Stopwatch()
        assert manager.residency(0.2).answer is Answer.UNKNOWN
        with pytest.raises(OllamaTimeout):
            manager.unload_model(timeout_s=0.2)
        with pytest.raises(LoadTimeout):
            load(manager, 0.2)
        for stream in (False, True):
            with pytest.raises(OllamaTimeout):
                ask(manager, 0.2, stream=stream)
        assert 0.95 < watch.s < 15.0


def test_a_control_answer_without_end_is_cut_at_its_bound() -> None:
    """1 MiB is read of an answer that should take a few KiB."""

    def answer(visit: Visit) -> None:
        visit.send(b"HTTP/1.1 200 OK\r\n\r\n")
        visit.flood(b" " * 65536)

    with serving(answer) as server:
        with pytest.raises(OllamaProtocolError, match="longer than 1048576 bytes"):
            client(server).unload_model(timeout_s=30.0)
        assert server.visits[0].gone.wait(10)


def test_a_slow_consumer_does_not_outlive_the_deadline(virtual: OllamaManager, wire: Wire, clock: VirtualClock) -> None:
    """`timeout_s` is for the whole stream, the reader's own pauses included."""
    filler = part("x" * 70_000)
    wire.say("/api/generate", filler + filler + line(FINAL))
    parts = virtual.generate("x", keep_alive_s=1, timeout_s=5.0, stream=True)
    next(parts)
    clock.sleep(6.0)
    with pytest.raises(OllamaTimeout):
        list(parts)


# --- health ----------------------------------------------------------------------------------------------------------


def test_health_has_levels(virtual: OllamaManager, wire: Wire, clock: VirtualClock) -> None:
    """Refused is down, silent is starting, a blocked `/api/ps` is busy, and only all three are up."""
    assert (virtual.health(4.0).level, virtual.health(4.0).version) == ("up", "0.32.15")
    wire.say("/api/ps", hang(clock))
    started = clock.now
    assert (virtual.health(4.0).level, virtual.health(4.0).version) == ("busy_or_wedged", "0.32.15")
    assert clock.now - started == pytest.approx(8.0)
    wire.say("/api/version", hang(clock))
    assert virtual.health(4.0).level == "starting"
    wire.say("/api/version", requests.ConnectionError(ConnectionRefusedError(111, "refused")))
    assert virtual.health(4.0).level == "down"
    wire.say("/api/version", b"<html>")
    assert virtual.health(4.0).level == "down"


# --- where it connects -----------------------------------------------------------------------------------------------


def test_proxies_of_the_environment_are_ignored_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A screenshot does not travel through a proxy to come back to this machine."""
    with serving(http(LOADED)) as proxy, serving(http(ps())) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("no_proxy", "")
        assert client(server).residency(5.0).answer is Answer.NO
        assert proxy.visits == []


def test_a_netrc_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials come from the URL and from nowhere else."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hidden\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serving(http(ps())) as server:
        client(server).residency(5.0)
        assert server.visits[0].header("Authorization") is None


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_localhost_is_tried_in_both_families() -> None:
    """A server on ::1 only is found under the name localhost."""
    try:
        server = RawServer(lambda visit: visit.send(http(ps())), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with server:
        assert client(f"http://[::1]:{server.port}").residency(5.0).answer is Answer.NO
        names = {info[4][0] for info in socket.getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)}
        if "::1" in names:
            assert client(f"http://localhost:{server.port}").residency(5.0).answer is Answer.NO


def test_a_local_name_that_leads_elsewhere_is_not_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a name resolves to is looked at, not only the name."""
    for address, url in [
        ("10.0.0.1", "http://localhost:1"),
        ("169.254.169.254", "http://ollama.example:1"),
        ("::ffff:169.254.169.254", "http://ollama.example:1"),
        ("100.100.100.200", "http://ollama.example:1"),
        ("fd00:ec2::254", "http://ollama.example:1"),
        ("0.0.0.0", "http://ollama.example:1"),
    ]:
        info = [(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 1))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, info=info, **__: info)
        manager = client(url, allow_remote=True)
        with pytest.raises(OllamaUnavailable, match="no Ollama may be"):
            manager.unload_model(timeout_s=2.0)
        assert not manager.residency(2.0).refused


def test_a_resolver_that_hangs_does_not_hold_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's resolver knows no deadline."""
    release = threading.Event()

    def getaddrinfo(*_: object, **__: object) -> list[Any]:
        release.wait(30)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    watch = Stopwatch()
    manager = client("http://ollama.example:1", allow_remote=True)
    try:
        assert manager.residency(0.5).answer is Answer.UNKNOWN
        with pytest.raises(OllamaUnavailable):
            manager.unload_model(timeout_s=0.5)
    finally:
        release.set()
    assert watch.s < 10.0


def test_the_path_of_the_url_is_kept() -> None:
    """Ollama behind a prefix."""
    with serving(http(ps())) as server:
        client(server.url + "/ollama/").residency(5.0)
        client("http://0.0.0.0:" + str(server.port)).residency(5.0)
        assert [visit.line for visit in server.visits] == ["GET /ollama/api/ps", "GET /api/ps"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody has signed but itself."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*make.split(), *names], check=True, capture_output=True)
    return key, cert


def test_tls_is_verified_and_an_own_authority_is_allowed(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no switch to turn it off."""
    key, cert = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with RawServer(lambda visit: visit.send(http(ps())), tls=context) as server:
        monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
        monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
        with pytest.raises(OllamaUnavailable, match="not trusted"):
            client(server).unload_model(timeout_s=10.0)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(cert))
        assert client(server).residency(10.0).answer is Answer.NO


def test_a_load_over_tls_is_aborted_too(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS replaces the socket object; the connection is the same."""
    key, cert = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(cert))
    with RawServer(Visit.hang, tls=context) as server:
        interrupt = Interrupt()

        def stop() -> None:
            server.wait_for_visits(1)
            interrupt.set()

        thread = threading.Thread(target=stop)
        thread.start()
        with pytest.raises(LoadAborted):
            load(client(server), 60.0, interrupt=interrupt)
        thread.join()


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_credentials_with_escapes_arrive_as_they_are_meant() -> None:
    """Percent-encoding belongs to the URL, not to the password."""
    with serving(http(ps())) as server:
        client(server.url.replace("://", "://me%40home:p%3A%20w%C3%A9@")).residency(5.0)
        header = server.visits[0].header("Authorization") or ""
    assert base64.b64decode(header.removeprefix("Basic ")).decode() == "me@home:p: wé"


# --- the end ---------------------------------------------------------------------------------------------------------


def test_close_ends_what_is_in_flight_and_refuses_what_comes_later() -> None:
    """And sends nothing."""
    with serving(Visit.hang) as server:
        manager = client(server)
        met: list[BaseException] = []

        def run() -> None:
            try:
                ask(manager, 60.0)
            except ManagerClosed as error:
                met.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        server.wait_for_visits(1)
        manager.close()
        manager.close()
        thread.join(10)
        assert len(met) == 1
        with pytest.raises(ManagerClosed):
            load(manager)
        assert manager.residency(1.0).answer is Answer.UNKNOWN
        assert len(server.visits) == 1


def test_nothing_is_left_open() -> None:
    """No socket, no timer, no thread after a call, however it ended."""
    before = threading.active_count()
    descriptors = Path("/proc/self/fd")
    with serving(http(ps()), b"", http(LOADED, length=999), Visit.hang) as server:
        manager = client(server)
        manager.residency(5.0)
        opened = len(list(descriptors.iterdir())) if descriptors.exists() else 0
        for _ in range(6):
            manager.residency(0.2)
        for visit in server.wait_for_visits(7)[3:]:
            assert visit.gone.wait(10)
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(10)
    assert threading.active_count() <= before
    if opened:
        assert len(list(descriptors.iterdir())) <= opened
