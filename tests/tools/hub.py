"""A hub that has one model, on loopback; its weights come when the test lets them.

with Hub(folder) as hub:
    fetch from hub.url; hub.held.wait(); hub.let_go()
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

COMMIT = "a" * 40
PADDING = 24 << 20
"""Bytes beside a tiny model's own, so that its download has more than one piece."""


class Hub:
    """Serves the files of `folder` as the model `somebody/tiny`."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.files["padding.safetensors"] = bytes(PADDING)
        self.held = threading.Event()
        """Half of the weights have been sent."""
        self._go = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *_: object) -> None:
                """Not on stderr."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        """The three kinds of question that a download consists of."""
        path = request.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith("/api/models/somebody/tiny/tree/"):
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self._send(request, json.dumps(files).encode(), {"Content-Type": "application/json"}, body=True)
        elif path.startswith("/api/models/somebody/tiny"):
            told = {"id": "somebody/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            self._send(request, json.dumps(told).encode(), {"Content-Type": "application/json"}, body=True)
        elif path.startswith("/somebody/tiny/resolve/") and name in self.files:
            data = self.files[name]
            facts = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self._send(request, data, facts, body=body, hold=name == "padding.safetensors")
        else:
            request.send_error(404)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        data: bytes,
        facts: dict[str, str],
        *,
        body: bool,
        hold: bool = False,
    ) -> None:
        request.send_response(200)
        for name, value in {**facts, "Content-Length": str(len(data))}.items():
            request.send_header(name, value)
        request.end_headers()
        if not body:
            return
        try:
            if hold:
                half, data = data[: len(data) // 2], data[len(data) // 2 :]
                request.wfile.write(half)
                self.held.set()
                self._go.wait()
            request.wfile.write(data)
        except ConnectionError:  # whoever fetched has been ended
            request.close_connection = True

    def hold(self) -> None:
        """Hold the weights back from the next download on."""
        self.held.clear()
        self._go.clear()

    def let_go(self) -> None:
        """Send the rest."""
        self._go.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()
        self._server.shutdown()
        self._server.server_close()
