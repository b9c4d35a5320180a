"""Settings: frozen, units in the names, each default with its reason.

`GPUResourceConfig(...)` checks every value at construction and raises `ConfigError` with the name, the value, the bound
and the source.  `load_config()` fills one from defaults, a TOML file, the environment and arguments, in rising order of
precedence.  An environment variable is `GPU_FSM_` and the name in capitals; `OLLAMA_HOST` is read as Ollama reads it
and gives way to `GPU_FSM_OLLAMA_URL`.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

import attrs
from attrs import frozen

from gpu_fsm.errors import ConfigError, one_line
from gpu_fsm.rules import (
    Rule,
    SecretURL,
    Text,
    Wrong,
    as_text,
    check_all,
    count,
    did_you_mean,
    flag,
    mib,
    options,
    printable,
    seconds,
    setting,
    show,
    word,
)

_log = logging.getLogger("gpu_fsm")

ENV_PREFIX = "GPU_FSM_"
CONFIG_VARIABLE = "GPU_FSM_CONFIG"
"""Names the TOML file where no path is given.  `load_config` looks for no other: a folder that somebody else filled
must not decide which server gets the screenshots."""
SECTION = "gpu-fsm"
OTHER_SECTIONS = ("agent", "control", "gateway")
"""Tables under `[gpu-fsm]`, and beginnings of variables, that are not the manager's; `AppConfig` reads them."""
DEFAULT_OLLAMA_URL = "http://127.0.0.1:11434"


# --- model names -----------------------------------------------------------------------------------------------------

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAMESPACE = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}"
_HOST = r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}"
_MODEL = re.compile(rf"(?:https?://)?(?:(?:{_HOST}/)?{_NAMESPACE}/)?{_PART}(?::{_PART})?")
_MODEL_BOUND = "a model name such as qwen2.5vl:7b ([host/][namespace/]model[:tag])"


def _check_model(name: str) -> str:
    if not name.strip():
        raise Wrong(_MODEL_BOUND, remedy="`ollama list` shows the names you have.")
    if not _MODEL.fullmatch(name):
        raise Wrong(_MODEL_BOUND)
    if name.casefold().endswith((":cloud", "-cloud")):
        raise Wrong(
            "a model that runs on this card (cloud models use none of its memory and cannot be unloaded)",
            remedy="Name a local model.",
        )
    return name


def _check_device(text: str) -> str:
    if not re.fullmatch(r"[a-z]+(:[0-9]{1,3})?", text):
        raise Wrong(_DEVICE_BOUND, remedy=did_you_mean(text, ("auto", "cpu", "cuda", "cuda:0", "mps")))
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
            raise Wrong("an address in its usual notation") from None
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
        raise Wrong("an address without spaces, control or other special characters")
    try:
        parts = urlsplit(whole)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise Wrong("an address with a host and a port from 1 to 65535") from None
    if parts.scheme not in ("http", "https") or "://" not in whole:
        raise Wrong("an address that begins with http:// or https://", remedy=f"Write it like {DEFAULT_OLLAMA_URL}.")
    if "#" in whole or "?" in whole:
        raise Wrong("an address without a fragment (#) or a query (?)")
    if parts.netloc.count("@") > 1:
        raise Wrong("an address with one @ at most", remedy="Write an @ in the password as %40.")
    if "@" in parts.path:  # a slash typed too early makes a path of the password
        raise Wrong("an address without an @ in its path")
    if port == 0 or not re.fullmatch(r"[a-z0-9._:-]+", host):
        raise Wrong("an address with a host and a port from 1 to 65535")
    if host.rstrip(".") in _METADATA_HOSTS or never_ollama(host):
        raise Wrong("an Ollama server (link-local, metadata and multicast addresses are never one)")
    return SecretURL(_joined(parts, host, port))


