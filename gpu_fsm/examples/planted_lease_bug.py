"""An agent with a planted bug, and the stories that find it.

    gpu-fsm fuzz --machine gpu_fsm.examples.planted_lease_bug:PlantedStories
    gpu-fsm fuzz --machine gpu_fsm.examples.planted_lease_bug:MendedStories

`Labeller` keeps one VLM lease from screen to screen, which is allowed and saves time.  When the VLM is taken away under
its lease (the card was needed, Ollama was stopped) it says "no label" and keeps the dead lease: it never labels a
screen again, however well everything works by then.  No test that takes the agent's usual way sees that.
"""

from __future__ import annotations

import contextlib

from hypothesis.stateful import invariant, precondition, rule

from gpu_fsm.errors import GPUFSMError, LeaseLost
from gpu_fsm.handles import VLM
from gpu_fsm.manager import GPUResourceManager
from gpu_fsm.testing.stateful import GPUStateMachine

NAME = "labeller"


class Labeller:
    """Tells what a screen shows; None where it cannot be told now."""

    def __init__(self, manager: GPUResourceManager) -> None:
        self.manager = manager
        self.lease = contextlib.ExitStack()
        self.vlm: VLM | None = None

    def label(self, screen: str) -> str | None:
        """Ask the VLM, under the lease that is kept."""
        try:
            if self.vlm is None:
                self.vlm = self.lease.enter_context(self.manager.vlm(holder=NAME, timeout_s=60.0))
            return self.vlm.generate(f"what is on {screen}?").text
        except LeaseLost:
            self.forget()
            return None
        except GPUFSMError:
            self.stop()
            return None

    def forget(self) -> None:
        """The VLM was taken away under our lease."""
        # The planted bug: nothing is done, and the dead handle is kept.

    def stop(self) -> None:
        """Give the lease back."""
        self.lease.close()
        self.vlm = None


class Mended(Labeller):
    """The same without the bug."""

    def forget(self) -> None:
        self.stop()


class PlantedStories(GPUStateMachine):
    """Everything that can happen to a manager, and the agent at work in the middle of it."""

    agent_class: type[Labeller] = Labeller

    def agent_starts(self) -> None:
        self.agent = self.agent_class(self.manager)

    def agent_works(self) -> None:
        """The agent may fail to label a screen, but not sit on a lease that is worth nothing."""
        self.agent.label("the screen")
        dead = [lease for lease in self.manager.get_status().leases if lease.holder == NAME and lease.lost]
        assert not dead, f"the agent keeps a lease whose VLM was taken away: {dead}"

    def agent_rests(self) -> None:
        self.agent.stop()

    @rule()
    @precondition(lambda self: self.agent.vlm is not None)
    def agent_stops(self) -> None:
        """The user pauses the agent."""
        self.agent.stop()

    @invariant()
    def agent_never_holds_two_leases(self) -> None:
        """An invariant of one's own, checked after every rule."""
        if hasattr(self, "manager"):
            assert sum(lease.holder == NAME for lease in self.manager.get_status().leases) <= 1


class MendedStories(PlantedStories):
    """The mended agent: no story breaks it."""

    agent_class = Mended


if __name__ == "__main__":
    print(__doc__)
