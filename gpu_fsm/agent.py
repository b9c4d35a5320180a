"""The reference agent: it records screens with the VLM and then recognises them with CLIP.

Three parts that know nothing of each other: `UIDetector` asks the VLM what a screen is, `FusionEngine` remembers the
embeddings of labelled screens, `ExecutionLoop` drives the manager's modes and decides which of the two a screen needs.
None of them touches the card: whatever they need they lease from the manager, and a "no" is an answer to work with.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import io
import json
import os
import tempfile
import threading
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from attrs import define, field, frozen

from gpu_fsm.errors import BadArgument, GPUFSMError, LeaseLost, ManagerClosed, one_line
from gpu_fsm.status import ExecutionMode, GPUResourceStatus, State

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from gpu_fsm.ports import Completion

    Vector = NDArray[np.float32]


# --- what the agent needs of a manager --------------------------------------------------------------------------------


class VLMSession(Protocol):
    """A VLM lease as the agent uses it."""

    def generate(
        self,
        prompt: str,
        *,
        images: Sequence[object] = (),
        format: Mapping[str, Any] | str | None = None,  # noqa: A002 - Ollama's word
    ) -> Completion:
        """Run the VLM once."""


class CLIPSession(Protocol):
    """A CLIP lease as the agent uses it."""

    def encode(self, items: Sequence[object]) -> Vector:
        """Embed images; float32 of shape (n, d), unit length."""


class Manager(Protocol):
    """The part of `GPUResourceManager` that an agent needs; anything with these verbs will do."""

    def set_execution_mode(self, mode: ExecutionMode) -> object:
        """Ask for a mode; returns when it stands or was turned down."""

    def get_status(self) -> GPUResourceStatus:
        """The state of everything, at once."""

    def vlm(self, *, holder: str = "", timeout_s: float | None = None) -> contextlib.AbstractContextManager[VLMSession]:
        """Lease the VLM, loading it where need be."""

    def clip(
        self, *, holder: str = "", timeout_s: float | None = None
    ) -> contextlib.AbstractContextManager[CLIPSession]:
        """Lease CLIP where it is."""


# --- screens ----------------------------------------------------------------------------------------------------------

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_LARGEST_SCREEN_BYTES = 64 * 2**20
"""More than any screenshot: an 8K screen without compression is 100 MB, as PNG rarely a third of it."""


@frozen(kw_only=True)
class Screen:
    """One screenshot: its name and the bytes of its file."""

    name: str
    data: bytes = field(repr=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    def image(self) -> Image:
        """Decode to RGB.  Raises `BadArgument` for bytes that are no whole image."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(self.data)) as opened:
                return opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            unknown = isinstance(error, UnidentifiedImageError)  # its own text names our buffer, not the file
            why = "an unknown format, or damaged" if unknown else one_line(error, 80)
            raise BadArgument(
                detail=f"{one_line(self.name)} is no image that can be read: {why}",
                remedy="Remove the file or store it again as a PNG.",
            ) from error


def load_screens(folder: Path | str) -> tuple[Screen, ...]:
    """Read all images of a folder, sorted by name, and check that each can be decoded.

    Raises `BadArgument` for a folder that is missing or holds no image, and for a broken image.
    """
    folder = Path(folder)
    mend = "Name a folder that holds PNG or JPEG screenshots."
    if not folder.is_dir():
        raise BadArgument(detail=f"{one_line(folder)} is no folder", remedy=mend)
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not found:
        raise BadArgument(detail=f"{one_line(folder)} holds no image", remedy=mend)
    screens = []
    for path in found:
        try:
            if path.stat().st_size > _LARGEST_SCREEN_BYTES:
                raise BadArgument(detail=f"{one_line(path)} is larger than 64 MiB", remedy="Store it smaller.")
            screen = Screen(name=path.name, data=path.read_bytes())
        except OSError as error:
            why = one_line(error.strerror)
            raise BadArgument(detail=f"{one_line(path)} cannot be read: {why}", remedy=mend) from error
        screen.image()
        screens.append(screen)
    return tuple(screens)


