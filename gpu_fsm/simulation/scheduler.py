"""The scheduler behind the simulated Ollama: runners, one load at a time, eviction, expiry, memory.

It speaks of exchanges only to answer them; routes and words are in `ollama.py`.  Everything runs under the clock's
`turn`.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any

from attrs import define, field, frozen

from gpu_fsm.simulation.card import Card, CardFull
from gpu_fsm.simulation.clock import Appointment, WorldClock
from gpu_fsm.simulation.faults import Fault, Faults
from gpu_fsm.simulation.wire import AT_ONCE, FOREVER, Exchange, Refusal, short_name

MIB = 1024 * 1024
RUNNER_OPTIONS = ("num_ctx", "num_gpu", "num_batch", "main_gpu", "use_mmap", "num_thread", "draft_num_predict", "shift")
"""Another value of one of these is another runner; sampling options are not."""

_POLL_S = 0.25
"""The server looks at a loading runner, and at memory that should come back, this often."""
_PINGS_S = 20.0
"""How long the server tries to reach a frozen runner before it takes another one: two pings."""
_RECOVERY_S = 5.0
"""How long a load waits for the memory of the last runner to come back."""


@frozen
class _Texts:
    """What the server says when a runner fails."""

    oom: str
    cpu_oom: str
    killed: str
    eof: str


_TEXTS = _Texts(
    oom="llama-server process has terminated: exit status 1: ggml_backend_cuda_buffer_type_alloc_buffer: "
    "allocating on device 0: cudaMalloc failed: out of memory",
    cpu_oom="llama-server process has terminated: exit status 1: ggml_aligned_malloc: insufficient memory "
    "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache",
    killed="llama-server process has terminated: signal: killed",
    eof="an error was encountered while running the model: unexpected EOF",
)
_OLD_TEXTS = _Texts(
    oom="llama runner process has terminated: cudaMalloc failed: out of memory",
    cpu_oom="model requires more system memory ({:.1f} GiB) than is available ({:.1f} GiB)",
    killed="llama runner process has terminated with exit code -1",
    eof="model runner has unexpectedly stopped, this may be due to resource limitations or an internal error, "
    "check ollama server logs for details",
)
BUSY_TEXT = "server busy, please try again.  maximum pending requests exceeded"


@frozen(kw_only=True)
class SimulatedModel:
    """A model on the server's disk."""

    name: str
    size_mib: float = 5000.0
    """What it takes where it runs, at its default context."""
    disk_mib: float | None = None
    """None: the same as `size_mib`."""
    load_s: float = 4.0
    digest: str = ""
    """The manifest's digest; empty: made from the name."""
    blob: str = ""
    """The weights: names with the same blob share one runner; empty: its own."""
    capabilities: tuple[str, ...] = ("completion", "vision")
    family: str = "qwen25vl"
    parameter_size: str = "7.6B"
    quantization: str = "Q4_K_M"
    trained_context: int = 131072
    default_context: int = 4096
    kv_bytes_per_token: int = 57344
    layers: int = 28
    width: int = 3584
    """The embedding's length."""
    heads: int = 28
    kv_heads: int = 4
    feed_forward: int = 18944
    vocabulary: int = 152064
    in_process: bool = True
    """Run by 0.24's own engine, which lists a model while it still loads."""

    def normal(self) -> SimulatedModel:
        """The same with the name in its short form and every gap filled."""
        name = short_name(self.name)
        return SimulatedModel(
            name=name,
            size_mib=self.size_mib,
            disk_mib=self.size_mib if self.disk_mib is None else self.disk_mib,
            load_s=self.load_s,
            digest=self.digest or hashlib.sha256(f"manifest {name}".encode()).hexdigest(),
            blob=self.blob or hashlib.sha256(f"weights {name}".encode()).hexdigest(),
            capabilities=self.capabilities,
            family=self.family,
            parameter_size=self.parameter_size,
            quantization=self.quantization,
            trained_context=self.trained_context,
            default_context=min(self.default_context, self.trained_context),
            kv_bytes_per_token=self.kv_bytes_per_token,
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            feed_forward=self.feed_forward,
            vocabulary=self.vocabulary,
            in_process=self.in_process,
        )

    def tensors(self) -> dict[str, list[int]]:
        """The weights by name, with their shapes, as a transformer of this architecture has them."""
        wide, kv = self.width, self.width // self.heads * self.kv_heads
        block = {
            "attn_k": [wide, kv],
            "attn_norm": [wide],
            "attn_output": [wide, wide],
            "attn_q": [wide, wide],
            "attn_v": [wide, kv],
            "ffn_down": [self.feed_forward, wide],
            "ffn_gate": [wide, self.feed_forward],
            "ffn_norm": [wide],
            "ffn_up": [wide, self.feed_forward],
        }
        ends = {"output": [wide, self.vocabulary], "output_norm": [wide], "token_embd": [wide, self.vocabulary]}
        blocks = {f"blk.{i}.{name}": shape for i in range(self.layers) for name, shape in block.items()}
        return {f"{name}.weight": shape for name, shape in (ends | blocks).items()}

    def needs_mib(self, context: int) -> float:
        """What it takes with a context of so many tokens."""
        return max(0.0, self.size_mib + (context - self.default_context) * self.kv_bytes_per_token / MIB)


