"""On to Ollama and back, byte by byte; what runs the VLM does so under a lease.

A client that leaves frees its lease at once and its request in Ollama ends.  One that leaves while the VLM loads only
stops waiting: the load is the manager's own, and others may wait for it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import re
from collections.abc import AsyncIterator, Callable
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import httpx
from starlette.types import Receive, Scope, Send

from gpu_fsm.appconfig import GatewayConfig
from gpu_fsm.errors import BadArgument, GPUFSMError, ManagerClosed, OllamaTimeout, OllamaUnavailable, one_line
from gpu_fsm.gateway.client import BadBody, Client, ClientGone, bad_body
from gpu_fsm.gateway.leases import Lender
from gpu_fsm.intercept.doors import TAGS, TAGS_S, Manager, Rules, admit_async, base_of
from gpu_fsm.intercept.needs import Need, may_run_a_model

CONNECT_S = 5.0
"""An Ollama that is there accepts in milliseconds."""

T = TypeVar("T")

LARGE_BODY = 1 << 18
"""Bytes; up to here a request is read in a millisecond or two."""

_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade expect host".split()
)
"""Headers of one connection, and the Host, which names us and not Ollama."""
_JUDGED = frozenset({b"origin", b"referer"})
"""Judged here; Ollama would judge our own address again."""


class Relay:
    """The ASGI application for every route that is Ollama's."""

    def __init__(self, manager: Manager, config: GatewayConfig, lender: Lender) -> None:
        self._manager, self._config, self._lender = manager, config, lender
        self._rules = Rules(other_models=config.other_models)
        self._base = base_of(manager.config)
        self._prefix = urlsplit(self._base).path
        self._authorization = _authorization(manager)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=5.0)
        # Redirects would carry credentials elsewhere, and the environment's proxies would carry screenshots.
        self._http = httpx.AsyncClient(trust_env=False, follow_redirects=False, limits=limits)

    async def close(self) -> None:
        """Drop the connections to Ollama."""
        await self._http.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = Client(scope, receive, send, self._config)
        try:
            await client.while_there(self._judge(client))
        except ClientGone:
            pass
        except BadBody as error:
            await client.refuse(bad_body(error), status=error.status)
        except GPUFSMError as error:
            await client.refuse(error)
        except asyncio.CancelledError:  # the server stops, and the time for running answers is over
            await client.refuse(ManagerClosed(detail="the gateway is stopping", remedy="Ask again later."))

    async def _judge(self, client: Client) -> None:
        scope = client.scope
        if {b"content-length", b"transfer-encoding"} <= {key for key, _ in scope["headers"]}:
            raise BadArgument(detail="the request tells its length in two ways")
        url = self._url(scope)
        # The path as it goes on, not as it came: what is judged must be what Ollama is asked.
        path = unquote(url.raw_path.partition(b"?")[0].decode("ascii")).removeprefix(self._prefix)
        if not may_run_a_model(scope["method"], path):
            if await self._relay(client, url, client.stream() if client.has_body else None):
                await client.finish()
            return
        body = await client.read()
        encoded = any(key == b"content-encoding" for key, _ in scope["headers"])
        config = self._manager.config
        asked = config, scope["method"], path, body
        # Reading a picture takes longer than others should wait.
        far = asyncio.to_thread if len(body) >= LARGE_BODY else _at_once
        ask = await far(functools.partial(self._rules.read, *asked, encoded=encoded))
        if ask.names_another and self._rules.is_alias(config, ask, await self._tags()):
            ask = await far(functools.partial(self._rules.read, *asked, encoded=encoded, vlm=ask.model))
        holder = f"{client.name}: {scope['method']} {one_line(path, 60)}"
        async with contextlib.AsyncExitStack() as stack:
            if ask.need is Need.VLM:
                self._lender.check_free()
            elif ask.need is Need.OTHER:
                stack.enter_context(self._lender.other_model(holder))
            await admit_async(self._manager, ask, stack, holder=holder, timeout_s=self._rules.timeout_s)
            whole = await self._relay(client, url, ask.body)
        if whole:
            await client.finish()  # who has read the end of an answer finds no lease of it

    async def _relay(self, client: Client, url: httpx.URL, body: bytes | AsyncIterator[bytes] | None) -> bool:
        """Send a request on and its answer back; False where the answer broke off in the middle."""
        config = self._manager.config
        timeout = httpx.Timeout(config.inference_timeout_s, connect=CONNECT_S, pool=None)
        request = httpx.Request(
            client.scope["method"],
            url,
            headers=self._request_headers(client.scope, whole=isinstance(body, bytes)),
            content=body,
            extensions={"timeout": timeout.as_dict()},
        )
        try:
            response = await self._http.send(request, stream=True)
        except httpx.HTTPError as error:
            raise _translated(error, self._base) from None
        async with contextlib.aclosing(response):
            await client.begin(response.status_code, self._answer_headers(response))
            try:
                async for part in response.aiter_raw():
                    await client.push(part)
            except httpx.HTTPError:
                return False  # and so does ours: the server cuts an answer that does not end
        return True

    async def _tags(self) -> bytes:
        headers = [(b"authorization", self._authorization)] if self._authorization else []
        try:
            async with asyncio.timeout(TAGS_S):  # all of it: httpx would count anew with every part
                return (await self._http.get(self._base + TAGS, headers=headers, timeout=None)).content
        except (httpx.HTTPError, TimeoutError):
            return b""

    def _url(self, scope: Scope) -> httpx.URL:
        path = scope["raw_path"].decode("latin-1")
        if not path.startswith("/"):
            raise BadArgument(detail="the request names no path")
        # Whoever resolves them, at whatever stage, they must not lead out of Ollama's own part of a server.
        if not {".", ".."}.isdisjoint(re.split(r"[/\\]", unquote(path))):
            raise BadArgument(detail="the request's path has dots for folders")
        query = scope["query_string"].decode("latin-1")
        try:
            return httpx.URL(f"{self._base}{path}{'?' + query if query else ''}")
        except (httpx.InvalidURL, ValueError):
            raise BadArgument(detail="the request's path cannot be read") from None

    def _request_headers(self, scope: Scope, *, whole: bool) -> list[tuple[bytes, bytes]]:
        dropped = _HOP | _JUDGED | _named_by_connection(scope["headers"]) | ({b"content-length"} if whole else set())
        if self._config.token or self._authorization:
            dropped |= {b"authorization"}  # it was for us, or ours is for Ollama
        kept = [(key, value) for key, value in scope["headers"] if key not in dropped]
        return [*kept, (b"authorization", self._authorization)] if self._authorization else kept

    def _answer_headers(self, response: httpx.Response) -> list[tuple[bytes, bytes]]:
        raw = [(key.lower(), value) for key, value in response.headers.raw]
        dropped = _HOP | _named_by_connection(raw)
        return [(k, v) for k, v in raw if k not in dropped and not k.startswith(b"access-control-")]


async def _at_once(call: Callable[[], T]) -> T:
    return call()


def _named_by_connection(headers: list[tuple[bytes, bytes]]) -> frozenset[bytes]:
    names = [value for key, value in headers if key == b"connection"]
    return frozenset(name.strip().lower() for value in names for name in value.split(b","))


def _authorization(manager: Manager) -> bytes:
    """The credentials of Ollama's address, as a header."""
    url = manager.config.ollama_url
    userinfo, at, _ = urlsplit(str.__str__(url)).netloc.rpartition("@")
    if not at:
        return b""
    user, _, password = userinfo.partition(":")
    return b"Basic " + base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode())


def _translated(error: httpx.HTTPError, url: str) -> OllamaUnavailable:
    if isinstance(error, httpx.TimeoutException):
        return OllamaTimeout(detail="Ollama did not answer in time", url=url)
    return OllamaUnavailable(
        detail=f"Ollama cannot be reached ({type(error).__name__})", remedy="Start it (ollama serve).", url=url
    )
