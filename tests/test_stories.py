"""Short stories for the rows that chance seldom takes: each says what must happen, and the world is asked."""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest

from gpu_fsm import errors
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.status import ExecutionMode, Hold, State
from gpu_fsm.testing.stateful import GPUStateMachine, elsewhere, inline_manager
from tests.test_faults import fresh_machine

pytestmark = pytest.mark.core

SMALL = 6400.0
"""A card on which CLIP and the VLM do not fit together."""


@contextlib.contextmanager
def story(**changes: object) -> Iterator[GPUStateMachine]:
    """A machine to be driven by hand, judged at the end."""
    machine = fresh_machine(**changes)
    try:
        yield machine
        machine.every_promise_is_kept()
    finally:
        machine.teardown()


def rows(machine: GPUStateMachine) -> list[str]:
    """The names of the rows taken so far."""
    return [record.row for record in machine.manager.journal]


def test_a_vlm_that_would_push_out_the_callers_own_clip_is_refused_at_once() -> None:
    """Waiting for oneself never ends."""
    with story(card_mib=SMALL) as machine:
        machine.manager.set_execution_mode("autopilot")
        with machine.manager.clip(), pytest.raises(errors.LeaseHeld):
            machine.manager.ensure_vlm_loaded()

        assert "gpu" == machine.world.clip.place


@pytest.mark.parametrize("ends_after_s", [3.0, None])
@pytest.mark.parametrize("kind", ["vlm_wanted", "vlm_unwanted", "migrate_clip", "request"])
def test_a_request_waits_for_leases_and_not_for_ever(kind: str, ends_after_s: float | None) -> None:
    """When the lease ends in time the request goes on; else it is refused, the holders are named, nothing moves."""
    with story(card_mib=SMALL) as machine:
        manager, world = machine.manager, machine.world
        stack = contextlib.ExitStack()
        if kind == "vlm_unwanted":
            manager.set_execution_mode("recording")
            stack.enter_context(manager.vlm(holder="the holder"))
            ask = manager.ensure_vlm_unloaded
        elif kind == "migrate_clip":
            stack.enter_context(manager.clip(holder="the holder"))
            ask = manager.migrate_clip_to_gpu
        else:
            manager.set_execution_mode("autopilot")
            stack.enter_context(manager.clip(holder="the holder"))
            ask = manager.ensure_vlm_loaded if kind == "vlm_wanted" else lambda: manager.set_execution_mode("recording")
        machine.oracle.inputs += 1
        before = (world.clip.place, world.vlm_resident())
        start = world.clock.monotonic()
        if ends_after_s is None:
            with pytest.raises(errors.LeaseTimeout, match="the holder"):
                elsewhere(ask)
            assert before == (world.clip.place, world.vlm_resident())
            assert manager.config.drain_timeout_s == pytest.approx(world.clock.monotonic() - start, abs=0.1)
        else:
            world.clock.after(ends_after_s, stack.close)
            elsewhere(ask)
            assert before != (world.clip.place, world.vlm_resident())
        stack.close()

        assert f"{kind}-wait" in rows(machine)


def test_while_a_ticket_waits_checks_go_on_and_holders_of_a_lease_still_pass() -> None:
    """A gate that stopped a holder would stop the one it waits for."""
    with story(card_mib=SMALL) as machine:
        manager = machine.manager
        manager.set_execution_mode("autopilot")
        with manager.clip():
            future = elsewhere(lambda: manager.submit_execution_mode("recording"))
            machine.oracle.expect(future, wants_vlm=True)
            manager.drive_for(1.0)
            with manager.clip(timeout_s=0.0) as again:  # the holder
                assert again.encode(["x"]).shape[0] == 1
            with pytest.raises(errors.OperationTimeout):
                elsewhere(lambda: contextlib.ExitStack().enter_context(manager.clip(timeout_s=0.5)))

        manager.drive_for(10.0)
        assert future.result(0).granted
        assert machine.world.vlm_resident()


def test_an_on_demand_vlm_that_went_away_is_not_fetched_back_for_nobody() -> None:
    """The hold lapses, and CLIP returns to the GPU."""
    with story(card_mib=SMALL) as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 1
        manager.set_execution_mode("autopilot")
        manager.ensure_vlm_loaded()
        assert (Hold.WANTED, "cpu") == (manager.get_status().hold, world.clip.place)
        world.ollama.foreign_unload(world.vlm.name)
        manager.drive_for(manager.config.check_interval_s * 2)

        assert (None, "gpu") == (manager.get_status().hold, world.clip.place)
        assert "check-hold-lapsed" in rows(machine)


def test_a_lapsed_hold_does_not_move_a_leased_clip() -> None:
    """It is put right when the lease ends."""
    with story(card_mib=SMALL) as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 1
        manager.set_execution_mode("autopilot")
        manager.ensure_vlm_loaded()
        with manager.clip():
            world.ollama.foreign_unload(world.vlm.name)
            manager.drive_for(manager.config.check_interval_s * 2)
            assert "check-leased" in rows(machine)
            assert "cpu" == world.clip.place
        manager.drive_for(manager.config.check_interval_s)

        assert "gpu" == world.clip.place


def test_a_full_card_degrades_and_comes_back() -> None:
    """Less than the floor for `pressure_s`: a reason, the safe placement, and back when the neighbour goes."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 1
        manager.set_execution_mode("recording")
        world.card.take("game", world.card.free_mib)
        manager.drive_for(manager.config.check_interval_s * 2 + manager.config.pressure_s)
        status = manager.get_status()
        assert (State.DEGRADED, "vram_insufficient") == (status.state, status.reason and status.reason.code)
        assert not world.vlm_resident()
        world.card.give_back("game")
        manager.drive_for(manager.config.recover_cap_s)

        assert State.RECORDING is manager.get_status().state
        assert world.vlm_resident()


def test_another_client_that_keeps_unloading_is_not_fought_for_ever() -> None:
    """Three times within the window, then DEGRADED with the client's name for it; and no unload is sent to it."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 1
        manager.set_execution_mode("recording")
        for _ in range(manager.config.reassert_limit + 1):
            world.ollama.foreign_unload(world.vlm.name)
            manager.drive_for(manager.config.check_interval_s + world.vlm.load_s + 1)
        status = manager.get_status()
        assert (State.DEGRADED, "external_client") == (status.state, status.reason and status.reason.code)
        manager.drive_for(manager.config.reassert_window_s + manager.config.recover_cap_s)

        assert State.RECORDING is manager.get_status().state


