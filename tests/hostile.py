"""A server that means harm: scripts of bytes and pauses, sent over a real socket or, in virtual time, without one."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import requests
from attrs import frozen
from requests.adapters import HTTPAdapter

from gpu_fsm.ollama import SocketTransport
from tests.ollama_clients import VirtualClock
from tests.raw_server import Visit

FLOOD = b" " * 65536
"""What an endless answer goes on with."""


@frozen
class Script:
    """What one connection gets: (pause in seconds, bytes) in order, and then how it goes on."""

    pieces: tuple[tuple[float, bytes], ...]
    end: str
    """`close`, `reset`, `hang`, `flood`, or `drip`: one byte of `more` every 20 ms."""
    more: bytes = FLOOD

    def steps(self) -> Iterator[tuple[float, bytes]]:
        """The pieces and what follows them; no more after the last one is the end of the connection."""
        yield from self.pieces
        if self.end == "reset":
            raise ConnectionResetError(104, "reset by peer")
        if self.end == "hang":
            yield 1e9, b""
        while self.end == "flood":
            yield 0.0, self.more
        while self.end == "drip":
            for i in range(len(self.more)):
                yield 0.02, self.more[i : i + 1]

    def play(self, visit: Visit) -> None:
        """The same over a socket; no pause is longer than 20 ms, so a long one is a hang."""
        for pause_s, data in self.pieces:
            if pause_s > 1.0:
                visit.hang()
                return
            visit.send(data)
        if self.end == "hang":
            visit.hang()
        elif self.end == "flood":
            visit.flood(self.more)
        elif self.end == "drip":
            visit.drip(self.more)
        elif self.end == "reset":
            visit.reset()


class _Reading(io.RawIOBase):
    def __init__(self, transport: ScriptedTransport) -> None:
        self._transport = transport
        self._steps = transport.script.steps()
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        transport = self._transport
        while not self._rest:
            try:
                pause_s, data = next(self._steps)
            except StopIteration:
                return 0
            if transport.clock.now + pause_s >= transport.deadline:
                transport.clock.now = max(transport.clock.now, transport.deadline)
                transport.expired = True
                return 0  # what a socket that was shut down reads
            transport.clock.now += pause_s
            self._rest = memoryview(data)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        transport.bytes_read += count
        return count


class _Socket:
    """As much of a socket as the HTTP layers use."""

    def __init__(self, transport: ScriptedTransport) -> None:
        self._reading = _Reading(transport)

    def makefile(self, mode: str, buffering: int = -1) -> Any:
        return self._reading if buffering == 0 else io.BytesIO()

    def sendall(self, data: bytes) -> None:
        """Everything fits into the network."""

    def settimeout(self, timeout_s: float | None) -> None:
        """The script knows the deadline."""

    def close(self) -> None:
        """Nothing is open."""


class ScriptedTransport(SocketTransport):
    """The real transport, with all of `requests` and `urllib3`, over a script instead of a socket."""

    simulated = True

    def __init__(self, clock: VirtualClock, script: Script, seen: list[ScriptedTransport]) -> None:
        super().__init__()
        self.clock = clock
        self.script = script
        self.deadline = 0.0
        self.bytes_read = 0
        seen.append(self)

    def send(self, request: requests.PreparedRequest, *args: Any, timeout: Any = None, **kwargs: Any) -> Any:
        self.deadline = self.clock.now + timeout
        return HTTPAdapter.send(self, request, *args, timeout=timeout, **kwargs)

    def open_socket(self, host: str, port: int, timeout_s: float) -> Any:
        return _Socket(self)


def scripted(clock: VirtualClock, script: Script) -> tuple[Callable[[], ScriptedTransport], list[ScriptedTransport]]:
    """A factory of transports that all play the script, and the list of those it has made."""
    seen: list[ScriptedTransport] = []
    return lambda: ScriptedTransport(clock, script, seen), seen
