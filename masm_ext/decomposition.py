"""The split of a weight into its principal subspace and K artifact subspaces, and the cache of SVDs."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from .files import write_atomically
from .hashing import weight_hash as weight_hash  # part of what a decomposition is keyed by
from .ops.fold import fold
from .registry import PARTITIONS

# Trailing directions kept in the cache, so that another R usually finds them there.
CACHED_DIRECTIONS = 64
# Weights decomposed in one batched call.
BATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class Spectrum:
    """All singular values of W and its last T singular directions, float64, sigma descending.

    sigma [q], u [T, N], v [T, D]; row -1 belongs to the smallest singular value.
    """

    sigma: Tensor
    u: Tensor
    v: Tensor


@dataclass(frozen=True)
class Decomposition:
    """``W = weight + u^T diag(s) v``: weight [N, D], u [R, N], s [R], v [R, D], offsets K + 1 row bounds.

    ``energy`` is the share of ``||W||_F^2`` that the artifact part holds.
    """

    weight: Tensor
    u: Tensor
    s: Tensor
    v: Tensor
    offsets: tuple[int, ...]
    energy: float


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "masm_ext" / "svd"


def choose_ranks(sigma: Tensor, ranks: Sequence[int], energy: float | None, name: str = "weight") -> tuple[int, ...]:
    """The ranks ``r_1 .. r_K`` for one layer. sigma [q], descending.

    With ``energy``, R is the smallest number of trailing directions that hold that share of ``sum sigma^2``,
    rounded up to a multiple of K. Raises ValueError if R is above q.
    """
    q, K = sigma.numel(), len(ranks)
    if energy is not None:
        tail = sigma.double().square().flip(0).cumsum(0)  # [q], energy of the last 1, 2, ... directions
        R = int((tail < energy * tail[-1]).sum()) + 1
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


@PARTITIONS.register("interleaved")
def interleaved(ranks: Sequence[int]) -> list[list[int]]:
    """Deals the R directions round robin: every subspace gets the same share of the spectrum."""
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
    bounds = [sum(ranks[:k]) for k in range(len(ranks) + 1)]
    return [list(range(a, b)) for a, b in pairwise(bounds)]


def check_finite(weight: Tensor, name: str) -> None:
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise ValueError(f"{name}: weight has {bad} NaN or infinite elements and cannot be decomposed")


def compute_spectra(weights: Sequence[Tensor], directions: int) -> list[Spectrum]:
    """SVDs of finite weights of one shape [N, D], batched."""
    spectra = []
    size = max(1, BATCH_BYTES // max(1, weights[0].numel() * 8))
    for start in range(0, len(weights), size):
        # float64: the trailing directions lie below float32's resolution of sigma_1
        stack = torch.stack([w.detach().double() for w in weights[start : start + size]])
        u, sigma, vh = torch.linalg.svd(stack, full_matrices=False)
        T = min(directions, sigma.shape[-1])
        for b in range(stack.shape[0]):
            spectra.append(
                Spectrum(
                    sigma[b].cpu(),
                    u[b, :, u.shape[-1] - T :].mT.contiguous().cpu(),
                    vh[b, vh.shape[-2] - T :].contiguous().cpu(),
                )
            )
    return spectra


def split(
    weight: Tensor, spectrum: Spectrum, ranks: Sequence[int], partition: str, factor_dtype: torch.dtype
) -> Decomposition:
    """Split W [N, D] along its last ``sum(ranks)`` directions.

    The principal part is W minus the factors *as rounded to* ``factor_dtype``, rounded once, so that the sum of the
    parts is W to one rounding.
    """
    R = sum(ranks)
    order = [i for group in PARTITIONS[partition](ranks) for i in group]
    T = spectrum.u.shape[0]
    rows = torch.tensor([T - R + i for i in order])
    sigma = spectrum.sigma[-R:][torch.tensor(order)]
    u, s, v = (t.to(weight.device, factor_dtype).contiguous() for t in (spectrum.u[rows], sigma, spectrum.v[rows]))
    offsets = tuple(sum(ranks[:k]) for k in range(len(ranks) + 1))
    total = float(spectrum.sigma.square().sum())
    energy = float(sigma.square().sum()) / total if total > 0 else 0.0
    return Decomposition(principal(weight, u, s, v), u, s, v, offsets, energy)


def principal(weight: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """``W - u^T diag(s) v`` [N, D], computed in float64 and rounded once to the dtype of W. No SVD."""
    return fold(weight.double(), u.double(), -s.double(), v.double()).to(weight.dtype)


class SpectrumCache:
    """Spectra on disk under the hash of their weight: one safetensors file each, written atomically.

    An unreadable file is not used and not deleted: the error names it. A folder that cannot be written is told once a
    weight, as a warning: nothing that was computed is lost to it.
    """

    def __init__(self, folder: str | os.PathLike | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_cache_dir()

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.safetensors"

    def get(self, digest: str, directions: int) -> Spectrum | None:
        path = self._path(digest)
        if not path.exists():
            return None
        try:
            data = safetensors.torch.load_file(path)
            spectrum = Spectrum(data["sigma"], data["u"], data["v"])
        except Exception as error:
            raise ValueError(f"the SVD cache file {path} cannot be read ({error}); delete it and try again") from error
        return spectrum if spectrum.u.shape[0] >= min(directions, spectrum.sigma.numel()) else None

    def put(self, digest: str, spectrum: Spectrum) -> None:
        data = safetensors.torch.save({"sigma": spectrum.sigma, "u": spectrum.u, "v": spectrum.v})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(digest), data)
        except OSError as error:
            warnings.warn(f"the SVD is not cached: {self.folder} cannot be written ({error})", stacklevel=2)


def spectra_of(
    weights: dict[str, Tensor],
    hashes: dict[str, str],
    directions: int,
    cache: SpectrumCache | None,
    on_done: Callable[[str], None] = lambda name: None,
) -> dict[str, Spectrum]:
    """Spectra of named weights: from the cache where it has them, else batched by shape and put into it."""
    found: dict[str, Spectrum] = {}
    missing: dict[tuple, list[str]] = {}
    for name, weight in weights.items():
        check_finite(weight, name)
        spectrum = cache.get(hashes[name], directions) if cache is not None else None
        if spectrum is None:
            missing.setdefault((tuple(weight.shape), weight.device), []).append(name)
        else:
            found[name] = spectrum
            on_done(name)
    for (shape, _), names in missing.items():
        per_call = max(1, min(8, BATCH_BYTES // max(1, 8 * math.prod(shape))))  # small enough for a live progress bar
        for start in range(0, len(names), per_call):
            group = names[start : start + per_call]
            keep = max(directions, min(min(shape), CACHED_DIRECTIONS))
            for name, spectrum in zip(group, compute_spectra([weights[n] for n in group], keep)):
                if cache is not None:
                    cache.put(hashes[name], spectrum)
                found[name] = spectrum
                on_done(name)
    return found
