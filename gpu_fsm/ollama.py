"""Ollama as a door: one model's residency and its answers, over HTTP.  The only importer of `requests`.

What a client must know about the server is written where it matters.  Three habits run through the file: every call has
ONE deadline for all of it (connecting, headers, body), every call has its own connection (so that an abort hits nothing
else), and nothing the server says is believed before it has been looked at: status first, then text, then numbers.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import ipaddress
import json
import logging
import math
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import requests
import urllib3
from attrs import frozen
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError, ReadTimeoutError

from gpu_fsm.errors import (
    BadArgument,
    ConfigError,
    GPUFSMError,
    LoadAborted,
    LoadFailed,
    LoadOutOfMemory,
    LoadTimeout,
    ManagerClosed,
    ModelNotFound,
    OllamaBusy,
    OllamaError,
    OllamaProtocolError,
    OllamaRequestRejected,
    OllamaTimeout,
    OllamaUnavailable,
    one_line,
)
from gpu_fsm.ports import Clock, Completion, Interrupt, LoadReport
from gpu_fsm.settings import GPUResourceConfig, SecretURL, is_loopback, never_ollama
from gpu_fsm.status import Answer, Catalog, LoadedModel, Residency

_log = logging.getLogger("gpu_fsm")

_CONTROL_LIMIT = 1 << 20
"""Bytes read of an answer that is not the model's own; 256 models in `/api/ps` take 100 KiB."""
_LINE_LIMIT = 16 << 20
"""Bytes of one object of the model's: the last one carries the context as token numbers, 8 bytes each."""
_ANSWER_LIMIT = 64 << 20
_CHUNK = 1 << 16
_HEAD_LIMIT = 1 << 16
"""Bytes for what is not body: the head, interim answers, trailers; chunks may add a quarter of the body's bound."""
_MODELS_LIMIT = 256
_NAME_LIMIT = 256
_MOST_BYTES = 1 << 50
_MOST_NS = 10**18
_LONGEST_KEEP_ALIVE_S = 1e9
"""31 years.  Above 9.2e9 the server's nanoseconds overflow, and it drops the model at once."""
_CONNECT_S = 5.0
"""A server that is there accepts in milliseconds; only an unreachable host takes longer."""
_NAP_S = 0.1
_FOREVER_YEAR = 2200
"""A negative keep_alive shows as 292 years ahead."""
_MIB = 1 << 20

_JSON = "application/json"
_FOREIGN = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)
"""What `requests` and the layers under it raise; `http.client`'s own errors come wrapped."""

_E = TypeVar("_E", bound=OllamaError)
_T = TypeVar("_T")


# --- names -----------------------------------------------------------------------------------------------------------


def canonical_name(name: str) -> str:
    """Bring a model name into the one form in which names may be compared.

    Ollama shows the shortest form, always with a tag, and looks names up without regard to case: the default registry
    and namespace are stripped, the tag defaults to `latest`.  A colon separates a tag only after the last slash.
    Total: a text that is no valid name comes back lowered and otherwise as it is.
    """
    text = name.casefold()
    while text.startswith(("http://", "https://")):
        text = text.partition("://")[2]
    place, _, model = text.rpartition("/")
    host, _, namespace = place.rpartition("/")
    if ":" not in model:
        model += ":latest"
    if "/" not in text:
        return model
    if host and host != "registry.ollama.ai":
        return f"{host}/{namespace}/{model}"
    if not host and place.startswith("/"):
        return f"/{namespace}/{model}"
    return model if namespace == "library" else f"{namespace}/{model}"


# --- where the server is ---------------------------------------------------------------------------------------------


class _SecretText(str):
    """A header's value: whole on the wire (`encode`), hidden wherever people look."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    def __str__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return format("***", spec)


class _Endpoint:
    """The server's address, with the credentials of its URL moved into a header and out of everything shown."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url.reveal() if isinstance(url, SecretURL) else url)
        userinfo, at, place = parts.netloc.rpartition("@")
        self.url = f"{parts.scheme}://{place}{parts.path.rstrip('/')}"
        self.on_this_machine = is_loopback(self.url)
        self.headers: dict[str, str] = {
            "Accept": _JSON,
            "Accept-Encoding": "identity",  # a compressed answer would have two sizes, and only one is bounded
            "Connection": "close",
            "User-Agent": "gpu-fsm",
        }
        self._secrets: tuple[_SecretText, ...] = ()
        if at:
            user, _, password = userinfo.partition(":")
            plain = f"{unquote(user)}:{unquote(password)}"
            encoded = base64.b64encode(plain.encode()).decode()
            self.headers["Authorization"] = _SecretText(f"Basic {encoded}")
            forms = {encoded, plain, userinfo, unquote(password), password}
            # Longest first, or a part would be hidden and the rest left standing.
            self._secrets = tuple(_SecretText(form) for form in sorted(forms, key=len, reverse=True) if len(form) > 3)

    def __repr__(self) -> str:
        return f"<{self.url}>"

    def hide(self, text: str) -> str:
        """Take our credentials out of a text that the server, or a library, made."""
        for secret in self._secrets:
            text = text.replace(str.__str__(secret), "***")
        return text

    def clean(self, problem: BaseException) -> None:
        """Take our credentials out of a foreign exception and all that hang on it, where a server has said them."""
        if not self._secrets:
            return
        waiting: list[BaseException | None] = [problem]
        met: set[int] = set()
        while waiting:
            cause = waiting.pop()
            if cause is None or id(cause) in met:
                continue
            met.add(id(cause))
            waiting += [cause.__cause__, cause.__context__, *_causes(cause)]
            cause.args = tuple(self.hide(arg) if isinstance(arg, str) else arg for arg in cause.args)
            for name, value in vars(cause).items():
                if isinstance(value, str | bytes):
                    text = value if isinstance(value, str) else value.decode("latin-1")
                    setattr(cause, name, self.hide(text))

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> requests.PreparedRequest:
        """Prepare a request without a session: no cookies, no netrc, no environment."""
        prepared = requests.PreparedRequest()
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        headers = self.headers if data is None else {**self.headers, "Content-Type": _JSON}
        prepared.prepare(method=method, url=self.url + path, headers=headers, data=data)
        return prepared


# --- transports: how bytes travel ------------------------------------------------------------------------------------


_AddressInfo = tuple[Any, ...]
"""As `socket.getaddrinfo` gives it: family, kind, protocol, canonical name, address."""


