"""One seed, one life: a manager in a simulated world, from the first request to an empty card.

A seed decides everything: the machine, the settings, what is asked, what breaks and where.  Each life has four phases.
*Chaos*: requests, leases, faults at any I/O call, neighbours, other clients, outages and restarts, each switched on for
the life by one coin and thrown by another, so that some lives are calm and some are hell.  *Heal*: everything is
mended, part by part, in any order.  *Converge*: the asked mode comes by itself within its bound.  *Epilogue*: every use
works, and after the close the card is empty.  The oracle watches between any two I/O calls.

    python -m gpu_fsm.testing.scenario --seeds 0-9999 --json
    python -m gpu_fsm.testing.scenario --seeds 17 --story
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import hashlib
import importlib.metadata
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from attrs import define, field, frozen

from gpu_fsm import errors
from gpu_fsm.engine import JournalRecord
from gpu_fsm.events import IdleUnload
from gpu_fsm.manager import GPUResourceManager
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation import KINDS, SimulatedCLIP, SimulatedWorld
from gpu_fsm.simulation.card import DRIVER
from gpu_fsm.simulation.clip import CLIP_OWNER, CONTEXT_OWNER
from gpu_fsm.states import STANDING, TABLE
from gpu_fsm.status import ExecutionMode, Hold
from gpu_fsm.testing.oracle import Oracle
from gpu_fsm.testing.simulated import MODES, WAIT_S

T = TypeVar("T")


CONVERGE_MARGIN_S = 5.0
"""Beyond the back-off's cap and the time of one load: the asked mode must be back by then."""

PNG = b"\x89PNG\r\n\x1a\n" + bytes(32)
"""Enough of a picture for a simulated model."""

RELIEF_S = (2.0, 8.0, 40.0, 400.0)
"""What hangs is let go after one of these; CLIP's own calls know no deadline."""

LATE_S = (0.5, 3.0, 30.0)

PAUSES_S = (0.05, 1.0, 6.0, 20.0, 65.0)
"""How long nobody asks for anything, in the chaos."""

FAULT_POINTS = tuple(
    (op, kind)
    for op in sorted(KINDS)
    for kind in sorted(KINDS[op])
    if op not in ("ollama.other", "ollama.version") and not (op.startswith("clip.") and kind == "gpu_lost")
)
"""Every fault that a call of the manager's adapters can meet; a poisoned CUDA never heals and has a coin of its own."""

_LOOKS = ("ollama.ps", "probe.read")
"""Most calls are these; what acts is rarer, and goes wrong more often."""

PARTS = {
    "ollama": (),
    "nvml": (("probe.read", "unknown"),),
    "clip": (("clip.to_gpu", "before"), ("clip.to_cpu", "before"), ("clip.encode", "before")),
}
"""What can be out as a whole, and the faults that its outage is made of."""


class Violation(AssertionError):
    """A promise was broken; the message names the seed, the version and the commit."""


class _Killed(BaseException):
    """The agent's process ends between two I/O calls, without a word."""


class Dice:
    """Chance from one seed.

    Every number comes from `random.Random.random`, the one method whose sequence Python promises to keep.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random() < probability

    def below(self, limit: int) -> int:
        """A whole number from 0, under `limit`."""
        return int(self.random() * limit)

    def pick(self, choices: Sequence[T]) -> T:
        """One of them."""
        return choices[self.below(len(choices))]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        """All of them, in any order."""
        rest, mixed = list(items), []
        while rest:
            mixed.append(rest.pop(self.below(len(rest))))
        return mixed


@frozen(kw_only=True)
class Report:
    """What one life was like."""

    seed: int
    digest: str
    """SHA-256 over the story, the server's log and every row taken: the same seed gives the same, byte for byte."""
    violation: str = ""
    operations: int = 0
    calls: int = 0
    """I/O calls of the manager."""
    records: int = 0
    """Rows taken, over all managers of this life."""
    virtual_s: float = 0.0
    converged_s: float | None = None
    """Until the asked mode stood again; None where the card was lost for good."""
    faults: Counter[tuple[str, str]] = field(factory=Counter)
    rows: Counter[str] = field(factory=Counter)
    story: tuple[str, ...] = ()