def test_a_vlm_that_does_not_go_is_listed_and_tried_again() -> None:
    """The unload is acknowledged and never happens: DEGRADED with a leftover; asking again says it is stuck."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 1
        manager.set_execution_mode("recording")
        world.faults.arm("ollama.unload", "silent", times=None)
        machine.troubled = True
        assert not manager.set_execution_mode("autopilot").granted
        assert any(world.vlm.name in left for left in manager.get_status().leftovers)
        with pytest.raises(errors.UnloadStuck):
            manager.ensure_vlm_unloaded()
        assert "unwanted-shed" in rows(machine)
        manager.drive_for(manager.config.recover_cap_s)
        world.faults.heal()
        manager.drive_for(manager.config.recover_cap_s + manager.config.shed_deadline_s)

        assert State.AUTOPILOT is manager.get_status().state
        assert not world.vlm_resident()


def test_in_degraded_a_vlm_that_is_out_needs_no_unload() -> None:
    """Asking for what is so already is not an error, in any state."""
    with story() as machine:
        machine.world.faults.arm("ollama.load", "http_404", times=None)
        machine.troubled = True
        machine.oracle.inputs += 1
        assert not machine.manager.set_execution_mode("recording").granted
        machine.manager.ensure_vlm_unloaded()

        assert "unwanted-gone" in rows(machine)


def test_a_wish_in_degraded_is_worth_a_try_once_the_cause_has_gone() -> None:
    """The caller need not wait for the back-off."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 3
        world.faults.arm("ollama.load", "before", times=None)
        machine.troubled = True
        assert not manager.set_execution_mode("recording").granted
        world.faults.heal()
        manager.ensure_vlm_loaded()

        assert world.vlm_resident()
        assert State.RECORDING is manager.get_status().state


def test_memory_taken_in_the_middle_of_a_switch_is_found_before_it_is_needed() -> None:
    """On demand it costs the caller an error and the mode stays; for a mode it degrades with the figures."""
    with story(card_mib=SMALL) as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 2
        manager.set_execution_mode("autopilot")

        def steal(op: str, phase: str) -> None:
            if (op, phase) == ("clip.to_cpu", "after") and "game" not in world.card.owners():
                world.card.take("game", 700.0)

        world.on_io.append(steal)
        machine.troubled = True
        with pytest.raises(errors.InsufficientVRAM) as refusal:
            manager.ensure_vlm_loaded()
        assert refusal.value.needed_mib > 4000
        assert "short-falls-back" in rows(machine)
        assert (State.AUTOPILOT, "gpu") == (manager.get_status().state, world.clip.place)

        world.card.give_back("game")
        outcome = manager.set_execution_mode("recording")
        assert "short" in rows(machine)
        assert not outcome.granted
        assert outcome.reason is not None
        assert "vram_insufficient" == outcome.reason.code
        world.on_io.remove(steal)


def test_ollama_falling_silent_in_the_middle_of_an_on_demand_load_costs_the_caller_only() -> None:
    """No definite answer by the step's deadline: the way back to the mode is tried first."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 1
        manager.set_execution_mode("idle")
        deaf = [False]

        def go_deaf(op: str, phase: str) -> None:
            if (op, phase) == ("ollama.load", "after") and not deaf[0]:
                deaf[0] = True
                world.faults.arm("ollama.ps", "hang", times=None)

        world.on_io.append(go_deaf)
        machine.troubled = True
        with pytest.raises(errors.GPUFSMError):
            manager.ensure_vlm_loaded()
        assert "undecided-falls-back" in rows(machine)
        assert State.IDLE is manager.get_status().state
        world.on_io.remove(go_deaf)


def test_a_preempting_request_does_not_break_a_lease() -> None:
    """Taken over in the middle of a move there is no mode to wait in: DEGRADED, the leased VLM stays, then the mode."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 3
        manager.set_execution_mode("autopilot")
        late: list[Any] = []
        with manager.vlm(holder="an answer") as vlm:
            ask = lambda: manager.submit_execution_mode("autopilot", preempt=True)  # noqa: E731
            in_the_middle(machine, "ollama.ps", "after", lambda: late.append(elsewhere(ask)))
            with pytest.raises(errors.Superseded):
                elsewhere(lambda: manager.set_execution_mode("recording"))
            manager.drive_for(manager.config.drain_timeout_s + 1)
            outcome = late[0].result(0)
            assert not outcome.granted or world.vlm_resident()
            assert "ok" == vlm.generate("still there?").text
        manager.drive_for(manager.config.recover_cap_s)

        assert State.AUTOPILOT is manager.get_status().state
        assert not world.vlm_resident()


def test_idle_unloading_waits_while_nobody_can_tell_where_the_vlm_is() -> None:
    """A guess would unload under somebody's hands."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 1
        manager.set_execution_mode("recording")
        manager.drive_for(manager.config.idle_timeout_s - 1)
        world.faults.arm("ollama.ps", "hang", times=2)
        machine.troubled = True
        manager.drive_for(3.0)
        assert "idle-waits" in rows(machine)
        manager.drive_for(manager.config.check_interval_s + 3)

        assert not world.vlm_resident()


@pytest.mark.parametrize("mode", ["idle", "autopilot", "recording"])
def test_a_poisoned_gpu_is_taken_at_its_word(mode: str) -> None:
    """Reported by a user of CLIP: AUTOPILOT cannot stand, IDLE does not care, DEGRADED is safe already."""
    with story() as machine:
        machine.oracle.inputs += 1
        machine.manager.set_execution_mode(mode)
        machine.troubled = True
        for _ in range(2):
            machine.manager._driver.report(errors.CudaPoisoned(detail="an illegal memory access"))
            machine.manager.drive_for(0.0)
            machine.every_promise_is_kept()
        expected = State.IDLE if mode == "idle" else State.DEGRADED

        assert expected is machine.manager.get_status().state


def test_timers_that_fire_in_the_wrong_state_change_nothing() -> None:
    """A timer is a function of the state; one that comes late is dropped."""
    with story() as machine:
        engine = machine.oracle.engine
        for trigger in ("recover", "renew", "idle_timeout"):
            engine.fire(trigger)
        machine.world.faults.arm("ollama.load", "before", times=None)
        machine.troubled = True
        machine.oracle.inputs += 1
        machine.manager.set_execution_mode(ExecutionMode.RECORDING)
        engine.fire("idle_timeout")

        assert {"recover-dropped", "renew-dropped", "idle-degraded"} <= set(rows(machine))
        assert State.DEGRADED is machine.manager.get_status().state


def test_under_the_policy_refuse_a_shortage_leaves_everything_as_it_was() -> None:
    """The figures are told, and state, hold and asked mode stay."""
    with story(on_shortage="refuse", troubles=set()) as machine:
        manager, world = machine.manager, machine.world
        manager.set_execution_mode("autopilot")
        world.card.take("game", 4000.0)
        machine.troubled = True
        with pytest.raises(errors.InsufficientVRAM) as refusal:
            manager.set_execution_mode("recording")
        status = manager.get_status()

        assert "request-refused" in rows(machine)
        assert (State.AUTOPILOT, ExecutionMode.AUTOPILOT, "gpu") == (status.state, status.asked_mode, world.clip.place)
        assert refusal.value.free_mib == pytest.approx(world.card.free_mib)
        assert any("game" in holder for holder in refusal.value.holders)


def in_the_middle(machine: GPUStateMachine, op: str, phase: str, act: Callable[[], object]) -> None:
    """Have `act` run once, at that moment of the next switch."""

    def hook(running: str, when: str) -> None:
        if (running, when) == (op, phase):
            machine.world.on_io.remove(hook)
            act()

    machine.world.on_io.append(hook)


@pytest.mark.parametrize("lease_ends", [True, False])
def test_a_lease_taken_half_way_is_waited_for_and_not_for_ever(lease_ends: bool) -> None:
    """While the VLM loads CLIP serves on the CPU; a preempting AUTOPILOT needs it up and waits for the encode."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 2
        manager.set_execution_mode("autopilot")
        stack = contextlib.ExitStack()
        late: list[Any] = []

        def interfere() -> None:
            stack.enter_context(manager.clip(holder="an encode"))
            late.append(elsewhere(lambda: manager.submit_execution_mode("autopilot", preempt=True)))
            if lease_ends:
                world.clock.after(3.0, stack.close)

        in_the_middle(machine, "ollama.load", "during", interfere)
        with pytest.raises(errors.Superseded):
            manager.set_execution_mode("recording")
        outcome = late[0].result(0)
        assert lease_ends is outcome.granted
        if not lease_ends:
            assert "aborted" in rows(machine)
            assert "lease_timeout" == outcome.reason.code
            stack.close()
            manager.drive_for(manager.config.recover_cap_s)

        assert (State.AUTOPILOT, "gpu") == (manager.get_status().state, world.clip.place)


