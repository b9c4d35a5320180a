"""The faults of the card and of CLIP, one row one test: what each does to readings, to CLIP and to the manager.

`nvml-*` are the cases that the driver library can put a program in; B and C are reports from real life, by number.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

import numpy as np
import torch
from PIL import Image

from gpu_fsm import ExecutionMode
from gpu_fsm import clip as clip_module
from gpu_fsm.errors import Bucket, ClipOutOfMemory, CudaPoisoned, ForkedProcess, InsufficientVRAM
from gpu_fsm.events import ResourceChanged, VRAMLow
from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.vram import VRAMMonitor
from tests.tools import building, fake_nvml, fakegpu, tiny_clip
from tests.tools.bench import BASELINE_MIB, CARD_MIB, CONTEXT_MIB, Bench, set_up
from tests.tools.fake_nvml import FakeNVML
from tests.waiting import in_thread, run_python, until

pytestmark = [pytest.mark.core, pytest.mark.needs_torch, *building.marks(fake_nvml.missing() or fakegpu.missing())]

UNINITIALIZED, NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED = 1, 3, 4, 9
LIBRARY_NOT_FOUND, GPU_IS_LOST, LIB_RM_VERSION_MISMATCH, UNKNOWN = 12, 15, 18, 999
ITEMS: list[object] = ["a window", Image.new("RGB", (48, 40), "blue"), "a list of files"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny CLIP in memory, to be copied."""
    from sentence_transformers import SentenceTransformer

    folder = tiny_clip.build(tmp_path_factory.mktemp("clip") / "tiny")
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any) -> Iterator[Bench]:
    """A card, an Ollama on it, and managers."""
    with set_up(tmp_path, monkeypatch, model) as ready:
        yield ready


# --- what the driver library can do ----------------------------------------------------------------------------------


@frozen
class Case:
    """How the driver is spoilt, and what a reading must then say."""

    spoil: Callable[[FakeNVML], object]
    present: bool
    lost: bool
    source: str
    bucket: Bucket
    words: str = ""
    inits: int = 1


def _unified(nvml: FakeNVML) -> None:
    nvml.state.device[0].mem_error = NOT_SUPPORTED


def _sliced(nvml: FakeNVML) -> None:
    nvml.add_gpu(total_mib=2048, used_mib=48, parent=0)
    nvml.state.device[0].mem_error = NO_PERMISSION


def _untold(nvml: FakeNVML) -> None:
    nvml.add_process(0, 7, None, name="compositor")


def _old(nvml: FakeNVML) -> None:
    nvml.state.old_driver = 1


