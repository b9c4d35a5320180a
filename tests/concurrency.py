"""The concurrency tests many times over, in random order, under three switch intervals: `python -m tests.concurrency`.

One process and one pytest session; each round shuffles the tests with its own seed and runs them all.  A test that
fails in any round is a flake: it is told with the seed and the round that bring the order back (`--seed S --round R`),
and the exit code is 1.  A test during which there was but one thread and no event loop is run in the first round only:
neither order nor interval means anything to it.  What waits for sockets and processes of its own, at their pace, comes
once in so many rounds (`SELDOM`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent

FILES = (
    "test_threads.py",
    "test_asyncio.py",
    "test_leases.py",
    "test_tickets.py",
    "test_linearizability.py",
    "test_lend.py",
    "test_reconfigure.py",
    "test_status.py",
    "test_events.py",
    "test_control.py",
)
SELDOM = {"test_intercept.py": 4, "test_gateway.py": 25, "test_gateway_leases.py": 25, "test_storm.py": 50}
"""File -> once in so many rounds: it starts processes, or most of its time is waiting for sockets."""

SWITCH_INTERVALS_S = (1e-5, 5e-4, 5e-3)
"""Threads take turns all the time, often, and as they do by default."""


class Rounds:
    """A pytest plugin: the session's tests again and again."""

    def __init__(self, rounds: range, seed: int, *, quiet: bool) -> None:
        self.rounds = rounds
        self.seed, self.quiet = seed, quiet
        self.runs = self.skipped = 0
        self.flakes: list[dict[str, object]] = []
        self.tests = 0
        self.done = 0
        self._round = 0
        self.single: set[str] = set()
        """Tests during which there was but one thread, and no loop."""
        self._alone = True

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
                with self._listening():
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
            print("\n".join([f"\nFLAKE {report.nodeid} in {where}", report.longreprtext, *said]), file=sys.stderr)

    @property
    def _interval_s(self) -> float:
        return SWITCH_INTERVALS_S[self._round % len(SWITCH_INTERVALS_S)]

    def _order(self, items: list[pytest.Item]) -> list[pytest.Item]:
        shuffled = list(items)
        random.Random(f"{self.seed}:{self._round}").shuffle(shuffled)
        return [item for item in shuffled if item.nodeid not in self.single and self._has_its_turn(item)]

    def _has_its_turn(self, item: pytest.Item) -> bool:
        every = SELDOM.get(item.path.name, 1)
        return self._round % every == every - 1

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Find out whether the test is alone with itself."""
        self._alone = True
        answer = yield
        if self._alone:
            self.single.add(item.nodeid)
        return answer

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self) -> None:
        """A thread that a fixture has started earlier is company, too; the doors' collector never ends."""
        names = {thread.name for thread in threading.enumerate()} - {"MainThread", "gpu_fsm-forgotten"}
        self._alone &= not names

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Hear of every thread and every loop that is started in this process."""

        def heard(start: Callable[..., None]) -> Callable[..., None]:
            def start_and_tell(*args: Any) -> None:
                self._alone = False
                start(*args)

            return start_and_tell

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading.Thread, "start", heard(threading.Thread.start))
            patch.setattr(asyncio.BaseEventLoop, "run_forever", heard(asyncio.BaseEventLoop.run_forever))
            yield

    def _tell(self, text: str, end: str = "\n") -> None:
        if not self.quiet:
            print(text, end=end, flush=True)


def let_go() -> None:
    """Managers that a test left open hang on the end of the interpreter: hundreds of rounds would drown in them."""
    from gpu_fsm import GPUResourceManager  # not before pytest: the package is one of its plugins

    for manager in [thing for thing in gc.get_objects() if type(thing) is GPUResourceManager]:
        manager._at_exit.detach()
    gc.collect()


def in_jobs(times: int, seed: int, jobs: int) -> int:
    """Share the rounds between processes and add up what they tell."""
    command = [
        sys.executable,
        "-m",
        "tests.concurrency",
        f"--times={times}",
        f"--seed={seed}",
        f"--jobs={jobs}",
        "--json",
    ]
    running = [subprocess.Popen([*command, "--share", str(n)], stdout=subprocess.PIPE, text=True) for n in range(jobs)]
    told = [json.loads(job.communicate()[0].splitlines()[-1]) for job in running]
    whole = {key: sum(one[key] for one in told) for key in ("rounds", "runs", "skipped")}
    flakes = [flake for one in told for flake in one["flakes"]]
    print(json.dumps({**told[0], **whole, "flakes": flakes, "seconds": max(one["seconds"] for one in told)}))
    return max(job.returncode for job in running)


def main() -> int:
    """Run the rounds; 0 if every test held in each."""
    parser = argparse.ArgumentParser(prog="python -m tests.concurrency", description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=200, help="rounds (default 200)")
    parser.add_argument("--seed", type=int, default=None, help="of the orders; a random one by default")
    parser.add_argument("--round", type=int, default=None, help="only this round")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the rounds (default 1)")
    parser.add_argument("--share", type=int, default=0, help="only every round of so many jobs, from this one on")
    parser.add_argument("--json", action="store_true", help="nothing but one JSON object on stdout")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    if args.jobs > 1 and "--share" not in sys.argv and args.round is None:
        return in_jobs(args.times, seed, args.jobs)
    mine = range(args.share, args.times, args.jobs) if args.round is None else range(args.round, args.round + 1)
    rounds = Rounds(mine, seed, quiet=args.json)
    files = [str(HERE / name) for name in (*FILES, *SELDOM)]
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
        "single_threaded": len(rounds.single),
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
