"""The card, lent to programs that we do not manage: asked for, made, kept, and taken back.

Room is made with the manager's own verbs: IDLE, which promises nothing; the VLM out; CLIP on the CPU.  From then on the
manager refuses what would take the room again, whoever asks for it, and the gateway also refuses other models.  When
the last lease has ended or its holder has been silent for its TTL, the mode that was asked for before is asked for
again.  Where the card is also lent by others (another gateway, a program's own `lend`), the last one does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from attrs import define, frozen

from gpu_fsm.driver import Loan, making_room
from gpu_fsm.errors import BadArgument, CardHeld, GPUFSMError, InsufficientVRAM, LeaseTimeout, Refused, one_line
from gpu_fsm.status import ExecutionMode, Hold

if TYPE_CHECKING:
    from gpu_fsm.manager import GPUResourceManager

log = logging.getLogger("gpu_fsm")

SHORTEST_TTL_S = 0.5
LONGEST_TTL_S = 86400.0
LONGEST_WAIT_S = 3600.0
TRY_AGAIN_S = 1.0
"""Between two tries of one who waits, where nothing tells that another one would end better."""


@frozen(kw_only=True)
class Wish:
    """What a program asks for.  Read from JSON by `wish_of`."""

    holder: str
    needed_mib: float
    ttl_s: float
    wait_s: float


def wish_of(given: object, *, ttl_s: float) -> Wish:
    """Read `{"holder", "needed_mib", "ttl_s", "wait_s"}`, the last two with defaults; raises `BadArgument`."""
    if not isinstance(given, Mapping) or not set(given) <= {"holder", "needed_mib", "ttl_s", "wait_s"}:
        raise BadArgument(detail="a lease is asked for with holder, needed_mib, ttl_s, wait_s", remedy="Send JSON.")
    holder = given.get("holder")
    if not isinstance(holder, str) or not holder.strip():
        raise BadArgument(detail="holder is missing", remedy="Say who asks: it is shown to everybody who has to wait.")

    def number(name: str, default: float | None, least: float, most: float) -> float:
        value = given.get(name, default)
        right = isinstance(value, int | float) and not isinstance(value, bool)
        if not right or not least <= value <= most:
            raise BadArgument(detail=f"{name} is {one_line(value, 40)}, not a number from {least:g} to {most:g}")
        return float(value)

    return Wish(
        holder=one_line(holder.strip(), 80),
        needed_mib=number("needed_mib", None, 1.0, float(1 << 24)),
        ttl_s=number("ttl_s", ttl_s, SHORTEST_TTL_S, LONGEST_TTL_S),
        wait_s=number("wait_s", 0.0, 0.0, LONGEST_WAIT_S),
    )


@define(eq=False)
class _Lease:
    id: str
    wish: Wish
    until: float
    alarm: asyncio.TimerHandle | None = None


@define(eq=False)
class _Before:
    """What is to come back when the card does."""

    loan: Loan
    """The manager's promise to let nobody take the room."""
    clip_up: bool
    """In IDLE, where no mode brings CLIP back to the GPU."""
    end: ExitStack
    """Ends that promise."""


