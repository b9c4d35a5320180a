"""The guards at their edges: snapshots made by hand, one fact at a time."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from gpu_fsm import errors
from gpu_fsm.guards import (
    PREDICATES,
    START_OLLAMA,
    Aim,
    Observation,
    Plan,
    Snapshot,
    hold_lapsed,
    hold_of,
    shortage,
    target,
    unknown,
    why_not,
)
from gpu_fsm.states import EXTERNAL
from gpu_fsm.status import Answer, Catalog, ExecutionMode, Hold, LoadedModel, Residency, VRAMInfo

OUT = Residency(answer=Answer.NO)


def resident(size_mib: float, on_card_mib: float) -> Residency:
    """The VLM is in, with so much of it on the card."""
    return Residency(answer=Answer.YES, ours=LoadedModel(name="vlm", size_mib=size_mib, size_vram_mib=on_card_mib))


def card(free_mib: float | None, **more: Any) -> VRAMInfo:
    """A card of 8 GiB."""
    return VRAMInfo(total_mib=8192.0, free_mib=free_mib, scope="card", present=True, **more)


def snapshot(mode: str = "recording", plan: Plan | None = None, **more: Any) -> Snapshot:
    """A VLM of 5000 MiB and a CLIP of 600 on the CPU, with a reserve of 300."""
    seen = {"residency": OUT, "vram": card(8000.0), "clip": "cpu", "clip_needed_mib": 600.0, "clip_held_mib": 600.0}
    seen |= {"gpu_usable": True, "gpu_expected": True, **more.pop("seen", {})}
    aim = Aim(mode=ExecutionMode(mode), plan=plan or Plan(clip="cpu", vlm=True))
    facts = {"vlm_needed_mib": 5000.0, "reserve_mib": 300.0, "floor_mib": 200.0, **more}
    return Snapshot(aim=aim, seen=Observation(**seen), **facts)


def holds(name: str, s: Snapshot) -> bool:
    """What a guard of the table says."""
    return PREDICATES[name](s)


@pytest.mark.parametrize(("free_mib", "enough"), [(5300.0, True), (5299.0, False), (0.0, False), (None, True)])
def test_exactly_enough_for_the_vlm_is_enough(free_mib: float | None, enough: bool) -> None:
    """What it needs and the reserve; unknown memory is no shortage."""
    s = snapshot(seen={"vram": card(free_mib)})

    assert holds("fits", s) is enough
    assert holds("admissible", s) is enough


@pytest.mark.parametrize(("free_mib", "enough"), [(900.0, True), (899.0, False), (None, True)])
def test_exactly_enough_for_clip_is_enough(free_mib: float | None, enough: bool) -> None:
    """The same for CLIP's way up."""
    s = snapshot("autopilot", Plan(clip="gpu", vlm=False), seen={"vram": card(free_mib)})

    assert holds("fits", s) is enough
    assert holds("admissible", s) is enough


@pytest.mark.parametrize(
    ("place", "residency", "free_mib", "together"),
    [
        ("cpu", OUT, 5900.0, True),
        ("cpu", OUT, 5899.0, False),
        ("gpu", OUT, 5300.0, True),
        ("gpu", OUT, 5299.0, False),
        ("cpu", resident(5000.0, 5000.0), 900.0, True),
        ("cpu", resident(5000.0, 5000.0), 899.0, False),
        ("gpu", resident(5000.0, 5000.0), 300.0, True),
        ("gpu", resident(5000.0, 5000.0), 299.0, False),
        ("none", OUT, 5900.0, True),
        ("none", OUT, 5899.0, False),
        ("cpu", OUT, None, False),
    ],
)
def test_on_demand_both_stay_on_the_card_exactly_where_both_fit(
    place: str, residency: Residency, free_mib: float | None, together: bool
) -> None:
    """What is on the card already needs no room, nothing else is; where memory is unknown CLIP makes way."""
    s = snapshot(seen={"clip": place, "residency": residency, "vram": card(free_mib)})

    assert target(ExecutionMode.AUTOPILOT, Hold.WANTED, s) == Plan(clip="gpu" if together else "cpu", vlm=True)


