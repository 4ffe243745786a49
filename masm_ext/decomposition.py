"""The split of a weight into its principal subspace and K artifact subspaces.

Two choices make a split, each by name: which directions are the artifact directions (DIRECTIONS), and how the K
subspaces share them (PARTITIONS). ``W = principal + sum_k u_k^T diag(s_k) v_k`` holds for any of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .ops.fold import fold
from .registry import DIRECTIONS, PARTITIONS
from .spectra import Spectrum


@dataclass(frozen=True)
class Decomposition:
    """``W = weight + u^T diag(s) v``.

    Attributes:
        weight: [N, D], the principal part.
        u, s, v: [R, N], [R], [R, D], the artifact part, one subspace after another.
        offsets: K + 1 row bounds of the subspaces.
        energy: share of ``||W||_F^2`` that the artifact part holds.
        directions: which singular directions of W (0 = largest sigma) the R rows are, or of its gradient (-1 = the
            leading one, -2 the next); empty where it is not known.
        lift: what was added to the singular values of the artifact part, in units of sigma_rms.
    """

    weight: Tensor
    u: Tensor
    s: Tensor
    v: Tensor
    offsets: tuple[int, ...]
    energy: float
    directions: tuple[int, ...] = ()
    lift: float = 0.0


@DIRECTIONS.register("trailing")
def trailing(q: int, digest: str = "") -> list[int]:
    """From the smallest sigma on: the artifact part holds least of the weight."""
    return list(range(q - 1, -1, -1))


@DIRECTIONS.register("leading")
def leading(q: int, digest: str = "") -> list[int]:
    """From the largest sigma on: the head of the spectrum learns, its tail is frozen."""
    return list(range(q))


@DIRECTIONS.register("random")
def random_order(q: int, digest: str) -> list[int]:
    """A random order, seeded by the hash of the weight: the same for the same weight, on every machine."""
    return sorted(range(q), key=lambda i: hashlib.sha256(f"{digest} {i}".encode()).digest())


#: The leading singular directions of the gradient of the weight: :func:`split_along_gradient`.
DIRECTIONS.register("gradient")(None)


def order_of(directions: str, q: int, digest: str) -> list[int]:
    """All q directions in the order of a choice, checked. Those of the gradient are -1 - i (-1 = the leading one).

    Args:
        directions: a name in :data:`masm_ext.registry.DIRECTIONS`.
        q: min(N, D).
        digest: the hash of the weight (:func:`masm_ext.hashing.weight_hash`).

    Raises:
        ValueError: an unknown name, or a choice that does not return each direction once.
    """
    choice = DIRECTIONS[directions]
    if choice is None:
        return [-1 - i for i in range(q)]
    order = list(choice(q, digest))
    if sorted(order) != list(range(q)):
        raise ValueError(f"directions {directions!r} must return each of 0 .. {q - 1} once, got {len(order)} entries")
    return order


@PARTITIONS.register("interleaved")
def interleaved(ranks: Sequence[int]) -> list[list[int]]:
    """Deals the R directions round robin: every subspace covers the range of their singular values."""
    R = sum(ranks)
    groups: list[list[int]] = [[] for _ in ranks]
    k = 0
    for i in range(R):
        while len(groups[k]) == ranks[k]:
            k = (k + 1) % len(ranks)
        groups[k].append(i)
        k = (k + 1) % len(ranks)
    return groups


@PARTITIONS.register("contiguous")
def contiguous(ranks: Sequence[int]) -> list[list[int]]:
    """Cuts the R directions in runs, from the largest sigma on."""
    return [list(range(a, b)) for a, b in pairwise(bounds(ranks))]


def choose_ranks(
    sigma: Tensor,
    ranks: Sequence[int],
    energy: float | None,
    name: str = "weight",
    order: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The ranks ``r_1 .. r_K`` of one layer.

    Args:
        sigma: [q], descending.
        ranks: the ranks of the config, used as they are without ``energy``.
        energy: if given, R is the smallest number of directions, taken in ``order``, that hold this share of ``sum
            sigma^2``, rounded up to a multiple of K.
        name: of the layer, for messages.
        order: the q directions as :data:`masm_ext.registry.DIRECTIONS` orders them; from the end of the spectrum by
            default.

    Returns:
        K ranks.

    Raises:
        ValueError: R is above q, or a rank is below 1.
    """
    q, K = sigma.numel(), len(ranks)
    if energy is not None:
        places = torch.tensor(trailing(q) if order is None else order, device=sigma.device)
        held = sigma.double().square()[places].cumsum(0)  # [q], energy of the first 1, 2, ... directions in that order
        R = int((held < energy * held[-1]).sum()) + 1
        R = min(max(math.ceil(R / K) * K, K), q)
        ranks = tuple(R // K + (k < R % K) for k in range(K))
    if min(ranks) < 1:
        raise ValueError(f"{name}: every subspace needs rank 1 or more, got ranks {list(ranks)}")
    if sum(ranks) > q:
        raise ValueError(
            f"{name}: {K} subspaces of ranks {list(ranks)} need {sum(ranks)} singular directions, "
            f"but q = min(N, D) = {q}; lower subspace_rank, num_subspaces or energy"
        )
    return tuple(ranks)


def rows_of(order: Sequence[int], ranks: Sequence[int], partition: str) -> list[int]:
    """The artifact directions row by row: the first R of ``order``, by descending sigma, dealt among the subspaces.

    Args:
        order: at least R directions as :func:`order_of` returns them.
        ranks: K ranks, together R.
        partition: a name in :data:`masm_ext.registry.PARTITIONS`.
    """
    chosen = sorted(order[: sum(ranks)], key=abs)  # those of the gradient are negative
    return [chosen[i] for group in deal(ranks, partition) for i in group]


def split(
    weight: Tensor,
    spectrum: Spectrum,
    ranks: Sequence[int],
    partition: str,
    factor_dtype: torch.dtype,
    lift: float = 0.0,
) -> Decomposition:
    """Split W along the first ``sum(ranks)`` directions in the order of its spectrum.

    The principal part is W minus the factors *as rounded to* ``factor_dtype``, rounded once, so that the sum of the
    parts is W to one rounding.

    Args:
        weight: [N, D].
        spectrum: of ``weight``, with the vectors of at least ``sum(ranks)`` directions.
        ranks: K ranks.
        partition: a name in :data:`masm_ext.registry.PARTITIONS`.
        factor_dtype: of u, s and v.
        lift: added to the singular values of the artifact part, in units of sigma_rms.
    """
    directions = rows_of(spectrum.order, ranks, partition)
    row_of = {direction: row for row, direction in enumerate(spectrum.held)}
    rows = torch.tensor([row_of[direction] for direction in directions])
    sigma = spectrum.sigma[torch.tensor(directions)]
    start = sigma + lift * spectrum.sigma.square().mean().sqrt()
    u, s, v = (t.to(weight.device, factor_dtype).contiguous() for t in (spectrum.u[rows], start, spectrum.v[rows]))
    total = float(spectrum.sigma.square().sum())
    energy = float(sigma.square().sum()) / total if total > 0 else 0.0
    return Decomposition(principal(weight, u, s, v), u, s, v, bounds(ranks), energy, tuple(directions), lift)


def split_along_gradient(
    weight: Tensor, gradient: Tensor, ranks: Sequence[int], partition: str, factor_dtype: torch.dtype, lift: float
) -> Decomposition:
    """Split W along the leading singular directions of its gradient.

    With ``gradient = sum_i gamma_i a_i b_i^T``, row i of u is ``-a_i`` and row i of v is ``b_i``: a larger s_i lowers
    the loss. All s_i are ``lift * sigma_rms``; the principal part is the rest of W, as in :func:`split`.

    Args:
        weight: [N, D].
        gradient: [N, D], of the loss with respect to ``weight``.
        ranks: K ranks, together at most min(N, D).
        partition: a name in :data:`masm_ext.registry.PARTITIONS`; it deals the directions by their gamma.
        factor_dtype: of u, s and v.
        lift: the singular values of the artifact part, in units of sigma_rms.

    Raises:
        ValueError: the gradient has another shape than the weight, elements that are not finite, or a rank below R.
    """
    if gradient.shape != weight.shape or not gradient.isfinite().all():
        raise ValueError(
            f"need a finite gradient of the shape {list(weight.shape)} of the weight, got {list(gradient.shape)} with "
            f"{int((~gradient.isfinite()).sum())} elements that are not finite"
        )
    left, gamma, right = torch.linalg.svd(gradient.to(weight.device).double(), full_matrices=False)
    rank = int((gamma > 1e-7 * gamma[:1]).sum())  # the gradient is a sum in float32
    if rank < sum(ranks):
        raise ValueError(
            f"the gradient has rank {rank}, and {sum(ranks)} directions are wanted: measure it on more batches "
            "(direction_batches), or lower subspace_rank"
        )
    directions = rows_of(order_of("gradient", min(weight.shape), ""), ranks, partition)
    rows = torch.tensor([-1 - i for i in directions], device=weight.device)
    u, v = -left.mT[rows], right[rows]
    q, norm2 = min(weight.shape), float(weight.double().square().sum())
    held = ((u @ weight.double()) * v).sum(1).square().sum()  # of the energy of W
    s = torch.full((sum(ranks),), lift * math.sqrt(norm2 / q), dtype=torch.float64, device=weight.device)
    u, s, v = (t.to(factor_dtype).contiguous() for t in (u, s, v))
    energy = float(held) / norm2 if norm2 > 0 else 0.0
    return Decomposition(principal(weight, u, s, v), u, s, v, bounds(ranks), energy, tuple(directions), lift)


def deal(ranks: Sequence[int], partition: str) -> list[list[int]]:
    """The places among R directions that each subspace takes; ValueError if the partition does not deal each once."""
    R = sum(ranks)
    groups = PARTITIONS[partition](ranks)
    if [len(group) for group in groups] != list(ranks) or sorted(i for g in groups for i in g) != list(range(R)):
        raise ValueError(f"partition {partition!r} must deal each of {R} directions once, in ranks {list(ranks)}")
    return groups


def bounds(ranks: Sequence[int]) -> tuple[int, ...]:
    """The K + 1 row bounds of subspaces of these ranks."""
    return tuple(accumulate(ranks, initial=0))


def principal(weight: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """``W - u^T diag(s) v`` [N, D], computed in float64 and rounded once to the dtype of W. No SVD."""
    return fold(weight.double(), u.double(), -s.double(), v.double()).to(weight.dtype)
