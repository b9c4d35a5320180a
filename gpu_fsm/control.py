"""The control socket: other processes of the same user look at a running manager and ask it for things.

A Unix socket that only its owner can reach.  One JSON object a line: the server greets with its protocol's number, the
client asks `{"protocol": 1, "do": ...}`, the server answers `{"ok": true, "result": ...}` or `{"ok": false, "error":
{"code", "detail", "remedy"}}`.  Several clients at once, a thread each: one that waits for a load holds up nobody, and
`status` is the published one, which waits for nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import queue
import select
import socket
import stat
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol, Self

from attrs import define

from gpu_fsm.arguments import as_mode, as_timeout
from gpu_fsm.cardlock import runtime_folder, runtime_folders
from gpu_fsm.errors import BadArgument, Bucket, GPUFSMError, ManagerClosed, OperationTimeout, Superseded, one_line
from gpu_fsm.events import Event
from gpu_fsm.status import ExecutionMode, GPUResourceStatus, plain
from gpu_fsm.tickets import Outcome

log = logging.getLogger("gpu_fsm")

PROTOCOL: Final = 1
LINE_BYTES: Final = 1 << 16
"""No question of ours takes a hundredth of it.  An answer may be longer: it is our own server's."""
IDLE_S: Final = 60.0
"""A client that says nothing, or reads nothing, for so long is let go."""
ANSWER_S: Final = 5.0
"""What a question that needs no waiting may take, however busy the machine is."""
HISTORY: Final = 200
"""Events kept for whoever asks afterwards."""
BACKLOG: Final = 1000
"""Events that a slow follower may leave lying before the oldest are dropped, and said to be."""

_numbers = itertools.count(1)


@define(kw_only=True, eq=False, slots=False)
class NothingRuns(GPUFSMError):
    """No running manager could be found, or none that answers."""

    code: ClassVar[str] = "nothing_runs"
    bucket: ClassVar[Bucket] = "user"


@define(kw_only=True, eq=False, slots=False)
class ControlRefused(GPUFSMError):
    """The running manager said no; `said` is its error's code."""

    code: ClassVar[str] = "control_refused"

    said: str = ""


