"""Rules: what the value of a setting must be, how text becomes one, and how it may be shown.

A settings class is frozen, made of the fields below, and calls `check_all` in its `__attrs_post_init__`.  Every rule
refuses with what the value must be; the class or the loader adds the name and the source.
"""

from __future__ import annotations

import difflib
import json
import math
import numbers
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import attrs
from attrs import field, frozen

from gpu_fsm.errors import ConfigError, one_line

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
        return redact(self.reveal())

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


def redact(text: str) -> str:
    """Hide what stands before the last `@`, and a URL's query; works on text that is no URL too."""
    text = re.sub(r"\A(\s*[A-Za-z][A-Za-z0-9+.-]*://)?.*@", lambda m: (m[1] or "") + "***@", text, flags=re.DOTALL)
    return re.sub(r"[?#].*", "?***", text, flags=re.DOTALL) if "://" in text else text


class Secret(str):
    """A text that is kept whole and never shown: `repr`, `str`, `format` and `%s` give `***`.

    Not covered, because they read the text: concatenation, `json.dumps`.  `reveal()` gives it.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        return super().__new__(cls, str.__str__(text))

    def reveal(self) -> str:
        """The text itself."""
        return str.__str__(self)

    def __repr__(self) -> str:
        return "'***'"

    def __str__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return format("***", spec)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reveal(),)


# --- rules ------------------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """A rule refuses a value: what it must be, perhaps why and how to mend it.

    The settings class or the loader makes a `ConfigError` of it.
    """

    def __init__(self, bound: str, *, remedy: str = "") -> None:
        super().__init__(bound)
        self.bound = bound
        self.remedy = remedy


class Rule(Protocol):
    """What a value must be."""

    @property
    def bound(self) -> str:
        """What a value must be, to follow "is not"."""

    def check(self, value: Any) -> Any:
        """Return the value in its normal form or raise `Wrong`."""

    def parse(self, text: str) -> Any:
        """Read text from the environment or the command line; `check` comes after."""


@frozen
class Number:
    """A number of seconds or MiB."""

    unit: str
    most: float
    zero: bool = False

    @property
    def bound(self) -> str:
        return f"a number of {self.unit} {'from 0' if self.zero else 'above 0'}, at most {self.most:.0f}"

    def check(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise Wrong(self.bound)
        try:
            number = float(value)
        except (OverflowError, ValueError):
            raise Wrong(self.bound) from None
        if not math.isfinite(number) or number > self.most or number < 0 or (number == 0 and not self.zero):
            raise Wrong(self.bound)
        return number + 0.0  # -0.0 becomes 0.0

    def parse(self, text: str) -> float:
        try:
            return float(text.replace("_", "?"))  # Python would read 1_0 as ten
        except ValueError:
            raise Wrong(self.bound) from None


@frozen
class Count:
    """A whole number between two others, both allowed."""

    least: int
    most: int

    @property
    def bound(self) -> str:
        return f"a whole number from {self.least} to {self.most}"

    def check(self, value: Any) -> int:
        if isinstance(value, bool):
            raise Wrong(self.bound)
        try:
            number = operator.index(value)
        except TypeError:
            raise Wrong(self.bound) from None
        if not self.least <= number <= self.most:
            raise Wrong(self.bound)
        return number

    def parse(self, text: str) -> int:
        if not re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", text):
            raise Wrong(self.bound)
        return int(text)


@frozen
class Flag:
    """True or false; words for them from the environment."""

    bound: str = "true or false"

    def check(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise Wrong(self.bound)
        return value

    def parse(self, text: str) -> bool:
        word = text.strip().casefold()
        if word in ("true", "yes", "on", "1"):
            return True
        if word in ("false", "no", "off", "0"):
            return False
        raise Wrong(self.bound)


@frozen
class Word:
    """One of some words."""

    words: tuple[str, ...]

    @property
    def bound(self) -> str:
        return f"one of {', '.join(self.words)}"

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise Wrong(self.bound, remedy=did_you_mean(value, self.words))
        return value

    def parse(self, text: str) -> str:
        return text


@frozen
class Fraction:
    """A number between two others, both allowed."""

    least: float
    most: float
    optional: bool = False

    @property
    def bound(self) -> str:
        return f"a number from {self.least:g} to {self.most:g}{', or none' if self.optional else ''}"

    def check(self, value: Any) -> float | None:
        if self.optional and _is_none(value):
            return None
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise Wrong(self.bound)
        number = float(value)
        if not self.least <= number <= self.most:  # NaN is neither
            raise Wrong(self.bound)
        return number + 0.0

    def parse(self, text: str) -> Any:
        if self.optional and _is_none(text):
            return None
        try:
            return float(text.replace("_", "?"))
        except ValueError:
            raise Wrong(self.bound) from None


@frozen
class Text:
    """A text that `checker` takes and puts into its normal form."""

    bound: str
    checker: Callable[[str], str]
    optional: bool = False
    secret: bool = False
    """No error may show it."""

    def check(self, value: Any) -> str | None:
        if self.optional and _is_none(value):
            return None
        if not isinstance(value, str):
            raise Wrong(self.bound)
        return self.checker(value)

    def parse(self, text: str) -> str:
        return text


@frozen
class Place:
    """A file's place, or none; `~` is the home folder."""

    bound: str = "the path of a file, or none"

    def check(self, value: Any) -> Path | None:
        if _is_none(value):
            return None
        text = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
        if not isinstance(text, str) or not text.strip() or not text.isprintable():
            raise Wrong(self.bound)
        try:
            return Path(text).expanduser()
        except RuntimeError:  # nobody's home
            raise Wrong("a path whose home folder is known") from None

    def parse(self, text: str) -> str:
        return text


