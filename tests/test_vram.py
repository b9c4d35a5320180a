"""The VRAM monitor over the real `pynvml`: on a machine without a driver, and on cards of a fake driver."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from gpu_fsm import ExecutionMode, GPUResourceManager
from gpu_fsm.errors import ConfigError, InsufficientVRAM
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.ports import VRAMProbe
from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.status import Holder
from gpu_fsm.vram import RETRY_S, SPACING_S, VRAMMonitor
from tests.tools import building, fake_nvml
from tests.tools.fake_nvml import FakeNVML

UNINITIALIZED, NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED = 1, 3, 4, 9
LIBRARY_NOT_FOUND, GPU_IS_LOST, LIB_RM_VERSION_MISMATCH, UNKNOWN = 12, 15, 18, 999

pytestmark = pytest.mark.core

needs_gcc = building.needs(fake_nvml.missing())


class HandClock:
    """Time that moves when told, and a little whenever somebody looks at it: no two readings are of one moment."""

    def __init__(self) -> None:
        self.now = 100.0
        self.tick_s = 1.05 * SPACING_S

    def monotonic(self) -> float:
        self.now += self.tick_s
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, condition: threading.Condition, timeout_s: float | None) -> None:
        raise NotImplementedError


@pytest.fixture
def clock() -> HandClock:
    """The manager's clock."""
    return HandClock()


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNVML]:
    """A driver without cards, in this process, and an environment that says nothing about cards."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    with FakeNVML.create(tmp_path).active() as fake:
        yield fake


def monitor_of(clock: HandClock, **settings: object) -> VRAMMonitor:
    """A monitor with these settings."""
    return VRAMMonitor(GPUResourceConfig(**settings), clock=clock)  # type: ignore[arg-type]


def in_a_fresh_process(code: str, env: dict[str, str] | None = None) -> dict[str, object]:
    """Run code that prints one JSON object, where nothing has touched NVML before."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    return dict(json.loads(done.stdout))


READ_ONCE = """
import json, sys, time
from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.vram import VRAMMonitor
assert "pynvml" not in sys.modules
class Clock:
    monotonic = staticmethod(time.monotonic)
monitor = VRAMMonitor(GPUResourceConfig(), clock=Clock())
info = monitor.read(5.0)
holders = monitor.holders()
monitor.close()
print(json.dumps(dict(present=info.present, lost=info.lost, free=info.free_mib, total=info.total_mib,
                      source=info.source, detail=info.detail, holders=None if holders is None else len(holders))))
"""


# --- without a driver ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA driver")
def test_a_machine_without_a_driver_has_no_card_and_that_is_no_error() -> None:
    """Row no_library, with the real pynvml: absent, no figures, nobody lost."""
    said = in_a_fresh_process(READ_ONCE)
    assert said["present"] is False
    assert said["lost"] is False
    assert said["free"] is None
    assert said["total"] is None
    assert said["source"] == "none"
    assert "no NVIDIA driver" in str(said["detail"])
    assert said["holders"] is None


def test_the_constructor_touches_no_driver(clock: HandClock) -> None:
    """Making a monitor costs no I/O and no thread; closing an unused one neither."""
    before = set(threading.enumerate())  # some of them may be ending
    monitor = monitor_of(clock)
    assert isinstance(monitor, VRAMMonitor)
    probe: VRAMProbe = monitor
    probe.close()
    assert set(threading.enumerate()) <= before


# --- the unmodified binding finds the fake by itself -----------------------------------------------------------------


@needs_gcc
def test_pynvml_loads_the_fake_driver_as_its_own(tmp_path: Path) -> None:
    """A process whose loader finds the library reads our card through pynvml as shipped, and leaves it balanced."""
    fake = FakeNVML.create(tmp_path)
    fake.add_gpu(total_mib=8192, used_mib=1000, reserved_mib=192)
    fake.add_process(0, 41, 900)
    said = in_a_fresh_process(READ_ONCE, fake.env())
    assert (said["total"], said["free"], said["source"], said["holders"]) == (8192, 7000, "nvml", 1)
    assert fake.calls("INIT") == 1
    assert fake.references == 0


