"""The thirteen properties, each judged by the world and never by the manager's word alone.

What counts is the card's ledger (`card.history`, owners, times), the server's log and where the simulated CLIP really
is.  Every test enters through `GPUResourceManager`, over sizes, times, pasts and troubles that keep its premise.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from gpu_fsm import ExecutionMode, GPUResourceManager, Hold, ModelState, State, VRAMInfo
from gpu_fsm.errors import (
    ClipUnavailable,
    GPUFSMError,
    LeaseTimeout,
    LoadFailed,
    OllamaError,
    OperationTimeout,
    Refused,
    ReleaseUnproven,
    ResidencyUnknown,
    Superseded,
    UnloadStuck,
)
from gpu_fsm.events import Event, IdleUnload, ModeChanged
from gpu_fsm.simulation import VLM, LogEntry, SimulatedWorld
from tests.worlds import inline, threaded

pytestmark = pytest.mark.core

IDLE, RECORDING, AUTOPILOT, DEGRADED = ExecutionMode
STEPS = (State.RELEASING, State.MIGRATING, State.LOADING, State.SHEDDING)
EFFECTS = ("ollama.load", "ollama.unload", "clip.to_gpu", "clip.to_cpu")
RESERVE_MIB = 512
BACK = 0.9
"""The share of what was held that has to be back on the card."""
JITTER = 0.5
"""The least share of a back-off pause that its jitter leaves."""

# --- worlds, pasts, troubles ------------------------------------------------------------------------------------------


@st.composite
def sizes(draw: st.DrawFn, /, **fixed: Any) -> dict[str, Any]:
    """A card on which either model fits with the reserve, even after the context is paid; at times both do.

    Before the VLM was measured its size is a guess, at most a fifth too high.
    """
    vlm, clip = draw(st.integers(500, 6000)), draw(st.integers(50, 900))
    context, driver = draw(st.integers(0, 400)), draw(st.integers(0, 400))
    asked = math.ceil(1.2 * vlm)
    room = asked + clip if draw(st.booleans()) else max(asked, clip)
    return {
        "vlm_mib": vlm,
        "clip_mib": clip,
        "context_mib": context,
        "driver_mib": driver,
        "card_mib": driver + context + room + RESERVE_MIB + draw(st.integers(0, 50)),
        "vlm_load_s": draw(st.sampled_from([0.5, 4.0, 30.0])),
        "reclaim_s": draw(st.sampled_from([0.0, 0.3, 1.5, 4.0])),
        "unload_s": draw(st.sampled_from([0.01, 0.08, 1.0])),
        "latency_s": draw(st.sampled_from([0.0, 0.001, 0.05])),
        "version": draw(st.sampled_from(["0.32", "0.24"])),
        "tells_holders": draw(st.booleans()),
        **fixed,
    }


A_SMALL_VLM_BESIDE_A_LARGE_CLIP: dict[str, Any] = {
    "vlm_mib": 600,
    "clip_mib": 900,
    "context_mib": 0,
    "driver_mib": 0,
    "card_mib": 720 + 900 + RESERVE_MIB,
    "reclaim_s": 4.0,
}
"""Both fit; where both are given back, most of the memory is back before any of the VLM's is."""


Deed = tuple[str, Any]

deeds: st.SearchStrategy[Deed] = st.one_of(
    st.tuples(st.just("mode"), st.sampled_from([IDLE, RECORDING, AUTOPILOT])),
    st.tuples(st.just("load"), st.none()),
    st.tuples(st.just("unload"), st.none()),
    st.tuples(st.just("clip"), st.sampled_from(["gpu", "cpu"])),
    st.tuples(st.just("use"), st.none()),
    st.tuples(st.just("encode"), st.none()),
    st.tuples(st.just("pass"), st.sampled_from([1.0, 20.0, 400.0])),
)
pasts = st.lists(deeds, max_size=5)
"""What has been done before: it leads to every mode, hold and placement."""


def do(manager: GPUResourceManager, deed: Deed) -> None:
    """Do one deed; refusals are taken as an answer, and so is that CLIP cannot go where there is no GPU."""
    verb, what = deed
    with contextlib.suppress(Refused, ClipUnavailable):
        match verb:
            case "mode":
                manager.set_execution_mode(what)
            case "load":
                manager.ensure_vlm_loaded()
            case "unload":
                manager.ensure_vlm_unloaded()
            case "clip":
                manager.migrate_clip_to_gpu() if what == "gpu" else manager.migrate_clip_to_cpu()
            case "use":
                with manager.vlm() as vlm:
                    vlm.generate("What is this?")
            case "encode":
                with manager.clip() as clip:
                    clip.encode(["a window"])
            case "pass":
                manager.drive_for(what)


@frozen
class Trouble:
    """A fault to arm."""

    op: str
    kind: str
    times: int = 1
    skip: int = 0
    delay_s: float = 0.0

    def arm(self, world: SimulatedWorld) -> None:
        more = {"delay_s": self.delay_s} if self.delay_s else {}
        world.faults.arm(self.op, self.kind, self.times, skip=self.skip, **more)


def _armed(op: str, kinds: Iterable[str], times: int) -> st.SearchStrategy[Trouble]:
    return st.builds(Trouble, st.just(op), st.sampled_from(sorted(kinds)), st.integers(1, times))


bearable = st.lists(
    st.one_of(
        _armed("ollama.load", {"before", "after", "http_500", "http_503", "runner_dies", "truncated"}, 2),
        _armed("ollama.unload", {"before", "after", "silent", "http_500", "http_503"}, 2),
        st.builds(Trouble, st.sampled_from(["ollama.unload", "ollama.load"]), st.just("late"), delay_s=st.just(1.5)),
        st.builds(Trouble, st.sampled_from(["ollama.ps", "probe.read"]), st.just("late"), delay_s=st.just(0.4)),
        st.builds(Trouble, st.sampled_from(["clip.to_gpu", "clip.to_cpu"]), st.just("late"), delay_s=st.just(3.0)),
    ),
    max_size=2,
    unique_by=lambda trouble: trouble.op,
)
"""What goes wrong now and then and has to be borne: another try, or patience, is enough."""


def begin(world: SimulatedWorld, resident: bool = False) -> None:
    """At times another program has loaded our model before we came."""
    if resident:
        world.ollama.foreign_load(VLM)
        world.clock.advance(60)
        assert world.vlm_resident()


