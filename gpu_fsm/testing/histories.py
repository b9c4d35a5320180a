"""Histories of concurrent calls, and whether one order of single moments explains them.

A `Recorder` notes when each call of each thread or task began and ended, and each stretch for which something was held
or moved.  `explain` looks for a linearization: an order of the calls, each at a moment between its beginning and its
end, in which every answer is one that the specification allows.  It is the search of Wing and Gong with the memory of
Lowe: a set of calls that have taken effect, with the state they led to, is tried once.  `overlaps` judges what no order
of moments can: that two stretches never meet.

The specification is a function like `reference.effects`.  A search has a budget, since the problem is NP-complete; one
that ran out says so and proves nothing.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from attrs import define, frozen

from gpu_fsm.testing.reference import Call

S = TypeVar("S", bound=Hashable)

Effects = Callable[[S, Call, str], Iterable[S]]
"""(state, call, answer) -> the states it can lead to."""

PENDING = ""
"""The answer of a call that nobody has seen end; it may take effect with any of the possible answers, or never."""

NEVER = 10**9


@define(eq=False)
class Operation:
    """One call in a history.  `began`, `asked` and `ended` are numbers of events, counted over all clients."""

    call: Call
    began: int
    asked: int = NEVER
    """When the request stood in the queue: a preempting one that begins later comes after it or supersedes it."""
    ended: int = NEVER
    answer: str = PENDING

    def __str__(self) -> str:
        ended = "..." if self.ended == NEVER else str(self.ended)
        return f"[{self.began:>3} - {ended:>3}] {self.call} -> {self.answer or '?'}"


@frozen(kw_only=True)
class Stretch:
    """From `began` to `ended` somebody held or moved something."""

    what: str
    began: int
    ended: int = NEVER


class Recorder:
    """Notes down what happens, from any thread, in one order."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.stretches: list[Stretch] = []
        self._events = itertools.count(1)
        self._lock = threading.Lock()
        self._open: dict[tuple[str, object], int] = {}

    def begin(self, call: Call) -> Operation:
        """Somebody calls; note it right before."""
        with self._lock:
            operation = Operation(call, next(self._events))
            self.operations.append(operation)
            return operation

    def asked(self, operation: Operation) -> None:
        """The request has been posted, and its caller goes on."""
        with self._lock:
            operation.asked = next(self._events)

    def end(self, operation: Operation, answer: str) -> None:
        """The answer is here; note it right after.  A call that only stopped waiting has no end."""
        with self._lock:
            operation.ended, operation.answer = next(self._events), answer

    def start(self, what: str, who: object = None) -> None:
        """A stretch begins."""
        with self._lock:
            self._open[what, who] = next(self._events)

    def stop(self, what: str, who: object = None) -> None:
        """A stretch ends."""
        with self._lock:
            self.stretches.append(Stretch(what=what, began=self._open.pop((what, who)), ended=next(self._events)))

    @contextmanager
    def stretch(self, what: str, who: object = None) -> Iterator[None]:
        """`start` and `stop`."""
        self.start(what, who)
        try:
            yield
        finally:
            self.stop(what, who)

    def watch(self, op: str, phase: str) -> None:
        """A hook for `SimulatedWorld.on_io`: every effect on the world is a stretch."""
        if op in ("ollama.load", "ollama.unload", "clip.to_gpu", "clip.to_cpu"):
            if phase == "before":
                self.start(op)
            elif phase == "after" and (op, None) in self._open:
                self.stop(op)


@frozen(kw_only=True)
class Explanation:
    """What the search has found."""

    linearizable: bool | None
    """None where the budget ran out."""
    order: tuple[Operation, ...] = ()
    """A linearization; where there is none, the longest one of the smallest prefix that cannot be continued."""
    prefix: tuple[Operation, ...] = ()
    """Where there is no linearization: the shortest beginning of the history that has none."""
    tried: int = 0

    def __str__(self) -> str:
        if self.linearizable is None:
            return f"no verdict after {self.tried} configurations"
        if self.linearizable:
            return "linearizable: " + "; ".join(f"{o.call} -> {o.answer or '?'}" for o in self.order)
        seen = "\n".join(f"  {operation}" for operation in self.prefix)
        done = "\n".join(f"  {operation.call} -> {operation.answer or '?'}" for operation in self.order)
        return f"NOT LINEARIZABLE; the smallest prefix that no order explains:\n{seen}\nthis far an order goes:\n{done}"