@define(eq=False)
class _Actor:
    """Somebody who holds a lease, in a context of his own."""

    model: str
    context: contextvars.Context
    stack: contextlib.ExitStack
    handle: Any

    def leave(self) -> None:
        # In a context of its own: he may be waiting for something in his.
        contextvars.Context().run(self.stack.close)


class _Judge(Oracle):
    """The oracle, for a world that others change between a look and what follows from it."""

    room_changed = False
    """Somebody has moved on the card since the last look at it: no room then is nobody's fault."""

    def on_io(self, op: str, phase: str) -> None:
        if phase == "before" and op == "probe.read":
            self.room_changed = False
        super().on_io(op, phase)

    def _room(self, op: str) -> None:
        if not self.room_changed and not self._renewal_became_a_load():
            super()._room(op)


class Scenario:
    """One life.  `run()` tells it once."""

    def __init__(self, seed: int, *, operations: int = 10, pauses_s: Sequence[float] = PAUSES_S) -> None:
        self.seed = seed
        self.pauses_s = pauses_s
        self.dice = dice = Dice(seed)
        self.story: list[str] = []
        self.rows: Counter[str] = Counter()
        self.calls = 0
        self.records: list[str] = []
        self.operations = dice.below(operations) + operations // 2 + 1
        self.phase = "birth"

        self.gpu = not dice.chance(0.1)
        self.world = SimulatedWorld(
            gpu=self.gpu,
            clip=not dice.chance(0.1),
            card_mib=dice.pick((6400.0, 8192.0, 12288.0)),
            tells_holders=dice.chance(0.7),
            version=dice.pick(("0.32.15", "0.32.15", "0.24.0")),
            models={"other": 1500.0},
            vlm_load_s=dice.pick((1.0, 4.0, 20.0)),
            reclaim_s=dice.pick((0.0, 0.3, 1.5)),
            unload_s=dice.pick((0.02, 0.08, 1.0)),
            seed=seed,
        )
        self.settings = {
            "journal_size": 100_000,
            "on_shortage": dice.pick(("degrade", "degrade", "refuse")),
            "on_partial_offload": dice.pick(("reload", "accept", "degrade")),
            "idle_timeout_s": dice.pick((20.0, 120.0)),
            "drain_timeout_s": dice.pick((1.0, 10.0)),
            "unload_deadline_s": dice.pick((3.0, 10.0)),
            "recover_cap_s": dice.pick((20.0, 60.0)),
            "vlm_load_deadline_s": 60.0,
            "reassert_window_s": 60.0,
        }
        # One coin each: what this life knows of trouble.
        hell = dice.pick((0.0, 0.0, 0.1, 0.4, 1.0))
        self.fault_points = {point for point in FAULT_POINTS if dice.chance(hell)}
        self.fault_rate = dice.pick((0.003, 0.02, 0.1))
        self.between_rate = dice.pick((0.0, 0.0, 0.01, 0.05))
        self.between = [name for name in _BETWEEN if dice.chance(0.5)]
        self.happenings = [name for name in _HAPPENINGS if dice.chance(0.6)]
        self.doom = self.gpu and dice.chance(0.05)
        self.doomed = False
        self.out: set[str] = set()
        """Parts that are out as a whole."""
        self.actors: list[_Actor] = []
        self.killed = self.sick = False
        self.kill_soon = False
        self.driving = False
        self.names = 0
        self._begin_manager()

    # --- the whole life ---

    def run(self) -> Report:
        """Tell it.  Never raises for a broken promise: that is `Report.violation`."""
        violation = ""
        converged_s: float | None = None
        try:
            self._chaos()
            self._heal()
            converged_s = self._converge()
            self._epilogue()
        except AssertionError as broken:
            violation = f"{self.phase}: {broken}"
        except Exception as error:
            violation = f"{self.phase}: {type(error).__name__}: {error}"
        self.manager._at_exit.detach()
        self._keep_books()
        digest = hashlib.sha256()
        for line in (*self.story, *self._log(), *self.records):
            digest.update(line.encode() + b"\n")
        return Report(
            seed=self.seed,
            digest=digest.hexdigest(),
            violation=violation,
            operations=self.operations,
            calls=self.calls,
            records=len(self.records),
            virtual_s=self.world.clock.monotonic(),
            converged_s=converged_s,
            faults=self.world.faults.fired,
            rows=self.rows,
            story=tuple(self.story),
        )

    def _log(self) -> Iterable[str]:
        for entry in self.world.ollama.log:
            yield f"{entry.at!r} {entry.client} {entry.op} {entry.fault} {entry.status} {entry.outcome}"

    def _keep_books(self) -> None:
        """Add the manager's journal to this life's, before the manager goes."""
        self.records += [_line(record) for record in self.manager.journal]
        self.rows.update(record.row for record in self.manager.journal)

    def _tell(self, line: str) -> None:
        self.story.append(f"{self.world.clock.monotonic()!r} {line}")

    # --- managers come and go ---

    def _begin_manager(self) -> None:
        world = self.world
        config = world.config(**self.settings)
        server = OllamaManager(config, clock=world.clock, transport=world.transport, jitter=self.dice.random)
        self.manager = GPUResourceManager(config, **world.ports(server), threaded=False)
        self.judge = _Judge(self.manager, world)
        world.on_io.append(self._io)

    def _end_manager(self) -> None:
        self._keep_books()
        self.manager._at_exit.detach()
        self.world.on_io.clear()
        self.actors.clear()
        self.kill_soon = False

    def _die(self) -> None:
        """SIGKILL: nothing is given back by us; the driver takes what the process held, Ollama keeps what it has."""
        self._tell("the process is killed, another one begins")
        self.killed = True
        assert not self.judge.violations, "\n".join(self.judge.violations)
        actors = tuple(self.actors)
        self._end_manager()
        for actor in actors:
            actor.leave()
        self._new_process()

    def _new_process(self) -> None:
        """Another process: CUDA is whole again, and no context has been paid for."""
        old, card = self.world.clip, self.world.card
        for owner in (CLIP_OWNER, CONTEXT_OWNER):
            card.give_back(owner)
        new = SimulatedCLIP(
            clock=self.world.clock,
            card=card if self.gpu else None,
            faults=self.world.faults,
            clip_mib=old.clip_mib,
            context_mib=old.context_mib,
            encode_s=old.encode_s,
            exists=old.place != "none",
        )
        new.on_io = self.world._io
        self.world.clip = new
        self.world.probe.closed = False
        self.doomed = card.lost
        self._begin_manager()

    # --- between any two I/O calls ---

    def _io(self, op: str, phase: str) -> None:
        self.calls += phase == "before"
        if self.phase != "chaos":
            return
        if self.kill_soon and phase != "during" and self.driving:
            self.kill_soon = False
            raise _Killed
        rate = self.fault_rate if op in _LOOKS else 6 * self.fault_rate
        if phase == "before" and self.fault_points and self.dice.chance(rate):
            kinds = [kind for kind in sorted(KINDS[op]) if (op, kind) in self.fault_points]
            if kinds:
                self._break(op, self.dice.pick(kinds))
        if self.between and self.dice.chance(self.between_rate):
            name = self.dice.pick(self.between)
            self._tell(f"  {phase} {op}: {name}")
            _BETWEEN[name](self)

    def _break(self, op: str, kind: str) -> None:
        self._tell(f"  {op} will be {kind}")
        times = self.dice.pick((1, 1, 1, 3))
        args: dict[str, Any] = {"delay_s": self.dice.pick(LATE_S)} if kind == "late" else {}
        self.world.faults.arm(op, kind, times, **args)
        if kind in ("hang", "reclaim_never"):
            self.world.clock.after(self.dice.pick(RELIEF_S), self._relieve)

    def _relieve(self) -> None:
        """What hangs goes on; what is out stays out."""
        self.world.faults.heal()
        for part in sorted(self.out):
            for fault in PARTS[part]:
                self.world.faults.arm(*fault, times=None)

    # --- what happens, in a step or between requests ---

    def _post(self) -> None:
        mode, preempt = self.dice.pick(MODES), self.dice.chance(0.5)
        self._tell(f"    {mode.name}{' at once' if preempt else ''}")
        with contextlib.suppress(errors.ManagerClosed):
            contextvars.Context().run(self._submit, mode, preempt)

    def _someone_leaves(self) -> None:
        if self.actors:
            self.actors.pop(self.dice.below(len(self.actors))).leave()

    def _kill(self) -> None:
        self.kill_soon = True

    def _neighbour_takes(self) -> None:
        if self.gpu:
            self.judge.room_changed = True
            card = self.world.card
            card.take("game", min(self.dice.pick((150.0, 1500.0, 4000.0, 99999.0)), card.free_mib))

    def _neighbour_gives(self) -> None:
        self.world.card.give_back("game")

    def _other_loads(self) -> None:
        self.judge.room_changed = True
        self.world.ollama.foreign_load("other")

    def _other_uses_ours(self) -> None:
        self.judge.room_changed = True
        keep_alive = self.dice.pick((None, -1, 3))
        self.world.ollama.foreign_load(self.world.vlm.name, keep_alive=keep_alive)

    def _other_unloads_ours(self) -> None:
        self.world.ollama.foreign_unload(self.world.vlm.name)

    def _other_asks_ours(self) -> None:
        self.judge.room_changed = True
        self.world.ollama.foreign_generate(self.world.vlm.name)

    def _ollama_restarts(self) -> None:
        self.world.ollama.stop(kill=self.dice.chance(0.5))
        self.world.ollama.start(starting_s=self.dice.pick((0.0, 3.0)))
        if self.dice.chance(0.5):
            self.world.ollama.reap_orphans()

    def _runner_dies(self) -> None:
        self.sick = True
        if self.dice.chance(0.7):
            self.world.ollama.kill_runner()
        else:
            self.world.ollama.freeze_runner(self.world.vlm.name)

    def _part_goes(self) -> None:
        self._stop(self.dice.pick(tuple(PARTS)))

    def _part_comes(self) -> None:
        if self.out:
            self._start(self.dice.pick(sorted(self.out)))

    def _stop(self, part: str) -> None:
        if part in self.out:
            return
        self._tell(f"    {part} goes")
        self.out.add(part)
        if part == "ollama":
            self.world.ollama.stop(kill=self.dice.chance(0.5))
        for fault in PARTS[part]:
            self.world.faults.arm(*fault, times=None)

    def _start(self, part: str) -> None:
        self._tell(f"    {part} comes")
        self.out.discard(part)
        if part == "ollama":
            self.world.ollama.start(starting_s=self.dice.pick((0.0, 3.0)))
        for op, _ in PARTS[part]:
            self.world.faults.disarm(op)

    # --- chaos ---

    def _chaos(self) -> None:
        self.phase = "chaos"
        for _ in range(self.operations):
            if self.happenings and self.dice.chance(0.3):
                name = self.dice.pick(self.happenings)
                self._tell(name)
                _HAPPENINGS[name](self)
            name = self.dice.pick(_OPERATIONS)
            self._tell(name)
            self._drive(getattr(self, f"_op_{name}"))
            self._settle()
        if self.doom and not self.doomed:
            self.doomed = True
            if self.dice.chance(0.5):
                self._tell("the card is lost")
                self.world.lose_gpu()
            else:
                self._tell("CUDA breaks")
                self.world.faults.arm("clip.encode", "gpu_lost")
                self._drive(self._encode)
            self._drive(self._op_time_passes)
        if self.dice.chance(0.7):
            self._tell("last wish")
            self._drive(self._op_request)

    def _settle(self) -> None:
        """Serve what was asked meanwhile; then nothing but a wait for leases may be left."""
        self._drive(lambda: self.manager.drive_for(0.0))
        self.judge.check()
        status = self.manager.get_status()
        assert not status.queued or self.manager._driver.engine.waiting, f"S7: the queue is wedged: {self.manager!r}"

    def _drive(self, act: Callable[[], object]) -> None:
        """Do something that drives the manager; its process may be killed meanwhile."""
        self.driving = True
        try:
            act()
        except _Killed:
            self._die()
        finally:
            self.driving = False

    def _submit(self, mode: ExecutionMode, preempt: bool) -> Future[Any]:
        return self.manager.submit_execution_mode(mode, preempt=preempt)

    def _await(self, future: Future[Any], timeout_s: float = WAIT_S) -> Any:
        return self._ours(lambda: self.manager._driver.wait(future, timeout_s), patient=timeout_s < WAIT_S)

    def _ours(self, call: Callable[[], T], *, patient: bool = False) -> T | None:
        """What came of a call; only errors that an embedder is told to expect may come out of it."""
        try:
            result = call()
        except errors.OperationTimeout as error:
            assert patient, f"no answer within {WAIT_S:g} s: {error}"
            self._tell("    timed out")
            return None
        except errors.InternalError as error:
            raise AssertionError(f"a defect: {error!r}") from error
        except errors.GPUFSMError as error:
            self._tell(f"    {error.code}")
            return None
        self._tell("    done")
        return result

    def _as_somebody(self, call: Callable[[], T]) -> T:
        """As the holder of a lease, or as a stranger."""
        if self.actors and self.dice.chance(0.3):
            return self.dice.pick(self.actors).context.run(call)
        return contextvars.Context().run(call)

    def _op_request(self) -> None:
        mode, preempt = self.dice.pick(MODES), self.dice.chance(0.2)
        timeout_s = self.dice.pick((WAIT_S, WAIT_S, WAIT_S, 0.5, 5.0))
        self._tell(f"    {mode.name}{' at once' if preempt else ''}")
        self._await(self._as_somebody(lambda: self._submit(mode, preempt)), timeout_s)

    def _op_burst(self) -> None:
        asked = [(self.dice.pick(MODES), self.dice.chance(0.2)) for _ in range(2 + self.dice.below(3))]
        futures = [self._as_somebody(partial(self._submit, mode, preempt)) for mode, preempt in asked]
        if self.dice.chance(0.3):
            self.dice.pick(futures).cancel()
        for future in futures:
            if not future.cancelled():
                self._await(future)

    def _op_load(self) -> None:
        timeout_s = self.dice.pick((WAIT_S, WAIT_S, 2.0))
        ensure = lambda: self.manager.ensure_vlm_loaded(timeout_s=timeout_s)  # noqa: E731
        self._ours(lambda: self._as_somebody(ensure), patient=timeout_s < WAIT_S)

    def _op_unload(self) -> None:
        self._ours(lambda: self._as_somebody(lambda: self.manager.ensure_vlm_unloaded(timeout_s=WAIT_S)))

    def _op_move_clip(self) -> None:
        move = self.dice.pick((self.manager.migrate_clip_to_gpu, self.manager.migrate_clip_to_cpu))
        self._ours(lambda: self._as_somebody(lambda: move(timeout_s=WAIT_S)))

    def _op_lease(self) -> None:
        if len(self.actors) >= 3:
            self._someone_leaves()
            return
        model = self.dice.pick(("vlm", "clip"))
        take = self.manager.vlm if model == "vlm" else self.manager.clip
        self.names += 1
        actor = _Actor(model, contextvars.Context(), contextlib.ExitStack(), None)
        lease = take(holder=f"user {self.names}", timeout_s=self.dice.pick((WAIT_S, 3.0)))
        actor.handle = self._ours(lambda: actor.context.run(actor.stack.enter_context, lease), patient=True)
        if actor.handle is None:
            return
        self.actors.append(actor)
        if self.dice.chance(0.5):
            self.world.clock.after(self.dice.pick((0.5, 3.0, 30.0)), lambda: self._leave(actor))

    def _leave(self, actor: _Actor) -> None:
        if actor in self.actors:
            self.actors.remove(actor)
            actor.leave()

    def _op_use(self) -> None:
        if not self.actors:
            self._encode()
            return
        actor = self.dice.pick(self.actors)
        if actor.model == "clip":
            self._ours(lambda: actor.context.run(actor.handle.encode, ["a", "b"]))
        else:
            self._ours(lambda: actor.context.run(actor.handle.generate, "what is this?"))

    def _encode(self) -> None:
        def encode() -> None:
            with self.manager.clip(holder="passer-by", timeout_s=WAIT_S) as clip:
                clip.encode(["a"])

        self._ours(lambda: contextvars.Context().run(encode))

    def _op_ask(self) -> None:
        """Use the VLM in passing."""

        def ask() -> None:
            with self.manager.vlm(holder="passer-by", timeout_s=WAIT_S) as vlm:
                match way:
                    case 0:
                        vlm.generate("what is this?")
                    case 1:
                        vlm.chat([{"role": "user", "content": "what is this?", "images": [PNG]}])
                    case _:
                        with contextlib.closing(vlm.stream("what is this?", images=[PNG])) as parts:
                            for _ in range(way - 1):
                                next(parts, None)

        way = self.dice.below(5)
        self._ours(lambda: contextvars.Context().run(ask))

    def _op_leave(self) -> None:
        self._someone_leaves()

    def _op_time_passes(self) -> None:
        self.manager.drive_for(self.dice.pick(self.pauses_s))

    def _op_restart(self) -> None:
        """The agent ends as it should and is started again."""
        if self.dice.chance(0.5):
            return  # restarts are dear, and few do
        leftovers = self.manager.close()
        self.judge.check()
        assert self.world.clip.place != "gpu" or leftovers, "closed with CLIP on the GPU, and nobody was told"
        for actor in tuple(self.actors):
            self._leave(actor)
        self._end_manager()
        self._new_process()

    # --- heal, and converge ---

    def _heal(self) -> None:
        """Mend everything, part by part in any order, with time in between."""
        self.phase = "heal"
        for actor in tuple(self.actors):
            self._leave(actor)
        self.kill_soon = False
        for part in self.dice.shuffled(PARTS):
            self._tell(f"  heal {part}")
            if part in self.out:
                self._start(part)
            if self.dice.chance(0.5):
                self.manager.drive_for(self.dice.pick((0.1, 2.0, 20.0)))
        world = self.world
        world.faults.heal()
        if self.sick or any(kind == "runner_dies" for _, kind in world.faults.fired):
            self.sick = False
            world.ollama.stop()  # else it lists the dead until somebody asks for them
        world.ollama.start()
        world.ollama.reap_orphans()
        world.card.give_back("game")
        if any(kind == "late" for _, kind in world.faults.fired):
            self.manager.drive_for(LATE_S[-1])
        # The other clients, and the killed, go with all they have; an unload that meets a load is lost.
        for name in ("other", world.vlm.name):
            if self.killed or any(entry.client == "foreign" for entry in world.ollama.log):
                self.manager.drive_for(2 * world.vlm.load_s + 5.0)
                world.ollama.foreign_unload(name)

    def _converge(self) -> float | None:
        """The asked mode comes by itself within the bound."""
        self.phase = "converge"
        status, config = self.manager.get_status(), self.manager.config
        began = self.world.clock.monotonic()
        bound_s = config.recover_cap_s + self.world.vlm.load_s + CONVERGE_MARGIN_S
        self._tell(f"  asked {status.asked_mode.name}, in {status.state.name}")
        reason = status.reason
        self.manager.drive_for(bound_s)
        if reason is not None and reason.code == errors.ExternalClient.code:
            # The fights of the last window were lost; none is fought before it has passed.
            self.manager.drive_for(config.reassert_window_s)
        self.judge.check()
        status = self.manager.get_status()
        if self._out_of_reach(status.asked_mode):
            return None
        assert status.state in STANDING, f"L2: still {status.state.name} after {bound_s:g} s: {status.reason}"
        assert status.execution_mode is status.asked_mode, f"L2: not the asked {status.asked_mode.name}"
        self._as_promised(status.execution_mode, status.hold)
        return max(0.0, status.since_at - began)

    def _out_of_reach(self, mode: ExecutionMode) -> bool:
        """A lost card comes back with a new process, not before; a poisoned CUDA keeps only CLIP from it."""
        if mode is ExecutionMode.AUTOPILOT:
            return self.doomed
        return mode is ExecutionMode.RECORDING and self.world.card.lost

    def _as_promised(self, mode: ExecutionMode, hold: Hold | None) -> None:
        """By the world: what the mode and its hold say is so."""
        world, clip = self.world, self.world.clip
        if mode is ExecutionMode.RECORDING:
            assert clip.place != "gpu", "RECORDING, and CLIP is on the GPU"
            assert world.vlm_resident() is (hold is not Hold.PARKED), f"RECORDING, {hold}: {world!r}"
        if mode is ExecutionMode.AUTOPILOT and hold is None:
            best = "none" if clip.place == "none" else "gpu" if self.gpu else "cpu"
            assert clip.place == best, f"AUTOPILOT, and CLIP is on the {clip.place}"
            assert not world.vlm_resident(), "AUTOPILOT, and the VLM is in"

    # --- the epilogue: everything works ---

    def _epilogue(self) -> None:
        self.phase = "epilogue"
        if self.doomed:
            self._tell("  the card is back, and the agent is started again")
            self.world.card.lost = False
            self.manager.close()
            self._end_manager()
            self._new_process()
        manager, world = self.manager, self.world
        self._mode(ExecutionMode.RECORDING)
        with manager.vlm(holder="the end", timeout_s=WAIT_S) as vlm:
            assert vlm.generate("what is this?").done, "no answer"
        if world.clip.place != "none":
            self._mode(ExecutionMode.AUTOPILOT)
            with manager.clip(holder="the end", timeout_s=WAIT_S) as clip:
                assert clip.encode(["a", "b"]).shape == (2, world.clip.dimensions), "no vectors"
        told: list[object] = []
        manager.subscribe(told.append, IdleUnload)
        manager.ensure_vlm_loaded(timeout_s=WAIT_S)
        assert world.vlm_resident(), "told loaded, and it is not"
        manager.drive_for(manager.config.idle_timeout_s + manager.config.check_interval_s + 10.0)
        assert not world.vlm_resident(), "the VLM is idle and still in"
        assert told, "an idle unload that nobody was told of"
        self._mode(ExecutionMode.IDLE)
        manager.ensure_vlm_loaded(timeout_s=WAIT_S)
        manager.ensure_vlm_unloaded(timeout_s=WAIT_S)
        assert not world.vlm_held_mib(), "told gone, and it holds memory"
        manager.ensure_vlm_loaded(timeout_s=WAIT_S)
        self.judge.check()
        assert manager.close() == (), "something had to be left behind"
        self.judge.check()
        world.clock.advance(10.0)
        self._is_empty()

    def _mode(self, mode: ExecutionMode) -> None:
        outcome = self.manager.set_execution_mode(mode, timeout_s=WAIT_S)
        assert outcome.granted, f"{mode.name} refused: {outcome.reason}"
        self._as_promised(mode, None)
        self.judge.check()

    def _is_empty(self) -> None:
        """Nothing of anybody's is on the card but what a living process cannot give back."""
        world = self.world
        assert world.ollama.loaded() == (), f"{world.ollama.loaded()} stayed"
        assert world.clip.place != "gpu", "CLIP stayed"
        left = set(world.card.owners()) - {DRIVER, CONTEXT_OWNER}
        assert not left, f"{sorted(left)} stayed on the card"
        assert not self.manager.get_status().leases, "a lease stayed"


