"""The reference agent against a stand-in manager: what it asks for, what it remembers, how it takes a no."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gpu_fsm import errors
from gpu_fsm.agent import (
    ExecutionLoop,
    FusionEngine,
    Limits,
    Screen,
    ScreenMemoryError,
    UIDetector,
    Verdict,
    load_screens,
    probe_image,
)
from gpu_fsm.ports import Completion
from gpu_fsm.status import ExecutionMode, GPUResourceStatus, State

np = pytest.importorskip("numpy", reason="numpy is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

LIMITS = Limits(accept=0.9, unsure=0.7, margin=0.05)


class StandIn:
    """A manager that does what the test says: answers of the VLM, a direction for each colour, refusals."""

    def __init__(self, *answers: str, refuse: Callable[[], errors.GPUFSMError] | None = None) -> None:
        self.answers = list(answers)
        self.refuse = refuse
        self.state = State.IDLE
        self.asked: list[ExecutionMode] = []
        self.prompts: list[str] = []
        self.images: list[bytes] = []
        self.formats: list[Mapping[str, Any] | str | None] = []
        self.leases = 0

    def set_execution_mode(self, mode: ExecutionMode) -> None:
        self.asked.append(mode)
        if self.refuse is not None and mode is ExecutionMode.RECORDING:
            self.state = State.DEGRADED
            raise self.refuse()
        self.state = State(mode.value)

    def get_status(self) -> GPUResourceStatus:
        return GPUResourceStatus(state=self.state)

    @contextlib.contextmanager
    def vlm(self, *, holder: str = "", timeout_s: float | None = None) -> Iterator[StandIn]:
        if self.refuse is not None:
            raise self.refuse()
        self.leases += 1
        yield self

    @contextlib.contextmanager
    def clip(self, *, holder: str = "", timeout_s: float | None = None) -> Iterator[StandIn]:
        yield self

    def generate(
        self,
        prompt: str,
        *,
        images: Sequence[object] = (),
        format: Mapping[str, Any] | str | None = None,  # noqa: A002
    ) -> Completion:
        self.prompts.append(prompt)
        self.images.extend(image for image in images if isinstance(image, bytes))
        self.formats.append(format)
        return Completion(text=self.answers.pop(0))

    def encode(self, items: Sequence[Any]) -> Any:
        return np.stack([np.asarray(item, np.float32).mean(axis=(0, 1)) + 1 for item in items])


def screen(name: str, colour: tuple[int, int, int] = (255, 0, 0), side: int = 8) -> Screen:
    """A screenshot of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return Screen(name=name, data=buffer.getvalue())


def says(label: str) -> str:
    """A good answer of the VLM."""
    return json.dumps({"label": label, "summary": "a screen"})


def unreachable() -> errors.GPUFSMError:
    """What a lease ends in when Ollama is down."""
    return errors.OllamaUnavailable(detail="connection refused", remedy="Start it.")


def vector(*numbers: float) -> Any:
    """An embedding."""
    return np.array(numbers, np.float32)


# --- UIDetector -------------------------------------------------------------------------------------------------------


def test_a_screen_is_sent_as_it_is_with_a_schema_for_the_answer() -> None:
    """A small screenshot reaches the VLM byte for byte, and the answer's form is demanded."""
    manager = StandIn(says("sign-in form"))
    shot = screen("a.png")
    answer = UIDetector(manager).classify(shot)
    assert (answer.label, answer.source, answer.repaired) == ("sign-in form", "vlm", False)
    assert manager.images == [shot.data]
    assert isinstance(manager.formats[0], Mapping)
    assert manager.formats[0]["required"] == ["label", "summary"]


def test_a_large_screen_is_sent_smaller() -> None:
    """No more pixels are sent than a VLM looks at."""
    manager = StandIn(says("x"))
    UIDetector(manager, largest_side=64).classify(screen("a.png", side=200))
    assert Image.open(io.BytesIO(manager.images[0])).size == (64, 64)


