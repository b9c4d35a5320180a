"""The kit for embedders: a world in one line, the fixture, the strategies."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_fsm import errors, guards, testing
from gpu_fsm.engine import Engine
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.status import ExecutionMode, State
from gpu_fsm.steps import Steps
from gpu_fsm.testing import assert_invariants, simulated_world, strategies
from gpu_fsm.testing.oracle import Oracle
from gpu_fsm.testing.simulated import (
    MANAGER_SETTINGS,
    OTHER,
    WORLD_OPTIONS,
    Simulation,
    inline_manager,
    open_simulation,
)
from gpu_fsm.tickets import Ticket
from tests.waiting import ROOT, run_python


def test_a_world_in_one_line_has_a_card_an_ollama_a_clip_and_a_clock() -> None:
    """A real manager in it, virtual time, and everything given back at the end."""
    with simulated_world(card_mib=6400.0, idle_timeout_s=60.0) as sim:
        assert sim.manager.set_execution_mode("recording").granted
        assert sim.generate() == "ok"
        assert sim.world.vlm_resident()
        assert sim.card.total_mib == 6400.0
        sim.drive_for(120.0)
        assert not sim.world.vlm_resident()
        assert sim.encode("a", "b").shape[0] == 2
        assert sim.clock.monotonic() > 120.0
    assert sim.manager.get_status().closed
    assert sim.clip.place == "cpu"


def test_a_thread_of_its_own_drives_a_world_that_is_asked_for_that() -> None:
    """Then a wait is a real wait, and only loads and sleeps move the clock."""
    with simulated_world(threaded=True) as sim:
        assert sim.manager.set_execution_mode("recording", timeout_s=30.0).granted
        assert sim.world.vlm_resident()


def test_no_setting_of_the_manager_has_the_name_of_one_of_the_world() -> None:
    """They share one list of keywords."""
    assert not WORLD_OPTIONS & MANAGER_SETTINGS


@pytest.mark.parametrize(("name", "said"), [("idle_timout_s", "idle_timeout_s"), ("zzz", "card_mib")])
def test_an_unknown_setting_is_named_with_what_was_meant(name: str, said: str) -> None:
    """Both lists are searched."""
    with pytest.raises(errors.BadArgument, match=said), simulated_world(**{name: 1}):
        pass


def break_a_promise(world: SimulatedWorld) -> None:
    """Take CLIP up behind the manager's back, in the middle of nothing: an effect in a stable state."""
    world.clip.to_gpu()


def test_a_broken_promise_is_an_error_at_the_end_of_the_block() -> None:
    """Nobody has to ask."""
    with pytest.raises(AssertionError, match="S11"), simulated_world() as sim:
        break_a_promise(sim.world)


def test_the_error_of_the_block_is_not_replaced_by_one_of_ours() -> None:
    """It comes first."""
    with pytest.raises(KeyError), simulated_world() as sim:
        break_a_promise(sim.world)
        raise KeyError


def test_any_manager_in_any_world_can_be_judged() -> None:
    """The first call begins the watching; a broken promise is named with rule and time."""
    world = SimulatedWorld()
    manager = inline_manager(world)
    assert_invariants(manager, world)
    manager.set_execution_mode("autopilot")
    assert_invariants(manager, world)
    world.clip.to_cpu()
    with pytest.raises(AssertionError, match=r"S11: clip.to_cpu .* \(at .* s"):
        assert_invariants(manager, world)
    manager.close()


def test_requests_that_still_wait_are_no_broken_promise() -> None:
    """Posted and not yet driven, or waiting for a lease; one that got lost is."""
    with simulated_world() as sim:
        sim.manager.set_execution_mode("autopilot")
        future = sim.manager.submit_execution_mode("recording")
        sim.check()
        sim.manager._driver.mailbox._queue.clear()
        with pytest.raises(AssertionError, match="S7"):
            sim.check()
        assert future.cancel()
        sim.oracle.violations.clear()


