"""The AUC of a detector when what some of its subspaces learned is taken back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from masm_detect.data.frames import FrameDataset
from masm_detect.data.sample import Sample
from masm_detect.evaluation.compare import compare_scores
from masm_detect.evaluation.metrics import evaluate_scores
from masm_detect.evaluation.predict import score_samples
from masm_detect.models.detector import Detector
from masm_ext import MASMLinear
from masm_ext.wrappers import modules_of


def ablation_report(detector: Detector, dataset: FrameDataset, *, progress: bool, **options: Any) -> dict[str, Any]:
    """Score images with all subspaces, without each, with each alone, and with none.

    A subspace is switched off by putting its u, s and v back to their start in every layer: its part of W is then the
    pretrained one. Setting it to zero instead would also take pretrained directions out of W. The head stays trained.

    Args:
        detector: with MASMLinears.
        dataset: the n images, with both classes.
        progress: show a bar for each pass over the images.
        options: of `predict.predict`.

    Returns:
        {"n", "variants": [{"name", "off": numbers of the subspaces that are off, from 1, "results": [{"dataset",
        "method" ("all": every forgery), "n_real", "n_fake", "auc", "auc_ci", "difference": AUC minus that of the full
        model, "difference_ci"}]}]}, the full model first. Intervals are None with too few groups.
    """
    K = max(layer.num_subspaces for layer in modules_of(detector, MASMLinear).values())
    samples = dataset.samples
    full: np.ndarray | None = None
    variants = []
    for name, off in variants_of(K):
        with switched_off(detector, off):
            scores = score_samples(detector, dataset, progress=name if progress else None, **options)
        full = scores if full is None else full
        results = _results(samples, scores, full)
        variants.append({"name": name, "off": [k + 1 for k in off], "results": results})
    return {"n": len(samples), "variants": variants}


def variants_of(K: int) -> list[tuple[str, tuple[int, ...]]]:
    """(name, subspaces that are off, from 0) of each variant; with one subspace, "without 1" is already "none"."""
    every = tuple(range(K))
    variants = [("all subspaces", ())]
    if K > 1:
        variants += [(f"without {k + 1}", (k,)) for k in every]
    if K > 2:  # with two, "only 1" is "without 2"
        variants += [(f"only {k + 1}", tuple(j for j in every if j != k)) for k in every]
    return [*variants, ("none", every)]


@contextmanager
def switched_off(detector: torch.nn.Module, subspaces: Sequence[int]) -> Iterator[None]:
    """Context in which the factors of `subspaces` (from 0) have their values from before training, in every layer."""
    layers = list(modules_of(detector, MASMLinear).values())
    saved = [(layer, layer.u.detach().clone(), layer.s.detach().clone(), layer.v.detach().clone()) for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                for k in (k for k in subspaces if k < layer.num_subspaces):
                    rows = slice(layer.offsets[k], layer.offsets[k + 1])
                    layer.u[rows], layer.s[rows], layer.v[rows] = layer.u0[rows], layer.s0[rows], layer.v0[rows]
        yield
    finally:
        with torch.no_grad():
            for layer, u, s, v in saved:
                layer.u.copy_(u)
                layer.s.copy_(s)
                layer.v.copy_(v)


def _results(samples: Sequence[Sample], scores: np.ndarray, full: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for dataset, entry in evaluate_scores(samples, scores)["datasets"].items():
        parts = dict(entry["methods"])
        if len(parts) != 1:
            parts["all"] = entry["all"]
        for method, numbers in parts.items():
            index = [
                i
                for i, sample in enumerate(samples)
                if sample.dataset == dataset and (sample.label == 0 or method in ("all", sample.method))
            ]
            row = {"dataset": dataset, "method": method, "difference": None, "difference_ci": None}
            row |= {name: numbers[name] for name in ("n_real", "n_fake", "auc", "auc_ci")}
            if numbers["auc"] is not None and scores is not full:
                compared = compare_scores([samples[i] for i in index], scores[index], full[index])
                row |= {name: compared[name] for name in ("difference", "difference_ci")}
            rows.append(row)
    return rows
