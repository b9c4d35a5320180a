"""What a request to Ollama asks of the card, read from its method, path and body.  Pure: nothing here waits or sends.

The body is read as Ollama reads it: only the first JSON value counts, keys match in any case, and of what Ollama and
Python would read differently nothing is passed on.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping
from typing import Any

from attrs import frozen

from gpu_fsm.errors import BadArgument, OllamaRequestRejected
from gpu_fsm.ollama import canonical_name

NATIVE = frozenset({"/api/generate", "/api/chat", "/api/embed", "/api/embeddings"})
"""Routes that take runner options; a keep_alive is taken by some more, and by any that is still to come."""

_UNLOADING = {"/api/generate": "prompt", "/api/chat": "messages"}
"""Routes that unload on a keep_alive of 0, and what must be empty for it."""

_NO_MODEL_RUNS = re.compile(r"/api/(show|pull|push|create|copy|delete|me|signout|blobs/.*|web_\w+|experimental/.*)")
"""Posts that may name a model and run none."""

MOST_PARTS = 1 << 20
"""Of a request's JSON: braces, brackets and commas.  A megabyte of those becomes a hundred in Python's memory."""

_SLASHES = re.compile(r"//+")

_RULED = ("keep_alive", "options")

_ZERO = re.compile(r"[+-]?(0|(0+\.?0*|\.0+)(ns|us|µs|μs|ms|s|m|h))+")


class Need(enum.Enum):
    """What a request needs before it may go on to Ollama."""

    NOTHING = "nothing"
    """Health, lists, downloads: goes on as it is and resets no timer."""
    VLM = "vlm"
    UNLOAD = "unload"
    """The client wants the VLM out, which is the manager's to do."""
    OTHER = "other"
    """Another model is to run."""


@frozen(kw_only=True)
class Ask:
    """A request as far as it matters: the need, the model's name in its own words, the body to send on."""

    need: Need
    model: str = ""
    body: bytes = b""

    @property
    def names_another(self) -> bool:
        """Whether it names a model, and not the VLM by the name that we know: it may be an alias."""
        return bool(self.model) and self.need in (Need.OTHER, Need.NOTHING)


def may_run_a_model(method: str, path: str) -> bool:
    """Whether the body has to be read before the request may go on; `path` is decoded, without the query."""
    path = _SLASHES.sub("/", path)  # as web servers in front of Ollama do
    # In any case of letters: HTTP libraries send a `post` on as POST.
    return method.upper() == "POST" and path.startswith(("/api/", "/v1/")) and not _NO_MODEL_RUNS.fullmatch(path)


def read(
    method: str, path: str, body: bytes, *, vlm: str, keep_alive_s: float, options: Mapping[str, Any], encoded: bool
) -> Ask:
    """Read a request; `vlm` is the managed model, `keep_alive_s` and `options` are what its requests carry.

    `encoded` says that the body has a Content-Encoding.  Raises `BadArgument` for a body that cannot be judged.
    """
    if not may_run_a_model(method, path):
        return Ask(need=Need.NOTHING, body=body)
    path = _SLASHES.sub("/", path)
    if encoded:
        raise BadArgument(detail="a compressed request cannot be judged", remedy="Send it without Content-Encoding.")
    asked = _object(body)
    if asked is None:
        return Ask(need=Need.NOTHING, body=body)  # Ollama refuses it itself
    name = asked.folded.get("model")
    if asked.ambiguous:
        raise BadArgument(detail="two keys of the request differ only in case, or not at all", remedy="Send one.")
    if not isinstance(name, str) or not name:
        return Ask(need=Need.NOTHING, body=body)
    if canonical_name(name) != canonical_name(vlm):
        return Ask(need=Need.NOTHING if _unloads(path, asked) else Need.OTHER, model=name, body=body)
    if _unloads(path, asked):
        return Ask(need=Need.UNLOAD, model=name, body=body)
    return Ask(need=Need.VLM, model=name, body=_ours(path, asked, body, keep_alive_s, options))


