"""The card, lent to programs that nobody manages: made, kept, refused to others, and taken back."""

from __future__ import annotations

# ruff: noqa: E402
import pytest

for _library in ("httpx", "ollama", "openai", "starlette", "uvicorn"):
    pytest.importorskip(_library, reason=f"{_library} is not installed; it comes with the extra test")

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx

from gpu_fsm import ExecutionMode, errors
from gpu_fsm.gateway.serve import Gateway
from tests.gateways import CARD_MIB, CLIP_MIB, OTHER, VLM, Street, street
from tests.waiting import PATIENCE_S, ROOT, in_thread, until

PROMPT = {"model": VLM, "prompt": "hi", "stream": False}


@pytest.fixture
def world() -> Iterator[Street]:
    """A manager in IDLE over a simulated Ollama behind a real socket."""
    with street(drain_timeout_s=0.3) as made:
        yield made


def ask(gateway: Gateway, **wish: Any) -> httpx.Response:
    """Ask for room."""
    body = {"holder": "whisper", "needed_mib": 4000, "ttl_s": 20, **wish}
    return httpx.post(f"{gateway.url}/gpu-fsm/lease", json=body, trust_env=False, timeout=PATIENCE_S)


def end(gateway: Gateway, lease: httpx.Response) -> int:
    """Give it back."""
    return httpx.delete(f"{gateway.url}/gpu-fsm/lease/{lease.json()['id']}", trust_env=False).status_code


def beat(gateway: Gateway, lease: httpx.Response) -> httpx.Response:
    """Say that the holder lives."""
    return httpx.post(f"{gateway.url}/gpu-fsm/lease/{lease.json()['id']}/heartbeat", trust_env=False)


def generate(gateway: Gateway, **more: Any) -> httpx.Response:
    """Somebody wants the VLM."""
    body = {**PROMPT, **more}
    return httpx.post(f"{gateway.url}/api/generate", json=body, trust_env=False, timeout=PATIENCE_S)


HOLDER = """
import json, sys, time, urllib.request
url, ttl_s = sys.argv[1], float(sys.argv[2])
def post(path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))
lease = post("/gpu-fsm/lease", {"holder": "stable-diffusion", "needed_mib": 6000, "ttl_s": ttl_s, "wait_s": 10})
print(json.dumps(lease), flush=True)
while True:
    time.sleep(ttl_s / 4)
    print(json.dumps(post("/gpu-fsm/lease/" + lease["id"] + "/heartbeat", {})), flush=True)
"""


@pytest.mark.parametrize("mode", ["recording", "autopilot"])
def test_a_foreign_program_gets_room_keeps_it_and_dies_of_sigkill(world: Street, mode: str) -> None:
    """Asked, made, held over several TTLs, its holder killed, taken back after the TTL, the mode restored."""
    ttl_s = 0.8
    world.manager.set_execution_mode(mode)
    gateway = world.gateway()
    assert world.card.held_mib("clip") == (CLIP_MIB if mode == "autopilot" else 0.0)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, gateway.url, str(ttl_s)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        lease = json.loads(holder.stdout.readline())
        assert not world.resident
        assert world.card.held_mib("clip") == 0.0
        assert lease["free_mib"] >= lease["needed_mib"]
        world.card.take("stable-diffusion", 6000.0)
        for _ in range(8):
            assert json.loads(holder.stdout.readline())["kept"], "it lives, and keeps its room for twice the TTL"
        refused = generate(gateway)
        assert refused.status_code == 503
        assert "stable-diffusion" in refused.json()["error"]
        assert not world.resident
    finally:
        holder.kill()
        holder.wait(PATIENCE_S)
        holder.stdout.close()
    world.card.give_back("stable-diffusion")
    assert world.manager.get_status().execution_mode.value == "idle", "the TTL is not over yet"
    until(lambda: world.manager.get_status().execution_mode.value == mode)
    assert world.resident is (mode == "recording")
    assert world.card.held_mib("clip") == (CLIP_MIB if mode == "autopilot" else 0.0)
    assert httpx.get(f"{gateway.url}/gpu-fsm/lease", trust_env=False).json() == {"leases": []}
    assert generate(gateway).status_code == 200


@pytest.mark.core
def test_a_lease_that_is_given_back_restores_the_mode_at_once(world: Street) -> None:
    """Long before its TTL; its id is worth nothing afterwards."""
    world.manager.set_execution_mode("recording")
    gateway = world.gateway()
    lease = ask(gateway)
    assert (lease.status_code, world.resident) == (200, False)
    assert end(gateway, lease) == 204
    until(lambda: world.resident and world.manager.get_status().execution_mode.value == "recording")
    assert end(gateway, lease) == 404
    assert beat(gateway, lease).status_code == 404


