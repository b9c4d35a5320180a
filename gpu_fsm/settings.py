"""Settings: frozen, units in the names, each default with its reason.

`GPUResourceConfig(...)` checks every value at construction and raises `ConfigError` with the name, the value, the bound
and the source.  `load_config()` fills one from defaults, a TOML file, the environment and arguments, in rising order of
precedence.  An environment variable is `GPU_FSM_` and the name in capitals; `OLLAMA_HOST` is read as Ollama reads it
and gives way to `GPU_FSM_OLLAMA_URL`.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import logging
import math
import numbers
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, Self
from urllib.parse import SplitResult, urlsplit

import attrs
from attrs import field, frozen

from gpu_fsm.errors import ConfigError, one_line

_log = logging.getLogger("gpu_fsm")

ENV_PREFIX = "GPU_FSM_"
CONFIG_VARIABLE = "GPU_FSM_CONFIG"
"""Names the TOML file where no path is given.  No file is looked for in the current folder: a folder that somebody else
filled must not decide which server gets the screenshots."""
SECTION = "gpu-fsm"
DEFAULT_OLLAMA_URL = "http://127.0.0.1:11434"

_LONGEST_S = 4_000_000.0
"""46 days: threads cannot wait longer than 2**32 ms on every platform."""
_MOST_MIB = 16_777_216.0
"""16 TiB: no card has it, so a larger figure was meant in bytes or KiB."""


class SecretURL(str):
    """A URL that keeps its credentials and does not show them.

    The text itself is whole, so `urlsplit(url)` and comparisons see everything; `repr`, `str`, `format` and `%s` show
    `***` in the place of user and password.  Not covered, because they read the text: concatenation, `json.dumps`.
    `reveal()` gives the plain whole text, `redacted` the harmless one.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        # `str(text)` would ask another SecretURL for its text, and get the one without credentials.
        return super().__new__(cls, str.__str__(text))

    @property
    def redacted(self) -> str:
        """The URL without credentials, for people, logs and errors."""
        return _redact(self.reveal())

    def reveal(self) -> str:
        """The whole URL as a plain string, credentials included."""
        return str.__str__(self)

    def __repr__(self) -> str:
        return repr(self.redacted)

    def __str__(self) -> str:
        return self.redacted

    def __format__(self, spec: str) -> str:
        return format(self.redacted, spec)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reveal(),)


def _redact(text: str) -> str:
    """Hide what stands before the last `@`, and a URL's query; works on text that is no URL too."""
    text = re.sub(r"\A(\s*[A-Za-z][A-Za-z0-9+.-]*://)?.*@", lambda m: (m[1] or "") + "***@", text, flags=re.DOTALL)
    return re.sub(r"[?#].*", "?***", text, flags=re.DOTALL) if "://" in text else text


# --- rules: what a value must be -------------------------------------------------------------------------------------


class _Wrong(Exception):
    """A rule refuses a value: what it must be, perhaps why and how to mend it.  Never leaves this module."""

    def __init__(self, bound: str, *, remedy: str = "") -> None:
        super().__init__(bound)
        self.bound = bound
        self.remedy = remedy


class _Rule(Protocol):
    @property
    def bound(self) -> str:
        """What a value must be, to follow "is not"."""

    def check(self, value: Any) -> Any:
        """Return the value in its normal form or raise `_Wrong`."""

    def parse(self, text: str) -> Any:
        """Read text from the environment or the command line; `check` comes after."""