class Manager(Protocol):
    """What the server needs of a `GPUResourceManager`."""

    def get_status(self) -> GPUResourceStatus:
        """The published status."""

    def set_execution_mode(
        self, mode: ExecutionMode, *, preempt: bool = False, timeout_s: float | None = None
    ) -> Outcome:
        """Ask for a mode."""

    def ensure_vlm_loaded(self, *, timeout_s: float | None = None) -> None:
        """Load the VLM."""

    def ensure_vlm_unloaded(self, *, timeout_s: float | None = None) -> None:
        """Unload the VLM."""

    def explain(self, mode: ExecutionMode) -> str:
        """Why a mode is or is not available."""

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Hear every event."""


# --- the server -------------------------------------------------------------------------------------------------------


class ControlServer:
    """Serves a manager until `close()`; a context manager.  `path` None takes a name in the user's runtime folder.

    `on_mode` is told a mode that somebody outside asked for and that was not refused; `on_reload` reads the settings
    again and returns what changed, by name, or raises why not.  `doing` says in words what takes a while at the moment,
    for the status; empty where nothing does.

    With `starting` the program is not ready yet: who looks is answered at once, who asks for a change waits for
    `started()`, and `on_mode` is told a mode when it is asked for, so that the program can begin with it.

    Raises `BadArgument` for a place that cannot be trusted or is taken, `OSError` where there is no room for a socket.
    """

    def __init__(
        self,
        manager: Manager,
        path: Path | None = None,
        *,
        max_clients: int = 64,
        on_mode: Callable[[ExecutionMode], object] | None = None,
        on_reload: Callable[[], Mapping[str, Any]] | None = None,
        doing: Callable[[], str] | None = None,
        starting: bool = False,
    ) -> None:
        self._manager = manager
        self._on_mode = on_mode
        self._on_reload = on_reload
        self._doing = doing or str
        self._wishing = threading.Lock()
        self._wished: ExecutionMode | None = None
        self._ready = threading.Event()
        if not starting:
            self._ready.set()
        self._max_clients = max_clients
        self._lock = threading.Lock()
        self._clients: set[socket.socket] = set()
        self._followers: set[_Follower] = set()
        self._history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._closed = False
        self.path = path or _own_path()
        self._socket = _listen(self.path)
        self._unsubscribe = manager.subscribe(self._hear)
        self._thread = threading.Thread(target=self._accept, name="gpu_fsm-control", daemon=True)
        self._thread.start()

    def started(self) -> None:
        """The program is ready: whoever waits to ask for a change may now."""
        self._ready.set()

    def close(self) -> None:
        """Take the socket away and let every client go.  Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            clients = tuple(self._clients)
            for follower in self._followers:
                follower.end()
        self._unsubscribe()
        self._ready.set()
        with contextlib.suppress(OSError):
            self.path.unlink()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()
        for client in clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RD)  # an answer under way may still go out
        self._thread.join(ANSWER_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                log.exception("gpu_fsm: the control socket cannot accept")  # out of descriptors, most likely
                threading.Event().wait(1.0)
                continue
            threading.Thread(target=self._serve, args=(client,), name="gpu_fsm-control-client", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.closing(client), contextlib.suppress(OSError):
            client.settimeout(IDLE_S)
            with self._lock:
                room = len(self._clients) < self._max_clients and not self._closed
                if room:
                    self._clients.add(client)
            try:
                if not room:
                    _send(client, _failure("busy", f"{self._max_clients} clients are served already", "Ask later."))
                elif not _is_owner(client):
                    _send(client, _failure("forbidden", "this socket is its owner's"))
                else:
                    _send(client, {"gpu_fsm": "control", "protocol": PROTOCOL, "pid": os.getpid()})
                    self._converse(client)
            finally:
                with self._lock:
                    self._clients.discard(client)

    def _converse(self, client: socket.socket) -> None:
        with client.makefile("rb") as reader:
            while line := reader.readline(LINE_BYTES + 1):
                if len(line) > LINE_BYTES:
                    _send(client, _failure("bad_argument", f"a line of more than {LINE_BYTES} bytes"))
                    return
                follows = False
                try:
                    question = _question(line)
                    follows = question["do"] == "events" and bool(question.get("follow"))
                    answer = {"ok": True, "result": "following" if follows else self._answer(question)}
                except GPUFSMError as error:
                    answer = _failure(error.code, error.summary(), error.remedy)
                except Exception as error:  # a defect of ours costs its asker an answer, nobody the server
                    log.exception("gpu_fsm: the control socket met a defect; please report it")
                    answer = _failure("internal", one_line(error))
                if follows:
                    self._follow(client, answer)
                    return
                _send(client, answer)

    def _answer(self, question: Mapping[str, Any]) -> Any:
        manager = self._manager
        match question["do"]:
            case "status":
                return manager.get_status().to_dict() | {"doing": self._doing()}
            case "explain":
                return manager.explain(_mode(question))
            case "events":
                with self._lock:
                    return list(self._history)
            case "mode":
                mode, preempt = _mode(question), question.get("preempt", False)
                if not isinstance(preempt, bool):
                    raise BadArgument(detail="preempt is neither true nor false")
                timeout_s = self._begin_with(mode, _timeout(question))
                try:
                    outcome = manager.set_execution_mode(mode, preempt=preempt, timeout_s=timeout_s)
                except OperationTimeout:
                    self._tell_mode(mode)  # only the waiting is over: the mode comes all the same
                    raise
                self._tell_mode(mode)
                return {
                    "asked": outcome.asked,
                    "granted": outcome.granted,
                    "state": outcome.state.value,
                    "reason": None if outcome.reason is None else plain(outcome.reason),
                }
            case "vlm_load":
                return manager.ensure_vlm_loaded(timeout_s=self._await_start(_timeout(question)))
            case "vlm_unload":
                return manager.ensure_vlm_unloaded(timeout_s=self._await_start(_timeout(question)))
            case "reload":
                if self._on_reload is None:
                    raise BadArgument(detail="this program has no settings to read again", remedy="Start it again.")
                self._await_start(0.0)
                return dict(self._on_reload())
            case other:
                raise BadArgument(
                    detail=f"{one_line(other, 40)} is nothing that can be done here",
                    remedy="Ask for status, explain, events, mode, vlm_load, vlm_unload or reload.",
                )

    def _begin_with(self, mode: ExecutionMode, timeout_s: float | None) -> float | None:
        """Let a program that is starting begin with this mode, and wait for it; returns what is left of the time."""
        if self._ready.is_set():
            return self._await_start(timeout_s)
        with self._wishing:
            self._wished = mode
            self._tell_mode(mode)
        timeout_s = self._await_start(timeout_s)
        if mode is not self._wished:  # threads that wait wake in any order, and the last word must be the last one's
            raise Superseded(detail="another mode was asked for while it was starting", remedy="Ask again.")
        return timeout_s

    def _await_start(self, timeout_s: float | None) -> float | None:
        """Wait until the program is ready; returns what is left of the time."""
        begun = time.monotonic()
        if not self._ready.wait(timeout_s):
            raise OperationTimeout(detail=f"it is still starting: {self._doing()}", remedy="Ask again later.")
        if self._closed:
            raise ManagerClosed(detail="the manager has closed")
        return None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - begun))

    def _tell_mode(self, mode: ExecutionMode) -> None:
        if self._on_mode is not None:
            self._on_mode(mode)

    # --- events ---

    def _hear(self, event: Event) -> None:
        told = {"time": datetime.now().astimezone().isoformat(timespec="milliseconds"), **event.to_dict()}
        with self._lock:  # what one is told all are, also where the end comes at the same moment
            if self._closed:
                return
            self._history.append(told)
            for follower in self._followers:
                follower.put(told)

    def _follow(self, client: socket.socket, answer: Mapping[str, Any]) -> None:
        follower = _Follower()
        with self._lock:
            self._followers.add(follower)
            if self._closed:
                follower.end()
        try:
            _send(client, answer)
            while (told := follower.next(client)) is not None:
                _send(client, told)
            _send(client, {"end": "the manager has closed"})
        finally:
            with self._lock:
                self._followers.discard(follower)


