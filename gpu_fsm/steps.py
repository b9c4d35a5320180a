"""Acting: what the four steps do to the world, through the ports, and how each proves what it did.

Every method either does its whole part, or says `aborted` because something newer or a lease won, or raises an error of
`gpu_fsm.errors`.  Nothing is acquired once a newer request waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import attrs

from gpu_fsm import errors
from gpu_fsm.errors import GPUFSMError
from gpu_fsm.events import Event, ForeignEvicted
from gpu_fsm.guards import PROOF, Snapshot
from gpu_fsm.leases import LeaseBook
from gpu_fsm.observer import Observer, ollama_pids
from gpu_fsm.ports import CLIPHost, Clock, Interrupt, VLMServer, VRAMProbe
from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.status import Answer, LoadedModel, Residency, VRAMInfo

log = logging.getLogger("gpu_fsm")

SURE_S = 0.5
"""What became of an aborted load is known when Ollama said the same for this long: it polls its runner every 0.25 s."""

End = Literal["step_done", "aborted"]


class Steps:
    """The engine's hands."""

    def __init__(
        self,
        config: GPUResourceConfig,
        *,
        server: VLMServer,
        clip: CLIPHost,
        probe: VRAMProbe,
        clock: Clock,
        leases: LeaseBook,
        observer: Observer,
        superseded: Callable[[], bool],
        tell: Callable[[Event], None],
    ) -> None:
        self._config, self._server, self._clip, self._probe, self._clock = config, server, clip, probe, clock
        self._leases, self._observer, self._superseded, self._tell = leases, observer, superseded, tell
        self.released = False
        """Something has been given back since the aim was taken up."""
        self.unproven: GPUFSMError | None = None
        """The last release's proof failed, with the figures; for those who asked for proof."""
        self.server_until = float("-inf")
        """Ollama's own timer for the VLM, as far as our requests set it."""
        self._interrupt: Interrupt | None = None
        self._cut_off_at: VRAMInfo | None = None
        self._returning: tuple[VRAMInfo, float, frozenset[int], float] | None = None
        """Of a release whose proof was not waited for: baseline, MiB held, Ollama's processes, when it is too late."""

    @property
    def keep_alive_s(self) -> float:
        """What every request of ours tells Ollama: our own patience and a margin, never for ever."""
        return self._config.idle_timeout_s + self._config.keep_alive_margin_s

    def reconfigure(self, config: GPUResourceConfig) -> None:
        """Go by other settings from the next step on."""
        self._config = config

    def used_server(self, keep_alive_s: float | None = None) -> None:
        """A request with our keep_alive, `keep_alive_s` where that may have changed since, has just been answered."""
        self.server_until = self._clock.monotonic() + (self.keep_alive_s if keep_alive_s is None else keep_alive_s)

    @property
    def running_load(self) -> Interrupt | None:
        """From another thread: what cuts off the load that is running, if one is."""
        return self._interrupt

    # --- RELEASING ---------------------------------------------------------------------

    def prove_cut_off(self) -> bool:
        """After a load that we cut off: one answer for `SURE_S`, and the memory back if it is no.  False if none was.

        A dying load may still be listed, and one that came in after all stays so.
        """
        before, self._cut_off_at = self._cut_off_at, None
        if before is None:
            return False
        deadline = self._clock.monotonic() + self._config.settle_timeout_s
        since: tuple[Answer, float] | None = None
        while True:
            answer = self._server.residency(self._config.observe_timeout_s).answer
            now = self._clock.monotonic()
            if now >= deadline:
                return True  # nobody can tell: the next look and the plan decide
            if since is None or since[0] is not answer:
                since = (answer, now)
            sure = answer is not Answer.UNKNOWN and now - since[1] >= SURE_S
            free = self._probe.read(self._config.observe_timeout_s).free_mib
            slack = (1 - PROOF) * self._observer.vlm_needed_mib()
            back = free is None or before.free_mib is None or free >= before.free_mib - slack
            if sure and (back or answer is Answer.YES):
                return True
            self._clock.sleep(self._config.settle_poll_s)

    def drain(self, models: frozenset[str]) -> bool:
        """Wait for leases in the middle of a move, with the gate closed to newcomers.  True if `models` are claimed."""
        deadline = self._clock.monotonic() + self._config.drain_timeout_s
        self._leases.drain(models)
        while not self._leases.claim(models):
            left = deadline - self._clock.monotonic()
            if left <= 0 or self._superseded():
                return False
            self._clock.sleep(min(self._config.settle_poll_s, left))
        return True

    def release(self, s: Snapshot) -> End:
        """Give back what the plan does not want, and wait until that is proven.  The models are claimed already."""
        baseline, held_mib = s.seen.vram, s.reclaimable_mib
        runners = self._runners() if s.vlm_surplus else frozenset()
        if s.clip_surplus:
            self.released = True
            self._clip.to_cpu()
            self._expect(baseline, s.seen.clip_held_mib + s.returning_mib, runners)
        if self._superseded():
            return "aborted"
        if s.vlm_surplus:
            self.released = True
            self._expect(baseline, held_mib, runners)
            if not self._unload(self._config.unload_deadline_s, may_stop=True):
                return "aborted"
        if held_mib > 0:
            self._settle(baseline, held_mib, runners)
        self._returning = None
        if s.aim.plan.vlm is not None:
            self._await_answer()
        return "step_done"

    def _expect(self, baseline: VRAMInfo, held_mib: float, runners: frozenset[int]) -> None:
        too_late = self._clock.monotonic() + self._config.settle_timeout_s
        self._returning = (baseline, held_mib, runners, too_late)

    def returning_mib(self, now: VRAMInfo) -> float:
        """What an interrupted release gave back and the driver still counts; 0 when it is back, or too late."""
        if self._returning is None:
            return 0.0
        baseline, held_mib, _, too_late = self._returning
        if now.free_mib is None or baseline.free_mib is None or self._clock.monotonic() >= too_late:
            self._returning = None
            return 0.0
        missing = held_mib - max(0.0, now.free_mib - baseline.free_mib)
        return missing if missing > (1 - PROOF) * held_mib else 0.0

    def _unload(self, deadline_s: float, *, may_stop: bool) -> bool:
        """Ask for the unload, again and again, until `/api/ps` denies the model.  False when superseded."""
        deadline = self._clock.monotonic() + deadline_s
        sent_at = float("-inf")
        refusal: GPUFSMError | None = None
        while True:
            if may_stop and self._superseded():
                return False
            now = self._clock.monotonic()
            timeout_s = max(0.1, min(self._config.observe_timeout_s, deadline - now))
            if now - sent_at >= self._config.unload_resend_s:
                sent_at, refusal = now, None
                try:
                    self._server.unload_model(timeout_s=timeout_s)
                except GPUFSMError as error:
                    if not error.retryable:
                        raise
                    refusal = error
            if self._server.residency(timeout_s).answer is Answer.NO:
                return True
            left = deadline - self._clock.monotonic()
            if left <= 0:
                raise refusal or self.stuck()
            self._clock.sleep(min(self._config.settle_poll_s, left))

    def stuck(self) -> errors.UnloadStuck:
        """The error for a model that does not go."""
        return errors.UnloadStuck(
            detail=f"Ollama still lists {self._server.model} after {self._config.unload_deadline_s:g} s of asking",
            remedy="A request may be running in it, or its runner hangs: see `ollama ps`, or restart Ollama.",
            model=self._server.model,
        )

    def _settle(self, baseline: VRAMInfo, held_mib: float, runners: frozenset[int]) -> None:
        """Wait until the driver shows the memory back, by its bytes or because Ollama's process has left its list."""
        deadline = self._clock.monotonic() + self._config.settle_timeout_s
        while True:
            free = self._probe.read(self._config.observe_timeout_s).free_mib
            if free is None or baseline.free_mib is None:
                self._clock.sleep(self._config.blind_settle_s)
                return
            returned = free - baseline.free_mib
            if returned >= PROOF * held_mib:
                return
            left = deadline - self._clock.monotonic()
            if left <= 0:
                break
            self._clock.sleep(min(self._config.settle_poll_s, left))
        if runners - self._runners():
            return
        self.unproven = errors.ReleaseUnproven(
            detail=f"{held_mib:.0f} MiB were given back, but only {max(returned, 0.0):.0f} MiB came free within "
            f"{self._config.settle_timeout_s:g} s",
            remedy="Another program may have taken them, or a runner is stuck: see nvidia-smi.",
            expected_mib=held_mib,
            returned_mib=returned,
        )

    def _runners(self) -> frozenset[int]:
        return ollama_pids(self._probe.holders() or ())

    def _await_answer(self) -> None:
        """A step ends on a definite answer or at its deadline; the look that follows reads it again."""
        deadline = self._clock.monotonic() + self._config.unload_deadline_s
        while self._server.residency(self._config.observe_timeout_s).answer is Answer.UNKNOWN:
            if self._clock.monotonic() >= deadline or self._superseded():
                return
            self._clock.sleep(self._config.settle_poll_s)

    # --- MIGRATING ---------------------------------------------------------------------

    def migrate(self) -> End:
        """CLIP to the GPU; claimed already."""
        if self._superseded():
            return "aborted"
        self._clip.to_gpu()
        self._await_answer()
        return "step_done"

    # --- LOADING -----------------------------------------------------------------------

    def load(self, s: Snapshot) -> End:
        """The VLM in, wholly on the GPU, or as the settings say."""
        before, others = s.seen.vram, s.seen.residency.others
        interrupt = Interrupt()
        self._interrupt = interrupt
        try:
            # After the interrupt can be found: a request posted before is seen here, one posted later sets it.
            if self._superseded():
                return "aborted"
            deadline = self._clock.monotonic() + self._config.vlm_load_deadline_s
            # From here on what comes in is ours, however this ends; a look that denies it takes that back.
            self._observer.vlm_ours = True
            self._leases.touch()
            model = self._load_once(before, deadline, interrupt)
            if not self._on_the_card(s, model):
                model = self._reload(s, model, deadline, interrupt)
        except errors.LoadAborted:
            self._cut_off_at = before
            return "aborted"
        except errors.LoadOutOfMemory:
            self._observer.raise_need(before)
            raise
        finally:
            self._interrupt = None
        self._observer.loaded(before, model)
        evicted = {o.name for o in others} - {o.name for o in self._residency().others}
        if evicted:
            self._tell(ForeignEvicted(at=self._clock.monotonic(), models=tuple(sorted(evicted))))
        return "step_done"

    def _load_once(self, before: VRAMInfo, deadline: float, interrupt: Interrupt) -> LoadedModel | None:
        report = self._server.load_model(
            keep_alive_s=self.keep_alive_s,
            deadline_s=max(0.1, deadline - self._clock.monotonic()),
            interrupt=interrupt,
            before_retry=lambda: self._settle_before_retry(before),
        )
        self.used_server()
        if report.model is not None:
            return report.model
        self._await_answer()
        return self._residency().ours

    def _settle_before_retry(self, before: VRAMInfo) -> None:
        """A failed load gives its memory back late, and a retry at once would land on the CPU.

        Raises `InsufficientVRAM` where another program has taken the room meanwhile.
        """
        deadline = self._clock.monotonic() + self._config.settle_timeout_s
        slack = (1 - PROOF) * self._observer.vlm_needed_mib()
        while before.free_mib is not None:
            free = self._probe.read(self._config.observe_timeout_s).free_mib
            left = deadline - self._clock.monotonic()
            if free is None or free >= before.free_mib - slack:
                return
            if left <= 0:
                self._require_room(free)
                return
            self._clock.sleep(min(self._config.settle_poll_s, left))

    def _require_room(self, free_mib: float) -> None:
        needed = self._observer.vlm_needed_mib()
        if needed == 0 or free_mib >= needed + self._config.reserve_mib:
            return
        if self._residency().answer is not Answer.NO:
            return  # it may have come in although the answer was an error
        holders = self._observer.look_at_holders().foreign_holders
        held = f" Held by {', '.join(holders)}." if holders else ""
        raise errors.InsufficientVRAM(
            detail=f"the load did not succeed, and for another try {free_mib:.0f} MiB are free of {needed:.0f} MiB and "
            f"{self._config.reserve_mib:g} MiB in reserve",
            remedy=f"Close a program that uses the GPU.{held}",
            needed_mib=needed,
            free_mib=free_mib,
            reserve_mib=self._config.reserve_mib,
            holders=holders,
        )

    def _on_the_card(self, s: Snapshot, model: LoadedModel | None) -> bool:
        """Wholly on the GPU, as far as Ollama *and the driver* can show.

        `/api/ps` is known to say 100 % GPU for a model that runs on the CPU.  The driver contradicts it where nearly
        nothing was taken and no process of Ollama's is on its list.
        """
        if not _whole(s, model):
            return False
        if model is None or s.accept_partial or not s.on_our_card or model.size_vram_mib <= 0:
            return True
        before, after = s.seen.vram.free_mib, self._probe.read(self._config.observe_timeout_s).free_mib
        if before is None or after is None or before - after >= (1 - PROOF) * model.size_vram_mib:
            return True
        holders = self._probe.holders()
        return holders is None or bool(ollama_pids(holders))

    def _reload(
        self, s: Snapshot, model: LoadedModel | None, deadline: float, interrupt: Interrupt
    ) -> LoadedModel | None:
        """Ollama put part of the model on the CPU: out with it and in again, once, if the settings say so."""
        loaded = self._probe.read(self._config.observe_timeout_s)
        self._take_out(loaded, model)
        if self._config.on_partial_offload == "reload":
            free_mib = self._probe.read(self._config.observe_timeout_s).free_mib
            if free_mib is not None:
                self._require_room(free_mib)
            model = self._load_once(loaded, deadline, interrupt)
            if self._on_the_card(s, model):
                return model
            self._take_out(self._probe.read(self._config.observe_timeout_s), model)
        self._observer.raise_need(s.seen.vram)
        size, vram = (model.size_mib, model.size_vram_mib) if model else (0.0, 0.0)
        partly = f"only {vram:.0f} of {size:.0f} MiB of {self._server.model} came to the GPU"
        nowhere = f"Ollama says that {self._server.model} is on the GPU, but nothing of it came to this card"
        free_some = "Free GPU memory, use a smaller model or context, or set on_partial_offload to accept."
        look = "Restart Ollama if it lost its GPU; if it has a card of its own, set ollama_card to other."
        whole = _whole(s, model)
        raise errors.PartialOffload(
            detail=nowhere if whole else partly,
            remedy=look if whole else free_some,
            model=self._server.model,
            size_mib=size,
            size_vram_mib=vram,
        )

    def _take_out(self, loaded: VRAMInfo, model: LoadedModel | None) -> None:
        runners = self._runners()
        self._leases.force({"vlm"})  # a lease may be older than the load that went wrong
        self._unload(self._config.unload_deadline_s, may_stop=False)
        if model is not None and model.size_vram_mib > 0 and loaded.present:
            self._settle(loaded, model.size_vram_mib, runners)

    def _residency(self) -> Residency:
        return self._server.residency(self._config.observe_timeout_s)

    # --- SHEDDING ----------------------------------------------------------------------

    def shed(self, *, hands_off_vlm: bool) -> tuple[str, ...]:
        """To the safe placement as far as it goes: best effort, one deadline, and then look what is really left.

        A leased CLIP is waited for during `shed_drain_s` and then left; a leased VLM may be unloaded, since Ollama lets
        running requests finish, and its leases are marked lost.
        """
        start = self._clock.monotonic()
        if self._clip.place == "gpu":
            self._shed_clip(start + min(self._config.shed_drain_s, self._config.shed_deadline_s))
        residency = self._residency()
        if residency.answer is not Answer.NO and not residency.refused and not hands_off_vlm:
            self._shed_vlm(residency.ours, start + self._config.shed_deadline_s)
        seen = self._observer.look()
        left = []
        if seen.residency.answer is not Answer.NO:
            left.append(f"{self._server.model}: {seen.residency.answer.value} in Ollama")
        if seen.clip == "gpu":
            left.append(f"CLIP on {seen.clip_device}")
        return tuple(left)

    def _shed_clip(self, deadline: float) -> None:
        while not self._leases.claim({"clip"}):
            left = deadline - self._clock.monotonic()
            if left <= 0:
                return
            self._clock.sleep(min(self._config.settle_poll_s, left))
        try:
            self._clip.to_cpu()
        except GPUFSMError as error:
            log.warning("gpu_fsm: shedding CLIP failed: %s", error)

    def _shed_vlm(self, model: LoadedModel | None, deadline: float) -> None:
        self._leases.force({"vlm"})
        before, runners = self._probe.read(self._config.observe_timeout_s), self._runners()
        try:
            self._unload(deadline - self._clock.monotonic(), may_stop=False)
            if model is not None and model.size_vram_mib > 0 and self._server.on_our_card and before.present:
                self._settle(before, model.size_vram_mib, runners)
        except GPUFSMError as error:
            log.warning("gpu_fsm: shedding the VLM failed: %s", error)


def _whole(s: Snapshot, model: LoadedModel | None) -> bool:
    return attrs.evolve(
        s, seen=attrs.evolve(s.seen, vlm_dead=False, residency=Residency(answer=Answer.YES, ours=model))
    ).whole
