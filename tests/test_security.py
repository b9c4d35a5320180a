"""The promises about security, one row a test: the row's id stands in the test's id.

What has a file of its own (addresses, the password, the client's bytes, weights, the lock) is tested there at length;
here each promise is met once more from outside, where an attacker would stand.  The gateway's rows are its own tests'.
"""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import ssl
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpu_fsm import diagrams
from gpu_fsm.cardlock import CardLock
from gpu_fsm.control import LINE_BYTES, ControlServer
from gpu_fsm.errors import CardHeld, ClipUnavailable, ConfigError, GPUFSMError, OllamaUnavailable
from gpu_fsm.settings import GPUResourceConfig, load_config
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.status import Answer
from tests import worlds
from tests.ollama_clients import CANARY, LOADED, VirtualClock, Wire, client, config, entry, ps
from tests.raw_server import RawServer, Visit, http, serving
from tests.test_real_processes import simulated_ollama
from tests.waiting import PATIENCE_S, run_python

pytestmark = pytest.mark.core


def row(id: str) -> pytest.MarkDecorator:  # noqa: A002
    """Put the row's id into the test's id."""
    return pytest.mark.parametrize((), [pytest.param(id=id)])


# --- S01 to S06: the client -------------------------------------------------------------------------------------------

LOOPBACK = ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "https://127.0.0.1:1", "http://127.8.8.8:1")
ELSEWHERE = ("http://192.168.1.7:11434", "http://ollama.lan", "http://[2001:db8::7]", "http://127.0.0.1.example.com")
NEVER = (
    "file:///etc/passwd",
    "gopher://127.0.0.1",
    "unix:/run/docker.sock",
    "javascript:alert(1)",
    "//127.0.0.1",
    "http:/x",
    "http://169.254.169.254/latest/meta-data",
    "http://[::ffff:a9fe:a9fe]",
    "http://[fe80::1]",
    "http://2852039166",
    "http://0xa9fea9fe",
    "http://0251.0376.0251.0376",
    "http://metadata.google.internal",
    "http://100.100.100.200",
    "http://a@b@c",
    "http://127.0.0.1#@evil.example",
    "http://127.0.0.1\\@evil.example",
    "http://127.0.0.1\r\nHost: evil",
    "http://127.0.0.1\x00.evil.example",
    "http://\u0661\u0662\u0667.0.0.1",
    "http://127.0.0.1:99999",
    "http://127.0.0.1:-1",
    "http://127.0.0.1/?q=1",
    "http://%31%32%37.0.0.1",
    "http://0",
    "http://127.1",
    "http://224.0.0.1",
    "localhost:11434",
    "http://[::1%25eth0]",
    "http://user:pass@",
    "http://\u3002",
    "http://evil\u2024example",
    "",
    " ",
    "http://",
)
"""With a remote server allowed all the same."""