class _Follower:
    """What one follower has not been told yet."""

    def __init__(self) -> None:
        self._told: queue.Queue[dict[str, Any] | None] = queue.Queue(BACKLOG)
        self._lost = 0

    def put(self, told: dict[str, Any] | None) -> None:
        """Never waits: a follower that does not read loses the oldest."""
        while True:
            with contextlib.suppress(queue.Full):
                return self._told.put_nowait(told)
            with contextlib.suppress(queue.Empty):
                self._told.get_nowait()
                self._lost += 1

    def end(self) -> None:
        """Nothing more will come."""
        self.put(None)

    def next(self, client: socket.socket) -> dict[str, Any] | None:
        """The next line for the client; None at the end.  Raises `ConnectionError` when the client has gone."""
        while True:
            if self._lost:
                lost, self._lost = self._lost, 0
                return {"lost": lost}
            try:
                told = self._told.get(timeout=1.0)
            except queue.Empty:
                readable, _, _ = select.select([client], [], [], 0)
                if readable and client.recv(1) == b"":
                    raise ConnectionError("the follower has gone") from None
                continue
            return None if told is None else {"event": told}


def _question(line: bytes) -> dict[str, Any]:
    try:
        question = json.loads(line)
    except (ValueError, RecursionError):
        raise BadArgument(detail="a line that is no JSON") from None
    if not isinstance(question, dict) or not isinstance(question.get("do"), str):
        raise BadArgument(detail="a line that is no object with a text `do`")
    if question.get("protocol") != PROTOCOL:
        raise BadArgument(
            detail=f"a question of protocol {one_line(question.get('protocol'), 20)}; this manager speaks {PROTOCOL}",
            remedy="Use the gpu-fsm that the manager runs with.",
        )
    return question


def _mode(question: Mapping[str, Any]) -> ExecutionMode:
    return as_mode(question.get("mode"))


def _timeout(question: Mapping[str, Any]) -> float | None:
    return as_timeout(question.get("timeout_s"))


def _failure(code: str, detail: str, remedy: str = "") -> dict[str, Any]:
    return {"ok": False, "error": {"code": code, "detail": one_line(detail, 1000), "remedy": remedy}}


def _send(client: socket.socket, value: Mapping[str, Any]) -> None:
    client.sendall(json.dumps(value).encode() + b"\n")


# --- where it is ------------------------------------------------------------------------------------------------------

_NAME = "control-{pid}-{number}.sock"


def _own_path() -> Path:
    folder = runtime_folder()
    for path in _sockets_in(folder):  # left behind by processes that were killed
        if not _lives(_pid_of(path)):
            with contextlib.suppress(OSError):
                path.unlink()
    return folder / _NAME.format(pid=os.getpid(), number=next(_numbers))