# --- what is true -----------------------------------------------------------------------------------------------------


def ours(world: SimulatedWorld, op: str, since: float = -math.inf) -> list[LogEntry]:
    """Our requests of one kind that reached the server since a moment."""
    return [entry for entry in world.ollama.log if entry.client == "us" and entry.op == op and entry.at >= since]


def vlm_on_card(world: SimulatedWorld) -> float:
    """What the VLM's processes hold by the card's own ledger, those that are on their way out included."""
    return sum(mib for owner, mib in world.card.owners().items() if owner.startswith(f"ollama:{VLM}#"))


def ledger_at(world: SimulatedWorld, moment: float, belongs: Callable[[str], bool] = lambda owner: True) -> float:
    """What `belongs` held at a moment, by the card's history; changes at that very moment are included."""
    return math.fsum(change.delta_mib for change in world.card.history if change.at <= moment and belongs(change.owner))


def used_at(world: SimulatedWorld, moment: float) -> float:
    """What the whole card held at a moment."""
    return ledger_at(world, moment)


def vlm_at(world: SimulatedWorld, moment: float) -> float:
    """What the VLM held on the card at a moment."""
    return ledger_at(world, moment, lambda owner: owner.startswith(f"ollama:{VLM}#"))


def one_must_go(world: SimulatedWorld) -> bool:
    """By the ledger: CLIP and the VLM do not fit together with the reserve, even if the VLM is taken for smaller.

    Before it was measured its size is a guess from the size on disk, here up to a twentieth too low.
    """
    others = math.fsum(m for o, m in world.card.owners().items() if o != "clip" and not o.startswith(f"ollama:{VLM}#"))
    return others + world.clip.clip_mib + 0.95 * world.vlm.size_mib + RESERVE_MIB > world.card.total_mib


class Watch:
    """Looks on at every I/O call, in the middle of steps, and keeps what was wrong.

    A failed assertion inside a hook would be taken for a failing port, so nothing is raised here; `verdict` is.
    """

    def __init__(self, world: SimulatedWorld, look: Callable[[str, str], str | None]) -> None:
        self.wrong: list[str] = []
        self._world, self._look = world, look
        world.on_io.append(self._on_io)

    def _on_io(self, op: str, phase: str) -> None:
        try:
            complaint = self._look(op, phase)
        except Exception as error:
            complaint = repr(error)
        if complaint:
            self.wrong.append(f"{self._world.clock.monotonic():.3f} s, {op} {phase}: {complaint}")

    def verdict(self) -> None:
        """Raise what was wrong."""
        self._world.on_io.remove(self._on_io)
        assert not self.wrong, "\n".join(self.wrong[:5])


def promises(world: SimulatedWorld, manager: GPUResourceManager) -> Callable[[str, str], str | None]:
    """A mode that is shown is kept in the world, at every moment at which it is shown."""

    def look(op: str, phase: str) -> str | None:
        status = manager.get_status()
        if status.state is State.AUTOPILOT and status.hold is None and world.vlm_resident():
            return "AUTOPILOT is shown with the VLM resident"
        if status.state is State.AUTOPILOT and status.hold is None and world.gpu and world.clip.place != "gpu":
            return "AUTOPILOT is shown with CLIP off the GPU"
        if status.state is State.RECORDING and status.hold is None and not world.vlm_resident():
            return "RECORDING is shown without the VLM"
        if status.state is State.RECORDING and world.clip.place != "cpu":
            return "RECORDING is shown with CLIP off the CPU"
        return None

    return look


# --- the properties ---------------------------------------------------------------------------------------------------


@given(sizes=sizes(), resident=st.booleans(), past=pasts, trouble=bearable, preempt=st.booleans())
def test_property_01_entering_autopilot_unloads_the_vlm(
    sizes: dict[str, Any], resident: bool, past: list[Deed], trouble: list[Trouble], preempt: bool
) -> None:
    """From anywhere, whoever loaded it: when AUTOPILOT is shown or granted, no process of the VLM is left."""
    world = SimulatedWorld(**sizes)
    begin(world, resident)
    with inline(world) as manager:
        watch = Watch(world, promises(world, manager))
        for deed in past:
            do(manager, deed)
        was_in, since = world.vlm_resident(), world.clock.monotonic()
        for fault in trouble:
            fault.arm(world)
        outcome = manager.set_execution_mode(AUTOPILOT, preempt=preempt)
        assert outcome.granted, outcome
        assert not world.vlm_resident()
        assert world.ollama.loading() is None
        assert vlm_on_card(world) <= (1 - BACK) * world.vlm.size_mib
        assert bool(ours(world, "ollama.unload", since)) == was_in
        manager.drive_for(60)
        assert not world.vlm_resident(), "it stays out"
        watch.verdict()


@given(sizes=sizes(), resident=st.booleans(), past=pasts, trouble=bearable)
@example(sizes=A_SMALL_VLM_BESIDE_A_LARGE_CLIP, resident=False, past=[], trouble=[Trouble("ollama.load", "partial")])
def test_property_02_entering_recording_loads_the_vlm(
    sizes: dict[str, Any], resident: bool, past: list[Deed], trouble: list[Trouble]
) -> None:
    """From anywhere: when RECORDING is shown or granted, the VLM is resident and wholly on the GPU."""
    world = SimulatedWorld(**sizes)
    begin(world, resident)
    with inline(world) as manager:
        watch = Watch(world, promises(world, manager))
        for deed in past:
            do(manager, deed)
        was_in, since = world.vlm_resident(), world.clock.monotonic()
        for fault in trouble:
            fault.arm(world)
        outcome = manager.set_execution_mode(RECORDING)
        assert outcome.granted, outcome
        assert world.vlm_resident()
        assert vlm_on_card(world) == pytest.approx(world.vlm.size_mib)
        assert world.clip.place == "cpu"
        assert bool(ours(world, "ollama.load", since)) == (not was_in)
        manager.drive_for(60)
        assert world.vlm_resident(), "it stays in"
        watch.verdict()


