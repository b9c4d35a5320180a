"""One manager per card: who may act, who only looks, and that no lock outlives its holder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_fsm import GPUResourceConfig, GPUResourceManager
from gpu_fsm.cardlock import CardLock
from gpu_fsm.errors import CardHeld, GPUFSMError
from gpu_fsm.simulation import SimulatedWorld
from tests.tools import building, fake_nvml
from tests.tools.fake_nvml import FakeNVML
from tests.waiting import PATIENCE_S, ROOT
from tests.worlds import inline

pytestmark = [pytest.mark.core, *building.marks(fake_nvml.missing())]

NOBODY = "http://127.0.0.1:9"
"""Where no Ollama listens."""
UUID = "GPU-0000cafe-0000-0000-0000-000000000000"


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNVML]:
    """A driver with one card, and a runtime folder of our own."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fake = FakeNVML.create(tmp_path)
    fake.add_gpu(total_mib=8192, used_mib=300, uuid=UUID)
    with fake.active():
        yield fake


@pytest.fixture
def make(card: FakeNVML) -> Iterator[Callable[..., GPUResourceManager]]:
    """Make managers over the real adapters, driven by whoever waits; they are closed afterwards."""
    made: list[GPUResourceManager] = []

    def build(**settings: Any) -> GPUResourceManager:
        config = GPUResourceConfig(**{"clip_model": None, "ollama_url": NOBODY, **settings})
        made.append(GPUResourceManager(config, threaded=False))
        return made[-1]

    yield build
    for manager in made:
        manager.close()


HOLDER = f"""
import os, signal, sys
from gpu_fsm import GPUResourceConfig, GPUResourceManager
manager = GPUResourceManager(GPUResourceConfig(clip_model=None, ollama_url={NOBODY!r}))
"""
SAY_AND_WAIT = """
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def other_process(card: FakeNVML, code: str = HOLDER + SAY_AND_WAIT) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process with a manager; gives it and the number that it printed.  It is gone afterwards."""
    env = {**card.env(), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.stdin.close()
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE_S)
        process.stdout.close()


REQUESTS: dict[str, Callable[[GPUResourceManager], object]] = {
    "set_execution_mode": lambda manager: manager.set_execution_mode("idle"),
    "ensure_vlm_loaded": lambda manager: manager.ensure_vlm_loaded(),
    "ensure_vlm_unloaded": lambda manager: manager.ensure_vlm_unloaded(),
    "migrate_clip_to_gpu": lambda manager: manager.migrate_clip_to_gpu(),
    "migrate_clip_to_cpu": lambda manager: manager.migrate_clip_to_cpu(),
    "vlm": lambda manager: manager.vlm().__enter__(),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_second_manager_is_refused_by_the_name_of_the_first(
    make: Callable[..., GPUResourceManager], request_: Callable[[GPUResourceManager], object]
) -> None:
    """Every request says who acts on the card, and the status of the second goes on telling what is."""
    first, second = make(), make()
    with pytest.raises(CardHeld, match=rf"another manager in this process \(pid {os.getpid()}\)") as caught:
        request_(second)
    assert (caught.value.pid, caught.value.device_uuid) == (os.getpid(), UUID)
    second.drive_for(0.01)
    status = second.get_status()
    assert (status.vram.free_mib, status.vram.device_uuid) == (7892, UUID)
    assert "another manager" in status.card_held_by
    assert first.get_status().card_held_by == ""
    assert first.set_execution_mode("idle").granted
    assert {record.trigger for record in second.journal} <= {"check"}


def test_a_second_manager_takes_over_when_the_first_is_closed(make: Callable[..., GPUResourceManager]) -> None:
    """At its next request, or by itself at its next check."""
    first, second, third = make(), make(), make(check_interval_s=0.02)
    third.drive_for(0.05)
    first.close()
    assert second.set_execution_mode("idle").granted
    assert second.get_status().card_held_by == ""
    with pytest.raises(CardHeld):
        third.set_execution_mode("idle")
    second.close()
    third.drive_for(0.1)
    assert third.get_status().card_held_by == ""
    with pytest.raises(CardHeld):
        make().set_execution_mode("idle")


def test_the_holder_in_another_process_is_named_and_its_death_frees_the_card(
    card: FakeNVML, make: Callable[..., GPUResourceManager]
) -> None:
    """Row D15: pid and name of the other process; after SIGKILL the next request is served, with no lock left over."""
    with other_process(card) as (process, pid):
        second = make()
        with pytest.raises(CardHeld, match=rf"\(pid {pid}\) holds the card {UUID}; this manager only observes") as held:
            second.set_execution_mode("idle")
        assert held.value.pid == pid
        assert held.value.name
        assert f"pid {pid}" in second.get_status().card_held_by
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_S)
        assert second.set_execution_mode("idle").granted
        assert second.get_status().card_held_by == ""