def test_clip_serves_while_the_vlm_loads() -> None:
    """A load takes seconds; the gate is shut only while CLIP itself moves."""
    with story() as machine:
        manager = machine.manager
        machine.oracle.inputs += 1
        manager.set_execution_mode("autopilot")
        served: list[int] = []

        def encode() -> None:
            with manager.clip() as clip:
                served.append(clip.encode(["x"]).shape[0])

        in_the_middle(machine, "ollama.load", "during", encode)
        manager.set_execution_mode("recording")

        assert [1] == served


def test_another_clients_vlm_is_not_unloaded_once_the_fight_is_given_up() -> None:
    """In DEGRADED(external_client) the model is left to the other client, also by the tidying up that follows."""
    with story(troubles=set()) as machine:
        manager, world = machine.manager, machine.world
        manager.set_execution_mode("autopilot")
        for _ in range(manager.config.reassert_limit + 1):
            world.ollama.foreign_load(world.vlm.name)
            manager.drive_for(manager.config.check_interval_s + world.vlm.load_s + 1)
        machine.troubled = True
        reason = manager.get_status().reason
        assert reason is not None
        assert "external_client" == reason.code
        unloads = [entry for entry in world.ollama.log if entry.op == "ollama.unload" and entry.client == "us"]
        manager.drive_for(120.0)

        assert manager.config.reassert_limit == len(unloads)
        assert unloads == [e for e in world.ollama.log if e.op == "ollama.unload" and e.client == "us"]


def test_a_load_is_tried_again_only_when_the_memory_of_the_first_try_is_back() -> None:
    """Memory that comes back late and at once must not be taken for settled."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 1
        world.ollama.reclaim_s = 3.0
        world.faults.arm("ollama.load", "runner_dies", times=1)
        machine.troubled = True
        manager.set_execution_mode("recording")
        loads = [entry for entry in world.ollama.log if entry.op == "ollama.load"]
        took = [change for change in world.card.history if change.owner.startswith("ollama") and change.delta_mib > 0]

        assert 2 == len(loads)
        gave = [change for change in world.card.history if change.owner.startswith("ollama") and change.delta_mib < 0]
        assert all(loads[1].at >= change.at for change in gave if change.at < took[-1].at)


def test_a_vlm_that_the_driver_does_not_see_is_not_on_the_gpu() -> None:
    """`/api/ps` says 100 % GPU, nothing was taken from the card and no process of Ollama's is on it."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 1

        def hide(op: str, phase: str) -> None:
            """The runner computes on the CPU: its memory is not on the card, whatever Ollama says."""
            if (op, phase) == ("ollama.load", "after"):
                for owner in [name for name in world.card.owners() if name.startswith("ollama")]:
                    world.card.give_back(owner)

        world.on_io.append(hide)
        machine.troubled = True
        outcome = manager.set_execution_mode("recording")
        world.on_io.remove(hide)

        assert outcome.reason is not None
        assert "gpu_not_used" == outcome.reason.code


def test_a_holder_that_takes_a_second_lease_in_the_last_moment_wins() -> None:
    """Between counting and moving a holder may still pass: the move gives way, the ticket waits, then goes on."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 2
        manager.set_execution_mode("autopilot")
        second = contextlib.ExitStack()

        class LastMoment(logging.Handler):
            """The record of the transition is written after the count and before the move."""

            def emit(self, record: logging.LogRecord) -> None:
                if "AUTOPILOT -> RELEASING" in record.getMessage():
                    logging.getLogger("gpu_fsm").removeHandler(self)
                    second.enter_context(manager.clip(holder="the second"))

        logger, handler = logging.getLogger("gpu_fsm"), LastMoment()
        level = logger.level
        with manager.vlm(holder="the first"):
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            future = elsewhere(lambda: manager.submit_execution_mode("recording"))
            manager.drive_for(2.0)
            logger.setLevel(level)
            assert (State.AUTOPILOT, "gpu") == (manager.get_status().state, world.clip.place)
            assert "aborted-back" in rows(machine)
            assert not future.done()
            second.close()
            manager.drive_for(2.0)

        assert future.result(0).granted
        assert "cpu" == world.clip.place


def test_a_mode_that_nobody_can_confirm_by_the_deadline_is_not_told() -> None:
    """The load was answered, and then Ollama fell silent: DEGRADED with that reason, and RECORDING when it speaks."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 1
        machine.troubled = True
        in_the_middle(machine, "ollama.load", "after", lambda: world.faults.arm("ollama.ps", "hang", times=None))
        outcome = manager.set_execution_mode("recording")
        assert outcome.reason is not None
        assert ("ollama_unknown", "undecided") == (outcome.reason.code, rows(machine)[-2])
        world.faults.heal()
        manager.drive_for(manager.config.recover_cap_s)

        assert State.RECORDING is manager.get_status().state


@pytest.mark.parametrize("mode", ["recording", "autopilot"])
def test_a_lost_card_ends_what_was_promised_on_it(mode: str) -> None:
    """A model that runs on the CPU because the card has gone is not RECORDING, and nothing flaps."""
    with story(troubles={"doom"}) as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 2
        manager.set_execution_mode(mode)
        machine.lose_the_gpu(encoding=False)
        world.faults.arm("ollama.load", "partial", times=None, share=0.0)
        manager.drive_for(120.0)
        status = manager.get_status()
        assert status.reason is not None
        assert (State.DEGRADED, "gpu_lost") == (status.state, status.reason.code)
        assert not manager.set_execution_mode("recording").granted
        assert ["check-gpu-lost"] == [row for row in rows(machine) if row == "check-gpu-lost"]


