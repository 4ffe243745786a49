"""The tuner: puts MASM adapters into a model for PEFT."""

from __future__ import annotations

from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ...contract import dtype_name
from ...hashing import weight_hash
from ...progress import Progress
from ...selection import check_convertible
from ...wrappers import modules_of
from .config import MASMTunerConfig
from .layer import MASMTunerLinear
from .peft_type import PREFIX
from .subspaces import AdapterSubspaces, decompose, placeholder, randomize, unfilled


class MASMTunerModel(BaseTuner):
    """The tuner behind ``get_peft_model(model, MASMTunerConfig(...))``; PEFT makes it, as any BaseTuner."""

    prefix = "masm_"
    tuner_layer_cls = MASMTunerLinear
    #: PEFT's default layers by model type: there are none, ``target_modules`` names them.
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put an adapter into the model, as :meth:`peft.tuners.tuners_utils.BaseTuner.inject_adapter`.

        Args:
            model: the base model.
            adapter_name: its config is ``self.peft_config[adapter_name]``.
            autocast_adapter_dtype: ignored: factors beside a half-precision weight are always float32.
            low_cpu_mem_usage: make placeholders on the meta device.
            state_dict: adapt the layers that its keys name.

        Raises:
            ValueError: a saved adapter was trained on another weight or architecture, or a layer cannot be adapted.
            TypeError: a layer has a type or dtype that cannot be adapted.
        """
        config = self.peft_config[adapter_name]
        saved = config.layers
        self._saved, self._is_empty, self._found = saved, low_cpu_mem_usage, set()
        needs_svd = saved is None and (not low_cpu_mem_usage or config.energy is not None)
        with Progress(desc="SVD", unit="layer", disable=not needs_svd, leave=False) as self._bar:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        del self._bar
        unmatched = sorted(set(saved or {}) - self._found)
        if unmatched:
            raise ValueError(
                f"adapter {adapter_name!r} was trained on {len(saved)} layers, and this model lacks "
                f"{', '.join(unmatched[:3])}: it is another architecture"
            )

    def _create_and_replace(
        self,
        peft_config: MASMTunerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        tuner = target if isinstance(target, MASMTunerLinear) else None
        if tuner is None:
            check_convertible(self.model, {current_key: target})
            tuner = MASMTunerLinear(target)
        layer = self._subspaces(tuner, adapter_name, peft_config, current_key)
        self._found.add(current_key)
        tuner.masm_subspaces[adapter_name] = layer
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if tuner is not target:
            self._replace_module(parent, target_name, tuner, target)
        tuner.set_adapter(self.active_adapters)

    def _subspaces(self, tuner: MASMTunerLinear, adapter: str, config: MASMTunerConfig, name: str) -> AdapterSubspaces:
        weight, bias = tuner.pretrained()
        weight, settings = weight.detach(), config.masm_config()
        if weight.is_meta:
            raise ValueError(f"{name}: the weight is on the meta device; load the pretrained weights first")
        own_bias = bias if config.train_bias else None
        if self._saved is not None:
            entry = _entry_of(name, weight, bias, self._saved, config.check_base)
            directions = tuple(entry["directions"])
            parts = placeholder(weight, tuple(entry["offsets"]), config.lift, entry["energy"], directions)
            return AdapterSubspaces(tuner, adapter, parts, own_bias, base_hash=entry["base_sha256"], loaded=False)
        digest = weight_hash(weight)
        if self._is_empty and config.energy is None:
            parts, loaded = unfilled(weight, settings, name), False
        else:
            # the context of PEFT moves new parameters to the meta device, not the tensors that they are made from
            parts, loaded = decompose(weight, digest, settings, name), not self._is_empty
            self._bar.update()
        layer = AdapterSubspaces(tuner, adapter, parts, own_bias, base_hash=digest, loaded=loaded)
        if not config.init_weights and loaded:
            randomize(layer, float(weight.double().square().sum() / min(weight.shape)) ** 0.5)
        return layer

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MASMTunerConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # save_pretrained writes the config next: the record of the layers goes into that file, not into the field
        # ``layers``, because the caller may use the config for another model too
        config.saved_layers = {
            name.removeprefix(PREFIX): tuner.masm_subspaces[adapter_name].record()
            for name, tuner in modules_of(model, MASMTunerLinear).items()
            if adapter_name in tuner.masm_subspaces
        }
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    def unload(self) -> nn.Module:
        """The base model without adapters, its weights bit for bit as they came in, also after a merge."""
        self.unmerge_adapter()
        return super().unload()


def _entry_of(
    name: str, weight: Tensor, bias: Tensor | None, saved: dict[str, dict[str, Any]], check_base: bool
) -> dict[str, Any]:
    """The record of a layer of a saved adapter, compared with the layer of this model."""
    if name not in saved:
        raise ValueError(
            f"the config names layers that its adapter was trained on, and {name!r} is not one of them: set "
            "config.layers = None for a new adapter, or load the adapter on its own architecture"
        )
    entry = saved[name]
    shape, has_bias = list(weight.shape), bias is not None
    if entry["shape"] != shape or entry["bias"] != has_bias:
        raise ValueError(
            f"{name}: the adapter was trained on a weight {entry['shape']} {'with' if entry['bias'] else 'without'} "
            f"bias, the weight here is {shape} {'with' if has_bias else 'without'} bias: another architecture"
        )
    if check_base and entry["dtype"] != dtype_name(weight.dtype):
        raise ValueError(
            f"{name}: the adapter was trained on a base in {entry['dtype']}, the weight here is "
            f"{dtype_name(weight.dtype)}: load the base in {entry['dtype']}, or set check_base=False in the config"
        )
    if check_base and entry["base_sha256"] != weight_hash(weight):
        raise ValueError(
            f"{name}: the weight differs from the one that the adapter was trained on (SHA-256): load it on the same "
            "pretrained checkpoint, or set check_base=False in the config"
        )
    return entry
