"""Random stories until one breaks a promise; the shortest that does is a program.

    report = fuzz(seconds=60.0, seed=7)
    print(report.summary())

Stories come in batches; seed and number of the batch decide each, so a longer run with the same seed begins like a
shorter one.  A story that broke something is shrunk by Hypothesis, for at most `SHRINK_S`.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import logging
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import hypothesis
from attrs import define, field
from hypothesis import HealthCheck, Phase, core
from hypothesis.database import InMemoryExampleDatabase
from hypothesis.errors import HypothesisException, InvalidArgument, InvalidDefinition
from hypothesis.reporting import with_reporter
from hypothesis.stateful import run_state_machine_as_test

from gpu_fsm.errors import BadArgument, one_line
from gpu_fsm.guards import PREDICATES
from gpu_fsm.states import TABLE
from gpu_fsm.status import State
from gpu_fsm.testing.scenario import commit
from gpu_fsm.testing.stateful import FAULTS, GPUStateMachine

BATCH = 25
"""Examples in a batch; small, so that a run of a minute has told many different beginnings."""

STEPS = 30
"""Rules in an example."""

SHRINK_S = 20.0
"""How long, beyond the bound of the run, a story that broke something may be made shorter."""

MARK = "# A story of gpu-fsm fuzz"
"""How a saved story begins."""


@define(kw_only=True)
class FuzzReport:
    """What a run did, covered and found."""

    machine: str
    """`module:Class`."""
    seed: int
    seconds: float = 0.0
    steps: int = 0
    """Rules executed."""
    examples: int = 0
    shrinking_steps: int = 0
    """Rules executed to make the failing story shorter; not among `steps`."""
    executed: Counter[str] = field(factory=Counter)
    rows: Counter[str] = field(factory=Counter)
    faults: Counter[tuple[str, str]] = field(factory=Counter)
    verdicts: set[tuple[str, bool]] = field(factory=set)
    states: set[State] = field(factory=set)
    violation: str = ""
    """What was broken, in words; empty if nothing was."""
    program: str = ""
    """The story that breaks it, as a program."""

    @property
    def violations(self) -> int:
        """A run ends with the first."""
        return int(bool(self.violation))

    def missing(self) -> dict[str, list[str]]:
        """What was never taken, fired or decided that way."""
        seen = {f"{guard} is {verdict}" for guard, verdict in self.verdicts}
        return {
            "states": [state.name for state in State if state not in self.states],
            "rows": [row.name for row in TABLE if not self.rows[row.name]],
            "guard_outcomes": [outcome for outcome in _outcomes() if outcome not in seen],
            "faults": [f"{op} {kind}" for op, kind in FAULTS if not self.faults[op, kind]],
        }

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists for JSON."""
        missing = self.missing()
        totals = {
            "states": len(State),
            "rows": len(TABLE),
            "guard_outcomes": len(_outcomes()),
            "faults": len(FAULTS),
        }
        covered = {f"{what}_covered": totals[what] - len(missing[what]) for what in totals}
        return {
            "machine": self.machine,
            "seed": self.seed,
            **versions(),
            "seconds": round(self.seconds, 3),
            "steps": self.steps,
            "steps_per_s": round(self.steps / self.seconds, 1) if self.seconds else None,
            "examples": self.examples,
            "shrinking_steps": self.shrinking_steps,
            "violations": self.violations,
            **covered,
            **{f"{what}_total": total for what, total in totals.items()},
            "missing": missing,
            "violation": self.violation or None,
            "program": self.program or None,
        }

    def summary(self) -> str:
        """A few lines for people."""
        data = self.to_dict()
        kinds = {"states": "states", "rows": "rows", "guard_outcomes": "guard outcomes", "faults": "faults"}
        covered = ", ".join(f"{data[f'{k}_covered']}/{data[f'{k}_total']} {word}" for k, word in kinds.items())
        lines = [
            f"{self.steps} steps in {self.examples} examples, {data['steps_per_s'] or 0:g} steps/s; seed {self.seed}",
            f"covered: {covered}",
        ]
        lines += [f"never taken: {', '.join(self.missing()['rows'])}"] if self.missing()["rows"] else []
        lines.append(f"{self.violations} violations")
        return "\n".join(lines)


def fuzz(
    machine: type[GPUStateMachine] = GPUStateMachine,
    *,
    seconds: float | None = None,
    examples: int | None = None,
    seed: int = 0,
    progress: Callable[[FuzzReport], object] = lambda report: None,
) -> FuzzReport:
    """Tell stories of `machine` for `seconds` (60 where neither bound is given), or that many `examples`.

    Stops at the first story that breaks a promise.  `progress` is called after every example.  Raises `BadArgument`
    for a machine that is none.
    """
    if not (isinstance(machine, type) and issubclass(machine, GPUStateMachine)):
        raise BadArgument(detail=f"{machine!r} is not a subclass of gpu_fsm.testing.GPUStateMachine")
    if not __debug__:
        raise BadArgument(detail="without assertions nothing can be found", remedy="Run Python without -O.")
    if seconds is None and examples is None:
        seconds = 60.0
    report = FuzzReport(machine=f"{machine.__module__}:{machine.__qualname__}", seed=seed)
    run = _Run(report, seconds, examples, progress)
    with quietly():
        batch = 0
        while not run.over():
            batch += 1
            run.tell(machine, f"{seed}/{batch}")
    report.seconds = (run.failed_at or time.monotonic()) - run.began
    if report.violation:
        report.program = program(machine, run.lines, report)
    return report


