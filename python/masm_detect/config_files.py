"""The configuration of a run as a YAML file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from .config import ConfigError, TrainConfig
from .results import write_text

#: Settings of `method` that older runs do not have, and what they did.
OLDER_METHOD = {"u_lr_scale": 1.0, "v_lr_scale": 1.0}


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dicts and lists, as it is saved with a run."""
    return asdict(config)


def save_config(config: TrainConfig, path: Path) -> None:
    """Write `config` as YAML, atomically."""

    write_text(path, yaml.safe_dump(_plain(to_dict(config)), sort_keys=False))


def load_config(path: Path) -> TrainConfig:
    """Read a saved run's config.yaml; unknown or wrongly typed keys raise `ConfigError`."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: is {path.parent} a run folder written by `masm train`?")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    try:
        content = yaml.safe_load(path.read_text())
        if isinstance(content.get("data"), dict):
            content["data"].pop("workers", None)  # version 0.1.0 wrote it here; no result depends on it
        if isinstance(content.get("method"), dict):
            content["method"] = OLDER_METHOD | content["method"]
        return TrainConfig(**vars(parser.instantiate(parser.parse_object(content))))
    except Exception as error:
        raise ConfigError(f"{path} is not a valid run configuration: {error}") from error


def older_arguments(path: Path) -> list[str]:
    """Options of `masm train` for the settings that a saved run does not name, since its version did not have them."""
    method = yaml.safe_load(path.read_text()).get("method") or {}
    return [f"--method.{name}={value}" for name, value in OLDER_METHOD.items() if name not in method]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
