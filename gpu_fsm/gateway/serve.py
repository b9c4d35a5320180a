"""The gateway as a server in a thread of its own, until it is closed."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
from types import TracebackType
from typing import Any, Self

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpu_fsm.appconfig import GatewayConfig
from gpu_fsm.errors import BadArgument, InternalError
from gpu_fsm.gateway.app import build_app
from gpu_fsm.gateway.leases import Lender
from gpu_fsm.intercept.doors import aliases_of, base_of, origin_of
from gpu_fsm.manager import GPUResourceManager

log = logging.getLogger("gpu_fsm")
http_log = logging.getLogger("gpu_fsm.gateway.http")
# What a client does wrong is told to that client; here it would only let it fill somebody's log.
http_log.addFilter(lambda record: record.levelno > logging.WARNING)

_ANY = ("0.0.0.0", "[::]")

START_S = 10.0
STOP_MARGIN_S = 5.0
"""Beyond the grace for running answers: to end what is left and to drop connections."""


class Gateway:
    """Serves `manager` to other programs; a context manager.  The manager stays the caller's, to be closed after it.

    `config` None is loopback at the default port.  Raises `OSError` where the address cannot be bound, `BadArgument`
    where it is the very address that the manager takes for Ollama's.
    """

    def __init__(self, manager: GPUResourceManager, config: GatewayConfig | None = None) -> None:
        self._config = config = config or GatewayConfig()
        _check_not_itself(config, manager)
        self._socket = _listen(config)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://{config.listen.rpartition(':')[0]}:{self.port}"
        settings = uvicorn.Config(
            build_app(manager, config, self.port, Lender(manager)),
            http=_protocol(config.idle_client_s),
            ws="none",
            lifespan="on",
            loop="asyncio",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            limit_concurrency=config.max_connections,
            timeout_keep_alive=max(1, round(config.idle_client_s)),
            timeout_graceful_shutdown=max(1, math.ceil(config.shutdown_s)),
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._serve, name="gpu_fsm-gateway", daemon=True)
        self._over = threading.Event()
        self._thread.start()
        self._wait_until_started()

    def _serve(self) -> None:
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        except SystemExit:
            log.error("gpu_fsm: the gateway could not start")
        finally:
            self._socket.close()
            self._over.set()

    def _wait_until_started(self) -> None:
        waited = 0.0
        while not self._server.started:
            if self._over.wait(0.01) or waited > START_S:
                raise InternalError(detail="the gateway did not start")
            waited += 0.01

    def close(self) -> None:
        """Take no further requests, let running ones end within the grace, break off the rest; idempotent."""
        self._server.should_exit = True
        if not self._over.wait(self._config.shutdown_s + STOP_MARGIN_S):
            self._server.force_exit = True
            self._over.wait(STOP_MARGIN_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_not_itself(config: GatewayConfig, manager: GPUResourceManager) -> None:
    """What is easily done with one OLLAMA_HOST for every program: each request would come back for ever."""
    host, _, port = config.listen.rpartition(":")
    base = base_of(manager.config)
    here = {origin_of(f"http://{name}:{port}") for name in (host, "127.0.0.1" if host in _ANY else host)}
    if int(port) and not here.isdisjoint(map(origin_of, aliases_of(base))):
        raise BadArgument(
            detail=f"the gateway would listen at {config.listen}, where it is told that Ollama is ({base})",
            remedy="Set ollama_url to the real Ollama, usually http://127.0.0.1:11434, or choose another listen.",
        )


def _listen(config: GatewayConfig) -> socket.socket:
    name, _, port = config.listen.rpartition(":")
    host = "127.0.0.1" if name == "localhost" else name.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named, and with it parts of an answer wait 40 ms.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((host, int(port)))
        made.listen(512)
    except OSError:
        made.close()
        raise
    return made


def _protocol(head_timeout_s: float) -> type[asyncio.Protocol]:
    """Uvicorn's HTTP/1.1 with a quieter log and two bounds that it lacks.

    One on the time until a request's head is there: its own timer ends at the first byte, so a client could open
    connections, say a little or nothing, and keep them.  The other on the time that a closed connection takes to end:
    a client that does not read what was sent before the close would keep it as well.
    """

    class Bounded(H11Protocol):
        _head_alarm: asyncio.TimerHandle | None = None
        _end_alarm: asyncio.TimerHandle | None = None
        _was_closing = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self.logger = http_log
            super().connection_made(transport)
            self._await_head()
            self._await_end()

        def on_response_complete(self) -> None:
            self._await_head()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            for alarm in (self._head_alarm, self._end_alarm):
                if alarm is not None:
                    alarm.cancel()
            super().connection_lost(exc)

        def _await_head(self) -> None:
            if self._head_alarm is not None:
                self._head_alarm.cancel()
            self._head_alarm = self.loop.call_later(head_timeout_s, self._head_late, self.cycle)

        def _head_late(self, last: Any) -> None:
            if self.cycle is last and not self.transport.is_closing():
                self.transport.close()

        def _await_end(self) -> None:
            closing = self.transport.is_closing()
            if closing and self._was_closing:
                self.transport.abort()
                return
            self._was_closing = closing
            self._end_alarm = self.loop.call_later(head_timeout_s, self._await_end)

    return Bounded
