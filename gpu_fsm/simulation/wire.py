"""What goes over the wire: one request and its answer as it comes, and the words both sides use."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
import math
import re
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

FOREVER = math.inf
"""A keep_alive without end (any negative value)."""
AT_ONCE = -1.0
"""A keep_alive that is over as soon as the load is: what overflows 64-bit nanoseconds."""

_MAX_NS = 2**63 - 1
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+\.?\d*|\.\d+)([^\d.]*)")


class Refusal(Exception):
    """An error answer: HTTP status and the text of `{"error": ...}`."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Exchange:
    """One request on its way through the server, and its answer as far as it has come.

    The server calls `answer`, or `begin`, `push` and `finish`, or `snap`; a front reads `status`, `headers`, `chunks`,
    `finished`, `broken` and calls `leave` when its client has gone.  All of it under the clock's `turn`.
    """

    __slots__ = (
        "body",
        "broken",
        "chunks",
        "client",
        "finished",
        "headers",
        "left",
        "length",
        "method",
        "note",
        "on_leave",
        "path",
        "request_headers",
        "status",
        "wake",
    )

    def __init__(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, client: str = "us"
    ) -> None:
        self.method = method
        self.path = path
        self.body = body
        self.request_headers: Mapping[str, str] = headers or {}
        self.client = client
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.chunks: deque[bytes] = deque()
        self.length: int | None = None
        """Content-Length, or None for a chunked answer."""
        self.finished = False
        self.broken = False
        """The connection was cut by the server."""
        self.left = False
        """The client closed its side."""
        self.on_leave: Callable[[], None] | None = None
        self.wake: Callable[[], None] | None = None
        self.note: Callable[[str], None] | None = None

    @property
    def closed(self) -> bool:
        """Nothing more will come of it."""
        return self.finished or self.broken or self.left

    def answer(self, status: int, body: bytes, content_type: str, *, length: int | None = None) -> None:
        """The whole answer; `length` lies about its size (a truncated body)."""
        if self.closed:
            return
        self.status = status
        self.length = len(body) if length is None else length
        if content_type:
            self.headers["Content-Type"] = content_type
        self.headers["Content-Length"] = str(self.length)
        if self.method != "HEAD" and body:
            self.chunks.append(body)
        if length is not None and length > len(body):
            self.broken = True
        self._end("" if status < 400 else f"HTTP {status}")

    def json(self, status: int, value: Any, *, content_type: str = "application/json; charset=utf-8") -> None:
        """The whole answer, as JSON."""
        self.answer(status, dumps(value), content_type)

    def begin(self, status: int, content_type: str) -> None:
        """The head of a chunked answer."""
        if self.closed:
            return
        self.status = status
        self.headers["Content-Type"] = content_type
        self.headers["Transfer-Encoding"] = "chunked"
        self._stir()

    def push(self, data: bytes) -> None:
        """A part of a chunked answer."""
        if not self.closed:
            self.chunks.append(data)
            self._stir()

    def finish(self, outcome: str = "") -> None:
        """The regular end of a chunked answer."""
        if not self.closed:
            self._end(outcome)

    def snap(self, why: str = "connection cut") -> None:
        """Cut the connection in the middle of whatever it was."""
        if not self.closed:
            self.broken = True
            self._end(why, finished=False)

    def leave(self) -> None:
        """The client has closed its side."""
        if self.closed:
            return
        self.left = True
        callback, self.on_leave = self.on_leave, None
        if callback is not None:
            callback()
        self._tell("client left")

    def _end(self, outcome: str, *, finished: bool = True) -> None:
        self.finished = finished
        self.on_leave = None
        self._tell(outcome or "ok")

    def _tell(self, outcome: str) -> None:
        note, self.note = self.note, None  # it knows this exchange: kept, only the garbage collector could free the two
        if note is not None:
            note(outcome)
        self._stir()

    def _stir(self) -> None:
        if self.wake is not None:
            self.wake()


