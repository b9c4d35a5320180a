"""The simulated Ollama's `/v1` routes: the native routes under the words of OpenAI's API, without a keep_alive."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

from gpu_fsm.simulation.wire import Exchange, Refusal, dumps

_JSON = "application/json"
_EVENTS = "text/event-stream"
_OPTIONS = {"max_tokens": "num_predict", "temperature": "temperature", "top_p": "top_p", "seed": "seed", "stop": "stop"}


def listed(name: str, epoch_s: float) -> dict[str, Any]:
    """A model, as `/v1/models` shows it."""
    return {"id": name, "object": "model", "created": int(epoch_s), "owned_by": "library"}


def error(status: int, text: str) -> dict[str, Any]:
    """A refusal in OpenAI's shape."""
    kinds = {400: "invalid_request_error", 404: "not_found_error"}
    return {"error": {"message": text, "type": kinds.get(status, "api_error"), "param": None, "code": None}}


class Translated(Exchange):
    """An exchange with a native route whose answer goes to a client of `/v1`."""

    __slots__ = ("asked", "created_s", "real")

    def __init__(self, real: Exchange, asked: dict[str, Any], created_s: int) -> None:
        super().__init__(real.method, real.path, real.body, real.request_headers, real.client)
        self.real = real
        self.asked = asked
        self.created_s = created_s
        real.on_leave = self.leave

    def native(self) -> dict[str, Any]:
        """The request as the native route takes it; raises `Refusal`."""
        raise NotImplementedError

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def part(self, answer: dict[str, Any]) -> dict[str, Any]:
        """One part of a streamed answer."""
        raise NotImplementedError

    def answer(self, status: int, body: bytes, content_type: str, *, length: int | None = None) -> None:
        if self.closed:
            return
        said = json.loads(body)
        translated = self.whole(said) if status < 400 else error(status, str(said["error"]))
        self._end("")
        self.real.json(status, translated, content_type=_JSON)

    def begin(self, status: int, content_type: str) -> None:
        if not self.closed:
            self.status = status
            if status < 400:
                self.real.begin(status, _EVENTS)

    def push(self, data: bytes) -> None:
        if self.closed:
            return
        said = json.loads(data)
        if "error" in said:
            failure = error(self.status or 500, str(said["error"]))
            if self.real.status is None:
                self.real.json(self.status or 500, failure, content_type=_JSON)
            else:
                self._event(failure)
            return
        self._event(self.part(said))
        if said["done"]:
            if (self.asked.get("stream_options") or {}).get("include_usage"):
                self._event(self.part(said) | {"choices": [], "usage": usage(said)})
            self.real.push(b"data: [DONE]\n\n")

    def finish(self, outcome: str = "") -> None:
        super().finish(outcome)
        self.real.finish(outcome)

    def snap(self, why: str = "connection cut") -> None:
        super().snap(why)
        self.real.snap(why)

    def _event(self, value: dict[str, Any]) -> None:
        self.real.push(b"data: " + dumps(value) + b"\n\n")

    def _head(self, kind: str, said: dict[str, Any]) -> dict[str, Any]:
        prefix = "cmpl" if kind.startswith("text") else "chatcmpl"
        head = {"id": f"{prefix}-1", "object": kind, "created": self.created_s, "model": said["model"]}
        return head | {"system_fingerprint": "fp_ollama"}

    def _options(self) -> dict[str, Any]:
        given = {native: self.asked.get(name) for name, native in _OPTIONS.items()}
        return {name: value for name, value in given.items() if value is not None}


class Chat(Translated):
    """`/v1/chat/completions`."""

    __slots__ = ()

    def native(self) -> dict[str, Any]:
        messages = self.asked.get("messages") or []
        if not messages:
            raise Refusal(400, "[] is too short - 'messages'")
        return {
            "model": self.asked.get("model"),
            "messages": [_message(message) for message in messages],
            "stream": bool(self.asked.get("stream")),
            "options": self._options(),
        }

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": 0, "message": answer["message"], "finish_reason": answer["done_reason"]}
        return self._head("chat.completion", answer) | {"choices": [choice], "usage": usage(answer)}

    def part(self, answer: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": 0, "delta": answer["message"], "finish_reason": answer.get("done_reason")}
        return self._head("chat.completion.chunk", answer) | {"choices": [choice]}


class Text(Translated):
    """`/v1/completions`."""

    __slots__ = ()

    def native(self) -> dict[str, Any]:
        body = {"model": self.asked.get("model"), "prompt": self.asked.get("prompt")}
        return body | {"stream": bool(self.asked.get("stream")), "options": self._options()}

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        return self.part(answer) | {"usage": usage(answer)}

    def part(self, answer: dict[str, Any]) -> dict[str, Any]:
        choice = {"text": answer["response"], "index": 0, "finish_reason": answer.get("done_reason")}
        return self._head("text_completion", answer) | {"choices": [choice]}


class Embedding(Translated):
    """`/v1/embeddings`."""

    __slots__ = ()

    def native(self) -> dict[str, Any]:
        return {"model": self.asked.get("model"), "input": self.asked.get("input")}

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        packed = self.asked.get("encoding_format") == "base64"
        data = [
            {"object": "embedding", "embedding": _packed(vector) if packed else vector, "index": index}
            for index, vector in enumerate(answer["embeddings"])
        ]
        used = {"prompt_tokens": len(data), "total_tokens": len(data)}
        return {"object": "list", "data": data, "model": answer["model"], "usage": used}


def usage(answer: dict[str, Any]) -> dict[str, int]:
    """What an answer cost, in tokens."""
    asked, said = int(answer.get("prompt_eval_count", 0)), int(answer.get("eval_count", 0))
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return {"role": message.get("role"), "content": content or ""}
    texts = [part.get("text", "") for part in content if part.get("type") == "text"]
    images = [part["image_url"] for part in content if part.get("type") == "image_url"]
    urls = [image["url"] if isinstance(image, dict) else image for image in images]
    if not all(url.startswith("data:image/") for url in urls):
        raise Refusal(400, "invalid image input")
    return {
        "role": message.get("role"),
        "content": "\n".join(texts),
        "images": [url.partition("base64,")[2] for url in urls],
    }


def _packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
