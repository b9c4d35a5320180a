"""Settings: every bad value is refused with the name, the value, the bound and the source."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_fsm.errors import ConfigError
from gpu_fsm.settings import (
    GPUResourceConfig,
    SecretURL,
    load_config,
    parse_ollama_host,
    settings_table,
)

pytestmark = pytest.mark.core

SECRET = "s3cret-canary"
FIELDS = attrs.fields_dict(GPUResourceConfig)
NUMBERS = [name for name, field in FIELDS.items() if isinstance(field.default, float)]
COUNTS = [
    name for name, field in FIELDS.items() if isinstance(field.default, int) and not isinstance(field.default, bool)
]
FLAGS = [name for name, field in FIELDS.items() if isinstance(field.default, bool)]
WORDS = ["on_partial_offload", "on_shortage", "on_close"]


def refusal(**values: Any) -> ConfigError:
    """Construct with `values` and return the error that must come."""
    with pytest.raises(ConfigError) as caught:
        GPUResourceConfig(**values)
    return caught.value


def load_refusal(path: Path | None = None, environ: Mapping[str, str] | None = None, **overrides: Any) -> ConfigError:
    """Load and return the error that must come."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ or {}, overrides)
    return caught.value


def write(folder: Path, text: str, name: str = "gpu-fsm.toml") -> Path:
    """Write a settings file."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# --- construction ----------------------------------------------------------------------------------------------------


def test_the_defaults_are_valid_and_need_no_environment() -> None:
    """Loading from nothing gives what constructing with nothing gives."""
    assert load_config(environ={}) == GPUResourceConfig()


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_finite_in_bounds_and_a_number(name: str) -> None:
    """NaN, infinities, negatives, bools, texts and absurd figures are refused by name."""
    for bad in (math.nan, math.inf, -math.inf, -1, -0.001, True, "5", None, 10**400, 1e300, [1.0]):
        error = refusal(**{name: bad})
        assert (error.name, error.source) == (name, "argument"), bad
        assert error.value
        assert error.bound


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_a_whole_number(name: str) -> None:
    """A bool, a fraction (3.0 too), a text, a negative or an absurd count is refused."""
    for bad in (True, 2.5, 3.0, "3", -1, 10**30, None, math.nan):
        assert refusal(**{name: bad}).name == name, bad


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_true_or_false_and_nothing_like_it(name: str) -> None:
    """1, 0 and words are refused where a bool is asked."""
    for bad in (1, 0, "true", "", None):
        assert refusal(**{name: bad}).name == name, bad


@pytest.mark.parametrize("name", WORDS)
def test_an_unknown_word_is_refused_with_the_nearest_known_one(name: str) -> None:
    """A typo names what was probably meant, and the bound lists all words."""
    known = FIELDS[name].default
    error = refusal(**{name: known[:-1]})
    assert known in error.bound
    assert error.remedy == f"Did you mean {known}?"
    for bad in ("", known.upper(), None, 1):
        assert refusal(**{name: bad}).name == name


@given(name=st.sampled_from(NUMBERS), value=st.floats(allow_nan=True, allow_infinity=True))
def test_whatever_float_is_given_the_config_holds_a_usable_one_or_refuses(name: str, value: float) -> None:
    """No float slips through: what is accepted is finite and not negative, and nothing but ConfigError is raised."""
    try:
        config = GPUResourceConfig(**{name: value})
    except ConfigError:
        return
    held = getattr(config, name)
    assert type(held) is float
    assert math.isfinite(held)
    assert math.copysign(1.0, held) == 1.0


def test_whole_numbers_are_taken_for_seconds_and_mib() -> None:
    """300 seconds are 300.0 seconds."""
    held = GPUResourceConfig(idle_timeout_s=300).idle_timeout_s
    assert (held, type(held)) == (300.0, float)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ("retry_base_s", "retry_cap_s"),
        ("recover_base_s", "recover_cap_s"),
        ("settle_poll_s", "settle_timeout_s"),
        ("floor_mib", "reserve_mib"),
    ],
)
def test_a_lower_bound_above_its_upper_bound_is_refused(low: str, high: str) -> None:
    """Pairs must be in order; the message names both."""
    error = refusal(**{low: 9.0, high: 8.0})
    assert error.name == low
    assert high in error.bound
    GPUResourceConfig(**{low: 8.0, high: 8.0})


def test_runner_options_are_copied_and_must_be_json() -> None:
    """The config keeps its own copy; what JSON cannot carry is refused."""
    mine = {"num_ctx": 4096, "stop": ["a"]}
    config = GPUResourceConfig(vlm_options=mine)
    mine["stop"].append("b")  # type: ignore[attr-defined]
    assert config.vlm_options == {"num_ctx": 4096, "stop": ["a"]}
    for bad in ({"a": math.nan}, {1: 2}, {"": 1}, {"a": object()}, [("a", 1)], "{}", None):
        assert refusal(vlm_options=bad).name == "vlm_options"


@pytest.mark.parametrize("bad", ["", "  ", "a\nb", 5, True])
def test_clip_model_is_a_printable_name_or_none(bad: object) -> None:
    """An empty name or one over two lines is refused."""
    assert refusal(clip_model=bad).name == "clip_model"


def test_the_word_none_stands_for_none_where_none_is_possible() -> None:
    """TOML and the environment have no null."""
    assert GPUResourceConfig(clip_model="none", gpu_uuid="None").clip_model is None
    assert load_config(environ={"GPU_FSM_CLIP_MODEL": "none"}).clip_model is None


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "mps", "xpu:1"])
def test_torch_devices_are_accepted(device: str) -> None:
    """The names torch uses."""
    assert GPUResourceConfig(clip_device=device).clip_device == device


@pytest.mark.parametrize("device", ["", "GPU", "cuda0", "cuda:", "cuda:x", "cpu "])
def test_what_is_no_device_is_refused(device: str) -> None:
    """Typos are told before torch is even imported."""
    assert refusal(clip_device=device).name == "clip_device"


# --- model names: rows of what Ollama's own package prints -----------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "llava",
        "llava:7b",
        "LLaVA:7B",
        "user/llava",
        "hf.co/user/Repo-GGUF:Q4_K_M",
        "registry.ollama.ai/library/llava:latest",
        "localhost:5000/me/llava",
    ],
)
def test_a_name_that_ollama_calls_valid_is_accepted(name: str) -> None:
    """As recorded."""
    assert GPUResourceConfig(vlm_model=name).vlm_model == name


@pytest.mark.parametrize("name", ["a b", "", "llava:", ":x", "qwen2.5vl:7b@sha256:abc", "a//b", "../x", "-x", "x\n"])
def test_a_name_that_ollama_calls_invalid_is_refused(name: str) -> None:
    """As recorded, and a few that are worse."""
    assert refusal(vlm_model=name).name == "vlm_model"


@pytest.mark.parametrize("name", ["qwen3-vl:cloud", "gpt-oss:120b-cloud", "X:CLOUD"])
def test_a_cloud_model_is_refused(name: str) -> None:
    """It uses none of the card and cannot be unloaded."""
    assert "on this card" in refusal(vlm_model=name).bound


# --- addresses -------------------------------------------------------------------------------------------------------

RECORDED_HOSTS = [
    # OLLAMA_HOST, the URL to which Ollama's own client would connect
    ("", "http://127.0.0.1:11434"),
    ("1.2.3.4", "http://1.2.3.4:11434"),
    ("1.2.3.4:5", "http://1.2.3.4:5"),
    ("0.0.0.0", "http://127.0.0.1:11434"),
    ("0.0.0.0:8080", "http://127.0.0.1:8080"),
    ("::1", "http://[::1]:11434"),
    ("[::1]", "http://[::1]:11434"),
    ("[::1]:5", "http://[::1]:5"),
    ("[::]", "http://[::1]:11434"),
    ("example.com", "http://example.com:11434"),
    ("example.com:56", "http://example.com:56"),
    ("http://example.com", "http://example.com:80"),
    ("https://example.com", "https://example.com:443"),
    ("https://example.com:56", "https://example.com:56"),
    ("http://example.com/ollama", "http://example.com:80/ollama"),
    ("example.com/ollama", "http://example.com:11434/ollama"),
    ("example.com:99999", "http://example.com:11434"),
    ("example.com:abc", "http://example.com:11434"),
    ("'1.2.3.4:5'", "http://1.2.3.4:5"),
    (" 1.2.3.4 ", "http://1.2.3.4:11434"),
    ("ollama.com", "https://ollama.com:443"),
    # Ollama keeps an empty host, which Go dials as this machine, and the scheme as it was typed
    (":5", "http://127.0.0.1:5"),
    (":", "http://127.0.0.1:11434"),
    ("HTTP://x", "http://x:11434"),
]


@pytest.mark.parametrize(("text", "url"), RECORDED_HOSTS)
def test_ollama_host_is_read_as_ollama_reads_it(text: str, url: str) -> None:
    """Every row of the recording."""
    assert parse_ollama_host(text) == url


@pytest.mark.parametrize("text", ["example.com:99999", "example.com:abc", "http://h:-1", "h:0"])
def test_a_port_that_is_none_is_replaced_with_a_warning(text: str, caplog: pytest.LogCaptureFixture) -> None:
    """Lenient as Ollama, but not silent."""
    with caplog.at_level(logging.WARNING, logger="gpu_fsm"):
        parse_ollama_host(text)
    assert ["its port is not a number" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("text", "url"), [row for row in RECORDED_HOSTS if "99999" not in row[0] and "abc" not in row[0]]
)
def test_a_good_ollama_host_warns_of_nothing(text: str, url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A warning means something."""
    with caplog.at_level(logging.DEBUG, logger="gpu_fsm"):
        assert parse_ollama_host(text) == url
    assert caplog.records == []


