"""The pytest plugin: a fixture `simulated_world`.  Imports nothing of the kit until a test asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gpu_fsm.testing.simulated import Simulation


@pytest.fixture(name="simulated_world")
def _simulated_world() -> Iterator[Callable[..., Simulation]]:
    """Make simulated worlds: `sim = simulated_world(card_mib=6400.0, idle_timeout_s=60.0)`.

    Each is closed and judged after the test; a promise that the manager broke is an error of the test.
    """
    from gpu_fsm.testing.simulated import close_simulation, open_simulation

    with contextlib.ExitStack() as stack:

        def make(**settings: Any) -> Simulation:
            simulation = open_simulation(**settings)
            stack.callback(close_simulation, simulation)
            return simulation

        yield make
