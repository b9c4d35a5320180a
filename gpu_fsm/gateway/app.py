"""The gateway as an ASGI application: our own few routes, and everything else to Ollama."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gpu_fsm.appconfig import GatewayConfig
from gpu_fsm.errors import BadArgument, GPUFSMError, InsufficientVRAM, LeaseTimeout
from gpu_fsm.gateway.client import BadBody, Client, ClientGone, bad_body, refuse
from gpu_fsm.gateway.guard import Doorkeeper, Guard
from gpu_fsm.gateway.leases import Lender, wish_of
from gpu_fsm.gateway.relay import Relay
from gpu_fsm.intercept.answers import answer_for
from gpu_fsm.manager import GPUResourceManager


def build_app(manager: GPUResourceManager, config: GatewayConfig, port: int, lender: Lender) -> ASGIApp:
    """The whole application; `port` is the one it is reached at, which the Host header has to name."""
    relay = Relay(manager, config, lender)
    own = _Own(manager, config, lender)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            lender.close()
            await relay.close()

    routes = [
        Route("/gpu-fsm/status", own.status),
        Route("/gpu-fsm/lease", own.list, methods=["GET"]),
        Route("/gpu-fsm/lease", own.ask, methods=["POST"]),
        Route("/gpu-fsm/lease/{id}", own.end, methods=["DELETE"]),
        Route("/gpu-fsm/lease/{id}/heartbeat", own.beat, methods=["POST"]),
        Mount("/gpu-fsm", _nowhere),
        Mount("/", relay),
    ]
    app: ASGIApp = Starlette(routes=routes, lifespan=lifespan)
    app = Doorkeeper(app, config.token)
    if config.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.allowed_origins,
            allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return Guard(app, config, port)


class _Own:
    """The routes that are ours."""

    def __init__(self, manager: GPUResourceManager, config: GatewayConfig, lender: Lender) -> None:
        self._manager, self._config, self._lender = manager, config, lender

    async def status(self, request: Request) -> Response:
        """`GET /gpu-fsm/status`: everything about the manager now."""
        return JSONResponse({**self._manager.get_status().to_dict(), "lent": self._lender.told()})

    async def list(self, request: Request) -> Response:
        """`GET /gpu-fsm/lease`: who holds the card."""
        return JSONResponse({"leases": self._lender.told()})

    async def ask(self, request: Request) -> Response:
        """`POST /gpu-fsm/lease`: 200 with an id, or a refusal with figures."""
        client = Client(request.scope, request.receive, _no_send, self._config)
        try:
            try:
                given = json.loads(await client.read())
            except (ValueError, RecursionError):
                raise BadArgument(detail="the request is no JSON") from None
            wish = wish_of(given, ttl_s=self._config.lease_ttl_s)
            return JSONResponse(await client.while_there(self._lender.ask(wish)))
        except ClientGone:
            return Response(status_code=499)
        except BadBody as error:
            return _refusal(bad_body(error), request, error.status)
        except (InsufficientVRAM, LeaseTimeout) as error:
            return _refusal(error, request, 409)
        except GPUFSMError as error:
            return _refusal(error, request)

    async def beat(self, request: Request) -> Response:
        """`POST /gpu-fsm/lease/ID/heartbeat`: counts the TTL anew; 404 for a lease that has ended."""
        try:
            return JSONResponse(self._lender.beat(request.path_params["id"]))
        except BadArgument as error:
            return _refusal(error, request, 404)

    async def end(self, request: Request) -> Response:
        """`DELETE /gpu-fsm/lease/ID`: the room goes back."""
        try:
            self._lender.end(request.path_params["id"])
        except BadArgument as error:
            return _refusal(error, request, 404)
        return Response(status_code=204)


def _refusal(error: GPUFSMError, request: Request, status: int | None = None) -> Response:
    answer = answer_for(error, request.url.path, status=status)
    return Response(answer.body, answer.status, answer.headers)


async def _nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    """Nothing of ours goes to Ollama."""
    await refuse(scope, send, BadArgument(detail="no such route of the gateway"), status=404)


async def _no_send(message: object) -> None:
    """A client whose body alone is read."""
