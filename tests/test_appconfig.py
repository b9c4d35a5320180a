"""The settings of a whole program: which place wins, where a value came from, what is refused, what stays secret."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_fsm.appconfig import (
    PROTECTED,
    AgentConfig,
    AppConfig,
    GatewayConfig,
    Loaded,
    Value,
    app_fields,
    app_settings_table,
    load_app_config,
    user_file,
)
from gpu_fsm.errors import ConfigError
from gpu_fsm.rules import Secret
from gpu_fsm.settings import OTHER_SECTIONS, GPUResourceConfig, load_config, settings_table

CANARY = "s3cret-canary-of-the-gateway"
PLACES = ("system", "user", "pyproject", "project", "environment", "option")
"""From the weakest to the strongest."""


class Home:
    """A system, a user and a current folder of the test's own."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here = root / "here"
        for name, variable in (("system", "XDG_CONFIG_DIRS"), ("user", "XDG_CONFIG_HOME")):
            (root / name / "gpu-fsm").mkdir(parents=True)
            monkeypatch.setenv(variable, str(root / name))
        self.here.mkdir()
        monkeypatch.chdir(self.here)
        self.files = {
            "system": root / "system" / "gpu-fsm" / "gpu-fsm.toml",
            "user": root / "user" / "gpu-fsm" / "gpu-fsm.toml",
            "pyproject": self.here / "pyproject.toml",
            "project": self.here / "gpu-fsm.toml",
        }

    def write(self, place: str, text: str) -> Path:
        """Write a settings file, its sections named as in `gpu-fsm.toml`."""
        if place == "pyproject":
            text = "[project]\nname = 'theirs'\n" + text.replace("[gpu-fsm", "[tool.gpu-fsm")
        self.files[place].write_text(text, encoding="utf-8")
        return self.files[place]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """Nobody's settings."""
    return Home(tmp_path, monkeypatch)


def value_of(loaded: Loaded, name: str) -> Value:
    """One setting with its history."""
    return next(value for value in loaded.values if value.name == name)


def refusal(environ: dict[str, str] | None = None, path: Path | None = None, **overrides: Any) -> ConfigError:
    """Load and return the error that must come."""
    with pytest.raises(ConfigError) as caught:
        load_app_config(path, environ or {}, overrides)
    return caught.value


# --- which place wins -------------------------------------------------------------------------------------------------


def test_from_nothing_come_the_defaults(home: Home) -> None:
    """And every value says so."""
    loaded = load_app_config(environ={})
    assert loaded.config == AppConfig()
    assert {value.source for value in loaded.values} == {"default"}
    assert loaded.files == ()


