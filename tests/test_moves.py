"""What a row or a guard of the table is for, where no longer story misses it; the world and the events are asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gpu_fsm import GPUResourceManager, errors
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.status import Hold, State
from gpu_fsm.testing.stateful import elsewhere, inline_manager

SMALL = 6400.0
"""A card on which CLIP and the VLM do not fit together."""


def moves(manager: GPUResourceManager) -> list[State]:
    """Every state entered from now on."""
    entered: list[State] = []
    manager.subscribe(lambda event: entered.append(event.new), "state_changed")
    return entered


ASKED_AGAIN: dict[str, tuple[Callable[[Any], object], Callable[[Any], object]]] = {
    "recording": (lambda m: m.set_execution_mode("recording"), lambda m: m.set_execution_mode("recording")),
    "autopilot": (lambda m: m.set_execution_mode("autopilot"), lambda m: m.set_execution_mode("autopilot")),
    "idle": (lambda m: m.set_execution_mode("idle"), lambda m: m.set_execution_mode("idle")),
    "wanted": (lambda m: m.set_execution_mode("recording"), lambda m: m.ensure_vlm_loaded()),
    "wanted on demand": (lambda m: m.ensure_vlm_loaded(), lambda m: m.ensure_vlm_loaded()),
    "unwanted": (lambda m: m.set_execution_mode("autopilot"), lambda m: m.ensure_vlm_unloaded()),
    "clip up": (lambda m: m.migrate_clip_to_gpu(), lambda m: m.migrate_clip_to_gpu()),
    "clip down": (lambda m: m.migrate_clip_to_cpu(), lambda m: m.migrate_clip_to_cpu()),
}


@pytest.mark.parametrize("what", ASKED_AGAIN)
def test_what_is_so_already_is_granted_without_a_move(what: str) -> None:
    """No state is entered, and Ollama is asked for nothing but a look or a later end."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    first, again = ASKED_AGAIN[what]
    first(manager)
    before, entered = len(world.ollama.log), moves(manager)
    again(manager)

    assert entered == []
    assert {entry.op for entry in world.ollama.log[before:]} <= {"ollama.ps", "ollama.renew"}


@pytest.mark.parametrize("mode", ["idle", "autopilot"])
def test_asking_for_the_mode_that_stands_ends_the_hold(mode: str) -> None:
    """Also where nothing needs to be moved for it."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode(mode)
    manager.ensure_vlm_loaded()
    assert manager.get_status().hold is Hold.WANTED
    manager.set_execution_mode(mode)

    assert manager.get_status().hold is None


WISHES: dict[str, Callable[[Any], object]] = {
    "recording": lambda m: m.set_execution_mode("recording"),
    "autopilot": lambda m: m.set_execution_mode("autopilot"),
    "the VLM": lambda m: m.ensure_vlm_loaded(),
    "CLIP": lambda m: m.migrate_clip_to_gpu(),
}


@pytest.mark.parametrize("wish", WISHES)
def test_nothing_is_begun_while_nobody_can_tell_where_the_vlm_is(wish: str) -> None:
    """Under the policy `refuse` the answer is a refusal, and no state is entered."""
    world = SimulatedWorld()
    manager = inline_manager(world, on_shortage="refuse")
    world.faults.arm("ollama.ps", "http_500", times=None)
    entered = moves(manager)
    with pytest.raises(errors.GPUFSMError):
        WISHES[wish](manager)

    assert entered == []
    assert world.clip.place == "cpu"


def test_a_wish_that_does_not_fit_moves_nothing() -> None:
    """CLIP is not taken down for a VLM that has no room even then."""
    world = SimulatedWorld(card_mib=SMALL)
    manager = inline_manager(world)
    manager.set_execution_mode("autopilot")
    world.card.take("game", 2000.0)
    entered = moves(manager)
    with pytest.raises(errors.InsufficientVRAM):
        manager.ensure_vlm_loaded()

    assert entered == []
    assert world.clip.place == "gpu"


def test_in_idle_a_card_that_is_lost_is_no_fault() -> None:
    """CLIP was moved up by hand, and the card goes: nothing was promised, so nothing is degraded."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.migrate_clip_to_gpu()
    world.lose_gpu()
    entered = moves(manager)
    manager.drive_for(manager.config.check_interval_s * 3)

    assert entered == []
    assert manager.get_status().state is State.IDLE