def dumps(value: Any) -> bytes:
    """JSON as Go writes it: no spaces, UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")


def parse_keep_alive(value: Any) -> float | None:
    """Read a keep_alive: seconds, `FOREVER`, `AT_ONCE`, or None for "as before".  Raises `Refusal`."""
    if value is None:
        return None
    if isinstance(value, bool):
        raise Refusal(400, "Unsupported type: 'bool'")
    if isinstance(value, int | float):
        if value < 0:
            return FOREVER
        return float(value) if value * 1e9 <= _MAX_NS else AT_ONCE
    if isinstance(value, str):
        seconds = parse_go_duration(value)
        return FOREVER if seconds < 0 else seconds
    kind = "[]interface {}" if isinstance(value, list) else "map[string]interface {}"
    raise Refusal(400, f"Unsupported type: '{kind}'")


def parse_go_duration(text: str) -> float:
    """Read `10s`, `1h30m`, `-1.5h` and the like as seconds; raises `Refusal` with Go's own words."""
    quoted = json.dumps(text, ensure_ascii=False)
    rest = text[1:] if text[:1] in ("-", "+") else text
    sign = -1.0 if text.startswith("-") else 1.0
    if rest == "0":
        return 0.0
    if not rest:
        raise Refusal(400, f"time: invalid duration {quoted}")
    total, position = 0.0, 0
    while position < len(rest):
        part = _PART.match(rest, position)
        if part is None:
            raise Refusal(400, f"time: invalid duration {quoted}")
        number, unit = part.groups()
        if not unit:
            raise Refusal(400, f"time: missing unit in duration {quoted}")
        if unit not in _UNITS:
            raise Refusal(400, f"time: unknown unit {json.dumps(unit, ensure_ascii=False)} in duration {quoted}")
        total += float(number) * _UNITS[unit]
        position = part.end()
    if total * 1e9 > _MAX_NS:
        raise Refusal(400, f"time: invalid duration {quoted}")
    return sign * total


_NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def short_name(name: str) -> str:
    """The shortest form of a model's name, always with a tag; raises `Refusal` for what cannot be a name."""
    rest = name.split("://", 1)[1] if name.startswith(("http://", "https://")) else name
    head, slash, last = rest.rpartition("/")
    model, colon, tag = last.partition(":")
    tag = tag if colon else "latest"
    parts = head.split("/") if slash else []
    host = parts.pop(0) if len(parts) == 2 else "registry.ollama.ai"
    namespace = parts.pop(0) if len(parts) == 1 else "library"
    if parts or not all(_NAME_PART.fullmatch(part) for part in (namespace, model, tag)):
        raise Refusal(400, "invalid model name")
    if not re.fullmatch(r"[A-Za-z0-9_.\-\[\]]+(:\d+)?", host):
        raise Refusal(400, "invalid model name")
    short = f"{model}:{tag}"
    if namespace != "library" or host != "registry.ollama.ai":
        short = f"{namespace}/{short}"
    return short if host == "registry.ollama.ai" else f"{host}/{short}"


def timestamp(epoch_s: float, offset_ns: int) -> str:
    """RFC 3339 with nanoseconds, trailing zeros trimmed, as Go prints a time in UTC."""
    whole, nanos = divmod(int(epoch_s * 1e9) + offset_ns, 10**9)
    stamp = datetime.fromtimestamp(0, UTC).replace(tzinfo=None)
    days, rest = divmod(whole, 86400)
    stamp = datetime.fromordinal(stamp.toordinal() + days).replace(
        hour=rest // 3600, minute=rest % 3600 // 60, second=rest % 60
    )
    fraction = f".{nanos:09d}".rstrip("0") if nanos else ""
    return f"{stamp.isoformat(timespec='seconds')}{fraction}Z"


_KINDS: dict[str, type] = {"options": dict, "messages": list, "images": list, "tools": list}


def check_kinds(body: dict[str, Any]) -> None:
    """Refuse what Go cannot read into the fields of a request; raises `Refusal`."""
    for name, kind in _KINDS.items():
        value = body.get(name)
        entries = value if name in ("messages", "tools") and isinstance(value, list) else []
        wrong = [] if value is None or isinstance(value, kind) else [value]
        for bad in (*wrong, *(entry for entry in entries if not isinstance(entry, dict))):
            raise Refusal(400, f"json: cannot unmarshal {go_kind(bad)} into Go struct field Request.{name}")
        for entry in entries:
            check_kinds(entry)


def decode_images(values: Any) -> list[bytes]:
    """Read base64 images; raises `Refusal` as the server does while it reads the JSON."""
    if values is None:
        return []
    images = []
    for value in values:
        text = value if isinstance(value, str) else ""
        bad = re.search(r"[^A-Za-z0-9+/=\r\n]", text)
        if bad is not None:
            raise Refusal(400, f"illegal base64 data at input byte {bad.start()}")
        try:
            images.append(base64.b64decode(text, validate=False))
        except binascii.Error:
            raise Refusal(400, f"illegal base64 data at input byte {len(text.rstrip('='))}") from None
    return images


