"""The long proof: runs that add up, in which no seed is told twice.

    python -m tests.reliability                               # every part that is not complete, an hour at most
    python -m tests.reliability --only lives --minutes 10     # two parts may run at the same time, in two processes
    python -m tests.reliability --status                      # the sums against the targets
    python -m tests.reliability --only lives --seed 1000017   # one seed again, with what came of it; writes nothing

What has been told stands in `tests/reliability.json`, which this command alone writes: after each batch, in one piece,
so that a run that is interrupted or killed loses a batch at most, and the next one goes on from there.

A seed counts once for its part, whatever the commit: the next run takes the seeds that no run has taken.  The pairs of
faults are a list that the code itself decides, so only what was told of the newest list counts.  A seed that broke a
promise is told again, first of all, by the first run at another commit; where it holds there, the violation is mended.
Nothing is told of a tree with changes that no commit names.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import hashlib
import importlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attrs import field, frozen
from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "tests" / "reliability.json"

BATCH_S = 10.0
"""How much work may be lost; a seed that takes longer is a batch of its own."""

MOST_MINUTES = 60.0

EXPLORED_S = 1200.0
"""The bound of a walk that does not close, in real seconds."""

STORY_CHARACTERS = 6000
"""Of a violation's story so much is kept; the seed tells it again."""

WHAT_RAN = ("gpu_fsm", "tests", "pyproject.toml", "setup.cfg", ":(exclude)tests/reliability.json*")
"""What must be as the commit says."""


@frozen(kw_only=True)
class Told:
    """What one seed came to."""

    counts: Mapping[str, float]
    violation: str = ""
    """The broken promise and how it came about; empty where every promise was kept."""
    facts: Mapping[str, Any] = {}
    """What does not add up: bounds that were reached, figures measured.  Such a seed is a batch, and an entry."""


@frozen(kw_only=True)
class Part:
    """One kind of proof."""

    name: str
    what: str
    targets: Mapping[str, float]
    """How much of each count is wanted."""
    first: int = 0
    """The first seed; the tests themselves take theirs from 0."""
    seeds: int | None = None
    """There are no more than these; None where a seed is a number like any other."""
    needs_s: float = 0.0
    """A seed is not begun with less than so many real seconds left: it is not cut off."""
    is_list: bool = False
    """Its seeds count through a list that the code decides; `plan` tells its digest, and how long it is."""
    tell: Callable[[int, float], Told] | None = field(default=None)
    """(seed, real seconds left) -> what it came to; None takes the function of the part's name."""

    def ready(self) -> tuple[Callable[[int, float], Told], dict[str, Any]]:
        """Import what tells it; returns that, and the plan of a list."""
        if self.tell is not None:
            return self.tell, {}
        module = importlib.import_module("tests.reliability_parts")
        plan = dict(getattr(module, f"{self.name}_plan")()) if self.is_list else {}
        return getattr(module, self.name), plan


PARTS = (
    Part(
        name="agent",
        what="an agent's month in one process: threaded manager, asyncio loop, control socket; nothing grows",
        targets={"simulated days": 30, "switches": 10_000},
        needs_s=900.0,
    ),
    Part(
        name="explorer",
        what="every configuration with a queue of 2 and 2 faults at the same time",
        targets={"worlds": 2},
        seeds=2,
        needs_s=EXPLORED_S,
    ),
    Part(
        name="pairs",
        what="every fault at every call of RECORDING, AUTOPILOT, load, unload and close, with every fault at every "
        "later call of it or of the recovery; then healed and back",
        targets={},
        is_list=True,
    ),
    Part(
        name="lives",
        what="scenarios from a seed: chaos, healing, convergence, everything works, empty card",
        targets={"scenarios": 20_000, "simulated days": 140},
        first=1_000_000,
    ),
    Part(
        name="rules",
        what="executed rules of the stateful machine",
        targets={"rules": 300_000},
        first=1_000_000,
    ),
    Part(
        name="histories",
        what="linearizable histories of 5 clients with 6 calls each, threads and tasks",
        targets={"histories": 10_000},
    ),
    Part(
        name="hostile",
        what="answers of a hostile server",
        targets={"cases": 200_000},
        first=1_000_000,
    ),
)
"""In the order in which they run."""


# --- what has been told ---


class Damaged(Exception):
    """The file is not one that this command has written."""


