"""Histories of concurrent clients, held against the reference: one order of single moments explains every answer."""

from __future__ import annotations

import asyncio
import contextlib
import doctest
import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Literal

import attrs
import pytest
from hypothesis import currently_in_test_context, event, given, settings
from hypothesis import strategies as st

from gpu_fsm import GPUResourceManager, GPUResourceStatus, State
from gpu_fsm.errors import GPUFSMError, InternalError, LeaseHeld, OperationTimeout, Superseded
from gpu_fsm.guards import Aim
from gpu_fsm.leases import Holders
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.states import STEPS
from gpu_fsm.testing.histories import NEVER, Explanation, Operation, Recorder, Stretch, explain, overlaps, without_cause
from gpu_fsm.testing.reference import GRANTED, Call, Register, effects
from gpu_fsm.tickets import Group, Outcome, Ticket
from tests.counts import say
from tests.waiting import PATIENCE_S, Gate, in_thread, journal_is_whole, until
from tests.worlds import threaded

POSSIBLE = (GRANTED, "lease_held")
"""What a call whose end nobody saw may have come to; the other refusals change nothing."""

NEVER_TOGETHER = (
    ("clip lease", "clip.to_"),
    ("vlm lease", "ollama.unload"),
    ("ollama.", "ollama."),
    ("clip.to_", "clip.to_"),
    ("ollama.", "clip.to_"),
)
"""Stretches that must not meet: a lease and the move of what it holds, and any two effects."""

MODES = ("idle", "recording", "autopilot")


@attrs.frozen
class Wish:
    """One line of a client's script."""

    call: Call
    hurried: bool = False
    """Ask with a time-out of zero: the waiting ends at once, and the request stands."""


Scripts = tuple[tuple[Wish, ...], ...]

MODE_REQUESTS = st.builds(Call, verb=st.just("set_mode"), what=st.sampled_from(MODES), preempt=st.booleans())
VLM_REQUESTS = st.builds(Call, verb=st.sampled_from(("load", "unload")))
CLIP_MOVES = st.builds(Call, verb=st.just("migrate"), what=st.sampled_from(("cpu", "gpu")))
LEASES = st.builds(Call, verb=st.sampled_from(("take", "give_back")), what=st.sampled_from(("vlm", "clip")))
LOOKS = st.just(Call(verb="status"))

WISHES = st.one_of(
    st.builds(Wish, st.one_of(MODE_REQUESTS, VLM_REQUESTS, CLIP_MOVES), st.sampled_from((False, False, False, True))),
    st.builds(Wish, st.one_of(LEASES, LOOKS)),
)


def scripts(clients: int, calls: int) -> st.SearchStrategy[Scripts]:
    """What up to `clients` clients do, each up to `calls` calls."""
    script = st.lists(WISHES, min_size=2, max_size=calls).map(tuple)
    return st.lists(script, min_size=2, max_size=clients).map(tuple)