@pytest.mark.parametrize("far", [{"on_our_card": False}, {"seen": {"vram": VRAMInfo(), "clip": "gpu"}}])
def test_a_vlm_that_is_not_on_our_card_is_in_nobodys_way(far: dict[str, Any]) -> None:
    """An Ollama elsewhere, or no card at all: CLIP stays where it is best."""
    s = snapshot(**{"on_our_card": True, **far})

    assert target(ExecutionMode.AUTOPILOT, Hold.WANTED, s).clip == "gpu"


@pytest.mark.parametrize(
    ("on_card_mib", "facts", "whole"),
    [
        (5000.0, {}, True),
        (4950.0, {}, True),
        (4949.0, {}, False),
        (0.0, {}, False),
        (100.0, {"accept_partial": True}, True),
        (0.0, {"on_our_card": False}, True),
        (4950.0, {"on_our_card": False}, True),
        (4949.0, {"on_our_card": False}, False),
        (1.0, {"on_our_card": False}, False),
        (0.0, {"seen": {"vram": VRAMInfo()}}, True),
        (5000.0, {"seen": {"vlm_dead": True}}, False),
    ],
)
def test_a_vlm_is_whole_from_99_percent_on(on_card_mib: float, facts: dict[str, Any], whole: bool) -> None:
    """Elsewhere a server without a GPU is as good as one with enough; here a part is not enough, unless accepted."""
    seen = {"residency": resident(5000.0, on_card_mib), **facts.get("seen", {})}
    s = snapshot(**{**facts, "seen": seen})

    assert s.whole is whole
    assert holds("placed", s) is whole


@pytest.mark.parametrize("size_mib", [0.5, 1.0, 2.0, 50_000.0])
def test_a_small_vlm_is_whole_by_the_same_share(size_mib: float) -> None:
    """However small: one that lies in the computer's memory keeps no promise."""
    assert snapshot(seen={"residency": resident(size_mib, size_mib)}).whole
    assert not snapshot(seen={"residency": resident(size_mib, 0.98 * size_mib)}).whole
    assert not snapshot(seen={"residency": resident(size_mib, 0.0)}).whole


@pytest.mark.parametrize(("free_mib", "short"), [(199.0, True), (200.0, False), (201.0, False), (None, False)])
def test_memory_at_the_floor_is_not_under_it(free_mib: float | None, short: bool) -> None:
    """Only less than the floor ends an on-demand hold, and only where the figure is the card's."""
    in_and_whole = resident(5000.0, 5000.0)
    s = snapshot(hold=Hold.WANTED, seen={"residency": in_and_whole, "vram": card(free_mib)})

    assert hold_lapsed(s) is short
    assumed = VRAMInfo(total_mib=8192.0, free_mib=free_mib, scope="assumed", present=True)
    assert not hold_lapsed(snapshot(hold=Hold.WANTED, seen={"residency": in_and_whole, "vram": assumed}))
    assert not hold_lapsed(
        snapshot(hold=Hold.WANTED, on_our_card=False, seen={"residency": in_and_whole, "vram": card(free_mib)})
    )


@pytest.mark.parametrize(
    ("free_mib", "reason"), [(100.0, errors.InsufficientVRAM), (800.0, None), (799.0, errors.InsufficientVRAM)]
)
def test_what_is_given_back_first_counts_as_room(free_mib: float, reason: type[Exception] | None) -> None:
    """CLIP takes the place of the VLM, or the other way round; what is on its way back counts too."""
    swap = Plan(clip="cpu", vlm=True)
    moving = snapshot(plan=swap, returning_mib=3900.0, seen={"clip": "gpu", "vram": card(free_mib)})
    refusal = why_not(moving)

    assert (refusal and type(refusal)) is reason
    assert moving.reclaimable_mib == 4500.0
    assert not holds("fits", moving)
    told = shortage(moving)
    assert (told.needed_mib, told.free_mib, told.reclaimable_mib, told.reserve_mib) == (5000.0, free_mib, 4500.0, 300.0)


