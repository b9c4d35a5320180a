"""The states, what each promises, and the table of all moves.  Read this first.

A state's name is a promise about the world, and it is entered only when observation has shown the promise kept; while
the world is moving, the state is one of the four steps.  This table is the only place that decides: the running
machine, the lint, the diagrams and the explorer are all made from it, and nothing else changes the state.

How to read a row: in one of `sources`, on `trigger`, if every guard holds (`!name` = must not hold), run `action` and
go to `dest`; `dest` None stays.  The first enabled row wins, and the last row of a (state, trigger) pair has no guard.
Guards are in `guards.py`; actions and the work of the steps (`on_enter`) are in `engine.py`.

What is not here: how long things take, which models exist, HTTP, NVML, torch.
"""

from __future__ import annotations

from attrs import frozen

from gpu_fsm.status import State

IDLE, RECORDING, AUTOPILOT, DEGRADED = State.IDLE, State.RECORDING, State.AUTOPILOT, State.DEGRADED
RELEASING, MIGRATING, LOADING, SHEDDING = State.RELEASING, State.MIGRATING, State.LOADING, State.SHEDDING

PROMISES: dict[State, str] = {
    IDLE: "nothing: entering it by request changes nothing on the card",
    RECORDING: "the VLM is resident, wholly on the GPU where there is one; CLIP is on the CPU",
    AUTOPILOT: "the VLM is not resident; CLIP is on the best device",
    DEGRADED: "the asked mode could not be given; a reason is set, CLIP serves, recovery is armed",
    RELEASING: "step: giving back what the plan does not want, until that is proven",
    MIGRATING: "step: CLIP to the GPU",
    LOADING: "step: the VLM into Ollama",
    SHEDDING: "step: best effort to the safe placement; leads only to DEGRADED",
}

STANDING = (IDLE, RECORDING, AUTOPILOT)
"""The modes that can be asked for."""
STABLE = (*STANDING, DEGRADED)
"""Where external events are delivered."""
MOVING = (RELEASING, MIGRATING, LOADING)
"""The steps that can still reach a mode."""
STEPS = (*MOVING, SHEDDING)

EXTERNAL = (
    "request",
    "vlm_wanted",
    "vlm_unwanted",
    "migrate_clip",
    "close",
    "idle_timeout",
    "check",
    "renew",
    "recover",
    "fault",
)
"""Triggers from outside: each has a row in every stable state, the last one unguarded."""
OUTCOMES = ("step_done", "aborted", "fault")
"""How a moving step ends: in exactly one of these."""


@frozen(kw_only=True)
class Row:
    """One move: `name` is unique and appears in the journal."""

    name: str
    trigger: str
    sources: tuple[State, ...]
    dest: State | None
    guards: tuple[str, ...] = ()
    action: str
    note: str


def _row(
    name: str,
    trigger: str,
    sources: tuple[State, ...],
    dest: State | None,
    guards: str,
    action: str,
    note: str,
) -> Row:
    return Row(
        name=name,
        trigger=trigger,
        sources=sources,
        dest=dest,
        guards=tuple(guards.split()),
        action=action,
        note=note,
    )


def _waiting(trigger: str, sources: tuple[State, ...]) -> tuple[Row, ...]:
    """A ticket that would move something leased waits in the stable state, and not for ever."""
    return (
        _row(f"{trigger}-own-lease", trigger, sources, None, "blocked_by_caller", "refuse_lease_held",
             "the caller would wait for itself"),
        _row(f"{trigger}-wait", trigger, sources, None, "blocked !drain_over", "wait", "leases drain first"),
        _row(f"{trigger}-drained-late", trigger, sources, None, "blocked", "refuse_lease_timeout",
             "leases stood in the way for too long"),
    )  # fmt: skip


def _landing(mode: State, guard: str) -> Row:
    return _row(f"landed-{mode.value}", "step_done", MOVING, mode, f"{guard} placed", "settle", "the promise is kept")


