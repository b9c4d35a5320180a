"""The lint, on machines that are not ours."""

from __future__ import annotations

import doctest
import enum
import sys
from collections.abc import Callable
from typing import Any

import pytest
from attrs import frozen
from transitions import Machine

from gpu_fsm.machine import ModeMachine
from gpu_fsm.states import MOVING, OUTCOMES, STABLE, TABLE
from gpu_fsm.testing import lint
from gpu_fsm.testing.lint import lint_table, machine_rows

pytestmark = pytest.mark.core


class Line:
    """A connection: the model of the machines below."""

    def reachable(self) -> bool:
        """The other side answers."""
        return True

    def tired(self) -> bool:
        """It was tried too often."""
        return False


def connection(change: Callable[[Machine], object] = lambda machine: None, **about: Any) -> Machine:
    """A machine without a defect, and then changed."""
    machine = Machine(
        **{
            "model": Line(),
            "states": ["closed", "opening", "open"],
            "initial": "closed",
            "auto_transitions": False,
            **about,
        }
    )
    machine.add_transition("open_it", "closed", "opening")
    machine.add_transition("ready", "opening", "open", conditions="reachable", unless="tired")
    machine.add_transition("ready", "opening", "closed")
    machine.add_transition("cut", ["opening", "open"], "closed")
    change(machine)
    return machine


def test_a_clean_machine_is_clean() -> None:
    """No finding without a cause, and none of the automatic triggers."""
    assert [] == lint(connection())
    assert [] == lint(connection(auto_transitions=True), required={"opening": ["ready", "cut"]})


def both(*changes: Callable[[Machine], object]) -> Callable[[Machine], object]:
    """One after the other."""

    def change(machine: Machine) -> None:
        for one in changes:
            one(machine)

    return change


DEFECTS: dict[str, tuple[Callable[[Machine], object], str]] = {
    "unreachable": (lambda m: m.add_states("lost"), "lost: cannot be reached from closed"),
    "no way back": (
        both(lambda m: m.add_states("hung"), lambda m: m.add_transition("hang", "open", "hung")),
        "hung: no way home to closed",
    ),
    "in the shadow": (
        lambda m: m.add_transition("cut", "open", "opening", conditions="reachable"),
        "open: cut: open -> opening if reachable can never be taken on cut",
    ),
    "covered by two": (
        both(
            lambda m: m.add_transition("send", "open", "closed", conditions="reachable"),
            lambda m: m.add_transition("send", "open", "opening", unless="reachable"),
            lambda m: m.add_transition("send", "open", None),
        ),
        "open: send: open -> stays can never be taken on send",
    ),
    "both ways at once": (
        lambda m: m.add_transition("wait", "open", None, conditions="reachable", unless="reachable"),
        "open: wait: open -> stays if reachable and not reachable can never be taken on wait",
    ),
    "twice": (
        lambda m: m.add_transition("open_it", "closed", "opening"),
        "open_it: closed -> opening (2): is there twice",
    ),
    "a guard that nobody has": (
        lambda m: m.add_transition("wait", "open", None, conditions="reachabel"),
        "wait: open -> stays if reachabel: there is no reachabel on the model",
    ),
    "a callback that nobody has": (
        lambda m: m.add_transition("wait", "open", None, after="say_so"),
        "wait: open -> stays: there is no say_so on the model",
    ),
    "an entry that nobody has": (
        lambda m: m.get_state("open").on_enter.append("greet"),
        "open: there is no greet on the model",
    ),
    "nowhere": (lambda m: m.add_transition("leap", "open", "shut"), "leap: open -> shut: there is no state shut"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_kind_of_defect_is_found(defect: str) -> None:
    """In these words."""
    change, finding = DEFECTS[defect]

    assert finding in lint(connection(change))


def test_what_a_state_must_take_is_asked_for() -> None:
    """A trigger without a row, and one that finds none when its guards say no."""
    machine = connection(lambda m: m.add_transition("send", "open", None, conditions="reachable"))

    assert [
        "closed: cut has no row",
        "open: every row of send is guarded, also the last (send: open -> stays if reachable)",
    ] == lint(machine, required={"closed": ["cut"], "open": ["send", "cut"]})


def test_a_final_state_needs_no_way_back() -> None:
    """Said to the machine or to the lint."""

    def end(machine: Machine) -> None:
        machine.add_states({"name": "gone", "final": True})
        machine.add_states("burnt")
        machine.add_transition("end", "open", "gone")
        machine.add_transition("burn", "open", "burnt")

    assert ["burnt: no way home to closed"] == lint(connection(end))
    assert [] == lint(connection(end), final=["burnt"])


def test_a_way_past_the_steps_is_found() -> None:
    """Where some states promise something and others do the work for it."""
    machine = connection(lambda m: m.add_transition("leap", "closed", "open"))

    assert ["leap: closed -> open: a shortcut from closed to open; promises are kept by steps"] == [
        finding for finding in lint(machine, stable=["closed", "open"]) if "leap" in finding
    ]


def test_enumerated_states_and_guards_that_are_functions_are_read() -> None:
    """`transitions` allows both."""

    class Light(enum.Enum):
        RED = 1
        GREEN = 2
        OFF = 3

    machine = Machine(states=Light, initial=Light.RED, auto_transitions=False)
    machine.add_transition("go", Light.RED, Light.GREEN, conditions=lambda: True)
    machine.add_transition("halt", Light.GREEN, Light.RED)

    assert ["OFF: cannot be reached from RED", "OFF: no way home to RED"] == lint(machine)


def test_too_many_guards_are_said_to_be_too_many() -> None:
    """Rather than to try a million outcomes, or to be silent."""
    machine = connection(lambda m: m.add_transition("send", "open", None, conditions=[f"g{i}" for i in range(20)]))

    assert any("too many to see" in finding for finding in lint(machine))


def test_our_own_machine_is_as_clean_as_its_table() -> None:
    """What `transitions` was given is what the table says."""

    class Handlers:
        def observe(self, *args: Any) -> Any: ...

        def take(self, *args: Any) -> None: ...

        def announce(self, *args: Any) -> None: ...

        def work(self, *args: Any) -> None: ...

    machine = ModeMachine(Handlers()).wrapped

    assert [] == lint(machine, stable=STABLE, required=dict.fromkeys(MOVING, OUTCOMES))
    assert len(machine_rows(machine)) == sum(len(row.sources) for row in TABLE)


@frozen
class Rule:
    """A row of somebody's table."""

    name: str
    trigger: str
    sources: tuple[str, ...]
    dest: str | None
    guards: tuple[str, ...] = ()


def test_a_table_is_read_like_a_machine() -> None:
    """Rows need no library."""
    rows = [Rule("coin", "coin", ("locked",), "free"), Rule("push", "push", ("free",), "stuck", ("strong",))]

    assert ["stuck: no way home to locked", "free: no way home to locked"] == [
        finding
        for finding in sorted(lint(rows, initial="locked"), reverse=True)
        if "home" in finding and "locked:" not in finding
    ]
    assert lint(rows, initial="locked") == lint_table(rows, initial="locked", stable=(), required={}, guards=["strong"])
    with pytest.raises(TypeError, match="initial"):
        lint(rows)
    with pytest.raises(TypeError, match="not 'object'; of a model, give its machine"):
        lint(object())


def test_the_example_of_the_lint_is_true() -> None:
    """It is what people copy."""
    result = doctest.testmod(sys.modules["gpu_fsm.testing.lint"])

    assert (result.failed, result.attempted > 0) == (0, True)