@pytest.mark.core
@pytest.mark.parametrize("mode", ["recording", "autopilot"])
def test_who_asks_for_idle_meanwhile_is_not_overruled(world: Street, mode: str) -> None:
    """The agent in this process has stopped: when the card is back, nothing is loaded for it, and CLIP stays down."""
    world.manager.set_execution_mode(mode)
    gateway = world.gateway()
    lease = ask(gateway)
    assert world.manager.set_execution_mode("idle").granted
    assert beat(gateway, lease).json()["kept"]
    end(gateway, lease)
    until(lambda: generate(gateway, model="other:1b").status_code == 200)
    world.manager.set_execution_mode("idle")  # whatever was asked for when the card came back has been served
    assert world.manager.get_status().execution_mode is ExecutionMode.IDLE
    assert not world.resident
    assert world.card.held_mib("clip") == 0.0


@pytest.mark.core
def test_more_than_there_is_is_refused_with_figures_and_nothing_is_lost(world: Street) -> None:
    """How much was asked, how much is free with all of ours given up; then the mode comes back."""
    world.manager.set_execution_mode("recording")
    gateway = world.gateway()
    needed_mib = CARD_MIB - world.manager.config.reserve_mib
    refused = ask(gateway, needed_mib=needed_mib)
    assert refused.status_code == 409
    said = refused.json()
    assert (said["code"], said["needed_mib"], said["free_mib"]) == ("vram_insufficient", needed_mib, CARD_MIB - 300.0)
    until(lambda: world.resident and world.manager.get_status().execution_mode.value == "recording")


def test_nothing_is_given_up_for_what_no_card_of_this_size_has(world: Street) -> None:
    """One program's mistake must not cost the others their model."""
    world.manager.set_execution_mode("recording")
    gateway = world.gateway()
    refused = ask(gateway, needed_mib=CARD_MIB, wait_s=60)
    assert (refused.status_code, refused.json()["free_mib"]) == (409, CARD_MIB)
    assert world.ollama.counts["loads"] == 1
    assert world.manager.get_status().execution_mode is ExecutionMode.RECORDING
    assert generate(gateway).status_code == 200
    small = ask(gateway)
    assert ask(gateway, needed_mib=CARD_MIB, wait_s=60).status_code == 409, "nor does it stand in the way of others"
    end(gateway, small)


def test_what_is_free_is_asked_of_the_card_and_not_remembered(world: Street) -> None:
    """A game has come since the last look; and who waits for what cannot come is told so at once."""
    gateway = world.gateway()
    world.card.take("game", 5000.0)
    refused = ask(gateway, needed_mib=4000, wait_s=60)
    assert refused.status_code == 409
    assert refused.json()["free_mib"] == CARD_MIB - 300.0 - 5000.0
    assert generate(gateway).headers["gpu-fsm-error"] == "vram_insufficient", "it is lent to nobody"


def test_for_a_second_lease_the_card_is_asked_again(world: Street) -> None:
    """The first has taken what it was promised, and a game has taken more of the rest."""
    gateway = world.gateway()
    assert ask(gateway, holder="a", needed_mib=3000).status_code == 200
    world.card.take("a", 3000.0)
    world.card.take("game", 3000.0)
    refused = ask(gateway, holder="b", needed_mib=3000)
    assert (refused.status_code, refused.json()["free_mib"]) == (409, CARD_MIB - 300.0 - 6000.0)
    world.card.give_back("a")
    world.card.give_back("game")


@pytest.mark.core
def test_a_running_answer_is_not_cut_off_for_a_lease(world: Street) -> None:
    """The lease is refused with the names of those in the way, or waits for them."""
    world.ollama.generate_s = 1.2
    gateway = world.gateway()
    running = in_thread(generate, gateway)
    until(world.leases)
    refused = ask(gateway, wait_s=0)
    assert refused.status_code == 409
    assert "gateway client" in str(refused.json()["holders"])
    granted = ask(gateway, wait_s=20)
    assert granted.status_code == 200
    assert running.result(PATIENCE_S).json()["done"]
    assert not world.resident


def test_an_answer_of_another_model_is_waited_for_too(world: Street) -> None:
    """It takes room that is not ours to promise; what it keeps when it has ended is in the figures."""
    world.ollama.generate_s = 1.2
    gateway = world.gateway()
    running = in_thread(generate, gateway, model=OTHER)
    until(lambda: OTHER in world.ollama.loaded())
    refused = ask(gateway, wait_s=0)
    assert (refused.status_code, refused.json()["code"]) == (409, "lease_timeout")
    assert "gateway client" in str(refused.json()["holders"])
    granted = ask(gateway, wait_s=20)
    (answered,) = [entry for entry in world.ollama.log if entry.op == "ollama.generate"]
    assert answered.ended_at is not None, "the room is given when nothing runs in it any more"
    assert running.result(PATIENCE_S).json()["done"]
    assert granted.json()["free_mib"] == CARD_MIB - 300.0 - 500.0, "another's model stays, and is counted"
    assert generate(gateway, model=OTHER).status_code == 503


