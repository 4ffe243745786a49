"""What the radial power spectrum tells: a baseline without a network, which sees resizing and compression, and no face.

Images are first made alike: resized to one size and recompressed. What the spectrum still tells was there before:
traces of a generator, or of another camera, resizing filter or compression. Between two sets of real images it can only
be the latter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import combinations
from typing import Any
from zlib import crc32

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from masm_detect.data.decode import decode_image, encode_jpeg, read_image
from masm_detect.data.groups import root
from masm_detect.data.sample import Sample
from masm_detect.data.transforms import resize_image
from masm_ext.progress import Progress

from .held_out import held_out_auc, is_suspect
from .problems import Problem

#: Side in pixels and JPEG quality to which every image is brought first, as `--data.normalize_first '[256, 75]'` does.
NORMALIZED = (256, 75)
_THREADS = 4


def radial_spectrum(rgb: np.ndarray) -> np.ndarray:
    """Log power of the grey image [H, W, 3], averaged over rings of one frequency step: float64 [min(H, W) // 2]."""
    grey = rgb.astype(np.float64).mean(axis=2)
    window, inside, radius = _rings(*grey.shape)
    power = np.abs(np.fft.fftshift(np.fft.fft2((grey - grey.mean()) * window))) ** 2
    rings = min(power.shape) // 2
    mean = np.bincount(radius, power[inside], rings) / np.bincount(radius, minlength=rings)
    return np.log(mean + 1e-9)


@lru_cache(maxsize=4)
def _rings(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The window [H, W], where the rings are, bool [H, W], and the ring of each such place, int [n]."""
    window = np.outer(np.hanning(height), np.hanning(width))
    y, x = np.indices((height, width))
    radius = np.hypot(y - height // 2, x - width // 2).astype(int)
    inside = radius < min(height, width) // 2
    return window, inside, radius[inside]


def spectrum_model() -> Any:
    """The classifier of radial spectra: logistic regression on standardized rings."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))


def spectrum_report(
    samples: Sequence[Sample],
    copies: Sequence[tuple[int, int]],
    *,
    limit: int,
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, Any], list[Problem]]:
    """How well spectra tell fakes from reals, and the reals of the data sets from each other.

    Args:
        samples: all samples; their files can be read.
        copies: pairs of samples that show one picture: they are kept in one fold.
        limit: images of each data set and method, drawn at random.
        seed: of this choice and of the folds.
        progress: show a progress bar.

    Returns:
        {"side", "quality": `NORMALIZED`, "limit", "seed", "real_against_fake": rows {"dataset", "method", **numbers},
        "between_reals": rows {"a", "b", **numbers}}, with the numbers of `held_out.held_out_auc`; and a warning for
        each pair of data sets whose reals are told apart.
    """
    chosen = _draw(samples, limit, seed)
    spectra = _spectra([samples[i] for places in chosen.values() for i in places], progress)
    groups = _joined_groups(samples, copies)

    def measure(ones: list[int], others: list[int]) -> dict[str, Any]:
        features = np.stack([spectra[samples[i].path] for i in ones + others])
        labels = np.repeat([0, 1], [len(ones), len(others)])
        return held_out_auc(features, labels, [groups[i] for i in ones + others], spectrum_model, seed)

    reals = {dataset: places for (dataset, label, _), places in chosen.items() if label == 0}
    against_fakes = [
        {"dataset": dataset, "method": method, **measure(reals[dataset], places)}
        for (dataset, label, method), places in chosen.items()
        if label == 1 and dataset in reals
    ]
    between = [{"a": a, "b": b, **measure(reals[a], reals[b])} for a, b in combinations(reals, 2)]
    problems = [
        Problem(
            "warning",
            "shortcut",
            f"the real images of {row['a']} and {row['b']} are told apart by their spectrum (AUC {row['auc']:.2f}), "
            "even if all are resized and recompressed alike: take reals and fakes of one source, or a detector may "
            "learn the source instead of the forgery",
        )
        for row in between
        if is_suspect(row)
    ]
    side, quality = NORMALIZED
    settings = {"side": side, "quality": quality, "limit": limit, "seed": seed}
    return settings | {"real_against_fake": against_fakes, "between_reals": between}, problems


def _draw(samples: Sequence[Sample], limit: int, seed: int) -> dict[tuple[str, int, str], list[int]]:
    """At most `limit` places of samples for each (data set, label, method), whatever else is examined."""
    parts: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    for i, s in enumerate(samples):
        parts[s.dataset, s.label, s.method].append(i)
    chosen = {}
    for key, places in sorted(parts.items()):
        random = np.random.default_rng([seed, crc32(repr(key).encode("utf-8", "replace"))])
        chosen[key] = sorted(random.permutation(places)[:limit].tolist())
    return chosen


def _spectra(samples: Sequence[Sample], progress: bool) -> Mapping[str, np.ndarray]:
    """Radial spectrum of each normalized image, by path."""
    paths = sorted({sample.path for sample in samples})
    bar = Progress(total=len(paths), unit="image", desc="spectra", disable=not progress, leave=False)
    found = {}
    with ThreadPoolExecutor(_THREADS) as pool, bar:
        for path, spectrum in zip(paths, pool.map(_normalized_spectrum, paths)):
            found[path] = spectrum
            bar.update()
    return found


def _normalized_spectrum(path: str) -> np.ndarray:
    side, quality = NORMALIZED
    return radial_spectrum(decode_image(encode_jpeg(resize_image(read_image(path), side), quality), path))


def _joined_groups(samples: Sequence[Sample], copies: Sequence[tuple[int, int]]) -> list[str]:
    """The groups of the samples, one for all that share a picture."""
    parent: dict[str, str] = {}
    for a, b in copies:
        parent[root(parent, samples[a].group)] = root(parent, samples[b].group)
    return [root(parent, sample.group) for sample in samples]
