"""Two managers in one test, each in a world of its own: no GPU, no Ollama, no waiting, the same result every time.

    python -m gpu_fsm.examples.two_managers

This one is always simulated.  On a real card there is one manager: the second would only look, and say so.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gpu_fsm import ExecutionMode, GPUResourceManager, State
from gpu_fsm.examples.worlds import arguments
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation import SimulatedWorld


def manager_in(world: SimulatedWorld) -> GPUResourceManager:
    """A real manager over the real HTTP client; only what lies behind them is simulated."""
    config = world.config(idle_timeout_s=60.0)
    ollama = OllamaManager(config, clock=world.clock, transport=world.transport)
    return GPUResourceManager(config, **world.ports(ollama), threaded=False)


def test_one_agent_in_need_does_not_touch_the_other() -> None:
    """A game takes one card; that agent degrades and comes back, the other never notices."""
    mine, yours = SimulatedWorld(), SimulatedWorld()
    with manager_in(mine) as my_manager, manager_in(yours) as your_manager:
        for manager in (my_manager, your_manager):
            manager.set_execution_mode(ExecutionMode.AUTOPILOT)
        mine.card.take("game", 4000.0)
        outcome = my_manager.set_execution_mode(ExecutionMode.RECORDING)
        assert not outcome.granted
        assert outcome.reason is not None
        assert outcome.reason.code == "vram_insufficient"
        assert your_manager.set_execution_mode(ExecutionMode.RECORDING).granted
        mine.card.give_back("game")
        my_manager.drive_for(120.0)  # virtual seconds
        assert my_manager.get_status().state is State.RECORDING
        assert yours.vlm_resident()
        your_manager.drive_for(120.0)
        assert not yours.vlm_resident(), "nobody used it for 60 s"
    assert mine.vlm_held_mib() == 0.0


def main(_: Sequence[str] = ()) -> int:
    """Run the test; returns an exit code."""
    print("Simulated: two cards, two Ollamas, two CLIPs, and the time.")
    test_one_agent_in_need_does_not_touch_the_other()
    print("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main(arguments(__doc__)))