@pytest.mark.parametrize(
    "text", ["ftp://x", "unix:///run/o.sock", "file:///etc/passwd", "h\n", "h\x00i", "a b", "h\r\nX: y:1"]
)
def test_an_ollama_host_that_cannot_be_meant_is_refused(text: str) -> None:
    """Other schemes and control characters, which Ollama lets pass."""
    if text == "h\n":
        assert parse_ollama_host(text) == "http://h:11434"  # surrounding white space goes, as in Ollama
        return
    with pytest.raises(ConfigError) as caught:
        parse_ollama_host(text)
    assert caught.value.source == "environment OLLAMA_HOST"


@given(st.text(max_size=40))
def test_no_ollama_host_ends_in_anything_but_a_url_or_a_config_error(text: str) -> None:
    """And what is accepted is accepted again as it stands."""
    try:
        url = parse_ollama_host(text)
    except ConfigError:
        return
    assert parse_ollama_host(url.reveal()).reveal() == url.reveal()
    assert GPUResourceConfig(ollama_url=url, allow_remote=True).ollama_url == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:11434",
        "localhost:11434",
        "ftp://127.0.0.1",
        "http:127.0.0.1",
        "http://",
        "http:///x",
        "http://h:0",
        "http://h:65536",
        "http://h:x",
        "http://h/#frag",
        "http://h/?q=1",
        "http://h/\n",
        "http://h\t/",
        " http://h",
        "http://h\\@evil",
        "http://a@b@c",
        "http://[::1",
        "http://[::1%25lo]",
        "http://h\u00e9",
        "http://169.254.169.254",
        "http://169.254.0.1:11434",
        "http://[fe80::1]",
        "http://[::ffff:169.254.169.254]",
        "http://[::ffff:a9fe:a9fe]",
        "http://[64:ff9b::a9fe:a9fe]",
        "http://[2002:a9fe:a9fe::1]",
        "http://[fd00:ec2::254]",
        "http://100.100.100.200",
        "http://metadata.google.internal",
        "http://metadata.google.internal.",
        "http://224.0.0.1",
        "http://2130706433",
        "http://0x7f.0.0.1",
        "http://0177.0.0.1",
        "http://127.1",
        "http://1.2.3.4.5",
        5,
        None,
        b"http://h",
    ],
)
def test_what_is_no_address_of_an_ollama_server_is_refused_even_with_allow_remote(url: object) -> None:
    """Other schemes, control characters, fragments, ambiguous notations, link-local and metadata addresses."""
    assert refusal(ollama_url=url, allow_remote=True).name == "ollama_url"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1", "http://127.9.9.9:1", "http://localhost:11434/p", "https://[::1]:5", "http://LOCALHOST"]
)
def test_this_machine_needs_no_permission(url: str) -> None:
    """Loopback in any of its forms."""
    assert GPUResourceConfig(ollama_url=url).ollama_url.lower() == url.lower()


