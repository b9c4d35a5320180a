"""What the commands share: exit codes, common options, reading the settings."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gpu_fsm.settings import GPUResourceConfig, load_config, parse_setting, settings_table


class ExitCode(enum.IntEnum):
    """What the shell is told."""

    FINE = 0
    FAILED = 1
    USAGE = 2
    MISSING = 3
    INTERRUPTED = 130


EXIT_CODES: dict[ExitCode, str] = {
    ExitCode.FINE: "everything did what it should",
    ExitCode.FAILED: "a phase of the demo or a job failed, or the output could not be written",
    ExitCode.USAGE: "bad input: an option, a setting, a file, a folder",
    ExitCode.MISSING: "something that must be installed is not there; the message says what",
    ExitCode.INTERRUPTED: "interrupted from the keyboard; what was loaded has been given back",
}

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file with a section [gpu-fsm], or a pyproject.toml with [tool.gpu-fsm].",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document and nothing else on stdout."
)


def settings_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command an option for every setting; their text arrives under the settings' names."""
    for setting in reversed(settings_table()):
        optional_value: dict[str, Any] = (
            {"is_flag": False, "flag_value": "true"} if setting.bound == "true or false" else {}
        )
        command = click.option(
            setting.option,
            setting.name,
            metavar="[VALUE]" if optional_value else "VALUE",
            help=f"{setting.about}  [default: {setting.default}]",
            **optional_value,
        )(command)
    return command


def load_settings(
    config_path: Path | None, texts: dict[str, str | None], renamed: dict[str, str] | None = None
) -> GPUResourceConfig:
    """Make the configuration; `texts` by setting, `renamed` gives the options that are not called like theirs."""
    options = {setting.name: setting.option for setting in settings_table()} | (renamed or {})
    given = {name: text for name, text in texts.items() if text is not None}
    overrides = {name: parse_setting(name, text, f"option {options[name]}") for name, text in given.items()}
    return load_config(config_path, overrides=overrides, override_source=lambda name: f"option {options[name]}")
