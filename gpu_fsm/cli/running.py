"""The reference agent as a program: `gpu-fsm run`, on the real card and the real Ollama, without any simulation."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

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
from gpu_fsm.appconfig import AgentConfig, AppConfig, Reloader
from gpu_fsm.cardlock import runtime_folder
from gpu_fsm.cli.board import Board
from gpu_fsm.cli.codes import ExitCode
from gpu_fsm.errors import BadArgument, OllamaUnavailable, one_line
from gpu_fsm.events import Event, StateChanged
from gpu_fsm.manager import GPUResourceManager
from gpu_fsm.ports import RealClock
from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.states import STEPS
from gpu_fsm.status import Answer, ExecutionMode, GPUResourceStatus, State
from gpu_fsm.telling import told_event, told_step

if TYPE_CHECKING:
    from gpu_fsm.agent.doors import Vector
    from gpu_fsm.clip import CLIPManager
    from gpu_fsm.ports import CLIPHost

RESULTS: tuple[str, ...] = ("recorded", "kept", "recognised", "asked", "unavailable", "failed")
_CATALOG_S = 5.0
_PAUSED = "paused, since IDLE was asked for"


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
    for screens or a screen memory that cannot be used, `ClipUnavailable` where CLIP cannot be loaded.
    """
    path = config.agent.index_path
    if path is not None and not path.parent.is_dir():
        raise BadArgument(detail=f"{one_line(path.parent)} is no folder", remedy="Make it, or name another file.")
    alone = _alone_with(path)
    with alone, Stopper() as stopper, Board(to_stderr=as_json) as board:
        program = _Program(config, board, stopper, read or (lambda: config))
        with contextlib.suppress(Stopped):
            program.run(source, modes, pull=pull)
    counts = program.counts
    if as_json:
        report = {
            "ok": not counts["failed"] and not counts["unsaved"],
            "simulated": [],
            "states": [state.value for state in program.states],
            **{name: counts[name] for name in RESULTS},
        }
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        done = "  ".join(f"{name}: {counts[name]}" for name in RESULTS if counts[name])
        sys.stdout.write((done or "no screen was handled") + "\n")
    if program.abandoned:
        _leave(interrupted=stopper.signal is signal.SIGINT)
    if stopper.signal is signal.SIGINT:
        raise KeyboardInterrupt
    return 1 if counts["failed"] or counts["unsaved"] else 0


def _leave(*, interrupted: bool) -> NoReturn:
    """End without a wait: a hub's threads go on until their download is over, and Python would join them."""
    sys.stdout.flush()
    if interrupted:
        sys.stderr.write("\ngpu-fsm: interrupted\n")
        sys.stderr.flush()
    os._exit(ExitCode.INTERRUPTED if interrupted else ExitCode.FINE)


