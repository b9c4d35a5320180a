"""The kit for those who embed the manager: a world for their tests, stories, and a fuzzer.

`simulated_world`, `assert_invariants`, `Oracle`, `lint` and `explore` need the package alone; `GPUStateMachine` and the
modules `strategies` and `fuzz` need Hypothesis, the extra `testing`.  What is heavy is imported when it is first used.
With pytest, `simulated_world` is also a fixture (`plugin.py`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# At once, before their modules of the same names could take these names: they are light.
from gpu_fsm.testing.explore import Exploration, Violation, explore
from gpu_fsm.testing.lint import lint

if TYPE_CHECKING:
    from gpu_fsm.testing.oracle import Oracle
    from gpu_fsm.testing.simulated import Simulation, assert_invariants, simulated_world
    from gpu_fsm.testing.stateful import GPUStateMachine

_HOMES = {
    "GPUStateMachine": "stateful",
    "Oracle": "oracle",
    "Simulation": "simulated",
    "assert_invariants": "simulated",
    "simulated_world": "simulated",
}

__all__ = [
    "Exploration",
    "GPUStateMachine",
    "Oracle",
    "Simulation",
    "Violation",
    "assert_invariants",
    "explore",
    "lint",
    "simulated_world",
]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for something that is there

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        except ModuleNotFoundError as error:
            if error.name != "hypothesis":
                raise
            raise ModuleNotFoundError(
                f"{name} needs Hypothesis. Run: pip install 'gpu-fsm[testing]'", name="hypothesis"
            ) from None