class Ledger:
    """The file, as it was when it was read."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.entries = entries

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Empty where there is no file.  Raises `Damaged`."""
        try:
            ledger = cls(json.loads(path.read_text(encoding="utf-8"))["runs"])
            for name, digest in {(entry["part"], entry["facts"].get("list")) for entry in ledger.entries}:
                ledger.taken(name, digest)
        except FileNotFoundError:
            return cls([])
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{path} is not what this command has written: {error!r}") from error
        return ledger

    def write(self, path: Path) -> None:
        """As a whole or not at all."""
        new = path.with_name(f"{path.name}.new")
        with new.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"runs": self.entries}, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)

    def of(self, part: str) -> list[dict[str, Any]]:
        """The entries of a part that count: of a list only those of its newest form."""
        entries = [entry for entry in self.entries if entry["part"] == part and _is_commit(entry["commit"])]
        digest = entries[-1]["facts"].get("list") if entries else None
        return [entry for entry in entries if entry["facts"].get("list") == digest]

    def taken(self, part: str, digest: str | None = None) -> set[int]:
        """The seeds that were told, of the list with this digest.  Raises `ValueError` where one was told twice."""
        seeds: list[int] = []
        for entry in self.entries:
            if entry["part"] == part and entry["facts"].get("list") == digest:
                seeds += [seed for first, last in entry["seeds"] for seed in range(first, last + 1)]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"a seed of {part} counts twice")
        return set(seeds)

    def broken(self, part: str) -> list[dict[str, Any]]:
        """Every violation that was found, in what counts."""
        return [violation for entry in self.of(part) for violation in entry["violations"]]

    def violations(self, part: str) -> list[dict[str, Any]]:
        """Those that are not mended."""
        return [violation for violation in self.broken(part) if "mended" not in violation]


def _is_commit(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{40}", text) is not None


@frozen(kw_only=True)
class Sum:
    """A part, added up."""

    part: Part
    counts: Mapping[str, float]
    entries: Sequence[Mapping[str, Any]]
    open: int
    """Violations that are not mended."""
    mended: int

    @property
    def share(self) -> float:
        """How much of the target is reached, from 0 to 1."""
        if self.part.is_list:
            whole = self.entries[-1]["facts"]["of"] if self.entries else 1
            return min(1.0, self.counts.get("seeds", 0) / whole)
        reached = [self.counts.get(name, 0) / target for name, target in self.part.targets.items()]
        return min(1.0, *reached)

    @property
    def is_complete(self) -> bool:
        """Nothing is left to be told."""
        return self.share >= 1.0

    @property
    def done(self) -> str:
        """In words, for the table."""
        if self.part.name == "explorer":
            return "; ".join(_walked(entry["facts"]) for entry in self.entries) or "nothing yet"
        return _amounts({name: count for name, count in self.counts.items() if name != "seeds"}) or "nothing yet"

    @property
    def target(self) -> str:
        """In words."""
        if self.part.is_list:
            return f"all {self.entries[-1]['facts']['pairs']:,}" if self.entries else "all"
        return "closed, or the bound" if self.part.name == "explorer" else _amounts(self.part.targets)

    @property
    def commits(self) -> list[str]:
        """Short, in the order of running."""
        return list(dict.fromkeys(entry["commit"][:10] for entry in self.entries))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "counts": dict(self.counts),
            "targets": dict(self.part.targets) or self.target,
            "complete": self.is_complete,
            "violations": self.open,
            "mended": self.mended,
            "commits": self.commits,
            "wall_s": round(sum(entry["wall_s"] for entry in self.entries), 1),
            "cpu_s": round(sum(entry["cpu_s"] for entry in self.entries), 1),
        }


