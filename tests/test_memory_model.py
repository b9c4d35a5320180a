"""The screen memory beside a plain list: whatever is recorded, replaced, saved and asked, both know the same."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy", reason="numpy is not installed")

import io  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from hypothesis import assume, example, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from gpu_fsm.agent import memory as module  # noqa: E402
from gpu_fsm.agent.memory import FusionEngine, Limits, ScreenMemoryError, Verdict  # noqa: E402

pytestmark = pytest.mark.core

LIMITS = Limits(accept=0.9, unsure=0.6, margin=0.05)
NEAR = 1e-4
"""Scores this near a limit, or each other, may be told either way."""

vectors = st.tuples(*[st.integers(-3, 3)] * 4).filter(any).map(lambda numbers: np.array(numbers, np.float32))
screens = st.tuples(st.sampled_from("abc"), vectors, st.sampled_from(["", "first", "second", "third"]))


class PlainMemory:
    """Every screen that counts, and a loop."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, Any, str]] = []

    def add(self, label: str, vector: Any, digest: str) -> None:
        self.rows = [row for row in self.rows if not digest or row[2] != digest]
        self.rows.append((label, vector / np.linalg.norm(vector), digest))

    def scores(self, vector: Any) -> dict[str, float]:
        """Each label's nearest screen."""
        asked, best = vector / np.linalg.norm(vector), dict[str, float]()
        for label, known, _ in self.rows:
            best[label] = max(best.get(label, -1.0), float(known @ asked))
        return best


def agree(memory: FusionEngine, plain: PlainMemory, asked: Any) -> None:
    """Both name the same nearest label and think the same of it."""
    assert sorted(memory.labels) == sorted(label for label, _, _ in plain.rows)
    match, scores = memory.match(asked), plain.scores(asked)
    if not scores:
        assert match.verdict is Verdict.UNKNOWN
        return
    best, second = [*sorted(scores.values(), reverse=True), -1.0][:2]
    assert match.score == pytest.approx(best, abs=NEAR)
    assert match.label is not None
    assert scores[match.label] == pytest.approx(best, abs=NEAR)
    assume(all(abs(gap) > NEAR for gap in (best - LIMITS.accept, best - LIMITS.unsure, best - second - LIMITS.margin)))
    if best < LIMITS.unsure:
        assert match.verdict is Verdict.UNKNOWN
    else:
        sure = best >= LIMITS.accept and best - second >= LIMITS.margin
        assert match.verdict is (Verdict.RECOGNISED if sure else Verdict.UNSURE)


def towards(*numbers: int) -> Any:
    """A direction."""
    return np.array(numbers, np.float32)


@given(recorded=st.lists(screens, max_size=8), asked=vectors, restarted=st.booleans())
@example(  # two screens that are as near
    recorded=[("a", towards(2, 1, 0, 0), ""), ("b", towards(2, -1, 0, 0), "")],
    asked=towards(1, 0, 0, 0),
    restarted=False,
)
@example(  # another screen that is nearly as near
    recorded=[("a", towards(3, 0, 0, 0), ""), ("b", towards(5, 1, 0, 0), "")],
    asked=towards(3, 0, 0, 0),
    restarted=True,
)
@example(  # a picture that looks otherwise now, and has another label
    recorded=[("a", towards(1, 0, 0, 0), "first"), ("b", towards(0, 1, 0, 0), "first")],
    asked=towards(1, 0, 0, 0),
    restarted=False,
)
def test_a_memory_knows_what_a_plain_list_knows(
    recorded: list[tuple[str, Any, str]], asked: Any, restarted: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A picture that is recorded again takes its old entry's place, before and after a restart."""
    memory, plain = FusionEngine(LIMITS), PlainMemory()
    for label, vector, digest in recorded:
        memory.add(label, vector, digest=digest)
        plain.add(label, vector, digest)
    if restarted:
        path = tmp_path_factory.mktemp("memory") / "screens.npz"
        memory.save(path)
        memory = FusionEngine.load(path, LIMITS)
    for vector in (asked, *(vector for _, vector, _ in recorded)):
        agree(memory, plain, vector)


@given(ours=vectors, theirs=vectors)
def test_a_memory_is_for_the_model_that_recorded_it(
    ours: Any, theirs: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its fingerprint points the same way, or the memory is refused."""
    likeness = float(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs))
    memory = FusionEngine(probe=ours)
    memory.add("a", ours)
    path = tmp_path_factory.mktemp("memory") / "screens.npz"
    memory.save(path)
    if likeness > 1 - NEAR:
        assert FusionEngine.load(path, probe=theirs).labels == ("a",)
    else:
        with pytest.raises(ScreenMemoryError, match="another CLIP model"):
            FusionEngine.load(path, probe=theirs)


def test_who_reads_the_memory_while_it_is_written_reads_the_old_one_whole(tmp_path: Path) -> None:
    """A saved memory is a new file: the old one, open or linked elsewhere, stays what it was."""
    path = tmp_path / "screens.npz"
    memory = FusionEngine()
    memory.add("old", np.array([1, 0], np.float32))
    memory.save(path)
    (tmp_path / "kept.npz").hardlink_to(path)
    with path.open("rb") as reader:
        beginning = reader.read(40)
        memory.add("new", np.array([0, 1], np.float32))
        memory.save(path)
        whole = io.BytesIO(beginning + reader.read())
    (tmp_path / "read.npz").write_bytes(whole.getvalue())
    assert FusionEngine.load(tmp_path / "read.npz").labels == ("old",)
    assert FusionEngine.load(tmp_path / "kept.npz").labels == ("old",)
    assert FusionEngine.load(path).labels == ("old", "new")


def test_what_a_file_becomes_in_memory_is_counted_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not its size on the disk: zeros take no room there."""
    path = tmp_path / "screens.npz"
    memory = FusionEngine()
    for place in range(50):
        memory.add(f"screen {place}", np.eye(50, dtype=np.float32)[place])
    memory.save(path)
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez_compressed(path, **arrays)
    assert len(FusionEngine.load(path)) == 50
    monkeypatch.setattr(module, "_LARGEST_MEMORY_BYTES", path.stat().st_size * 2)
    with pytest.raises(ScreenMemoryError, match="larger than"):
        FusionEngine.load(path)
