"""Walk everything that a machine can become, breadth first, and tell the shortest story to all that is found there.

`search` is the walk, over anything that can be built anew and acted upon.  `explore` is the same for a machine of the
library `transitions`, whatever it is for; `walk.py` is the same for the manager of this package.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from attrs import define, field, frozen

from gpu_fsm.testing.lint import MachineRow, cells, machine_rows, machine_states, openings

S = TypeVar("S")
C = TypeVar("C", bound=Hashable)

Story = tuple[str, ...]
"""Names of actions, from the beginning."""


@frozen
class Violation:
    """A rule that was broken, and the shortest way to break it."""

    rule: str
    story: Story
    detail: str = ""

    def __str__(self) -> str:
        told = ", ".join(self.story) or "nothing has happened yet"
        return f"{self.rule}: {told}" + (f": {self.detail}" if self.detail else "")


@define
class Exploration(Generic[C]):
    """The graph, and what was wrong on the way."""

    configurations: dict[C, Story] = field(factory=dict)
    """Every configuration with the shortest story to it, in the order of finding."""
    edges: list[tuple[C, str, C]] = field(factory=list)
    """(from, action, to), each executed."""
    stories: dict[str, Story] = field(factory=dict)
    """What was met on the way (transitions, rows, ...), each with the shortest story that ends with it."""
    violations: list[Violation] = field(factory=list)
    closed: bool = False
    """Nothing was left to try: every action of every configuration was executed."""
    searched: int = 0
    """Every story of at most so many actions that leads through configurations by their shortest way was told."""
    unreached_states: tuple[str, ...] = ()
    unreached_transitions: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """The length of the longest shortest story to a configuration."""
        return max(map(len, self.configurations.values()), default=0)


Actions = Mapping[str, Callable[[S], object]]
Progress = Callable[[Exploration[C], int], None]
"""Called after each configuration with what is known so far and how many configurations wait."""


def search(
    make: Callable[[], S],
    actions: Callable[[S], Actions[S]],
    *,
    abstraction: Callable[[S], C],
    invariants: Mapping[str, Callable[[S], object]] | None = None,
    promises: Mapping[str, Callable[[S], object]] | None = None,
    met: Callable[[S], Iterable[str]] = lambda subject: (),
    more: Callable[[S], Actions[S]] | None = None,
    discard: Callable[[S], None] = lambda subject: None,
    refusals: tuple[type[Exception], ...] = (),
    most_edges: int = 100_000,
    most_violations: int = 10,
    seconds: float | None = None,
    progress: Progress[C] | None = None,
) -> Exploration[C]:
    """Execute every action in every configuration, each time on a subject that was led there anew.

    `make` builds a subject; `actions` says what can be done with one as it stands, by name; `abstraction` says what of
    it counts: two subjects with equal values are one configuration.  `invariants` must hold after every action;
    `promises` are experiments, made in each configuration on a subject of their own, for what must stay possible from
    everywhere.  Both fail by returning False or raising AssertionError.  `met` names what the last action went through.
    `more` looks at a subject after an action and names further actions for the configuration that it came from; one
    that was named before is not executed again.
    `discard` is told each subject that has served.  An exception in `refusals` is an answer like any other; every other
    exception is a violation.

    Where a rule is broken the walk does not go on behind it.  It stops at `most_edges`, `most_violations` or after so
    many real `seconds`, and is not `closed` then.
    """
    walk = _Walk(make, abstraction, refusals, dict(invariants or {}))
    result: Exploration[C] = Exploration()
    deadline = None if seconds is None else time.monotonic() + seconds
    start, broken = walk.arrive(walk.make(), ())
    complete = not broken
    result.configurations[start] = ()
    result.violations += broken
    todo: deque[tuple[C, _Path[S]]] = deque([] if broken else [(start, ())])
    while todo:
        here, path = todo.popleft()
        result.searched = len(path)
        names = tuple(name for name, _ in path)
        subject = walk.lead(path)
        if abstraction(subject) != here:
            result.violations.append(Violation("replay", names, f"led to {abstraction(subject)} and not to {here}"))
            complete = False
            continue
        offered = dict(actions(subject))
        pending = deque(offered.items())
        discard(subject)
        for name, promise in (promises or {}).items():
            subject = walk.lead(path)
            result.violations += _judge(name, promise, subject, names)
            discard(subject)
        while pending:
            late = deadline is not None and time.monotonic() >= deadline
            if late or len(result.edges) >= most_edges or len(result.violations) >= most_violations:
                return result
            name, action = pending.popleft()
            subject = walk.lead(path)
            story = (*names, name)
            broken = walk.act(subject, action, story)
            there, also = walk.arrive(subject, story)
            result.violations += (*broken, *also)
            result.edges.append((here, name, there))
            for label in met(subject):
                result.stories.setdefault(label, story)
            if more is not None:
                further = {name: action for name, action in more(subject).items() if name not in offered}
                offered |= further
                pending.extend(further.items())
            discard(subject)
            if there not in result.configurations:
                result.configurations[there] = story
                if broken or also:
                    complete = False
                else:
                    todo.append((there, (*path, (name, action))))
        if progress is not None:
            progress(result, len(todo))
    result.closed = complete
    return result


_Path = tuple[tuple[str, Callable[[S], object]], ...]


@frozen
class _Walk(Generic[S, C]):
    make: Callable[[], S]
    abstraction: Callable[[S], C]
    refusals: tuple[type[Exception], ...]
    invariants: dict[str, Callable[[S], object]]

    def lead(self, path: _Path[S]) -> S:
        """Build a subject and tell it the story again."""
        subject = self.make()
        for _, action in path:
            try:
                action(subject)
            except self.refusals:
                continue
        return subject

    def act(self, subject: S, action: Callable[[S], object], story: Story) -> list[Violation]:
        try:
            action(subject)
        except self.refusals:
            return []
        except AssertionError as error:
            return [Violation("assertion", story, str(error))]
        except Exception as error:
            return [Violation("exception", story, repr(error))]
        return []

    def arrive(self, subject: S, story: Story) -> tuple[C, list[Violation]]:
        broken = [v for name, rule in self.invariants.items() for v in _judge(name, rule, subject, story)]
        return self.abstraction(subject), broken


def _judge(name: str, rule: Callable[[S], object], subject: S, story: Story) -> list[Violation]:
    try:
        return [Violation(name, story)] if rule(subject) is False else []
    except AssertionError as error:
        return [Violation(name, story, str(error))]
    except Exception as error:
        return [Violation(name, story, repr(error))]


# --- any machine of the library `transitions` ---


def explore(
    make: Callable[[], Any],
    actions: Mapping[str, Callable[[Any], object]] | None = None,
    *,
    abstraction: Callable[[Any], Hashable] | None = None,
    invariants: Mapping[str, Callable[[Any], object]] | None = None,
    promises: Mapping[str, Callable[[Any], object]] | None = None,
    refusals: tuple[type[Exception], ...] = (),
    most_edges: int = 100_000,
    seconds: float | None = None,
) -> Exploration[Any]:
    """Walk a flat machine of `transitions` (not an asynchronous or nested one): what can it become, what is never used?

    `make` builds the `Machine`; all other callables are given its first model.  `actions` are what the world can do to
    the model, by name.  Without them every trigger is fired in every state with every outcome of its guards that makes
    a difference; the guards themselves are not asked.  `abstraction` says what of the model counts besides its state;
    the rest is as for `search`, with `refusals` for the `MachineError` of a trigger that a state does not take.

    The result also names the states and transitions that were never reached.

    >>> from transitions import Machine
    >>> class Door:
    ...     tries = 0
    ...     def right_pin(self, pin=None):
    ...         return pin == "1234"
    ...     def too_often(self, pin=None):
    ...         return self.tries >= 2
    ...     def count(self, pin=None):
    ...         self.tries += 1
    >>> def make():
    ...     machine = Machine(Door(), states=["locked", "open", "blocked"], initial="locked", auto_transitions=False)
    ...     machine.add_transition("enter", "locked", "open", conditions="right_pin")
    ...     machine.add_transition("enter", "locked", "blocked", conditions="too_often")
    ...     machine.add_transition("enter", "locked", None, after="count")
    ...     machine.add_transition("shut", "open", "locked")
    ...     return machine
    >>> found = explore(
    ...     make,
    ...     {"the PIN": lambda door: door.enter("1234"), "a guess": lambda door: door.enter("0"),
    ...      "a push": lambda door: door.shut()},
    ...     abstraction=lambda door: door.tries,
    ...     promises={"can be opened": lambda door: door.state == "open" or door.enter("1234")},
    ...     refusals=(__import__("transitions").MachineError,),
    ... )
    >>> len(found.configurations), found.depth, found.closed, found.unreached_transitions
    (7, 3, True, ())
    >>> print(found.violations[0])
    can be opened: a guess, a guess, a guess: MachineError("Can't trigger event enter from state blocked!")
    """

    def built() -> _Watched:
        return _Watched(make())

    def offered(watched: _Watched) -> Actions[_Watched]:
        if actions is None:
            return dict(watched.openings())
        return {name: _acting(action) for name, action in actions.items()}

    result = search(
        built,
        offered,
        abstraction=lambda watched: (
            watched.state if abstraction is None else (watched.state, abstraction(watched.model))
        ),
        invariants={name: _on_model(rule) for name, rule in (invariants or {}).items()},
        promises={name: _on_model(promise) for name, promise in (promises or {}).items()},
        met=lambda watched: watched.taken,
        refusals=refusals,
        most_edges=most_edges,
        seconds=seconds,
    )
    everything = built()
    reached = {config if abstraction is None else config[0] for config in result.configurations}
    for story in everything.passing_through(result.stories):
        reached.add(story)
    result.unreached_states = tuple(name for name in machine_states(everything.machine) if name not in reached)
    result.unreached_transitions = tuple(r.name for r in everything.rows if r.name not in result.stories)
    return result


def _on_model(call: Callable[[Any], object]) -> Callable[[_Watched], object]:
    return lambda watched: call(watched.model)


def _acting(action: Callable[[Any], object]) -> Callable[[_Watched], object]:
    def act(watched: _Watched) -> object:
        watched.taken.clear()
        return action(watched.model)

    return act


class _Watched:
    """A machine that writes down which transitions it takes."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.model = machine.models[0]
        self.taken: list[str] = []
        self.rows = machine_rows(machine)
        for row in self.rows:
            row.transition.add_callback("before", self._note(row.name))

    @property
    def state(self) -> str:
        state = getattr(self.model, self.machine.model_attribute)
        return str(getattr(state, "name", state))

    def _note(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.taken.append(name)

    def openings(self) -> Iterator[tuple[str, Callable[[_Watched], object]]]:
        """One action for each row that can be taken from here, with guards that let it be taken."""
        for (state, trigger), cell in cells(self.rows).items():
            if state == self.state:
                for row, values in openings(cell):
                    told = [name if value else f"not {name}" for name, value in values.items()]
                    yield f"{trigger}{' if ' if told else ''}{' and '.join(told)}", _fire(trigger, row, values)

    def passing_through(self, names: Iterable[str]) -> Iterator[str]:
        """The states that the named transitions touch, also where the machine did not come to rest."""
        wanted = set(names)
        for row in self.rows:
            if row.name in wanted:
                yield from (state for state in (*row.sources, row.dest) if state is not None)


def _fire(trigger: str, row: MachineRow, values: Mapping[str, bool]) -> Callable[[_Watched], object]:
    def fire(watched: _Watched) -> object:
        watched.taken.clear()
        for other in watched.rows:
            if (other.trigger, other.sources) == (row.trigger, row.sources):
                other.answer(values)
        return watched.machine.events[trigger].trigger(watched.model)

    return fire
