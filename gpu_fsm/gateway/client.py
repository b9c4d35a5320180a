"""One request's caller: its body within bounds, its answer at its own pace within bounds, and when it has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from gpu_fsm.appconfig import GatewayConfig
from gpu_fsm.errors import BadArgument, GPUFSMError
from gpu_fsm.intercept.answers import answer_for

MIB = 1 << 20
MAX_UPLOAD_MIB = 65536.0
"""For what runs no model, a model's own file above all; it is passed on as it comes and never held."""

T = TypeVar("T")


class ClientGone(Exception):
    """It closed its side, or reads so slowly that it might as well have."""


class BadBody(Exception):
    """The body broke a bound; `status` says which."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Client:
    """The caller of one ASGI request."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, config: GatewayConfig) -> None:
        self.scope = scope
        self._receive, self._send, self._config = receive, send, config
        self._whole = asyncio.Event()
        self._finished = False
        self.started = False
        """The head of an answer is out."""
        if not any(key in (b"content-length", b"transfer-encoding") for key, _ in scope["headers"]):
            self._whole.set()

    @property
    def has_body(self) -> bool:
        """Whether a part of the body is still to come."""
        return not self._whole.is_set()

    @property
    def name(self) -> str:
        """Who it is, for leases."""
        host, port = self.scope.get("client") or ("?", 0)
        return f"gateway client {host}:{port}"

    async def read(self) -> bytes:
        """The whole body of a request that runs a model.  Raises `BadBody`, `ClientGone`."""
        parts = bytearray()
        try:
            async with asyncio.timeout(self._config.idle_client_s):
                async for part in self._parts(self._config.max_body_mib):
                    parts += part
        except TimeoutError:
            raise BadBody(408, f"the request did not arrive within {self._config.idle_client_s:g} s") from None
        return bytes(parts)

    async def stream(self) -> AsyncIterator[bytes]:
        """The body of an upload as it comes; the same errors, the time between two parts being bounded."""
        parts = self._parts(MAX_UPLOAD_MIB)
        while True:
            try:
                async with asyncio.timeout(self._config.idle_client_s):
                    part = await anext(parts)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise BadBody(408, f"nothing arrived for {self._config.idle_client_s:g} s") from None
            yield part

    async def _parts(self, limit_mib: float) -> AsyncIterator[bytes]:
        limit, came = int(limit_mib * MIB), 0
        told = [value for key, value in self.scope["headers"] if key == b"content-length"]
        too_much = f"more than {limit_mib:g} MiB"
        if told and int(told[0]) > limit:
            raise BadBody(413, too_much)
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            came += len(part)
            if came > limit:
                raise BadBody(413, too_much)
            if part:
                yield part
            if not message.get("more_body", False):
                self._whole.set()
                return

    async def left(self) -> None:
        """Return when it has gone; knows only once the body has been read."""
        await self._whole.wait()
        while (await self._receive())["type"] != "http.disconnect" or self._finished:
            if self._finished:
                await asyncio.Event().wait()  # what ended is the answer

    async def while_there(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` until it ends or the caller has left, which cancels it and raises `ClientGone`."""
        tasks = asyncio.ensure_future(work), asyncio.ensure_future(self.left())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if tasks[0].cancelled():
            raise ClientGone
        return tasks[0].result()

    async def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the head."""
        self.started = True
        await self._tell({"type": "http.response.start", "status": status, "headers": headers})

    async def push(self, part: bytes) -> None:
        """Send a part; raises `ClientGone` where it is not read in time."""
        await self._tell({"type": "http.response.body", "body": part, "more_body": True})

    async def finish(self) -> None:
        """The regular end."""
        self._finished = True
        await self._tell({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, error: GPUFSMError, *, status: int | None = None) -> None:
        """An error as the whole answer; after its head an answer can only be broken off."""
        if not self.started:
            self.started = True
            # What is left of the body is not read, so the connection cannot go on.
            extra = {} if self._whole.is_set() else {"Connection": "close"}
            await refuse(self.scope, self._send, error, status=status, extra=extra)

    async def _tell(self, message: dict[str, object]) -> None:
        try:
            async with asyncio.timeout(self._config.idle_client_s):
                await self._send(message)
        except (TimeoutError, OSError):
            raise ClientGone from None


async def refuse(
    scope: Scope,
    send: Send,
    error: GPUFSMError,
    *,
    status: int | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Answer with an error, in the shape that the route's API has."""
    answer = answer_for(error, scope["path"], status=status)
    headers = {**answer.headers, "Content-Length": str(len(answer.body)), **(extra or {})}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": raw})
    await send({"type": "http.response.body", "body": answer.body})


def bad_body(error: BadBody) -> BadArgument:
    """The refusal in words."""
    return BadArgument(detail=str(error))
