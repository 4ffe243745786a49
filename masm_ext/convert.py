from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from .config import MASMConfig
from .contract import accumulate_dtype
from .decomposition import SpectrumCache, choose_ranks, spectra_of, split, weight_hash
from .nn.masm_linear import MASMLinear, masm_layers
from .selection import Patterns, matches, matching_linears, replace_modules

#: Where a converted model keeps its config.
CONFIG_ATTRIBUTE = "masm_config"


@dataclass(frozen=True)
class ConvertedLayer:
    name: str
    shape: tuple[int, int]  # (N, D)
    ranks: tuple[int, ...]
    trainable_share: float  # trainable parameters of the layer over those of the nn.Linear it replaced
    energy: float  # share of ||W||_F^2 that the artifact part holds


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` did. ``print(report)`` shows a table, one line per layer."""

    layers: tuple[ConvertedLayer, ...]
    trainable_parameters: int
    total_parameters: int  # of the model before conversion

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

    Args:
        model: a model that holds its pretrained weights.
        config: see :class:`MASMConfig`; ``config.target_modules`` names the layers.
        target_modules: instead of the config's: patterns, or a callable ``(name, module) -> bool``.
        cache_dir, use_cache: where SVDs are kept between runs (default: ``~/.cache/masm_ext/svd``), keyed by the hash
            of the weight.
        progress: show a progress bar.

    Raises ValueError if nothing matches, if the model is converted already, if a rank does not fit a layer or a weight
    has NaN or infinite elements; TypeError for layers inside modules that bypass ``forward``. The model is changed only
    after every layer has been decomposed.
    """
    if masm_layers(model):
        raise ValueError(
            f"the model is converted already ({next(iter(masm_layers(model)))} is a MASMLinear); "
            "convert a fresh copy of the pretrained model, or merge(model, keep=False) first"
        )
    linears = matching_linears(
        model,
        config.target_modules if target_modules is None else target_modules,
        config.exclude_modules,
        config.modules_to_save,
    )
    for pattern in config.modules_to_save:
        if not any(matches(name, m, pattern) for name, m in model.named_modules()):
            raise ValueError(f"modules_to_save {pattern!r} matches no module of the model")
    weights = {name: layer.weight.detach() for name, layer in linears.items()}
    for name, weight in weights.items():
        if weight.is_meta:
            raise ValueError(f"{name}: the weight is on the meta device; load the pretrained weights first")
        if config.energy is None:
            choose_ranks(torch.empty(min(weight.shape)), config.ranks, None, name)  # before any SVD is paid for
    hashes = {name: weight_hash(weight) for name, weight in weights.items()}
    cache = SpectrumCache(cache_dir) if use_cache else None
    directions = max(min(w.shape) for w in weights.values()) if config.energy is not None else sum(config.ranks)
    with tqdm(total=len(linears), desc="SVD", unit="layer", disable=not progress, leave=False) as bar:
        spectra = spectra_of(weights, hashes, directions, cache, lambda _: bar.update())

    def build(name: str, linear: nn.Linear) -> MASMLinear:
        ranks = choose_ranks(spectra[name].sigma, config.ranks, config.energy, name)
        dtype = accumulate_dtype(linear.weight.dtype)
        parts = split(weights[name], spectra[name], ranks, config.partition, dtype)
        return MASMLinear(parts, linear.bias, base_hash=hashes[name], train_bias=config.train_bias)

    return replace_layers(model, config, linears, build)


def replace_layers(
    model: nn.Module,
    config: MASMConfig,
    linears: dict[str, nn.Linear],
    build: Callable[[str, nn.Linear], MASMLinear],
) -> ConversionReport:
    """Build a MASMLinear for each Linear, then freeze the model and put them in; used by convert and load_adapter."""
    total = sum(p.numel() for p in model.parameters())
    built = {name: build(name, linear) for name, linear in linears.items()}
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if matches(name, module, config.modules_to_save):
            module.requires_grad_(True)
    replace_modules(model, {linears[name]: layer for name, layer in built.items()})
    setattr(model, CONFIG_ATTRIBUTE, config)
    rows = []
    for name, linear in linears.items():
        layer = built[name].train(linear.training)
        trainable = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        replaced = sum(p.numel() for p in linear.parameters())
        shape = (layer.out_features, layer.in_features)
        rows.append(ConvertedLayer(name, shape, layer.ranks, trainable / replaced, layer.energy))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ConversionReport(tuple(rows), trainable, total)


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
    layers = masm_layers(model)
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
    return {name: m for name, m in model.named_modules() if isinstance(m, MergedLinear)}


def with_targets(config: MASMConfig, names: list[str]) -> MASMConfig:
    """The config with exact target names, e.g. those of :func:`masm_ext.select_layers`."""
    return dataclasses.replace(config, target_modules=tuple("re:" + re.escape(n) for n in names), exclude_modules=())