@pytest.mark.parametrize(
    ("section", "key", "name", "variable"),
    [
        ("[gpu-fsm]", "idle_timeout_s", "idle_timeout_s", "GPU_FSM_IDLE_TIMEOUT_S"),
        ("[gpu-fsm.agent]", "interval_s", "agent.interval_s", "GPU_FSM_AGENT_INTERVAL_S"),
    ],
)
def test_the_strongest_place_wins_and_the_others_are_told(
    section: str, key: str, name: str, variable: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whichever of the six places set a value: system, user, pyproject, gpu-fsm.toml, environment, option."""

    @settings(max_examples=30)
    @given(given_in=st.sets(st.sampled_from(PLACES)))
    def check(given_in: set[str]) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            home = Home(tmp_path_factory.mktemp("home"), monkeypatch)
            environ, overrides, origin = {}, {}, {}
            for number, place in enumerate(PLACES, 1):
                if place not in given_in:
                    continue
                if place == "environment":
                    environ[variable], origin[place] = str(number), f"environment {variable}"
                elif place == "option":
                    overrides[name], origin[place] = float(number), "argument"
                else:
                    file = home.write(place, f"{section}\n{key} = {number}\n")
                    origin[place] = f"{file}:{4 if place == 'pyproject' else 2}"
            loaded = load_app_config(environ=environ, overrides=overrides)
            ranked = [place for place in reversed(PLACES) if place in given_in]
            value = value_of(loaded, name)
            assert value.source == (origin[ranked[0]] if ranked else "default")
            if ranked:
                assert value.value == PLACES.index(ranked[0]) + 1
            assert value.beaten == tuple((origin[place], str(PLACES.index(place) + 1)) for place in ranked[1:])
            assert set(loaded.files) == {home.files[place] for place in given_in if place in home.files}

    check()


def test_a_named_file_is_the_only_one(home: Home, tmp_path: Path) -> None:
    """By argument or by GPU_FSM_CONFIG; what lies about is not looked at, be it ever so broken."""
    home.write("user", "[gpu-fsm]\nidle_timeout_s = 1\n")
    home.write("project", "this is no TOML")
    named = tmp_path / "mine.toml"
    named.write_text("[gpu-fsm]\npressure_s = 3\n", encoding="utf-8")
    for loaded in (load_app_config(named, {}), load_app_config(environ={"GPU_FSM_CONFIG": str(named)})):
        assert loaded.files == (named,)
        assert loaded.config.gpu == GPUResourceConfig(pressure_s=3)


def test_somebody_elses_pyproject_is_no_settings_file(home: Home) -> None:
    """One without our section is passed over."""
    home.write("pyproject", "[tool.other]\nx = 1\n")
    assert load_app_config(environ={}).files == ()


def test_every_setting_has_a_variable_and_an_option_of_its_own() -> None:
    """No two sections can be mistaken for each other."""
    table = app_settings_table()
    assert [setting.name for setting in table] == list(app_fields())
    assert len({setting.variable for setting in table}) == len({setting.option for setting in table}) == len(table)
    assert table[: len(settings_table())] == settings_table()


def test_ollama_host_gives_way_to_our_own_variable(home: Home) -> None:
    """And is told as what gave way."""
    loaded = load_app_config(environ={"OLLAMA_HOST": "127.0.0.1:1", "GPU_FSM_OLLAMA_URL": "http://127.0.0.1:2"})
    value = value_of(loaded, "ollama_url")
    assert (value.text, value.source) == ("http://127.0.0.1:2", "environment GPU_FSM_OLLAMA_URL")
    assert value.beaten == (("environment OLLAMA_HOST", "http://127.0.0.1:1"),)


def test_the_managers_own_loader_passes_over_the_other_sections(home: Home) -> None:
    """One file and one environment serve both; a typo of the manager's is still one."""
    path = home.write("project", "[gpu-fsm]\nidle_timeout_s = 9\n[gpu-fsm.agent]\naccept = 0.9\n")
    assert load_config(path, {"GPU_FSM_AGENT_ACCEPT": "0.8"}) == GPUResourceConfig(idle_timeout_s=9)
    with pytest.raises(ConfigError, match="GPU_FSM_AGENTS_ACCEPT"):
        load_config(None, {"GPU_FSM_AGENTS_ACCEPT": "0.8"})


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["pyproject", "project"])
@pytest.mark.parametrize(
    "text",
    [
        '[gpu-fsm]\nollama_url = "http://127.0.0.1:9"\n',
        "[gpu-fsm]\nallow_remote = true\n",
        "[gpu-fsm]\nallow_pickle_weights = true\n",
        '[gpu-fsm.gateway]\nlisten = "127.0.0.1:1"\n',
    ],
)
def test_a_file_that_only_lies_there_decides_nothing_that_matters(home: Home, place: str, text: str) -> None:
    """Not who gets the screenshots, nor what code runs; the same text in the user's file or a named one is heeded."""
    path = home.write(place, text)
    error = refusal()
    assert "only lies in the current folder" in str(error)
    assert str(user_file()) in error.remedy
    assert load_app_config(path, {}).config != AppConfig()
    path.unlink()
    home.write("user", text)
    assert load_app_config(environ={}).config != AppConfig()


def test_what_is_protected_exists() -> None:
    """A setting that is renamed stays protected."""
    assert set(app_fields()) >= PROTECTED