@given(
    sizes=sizes(),
    past=pasts,
    trouble=bearable,
    neighbour=st.integers(0, 8000),
    gpu=st.sampled_from([True, True, True, False]),
)
def test_property_03_in_autopilot_clip_is_on_the_gpu_where_there_is_one_and_it_fits(
    sizes: dict[str, Any], past: list[Deed], trouble: list[Trouble], neighbour: int, gpu: bool
) -> None:
    """Granted if and only if it fits beside the others; then all of CLIP is on the card, else none of it."""
    world = SimulatedWorld(**sizes, gpu=gpu)
    with inline(world) as manager:
        for deed in past:
            do(manager, deed)
        neighbour = min(neighbour, int(world.card.free_mib))
        world.card.take("game", neighbour)
        for fault in trouble:
            fault.arm(world)
        others = math.fsum(
            mib for owner, mib in world.card.owners().items() if owner != "clip" and not owner.startswith("ollama:")
        )
        context = 0 if world.card.held_mib("clip-context") or not world.clip.context_mib else world.clip.context_mib
        fits = world.clip.place == "gpu" or others + context + world.clip.clip_mib + RESERVE_MIB <= world.card.total_mib
        outcome = manager.set_execution_mode(AUTOPILOT)
        event(f"gpu={gpu} fits={fits}")
        if not gpu:
            assert outcome.granted, outcome
            assert (world.clip.place, manager.get_clip_device()) == ("cpu", "cpu")
        elif fits:
            assert outcome.granted, outcome
            assert world.clip.place == "gpu"
            assert world.card.held_mib("clip") == world.clip.clip_mib
        else:
            assert not outcome.granted
            assert outcome.reason is not None
            assert outcome.reason.code == "vram_insufficient"
            assert world.clip.place == "cpu"
            assert world.card.held_mib("clip") == 0


@pytest.mark.parametrize("how", ["mode", "unload", "idle", "close"])
@settings(max_examples=30)
@given(
    sizes=sizes(),
    resident=st.booleans(),
    start=st.sampled_from(["recording", "idle", "autopilot"]),
    trouble=bearable,
)
@example(sizes=A_SMALL_VLM_BESIDE_A_LARGE_CLIP, resident=False, start="autopilot", trouble=[])
def test_property_04_used_memory_falls_by_what_the_vlm_held_before_anyone_is_told(
    sizes: dict[str, Any], resident: bool, start: str, how: str, trouble: list[Trouble]
) -> None:
    """Whatever the way out, an answer or an event that tells of it comes after the card's memory is back."""
    world = SimulatedWorld(**sizes)
    begin(world, resident)
    told: list[Event] = []
    with inline(world, idle_timeout_s=50) as manager:
        manager.subscribe(told.append, "idle_unload", "mode_changed")
        manager.set_execution_mode(start)
        manager.ensure_vlm_loaded()
        assert world.vlm_resident()
        told.clear()
        held, before = vlm_on_card(world), world.card.used_mib
        clip_before = world.card.held_mib("clip") + world.card.held_mib("clip-context")
        for fault in trouble:
            fault.arm(world)
        asked_at = world.clock.monotonic()
        answered_at: float | None = None
        if how == "mode":
            manager.set_execution_mode(AUTOPILOT)
        elif how == "unload":
            manager.ensure_vlm_unloaded()
        elif how == "close":
            manager.close()
        else:
            manager.drive_for(50 + 40)
        if how != "idle":
            answered_at = world.clock.monotonic()
        assert not world.vlm_resident()
        moments = [e.at for e in told if isinstance(e, ModeChanged | IdleUnload) and e.at > asked_at]
        if how == "idle":
            assert [e.kind for e in told] == ["idle_unload"]
        for moment in [*moments, *([] if answered_at is None else [answered_at])]:
            clip_now = ledger_at(world, moment, lambda owner: owner.startswith("clip"))
            fallen = (before - clip_before) - (used_at(world, moment) - clip_now)
            assert fallen >= BACK * held - 1e-6, (moment, fallen, held)
            assert vlm_at(world, moment) <= (1 - BACK) * held + 1e-6


@given(
    sizes=sizes(),
    gpu=st.sampled_from([True, True, True, False]),
    past=st.lists(deeds, min_size=1, max_size=6),
    trouble=st.lists(
        st.one_of(
            _armed("ollama.load", {"oom", "http_500", "runner_dies", "partial"}, 8),
            _armed("ollama.unload", {"silent", "before"}, 40),
            _armed("ollama.ps", {"before", "html", "http_500"}, 3),
            _armed("clip.to_gpu", {"oom", "before", "after", "gpu_lost"}, 1),
            _armed("clip.to_cpu", {"before", "after"}, 1),
        ),
        max_size=2,
    ),
)
def test_property_05_the_status_is_complete_at_every_moment(
    sizes: dict[str, Any], gpu: bool, past: list[Deed], trouble: list[Trouble]
) -> None:
    """Sampled before, in and after every call of every step: all facts are there, agree, and cost no I/O."""
    world = SimulatedWorld(**sizes, gpu=gpu)
    modes: list[ExecutionMode] = [IDLE]
    entered: dict[str, Any] = {"state": State.IDLE, "since": 0.0}
    inside = False

    def look(op: str, phase: str) -> str | None:
        nonlocal inside
        if inside:
            return "get_status did I/O"
        inside = True
        now, status = world.clock.monotonic(), manager.get_status()
        inside = False
        json.dumps(status.to_dict(), allow_nan=False)
        if world.clock.monotonic() != now or status.now_at != now:
            return f"the status is of {status.now_at}"
        state = status.state
        if state is not entered["state"]:
            if not entered["since"] <= status.since_at <= now:
                return f"{state} since {status.since_at}, before it {entered}"
            entered.update(state=state, since=status.since_at)
        if state in STEPS:
            if status.execution_mode is not modes[-1]:
                return f"in {state} the mode is {status.execution_mode}, the last settled one was {modes[-1]}"
        else:
            modes.append(ExecutionMode(state.value))
            if status.execution_mode is not modes[-1]:
                return f"{state} with the mode {status.execution_mode}"
            if not any(timer.name == "check" for timer in status.timers):
                return f"{state} without a check: {status.timers}"
        if (state is State.DEGRADED) and status.reason is None:
            return "DEGRADED without a reason"
        if (state in (State.IDLE, State.RECORDING, State.AUTOPILOT)) and status.reason is not None:
            return f"{state} with a reason"
        if state is State.DEGRADED and not any(timer.name == "recover" for timer in status.timers):
            return "DEGRADED without recovery"
        if status.hold is Hold.PARKED and status.execution_mode is not RECORDING:
            return f"PARKED in {status.execution_mode}"
        if not isinstance(status.vlm_state, ModelState) or status.vlm_model != VLM:
            return f"the VLM is {status.vlm_state}"
        if status.clip_device not in ("cpu", "sim:0"):
            return f"CLIP is on {status.clip_device}"
        if status.leases != held:
            return f"leases {status.leases}, held are {held}"
        loading = state is State.LOADING and status.vlm_state is ModelState.LOADING
        if (op, phase) == ("ollama.load", "during") and not loading:
            return f"in the middle of a load: {state}, {status.vlm_state}"
        if op == "clip.to_gpu" and state is not State.MIGRATING:
            return f"CLIP goes up in {state}"
        if op in ("ollama.unload", "clip.to_cpu") and state in (State.IDLE, State.RECORDING, State.AUTOPILOT):
            return f"{op} in {state}"
        return _card_as_it_was(world, status.vram) if status.observed_at is not None else None

    with inline(world, idle_timeout_s=60, vlm_load_deadline_s=60) as manager:
        held: tuple[Any, ...] = ()
        watch = Watch(world, look)
        for fault in trouble:
            fault.arm(world)
        for deed in past:
            with contextlib.suppress(GPUFSMError):
                if deed[0] == "encode":
                    with manager.clip(holder="probe") as clip:
                        held = manager.get_status().leases
                        assert [(lease.model, lease.holder) for lease in held] == [("clip", "probe")]
                        clip.encode(["x"])
                elif deed[0] == "use":
                    with manager.vlm(holder="probe") as vlm:
                        held = manager.get_status().leases
                        assert [(lease.model, lease.holder) for lease in held] == [("vlm", "probe")]
                        vlm.generate("What is this?")
                else:
                    do(manager, deed)
            held = ()
            status = manager.get_status()
            assert status.clip_device == world.clip.device
            if status.vlm_state is ModelState.LOADED:
                assert world.vlm_resident()
            if status.vlm_state is ModelState.UNLOADED:
                assert not world.vlm_resident()
            assert (status.state is State.DEGRADED) == (status.reason is not None)
        watch.verdict()


