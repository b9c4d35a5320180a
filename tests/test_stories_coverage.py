"""What the stories left out: a run that never took a row, a rule or a fault has proven less than it says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gpu_fsm.guards import PREDICATES
from gpu_fsm.states import TABLE
from gpu_fsm.status import State
from gpu_fsm.testing.stateful import FAULTS, RULES, GPUStateMachine
from tests.counts import say

TELLERS = ["tests/test_faults.py", "tests/test_invariants.py", "tests/test_stories.py"]


def test_invariants_were_tried_on_every_rule_row_guard_and_fault(request: pytest.FixtureRequest) -> None:
    """Every rule, state and row at least once, every fault fired, every guard both ways."""
    if not GPUStateMachine.executed:
        # Run alone: tell the stories first, in a process that counts from zero.
        command = [sys.executable, "-m", "pytest", "-q", *TELLERS, __file__]
        assert 0 == subprocess.run(command, check=False).returncode
        return
    missing = {
        "rules": [rule for rule in RULES if not GPUStateMachine.executed[rule]],
        "states": [state.name for state in State if state not in GPUStateMachine.states],
        "rows": [row.name for row in TABLE if not GPUStateMachine.rows[row.name]],
        "faults": [fault for fault in FAULTS if not GPUStateMachine.fired[fault]],
        "guards": [
            (guard, verdict)
            for guard in PREDICATES
            for verdict in (True, False)
            if (guard, verdict) not in GPUStateMachine.verdicts
        ],
    }
    totals = {"rules": len(RULES), "states": len(State), "rows": len(TABLE), "faults": len(FAULTS)}
    totals |= {"guards": 2 * len(PREDICATES)}
    covered = ", ".join(f"{total - len(missing[what])}/{total} {what}" for what, total in totals.items())
    say(request.config, f"all stories: {sum(GPUStateMachine.executed.values())} rules executed; {covered} (both ways)")

    assert not any(missing.values()), pytest.fail(f"never taken: {missing}")
