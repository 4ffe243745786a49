"""Replaces ``nn.Linear`` layers by MASMLinear layers."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .base_model import BASE_ATTRIBUTE, CONFIG_ATTRIBUTE, BaseEntry, base_entries, base_tensors
from .calibration import WeightGradients
from .config import MASMConfig
from .contract import accumulate_dtype
from .conversion_report import ConversionReport, report_of
from .decomposition import Decomposition, choose_ranks, order_of, split, split_along_gradient
from .hashing import tensor_hashes
from .nn.masm_linear import MASMLinear
from .progress import Progress
from .selection import (
    Patterns,
    SelectedLayers,
    matching_linears,
    replace_modules,
    saved_modules,
    saved_state,
)
from .spectra import SpectrumCache, check_finite, spectra_of
from .wrappers import modules_of, unwrap, unwrapped_modules


def convert(
    model: nn.Module,
    config: MASMConfig,
    *,
    target_modules: Patterns | None = None,
    gradients: WeightGradients | None = None,
    cache_dir: str | os.PathLike | None = None,
    use_cache: bool = True,
    progress: bool = True,
) -> ConversionReport:
    """Replace the matching ``nn.Linear`` layers of a model by :class:`MASMLinear`, in place, and freeze the rest.

    Afterwards exactly these parameters are trainable: u, s, v of the converted layers (and their biases with
    ``config.train_bias``), and everything under ``config.modules_to_save``, which is never converted. Up to rounding,
    the output of the model does not change.

    Layers are named as in the unwrapped model (see :mod:`masm_ext.wrappers`). The model keeps the SHA-256 of every
    frozen tensor; :func:`masm_ext.save_adapter` uses them to detect a changed tensor.

    Args:
        model: a model that holds its pretrained weights.
        config: the configuration; ``config.target_modules`` selects the layers.
        target_modules: replaces ``config.target_modules``: patterns, a callable ``(name, module) -> bool``, or the
            result of :func:`masm_ext.select_layers` (required if ``config.mask_policy`` is "static").
        gradients: the result of :func:`masm_ext.weight_gradients`, needed if ``config.directions`` is "gradient", and
            only then.
        cache_dir: folder where SVDs are cached between runs, by default ``~/.cache/masm_ext/svd``. The key is the hash
            of the weight and ``config.directions``.
        use_cache: read and write that folder.
        progress: show a progress bar.

    Returns:
        A report: one row per converted layer, and every other trainable parameter.

    Raises:
        ValueError: no layer matches; the model is already converted; a rank does not fit a layer; a weight has NaN or
            infinite elements; the policy is "static" and ``target_modules`` is not the result of ``select_layers``;
            ``gradients`` are missing, not needed, or not those of the layers; or replacing a layer would change the
            output (:func:`masm_ext.selection.check_convertible`). If conversion fails, the model is unchanged.
        TypeError: a layer has a type or dtype that cannot be replaced.
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
                f'mask_policy "static" converts only layers that select_layers chose: pass target_modules='
                f"select_layers(model, config, batches, loss_fn), got {arrived}. To convert layers by name, pass "
                'masm_ext.selection.SelectedLayers(names), or set mask_policy "none"'
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
            choose_ranks(torch.empty(min(weight.shape)), config.ranks, None, name)  # before any SVD
    frozen = base_tensors(modules, linears, saved, config.train_bias)
    everything = tensor_hashes(frozen | {f"{name}.weight": weight for name, weight in weights.items()})
    hashes = {name: everything[f"{name}.weight"] for name in weights}
    if config.needs_gradients:
        parts = _along_gradients(weights, config, gradients, progress)
    elif gradients is None:
        parts = split_along_spectra(weights, hashes, config, SpectrumCache(cache_dir) if use_cache else None, progress)
    else:
        raise ValueError(f"gradients are used with directions='gradient' only, and config has {config.directions!r}")
    built = {
        name: MASMLinear(parts[name], linear.bias, base_hash=hashes[name], train_bias=config.train_bias)
        for name, linear in linears.items()
    }
    base = base_entries(frozen, everything)
    return replace_layers(model, config, linears, built, saved, base)


def split_along_spectra(
    weights: Mapping[str, Tensor],
    hashes: Mapping[str, str],
    config: MASMConfig,
    cache: SpectrumCache | None,
    progress: bool,
) -> dict[str, Decomposition]:
    """Each weight, split along singular directions of its own."""
    count = max(min(w.shape) for w in weights.values()) if config.energy is not None else sum(config.ranks)
    with Progress(total=len(weights), desc="SVD", unit="layer", disable=not progress, leave=False) as bar:
        order = partial(order_of, config.directions)
        spectra = spectra_of(weights, hashes, count, cache, order, config.directions, lambda _: bar.update())
    parts = {}
    for name, weight in weights.items():
        ranks = choose_ranks(spectra[name].sigma, config.ranks, config.energy, name, spectra[name].order)
        dtype = accumulate_dtype(weight.dtype)
        parts[name] = split(weight, spectra[name], ranks, config.partition, dtype, config.lift)
    return parts


def _along_gradients(
    weights: Mapping[str, Tensor], config: MASMConfig, gradients: WeightGradients | None, progress: bool
) -> dict[str, Decomposition]:
    """Each weight, split along directions of its gradient."""
    lacking = sorted(set(weights) - set(gradients or ()))
    if lacking:
        arrived = "none" if gradients is None else f"those of {len(gradients)} layers, without {lacking[0]!r}"
        raise ValueError(
            "directions='gradient' needs gradients=weight_gradients(model, config, batches, loss_fn) of the same model "
            f"and layers, got {arrived}"
        )
    parts = {}
    with Progress(total=len(weights), desc="SVD", unit="layer", disable=not progress, leave=False) as bar:
        for name, weight in weights.items():
            check_finite(weight, name)
            dtype, ranks = accumulate_dtype(weight.dtype), config.ranks
            try:
                parts[name] = split_along_gradient(weight, gradients[name], ranks, config.partition, dtype, config.lift)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            bar.update()
    return parts


def replace_layers(
    model: nn.Module,
    config: MASMConfig,
    linears: Mapping[str, nn.Linear],
    built: Mapping[str, MASMLinear],
    saved: Collection[str],
    base: dict[str, BaseEntry],
    values: Mapping[str, Tensor] | None = None,
) -> ConversionReport:
    """Freeze all modules except ``saved``, insert the built layers, and copy ``values`` into the state of ``saved``.

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
    return report_of(model, linears, built, total)


def with_targets(config: MASMConfig, names: Sequence[str]) -> MASMConfig:
    """The config with exact target names.

    ``mask_policy="static"`` takes the result of :func:`masm_ext.select_layers` as ``convert(target_modules=...)``
    instead, because names in a config do not show how they were selected.
    """
    return dataclasses.replace(config, target_modules=tuple("re:" + re.escape(n) for n in names), exclude_modules=())