def _card_as_it_was(world: SimulatedWorld, vram: VRAMInfo) -> str | None:
    """The shown memory is what the driver had at the moment that the status names."""
    if not world.gpu:
        return None if vram.total_mib is None and vram.free_mib is None else "figures without a card"
    if vram.total_mib != world.card.total_mib or vram.free_mib is None:
        return f"the card is {vram}"
    values = [ledger_at(world, math.nextafter(vram.at, -math.inf))]
    values += [change.used_mib for change in world.card.history if change.at == vram.at]
    shown = vram.total_mib - vram.free_mib
    return None if any(abs(shown - value) < 1e-3 for value in values) else f"{shown} MiB used, it was {values}"


@pytest.mark.parametrize("way", ["recording", "on demand", "idle on demand"])
@settings(max_examples=40)
@given(
    sizes=sizes(),
    past=pasts,
    trouble=st.lists(
        st.one_of(
            _armed("clip.to_cpu", {"before", "after", "silent"}, 1),
            st.builds(Trouble, st.just("clip.to_cpu"), st.just("late"), delay_s=st.just(5.0)),
            _armed("ollama.load", {"http_500", "before", "partial"}, 1),
        ),
        max_size=2,
        unique_by=lambda trouble: trouble.op,
    ),
)
def test_property_06_clip_is_on_the_cpu_before_the_load_of_a_vlm_that_wants_it_there(
    sizes: dict[str, Any], past: list[Deed], way: str, trouble: list[Trouble]
) -> None:
    """No byte of CLIP is on the card when the load is sent and while it runs; a move that fails means no load."""
    world = SimulatedWorld(**sizes)
    wants_cpu = [False]

    def look(op: str, phase: str) -> str | None:
        if op != "ollama.load" or phase == "after" or not wants_cpu[0]:
            return None
        if world.clip.place != "cpu" or world.card.held_mib("clip"):
            return f"CLIP is on the {world.clip.place} with {world.card.held_mib('clip')} MiB"
        return None

    with inline(world) as manager:
        watch = Watch(world, look)
        for deed in past:
            wants_cpu[0] = deed == ("mode", RECORDING)
            do(manager, deed)
        wants_cpu[0] = False
        manager.set_execution_mode(IDLE if way == "idle on demand" else AUTOPILOT)
        if way == "idle on demand":
            do(manager, ("unload", None))
            do(manager, ("clip", "gpu"))
        assert world.clip.place == "gpu"
        assert not world.vlm_resident()
        wants_cpu[0] = way == "recording" or one_must_go(world)
        for fault in trouble:
            fault.arm(world)
        begun = world.clock.monotonic()
        outcome = None
        with contextlib.suppress(GPUFSMError):
            if way == "recording":
                outcome = manager.set_execution_mode(RECORDING)
            else:
                manager.ensure_vlm_loaded()
        loads = ours(world, "ollama.load", begun)
        broken = any(fault.op == "clip.to_cpu" and fault.kind != "late" for fault in trouble)
        event(f"must go={wants_cpu[0]} broken={broken} loads={bool(loads)}")
        if wants_cpu[0]:
            for change in world.card.history:
                if change.at >= begun and change.owner.startswith("ollama:") and change.delta_mib > 0:
                    assert ledger_at(world, change.at, lambda owner: owner == "clip") == 0
            if broken:
                assert not loads
        if not trouble:
            assert loads
            assert world.vlm_resident()
            assert outcome is None or outcome.granted
        watch.verdict()