# --- UIDetector: what is on this screen? ------------------------------------------------------------------------------

_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"label": {"type": "string"}, "summary": {"type": "string"}},
    "required": ["label", "summary"],
}
_PROMPT = (
    "Which screen of which kind of program does this screenshot show? Answer in JSON: `label`, two to four words that "
    "name the kind of screen without its content, and `summary`, one sentence about what can be done on it. "
    "If it cannot be told, the label is `unknown`."
)
_REPAIR = "Your last answer did not fit: {problem}. Answer with one JSON object with the strings `label` and `summary`."
_LONGEST_LABEL = 80
UNKNOWN_LABEL = "unknown"


@frozen(kw_only=True)
class Classification:
    """What the VLM says about a screen, or why it says nothing."""

    label: str | None = None
    """None where there is no answer; `unknown` where the VLM was asked and could not tell."""
    summary: str = ""
    available: bool = True
    reason: str = ""
    """Why there is no answer, in words."""
    source: Literal["vlm", "cache", "none"] = "none"
    repaired: bool = False
    """The first answer did not fit the schema, the second did."""

    @property
    def tells(self) -> bool:
        """Whether there is a label that says something."""
        return self.label is not None and self.label != UNKNOWN_LABEL


class UIDetector:
    """Classifies screens through the manager's VLM; answers "unavailable, because ..." instead of failing.

    Thread-safe; two threads that ask about the same new screen at once may both ask the VLM.
    """

    def __init__(
        self,
        manager: Manager,
        *,
        prompt: str = _PROMPT,
        timeout_s: float | None = None,
        largest_side: int = 1600,
        cache_size: int = 1024,
    ) -> None:
        """Screens with a longer side than `largest_side` pixels are sent smaller; `cache_size` answers are kept."""
        self._manager = manager
        self._prompt = prompt
        self._timeout_s = timeout_s
        self._largest_side = largest_side
        self._cache_size = cache_size
        self._cache: OrderedDict[str, Classification] = OrderedDict()
        self._lock = threading.Lock()

    def classify(self, screen: Screen) -> Classification:
        """Ask the cache, then the VLM.  Raises only `BadArgument` (no image) and `ManagerClosed`."""
        digest = screen.digest
        with self._lock:
            if digest in self._cache:
                self._cache.move_to_end(digest)
                kept = self._cache[digest]
                return Classification(label=kept.label, summary=kept.summary, source="cache")
        picture = self._picture(screen)
        try:
            answer = self._ask_again_once(picture)
        except (ManagerClosed, BadArgument):
            raise
        except GPUFSMError as error:
            return Classification(available=False, reason=f"unavailable, because {one_line(error)}")
        if answer.label is not None:
            with self._lock:
                self._cache[digest] = answer
                if len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
        return answer

    def _ask_again_once(self, picture: bytes) -> Classification:
        try:
            return self._ask(picture)
        except LeaseLost:
            # The VLM was taken away under the lease; a new lease waits until it is back or says why not.
            return self._ask(picture)

    def _ask(self, picture: bytes) -> Classification:
        with self._manager.vlm(timeout_s=self._timeout_s, holder="UIDetector") as vlm:
            said = vlm.generate(self._prompt, images=[picture], format=_SCHEMA)
            label, summary, problem = _read_answer(said.text)
            repaired = bool(problem)
            if problem:
                prompt = f"{self._prompt}\n{_REPAIR.format(problem=problem)}"
                said = vlm.generate(prompt, images=[picture], format=_SCHEMA)
                label, summary, problem = _read_answer(said.text)
        if problem:
            return Classification(reason=f"the VLM's answer did not fit twice: {problem}", source="vlm")
        return Classification(label=label, summary=summary, source="vlm", repaired=repaired)

    def _picture(self, screen: Screen) -> bytes:
        image = screen.image()
        if max(image.size) <= self._largest_side:
            return screen.data
        image.thumbnail((self._largest_side, self._largest_side))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()