@frozen
class Texts:
    """Several texts: a list in TOML and JSON, separated by commas elsewhere."""

    bound: str
    checker: Callable[[str], str]

    def check(self, value: Any) -> tuple[str, ...]:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise Wrong(self.bound)
        if not all(isinstance(text, str) for text in value):
            raise Wrong(self.bound)
        return tuple(dict.fromkeys(self.checker(text) for text in value))

    def parse(self, text: str) -> Any:
        if text.lstrip().startswith("["):
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                raise Wrong(self.bound) from None
        return [part.strip() for part in text.split(",") if part.strip()]


@frozen
class Options:
    """A table with JSON values, copied."""

    bound: str = "a table of runner options with JSON values"

    def check(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
            raise Wrong(self.bound)
        try:
            # The trip through JSON is what will happen to it on the wire, and makes the copy that nobody else holds.
            copy: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            raise Wrong(self.bound) from None
        return copy

    def parse(self, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise Wrong('a JSON object, such as {"num_ctx": 4096}') from None


def _is_none(value: object) -> bool:
    # TOML has no null, and neither has the environment.
    return value is None or (isinstance(value, str) and value.strip().casefold() == "none")


def printable(text: str) -> str:
    """Check a text for one line, not empty."""
    if not text.strip() or not text.isprintable():
        raise Wrong("a name on one line, not empty")
    return text


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """A question that names the nearest known word, or nothing."""
    if not isinstance(value, str):
        return ""
    by_folded = {word.casefold(): word for word in known}
    near = difflib.get_close_matches(value.casefold(), by_folded, n=1, cutoff=0.5)
    return f"Did you mean {by_folded[near[0]]}?" if near else ""


def show(value: object, rule: Rule | None = None) -> str:
    """A value as an error may show it: short, on one line, without credentials."""
    if isinstance(rule, Text) and rule.secret:
        return "***"
    return one_line(repr(redact(value) if isinstance(value, str) else value), 80)


# --- fields -----------------------------------------------------------------------------------------------------------


def setting(default: Any, rule: Rule, about: str, *, live: bool = False) -> Any:
    """A field of a settings class; `live` if a running program may be given another value."""
    # No attrs converter: typed-settings would call it, alone and out of place.  `check_all` checks.
    return field(default=default, metadata={"rule": rule, "about": about, "live": live})


def seconds(default: float, about: str, *, zero: bool = False, live: bool = False) -> Any:
    """A number of seconds, above 0 or from 0."""
    return setting(default, Number("seconds", _LONGEST_S, zero), about, live=live)


def mib(default: float, about: str, *, zero: bool = False, live: bool = False) -> Any:
    """A number of MiB, above 0 or from 0."""
    return setting(default, Number("MiB", _MOST_MIB, zero), about, live=live)


def count(default: int, least: int, most: int, about: str, *, live: bool = False) -> Any:
    """A whole number between two others, both allowed."""
    return setting(default, Count(least, most), about, live=live)


def word(default: str, words: tuple[str, ...], about: str, *, live: bool = False) -> Any:
    """One of some words."""
    return setting(default, Word(words), about, live=live)


def flag(default: bool, about: str, *, live: bool = False) -> Any:
    """True or false."""
    return setting(default, Flag(), about, live=live)


def options(about: str) -> Any:
    """A table with JSON values, copied."""
    return field(factory=dict, metadata={"rule": Options(), "about": about, "live": False})


def check_all(settings: Any) -> None:
    """Put every value of a frozen settings object into its normal form.  Raises `ConfigError` for the first bad one."""
    for attribute in attrs.fields(type(settings)):
        rule: Rule = attribute.metadata["rule"]
        given = getattr(settings, attribute.name)
        try:
            value = rule.check(given)
        except Wrong as wrong:
            raise ConfigError(
                name=attribute.name, value=show(given, rule), bound=wrong.bound, remedy=wrong.remedy
            ) from None
        object.__setattr__(settings, attribute.name, value)  # frozen for others: the normal form replaces the given


def as_text(value: object) -> str:
    """A value as tables and the command line show it; a secret as `***`."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return json.dumps(value) if isinstance(value, dict) else str(value)