class History:
    """A threaded manager in a world where everything fits, and what clients do with it."""

    def __init__(self) -> None:
        self.world = SimulatedWorld(card_mib=12288)
        self.recorder = Recorder()
        self._clients: list[ThreadPoolExecutor] = []
        self.world.on_io.append(self.recorder.watch)
        # Nothing happens by itself, and a drain outlasts every client that only waits for its turn.
        self.manager = threaded(self.world, idle_timeout_s=1e6, drain_timeout_s=10, journal_size=100_000)

    def by_threads(self, scripts: Scripts) -> None:
        """One thread a client; virtual time passes until all have ended."""
        start = threading.Barrier(len(scripts))
        clients = [in_thread(self._client, start, number, script) for number, script in enumerate(scripts)]
        self.let_time_pass(clients)
        self.manager.close()

    def by_tasks(self, scripts: Scripts) -> None:
        """One asyncio task a client, all in one loop."""

        async def together() -> None:
            async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
                for number, script in enumerate(scripts):
                    group.create_task(self._task(number, script))

        self.let_time_pass([in_thread(asyncio.run, together())])
        self.manager.close()

    def let_time_pass(self, clients: Sequence[Future[Any]]) -> None:
        """Only a wait for leases needs time; what is under way brings its own, and would time out by more."""
        quiet, driver = threading.Event(), self.manager._driver
        for client in clients:
            while not client.done():
                quiet.wait(0.002)
                if driver._driving is None:
                    self.world.clock.advance(0.05)
            client.result()

    def _client(self, start: threading.Barrier, number: int, script: Iterable[Wish]) -> None:
        start.wait(PATIENCE_S)
        leases: dict[str, contextlib.ExitStack] = {}
        for wish in _sensible(number, script):
            self._act(wish, leases)

    def _act(self, wish: Wish, leases: dict[str, contextlib.ExitStack]) -> None:
        with self._recorded(wish.call) as operation:
            operation.answer = self._do(wish, operation, leases)

    def client(self, number: int) -> Callable[[str], Future[None]]:
        """Somebody who does, in a thread of its own, what the test says and when it says so."""
        leases: dict[str, contextlib.ExitStack] = {}
        thread = ThreadPoolExecutor(1)  # one thread, since leases belong to a context
        self._clients.append(thread)
        return lambda words: thread.submit(self._act, _wish(number, words), leases)

    def end(self) -> None:
        """Everybody goes home."""
        for client in self._clients:
            client.shutdown()
        with contextlib.suppress(GPUFSMError):  # where something is broken on purpose
            self.manager.close(timeout_s=PATIENCE_S)

    def _do(self, wish: Wish, operation: Operation, leases: dict[str, contextlib.ExitStack]) -> str:
        manager, call, timeout_s = self.manager, wish.call, 0 if wish.hurried else None
        match call.verb:
            case "set_mode" if wish.hurried:
                return _granted(manager.set_execution_mode(call.what, preempt=call.preempt, timeout_s=0))
            case "set_mode":
                future = manager.submit_execution_mode(call.what, preempt=call.preempt)
                self.recorder.asked(operation)
                return _granted(future.result(PATIENCE_S))
            case "load":
                manager.ensure_vlm_loaded(timeout_s=timeout_s)
            case "unload":
                manager.ensure_vlm_unloaded(timeout_s=timeout_s)
            case "migrate":
                (manager.migrate_clip_to_gpu if call.what == "gpu" else manager.migrate_clip_to_cpu)(
                    timeout_s=timeout_s
                )
            case "take":
                with contextlib.ExitStack() as stack:
                    stack.enter_context(manager.vlm() if call.what == "vlm" else manager.clip())
                    leases[call.what] = stack.pop_all()
            case "give_back" if call.what in leases:
                self.recorder.stop(f"{call.what} lease", call.client)
                leases.pop(call.what).close()
            case "status":
                return seen(manager)
            case "close":
                manager.close()
        return GRANTED

    async def _task(self, number: int, script: Iterable[Wish]) -> None:
        leases: dict[str, contextlib.AsyncExitStack] = {}
        for wish in _sensible(number, script):
            with self._recorded(wish.call) as operation:
                operation.answer = await self._await(wish, leases)

    async def _await(self, wish: Wish, leases: dict[str, contextlib.AsyncExitStack]) -> str:
        aio, call, timeout_s = self.manager.aio, wish.call, 0 if wish.hurried else None
        match call.verb:
            case "set_mode":
                return _granted(await aio.set_execution_mode(call.what, preempt=call.preempt, timeout_s=timeout_s))
            case "load":
                await aio.ensure_vlm_loaded(timeout_s=timeout_s)
            case "unload":
                await aio.ensure_vlm_unloaded(timeout_s=timeout_s)
            case "migrate":
                move = aio.migrate_clip_to_gpu if call.what == "gpu" else aio.migrate_clip_to_cpu
                await move(timeout_s=timeout_s)
            case "take":
                async with contextlib.AsyncExitStack() as stack:
                    lease: Any = aio.vlm() if call.what == "vlm" else aio.clip()
                    await stack.enter_async_context(lease)
                    leases[call.what] = stack.pop_all()
            case "give_back" if call.what in leases:
                self.recorder.stop(f"{call.what} lease", call.client)
                await leases.pop(call.what).aclose()
            case "status":
                return seen(self.manager)
            case "close":
                await aio.close()
        return GRANTED

    @contextlib.contextmanager
    def _recorded(self, call: Call) -> Iterator[Operation]:
        """From right before a call to right after its answer; a time-out is no answer."""
        operation = self.recorder.begin(call)
        try:
            yield operation
        except OperationTimeout:
            self.recorder.asked(operation)
        except GPUFSMError as error:
            assert not isinstance(error, InternalError), error
            self._ended(operation, error.code)
        else:
            self._ended(operation, operation.answer)

    def _ended(self, operation: Operation, answer: str) -> None:
        call = operation.call
        self.recorder.end(operation, answer)
        if call.verb == "take" and answer == GRANTED:
            self.recorder.start(f"{call.what} lease", call.client)

    def is_safe(self) -> None:
        """What holds however late anybody is: no lease is moved under, no two effects meet, no refusal is made up."""
        journal_is_whole(self.manager)
        assert not overlaps(self.recorder.stretches, *NEVER_TOGETHER)
        assert not without_cause(self.recorder.operations)
        assert not self.world.clip.violations

    def judge(self) -> Explanation:
        """Every rule; returns the order that explains the history."""
        self.is_safe()
        explanation = explain(self.recorder.operations, Register(), effects, possible=POSSIBLE)
        assert explanation.linearizable, str(explanation)
        return explanation

    @property
    def degraded(self) -> bool:
        """A lease won a race half-way, and its holder had to wait for the processor while virtual time ran out."""
        return any(record.dest is State.SHEDDING for record in self.manager.journal)


