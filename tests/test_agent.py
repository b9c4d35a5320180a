"""The reference agent against a stand-in manager: what it asks for, what it remembers, how it takes a no."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gpu_fsm import errors
from gpu_fsm.agent import (
    ExecutionLoop,
    FusionEngine,
    Limits,
    Screen,
    ScreenLost,
    ScreenMemoryError,
    Step,
    Stopper,
    UIDetector,
    Verdict,
    Weights,
    frames,
    live,
    load_screens,
    probe_image,
)
from gpu_fsm.ports import Completion
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.status import ExecutionMode, GPUResourceStatus, State
from tests.waiting import Gate, in_thread, let_time_pass, until
from tests.worlds import inline, threaded

pytestmark = pytest.mark.core

np = pytest.importorskip("numpy", reason="numpy is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
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

    def ensure_vlm_unloaded(self) -> None:
        if self.refuse is not None:
            raise self.refuse()

    def migrate_clip_to_cpu(self) -> None:
        pass

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


def test_the_cache_can_be_made_smaller_while_it_is_full() -> None:
    """The oldest answers go with the next one that is kept."""
    manager = StandIn(*[says(name) for name in "abcdc"])
    detector = UIDetector(manager)
    shots = {name: screen(name, (ord(name), 0, 0)) for name in "abcd"}
    for name in "abc":
        detector.classify(shots[name])
    detector.cache_size = 1
    assert [detector.classify(shots[name]).source for name in "ddc"] == ["vlm", "cache", "vlm"]


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


def test_labels_to_choose_from_are_demanded_and_checked() -> None:
    """In the schema, in words, and in the answer; any case will do."""
    manager = StandIn(says("a new one"), says("CHAT"), says("Unknown"))
    detector = UIDetector(manager, labels=["chat", "sign-in form"])
    assert detector.classify(screen("a.png")).label == "chat"
    schema = manager.formats[0]
    assert isinstance(schema, Mapping)
    assert schema["properties"]["label"]["enum"] == ["chat", "sign-in form", "unknown"]
    assert "sign-in form" in manager.prompts[0]
    assert "none of those" in manager.prompts[1]
    assert not detector.classify(screen("b.png", (0, 0, 9))).tells


def test_a_broken_picture_costs_no_load() -> None:
    """It is looked at before the VLM is asked for."""
    manager = StandIn(says("x"))
    with pytest.raises(errors.BadArgument):
        UIDetector(manager).classify(Screen(name="bad", data=b"no image"))
    assert manager.leases == 0


def test_what_ollama_does_not_take_is_sent_as_png() -> None:
    """BMP and the like, which a folder may hold."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), RED).save(buffer, "BMP")
    manager = StandIn(says("x"))
    UIDetector(manager).classify(Screen(name="a.bmp", data=buffer.getvalue()))
    assert manager.images[0].startswith(b"\x89PNG")


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
    found, wanted = again.match(asked), memory.match(asked)
    assert (found.verdict, found.label, found.second_label) == (wanted.verdict, wanted.label, wanted.second_label)
    assert found.score == pytest.approx(wanted.score, abs=1e-6)
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
        assert cut.read_bytes() == whole[:length], "what is refused is left as it is"


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
        ({"about": text({**about, "version": 3})}, "version 3"),
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


def test_a_memory_that_does_not_name_its_model_is_refused_where_one_is_asked_for(tmp_path: Path) -> None:
    """Nobody could say whether its vectors may be compared."""
    FusionEngine(LIMITS).save(tmp_path / "m.npz")
    assert len(FusionEngine.load(tmp_path / "m.npz")) == 0
    with pytest.raises(ScreenMemoryError, match="which CLIP model"):
        FusionEngine.load(tmp_path / "m.npz", probe=vector(1, 2, 3))


