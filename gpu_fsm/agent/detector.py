"""`UIDetector`: what is on this screen?  It asks the VLM, and an answer it cannot have is an answer too."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from attrs import evolve, frozen

from gpu_fsm.agent.doors import AsyncDoor, BlockingDoor, Door, Manager, at_once
from gpu_fsm.agent.screens import Screen, sendable
from gpu_fsm.errors import BadArgument, GPUFSMError, LeaseLost, ManagerClosed, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

_PROMPT = (
    "Which screen of which kind of program does this screenshot show? Answer in JSON: `label`, two to four words that "
    "name the kind of screen without its content, and `summary`, one sentence about what can be done on it. "
    "If it cannot be told, the label is `unknown`."
)
_REPAIR = "Your last answer did not fit: {problem}. Answer with one JSON object with the strings `label` and `summary`."
_LONGEST_LABEL = 80
_HOLDER = "UIDetector"
UNKNOWN_LABEL = "unknown"


@frozen(kw_only=True)
class Classification:
    """What the VLM says about a screen, or why it says nothing."""

    label: str | None = None
    """None where there is no answer; `unknown` where the VLM was asked and could not tell."""
    summary: str = ""
    available: bool = True
    reason: str = ""
    """Why there is no answer, in words."""
    source: Literal["vlm", "cache", "none"] = "none"
    repaired: bool = False
    """The first answer did not fit the schema, the second did."""

    @property
    def tells(self) -> bool:
        """Whether there is a label that says something."""
        return self.label is not None and self.label != UNKNOWN_LABEL


class UIDetector:
    """Classifies screens through the manager's VLM; answers "unavailable, because ..." instead of failing.

    Thread-safe; two threads that ask about the same new screen at once may both ask the VLM.
    """

    def __init__(
        self,
        manager: Manager,
        *,
        prompt: str = _PROMPT,
        timeout_s: float | None = None,
        largest_side: int = 1600,
        cache_size: int = 1024,
        labels: Sequence[str] = (),
    ) -> None:
        """Screens with a longer side than `largest_side` pixels are sent smaller; `cache_size` answers are kept.

        With `labels` the VLM chooses among these and `unknown`; else it finds its own.
        """
        self._manager = manager
        self._labels = {label.casefold(): label for label in (*labels, UNKNOWN_LABEL)} if labels else {}
        self._schema = _schema([*self._labels.values()])
        self._prompt = prompt + (f" The label is one of: {', '.join(self._labels.values())}." if labels else "")
        self.timeout_s = timeout_s
        """How long a screen waits for the VLM; may be changed at any time, as may the next two."""
        self.largest_side = largest_side
        self.cache_size = cache_size
        self._cache: OrderedDict[str, Classification] = OrderedDict()
        self._lock = threading.Lock()

    def classify(self, screen: Screen) -> Classification:
        """Ask the cache, then the VLM.  Raises only `BadArgument` (no image) and `ManagerClosed`."""
        return at_once(self.through(BlockingDoor(self._manager), screen))

    async def aclassify(self, screen: Screen) -> Classification:
        """See `classify`; needs a manager with the asyncio face `aio`."""
        manager: Any = self._manager
        return await self.through(AsyncDoor(manager.aio), screen)

    async def through(self, door: Door, screen: Screen) -> Classification:
        """Classify by way of `door`: what both faces share."""
        digest = await door.do(lambda: screen.digest)
        with self._lock:
            kept = self._cache.get(digest)
            if kept is not None:
                self._cache.move_to_end(digest)
                return evolve(kept, source="cache", repaired=False)
        image = await door.do(screen.image)  # first: a broken picture must not cost a load
        try:
            answer = await self._ask_again_once(door, screen, image)
        except (ManagerClosed, BadArgument):
            raise
        except GPUFSMError as error:
            return Classification(available=False, reason=f"unavailable, because {one_line(error)}")
        if answer.label is not None:
            with self._lock:
                self._cache[digest] = answer
                while len(self._cache) > self.cache_size:
                    self._cache.popitem(last=False)
        return answer

    async def _ask_again_once(self, door: Door, screen: Screen, image: Image) -> Classification:
        try:
            return await self._ask(door, screen, image)
        except LeaseLost:
            # The VLM was taken away under the lease; a new lease waits until it is back or says why not.
            return await self._ask(door, screen, image)

    async def _ask(self, door: Door, screen: Screen, image: Image) -> Classification:
        # The lease is the question whether there is a VLM; only then is the picture made ready for it.
        async with door.vlm(_HOLDER, self.timeout_s) as vlm:
            picture = await door.do(sendable, screen, image, self.largest_side)
            said = await vlm.generate(self._prompt, [picture], self._schema)
            label, summary, problem = _read_answer(said.text, self._labels)
            repaired = bool(problem)
            if problem:
                prompt = f"{self._prompt}\n{_REPAIR.format(problem=problem)}"
                said = await vlm.generate(prompt, [picture], self._schema)
                label, summary, problem = _read_answer(said.text, self._labels)
        if problem:
            return Classification(reason=f"the VLM's answer did not fit twice: {problem}", source="vlm")
        return Classification(label=label, summary=summary, source="vlm", repaired=repaired)


def _schema(labels: Sequence[str]) -> dict[str, Any]:
    label = {"type": "string", "enum": [*labels]} if labels else {"type": "string"}
    return {
        "type": "object",
        "properties": {"label": label, "summary": {"type": "string"}},
        "required": ["label", "summary"],
    }


def _read_answer(text: str, labels: Mapping[str, str]) -> tuple[str, str, str]:
    """Label, summary and an empty problem, or two empty texts and what is wrong."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return "", "", "it was no JSON"
    if not isinstance(answer, dict):
        return "", "", "it was no object"
    label, summary = answer.get("label"), answer.get("summary")
    if not isinstance(label, str) or not label.strip():
        return "", "", "`label` was no text"
    if not isinstance(summary, str):
        return "", "", "`summary` was no text"
    label = " ".join(label.split())
    if labels and label.casefold() not in labels:
        return "", "", "`label` was none of those to choose from"
    label = labels.get(label.casefold(), label)
    return one_line(label, _LONGEST_LABEL), one_line(" ".join(summary.split()), 400), ""