# --- the table of faults ---------------------------------------------------------------------------------------------

ABSENT, LOST, SILENT = (False, False), (False, True), (True, False)


@needs_gcc
@pytest.mark.parametrize(
    ("function", "code", "answer", "word"),
    [
        pytest.param("INIT", LIBRARY_NOT_FOUND, ABSENT, "no NVIDIA driver library", id="no_library"),
        pytest.param("INIT", DRIVER_NOT_LOADED, ABSENT, "not loaded", id="no_kernel_driver"),
        pytest.param("INIT", UNKNOWN, SILENT, "nvidia_uvm", id="no_device_nodes"),
        pytest.param("INIT", LIB_RM_VERSION_MISMATCH, SILENT, "reboot", id="driver_upgraded_underneath"),
        pytest.param("MEM", UNKNOWN, SILENT, "nvidia_uvm", id="suspend_or_container_reload"),
        pytest.param("MEM", GPU_IS_LOST, LOST, "bus", id="gpu_off_the_bus"),
        pytest.param("MEM", NO_PERMISSION, SILENT, "MIG", id="mig_parent_handle"),
        pytest.param("MEM", UNINITIALIZED, SILENT, "shut", id="somebody_elses_shutdown"),
    ],
)
def test_a_fault_is_told_for_what_it_is(
    driver: FakeNVML, clock: HandClock, function: str, code: int, answer: tuple[bool, bool], word: str
) -> None:
    """Absent, lost and unknown are three answers; none of them carries a number, each says what is the matter."""
    driver.add_gpu()
    driver.fail(function, code)
    monitor = monitor_of(clock)
    info = monitor.read(5.0)
    assert (info.present, info.lost) == answer
    assert info.free_mib is None
    assert info.total_mib is None
    assert word in info.detail
    monitor.close()
    assert driver.references == 0


@needs_gcc
def test_a_driver_upgraded_in_mid_run_makes_memory_unknown_not_zero(driver: FakeNVML, clock: HandClock) -> None:
    """Row driver_upgraded_underneath, later: calls fail after some good ones, and good figures are not repeated."""
    driver.add_gpu(total_mib=8192, used_mib=92)
    monitor = monitor_of(clock)
    assert monitor.read(5.0).free_mib == 8100
    driver.fail("MEM", LIB_RM_VERSION_MISMATCH)
    info = monitor.read(5.0)
    assert (info.present, info.lost, info.free_mib) == (True, False, None)
    monitor.close()


@needs_gcc
def test_a_card_that_was_there_and_cannot_be_found_again_is_lost_not_absent(driver: FakeNVML, clock: HandClock) -> None:
    """A machine with a card does not become one without: the driver's unloading is the loss of the card."""
    driver.add_gpu()
    monitor = monitor_of(clock)
    assert monitor.read(5.0).present
    driver.fail("MEM", UNKNOWN)
    driver.fail("INIT", DRIVER_NOT_LOADED)
    info = monitor.read(5.0)
    assert (info.present, info.lost) == (False, True)
    assert info.device_uuid.startswith("GPU-")
    monitor.close()
    assert driver.references == 0


@needs_gcc
@pytest.mark.parametrize(
    "code", [UNKNOWN, UNINITIALIZED], ids=["suspend_or_container_reload", "somebody_elses_shutdown"]
)
def test_a_stale_session_is_mended_by_one_fresh_init(driver: FakeNVML, clock: HandClock, code: int) -> None:
    """One shutdown and init, inside the same read; the caller sees figures."""
    driver.add_gpu(total_mib=4096, used_mib=96)
    monitor = monitor_of(clock)
    monitor.read(5.0)
    driver.fail("MEM", code, times=1)
    assert monitor.read(5.0).free_mib == 4000
    assert driver.calls("INIT") == 2
    assert driver.calls("SHUTDOWN") == 1
    monitor.close()
    assert driver.references == 0


