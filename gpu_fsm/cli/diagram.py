"""`gpu-fsm diagram`."""

from __future__ import annotations

import click


@click.command("diagram", short_help="Print the state machine as a Mermaid diagram.")
@click.option("--detail", is_flag=True, help="One arrow for each row of the table, with its guards.")
def diagram(detail: bool) -> None:
    """Print the Mermaid diagram of the machine that runs.

    \b
    Examples:
      gpu-fsm diagram
      gpu-fsm diagram --detail > rows.mmd
    """  # noqa: D301
    from gpu_fsm import diagrams

    click.echo(diagrams.detail() if detail else diagrams.overview(), nl=False)