def seen(manager: GPUResourceManager) -> str:
    """What a client can see at one moment, in the words of the reference."""
    status = manager.get_status()
    return f"{status.execution_mode.value} {status.hold.value if status.hold else ''}".strip()


def _granted(outcome: Outcome) -> str:
    return GRANTED if outcome.granted else "degraded"


def _sensible(number: int, script: Iterable[Wish]) -> Iterator[Wish]:
    """A client's script without giving back what it does not hold and taking what it has; it ends holding nothing.

    A `take` that is refused makes the next `give_back` one of nothing, which is harmless.
    """
    held: set[str] = set()
    for wish in script:
        verb, what = wish.call.verb, wish.call.what
        if (verb == "take" and what in held) or (verb == "give_back" and what not in held):
            continue
        held = held | {what} if verb == "take" else held - {what} if verb == "give_back" else held
        yield attrs.evolve(wish, call=attrs.evolve(wish.call, client=number))
    for model in sorted(held):
        yield Wish(Call(verb="give_back", what=model, client=number))


def run(scripts: Scripts, how: Literal["by_threads", "by_tasks"], switch_interval_s: float = 5e-3) -> History:
    """One history, recorded and judged."""
    history = History()
    before = sys.getswitchinterval()
    sys.setswitchinterval(switch_interval_s)
    try:
        getattr(history, how)(scripts)
    finally:
        sys.setswitchinterval(before)
    if currently_in_test_context():
        event("degraded for want of processor time" if history.degraded else "judged")
    TOLD["degraded" if history.degraded else "judged"] += 1
    if history.degraded:
        history.is_safe()
    else:
        history.judge()
    return history


TOLD: Counter[str] = Counter()
"""How many histories had an order to be found, and how many had none to be asked for."""

SHARE = settings.default.max_examples / 100 if settings.default else 1.0
"""Of the examples below: the profile decides."""
CLIENTS, CALLS = (5, 6) if SHARE > 1 else (3, 4)

SWITCH_INTERVALS_S = st.sampled_from((1e-5, 5e-4, 5e-3))


@given(scripts(CLIENTS, CALLS), SWITCH_INTERVALS_S)
@settings(max_examples=int(200 * SHARE))
def test_what_concurrent_threads_see_has_an_order_of_single_moments(scripts: Scripts, switch_interval_s: float) -> None:
    """A few threads, a few calls each: every answer fits one order of moments, and no lease is moved under."""
    run(scripts, "by_threads", switch_interval_s)