def test_what_killed_writers_left_is_swept_and_a_living_writer_is_let_be(tmp_path: Path) -> None:
    """The part of a dead process goes with the next saving; that of a living one is its own."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead, living = tmp_path / f".m.npz.{gone.pid}.x.part", tmp_path / f".m.npz.{os.getppid()}.x.part"
    for part in (dead, living):
        part.write_bytes(b"half")
    saved(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"m.npz", living.name}


unit_vectors = st.integers(0, 2**31).map(lambda seed: np.random.default_rng(seed).normal(size=6).astype(np.float32))


@given(
    st.lists(st.tuples(unit_vectors, st.none() | unit_vectors), min_size=1, max_size=6),
    unit_vectors,
    st.none() | unit_vectors,
    st.floats(0.1, 10.0),
    st.floats(0.0, 10.0),
)
def test_the_fused_score_is_the_weighted_mean_where_both_have_a_text_else_the_pictures(
    rows: list[Any], image: Any, text: Any, image_weight: float, text_weight: float
) -> None:
    """One inner product must give what the definition says, for every mixture of texts."""

    def cosine(one: Any, other: Any) -> float:
        return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))

    def score(row: Any) -> float:
        if text is None or row[1] is None:
            return cosine(image, row[0])
        both = image_weight * cosine(image, row[0]) + text_weight * cosine(text, row[1])
        return both / (image_weight + text_weight)

    memory = FusionEngine(LIMITS, weights=Weights(image=image_weight, text=text_weight))
    for number, (picture, words) in enumerate(rows):
        memory.add(str(number), picture, text=words)
    found = memory.match(image, text=text)
    ranked = sorted((score(row) for row in rows), reverse=True)
    assert found.score == pytest.approx(ranked[0], abs=1e-4)
    assert found.second_score == pytest.approx(ranked[1] if len(ranked) > 1 else -1.0, abs=1e-4)


def test_texts_survive_a_restart_and_other_weights(tmp_path: Path) -> None:
    """They are stored as they are; what they count is decided where they are used."""
    memory = FusionEngine(LIMITS, weights=Weights(image=1.0, text=1.0))
    memory.add("inbox", vector(1, 0), text=vector(0, 1))
    memory.add("a picture alone", vector(0, 1))
    memory.save(tmp_path / "m.npz")
    again = FusionEngine.load(tmp_path / "m.npz", LIMITS, weights=Weights(image=1.0, text=3.0))
    assert again.match(vector(1, 0), text=vector(1, 0)).score == pytest.approx(0.25)
    again.weights = Weights()
    assert again.match(vector(1, 0), text=vector(1, 0)).score == 1.0
    assert again.labels == memory.labels


def test_a_label_with_many_screens_does_not_hide_its_rival() -> None:
    """The margin is judged against another label, however many nearer screens have the first one's."""
    memory = FusionEngine(LIMITS)
    for number in range(200):
        memory.add("chat", vector(1, number * 1e-4))
    memory.add("mail", vector(1, 0.05))
    assert memory.match(vector(1, 0)).second_label == "mail"
    for number in range(50):
        memory.add(str(number), vector(0, 1), digest="one picture")
    assert len(memory) == 202, "what was replaced is not counted, nor found"
    assert memory.match(vector(0, 1)).label == "49"


def test_another_index_may_search() -> None:
    """FAISS and its kin take the place of numpy by two methods, and the verdicts stay."""

    class Flat:
        def __init__(self, dimension: int) -> None:
            self.rows = np.zeros((0, dimension), np.float32)
            self.asked: list[int] = []

        def add(self, rows: Any) -> None:
            self.rows = np.vstack([self.rows, rows])

        def search(self, vector: Any, k: int) -> Any:
            self.asked.append(k)
            scores = self.rows @ vector
            best = np.argsort(-scores)[:k]
            return best, scores[best]

    made: list[Flat] = []

    def make(dimension: int) -> Flat:
        made.append(Flat(dimension))
        return made[-1]

    memory = FusionEngine(LIMITS, index=make)
    memory.add("a", vector(1, 0))
    memory.add("b", vector(0, 1))
    assert memory.match(vector(1, 0.1)).verdict is Verdict.RECOGNISED
    assert made[0].asked


def test_a_memory_of_the_first_version_is_still_read(tmp_path: Path) -> None:
    """It had no texts."""
    about = {"format": "gpu_fsm screen memory", "version": 1, "labels": ["a"], "digests": ["d"]}
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(tmp_path / "m.npz", about=text, vectors=np.ones((1, 2), np.float32), probe=np.ones(2, np.float32))
    assert FusionEngine.load(tmp_path / "m.npz", probe=vector(1, 1)).knows("d")


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


