"""Events: frozen records, told in order, on a thread where listeners can do no harm."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future
from itertools import pairwise

import attrs
import pytest

from gpu_fsm import ExecutionMode
from gpu_fsm.errors import LoadFailed
from gpu_fsm.events import KINDS, Degraded, Event, ModeChanged, Recovered, ResourceChanged, StateChanged
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.states import STEPS, State
from tests.waiting import PATIENCE_S, until
from tests.worlds import inline, threaded

pytestmark = pytest.mark.core


def test_events_come_in_order_with_the_states_they_tell_of() -> None:
    """Every change of state is told once, each begins where the one before it ended; modes likewise."""
    manager = inline(SimulatedWorld())
    told: list[Event] = []
    manager.subscribe(told.append)
    for mode in ("recording", "autopilot", "idle", "recording"):
        manager.set_execution_mode(mode)
    manager.drive_for(0)
    states = [event for event in told if isinstance(event, StateChanged)]
    assert states[0].old is State.IDLE
    assert all(one.new is next_one.old for one, next_one in pairwise(states))
    modes = [event for event in told if isinstance(event, ModeChanged)]
    assert [event.new.value for event in modes] == ["recording", "autopilot", "idle", "recording"]
    assert [event.at for event in told] == sorted(event.at for event in told)
    assert {event.new for event in states} >= set(STEPS) - {State.SHEDDING}


def test_only_the_kinds_asked_for_are_told() -> None:
    """Kinds are named by word or by class; none means all."""
    world = SimulatedWorld()
    manager = inline(world, idle_timeout_s=20)
    words: list[Event] = []
    classes: list[Event] = []
    manager.subscribe(words.append, "idle_unload")
    manager.subscribe(classes.append, ModeChanged, StateChanged)
    manager.set_execution_mode("recording")
    manager.drive_for(60)
    assert {event.kind for event in words} == {"idle_unload"}
    assert {event.kind for event in classes} == {"mode_changed", "state_changed"}


def test_unsubscribing_ends_the_telling() -> None:
    """After `unsubscribe()` nothing comes any more; calling it again is harmless; others still hear."""
    manager = inline(SimulatedWorld())
    first: list[Event] = []
    second: list[Event] = []
    unsubscribe = manager.subscribe(first.append, "mode_changed")
    manager.subscribe(second.append, "mode_changed")
    manager.set_execution_mode("recording")
    unsubscribe()
    unsubscribe()
    manager.set_execution_mode("idle")
    manager.drive_for(0)
    assert (len(first), len(second)) == (1, 2)


def test_the_same_listener_twice_hears_twice_and_leaves_once() -> None:
    """A subscription is a thing of its own: its end ends no other."""
    manager = inline(SimulatedWorld())
    told: list[Event] = []
    ends = [manager.subscribe(told.append, "mode_changed") for _ in range(2)]
    manager.set_execution_mode("recording")
    assert len(told) == 2
    ends[0]()
    manager.set_execution_mode("idle")
    assert len(told) == 3


def test_a_listener_that_raises_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged and counted; the machine and the other listeners go on, and it is told the next event too."""
    manager = inline(SimulatedWorld())
    told: list[Event] = []

    def broken(event: Event) -> None:
        raise ZeroDivisionError("in a listener")

    leave = manager.subscribe(broken, "mode_changed")
    manager.subscribe(told.append, "mode_changed")
    for mode in ("recording", "autopilot"):
        assert manager.set_execution_mode(mode).granted
    assert len(told) == 2
    leave()
    assert manager.get_status().listener_errors == 2
    logged = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.name for record in logged] == ["gpu_fsm", "gpu_fsm"]
    assert all("mode_changed" in record.getMessage() for record in logged)


def test_a_slow_listener_delays_nothing_but_later_events() -> None:
    """While a listener stands still the machine serves request after request; then all events come, in order."""
    manager = threaded(SimulatedWorld())
    go = threading.Event()
    told: list[Event] = []

    def slow(event: Event) -> None:
        assert go.wait(PATIENCE_S)
        told.append(event)

    manager.subscribe(slow, "mode_changed")
    modes = ["recording", "autopilot", "idle", "recording"]
    for mode in modes:
        assert manager.set_execution_mode(mode, timeout_s=PATIENCE_S).granted
    assert told == []
    go.set()
    until(lambda: len(told) == len(modes))
    assert [event.new.value for event in told if isinstance(event, ModeChanged)] == modes
    manager.close()


def test_listeners_never_run_in_the_machine_s_thread() -> None:
    """Neither the driver nor the caller: they have a thread of their own."""
    manager = threaded(SimulatedWorld())
    name: Future[str] = Future()
    unsubscribe = manager.subscribe(lambda event: name.set_result(threading.current_thread().name), "mode_changed")
    manager.set_execution_mode("recording", timeout_s=PATIENCE_S)
    assert name.result(PATIENCE_S) == "gpu_fsm-events"
    unsubscribe()
    manager.close()