@given(scripts(CLIENTS, CALLS), SWITCH_INTERVALS_S)
@settings(max_examples=int(100 * SHARE))
def test_what_concurrent_tasks_see_has_an_order_of_single_moments(scripts: Scripts, switch_interval_s: float) -> None:
    """The same for tasks of one event loop."""
    run(scripts, "by_tasks", switch_interval_s)


@given(scripts(CLIENTS - 1, CALLS), st.integers(0, 3), SWITCH_INTERVALS_S)
@settings(max_examples=int(60 * SHARE))
def test_closing_in_the_middle_is_one_moment_too(scripts: Scripts, looks: int, switch_interval_s: float) -> None:
    """One more client looks a few times and closes: whoever asks is served before, or hears that it is closed."""
    closing = (*[Wish(Call(verb="status"))] * looks, Wish(Call(verb="close")))
    run((*scripts, closing), "by_threads", switch_interval_s)


def test_hardly_any_history_goes_unjudged(request: pytest.FixtureRequest) -> None:
    """A manager that always degrades would never be asked for an order."""
    if not TOLD:  # alone
        for calls in ("recording", "autopilot"):
            run(((Wish(Call(verb="set_mode", what=calls)), Wish(Call(verb="status"))),) * 2, "by_threads")
    say(request.config, f"histories: {TOLD['judged']} judged, {TOLD['degraded']} only for safety")
    assert TOLD["degraded"] <= 0.1 * sum(TOLD.values()), TOLD


# --- the checker itself: what is broken is rejected, and what is not is not ---


def _wish(number: int, words: str) -> Wish:
    """A call in words: `idle`, `preempting idle`, `take vlm`, `status`."""
    preempt, verb, what = "preempting" in words, *f"{words} ".removeprefix("preempting ").split(" ")[:2]
    if verb in MODES:
        return Wish(Call(verb="set_mode", what=verb, client=number, preempt=preempt))
    return Wish(Call(verb=verb, what=what, client=number))  # type: ignore[arg-type]


def lost_update(history: History) -> None:
    """A wish for the VLM that is there already is answered and forgotten."""
    engine = history.manager._driver.engine
    engine.act_acknowledge = lambda s: engine._resolve_granted()  # type: ignore[method-assign]


def stale_read(history: History) -> None:
    """The status tells of what is under way, and not of what has come of it."""
    driver = history.manager._driver
    real = driver.publish

    def publish(status: GPUResourceStatus) -> None:
        if status.state in STEPS:
            real(status)

    driver.publish = publish  # type: ignore[method-assign]


def served_after_superseded(history: History) -> None:
    """A preempting request jumps the queue, and what it should have thrown out comes after it."""
    mailbox = history.manager._driver.mailbox

    def post(ticket: Ticket) -> Group:
        with mailbox._lock:
            mailbox._last += 1
            ticket.seq = mailbox._last
            mailbox._closed = ticket.kind == "close"
            (mailbox._queue.appendleft if ticket.preempt else mailbox._queue.append)(ticket)
            return ()

    mailbox.post = post  # type: ignore[method-assign]


def lease_through_a_drain(history: History) -> None:
    """Nobody counts the leases."""
    history.manager._driver.leases._holders = Holders  # type: ignore[method-assign]


def refused_and_done(history: History) -> None:
    """A request is told that it was superseded, and carried out all the same."""
    engine = history.manager._driver.engine

    def resolve() -> None:
        for ticket in engine._serving:
            ticket.refuse(Superseded(detail="so it says"))
        engine._serving = ()

    engine._resolve_granted = resolve  # type: ignore[method-assign]


def answered_too_early(history: History) -> None:
    """A request is granted when it is posted, and carried out at some later time."""
    driver = history.manager._driver
    real = driver.post

    def post(*args: Any, **options: Any) -> Ticket:
        ticket = real(*args, **options)
        if ticket.kind == "request":
            ticket.grant(Outcome(asked=ticket.asked, state=State.IDLE))
        return ticket

    driver.post = post  # type: ignore[method-assign]


