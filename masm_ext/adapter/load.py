"""Loads a saved adapter into a pretrained model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..base_model import BaseEntry, base_entries, base_tensors
from ..config import MASMConfig
from ..contract import dtype_name
from ..conversion_report import ConversionReport
from ..convert import replace_layers
from ..hashing import tensor_hashes
from ..nn.masm_linear import MASMLinear
from ..selection import check_convertible, saved_modules, saved_state
from ..wrappers import modules_of, unwrapped_modules
from .files import AdapterError, read_record, read_tensors, some
from .plan import plan_layers


def load_adapter(model: nn.Module, folder: str | os.PathLike) -> ConversionReport:
    """Load a saved adapter into a pretrained model that is not converted yet, in place. No SVD is computed.

    The model is changed only after all checks have passed. An adapter of format version 1 is checked against the
    weights of the converted layers only; a warning reports it.

    Args:
        model: the pretrained model, possibly wrapped (``torch.compile``, DataParallel). Layers are found by their names
            in the unwrapped model.
        folder: a folder written by :func:`save_adapter`.

    Returns:
        The report of the conversion.

    Raises:
        AdapterError: the model is already converted; the files are damaged or have a newer format; a layer is missing
            or cannot be converted (as in :func:`masm_ext.convert`); a frozen parameter or buffer differs from the
            adapter's base in hash, dtype or shape; or tensors are missing or unexpected.
        FileNotFoundError: ``folder`` holds no adapter.
    """
    folder = Path(folder)
    record = read_record(folder)
    tensors = read_tensors(folder / record["tensors"]["file"], record)
    if modules_of(model, MASMLinear):
        raise AdapterError("load_adapter expects the pretrained model before conversion; this one is converted already")
    modules = dict(unwrapped_modules(model))
    linears: dict[str, nn.Linear] = {}
    for name in record["layers"]:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = type(linear).__name__ if linear is not None else "nothing"
            raise AdapterError(
                f"the adapter converts {name!r}, where this model has {found}: it is another architecture"
            )
        linears[name] = linear
    config = MASMConfig.from_dict(record["config"])
    try:
        check_convertible(model, linears)
        saved = _saved_names(record, modules, config)
        frozen = base_tensors(modules, linears, saved, config.train_bias)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"the adapter does not fit this model: {error}") from error
    state = saved_state(modules, saved)
    plans = plan_layers(record, tensors, linears, state)
    base = check_base(record, linears, frozen)
    built = {name: plan.build(linears[name], config) for name, plan in plans.items()}
    values = {name: tensors[f"saved.{name}"] for name in state}
    return replace_layers(model, config, linears, built, saved, base, values)


def _saved_names(record: dict[str, Any], modules: Mapping[str, nn.Module], config: MASMConfig) -> list[str]:
    if record["format_version"] == 1:
        return saved_modules(modules, config.modules_to_save, exact_first=False)
    missing = [name for name in record["saved_modules"] if name not in modules]
    if missing:
        raise ValueError(f"it holds the modules {some(missing)}, which this model lacks")
    return record["saved_modules"]


def check_base(
    record: dict[str, Any], linears: Mapping[str, nn.Linear], frozen: Mapping[str, Tensor]
) -> dict[str, BaseEntry]:
    """Compare a plain model with the base of an adapter; returns the entries of its frozen tensors.

    Raises AdapterError if a tensor is missing, or differs in hash, dtype or shape.
    """
    weights = {f"{name}.weight": linear.weight for name, linear in linears.items()}
    bound = {f"{n}.weight": {**e, "sha256": e["base_sha256"]} for n, e in record["layers"].items()}
    if record["base"] is None:
        warnings.warn(
            "this adapter has format version 1, which is bound to the weights of the converted layers only: whether "
            "the other weights are those of its base is not checked; save it again to bind it to all of them",
            stacklevel=3,
        )
    else:
        missing, more = sorted(set(record["base"]) - set(frozen)), sorted(set(frozen) - set(record["base"]))
        if missing or more:
            raise AdapterError(
                f"base model does not fit the adapter: it lacks {len(missing)} tensors of the adapter's base "
                f"({some(missing)}) and has {len(more)} that the base had not ({some(more)}): another architecture"
            )
        bound |= record["base"]
    present = weights | dict(frozen)
    for name, entry in bound.items():
        found = present[name]
        if dtype_name(found.dtype) != entry["dtype"]:
            raise AdapterError(
                f"base model does not fit the adapter: {name} is {dtype_name(found.dtype)}, the adapter's base was "
                f"{entry['dtype']}; load the base in it"
            )
        if list(found.shape) != (entry["shape"] or list(found.shape)):
            raise AdapterError(
                f"base model does not fit the adapter: {name} has shape {list(found.shape)}, in the adapter's base "
                f"{entry['shape']}"
            )
    hashes = tensor_hashes(present)
    other = [name for name, entry in bound.items() if hashes[name] != entry["sha256"]]
    if other:
        raise AdapterError(
            f"base model does not fit the adapter: {len(other)} of its tensors differ from those the adapter was "
            f"trained on ({some(other)}); use the same pretrained checkpoint"
        )
    return base_entries(frozen, hashes)
