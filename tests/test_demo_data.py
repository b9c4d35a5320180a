"""The shipped screens and model, and the main job played on them."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from gpu_fsm.agent import FusionEngine, Limits, Screen, Verdict, probe_image
from gpu_fsm.status import State

np = pytest.importorskip("numpy", reason="numpy is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

DATA = Path(__file__).resolve().parents[1] / "gpu_fsm" / "data"
SCREENS = DATA / "screens"
ENTRIES: list[dict[str, str]] = json.loads((SCREENS / "manifest.json").read_text(encoding="utf-8"))["screens"]
BASES = [entry for entry in ENTRIES if entry["kind"] == "base"]
VARIATIONS = [entry for entry in ENTRIES if entry["kind"] == "variation"]
UNKNOWN = [entry for entry in ENTRIES if entry["kind"] == "unknown"]


def pixels(entry: dict[str, str]) -> Any:
    """RGB of shape (height, width, 3), signed so that differences do not wrap."""
    with Image.open(SCREENS / entry["file"]) as image:
        return np.asarray(image.convert("RGB"), np.int16)


# --- the files --------------------------------------------------------------------------------------------------------


def test_the_manifest_and_the_folder_agree() -> None:
    """Every file is listed with its digest and every listed file is there."""
    assert {entry["file"] for entry in ENTRIES} == {path.name for path in SCREENS.glob("*.png")}
    assert len({entry["sha256"] for entry in ENTRIES}) == len(ENTRIES)
    for entry in ENTRIES:
        assert hashlib.sha256((SCREENS / entry["file"]).read_bytes()).hexdigest() == entry["sha256"], entry["file"]


def test_there_are_enough_screens() -> None:
    """At least 6 recorded screens with 4 variations each, at least 3 that are never recorded, each label once."""
    assert len(BASES) >= 6
    assert len(UNKNOWN) >= 3
    for base in BASES:
        changes = [entry["change"] for entry in VARIATIONS if entry["screen"] == base["screen"]]
        assert len(set(changes)) == len(changes) >= 4
        assert {"dark", "text", "size", "dialog"} <= set(changes)
    labels = [entry["label"] for entry in BASES + UNKNOWN]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("entry", VARIATIONS, ids=lambda entry: entry["file"])
def test_a_variation_differs_from_its_base_in_a_twentieth_of_its_pixels(entry: dict[str, str]) -> None:
    """A pixel differs when a channel is off by more than 24 of 255.

    Another size is compared twice, laid over the base's top left and stretched to the base's size.
    """
    base = pixels(next(base for base in BASES if base["screen"] == entry["screen"]))
    other = pixels(entry)
    height, width = (min(base.shape[axis], other.shape[axis]) for axis in (0, 1))
    stretched = Image.fromarray(other.astype(np.uint8)).resize(base.shape[1::-1], Image.Resampling.NEAREST)
    pairs = [(base[:height, :width], other[:height, :width]), (base, np.asarray(stretched, np.int16))]
    for one, two in pairs:
        differing = (np.abs(one - two).max(axis=2) > 24).mean()
        assert differing >= 0.05, f"{differing:.1%}"


def test_the_data_stay_small() -> None:
    """Screens and model travel in every wheel."""
    assert sum(path.stat().st_size for path in SCREENS.iterdir()) < 2 * 2**20
    assert sum(path.stat().st_size for path in (DATA / "tiny-clip").iterdir()) < 5 * 2**20


def test_the_thresholds_say_where_they_come_from() -> None:
    """They were derived from layouts drawn at random; see the generator for how."""
    found = json.loads((DATA / "tiny-clip" / "recognition.json").read_text(encoding="utf-8"))
    assert "no screenshot took part" in found["derived_from"]["data"]
    assert found["derived_from"]["strange_taken_for_known"] <= 0.011
    limits = Limits.beside(DATA / "tiny-clip")
    assert limits == Limits(accept=found["accept"], unsure=found["unsure"], margin=found["margin"])


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    """The embedding of each shipped screen, through `CLIPManager` over the shipped model."""
    from gpu_fsm.clip import CLIPManager
    from gpu_fsm.settings import GPUResourceConfig

    clip = CLIPManager(GPUResourceConfig(clip_model=str(DATA / "tiny-clip"), clip_device="cpu"))
    images = [Image.open(io.BytesIO((SCREENS / entry["file"]).read_bytes())) for entry in ENTRIES]
    embedded = clip.encode([*images, probe_image()])
    clip.close()
    return dict(zip([*(entry["file"] for entry in ENTRIES), "probe"], embedded, strict=True))


def memory_of(vectors: dict[str, Any], left_out: str = "") -> FusionEngine:
    """The recorded screens, perhaps without one."""
    memory = FusionEngine(Limits.beside(DATA / "tiny-clip"), probe=vectors["probe"])
    for base in BASES:
        if base["screen"] != left_out:
            memory.add(base["label"], vectors[base["file"]])
    return memory


@pytest.mark.needs_torch
def test_variations_are_recognised_as_the_right_screen(vectors: dict[str, Any]) -> None:
    """At least 95 % of them, and none as another screen."""
    memory = memory_of(vectors)
    found = [(entry, memory.match(vectors[entry["file"]])) for entry in VARIATIONS]
    taken = [(entry, match) for entry, match in found if match.verdict is Verdict.RECOGNISED]
    assert [entry["file"] for entry, match in taken if match.label != entry["label"]] == []
    missed = [entry["file"] for entry, match in found if match.verdict is not Verdict.RECOGNISED]
    assert len(taken) / len(found) >= 0.95, missed


@pytest.mark.needs_torch
def test_screens_never_recorded_are_not_taken_for_known_ones(vectors: dict[str, Any]) -> None:
    """Neither the unknown screens nor, with its own screen left out of the memory, any other."""
    for entry in UNKNOWN:
        assert memory_of(vectors).match(vectors[entry["file"]]).verdict is not Verdict.RECOGNISED, entry["file"]
    taken = [
        entry["file"]
        for entry in BASES + VARIATIONS
        if memory_of(vectors, entry["screen"]).match(vectors[entry["file"]]).verdict is Verdict.RECOGNISED
    ]
    assert len(taken) <= 0.05 * len(BASES + VARIATIONS), taken


@pytest.mark.needs_torch
def test_the_shipped_model_is_a_clip_with_both_towers() -> None:
    """It loads as any published CLIP does, from safetensors in float32, and takes texts too."""
    import torch
    from sentence_transformers import SentenceTransformer

    pipeline = SentenceTransformer(str(DATA / "tiny-clip"), device="cpu", local_files_only=True)
    model: Any = pipeline[0]
    assert type(model.model).__name__ == "CLIPModel"
    assert {weights.dtype for weights in pipeline.parameters()} == {torch.float32}
    texts = pipeline.encode([{"text": text} for text in ("", "sign-in form", "Größe 😀", "x" * 1000)])
    assert texts.shape == (4, pipeline.get_embedding_dimension())


# --- the story --------------------------------------------------------------------------------------------------------


class Notes:
    """A teller that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def begin(self, manager: Any, lines: Any) -> None:
        self.lines.extend(lines)

    def say(self, line: str) -> None:
        self.lines.append(line)

    def end(self) -> None:
        """Nothing is open."""