def test_a_lost_card_forbids_what_would_go_on_it_and_nothing_else() -> None:
    """The VLM where Ollama shares the card, CLIP's way up; not the way down."""
    lost = {"vram": VRAMInfo(lost=True), "gpu_usable": False}

    assert isinstance(why_not(snapshot(seen=lost)), errors.GpuLost)
    assert isinstance(why_not(snapshot("autopilot", Plan(clip="gpu", vlm=False), seen=lost)), errors.GpuLost)
    assert why_not(snapshot(on_our_card=False, seen=lost)) is None
    assert why_not(snapshot("autopilot", Plan(clip="cpu", vlm=False), seen=lost)) is None


def test_of_what_is_not_told_the_harmless_is_taken() -> None:
    """A snapshot without facts: nothing is leased, over, lost, left or to be taken; the world is not known."""
    s = Snapshot()

    assert {name for name in PREDICATES if holds(name, s)} == {
        "admissible", "aims_at_idle", "fits", "idle_must_wait", "no_hold", "placed", "reassertions_left"
    }  # fmt: skip
    assert (s.acquire_mib, s.reclaimable_mib, s.vlm_held_mib, s.seen.at) == (0.0, 0.0, 0.0, 0.0)
    both = Plan(clip="gpu", vlm=True)
    wants = Snapshot(aim=Aim(mode=ExecutionMode.RECORDING, plan=both), seen=Observation(residency=OUT, clip="cpu"))
    assert (wants.acquire_mib, wants.reclaimable_mib, shortage(wants).reserve_mib) == (0.0, 0.0, 0.0)
    assert isinstance(why_not(wants), errors.ClipUnavailable)
    assert not holds("blocked", wants)
    assert not holds("blocked_by_caller", wants)
    assert target(ExecutionMode.RECORDING, None, s).clip == "cpu"


def test_of_a_vlm_of_which_only_the_size_is_told_the_harmless_is_taken() -> None:
    """It lives, it is on our card, it is nobody's; a part is not enough, and an empty card is not below no floor."""
    wanted = Aim(mode=ExecutionMode.RECORDING, plan=Plan(vlm=True))
    part = Snapshot(aim=wanted, hold=Hold.WANTED, seen=Observation(residency=resident(5000.0, 2500.0), vram=card(0.0)))

    assert part.vlm_held_mib == 2500.0
    assert not part.whole
    assert holds("surplus", part)
    assert not holds("hold_lapsed", part)
    assert not holds("blocked", part)
    assert not holds("blocked_by_caller", part)
    out = Snapshot(aim=wanted, seen=Observation(residency=OUT))
    assert holds("recoverable", out)
    assert holds("idle_must_wait", out)
    assert not holds("idle_must_wait", evolve(out, vlm_ours=True))
    assert holds("has_fallback", evolve(out, aim=evolve(wanted, fallback=wanted)))


def test_where_nothing_is_to_be_taken_there_is_room() -> None:
    """Also on a card so full that not even the reserve is free."""
    in_place = snapshot(seen={"residency": resident(5000.0, 5000.0), "vram": card(10.0)})

    assert holds("fits", in_place)
    assert holds("admissible", in_place)


@pytest.mark.parametrize(
    ("mode", "wanted", "place", "kept"),
    [
        ("recording", "cpu", "cpu", True),
        ("recording", "cpu", "gpu", False),
        ("recording", "cpu", "none", True),
        ("recording", "gpu", "none", False),
        ("autopilot", "cpu", "none", False),
        ("autopilot", "cpu", "gpu", False),
        ("autopilot", "gpu", "cpu", False),
        ("autopilot", "gpu", "gpu", True),
        ("idle", None, "gpu", True),
    ],
)
def test_clip_is_placed_where_the_plan_wants_it(mode: str, wanted: Any, place: str, kept: bool) -> None:
    """One that cannot be loaded is in nobody's way; only AUTOPILOT cannot do without it."""
    s = snapshot(mode, Plan(clip=wanted, vlm=False), seen={"clip": place})

    assert holds("placed", s) is kept
    assert holds("surplus", s) is (wanted == "cpu" and place == "gpu")


