"""The configuration of the method."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .registry import DIRECTIONS, MASK_POLICIES, PARTITIONS


@dataclass(frozen=True)
class MASMConfig:
    """The configuration of the method, checked on construction.

    The formulas behind the fields are an interpretation of the paper (arXiv 2601.01041), whose own values are not
    public; see docs/method.md, "The method, and what is ours". Names in ``directions``, ``partition`` and
    ``mask_policy`` come from :mod:`masm_ext.registry`. A block is one subspace of one layer.

    The defaults are the method as the paper describes it in words, with masks and penalties. Neither is shown to help
    (docs/evidence.md); ``masm train`` uses ``lift=0.02, mask_policy="none", orthogonality=0, spectral_consistency=0``.

    Args:
        target_modules: the ``nn.Linear`` layers to convert. One string or several: an exact module name, a dotted
            suffix (``"query"`` matches ``"encoder.layer.0.attention.query"``), a glob (``"encoder.*.fc?"``), or
            ``"re:<regex>"`` that matches the whole name. A plain name that is the full name of a module selects only
            that module: ``"head"`` selects the head of the model, not also the one inside its vision tower.
        exclude_modules: layers not to convert, in the same forms; takes precedence over ``target_modules``.
        modules_to_save: modules that stay trainable and are saved with the adapter (the head), in the same forms.
        num_subspaces: K, the number of artifact subspaces of a layer.
        subspace_rank: rank of each subspace: one int, or K ints. Ignored if ``energy`` is given.
        energy: in (0, 1): per layer, the smallest R whose artifact directions hold this share of ``||W||_F^2``,
            rounded up to a multiple of K. None: the ranks are ``subspace_rank``.
        directions: which R singular directions are the artifact directions: "trailing" (the smallest sigma), "leading"
            (the largest), or "random" (drawn with the hash of the weight as seed). "gradient": the R leading singular
            directions of the gradient of the loss with respect to the weight, measured by
            :func:`masm_ext.weight_gradients`; pass its result to :func:`masm_ext.convert` as ``gradients=``. They
            start with the singular value ``lift * sigma_rms``.
        direction_batches: maximum number of batches that ``weight_gradients`` reads.
        lift: added to the singular values of the artifact directions at the start, in units of sigma_rms (the root mean
            square of W's singular values), and taken off the frozen part, so that the output stays the same. A turn of
            u or v moves the weight by s times as much: at trailing singular values, which are nearly 0, hardly at all.
            With a lift the two penalties cannot be used.
        partition: how the subspaces share the artifact directions: "interleaved" (round robin, so that each subspace
            covers the whole range of sigma) or "contiguous" (consecutive directions).
        train_bias: train the biases of converted layers too.
        orthogonality: coefficient of the orthogonality penalty in :func:`masm_ext.regularization_loss`; 0: off.
            :class:`masm_ext.MaskedAdamW` does not read it: pass the coefficient to the optimizer.
        spectral_consistency: likewise, of the spectral consistency penalty.
        mask_policy: "bias_variance" (blocks are selected during training), "static" (layers are selected once, by
            :func:`masm_ext.select_layers`; pass its result to :func:`masm_ext.convert` as ``target_modules=``), "fixed"
            (selected once, after the warm-up), "soft" (updates are scaled instead of switched), "specialists" (a step
            on domain d updates subspace d modulo K only; the training loop sets ``masks.domain``), the controls
            "random" and "inverted", or "none".
        mask_statistic: what blocks are ranked by: "snr" (agreement of the gradient with those of the steps before) or
            "agreement" (agreement between the gradients of domains, in deepfake detection of forgeries; the training
            loop sets ``masks.domain`` before each step).
        mask_warmup: steps before the first selection; until then all blocks are active.
        mask_interval: steps between selections.
        mask_decay: decay per step of the running averages of signal and power.
        mask_active_fraction: share of the layers in which each subspace is active.
        mask_threshold: in [0, 1]: select the blocks with an snr above this, instead of ``mask_active_fraction``.
        mask_hysteresis: bonus on the snr of an active block, relative (0.1 = 10%), so that masks flicker less.
        mask_min_active: minimum number of layers in which each subspace stays active.
        mask_probe_interval: steps after which a masked block is unmasked for a while (a probe); 0: never.
        mask_probe_steps: number of steps of a probe, in which the statistics of the block are updated.
        mask_seed: seed of the policy "random".
        mask_calibration_batches: maximum number of batches that ``select_layers`` reads.

    Raises:
        ValueError: a value out of range, or an unknown name.
        TypeError: a module pattern is not a string, or a rank is not an int.
    """

    target_modules: str | Sequence[str] = ()
    exclude_modules: str | Sequence[str] = ()
    modules_to_save: str | Sequence[str] = ()
    num_subspaces: int = 3
    subspace_rank: int | Sequence[int] = 4
    energy: float | None = None
    directions: str = "trailing"
    direction_batches: int = 32
    lift: float = 0.0
    partition: str = "interleaved"
    train_bias: bool = False
    orthogonality: float = 1e-2
    spectral_consistency: float = 1e-3
    mask_policy: str = "bias_variance"
    mask_statistic: str = "snr"
    mask_warmup: int = 50
    mask_interval: int = 25
    mask_decay: float = 0.98
    mask_active_fraction: float = 0.5
    mask_threshold: float | None = None
    mask_hysteresis: float = 0.1
    mask_min_active: int = 1
    mask_probe_interval: int = 100
    mask_probe_steps: int = 10
    mask_seed: int = 0
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
        self._require(self.lift >= 0, "lift", "0 or more")
        if self.needs_gradients and (not self.lift or self.energy is not None):
            raise ValueError(
                'MASMConfig.directions "gradient" needs a lift above 0, because the directions have no singular value '
                f"of the weight, and no energy; got lift={self.lift}, energy={self.energy}"
            )
        self._require(self.partition in PARTITIONS, "partition", f"one of {tuple(PARTITIONS)}")
        self._require(self.orthogonality >= 0, "orthogonality", "0 or more")
        self._require(self.spectral_consistency >= 0, "spectral_consistency", "0 or more")
        self._require(
            self.mask_policy in MASK_POLICIES,
            "mask_policy",
            f"one of {tuple(MASK_POLICIES)} (pass a callable to LayerMasks itself)",
        )
        self._require(self.mask_statistic in ("snr", "agreement"), "mask_statistic", '"snr" or "agreement"')
        if self.mask_statistic == "agreement" and self.mask_policy in ("none", "static", "specialists", "random"):
            raise ValueError(
                f'MASMConfig.mask_statistic "agreement" needs a policy that ranks blocks, and mask_policy '
                f"{self.mask_policy!r} does not"
            )
        self._require(0 <= self.mask_decay < 1, "mask_decay", "in [0, 1)")
        self._require(0 < self.mask_active_fraction <= 1, "mask_active_fraction", "in (0, 1]")
        self._require(
            self.mask_threshold is None or 0 <= self.mask_threshold <= 1, "mask_threshold", "None or in [0, 1]"
        )
        if self.mask_threshold is not None and self.mask_policy in ("inverted", "random", "soft"):
            raise ValueError(
                f"MASMConfig.mask_threshold is {self.mask_threshold}, but mask_policy {self.mask_policy!r} ignores it: "
                "leave it None and set mask_active_fraction"
            )
        self._require(self.mask_seed >= 0, "mask_seed", "0 or more")
        self._require(self.mask_hysteresis >= 0, "mask_hysteresis", "0 or more")
        for name in ("direction_batches", "mask_interval", "mask_probe_steps", "mask_calibration_batches"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("mask_warmup", "mask_min_active", "mask_probe_interval"):
            self._require(getattr(self, name) >= 0, name, "0 or more")

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"MASMConfig.{name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def needs_gradients(self) -> bool:
        """Whether the artifact directions are those of the gradients (:func:`masm_ext.weight_gradients`)."""
        return DIRECTIONS[self.directions] is None

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
