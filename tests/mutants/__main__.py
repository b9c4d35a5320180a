"""Break each property on purpose and see that its own test notices: `python -m tests.mutants --properties`.

A mutant is a small patch against `gpu_fsm` in this folder, with a header that names the property it breaks:

    Property: 4
    Breaks: Nobody waits for the card after an unload.

Each is applied to a copy of the tree in a temporary folder, where the property tests run without shrinking.  Exit code
1 if a patch does not apply, survives, or is not noticed by a test `test_property_NN_...` of its own property, or if a
property has no patch.  A patch that no longer applies has to be made anew: break the line by hand, `git diff -U2`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PROPERTIES = range(1, 14)
TESTS = ("tests/test_properties.py",)
LIMIT_S = 1800.0
"""For one mutant, with some tests that find no end; longer is a mistake of ours."""

PLUGIN = """\
import signal

import pytest
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "mutants", deadline=None, derandomize=True, database=None, max_examples=100, report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
)


def ring(*_):
    pytest.fail("no end")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    # Again and again: the replay of an endless example has no end either.
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 60, 10)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
"""
"""No shrinking; and a test that finds no end has noticed something too: a broken guard can make the machine spin."""


@frozen
class Mutant:
    """One patch."""

    name: str
    prop: int
    breaks: str
    path: Path

    @classmethod
    def read(cls, path: Path) -> Mutant:
        """Read the header; raises ValueError if it names no property."""
        text = path.read_text(encoding="utf-8")
        found, breaks = re.search(r"^Property: (\d+)$", text, re.M), re.search(r"^Breaks: (.+)$", text, re.M)
        if not found or not breaks or int(found[1]) not in PROPERTIES:
            raise ValueError(f"{path.name}: the header needs `Property: 1..13` and `Breaks: ...`")
        return cls(path.stem, int(found[1]), breaks[1], path)


@frozen
class Result:
    """What became of a mutant: `verdict` is `killed`, or what is wrong."""

    mutant: str
    prop: int
    breaks: str
    verdict: str
    killers: tuple[str, ...] = ()


def judge(prop: int, killers: tuple[str, ...]) -> str:
    """Killed counts only if the property's own test is among the killers."""
    if not killers:
        return "survived"
    own = f"test_property_{prop:02d}_"
    return "killed" if any(killer.startswith(own) for killer in killers) else "not by its own test"


def run(mutant: Mutant, tests: tuple[str, ...], own: bool) -> Result:
    """Try one mutant on the tests, or with `own` only on its property's."""
    noticed = killers_of(mutant.path, tests, f"test_property_{mutant.prop:02d}_" if own else "")
    if isinstance(noticed, str):
        return Result(mutant.name, mutant.prop, mutant.breaks, noticed)
    return Result(mutant.name, mutant.prop, mutant.breaks, judge(mutant.prop, noticed), noticed)


def killers_of(patch: Path | None, tests: tuple[str, ...], only: str) -> tuple[str, ...] | str:
    """The tests that fail in a copy of the tree with `patch` (None: as it is); a text if that cannot be told."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as place:
        tree, report = Path(place) / "tree", Path(place) / "report.xml"
        copy(tree)
        if patch is not None:
            # Outside any repository, or git would look for the files there.
            apart = {**os.environ, "GIT_CEILING_DIRECTORIES": place}
            apply = ["git", "apply", "--whitespace=nowarn", str(patch)]
            applied = subprocess.run(apply, cwd=tree, env=apart, capture_output=True, text=True, check=False)
            if applied.returncode:
                return f"does not apply: {applied.stderr.strip().splitlines()[0]}"
        (tree / "mutant_profile.py").write_text(PLUGIN)
        command = [
            sys.executable, "-m", "pytest", *tests, "-q", "--tb=no", "--show-capture=no", "-p", "mutant_profile",
            # The real CLIP takes 15 s to be imported, and none of the patches is to its host.
            "-p", "no:cacheprovider", "--hypothesis-profile=mutants", "-m", "not needs_torch", f"--junitxml={report}",
            *(("-k", only) if only else ()),
        ]  # fmt: skip
        bare = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            ran = subprocess.run(
                command, cwd=tree, env=bare, capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"no end within {LIMIT_S:.0f} s"
        if ran.returncode not in (0, 1) or not report.exists():
            return f"pytest broke with {ran.returncode}: {(ran.stdout + ran.stderr).strip()[-200:]}"
        return failed(report)


def copy(tree: Path) -> None:
    """What the tests need of the tree; caches and environments stay behind."""
    tree.mkdir()
    for name in ("gpu_fsm", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "mutants", ".*"))
    for name in ("pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, tree / name)


def failed(report: Path) -> tuple[str, ...]:
    """The names of the tests that failed, from a JUnit report that pytest has just written."""
    cases = ET.parse(report).getroot().iter("testcase")
    return tuple(
        case.get("name", "?") for case in cases if case.find("failure") is not None or case.find("error") is not None
    )


def table(results: list[Result]) -> str:
    """One line a mutant: which property, what became of it, by whom."""
    width = max(len(result.mutant) for result in results)
    lines = []
    for result in results:
        by = ", ".join(sorted({short(killer) for killer in result.killers})) or "-"
        lines.append(f"{result.mutant:{width}}  {result.prop:02d}  {result.verdict:20}  {by}")
    return "\n".join(lines)


def short(test: str) -> str:
    """A property's test by its number, another by its name."""
    found = re.match(r"test_property_(\d\d)_", test)
    return found[1] if found else test


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--properties", action="store_true", help="the mutants of the thirteen properties (all there are)"
    )
    parser.add_argument("--only", metavar="NAME", action="append", help="a mutant's name or the begin of it")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="so many at a time")
    parser.add_argument("--own", action="store_true", help="run only the property's own tests: a quick look")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--tests", metavar="PATH", nargs="+", default=list(TESTS), help="what has to notice")
    options = parser.parse_args(arguments)
    mutants = [Mutant.read(path) for path in sorted(FOLDER.glob("*.patch"))]
    missing = sorted(set(PROPERTIES) - {mutant.prop for mutant in mutants})
    if options.only:
        mutants, missing = [m for m in mutants if any(m.name.startswith(name) for name in options.only)], []
    if not mutants:
        parser.error("no such mutant")
    tests = tuple(options.tests)
    broken = killers_of(None, tests, "test_property_" if options.own else "")
    if broken:
        print(f"without any mutant this fails already: {broken}", file=sys.stderr)
        return 1
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        results = list(pool.map(lambda mutant: run(mutant, tests, options.own), mutants))
    good = not missing and all(result.verdict == "killed" for result in results)
    if options.json:
        document: dict[str, Any] = {"ok": good, "without_mutant": missing, "mutants": [asdict(r) for r in results]}
        print(json.dumps(document, indent=2))
    else:
        print(table(results))
        killed = sum(result.verdict == "killed" for result in results)
        print(f"{killed} of {len(results)} killed by their own property's test")
        for prop in missing:
            print(f"property {prop:02d} has no mutant")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
