"""Who may come in: the Host a request names, the web page it comes from, the token it carries.

A web page can make a browser send requests to loopback, and by rebinding a name of its own it can read the answers.
So the Host must be exactly one that we listen under, and a request that names a page needs that page's permission.
"""

from __future__ import annotations

import hmac
import ipaddress

from starlette.types import ASGIApp, Receive, Scope, Send

from gpu_fsm.appconfig import GatewayConfig
from gpu_fsm.errors import BadArgument
from gpu_fsm.gateway.client import refuse
from gpu_fsm.rules import Secret


class Guard:
    """ASGI middleware: asks for Host and Origin."""

    def __init__(self, app: ASGIApp, config: GatewayConfig, port: int) -> None:
        self._app = app
        self._hosts = hosts_of(config, port)
        self._origins = frozenset(origin.casefold() for origin in config.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = self._problem(scope)
            if problem is not None:
                await refuse(scope, send, BadArgument(detail=problem), status=403)
                return
            if not scope["path"].startswith("/"):
                error = BadArgument(detail="the request names no path of this server", remedy="It is no proxy.")
                await refuse(scope, send, error, status=400)
                return
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        hosts, origins = header(scope, b"host"), header(scope, b"origin")
        host = hosts[0].casefold() if len(hosts) == 1 else ""
        if host not in self._hosts:
            return "this Host is not served here (allow it with allowed_hosts)"
        if len(origins) > 1:
            return "more than one Origin"
        if origins:
            origin = origins[0].casefold()
            if origin not in self._origins and origin != f"{scope.get('scheme', 'http')}://{host}":
                return "this Origin may not call (allow it with allowed_origins)"
        elif header(scope, b"sec-fetch-site") not in ([], ["same-origin"], ["none"]):
            return "a web page may not call without naming itself"
        return None


class Doorkeeper:
    """ASGI middleware: asks for the token, where there is one."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        whole = token.reveal() if isinstance(token, Secret) else token
        self._expected = b"" if whole is None else b"Bearer " + whole.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._expected:
            given = header(scope, b"authorization")
            # Constant time: how long a wrong answer takes must not tell how much of it was right.
            if len(given) != 1 or not hmac.compare_digest(given[0].encode("latin-1"), self._expected):
                error = BadArgument(detail="this gateway asks for its token", remedy="Send it as a Bearer token.")
                await refuse(scope, send, error, status=401, extra={"WWW-Authenticate": "Bearer"})
                return
        await self._app(scope, receive, send)


def header(scope: Scope, name: bytes) -> list[str]:
    """All values of a header."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def hosts_of(config: GatewayConfig, port: int) -> frozenset[str]:
    """The Host values that are served: exact names, never suffixes."""
    host = config.listen.rpartition(":")[0]
    own = [host]
    if host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback:
        own += ["127.0.0.1", "localhost", "[::1]"]
    served = {f"{name}:{port}" for name in own} | ({*own} if port == 80 else set())
    for name in config.allowed_hosts:
        has_port = ":" in name.rpartition("]")[2]
        served |= {name} if has_port else {name, f"{name}:{port}"}
    return frozenset(served)
