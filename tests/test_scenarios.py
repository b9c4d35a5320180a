"""Lives from a seed: the same on every CPython, a thousand of them without a broken promise.

`gpu_fsm.testing.scenario` tells them.  `python -m gpu_fsm.testing.scenario --seeds 0-39 --digests` prints what belongs
into `data/scenario-digests.txt` after a change of the machine or of the world that is meant.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from gpu_fsm import guards
from gpu_fsm.leases import Holders, LeaseBook
from gpu_fsm.steps import Steps
from gpu_fsm.testing import scenario
from gpu_fsm.testing.scenario import Dice, Scenario, Summary
from tests.counts import say
from tests.waiting import ROOT

DIGESTS = Path(__file__).parent / "data" / "scenario-digests.txt"

FIRST, PER_EXAMPLE = 0, 10
"""The profile's examples times this many lives: 1,000 in CI, 200 in a brief run, 20,000 in a thorough one."""

LATER = 50_000
"""Seeds that no other test lives."""

KNOWN: dict[str, str] = {}
"""Broken promises that are known and not mended yet: what a violation contains, and why.  Counted, and printed."""


def committed() -> dict[int, str]:
    """Seed -> digest."""
    return {int(seed): digest for seed, digest in map(str.split, DIGESTS.read_text(encoding="ascii").splitlines())}


def digests(first: int, last: int, **environment: str) -> str:
    """What another process says about these lives."""
    command = [sys.executable, "-m", "gpu_fsm.testing.scenario", "--seeds", f"{first}-{last}", "--digests"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True)
    return done.stdout


# --- a seed decides everything ---


def test_the_same_seed_is_the_same_life_on_every_cpython() -> None:
    """Story, server log and journal have the digests that were committed, byte for byte."""
    lived = {seed: scenario.run(seed).digest for seed in committed()}
    changed = [seed for seed, digest in committed().items() if lived[seed] != digest]
    assert not changed, (
        f"seeds {changed} tell another life.  Where that is meant: python -m gpu_fsm.testing.scenario "
        f"--seeds 0-{max(lived)} --digests > tests/data/scenario-digests.txt"
    )


def test_the_same_seed_is_the_same_life_in_every_process() -> None:
    """Neither the order of hashes nor what was lived before plays a part."""
    scenario.run(5)
    expected = "".join(f"{seed} {scenario.run(seed).digest}\n" for seed in (6, 7))
    assert digests(6, 7, PYTHONHASHSEED="1") == digests(6, 7, PYTHONHASHSEED="2") == expected


def test_another_seed_is_another_life() -> None:
    """No two digests are equal."""
    assert len(set(committed().values())) == len(committed()) >= 20


def test_dice_fall_as_ever() -> None:
    """Only `random()` itself is asked, whose sequence for a seed is promised: these are its numbers."""
    dice = Dice(17)
    assert [dice.below(100) for _ in range(8)] == [52, 80, 96, 28, 76, 70, 66, 11]
    assert sorted(dice.shuffled(range(10))) == list(range(10))
    assert {dice.pick("abc") for _ in range(100)} == set("abc")
    assert 300 < sum(Dice(seed).chance(0.4) for seed in range(1000)) < 500


# --- many lives ---


def test_a_thousand_lives_keep_every_promise(request: pytest.FixtureRequest) -> None:
    """Chaos, healing, back to the asked mode within the bound, and then everything works and the card is empty."""
    summary = Summary()
    for seed in range(FIRST, FIRST + PER_EXAMPLE * settings().max_examples):
        summary.add(scenario.run(seed))
    known = [told for told in summary.violations if any(text in told for text in KNOWN)]
    say(request.config, f"{summary}{f', {len(known)} of them known' if known else ''}")
    unknown = [told for told in summary.violations if told not in known]
    assert not unknown, f"{len(unknown)} violations\n" + "\n".join(unknown[:10])
    if summary.scenarios >= 1000:
        assert summary.to_dict()["faults_covered"] >= 95, "hell is not hot enough"
        assert summary.to_dict()["rows_covered"] >= 66, "too little happens"
        assert 0.3 < summary.calm / summary.scenarios < 0.8, "some lives are calm and some are hell"


@pytest.mark.core
def test_sixty_lives_keep_every_promise() -> None:
    """The same judgement in a few seconds; other lives than the thousand, and each says at once what was broken."""
    for seed in range(LATER, LATER + 60):
        scenario.check(seed)


def room_for_everything(patch: pytest.MonkeyPatch) -> None:
    """Whoever asks for room is told yes."""
    patch.setattr(guards, "why_not", lambda s: None)
    patch.setitem(guards.PREDICATES, "fits", lambda s: True)


BROKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a release that is not waited for": lambda patch: patch.setattr(Steps, "_settle", lambda *_: None),
    "leases that nobody counts": lambda patch: patch.setattr(LeaseBook, "_holders", lambda _: Holders()),
    "a lease that never ends": lambda patch: patch.setattr(LeaseBook, "release", lambda *_: None),
    "room for everything": room_for_everything,
    "no way back": lambda patch: patch.setitem(guards.PREDICATES, "recoverable", lambda s: False),
    "shedding that sheds nothing": lambda patch: patch.setattr(Steps, "shed", lambda *_, **__: ()),
}


@pytest.mark.parametrize("what", BROKEN)
def test_lives_find_what_was_broken_on_purpose(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a few lives each of these comes out; a search that finds none of them proves nothing."""
    BROKEN[what](monkeypatch)
    assert any(scenario.run(seed).violation for seed in range(100)), f"{what} was not found"


def test_a_violation_names_its_seed_and_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the command that shows it again."""
    monkeypatch.setattr(LeaseBook, "release", lambda *_: None)
    seed = next(seed for seed in range(60) if scenario.run(seed).violation)
    with pytest.raises(
        scenario.Violation, match=rf"seed {seed}, gpu_fsm \S+, commit \S+: .*\n.*--seeds {seed} --story"
    ):
        scenario.check(seed)


def test_the_commit_of_somebody_else_s_repository_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed below another project's checkout names no commit of that project."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    author = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", str(tmp_path), *author, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(scenario, "__file__", str(tmp_path / "venv" / "lib" / "gpu_fsm" / "testing" / "scenario.py"))
    assert scenario.commit() is None
    monkeypatch.setattr(scenario, "__file__", str(tmp_path / "gpu_fsm" / "testing" / "scenario.py"))
    assert len(scenario.commit() or "") == 40


def test_a_process_that_is_killed_takes_no_broken_promise_with_it() -> None:
    """What was seen before the kill counts."""
    life = Scenario(0)
    life.judge._broken("S1", "planted")
    with pytest.raises(AssertionError, match="planted"):
        life._die()


def test_the_command_reports_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` prints one object with all counts; the exit code is 0 where nothing was broken."""
    assert scenario.main(["--seeds", "0-4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["scenarios"], said["violations"]) == (5, [])
    assert said["io_calls"] > 100
    assert scenario.main(["--seeds", "3", "--story"]) == 0
    assert "--- seed 3" in capsys.readouterr().out
