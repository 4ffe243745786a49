"""Losses on the features of a batch, on the unit sphere: alignment and uniformity.

Source: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
Hypersphere", ICML 2020, arXiv 2005.10242; for deepfake detection: Yermakov et al. (GenD), arXiv 2508.06248.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment_loss(features: Tensor, labels: Tensor) -> Tensor:
    """Mean squared distance of two features of one class, on the unit sphere; 0 if no class has two.

    Args:
        features: [B, D]; labels: [B].
    """
    squared = _squared_distances(features)  # [B, B]
    pairs = (labels[:, None] == labels[None, :]).triu(diagonal=1)
    return (squared * pairs).sum() / pairs.sum().clamp_min(1)


def uniformity_loss(features: Tensor) -> Tensor:
    """Log of the mean of exp(-2 d^2) over all pairs of features [B, D], d their distance on the sphere; 0 for one."""
    B = len(features)
    if B < 2:
        return features.sum() * 0
    pairs = torch.ones(B, B, dtype=torch.bool, device=features.device).triu(diagonal=1)
    return torch.logsumexp((-2 * _squared_distances(features))[pairs], dim=0) - torch.log(pairs.sum())


def _squared_distances(features: Tensor) -> Tensor:
    unit = F.normalize(features.float(), dim=-1)
    return (2 - 2 * unit @ unit.T).clamp_min(0)
