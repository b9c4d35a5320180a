"""Ctrl-C inside the manager's own code: whoever asked is answered, no lease is left, and the next call works.

`test_interruptions.py` strikes between two effects.  Here a `KeyboardInterrupt` comes where Python lets one in: on the
way into any function that the driver's side calls, at the last time that it is called from there; in a thorough run at
the first as well.
"""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import pytest
from hypothesis import settings

import gpu_fsm
from gpu_fsm.errors import GPUFSMError
from gpu_fsm.leases import remember
from gpu_fsm.manager import GPUResourceManager
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.states import STABLE
from gpu_fsm.status import State
from gpu_fsm.testing.stateful import inline_manager
from gpu_fsm.tickets import Outcome

OURS = {
    str(Path(gpu_fsm.__file__).parent / f"{name}.py") for name in ("driver", "engine", "leases", "machine", "tickets")
}
HOLDER = "the story"
WORLD = str(Path(gpu_fsm.__file__).parent / "simulation")

Place = tuple[str, str, str, int]
"""A function's file and name, and who calls it from which line."""


class Cut:
    """A trace function: counts the calls from the driver's side, and raises at one of them."""

    def __init__(self, at: int = -1) -> None:
        self.places: list[Place] = []
        self._at = at

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        caller = frame.f_back
        code = frame.f_code
        # The world is no part of the process that is interrupted.
        if caller is None or caller.f_code.co_filename not in OURS or code.co_filename.startswith(WORLD):
            return
        self.places.append((code.co_filename, code.co_qualname, caller.f_code.co_qualname, caller.f_lineno))
        if len(self.places) - 1 == self._at:
            raise KeyboardInterrupt

    def run(self, act: Callable[[], object]) -> bool:
        """Whether it was cut off."""
        sys.settrace(self)
        try:
            act()
        except KeyboardInterrupt:
            return True
        except GPUFSMError:
            pass
        finally:
            sys.settrace(None)
        return False


@attrs.frozen
class Story:
    """A manager in a world with requests on their way; `act` serves them."""

    world: SimulatedWorld
    manager: GPUResourceManager
    asked: Sequence[Future[Outcome]]
    act: Callable[[], object]


def a_mode() -> Story:
    """A mode, and behind it another."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    asked = (manager.submit_execution_mode("recording"), manager.submit_execution_mode("autopilot"))
    return Story(world, manager, asked, lambda: manager.drive_for(60))


def a_lease() -> Story:
    """The VLM on demand, with a lease in the same breath."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode("autopilot")
    asked = manager._driver.post("vlm_wanted", lease_for="somebody").future
    return Story(world, manager, (asked,), lambda: manager.drive_for(60))


def a_wait_for_a_lease() -> Story:
    """A request that waits until a lease ends, and one that waits behind it."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode("recording")
    lease = manager._driver.leases.grant_vlm(HOLDER)
    asked = (manager.submit_execution_mode("autopilot"), manager.submit_execution_mode("recording"))

    def act() -> None:
        manager.drive_for(2)
        manager._driver.leases.release(lease)
        manager.drive_for(60)

    return Story(world, manager, asked, act)


def a_superseded_wait() -> Story:
    """A request that waits for a lease, thrown out by one that preempts."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode("recording")
    lease = manager._driver.leases.grant_vlm(HOLDER)
    waits = manager.submit_execution_mode("autopilot")
    manager.drive_for(2)
    preempts = manager.submit_execution_mode("idle", preempt=True)

    def act() -> None:
        manager.drive_for(1)
        manager._driver.leases.release(lease)
        manager.drive_for(60)

    return Story(world, manager, (waits, preempts), act)


def a_takeover() -> Story:
    """A request that waits for a lease while something else moves, and one that takes over in the middle of that."""
    world = SimulatedWorld()
    manager = inline_manager(world, check_interval_s=5.0)
    manager.set_execution_mode("autopilot")
    manager.ensure_vlm_loaded()
    lease = manager._driver.leases.ask_clip(HOLDER).result(0)
    asked = [manager.submit_execution_mode("recording")]
    manager.drive_for(1)
    world.ollama.foreign_unload(world.vlm.name)

    def take_over(op: str, phase: str) -> None:
        if manager._driver.engine.state is State.RELEASING and len(asked) == 1:
            asked.append(manager.submit_execution_mode("idle", preempt=True))

    world.on_io.append(take_over)

    def act() -> None:
        manager.drive_for(9)
        manager._driver.leases.release(lease)
        manager.drive_for(60)

    return Story(world, manager, asked, act)


