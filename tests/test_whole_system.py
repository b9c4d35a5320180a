"""The whole system on one simulated 8 GiB card: real manager, real pynvml, real torch moves, Ollama in a process."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.needs_torch
torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from gpu_fsm import ExecutionMode, GPUResourceManager  # noqa: E402
from gpu_fsm.errors import CudaPoisoned, InsufficientVRAM, Refused  # noqa: E402
from gpu_fsm.events import ForeignConsumer  # noqa: E402
from tests.tools import building, fake_nvml, fakegpu, tiny_clip  # noqa: E402
from tests.tools.bench import BASELINE_MIB, CARD_MIB, CONTEXT_MIB, VLM, VLM_MIB, Bench, set_up  # noqa: E402
from tests.tools.fake_nvml import FakeNVML  # noqa: E402
from tests.tools.ollama_process import OllamaProcess  # noqa: E402
from tests.waiting import journal_is_whole, until  # noqa: E402

pytestmark = [pytestmark, *building.marks(fake_nvml.missing() or fakegpu.missing())]

UNKNOWN, NO_PERMISSION = 999, 4
ITEMS: list[object] = ["a window", Image.new("RGB", (48, 40), "blue"), "a list of files"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny CLIP in memory, to be copied."""
    from sentence_transformers import SentenceTransformer

    folder = tiny_clip.build(tmp_path_factory.mktemp("clip") / "tiny")
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: Any) -> Iterator[Bench]:
    """The whole bench, cleared away afterwards."""
    with set_up(tmp_path, monkeypatch, loaded) as ready:
        yield ready


