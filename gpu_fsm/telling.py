"""What the agent did and what happened, in one line each."""

from __future__ import annotations

from gpu_fsm.agent import Step
from gpu_fsm.events import Degraded, Event, IdleUnload, Recovered, StateChanged


def told_step(step: Step) -> str:
    """How a screen was handled."""
    score = f" ({step.match.score:.2f})" if step.match is not None else ""
    match step.result:
        case "recorded":
            said = f"labelled by the VLM: {step.label}" + (f" ({step.detail})" if step.detail else "")
        case "kept":
            said = "recorded before"
        case "recognised":
            said = f"recognised{score}: {step.label}"
        case "asked":
            said = f"not recognised{score}; the VLM says: {step.label or step.detail}"
        case "unavailable":
            said = f"the VLM is {step.detail}"
        case _:
            said = f"{step.result}: {step.detail}"
    return f"  {step.screen:22} {said}"


def told_event(event: Event) -> str | None:
    """What happened; None for what a reader of the story can do without."""
    match event:
        case StateChanged():
            return f"    {event.old.name} -> {event.new.name} ({event.trigger})"
        case Degraded():
            return f"    DEGRADED: {event.reason}"
        case Recovered():
            return f"    recovered to {event.mode.name} after {event.after_s:.1f} s"
        case IdleUnload():
            return f"    {event.model} unloaded after {event.idle_s:.1f} s without use"
        case _:
            return None
