"""The geometry of trained subspaces: angles between them and to the principal subspace, drift, singular values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from masm_detect.config import ModelConfig
from masm_detect.export.plain import make_plain
from masm_detect.models.detector import Detector, new_detector
from masm_ext import MASMLinear
from masm_ext.progress import Progress
from masm_ext.quantized_weight import dense_weight
from masm_ext.wrappers import modules_of

#: Layers whose spectra are reported.
SPECTRA = 4


def subspace_report(detector: nn.Module, progress: bool) -> dict[str, Any]:
    """Angles, drift and spectra of the MASMLinears of a model.

    The output side of a subspace is the span of its rows of u, in R^N, the input side that of v, in R^D. The principal
    subspace is spanned by the singular directions of the pretrained W that are not trained (with directions of the
    gradient: by its leading q - R). Before training all angles are 90 degrees (with directions of the gradient, only
    those between subspaces).

    Args:
        detector: a model with MASMLinears.
        progress: show a bar.

    Returns:
        {"layers": [{"name", "shape": [N, D], "ranks": [K], "drift": ||W_hat - W|| / ||W||, "between": {"output",
        "input": [K][K] smallest principal angle in degrees, 0 on the diagonal}, "to_principal": {"output", "input": [K]
        smallest angle in degrees}}], "spectra": [{"name", "before", "after": singular values of W and W_hat,
        descending, "trained": places of the trained directions in "before"}], of the `SPECTRA` layers, evenly spread
        over the drift}. With directions of the gradient "trained" is empty.
    """
    layers = modules_of(detector, MASMLinear)
    rows: list[dict[str, Any]] = []
    spectra: dict[str, dict[str, Any]] = {}
    bar = Progress(layers.items(), unit="layer", desc="subspaces", disable=not progress)
    for name, layer in bar:
        base = base_weight(layer)
        left, sigma, right = torch.linalg.svd(base, full_matrices=False)  # [N, q], [q], [q, D]
        trained = sorted(d for d in layer.directions if d >= 0)
        q, R = len(sigma), layer.offsets[-1]
        kept = [i for i in range(q) if i not in set(trained)] if trained else list(range(q - R))
        rows.append(
            {
                "name": name,
                "shape": [layer.out_features, layer.in_features],
                "ranks": list(layer.ranks),
                "drift": layer.relative_update(),
                "between": {"output": angles_between(layer.u, layer), "input": angles_between(layer.v, layer)},
                "to_principal": {
                    "output": angles_to(layer.u, layer, left[:, kept].T),
                    "input": angles_to(layer.v, layer, right[kept]),
                },
            }
        )
        spectra[name] = {"name": name, "before": sigma.tolist(), "trained": trained}
    chosen = spread_over_drift({row["name"]: row["drift"] for row in rows}, SPECTRA)
    for name in chosen:
        after = torch.linalg.svdvals(current_weight(layers[name]))
        spectra[name]["after"] = after.tolist()
    return {"layers": rows, "spectra": [spectra[name] for name in chosen]}


@torch.no_grad()
def base_weight(layer: MASMLinear) -> Tensor:
    """The pretrained weight of a layer, float64 [N, D]."""
    return dense_weight(layer.principal, torch.float64) + (layer.u0.double().T * layer.s0.double()) @ layer.v0.double()


@torch.no_grad()
def current_weight(layer: MASMLinear) -> Tensor:
    """The weight that a layer applies now, float64 [N, D]."""
    return dense_weight(layer.principal, torch.float64) + (layer.u.double().T * layer.s.double()) @ layer.v.double()


def angles_between(factor: Tensor, layer: MASMLinear) -> list[list[float]]:
    """Smallest principal angle in degrees between the subspaces of a layer, [K][K].

    Args:
        factor: u [R, N] or v [R, D].
        layer: whose row bounds divide the factor.
    """
    bases, K = _bases(factor, layer), layer.num_subspaces
    angles = [[0.0] * K for _ in range(K)]
    for j, k in combinations(range(K), 2):
        angles[j][k] = angles[k][j] = smallest_angle(bases[j], bases[k])
    return angles


def angles_to(factor: Tensor, layer: MASMLinear, directions: Tensor) -> list[float]:
    """Smallest principal angle in degrees of each subspace to the span of orthonormal `directions` [n, N or D]."""
    return [smallest_angle(basis, directions) for basis in _bases(factor, layer)]


def smallest_angle(a: Tensor, b: Tensor) -> float:
    """Smallest principal angle in degrees between the spans of the orthonormal rows of a and b, float64; 90 if one of
    them is empty.

    Source: Björck and Golub, "Numerical methods for computing angles between linear subspaces", Mathematics of
    Computation 27 (1973). Not scipy's subspace_angles: it decomposes both bases again, minutes for the layers of a ViT.
    """
    if not len(a) or not len(b):
        return 90.0
    cosine = torch.linalg.matrix_norm(a @ b.T, ord=2).clamp(max=1)
    return math.degrees(math.acos(float(cosine)))


def _bases(factor: Tensor, layer: MASMLinear) -> list[Tensor]:
    """Orthonormal rows that span each subspace of u [R, N] or v [R, D], float64."""
    rows = factor.detach().double()
    return [torch.linalg.qr(rows[a:b].T).Q.T for a, b in pairwise(layer.offsets)]


def spread_over_drift(drift: Mapping[str, float], count: int) -> list[str]:
    """At most `count` names, evenly spread from the largest drift to the smallest."""
    names = sorted(drift, key=drift.__getitem__, reverse=True)
    places = np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)
    return [names[place] for place in places]


@torch.no_grad()
def weight_drift(detector: Detector, config: ModelConfig) -> list[dict[str, Any]]:
    """||W_hat - W|| / ||W|| of each linear layer of attention and MLPs that training changed, for any method.

    Args:
        detector: the trained detector; its layers are made plain.
        config: names the pretrained backbone, which is loaded again.

    Returns:
        [{"name", "drift"}] in the order of the model.
    """
    base = new_detector(config).backbone.model
    make_plain(detector.cpu())
    rows = []
    for name, module in detector.backbone.model.named_modules():
        if type(module) is not nn.Linear:
            continue
        before, after = base.get_submodule(name).weight.double(), module.weight.double()
        if not torch.equal(before, after):
            rows.append({"name": f"backbone.model.{name}", "drift": float((after - before).norm() / before.norm())})
    return rows