def hold_outlives_its_mode(history: History) -> None:
    """A request for a mode forgets to clear the hold."""
    engine = history.manager._driver.engine
    real = engine._stand

    def stand(aim: Aim) -> None:
        real(attrs.evolve(aim, hold=aim.hold or engine._standing.hold))

    engine._stand = stand  # type: ignore[method-assign]


# What shows it.  Each scenario is harmless where nothing is broken.


def one_after_the_other(*calls: str) -> Callable[[History], None]:
    """One client, call after call."""

    def scenario(history: History) -> None:
        act = history.client(0)
        for call in calls:
            act(call).result(PATIENCE_S)

    scenario.__name__ = "_".join(calls).replace(" ", "_")
    return scenario


def a_queue_behind_a_load(history: History) -> None:
    """While a load runs one client asks for a mode, and then another preempts."""
    gate = Gate(history.world, "ollama.load")
    first, second, third = (history.client(number) for number in range(3))
    driver = history.manager._driver
    load = first("recording")
    gate.wait()
    queued = second("autopilot")
    until(lambda: [o.asked < NEVER for o in history.recorder.operations] == [True, True])
    preempting = third("preempting idle")
    until(lambda: driver.mailbox._last == 3)
    gate.open()
    for done in (load, queued, preempting):
        done.result(PATIENCE_S)
    third("status").result(PATIENCE_S)


def a_look_in_the_middle_of_a_load(history: History) -> None:
    """Somebody looks while a load runs, after its client has its answer or a moment later."""
    gate = Gate(history.world, "ollama.load")
    first, second = history.client(0), history.client(1)
    load = first("recording")
    gate.wait()
    wait([load], timeout=0.1)
    second("status").result(PATIENCE_S)
    gate.open()
    load.result(PATIENCE_S)


def an_unload_under_a_lease(history: History) -> None:
    """One client holds the VLM, another wants it out."""
    first, second = history.client(0), history.client(1)
    first("take vlm").result(PATIENCE_S)
    history.let_time_pass([second("unload")])
    first("give_back vlm").result(PATIENCE_S)


def a_move_under_a_lease(history: History) -> None:
    """One client holds CLIP, another wants it elsewhere."""
    first, second = history.client(0), history.client(1)
    first("take clip").result(PATIENCE_S)
    history.let_time_pass([second("autopilot")])
    first("give_back clip").result(PATIENCE_S)


Break = Callable[[History], None]

BROKEN: tuple[tuple[Break, Callable[[History], None]], ...] = (
    (lost_update, one_after_the_other("recording", "idle", "load", "load", "status")),
    (stale_read, one_after_the_other("recording", "status", "autopilot", "status")),
    (served_after_superseded, a_queue_behind_a_load),
    (lease_through_a_drain, an_unload_under_a_lease),
    (lease_through_a_drain, a_move_under_a_lease),
    (refused_and_done, one_after_the_other("autopilot", "status")),
    (answered_too_early, a_look_in_the_middle_of_a_load),
    (hold_outlives_its_mode, one_after_the_other("load", "autopilot", "status")),
)
"""Implementations that are broken on purpose, with what shows it."""

NAMES = [f"{broken.__name__}-{scenario.__name__}" for broken, scenario in BROKEN]


@pytest.mark.parametrize(("broken", "scenario"), BROKEN, ids=NAMES)
def test_a_broken_implementation_is_rejected(broken: Break, scenario: Callable[[History], None]) -> None:
    """What is rightly done has an order, the same scenario with one thing broken has none."""
    right, wrong = History(), History()
    scenario(right)
    right.end()
    right.judge()
    broken(wrong)
    scenario(wrong)
    wrong.end()
    with pytest.raises(AssertionError):
        wrong.judge()


# --- and by itself, on small registers ---


def register(state: int, call: Call, answer: str) -> tuple[int, ...]:
    """A cell for one number: `load` writes 1, `unload` writes 0, `status` reads."""
    if call.verb == "status":
        return (state,) if answer == str(state) else ()
    return (int(call.verb == "load"),)