def _listen(path: Path) -> socket.socket:
    """Bind a socket that only its owner can reach."""
    folder = path.parent
    try:
        facts = folder.stat()
        if facts.st_uid not in (os.getuid(), 0) or (facts.st_mode & 0o022 and not facts.st_mode & stat.S_ISVTX):
            raise BadArgument(
                detail=f"others may write in {one_line(folder)}, so a control socket cannot be trusted there",
                remedy="Name a place in a folder of your own.",
            )
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise BadArgument(detail=f"{one_line(path)} is there and is no socket", remedy="Name another place.")
            if _answers(path):
                raise BadArgument(detail=f"{one_line(path)} is served by another manager", remedy="Name another place.")
            path.unlink()
    except OSError as error:
        raise BadArgument(detail=f"{one_line(path)} cannot be used: {error.strerror}") from error
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(128)
    except OSError as error:
        listener.close()
        why = error.strerror or one_line(error)  # a path of more than 107 bytes has no number of its own
        raise BadArgument(
            detail=f"{one_line(path)} cannot be a socket: {why}", remedy="Name a shorter path."
        ) from error
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _is_owner(client: socket.socket) -> bool:
    """Whether the other side is this user or root, where the kernel tells; the socket's mode says so in any case."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    _, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return uid in (os.getuid(), 0)


def _sockets_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("control-*.sock") if _pid_of(path))


def _pid_of(path: Path) -> int:
    pid = path.name.removeprefix("control-").partition("-")[0]
    return int(pid) if pid.isdecimal() and len(pid) < 12 else 0


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


# --- the client -------------------------------------------------------------------------------------------------------


class ControlClient:
    """A connection to a running manager.  `path` None looks in the user's runtime folder.

    Raises `NothingRuns` where no manager answers, `BadArgument` where several do and none is named.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._socket, self.path = _connect(path)
        self._reader = self._socket.makefile("rb")
        self._socket.settimeout(ANSWER_S)
        try:
            greeting = self._read()
            if "error" in greeting:  # too many clients, or not ours to ask
                _result(greeting)
            if greeting.get("gpu_fsm") != "control" or greeting.get("protocol") != PROTOCOL:
                raise NothingRuns(
                    detail=f"{one_line(self.path)} speaks protocol {one_line(greeting.get('protocol'), 20)}, "
                    f"this gpu-fsm speaks {PROTOCOL}",
                    remedy="Use the gpu-fsm that the manager runs with.",
                )
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, *, wait_s: float | None = ANSWER_S, **details: Any) -> Any:
        """Ask one thing and return its result.  `wait_s` None waits for as long as it takes.

        Raises `ControlRefused` with the manager's words, `OperationTimeout`, `NothingRuns` where it ends meanwhile.
        """
        self._socket.settimeout(wait_s)
        self._write({"protocol": PROTOCOL, "do": do, **details})
        return _result(self._read())

    def follow(self) -> Iterator[dict[str, Any]]:
        """Events as they happen, until the manager closes; `{"lost": n}` in the place of what came too fast."""
        self.ask("events", follow=True)
        self._socket.settimeout(None)
        while True:
            line = self._read()
            if "end" in line:
                return
            yield line.get("event", line)

    def close(self) -> None:
        """Hang up."""
        self._reader.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, value: Mapping[str, Any]) -> None:
        try:
            _send(self._socket, value)
        except OSError as error:
            raise self._gone() from error

    def _read(self) -> dict[str, Any]:
        try:
            line = self._reader.readline()
            answer = json.loads(line) if line.endswith(b"\n") else None
        except TimeoutError as error:
            raise OperationTimeout(
                detail=f"no answer through {one_line(self.path)}", remedy="Is the process stopped, or overloaded?"
            ) from error
        except (OSError, ValueError) as error:
            raise self._gone() from error
        if not isinstance(answer, dict):
            raise self._gone()
        return answer

    def _gone(self) -> NothingRuns:
        return NothingRuns(detail=f"the manager behind {one_line(self.path)} has ended, or is none of ours")


def _result(answer: Mapping[str, Any]) -> Any:
    if answer.get("ok") is True:
        return answer.get("result")
    said = answer.get("error")
    error = said if isinstance(said, dict) else {}
    code, detail, remedy = (one_line(error.get(key, ""), 1000) for key in ("code", "detail", "remedy"))
    if code == BadArgument.code:
        raise BadArgument(detail=detail, remedy=remedy)
    if code == ManagerClosed.code:
        raise NothingRuns(detail=detail, remedy=remedy)
    raise ControlRefused(detail=detail or "no reason was given", remedy=remedy, said=code)


def _connect(path: Path | None) -> tuple[socket.socket, Path]:
    looked = [path] if path else [found for folder in runtime_folders() for found in _sockets_in(folder)]
    answered: list[tuple[socket.socket, Path]] = []
    for place in looked:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            facts = place.lstat()
            if stat.S_ISSOCK(facts.st_mode) and facts.st_uid in (os.getuid(), 0):
                client.settimeout(ANSWER_S)
                client.connect(str(place))
                if _is_owner(client):
                    answered.append((client, place))
                    continue
        except OSError:
            pass
        client.close()
    if len(answered) == 1:
        return answered[0]
    for client, _ in answered:
        client.close()
    if answered:
        places = ", ".join(str(place) for _, place in answered)
        raise BadArgument(detail=f"several managers run: {one_line(places, 400)}", remedy="Name one with --socket.")
    where = one_line(path) if path else " or ".join(map(one_line, runtime_folders())) or "the runtime folder"
    raise NothingRuns(
        detail=f"no running gpu_fsm answers in {where}",
        remedy="Start one: gpu-fsm run --screens DIR. It must run as the same user.",
    )


__all__ = ["ControlClient", "ControlRefused", "ControlServer", "NothingRuns"]
