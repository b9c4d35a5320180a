"""Every public operation of a manager, each from a place where it has everything to do.

For tests that strike at every I/O call of each: with a fault, with Ctrl-C, with a cancellation.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from gpu_fsm import GPUResourceManager
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.simulation.card import DRIVER
from gpu_fsm.simulation.clip import CONTEXT_OWNER
from gpu_fsm.simulation.transport import SimulatedAdapter

WAIT_S = 1000.0
"""Virtual seconds, longer than all deadlines together."""

PNG = b"\x89PNG\r\n\x1a\n" + bytes(32)

IDLE_TIMEOUT_S, RECOVER_CAP_S = 20.0, 20.0
SETTINGS = {"idle_timeout_s": IDLE_TIMEOUT_S, "recover_cap_s": RECOVER_CAP_S, "unload_deadline_s": 5.0}

CONVERGES_S = RECOVER_CAP_S + 4.0 + 5.0
"""The back-off's cap, one load, and a little."""


NEW, OLD = "0.32.15", "0.24.0"
"""Ollama's versions; the old one tells only `/api/show` whether a model takes images."""


class Stage:
    """A manager in a world, and all connections that it ever had."""

    def __init__(self, *, threaded: bool = False, version: str = NEW) -> None:
        self.world = SimulatedWorld(version=version)
        config = self.world.config(**SETTINGS)
        self.adapters: list[SimulatedAdapter] = []
        server = OllamaManager(config, clock=self.world.clock, transport=self._connect, jitter=lambda: 0.0)
        self.manager = GPUResourceManager(config, **self.world.ports(server), threaded=threaded)

    def _connect(self) -> SimulatedAdapter:
        adapter: SimulatedAdapter = self.world.transport()
        self.adapters.append(adapter)
        return adapter

    @property
    def open_connections(self) -> int:
        """Requests of ours that nobody has ended."""
        return sum(len(adapter._open) for adapter in self.adapters)

    def is_empty(self) -> bool:
        """Nothing of ours is on the card but the context, which goes with the process."""
        return not set(self.world.card.owners()) - {DRIVER, CONTEXT_OWNER} and self.world.clip.place == "cpu"


Act = Callable[[Stage], object]


@frozen
class Operation:
    """What to do first, and then; `drives` where it takes an inline manager, `version` is Ollama's."""

    before: Act
    act: Act
    drives: bool = False
    version: str = NEW

    def stage(self, *, threaded: bool = False) -> Stage:
        """Where it plays; nothing has been done yet."""
        return Stage(threaded=threaded, version=self.version)


def mode(name: str) -> Act:
    """Ask for a mode and wait."""
    return lambda stage: stage.manager.set_execution_mode(name, timeout_s=WAIT_S)


def first(*acts: Act) -> Act:
    """One after the other."""

    def all_of_them(stage: Stage) -> None:
        for act in acts:
            act(stage)

    return all_of_them


def time_passes(seconds: float) -> Act:
    """The manager goes on by itself."""
    return lambda stage: stage.manager.drive_for(seconds)


def load(stage: Stage) -> None:
    """The VLM on demand."""
    stage.manager.ensure_vlm_loaded(timeout_s=WAIT_S)


def unload(stage: Stage) -> None:
    """The VLM out."""
    stage.manager.ensure_vlm_unloaded(timeout_s=WAIT_S)


def clip_up(stage: Stage) -> None:
    """CLIP to the GPU."""
    stage.manager.migrate_clip_to_gpu(timeout_s=WAIT_S)


def clip_down(stage: Stage) -> None:
    """CLIP to the CPU."""
    stage.manager.migrate_clip_to_cpu(timeout_s=WAIT_S)


def generate(stage: Stage) -> None:
    """A prompt under a lease."""
    with stage.manager.vlm(timeout_s=WAIT_S) as vlm:
        vlm.generate("what is this?", images=[PNG])


def chat(stage: Stage) -> None:
    """A conversation under a lease."""
    with stage.manager.vlm(timeout_s=WAIT_S) as vlm:
        vlm.chat([{"role": "user", "content": "what is this?"}])


