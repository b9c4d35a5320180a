"""The settings of a whole program: the manager's, the reference agent's, the control socket's and the gateway's.

`AppConfig` holds them as frozen sections.  The manager's settings stand straight under `[gpu-fsm]` in a file, each
other section in a table of its own: `[gpu-fsm.agent]`, `[gpu-fsm.control]`, `[gpu-fsm.gateway]`.
"""

from __future__ import annotations

import ipaddress
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs import field, frozen

from gpu_fsm.errors import ConfigError, one_line
from gpu_fsm.rules import (
    Fraction,
    Place,
    Rule,
    Secret,
    Text,
    Texts,
    Wrong,
    as_text,
    check_all,
    count,
    flag,
    mib,
    printable,
    seconds,
    setting,
    show,
    word,
)
from gpu_fsm.settings import (
    CONFIG_VARIABLE,
    OTHER_SECTIONS,
    SECTION,
    Fields,
    GPUResourceConfig,
    Layer,
    Setting,
    changes,
    describe,
    from_environment,
    from_overrides,
    from_table,
    merge,
    read_table,
)


def _check_prompt(text: str) -> str:
    if not text.strip() or not text.replace("\n", " ").isprintable():
        raise Wrong("a text, not empty")
    return text


def _check_listen(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise Wrong(_LISTEN_BOUND)
    if host == "localhost":
        return text
    try:
        address = ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
    except ValueError:
        raise Wrong(_LISTEN_BOUND) from None
    return f"[{address}]:{int(port)}" if address.version == 6 else f"{address}:{int(port)}"


_LISTEN_BOUND = "an address and a port, such as 127.0.0.1:11500 or [::1]:11500; port 0 takes any free one"


def _check_token(text: str) -> Secret:
    whole = Secret(text).reveal()
    if not re.fullmatch(r"[!-~]{16,512}", whole):
        raise Wrong("16 to 512 printable characters without spaces")
    return Secret(whole)


def _check_host(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.:\[\]-]{1,255}", text):
        raise Wrong("a host, with its port where it has one, as clients write it into `Host`")
    return text.casefold()


def _check_origin(text: str) -> str:
    if not re.fullmatch(r"https?://[A-Za-z0-9_.:\[\]-]{1,255}", text):
        raise Wrong("an origin such as http://localhost:3000, without a path")
    return text.casefold()


@frozen(kw_only=True)
class AgentConfig:
    """What the reference agent is told: how it asks the VLM, when it takes a screen for known, what it keeps."""

    accept: float | None = setting(
        None,
        Fraction(-1.0, 1.0, optional=True),
        "at least this much like the nearest screen (cosine), to be taken for it; `none` takes the CLIP model's own",
        live=True,
    )
    unsure: float | None = setting(
        None,
        Fraction(-1.0, 1.0, optional=True),
        "less than this is like nothing known; `none` takes the CLIP model's own",
        live=True,
    )
    margin: float | None = setting(
        None,
        Fraction(0.0, 2.0, optional=True),
        "how much farther the nearest other screen must be; `none` takes the CLIP model's own",
        live=True,
    )
    image_weight: float = setting(1.0, Fraction(0.0, 1.0), "what the picture counts in a score", live=True)
    text_weight: float = setting(
        0.0, Fraction(0.0, 1.0), "what a screen's text counts in a score, where it has one", live=True
    )
    largest_side_px: int = count(
        1600, 32, 16384, "screens with a longer side are sent to the VLM smaller: it reads no finer", live=True
    )
    cache_size: int = count(1024, 0, 1_000_000, "the VLM's answers kept in memory, by picture", live=True)
    prompt: str | None = setting(
        None, Text("a text, or none", _check_prompt, optional=True), "asked of the VLM; `none` takes the built-in one"
    )
    labels: Sequence[str] = setting(
        (), Texts("a list of names", printable), "the labels that the VLM may choose from; none lets it find its own"
    )
    vlm_timeout_s: float | None = setting(
        None,
        Fraction(0.0, 4_000_000.0, optional=True),
        "how long a screen waits for the VLM; `none` as long as the manager allows",
        live=True,
    )
    index_path: Path | None = setting(  # noqa: RUF009 - a frozen field, whatever its type
        None, Place(), "file of the screen memory, saved after each recorded screen; `none` keeps it in memory only"
    )
    interval_s: float = seconds(1.0, "pause between two looks at a live screen", zero=True, live=True)

    def __attrs_post_init__(self) -> None:
        check_all(self)
        if self.accept is not None and self.unsure is not None and self.unsure > self.accept:
            raise ConfigError(name="unsure", value=f"{self.unsure:g}", bound=f"at most accept ({self.accept:g})")
        if self.image_weight <= 0.0:
            raise ConfigError(name="image_weight", value="0", bound="above 0: every screen has a picture")


@frozen(kw_only=True)
class ControlConfig:
    """The socket by which `status`, `mode` and the like reach a running agent."""

    enabled: bool = flag(True, "serve the control socket")
    socket_path: Path | None = setting(  # noqa: RUF009
        None, Place(), "its file; `none` takes one in the user's runtime folder, named after the process"
    )
    max_clients: int = count(64, 1, 4096, "served at once; more are told to come again")

    def __attrs_post_init__(self) -> None:
        check_all(self)


@frozen(kw_only=True)
class GatewayConfig:
    """The relay for programs that know nothing of us."""

    listen: str = setting(
        "127.0.0.1:11500", Text(_LISTEN_BOUND, _check_listen), "where it listens; other than loopback needs a `token`"
    )
    token: str | None = setting(
        None,
        Text("16 to 512 printable characters, or none", _check_token, optional=True, secret=True),
        "what clients must send as `Authorization: Bearer`; kept as a `Secret`, which is never shown",
    )
    allowed_hosts: Sequence[str] = setting(
        (), Texts("a list of hosts", _check_host), "values of `Host` that are served beside those of `listen`"
    )
    allowed_origins: Sequence[str] = setting(
        (), Texts("a list of origins", _check_origin), "web pages that may call; none allows no page"
    )
    other_models: Literal["pass", "refuse"] = word(
        "pass", ("pass", "refuse"), "requests for other models than the VLM: relay them, or refuse with a clear error"
    )
    max_body_mib: float = mib(64.0, "a larger request is refused; a screenshot in base64 rarely has 16")
    max_connections: int = count(128, 1, 65536, "open at once")
    idle_client_s: float = seconds(30.0, "a client that says nothing for this long is closed")
    lease_ttl_s: float = seconds(30.0, "a foreign lease whose holder is silent this long ends")
    shutdown_s: float = seconds(20.0, "how long running answers may take to end when it stops", zero=True)

    def __attrs_post_init__(self) -> None:
        check_all(self)
        host = self.listen.rpartition(":")[0].strip("[]")
        if self.token is None and host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise ConfigError(
                name="listen",
                value=self.listen,
                bound="this machine only (127.0.0.1, ::1 or localhost) without a token",
                remedy="Whoever reaches it uses your card; set token, or listen on loopback.",
            )


@frozen(kw_only=True)
class AppConfig:
    """All sections together."""

    gpu: GPUResourceConfig = field(factory=GPUResourceConfig)
    agent: AgentConfig = field(factory=AgentConfig)
    control: ControlConfig = field(factory=ControlConfig)
    gateway: GatewayConfig = field(factory=GatewayConfig)


_SECTIONS: dict[str, type[Any]] = {
    "gpu": GPUResourceConfig,
    "agent": AgentConfig,
    "control": ControlConfig,
    "gateway": GatewayConfig,
}


# --- loading ----------------------------------------------------------------------------------------------------------

FILE_NAME = "gpu-fsm.toml"
PROTECTED = frozenset({"allow_pickle_weights", "allow_remote", "ollama_url"})
"""What a file that merely lies in the current folder must not decide: who gets the screenshots, and what code may run.
The gateway's settings are the same, all of them."""


@frozen(kw_only=True)
class Value:
    """One setting as it came out, and where it came from."""

    name: str
    """As files have it: `idle_timeout_s`, `agent.accept`."""
    value: Any = field(repr=False)
    text: str
    """As people may see it: without credentials."""
    source: str
    """`default`, a file with its line, `environment NAME`, or `option --name`."""
    beaten: tuple[tuple[str, str], ...] = ()
    """Source and text of the places that set it too and gave way, the strongest first."""
    live: bool = False

    def as_json(self) -> dict[str, Any]:
        """The same for `json.dumps`; a secret and a path as text."""
        plain = isinstance(self.value, bool | int | float | dict | None) or type(self.value) is str
        value = list(self.value) if isinstance(self.value, tuple) else self.value if plain else self.text
        beaten = [{"source": source, "value": text} for source, text in self.beaten]
        return {"name": self.name, "value": value, "source": self.source, "live": self.live, "beaten": beaten}


@frozen(kw_only=True)
class Loaded:
    """A configuration with its history."""

    config: AppConfig
    values: tuple[Value, ...]
    """Every setting, in the order of the classes."""
    files: tuple[Path, ...]
    """The files that were read, the weakest first."""
    problems: tuple[ConfigError, ...] = ()
    """What could not be used, where it was asked to go on."""


def app_fields() -> dict[str, attrs.Attribute[Any]]:
    """Every setting by the name that files give it."""
    fields = dict(attrs.fields_dict(GPUResourceConfig))
    for section in OTHER_SECTIONS:
        fields |= {f"{section}.{name}": a for name, a in attrs.fields_dict(_SECTIONS[section]).items()}
    return fields


def app_settings_table() -> tuple[Setting, ...]:
    """Every setting of all sections."""
    standard = AppConfig()
    return tuple(
        line
        for section in _SECTIONS
        for line in describe(getattr(standard, section), "" if section == "gpu" else section)
    )


def user_file() -> Path:
    """The user's own settings file, which need not exist."""
    import platformdirs

    return platformdirs.user_config_path(SECTION, appauthor=False) / FILE_NAME


def found_files(folder: Path) -> tuple[Path, ...]:
    """The files that are read where none is named, the weakest first: the system's, the user's, those in `folder`."""
    import platformdirs

    dirs = platformdirs.PlatformDirs(SECTION, appauthor=False, multipath=True)
    # A relative one means that nobody's home is known; the current folder must not stand in for it.
    places = [place / FILE_NAME for place in reversed(list(dirs.iter_config_paths())) if place.is_absolute()]
    places += [folder / "pyproject.toml", folder / FILE_NAME]
    return tuple(dict.fromkeys(place for place in places if place.is_file()))


def load_app_config(
    path: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[str, Any] | None = None,
    *,
    override_source: Callable[[str], str] = lambda _name: "argument",
    folder: Path | None = None,
    go_on: bool = False,
) -> Loaded:
    """Make the configuration of a program: defaults < files < environment < `overrides`.

    `path`, or else `GPU_FSM_CONFIG`, names the only file to read.  Without one these are, in rising order: the
    system's and the user's `gpu-fsm.toml` (on Linux below `/etc/xdg` and `~/.config`), then `pyproject.toml` with
    `[tool.gpu-fsm]` and `gpu-fsm.toml` in `folder`, the current one if None.  What lies in `folder` unasked must leave
    alone what `PROTECTED` tells.

    `overrides` are values by setting (`idle_timeout_s`, `agent.accept`).  Raises `ConfigError` for the first thing
    that cannot be used; with `go_on` it takes the next best instead and lists them all under `problems`.
    """
    fields, problems = app_fields(), _Problems(go_on)
    layers: list[Layer] = []
    named = path or (Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None)
    folder = folder or Path.cwd()
    files = []
    for file in (named,) if named else found_files(folder):
        found = tuple(_from_file(file, fields, problems, trusted=named is not None or file.parent != folder))
        layers += found
        if found or file.name != "pyproject.toml":
            files.append(file)
    ollamas_own, ours = {"OLLAMA_HOST"}, {name for name in environ if name != "OLLAMA_HOST"}
    for variable in (*ollamas_own, *sorted(ours)):
        with problems:
            layers.append(from_environment({variable: environ.get(variable, "")}, fields))
    for name, value in (overrides or {}).items():
        with problems:
            layers.append(from_overrides({name: value}, fields, override_source))
    if go_on:  # the values that gave way too
        layers = [layer for layer in layers if _is_sound(layer, fields, problems)]
    return _assemble(layers, tuple(files), problems)


class _Problems:
    """A `with` block that notes a `ConfigError` and goes on, or lets it pass."""

    def __init__(self, go_on: bool) -> None:
        self._go_on = go_on
        self.found: list[ConfigError] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: object) -> bool:
        if isinstance(error, ConfigError):
            self.found.append(error)
        return self._go_on and isinstance(error, ConfigError)