@define(eq=False)
class Job:
    """A request that needs a runner."""

    exchange: Exchange
    model: SimulatedModel
    options: dict[str, Any]
    keep_s: float | None
    ready: Callable[[Runner], None]
    fault: Fault | None = None
    retried: bool = False


@define(eq=False)
class Runner:
    """A process that serves one model, from the begin of its load to its end."""

    model: SimulatedModel
    options: dict[str, Any]
    context: int
    size_mib: float
    vram_mib: float
    number: int
    keep_s: float = 300.0
    held_mib: float = 0.0
    refs: int = 0
    alive: bool = True
    exiting: bool = False
    expires_ns: int = 0
    timer: Appointment | None = None
    leaks: bool = False
    """Its memory does not come back before the faults are healed."""
    marked: bool = False
    """Chosen for eviction."""
    stays_until: float = 0.0
    frozen: bool = False
    """The process is stopped: it holds its memory and answers nothing."""
    pinged: bool = False
    """A request waits for the server to find that out."""
    running: list[Work] = field(factory=list)
    waiting: deque[Work] = field(factory=deque)

    @property
    def owner(self) -> str:
        return f"ollama:{self.model.name}#{self.number}"


@define(eq=False)
class Load:
    """The load that is under way."""

    job: Job
    runner: Runner
    started_at: float
    fails: str = ""
    next: Appointment | None = None
    leaving: bool = False
    listed: bool = False
    unloads: list[Callable[[], None]] = field(factory=list)


@define(eq=False)
class Work:
    """A generation on a runner."""

    exchange: Exchange
    runner: Runner
    start: Callable[[], None]
    fail: Callable[[], None]
    next: Appointment | None = None


