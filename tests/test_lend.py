"""Room on the card that is kept for others: nobody who asks takes it, and no timer either."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import pytest

from gpu_fsm import ExecutionMode, GPUResourceManager, State, errors
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.testing.simulated import inline_manager

pytestmark = pytest.mark.core

LONG_S = 3600.0
RECORDING, AUTOPILOT, IDLE = ExecutionMode.RECORDING, ExecutionMode.AUTOPILOT, ExecutionMode.IDLE


@pytest.fixture
def world() -> SimulatedWorld:
    """A card with everything on it managed."""
    return SimulatedWorld()


@pytest.fixture
def manager(world: SimulatedWorld) -> Iterator[GPUResourceManager]:
    """In virtual time, with every timer that there is."""
    with inline_manager(world, idle_timeout_s=60) as made:
        yield made


def make_room(manager: GPUResourceManager) -> None:
    """What a borrower does inside the block."""
    manager.set_execution_mode(IDLE)
    manager.ensure_vlm_unloaded()
    manager.migrate_clip_to_cpu()


def ours_mib(world: SimulatedWorld) -> float:
    """What is ours on the card and can be given up, by the card's ledger; a CUDA context once made cannot."""
    return sum(mib for owner, mib in world.card.owners().items() if owner not in ("borrower", "driver", "clip-context"))


TAKING: dict[str, Callable[[GPUResourceManager], object]] = {
    "recording": lambda manager: manager.set_execution_mode(RECORDING),
    "autopilot": lambda manager: manager.set_execution_mode(AUTOPILOT, preempt=True),
    "submitted": lambda manager: manager.submit_execution_mode(RECORDING),
    "vlm": lambda manager: manager.ensure_vlm_loaded(),
    "lease": lambda manager: manager.vlm().__enter__(),
    "clip": lambda manager: manager.migrate_clip_to_gpu(),
}


@pytest.mark.parametrize("before", [IDLE, RECORDING, AUTOPILOT])
def test_what_would_take_the_room_is_refused_while_it_is_lent(
    world: SimulatedWorld, manager: GPUResourceManager, before: ExecutionMode
) -> None:
    """By name, whoever asks and however; afterwards all of it may be had again."""
    manager.set_execution_mode(before)
    with manager.lend("whisper") as loan:
        make_room(manager)
        for take in TAKING.values():
            with pytest.raises(errors.CardHeld, match="lent to whisper"):
                take(manager)
        assert ours_mib(world) == 0.0
        with manager.clip() as clip:
            assert clip.encode(["served from the CPU"]).shape[0] == 1
    assert loan.mode is before
    for mode in (AUTOPILOT, RECORDING):
        assert manager.set_execution_mode(mode).granted


@pytest.mark.parametrize("before", [IDLE, RECORDING, AUTOPILOT])
def test_no_timer_takes_the_room(world: SimulatedWorld, manager: GPUResourceManager, before: ExecutionMode) -> None:
    """Looks, the idle time, the renewal and recovery: for an hour, with a server that stops and comes back."""
    manager.set_execution_mode(before)
    with manager.lend("whisper"):
        make_room(manager)
        world.card.take("borrower", 6000.0)
        for _ in range(3):
            manager.drive_for(LONG_S / 6)
            assert ours_mib(world) == 0.0
            world.ollama.stop()
            manager.drive_for(LONG_S / 6)
            world.ollama.start()
            assert ours_mib(world) == 0.0
        assert manager.get_status().execution_mode is IDLE
        world.card.give_back("borrower")


def test_a_degraded_manager_does_not_recover_into_lent_room(world: SimulatedWorld, manager: GPUResourceManager) -> None:
    """It was after RECORDING, which could not be had; once lent, the room stays lent though RECORDING is possible."""
    world.ollama.stop()
    assert not manager.set_execution_mode(RECORDING).granted
    assert manager.get_status().state is State.DEGRADED
    with manager.lend("whisper") as loan:
        manager.set_execution_mode(IDLE)
        world.ollama.start()
        manager.drive_for(LONG_S)
        assert ours_mib(world) == 0.0
        assert manager.get_status().state is State.IDLE
    assert loan.mode is RECORDING


