"""Scored files as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

#: Verdicts as people read them.
VERDICTS = {
    "likely fake": "likely fake",
    "likely real": "likely real, as far as this detector can tell",
    "unsure": "unsure",
    "uncalibrated": "no verdict: the run is not calibrated",
    None: "not scored",
}
#: Most files in the terminal; the files that are written hold all.
_SHOWN = 40


def prediction_table(files: Sequence[Any]) -> Table:
    """One row for each scored file, the highest P(fake) first; `files`: `casework.detector.FileScore`."""
    scored = sorted((f for f in files if f.p_fake is not None), key=lambda f: -f.p_fake)
    title = f"{len(scored)} of {len(files)} files scored" + (f"; the first {_SHOWN}" if len(scored) > _SHOWN else "")
    table = Table(title=title, title_justify="left")
    table.add_column("file", overflow="fold")
    for name in ("frames", "faces", "raw score", "calibrated score"):
        table.add_column(name, justify="right")
    table.add_column("verdict", overflow="fold")
    for one in scored[:_SHOWN]:
        faces = len([track for track in one.tracks if track is not None])
        table.add_row(
            Text(one.file),  # a name may hold what rich takes for markup
            f"{one.scored}/{one.wanted}",
            str(faces or "-"),
            f"{one.p_fake:.3f}",
            "-" if one.calibrated is None else f"{one.calibrated:.3f}",
            VERDICTS[one.verdict],
        )
    return table


def skipped_lines(files: Sequence[Any]) -> list[str]:
    """One sentence for each file without a score."""
    lines = [f"not scored: {one.file}: {one.reason}" for one in files[:_SHOWN]]
    if len(files) > _SHOWN:
        lines.append(f"and {len(files) - _SHOWN} more, in coverage.json")
    return lines
