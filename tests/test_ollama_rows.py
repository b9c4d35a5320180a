"""What is known to go wrong with Ollama, row by row: one row, one test, and the row stands in the test's id.

Three lists: the server's own errors, the failures that its users report most, and the HTTP part of the fault catalogue.
Where bytes matter the real client reads them from a real socket; where time and memory matter the whole manager runs in
the simulated world.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gpu_fsm import GPUResourceManager
from gpu_fsm.errors import (
    BadArgument,
    ConfigError,
    InsufficientVRAM,
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
    ReleaseUnproven,
    UnloadStuck,
)
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.ports import LoadReport
from gpu_fsm.simulation import VLM, SimulatedWorld
from gpu_fsm.status import Answer, ExecutionMode, State
from tests import worlds
from tests.ollama_clients import LOADED, WallClock, ask, client, config, entry, line, load, part, ps
from tests.raw_server import RawServer, Visit, chunked, http, serving

pytestmark = pytest.mark.core


# --- the server's own errors -----------------------------------------------------------------------------------------

GONE = "llama-server process has terminated: exit status 1: "
Row = tuple[int, str, type[OllamaError], str]
"""Status, the server's text, our class, a word of what to do next."""

ERRORS: dict[str, list[Row]] = {
    "01-body": [
        (400, "missing request body", OllamaRequestRejected, "again"),
        (400, "unexpected EOF", OllamaRequestRejected, "again"),
        (400, "json: cannot unmarshal number into Go struct field .model of type string", OllamaRequestRejected, ""),
    ],
    "02-invalid-model-name": [(400, "invalid model name", OllamaRequestRejected, "vlm_model")],
    "03-model-is-required": [(400, "model is required", OllamaRequestRejected, "vlm_model")],
    "04-no-model": [(404, "model '' not found", ModelNotFound, "ollama pull tiny-a")],
    "05-missing-model": [(404, "model 'tiny-a' not found", ModelNotFound, "ollama pull tiny-a")],
    "06-missing-file": [
        (404, 'model "tiny-a" not found, try pulling it first', ModelNotFound, "ollama pull tiny-a"),
        (500, 'model "tiny-a" not found, try pulling it first', ModelNotFound, "ollama pull tiny-a"),
    ],
    "07-capability": [
        (400, '"tiny-a" does not support generate', OllamaRequestRejected, "cannot do this"),
        (400, '"tiny-a" does not support chat', OllamaRequestRejected, "cannot do this"),
        (400, '"tiny-a" does not support thinking', OllamaRequestRejected, "cannot do this"),
        (400, "registry.ollama.ai/library/tiny-a:latest does not support insert", OllamaRequestRejected, "cannot"),
    ],
    "08-bad-image": [(400, "illegal base64 data at input byte 0", OllamaRequestRejected, "PNG")],
    "09-image-to-a-text-model": [
        (
            400,
            '{"error":{"code":400,"message":"Multimodal data provided, but model does not support multimodal requests."}}',  # noqa: E501
            OllamaRequestRejected,
            "vision model",
        )
    ],
    "10-cloud": [(403, "ollama cloud is disabled: remote model is unavailable", OllamaRequestRejected, "local model")],
    "11-client-gone": [(499, "request canceled", OllamaUnavailable, "close")],
    "12-option-type": [(500, 'option "num_ctx" must be of type integer', OllamaRequestRejected, "vlm_options")],
    "13-runner-died-loading": [
        (500, GONE + "error loading model", LoadFailed, "log"),
        (500, "llama-server process has terminated: signal: killed", LoadFailed, "log"),
        (500, "llama runner process has terminated with exit code -1", LoadFailed, "log"),
    ],
    "14-out-of-memory-on-load": [
        (
            500,
            GONE + "ggml_aligned_malloc: insufficient memory\nfailed to allocate buffer for kv cache",
            LoadOutOfMemory,
            "num_ctx",
        ),
        (500, GONE + "cudaMalloc failed: out of memory", LoadOutOfMemory, "num_ctx"),
    ],
    "15-out-of-memory-before-exit": [
        (500, "llama-server reported out-of-memory during startup: x", LoadOutOfMemory, "num_ctx")
    ],
    "16-system-memory-up-to-0.24": [
        (500, "model requires more system memory (95.4 GiB) than is available (22.4 GiB)", LoadOutOfMemory, "memory")
    ],
    "17-load-stalled": [
        (500, "timed out waiting for llama-server to start - x", LoadFailed, "OLLAMA_LOAD_TIMEOUT"),
        (500, "timed out waiting for llama runner to start - progress 0.00 - ", LoadFailed, "OLLAMA_LOAD_TIMEOUT"),
    ],
    "18-runner-killed-generating": [
        (500, "an error was encountered while running the model: unexpected EOF", LoadFailed, "log"),
        (500, "model runner has unexpectedly stopped, this may be due to resource limitations", LoadFailed, "log"),
    ],
    "20-no-embeddings": [
        (501, "This server does not support embeddings. Start it with `--embeddings`", OllamaRequestRejected, "cannot"),
        (500, "This server does not support embeddings. Start it with `--embeddings`", OllamaRequestRejected, "cannot"),
    ],
    "21-queue-full": [
        (503, "server busy, please try again.  maximum pending requests exceeded", OllamaBusy, "OLLAMA_MAX_QUEUE")
    ],
    "22-no-full-load-on-the-gpu": [(500, "unable to load full model on GPU", LoadOutOfMemory, "memory")],
}