def _amounts(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{count:,.1f} {name}".replace(".0 ", " ") for name, count in counts.items())


def _walked(facts: Mapping[str, Any]) -> str:
    end = "closed" if facts["closed"] else f"everything within {facts['searched']} actions, then {facts['bound']}"
    return f"{facts['world']}: {facts['configurations']:,} configurations, {facts['edges']:,} edges, {end}"


def add_up(ledger: Ledger, parts: Iterable[Part] = PARTS) -> list[Sum]:
    """Every part with what has been told of it."""
    sums = []
    for part in parts:
        entries = ledger.of(part.name)
        counts: Counter[str] = Counter()
        for entry in entries:
            counts.update(entry["counts"])
            counts["seeds"] += sum(last - first + 1 for first, last in entry["seeds"])
        named = {name: counts[name] for name in (*part.targets, *counts) if name in counts}
        found, left = len(ledger.broken(part.name)), len(ledger.violations(part.name))
        sums.append(Sum(part=part, counts=named, entries=entries, open=left, mended=found - left))
    return sums


def table(ledger: Ledger, parts: Iterable[Part] = PARTS) -> str:
    """The sums in Markdown, for the README too."""
    lines = ["| part | what | told | target | violations | CPU, wall | commits |", "|---|---|---|---|---|---|---|"]
    for total in add_up(ledger, parts):
        broken = f"{total.open}" + (f" ({total.mended} mended)" if total.mended else "")
        took = [sum(entry[name] for entry in total.entries) / 60.0 for name in ("cpu_s", "wall_s")]
        commits = ", ".join(f"`{commit}`" for commit in total.commits)
        minutes = "{:.0f}, {:.0f} min".format(*took)
        cells = (total.part.name, total.part.what, total.done, total.target, broken, minutes, commits)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- where it runs ---


def machine() -> dict[str, Any]:
    """What kind of machine this is, and not whose."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
        model = found[1] if found else model
    kernel = re.match(r"[\d.]*\d", platform.release())  # what follows the numbers may name a workplace
    return {
        "cpu": model or platform.machine(),
        "cores": os.cpu_count(),
        "os": f"{platform.system()} {kernel[0] if kernel else ''}".strip(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


class NotTold(Exception):
    """Why nothing can be told here and now."""


def commit(root: Path = ROOT) -> str:
    """What the tree is, in 40 digits.  Raises `NotTold` where it has been changed since, or nobody knows."""
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", *WHAT_RAN)
    except (OSError, subprocess.SubprocessError) as error:
        raise NotTold(f"no commit names this tree: {error}") from error
    if changed:
        raise NotTold(f"the tree has changes that no commit names (--dry-run tells without writing):\n{changed}")
    return head


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60.0).stdout.strip()


# --- running ---


def say(text: str) -> None:
    """Progress is for people; the summary alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Run:
    """One part in this process, until it is complete or the time is over."""

    def __init__(self, part: Part, path: Path, deadline: float, *, commit: str, dry: bool = False) -> None:
        self.part, self.path, self.deadline, self.dry = part, path, deadline, dry
        self.commit = commit
        self.entry: dict[str, Any] = {}
        """The newest entry of this run, as it stands in the file."""
        self.violations = 0
        self.began = time.monotonic()
        self.told: Counter[str] = Counter()

    def __call__(self) -> int:
        """Returns how many violations are open; where one is found, the part ends."""
        tell, plan = self.part.ready()
        try:
            with self._lock(self.part.name, timeout=0):
                if self._mend(tell, plan):
                    self._go_on(Ledger.read(self.path), tell, plan)
        except Timeout:
            raise NotTold(f"{self.part.name} is being told by another process") from None
        return self.violations if self.dry else len(Ledger.read(self.path).violations(self.part.name))

    def _lock(self, name: str, timeout: float = 60.0) -> FileLock:
        """Beside no tracked file: a lock that stays behind is no change of the tree."""
        digest = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:12]
        return FileLock(Path(tempfile.gettempdir()) / f"gpu_fsm-reliability-{digest}-{name}.lock", timeout=timeout)

    def _left_s(self) -> float:
        return self.deadline - time.monotonic()

    def _mend(self, tell: Callable[[int, float], Told], plan: Mapping[str, Any]) -> bool:
        """Tell again what was broken at another commit; returns whether all of it holds now."""
        for entry in () if self.dry else Ledger.read(self.path).entries:
            if (entry["part"], entry["facts"].get("list")) != (self.part.name, plan.get("list")):
                continue
            for seed in [violation["seed"] for violation in entry["violations"] if "mended" not in violation]:
                if entry["commit"] == self.commit:
                    return False
                told = tell(seed, self._left_s())
                if told.violation:
                    say(f"{self.part.name}: seed {seed} is still broken: {told.violation}")
                    return False
                say(f"{self.part.name}: seed {seed} holds now")
                self._mark(seed, told, plan)
        return True

    def _mark(self, seed: int, told: Told, plan: Mapping[str, Any]) -> None:
        """Mended; and what does not add up is as it is now."""
        with self._lock("file"):
            ledger = Ledger.read(self.path)
            for entry in ledger.entries:
                if (entry["part"], entry["facts"].get("list")) == (self.part.name, plan.get("list")):
                    for violation in entry["violations"]:
                        if violation["seed"] == seed:
                            violation["mended"] = self.commit
                            entry["facts"] |= told.facts
            ledger.write(self.path)

    def _seeds(self, ledger: Ledger, plan: Mapping[str, Any]) -> Iterator[int]:
        taken = ledger.taken(self.part.name, plan.get("list"))
        end = plan.get("of", self.part.seeds)
        seed = self.part.first
        while end is None or seed < self.part.first + end:
            if seed not in taken:
                yield seed
            seed += 1

    def _go_on(self, ledger: Ledger, tell: Callable[[int, float], Told], plan: Mapping[str, Any]) -> None:
        is_new = plan and not ledger.taken(self.part.name, plan["list"])
        before = {} if is_new else add_up(ledger, [self.part])[0].counts
        batch = _Batch()
        try:
            for seed in self._seeds(ledger, plan):
                if self._left_s() <= self.part.needs_s or self._is_enough(before):
                    break
                told = tell(seed, self._left_s())
                batch.facts = {**plan, **told.facts}
                batch.told.append((seed, told))
                self.told.update({**told.counts, "seeds": 1})
                if told.facts or batch.wall_s >= BATCH_S:
                    batch = self._close(batch, before)
                if told.violation:
                    self.violations += 1
                    again = f"python -m tests.reliability --only {self.part.name} --seed {seed}"
                    say(f"{self.part.name}: VIOLATION, seed {seed} ({again}):\n{told.violation}")
                    break
        finally:  # also where it is interrupted: only the seed in hand is lost
            self._close(batch, before)

    def _is_enough(self, before: Mapping[str, float]) -> bool:
        targets = self.part.targets
        return bool(targets) and all(before.get(name, 0) + self.told[name] >= targets[name] for name in targets)

    def _progress(self, before: Mapping[str, float], whole: float) -> None:
        targets = dict(self.part.targets) or {"seeds": whole}
        now = {name: before.get(name, 0) + self.told[name] for name in targets}
        share = min(1.0, *(now[name] / target for name, target in targets.items()))
        gained = share - min(1.0, *(before.get(name, 0) / target for name, target in targets.items()))
        elapsed = time.monotonic() - self.began
        left = f"about {clock(elapsed / gained * (1.0 - share))} to go" if gained > 0 else "nobody knows how long to go"
        amounts = ", ".join(f"{now[name]:,.0f} of {target:,.0f} {name}" for name, target in targets.items())
        say(f"{self.part.name}: {amounts} ({share:.1%}), {clock(elapsed)} elapsed, {left}")

    def _close(self, batch: _Batch, before: Mapping[str, float]) -> _Batch:
        """Add a batch to this run's entry and write it; returns the next one."""
        if batch.told:
            if not self.dry:
                self._write(batch)
            self._progress(before, batch.facts.get("of", 1))
        return _Batch()

    def _write(self, batch: _Batch) -> None:
        with self._lock("file"):
            ledger = Ledger.read(self.path)
            mine = [entry for entry in ledger.entries if entry == self.entry and entry["facts"] == batch.facts]
            if not mine:
                mine = [self._new_entry(batch)]
                ledger.entries += mine
            batch.add_to(mine[0])
            ledger.write(self.path)
        self.entry = mine[0]

    def _new_entry(self, batch: _Batch) -> dict[str, Any]:
        return {
            "part": self.part.name,
            "commit": self.commit,
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "seeds": [],
            "counts": {},
            "facts": dict(batch.facts),
            "violations": [],
            "wall_s": 0.0,
            "cpu_s": 0.0,
        }


