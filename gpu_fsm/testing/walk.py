"""The explorer: every configuration that the real manager can get into, within bounds, in a simulated world.

`explore_manager` leads a fresh manager in a fresh world to a configuration by its shortest story, does one thing, and
judges: safety by the `Oracle`, and that every mode that fits is granted soon once all is well again (a manager that
always degrades is safe, too).  `configuration` is the abstraction; `DEFENSIVE` says what cannot be taken, and why.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from attrs import define, evolve, frozen

from gpu_fsm import errors
from gpu_fsm.guards import PREDICATES
from gpu_fsm.manager import GPUResourceManager
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation import KINDS, SimulatedWorld
from gpu_fsm.states import STEPS, TABLE
from gpu_fsm.status import ExecutionMode, Hold, State
from gpu_fsm.testing.explore import Exploration, Story, Violation, search
from gpu_fsm.testing.oracle import EFFECTS, Oracle
from gpu_fsm.testing.simulated import MODES, WAIT_S

DEFENSIVE: dict[str, str] = {
    "idle-degraded": "timers are a function of the state, and DEGRADED has no idle timer: for one that is late",
    "recover-dropped": "only DEGRADED has the timer: for one that is late",
    "vlm_promised is False": "the renewal's timer is armed only where the VLM is promised",
    "aborted-back": "a holder takes a second lease between counting and moving: only another thread can",
    "has_previous is True": "decides on nothing but aborted-back",
}
"""Rows, states and guard outcomes that no story here can take, each with the reason why it is there all the same."""


# --- what counts ---


@frozen
class Configuration:
    """What of a manager in its world counts; two stories that end in equal ones are not told further apart."""

    profile: str
    state: str
    """Where the machine rests, or CLOSED."""
    asked: str
    hold: str
    vlm: str
    """Where the world, not the manager, has it: in or out."""
    clip: str
    leases: tuple[str, ...]
    waiting: tuple[str, ...]
    """The kinds of the requests that wait for leases, oldest first."""
    troubles: tuple[str, ...]
    """What is wrong with the world and stays so."""

    def __str__(self) -> str:
        words = [self.state, f"asked {self.asked}", self.hold, f"VLM {self.vlm}", f"CLIP {self.clip}"]
        words += [f"{lease} leased" for lease in self.leases] + [f"{kind} waits" for kind in self.waiting]
        words += self.troubles
        return f"{self.profile}: " + ", ".join(word for word in words if word)


def configuration(scene: Scene) -> Configuration:
    """The abstraction: from a manager in its world to the configuration that it is in.

    Left out, and so taken for equal: all times (idle, back-off, keep-alive), the reason of a DEGRADED, who was refused
    what, measured sizes and raised needs, and everything that ended before.
    """
    manager, world, engine = scene.manager, scene.world, scene.oracle.engine
    status = manager.get_status()
    vlm = "in" if world.vlm_resident() else "out"
    if status.closed:
        return Configuration(scene.profile.name, "CLOSED", "", "", vlm, world.clip.place, (), (), ())
    queued = (*engine.waiting, *manager._driver.mailbox._queue)
    return Configuration(
        profile=scene.profile.name,
        state=status.state.name,
        asked=status.asked_mode.name,
        hold=status.hold.name if status.hold else "",
        vlm=vlm,
        clip=world.clip.place,
        leases=tuple(sorted(scene.leases)),
        waiting=tuple(f"{ticket.kind}{f' {ticket.mode.name}' if ticket.mode else ''}" for ticket in queued),
        troubles=tuple(sorted(scene.troubles)),
    )


TELLING: Mapping[str, Sequence[str]] = {
    "ollama.load": ("before", "after", "silent", "hang", "oom", "partial", "http_404"),
    "ollama.unload": ("before", "silent", "hang", "reclaim_never"),
    "ollama.renew": ("before",),
    "ollama.ps": ("before", "silent"),
    "ollama.tags": ("http_404",),
    "clip.to_gpu": ("before", "after", "silent", "oom", "gpu_lost"),
    "clip.to_cpu": ("before", "silent"),
    "probe.read": ("unknown",),
}
"""One kind of fault for each way in which an operation can fail, as far as the manager can tell."""


@frozen(kw_only=True)
class Profile:
    """A world and settings to walk in."""

    name: str
    world: Mapping[str, Any]
    settings: Mapping[str, Any]
    troubles: tuple[str, ...] = ("stopped", "killed", "neighbour", "lost")
    faults: Mapping[str, Sequence[str]] = TELLING
    """The faults of each operation that are tried."""
    is_meddled_with: bool = True
    """Something may happen in the middle of a step."""
    has_leases: bool = True


PROFILES = (
    Profile(name="tight", world={"card_mib": 6400.0}, settings={}),
    Profile(
        name="roomy",
        world={"card_mib": 8192.0},
        settings={"on_shortage": "refuse"},
        troubles=("neighbour",),
        faults={"clip.to_cpu": ("silent",)},
        is_meddled_with=False,
        has_leases=False,
    ),
)
"""A card for one model at a time, and one for both where a shortage is refused."""

SETTINGS: dict[str, Any] = {
    "idle_timeout_s": 60.0,
    "observe_timeout_s": 1.0,
    "reassert_limit": 1,
    "reassert_window_s": 120.0,
    "settle_poll_s": 0.5,
    "settle_timeout_s": 2.0,
    "shed_deadline_s": 5.0,
    "unload_deadline_s": 5.0,
    "vlm_load_deadline_s": 30.0,
    "vlm_load_retries": 1,
}
"""Short times, rare looks, few repetitions: the same behaviour in fewer calls."""


@frozen(kw_only=True)
class Bounds:
    """How far the walk goes."""

    queue: int = 1
    """Most requests that wait at the same time."""
    faults: int = 1
    """Most things that are wrong at the same time: troubles of the world and armed faults."""
    leases: int = 1
    """Most leases at the same time; one on each model at most."""
    together: bool = False
    """Leases, troubles of the world, armed faults and meddling at the same time, and not only one of these sorts."""
    every_kind: bool = False
    """Try every kind of fault, not one for each way of failing."""

    def but(self, *, queue: int | None = None, faults: int | None = None) -> Bounds:
        """The same with other numbers, where they are given."""
        queue = self.queue if queue is None else queue
        return evolve(self, queue=queue, faults=self.faults if faults is None else faults)


THOROUGH = Bounds(queue=2, faults=1, leases=2, together=True, every_kind=True)

# --- what can be done ---


@frozen
class Act:
    """One thing to do, with what goes wrong meanwhile.  Call it with a scene."""

    name: str
    do: Callable[[Scene], object]
    armed: tuple[tuple[str, str, bool], ...] = ()
    """(operation, kind, only from the first effect on)."""
    meddled: str = ""
    at: tuple[State, str, str] | None = None
    """Where in a step the meddling happens: state, operation, phase."""
    elementary: bool = False
    """Neither faults nor meddling are tried with it."""

    def __call__(self, scene: Scene) -> None:
        scene.play(self)

    def told(self) -> str:
        """Its name in a story."""
        name = self.name
        for op, kind, late in self.armed:
            name += f" !{op}:{kind}{' in the middle' if late else ''}"
        if self.at is not None:
            name += f" ~{self.meddled} at {self.at[0].name} {self.at[1]} {self.at[2]}"
        return name


class Scene:
    """A manager in its world, and what the story has done to them."""

    def __init__(self, profile: Profile, bounds: Bounds) -> None:
        self.profile, self.bounds = profile, bounds
        self.world = SimulatedWorld(**profile.world)
        config = self.world.config(**{**SETTINGS, **profile.settings})
        server = OllamaManager(config, clock=self.world.clock, transport=self.world.transport)
        self.manager = GPUResourceManager(config, **self.world.ports(server), threaded=False)
        self.oracle = Oracle(self.manager, self.world)
        self.leases: dict[str, tuple[contextvars.Context, contextlib.ExitStack]] = {}
        """By model: who holds it, and the end of that.  Everything else is asked by strangers."""
        self.troubles: set[str] = set()
        self.act: Act | None = None
        self.calm = True
        """Nothing was out of the ordinary when the last act began."""
        self.trace: list[tuple[State, str, str]] = []
        """The I/O of the last act: state, operation, phase."""
        self.records = 0
        self.world.on_io.append(self._note)
        self._settle()  # the first look, which is at once

    def _note(self, op: str, phase: str) -> None:
        self.trace.append((self.oracle.engine.state, op, phase))

    def _settle(self) -> None:
        self.manager.drive_for(0.0)

    # --- doing ---

    def play(self, act: Act) -> None:
        """Do it, with what goes wrong meanwhile, and let the manager come to rest; a hang is an AssertionError."""
        self.act = act
        self.calm = self.calm_now
        self.trace.clear()
        journal = self.manager.journal
        self.records = journal[-1].n if journal else 0
        faults, world = self.world.faults, self.world
        for op, kind, late in act.armed:
            if not late:
                faults.arm(op, kind, times=None)
        done: list[bool] = []

        def meddle(op: str, phase: str) -> None:
            if not done and op in EFFECTS:
                done.append(True)
                for seeing, kind, late in act.armed:
                    if late:
                        faults.arm(seeing, kind, times=None)

        def interfere(op: str, phase: str) -> None:
            if not done and (self.oracle.engine.state, op, phase) == act.at:
                done.append(True)
                _MEDDLINGS[act.meddled](self)

        hook = interfere if act.at else meddle
        world.on_io.append(hook)
        try:
            self._ours(lambda: act.do(self))
            self._ours(self._settle)
        finally:
            world.on_io.remove(hook)
        journal = self.manager.journal
        if journal and journal[-1].n > self.records and journal[-1].row == "shed":
            self.oracle.degraded_placement()
            self._nothing_is_left(act)
        faults.heal()
        for model in {info.model for info in self.manager.get_status().leases if info.lost} & set(self.leases):
            self.give_back(model)  # the holder learns of it and ends
        self._ours(self._settle)

    def _nothing_is_left(self, act: Act) -> None:
        """Leftovers of SHEDDING are listed; but where nothing stood in the way there are none."""
        broken = {op for op, _, _ in act.armed}
        if "clip" not in self.leases and "clip.to_cpu" not in broken:
            assert self.world.clip.place != "gpu", "DEGRADED, and CLIP was left on the GPU for no reason"
        reason = self.manager.get_status().reason
        hands_off = reason is not None and reason.code in ("external_client", "lease_timeout")
        others = self.troubles or "another client" in act.told() or act.name == "close"  # it may be theirs
        if not (hands_off or others or broken & {"ollama.unload", "ollama.ps", "ollama.load"}):
            assert not self.world.vlm_resident(), "DEGRADED, and the VLM was left for no reason"

    def _ours(self, call: Callable[[], object]) -> None:
        """Errors that an embedder is told to expect are answers; these two are not."""
        try:
            call()
        except (errors.OperationTimeout, errors.InternalError) as error:
            raise AssertionError(f"a hang or a defect: {error!r}") from error
        except errors.GPUFSMError:
            pass

    def met(self) -> Iterator[str]:
        """Rows, states and guard outcomes of the last act."""
        for record in self.manager.journal:
            if record.n > self.records:
                yield record.row
                yield record.source.name
                yield record.dest.name
                yield from (f"{name} is {verdict}" for name, verdict in record.verdicts.items())

    def discard(self) -> None:
        """Nobody closes this manager, not even the interpreter's exit; and most of it goes without the collector."""
        self.manager._at_exit.detach()
        self.oracle.engine.machine.wrapped.events.clear()

    # --- what can be done now ---

    def actions(self) -> Mapping[str, Act]:
        """Everything that a user, another program or the world can do next."""
        if self.manager.get_status().closed:
            return {}
        acts = [*self._asks(), *self._leasings(), *self._times(), *self._world_acts()]
        return {act.told(): act for act in acts}

    def _asks(self) -> Iterator[Act]:
        queued = len(self.oracle.engine.waiting) + len(self.manager._driver.mailbox)
        for mode in MODES:
            if queued < self.bounds.queue:
                yield Act(f"ask {mode.name}", _post("request", mode=mode))
            else:
                yield Act(f"preempt with {mode.name}", _post("request", mode=mode, preempt=True))
            if self.leases and not queued and mode is not ExecutionMode.IDLE:
                yield Act(f"ask {mode.name} as the holder", _post("request", own=True, mode=mode))
        for name, kind, place in _WISHES:
            if queued < self.bounds.queue:
                yield Act(name, _post(kind, place=place))
            if self.leases and not queued:
                yield Act(f"{name} as the holder", _post(kind, own=True, place=place))
        yield Act("close", lambda s: s.manager.close())

    def post(self, kind: Any, *, own: bool = False, **about: Any) -> None:
        """Ask, as the holder or as a stranger, and drive as far as it goes without waiting."""
        context = next(iter(self.leases.values()))[0] if own else contextvars.Context()
        context.run(lambda: self.manager._driver.post(kind, **about))
        self._settle()

    def _leasings(self) -> Iterator[Act]:
        for model in ("vlm", "clip"):
            if model in self.leases:
                yield Act(f"give {model} back", _calling(Scene.give_back, model))
            elif self._may_lease:
                # What can go wrong with it goes wrong with the wish for the VLM, too.
                yield Act(f"take {model}", _calling(Scene.take, model), elementary=True)

    @property
    def calm_now(self) -> bool:
        """Nothing is out of the ordinary, or that does not matter."""
        return self.bounds.together or not (self.troubles or self.leases)

    @property
    def _may_lease(self) -> bool:
        alone = not self.troubles and self.profile.has_leases
        return len(self.leases) < self.bounds.leases and (alone or self.bounds.together)

    def take(self, model: str) -> None:
        """Take a lease and keep it; whoever has one takes the second, too."""
        lease = self.manager.vlm if model == "vlm" else self.manager.clip
        context = next((context for context, _ in self.leases.values()), contextvars.Context())
        stack = contextlib.ExitStack()
        context.run(lambda: stack.enter_context(lease(holder="the holder", timeout_s=WAIT_S)))
        self.leases[model] = (context, stack)

    def give_back(self, model: str) -> None:
        """End a lease."""
        context, stack = self.leases.pop(model)
        context.run(stack.close)

    def _times(self) -> Iterator[Act]:
        config = self.manager.config
        yield Act("a check", lambda s: s.manager.drive_for(config.check_interval_s))
        yield Act("a while", lambda s: s.manager.drive_for(config.idle_timeout_s * 1.5 + config.check_interval_s))

    def _world_acts(self) -> Iterator[Act]:
        for trouble in self.profile.troubles:
            if trouble in self.troubles:
                if trouble != "lost":
                    yield Act(f"{trouble} ends", _calling(Scene.end, trouble), elementary=True)
            elif len(self.troubles) < self.bounds.faults and (self.bounds.together or not self.leases):
                yield Act(trouble, _calling(Scene.trouble, trouble), elementary=True)
        if not self.troubles & {"stopped", "killed"}:
            name = "another client unloads" if self.world.vlm_resident() else "another client loads"
            yield Act(name, Scene.other_client, elementary=True)
            if self.world.vlm_resident() and self.manager.get_status().state is not State.IDLE:
                yield Act("another client unloads again and again", Scene.fight, elementary=True)
        if self.calm_now:
            yield Act("a user meets a CUDA error", Scene.report, elementary=True)

    def trouble(self, what: str) -> None:
        """Something goes wrong with the world, and stays so."""
        self.troubles.add(what)
        world = self.world
        match what:
            case "stopped" | "killed":
                world.ollama.stop(kill=what == "killed")
            case "neighbour":
                world.card.take("game", world.card.free_mib)
            case "lost":
                world.lose_gpu()

    def end(self, trouble: str) -> None:
        """It is well again."""
        self.troubles.remove(trouble)
        if trouble == "neighbour":
            self.world.card.give_back("game")
        elif trouble in ("stopped", "killed"):
            self.world.ollama.start()
            self.world.ollama.reap_orphans()

    def other_client(self) -> None:
        """Another program unloads our VLM, or loads it, and the manager looks."""
        ollama, vlm = self.world.ollama, self.world.vlm
        if self.world.vlm_resident():
            ollama.foreign_unload(vlm.name)
        else:
            ollama.foreign_load(vlm.name)
        self.manager.drive_for(self.manager.config.check_interval_s)

    def fight(self) -> None:
        """Another program unloads our VLM whenever it is in."""
        for _ in range(self.manager.config.reassert_limit + 1):
            if self.world.vlm_resident():
                self.other_client()

    def report(self) -> None:
        """An error that no look can see."""
        self.manager._driver.report(errors.CudaPoisoned(detail="reported by a user"))

    # --- what else can be tried from the same configuration ---

    def more(self) -> Mapping[str, Act]:
        """The last act again, with a fault at each operation that it used, and with meddling in each of its steps."""
        act = self.act
        if act is None or act.elementary or act.at is not None or not self.calm:
            return {}
        acts = []
        if len(act.armed) + len(self.troubles) < self.bounds.faults:
            acts += list(self._with_faults(act))
        meddled = self.profile.is_meddled_with or self.bounds.together
        if meddled and not act.armed and act.name != "close":
            acts += list(self._with_meddling(act))
        return {more.told(): more for more in acts}

    def _with_faults(self, act: Act) -> Iterator[Act]:
        ops = {op: None for _, op, _ in self.trace}
        moved = any(op in EFFECTS for op in ops)
        taken = {op for op, _, _ in act.armed}
        for op in ops:
            kinds = sorted(KINDS.get(op, ())) if self.bounds.every_kind else self.profile.faults.get(op, ())
            for kind in kinds if op not in taken else ():
                # Sorted: which of two was found first makes no difference.
                if moved or op == "ollama.ps":
                    yield evolve(act, armed=tuple(sorted((*act.armed, (op, kind, False)))))
                if moved and op == "ollama.ps":
                    yield evolve(act, armed=tuple(sorted((*act.armed, (op, kind, True)))))

    def _with_meddling(self, act: Act) -> Iterator[Act]:
        points: dict[tuple[State, str, str], None] = {}
        idle_steps: dict[State, tuple[State, str, str]] = {}
        for state, op, phase in self.trace:
            if state in STEPS:
                idle_steps.setdefault(state, (state, op, phase))
                if op in EFFECTS and phase == ("during" if op == "ollama.load" else "after"):
                    points[state, op, phase] = None
        working = {state for state, _, _ in points}
        for state, at in idle_steps.items():
            if state not in working:
                points[at] = None
        for at in points:
            for meddling in _MEDDLINGS:
                if meddling in _UNWELL and len(self.troubles) >= self.bounds.faults:
                    continue
                if meddling == f"preempt with {act.name.removeprefix('ask ')}":
                    continue
                if meddling == "neighbour" and at[0] is not State.RELEASING:
                    continue  # it would take what the look before the step has just promised
                yield evolve(act, meddled=meddling, at=at)

    # --- what must stay possible ---

    def mend(self) -> None:
        """Leases back, faults healed, the world as it should be."""
        for model in tuple(self.leases):
            self.give_back(model)
        self.world.faults.heal()
        for trouble in tuple(self.troubles - {"lost"}):
            self.end(trouble)

    def fits(self, mode: ExecutionMode) -> bool:
        """Whether the world has what the mode needs, by its own figures."""
        world, config = self.world, self.manager.config
        if mode is ExecutionMode.IDLE:
            return True
        if "lost" in self.troubles or "killed" in self.troubles or world.clip.poisoned:
            return False
        ours = world.vlm_held_mib() + world.clip.held_mib
        free = world.card.free_mib + ours - config.reserve_mib
        if mode is ExecutionMode.RECORDING:
            return world.ollama.up and free >= world.vlm.size_mib
        return free >= world.clip.needed_mib

    @property
    def bound_s(self) -> float:
        """Back-off cap, load time and five seconds."""
        return self.manager.config.recover_cap_s + self.world.vlm.load_s + 5.0

    def grants(self, mode: ExecutionMode) -> None:
        """The mode is asked for and stands within the bound: as the world is where it fits, else in a mended one."""
        if self.manager.get_status().closed:
            return
        for model in tuple(self.leases):
            self.give_back(model)
        if not self.fits(mode):
            self.mend()
        if not self.fits(mode):
            return
        manager, begin = self.manager, self.world.clock.monotonic()
        at_once = not self.troubles and manager.get_status().state is not State.DEGRADED
        future = contextvars.Context().run(lambda: manager.submit_execution_mode(mode))
        with contextlib.suppress(errors.InsufficientVRAM):
            outcome = manager._driver.wait(future, self.bound_s)
            assert outcome.granted or not at_once, f"nothing is wrong, and it was not given: {outcome.reason}"
        while manager.get_status().execution_mode is not mode:
            assert self.world.clock.monotonic() - begin <= self.bound_s, f"{manager.get_status()!r}"
            manager.drive_for(1.0)
        self._stands(mode)

    def converges(self) -> None:
        """Without another word the asked mode comes by itself."""
        if self.manager.get_status().closed:
            return
        self.mend()
        config = self.manager.config
        asked = self.manager.get_status().asked_mode
        if not self.fits(asked):
            return
        window_s = config.reassert_window_s if self.oracle.engine._reassertions else 0.0
        self.manager.drive_for(window_s + config.drain_timeout_s + self.bound_s)
        self._stands(self.manager.get_status().asked_mode)

    def _stands(self, mode: ExecutionMode) -> None:
        status, world = self.manager.get_status(), self.world
        assert status.execution_mode is mode, f"{status.state.name} and not {mode.name}: {status.reason}"
        if mode is ExecutionMode.RECORDING and status.hold is not Hold.PARKED:
            assert world.vlm_resident(), "RECORDING without the VLM"
        if mode is ExecutionMode.AUTOPILOT and status.hold is None:
            assert world.clip.place == "gpu", "AUTOPILOT with CLIP on the CPU"
            assert not world.vlm_resident(), "AUTOPILOT with the VLM in"