def two_who_wait() -> Story:
    """A request that waits for a lease, and the holder's own, which goes past it and waits for another one."""
    world = SimulatedWorld(card_mib=16384)
    manager = inline_manager(world)
    manager.set_execution_mode("autopilot")
    manager.ensure_vlm_loaded()
    leases = manager._driver.leases
    clip, vlm = leases.ask_clip(HOLDER).result(0), leases.grant_vlm(HOLDER)
    waits = manager._driver.post("vlm_unwanted").future
    manager.drive_for(1)

    def holder_asks() -> Future[Outcome]:
        remember(vlm)
        return manager.submit_execution_mode("recording")

    asked = (waits, contextvars.Context().run(holder_asks))

    def act() -> None:
        manager.drive_for(2)
        leases.release(clip)
        manager.drive_for(2)
        leases.release(vlm)
        manager.drive_for(60)

    return Story(world, manager, asked, act)


def a_failure() -> Story:
    """A load that fails, DEGRADED, and the way back."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    world.faults.arm("ollama.load", "http_500", times=5)
    asked = (manager.submit_execution_mode("recording"), manager.submit_execution_mode("autopilot"))
    return Story(world, manager, asked, lambda: manager.drive_for(60))


def a_close() -> Story:
    """The end, with a request before it."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    manager.set_execution_mode("recording")
    asked = (manager.submit_execution_mode("recording"), manager._driver.post_close())
    return Story(world, manager, asked, lambda: manager.drive_for(60))


STORIES = (a_mode, a_lease, a_wait_for_a_lease, a_superseded_wait, a_takeover, two_who_wait, a_failure, a_close)


def chosen(places: list[Place]) -> list[int]:
    """Each place once; in a thorough run twice."""
    first = {place: n for n, place in reversed(list(enumerate(places)))}
    last = {place: n for n, place in enumerate(places)}
    thorough = settings.get_current_profile_name() == "thorough"
    return sorted({*last.values(), *(first.values() if thorough else ())})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("tell", STORIES, ids=lambda tell: tell.__name__)
def test_a_ctrl_c_on_the_way_into_any_function_loses_nothing(
    tell: Callable[[], Story], caplog: pytest.LogCaptureFixture
) -> None:
    """Every request is answered, every lease has an owner, the world is as asked, and the end comes."""
    caplog.set_level("CRITICAL")
    story, undisturbed = tell(), Cut()
    undisturbed.run(story.act)
    assert all(asked.done() for asked in story.asked)
    points = chosen(undisturbed.places)
    assert len(points) > 100
    cuts = 0
    for at in points:
        story, cut = tell(), Cut(at)
        cuts += cut.run(story.act)
        where = cut.places[min(at, len(cut.places) - 1)]
        is_whole(story, where)
    assert cuts > 0.9 * len(points)


def test_a_ctrl_c_while_settings_change_leaves_no_two_opinions() -> None:
    """What was to hold holds everywhere after the next drive, wherever the first one was cut off."""
    at, points, cuts = -1, 0, 0
    while at < points:
        manager, cut = inline_manager(SimulatedWorld()), Cut(at)
        manager.drive_for(1)
        manager.reconfigure(reserve_mib=777)
        cuts += cut.run(lambda manager=manager: manager.drive_for(0))  # type: ignore[misc]
        points = len(cut.places) if at < 0 else points
        manager.drive_for(0)
        engine = manager._driver.engine
        opinions = (manager.config, engine.config, engine._steps._config, engine._observer._config)
        assert [config.reserve_mib for config in opinions] == [777] * 4, cut.places[at]
        at += 1
    assert cuts > 10


def is_whole(story: Story, where: Place) -> None:
    """Nothing is lost."""
    manager, world = story.manager, story.world
    manager.drive_for(0)
    waiting = [ticket.seq for ticket in (*manager._driver.engine.waiting, *manager._driver.mailbox._queue)]
    assert len(waiting) == len(set(waiting)), where
    manager.drive_for(60)
    assert all(asked.done() for asked in story.asked), where
    for outcome in (asked.result() for asked in story.asked if asked.exception() is None):
        manager._driver.leases.release(outcome.lease or 0)
    if left := manager.get_status().leases:
        # What the story holds itself, where it was cut off before it gave it back; the granted ones have gone.
        assert {lease.holder for lease in left} == {HOLDER}, where
        for lease in left:
            manager._driver.leases.release(lease.id)
    if not manager.get_status().closed:
        assert manager.set_execution_mode("autopilot", timeout_s=200).granted, where
        assert (world.vlm_resident(), world.clip.place) == (False, "gpu"), where
        status = manager.get_status()
        assert (status.leases, status.queued) == ((), 0), where
        assert status.state in STABLE
        manager.close()
    assert world.clip.place == "cpu", where
    assert not world.vlm_resident(), where
