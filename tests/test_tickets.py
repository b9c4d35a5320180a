"""Tickets and the mailbox: order, coalescing, preemption, one answer each; and what callers may hand in."""

from __future__ import annotations

import threading
from collections import Counter, deque
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_fsm import ExecutionMode
from gpu_fsm.errors import BadArgument, ManagerClosed, Superseded
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.states import State
from gpu_fsm.status import Hold
from gpu_fsm.tickets import Mailbox, Outcome, Ticket, newest
from tests.waiting import PATIENCE_S, Gate, in_thread, journal_is_whole
from tests.worlds import inline

pytestmark = pytest.mark.core

MODES = (ExecutionMode.IDLE, ExecutionMode.RECORDING, ExecutionMode.AUTOPILOT)


def request(mode: ExecutionMode = ExecutionMode.IDLE, *, preempt: bool = False) -> Ticket:
    """A mode request."""
    return Ticket(kind="request", mode=mode, preempt=preempt)


def test_who_waits_again_after_a_ctrl_c_is_in_the_queue_no_longer() -> None:
    """It went back to make room for somebody whose drive was cut off before he waited in its place."""
    mailbox, waits, takes_over = Mailbox(), request(), request(ExecutionMode.RECORDING)
    mailbox.post(waits)
    mailbox.take()
    mailbox.post(takes_over)
    mailbox.take()
    mailbox.put_back((waits,))
    assert mailbox.lost((waits,)) == (takes_over,)
    assert len(mailbox) == 0


@given(st.lists(st.tuples(st.sampled_from(MODES), st.booleans()), max_size=30))
def test_what_goes_in_comes_out_once_in_order_or_is_superseded(asked: list[tuple[ExecutionMode, bool]]) -> None:
    """First in, first out; groups are adjacent equals; a preempting ticket throws out all that is older."""
    mailbox = Mailbox()
    posted, superseded = [], []
    for mode, preempt in asked:
        ticket = request(mode, preempt=preempt)
        posted.append(ticket)
        superseded += mailbox.post(ticket)
    taken = []
    while group := mailbox.take():
        assert len({ticket.mode for ticket in group}) == 1
        assert newest(group) == group[-1].seq
        taken += group
    assert [ticket.seq for ticket in posted] == list(range(1, len(posted) + 1))
    assert superseded + taken == posted
    last = max((ticket.seq for ticket in posted if ticket.preempt), default=0)
    assert mailbox.newest_preempt == last
    assert all(ticket.seq < last for ticket in superseded)
    assert all(ticket.seq >= last for ticket in taken)
    assert len(mailbox) == 0


def test_many_threads_post_and_every_ticket_has_a_number_of_its_own() -> None:
    """Numbers are given under the lock: no gap, no double, however many post."""
    mailbox = Mailbox()
    start = threading.Barrier(8)

    def post() -> list[int]:
        start.wait(PATIENCE_S)
        tickets = [request() for _ in range(200)]
        for ticket in tickets:
            mailbox.post(ticket)
        return [ticket.seq for ticket in tickets]

    threads = [in_thread(post) for _ in range(8)]
    numbers = [number for thread in threads for number in thread.result(PATIENCE_S)]
    assert sorted(numbers) == list(range(1, 1601))
    assert len(mailbox.take()) == 1600


@pytest.mark.parametrize("moment", ["append", "popleft"])
@pytest.mark.parametrize("preempt", [False, True])
def test_a_signal_handler_may_post_while_its_thread_does(moment: str, preempt: bool) -> None:
    """It comes in the middle of a post: neither waits for the other, and each request is served or superseded."""
    mailbox = Mailbox()
    older, ours, handlers = request(), request(preempt=True), request(preempt=preempt)
    mailbox.post(older)
    thrown_out: list[Ticket] = []

    class Struck(deque[Ticket]):
        def _strike(self, method: str) -> None:
            if method == moment and not handlers.seq:
                thrown_out.extend(mailbox.post(handlers))

        def append(self, ticket: Ticket) -> None:
            super().append(ticket)
            self._strike("append")

        def appendleft(self, ticket: Ticket) -> None:
            super().appendleft(ticket)
            self._strike("append")

        def popleft(self) -> Ticket:
            ticket = super().popleft()
            self._strike("popleft")
            return ticket

    mailbox._queue = Struck(mailbox._queue)
    thrown_out.extend(in_thread(mailbox.post, ours).result(PATIENCE_S))
    served = mailbox.take()
    assert sorted(map(id, (*served, *thrown_out))) == sorted(map(id, (older, ours, handlers)))
    assert mailbox.take() == ()
    assert ours.seq < handlers.seq
    assert mailbox.newest_preempt == (handlers.seq if preempt else ours.seq)
    assert served[0] is (handlers if preempt else ours)


