"""One frozen `Snapshot` of the world an event, and the predicates that decide on it.

A predicate is a pure function of one snapshot and returns a real `bool`.  Nothing here does I/O, logs, or remembers;
so an event can never meet two worlds, and `explain()` can ask the same questions later.  All memory in MiB.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from gpu_fsm.errors import (
    ClipUnavailable,
    CudaPoisoned,
    GPUFSMError,
    GpuLost,
    InsufficientVRAM,
    ModelNotFound,
    OllamaUnavailable,
    ResidencyUnknown,
)
from gpu_fsm.status import (
    Answer,
    Catalog,
    ClipPlace,
    ExecutionMode,
    Hold,
    Residency,
    State,
    VRAMInfo,
)

WHOLE = 0.99
"""A model counts as wholly on the GPU from this share of its size on: sizes are rounded on their way to us."""

PROOF = 0.9
"""A release is proven when this share of what was held has come back; neighbours move the rest."""


@frozen(kw_only=True)
class Plan:
    """Where the two models shall be; None where the plan does not care."""

    clip: ClipPlace | None = None
    vlm: bool | None = None


@frozen(kw_only=True)
class Aim:
    """What the machine is after: a mode, a hold, and the plan frozen when it was admitted."""

    mode: ExecutionMode
    hold: Hold | None = None
    plan: Plan = Plan()
    fallback: Aim | None = None
    """Where to return when an on-demand load fails, or Ollama does not unload an idle VLM: never at the mode's cost."""
    idle: bool = False
    """Pursued for want of use; `idle_unload` is told once the VLM is gone."""


@frozen(kw_only=True)
class Observation:
    """What the three ports answered, at one moment."""

    residency: Residency = Residency()
    vlm_dead: bool = False
    """Ollama lists it, and the driver shows nothing of it: no promise can rest on it, and an unload is still owed."""
    catalog: Catalog = Catalog()
    vram: VRAMInfo = VRAMInfo()
    clip: ClipPlace = "none"
    clip_device: str = "none"
    clip_needed_mib: float = 0.0
    clip_held_mib: float = 0.0
    clip_context_mib: float | None = None
    gpu_usable: bool = False
    gpu_expected: bool = False
    """This process had a usable GPU: if it has none now, something broke."""
    gpu_unusable_reason: str = ""
    foreign_holders: tuple[str, ...] = ()
    at: float = 0.0