@contextlib.contextmanager
def _seed_of_our_own() -> Iterator[None]:
    """Within pytest's `--hypothesis-seed` too: forced upon us it would have each batch tell the same stories.

    Nor would Hypothesis keep the shortest story then, since it uses no database.
    """
    forced, core.global_force_seed = core.global_force_seed, None
    try:
        yield
    finally:
        core.global_force_seed = forced


class _TimeIsUp(BaseException):
    """Ends Hypothesis where it stands; not an Exception, or it would be taken for a failing story."""


class _Run:
    """The clockwork of one run: counts, and ends examples whose time is over."""

    def __init__(
        self,
        report: FuzzReport,
        seconds: float | None,
        examples: int | None,
        progress: Callable[[FuzzReport], object],
    ) -> None:
        self.report, self.progress = report, progress
        self.began = time.monotonic()
        self.deadline = float("inf") if seconds is None else self.began + seconds
        self.examples = examples
        self.lines: list[str] = []
        self.failed_at: float | None = None
        self.cut = False
        self.last_telling = False
        self.looks = 0

    def over(self) -> bool:
        """Whether no further batch is wanted."""
        enough = self.examples is not None and self.report.examples >= self.examples
        return bool(self.report.violation) or enough or time.monotonic() >= self.deadline

    def late(self) -> bool:
        """Whether Hypothesis must end now."""
        if self.last_telling:
            return False
        end = self.deadline if self.failed_at is None else min(self.failed_at, self.deadline) + SHRINK_S
        return time.monotonic() >= end

    def tell(self, machine: type[GPUStateMachine], seed: str) -> None:
        """One batch."""
        left = BATCH if self.examples is None else min(BATCH, self.examples - self.report.examples)
        watched = hypothesis.seed(seed)(self.watched(machine))
        settings = hypothesis.settings(
            max_examples=left,
            stateful_step_count=STEPS,
            deadline=None,
            # Keeps the shortest failing story so far, should the time for making it shorter run out.
            database=InMemoryExampleDatabase(),
            derandomize=False,
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        try:
            self.run(watched, settings)
            if self.failed_at is not None and not self.report.violation:
                self.last_telling = True
                self.run(watched, hypothesis.settings(settings, phases=[Phase.reuse]))
        finally:
            self.collect(watched)

    def run(self, watched: type[GPUStateMachine], settings: hypothesis.settings) -> None:
        """Have Hypothesis tell, and write down what it found."""
        try:
            # What it has to say comes with the exception.
            with with_reporter(lambda text: None), _seed_of_our_own():
                run_state_machine_as_test(watched, settings=settings)
        except _TimeIsUp:
            pass
        except (InvalidArgument, InvalidDefinition) as error:
            raise BadArgument(detail=f"{self.report.machine} is no state machine: {one_line(error)}") from error
        except Exception as error:
            if self.cut and not self.last_telling:
                return  # Hypothesis took the end of the time for a story that is told differently each time
            self.report.violation = str(error) or repr(error)
            notes = "\n".join(getattr(error, "__notes__", ())).splitlines()
            start = next((i for i, line in enumerate(notes) if line.startswith("state = ")), len(notes))
            self.lines = notes[start:]

    def watched(self, machine: type[GPUStateMachine]) -> type[GPUStateMachine]:
        """A subclass of the machine that counts for itself and heeds the clock."""
        run = self

        class Watched(machine):  # type: ignore[misc, valid-type]
            executed: ClassVar[Any] = Counter()
            rows: ClassVar[Any] = Counter()
            fired: ClassVar[Any] = Counter()
            verdicts: ClassVar[Any] = set()
            states: ClassVar[Any] = set()

            def __init__(self) -> None:
                run.looks = 0
                super().__init__()

            def check_invariants(self, *args: Any, **options: Any) -> None:
                """Hypothesis calls it at the beginning and after every rule."""
                run.look()
                super().check_invariants(*args, **options)

            def teardown(self) -> None:
                failure = sys.exc_info()[1]
                try:
                    super().teardown()
                except Exception as error:
                    if isinstance(failure, _TimeIsUp):
                        return  # no story that could be told again ends here
                    failure = error
                    raise
                finally:
                    run.ended(failure)

        Watched.__name__, Watched.__qualname__, Watched.__module__ = (
            machine.__name__,
            machine.__qualname__,
            machine.__module__,
        )
        return Watched

    def look(self) -> None:
        """Count a rule; end everything if the time is over."""
        self.looks += 1
        if self.late():
            self.cut = True
            raise _TimeIsUp

    def ended(self, failure: BaseException | None) -> None:
        """Count an example."""
        steps = max(0, self.looks - 1)
        if self.failed_at is not None:
            self.report.shrinking_steps += steps
            return
        self.report.steps += steps
        self.report.seconds = time.monotonic() - self.began
        broke = isinstance(failure, Exception) and not isinstance(failure, HypothesisException)
        self.report.examples += failure is None or broke  # else Hypothesis threw it away half-way
        if broke:
            self.failed_at = time.monotonic()
        self.progress(self.report)

    def collect(self, watched: type[GPUStateMachine]) -> None:
        """Add what a batch has covered."""
        report = self.report
        report.executed.update(watched.executed)
        report.rows.update(watched.rows)
        report.faults.update(watched.fired)
        report.verdicts |= watched.verdicts
        report.states |= watched.states


# --- a story as a program ---


def program(machine: type[GPUStateMachine], lines: Sequence[str], report: FuzzReport) -> str:
    """The whole program: what it shows, its imports, Hypothesis' lines."""
    about = {"machine": report.machine, "seed": str(report.seed)} | {k: str(v) for k, v in versions().items() if v}
    told = [
        f"{MARK}: {', '.join(f'{name} {value}' for name, value in about.items())}.",
        f"# It breaks a promise: {one_line(report.violation.splitlines()[0], 300)}",
        "# To see it again: python FILE, or gpu-fsm fuzz --replay FILE.",
    ]
    if not lines:
        return "\n".join([*told, "# Hypothesis could not tell the same story twice: it depends on something else.", ""])
    return "\n".join([*told, *_imports(machine, lines), "", *lines, ""])


def _imports(machine: type[GPUStateMachine], lines: Iterable[str]) -> list[str]:
    """Import every name that the lines use, from where it is defined."""
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError:
        return [f"from {machine.__module__} import {machine.__name__}", "# Some value below has no form in Python."]
    known = {**vars(sys.modules["gpu_fsm.status"]), **vars(sys.modules[machine.__module__])}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    made = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names = sorted(name for name in used - made if not hasattr(builtins, name) and name in known)
    homes = {name: _home(name, known[name], machine.__module__) for name in names}
    return sorted(f"from {home} import {name}" for name, home in homes.items())


def _home(name: str, thing: Any, default: str) -> str:
    module = getattr(thing, "__module__", None) or default
    return module if getattr(sys.modules.get(module), name, None) is thing else default


def replay(path: Path) -> str:
    """Run a saved story; returns what it breaks, in words, or nothing.  It is a program: run only what you trust.

    Raises `BadArgument` for a file that is not such a story.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadArgument(detail=f"{path} cannot be read: {one_line(error)}") from None
    if not text.startswith(MARK):
        raise BadArgument(detail=f"{path} is not a story that gpu-fsm fuzz has saved")
    try:
        code = compile(text, str(path), "exec")
    except SyntaxError as error:
        raise BadArgument(detail=f"{path} is no program: {one_line(error)}") from None
    try:
        with quietly():
            exec(code, {"__name__": "__main__", "__file__": str(path)})
    except ImportError as error:
        raise BadArgument(detail=f"{path} needs a module that is not here: {one_line(error)}") from error
    except Exception as error:
        return str(error) or repr(error)
    return ""


def load_machine(name: str) -> type[GPUStateMachine]:
    """The class that `module:Class` names.  Raises `BadArgument`."""
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise BadArgument(detail=f"{one_line(name, 80)} is not of the form MODULE:CLASS")
    try:
        thing = getattr(importlib.import_module(module), attribute)
    except AttributeError:
        raise BadArgument(detail=f"module {module} has no {one_line(attribute, 80)}") from None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise BadArgument(detail=f"{module} cannot be imported: {one_line(error)}") from error
        raise BadArgument(detail=f"there is no module {one_line(module, 80)}") from None
    except Exception as error:
        raise BadArgument(detail=f"{module} cannot be imported: {one_line(repr(error))}") from error
    if not (isinstance(thing, type) and issubclass(thing, GPUStateMachine)):
        raise BadArgument(
            detail=f"{one_line(name, 80)} is not a state machine of stories",
            remedy="Make it a subclass of gpu_fsm.testing.GPUStateMachine.",
        )
    return thing


# --- where and with what ---


def versions() -> dict[str, str | None]:
    """What a failure must name to be seen again: versions, and the commit where it is known."""
    return {
        "gpu_fsm": sys.modules["gpu_fsm"].__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "hypothesis": hypothesis.__version__,
    }


def _outcomes() -> list[str]:
    return [f"{guard} is {verdict}" for guard in PREDICATES for verdict in (True, False)]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Stories break things on purpose; what the manager logs about it would bury the one line that matters."""
    log = logging.getLogger("gpu_fsm")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


__all__ = ["FuzzReport", "fuzz", "load_machine", "program", "replay", "versions"]
