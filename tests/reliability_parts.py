"""What the long proof tells of one seed, part by part; `reliability.py` runs them and adds up."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import hashlib
import io
import os
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import attrs
import hypothesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from PIL import Image

from gpu_fsm.agent import ExecutionLoop, FusionEngine, Limits, Screen, UIDetector
from gpu_fsm.control import ControlClient, ControlServer
from gpu_fsm.simulation import KINDS, SimulatedWorld
from gpu_fsm.states import STANDING
from gpu_fsm.status import ExecutionMode
from gpu_fsm.testing import fuzz as fuzzing
from gpu_fsm.testing import scenario, walk
from gpu_fsm.testing.fuzz import quietly
from gpu_fsm.testing.reference import Call
from gpu_fsm.testing.scenario import Dice
from tests import test_linearizability as linearizability
from tests import test_ollama_hostile as hostility
from tests.operations import io_calls
from tests.reliability import BATCH_S, EXPLORED_S, Told, say
from tests.test_faults import Point, play
from tests.test_linearizability import MODES, Wish
from tests.worlds import threaded

DAY_S = 86_400.0


@contextlib.contextmanager
def _quickly() -> Iterator[None]:
    """The same, and a world's garbage is collected when all of it is garbage."""
    gc.disable()
    try:
        with quietly():
            yield
    finally:
        gc.enable()


