"""A fractional design of MASM's own choices, and what each of them does.

    python benchmarks/generalization/factorial.py          # writes studies/factorial.yaml anew

60 of the 144 combinations of masks, penalties, directions and K, chosen so that the main effects, the interactions with
the masks, and those of penalties and directions are told as well as 60 runs allow (a D-optimal design by exchange). All
others are assumed to be absent. All runs have the same total rank. Each belongs to one of three seeds, whose effect is
removed. Penalties are decoupled, so that the same coefficient is the same pull relative to a step of AdamW, and with
the larger rate of trailing directions a larger one in all: hence their interaction.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from differences import cells, shown_p
from masm_detect.config import ConfigError
from masm_detect.evaluation.delong import aucs
from masm_detect.evaluation.differences import Difference, Scored, Source, holm, holm_p_values, left_out
from masm_detect.evaluation.intervals import jackknife_variance, obstacle
from masm_detect.results import write_text
from scipy.stats import f as fisher

HERE = Path(__file__).resolve().parent
RUNS, SEEDS, RANK = 60, (1, 2, 3), 9

#: Factor -> level -> settings. The first level of each is the one that the others are compared with. Trailing
#: directions have small singular values and need larger rates to move the weight as much.
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "masks": {
        "none": {"method.name": "masm", "masm.mask_policy": "none"},
        "snr": {"method.name": "masm", "masm.mask_policy": "bias_variance", "masm.mask_statistic": "snr"},
        "random": {"method.name": "masm", "masm.mask_policy": "random"},
        "inverted": {"method.name": "masm", "masm.mask_policy": "inverted", "masm.mask_statistic": "snr"},
        "fixed": {"method.name": "masm", "masm.mask_policy": "fixed", "masm.mask_statistic": "snr"},
        "agreement": {"method.name": "masm", "masm.mask_policy": "bias_variance", "masm.mask_statistic": "agreement"},
    },
    "penalties": {
        "off": {"masm.orthogonality": 0.0, "masm.spectral_consistency": 0.0},
        "orthogonality": {"masm.orthogonality": 0.01, "masm.spectral_consistency": 0.0},
        "spectral": {"masm.orthogonality": 0.0, "masm.spectral_consistency": 0.001},
        "both": {"masm.orthogonality": 0.01, "masm.spectral_consistency": 0.001},
    },
    "directions": {
        "trailing": {"masm.directions": "trailing", "method.lr": 0.06, "method.s_lr": 0.002},
        "random": {"masm.directions": "random", "method.lr": 0.004, "method.s_lr": 0.002},
        "leading": {"masm.directions": "leading", "method.lr": 0.004, "method.s_lr": 0.002},
    },
    "K": {
        "1": {"masm.num_subspaces": 1, "masm.subspace_rank": RANK},
        "3": {"masm.num_subspaces": 3, "masm.subspace_rank": RANK // 3},
    },
}
#: Contrasts of several levels of the masks, looked at after the results were known: weight of each level.
AFTERWARDS = {
    "any mask against none": {"none": -1.0} | dict.fromkeys(list(FACTORS["masks"])[1:], 0.2),
    "snr, fixed and agreement against random and inverted": dict.fromkeys(("snr", "fixed", "agreement"), 1 / 3)
    | dict.fromkeys(("random", "inverted"), -0.5),
}
#: The pairs of factors whose interactions are in the model.
INTERACTIONS = [("masks", "penalties"), ("masks", "directions"), ("masks", "K"), ("penalties", "directions")]
Levels = tuple[str, ...]


def design_matrix(rows: Sequence[Levels], seeds: Sequence[int]) -> tuple[np.ndarray, list[str]]:
    """The columns of the model, and their names: intercept, seeds, main effects, INTERACTIONS: [n, p]."""
    columns, names = [np.ones(len(rows))], ["intercept"]
    present = sorted(set(seeds))
    for seed in present[1:]:
        columns.append(np.array([float(s == seed) - float(s == present[0]) for s in seeds]))
        names.append(f"seed {seed}")
    coded: dict[str, list[tuple[str, np.ndarray]]] = {}
    for place, (factor, levels) in enumerate(FACTORS.items()):
        first = next(iter(levels))
        # deviations from the mean of all levels, so that main effects are averages over the other factors
        coded[factor] = [
            (level, np.array([float(row[place] == level) - float(row[place] == first) for row in rows]))
            for level in list(levels)[1:]
        ]
        for level, column in coded[factor]:
            columns.append(column)
            names.append(f"{factor}={level}")
    for first, second in INTERACTIONS:
        for (level, one), (other_level, other) in product(coded[first], coded[second]):
            columns.append(one * other)
            names.append(f"{first}={level} and {second}={other_level}")
    return np.column_stack(columns), names


def choose(seed: int = 0, tries: int = 5) -> list[tuple[Levels, int]]:
    """The combinations and their seeds: the design of largest det X'X that exchanges of single runs find."""
    candidates = [(row, s) for row in product(*FACTORS.values()) for s in SEEDS]
    x = design_matrix([row for row, _ in candidates], [s for _, s in candidates])[0]
    random = np.random.default_rng(seed)
    best, best_value = [], -np.inf
    for _ in range(tries):
        chosen = random.permutation(len(candidates))[:RUNS]
        value = _log_det(x[chosen])
        improved = True
        while improved:
            improved = False
            for place in range(RUNS):
                inverse = np.linalg.inv(x[chosen].T @ x[chosen] + 1e-6 * np.eye(x.shape[1]))
                old = x[chosen[place]]
                # gain of replacing one run by each candidate (Fedorov, 1972)
                spread = np.einsum("ij,jk,ik->i", x, inverse, x)
                own, cross = old @ inverse @ old, x @ inverse @ old
                gain = (1 + spread) * (1 - own) + cross**2
                gain[chosen] = 0  # no run twice
                new = int(np.argmax(gain))
                if gain[new] > 1 + 1e-6:
                    chosen[place] = new
                    improved = True
            value = _log_det(x[chosen])
        if value > best_value:
            best, best_value = chosen.tolist(), value
    return sorted(
        (candidates[i] for i in best),
        key=lambda pair: (pair[1], [list(f).index(v) for f, v in zip(FACTORS.values(), pair[0])]),
    )


