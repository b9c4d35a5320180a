"""The simulated Ollama as a transport adapter of `requests`: no sockets, virtual time, real `requests` behaviour."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import BaseAdapter
from requests.cookies import RequestsCookieJar
from requests.structures import CaseInsensitiveDict
from urllib3.exceptions import ProtocolError, ReadTimeoutError
from urllib3.response import HTTPResponse

from gpu_fsm.simulation.clock import SimulatedClock
from gpu_fsm.simulation.ollama import SimulatedOllama
from gpu_fsm.simulation.wire import Exchange

_NO_TIME = timedelta(0)
_REASONS = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    500: "Internal Server Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
}


class _Body(io.RawIOBase):
    """The body as it comes; a read moves the clock until there is something to read."""

    def __init__(self, adapter: SimulatedAdapter, exchange: Exchange, deadline: float | None) -> None:
        self._adapter = adapter
        self._exchange = exchange
        self._deadline = deadline
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        exchange = self._exchange
        if not self._rest:
            if not exchange.chunks and not exchange.closed:
                self._adapter.wait_for(exchange, self._deadline, lambda: bool(exchange.chunks))
            if exchange.chunks:
                self._rest = exchange.chunks.popleft()
            elif exchange.left:
                raise ConnectionAbortedError("the connection was closed on this side")
            elif exchange.broken and exchange.length is None:
                raise ConnectionResetError("connection reset by peer")
            else:
                return 0
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._adapter.hang_up(self._exchange)
        super().close()


class _Chunks(HTTPResponse):
    """An answer without a length: each part is given as soon as it is there, as `urllib3` does with real chunks."""

    def __init__(self, body: _Body, **facts: Any) -> None:
        super().__init__(body=body, **facts)
        self._parts = body

    def stream(self, amt: int | None = 2**16, decode_content: bool | None = None) -> Iterator[bytes]:  # type: ignore[override]
        while True:
            try:
                part = self._parts.read(amt or 2**16)
            except TimeoutError as late:
                raise ReadTimeoutError(None, "", "read timed out") from late  # type: ignore[arg-type]  # there is no pool
            except OSError as lost:
                raise ProtocolError(f"connection broken: {lost}", lost) from lost
            if not part:
                return
            yield part


class _Whole(io.BytesIO):
    """A body that is all there: what `requests` needs of a raw answer, at a fraction of the price of a real one."""

    def __init__(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        super().__init__(body)
        self.status = status
        self.headers = headers

    def read(self, size: int | None = -1, decode_content: bool | None = None) -> bytes:
        return super().read(size)

    def release_conn(self) -> None:
        """There is no connection to give back."""


class _Response(requests.Response):
    """An answer without the parts that only a session fills: `requests` takes longer to make those than all else."""

    def __init__(self) -> None:
        self._content = False  # type: ignore[assignment]  # requests says so, its types do not
        self._content_consumed = False
        self._next = None
        self.encoding = "utf-8"
        self.history = []
        self.elapsed = _NO_TIME

    @property
    def cookies(self) -> RequestsCookieJar:  # type: ignore[override]
        return RequestsCookieJar()


class SimulatedAdapter(BaseAdapter):
    """Carries requests to a `SimulatedOllama`; alone, or mounted on a `requests.Session`.

    `timeout` counts in simulated seconds, for the whole of a call, the body included; of a pair the second number.
    `abort()` may come from any thread and does not block; what is in flight ends with a ConnectionError, and so does
    every later `send`.  Nobody listening is `ConnectionError(ConnectionRefusedError(...))`.
    """

    simulated = True

    def __init__(self, server: SimulatedOllama, *, client: str = "us") -> None:
        super().__init__()
        if not isinstance(server.clock, SimulatedClock):
            raise TypeError("the transport without sockets needs a SimulatedClock")
        self.server = server
        self.clock = server.clock
        self.client = client
        self.expired = False
        """Whether a call ended because its time was over."""
        self.limit = 0
        """Not heeded: this server is honest."""
        self._aborted = False
        self._open: set[Exchange] = set()

    def abort(self) -> None:
        """End what is in flight; the server learns of it as soon as the waiting thread wakes."""
        self._aborted = True
        self.clock.poke()

    def close(self) -> None:
        """Drop what is still open."""
        for exchange in tuple(self._open):
            self.hang_up(exchange)

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        """Send; return when the head of the answer is there."""
        authority, path = _target(request.url or "")
        limit_s = timeout[1] if isinstance(timeout, tuple) else timeout
        deadline = None if limit_s is None else self.clock.monotonic() + limit_s
        body = request.body or b""
        exchange = Exchange(
            request.method or "GET",
            path,
            body.encode() if isinstance(body, str) else bytes(body),
            _host(authority),
            self.client,
        )
        server = self.server
        op = server.classify(exchange)
        if server.on_io is not None:
            server.on_io(op, "before")
        try:
            if server.unreachable:
                self.clock.sleep(127.0 if deadline is None else max(0.0, deadline - self.clock.monotonic()))
                self.expired = True
                raise requests.exceptions.ConnectTimeout("connection timed out", request=request)
            self._open.add(exchange)
            try:
                server.submit(exchange)
                self.wait_for(exchange, deadline, lambda: exchange.status is not None)
                if exchange.status is None:
                    raise ConnectionResetError("the server closed the connection without an answer")
            except TimeoutError as late:
                raise requests.exceptions.ReadTimeout(late, request=request) from late
            except OSError as lost:
                raise requests.exceptions.ConnectionError(lost, request=request) from lost
            return self._response(request, exchange, deadline)
        finally:
            if exchange.status is None:
                self.hang_up(exchange)
            if server.on_io is not None:
                server.on_io(op, "after")

    def wait_for(self, exchange: Exchange, deadline: float | None, come: Callable[[], bool]) -> None:
        """Move the clock until `come()` or the end of the exchange; TimeoutError or another OSError if neither."""
        arrived = self.clock.run_until(lambda: self._aborted or exchange.closed or come(), deadline)
        if self._aborted:
            self.hang_up(exchange)
            raise ConnectionAbortedError("the connection was closed on this side")
        if not arrived:
            self.expired = True
            self.hang_up(exchange)
            raise TimeoutError("read timed out")

    def hang_up(self, exchange: Exchange) -> None:
        """Close our side of the connection."""
        self._open.discard(exchange)
        if not exchange.closed:
            with self.clock.turn:
                exchange.leave()

    def _response(
        self, request: requests.PreparedRequest, exchange: Exchange, deadline: float | None
    ) -> requests.Response:
        status = exchange.status or 0
        response = _Response()
        response.status_code = status
        response.headers = CaseInsensitiveDict(exchange.headers)
        response.reason = _REASONS.get(status, "")
        response.url = request.url or ""
        response.request = request
        if exchange.finished and not exchange.broken:
            self._open.discard(exchange)
            response.raw = _Whole(b"".join(exchange.chunks), status, exchange.headers)
        else:
            make = _Chunks if exchange.length is None else HTTPResponse
            response.raw = make(
                body=_Body(self, exchange, deadline),
                headers=exchange.headers,
                status=status,
                reason=response.reason,
                preload_content=False,
                decode_content=False,
                request_method=request.method,
            )
        return response


@functools.lru_cache(maxsize=256)
def _host(authority: str) -> dict[str, str]:
    return {"Host": authority}


@functools.lru_cache(maxsize=256)
def _target(url: str) -> tuple[str, str]:
    """Host header and path of a URL."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2], (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