@pytest.mark.parametrize("trouble", ["oom", "neighbour"])
def test_a_second_wish_under_a_hold_costs_no_mode_either(trouble: str) -> None:
    """The on-demand VLM went away and is wanted again: a failure is the caller's, a shortage is met by moving CLIP."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 2
        machine.troubled = True
        manager.set_execution_mode("autopilot")
        manager.ensure_vlm_loaded()
        world.ollama.foreign_unload(world.vlm.name)
        manager.drive_for(1.0)
        if trouble == "oom":
            world.faults.arm("ollama.load", "oom", times=None)
            with pytest.raises(errors.LoadOutOfMemory):
                manager.ensure_vlm_loaded()
        else:
            world.card.take("game", 1800.0)
            manager.ensure_vlm_loaded()
            assert world.vlm_resident()

        assert State.AUTOPILOT is manager.get_status().state


@pytest.mark.parametrize("on_close", ["leave", "release"])
def test_closing_sends_nothing_for_a_vlm_that_is_not_ours(on_close: str) -> None:
    """Also when nobody can tell where it is: no unload, no DEGRADED, no leftover."""
    world = SimulatedWorld()
    manager = inline_manager(world, on_close=on_close)
    world.ollama.foreign_load(world.vlm.name, keep_alive=-1)
    world.clock.sleep(10)
    manager.drive_for(1.0)
    world.faults.arm("ollama.ps", "hang", times=None)
    began = world.clock.monotonic()

    assert () == manager.close()
    assert world.clock.monotonic() - began < 10
    assert not [entry for entry in world.ollama.log if entry.op == "ollama.unload"]
    assert "shed" not in [record.row for record in manager.journal]


def test_what_a_failed_load_left_in_is_ours_to_take_out() -> None:
    """The load took effect and its answer was lost: nobody else will unload it."""
    world = SimulatedWorld()
    manager = inline_manager(world, vlm_load_retries=0)
    world.faults.arm("ollama.load", "after", times=1)
    with pytest.raises(errors.OllamaError):
        manager.ensure_vlm_loaded()
    manager.drive_for(manager.config.idle_timeout_s + 30)
    assert not world.vlm_resident()
    manager.close()


def test_a_vlm_that_was_used_is_ours_to_give_back() -> None:
    """Adopted from another client and used through the fast path."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    world.ollama.foreign_load(world.vlm.name, keep_alive=-1)
    world.clock.sleep(10)
    manager.set_execution_mode("recording")
    with manager.vlm() as vlm:
        vlm.generate("x")
    manager.close()

    assert not world.vlm_resident()


def test_a_preempting_caller_that_holds_the_lease_is_told_at_once() -> None:
    """Half-way as in a mode: nobody waits for himself."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 1
        asked: list[Any] = []
        with manager.clip():
            holder = contextvars.copy_context()
            ask = lambda: asked.append(manager.submit_execution_mode("autopilot", preempt=True))  # noqa: E731
            in_the_middle(machine, "ollama.load", "during", lambda: holder.run(ask))
            with pytest.raises(errors.Superseded):
                elsewhere(lambda: manager.set_execution_mode("recording"))
            began = world.clock.monotonic()
            manager.drive_for(2.0)
            assert isinstance(asked[0].exception(0), errors.LeaseHeld)
            assert world.clock.monotonic() - began < 5

        assert State.DEGRADED is not manager.get_status().state


def test_moving_clip_down_does_not_fetch_a_vlm_that_has_gone() -> None:
    """IDLE with an on-demand VLM that somebody else unloaded: the move is a move."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 1
        machine.troubled = True
        manager.ensure_vlm_loaded()
        manager.migrate_clip_to_gpu()
        world.ollama.foreign_unload(world.vlm.name)
        manager.drive_for(1.0)
        manager.migrate_clip_to_cpu()

        assert ("cpu", False) == (world.clip.place, world.vlm_resident())


def test_pressure_counts_only_where_something_of_ours_could_go() -> None:
    """RECORDING with the VLM parked holds nothing on the card; a neighbour that fills it is not our affair."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 1
        machine.troubled = True
        manager.set_execution_mode("recording")
        manager.ensure_vlm_unloaded()
        world.card.take("game", world.card.free_mib)
        manager.drive_for(90.0)

        assert (State.RECORDING, Hold.PARKED) == (manager.get_status().state, manager.get_status().hold)


def test_leases_of_two_managers_are_not_confused() -> None:
    """Holding one's lease says nothing about the other's."""
    one, other = inline_manager(SimulatedWorld()), inline_manager(SimulatedWorld())
    other.set_execution_mode("autopilot")
    foreign = elsewhere(lambda: other._driver.ask_clip("somebody").result(0))
    with one.clip():
        future = other.submit_execution_mode("recording")
        other.drive_for(1.0)
        assert not future.done(), "it waits for somebody else"
    other._driver.leases.release(foreign)
    other.drive_for(20.0)

    assert future.result(0).granted
    one.close()
    other.close()


def test_what_cannot_be_known_is_not_unloaded_on_a_guess() -> None:
    """Ollama does not answer: `ensure_vlm_unloaded` says so, and sends nothing."""
    with story() as machine:
        machine.troubled = True
        machine.world.faults.arm("ollama.ps", "hang", times=None)
        with pytest.raises(errors.ResidencyUnknown):
            machine.manager.ensure_vlm_unloaded()

        assert "unwanted-unknown" in rows(machine)
        assert not [entry for entry in machine.world.ollama.log if entry.op == "ollama.unload"]


def test_whoever_holds_clip_cannot_ask_for_its_move() -> None:
    """The explicit move is no exception."""
    with story() as machine, machine.manager.clip(), pytest.raises(errors.LeaseHeld):
        machine.manager.migrate_clip_to_gpu()


def test_a_leased_leftover_is_tidied_up_when_the_lease_has_ended() -> None:
    """Shedding leaves a leased CLIP on the card and lists it; recovery does not shed it under the lease."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.troubled = True
        manager.set_execution_mode("autopilot")
        with manager.clip():
            world.faults.arm("ollama.ps", "hang", times=None)
            manager.drive_for(manager.config.unknown_max_s + 60.0)
            assert State.DEGRADED is manager.get_status().state
            assert any("CLIP" in left for left in manager.get_status().leftovers)
            assert "gpu" == world.clip.place
        manager.drive_for(manager.config.recover_cap_s + 30.0)
        assert "cpu" == world.clip.place
        world.faults.heal()
        manager.drive_for(manager.config.recover_cap_s + 30.0)

        assert (State.AUTOPILOT, "gpu") == (manager.get_status().state, world.clip.place)


@pytest.mark.parametrize("mode", ["recording", "autopilot", "idle"])
def test_an_idle_unload_waits_for_another_client_s_request(mode: str) -> None:
    """Ollama unloads only once the stranger's answer is out: the mode stands, and the VLM goes at a later try."""
    world = SimulatedWorld()
    manager = inline_manager(world, unload_deadline_s=5.0, idle_timeout_s=60.0)
    manager.set_execution_mode(mode)
    manager.ensure_vlm_loaded()
    world.ollama.generate_s = 100.0
    manager.drive_for(50.0)
    world.ollama.foreign_generate(world.vlm.name)
    manager.drive_for(40.0)
    status = manager.get_status()
    assert status.state.value == mode
    assert world.vlm_resident()

    manager.drive_for(150.0)
    assert manager.get_status().state.value == mode
    assert "shed" not in [record.row for record in manager.journal]
    assert not world.vlm_resident()
    assert [entry.op for entry in world.ollama.log if entry.client == "us"].count("ollama.load") == 1

    manager.ensure_vlm_loaded()
    assert world.vlm_resident()
    assert manager.close() == ()


@pytest.mark.parametrize("late_s", [0.0, 0.5, 1.0, 1.9])
@pytest.mark.parametrize("mode", ["recording", "autopilot", "idle"])
def test_an_idle_unload_that_comes_late_is_no_reason_to_load(mode: str, late_s: float) -> None:
    """The stranger's answer ends a moment after we have stopped to wait for it: the VLM is out, as was wanted."""
    world = SimulatedWorld()
    manager = inline_manager(world, unload_deadline_s=5.0, idle_timeout_s=60.0)
    manager.set_execution_mode(mode)
    manager.ensure_vlm_loaded()
    idle_at = next(timer.due_at for timer in manager.get_status().timers if timer.name == "idle")
    manager.drive_for(idle_at - 10.0 - world.clock.monotonic())
    world.ollama.generate_s = 15.0 + late_s
    world.ollama.foreign_generate(world.vlm.name)
    told: list[str] = []
    manager.subscribe(lambda event: told.append(event.kind), "idle_unload", "vlm_lost")
    manager.drive_for(60.0)
    assert not world.vlm_resident()
    assert world.ollama.counts["loads"] == 1
    assert manager.get_status().state.value == mode
    assert told == []  # it is no loss; and nobody can tell when its memory was back

    manager.ensure_vlm_loaded()
    assert world.vlm_resident()
    assert manager.close() == ()