@pytest.mark.parametrize(
    "bad",
    ["", "no JSON", "[1]", "{}", '{"label": 7}', '{"label": "  "}', '{"label": "a", "summary": 1}', "[" * 100_000],
)
def test_an_answer_that_does_not_fit_is_asked_for_once_more(bad: str) -> None:
    """One repair attempt, which says what was wrong."""
    manager = StandIn(bad, says("chat"))
    answer = UIDetector(manager).classify(screen("a.png"))
    assert (answer.label, answer.repaired, len(manager.prompts), manager.leases) == ("chat", True, 2, 1)
    assert "did not fit" in manager.prompts[1]


def test_two_answers_that_do_not_fit_are_no_label_and_not_kept() -> None:
    """Nothing is invented from a broken answer, and the next call asks anew."""
    manager = StandIn("?", "?", says("chat"))
    detector = UIDetector(manager)
    first = detector.classify(screen("a.png"))
    assert first.label is None
    assert first.available
    assert "did not fit twice" in first.reason
    assert detector.classify(screen("a.png")).label == "chat"


def test_the_same_picture_is_asked_about_once() -> None:
    """The cache goes by the picture's digest, not by its name, and forgets the oldest."""
    manager = StandIn(says("a"), says("b"), says("a again"))
    detector = UIDetector(manager, cache_size=1)
    assert detector.classify(screen("one.png")).source == "vlm"
    assert detector.classify(screen("two.png")).source == "cache"
    assert detector.classify(screen("three.png", (0, 0, 9))).label == "b"
    assert detector.classify(screen("one.png")).label == "a again"


def test_an_unavailable_vlm_is_an_answer_with_its_reason() -> None:
    """A refusal is told, not raised, and not kept."""
    manager = StandIn(says("chat"), refuse=unreachable)
    detector = UIDetector(manager)
    answer = detector.classify(screen("a.png"))
    assert (answer.available, answer.label) == (False, None)
    assert answer.reason.startswith("unavailable, because connection refused")
    manager.refuse = None
    assert detector.classify(screen("a.png")).label == "chat"


def test_a_lost_lease_is_taken_once_more() -> None:
    """The VLM taken away under the lease costs one new lease, not the answer."""
    manager = StandIn(says("chat"))
    generate, lost = manager.generate, [errors.LeaseLost(detail="taken")]

    def once_lost(*args: Any, **options: Any) -> Completion:
        if lost:
            raise lost.pop()
        return generate(*args, **options)

    manager.generate = once_lost  # type: ignore[method-assign]
    assert UIDetector(manager).classify(screen("a.png")).label == "chat"
    assert manager.leases == 2


def test_labels_are_made_safe_for_a_line() -> None:
    """What a model says ends in logs and on terminals: no control characters, no novels."""
    answer = UIDetector(StandIn(says("a\nb \x1b[31m" + "x" * 500))).classify(screen("a.png"))
    assert answer.label is not None
    assert answer.label.isprintable()
    assert len(answer.label) <= 80


# --- FusionEngine -----------------------------------------------------------------------------------------------------


def test_nearness_and_margin_decide_between_recognised_unsure_and_unknown() -> None:
    """Near enough and clearly nearer than any other label, or not certain, or like nothing we know."""
    memory = FusionEngine(LIMITS)
    memory.add("a", vector(1, 0, 0))
    memory.add("b", vector(0, 1, 0))
    assert memory.match(vector(1, 0.1, 0)).verdict is Verdict.RECOGNISED
    assert memory.match(vector(1, 0, 0.75)).verdict is Verdict.UNSURE
    assert memory.match(vector(0, 0, 1)).verdict is Verdict.UNKNOWN
    memory.add("c", vector(1, 0.15, 0))
    close = memory.match(vector(1, 0.1, 0))
    assert close.verdict is Verdict.UNSURE, "two labels too near to each other"
    assert {close.label, close.second_label} == {"a", "c"}
    memory.add("a", vector(1, 0.05, 0))
    assert memory.match(vector(0.999, 0, 0)).second_label == "c", "another picture of the same label is no rival"


