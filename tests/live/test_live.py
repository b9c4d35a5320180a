"""The contract on a server that is really there: `pytest -m live --ollama URL --model NAME`.

The same suite passes on `gpu-fsm simulate-ollama`.  It loads and unloads the model a dozen times, deletes and pulls
nothing, and leaves the server as it found it: models, residency, keep_alive.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpu_fsm.errors import OllamaRequestRejected
from gpu_fsm.ports import Interrupt
from gpu_fsm.status import Answer
from tests.contract.replay import RECORDINGS
from tests.live.server import Live, seconds

pytestmark = pytest.mark.live

MODEL_KEYS = {"name", "model", "size", "digest", "details", "expires_at", "size_vram"}
COSTS = {"total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"}

UNSAFE = ("/api/pull", "/api/delete", "/v1/models")
"""Routes that reach out, change something, or belong to somebody else's API."""
OTHERS = ("think", "suffix", "images", "format")
"""What a server answers to these depends on the model."""


def recorded_refusals() -> dict[str, dict[str, Any]]:
    """Recorded requests that are refused whatever the model is, once each."""
    found = {}
    for name in ("s01_basics", "s03_chat", "s04_errors", "s06_embed"):
        for number, one in enumerate(json.loads((RECORDINGS / f"{name}.json").read_text(encoding="utf-8"))):
            request, body = one["request"], one["request"]["body"]
            if one["response"]["status"] in (200, 403, 501) or request["path"] in UNSAFE:
                continue
            if (isinstance(body, dict) and any(key in body for key in OTHERS)) or request["path"] == "/api/embeddings":
                continue
            found[f"{name}[{number}] {request['method']} {request['path']}"] = one
    return found


REFUSALS = recorded_refusals()


@pytest.mark.parametrize("key", REFUSALS)
def test_a_refusal_is_the_recorded_one(key: str, live: Live) -> None:
    """Status, content type and text, with the model's name in the place of the recorded one."""
    recorded = REFUSALS[key]
    wanted, body, base = recorded["response"], recorded["request"]["body"], live.model.partition(":")[0]
    if isinstance(body, dict):
        body = json.loads(json.dumps(body).replace("tiny-a", base))
    answer = live.call(recorded["request"]["method"], recorded["request"]["path"], body)
    assert answer.status_code == wanted["status"]
    assert answer.headers["Content-Type"] == wanted["headers"]["Content-Type"]
    if recorded["request"]["method"] == "HEAD":
        return
    if "body" not in wanted:
        assert answer.text == wanted["body_text"]
        return
    text = wanted["body"]["error"].replace("tiny-a", base)
    # Up to 0.24 /api/show repeats the name as it was sent.
    assert answer.json()["error"] in (text, text.replace("nope:latest", "nope"))
    assert live.entry() is None


def test_health_routes_have_the_recorded_shape(live: Live) -> None:
    """Text at the root, a version, and both lists."""
    assert live.call("GET", "/").text == "Ollama is running"
    assert live.call("HEAD", "/").status_code == 200
    version = live.call("GET", "/api/version").json()
    assert set(version) == {"version"}
    assert isinstance(version["version"], str)
    (entry,) = [m for m in live.call("GET", "/api/tags").json()["models"] if m["digest"] == _digest(live)]
    assert {"name", "model", "modified_at", "size", "digest", "details"} <= set(entry)
    assert live.client().health(10.0).level == "up"


def test_a_load_is_listed_with_digest_and_sizes(live: Live) -> None:
    """Five fields in the answer, the name as sent; in the list the digest that the catalogue has."""
    answer = live.post("/api/generate", model=live.model, keep_alive=600, stream=False)
    assert set(answer) == {"model", "created_at", "response", "done", "done_reason"}
    assert (answer["model"], answer["response"]) == (live.model, "")
    assert (answer["done"], answer["done_reason"]) == (True, "load")
    entry = live.entry()
    assert entry is not None
    assert set(entry) >= MODEL_KEYS
    assert entry["name"] == entry["model"]
    assert entry["digest"] == _digest(live)
    assert type(entry["size"]) is int
    assert 0 <= entry["size_vram"] <= entry["size"] * 1.1
    assert seconds(entry["expires_at"]) - seconds(answer["created_at"]) == pytest.approx(600, abs=5)


def test_chat_loads_and_unloads_too(live: Live) -> None:
    """With a message object in the place of the response."""
    for body, reason in (({}, "load"), ({"keep_alive": 0}, "unload")):
        answer = live.post("/api/chat", model=live.model, messages=[], **body)
        assert set(answer) == {"model", "created_at", "message", "done", "done_reason"}
        assert answer["message"] == {"role": "assistant", "content": ""}
        assert answer["done_reason"] == reason