def _read_answer(text: str) -> tuple[str, str, str]:
    """Label, summary and an empty problem, or two empty texts and what is wrong."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return "", "", "it was no JSON"
    if not isinstance(answer, dict):
        return "", "", "it was no object"
    label, summary = answer.get("label"), answer.get("summary", "")
    if not isinstance(label, str) or not label.strip():
        return "", "", "`label` was no text"
    if not isinstance(summary, str):
        return "", "", "`summary` was no text"
    return one_line(" ".join(label.split()), _LONGEST_LABEL), one_line(" ".join(summary.split()), 400), ""


# --- FusionEngine: have we seen this screen? --------------------------------------------------------------------------


@frozen(kw_only=True)
class Limits:
    """Cosine similarities that separate recognised, unsure and unknown; they belong to one CLIP model."""

    accept: float = 0.92
    """At least this much like the nearest screen, to be taken for it."""
    unsure: float = 0.85
    """Less than this is like nothing we know."""
    margin: float = 0.02
    """How much farther the nearest *other* screen must be."""

    def __attrs_post_init__(self) -> None:
        if not (-1.0 <= self.unsure <= self.accept <= 1.0 and 0.0 <= self.margin <= 2.0):
            raise BadArgument(
                detail=f"accept {self.accept}, unsure {self.unsure} and margin {self.margin} are not "
                "-1 <= unsure <= accept <= 1 and 0 <= margin <= 2",
                remedy="Take them from the model's own recognition.json.",
            )

    @classmethod
    def beside(cls, model: Path | str) -> Limits:
        """Read `recognition.json` of a model folder; the defaults (for clip-ViT-B-32) where there is none."""
        path = Path(model) / "recognition.json"
        if not path.is_file():
            return cls()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(accept=float(found["accept"]), unsure=float(found["unsure"]), margin=float(found["margin"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadArgument(
                detail=f"{one_line(path)} does not hold accept, unsure and margin", remedy="Remove or mend it."
            ) from error


class Verdict(enum.Enum):
    """How well a screen is known."""

    RECOGNISED = "recognised"
    UNSURE = "unsure"
    UNKNOWN = "unknown"


@frozen(kw_only=True)
class Match:
    """The nearest remembered screen and what to think of it."""

    verdict: Verdict
    label: str | None = None
    """The nearest screen's label, also where it is not trusted; None in an empty memory."""
    score: float = -1.0
    """Cosine similarity to it."""
    second_label: str | None = None
    second_score: float = -1.0
    """The nearest screen of another label."""


@define(kw_only=True, eq=False, slots=False)
class ScreenMemoryError(GPUFSMError, ValueError):
    """A stored screen memory cannot be used: not ours, cut off, of a later version, or of another CLIP model."""

    code: ClassVar[str] = "screen_memory"
    bucket: ClassVar[Literal["user"]] = "user"

    path: str = ""


_FORMAT = "gpu_fsm screen memory"
_VERSION = 1
_MEMBERS = frozenset({"about.npy", "vectors.npy", "probe.npy"})
_LARGEST_MEMORY_BYTES = 2**30
_SAME_MODEL = 0.999
"""Two devices and half precision move an embedding by less than 1e-4; another model moves it by far more."""