def test_a_holders_ticket_passes_who_waits_unless_it_preempts_or_has_waited_at_these_leases() -> None:
    """A preempting one throws out who waits, which is more; and one that has just waited would only wait again."""
    mailbox = Mailbox()
    held = Ticket(kind="vlm_unwanted", holds=frozenset({1}))
    mailbox.post(held)
    mailbox.post(request())
    held.waits_at = 7
    assert not mailbox.has_a_holder(7, 0.0)
    assert mailbox.take_of_a_holder(7, 0.0) == ()
    assert mailbox.has_a_holder(8, 0.0)
    assert mailbox.take_of_a_holder(8, 0.0) == (held,)
    preempting = Ticket(kind="close", preempt=True, holds=frozenset({1}))
    mailbox.post(preempting)
    assert not mailbox.has_a_holder(8, 0.0)
    assert mailbox.take_of_a_holder(8, 0.0) == ()
    assert mailbox.take() == (preempting,)


def test_a_ticket_is_answered_once() -> None:
    """The first answer stands: neither a grant nor a refusal changes it."""
    outcome = Outcome(asked="IDLE", state=State.IDLE)
    ticket = request()
    assert ticket.grant(outcome)
    assert not ticket.grant(outcome)
    ticket.refuse(Superseded(detail="too late"))
    assert ticket.future.result(0) is outcome
    refused = request()
    refused.refuse(Superseded(detail="first"))
    refused.refuse(ManagerClosed(detail="second"))
    assert not refused.grant(outcome)
    assert isinstance(refused.future.exception(0), Superseded)


def test_a_ticket_whose_waiter_left_is_not_granted() -> None:
    """A cancelled future takes no answer, and answering it harms nobody."""
    ticket = request()
    assert ticket.future.cancel()
    assert not ticket.grant(Outcome(asked="IDLE", state=State.IDLE))
    ticket.refuse(Superseded())
    assert ticket.future.cancelled()


def test_each_ticket_gets_an_error_of_its_own() -> None:
    """One cause, many waiters: each raises its own object, or their tracebacks would pile up in one."""
    error = Superseded(detail="why", remedy="what now")
    first, second = request(), request()
    first.refuse(error)
    second.refuse(error)
    raised = [first.future.exception(0), second.future.exception(0)]
    assert raised[0] is not raised[1]
    assert [str(one) for one in raised] == [str(error)] * 2


def test_adjacent_equal_requests_cost_one_and_each_gets_its_answer() -> None:
    """Five requests for the same are one event; a different one between keeps the order."""
    world = SimulatedWorld()
    manager = inline(world)
    asked = ["recording"] * 3 + ["idle"] + ["recording"] * 2
    futures = [manager.submit_execution_mode(mode) for mode in asked]
    manager.drive_for(30)
    assert [future.result(0).state.value for future in futures] == asked
    served = Counter(record.trigger for record in manager.journal)
    assert served["request"] == 3
    assert world.ollama.counts["loads"] == 1


def test_a_cancelled_request_is_served_like_any_other() -> None:
    """Cancelling the future takes back the interest, not the request, and wedges nothing."""
    manager = inline(SimulatedWorld())
    assert manager.submit_execution_mode("recording").cancel()
    manager.drive_for(30)
    assert manager.get_status().state is State.RECORDING
    assert manager.set_execution_mode("idle").granted


def test_a_callback_that_raises_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """A future's callback is its owner's business: the driver goes on and the others are answered."""
    manager = inline(SimulatedWorld())

    def broken(_: Future[Outcome]) -> None:
        raise ZeroDivisionError

    futures = [manager.submit_execution_mode("recording") for _ in range(3)]
    futures[0].add_done_callback(broken)
    assert manager.set_execution_mode("autopilot").granted
    assert all(future.result(0).granted for future in futures)
    assert [record.name for record in caplog.records if record.levelname == "ERROR"] == ["concurrent.futures"]


@pytest.mark.parametrize("mode", ["Recording", " recording ", "RECORDING", ExecutionMode.RECORDING])
def test_a_mode_may_be_named_in_any_case(mode: Any) -> None:
    """An `ExecutionMode` or its name."""
    assert inline(SimulatedWorld()).set_execution_mode(mode).state is State.RECORDING


@pytest.mark.parametrize("mode", ["", "recordin", "DEGRADED", ExecutionMode.DEGRADED, State.IDLE, None, 3, b"idle"])
def test_an_unknown_mode_is_refused_with_the_known_ones(mode: Any) -> None:
    """`BadArgument` names the value and the modes that can be asked for; nothing is posted."""
    manager = inline(SimulatedWorld())
    for call in (manager.set_execution_mode, manager.submit_execution_mode, manager.explain):
        with pytest.raises(BadArgument) as caught:
            call(mode)
        assert "IDLE, RECORDING, AUTOPILOT" in caught.value.remedy
        assert isinstance(caught.value, ValueError)
    assert manager.get_status().queued == 0


BAD_TIMES = (-1, -0.001, float("nan"), float("inf"), float("-inf"), True, False, "3", "", [], 1j)