@frozen(kw_only=True)
class Snapshot:
    """Everything a guard may look at."""

    trigger: str = ""
    state: State = State.IDLE
    mode: ExecutionMode = ExecutionMode.IDLE
    asked: ExecutionMode | None = None
    hold: Hold | None = None
    aim: Aim = Aim(mode=ExecutionMode.IDLE)
    """What this event would pursue; within a step, what is being pursued."""
    seen: Observation = Observation()

    vlm_needed_mib: float = 0.0
    reserve_mib: float = 0.0
    returning_mib: float = 0.0
    """Given back a moment ago, and still counted by the driver."""
    floor_mib: float = 0.0
    accept_partial: bool = False
    on_our_card: bool = True
    clip_managed: bool = True
    refuse_on_shortage: bool = False

    vlm_leased: bool = False
    clip_leased: bool = False
    vlm_held_by_caller: bool = False
    clip_held_by_caller: bool = False
    drain_over: bool = False

    vlm_ours: bool = False
    used_since: bool = False
    vlm_ticket_queued: bool = False
    superseded: bool = False
    outdated: bool = False
    came_from_plan: bool = False
    unknown_too_long: bool = False
    pressed_too_long: bool = False
    reassertions_left: bool = True
    model_missing: bool = False
    leftovers: bool = False

    # --- figures derived from the fields, for guards and for messages ---

    @property
    def resident(self) -> bool:
        """The VLM is in, definitely."""
        return self.seen.residency.answer is Answer.YES

    @property
    def absent(self) -> bool:
        """The VLM is out, definitely."""
        return self.seen.residency.answer is Answer.NO

    @property
    def whole(self) -> bool:
        """The resident VLM is on the GPU as far as it can be here."""
        model = self.seen.residency.ours
        if self.seen.vlm_dead:
            return False
        if model is None or self.accept_partial:
            return True
        if not self.on_our_card:
            return model.size_vram_mib == 0 or model.size_vram_mib >= WHOLE * model.size_mib
        if not self.seen.vram.present:
            return True
        return model.size_vram_mib >= WHOLE * model.size_mib

    @property
    def vlm_held_mib(self) -> float:
        """What an unload would give back to our card."""
        model = self.seen.residency.ours
        if model is None or self.seen.vlm_dead or not self.on_our_card or not self.seen.vram.present:
            return 0.0
        return model.size_vram_mib

    @property
    def vlm_surplus(self) -> bool:
        """The VLM is in and the plan wants it out, or it is in but not wholly on the GPU."""
        return self.resident and (self.aim.plan.vlm is False or (self.aim.plan.vlm is True and not self.whole))

    @property
    def clip_surplus(self) -> bool:
        """CLIP is on the GPU and the plan wants it on the CPU."""
        return self.aim.plan.clip == "cpu" and self.seen.clip == "gpu"

    @property
    def acquire_mib(self) -> float:
        """What is still to be taken from the card for the aim."""
        vlm = self.vlm_needed_mib if self.aim.plan.vlm is True and not (self.resident and self.whole) else 0.0
        clip = self.seen.clip_needed_mib if _lacks_clip(self) else 0.0
        return vlm + clip

    @property
    def reclaimable_mib(self) -> float:
        """What the aim gives back first, and what is on its way back already."""
        vlm = self.vlm_held_mib if self.vlm_surplus else 0.0
        return vlm + (self.seen.clip_held_mib if self.clip_surplus else 0.0) + self.returning_mib

    @property
    def models_to_move(self) -> frozenset[str]:
        """The models whose leases forbid the aim."""
        moves = set()
        if self.vlm_surplus:
            moves.add("vlm")
        if self.aim.plan.clip not in (None, self.seen.clip) and self.seen.clip != "none":
            moves.add("clip")
        return frozenset(moves)


def _lacks_clip(s: Snapshot) -> bool:
    return s.aim.plan.clip == "gpu" and s.seen.clip == "cpu"


# --- the predicates ---


def known(s: Snapshot) -> bool:
    """Ollama's answer is a definite yes or no."""
    return s.seen.residency.answer is not Answer.UNKNOWN


def undecided(s: Snapshot) -> bool:
    """The plan speaks of the VLM and nobody can tell where it is."""
    return s.aim.plan.vlm is not None and not known(s)


def placed(s: Snapshot) -> bool:
    """The observed placement is the plan's."""
    plan = s.aim.plan
    # A CLIP that cannot be loaded is in nobody's way; only AUTOPILOT cannot do without it.
    no_clip_needed = plan.clip == "cpu" and s.seen.clip == "none" and s.aim.mode is not ExecutionMode.AUTOPILOT
    clip_ok = plan.clip is None or plan.clip == s.seen.clip or no_clip_needed
    if plan.vlm is None:
        return clip_ok
    return clip_ok and ((s.resident and s.whole) if plan.vlm else s.absent)


def vlm_promised(s: Snapshot) -> bool:
    """The plan that stands wants the VLM in."""
    return s.aim.plan.vlm is True


def lacks_clip(s: Snapshot) -> bool:
    """The plan wants CLIP on the GPU and it is not there."""
    return _lacks_clip(s)


def lacks_vlm(s: Snapshot) -> bool:
    """The plan wants the VLM and it is definitely out."""
    return s.aim.plan.vlm is True and s.absent


def surplus(s: Snapshot) -> bool:
    """Something that the plan does not want is still on the card."""
    return s.vlm_surplus or s.clip_surplus