@pytest.fixture(scope="module")
def told() -> Any:
    """The demo, played once."""
    from gpu_fsm.demo import DemoOptions, play
    from gpu_fsm.settings import GPUResourceConfig

    notes = Notes()
    return play(DemoOptions(config=GPUResourceConfig()), notes), notes.lines


@pytest.mark.needs_torch
def test_the_story_ends_well(told: Any) -> None:
    """Every phase did what it should, within the promised time, and what is simulated was said."""
    story, lines = told
    report = story.to_dict()
    assert report["ok"], [(phase["name"], phase["failed"]) for phase in report["phases"]]
    assert report["recognised_share"] >= 0.95
    assert report["falsely_recognised"] == 0
    assert report["unknown_found"] == len(UNKNOWN)
    assert report["on_demand_loads"] == report["idle_unloads"] >= 1
    assert (report["degradations"], report["recoveries"]) == (2, 2)
    assert sum(phase["seconds"] for phase in report["phases"]) < 60
    assert report["simulated"] == ["card", "ollama", "vlm", "clip placement"]
    assert "does not look" in lines[1]
    assert not any("cuda" in line for line in lines)
    json.dumps(report)


@pytest.mark.needs_torch
def test_the_figures_follow_from_journal_and_server_log(told: Any) -> None:
    """Counted again here, in another way than the demo counts."""
    story, _ = told
    report, record = story.to_dict(), story.record
    answered = [
        entry for entry in record.server if entry["path"] == "/api/generate" and entry["images"] and entry["ok"]
    ]
    asked = [step for _, step in record.steps if step.classification and step.classification.source == "vlm"]
    assert len(answered) == len(asked) == report["vlm_answers"]
    assert {step.screen for step in asked} >= {entry["file"] for entry in BASES + UNKNOWN}
    truth = {entry["file"]: entry["label"] for entry in ENTRIES}
    autopilot = [step for _, step in record.steps if step.screen in {entry["file"] for entry in VARIATIONS}]
    right = sum(step.result == "recognised" and step.label == truth[step.screen] for step in autopilot)
    wrong = sum(step.result == "recognised" and step.label != truth[step.screen] for step in autopilot)
    assert report["recognised_share"] == round(right / len(autopilot), 4)
    assert report["falsely_recognised"] == wrong
    assert report["requests_served"] == len(record.steps)
    assert report["requests_served"] == sum(phase["requests_served"] for phase in report["phases"])
    entered = [row.dest for row in record.journal if row.dest is not row.source]
    assert report["states"] == ["idle", *(state.value for state in entered)]
    modes = [state for state in entered if state in (State.IDLE, State.RECORDING, State.AUTOPILOT, State.DEGRADED)]
    assert sum(switch["count"] for switch in report["switches"]) == len(modes)
    assert report["recoveries"] == sum(
        before is State.DEGRADED and after is not State.DEGRADED for before, after in itertools.pairwise(modes)
    )
    for switch in report["switches"]:
        assert 0 < switch["p50_ms"] <= switch["max_ms"]


