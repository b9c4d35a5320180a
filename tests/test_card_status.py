"""What a manager tells of its card, over the real monitor and a driver that does as it is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_fsm import GPUResourceConfig, GPUResourceManager, VRAMInfo
from gpu_fsm.errors import ConfigError
from gpu_fsm.vram import GPU_IS_LOST, NOT_SUPPORTED, UNKNOWN
from tests.ollama_clients import Stopwatch
from tests.tools import building, fake_nvml
from tests.tools.fake_nvml import FakeNVML

pytestmark = [pytest.mark.core, *building.marks(fake_nvml.missing())]

NOBODY = "http://127.0.0.1:9"
"""Where no Ollama listens."""
A, B = "GPU-aaaaaaaa-0000-0000-0000-000000000000", "GPU-bbbbbbbb-0000-0000-0000-000000000000"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNVML]:
    """A driver without cards, and a runtime folder of our own."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fake = FakeNVML.create(tmp_path)
    with fake.active():
        yield fake


def manager_of(**settings: Any) -> GPUResourceManager:
    """A manager over the real adapters, driven by whoever waits."""
    config = {"clip_model": None, "ollama_url": NOBODY, "observe_timeout_s": 0.5, **settings}
    return GPUResourceManager(GPUResourceConfig(**config), threaded=False)


def look(manager: GPUResourceManager) -> VRAMInfo:
    """What the status tells after another look, which is not spared for its nearness to the last one."""
    manager.drive_for(0.05)
    manager.set_execution_mode("idle", timeout_s=20.0)
    return manager.get_status().vram


def test_free_is_what_the_driver_calls_free(driver: FakeNVML) -> None:
    """In MiB of 1024 KiB, and without what the driver keeps for itself."""
    driver.add_gpu(total_mib=8192, used_mib=1000, reserved_mib=500)
    with manager_of() as manager:
        told = look(manager)
    assert (told.total_mib, told.free_mib, told.source) == (8192, 6692, "nvml")


def test_the_card_is_the_one_that_was_named(driver: FakeNVML) -> None:
    """By its UUID; where none is named and two could be meant, the user is asked."""
    driver.add_gpu(total_mib=24576, uuid=A)
    driver.add_gpu(total_mib=12288, uuid=B)
    with pytest.raises(ConfigError, match="several cards"):
        manager_of()
    with manager_of(gpu_uuid=B) as manager:
        told = look(manager)
    assert (told.device_uuid, told.total_mib) == (B, 12288)


def test_a_divided_card_is_told_as_its_slice(driver: FakeNVML) -> None:
    """The rest is not ours."""
    card = driver.add_gpu(total_mib=81920)
    driver.add_gpu(total_mib=10240, used_mib=240, parent=card)
    with manager_of() as manager:
        told = look(manager)
    assert (told.total_mib, told.free_mib) == (10240, 10000)


def test_unknown_lost_and_mended_are_told_apart(driver: FakeNVML) -> None:
    """A card that does not answer has no free memory that is known; one that has gone is lost; one hiccup is mended."""
    driver.add_gpu(total_mib=8192, used_mib=192)
    with manager_of() as manager:
        assert look(manager).free_mib == 8000
        driver.fail("MEM", UNKNOWN, times=1)
        assert look(manager).free_mib == 8000
        driver.fail("MEM", UNKNOWN)
        told = look(manager)
        assert (told.present, told.lost, told.free_mib) == (True, False, None)
        driver.fail("MEM", GPU_IS_LOST)
        told = look(manager)
        assert (told.present, told.lost, told.free_mib) == (False, True, None)


def test_a_driver_that_hangs_costs_its_time_once(driver: FakeNVML) -> None:
    """Whoever asks after that is told at once that nobody can tell."""
    driver.add_gpu(total_mib=8192)
    with manager_of() as manager:
        look(manager)
        driver.delay("MEM", 4.0)
        assert look(manager).free_mib is None
        watch = Stopwatch()
        for _ in range(4):
            assert look(manager).free_mib is None
        assert watch.s < 1.5


def test_an_assumed_size_frees_nothing(driver: FakeNVML, monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor knows the size from the settings and nothing of what is free."""
    driver.add_gpu(total_mib=8192)
    driver.fail("MEM", NOT_SUPPORTED)
    monkeypatch.setattr("gpu_fsm.vram.MEMINFO", Path("/nowhere"))
    with manager_of(vram_budget_mib=8192.0) as manager:
        assert look(manager).source == "assumed"
        told = manager._driver.probe.read(1.0)
    assert (told.total_mib, told.free_mib) == (8192.0, None)


def test_a_process_in_both_lists_holds_its_share_once(driver: FakeNVML) -> None:
    """Games compute and draw."""
    driver.add_gpu(total_mib=8192, used_mib=900)
    driver.add_process(0, 8, 900, name="game", lists="both")
    with manager_of() as manager:
        look(manager)
        holders = manager._driver.probe.holders()
    assert [(holder.pid, holder.mib) for holder in holders or ()] == [(8, 900)]