def _from_file(file: Path, fields: Fields, problems: _Problems, *, trusted: bool) -> Iterator[Layer]:
    table: dict[str, Any] = {}
    with problems:
        table = read_table(file, fields, optional=not trusted)
    lines = _lines_of(file) if table else {}
    for section in ("", *OTHER_SECTIONS):
        prefix = f"{section}." if section else ""
        inner = table.pop(section, {}) if section else {k: v for k, v in table.items() if k not in OTHER_SECTIONS}
        if not isinstance(inner, dict):
            with problems:
                raise ConfigError(
                    name=section,
                    source=one_line(file),
                    detail="it is a table, not a value",
                    remedy=f"Write [{SECTION}.{section}] on a line of its own.",
                )
            continue
        for key, value in inner.items():
            line = lines.get(prefix + key)
            source = one_line(file) + (f":{line}" if line else "")
            with problems:
                if prefix + key == "gpu":
                    raise ConfigError(
                        name="gpu",
                        source=source,
                        detail="there is no such section",
                        remedy=f"The settings of the card and the VLM stand straight under [{SECTION}].",
                    )
                layer = from_table({key: value}, fields, source, prefix)
                if not trusted and (prefix + key in PROTECTED or section == "gateway"):
                    raise ConfigError(
                        name=prefix + key,
                        source=source,
                        detail="a file that only lies in the current folder may not set this",
                        remedy=f"Put it into {one_line(user_file())}, or name the file with --config.",
                    )
                yield layer


