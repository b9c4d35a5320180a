"""What a simulated model says beside its text: its thinking, calls of tools, log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from attrs import frozen

from gpu_fsm.simulation.wire import fitting


@frozen(kw_only=True)
class Said:
    """A piece of an answer."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    logprobs: tuple[dict[str, Any], ...] = ()

    def fields(self, *, chat: bool) -> dict[str, Any]:
        """As `/api/chat` or `/api/generate` tells it."""
        more: dict[str, Any] = {"thinking": self.thinking} if self.thinking else {}
        if self.tool_calls:
            more["tool_calls"] = list(self.tool_calls)
        if chat:
            return {"message": {"role": "assistant", "content": self.text} | more}
        return {"response": self.text} | more


def pieces(body: dict[str, Any], texts: Sequence[str]) -> list[Said]:
    """An answer in the order in which a stream tells it: the thinking, then calls of tools or else the texts.

    Every tool that is offered is called once, with the plainest arguments that its schema allows, until the
    conversation has a result of one.
    """
    level = body.get("think")
    said = [Said(thinking=f"{level if isinstance(level, str) else 'some'} thinking")] if level else []
    offered = [tool["function"] for tool in _objects(body, "tools") if isinstance(tool.get("function"), dict)]
    if offered and not any(message.get("role") == "tool" for message in _objects(body, "messages")):
        return [*said, Said(tool_calls=tuple(_call(index, function) for index, function in enumerate(offered)))]
    return said + [Said(text=text, logprobs=_logprobs(body, text)) for text in texts]


def whole(said: Sequence[Said]) -> Said:
    """The pieces as one."""
    return Said(
        text="".join(piece.text for piece in said),
        thinking="".join(piece.thinking for piece in said),
        tool_calls=tuple(call for piece in said for call in piece.tool_calls),
        logprobs=tuple(token for piece in said for token in piece.logprobs),
    )


def _objects(body: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = body.get(key)
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _call(index: int, function: dict[str, Any]) -> dict[str, Any]:
    arguments = json.loads(fitting(function.get("parameters") or {}, "ok", [])) or {}
    named = {"index": index, "name": str(function.get("name", "")), "arguments": arguments}
    return {"id": f"call_{index:08}", "function": named}


def _logprobs(body: dict[str, Any], text: str) -> tuple[dict[str, Any], ...]:
    """A word is a token here, and each is twice as likely as the next best."""
    if not body.get("logprobs"):
        return ()

    def token(word: str, rank: int) -> dict[str, Any]:
        return {"token": word, "logprob": -0.5 - 0.75 * rank, "bytes": list(word.encode())}

    most = body.get("top_logprobs")
    most = min(most, 20) if isinstance(most, int) else 0
    return tuple(
        token(word, 0) | ({"top_logprobs": [token(word + "~" * rank, rank) for rank in range(most)]} if most else {})
        for word in text.split()
    )