class _Program:
    """One run: the control socket first, so that it can be looked at, then what takes long."""

    def __init__(self, config: AppConfig, board: Board, stopper: Stopper, read: Callable[[], AppConfig]) -> None:
        self._config = config
        self._board = board
        self._stopper = stopper
        self._read = read
        self._agent = config.agent
        """The settings that hold now."""
        self._wish: ExecutionMode | None = None
        """What somebody outside asked for; before there is a loop, what it begins with."""
        self._loop: ExecutionLoop | None = None
        self._reload: Reloader | None = None
        self._loading: Future[None] | None = None
        self.counts: Counter[str] = Counter()
        self.states: list[State] = []

    @property
    def abandoned(self) -> bool:
        """CLIP is still being fetched or loaded, and nobody waits for it any more."""
        return self._loading is not None and not self._loading.done()

    def run(
        self,
        source: Callable[[Callable[[], float]], Iterable[Screen]],
        modes: Sequence[ExecutionMode],
        *,
        pull: bool,
    ) -> None:
        """Until the screens are over or somebody ends it."""
        config, board = self._config, self._board
        clip = _late_clip(config.gpu)
        with GPUResourceManager(config.gpu, clip_host=clip) as manager:
            manager.subscribe(lambda event: self._hear(event, manager.config))
            with self._served(manager) as started:
                with self._stopper.cut():
                    board.wait_for("reading the screens")
                    screens = source(self._interval_s)
                    if pull:
                        _pull(config.gpu, board)
                    board.wait_for(f"loading CLIP {one_line(config.gpu.clip_model or '')}")
                    self._loading = _in_daemon_thread(clip.prepare)
                    self._loading.result()
                    memory = _open_memory(config.agent, config.gpu, _fingerprint(clip))
                board.wait_for("")
                if len(memory):
                    board.say(f"{len(memory)} screens are remembered from before")
                self._loop = loop = self._made(manager, memory)
                self.states.append(State.IDLE)
                started()
                try:
                    for mode in (self._wish or modes[0], *modes[1:]):
                        loop.set_mode(mode)
                        self._tell_mode(mode, manager.get_status())
                        for _ in loop.steps(screens):
                            pass
                finally:
                    _save_the_rest(loop, config.agent.index_path, board, self.counts)

    def _made(self, manager: GPUResourceManager, memory: FusionEngine) -> ExecutionLoop:
        agent = self._config.agent
        detector = UIDetector(
            manager,
            **({} if agent.prompt is None else {"prompt": agent.prompt}),
            timeout_s=agent.vlm_timeout_s,
            largest_side=agent.largest_side_px,
            cache_size=agent.cache_size,
            labels=agent.labels,
        )

        def judge_by(agent: AgentConfig) -> None:
            memory.limits = _limits(agent, self._config.gpu)  # first: they may not fit the model's own
            self._agent = agent
            memory.weights = Weights(image=agent.image_weight, text=agent.text_weight)
            detector.timeout_s, detector.largest_side = agent.vlm_timeout_s, agent.largest_side_px
            detector.cache_size = agent.cache_size

        # The manager last: the others may still refuse.
        self._reload = Reloader(
            self._config, self._read, control=lambda _: None, agent=judge_by, gpu=manager.reconfigure
        )
        return ExecutionLoop(
            manager,
            detector,
            memory,
            on_step=self._show,
            on_pause=self._pause,
            memory_path=agent.index_path,
            stopper=self._stopper,
        )

    def _interval_s(self) -> float:
        """Asked by the live screen after each look, so that a pause begins there too while nothing on it moves."""
        if self._loop is not None:
            self._loop.rest()
        return self._agent.interval_s

    def _show(self, step: Step) -> None:
        self.counts[step.result] += 1
        self._board.say(told_step(step))

    def _pause(self, begins: bool) -> None:
        self._board.say("paused: IDLE was asked for; the card is given back" if begins else "the pause is over")
        self._board.wait_for(_PAUSED if begins else "")

    def _tell_mode(self, mode: ExecutionMode, status: GPUResourceStatus) -> None:
        self._board.say(f"{mode.value}: {status.state.name}, CLIP on {status.clip_device}")
        if status.cpu_only:
            self._board.say(f"  CPU only: {status.cpu_only_reason}")
        if status.reason is not None:
            self._board.say(f"  {status.reason}")

    def _hear(self, event: Event, gpu: GPUResourceConfig) -> None:
        if self._loop is not None:  # before, nothing of the agent's has begun that could be told
            rest = _PAUSED if self._loop.paused else ""
            _hear(event, self._board, self.states, gpu, rest=rest)

    # --- from outside ---

    def _follow(self, mode: ExecutionMode) -> None:
        self._wish = mode
        if self._loop is not None:
            self._loop.follow(mode)

    def _read_again(self) -> Mapping[str, Any]:
        assert self._reload is not None  # nobody is let in before there is one
        return self._reload()

    @contextlib.contextmanager
    def _served(self, manager: GPUResourceManager) -> Iterator[Callable[[], object]]:
        """Serve the control socket meanwhile; where there can be none, say so and go on.  Yields what opens it."""
        config = self._config.control
        if not config.enabled:
            yield lambda: None
            return
        from gpu_fsm.control import ControlServer

        try:
            server = ControlServer(
                manager,
                config.socket_path,
                max_clients=config.max_clients,
                on_mode=self._follow,
                on_reload=self._read_again,
                doing=self._board.waiting,
                starting=True,
            )
        except (OSError, BadArgument) as error:
            if config.socket_path is not None:
                raise
            self._board.say(f"no control socket: {one_line(error)}")
            yield lambda: None
            return
        with server:
            yield server.started


def _in_daemon_thread(work: Callable[[], None]) -> Future[None]:
    """A signal ends the waiting for it at once, whatever library it is in."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="gpu_fsm-clip", daemon=True).start()
    return future


def _late_clip(config: GPUResourceConfig) -> CLIPManager:
    from gpu_fsm.clip import CLIPManager

    class Late(CLIPManager):
        """Until it is loaded nobody else asks torch for a GPU: whoever ends the run would wait for torch's import."""

        @property
        def gpu_unusable_reason(self) -> str:
            return super().gpu_unusable_reason if self._is_ready() else "CLIP is still being loaded"

    return Late(config)


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
        return FusionEngine(limits, probe=probe, weights=weights)
    try:
        return FusionEngine.load(path, limits, probe=probe, weights=weights)
    except ScreenMemoryError as error:
        raise BadArgument(detail=error.detail, remedy=error.remedy) from error


def _fingerprint(clip: CLIPHost) -> Vector:
    vector: Vector = clip.encode([probe_image()])[0]
    return vector


def _hear(event: Event, board: Board, states: list[State], config: GPUResourceConfig, *, rest: str = "") -> None:
    told = told_event(event)
    if told is not None:
        with contextlib.suppress(OSError):  # nobody reads any more: the agent's own next line ends the run for that
            board.say(told)
    if isinstance(event, StateChanged):
        states.append(event.new)
        if event.new not in STEPS:
            board.wait_for(rest)
        elif event.new is State.LOADING:
            board.wait_for(f"loading {one_line(config.vlm_model)}", limit_s=config.vlm_load_deadline_s)
        else:
            board.wait_for(event.new.value)


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