def test_listeners_may_subscribe_and_unsubscribe_while_they_are_told() -> None:
    """A listener that leaves during its own event, or brings another, disturbs no loop over listeners."""
    manager = inline(SimulatedWorld())
    told: list[str] = []

    def once(event: Event) -> None:
        told.append("once")
        leave()
        manager.subscribe(lambda _: told.append("new"), "mode_changed")

    leave = manager.subscribe(once, "mode_changed")
    manager.subscribe(lambda _: told.append("other"), "mode_changed")
    manager.set_execution_mode("recording")
    assert told == ["once", "other"]
    manager.set_execution_mode("idle")
    assert told == ["once", "other", "other", "new"]


def test_a_listener_of_an_inline_manager_may_ask_for_the_next_mode() -> None:
    """Listeners of an inline driver run when the drive is over, so they may drive themselves."""
    manager = inline(SimulatedWorld())

    def on(event: Event) -> None:
        assert isinstance(event, ModeChanged)
        if event.new is ExecutionMode.RECORDING:
            assert manager.set_execution_mode("autopilot").granted

    manager.subscribe(on, ModeChanged)
    manager.set_execution_mode("recording")
    manager.drive_for(0)
    assert manager.get_status().listener_errors == 0
    assert manager.get_status().state is State.AUTOPILOT


def test_a_stuck_listener_cannot_fill_the_memory_or_stop_the_close() -> None:
    """The backlog is bounded: events beyond it are dropped, and the machine does not notice."""
    manager = threaded(SimulatedWorld())
    go, stuck = threading.Event(), threading.Event()

    def hang(event: Event) -> None:
        stuck.set()
        assert go.wait(PATIENCE_S)

    manager.subscribe(hang)
    manager.set_execution_mode("recording", timeout_s=PATIENCE_S)
    assert stuck.wait(PATIENCE_S)
    for _ in range(20_000):
        manager._driver.tell(Event())
    assert manager._driver._events.qsize() <= 10_000
    assert manager.set_execution_mode("idle", timeout_s=PATIENCE_S).granted
    go.set()
    manager.close()


@pytest.mark.parametrize(
    ("change_mib", "events"), [(99.0, 0), (100.0, 1), (150.0, 1)], ids=["just under", "exactly", "over"]
)
def test_resource_changed_is_told_from_the_threshold_on(change_mib: float, events: int) -> None:
    """100 MiB away from the value last told, not from the value last seen; both directions."""
    world = SimulatedWorld()
    manager = inline(world)
    manager.drive_for(1)
    told: list[Event] = []
    manager.subscribe(told.append, ResourceChanged)
    world.card.take("another", change_mib)
    manager.set_execution_mode("idle")
    assert len(told) == events
    world.card.take("another", 1.0)
    manager.set_execution_mode("idle")
    changes = [event for event in told if isinstance(event, ResourceChanged)]
    assert len(changes) == 1
    assert changes[0].told_mib is not None
    assert changes[0].free_mib is not None
    assert changes[0].told_mib - changes[0].free_mib >= 100
    world.card.give_back("another")
    manager.set_execution_mode("idle")
    assert len(told) == 2


def test_degrading_and_recovering_are_told_with_their_reasons() -> None:
    """`degraded` has the reason and the asked mode, `recovered` the mode and how long it took."""
    world = SimulatedWorld()
    world.card.take("a game", 6000)
    manager = inline(world)
    told: list[Event] = []
    manager.subscribe(told.append, Degraded, Recovered)
    manager.set_execution_mode("recording")
    world.card.give_back("a game")
    manager.drive_for(120)
    down, up = told
    assert isinstance(down, Degraded)
    assert isinstance(up, Recovered)
    assert (down.reason.code, down.asked) == ("vram_insufficient", ExecutionMode.RECORDING)
    assert up.mode is ExecutionMode.RECORDING
    assert up.after_s > 0


def test_every_event_is_frozen_and_speaks_json() -> None:
    """Records of a real life: none can be changed, each has its kind and plain values."""
    world = SimulatedWorld()
    manager = inline(world, idle_timeout_s=20)
    told: list[Event] = []
    manager.subscribe(told.append)
    manager.set_execution_mode("recording")
    manager.drive_for(60)
    world.card.take("a game", 7000)
    manager.set_execution_mode("recording")
    world.card.give_back("a game")
    manager.drive_for(120)
    assert {event.kind for event in told} >= {
        "mode_changed", "state_changed", "resource_changed", "idle_unload", "degraded", "recovered",
    }  # fmt: skip
    for event in told:
        assert json.loads(json.dumps(event.to_dict(), allow_nan=False))["kind"] == event.kind
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            event.at = 0.0  # type: ignore[misc]