class _Batch:
    """What has been told and not been written."""

    def __init__(self) -> None:
        self.told: list[tuple[int, Told]] = []
        self.facts: dict[str, Any] = {}
        self._began, self._cpu = time.monotonic(), time.process_time()

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._began

    def add_to(self, entry: dict[str, Any]) -> None:
        """Put it into an entry of the file."""
        for seed, told in self.told:
            if entry["seeds"] and entry["seeds"][-1][1] == seed - 1:
                entry["seeds"][-1][1] = seed
            else:
                entry["seeds"].append([seed, seed])
            for name, count in told.counts.items():
                entry["counts"][name] = round(entry["counts"].get(name, 0) + count, 6)
            if told.violation:
                entry["violations"].append({"seed": seed, "story": told.violation[:STORY_CHARACTERS]})
        entry["wall_s"] = round(entry["wall_s"] + self.wall_s, 3)
        entry["cpu_s"] = round(entry["cpu_s"] + time.process_time() - self._cpu, 3)


def in_turn(parts: Sequence[Part], path: Path, deadline: float, *, commit: str, dry: bool) -> tuple[int, list[str]]:
    """One part after the other in this process; returns the violations, and what could not be told."""
    broken, problems = 0, []
    for part in parts:
        if deadline - time.monotonic() <= part.needs_s:
            say(f"{part.name}: not enough time left")
            continue
        try:
            broken += Run(part, path, deadline, commit=commit, dry=dry)()
        except NotTold as why:
            problems.append(str(why))
            say(f"{part.name}: {why}")
    return broken, problems


