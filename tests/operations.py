"""Every public operation of a manager, each from a place where it has everything to do.

For tests that strike at every I/O call of each: with a fault, with Ctrl-C, with a cancellation.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from attrs import frozen

from gpu_fsm import GPUResourceManager
from gpu_fsm.errors import CardHeld
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.simulation.card import DRIVER
from gpu_fsm.simulation.clip import CONTEXT_OWNER
from gpu_fsm.simulation.transport import SimulatedAdapter
from tests.raw_server import RawServer, http

WAIT_S = 1000.0
"""Virtual seconds, longer than all deadlines together."""

PNG = b"\x89PNG\r\n\x1a\n" + bytes(32)

IDLE_TIMEOUT_S, RECOVER_CAP_S = 20.0, 20.0
SETTINGS = {"idle_timeout_s": IDLE_TIMEOUT_S, "recover_cap_s": RECOVER_CAP_S, "unload_deadline_s": 5.0}

CONVERGES_S = RECOVER_CAP_S + 4.0 + 5.0
"""The back-off's cap, one load, and a little."""


NEW, OLD = "0.32.15", "0.24.0"
"""Ollama's versions; the old one tells only `/api/show` whether a model takes images."""


@functools.cache
def street() -> str:
    """Who answers what has come through a door, for the whole process; what the manager itself asks is simulated."""
    answer = http({"response": "a screen", "done": True})
    return RawServer(lambda visit: visit.send(answer)).__enter__().url


class Stage:
    """A manager in a world, and all connections that it ever had."""

    def __init__(self, *, threaded: bool = False, version: str = NEW, doors: bool = False) -> None:
        self.world = SimulatedWorld(version=version)
        config = self.world.config(**SETTINGS, **({"ollama_url": street()} if doors else {}))
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
    doors: bool = False

    def stage(self, *, threaded: bool = False) -> Stage:
        """Where it plays; nothing has been done yet."""
        return Stage(threaded=threaded, version=self.version, doors=self.doors)


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


@contextlib.contextmanager
def at_io(stage: Stage, op: str, what: Callable[[], object]) -> Iterator[None]:
    """In the middle of the first call of `op` in this block something else happens, once."""
    hooks = stage.world.on_io

    def hook(called: str, phase: str) -> None:
        if (called, phase) == (op, "during"):
            hooks.remove(hook)
            what()

    hooks.append(hook)
    try:
        yield
    finally:
        if hook in hooks:
            hooks.remove(hook)


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
        assert vlm.model == stage.world.vlm.name
        vlm.chat([{"role": "user", "content": "what is this?"}])


def stream(stage: Stage) -> None:
    """An answer in parts under a lease."""
    with stage.manager.vlm(timeout_s=WAIT_S) as vlm:
        for _ in vlm.stream("what is this?"):
            pass


def stream_chat(stage: Stage) -> None:
    """A conversation's answer in parts, that is left in the middle."""
    with stage.manager.vlm(timeout_s=WAIT_S) as vlm:
        with contextlib.closing(vlm.stream_chat([{"role": "user", "content": "what is this?"}])) as parts:
            next(parts)


def encode(stage: Stage) -> None:
    """Embeddings under a lease."""
    with stage.manager.clip(timeout_s=WAIT_S) as clip:
        clip.encode(["a", "b"])
        assert clip.device != "mixed"


def decorated(stage: Stage) -> None:
    """Functions that need a model, and do not say how they get it."""
    stage.manager.needs_vlm(timeout_s=WAIT_S)(generate)(stage)
    stage.manager.needs_clip(encode)(stage)


def prompt(stage: Stage) -> tuple[str, dict[str, object]]:
    """A request of a program that knows only Ollama."""
    return f"{street()}/api/generate", {"model": stage.world.vlm.name, "prompt": "what is this?", "stream": False}


def knock(stage: Stage) -> None:
    """Code that calls Ollama with `requests`."""
    url, body = prompt(stage)
    with stage.manager.requests_session(timeout_s=WAIT_S) as session:
        session.post(url, json=body)


def knock_with_httpx(stage: Stage) -> None:
    """Code that calls Ollama with `httpx`."""
    import httpx

    url, body = prompt(stage)
    with httpx.Client(transport=stage.manager.httpx_transport(timeout_s=WAIT_S), trust_env=False) as client:
        client.post(url, json=body)