WAITS: dict[str, dict[str, Any]] = {
    "leased": {"vlm_leased": True},
    "used": {"used_since": True},
    "wanted by a ticket": {"vlm_ticket_queued": True},
    "not known": {"seen": {"residency": Residency()}},
    "in the way of a leased CLIP": {"clip_leased": True, "seen": {"clip": "gpu"}},
    "not ours": {"mode": ExecutionMode.IDLE, "vlm_ours": False},
}


@pytest.mark.parametrize("why", WAITS)
def test_each_reason_alone_makes_the_idle_unload_wait(why: str) -> None:
    """And none of them: it goes."""
    ready = {"vlm_ours": True, "mode": ExecutionMode.AUTOPILOT, "seen": {}}
    told = {**ready, **WAITS[why]}
    told["seen"] = {"residency": resident(5000.0, 5000.0), **told["seen"]}
    plan = Plan(clip="cpu", vlm=False)

    assert holds("idle_must_wait", _asked(plan, told))
    assert not holds("idle_must_wait", _asked(plan, {**ready, "seen": {"residency": resident(5000.0, 5000.0)}}))


def _asked(plan: Plan, facts: dict[str, Any]) -> Snapshot:
    mode = facts["mode"]
    rest = {name: value for name, value in facts.items() if name != "seen"}
    return Snapshot(aim=Aim(mode=mode, plan=plan), seen=Observation(**{"clip": "cpu", **facts["seen"]}), **rest)


@pytest.mark.parametrize(
    ("plan", "near", "gone"),
    [
        (Plan(clip="gpu", vlm=False), True, True),
        (Plan(clip="cpu", vlm=True), True, True),
        (Plan(clip="cpu", vlm=True), False, False),
        (Plan(clip="cpu", vlm=False), True, False),
        (Plan(clip=None, vlm=False), True, False),
        (Plan(clip="cpu", vlm=None), True, False),
    ],
)
def test_a_lost_card_matters_to_what_would_be_on_it(plan: Plan, near: bool, gone: bool) -> None:
    """A plan that puts nothing there, or whose VLM is elsewhere, goes on."""
    assert holds("gpu_gone", snapshot("autopilot", plan, on_our_card=near, seen={"vram": VRAMInfo(lost=True)})) is gone
    assert not holds("gpu_gone", snapshot("autopilot", plan, on_our_card=near))


@pytest.mark.parametrize(
    ("residency", "place", "something"),
    [(OUT, "cpu", False), (OUT, "none", False), (OUT, "gpu", True), (resident(5000.0, 5000.0), "cpu", True)],
)
def test_pressure_needs_something_to_give_up(residency: Residency, place: str, something: bool) -> None:
    """A card that others have filled is none of our business while nothing of ours is on it."""
    s = snapshot(pressed_too_long=True, seen={"residency": residency, "clip": place})

    assert holds("pressed", s) is something
    assert not holds("pressed", evolve(s, pressed_too_long=False))


def test_a_missing_model_stands_in_the_way_of_what_needs_it_only() -> None:
    """AUTOPILOT comes back without it."""
    assert not holds("recoverable", snapshot(model_missing=True))
    assert holds("recoverable", snapshot())
    assert holds("recoverable", snapshot("autopilot", Plan(clip="cpu", vlm=False), model_missing=True))
    assert holds("recoverable", snapshot("idle", Plan(), model_missing=True))


def test_one_lease_is_a_lease() -> None:
    """Of either model."""
    assert holds("leased", Snapshot(vlm_leased=True))
    assert holds("leased", Snapshot(clip_leased=True))


@pytest.mark.parametrize(
    ("place", "free_mib", "managed", "stays"),
    [
        ("gpu", 5300.0, True, "gpu"),
        ("gpu", 5299.0, True, "cpu"),
        ("cpu", 8000.0, True, "cpu"),
        ("none", 8000.0, True, "cpu"),
        ("gpu", 8000.0, False, None),
    ],
)
def test_in_idle_clip_makes_room_for_a_wanted_vlm_and_never_goes_up(
    place: str, free_mib: float, managed: bool, stays: str | None
) -> None:
    """It stays where it is as long as both fit."""
    s = snapshot("idle", Plan(), clip_managed=managed, seen={"clip": place, "vram": card(free_mib)})

    assert target(ExecutionMode.IDLE, Hold.WANTED, s) == Plan(clip=stays, vlm=True)