def by_hand(*lines: str) -> list[Operation]:
    """A history in words, one line a call: `began ended verb answer`."""
    operations = []
    for line in lines:
        began, ended, verb, answer = line.split()
        ends = {} if ended == "-" else {"ended": int(ended), "answer": answer}
        operations.append(Operation(Call(verb=verb), int(began), **ends))  # type: ignore[arg-type]
    return operations


def test_the_example_of_a_history_is_true() -> None:
    """It is what people copy."""
    result = doctest.testmod(sys.modules["gpu_fsm.testing.histories"])

    assert (result.failed, result.attempted > 0) == (0, True)


def test_calls_at_the_same_time_may_take_effect_in_either_order() -> None:
    """Two looks beside a write may see the old and the new value, in that order only."""
    overlapping = ("1 8 load granted", "2 3 status 0", "4 5 status 1")
    assert explain(by_hand(*overlapping), 0, register, possible=()).linearizable
    backwards = ("1 8 load granted", "2 3 status 1", "4 5 status 0")
    assert explain(by_hand(*backwards), 0, register, possible=()).linearizable is False


def test_a_call_that_nobody_saw_end_may_have_happened_or_not() -> None:
    """A pending write explains a new value and the old one, but not a way back."""
    pending = "1 - load ?"
    for seen_there in ("0", "1"):
        history = by_hand(pending, f"2 3 status {seen_there}")
        assert explain(history, 0, register, possible=(GRANTED,)).linearizable
    history = by_hand(pending, "2 3 status 1", "4 5 status 0")
    assert explain(history, 0, register, possible=(GRANTED,)).linearizable is False


def test_what_was_asked_before_a_preempting_request_takes_effect_before_it_or_never() -> None:
    """A pending request cannot come true after the granted one that superseded it."""
    pending = Operation(Call(verb="set_mode", what="recording"), 1, asked=2)
    preempting = Operation(Call(verb="set_mode", what="autopilot", preempt=True), 3, ended=4, answer=GRANTED)
    for answer, possible in (("autopilot", True), ("recording", False)):
        look = Operation(Call(verb="status"), 5, ended=6, answer=answer)
        found = explain([pending, preempting, look], Register(), effects, possible=POSSIBLE)
        assert found.linearizable is possible


def test_the_smallest_prefix_that_no_order_explains_is_told() -> None:
    """What comes after the first impossible answer is left out, and the words name it."""
    found = explain(
        by_hand("1 2 load granted", "3 4 status 1", "5 6 status 0", "7 8 unload granted", "9 10 status 0"),
        0,
        register,
        possible=(),
    )
    assert found.linearizable is False
    assert [str(o.call.verb) for o in found.prefix] == ["load", "status", "status"]
    assert [o.answer for o in found.order] == ["granted", "1"]
    assert "NOT LINEARIZABLE" in str(found)
    assert "[  5 -   6] client 0: status -> 0" in str(found)


def test_a_search_without_budget_says_that_it_knows_nothing() -> None:
    """Running out is no verdict."""
    found = explain(
        by_hand("1 9 load granted", "2 8 unload granted", "3 7 status 1"), 0, register, possible=(), budget=1
    )
    assert found.linearizable is None
    assert "no verdict" in str(found)


HISTORIES = st.lists(
    st.tuples(st.sampled_from(("load", "unload", "status")), st.integers(0, 1)), min_size=1, max_size=5
).flatmap(
    lambda calls: st.tuples(
        st.just(calls),
        st.permutations([n for n in range(len(calls)) for _ in "be"]),
        st.sets(st.integers(0, len(calls) - 1), max_size=1),
    )
)


def orders(operations: Sequence[Operation]) -> Iterator[tuple[Operation, ...]]:
    """Every order that keeps what came before what; pending calls in it or not."""
    pending = [o for o in operations if not o.answer]
    for left_out in itertools.chain.from_iterable(itertools.combinations(pending, n) for n in range(len(pending) + 1)):
        for order in itertools.permutations([o for o in operations if o not in left_out]):
            if all(a.began < b.ended for a, b in itertools.combinations(order, 2)):
                yield order