@pytest.mark.parametrize("slow", [False, True])
def test_clip_that_moves_while_an_idle_unload_is_late_does_not_keep_the_vlm(slow: bool) -> None:
    """Nobody wants it any more: its idle time does not begin anew, and it is not loaded again for nobody."""
    world = SimulatedWorld()
    manager = inline_manager(world, unload_deadline_s=5.0, idle_timeout_s=60.0)
    manager.ensure_vlm_loaded()
    world.ollama.generate_s = 80.0
    manager.drive_for(50.0)
    world.ollama.foreign_generate(world.vlm.name)
    manager.drive_for(20.0)
    assert world.vlm_resident()
    if slow:
        world.faults.arm("clip.to_gpu", "late", delay_s=70.0)
    manager.migrate_clip_to_gpu()
    assert world.vlm_resident() is not slow
    manager.drive_for(100.0)
    assert not world.vlm_resident()
    assert world.ollama.counts["loads"] == 1


@pytest.mark.parametrize("blind", [False, True])
def test_a_request_that_takes_over_an_idle_unload_is_a_use_of_the_vlm(blind: bool) -> None:
    """It is granted with the VLM in, which then stays as long as after any request; and nothing tells that it went."""
    world = SimulatedWorld()
    manager = inline_manager(world, idle_timeout_s=60.0)
    manager.set_execution_mode("recording")
    world.ollama.generate_s = 100.0
    manager.drive_for(50.0)
    told: list[str] = []
    manager.subscribe(lambda event: told.append(event.kind), "idle_unload", "vlm_lost")
    world.ollama.foreign_generate(world.vlm.name)
    asked: list[Any] = []

    def take_over(op: str, phase: str) -> None:
        if (op, phase) == ("ollama.unload", "after") and not asked:
            asked.append(None)
            world.clock.after(1.0, lambda: asked.append(manager.submit_execution_mode("recording", preempt=True)))
            if blind:
                world.faults.arm("probe.read", "unknown", times=None)

    world.on_io.append(take_over)
    manager.drive_for(30.0)
    assert asked[1].result(0).granted
    assert world.vlm_resident()
    assert manager.get_status().state is State.RECORDING
    assert [record.row for record in manager.journal].count("idle") == 1
    assert told == []


def test_a_stopped_ollama_on_another_card_does_not_keep_clip_off_ours() -> None:
    """Nothing of it can lie on our card, so AUTOPILOT stands; RECORDING says what is missing."""
    world = SimulatedWorld()
    manager = inline_manager(world, ollama_card="other")
    world.ollama.stop()
    assert manager.set_execution_mode("autopilot").granted
    assert world.clip.place == "gpu"
    outcome = manager.set_execution_mode("recording")
    assert (outcome.granted, outcome.reason and outcome.reason.code) == (False, "ollama_unreachable")
    world.ollama.start()
    manager.drive_for(120.0)
    assert manager.get_status().state is State.RECORDING
    assert manager.close() == ()


# --- what simulation runs found ---


def test_a_manager_that_slept_through_the_idle_time_loads_for_nobody() -> None:
    """The process was stopped for an hour; Ollama's own timer let the VLM go, and nobody has asked for it."""
    world = SimulatedWorld()
    manager = inline_manager(world, idle_timeout_s=30.0)
    manager.set_execution_mode("recording")
    world.clock.advance(3600.0)
    manager.drive_for(100.0)
    assert world.ollama.counts["loads"] == 1
    assert manager.get_status().hold is Hold.PARKED


@pytest.mark.parametrize("tells_holders", [True, False])
def test_what_a_neighbour_took_during_a_load_is_not_booked_to_the_vlm_for_good(tells_holders: bool) -> None:
    """On the empty card RECORDING comes back, by itself if need be."""
    world = SimulatedWorld(card_mib=6400.0, tells_holders=tells_holders)
    manager = inline_manager(world)

    def neighbour(op: str, phase: str) -> None:
        if (op, phase) == ("ollama.load", "after") and "game" not in world.card.owners():
            world.card.take("game", 1100.0)

    world.on_io.append(neighbour)
    assert manager.set_execution_mode("recording").granted
    world.on_io.remove(neighbour)
    world.card.give_back("game")
    assert manager.set_execution_mode("autopilot").granted
    granted = manager.set_execution_mode("recording").granted
    assert granted or not tells_holders
    manager.drive_for(60.0)
    assert manager.get_status().state is State.RECORDING


@pytest.mark.parametrize("version", ["0.24.0", "0.32.15"])
def test_a_load_that_dies_is_not_taken_for_one_that_came_in(version: str) -> None:
    """Ollama still lists a load whose client has left; the next request for the VLM waits until that is sure."""
    world = SimulatedWorld(version=version)
    manager = inline_manager(world)
    late: list[Any] = []

    def preempt(op: str, phase: str) -> None:
        if (op, phase) == ("ollama.load", "during") and not late:
            late.append(elsewhere(lambda: manager.submit_execution_mode("idle", preempt=True)))

    world.on_io.append(preempt)
    future = manager.submit_execution_mode("recording")
    manager.drive_for(5.0)
    world.on_io.remove(preempt)
    assert isinstance(future.exception(), errors.Superseded)
    assert late[0].result().granted
    assert manager.set_execution_mode("recording", preempt=True).granted
    assert world.vlm_resident()


def test_a_load_is_not_tried_again_on_a_card_that_is_full() -> None:
    """A neighbour took the room while the first try failed: the refusal has the figures and the holders."""
    world = SimulatedWorld(card_mib=6400.0)
    manager = inline_manager(world)

    def neighbour(op: str, phase: str) -> None:
        if (op, phase) == ("ollama.load", "during") and "game" not in world.card.owners():
            world.card.take("game", world.card.free_mib)

    world.on_io.append(neighbour)
    outcome = manager.set_execution_mode("recording")
    assert outcome.reason is not None
    assert outcome.reason.code == "vram_insufficient"
    assert "game" in outcome.reason.remedy
    assert [entry.op for entry in world.ollama.log].count("ollama.load") == 1


def test_a_partial_load_is_not_repeated_on_a_card_that_is_full() -> None:
    """A neighbour took its room meanwhile: one load, and the refusal names who holds what."""
    world = SimulatedWorld(card_mib=6400.0)
    manager = inline_manager(world)

    def neighbour(op: str, phase: str) -> None:
        if (op, phase) == ("ollama.load", "before") and "game" not in world.card.owners():
            world.card.take("game", 2000.0)

    world.on_io.append(neighbour)
    outcome = manager.set_execution_mode("recording")
    assert outcome.reason is not None
    assert outcome.reason.code == "vram_insufficient"
    assert "game" in outcome.reason.remedy
    assert [entry.op for entry in world.ollama.log].count("ollama.load") == 1
    assert not world.vlm_resident()


