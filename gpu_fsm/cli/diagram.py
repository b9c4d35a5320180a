"""`gpu-fsm diagram`."""

from __future__ import annotations

import json

import click

from gpu_fsm.cli.base import json_option


@click.command("diagram", short_help="Print the state machine as a Mermaid diagram.")
@click.option("--detail", is_flag=True, help="One arrow for each row of the table, with its guards.")
@json_option
def diagram(detail: bool, as_json: bool) -> None:
    """Print the Mermaid diagram of the machine that runs; with --json its states and its table.

    \b
    Examples:
      gpu-fsm diagram
      gpu-fsm diagram --detail > rows.mmd
      gpu-fsm diagram --json | jq '.rows[] | select(.trigger == "request")'
    """  # noqa: D301
    from gpu_fsm import diagrams

    if as_json:
        click.echo(json.dumps(diagrams.facts()))
        return
    click.echo(diagrams.detail() if detail else diagrams.overview(), nl=False)