def _broken(error: BaseException) -> str:
    notes = "\n".join(getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {error}" + (f"\n{notes}" if notes else "")


# --- lives ---

PAUSES_S = (*scenario.PAUSES_S, 300.0, 1300.0)
"""Also long enough for idle time-outs, renewals and whatever grows with time; a life takes ten minutes and more."""


def lives(seed: int, _left_s: float) -> Told:
    """One scenario."""
    with _quickly():
        life = scenario.run(seed, pauses_s=PAUSES_S)
    counts = {"scenarios": 1, "simulated days": life.virtual_s / DAY_S, "faults": sum(life.faults.values())}
    story = "\n".join((life.violation, *life.story)) if life.violation else ""
    return Told(counts=counts, violation=story)


# --- rules ---

EXAMPLES = 25


def rules(seed: int, _left_s: float) -> Told:
    """One run of the fuzzer; a story that breaks something is made shorter."""
    with _quickly():
        report = fuzzing.fuzz(examples=EXAMPLES, seed=seed)
    counts = {"rules": report.steps, "stories": report.examples}
    return Told(counts=counts, violation=f"{report.violation}\n{report.program}" if report.violation else "")


# --- the hostile server ---

CASES = 250


def hostile(seed: int, _left_s: float) -> Told:
    """So many answers to any call of the client."""
    test: Any = hostility.test_no_server_makes_the_client_late_or_greedy_or_raise_what_is_not_ours
    cases = 0

    def case(script: Any, name: str) -> None:
        nonlocal cases
        cases += 1
        test.hypothesis.inner_test(script, name)

    told = given(hostility.scripts(), st.sampled_from(hostility.NAMES))(case)
    run = hypothesis.seed(seed)(hypothesis.settings(_only_generating(), max_examples=CASES)(told))
    violation = ""
    with _quickly():
        try:
            run()
        except Exception as error:
            violation = _broken(error)
    return Told(counts={"cases": cases}, violation=violation)


def _only_generating() -> hypothesis.settings:
    return hypothesis.settings(
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


# --- histories ---

CLIENTS, CALLS = 5, 6


def histories(seed: int, _left_s: float) -> Told:
    """What so many clients saw, in threads or in tasks; the seed decides what they ask, not how they meet."""
    dice = Dice(seed)
    scripts = tuple(tuple(_wish(dice) for _ in range(CALLS)) for _ in range(CLIENTS))
    how: Literal["by_threads", "by_tasks"] = "by_tasks" if seed % 2 else "by_threads"
    with quietly():
        try:
            history = linearizability.run(scripts, how, dice.pick((1e-5, 5e-4, 5e-3)))
        except Exception as error:
            return Told(counts={"histories": 1}, violation=_broken(error))
    return Told(counts={"judged only for safety": 1} if history.degraded else {"histories": 1})


def _wish(dice: Dice) -> Wish:
    """Like the strategy of the tests: half of the calls ask the machine, half are leases and looks."""
    if dice.chance(0.5):
        calls = (
            Call(verb="set_mode", what=dice.pick(MODES), preempt=dice.chance(0.5)),
            Call(verb=dice.pick(("load", "unload"))),
            Call(verb="migrate", what=dice.pick(("cpu", "gpu"))),
        )
        return Wish(dice.pick(calls), dice.chance(0.25))
    leases = Call(verb=dice.pick(("take", "give_back")), what=dice.pick(("vlm", "clip")))
    return Wish(dice.pick((leases, Call(verb="status"))))


# --- pairs of faults ---

MAIN = ("record-after-autopilot", "automate-after-recording", "load-in-autopilot", "unload", "close-recording")
"""The five main operations, each from where it has most to do."""


@functools.cache
def _firsts() -> tuple[tuple[str, Point, tuple[Point, ...]], ...]:
    """Operation, first fault, and every second one: at each later call of the operation or of its recovery."""
    found = []
    with _quickly():
        for name in MAIN:
            for first in _points(io_calls(name), 0):
                calls = play(name, first, judged=False)
                found.append((name, first, tuple(_points(calls, first[0] + 1))))
    return tuple(found)


def _points(calls: list[str], start: int) -> Iterator[Point]:
    for nth in range(start, len(calls)):
        for kind in sorted(KINDS[calls[nth]]):
            yield nth, calls[nth], kind


def pairs_plan() -> Mapping[str, Any]:
    """How long the list is, and its digest: another code may make other calls."""
    listed = _firsts()
    digest = hashlib.sha256(repr(listed).encode()).hexdigest()[:16]
    return {"list": digest, "of": len(listed), "pairs": sum(len(seconds) for _, _, seconds in listed)}


def pairs(seed: int, _left_s: float) -> Told:
    """One first fault with every second one."""
    name, first, seconds = _firsts()[seed]
    wrong = []
    with _quickly():
        for second in seconds:
            try:
                play(name, first, second)
            except Exception as error:
                wrong.append(f"{name}, call {first[0]} {first[1]} {first[2]}, then call {second}: {_broken(error)}")
    said = f"{len(wrong)} of {len(seconds)}\n" + "\n".join(wrong) if wrong else ""
    return Told(counts={"pairs": len(seconds)}, violation=said)


# --- the explorer ---


def explorer(seed: int, _left_s: float) -> Told:
    """One world, walked until nothing is left or the bound is reached; the small ones first."""
    profile = walk.PROFILES[::-1][seed]
    told_at = time.monotonic()

    def progress(configurations: int, edges: int, waiting: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at > BATCH_S:
            told_at = time.monotonic()
            say(f"explorer: {profile.name}, {configurations} configurations, {waiting} of them wait, {edges} edges")

    with quietly():
        walked = walk.explore_manager(
            walk.Bounds(queue=2, faults=2), profiles=[profile], seconds=EXPLORED_S, progress=progress
        )
    facts = {
        "world": profile.name,
        "closed": walked.closed,
        "configurations": len(walked.configurations),
        "edges": walked.edges,
        "searched": walked.searched,
        "bound": f"{EXPLORED_S / 60:.0f} minutes",
    }
    return Told(counts={"worlds": 1}, violation="\n".join(map(str, walked.violations)), facts=facts)


# --- the agent's month ---

DAYS, SWITCHES = 30, 10_000

WORKERS = 4
"""Threads of the event loop's pool."""

ASKED_EVERY, ASKED_AT = 40, 20
"""The control client comes at these switches, and is gone when the usage is measured."""

MOST_GROWTH_BYTES = 1 << 20

WARM = 0.1
"""After this share of the life everything that fills up is full: journal, caches, pools of threads."""


def agent(seed: int, _left_s: float) -> Told:
    """One life of an agent and its manager, in one process."""
    violation, life = "", AgentLife(seed, days=DAYS, switches=SWITCHES)
    tracemalloc.start()
    try:
        with quietly(), tempfile.TemporaryDirectory(prefix="gpu_fsm-agent-") as folder:
            asyncio.run(life.run(Path(folder)))
    except Exception as error:
        violation = f"at {life.world.clock.monotonic() / DAY_S:.3f} days, switch {life.done}: {_broken(error)}"
    finally:
        tracemalloc.stop()
    counts = {"simulated days": life.world.clock.monotonic() / DAY_S, "switches": life.done, "screens": life.screens}
    return Told(counts=counts, violation=violation, facts=life.facts())


@attrs.frozen(kw_only=True)
class Usage:
    """What a process has, when it rests."""

    tasks: int
    threads: int
    descriptors: int
    traced_bytes: int
    rss_bytes: int

    @classmethod
    def now(cls) -> Usage:
        """After the garbage has gone; to be asked in the event loop."""
        gc.collect()
        return cls(
            tasks=len(asyncio.all_tasks()),
            threads=threading.active_count(),
            descriptors=len(list(Path("/proc/self/fd").iterdir())),
            traced_bytes=tracemalloc.get_traced_memory()[0],
            rss_bytes=int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        )


class AgentLife:
    """Switches of the mode, screens, pauses, a control client now and then, and a trouble a day."""

    def __init__(self, seed: int, *, days: float, switches: int) -> None:
        self.dice = Dice(seed)
        self.switches = switches
        self.life_s = days * DAY_S
        self.done = self.screens = 0
        self.results: Counter[str] = Counter()
        self.usage: list[Usage] = []
        self.world = SimulatedWorld(card_mib=6400.0, seed=seed, responder=lambda *_: '{"label": "a", "summary": "b"}')
        self.album = [_screen(n) for n in range(40)]
        """Half of them are shown while recording, the others are new to the autopilot."""

    def facts(self) -> dict[str, Any]:
        """From the end of the warming up to the end of the life."""
        if len(self.usage) < 2:
            return {}
        warm, last = self.usage
        grown = {name: getattr(last, name) - getattr(warm, name) for name in ("tasks", "threads", "descriptors")}
        return {
            **{f"{name} grown by": more for name, more in grown.items()},
            "traced KiB grown by": round((last.traced_bytes - warm.traced_bytes) / 1024, 1),
            "resident KiB grown by": round((last.rss_bytes - warm.rss_bytes) / 1024, 1),
        }

    async def run(self, folder: Path) -> None:
        """The whole life."""
        workers = ThreadPoolExecutor(WORKERS)
        asyncio.get_running_loop().set_default_executor(workers)
        together = threading.Barrier(WORKERS)  # all of them are there from the beginning
        await asyncio.gather(*(asyncio.to_thread(together.wait) for _ in range(WORKERS)))
        self.manager = threaded(self.world, idle_timeout_s=120.0)
        with self.manager, ControlServer(self.manager, folder / "control") as control:
            detector = UIDetector(self.manager, cache_size=8)
            memory = FusionEngine(Limits(accept=0.999, unsure=0.99, margin=0.0))
            loop = ExecutionLoop(self.manager, detector, memory, memory_path=folder / "screens.npz")
            while self.done < self.switches:
                self.done += 1
                await self._switch(loop, control.path)
                if self.done == int(self.switches * WARM):
                    self.usage.append(self._rest())
            self.usage.append(self._rest())
        self._judge_growth()

    async def _switch(self, loop: ExecutionLoop, path: Path) -> None:
        """Another mode, some screens, and then nothing until the next."""
        ends_at = self.life_s * self.done / self.switches
        trouble = self._trouble() if self.dice.chance(30 / self.switches) else None
        mode = (ExecutionMode.RECORDING, ExecutionMode.AUTOPILOT, ExecutionMode.IDLE)[self.done % 5 % 3]
        await loop.aset_mode(mode)
        for _ in range(self.dice.below(3)):
            shown = self.album[: len(self.album) // (2 if mode is ExecutionMode.RECORDING else 1)]
            step = await loop.ahandle(self.dice.pick(shown))
            self.results[step.result] += 1
            self.screens += 1
        if trouble is None:
            self._as_promised(mode)
        if self.done % ASKED_EVERY == ASKED_AT:
            await asyncio.to_thread(self._ask_from_outside, path)
        if trouble is not None:
            self._pass(min(ends_at, self.world.clock.monotonic() + 30.0))
            trouble()
        self._pass(ends_at)
        if trouble is not None:
            self._pass(self.world.clock.monotonic() + CONVERGES_AFTER_S)
        self._as_promised(mode)
        self._forget()

    def _trouble(self) -> Callable[[], object]:
        """Something goes wrong; returns its end."""
        world = self.world
        match self.dice.below(4):
            case 0:
                world.ollama.stop(kill=True)
                return self._restart
            case 1:
                world.card.take("game", world.card.free_mib)
                return lambda: world.card.give_back("game")
            case 2:
                world.faults.arm("ollama.load", "oom", times=None)
            case _:
                world.faults.arm("clip.to_gpu", "before", times=None)
        return world.faults.heal

    def _restart(self) -> None:
        self.world.ollama.start()
        self.world.ollama.reap_orphans()

    def _ask_from_outside(self, path: Path) -> None:
        with ControlClient(path) as client:
            assert client.ask("status")["state"]

    def _as_promised(self, mode: ExecutionMode) -> None:
        """By the world: the asked mode stands, and what it says is so."""
        status, world = self.manager.get_status(), self.world
        assert status.state in STANDING, f"{status.state.name}: {status.reason}"
        assert status.execution_mode is mode, f"{status.execution_mode.name} and not {mode.name}"
        if mode is ExecutionMode.RECORDING:
            assert world.clip.place == "cpu", "RECORDING, and CLIP is on the GPU"
        if mode is ExecutionMode.AUTOPILOT and status.hold is None:
            assert (world.clip.place, world.vlm_resident()) == ("gpu", False), f"AUTOPILOT: {world!r}"
        assert not world.clip.violations
        assert (status.leases, status.queued) == ((), 0)

    def _pass(self, until_s: float) -> None:
        """Let virtual time pass, from one timer of the manager's to the next; each is waited for."""
        clock, driver, pause = self.world.clock, self.manager._driver, threading.Event()
        while True:
            for look in range(10_000_000):
                due = driver._due()
                if driver._driving is None and not driver._has_work():
                    break
                pause.wait(2e-5)
                if look % 1000 == 999:
                    clock.advance(0.1)  # it has set its alarm by the time of a moment ago
            if clock.monotonic() >= until_s:
                return
            clock.advance_to(until_s if due is None else min(due, until_s))

    def _rest(self) -> Usage:
        """Nothing is under way."""
        self._pass(self.world.clock.monotonic() + 1.0)
        self._forget()
        return Usage.now()

    def _forget(self) -> None:
        """The world's own diaries, which are no memory of the manager's."""
        self.world.ollama.log.clear()
        self.world.card.history.clear()

    def _judge_growth(self) -> None:
        grown = self.facts()
        assert not any(grown[f"{name} grown by"] for name in ("tasks", "threads", "descriptors")), grown
        assert grown["traced KiB grown by"] * 1024 < MOST_GROWTH_BYTES, grown


CONVERGES_AFTER_S = 60.0 + 4.0 + 5.0
"""The back-off's cap, one load, and a little."""


def _screen(n: int) -> Screen:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (n * 6 % 256, n * 97 % 256, n * 31 % 256)).save(buffer, "PNG")
    return Screen(name=f"screen-{n}", data=buffer.getvalue())