def test_requests_that_wait_in_turns_are_a_broken_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each passes the other because its caller holds a lease, looks, and waits on: for ever, with a look each time."""
    monkeypatch.setattr(Ticket, "may_pass", lambda self, version, now: bool(self.holds))
    with simulated_world(card_mib=16384) as sim:
        sim.manager.set_execution_mode("recording")
        other = sim.manager._driver.leases.grant_vlm("somebody")
        with sim.manager.clip():
            for _ in range(2):
                sim.manager._driver.post("vlm_unwanted")
                sim.drive_for(1.0)
        with pytest.raises(AssertionError, match="L3: a request looks again and again"):
            sim.check()
        sim.manager._driver.leases.release(other)
        sim.oracle.violations.clear()


def test_a_journal_that_forgets_is_not_a_journal_with_gaps() -> None:
    """Its size is a setting; what is still there is judged."""
    world = SimulatedWorld()
    manager = inline_manager(world, journal_size=5)
    oracle = Oracle.of(manager, world)
    manager.drive_for(600.0)
    oracle.check()
    assert oracle is Oracle.of(manager, world)
    manager.close()


def test_clip_moves_weight_by_weight_and_somebody_looks_after_each() -> None:
    """Nobody is told "mixed", and an encode in the middle of a move is seen."""
    with simulated_world() as sim:
        seen: list[tuple[str, str]] = []
        sim.world.on_io.append(lambda op, phase: seen.append((sim.clip.device, sim.manager.get_clip_device())))
        sim.manager.migrate_clip_to_gpu()
        assert ("mixed", "cpu") in seen
        assert "mixed" not in {told for _, told in seen}
        sim.clip._encoding += 1
        sim.manager.migrate_clip_to_cpu()
        sim.clip._encoding -= 1
        with pytest.raises(AssertionError, match=r"S10: clip.to_cpu during an encode"):
            sim.check()
        sim.oracle.violations.clear()
        sim.clip.violations.clear()


# --- what excuses nothing ---


LONG_AGO: dict[str, Callable[[Simulation], object]] = {
    "another client": lambda sim: sim.ollama.foreign_load(OTHER),
    "a renewal that failed": lambda sim: sim.faults.arm("ollama.renew", "http_500"),
    "a lie about what is loaded": lambda sim: sim.faults.arm("ollama.ps", "silent"),
    "a card that could not be read": lambda sim: sim.faults.arm("probe.read", "unknown"),
    "a load that failed": lambda sim: sim.faults.arm("ollama.load", "http_500"),
}


@pytest.mark.parametrize("broken", ["S3: RECORDING entered", "S4: the VLM is resident", "S5: ollama.load needs"])
@pytest.mark.parametrize("what", LONG_AGO)
def test_what_was_wrong_once_excuses_nothing_later(what: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by what the last look can have shown, not by what ever happened in this world."""
    later: list[bool] = []
    real, why_not, shed = dict(guards.PREDICATES), guards.why_not, Steps.shed
    for name, verdict in {"S3": {"placed": True, "lacks_vlm": False}, "S5": {"fits": True}}.get(broken[:2], {}).items():
        monkeypatch.setitem(
            guards.PREDICATES, name, lambda s, name=name, verdict=verdict: verdict if later else real[name](s)
        )
    monkeypatch.setattr(guards, "why_not", lambda s: None if later else why_not(s))
    monkeypatch.setattr(Steps, "shed", lambda *args, **how: () if later else shed(*args, **how))

    sim = open_simulation(card_mib=12288.0, idle_timeout_s=60.0)
    LONG_AGO[what](sim)
    sim.manager.set_execution_mode("recording")
    with sim.manager.vlm():
        sim.drive_for(100.0)
    assert sim.faults.fired or what == "another client"
    sim.manager.set_execution_mode("recording" if broken.startswith("S4") else "idle")
    sim.manager.ensure_vlm_loaded()
    if not broken.startswith("S4"):
        sim.manager.ensure_vlm_unloaded()
    sim.oracle.check()

    later.append(True)
    if not broken.startswith("S3"):
        sim.neighbour_takes(sim.card.free_mib - 100.0)
    if broken.startswith("S4"):
        sim.drive_for(60.0)
    else:
        sim.manager.set_execution_mode("recording")
    with pytest.raises(AssertionError, match=broken):
        sim.oracle.check()


