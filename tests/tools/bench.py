"""One simulated 8 GiB card with everything on it: what the whole-system tests and the tables of faults stand on.

The only things that are not real: the driver library, the memory of the second torch device, and the runner inside the
server.  All three draw on one ledger, which every process sees at once.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field

from gpu_fsm import GPUResourceConfig, GPUResourceManager
from gpu_fsm import clip as clip_module
from gpu_fsm.clip import CLIPManager
from gpu_fsm.events import Event
from gpu_fsm.simulation import CardFull, RunningClock
from tests.tools import fakegpu
from tests.tools.fake_nvml import FakeNVML
from tests.tools.fakegpu import FakeGPU
from tests.tools.ledger_card import LedgerCard
from tests.tools.ollama_process import OllamaProcess

CARD_MIB, BASELINE_MIB, CONTEXT_MIB, VLM_MIB = 8192.0, 300.0, 300.0, 7000.0
VLM = "sim-vlm:7b"

QUICK: dict[str, Any] = {
    "reserve_mib": 256.0,
    "settle_timeout_s": 1.0,
    "settle_poll_s": 0.025,
    "blind_settle_s": 0.2,
    "observe_timeout_s": 0.5,
    "unload_deadline_s": 3.0,
    "unload_resend_s": 0.3,
    "vlm_load_deadline_s": 4.0,
    "vlm_load_retries": 2,
    "retry_base_s": 0.02,
    "retry_cap_s": 0.1,
    "recover_base_s": 0.1,
    "recover_cap_s": 0.5,
    "drain_timeout_s": 2.0,
    "shed_drain_s": 0.5,
    "shed_deadline_s": 4.0,
    "pressure_s": 0.3,
    "unknown_max_s": 3.0,
    "stable_s": 1.0,
    "check_interval_s": 1.25,
}


@define(eq=False)
class Bench:
    """Everything on the bench, and what is known to be true of it."""

    nvml: FakeNVML
    gpu: FakeGPU
    ollama: OllamaProcess
    game: LedgerCard
    """Another program on the card."""
    make: Callable[..., GPUResourceManager]
    events: list[Event] = field(factory=list)
    hearsay: bool = False
    """A runner has died, which `/api/ps` does not show: until the next load residency is hearsay, for everybody."""

    @property
    def used_mib(self) -> float:
        return float(self.nvml.state.device[0].used / 2**20)

    def kill_runner(self) -> None:
        """Whatever is loaded dies."""
        self.hearsay = self.ollama.kill_runner() or self.hearsay

    def take(self, mib: float) -> None:
        """The other program takes what it can get of this."""
        with contextlib.suppress(CardFull):
            self.game.take("game", mib, pid=4242, name="game.exe")


@contextlib.contextmanager
def set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any) -> Iterator[Bench]:
    """One card, an Ollama on it, and managers whose CLIP is a copy of `model`.

    Managers made here are closed afterwards, then the server, then the device leaves the card.
    """
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(clip_module, "_unusable", {})
    nvml, gpu = FakeNVML.create(tmp_path), fakegpu.load()
    nvml.add_gpu(total_mib=CARD_MIB, used_mib=BASELINE_MIB)
    made: list[GPUResourceManager] = []
    clock = RunningClock()

    def make(**settings: Any) -> GPUResourceManager:
        given: dict[str, Any] = {**QUICK, "vlm_model": VLM, "vlm_size_mib": VLM_MIB, "clip_device": "fakegpu:0"}
        config = GPUResourceConfig(ollama_url=bench.ollama.url, **{**given, **settings})
        host = CLIPManager(config, model=copy.deepcopy(model))
        host.prepare()
        made.append(GPUResourceManager(config, clip_host=host))
        made[-1].subscribe(bench.events.append)
        return made[-1]

    times = {"load_s": 0.08, "unload_s": 0.01, "reclaim_s": 0.05, "generate_s": 0.02}
    with nvml.active(), OllamaProcess(nvml, {VLM: VLM_MIB, "other:1b": 900.0}, **times) as ollama:
        gpu.reset(total_mib=CARD_MIB, context_mib=CONTEXT_MIB)
        gpu.link(nvml)
        bench = Bench(nvml, gpu, ollama, LedgerCard(nvml, clock=clock, slots=(7, 8)), make)
        try:
            yield bench
        finally:
            gpu.break_down(False)
            gpu.fail_allocation(-1)
            for manager in made:
                manager.close()
            gpu.reset(total_mib=CARD_MIB)
            gpu.unlink()
            gpu.reset()
            clock.close()