@pytest.mark.parametrize("bad", BAD_TIMES, ids=repr)
@pytest.mark.parametrize(
    "verb", ["ensure_vlm_loaded", "ensure_vlm_unloaded", "migrate_clip_to_gpu", "migrate_clip_to_cpu", "close"]
)
def test_a_bad_time_out_is_refused_before_anything_is_asked(verb: str, bad: Any) -> None:
    """Seconds are a finite number, zero or more; anything else raises `BadArgument` and leaves no request behind."""
    manager = inline(SimulatedWorld())
    with pytest.raises(BadArgument, match="timeout_s"):
        getattr(manager, verb)(timeout_s=bad)
    assert manager.get_status().queued == 0
    assert not manager.get_status().closed


@pytest.mark.parametrize("bad", BAD_TIMES, ids=repr)
def test_a_bad_time_out_changes_no_mode(bad: Any) -> None:
    """A mode request with a timeout that cannot be meant is not half accepted."""
    world = SimulatedWorld()
    manager = inline(world)
    with pytest.raises(BadArgument, match="timeout_s"):
        manager.set_execution_mode("recording", timeout_s=bad)
    manager.drive_for(30)
    assert manager.get_status().state is State.IDLE
    assert world.ollama.counts["loads"] == 0


@pytest.mark.parametrize("long", [1e12, 1e300, 10**400], ids=["1e12", "1e300", "10**400"])
def test_a_very_long_time_out_is_as_good_as_none(long: float) -> None:
    """More seconds than the system can count to are for ever, or refused by name, never an `OverflowError`."""
    from tests.worlds import threaded

    manager = threaded(SimulatedWorld())
    try:
        assert manager.set_execution_mode("idle", timeout_s=long).granted
    except BadArgument:
        pass
    finally:
        manager.close()


def test_an_unknown_event_kind_is_refused_with_the_known_ones() -> None:
    """`subscribe` checks what it is given at once."""
    manager = inline(SimulatedWorld())
    with pytest.raises(BadArgument, match="mode_changed"):
        manager.subscribe(print, "mode_change")
    with pytest.raises(BadArgument):
        manager.subscribe("not callable")  # type: ignore[arg-type]


def test_an_event_kind_that_is_none_is_refused_by_name() -> None:
    """What is no kind at all gets the same clear answer."""
    with pytest.raises(BadArgument):
        inline(SimulatedWorld()).subscribe(print, 3)  # type: ignore[arg-type]


def test_who_is_answered_finds_the_answer_in_the_status() -> None:
    """Also in a callback, and where nothing had to move: IDLE without its hold is acknowledged on the spot."""
    world = SimulatedWorld()
    manager = inline(world)
    manager.ensure_vlm_loaded()
    assert manager.get_status().hold is Hold.WANTED
    found: list[Hold | None] = []
    future = manager.submit_execution_mode("recording")
    future.add_done_callback(lambda _: found.append(manager.get_status().hold))
    manager.drive_for(1.0)
    manager.set_execution_mode("idle")
    future = manager._driver.post("vlm_wanted").future
    future.add_done_callback(lambda _: found.append(manager.get_status().hold))
    manager.drive_for(1.0)
    assert found == [None, Hold.WANTED]


def test_two_who_wait_drive_one_after_the_other() -> None:
    """Without a thread of its own whoever waits does the work; the second one waits for the first one's turn to end."""
    world = SimulatedWorld()
    manager = inline(world)
    gate = Gate(world, "ollama.load", "during")
    first = in_thread(manager.set_execution_mode, "recording")
    gate.wait()
    second = in_thread(manager.set_execution_mode, "autopilot")
    with pytest.raises(TimeoutError):
        second.result(0.3)
    assert (world.ollama.loading() is not None, world.clip.place) == (True, "cpu")
    gate.open()
    assert first.result(PATIENCE_S).granted
    assert second.result(PATIENCE_S).granted
    journal_is_whole(manager)
    assert (world.vlm_resident(), world.clip.place) == (False, "gpu")


@pytest.mark.parametrize("newer", ["idle", "autopilot", "recording"])
def test_a_preempting_request_ends_a_load_only_where_it_has_no_use_for_it(newer: str) -> None:
    """RECORDING goes on with the load that is running; the others would wait for nothing."""
    world = SimulatedWorld(vlm_load_s=100.0)
    manager = inline(world)
    asked: list[Any] = []
    world.clock.after(10.0, lambda: asked.append(manager.submit_execution_mode(newer, preempt=True)))
    older = manager.submit_execution_mode("recording")
    manager.drive_for(130.0)
    assert isinstance(older.exception(0), Superseded)
    assert asked[0].result(0).granted
    (load, *more) = [entry for entry in world.ollama.log if entry.op == "ollama.load"]
    assert more == []
    assert load.ended_at is not None
    assert (load.ended_at - load.at >= 100.0) == (newer == "recording")
    assert world.vlm_resident() == (newer == "recording")
