"""The same agent under asyncio: screens come from an async source while other tasks go on.

python -m gpu_fsm.examples.asyncio_loop --simulated
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence

from gpu_fsm import ExecutionMode, GPUResourceManager
from gpu_fsm.agent import ExecutionLoop, FusionEngine, Screen, UIDetector
from gpu_fsm.examples.worlds import arguments, manager_for, three_screens


async def arriving() -> AsyncIterator[Screen]:
    """Screens as they come: from a browser, a phone, a queue."""
    for screen in three_screens():
        await asyncio.sleep(0)
        yield screen


async def act(screen: Screen, label: str) -> None:
    """Hooks may be coroutine functions."""
    await asyncio.sleep(0)
    print(f"  acting on {screen.name}, which is: {label}")


async def watch(manager: GPUResourceManager) -> None:
    """The event loop is never blocked, and the status never waits."""
    seen = None
    while True:
        status = manager.aio.get_status()
        if status.state is not seen:
            seen = status.state
            print(f"  ({seen.name}, CLIP on {status.clip_device})")
        await asyncio.sleep(0.005)


async def work(manager: GPUResourceManager) -> int:
    """Record, then recognise."""
    watching = asyncio.create_task(watch(manager))
    loop = ExecutionLoop(manager, UIDetector(manager), FusionEngine(), on_action=act)
    steps = await loop.arun(ExecutionMode.RECORDING, arriving())
    steps += await loop.arun(ExecutionMode.AUTOPILOT, arriving())
    watching.cancel()
    return 0 if [step.result for step in steps] == ["recorded"] * 3 + ["recognised"] * 3 else 1


def main(argv: Sequence[str] = ()) -> int:
    """Run it; returns an exit code."""
    with manager_for(argv) as manager:
        return asyncio.run(work(manager))


if __name__ == "__main__":
    sys.exit(main(arguments(__doc__)))
