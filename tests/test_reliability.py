"""The long proof's command: it adds up, goes on where it was killed, and never says more than what was told."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest

from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.testing import scenario
from tests import reliability
from tests.reliability import PARTS, Ledger, NotTold, Part, Told, main
from tests.waiting import PATIENCE_S, ROOT, until

BY_NAME = {part.name: part for part in PARTS}


class Tree:
    """A repository of its own, with a file for what is told."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path / "tests" / "reliability.json"
        self.file.parent.mkdir(parents=True)
        self.git("init", "-q")
        self.commit("first")

    def git(self, *arguments: str) -> str:
        author = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", "-C", str(self.path), *author, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit(self, name: str) -> str:
        """Another tree, and the commit that names it."""
        (self.path / "tests" / "code.py").write_text(f"# {name}\n", encoding="utf-8")
        self.git("add", "tests/code.py")
        self.git("commit", "-q", "-m", name)
        return self.git("rev-parse", "HEAD")

    def run(self, *options: str, parts: Sequence[Part]) -> int:
        """The command, in this process."""
        return main(["--file", str(self.file), *options], parts, self.path)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """What is in the file."""
        return Ledger.read(self.file).entries


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A tree without changes, of which nothing has been told."""
    return Tree(tmp_path / "tree")


def counting(most: float, *, name: str = "numbers", also: Callable[[int], object] = lambda seed: None) -> Part:
    """A part whose seeds count 1 each."""

    def tell(seed: int, left_s: float) -> Told:
        also(seed)
        return Told(counts={"numbers": 1})

    return Part(name=name, what="numbers", targets={"numbers": most}, tell=tell)


# --- adding up ---


def test_a_run_goes_on_where_the_last_one_ended(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """Until the target is reached; no seed is told twice, and each entry names its commit and its kind of machine."""
    told: list[int] = []
    commits = [tree.git("rev-parse", "HEAD")]
    assert tree.run(parts=[counting(4, also=told.append)]) == 0
    commits.append(tree.commit("second"))
    for _ in range(2):
        assert tree.run("--json", parts=[counting(9, also=told.append)]) == 0
    assert told == list(range(9))
    assert [(entry["commit"], entry["seeds"]) for entry in tree.entries] == [
        (commits[0], [[0, 3]]),
        (commits[1], [[4, 8]]),
    ]
    assert platform.node() not in json.dumps(tree.entries)
    document = capsys.readouterr().out.rpartition("\n{\n")[2]
    said = json.loads(f"{{{document}")["parts"]["numbers"]
    assert (said["counts"]["numbers"], said["complete"], said["violations"]) == (9, True, 0)
    assert tree.run("--status", parts=[counting(9)]) == 0
    assert "| numbers | numbers | 9 numbers | 9 numbers | 0 |" in capsys.readouterr().out


def test_what_was_told_stays_when_somebody_interrupts(tree: Tree) -> None:
    """Only the seed in hand is lost."""

    def interrupt(seed: int) -> None:
        if seed == 3:
            raise KeyboardInterrupt

    assert tree.run(parts=[counting(9, also=interrupt)]) == 130
    assert tree.entries[0]["seeds"] == [[0, 2]]


SLOWLY = """
import sys, threading
from pathlib import Path
from tests import reliability
from tests.reliability import Part, Told, main

def tell(seed, left_s):
    threading.Event().wait(0.005)
    return Told(counts={"numbers": 1})

reliability.BATCH_S = 0.05
parts = [Part(name=name, what="", targets={"numbers": 200}, tell=tell) for name in ("one", "two")]
sys.exit(main(sys.argv[2:], parts, Path(sys.argv[1])))
"""


def slowly(tree: Tree, name: str) -> subprocess.Popen[bytes]:
    """A second's work in a process of its own, in many batches."""
    command = [sys.executable, "-c", SLOWLY, str(tree.path), "--file", str(tree.file), "--only", name]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_kill_in_the_middle_costs_a_batch_at_most(tree: Tree) -> None:
    """The file is whole at any moment, and another process tells the rest; beside it another part is told."""
    killed, beside = slowly(tree, "one"), slowly(tree, "two")
    until(lambda: any(entry["part"] == "one" for entry in Ledger.read(tree.file).entries))
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait(PATIENCE_S) == -signal.SIGKILL
    assert 0 < sum(entry["counts"]["numbers"] for entry in tree.entries if entry["part"] == "one") < 200
    rest = slowly(tree, "one")
    assert (rest.wait(PATIENCE_S), beside.wait(PATIENCE_S)) == (0, 0)
    sums = reliability.add_up(Ledger.read(tree.file), [counting(200, name="one"), counting(200, name="two")])
    assert [(total.counts["numbers"], total.is_complete) for total in sums] == [(200, True), (200, True)]


