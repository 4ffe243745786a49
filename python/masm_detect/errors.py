"""Errors whose message is for the person at the keyboard, and their common base."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """A mistake that the user can correct.

    The message names what arrived and what to do; the command `masm` prints it as one line and exits with code 2. Any
    other exception is a bug and keeps its traceback.
    """


class ConfigError(UserError, ValueError):
    """A setting that cannot work; the message has its name, its value and what is allowed."""


def require_setting(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raise ConfigError unless `condition` holds of the setting called `name`."""
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {allowed}")


class BackboneError(UserError, ValueError):
    """The backbone cannot be loaded, or does not have the requested size or pooling."""


class CheckpointError(UserError, ValueError):
    """A checkpoint or adapter that is missing, damaged, of another format, or of another run."""


class TrainingError(UserError, RuntimeError):
    """Training cannot continue; the message names the step and what to change."""