@pytest.mark.parametrize(("mode", "effect"), [("recording", "clip.to_gpu"), ("autopilot", "ollama.load")])
def test_what_a_preempting_request_does_without_may_not_be_acquired(
    mode: str, effect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S6, also for the modes that need something, and also where somebody was superseded for it."""
    monkeypatch.setattr(Engine, "_superseded", lambda self: False)
    with pytest.raises(AssertionError, match=f"S6: {effect}"), simulated_world() as sim:
        before = "recording" if mode == "autopilot" else "autopilot"
        late: list[object] = []

        def preempt(op: str, phase: str) -> None:
            if not late and sim.oracle.engine.state is State.RELEASING:
                late.append(sim.manager.submit_execution_mode(mode, preempt=True))

        sim.world.on_io.append(preempt)
        sim.manager.submit_execution_mode(before)
        sim.manager.submit_execution_mode("idle")  # it is superseded, too
        sim.drive_for(60.0)


# --- imports ---


def test_the_world_needs_nothing_but_the_package() -> None:
    """Neither Hypothesis nor pytest; `GPUStateMachine` says what to install."""
    run_python(
        "import sys\n"
        "sys.modules['hypothesis'] = sys.modules['pytest'] = None\n"
        "from gpu_fsm.testing import simulated_world\n"
        "with simulated_world() as sim: sim.manager.set_execution_mode('recording')\n"
        "import gpu_fsm.testing\n"
        "try: gpu_fsm.testing.GPUStateMachine\n"
        "except ModuleNotFoundError as error: assert 'gpu-fsm[testing]' in str(error)\n"
        "else: raise SystemExit('imported')\n"
    )


def test_every_public_name_is_there_and_no_other() -> None:
    """They are imported late, so a wrong one would be found late."""
    for name in testing.__all__:
        assert getattr(testing, name).__doc__
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = testing.nothing_of_the_kind


# --- the fixture ---

TESTS = """
def test_one_line(simulated_world):
    sim = simulated_world(idle_timeout_s=5.0)
    assert sim.manager.set_execution_mode("recording").granted

def test_two_worlds(simulated_world):
    assert simulated_world().clock is not simulated_world(gpu=False).clock

def test_a_broken_promise(simulated_world):
    simulated_world().clip.to_gpu()
"""


def plugin_options() -> list[str]:
    """Nothing where the package is installed with its entry point; else the plugin by name."""
    installed = any(point.value == "gpu_fsm.testing.plugin" for point in entry_points(group="pytest11"))
    return [] if installed else ["-p", "gpu_fsm.testing.plugin"]


def test_the_fixture_gives_worlds_and_judges_them(tmp_path: Path) -> None:
    """In a project of somebody else, without a line of configuration."""
    (tmp_path / "test_it.py").write_text(TESTS, encoding="utf-8")
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin_options()]
    done = subprocess.run(
        [*command, str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "3 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "ERROR at teardown of test_a_broken_promise" in done.stdout
    assert "S11: clip.to_gpu" in done.stdout


def test_the_plugin_costs_nothing_until_a_test_asks_for_it() -> None:
    """Importing it imports no part of the kit's machinery, no simulation and no library that the package does not."""
    run_python(
        "import sys, attrs, pytest, gpu_fsm\n"
        "before = set(sys.modules)\n"
        "import gpu_fsm.testing.plugin\n"
        "new = {n for n in set(sys.modules) - before if n.partition('.')[0] not in sys.stdlib_module_names}\n"
        "assert new <= {'gpu_fsm.testing', *(f'gpu_fsm.testing.{n}' for n in ('plugin', 'lint', 'explore'))}, new\n"
    )


# --- the strategies ---


@settings(max_examples=60)
@given(story=strategies.stories(max_steps=12), about=strategies.settings(), machine=strategies.worlds())
def test_no_story_in_no_world_breaks_a_promise(
    story: strategies.Story, about: dict[str, object], machine: dict[str, object]
) -> None:
    """Stories, settings and machines as an embedder draws them."""
    with simulated_world(**about, **machine) as sim:
        for _ in story.told(sim):
            sim.check()


@settings(max_examples=40)
@given(placement=strategies.placements(), mode=strategies.modes())
def test_every_mode_is_reached_from_every_placement_or_there_is_a_reason(
    placement: strategies.Placement, mode: str
) -> None:
    """Whatever was there before us."""
    with simulated_world() as sim:
        placement.arrange(sim)
        outcome = sim.manager.set_execution_mode(mode)
        assert outcome.granted or outcome.reason is not None
        assert sim.manager.get_status().asked_mode is ExecutionMode[mode.upper()]


@settings(max_examples=80)
@given(
    answer=strategies.server_answers(),
    op=st.sampled_from(("ollama.load", "ollama.unload", "ollama.ps", "ollama.tags", "ollama.generate")),
)
def test_no_answer_of_a_server_is_more_than_an_error_that_was_promised(
    answer: strategies.ServerAnswer, op: str
) -> None:
    """Plausible or absurd: typed errors, kept promises, and all is well when it answers properly again."""
    with simulated_world() as sim:
        answer.arm(sim, op, times=3)
        for call in (
            lambda: sim.manager.set_execution_mode("recording"),
            sim.generate,
            sim.manager.ensure_vlm_unloaded,
        ):
            try:
                call()
            except errors.GPUFSMError as error:
                assert not isinstance(error, errors.InternalError), error
        sim.faults.heal()
        sim.drive_for(sim.manager.config.recover_cap_s + sim.world.vlm.load_s + 5.0)


@settings(max_examples=5)
@given(story=strategies.stories(min_steps=5))
def test_a_story_is_a_program(story: strategies.Story) -> None:
    """What it prints does the same, call by call."""
    with simulated_world() as sim:
        story.tell(sim)
    told = [(record.at, record.row) for record in sim.manager.journal]
    worlds: list[Simulation] = []
    program = str(story).replace("as sim:", "as sim:\n    worlds.append(sim)")
    exec(program, {"worlds": worlds})
    assert told == [(record.at, record.row) for record in worlds[0].manager.journal]


def test_what_another_client_loads_later_in_degraded_is_not_held_against_the_manager() -> None:
    """S4 is about the moment in which DEGRADED is entered.  A fuzz run (seed 107) told this story."""
    machine = testing.GPUStateMachine()
    try:
        machine.begin(
            gpu=True,
            version="0.32.15",
            clip=True,
            on_shortage="degrade",
            card_mib=6400.0,
            on_partial_offload="reload",
            reclaim_s=0.3,
            idle_timeout_s=20.0,
            troubles={"faults", "neighbours", "moments", "others"},
            tells_holders=True,
        )
        machine.every_promise_is_kept()
        machine.take_lease(model="vlm")
        machine.every_promise_is_kept()
        machine.break_something(delay_s=1.0, fault=("clip.encode", "after"), skip=0, times=1)
        machine.every_promise_is_kept()
        machine.heal()
        machine.every_promise_is_kept()
        machine.fill_the_card(leased=False, left_mib=0.0, mode=ExecutionMode.IDLE)
        machine.every_promise_is_kept()
        machine.request_in_a_step(at=0, first=ExecutionMode.IDLE, op="", preempt=False, then=ExecutionMode.IDLE)
        machine.every_promise_is_kept()
        machine.neighbour_gives()
        machine.every_promise_is_kept()
        machine.meet_a_moment(healed=False, long=True, moment="lease_half_way", wish=False)
        machine.every_promise_is_kept()
        machine.work()
        machine.every_promise_is_kept()
        machine.work()
        machine.every_promise_is_kept()
        machine.other_client(what="load")
        machine.every_promise_is_kept()
        machine.request(mode=ExecutionMode.AUTOPILOT, myself=False, preempt=False)
        machine.every_promise_is_kept()
    finally:
        machine.teardown()


@contextlib.contextmanager
def small_card(*, trouble: str, reclaim_s: float = 0.3) -> Iterator[testing.GPUStateMachine]:
    """A story on a card for one model at a time, whose driver does not tell who holds memory."""
    machine = testing.GPUStateMachine()
    try:
        machine.begin(
            gpu=True,
            clip=True,
            card_mib=6400.0,
            tells_holders=False,
            version="0.32.15",
            on_shortage="degrade",
            on_partial_offload="reload",
            idle_timeout_s=20.0,
            troubles={trouble},
            reclaim_s=reclaim_s,
        )
        yield machine
    finally:
        machine.teardown()


def test_a_refused_preempting_request_leaves_what_stood_wanted() -> None:
    """S6 ends with the refusal, also where an equal request came behind it (fuzz seed 107)."""
    with small_card(trouble="outages") as machine:
        machine.request(mode=ExecutionMode.RECORDING, preempt=False, myself=False)
        machine.stop_ollama(kill=False)
        machine.take_lease(model="clip")
        machine.burst(asked=[(ExecutionMode.AUTOPILOT, True, -1), (ExecutionMode.AUTOPILOT, False, -1)], leased=False)
        machine.nobody_uses_it()
        machine.every_promise_is_kept()


def test_a_renewal_that_puts_a_dead_runner_right_has_the_room_of_the_dead_one() -> None:
    """S5 is about what was decided on; here Ollama itself finds the runner dead (rules of the long proof, 1000190)."""
    with small_card(trouble="faults") as machine:
        machine.meet_a_fault(agent_first=False, fault=("ollama.generate", "runner_dies"), healed=False, times=1, way=0)
        machine.stray_event(what="renew")
        machine.every_promise_is_kept()


def test_another_client_s_load_has_ended_before_everything_is_called_well() -> None:
    """L2 begins when nothing is in the way; a load that turned the VLM out takes longer (rules, 1000261)."""
    with small_card(trouble="others", reclaim_s=2.5) as machine:
        machine.take_lease(model="vlm")
        machine.other_client(what="other")
        machine.converge(mode=ExecutionMode.RECORDING)
