"""Reads the catalogue of what really goes wrong, `fault_rows.toml`.

A row's id stands in the id of its test.  A to E are what users of such programs report; F is what a search of public
trackers added, each with the threads it comes from; S are the promises about security.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Final

from attrs import frozen


@frozen(kw_only=True)
class Row:
    """One fault.  Of D, E and F the three words are compared with what the row's story shows."""

    id: str
    what: str
    right: str
    """The reaction that is right."""
    where: str
    """The file of its test."""
    state: str = ""
    """Where the manager stands when the story is over: a mode, or DEGRADED(code); empty where there is none."""
    error: str = ""
    """The class of the first error that a caller gets; empty where nobody gets one."""
    event: str = ""
    """The kind of event that tells of it; empty where there is nothing to tell."""
    tests: tuple[str, ...] = ()
    """The names of the tests that prove it, where their ids do not begin with the row's."""
    links: tuple[str, ...] = ()
    """Threads of public trackers that report it."""


def _read() -> dict[str, tuple[Row, ...]]:
    groups = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return {
        name: tuple(
            Row(
                id=id_,
                **{
                    "where": group["where"],
                    **facts,
                    **{many: tuple(facts.get(many, ())) for many in ("tests", "links")},
                },
            )
            for id_, facts in group.items()
            if id_ != "where"
        )
        for name, group in groups.items()
    }


GROUPS: Final = _read()
"""The rows by the letter of their group."""
ROWS: Final = {row.id: row for group in GROUPS.values() for row in group}
"""The rows by their id."""
