"""`gpu-fsm gateway`."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpu_fsm.arguments import as_mode
from gpu_fsm.cli.base import app_options, check_clip_model, config_option, load_app
from gpu_fsm.errors import BadArgument, one_line
from gpu_fsm.tickets import Outcome

if TYPE_CHECKING:
    from gpu_fsm.appconfig import AppConfig, ControlConfig, Reloader
    from gpu_fsm.manager import GPUResourceManager


@click.command("gateway", short_help="Ollama for other programs: the VLM is loaded when they need it.")
@click.option("--listen", metavar="HOST:PORT", help="Short for --gateway-listen.")
@click.option("--mode", metavar="MODE", help="Begin in this mode: recording or autopilot.  [default: idle]")
@config_option
@app_options("gpu", "gateway", "control")
def gateway(listen: str | None, mode: str | None, config_path: Path | None, **settings: str | None) -> int:
    """Relay every route of Ollama; a request that needs the VLM loads it first and holds a lease while it runs.

    Other programs may also lease room on the card: POST /gpu-fsm/lease.  Meanwhile `gpu-fsm status`, `mode`, `vlm`,
    `events` and `explain` reach it from outside.

    \b
    Examples:
      gpu-fsm gateway
      gpu-fsm gateway --listen 127.0.0.1:11500 --mode recording --gateway-other-models refuse
      GPU_FSM_GATEWAY_TOKEN=... gpu-fsm gateway --listen 192.168.1.5:11500
    """  # noqa: D301
    if listen is not None:
        settings["gateway_listen"] = listen

    def read() -> AppConfig:
        return load_app(config_path, settings, {"gateway_listen": "--listen"} if listen else None).config

    config = read()
    check_clip_model(config.gpu)
    wanted = None if mode is None else as_mode(mode)
    from gpu_fsm.appconfig import Reloader
    from gpu_fsm.gateway.serve import Gateway
    from gpu_fsm.manager import GPUResourceManager

    over = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: over.set())
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(GPUResourceManager(config.gpu))
        try:
            server = stack.enter_context(Gateway(manager, config.gateway))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
                raise
            problem = os.strerror(error.errno)
            raise BadArgument(
                detail=f"{config.gateway.listen} cannot be used: {problem}",
                remedy="Choose another address with --listen; Ollama itself listens on port 11434.",
            ) from None
        quiet = dict.fromkeys(("control", "gateway"), lambda _: None)
        _control(config.control, manager, stack, Reloader(config, read, **quiet, gpu=manager.reconfigure))
        click.echo(f"gateway is listening on {server.url} for {config.gpu.vlm_model} at {config.gpu.ollama_url}")
        if wanted is not None:
            manager.submit_execution_mode(wanted).add_done_callback(_tell)
        over.wait()
        click.echo("stopping", err=True)
    return 0


def _control(config: ControlConfig, manager: GPUResourceManager, stack: contextlib.ExitStack, reload: Reloader) -> None:
    """Serve the control socket too; where there can be none, say so and go on."""
    if not config.enabled:
        return
    from gpu_fsm.control import ControlServer

    try:
        stack.enter_context(
            ControlServer(manager, config.socket_path, max_clients=config.max_clients, on_reload=reload)
        )
    except (OSError, BadArgument) as error:
        if config.socket_path is not None:
            raise
        click.echo(f"no control socket: {one_line(error)}", err=True)


def _tell(asked: Future[Outcome]) -> None:
    """How the mode that was asked for at the start came out."""
    error = asked.exception()
    outcome = None if error is not None else asked.result()
    if outcome is None:
        click.echo(f"mode: {one_line(error)}", err=True)
    else:
        click.echo(f"mode: {outcome.state.name}{'' if outcome.granted else f' ({outcome.reason})'}", err=True)
