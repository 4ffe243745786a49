"""From the scores of a detector to probabilities and decisions with a guarantee, learned on validation data.

The unit is a video, or a picture: its score is the mean P(fake) of its images. Three things are learned:

- a map to a calibrated P(fake): sigmoid(scale * logit(score) + offset) (Platt, 1999; temperature scaling: only the
  scale is learned, Guo et al., ICML 2017, arXiv 1706.04599). It is then moved to a mixture of as many real as fake
  videos, so that 0.5 says nothing, whatever the share of fakes among the validation videos (Saerens et al., Neural
  Computation, 2002);
- two thresholds (conformal prediction, here for data in groups: Lee, Barber and Willett, arXiv 2306.06342). For a new
  video from the same source, and on average over calibration sets of this size, a real one scores at or above the upper
  threshold with probability `false_alarm_rate` at most, a fake one at or below the lower one with probability
  `miss_rate` at most. What one calibration gives varies around that: `rate_limit` bounds it. Between the thresholds the
  verdict is "unsure". The statement does not hold for data that the epoch was chosen on (`selected_on`);
- how far the features of new images may lie from those of validation images (mean distance to the nearest ones, Sun et
  al., ICML 2022, arXiv 2204.06507), at a rate that holds approximately: each video is compared with the others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes
from scipy.optimize import minimize
from scipy.stats import beta
from sklearn.metrics import roc_auc_score

from masm_detect.errors import UserError
from masm_detect.hashes import folder_sha256
from masm_detect.results import read_json, write_json
from masm_ext.files import write_atomically

from .metrics import calibration_error
from .score_file import log_odds, sigmoid

FILE = "calibration.json"
FORMAT, VERSION = "masm-detect-calibration", 1
#: Neighbours whose mean distance tells how far an image is from the validation images.
NEIGHBOURS = 10
#: Most images whose features are kept.
MOST_FEATURES = 4000
Verdict = Literal["likely fake", "likely real", "unsure", "uncalibrated"]


class CalibrationError(UserError, ValueError):
    """Validation data that allow no calibration, or a calibration file that cannot be read."""


@dataclass(frozen=True)
class Calibration:
    """What was learned on validation data.

    Attributes:
        scale: of the map
        offset: of the map, for a mixture of as many real as fake videos
        thresholds: calibrated P(fake): at or above "fake" a video is likely fake, at or below "real" likely real; None:
            too few groups for the requested rate
        false_alarm_rate: largest share of real videos called fake
        miss_rate: largest share of fake videos called real
        n_real: real videos
        n_fake: fake videos
        n_real_groups: independent groups of real videos, on which the guarantee rests
        n_fake_groups: independent groups of fake videos
        share_of_fakes: among the videos
        ece_before: expected calibration error on these videos, 15 bins, of the scores
        ece_after: the same of the calibrated P(fake) for the mixture of these videos
        auc: on these videos
        selected_on: whether the epoch of the run was chosen on these videos: then the rates are no guarantees
        images_per_video: lowest and median number of images of a video: a file with fewer images has a less certain
            score than the thresholds were made for
        farthest: largest mean distance to the nearest validation images of an image that is like them; None: too few
            groups
        outside_rate: share of videos like the validation videos that are farther away
        data: names of the data sets
        features: of validation images, unit length, [n, feature_dim]; None: not kept
    """

    scale: float
    offset: float
    thresholds: dict[str, float | None]
    false_alarm_rate: float
    miss_rate: float
    n_real: int
    n_fake: int
    n_real_groups: int
    n_fake_groups: int
    share_of_fakes: float
    ece_before: float
    ece_after: float
    auc: float
    selected_on: bool = False
    images_per_video: tuple[int, float] = (1, 1.0)
    farthest: float | None = None
    outside_rate: float = 0.05
    data: tuple[str, ...] = ()
    features: np.ndarray | None = None

    def probability(self, p_fake: float) -> float:
        """Calibrated P(fake) of a video.

        Args:
            p_fake: mean P(fake) of its images.
        """
        return sigmoid(self.scale * log_odds(p_fake) + self.offset)

    def verdict(self, p_fake: float) -> Verdict:
        """The decision on a video.

        Args:
            p_fake: mean P(fake) of its images.
        """
        value, fake, real = self.probability(p_fake), self.thresholds["fake"], self.thresholds["real"]
        # Where a detector is so good that the thresholds cross, what lies between them is unlike both.
        if fake is not None and value >= max(fake, -math.inf if real is None else real):
            return "likely fake"
        if real is not None and value <= min(real, math.inf if fake is None else fake):
            return "likely real"
        return "unsure"

    def rate_limit(self, kind: Literal["fake", "real"]) -> float:
        """What the error rate of this one calibration stays below in 95% of calibrations.

        With G groups of one video each, the rate of a conformal threshold has a beta distribution (Vovk, ACML 2012,
        arXiv 1209.2673); with several videos a group this holds approximately.

        Args:
            kind: fake: real videos called fake; real: fake videos called real.
        """
        rate, groups = (
            (self.false_alarm_rate, self.n_real_groups) if kind == "fake" else (self.miss_rate, self.n_fake_groups)
        )
        above = math.floor(rate * (groups + 1) + 1e-9)
        return float(beta.ppf(0.95, above, groups + 1 - above)) if above else 1.0

    def calls_fake(self, p_fake: np.ndarray) -> np.ndarray:
        """Whether videos are at or above the upper threshold, bool [V].

        Args:
            p_fake: mean P(fake) of the images of each, [V].
        """
        fake = self.thresholds["fake"]
        return np.array([fake is not None and self.probability(p) >= fake for p in p_fake], dtype=bool)

    def distance(self, features: np.ndarray) -> np.ndarray | None:
        """Mean distance [n] to the nearest validation images; None without their features.

        Args:
            features: unit length, [n, feature_dim].
        """
        return None if self.features is None else neighbour_distance(features, self.features)


def fit_calibration(
    p_fake: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    *,
    false_alarm_rate: float = 0.05,
    miss_rate: float = 0.05,
    method: Literal["platt", "temperature"] = "platt",
) -> Calibration:
    """Learn the map and the thresholds.

    Args:
        p_fake: mean P(fake) of each of V videos, [V].
        labels: 0 real, 1 fake, [V].
        groups: videos of one group are not independent (one person, one photograph), [V].
        false_alarm_rate: largest share of real videos that are called fake, in (0, 1).
        miss_rate: largest share of fake videos that are called real, in (0, 1).
        method: platt: scale and offset; temperature: the scale only.

    Returns:
        The calibration, without features.

    Raises:
        CalibrationError: one class only, a rate outside (0, 1), or scores that do not order the videos.
    """
    check_rate("false_alarm_rate", false_alarm_rate)
    check_rate("miss_rate", miss_rate)
    labels, p_fake = np.asarray(labels), np.asarray(p_fake, float)
    if len(set(labels.tolist())) < 2:
        raise CalibrationError(f"all {len(labels)} validation videos have one label: a calibration needs both classes")
    auc = float(roc_auc_score(labels, p_fake))
    logits = np.array([log_odds(p) for p in p_fake])
    scale, offset = _fit_map(logits, labels, method)
    if auc <= 0.5 or scale <= 0:
        raise CalibrationError(
            f"the scores do not order the validation videos (AUC {auc:.3f}): a detector that is no better than chance "
            "there cannot be calibrated"
        )
    for_mixture = np.array([sigmoid(scale * x + offset) for x in logits])
    offset -= log_odds(float((labels == 1).mean()))
    after = np.array([sigmoid(scale * x + offset) for x in logits])
    names = np.asarray(groups, dtype=str)
    real, fake = labels == 0, labels == 1
    return Calibration(
        scale=scale,
        offset=offset,
        thresholds={
            "fake": conformal_bound(after[real], names[real], false_alarm_rate),
            "real": _negative(conformal_bound(-after[fake], names[fake], miss_rate)),
        },
        false_alarm_rate=false_alarm_rate,
        miss_rate=miss_rate,
        n_real=int(real.sum()),
        n_fake=int(fake.sum()),
        n_real_groups=len(set(names[real])),
        n_fake_groups=len(set(names[fake])),
        share_of_fakes=float(fake.mean()),
        ece_before=calibration_error(labels, p_fake),
        ece_after=calibration_error(labels, for_mixture),
        auc=auc,
    )


def check_rate(name: str, rate: float) -> None:
    """Raise CalibrationError unless the rate called `name` is between 0 and 1.

    Args:
        name: of the setting.
        rate: its value.
    """
    if not 0 < rate < 1:
        raise CalibrationError(f"{name} is {rate}; it must be between 0 and 1, e.g. 0.05")


def conformal_bound(scores: np.ndarray, groups: np.ndarray, rate: float) -> float | None:
    """The smallest bound that a score from a new group reaches with probability `rate` at most.

    Each of G groups has the weight 1 / (G + 1), shared by its scores, and the new group has the rest: hierarchical
    conformal prediction (Lee, Barber and Willett, arXiv 2306.06342, section 3.1).

    Args:
        scores: [n].
        groups: name of the group of each, [n].
        rate: in (0, 1).

    Returns:
        A float just above one of the scores; None if there are fewer than 1 / rate - 1 groups.
    """
    names, place = np.unique(groups, return_inverse=True)
    order = np.argsort(scores, kind="stable")
    weight = (1 / np.bincount(place)[place] / (len(names) + 1))[order]
    # a tolerance: 19 groups give the rate 1/20, though 19 times 1/20 may be rounded to less than 0.95
    reached = np.nonzero(np.cumsum(weight) >= 1 - rate - 1e-9)[0]
    return None if not len(reached) else float(np.nextafter(scores[order][reached[0]], np.inf))


def neighbour_distance(features: np.ndarray, known: np.ndarray, skip: np.ndarray | None = None) -> np.ndarray:
    """Mean distance of features to their nearest known features, [n].

    Args:
        features: unit length, [n, d].
        known: unit length, [m, d].
        skip: [n, m], True where a known feature does not count (of the same group); None: all count.
    """
    similarity = features @ known.T
    if skip is not None:
        similarity = np.where(skip, -np.inf, similarity)
    nearest = np.sort(similarity, axis=1)[:, -min(NEIGHBOURS, known.shape[0]) :]
    nearest = np.where(np.isfinite(nearest), nearest, -1.0)
    return np.sqrt(np.maximum(2 - 2 * nearest, 0)).mean(axis=1)


def unit_length(features: np.ndarray) -> np.ndarray:
    """Features scaled to unit length, float32 [n, d].

    Args:
        features: [n, d].
    """
    features = np.asarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def farthest_of(
    features: np.ndarray, videos: Sequence[str], groups: Sequence[str], rate: float, kept: np.ndarray | None = None
) -> float | None:
    """The bound on the distance of a video that is like the validation videos (`conformal_bound`).

    Args:
        features: of n images, unit length, [n, d].
        videos: of each image, [n].
        groups: of each image, [n].
        rate: share of such videos that are farther away.
        kept: places of the images that distances are measured to, those of the same group left out; None: all.
    """
    names = np.asarray(groups, dtype=str)
    kept = np.arange(len(features)) if kept is None else kept
    distance = np.concatenate([
        neighbour_distance(features[i : i + 256], features[kept], names[i : i + 256, None] == names[None, kept])
        for i in range(0, len(features), 256)
    ])  # fmt: skip
    _, place = np.unique(np.asarray(videos, dtype=str), return_inverse=True)
    mean = np.bincount(place, weights=distance) / np.bincount(place)
    first = np.unique(place, return_index=True)[1]
    return conformal_bound(mean, names[first], rate)


def save_calibration(folder: Path | str, calibration: Calibration, provenance: dict[str, Any]) -> None:
    """Write `calibration.json`, and the features beside it, to a run folder; the JSON last.

    Args:
        folder: the run folder.
        calibration: what was learned.
        provenance: where it comes from, for the file.
    """
    folder = Path(folder)
    content = {name: value for name, value in asdict(calibration).items() if name != "features"}
    content |= {"adapter_sha256": folder_sha256(folder / "adapter"), "features_file": None, "features_sha256": None}
    if calibration.features is not None:
        data = to_bytes({"features": calibration.features.astype(np.float16)})
        digest = hashlib.sha256(data).hexdigest()
        # a name of its own: the old features stay beside the old JSON until that is replaced
        content |= {"features_file": f"calibration-{digest[:12]}.safetensors", "features_sha256": digest}
        write_atomically(folder / content["features_file"], data)
    write_json(folder / FILE, {"format": FORMAT, "version": VERSION, **content, "provenance": provenance})
    for other in folder.glob("calibration-*.safetensors"):
        if other.name != content["features_file"]:
            other.unlink(missing_ok=True)


def load_calibration(folder: Path | str) -> Calibration | None:
    """The calibration of a run folder; None if it has none.

    Args:
        folder: the run folder.

    Raises:
        CalibrationError: it cannot be read, or was made for other weights.
    """
    folder = Path(folder)
    if not (folder / FILE).is_file():
        return None
    content = read_json(folder / FILE)
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise CalibrationError(
            f"{folder / FILE} is no calibration that this version reads ({FORMAT}, version {VERSION}): run "
            "`masm calibrate` again"
        )
    try:
        fields = {name: value for name, value in content.items() if name not in ("format", "version", "provenance")}
        adapter, file, digest = (
            fields.pop(f"{name}") for name in ("adapter_sha256", "features_file", "features_sha256")
        )
        if adapter != folder_sha256(folder / "adapter"):
            raise CalibrationError(
                f"{folder / FILE} was made for other weights than those in {folder / 'adapter'}: run `masm calibrate` "
                "again"
            )
        features = None
        if file is not None:
            data = (folder / Path(file).name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(f"{file} is not the file that was written with it")
            features = unit_length(from_bytes(data)["features"])
        fields |= {"data": tuple(fields["data"]), "images_per_video": tuple(fields["images_per_video"])}
        return Calibration(**fields, features=features)
    except CalibrationError:
        raise
    except (TypeError, KeyError, ValueError, OSError, SafetensorError) as error:
        raise CalibrationError(f"{folder / FILE} is damaged ({error}): run `masm calibrate` again") from error


def _fit_map(logits: np.ndarray, labels: np.ndarray, method: str) -> tuple[float, float]:
    """Scale and offset of largest likelihood, with Platt's smoothed targets, which keep them finite."""
    positive, negative = (labels == 1).sum(), (labels == 0).sum()
    target = np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        z = parameters[0] * logits + (parameters[1] if method == "platt" else 0.0)
        difference = 1 / (1 + np.exp(-np.clip(z, -500, 500))) - target
        gradient = np.array([(difference * logits).mean(), difference.mean() if method == "platt" else 0.0])
        return float((np.logaddexp(0, z) - target * z).mean()), gradient

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS").x
    return float(found[0]), float(found[1]) if method == "platt" else 0.0


def _negative(value: float | None) -> float | None:
    return None if value is None else -value
