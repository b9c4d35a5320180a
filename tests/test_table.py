"""The table itself: checked before anything runs."""

from __future__ import annotations

import inspect
import typing

import pytest
from attrs import evolve

from gpu_fsm import guards, states
from gpu_fsm.engine import Engine
from gpu_fsm.guards import PREDICATES, Snapshot
from gpu_fsm.machine import ModeMachine
from gpu_fsm.states import EXTERNAL, MOVING, OUTCOMES, PROMISES, STABLE, STANDING, STEPS, TABLE, Row
from gpu_fsm.status import State
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


def test_a_guard_that_answers_no_bool_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`None` and `'yes'` would open or shut a door by accident."""

    class Handlers:
        def observe(self, trigger: str, facts: object) -> Snapshot:
            return Snapshot()

        def take(self, *args: object) -> None: ...

        def announce(self, *args: object) -> None: ...

        def work(self, state: State) -> None: ...

    monkeypatch.setitem(PREDICATES, "asks_current", lambda s: "yes")

    with pytest.raises(TypeError, match="asks_current"):
        ModeMachine(Handlers()).fire("request")


def test_the_states_file_decides_alone() -> None:
    """No other file of the package names a row's destination."""
    assert states.TABLE is TABLE
    assert all(guard.removeprefix("!") in guards.PREDICATES for row in TABLE for guard in row.guards)
