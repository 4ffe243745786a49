"""Turning a model into a converted one: SVD cold, from the cache, and from a saved adapter (which needs no SVD)."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from bench import Call, GateError, Outcome, interleave, statistics
from cases import LOAD_GOAL, MODELS, SUBSPACES, Case, Options
from providers import relative_error
from torch import nn
from training import RANK

from masm_ext import MASMConfig, convert, load_adapter, merge, save_adapter

#: Largest relative error of a layer's output after a conversion, float32.
TOLERANCE = 1e-5


def cases(options: Options) -> list[Case]:
    sets = [("vit-b", "all linears"), ("vit-l", "attention"), ("vit-h", "attention")]
    if options.quick:
        sets = [("vit-s", "all linears")]
    elif options.on_gpu:
        sets = [("vit-l", "attention")]
    out = []
    for model, which in sets:
        size = MODELS[model]
        shapes = size.converted(which)
        values = {"model": model, "which": which, "linears": len(shapes), "R": RANK, "K": SUBSPACES}
        goals = {("seconds", "load_adapter"): LOAD_GOAL} if (model, which) == ("vit-l", "attention") else {}
        estimate = options.seconds + 20 + 0.4 * len(shapes)  # of an SVD on two cores
        out.append(Case("decompose", f"{model}/{which}", "float32", "copy", values, goals, estimate))
    return out


def names(options: Options, case: Case | None = None) -> list[str]:
    return ["copy", "convert, cold", "convert, cached", "load_adapter", "save_adapter", "merge"]


def _base(weights: list[torch.Tensor]) -> nn.Sequential:
    """Fresh linears over the same weights: conversion replaces modules and never writes into a weight."""
    model = nn.Sequential()
    for weight in weights:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        model.append(linear)
    return model


def measure(case: Case, options: Options) -> Outcome:
    """Measure "seconds"; the baseline `copy` writes every weight once, the least that a conversion can do. "cold"
    is one run, all others are sampled.
    """
    outcome, device, values = Outcome(case), torch.device(options.device), case.values
    size, R = MODELS["tiny" if options.dry_run else values["model"]], SUBSPACES if options.dry_run else values["R"]
    shapes = size.converted(values["which"])
    torch.manual_seed(0)
    weights = [torch.randn(N, D, device=device) / D**0.5 for N, D in shapes]
    config = MASMConfig(
        target_modules=[str(i) for i in range(len(weights))], num_subspaces=values["K"], subspace_rank=R // values["K"]
    )
    with tempfile.TemporaryDirectory() as folder, outcome.provider("masm"):
        cache, adapter = Path(folder) / "svd", Path(folder) / "adapter"
        model, begin = _base(weights), time.perf_counter()
        convert(model, config, cache_dir=cache, progress=options.progress)
        cold = time.perf_counter() - begin
        save_adapter(model, adapter, config=config)
        loaded = _base(weights)
        load_adapter(loaded, adapter)
        outcome.errors["masm"] = {"convert": _error(model, weights), "load_adapter": _error(loaded, weights)}
        if not all(value <= TOLERANCE for value in outcome.errors["masm"].values()):
            raise GateError(f"the converted layers are not the pretrained ones: {outcome.errors['masm']}")
        outcome.extra |= {
            "cache_bytes": sum(f.stat().st_size for f in cache.iterdir()),
            "adapter_bytes": sum(f.stat().st_size for f in adapter.iterdir()),
        }
        if options.dry_run:
            return outcome
        fresh: list[nn.Sequential] = [model]

        def renew() -> None:
            fresh[0] = _base(weights)

        def remerge() -> None:
            renew()
            load_adapter(fresh[0], adapter)

        targets = [torch.empty_like(w) for w in weights]
        calls = {
            "copy": Call(lambda: [t.copy_(w) for t, w in zip(targets, weights)]),
            "convert, cached": Call(lambda: convert(fresh[0], config, cache_dir=cache, progress=False), renew),
            "load_adapter": Call(lambda: load_adapter(fresh[0], adapter), renew),
            "save_adapter": Call(lambda: save_adapter(model, Path(folder) / "again", config=config)),
            "merge": Call(lambda: merge(fresh[0], keep=False), remerge),
        }
        progress = case.key if options.progress else ""
        samples = interleave(calls, device, options.seconds, least=3, warm_up=1, progress=progress)
        entries = statistics(samples, case.baseline)
        once = {"median": cold, "p20": cold, "p80": cold, "rounds": 1}
        outcome.add("seconds", {"convert, cold": once, **entries})
    return outcome


def _error(model: nn.Sequential, weights: list[torch.Tensor]) -> float:
    """Largest relative error of the folded weights of a converted model."""
    return max(relative_error(layer.folded_weight(), weight) for layer, weight in zip(model, weights))
