"""Drawing: Mermaid text from the table that runs, so that a picture cannot drift from the machine.

Two views: `overview()`, an arrow for each pair of states, and `detail()`, an arrow for each row with its guards.  Rows
that stay in their state move nothing and are not drawn.
"""

from __future__ import annotations

from typing import Any

from gpu_fsm.states import IDLE, PROMISES, STEPS, TABLE, Row
from gpu_fsm.status import State


def overview() -> str:
    """The eight states, each arrow with the triggers that can take it.  Mermaid text, newline at the end."""
    arrows: dict[tuple[State, State], list[str]] = {}
    for row in TABLE:
        for source in row.sources:
            if row.dest is not None:
                triggers = arrows.setdefault((source, row.dest), [])
                if row.trigger not in triggers:
                    triggers.append(row.trigger)
    return _draw([_arrow(source, dest, ", ".join(triggers)) for (source, dest), triggers in arrows.items()])


def detail() -> str:
    """One arrow for each row and source, labelled `row: trigger if guards`.  Mermaid text, newline at the end."""
    return _draw(
        [
            _arrow(source, row.dest, _label(row))
            for row in TABLE
            if row.dest is not None
            for source in row.sources
        ]
    )  # fmt: skip


def facts() -> dict[str, Any]:
    """The same as plain JSON types: `states` with what each promises, `rows` in the order in which they are tried."""
    rows = [
        {
            "name": row.name,
            "trigger": row.trigger,
            "sources": [source.name for source in row.sources],
            "dest": row.dest and row.dest.name,
            "guards": list(row.guards),
            "note": row.note,
        }
        for row in TABLE
    ]
    return {"initial": IDLE.name, "states": {state.name: PROMISES[state] for state in State}, "rows": rows}


def _label(row: Row) -> str:
    guards = " and ".join(f"not {guard[1:]}" if guard.startswith("!") else guard for guard in row.guards)
    return f"{row.name} = {row.trigger}{f' if {guards}' if guards else ''}"


def _arrow(source: State, dest: State, label: str) -> str:
    # Mermaid ends a label at a colon or semicolon, and reads # and quotes as markup.
    safe = "".join(c if c.isalnum() or c in " _,=-" else " " for c in label)
    return f"    {source.name} --> {dest.name} : {safe}"


def _draw(arrows: list[str]) -> str:
    lines = [
        "stateDiagram-v2",
        f"    [*] --> {IDLE.name}",
        *sorted(arrows),
        "    classDef step font-style:italic,stroke-dasharray:4",
        f"    class {','.join(state.name for state in STEPS)} step",
    ]
    return "\n".join(lines) + "\n"