CASES = {
    "nvml-no_library": Case(
        lambda nvml: nvml.fail("INIT", LIBRARY_NOT_FOUND), False, False, "none", "cpu_only", "no NVIDIA driver library"
    ),
    "nvml-no_kernel_driver": Case(
        lambda nvml: nvml.fail("INIT", DRIVER_NOT_LOADED), False, False, "none", "cpu_only", "not loaded"
    ),
    "nvml-no_device_nodes": Case(lambda nvml: nvml.fail("INIT", UNKNOWN), True, False, "none", "retry", "nvidia_uvm"),
    "nvml-upgraded_underneath": Case(
        lambda nvml: nvml.fail("INIT", LIB_RM_VERSION_MISMATCH), True, False, "none", "user", "reboot"
    ),
    "nvml-suspend_once": Case(
        lambda nvml: nvml.fail("MEM", UNKNOWN, times=1, after=1), True, False, "nvml", "none", inits=2
    ),
    "nvml-suspend_for_good": Case(
        lambda nvml: nvml.fail("MEM", UNKNOWN), True, False, "none", "retry", "nvidia_uvm", inits=2
    ),
    "nvml-off_the_bus": Case(lambda nvml: nvml.fail("MEM", GPU_IS_LOST), False, True, "none", "restart_process", "bus"),
    "nvml-unified_memory": Case(_unified, True, False, "unified", "none", "shared with the CPU"),
    "nvml-mig_parent_without_a_slice": Case(
        lambda nvml: nvml.fail("MEM", NO_PERMISSION), True, False, "none", "user", "MIG"
    ),
    "nvml-mig_with_its_slice": Case(_sliced, True, False, "nvml", "none"),
    "nvml-shares_not_told": Case(_untold, True, False, "nvml", "none"),
    "nvml-before_r510": Case(_old, True, False, "nvml", "none"),
    "nvml-foreign_shutdown": Case(
        lambda nvml: nvml.fail("MEM", UNINITIALIZED, times=1, after=1), True, False, "nvml", "none", inits=2
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_driver_can_be_met_in_this_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """One answer of three, one source, one bucket; free memory is a number only where somebody told it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    from gpu_fsm.ports import RealClock

    nvml = FakeNVML.create(tmp_path)
    nvml.add_gpu(total_mib=CARD_MIB, used_mib=BASELINE_MIB)
    case.spoil(nvml)
    with nvml.active():
        monitor = VRAMMonitor(GPUResourceConfig(), clock=RealClock())
        info = monitor.read(5.0)
        holders = monitor.holders()
        monitor.close()
    assert (info.present, info.lost, info.source, info.bucket) == (case.present, case.lost, case.source, case.bucket)
    assert (info.free_mib is not None) == (case.source != "none")
    assert case.words in info.detail
    assert nvml.references == 0
    assert nvml.calls("INIT") <= case.inits
    if case is CASES["nvml-mig_with_its_slice"]:
        assert (info.total_mib, info.device_uuid[:4]) == (2048, "MIG-")
    if case is CASES["nvml-shares_not_told"]:
        assert holders is not None
        assert [holder.mib for holder in holders] == [None]
    if case is CASES["nvml-before_r510"]:
        assert holders is None


# --- B: the card -----------------------------------------------------------------------------------------------------


def b01_no_driver(bench: Bench) -> None:
    """CPU only, said in the status, no error."""
    bench.nvml.fail("INIT", LIBRARY_NOT_FOUND)
    manager = bench.make(clip_device="cpu")
    assert manager.set_execution_mode("autopilot").granted
    status = manager.get_status()
    assert (status.cpu_only, status.vram.total_mib, status.clip_device) == (True, None, "cpu")
    assert "no NVIDIA driver library" in status.cpu_only_reason


def b02_driver_upgraded_underneath(bench: Bench) -> None:
    """Unknown, not zero: modes go on blindly, and the reading says what mends it."""
    manager = bench.make()
    bench.nvml.fail("MEM", LIB_RM_VERSION_MISMATCH)
    until(lambda: manager.set_execution_mode("idle") and manager.get_status().vram.free_mib is None)
    assert (manager.get_status().vram.present, manager.get_status().vram.bucket) == (True, "user")
    assert manager.set_execution_mode("recording").granted
    assert manager.set_execution_mode("idle").granted


def b04_gpu_off_the_bus(bench: Bench) -> None:
    """DEGRADED(gpu_lost), for which the process must be restarted; CLIP serves from its master."""
    manager = bench.make(check_interval_s=0.05)
    assert manager.set_execution_mode("autopilot").granted
    bench.nvml.fail("MEM", GPU_IS_LOST)
    bench.gpu.break_down()
    until(lambda: manager.get_status().execution_mode is ExecutionMode.DEGRADED)
    reason = manager.get_status().reason
    assert reason is not None
    assert (reason.code, reason.bucket) == ("gpu_lost", "restart_process")
    until(lambda: manager.get_clip_device() == "cpu")
    with manager.clip() as clip:
        assert clip.encode(ITEMS).shape == (3, 16)


def b05_cuda_error_after_suspend(bench: Bench) -> None:
    """NVML is well and CUDA is not: the same, by the other sense."""
    manager = bench.make(check_interval_s=0.05)
    bench.gpu.break_down()
    outcome = manager.set_execution_mode("autopilot")
    assert outcome.reason is not None
    assert (outcome.reason.code, outcome.reason.bucket) == ("cuda_poisoned", "restart_process")
    assert manager.get_clip_device() == "cpu"
    bench.gpu.break_down(False)


def b06_memory_not_supported(bench: Bench) -> None:
    """Unified memory by the kernel, per call: the next good answer of the driver is taken again."""
    manager = bench.make(check_interval_s=0.05)
    bench.nvml.state.device[0].mem_error = NOT_SUPPORTED
    until(lambda: manager.get_status().vram.source == "unified")
    bench.nvml.state.device[0].mem_error = 0
    until(lambda: manager.get_status().vram.source == "nvml")


def b07_mig_is_read_through_its_slice(bench: Bench) -> None:
    """The whole card's figures are not ours; No Permission is not zero."""
    bench.nvml.add_gpu(total_mib=2048, used_mib=48, parent=0)
    bench.nvml.state.device[0].mem_error = NO_PERMISSION
    manager = bench.make()
    until(lambda: manager.get_status().vram.free_mib == 2000)
    assert manager.get_status().vram.device_uuid.startswith("MIG-")


def b09_jitter_is_no_news(bench: Bench) -> None:
    """Compared with the last value told: 60 and back is nothing, 60 and 60 more is, and so is 100 exactly."""
    manager = bench.make(check_interval_s=0.03)

    def free_is(mib: float) -> bool:
        return manager.get_status().vram.free_mib == CARD_MIB - BASELINE_MIB - mib

    def told() -> list[float | None]:
        return [event.free_mib for event in bench.events if isinstance(event, ResourceChanged)]

    until(lambda: free_is(0))
    for step, held in ((60, 60), (-60, 0), (60, 60)):
        bench.take(step) if step > 0 else bench.game.give_back("game")
        until(lambda held=held: free_is(held))
    assert told() == []
    bench.take(60)
    until(lambda: len(told()) == 1)
    bench.take(100)
    until(lambda: len(told()) == 2)
    assert told() == [CARD_MIB - BASELINE_MIB - 120, CARD_MIB - BASELINE_MIB - 220]


def b10_reserved_memory_is_not_free(bench: Bench) -> None:
    """One version of the memory call for life, and of it only what means the same in all."""
    bench.nvml.state.device[0].reserved = 500 * 2**20
    manager = bench.make()
    until(lambda: manager.get_status().vram.free_mib == CARD_MIB - BASELINE_MIB - 500)


def b12_no_room_is_not_tried_out(bench: Bench) -> None:
    """Where the system pages instead of failing, only the budget protects: with a full card nothing is sent."""
    bench.take(bench.game.free_mib - 100)
    manager = bench.make(on_shortage="refuse")
    refused = bench.nvml.state.device[0].refused
    for mode in ("recording", "autopilot"):
        with pytest.raises(InsufficientVRAM):
            manager.set_execution_mode(mode)
    assert bench.ollama.loaded() == ()
    assert bench.nvml.state.device[0].refused == refused
    assert bench.gpu.figures().all_allocations == 0


def b12_a_card_that_is_nearly_full_is_told(bench: Bench) -> None:
    """Used is as good as total: one event each time, with the figures and who holds the memory."""
    manager = bench.make(check_interval_s=0.05)
    told: list[VRAMLow] = []
    manager.subscribe(told.append, VRAMLow)
    until(lambda: manager.get_status().vram.free_mib is not None)
    assert not told
    for times in (1, 2):
        bench.take(bench.game.free_mib - 100)
        until(lambda times=times: len(told) == times)
        looked_at = manager.get_status().observed_at
        until(lambda then=looked_at: manager.get_status().observed_at > then + 0.15)
        assert len(told) == times
        bench.game.give_back("game")
        until(lambda: (manager.get_status().vram.free_mib or 0.0) > manager.config.floor_mib)
    low = told[0]
    assert 0.0 < low.free_mib <= 100.0 < low.floor_mib
    assert low.total_mib == manager.get_status().vram.total_mib
    assert any("MiB" in holder for holder in low.holders)


def b13_cards_go_by_uuid(bench: Bench) -> None:
    """A second card changes the driver's order and nothing else."""
    uuid = bench.nvml.state.device[0].uuid.decode()
    bench.nvml.add_gpu(total_mib=4096, uuid="GPU-ffff0000-0000-0000-0000-000000000000")
    manager = bench.make(gpu_uuid=uuid[:12], check_interval_s=0.05)
    until(lambda: manager.get_status().vram.device_uuid == uuid)
    first, second = bench.nvml.state.device[0], bench.nvml.state.device[1]
    first.uuid, second.uuid = second.uuid, first.uuid
    bench.nvml.fail("MEM", UNKNOWN, times=1)
    until(lambda: manager.get_status().vram.total_mib == 4096)
    assert manager.get_status().vram.device_uuid == uuid


def b14_a_driver_that_hangs(bench: Bench) -> None:
    """Unknown at the deadline; status and requests answer meanwhile."""
    manager = bench.make(observe_timeout_s=0.1, check_interval_s=0.05)
    until(lambda: manager.get_status().vram.free_mib is not None)
    bench.nvml.delay("MEM", 1.5)
    until(lambda: manager.get_status().vram.free_mib is None)
    start = time.perf_counter()
    for _ in range(200):
        manager.get_status()
    assert time.perf_counter() - start < 0.5
    assert manager.set_execution_mode("idle", timeout_s=1.4).granted
    bench.nvml.delay("MEM", 0.0)
    until(lambda: manager.get_status().vram.free_mib is not None)


B_ROWS: dict[str, Callable[[Bench], None]] = {
    "B01": b01_no_driver,
    "B02": b02_driver_upgraded_underneath,
    "B04": b04_gpu_off_the_bus,
    "B05": b05_cuda_error_after_suspend,
    "B06": b06_memory_not_supported,
    "B07": b07_mig_is_read_through_its_slice,
    "B09": b09_jitter_is_no_news,
    "B10": b10_reserved_memory_is_not_free,
    "B12": b12_no_room_is_not_tried_out,
    "B12-warned": b12_a_card_that_is_nearly_full_is_told,
    "B13": b13_cards_go_by_uuid,
    "B14": b14_a_driver_that_hangs,
}


# --- C: CLIP ---------------------------------------------------------------------------------------------------------


def host_of(manager: Any) -> clip_module.CLIPManager:
    """The manager's CLIP."""
    host = manager._driver.clip
    assert isinstance(host, clip_module.CLIPManager)
    return host


def c01_out_of_memory_on_the_way_up(bench: Bench) -> None:
    """Undone, DEGRADED(vram_insufficient), and the next request gets it."""
    manager = bench.make()
    bench.gpu.fail_allocation(0)
    outcome = manager.set_execution_mode("autopilot")
    assert outcome.reason is not None
    assert (outcome.reason.code, outcome.reason.bucket) == ("vram_insufficient", "settle")
    assert manager.get_clip_device() == "cpu"
    until(lambda: manager.set_execution_mode("autopilot").granted)


def c01_out_of_memory_while_making_the_context(bench: Bench) -> None:
    """A context bigger than planned tells its lack of room as any error of the runtime: the device is asked again."""
    bench.gpu.reset(total_mib=CARD_MIB, context_mib=CARD_MIB)
    manager = bench.make()
    outcome = manager.set_execution_mode("autopilot")
    assert outcome.reason is not None
    assert (outcome.reason.code, outcome.reason.bucket) == ("vram_insufficient", "settle")
    bench.gpu.reset(total_mib=CARD_MIB, context_mib=CONTEXT_MIB)
    until(lambda: manager.set_execution_mode("autopilot").granted)


def c02_out_of_memory_half_way(bench: Bench) -> None:
    """No tensor stays behind, nothing stays allocated."""
    host = host_of(bench.make())
    reference = host.encode(ITEMS)
    for n in (0, 1, 7, 40):
        bench.gpu.fail_allocation(n)
        with pytest.raises(ClipOutOfMemory):
            host.to_gpu()
        assert host.device == "cpu"
        assert (bench.gpu.figures().allocated, bench.gpu.figures().reserved) == (0, 0)
        assert np.array_equal(host.encode(ITEMS), reference)


def c04_device_side_assert(bench: Bench) -> None:
    """The device is left for the life of the process, CLIP serves on, the reason asks for a restart."""
    manager = bench.make()
    assert manager.set_execution_mode("autopilot").granted
    bench.gpu.break_down()
    with manager.clip() as clip, pytest.raises(CudaPoisoned):
        clip.encode(ITEMS)
    until(lambda: manager.get_status().reason is not None)
    reason = manager.get_status().reason
    assert reason is not None
    assert (reason.code, reason.bucket) == ("cuda_poisoned", "restart_process")
    with manager.clip() as clip:
        assert clip.encode(ITEMS).shape == (3, 16)
    bench.gpu.break_down(False)
    before = bench.gpu.figures().all_allocations
    with pytest.raises(CudaPoisoned):
        host_of(manager).to_gpu()
    assert bench.gpu.figures().all_allocations == before


def c05_a_move_waits_for_the_encode(bench: Bench) -> None:
    """A lease spans the whole encode, and the request in its way waits."""
    manager = bench.make(drain_timeout_s=20.0)
    with manager.clip() as clip:
        moving = in_thread(manager.set_execution_mode, "autopilot")
        until(lambda: not moving.done() and manager._driver.engine.waiting)
        before = clip.device
        clip.encode(ITEMS, batch_size=1)
        assert (before, clip.device) == ("cpu", "cpu")
    assert moving.result(20.0).granted


def c05_a_batch_keeps_a_careless_move_out(bench: Bench) -> None:
    """Also without a lease: in the middle of a batch nobody gets hold of the weights."""
    host = host_of(bench.make(drain_timeout_s=0.05))
    reference = host.encode(ITEMS)
    refused: list[BaseException | None] = []
    text_tower = host._model[0].model.text_model
    hook = text_tower.register_forward_pre_hook(lambda *_: refused.append(in_thread(host.to_gpu).exception(20.0)))
    try:
        assert np.array_equal(host.encode(ITEMS), reference)
    finally:
        hook.remove()
    assert ["not moved" in str(error) for error in refused] == [True]
    assert bench.gpu.figures().all_allocations == 0


def c06_encodes_are_served_one_at_a_time(bench: Bench) -> None:
    """Eight threads, every vector right."""
    host = host_of(bench.make())
    reference = host.encode(ITEMS)
    results = [in_thread(host.encode, ITEMS) for _ in range(8)]
    assert all(np.array_equal(result.result(30.0), reference) for result in results)


def c07_no_encode_moves_the_model(bench: Bench) -> None:
    """`device=` is not taken, and where the model is does not change by encoding."""
    manager = bench.make()
    assert manager.set_execution_mode("autopilot").granted
    with manager.clip() as clip:
        with pytest.raises(TypeError, match="device"):
            clip.encode(ITEMS, device="cpu")  # type: ignore[call-arg]
        clip.encode(ITEMS)
        assert clip.device == "fakegpu:0"


def c07_half_a_model_on_the_card_is_seen(bench: Bench) -> None:
    """Somebody moved one tower: whichever it is, CLIP counts as on the GPU and is brought home before the load."""
    manager = bench.make()
    model = host_of(manager)._model[0].model
    for tower in (model.text_model, model.vision_model):
        tower.to("fakegpu")
        assert (host_of(manager).place, host_of(manager).device) == ("gpu", "mixed")
        assert manager.set_execution_mode("recording").granted
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
        assert bench.gpu.figures().allocated == 0
        assert manager.set_execution_mode("idle").granted


def c08_the_context_is_planned_for(bench: Bench) -> None:
    """Room for the weights and a batch is not enough for the first move of a process: nothing is tried."""
    manager = bench.make(on_shortage="refuse", check_interval_s=0.05)
    tensors = (*host_of(manager)._model.parameters(), *host_of(manager)._model.buffers())
    weights_mib = sum(tensor.nbytes for tensor in tensors) / 2**20
    enough_later_mib = manager.config.reserve_mib + weights_mib + clip_module.ACTIVATIONS_MIB + CONTEXT_MIB / 2
    bench.take(bench.game.free_mib - enough_later_mib)
    until(lambda: manager.get_status().vram.free_mib == pytest.approx(bench.game.free_mib))
    with pytest.raises(InsufficientVRAM):
        manager.set_execution_mode("autopilot")
    assert bench.gpu.figures().all_allocations == 0


def c08_the_context_stays(bench: Bench) -> None:
    """Measured, shown, and not counted as something to get back."""
    manager = bench.make()
    assert manager.set_execution_mode("autopilot").granted
    assert manager.set_execution_mode("recording").granted
    assert manager.get_status().clip_context_mib == pytest.approx(CONTEXT_MIB, abs=0.1)
    assert host_of(manager).held_mib == 0.0


def c09_the_cache_is_given_back_before_the_load(bench: Bench) -> None:
    """By the driver's word: when the VLM is in, nothing of CLIP's is reserved."""
    manager = bench.make()
    assert manager.set_execution_mode("autopilot").granted
    with manager.clip() as clip:
        clip.encode(ITEMS * 20)
    assert bench.gpu.figures().reserved > 0
    assert manager.set_execution_mode("recording").granted
    assert bench.gpu.figures().reserved == 0


def c10_a_forked_child_is_told(bench: Bench) -> None:
    """A real fork, with a real CLIP loaded: every call in the child raises, and the parent works on."""
    code = f"""
import os, warnings
warnings.simplefilter("ignore")
from gpu_fsm import GPUResourceConfig
from gpu_fsm.clip import CLIPManager
from gpu_fsm.errors import {ForkedProcess.__name__}
from tests.tools.storm import tiny
host = CLIPManager(GPUResourceConfig(clip_device="cpu"), model=tiny())
host.prepare()
read, write = os.pipe()
if os.fork() == 0:
    told = 0
    for call in (lambda: host.encode(["x"]), host.to_gpu, host.to_cpu, host.prepare):
        try:
            call()
        except ForkedProcess:
            told += 1
    host.close()
    os.write(write, str(told).encode())
    os._exit(0)
os.wait()
print(os.read(read, 9).decode(), host.encode(["x"]).shape)
"""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "HOME": "/nonexistent"}
    assert run_python(code, env=quiet).split("\n")[0] == "4 (1, 16)"


def c12_a_model_is_loaded_onto_the_cpu(bench: Bench) -> None:
    """Whatever the default device is: nothing is allocated before a move is asked for."""
    manager = bench.make()
    with manager.clip() as clip:
        clip.encode(ITEMS)
    assert bench.gpu.figures().all_allocations == 0
    assert bench.used_mib == BASELINE_MIB


def c13_threads_are_bounded(bench: Bench) -> None:
    """On the CPU CLIP takes four at most, and gives the program's own number back."""
    host, before = host_of(bench.make()), torch.get_num_threads()
    seen: list[int] = []
    hook = host._model[0].register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(clip_module.CPU_THREADS + 2)
        host.encode(ITEMS)
        assert torch.get_num_threads() == clip_module.CPU_THREADS + 2
    finally:
        torch.set_num_threads(before)
        hook.remove()
    assert set(seen) == {clip_module.CPU_THREADS}


def c14_embeddings_agree_across_devices(bench: Bench) -> None:
    """Cosine 0.9999 across devices, bits at home; up there all lies in one piece, which goes as one."""
    host = host_of(bench.make())
    home = host.encode(ITEMS)
    host.to_gpu()
    tensors = (*host._model.parameters(), *host._model.buffers())
    assert {str(tensor.device) for tensor in tensors} == {"fakegpu:0"}
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    away = host.encode(ITEMS)
    host.to_cpu()
    assert (np.sum(home * away, axis=1) >= 0.9999).all()
    assert np.array_equal(host.encode(ITEMS), home)


def c16_the_device_is_named_with_its_index(bench: Bench) -> None:
    """Another thread's default device cannot redirect a move."""
    host = host_of(bench.make())
    thread = threading.Thread(target=host.to_gpu)
    with torch.device("meta"):
        thread.start()
        thread.join(30.0)
        assert host.device == "fakegpu:0"
    host.to_cpu()
    assert host.device == "cpu"


C_ROWS: dict[str, Callable[[Bench], None]] = {
    "C01": c01_out_of_memory_on_the_way_up,
    "C01-context": c01_out_of_memory_while_making_the_context,
    "C02": c02_out_of_memory_half_way,
    "C04": c04_device_side_assert,
    "C05": c05_a_move_waits_for_the_encode,
    "C05-careless": c05_a_batch_keeps_a_careless_move_out,
    "C06": c06_encodes_are_served_one_at_a_time,
    "C07": c07_no_encode_moves_the_model,
    "C07-half": c07_half_a_model_on_the_card_is_seen,
    "C08": c08_the_context_stays,
    "C08-planned": c08_the_context_is_planned_for,
    "C09": c09_the_cache_is_given_back_before_the_load,
    "C10": c10_a_forked_child_is_told,
    "C12": c12_a_model_is_loaded_onto_the_cpu,
    "C13": c13_threads_are_bounded,
    "C14": c14_embeddings_agree_across_devices,
    "C16": c16_the_device_is_named_with_its_index,
}


@pytest.mark.parametrize("row", [*B_ROWS.items(), *C_ROWS.items()], ids=lambda row: f"{row[0]}-{row[1].__name__[4:]}")
def test_a_fault_of_real_life_is_met_as_promised(bench: Bench, row: tuple[str, Callable[[Bench], None]]) -> None:
    """The row's own function says what is promised."""
    row[1](bench)
