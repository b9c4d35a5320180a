"""What the commands share: common options, reading the settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from gpu_fsm.appconfig import Loaded, app_fields, app_settings_table, load_app_config
from gpu_fsm.errors import BadArgument, one_line
from gpu_fsm.settings import GPUResourceConfig, Setting, load_config, parse_setting, settings_table


class Number(click.FloatRange):
    """A range of numbers; click's own lets `nan` through, which lies in none."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the text; what lies outside fails as click has it."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{number} is not in the range {self._describe_range()}.", param, ctx)
        return number


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
    return _options(command, settings_table())


def app_options(*sections: str, hidden: bool = False) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command an option for every setting of these sections; `gpu` are the manager's.

    Their text arrives under the settings' names with `_` for the dot; `load_app` takes them all.
    """
    wanted = [setting for setting in app_settings_table() if (setting.section or "gpu") in sections]
    return lambda command: _options(command, wanted, hidden=hidden)


def _options(command: Callable[..., int], settings: Sequence[Setting], *, hidden: bool = False) -> Callable[..., int]:
    for setting in reversed(settings):
        optional_value: dict[str, Any] = (
            {"is_flag": False, "flag_value": "true"} if setting.bound == "true or false" else {}
        )
        command = click.option(
            setting.option,
            setting.name.replace(".", "_"),
            metavar="[VALUE]" if optional_value else "VALUE",
            help=f"{setting.about}  [default: {setting.default}]",
            hidden=hidden,
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


def load_app(
    config_path: Path | None,
    texts: Mapping[str, str | None],
    renamed: Mapping[str, str] | None = None,
    *,
    go_on: bool = False,
) -> Loaded:
    """Make the configuration of the whole program, from the files that are found or the one that is named.

    `texts` are options as `app_options` gives them; `renamed` gives those that are not called like their setting.
    With `go_on` what cannot be used is listed under `problems` of the result.
    """
    fields = app_fields()
    names = {setting.name.replace(".", "_"): setting for setting in app_settings_table()}
    options = {setting.name: f"option {setting.option}" for setting in names.values()}
    options |= {names[name].name: f"option {option}" for name, option in (renamed or {}).items()}
    given = {names[name].name: text for name, text in texts.items() if text is not None}
    return load_app_config(
        config_path,
        overrides={name: parse_setting(name, text, options[name], fields) for name, text in given.items()},
        override_source=options.__getitem__,
        go_on=go_on,
    )


def check_clip_model(config: GPUResourceConfig) -> None:
    """Raise `BadArgument` for a `clip_model` that can only be a folder and is none; what a name is, the hub knows."""
    name = config.clip_model or ""
    is_path = name.startswith((".", "~", "/", "\\")) or "\\" in name or name.count("/") > 1
    if is_path and not Path(name).expanduser().is_dir():
        raise BadArgument(
            detail=f"clip_model: there is no folder {one_line(name)}",
            remedy="Name a model of the Hugging Face hub, such as clip-ViT-B-32, or the folder of one.",
        )