def test_only_what_is_on_our_card_comes_back_to_it() -> None:
    """Not a VLM elsewhere, not a dead one, not where there is no card; CLIP's part by its own figure."""
    in_and_out = Plan(clip="cpu", vlm=False)
    vlm = {"residency": resident(5000.0, 4000.0)}

    assert snapshot(plan=in_and_out, seen=vlm).reclaimable_mib == 4000.0
    assert snapshot(plan=in_and_out, on_our_card=False, seen=vlm).reclaimable_mib == 0.0
    assert snapshot(plan=in_and_out, seen={**vlm, "vlm_dead": True}).reclaimable_mib == 0.0
    assert snapshot(plan=in_and_out, seen={**vlm, "vram": VRAMInfo()}).reclaimable_mib == 0.0
    assert snapshot(plan=in_and_out, seen={"clip": "gpu"}).reclaimable_mib == 600.0
    untold = Snapshot(aim=Aim(mode=ExecutionMode.IDLE, plan=in_and_out), seen=Observation(clip="gpu"))
    assert untold.reclaimable_mib == 0.0


def test_nobody_waits_for_a_clip_that_is_not_there() -> None:
    """Whatever the plan wants of it, it cannot be moved."""
    for wanted in ("cpu", "gpu"):
        s = snapshot("autopilot", Plan(clip=wanted, vlm=False), clip_leased=True, seen={"clip": "none"})
        assert s.models_to_move == frozenset()
        assert not holds("blocked", s)


def test_a_place_is_compared_as_a_word() -> None:
    """A CLIP host may take it from a device's name or read it from a file."""
    for word in ("cpu", "gpu"):
        read = "".join(list(word))
        s = snapshot("autopilot", Plan(clip=read, vlm=False), seen={"clip": word})
        assert read is not word
        assert holds("placed", s)
        assert holds("clip_there", s)


@pytest.mark.parametrize("mode", [ExecutionMode.IDLE, ExecutionMode.RECORDING, ExecutionMode.AUTOPILOT])
def test_a_hold_is_kept_only_where_it_differs_from_the_mode(mode: ExecutionMode) -> None:
    """RECORDING wants the VLM by itself, the others do not."""
    recording = mode is ExecutionMode.RECORDING

    assert hold_of(mode, None) is None
    assert hold_of(mode, Hold.WANTED) is (None if recording else Hold.WANTED)
    assert hold_of(mode, Hold.PARKED) is (Hold.PARKED if recording else None)


@pytest.mark.parametrize("trigger", EXTERNAL)
def test_a_clip_that_is_not_there_is_missed_only_by_who_needs_it(trigger: str) -> None:
    """AUTOPILOT, and who asks for a move; not a recorder, and not an agent without any CLIP."""
    gone = {"clip": "none", "gpu_usable": False, "gpu_expected": False}
    cpu, without = Plan(clip="cpu", vlm=False), Plan(vlm=False)
    moved = trigger == "migrate_clip"

    assert isinstance(why_not(snapshot("autopilot", cpu, trigger=trigger, seen=gone)), errors.ClipUnavailable)
    assert why_not(snapshot("autopilot", without, trigger=trigger, seen=gone)) is None
    for mode in ("idle", "recording"):
        assert isinstance(why_not(snapshot(mode, cpu, trigger=trigger, seen=gone)), errors.ClipUnavailable) is moved
        assert why_not(snapshot(mode, without, trigger=trigger, seen=gone)) is None