def _calling(method: Callable[[Scene, Any], object], argument: object) -> Callable[[Scene], object]:
    return lambda scene: method(scene, argument)


def _post(kind: str, **about: Any) -> Callable[[Scene], object]:
    return lambda scene: scene.post(kind, **about)


_WISHES: tuple[tuple[str, str, str | None], ...] = (
    ("want the VLM", "vlm_wanted", None),
    ("want no VLM", "vlm_unwanted", None),
    ("CLIP to the GPU", "migrate_clip", "gpu"),
    ("CLIP to the CPU", "migrate_clip", "cpu"),
)


def _preempt(mode: ExecutionMode) -> Callable[[Scene], object]:
    return lambda s: contextvars.Context().run(lambda: s.manager.submit_execution_mode(mode, preempt=True))


def _encode_and_preempt(scene: Scene) -> None:
    if not scene.leases:
        with contextlib.suppress(errors.GPUFSMError):
            scene.take("clip")
    _preempt(ExecutionMode.AUTOPILOT)(scene)


_MEDDLINGS: dict[str, Callable[[Scene], object]] = {
    **{f"preempt with {mode.name}": _preempt(mode) for mode in MODES},
    "an encode begins and AUTOPILOT preempts": _encode_and_preempt,
    "stopped": lambda s: s.trouble("stopped"),
    "neighbour": lambda s: s.trouble("neighbour"),
    "another client unloads": lambda s: s.world.ollama.foreign_unload(s.world.vlm.name),
}
"""What can happen in the middle of a step."""
_UNWELL = frozenset({"stopped", "neighbour"})


