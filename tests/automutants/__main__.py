"""Automatic mutants of the deciding files: `python -m tests.automutants` (needs `pip install cosmic-ray`).

cosmic-ray's operators, and some of our own for the table, change one thing at a time; a fast, torch-free choice of the
tests has to notice.  A run can be cut off and goes on where it was: what is known is kept in the session file for as
long as the package and the tests concerned are the same.

Exit code 1 where less than 90 % of any file's are killed, where a survivor has no reason in
`tests/data/automatic-mutants.toml`, where mutants are left to try, or where a test fails without any.  A reason whose
mutant is gone or killed is reported as stale.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from attrs import asdict, define, field, frozen

from tests.automutants import mutants, running
from tests.automutants.mutants import Mutant, mutants_of
from tests.automutants.running import ROOT, Known, Order, Verdict

MODULES = ("states", "machine", "guards", "driver")
LIVES = "tests/test_scenarios.py::test_a_thousand_lives_keep_every_promise"
"""Thirty of them here, and worth their time.  The digests of lives are no witnesses: they change with whatever differs,
right or wrong."""
STAGES = (
    (
        "tests/test_table.py", "tests/test_guards.py", "tests/test_moves.py", "tests/test_driver.py",
        "tests/test_stories.py", LIVES,
    ),
    (
        "tests/test_tickets.py", "tests/test_leases.py", "tests/test_lend.py", "tests/test_events.py",
        "tests/test_status.py", "tests/test_vlm_handle.py", "tests/test_reconfigure.py", "tests/test_asyncio.py",
        "tests/test_threads.py", "tests/test_lifecycle.py", "tests/test_cardlock.py",
        "tests/test_properties.py",
    ),
)  # fmt: skip
"""The tests that have to notice, the fastest files first."""
TESTS = tuple(file for stage in STAGES for file in stage)
FILES = tuple(file.partition("::")[0] for file in TESTS)
WANTED = 0.9
NO_END_S = 1e9
REASONS = ROOT / "tests" / "data" / "automatic-mutants.toml"
REPORT = ROOT / "tests" / "data" / "automatic-mutants.json"
KINDS = ("equivalent", "defensive", "missing oracle")


def digest(paths: Iterable[Path]) -> str:
    """Of the text of files, in the order of their names."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


@functools.cache
def of_package() -> str:
    """What every result depends on."""
    return digest((ROOT / "gpu_fsm").rglob("*.py"))


@functools.cache
def of_test(file: str) -> str:
    """What a kill by a test of this file depends on, besides."""
    return digest([ROOT / file.partition("::")[0]])


@functools.cache
def of_tests() -> str:
    """What a survival depends on, besides."""
    return digest([*(ROOT / file for file in FILES), Path(running.__file__)])