@given(
    sizes=sizes(),
    past=st.lists(deeds, min_size=1, max_size=8),
    intrusions=st.lists(
        st.tuples(st.sampled_from([IDLE, RECORDING, AUTOPILOT]), st.booleans(), st.sampled_from([0.0, 2.0, 30.0])),
        min_size=1,
        max_size=8,
    ),
    trouble=st.lists(
        st.one_of(_armed("clip.to_gpu", {"oom", "before", "after"}, 1), _armed("clip.to_cpu", {"before", "after"}, 1)),
        max_size=2,
    ),
)
def test_property_07_the_same_input_gives_the_same_embedding_through_all_migrations(
    sizes: dict[str, Any],
    past: list[Deed],
    intrusions: list[tuple[ExecutionMode, bool, float]],
    trouble: list[Trouble],
) -> None:
    """Probed around every deed, with requests and time let loose in the middle of each encode: CLIP never moves then.

    The move that was asked for in the middle waits for the lease, or is refused with `LeaseTimeout`; it is never lost.
    """
    world = SimulatedWorld(**sizes)
    items = ["a window", b"pixels", {"text": "a button"}]
    wrong: list[str] = []
    asked: list[Any] = []
    calls = iter(intrusions * 100)

    def intrude(_: object) -> None:
        mode, preempt, seconds = next(calls)
        place, moves = world.clip.place, world.clip.ups + world.clip.downs
        # Somebody else asks: who holds the lease itself would get `LeaseHeld` at once.
        asked.append(contextvars.Context().run(manager.submit_execution_mode, mode, preempt=preempt))
        manager.drive_for(seconds)
        if world.clip.place != place or world.clip.ups + world.clip.downs != moves:
            wrong.append(f"CLIP moved from the {place} during an encode")
        if world.card.held_mib("clip") != (world.clip.clip_mib if place == "gpu" else 0):
            wrong.append("half of CLIP is elsewhere")

    with inline(world) as manager:
        with manager.clip() as clip:
            reference = clip.encode(items)
        assert reference.shape == (3, world.clip.dimensions)
        world.clip.on_encode.append(intrude)
        for fault in trouble:
            fault.arm(world)
        for deed in past:
            with contextlib.suppress(GPUFSMError):
                do(manager, deed)
            with manager.clip() as clip:
                assert (clip.encode(items) == reference).all()
            manager.drive_for(0.5)
        world.clip.on_encode.clear()
        assert not wrong, wrong
        assert not world.clip.violations
        manager.drive_for(120)
        for future in asked:
            with contextlib.suppress(LeaseTimeout, Superseded):
                future.result(timeout=0)
        event(f"migrations: {min(world.clip.ups + world.clip.downs, 6)}")


@pytest.mark.needs_torch
@settings(max_examples=8)
@given(turns=st.lists(st.sampled_from(["recording", "autopilot", "idle", "on demand"]), min_size=3, max_size=8))
def test_the_real_clip_gives_the_same_vectors_through_all_migrations(
    turns: list[str], tiny_clip: Path, second_device: str
) -> None:
    """Two threads encode all the time while the mode changes: every vector is right and every tensor on one device."""
    import numpy as np
    from sentence_transformers import SentenceTransformer

    from gpu_fsm.clip import CLIPManager
    from gpu_fsm.ollama import OllamaManager

    world = SimulatedWorld()
    config = world.config(clip_model=str(tiny_clip), clip_device=second_device)
    model = SentenceTransformer(str(tiny_clip), device="cpu", local_files_only=True)
    items = ["a window", "the button in the corner"]
    with GPUResourceManager(
        config,
        vlm_server=OllamaManager(config, clock=world.clock, transport=world.transport),
        clip_host=CLIPManager(config, model=model),
        vram_probe=world.probe,
        clock=world.clock,
    ) as manager:
        with manager.clip() as clip:
            reference = clip.encode(items)
        over, wrong, seen = threading.Event(), [], set()

        def probe() -> None:
            while not over.is_set():
                try:
                    with manager.clip() as clip:
                        before = clip.device
                        vectors = clip.encode(items)
                        devices = {str(t.device) for t in (*model.parameters(), *model.buffers())}
                        if devices != {before} or clip.device != before:
                            wrong.append(f"{devices} and {clip.device}, it began on {before}")
                        if not np.allclose(vectors, reference, atol=1e-5):
                            wrong.append(f"other vectors on {before}")
                        seen.add(before)
                except Exception as error:
                    wrong.append(repr(error))

        probers = [threading.Thread(target=probe, daemon=True) for _ in range(2)]
        for prober in probers:
            prober.start()
        try:
            for turn in turns:
                if turn == "on demand":
                    manager.ensure_vlm_loaded(timeout_s=60)
                    continue
                assert manager.set_execution_mode(turn, timeout_s=60).granted
                device = manager.get_clip_device()
                assert {str(t.device) for t in (*model.parameters(), *model.buffers())} == {device}
                if turn == "autopilot":
                    assert device == second_device
                elif turn == "recording":
                    assert device == "cpu"
        finally:
            over.set()
            for prober in probers:
                prober.join(30)
        assert not wrong, wrong[:3]
        assert seen


uses = st.lists(
    st.tuples(
        st.sampled_from(["generate", "stream", "chat", "lease", "ensure", "loan"]),
        st.floats(0.05, 0.95),
        st.sampled_from([0.3, 1.0, 2.5]),
    ),
    max_size=4,
)
"""(how the VLM is used, after which share of the idle time, for which multiple of it)"""


