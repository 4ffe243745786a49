"""The layer that PEFT puts in place of an ``nn.Linear``."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ...ops import fold, subspace_linear
from .subspaces import AdapterSubspaces, difference


class MASMTunerLinear(nn.Module, BaseTunerLayer):
    """An ``nn.Linear`` of the base model with any number of MASM adapters.

    With the weight W of the base, ``y = x W^T + sum_a x (A_a - A0_a)^T + bias``: ``A = u^T diag(s) v`` is the artifact
    part of an active adapter a, ``A0`` its value at the start. W stays as it is, so disabling and unloading restore the
    base bit for bit, and adapters can be added. It is one call of ``masm::subspace_linear`` with 2R directions per
    adapter, the frozen ones masked; no dense weight is formed. Where :class:`masm_ext.MASMLinear` keeps ``W - A0`` and
    computes R directions, this layer computes 2R.

    Args:
        base_layer: the layer of the base model; it becomes a submodule and is not changed.

    Attributes:
        masm_subspaces: the :class:`AdapterSubspaces` by the names of the adapters.
    """

    adapter_layer_names = ("masm_subspaces",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.masm_subspaces = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        # weight and bias of the base while adapters are merged; they move with the model and are in no state_dict
        self.register_buffer("masm_pretrained_weight", None, persistent=False)
        self.register_buffer("masm_pretrained_bias", None, persistent=False)

    def pretrained(self) -> tuple[Tensor, Tensor | None]:
        """Weight [N, D] and bias [N] or None of the base, without any merged adapter."""
        base = self.get_base_layer()
        if self.merged:
            return self.masm_pretrained_weight, self.masm_pretrained_bias
        return base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        """The output with the active adapters.

        Args:
            x: [..., D], in the dtype of the weight or under autocast.

        Returns:
            [..., N], in the dtype of ``x``.

        Raises:
            ValueError: an active adapter was made from a saved config, and its factors were not loaded.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [self.masm_subspaces[name] for name in self.active_adapters if name in self.masm_subspaces]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x)
        for layer in active:
            if not layer.has_values():
                raise ValueError(
                    f"adapter {layer.adapter!r} was made from the config of a saved adapter, and its factors were not "
                    "loaded: load it by PeftModel.from_pretrained or load_adapter, or set config.layers = None for a "
                    "new adapter"
                )
        weight, bias = self.pretrained()
        u, s, v = difference(active)
        offsets, masks = [0], []
        for layer in active:
            start, R = offsets[-1], layer.offsets[-1]
            offsets += [start + end for end in layer.offsets[1:]] + [start + 2 * R]
            masks += [layer.mask, layer.mask.new_zeros(1)]
        return subspace_linear(x, weight, u, s, v, _summed_bias(bias, active), offsets=offsets, mask=torch.cat(masks))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to W, [N, D] in the dtype of its factors.

        Args:
            adapter: its name.
        """
        u, s, v = difference([self.masm_subspaces[adapter]])
        return (u.mT * s) @ v

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the weight of the base layer, rounded once. W is kept for :meth:`unmerge`.

        Args:
            safe_merge: check that the merged weight is finite before anything is changed.
            adapter_names: the adapters; None: the active ones.

        Raises:
            ValueError: ``safe_merge``, and the weight would not be finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.masm_subspaces]
        if not names:
            return
        base = self.get_base_layer()
        weight, bias = self.pretrained()
        layers = [self.masm_subspaces[name] for name in (*self.merged_adapters, *names)]
        merged = fold(weight.detach(), *difference(layers))
        merged_bias = _summed_bias(bias, layers)
        if safe_merge and not (merged.isfinite().all() and (merged_bias is None or merged_bias.isfinite().all())):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        if not self.merged:
            self.masm_pretrained_weight = weight.detach().clone()
            self.masm_pretrained_bias = None if bias is None else bias.detach().clone()
        base.weight.data = merged
        if bias is not None:
            base.bias.data = merged_bias.detach().clone()
        self.merged_adapters += names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weight and bias of the base layer bit for bit. Does nothing without a merged adapter."""
        if not self.merged:
            return
        base = self.get_base_layer()
        base.weight.data = self.masm_pretrained_weight
        if base.bias is not None:
            base.bias.data = self.masm_pretrained_bias
        self.masm_pretrained_weight = self.masm_pretrained_bias = None
        self.merged_adapters = []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: ``peft.convert_to_lora`` with a rank of 2R gives the adapter exactly, up to rounding.

        Args:
            adapter_name: any adapter.
        """
        return True

    def __repr__(self) -> str:
        return "masm." + super().__repr__()


def _summed_bias(bias: Tensor | None, layers: list[AdapterSubspaces]) -> Tensor | None:
    """The bias of the base plus what each adapter with a bias of its own adds to it, in the dtype of the base."""
    changes = [layer.bias - bias for layer in layers if layer.bias is not None]
    return sum(changes, bias).to(bias.dtype) if changes else bias