class FusionEngine:
    """Screen memory: labelled CLIP embeddings, searched by cosine similarity.

    `probe` is the model's fingerprint: the embedding of `probe_image()`, shape (d,).  It is the same on every device
    and after every restart, and differs for any other weights.  Thread-safe.
    """

    def __init__(self, limits: Limits | None = None, *, probe: Vector | None = None) -> None:
        import numpy as np

        self.limits = limits or Limits()
        self._probe = None if probe is None else _unit(probe)
        self._labels: list[str] = []
        self._digests: list[str] = []
        self._vectors = np.zeros((0, 0), np.float32)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> tuple[str, ...]:
        """One label a vector, in the order of recording."""
        return tuple(self._labels)

    def knows(self, digest: str) -> bool:
        """Whether exactly this picture was recorded."""
        return digest in self._digests

    def add(self, label: str, vector: Vector, *, digest: str = "") -> None:
        """Remember one embedding of shape (d,).  The same picture again replaces its older entry."""
        import numpy as np

        row = _unit(vector)
        with self._lock:
            if self._labels and row.shape[0] != self._vectors.shape[1]:
                raise BadArgument(
                    detail=f"a vector of {row.shape[0]} numbers among vectors of {self._vectors.shape[1]}",
                    remedy="One memory takes the embeddings of one CLIP model.",
                )
            labels, digests, vectors = list(self._labels), list(self._digests), self._vectors
            if digest and digest in digests:
                at = digests.index(digest)
                del labels[at], digests[at]
                vectors = np.delete(vectors, at, axis=0)
            self._vectors = np.vstack([vectors.reshape(-1, row.shape[0]), row[None]])
            self._labels, self._digests = [*labels, label], [*digests, digest]

    def match(self, vector: Vector) -> Match:
        """Find the nearest label and judge it by the limits."""
        import numpy as np

        with self._lock:
            labels, vectors = self._labels, self._vectors
        if not labels:
            return Match(verdict=Verdict.UNKNOWN)
        row = _unit(vector)
        if row.shape[0] != vectors.shape[1]:
            raise BadArgument(
                detail=f"a vector of {row.shape[0]} numbers against vectors of {vectors.shape[1]}",
                remedy="Ask with the CLIP model that recorded.",
            )
        scores = vectors @ row
        nearest: dict[str, float] = {}
        for place in np.argsort(-scores):
            nearest.setdefault(labels[place], float(scores[place]))
            if len(nearest) == 2:
                break
        ranked = list(nearest.items())
        label, score = ranked[0]
        second_label, second_score = ranked[1] if len(ranked) > 1 else (None, -1.0)
        if score < self.limits.unsure:
            verdict = Verdict.UNKNOWN
        elif score >= self.limits.accept and score - second_score >= self.limits.margin:
            verdict = Verdict.RECOGNISED
        else:
            verdict = Verdict.UNSURE
        return Match(verdict=verdict, label=label, score=score, second_label=second_label, second_score=second_score)

    def relabelled(self, labels: Sequence[str]) -> FusionEngine:
        """A copy with other labels for the same vectors, in the same order."""
        if len(labels) != len(self._labels):
            raise BadArgument(detail=f"{len(labels)} labels for {len(self._labels)} vectors", remedy="Give one each.")
        copy = FusionEngine(self.limits, probe=self._probe)
        copy._labels, copy._digests, copy._vectors = list(labels), list(self._digests), self._vectors
        return copy

    def save(self, path: Path | str) -> None:
        """Write to a new file beside `path`, then put it in its place: a reader sees the old or the new one, whole."""
        import numpy as np

        path = Path(path)
        with self._lock:
            about = {"format": _FORMAT, "version": _VERSION, "labels": self._labels, "digests": self._digests}
            vectors = self._vectors
        probe = np.zeros(0, np.float32) if self._probe is None else self._probe
        handle, name = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                text = np.frombuffer(json.dumps(about).encode(), np.uint8)
                np.savez(stream, allow_pickle=False, about=text, vectors=vectors, probe=probe)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise

    @classmethod
    def load(cls, path: Path | str, limits: Limits | None = None, *, probe: Vector | None = None) -> FusionEngine:
        """Read a memory that `save` wrote.

        With `probe`, the embedding of `probe_image()` by the CLIP in use, a memory of another model is refused.
        Raises `ScreenMemoryError` for everything that is not a whole memory of this version.
        """
        import numpy as np

        def refuse(why: str, mend: str = "Record the screens again, or name another file.") -> ScreenMemoryError:
            return ScreenMemoryError(detail=f"{one_line(path)} {why}", remedy=mend, path=str(path))

        path = Path(path)
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                if {member.filename for member in members} != _MEMBERS or len(members) != len(_MEMBERS):
                    raise refuse("is not a screen memory")
                # Counted before anything is unpacked: a small file may claim to hold terabytes.
                if sum(member.file_size for member in members) > _LARGEST_MEMORY_BYTES:
                    raise refuse("is larger than 1 GiB")
            with np.load(path, allow_pickle=False) as stored:
                about = json.loads(bytes(stored["about"]))
                vectors, stored_probe = stored["vectors"], stored["probe"]
        except ScreenMemoryError:
            raise
        except OSError as error:
            raise refuse(f"cannot be read: {one_line(error.strerror or error)}") from error
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError, NotImplementedError, zlib.error) as error:
            raise refuse("is not a whole screen memory") from error
        if not isinstance(about, dict) or about.get("format") != _FORMAT:
            raise refuse("is not a screen memory")
        if about.get("version") != _VERSION:
            why = f"has version {one_line(about.get('version'))}, not {_VERSION}"
            raise refuse(why, "Use the gpu_fsm that wrote it.")
        labels: Any = about.get("labels")
        digests: Any = about.get("digests")
        sound = (
            _are_texts(labels)
            and _are_texts(digests)
            and len(labels) == len(digests)
            and vectors.dtype == np.float32
            and vectors.ndim == 2
            and vectors.shape[0] == len(labels)
            and bool(np.isfinite(vectors).all())
            and stored_probe.dtype == np.float32
            and stored_probe.ndim == 1
        )
        if not sound:
            raise refuse("is damaged")
        if probe is not None and stored_probe.size:
            asked = _unit(probe)
            if asked.shape != stored_probe.shape or float(asked @ stored_probe) < _SAME_MODEL:
                raise refuse("was recorded with another CLIP model")
        memory = cls(limits, probe=stored_probe if stored_probe.size else probe)
        memory._labels, memory._digests, memory._vectors = labels, digests, vectors
        return memory


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _unit(vector: Vector) -> Vector:
    """The same direction with length 1, float32 of shape (d,)."""
    import numpy as np

    row = np.asarray(vector, np.float32)
    length = float(np.linalg.norm(row)) if row.ndim == 1 and row.size else 0.0
    if not np.isfinite(length) or length <= 0.0:
        raise BadArgument(
            detail=f"an embedding of shape {row.shape} that is no finite direction",
            remedy="Pass one embedding of shape (d,) as CLIP's encode returned it.",
        )
    return row / np.float32(length)