@given(HISTORIES)
@settings(max_examples=int(300 * SHARE))
def test_the_search_agrees_with_trying_every_order(
    drawn: tuple[list[tuple[str, int]], list[int], set[int]],
) -> None:
    """On small histories of a register the verdict is that of brute force."""
    calls, events, pending = drawn
    operations = [Operation(Call(verb=verb), 0) for verb, _ in calls]  # type: ignore[arg-type]
    for at, n in enumerate(events, start=1):
        operation = operations[n]
        if not operation.began:
            operation.began = at
        elif n not in pending:
            operation.ended = at
            operation.answer = str(calls[n][1]) if calls[n][0] == "status" else GRANTED

    def explains(order: Iterable[Operation]) -> bool:
        states = {0}
        for operation in order:
            answers = (operation.answer,) if operation.answer else (GRANTED,)
            states = {after for s in states for answer in answers for after in register(s, operation.call, answer)}
        return bool(states)

    expected = any(explains(order) for order in orders(operations))
    assert explain(operations, 0, register, possible=(GRANTED,)).linearizable is expected


def test_stretches_that_meet_are_found() -> None:
    """Touching in one event is meeting; one after the other is not."""
    stretches = [Stretch(what="clip lease", began=1, ended=4), Stretch(what="clip.to_gpu", began=5, ended=6)]
    assert overlaps(stretches, *NEVER_TOGETHER) == []
    late = [*stretches, Stretch(what="clip.to_cpu", began=3, ended=7)]
    assert len(overlaps(late, *NEVER_TOGETHER)) == 2  # with the lease, and with the other move
    early = [Stretch(what="ollama.unload", began=1, ended=4), Stretch(what="vlm lease", began=3, ended=7)]
    assert len(overlaps(early, *NEVER_TOGETHER)) == 1


def test_a_refusal_needs_a_cause() -> None:
    """`superseded` without anybody who preempts, `manager_closed` without a close: nobody may be told so."""
    refused = Operation(Call(verb="load"), 1, ended=4, answer="superseded")
    preempting = Operation(Call(verb="set_mode", what="idle", preempt=True), 2, ended=5, answer=GRANTED)
    assert without_cause([refused, preempting]) == []
    assert len(without_cause([refused])) == 1
    preempting.began = 6
    assert len(without_cause([refused, preempting])) == 1
    over = Operation(Call(verb="set_mode", what="idle", preempt=True), -2, ended=-1, answer=GRANTED)
    assert len(without_cause([refused, over])) == 1


def test_an_answer_comes_after_the_status_that_shows_it() -> None:
    """Whoever has an answer and looks sees at least what was answered, also where nothing had to be done for it."""
    history = History()
    manager = history.manager
    for mode in ("recording", "idle"):  # the VLM stays in: wanting it now costs no step
        manager.set_execution_mode(mode)
    shown: Future[str] = Future()
    future = manager._driver.post("vlm_wanted").future
    future.add_done_callback(lambda _: shown.set_result(seen(manager)))
    assert shown.result(PATIENCE_S) == "idle wanted"
    manager.close()


def test_a_refusal_half_way_comes_after_the_status_that_shows_what_stands_instead() -> None:
    """Whoever preempts a load and holds what would have to move is refused, and sees IDLE at once."""
    history = History()
    manager = history.manager
    manager.set_execution_mode("autopilot")
    gate = Gate(history.world, "ollama.load")
    shown: Future[str] = Future()
    with manager.clip():
        load = manager._driver.post("vlm_wanted").future
        gate.wait()
        future = manager.submit_execution_mode("recording", preempt=True)
        future.add_done_callback(lambda _: shown.set_result(seen(manager)))
        gate.open()
        assert shown.result(PATIENCE_S) == "idle"
        assert isinstance(future.exception(0), LeaseHeld)
        assert isinstance(load.exception(0), Superseded)
    manager.close()