REFUSED = Residency(answer=Answer.NO, refused=True)
UP, VLM_IN = Plan(clip="gpu", vlm=False), Plan(clip="cpu", vlm=True)
TOLD: dict[str, tuple[type[errors.GPUFSMError], Plan, dict[str, Any], dict[str, Any], str]] = {
    "no CLIP": (
        errors.ClipUnavailable, UP, {"clip": "none"}, {"gpu_unusable_reason": "its file broke"}, "no CLIP is managed"
    ),
    "CLIP's card has gone": (
        errors.GpuLost, UP, {"gpu_usable": False, "vram": VRAMInfo(lost=True)},
        {"vram": VRAMInfo(lost=True, detail="fell off the bus")}, "the GPU has gone",
    ),
    "the VLM's card has gone": (
        errors.GpuLost, VLM_IN, {"vram": VRAMInfo(lost=True)},
        {"vram": VRAMInfo(lost=True, detail="fell off the bus")}, "the GPU has gone",
    ),
    "there never was a GPU for CLIP": (
        errors.ClipUnavailable, UP, {"gpu_usable": False, "gpu_expected": False},
        {"gpu_unusable_reason": "torch has no CUDA"}, "this process has no usable GPU",
    ),
    "the process has lost its GPU": (
        errors.CudaPoisoned, UP, {"gpu_usable": False},
        {"gpu_unusable_reason": "an illegal access"}, "this process has no usable GPU",
    ),
    "nobody listens": (
        errors.OllamaUnavailable, VLM_IN, {"residency": REFUSED},
        {"residency": evolve(REFUSED, detail="port 11434 is shut")}, "Ollama refuses connections",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TOLD)
def test_a_refusal_says_what_the_port_said(what: str) -> None:
    """Or, where that said nothing, what is known all the same; never an empty sentence."""
    kind, plan, seen, more, else_said = TOLD[what]
    mode = "autopilot" if plan is UP else "recording"
    bare, full = why_not(snapshot(mode, plan, seen=seen)), why_not(snapshot(mode, plan, seen={**seen, **more}))
    said = more.get("gpu_unusable_reason") or next(iter(more.values())).detail

    assert type(bare) is type(full) is kind
    assert else_said in bare.detail
    assert said in full.detail
    assert else_said not in full.detail


@pytest.mark.parametrize(("present", "refused"), [(Answer.NO, True), (Answer.YES, False), (Answer.UNKNOWN, False)])
def test_a_model_that_ollama_does_not_have_is_refused_to_who_would_load_it(present: Answer, refused: bool) -> None:
    """Only where it is definitely not there; who has it in already, or wants it out, is not refused for it."""
    catalog = Catalog(present=present)

    assert isinstance(why_not(snapshot(seen={"catalog": catalog})), errors.ModelNotFound) is refused
    assert why_not(snapshot(seen={"catalog": catalog, "residency": resident(5000.0, 5000.0)})) is None
    assert why_not(snapshot("autopilot", UP, seen={"catalog": catalog})) is None


def test_a_shortage_names_who_holds_memory_where_that_is_known() -> None:
    """And is silent about it where it is not."""
    short = {"vram": card(100.0)}
    known = shortage(snapshot(seen={**short, "foreign_holders": ("game (pid 7): 4000 MiB", "browser (pid 8): ? MiB")}))

    assert known.remedy.endswith("Held by game (pid 7): 4000 MiB, browser (pid 8): ? MiB.")
    assert "Held" not in shortage(snapshot(seen=short)).remedy


def test_what_nobody_can_tell_is_refused_with_what_helps() -> None:
    """A server that does not listen is to be started; one that does not answer is to be looked at."""
    shut, silent = Residency(refused=True, detail="port 11434 is shut"), Residency(detail="no answer in 2 s")

    assert unknown(snapshot(seen={"residency": shut})).remedy == START_OLLAMA
    assert "ollama ps" in unknown(snapshot(seen={"residency": silent})).remedy
    assert unknown(snapshot(seen={"residency": silent})).detail == "no answer in 2 s"
    assert unknown(snapshot(seen={"residency": Residency()})).detail == "Ollama gave no definite answer"


@pytest.mark.parametrize("kind", [Plan, Aim, Observation, Snapshot])
def test_facts_are_told_by_name(kind: Any) -> None:
    """Nothing rests on their order."""
    with pytest.raises(TypeError):
        kind(ExecutionMode.IDLE)
