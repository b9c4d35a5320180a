"""A server on loopback that sends exactly the bytes a test wants, and notes what it was sent."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self


class Visit:
    """One connection: the request as it came, and the means to answer it."""

    def __init__(self, sock: socket.socket, stopping: threading.Event) -> None:
        self._sock = sock
        self._stopping = stopping
        self.gone = threading.Event()
        """Set when the client was seen to have closed its side."""
        self.head = ""
        self.body = b""

    def read_request(self) -> bool:
        """Read one whole request; False if the client said nothing."""
        data = b""
        while b"\r\n\r\n" not in data:
            more = self._sock.recv(65536)
            if not more:
                return False
            data += more
        head, _, self.body = data.partition(b"\r\n\r\n")
        self.head = head.decode("latin-1")
        length = int(self.header("Content-Length") or 0)
        while len(self.body) < length:
            self.body += self._sock.recv(65536)
        return True

    @property
    def line(self) -> str:
        """Method and path."""
        return self.head.split(" HTTP/", 1)[0]

    @property
    def json(self) -> Any:
        """The request's body."""
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        """One of the request's headers."""
        for line in self.head.split("\r\n")[1:]:
            key, _, value = line.partition(":")
            if key.lower() == name.lower():
                return value.strip()
        return None

    def send(self, data: bytes) -> None:
        """Send bytes; a client that has gone is no error here."""
        with contextlib.suppress(OSError):
            self._sock.sendall(data)

    def drip(self, data: bytes, pause_s: float = 0.02) -> None:
        """Send byte by byte, over and over, until the client goes or the server stops."""
        while True:
            for i in range(len(data)):
                try:
                    self._sock.sendall(data[i : i + 1])
                except OSError:
                    self.gone.set()
                    return
                if self._stopping.wait(pause_s):
                    return

    def flood(self, data: bytes) -> None:
        """Send without end, as fast as the client takes it."""
        with contextlib.suppress(OSError):
            while not self._stopping.is_set():
                self._sock.sendall(data)
        self.gone.set()

    def hang(self) -> None:
        """Say nothing until the client goes or the server stops."""
        with contextlib.suppress(OSError):
            while self._sock.recv(65536):
                pass
        self.gone.set()

    def reset(self) -> None:
        """Break the connection the hard way."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


class RawServer:
    """Accepts connections on loopback and gives each, with its request read, to `answer` in a thread."""

    def __init__(
        self, answer: Callable[[Visit], None], *, family: int = socket.AF_INET, tls: ssl.SSLContext | None = None
    ) -> None:
        self._answer = answer
        self._tls = tls
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._socks: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.visits: list[Visit] = []
        self._listener = socket.socket(family)
        self._listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        self._listener.listen(64)
        self.port: int = self._listener.getsockname()[1]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def wait_for_visits(self, count: int) -> list[Visit]:
        """Wait until so many requests were read."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.visits) >= count, timeout=10)
        return self.visits

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with self._changed:
            for sock in self._socks:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in tuple(self._threads):
            thread.join(timeout=10)
            assert not thread.is_alive()
        self._listener.close()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._stopping.is_set():
                sock, _ = self._listener.accept()
                self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        try:
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True)
            with self._changed:
                self._socks.add(sock)
            visit = Visit(sock, self._stopping)
            if visit.read_request():
                with self._changed:
                    self.visits.append(visit)
                    self._changed.notify_all()
                self._answer(visit)
        except OSError:
            pass
        finally:
            with self._changed:
                self._socks.discard(sock)
            sock.close()


def http(
    body: bytes | str | dict[str, Any],
    *,
    status: int = 200,
    kind: str = "application/json; charset=utf-8",
    length: int | None = None,
    headers: str = "",
) -> bytes:
    """A whole HTTP answer; `length` lies about the body's size."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body.encode() if isinstance(body, str) else body
    size = len(data) if length is None else length
    content = f"Content-Type: {kind}\r\n" if kind else ""
    return f"HTTP/1.1 {status} Said\r\n{content}Content-Length: {size}\r\n{headers}\r\n".encode() + data


def chunked(*parts: bytes, end: bool = True) -> bytes:
    """A stream as Ollama sends it: one chunk a part."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + (b"0\r\n\r\n" if end else b"")


@contextlib.contextmanager
def serving(*answers: bytes | Callable[[Visit], None]) -> Iterator[RawServer]:
    """Serve these answers, one a connection, the last one again and again."""
    left = list(answers)
    lock = threading.Lock()

    def answer(visit: Visit) -> None:
        with lock:
            what = left.pop(0) if len(left) > 1 else left[0]
        if callable(what):
            what(visit)
        else:
            visit.send(what)

    with RawServer(answer) as server:
        yield server
