"""The card as NVML reports it: `VRAMMonitor`, the only importer of `pynvml`.

Three answers are kept apart, since they mean different things to a decision: *absent* (a machine without a GPU:
`present` and `lost` both False), *lost* (a card that was there and has gone) and *unknown* (`present`, but
`free_mib` is None and `detail` says why).  Unknown is never zero, and no number is invented.

Where NVML has no figures, others are asked in this order, and the reading says who answered: the kernel, for memory
that card and CPU share; torch, if this process pays for a context on the card anyway; the size in the settings, which
is labelled an assumption and carries no free memory.

Only `free` and `total` of the first version of the memory call are used: it works on every driver, and `used` means
something else in each version.  NVML holds a lock of the whole driver and can hang with it, so every call runs on one
worker thread and callers wait for it no longer than they said.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import queue
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast

import attrs
from attrs import define, field, frozen

from gpu_fsm.errors import Bucket, ConfigError, one_line
from gpu_fsm.ports import Clock
from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.status import Holder, VRAMInfo

log = logging.getLogger("gpu_fsm")

T = TypeVar("T")

MIB: Final = 1024 * 1024

# nvmlReturn_t, by number: an NVMLError is unhashable and `==` on it can raise, so its integer is all that is used.
UNINITIALIZED: Final = 1
INVALID_ARGUMENT: Final = 2
NOT_SUPPORTED: Final = 3
NO_PERMISSION: Final = 4
NOT_FOUND: Final = 6
DRIVER_NOT_LOADED: Final = 9
LIBRARY_NOT_FOUND: Final = 12
FUNCTION_NOT_FOUND: Final = 13
GPU_IS_LOST: Final = 15
RESET_REQUIRED: Final = 16
LIB_RM_VERSION_MISMATCH: Final = 18
GPU_NOT_FOUND: Final = 28
UNKNOWN: Final = 999
NO_CARDS: Final = -1
"""Not NVML's: the driver is there and counts no card."""

ABSENT: Final = frozenset({DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, NO_CARDS})
LOST: Final = frozenset({GPU_IS_LOST, GPU_NOT_FOUND})
STALE: Final = frozenset({UNKNOWN, UNINITIALIZED})
"""After suspend, a reloaded container or somebody else's shutdown: a fresh init may mend it."""

IN_WORDS: Final = {
    LIBRARY_NOT_FOUND: "no NVIDIA driver library on this machine",
    DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
    NO_CARDS: "the NVIDIA driver sees no card",
    LIB_RM_VERSION_MISMATCH: "the NVIDIA driver was upgraded under the running system: reboot, or reload its modules",
    GPU_IS_LOST: "the GPU fell off the bus",
    GPU_NOT_FOUND: "the GPU is no longer there",
    RESET_REQUIRED: "the GPU must be reset before it can be used",
    NO_PERMISSION: "no permission to read this card; for a MIG slice set gpu_uuid to the slice's own MIG-... UUID",
    UNKNOWN: "the NVIDIA driver failed without saying why; after a suspend, reload the module nvidia_uvm",
    UNINITIALIZED: "another part of this process shut NVML down",
    NOT_SUPPORTED: "the driver does not report memory for this card",
    FUNCTION_NOT_FOUND: "the installed driver is too old for this call",
}

MENDS: Final[dict[int, Bucket]] = {
    LIBRARY_NOT_FOUND: "cpu_only",
    DRIVER_NOT_LOADED: "cpu_only",
    NO_CARDS: "cpu_only",
    LIB_RM_VERSION_MISMATCH: "user",
    GPU_IS_LOST: "restart_process",
    GPU_NOT_FOUND: "restart_process",
    RESET_REQUIRED: "user",
    NO_PERMISSION: "user",
    UNKNOWN: "retry",
    UNINITIALIZED: "retry",
    NOT_SUPPORTED: "settle",
    FUNCTION_NOT_FOUND: "settle",
}
"""What recovery needs, by fault.  `settle`: the figures will not come, so a fixed wait stands for every proof."""
SPACING_S: Final = 0.02
"""Two questions to the driver are at least this far apart, whoever asks: its lock is everybody's, and 50 a second show
every release there is.  A reading that is repeated keeps its time."""
RETRY_S: Final = 30.0
"""Between two tries to open NVML: an init may start the GPU up (1.5 s) and stalls other users of the driver."""
CLOSE_S: Final = 1.0
"""How long `close` waits for a driver that may be hanging."""
MEMINFO: Final = Path("/proc/meminfo")