@needs_gcc
def test_a_fault_that_lasts_costs_one_init_per_half_minute_not_one_per_read(driver: FakeNVML, clock: HandClock) -> None:
    """An init may start the GPU up and stalls other users of the driver."""
    driver.add_gpu()
    monitor = monitor_of(clock)
    driver.fail("MEM", UNKNOWN)
    for _ in range(50):
        assert monitor.read(5.0).free_mib is None
    assert driver.calls("INIT") == 2
    driver.mend("MEM")
    assert monitor.read(5.0).free_mib is not None
    driver.fail("MEM", UNKNOWN)
    clock.now += RETRY_S
    monitor.read(5.0)
    assert driver.calls("INIT") == 3
    monitor.close()


@needs_gcc
def test_an_absent_driver_is_asked_again_slowly(driver: FakeNVML, clock: HandClock) -> None:
    """A driver that is loaded later is found, without an init for every read until then."""
    driver.add_gpu()
    driver.fail("INIT", DRIVER_NOT_LOADED)
    monitor = monitor_of(clock)
    for _ in range(20):
        assert not monitor.read(5.0).present
    assert driver.calls("INIT") == 1
    driver.mend("INIT")
    clock.now += RETRY_S
    assert monitor.read(5.0).present
    monitor.close()


@needs_gcc
def test_a_lost_card_that_answers_again_is_there_again(driver: FakeNVML, clock: HandClock) -> None:
    """Nothing is latched: each read asks."""
    driver.add_gpu()
    monitor = monitor_of(clock)
    driver.fail("MEM", GPU_IS_LOST)
    assert monitor.read(5.0).lost
    driver.mend("MEM")
    assert monitor.read(5.0).free_mib is not None
    monitor.close()


@needs_gcc
def test_a_driver_without_cards_is_a_machine_without_a_gpu(driver: FakeNVML, clock: HandClock) -> None:
    """Count zero is absent, and gives NVML back."""
    monitor = monitor_of(clock)
    info = monitor.read(5.0)
    assert (info.present, info.lost) == ABSENT
    assert driver.references == 0
    monitor.close()


@needs_gcc
def test_unified_memory_is_read_from_the_kernel_and_labelled(driver: FakeNVML, clock: HandClock) -> None:
    """Row unified_memory: only Not Supported leads there, per call, and the source says so."""
    driver.add_gpu()
    driver.state.device[0].mem_error = NOT_SUPPORTED
    monitor = monitor_of(clock)
    info = monitor.read(5.0)
    assert (info.present, info.source, info.scope) == (True, "unified", "card")
    assert info.total_mib is not None
    assert info.free_mib is not None
    assert 0 < info.free_mib < info.total_mib
    driver.state.device[0].mem_error = 0
    assert monitor.read(5.0).source == "nvml"
    monitor.close()


@needs_gcc
@pytest.mark.parametrize(("total", "used"), [(0, 0), (100, 200)], ids=["no_total", "more_free_than_there_is"])
def test_figures_that_cannot_be_are_not_passed_on(driver: FakeNVML, clock: HandClock, total: int, used: int) -> None:
    """Some drivers of unified machines answer with success and nonsense."""
    driver.add_gpu(total_mib=total, used_mib=used)
    monitor = monitor_of(clock)
    info = monitor.read(5.0)
    assert info.present
    assert info.free_mib is None
    monitor.close()


@needs_gcc
def test_an_old_driver_gives_memory_but_no_process_list(driver: FakeNVML, clock: HandClock) -> None:
    """Row before_r510: the first version of the call works everywhere; the list raises what is no NVMLError."""
    driver.add_gpu(total_mib=8192, used_mib=92)
    driver.state.old_driver = 1
    monitor = monitor_of(clock)
    assert monitor.read(5.0).free_mib == 8100
    assert monitor.holders() is None
    monitor.close()