def stream(stage: Stage) -> None:
    """An answer in parts under a lease."""
    with stage.manager.vlm(timeout_s=WAIT_S) as vlm:
        for _ in vlm.stream("what is this?"):
            pass


def encode(stage: Stage) -> None:
    """Embeddings under a lease."""
    with stage.manager.clip(timeout_s=WAIT_S) as clip:
        clip.encode(["a", "b"])


def preempt(stage: Stage) -> None:
    """A mode, and in the middle of its load another one at once."""
    manager, world = stage.manager, stage.world

    def change_of_mind(op: str, phase: str) -> None:
        if phase == "during" and op == "ollama.load":
            world.on_io.remove(change_of_mind)
            manager.submit_execution_mode("autopilot", preempt=True)

    world.on_io.append(change_of_mind)
    try:
        manager.submit_execution_mode("recording")
        manager.drive_for(30.0)
    finally:
        if change_of_mind in world.on_io:
            world.on_io.remove(change_of_mind)


def hold(stage: Stage) -> None:
    """A lease that outlives Ollama's own timer."""
    with stage.manager.vlm(timeout_s=WAIT_S):
        stage.manager.drive_for(90.0)


def fall(stage: Stage) -> None:
    """DEGRADED, and the cause has gone."""
    stage.world.ollama.stop()
    mode("recording")(stage)
    stage.world.ollama.start()


def close(stage: Stage) -> None:
    """The end."""
    stage.manager.close()


def nothing(stage: Stage) -> None:
    """From the beginning."""


RECORD, AUTOMATE, REST = mode("recording"), mode("autopilot"), mode("idle")

OPERATIONS: dict[str, Operation] = {
    "record": Operation(nothing, RECORD),
    "record-after-autopilot": Operation(AUTOMATE, RECORD),
    "record-when-parked": Operation(first(RECORD, unload), RECORD),
    "automate": Operation(nothing, AUTOMATE),
    "automate-after-recording": Operation(RECORD, AUTOMATE),
    "rest-after-recording": Operation(RECORD, REST),
    "load": Operation(nothing, load),
    "load-in-autopilot": Operation(AUTOMATE, load),
    "unload": Operation(RECORD, unload),
    "unload-in-autopilot": Operation(first(AUTOMATE, load), unload),
    "clip-up": Operation(nothing, clip_up),
    "clip-down": Operation(clip_up, clip_down),
    "generate": Operation(nothing, generate),
    "generate-when-parked": Operation(first(RECORD, unload), generate),
    "chat": Operation(RECORD, chat),
    "stream": Operation(RECORD, stream),
    "encode": Operation(nothing, encode),
    "encode-on-the-gpu": Operation(AUTOMATE, encode),
    "close-recording": Operation(RECORD, close),
    "close-autopilot": Operation(first(AUTOMATE, load), close),
    "look": Operation(nothing, time_passes(0.0), drives=True),
    "preempt": Operation(nothing, preempt, drives=True),
    "check-recording": Operation(RECORD, time_passes(16.0), drives=True),
    "check-autopilot": Operation(AUTOMATE, time_passes(16.0), drives=True),
    "idle-unload": Operation(RECORD, time_passes(IDLE_TIMEOUT_S + 16.0), drives=True),
    "idle-unload-in-autopilot": Operation(first(AUTOMATE, load), time_passes(IDLE_TIMEOUT_S + 16.0), drives=True),
    "renew": Operation(RECORD, hold, drives=True),
    "recover": Operation(fall, time_passes(CONVERGES_S), drives=True),
    "record-on-an-old-server": Operation(nothing, RECORD, version=OLD),
    "load-on-an-old-server": Operation(nothing, load, version=OLD),
}
"""Name -> operation."""


def io_calls(name: str) -> list[str]:
    """The I/O calls of an operation in which nothing goes wrong, in order."""
    operation, calls = OPERATIONS[name], list[str]()
    stage = operation.stage()
    operation.before(stage)
    stage.world.on_io.append(lambda op, phase: calls.append(op) if phase == "before" else None)
    operation.act(stage)
    return calls