def never_ollama(host: str) -> bool:
    """Whether `host` is a literal address at which no Ollama can be: link-local, a metadata service's, multicast."""
    return any(
        address.is_link_local or address in _METADATA_ADDRESSES or address.is_multicast for address in _addresses(host)
    )


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
    except Wrong as wrong:
        raise ConfigError(
            name="ollama_url",
            value=show(text),
            bound=wrong.bound,
            source="environment OLLAMA_HOST",
            remedy=wrong.remedy or f"Set OLLAMA_HOST to something like {DEFAULT_OLLAMA_URL}, or unset it.",
        ) from None


def _expand_ollama_host(text: str) -> str:
    if not text.isprintable():
        raise Wrong("an address without control characters")
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = ("https", "ollama.com:443") if text == "ollama.com" else ("http", text)
    if scheme.lower() not in ("http", "https"):
        raise Wrong("an address with the scheme http or https")
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


@frozen(kw_only=True)
class GPUResourceConfig:
    """Everything the manager can be told.  MiB for memory, seconds for time.  Raises `ConfigError` for a bad value.

    The text beside each default is the help on the command line and in the README.
    """

    # Ollama and the VLM
    ollama_url: str = setting(
        DEFAULT_OLLAMA_URL,
        Text(_URL_BOUND, _check_url),
        "where Ollama listens; kept as a `SecretURL`, which hides credentials wherever it is shown",
    )
    allow_remote: bool = flag(False, "let `ollama_url` be another machine: screenshots are sent there")
    vlm_model: str = setting("qwen2.5vl:7b", Text(_MODEL_BOUND, _check_model), "the VLM, by Ollama's name")
    vlm_size_mib: float = mib(
        6144.0, "its size until measured or told by Ollama: 7B at 4 bits with its projector and context", live=True
    )
    vlm_options: Mapping[str, Any] = options(
        "runner options, sent alike on load, renewal and inference: different options reload the model"
    )
    on_partial_offload: Literal["reload", "accept", "degrade"] = word(
        "reload", ("reload", "accept", "degrade"), "what to do with a VLM that is only partly on the GPU", live=True
    )
    on_shortage: Literal["degrade", "refuse"] = word(
        "degrade",
        ("degrade", "refuse"),
        "a mode without room: degrade and recover later, or refuse and stay",
        live=True,
    )
    on_close: Literal["release", "leave"] = word(
        "release", ("release", "leave"), "what `close()` does with the VLM in Ollama", live=True
    )

    # CLIP
    clip_model: str | None = setting(
        "clip-ViT-B-32",
        Text("a name or folder for sentence-transformers, or none", printable, optional=True),
        "name or folder for sentence-transformers; `none` manages no CLIP",
    )
    clip_device: str = setting(
        "auto", Text(_DEVICE_BOUND, _check_device), "`auto`, `cpu`, or a torch device such as `cuda:0`"
    )
    allow_pickle_weights: bool = flag(False, "load weights that are not safetensors; a pickle can run code")

    # the card
    gpu_uuid: str | None = setting(
        None,
        Text("the UUID of a GPU (`nvidia-smi -L` lists them), or none", printable, optional=True),
        "which GPU, by its UUID; `none` takes the first",
    )
    vram_budget_mib: float = mib(
        0.0,
        "what Ollama and CLIP may share on a card whose driver tells nothing (no NVML); an assumption, 0 makes none",
        zero=True,
    )
    ollama_card: Literal["same", "other"] = word(
        "same", ("same", "other"), "`other`: Ollama has a card of its own, so the VLM needs no room on CLIP's"
    )
    reserve_mib: float = mib(
        512.0, "left free on every acquisition, for the desktop and the next allocation of others", zero=True, live=True
    )
    floor_mib: float = mib(
        128.0, "less free than this for `pressure_s` is pressure: drivers begin to page or fail", zero=True, live=True
    )
    pressure_s: float = seconds(10.0, "how long below `floor_mib` before the VLM goes", zero=True, live=True)
    resource_event_mib: float = mib(
        100.0, "free memory must move this far before `resource_changed` is told", live=True
    )

    # time
    idle_timeout_s: float = seconds(300.0, "unload the VLM this long after its last use", live=True)
    keep_alive_margin_s: float = seconds(
        60.0, "Ollama's own timer runs this much longer, so that it fires only when we are gone", zero=True, live=True
    )
    vlm_load_deadline_s: float = seconds(
        360.0,
        "for a load with its retries; longer than Ollama's own stall limit of 300 s, which it must not cut off",
        live=True,
    )
    inference_timeout_s: float = seconds(300.0, "for one VLM request; a lease may ask for less or more", live=True)
    vlm_load_retries: int = count(3, 0, 3, "tries after the first, for failures that another try may mend")
    retry_base_s: float = seconds(1.0, "first pause between tries; each doubles it", zero=True)
    retry_cap_s: float = seconds(8.0, "longest pause between tries", zero=True)
    unload_deadline_s: float = seconds(30.0, "for Ollama to drop the VLM: a running answer may finish", live=True)
    unload_resend_s: float = seconds(2.0, "ask again this often: an unload sent at the wrong moment is lost", live=True)
    settle_timeout_s: float = seconds(
        6.0, "for the memory to come back after a release; Ollama itself allows 5 s, 0.5 to 1.5 s is typical", live=True
    )
    settle_poll_s: float = seconds(0.1, "how often to look meanwhile", live=True)
    blind_settle_s: float = seconds(2.0, "how long to wait for a release that no driver shows", zero=True, live=True)
    observe_timeout_s: float = seconds(2.5, "for one look at Ollama and the card")
    unknown_max_s: float = seconds(
        60.0, "Ollama may be silent this long in a standing mode; it can block for 19 s", live=True
    )
    check_interval_s: float = seconds(
        15.0, "how often a standing promise is checked; an error is looked into at once", live=True
    )
    drain_timeout_s: float = seconds(10.0, "how long a request waits for leases in its way", zero=True)
    shed_drain_s: float = seconds(2.0, "how long an emergency waits for a CLIP lease", zero=True, live=True)
    shed_deadline_s: float = seconds(20.0, "for everything that an emergency does", live=True)
    recover_base_s: float = seconds(2.0, "first pause before trying to leave DEGRADED; each doubles it", live=True)
    recover_cap_s: float = seconds(60.0, "longest pause before trying to leave DEGRADED", live=True)
    stable_s: float = seconds(30.0, "a mode must stand this long before that pause starts anew", zero=True, live=True)
    reassert_limit: int = count(
        3, 0, 1000, "how often, per `reassert_window_s`, to undo what another client did", live=True
    )
    reassert_window_s: float = seconds(600.0, "the window of `reassert_limit`", live=True)
    journal_size: int = count(1000, 1, 10_000_000, "records kept in memory")

    def __attrs_post_init__(self) -> None:
        check_all(self)
        if not self.allow_remote and not is_loopback(self.ollama_url):
            raise ConfigError(
                name="ollama_url",
                value=show(self.ollama_url),
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


Fields = Mapping[str, "attrs.Attribute[Any]"]
"""Settings by the name that files give them: `idle_timeout_s`, `agent.accept`."""


@frozen(kw_only=True)
class Setting:
    """One line of the settings table: what the README and the command line show."""

    name: str
    default: str
    bound: str
    about: str
    live: bool = False
    """Whether a running manager may be given another value."""

    @property
    def section(self) -> str:
        """The table it stands in; none for the manager's own."""
        return self.name.rpartition(".")[0]

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return variable_of(self.name)

    @property
    def option(self) -> str:
        """Its option on the command line."""
        return "--" + self.name.replace("_", "-").replace(".", "-")


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + name.upper().replace(".", "_")


def describe(settings: attrs.AttrsInstance, section: str = "") -> tuple[Setting, ...]:
    """Every setting of a settings object that holds the defaults, in the order of its class."""
    return tuple(
        Setting(
            name=f"{section}.{a.name}" if section else a.name,
            default=as_text(getattr(settings, a.name)),
            bound=a.metadata["rule"].bound,
            about=a.metadata["about"],
            live=a.metadata["live"],
        )
        for a in attrs.fields(type(settings))
    )


def settings_table() -> tuple[Setting, ...]:
    """Every setting of the manager, in the order of the class."""
    return describe(GPUResourceConfig())


_FIXED = {
    "allow_pickle_weights": "CLIP has been loaded by it",
    "allow_remote": "the server was chosen by it",
    "clip_device": "CLIP's device was chosen by it",
    "clip_model": "CLIP has been loaded by it",
    "gpu_uuid": "the card was chosen by it",
    "ollama_card": "what needs room on the card was settled by it",
    "ollama_url": "what is loaded there is ours to give back",
    "vlm_model": "the VLM that may be loaded is ours to give back",
    "vlm_options": "other options would reload the VLM under those who use it",
}
"""Why these cannot change under way; of the rest, each is read once, when its owner is made."""


def changes(old: attrs.AttrsInstance, new: attrs.AttrsInstance) -> dict[str, Any]:
    """The settings in which two objects of one settings class differ, with the new values.

    Raises `ConfigError` for the first that a running program cannot take, with the reason.
    """
    assert type(old) is type(new)
    differing = [a for a in attrs.fields(type(old)) if getattr(old, a.name) != getattr(new, a.name)]
    for a in differing:
        if not a.metadata["live"]:
            raise ConfigError(
                name=a.name,
                value=show(getattr(new, a.name), a.metadata["rule"]),
                source="reload",
                detail=f"it cannot change under way: {_FIXED.get(a.name, 'it is read once, at the start')}",
                remedy="Start again.",
            )
    return {a.name: getattr(new, a.name) for a in differing}


# --- loading ---------------------------------------------------------------------------------------------------------


def load_config(
    path: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[str, Any] | None = None,
    *,
    override_source: Callable[[str], str] = lambda _name: "argument",
) -> GPUResourceConfig:
    """Make a manager's configuration: defaults < TOML file < environment < `overrides`.

    `path` is a TOML file with a section `[gpu-fsm]`, or a `pyproject.toml` with `[tool.gpu-fsm]`; without it
    `GPU_FSM_CONFIG` may name one.  `override_source` gives, for a setting's name, the words by which an error names
    where the override came from.  Raises `ConfigError`, which names the value's source, for everything it cannot use:
    unknown keys and variables too.  What belongs to the other sections of `AppConfig` is passed over.
    """
    fields = attrs.fields_dict(GPUResourceConfig)
    if path is None and environ.get(CONFIG_VARIABLE):
        path = Path(environ[CONFIG_VARIABLE])
    layers: list[Layer] = []
    if path is not None:
        table = read_table(path, fields)
        for section in OTHER_SECTIONS:
            table.pop(section, None)
        layers.append(from_table(table, fields, one_line(path)))
    layers.append(from_environment(environ, fields, others=OTHER_SECTIONS))
    layers.append(from_overrides(overrides or {}, fields, override_source))
    sources = {name: source for layer in layers for name, source in layer.sources.items()}
    try:
        return GPUResourceConfig(**merge(GPUResourceConfig, [layer.values for layer in layers]))
    except ConfigError as wrong:
        raise attrs.evolve(wrong, source=sources.get(wrong.name, "default")) from None


@frozen
class Layer:
    """Values from one place, by setting, each with the words that say where it stands."""

    values: dict[str, Any]
    sources: dict[str, str]


def merge(cls: type[Any], layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Lay layers over the defaults of a settings class; sections are tables in a table."""
    # Imported here: it takes longer than all of this package, and those who construct the class do not need it.
    import typed_settings

    # typed-settings lists the options and merges the layers.  It converts nothing (its own conversion takes 3.7 for an
    # int, "yes" for a bool and drops the error of ours into text), so the class alone decides what is right.
    merged: dict[str, Any] = typed_settings.load_settings(
        _bare(cls),  # type: ignore[arg-type]  # a class can be hashed
        loaders=[typed_settings.loaders.DictLoader(dict(values)) for values in layers],
        converter=_AsIs(),
    )
    return merged


@functools.cache
def _bare(cls: Any) -> type[Any]:
    """A class with the same fields and no source: typed-settings parses the source at every load, 50 ms a class."""
    fields = {}
    for a in attrs.fields(cls):
        inner = getattr(a.default, "factory", None)
        section = _bare(inner) if isinstance(inner, type) and attrs.has(inner) else None
        fields[a.name] = attrs.field(default=a.default, type=section or Any)
    bare: type[Any] = attrs.make_class(cls.__name__, fields)
    bare.__module__ = "nowhere"  # or the file of its maker is searched for its source
    return bare


class _AsIs:
    """A converter for typed-settings that converts nothing."""

    def structure(self, obj: Any, cl: type[Any]) -> Any:
        return obj

    def get_structure_hook(self, cl: type[Any]) -> Any:
        raise KeyError(cl)


def parse_setting(name: str, text: str, source: str, fields: Fields | None = None) -> Any:
    """Read one setting, of the manager or of `fields`, from text as the environment and the command line give it.

    Raises `ConfigError`.
    """
    rule: Rule = (fields or attrs.fields_dict(GPUResourceConfig))[name].metadata["rule"]
    try:
        return rule.parse(text)
    except Wrong as wrong:
        raise ConfigError(
            name=name, value=show(text, rule), bound=wrong.bound, source=source, remedy=wrong.remedy
        ) from None


def _unknown(name: str, known: Iterable[str], source: str) -> ConfigError:
    return ConfigError(
        name=one_line(name, 80),
        source=source,
        detail="there is no such setting",
        remedy=did_you_mean(name, known) or "The README lists the settings.",
    )


def from_overrides(given: Mapping[str, Any], fields: Fields, source_of: Callable[[str], str]) -> Layer:
    """Take values that arguments or options give."""
    for name in given:
        if name not in fields:
            raise _unknown(name, fields, source_of(name))
    return Layer(dict(given), {name: source_of(name) for name in given})


def from_environment(environ: Mapping[str, str], fields: Fields, *, others: Iterable[str] = ()) -> Layer:
    """Read `GPU_FSM_*` and `OLLAMA_HOST`; variables of the sections `others` are passed over."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    variables = {variable_of(name): name for name in fields}
    passed = tuple(variable_of(section + ".") for section in others)
    for variable in sorted(environ):
        if not variable.startswith(ENV_PREFIX) or variable == CONFIG_VARIABLE:
            continue
        if variable not in variables:
            if variable.startswith(passed):
                continue
            raise _unknown(variable, (*variables, CONFIG_VARIABLE), "environment")
        name, source = variables[variable], f"environment {variable}"
        values[name] = parse_setting(name, environ[variable], source, fields)
        sources[name] = source
    if environ.get("OLLAMA_HOST", "").strip().strip("\"'") and "ollama_url" not in values:
        values["ollama_url"] = parse_ollama_host(environ["OLLAMA_HOST"])
        sources["ollama_url"] = "environment OLLAMA_HOST"
    return Layer(values, sources)


def from_table(table: Mapping[str, Any], fields: Fields, source: str, prefix: str = "") -> Layer:
    """Take the values of one table of a file; `prefix` is its section with a dot."""
    for key in table:
        if prefix + key not in fields:
            raise _unknown(prefix + key, fields, source)
    return Layer({prefix + key: value for key, value in table.items()}, {prefix + key: source for key in table})


def read_table(path: Path, known: Iterable[str], *, optional: bool = False) -> dict[str, Any]:
    """Read the table `[gpu-fsm]` of a TOML file, or `[tool.gpu-fsm]` of a `pyproject.toml`.

    With `optional` a `pyproject.toml` without it gives an empty one.  Raises `ConfigError`.
    """
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
        if optional and isinstance(sections, dict) and SECTION not in sections:
            return {}
    else:
        shown, sections = f"[{SECTION}]", document
        for key in document:
            if key != SECTION:
                mend = f"It belongs under [{SECTION}]." if key in known else did_you_mean(key, (SECTION,))
                raise broken(f"{one_line(key, 80)!r} stands outside the section {shown}", mend)
    table = sections.get(SECTION) if isinstance(sections, dict) else None
    if not isinstance(table, dict):
        raise broken(f"it has no section {shown}", f"Put the settings under a line {shown}.")
    return dict(table)


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
