"""The reference: what a mode register with holds and leases promises its callers, and nothing of how it keeps it.

A call is *asked* and ends with an *answer*; in between it takes effect at one moment.  `Register` is the state that
such effects act on, frozen and small: `effects(state, call, answer)` says in which states the register can be after
`call` took effect with that answer; none means that the answer is impossible there.  `histories.py` looks for an order
of these moments that explains what concurrent clients have seen.

It knows no card, no memory, no time and no transition: it describes worlds where everything fits and nothing breaks.
A refusal has no effect.  What a refusal needs besides the state (a newer request, a close) is in `histories.py`, too.
"""

from __future__ import annotations

from typing import Literal

import attrs
from attrs import frozen

Verb = Literal["set_mode", "load", "unload", "migrate", "take", "give_back", "status", "close"]

GRANTED = "granted"
REFUSALS: dict[Verb, frozenset[str]] = {
    "set_mode": frozenset({"superseded", "lease_timeout", "lease_held", "manager_closed"}),
    "load": frozenset({"superseded", "lease_timeout", "lease_held", "manager_closed"}),
    "unload": frozenset({"superseded", "lease_timeout", "lease_held", "manager_closed"}),
    "migrate": frozenset({"superseded", "lease_timeout", "lease_held", "manager_closed", "mode_conflict"}),
    "take": frozenset({"superseded", "lease_timeout", "lease_held", "manager_closed"}),
    "give_back": frozenset(),
    "status": frozenset(),
    "close": frozenset(),
}
"""How each verb may be refused: the codes of the errors."""


@frozen(kw_only=True)
class Call:
    """What a client asks for.  `what` is the mode, the place of CLIP, or the model that is leased."""

    verb: Verb
    what: str = ""
    client: int = 0
    preempt: bool = False

    def __str__(self) -> str:
        words = ("preempting " if self.preempt else "", self.verb, f" {self.what}" if self.what else "")
        return f"client {self.client}: {''.join(words)}"


@frozen(kw_only=True)
class Register:
    """What stands, as far as callers can know it."""

    mode: str = "idle"
    hold: str = ""
    vlm: bool | None = None
    """In or out; None where nothing is promised."""
    clip: str = "?"
    """`cpu` or `gpu`; `?` where nothing is promised."""
    leases: frozenset[tuple[int, str]] = frozenset()
    """(client, model)."""
    closed: bool = False

    @property
    def seen(self) -> str:
        """What a look at the status says."""
        return f"{self.mode} {self.hold}".strip()

    def leased(self, model: str) -> bool:
        """Whether anybody holds `model`."""
        return any(held == model for _, held in self.leases)


States = tuple[Register, ...]


def effects(state: Register, call: Call, answer: str) -> States:
    """The states after `call` took effect with `answer`; empty where it cannot have.

    `answer` is `granted`, the code of a refusal, or, for `status`, what was seen.
    """
    if call.verb == "status":
        return (state,) if answer == state.seen else ()
    if answer in REFUSALS[call.verb]:
        return _refused(state, call, answer)
    return granted(state, call) if answer == GRANTED else ()


def _refused(state: Register, call: Call, answer: str) -> States:
    if answer == "mode_conflict" and (state.mode == "idle" or state.clip == call.what):
        return ()
    if answer == "lease_held":
        if not any(client == call.client for client, _ in state.leases):
            return ()
        if call.preempt:  # it may have thrown somebody out in the middle of a move, and IDLE is what stands then
            return (state, attrs.evolve(state, mode="idle", hold="", vlm=None, clip="?"))
    return (state,)


def granted(state: Register, call: Call) -> States:
    """The states after a call that was granted; empty where it had to wait or be refused."""
    match call.verb:
        case "close":
            return (attrs.evolve(state, mode="idle", hold="", vlm=None, clip="?", closed=True),)
        case "give_back":
            return (attrs.evolve(state, leases=state.leases - {(call.client, call.what)}),)
        case _ if state.closed:
            return ()
        case "set_mode" if call.what == "recording":
            return _placed(state, mode="recording", hold="", vlm=True, clip="cpu")
        case "set_mode" if call.what == "autopilot":
            return _placed(state, mode="autopilot", hold="", vlm=False, clip="gpu")
        case "set_mode":
            return _placed(state, mode="idle", hold="", vlm=None, clip="?")
        case "load" if state.mode == "recording":
            return _placed(state, hold="", vlm=True, clip="cpu")
        case "load":
            return _placed(state, hold="wanted", vlm=True, clip="?")
        case "unload" if state.mode == "recording":
            return _placed(state, hold="parked", vlm=False, clip="cpu")
        case "unload" if state.mode == "autopilot":
            return _placed(state, hold="", vlm=False, clip="gpu")
        case "unload":
            return tuple(attrs.evolve(after, vlm=None) for after in _placed(state, hold="", vlm=False))
        case "migrate" if state.mode == "idle":
            return _placed(state, clip=call.what)
        case "migrate":
            return (state,) if state.clip in ("?", call.what) else ()
        case "take" if call.what == "vlm":
            loaded = granted(state, attrs.evolve(call, verb="load"))
            return tuple(attrs.evolve(after, leases=after.leases | {(call.client, "vlm")}) for after in loaded)
        case _:
            return (attrs.evolve(state, leases=state.leases | {(call.client, call.what)}),)


def _placed(state: Register, **changes: object) -> States:
    """`state` with the models placed anew; nothing where a VLM lease forbids that.

    A CLIP lease forbids nothing here: CLIP moves at a moment of its own, before the mode stands, and a lease may begin
    between the two.  That it is not moved under a lease is for `histories.overlaps` to judge.
    """
    after = attrs.evolve(state, **changes)  # type: ignore[arg-type]
    return () if after.vlm is False and state.vlm is not False and state.leased("vlm") else (after,)