def test_frames_of_anything_become_screens() -> None:
    """PIL images or arrays, as readers of videos give them; each is a PNG with a name of its own."""
    images = [Image.new("L", (8, 6), 9), np.zeros((6, 8, 3), np.uint8)]
    shots = list(frames(images, "video"))
    assert [shot.name for shot in shots] == ["video-000000", "video-000001"]
    assert [shot.image().size for shot in shots] == [(8, 6), (8, 6)]


def test_the_live_screen_is_told_when_it_changes() -> None:
    """A picture like the last one is no news; the names count the looks."""
    colours = iter([RED, RED, GREEN, GREEN, RED])
    looks = live(every_s=lambda: 0.0, grab=lambda: Image.new("RGB", (4, 4), next(colours)))
    assert [next(looks).name for _ in range(3)] == ["screen-000000", "screen-000002", "screen-000004"]


def test_without_a_desktop_the_live_screen_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with a mend, not the library's own error; at once, before any model has been loaded for it."""
    pytest.importorskip("mss", reason="mss is not installed")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(errors.BadArgument, match="cannot be seen"):
        live()


class Desktop:
    """An X server without a monitor; what it shows is painted straight into its memory."""

    def __init__(self, program: str, folder: Path) -> None:
        reader, writer = os.pipe()
        options = f"-displayfd {writer} -screen 0 320x200x24 -fbdir {folder} -noreset -nolisten tcp"
        self.process = subprocess.Popen(
            [program, *options.split()],
            pass_fds=[writer],
            stderr=subprocess.DEVNULL,
        )
        os.close(writer)
        with os.fdopen(reader) as told:
            self.display = f":{told.readline().strip()}"
        self._memory = folder / "Xvfb_screen0"

    def paint(self, pixels: Any) -> None:
        """Show uint8 RGB of shape (200, 320, 3)."""
        head = np.frombuffer(self._memory.read_bytes()[:100], ">u4")  # an XWD header, then its colours, then the pixels
        begin, row_bytes = int(head[0] + 12 * head[19]), int(head[12])
        rows = np.memmap(self._memory, np.uint8, "r+", begin, (200, row_bytes))
        rows[:, : 4 * 320].reshape(200, 320, 4)[:, :, :3] = pixels[:, :, ::-1]
        rows.flush()

    def end(self) -> None:
        """As when somebody logs out."""
        self.process.terminate()
        self.process.wait(10.0)