@pytest.mark.parametrize(
    ("text", "name", "line", "said"),
    [
        ("[gpu-fsm]\n\nidle_timout_s = 3\n", "idle_timout_s", 3, "Did you mean idle_timeout_s?"),
        ("[gpu-fsm.agent]\nacept = 3\n", "agent.acept", 2, "Did you mean agent.accept?"),
        ("[gpu-fsm.agent]\naccept = 3\n", "agent.accept", 2, "a number from -1 to 1"),
        ("[gpu-fsm]\nagent = 3\n", "agent", None, "it is a table"),
        ("[gpu-fsm.gpu]\nidle_timeout_s = 3\n", "gpu", None, "straight under [gpu-fsm]"),
        ("[gpu-fsm.agent]\naccept = 0.5\nunsure = 0.9\n", "agent.unsure", 3, "at most accept (0.5)"),
        ("[gpu-fsm.agent]\nimage_weight = 0\n", "agent.image_weight", 2, "every screen has a picture"),
        ("[gpu-fsm]\nx = [\n", "configuration file", None, "cannot be read"),
        ("[other]\n", "configuration file", None, "outside the section"),
    ],
)
def test_a_mistake_is_named_with_its_file_line_and_mend(
    home: Home, text: str, name: str, line: int | None, said: str
) -> None:
    """As a person would look for it."""
    path = home.write("user", text)
    error = refusal()
    assert error.name == name
    assert error.source == str(path) + (f":{line}" if line else "")
    assert said in str(error)


def test_a_key_that_seems_to_stand_twice_has_no_line(home: Home) -> None:
    """Better no line than a wrong one."""
    text = '[gpu-fsm]\nidle_timeout_s = -3\n[gpu-fsm.agent]\nprompt = """\n[gpu-fsm]\nidle_timeout_s = 3\n"""\n'
    path = home.write("user", text)
    assert refusal(path=path).source == str(path)


def test_a_gateway_beyond_loopback_needs_a_token() -> None:
    """Whoever reaches it uses the card."""
    for listen in ("0.0.0.0:1", "[::]:1", "192.0.2.1:1"):
        with pytest.raises(ConfigError, match="token"):
            GatewayConfig(listen=listen)
        assert GatewayConfig(listen=listen, token=CANARY).listen == listen
    for listen in ("127.0.0.1:1", "[::1]:1", "localhost:0"):
        assert GatewayConfig(listen=listen).listen == listen
    for listen in ("example.com:1", "127.0.0.1", ":1", "127.0.0.1:65536", "127.0.0.1:-1", "::1:1:"):
        with pytest.raises(ConfigError):
            GatewayConfig(listen=listen, token=CANARY)


@given(number=st.floats(allow_nan=True, allow_infinity=True))
def test_whatever_float_is_given_a_threshold_is_one_or_is_refused(number: float) -> None:
    """No NaN reaches a comparison of scores."""
    try:
        held = AgentConfig(accept=number).accept
    except ConfigError as error:
        assert error.name == "accept"
        assert not -1.0 <= number <= 1.0
    else:
        assert held is not None
        assert -1.0 <= held <= 1.0


@pytest.mark.parametrize(
    ("name", "text", "held"),
    [
        ("agent.labels", "login, settings,login", ("login", "settings")),
        ("agent.labels", '["a, b"]', ("a, b",)),
        ("agent.labels", "", ()),
        ("agent.accept", "None", None),
        ("agent.index_path", "~/x.npz", Path.home() / "x.npz"),
        ("agent.index_path", "none", None),
        ("control.enabled", "off", False),
        ("gateway.allowed_hosts", "Box:80,[::1]", ("box:80", "[::1]")),
    ],
)
def test_text_becomes_a_value(home: Home, name: str, text: str, held: object) -> None:
    """From the environment as from the command line."""
    variable = next(setting.variable for setting in app_settings_table() if setting.name == name)
    assert value_of(load_app_config(environ={variable: text}), name).value == held


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("agent.labels", "[1"),
        ("agent.labels", "[1]"),
        ("agent.accept", "high"),
        ("agent.accept", "0_9"),
        ("agent.largest_side_px", "0"),
        ("agent.prompt", " "),
        ("agent.index_path", "a\nb"),
        ("agent.index_path", ""),
        ("gateway.allowed_hosts", "a/b"),
        ("gateway.allowed_origins", "null"),
    ],
)
def test_text_that_is_none_is_refused_with_its_variable(home: Home, name: str, text: str) -> None:
    """Nothing is guessed."""
    variable = next(setting.variable for setting in app_settings_table() if setting.name == name)
    error = refusal({variable: text})
    assert (error.name, error.source) == (name, f"environment {variable}")