# fmt: off
TABLE: tuple[Row, ...] = (
    # --- a mode is asked for ---
    _row("request-already", "request", STANDING, None, "asks_current no_hold placed", "acknowledge", "it stands"),
    *_waiting("request", STABLE),
    _row("request-idle", "request", STABLE, RELEASING, "asks_idle", "begin", "IDLE needs nothing and moves nothing"),
    _row("request", "request", STABLE, RELEASING, "known admissible", "begin", "room, or room after giving up"),
    _row("request-refused", "request", STABLE, None, "refuses_shortage", "refuse", "as on_shortage says"),
    _row("request-degrades", "request", STABLE, SHEDDING, "", "begin_refused", "the agent has moved on; be safe"),
    # --- the VLM is wanted, or not wanted, without a change of mode ---
    _row("wanted-already", "vlm_wanted", STANDING, None, "placed", "acknowledge", "it is in"),
    *_waiting("vlm_wanted", STABLE),
    _row("wanted-recovers", "vlm_wanted", (DEGRADED,), RELEASING, "recoverable", "begin", "worth a try"),
    _row("wanted-degraded", "vlm_wanted", (DEGRADED,), None, "", "refuse_degraded", "told why; recovery comes sooner"),
    _row("wanted", "vlm_wanted", STANDING, RELEASING, "known admissible", "begin", "load on demand"),
    _row("wanted-refused", "vlm_wanted", STANDING, None, "", "refuse", "costs the caller an error, never the mode"),
    _row("unwanted-unknown", "vlm_unwanted", STABLE, None, "!known", "refuse", "no guess about what is there"),
    _row("unwanted-already", "vlm_unwanted", STANDING, None, "placed", "acknowledge", "it is out"),
    *_waiting("vlm_unwanted", STABLE),
    _row("unwanted", "vlm_unwanted", STANDING, RELEASING, "", "begin", "unload and prove it"),
    _row("unwanted-gone", "vlm_unwanted", (DEGRADED,), None, "vlm_absent", "acknowledge_in_place", "it is out"),
    _row("unwanted-shed", "vlm_unwanted", (DEGRADED,), SHEDDING, "", "shed_again", "try to get rid of it again"),
    _row("idle-waits", "idle_timeout", STANDING, None, "idle_must_wait", "rearm_idle", "used, leased, or not ours"),
    _row("idle", "idle_timeout", STANDING, RELEASING, "", "begin", "unload for want of use"),
    _row("idle-degraded", "idle_timeout", (DEGRADED,), None, "", "note", "nothing is promised here"),
    # --- is the promise still kept? ----------------------------------------------------
    _row("check-degraded", "check", (DEGRADED,), None, "", "look_for_recovery", "a cause that has gone ends the wait"),
    _row("check-idle", "check", (IDLE,), None, "no_hold", "note", "nothing is promised"),
    _row("check-lost-sight", "check", STANDING, SHEDDING, "undecided unknown_too_long", "degrade_unreachable",
         "nobody could tell for unknown_max_s"),
    _row("check-unknown", "check", STANDING, None, "undecided", "note", "one blocked answer is no loss"),
    _row("check-hold-lapsed", "check", (IDLE, AUTOPILOT), RELEASING, "hold_lapsed !blocked", "begin",
         "the on-demand VLM has gone, or memory is short and nobody holds it"),
    _row("check-gpu-lost", "check", STANDING, SHEDDING, "gpu_gone", "degrade_gpu_lost", "the card has gone"),
    _row("check-pressure", "check", (RECORDING, AUTOPILOT), SHEDDING, "pressed", "degrade_pressure",
         "the card is full for too long"),
    _row("check-kept", "check", STANDING, None, "placed", "note", "the promise is kept"),
    _row("check-leased", "check", STANDING, None, "blocked", "note", "a lease stands in the way of putting it right"),
    _row("check-outdated", "check", STANDING, None, "outdated", "note", "nothing more is acquired for what is over"),
    _row("check-reassert", "check", STANDING, RELEASING, "reassertions_left admissible", "reassert", "put it right"),
    _row("check-lost", "check", STANDING, SHEDDING, "", "degrade_lost", "it cannot be put right, or not again"),
    _row("renew", "renew", STANDING, None, "vlm_promised placed", "renew_keep_alive",
         "the idle deadline or a lease outlives Ollama's own timer"),
    _row("renew-dropped", "renew", STABLE, None, "", "note", "a renewal of what is gone would be a load"),
    # --- CLIP by hand ---
    _row("clip-already", "migrate_clip", STABLE, None, "clip_there", "acknowledge_in_place", "it is there"),
    _row("clip-conflict", "migrate_clip", (RECORDING, AUTOPILOT, DEGRADED), None, "", "refuse_conflict",
         "the mode promises the opposite"),
    *_waiting("migrate_clip", (IDLE,)),
    _row("clip", "migrate_clip", (IDLE,), RELEASING, "clip_may_move", "begin", "IDLE promises nothing, so it may"),
    _row("clip-refused", "migrate_clip", (IDLE,), None, "", "refuse", "no room"),
    # --- the end ---
    _row("close-wait", "close", STABLE, None, "blocked !drain_over", "wait", "leases drain first"),
    _row("close", "close", STABLE, RELEASING, "!undecided", "begin", "give back what is ours"),
    _row("close-blind", "close", STABLE, SHEDDING, "", "begin_refused", "give back what can be reached"),
    # --- how a step ends ---
    _row("superseded", "step_done", MOVING, RELEASING, "superseded", "adopt", "the newer request takes over"),
    _row("undecided-falls-back", "step_done", MOVING, RELEASING, "undecided has_fallback", "fall_back",
         "an error for the caller, the mode for the agent"),
    _row("undecided", "step_done", MOVING, SHEDDING, "undecided", "degrade_unknown", "no answer by the deadline"),
    _row("migrate", "step_done", (RELEASING,), MIGRATING, "lacks_clip fits !surplus", "proceed", "room for CLIP"),
    _row("load", "step_done", (RELEASING, MIGRATING), LOADING, "lacks_vlm fits !lacks_clip !surplus", "proceed",
         "room for the VLM"),
    _landing(IDLE, "aims_at_idle"),
    _landing(RECORDING, "aims_at_recording"),
    _landing(AUTOPILOT, "aims_at_autopilot"),
    _row("short-falls-back", "step_done", MOVING, RELEASING, "has_fallback", "fall_back",
         "an error for the caller, the mode for the agent"),
    _row("short", "step_done", MOVING, SHEDDING, "", "degrade_unplaced", "the world did not follow"),
    _row("aborted-superseded", "aborted", MOVING, RELEASING, "superseded", "adopt", "the newer request takes over"),
    _row("aborted-back", "aborted", MOVING, RELEASING, "has_previous", "go_back",
         "a lease won the race; stand as before and wait for it"),
    _row("aborted", "aborted", MOVING, SHEDDING, "", "degrade_aborted", "a lease stood in the way for too long"),
    _row("fault-falls-back", "fault", MOVING, RELEASING, "has_fallback", "fall_back",
         "an error for the caller, the mode for the agent"),
    _row("fault", "fault", MOVING, SHEDDING, "", "degrade_fault", "something broke"),
    _row("fault-idle", "fault", (IDLE,), None, "no_hold", "note", "nothing is promised"),
    _row("fault-standing", "fault", STANDING, SHEDDING, "", "degrade_fault", "something broke"),
    _row("fault-degraded", "fault", (DEGRADED,), None, "", "note", "already safe"),
    # --- down, and up again ---
    _row("shed", "shed", (SHEDDING,), DEGRADED, "", "settle_degraded", "as safe as it gets"),
    _row("recover", "recover", (DEGRADED,), RELEASING, "recoverable !blocked !outdated", "begin_recovery",
         "try the asked mode"),
    _row("recover-shed", "recover", (DEGRADED,), SHEDDING, "leftovers !leased", "shed_again", "tidy up first"),
    _row("recover-later", "recover", (DEGRADED,), None, "", "back_off", "not yet"),
    _row("recover-dropped", "recover", STANDING, None, "", "note", "nothing to recover"),
)
# fmt: on
