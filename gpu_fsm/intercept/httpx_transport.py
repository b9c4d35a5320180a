"""The door for clients built on `httpx`, the official `ollama` and `openai` ones among them: a transport to pass in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack
from urllib.parse import urlsplit

import httpx

from gpu_fsm.arguments import default_holder
from gpu_fsm.errors import GPUFSMError
from gpu_fsm.intercept.answers import answer_for
from gpu_fsm.intercept.doors import TAGS, TAGS_S, Held, Manager, Rules, admit, admit_async, aliases_of, base_of
from gpu_fsm.intercept.needs import Ask


class _Door:
    """What both transports do before a request goes on."""

    def __init__(self, manager: Manager, rules: Rules, holder: str) -> None:
        self.manager, self.rules, self.holder = manager, rules, holder
        base = base_of(manager.config)
        self._prefix = urlsplit(base).path
        self._origins = {_origin(httpx.URL(alias)) for alias in aliases_of(base)}

    def is_ours(self, request: httpx.Request) -> bool:
        """Whether it goes to the manager's Ollama."""
        return _origin(request.url) in self._origins and request.url.path.startswith(f"{self._prefix}/")

    def path(self, request: httpx.Request) -> str:
        """Ollama's own path."""
        return request.url.path.removeprefix(self._prefix)

    def read(self, request: httpx.Request, body: bytes, *, vlm: str = "") -> Ask:
        """See `Rules.read`."""
        encoded = "Content-Encoding" in request.headers
        return self.rules.read(self.manager.config, request.method, self.path(request), body, encoded=encoded, vlm=vlm)

    def is_alias(self, ask: Ask, tags: bytes) -> bool:
        """See `Rules.is_alias`."""
        return self.rules.is_alias(self.manager.config, ask, tags)

    def tags(self, request: httpx.Request) -> httpx.Request:
        """The question that `is_alias` needs the answer of, with the credentials of the request in hand."""
        headers = {name: request.headers[name] for name in ("Host", "Authorization") if name in request.headers}
        url = request.url.copy_with(raw_path=f"{self._prefix}{TAGS}".encode())
        return httpx.Request("GET", url, headers=headers, extensions={"timeout": httpx.Timeout(TAGS_S).as_dict()})

    def named(self, request: httpx.Request) -> str:
        """The lease's holder."""
        return f"{self.holder or default_holder()}: {request.method} {self.path(request)}"

    def refuse(self, request: httpx.Request, error: GPUFSMError) -> httpx.Response:
        """Ollama's shape of an error, which is what the client knows how to handle."""
        answer = answer_for(error, self.path(request))
        return httpx.Response(answer.status, headers=answer.headers, content=answer.body, request=request)


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _with_body(request: httpx.Request, body: bytes) -> httpx.Request:
    headers = [(k, v) for k, v in request.headers.raw if k.lower() not in (b"content-length", b"transfer-encoding")]
    return httpx.Request(
        request.method, request.url, headers=headers, content=body, extensions=dict(request.extensions)
    )


class VLMTransport(httpx.BaseTransport):
    """For `ollama.Client(transport=...)` and `httpx.Client(transport=...)`."""

    def __init__(self, manager: Manager, rules: Rules, *, holder: str = "") -> None:
        self._door = _Door(manager, rules, holder)
        self._inner = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Load and lease what the request needs, send it, and keep the lease until the answer is read."""
        door = self._door
        if not door.is_ours(request):
            return self._inner.handle_request(request)
        held = Held(stack := ExitStack())
        try:
            body = request.read()
            ask = door.read(request, body)
            if ask.names_another and door.is_alias(ask, self._tags(request)):
                ask = door.read(request, body, vlm=ask.model)
            admit(door.manager, ask, stack, holder=door.named(request), timeout_s=door.rules.timeout_s)
        except GPUFSMError as error:
            held.close()
            return door.refuse(request, error)
        try:
            response = self._inner.handle_request(request if ask.body is body else _with_body(request, ask.body))
        except BaseException:
            held.close()
            raise
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _Leased(response.stream, held)
        return response

    def _tags(self, request: httpx.Request) -> bytes:
        try:
            response = self._inner.handle_request(self._door.tags(request))
            with contextlib.closing(response):
                return response.read()
        except httpx.HTTPError:
            return b""

    def close(self) -> None:
        """Drop connections."""
        self._inner.close()


class _Leased(httpx.SyncByteStream):
    """A body whose end gives the lease back."""

    def __init__(self, inner: httpx.SyncByteStream, held: Held) -> None:
        self._inner, self._held = inner, held
        held.with_owner(self, inner.close)

    def __iter__(self) -> Iterator[bytes]:
        yield from self._inner

    def close(self) -> None:
        """Called by `httpx` at the end of the body and on every way out."""
        try:
            self._inner.close()
        finally:
            self._held.close()


class AsyncVLMTransport(httpx.AsyncBaseTransport):
    """For `ollama.AsyncClient(transport=...)` and `httpx.AsyncClient(transport=...)`."""

    def __init__(self, manager: Manager, rules: Rules, *, holder: str = "") -> None:
        self._door = _Door(manager, rules, holder)
        self._inner = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See `VLMTransport.handle_request`; the event loop never blocks."""
        door = self._door
        if not door.is_ours(request):
            return await self._inner.handle_async_request(request)
        stack = AsyncExitStack()
        try:
            body = await request.aread()
            ask = door.read(request, body)
            if ask.names_another and door.is_alias(ask, await self._tags(request)):
                ask = door.read(request, body, vlm=ask.model)
            await admit_async(door.manager, ask, stack, holder=door.named(request), timeout_s=door.rules.timeout_s)
        except GPUFSMError as error:
            await stack.aclose()
            return door.refuse(request, error)
        try:
            sent = request if ask.body is body else _with_body(request, ask.body)
            response = await self._inner.handle_async_request(sent)
        except BaseException:
            await stack.aclose()
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _AsyncLeased(response.stream, stack)
        return response

    async def _tags(self, request: httpx.Request) -> bytes:
        try:
            async with asyncio.timeout(TAGS_S):  # all of it: httpx counts anew with every part
                response = await self._inner.handle_async_request(self._door.tags(request))
                async with contextlib.aclosing(response):
                    return await response.aread()
        except (httpx.HTTPError, TimeoutError):
            return b""

    async def aclose(self) -> None:
        """Drop connections."""
        await self._inner.aclose()


class _AsyncLeased(httpx.AsyncByteStream):
    """The same for asyncio, whose loop finishes what is forgotten: no finalizer is needed."""

    def __init__(self, inner: httpx.AsyncByteStream, stack: AsyncExitStack) -> None:
        self._inner, self._stack = inner, stack

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._inner:
            yield part

    async def aclose(self) -> None:
        """Called by `httpx` at the end of the body and on every way out."""
        try:
            await self._inner.aclose()
        finally:
            await self._stack.aclose()
