"""Other settings for a running manager: what may change changes the world, the rest is refused with the reason."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import attrs
import pytest

from gpu_fsm import ExecutionMode, GPUResourceConfig, State
from gpu_fsm.errors import ConfigError, ManagerClosed
from gpu_fsm.settings import changes, settings_table
from gpu_fsm.simulation import SimulatedWorld
from tests.waiting import until
from tests.worlds import inline, threaded

pytestmark = pytest.mark.core

FIXED: dict[str, Any] = {
    "ollama_url": "http://127.0.0.1:9",
    "allow_remote": True,
    "vlm_model": "another:1b",
    "vlm_options": {"num_ctx": 8},
    "clip_model": "another",
    "clip_device": "cpu",
    "allow_pickle_weights": True,
    "gpu_uuid": "GPU-1",
    "vram_budget_mib": 1.0,
    "ollama_card": "other",
    "vlm_load_retries": 0,
    "retry_base_s": 0.5,
    "retry_cap_s": 9.0,
    "observe_timeout_s": 9.0,
    "drain_timeout_s": 9.0,
    "journal_size": 9,
}
"""What cannot change under way, each with another value."""


def test_the_settings_that_cannot_change_are_these() -> None:
    """Every other one is live."""
    assert {setting.name for setting in settings_table() if not setting.live} == set(FIXED)


@pytest.mark.parametrize("name", FIXED)
def test_what_cannot_change_is_refused_with_the_reason(name: str) -> None:
    """And nothing else of the same call is taken."""
    world = SimulatedWorld()
    with inline(world) as manager:
        before = manager.config
        with pytest.raises(ConfigError) as caught:
            manager.reconfigure(idle_timeout_s=1.0, **{name: FIXED[name]})
        assert caught.value.name == name
        assert "cannot change under way: " in str(caught.value)
        manager.drive_for(1)
        assert manager.config == before


def test_a_live_setting_is_read_by_no_adapter() -> None:
    """They are made once with the settings of the start, so they would go on with the old value."""
    live = {setting.name for setting in settings_table() if setting.live}
    package = Path(__file__).resolve().parents[1] / "gpu_fsm"
    for name in ("ollama", "vram", "clip", "cardlock"):
        source = ast.parse((package / f"{name}.py").read_text(encoding="utf-8"))
        read = {node.attr for node in ast.walk(source) if isinstance(node, ast.Attribute)}
        assert not live & read, name


@pytest.mark.parametrize("bad", [{"idle_timeout_s": -1}, {"idle_timout_s": 1}, {"floor_mib": 9e5}, {"on_close": "no"}])
def test_a_bad_value_changes_nothing(bad: dict[str, Any]) -> None:
    """Named as at the start."""
    with inline(SimulatedWorld()) as manager:
        before = manager.config
        with pytest.raises(ConfigError):
            manager.reconfigure(pressure_s=1, **bad)
        assert manager.config == before


def test_what_differs_is_told() -> None:
    """A whole configuration is compared with the one that holds; the same again is nothing."""
    with inline(SimulatedWorld()) as manager:
        new = attrs.evolve(manager.config, idle_timeout_s=9, on_close="leave")
        assert manager.reconfigure(new) == {"idle_timeout_s": 9.0, "on_close": "leave"}
        assert manager.reconfigure(new) == manager.reconfigure() == {}
        assert manager.config == new
        assert changes(GPUResourceConfig(), GPUResourceConfig()) == {}


def test_a_closed_manager_takes_no_settings() -> None:
    """As any other call."""
    manager = inline(SimulatedWorld())
    manager.close()
    with pytest.raises(ManagerClosed):
        manager.reconfigure(idle_timeout_s=1)


@pytest.mark.parametrize("after_s", [0.0, 30.0, 90.0])
def test_a_shorter_idle_timeout_counts_from_the_last_use(after_s: float) -> None:
    """The VLM goes at last use + the new time, or at once where that has passed."""
    world = SimulatedWorld()
    with inline(world, idle_timeout_s=100, check_interval_s=5) as manager:
        manager.set_execution_mode("recording")
        with manager.vlm():
            pass
        manager.drive_for(after_s)
        manager.reconfigure(idle_timeout_s=50)
        left = max(0.0, 50 - after_s)
        manager.drive_for(left * 0.98)
        assert world.vlm_resident() == (left > 0)
        manager.drive_for(left * 0.02 + 1.0)
        assert not world.vlm_resident()
        assert manager.get_status().execution_mode is ExecutionMode.RECORDING


def test_every_request_carries_the_new_time() -> None:
    """A load, a renewal and an answer tell Ollama the time that holds when they are sent."""
    world = SimulatedWorld()
    with inline(world, idle_timeout_s=100, keep_alive_margin_s=10) as manager:
        manager.reconfigure(idle_timeout_s=200)
        manager.set_execution_mode("recording")
        manager.reconfigure(idle_timeout_s=300)
        manager.drive_for(206)
        manager.reconfigure(keep_alive_margin_s=20)
        manager.drive_for(0)
        with manager.vlm() as vlm:
            vlm.generate("what is this?")
        sent = [(entry.op, entry.body["keep_alive"]) for entry in world.ollama.log if entry.method == "POST"]
        assert sent == [("ollama.load", 210.0), ("ollama.renew", 310.0), ("ollama.generate", 320.0)]


@pytest.mark.parametrize("after_s", [0.0, 50.0, 99.0])
def test_a_longer_idle_timeout_is_told_to_ollama_in_time(after_s: float) -> None:
    """Its own timer runs on the old time; the VLM must stay all the same, without being loaded again."""
    world = SimulatedWorld()
    with inline(world, idle_timeout_s=100, keep_alive_margin_s=10) as manager:
        manager.set_execution_mode("recording")
        manager.drive_for(after_s)
        manager.reconfigure(idle_timeout_s=1000)
        for _ in range(95):
            manager.drive_for((995 - after_s) / 95)
            assert world.vlm_resident()
        manager.drive_for(10)
        assert not world.vlm_resident()
        assert sum(entry.op == "ollama.load" and entry.outcome == "ok" for entry in world.ollama.log) == 1


def test_an_answer_under_way_keeps_what_its_request_said() -> None:
    """The server's timer goes by the request that was sent, so a longer time given meanwhile must still be told."""
    world = SimulatedWorld(generate_s=5)
    with inline(world, idle_timeout_s=100, keep_alive_margin_s=10) as manager:
        manager.set_execution_mode("recording")

        def meanwhile(op: str, phase: str) -> None:
            if (op, phase) == ("ollama.generate", "before"):
                manager.reconfigure(idle_timeout_s=1000)
                manager.drive_for(0.1)

        with manager.vlm() as vlm:
            world.on_io.append(meanwhile)
            vlm.generate("what is this?")
            world.on_io.remove(meanwhile)
        for _ in range(90):
            manager.drive_for(10)
            assert world.vlm_resident()


