"""What is wrong with a data set: one `Problem` for each kind, with a count and examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

#: Examples kept of each problem; damaged files are all kept.
EXAMPLES = 10


@dataclass(frozen=True)
class Problem:
    """One finding.

    Attributes:
        level: error (training or its numbers would be wrong) or warning (look at it)
        kind: layout, damaged, label, leak, copies, look-alike or shortcut
        message: what was found, in one sentence
        count: number of files, pictures or groups
        examples: some of them, one line each
    """

    level: Literal["error", "warning"]
    kind: str
    message: str
    count: int = 1
    examples: list[str] = field(default_factory=list)