def test_a_manager_that_waits_to_close_fetches_nothing_back() -> None:
    """The VLM goes under a lease that the close waits for: it stays out."""
    world = SimulatedWorld(vlm_load_s=20.0)
    manager = inline_manager(world, drain_timeout_s=30.0)
    manager.set_execution_mode("recording")
    lease = manager.vlm(holder="somebody")
    elsewhere(lease.__enter__)
    world.clock.after(1.0, lambda: world.ollama.foreign_unload(world.vlm.name))
    began = world.clock.monotonic()
    assert manager.close() == ()
    assert world.clock.monotonic() - began < 31.0
    assert world.ollama.counts["loads"] == 1
    assert "check-outdated" in [record.row for record in manager.journal]


def test_a_degraded_manager_that_waits_to_close_does_not_recover_first() -> None:
    """Whatever the cause was, and though it has gone."""
    world = SimulatedWorld()
    manager = inline_manager(world, unknown_max_s=20.0)
    manager.set_execution_mode("autopilot")
    lease = manager.clip(holder="somebody")
    elsewhere(lease.__enter__)
    world.faults.arm("ollama.ps", "hang", times=None)
    manager.drive_for(60.0)
    assert manager.get_status().state is State.DEGRADED
    world.faults.heal()
    moves = len(manager.journal)
    (left,) = manager.close()
    assert left.startswith("CLIP on sim:0, leased by")
    assert "recover" not in [record.row for record in manager.journal][moves:]


def test_a_load_that_found_no_room_is_tried_again_when_it_is_no_longer_believed() -> None:
    """L2: not at the end of a pause that began just before; the mode is back within back-off cap, load and 5 s."""
    world = SimulatedWorld()
    manager = inline_manager(world, recover_cap_s=20.0)
    manager.set_execution_mode("autopilot")
    world.faults.arm("ollama.load", "partial", 2)
    assert not manager.set_execution_mode("recording").granted
    world.faults.heal()
    manager.drive_for(manager.config.recover_cap_s + world.vlm.load_s + 5)
    assert manager.get_status().state is State.RECORDING
    assert world.vlm_resident()


def test_a_partial_load_is_not_taken_out_under_a_lease_that_believes_in_it() -> None:
    """The lease is older than the load: Ollama was restarted under it.  Its holder is told."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode("recording")
    lease = manager.vlm(holder="somebody")
    elsewhere(lease.__enter__)
    world.ollama.stop()
    world.ollama.start()
    world.clock.advance(5)
    world.faults.arm("ollama.load", "partial", times=1)
    assert elsewhere(lambda: manager.set_execution_mode("recording")).granted
    assert [lease.lost for lease in manager.get_status().leases] == [True]


@pytest.mark.parametrize("version", ["0.24.0", "0.32.15"])
def test_a_listed_vlm_of_which_nothing_is_on_the_card_is_not_believed(version: str) -> None:
    """Its runner has died: Ollama lists it until somebody asks, and the driver knows better."""
    world = SimulatedWorld(version=version)
    manager = inline_manager(world)
    manager.ensure_vlm_loaded()
    world.ollama.kill_runner()
    world.clock.advance(5)
    assert manager.set_execution_mode("recording").granted
    assert world.vlm_resident()

    world.ollama.kill_runner()
    manager.drive_for(30.0)
    assert world.vlm_resident()
    assert manager.get_status().state is State.RECORDING


def test_a_request_that_is_torn_out_of_its_look_is_answered() -> None:
    """Ctrl-C before anything has moved: whoever else waits for an equal request is refused, not forgotten."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode("autopilot")

    def strike(op: str, phase: str) -> None:
        world.on_io.remove(strike)
        raise KeyboardInterrupt

    world.on_io.append(strike)
    first, second = manager.submit_execution_mode("recording"), manager.submit_execution_mode("recording")
    with pytest.raises(KeyboardInterrupt):
        manager.drive_for(10.0)
    manager.drive_for(10.0)
    assert isinstance(first.exception(0), errors.InternalError)
    assert isinstance(second.exception(0), errors.InternalError)
    assert manager.set_execution_mode("recording").granted


def test_an_answer_comes_after_the_status_that_tells_of_it() -> None:
    """Also where nothing had to move."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode("recording")
    manager.set_execution_mode("idle")
    seen: list[Hold | None] = []
    future = manager._driver.post("vlm_wanted").future
    future.add_done_callback(lambda _: seen.append(manager.get_status().hold))
    manager.drive_for(1.0)
    assert seen == [Hold.WANTED]


def test_a_card_that_is_lost_at_the_first_look_is_expected_back() -> None:
    """It was there: AUTOPILOT waits for it in DEGRADED and is not content with the CPU."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    world.faults.arm("probe.read", "gpu_lost", times=None)
    assert not manager.set_execution_mode("autopilot").granted
    world.faults.heal()
    manager.drive_for(120.0)
    assert manager.get_status().state is State.AUTOPILOT
    assert world.clip.place == "gpu"


@pytest.mark.parametrize("cut_at", ["ollama.ps", "ollama.unload"])
def test_a_close_that_was_cut_off_still_closes(cut_at: str) -> None:
    """Ctrl-C in its look or in the middle of it: the next call ends it, and nothing fires any more."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode("recording")

    def strike(op: str, phase: str) -> None:
        if op == cut_at:
            world.on_io.remove(strike)
            raise KeyboardInterrupt

    world.on_io.append(strike)
    with pytest.raises(KeyboardInterrupt):
        manager.close()
    assert manager.close() == ()
    assert manager.get_status().closed
    assert not world.vlm_resident()
    records = len(manager.journal)
    manager.drive_for(100.0)
    assert len(manager.journal) == records


def test_an_unload_that_is_asked_for_is_sent_whatever_made_us_degraded() -> None:
    """A lease was waited for in vain, and its VLM left alone; later nobody holds anything, and somebody asks."""
    world = SimulatedWorld(card_mib=12288.0)
    manager = inline_manager(world, drain_timeout_s=5.0)
    manager.set_execution_mode("autopilot")
    manager.ensure_vlm_loaded()
    leases, taken = manager._driver.leases, []

    def hook(op: str, phase: str) -> None:
        if op == "probe.read" and phase == "before" and manager.get_status().state is State.RELEASING and not taken:
            manager.submit_execution_mode("recording", preempt=True)
            leases.open()
            taken.append(leases.ask_clip("somebody").result(0))

    world.on_io.append(hook)
    with pytest.raises(errors.Superseded):
        manager.set_execution_mode("idle")
    manager.drive_for(10.0)
    status = manager.get_status()
    assert (status.state, status.reason and status.reason.code) == (State.DEGRADED, "lease_timeout")
    assert world.vlm_resident()
    leases.release(taken[0])
    manager.ensure_vlm_unloaded()
    assert not world.vlm_resident()


# --- what a reader found ---


def test_a_close_that_a_port_breaks_for_good_ends_with_one_error() -> None:
    """A defect in a port is told once, and the manager is closed."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode("autopilot")

    def broken(timeout_s: float) -> Any:
        raise ValueError("a defect in a probe")

    world.probe.read = broken  # type: ignore[method-assign]
    with pytest.raises(errors.InternalError, match="a defect in a probe"):
        manager.close()
    assert manager.get_status().closed