@pytest.mark.parametrize("row", ERRORS, ids=[f"1.8-{row}" for row in ERRORS])
def test_each_error_of_the_server_has_its_class(row: str) -> None:
    """One class, the server's text, what to do next, and a retry neither where it is useless nor missing where not."""
    for status, text, error, remedy in ERRORS[row]:
        with serving(http({"error": text}, status=status)) as server:
            with pytest.raises(OllamaError) as caught:
                load(client(server, vlm_load_retries=0))
            url = server.url
        met = caught.value
        assert type(met) is error
        assert (met.status, met.url, met.model) == (status, url, "tiny-a")
        said = text if not text.startswith("{") else "Multimodal data provided, but model does not support multimodal"
        assert met.text.startswith(said[:100].split("\n")[0])
        assert remedy in met.remedy
        assert met.remedy
        assert "\n" not in str(met)
        assert met.retryable == issubclass(error, OllamaBusy | OllamaUnavailable | LoadFailed)


@pytest.mark.parametrize(
    "texts",
    [("an error was encountered while running the model: unexpected EOF", GONE + "x")],
    ids=["1.8-19-error-in-a-stream"],
)
def test_an_error_after_the_first_part_of_a_stream_is_an_error(texts: tuple[str, ...]) -> None:
    """The status is 200 by then and stays so."""
    for text in texts:
        with serving(chunked(part("a"), line({"error": text}))) as server:
            answers = client(server).generate("x", keep_alive_s=1, timeout_s=10.0, stream=True)
            assert next(answers).text == "a"
            with pytest.raises(LoadFailed) as caught:
                next(answers)
        assert (caught.value.status, caught.value.text) == (200, text.strip())


def test_a_stream_that_ends_before_its_last_part_is_an_error() -> None:
    """So Ollama ends what repeats itself for ever: neatly, and with half of an answer."""
    with serving(chunked(part("and "), part("and "))) as server:
        parts = client(server).generate("x", keep_alive_s=60, timeout_s=5.0, stream=True)
        with pytest.raises(OllamaProtocolError, match="without its last part"):
            list(parts)


def test_a_stream_that_has_fallen_silent_ends_when_the_client_is_closed() -> None:
    """And the server sees its connection go."""

    def say_half(visit: Visit) -> None:
        visit.send(chunked(part("and "))[: -len(b"0\r\n\r\n")])
        visit.hang()

    with RawServer(say_half) as server:
        manager = client(server)
        parts = manager.generate("x", keep_alive_s=60, timeout_s=60.0, stream=True)
        assert next(parts).text == "and "
        closing = threading.Timer(0.1, manager.close)
        closing.start()
        with pytest.raises(ManagerClosed):
            next(parts)
        closing.join()
        assert server.wait_for_visits(1)[0].gone.wait(10)


# --- what the rows of the other two lists need ------------------------------------------------------------------------

REPORTED: dict[str, Callable[[], None]] = {}
CATALOGUE: dict[str, Callable[[], None]] = {}


MADE: list[tuple[SimulatedWorld, GPUResourceManager]] = []


def inline(world: SimulatedWorld, **settings: Any) -> GPUResourceManager:
    """A manager that is driven by whoever waits, and closed when the test is over."""
    manager = worlds.inline(world, **settings)
    MADE.append((world, manager))
    return manager


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while MADE:
        world, manager = MADE.pop()
        world.faults.heal()
        manager.close()