@frozen
class _Number:
    unit: str
    most: float
    zero: bool = False

    @property
    def bound(self) -> str:
        return f"a number of {self.unit} {'from 0' if self.zero else 'above 0'}, at most {self.most:.0f}"

    def check(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise _Wrong(self.bound)
        try:
            number = float(value)
        except (OverflowError, ValueError):
            raise _Wrong(self.bound) from None
        if not math.isfinite(number) or number > self.most or number < 0 or (number == 0 and not self.zero):
            raise _Wrong(self.bound)
        return number + 0.0  # -0.0 becomes 0.0

    def parse(self, text: str) -> float:
        try:
            return float(text.replace("_", "?"))  # Python would read 1_0 as ten
        except ValueError:
            raise _Wrong(self.bound) from None


@frozen
class _Count:
    least: int
    most: int

    @property
    def bound(self) -> str:
        return f"a whole number from {self.least} to {self.most}"

    def check(self, value: Any) -> int:
        if isinstance(value, bool):
            raise _Wrong(self.bound)
        try:
            number = operator.index(value)
        except TypeError:
            raise _Wrong(self.bound) from None
        if not self.least <= number <= self.most:
            raise _Wrong(self.bound)
        return number

    def parse(self, text: str) -> int:
        if not re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", text):
            raise _Wrong(self.bound)
        return int(text)


@frozen
class _Flag:
    bound: str = "true or false"

    def check(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise _Wrong(self.bound)
        return value

    def parse(self, text: str) -> bool:
        word = text.strip().casefold()
        if word in ("true", "yes", "on", "1"):
            return True
        if word in ("false", "no", "off", "0"):
            return False
        raise _Wrong(self.bound)


@frozen
class _Word:
    words: tuple[str, ...]

    @property
    def bound(self) -> str:
        return f"one of {', '.join(self.words)}"

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise _Wrong(self.bound, remedy=_did_you_mean(value, self.words))
        return value

    def parse(self, text: str) -> str:
        return text


@frozen
class _Text:
    bound: str
    checker: Callable[[str], str]
    optional: bool = False

    def check(self, value: Any) -> str | None:
        if self.optional and (value is None or (isinstance(value, str) and value.casefold() == "none")):
            return None  # TOML has no null, and neither has the environment
        if not isinstance(value, str):
            raise _Wrong(self.bound)
        return self.checker(value)

    def parse(self, text: str) -> str:
        return text


@frozen
class _Options:
    bound: str = "a table of runner options with JSON values"

    def check(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
            raise _Wrong(self.bound)
        try:
            # The trip through JSON is what will happen to it on the wire, and makes the copy that nobody else holds.
            copy: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            raise _Wrong(self.bound) from None
        return copy

    def parse(self, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise _Wrong('a JSON object, such as {"num_ctx": 4096}') from None


def _did_you_mean(value: object, known: Iterable[str]) -> str:
    if not isinstance(value, str):
        return ""
    by_folded = {word.casefold(): word for word in known}
    near = difflib.get_close_matches(value.casefold(), by_folded, n=1, cutoff=0.5)
    return f"Did you mean {by_folded[near[0]]}?" if near else ""


def _show(value: object) -> str:
    """A value as an error may show it: short, on one line, without credentials."""
    return one_line(repr(_redact(value) if isinstance(value, str) else value), 80)


# --- model names -----------------------------------------------------------------------------------------------------

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAMESPACE = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}"
_HOST = r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}"
_MODEL = re.compile(rf"(?:https?://)?(?:(?:{_HOST}/)?{_NAMESPACE}/)?{_PART}(?::{_PART})?")
_MODEL_BOUND = "a model name such as qwen2.5vl:7b ([host/][namespace/]model[:tag])"


def _check_model(name: str) -> str:
    if not name.strip():
        raise _Wrong(_MODEL_BOUND, remedy="`ollama list` shows the names you have.")
    if not _MODEL.fullmatch(name):
        raise _Wrong(_MODEL_BOUND)
    if name.casefold().endswith((":cloud", "-cloud")):
        raise _Wrong(
            "a model that runs on this card (cloud models use none of its memory and cannot be unloaded)",
            remedy="Name a local model.",
        )
    return name


def _check_printable(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise _Wrong("a name on one line, not empty")
    return text


def _check_device(text: str) -> str:
    if not re.fullmatch(r"[a-z]+(:[0-9]{1,3})?", text):
        raise _Wrong(_DEVICE_BOUND, remedy=_did_you_mean(text, ("auto", "cpu", "cuda", "cuda:0", "mps")))
    return text


_DEVICE_BOUND = "auto, cpu or a torch device such as cuda:0"


# --- addresses -------------------------------------------------------------------------------------------------------

_METADATA_HOSTS = frozenset({"metadata", "metadata.google.internal", "instance-data", "metadata.azure.internal"})
_METADATA_ADDRESSES = frozenset(map(ipaddress.ip_address, ("100.100.100.200", "192.0.0.192", "fd00:ec2::254")))
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_URL_BOUND = "an address such as http://127.0.0.1:11434"

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _addresses(host: str) -> tuple[_Address, ...]:
    """The literal address that `host` is, and any IPv4 address hidden in it; nothing for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # 2130706433, 0x7f.1 and 0177.0.0.1 are addresses to some resolvers and names to others.
        if ":" in host or re.fullmatch(r"[0-9]+|0[xX][0-9a-fA-F]*", host.rstrip(".").rpartition(".")[2]):
            raise _Wrong("an address in its usual notation") from None
        return ()
    if isinstance(address, ipaddress.IPv4Address):
        return (address,)
    hidden = [address.ipv4_mapped, address.sixtofour]
    if address in _NAT64 or int(address) >> 32 == 0:
        hidden.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if address.is_loopback or address.is_unspecified:
        hidden = []
    return (address, *(found for found in hidden if found is not None))


def is_loopback(url: str) -> bool:
    """Whether the URL's host is this machine by its own word: `localhost` or a loopback address."""
    host = (urlsplit(SecretURL(url).reveal()).hostname or "").rstrip(".")
    return host == "localhost" or any(address.is_loopback for address in _addresses(host))


def _check_url(text: str) -> SecretURL:
    whole = SecretURL(text).reveal()
    if not whole.isascii() or not whole.isprintable() or set(whole) & set(' \\"<>^`{|}'):
        raise _Wrong("an address without spaces, control or other special characters")
    try:
        parts = urlsplit(whole)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise _Wrong("an address with a host and a port from 1 to 65535") from None
    if parts.scheme not in ("http", "https") or "://" not in whole:
        raise _Wrong("an address that begins with http:// or https://", remedy=f"Write it like {DEFAULT_OLLAMA_URL}.")
    if "#" in whole or "?" in whole:
        raise _Wrong("an address without a fragment (#) or a query (?)")
    if parts.netloc.count("@") > 1:
        raise _Wrong("an address with one @ at most", remedy="Write an @ in the password as %40.")
    if "@" in parts.path:  # a slash typed too early makes a path of the password
        raise _Wrong("an address without an @ in its path")
    if port == 0 or not re.fullmatch(r"[a-z0-9._:-]+", host):
        raise _Wrong("an address with a host and a port from 1 to 65535")
    found = _addresses(host)
    if host.rstrip(".") in _METADATA_HOSTS or any(
        address.is_link_local or address in _METADATA_ADDRESSES or address.is_multicast for address in found
    ):
        raise _Wrong("an Ollama server (link-local, metadata and multicast addresses are never one)")
    return SecretURL(_joined(parts, host, port))


def _joined(parts: SplitResult, host: str, port: int | None) -> str:
    # 0.0.0.0 and :: are addresses to bind to; a client on the same machine connects to loopback.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    user, at, _ = parts.netloc.rpartition("@")
    place = (f"[{host}]" if ":" in host else host) + ("" if port is None else f":{port}")
    return f"{parts.scheme}://{user}{at}{place}{parts.path.rstrip('/')}"


def parse_ollama_host(text: str) -> SecretURL:
    """Read `OLLAMA_HOST` the way Ollama does and return the URL that a client on this machine can connect to.

    Without a scheme the port is 11434; `http://h` means port 80 and `https://h` 443; a port that is none falls back to
    these, with a warning in the log.  Unlike Ollama this refuses every other scheme and control characters
    (`ConfigError`), and takes an empty host, which Ollama dials as this machine, for 127.0.0.1.
    """
    wanted = text.strip().strip("\"'")
    try:
        return _check_url(_expand_ollama_host(wanted))
    except _Wrong as wrong:
        raise ConfigError(
            name="ollama_url",
            value=_show(text),
            bound=wrong.bound,
            source="environment OLLAMA_HOST",
            remedy=wrong.remedy or f"Set OLLAMA_HOST to something like {DEFAULT_OLLAMA_URL}, or unset it.",
        ) from None


def _expand_ollama_host(text: str) -> str:
    if not text.isprintable():
        raise _Wrong("an address without control characters")
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = ("https", "ollama.com:443") if text == "ollama.com" else ("http", text)
    if scheme.lower() not in ("http", "https"):
        raise _Wrong("an address with the scheme http or https")
    default_port = {"http": "80", "https": "443"}.get(scheme, "11434") if separator else "11434"
    place, slash, path = rest.partition("/")
    user, at, place = place.rpartition("@")
    bare = place.strip("[]")
    host, colon, port = place.rpartition(":")
    if _is_ipv6(bare) or not colon or place.endswith("]"):
        host, port = bare, default_port
    elif not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) <= 65535):
        if port:
            _log.warning(
                "OLLAMA_HOST: its port is not a number from 1 to 65535; using %s, as Ollama does", default_port
            )
        port = default_port
    host = host.strip("[]") or "127.0.0.1"
    return f"{scheme.lower()}://{user}{at}{f'[{host}]' if ':' in host else host}:{port}{slash}{path}"


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


# --- the settings ----------------------------------------------------------------------------------------------------


def _setting(default: Any, rule: _Rule, about: str) -> Any:
    # No attrs converter: typed-settings would call it, alone and out of place.  `__attrs_post_init__` checks.
    return field(default=default, metadata={"rule": rule, "about": about})


def _seconds(default: float, about: str, *, zero: bool = False) -> Any:
    return _setting(default, _Number("seconds", _LONGEST_S, zero), about)


def _mib(default: float, about: str, *, zero: bool = False) -> Any:
    return _setting(default, _Number("MiB", _MOST_MIB, zero), about)


def _count(default: int, least: int, most: int, about: str) -> Any:
    return _setting(default, _Count(least, most), about)


def _word(default: str, words: tuple[str, ...], about: str) -> Any:
    return _setting(default, _Word(words), about)


def _flag(default: bool, about: str) -> Any:
    return _setting(default, _Flag(), about)


def _copied(about: str) -> Any:
    return field(factory=dict, metadata={"rule": _Options(), "about": about})


@frozen(kw_only=True)
class GPUResourceConfig:
    """Everything the manager can be told.  MiB for memory, seconds for time.  Raises `ConfigError` for a bad value.

    The text beside each default is the help on the command line and in the README.
    """

    # Ollama and the VLM
    ollama_url: str = _setting(
        DEFAULT_OLLAMA_URL,
        _Text(_URL_BOUND, _check_url),
        "where Ollama listens; kept as a `SecretURL`, which hides credentials wherever it is shown",
    )
    allow_remote: bool = _flag(False, "let `ollama_url` be another machine: screenshots are sent there")
    vlm_model: str = _setting("qwen2.5vl:7b", _Text(_MODEL_BOUND, _check_model), "the VLM, by Ollama's name")
    vlm_size_mib: float = _mib(
        6144.0, "its size until measured or told by Ollama: 7B at 4 bits with its projector and context"
    )
    vlm_options: Mapping[str, Any] = _copied(
        "runner options, sent alike on load, renewal and inference: different options reload the model"
    )
    on_partial_offload: Literal["reload", "accept", "degrade"] = _word(
        "reload", ("reload", "accept", "degrade"), "what to do with a VLM that is only partly on the GPU"
    )
    on_shortage: Literal["degrade", "refuse"] = _word(
        "degrade", ("degrade", "refuse"), "a mode without room: degrade and recover later, or refuse and stay"
    )
    on_close: Literal["release", "leave"] = _word(
        "release", ("release", "leave"), "what `close()` does with the VLM in Ollama"
    )

    # CLIP
    clip_model: str | None = _setting(
        "clip-ViT-B-32",
        _Text("a name or folder for sentence-transformers, or none", _check_printable, optional=True),
        "name or folder for sentence-transformers; `none` manages no CLIP",
    )
    clip_device: str = _setting(
        "auto", _Text(_DEVICE_BOUND, _check_device), "`auto`, `cpu`, or a torch device such as `cuda:0`"
    )
    allow_pickle_weights: bool = _flag(False, "load weights that are not safetensors; a pickle can run code")

    # the card
    gpu_uuid: str | None = _setting(
        None,
        _Text("the UUID of a GPU (`nvidia-smi -L` lists them), or none", _check_printable, optional=True),
        "which GPU, by its UUID; `none` takes the first",
    )
    vram_budget_mib: float = _mib(
        0.0,
        "what Ollama and CLIP may share on a card whose driver tells nothing (no NVML); an assumption, 0 makes none",
        zero=True,
    )
    ollama_card: Literal["same", "other"] = _word(
        "same", ("same", "other"), "`other`: Ollama has a card of its own, so the VLM needs no room on CLIP's"
    )
    reserve_mib: float = _mib(
        512.0, "left free on every acquisition, for the desktop and the next allocation of others", zero=True
    )
    floor_mib: float = _mib(
        128.0, "less free than this for `pressure_s` is pressure: drivers begin to page or fail", zero=True
    )
    pressure_s: float = _seconds(10.0, "how long below `floor_mib` before the VLM goes", zero=True)
    resource_event_mib: float = _mib(100.0, "free memory must move this far before `resource_changed` is told")

    # time
    idle_timeout_s: float = _seconds(300.0, "unload the VLM this long after its last use")
    keep_alive_margin_s: float = _seconds(
        60.0, "Ollama's own timer runs this much longer, so that it fires only when we are gone", zero=True
    )
    vlm_load_deadline_s: float = _seconds(
        360.0, "for a load with its retries; longer than Ollama's own stall limit of 300 s, which it must not cut off"
    )
    inference_timeout_s: float = _seconds(300.0, "for one VLM request; a lease may ask for less or more")
    vlm_load_retries: int = _count(3, 0, 3, "tries after the first, for failures that another try may mend")
    retry_base_s: float = _seconds(1.0, "first pause between tries; each doubles it", zero=True)
    retry_cap_s: float = _seconds(8.0, "longest pause between tries", zero=True)
    unload_deadline_s: float = _seconds(30.0, "for Ollama to drop the VLM: a running answer may finish")
    unload_resend_s: float = _seconds(2.0, "ask again this often: an unload sent at the wrong moment is lost")
    settle_timeout_s: float = _seconds(
        6.0, "for the memory to come back after a release; Ollama itself allows 5 s, 0.5 to 1.5 s is typical"
    )
    settle_poll_s: float = _seconds(0.1, "how often to look meanwhile")
    blind_settle_s: float = _seconds(2.0, "how long to wait for a release that no driver shows", zero=True)
    observe_timeout_s: float = _seconds(2.5, "for one look at Ollama and the card")
    unknown_max_s: float = _seconds(60.0, "Ollama may be silent this long in a standing mode; it can block for 19 s")
    check_interval_s: float = _seconds(15.0, "how often a standing promise is checked; an error is looked into at once")
    drain_timeout_s: float = _seconds(10.0, "how long a request waits for leases in its way", zero=True)
    shed_drain_s: float = _seconds(2.0, "how long an emergency waits for a CLIP lease", zero=True)
    shed_deadline_s: float = _seconds(20.0, "for everything that an emergency does")
    recover_base_s: float = _seconds(2.0, "first pause before trying to leave DEGRADED; each doubles it")
    recover_cap_s: float = _seconds(60.0, "longest pause before trying to leave DEGRADED")
    stable_s: float = _seconds(30.0, "a mode must stand this long before that pause starts anew", zero=True)
    reassert_limit: int = _count(3, 0, 1000, "how often, per `reassert_window_s`, to undo what another client did")
    reassert_window_s: float = _seconds(600.0, "the window of `reassert_limit`")
    journal_size: int = _count(1000, 1, 10_000_000, "records kept in memory")

    def __attrs_post_init__(self) -> None:
        for attribute in attrs.fields(type(self)):
            rule: _Rule = attribute.metadata["rule"]
            given = getattr(self, attribute.name)
            try:
                value = rule.check(given)
            except _Wrong as wrong:
                raise ConfigError(
                    name=attribute.name, value=_show(given), bound=wrong.bound, remedy=wrong.remedy
                ) from None
            object.__setattr__(self, attribute.name, value)  # frozen for others: the normal form replaces the given
        if not self.allow_remote and not is_loopback(self.ollama_url):
            raise ConfigError(
                name="ollama_url",
                value=_show(self.ollama_url),
                bound="this machine (localhost, 127.0.0.0/8 or ::1)",
                remedy="Screenshots would be sent there; if that is meant, set allow_remote to true.",
            )
        for low, high in (
            ("retry_base_s", "retry_cap_s"),
            ("recover_base_s", "recover_cap_s"),
            ("settle_poll_s", "settle_timeout_s"),
            # With a floor above the reserve every acquisition would end in pressure at once.
            ("floor_mib", "reserve_mib"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ConfigError(
                    name=low, value=f"{getattr(self, low):g}", bound=f"at most {high} ({getattr(self, high):g})"
                )


@frozen(kw_only=True)
class Setting:
    """One line of the settings table: what the README and the command line show."""

    name: str
    default: str
    bound: str
    about: str

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return ENV_PREFIX + self.name.upper()

    @property
    def option(self) -> str:
        """Its option on the command line."""
        return "--" + self.name.replace("_", "-")


def settings_table() -> tuple[Setting, ...]:
    """Every setting, in the order of the class."""
    standard = GPUResourceConfig()
    return tuple(
        Setting(
            name=a.name,
            default=_as_text(getattr(standard, a.name)),
            bound=a.metadata["rule"].bound,
            about=a.metadata["about"],
        )
        for a in attrs.fields(GPUResourceConfig)
    )


def _as_text(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, dict) else str(value)


# --- loading ---------------------------------------------------------------------------------------------------------


def load_config(
    path: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[str, Any] | None = None,
    *,
    override_source: Callable[[str], str] = lambda _name: "argument",
) -> GPUResourceConfig:
    """Make a configuration: defaults < TOML file < environment < `overrides`.

    `path` is a TOML file with a section `[gpu-fsm]`, or a `pyproject.toml` with `[tool.gpu-fsm]`; without it
    `GPU_FSM_CONFIG` may name one.  `override_source` gives, for a setting's name, the words by which an error names
    where the override came from.  Raises `ConfigError`, which names the value's source, for everything it cannot use:
    unknown keys and variables too.
    """
    # Imported here: it takes longer than all of this package, and those who construct the class do not need it.
    import typed_settings

    if path is None and environ.get(CONFIG_VARIABLE):
        path = Path(environ[CONFIG_VARIABLE])
    known = tuple(a.name for a in attrs.fields(GPUResourceConfig))
    layers: list[tuple[dict[str, Any], dict[str, str]]] = []
    if path is not None:
        layers.append(_from_file(path, known))
    layers.append(_from_environment(environ, known))
    given = dict(overrides or {})
    for name in given:
        if name not in known:
            raise _unknown(name, known, override_source(name))
    layers.append((given, {name: override_source(name) for name in given}))

    # typed-settings lists the options and merges the layers.  It converts nothing (its own conversion takes 3.7 for an
    # int, "yes" for a bool and drops the error of ours into text), so the class alone decides what is right.
    merged: dict[str, Any] = typed_settings.load_settings(
        GPUResourceConfig,  # type: ignore[arg-type]  # what comes back is what `_AsIs` returns: the merged values
        loaders=[typed_settings.loaders.DictLoader(values) for values, _ in layers],
        converter=_AsIs(),
    )
    sources = {name: source for _, named in layers for name, source in named.items()}
    try:
        return GPUResourceConfig(**merged)
    except ConfigError as wrong:
        raise attrs.evolve(wrong, source=sources.get(wrong.name, "default")) from None


class _AsIs:
    """A converter for typed-settings that converts nothing."""

    def structure(self, obj: Any, cl: type[Any]) -> Any:
        return obj

    def get_structure_hook(self, cl: type[Any]) -> Any:
        raise KeyError(cl)


def parse_setting(name: str, text: str, source: str) -> Any:
    """Read one setting from text, as the environment and the command line give it.  Raises `ConfigError`."""
    rule: _Rule = attrs.fields_dict(GPUResourceConfig)[name].metadata["rule"]
    try:
        return rule.parse(text)
    except _Wrong as wrong:
        raise ConfigError(name=name, value=_show(text), bound=wrong.bound, source=source, remedy=wrong.remedy) from None


def _unknown(name: str, known: Iterable[str], source: str) -> ConfigError:
    return ConfigError(
        name=one_line(name, 80),
        source=source,
        detail="there is no such setting",
        remedy=_did_you_mean(name, known) or "The README lists the settings.",
    )


def _from_environment(environ: Mapping[str, str], known: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    variables = {ENV_PREFIX + name.upper(): name for name in known}
    for variable in sorted(environ):
        if not variable.startswith(ENV_PREFIX) or variable == CONFIG_VARIABLE:
            continue
        if variable not in variables:
            raise _unknown(variable, (*variables, CONFIG_VARIABLE), "environment")
        name, source = variables[variable], f"environment {variable}"
        values[name] = parse_setting(name, environ[variable], source)
        sources[name] = source
    if environ.get("OLLAMA_HOST", "").strip().strip("\"'") and "ollama_url" not in values:
        values["ollama_url"] = parse_ollama_host(environ["OLLAMA_HOST"])
        sources["ollama_url"] = "environment OLLAMA_HOST"
    return values, sources


def _from_file(path: Path, known: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    import tomllib

    source = one_line(path)

    def broken(detail: str, remedy: str = "") -> ConfigError:
        return ConfigError(name="configuration file", source=source, detail=detail, remedy=remedy)

    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise broken("there is no such file") from None
    except (OSError, ValueError, RecursionError) as problem:
        said = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise broken(f"it cannot be read: {one_line(said)}", "It must be a TOML file in UTF-8.") from None
    if path.name == "pyproject.toml":
        shown, sections = f"[tool.{SECTION}]", document.get("tool", {})
    else:
        shown, sections = f"[{SECTION}]", document
        for key in document:
            if key != SECTION:
                mend = f"It belongs under [{SECTION}]." if key in known else _did_you_mean(key, (SECTION,))
                raise broken(f"{one_line(key, 80)!r} stands outside the section {shown}", mend)
    table = sections.get(SECTION) if isinstance(sections, dict) else None
    if not isinstance(table, dict):
        raise broken(f"it has no section {shown}", f"Put the settings under a line {shown}.")
    for key in table:
        if key not in known:
            raise _unknown(key, known, source)
    return dict(table), dict.fromkeys(table, source)


__all__ = [
    "CONFIG_VARIABLE",
    "DEFAULT_OLLAMA_URL",
    "ENV_PREFIX",
    "GPUResourceConfig",
    "SecretURL",
    "Setting",
    "is_loopback",
    "load_config",
    "parse_ollama_host",
    "parse_setting",
    "settings_table",
]