class Scheduler:
    """Which models are resident, which is coming and which is going.  Times in seconds, sizes in MiB."""

    def __init__(
        self,
        *,
        clock: WorldClock,
        card: Card | None,
        faults: Faults,
        old: bool,
        reclaim_s: float,
        unload_s: float,
        default_keep_alive_s: float,
        max_loaded: int,
        max_queue: int,
        fit_margin_mib: float,
        host_mib: float,
    ) -> None:
        self.clock = clock
        self.card = card
        self.faults = faults
        self.old = old
        self._texts = _OLD_TEXTS if old else _TEXTS
        """Behave as 0.24: a loading model of its own engine is listed, and `/api/ps` never waits."""
        self.reclaim_s = reclaim_s
        self.unload_s = unload_s
        self.default_keep_alive_s = default_keep_alive_s
        self.max_loaded = max_loaded
        self.max_queue = max_queue
        self.fit_margin_mib = fit_margin_mib
        """What the automatic fit leaves free.  The real runner leaves 1024; with 0 a load gets the room that a test
        sees."""
        self.host_mib = host_mib
        self.counts: Counter[str] = Counter()
        """`loads`, `load_failures`, `load_aborts`, `unloads` (any runner's exit), `evictions`, `reloads`, `expiries`,
        `generations`."""
        self.on_io: Callable[[str, str], None] | None = None
        """Called with (operation, phase); from here with `during` at every quarter of a load."""
        self.up = True
        self.models: dict[str, SimulatedModel] = {}
        self._runners: list[Runner] = []
        self._queue: deque[Job] = deque()
        self._load: Load | None = None
        self._pumping: Appointment | None = None
        self._recovery: tuple[float, float] | None = None
        """Until when, and until how much is free, the next load waits for memory to come back."""
        self._ps_waiting: list[Exchange] = []
        self._ps_body: bytes | None = None
        self._numbers = 1000

    def add_model(self, model: SimulatedModel) -> SimulatedModel:
        """Put a model on the disk (or replace the one of that name); returns it with its gaps filled."""
        model = model.normal()
        self.models[model.name.casefold()] = model
        return model

    def loaded(self) -> tuple[str, ...]:
        """The truth: names of the models whose runner lives and is ready."""
        return tuple(r.model.name for r in self._runners if r.alive and not r.exiting)

    def loading(self) -> str | None:
        """The truth: the model that is being loaded now."""
        return self._load.runner.model.name if self._load else None

    def resident_mib(self, name: str) -> float:
        """The truth: what runners of this model, loaded or loading, hold on the card now."""
        name = short_name(name)
        runners = [*self._runners, *([self._load.runner] if self._load else [])]
        return sum(r.held_mib for r in runners if r.model.name == name)

    def processes(self) -> tuple[int, ...]:
        """The truth: process numbers of the runners that live, loaded or loading."""
        runners = [*self._runners, *([self._load.runner] if self._load else [])]
        return tuple(r.number for r in runners if r.alive)

    def running(self) -> int:
        """How many generations are in flight."""
        return sum(len(r.running) + len(r.waiting) for r in self._runners)

    def kill_runner(self, name: str | None = None) -> bool:
        """Kill the process behind a model (None: any), loaded or loading; False if there is none.

        A loaded one stays listed until somebody asks for it; what it held comes back after `reclaim_s`.
        """
        with self.clock.turn:
            wanted = None if name is None else short_name(name)
            load = self._load
            if load is not None and wanted in (None, load.runner.model.name):
                self._fail_load(load, 500, self._texts.killed)
                return True
            for runner in self._runners:
                if wanted in (None, runner.model.name) and runner.alive and not runner.exiting:
                    self._die(runner)
                    return True
            return False

    def freeze_runner(self, name: str) -> bool:
        """Stop the process of a loaded model; False if there is none.

        What runs on it hangs until its client leaves.  The next request for it finds out after 20 s, during which
        `/api/ps` blocks, and then loads it anew.
        """
        with self.clock.turn:
            runner = self._runner_named(name)
            if runner is None or not runner.alive or runner.exiting:
                return False
            runner.frozen = True
            for work in runner.running:
                if work.next is not None:
                    work.next.cancel()
            return True

    def _expire(self, model: SimulatedModel, fault: Fault | None = None) -> None:
        """Mark a runner for going; a busy one goes when its last request ends."""
        runner = self._runner_of(model)
        if runner is None or runner.exiting:
            return
        runner.keep_s = 0.0
        if fault is not None and fault.kind == "reclaim_never":
            runner.leaks = True
        if fault is not None and fault.kind == "late":
            runner.stays_until = self.clock.monotonic() + fault.delay_s
        self._set_expiry(runner)
        if runner.refs == 0:
            self._arm_expiry(runner)

    def _need(self, job: Job) -> None:
        """Serve the job from a runner that is there and fits, else queue it."""
        runner = self._runner_of(job.model)
        if runner is not None and runner.alive and not (runner.exiting or runner.frozen) and self._matches(runner, job):
            self._serve(runner, job)
            return
        if len(self._queue) >= self.max_queue:
            raise Refusal(503, BUSY_TEXT)
        self._queue.append(job)
        job.exchange.on_leave = lambda: self._left(job)
        self._pump()

    def _left(self, job: Job) -> None:
        load = self._load
        if load is not None and load.job is job:
            if not load.leaving:
                load.leaving = True
                elapsed = self.clock.monotonic() - load.started_at
                self.clock.after(_POLL_S - elapsed % _POLL_S, lambda: self._abort_load(load))
        elif job in self._queue:
            self._queue.remove(job)

    def _pump(self) -> None:
        """Go on with the queue, one load at a time."""
        while self._queue and self._load is None and self.up:
            job = self._queue[0]
            runner = self._runner_of(job.model)
            if runner is not None and runner.exiting:
                return
            if runner is not None and runner.frozen:
                if not runner.pinged:
                    runner.pinged = True
                    self.clock.after(_PINGS_S, partial(self._given_up, runner))
                return
            if runner is not None and runner.alive and self._matches(runner, job):
                self._queue.popleft()
                self._serve(runner, job)
                continue
            if runner is not None:
                if runner.refs == 0:
                    self.counts["reloads"] += 1
                    self._exit(runner)
                return
            if any(r.exiting for r in self._runners) or not self._recovered():
                return
            if len(self._runners) >= self.max_loaded or not self._fits_beside(job):
                self._evict()
                return
            self._queue.popleft()
            self._begin_load(job)

    def _given_up(self, runner: Runner) -> None:
        """No ping came back: what hangs on the runner fails, and it is killed."""
        if runner in self._runners and not runner.exiting:
            for work in (*runner.running, *runner.waiting):
                work.fail()
            runner.running.clear()
            runner.waiting.clear()
            runner.refs = 0
            self._exit(runner)

    def _recovered(self) -> bool:
        if self._recovery is None or self.card is None:
            return True
        until, wanted_free = self._recovery
        if self.card.free_mib >= wanted_free or self.clock.monotonic() >= until:
            self._recovery = None
            return True
        if self._pumping is None or not self._pumping.pending:
            self._pumping = self.clock.after(_POLL_S, self._pump)
        return False

    def _fits_beside(self, job: Job) -> bool:
        if not self._runners:
            return True
        need = job.model.needs_mib(context_of(job.options, job.model))
        if self.card is None or job.options.get("num_gpu") == 0:
            return need <= 0.8 * (self.host_mib - sum(r.size_mib for r in self._runners))
        if not any(r.vram_mib for r in self._runners):
            return True
        return need <= 0.8 * self.card.free_mib

    def _evict(self) -> None:
        """Take the idle runner with the shortest keep_alive, else wait for the one that would go first."""
        idle = [r for r in self._runners if r.refs == 0 and not r.pinged]
        victim = min(idle or self._runners, key=lambda r: (r.keep_s, r.model.blob))
        if not victim.marked:
            victim.marked = True
            self.counts["evictions"] += 1
        if victim.refs:
            victim.keep_s = 0.0
            self._set_expiry(victim)
        else:
            self._exit(victim)

    def _begin_load(self, job: Job) -> None:
        context = context_of(job.options, job.model)
        need = job.model.needs_mib(context)
        num_gpu = job.options.get("num_gpu", -1)
        vram, fails = 0.0, ""
        if self.card is None or self.card.lost or num_gpu == 0:
            used = sum(r.size_mib for r in self._runners)
            if need > self.host_mib - used:
                fails = self._texts.cpu_oom.format(need / 1024, (self.host_mib - used) / 1024)
        else:
            free = max(0.0, self.card.free_mib - self.fit_margin_mib)
            vram = min(need, free)
            spare = self.host_mib - sum(r.size_mib - r.vram_mib for r in self._runners)
            if vram < need and num_gpu > 0:
                fails = self._texts.oom
            elif need - vram > spare:
                fails = self._texts.cpu_oom.format(need / 1024, (free + spare) / 1024)
        fault = job.fault
        if fault is not None and fault.kind == "oom":
            fails = str(fault.args.get("text", self._texts.oom))
        elif fault is not None and fault.kind == "runner_dies":
            fails = self._texts.killed
        elif fault is not None and fault.kind == "partial":
            vram = min(vram, need * float(fault.args.get("share", 0.5)))
        self._numbers += 1
        runner = Runner(job.model, job.options, context, need, vram, self._numbers)
        load = Load(job, runner, self.clock.monotonic(), fails)
        self._load = load
        self._load_step(load, 0)

    def _load_step(self, load: Load, step: int) -> None:
        """A quarter of the load is done: a quarter of the memory is taken."""
        runner = load.runner
        if step:
            try:
                self._take(runner, runner.vram_mib / 4)
            except CardFull:
                self._load_failed(load, self._texts.oom)
                return
            if self.old and runner.model.in_process and not load.listed:
                load.listed = True
                runner.expires_ns = self._now_ns() + int(self.default_keep_alive_s * 1e9)
                self._touch()
        if load.fails and step == 2:
            self._load_failed(load, load.fails)
            return
        if self.on_io is not None:
            self.on_io("ollama.load", "during")
            if self._load is not load:
                return
        if step == 4:
            self._loaded(load)
            return
        load.next = self.clock.after(runner.model.load_s / 4, lambda: self._load_step(load, step + 1))

    def _loaded(self, load: Load) -> None:
        runner = load.runner
        self._load = None
        self._runners.append(runner)
        self.counts["loads"] += 1
        runner.keep_s = self.default_keep_alive_s
        self._touch()
        if load.job.exchange.closed:  # its client left within the last poll interval
            if load.job.keep_s is not None:
                runner.keep_s = load.job.keep_s
            runner.refs += 1
            self._done(runner)
        else:
            self._serve(runner, load.job)
        for unload in load.unloads:
            unload()
        self._pump()

    def _load_failed(self, load: Load, text: str) -> None:
        """Out of memory evicts everybody else and is tried once more; anything else is final."""
        memory = text != self._texts.killed
        others = [r for r in self._runners if not r.exiting]
        if memory and others:
            self._drop_load(load)
            for runner in others:
                self.counts["evictions"] += 1
                if runner.refs:
                    runner.keep_s = 0.0
                else:
                    self._exit(runner)
            if not load.job.retried:
                load.job.retried = True
                if not (load.job.fault is not None and load.job.fault.kind == "oom"):
                    self._queue.appendleft(load.job)
                    self._pump()
                    return
            self.counts["load_failures"] += 1
            load.job.exchange.json(500, {"error": text})
            self._pump()
            return
        self._fail_load(load, 500, text)

    def _fail_load(self, load: Load, status: int, text: str) -> None:
        self.counts["load_failures"] += 1
        self._drop_load(load)
        load.job.exchange.json(status, {"error": text})
        for unload in load.unloads:
            unload()
        self._pump()

    def _abort_load(self, load: Load) -> None:
        if self._load is load:
            self.counts["load_aborts"] += 1
            self._drop_load(load)
            self._pump()

    def _drop_load(self, load: Load) -> None:
        if load.next is not None:
            load.next.cancel()
        self._load = None
        load.runner.alive = False
        self._start_recovery(load.runner)
        self._release(load.runner)
        self._touch()

    def _serve(self, runner: Runner, job: Job) -> None:
        runner.refs += 1
        if job.keep_s is not None:
            runner.keep_s = job.keep_s
        if runner.expires_ns == 0:
            self._set_expiry(runner)  # the server sets it when the runner is idle first, and until then reckons so
        self._forget_timers(runner)
        job.exchange.on_leave = None
        if job.fault is not None and job.fault.kind == "runner_dies" and job.fault.op == "ollama.renew":
            job.exchange.json(500, {"error": self._texts.killed})
            runner.refs -= 1
            self._die(runner)
            return
        job.ready(runner)

    def _done(self, runner: Runner) -> None:
        """A request on this runner has ended."""
        runner.refs -= 1
        if runner.refs or runner not in self._runners:
            return
        self._set_expiry(runner)
        self._arm_expiry(runner)
        if self._queue:
            self._pump()

    def _arm_expiry(self, runner: Runner) -> None:
        self._forget_timers(runner)
        if runner.keep_s < FOREVER:
            # An unload is acknowledged before the scheduler gets to it: a /api/ps in between still lists the model.
            due = self.clock.monotonic() + max(runner.keep_s, 0.002)
            runner.timer = self.clock.at(max(due, runner.stays_until), lambda: self._expired(runner))

    def _expired(self, runner: Runner) -> None:
        if runner.refs == 0 and not runner.exiting and runner in self._runners:
            if runner.keep_s > 0:
                self.counts["expiries"] += 1
            self._exit(runner)

    def _exit(self, runner: Runner) -> None:
        """Kill the process, wait for it, take it off the list; its memory comes back later."""
        if runner.exiting:
            return
        runner.exiting = True
        self._forget_timers(runner)
        self.clock.after(self.unload_s if runner.alive else 0.003, lambda: self._gone(runner))

    def _gone(self, runner: Runner) -> None:
        if runner not in self._runners:
            return
        self._runners.remove(runner)
        self.counts["unloads"] += 1
        self._start_recovery(runner)
        if runner.alive:
            runner.alive = False
            self._release(runner)
        self._touch()
        if not any(r.exiting for r in self._runners):
            waiting, self._ps_waiting = self._ps_waiting, []
            for exchange in waiting:
                self._answer_ps(exchange)
        self._pump()

    def _die(self, runner: Runner) -> None:
        """The process is dead; the server does not notice before somebody asks for the model."""
        runner.alive = False
        self._release(runner)
        self._forget_timers(runner)
        for work in (*runner.running, *runner.waiting):
            if work.next is not None:
                work.next.cancel()
            work.fail()
            runner.refs -= 1
        runner.running.clear()
        runner.waiting.clear()
        if self._queue:
            self._pump()

    def _start_recovery(self, runner: Runner) -> None:
        if self.card is not None and runner.held_mib:
            self._recovery = (self.clock.monotonic() + _RECOVERY_S, self.card.free_mib + 0.75 * runner.held_mib)

    def _take(self, runner: Runner, mib: float) -> None:
        if self.card is not None and mib > 0:
            self.card.take(runner.owner, mib, pid=runner.number, name="llama-server")
            runner.held_mib += mib

    def _release(self, runner: Runner) -> None:
        if self.card is not None and runner.held_mib:
            runner.held_mib = 0.0
            if runner.leaks:
                card, owner = self.card, runner.owner
                card.leave_list(owner)
                self.faults.on_heal(lambda: card.release_after(owner, self.reclaim_s))
            else:
                self.card.release_after(runner.owner, self.reclaim_s)

    def _runner_of(self, model: SimulatedModel) -> Runner | None:
        for runner in self._runners:
            if runner.model.blob == model.blob:
                return runner
        return None

    def _runner_named(self, name: Any) -> Runner | None:
        try:
            model = self.models.get(short_name(name).casefold()) if isinstance(name, str) else None
        except Refusal:
            return None
        return None if model is None else self._runner_of(model)

    def _matches(self, runner: Runner, job: Job) -> bool:
        have, want = runner.options, job.options
        if runner.context != context_of(want, job.model):
            return False
        num_gpu = want.get("num_gpu", -1)
        if num_gpu >= 0 and num_gpu != have.get("num_gpu", -1):
            return False
        return all(have.get(key) == want.get(key) for key in RUNNER_OPTIONS if key not in ("num_ctx", "num_gpu"))

    def _set_expiry(self, runner: Runner) -> None:
        keep_s = runner.keep_s
        ahead = 2**63 - 1 if keep_s == FOREVER else 0 if keep_s == AT_ONCE else int(keep_s * 1e9)
        runner.expires_ns = self._now_ns() + ahead
        self._touch()

    def _forget_timers(self, runner: Runner) -> None:
        if runner.timer is not None:
            runner.timer.cancel()
            runner.timer = None

    def _touch(self) -> None:
        self._ps_body = None

    def _now_ns(self) -> int:
        return int(self.clock.monotonic() * 1e9)

    def _answer_ps(self, exchange: Exchange) -> None:
        """Answer a `/api/ps` that had to wait."""
        raise NotImplementedError


def context_of(options: dict[str, Any], model: SimulatedModel) -> int:
    """Tokens of context that a runner with these options has."""
    return min(int(options.get("num_ctx", model.default_context)), model.trained_context)
