"""Singular values and directions of weights, computed in batches and cached on disk."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from .files import write_atomically

#: Directions kept in the cache at least, so that another R usually finds them there.
CACHED_DIRECTIONS = 64
#: Bytes of float64 weights that are decomposed in one batched call.
BATCH_BYTES = 256 << 20

#: (q, hash of the weight) -> all q directions in the order in which they are taken.
Order = Callable[[int, str], Sequence[int]]


@dataclass(frozen=True)
class Spectrum:
    """All singular values of a weight W [N, D], and the vectors of the first T directions of an order.

    Attributes:
        sigma: float64 [q], descending.
        u, v: float64 [T, N] and [T, D], by descending sigma.
        order: the q directions (0 = largest sigma), in the order in which they are taken.
    """

    sigma: Tensor
    u: Tensor
    v: Tensor
    order: Sequence[int]

    @property
    def held(self) -> list[int]:
        """The directions whose vectors are here, one a row of u and v."""
        return sorted(self.order[: len(self.u)])


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/masm_ext/svd``, or ``~/.cache/masm_ext/svd``."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "masm_ext" / "svd"


def check_finite(weight: Tensor, name: str) -> None:
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise ValueError(f"{name}: weight has {bad} NaN or infinite elements and cannot be decomposed")


def compute_spectra(weights: Sequence[Tensor], count: int, orders: Sequence[Sequence[int]]) -> list[Spectrum]:
    """SVDs of finite weights of one shape [N, D], batched; each with the vectors of ``count`` directions."""
    spectra = []
    size = max(1, BATCH_BYTES // max(1, weights[0].numel() * 8))
    for start in range(0, len(weights), size):
        # float64: the trailing directions lie below float32's resolution of sigma_1
        stack = torch.stack([w.detach().double() for w in weights[start : start + size]])
        u, sigma, vh = torch.linalg.svd(stack, full_matrices=False)
        for b, order in enumerate(orders[start : start + size]):
            rows = torch.tensor(sorted(order[:count]), device=u.device)
            of_rows = u[b].index_select(1, rows).mT.contiguous().cpu(), vh[b].index_select(0, rows).cpu()
            spectra.append(Spectrum(sigma[b].cpu(), *of_rows, order))
    return spectra


class SpectrumCache:
    """Spectra on disk: one safetensors file for the hash of a weight and a choice of directions, written atomically.

    A damaged file is an error that names it; it is neither used nor deleted. Warns once per weight if the folder is not
    writable.

    Args:
        folder: :func:`default_cache_dir` by default.
    """

    def __init__(self, folder: str | os.PathLike | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_cache_dir()

    def _path(self, digest: str, directions: str) -> Path:
        # the default has the name of files from versions without a choice
        return self.folder / (
            f"{digest}.safetensors" if directions == "trailing" else f"{digest}-{directions}.safetensors"
        )

    def get(self, digest: str, count: int, order: Sequence[int], directions: str = "trailing") -> Spectrum | None:
        """The spectrum of a weight if its file holds the first ``count`` directions of ``order``, else None."""
        path = self._path(digest, directions)
        if not path.exists():
            return None
        try:
            data = safetensors.torch.load_file(path)
            spectrum = Spectrum(data["sigma"], data["u"], data["v"], order)
            q, T = len(spectrum.sigma), len(spectrum.u)
            held = data["held"].tolist() if "held" in data else list(range(q - T, q))  # without it: trailing
        except Exception as error:
            raise ValueError(f"the SVD cache file {path} cannot be read ({error}); delete it and try again") from error
        return spectrum if min(count, q) <= T and held == spectrum.held else None

    def put(self, digest: str, spectrum: Spectrum, directions: str = "trailing") -> None:
        """Write a spectrum. Warns if the folder is not writable."""
        held = torch.tensor(spectrum.held)
        data = safetensors.torch.save({"sigma": spectrum.sigma, "u": spectrum.u, "v": spectrum.v, "held": held})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(digest, directions), data)
        except OSError as error:
            warnings.warn(f"the SVD is not cached: {self.folder} cannot be written ({error})", stacklevel=2)


def spectra_of(
    weights: dict[str, Tensor],
    hashes: dict[str, str],
    count: int,
    cache: SpectrumCache | None,
    order: Order,
    directions: str = "trailing",
    on_done: Callable[[str], None] = lambda name: None,
) -> dict[str, Spectrum]:
    """Spectra of named weights: from the cache where it has them, else batched by shape and written to it.

    Args:
        weights: [N, D] each.
        hashes: :func:`masm_ext.hashing.weight_hash` of each.
        count: directions whose vectors are needed.
        cache: None computes all of them.
        order: the choice of directions,
        directions: and its name, part of the key of the cache.
        on_done: called with every name when its spectrum is there.

    Raises:
        ValueError: a weight has NaN or infinite elements, or a file of the cache is damaged.
    """
    found: dict[str, Spectrum] = {}
    missing: dict[tuple, list[str]] = {}
    orders = {name: order(min(weight.shape), hashes[name]) for name, weight in weights.items()}
    for name, weight in weights.items():
        check_finite(weight, name)
        spectrum = cache.get(hashes[name], count, orders[name], directions) if cache is not None else None
        if spectrum is None:
            missing.setdefault((tuple(weight.shape), weight.device), []).append(name)
        else:
            found[name] = spectrum
            on_done(name)
    for (shape, _), names in missing.items():
        per_call = max(1, min(8, BATCH_BYTES // max(1, 8 * math.prod(shape))))  # small enough for a live progress bar
        for start in range(0, len(names), per_call):
            group = names[start : start + per_call]
            keep = max(count, min(min(shape), CACHED_DIRECTIONS))
            spectra = compute_spectra([weights[n] for n in group], keep, [orders[n] for n in group])
            for name, spectrum in zip(group, spectra):
                if cache is not None:
                    cache.put(hashes[name], spectrum, directions)
                found[name] = spectrum
                on_done(name)
    return found