def test_a_higher_floor_becomes_pressure() -> None:
    """The threshold is the new one from the next check on."""
    world = SimulatedWorld()
    with inline(world, on_shortage="degrade") as manager:
        manager.set_execution_mode("recording")
        manager.drive_for(60)
        assert manager.get_status().state is State.RECORDING
        free = world.card.free_mib
        manager.reconfigure(floor_mib=free + 10, reserve_mib=free + 2000, pressure_s=5)
        manager.drive_for(60)
        assert manager.get_status().state is State.DEGRADED
        assert not world.vlm_resident()


def test_a_lower_reserve_lets_a_mode_in() -> None:
    """What was refused for want of room is given after the change."""
    world = SimulatedWorld()
    free = world.card.free_mib - world.vlm.size_mib
    with inline(world, reserve_mib=free + 500) as manager:
        assert not manager.set_execution_mode("recording").granted
        manager.reconfigure(reserve_mib=free - 50)
        assert manager.set_execution_mode("recording").granted
        assert world.vlm_resident()


def test_a_shorter_check_interval_looks_sooner() -> None:
    """The check that is armed does not wait for its old time."""
    world = SimulatedWorld()
    with inline(world, check_interval_s=1000) as manager:
        manager.set_execution_mode("recording")
        world.ollama.foreign_unload(world.vlm.name)
        world.clock.advance(5)
        assert not world.vlm_resident()
        manager.reconfigure(check_interval_s=1)
        manager.drive_for(30)
        assert world.vlm_resident()


def test_settings_given_in_the_middle_of_a_load_hold_after_it() -> None:
    """From the driving thread itself, without a deadlock; the load goes on."""
    world = SimulatedWorld()
    with inline(world, idle_timeout_s=100) as manager:
        given: list[dict[str, Any]] = []

        def meanwhile(op: str, phase: str) -> None:
            if (op, phase) == ("ollama.load", "during") and not given:
                given.append(manager.reconfigure(idle_timeout_s=20))

        world.on_io.append(meanwhile)
        assert manager.set_execution_mode("recording").granted
        assert given == [{"idle_timeout_s": 20.0}]
        manager.drive_for(30)
        assert not world.vlm_resident()


def test_a_waiting_driver_thread_is_woken() -> None:
    """It sleeps until the next timer, which may be hours away."""
    world = SimulatedWorld()
    manager = threaded(world, idle_timeout_s=5000, check_interval_s=5000)
    try:
        manager.set_execution_mode("recording")
        manager.reconfigure(idle_timeout_s=1, check_interval_s=1)
        until(lambda: manager._driver.engine.config.idle_timeout_s == 1)
        world.clock.advance(2)
        until(lambda: not world.vlm_resident() or world.clock.advance(0.5))
    finally:
        manager.close()
