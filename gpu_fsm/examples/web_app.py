"""A FastAPI application: the manager lives as long as the application does, and no handler blocks the event loop.

python -m gpu_fsm.examples.web_app --simulated
uvicorn --factory gpu_fsm.examples.web_app:create_app
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import attrs
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from gpu_fsm import ExecutionMode, GPUFSMError
from gpu_fsm.agent import Screen, UIDetector
from gpu_fsm.examples.worlds import arguments, call, manager_for, three_screens


def create_app(argv: Sequence[str] = ()) -> FastAPI:
    """Make the application."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with manager_for(argv) as manager:  # on the way out the VLM is unloaded and CLIP leaves the card
            app.state.manager, app.state.detector = manager, UIDetector(manager)
            yield

    app = FastAPI(lifespan=lifespan)
    app.add_exception_handler(GPUFSMError, lambda _, error: JSONResponse({"detail": str(error)}, 409))
    app.add_api_route("/status", lambda: app.state.manager.get_status().to_dict())

    @app.put("/mode/{mode}")
    async def set_mode(mode: ExecutionMode) -> Any:
        return attrs.asdict(await app.state.manager.aio.set_execution_mode(mode, timeout_s=300.0))

    @app.post("/label")
    async def label(request: Request) -> Any:
        return attrs.asdict(await app.state.detector.aclassify(Screen(name="upload", data=await request.body())))

    return app


def main(argv: Sequence[str] = ()) -> int:
    """Use it as a client would; returns an exit code."""
    requests = [("PUT", "/mode/recording", b""), ("POST", "/label", three_screens()[0].data), ("GET", "/status", b"")]
    mode, said, status = asyncio.run(call(create_app(argv), requests))
    print(mode, said, status["state"], sep="\n")
    return 0 if said["available"] else 1


if __name__ == "__main__":
    sys.exit(main(arguments(__doc__)))
