"""The card, lent to programs that we do not manage: asked for, made, kept, and taken back.

Room is made with the manager's own verbs: IDLE, which promises nothing; the VLM out; CLIP on the CPU.  While the card
is lent the gateway refuses what would take the room again, and when the last lease has ended or its holder has been
silent for its TTL, the mode that stood before is asked for again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import define, frozen

from gpu_fsm.errors import BadArgument, CardHeld, GPUFSMError, InsufficientVRAM, LeaseTimeout, Refused, one_line
from gpu_fsm.status import ExecutionMode, Hold
from gpu_fsm.tickets import Outcome

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
class _Loan:
    id: str
    wish: Wish
    until: float
    alarm: asyncio.TimerHandle | None = None


class Lender:
    """All foreign leases of one gateway.  Lives in its event loop."""

    def __init__(self, manager: GPUResourceManager) -> None:
        self._manager = manager
        self._loans: dict[str, _Loan] = {}
        self._turn = asyncio.Lock()
        """Whoever makes room or takes it back; first come, first served."""
        self._changed = asyncio.Event()
        self._waiting = 0
        self._before: tuple[ExecutionMode, bool] | None = None
        """The mode to restore and whether CLIP was on the GPU; set while the card is lent or about to be."""
        self._room_mib: float | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def check_free(self) -> None:
        """Raise `CardHeld`, naming the holders, while the card is lent.  The one method for any thread."""
        if self._before is None:
            return
        now, loans = time.monotonic(), tuple(self._loans.values())
        holders = [
            f"{loan.wish.holder} ({loan.wish.needed_mib:.0f} MiB, {max(0.0, loan.until - now):.0f} s left)"
            for loan in loans
        ]
        raise CardHeld(
            detail=f"the card is lent to {', '.join(holders) or 'a program that waits for room'}",
            remedy="Ask again when the lease has ended.",
            name=", ".join(loan.wish.holder for loan in loans),
        )

    def told(self) -> list[dict[str, Any]]:
        """Who holds what; without the ids, which only the holders know."""
        now = time.monotonic()
        return [
            {
                "holder": loan.wish.holder,
                "needed_mib": loan.wish.needed_mib,
                "ttl_s": loan.wish.ttl_s,
                "expires_in_s": max(0.0, loan.until - now),
            }
            for loan in self._loans.values()
        ]

    async def ask(self, wish: Wish) -> dict[str, Any]:
        """Make room and lend it.  Raises a refusal with figures where there is none within `wait_s`."""
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
                        for_nothing = isinstance(error, InsufficientVRAM) and not self._loans
                        if left <= 0 or for_nothing or not error.retryable:
                            raise
                        await self._pause(min(left, TRY_AGAIN_S))
        finally:
            self._waiting -= 1
            self._take_back_soon()

    def beat(self, id_: str) -> dict[str, Any]:
        """The holder lives.  Says whether the room is still kept; raises `BadArgument` for a lease that has ended."""
        loan = self._find(id_)
        self._set_alarm(loan)
        return self._state(loan)

    def end(self, id_: str) -> None:
        """The holder needs it no more; raises `BadArgument` for a lease that has ended."""
        self._drop(self._find(id_))

    def close(self) -> None:
        """The gateway stops: all leases end, and the mode is asked for again; the manager goes on without us."""
        for loan in tuple(self._loans.values()):
            if loan.alarm is not None:
                loan.alarm.cancel()
        self._loans.clear()
        before, self._before = self._before, None
        if before is not None and self._manager.get_status().asked_mode is ExecutionMode.IDLE:
            with contextlib.suppress(GPUFSMError):
                self._manager.submit_execution_mode(before[0])

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
                holders=tuple(loan.wish.holder for loan in self._loans.values()),
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
            self._before = (status.asked_mode, status.clip_device not in ("cpu", "none"))
        if not self._loans:
            await verbs.set_execution_mode(ExecutionMode.IDLE)
            await verbs.ensure_vlm_unloaded()
            if status.clip_device != "none":
                await verbs.migrate_clip_to_cpu()
            self._room_mib = self._manager.get_status().vram.free_mib
        free, promised = self._room_mib, sum(loan.wish.needed_mib for loan in self._loans.values())
        config = self._manager.config
        if free is not None and wish.needed_mib + promised + config.reserve_mib > free:
            lent = f" and {promised:.0f} MiB are lent" if promised else ""
            raise InsufficientVRAM(
                detail=(
                    f"{wish.holder} needs {wish.needed_mib:.0f} MiB and {config.reserve_mib:.0f} MiB are kept in "
                    f"reserve, but only {free:.0f} MiB are free with all of ours given up{lent}"
                ),
                remedy="Ask for less, or wait (wait_s) until others give back.",
                needed_mib=wish.needed_mib,
                free_mib=free - promised,
                reserve_mib=config.reserve_mib,
                holders=tuple(loan.wish.holder for loan in self._loans.values()),
            )
        return free

    def _lend(self, wish: Wish, free_mib: float | None) -> dict[str, Any]:
        loan = _Loan(secrets.token_urlsafe(16), wish, 0.0)
        self._loans[loan.id] = loan
        self._set_alarm(loan)
        log.info("gpu_fsm: the card is lent to %s: %.0f MiB for %g s", wish.holder, wish.needed_mib, wish.ttl_s)
        return {"id": loan.id, **self._state(loan), "free_mib": free_mib}

    def _state(self, loan: _Loan) -> dict[str, Any]:
        status = self._manager.get_status()
        kept = (
            status.execution_mode is ExecutionMode.IDLE
            and status.hold is not Hold.WANTED
            and status.clip_device in ("cpu", "none")
        )
        return {
            "holder": loan.wish.holder,
            "needed_mib": loan.wish.needed_mib,
            "ttl_s": loan.wish.ttl_s,
            "kept": kept,
            "free_mib": status.vram.free_mib,
        }

    def _set_alarm(self, loan: _Loan) -> None:
        if loan.alarm is not None:
            loan.alarm.cancel()
        loan.until = time.monotonic() + loan.wish.ttl_s
        loan.alarm = asyncio.get_running_loop().call_later(loan.wish.ttl_s, self._silent, loan)

    def _silent(self, loan: _Loan) -> None:
        log.warning("gpu_fsm: %s has been silent for %g s: its room goes back", loan.wish.holder, loan.wish.ttl_s)
        self._drop(loan)

    def _find(self, id_: str) -> _Loan:
        loan = self._loans.get(id_)
        if loan is None:
            raise BadArgument(detail="no such lease: it has ended, or never was", remedy="Ask for a new one.")
        return loan

    def _drop(self, loan: _Loan) -> None:
        if self._loans.pop(loan.id, None) is None:
            return
        if loan.alarm is not None:
            loan.alarm.cancel()
        self._changed.set()
        self._take_back_soon()

    async def _pause(self, seconds: float) -> None:
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _take_back_soon(self) -> None:
        if self._before is not None and not self._loans and not self._waiting:
            task = asyncio.get_running_loop().create_task(self._take_back())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _take_back(self) -> None:
        """Ask for the mode that stood before, unless somebody is on the way to the room or has asked for another."""
        async with self._turn:
            if self._before is None or self._loans or self._waiting:
                return
            (mode, clip_up), self._before, self._room_mib = self._before, None, None
            try:
                if self._manager.get_status().asked_mode is not ExecutionMode.IDLE:
                    return
                if mode is not ExecutionMode.IDLE:
                    outcome = await self._manager.aio.set_execution_mode(mode)
                    log.info("gpu_fsm: the card is back; %s is %s", mode.name, outcome.state.name)
                elif clip_up:
                    await self._manager.aio.migrate_clip_to_gpu()
            except GPUFSMError as error:
                log.warning("gpu_fsm: the card is back, but %s could not be restored: %s", mode.name, error)


class ConsiderateManager:
    """The manager for those who ask from outside: while the card is lent, what would take the room is refused."""

    def __init__(self, manager: GPUResourceManager, lender: Lender) -> None:
        self._manager, self._lender = manager, lender

    def set_execution_mode(
        self, mode: ExecutionMode, *, preempt: bool = False, timeout_s: float | None = None
    ) -> Outcome:
        """See the manager's; raises `CardHeld` for another mode than IDLE."""
        if mode is not ExecutionMode.IDLE:
            self._lender.check_free()
        return self._manager.set_execution_mode(mode, preempt=preempt, timeout_s=timeout_s)

    def ensure_vlm_loaded(self, *, timeout_s: float | None = None) -> None:
        """See the manager's; raises `CardHeld`."""
        self._lender.check_free()
        self._manager.ensure_vlm_loaded(timeout_s=timeout_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)