@pytest.mark.parametrize("mode", ["recording", "autopilot"])
def test_an_ollama_that_falls_silent_for_too_long_leads_straight_to_safety(mode: str) -> None:
    """No step that needs answers is tried on the way."""
    world = SimulatedWorld()
    manager = inline_manager(world, idle_timeout_s=1e6)
    manager.set_execution_mode(mode)
    world.faults.arm("ollama.ps", "http_500", times=None)
    entered = moves(manager)
    manager.drive_for(manager.config.unknown_max_s - 1.0)
    assert entered == []
    manager.drive_for(manager.config.check_interval_s + manager.config.observe_timeout_s + 1.0)
    reason = manager.get_status().reason

    assert entered == [State.SHEDDING, State.DEGRADED]
    assert reason is not None
    assert reason.code == "ollama_unreachable"


def test_what_cannot_be_put_right_is_not_begun() -> None:
    """The VLM was unloaded by another client and its room is taken: straight to safety."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode("recording")
    world.ollama.foreign_unload(world.vlm.name)
    world.clock.advance(1.0)
    world.card.take("game", world.card.free_mib - 1000.0)
    entered = moves(manager)
    manager.drive_for(manager.config.check_interval_s * 2)

    assert entered[:2] == [State.SHEDDING, State.DEGRADED]


def test_a_leased_vlm_outlives_ollamas_own_timer() -> None:
    """It is renewed for as long as somebody holds it: one load, however long."""
    world = SimulatedWorld()
    manager = inline_manager(world, idle_timeout_s=60.0)
    with manager.vlm():
        manager.drive_for(600.0)

        assert world.vlm_resident()
    assert world.ollama.counts["loads"] == 1


def test_a_vlm_that_has_gone_is_not_renewed() -> None:
    """A renewal of what is gone would be a load that nobody decided."""
    world = SimulatedWorld()
    manager = inline_manager(world, idle_timeout_s=60.0, check_interval_s=500.0)
    with manager.vlm():
        world.ollama.foreign_unload(world.vlm.name)
        before = len(world.ollama.log)
        manager.drive_for(200.0)

    assert {entry.op for entry in world.ollama.log[before:]} <= {"ollama.ps", "ollama.unload", "ollama.tags"}
    assert world.ollama.counts["loads"] == 1


def stuck(**settings: Any) -> tuple[SimulatedWorld, GPUResourceManager]:
    """DEGRADED on the way to AUTOPILOT: Ollama acknowledges the unload and keeps the VLM."""
    world = SimulatedWorld()
    manager = inline_manager(world, **settings)
    manager.set_execution_mode("recording")
    world.faults.arm("ollama.unload", "silent", times=None)
    assert not manager.set_execution_mode("autopilot").granted
    return world, manager


def test_clip_does_not_go_up_beside_a_vlm_that_should_have_gone() -> None:
    """Also where there is room for both."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode("recording")
    world.faults.arm("ollama.unload", "silent", times=None)
    entered = moves(manager)
    manager.set_execution_mode("autopilot")

    assert entered == [State.RELEASING, State.SHEDDING, State.DEGRADED]
    world.faults.heal()


def test_in_degraded_an_unload_that_is_asked_for_is_part_of_the_shedding() -> None:
    """There is no mode to go to."""
    world, manager = stuck()
    entered = moves(manager)
    with pytest.raises(errors.UnloadStuck):
        manager.ensure_vlm_unloaded()

    assert entered == [State.SHEDDING, State.DEGRADED]
    world.faults.heal()


def test_while_nobody_can_tell_recovery_only_tidies_up() -> None:
    """The mode is tried again when the world is known again."""
    world, manager = stuck()
    world.faults.arm("ollama.ps", "http_500", times=None)
    entered = moves(manager)
    manager.drive_for(manager.config.recover_cap_s * 2)
    assert set(entered) == {State.SHEDDING, State.DEGRADED}
    world.faults.heal()
    manager.drive_for(manager.config.recover_cap_s * 2)
    assert manager.get_status().state is State.AUTOPILOT


def test_recovery_waits_for_the_lease_in_its_way() -> None:
    """CLIP serves on the CPU: it goes up when nobody uses it."""
    world, manager = stuck()
    lease = manager.clip(holder="somebody")
    elsewhere(lease.__enter__)
    world.faults.heal()
    entered = moves(manager)
    manager.drive_for(manager.config.recover_cap_s * 2)
    assert State.RELEASING not in entered
    assert world.clip.place == "cpu"
    elsewhere(lambda: lease.__exit__(None, None, None))
    manager.drive_for(manager.config.recover_cap_s * 2)
    assert manager.get_status().state is State.AUTOPILOT


def test_a_close_that_sees_nothing_gives_back_what_it_can() -> None:
    """Without a step that would wait for an answer."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode("recording")
    world.faults.arm("ollama.ps", "http_500", times=None)
    entered = moves(manager)
    manager.close()

    assert entered[0] is State.SHEDDING
    assert State.RELEASING not in entered
    assert not world.vlm_resident()