def lend(stage: Stage) -> None:
    """Room for somebody else's program, that nobody else gets."""
    with stage.manager.lend("a game"):
        REST(stage)
        unload(stage)
        with pytest.raises(CardHeld):
            load(stage)


def reconfigure(stage: Stage) -> None:
    """A longer idle timeout, which Ollama has to hear of before its own timer fires."""
    stage.manager.reconfigure(idle_timeout_s=IDLE_TIMEOUT_S)
    stage.manager.drive_for(16.0)


def reconfigure_in_a_load(stage: Stage) -> None:
    """Other settings while a step is under way."""
    with at_io(stage, "ollama.load", lambda: stage.manager.reconfigure(check_interval_s=7.0)):
        RECORD(stage)


def look_around(stage: Stage) -> None:
    """A move of CLIP, and somebody who wants to know everything all the time."""
    manager = stage.manager

    def look(*_: object) -> None:
        manager.get_status().to_dict()
        manager.explain("autopilot")
        assert manager.get_clip_device() != "mixed"
        assert manager.config.idle_timeout_s == IDLE_TIMEOUT_S
        assert all(record.at <= stage.world.clock.monotonic() for record in manager.journal)

    stage.world.on_io.append(look)
    leave = manager.subscribe(look)
    try:
        clip_up(stage)
    finally:
        leave()
        stage.world.on_io.remove(look)


def preempt(stage: Stage) -> None:
    """A mode, and in the middle of its load another one at once."""
    manager = stage.manager
    with at_io(stage, "ollama.load", lambda: manager.submit_execution_mode("autopilot", preempt=True)):
        manager.submit_execution_mode("recording")
        manager.drive_for(30.0)


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


def short_idle(stage: Stage) -> None:
    """Half the time until an unused VLM goes."""
    stage.manager.reconfigure(idle_timeout_s=IDLE_TIMEOUT_S / 2)


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
    "stream-chat": Operation(RECORD, stream_chat),
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
    "decorated": Operation(RECORD, decorated),
    "lend": Operation(RECORD, lend),
    "look-around": Operation(nothing, look_around),
    "reconfigure": Operation(first(short_idle, RECORD), reconfigure, drives=True),
    "reconfigure-in-a-load": Operation(nothing, reconfigure_in_a_load),
    "requests-door": Operation(nothing, knock, doors=True),
}
"""Name -> operation."""
if importlib.util.find_spec("httpx"):
    OPERATIONS["httpx-door"] = Operation(first(RECORD, REST), knock_with_httpx, doors=True)


ELSEWHERE = {
    "GPUResourceManager.aio": "the asyncio face has verbs of its own in test_interruptions.py",
    "GPUResourceManager.async_httpx_transport": "is one of those",
    "GPUResourceManager.shared": "makes a manager and does nothing with it",
}
"""What is public and no operation, with the reason."""


def verbs_of(*kinds: type) -> set[str]:
    """Whatever these classes can be asked for: their public methods and properties."""
    return {f"{kind.__name__}.{name}" for kind in kinds for name in vars(kind) if not name.startswith("_")}


@contextlib.contextmanager
def verbs_called(*kinds: type) -> Iterator[set[str]]:
    """Which of `verbs_of(*kinds)` are called while the block runs."""
    called: set[str] = set()

    def noted(verb: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def noting(*args: Any, **options: Any) -> Any:
            called.add(verb)
            return function(*args, **options)

        return noting

    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds:
            for name, member in list(vars(kind).items()):
                verb = f"{kind.__name__}.{name}"
                if name.startswith("_") or isinstance(member, classmethod):
                    continue
                if isinstance(member, property):
                    assert member.fget is not None
                    patch.setattr(kind, name, property(noted(verb, member.fget)))
                else:
                    patch.setattr(kind, name, noted(verb, member))
        yield called


def io_calls(name: str) -> list[str]:
    """The I/O calls of an operation in which nothing goes wrong, in order."""
    operation, calls = OPERATIONS[name], list[str]()
    stage = operation.stage()
    operation.before(stage)
    stage.world.on_io.append(lambda op, phase: calls.append(op) if phase == "before" else None)
    operation.act(stage)
    return calls
