"""What tells the label without a face is found; what chance alone tells is not."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from masm_detect.data.content_cache import Content
from masm_detect.data.sample import Sample
from masm_detect.doctor.held_out import held_out_auc, is_suspect
from masm_detect.doctor.shortcuts import PROPERTIES, shortcuts
from sklearn.tree import DecisionTreeClassifier

COUNT = 60


def measured(change) -> tuple[dict[str, float], list[str]]:
    """AUC by property, and the warnings, for reals and fakes of random file sizes whose content `change` changes."""
    random = np.random.default_rng(3)
    samples, contents = [], []
    for i in range(2 * COUNT):
        label = i % 2
        own = {"size": int(random.integers(9000, 11000)), "width": 224, "height": 224, "format": "JPEG", "quality": 90}
        own |= change(i, label)
        samples.append(Sample(f"{i}", label, "set", "x" if label else "real", f"set/{label}/{i}"))
        contents.append(Content(fingerprint=str(i), perceptual=b"", **own))
    rows, problems = shortcuts(samples, contents)
    assert [row["property"] for row in rows] == list(PROPERTIES)
    assert all(row["n"] == [COUNT, COUNT] and row["dataset"] == "set" and row["method"] == "x" for row in rows)
    return {row["property"]: row["auc"] for row in rows}, [problem.message for problem in problems]


def test_nothing_is_found_where_nothing_is():
    aucs, warnings = measured(lambda i, label: {})
    assert warnings == [] and aucs["file size"] < 0.6
    assert [aucs[name] for name in ("width", "height", "format", "JPEG quality")] == [0.5] * 4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("file size", lambda i, label: {"size": 9000 + 1000 * label + i}),
        ("width", lambda i, label: {"width": 256 if label else 224 if i % 4 else 512}),  # no order tells it
        ("height", lambda i, label: {"height": 300 if label else 224}),
        ("format", lambda i, label: {"format": "PNG" if label else "JPEG"}),
        ("JPEG quality", lambda i, label: {"quality": None if label else 75}),
    ],
)
def test_each_property_is_found(name, change):
    aucs, [warning] = measured(change)
    assert aucs.pop(name) > 0.95 and f"{name} (AUC" in warning
    assert max(aucs.values()) < 0.65


def test_a_group_is_never_on_both_sides():
    """Features that name the group: a classifier that saw the group would know its label."""
    random = np.random.default_rng(0)
    label_of_group = random.permutation(np.repeat([0, 1], 40))
    groups = np.repeat(np.arange(80), 6)
    features = random.normal(size=(80, 5))[groups]
    tree = partial(DecisionTreeClassifier, random_state=0)
    result = held_out_auc(features, label_of_group[groups], groups.astype(str), tree, 0)
    assert result["n"] == [240, 240] and 0.3 < result["auc"] < 0.7
    rows = held_out_auc(features, label_of_group[groups], [str(i) for i in range(480)], tree, 0)
    assert rows["auc"] > 0.95  # each row for itself


def test_too_few_groups():
    tree = partial(DecisionTreeClassifier, random_state=0)
    features, labels = np.arange(40.0)[:, None], np.arange(40) % 2
    groups = [f"{i % 8}" for i in range(40)]  # four of each label
    assert held_out_auc(features, labels, groups, tree, 0) == {"n": [20, 20], "auc": None, "auc_ci": None}


@pytest.mark.parametrize(
    ("auc", "interval", "expected"),
    [
        (None, None, False),
        (0.59, [0.55, 0.63], False),
        (0.7, [0.6, 0.8], True),
        (0.7, [0.45, 0.9], False),
        (0.7, None, False),
        (0.85, None, True),
        (0.987, [0.054, 1.0], True),  # one odd image among 40
        (1.0, None, True),
    ],
)
def test_what_is_suspect(auc, interval, expected):
    assert is_suspect({"auc": auc, "auc_ci": interval}) is expected


@pytest.mark.parametrize(("count", "share"), [(5, 0.08), (12, 0.03)])
def test_noise_of_few_groups_is_rarely_suspect(count, share):
    """Without an interval a warning needs an AUC that chance seldom gives: 3% and 0.5% in 200 draws."""
    groups, labels = [f"g{i}" for i in range(2 * count)], np.repeat([0, 1], count)
    model = partial(DecisionTreeClassifier, max_leaf_nodes=8, min_samples_leaf=1, random_state=0)
    random = np.random.default_rng(0)
    found = [
        is_suspect(held_out_auc(random.normal(size=(2 * count, 1)), labels, groups, model, seed)) for seed in range(200)
    ]
    assert np.mean(found) <= share