class Meter:
    """Counts the driver's reads over time, from outside, on a thread of its own."""

    def __init__(self, nvml: FakeNVML) -> None:
        self._nvml, self._over = nvml, threading.Event()
        self.samples: list[tuple[float, int]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            self.samples.append((time.monotonic(), self._nvml.calls("MEM")))

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def fastest(self, since: int = 0) -> float:
        """Most reads a second, over windows of at least a second."""
        most, end = 0.0, since
        for start_at, before in self.samples[since:]:
            while end < len(self.samples) and self.samples[end][0] - start_at < 1.0:
                end += 1
            if end == len(self.samples):
                break
            at, calls = self.samples[end]
            most = max(most, (calls - before - 1) / (at - start_at))
        return most


def as_promised(bench: Bench, manager: GPUResourceManager, mode: ExecutionMode) -> None:
    """The truth on the card, in the server and in the tensors, against the mode that was granted."""
    held = bench.gpu.figures().allocated
    if mode is ExecutionMode.RECORDING:
        assert manager.get_clip_device() == "cpu"
        assert held == 0
        bench.hearsay = bench.hearsay and VLM not in bench.ollama.loaded()
        assert bench.hearsay or VLM in bench.ollama.loaded()
    elif mode is ExecutionMode.AUTOPILOT:
        assert manager.get_clip_device() == "fakegpu:0"
        assert held > 0
        assert VLM not in bench.ollama.loaded()


def test_two_hundred_random_switches_with_faults_and_a_neighbour_keep_every_promise(bench: Bench) -> None:
    """No overcommitment at any instant; granted means so on the card; afterwards nothing is left but the context."""
    dice = random.Random(20)
    manager = bench.make()
    meter = Meter(bench.nvml)
    with manager.clip() as clip:
        at_home = clip.encode(ITEMS)
    manager.set_execution_mode("autopilot")
    with manager.clip() as clip:
        away = clip.encode(ITEMS)
    assert np.allclose(at_home, away, atol=1e-4)
    faults: dict[str, Callable[[], object]] = {
        "load_oom": lambda: bench.ollama.arm("ollama.load", "oom"),
        "load_500": lambda: bench.ollama.arm("ollama.load", "http_500"),
        "load_cut": lambda: bench.ollama.arm("ollama.load", "after"),
        "load_partial": lambda: bench.ollama.arm("ollama.load", "partial", share=0.5),
        "unload_lies": lambda: bench.ollama.arm("ollama.unload", "silent"),
        "unload_late": lambda: bench.ollama.arm("ollama.unload", "late", delay_s=0.2),
        "busy": lambda: bench.ollama.arm("ollama.load", "http_503", 2),
        "ps_html": lambda: bench.ollama.arm("ollama.ps", "html"),
        "ps_hangs": lambda: bench.ollama.arm("ollama.ps", "late", delay_s=0.7),
        "runner_dies": bench.kill_runner,
        "clip_oom": lambda: bench.gpu.fail_allocation(dice.randrange(4)),
        "driver_forbids": lambda: bench.nvml.fail("MEM", NO_PERMISSION, times=3),
        "game_takes": lambda: bench.take(dice.uniform(500, 6000)),
        "game_fills": lambda: bench.take(bench.game.free_mib - 20),
        "game_gives": lambda: bench.game.give_back("game"),
    }
    modes = [ExecutionMode.IDLE, ExecutionMode.RECORDING, ExecutionMode.AUTOPILOT]
    granted = dict.fromkeys(modes, 0)
    refused: list[str] = []
    for number in range(200):
        if dice.random() < 0.35:
            faults[dice.choice(list(faults))]()
        elif dice.random() < 0.3:
            bench.game.give_back("game")
        if number == 100:
            bench.nvml.fail("MEM", UNKNOWN, times=1)  # one suspend: mended by the second init of this life
        mode = dice.choice(modes)
        try:
            if dice.random() < 0.15:
                manager.submit_execution_mode(dice.choice(modes))
                outcome = manager.set_execution_mode(mode, preempt=True, timeout_s=30.0)
            else:
                outcome = manager.set_execution_mode(mode, timeout_s=30.0)
            if outcome.granted:
                granted[mode] += 1
                as_promised(bench, manager, mode)
        except Refused as refusal:
            refused.append(refusal.code)
        bench.gpu.fail_allocation(-1)  # it was for the move; a batch that runs out is its caller's
        with manager.clip(timeout_s=10.0) as clip:
            vectors = clip.encode(ITEMS)
            assert np.array_equal(vectors, at_home) or np.array_equal(vectors, away)
        assert bench.nvml.state.device[0].peak <= bench.nvml.state.device[0].total
    bench.ollama.heal()
    bench.game.give_back("game")
    for mode in (ExecutionMode.AUTOPILOT, ExecutionMode.RECORDING):
        until(lambda mode=mode: manager.set_execution_mode(mode, timeout_s=30.0).granted)
        as_promised(bench, manager, mode)
    start = len(meter.samples)
    threading.Event().wait(3.5)
    idle = meter.fastest(start)
    busy = meter.fastest()
    journal_is_whole(manager)
    assert manager.close() == ()
    meter.stop()
    until(lambda: bench.used_mib == BASELINE_MIB + CONTEXT_MIB)
    assert bench.nvml.state.device[0].peak <= bench.nvml.state.device[0].total
    assert (bench.nvml.calls("INIT"), bench.nvml.references) == (2, 0)
    assert bench.nvml.calls("SHUTDOWN") == 2
    assert busy <= 50
    assert idle <= 1
    assert min(granted.values()) > 10, (granted, refused)
    print(f"granted {granted}, refused {len(refused)}, reads a second: {busy:.1f} busy, {idle:.1f} idle")


def test_what_clip_leaves_behind_is_measured_by_the_driver(bench: Bench) -> None:
    """Row C08: the context is 300 MiB by NVML, said to be nobody's to give back, and planned for only once."""
    manager = bench.make()
    host: Any = manager._driver.clip
    assert host.context_mib == 0.0
    before = host.needed_mib
    assert manager.set_execution_mode("autopilot").granted
    assert host.context_mib == pytest.approx(CONTEXT_MIB, abs=0.1)
    assert host.needed_mib < before
    assert manager.get_status().clip_context_mib == pytest.approx(CONTEXT_MIB, abs=0.1)
    assert manager.set_execution_mode("idle").granted
    manager.close()
    assert bench.used_mib == BASELINE_MIB + CONTEXT_MIB


def test_a_shortage_names_who_holds_the_memory(bench: Bench) -> None:
    """Process, pid and MiB where the driver tells, in the refusal and in the reason."""
    bench.take(3000)
    manager = bench.make(on_shortage="refuse")
    with pytest.raises(InsufficientVRAM) as caught:
        manager.set_execution_mode("recording")
    assert "game.exe (pid 4242): 3000 MiB" in caught.value.holders
    assert caught.value.free_mib == pytest.approx(CARD_MIB - BASELINE_MIB - 3000)
    assert "game.exe" in manager.explain("recording")
    manager.close()
    manager = bench.make()
    outcome = manager.set_execution_mode("recording")
    assert outcome.reason is not None
    assert "game.exe (pid 4242): 3000 MiB" in str(outcome.reason)
    manager.close()


@pytest.mark.parametrize("mode", ["recording", "autopilot"])
def test_what_runs_out_of_memory_in_a_step_names_them_too(bench: Bench, mode: str) -> None:
    """The room was there at admission and not when it was needed."""
    bench.take(200)
    bench.ollama.arm("ollama.load", "oom", None)
    bench.gpu.fail_allocation(0)
    outcome = bench.make().set_execution_mode(mode)
    assert outcome.reason is not None
    assert outcome.reason.code == "vram_insufficient"
    assert "game.exe (pid 4242): 200 MiB" in outcome.reason.remedy


def test_pressure_names_them_too(bench: Bench) -> None:
    """A neighbour that fills the card for `pressure_s` costs the VLM its place, and is named for it."""
    manager = bench.make(check_interval_s=0.05)
    assert manager.set_execution_mode("recording").granted
    bench.take(bench.game.free_mib - 20)
    until(lambda: manager.get_status().reason is not None)
    reason = manager.get_status().reason
    assert reason is not None
    assert reason.code == "vram_insufficient"
    assert "game.exe (pid 4242)" in reason.detail


def test_a_neighbour_that_takes_memory_is_an_event(bench: Bench) -> None:
    """Told once, with what was taken and by whom; our own moves are none."""
    manager = bench.make(check_interval_s=0.05)
    for mode in ("recording", "autopilot", "recording", "idle"):
        assert manager.set_execution_mode(mode).granted
    until(lambda: manager.get_status().vram.free_mib == CARD_MIB - BASELINE_MIB - CONTEXT_MIB - VLM_MIB)
    assert not [event for event in bench.events if isinstance(event, ForeignConsumer)]
    bench.take(150)
    until(lambda: [event for event in bench.events if isinstance(event, ForeignConsumer)])
    first, *more = [event for event in bench.events if isinstance(event, ForeignConsumer)]
    assert not more
    assert first.taken_mib == 150
    assert "game.exe (pid 4242): 150 MiB" in first.holders


def test_clip_and_ollama_on_two_cards_do_not_wait_for_each_other(bench: Bench) -> None:
    """`ollama_card = other`: the VLM needs no room here, proofs rest on `/api/ps`, and CLIP's card is watched alone."""
    other = bench.nvml.add_gpu(total_mib=CARD_MIB, used_mib=100.0)
    bench.take(5000)  # no room for the VLM on CLIP's card
    models = {VLM: VLM_MIB}
    with OllamaProcess(bench.nvml, models, index=other, load_s=0.05) as elsewhere:
        here = bench.ollama
        bench.ollama = elsewhere
        uuid = bench.nvml.state.device[0].uuid.decode()
        manager = bench.make(ollama_card="other", gpu_uuid=uuid)
        for mode in ("recording", "autopilot", "recording"):
            assert manager.set_execution_mode(mode).granted
            as_promised(bench, manager, ExecutionMode(mode))
        status = manager.get_status()
        assert status.vram.device_uuid == uuid
        assert "another machine or card" in status.proof
        assert bench.nvml.state.device[other].used > VLM_MIB * 2**20
        manager.close()
        bench.ollama = here


@pytest.mark.parametrize("tells", [True, False], ids=["driver_lists_processes", "driver_lists_none"])
def test_an_ollama_on_another_card_that_nobody_told_us_of_is_noticed(bench: Bench, tells: bool) -> None:
    """Ollama calls the load complete and this card's bytes did not move: refused or told, with the setting's name."""
    other = bench.nvml.add_gpu(total_mib=CARD_MIB, used_mib=100.0)
    bench.nvml.state.old_driver = int(not tells)
    with OllamaProcess(bench.nvml, {VLM: VLM_MIB}, index=other, load_s=0.05) as elsewhere:
        here = bench.ollama
        bench.ollama = elsewhere
        manager = bench.make(gpu_uuid=bench.nvml.state.device[0].uuid.decode())
        outcome = manager.set_execution_mode("recording")
        if tells:
            assert outcome.reason is not None
            assert outcome.reason.code == "gpu_not_used"
            assert "ollama_card" in outcome.reason.remedy
        else:
            assert outcome.granted
            assert manager.get_status().evidence == "reported"
            assert "ollama_card" in manager.get_status().proof
        manager.close()
        bench.ollama = here


def test_a_poisoned_device_is_left_for_life_while_the_agent_works_on(bench: Bench) -> None:
    """CLIP serves from the CPU, AUTOPILOT is no longer granted, and the reason says that a restart mends it."""
    manager = bench.make()
    assert manager.set_execution_mode("autopilot").granted
    bench.gpu.break_down()
    with pytest.raises(CudaPoisoned):
        with manager.clip() as clip:
            clip.encode(ITEMS)
    until(lambda: manager.get_status().execution_mode is ExecutionMode.DEGRADED)
    reason = manager.get_status().reason
    assert reason is not None
    assert (reason.code, reason.bucket, reason.permanent) == ("cuda_poisoned", "restart_process", True)
    with manager.clip() as clip:
        assert clip.device == "cpu"
        assert clip.encode(ITEMS).shape == (3, 16)
    bench.gpu.break_down(False)
    assert not manager.set_execution_mode("autopilot").granted
    assert manager.set_execution_mode("recording").granted


def test_a_driver_that_fails_in_mid_run_is_worked_around_by_torch(bench: Bench) -> None:
    """Row B02: with CLIP's context paid, torch tells the memory, and the reading says who answered."""
    manager = bench.make(check_interval_s=0.05)
    bench.nvml.fail("MEM", 18)
    until(lambda: manager.get_status().vram.bucket == "user")
    assert (manager.get_status().vram.source, manager.get_status().vram.free_mib) == ("none", None)
    assert manager.set_execution_mode("autopilot").granted
    until(lambda: manager.get_status().vram.source == "torch")
    vram = manager.get_status().vram
    assert vram.free_mib is not None
    assert vram.free_mib == pytest.approx(CARD_MIB - bench.used_mib, abs=1.0)
    assert vram.scope == "process"  # only CUDA's figures see the others
    assert manager.set_execution_mode("recording").granted
    bench.nvml.mend("MEM")
    until(lambda: manager.get_status().vram.source == "nvml")