def test_two_may_share_the_room_and_a_third_waits_its_turn(world: Street) -> None:
    """What was promised is counted, whether it has been taken already or not."""
    gateway = world.gateway()
    first, second = ask(gateway, holder="a", needed_mib=3000), ask(gateway, holder="b", needed_mib=3000)
    assert (first.status_code, second.status_code) == (200, 200)
    refused = ask(gateway, holder="c", needed_mib=3000)
    assert refused.status_code == 409
    assert refused.json()["holders"] == ["a", "b"]
    waiting = in_thread(ask, gateway, holder="c", needed_mib=3000, wait_s=20)
    end(gateway, first)
    third = waiting.result(PATIENCE_S)
    assert third.status_code == 200
    told = httpx.get(f"{gateway.url}/gpu-fsm/lease", trust_env=False).json()["leases"]
    assert [lease["holder"] for lease in told] == ["b", "c"]
    assert not [lease for lease in told if "id" in lease], "who reads the list cannot end what is in it"


@pytest.mark.core
def test_one_who_stops_waiting_leaves_nothing_behind(world: Street) -> None:
    """Its client has gone, so nothing is lent to it and the mode stays."""
    world.manager.set_execution_mode("autopilot")
    gateway = world.gateway()
    first = ask(gateway, needed_mib=7000)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{gateway.url}/gpu-fsm/lease",
            json={"holder": "impatient", "needed_mib": 7000, "wait_s": 60},
            trust_env=False,
            timeout=0.3,
        )
    end(gateway, first)
    until(lambda: world.manager.get_status().execution_mode.value == "autopilot")
    assert httpx.get(f"{gateway.url}/gpu-fsm/lease", trust_env=False).json() == {"leases": []}


@pytest.mark.core
def test_while_the_card_is_lent_no_model_runs_through_the_gateway(world: Street) -> None:
    """Ours, and others; what needs no card goes on."""
    gateway = world.gateway()
    lease = ask(gateway)
    for model in (VLM, "other:1b"):
        refused = generate(gateway, model=model)
        assert refused.status_code == 503
        assert refused.headers["gpu-fsm-error"] == "card_held"
    assert world.ollama.loaded() == ()
    assert httpx.get(f"{gateway.url}/api/tags", trust_env=False).status_code == 200
    with world.manager.clip() as clip:
        assert clip.encode(["serves from the CPU"]).shape[0] == 1
    end(gateway, lease)


def test_nobody_in_this_process_takes_the_room_either(world: Street) -> None:
    """The agent, the doors and the control socket ask the same manager; what takes no room is given as ever."""
    world.manager.set_execution_mode("recording")
    gateway, manager = world.gateway(), world.manager
    lease = ask(gateway)
    for takes_the_room in (
        lambda: manager.set_execution_mode(ExecutionMode.RECORDING),
        lambda: manager.set_execution_mode(ExecutionMode.AUTOPILOT, preempt=True),
        lambda: asyncio.run(manager.aio.set_execution_mode("recording")),
        manager.ensure_vlm_loaded,
        manager.migrate_clip_to_gpu,
        lambda: manager.vlm().__enter__(),
    ):
        with pytest.raises(errors.CardHeld, match="whisper"):
            takes_the_room()
    answer = world.session().post(f"{world.front.url}/api/generate", json=PROMPT)
    assert (answer.status_code, answer.headers["GPU-FSM-Error"]) == (503, "card_held")
    manager.ensure_vlm_unloaded()
    manager.migrate_clip_to_cpu()
    assert not world.resident
    assert world.card.held_mib("clip") == 0.0
    assert beat(gateway, lease).json()["kept"]
    end(gateway, lease)
    until(lambda: world.resident and manager.get_status().execution_mode is ExecutionMode.RECORDING)


def test_one_who_leaves_while_something_loads_leaves_the_mode_behind() -> None:
    """The mode is on its way and the request for room queued behind it: both are undone, in order."""
    with street(load_s=0.8) as world:
        gateway = world.gateway()
        asked = world.manager.submit_execution_mode("recording")
        until(lambda: world.asked("/api/generate"))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{gateway.url}/gpu-fsm/lease",
                json={"holder": "impatient", "needed_mib": 4000, "wait_s": 60},
                trust_env=False,
                timeout=0.2,
            )
        assert asked.result(PATIENCE_S).granted
        world.manager.ensure_vlm_loaded()  # served after all that was asked before
        assert world.manager.get_status().execution_mode is ExecutionMode.RECORDING


