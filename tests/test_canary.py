"""A password in Ollama's URL, driven through everything: it goes into one header and nowhere else."""

from __future__ import annotations

import base64
import json
import logging
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from gpu_fsm import GPUResourceManager
from gpu_fsm.cli import main
from gpu_fsm.errors import ConfigError, GPUFSMError
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.settings import GPUResourceConfig, load_config
from gpu_fsm.simulation import KINDS, VLM, RunningClock, SimulatedModel, SimulatedOllama, SimulatedWorld, serve
from tests.ollama_clients import CANARY, LOADED, ask, client, load
from tests.raw_server import Visit, http, serving

pytestmark = pytest.mark.core

ENCODED = base64.b64encode(f"me:{CANARY}".encode()).decode()
ECHO = f"you sent Basic {ENCODED}, that is me:{CANARY}"
WITH_PASSWORD = f"://me:{CANARY}@"


def spoken(error: BaseException) -> Iterator[str]:
    """Everything an error can be made to say, its causes included."""
    yield "".join(traceback.format_exception(error))
    seen: BaseException | None = error
    while seen is not None:
        yield repr(seen) + str(seen) + repr(vars(seen))
        request = getattr(seen, "request", None)
        if request is not None:
            yield repr(request.headers) + str(dict(request.headers)) + str(request.url)
        seen = seen.__cause__ or seen.__context__