def test_what_was_asked_before_is_served_before(world: SimulatedWorld, manager: GPUResourceManager) -> None:
    """A request on its way is no breach: the room is made after it, and it is what a borrower restores."""
    on_its_way = manager.submit_execution_mode(AUTOPILOT)
    with manager.lend("whisper") as loan, manager.lend("sd") as second:
        make_room(manager)
        assert on_its_way.result().granted
        assert ours_mib(world) == 0.0
        assert (loan.mode, second.mode) == (AUTOPILOT, AUTOPILOT)
        with pytest.raises(errors.CardHeld, match="whisper, sd"):
            manager.ensure_vlm_loaded()


def test_a_loan_ends_with_its_block_however_that_ends(manager: GPUResourceManager) -> None:
    """And a manager that is lent can be closed."""
    with pytest.raises(ZeroDivisionError), manager.lend("whisper"):
        raise ZeroDivisionError
    assert manager.set_execution_mode(RECORDING).granted
    with manager.lend("whisper"):
        assert manager.close() == ()
    with pytest.raises(errors.ManagerClosed), manager.lend("whisper"):
        pass


@pytest.mark.parametrize("asked_meanwhile", [False, True])
@pytest.mark.parametrize("first_to_end", [0, 1])
def test_the_mode_to_ask_for_again_is_what_somebody_wanted(
    manager: GPUResourceManager, first_to_end: int, asked_meanwhile: bool
) -> None:
    """Not what borrowers asked for to make room, however many there are and in whatever order they end."""
    manager.set_execution_mode(RECORDING)
    blocks = [contextlib.ExitStack(), contextlib.ExitStack()]
    loans = []
    for block in blocks:
        loans.append(block.enter_context(manager.lend("whisper")))
        make_room(manager)
    if asked_meanwhile:
        contextvars.Context().run(manager.set_execution_mode, IDLE)  # another thread, or another task
    for place in (first_to_end, 1 - first_to_end):
        blocks[place].close()
        assert loans[place].mode is (IDLE if asked_meanwhile else RECORDING)
    with manager.lend("the next one") as loan:
        assert loan.mode is (IDLE if asked_meanwhile else RECORDING), "nobody has asked for another one since"
    manager.set_execution_mode(AUTOPILOT)
    with manager.lend("the last one") as loan:
        assert loan.mode is AUTOPILOT


def room_for(manager: GPUResourceManager, block: contextlib.ExitStack) -> contextvars.Context:
    """Somebody borrows the card in a context of its own, which is returned as it is inside."""
    context = contextvars.copy_context()
    context.run(block.enter_context, manager.lend("whisper"))
    context.run(make_room, manager)
    return context


def test_what_was_begun_inside_a_block_is_free_after_it(manager: GPUResourceManager) -> None:
    """A task has the context of whoever began it, for as long as it runs: what it asks for later is what it wants."""
    manager.set_execution_mode(AUTOPILOT)
    with contextlib.ExitStack() as block:
        begun_inside = room_for(manager, block)
    begun_inside.run(manager.set_execution_mode, RECORDING)
    with manager.lend("the next one") as loan:
        assert loan.mode is RECORDING


def test_to_make_room_with_one_manager_says_nothing_to_another(manager: GPUResourceManager) -> None:
    """A program with two cards: what it asks of the second one inside a block of the first is what it wants there."""
    with inline_manager(SimulatedWorld()) as second:
        with second.lend("whisper"):
            pass
        with manager.lend("sd"):
            second.set_execution_mode(RECORDING)
        with second.lend("the next one") as loan:
            assert loan.mode is RECORDING


def test_who_ends_somebody_elses_block_still_makes_room_in_its_own(manager: GPUResourceManager) -> None:
    """The last to come may be the one that finds the first one dead."""
    manager.set_execution_mode(RECORDING)
    first = contextlib.ExitStack()
    room_for(manager, first)
    with manager.lend("sd") as loan:
        first.close()
        make_room(manager)
        assert loan.mode is RECORDING
