"""Looking at the screen as a tool of an LLM agent: a function, its schema, and answers that a model can work with.

    python -m gpu_fsm.examples.llm_tool --simulated

Any model may drive the agent; the VLM that this tool uses is loaded when it is called and leaves by itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gpu_fsm import ExecutionMode, GPUResourceManager
from gpu_fsm.agent import Screen, UIDetector
from gpu_fsm.examples.worlds import arguments, manager_for, three_screens

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_at_screen",
        "description": "Say which screen of which program is shown now, and what can be done on it.",
        "parameters": {"type": "object", "properties": {"window": {"type": "string"}}, "required": ["window"]},
    },
}


def look_at_screen(manager: GPUResourceManager, take: Callable[[str], Screen]) -> Callable[..., str]:
    """Make the tool; `take(window)` takes the screenshot."""
    detector = UIDetector(manager, timeout_s=120.0)

    def look(window: str) -> str:
        seen = detector.classify(take(window))
        if not seen.available:
            return json.dumps({"error": seen.reason})  # an answer, not an exception: the model can plan around it
        return json.dumps({"screen": seen.label, "summary": seen.summary})

    return look


def main(argv: Sequence[str] = ()) -> int:
    """Play the model's part: call the tool as a tool call would."""
    windows = {screen.text: screen for screen in three_screens()}
    with manager_for(argv) as manager:
        manager.set_execution_mode(ExecutionMode.AUTOPILOT)  # the card is CLIP's; the tool borrows it
        look = look_at_screen(manager, windows.__getitem__)
        calls = [{"name": TOOL["function"]["name"], "arguments": json.dumps({"window": name})} for name in windows]
        answers = [json.loads(look(**json.loads(call["arguments"]))) for call in calls]
        print(*answers, sep="\n")
        print(f"the mode is still {manager.get_status().execution_mode.name}")
    return 0 if all("screen" in answer for answer in answers) else 1


if __name__ == "__main__":
    sys.exit(main(arguments(__doc__)))