_OPERATIONS = (
    *(("request",) * 5),
    "burst",
    "load",
    "load",
    "unload",
    "move_clip",
    *(("lease",) * 3),
    "use",
    "ask",
    "ask",
    "leave",
    *(("time_passes",) * 3),
    "restart",
)
"""What is done in the chaos; as often as it stands here."""

_BETWEEN: dict[str, Callable[[Scenario], None]] = {
    "a request": Scenario._post,
    "a lease ends": Scenario._someone_leaves,
    "the process is about to die": Scenario._kill,
    "a neighbour takes": Scenario._neighbour_takes,
    "a neighbour gives": Scenario._neighbour_gives,
    "another client loads its model": Scenario._other_loads,
    "another client loads ours": Scenario._other_uses_ours,
    "another client unloads ours": Scenario._other_unloads_ours,
    "another client asks ours": Scenario._other_asks_ours,
    "a runner dies": Scenario._runner_dies,
    "Ollama restarts": Scenario._ollama_restarts,
    "a part goes": Scenario._part_goes,
    "a part comes": Scenario._part_comes,
}
"""What may happen between any two I/O calls."""

_HAPPENINGS = {name: act for name, act in _BETWEEN.items() if name not in ("a request", "a lease ends")}
"""The same between two requests."""


def _line(record: JournalRecord) -> str:
    verdicts = " ".join(f"{'' if verdict else '!'}{name}" for name, verdict in sorted(record.verdicts.items()))
    plan = f"clip={record.plan.clip} vlm={record.plan.vlm}"
    moved = f"{record.source.value}->{record.dest.value}"
    return f"{record.n} {record.at!r} {record.trigger} {moved} {record.row} [{verdicts}] {plan} {record.tickets}"