@pytest.mark.parametrize("start", [RECORDING, IDLE, AUTOPILOT])
@settings(max_examples=30)
@given(
    sizes=sizes(latency_s=0.0, vlm_load_s=4.0, generate_s=0.5),
    idle_s=st.sampled_from([7.0, 60.0, 300.0]),
    check_s=st.sampled_from([2.0, 5.0, 45.0]),
    margin_s=st.sampled_from([1.0, 60.0]),
    uses=uses,
)
def test_property_08_the_vlm_is_unloaded_after_the_idle_timeout_and_never_while_leased(
    sizes: dict[str, Any], start: ExecutionMode, idle_s: float, check_s: float, margin_s: float, uses: list[Any]
) -> None:
    """To the tick: asked to go at last use + `idle_timeout_s`; told once, after the memory is back; any use re-arms."""
    world = SimulatedWorld(**sizes)
    told: list[Event] = []
    with inline(world, idle_timeout_s=idle_s, check_interval_s=check_s, keep_alive_margin_s=margin_s) as manager:
        manager.subscribe(told.append, "idle_unload")
        manager.set_execution_mode(start)
        manager.ensure_vlm_loaded()
        last = world.clock.monotonic()
        for use, share, length in uses:
            manager.drive_for(idle_s * share)
            assert world.vlm_resident(), "too early"
            if use == "ensure":
                manager.ensure_vlm_loaded()
            else:
                with manager.vlm() as vlm:
                    if use == "generate":
                        vlm.generate("What is this?")
                    elif use == "stream":
                        assert list(vlm.stream("What is this?"))[-1].done
                    elif use == "chat":
                        vlm.chat([{"role": "user", "content": "What is this?"}])
                    elif use == "loan":
                        manager.drive_for(idle_s * length)
                        assert world.vlm_resident(), "unloaded under a lease"
            last = world.clock.monotonic()
        assert not ours(world, "ollama.unload")
        assert world.ollama.counts["unloads"] == 0, "not even by the server's own timer"
        assert not told
        due = last + idle_s
        manager.drive_for(idle_s * 0.999)
        assert world.vlm_resident()
        assert not ours(world, "ollama.unload")
        manager.drive_for(idle_s * 0.001 + 3 * (idle_s + 60))
        assert not world.vlm_resident()
        (unload,) = ours(world, "ollama.unload")
        assert unload.at == pytest.approx(due, abs=1e-6)
        gone = [c.at for c in world.card.history if c.owner.startswith(f"ollama:{VLM}#") and c.delta_mib < 0]
        # The server acknowledges, and acts 2 ms later.
        assert gone == [pytest.approx(due + 0.002 + sizes["unload_s"] + sizes["reclaim_s"], abs=1e-6)]
        (event,) = told
        assert isinstance(event, IdleUnload)
        assert gone[0] - 1e-9 <= event.at <= gone[0] + 0.5
        assert event.model == VLM
        assert event.idle_s == pytest.approx(event.at - last, abs=1e-6)
        assert world.clip.place == {AUTOPILOT: "gpu"}.get(start, "cpu")
        assert manager.get_status().execution_mode is start
        with manager.vlm() as vlm:
            assert world.vlm_resident(), "and back on demand"
            vlm.generate("Again?")


@given(
    sizes=sizes(),
    past=pasts,
    trouble=bearable,
    prompts=st.lists(st.text(st.characters(categories=["L"]), min_size=1, max_size=8), min_size=1, max_size=3),
    hopeless=st.booleans(),
)
def test_property_09_a_vlm_request_while_unloaded_loads_it_first_and_is_then_processed(
    sizes: dict[str, Any], past: list[Deed], trouble: list[Trouble], prompts: list[str], hopeless: bool
) -> None:
    """The server sees a load that ends well, then the prompt; a load that cannot be costs an error, and no prompt."""
    world = SimulatedWorld(**sizes, responder=lambda model, prompt, images: f"{prompt}!")
    arrived: list[tuple[str, bool]] = []

    def look(op: str, phase: str) -> str | None:
        if op == "ollama.generate" and phase == "before":
            arrived.append((op, world.vlm_resident()))
        return None

    with inline(world) as manager:
        for deed in past:
            do(manager, deed)
        manager.ensure_vlm_unloaded()
        assert not world.vlm_resident()
        mode, since = manager.get_status().execution_mode, world.clock.monotonic()
        for fault in trouble:
            fault.arm(world)
        if hopeless:
            world.faults.heal()
            world.faults.arm("ollama.load", "http_500", None)
        watch = Watch(world, look)
        answers = []
        with contextlib.ExitStack() as stack:
            if hopeless:
                stack.enter_context(pytest.raises(LoadFailed))
            for prompt in prompts:
                with manager.vlm() as vlm:
                    assert world.vlm_resident()
                    answers.append(vlm.generate(prompt).text)
        log = [e for e in world.ollama.log if e.at >= since and e.op in ("ollama.load", "ollama.generate")]
        watch.verdict()
        assert manager.get_status().execution_mode is mode
        if hopeless:
            assert not answers
            assert {e.op for e in log} == {"ollama.load"}
            return
        assert answers == [f"{prompt}!" for prompt in prompts]
        assert arrived == [("ollama.generate", True)] * len(prompts)
        generations = [e for e in log if e.op == "ollama.generate"]
        assert [e.body["prompt"] for e in generations] == prompts
        loads = [e for e in log if e.op == "ollama.load"]
        assert loads
        last = loads[-1]
        assert last.ended_at is not None
        assert last.ended_at <= generations[0].at
        assert world.ollama.counts["reloads"] == 0, "the prompt wanted the very runner that was loaded"


