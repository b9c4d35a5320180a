"""An agent in one blocking loop: it records three screens, then it recognises them and acts.

    python -m gpu_fsm.examples.blocking_loop --simulated

Ctrl-C ends it cleanly at any moment, in the middle of a load too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gpu_fsm import ExecutionMode
from gpu_fsm.agent import ExecutionLoop, FusionEngine, Screen, Step, UIDetector
from gpu_fsm.examples.worlds import arguments, manager_for, three_screens


def act(screen: Screen, label: str) -> None:
    """What the agent is for: press a button, fill a form."""
    print(f"  acting on {screen.name}, which is: {label}")


def tell(step: Step) -> None:
    """After every screen; `unavailable` is an answer too, and `detail` says why."""
    print(f"  {step.screen}: {step.result} in {step.state.name} {step.detail}")


def main(argv: Sequence[str] = ()) -> int:
    """Run it; returns an exit code."""
    with manager_for(argv) as manager:
        manager.subscribe(lambda event: print(f"  ({event.kind})"), "degraded", "recovered", "idle_unload")
        loop = ExecutionLoop(manager, UIDetector(manager), FusionEngine(), on_action=act, on_step=tell)
        steps: list[Step] = []
        for mode in (ExecutionMode.RECORDING, ExecutionMode.AUTOPILOT):
            print(mode.name)
            steps += loop.run(mode, three_screens())
    return 0 if [step.result for step in steps] == ["recorded"] * 3 + ["recognised"] * 3 else 1


if __name__ == "__main__":
    sys.exit(main(arguments(__doc__)))
