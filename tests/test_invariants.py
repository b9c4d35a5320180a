"""S1-S11 and L1-L5: any story, in any order, judged by the world after every step.

`gpu_fsm.testing.oracle` holds the judgements, `gpu_fsm.testing.stateful` the rules.  The stories that chance tells are
here; those that meet every fault, and every rare row, on purpose are in `test_faults.py` and `test_stories.py`; whether
all of it together left anything out is asked in `test_stories_coverage.py`.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from gpu_fsm.testing.stateful import GPUStateMachine
from tests.counts import say

RULES_IN_CI = 30_000
"""Executed rules that a run must reach."""
BATCH = 500
THOROUGH = 20
BRIEF = 0.1


def test_invariants_hold_in_any_story(request: pytest.FixtureRequest) -> None:
    """No story breaks a promise, in at least `RULES_IN_CI` executed rules."""
    profile = settings.get_current_profile_name()
    wanted = int(RULES_IN_CI * {"thorough": THOROUGH, "brief": BRIEF}.get(profile, 1))
    executed = 0
    batch = 0
    while executed < wanted:
        before = sum(GPUStateMachine.executed.values())
        batch += 1
        # A batch is a machine class of its own, so that a derandomized run does not tell the same stories again.
        machine = type(f"Stories{batch}", (GPUStateMachine,), {"__doc__": f"batch {batch}"})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=min(BATCH, (wanted - executed) // 25 + 1),
                stateful_step_count=30,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate, Phase.shrink],
                print_blob=False,
            ),
        )
        executed += sum(GPUStateMachine.executed.values()) - before
        assert executed > 0
    say(request.config, f"random stories: {executed} rules executed in {batch} batches, 0 violations")