@define
class Session:
    """What is known, in a file that only grows: one JSON object a line, the last one of a mutant counts."""

    path: Path
    test_seconds: float
    tests: dict[str, list[Known]] = field(factory=dict)
    failing: dict[str, list[str]] = field(factory=dict)
    """Tests that fail without any mutant, and so can notice none."""
    verdicts: dict[str, Verdict] = field(factory=dict)
    before: dict[str, str] = field(factory=dict)
    """Key of a mutant -> who killed it last, also where that does not count any more."""
    slow: set[str] = field(factory=set)
    """Tests that took far too long when they were measured last."""

    def read(self) -> None:
        """Take in what the file says and still holds."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the last run was cut off while it wrote
            if "file" in entry:
                limit = 2 * running.SLOWEST_CPU_S
                self.slow |= {known["name"] for known in entry["known"] if known["cpu_s"] > limit}
                if (entry["package"], entry["test"]) == (of_package(), of_test(entry["file"])):
                    self.tests[entry["file"]] = [Known(**known) for known in entry["known"]]
                    self.failing[entry["file"]] = entry.get("failing", [])
                continue
            verdict = Verdict(**entry["verdict"])
            if verdict.killer:
                self.before[entry["key"]] = verdict.killer
            if entry["depends"] == self.depends(verdict):
                self.verdicts[entry["key"]] = verdict

    def depends(self, verdict: Verdict) -> str:
        """On what the verdict rests."""
        file = verdict.killer.partition("::")[0]
        return f"{of_package()} {of_test(file) if file in FILES else f'{of_tests()} {self.test_seconds:g}'}"

    def note_file(self, file: str, known: list[Known], failing: list[str]) -> None:
        """What the tests of a file are like."""
        self.tests[file] = known
        self.failing[file] = failing
        marks = {"file": file, "package": of_package(), "test": of_test(file), "failing": failing}
        self._write({**marks, "known": [asdict(test) for test in known]})

    def note(self, mutant: Mutant, verdict: Verdict) -> None:
        """What became of a mutant."""
        self.verdicts[mutant.key] = verdict
        self._write({"key": mutant.key, "depends": self.depends(verdict), "verdict": asdict(verdict)})

    def _write(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


# --- reasons ---


@frozen
class Reason:
    """Why a survivor may live."""

    kind: str
    why: str


def read_reasons(path: Path = REASONS) -> dict[str, Reason]:
    """Key of a mutant -> why nobody notices it.  Raises ValueError where the file is not as it should be."""
    found: dict[str, Reason] = {}
    document = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for entry in document.get("survivors", []):
        if entry["kind"] not in KINDS:
            raise ValueError(f"{path.name}: {entry['kind']!r} is none of {', '.join(KINDS)}")
        for change in entry["changes"]:
            key = f"{entry['module']}:{entry['function']}: {change}"
            if key in found:
                raise ValueError(f"{path.name}: two reasons for {key}")
            found[key] = Reason(entry["kind"], entry["why"])
    return found


# --- the run ---


@define
class Progress:
    """One line now and then: how far, how long, how long still."""

    total: int
    to: TextIO
    ends_at: float
    started: float = field(factory=time.monotonic)
    tried: int = 0
    survived: int = 0
    said: float = 0.0

    def step(self, mutant: Mutant, verdict: Verdict) -> bool:
        """One more; False when the time is up."""
        self.tried += 1
        now = time.monotonic()
        if verdict.word == "survived":
            self.survived += 1
            print(f"survived ({verdict.ran} tests): {mutant.operator} {mutant.key}", file=self.to, flush=True)
        if now - self.said > 5.0 or self.tried == self.total:
            self.said = now
            spent = now - self.started
            left = spent / self.tried * (self.total - self.tried)
            words = f"{self.tried}/{self.total}, {self.survived} survived"
            print(f"{words}, {_minutes(spent)} gone, {_minutes(left)} left", file=self.to, flush=True)
        return now < self.ends_at


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def run(chosen: Sequence[Mutant], session: Session, seconds: float, test_seconds: float) -> None:
    """Try what is not known yet."""
    ends_at = time.monotonic() + seconds
    running.preload()
    files = [file for file in TESTS if file not in session.tests]

    def learnt(file: str, known: list[Known], failing: list[str]) -> None:
        print(f"{file}: {len(known)} tests, {sum(test.cpu_s for test in known):.1f} s", file=sys.stderr, flush=True)
        session.note_file(file, known, failing if known else [file])

    running.learn(files, MODULES, session.slow - {LIVES}, learnt)
    known = [test for file in TESTS for test in session.tests[file]]
    tests = [test for test in known if test.cpu_s <= running.SLOWEST_CPU_S or test.name == LIVES]
    order = Order({test.name: test for test in tests}, test_seconds)
    order.last.update(session.before)
    for mutant in chosen:
        if mutant.key in session.before:
            order.note(mutant, session.before[mutant.key])
    todo = [mutant for mutant in chosen if mutant.key not in session.verdicts]
    progress = Progress(len(todo), sys.stderr, ends_at)
    refused: list[Mutant] = []

    def done(mutant: Mutant, verdict: Verdict) -> bool:
        if verdict.word == "impossible":
            refused.append(mutant)
            return True
        session.note(mutant, verdict)
        if verdict.killer:
            order.note(mutant, verdict.killer)
        return progress.step(mutant, verdict)

    # What is imported anew first: afterwards this process knows the package.
    running.try_imported([mutant for mutant in todo if not mutant.in_place], STAGES, order, done)
    if time.monotonic() < ends_at:
        running.try_in_place([mutant for mutant in todo if mutant.in_place], TESTS, order, done)
    if refused:
        raise SystemExit(f"{len(refused)} mutants cannot be put in place, e.g. {refused[0].key}")


# --- the report ---


def _is_in(key: str, wanted: Iterable[str]) -> bool:
    """Whether a mutant belongs to one of the modules, or MODULE:FUNCTION, that are asked for."""
    return any(key.startswith(f"{want}:") for want in wanted)


def report_of(
    chosen: Sequence[Mutant], left_out: dict[str, Counter[str]], session: Session, reasons: dict[str, Reason]
) -> dict[str, Any]:
    """The whole story, as it goes to the report's file; `reasons` of the modules and functions of `chosen`."""
    by_file: dict[str, dict[str, Any]] = {}
    survivors = []
    for module in dict.fromkeys(mutant.module for mutant in chosen):
        ours = [mutant for mutant in chosen if mutant.module == module]
        operators = {name: _counts([m for m in ours if m.operator == name], session) for name in _operators(ours)}
        by_file[module] = {**_counts(ours, session), "left_out": dict(left_out[module]), "operators": operators}
    for mutant in chosen:
        verdict = session.verdicts.get(mutant.key)
        if verdict is not None and verdict.word == "survived":
            reason = reasons.get(mutant.key)
            survivors.append(
                {
                    "module": mutant.module,
                    "function": mutant.function,
                    "operator": mutant.operator,
                    "change": mutant.change,
                    "tests": verdict.ran,
                    "kind": reason.kind if reason else None,
                    "why": reason.why if reason else None,
                }
            )
    silent = Verdict("")
    may_live = {m.key for m in chosen if session.verdicts.get(m.key, silent).word in ("", "survived")}
    stale = [key for key in reasons if key not in may_live]
    counts = _counts(chosen, session)
    failing = [name for names in session.failing.values() for name in names]
    ok = (
        counts["left"] == 0
        and not failing
        and all(one["rate"] >= WANTED for one in by_file.values())
        and all(survivor["why"] for survivor in survivors)
    )
    return {
        "ok": ok,
        "test_seconds": session.test_seconds if session.test_seconds < NO_END_S else None,
        **counts,
        "failing": failing,
        "rules": mutants.RULES,
        "files": by_file,
        "survivors": survivors,
        "stale": stale,
    }


