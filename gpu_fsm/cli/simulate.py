"""`gpu-fsm simulate-ollama`."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence

import click

from gpu_fsm.cli.base import Number, json_option
from gpu_fsm.errors import BadArgument, one_line


def _pairs(most: float) -> Callable[[click.Context, click.Parameter, Sequence[str]], tuple[tuple[str, float], ...]]:
    """Read values of the form NAME=NUMBER, with a number above 0 and up to `most`."""

    def read(_: click.Context, __: click.Parameter, values: Sequence[str]) -> tuple[tuple[str, float], ...]:
        pairs = []
        for value in values:
            name, separator, text = value.rpartition("=")
            try:
                number = float(text)
            except ValueError:
                number = -1.0
            if not (separator and name and 0.0 < number <= most):
                raise click.BadParameter(f"{value!r} is not NAME=NUMBER with a number above 0, at most {most:g}")
            pairs.append((name, number))
        return tuple(pairs)

    return read


def _milliseconds(name: str, default: int, about: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    return click.option(
        name, type=click.IntRange(0, 3_600_000), metavar="MS", default=default, show_default=True, help=about
    )


@click.command("simulate-ollama", short_help="Serve a simulated Ollama on loopback; needs no GPU and no models.")
@click.option("--port", type=click.IntRange(0, 65535), required=True, metavar="N", help="0 takes any free port.")
@click.option("--version", type=click.Choice(["0.24", "0.32"]), default="0.32", show_default=True, help="Behave as.")
@click.option(
    "--model",
    "models",
    callback=_pairs(1e6),
    multiple=True,
    metavar="NAME=MIB",
    help="A model and what it takes on the card; repeat for more.  [default: qwen2.5vl:7b=6144]",
)
@_milliseconds("--load-ms", 2000, "How long a load takes.")
@_milliseconds("--unload-ms", 80, "From an unload's answer to the end of its runner.")
@_milliseconds("--reclaim-ms", 300, "From there until the memory is back.")
@click.option(
    "--vram-mib",
    type=Number(0, 1e7),
    metavar="MIB",
    default=8192.0,
    show_default=True,
    help="The card's memory; 0 is a machine without a GPU.",
)
@click.option(
    "--pullable",
    "pullables",
    callback=_pairs(1e6),
    multiple=True,
    metavar="NAME=MIB",
    help="A model that it does not have and can pull.  [default: none, as without a network]",
)
@_milliseconds("--pull-ms", 2000, "How long a pull takes.")
@click.option(
    "--fault",
    "faults",
    callback=_pairs(1.0),
    multiple=True,
    metavar="KIND=RATE",
    help="Have this share of the requests go wrong: http_503=0.1, or only at one operation: load.oom=0.5.",
)
@json_option
def simulate_ollama(
    port: int,
    version: str,
    models: tuple[tuple[str, float], ...],
    load_ms: int,
    unload_ms: int,
    reclaim_ms: int,
    vram_mib: float,
    pullables: tuple[tuple[str, float], ...],
    pull_ms: int,
    faults: tuple[tuple[str, float], ...],
    as_json: bool,
) -> int:
    """Serve a simulated Ollama over HTTP on 127.0.0.1 until it is interrupted; says its address when it is ready.

    It answers like the real server of that version, errors and timing included.  A num_ctx that fits neither on the
    card nor in 32 GiB of main memory is a load that runs out of memory.

    \b
    Examples:
      gpu-fsm simulate-ollama --port 11500
      gpu-fsm simulate-ollama --port 0 --model tiny-a=2 --model big-c=1000 --load-ms 250 --version 0.24
      gpu-fsm simulate-ollama --port 11500 --fault load.oom=0.5 --fault http_503=0.1
    """  # noqa: D301
    from gpu_fsm.simulation import KINDS, Faults, SimulatedModel, run_server

    switches = Faults()
    for fault, rate in faults:
        operation, _, kind = fault.rpartition(".")
        wanted = [f"ollama.{operation}"] if operation else [op for op in KINDS if op.startswith("ollama.")]
        at = [op for op in wanted if kind in KINDS.get(op, ())]
        if not at:
            known = ", ".join(sorted(set().union(*(KINDS[op] for op in KINDS if op.startswith("ollama.")))))
            raise BadArgument(detail=f"--fault {one_line(fault, 60)} is not known", remedy=f"Kinds: {known}.")
        for op in at:
            switches.arm(op, kind, times=None, rate=rate)
    served = [
        SimulatedModel(name=name, size_mib=mib, load_s=load_ms / 1e3, trained_context=1 << 20)
        for name, mib in models or (("qwen2.5vl:7b", 6144.0),)
    ]

    def tell(line: str) -> None:
        url = line.rpartition(" ")[2]
        about = {"url": url, "simulated": True, "version": version, "models": [model.name for model in served]}
        click.echo(json.dumps(about))

    try:
        return run_server(
            port,
            served,
            version=version,
            vram_mib=vram_mib or None,
            unload_s=unload_ms / 1e3,
            reclaim_s=reclaim_ms / 1e3,
            faults=switches,
            registry=[SimulatedModel(name=name, size_mib=mib, load_s=load_ms / 1e3) for name, mib in pullables],
            pull_s=pull_ms / 1e3,
            say=tell if as_json else None,
        )
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise BadArgument(detail=f"port {port} cannot be used: {os.strerror(error.errno)}") from None
