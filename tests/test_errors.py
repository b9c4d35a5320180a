"""Errors: facts as attributes, the mend in the message, and a life outside of this process."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_fsm import errors
from gpu_fsm.errors import GPUFSMError, one_line
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.status import Reason
from tests.worlds import inline

KINDS = [getattr(errors, name) for name in errors.__all__]
SAMPLES: dict[str, Any] = {
    "str": "some text",
    "float": 12.5,
    "int": 3,
    "int | None": 500,
    "float | None": 1.5,
    "tuple[str, ...]": ("one", "two"),
}
"""A value for every type that a fact may have."""


def example(kind: type[GPUFSMError]) -> GPUFSMError:
    """An error with every fact set."""
    return kind(**{fact.name: SAMPLES[str(fact.type)] for fact in attrs.fields(kind)})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling_and_copying_with_all_its_facts(kind: type[GPUFSMError]) -> None:
    """From a worker process comes the same class with the same attributes and the same words."""
    error = example(kind)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is kind
        assert attrs.asdict(twin) == attrs.asdict(error)
        assert str(twin) == str(error)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_says_what_is_and_then_what_to_do(kind: type[GPUFSMError]) -> None:
    """`str()` is the sentence and then the remedy; `repr` shows the facts; both are one line."""
    error = attrs.evolve(example(kind), detail="something is so", remedy="Do this.")
    assert "something is so" in str(error)
    assert str(error).endswith("Do this.")
    assert "something is so" in repr(error)
    assert "\n" not in str(error)
    assert isinstance(error, Exception)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_has_a_word_a_bucket_and_a_verdict_on_trying_again(kind: type[GPUFSMError]) -> None:
    """For programs: a stable code, what recovery needs, and whether the same call may succeed later."""
    assert kind.code.replace("_", "").isalpha()
    assert kind.code == kind.code.lower()
    assert kind.bucket in ("none", "retry", "settle", "cpu_only", "restart_process", "user")
    assert isinstance(kind.retryable, bool)
    assert not (kind.retryable and kind.bucket in ("restart_process", "user"))
    assert kind.__doc__


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_becomes_a_reason_that_speaks_json(kind: type[GPUFSMError]) -> None:
    """The reason for DEGRADED keeps code, sentence, remedy and bucket."""
    error = example(kind)
    reason = Reason.of(error, step="loading")
    assert (reason.code, reason.remedy, reason.bucket, reason.step) == (
        error.code,
        error.remedy,
        kind.bucket,
        "loading",
    )
    assert not reason.permanent or kind.bucket in ("user", "restart_process")
    json.dumps(attrs.asdict(reason))


def test_the_familiar_families_hold() -> None:
    """Who catches Python's own words catches ours: timeouts, bad values, wrong moments."""
    for kind in (errors.OperationTimeout, errors.LeaseTimeout, errors.LoadTimeout):
        assert issubclass(kind, TimeoutError)
    for kind in (errors.BadArgument, errors.ConfigError):
        assert issubclass(kind, ValueError)
    for kind in (errors.ManagerClosed, errors.ForkedProcess, errors.WouldDeadlock):
        assert issubclass(kind, RuntimeError)
    for kind in (errors.Superseded, errors.LeaseHeld, errors.ModeConflict, errors.InsufficientVRAM):
        assert issubclass(kind, errors.Refused)
    assert all(issubclass(kind, GPUFSMError) for kind in KINDS)


def test_errors_with_the_same_facts_are_still_two_events() -> None:
    """Errors are identities: equality by value would make two incidents one."""
    assert errors.Superseded(detail="x") != errors.Superseded(detail="x")
    assert len({errors.Superseded(), errors.Superseded()}) == 2


def test_a_shortage_tells_its_figures() -> None:
    """Needed, free, reclaimable and reserve in MiB, who holds the rest, and what to do."""
    world = SimulatedWorld()
    world.card.take("a game", 6000, pid=77, name="game.exe")
    manager = inline(world, on_shortage="refuse")
    with pytest.raises(errors.InsufficientVRAM) as caught:
        manager.set_execution_mode("recording")
    error = caught.value
    assert error.free_mib == world.card.free_mib
    assert error.needed_mib > error.free_mib
    assert error.reserve_mib == 512
    assert error.reclaimable_mib == 0
    assert any("game.exe" in holder and "77" in holder for holder in error.holders)
    assert error.remedy
    for figure in (error.needed_mib, error.free_mib):
        assert f"{figure:.0f}" in str(error)


def test_a_missing_model_is_named_with_the_command_that_fetches_it() -> None:
    """The model's name as an attribute and `ollama pull` in the remedy; one try, since asking again changes nothing."""
    world = SimulatedWorld()
    manager = inline(world, vlm_model="not-there:7b")
    with pytest.raises(errors.ModelNotFound) as caught:
        manager.ensure_vlm_loaded()
    assert caught.value.model == "not-there:7b"
    assert "ollama pull not-there:7b" in str(caught.value)
    assert not caught.value.retryable


def test_a_conflict_names_the_mode_to_ask_for() -> None:
    """An explicit CLIP move against the mode: which mode stands, which one would allow it."""
    manager = inline(SimulatedWorld())
    manager.set_execution_mode("recording")
    with pytest.raises(errors.ModeConflict) as caught:
        manager.migrate_clip_to_gpu()
    assert (caught.value.mode, caught.value.ask_for) == ("RECORDING", "AUTOPILOT")
    assert "set_execution_mode" in caught.value.remedy


def test_a_failed_load_tells_how_often_it_was_tried() -> None:
    """Attempts, elapsed seconds, the server's own words, the URL without credentials."""
    world = SimulatedWorld()
    manager = inline(world, ollama_url="http://me:s3cret@127.0.0.1:11434")
    world.faults.arm("ollama.load", "http_500", times=None, text="the runner said no")
    with pytest.raises(errors.OllamaError) as caught:
        manager.ensure_vlm_loaded()
    error = caught.value
    assert error.attempts == 4
    assert error.elapsed_s > 0
    assert error.model == world.vlm.name
    assert "the runner said no" in str(error)
    assert "s3cret" not in f"{error!r} {error} {error.url}"


@given(st.text(max_size=600))
def test_foreign_text_becomes_one_harmless_line(text: str) -> None:
    """Control characters are escaped and the length is bounded, whatever a server says."""
    line = one_line(text)
    assert len(line) <= 200
    assert line.isprintable()
    assert line == one_line(line)
