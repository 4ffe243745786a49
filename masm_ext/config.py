"""The choices of the method: one frozen dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .registry import DIRECTIONS, MASK_POLICIES, PARTITIONS


@dataclass(frozen=True)
class MASMConfig:
    """Every choice of the method, checked on construction.

    The formulas behind the fields are an interpretation of the paper (arXiv 2601.01041), whose own values are not
    public; see docs/method.md, "The method, and what is ours". Names in ``directions``, ``partition`` and
    ``mask_policy`` come from :mod:`masm_ext.registry`.

    Args:
        target_modules: which ``nn.Linear`` layers to convert. A string or several: an exact module name, a dotted
            suffix (``"query"`` matches ``"encoder.layer.0.attention.query"``), a glob (``"encoder.*.fc?"``) or
            ``"re:<regex>"`` that matches the whole name. If a module of exactly that name exists, a plain name means
            that module alone: ``"head"`` is the head of the model, not also the one inside its vision tower.
        exclude_modules: the same forms; has precedence over ``target_modules``.
        modules_to_save: the same forms; modules that stay trainable and are saved with the adapter (the head).
        num_subspaces: K, the number of artifact subspaces.
        subspace_rank: rank of each subspace: one int, or K ints. Ignored if ``energy`` is given.
        energy: in (0, 1): per layer, the smallest R whose artifact directions hold this share of ``||W||_F^2``,
            rounded up to a multiple of K.
        directions: which R singular directions are the artifact directions: "trailing" the last (smallest sigma),
            "leading" the first, "random" a draw seeded by the hash of the weight.
        partition: "interleaved" deals the artifact directions round robin, so that each subspace spans the same share
            of the spectrum; "contiguous" cuts them in runs.
        train_bias: let the biases of converted layers learn (frozen by default).
        orthogonality: coefficient of that penalty in :func:`masm_ext.regularization_loss`; 0 turns it off.
            :class:`masm_ext.MaskedAdamW`, which decouples the penalties, takes its coefficients as arguments.
        spectral_consistency: the same for the other penalty.
        mask_policy: "bias_variance" (dynamic), "static" (layers chosen once by :func:`masm_ext.select_layers`, whose
            result :func:`masm_ext.convert` takes as ``target_modules=``) or "none".
        mask_warmup: steps before the first selection, with all blocks active.
        mask_interval: steps between selections.
        mask_decay: of the averages of signal and power, per step.
        mask_active_fraction: share of the layers that each subspace may update.
        mask_threshold: if given, a block is active if its snr is above it, instead of the best fraction.
        mask_hysteresis: advantage of an active block as a share of its snr (0.1 = 10%), so that masks do not flicker.
        mask_min_active: layers that stay active for each subspace at least.
        mask_probe_interval: steps after which a masked block is unmasked again; 0: never.
        mask_probe_steps: steps of such a probe, in which its statistics move.
        mask_calibration_batches: batches of the calibration pass of the static policy.

    Raises:
        ValueError: a value out of range, or an unknown name.
        TypeError: module patterns that are no strings, or ranks that are no ints.
    """

    target_modules: str | Sequence[str] = ()
    exclude_modules: str | Sequence[str] = ()
    modules_to_save: str | Sequence[str] = ()
    num_subspaces: int = 3
    subspace_rank: int | Sequence[int] = 4
    energy: float | None = None
    directions: str = "trailing"
    partition: str = "interleaved"
    train_bias: bool = False
    orthogonality: float = 1e-2
    spectral_consistency: float = 1e-3
    mask_policy: str = "bias_variance"
    mask_warmup: int = 50
    mask_interval: int = 25
    mask_decay: float = 0.98
    mask_active_fraction: float = 0.5
    mask_threshold: float | None = None
    mask_hysteresis: float = 0.1
    mask_min_active: int = 1
    mask_probe_interval: int = 100
    mask_probe_steps: int = 10
    mask_calibration_batches: int = 8

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if not isinstance(value, str) and not all(isinstance(v, str) for v in value):
                raise TypeError(f"MASMConfig.{name} must be a string or a sequence of strings, got {value!r}")
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name, values in (
            ("subspace_rank", [self.subspace_rank] if isinstance(self.subspace_rank, int) else self.subspace_rank),
            ("num_subspaces", [self.num_subspaces]),
        ):
            if isinstance(values, str | float) or not all(isinstance(v, int) for v in values):
                raise TypeError(f"MASMConfig.{name} must be made of ints, got {getattr(self, name)!r}")
        if not isinstance(self.subspace_rank, int):
            object.__setattr__(self, "subspace_rank", tuple(self.subspace_rank))
        self._require(self.num_subspaces >= 1, "num_subspaces", "at least 1")
        if isinstance(self.subspace_rank, tuple):
            self._require(
                len(self.subspace_rank) == self.num_subspaces,
                "subspace_rank",
                f"one rank for each of the {self.num_subspaces} subspaces",
            )
        self._require(min(self.ranks) >= 1, "subspace_rank", "at least 1 for every subspace")
        self._require(self.energy is None or 0 < self.energy < 1, "energy", "None or between 0 and 1")
        self._require(self.directions in DIRECTIONS, "directions", f"one of {tuple(DIRECTIONS)}")
        self._require(self.partition in PARTITIONS, "partition", f"one of {tuple(PARTITIONS)}")
        self._require(self.orthogonality >= 0, "orthogonality", "0 or more")
        self._require(self.spectral_consistency >= 0, "spectral_consistency", "0 or more")
        self._require(
            self.mask_policy in MASK_POLICIES,
            "mask_policy",
            f"one of {tuple(MASK_POLICIES)} (pass a callable to LayerMasks itself)",
        )
        self._require(0 <= self.mask_decay < 1, "mask_decay", "in [0, 1)")
        self._require(0 < self.mask_active_fraction <= 1, "mask_active_fraction", "in (0, 1]")
        self._require(
            self.mask_threshold is None or 0 <= self.mask_threshold <= 1, "mask_threshold", "None or in [0, 1]"
        )
        self._require(self.mask_hysteresis >= 0, "mask_hysteresis", "0 or more")
        for name in ("mask_interval", "mask_probe_steps", "mask_calibration_batches"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("mask_warmup", "mask_min_active", "mask_probe_interval"):
            self._require(getattr(self, name) >= 0, name, "0 or more")

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"MASMConfig.{name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def ranks(self) -> tuple[int, ...]:
        """``r_1 .. r_K`` as configured; ``energy`` may choose others per layer."""
        if isinstance(self.subspace_rank, int):
            return (self.subspace_rank,) * self.num_subspaces
        return tuple(self.subspace_rank)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MASMConfig:
        """Inverse of :meth:`to_dict`.

        Args:
            values: fields by name; a missing one takes its default.

        Raises:
            ValueError: unknown fields.
        """
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"MASMConfig has no field {sorted(unknown)}; was this written by a newer masm_ext?")
        return cls(**values)
