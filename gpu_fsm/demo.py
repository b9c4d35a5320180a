"""The main job, told as a story: an agent records, runs on autopilot, and meets what can go wrong.

`run_demo` plays it, by default in a simulated world: a card whose ledger is a file, an Ollama that is a process of its
own, and a real CLIP whose place on the card is simulated.  `run_agent` is the same agent without any simulation.

What is told at the end is derived from records, never from what the story meant to do: the manager's journal and
events, the server's log, the agent's steps (`Record`, `figures`).  A phase that did not do what it should says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from attrs import define, evolve, field, frozen

from gpu_fsm.agent import ExecutionLoop, FusionEngine, Limits, Screen, Step, UIDetector, load_screens, probe_image
from gpu_fsm.errors import BadArgument, ClipOutOfMemory, GPUFSMError, OllamaUnavailable, one_line
from gpu_fsm.events import Degraded, Event, IdleUnload, Recovered, StateChanged
from gpu_fsm.manager import GPUResourceManager
from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.status import ClipPlace, ExecutionMode, GPUResourceStatus, State
from gpu_fsm.telling import told_event, told_step

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from gpu_fsm.engine import JournalRecord
    from gpu_fsm.ports import CLIPHost, Embeddings, VRAMProbe
    from gpu_fsm.simulation import SharedCard, WorldClock

DATA: Final = resources.files("gpu_fsm") / "data"
STEADY: Final = frozenset({State.IDLE, State.RECORDING, State.AUTOPILOT, State.DEGRADED})

CARD_MIB: Final = 8192.0
VLM_MIB: Final = 6700.0
"""With CLIP beside it and the reserve it does not fit on the card: the two must take turns."""
VLM_DISK_MIB: Final = 5500.0
"""A model takes more on the card than on disk, for its context."""
CLIP_MIB: Final = 600.0
"""What a CLIP ViT-B/32 takes; the tiny one stands for it on the simulated card."""
CONTEXT_MIB: Final = 200.0
"""What a process pays for its first use of a card, until it ends."""
OTHER_MIB: Final = 4000.0
SIMULATED_VLM: Final = "demo-vlm:7b"
LOAD_S: Final = 1.0
IDLE_S: Final = 2.0


@frozen(kw_only=True)
class DemoOptions:
    """What the command line asks of the demo."""

    config: GPUResourceConfig
    screens: Path | None = None
    """The user's own screenshots instead of those that ship with the package."""
    real_ollama: bool = False
    """Use `config.ollama_url`, and the machine's own card."""
    real_clip: bool = False
    """Use `config.clip_model` instead of the tiny CLIP."""
    as_json: bool = False
    shuffle_index: bool = False
    """Give the remembered vectors each other's labels: the demo must notice and fail."""


# --- which screens ----------------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class Album:
    """The screens of a story and the truth about them."""

    recorded: tuple[Screen, ...]
    variations: tuple[Screen, ...]
    strange: tuple[Screen, ...]
    belongs: Mapping[str, str]
    """A variation's name -> the name of the recorded screen that it is."""
    labels: Mapping[str, str]
    """SHA-256 of an image -> its label: all that the simulated VLM knows."""
    source: str


def shipped_album() -> Album:
    """The screenshots in the package, with the truth from their manifest."""
    folder = DATA / "screens"
    entries = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["screens"]
    found: dict[str, list[Screen]] = {"base": [], "variation": [], "unknown": []}
    bases = {entry["screen"]: entry["file"] for entry in entries if entry["kind"] == "base"}
    belongs = {}
    for entry in entries:
        found[entry["kind"]].append(Screen(name=entry["file"], data=(folder / entry["file"]).read_bytes()))
        if entry["kind"] == "variation":
            belongs[entry["file"]] = bases[entry["screen"]]
    random.Random(7).shuffle(found["variation"])
    return Album(
        recorded=tuple(found["base"]),
        variations=tuple(found["variation"]),
        strange=tuple(found["unknown"]),
        belongs=belongs,
        labels={entry["sha256"]: entry["label"] for entry in entries},
        source="the screenshots that ship with the package",
    )


def own_album(folder: Path) -> Album:
    """The user's screenshots: every fourth is never recorded, the others are met again smaller and darker."""
    screens = load_screens(folder)
    strange = screens[3::4]
    recorded = tuple(screen for screen in screens if screen not in strange)
    variations = tuple(Screen(name=f"{screen.name} (again)", data=_altered(screen)) for screen in recorded)
    labels = {screen.digest: Path(screen.name).stem for screen in recorded}
    return Album(
        recorded=recorded,
        variations=variations,
        strange=strange,
        belongs={again.name: screen.name for again, screen in zip(variations, recorded, strict=True)},
        labels=labels,
        source=f"{len(screens)} screenshots of {one_line(folder)}",
    )