def row(rows: dict[str, Callable[[], None]], name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Put a test under the row's name."""

    def put(test: Callable[[], None]) -> Callable[[], None]:
        assert name not in rows
        rows[name] = test
        return test

    return put


def recording(manager: GPUResourceManager) -> str:
    """Ask for RECORDING; the reason's code, or nothing where it was granted."""
    outcome = manager.set_execution_mode("recording")
    return outcome.reason.code if outcome.reason else ""


def autopilot(manager: GPUResourceManager) -> str:
    """Ask for AUTOPILOT; the reason's code, or nothing where it was granted."""
    outcome = manager.set_execution_mode("autopilot")
    return outcome.reason.code if outcome.reason else ""


def requests_of(world: SimulatedWorld, op: str = "") -> list[Any]:
    """What we asked the server, without the looks."""
    return [e for e in world.ollama.log if e.client == "us" and e.op.startswith(op) and e.method == "POST"]


def ours_seen(world: SimulatedWorld) -> OllamaManager:
    """A client of its own, to look with."""
    return OllamaManager(world.config(), clock=world.clock, transport=world.transport)


# --- the failures that users report most ------------------------------------------------------------------------------


@row(REPORTED, "01-stopping-for-ever")
def _stopping() -> None:
    """The unload is bounded, says what is wrong, and CLIP does not go up into memory that is not free."""
    world = SimulatedWorld(generate_s=1e6)
    manager = inline(world, unload_deadline_s=10)
    assert recording(manager) == ""
    world.ollama.foreign_generate(VLM)
    started = world.clock.monotonic()
    with pytest.raises(UnloadStuck, match="still lists"):
        manager.ensure_vlm_unloaded()
    assert world.clock.monotonic() - started < 60
    assert world.clip.place == "cpu"


@row(REPORTED, "02-gpu-not-used-after-suspend")
def _suspend() -> None:
    """The runner has died with the driver and comes back on the CPU: seen at the next load, and told."""
    world = SimulatedWorld()
    manager = inline(world, recover_base_s=1000, recover_cap_s=1000)
    assert recording(manager) == ""
    world.ollama.kill_runner()
    world.ollama.foreign_unload(VLM)
    world.ollama.card = None
    manager.drive_for(120)
    status = manager.get_status()
    assert (status.state, status.reason.code if status.reason else "") == (State.DEGRADED, "gpu_not_used")


@row(REPORTED, "03-container-loses-the-gpu")
def _container() -> None:
    """size_vram is looked at on every load; a user who accepts the CPU gets it, and the status says so."""
    world = SimulatedWorld()
    world.ollama.card = None
    assert recording(inline(world)) == "gpu_not_used"
    accepting = SimulatedWorld()
    accepting.ollama.card = None
    manager = inline(accepting, on_partial_offload="accept")
    assert recording(manager) == ""
    assert manager.get_status().vlm_size_vram_mib == 0


@row(REPORTED, "04-ps-says-gpu-and-the-card-does-not")
def _false_hundred() -> None:
    """Without matching bytes on the card the residency is only reported, never measured."""
    world = SimulatedWorld()
    world.ollama.card = None
    listing = world.ollama._listing
    world.ollama._listing = lambda r: listing(r) | {"size_vram": listing(r)["size"]}  # type: ignore[method-assign]
    manager = inline(world)
    code = recording(manager)
    assert code in ("", "gpu_not_used")
    assert manager.get_status().evidence != "measured"


@row(REPORTED, "05-memory-comes-back-late")
def _late() -> None:
    """Our own wait on the driver: nothing of ours is put where memory only seems free."""
    for reclaim_s in (0.0, 0.3, 2.5, 5.5):
        world = SimulatedWorld(reclaim_s=reclaim_s, vlm_mib=7000)
        manager = inline(world)
        assert recording(manager) == ""
        assert autopilot(manager) == ""
        gone = max(c.at for c in world.card.history if c.owner.startswith("ollama"))
        clip = [c.at for c in world.card.history if c.owner.startswith("clip") and c.at > 0.01]
        assert min(clip) >= gone


@row(REPORTED, "06-a-timeout-that-kills-the-load")
def _impatient() -> None:
    """A load lives as long as its deadline lets it, whoever has stopped waiting for it, and looks do not disturb it."""
    world = SimulatedWorld(vlm_load_s=300)
    manager = inline(world)
    waiting = manager.submit_execution_mode("recording")
    waiting.cancel()
    manager.drive_for(400)
    assert manager.get_status().state is State.RECORDING
    assert (world.ollama.counts["loads"], world.ollama.counts["load_aborts"]) == (1, 0)
    (sent,) = requests_of(world, "ollama.load")
    assert sent.ended_at is not None
    assert sent.ended_at - sent.at == pytest.approx(300, abs=1)


@row(REPORTED, "07-load-stalls")
def _stall() -> None:
    """The server's own stall limit is a failed load that names its setting."""
    text = "timed out waiting for llama-server to start - x"
    with serving(http({"error": text}, status=500)) as server, pytest.raises(LoadFailed) as caught:
        load(client(server, retry_base_s=0.0))
    assert caught.value.attempts == 4
    assert "OLLAMA_LOAD_TIMEOUT" in caught.value.remedy


@row(REPORTED, "08-orphaned-runner")
def _orphan() -> None:
    """Ps is empty, the memory is taken: the refusal names who holds it."""
    world = SimulatedWorld()
    manager = inline(world, on_shortage="refuse")
    assert recording(manager) == ""
    world.ollama.stop(kill=True)
    world.ollama.start()
    with pytest.raises(InsufficientVRAM) as caught:
        manager.set_execution_mode("recording")
    assert any("llama-server" in holder for holder in caught.value.holders)


@row(REPORTED, "09-deleted-while-loaded")
def _deleted() -> None:
    """404 to an unload is a success only where ps does not list the model."""
    world = SimulatedWorld()
    server = ours_seen(world)
    load(server, 60.0)
    world.ollama.request("DELETE", "/api/delete", {"model": VLM})
    world.clock.advance(1)
    server.unload_model(timeout_s=2.0)
    world.clock.advance(10)
    assert server.residency(2.0).answer is Answer.YES


@row(REPORTED, "10-another-client-evicts-it")
def _evicted() -> None:
    """Re-read, re-assert, no more often than allowed."""
    world = SimulatedWorld(models={"game-bot": 6000})
    manager = inline(world)
    assert recording(manager) == ""
    world.ollama.foreign_unload(VLM)
    manager.drive_for(60)
    assert (manager.get_status().state, world.vlm_resident()) == (State.RECORDING, True)
    assert world.ollama.counts["loads"] == 2


@row(REPORTED, "11-keep-alive-as-text")
def _text() -> None:
    """Numbers go out, and text is refused before it does."""
    with serving(http(LOADED), http(ps(entry("tiny-a:latest")))) as server:
        manager = client(server)
        with pytest.raises(BadArgument):
            manager.renew(keep_alive_s="-1", timeout_s=1.0)  # type: ignore[arg-type]
        load(manager)
        assert server.visits[0].json["keep_alive"] == 360


@row(REPORTED, "12-reload-on-every-request")
def _same_options() -> None:
    """One runner for load, inference and renewal."""
    world = SimulatedWorld()
    manager = inline(world, vlm_options={"num_ctx": 8192, "num_gpu": 99}, idle_timeout_s=30)
    assert recording(manager) == ""
    for _ in range(3):
        with manager.vlm() as vlm:
            vlm.generate("x")
            vlm.chat([{"role": "user", "content": "x"}])
        manager.drive_for(20)
    assert (world.ollama.counts["loads"], world.ollama.counts["reloads"]) == (1, 0)


@row(REPORTED, "13-another-process-takes-the-memory")
def _taken() -> None:
    """In the middle of the load: out of memory, told as such, and nothing more is acquired for it."""
    world = SimulatedWorld()
    manager = inline(world, vlm_options={"num_gpu": 99})
    world.on_io.append(
        lambda op, phase: world.card.take("game", world.card.free_mib) if (op, phase) == MIDDLE else None
    )
    assert recording(manager) == "vram_insufficient"
    assert world.clip.place == "cpu"


MIDDLE = ("ollama.load", "during")


@row(REPORTED, "14-sizes-change-with-releases")
def _measured() -> None:
    """After one load the card's own figure counts, not the setting."""
    world = SimulatedWorld()
    manager = inline(world, vlm_size_mib=1000)
    assert recording(manager) == ""
    manager.ensure_vlm_unloaded()
    status = manager.get_status()
    assert (status.vlm_size_source, status.vlm_size_mib) == ("measured", pytest.approx(5000, rel=0.01))


@row(REPORTED, "15-generation-hangs")
def _hangs() -> None:
    """Inference has its own deadline; green version and tags prove nothing."""
    world = SimulatedWorld()
    manager = inline(world)
    assert recording(manager) == ""
    world.faults.arm("ollama.generate", "hang")
    started = world.clock.monotonic()
    with manager.vlm() as vlm, pytest.raises(OllamaTimeout):
        vlm.generate("x", timeout_s=5)
    assert world.clock.monotonic() - started == pytest.approx(5, abs=0.1)
    assert ours_seen(world).health(4.0).level == "up"


@pytest.mark.parametrize("row", REPORTED, ids=[f"7-{row}" for row in REPORTED])
def test_each_reported_failure_is_met(row: str) -> None:
    """As users of Ollama report it; the row's own test says what is right."""
    REPORTED[row]()


# --- the HTTP part of the fault catalogue -----------------------------------------------------------------------------


@row(CATALOGUE, "A01-refused-at-start")
def _refused() -> None:
    """DEGRADED with the reason, CLIP usable, and the asked mode once it listens."""
    world = SimulatedWorld()
    world.ollama.stop()
    manager = inline(world)
    assert recording(manager) == "ollama_unreachable"
    with manager.clip() as clip:
        assert len(clip.encode(["a"])) == 1
    world.ollama.start()
    manager.drive_for(120)
    assert manager.get_status().state is State.RECORDING
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(OllamaUnavailable, match="refused"):
            client(f"http://127.0.0.1:{unused.getsockname()[1]}").unload_model(timeout_s=2.0)


@row(CATALOGUE, "A02-connection-reset-in-a-load")
def _reset() -> None:
    """Another try inside the budget, then the server's text in the reason."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with serving(head, Visit.reset, http(LOADED), http(ps(entry("tiny-a")))) as server:
        assert load(client(server, retry_base_s=0.0)).attempts == 3
    world = SimulatedWorld()
    world.faults.arm("ollama.load", "runner_dies", times=None)
    manager = inline(world)
    assert recording(manager) == "load_failed"
    assert "signal: killed" in str(manager.get_status().reason)
    assert world.ollama.counts["load_failures"] == 4


@row(CATALOGUE, "A03-our-timeout-aborts-the-load")
def _patience() -> None:
    """A load may take as long as the server itself allows, and memory settles before another try."""
    assert config().vlm_load_deadline_s >= 300
    world = SimulatedWorld(vlm_load_s=299, reclaim_s=3)
    world.faults.arm("ollama.load", "oom")
    manager = inline(world, vlm_load_deadline_s=600)
    assert recording(manager) == ""
    assert world.ollama.counts["load_aborts"] == 0
    assert [e.status for e in requests_of(world, "ollama.load")] == [500, 200]
    assert world.ollama.resident_mib(VLM) == 5000
    assert max(change.used_mib for change in world.card.history) < 6000


@row(CATALOGUE, "A04-load-hangs-behind-green-health")
def _hanging_load() -> None:
    """The deadline ends it; a green ps does not clear it, a load that ends does."""
    world = SimulatedWorld()
    world.faults.arm("ollama.load", "hang", times=None)
    manager = inline(world, vlm_load_deadline_s=30)
    assert recording(manager) == "load_stalled"
    assert ours_seen(world).health(4.0).level == "up"
    manager.drive_for(100)
    assert manager.get_status().execution_mode is ExecutionMode.DEGRADED
    world.faults.heal()
    manager.drive_for(200)
    assert manager.get_status().state is State.RECORDING
    with serving(Visit.hang) as server, pytest.raises(LoadTimeout):
        load(client(server), 0.2)


@row(CATALOGUE, "A05-options-differ-between-calls")
def _one_options_object() -> None:
    """Byte-identical options in everything that needs the runner."""
    world = SimulatedWorld()
    manager = inline(world, vlm_options={"num_ctx": 8192}, idle_timeout_s=30)
    assert recording(manager) == ""
    with manager.vlm() as vlm:
        vlm.generate("x")
        list(vlm.stream("x"))
        manager.drive_for(40)
        vlm.chat([{"role": "user", "content": "x"}])
    kinds = {e.op for e in requests_of(world)}
    assert {"ollama.load", "ollama.generate"} <= kinds
    assert {str(e.body.get("options")) for e in requests_of(world) if e.op != "ollama.unload"} == {"{'num_ctx': 8192}"}


@row(CATALOGUE, "A06-cuda-out-of-memory")
def _oom() -> None:
    """Memory settles, one more try, then the figures."""
    world = SimulatedWorld()
    world.faults.arm("ollama.load", "oom", times=None)
    manager = inline(world)
    assert recording(manager) == "vram_insufficient"
    assert len(requests_of(world, "ollama.load")) == 2
    world.faults.heal()
    manager.drive_for(200)
    assert manager.get_status().state is State.RECORDING


@row(CATALOGUE, "A07-busy")
def _busy() -> None:
    """Tried again inside the deadline; busy is not down."""
    world = SimulatedWorld()
    world.faults.arm("ollama.load", "http_503", times=3)
    manager = inline(world)
    assert recording(manager) == ""
    assert len(requests_of(world, "ollama.load")) == 4
    busy = http({"error": "server busy, please try again.  maximum pending requests exceeded"}, status=503)
    with serving(busy) as server, pytest.raises(OllamaBusy):
        client(server).unload_model(timeout_s=5.0)


@row(CATALOGUE, "A08-model-not-found")
def _not_found() -> None:
    """At the first try, without a second, with the command that mends it."""
    with serving(http({"error": "model 'tiny-a' not found"}, status=404)) as server:
        with pytest.raises(ModelNotFound, match="ollama pull tiny-a"):
            load(client(server))
        assert len(server.visits) == 1
    world = SimulatedWorld()
    world.ollama.request("DELETE", "/api/delete", {"model": VLM})
    manager = inline(world)
    assert recording(manager) == "model_not_found"
    assert requests_of(world, "ollama.load") == []
    assert "ollama pull" in str(manager.get_status().reason)


@row(CATALOGUE, "A09-html-from-a-proxy")
def _html() -> None:
    """Told as what it is, whatever its status."""
    for status in (200, 500, 502, 503):
        with serving(http("<html>Log in</html>", status=status, kind="text/html")) as server:
            with pytest.raises(OllamaProtocolError, match="text/html"):
                client(server).unload_model(timeout_s=5.0)
            assert client(server).residency(5.0).answer is Answer.UNKNOWN


@row(CATALOGUE, "A10-truncated")
def _truncated() -> None:
    """A cut at any byte is a failure that another try may mend; half a list is no list."""
    whole, seen = http(LOADED), http(ps(entry("tiny-a")))
    for cut in range(0, len(whole), 7):
        with serving(whole[:cut], whole, seen) as server:
            assert load(client(server, retry_base_s=0.0)).attempts == 2


@row(CATALOGUE, "A11-error-in-a-200")
def _error_in_200() -> None:
    """In a whole answer and in the middle of a stream."""
    text = "CUDA error: out of memory"
    with serving(http({"error": text})) as server, pytest.raises(LoadOutOfMemory, match=text):
        load(client(server, vlm_load_retries=0))
    with serving(chunked(part("a"), line({"error": text}))) as server, pytest.raises(LoadOutOfMemory, match=text):
        ask(client(server), stream=True)


@row(CATALOGUE, "A13-very-slow-body")
def _slow() -> None:
    """A byte now and then keeps no call alive."""

    def drip(visit: Visit) -> None:
        visit.send(http(b"", length=10**9))
        visit.drip(b" ", 0.02)

    with serving(drip) as server, pytest.raises(OllamaTimeout):
        client(server).unload_model(timeout_s=0.3)


@row(CATALOGUE, "A14-redirect")
def _redirect() -> None:
    """Never followed: neither a picture nor credentials go where somebody else says."""
    with serving(http(LOADED)) as elsewhere:
        for status in (301, 302, 303, 307, 308):
            answer = http(b"", status=status, headers=f"Location: {elsewhere.url}/api/generate\r\n")
            with serving(answer) as server, pytest.raises(OllamaProtocolError, match="not followed"):
                load(client(server.url.replace("://", "://me:hidden@"), vlm_load_retries=0))
        assert elsewhere.visits == []


@row(CATALOGUE, "A15-listed-while-loading")
def _listed_early() -> None:
    """Ready is the load's own answer and ps; a ps that is blocked during our load is not "down"."""
    world = SimulatedWorld(version="0.24", vlm_load_s=8)
    server = ours_seen(world)
    world.ollama.foreign_load(VLM)
    world.clock.advance(3)
    assert server.residency(2.0).answer is Answer.YES
    report: LoadReport = load(server, 60.0)
    assert world.clock.monotonic() >= 8
    assert report.model is not None
    assert world.vlm_resident()
    blocked = SimulatedWorld()
    blocked.on_io.append(
        lambda op, phase: blocked.faults.arm("ollama.ps", "late", delay_s=6) and None if (op, phase) == MIDDLE else None
    )
    assert recording(inline(blocked)) == ""


@row(CATALOGUE, "A16-loaded-on-the-cpu")
def _on_cpu() -> None:
    """Rejected by default, told with its own code, and not left on the card."""
    world = SimulatedWorld()
    world.faults.arm("ollama.load", "partial", times=None, share=0.0)
    manager = inline(world)
    assert recording(manager) == "gpu_not_used"
    assert not world.vlm_resident()


@row(CATALOGUE, "A17-partial-offload")
def _partial() -> None:
    """Made room for and reloaded once; or degraded at once with both sizes; or accepted."""
    for policy, code, loads in (("reload", "", 2), ("degrade", "gpu_not_used", 1), ("accept", "", 1)):
        world = SimulatedWorld(vlm_mib=7000)
        world.faults.arm("ollama.load", "partial", share=0.9)
        manager = inline(world, on_partial_offload=policy, recover_base_s=1000, recover_cap_s=1000)
        assert recording(manager) == code
        assert world.ollama.counts["loads"] == loads
        if code:
            assert "6300 of 7000 MiB" in str(manager.get_status().reason)


@row(CATALOGUE, "A18-unload-acknowledged-and-not-done")
def _lied_to() -> None:
    """Asked again; then stuck, and CLIP stays on the CPU."""
    world = SimulatedWorld()
    manager = inline(world)
    assert recording(manager) == ""
    world.faults.arm("ollama.unload", "silent", times=2)
    assert autopilot(manager) == ""
    assert len(requests_of(world, "ollama.unload")) == 3
    assert recording(manager) == ""
    world.faults.arm("ollama.unload", "silent", times=None)
    assert autopilot(manager) == "unload_stuck"
    assert world.clip.place == "cpu"


@row(CATALOGUE, "A19-memory-released-late")
def _settle() -> None:
    """Gone is said when 90 % of it is back."""
    for lag_s in (0.0, 0.3, 1.0, 2.5, 5.9):
        world = SimulatedWorld(reclaim_s=lag_s)
        manager = inline(world)
        assert recording(manager) == ""
        held = world.card.used_mib
        manager.ensure_vlm_unloaded()
        assert held - world.card.used_mib >= 0.9 * 5000


@row(CATALOGUE, "A20-memory-never-released")
def _leak() -> None:
    """Unproven, with both figures, and no endless loop; what does not fit is refused with the holders."""
    world = SimulatedWorld(vlm_mib=7000, tells_holders=False)
    manager = inline(world, on_shortage="refuse")
    assert recording(manager) == ""
    world.faults.arm("ollama.unload", "reclaim_never", times=None)
    with pytest.raises(ReleaseUnproven) as caught:
        manager.ensure_vlm_unloaded()
    assert (caught.value.expected_mib, caught.value.returned_mib) == (7000, 0)
    with pytest.raises(InsufficientVRAM):
        manager.set_execution_mode("recording")


@row(CATALOGUE, "A22-our-allocation-in-an-unload")
def _nothing_meanwhile() -> None:
    """Nothing of ours is allocated between the unload request and the memory's return."""
    for card_mib in (6500.0, 16384.0):
        world = SimulatedWorld(card_mib=card_mib, reclaim_s=2.0)
        manager = inline(world)
        assert recording(manager) == ""
        assert autopilot(manager) == ""
        (unload,) = requests_of(world, "ollama.unload")
        back = max(c.at for c in world.card.history if c.owner.startswith("ollama"))
        ours = [c for c in world.card.history if c.owner.startswith("clip") and unload.at < c.at < back]
        assert ours == []


@row(CATALOGUE, "A23-another-client-reloads-it")
def _tug_of_war() -> None:
    """At most three times, then it is somebody else's."""
    world = SimulatedWorld()
    manager = inline(world)
    assert autopilot(manager) == ""
    for _ in range(12):
        if not world.vlm_resident():
            world.ollama.foreign_load(VLM)
        manager.drive_for(20)
    status = manager.get_status()
    assert (status.state, status.reason.code if status.reason else "") == (State.DEGRADED, "external_client")
    assert [record.row for record in manager.journal].count("check-reassert") == 3


@row(CATALOGUE, "A25-deleted-while-resident")
def _deleted_manager() -> None:
    """It cannot be unloaded by name any more; that is stuck, not done."""
    world = SimulatedWorld()
    manager = inline(world)
    assert recording(manager) == ""
    world.ollama.request("DELETE", "/api/delete", {"model": VLM})
    with pytest.raises(UnloadStuck):
        manager.ensure_vlm_unloaded()


@row(CATALOGUE, "A26-names")
def _names() -> None:
    """Every spelling of the name is the model, and no other name is."""
    world = SimulatedWorld(models={"sim-vlm:70b": 500, "sim-vlm": 500})
    for name in ("SIM-VLM:7B", "library/sim-vlm:7b", "registry.ollama.ai/library/Sim-VLM:7b"):
        server = OllamaManager(world.config(vlm_model=name), clock=world.clock, transport=world.transport)
        world.ollama.foreign_load("sim-vlm:70b")
        world.clock.advance(10)
        assert server.residency(2.0).answer is Answer.NO
        assert load(server, 60.0).attempts == 1
        server.unload_model(timeout_s=2.0)
        world.clock.advance(5)
        assert world.ollama.loaded() == ("sim-vlm:70b",)


@row(CATALOGUE, "A27-keep-alive-is-a-number")
def _numbers() -> None:
    """In every request of a whole story."""
    world = SimulatedWorld()
    manager = inline(world, idle_timeout_s=12.5)
    assert recording(manager) == ""
    with manager.vlm() as vlm:
        vlm.generate("x")
        manager.drive_for(100)
    manager.drive_for(100)
    sent = [e.body["keep_alive"] for e in requests_of(world)]
    assert len(sent) >= 4
    assert {type(value) for value in sent} <= {int, float}
    assert all(0 <= value <= 72.5 for value in sent)


@row(CATALOGUE, "A28-native-routes-only")
def _routes() -> None:
    """The compatible routes ignore keep_alive."""
    world = SimulatedWorld()
    manager = inline(world)
    assert recording(manager) == ""
    with manager.vlm() as vlm:
        vlm.chat([{"role": "user", "content": "x"}])
    manager.close()
    assert {e.path for e in world.ollama.log} <= {"/api/generate", "/api/chat", "/api/ps", "/api/tags", "/api/show"}


@row(CATALOGUE, "A30-odd-expiry")
def _expiry() -> None:
    """Shown, never decided from."""
    for text in ("0001-01-01T00:00:00Z", "2026-01-01T00:00:00.123456789-07:00", "2319-03-05T03:10:30.6Z", "", "soon"):
        with serving(http(ps(entry("tiny-a:latest", expires_at=text)))) as server:
            seen = client(server).residency(5.0)
        assert seen.answer is Answer.YES
        assert seen.ours is not None
        assert seen.ours.forever is text.startswith("2319")


@row(CATALOGUE, "A31-gpu-lost-for-ollama")
def _cpu_fallback() -> None:
    """As a load on the CPU: told, and the mend named."""
    world = SimulatedWorld()
    manager = inline(world)
    assert recording(manager) == ""
    assert autopilot(manager) == ""
    world.ollama.card = None
    assert recording(manager) == "gpu_not_used"
    assert manager.get_status().reason is not None


@row(CATALOGUE, "A32-absurd-numbers")
def _absurd() -> None:
    """No number is believed that cannot be, and no more than 1 MiB is read."""
    for body in (
        '{"models": [{"name": "a", "size": NaN}]}',
        '{"models": [{"name": "a", "size": 1e999}]}',
        '{"models": [{"name": "a", "size": -1}]}',
        '{"models": [{"name": "a", "size": %s}]}' % ("9" * 400),
        '{"models": [' + '{"name": "a"},' * 1000 + '{"name": "a"}]}',
        '{"models": [], "filler": "%s"}' % ("x" * (1 << 21)),
    ):
        with serving(http(body)) as server:
            assert client(server).residency(10.0).answer is Answer.UNKNOWN


@row(CATALOGUE, "A33-families-and-bind-addresses")
def _addresses() -> None:
    """0.0.0.0 is dialled as this machine, and a name in both families."""
    with serving(http(ps())) as server:
        assert client(f"http://0.0.0.0:{server.port}").residency(5.0).answer is Answer.NO
        assert client(f"http://localhost:{server.port}").residency(5.0).answer is Answer.NO
    with contextlib.suppress(OSError), RawServer(lambda v: v.send(http(ps())), family=socket.AF_INET6) as server:
        assert client(f"http://[::]:{server.port}").residency(5.0).answer is Answer.NO


@row(CATALOGUE, "A34-cloud-model")
def _cloud() -> None:
    """Refused at construction by its name, and by its entry where only the server knows."""
    for name in ("qwen3-vl:cloud", "gpt-oss:120b-cloud"):
        with pytest.raises(ConfigError):
            OllamaManager(config(vlm_model=name), clock=WallClock())
    with serving(http({"models": [entry("tiny-a:latest", remote_host="https://ollama.com")]})) as server:
        seen = client(server).catalog(5.0)
    assert (seen.present, "cloud" in seen.detail) == (Answer.NO, True)


@row(CATALOGUE, "A35-a-false-200")
def _false_200() -> None:
    """A load that ps does not show is no load; also where another client's load of it is under way."""
    world = SimulatedWorld()
    world.faults.arm("ollama.load", "silent")
    manager = inline(world)
    assert recording(manager) == ""
    assert (world.vlm_resident(), world.ollama.counts["loads"]) == (True, 1)
    twice = SimulatedWorld(vlm_load_s=8)
    twice.ollama.foreign_load(VLM)
    twice.clock.advance(1)
    twice.faults.arm("ollama.load", "silent")
    assert recording(inline(twice)) == ""
    assert twice.vlm_resident()


@pytest.mark.parametrize("row", CATALOGUE)
def test_each_fault_of_the_catalogue_is_met(row: str) -> None:
    """The row's own test says what is right."""
    CATALOGUE[row]()


def test_no_row_is_missing() -> None:
    """The lists are whole."""
    assert [name[:2] for name in REPORTED] == [f"{number:02}" for number in range(1, 16)]
    missing = {12, 21, 24, 29}
    assert [name[:3] for name in CATALOGUE] == [f"A{n:02}" for n in range(1, 36) if n not in missing]
    assert [name[:2] for name in ERRORS] == [f"{n:02}" for n in range(1, 23) if n != 19]  # 19 has a test of its own