def fitting(schema: dict[str, Any], text: str, images: list[bytes]) -> str:
    """The plainest answer that a model held to a JSON schema could give, with `text` for every text in it.

    A number made from the first image is added, so that another picture gets another answer.
    """
    word = f"{text} {hashlib.sha256(images[0]).hexdigest()[:6]}" if images else text
    return dumps(_instance(schema, word)).decode()


def _instance(schema: Any, word: str) -> Any:
    if not isinstance(schema, dict):
        return None
    choices, properties = schema.get("enum"), schema.get("properties")
    if isinstance(choices, list) and choices:
        return choices[0]
    match schema.get("type"):
        case "object" if isinstance(properties, dict):
            return {name: _instance(inner, word) for name, inner in properties.items()}
        case "object":
            return {}
        case "array":
            return []
        case "string":
            return word
        case "integer" | "number":
            return 0
        case "boolean":
            return False
        case _:
            return None


@functools.lru_cache(maxsize=256)
def is_local_host(host: str) -> bool:
    """Whether a Host header passes the guard of a server that listens on loopback."""
    name = host.rpartition("@")[2]
    if name.startswith("["):
        return name.partition("]")[0] in ("[::1", "[::")
    name = name.partition(":")[0].casefold()
    if name in ("", "localhost") or name.endswith((".localhost", ".local", ".internal")):
        return True
    private = r"(127|10)(\.\d+){3}|0\.0\.0\.0|192\.168(\.\d+){2}|172\.(1[6-9]|2\d|3[01])(\.\d+){2}"
    return bool(re.fullmatch(private, name))


class _Echo(Exchange):
    """An exchange whose answer goes to another one, changed."""

    __slots__ = ("real",)

    def __init__(self, real: Exchange) -> None:
        super().__init__(real.method, real.path, real.body, real.request_headers, real.client)
        self.real = real
        real.on_leave = self.leave

    def _end(self, outcome: str, *, finished: bool = True) -> None:
        super()._end(outcome, finished=finished)
        self.real.on_leave = None
        self._pass_on()

    def _pass_on(self) -> None:
        raise NotImplementedError


class DeafExchange(_Echo):
    """The work is done and the connection breaks before a byte of the answer."""

    __slots__ = ()

    def _pass_on(self) -> None:
        self.real.snap()


class CutExchange(_Echo):
    """The connection breaks in the middle of the body."""

    __slots__ = ()

    def _pass_on(self) -> None:
        body = b"".join(self.chunks)
        kept = body[: len(body) // 2]
        self.real.answer(self.status or 200, kept, self.headers.get("Content-Type", ""), length=max(len(body), 1))


def read_json(data: bytes) -> tuple[Any, Refusal | None]:
    """Read a request's body: the value, or the refusal that the server answers."""
    if not data:
        return None, Refusal(400, "missing request body")
    try:
        return json.loads(data), None
    except UnicodeDecodeError:
        return None, Refusal(400, "invalid character 'ï' looking for beginning of value")
    except json.JSONDecodeError as error:
        rest = error.doc[error.pos :].strip()
        if not rest or error.msg.startswith("Unterminated"):
            return None, Refusal(400, "unexpected EOF")
        return None, Refusal(400, f"invalid character '{rest[0]}' looking for beginning of value")
    except RecursionError:
        return None, Refusal(400, "json: exceeded max depth")


def go_kind(value: Any) -> str:
    """What Go's decoder calls a JSON value."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def string_of(body: dict[str, Any], key: str, struct: str) -> str:
    """Read a text of a request, empty if absent; raises `Refusal` for another type."""
    value = body.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = go_kind(value)
        raise Refusal(400, f"json: cannot unmarshal {kind} into Go struct field {struct}.{key} of type string")
    return value


__all__ = [
    "AT_ONCE",
    "FOREVER",
    "CutExchange",
    "DeafExchange",
    "Exchange",
    "Refusal",
    "decode_images",
    "dumps",
    "fitting",
    "go_kind",
    "is_local_host",
    "parse_go_duration",
    "parse_keep_alive",
    "read_json",
    "short_name",
    "string_of",
    "timestamp",
]
