"""Reads settings with jsonargparse, and reports a wrong one in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentError, ArgumentParser

from masm_detect.errors import UserError

#: Renamed settings, old name to new.
MOVED = {"data.workers": "runtime.workers"}


def add_config_file(parser: ArgumentParser) -> None:
    """The option `--config`: a YAML file with settings of the command."""
    parser.add_argument("--config", action=_ConfigFile, help="YAML file with any of the settings below")


def add_flag(parser: ArgumentParser, name: str, text: str, default: bool = False) -> None:
    """The options `--name` and `--no_name`, which take no value; words may also be joined by dashes."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*spellings, action=ActionYesNo, default=default, help=text)


def options_of(values: Any) -> dict[str, Any]:
    """The parsed settings of a command by name, without the config file that they came from."""
    return {key: value for key, value in vars(values).items() if key != "config"}


def one_line(message: str) -> str:
    """An error of jsonargparse in one line. For a type that is a union, jsonargparse lists every type it tried."""
    message = _wrong_value(" ".join(message.split()))
    hints = [f"{old} is now {new}" for old, new in MOVED.items() if old in message]
    return f"{message} ({'; '.join(hints) or 'see masm --help, masm <command> --help'})"


def instantiate(parser: ArgumentParser, values: Any) -> Any:
    """The parsed values with their dataclasses made; UserError for a value that a dataclass rejects."""
    try:
        return parser.instantiate(values)
    except UserError:
        raise
    except ValueError as error:
        # For a setting that may also be null, jsonargparse lists the error of each type, ours among them.
        raise UserError(str(error.__cause__ if isinstance(error.__cause__, UserError) else error)) from error


class _ConfigFile(ActionConfigFile):
    """`--config`: a file with settings that the command does not have raises an error that names file and settings.

    jsonargparse would name the setting only, and fail with a traceback on a mapping in place of a list of words.
    """

    def __call__(self, parser: ArgumentParser, cfg: Any, values: Any, option_string: str | None = None) -> None:
        import yaml

        content = None
        if os.path.isfile(values):  # it may also be YAML itself
            with suppress(OSError, ValueError, yaml.YAMLError):  # jsonargparse reports it below
                content = yaml.safe_load(Path(values).read_text())
        if isinstance(content, dict) and (unknown := list(_unknown(content, parser.get_defaults().as_dict()))):
            command = f"masm {parser.prog.split()[-1]}"
            raise ArgumentError(
                None, f"{values} is not a config of `{command}`, which has no setting {', '.join(unknown)}"
            )
        try:
            super().__call__(parser, cfg, values, option_string)
        except (AttributeError, TypeError) as error:  # jsonargparse, for a word in place of a mapping
            raise ArgumentError(None, f"{values} does not have the form of a config ({error})") from error


def _unknown(content: dict[Any, Any], defaults: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The settings in `content` that are not in `defaults`: names, and values in place of settings."""
    for name, value in content.items():
        key, dot, rest = str(name).partition(".")
        value = {rest: value} if dot else value
        if key not in defaults:
            yield f"{prefix}{key}"
        elif isinstance(default := defaults[key], dict) and isinstance(value, (int, float, list)):
            yield f"{prefix}{key} = {value}"
        elif isinstance(value, dict) and isinstance(default, (dict, list)):
            # a class that may be null has its class_path
            inner = {} if isinstance(default, list) else default.get("init_args", default)
            value = value.get("init_args", {}) if "class_path" in value else value
            yield from _unknown(value, inner, f"{prefix}{key}.")


def _wrong_value(message: str) -> str:
    part = re.fullmatch(r"""Parser key "(.+?)": .* Problem with given class_path \S+: (.*) - Expected a .*""", message)
    if part:
        return f"{part[1]}: {_wrong_value(part[2])}"
    found = re.fullmatch(r"""Parser key "(.+?)": .*?(?:Subtypes: \[|Expected an? )(.*?)"""
                         r"""(?:\] Errors: .*Given value|\. Got value): (.*)""", message)  # fmt: skip
    if not found:
        return message
    key, types, value = found.groups()
    # <class 'int'>, list[str] or typing.Literal['a', 'b']
    names = [name.split(".")[-1] for name in re.findall(r"[\w.]+\[.*?\]|(?<=<class ')[\w.]+", types)]
    allowed = " or ".join(re.sub(r"^Literal\[(.*)\]", r"one of \1", name) for name in names).replace("'", "")
    if not allowed or allowed.count("[") != allowed.count("]"):
        return message
    return f"{key} is {value}; it must be {allowed.replace('NoneType', 'null')}"