@pytest.mark.parametrize(
    "kind",
    ["http_500", "before", "http_503", "truncated", "runner_dies", "oom", "html", "silent", "hang", "http_404"],
)
@settings(max_examples=15)
@given(
    sizes=sizes(vlm_load_s=4.0),
    start=st.sampled_from([IDLE, AUTOPILOT]),
    times=st.integers(0, 6),
    retries=st.integers(0, 3),
    base=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_property_10_ensure_loaded_returns_with_the_vlm_resident_or_raises_after_few_tries(
    sizes: dict[str, Any], start: ExecutionMode, kind: str, times: int, retries: int, base: float
) -> None:
    """By the server's log: one try, then at most `vlm_load_retries`, each after a pause that doubles."""
    world = SimulatedWorld(**sizes)
    deadline_s = 40.0
    with inline(
        world, vlm_load_retries=retries, retry_base_s=base, retry_cap_s=8.0, vlm_load_deadline_s=deadline_s
    ) as manager:
        manager.set_execution_mode(start)
        if times:
            world.faults.arm("ollama.load", kind, times)
        begun = world.clock.monotonic()
        error: GPUFSMError | None = None
        try:
            manager.ensure_vlm_loaded()
        except GPUFSMError as raised:
            error = raised
        took = world.clock.monotonic() - begun
        # A load of what is in already, because only its answer was lost, is a try too.
        loads = sorted([*ours(world, "ollama.load", begun), *ours(world, "ollama.renew", begun)], key=lambda e: e.at)
        event(f"{kind}: {'resident' if error is None else type(error).__name__}")
        if error is None:
            assert world.vlm_resident()
            assert vlm_on_card(world) == pytest.approx(world.vlm.size_mib)
        else:
            assert not world.vlm_resident() or (kind == "truncated" and start is IDLE)
            assert isinstance(error, OllamaError)
            assert error.attempts == len(loads)
            assert manager.get_status().execution_mode is start, "it costs the caller an error, never the mode"
        assert 1 <= len(loads) <= 1 + retries
        if kind in ("http_500", "before", "http_503", "runner_dies"):
            assert (error is None) == (times <= retries)
            assert len(loads) == 1 + min(times, retries)
        if kind == "truncated":
            assert (error is None) == (not times or retries > 0), "the second try finds it resident"
        if kind == "oom":
            assert len(loads) <= 2, "memory does not come by asking"
        if kind == "http_404" and times:
            assert len(loads) == 1, "a model that is not there does not come by asking"
        for n, (failed, again) in enumerate(itertools.pairwise(loads)):
            assert failed.ended_at is not None
            pause = again.at - failed.ended_at
            assert pause >= JITTER * min(8.0, base * 2**n) - 1e-6, (n, pause)
        # Beyond the load's own deadline: the way back to the mode, whose looks and releases have deadlines too.
        assert took <= deadline_s + 45.0


@settings(max_examples=15)
@given(
    sizes=sizes(),
    start=st.sampled_from([IDLE, RECORDING, AUTOPILOT]),
    verb=st.sampled_from(["load", "mode"]),
    timeout_s=st.sampled_from([0.0, 0.01, 0.03]),
)
def test_property_10_a_timeout_ends_the_waiting_and_never_the_load(
    sizes: dict[str, Any], start: ExecutionMode, verb: str, timeout_s: float
) -> None:
    """A load that stands still costs the caller `timeout_s` of real time; it ends well when it goes on."""
    world = SimulatedWorld(**sizes)
    stands, go_on = threading.Event(), threading.Event()

    def stand_still(op: str, phase: str) -> None:
        if (op, phase) == ("ollama.load", "during"):
            stands.set()
            assert go_on.wait(30)

    with threaded(world) as manager:
        manager.set_execution_mode(start)
        manager.ensure_vlm_unloaded()
        world.on_io.append(stand_still)
        try:
            with pytest.raises(OperationTimeout) as raised:
                if verb == "load":
                    manager.ensure_vlm_loaded(timeout_s=timeout_s)
                else:
                    manager.set_execution_mode(RECORDING, timeout_s=timeout_s)
            assert raised.value.timeout_s == timeout_s
            assert stands.wait(30)
            assert manager.get_status().state is State.LOADING
            assert not world.vlm_resident()
        finally:
            go_on.set()
        manager.ensure_vlm_loaded(timeout_s=30)
        assert world.vlm_resident()
        assert world.ollama.counts["load_aborts"] == 0
        assert world.ollama.counts["loads"] == len(ours(world, "ollama.load"))


@pytest.mark.parametrize(
    "kind", ["none", "silent", "before", "http_500", "http_503", "late", "hang", "reclaim_never", "after", "blind"]
)
@settings(max_examples=15)
@given(
    sizes=sizes(tells_holders=False),
    resident=st.booleans(),
    start=st.sampled_from([IDLE, RECORDING, AUTOPILOT]),
    times=st.sampled_from([1, 2, 1000, 1000]),
)
@example(  # either fits and not both: without the VLM's memory CLIP cannot come back, and the mode is lost over it
    sizes={"vlm_mib": 5000, "card_mib": 6200, "tells_holders": False}, resident=False, start=AUTOPILOT, times=1
)
def test_property_11_ensure_unloaded_returns_with_the_vlm_gone_and_the_memory_back_or_raises(
    sizes: dict[str, Any], resident: bool, start: ExecutionMode, kind: str, times: int
) -> None:
    """Judged by the ledger at the moment of return; asked again no more often than `unload_resend_s` allows."""
    world = SimulatedWorld(**sizes)
    begin(world, resident)
    with inline(world, unload_deadline_s=20, unload_resend_s=3, settle_timeout_s=6) as manager:
        manager.set_execution_mode(start)
        if start is not IDLE or not resident:
            manager.ensure_vlm_loaded()
        assert world.vlm_resident()
        held = vlm_on_card(world)
        if kind == "blind":
            world.faults.arm("ollama.ps", "before", None)
        elif kind != "none":
            # Once: every late unload of the simulated server begins its delay anew.
            late = {"times": 1, "delay_s": 8.0} if kind == "late" else {"times": times}
            Trouble("ollama.unload", kind, **late).arm(world)
        begun = world.clock.monotonic()
        error: GPUFSMError | None = None
        try:
            manager.ensure_vlm_unloaded()
        except GPUFSMError as raised:
            error = raised
        took = world.clock.monotonic() - begun
        left, still_in = vlm_on_card(world), world.vlm_resident()
        event(f"{kind} x {times}: {'gone' if error is None else type(error).__name__}")
        asked = ours(world, "ollama.unload", begun)
        # At most two rounds of asking: the step's own, and shedding's after it.
        hasty = [b.at for a, b in itertools.pairwise(asked) if b.at - a.at < 3 - 1e-6]
        assert len(hasty) <= 1, hasty
        assert len(asked) <= 2 * (1 + 20 / 3)
        assert took <= 2 * (20 + 6) + 20, "two deadlines with settling, and what the looks take"
        world.faults.heal()
        if error is None:
            assert not still_in
            assert left <= (1 - BACK) * held
        if kind == "blind":
            assert isinstance(error, ResidencyUnknown)
        elif kind == "reclaim_never":
            assert isinstance(error, ReleaseUnproven)
        elif kind in ("none", "late", "after") or times <= 2:
            assert error is None
        else:
            assert isinstance(error, UnloadStuck | OllamaError)
            assert still_in


@given(
    sizes=sizes(),
    world_kind=st.sampled_from(["gpu", "gpu", "gpu", "no gpu", "no clip"]),
    past=st.lists(deeds, min_size=1, max_size=6),
    trouble=st.lists(
        st.one_of(
            _armed("clip.to_gpu", {"oom", "before", "after", "silent", "gpu_lost"}, 2),
            _armed("clip.to_cpu", {"before", "after", "silent", "gpu_lost"}, 2),
            st.builds(Trouble, st.sampled_from(["clip.to_gpu", "clip.to_cpu"]), st.just("late"), delay_s=st.just(9.0)),
        ),
        max_size=2,
    ),
)
def test_property_12_the_clip_device_exists_and_all_of_clip_is_on_it(
    sizes: dict[str, Any], world_kind: str, past: list[Deed], trouble: list[Trouble]
) -> None:
    """At every moment, in failing moves and without a GPU too: the named device is the one that the ledger shows."""
    world = SimulatedWorld(**sizes, gpu=world_kind != "no gpu", clip=world_kind != "no clip")
    devices: set[str] = set()

    def look(op: str, phase: str) -> str | None:
        if op.startswith("clip.to_") and phase == "during":
            return None  # half of it is here and half of it there: the move's end tells
        device, on_card = manager.get_clip_device(), world.card.held_mib("clip")
        devices.add(device)
        if device != {"cpu": "cpu", "gpu": "sim:0", "none": "none"}[world.clip.place]:
            return f"{device} is named, CLIP is on the {world.clip.place}"
        if on_card != (world.clip.clip_mib if device == "sim:0" else 0):
            return f"{device} is named, {on_card} of {world.clip.clip_mib} MiB are on the card"
        if device == "sim:0" and not world.gpu:
            return "a device that does not exist"
        return None

    with inline(world) as manager:
        watch = Watch(world, look)
        for fault in trouble:
            fault.arm(world)
        for deed in past:
            with contextlib.suppress(GPUFSMError):
                do(manager, deed)
            assert manager.get_clip_device() == manager.get_status().clip_device
        watch.verdict()
    expected = {"no gpu": {"cpu"}, "no clip": {"none"}}.get(world_kind, {"cpu", "sim:0"})
    assert devices <= expected
    event(f"{world_kind}: {sorted(devices)}")


@contextlib.contextmanager
def one_at_a_time(world: SimulatedWorld) -> Iterator[list[tuple[str, str]]]:
    """The effects in the order of their begin; fails if one begins while another is under way."""
    lock = threading.Lock()
    open_effects: list[str] = []
    begun: list[tuple[str, str]] = []
    wrong: list[str] = []

    def look(op: str, phase: str) -> None:
        if op not in EFFECTS or phase == "during":
            return
        with lock:
            if phase == "after":
                open_effects.remove(op)
                return
            if open_effects:
                wrong.append(f"{op} began during {open_effects}")
            open_effects.append(op)
            begun.append((op, threading.current_thread().name))

    world.on_io.append(look)
    yield begun
    world.on_io.remove(look)
    assert not wrong, wrong


def placed(world: SimulatedWorld, mode: ExecutionMode) -> bool:
    """The world keeps the mode's promise."""
    match mode:
        case ExecutionMode.RECORDING:
            return world.vlm_resident() and world.clip.place == "cpu"
        case ExecutionMode.AUTOPILOT:
            return not world.vlm_resident() and world.clip.place == "gpu"
        case _:
            return True


@given(
    sizes=sizes(),
    past=pasts,
    orders=st.lists(st.sampled_from([RECORDING, AUTOPILOT, IDLE]), min_size=1, max_size=8),
    echoes=st.lists(st.sampled_from(["during", "before", "after"]), max_size=6),
)
def test_property_13_requests_take_effect_one_at_a_time_in_order_and_equal_ones_cost_one(
    sizes: dict[str, Any], past: list[Deed], orders: list[ExecutionMode], echoes: list[str]
) -> None:
    """Posted all at once, each is answered in its turn with its promise kept; what is asked in a load costs nothing."""
    world = SimulatedWorld(**sizes)
    answered: list[tuple[int, bool]] = []
    echoed: list[Any] = []
    left = list(echoes)

    def echo(op: str, phase: str) -> None:
        if op == "ollama.load" and left and left[0] == phase:
            left.pop()
            echoed.append(manager.submit_execution_mode(RECORDING))

    with inline(world) as manager, one_at_a_time(world):
        for deed in past:
            do(manager, deed)
        expected, parked = 0, not world.vlm_resident()
        for order in orders:
            if order is RECORDING:
                expected += parked
                parked = False
            elif order is AUTOPILOT:
                parked = True
        since = world.clock.monotonic()
        if orders[-1] is RECORDING and len(set(orders)) == 1:
            world.on_io.append(echo)

        def post(n: int, order: ExecutionMode) -> None:
            future = manager.submit_execution_mode(order)
            future.add_done_callback(lambda done: answered.append((n, done.result().granted and placed(world, order))))

        for n, order in enumerate(orders):
            post(n, order)
        assert not answered, "posting does nothing"
        manager.drive_for(200 + 60 * len(orders))
        assert answered == [(n, True) for n in range(len(orders))]
        assert all(future.result(timeout=0).granted for future in echoed)
        assert len(ours(world, "ollama.load", since)) == expected


@settings(max_examples=20)
@given(
    sizes=sizes(),
    start=st.sampled_from([IDLE, AUTOPILOT]),
    verb=st.sampled_from(["mode", "load", "lease"]),
    callers=st.integers(2, 8),
)
def test_property_13_many_threads_that_want_the_same_cost_one_load(
    sizes: dict[str, Any], start: ExecutionMode, verb: str, callers: int
) -> None:
    """N threads ask at once, some of them while the load runs: the server sees one load and everybody gets it."""
    world = SimulatedWorld(**sizes)
    got: list[bool] = []
    together, under_way = threading.Barrier(callers), threading.Event()

    def late_comers(op: str, phase: str) -> None:
        if (op, phase) == ("ollama.load", "during"):
            under_way.set()

    with threaded(world) as manager, one_at_a_time(world) as effects:
        manager.set_execution_mode(start)
        world.on_io.append(late_comers)

        def want(n: int) -> None:
            together.wait(30)
            if n % 2:
                under_way.wait(30)
            if verb == "mode":
                got.append(manager.set_execution_mode(RECORDING, timeout_s=30).granted and world.vlm_resident())
            elif verb == "load":
                manager.ensure_vlm_loaded(timeout_s=30)
                got.append(world.vlm_resident())
            else:
                with manager.vlm(timeout_s=30):
                    got.append(world.vlm_resident())

        threads = [threading.Thread(target=want, args=(n,), daemon=True) for n in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert got == [True] * callers
        assert len(ours(world, "ollama.load")) == 1
        assert {name for _, name in effects} == {"gpu_fsm-driver"}, "only the driver acts"


# --- what the real CLIP needs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random CLIP of the real architecture on disk; nothing may be fetched."""
    import huggingface_hub.constants

    from tests.tools import tiny_clip

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield tiny_clip.build(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="session")
def second_device() -> str:
    """A torch device other than the CPU: the one without a GPU behind it."""
    from tests.tools import fakegpu

    if fakegpu.missing():
        pytest.skip(fakegpu.missing())
    device = fakegpu.load()
    device.reset(total_mib=8192, context_mib=8)
    return device.name