def test_an_empty_memory_knows_nothing() -> None:
    """No screen is recognised before one was recorded."""
    assert FusionEngine(LIMITS).match(vector(1, 0)).verdict is Verdict.UNKNOWN


@pytest.mark.parametrize(
    "bad", [vector(0, 0), vector(float("nan"), 1), vector(), np.zeros((2, 2), np.float32), vector(float("inf"), 0)]
)
def test_what_is_no_direction_is_refused(bad: Any) -> None:
    """An embedding of zeros, NaN or the wrong shape would be near everything or nothing."""
    with pytest.raises(errors.BadArgument):
        FusionEngine().add("a", bad)


def test_vectors_of_another_length_are_refused() -> None:
    """One memory, one CLIP model."""
    memory = FusionEngine()
    memory.add("a", vector(1, 0))
    for call in (lambda: memory.add("b", vector(1, 0, 0)), lambda: memory.match(vector(1, 0, 0))):
        with pytest.raises(errors.BadArgument):
            call()


def test_the_same_picture_again_replaces_its_entry() -> None:
    """Recording twice does not fill the memory with copies."""
    memory = FusionEngine(LIMITS)
    memory.add("a", vector(1, 0), digest="d")
    memory.add("b", vector(0, 1), digest="d")
    assert memory.labels == ("b",)
    assert memory.knows("d")
    assert memory.match(vector(0, 1)).label == "b"


@given(st.lists(st.tuples(st.text(max_size=20), st.integers(0, 2**31)), max_size=8))
def test_what_is_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, int]]) -> None:
    """Labels, vectors and verdicts survive a restart."""
    memory = FusionEngine(LIMITS, probe=vector(1, 2, 3))
    for label, seed in entries:
        memory.add(label, np.random.default_rng(seed).normal(size=5).astype(np.float32), digest=str(seed))
    path = tmp_path_factory.mktemp("memory") / "m.npz"
    memory.save(path)
    again = FusionEngine.load(path, LIMITS, probe=vector(1, 2, 3))
    asked = vector(1, 2, 3, 4, 5)
    assert again.labels == memory.labels
    assert again.match(asked) == memory.match(asked)
    assert [p.name for p in path.parent.iterdir()] == ["m.npz"]


def saved(folder: Path) -> Path:
    """A memory of one screen in a file."""
    memory = FusionEngine(LIMITS, probe=vector(1, 2, 3))
    memory.add("a", vector(1, 0))
    memory.save(folder / "m.npz")
    return folder / "m.npz"


