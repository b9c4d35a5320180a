"""`gpu-fsm fuzz`: a seed is a run, a bound is a bound, and what breaks is a program that anyone can run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test

from gpu_fsm.cli import ExitCode, main
from gpu_fsm.errors import BadArgument
from gpu_fsm.examples.planted_lease_bug import MendedStories, PlantedStories
from gpu_fsm.states import TABLE
from gpu_fsm.testing import fuzz as fuzzing
from gpu_fsm.testing.fuzz import FuzzReport, fuzz, load_machine, replay
from gpu_fsm.testing.stateful import GPUStateMachine
from tests.waiting import ROOT

PLANTED = "gpu_fsm.examples.planted_lease_bug:PlantedStories"
KEYS = {
    "steps", "examples", "violations", "seed", "states_covered", "rows_covered", "rows_total", "faults_covered",
    "guard_outcomes_covered", "machine", "gpu_fsm", "commit", "python", "hypothesis", "seconds", "story", "program",
}  # fmt: skip


def without_time(report: FuzzReport) -> dict[str, Any]:
    """What a seed decides."""
    return {name: value for name, value in report.to_dict().items() if name not in ("seconds", "steps_per_s")}


def fuzz_elsewhere(*options: str, hash_seed: int = 0) -> dict[str, Any]:
    """The command in a process of its own; returns its JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "gpu_fsm", "fuzz", "--json", *options],
        cwd=ROOT, env={"PYTHONHASHSEED": str(hash_seed)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "progress is for terminals"
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_seed_determines_the_run() -> None:
    """In any process, whatever the order of its sets; another seed is another run."""
    first, second = (fuzz_elsewhere("--examples", "12", "--seed", "5", hash_seed=n) for n in (1, 2))
    assert set(first) >= KEYS
    for name in ("seconds", "steps_per_s"):
        del first[name], second[name]
    assert first == second
    assert (first["violations"], first["examples"], first["rows_total"]) == (0, 12, len(TABLE))
    assert without_time(fuzz(examples=3, seed=5)) == without_time(fuzz(examples=3, seed=5))
    assert without_time(fuzz(examples=3, seed=5)) != without_time(fuzz(examples=3, seed=6))


def test_a_longer_run_begins_like_a_shorter_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a minute's finding is found again in an hour."""
    monkeypatch.setattr(fuzzing, "BATCH", 3)
    shorter, longer = fuzz(examples=3, seed=1), fuzz(examples=5, seed=1)
    assert not shorter.rows - longer.rows
    assert shorter.steps < longer.steps


class Busy(GPUStateMachine):
    """Rules that take real time."""

    @rule()
    def compute(self) -> None:
        """20 ms of one core."""
        end = time.perf_counter() + 0.02
        while time.perf_counter() < end:
            pass


@pytest.mark.parametrize("machine", [GPUStateMachine, Busy])
def test_the_bound_holds_also_in_the_middle_of_a_batch(
    machine: type[GPUStateMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends after the rule that is running."""
    fuzz(machine, examples=1)  # the first reads all sources, which may take longer than the bound
    monkeypatch.setattr(fuzzing, "BATCH", 10_000)
    began = time.monotonic()
    report = fuzz(machine, seconds=1.0, seed=1)
    assert time.monotonic() - began < 5.0
    assert report.steps
    assert not report.violation


# --- what breaks ---


class Wrong(Busy):
    """Breaks after three requests, and takes its time."""

    asked = 0

    def agent_works(self) -> None:
        self.asked += 1

    @invariant()
    def few_are_asked(self) -> None:
        """The planted bug."""
        assert self.asked < 3, "three"


def pasted(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program as somebody who pasted it."""
    command = [sys.executable, "-c", program]
    paths = os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))  # where pytest finds this file's machines, too
    return subprocess.run(command, env={"PYTHONPATH": paths}, cwd="/", capture_output=True, text=True, check=False)


def test_making_a_story_shorter_has_a_bound_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the time runs out, the shortest story so far is told."""
    monkeypatch.setattr(fuzzing, "SHRINK_S", 0.3)
    began = time.monotonic()
    report = fuzz(Wrong, seconds=10.0, seed=1)
    assert time.monotonic() - began < 20.0
    assert report.violation.startswith("three")
    assert "state.few_are_asked()" in report.program
    assert report.program.endswith("state.teardown()\n")
    done = pasted(report.program)
    assert done.returncode == 1
    assert "AssertionError: three" in done.stderr


class Flaky(GPUStateMachine):
    """Breaks at what the story does not decide."""

    met = 0

    @rule()
    def break_once(self) -> None:
        """The second story is innocent."""
        type(self).met += 1
        assert Flaky.met + type(self).met != 1


def test_a_story_that_cannot_be_told_twice_is_a_finding_too() -> None:
    """It says what is wrong with it, and has no program."""
    report = fuzz(Flaky, examples=5, seed=1)
    assert report.violations == 1
    assert "twice" in report.program


class Torn(GPUStateMachine):
    """Breaks in its own end."""

    def teardown(self) -> None:
        """After ours."""
        super().teardown()
        assert not self.world.clip.ups, "it was up"


def test_a_seed_that_pytest_forces_upon_hypothesis_does_not_replace_the_runs_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`pytest --hypothesis-seed=7`: the batches would all be one, and the story that was found not told."""
    monkeypatch.setattr(fuzzing, "SHRINK_S", 1.0)
    monkeypatch.setattr(hypothesis.core, "global_force_seed", 7)
    report = fuzz(Torn, examples=50, seed=1)
    assert report.violation.startswith("it was up")
    assert hypothesis.core.global_force_seed == 7


def test_what_breaks_at_the_end_of_a_story_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teardowns are judged, and so is the manager's close in ours."""
    monkeypatch.setattr(fuzzing, "SHRINK_S", 1.0)
    report = fuzz(Torn, examples=50, seed=1)
    assert report.violation.startswith("it was up")
    done = pasted(report.program)
    assert done.returncode == 1
    assert "it was up" in done.stderr


def test_an_embedders_planted_bug_is_found_shrunk_saved_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lost lease that the agent keeps: the program fails wherever it is pasted, and no more with the bug mended."""
    monkeypatch.setattr(fuzzing, "SHRINK_S", 4.0)
    monkeypatch.chdir(tmp_path)
    assert main(["fuzz", "--seconds", "60", "--seed", "3", "--machine", PLANTED]) == ExitCode.FAILED
    said = capsys.readouterr()
    story = tmp_path / "gpu-fsm-story-3.py"
    program = story.read_text(encoding="utf-8")
    assert program in said.out
    assert "the agent keeps a lease" in said.out
    assert "seed 3" in said.err
    assert "gpu_fsm 0." in said.err
    assert f"--replay {story.name}" in said.err
    assert program.count("state.work()") < 10

    done = pasted(program)
    assert done.returncode == 1
    assert "the agent keeps a lease" in done.stderr
    assert main(["fuzz", "--replay", str(story), "--json"]) == ExitCode.FAILED
    assert json.loads(capsys.readouterr().out)["violations"] == 1
    story.write_text(program.replace("PlantedStories", "MendedStories"), encoding="utf-8")
    assert main(["fuzz", "--replay", str(story)]) == ExitCode.FINE
    assert "breaks nothing" in capsys.readouterr().out


def test_the_mended_agent_is_not_accused() -> None:
    """The same stories, and nothing is found."""
    report = fuzz(MendedStories, examples=40, seed=3)
    assert not report.violation, report.program
    assert report.executed["work"] > 20


def test_what_hypothesis_prints_is_a_program() -> None:
    """Also where somebody runs the machine in a test suite and copies the lines."""
    machine = type("PlantedStories", (PlantedStories,), {"__module__": PlantedStories.__module__})
    with pytest.raises(AssertionError) as broken:
        run_state_machine_as_test(
            machine,
            settings=hypothesis_settings(
                max_examples=200,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
                database=None,
                print_blob=False,
            ),
        )
    lines = "\n".join(broken.value.__notes__).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("from "))
    done = pasted("\n".join(line for line in lines[first:] if line))
    assert done.returncode == 1
    assert "the agent keeps a lease" in done.stderr


# --- the command line ---


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--machine", "nonsense"], "MODULE:CLASS"),
        (["--machine", "no_such_module:X"], "no_such_module"),
        (["--machine", "gpu_fsm.testing.stateful:Nobody"], "Nobody"),
        (["--machine", "gpu_fsm.simulation:SimulatedWorld"], "GPUStateMachine"),
        (["--machine", "gpu_fsm.testing.fuzz:fuzz"], "GPUStateMachine"),
        (["--seconds", "0"], "--seconds"),
        (["--examples", "0"], "--examples"),
        (["--seed", "-1"], "--seed"),
        (["--seconds", "1", "--examples", "1"], "one of"),
        (["--replay", "no-such-file.py"], "no-such-file.py"),
        (["--replay", str(Path(__file__))], "not a story"),
        (["--story", "no-such-folder/story.py"], "no-such-folder"),
    ],
)
def test_bad_input_is_named(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, nothing has run."""
    assert main(["fuzz", *argv]) == ExitCode.USAGE
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_module_that_breaks_at_its_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the folder where the command is called, as `python -m` finds it."""
    (tmp_path / "my_stories_that_break.py").write_text("import not_there_at_all\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BadArgument, match="not_there_at_all"):
        load_machine("my_stories_that_break:Stories")


def test_a_story_that_needs_what_is_not_here_is_no_finding(tmp_path: Path) -> None:
    """Nor is a file that is cut off."""
    story = tmp_path / "story.py"
    for rest, said in (("import not_there_at_all", "not_there_at_all"), ("state.work(", "no program")):
        story.write_text(f"{fuzzing.MARK}: x\n{rest}\n", encoding="utf-8")
        with pytest.raises(BadArgument, match=said):
            replay(story)


def test_without_hypothesis_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3 and the line to type."""
    for name in ("gpu_fsm.testing.fuzz", "gpu_fsm.testing.stateful"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    assert main(["fuzz", "--examples", "1"]) == ExitCode.MISSING
    assert "pip install 'gpu-fsm[testing]'" in capsys.readouterr().err


def test_a_story_that_cannot_be_saved_is_printed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The finding is not lost with the disk."""
    monkeypatch.setattr(fuzzing, "SHRINK_S", 0.2)
    folder = tmp_path / "gpu-fsm-story.py"
    folder.mkdir()
    code = main(["fuzz", "--examples", "50", "--seed", "1", "--machine", f"{__name__}:Torn", "--story", str(folder)])
    said = capsys.readouterr()
    assert code == ExitCode.FAILED
    assert "state.teardown()" in said.out
    assert "cannot be saved" in said.err


def test_a_machine_that_is_none_is_refused() -> None:
    """A mistake in the machine is a mistake of its writer, not a finding."""

    class Confused(GPUStateMachine):
        @precondition(lambda self: True)
        def no_rule(self) -> None:
            """A precondition of nothing."""

    with pytest.raises(BadArgument, match="precondition"):
        fuzz(Confused, examples=1)
    with pytest.raises(BadArgument, match="subclass"):
        fuzz(object, examples=1)  # type: ignore[arg-type]