def fits(s: Snapshot) -> bool:
    """There is room with the reserve for the next thing to acquire; unknown free memory is blind mode, not zero."""
    need = s.seen.clip_needed_mib if _lacks_clip(s) else (s.vlm_needed_mib if lacks_vlm(s) else 0.0)
    return need == 0 or s.seen.vram.free_mib is None or need + s.reserve_mib <= s.seen.vram.free_mib


def admissible(s: Snapshot) -> bool:
    """Nothing known forbids the aim: room after giving up what is ours, a server, a model, a usable GPU."""
    return why_not(s) is None


def blocked(s: Snapshot) -> bool:
    """The aim moves something that is leased."""
    moves = s.models_to_move
    return ("vlm" in moves and s.vlm_leased) or ("clip" in moves and s.clip_leased)


def blocked_by_caller(s: Snapshot) -> bool:
    """The aim moves something that the caller itself holds."""
    moves = s.models_to_move
    return ("vlm" in moves and s.vlm_held_by_caller) or ("clip" in moves and s.clip_held_by_caller)


def drain_over(s: Snapshot) -> bool:
    """The time to wait for leases is over."""
    return s.drain_over


def no_hold(s: Snapshot) -> bool:
    """The mode's own target stands."""
    return s.hold is None


def asks_current(s: Snapshot) -> bool:
    """The asked mode is the one that stands."""
    return s.asked is not None and s.asked.value == s.state.value


def asks_idle(s: Snapshot) -> bool:
    """The asked mode is IDLE, which needs nothing."""
    return s.asked is ExecutionMode.IDLE


def refuses_shortage(s: Snapshot) -> bool:
    """The settings say `on_shortage = refuse`."""
    return s.refuse_on_shortage


def vlm_absent(s: Snapshot) -> bool:
    """The VLM is definitely out."""
    return s.absent


def idle_must_wait(s: Snapshot) -> bool:
    """Idle unloading has to wait: leased, used, wanted by a queued ticket, not known, or not ours to unload."""
    return (
        s.vlm_leased
        or s.used_since
        or s.vlm_ticket_queued
        or not known(s)
        or blocked(s)
        or (s.mode is ExecutionMode.IDLE and not s.vlm_ours)
    )


def unknown_too_long(s: Snapshot) -> bool:
    """Ollama has not given a definite answer for `unknown_max_s`."""
    return s.unknown_too_long


def below_floor(s: Snapshot) -> bool:
    """The card's free memory is under the floor."""
    free = s.seen.vram.free_mib
    return s.on_our_card and free is not None and free < s.floor_mib and s.seen.vram.scope != "assumed"


def hold_lapsed(s: Snapshot) -> bool:
    """An on-demand VLM that nobody holds has gone, or memory is short."""
    return s.hold is Hold.WANTED and not s.vlm_leased and (s.absent or below_floor(s))


def gpu_gone(s: Snapshot) -> bool:
    """The card has gone and the plan puts something on it."""
    return s.seen.vram.lost and (s.aim.plan.clip == "gpu" or (s.aim.plan.vlm is True and s.on_our_card))


def pressed(s: Snapshot) -> bool:
    """Free memory has been under the floor for `pressure_s`, and something of ours is on the card to give up."""
    return s.pressed_too_long and (not s.absent or s.seen.clip == "gpu")


def reassertions_left(s: Snapshot) -> bool:
    """The placement may be put right once more within the window."""
    return s.reassertions_left


def clip_there(s: Snapshot) -> bool:
    """CLIP is already on the asked device."""
    return s.aim.plan.clip == s.seen.clip


def clip_may_move(s: Snapshot) -> bool:
    """A move up has room and certainty; a move down needs neither."""
    return s.seen.clip != "none" and (not _lacks_clip(s) or (known(s) and admissible(s)))