# --- many lives ---


@define
class Summary:
    """What many lives have shown."""

    scenarios: int = 0
    violations: list[str] = field(factory=list)
    operations: int = 0
    calls: int = 0
    records: int = 0
    virtual_s: float = 0.0
    slowest_convergence_s: float = 0.0
    faults: Counter[tuple[str, str]] = field(factory=Counter)
    rows: Counter[str] = field(factory=Counter)
    calm: int = 0
    """Lives without a single fault."""

    def add(self, report: Report) -> None:
        """Count one more."""
        self.scenarios += 1
        if report.violation:
            self.violations.append(named(report))
        self.operations += report.operations
        self.calls += report.calls
        self.records += report.records
        self.virtual_s += report.virtual_s
        self.slowest_convergence_s = max(self.slowest_convergence_s, report.converged_s or 0.0)
        self.faults.update(report.faults)
        self.rows.update(report.rows)
        self.calm += not report.faults

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "scenarios": self.scenarios,
            "violations": self.violations,
            "operations": self.operations,
            "io_calls": self.calls,
            "records": self.records,
            "virtual_s": round(self.virtual_s, 3),
            "slowest_convergence_s": round(self.slowest_convergence_s, 3),
            "calm": self.calm,
            "faults_fired": sum(self.faults.values()),
            "faults_covered": len(set(self.faults) & set(FAULT_POINTS)),
            "faults_total": len(FAULT_POINTS),
            "rows_covered": len(self.rows),
            "rows_total": len(TABLE),
        }

    def __str__(self) -> str:
        said = self.to_dict()
        return (
            f"scenarios: {said['scenarios']} lived, {len(self.violations)} violations; {said['io_calls']} I/O calls, "
            f"{said['faults_fired']} faults ({said['faults_covered']} of {said['faults_total']} kinds), "
            f"{said['rows_covered']} of {said['rows_total']} rows, {said['virtual_s'] / 3600:.1f} virtual hours, "
            f"back within {said['slowest_convergence_s']:.1f} s"
        )


