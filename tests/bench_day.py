"""What a day of agent life costs in the simulation: `python -m tests.bench_day [--days N] [--json]`.

A manager over the real HTTP client, on the simulated card, Ollama and CLIP.  The agent changes its mode every half hour
and asks the VLM once in each RECORDING; between that the manager looks at the world every 15 s.  All figures are CPU
time of one process that lives one day after the other.  A look is one `/api/ps` and what the manager makes of the
answer, so the price of the bare question, through the same client on the same server, stands beside it; and so does the
day in `simulated_world`, where every call is judged as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from gpu_fsm import ExecutionMode, GPUResourceManager
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.testing.simulated import inline_manager, simulated_world

DAY_S, STAY_S = 86_400.0, 1_800.0
STAYS = int(DAY_S / STAY_S)


def live(manager: GPUResourceManager, world: SimulatedWorld) -> int:
    """One day; returns how often Ollama was asked what it holds."""
    for stay in range(STAYS):
        mode = (ExecutionMode.RECORDING, ExecutionMode.AUTOPILOT)[stay % 2]
        if not manager.set_execution_mode(mode).granted:
            raise RuntimeError(f"{mode.name} was not granted: {manager.get_status().reason}")
        if mode is ExecutionMode.RECORDING:
            with manager.vlm() as vlm:
                vlm.generate("what is this?")
        manager.drive_for((stay + 1) * STAY_S - world.clock.monotonic())
    return sum(entry.op == "ollama.ps" for entry in world.ollama.log)


def day() -> int:
    """In a new world."""
    world = SimulatedWorld()
    with inline_manager(world) as manager:
        return live(manager, world)


def judged_day() -> int:
    """The same where an oracle watches."""
    with simulated_world() as sim:
        return live(sim.manager, sim.world)


def questions(count: int) -> int:
    """Ask `/api/ps` that often, and nothing else."""
    world = SimulatedWorld()
    server = OllamaManager(world.config(), clock=world.clock, transport=world.transport)
    for _ in range(count):
        server.residency(1.0)
    return count


def cost(work: Callable[[], int]) -> tuple[float, float]:
    """CPU seconds of the whole, and CPU microseconds of each of the things that it says it did."""
    began = time.process_time()
    count = work()
    spent_s = time.process_time() - began
    return spent_s, spent_s * 1e6 / count


def measure(days: int) -> dict[str, Any]:
    """Days, judged days and questions in turn, after one of each to warm up."""
    seen = [(*cost(day), cost(judged_day)[0], cost(lambda: questions(2_000))[1]) for _ in range(days + 1)][1:]
    day_s, look_us, judged_s, question_us = (statistics.median(column) for column in zip(*seen, strict=True))
    return {
        "days": days,
        "switches_a_day": STAYS,
        "day_cpu_s": round(day_s, 3),
        "judged_day_cpu_s": round(judged_s, 3),
        "look_cpu_us": round(look_us, 1),
        "question_cpu_us": round(question_us, 1),
        "ratio": round(look_us / question_us, 2),
        "faster_than_life": round(DAY_S / day_s),
    }


def main() -> None:
    """Measure and say it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=7, help="days to live, after one to warm up (default: 7)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    chosen = parser.parse_args()
    if chosen.days < 1:
        parser.error("--days is a number from 1 up")
    found = measure(chosen.days)
    if chosen.json:
        print(json.dumps(found))
        return
    print(
        f"A simulated day with {STAYS} switches: {found['day_cpu_s']:.2f} s of CPU (median of {found['days']}), "
        f"{found['faster_than_life']:,} times as fast as life; judged, {found['judged_day_cpu_s']:.2f} s.\n"
        f"A look: {found['look_cpu_us']:.0f} us, {found['ratio']:.1f} times the bare question to Ollama "
        f"({found['question_cpu_us']:.0f} us)."
    )


if __name__ == "__main__":
    main()