@needs_gcc
def test_memory_that_the_driver_reserves_is_not_free(driver: FakeNVML, clock: HandClock) -> None:
    """`free` decides, and it means the same in every version of the call."""
    driver.add_gpu(total_mib=8192, used_mib=1000, reserved_mib=500)
    monitor = monitor_of(clock)
    info = monitor.read(5.0)
    assert info.free_mib == 6692
    assert info.used_mib == 1500
    driver.set_used(0, 2000)
    assert monitor.read(5.0).free_mib == 5692
    monitor.close()


@needs_gcc
def test_no_reader_makes_the_driver_answer_more_than_fifty_times_a_second(driver: FakeNVML, clock: HandClock) -> None:
    """Whoever asks, and however often: a reading is repeated for 20 ms, with its own time; holders bring no other."""
    driver.add_gpu(total_mib=8192, used_mib=192)
    monitor = monitor_of(clock)
    clock.tick_s = 0.0
    first = monitor.read(5.0)
    driver.set_used(0, 1192)
    calls = driver.calls("MEM")
    for _ in range(100):
        assert monitor.read(5.0) is first
        monitor.holders()
    assert driver.calls("MEM") == calls
    clock.now += SPACING_S * 1.01
    assert monitor.read(5.0).free_mib == 7000
    assert monitor.free_mib() == 7000
    driver.set_used(0, 2192)
    assert monitor.free_mib() == 6000, "a measurement is not answered from memory"
    monitor.close()


# --- who else can tell -----------------------------------------------------------------------------------------------


@needs_gcc
def test_torch_is_asked_where_the_driver_has_no_figures(driver: FakeNVML, clock: HandClock) -> None:
    """After NVML and the kernel, labelled, and never for a card that is lost."""
    driver.add_gpu(total_mib=8192, used_mib=192)
    monitor = monitor_of(clock)
    asked = []

    def view() -> tuple[float, float, Literal["card"]]:
        asked.append(1)
        return 8000.0, 5000.0, "card"

    monitor.process_view = view
    assert monitor.read(5.0).source == "nvml"
    assert not asked
    driver.fail("MEM", LIB_RM_VERSION_MISMATCH)
    info = monitor.read(5.0)
    assert (info.source, info.scope, info.total_mib, info.free_mib) == ("torch", "card", 8000.0, 5000.0)
    assert "reboot" in info.detail
    driver.fail("MEM", GPU_IS_LOST)
    info = monitor.read(5.0)
    assert (info.source, info.free_mib, info.lost) == ("none", None, True)
    monitor.process_view = lambda: None
    driver.fail("MEM", LIB_RM_VERSION_MISMATCH)
    assert monitor.read(5.0).free_mib is None
    monitor.close()


@needs_gcc
@pytest.mark.parametrize("code", [LIBRARY_NOT_FOUND, LIB_RM_VERSION_MISMATCH], ids=["no_driver", "upgraded_underneath"])
def test_the_size_in_the_settings_is_labelled_an_assumption(driver: FakeNVML, clock: HandClock, code: int) -> None:
    """Last of all, with no free memory of its own: a driver that tells is believed instead."""
    driver.add_gpu(total_mib=8192, used_mib=192)
    monitor = monitor_of(clock, vram_budget_mib=6000)
    assert monitor.read(5.0).source == "nvml"
    monitor.close()
    driver.fail("INIT", code)
    monitor = monitor_of(clock, vram_budget_mib=6000)
    info = monitor.prepare()
    assert (info.source, info.scope, info.total_mib, info.free_mib) == ("assumed", "assumed", 6000.0, None)
    assert (info.present, info.bucket) == (True, "settle")
    assert "assumed" in info.detail
    monitor.close()