@pytest.mark.parametrize("told", ["nobody", "nameless"])
def test_a_vlm_is_not_called_dead_where_the_driver_cannot_name_its_runner(told: str) -> None:
    """In a container; and Ollama's figure is 15 % more than what lies on the card."""
    world = SimulatedWorld(card_mib=12288.0, driver_mib=100.0, clip=False)
    take, holders = world.card.take, world.card.holders

    def less(owner: str, mib: float, **options: Any) -> None:
        take(owner, mib * 0.85, **options)

    world.card.take = less  # type: ignore[method-assign]
    world.card.holders = lambda: (
        ()
        if told == "nobody"
        else tuple(  # type: ignore[method-assign]
            attrs.evolve(holder, name="") for holder in holders()
        )
    )
    manager = inline_manager(world)
    assert manager.set_execution_mode("recording").granted
    manager.drive_for(60.0)
    assert manager.get_status().state is State.RECORDING
    assert world.ollama.counts["loads"] == 1


def test_one_shortage_does_not_cost_a_good_measurement() -> None:
    """What was measured fits; what the catalogue makes one fear would not."""
    world = SimulatedWorld()
    world.vlm = world.ollama.add_model(attrs.evolve(world.vlm, disk_mib=5200.0))
    manager = inline_manager(world)
    manager.ensure_vlm_loaded()
    manager.ensure_vlm_unloaded()
    world.card.take("game", 3000.0, pid=7, name="game")
    with pytest.raises(errors.InsufficientVRAM):
        manager.ensure_vlm_loaded()
    world.card.give_back("game", 1000.0)
    manager.ensure_vlm_loaded()
    assert world.vlm_resident()


def test_an_adopted_vlm_that_was_busy_when_it_went_idle_goes_later() -> None:
    """It was never ours, but RECORDING promised it, so its idle time counts until it is out."""
    world = SimulatedWorld(generate_s=60.0)
    manager = inline_manager(world, idle_timeout_s=60.0)
    world.ollama.foreign_load(world.vlm.name, keep_alive=-1)
    manager.drive_for(10.0)
    manager.set_execution_mode("recording")
    manager.drive_for(55.0)
    world.ollama.foreign_generate(world.vlm.name, keep_alive=-1)
    manager.drive_for(39.0)
    world.ollama.foreign_generate(world.vlm.name, keep_alive=-1)
    manager.drive_for(600.0)
    assert not world.vlm_resident()
    assert manager.get_status().state is State.RECORDING


def test_an_idle_vlm_is_not_fetched_back_because_clip_cannot_return() -> None:
    """AUTOPILOT with the VLM on demand: it goes for want of use, CLIP finds no room; that is no reason to load."""
    world = SimulatedWorld(card_mib=6400.0)
    manager = inline_manager(world, idle_timeout_s=60.0)
    manager.set_execution_mode("autopilot")
    manager.ensure_vlm_loaded()
    world.faults.arm("clip.to_gpu", "oom", times=None)
    manager.drive_for(1000.0)
    assert world.ollama.counts["loads"] == 1
    assert manager.get_status().state is State.DEGRADED


def test_ollama_is_restarted_and_nothing_is_loaded_on_the_way_out() -> None:
    """The VLM comes back after the restart; what goes while a close waits for its lease does not."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        machine.oracle.inputs += 4
        manager.set_execution_mode("recording")
        machine.stop_ollama(kill=False)
        machine.start_ollama(starting_s=0.0)
        manager.drive_for(100.0)
        assert world.vlm_resident()
        lease = manager.vlm(holder="somebody")
        elsewhere(lease.__enter__)
        check_at = next(timer.due_at for timer in manager.get_status().timers if timer.name == "check")
        manager.drive_for(check_at - world.clock.monotonic() - 5.0)
        world.clock.after(1.0, lambda: world.ollama.foreign_unload(world.vlm.name))
        loads = world.ollama.counts["loads"]
        manager.close()
        assert "check-outdated" in rows(machine)
        assert world.ollama.counts["loads"] == loads


def test_a_vlm_on_another_card_is_not_called_gone() -> None:
    """The driver shows nothing of it on ours, yet Ollama lists it: an unload is sent, and only its end is believed."""
    world = SimulatedWorld(card_mib=12288.0, clip=False)
    manager = inline_manager(world)
    take = world.card.take

    def elsewhere_card(owner: str, mib: float, **options: Any) -> None:
        if not owner.startswith("ollama"):
            take(owner, mib, **options)

    world.card.take = elsewhere_card  # type: ignore[method-assign]
    world.ollama.foreign_load(world.vlm.name, keep_alive=-1)
    manager.drive_for(10.0)
    manager.ensure_vlm_unloaded()
    assert not world.vlm_resident()
    assert world.ollama.counts["unloads"] == 1


def test_a_driver_that_answers_now_and_then_tells_of_one_shortage_once() -> None:
    """An unanswered look is no recovery: one event, and the pressure lasts."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode("recording")
    told: list[Any] = []
    manager.subscribe(told.append, "vram_low")
    world.card.take("game", world.card.free_mib - 10.0)
    looks = 0

    def every_other(op: str, phase: str) -> None:
        nonlocal looks
        if (op, phase) == ("probe.read", "before"):
            looks += 1
            if looks % 2:
                world.faults.arm("probe.read", "unknown", times=1)

    world.on_io.append(every_other)
    manager.drive_for(600.0)
    assert len(told) == 1
    assert manager.get_status().state is State.DEGRADED


def test_shorter_pauses_hold_for_the_pause_that_runs() -> None:
    """A person who lowers the back-off does not wait for the old one."""
    world = SimulatedWorld()
    manager = inline_manager(world, recover_base_s=3000.0, recover_cap_s=3600.0)
    world.faults.arm("ollama.load", "http_500", times=None)
    assert not manager.set_execution_mode("recording").granted
    world.faults.heal()
    manager.reconfigure(recover_base_s=1.0, recover_cap_s=2.0)
    manager.drive_for(60.0)
    assert manager.get_status().state is State.RECORDING


def test_a_close_that_was_torn_before_it_was_served_is_served() -> None:
    """Ctrl-C between the mailbox and the machine."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode("recording")
    driver = manager._driver
    driver.post_close()
    with pytest.raises(KeyboardInterrupt), driver._drive():
        driver.mailbox.take()
        raise KeyboardInterrupt
    assert manager.close() == ()
    assert not world.vlm_resident()


def test_recovery_does_not_go_for_a_mode_that_a_waiting_request_replaces() -> None:
    """DEGRADED for RECORDING; AUTOPILOT waits for a lease: nobody wants the VLM any more."""
    world = SimulatedWorld()
    manager = inline_manager(world, drain_timeout_s=30.0)
    world.ollama.stop()
    manager.set_execution_mode("recording")
    world.ollama.start()
    lease = manager.clip(holder="somebody")
    elsewhere(lease.__enter__)
    future = manager.submit_execution_mode("autopilot", preempt=True)
    manager.drive_for(25.0)
    assert not future.done()
    assert world.ollama.counts["loads"] == 0
    elsewhere(lambda: lease.__exit__(None, None, None))
    manager.drive_for(5.0)
    assert future.result(0).granted


def test_a_part_that_was_accepted_is_not_taken_for_the_whole() -> None:
    """The next load makes room for all of the VLM where CLIP can give it."""
    world = SimulatedWorld(card_mib=6400.0)
    manager = inline_manager(world, on_partial_offload="accept")
    world.faults.arm("ollama.load", "partial", times=1)
    assert manager.set_execution_mode("recording").granted
    manager.set_execution_mode("autopilot")
    world.card.take("game", 400.0)
    manager.ensure_vlm_loaded()
    assert world.vlm_held_mib() == world.vlm.size_mib


def test_what_clip_gave_back_does_not_prove_that_the_vlm_is_gone() -> None:
    """A large CLIP is back at once; the close that gives both back is over when the VLM's memory is back, too."""
    world = SimulatedWorld(vlm_mib=600, clip_mib=900, context_mib=0, reclaim_s=4.0)
    manager = inline_manager(world)
    manager.set_execution_mode("autopilot")
    manager.ensure_vlm_loaded()
    assert (world.vlm_resident(), world.clip.place) == (True, "gpu")
    manager.close()

    assert [owner for owner in world.card.owners() if owner.startswith("ollama") or owner == "clip"] == []