@pytest.mark.parametrize(
    "url", ["http://example.com", "http://10.0.0.5:11434", "http://[2001:db8::1]", "http://localhost.example.com"]
)
def test_another_machine_needs_allow_remote(url: str) -> None:
    """Screenshots are sent there, so it must have been meant."""
    assert "allow_remote" in refusal(ollama_url=url).remedy
    assert GPUResourceConfig(ollama_url=url, allow_remote=True).ollama_url == url


@pytest.mark.parametrize(
    ("given_url", "held"), [("http://0.0.0.0:5/", "http://127.0.0.1:5"), ("http://[::]", "http://[::1]")]
)
def test_an_address_to_bind_to_becomes_one_to_connect_to(given_url: str, held: str) -> None:
    """0.0.0.0 means everywhere to a server and nothing to a client; a slash at the end goes."""
    assert GPUResourceConfig(ollama_url=given_url).ollama_url == held


# --- credentials -----------------------------------------------------------------------------------------------------


def test_a_url_made_of_a_url_keeps_its_credentials() -> None:
    """A copy of the settings checks its values again, and what it is given is a SecretURL then."""
    whole = f"http://user:{SECRET}@127.0.0.1:11434"
    assert SecretURL(SecretURL(whole)).reveal() == whole
    once = GPUResourceConfig(ollama_url=whole)
    twice = attrs.evolve(once, idle_timeout_s=5.0)
    assert isinstance(twice.ollama_url, SecretURL)
    assert twice.ollama_url.reveal() == whole
    assert SECRET not in repr(twice)


