"""Settings of the adaptation method; a part of `config`, where everything imports them from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .errors import require_setting as _require
from .methods.registry import METHODS

MethodName = Literal[tuple(METHODS)]


@dataclass(frozen=True)
class MasmOptions:
    """Subspaces, penalties and masks of the method masm. Names as in `masm_ext.MASMConfig`, with other mask defaults.

    Attributes:
        num_subspaces: K, the number of artifact subspaces of a layer
        subspace_rank: rank of each subspace: one number, or a list of K; ignored if energy is given
        energy: in (0, 1): choose the rank per layer: the fewest artifact directions that hold this share of the
            weight's squared Frobenius norm, rounded up to a multiple of K; null: use subspace_rank
        directions: which directions of a weight are the artifact directions, which are trained: its trailing singular
            directions (smallest singular values), its leading ones (largest), random ones, or gradient: the leading
            singular directions of the gradient of the loss, measured before training through a classifier that is
            fitted to the pretrained features
        direction_batches: number of batches on which that gradient is measured
        lift: added to the singular values of the artifact directions at the start, in units of the root mean square of
            all singular values, and taken off the frozen part (gradient: their singular value itself): the output stays
            the same, and turns of u and v move the weight from the first step; needs orthogonality and
            spectral_consistency 0
        partition: how they are shared among the subspaces: interleaved (round robin, so that each subspace covers the
            whole range of singular values) or contiguous (consecutive directions)
        orthogonality: coefficient of the penalty that pulls the subspaces towards being orthonormal, and orthogonal to
            each other and to the frozen part; decoupled from the gradient step, as weight decay is; 0: off
        spectral_consistency: coefficient of the penalty on changes of the weight's norm and of the trained singular
            values; decoupled in the same way; 0: off
        mask_policy: which blocks are trained (a block is one subspace of one layer): bias_variance selects them
            repeatedly during training, fixed once after the warm-up, static selects layers once before training, soft
            scales updates instead of switching them, specialists trains in a step on forgery d only subspace d
            modulo num_subspaces (needs optim.batches=alternating), none trains all; random and inverted are controls
        mask_statistic: what blocks are ranked by: snr (agreement of the gradient with those of the steps before) or
            agreement (between the gradients of the forgeries; needs optim.batches=alternating)
        mask_warmup: steps before the first selection; until then all blocks are active
        mask_interval: steps between selections
        mask_decay: decay per step of the running averages used for the selection
        mask_active_fraction: share of the layers in which each subspace is active
        mask_threshold: select the blocks whose gradient has a signal-to-power ratio above this (1: a constant gradient,
            0: noise) instead of a fixed share; null: use mask_active_fraction
        mask_hysteresis: relative bonus on the ratio of an active block, so that masks flicker less
        mask_min_active: minimum number of layers in which each subspace stays active
        mask_probe_interval: steps after which a masked block is unmasked for a while, to update its statistics;
            0: never
        mask_probe_steps: number of steps for which it is unmasked
        mask_seed: seed of the policy random; null: runtime.seed
        mask_calibration_batches: number of batches on which the static policy selects layers
    """

    num_subspaces: int = 3
    subspace_rank: int | list[int] = 4
    energy: float | None = None
    directions: str = "trailing"
    direction_batches: int = 32
    lift: float = 0.02
    partition: str = "interleaved"
    orthogonality: float = 0.0
    spectral_consistency: float = 0.0
    mask_policy: str = "none"
    mask_statistic: str = "snr"
    mask_warmup: int = 20
    mask_interval: int = 10
    mask_decay: float = 0.98
    mask_active_fraction: float = 0.5
    mask_threshold: float | None = None
    mask_hysteresis: float = 0.1
    mask_min_active: int = 4
    mask_probe_interval: int = 40
    mask_probe_steps: int = 5
    mask_seed: int | None = None
    mask_calibration_batches: int = 8


@dataclass(frozen=True)
class MethodConfig:
    """How the backbone is adapted.

    Attributes:
        name: probe trains the classifier only, full everything, ln the LayerNorms, bitfit the biases; the others adapt
            the layers in targets; masm-nomask is masm without masks
        targets: the linear layers to adapt: those of the attention, or of attention and MLPs
        rank: LoRA's r, or the number of trained singular directions of milora, osf and effort (masm:
            masm.subspace_rank); null: 8 for lora and milora, 12 for osf, 1 for effort
        lr: peak learning rate of the adapter (full: of the whole backbone; masm: change of the weight in a direction in
            a step, relative to an average singular value; without a lift the turn of a direction of u); null: 1e-05
            for full, 0.035 for masm, 0.0005 for lora and milora, 0.001 for the others
        u_lr_scale: masm and masm-nomask: turn of a direction of u in a step, relative to lr; null: with a lift as much
            as moves the weight by lr in a direction, relative to an average singular value; without a lift 1
        v_lr_scale: masm and masm-nomask: turn of a direction of v in a step, relative to lr; null: 0.5
        s_lr: masm and masm-nomask: change of a weight in a step by its singular values, relative to its norm; null:
            1e-05 with a lift, 0.001 without
        head_lr: peak learning rate of the classifier; null: 0.001 for masm, lora and milora, 0.003 for the others
        weight_decay: weight decay of AdamW (masm: of the classifier only); null: 0 for ln and bitfit, 0.01 for the
            others
        quantize: keep the frozen weights of the backbone's linear layers in 8 bits, in training and scoring: int8 or
            float8 (needs torchao); null: in the dtype of the checkpoint
        masm: subspaces, penalties and masks of masm and masm-nomask
    """

    name: MethodName = "masm"
    targets: Literal["attention", "attention+mlp"] = "attention"
    rank: int | None = None
    lr: float | None = None
    u_lr_scale: float | None = None
    v_lr_scale: float | None = None
    s_lr: float | None = None
    head_lr: float | None = None
    weight_decay: float | None = None
    quantize: Literal["int8", "float8"] | None = None
    masm: MasmOptions = field(default_factory=MasmOptions)

    def __post_init__(self) -> None:
        _require(self.name in METHODS, "method.name", self.name, f"one of {', '.join(METHODS)}")
        _require(
            self.rank is None or self.rank >= 1,
            "method.rank",
            self.rank,
            "at least 1, or null for the default",
        )
        _require(
            self.quantize is None or self.name != "full",
            "method.quantize",
            self.quantize,
            "null for the method full, which trains every weight",
        )
        for name in ("lr", "u_lr_scale", "v_lr_scale", "s_lr", "head_lr"):
            rate = getattr(self, name)
            _require(rate is None or rate > 0, f"method.{name}", rate, "greater than 0, or null for the default")