def _altered(screen: Screen) -> bytes:
    from PIL import ImageEnhance

    image = screen.image()
    smaller = image.resize((max(1, image.width * 4 // 5), max(1, image.height * 4 // 5)))
    buffer = io.BytesIO()
    ImageEnhance.Brightness(smaller).enhance(0.85).save(buffer, "PNG")
    return buffer.getvalue()


# --- the record, and what follows from it -----------------------------------------------------------------------------


@frozen(kw_only=True)
class Phase:
    """A chapter of the story, in readings of the monotonic clock, with what was expected of it."""

    name: str
    begun_at: float
    ended_at: float
    checks: tuple[tuple[str, bool], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it did what it should."""
        return all(held for _, held in self.checks)


@frozen(kw_only=True)
class Record:
    """All that was written down while the story ran; the figures come from here and from nowhere else."""

    phases: tuple[Phase, ...]
    steps: tuple[tuple[float, Step], ...]
    events: tuple[Event, ...]
    journal: tuple[JournalRecord, ...]
    server: tuple[Mapping[str, Any], ...]
    """The server's log, one entry a request; empty for an Ollama whose log cannot be read."""
    album: Album


def figures(record: Record, begin: float = float("-inf"), end: float = float("inf")) -> dict[str, Any]:
    """Count what happened between two readings of the clock."""

    def inside(at: float) -> bool:
        return begin <= at < end

    steps = [step for at, step in record.steps if inside(at)]
    named = {step.screen: step.label for _, step in record.steps if step.result == "recorded"}
    asked = [step for step in steps if step.screen in record.album.belongs and step.mode is ExecutionMode.AUTOPILOT]
    taken = [step for step in steps if step.result == "recognised"]
    right = [step for step in taken if step.label == named.get(record.album.belongs.get(step.screen, ""), False)]
    strangers = {screen.name for screen in record.album.strange}
    found = [step for step in steps if step.screen in strangers and step.result != "recognised"]
    moves = [row for row in record.journal if inside(row.at) and row.dest is not row.source]
    events = [event for event in record.events if inside(event.at)]
    loads = [row for row in moves if row.trigger == "vlm_wanted" and row.source in STEADY]
    return {
        "requests_served": sum(step.result in ("recorded", "kept", "recognised", "asked") for step in steps),
        "vlm_answers": sum(entry["images"] > 0 and entry["ok"] for entry in record.server if inside(entry["ended_at"])),
        "recognised_share": round(len(right) / len(asked), 4) if asked else None,
        "falsely_recognised": len(taken) - len(right),
        "unknown_found": len(found),
        "on_demand_loads": len(loads),
        "idle_unloads": sum(isinstance(event, IdleUnload) for event in events),
        "degradations": sum(inside(at) for at in _degraded_at(record.journal)),
        "recoveries": sum(isinstance(event, Recovered) for event in events),
        "switches": switches(record.journal, begin, end),
    }  # fmt: skip


def _degraded_at(journal: Sequence[JournalRecord]) -> list[float]:
    """When DEGRADED was entered from another mode; a recovery that fails is no new degradation."""
    found = []
    standing = State.IDLE
    for row in journal:
        if row.source in STEADY:
            standing = row.source
        if row.dest is State.DEGRADED and standing is not State.DEGRADED:
            found.append(row.at)
    return found


def switches(journal: Sequence[JournalRecord], begin: float, end: float) -> list[dict[str, Any]]:
    """How long it took from one standing mode to the next, by kind; begun between two readings of the clock."""
    times: dict[str, list[float]] = {}
    since: JournalRecord | None = None
    for row in journal:
        if row.source in STEADY and row.dest not in STEADY:
            since = row
        elif row.dest in STEADY and row.source not in STEADY and since is not None:
            if begin <= since.at < end:
                kind = f"{since.source.value} -> {row.dest.value}"
                if row.dest is State.DEGRADED and since.source is row.dest:
                    kind = "degraded, tried again"
                elif since.source is row.dest:
                    kind = f"{row.dest.value}, VLM {'in' if since.trigger == 'vlm_wanted' else 'out'}"
                times.setdefault(kind, []).append((row.at - since.at) * 1000)
            since = None
    return [
        {
            "kind": kind,
            "count": len(took),
            "p50_ms": round(sorted(took)[(len(took) - 1) // 2], 1),
            "max_ms": round(max(took), 1),
        }
        for kind, took in sorted(times.items())
    ]


@frozen(kw_only=True)
class Story:
    """A story that has been told."""

    record: Record
    simulated: tuple[str, ...]
    states: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every phase did what it should."""
        return all(phase.ok for phase in self.record.phases)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        phases = [
            {
                "name": phase.name,
                "ok": phase.ok,
                "seconds": round(phase.ended_at - phase.begun_at, 2),
                "failed": [what for what, held in phase.checks if not held],
                **figures(self.record, phase.begun_at, phase.ended_at),
            }
            for phase in self.record.phases
        ]
        whole = figures(self.record)
        return {
            "ok": self.ok,
            "simulated": list(self.simulated),
            "screens": self.record.album.source,
            "states": list(self.states),
            **whole,
            "skipped": list(self.skipped),
            "phases": phases,
        }


# --- the simulated world ----------------------------------------------------------------------------------------------


class PlacedCLIP:
    """A real CLIP that computes on the CPU while its bytes move on the simulated card: a `CLIPHost`."""

    simulated = True

    def __init__(self, inner: CLIPHost, card: SharedCard) -> None:
        self._inner = inner
        self._card = card
        self._up = False
        self._context_paid = False

    @property
    def place(self) -> ClipPlace:
        """Which side its bytes are on."""
        return "gpu" if self._up else self._inner.place

    @property
    def device(self) -> str:
        """`sim:0` on the simulated card, else where the real one is."""
        return "sim:0" if self._up else self._inner.device

    @property
    def gpu_usable(self) -> bool:
        """The simulated card takes any CLIP that exists."""
        return self._inner.place != "none"

    @property
    def gpu_unusable_reason(self) -> str:
        """Why not."""
        return "" if self.gpu_usable else self._inner.gpu_unusable_reason

    @property
    def needed_mib(self) -> float:
        """Weights, and the context at the first time."""
        return CLIP_MIB + (0.0 if self._context_paid else CONTEXT_MIB)

    @property
    def held_mib(self) -> float:
        """What going down gives back; the context stays."""
        return CLIP_MIB if self._up else 0.0

    def to_gpu(self) -> None:
        """Take the room on the simulated card, all or nothing."""
        from gpu_fsm.simulation import CardFull

        if self._up:
            return
        needed = self.needed_mib
        try:
            self._card.take("clip", needed, name="gpu_fsm agent")
        except CardFull as error:
            raise ClipOutOfMemory(detail=one_line(error), needed_mib=needed) from error
        time.sleep(0.05)  # about what the copy of 600 MiB takes over PCIe
        self._context_paid = self._up = True

    def to_cpu(self) -> None:
        """Give the room back."""
        if self._up:
            self._card.give_back("clip", CLIP_MIB)
            self._up = False

    def encode(self, items: Sequence[object], *, batch_size: int = 32, normalize: bool = True) -> Embeddings:
        """Real embeddings, computed on the CPU."""
        return self._inner.encode(items, batch_size=batch_size, normalize=normalize)

    def close(self) -> None:
        """Give back everything, the context too."""
        self._card.give_back("clip")
        self._inner.close()


@define(eq=False, kw_only=True)
class Scene:
    """Where a story plays: the ports of its manager and the means to disturb them."""

    config: GPUResourceConfig
    clip: CLIPHost
    probe: VRAMProbe | None
    simulated: tuple[str, ...]
    server: SimulatedServer | None = None
    folder: Path = field(default=Path())

    def manager(self) -> GPUResourceManager:
        """The manager under show."""
        return GPUResourceManager(self.config, clip_host=self.clip, vram_probe=self.probe)


class SimulatedServer:
    """The simulated Ollama as a process of its own, which can be killed and started again on the same port."""

    def __init__(self, folder: Path, labels: Mapping[str, str]) -> None:
        self._folder = folder
        (folder / "labels.json").write_text(json.dumps(dict(labels)), encoding="utf-8")
        self._process: subprocess.Popen[str] | None = None
        self._starts = 0
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it listens.  Raises `OllamaUnavailable` if it does not within 30 s."""
        self._starts += 1
        self._process = _child("server", str(self._folder), str(self.port), str(self._starts))
        said = _first_line(self._process, 30.0)
        if not said.isdigit():
            self.kill()
            raise OllamaUnavailable(
                detail=f"the simulated Ollama did not start: {one_line(said) or 'it said nothing'}",
                remedy="It needs a free port on 127.0.0.1.",
            )
        self.port = int(said)

    def kill(self) -> None:
        """End the process as the out-of-memory killer would, without a word."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def log(self) -> tuple[dict[str, Any], ...]:
        """All requests that this server and its predecessors saw; one cut off by a kill has `ok` False."""
        entries: dict[tuple[str, int], dict[str, Any]] = {}
        for path in sorted(self._folder.glob("server-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # the last line of a killed process may be cut off
                    entry = json.loads(line)
                    entries[path.name, entry["n"]] = entry
        return tuple(sorted(entries.values(), key=lambda entry: float(entry["at"])))


@contextlib.contextmanager
def other_program(folder: Path, mib: float) -> Iterator[None]:
    """Another process that holds memory on the simulated card while the block runs."""
    process = _child("other", str(folder), str(mib))
    try:
        said = _first_line(process, 30.0)
        if said != "holding":
            raise BadArgument(detail=f"the other program could not take {mib:.0f} MiB: {one_line(said)}")
        yield
    finally:
        _end(process)


def _child(*arguments: str) -> subprocess.Popen[str]:
    # Its stdin is a pipe to us, so it notices when we are gone, however we went.  In a session of its own, because
    # Ctrl-C must reach us first: we still want an Ollama that can unload.
    home = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(path for path in (home, os.environ.get("PYTHONPATH")) if path)
    return subprocess.Popen(
        [sys.executable, "-m", "gpu_fsm.demo", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": paths},
    )


def _first_line(process: subprocess.Popen[str], timeout_s: float) -> str:
    killer = threading.Timer(timeout_s, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        return process.stdout.readline().strip()
    finally:
        killer.cancel()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _card(folder: Path, clock: WorldClock) -> SharedCard:
    from gpu_fsm.simulation import SharedCard

    return SharedCard(folder / "card.sqlite", CARD_MIB, clock=clock)


def _serve(folder: Path, port: int, start: int) -> int:
    """The simulated Ollama's own process: serve until stdin ends, writing the log as it grows."""
    from gpu_fsm.simulation import RunningClock, SimulatedModel, SimulatedOllama, serve

    labels: dict[str, str] = json.loads((folder / "labels.json").read_text(encoding="utf-8"))

    def answer(_model: str, _prompt: str, images: list[bytes]) -> str:
        label = labels.get(hashlib.sha256(images[0]).hexdigest(), "unknown") if images else "unknown"
        return json.dumps({"label": label, "summary": f"looked up by the image's digest: {label}"})

    clock = RunningClock()
    server = SimulatedOllama(
        [SimulatedModel(name=SIMULATED_VLM, size_mib=VLM_MIB, disk_mib=VLM_DISK_MIB, load_s=LOAD_S)],
        clock=clock,
        card=_card(folder, clock),
        generate_s=0.1,
        reclaim_s=0.2,
        epoch_s=time.time() - clock.monotonic(),
        responder=answer,
    )
    over = threading.Event()
    with serve(server, port=port) as front, (folder / f"server-{start}.jsonl").open("w", encoding="utf-8") as log:
        sys.stdout.write(f"{front.port}\n")
        sys.stdout.flush()
        threading.Thread(target=_set_at_end_of_input, args=(over,), daemon=True).start()
        written: dict[int, str] = {}
        while not over.wait(0.02):
            with clock.turn:
                entries = list(enumerate(server.log))
            for n, entry in entries:
                if written.get(n) == "ended":
                    continue
                body = entry.body if isinstance(entry.body, dict) else {}
                state = "began" if entry.ended_at is None else "ended"
                if written.get(n) != state:
                    written[n] = state
                    fact = {
                        "n": n,
                        "at": entry.at,
                        "ended_at": entry.at if entry.ended_at is None else entry.ended_at,
                        "op": entry.op,
                        "path": entry.path,
                        "images": len(body.get("images") or ()),
                        "ok": entry.outcome == "ok",
                        "outcome": entry.outcome,
                    }
                    log.write(json.dumps(fact) + "\n")
                    log.flush()
    clock.close()
    return 0


def _set_at_end_of_input(over: threading.Event) -> None:
    sys.stdin.read()
    over.set()


def _hold(folder: Path, mib: float) -> int:
    """The other program's own process: take memory, hold it until stdin ends."""
    from gpu_fsm.simulation import RunningClock

    _card(folder, RunningClock()).take("other", mib, name="another program")
    sys.stdout.write("holding\n")
    sys.stdout.flush()
    sys.stdin.read()
    return 0


def _simulated_config(config: GPUResourceConfig, url: str) -> GPUResourceConfig:
    """Short times, so that a minute shows what takes an hour; what the user set about CLIP stays."""
    return evolve(
        config, ollama_url=url, vlm_model=SIMULATED_VLM, vlm_size_mib=VLM_MIB, idle_timeout_s=IDLE_S,
        vlm_load_deadline_s=20.0, retry_base_s=0.2, retry_cap_s=0.4, unload_deadline_s=5.0, unload_resend_s=0.5,
        settle_timeout_s=3.0, settle_poll_s=0.03, observe_timeout_s=1.0, unknown_max_s=3.0, check_interval_s=0.5,
        pressure_s=1.0, shed_deadline_s=4.0, recover_base_s=0.4, recover_cap_s=1.0, stable_s=1.0, journal_size=10_000,
        reserve_mib=512.0, floor_mib=128.0, inference_timeout_s=20.0, vlm_options={}, on_shortage="degrade",
    )  # fmt: skip


@contextlib.contextmanager
def scene(options: DemoOptions, album: Album) -> Iterator[Scene]:
    """Set the world up, and take it down whatever happens.  Raises `ClipUnavailable` where CLIP cannot be loaded."""
    from gpu_fsm.clip import CLIPManager

    with contextlib.ExitStack() as stack:
        config = options.config
        if not options.real_clip:
            config = evolve(config, clip_model=str(stack.enter_context(resources.as_file(DATA / "tiny-clip"))))
        if options.real_ollama:
            clip = CLIPManager(config)
            clip.prepare()
            yield Scene(config=config, clip=clip, probe=None, simulated=())
            return
        from gpu_fsm.simulation import RunningClock, SimulatedProbe

        clip = CLIPManager(evolve(config, clip_device="cpu"))
        clip.prepare()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-fsm-demo-")))
        clock = RunningClock()
        stack.callback(clock.close)
        card = _card(folder, clock)
        server = SimulatedServer(folder, album.labels)
        stack.callback(server.kill)
        yield Scene(
            config=_simulated_config(config, server.url),
            clip=PlacedCLIP(clip, card),
            probe=SimulatedProbe(clock=clock, card=card),
            simulated=("card", "ollama", "vlm", "clip placement"),
            server=server,
            folder=folder,
        )


# --- telling ----------------------------------------------------------------------------------------------------------


class Teller(Protocol):
    """Shows the story while it happens."""

    def begin(self, manager: GPUResourceManager, lines: Sequence[str]) -> None:
        """Before the first phase."""

    def say(self, line: str) -> None:
        """One thing that happened."""

    def end(self) -> None:
        """After the last phase."""


class PlainTeller:
    """One line a happening, for pipes and files."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write

    def begin(self, manager: GPUResourceManager, lines: Sequence[str]) -> None:
        for line in lines:
            self.say(line)

    def say(self, line: str) -> None:
        self._write(line + "\n")

    def end(self) -> None:
        """Nothing is open."""


class LiveTeller:
    """A picture that is drawn anew several times a second, for terminals."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self._said: list[str] = []
        self._manager: GPUResourceManager | None = None
        self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=10, transient=True)

    def begin(self, manager: GPUResourceManager, lines: Sequence[str]) -> None:
        for line in lines:
            self._console.print(line, highlight=False, markup=False)
        self._manager = manager
        self._live.start()

    def say(self, line: str) -> None:
        self._said = [*self._said[-200:], line]

    def end(self) -> None:
        self._live.stop()

    def _draw(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if self._manager is None:
            return Text("")
        status = self._manager.get_status()
        facts = Table.grid(padding=(0, 2))
        facts.add_row("state", Text(status.state.name, style=_colour(status.state)))
        facts.add_row("VLM", f"{status.vlm_model}: {status.vlm_state.value}")
        facts.add_row("CLIP", f"on {status.clip_device}")
        total, used = status.vram.total_mib, status.vram.used_mib
        if total and used is not None:
            bar = Table.grid(padding=(0, 1))
            bar.add_row(ProgressBar(total=total, completed=used, width=40), f"{used:.0f} of {total:.0f} MiB")
            facts.add_row("card", bar)
        else:
            facts.add_row("card", status.cpu_only_reason or "not known")
        if status.reason is not None:
            facts.add_row("because", Text(str(status.reason), overflow="ellipsis", no_wrap=True))
        last = Text("\n".join(self._said[-12:]), overflow="ellipsis", no_wrap=True)
        return Group(Panel(facts, title="gpu_fsm"), last)


def _colour(state: State) -> str:
    return (
        "bold red" if state in (State.DEGRADED, State.SHEDDING) else "bold green" if state in STEADY else "bold yellow"
    )


# --- the story --------------------------------------------------------------------------------------------------------


@define(eq=False)
class Stage:
    """One telling: the agent at work, with everything written down."""

    scene: Scene
    album: Album
    teller: Teller
    manager: GPUResourceManager
    loop: ExecutionLoop
    steps: list[tuple[float, Step]] = field(factory=list)
    events: list[Event] = field(factory=list)
    phases: list[Phase] = field(factory=list)
    stirred: threading.Condition = field(factory=threading.Condition)

    def hear(self, event: Event) -> None:
        """Listen to the manager."""
        with self.stirred:
            self.events.append(event)
            self.stirred.notify_all()
        told = told_event(event)
        if told is not None:
            self.teller.say(told)

    def work(self, screens: Sequence[Screen], mode: ExecutionMode | None = None) -> list[Step]:
        """Have the agent handle screens, as the asked mode says or as `mode` does."""
        done = []
        for screen in screens:
            step = self.loop.handle(screen, mode)
            self.steps.append((time.monotonic(), step))
            self.teller.say(told_step(step))
            done.append(step)
        return done

    def until(self, true: Callable[[], bool], limit_s: float) -> bool:
        """Wait for something that the manager does by itself."""
        deadline = time.monotonic() + limit_s
        with self.stirred:
            while not true():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self.stirred.wait(min(left, 0.05))
        return True

    def heard(self, kind: type[Event], since: int) -> bool:
        """Whether such an event came after the first `since` ones."""
        return any(isinstance(event, kind) for event in self.events[since:])

    @property
    def heard_state(self) -> State:
        """The state that was told last."""
        told = [event.new for event in self.events if isinstance(event, StateChanged)]
        return told[-1] if told else State.IDLE

    def status(self) -> GPUResourceStatus:
        """The manager's status now."""
        return self.manager.get_status()

    def tell(self, name: str, act: Callable[[], Sequence[tuple[str, bool]]]) -> None:
        """Play one phase and keep what was expected of it."""
        self.teller.say(f"[{len(self.phases) + 1}] {name}")
        begun = time.monotonic()
        try:
            checks = tuple(act())
        except GPUFSMError as error:
            checks = ((one_line(error), False),)
        # The manager tells by another thread; let it finish, so that the lines stand under their phase.
        self.until(lambda: self.heard_state is self.status().state, 1.0)
        phase = Phase(name=name, begun_at=begun, ended_at=time.monotonic(), checks=checks)
        self.phases.append(phase)
        for what, held in phase.checks:
            if not held:
                self.teller.say(f"  FAILED: {what}")

    # phases

    def record(self) -> Sequence[tuple[str, bool]]:
        """Every screen is labelled by the VLM and remembered by its embedding."""
        self.loop.set_mode(ExecutionMode.RECORDING)
        status = self.status()
        done = self.work(self.album.recorded)
        return [
            ("RECORDING stands", status.state is State.RECORDING),
            ("CLIP is on the CPU meanwhile", status.clip_device == "cpu"),
            ("every screen was labelled", all(step.result in ("recorded", "kept") for step in done)),
        ]

    def autopilot(self) -> Sequence[tuple[str, bool]]:
        """The same screens in other clothes are recognised without the VLM."""
        self.loop.set_mode(ExecutionMode.AUTOPILOT)
        status = self.status()
        begun = time.monotonic()
        self.work(self.album.variations)
        told = self._figures(begun)
        return [
            ("AUTOPILOT stands", status.state is State.AUTOPILOT),
            ("CLIP is on the card, where there is one", status.cpu_only or status.clip_device != "cpu"),
            ("at least 95 % were recognised as the right screen", (told["recognised_share"] or 0.0) >= 0.95),
            ("none was taken for another screen", told["falsely_recognised"] == 0),
        ]

    def strange(self) -> Sequence[tuple[str, bool]]:
        """A screen never recorded is not taken for a known one; the VLM comes in on demand."""
        done = self.work(self.album.strange)
        return [
            ("no strange screen was taken for a known one", all(step.result != "recognised" for step in done)),
            ("the VLM was asked about each", all(step.result == "asked" for step in done)),
            ("the mode is still AUTOPILOT", self.status().execution_mode is ExecutionMode.AUTOPILOT),
            ("the VLM was loaded on demand", not done or self.scene.server is None or self._loaded_on_demand()),
        ]

    def idle(self) -> Sequence[tuple[str, bool]]:
        """The VLM goes after a time without use, and CLIP returns to the card."""
        limit = self.scene.config.idle_timeout_s + 15.0
        begun = self.phases[-1].begun_at
        gone = self.until(lambda: any(isinstance(e, IdleUnload) and e.at >= begun for e in self.events), limit)
        back = self.until(lambda: self.status().cpu_only or self.status().clip_device != "cpu", 5.0)
        return [("the VLM was unloaded for want of use", gone), ("CLIP is back on the card", back)]

    def crash(self) -> Sequence[tuple[str, bool]]:
        """Ollama's process is killed in the middle of a load; the agent goes on, and all is well when it returns."""
        server = self.scene.server
        assert server is not None
        heard = len(self.events)
        asking = threading.Thread(target=self.loop.set_mode, args=(ExecutionMode.RECORDING,), daemon=True)
        asking.start()
        loading = self.until(lambda: self.status().state is State.LOADING, 10.0)
        time.sleep(LOAD_S / 2)
        server.kill()
        self.teller.say("  Ollama's process was killed in the middle of the load")
        degraded = self.until(lambda: self.status().state is State.DEGRADED, 15.0)
        asking.join(15.0)
        meanwhile = self.work(self.album.variations[:4], ExecutionMode.AUTOPILOT)
        server.start()
        self.teller.say("  Ollama is started again")
        back = self.until(lambda: self.heard(Recovered, heard) and self.status().state is State.RECORDING, 20.0)
        return [
            ("the load was under way", loading),
            ("the manager degraded and said why", degraded and self.heard(Degraded, heard)),
            ("the agent went on recognising", all(step.result == "recognised" for step in meanwhile)),
            ("RECORDING came back by itself", back),
        ]

    def shortage(self) -> Sequence[tuple[str, bool]]:
        """Another program takes the card's memory; the mode is given when that program has ended."""
        self.loop.set_mode(ExecutionMode.AUTOPILOT)
        heard = len(self.events)
        with other_program(self.scene.folder, OTHER_MIB):
            self.teller.say(f"  another program has taken {OTHER_MIB:.0f} MiB")
            self.loop.set_mode(ExecutionMode.RECORDING)
            short = self.status()
            meanwhile = self.work(self.album.variations[4:8], ExecutionMode.AUTOPILOT)
        self.teller.say("  the other program has ended")
        back = self.until(lambda: self.heard(Recovered, heard) and self.status().state is State.RECORDING, 20.0)
        reason = short.reason.code if short.reason is not None else ""
        return [
            (
                "the manager degraded for want of memory",
                short.state is State.DEGRADED and reason == "vram_insufficient",
            ),
            ("the agent went on recognising", all(step.result == "recognised" for step in meanwhile)),
            ("RECORDING came back by itself", back),
        ]

    def finish(self) -> Sequence[tuple[str, bool]]:
        """Back to autopilot; then everything of ours is given back."""
        self.loop.set_mode(ExecutionMode.AUTOPILOT)
        state = self.status().state
        self.work(self.album.variations[8:12])
        left = self.manager.close()
        return [("AUTOPILOT stands again", state is State.AUTOPILOT), ("nothing was left behind", not left)]

    def _loaded_on_demand(self) -> bool:
        return any(row.trigger == "vlm_wanted" and row.dest is not row.source for row in self.manager.journal)

    def _figures(self, begun: float) -> dict[str, Any]:
        return figures(self.written(), begun)

    def written(self) -> Record:
        """Everything that was written down so far."""
        return Record(
            phases=tuple(self.phases),
            steps=tuple(self.steps),
            events=tuple(self.events),
            journal=self.manager.journal,
            server=() if self.scene.server is None else self.scene.server.log(),
            album=self.album,
        )


def play(options: DemoOptions, teller: Teller) -> Story:
    """Tell the whole story.

    Raises `BadArgument` for screens that cannot be used, `ClipUnavailable` where CLIP cannot be loaded.
    """
    album = shipped_album() if options.screens is None else own_album(options.screens)
    with scene(options, album) as world:
        limits = Limits.beside(world.config.clip_model or "")
        memory = FusionEngine(limits, probe=world.clip.encode([probe_image()])[0])
        manager = world.manager()
        loop = ExecutionLoop(manager, UIDetector(manager), memory)
        stage = Stage(world, album, teller, manager, loop)
        unsubscribe = manager.subscribe(stage.hear)
        simulated = ", ".join(world.simulated) or "nothing"
        lines = [f"Simulated: {simulated}. Screens: {album.source}."]
        if world.server is not None:
            lines.append("The simulated VLM does not look: it finds an image's label by its digest.")
        teller.begin(manager, lines)
        try:
            skipped = _phases(stage, options)
        finally:
            teller.end()
            manager.close()
            unsubscribe()
        states = [State.IDLE, *(row.dest for row in manager.journal if row.dest is not row.source)]
        return Story(
            record=stage.written(),
            simulated=world.simulated,
            states=tuple(state.value for state in states),
            skipped=tuple(skipped),
        )


def _phases(stage: Stage, options: DemoOptions) -> list[str]:
    stage.tell("record", stage.record)
    if options.shuffle_index:
        labels = stage.loop.memory.labels
        stage.loop.memory = stage.loop.memory.relabelled([*labels[1:], *labels[:1]])
    stage.tell("autopilot", stage.autopilot)
    stage.tell("never recorded", stage.strange)
    skipped = []
    if stage.scene.server is None:
        skipped = ["idle timeout", "killed server", "memory shortage"]
        stage.teller.say(f"  Skipped, because they need the simulated world: {', '.join(skipped)}.")
    else:
        if stage.album.strange:
            stage.tell("idle timeout", stage.idle)
        stage.tell("killed server", stage.crash)
        stage.tell("memory shortage", stage.shortage)
    stage.tell("the end", stage.finish)
    return skipped


# --- printing ---------------------------------------------------------------------------------------------------------


def run_demo(options: DemoOptions) -> int:
    """Play the demo and print its table, or one JSON document.  Returns the exit code: 0, or 1 if a phase failed."""
    from rich.console import Console

    console = Console(stderr=options.as_json, highlight=False)
    teller: Teller
    if console.is_terminal and not options.as_json:
        teller = LiveTeller(console)
    else:
        teller = PlainTeller(sys.stderr.write if options.as_json else sys.stdout.write)
    story = play(options, teller)
    if options.as_json:
        sys.stdout.write(json.dumps(story.to_dict(), indent=2) + "\n")
    else:
        _print_story(story, console if console.is_terminal else Console(width=150, highlight=False))
    return 0 if story.ok else 1


def _print_story(story: Story, console: Console) -> None:
    from rich.table import Table

    report = story.to_dict()
    table = Table(title="What happened, phase by phase")
    table.add_column("phase", no_wrap=True)
    for heading in ("seconds", "requests", "recognised", "false", "unknown", "degraded", "recovered"):
        table.add_column(heading, justify="right")
    table.add_column("switches, median ms", no_wrap=True)
    table.add_column("ok", no_wrap=True)
    for row in [*report["phases"], {"name": "all", "seconds": None, **report}]:
        share = row["recognised_share"]
        moved = [
            f"{s['kind']}: {s['p50_ms']:.0f}" + (f" x{s['count']}" if s["count"] > 1 else "") for s in row["switches"]
        ]
        if row["name"] == "all":
            moved = []
        table.add_row(
            row["name"],
            "" if row["seconds"] is None else f"{row['seconds']:.1f}",
            str(row["requests_served"]),
            "" if share is None else f"{share:.0%}",
            str(row["falsely_recognised"] or ""),
            str(row["unknown_found"] or ""),
            str(row["degradations"] or ""),
            str(row["recoveries"] or ""),
            "\n".join(moved),
            "yes" if row["ok"] else "NO",
        )
    console.print(table)
    simulated = ", ".join(story.simulated) or "nothing"
    console.print(f"Simulated: {simulated}. VLM loads on demand: {report['on_demand_loads']}, idle unloads: "
                  f"{report['idle_unloads']}, answers by the VLM: {report['vlm_answers']}.", markup=False)  # fmt: skip
    for phase in story.record.phases:
        for what, held in phase.checks:
            if not held:
                console.print(f"FAILED in {phase.name}: {what}", markup=False)


# --- the simulated parts' own processes -------------------------------------------------------------------------------


def _main(arguments: Sequence[str]) -> int:
    """The simulated parts that are processes of their own."""
    os.environ.pop("GPU_FSM_CONFIG", None)
    match list(arguments):
        case ["server", folder, port, start]:
            return _serve(Path(folder), int(port), int(start))
        case ["other", folder, mib]:
            return _hold(Path(folder), float(mib))
        case _:
            return 2


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(_main(sys.argv[1:]))

__all__ = [
    "Album",
    "DemoOptions",
    "PlacedCLIP",
    "Record",
    "Story",
    "figures",
    "play",
    "run_demo",
    "switches",
]
