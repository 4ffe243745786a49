"""What tells the label without looking at a face: file size, pixels, format and JPEG quality, each alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from sklearn.tree import DecisionTreeClassifier

from masm_detect.data.content_cache import Content
from masm_detect.data.sample import Sample

from .held_out import FOLDS, held_out_auc, is_suspect
from .problems import Problem

#: Property -> its value for a content; a format becomes a number in `_column`.
PROPERTIES = {
    "file size": lambda content: content.size,
    "width": lambda content: content.width,
    "height": lambda content: content.height,
    "format": lambda content: content.format,
    "JPEG quality": lambda content: -1 if content.quality is None else content.quality,
}


def shortcuts(
    samples: Sequence[Sample], contents: Sequence[Content], seed: int = 0
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """How well each of `PROPERTIES` tells the fakes of each method from the reals of the data set.

    The classifier is a small decision tree, which finds ranges and not only a direction.

    Returns:
        rows {"dataset", "method", "property", "n": [reals, fakes], "auc", "auc_ci"} (`held_out.held_out_auc`), and a
        warning for each method that some property tells.
    """
    rows, problems = [], []
    for (dataset, method), places in real_and(samples).items():
        labels = np.array([samples[i].label for i in places])
        groups = [samples[i].group for i in places]
        suspect = []
        for name, value in PROPERTIES.items():
            column = _column([value(contents[i]) for i in places])
            leaf = max(5, len(places) // 100)
            model = partial(DecisionTreeClassifier, max_leaf_nodes=8, min_samples_leaf=leaf, random_state=seed)
            numbers = held_out_auc(column, labels, groups, model, seed)
            rows.append({"dataset": dataset, "method": method, "property": name, **numbers})
            if is_suspect(numbers):
                suspect.append(f"{name} (AUC {numbers['auc']:.2f})")
        if suspect:
            text = (
                f"{dataset}: {method} and real images can be distinguished without the face, by {', '.join(suspect)}: "
                "--data.normalize_first hides size, format and compression, but not what resizing left in the pixels. "
                "Better: real and fake images that went through the same steps"
            )
            problems.append(Problem("warning", "shortcut", text, len(suspect)))
    return rows, problems


def untested(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A note for each data set in which some method was not tested for shortcuts; `rows`: as of `shortcuts`."""
    methods: dict[str, dict[str, None]] = defaultdict(dict)  # in their order, each once
    for row in rows:
        if row["auc"] is None:
            methods[row["dataset"]][row["method"]] = None
    return [
        f"{dataset}: not tested for shortcuts, with fewer than {FOLDS} groups of a class: {', '.join(names)}"
        for dataset, names in methods.items()
    ]


def real_and(samples: Sequence[Sample]) -> dict[tuple[str, str], list[int]]:
    """(data set, method) -> places of the fakes of this method and of the reals of the data set, if it has both."""
    reals: dict[str, list[int]] = defaultdict(list)
    fakes: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, s in enumerate(samples):
        if s.label == 0:
            reals[s.dataset].append(i)
        else:
            fakes[s.dataset, s.method].append(i)
    return {key: sorted(reals[key[0]] + places) for key, places in sorted(fakes.items()) if reals[key[0]]}


def _column(values: list[Any]) -> np.ndarray:
    """Numbers as they are, names by their place in the alphabet: float [n, 1]."""
    if isinstance(values[0], str):
        values = np.unique(values, return_inverse=True)[1].tolist()
    return np.array(values, dtype=np.float64)[:, None]
