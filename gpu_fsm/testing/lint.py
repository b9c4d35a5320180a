"""Static checks of a transition table: what can be wrong with it before anything runs.

Works on rows that have `name`, `trigger`, `sources`, `dest` and `guards` (`"x"` must hold, `"!x"` must not), first
enabled row wins.  Returns findings in words; an empty list is a clean table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Protocol


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
    return [
        *_names(rows, guards),
        *_reachability(rows, initial),
        *_totality(rows, required),
        *_precedence(rows),
        *_shortcuts(rows, frozenset(stable)),
    ]


def _names(rows: Sequence[TableRow], guards: Collection[str]) -> Iterable[str]:
    seen: set[str] = set()
    for row in rows:
        if row.name in seen:
            yield f"{row.name}: the name is used twice"
        seen.add(row.name)
        if not row.sources:
            yield f"{row.name}: no source"
        for guard in row.guards:
            if guard.removeprefix("!") not in guards:
                yield f"{row.name}: unknown guard {guard}"
    used = {guard.removeprefix("!") for row in rows for guard in row.guards}
    for guard in sorted(set(guards) - used):
        yield f"guard {guard} is used by no row"


def _reachability(rows: Sequence[TableRow], initial: Hashable) -> Iterable[str]:
    ahead: dict[Hashable, set[Hashable]] = {}
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
    for state in ahead:
        if state not in closure(initial, ahead):
            yield f"{state}: cannot be reached from {initial}"
        if state not in closure(initial, back):
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


def _by_cell(rows: Sequence[TableRow]) -> dict[tuple[Hashable, str], list[TableRow]]:
    cells: dict[tuple[Hashable, str], list[TableRow]] = {}
    for row in rows:
        for source in row.sources:
            cells.setdefault((source, row.trigger), []).append(row)
    return cells


def _totality(rows: Sequence[TableRow], required: Mapping[Hashable, Collection[str]]) -> Iterable[str]:
    cells = _by_cell(rows)
    for state, triggers in required.items():
        for trigger in triggers:
            cell = cells.get((state, trigger))
            if not cell:
                yield f"{state}: {trigger} has no row"
            elif cell[-1].guards:
                yield f"{state}: the last row of {trigger} ({cell[-1].name}) is guarded"


def _precedence(rows: Sequence[TableRow]) -> Iterable[str]:
    """Every row must win for some valuation of the guards, and every valuation must have a winner where one is last."""
    for (state, trigger), cell in _by_cell(rows).items():
        names = sorted({guard.removeprefix("!") for row in cell for guard in row.guards})
        winners: set[str] = set()
        for values in itertools.product((True, False), repeat=len(names)):
            winner = first_enabled(cell, dict(zip(names, values, strict=True)).__getitem__)
            if winner is not None:
                winners.add(winner.name)
        for row in cell:
            if row.name not in winners:
                yield f"{state}: {row.name} can never be taken on {trigger}"


def first_enabled(cell: Sequence[TableRow], holds: Callable[[str], bool]) -> TableRow | None:
    """The row that wins for one valuation of the guards."""
    for row in cell:
        if all(holds(guard.removeprefix("!")) is not guard.startswith("!") for guard in row.guards):
            return row
    return None


def _shortcuts(rows: Sequence[TableRow], stable: frozenset[Hashable]) -> Iterable[str]:
    for row in rows:
        for source in row.sources:
            if row.dest is not None and source in stable and row.dest in stable:
                yield f"{row.name}: a shortcut from {source} to {row.dest}; promises are kept by steps"
