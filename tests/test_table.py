"""The table itself: checked before anything runs."""

from __future__ import annotations

import inspect
import itertools
import typing

import pytest
from attrs import evolve

from gpu_fsm import guards, states
from gpu_fsm.engine import Engine
from gpu_fsm.guards import PREDICATES, Aim, Observation, Plan, Snapshot
from gpu_fsm.machine import ModeMachine
from gpu_fsm.states import EXTERNAL, MOVING, OUTCOMES, PROMISES, STABLE, STANDING, STEPS, TABLE, Row
from gpu_fsm.status import Answer, ClipPlace, ExecutionMode, Hold, LoadedModel, Residency, State, VRAMInfo
from gpu_fsm.testing.lint import lint_table

pytestmark = pytest.mark.core

REQUIRED: dict[State, tuple[str, ...]] = {
    **dict.fromkeys(STABLE, EXTERNAL),
    **dict.fromkeys(MOVING, OUTCOMES),
    State.SHEDDING: ("shed",),
}


def _lint(rows: tuple[Row, ...]) -> list[str]:
    return lint_table(rows, initial=State.IDLE, stable=STABLE, required=REQUIRED, guards=PREDICATES)


def test_the_table_is_clean() -> None:
    """Reachable, a way home from everywhere, total, every row takable, no stable-to-stable shortcut."""
    assert [] == _lint(TABLE)


def test_degraded_is_entered_only_through_shedding() -> None:
    """S9: the way down is always the safe one."""
    assert {State.SHEDDING} == {source for row in TABLE if row.dest is State.DEGRADED for source in row.sources}


def test_external_events_have_no_row_in_a_step() -> None:
    """A step is never interrupted by an event: what comes from outside stays in the mailbox."""
    inside = {row.trigger for row in TABLE for source in row.sources if source in STEPS}

    assert {*OUTCOMES, "shed"} == inside


def test_every_state_has_a_promise() -> None:
    """A state's name is a promise about the world."""
    assert set(State) == set(PROMISES)
    assert {*STABLE, *STEPS} == set(State)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_action_exists_with_the_right_signature(row: Row) -> None:
    """Callbacks are found by name, so a typo must not wait for its first use."""
    action = getattr(Engine, f"act_{row.action}")
    hints = typing.get_type_hints(action)

    assert ["self", "s"] == list(inspect.signature(action).parameters)
    assert hints == {"s": Snapshot, "return": type(None)}


def test_every_action_is_used() -> None:
    """What no row needs does not stay."""
    actions = {name.removeprefix("act_") for name in vars(Engine) if name.startswith("act_")}

    assert {row.action for row in TABLE} == actions


@pytest.mark.parametrize("name", sorted(PREDICATES))
def test_every_guard_is_a_pure_predicate(name: str) -> None:
    """`Snapshot -> bool`, and the same answer twice."""
    predicate = PREDICATES[name]

    assert {"s": Snapshot, "return": bool} == typing.get_type_hints(predicate)
    assert predicate(Snapshot()) is predicate(Snapshot())


def _without(name: str) -> tuple[Row, ...]:
    return tuple(row for row in TABLE if row.name != name)


def _changed(name: str, **changes: object) -> tuple[Row, ...]:
    return tuple(evolve(row, **changes) if row.name == name else row for row in TABLE)


