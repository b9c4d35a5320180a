"""Settings: frozen, units in the names, each default with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from attrs import field, frozen


@frozen(kw_only=True)
class GPUResourceConfig:
    """Everything the manager can be told.  MiB for memory, seconds for time."""

    # Ollama and the VLM
    ollama_url: str = "http://127.0.0.1:11434"
    """Credentials in it are moved into a secret at construction."""
    allow_remote: bool = False
    vlm_model: str = "qwen2.5vl:7b"
    vlm_size_mib: float = 6144.0
    """Used until the first measurement or `/api/tags` answers: a 7B model at 4 bits with its projector and context."""
    vlm_options: Mapping[str, Any] = field(factory=dict)
    """Runner options, sent alike on load, renewal and inference: different options reload the model."""
    on_partial_offload: Literal["reload", "accept", "degrade"] = "reload"
    on_shortage: Literal["degrade", "refuse"] = "degrade"
    on_close: Literal["release", "leave"] = "release"

    # CLIP
    clip_model: str | None = "clip-ViT-B-32"
    """Name or folder for sentence-transformers; None manages no CLIP."""
    clip_device: str = "auto"
    """`auto`, `cpu`, or a torch device such as `cuda:0`."""
    allow_pickle_weights: bool = False

    # the card
    gpu_uuid: str | None = None
    reserve_mib: float = 512.0
    """Left free on every acquisition: the desktop, fragmentation and the next allocation of others."""
    floor_mib: float = 128.0
    """Less free than this for `pressure_s` and drivers begin to page or fail."""
    pressure_s: float = 10.0
    resource_event_mib: float = 100.0

    # time
    idle_timeout_s: float = 300.0
    keep_alive_margin_s: float = 60.0
    vlm_load_deadline_s: float = 360.0
    """Longer than Ollama's own stall limit of 300 s: a client that gives up first kills the load."""
    vlm_load_retries: int = 3
    retry_base_s: float = 1.0
    retry_cap_s: float = 8.0
    unload_deadline_s: float = 30.0
    unload_resend_s: float = 2.0
    settle_timeout_s: float = 6.0
    """Ollama itself allows 5 s for memory to come back; 0.5 to 1.5 s is typical."""
    settle_poll_s: float = 0.1
    blind_settle_s: float = 2.0
    """How long to wait for a release that no driver shows."""
    observe_timeout_s: float = 2.5
    unknown_max_s: float = 60.0
    check_interval_s: float = 5.0
    drain_timeout_s: float = 10.0
    shed_drain_s: float = 2.0
    shed_deadline_s: float = 20.0
    recover_base_s: float = 2.0
    recover_cap_s: float = 60.0
    stable_s: float = 30.0
    """A mode must stand this long before the recovery back-off starts anew."""
    reassert_limit: int = 3
    reassert_window_s: float = 600.0
    journal_size: int = 1000