@pytest.fixture
def desktop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desktop]:
    """A desktop of our own, where one can be had."""
    pytest.importorskip("mss", reason="mss is not installed")
    program = shutil.which("Xvfb")
    if program is None:
        pytest.skip("Xvfb, the X server without a monitor, is not installed (Debian: xvfb)")
    desktop = Desktop(program, tmp_path)
    monkeypatch.setenv("DISPLAY", desktop.display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    yield desktop
    desktop.end()


def test_the_live_screen_is_what_a_desktop_shows(desktop: Desktop) -> None:
    """Pixel for pixel; one look for each picture, as one screen and as all of them."""
    y, x = np.mgrid[0:200, 0:320]
    first = np.stack([x % 256, y, (x + y) % 256], axis=-1).astype(np.uint8)
    looks = live(every_s=0.0)
    desktop.paint(first)
    assert (np.asarray(next(looks).image()) == first).all()
    second = first[::-1]
    desktop.paint(second)
    assert (np.asarray(next(looks).image()) == second).all()
    assert (np.asarray(next(live(monitor=0)).image()) == second).all()


@pytest.mark.parametrize("monitor", [2, 7, -1])
def test_a_monitor_that_is_not_there_is_named(desktop: Desktop, monitor: int) -> None:
    """With those that are, and before anything has been loaded."""
    with pytest.raises(errors.BadArgument, match=rf"no monitor {monitor}: 1 to 1 are there"):
        live(monitor=monitor)


def test_a_desktop_that_ends_is_one_clear_error(desktop: Desktop) -> None:
    """Not an assertion of the library's; an agent then ends with what it has saved."""
    looks = live(every_s=0.0, only_changes=False)
    next(looks)
    desktop.end()
    with pytest.raises(ScreenLost, match=r"monitor 1 cannot be seen any more: .+ Start again"):
        next(looks)


def test_a_black_screen_under_wayland_is_told_of(
    desktop: Desktop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There X programs are shown nothing else, and the agent would record that."""
    desktop.paint(np.zeros((200, 320, 3), np.uint8))
    live()
    assert not caplog.records
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    live()
    assert "X11 session" in caplog.text


# --- ExecutionLoop ----------------------------------------------------------------------------------------------------


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


# --- signals ----------------------------------------------------------------------------------------------------------

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def send(number: signal.Signals) -> None:
    """To ourselves; the main thread hears it."""
    os.kill(os.getpid(), number)


def wait_out() -> None:
    """Something that takes for ever, as far as a test can wait."""
    threading.Event().wait(10.0)
    raise AssertionError("it was not cut off")


class Stuck(StandIn):
    """A manager whose mode changes never end; it tells when somebody waits."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self.number = number

    def set_execution_mode(self, mode: ExecutionMode) -> None:
        threading.Timer(0.02, send, [self.number]).start()
        wait_out()


@SIGNALS
def test_a_signal_ends_the_waiting_for_a_load(number: signal.Signals) -> None:
    """At once, without an error; afterwards signals mean what they meant before."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    loop = loop_with(Stuck(number))
    assert loop.run(ExecutionMode.RECORDING, [screen("r")]) == ()
    assert loop.stopper.signal is number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@SIGNALS
def test_a_signal_ends_the_waiting_for_a_screen(number: signal.Signals) -> None:
    """A source that has nothing to show for hours."""

    def endless() -> Iterator[Screen]:
        yield screen("r")
        threading.Timer(0.02, send, [number]).start()
        wait_out()

    assert len(loop_with(StandIn(says("red"))).run(ExecutionMode.RECORDING, endless())) == 1


@SIGNALS
def test_a_signal_lets_a_hook_finish(number: signal.Signals) -> None:
    """Half a click is worse than none: acting is finished, then it ends."""
    acted: list[str] = []

    def act(shot: Screen, _label: str) -> None:
        send(number)
        threading.Event().wait(0.01)
        acted.append(shot.name)

    manager = StandIn(says("red"))
    loop = loop_with(manager, on_action=act)
    loop.run(ExecutionMode.RECORDING, [screen("r", RED)])
    steps = loop.run(ExecutionMode.AUTOPILOT, [screen("r2", RED), screen("r3", RED)])
    assert [step.screen for step in steps] == acted == ["r2"]


@SIGNALS
def test_a_signal_lets_the_memory_be_written(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was labelled is on the disk when the loop ends."""
    real, once = os.fsync, [number]

    def fsync(handle: int) -> None:
        while once:
            send(once.pop())
        real(handle)

    monkeypatch.setattr("os.fsync", fsync)
    loop = loop_with(StandIn(says("red"), says("green")), memory_path=tmp_path / "m.npz")
    steps = loop.run(ExecutionMode.RECORDING, [screen("r", RED), screen("g", GREEN)])
    assert [step.result for step in steps] == ["recorded"]
    assert FusionEngine.load(tmp_path / "m.npz").labels == ("red",)


def test_a_second_ctrl_c_ends_the_hook_too() -> None:
    """Whoever presses it twice means it."""

    def act(_shot: Screen, _label: str) -> None:
        for _ in range(2):
            send(signal.SIGINT)
            threading.Event().wait(0.05)
        raise AssertionError("it went on")

    manager = StandIn(says("red"))
    loop = loop_with(manager, on_action=act)
    loop.run(ExecutionMode.RECORDING, [screen("r", RED)])
    assert loop.run(ExecutionMode.AUTOPILOT, [screen("r", RED)]) == ()


def test_an_ignored_signal_stays_ignored() -> None:
    """Under nohup, or in the background of a shell, a program goes on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        loop = loop_with(StandIn(says("red")), on_step=lambda _: send(signal.SIGINT))
        assert len(loop.run(ExecutionMode.RECORDING, [screen("r"), screen("r")])) == 2
        assert loop.stopper.signal is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_stop_lets_the_screen_in_hand_be_finished() -> None:
    """It is no signal: nothing is cut off."""
    manager = StandIn(says("red"))
    loop = loop_with(manager)
    generate = manager.generate

    def stopping(*args: Any, **options: Any) -> Completion:
        loop.stop()
        return generate(*args, **options)

    manager.generate = stopping  # type: ignore[method-assign]
    steps = loop.run(ExecutionMode.RECORDING, [screen("r"), screen("g", GREEN)])
    assert [step.result for step in steps] == ["recorded"]


def test_a_mode_that_was_refused_while_the_card_was_lent_is_asked_for_again() -> None:
    """When it has been given back the agent and the card are of one mind again, at the next screen."""
    world = SimulatedWorld()
    manager = inline(world)
    loop = ExecutionLoop(manager, UIDetector(manager), FusionEngine(LIMITS))
    with manager.lend("whisper"):
        loop.set_mode(ExecutionMode.AUTOPILOT)
        loop.handle(screen("r"))
        assert manager.get_status().state is State.IDLE
    loop.handle(screen("r"))
    assert manager.get_status().state is State.AUTOPILOT
    manager.close()


def test_a_signal_in_the_middle_of_a_load_leaves_nothing_on_the_card() -> None:
    """With the real manager: the load is given up, and closing gives everything back."""
    world = SimulatedWorld()
    gate = Gate(world, "ollama.load", "during")
    with threaded(world) as manager:
        loop = ExecutionLoop(manager, UIDetector(manager), FusionEngine(LIMITS))
        watcher = in_thread(lambda: (gate.wait(), send(signal.SIGTERM)))
        assert loop.run(ExecutionMode.RECORDING, [screen("r")]) == ()
        watcher.result(5.0)
        closing = in_thread(manager.close)
        until(lambda: manager.get_status().queued or closing.done())
        gate.open()
        let_time_pass(world, closing)
    assert not world.vlm_resident()
    assert world.vlm_held_mib() == 0.0


# --- asyncio ----------------------------------------------------------------------------------------------------------


def describing(_model: str, _prompt: str, images: list[bytes]) -> str:
    """A VLM that tells screens by their size."""
    return says(f"{len(images[0])} bytes")


def test_both_faces_do_the_same() -> None:
    """Screens from an async source, async hooks, and the same steps as from the blocking loop."""
    shots = [screen("r", RED), screen("g", GREEN, 16), screen("r again", RED)]

    async def coming() -> AsyncIterator[Screen]:
        for shot in shots:
            await asyncio.sleep(0)
            yield shot

    async def both() -> tuple[Any, Any]:
        acted: list[str] = []

        async def act(shot: Screen, _label: str) -> None:
            await asyncio.sleep(0)
            acted.append(shot.name)

        loop = ExecutionLoop(manager, UIDetector(manager), FusionEngine(LIMITS), on_action=act)
        steps = await loop.arun(ExecutionMode.RECORDING, coming())
        steps += await loop.arun(ExecutionMode.AUTOPILOT, shots)
        return [(step.screen, step.result, step.label) for step in steps], acted

    with threaded(SimulatedWorld(responder=describing)) as manager:
        awaited, acted = asyncio.run(both())
    with threaded(SimulatedWorld(responder=describing)) as manager:
        loop = ExecutionLoop(manager, UIDetector(manager), FusionEngine(LIMITS))
        steps = loop.run(ExecutionMode.RECORDING, shots) + loop.run(ExecutionMode.AUTOPILOT, shots)
    assert awaited == [(step.screen, step.result, step.label) for step in steps]
    assert [result for _, result, _ in awaited[:3]] == ["recorded", "recorded", "kept"]
    assert acted == ["r", "g", "r again"]


@SIGNALS
def test_under_asyncio_a_signal_ends_the_waiting_for_a_load_too(number: signal.Signals) -> None:
    """The event loop goes on meanwhile and afterwards; the load is the manager's, which is then closed."""
    world = SimulatedWorld()
    gate = Gate(world, "ollama.load", "during")

    async def work() -> int:
        loop = ExecutionLoop(manager, UIDetector(manager), FusionEngine(LIMITS))
        running = asyncio.create_task(loop.arun(ExecutionMode.RECORDING, [screen("r")]))
        while not gate.reached.is_set():
            await asyncio.sleep(0.001)
        send(number)
        assert await asyncio.wait_for(running, 5.0) == ()
        assert loop.stopper.signal is number
        return 7

    with threaded(world) as manager:
        assert asyncio.run(work()) == 7
        gate.open()
        let_time_pass(world, in_thread(manager.close))


def test_under_asyncio_a_signal_that_came_before_a_wait_cancels_it() -> None:
    """As `Stopped` it would leave the task and end the event loop with everything else in it."""

    async def work() -> str:
        stopper = Stopper()

        async def wait() -> None:
            send(signal.SIGTERM)
            with stopper.cut():
                await asyncio.Event().wait()

        task = asyncio.ensure_future(wait())
        with stopper, stopper.cancelling(task):
            await asyncio.wait([task], timeout=5.0)
        return "cancelled" if task.cancelled() else repr(task)

    assert asyncio.run(work()) == "cancelled"


def test_a_cancelled_arun_is_cancelled() -> None:
    """Only signals are taken for a clean end; whoever cancels the task gets what he asked for."""

    async def never() -> AsyncIterator[Screen]:
        await asyncio.Event().wait()
        yield screen("r")

    async def work() -> None:
        loop = ExecutionLoop(manager, UIDetector(manager), FusionEngine(LIMITS))
        running = asyncio.create_task(loop.arun(ExecutionMode.AUTOPILOT, never()))
        await asyncio.sleep(0.05)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    with threaded(SimulatedWorld()) as manager:
        asyncio.run(work())


# --- IDLE is a pause --------------------------------------------------------------------------------------------------


def test_idle_pauses_the_agent_and_frees_the_card(caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of its screens: nothing is taken or asked while it lasts, and then it goes on where it was."""
    world = SimulatedWorld(responder=lambda *_: says("red"))
    told: list[str] = []

    def pause(begins: bool) -> None:
        told.append("pause" if begins else "on")
        if begins:
            in_thread(go_on)

    def go_on() -> None:
        try:
            until(lambda: not world.vlm_held_mib() and manager.get_clip_device() == "cpu")
            told.append("free")
        finally:
            loop.follow(ExecutionMode.RECORDING)

    def step(done: Step) -> None:
        told.append(done.screen)
        if done.screen == "r":
            assert world.vlm_held_mib()
            manager.set_execution_mode(ExecutionMode.IDLE)
            loop.follow(ExecutionMode.IDLE)

    with inline(world) as manager:
        memory = FusionEngine(LIMITS)
        loop = ExecutionLoop(manager, UIDetector(manager), memory, on_step=step, on_pause=pause)
        loop.run(ExecutionMode.RECORDING, [screen("r"), screen("g", GREEN)])
    assert told == ["r", "pause", "free", "on", "g"]
    assert not caplog.records


@pytest.mark.parametrize("awaits", [False, True])
def test_a_screen_that_comes_in_a_pause_is_handled_after_it(awaits: bool) -> None:
    """IDLE was asked for while the source waited: it is not lost, and no model is asked before another mode is."""
    told: list[object] = []

    def pause(begins: bool) -> None:
        told.append(begins)
        if begins:
            in_thread(loop.follow, ExecutionMode.RECORDING)

    def slow() -> Iterator[Screen]:
        loop.follow(ExecutionMode.IDLE)  # another thread does
        yield screen("r")

    def work() -> None:
        if awaits:
            asyncio.run(loop.arun(ExecutionMode.AUTOPILOT, slow()))
        else:
            loop.run(ExecutionMode.AUTOPILOT, slow())

    with threaded(SimulatedWorld(responder=lambda *_: says("red"))) as manager:
        loop = ExecutionLoop(
            manager,
            UIDetector(manager),
            FusionEngine(LIMITS),
            on_step=lambda step: told.append((step.mode, step.result)),
            on_pause=pause,
        )
        work()
    assert told == [True, False, (ExecutionMode.RECORDING, "recorded")]


def test_a_pause_begins_on_a_screen_where_nothing_moves() -> None:
    """The live source lets it between two looks; a signal then still ends the waiting at once."""
    told: list[bool] = []
    looks: list[float] = []

    def pause(begins: bool) -> None:
        told.append(begins)
        if begins:
            threading.Timer(0.05, loop.follow, [ExecutionMode.AUTOPILOT]).start()

    def every_s() -> float:
        looks.append(time.monotonic())
        if len(looks) < 2:
            return 0.0
        assert len(looks) == 2, "the waiting was not ended"
        loop.follow(ExecutionMode.IDLE)
        loop.rest()
        threading.Timer(0.02, send, [signal.SIGTERM]).start()
        return 20.0

    loop = loop_with(StandIn(says("red")), on_pause=pause)
    begun = time.monotonic()
    loop.run(ExecutionMode.AUTOPILOT, live(every_s=every_s, grab=lambda: Image.new("RGB", (8, 8), RED)))
    assert told == [True, False]
    assert time.monotonic() - begun < 10.0


def test_idle_asked_for_once_more_frees_the_card_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode and IDLE right behind it may pass between two looks of a pause; what was loaded for it must not stay."""
    world = SimulatedWorld(responder=lambda *_: says("red"))
    held: list[bool] = []

    async def rest(_: object, __: float) -> None:
        held.append(bool(world.vlm_held_mib()))
        if len(held) == 1:
            for mode in ExecutionMode.RECORDING, ExecutionMode.IDLE:
                manager.set_execution_mode(mode)
                loop.follow(mode)
            assert world.vlm_held_mib()
        else:
            loop.stop()

    monkeypatch.setattr("gpu_fsm.agent.doors.BlockingDoor.rest", rest)
    with inline(world) as manager:
        loop = ExecutionLoop(manager, UIDetector(manager), FusionEngine(LIMITS))
        assert loop.run(ExecutionMode.IDLE, [screen("r")]) == (), "a stop ends a pause without another screen"
    assert held == [False, False]


def test_idle_pauses_an_agent_under_asyncio_too() -> None:
    """The event loop goes on meanwhile; a source that waits is not asked."""
    world = SimulatedWorld(responder=lambda *_: says("red"))
    asked: list[str] = []

    async def source() -> AsyncIterator[Screen]:
        for name, colour in (("r", RED), ("g", GREEN)):
            asked.append(name)
            yield screen(name, colour)

    async def work() -> int:
        loop = ExecutionLoop(manager, UIDetector(manager), FusionEngine(LIMITS))
        running = asyncio.create_task(loop.arun(ExecutionMode.IDLE, source()))
        while manager.get_clip_device() != "cpu":
            await asyncio.sleep(0.001)
        assert asked == []
        await loop.aset_mode(ExecutionMode.RECORDING)
        return len(await running)

    with threaded(world) as manager:
        let_time_pass(world, in_thread(manager.set_execution_mode, ExecutionMode.AUTOPILOT))
        assert manager.get_clip_device() != "cpu"
        assert let_time_pass(world, in_thread(asyncio.run, work())) == 2
        let_time_pass(world, in_thread(manager.close))


@SIGNALS
def test_a_signal_ends_a_pause(number: signal.Signals) -> None:
    """At once, as it ends every wait; a card that could not be given back is said to be."""
    begun = time.monotonic()
    manager = StandIn(refuse=unreachable)
    loop = loop_with(manager, on_pause=lambda begins: threading.Timer(0.02, send, [number]).start() if begins else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpu_fsm.agent.loop._PAUSE_LOOK_S", 20.0)
        assert loop.run(ExecutionMode.IDLE, [screen("r")]) == ()
    assert loop.stopper.signal is number
    assert time.monotonic() - begun < 10.0


def test_a_blocking_source_does_not_block_the_event_loop() -> None:
    """It waits in a thread of its own, one that does not keep the program from ending."""
    asked, go = threading.Event(), threading.Event()

    def slow() -> Iterator[Screen]:
        asked.set()
        go.wait(30.0)
        yield screen("r")

    async def work() -> int:
        loop = ExecutionLoop(manager, UIDetector(manager), FusionEngine(LIMITS))
        running = asyncio.create_task(loop.arun(ExecutionMode.AUTOPILOT, slow()))
        while not asked.is_set():
            await asyncio.sleep(0.001)
        go.set()
        return len(await running)

    with threaded(SimulatedWorld()) as manager:
        assert asyncio.run(work()) == 1