@needs_gcc
def test_an_assumed_size_admits_and_proves_nothing(driver: FakeNVML, tmp_path: Path) -> None:
    """What Ollama and CLIP are known to hold counts down; what is too big is refused; releases are waited out."""
    world = SimulatedWorld(vlm_mib=5000.0, gpu=True)
    config = world.config(vram_budget_mib=5600.0, blind_settle_s=0.5)
    driver.fail("INIT", LIBRARY_NOT_FOUND)
    server = OllamaManager(config, clock=world.clock, transport=world.transport)
    monitor = VRAMMonitor(config, clock=world.clock)
    manager = GPUResourceManager(
        config, vlm_server=server, clip_host=world.clip, vram_probe=monitor, clock=world.clock, threaded=False
    )
    assert manager.set_execution_mode("recording").granted
    vram = manager.get_status().vram
    assert (vram.source, vram.total_mib, vram.free_mib) == ("assumed", 5600.0, 600.0)
    assert manager.set_execution_mode("autopilot").granted
    assert manager.get_status().vram.free_mib == 5000.0
    assert not world.vlm_resident()
    manager.drive_for(60.0)
    assert manager.get_status().execution_mode is ExecutionMode.AUTOPILOT, "an assumed figure is no pressure"
    manager.close()
    small = world.config(vram_budget_mib=4000.0, on_shortage="refuse")
    manager = GPUResourceManager(
        small,
        vlm_server=OllamaManager(small, clock=world.clock, transport=world.transport),
        clip_host=world.clip,
        vram_probe=VRAMMonitor(small, clock=world.clock),
        clock=world.clock,
        threaded=False,
    )
    with pytest.raises(InsufficientVRAM):
        manager.set_execution_mode("recording")
    manager.close()


# --- holders ---------------------------------------------------------------------------------------------------------


@needs_gcc
def test_holders_are_named_largest_first_and_once_each(driver: FakeNVML, clock: HandClock) -> None:
    """Both lists are merged by process; a share that is not told (WDDM, WSL2) is None, not zero."""
    driver.add_gpu()
    driver.add_process(0, 7, 300, name="/usr/bin/ollama")
    driver.add_process(0, 8, 900, name="C:\\Games\\game.exe", lists="both")
    driver.add_process(0, 9, None, name="compositor", lists="graphics")
    driver.add_process(0, 10, 20)
    monitor = monitor_of(clock)
    assert monitor.holders() == (
        Holder(pid=8, name="game.exe", mib=900),
        Holder(pid=7, name="ollama", mib=300),
        Holder(pid=10, name="", mib=20),
        Holder(pid=9, name="compositor", mib=None),
    )
    monitor.close()


@needs_gcc
def test_a_process_name_cannot_break_a_log_line(driver: FakeNVML, clock: HandClock) -> None:
    """Foreign text is escaped at the edge."""
    driver.add_gpu()
    driver.add_process(0, 7, 1, name="evil\n\x1b[31mname")
    monitor = monitor_of(clock)
    holders = monitor.holders()
    assert holders is not None
    assert holders[0].name.isprintable()
    monitor.close()


# --- which card ------------------------------------------------------------------------------------------------------

A, B = "GPU-aaaa0000-0000-0000-0000-000000000000", "GPU-bbbb0000-0000-0000-0000-000000000000"


def two_cards(driver: FakeNVML, *, alike: bool = False) -> None:
    """Plug in cards A and B."""
    driver.add_gpu(uuid=A, name="Fake 3060", total_mib=12288)
    driver.add_gpu(uuid=B, name="Fake 3060" if alike else "Fake 4090", total_mib=12288 if alike else 24576)