def test_a_gateway_that_stops_gives_the_card_back(world: Street) -> None:
    """The manager outlives it, in the mode it had."""
    world.manager.set_execution_mode("autopilot")
    gateway = world.gateway()
    assert ask(gateway).status_code == 200
    gateway.close()
    until(lambda: world.manager.get_status().execution_mode.value == "autopilot")


@pytest.mark.parametrize("first_to_end", [0, 1])
@pytest.mark.parametrize("asked_meanwhile", [False, True])
def test_two_gateways_of_one_manager_give_back_what_was_there_before_the_first(
    world: Street, first_to_end: int, asked_meanwhile: bool
) -> None:
    """The last to end restores it; who has asked for IDLE meanwhile is not overruled."""
    world.manager.set_execution_mode("recording")
    gateways = [world.gateway(), world.gateway()]
    leases = [ask(gateway, needed_mib=2000) for gateway in gateways]
    assert [lease.status_code for lease in leases] == [200, 200]
    if asked_meanwhile:
        assert world.manager.set_execution_mode("idle").granted
    for place in (first_to_end, 1 - first_to_end):
        assert not world.resident
        assert end(gateways[place], leases[place]) == 204
    for gateway in gateways:
        until(lambda gateway=gateway: generate(gateway, model=OTHER).status_code == 200)
    wanted = "idle" if asked_meanwhile else "recording"
    until(lambda: world.manager.get_status().execution_mode.value == wanted)
    assert world.resident is not asked_meanwhile


@pytest.mark.parametrize("inner_ends_first", [True, False])
def test_a_programs_own_loan_inside_a_gateways_lease_costs_nobody_the_mode(
    world: Street, inner_ends_first: bool
) -> None:
    """Both make room, both ask for what was there before; the earlier one is told that the card is still lent."""
    manager = world.manager
    manager.set_execution_mode("recording")
    gateway = world.gateway()
    lease = ask(gateway, needed_mib=2000)
    with manager.lend("our own training") as loan:
        manager.set_execution_mode("idle")
        manager.ensure_vlm_unloaded()
        assert loan.mode is ExecutionMode.RECORDING
        if not inner_ends_first:
            end(gateway, lease)
            until(lambda: generate(gateway, model=OTHER).status_code == 200)
    if inner_ends_first:
        with pytest.raises(errors.CardHeld):
            manager.set_execution_mode(loan.mode)
        end(gateway, lease)
    else:
        manager.set_execution_mode(loan.mode)
    until(lambda: manager.get_status().execution_mode is ExecutionMode.RECORDING and world.resident)


def test_one_who_tries_again_for_room_is_not_taken_for_one_who_wants_idle(world: Street) -> None:
    """The first one got none in time, the second one makes it, and what comes back is what stood before both."""
    world.manager.set_execution_mode("recording")
    world.ollama.generate_s = 1.2
    gateway = world.gateway()
    running = in_thread(generate, gateway)
    until(world.leases)
    in_vain = in_thread(ask, gateway, holder="a", needed_mib=2000)
    until(lambda: world.manager._driver._loans)
    lease = in_thread(ask, gateway, holder="b", needed_mib=2000, wait_s=20).result(PATIENCE_S)
    assert (in_vain.result(PATIENCE_S).status_code, lease.status_code) == (409, 200)
    assert running.result(PATIENCE_S).status_code == 200
    end(gateway, lease)
    until(lambda: world.manager.get_status().execution_mode is ExecutionMode.RECORDING and world.resident)


@pytest.mark.parametrize(
    "wish",
    [
        [],
        "x",
        {},
        {"holder": "x"},
        {"holder": "", "needed_mib": 1},
        {"holder": "x", "needed_mib": "1"},
        {"holder": "x", "needed_mib": True},
        {"holder": "x", "needed_mib": -1},
        {"holder": "x", "needed_mib": 1e30},
        {"holder": "x", "needed_mib": 1, "ttl_s": 0},
        {"holder": "x", "needed_mib": 1, "ttl_s": 1e9},
        {"holder": "x", "needed_mib": 1, "wait_s": -1},
        {"holder": "x", "needed_mib": 1, "colour": "red"},
    ],
)
def test_a_wish_that_cannot_be_meant_is_refused(shared: Gateway, wish: Any) -> None:
    """With a sentence that says what is wrong, and without a look at the card."""
    answer = httpx.post(f"{shared.url}/gpu-fsm/lease", json=wish, trust_env=False)
    assert answer.status_code == 400
    assert answer.json()["code"] == "bad_argument"


@pytest.fixture(scope="module")
def shared() -> Iterator[Gateway]:
    """A gateway for questions that change nothing."""
    with street() as made:
        yield made.gateway()