class Lender:
    """All foreign leases of one gateway.  Lives in its event loop."""

    def __init__(self, manager: GPUResourceManager) -> None:
        self._manager = manager
        self._leases: dict[str, _Lease] = {}
        self._turn = asyncio.Lock()
        """Whoever makes room or takes it back; first come, first served."""
        self._changed = asyncio.Event()
        self._waiting = 0
        self._before: _Before | None = None
        """Set while the card is lent or about to be."""
        self._room_mib: float | None = None
        self._others: Counter[str] = Counter()
        """Requests for other models that run now, by who asked."""
        self._tasks: set[asyncio.Task[None]] = set()

    def check_free(self) -> None:
        """Raise `CardHeld`, naming the holders, while the card is lent."""
        if self._before is None:
            return
        now, leases = time.monotonic(), tuple(self._leases.values())
        holders = [
            f"{lease.wish.holder} ({lease.wish.needed_mib:.0f} MiB, {max(0.0, lease.until - now):.0f} s left)"
            for lease in leases
        ]
        raise CardHeld(
            detail=f"the card is lent to {', '.join(holders) or 'a program that waits for room'}",
            remedy="Ask again when the lease has ended.",
            name=", ".join(lease.wish.holder for lease in leases),
        )

    @contextlib.contextmanager
    def other_model(self, holder: str) -> Iterator[None]:
        """While the block runs another model does: whoever asks for room waits for it.  Raises as `check_free`."""
        self.check_free()
        self._others[holder] += 1
        try:
            yield
        finally:
            self._others[holder] -= 1
            self._others += Counter()  # those at 0 go
            self._changed.set()

    def told(self) -> list[dict[str, Any]]:
        """Who holds what; without the ids, which only the holders know."""
        now = time.monotonic()
        return [
            {
                "holder": lease.wish.holder,
                "needed_mib": lease.wish.needed_mib,
                "ttl_s": lease.wish.ttl_s,
                "expires_in_s": max(0.0, lease.until - now),
            }
            for lease in self._leases.values()
        ]

    async def ask(self, wish: Wish) -> dict[str, Any]:
        """Make room and lend it.  Raises a refusal with figures where there is none within `wait_s`."""
        total_mib = self._manager.get_status().vram.total_mib
        if total_mib is not None:  # in vain nobody waits and nothing is given up
            self._check(wish, total_mib, "there on the whole card")
        deadline = asyncio.get_running_loop().time() + wish.wait_s
        self._waiting += 1
        try:
            async with self._in_turn(wish):
                while True:
                    try:
                        return self._lend(wish, await self._make_room(wish))
                    except Refused as error:
                        left = deadline - asyncio.get_running_loop().time()
                        # With nothing lent and all of ours given up, waiting would only keep ours off the card.
                        for_nothing = isinstance(error, InsufficientVRAM) and not self._leases
                        if left <= 0 or for_nothing or not error.retryable:
                            raise
                        await self._pause(min(left, TRY_AGAIN_S))
        finally:
            self._waiting -= 1
            self._take_back_soon()

    def beat(self, id_: str) -> dict[str, Any]:
        """The holder lives.  Says whether the room is still kept; raises `BadArgument` for a lease that has ended."""
        lease = self._find(id_)
        self._set_alarm(lease)
        return self._state(lease)

    def end(self, id_: str) -> None:
        """The holder needs it no more; raises `BadArgument` for a lease that has ended."""
        self._drop(self._find(id_))

    def close(self) -> None:
        """The gateway stops: all leases end, and the mode is asked for again; the manager goes on without us."""
        for lease in tuple(self._leases.values()):
            if lease.alarm is not None:
                lease.alarm.cancel()
        self._leases.clear()
        before, self._before = self._before, None
        if before is not None:
            before.end.close()
            with contextlib.suppress(GPUFSMError):
                self._manager.submit_execution_mode(before.loan.mode)

    # --- making room and taking it back ---

    @contextlib.asynccontextmanager
    async def _in_turn(self, wish: Wish) -> AsyncIterator[None]:
        """Wait for one's turn as long as the wish says; even one who does not wait gets what is free at once."""
        try:
            async with asyncio.timeout(wish.wait_s if self._turn.locked() else None):
                await self._turn.acquire()
        except TimeoutError:
            others = self._waiting - 1
            raise LeaseTimeout(
                detail=f"{others} others wait for room on the card" if others else "the card is just changing hands",
                remedy="Ask again, or with a longer wait_s.",
                holders=tuple(lease.wish.holder for lease in self._leases.values()),
                waited_s=wish.wait_s,
            ) from None
        try:
            yield
        finally:
            self._turn.release()

    async def _make_room(self, wish: Wish) -> float | None:
        """Give up what is ours on the card; returns what is free then, None where nobody can tell."""
        verbs, status = self._manager.aio, self._manager.get_status()
        if self._before is None:
            end = ExitStack()
            loan = end.enter_context(self._manager.lend(wish.holder))
            clip_up = loan.mode is ExecutionMode.IDLE and status.clip_device not in ("cpu", "none")
            self._before = _Before(loan, clip_up, end)
        if not self._leases:
            with making_room(self._before.loan):
                await verbs.set_execution_mode(ExecutionMode.IDLE)
            await self._let_others_end()
            await verbs.ensure_vlm_unloaded()
            if status.clip_device != "none":
                await verbs.migrate_clip_to_cpu()
            self._room_mib = self._manager.get_status().vram.free_mib
        else:
            await verbs.ensure_vlm_unloaded()  # for its look: somebody may have come to the card since
        promised = sum(lease.wish.needed_mib for lease in self._leases.values())
        room, free = self._room_mib, self._manager.get_status().vram.free_mib
        if room is None or free is None:
            return None
        free = min(room - promised, free)
        lent = f", {promised:.0f} MiB being lent" if promised else ""
        self._check(wish, free, f"free with all of ours given up{lent}")
        return free

    async def _let_others_end(self) -> None:
        """Wait for running requests to other models as long as for those to the VLM; raises `LeaseTimeout`."""
        loop = asyncio.get_running_loop()
        drain_s = self._manager.config.drain_timeout_s
        end = loop.time() + drain_s
        while self._others:
            if (left := end - loop.time()) <= 0:
                raise LeaseTimeout(
                    detail=f"other models are still running for {', '.join(self._others)}",
                    remedy="Ask again, or with a longer wait_s.",
                    holders=tuple(self._others),
                    waited_s=drain_s,
                )
            await self._pause(left)

    def _check(self, wish: Wish, free_mib: float, what: str) -> None:
        """Raise `InsufficientVRAM` where less than the wish and the reserve is there."""
        config = self._manager.config
        if wish.needed_mib + config.reserve_mib > free_mib:
            raise InsufficientVRAM(
                detail=(
                    f"{wish.holder} needs {wish.needed_mib:.0f} MiB and {config.reserve_mib:.0f} MiB are kept in "
                    f"reserve, but only {free_mib:.0f} MiB are {what}"
                ),
                remedy="Ask for less, or wait (wait_s) until others give back.",
                needed_mib=wish.needed_mib,
                free_mib=free_mib,
                reserve_mib=config.reserve_mib,
                holders=tuple(lease.wish.holder for lease in self._leases.values()),
            )

    def _lend(self, wish: Wish, free_mib: float | None) -> dict[str, Any]:
        lease = _Lease(secrets.token_urlsafe(16), wish, 0.0)
        self._leases[lease.id] = lease
        self._set_alarm(lease)
        log.info("gpu_fsm: the card is lent to %s: %.0f MiB for %g s", wish.holder, wish.needed_mib, wish.ttl_s)
        return {"id": lease.id, **self._state(lease), "free_mib": free_mib}

    def _state(self, lease: _Lease) -> dict[str, Any]:
        status = self._manager.get_status()
        kept = (
            status.execution_mode is ExecutionMode.IDLE
            and status.hold is not Hold.WANTED
            and status.clip_device in ("cpu", "none")
        )
        return {
            "holder": lease.wish.holder,
            "needed_mib": lease.wish.needed_mib,
            "ttl_s": lease.wish.ttl_s,
            "kept": kept,
            "free_mib": status.vram.free_mib,
        }

    def _set_alarm(self, lease: _Lease) -> None:
        if lease.alarm is not None:
            lease.alarm.cancel()
        lease.until = time.monotonic() + lease.wish.ttl_s
        lease.alarm = asyncio.get_running_loop().call_later(lease.wish.ttl_s, self._silent, lease)

    def _silent(self, lease: _Lease) -> None:
        log.warning("gpu_fsm: %s has been silent for %g s: its room goes back", lease.wish.holder, lease.wish.ttl_s)
        self._drop(lease)

    def _find(self, id_: str) -> _Lease:
        lease = self._leases.get(id_)
        if lease is None:
            raise BadArgument(detail="no such lease: it has ended, or never was", remedy="Ask for a new one.")
        return lease

    def _drop(self, lease: _Lease) -> None:
        if self._leases.pop(lease.id, None) is None:
            return
        if lease.alarm is not None:
            lease.alarm.cancel()
        self._changed.set()
        self._take_back_soon()

    async def _pause(self, seconds: float) -> None:
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _take_back_soon(self) -> None:
        if self._before is not None and not self._leases and not self._waiting:
            task = asyncio.get_running_loop().create_task(self._take_back())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _take_back(self) -> None:
        """Ask for the mode that stood before, unless somebody is on the way to the room or has asked for IDLE."""
        async with self._turn:
            if self._before is None or self._leases or self._waiting:
                return
            before, self._before, self._room_mib = self._before, None, None
            before.end.close()
            mode = before.loan.mode
            try:
                if mode is not ExecutionMode.IDLE:
                    outcome = await self._manager.aio.set_execution_mode(mode)
                    log.info("gpu_fsm: the card is back; %s is %s", mode.name, outcome.state.name)
                elif before.clip_up:
                    await self._manager.aio.migrate_clip_to_gpu()
            except CardHeld as error:  # the last borrower asks for the mode again
                log.info("gpu_fsm: the card is given back, but %s", error)
            except GPUFSMError as error:
                log.warning("gpu_fsm: the card is back, but %s could not be restored: %s", mode.name, error)