def test_the_kinds_are_words_of_their_own() -> None:
    """The list of events is complete and no word is used twice."""
    assert {kind.kind for kind in KINDS} == {
        "mode_changed", "state_changed", "resource_changed", "idle_unload", "degraded", "recovered", "vlm_lost",
        "foreign_evicted", "foreign_consumer", "vram_low",
    }  # fmt: skip
    assert len({kind.kind for kind in KINDS}) == len(KINDS)


def test_a_vlm_that_no_mode_promises_any_more_is_unloaded_for_want_of_use() -> None:
    """RECORDING has brought it in, IDLE leaves it where it is: until nobody has used it for `idle_timeout_s`."""
    world = SimulatedWorld()
    manager = inline(world, idle_timeout_s=50)
    told: list[Event] = []
    manager.subscribe(told.append, "idle_unload")
    manager.set_execution_mode("recording")
    manager.set_execution_mode("idle")
    manager.drive_for(40.0)
    assert (world.vlm_resident(), told) == (True, [])
    manager.drive_for(20.0)
    assert (world.vlm_resident(), [event.kind for event in told]) == (False, ["idle_unload"])


def test_a_silent_ollama_is_borne_for_its_time_and_then_told() -> None:
    """Before `unknown_max_s` nothing is lost; after it the mode ends, with the reason."""
    world = SimulatedWorld()
    manager = inline(world)
    told: list[Event] = []
    manager.set_execution_mode("recording")
    manager.subscribe(told.append, Degraded)
    world.faults.arm("ollama.ps", "hang", times=None)
    manager.drive_for(manager.config.unknown_max_s - 1.0)
    assert told == []
    manager.drive_for(1.0 + 3 * manager.config.check_interval_s)
    assert [event.reason.code for event in told if isinstance(event, Degraded)] == ["ollama_unreachable"]


def test_an_hour_of_failing_loads_is_told_as_tries_at_the_longest_pause() -> None:
    """Neither as hundreds of loads nor as a handful: `recover_cap_s` bounds the pause on both sides."""
    world = SimulatedWorld()
    manager = inline(world)
    tries: list[float] = []
    manager.subscribe(lambda event: tries.append(event.at) if event.new is State.LOADING else None, StateChanged)
    world.faults.arm("ollama.load", "http_500", times=None)
    manager.set_execution_mode("recording")
    manager.drive_for(3600.0)
    pauses = [later - earlier for earlier, later in pairwise(tries)]
    cap = manager.config.recover_cap_s
    assert max(pauses) <= cap + 30.0
    assert min(pauses[8:]) >= cap
    assert pauses[0] < pauses[3] < pauses[8]


def test_a_wish_whose_way_back_fails_too_ends_after_few_changes() -> None:
    """Neither the VLM comes in nor CLIP goes up again: an error, DEGRADED, and no more than seven moves."""
    world = SimulatedWorld(card_mib=6400.0)
    manager = inline(world)
    manager.set_execution_mode("autopilot")
    told: list[Event] = []
    manager.subscribe(told.append, StateChanged)
    world.faults.arm("ollama.load", "http_500", times=None)
    world.faults.arm("clip.to_gpu", "oom", times=None)
    with pytest.raises(LoadFailed):
        manager.ensure_vlm_loaded()
    assert manager.get_status().state is State.DEGRADED
    assert len(told) <= 7


def test_a_client_that_undoes_the_mode_again_and_again_is_told() -> None:
    """After `reassert_limit` times, and its VLM is left to it."""
    world = SimulatedWorld()
    manager = inline(world)
    manager.set_execution_mode("autopilot")
    told: list[Event] = []
    manager.subscribe(told.append, Degraded)
    for _ in range(manager.config.reassert_limit + 1):
        assert told == []
        world.ollama.foreign_load(world.vlm.name)
        manager.drive_for(manager.config.check_interval_s + world.vlm.load_s + 1.0)
    assert [event.reason.code for event in told if isinstance(event, Degraded)] == ["external_client"]
    assert world.vlm_resident()


def test_a_neighbour_that_comes_between_two_tries_of_a_load_is_told_as_the_reason() -> None:
    """Another try would land on the CPU, or push the neighbour out: the card is asked before each."""
    world = SimulatedWorld()
    manager = inline(world)
    told: list[Event] = []
    manager.subscribe(told.append, Degraded)
    world.faults.arm("ollama.load", "http_500", times=1)

    def comes(op: str, phase: str) -> None:
        if (op, phase) == ("ollama.load", "after") and "game" not in world.card.owners():
            world.card.take("game", world.card.free_mib - 1000.0)

    world.on_io.append(comes)
    assert not manager.set_execution_mode("recording").granted
    manager.drive_for(0)
    (degraded,) = told
    assert isinstance(degraded, Degraded)
    assert degraded.reason.code == "vram_insufficient"
    assert [entry.op for entry in world.ollama.log].count("ollama.load") == 1