def named(report: Report) -> str:
    """A violation with all that is needed to see it again."""
    return (
        f"seed {report.seed}, gpu_fsm {sys.modules['gpu_fsm'].__version__}, commit {commit() or 'unknown'}: "
        f"{report.violation}\n  python -m gpu_fsm.testing.scenario --seeds {report.seed} --story"
    )


def commit() -> str | None:
    """The commit that this package is checked out at, or was installed from; None where nobody knows.

    `-dirty` says that it has been changed since.  A repository round the folder that it is installed in is another's.
    """
    root = Path(__file__).resolve().parent.parent.parent
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--match="]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10.0)
            return done.stdout.strip() or None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        origin = json.loads(importlib.metadata.distribution("gpu-fsm").read_text("direct_url.json") or "{}")
        if found := origin.get("vcs_info", {}).get("commit_id"):
            return str(found)
    return None


def run(seed: int, *, operations: int = 10, pauses_s: Sequence[float] = PAUSES_S) -> Report:
    """Live one life and report it."""
    return Scenario(seed, operations=operations, pauses_s=pauses_s).run()


def check(seed: int, *, operations: int = 10) -> Report:
    """The same; raises `Violation` where a promise was broken."""
    report = run(seed, operations=operations)
    if report.violation:
        raise Violation(named(report))
    return report


def seeds_of(text: str) -> range:
    """`7` or `0-999`, both ends included.  Raises ValueError."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def say(*lines: str) -> None:
    """To standard output, at once."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Live all the lives asked for; 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m gpu_fsm.testing.scenario", description="Lives, each from a seed.")
    parser.add_argument("--seeds", type=seeds_of, default=range(100), metavar="A-B", help="which (default: 0-99)")
    parser.add_argument("--operations", type=int, default=10, metavar="N", help="about how much is done in each chaos")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--story", action="store_true", help="tell what happened in each")
    parser.add_argument("--digests", action="store_true", help="print the digest of each")
    options = parser.parse_args(arguments)
    summary, began = Summary(), time.monotonic()
    for seed in options.seeds:
        report = run(seed, operations=options.operations)
        summary.add(report)
        if options.story:
            say(f"--- seed {seed}", *report.story)
        if options.digests:
            say(f"{seed} {report.digest}")
        if report.violation and not options.json:
            say(named(report))
    if options.json:
        say(json.dumps(summary.to_dict() | {"wall_s": round(time.monotonic() - began, 3)}, indent=2))
    elif not options.digests:
        say(str(summary))
    return 1 if summary.violations else 0


if __name__ == "__main__":
    sys.exit(main())