def _lines_of(file: Path) -> dict[str, int]:
    """On which line each setting stands; without those that cannot be told by a plain look."""
    seen: dict[str, list[int]] = {}
    inside, prefix = False, ""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if header := re.match(r"\s*\[\s*(?:tool\s*\.\s*)?([A-Za-z0-9_.-]+)\s*\]", line):
            section, _, inner = header[1].partition(".")
            inside, prefix = section == SECTION, f"{inner}." if inner else ""
        elif inside and (key := re.match(r"\s*([A-Za-z0-9_.-]+)\s*=", line)):
            seen.setdefault(prefix + key[1], []).append(number)
    return {name: numbers[0] for name, numbers in seen.items() if len(numbers) == 1}


def _is_sound(layer: Layer, fields: Fields, problems: _Problems) -> bool:
    """Whether each value is possible by itself, whatever other places say."""
    before = len(problems.found)
    for name, value in layer.values.items():
        rule: Rule = fields[name].metadata["rule"]
        with problems:
            try:
                rule.check(value)
            except Wrong as wrong:
                raise ConfigError(
                    name=name,
                    value=show(value, rule),
                    bound=wrong.bound,
                    source=layer.sources[name],
                    remedy=wrong.remedy,
                ) from None
    return len(problems.found) == before


def _assemble(layers: list[Layer], files: tuple[Path, ...], problems: _Problems) -> Loaded:
    merged = merge(AppConfig, [_nested(layer.values) for layer in layers])
    sources = {name: source for layer in layers for name, source in layer.sources.items()}
    sections: dict[str, Any] = {}
    for section, cls in _SECTIONS.items():
        with problems:
            try:
                sections[section] = cls(**merged[section])
            except ConfigError as wrong:
                name = _named(section, wrong.name)
                raise attrs.evolve(wrong, name=name, source=sources.get(name, "default")) from None
    config = AppConfig(**sections)
    values = []
    for section in _SECTIONS:
        holder = getattr(config, section)
        for a in attrs.fields(type(holder)):
            name = _named(section, a.name)
            rule: Rule = a.metadata["rule"]
            said = [(layer.sources[name], _text(layer.values[name], rule)) for layer in layers if name in layer.values]
            held = getattr(holder, a.name)
            values.append(
                Value(
                    name=name,
                    value=held,
                    text=_text(held, rule),
                    source=said[-1][0] if said else "default",
                    beaten=tuple(reversed(said[:-1])),
                    live=a.metadata["live"],
                )
            )
    return Loaded(config=config, values=tuple(values), files=files, problems=tuple(problems.found))


