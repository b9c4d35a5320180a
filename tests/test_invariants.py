"""S1-S11 and L1-L5: any story, in any order, judged after every step."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from gpu_fsm.testing.stateful import GPUStateMachine


def test_invariants_hold_in_any_story() -> None:
    """No story breaks a promise."""
    run_state_machine_as_test(
        GPUStateMachine,
        settings=settings(
            max_examples=200, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    print(sum(GPUStateMachine.executed.values()), "rules")