def outdated(s: Snapshot) -> bool:
    """A request for another mode, or a close, waits for leases: nothing is acquired any more for the old mode."""
    return s.outdated


def superseded(s: Snapshot) -> bool:
    """A newer preempting request waits."""
    return s.superseded


def has_previous(s: Snapshot) -> bool:
    """There is a standing placement to return to."""
    return s.came_from_plan


def has_fallback(s: Snapshot) -> bool:
    """An on-demand attempt, or an idle unload that Ollama does not carry out, with a mode to keep."""
    return s.aim.fallback is not None and not (s.aim.idle and s.absent)


def aims_at_idle(s: Snapshot) -> bool:
    """The aim is IDLE."""
    return s.aim.mode is ExecutionMode.IDLE


def aims_at_recording(s: Snapshot) -> bool:
    """The aim is RECORDING."""
    return s.aim.mode is ExecutionMode.RECORDING


def aims_at_autopilot(s: Snapshot) -> bool:
    """The aim is AUTOPILOT."""
    return s.aim.mode is ExecutionMode.AUTOPILOT


def recoverable(s: Snapshot) -> bool:
    """The cause is gone as far as a look can tell."""
    return known(s) and s.reassertions_left and admissible(s) and not (s.model_missing and s.aim.plan.vlm is True)


def leftovers(s: Snapshot) -> bool:
    """Something that should have been shed is still there."""
    return s.leftovers


def leased(s: Snapshot) -> bool:
    """Somebody holds a lease."""
    return s.vlm_leased or s.clip_leased


Predicate = Callable[[Snapshot], bool]

PREDICATES: dict[str, Predicate] = {
    predicate.__name__: predicate
    for predicate in (
        known,
        undecided,
        placed,
        vlm_promised,
        lacks_clip,
        lacks_vlm,
        surplus,
        fits,
        admissible,
        blocked,
        blocked_by_caller,
        drain_over,
        no_hold,
        asks_current,
        asks_idle,
        refuses_shortage,
        vlm_absent,
        idle_must_wait,
        unknown_too_long,
        hold_lapsed,
        gpu_gone,
        pressed,
        reassertions_left,
        clip_there,
        clip_may_move,
        superseded,
        outdated,
        has_previous,
        has_fallback,
        aims_at_idle,
        aims_at_recording,
        aims_at_autopilot,
        recoverable,
        leftovers,
        leased,
    )
}
"""Every guard that a row of the table may name."""


# --- the targets and the words ---


def target(mode: ExecutionMode, hold: Hold | None, s: Snapshot) -> Plan:
    """The placement that `mode` with `hold` asks for, on this snapshot.

    The best place for CLIP is the GPU where this process has a usable one *or had one*: a card that was lost is a
    fault, not a reason to lower the promise.
    """
    cpu: ClipPlace | None = "cpu" if s.clip_managed else None
    best: ClipPlace | None = "gpu" if s.clip_managed and s.seen.gpu_expected else cpu
    match mode:
        case ExecutionMode.RECORDING:
            return Plan(clip=cpu, vlm=hold is not Hold.PARKED)
        case ExecutionMode.AUTOPILOT if hold is Hold.WANTED:
            return Plan(clip=best if best == "cpu" or _both_fit(s) else cpu, vlm=True)
        case ExecutionMode.AUTOPILOT:
            return Plan(clip=best, vlm=False)
        case _ if hold is Hold.WANTED:
            # IDLE moves CLIP only out of the VLM's way, never up: nobody asked for it there.
            return Plan(
                clip=s.seen.clip if s.clip_managed and s.seen.clip != "none" and _both_fit(s) else cpu, vlm=True
            )
        case _ if hold is Hold.PARKED:
            return Plan(vlm=False)
        case _:
            return Plan()


def hold_of(mode: ExecutionMode, hold: Hold | None) -> Hold | None:
    """The hold where it differs from the mode's own target, else none."""
    if hold is Hold.WANTED and mode is not ExecutionMode.RECORDING:
        return hold
    if hold is Hold.PARKED and mode is ExecutionMode.RECORDING:
        return hold
    return None