def levels_of(variant: str) -> Levels:
    """The levels of a run from the name of its variant: snr.off.trailing.1."""
    return tuple(variant.split("."))


def effects(variants: Sequence[str], seeds: Sequence[int], parts: Sequence[Scored]) -> list[str]:
    """The table of effects on the AUC, its mean over `parts`, Markdown: main effects as differences from the first
    level, and F tests of the interactions.

    Least squares on `design_matrix`. An effect has two sources of error, as a difference of two detectors has: the test
    samples, which all runs share, by the jackknife over groups, and the residual variance of the runs. In the F tests
    the two covariances are added and the degrees of freedom are those of the residuals, which claims too little.

    Args:
        variants, seeds: of n runs, all of the design.
        parts: for each forgery the scores of these runs.

    Raises:
        ConfigError: the runs do not tell the effects apart, or the test has too few groups.
    """
    rows = [levels_of(variant) for variant in variants]
    x, names = design_matrix(rows, seeds)
    free = len(rows) - x.shape[1]
    if free < 1 or np.linalg.matrix_rank(x) < x.shape[1]:
        raise ConfigError(f"{len(rows)} runs do not tell {x.shape[1]} effects apart: write the design anew")
    for part in parts:
        if (reason := obstacle(part.groups.tolist(), part.labels)) is not None:
            raise ConfigError(f"there is no interval of an effect: {reason}")
    y = np.mean([aucs(part.labels, part.rows) for part in parts], axis=0)
    estimates = np.linalg.pinv(x)  # [effects, runs]: an effect as a weighted sum of the runs' AUCs
    variance = float(((y - x @ (estimates @ y)) ** 2).sum() / free)
    without, kind = left_out(parts)

    def difference(contrast: np.ndarray) -> Difference:
        """A sum of the runs' AUCs whose weights add up to 0, in the place of the difference of two AUCs."""
        weights = contrast @ estimates
        samples = Source(*jackknife_variance(weights @ without, kind))
        sources = samples, Source(variance * float(weights @ weights), free)
        return Difference((float(weights @ y),), (0.0,), sources)

    found: dict[str, Difference] = {}
    for factor, levels in FACTORS.items():
        first, *others = levels
        for level in others:
            contrast = np.array([_contrast(name, factor, level) for name in names])
            found[f"{factor} | {level} against {first}"] = difference(contrast)
    corrected = holm({name: value.p_value() for name, value in found.items()})
    lines = [
        f"{len(rows)} runs, {free} degrees of freedom, residual deviation {variance**0.5:.3f}. Intervals and tests "
        "hold for other test photographs, and other runs on these draws of training images.",
        "",
        "| factor | level | difference | 95% interval | excludes 0 if Holm rejects | p |",
        "|---|---|---|---|---|---|",
    ]
    for name, value in found.items():
        lines.append(f"| {name} | {cells(value, corrected[name])}")
    lines += ["", "| looked at afterwards | difference | 95% interval | p |", "|---|---|---|---|"]
    for name, levels in AFTERWARDS.items():
        # what a level has over the first one, weighted: the weights of all levels add up to 0
        contrast = sum(w * np.array([_contrast(n, "masks", level) for n in names]) for level, w in levels.items())
        value = difference(contrast)
        span = "[{:+.3f}, {:+.3f}]".format(*value.interval())
        lines.append(f"| {name} | {value.mean:+.3f} | {span} | {shown_p(value.p_value())} |")
    tests = {}
    for pair in INTERACTIONS:
        weights = estimates[[all(f"{factor}=" in name for factor in pair) for name in names]]
        covariance = variance * (weights @ weights.T) + _jackknife_covariance(weights @ without, kind)
        ratio = float((weights @ y) @ np.linalg.solve(covariance, weights @ y)) / len(weights)
        tests[" and ".join(pair)] = ratio, len(weights), float(fisher.sf(ratio, len(weights), free))
    adjusted = holm_p_values({name: p for name, (_, _, p) in tests.items()})
    lines += ["", "| interaction | F | degrees of freedom | p | p by Holm's method |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {ratio:.2f} | {more}, {free} | {shown_p(p)} | {shown_p(adjusted[name])} |"
        for name, (ratio, more, p) in tests.items()
    ]
    return lines


