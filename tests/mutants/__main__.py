"""Plant faults and see who notices: `python -m tests.mutants`.

A mutant is a small patch against `gpu_fsm` in this folder; its header says what it breaks and who has to notice:

    Area: engine
    Property: 4
    Invariant: S3, L1
    Breaks: Nobody waits for the card after an unload.

`Property` and `Invariant` (numbered as in `tests/test_properties.py` and `gpu_fsm/testing/oracle.py`) are for those
that break one of them, `Area` names the tests to run: those marked `core` in the files of `AREAS`.  `Equivalent:
reason` says why nobody can notice.

Each is applied to a copy of the tree, where the tests run in a process forked from this one, without shrinking, until
tests of two files have failed.  A mutant is killed when that is so: an oracle that stands alone may be deleted by
mistake.  Exit code 1 for a mutant that survives unexplained, is killed by one file only or although it is called
equivalent, or does not apply; and for a property with fewer than two mutants or an invariant without one.

`--properties` asks another question: is each property's mutant noticed by a test `test_property_NN_...` of its own?

A patch that no longer applies has to be made anew: break the line by hand, `git diff -U1`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

from tests.mutants.run import EVERY_FILE, Job, Ran, run_all

FOLDER = Path(__file__).parent
PROPERTIES = tuple(str(number) for number in range(1, 14))
INVARIANTS = (*(f"S{number}" for number in range(1, 12)), *(f"L{number}" for number in range(1, 6)))
PROPERTY_TESTS = ("tests/test_properties.py",)

_ENGINE = (
    "tests/test_table.py",
    "tests/test_lint.py",
    "tests/test_stories.py",
    "tests/test_leases.py",
    "tests/test_tickets.py",
    "tests/test_status.py",
    "tests/test_events.py",
    "tests/test_vlm_handle.py",
    "tests/test_lend.py",
    "tests/test_reconfigure.py",
    "tests/test_scenarios.py",
    "tests/test_properties.py",
)
AREAS: dict[str, tuple[str, ...]] = {
    "agent": ("tests/test_agent.py", "tests/test_memory_model.py", "tests/test_security.py"),
    "cardlock": ("tests/test_cardlock.py", "tests/test_security.py"),
    "clip": ("tests/test_clip.py", "tests/test_security.py", "tests/test_card_rows.py", "tests/test_properties.py"),
    "control": ("tests/test_control.py", "tests/test_security.py"),
    "engine": _ENGINE,
    "gateway": ("tests/test_gateway_security.py", "tests/test_gateway.py", "tests/test_gateway_leases.py"),
    "intercept": ("tests/test_intercept.py", "tests/test_gateway.py"),
    "ollama": (
        "tests/test_ollama_rows.py",
        "tests/test_ollama_client.py",
        "tests/test_vlm_handle.py",
        "tests/test_security.py",
        "tests/test_stories.py",
        "tests/test_canary.py",
        "tests/test_properties.py",
    ),
    "settings": ("tests/test_settings.py", "tests/test_security.py", "tests/test_reconfigure.py"),
    "vram": ("tests/test_vram.py", "tests/test_card_status.py", "tests/test_cardlock.py", "tests/test_doctor.py"),
}
"""The files that judge each part, the quick ones first."""
NEEDS_TORCH = frozenset({"clip"})


@frozen
class Mutant:
    """One patch with its header."""

    name: str
    path: Path
    area: str
    breaks: str
    properties: tuple[str, ...] = ()
    invariants: tuple[str, ...] = ()
    equivalent: str = ""

    @classmethod
    def read(cls, path: Path) -> Mutant:
        """Read the header.  Raises ValueError where it says nothing that can be used."""
        head = path.read_text(encoding="utf-8").partition("\n--- ")[0]
        said = dict(re.findall(r"^([A-Z][a-z]+): (.+)$", head, re.M))
        mutant = cls(
            name=path.stem,
            path=path,
            area=said.get("Area", ""),
            breaks=said.get("Breaks", ""),
            properties=_listed(said.get("Property", "")),
            invariants=_listed(said.get("Invariant", "")),
            equivalent=said.get("Equivalent", ""),
        )
        known = {*mutant.properties} <= {*PROPERTIES} and {*mutant.invariants} <= {*INVARIANTS}
        if mutant.area not in AREAS or not mutant.breaks or not known:
            raise ValueError(f"{path.name}: the header needs `Area` ({', '.join(AREAS)}) and `Breaks`")
        return mutant


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


@frozen
class Result:
    """What became of a mutant: `verdict` is `killed`, `equivalent`, or what is wrong."""

    name: str
    area: str
    properties: tuple[str, ...]
    invariants: tuple[str, ...]
    breaks: str
    equivalent: str
    verdict: str
    killers: tuple[str, ...]
    tests_run: int
    cpu_s: float

    @property
    def good(self) -> bool:
        """Nothing has to be done about it."""
        return self.verdict in ("killed", "equivalent")


def job_of(mutant: Mutant | None, area: str, options: argparse.Namespace) -> Job:
    """What has to be run for a mutant, or with None for the tree as it is."""
    if options.properties:
        own = "|".join(f"test_property_{int(number):02d}_" for number in (mutant.properties if mutant else PROPERTIES))
        files, only, enough, examples = PROPERTY_TESTS, own, 1, 100
    else:
        files, only, enough, examples = AREAS[area], "", 2, 8
    return Job(
        name=mutant.name if mutant else f"({area})",
        patch=mutant.path if mutant else None,
        files=tuple(options.tests or files),
        only=only,
        torch=area in NEEDS_TORCH,
        examples=examples,
        enough_files=EVERY_FILE if options.all or mutant is None else enough,
    )


def judge(mutant: Mutant, ran: Ran, *, enough: int) -> Result:
    """Killed counts only where tests of `enough` files failed."""
    files = {killer.partition("::")[0] for killer in ran.failed}
    if ran.trouble:
        verdict = ran.trouble
    elif mutant.equivalent:
        verdict = "killed, so not equivalent" if files else "equivalent"
    elif not files:
        verdict = "survived"
    else:
        verdict = "killed" if len(files) >= enough else "killed by one file only"
    return Result(
        name=mutant.name,
        area=mutant.area,
        properties=mutant.properties,
        invariants=mutant.invariants,
        breaks=mutant.breaks,
        equivalent=mutant.equivalent,
        verdict=verdict,
        killers=ran.failed,
        tests_run=ran.tests,
        cpu_s=ran.cpu_s,
    )


def missing(mutants: Iterable[Mutant]) -> list[str]:
    """Properties with fewer than two mutants and invariants without one."""
    mutants = list(mutants)
    properties = Counter(number for mutant in mutants for number in mutant.properties)
    invariants = Counter(name for mutant in mutants for name in mutant.invariants)
    few = [f"property {number} has {properties[number]} of 2" for number in PROPERTIES if properties[number] < 2]
    return [*few, *(f"{name} has none" for name in INVARIANTS if not invariants[name])]


def line(result: Result, width: int) -> str:
    """One line of the table: what it breaks, what became of it, by whom."""
    breaks = ",".join((*(f"P{number}" for number in result.properties), *result.invariants)) or result.area
    tests: dict[str, list[str]] = {}
    for killer in result.killers:
        file, _, test = killer.partition("::")
        tests.setdefault(Path(file).stem.removeprefix("test_"), []).append(short(test))
    by = "; ".join(f"{file}: {names[0]}{f' +{len(names) - 1}' if names[1:] else ''}" for file, names in tests.items())
    by = by or result.equivalent or "-"
    return f"{result.name:{width}}  {breaks:9}  {result.verdict:24} {result.cpu_s:5.0f} s  {by}"


def short(test: str) -> str:
    """A property's test by its number, another by its name."""
    found = re.match(r"test_property_(\d\d)_", test)
    return found[1] if found else test.removeprefix("test_")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="NAME", action="append", help="a mutant's name or the begin of it")
    parser.add_argument("--properties", action="store_true", help="is each property's mutant killed by its own test?")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="so many at a time")
    parser.add_argument("--trusting", action="store_true", help="do not run the tests without any mutant first")
    parser.add_argument("--all", action="store_true", help="run every test: all killers, not one of each of two files")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--tests", metavar="PATH", nargs="+", help="other test files than the area's")
    options = parser.parse_args(arguments)
    every = [Mutant.read(path) for path in sorted(FOLDER.glob("*.patch"))]
    names = options.only or [""]
    mutants = [m for m in every if m.name.startswith(tuple(names)) and (m.properties or not options.properties)]
    if not mutants:
        parser.error("no such mutant")

    areas = ["engine"] if options.properties else sorted({mutant.area for mutant in mutants})
    unharmed = run_all([job_of(None, area, options) for area in areas if not options.trusting], options.jobs)
    broken = {ran.name: ran.trouble or ran.failed for ran in unharmed if ran.trouble or ran.failed}
    if broken:
        print(f"without any mutant this fails already: {broken}", file=sys.stderr)
        return 1

    width = max(len(mutant.name) for mutant in mutants)
    by_name = {mutant.name: mutant for mutant in mutants}
    results = []

    def done(ran: Ran) -> None:
        results.append(judge(by_name[ran.name], ran, enough=1 if options.properties else 2))
        print(line(results[-1], width), file=sys.stderr if options.json else sys.stdout, flush=True)

    run_all([job_of(mutant, mutant.area, options) for mutant in mutants], options.jobs, done)
    absent = [] if options.only else missing(every)
    good = not absent and all(result.good for result in results)
    if options.json:
        document: dict[str, Any] = {
            "ok": good,
            "counts": dict(Counter(result.verdict for result in results)),
            "missing": absent,
            "areas": {ran.name.strip("()"): {"tests": ran.tests, "cpu_s": ran.cpu_s} for ran in unharmed},
            "mutants": [asdict(result) for result in sorted(results, key=lambda result: result.name)],
        }
        print(json.dumps(document, indent=2))
    else:
        for text in absent:
            print(text)
        killed = sum(result.good for result in results)
        cpu_s = sum(result.cpu_s for result in results)
        print(f"{killed} of {len(results)} killed or explained, in {cpu_s:.0f} s of CPU")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
