"""`gpu-fsm status`, `mode`, `vlm`, `events` and `explain`: they talk to a manager that runs in another process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from gpu_fsm.arguments import as_mode
from gpu_fsm.cli.base import Number, json_option
from gpu_fsm.cli.codes import ExitCode

_socket_option = click.option(
    "--socket", "path", type=click.Path(path_type=Path), metavar="FILE", help="Its control socket, where several run."
)
_timeout_option = click.option(
    "--timeout-s",
    type=Number(0.0, 4e6),
    metavar="S",
    help="Stop waiting after this long; what was asked for goes on.  [default: wait]",
)


def _ask(path: Path | None, do: str, *, waits: bool = False, timeout_s: float | None = None, **details: Any) -> Any:
    """Put one question to the running manager; one that `waits` has the manager keep the time."""
    from gpu_fsm.control import ANSWER_S, ControlClient

    if not waits:
        wait_s: float | None = ANSWER_S
    else:
        wait_s = None if timeout_s is None else timeout_s + ANSWER_S
        details["timeout_s"] = timeout_s
    with ControlClient(path) as client:
        return client.ask(do, wait_s=wait_s, **details)


def _print(result: Any, as_json: bool, tell: Callable[[Any], str]) -> None:
    click.echo(json.dumps(result, indent=2) if as_json else tell(result))


@click.command("status", short_help="What a running manager is doing; never waits.")
@json_option
@_socket_option
def status(as_json: bool, path: Path | None) -> None:
    """Print the status of the running manager: its state and why, the models, the card, leases and timers.

    It is read from what the manager has published, so it comes at once, also in the middle of a load or while CLIP is
    fetched; `doing` says what takes so long.

    \b
    Examples:
      gpu-fsm status
      gpu-fsm status --json | jq .state
    """  # noqa: D301
    _print(_ask(path, "status"), as_json, _told_status)


@click.command("mode", short_help="Ask a running manager for a mode.")
@click.argument("mode", metavar="NAME")
@click.option("--preempt", is_flag=True, help="Instead of everything that was asked before, a load under way included.")
@_timeout_option
@json_option
@_socket_option
def mode(mode: str, preempt: bool, timeout_s: float | None, as_json: bool, path: Path | None) -> int:
    """Ask the running manager for IDLE, RECORDING or AUTOPILOT and wait until it stands; its agent follows.

    IDLE pauses the agent of `gpu-fsm run`: both models leave the card, and no screen is taken until another mode is
    asked for.

    Exit code 5: it could not be given, and the manager is degraded or has refused; the output says why.

    \b
    Examples:
      gpu-fsm mode recording
      gpu-fsm mode idle --preempt --timeout-s 30
    """  # noqa: D301
    wanted = as_mode(mode).value
    outcome = _ask(path, "mode", waits=True, timeout_s=timeout_s, mode=wanted, preempt=preempt)
    _print(outcome, as_json, _told_outcome)
    return ExitCode.FINE if outcome["granted"] else ExitCode.REFUSED


@click.group("vlm", short_help="Load or unload the VLM of a running manager.")
def vlm() -> None:
    """Load or unload the VLM of the running manager; its mode stays.

    \b
    Examples:
      gpu-fsm vlm load
      gpu-fsm vlm unload
    """  # noqa: D301


@vlm.command("load", short_help="Return when it is resident.")
@_timeout_option
@json_option
@_socket_option
def load(timeout_s: float | None, as_json: bool, path: Path | None) -> None:
    """Have the VLM loaded, and return when it is resident.

    \b
    Example:
      gpu-fsm vlm load --timeout-s 120
    """  # noqa: D301
    _ask(path, "vlm_load", waits=True, timeout_s=timeout_s)
    _print({"vlm": "loaded"}, as_json, lambda _: "the VLM is resident")


@vlm.command("unload", short_help="Return when it is gone and its memory is back.")
@_timeout_option
@json_option
@_socket_option
def unload(timeout_s: float | None, as_json: bool, path: Path | None) -> None:
    """Have the VLM unloaded, and return when it is gone and its memory is back.

    \b
    Example:
      gpu-fsm vlm unload
    """  # noqa: D301
    _ask(path, "vlm_unload", waits=True, timeout_s=timeout_s)
    _print({"vlm": "unloaded"}, as_json, lambda _: "the VLM is gone")


@click.command("events", short_help="What has happened lately, or what happens.")
@click.option("--follow", is_flag=True, help="Print events as they happen, until the manager ends.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@_socket_option
def events(follow: bool, as_json: bool, path: Path | None) -> None:
    """Print the running manager's last events, or follow them.

    \b
    Examples:
      gpu-fsm events
      gpu-fsm events --follow --json | jq 'select(.kind == "degraded")'
    """  # noqa: D301
    from gpu_fsm.control import ControlClient

    tell = json.dumps if as_json else _told_event
    with ControlClient(path) as client:
        for event in client.follow() if follow else client.ask("events"):
            click.echo(tell(event))


@click.command("explain", short_help="Why a mode is or is not available now.")
@click.argument("mode", metavar="MODE")
@json_option
@_socket_option
def explain(mode: str, as_json: bool, path: Path | None) -> None:
    """Say in words, with the figures of the last look, why a mode is or is not available.

    \b
    Example:
      gpu-fsm explain recording
    """  # noqa: D301
    wanted = as_mode(mode).value
    said = _ask(path, "explain", mode=wanted)
    _print({"mode": wanted, "explanation": said} if as_json else said, as_json, str)


# --- for people -------------------------------------------------------------------------------------------------------


def _told_status(status: Mapping[str, Any]) -> str:
    for_s = status["now_at"] - status["since_at"]
    vram = status["vram"]
    free, total = vram["free_mib"], vram["total_mib"]
    card = "unknown" if free is None or total is None else f"{free:.0f} of {total:.0f} MiB free ({vram['source']})"
    size = status["vlm_size_vram_mib"]
    lines = {
        "state": f"{status['state'].upper()} for {for_s:.0f} s"
        + (f", asked for {status['asked_mode'].upper()}" if status["asked_mode"] != status["state"] else ""),
        "doing": status["doing"],
        "because": _told_reason(status["reason"]),
        "VLM": f"{status['vlm_model']}: {status['vlm_state']}" + (f", {size:.0f} MiB on the card" if size else ""),
        "hold": status["hold"],
        "CLIP": f"on {status['clip_device']}",
        "card": status["cpu_only_reason"] if status["cpu_only"] else card,
        "held by": status["card_held_by"],
        "leases": ", ".join(f"{lease['holder']} ({lease['model']})" for lease in status["leases"]),
        "queued": status["queued"] or "",
        "left over": ", ".join(status["leftovers"]),
        "timers": ", ".join(
            f"{timer['name']} in {max(0.0, timer['due_at'] - status['now_at']):.0f} s" for timer in status["timers"]
        ),
        "simulated": ", ".join(status["simulated"]),
    }
    return "\n".join(f"{name:10} {said}" for name, said in lines.items() if said)


def _told_reason(reason: Mapping[str, Any] | None) -> str:
    if reason is None:
        return ""
    where = f" while {reason['step']}" if reason["step"] else ""
    return f"{reason['code']}{where}: {reason['detail']}. {reason['remedy']}".rstrip()


def _told_outcome(outcome: Mapping[str, Any]) -> str:
    if outcome["granted"]:
        return f"{outcome['asked']} stands"
    return f"{outcome['asked']} was not given: {outcome['state'].upper()}, because {_told_reason(outcome['reason'])}"


def _told_event(event: Mapping[str, Any]) -> str:
    if "lost" in event:
        return f"({event['lost']} events came too fast and were dropped)"
    hidden = ("kind", "time", "at")
    facts = {k: _told_reason(v) if k == "reason" else v for k, v in event.items() if k not in hidden and v is not None}
    return f"{event['time'][11:23]}  {event['kind']:17} " + "  ".join(
        f"{name}={value}" for name, value in facts.items()
    )
