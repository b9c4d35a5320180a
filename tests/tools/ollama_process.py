"""A simulated Ollama in a process of its own, on a card of the fake NVML.

with OllamaProcess(nvml, {"vlm:7b": 5000.0}, load_s=0.1) as ollama:
    ollama.url; ollama.arm("ollama.load", "oom"); ollama.heal(); ollama.kill_runner()
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Self, cast

from tests.tools.fake_nvml import FakeNVML

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 30.0


class OllamaProcess:
    """The parent's side: starts the server and tells it what is to go wrong."""

    def __init__(self, nvml: FakeNVML, models: dict[str, float], *, index: int = 0, **times: float) -> None:
        facts = {"state": str(nvml.path), "models": models, "index": index, "times": times}
        command = [sys.executable, "-m", "tests.tools.ollama_process", json.dumps(facts)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.url = str(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def _tell(self, *words: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        return self._answer()

    def arm(self, op: str, kind: str, times: float | None = 1, **args: Any) -> None:
        """Have the next `times` calls of `op` go wrong; see `gpu_fsm.simulation.faults`."""
        self._tell("arm", op, kind, times, args)

    def heal(self) -> None:
        """Call off everything that is armed, and end what hangs because of it."""
        self._tell("heal")

    def kill_runner(self) -> bool:
        """The runner of whatever is loaded dies; False where nothing is."""
        return bool(self._tell("kill"))

    def loaded(self) -> tuple[str, ...]:
        """The truth about what is resident."""
        return tuple(self._tell("loaded"))

    def close(self) -> None:
        """End the server; what it held is given back first, as its driver would do it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main(facts: dict[str, Any]) -> None:
    """The child's side: serve until the parent closes the pipe."""
    from gpu_fsm.simulation import Faults, RunningClock, SimulatedModel, SimulatedOllama, serve
    from gpu_fsm.simulation.card import Card
    from tests.tools.ledger_card import LedgerCard

    clock, faults, times = RunningClock(), Faults(), facts["times"]
    card = LedgerCard(FakeNVML.attach(Path(facts["state"])), clock=clock, index=facts["index"])
    load_s = times.pop("load_s", 0.1)
    models = [
        SimulatedModel(name=name, size_mib=mib, disk_mib=mib / 1.25, load_s=load_s)
        for name, mib in facts["models"].items()
    ]
    server = SimulatedOllama(models, clock=clock, card=cast(Card, card), faults=faults, **times)
    with serve(server) as front:
        print(json.dumps(front.url), flush=True)
        for line in sys.stdin:
            word, *rest = json.loads(line)
            with clock.turn:
                said: Any = None
                if word == "arm":
                    op, kind, count, args = rest
                    faults.arm(op, kind, count, **args)
                elif word == "heal":
                    faults.heal()
                elif word == "kill":
                    said = server.kill_runner()
                elif word == "loaded":
                    said = server.loaded()
            print(json.dumps(said), flush=True)
        server.reclaim_s = 0.0
    clock.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
