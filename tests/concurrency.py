"""The concurrency tests many times over, in random order, under three switch intervals: `python -m tests.concurrency`.

One process and one pytest session; each round shuffles the tests with its own seed and runs them all.  A test that
fails in any round is a flake: it is told with the seed and the round that bring the order back (`--seed S --round R`),
and the exit code is 1.  `test_storm.py` starts a process for each test, to which neither the order nor the interval
means anything, so it comes once in `STORM_EVERY` rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

FILES = ("test_threads.py", "test_asyncio.py", "test_leases.py", "test_tickets.py", "test_linearizability.py")
STORM = "test_storm.py"
STORM_EVERY = 50

SWITCH_INTERVALS_S = (1e-5, 5e-4, 5e-3)
"""Threads take turns all the time, often, and as they do by default."""


class Rounds:
    """A pytest plugin: the session's tests again and again."""

    def __init__(self, times: int, seed: int, only: int | None, *, quiet: bool) -> None:
        self.rounds = range(times) if only is None else range(only, only + 1)
        self.seed, self.quiet = seed, quiet
        self.runs = self.skipped = 0
        self.flakes: list[dict[str, object]] = []
        self.tests = 0
        self.done = 0
        self._round = 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Instead of once through the list: every round's own order."""
        if session.testsfailed:
            raise session.Interrupted("the tests could not be collected")
        self.tests = len(session.items)
        began, before = time.monotonic(), sys.getswitchinterval()
        try:
            for number in self.rounds:
                self._round = number
                items = self._order(session.items)
                sys.setswitchinterval(self._interval_s)
                for item, following in zip(items, [*items[1:], None], strict=True):
                    session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                let_go()
                self.done += 1
                self._tell(f"\rround {self.done} of {len(self.rounds)}, {len(self.flakes)} flakes, "
                           f"{time.monotonic() - began:.0f} s", end="")  # fmt: skip
        finally:
            sys.setswitchinterval(before)
        self._tell("")
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count, and tell a flake at once."""
        self.runs += report.when == "call"
        self.skipped += report.skipped
        if report.failed:
            flake = {"test": report.nodeid, "round": self._round, "switch_interval_s": self._interval_s}
            self.flakes.append(flake)
            where = f"round {self._round} at {self._interval_s:g} s: --seed {self.seed} --round {self._round}"
            said = [f"--- {title}\n{text}" for title, text in report.sections]
            self._tell("\n".join([f"\nFLAKE {report.nodeid} in {where}", report.longreprtext, *said]))

    @property
    def _interval_s(self) -> float:
        return SWITCH_INTERVALS_S[self._round % len(SWITCH_INTERVALS_S)]

    def _order(self, items: list[pytest.Item]) -> list[pytest.Item]:
        stormy = self._round % STORM_EVERY == STORM_EVERY - 1
        chosen = [item for item in items if stormy or item.path.name != STORM]
        random.Random(f"{self.seed}:{self._round}").shuffle(chosen)
        return chosen

    def _tell(self, text: str, end: str = "\n") -> None:
        if not self.quiet:
            print(text, end=end, flush=True)


def let_go() -> None:
    """Managers that a test left open hang on the end of the interpreter: hundreds of rounds would drown in them."""
    from gpu_fsm import GPUResourceManager  # not before pytest: the package is one of its plugins

    for manager in [thing for thing in gc.get_objects() if type(thing) is GPUResourceManager]:
        manager._at_exit.detach()
    gc.collect()


def main() -> int:
    """Run the rounds; 0 if every test held in each."""
    parser = argparse.ArgumentParser(prog="python -m tests.concurrency", description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=200, help="rounds (default 200)")
    parser.add_argument("--seed", type=int, default=None, help="of the orders; a random one by default")
    parser.add_argument("--round", type=int, default=None, help="only this round")
    parser.add_argument("--json", action="store_true", help="nothing but one JSON object on stdout")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    rounds = Rounds(args.times, seed, args.round, quiet=args.json)
    files = [str(HERE / name) for name in (*FILES, STORM)]
    began = time.monotonic()
    os.chdir(HERE.parent)
    options = [
        "-o",
        "addopts=--strict-markers --strict-config",
        "-p",
        "no:terminal",
        "-p",
        "no:cacheprovider",
        "--hypothesis-profile=brief",
    ]
    code = pytest.main([*options, *files], plugins=[rounds])
    result = {
        "rounds": rounds.done,
        "tests": rounds.tests,
        "runs": rounds.runs,
        "skipped": rounds.skipped,
        "flakes": rounds.flakes,
        "seed": seed,
        "switch_intervals_s": SWITCH_INTERVALS_S,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(result) if args.json else f"concurrency: {result}")
    return 0 if code == 0 and not rounds.flakes and rounds.runs else 1


if __name__ == "__main__":
    sys.exit(main())
