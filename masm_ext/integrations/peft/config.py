"""The configuration of a MASM adapter of PEFT."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from peft import PeftConfig

from ...config import MASMConfig
from .peft_type import peft_type

#: Fields of MASMConfig that PEFT interprets with its own rules.
MATCHED_BY_PEFT = ("target_modules", "exclude_modules", "modules_to_save")


@dataclass
class MASMTunerConfig(PeftConfig):
    """The configuration of a MASM adapter of PEFT, checked on construction.

    Layers are matched by the rules of PEFT. Every other field that :class:`masm_ext.MASMConfig` has too means the same
    as there, with the same default.

    Args:
        target_modules: the ``nn.Linear`` layers to adapt: a list of names or suffixes, a regular expression for the
            whole name, or "all-linear".
        exclude_modules: layers to leave out: a list of names or suffixes, or a regular expression.
        modules_to_save: names of modules that are trained as a whole and saved with the adapter (the head).
        layers_to_transform: adapt only the layers with this index or these indices; for ``target_modules`` in a list.
        layers_pattern: name of the ``nn.ModuleList`` that ``layers_to_transform`` counts in; None: any.
        num_subspaces: K, the number of artifact subspaces of a layer.
        subspace_rank: rank of each subspace: one int, or K ints. Ignored if ``energy`` is given.
        energy: in (0, 1): per layer, the smallest R whose artifact directions hold this share of ``||W||_F^2``.
        directions: which R singular directions are the artifact directions: "trailing", "leading" or "random".
            "gradient" needs gradients, which PEFT has no way to pass: convert such an adapter with
            :func:`masm_ext.integrations.peft.adapter_to_peft`.
        direction_batches: not read by PEFT; kept for conversion.
        lift: added to the singular values of the artifact directions at the start, in units of sigma_rms.
        partition: how the subspaces share the artifact directions: "interleaved" or "contiguous".
        train_bias: train a copy of the bias of each adapted layer.
        orthogonality: coefficient of the orthogonality penalty in :func:`masm_ext.regularization_loss`.
        spectral_consistency: likewise, of the spectral consistency penalty.
        mask_policy: how blocks are selected in training; see :class:`masm_ext.MASMConfig`. "static" needs layers chosen
            beforehand: pass ``target_modules=list(select_layers(...))`` and "none" instead.
        mask_statistic: what blocks are ranked by: "snr" or "agreement".
        mask_warmup: steps before the first selection.
        mask_interval: steps between selections.
        mask_decay: decay per step of the running averages.
        mask_active_fraction: share of the layers in which each subspace is active.
        mask_threshold: in [0, 1]: select the blocks with an snr above this instead.
        mask_hysteresis: bonus on the snr of an active block, relative.
        mask_min_active: minimum number of layers in which each subspace stays active.
        mask_probe_interval: steps after which a masked block is unmasked for a while; 0: never.
        mask_probe_steps: number of steps of a probe.
        mask_seed: seed of the policy "random".
        mask_calibration_batches: not read by PEFT; kept for conversion.
        init_weights: False: start from random factors instead of singular directions, so that the adapter changes the
            output. For tests.
        check_base: compare each weight with the SHA-256 of the weight that a saved adapter was trained on. False: put
            the adapter on another base, such as the same one in another dtype; it then adds the same change.
        layers: written when an adapter is saved: per layer its row bounds, its directions, and hash, dtype and shape of
            its weight, so that loading needs no SVD. Leave it None for a new adapter.

    Raises:
        ValueError: a value out of range, or an unknown name.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    num_subspaces: int = 3
    subspace_rank: int | list[int] = 4
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
    init_weights: bool = True
    check_base: bool = True
    layers: dict[str, dict[str, Any]] | None = None

    #: What the tuner fills in when it saves an adapter: the value of ``layers`` in the file.
    saved_layers: ClassVar[dict[str, dict[str, Any]] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"MASMTunerConfig.layers_to_transform needs target_modules in a list, got {self.target_modules!r}: "
                "write the indices into that pattern, or pass a list"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("MASMTunerConfig.layers_pattern needs layers_to_transform: set it, or leave both None")
        config = self.masm_config()
        if config.mask_policy == "static" and self.layers is None:
            raise ValueError(
                'MASMTunerConfig.mask_policy "static" selects layers before they are adapted: pass '
                'target_modules=list(select_layers(...)) with mask_policy="none"'
            )
        if config.needs_gradients and self.layers is None:
            raise ValueError(
                f"MASMTunerConfig.directions is {self.directions!r}, which needs gradients that PEFT has no way to "
                "pass: use masm_ext.convert(gradients=...), and adapter_to_peft for the saved adapter"
            )

    def masm_config(self) -> MASMConfig:
        """The same settings for :class:`masm_ext.LayerMasks` and the losses, without the names of modules."""
        own = {field.name for field in dataclasses.fields(MASMConfig)} - set(MATCHED_BY_PEFT)
        return MASMConfig(**{name: getattr(self, name) for name in own})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; sets of names are sorted."""
        fields = {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}
        return fields if self.saved_layers is None else {**fields, "layers": self.saved_layers}
