"""The door for code that calls Ollama with `requests`: an adapter to mount."""

from __future__ import annotations

import io
from contextlib import ExitStack
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from requests.adapters import BaseAdapter, HTTPAdapter
from requests.models import PreparedRequest, Response

from gpu_fsm.arguments import default_holder
from gpu_fsm.errors import GPUFSMError
from gpu_fsm.intercept.answers import Answer, answer_for
from gpu_fsm.intercept.doors import TAGS, TAGS_S, Held, Manager, Rules, admit, aliases_of, base_of, origin_of


class VLMAdapter(HTTPAdapter):
    """Sends requests as `requests` does; those that run the VLM load it first and hold a lease until they are read.

    A refusal comes as an HTTP answer in Ollama's own shape, which is what the calling code knows how to handle.
    """

    def __init__(self, manager: Manager, rules: Rules, *, prefix: str, holder: str) -> None:
        self._manager, self._rules, self._prefix, self._holder = manager, rules, prefix, holder
        super().__init__()

    def send(self, request: PreparedRequest, *args: Any, **options: Any) -> Response:
        """See `requests.adapters.HTTPAdapter.send`."""
        url = urlsplit(request.url or "")
        path = unquote(url.path).removeprefix(self._prefix)
        stack = ExitStack()
        try:
            body = _body_of(request)
            encoded = "Content-Encoding" in request.headers
            asked = self._manager.config, request.method or "GET", path, body
            ask = self._rules.read(*asked, encoded=encoded)
            if ask.names_another and self._rules.is_alias(asked[0], ask, self._tags(request, options)):
                ask = self._rules.read(*asked, encoded=encoded, vlm=ask.model)
            if ask.body is not body:
                request = request.copy()
                request.prepare_body(ask.body, None)
            holder = f"{self._holder or default_holder()}: {request.method} {path}"
            admit(self._manager, ask, stack, holder=holder, timeout_s=self._rules.timeout_s)
        except GPUFSMError as error:
            stack.close()
            return _refusal(answer_for(error, path), request, self)
        held = Held(stack)
        try:
            response = super().send(request, *args, **options)
        except BaseException:
            held.close()
            raise
        return _until_read(response, held)

    def _tags(self, request: PreparedRequest, options: dict[str, Any]) -> bytes:
        """Ask with the credentials of the request in hand."""
        url = urlsplit(request.url or "")
        told = requests.Request("GET", f"{url.scheme}://{url.netloc}{self._prefix}{TAGS}").prepare()
        if "Authorization" in request.headers:
            told.headers["Authorization"] = request.headers["Authorization"]
        try:
            return super().send(told, **{**options, "stream": False, "timeout": TAGS_S}).content
        except requests.RequestException:
            return b""


class DoorSession(requests.Session):
    """A session whose requests to the manager's Ollama go through the door; all others go as ever."""

    def __init__(self, door: VLMAdapter, base: str) -> None:
        super().__init__()
        self._door, self._prefix = door, urlsplit(base).path
        self._origins = frozenset(map(origin_of, aliases_of(base)))

    def get_adapter(self, url: str) -> BaseAdapter:
        """The door, however the address is written: with a port that goes without saying, or with credentials."""
        # What is mounted is found by the first letters of an address; those of port 80 are also those of port 8080.
        if origin_of(url) in self._origins and urlsplit(url).path.startswith(f"{self._prefix}/"):
            return self._door
        return super().get_adapter(url)

    def close(self) -> None:
        """Drop connections."""
        self._door.close()
        super().close()


def session(manager: Manager, rules: Rules, *, holder: str = "") -> DoorSession:
    """See `GPUResourceManager.requests_session`."""
    base = base_of(manager.config)
    return DoorSession(VLMAdapter(manager, rules, prefix=urlsplit(base).path, holder=holder), base)


def _body_of(request: PreparedRequest) -> bytes:
    """The body as bytes; one that comes in parts is read, since it has to be judged before it is sent."""
    body: Any = request.body
    if body is None or isinstance(body, bytes):
        return body or b""
    if isinstance(body, str):
        return body.encode()
    whole = body.read() if hasattr(body, "read") else b"".join(body)
    request.headers.pop("Transfer-Encoding", None)
    request.prepare_body(whole, None)
    return whole if isinstance(whole, bytes) else str(whole).encode()


def _until_read(response: Response, held: Held) -> Response:
    """Keep the lease until the body has been read, closed or forgotten: urllib3 gives its connection back then."""
    raw: Any = response.raw
    give_back = raw.release_conn

    def release_conn() -> None:
        try:
            give_back()
        finally:
            held.close()

    raw.release_conn = release_conn
    if raw._original_response is None or raw._original_response.isclosed():
        held.close()  # an answer without a body is read already
    else:
        held.with_owner(response, raw.close)
    return response


def _refusal(answer: Answer, request: PreparedRequest, adapter: HTTPAdapter) -> Response:
    response = Response()
    response.status_code = answer.status
    response.headers.update(answer.headers)
    response.encoding = "utf-8"
    response.raw = io.BytesIO(answer.body)
    response.url = request.url or ""
    response.request = request
    response.connection = adapter
    return response
