from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .config import MASMConfig
from .contract import accumulate_dtype
from .decomposition import SpectrumCache, choose_ranks, spectra_of, split
from .hashing import tensor_hashes
from .nn.masm_linear import MASMLinear
from .selection import (
    Patterns,
    SelectedLayers,
    base_tensors,
    is_under,
    matching_linears,
    replace_modules,
    saved_modules,
    saved_state,
)
from .wrappers import modules_of, own_state, unwrap, unwrapped_modules

#: Where a converted model keeps its config, and what its frozen tensors were at conversion.
CONFIG_ATTRIBUTE = "masm_config"
BASE_ATTRIBUTE = "masm_base"

#: A frozen tensor of the base: {"sha256", "dtype", "shape"}.
BaseEntry = dict[str, Any]


@dataclass(frozen=True)
class ConvertedLayer:
    name: str
    shape: tuple[int, int]  # (N, D)
    ranks: tuple[int, ...]
    trainable_share: float  # trainable parameters of the layer over those of the nn.Linear it replaced
    energy: float  # share of ||W||_F^2 that the artifact part holds


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` did. ``print(report)`` shows a table, one line per layer, and below it every trainable
    parameter outside these layers (those under ``modules_to_save``).
    """

    layers: tuple[ConvertedLayer, ...]
    trainable_parameters: int
    total_parameters: int  # of the model before conversion
    other_trainable: tuple[tuple[str, tuple[int, ...]], ...] = ()  # name and shape outside the converted layers

    def __str__(self) -> str:
        width = max(len("layer"), *(len(r.name) for r in self.layers))
        lines = [f"{'layer':<{width}}  {'shape':>13}  {'ranks':<14}  {'trainable':>9}  {'energy':>8}"]
        for r in self.layers:
            shape = f"{r.shape[0]} x {r.shape[1]}"
            ranks = "+".join(map(str, r.ranks))
            lines.append(f"{r.name:<{width}}  {shape:>13}  {ranks:<14}  {r.trainable_share:>9.2%}  {r.energy:>8.1e}")
        lines.append(
            f"{len(self.layers)} layers converted; {self.trainable_parameters:,} of {self.total_parameters:,} "
            f"parameters trainable ({self.trainable_parameters / max(1, self.total_parameters):.2%})"
        )
        if self.other_trainable:
            lines.append("trainable outside the converted layers:")
            lines += [f"  {name}  {' x '.join(map(str, shape)) or 'scalar'}" for name, shape in self.other_trainable]
        return "\n".join(lines)


def convert(
    model: nn.Module,
    config: MASMConfig,
    *,
    target_modules: Patterns | None = None,
    cache_dir: str | os.PathLike | None = None,
    use_cache: bool = True,
    progress: bool = True,
) -> ConversionReport:
    """Replace the matching ``nn.Linear`` layers of a model by :class:`MASMLinear`, in place, and freeze the rest.

    Afterwards exactly these parameters are trainable: u, s, v of the converted layers (their biases with
    ``config.train_bias``) and everything under ``config.modules_to_save``, which is never converted. The output of the
    model does not change.

    Names are those of the unwrapped model (see :mod:`masm_ext.wrappers`). The model remembers the SHA-256 of every
    frozen tensor, so that :func:`masm_ext.save_adapter` notices one that changed.

    Args:
        model: a model that holds its pretrained weights.
        config: see :class:`MASMConfig`; ``config.target_modules`` names the layers.
        target_modules: instead of the config's: patterns, a callable ``(name, module) -> bool``, or what
            :func:`masm_ext.select_layers` returned, which ``mask_policy="static"`` needs.
        cache_dir, use_cache: where SVDs are kept between runs (default: ``~/.cache/masm_ext/svd``), keyed by the hash
            of the weight.
        progress: show a progress bar.

    Raises ValueError if nothing matches, if the model is converted already, if a rank does not fit a layer, a weight
    has NaN or infinite elements, or the policy is static and no layers were selected; ValueError or TypeError for
    layers that cannot be replaced without changing the output (:func:`masm_ext.selection.check_convertible` lists
    them). The model is changed only after every layer has been decomposed.
    """
    converted = modules_of(model, MASMLinear)
    if converted:
        raise ValueError(
            f"the model is converted already ({next(iter(converted))} is a MASMLinear); "
            "convert a fresh copy of the pretrained model, or merge(model, keep=False) first"
        )
    if config.mask_policy == "static":
        if not isinstance(target_modules, SelectedLayers):
            arrived = "nothing" if target_modules is None else f"a {type(target_modules).__name__}"
            raise ValueError(
                f'mask_policy "static" decomposes only the layers that select_layers chose: pass target_modules='
                f"select_layers(model, config, batches, loss_fn), got {arrived}. For names that were kept there is "
                'masm_ext.selection.SelectedLayers(names); mask_policy "none" converts all that target_modules matches'
            )
        config = with_targets(config, target_modules)
    linears = matching_linears(
        model,
        config.target_modules if target_modules is None else target_modules,
        config.exclude_modules,
        config.modules_to_save,
    )
    modules = dict(unwrapped_modules(model))
    saved = saved_modules(modules, config.modules_to_save)
    weights = {name: layer.weight.detach() for name, layer in linears.items()}
    for name, weight in weights.items():
        if config.energy is None:
            choose_ranks(torch.empty(min(weight.shape)), config.ranks, None, name)  # before any SVD is paid for
    frozen = base_tensors(modules, linears, saved, config.train_bias)
    everything = tensor_hashes(frozen | {f"{name}.weight": weight for name, weight in weights.items()})
    hashes = {name: everything[f"{name}.weight"] for name in weights}
    cache = SpectrumCache(cache_dir) if use_cache else None
    directions = max(min(w.shape) for w in weights.values()) if config.energy is not None else sum(config.ranks)
    with tqdm(total=len(linears), desc="SVD", unit="layer", disable=not progress, leave=False) as bar:
        spectra = spectra_of(weights, hashes, directions, cache, lambda _: bar.update())

    def build(name: str, linear: nn.Linear) -> MASMLinear:
        ranks = choose_ranks(spectra[name].sigma, config.ranks, config.energy, name)
        dtype = accumulate_dtype(linear.weight.dtype)
        parts = split(weights[name], spectra[name], ranks, config.partition, dtype)
        return MASMLinear(parts, linear.bias, base_hash=hashes[name], train_bias=config.train_bias)

    base = base_entries(frozen, everything)
    return replace_layers(model, config, linears, {n: build(n, linear) for n, linear in linears.items()}, saved, base)


def base_entries(tensors: Mapping[str, Tensor], hashes: Mapping[str, str]) -> dict[str, BaseEntry]:
    """The identity of frozen tensors, as adapter.json holds it."""
    return {
        name: {"sha256": hashes[name], "dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
        for name, t in tensors.items()
    }


def replace_layers(
    model: nn.Module,
    config: MASMConfig,
    linears: Mapping[str, nn.Linear],
    built: Mapping[str, MASMLinear],
    saved: Collection[str],
    base: dict[str, BaseEntry],
    values: Mapping[str, Tensor] | None = None,
) -> ConversionReport:
    """Freeze all but the modules ``saved``, put the built layers in and write ``values`` into the state of ``saved``.

    Used by convert and load_adapter. If a step raises, all of them are undone.
    """
    total = sum(p.numel() for p in model.parameters())
    modules, root = dict(unwrapped_modules(model)), unwrap(model)
    state = saved_state(modules, saved)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    attributes = {key: root.__dict__[key] for key in (CONFIG_ATTRIBUTE, BASE_ATTRIBUTE) if key in root.__dict__}
    before = {key: state[key].detach().clone() for key in values or {}}
    layers = {linears[name]: layer.train(linears[name].training) for name, layer in built.items()}
    try:
        model.requires_grad_(False)
        for name in saved:
            modules[name].requires_grad_(True)
        with torch.no_grad():
            for key, value in (values or {}).items():
                state[key].copy_(value)
        replace_modules(model, layers)
        setattr(root, CONFIG_ATTRIBUTE, config)
        setattr(root, BASE_ATTRIBUTE, base)
    except BaseException:
        replace_modules(model, {layer: linear for linear, layer in layers.items()})
        with torch.no_grad():
            for key, value in before.items():
                state[key].copy_(value)
        for p, flag in flags:
            p.requires_grad_(flag)
        for key in (CONFIG_ATTRIBUTE, BASE_ATTRIBUTE):
            root.__dict__.pop(key, None)
        root.__dict__.update(attributes)
        raise
    if any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        warnings.warn(
            "the model is inside DistributedDataParallel, which synchronises the gradients of the parameters that it "
            "found when it was made: to train, wrap the converted model again",
            stacklevel=3,
        )
    rows = []
    for name, linear in linears.items():
        layer = built[name]
        trainable = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        replaced = sum(p.numel() for p in linear.parameters())
        shape = (layer.out_features, layer.in_features)
        rows.append(ConvertedLayer(name, shape, layer.ranks, trainable / replaced, layer.energy))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    others: dict[nn.Parameter, str] = {}
    for name, p in trainable_parameters(model).items():
        if not is_under(name, linears):
            others.setdefault(p, name)  # a parameter with several names is listed once
    return ConversionReport(tuple(rows), trainable, total, tuple((name, tuple(p.shape)) for p, name in others.items()))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by their full names in the unwrapped model."""
    state = (pair for name, module in unwrapped_modules(model) for pair in own_state(name, module))
    return {name: p for name, p in state if isinstance(p, nn.Parameter) and p.requires_grad}


def record_base(model: nn.Module) -> None:
    """Take the frozen tensors of a converted model as those of its base from now on.

    For a model whose base weights were loaded after :func:`convert` (a checkpoint of another base, by
    ``load_state_dict``): :func:`masm_ext.save_adapter` refuses frozen tensors that are not those of the conversion.
    """
    root, modules = unwrap(model), dict(unwrapped_modules(model))
    config = root.__dict__.get(CONFIG_ATTRIBUTE)
    if config is None:
        raise ValueError("record_base: pass the module that was given to convert()")
    saved = saved_modules(modules, config.modules_to_save)
    frozen = base_tensors(modules, modules_of(model, MASMLinear), saved, config.train_bias)
    setattr(root, BASE_ATTRIBUTE, base_entries(frozen, tensor_hashes(frozen)))


class MergedLinear(nn.Linear):
    """An ``nn.Linear`` with a folded weight that keeps the MASMLinear it came from, so that :func:`unmerge` is exact.

    The parked layer is no submodule: it is in no state_dict and follows ``.to`` only at unmerge.
    """

    def __init__(self, layer: MASMLinear) -> None:
        nn.Module.__init__(self)
        linear = layer.to_linear()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(layer.training)
        object.__setattr__(self, "parked", layer)

    def restored(self) -> MASMLinear:
        layer: MASMLinear = self.parked  # type: ignore[assignment]
        if self.weight.dtype != layer.weight.dtype:
            layer = layer.to(self.weight.dtype)
        return layer.to(self.weight.device).train(self.training)


def merge(model: nn.Module, *, keep: bool = True) -> int:
    """Fold every artifact part into its weight, in place: MASMLinears become ``nn.Linear`` layers for deployment.

    The merged output equals the converted one to the rounding of the weight's dtype (1e-5 relative in float32). In
    bfloat16 and float16 folding can bury small updates in the rounding of W: measure before you ship (METHOD, Numerics
    in docs/method.md). With ``keep`` the layers are parked for :func:`unmerge`, at the price of their memory; with
    ``keep=False`` they become plain ``nn.Linear`` objects and the fold is final.

    Returns the number of layers merged. Raises ValueError if there is none.
    """
    layers = modules_of(model, MASMLinear)
    if not layers:
        raise ValueError("merge: the model has no MASMLinear" + (" (it is merged already)" if _merged(model) else ""))
    replace_modules(model, {m: MergedLinear(m) if keep else m.to_linear() for m in layers.values()})
    return len(layers)


def unmerge(model: nn.Module) -> int:
    """Undo :func:`merge`: the parked MASMLinears come back, bit for bit.

    Returns the number of layers. Raises ValueError if nothing was merged with ``keep=True``.
    """
    merged = _merged(model)
    if not merged:
        raise ValueError("unmerge: no merged layer to restore; merged with keep=False, or loaded from a state_dict?")
    replace_modules(model, {m: m.restored() for m in merged.values()})
    return len(merged)


def _merged(model: nn.Module) -> dict[str, MergedLinear]:
    return modules_of(model, MergedLinear)


def with_targets(config: MASMConfig, names: Sequence[str]) -> MASMConfig:
    """The config with exact target names.

    ``mask_policy="static"`` takes the result of :func:`masm_ext.select_layers` as ``convert(target_modules=...)``
    instead: a config does not show where its names come from.
    """
    return dataclasses.replace(config, target_modules=tuple("re:" + re.escape(n) for n in names), exclude_modules=())