# --- the walk ---


@define
class Walked:
    """The report."""

    configurations: dict[Configuration, Story]
    edges: int
    depth: int
    closed: bool
    violations: list[Violation]
    stories: dict[str, Story]
    """The shortest story to each row, state and guard outcome."""
    seconds: float
    searched: int = 0
    """Where not closed: so many actions from the beginning everything was tried, in the last profile that was begun."""

    @property
    def missing(self) -> list[str]:
        """Rows, states and guard outcomes that were not taken and have no tag in `DEFENSIVE`."""
        return [name for name in _everything() if name not in self.stories and name not in DEFENSIVE]

    @property
    def stale(self) -> list[str]:
        """Tags of what was taken, or does not exist."""
        return [name for name in DEFENSIVE if name in self.stories or name not in _everything()]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "configurations": len(self.configurations),
            "edges": self.edges,
            "depth": self.depth,
            "closed": self.closed,
            "violations": len(self.violations),
            "rows_taken": sum(row.name in self.stories for row in TABLE),
            "rows_total": len(TABLE),
            "missing": self.missing,
            "stale": self.stale,
            "defensive": DEFENSIVE,
            "broken": [{"rule": v.rule, "story": v.story, "detail": v.detail} for v in self.violations],
            "stories": {row.name: self.stories.get(row.name) for row in TABLE},
            "seconds": round(self.seconds, 1),
        }


