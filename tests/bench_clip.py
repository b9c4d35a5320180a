"""Measure CLIP's moves on the second device against `.to()`: `python -m tests.bench_clip [--trips N]`.

A ViT-B/32 of random weights, 151 million parameters, on a device whose memory is this machine's: counts and bytes are
those of any device, times are this machine's and only good as a ratio.  Needs g++, torch's headers and 2 GiB of memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from gpu_fsm.clip import _Weights
from tests.tools import fakegpu
from tests.tools.fakegpu import Figures

MIB = 1024 * 1024


class Move(NamedTuple):
    """What one move cost."""

    seconds: float
    allocations: int
    copies_up: int
    bytes_up: int
    copies_down: int
    bytes_down: int


def vit_b_32() -> Any:
    """The architecture of clip-ViT-B-32 as transformers has it by default, random weights, in a second."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # No initialisation by the library (it takes ten seconds and says nothing here); zeros would hide mistakes.
        with torch.device("meta"):
            model = CLIPModel(CLIPConfig())
        model = model.to_empty(device="cpu").eval()
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(std=0.02)
                else:
                    tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
    return model


def cost(gpu: fakegpu.FakeGPU, move: Callable[[], object]) -> Move:
    """Run a move and read the device's books before and after it."""
    before: Figures = gpu.figures()
    start = time.perf_counter()
    move()
    seconds = time.perf_counter() - start
    after = gpu.figures()
    return Move(
        seconds,
        after.all_allocations - before.all_allocations,
        after.h2d - before.h2d,
        after.h2d_bytes - before.h2d_bytes,
        after.d2h - before.d2h,
        after.d2h_bytes - before.d2h_bytes,
    )


def trips(number: int) -> tuple[int, dict[str, list[Move]]]:
    """The number of parameters, and what every trip cost, by `.to()` and by ours."""
    import torch

    gpu = fakegpu.load()
    gpu.reset(total_mib=4096, context_mib=0)
    device, model = torch.device("fakegpu:0"), vit_b_32()
    found: dict[str, list[Move]] = {"to up": [], "to down": [], "ours up": [], "ours down": []}

    def give_back() -> None:
        torch.accelerator.empty_cache()

    for _ in range(number):
        found["to up"].append(cost(gpu, lambda: model.to(device)))
        found["to down"].append(cost(gpu, lambda: (model.to("cpu"), give_back())))
    weights = _Weights(model)
    for _ in range(number):
        found["ours up"].append(cost(gpu, lambda: weights.upload(device)))
        found["ours down"].append(cost(gpu, lambda: (weights.drop(), give_back())))
    assert gpu.figures().allocated == gpu.figures().reserved == 0
    count = sum(parameter.numel() for parameter in model.parameters())
    gpu.reset()
    return count, found


def main(arguments: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trips", type=int, default=5, help="up and down so often, each way (5)")
    options = parser.parse_args(arguments)
    if fakegpu.missing():
        print(fakegpu.missing())
        return 1
    count, found = trips(options.trips)
    print(f"{count / 1e6:.1f} million parameters, {options.trips} trips, median time (least)")
    for name, moves in found.items():
        last, times = moves[-1], [move.seconds * 1000 for move in moves]
        print(
            f"{name:>9}: {statistics.median(times):7.1f} ms ({min(times):7.1f})  {last.allocations:4} allocations  "
            f"{last.copies_up:4} copies up {last.bytes_up / MIB:6.1f} MiB  "
            f"{last.copies_down:4} copies down {last.bytes_down / MIB:6.1f} MiB"
        )
    for way in ("up", "down"):
        theirs, ours = (min(move.seconds for move in found[f"{who} {way}"]) for who in ("to", "ours"))
        print(f"{way:>9}: .to() takes {theirs / ours:.1f} times as long")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