@needs_gcc
@pytest.mark.parametrize(
    ("settings", "environment", "alike", "chosen"),
    [
        pytest.param({"gpu_uuid": B}, {"CUDA_VISIBLE_DEVICES": A}, False, B, id="configured_before_environment"),
        pytest.param({"gpu_uuid": "GPU-bbbb"}, {}, False, B, id="beginning_of_a_uuid"),
        pytest.param({"gpu_uuid": "00000000:02:00.0"}, {}, False, B, id="pci_bus_id"),
        pytest.param({}, {"CUDA_VISIBLE_DEVICES": f"{B},{A}"}, False, B, id="uuid_in_the_environment"),
        pytest.param({"clip_device": "cuda:1"}, {"CUDA_VISIBLE_DEVICES": f"{B},{A}"}, False, A, id="second_entry"),
        pytest.param(
            {}, {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, False, B, id="integer_in_pci_order"
        ),
        pytest.param({}, {"CUDA_VISIBLE_DEVICES": "1"}, True, B, id="integer_among_identical_cards"),
        pytest.param({}, {"CUDA_VISIBLE_DEVICES": "1"}, False, None, id="integer_in_an_unknown_order"),
        pytest.param({}, {}, False, None, id="two_different_cards"),
        pytest.param({}, {}, True, None, id="two_identical_cards"),
        pytest.param({}, {"CUDA_VISIBLE_DEVICES": ""}, False, None, id="all_hidden"),
        pytest.param({"gpu_uuid": "GPU-cccc"}, {}, False, None, id="configured_but_not_here"),
    ],
)
def test_the_card_is_chosen_by_uuid_or_the_user_is_asked(
    driver: FakeNVML,
    clock: HandClock,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, object],
    environment: dict[str, str],
    alike: bool,
    chosen: str | None,
) -> None:
    """NVML's order is not CUDA's: an integer decides only where both must agree; else both cards are listed."""
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    two_cards(driver, alike=alike)
    monitor = monitor_of(clock, **settings)
    if chosen is not None:
        assert monitor.prepare().device_uuid == chosen
    else:
        with pytest.raises(ConfigError, match=r"(?s)aaaa0000.*bbbb0000.*Set gpu_uuid"):
            monitor.prepare()
        info = monitor.read(5.0)
        assert info.free_mib is None
        assert "bbbb0000" in info.detail
    monitor.close()
    assert driver.references == 0


@needs_gcc
def test_cards_that_change_places_are_not_confused(driver: FakeNVML, clock: HandClock) -> None:
    """After a re-init the card is found by its UUID, not by where it was."""
    two_cards(driver)
    monitor = monitor_of(clock, gpu_uuid=B)
    assert monitor.read(5.0).total_mib == 24576
    first, second = driver.state.device[0], driver.state.device[1]
    first.uuid, second.uuid = B.encode(), A.encode()
    driver.fail("MEM", UNKNOWN, times=1)
    info = monitor.read(5.0)
    assert (info.device_uuid, info.total_mib) == (B, 12288)
    monitor.close()


@needs_gcc
@pytest.mark.parametrize(
    ("code", "lost"), [(NO_PERMISSION, False), (GPU_IS_LOST, True)], ids=["not_permitted", "off_the_bus"]
)
def test_a_card_that_cannot_be_listed_shifts_no_choice(
    driver: FakeNVML, clock: HandClock, code: int, lost: bool
) -> None:
    """A card of another container does not count; a broken one makes the choice a fault, unless a UUID was given."""
    two_cards(driver)
    driver.state.device[0].handle_error = code
    monitor = monitor_of(clock)
    info = monitor.prepare()
    assert (info.lost, info.device_uuid) == ((True, "") if lost else (False, B))
    monitor.close()
    named = monitor_of(clock, gpu_uuid=B)
    assert named.prepare().device_uuid == B
    named.close()


@needs_gcc
def test_a_divided_card_is_read_through_its_only_slice(driver: FakeNVML, clock: HandClock) -> None:
    """Row mig: the whole card's 80 GB are not ours to plan with."""
    card = driver.add_gpu(total_mib=81920)
    driver.add_gpu(total_mib=10240, used_mib=240, parent=card)
    driver.state.device[card].mem_error = NO_PERMISSION
    monitor = monitor_of(clock)
    info = monitor.prepare()
    assert info.device_uuid.startswith("MIG-")
    assert info.free_mib == 10000
    monitor.close()