def test_a_part_is_told_by_one_process_at_a_time(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """The second one is told so; nothing is counted twice."""
    part = counting(3)
    nested = []
    outer = counting(3, also=lambda seed: nested.append(tree.run(parts=[part])))
    assert tree.run(parts=[outer]) == 0
    assert set(nested) == {2}
    assert "another process" in capsys.readouterr().err
    assert tree.entries[0]["counts"] == {"numbers": 3}


def test_parts_side_by_side_are_processes_of_their_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each says what it does, and the exit code is theirs."""
    chosen = ["--only", "histories", "--only", "hostile", "--file", str(tmp_path / "nothing-told-yet.json")]
    assert main([*chosen, "--jobs", "2", "--minutes", "0.02", "--dry-run"]) == 0
    said = capfd.readouterr().err
    assert re.search(r"histories: [\d,]+ of 10,000", said)
    assert re.search(r"hostile: [\d,]+ of 200,000", said)


def test_a_seed_that_counts_twice_is_no_sum(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is a file that is not ours."""
    tree.run(parts=[counting(3)])
    entries = tree.entries
    Ledger([*entries, *entries]).write(tree.file)
    assert tree.run("--status", parts=[counting(3)]) == 2
    assert "counts twice" in capsys.readouterr().err
    tree.file.write_text("[]", encoding="utf-8")
    assert tree.run(parts=[counting(3)]) == 2


def test_a_list_that_has_changed_is_told_anew(tree: Tree) -> None:
    """Its seeds are places in a list that the code decides; what was told of another list does not count."""

    class Listed(Part):
        plan: ClassVar[dict[str, Any]] = {}

        def ready(self) -> Any:
            return lambda seed, left_s: Told(counts={"pairs": 10}), self.plan

    part = Listed(name="pairs", what="", targets={}, is_list=True)
    sums = []
    for Listed.plan in ({"list": "a", "of": 3, "pairs": 30}, {"list": "b", "of": 2, "pairs": 20}):
        assert tree.run(parts=[part]) == 0
        [total] = reliability.add_up(Ledger.read(tree.file), [part])
        sums.append((total.counts["pairs"], total.target, total.is_complete))
    assert sums == [(30, "all 30", True), (20, "all 20", True)]


# --- what may be told ---


def test_a_tree_that_no_commit_names_is_refused(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run tells and writes nothing; the file itself is no change."""
    (tree.path / "tests" / "code.py").write_text("changed", encoding="utf-8")
    told: list[int] = []
    assert tree.run(parts=[counting(3, also=told.append)]) == 2
    assert "tests/code.py" in capsys.readouterr().err
    assert not told
    assert tree.run("--dry-run", parts=[counting(3, also=told.append)]) == 0
    assert (told, tree.file.exists()) == ([0, 1, 2], False)
    tree.commit("named")
    tree.file.write_text('{"runs": []}', encoding="utf-8")
    assert tree.run(parts=[counting(3)]) == 0
    with pytest.raises(NotTold, match="no commit"):
        reliability.commit(tree.path.parent)


@pytest.mark.parametrize("argv", [["--minutes", "61"], ["--minutes", "0"], ["--only", "nothing"], ["--seed", "1"]])
def test_bad_options_are_refused(argv: list[str]) -> None:
    """Exit code 2; a run takes an hour at most."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2


def test_the_time_is_a_bound(tree: Tree) -> None:
    """Nothing begins after it."""
    told: list[int] = []
    assert tree.run("--minutes", "0.001", parts=[counting(2e5, also=told.append), counting(1, name="late")]) == 0
    assert 0 < len(told) < 2e5
    assert {entry["part"] for entry in tree.entries} == {"numbers"}
    long = attrs.evolve(counting(3, name="long"), needs_s=61.0)
    assert tree.run("--minutes", "1", parts=[long]) == 0
    assert "long" not in {entry["part"] for entry in tree.entries}


# --- violations ---


class Forgetful(SimulatedWorld):
    """Says that no VLM is there, whatever has been loaded."""

    def vlm_resident(self) -> bool:
        return False


def test_a_violation_is_written_down_with_its_story_and_the_other_parts_go_on(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, also the next time; at a commit where the seed holds again it is mended, and counts only once."""
    parts = [attrs.evolve(BY_NAME["lives"], targets={"scenarios": 2}), counting(2)]
    with monkeypatch.context() as patch:
        patch.setattr(scenario, "SimulatedWorld", Forgetful)
        assert tree.run("--dry-run", parts=parts) == 1
        assert tree.run(parts=parts) == 1
        assert "--only lives --seed 1000000" in capsys.readouterr().err
        assert main(["--only", "lives", "--seed", "1000000"]) == 1
    broken, other = tree.entries
    assert broken["violations"][0]["seed"] == 1_000_000
    assert "RECORDING" in broken["violations"][0]["story"]
    assert broken["violations"][0]["story"].count("\n") > 3
    assert other["counts"] == {"numbers": 2}

    assert tree.run(parts=parts) == 1, "the same commit breaks the same promise"
    mending = tree.commit("mended")
    assert tree.run(parts=parts) == 0
    assert tree.entries[0]["violations"][0]["mended"] == mending
    assert [entry["seeds"] for entry in tree.entries if entry["part"] == "lives"] == [
        [[1_000_000, 1_000_000]],
        [[1_000_001, 1_000_001]],
    ]
    assert "0 (1 mended)" in reliability.table(Ledger.read(tree.file), parts)


# --- the parts themselves ---


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds that take a moment."""
    from tests import reliability_parts as parts

    for name, value in {"CASES": 20, "EXAMPLES": 2, "EXPLORED_S": 0.3, "DAYS": 0.05, "SWITCHES": 20}.items():
        monkeypatch.setattr(parts, name, value)
    monkeypatch.setattr(parts, "MOST_GROWTH_BYTES", 50 << 20)  # nothing is warm yet
    monkeypatch.setattr(parts, "MAIN", ("look",))
    parts._firsts.cache_clear()


@pytest.mark.parametrize("name", BY_NAME)
def test_each_part_tells_its_first_seed(name: str, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts what its target asks for, and keeps every promise."""
    pytest.importorskip("PIL", reason="pillow is not installed")
    small(monkeypatch)
    part = BY_NAME[name]
    tiny = attrs.evolve(part, targets=dict.fromkeys(part.targets, 1e-9), seeds=part.seeds and 1, needs_s=0.0)
    assert tree.run(parts=[tiny]) == 0
    entry = tree.entries[0]
    assert entry["violations"] == []
    assert {*part.targets} <= {*entry["counts"]}
    assert all(entry["counts"][unit] > 0 for unit in part.targets)
    assert reliability.table(Ledger.read(tree.file), [part]).count("nothing yet") == 0


def test_the_agents_growth_is_found(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A life that keeps something of every switch breaks its promise."""
    pytest.importorskip("PIL", reason="pillow is not installed")
    small(monkeypatch)
    from tests import reliability_parts as parts

    kept: list[bytes] = []
    real = parts.AgentLife._forget
    monkeypatch.setattr(parts.AgentLife, "_forget", lambda life: (kept.append(bytes(1 << 17)), real(life)))
    monkeypatch.setattr(parts, "MOST_GROWTH_BYTES", 1 << 21)
    assert tree.run(parts=[attrs.evolve(BY_NAME["agent"], targets={"switches": 1}, needs_s=0.0)]) == 1
    assert "KiB grown by" in tree.entries[0]["violations"][0]["story"]


# --- what the README says ---


def test_the_readme_shows_the_sums() -> None:
    """Drawn by `python -m tests.tools.generate`."""
    assert reliability.table(Ledger.read(reliability.FILE)) in (ROOT / "README.md").read_text(encoding="utf-8")


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What git says of this tree."""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)


def test_the_commits_that_count_are_in_the_history() -> None:
    """A sum of what nobody can look up is none."""
    commits = {entry["commit"] for entry in Ledger.read(reliability.FILE).entries}
    if not (ROOT / ".git").exists() or git("rev-parse", "--is-shallow-repository").stdout != "false\n":
        pytest.skip("not a whole git checkout")
    for commit in commits:
        assert re.fullmatch("[0-9a-f]{40}", commit)
        assert git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0, f"{commit} is not in the history"