ProcessView = Callable[[], "tuple[float, float, Literal['card', 'process']] | None"]
"""Total and free memory in MiB, and what they cover; None where this process pays for no context.  Never raises."""


class _Fault(Exception):
    """One NVML failure, translated at the edge."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class _NoAnswer(Exception):
    """The worker did not answer in time, or is still busy with a call that nobody waits for any more."""


@frozen(kw_only=True)
class _Card:
    handle: Any
    uuid: str
    name: str
    total_mib: float | None = None
    slice_of: str = ""
    """The UUID of the card that a MIG slice belongs to."""

    def __str__(self) -> str:
        size = "" if self.total_mib is None else f", {self.total_mib:.0f} MiB"
        return f"{self.uuid} ({self.name}{size})"


@contextlib.contextmanager
def _edge() -> Iterator[Any]:
    """Give the module, and turn everything that it raises into a `_Fault`."""
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError as error:
        raise _Fault(LIBRARY_NOT_FOUND, f"the package nvidia-ml-py is missing ({error})") from None
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        code = int(error.value)
        raise _Fault(code, IN_WORDS.get(code) or one_line(error)) from None
    except (pynvml.NVMLLibraryMismatchError, AttributeError) as error:
        # The mismatch is raised on drivers before R510 and is no NVMLError; an old binding lacks the attribute.
        raise _Fault(FUNCTION_NOT_FOUND, one_line(error) or IN_WORDS[FUNCTION_NOT_FOUND]) from None
    except OSError as error:
        raise _Fault(UNKNOWN, one_line(error)) from None


def _text(value: object) -> str:
    return one_line(value.decode(errors="replace") if isinstance(value, bytes) else value)


@define(eq=False)
class _Job:
    work: Callable[[], Any]
    done: threading.Event = field(factory=threading.Event)
    abandoned: bool = False
    result: Any = None
    error: Exception | None = None


def _drive(jobs: queue.SimpleQueue[_Job | None]) -> None:
    """Run jobs until None arrives.  Knows the queue only, so that a forgotten monitor can be collected."""
    while (job := jobs.get()) is not None:
        if not job.abandoned:
            try:
                job.result = job.work()
            except Exception as error:
                job.error = error
        job.done.set()
        del job


class _Worker:
    """One daemon thread for calls that may hang.  While one hangs, further calls fail at once and start nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._overdue: _Job | None = None
        self._closed = False

    def ask(self, work: Callable[[], T], timeout_s: float) -> T:
        """Run `work` on the worker; raises `_NoAnswer` after `timeout_s`, and what `work` raised."""
        with self._lock:
            if self._closed:
                raise _NoAnswer("closed")
            if self._overdue is not None:
                if not self._overdue.done.is_set():
                    raise _NoAnswer("an earlier call to the NVIDIA driver has not come back yet")
                self._overdue = None
            job = _Job(work)
            self._post(job)
        if not job.done.wait(timeout_s):
            with self._lock:
                job.abandoned = True
                self._overdue = job
            raise _NoAnswer(f"the NVIDIA driver did not answer within {timeout_s:g} s")
        if job.error is not None:
            raise job.error
        return cast(T, job.result)

    def _post(self, job: _Job) -> None:
        if self._thread is None:
            thread = threading.Thread(target=_drive, args=(self._jobs,), name="gpu_fsm-nvml", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # some versions (CPython 3.12) start no thread once the interpreter ends
                raise _NoAnswer("the interpreter is ending") from None
            self._thread = thread
            weakref.finalize(self, self._jobs.put, None)
        self._jobs.put(job)

    def close(self, last: Callable[[], None], timeout_s: float) -> None:
        """Run `last` as the last job, and wait for it no longer than `timeout_s`.  Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._thread is None:
                return
            job = _Job(last)
            self._post(job)
            self._jobs.put(None)
        job.done.wait(timeout_s)


class VRAMMonitor:
    """Reads one NVIDIA card through NVML; a `VRAMProbe`.

    One init is kept for life, the card is addressed by UUID.  The constructor does no I/O; `prepare` opens the driver
    and is the place where an ambiguous machine is refused.
    """

    simulated = False

    def __init__(self, config: GPUResourceConfig, *, clock: Clock) -> None:
        self._clock = clock
        self.process_view: ProcessView | None = None
        """This process's own knowledge of the card, asked where NVML has no figures."""
        self._assumed_mib = config.vram_budget_mib
        self._wanted = (config.gpu_uuid or "").strip()
        self._patience_s = config.observe_timeout_s
        self._visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self._pci_order = os.environ.get("CUDA_DEVICE_ORDER", "").strip() == "PCI_BUS_ID"
        ordinal = re.fullmatch(r"cuda:(\d+)", config.clip_device)
        self._ordinal = int(ordinal[1]) if ordinal else 0
        self._worker = _Worker()
        # All that follows belongs to the worker's thread.
        self._inits = 0
        self._card: _Card | None = None
        self._seen: _Card | None = None
        self._why_closed = VRAMInfo()
        self._open_again_at = float("-inf")
        self._mend_again_at = float("-inf")
        self._last: VRAMInfo | None = None
        self._last_at = float("-inf")

    # --- the port ----------------------------------------------------------------------------------------------------

    def prepare(self, timeout_s: float | None = None) -> VRAMInfo:
        """Open the driver, choose the card and read it.

        Raises `ConfigError`, listing the cards, when several could be meant or the configured one is not there.
        Everything else that can be wrong is in the answer, as with `read`.
        """
        try:
            info = self._worker.ask(self._prepare, self._patience_s if timeout_s is None else timeout_s)
            return self._assume(info)
        except _NoAnswer as silence:
            return self._silent(silence)

    def read(self, timeout_s: float) -> VRAMInfo:
        """Read total and free memory, in MiB.  Never raises, never takes longer than `timeout_s`."""
        try:
            return self._assume(self._worker.ask(self._read_spaced, timeout_s))
        except _NoAnswer as silence:
            return self._silent(silence)
        except ConfigError as error:
            return self._assume(
                VRAMInfo(present=True, detail=one_line(error.summary()), bucket="user", at=self._clock.monotonic())
            )
        except Exception as error:
            log.exception("reading the card failed in an unforeseen way")
            return VRAMInfo(present=True, detail=f"internal error: {one_line(error)}", at=self._clock.monotonic())

    def free_mib(self) -> float | None:
        """Free memory at this moment, by NVML or not at all: for measuring what one action took."""
        try:
            info = self._worker.ask(self._read, self._patience_s)
        except (_NoAnswer, ConfigError):
            return None
        return info.free_mib if info.source == "nvml" else None

    def holders(self) -> tuple[Holder, ...] | None:
        """Who holds memory on the card, largest first, or None where the driver does not tell.

        `mib` is None where it names the process but not its share (WDDM, WSL2, some Linux drivers).  Milliseconds
        under the driver's lock: on demand only.
        """
        try:
            return self._worker.ask(self._holders, self._patience_s)
        except (_NoAnswer, _Fault, ConfigError):
            return None
        except Exception:
            log.exception("asking who holds the card's memory failed in an unforeseen way")
            return None

    def versions(self) -> tuple[str, str]:
        """The driver's version and the newest CUDA that it runs, as text; empty where it does not tell."""
        try:
            return self._worker.ask(self._versions, self._patience_s)
        except (_NoAnswer, _Fault):
            return "", ""

    def close(self) -> None:
        """Give NVML back, once.  A hanging driver is waited for briefly and then left alone."""
        self._worker.close(self._shut, CLOSE_S)

    def _assume(self, info: VRAMInfo) -> VRAMInfo:
        """The size in the settings, where nobody knows better.  Free memory stays unknown here."""
        if not self._assumed_mib or info.total_mib is not None or info.lost:
            return info
        return attrs.evolve(
            info,
            total_mib=self._assumed_mib,
            source="assumed",
            scope="assumed",
            present=True,
            detail=f"vram_budget_mib is assumed: {info.detail}",
            bucket="settle",
        )

    # --- on the worker's thread --------------------------------------------------------------------------------------

    def _prepare(self) -> VRAMInfo:
        self._open_again_at = float("-inf")
        if self._card is None:
            try:
                self._open()
            except _Fault as fault:
                return self._verdict(fault)
        return self._read()

    def _read_spaced(self) -> VRAMInfo:
        if self._last is None or not 0 <= self._clock.monotonic() - self._last_at < SPACING_S:
            self._last = None
            self._last = self._read()
            self._last_at = self._clock.monotonic()
        return self._last

    def _read(self) -> VRAMInfo:
        info = self._read_driver()
        if info.free_mib is not None or info.lost or self.process_view is None:
            return info
        view = self.process_view()
        if view is None:
            return info
        total_mib, free_mib, scope = view
        return attrs.evolve(
            info, total_mib=total_mib, free_mib=free_mib, source="torch", scope=scope, present=True, bucket="none"
        )

    def _read_driver(self) -> VRAMInfo:
        if self._card is None:
            if self._clock.monotonic() < self._open_again_at:
                return attrs.evolve(self._why_closed, at=self._clock.monotonic())
            try:
                self._open()
            except _Fault as fault:
                return self._verdict(fault)
        try:
            return self._memory()
        except _Fault as fault:
            if fault.code not in STALE or self._clock.monotonic() < self._mend_again_at:
                return self._verdict(fault)
        # One fresh init per fault, then patience: an init for every sample would stall everybody who uses the driver.
        self._mend_again_at = self._clock.monotonic() + RETRY_S
        self._shut()
        try:
            self._open()
            return self._memory()
        except _Fault as fault:
            return self._verdict(fault)

    def _memory(self) -> VRAMInfo:
        card = self._card
        assert card is not None
        try:
            with _edge() as nvml:
                memory = nvml.nvmlDeviceGetMemoryInfo(card.handle)
                total_mib, free_mib = memory.total / MIB, memory.free / MIB
        except _Fault as fault:
            if fault.code == NOT_SUPPORTED:
                return self._unified(card, fault)
            raise
        if not (total_mib > 0 and 0 <= free_mib <= total_mib):
            raise _Fault(NOT_SUPPORTED, f"the driver reports {free_mib:.0f} MiB free of {total_mib:.0f} MiB")
        return VRAMInfo(
            total_mib=total_mib,
            free_mib=free_mib,
            source="nvml",
            scope="card",
            device_uuid=card.uuid,
            name=card.name,
            present=True,
            at=self._clock.monotonic(),
        )

    def _unified(self, card: _Card, fault: _Fault) -> VRAMInfo:
        """Memory shared with the CPU (GB10, Jetson): the kernel's figures stand for the card's."""
        figures: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError):
            for line in MEMINFO.read_text("ascii", errors="replace").splitlines():
                key, _, value = line.partition(":")
                if key in ("MemTotal", "MemAvailable"):
                    figures[key] = int(value.split()[0]) / 1024
        if len(figures) < 2:
            raise fault
        return VRAMInfo(
            total_mib=figures["MemTotal"],
            free_mib=figures["MemAvailable"],
            source="unified",
            scope="card",
            device_uuid=card.uuid,
            name=card.name,
            present=True,
            detail="memory is shared with the CPU; free is what the kernel calls available",
            at=self._clock.monotonic(),
        )

    def _verdict(self, fault: _Fault) -> VRAMInfo:
        """Put a fault into the caller's words: absent, lost or unknown."""
        lost = fault.code in LOST or (fault.code in ABSENT and self._seen is not None)
        seen = self._seen
        info = VRAMInfo(
            device_uuid=seen.uuid if seen else "",
            name=seen.name if seen else "",
            present=not lost and fault.code not in ABSENT,
            lost=lost,
            detail=fault.text,
            bucket="restart_process" if lost else MENDS.get(fault.code, "retry"),
            at=self._clock.monotonic(),
        )
        if self._card is None:
            self._why_closed = info
        return info

    def _silent(self, silence: _NoAnswer) -> VRAMInfo:
        # `_seen` is only read here: a stale value costs a name in a status, nothing more.
        seen = self._seen
        return self._assume(
            VRAMInfo(
                device_uuid=seen.uuid if seen else "",
                name=seen.name if seen else "",
                present=True,
                detail=str(silence),
                bucket="retry",
                at=self._clock.monotonic(),
            )
        )

    def _open(self) -> None:
        """Init NVML and choose the card.  On failure nothing stays open, and the next try is `RETRY_S` away."""
        self._open_again_at = self._clock.monotonic() + RETRY_S
        with _edge() as nvml:
            nvml.nvmlInit()
            self._inits += 1
        try:
            card = self._choose(self._seen.uuid if self._seen else self._wanted)
        except _Fault:
            self._shut()
            raise
        except ConfigError as error:
            self._shut()
            self._why_closed = VRAMInfo(present=True, detail=one_line(error.summary()), bucket="user")
            raise
        self._card = self._seen = card

    def _shut(self) -> None:
        self._card = None
        while self._inits:
            self._inits -= 1
            with contextlib.suppress(_Fault), _edge() as nvml:
                nvml.nvmlShutdown()

    def _holders(self) -> tuple[Holder, ...]:
        self._read_spaced()
        if self._card is None:
            raise _Fault(UNINITIALIZED, "no card")
        shares: dict[int, float | None] = {}
        lists = 0
        refusal: _Fault | None = None
        for call in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
            try:
                with _edge() as nvml:
                    processes = getattr(nvml, call)(self._card.handle)
            except _Fault as fault:
                refusal = fault
                continue
            lists += 1
            for process in processes:
                pid, used = int(process.pid), process.usedGpuMemory
                mib = None if used is None else used / MIB
                known = shares.get(pid)
                # A process in both lists is told twice with the same share, not with two.
                shares[pid] = mib if known is None else max(known, mib or 0.0)
        if not lists and refusal is not None:
            raise refusal
        found = [Holder(pid=pid, name=self._process_name(pid), mib=mib) for pid, mib in shares.items()]
        return tuple(sorted(found, key=lambda holder: (-(holder.mib or 0.0), holder.pid)))

    def _versions(self) -> tuple[str, str]:
        driver = cuda = ""
        with _edge() as nvml:
            nvml.nvmlInit()  # NVML counts: it may be open for our card, and then stays so
        try:
            with contextlib.suppress(_Fault), _edge() as nvml:
                driver = _text(nvml.nvmlSystemGetDriverVersion())
            with contextlib.suppress(_Fault), _edge() as nvml:
                number = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
                cuda = f"{number // 1000}.{number % 1000 // 10}"
        finally:
            with contextlib.suppress(_Fault), _edge() as nvml:
                nvml.nvmlShutdown()
        return driver, cuda

    def _process_name(self, pid: int) -> str:
        with contextlib.suppress(_Fault), _edge() as nvml:
            return re.split(r"[/\\]", _text(nvml.nvmlSystemGetProcessName(pid)))[-1]
        return ""

    # --- which card --------------------------------------------------------------------------------------------------

    def _choose(self, wanted: str) -> _Card:
        """Find the card: configured, then CUDA_VISIBLE_DEVICES by UUID, then the only one, then its integers."""
        if wanted:
            return self._named(wanted, source="gpu_uuid")
        cards = self._cards()
        entry = self._visible_entry()
        if entry.startswith(("GPU-", "MIG-")):
            return self._named(entry, source="CUDA_VISIBLE_DEVICES")
        if len(cards) == 1:
            return self._whole_or_slice(cards[0])
        index = self._ordinal if self._visible is None else (int(entry) if entry.isdigit() else None)
        alike = len({(card.name, card.total_mib) for card in cards}) == 1
        if index is not None and index < len(cards) and (self._pci_order or (alike and self._visible is not None)):
            return self._whole_or_slice(cards[index])
        raise self._ambiguous(cards)

    def _visible_entry(self) -> str:
        """The entry of CUDA_VISIBLE_DEVICES that stands for CLIP's device; empty where there is none."""
        entries = [entry.strip() for entry in (self._visible or "").split(",")]
        return entries[self._ordinal] if self._ordinal < len(entries) else ""

    def _cards(self) -> list[_Card]:
        with _edge() as nvml:
            count = int(nvml.nvmlDeviceGetCount())
        if not count:
            raise _Fault(NO_CARDS, IN_WORDS[NO_CARDS])
        cards = []
        trouble: _Fault | None = None
        for index in range(count):
            try:
                with _edge() as nvml:
                    handle = nvml.nvmlDeviceGetHandleByIndex(index)
                cards.append(self._card_of(handle))
            except _Fault as fault:
                # Another container's card; CUDA does not count it either.  Any other gap would shift the integers.
                if fault.code != NO_PERMISSION:
                    raise
                trouble = fault
        if not cards and trouble is not None:
            raise trouble
        return cards

    def _card_of(self, handle: Any, slice_of: str = "") -> _Card:
        with _edge() as nvml:
            uuid, name = _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle))
        total_mib = None
        with contextlib.suppress(_Fault), _edge() as nvml:
            total_mib = nvml.nvmlDeviceGetMemoryInfo(handle).total / MIB
        return _Card(handle=handle, uuid=uuid, name=name, total_mib=total_mib, slice_of=slice_of)

    def _slices(self, card: _Card) -> list[_Card]:
        """The MIG slices of a card; empty where it is not divided."""
        slices: list[_Card] = []
        try:
            with _edge() as nvml:
                if not nvml.nvmlDeviceGetMigMode(card.handle)[0]:
                    return []
                places = int(nvml.nvmlDeviceGetMaxMigDeviceCount(card.handle))
        except _Fault:
            return []
        for place in range(places):
            with contextlib.suppress(_Fault):  # an empty place answers Not Found
                with _edge() as nvml:
                    handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(card.handle, place)
                slices.append(self._card_of(handle, slice_of=card.uuid))
        return slices

    def _whole_or_slice(self, card: _Card) -> _Card:
        """A divided card's own figures are the whole card's and not ours to use: take its only slice."""
        slices = self._slices(card)
        if len(slices) > 1:
            raise self._ambiguous(slices)
        return slices[0] if slices else card

    def _named(self, name: str, *, source: str) -> _Card:
        """Find a card by UUID, by the beginning of one, or by PCI bus id."""
        is_uuid = name.upper().startswith(("GPU-", "MIG-"))
        try:
            with _edge() as nvml:
                handle = nvml.nvmlDeviceGetHandleByUUID(name) if is_uuid else nvml.nvmlDeviceGetHandleByPciBusId(name)
            return self._card_of(handle)
        except _Fault as fault:
            if fault.code not in (NOT_FOUND, INVALID_ARGUMENT, NOT_SUPPORTED, FUNCTION_NOT_FOUND):
                raise
        cards = self._cards()
        everything = [*cards, *(piece for card in cards for piece in self._slices(card))]
        matches = [card for card in everything if is_uuid and card.uuid.upper().startswith(name.upper())]
        if len(matches) == 1:
            return matches[0]
        if self._seen is not None and not matches:
            raise _Fault(GPU_NOT_FOUND, IN_WORDS[GPU_NOT_FOUND])
        raise ConfigError(
            name="gpu_uuid",
            value=name,
            source="settings" if source == "gpu_uuid" else source,
            detail=f"{one_line(name)} {'fits several cards' if matches else 'is no card here'}; "
            f"there are: {'; '.join(map(str, matches or everything))}",
            remedy="Set gpu_uuid to one of these UUIDs.",
        )

    def _ambiguous(self, cards: list[_Card]) -> ConfigError:
        given = "" if self._visible is None else f" and CUDA_VISIBLE_DEVICES={one_line(self._visible)} does not decide"
        return ConfigError(
            name="gpu_uuid",
            source="settings",
            detail=f"several cards could be meant{given}: {'; '.join(map(str, cards))}",
            remedy="Set gpu_uuid to the UUID of the card that Ollama and CLIP use.",
        )