class Reloader:
    """Reads the settings of a running program again and hands on what changed; a callable.

    `takers`, by section, are called with the section's new settings where they differ; other sections are not this
    program's and are passed over.  From any thread, one at a time.
    """

    def __init__(self, config: AppConfig, read: Callable[[], AppConfig], **takers: Callable[[Any], object]) -> None:
        self._config = config
        self._read = read
        self._takers = takers
        self._lock = threading.Lock()

    def __call__(self) -> dict[str, Any]:
        """Return what changed, by setting.

        Raises `ConfigError`, and hands on nothing, for settings that cannot be used, and for one that cannot change
        under way, with the reason.
        """
        with self._lock:
            new = self._read()
            found = {section: self._changes(section, new) for section in self._takers}
            for section, differing in found.items():
                if differing:
                    self._takers[section](getattr(new, section))
            self._config = new
        return {_named(section, name): value for section, there in found.items() for name, value in there.items()}

    def _changes(self, section: str, new: AppConfig) -> dict[str, Any]:
        try:
            return changes(getattr(self._config, section), getattr(new, section))
        except ConfigError as wrong:
            name = _named(section, wrong.name)
            why = _FIXED.get(name) or _FIXED.get(section)
            detail = f"it cannot change under way: {why}" if why else wrong.detail
            raise attrs.evolve(wrong, name=name, detail=detail) from None


_FIXED = {
    "agent.index_path": "what this run remembers is in the file it began with",
    "agent.labels": "the answers that are kept and remembered have the labels of before",
    "agent.prompt": "the answers that are kept and remembered were given to the one of before",
    "control": "the socket is open already",
    "gateway": "its clients are being served by it",
}
"""Why a setting of these sections is not `live`."""


def _named(section: str, name: str) -> str:
    return name if section == "gpu" else f"{section}.{name}"


def _nested(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, dot, inner = name.partition(".")
        tables.setdefault(section if dot else "gpu", {})[inner if dot else name] = value
    return tables


def _text(value: object, rule: Rule) -> str:
    """A value in its normal form, as people may see it."""
    try:
        return as_text(rule.check(value))
    except Wrong:
        return show(value, rule)


__all__ = [
    "FILE_NAME",
    "PROTECTED",
    "AgentConfig",
    "AppConfig",
    "ControlConfig",
    "GatewayConfig",
    "Loaded",
    "Reloader",
    "Value",
    "app_fields",
    "app_settings_table",
    "found_files",
    "load_app_config",
    "user_file",
]