def explain(
    operations: Sequence[Operation], initial: S, effects: Effects[S], *, possible: Sequence[str], budget: int = 200_000
) -> Explanation:
    """Whether `effects`, from `initial`, explains the history.

    `possible` are the answers that a pending call may turn out to have.  `budget` bounds the configurations that are
    tried (a set of calls with a state); the smallest prefix is looked for with the same budget each.

    Each client notes its calls right before and right after them.  Here the VLM was unloaded under a lease, and not if
    the lease had been given back before the unload was answered:

    >>> from gpu_fsm.testing.reference import Call, Register, effects
    >>> def history(given_back):
    ...     recorder = Recorder()
    ...     lease = recorder.begin(Call(verb="take", what="vlm", client=1))
    ...     recorder.end(lease, "granted")
    ...     unload = recorder.begin(Call(verb="unload", client=2))
    ...     if given_back:
    ...         recorder.begin(Call(verb="give_back", what="vlm", client=1))  # and nobody has seen it end
    ...     recorder.end(unload, "granted")
    ...     return recorder.operations
    >>> explain(history(given_back=True), Register(), effects, possible=["granted"]).linearizable
    True
    >>> print(explain(history(given_back=False), Register(), effects, possible=["granted"]))
    NOT LINEARIZABLE; the smallest prefix that no order explains:
      [  1 -   2] client 1: take vlm -> granted
      [  3 -   4] client 2: unload -> granted
    this far an order goes:
      client 1: take vlm -> granted
    """
    search = _Search(operations, initial, effects, possible, budget)
    found = search.run()
    if found is not False:
        return Explanation(linearizable=found, order=search.longest if found else (), tried=search.tried)
    ends = sorted(operation.ended for operation in operations if operation.ended != NEVER)
    for end in ends:  # a history without an order has none when it goes on, so the first one is the shortest
        until = [_cut(operation, end) for operation in operations if operation.began < end]
        search = _Search(until, initial, effects, possible, budget)
        found = search.run()
        if found is False:
            return Explanation(linearizable=False, order=search.longest, prefix=tuple(until), tried=search.tried)
    raise AssertionError("a history that has no order has a prefix that has none: itself")


def _cut(operation: Operation, end: int) -> Operation:
    """What was known of an operation at the event `end`."""
    if operation.ended <= end:
        return operation
    asked = operation.asked if operation.asked <= end else NEVER
    return Operation(operation.call, operation.began, asked=asked)


class _Search(Generic[S]):
    def __init__(
        self,
        operations: Sequence[Operation],
        initial: S,
        effects: Effects[S],
        possible: Sequence[str],
        budget: int,
    ) -> None:
        self._operations = sorted(operations, key=lambda operation: operation.began)
        self._initial, self._effects, self._possible, self._budget = initial, effects, possible, budget
        self._must = sum(1 << n for n, operation in enumerate(self._operations) if operation.ended != NEVER)
        self._before = [self._predecessors(operation) for operation in self._operations]
        self.tried = 0
        self.longest: tuple[Operation, ...] = ()

    def _predecessors(self, operation: Operation) -> int:
        """As a bit mask: those that have to take effect before it, if they do at all."""
        before = 0
        for n, other in enumerate(self._operations):
            displaced = operation.call.preempt and other.asked < operation.began and operation.answer == "granted"
            if other is not operation and (other.ended < operation.began or displaced):
                before |= 1 << n
        return before

    def run(self) -> bool | None:
        """Depth first, with a memory."""
        known: set[tuple[int, S]] = set()
        stack: list[tuple[int, S, tuple[Operation, ...]]] = [(0, self._initial, ())]
        while stack:
            done, state, order = stack.pop()
            if (done, state) in known:
                continue
            known.add((done, state))
            self.tried += 1
            if len(order) > len(self.longest):
                self.longest = order
            if done & self._must == self._must:
                self.longest = order
                return True
            if self.tried > self._budget:
                return None
            stack += self._next(done, state, order)
        return False

    def _next(
        self, done: int, state: S, order: tuple[Operation, ...]
    ) -> Iterator[tuple[int, S, tuple[Operation, ...]]]:
        for n, operation in reversed(tuple(enumerate(self._operations))):
            bit = 1 << n
            if done & bit:
                continue
            missing = self._before[n] & ~done
            if missing & self._must:
                continue
            # A pending call that should have come before this one never takes effect then.
            after = done | bit | missing
            answers = (operation.answer,) if operation.answer else self._possible
            for answer in answers:
                for following in self._effects(state, operation.call, answer):
                    yield after, following, (*order, operation)


def overlaps(stretches: Sequence[Stretch], *pairs: tuple[str, str]) -> list[str]:
    """Which of the pairs, that must never overlap, do; a pair of equals means two of the same kind."""
    found = []
    for first, second in pairs:
        for a, b in itertools.product(stretches, repeat=2):
            same = first == second and a.began >= b.began
            if a is b or same or not a.what.startswith(first) or not b.what.startswith(second):
                continue
            if a.began < b.ended and b.began < a.ended:
                found.append(f"{a.what} [{a.began} - {a.ended}] overlaps {b.what} [{b.began} - {b.ended}]")
    return found


def without_cause(operations: Sequence[Operation]) -> list[str]:
    """Refusals that nothing in the history explains.

    `superseded` needs a preempting call (or a close) that was under way at the same time; `manager_closed` needs a
    close that had begun.
    """
    found = []
    for refused in operations:
        others = [other for other in operations if other is not refused and other.began < refused.ended]
        closing = any(other.call.verb == "close" for other in others)
        preempted = any(other.call.preempt and other.ended > refused.began for other in others)
        caused = {"superseded": preempted or closing, "manager_closed": closing}
        if not caused.get(refused.answer, True):
            found.append(f"{refused} without a cause")
    return found