@row("S01-url")
def test_no_address_leads_elsewhere_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback needs no leave, another machine does, and some are never an Ollama."""
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: asked.append(args))
    for url in LOOPBACK:
        GPUResourceConfig(ollama_url=url)
    for url in ELSEWHERE:
        GPUResourceConfig(ollama_url=url, allow_remote=True)
        with pytest.raises(ConfigError):
            GPUResourceConfig(ollama_url=url)
    assert len(NEVER) + len(ELSEWHERE) + len(LOOPBACK) >= 40
    for url in NEVER:
        with pytest.raises(ConfigError):
            GPUResourceConfig(ollama_url=url, allow_remote=True)
    assert asked == [], "judging an address asks nobody"


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("169.254.169.254", id="S01-url-resolves-to-link-local"),
        pytest.param("::ffff:169.254.169.254", id="S01-url-resolves-to-mapped"),
        pytest.param("fe80::1", id="S01-url-resolves-to-link-local-6"),
        pytest.param("0.0.0.0", id="S01-url-resolves-to-nowhere"),
        pytest.param("224.0.0.1", id="S01-url-resolves-to-a-group"),
        pytest.param("100.100.100.200", id="S01-url-resolves-to-metadata"),
        pytest.param("fd00:ec2::254", id="S01-url-resolves-to-metadata-6"),
    ],
)
def test_what_a_name_resolves_to_is_judged_as_an_address_is(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A harmless name whose owner lets it lead to what may never be asked, with another machine allowed."""
    dialled: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, to: dialled.append(to))
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(family, socket.SOCK_STREAM, 6, "", (address, 80))])
    with pytest.raises(OllamaUnavailable):
        client("http://rebound.example", allow_remote=True).unload_model(timeout_s=2.0)
    assert dialled == []


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("192.168.1.7", id="S01-localhost-resolves-to-another-machine"),
        pytest.param("2001:db8::7", id="S01-localhost-resolves-to-another-machine-6"),
    ],
)
def test_localhost_is_this_machine_or_nothing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has allowed another machine, so a spoilt table of hosts must not send screenshots there."""
    dialled: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, to: dialled.append(to))
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(family, socket.SOCK_STREAM, 6, "", (address, 80))])
    with pytest.raises(OllamaUnavailable):
        client("http://localhost:1").unload_model(timeout_s=2.0)
    assert dialled == []


@row("S02-credentials")
def test_a_password_in_the_address_is_not_said_by_a_whole_program() -> None:
    """With every logger at its loudest, on a server that refuses, through status, errors, copies and the exit."""
    with serving(http({"error": f"no, me:{CANARY}"}, status=500)) as server:
        url = server.url.replace("://", f"://me:{CANARY}@")
        said = run_python(
            "import copy, logging, pickle, sys, traceback\n"
            "logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)\n"
            "from gpu_fsm import GPUResourceConfig, GPUResourceManager\n"
            "from gpu_fsm.ollama import OllamaManager\n"
            "from gpu_fsm.ports import RealClock\n"
            f"config = GPUResourceConfig(ollama_url={url!r}, clip_model=None, retry_base_s=0, vlm_load_retries=1,\n"
            "    unload_deadline_s=0.3, shed_deadline_s=0.3, observe_timeout_s=0.3, settle_timeout_s=0.1)\n"
            "manager = GPUResourceManager(config)\n"
            "manager.subscribe(print)\n"
            "client = OllamaManager(config, clock=RealClock())\n"
            "print(client, client.url, client.residency(1))\n"
            "for call in (lambda: manager.set_execution_mode('recording', timeout_s=20), manager.ensure_vlm_loaded,\n"
            "        lambda: client.unload_model(timeout_s=1)):\n"
            "    try:\n        print(call())\n"
            "    except Exception as error:\n"
            "        traceback.print_exc(file=sys.stdout)\n"
            "        print(repr(pickle.loads(pickle.dumps(error))), vars(error))\n"
            "print(config, copy.deepcopy(config), vars(manager), manager.get_status().to_dict(), manager.journal)\n"
        )
        assert server.visits
        assert server.visits[0].header("Authorization") is not None
    assert "Basic" not in said
    assert CANARY not in said
    assert len(said) > 1000


@row("S03-proxies")
def test_a_proxy_of_the_environment_sees_nothing_of_loopback() -> None:
    """A whole program, and a proxy that records; the letters' case does not matter."""
    with serving(http(LOADED)) as proxy, serving(http(ps(entry("tiny-a:latest")))) as server:
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
        run_python(
            "from gpu_fsm import GPUResourceConfig\nfrom gpu_fsm.ollama import OllamaManager\n"
            "from gpu_fsm.ports import RealClock\n"
            f"config = GPUResourceConfig(ollama_url={server.url!r}, vlm_model='tiny-a')\n"
            "server = OllamaManager(config, clock=RealClock())\n"
            "assert server.residency(5.0).answer.value == 'yes'\nserver.unload_model(timeout_s=5.0)\n",
            env=dict.fromkeys(names, proxy.url) | {"NO_PROXY": "", "no_proxy": ""},
        )
        assert proxy.visits == []
        assert len(server.visits) == 2