def test_a_memory_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    """At every length short of the whole file."""
    whole = saved(tmp_path).read_bytes()
    cut = tmp_path / "cut.npz"
    for length in range(0, len(whole), max(1, len(whole) // 100)):
        cut.write_bytes(whole[:length])
        with pytest.raises(ScreenMemoryError):
            FusionEngine.load(cut)


def test_a_flipped_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    """A damaged file never loads as another memory."""
    whole = bytearray(saved(tmp_path).read_bytes())
    bad = tmp_path / "bad.npz"
    for place in range(0, len(whole), 7):
        damaged = whole.copy()
        damaged[place] ^= 0xFF
        bad.write_bytes(damaged)
        try:
            assert FusionEngine.load(bad).labels == ("a",)
        except ScreenMemoryError:
            continue


def test_a_memory_of_another_model_is_refused(tmp_path: Path) -> None:
    """The probe's embedding is the model's fingerprint; half precision does not change it, other weights do."""
    path = saved(tmp_path)
    assert len(FusionEngine.load(path, probe=vector(1.0001, 2, 3))) == 1
    for other in (vector(3, 2, 1), vector(1, 2, 3, 4)):
        with pytest.raises(ScreenMemoryError, match="another CLIP model"):
            FusionEngine.load(path, probe=other)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    """Not ours, of a later version, with a pickle inside, or not there at all."""
    path = tmp_path / "m.npz"
    about = {"format": "gpu_fsm screen memory", "version": 1, "labels": ["a"], "digests": [""]}

    def write(**parts: Any) -> None:
        np.savez(path, **parts)

    def text(value: object) -> Any:
        return np.frombuffer(json.dumps(value).encode(), np.uint8)

    good = {"about": text(about), "vectors": np.ones((1, 2), np.float32), "probe": np.zeros(0, np.float32)}
    write(**good)
    assert FusionEngine.load(path).labels == ("a",)
    for change, word in (
        ({"about": text({**about, "version": 2})}, "version 2"),
        ({"about": text({**about, "format": "x"})}, "not a screen memory"),
        ({"about": text({**about, "labels": ["a", "b"]})}, "damaged"),
        ({"about": text({**about, "labels": [1]})}, "damaged"),
        ({"about": text([])}, "not a screen memory"),
        ({"vectors": np.full((1, 2), np.nan, np.float32)}, "damaged"),
        ({"vectors": np.ones((1, 2), np.float64)}, "damaged"),
        ({"vectors": np.array([object()])}, "not a whole"),
        ({"extra": np.zeros(1)}, "not a screen memory"),
    ):
        write(**{**good, **change})
        with pytest.raises(ScreenMemoryError, match=word):
            FusionEngine.load(path)
    with pytest.raises(ScreenMemoryError, match="cannot be read"):
        FusionEngine.load(tmp_path / "missing.npz")


def test_a_failed_save_keeps_the_old_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file stays whole and nothing is left lying about."""
    path = saved(tmp_path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        FusionEngine(LIMITS).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_limits_are_read_beside_the_model_and_checked(tmp_path: Path) -> None:
    """A model brings its own thresholds; nonsense is refused with the file's name."""
    assert Limits.beside("clip-ViT-B-32") == Limits()
    file = tmp_path / "recognition.json"
    file.write_text('{"accept": 0.8, "unsure": 0.5, "margin": 0.1}')
    assert Limits.beside(tmp_path) == Limits(accept=0.8, unsure=0.5, margin=0.1)
    for bad in ("{}", "no", '{"accept": "x", "unsure": 0, "margin": 0}', '{"accept": 0.1, "unsure": 0.5, "margin": 0}'):
        file.write_text(bad)
        with pytest.raises(errors.BadArgument):
            Limits.beside(tmp_path)


def test_the_probe_image_never_changes() -> None:
    """Stored fingerprints would turn foreign with it."""
    import hashlib

    assert hashlib.sha256(probe_image().tobytes()).hexdigest()[:16] == "f613bc8700e51fcf"


# --- screens ----------------------------------------------------------------------------------------------------------


def test_bad_folders_are_named_with_the_mend(tmp_path: Path) -> None:
    """Missing, empty, or with a broken picture: one line that names the thing."""
    with pytest.raises(errors.BadArgument, match="is no folder"):
        load_screens(tmp_path / "nowhere")
    with pytest.raises(errors.BadArgument, match="holds no image"):
        load_screens(tmp_path)
    (tmp_path / "good.png").write_bytes(screen("x").data)
    assert [s.name for s in load_screens(tmp_path)] == ["good.png"]
    (tmp_path / "broken.png").write_bytes(screen("x", side=64).data[:100])
    with pytest.raises(errors.BadArgument, match=r"broken\.png is no image"):
        load_screens(tmp_path)


# --- ExecutionLoop ----------------------------------------------------------------------------------------------------

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def loop_with(manager: StandIn, **options: Any) -> ExecutionLoop:
    """An agent with an empty memory."""
    return ExecutionLoop(manager, UIDetector(manager), FusionEngine(LIMITS), **options)


def test_recording_then_autopilot_acts_on_known_screens_and_asks_about_others() -> None:
    """The whole job: label and remember, recognise and act, ask on demand."""
    manager = StandIn(says("red"), says("green"), says("something blue"))
    acted: list[tuple[str, str]] = []
    loop = loop_with(manager, on_action=lambda shot, label: acted.append((shot.name, label)))
    recorded = loop.run(ExecutionMode.RECORDING, [screen("r", RED), screen("g", GREEN), screen("r2", RED)])
    assert [step.result for step in recorded] == ["recorded", "recorded", "kept"]
    steps = loop.run(ExecutionMode.AUTOPILOT, [screen("r3", (250, 10, 0)), screen("b", BLUE)])
    assert [(step.result, step.label) for step in steps] == [("recognised", "red"), ("asked", "something blue")]
    assert acted == [("r3", "red")]
    assert manager.asked == [ExecutionMode.RECORDING, ExecutionMode.AUTOPILOT]


def test_the_agent_goes_on_when_the_vlm_is_not_to_be_had() -> None:
    """Degraded: known screens are still recognised, unknown ones wait with their reason."""
    manager = StandIn(says("red"))
    loop = loop_with(manager)
    loop.run(ExecutionMode.RECORDING, [screen("r", RED)])
    manager.refuse = unreachable
    steps = loop.run(ExecutionMode.RECORDING, [screen("g", GREEN)])
    assert [(step.result, step.state) for step in steps] == [("unavailable", State.DEGRADED)]
    steps = loop.run(ExecutionMode.AUTOPILOT, [screen("r", (255, 2, 0)), screen("b", BLUE)])
    assert [step.result for step in steps] == ["recognised", "unavailable"]
    assert len(loop.memory) == 1, "a screen without a label is not remembered"


def test_a_vlm_that_cannot_tell_names_nothing() -> None:
    """`unknown` is an answer, but no label to remember."""
    loop = loop_with(StandIn(says("unknown")))
    (step,) = loop.run(ExecutionMode.RECORDING, [screen("r")])
    assert (step.result, step.label, len(loop.memory)) == ("asked", "unknown", 0)


def test_a_broken_screen_is_one_failed_step() -> None:
    """The stream of screens goes on."""
    loop = loop_with(StandIn(says("red")))
    steps = loop.run(ExecutionMode.RECORDING, [Screen(name="bad", data=b"no image"), screen("r")])
    assert [step.result for step in steps] == ["failed", "recorded"]


def test_stop_ends_after_the_screen_in_hand() -> None:
    """From a hook, another thread or a signal handler."""
    manager = StandIn(says("red"))
    loop = loop_with(manager, on_step=lambda _step: loop.stop())
    endless = (screen("r") for _ in iter(int, 1))
    assert len(loop.run(ExecutionMode.RECORDING, endless)) == 1


def test_a_closed_manager_ends_the_loop() -> None:
    """No step is made up and nothing is raised."""
    manager = StandIn(refuse=lambda: errors.ManagerClosed(detail="closed"))
    assert loop_with(manager).run(ExecutionMode.AUTOPILOT, [screen("r")]) == ()


def test_the_memory_is_saved_after_each_recorded_screen(tmp_path: Path) -> None:
    """A killed process loses at most the screen in hand."""
    path = tmp_path / "m.npz"
    seen: list[int] = []
    manager = StandIn(says("red"), says("green"))
    loop = loop_with(manager, memory_path=path, on_step=lambda _: seen.append(len(FusionEngine.load(path))))
    loop.run(ExecutionMode.RECORDING, [screen("r", RED), screen("g", GREEN)])
    assert seen == [1, 2]


def test_the_memory_can_be_asked_while_it_grows() -> None:
    """A match sees whole entries, whatever another thread adds."""
    memory = FusionEngine(LIMITS)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 4)).astype(np.float32)
    adder = threading.Thread(target=lambda: [memory.add(str(i), row) for i, row in enumerate(vectors)])
    adder.start()
    while adder.is_alive():
        found = memory.match(vectors[0])
        assert found.label in (None, "0") or found.score <= 1.0001
    adder.join()
    assert len(memory) == 300


def test_importing_the_agent_loads_nothing_heavy() -> None:
    """An embedder that brings its own memory pays for no numpy."""
    code = "import sys, gpu_fsm.agent; print([m for m in ('torch', 'numpy', 'PIL', 'rich') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
