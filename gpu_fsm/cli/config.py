"""`gpu-fsm config show`, `init`, `check` and `reload`."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from gpu_fsm.appconfig import AppConfig, Value, app_settings_table, load_app_config, user_file
from gpu_fsm.cli.base import app_options, config_option, json_option, load_app
from gpu_fsm.cli.codes import ExitCode
from gpu_fsm.errors import BadArgument, one_line
from gpu_fsm.rules import as_text
from gpu_fsm.settings import SECTION


@click.group("config", short_help="Show, write or check the settings.")
def config() -> None:
    """Show, write or check the settings.

    Defaults give way to files, files to the environment, the environment to options.  Where no file is named these are
    read, each giving way to the next: the system's, the user's (`gpu-fsm config init` writes it), then pyproject.toml
    with [tool.gpu-fsm] and gpu-fsm.toml in the current folder.

    \b
    Examples:
      gpu-fsm config show --changed
      gpu-fsm config init
      gpu-fsm config check gpu-fsm.toml
    """  # noqa: D301


@config.command("show", short_help="Every setting, with where it came from.")
@click.option("--changed", is_flag=True, help="Only what is not as it comes.")
@json_option
@config_option
@app_options("gpu", "agent", "control", "gateway", hidden=True)
def show(changed: bool, as_json: bool, config_path: Path | None, **settings: str | None) -> int:
    """Print every setting, its value and where that came from; credentials are not shown.

    Takes every setting as an option too, and shows what the same options would do elsewhere.

    \b
    Examples:
      gpu-fsm config show
      gpu-fsm config show --json --idle-timeout-s 60
      GPU_FSM_AGENT_ACCEPT=0.9 gpu-fsm config show --changed
    """  # noqa: D301
    loaded = load_app(config_path, settings)
    values = [value for value in loaded.values if not changed or value.source != "default"]
    if as_json:
        document = {
            "files": [str(file) for file in loaded.files],
            "settings": {value.name: value.as_json() for value in values},
        }
        click.echo(json.dumps(document, indent=2))
        return ExitCode.FINE
    console = Console(highlight=False, markup=False)
    for value in values:
        console.print(_line(value, max(len(other.name) for other in values)), soft_wrap=True)
    return ExitCode.FINE


def _line(value: Value, width: int) -> Text:
    standard = value.source == "default"
    line = Text(f"{value.name:<{width}}  ")
    line.append(f"{one_line(value.text, 200):<24}", "" if standard else "bold")
    line.append(f"  {value.source}", "dim" if standard else "green")
    for source, text in value.beaten:
        line.append(f", not {one_line(text, 80)} of {source}", "dim")
    return line


@config.command("init", short_help="Write a settings file with every setting, commented out.")
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--force", is_flag=True, help="Write it anew where there is one.")
@json_option
def init(path: Path | None, force: bool, as_json: bool) -> int:
    """Write a settings file that holds every setting, its meaning and its default, all commented out.

    Without PATH it is the user's own file, which every command reads.

    \b
    Examples:
      gpu-fsm config init
      gpu-fsm config init gpu-fsm.toml
    """  # noqa: D301
    path = path or user_file()
    if path.name == "pyproject.toml":
        raise BadArgument(
            detail=f"{one_line(path)} is more than settings of ours",
            remedy=f"Add a section [tool.{SECTION}] to it yourself, or write gpu-fsm.toml beside it.",
        )
    if not force and os.path.lexists(path):
        raise BadArgument(detail=f"{one_line(path)} is there already", remedy="--force writes it anew.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, settings_file())
    except OSError as error:
        why = one_line(error.strerror or error)
        raise BadArgument(detail=f"{one_line(path)} cannot be written: {why}", remedy="Name another file.") from None
    click.echo(json.dumps({"file": str(path)}, indent=2) if as_json else str(path))
    return ExitCode.FINE


def _write(path: Path, text: str) -> None:
    """Put a new file in its place as a whole; nobody else may read it, since a token may be written into it."""
    handle, fresh = tempfile.mkstemp(prefix=path.name, dir=path.parent)  # made with mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(fresh).replace(path)
    except BaseException:
        Path(fresh).unlink(missing_ok=True)
        raise


def settings_file() -> str:
    """A TOML file with every setting at its default, commented out."""
    standard = AppConfig()
    lines = [
        "# Settings of gpu-fsm.  Every line is commented out and shows the default; remove the mark to change it.",
        "# The environment (GPU_FSM_ and the name in capitals) and options on the command line win over this file.",
    ]
    section = None
    for setting in app_settings_table():
        if setting.section != section:
            section = setting.section
            lines += ["", f"[{SECTION}.{section}]" if section else f"[{SECTION}]"]
        name = setting.name.rpartition(".")[2]
        value = getattr(getattr(standard, section or "gpu"), name)
        lines += ["", f"# {setting.about}", f"# ({setting.bound})", f"# {name} = {_toml(value)}"]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, float):
        return repr(value)
    # For numbers, flags, plain texts, lists of texts and an empty table JSON is TOML.
    return json.dumps(list(value) if isinstance(value, tuple) else value)


@config.command("check", short_help="Say what is wrong with the settings, if anything.")
@click.argument("path", type=click.Path(path_type=Path), required=False)
@json_option
@config_option
def check(path: Path | None, as_json: bool, config_path: Path | None) -> int:
    """Check a file, or all that would be read, and the environment.  Exit code 2 where something is wrong.

    Every problem is named with its place and the mend, also in values that a stronger place replaces.

    \b
    Examples:
      gpu-fsm config check
      gpu-fsm config check gpu-fsm.toml --json
    """  # noqa: D301
    if path is not None and config_path is not None:
        raise click.UsageError("Give PATH or --config FILE, one of them.")
    loaded = load_app_config(path or config_path, go_on=True)
    if as_json:
        problems = [
            {
                "name": problem.name,
                "source": problem.source,
                "detail": problem.summary(),
                "remedy": problem.remedy,
            }
            for problem in loaded.problems
        ]
        document = {"ok": not problems, "files": [str(file) for file in loaded.files], "problems": problems}
        click.echo(json.dumps(document, indent=2))
    else:
        for problem in loaded.problems:
            click.echo(f"gpu-fsm: {one_line(problem, 500)}", err=True)
        if not loaded.problems:
            read = ", ".join(str(file) for file in loaded.files) or "no file"
            click.echo(f"fine: {read}, the environment")
    return ExitCode.USAGE if loaded.problems else ExitCode.FINE


@config.command("reload", short_help="Have a running manager read its settings again.")
@json_option
@click.option("--socket", "path", type=click.Path(path_type=Path), metavar="FILE", help="Its control socket.")
def reload(as_json: bool, path: Path | None) -> None:
    """Have the running manager read its files again and go by what changed; what cannot change is refused.

    Exit code 5: nothing was changed, and the message says why.

    \b
    Example:
      gpu-fsm config reload
    """  # noqa: D301
    from gpu_fsm.control import ControlClient

    with ControlClient(path) as client:
        changed = client.ask("reload")
    if as_json:
        click.echo(json.dumps({"changed": changed}, indent=2))
    else:
        click.echo("\n".join(f"{name} is now {as_text(value)}" for name, value in changed.items()) or "nothing changed")
