"""What the stories left out: a run that never took a row, a rule or a fault has proven less than it says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gpu_fsm.guards import PREDICATES
from gpu_fsm.states import TABLE
from gpu_fsm.testing.stateful import FAULTS, RULES, GPUStateMachine

TELLERS = ["tests/test_faults.py", "tests/test_invariants.py", "tests/test_stories.py"]


def test_invariants_were_tried_on_every_rule_row_guard_and_fault() -> None:
    """Every rule and row at least once, every fault fired, every guard both ways."""
    if not GPUStateMachine.executed:
        # Run alone: tell the stories first, in a process that counts from zero.
        command = [sys.executable, "-m", "pytest", "-q", *TELLERS, __file__]
        assert 0 == subprocess.run(command, check=False).returncode
        return
    missing = {
        "rules": [rule for rule in RULES if not GPUStateMachine.executed[rule]],
        "rows": [row.name for row in TABLE if not GPUStateMachine.rows[row.name]],
        "faults": [fault for fault in FAULTS if not GPUStateMachine.fired[fault]],
        "guards": [
            (guard, verdict)
            for guard in PREDICATES
            for verdict in (True, False)
            if (guard, verdict) not in GPUStateMachine.verdicts
        ],
    }
    print(
        f"{sum(GPUStateMachine.executed.values())} rules executed, {len(TABLE)} rows, {len(FAULTS)} faults, "
        f"{2 * len(PREDICATES)} guard outcomes"
    )

    assert not any(missing.values()), pytest.fail(f"never taken: {missing}")
