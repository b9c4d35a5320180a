"""Looking: what the ports answer becomes one `Observation`, and what must be remembered between looks.

Never raises and decides nothing; a question that was not answered stays unknown.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import attrs

from gpu_fsm.events import Event, ForeignConsumer, ResourceChanged, VRAMLow
from gpu_fsm.guards import PROOF, WHOLE, Observation
from gpu_fsm.ports import CLIPHost, Clock, VLMServer, VRAMProbe
from gpu_fsm.settings import GPUResourceConfig
from gpu_fsm.status import Answer, Catalog, Evidence, Holder, LoadedModel, Residency, VRAMInfo

OLLAMA_PROCESSES = ("ollama", "llama")
"""In the names of Ollama's server and runners: `ollama`, `llama-server`, `ollama_llama_server`."""

DISPROOF = 0.5
"""A VLM of which less than this share can lie on the card is not there; Ollama's own figure is an estimate."""

ELSEWHERE = 0.1
"""A load that took less than this share of its size from our card took it from another one, or from none."""

DISK_TO_VRAM = 1.2
"""A model needs more on the card than on disk: context and projector."""


class Observer:
    """The engine's eyes and their memory."""

    def __init__(
        self,
        config: GPUResourceConfig,
        *,
        server: VLMServer,
        clip: CLIPHost,
        probe: VRAMProbe,
        clock: Clock,
        tell: Callable[[Event], None],
    ) -> None:
        self._config, self._server, self._clip, self._probe, self._clock = config, server, clip, probe, clock
        self._tell = tell
        self.seen = Observation()
        """The last look."""
        self.looked = False
        """Whether there has been one."""
        self.vlm_ours = False
        """This manager loaded the VLM or used it."""
        self.evidence: Evidence = "none"
        self._catalog = Catalog()
        self._measured_mib: float | None = None
        self._raised: tuple[float, float] | None = None  # (needed MiB, until)
        self._reported_mib = 0.0
        self._told_free_mib: float | None = None
        self._gpu_expected = False
        self._quiet: tuple[bool, str, float] | None = None  # (VLM in, CLIP's place, free MiB) of the last quiet look
        self.seems_elsewhere = False
        """A load that Ollama calls complete took nothing of our card."""
        self._unknown_since: float | None = None
        self._below_since: float | None = None
        self._told_low = False

    def reconfigure(self, config: GPUResourceConfig) -> None:
        """Go by other settings from the next look on."""
        self._config = config

    def look(self, *, catalog: bool = False, quiet: bool = False, patient: bool = False) -> Observation:
        """Ask all three ports; with `catalog` also whether the server has an absent model on disk.

        `quiet`: nothing of ours has moved since the last look, unless what is seen says so.  `patient`: somebody waits,
        and one busy answer is no reason to refuse, so Ollama is asked again for `observe_timeout_s`.
        """
        timeout_s = self._config.observe_timeout_s
        residency = self._residency(patient=patient)
        vram = self._probe.read(timeout_s)
        clip_needed = self._clip.needed_mib
        if vram.scope == "assumed":
            vram = self._assumed(vram, residency)
        if residency.refused:
            residency = self._silence(residency, vram, clip_needed)
        if catalog and residency.answer is Answer.NO and not residency.refused:
            self._catalog = self._server.catalog(timeout_s)
        usable = self._clip.gpu_usable and not vram.lost
        self._gpu_expected = self._gpu_expected or self._clip.gpu_usable  # also where the driver calls it lost
        self.seen = Observation(
            residency=residency,
            vlm_dead=self._disproved(residency, vram),
            catalog=self._catalog,
            vram=vram,
            clip=self._clip.place,
            clip_device=self._clip.device,
            clip_needed_mib=clip_needed if vram.present else 0.0,
            clip_held_mib=self._clip.held_mib if vram.present else 0.0,
            clip_context_mib=getattr(self._clip, "context_mib", None) if not self._clip.simulated else None,
            gpu_usable=usable,
            gpu_expected=self._gpu_expected,
            gpu_unusable_reason=self._clip.gpu_unusable_reason,
            at=self._clock.monotonic(),
        )
        self.looked = True
        self._remember(self.seen)
        self._watch_others(self.seen, quiet=quiet)
        return self.seen

    def _residency(self, *, patient: bool) -> Residency:
        deadline = self._clock.monotonic() + self._config.observe_timeout_s
        residency = self._server.residency(self._config.observe_timeout_s)
        while patient and residency.answer is Answer.UNKNOWN and not residency.refused:
            left = deadline - self._clock.monotonic()
            if left <= self._config.settle_poll_s:
                break
            self._clock.sleep(self._config.settle_poll_s)
            residency = self._server.residency(left)
        return residency

    def look_at_holders(self) -> Observation:
        """Add who holds memory to the last look: only for a refusal, since the driver needs milliseconds for it."""
        holders = self._probe.holders()
        others = tuple(str(holder) for holder in holders or () if holder.pid != os.getpid())
        self.seen = attrs.evolve(self.seen, foreign_holders=others)
        return self.seen

    def _assumed(self, vram: VRAMInfo, residency: Residency) -> VRAMInfo:
        """Count down the assumed size by what is known to lie on the card: good to admit by, and no proof."""
        if vram.total_mib is None or residency.answer is Answer.UNKNOWN:
            return vram
        resident = (residency.ours, *residency.others) if self._server.on_our_card else ()
        held = sum(model.size_vram_mib for model in resident if model is not None) + self._clip.held_mib
        return attrs.evolve(vram, free_mib=max(0.0, vram.total_mib - held))

    def _watch_others(self, seen: Observation, *, quiet: bool) -> None:
        """Tell of memory that went while both of our models stayed where they were."""
        free = seen.vram.free_mib
        if free is None or seen.vram.scope != "card":
            self._quiet = None
            return
        last, now = self._quiet, (seen.residency.answer is Answer.YES, seen.clip, free)
        if not quiet or last is None or last[:2] != now[:2] or free > last[2]:
            self._quiet = now
            return
        if last[2] - free < self._config.resource_event_mib:
            return
        self._quiet = now
        holders = self._probe.holders()
        # Our own VLM may grow in use.  Where another client's model is in too, Ollama's growth may be its.
        known = {os.getpid(), *(ollama_pids(holders or ()) if now[0] and not seen.residency.others else ())}
        others = None if holders is None else [holder for holder in holders if holder.pid not in known]
        if others == []:
            return  # the driver lists everybody, and there is nobody else
        told = tuple(str(holder) for holder in others or ())
        self._tell(ForeignConsumer(at=seen.at, taken_mib=last[2] - free, free_mib=free, holders=told))

    def _silence(self, residency: Residency, vram: VRAMInfo, clip_needed: float) -> Residency:
        """What a refused connection proves.

        Nobody listens, but a runner orphaned by a killed server may hold memory.  So "not resident" needs a driver that
        shows no such process and room; where there is no card, or Ollama has another one, ours holds nothing of it.
        """
        if not self._server.on_our_card or (not vram.present and not vram.lost):
            return attrs.evolve(residency, answer=Answer.NO)
        holders = self._probe.holders()
        if holders is None or vram.free_mib is None:
            return residency
        room = vram.free_mib >= clip_needed + self._config.reserve_mib or self._clip.place == "gpu"
        return attrs.evolve(residency, answer=Answer.NO) if room and not ollama_pids(holders) else residency

    def _disproved(self, residency: Residency, vram: VRAMInfo) -> bool:
        """Whether a listed VLM is not on the card.

        Much less is in use than it takes, and the driver, which names all who hold memory, names nobody of Ollama's.
        `/api/ps` lists a dead runner until the next request finds out.
        """
        model = residency.ours
        if model is None or not self._server.on_our_card or self._config.on_partial_offload == "accept":
            return False
        if vram.scope != "card" or vram.total_mib is None or vram.free_mib is None:
            return False
        if vram.total_mib - vram.free_mib >= DISPROOF * model.size_vram_mib:
            return False
        holders = self._probe.holders()
        return holders is not None and all(holder.name for holder in holders) and not ollama_pids(holders)

    def _remember(self, seen: Observation) -> None:
        """Keep what spans looks: how long unknown, how long short, what was told."""
        now, free = seen.at, seen.vram.free_mib
        if seen.residency.answer is Answer.UNKNOWN:
            self._unknown_since = now if self._unknown_since is None else self._unknown_since
        else:
            self._unknown_since = None
        assumed = seen.vram.scope == "assumed"
        if free is not None and not assumed and self._server.on_our_card:
            self._mind_the_floor(seen, free)
        if seen.residency.answer is Answer.NO:
            self.vlm_ours, self.evidence = False, "none"
        elif seen.residency.answer is Answer.YES and self.evidence == "none":
            self.evidence = "reported"
        if free is not None and not assumed:
            told = self._told_free_mib
            if told is None:
                self._told_free_mib = free
            elif abs(free - told) >= self._config.resource_event_mib:
                self._told_free_mib = free
                self._tell(ResourceChanged(at=now, free_mib=free, told_mib=told, total_mib=seen.vram.total_mib))

    def _mind_the_floor(self, seen: Observation, free: float) -> None:
        floor = self._config.floor_mib
        if free >= floor:
            self._below_since = None
            self._told_low = self._told_low and free < floor + self._config.resource_event_mib
            return
        self._below_since = seen.at if self._below_since is None else self._below_since
        if not self._told_low:
            self._told_low = True
            self._tell_low(seen, free)

    def _tell_low(self, seen: Observation, free: float) -> None:
        holders = self._probe.holders() or ()
        self._tell(
            VRAMLow(
                at=seen.at,
                free_mib=free,
                floor_mib=self._config.floor_mib,
                total_mib=seen.vram.total_mib,
                holders=tuple(str(holder) for holder in holders if holder.pid != os.getpid()),
            )
        )

    # --- how long ---

    def unknown_for(self, now: float) -> float:
        """Seconds since Ollama's last definite answer; 0 while it answers."""
        return 0.0 if self._unknown_since is None else now - self._unknown_since

    def pressed_for(self, now: float) -> float:
        """Seconds for which free memory has been under the floor."""
        return -1.0 if self._below_since is None else now - self._below_since

    # --- how much ---

    def vlm_size(self) -> tuple[float, str]:
        """The VLM's size for the next load in MiB, and where it comes from."""
        if self._measured_mib is not None:
            return self._measured_mib, "measured"
        if self._catalog.size_mib is not None:
            return self._catalog.size_mib * DISK_TO_VRAM, "tags"
        return self._config.vlm_size_mib, "setting"

    def vlm_needed_mib(self, *, after_failure: bool = False) -> float:
        """What a load takes from our card; `after_failure` believes a load that found no room, for a while."""
        if not self._server.on_our_card or not self.seen.vram.present:
            return 0.0
        needed = self.vlm_size()[0]
        if after_failure and self._raised is not None and self._clock.monotonic() < self._raised[1]:
            return max(needed, self._raised[0])
        return needed

    def raise_need(self, before: VRAMInfo) -> None:
        """What was free was not enough, so ask for more; for one back-off cap, since it may have been a fluke."""
        if before.free_mib is not None:
            until = self._clock.monotonic() + self._config.recover_cap_s
            self._raised = (before.free_mib - self._config.reserve_mib + 1.0, until)

    @property
    def doubts_until(self) -> float:
        """When a load that found no room is no longer believed; infinite where none is."""
        if self._raised is None or self._raised[1] <= self._clock.monotonic():
            return float("inf")
        return self._raised[1]

    def loaded(self, before: VRAMInfo, model: LoadedModel | None) -> None:
        """A load of ours ended well: keep what it took, where the driver's bytes and Ollama's word are of one mind."""
        self.vlm_ours = True
        self._raised = None
        if model is None:
            return
        self.evidence = "reported"
        after = self._probe.read(self._config.observe_timeout_s)
        if not self._server.on_our_card or before.free_mib is None or after.free_mib is None:
            return
        took = before.free_mib - after.free_mib
        self.seems_elsewhere = model.size_vram_mib > 0 and abs(took) < ELSEWHERE * model.size_vram_mib
        if model.size_vram_mib > 0 and PROOF * model.size_vram_mib <= took <= 1.5 * model.size_vram_mib:
            if model.size_vram_mib < WHOLE * model.size_mib:
                return  # accepted in part: the next load may have room for all of it
            self.evidence = "measured"
            # A neighbour may have taken some of it.  What fitted once is admitted again where as much is free.
            fits = before.free_mib - self._config.reserve_mib
            self._measured_mib = max(model.size_vram_mib, min(took, fits, self._held_by_ollama()))
            self._reported_mib = model.size_vram_mib

    def _held_by_ollama(self) -> float:
        """MiB, as far as the driver tells; else without bound."""
        holders = self._probe.holders() or ()
        ours = [holder.mib for holder in holders if holder.pid in ollama_pids(holders)]
        return sum((math.inf if mib is None else mib for mib in ours), 0.0) or math.inf

    def doubt_size(self) -> None:
        """Something was refused for want of room: a measured size that holds a neighbour's share must not stay."""
        if self._measured_mib is not None:
            self._measured_mib = min(self._measured_mib, self._reported_mib)


def ollama_pids(holders: tuple[Holder, ...]) -> frozenset[int]:
    """Ollama's own processes among those that hold memory."""
    return frozenset(h.pid for h in holders if any(word in h.name.lower() for word in OLLAMA_PROCESSES))