def test_an_unload_says_so_also_when_there_is_nothing_to_unload(live: Live) -> None:
    """And a cold model is not loaded by it."""
    live.post("/api/generate", model=live.model)
    live.wait_gone()
    answer = live.post("/api/generate", model=live.model, keep_alive=0)
    assert answer["done_reason"] == "unload"
    assert live.entry() is None


FORMS = [(10.5, 10.5), ("1h30m", 5400), (-1, None), ("-1m", None), (1e9, 1e9)]


@pytest.mark.parametrize(("keep_alive", "ahead_s"), FORMS)
def test_a_keep_alive_means_what_was_recorded(keep_alive: Any, ahead_s: float | None, live: Live) -> None:
    """Seconds, durations, and for ever; an omitted one keeps the last."""
    answer = live.post("/api/generate", model=live.model, keep_alive=keep_alive)
    entry = live.entry()
    assert entry is not None
    if ahead_s is None:
        assert entry["expires_at"].startswith("23")
    else:
        assert seconds(entry["expires_at"]) - seconds(answer["created_at"]) == pytest.approx(ahead_s, abs=5)
    again = live.post("/api/generate", model=live.model)
    entry = live.entry()
    assert entry is not None
    if ahead_s is not None:
        assert seconds(entry["expires_at"]) - seconds(again["created_at"]) == pytest.approx(ahead_s, abs=5)


def test_an_answer_tells_what_it_cost(live: Live) -> None:
    """Whole and in parts, by both routes."""
    whole = live.post("/api/generate", model=live.model, prompt="Say yes.", stream=False, options={"num_predict": 4})
    assert set(whole) >= COSTS | {"response", "done", "done_reason"}
    assert all(type(whole[key]) is int and whole[key] >= 0 for key in COSTS & set(whole))
    answer = live.call(
        "POST",
        "/api/chat",
        {"model": live.model, "messages": [{"role": "user", "content": "Say yes."}], "options": {"num_predict": 4}},
    )
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert set(lines[-1]) >= COSTS
    assert lines[-1]["done_reason"] in ("stop", "length")


def test_a_prompt_with_keep_alive_0_is_answered_and_then_unloaded(live: Live) -> None:
    """Gone soon after the answer."""
    body = {"prompt": "x", "keep_alive": 0, "stream": False, "options": {"num_predict": 2}}
    assert live.post("/api/generate", model=live.model, **body)["done"] is True
    live.wait_gone()


def test_our_client_loads_uses_renews_and_unloads(live: Live) -> None:
    """The whole life of a residency, through the client under test."""
    client = live.client()
    assert client.residency(10.0).answer is Answer.NO
    catalog = client.catalog(10.0)
    assert (catalog.present, catalog.digest) == (Answer.YES, _digest(live))
    report = client.load_model(keep_alive_s=300, deadline_s=600.0)
    assert report.model is not None
    assert report.attempts == 1
    seen = client.residency(10.0)
    assert seen.answer is Answer.YES
    assert seen.ours is not None
    assert not seen.ours.forever
    client.renew(keep_alive_s=900, timeout_s=30.0)
    entry = live.entry()
    assert entry is not None
    assert seconds(entry["expires_at"]) - seconds(live.post("/api/generate", model=live.model)["created_at"]) > 800
    (whole,) = client.generate("Say yes.", keep_alive_s=300, timeout_s=600.0)
    assert whole.done
    assert whole.total_s is not None
    assert whole.output_tokens is not None
    parts = list(client.chat([{"role": "user", "content": "Say yes."}], keep_alive_s=300, timeout_s=600.0, stream=True))
    assert parts[-1].done
    assert not any(part.done for part in parts[:-1])
    client.unload_model(timeout_s=30.0)
    live.wait_gone()
    assert client.residency(10.0).answer is Answer.NO


def test_an_abandoned_stream_lets_the_model_go(live: Live) -> None:
    """Closing the iterator ends the work in the server, so that an unload is not held up."""
    client = live.client()
    parts = client.generate("Count to a thousand.", keep_alive_s=300, timeout_s=600.0, stream=True)
    assert not next(parts).done
    parts.close()  # type: ignore[attr-defined]
    client.unload_model(timeout_s=30.0)
    live.wait_gone()


def test_an_interrupt_set_before_a_load_sends_nothing(live: Live) -> None:
    """And the model stays out."""
    interrupt = Interrupt()
    interrupt.set()
    with pytest.raises(Exception, match="given up"):
        live.client().load_model(keep_alive_s=60, deadline_s=60.0, interrupt=interrupt)
    assert live.entry() is None


def test_a_keep_alive_as_text_is_told_as_a_rejection(live: Live) -> None:
    """The server's own words, in our class."""
    client = live.client()
    body = {"model": live.model, "keep_alive": "300"}
    with pytest.raises(OllamaRequestRejected, match="missing unit in duration"):
        client._control("/api/generate", live.clock.monotonic() + 30.0, body)


def _digest(live: Live) -> str:
    found = live.client().catalog(10.0).digest
    assert found
    return found