def test_a_process_that_ends_by_itself_frees_the_card(card: FakeNVML, make: Callable[..., GPUResourceManager]) -> None:
    """Without `close()`: the end of the interpreter is enough."""
    with other_process(card) as (process, _):
        second = make()
        with pytest.raises(CardHeld):
            second.set_execution_mode("idle")
        assert process.stdin is not None
        process.stdin.close()
        process.wait(PATIENCE_S)
        assert second.set_execution_mode("idle").granted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_is_told_so_and_does_not_keep_the_card(
    card: FakeNVML, make: Callable[..., GPUResourceManager]
) -> None:
    """A real fork: each verb raises in the child, and the parent's death frees the card though the child lives."""
    forking = """
import warnings; warnings.simplefilter("ignore")
from gpu_fsm.errors import ForkedProcess
child = os.fork()
if child == 0:
    told = 0
    for ask in (lambda: manager.set_execution_mode("idle"), manager.ensure_vlm_loaded, manager.vlm().__enter__):
        try:
            ask()
        except ForkedProcess:
            told += 1
    manager.get_status()
    manager.close()
    os.write(1, f"{told}\\n".encode())
    sys.stdin.read()
    os._exit(0)
signal.pause()
"""
    with other_process(card, HOLDER + forking) as (process, told):
        assert told == 3
        second = make()
        with pytest.raises(CardHeld, match=f"pid {process.pid}"):
            second.set_execution_mode("idle")
        process.kill()
        process.wait(PATIENCE_S)
        assert second.set_execution_mode("idle").granted


def test_a_simulated_card_is_nobodys_to_lock(card: FakeNVML) -> None:
    """Two managers may act in simulated worlds of their own, and no file is made."""
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            manager = stack.enter_context(contextlib.closing(inline(SimulatedWorld())))
            assert manager.set_execution_mode("autopilot").granted
    assert list(Path(os.environ["XDG_RUNTIME_DIR"]).iterdir()) == []


def test_a_machine_without_a_card_has_nothing_to_lock(card: FakeNVML, make: Callable[..., GPUResourceManager]) -> None:
    """Row B01: both managers act; what they share is Ollama, and Ollama serves both."""
    card.state.devices = 0
    assert make().set_execution_mode("idle").granted
    assert make().set_execution_mode("idle").granted
    assert list(Path(os.environ["XDG_RUNTIME_DIR"]).iterdir()) == []


def test_two_cards_are_two_locks(card: FakeNVML, make: Callable[..., GPUResourceManager]) -> None:
    """The lock goes by UUID."""
    card.add_gpu(uuid="GPU-1111cafe-0000-0000-0000-000000000000")
    assert make(gpu_uuid=UUID).set_execution_mode("idle").granted
    assert make(gpu_uuid="GPU-1111cafe").set_execution_mode("idle").granted
    with pytest.raises(CardHeld):
        make(gpu_uuid=UUID).set_execution_mode("idle")


# --- the files -------------------------------------------------------------------------------------------------------


def test_the_files_are_the_users_alone(card: FakeNVML, make: Callable[..., GPUResourceManager]) -> None:
    """0700 and 0600, and the note goes with its holder."""
    manager = make()
    folder = Path(os.environ["XDG_RUNTIME_DIR"]) / "gpu_fsm"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        f"{UUID}.lock": 0o600,
        f"{UUID}.json": 0o600,
    }
    manager.close()
    assert {path.name for path in folder.iterdir()} == {f"{UUID}.lock"}