def probe_image() -> Image:
    """The picture whose embedding is a model's fingerprint: fixed stripes and steps, 96 x 96 pixels."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:96, 0:96]
    channels = [(x * 5 + y) % 256, (y * 7) % 256, ((x // 12 + y // 12) % 2) * 255]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


# --- ExecutionLoop: the agent itself ----------------------------------------------------------------------------------


@frozen(kw_only=True)
class Step:
    """How one screen was handled."""

    screen: str
    mode: ExecutionMode
    """As which mode says it was handled."""
    state: State
    """The manager's state when the screen had been handled."""
    result: Literal["recorded", "kept", "recognised", "asked", "unavailable", "failed"]
    """`kept`: recorded before; `asked`: the VLM was asked and answered; `unavailable`: it could not be asked."""
    label: str | None = None
    match: Match | None = None
    classification: Classification | None = None
    detail: str = ""
    elapsed_s: float = 0.0


Action = Callable[[Screen, str], None]
"""Called with a screen and its label, for every screen that autopilot recognised."""


class ExecutionLoop:
    """Takes screens one after the other and handles each as the asked mode says.

    RECORDING: the VLM labels a new screen and its embedding is remembered.  AUTOPILOT: a screen that is recognised is
    acted on; any other is a question to the VLM, on demand.  In DEGRADED it goes on with what is there, which is CLIP
    on the CPU.  One thread drives it; `stop` may be called from any other, or from a signal handler.
    """

    def __init__(
        self,
        manager: Manager,
        detector: UIDetector,
        memory: FusionEngine,
        *,
        on_action: Action | None = None,
        on_step: Callable[[Step], None] | None = None,
        memory_path: Path | str | None = None,
    ) -> None:
        """With `memory_path` the memory is saved after each recorded screen, so a killed process loses at most one."""
        self._manager = manager
        self._detector = detector
        self.memory = memory
        self._on_action = on_action
        self._on_step = on_step
        self._memory_path = memory_path
        self._mode = ExecutionMode.IDLE
        self._stop = threading.Event()

    @property
    def mode(self) -> ExecutionMode:
        """The mode asked for last."""
        return self._mode

    def set_mode(self, mode: ExecutionMode) -> None:
        """Change the agent's mode and have the manager arrange the card for it.

        A refusal or a degraded manager does not stop the agent: it goes on with what there is, and the manager
        remembers what was asked.
        """
        self._mode = mode
        with contextlib.suppress(GPUFSMError):
            self._manager.set_execution_mode(mode)

    def run(self, mode: ExecutionMode, screens: Iterable[Screen]) -> tuple[Step, ...]:
        """Set a mode and handle screens until they end or somebody calls `stop`."""
        self.set_mode(mode)
        return tuple(self.steps(screens))

    def steps(self, screens: Iterable[Screen]) -> Iterator[Step]:
        """Handle screens in the mode that is set, yielding how each went."""
        for screen in screens:
            if self._stop.is_set():
                return
            try:
                step = self.handle(screen)
            except ManagerClosed:
                return
            yield step

    def stop(self) -> None:
        """End after the screen in hand."""
        self._stop.set()

    def handle(self, screen: Screen, mode: ExecutionMode | None = None) -> Step:
        """Handle one screen as `mode` says, or as the asked mode does; the manager is not asked for another mode.

        Raises only `ManagerClosed`, and what the action hook raises.
        """
        start = time.monotonic()
        mode = mode or self._mode
        handler = self._record if mode is ExecutionMode.RECORDING else self._recognise
        try:
            facts = handler(screen)
        except ManagerClosed:
            raise
        except GPUFSMError as error:
            facts = {"result": "failed", "detail": one_line(error)}
        step = Step(
            screen=screen.name,
            mode=mode,
            state=self._manager.get_status().state,
            elapsed_s=time.monotonic() - start,
            **facts,
        )
        if step.result == "recognised" and self._on_action is not None and step.label is not None:
            self._on_action(screen, step.label)
        if self._on_step is not None:
            self._on_step(step)
        return step

    def _record(self, screen: Screen) -> dict[str, Any]:
        if self.memory.knows(screen.digest):
            return {"result": "kept"}
        seen = self._detector.classify(screen)
        if not seen.tells or seen.label is None:
            # A screen without a name is not remembered: it will be asked about again when the VLM is back.
            result = "unavailable" if not seen.available else "asked"
            return {"result": result, "label": seen.label, "classification": seen, "detail": seen.reason}
        self.memory.add(seen.label, self._embed(screen), digest=screen.digest)
        if self._memory_path is not None:
            self.memory.save(self._memory_path)
        return {"result": "recorded", "label": seen.label, "classification": seen}

    def _recognise(self, screen: Screen) -> dict[str, Any]:
        found = self.memory.match(self._embed(screen))
        if found.verdict is Verdict.RECOGNISED:
            return {"result": "recognised", "label": found.label, "match": found}
        seen = self._detector.classify(screen)
        result = "asked" if seen.available else "unavailable"
        return {"result": result, "label": seen.label, "match": found, "classification": seen, "detail": seen.reason}

    def _embed(self, screen: Screen) -> Vector:
        image = screen.image()
        with self._manager.clip(holder="ExecutionLoop") as clip:
            vector: Vector = clip.encode([image])[0]
        return vector


__all__ = [
    "UNKNOWN_LABEL",
    "CLIPSession",
    "Classification",
    "ExecutionLoop",
    "FusionEngine",
    "Limits",
    "Manager",
    "Match",
    "Screen",
    "ScreenMemoryError",
    "Step",
    "UIDetector",
    "VLMSession",
    "Verdict",
    "load_screens",
    "probe_image",
]
