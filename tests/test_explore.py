"""The explorer: on machines that are not ours, and on the manager."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from transitions import Machine, MachineError

import gpu_fsm.testing.explore  # noqa: F401 - the module, whose name the function has taken
from gpu_fsm.cli import ExitCode, main
from gpu_fsm.engine import Engine
from gpu_fsm.guards import PREDICATES
from gpu_fsm.states import TABLE
from gpu_fsm.steps import Steps
from gpu_fsm.testing import Violation, explore, walk
from gpu_fsm.testing.explore import search
from tests.counts import say
from tests.waiting import ROOT


class Turnstile:
    """It counts the coins and gives a passage for each."""

    paid = 0
    refund = False

    def pay(self) -> None:
        """A coin falls."""
        self.paid += 1

    def pass_one(self) -> None:
        """Somebody goes through."""
        self.paid -= 1

    def more(self) -> bool:
        """There are coins left."""
        return self.paid > 1

    def full(self) -> bool:
        """It holds no more than three coins."""
        return self.paid >= 3


def turnstile(*, defect: bool) -> Machine:
    """A turnstile; the defect: whoever pushes when two have paid is let through and the second one is shut out."""
    machine = Machine(Turnstile(), states=["locked", "free"], initial="locked", auto_transitions=False)
    machine.add_transition("coin", "locked", "free", after="pay")
    machine.add_transition("coin", "free", None, conditions="full")
    machine.add_transition("coin", "free", None, after="pay")
    if not defect:
        machine.add_transition("push", "free", None, conditions="more", after="pass_one")
    machine.add_transition("push", "free", "locked", after="pass_one")
    return machine


ACTIONS: dict[str, Callable[[Any], object]] = {"coin": lambda it: it.coin(), "push": lambda it: it.push()}


def walk_turnstile(*, defect: bool, **about: Any) -> Any:
    """Coins and pushes in any order."""
    return explore(
        lambda: turnstile(defect=defect),
        ACTIONS,
        abstraction=lambda it: it.paid,
        invariants={"who has paid goes through": lambda it: it.state == "free" or it.paid == 0},
        refusals=(MachineError,),
        **about,
    )


def test_a_planted_defect_is_found_with_its_shortest_story() -> None:
    """Two coins and a push; nothing shorter does it."""
    found = walk_turnstile(defect=True)

    assert found.violations[0] == Violation("who has paid goes through", ("coin", "coin", "push"))
    assert str(found.violations[0]) == "who has paid goes through: coin, coin, push"


def test_without_the_defect_everything_is_walked_and_nothing_found() -> None:
    """The whole graph: locked, and free with one to three coins; every transition taken."""
    found = walk_turnstile(defect=False)

    assert [("locked", 0), ("free", 1), ("free", 2), ("free", 3)] == list(found.configurations)
    assert ("coin", "coin", "coin") == found.configurations["free", 3]
    assert (found.violations, found.closed, found.depth, len(found.edges)) == ([], True, 3, 8)
    assert (("free", 1), "push", ("locked", 0)) in found.edges
    assert ((), ()) == (found.unreached_states, found.unreached_transitions)


def test_what_is_never_used_is_named() -> None:
    """A state and transitions that only another action would reach."""
    found = explore(
        lambda: turnstile(defect=False),
        {"coin": ACTIONS["coin"]},
        abstraction=lambda it: it.paid,
        refusals=(MachineError,),
    )

    assert ("push: free -> stays if more", "push: free -> locked") == found.unreached_transitions
    assert {"coin: locked -> free", "coin: free -> stays if full", "coin: free -> stays"} == set(found.stories)


def test_without_actions_every_outcome_of_the_guards_is_tried() -> None:
    """The guards are not asked: what a state can lead to, whatever the data."""
    found = explore(lambda: turnstile(defect=False))

    assert {"locked": (), "free": ("coin",)} == found.configurations
    assert ("free", "push if more", "free") in found.edges
    assert ("free", "push if not more", "locked") in found.edges
    assert () == found.unreached_transitions


def test_a_transition_that_no_outcome_can_take_is_unreached() -> None:
    """An earlier one always wins."""

    def made() -> Machine:
        machine = turnstile(defect=False)
        machine.add_transition("push", "free", "locked", conditions="more")
        machine.add_states("broken")
        return machine

    found = explore(made)

    assert ("push: free -> locked if more",) == found.unreached_transitions
    assert ("broken",) == found.unreached_states


def test_what_must_stay_possible_is_tried_everywhere() -> None:
    """An experiment in each configuration, which does not change the walk."""
    found = walk_turnstile(defect=False, promises={"can be emptied": lambda it: it.paid < 3})

    assert [Violation("can be emptied", ("coin", "coin", "coin"))] == found.violations
    assert 4 == len(found.configurations)


def test_an_exception_is_a_violation_unless_it_is_expected() -> None:
    """A trigger that a state does not take raises `MachineError`."""
    found = explore(lambda: turnstile(defect=False), ACTIONS, abstraction=lambda it: it.paid)

    assert ("exception", ("push",)) == (found.violations[0].rule, found.violations[0].story)
    assert "push" in found.violations[0].detail


def test_a_walk_that_was_cut_short_says_so() -> None:
    """By the number of edges, of violations, or by time."""
    assert not walk_turnstile(defect=False, most_edges=3).closed
    assert not walk_turnstile(defect=False, seconds=0.0).closed
    assert walk_turnstile(defect=False, most_edges=8).closed


def test_a_subject_that_does_not_repeat_itself_is_found_out() -> None:
    """The walk stands on stories that lead to the same place twice."""
    built = iter(range(1000))

    found = search(
        lambda: [next(built)],
        lambda it: {"go": lambda it: it.append(1)},
        abstraction=lambda it: (it[0] > 2, len(it) > 1),
    )

    assert "replay" in {violation.rule for violation in found.violations}


def test_the_example_of_the_explorer_is_true() -> None:
    """It is what people copy."""
    result = doctest.testmod(sys.modules["gpu_fsm.testing.explore"])

    assert (result.failed, result.attempted > 0) == (0, True)


# --- the manager ---


def test_the_manager_keeps_its_promises_in_every_configuration(request: pytest.FixtureRequest) -> None:
    """All of them, all rows, all outcomes of guards; what cannot be taken is named with its reason."""
    brief = settings.get_current_profile_name() == "brief"
    command = [sys.executable, "-W", "error", "-m", "gpu_fsm", "explore", "--json"]
    done = subprocess.run(
        [*command, *(["--seconds", "10"] if brief else [])], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    say(
        request.config,
        f"explorer: {told['configurations']} configurations, {told['edges']} edges, depth {told['depth']}, "
        f"{told['rows_taken']} of {told['rows_total']} rows, {told['violations']} violations in {told['seconds']} s",
    )

    assert ([], 0, "", 0) == (told["broken"], told["violations"], done.stderr, done.returncode)
    if brief:
        return
    assert told["closed"]
    assert told["configurations"] >= 90
    assert ([], []) == (told["missing"], told["stale"])
    assert len(told["defensive"]) <= 10
    assert told["rows_total"] == len(TABLE)
    assert told["rows_taken"] == len(TABLE) - sum(row.name in told["defensive"] for row in TABLE)


def until_broken(**about: Any) -> Any:
    """The roomy world alone, until the first violation."""
    return walk.explore_manager(walk.Bounds(faults=0), profiles=walk.PROFILES[1:], most_violations=1, **about)


def test_the_walk_is_the_same_every_time() -> None:
    """Else a story would not lead where it led."""
    first, second = until_broken(), until_broken()

    assert first.configurations == second.configurations
    assert first.stories == second.stories
    assert (first.edges, first.closed, first.violations) == (second.edges, True, [])


def _never(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PREDICATES, name, lambda s: False)


def _forget_the_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "_resolve_granted", lambda self: None)


def test_a_shedding_that_leaves_something_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it says so: nothing stood in its way."""
    monkeypatch.setattr(Steps, "_shed_clip", lambda self, deadline: None)

    found = walk.explore_manager(profiles=walk.PROFILES[:1], most_violations=1)

    assert "CLIP was left on the GPU" in found.violations[0].detail


BROKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "refuses everything": lambda monkeypatch: _never("admissible", monkeypatch),
    "believes that nothing fits": lambda monkeypatch: _never("fits", monkeypatch),
    "never sees that it is placed": lambda monkeypatch: _never("placed", monkeypatch),
    "never recovers": lambda monkeypatch: _never("recoverable", monkeypatch),
    "forgets tickets": _forget_the_ticket,
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_manager_is_found_out(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is safe because it always degrades."""
    BROKEN[broken](monkeypatch)

    assert until_broken().violations


def test_a_violation_is_exit_code_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the story on stdout."""
    _never("fits", monkeypatch)
    monkeypatch.setattr(walk, "PROFILES", walk.PROFILES[1:])

    assert main(["explore", "--faults", "0"]) == ExitCode.FAILED
    assert "VIOLATION" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--queue", "0"], ["--faults", "-1"], ["--seconds", "0"], ["--seconds", "soon"]])
def test_bounds_that_make_no_sense_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line."""
    assert main(["explore", *argv]) == ExitCode.USAGE
    assert argv[0] in capsys.readouterr().err


def test_what_was_not_met_needs_a_tag_and_a_tag_needs_a_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reason must not outlive what it explains."""
    monkeypatch.setattr(walk, "DEFENSIVE", {"request": "said to be impossible", "shed": "never", "no such row": "old"})
    walked = walk.Walked({}, 0, 0, True, [], {"request": ("ask RECORDING",)}, 0.0)

    assert ["request", "no such row"] == walked.stale
    assert "load" in walked.missing
    assert not {"request", "shed"} & set(walked.missing)