def _a_link(folder: Path, elsewhere: Path) -> None:
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)


def _open_to_all(folder: Path, elsewhere: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def _a_file(folder: Path, elsewhere: Path) -> None:
    folder.touch()


@pytest.mark.parametrize("spoil", [_a_link, _open_to_all, _a_file], ids=["link", "open_to_all", "no_folder"])
def test_a_folder_that_cannot_be_trusted_is_not_used(
    card: FakeNVML, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoil: Callable[[Path, Path], None]
) -> None:
    """The next candidate is taken; nothing is written where a link leads."""
    runtime, temporary = Path(os.environ["XDG_RUNTIME_DIR"]), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    spoil(runtime / "gpu_fsm", tmp_path / "elsewhere")
    lock = CardLock()
    lock.watch(UUID)
    other = CardLock()
    other.watch(UUID)
    with pytest.raises(CardHeld):
        other.permit()
    for place in (runtime / "gpu_fsm", tmp_path / "elsewhere"):
        assert not place.is_dir() or list(place.iterdir()) == []
    lock.close()


def test_without_any_folder_the_manager_works_and_says_so(
    card: FakeNVML, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A lock that cannot be had costs nobody the card."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr("gpu_fsm.cardlock._candidates", lambda: iter([tmp_path / "missing" / "gpu_fsm"]))
    lock = CardLock()
    with caplog.at_level(logging.WARNING, logger="gpu_fsm"):
        lock.watch(UUID)
        lock.permit()
    assert len(caplog.records) == 1
    assert "missing" in caplog.text


def test_a_lock_file_that_is_a_link_is_not_followed(card: FakeNVML, tmp_path: Path) -> None:
    """Neither opened nor changed, wherever it leads."""
    folder = Path(os.environ["XDG_RUNTIME_DIR"]) / "gpu_fsm"
    folder.mkdir(mode=0o700)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for suffix in ("lock", "json"):
        (folder / f"{UUID}.{suffix}").symlink_to(victim)
    lock = CardLock()
    lock.watch(UUID)
    lock.permit()
    lock.close()
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "note",
    [
        pytest.param("", id="empty"),
        pytest.param("[1, 2", id="torn"),
        pytest.param("[" * 5000, id="deep"),
        pytest.param('{"pid": "x", "name": 3}', id="no_number"),
        pytest.param('{"pid": 999999999, "name": "gone"}', id="nobody_any_more"),
        pytest.param('{"pid": -1, "name": "all"}', id="everybody"),
        pytest.param('{"pid": 1e400, "name": "x"}', id="infinite"),
    ],
)
def test_a_note_that_says_nothing_true_names_nobody(card: FakeNVML, note: str) -> None:
    """The kernel's lock decides; the note is for words only."""
    first, second = CardLock(), CardLock()
    first.watch(UUID)
    (Path(os.environ["XDG_RUNTIME_DIR"]) / "gpu_fsm" / f"{UUID}.json").write_text(note)
    second.watch(UUID)
    with pytest.raises(CardHeld, match="another process holds") as caught:
        second.permit()
    assert caught.value.pid is None
    first.close()
    second.permit()
    second.close()


def test_a_name_in_the_note_cannot_break_a_log_line(card: FakeNVML) -> None:
    """Foreign text is escaped at the edge."""
    first, second = CardLock(), CardLock()
    first.watch(UUID)
    note = Path(os.environ["XDG_RUNTIME_DIR"]) / "gpu_fsm" / f"{UUID}.json"
    note.write_text(json.dumps({"pid": os.getppid(), "name": "evil\n\x1b[31m"}))
    second.watch(UUID)
    assert second.held_by.isprintable()
    first.close()
    second.close()


def test_closing_twice_frees_the_card_once(
    make: Callable[..., GPUResourceManager],
) -> None:
    """A closed manager says that it is closed, and takes nothing from the next one."""
    first, second = make(), make()
    first.close()
    first.close()
    with pytest.raises(GPUFSMError, match="closed"):
        first.set_execution_mode("idle")
    assert second.set_execution_mode("idle").granted
    assert second.get_status().card_held_by == ""