def _everything() -> list[str]:
    outcomes = [f"{name} is {verdict}" for name in PREDICATES for verdict in (True, False)]
    return [*(row.name for row in TABLE), *(state.name for state in State), *outcomes]


def explore_manager(
    bounds: Bounds | None = None,
    *,
    profiles: Sequence[Profile] | None = None,
    seconds: float | None = None,
    most_violations: int = 10,
    progress: Callable[[int, int, int], None] | None = None,
) -> Walked:
    """Walk the profiles, in at most so many real `seconds`, up to `most_violations` in each.

    `progress` is told the configurations, the edges, and how many configurations wait.
    """
    bounds = bounds or Bounds()
    begin = time.monotonic()
    total = Walked({}, 0, 0, True, [], {}, 0.0)

    def tell(found: Exploration[Configuration], waiting: int) -> None:
        if progress is not None:
            progress(len(total.configurations) + len(found.configurations), total.edges + len(found.edges), waiting)

    with _no_collector() as collect:
        for profile in PROFILES if profiles is None else profiles:

            def make(profile: Profile = profile) -> Scene:
                collect()
                return Scene(profile, bounds)

            left = None if seconds is None else max(0.0, seconds - (time.monotonic() - begin))
            found = search(
                make,
                Scene.actions,
                abstraction=configuration,
                invariants={"safety": _is_safe},
                promises={
                    **{f"{mode.name} is granted": _calling(Scene.grants, mode) for mode in MODES},
                    "the asked mode comes back": Scene.converges,
                },
                met=Scene.met,
                more=Scene.more,
                discard=Scene.discard,
                most_violations=most_violations,
                seconds=left,
                progress=tell,
            )
            total.configurations |= found.configurations
            total.edges += len(found.edges)
            total.depth = max(total.depth, found.depth)
            total.searched = found.searched
            total.closed = total.closed and found.closed
            total.violations += found.violations
            for name, story in found.stories.items():
                total.stories.setdefault(name, (f"[{profile.name}]", *story))
    total.seconds = time.monotonic() - begin
    return total


def _is_safe(scene: Scene) -> None:
    scene.oracle.check()
    status = scene.manager.get_status()
    assert status.asked_mode is not ExecutionMode.DEGRADED, "DEGRADED is nothing that can be asked for"
    if status.closed:
        assert scene.world.clip.place != "gpu" or scene.leases, "closed, and CLIP is on the GPU"


@contextlib.contextmanager
def _no_collector() -> Iterator[Callable[[], None]]:
    """Worlds are built by the thousand and are full of cycles: collecting them in heaps takes a third of the time."""
    built = 0

    def count() -> None:
        nonlocal built
        built += 1
        if built % 300 == 0:
            gc.collect()

    was = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield count
    finally:
        gc.unfreeze()
        if was:
            gc.enable()
