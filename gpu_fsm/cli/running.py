"""The reference agent as a program: `gpu-fsm run`, on the real card and the real Ollama, without any simulation."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_fsm.agent import (
    ExecutionLoop,
    FusionEngine,
    Limits,
    Screen,
    ScreenMemoryError,
    Step,
    Stopped,
    Stopper,
    UIDetector,
    Weights,
    probe_image,
)
from gpu_fsm.appconfig import AgentConfig, AppConfig, ControlConfig, Reloader
from gpu_fsm.cardlock import runtime_folder
from gpu_fsm.cli.board import Board
from gpu_fsm.errors import BadArgument, OllamaUnavailable, one_line
from gpu_fsm.events import Event, StateChanged
from gpu_fsm.manager import GPUResourceManager
from gpu_fsm.ports import RealClock
from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.states import STEPS
from gpu_fsm.status import Answer, ExecutionMode, State
from gpu_fsm.telling import told_event, told_step

if TYPE_CHECKING:
    from gpu_fsm.agent.doors import Vector
    from gpu_fsm.ports import CLIPHost

RESULTS: tuple[str, ...] = ("recorded", "kept", "recognised", "asked", "unavailable", "failed")
_CATALOG_S = 5.0


def run_agent(
    config: AppConfig,
    source: Callable[[Callable[[], float]], Iterable[Screen]],
    *,
    modes: Sequence[ExecutionMode] = (ExecutionMode.RECORDING, ExecutionMode.AUTOPILOT),
    pull: bool = False,
    as_json: bool = False,
    read: Callable[[], AppConfig] | None = None,
) -> int:
    """Run the agent over the screens of `source(interval_s)`, once for each of `modes`, with its control socket.

    Without Ollama or a GPU it goes on with what there is and says so.  SIGTERM ends it cleanly.  `read` gives the
    settings anew when somebody asks from outside.  Returns 0, or 1 if a screen could not even be embedded or the
    memory not be saved.  Raises `KeyboardInterrupt` after a SIGINT, when everything has been given back, `BadArgument`
    for a screen memory that cannot be used, `ClipUnavailable` where CLIP cannot be loaded.
    """
    agent = [config.agent]  # the one that holds now
    screens = source(lambda: agent[0].interval_s)
    counts: Counter[str] = Counter()
    states: list[State] = []
    alone = _alone_with(config.agent.index_path)
    with alone, Stopper() as stopper, Board(to_stderr=as_json) as board, contextlib.suppress(Stopped):
        if pull:
            with stopper.cut():
                _pull(config.gpu, board)
        _work(config, agent, screens, modes, board, stopper, counts, states, read or (lambda: config))
    if as_json:
        report = {
            "ok": not counts["failed"] and not counts["unsaved"],
            "simulated": [],
            "states": [state.value for state in states],
            **{name: counts[name] for name in RESULTS},
        }
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        done = "  ".join(f"{name}: {counts[name]}" for name in RESULTS if counts[name])
        sys.stdout.write((done or "no screen was handled") + "\n")
    if stopper.signal is signal.SIGINT:
        raise KeyboardInterrupt
    return 1 if counts["failed"] or counts["unsaved"] else 0


def _work(
    config: AppConfig,
    now: list[AgentConfig],
    screens: Iterable[Screen],
    modes: Sequence[ExecutionMode],
    board: Board,
    stopper: Stopper,
    counts: Counter[str],
    states: list[State],
    read: Callable[[], AppConfig],
) -> None:
    from gpu_fsm.clip import CLIPManager

    clip = CLIPManager(config.gpu)
    board.wait_for(f"loading CLIP {one_line(config.gpu.clip_model or '')}")
    with stopper.cut():
        clip.prepare()
        memory = _open_memory(config.agent, config.gpu, _fingerprint(clip))
    board.wait_for("")
    if len(memory):
        board.say(f"{len(memory)} screens are remembered from before")

    def show(step: Step) -> None:
        counts[step.result] += 1
        board.say(told_step(step))

    states.append(State.IDLE)
    with GPUResourceManager(config.gpu, clip_host=clip) as manager:
        manager.subscribe(lambda event: _hear(event, board, states, config.gpu))
        detector = UIDetector(
            manager,
            **({} if config.agent.prompt is None else {"prompt": config.agent.prompt}),
            timeout_s=config.agent.vlm_timeout_s,
            largest_side=config.agent.largest_side_px,
            cache_size=config.agent.cache_size,
            labels=config.agent.labels,
        )
        loop = ExecutionLoop(
            manager, detector, memory, on_step=show, memory_path=config.agent.index_path, stopper=stopper
        )

        def judge_by(agent: AgentConfig) -> None:
            now[0] = agent
            memory.limits = _limits(agent, config.gpu)
            memory.weights = Weights(image=agent.image_weight, text=agent.text_weight)
            detector.largest_side, detector.timeout_s = agent.largest_side_px, agent.vlm_timeout_s

        # The manager last: the others may still refuse.
        reload = Reloader(config, read, control=lambda _: None, agent=judge_by, gpu=manager.reconfigure)
        with _control(config.control, manager, loop, board, reload):
            try:
                for mode in modes:
                    loop.set_mode(mode)
                    status = manager.get_status()
                    board.say(f"{mode.value}: {status.state.name}, CLIP on {status.clip_device}")
                    if status.cpu_only:
                        board.say(f"  CPU only: {status.cpu_only_reason}")
                    if status.reason is not None:
                        board.say(f"  {status.reason}")
                    for _ in loop.steps(screens):
                        pass
            finally:
                _save_the_rest(loop, config.agent.index_path, board, counts)


def _save_the_rest(loop: ExecutionLoop, path: Path | None, board: Board, counts: Counter[str]) -> None:
    """Try once more where the last writing failed; what is lost for good must not look like a success."""
    if path is None or not loop.unsaved:
        return
    try:
        loop.memory.save(path)
    except OSError as error:
        counts["unsaved"] += 1
        board.say(f"the screen memory {one_line(path)} cannot be saved: {one_line(error.strerror or error)}")


@contextlib.contextmanager
def _alone_with(path: Path | None) -> Iterator[None]:
    """Keep other runs from this screen memory: each would write what it knows itself over what the other recorded."""
    if path is None:
        yield
        return
    from filelock import FileLock, Timeout

    with contextlib.ExitStack() as held:
        # A place without locks costs nobody the run.  Beside the memory the lock's file would be left lying about.
        with contextlib.suppress(OSError, NotImplementedError):
            name = f"memory-{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.lock"
            lock = FileLock(runtime_folder() / name, mode=0o600, fallback_to_soft=False, preserve_lock_file=True)
            try:
                held.enter_context(lock.acquire(blocking=False))
            except Timeout:
                raise BadArgument(
                    detail=f"the screen memory {one_line(path)} is in use by another run",
                    remedy="End that one, or name another file.",
                ) from None
        yield


def _limits(agent: AgentConfig, gpu: GPUResourceConfig) -> Limits:
    """The thresholds as the settings want them, and as the CLIP model has them where they say nothing."""
    own = Limits.beside(gpu.clip_model or "")
    return Limits(
        accept=own.accept if agent.accept is None else agent.accept,
        unsure=own.unsure if agent.unsure is None else agent.unsure,
        margin=own.margin if agent.margin is None else agent.margin,
    )


def _open_memory(agent: AgentConfig, gpu: GPUResourceConfig, probe: Vector) -> FusionEngine:
    """The screen memory as the settings want it: what was saved, or an empty one.  A file that is refused stays."""
    limits = _limits(agent, gpu)
    weights = Weights(image=agent.image_weight, text=agent.text_weight)
    path = agent.index_path
    if path is None or not path.exists():
        if path is not None and not path.parent.is_dir():
            raise BadArgument(
                detail=f"{one_line(path.parent)} is no folder", remedy="Make it, or set agent.index_path."
            )
        return FusionEngine(limits, probe=probe, weights=weights)
    try:
        return FusionEngine.load(path, limits, probe=probe, weights=weights)
    except ScreenMemoryError as error:
        raise BadArgument(detail=error.detail, remedy=error.remedy) from error


def _fingerprint(clip: CLIPHost) -> Vector:
    vector: Vector = clip.encode([probe_image()])[0]
    return vector


def _hear(event: Event, board: Board, states: list[State], config: GPUResourceConfig) -> None:
    told = told_event(event)
    if told is not None:
        with contextlib.suppress(OSError):  # nobody reads any more: the agent's own next line ends the run for that
            board.say(told)
    if isinstance(event, StateChanged):
        states.append(event.new)
        if event.new not in STEPS:
            board.wait_for("")
        elif event.new is State.LOADING:
            board.wait_for(f"loading {one_line(config.vlm_model)}", limit_s=config.vlm_load_deadline_s)
        else:
            board.wait_for(event.new.value)


@contextlib.contextmanager
def _control(
    config: ControlConfig, manager: GPUResourceManager, loop: ExecutionLoop, board: Board, reload: Reloader
) -> Iterator[None]:
    """Serve the control socket meanwhile; where there can be none, say so and go on."""
    if not config.enabled:
        yield
        return
    from gpu_fsm.control import ControlServer

    try:
        server = ControlServer(
            manager, config.socket_path, max_clients=config.max_clients, on_mode=loop.follow, on_reload=reload
        )
    except (OSError, BadArgument) as error:
        if config.socket_path is not None:
            raise
        board.say(f"no control socket: {one_line(error)}")
        yield
        return
    with server:
        yield


# --- pull -------------------------------------------------------------------------------------------------------------


def _pull(config: GPUResourceConfig, board: Board) -> None:
    """Have Ollama fetch the VLM where it is missing."""
    from gpu_fsm.ollama import OllamaManager

    ollama = OllamaManager(config, clock=RealClock())
    found = ollama.catalog(_CATALOG_S)
    if found.present is Answer.UNKNOWN:
        raise OllamaUnavailable(
            detail=f"nothing can be pulled: {found.detail}", remedy="Start Ollama, or leave --pull out.", url=ollama.url
        )
    if found.present is Answer.YES:
        return
    with contextlib.closing(ollama), contextlib.closing(ollama.pull()) as parts:
        for part in parts:
            board.fetch(f"{one_line(config.vlm_model)}: {part.status}", part.done_bytes, part.total_bytes)
    board.say(f"{one_line(config.vlm_model)} has been pulled")
