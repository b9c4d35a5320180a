"""150 migrations under two encoding threads, in a process of its own, since what it guards against is a crash.

`python -m tests.tools.storm` prints one JSON object and ends with 0 if every vector was right; `--without leases` takes
the leases out, `--without leases,lock` also the host's own lock.  Both must fail: an encode is then cut in two by a
move, or the weights go away under it.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import numpy as np

from gpu_fsm import GPUResourceConfig, GPUResourceManager
from gpu_fsm.clip import CLIPManager
from gpu_fsm.leases import Holders
from gpu_fsm.simulation import RunningClock, SimulatedModel, SimulatedOllama, SimulatedProbe, serve
from tests.tools import fakegpu

MIGRATIONS, THREADS = 150, 2
TEXTS: list[object] = ["a window", "a list of files", "two buttons", "a login form"]


def tiny() -> Any:
    """The tiny CLIP, random weights."""
    import tempfile
    from pathlib import Path

    from sentence_transformers import SentenceTransformer

    from tests.tools import tiny_clip

    with tempfile.TemporaryDirectory() as folder:
        return SentenceTransformer(str(tiny_clip.build(Path(folder) / "tiny")), device="cpu", local_files_only=True)


class NoLock:
    """Stands where a lock was."""

    def acquire(self, timeout: float = 0.0) -> bool:
        return True

    def release(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def storm(without: frozenset[str]) -> dict[str, Any]:
    """Move CLIP up and down while threads encode; every call's vectors must be those of one device, bit by bit."""
    gpu = fakegpu.load()
    gpu.reset(total_mib=1024, context_mib=8)
    clock = RunningClock()
    server = SimulatedOllama([SimulatedModel(name="vlm:7b")], clock=clock)
    with serve(server) as front:
        config = GPUResourceConfig(
            clip_device="fakegpu:0", ollama_url=front.url, vlm_model="vlm:7b", drain_timeout_s=30.0
        )
        host = CLIPManager(config, model=tiny())
        probe = SimulatedProbe(clock=clock, card=None)
        manager = GPUResourceManager(config, clip_host=host, vram_probe=probe)
        right = {"cpu": host.encode(TEXTS, batch_size=1)}
        manager.migrate_clip_to_gpu()
        right["fakegpu:0"] = host.encode(TEXTS, batch_size=1)
        manager.migrate_clip_to_cpu()
        assert np.array_equal(host.encode(TEXTS, batch_size=1), right["cpu"])
        if "leases" in without:
            book: Any = manager._driver.leases
            book._holders = Holders  # nobody is ever counted
        if "lock" in without:
            host._lock = NoLock()  # type: ignore[assignment]
        over = threading.Event()
        wrong: list[str] = []
        encodes = [0] * THREADS

        def encode(which: int) -> None:
            while not over.is_set():
                try:
                    with manager.clip() as clip:
                        before = clip.device
                        vectors = clip.encode(TEXTS, batch_size=1)
                        after = clip.device
                    if before != after:
                        wrong.append(f"moved from {before} to {after} under a lease")
                    elif not np.array_equal(vectors, right[before]):
                        wrong.append(f"other vectors than the reference of {before}")
                except Exception as error:
                    wrong.append(f"{type(error).__name__}: {error}")
                encodes[which] += 1
                if wrong:
                    over.set()

        threads = [threading.Thread(target=encode, args=(which,)) for which in range(THREADS)]
        for thread in threads:
            thread.start()
        moves = 0
        try:
            while moves < MIGRATIONS and not over.is_set():
                (manager.migrate_clip_to_cpu if moves % 2 else manager.migrate_clip_to_gpu)()
                moves += 1
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
        finally:
            over.set()
            for thread in threads:
                thread.join(60.0)
        if not wrong and not np.array_equal(host.encode(TEXTS, batch_size=1), right["cpu"]):
            wrong.append("at home the vectors are no longer those of before")
        manager.close()
    clock.close()
    return {"moves": moves, "encodes": encodes, "wrong": wrong[:3]}


if __name__ == "__main__":
    result = storm(frozenset(sys.argv[2].split(",")) if len(sys.argv) > 2 else frozenset())
    print(json.dumps(result))
    sys.exit(bool(result["wrong"]))