def test_credentials_are_kept_for_the_client_and_never_shown() -> None:
    """`repr`, `str`, `format` and `%s` of URL and config hide them; the text itself is whole."""
    config = GPUResourceConfig(ollama_url=f"http://user:{SECRET}@127.0.0.1:11434")
    url = config.ollama_url
    assert isinstance(url, SecretURL)
    assert url.reveal() == f"http://user:{SECRET}@127.0.0.1:11434"
    assert type(url.reveal()) is str
    assert str(url) == "http://***@127.0.0.1:11434"
    for shown in (
        repr(config),
        str(config),
        repr(url),
        f"{url}",
        f"{url!s:>60}",
        f"{url!r}",
        "%s" % url,  # noqa: UP031 - the old way must be safe too
    ):
        assert SECRET not in shown
        assert "***" in shown


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: pickle.loads(pickle.dumps(x, 0))],
)
def test_copies_and_pickles_of_the_config_keep_the_url_whole_and_hidden(again: Any) -> None:
    """A copy is as good and as discreet as the original."""
    config = GPUResourceConfig(ollama_url=f"http://user:{SECRET}@127.0.0.1", vlm_options={"num_ctx": 1})
    twin = again(config)
    assert twin == config
    assert twin.ollama_url.reveal() == config.ollama_url.reveal()  # type: ignore[attr-defined]
    assert SECRET not in repr(twin)