@needs_gcc
def test_several_slices_are_an_ambiguity(driver: FakeNVML, clock: HandClock) -> None:
    """Row mig: which slice is ours is the user's to say; a slice's UUID in the settings says it."""
    card = driver.add_gpu(total_mib=81920)
    for _ in range(2):
        driver.add_gpu(total_mib=10240, parent=card)
    monitor = monitor_of(clock)
    with pytest.raises(ConfigError, match="MIG-00000002"):
        monitor.prepare()
    monitor.close()
    chosen = monitor_of(clock, gpu_uuid="MIG-00000002")
    assert chosen.prepare().total_mib == 10240
    chosen.close()


# --- time and life ---------------------------------------------------------------------------------------------------


@needs_gcc
def test_a_hanging_driver_costs_the_callers_patience_once_and_no_more_threads(
    driver: FakeNVML, clock: HandClock
) -> None:
    """Row nvml_hangs: unknown at the deadline, then unknown at once; when it comes back, so do the figures."""
    driver.add_gpu()
    monitor = monitor_of(clock)
    monitor.read(5.0)
    threads = set(threading.enumerate())
    driver.delay("MEM", 0.5)
    start = time.perf_counter()
    info = monitor.read(0.05)
    assert time.perf_counter() - start < 0.4
    assert (info.present, info.lost, info.free_mib) == (True, False, None)
    assert "did not answer" in info.detail
    start = time.perf_counter()
    for _ in range(100):
        assert "not come back" in monitor.read(5.0).detail
        assert monitor.holders() is None
    assert time.perf_counter() - start < 0.3
    assert set(threading.enumerate()) <= threads
    driver.delay("MEM", 0.0)
    overdue = monitor._worker._overdue
    assert overdue is not None
    assert overdue.done.wait(5.0)
    assert monitor.read(5.0).free_mib is not None
    monitor.close()
    assert driver.references == 0


@needs_gcc
def test_close_does_not_wait_for_a_hanging_driver(
    driver: FakeNVML, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounded, and when the driver comes back the session is still given back."""
    monkeypatch.setattr("gpu_fsm.vram.CLOSE_S", 0.05)
    driver.add_gpu()
    monitor = monitor_of(clock)
    monitor.read(5.0)
    driver.delay("MEM", 0.5)
    monitor.read(0.01)
    thread = monitor._worker._thread
    assert thread is not None
    start = time.perf_counter()
    monitor.close()
    assert time.perf_counter() - start < 0.4
    thread.join(5.0)
    assert driver.references == 0


@needs_gcc
def test_close_is_balanced_and_may_be_repeated(driver: FakeNVML, clock: HandClock) -> None:
    """One init, one shutdown; later reads answer unknown and open nothing."""
    driver.add_gpu()
    monitor = monitor_of(clock)
    for _ in range(10):
        monitor.read(5.0)
    monitor.close()
    monitor.close()
    assert (driver.calls("INIT"), driver.calls("SHUTDOWN"), driver.references) == (1, 1, 0)
    info = monitor.read(5.0)
    assert info.free_mib is None
    assert "closed" in info.detail
    assert driver.calls("INIT") == 1


@needs_gcc
def test_many_threads_share_one_session(driver: FakeNVML, clock: HandClock) -> None:
    """Reads from eight threads are answered by one worker over one init."""
    driver.add_gpu(total_mib=8192, used_mib=192)
    monitor = monitor_of(clock)
    answers: list[float | None] = []

    def read_often() -> None:
        answers.extend(monitor.read(5.0).free_mib for _ in range(50))

    readers = [threading.Thread(target=read_often) for _ in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert answers == [8000.0] * 400
    assert driver.calls("INIT") == 1
    monitor.close()


@needs_gcc
def test_a_reading_is_stamped_by_the_managers_clock(driver: FakeNVML, clock: HandClock) -> None:
    """`at` compares with every other time of a status."""
    driver.add_gpu()
    monitor = monitor_of(clock)
    clock.now = 1234.5
    assert monitor.read(5.0).at == pytest.approx(1234.5, abs=1.0)
    monitor.close()