@row("S04-tls")
def test_nothing_turns_the_check_of_certificates_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting has such a name, and the switches that other programs know do nothing here."""
    names = [field.name for field in attrs.fields(GPUResourceConfig)]
    assert not [name for name in names if any(word in name for word in ("verify", "insecure", "ssl", "tls", "cert"))]
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    try:
        subprocess.run([*make.split(), "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    for name in ("PYTHONHTTPSVERIFY", "NODE_TLS_REJECT_UNAUTHORIZED"):
        monkeypatch.setenv(name, "0")
    for name in ("CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, "")
    with RawServer(lambda visit: visit.send(http(ps())), tls=context) as server:
        with pytest.raises(OllamaUnavailable):
            client(server).unload_model(timeout_s=5.0)
        assert client(server).residency(5.0).answer is Answer.UNKNOWN
        assert server.visits == []


@row("S05-redirects")
def test_no_call_follows_a_redirect() -> None:
    """Each call, each status: nothing reaches the place that is named, least of all the password."""
    with serving(http(LOADED)) as elsewhere:
        for status in (300, 301, 302, 303, 305, 307, 308):
            headers = f"Location: {elsewhere.url}/api/ps\r\nRefresh: 0; url={elsewhere.url}\r\n"
            with serving(http(b"", status=status, headers=headers)) as server:
                ours = client(server.url.replace("://", f"://me:{CANARY}@"), vlm_load_retries=0)
                calls: list[Callable[[], object]] = [
                    lambda ours=ours: ours.unload_model(timeout_s=5.0),  # type: ignore[misc]
                    lambda ours=ours: ours.renew(keep_alive_s=5, timeout_s=5.0),  # type: ignore[misc]
                    lambda ours=ours: list(ours.generate("x", keep_alive_s=5, timeout_s=5.0)),  # type: ignore[misc]
                ]
                for call in calls:
                    with pytest.raises(GPUFSMError):
                        call()
                assert ours.residency(5.0).answer is Answer.UNKNOWN
                assert ours.catalog(5.0).present is Answer.UNKNOWN
                assert all(visit.line.split()[1].startswith("/api/") for visit in server.visits)
        assert elsewhere.visits == []


scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=30)
KEYS = ("models", "name", "size", "size_vram", "expires_at", "digest", "model", "details")
keys = st.sampled_from(KEYS) | st.text(max_size=5)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=12,
)
bodies = (
    documents.map(lambda value: json.dumps(value).encode())
    | documents.map(lambda value: json.dumps({"models": [value]}).encode())
    | st.binary(max_size=60)
    | st.sampled_from(
        (b"[" * 100_000, b'{"models":' * 30_000, b"9" * 100_000, b'{"models":[{"size":1e9999}]}', b"\xef\xbb\xbf{}")
    )
)


@given(body=bodies)
@example(body=b'{"models": [' + b'{"name": "a"},' * 300 + b'{"name": "a"}]}')
@example(body=b'{"models": [{"name": "%s"}]}' % (b"a" * 300))
@settings(max_examples=400)
@row("S06-json")
def test_no_answer_is_believed_that_cannot_be(body: bytes) -> None:
    """Whatever the bytes: an answer of three, no exception, no figure that cannot be."""
    from gpu_fsm.ollama import OllamaManager

    clock = VirtualClock()
    wire = Wire(clock)
    for path in ("/api/ps", "/api/tags", "/api/version", "/api/show"):
        wire.say(path, (200, body))
    ours = OllamaManager(config(), clock=clock, transport=wire)
    seen, found = ours.residency(5.0), ours.catalog(5.0)
    for model in (*seen.others, *((seen.ours,) if seen.ours else ())):
        assert 0 <= model.size_vram_mib <= model.size_mib * 2 + 2**24
        assert model.size_mib < 2**40
        assert len(model.name) <= 256
    assert len(seen.others) <= 256
    assert found.size_mib is None or 0 <= found.size_mib < 2**40
    assert seen.detail.isprintable()


@row("S06-json-in-bounded-memory")
def test_a_body_without_end_costs_no_memory() -> None:
    """Ten floods and a length that lies, in a process of its own: it grows by a few MiB."""

    def flood(visit: Visit) -> None:
        visit.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
        visit.flood(b'{"models": [' + b" " * 65536)

    with serving(flood) as server:
        said = run_python(
            "import resource\nfrom gpu_fsm import GPUResourceConfig\nfrom gpu_fsm.ollama import OllamaManager\n"
            "from gpu_fsm.ports import RealClock\n"
            f"config = GPUResourceConfig(ollama_url={server.url!r}, vlm_model='tiny-a')\n"
            "server = OllamaManager(config, clock=RealClock())\nserver.residency(5.0)\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "for _ in range(10):\n    assert server.residency(5.0).answer.value == 'unknown'\n"
            "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
        )
    assert int(said) < 32


# --- S07, S08: files --------------------------------------------------------------------------------------------------


@pytest.mark.needs_torch
@row("S07-models")
def test_a_model_that_brings_its_own_program_is_not_run(tmp_path: Path) -> None:
    """Not a pickle beside the safe weights, not a module that `modules.json` names, not `auto_map`."""
    import pickle

    from gpu_fsm.clip import CLIPManager
    from tests.tools import tiny_clip

    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    def spoilt(name: str, spoil: Callable[[Path], object]) -> None:
        folder = tiny_clip.build(tmp_path / name)
        spoil(folder)
        host = CLIPManager(GPUResourceConfig(clip_model=str(folder), clip_device="cpu"))
        try:
            host.prepare()
            host.encode(["x"])
        except GPUFSMError as error:
            assert error.remedy, name
        finally:
            host.close()
        assert not marker.exists(), name

    def pickled(folder: Path) -> None:
        for file in list(folder.rglob("*.safetensors")):
            file.with_name("pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
            file.unlink()

    def modular(folder: Path) -> None:
        (folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n")
        module = {"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}
        (folder / "modules.json").write_text(json.dumps([module]))

    def mapped(folder: Path) -> None:
        (folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n")
        for file in folder.rglob("config.json"):
            about = json.loads(file.read_text())
            file.write_text(json.dumps({**about, "auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}}))

    spoilt("pickled", pickled)
    spoilt("modular", modular)
    spoilt("mapped", mapped)


@pytest.mark.needs_torch
def test_clip_opens_no_pickle_and_takes_no_text_for_a_file(tmp_path: Path) -> None:
    """Weights that could run code are refused unasked; words that name a file stay words, in their place."""
    import numpy as np
    from PIL import Image

    from gpu_fsm.clip import CLIPManager
    from tests.tools import tiny_clip

    pickled = tiny_clip.build(tmp_path / "pickled", safetensors=False)
    with pytest.raises(ClipUnavailable, match="allow_pickle_weights"):
        CLIPManager(GPUResourceConfig(clip_model=str(pickled), clip_device="cpu")).prepare()
    safe = tiny_clip.build(tmp_path / "safe")
    host = CLIPManager(GPUResourceConfig(clip_model=str(safe), clip_device="cpu"))
    picture = tmp_path / "screen.png"
    Image.new("RGB", (32, 32), "blue").save(picture)
    items = [picture, str(picture), "a window", picture]
    together = host.encode(items)
    alone = np.concatenate([host.encode([item]) for item in items])
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(together[0], together[3], atol=1e-6)
    picture.unlink()
    assert np.allclose(host.encode([str(picture)])[0], together[1], atol=1e-6)
    host.close()


def npy(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    """An array of float32 as a file whose header may lie."""
    import numpy as np

    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue() + data


ABOUT = {"format": "gpu_fsm screen memory", "version": 1, "labels": ["a"], "digests": [""]}


@pytest.mark.parametrize(
    "vectors",
    [
        pytest.param(npy((1, 1 << 28), bytes(1 << 20)), id="S08-index-that-is-cut"),
        pytest.param(npy((1 << 62, 1 << 62)), id="S08-index-of-overflowing-shape"),
        pytest.param(npy((1, 4), b"\x00\x00\xc0\x7f" * 4), id="S08-index-of-no-numbers"),
        pytest.param(
            b"\x93NUMPY\x01\x00\x10\x00{'descr': __import__('os')}",
            id="S08-index-with-a-program-in-its-head",
        ),
        pytest.param(
            b"cos\nsystem\n(S'exit 7'\ntR.",
            id="S08-index-that-is-a-pickle",
        ),
        pytest.param(
            npy((1, 1 << 42)),
            id="S08-index-that-claims-terabytes",
        ),
    ],
)
def test_a_screen_memory_from_elsewhere_is_refused(tmp_path: Path, vectors: bytes) -> None:
    """With its own error, whatever it holds."""
    import numpy as np

    from gpu_fsm.agent import FusionEngine, ScreenMemoryError

    path = tmp_path / "m.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in (
            ("about", np.frombuffer(json.dumps(ABOUT).encode(), np.uint8)),
            ("probe", np.zeros(0, np.float32)),
        ):
            stream = io.BytesIO()
            np.save(stream, array)
            archive.writestr(f"{name}.npy", stream.getvalue())
        archive.writestr("vectors.npy", vectors)
    with pytest.raises(ScreenMemoryError):
        FusionEngine.load(path)


@row("S08-index-bomb")
def test_a_small_file_that_claims_to_be_huge_is_not_unpacked(tmp_path: Path) -> None:
    """What the members say of themselves is added up before anything is read."""
    from gpu_fsm.agent import FusionEngine, ScreenMemoryError

    path = tmp_path / "m.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("about", "probe", "vectors"):
            archive.writestr(f"{name}.npy", npy((0,)))
    data = bytearray(path.read_bytes())
    size_at = data.rindex(b"PK\x01\x02") + 24
    data[size_at : size_at + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    with pytest.raises(ScreenMemoryError, match="larger than"):
        FusionEngine.load(path)


@row("S08-index-behind-a-link")
def test_a_screen_memory_is_not_written_through_a_link(tmp_path: Path) -> None:
    """Where somebody has put a link in its place, the link is replaced and what it leads to is left alone."""
    import numpy as np

    from gpu_fsm.agent import FusionEngine

    other, path = tmp_path / "other", tmp_path / "m.npz"
    other.write_bytes(b"somebody else's")
    path.symlink_to(other)
    memory = FusionEngine()
    memory.add("a", np.array([1, 0], np.float32))
    memory.save(path)
    assert other.read_bytes() == b"somebody else's"
    assert FusionEngine.load(path).labels == ("a",)


# --- S09 to S11: words from outside -----------------------------------------------------------------------------------


@row("S09-environment")
def test_the_environment_is_read_once_checked_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes afterwards changes nothing; what is refused is named by its variable and not by a secret in it."""
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0; rm -rf /")
    before = load_config()
    world = SimulatedWorld()
    manager = worlds.inline(world)
    for name, value in (
        ("OLLAMA_HOST", "http://evil.example"),
        ("GPU_FSM_IDLE_TIMEOUT_S", "nan"),
        ("HF_ENDPOINT", "http://evil.example"),
    ):
        monkeypatch.setenv(name, value)
    assert before.ollama_url == "http://127.0.0.1:7"
    assert manager.set_execution_mode("recording").granted
    assert "evil" not in json.dumps(manager.get_status().to_dict()) + repr(manager.config)
    manager.close()
    for name, value in (
        ("GPU_FSM_IDLE_TIMEOUT_S", "nan"),
        ("GPU_FSM_OLLAMA_URL", f"http://me:{CANARY}@evil.example"),
        ("OLLAMA_HOST", f"ftp://me:{CANARY}@x"),
        ("GPU_FSM_VLM_MODEL", "a\nb"),
        ("GPU_FSM_VLM_OPTIONS", '{"a": NaN}'),
        ("GPU_FSM_CLIP_DEVICE", "$(id)"),
        ("GPU_FSM_UNKNOWN_SETTING", "1"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(None, {name: value})
        assert name in str(caught.value)
        assert CANARY not in str(caught.value)
        assert str(caught.value).isprintable()


nasty = st.text(max_size=400) | st.sampled_from(
    ("\x1b[2J\x1b]0;owned\x07", "a\r\nINFO: all is well", "\u202egnp.exe", "x" * 10**6)
)


@given(text=nasty)
@example(text="\x1b[31m\n\u2028\u0085\x00")
@settings(max_examples=40)
@row("S10-logs")
def test_words_from_outside_stay_on_one_line(text: str) -> None:
    """In the log, in the reason, in the error: the server's text, escaped and cut."""
    lines: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    ear, log = Ear(), logging.getLogger("gpu_fsm")
    log.addHandler(ear)
    world = SimulatedWorld()
    manager = worlds.inline(world, vlm_load_retries=0)
    try:
        world.faults.arm("ollama.load", "http_500", text=text)
        outcome = manager.set_execution_mode("recording")
        lines.append(str(outcome.reason))
        lines += [str(manager.get_status().reason), *manager.explain("recording").split("\n"), repr(manager)]
    finally:
        manager.close()
        log.removeHandler(ear)
    assert lines
    for line in lines:
        assert line.isprintable(), line
        assert len(line) < 1200


@row("S11-diagrams")
def test_a_name_that_is_markup_reaches_no_diagram() -> None:
    """The pictures are made of the table alone: whatever the models are called, they are the same to the byte."""
    overview, detail = diagrams.overview(), diagrams.detail()
    for name in ('"]-->X', "<img src=x onerror=alert(1)>", "}%%{init: {}}%%", "classDef x fill:url(javascript:1)"):
        with pytest.raises(ConfigError):
            GPUResourceConfig(vlm_model=name)
        world = SimulatedWorld(models={"other": 100.0})
        manager = worlds.inline(world)
        world.card.take("game", 100.0, pid=7, name=name)
        manager.set_execution_mode("recording")
        assert (diagrams.overview(), diagrams.detail()) == (overview, detail)
        manager.close()
    assert "<" not in (overview + detail).replace("<br/>", "")


# --- S12 to S14: this machine -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no such permissions")
def test_the_card_has_one_holder_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes second is refused until the first has let go, and then has it."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    first, second = CardLock(), CardLock()
    first.watch("GPU-security")
    first.permit()
    second.watch("GPU-security")
    assert str(os.getpid()) in second.held_by
    with pytest.raises(CardHeld):
        second.permit()
    first.close()
    second.permit()
    assert second.held_by == ""
    second.close()


@row("S12-lock")
def test_the_lock_follows_no_link_and_uses_no_open_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies where the lock should be is not written through; files and folder are the user's alone."""
    victim = tmp_path / "victim"
    victim.write_text("precious")

    def locked(runtime: Path) -> CardLock:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        lock = CardLock()
        lock.watch("GPU-security")
        return lock

    for name, link in (("file", "gpu_fsm/GPU-security.lock"), ("note", "gpu_fsm/GPU-security.json")):
        runtime = tmp_path / name
        (runtime / "gpu_fsm").mkdir(mode=0o700, parents=True)
        runtime.chmod(0o700)
        (runtime / link).symlink_to(victim)
        lock = locked(runtime)
        lock.close()
        assert victim.read_text() == "precious"
    whole = tmp_path / "whole"
    whole.mkdir(mode=0o700)
    lock = locked(whole)
    modes = {file.name: file.lstat().st_mode & 0o777 for file in (whole / "gpu_fsm").iterdir()}
    assert modes
    assert set(modes.values()) == {0o600}
    assert (whole / "gpu_fsm").lstat().st_mode & 0o777 == 0o700
    assert all("GPU-security" in name for name in modes)
    lock.close()
    open_to_all = tmp_path / "open"
    (open_to_all / "gpu_fsm").mkdir(parents=True)
    open_to_all.chmod(0o700)
    (open_to_all / "gpu_fsm").chmod(0o777)
    elsewhere = locked(open_to_all)
    assert list((open_to_all / "gpu_fsm").iterdir()) == []
    elsewhere.close()


@row("S13-import")
def test_importing_any_module_calls_nobody() -> None:
    """Every module of the package, with every door to the network shut; what needs an extra may be missing."""
    said = run_python(
        "import importlib, pkgutil, socket, subprocess, sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "def refuse(*args, **options): raise AssertionError(f'a door was tried: {args}')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.socket.bind = refuse\n"
        "socket.getaddrinfo = socket.create_connection = subprocess.Popen.__init__ = refuse\n"
        "import gpu_fsm\n"
        "count = 0\n"
        "for module in pkgutil.walk_packages(gpu_fsm.__path__, 'gpu_fsm.'):\n"
        "    if module.name.endswith('__main__'):\n        continue\n"
        "    try:\n        importlib.import_module(module.name)\n        count += 1\n"
        "    except ImportError:\n        pass\n"
        "assert not {'torch', 'sentence_transformers'} & set(sys.modules), 'too much'\n"
        "print(count)\n"
    )
    assert int(said.split()[-1]) > 30


QUESTIONS = {
    "another protocol": b'{"protocol": 2, "do": "status"}',
    "no protocol": b'{"do": "status"}',
    "a line without end": b'{"protocol": 1, "do": "status"' + b" " * LINE_BYTES + b"}",
    "no JSON": b"status",
    "depth": b"[" * 10_000,
    "a list": b'["status"]',
    "nothing to do": b'{"protocol": 1}',
    "something else to do": b'{"protocol": 1, "do": "__class__"}',
}


def test_the_control_socket_is_its_owners_and_answers_only_what_it_understands(tmp_path: Path) -> None:
    """No other user may open it, and each bad line gets a refusal, not a status and not silence."""
    with ControlServer(worlds.inline(SimulatedWorld()), tmp_path / "s") as server:
        assert server.path.stat().st_mode & 0o777 == 0o600
        for name, question in QUESTIONS.items():
            with socket.socket(socket.AF_UNIX) as line, line.makefile("rb") as answers:
                line.settimeout(PATIENCE_S)
                line.connect(str(server.path))
                assert b"control" in answers.readline()
                line.sendall(question + b"\n")
                answer = json.loads(answers.readline())
                assert (answer["ok"], answer["error"]["code"]) == (False, "bad_argument"), name


RAW = {
    "a negative length": b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n{}",
    "no number": b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n{}",
    "a huge length": b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999\r\n\r\n{}",
    "depth": b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50000\r\n\r\n" + b"[" * 50000,
    "a long header": b"GET /api/ps HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100000 + b"\r\n\r\n",
    "many headers": b"GET /api/ps HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 2000 + b"\r\n",
    "no HTTP": b"\x16\x03\x01\x00\xff\r\n\r\n",
    "a path": b'POST /api/show HTTP/1.1\r\nHost: localhost\r\nContent-Length: 29\r\n\r\n{"model": "../../etc/passwd"}',
}
FOREIGN = (
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evil.example:11434",
    "[2001:db8::1]",
    "8.8.8.8",
)


@row("S14-simulated-server")
def test_the_simulated_server_is_for_this_machine_and_survives_anything() -> None:
    """It listens on loopback only, refuses names that were rebound, and answers after every bad request."""
    with simulated_ollama() as server:
        port = int(server.url.rsplit(":", 1)[1])

        def answer(data: bytes, patience_s: float = 0.2) -> bytes:
            with socket.create_connection(("127.0.0.1", port), 5.0) as line:
                line.settimeout(patience_s)
                try:
                    line.sendall(data)
                    return line.recv(65536)
                except OSError:
                    return b""

        for name, data in RAW.items():
            assert b"200 OK" not in answer(data), name
            assert server.listed() == [], name
        for host in FOREIGN:
            assert b"403" in answer(f"GET /api/ps HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(), 5.0), host
        assert b"Access-Control" not in answer(
            b"GET /api/ps HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil\r\n\r\n", 5.0
        )
        others = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), port, type=socket.SOCK_STREAM)}
        for address in others - {"127.0.0.1", "::1"}:
            with pytest.raises((ConnectionError, TimeoutError)):
                socket.create_connection((address, port), 1.0)