def is_alias(tags: bytes, name: str, vlm: str) -> bool:
    """Whether both names are of one model (`ollama cp`), by an answer of `/api/tags`."""
    try:
        entries = json.loads(tags)["models"]
        digests = {canonical_name(str(entry["name"])): entry["digest"] for entry in entries}
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    digest = digests.get(canonical_name(vlm))
    return bool(digest) and digests.get(canonical_name(name)) == digest


class _Object(dict[str, Any]):
    """A JSON object; `folded` has its keys in lower case, `ambiguous` tells that two of them are then the same."""

    __slots__ = ("ambiguous", "folded")

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.folded = {key.casefold(): value for key, value in pairs}
        self.ambiguous = len(self.folded) < len(pairs)


_DECODER = json.JSONDecoder()
_BLANKS = re.compile(r"[ \t\r\n]*")


def _object(body: bytes) -> _Object | None:
    """The first JSON value of a body; None where it is no object, which Ollama refuses as well."""
    if sum(map(body.count, (b"{", b"[", b","))) > MOST_PARTS:
        raise BadArgument(detail=f"the request's JSON has more than {MOST_PARTS} parts")
    try:
        pairs = _pairs(body.decode("utf-8", "replace"))
    except json.JSONDecodeError:
        return None
    except (RecursionError, ValueError):
        raise BadArgument(detail="the request's JSON is too deep or its numbers are too long") from None
    return None if pairs is None else _Object(pairs)


def _pairs(text: str) -> list[tuple[str, Any]] | None:
    """Keys and values of the object that a text begins with, those of the same name all; None where it is none."""

    def after_blanks(at: int) -> int:
        blanks = _BLANKS.match(text, at)
        return at if blanks is None else blanks.end()

    at = after_blanks(0)
    if text[at : at + 1] != "{":
        return None
    pairs: list[tuple[str, Any]] = []
    at = after_blanks(at + 1)
    while text[at : at + 1] != "}" or pairs:
        key, at = _DECODER.raw_decode(text, at)
        at = after_blanks(at)
        if not isinstance(key, str) or text[at : at + 1] != ":":
            return None
        value, at = _DECODER.raw_decode(text, after_blanks(at + 1))
        pairs.append((key, value))
        at = after_blanks(at)
        if text[at : at + 1] != ",":
            return pairs if text[at : at + 1] == "}" else None
        at = after_blanks(at + 1)
    return pairs


def _unloads(path: str, asked: _Object) -> bool:
    """A keep_alive of 0 without anything to answer: Ollama's way to say unload."""
    keep_alive = asked.folded.get("keep_alive")
    if path not in _UNLOADING or asked.folded.get(_UNLOADING[path]) or isinstance(keep_alive, bool):
        return False
    return keep_alive == 0 or (isinstance(keep_alive, str) and _ZERO.fullmatch(keep_alive) is not None)


def _ours(path: str, asked: _Object, body: bytes, keep_alive_s: float, options: Mapping[str, Any]) -> bytes:
    """The body to send on: the VLM's keep_alive is the manager's, and runner options that are not given are its too.

    Another keep_alive would pin the VLM or drop it behind the manager's back; other options would load it anew.
    """
    given = asked.folded.get("options")
    wanted: Any = given  # what is no table, Ollama refuses
    if path in NATIVE and (given is None or isinstance(given, dict)):
        wanted = {**options, **(given or {})} or given
    if "keep_alive" not in asked.folded and wanted == given:
        return body
    kept: dict[str, Any] = {key: value for key, value in asked.items() if key.casefold() not in _RULED}
    if wanted is not None:
        kept["options"] = wanted
    kept["keep_alive"] = int(keep_alive_s) if float(keep_alive_s).is_integer() else keep_alive_s
    return json.dumps(kept, separators=(",", ":")).encode()


def refused_model(name: str, vlm: str) -> OllamaRequestRejected:
    """The refusal of another model, where the policy refuses them."""
    return OllamaRequestRejected(
        detail=f"only {vlm} may run on this card",
        remedy=f"Ask for {vlm}, or let others run with other_models=pass.",
        model=name,
    )