class Ears:
    """Everything that was said, from wherever."""

    def __init__(self, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
        self._caplog, self._capsys = caplog, capsys
        self.said: list[str] = []
        caplog.set_level(logging.DEBUG)
        for name in ("urllib3", "requests", "gpu_fsm"):
            logging.getLogger(name).setLevel(logging.DEBUG)

    def hear(self, *things: object) -> None:
        """Take down how things show themselves."""
        for thing in things:
            self.said += [repr(thing), str(thing), f"{thing}"]

    def attempt(self, act: Callable[[], object]) -> None:
        """Do something, and take down its result or its error."""
        try:
            self.hear(act())
        except GPUFSMError as error:
            self.said.extend(spoken(error))

    def manager(self, manager: GPUResourceManager) -> None:
        """Take down all that a manager shows."""
        status = manager.get_status()
        self.hear(manager, status, status.to_dict(), manager.config, attrs.asdict(manager.config), vars(manager))
        self.hear(*manager.journal, *(attrs.asdict(record) for record in manager.journal))
        self.said.append(json.dumps(status.to_dict()))
        self.said.extend(manager.explain(mode) for mode in ("idle", "recording", "autopilot"))

    def check(self) -> None:
        """0 occurrences."""
        captured = self._capsys.readouterr()
        logged = [repr(vars(record)) for record in self._caplog.records]
        everything = "\n".join([*self.said, self._caplog.text, *logged, captured.out, captured.err])
        assert everything.strip()
        for secret in (CANARY, ENCODED):
            assert everything.count(secret) == 0


@pytest.fixture
def ears(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> Iterator[Ears]:
    """Listens to logs, streams, results and errors, and is deaf to nothing at the end."""
    levels = {name: logging.getLogger(name).level for name in ("urllib3", "requests", "gpu_fsm")}
    ears = Ears(caplog, capsys)
    yield ears
    ears.check()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


FAILURES: dict[str, bytes | Callable[[Visit], None]] = {
    "500 with an echo": http({"error": ECHO}, status=500),
    "503 with an echo": http({"error": ECHO}, status=503),
    "404 with an echo": http({"error": f"model {ECHO} not found"}, status=404),
    "plain 401": http(ECHO, status=401, kind="text/plain"),
    "HTML 500": http(ECHO, status=500, kind="text/html"),
    "content type": http("x", kind=f"text/{ENCODED}"),
    "redirect": http(b"", status=302, headers=f"Location: http://me:{CANARY}@127.0.0.1/\r\n"),
    "error in a 200": http({"error": ECHO, "done": False}),
    "cut": http(LOADED, length=9999),
    "nothing": b"",
    "reset": Visit.reset,
    "bad number": http({"models": [{"name": "a", "size": -1, "note": ECHO}]}),
    "odd model": http({"models": [{"name": ECHO, "size": 1}]}),
    "odd expiry": http({"models": [{"name": "tiny-a", "size": 1, "expires_at": ECHO}]}),
    "odd reason": http(LOADED | {"done_reason": ECHO}),
    "odd version": http({"version": ECHO}),
    "not HTTP": ECHO.encode() + b"\r\n",
    "broken JSON": http(ECHO),
    "broken head": f"HTTP/1.1 200 OK\r\n{ECHO}\r\nContent-Length: 2\r\n\r\n{{}}".encode(),
    "broken status": f"HTTP/1.1 {ECHO}\r\n\r\n".encode(),
    "reason": f"HTTP/1.1 500 {ECHO}\r\nContent-Length: 0\r\n\r\n".encode(),
    "version": f"{ECHO.replace(' ', '')}/1.1 200 OK\r\n\r\n".encode(),
    "length": f"HTTP/1.1 200 OK\r\nContent-Length: {ECHO}\r\n\r\n{{}}".encode(),
    "lengths": f"HTTP/1.1 200 OK\r\nContent-Length: 2, {ECHO}\r\n\r\n{{}}".encode(),
    "chunk size": f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{ECHO}\r\n".encode(),
    "encoding": f"HTTP/1.1 200 OK\r\nContent-Encoding: {ECHO}\r\nContent-Length: 2\r\n\r\n{{}}".encode(),
    "cookie": f"HTTP/1.1 200 OK\r\nSet-Cookie: {ECHO}=;=\r\nContent-Length: 2\r\n\r\n{{}}".encode(),
    "not UTF-8": http(b"\xff" + ECHO.encode()),
}


@pytest.mark.parametrize("failure", [*FAILURES, "refused"])
def test_the_client_never_shows_it(failure: str, ears: Ears) -> None:
    """Through every call, also where the server says it back."""

    def drive(url: str) -> None:
        manager = client(url.replace("://", WITH_PASSWORD), vlm_load_retries=1, retry_base_s=0.0)
        ears.hear(manager, manager.url, vars(manager), vars(manager._endpoint))
        acts: list[Callable[[], object]] = [
            lambda: manager.residency(5.0),
            lambda: manager.catalog(5.0),
            lambda: manager.health(5.0),
            lambda: load(manager),
            lambda: manager.unload_model(timeout_s=5.0),
            lambda: manager.renew(keep_alive_s=5, timeout_s=5.0),
            # What the model answers belongs to the caller and is not shown by us.
            lambda: bool(ask(manager)),
            lambda: bool(ask(manager, stream=True)),
            lambda: bool(list(manager.chat([{"role": "user", "content": "x"}], keep_alive_s=5, timeout_s=5.0))),
            manager.close,
        ]
        for act in acts:
            ears.attempt(act)

    if failure == "refused":
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            drive(f"http://127.0.0.1:{unused.getsockname()[1]}")
        return
    with serving(FAILURES[failure]) as server:
        drive(server.url)
        assert {visit.header("Authorization") for visit in server.visits} == {f"Basic {ENCODED}"}
        assert all("@" not in visit.head for visit in server.visits)


def story(manager: GPUResourceManager, ears: Ears) -> None:
    """Everything that a manager can be asked."""
    unsubscribe = manager.subscribe(lambda event: ears.hear(event, event.to_dict(), json.dumps(event.to_dict())))

    def use() -> list[object]:
        with manager.vlm() as vlm:
            return [vlm.generate("x"), list(vlm.stream("x")), vlm.chat([{"role": "user", "content": "x"}])]

    acts: list[Callable[[], object]] = [
        lambda: manager.set_execution_mode("recording"),
        use,
        manager.ensure_vlm_unloaded,
        manager.ensure_vlm_loaded,
        lambda: manager.set_execution_mode("autopilot"),
        lambda: manager.set_execution_mode("idle"),
        manager.migrate_clip_to_cpu,
    ]
    for act in acts:
        ears.attempt(act)
        ears.manager(manager)
    ears.attempt(manager.close)
    ears.manager(manager)
    unsubscribe()


@pytest.mark.parametrize(("op", "kind"), [(op, kind) for op in KINDS for kind in sorted(KINDS[op])])
def test_the_manager_never_shows_it(op: str, kind: str, ears: Ears) -> None:
    """Through every fault of the simulated world; where the fault has a text, the text says it."""
    world = SimulatedWorld()
    said = {"text": ECHO} if kind in ("http_500", "http_503", "http_404", "oom") and op.startswith("ollama") else {}
    world.faults.arm(op, kind, times=None, **said)
    url = f"http://me:{CANARY}@127.0.0.1:11434"
    settings = world.config(ollama_url=url, vlm_load_deadline_s=20, drain_timeout_s=1, unload_deadline_s=5)
    server = OllamaManager(settings, clock=world.clock, transport=world.transport)
    story(GPUResourceManager(settings, **world.ports(server), threaded=False), ears)


@pytest.mark.parametrize("kind", ["none", "http_500", "html", "truncated", "before", "oom"])
def test_the_manager_over_real_sockets_never_shows_it(kind: str, ears: Ears) -> None:
    """With all of the HTTP libraries' own logging."""
    clock, world = RunningClock(), SimulatedWorld()
    server = SimulatedOllama([SimulatedModel(name=VLM, size_mib=5000, load_s=0.02)], clock=clock, generate_s=0.01)
    if kind != "none":
        server.faults.arm("ollama.load", kind, times=None, **({"text": ECHO} if kind == "http_500" else {}))
    with serve(server) as front:
        url = front.url.replace("://", WITH_PASSWORD)
        settings = world.config(ollama_url=url, retry_base_s=0.0, clip_model=None, on_partial_offload="accept")
        ours = OllamaManager(settings, clock=clock)
        with GPUResourceManager(settings, vlm_server=ours, vram_probe=world.probe, clock=clock) as manager:
            story(manager, ears)
    clock.close()


def test_a_setting_keeps_it_through_copies_and_hides_it(ears: Ears, tmp_path: Path) -> None:
    """Whole where it is needed, hidden where it is shown, also after a copy of the settings."""
    url = f"http://me:{CANARY}@127.0.0.1:11434"
    once = GPUResourceConfig(ollama_url=url)
    twice = attrs.evolve(once, idle_timeout_s=5.0)
    assert twice.ollama_url.reveal() == url  # type: ignore[attr-defined]
    ears.hear(once, twice, attrs.asdict(twice))
    file = tmp_path / "settings.toml"
    file.write_text(f'[gpu-fsm]\nollama_url = "{url} broken"\n')
    for path, environ in [
        (file, {}),
        (None, {"GPU_FSM_OLLAMA_URL": f"ftp://me:{CANARY}@x"}),
        (None, {"OLLAMA_HOST": f"ftp://me:{CANARY}@x"}),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_config(path, environ)
        ears.said.extend(spoken(caught.value))


URLS = [f"http://me:{CANARY}@127.0.0.1:9", f"http://me:{CANARY}@far.example:80", f"me:{CANARY}@x"]


@pytest.mark.parametrize("url", URLS, ids=["refused", "remote", "no URL"])
def test_the_command_line_never_shows_it(url: str, ears: Ears, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in its errors nor in its JSON."""
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    common = ["run", "--screens", str(tmp_path), "--mode", "recording", "--clip-model", "none", "--json"]
    ears.hear(main([*common, "--ollama-url", url]))
    monkeypatch.setenv("GPU_FSM_OLLAMA_URL", url)
    ears.hear(main(common))
    if url != URLS[0]:
        ears.hear(main(["demo", "--ollama", url, "--json"]))
