"""The simulated Ollama as a real HTTP server on loopback, in real time."""

from __future__ import annotations

import http.server
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

from gpu_fsm.simulation.card import Card, SharedCard, SimulatedCard
from gpu_fsm.simulation.clock import RunningClock
from gpu_fsm.simulation.faults import Faults
from gpu_fsm.simulation.ollama import SimulatedModel, SimulatedOllama
from gpu_fsm.simulation.wire import Exchange

_LOOK_S = 0.05
"""How often a waiting connection is looked at for a client that has left."""


class OllamaHTTPServer:
    """A thread that serves a `SimulatedOllama` on `host:port` (0: any free port) until `close()`; a context manager."""

    def __init__(self, server: SimulatedOllama, host: str = "127.0.0.1", port: int = 0) -> None:
        self.server = server
        self._http = _Listener((host, port), _handler_for(server))
        self.host, self.port = str(self._http.server_address[0]), int(self._http.server_address[1])
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(0.05,), name="simulated-ollama", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening, cut what is open."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        self.server.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[http.server.BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # http.server's own looks the host's name up, which can take seconds without a name server.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no news."""


def _handler_for(server: SimulatedOllama) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._serve()

        do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - the base class calls them by these names

        def _serve(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            chunked = "chunked" in self.headers.get("Transfer-Encoding", "").casefold()
            body = b"".join(self._chunks()) if chunked else self.rfile.read(size) if size else b""
            headers = {"Host": self.headers.get("Host", "")}
            client = self.headers.get("X-Client") or f"{self.client_address[0]}:{self.client_address[1]}"
            exchange = Exchange(self.command, self.path, body, headers, client)
            stirred = threading.Event()
            exchange.wake = stirred.set
            try:
                server.submit(exchange)
                self._relay(exchange, stirred)
            except ConnectionRefusedError:
                self.close_connection = True
            except OSError:
                self._leave(exchange)

        def _chunks(self) -> Iterator[bytes]:
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers

        def _relay(self, exchange: Exchange, stirred: threading.Event) -> None:
            head_sent = False
            while True:
                stirred.wait(_LOOK_S)
                stirred.clear()
                with server.clock.turn:
                    chunks = list(exchange.chunks)
                    exchange.chunks.clear()
                    ended, broken = exchange.closed, exchange.broken
                if exchange.status is not None and not head_sent:
                    self._send_head(exchange)
                    head_sent = True
                for chunk in chunks:
                    self.wfile.write(chunk if exchange.length is not None else b"%x\r\n%s\r\n" % (len(chunk), chunk))
                if ended:
                    if broken or exchange.left:
                        self.close_connection = True
                    elif exchange.length is None:
                        self.wfile.write(b"0\r\n\r\n")
                    return
                if self._client_left():
                    self._leave(exchange)
                    return

        def _leave(self, exchange: Exchange) -> None:
            with server.clock.turn:
                exchange.leave()
            self.close_connection = True

        def _send_head(self, exchange: Exchange) -> None:
            self.send_response_only(exchange.status or 500)
            for name, value in exchange.headers.items():
                self.send_header(name, value)
            self.send_header("Date", self.date_time_string())
            self.end_headers()

        def _client_left(self) -> bool:
            try:
                readable, _, _ = select.select([self.connection], [], [], 0)
                return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
            except OSError:
                return True

        def log_message(self, *_: object) -> None:
            """Requests are in the server's own log."""

    return Handler


def run_server(
    port: int = 0,
    models: Iterable[SimulatedModel] = (),
    *,
    host: str = "127.0.0.1",
    version: str = "0.32.15",
    vram_mib: float | None = 8192.0,
    card_path: str | None = None,
    unload_s: float = 0.08,
    reclaim_s: float = 0.3,
    generate_s: float = 0.5,
    responder: Callable[[str, str, list[bytes]], str] | None = None,
    faults: Faults | None = None,
    registry: Iterable[SimulatedModel] = (),
    pull_s: float = 2.0,
    say: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> int:
    """Serve until SIGTERM, SIGINT or `stop`; says the URL when it is ready.  Returns an exit code.

    The card is one of its own of `vram_mib` (None: no GPU), or the one shared through the file `card_path`.
    """
    clock = RunningClock()
    card: Card | None = None
    if card_path is not None:
        card = SharedCard(card_path, vram_mib or 8192.0, clock=clock)
    elif vram_mib is not None:
        card = SimulatedCard(vram_mib, clock=clock)
    server = SimulatedOllama(
        models,
        clock=clock,
        card=card,
        faults=faults,
        version=version,
        unload_s=unload_s,
        reclaim_s=reclaim_s,
        generate_s=generate_s,
        responder=responder,
        registry=registry,
        pull_s=pull_s,
        epoch_s=_epoch(clock),
    )
    over = stop or threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: over.set())
    with OllamaHTTPServer(server, host, port) as front:
        (say or _say)(f"simulated Ollama {server.version} is listening on {front.url}")
        over.wait()
        server.reclaim_s = 0.0
    clock.close()
    return 0


def serve(server: SimulatedOllama, host: str = "127.0.0.1", port: int = 0) -> OllamaHTTPServer:
    """Put a server on a socket; its clock must run by itself, or somebody else must move it."""
    return OllamaHTTPServer(server, host, port)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _epoch(clock: RunningClock) -> float:
    return time.time() - clock.monotonic()