def _both_fit(s: Snapshot) -> bool:
    """CLIP and the VLM fit on the card together, with the reserve.  Blind mode trusts to nothing and says no."""
    if not s.on_our_card or not s.seen.vram.present:
        return True
    if s.seen.vram.free_mib is None:
        return False
    clip = 0.0 if s.seen.clip == "gpu" else s.seen.clip_needed_mib
    vlm = 0.0 if s.resident else s.vlm_needed_mib
    return clip + vlm + s.reserve_mib <= s.seen.vram.free_mib


def why_not(s: Snapshot) -> GPUFSMError | None:
    """What known fact forbids the aim, as the error to tell; None where nothing does."""
    seen, wants_load = s.seen, s.aim.plan.vlm is True and not (s.resident and s.whole)
    needs_clip = s.aim.mode is ExecutionMode.AUTOPILOT or s.trigger == "migrate_clip"
    if s.aim.plan.clip is not None and seen.clip == "none" and needs_clip:
        detail = seen.gpu_unusable_reason or "no CLIP is managed"
        return ClipUnavailable(detail=detail, remedy="Install the clip extra, or set clip_model.")
    if _lacks_clip(s) and not seen.gpu_usable:
        if seen.vram.lost:
            return GpuLost(detail=seen.vram.detail or "the GPU has gone", remedy="Restart the agent once it is back.")
        reason = seen.gpu_unusable_reason or "this process has no usable GPU"
        if not seen.gpu_expected:
            return ClipUnavailable(detail=f"CLIP cannot go to a GPU: {reason}", remedy="It serves on the CPU.")
        return CudaPoisoned(detail=reason, remedy="Restart the agent process to use the GPU again.")
    if wants_load and s.on_our_card and seen.vram.lost:
        return GpuLost(detail=seen.vram.detail or "the GPU has gone", remedy="Restart the agent once it is back.")
    if wants_load and seen.residency.refused:
        return OllamaUnavailable(detail=seen.residency.detail or "Ollama refuses connections", remedy=START_OLLAMA)
    if wants_load and seen.catalog.present is Answer.NO:
        return ModelNotFound(detail="Ollama does not have the model", remedy="Pull it: ollama pull NAME.")
    need = s.acquire_mib
    if need == 0 or seen.vram.free_mib is None or need + s.reserve_mib <= seen.vram.free_mib + s.reclaimable_mib:
        return None
    return shortage(s)


START_OLLAMA = "Start it (ollama serve) or set ollama_url."


def shortage(s: Snapshot) -> InsufficientVRAM:
    """The refusal for want of memory, with all its figures."""
    free = s.seen.vram.free_mib
    held = f" Held by {', '.join(s.seen.foreign_holders)}." if s.seen.foreign_holders else ""
    return InsufficientVRAM(
        detail=(
            f"needs {s.acquire_mib:.0f} MiB and keeps {s.reserve_mib:.0f} MiB in reserve, but "
            f"{'?' if free is None else f'{free:.0f}'} MiB are free and {s.reclaimable_mib:.0f} MiB can be given up"
        ),
        remedy=f"Close a program that uses the GPU, or use a smaller model.{held}",
        needed_mib=s.acquire_mib,
        free_mib=free,
        reclaimable_mib=s.reclaimable_mib,
        reserve_mib=s.reserve_mib,
        holders=s.seen.foreign_holders,
    )


def unknown(s: Snapshot) -> ResidencyUnknown:
    """The refusal for want of an answer."""
    detail = s.seen.residency.detail or "Ollama gave no definite answer"
    refused = s.seen.residency.refused
    remedy = START_OLLAMA if refused else "It may be busy or hung; look at `ollama ps` and its log."
    return ResidencyUnknown(detail=detail, remedy=remedy)
