"""What is there: images, videos and groups, pixel sizes, formats and JPEG qualities by data set, split and method."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from masm_detect.data.content_cache import Content
from masm_detect.data.sample import Sample
from masm_detect.evaluation.intervals import MIN_CLUSTERS


def gaps(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Notes about what the splits of a divided data set lack: a class or method, or groups for an interval of the AUC.

    rows: as of `inventory`.
    """
    notes = []
    for dataset in sorted({row["dataset"] for row in rows}):
        groups: dict[str, dict[str, int]] = defaultdict(dict)  # split -> method -> groups
        for row in rows:
            if row["dataset"] == dataset and row["split"]:
                groups[row["split"]][row["method"]] = row["groups"]
        methods = sorted({row["method"] for row in rows if row["dataset"] == dataset})
        for split, found in groups.items():
            if lacking := [method for method in methods if method not in found]:
                notes.append(f"{dataset}: the {split} split has nothing of {', '.join(lacking)}")
        few = [f"{count} of {method}" for method, count in groups.get("test", {}).items() if count < MIN_CLUSTERS]
        if few:
            notes.append(
                f"{dataset}: groups in the test split: {', '.join(few)}; an interval of the AUC needs "
                f"{MIN_CLUSTERS} of each class"
            )
    return notes


def inventory(samples: Sequence[Sample], contents: Sequence[Content]) -> list[dict[str, Any]]:
    """One row for each data set, split and method.

    Returns:
        {"dataset", "split" ("": not divided), "method", "images", "videos", "groups": numbers of them, "pixels":
        {"width x height": images}, most frequent first, "formats": {name: images}, "quality": [lowest, median, highest]
        estimated JPEG quality, or None, "bytes": median length of the files}, reals before fakes.
    """
    parts: dict[tuple[str, str, int, str], list[int]] = defaultdict(list)
    for i, s in enumerate(samples):
        parts[s.dataset, s.split, s.label, s.method].append(i)
    rows = []
    for (dataset, split, _, method), places in sorted(parts.items()):
        part = [contents[i] for i in places]
        qualities = [content.quality for content in part if content.quality is not None]
        rows.append(
            {
                "dataset": dataset,
                "split": split,
                "method": method,
                "images": len(part),
                "videos": len({samples[i].video for i in places}),
                "groups": len({samples[i].group for i in places}),
                "pixels": dict(Counter(f"{c.width} x {c.height}" for c in part).most_common()),
                "formats": dict(Counter(c.format or "other" for c in part).most_common()),
                "quality": [min(qualities), float(np.median(qualities)), max(qualities)] if qualities else None,
                "bytes": float(np.median([c.size for c in part])),
            }
        )
    return rows