BROKEN: dict[str, tuple[Row, ...]] = {
    "the last row of request": _without("request-degrades"),
    "the last row of renew": _changed("renew-dropped", guards=("placed",)),
    "a shortcut": _changed("request-already", dest=State.RECORDING),
    "a typo": _changed("load", guards=("lacks_vlmm",)),
    "two of one name": (*TABLE, TABLE[0]),
    "no way home": tuple(
        evolve(row, dest=State.DEGRADED) if row.dest in STANDING else row for row in _without("recover") if row.name
    ),
    "a row in the shadow": (TABLE[0], evolve(TABLE[0], guards=(), name="shadow"), *TABLE[1:]),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_lint_bites(broken: str) -> None:
    """Each kind of defect is found, or the lint would be an ornament."""
    assert _lint(BROKEN[broken])


class Handlers:
    """An engine that sees what it is told and does nothing."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()

    def observe(self, trigger: str, facts: object) -> Snapshot:
        return self.snapshot

    def take(self, *args: object) -> None: ...

    def announce(self, *args: object) -> None: ...

    def work(self, state: State) -> None: ...


def test_a_guard_that_answers_no_bool_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`None` and `'yes'` would open or shut a door by accident."""
    monkeypatch.setitem(PREDICATES, "asks_current", lambda s: "yes")

    with pytest.raises(TypeError, match="asks_current"):
        ModeMachine(Handlers()).fire("request")


VLM = LoadedModel(name="vlm", size_mib=5000.0, size_vram_mib=5000.0)
IN, OUT = Residency(answer=Answer.YES, ours=VLM), Residency(answer=Answer.NO)
IN_PART = evolve(IN, ours=evolve(VLM, size_vram_mib=2500.0))
ON_CARD = VRAMInfo(total_mib=16384.0, free_mib=10000.0, scope="card", present=True)
CLIP_PLANS: tuple[ClipPlace | None, ...] = (None, "cpu", "gpu")
CLIP_PLACES: tuple[ClipPlace, ...] = ("cpu", "gpu", "none")


@pytest.mark.parametrize("state", [State.RELEASING, State.MIGRATING])
@pytest.mark.parametrize("residency", [IN, IN_PART, OUT, Residency()], ids=["in", "in part", "out", "unknown"])
def test_nothing_goes_onto_the_card_before_what_has_to_leave_has_left(state: State, residency: Residency) -> None:
    """CLIP first, then the VLM, and neither while nobody can tell; that there would be room for more is no reason."""
    handlers = Handlers()
    machine = ModeMachine(handlers)
    for clip, vlm, place in itertools.product(CLIP_PLANS, (None, False, True), CLIP_PLACES):
        aim = Aim(mode=ExecutionMode.AUTOPILOT, plan=Plan(clip=clip, vlm=vlm))
        handlers.snapshot = Snapshot(
            trigger="step_done", state=state, aim=aim, seen=Observation(residency=residency, clip=place, vram=ON_CARD)
        )
        machine.force(state)
        machine.fire("step_done")
        left_over = (clip == "cpu" and place == "gpu") or (vlm is False and residency is IN)
        left_over = left_over or (residency is IN_PART and vlm is not None)
        blind = residency.answer is Answer.UNKNOWN and vlm is not None
        clip_lacks, vlm_lacks = clip == "gpu" and place == "cpu", vlm is True and residency is OUT
        free_to_go = not left_over and not blind

        assert (machine.state is State.MIGRATING) is (free_to_go and clip_lacks and state is State.RELEASING)
        assert (machine.state is State.LOADING) is (free_to_go and vlm_lacks and not clip_lacks)


def _held(seen: Observation, **facts: bool) -> Snapshot:
    aim = Aim(mode=ExecutionMode.IDLE, hold=Hold.WANTED, plan=Plan(clip="cpu", vlm=True))
    return Snapshot(trigger="check", hold=Hold.WANTED, aim=aim, seen=seen, **facts)


CHECKED_IN_IDLE: dict[str, tuple[Snapshot, State]] = {
    "nothing held, nobody can tell": (Snapshot(unknown_too_long=True), State.IDLE),
    "nothing held, the VLM has gone": (Snapshot(seen=Observation(residency=OUT)), State.IDLE),
    "nothing held, the card has gone": (Snapshot(seen=Observation(vram=VRAMInfo(lost=True))), State.IDLE),
    "held and there": (_held(Observation(residency=IN, clip="cpu", vram=ON_CARD)), State.IDLE),
    "held and gone": (_held(Observation(residency=OUT, clip="cpu", vram=ON_CARD)), State.RELEASING),
    "held, nobody can tell yet": (_held(Observation(vram=ON_CARD)), State.IDLE),
    "held, nobody can tell for long": (_held(Observation(vram=ON_CARD), unknown_too_long=True), State.SHEDDING),
    "held, the card has gone": (_held(Observation(residency=IN, vram=VRAMInfo(lost=True))), State.SHEDDING),
}


@pytest.mark.parametrize("case", CHECKED_IN_IDLE)
def test_in_idle_a_check_minds_what_is_held_and_nothing_else(case: str) -> None:
    """IDLE promises nothing; a VLM that was asked for in it is a promise."""
    handlers = Handlers()
    machine = ModeMachine(handlers)
    handlers.snapshot, leads_to = CHECKED_IN_IDLE[case]
    machine.fire("check")

    assert machine.state is leads_to


@pytest.mark.parametrize("state", STANDING, ids=lambda state: state.value)
@pytest.mark.parametrize("vlm", [True, False, None])
def test_only_who_promises_something_of_the_vlm_minds_that_ollama_is_silent(state: State, vlm: bool | None) -> None:
    """A mode whose idle unload Ollama does not carry out has let go of it, and stands for as long as it takes."""
    handlers = Handlers()
    machine = ModeMachine(handlers, initial=state)
    aim = Aim(mode=ExecutionMode(state.value), hold=Hold.WANTED, plan=Plan(clip="cpu", vlm=vlm))
    seen = Observation(clip="cpu", vram=ON_CARD)
    handlers.snapshot = Snapshot(state=state, hold=Hold.WANTED, aim=aim, seen=seen, unknown_too_long=True)
    machine.fire("check")

    assert machine.state is (state if vlm is None else State.SHEDDING)


def test_the_states_file_decides_alone() -> None:
    """No other file of the package names a row's destination."""
    assert states.TABLE is TABLE
    assert all(guard.removeprefix("!") in guards.PREDICATES for row in TABLE for guard in row.guards)
