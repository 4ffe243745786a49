"""What is wrong with a data set: one `Problem` for each kind, with a count and a line for each case."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Problem:
    """One finding.

    Attributes:
        level: error (training or its numbers would be wrong) or warning (look at it)
        kind: layout, damaged, label, leak, copies, look-alike or shortcut
        message: what was found, in one sentence
        count: number of files, pictures or groups
        lines: one for each of them; none for a shortcut
    """

    level: Literal["error", "warning"]
    kind: str
    message: str
    count: int = 1
    lines: list[str] = field(default_factory=list)


def plural(count: int, noun: str) -> str:
    """`1 file is`, `2 files are`."""
    return f"{count} {noun} is" if count == 1 else f"{count} {noun}s are"