class Transport(Protocol):
    """Carries one call, as a `requests` adapter does: `send` begins it, `close` ends it, and then it is used up.

    `timeout` is in seconds of the client's clock and for the whole call, the body included.  A simulation has its own
    transport, without sockets and in virtual time.  What goes wrong is raised as `requests` does it:
    `ConnectionError(ConnectionRefusedError(...))`, `ReadTimeout`, `ConnectTimeout`, `ConnectionError`.
    """

    simulated: bool
    expired: bool
    """Whether the transport itself ended the call because its time was over."""
    limit: int
    """Bytes that it may read, head and framing included; set before `send`."""

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = True,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        """Send, and return when the head of the answer is there."""

    def abort(self) -> None:
        """End what is in flight, from any thread and without blocking: a blocked send or read ends at once."""

    def close(self) -> None:
        """End the call and let go of its connection."""


class SocketTransport(HTTPAdapter):
    """Real sockets.  Their own timeouts restart with every byte, so a timer watches over the whole call."""

    simulated = False

    def __init__(self) -> None:
        self.limit = _CONTROL_LIMIT
        self._lock = threading.Lock()
        self.expired = False
        self._aborted = False
        self._handles: list[socket.socket] = []
        self._resolving: Future[list[_AddressInfo]] | None = None
        self._timer: threading.Timer | None = None
        super().__init__(max_retries=0)

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = True,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        """Send; see `Transport`."""
        timer = threading.Timer(timeout, self._expire)
        timer.daemon = True
        if _started(timer):
            self._timer = timer
        return super().send(request, stream=stream, timeout=timeout, verify=verify, cert=cert, proxies=proxies)

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        """Have the pool make connections that this transport can shut down."""
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        pool.ConnectionCls = partial(_HTTPS if pool.scheme == "https" else _HTTP, self)
        return pool

    def build_response(self, req: requests.PreparedRequest, resp: Any) -> requests.Response:
        """As the base class, which up to requests 2.33 trips over `charset` without a value in the Content-Type."""
        try:
            return super().build_response(req, resp)
        except AttributeError as problem:
            raise requests.exceptions.InvalidHeader("the Content-Type cannot be read") from problem

    def abort(self) -> None:
        """End what is in flight; see `Transport`."""
        with self._lock:
            self._aborted = True
            resolving = self._resolving
            for handle in self._handles:
                with contextlib.suppress(OSError):  # not connected yet, or gone already
                    handle.shutdown(socket.SHUT_RDWR)
        if resolving is not None:
            with contextlib.suppress(InvalidStateError):
                resolving.set_exception(ConnectionAbortedError("the call was aborted"))

    def close(self) -> None:
        """End the call: stop the timer, close every socket."""
        if self._timer is not None:
            self._timer.cancel()
        super().close()
        with self._lock:
            handles, self._handles = self._handles, []
        for handle in handles:
            handle.close()

    def _expire(self) -> None:
        self.expired = True
        self.abort()

    def open_socket(self, host: str, port: int, timeout_s: float) -> socket.socket:
        """Connect to the first address of `host` that answers, all of them within one short time."""
        deadline = time.monotonic() + min(
            timeout_s * 0.9, _CONNECT_S
        )  # before the watching timer, to say what was slow
        problems: list[OSError] = []
        local = is_loopback(f"http://{f'[{host}]' if ':' in host else host}")
        for family, kind, protocol, _, address in self._resolve(host, port, deadline):
            if not _permitted(str(address[0]), local=local):
                problems.append(PermissionError(f"{host} leads to {address[0]}, where no Ollama may be"))
                continue
            sock = socket.socket(family, kind, protocol)
            try:
                self._adopt(sock)
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect(address)
                sock.settimeout(timeout_s)
            except OSError as problem:
                sock.close()
                problems.append(problem)
            else:
                return sock
        # "Refused" is said only where every address refused: it counts as proof that nobody listens.
        raise next((p for p in problems if not isinstance(p, ConnectionRefusedError)), None) or (
            problems[0] if problems else OSError(f"{host} has no address")
        )

    def _adopt(self, sock: socket.socket) -> None:
        # A duplicate: TLS detaches the original, and shutting down the duplicate ends the connection for both.
        handle = sock.dup()
        with self._lock:
            if not self._aborted:
                self._handles.append(handle)
                return
        handle.close()
        raise ConnectionAbortedError("the call was aborted")

    def _resolve(self, host: str, port: int, deadline: float) -> list[_AddressInfo]:
        """Look the host up; a name in a thread of its own, since the system's resolver knows no deadline."""
        try:
            ipaddress.ip_address(host)
        except ValueError:
            pass
        else:
            return [*socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        answer: Future[list[_AddressInfo]] = Future()

        def look_up() -> None:
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as problem:
                with contextlib.suppress(InvalidStateError):
                    answer.set_exception(problem if isinstance(problem, OSError) else OSError(str(problem)))
            else:
                with contextlib.suppress(InvalidStateError):
                    answer.set_result([*found])

        with self._lock:
            if self._aborted:
                raise ConnectionAbortedError("the call was aborted")
            self._resolving = answer
        if not _started(threading.Thread(target=look_up, name="gpu-fsm-resolve", daemon=True)):
            look_up()
        try:
            return answer.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeout:
            raise TimeoutError(f"no address for {host} in time") from None


def _started(thread: threading.Thread) -> bool:
    """Start a thread; False once the interpreter ends, where some versions (CPython 3.12) start none any more.

    What is sent then, the last unload, is bounded by the sockets' own timeouts and by whoever waits for the close.
    """
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


def _permitted(address: str, *, local: bool) -> bool:
    """Whether a resolved address may be dialled: a local name stays local, and metadata services are never Ollama."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_loopback if local else not (ip.is_unspecified or never_ollama(str(ip)))


class _TooLong(OSError):
    """More bytes came than any honest answer has."""


class _Metered(io.RawIOBase):
    """A socket's bytes, up to a bound.

    What `http.client` and `urllib3` read besides the body has weaker bounds or none: 100 header lines of 64 KiB,
    interim answers without end, a chunk's size or a trailer as one endless line.
    """

    def __init__(self, raw: Any, limit: int) -> None:
        self._raw = raw
        self._left = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count: int | None = self._raw.readinto(buffer)
        self._left -= count or 0
        if self._left < 0:
            raise _TooLong("the answer is longer than any of Ollama's")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    """An answer that is metered from its first byte on."""

    def __init__(self, sock: socket.socket, *args: Any, limit: int, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_Metered(sock.makefile("rb", buffering=0), limit))

    def begin(self) -> None:
        super().begin()
        if self.msg.defects or self.msg.get_payload():
            # `urllib3` would go on, and write into the log what it could not read: perhaps our password, said back.
            raise http.client.HTTPException("the head of the answer is broken")


class _Owned(HTTPConnection):
    """A connection whose socket its transport knows."""

    def __init__(self, owner: SocketTransport, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._owner = owner
        self.response_class = partial(_Answer, limit=owner.limit)  # type: ignore[assignment]  # it is called, no more

    def _new_conn(self) -> socket.socket:
        limit = self.timeout if isinstance(self.timeout, int | float) else _CONNECT_S
        try:
            return self._owner.open_socket(self._dns_host, self.port or 80, limit)
        except socket.gaierror as problem:
            raise NameResolutionError(self.host, self, problem) from problem
        except TimeoutError as problem:
            raise ConnectTimeoutError(self, f"no connection to {self.host} in time") from problem
        except OSError as problem:
            raise NewConnectionError(self, f"no connection to {self.host}: {problem}") from problem


class _HTTP(_Owned):
    pass


class _HTTPS(_Owned, HTTPSConnection):
    pass


# --- what the server says --------------------------------------------------------------------------------------------


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _bounded_int(text: str) -> int:
    if len(text) > 19:
        raise ValueError("a number with more than 19 digits")
    return int(text)


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number without end")
    return number


_decode = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_bounded_int, parse_float=_finite_float).decode


def _json_object(data: bytes) -> dict[str, Any]:
    """Read one JSON object strictly.  Raises ValueError for everything else, also for one nested too deep."""
    try:
        value = _decode(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _error_text(value: object, depth: int = 4) -> str | None:
    """The text of an `error` field, dug out where JSON sits in the text again."""
    if isinstance(value, Mapping):
        inner = value.get("error", value.get("message"))
        return _error_text(inner, depth - 1) if depth else None
    if isinstance(value, str):
        if value.lstrip().startswith("{") and depth:
            with contextlib.suppress(ValueError):
                return _error_text(_json_object(value.encode("utf-8", "replace")), depth - 1) or value
        return value
    return None if value is None else str(value)


@frozen
class _Row:
    """What an error text means: for these statuses, if one of these words is in the text (lower case)."""

    statuses: range
    words: tuple[str, ...]
    error: type[OllamaError]
    remedy: str


_SERVER = range(500, 600)
_CLIENT = range(400, 500)
_ANY = range(100, 1000)
_PULL = "Run `ollama pull {model}` where the server is, or name a model that `ollama list` shows."
_ROWS: tuple[_Row, ...] = (
    _Row(
        _SERVER,
        # The server's own list of words for out-of-memory, and its wording up to 0.24.
        (
            "out of memory",
            "out-of-memory",
            "out of device memory",
            "cudamalloc failed",
            "hipmalloc failed",
            "failed to allocate",
            "allocation failed",
            "not enough memory",
            "insufficient memory",
            "vk_error_out_of_device_memory",
            "erroroutofmemory",
            "requires more system memory",
            "unable to load full model on gpu",
        ),
        LoadOutOfMemory,
        "Free memory on the card, or choose a smaller model or a smaller num_ctx.",
    ),
    _Row(_SERVER, ("must be of type",), OllamaRequestRejected, "Correct vlm_options: an option has the wrong type."),
    _Row(_CLIENT, ("multimodal",), OllamaRequestRejected, "The model takes no images; name a vision model."),
    _Row(_ANY, ("does not support",), OllamaRequestRejected, "The model cannot do this; name another one."),
    _Row(_ANY, ("invalid format",), OllamaRequestRejected, 'Give "json" or a JSON schema as the format.'),
    _Row(_CLIENT, ("base64",), OllamaRequestRejected, "Give images as PNG or JPEG bytes, paths or PIL images."),
    _Row(_CLIENT, ("duration",), OllamaRequestRejected, "keep_alive must be a number of seconds."),
    _Row(
        range(403, 404),
        ("cloud",),
        OllamaRequestRejected,
        "Cloud models hold no memory that could be managed; name a local model.",
    ),
    _Row(range(404, 405), ("model",), ModelNotFound, _PULL),
    _Row(_ANY, ("try pulling it first",), ModelNotFound, _PULL),
    _Row(_CLIENT, ("invalid model name", "model is required"), OllamaRequestRejected, "Correct vlm_model."),
    _Row(
        _SERVER,
        ("timed out waiting for",),
        LoadFailed,
        "The load stalled; see the server's log, and raise its OLLAMA_LOAD_TIMEOUT where the disk is slow.",
    ),
    _Row(range(401, 402), ("",), OllamaRequestRejected, "Put the credentials into the URL: http://user:password@host."),
    _Row(range(408, 409), ("",), OllamaUnavailable, ""),
    _Row(range(429, 430), ("",), OllamaBusy, "Too many requests wait in the server; ask less often."),
    _Row(range(499, 500), ("",), OllamaUnavailable, "The server saw the connection close before it had answered."),
    _Row(range(501, 502), ("",), OllamaRequestRejected, "This server cannot do this; update Ollama."),
    _Row(range(502, 503), ("",), OllamaUnavailable, "Something between here and Ollama did not reach it."),
    _Row(range(503, 504), ("",), OllamaBusy, "The server's queue is full; ask less often or raise OLLAMA_MAX_QUEUE."),
    _Row(range(504, 505), ("",), OllamaUnavailable, "Something between here and Ollama did not reach it."),
    _Row(_CLIENT, ("",), OllamaRequestRejected, "The same request will fail again."),
    _Row(_SERVER, ("",), LoadFailed, "The server's log says more."),
)
"""First match wins.  Status decides before words do: the same words in a 400 and a 500 are different failures."""


@frozen(kw_only=True)
class Health:
    """How far Ollama answers, and which version it is.

    `down`: no connection, or something else answers there.  `starting`: connected, but silent.  `busy_or_wedged`: it
    answers, but its scheduler (`/api/ps`) does not, for seconds during a load and for ever with a stuck runner.
    `up` promises answers, not that a load will work.
    """

    level: Literal["down", "starting", "busy_or_wedged", "up"]
    version: str = ""
    detail: str = ""


@frozen(kw_only=True)
class PullProgress:
    """One line of a pull: what the server is doing, and how far it is with one layer."""

    status: str
    digest: str = ""
    """The layer's; empty where the line is about none."""
    total_bytes: int | None = None
    done_bytes: int = 0


# --- the client ------------------------------------------------------------------------------------------------------


class OllamaManager:
    """One model on one Ollama server: load it, unload it, ask whether it is there, run it.

    Implements `gpu_fsm.ports.VLMServer` and is usable alone.  Every method may be called from any thread; calls do not
    wait for each other.  `transport` makes the carrier of one call; `jitter` gives numbers in [0, 1) for back-off.
    """

    def __init__(
        self,
        config: GPUResourceConfig,
        *,
        clock: Clock,
        transport: Callable[[], Transport] = SocketTransport,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.model: str = config.vlm_model
        self._clock = clock
        self._make_transport = transport
        self._jitter = jitter
        self._endpoint = _Endpoint(config.ollama_url)
        self.on_our_card: bool = self._endpoint.on_this_machine and config.ollama_card == "same"
        self.simulated: bool = transport().simulated
        self._retries = config.vlm_load_retries
        self._retry_base_s = config.retry_base_s
        self._retry_cap_s = config.retry_cap_s
        self._observe_timeout_s = config.observe_timeout_s
        self._canonical = canonical_name(self.model)
        if self._canonical.endswith((":cloud", "-cloud")):
            raise ConfigError(
                name="vlm_model",
                value=one_line(self.model),
                bound="a local model",
                remedy="Cloud models hold no memory that could be managed.",
            )
        try:
            # One frozen text for every call: other options on the next call would reload the model.
            self._options = json.dumps(dict(config.vlm_options), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as problem:
            raise ConfigError(name="vlm_options", detail=f"not plain JSON: {one_line(problem)}") from None
        # On loopback the environment's proxies would send screenshots away and back, or nowhere.
        self._proxies: dict[str, str] = {} if self._endpoint.on_this_machine else get_environ_proxies(self.url)
        self._verify: bool | str = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        self._gets = {path: self._endpoint.request("GET", path) for path in ("/api/ps", "/api/tags", "/api/version")}
        self._digest = ""
        self._sight_of: tuple[str, Answer] = ("", Answer.UNKNOWN)
        self._digest_asked_at: float | None = None
        self._lock = threading.Lock()
        self._in_flight: set[Transport] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<OllamaManager {self.model} at {self.url}>"

    @property
    def url(self) -> str:
        """The server's address, without credentials."""
        return self._endpoint.url

    # -- asking; never raises

    def residency(self, timeout_s: float) -> Residency:
        """Ask `/api/ps` whether the model is resident.  An answer that did not come in time is UNKNOWN, not NO."""
        try:
            deadline = self._deadline(timeout_s)
            listed = self._listed(self._control("/api/ps", deadline), self._model_entry)
            ours = self._ours(listed)
            if ours is None and listed:
                # Listed under another tag of the same blob?  Only the digest can tell.
                self._learn_digest(deadline)
                ours = self._ours(listed)
            if ours is not None and not self._digest:
                self._digest = ours.digest  # as good as the catalogue's, and there where that one does not answer
        except GPUFSMError as error:
            refused = isinstance(error, OllamaUnavailable) and _has_cause(error.__cause__, ConnectionRefusedError)
            return Residency(refused=refused, detail=one_line(error.summary()), at=self._clock.monotonic())
        return Residency(
            answer=Answer.NO if ours is None else Answer.YES,
            ours=ours,
            others=tuple(model for model in listed if model is not ours),
            at=self._clock.monotonic(),
        )

    def is_model_loaded(self, timeout_s: float) -> Answer:
        """Is the model resident?  Says nothing about whether its runner still lives: only a request shows that."""
        return self.residency(timeout_s).answer

    def catalog(self, timeout_s: float) -> Catalog:
        """Ask `/api/tags` whether the model is on the server's disk, how big it is and whether it takes images."""
        try:
            deadline = self._deadline(timeout_s)
            disk, found = self._on_disk(deadline)
            if disk is None:
                return Catalog(present=Answer.NO, detail=f"{self.model} is not on the server")
            if found.get("remote_host") or found.get("remote_model"):
                return Catalog(present=Answer.NO, detail=f"{self.model} is a cloud model; it holds no memory here")
        except GPUFSMError as error:
            return Catalog(detail=one_line(error.summary()))
        return Catalog(
            present=Answer.YES,
            size_mib=disk.size_mib or None,
            digest=disk.digest,
            vision=self._sight(disk.digest, found.get("capabilities"), deadline),
        )

    def _on_disk(self, deadline: float) -> tuple[LoadedModel | None, Mapping[str, Any]]:
        """Look the model up in `/api/tags`: our reading of its entry, and the entry."""
        entries = self._listed(self._control("/api/tags", deadline), lambda entry: (self._model_entry(entry), entry))
        ours = (pair for pair in entries if canonical_name(pair[0].name) == self._canonical)
        disk, found = next(ours, (None, {}))
        if disk is not None:
            self._digest = disk.digest
        return disk, found

    def _sight(self, digest: str, capabilities: object, deadline: float) -> Answer:
        """Whether the model takes images: `/api/tags` says so in recent versions, `/api/show` since 0.6.4."""
        if not isinstance(capabilities, list):
            if digest and self._sight_of[0] == digest:
                return self._sight_of[1]
            try:
                capabilities = self._control("/api/show", deadline, {"model": self.model}).get("capabilities")
            except GPUFSMError:
                return Answer.UNKNOWN
        if not isinstance(capabilities, list) or not capabilities:
            return Answer.UNKNOWN  # older still: not told is not a no
        answer = Answer.YES if "vision" in capabilities else Answer.NO
        self._sight_of = (digest, answer)
        return answer

    def health(self, timeout_s: float) -> Health:
        """Ask how far the server answers, within `timeout_s` for all."""
        version = ""
        try:
            start, deadline = self._clock.monotonic(), self._deadline(timeout_s)
            said = self._control("/api/version", start + (deadline - start) / 2).get("version")
            version = self._shown(said, 64) if isinstance(said, str) else ""
            if not version:
                return Health(level="down", detail="something that is not Ollama answers there")
            self._listed(self._control("/api/ps", deadline), self._model_entry)
        except OllamaTimeout as error:
            level: Literal["starting", "busy_or_wedged"] = "busy_or_wedged" if version else "starting"
            return Health(level=level, version=version, detail=one_line(error.summary()))
        except GPUFSMError as error:
            level_now: Literal["down", "busy_or_wedged"] = "busy_or_wedged" if version else "down"
            return Health(level=level_now, version=version, detail=one_line(error.summary()))
        return Health(level="up", version=version)

    # -- acting

    def load_model(
        self,
        *,
        keep_alive_s: float,
        deadline_s: float,
        interrupt: Interrupt | None = None,
        before_retry: Callable[[], None] = lambda: None,
    ) -> LoadReport:
        """Load the model and return when it is ready: the load's own answer and `/api/ps` agree.

        One try and at most `vlm_load_retries` more, for failures that another try may mend, all within `deadline_s`
        seconds of the clock.  Out-of-memory is tried once more, after `before_retry`.  A partial offload is no error
        here; the report carries both sizes.  Raises `ModelNotFound` at the first try, `LoadOutOfMemory`, `LoadTimeout`,
        `LoadAborted`, or what else the last try met, with `attempts` and `elapsed_s`.
        """
        keep_alive = _keep_alive(keep_alive_s)
        interrupt = interrupt or Interrupt()
        started = self._clock.monotonic()
        deadline = self._deadline(deadline_s)
        attempts = memory_failures = 0
        while True:
            attempts += 1
            try:
                model = self._load_once(keep_alive, deadline, interrupt)
            except OllamaError as error:
                error.attempts = attempts
                error.elapsed_s = self._clock.monotonic() - started
                memory_failures += isinstance(error, LoadOutOfMemory)
                if not error.retryable or attempts > self._retries or memory_failures > 1:
                    raise
                pause_s = min(self._retry_cap_s, self._retry_base_s * 2 ** (attempts - 1)) * (1 - self._jitter() / 2)
                if self._clock.monotonic() + pause_s >= deadline:
                    raise
                failure = error
            else:
                return LoadReport(model=model, attempts=attempts, elapsed_s=self._clock.monotonic() - started)
            _log.info("load of %s failed, trying again in %.1f s: %s", self.model, pause_s, failure.summary())
            self._nap(pause_s, interrupt, attempts, started)
            before_retry()
            if self._clock.monotonic() >= deadline:
                raise failure

    def unload_model(self, *, timeout_s: float) -> None:
        """Ask for the unload, once.  Returning means accepted: the model may still be there, ask `residency`.

        404 counts as accepted: a model deleted while it was loaded answers so, and only `/api/ps` can tell.  An unload
        sent while that model is loading is lost without a sign.
        """
        body = {"model": self.model, "keep_alive": 0, "stream": False}
        with contextlib.suppress(ModelNotFound):
            self._control("/api/generate", self._deadline(timeout_s), body)

    def renew(self, *, keep_alive_s: float, timeout_s: float) -> None:
        """Extend the server's own timer.  Ask `residency` right before: on an absent model this would be a load."""
        self._touch(_keep_alive(keep_alive_s), self._deadline(timeout_s), lambda _: contextlib.nullcontext())

    def generate(
        self,
        prompt: str,
        *,
        images: Sequence[object] = (),
        format: Mapping[str, Any] | str | None = None,  # noqa: A002 - Ollama's word
        keep_alive_s: float,
        timeout_s: float,
        stream: bool = False,
    ) -> Iterator[Completion]:
        """Run the model on a prompt and images (PNG, JPEG or WebP bytes, paths, PIL images).

        Arguments are checked now, the request is sent when the iterator is first asked.  `timeout_s` is for the whole
        answer.  Closing the iterator closes the connection, which ends the work in the server.
        """
        if not isinstance(prompt, str) or not prompt:
            raise BadArgument(detail="the prompt is empty", remedy="An empty prompt would only load the model.")
        body: dict[str, Any] = {"prompt": prompt}
        if images:
            body["images"] = [_encode_image(image) for image in images]
        return self._infer("/api/generate", body, format, keep_alive_s, timeout_s, stream=stream)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        format: Mapping[str, Any] | str | None = None,  # noqa: A002 - Ollama's word
        keep_alive_s: float,
        timeout_s: float,
        stream: bool = False,
    ) -> Iterator[Completion]:
        """Run the model on a conversation; each message has `role`, `content`, perhaps `images`.  As `generate`."""
        sent = []
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise BadArgument(detail="a message is not a mapping with a role", remedy='Give {"role": "user", ...}.')
            copy = dict(message)
            if copy.get("images"):
                copy["images"] = [_encode_image(image) for image in copy["images"]]
            sent.append(copy)
        if not sent:
            raise BadArgument(detail="there are no messages", remedy="An empty conversation would only load the model.")
        return self._infer("/api/chat", {"messages": sent}, format, keep_alive_s, timeout_s, stream=stream)

    # -- fetching

    def pull(self, *, timeout_s: float = 86_400.0) -> Generator[PullProgress, None, None]:
        """Have the server fetch the model from its registry; yields what it says meanwhile and ends when it is there.

        Closing the iterator ends the fetching; the next pull goes on from there.  Raises `ModelNotFound` where the
        registry has no such model, `OllamaUnavailable` where the server cannot reach it, and what a call may raise.
        """
        deadline = self._deadline(timeout_s)
        request = self._endpoint.request("POST", "/api/pull", {"model": self.model, "stream": True})
        with self._call(request, deadline, limit=_ANSWER_LIMIT) as (response, transport):
            self._require_ok(response, transport, deadline)
            for line in self._lines(response, transport, deadline):
                try:
                    answer = self._object(line, response)
                except OllamaError as error:
                    raise self._pull_error(error) from error
                status, digest = answer.get("status"), answer.get("digest", "")
                if not isinstance(status, str) or not isinstance(digest, str):
                    raise self._error(OllamaProtocolError, "the answer is no progress of a pull", status=200)
                total = self._number(answer, "total", _MOST_BYTES)
                done = self._number(answer, "completed", _MOST_BYTES)
                yield PullProgress(
                    status=self._shown(status, 80),
                    digest=one_line(digest, 80),
                    total_bytes=total or None,
                    done_bytes=done,
                )
                if status == "success":
                    return
            self._raise_if_over(transport)
            raise self._error(OllamaProtocolError, "the pull ended without success", status=200)

    def _pull_error(self, error: OllamaError) -> OllamaError:
        text = error.text
        if "file does not exist" in text or "not found" in text:
            remedy = "Check the name: Ollama's library lists what there is."
            return self._error(ModelNotFound, f"the registry has no {self.model}", text=text, remedy=remedy)
        if "pull model manifest" in text or "dial tcp" in text or "max retries exceeded" in text:
            remedy = "Check the network of the machine that Ollama runs on, and pull again: it goes on from there."
            return self._error(OllamaUnavailable, "Ollama cannot reach its registry", text=text, remedy=remedy)
        return error

    def close(self) -> None:
        """Drop every connection, in flight or not; send nothing.  Later calls raise `ManagerClosed` or are UNKNOWN."""
        with self._lock:
            self._closed = True
            in_flight = tuple(self._in_flight)
        for transport in in_flight:
            transport.abort()

    # -- loading

    def _load_once(self, keep_alive: float, deadline: float, interrupt: Interrupt) -> LoadedModel | None:
        try:
            if interrupt.is_set():
                raise self._error(LoadAborted, "the load was given up before it was sent")
            self._touch(keep_alive, deadline, lambda transport: interrupt.calling(transport.abort))
        except LoadAborted:
            raise
        except OllamaError as error:
            if interrupt.is_set():
                raise self._error(LoadAborted, "the load was given up") from error
            if isinstance(error, OllamaTimeout) and self._clock.monotonic() >= deadline - _NAP_S:
                raise self._error(
                    LoadTimeout,
                    "the load did not end in time",
                    remedy="Look at the server's log; raise vlm_load_deadline_s where the disk is slow.",
                ) from error
            raise
        # From here on the model is loaded, so an interrupt changes nothing: whoever set it must unload.
        left = deadline - self._clock.monotonic()
        seen = self.residency(max(0.0, min(left, self._observe_timeout_s)))
        if seen.answer is Answer.NO:
            raise self._error(
                LoadFailed,
                "Ollama reported the load as done, but does not list the model",
                remedy="Another client may have evicted it at once; see the server's log.",
            )
        return seen.ours

    def _touch(
        self,
        keep_alive: float,
        deadline: float,
        guard: Callable[[Transport], contextlib.AbstractContextManager[None]],
    ) -> None:
        """Send the request without a prompt that loads the model, or re-arms its timer where it is loaded."""
        body = {
            "model": self.model,
            "keep_alive": keep_alive,
            "stream": False,
            "options": json.loads(self._options),
        }
        answer = self._control("/api/generate", deadline, body, guard)
        if answer.get("done") is not True:
            raise self._error(OllamaProtocolError, "the load was answered without done", status=200)
        if answer.get("done_reason") not in ("load", "", None):
            said = self._shown(answer["done_reason"], 40)
            raise self._error(LoadFailed, f"the load ended as {said!r}", status=200)

    def _nap(self, seconds: float, interrupt: Interrupt, attempts: int, started: float) -> None:
        """Sleep in slices, so that an interrupt is seen soon; closing nothing, since nothing is in flight."""
        until = self._clock.monotonic() + seconds
        while (left := until - self._clock.monotonic()) > 0 and not interrupt.is_set():
            self._clock.sleep(min(_NAP_S, left))
        if interrupt.is_set():
            error = self._error(LoadAborted, "the load was given up between two tries")
            error.attempts, error.elapsed_s = attempts, self._clock.monotonic() - started
            raise error

    # -- running

    def _infer(
        self,
        path: str,
        body: dict[str, Any],
        wanted_format: Mapping[str, Any] | str | None,
        keep_alive_s: float,
        timeout_s: float,
        *,
        stream: bool,
    ) -> Iterator[Completion]:
        body["model"] = self.model
        body["stream"] = stream
        body["keep_alive"] = _keep_alive(keep_alive_s)
        body["options"] = json.loads(self._options)
        if wanted_format is not None:
            body["format"] = dict(wanted_format) if isinstance(wanted_format, Mapping) else wanted_format
        _check_timeout(timeout_s)
        try:
            request = self._endpoint.request("POST", path, body)
        except (TypeError, ValueError, RecursionError) as problem:
            raise BadArgument(detail=f"the request is not plain JSON: {one_line(problem)}") from None
        return self._completions(request, timeout_s, stream=stream)

    def _completions(
        self, request: requests.PreparedRequest, timeout_s: float, *, stream: bool
    ) -> Iterator[Completion]:
        deadline = self._deadline(timeout_s)
        limit = _ANSWER_LIMIT if stream else _LINE_LIMIT
        with self._call(request, deadline, limit=limit) as (response, transport):
            self._require_ok(response, transport, deadline)
            for line in self._lines(response, transport, deadline) if stream else self._whole(response, deadline):
                answer = self._object(line, response)
                part = self._completion(answer)
                if part.done or stream:
                    yield part
                if part.done:
                    return
            # The server ends a stream so, too, after the same token came too often.
            self._raise_if_over(transport)
            raise self._error(
                OllamaProtocolError,
                "the answer ended without its last part",
                status=200,
                remedy="Ask again; a model that repeats itself without end is cut off like this by Ollama.",
            )

    def _whole(self, response: requests.Response, deadline: float) -> Iterator[bytes]:
        yield b"".join(self._body(response, deadline, _LINE_LIMIT))

    def _lines(self, response: requests.Response, transport: Transport, deadline: float) -> Iterator[bytes]:
        pending = bytearray()
        for chunk in self._body(response, deadline, _ANSWER_LIMIT):
            *lines, rest = chunk.split(b"\n")
            for line in lines:
                pending += line
                if pending.strip():
                    yield bytes(pending)
                pending.clear()
            pending += rest
            if len(pending) > _LINE_LIMIT:
                raise self._error(OllamaProtocolError, "a line of the stream is too long", status=200)
        self._raise_if_over(transport)
        if pending.strip():
            yield bytes(pending)

    def _completion(self, answer: Mapping[str, Any]) -> Completion:
        message = answer.get("message")
        text = message.get("content") if isinstance(message, Mapping) else answer.get("response")
        text = "" if text is None else text  # a part may hold only thinking or a tool call
        done, reason = answer.get("done"), answer.get("done_reason")
        reason = "" if reason is None else reason
        if not isinstance(text, str) or not isinstance(done, bool) or not isinstance(reason, str):
            raise self._error(OllamaProtocolError, "the answer is not a completion", status=200)
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise self._error(OllamaProtocolError, "the answer holds half a character", status=200)
        if done and reason in ("load", "unload"):
            raise self._error(
                OllamaProtocolError,
                "Ollama found nothing to answer in the request",
                status=200,
                remedy="Give it a prompt, or a message of the user's.",
            )
        total, load = self._optional(answer, "total_duration"), self._optional(answer, "load_duration")
        return Completion(
            text=text,
            done=done,
            done_reason=reason,
            prompt_tokens=self._optional(answer, "prompt_eval_count"),
            output_tokens=self._optional(answer, "eval_count"),
            total_s=None if total is None else total / 1e9,
            load_s=None if load is None else load / 1e9,
            raw=answer,
        )

    # -- one call

    def _deadline(self, timeout_s: float) -> float:
        _check_timeout(timeout_s)
        return self._clock.monotonic() + timeout_s

    def _control(
        self,
        path: str,
        deadline: float,
        body: Mapping[str, Any] | None = None,
        guard: Callable[[Transport], contextlib.AbstractContextManager[None]] = lambda _: contextlib.nullcontext(),
    ) -> dict[str, Any]:
        """Make a call whose answer is one small JSON object."""
        request = self._gets[path] if body is None else self._endpoint.request("POST", path, body)
        with self._call(request, deadline, guard) as (response, transport):
            self._require_ok(response, transport, deadline)
            data = b"".join(self._body(response, deadline, _CONTROL_LIMIT))
            self._raise_if_over(transport)
            return self._object(data, response)

    @contextlib.contextmanager
    def _call(
        self,
        request: requests.PreparedRequest,
        deadline: float,
        guard: Callable[[Transport], contextlib.AbstractContextManager[None]] = lambda _: contextlib.nullcontext(),
        limit: int = _CONTROL_LIMIT,
    ) -> Iterator[tuple[requests.Response, Transport]]:
        """Send a request on a connection of its own; translate what goes wrong, in the body of the block too.

        The transport is used without a `requests.Session`: redirects, cookies, netrc and environment, which is what a
        session adds, are all things that must not happen here.
        """
        transport = self._make_transport()
        transport.limit = limit + limit // 4 + _HEAD_LIMIT
        with self._lock:
            if self._closed:
                raise ManagerClosed(detail="the connection to Ollama was closed")
            self._in_flight.add(transport)
        response: requests.Response | None = None
        try:
            with guard(transport):
                left = deadline - self._clock.monotonic()
                if left <= 0:
                    raise self._error(OllamaTimeout, "no time left for the call")
                response = transport.send(
                    request,
                    stream=True,
                    timeout=min(left, threading.TIMEOUT_MAX),
                    verify=self._verify,
                    cert=None,
                    proxies=self._proxies,
                )
                yield response, transport
        except OllamaError:
            self._raise_if_over(transport)
            raise
        except _FOREIGN as problem:
            self._endpoint.clean(problem)
            raise self._translated(problem, transport, deadline) from problem
        finally:
            if response is not None:
                response.close()
            transport.close()
            with self._lock:
                self._in_flight.discard(transport)

    def _body(self, response: requests.Response, deadline: float, limit: int) -> Iterator[bytes]:
        if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise self._error(OllamaProtocolError, "the answer is compressed", status=response.status_code)
        size = 0
        for chunk in response.iter_content(_CHUNK):
            size += len(chunk)
            if size > limit:
                raise self._error(
                    OllamaProtocolError, f"the answer is longer than {limit} bytes", status=response.status_code
                )
            if self._clock.monotonic() > deadline:
                raise self._error(OllamaTimeout, "the answer did not end in time")
            yield chunk

    def _object(self, data: bytes, response: requests.Response) -> dict[str, Any]:
        """Read a body (or a line) that must be a JSON object, and raise the error that it may hold."""
        answer: dict[str, Any] = {}
        broken = ""
        try:
            answer = _json_object(data)
        except ValueError as problem:
            broken = str(problem) or "no JSON"
        if broken:  # raised out here, since Python's error would bring the whole body along
            raise self._foreign_answer(response, data, broken)
        if answer.get("error") is not None:
            raise self._server_error(response.status_code, _error_text(answer) or "")
        return answer

    def _require_ok(self, response: requests.Response, transport: Transport, deadline: float) -> None:
        status = response.status_code
        if status == 200:
            return
        if status in (301, 302, 303, 307, 308):
            where = self._shown(response.headers.get("Location", ""), 100)
            raise self._error(
                OllamaProtocolError,
                f"redirected to {where!r}, which is not followed",
                status=status,
                remedy="Set ollama_url to where Ollama itself listens.",
            )
        # Of an error only its beginning is wanted, and it is an error however its body ends.
        begun = bytearray()
        with contextlib.suppress(*_FOREIGN):
            for chunk in self._body(response, deadline, _CONTROL_LIMIT):
                begun += chunk
        self._raise_if_over(transport)
        data = bytes(begun)
        try:
            text = _error_text(_json_object(data))
        except ValueError:
            text = None
        if text is not None and status >= 400:
            raise self._server_error(status, text)
        raise self._foreign_answer(response, data, "")

    # -- errors

    def _error(self, kind: type[_E], detail: str, *, status: int | None = None, text: str = "", remedy: str = "") -> _E:
        return kind(
            detail=one_line(self._endpoint.hide(detail)),
            remedy=remedy,
            url=self.url,
            model=self.model,
            status=status,
            text=one_line(self._endpoint.hide(text)),
        )

    def _shown(self, text: object, limit: int) -> str:
        """Text of the server's for people.  Hidden before it is cut, or half a password could be left at the cut."""
        return one_line(self._endpoint.hide(str(text)), limit)

    def _server_error(self, status: int, text: str) -> OllamaError:
        """Turn Ollama's own error into ours.  An error inside a 200 is judged as the 500 it could no longer become."""
        judged, folded = (500 if status < 400 else status), text.casefold()
        for row in _ROWS:
            if judged in row.statuses and any(word in folded for word in row.words):
                remedy = row.remedy.format(model=self.model)
                return self._error(row.error, "", status=status, text=text, remedy=remedy)
        return self._error(OllamaProtocolError, "an unknown status", status=status, text=text)

    def _foreign_answer(self, response: requests.Response, data: bytes, problem: str) -> OllamaError:
        """Turn an answer that is not JSON into an error: Ollama has three of these, everything else is not Ollama."""
        status, text = response.status_code, self._shown(data.decode("utf-8", "replace").strip(), 400)
        kind = self._endpoint.hide(response.headers.get("Content-Type", "")).partition(";")[0].strip().lower()
        if status == 403 and not data:
            return self._error(
                OllamaRequestRejected,
                "Ollama refuses the host name it was called by",
                status=status,
                remedy="Call it by localhost or by its address, or set OLLAMA_HOST where the server runs.",
            )
        if status in (404, 405) and kind in ("text/plain", ""):
            return self._error(
                OllamaRequestRejected,
                "the server has no such route",
                status=status,
                text=text,
                remedy="Check that ollama_url leads to Ollama, with the right path, and that Ollama is not too old.",
            )
        if status == 401:
            return self._error(
                OllamaRequestRejected,
                "credentials are asked for",
                status=status,
                remedy="Put them into the URL: http://user:password@host.",
            )
        said = f" ({problem})" if problem else ""
        what = "broken JSON" if kind in (_JSON, "application/x-ndjson") else one_line(kind or "no content type", 60)
        return self._error(
            OllamaProtocolError,
            f"not an answer of Ollama's: {what}{said}",
            status=status,
            text=text,
            remedy="Check that nothing but Ollama answers at this address (a proxy, another program).",
        )

    def _translated(self, problem: BaseException, transport: Transport, deadline: float) -> GPUFSMError:
        """Turn an exception of `requests` and below into ours."""
        if self._closed:
            return ManagerClosed(detail="the connection to Ollama was closed")
        if isinstance(problem, requests.ConnectTimeout):
            return self._error(
                OllamaUnavailable, "no connection in time", remedy="Check that the server is up and its address right."
            )
        over = transport.expired or self._clock.monotonic() >= deadline
        if over or _has_cause(problem, requests.Timeout, ReadTimeoutError, TimeoutError):
            return self._error(OllamaTimeout, "no whole answer in time")
        if _has_cause(problem, ConnectionRefusedError):
            return self._error(
                OllamaUnavailable, "connection refused", remedy="Start Ollama (`ollama serve`), or correct ollama_url."
            )
        said = _innermost(problem)
        if _has_cause(problem, _TooLong):
            return self._error(OllamaProtocolError, f"the answer is longer than {transport.limit} bytes")
        if _has_cause(problem, requests.exceptions.SSLError, urllib3.exceptions.SSLError):
            return self._error(
                OllamaUnavailable,
                "the server's certificate is not trusted",
                text=said,
                remedy="Name its authority's file in REQUESTS_CA_BUNDLE.",
            )
        # Below `requests`, every broken connection is one of Python's own ConnectionErrors.
        broken = _has_cause(problem, ConnectionError)
        if not broken and isinstance(problem, requests.exceptions.ChunkedEncodingError):
            return self._error(OllamaProtocolError, "the answer was cut short", text=said)
        connecting = isinstance(problem, OSError) and not isinstance(problem, requests.RequestException)
        connecting = connecting or isinstance(problem, requests.ConnectionError)
        if broken or (connecting and not _has_cause(problem, http.client.HTTPException)):
            return self._error(OllamaUnavailable, "the connection broke", text=said)
        return self._error(OllamaProtocolError, "not an HTTP answer", text=said)

    def _raise_if_over(self, transport: Transport) -> None:
        """An abort looks like the end of a body to the reader; say what it was."""
        if self._closed:
            raise ManagerClosed(detail="the connection to Ollama was closed")
        if transport.expired:
            raise self._error(OllamaTimeout, "no whole answer in time")

    # -- fields of answers

    def _listed(self, answer: Mapping[str, Any], read: Callable[[Mapping[str, Any]], _T]) -> list[_T]:
        entries = answer.get("models")
        if entries is None and "models" in answer:
            return []  # Go's way to write an empty list
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise self._error(OllamaProtocolError, "no list of models in the answer", status=200)
        if len(entries) > _MODELS_LIMIT:
            raise self._error(OllamaProtocolError, f"more than {_MODELS_LIMIT} models in the answer", status=200)
        return [read(entry) for entry in entries]

    def _model_entry(self, entry: Mapping[str, Any]) -> LoadedModel:
        name, digest = self._name_and_digest(entry)
        expires = entry.get("expires_at", "")
        expires = self._shown(expires, 64) if isinstance(expires, str) else ""
        year = re.match(r"([0-9]{4,6})-", expires)
        return LoadedModel(
            name=name,
            digest=digest,
            size_mib=self._number(entry, "size", _MOST_BYTES) / _MIB,
            size_vram_mib=self._number(entry, "size_vram", _MOST_BYTES) / _MIB,
            expires_at=expires,
            forever=year is not None and int(year[1]) >= _FOREVER_YEAR,
        )

    def _name_and_digest(self, entry: Mapping[str, Any]) -> tuple[str, str]:
        name, digest = entry.get("name") or entry.get("model"), entry.get("digest", "")
        if not isinstance(name, str) or not name or len(name) > _NAME_LIMIT or not name.isprintable():
            raise self._error(OllamaProtocolError, "a model without a proper name in the answer", status=200)
        digest = digest.removeprefix("sha256:") if isinstance(digest, str) else ""
        name = self._endpoint.hide(name)
        return name, digest if re.fullmatch(r"[0-9a-f]{12,64}", digest) else ""

    def _number(self, answer: Mapping[str, Any], key: str, most: int) -> int:
        value = answer.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise self._error(OllamaProtocolError, f"{key} in the answer is not a possible number", status=200)
        return value

    def _optional(self, answer: Mapping[str, Any], key: str) -> int | None:
        return None if answer.get(key) is None else self._number(answer, key, _MOST_NS)

    def _ours(self, listed: Sequence[LoadedModel]) -> LoadedModel | None:
        by_digest = (model for model in listed if self._digest and model.digest == self._digest)
        by_name = (model for model in listed if canonical_name(model.name) == self._canonical)
        return next(by_digest, None) or next(by_name, None)

    def _learn_digest(self, deadline: float) -> None:
        """Ask for the model's digest, at most once a minute; without one, names decide."""
        now = self._clock.monotonic()
        if self._digest or (self._digest_asked_at is not None and now - self._digest_asked_at < 60.0):
            return
        self._digest_asked_at = now
        if deadline > now:
            with contextlib.suppress(GPUFSMError):
                self._on_disk(deadline)


# --- small things ----------------------------------------------------------------------------------------------------


def _check_timeout(timeout_s: float) -> None:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 <= timeout_s < math.inf:
        raise BadArgument(detail=f"timeout_s is {one_line(timeout_s, 40)}, not a number of seconds from 0 up")


def _keep_alive(seconds: float) -> float:
    """Check a keep_alive: a number, since text without a unit is refused; finite and above 0, since 0 unloads."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= _LONGEST_KEEP_ALIVE_S:
        raise BadArgument(
            detail=f"keep_alive_s is {one_line(seconds, 40)}, not a number of seconds above 0 and up to 1e9",
            remedy="A lease on the server must end; use unload_model to end it now.",
        )
    return int(seconds) if float(seconds).is_integer() else float(seconds)


def _encode_image(image: object) -> str:
    """Turn PNG, JPEG or WebP bytes, a path to them or a PIL image into base64 text."""
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        try:
            if not path.is_file():
                raise FileNotFoundError(2, "there is no such file")
            data = path.read_bytes()
        except (OSError, ValueError) as problem:
            said = problem.strerror if isinstance(problem, OSError) else problem
            raise BadArgument(detail=f"the image {one_line(path)} cannot be read: {one_line(said)}") from None
    elif isinstance(image, bytes | bytearray | memoryview):
        data = bytes(image)
    elif callable(save := getattr(image, "save", None)):
        data = _png_bytes(image, save)
    else:
        raise BadArgument(
            detail=f"{type(image).__name__} is not an image", remedy="Give PNG or JPEG bytes, a path or a PIL image."
        )
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    if not (data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or webp):
        raise BadArgument(detail="the bytes are not an image that Ollama takes", remedy="Give PNG, JPEG or WebP.")
    return base64.b64encode(data).decode()


def _png_bytes(image: object, save: Callable[..., Any]) -> bytes:
    out = io.BytesIO()
    try:
        save(out, format="PNG")
    except (OSError, ValueError, TypeError):
        # CMYK, float and a few other modes have no PNG form.
        out = io.BytesIO()
        try:
            image.convert("RGB").save(out, format="PNG")  # type: ignore[attr-defined]
        except (OSError, ValueError, TypeError, AttributeError) as problem:
            raise BadArgument(detail=f"the image cannot be written as PNG: {one_line(problem)}") from None
    return out.getvalue()


def _causes(problem: object) -> Iterator[BaseException]:
    """Walk an exception, what it was raised from and what it carries.  Not `__context__`: that may be the caller's."""
    waiting, seen = [problem], 0
    while waiting and seen < 24:
        thing = waiting.pop(0)
        if isinstance(thing, BaseException):
            seen += 1
            yield thing
            waiting += [*thing.args, getattr(thing, "reason", None), thing.__cause__]


def _has_cause(problem: object, *kinds: type[BaseException]) -> bool:
    return any(isinstance(cause, kinds) for cause in _causes(problem))


def _innermost(problem: BaseException) -> str:
    """The text nearest to what happened: the outer ones only repeat it with addresses of objects."""
    *_, last = _causes(problem)
    return str(last) or type(last).__name__


__all__ = ["Health", "OllamaManager", "PullProgress", "SocketTransport", "Transport", "canonical_name"]
