"""The simulated Ollama against the recordings of a real one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from gpu_fsm.simulation import SimulatedOllama
from gpu_fsm.simulation.wire import Exchange
from tests.contract.replay import RECORDINGS, SCENARIOS, addresses_and_names, leaves, replay


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_simulated_server_gives_the_recorded_answers(scenario: str) -> None:
    """Every recorded request and field is compared or has its reason; no difference."""
    tally = replay(scenario)
    assert tally.problems == []
    assert tally.requests > 0
    assert tally.exact > 0


def test_addresses_and_names_are_read_as_the_recorded_server_reads_them() -> None:
    """Values of OLLAMA_HOST and model names."""
    tally = addresses_and_names()
    assert tally.problems == []
    assert tally.requests == 37


def test_every_recording_has_a_script() -> None:
    """A recording that nobody replays proves nothing."""
    assert {path.stem for path in RECORDINGS.glob("*.json")} == set(SCENARIOS)


def test_leaves_are_all_that_a_tree_holds() -> None:
    """Empty containers are leaves too: an empty list of models is a fact."""
    tree = {"a": [{"b": 1}, []], "c": {}, "d": None}
    assert dict(leaves(tree)) == {"a[0].b": 1, "a[1]": [], "c": {}, "d": None}


SPOILT: dict[str, tuple[str, Callable[[int, bytes, str], tuple[int, bytes, str]]]] = {
    "status": ("s04_errors", lambda s, b, c: (400 if s == 404 else s, b, c)),
    "text": ("s04_errors", lambda s, b, c: (s, b.replace(b"not found", b"is missing"), c)),
    "content type": ("s03_chat", lambda s, b, c: (s, b, c.replace("; charset=utf-8", ""))),
    "reason": ("s02_load_ps_unload", lambda s, b, c: (s, b.replace(b'"unload"', b'"load"'), c)),
    "missing field": ("s03_chat", lambda s, b, c: (s, b.replace(b'"size_vram":0,', b""), c)),
    "one field more": ("s03_chat", lambda s, b, c: (s, b.replace(b'"size_vram":0,', b'"size_vram":0,"more":1,'), c)),
    "type": ("s16_options_reload", lambda s, b, c: (s, b.replace(b'"size_vram":0', b'"size_vram":false'), c)),
    "moment": ("s05_keep_alive_forms", lambda s, b, c: (s, b.replace(b'"expires_at":"20', b'"expires_at":"21'), c)),
    "type of what is not compared": (
        "s24_expiry_and_prompt_keepalive0",
        lambda s, b, c: (s, b.replace(b'"eval_duration":', b'"eval_duration":"x","was":'), c),
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_server_that_answers_otherwise_is_found_out(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of difference is seen; else the comparison would compare nothing."""
    scenario, spoil = SPOILT[what]
    answer = Exchange.answer

    def spoilt(self: Exchange, status: int, body: bytes, content_type: str, **more: Any) -> None:
        answer(self, *spoil(status, body, content_type), **more)

    monkeypatch.setattr(Exchange, "answer", spoilt)
    assert replay(scenario).problems


def test_a_server_that_acts_otherwise_is_found_out() -> None:
    """A runner that should be another one, an unload that comes late, a model that is listed before it is loaded."""

    class NeverReloads(SimulatedOllama):
        def _matches(self, runner: Any, job: Any) -> bool:
            return True

    class UnloadsLate(SimulatedOllama):
        def _expire(self, *args: Any) -> None:
            self.clock.after(0.3, lambda: super(UnloadsLate, self)._expire(*args))

    assert replay("s16_options_reload", NeverReloads).problems
    assert replay("s03_chat", UnloadsLate).problems
    assert replay("s07_big_load_poll_unload", partial(SimulatedOllama, version="0.24")).problems