def _jackknife_covariance(values: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """[m, m] of m numbers from their values without each group, [m, G], by `jackknife_variance` of their sums."""
    out = np.zeros((len(values), len(values)))
    for i, one in enumerate(values):
        for j, other in enumerate(values[: i + 1]):
            together, apart = (jackknife_variance(both, kind)[0] for both in (one + other, one - other))
            out[i, j] = out[j, i] = (together - apart) / 4
    return out


def _contrast(name: str, factor: str, level: str) -> float:
    """Weight of a coefficient in (mean of `level`) - (mean of the first level); 0 for the first.

    The coefficient of the first level is minus the sum of the others.
    """
    if " and " in name or not name.startswith(f"{factor}=") or level == next(iter(FACTORS[factor])):
        return 0.0
    return 2.0 if name == f"{factor}={level}" else 1.0


def _log_det(x: np.ndarray) -> float:
    return float(np.linalg.slogdet(x.T @ x + 1e-6 * np.eye(x.shape[1]))[1])


def main() -> int:
    """Write the study."""
    variants: dict[str, Any] = {}
    for row, seed in choose():
        settings = {"method.head_lr": 0.003, "method.u_lr_scale": 1.0, "method.v_lr_scale": 1.0, "masm.lift": 0.0}
        for levels, level in zip(FACTORS.values(), row):
            settings |= levels[level]
        variants.setdefault(".".join(row), settings | {"seeds": []})["seeds"].append(seed)
    study = {
        "title": "Masks, penalties, directions and number of subspaces: a fractional design",
        "caution": "Written by factorial.py. The forgeries are image operations on photographs of FFHQ, not deepfakes; "
        "one set of rates for each kind of directions, without lift, which the penalties do not allow.",
        "dataset": "families",
        "backbone": "bundled:dinov2-small",
        "image_size": 112,
        "precision": "bf16",
        "sampling": {"train": 360, "val": 120, "train_tiles": 2},
        "augment": {"flip": 0.5},
        "optim": {"epochs": 2, "batch_size": 8, "batches": "alternating"},
        "directions": {
            "no-blend-warp": {"seen": ["poisson", "upsample", "inpaint", "resample"], "unseen": ["blend", "warp"]}
        },
        "variants": {name: {k: v for k, v in s.items() if k != "seeds"} for name, s in variants.items()},
        "stages": {
            "factorial": {"seeds": list(SEEDS), "variants": {n: {"seeds": s["seeds"]} for n, s in variants.items()}}
        },
    }
    text = "# Written by factorial.py: change the factors there.\n" + yaml.safe_dump(study, sort_keys=False, width=120)
    write_text(HERE / "studies" / "factorial.yaml", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
