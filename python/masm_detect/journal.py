"""What a long command has finished, a line each, so that the same command goes on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from .errors import ConfigError
from .results import write_text


class Journal:
    """A file of JSON lines: the settings of a command, then what it has finished; a context that closes the file.

    Attributes:
        path: the file
        entries: what an interrupted command with the same settings had finished
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], what: str, *, overwrite: bool = False) -> None:
        """Read `path`, or start it.

        Args:
            path: the file; its folder is created if needed.
            settings: what decides the results; plain values for JSON.
            what: the work, for the error.
            overwrite: start again if the settings differ; with the same settings, an interrupted command that replaces
                results goes on.

        Raises:
            ConfigError: it has other settings, and `overwrite` is not set.
        """
        settings = json.loads(json.dumps(settings))
        lines = list(_whole_lines(path)) if path.is_file() else []
        if lines and lines[0] != settings:
            if not overwrite:
                other = [name for name in settings if lines[0].get(name) != settings[name]]
                raise ConfigError(
                    f"{path.parent} holds an unfinished {what} with other settings ({', '.join(other) or 'format'}): "
                    "give another --out, or --overwrite to start again"
                )
            lines = []
        self.path, self.entries = path, lines[1:]
        # written anew: the last line may have been cut off, and what comes next must not be appended to it
        write_text(path, "".join(json.dumps(line) + "\n" for line in (lines or [settings])))
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by the context)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Keep what was finished."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


def entries_of(path: Path, settings: Mapping[str, Any]) -> list[Any]:
    """What another process with these settings had finished; nothing if its settings were others."""
    lines = list(_whole_lines(path))
    return lines[1:] if lines and lines[0] == json.loads(json.dumps(settings)) else []


def _whole_lines(path: Path) -> Iterator[Any]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the program was killed while it wrote
            return