def _operators(chosen: Sequence[Mutant]) -> list[str]:
    return sorted({mutant.operator for mutant in chosen})


def _counts(chosen: Sequence[Mutant], session: Session) -> dict[str, Any]:
    words = Counter(session.verdicts[m.key].word if m.key in session.verdicts else "left" for m in chosen)
    tried = len(chosen) - words["left"]
    killed = words["killed"] + words["endless"]
    return {
        "mutants": len(chosen),
        "killed": killed,
        "survived": words["survived"],
        "left": words["left"],
        "rate": round(killed / tried, 4) if tried else 0.0,
    }


def told(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{'file':10}  mutants  killed  survived  left  rate"]
    for name, one in [*report["files"].items(), ("all", report)]:
        counted = f"{one['mutants']:7}  {one['killed']:6}  {one['survived']:8}  {one['left']:4}"
        lines.append(f"{name:10}  {counted}  {100 * one['rate']:.1f} %")
    for survivor in report["survivors"]:
        why = f"{survivor['kind']}: {survivor['why']}" if survivor["why"] else "NO REASON IS GIVEN"
        lines.append(f"survived: {survivor['module']}:{survivor['function']}: {survivor['change']}\n    {why}")
    lines += [f"fails without any mutant: {name}" for name in report["failing"]]
    lines += [f"stale reason: {key}" for key in report["stale"]]
    return "\n".join(lines)


def _generated(module: str, session: Session) -> tuple[list[Mutant], Counter[str]]:
    """From a file beside the session, where nothing has changed: making them takes a minute."""
    mark = digest([ROOT / "gpu_fsm" / f"{module}.py", Path(mutants.__file__)])
    kept = session.path.with_name(f"{session.path.name}.{module}.json")
    if kept.exists():
        document = json.loads(kept.read_text(encoding="utf-8"))
        if document["mark"] == mark:
            made = [Mutant(**{**entry, "lines": tuple(entry["lines"])}) for entry in document["mutants"]]
            return made, Counter(document["left_out"])
    found, left_out = mutants_of(ROOT / "gpu_fsm" / f"{module}.py")
    entries = [asdict(mutant) for mutant in found]
    kept.write_text(json.dumps({"mark": mark, "left_out": left_out, "mutants": entries}), encoding="utf-8")
    return found, left_out


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.automutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="MODULE[:FUNCTION]", action="append", help=f"of {', '.join(MODULES)}")
    parser.add_argument("--seconds", metavar="S", type=float, default=NO_END_S, help="stop then; the next run goes on")
    parser.add_argument(
        "--test-seconds", metavar="S", type=float, default=NO_END_S, help="a quick look: so much a mutant"
    )
    parser.add_argument("--session", metavar="FILE", type=Path, help="what is known (default: in the temporary folder)")
    parser.add_argument("--report", action="store_true", help=f"write {REPORT.relative_to(ROOT)} (whole runs only)")
    parser.add_argument("--no-run", action="store_true", help="only say what is known")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    mark = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
    place = options.session or Path(tempfile.gettempdir(), f"gpu_fsm-automutants-{mark}.jsonl")
    session = Session(place, options.test_seconds)
    session.read()
    wanted = options.only or MODULES
    chosen: list[Mutant] = []
    left_out: dict[str, Counter[str]] = {}
    for module in MODULES:
        if any(want.partition(":")[0] == module for want in wanted):
            found, left_out[module] = _generated(module, session)
            chosen += [mutant for mutant in found if _is_in(mutant.key, wanted)]
    if not chosen:
        parser.error("no such mutant")
    reasons = {key: reason for key, reason in read_reasons().items() if _is_in(key, wanted)}
    if not options.no_run:
        run(chosen, session, options.seconds, options.test_seconds)
    report = report_of(chosen, left_out, session, reasons)
    if options.report and not options.only:
        REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1) if options.json else told(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