@pytest.mark.needs_torch
def test_the_journal_of_the_story_has_no_gap(told: Any) -> None:
    """Nothing happened that was not written down."""
    story, _ = told
    journal = story.record.journal
    assert [row.n for row in journal] == list(range(1, len(journal) + 1))
    assert all(before.dest is after.source for before, after in itertools.pairwise(journal))


@pytest.mark.needs_torch
def test_a_shuffled_index_makes_the_demo_fail(capsys: pytest.CaptureFixture[str]) -> None:
    """With each screen remembered under another's label every recognition is false; stdout holds one JSON document."""
    from gpu_fsm.demo import DemoOptions, run_demo
    from gpu_fsm.settings import GPUResourceConfig

    assert run_demo(DemoOptions(config=GPUResourceConfig(), as_json=True, shuffle_index=True)) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["ok"] is False
    assert report["falsely_recognised"] >= 0.95 * len(VARIATIONS)
    assert report["recognised_share"] == 0
    assert "FAILED" in err


def test_the_middle_of_a_switch_is_a_time_that_was_measured() -> None:
    """p50 of an even number of switches is the lower middle one, not an average of two."""
    from gpu_fsm.demo import switches
    from gpu_fsm.engine import JournalRecord
    from gpu_fsm.guards import Plan

    rows, at = [], 0.0
    for took in (4.0, 1.0, 3.0, 2.0):
        for source, dest, moment in ((State.IDLE, State.RELEASING, at), (State.RELEASING, State.IDLE, at + took)):
            rows.append(
                JournalRecord(
                    n=len(rows) + 1,
                    at=moment,
                    trigger="request",
                    source=source,
                    dest=dest,
                    row="r",
                    verdicts={},
                    plan=Plan(),
                )
            )
        at += 10
    (switch,) = switches(rows, float("-inf"), float("inf"))
    assert (switch["count"], switch["p50_ms"], switch["max_ms"]) == (4, 2000.0, 4000.0)
    assert statistics.median_low([4, 1, 3, 2]) == 2
    assert switches(rows, 100.0, 200.0) == []


def test_own_screens_leave_some_unrecorded(tmp_path: Path) -> None:
    """Every fourth is never recorded; the others come again, changed; names are all that the simulated VLM knows."""
    from gpu_fsm.demo import own_album

    for i in range(6):
        Image.new("RGB", (40, 30), (i * 40, 0, 0)).save(tmp_path / f"{i}.png")
    album = own_album(tmp_path)
    assert [screen.name for screen in album.strange] == ["3.png"]
    assert [screen.name for screen in album.recorded] == ["0.png", "1.png", "2.png", "4.png", "5.png"]
    assert album.variations[0].image().size == (32, 24)
    assert Screen(name="x", data=(tmp_path / "3.png").read_bytes()).digest not in album.labels