@pytest.mark.parametrize(
    "url",
    [
        f"http://u:{SECRET}@example.com",
        f"ftp://u:{SECRET}@127.0.0.1",
        f"http://u:{SECRET}@[bad",
        f"http://u:{SECRET}@h:99999",
        f"u:{SECRET}@h",
        f"http://u:{SECRET}@x@127.0.0.1",
        f"http://127.0.0.1/?key={SECRET}",
        f"http://u:{SECRET} @127.0.0.1",
        f"http://u:{SECRET}\n@127.0.0.1",
        f"http:/u:{SECRET}@127.0.0.1",
        f"//u:{SECRET}@127.0.0.1",
    ],
)
def test_no_error_shows_the_credentials_of_a_url_it_refuses(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Not as an argument, not in a variable, not in OLLAMA_HOST, not in the log."""
    for error in (
        refusal(ollama_url=url),
        load_refusal(environ={"GPU_FSM_OLLAMA_URL": url}),
        load_refusal(environ={"OLLAMA_HOST": url}),
        load_refusal(ollama_url=url),
    ):
        assert SECRET not in str(error)
        assert SECRET not in repr(error)
        assert error.__cause__ is None
        assert error.__context__ is None or error.__suppress_context__
    assert SECRET not in caplog.text


# --- loading: precedence and sources ---------------------------------------------------------------------------------


def test_each_layer_wins_over_the_one_below(tmp_path: Path) -> None:
    """Defaults < TOML < OLLAMA_HOST < GPU_FSM_* < arguments."""
    path = write(tmp_path, '[gpu-fsm]\nollama_url = "http://127.0.0.1:1"\nidle_timeout_s = 1\nreserve_mib = 600\n')
    environ = {"OLLAMA_HOST": "127.0.0.1:2", "GPU_FSM_IDLE_TIMEOUT_S": "3"}
    config = load_config(path, environ)
    assert (config.ollama_url, config.idle_timeout_s, config.reserve_mib) == ("http://127.0.0.1:2", 3.0, 600.0)
    config = load_config(path, {**environ, "GPU_FSM_OLLAMA_URL": "http://127.0.0.1:4"}, {"idle_timeout_s": 5})
    assert (config.ollama_url, config.idle_timeout_s) == ("http://127.0.0.1:4", 5.0)
    assert config.stable_s == GPUResourceConfig().stable_s


def test_every_setting_can_come_from_the_environment_as_text() -> None:
    """The text of each default reads back as the default."""
    environ = {setting.variable: setting.default for setting in settings_table()}
    assert load_config(environ=environ) == GPUResourceConfig()


def test_every_setting_can_come_from_a_file(tmp_path: Path) -> None:
    """TOML's own types are taken as they are."""
    values = {name: getattr(GPUResourceConfig(), name) for name in FIELDS if name != "vlm_options"}
    lines = [f"{name} = {json.dumps('none' if value is None else value)}" for name, value in values.items()]
    path = write(tmp_path, "[gpu-fsm]\n" + "\n".join(lines) + "\n[gpu-fsm.vlm_options]\nnum_ctx = 8192\n")
    assert load_config(path, {}) == GPUResourceConfig(vlm_options={"num_ctx": 8192})


def test_a_pyproject_holds_the_settings_under_tool(tmp_path: Path) -> None:
    """`[tool.gpu-fsm]` beside other tools' sections."""
    path = write(tmp_path, "[project]\nname = 'x'\n[tool.gpu-fsm]\njournal_size = 7\n", "pyproject.toml")
    assert load_config(path, {}).journal_size == 7


def test_a_variable_may_name_the_file_and_no_file_is_taken_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPU_FSM_CONFIG does; a file that happens to lie in the current folder does not."""
    path = write(tmp_path, "[gpu-fsm]\njournal_size = 7\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(environ={}).journal_size == GPUResourceConfig().journal_size
    assert load_config(environ={"GPU_FSM_CONFIG": str(path)}).journal_size == 7


def test_an_empty_ollama_host_is_as_good_as_none() -> None:
    """As in Ollama."""
    assert load_config(environ={"OLLAMA_HOST": " "}) == GPUResourceConfig()


def test_gpu_fsm_ollama_url_saves_from_a_bad_ollama_host() -> None:
    """What wins is what is read."""
    environ = {"OLLAMA_HOST": "ftp://x", "GPU_FSM_OLLAMA_URL": "http://127.0.0.1:4"}
    assert load_config(environ=environ).ollama_url == "http://127.0.0.1:4"


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "", "five", "1_0", "0x10", "1,5"])
def test_a_bad_number_in_a_variable_names_the_variable(text: str) -> None:
    """Text that is no number, or a number out of bounds."""
    error = load_refusal(environ={"GPU_FSM_IDLE_TIMEOUT_S": text})
    assert (error.name, error.source) == ("idle_timeout_s", "environment GPU_FSM_IDLE_TIMEOUT_S")


@pytest.mark.parametrize("text", ["2.5", "true", "3.0", "1e0", "", "\u0663", "9" * 5000])
def test_a_count_in_a_variable_is_a_whole_number_in_digits(text: str) -> None:
    """typed-settings alone would take 2 for 2.5 and 1 for true."""
    assert load_refusal(environ={"GPU_FSM_VLM_LOAD_RETRIES": text}).name == "vlm_load_retries"


@pytest.mark.parametrize(("text", "value"), [("1", True), ("YES", True), ("on", True), ("false", False), ("0", False)])
def test_a_flag_in_a_variable_takes_the_usual_words(text: str, value: bool) -> None:
    """And nothing else."""
    assert load_config(environ={"GPU_FSM_ALLOW_REMOTE": text}).allow_remote is value
    assert load_refusal(environ={"GPU_FSM_ALLOW_REMOTE": text + "?"}).name == "allow_remote"


@pytest.mark.parametrize("text", ["", "[]", "4096", '{"num_ctx": NaN}', "{num_ctx: 1}", "[" * 100_000])
def test_runner_options_in_a_variable_are_a_json_object(text: str) -> None:
    """Broken JSON, other JSON and NaN are refused."""
    assert load_refusal(environ={"GPU_FSM_VLM_OPTIONS": text}).name == "vlm_options"
    assert load_config(environ={"GPU_FSM_VLM_OPTIONS": '{"num_ctx": 1}'}).vlm_options == {"num_ctx": 1}


def test_an_unknown_variable_is_refused_with_the_nearest_known_one() -> None:
    """A typo must not be a setting that is silently not set."""
    error = load_refusal(environ={"GPU_FSM_IDLE_TIMOUT_S": "3"})
    assert error.name == "GPU_FSM_IDLE_TIMOUT_S"
    assert error.remedy == "Did you mean GPU_FSM_IDLE_TIMEOUT_S?"


def test_an_unknown_argument_is_refused_with_the_nearest_known_one() -> None:
    """As a keyword of `load_config` too."""
    assert load_refusal(idle_timout_s=3).remedy == "Did you mean idle_timeout_s?"


def test_an_unknown_key_in_the_file_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    """typed-settings' own message names no neighbour."""
    path = write(tmp_path, "[gpu-fsm]\nidle_timout_s = 3\n")
    error = load_refusal(path)
    assert (error.name, error.source) == ("idle_timout_s", str(path))
    assert error.remedy == "Did you mean idle_timeout_s?"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("vlm_load_retries = true", "vlm_load_retries"),
        ("vlm_load_retries = 2.0", "vlm_load_retries"),
        ("idle_timeout_s = nan", "idle_timeout_s"),
        ("idle_timeout_s = '3'", "idle_timeout_s"),
        ("allow_remote = 1", "allow_remote"),
        ("allow_remote = 'yes'", "allow_remote"),
        ("vlm_model = ''", "vlm_model"),
        ("vlm_model = ['a']", "vlm_model"),
        ("vlm_model = 1979-05-27", "vlm_model"),
        ("on_close = 'leaf'", "on_close"),
        ("floor_mib = 9999", "floor_mib"),
    ],
)
def test_a_bad_value_in_the_file_names_the_file(tmp_path: Path, line: str, name: str) -> None:
    """TOML has types, so nothing is converted: a text is no number and a bool no count."""
    path = write(tmp_path, f"[gpu-fsm]\n{line}\n")
    error = load_refusal(path)
    assert (error.name, error.source) == (name, str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no section"),
        ("gpu-fsm = 3\n", "no section"),
        ("[gpufsm]\n", "Did you mean gpu-fsm?"),
        ("[tool.gpu-fsm]\n", "outside"),
        ("idle_timeout_s = 3\n[gpu-fsm]\n", "belongs under [gpu-fsm]"),
        ("[gpu-fsm\n", "cannot be read"),
        ("[gpu-fsm]\nx = 1\nx = 2\n", "cannot be read"),
    ],
)
def test_a_file_that_does_not_mean_us_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """A file without our section would otherwise be a file of no effect."""
    assert said in str(load_refusal(write(tmp_path, text)))


def test_a_pyproject_without_our_section_is_refused(tmp_path: Path) -> None:
    """It was named, so something in it was expected."""
    assert "[tool.gpu-fsm]" in str(load_refusal(write(tmp_path, "[tool.ruff]\n", "pyproject.toml")))
    assert "[tool.gpu-fsm]" in str(load_refusal(write(tmp_path, "tool = 1\n", "pyproject.toml")))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """Missing, a folder, not UTF-8."""
    (tmp_path / "latin1.toml").write_bytes(b"# \xe9\n[gpu-fsm]\n")
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "latin1.toml"):
        assert load_refusal(path).source == str(path)


def test_an_argument_is_named_as_the_caller_says() -> None:
    """The command line names its options."""
    with pytest.raises(ConfigError) as caught:
        load_config(environ={}, overrides={"journal_size": 0}, override_source=lambda name: f"option --{name}")
    assert caught.value.source == "option --journal_size"


@pytest.mark.parametrize("setting", settings_table(), ids=lambda setting: setting.name)
def test_every_setting_says_what_it_is_for_and_what_it_may_be(setting: Any) -> None:
    """The README's table and the command line's help are made of these."""
    assert len(setting.about) > 10
    assert setting.bound
