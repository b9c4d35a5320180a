"""Every fault, met on purpose from a place where everything worked: no promise breaks, and all is well afterwards."""

from __future__ import annotations

import pytest

from gpu_fsm.status import ExecutionMode
from gpu_fsm.testing.stateful import FAULTS, GPUStateMachine


def fresh_machine(**changes: object) -> GPUStateMachine:
    """The stateful machine in a quiet 8 GiB world, to be driven by hand."""
    machine = GPUStateMachine()
    world = {
        "gpu": True,
        "clip": True,
        "card_mib": 8192.0,
        "tells_holders": True,
        "version": "0.32.15",
        "on_shortage": "degrade",
        "on_partial_offload": "reload",
        "idle_timeout_s": 120.0,
        "troubles": {"faults"},
    }
    machine.begin(**(world | changes))  # type: ignore[arg-type]
    return machine


def meet(fault: tuple[str, str], *, times: int | None, way: int) -> None:
    """One story: the fault, what it does to the machine, and the way back."""
    machine = fresh_machine()
    try:
        machine.meet_a_fault(fault, times, way, healed=False)
        machine.every_promise_is_kept()
        assert machine.world.faults.fired[fault], f"{fault} was not met this way"
        machine.converge(ExecutionMode.AUTOPILOT if way else ExecutionMode.RECORDING)
        machine.every_promise_is_kept()
    finally:
        machine.teardown()


@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize("times", [1, None], ids=["once", "until-healed"])
@pytest.mark.parametrize("fault", FAULTS, ids="-".join)
def test_invariants_hold_around_every_fault(fault: tuple[str, str], times: int | None, way: int) -> None:
    """Met once or for good, on either way: safe while it lasts, and back within the bound."""
    meet(fault, times=times, way=way)