def test_an_unload_whose_memory_does_not_come_back_is_told_to_who_asked() -> None:
    """The VLM is out by Ollama's word alone: the hold stands, and whoever asked gets the figures."""
    with story(tells_holders=False) as machine:
        manager, world = machine.manager, machine.world
        manager.set_execution_mode("recording")
        world.faults.arm("ollama.unload", "reclaim_never")
        with pytest.raises(errors.ReleaseUnproven) as told:
            manager.ensure_vlm_unloaded()

        assert told.value.returned_mib < 0.9 * told.value.expected_mib
        assert (State.RECORDING, Hold.PARKED) == (manager.get_status().state, manager.get_status().hold)
        world.faults.heal()


def test_a_vlm_that_another_program_runs_under_another_name_is_known_by_its_digest() -> None:
    """It is in already, so nothing is loaded."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    world.ollama.add_model(attrs.evolve(world.vlm, name="another:name"))
    world.ollama.foreign_load("another:name")
    world.clock.advance(60.0)
    assert manager.set_execution_mode("recording").granted
    assert [entry.op for entry in world.ollama.log if entry.client == "us" and entry.op == "ollama.load"] == []


def test_the_device_that_is_named_is_where_clip_is_now() -> None:
    """Not where it was at the last look: while the VLM loads, CLIP has long gone down."""
    with story(card_mib=SMALL) as machine:
        manager, world = machine.manager, machine.world
        manager.set_execution_mode("autopilot")
        named: list[str] = []

        def look(op: str, phase: str) -> None:
            if op == "clip.to_cpu" and phase != "during":
                named.append(manager.get_clip_device())

        world.on_io.append(look)
        manager.set_execution_mode("recording")
        world.on_io.remove(look)

        assert named == ["sim:0", "cpu"]


def test_the_pause_before_the_next_try_is_never_longer_than_its_cap() -> None:
    """However often it has failed: what heals is found within `recover_cap_s`."""
    with story() as machine:
        manager, world = machine.manager, machine.world
        world.faults.arm("ollama.load", "http_500", times=None)
        machine.oracle.inputs += 1
        manager.set_execution_mode("recording")
        longest = 0.0
        for _ in range(100):
            manager.drive_for(10.0)
            status = manager.get_status()
            assert State.DEGRADED is status.state
            (due_at,) = [timer.due_at for timer in status.timers if timer.name == "recover"]
            longest = max(longest, due_at - status.now_at)
        assert longest == pytest.approx(manager.config.recover_cap_s)
        world.faults.heal()


def test_a_fallback_that_fails_too_is_not_tried_for_ever() -> None:
    """The VLM does not come in, CLIP does not go up again: then it is DEGRADED."""
    with story(card_mib=SMALL) as machine:
        manager, world = machine.manager, machine.world
        manager.set_execution_mode("autopilot")
        world.faults.arm("ollama.load", "http_500", times=None)
        world.faults.arm("clip.to_gpu", "oom", times=None)
        with pytest.raises(errors.LoadFailed):
            manager.ensure_vlm_loaded()

        assert State.DEGRADED is manager.get_status().state
        world.faults.heal()


def test_a_vlm_that_has_gone_is_not_fetched_by_its_renewal() -> None:
    """A renewal of what is gone would be a load in the middle of a mode; the check puts it right, step by step."""
    with story() as machine:
        manager = machine.manager
        manager.set_execution_mode("recording")
        with manager.vlm():
            manager.drive_for(1.0)
            renewals = renewals_of_the_gone(machine)
        assert renewals == []


def renewals_of_the_gone(machine: GPUStateMachine) -> list[str]:
    """Let the VLM be gone when its renewal falls due, and no check between; returns what was sent for it."""
    manager, world = machine.manager, machine.world
    while True:
        due = {timer.name: timer.due_at for timer in manager.get_status().timers}
        if "renew" in due and due["renew"] < due["check"]:
            break
        manager.drive_for(max(0.1, min(due.values()) - world.clock.monotonic()))
    world.ollama.foreign_unload(world.vlm.name)
    sent = len(world.ollama.log)
    manager.drive_for(max(0.0, due["renew"] - world.clock.monotonic()))
    assert manager.journal[-1].trigger == "renew"
    return [entry.op for entry in world.ollama.log[sent:] if entry.client == "us" and entry.op != "ollama.ps"]


def test_an_orphan_of_a_killed_ollama_is_not_taken_for_an_unloaded_vlm() -> None:
    """Its memory is still taken, so who asks for the unload is told that nobody can tell."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode("recording")
    world.ollama.stop(kill=True)
    with pytest.raises(errors.ResidencyUnknown):
        manager.ensure_vlm_unloaded()
    world.ollama.reap_orphans()
    manager.ensure_vlm_unloaded()

    assert Hold.PARKED is manager.get_status().hold


def test_a_load_that_nobody_wants_any_more_is_cut_off() -> None:
    """The preempting request has no use for it, so it does not wait a hundred seconds for its end."""
    world = SimulatedWorld(vlm_load_s=100.0)
    manager = inline_manager(world)
    asked: list[Any] = []
    world.clock.after(10.0, lambda: asked.append(manager.submit_execution_mode("autopilot", preempt=True)))
    with pytest.raises(errors.Superseded):
        manager.set_execution_mode("recording")
    manager.drive_for(20.0)

    assert asked[0].result(0).granted
    assert world.clock.monotonic() < 60.0


def test_who_waits_for_a_lease_is_displaced_by_what_preempts_the_holders_load() -> None:
    """The holder's wish is served past the one who waits for it; a preempting request ends both, and tells both."""
    world = SimulatedWorld(vlm_load_s=30.0)
    manager = inline_manager(world)
    manager.set_execution_mode("autopilot")
    with manager.clip(holder="the holder"):
        waiting = elsewhere(lambda: manager.submit_execution_mode("recording"))
        manager.drive_for(1.0)
        assert not waiting.done()
        asked: list[Any] = []
        preempting = lambda: manager.submit_execution_mode("idle", preempt=True)  # noqa: E731
        world.clock.after(5.0, lambda: asked.append(elsewhere(preempting)))
        with pytest.raises(errors.Superseded):
            manager.ensure_vlm_loaded()
        manager.drive_for(5.0)

        assert asked[0].result(0).granted
        assert isinstance(waiting.exception(0), errors.Superseded)