def test_all_mistakes_are_listed_where_it_is_asked_to_go_on(home: Home) -> None:
    """Each with its place, also the ones that gave way; what is good is taken."""
    home.write("system", "[gpu-fsm]\nidle_timeout_s = -1\nx = 1\n[gpu-fsm.agent]\naccept = 2\nunsure = 0.5\n")
    home.write("user", "[gpu-fsm]\nidle_timeout_s = 7\n")
    environ = {"GPU_FSM_Y": "1", "OLLAMA_HOST": "ftp://x", "GPU_FSM_RESERVE_MIB": "1"}
    loaded = load_app_config(environ=environ, overrides={"z": 1}, go_on=True)
    assert sorted(problem.name for problem in loaded.problems) == [
        "GPU_FSM_Y", "agent.accept", "floor_mib", "idle_timeout_s", "ollama_url", "x", "z",
    ]  # fmt: skip
    assert loaded.config.agent.unsure == 0.5
    assert loaded.config.gpu == GPUResourceConfig()  # its parts contradict each other, so none of them is taken


def test_a_value_that_gave_way_harms_nobody(home: Home) -> None:
    """A stronger place is how one gets round a broken one."""
    home.write("user", "[gpu-fsm]\nidle_timeout_s = -1\n")
    assert load_app_config(environ={}, overrides={"idle_timeout_s": 5}).config.gpu.idle_timeout_s == 5


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_a_token_is_never_shown(home: Home) -> None:
    """Not by the objects, their history, their JSON, nor by the error about a bad one."""
    path = home.write("user", f'[gpu-fsm]\n[gpu-fsm.gateway]\ntoken = "{CANARY}"\n')
    loaded = load_app_config(environ={"GPU_FSM_GATEWAY_TOKEN": CANARY + "2"})
    token = loaded.config.gateway.token
    assert isinstance(token, Secret)
    assert token.reveal() == CANARY + "2"
    shown = [repr(loaded), str(token), f"{token}", f"{token:>9}", "%s" % token, repr(token)]  # noqa: UP031
    shown.append(json.dumps([value.as_json() for value in loaded.values]))
    path.write_text(f'[gpu-fsm.gateway]\ntoken = "{CANARY} "\n', encoding="utf-8")
    shown += [str(refusal()), repr(refusal()), str(refusal({"GPU_FSM_GATEWAY_TOKEN": CANARY + "\n"}))]
    assert not [text for text in shown if CANARY in text]


def test_a_secret_survives_copies() -> None:
    """Whole, and as hidden as before."""
    secret = Secret(CANARY)
    for other in (copy.deepcopy(secret), pickle.loads(pickle.dumps(secret)), Secret(secret)):
        assert (other.reveal(), str(other), type(other)) == (CANARY, "***", Secret)


def test_credentials_in_the_address_are_hidden_in_its_history(home: Home) -> None:
    """Also of an address that gave way."""
    home.write("user", f'[gpu-fsm]\nollama_url = "http://u:{CANARY}@127.0.0.1"\n')
    loaded = load_app_config(environ={"OLLAMA_HOST": f"http://v:{CANARY}@127.0.0.1:1"})
    assert CANARY not in repr(loaded) + json.dumps([value.as_json() for value in loaded.values])
    assert loaded.config.gpu.ollama_url.reveal().endswith(f"{CANARY}@127.0.0.1:1")  # type: ignore[attr-defined]


# --- the classes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["gpu", *OTHER_SECTIONS])
def test_a_section_holds_its_defaults_in_their_normal_form(section: str) -> None:
    """What is written as a default is what is held, so that the table tells the truth."""
    holder = getattr(AppConfig(), section)
    for field in attrs.fields(type(holder)):
        if field.name != "vlm_options":
            assert getattr(holder, field.name) == field.default, field.name
        assert field.metadata["about"]
        assert field.metadata["rule"].bound