def side_by_side(parts: Sequence[Part], jobs: int, options: argparse.Namespace) -> int:
    """Each part in a process of its own; returns the exit code."""
    deadline = time.monotonic() + options.minutes * 60.0
    children: list[subprocess.Popen[bytes]] = []

    def one(part: Part) -> int:
        minutes = (deadline - time.monotonic()) / 60.0
        command = [
            sys.executable,
            "-m",
            "tests.reliability",
            "--only",
            part.name,
            "--minutes",
            f"{max(minutes, 1e-3):.3f}",
        ]
        command += ["--file", str(options.file), *(["--dry-run"] if options.dry_run else [])]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        children.append(child)
        return child.wait()

    with ThreadPoolExecutor(jobs) as pool:
        try:
            codes = list(pool.map(one, parts))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                if child.poll() is None:
                    child.send_signal(signal.SIGINT)
            raise
    return 1 if 1 in codes else 2 if any(codes) else 0


def tell_again(part: Part, seed: int) -> int:
    """One seed, for people; 1 where it breaks a promise."""
    tell, _ = part.ready()
    told = tell(seed, MOST_MINUTES * 60.0)
    print(json.dumps({"part": part.name, "seed": seed, "counts": told.counts, "facts": told.facts}, indent=1))
    if told.violation:
        print(told.violation)
    return 1 if told.violation else 0


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value <= MOST_MINUTES:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {MOST_MINUTES:g} minutes")
    return value


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS, root: Path = ROOT) -> int:
    """The command: 0, or 1 where a promise is broken, 2 where nothing can be told, 130 where it was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=(__doc__ or "").splitlines()[0])
    names = [part.name for part in parts]
    parser.add_argument("--minutes", type=_minutes, default=MOST_MINUTES, metavar="N", help="at most so long (60)")
    parser.add_argument("--only", action="append", choices=names, help="this part; may be given again")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many parts at the same time")
    parser.add_argument("--seed", type=int, metavar="N", help="tell this one again; writes nothing")
    parser.add_argument("--status", action="store_true", help="print the sums, run nothing")
    parser.add_argument("--dry-run", action="store_true", help="run, also in a changed tree, and write nothing")
    parser.add_argument("--json", action="store_true", help="print the sums as JSON")
    parser.add_argument("--file", type=Path, default=FILE, metavar="PATH", help="not tests/reliability.json")
    options = parser.parse_args(arguments)
    chosen = [part for part in parts if part.name in (options.only or names)]
    if options.seed is not None:
        if len(chosen) != 1:
            parser.error("--seed needs --only PART")
        return tell_again(chosen[0], options.seed)
    broken, problems, code = 0, list[str](), 0
    try:
        if options.status:
            broken = sum(len(Ledger.read(options.file).violations(part.name)) for part in chosen)
        else:
            if options.jobs == 1 and any(part.tell is None for part in chosen):
                importlib.import_module("tests.reliability_parts")  # before the tree is looked at: this is what runs
            head = "" if options.dry_run else commit(root)
            if options.jobs > 1 and len(chosen) > 1:
                code = side_by_side(chosen, options.jobs, options)
            else:
                deadline = time.monotonic() + options.minutes * 60.0
                broken, problems = in_turn(chosen, options.file, deadline, commit=head, dry=options.dry_run)
        ledger = Ledger.read(options.file)
    except (NotTold, Damaged) as why:
        say(str(why))
        return 2
    except KeyboardInterrupt:
        say("interrupted; what was written stays")
        return 130
    code = code or (1 if broken else 2 if problems else 0)
    if options.json:
        sums = {total.part.name: total.to_dict() for total in add_up(ledger, chosen)}
        print(json.dumps({"ok": code == 0, "problems": problems, "parts": sums}, indent=1))
    else:
        print(table(ledger, chosen))
    return code


if __name__ == "__main__":  # not this twin of it: the parts know the module by its name
    sys.exit(importlib.import_module("tests.reliability").main())
