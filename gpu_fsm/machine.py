"""The table, running: the only file that knows `transitions`.

A flat machine, queued, with plain Enum states and no automatic transitions; one writer drives it.  The machine itself
does nothing but this: take one snapshot for an event, ask the rows' guards about it, tell the handlers which row is
taken, change the state, publish it, and only then let the new state work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from transitions import EventData, Machine

from gpu_fsm.guards import PREDICATES, Snapshot
from gpu_fsm.states import TABLE, Row
from gpu_fsm.status import State


class Handlers(Protocol):
    """What the machine asks of the engine; the order of the methods is the order of the calls."""

    def observe(self, trigger: str, facts: Mapping[str, Any]) -> Snapshot:
        """Take the one snapshot of this event."""

    def take(self, row: Row, snapshot: Snapshot, verdicts: Mapping[str, bool]) -> None:
        """A row is enabled: write the journal, run its action.  The state has not changed yet."""

    def announce(self, old: State, new: State, row: Row) -> None:
        """The state has changed: publish it before anything else happens."""

    def work(self, state: State) -> None:
        """Do what the state is for.  Never raises an `Exception`."""


class _Model:
    """What `transitions` decorates; nothing else lives here, so no trigger can collide with a name of ours."""

    state: State


class ModeMachine:
    """One running table."""

    def __init__(self, handlers: Handlers, *, initial: State = State.IDLE) -> None:
        self._handlers = handlers
        self._snapshot = Snapshot()
        self._verdicts: dict[str, bool] = {}
        self._row: Row | None = None
        self._model = _Model()
        self._machine = Machine(
            model=self._model,
            states=[{"name": state, "on_enter": [self._announce, self._work]} for state in State],
            transitions=[self._definition(row) for row in TABLE],
            initial=initial,
            prepare_event=self._observe,
            queued=True,
            send_event=True,
            auto_transitions=False,
        )

    @property
    def state(self) -> State:
        """The current state."""
        return self._model.state

    @property
    def wrapped(self) -> Machine:
        """The `transitions` machine itself, for drawing it."""
        return self._machine

    def fire(self, trigger: str, **facts: Any) -> Row | None:
        """Deliver an event and all that its steps raise; returns the last row taken, None if the first took none."""
        self._row = None
        self._machine.events[trigger].trigger(self._model, **facts)
        return self._row

    def raise_event(self, trigger: str) -> None:
        """From inside a step: enqueue the step's outcome behind the running event."""
        self._machine.events[trigger].trigger(self._model)

    def force(self, state: State) -> None:
        """Put the machine into a state without an event, for a test of the table; publishes nothing."""
        self._model.state = state

    # --- callbacks of transitions ---

    def _definition(self, row: Row) -> dict[str, Any]:
        return {
            "trigger": row.trigger,
            "source": list(row.sources),
            "dest": row.dest,
            "conditions": [self._guard(name) for name in row.guards if not name.startswith("!")],
            "unless": [self._guard(name[1:]) for name in row.guards if name.startswith("!")],
            "before": self._taker(row),
        }

    def _guard(self, name: str) -> Callable[[EventData], bool]:
        predicate = PREDICATES[name]

        def guard(event: EventData) -> bool:
            verdict = predicate(self._snapshot)
            if verdict is not True and verdict is not False:
                raise TypeError(f"guard {name} returned {verdict!r}, not a bool")
            self._verdicts[name] = verdict
            return verdict

        guard.__name__ = name
        return guard

    def _taker(self, row: Row) -> Callable[[EventData], None]:
        def take(event: EventData) -> None:
            self._row = row
            self._handlers.take(row, self._snapshot, dict(self._verdicts))

        take.__name__ = row.action
        return take

    def _observe(self, event: EventData) -> None:
        self._verdicts = {}
        self._snapshot = self._handlers.observe(event.event.name, event.kwargs)

    def _announce(self, event: EventData) -> None:
        assert event.transition is not None
        assert self._row is not None
        self._handlers.announce(_state(event.transition.source), self.state, self._row)

    def _work(self, event: EventData) -> None:
        self._handlers.work(self.state)


def _state(name: str) -> State:
    # transitions keeps a row's source by the state's name, whatever was given.
    return State[name] if name in State.__members__ else State(name)
