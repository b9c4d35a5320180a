"""Static checks of a transition table: what can be wrong with it before anything runs.

Works on a machine of the library `transitions`, and on rows that have `name`, `trigger`, `sources`, `dest` and `guards`
(`"x"` must hold, `"!x"` must not), first enabled row wins.  Returns findings in words; an empty list is a clean table.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from attrs import frozen

MOST_GUARDS = 14
"""In one cell: all their outcomes are tried, and 2 ** 14 take a second."""


class TableRow(Protocol):
    """What a row must have to be linted."""

    @property
    def name(self) -> str: ...
    @property
    def trigger(self) -> str: ...
    @property
    def sources(self) -> Sequence[Hashable]: ...
    @property
    def dest(self) -> Hashable | None: ...
    @property
    def guards(self) -> Sequence[str]: ...


R = TypeVar("R", bound=TableRow)


def lint(
    machine_or_table: Any,
    *,
    initial: Hashable | None = None,
    final: Collection[Hashable] = (),
    stable: Collection[Hashable] = (),
    required: Mapping[Any, Collection[str]] | None = None,
    guards: Collection[str] | None = None,
) -> list[str]:
    """Find what is wrong with a flat `transitions.Machine` or with the rows of a table, without running it.

    Found are states that cannot be reached or not be left for `initial` again (but for the `final` ones), transitions
    that can never be taken because earlier ones always win, or that are there twice, and names that mean nothing:
    destinations, guards, callbacks.  `required` names, for a state, the triggers that it must take whatever the guards
    say; between two `stable` states there must be no direct way.  A machine knows its initial state, and its
    automatic `to_STATE` triggers are left out; for a table, `initial` has to be given and `guards` are the known names.

    >>> from transitions import Machine
    >>> machine = Machine(states=["locked", "free", "broken"], initial="locked", auto_transitions=False)
    >>> machine.add_transition("coin", "locked", "free")
    >>> machine.add_transition("coin", "locked", "locked", conditions="is_fake")
    >>> machine.add_transition("push", "free", "locked")
    >>> for finding in lint(machine, required={"locked": ["coin", "push"]}):
    ...     print(finding)
    broken: cannot be reached from locked
    broken: no way home to locked
    locked: push has no row
    locked: coin: locked -> locked if is_fake can never be taken on coin
    coin: locked -> locked if is_fake: there is no is_fake on the model
    """
    if not _is_machine(machine_or_table):
        if not isinstance(machine_or_table, Iterable):
            given = type(machine_or_table).__name__
            raise TypeError(
                f"lint takes a transitions.Machine or the rows of a table, not {given!r}; of a model, give its machine"
            )
        rows: Sequence[TableRow] = tuple(machine_or_table)
        if initial is None:
            raise TypeError("a table does not know its initial state: lint(table, initial=...)")
        return [
            *_names(rows, guards),
            *_reachability(rows, initial, final=final),
            *_totality(rows, required or {}),
            *_precedence(rows),
            *_shortcuts(rows, frozenset(stable)),
        ]
    machine = machine_or_table
    of_machine = machine_rows(machine)
    states = machine_states(machine)
    ends = {_name(state) for state in final} | {n for n, s in machine.states.items() if getattr(s, "final", False)}
    return [
        *_reachability(of_machine, _name(initial or machine.initial), states=states, final=ends),
        *_totality(of_machine, {_name(state): triggers for state, triggers in (required or {}).items()}),
        *_precedence(of_machine),
        *_duplicates(of_machine),
        *_shortcuts(of_machine, frozenset(_name(state) for state in stable)),
        *_meaningless(machine, of_machine),
    ]


def lint_table(
    rows: Sequence[TableRow],
    *,
    initial: Hashable,
    stable: Collection[Hashable],
    required: Mapping[Hashable, Collection[str]],
    guards: Collection[str],
) -> list[str]:
    """Check names, reachability, ways home, totality, precedence and shortcuts.

    `stable` are the states that promise something; `required` maps a state to the triggers that must be total in it.
    """
    return lint(rows, initial=initial, stable=stable, required=required, guards=guards)


def _names(rows: Sequence[TableRow], guards: Collection[str] | None) -> Iterable[str]:
    seen: set[str] = set()
    for row in rows:
        if row.name in seen:
            yield f"{row.name}: the name is used twice"
        seen.add(row.name)
        if not row.sources:
            yield f"{row.name}: no source"
        for guard in row.guards:
            if guards is not None and guard.removeprefix("!") not in guards:
                yield f"{row.name}: unknown guard {guard}"
    used = {guard.removeprefix("!") for row in rows for guard in row.guards}
    for guard in sorted(set(guards or ()) - used):
        yield f"guard {guard} is used by no row"


def _reachability(
    rows: Sequence[TableRow],
    initial: Hashable,
    *,
    states: Iterable[Hashable] = (),
    final: Collection[Hashable] = (),
) -> Iterable[str]:
    ahead: dict[Hashable, set[Hashable]] = {state: set() for state in (initial, *states)}
    for row in rows:
        for source in row.sources:
            ahead.setdefault(source, set())
            if row.dest is not None:
                ahead[source].add(row.dest)
                ahead.setdefault(row.dest, set())
    back: dict[Hashable, set[Hashable]] = {state: set() for state in ahead}
    for source, dests in ahead.items():
        for dest in dests:
            back[dest].add(source)
    reached, homing = closure(initial, ahead), closure(initial, back)
    for state in ahead:
        if state not in reached:
            yield f"{state}: cannot be reached from {initial}"
        if state not in homing and state not in final:
            yield f"{state}: no way home to {initial}"


def closure(start: Hashable, edges: Mapping[Hashable, Collection[Hashable]]) -> set[Hashable]:
    """Everything reachable from `start`, itself included."""
    found, todo = {start}, [start]
    while todo:
        for following in edges.get(todo.pop(), ()):
            if following not in found:
                found.add(following)
                todo.append(following)
    return found


def cells(rows: Iterable[R]) -> dict[tuple[Hashable, str], list[R]]:
    """The rows by (state, trigger), in their order."""
    found: dict[tuple[Hashable, str], list[R]] = {}
    for row in rows:
        for source in row.sources:
            found.setdefault((source, row.trigger), []).append(row)
    return found


def _totality(rows: Sequence[TableRow], required: Mapping[Hashable, Collection[str]]) -> Iterable[str]:
    by_cell = cells(rows)
    for state, triggers in required.items():
        for trigger in triggers:
            cell = by_cell.get((state, trigger))
            if not cell:
                yield f"{state}: {trigger} has no row"
            elif all(row.guards for row in cell):
                yield f"{state}: every row of {trigger} is guarded, also the last ({cell[-1].name})"


def _precedence(rows: Sequence[TableRow]) -> Iterable[str]:
    """Every row must win for some outcome of the guards."""
    for (state, trigger), cell in cells(rows).items():
        if len(_guards_of(cell)) > MOST_GUARDS:
            yield f"{state}: {trigger} has more than {MOST_GUARDS} guards, too many to see which rows can be taken"
            continue
        winners = [row for row, _ in openings(cell)]
        for row in cell:
            if row not in winners:
                yield f"{state}: {row.name} can never be taken on {trigger}"


def openings(cell: Sequence[R]) -> Iterator[tuple[R, dict[str, bool]]]:
    """The rows of one cell that can win, each with outcomes of the guards for which it does."""
    names, found = _guards_of(cell), []
    for outcomes in itertools.product((True, False), repeat=len(names)):
        values = dict(zip(names, outcomes, strict=True))
        winner = first_enabled(cell, values.__getitem__)
        if winner is not None and winner not in found:
            found.append(winner)
            yield winner, values


def _guards_of(cell: Iterable[TableRow]) -> list[str]:
    return sorted({guard.removeprefix("!") for row in cell for guard in row.guards})


def first_enabled(cell: Sequence[R], holds: Callable[[str], bool]) -> R | None:
    """The row that wins for one outcome of the guards."""
    for row in cell:
        if all(holds(guard.removeprefix("!")) is not guard.startswith("!") for guard in row.guards):
            return row
    return None


def _shortcuts(rows: Sequence[TableRow], stable: frozenset[Hashable]) -> Iterable[str]:
    for row in rows:
        for source in row.sources:
            if row.dest is not None and source in stable and row.dest in stable:
                yield f"{row.name}: a shortcut from {source} to {row.dest}; promises are kept by steps"


# --- machines of the library `transitions`: read by their attributes, so that this file need not import it ---


@frozen(eq=False)
class MachineRow:
    """A transition of a machine as a row of a table."""

    name: str
    trigger: str
    sources: tuple[str]
    dest: str | None
    guards: tuple[str, ...]
    transition: Any

    def answer(self, values: Mapping[str, bool]) -> None:
        """From now on the guards answer so, and are not asked themselves."""
        for guard, condition in zip(self.guards, self.transition.conditions, strict=True):
            verdict = values[guard.removeprefix("!")] is not guard.startswith("!")
            condition.check = lambda event_data, verdict=verdict: verdict


def machine_rows(machine: Any) -> tuple[MachineRow, ...]:
    """All transitions of a flat machine, in order of precedence, without the automatic `to_STATE`."""
    automatic = {f"to_{name}" for name in machine.states} if getattr(machine, "auto_transitions", False) else set()
    names: Counter[str] = Counter()
    nameless: list[Any] = []
    rows = []
    for trigger, event in machine.events.items():
        if trigger in automatic:
            continue
        for source, transitions in event.transitions.items():
            for transition in transitions:
                guards = tuple(("" if c.target else "!") + _called(c.func, nameless) for c in transition.conditions)
                dest = None if transition.dest is None else _name(transition.dest)
                asked = " and ".join(f"not {guard[1:]}" if guard.startswith("!") else guard for guard in guards)
                name = f"{trigger}: {source} -> {dest or 'stays'}{f' if {asked}' if asked else ''}"
                names[name] += 1
                again = f" ({names[name]})" if names[name] > 1 else ""
                rows.append(MachineRow(name + again, trigger, (_name(source),), dest, guards, transition))
    return tuple(rows)


def machine_states(machine: Any) -> tuple[str, ...]:
    """The names of all states of a flat machine."""
    return tuple(machine.states)


def _is_machine(thing: Any) -> bool:
    return isinstance(getattr(thing, "events", None), Mapping) and isinstance(getattr(thing, "states", None), Mapping)


def _name(state: Any) -> str:
    return str(getattr(state, "name", state))


def _called(callback: Any, nameless: list[Any]) -> str:
    """Functions of one name count as one guard; those without a name are each their own."""
    if isinstance(callback, str):
        return callback
    name = str(getattr(callback, "__name__", "<lambda>"))
    if name != "<lambda>":
        return name
    if callback not in nameless:
        nameless.append(callback)
    return f"lambda {nameless.index(callback) + 1}"


def _duplicates(rows: Iterable[MachineRow]) -> Iterable[str]:
    seen = set()
    for row in rows:
        same = (row.trigger, row.sources, row.dest, frozenset(row.guards))
        if same in seen:
            yield f"{row.name}: is there twice"
        seen.add(same)


def _meaningless(machine: Any, rows: Iterable[MachineRow]) -> Iterable[str]:
    """Names are looked up when they are first used; a typo waits until then."""
    for row in rows:
        if row.dest is not None and row.dest not in machine.states:
            yield f"{row.name}: there is no state {row.dest}"
        t = row.transition
        yield from _unknown(machine, row.name, [*t.prepare, *(c.func for c in t.conditions), *t.before, *t.after])
    for name, state in machine.states.items():
        yield from _unknown(machine, name, [*state.on_enter, *state.on_exit])


def _unknown(machine: Any, where: str, callbacks: Iterable[Any]) -> Iterable[str]:
    for callback in callbacks:
        # A name with a dot is imported by the library, which is not for a lint to do.
        if isinstance(callback, str) and "." not in callback:
            for model in machine.models:
                if not hasattr(model, callback):
                    yield f"{where}: there is no {callback} on the model"
