"""The layers that an adapter builds on a base, checked before anything is built: for loading, and on saving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MASMConfig
from ..contract import accumulate_dtype, dtype_name
from ..decomposition import Decomposition, order_of, principal
from ..nn.masm_linear import ANY_STEP, MASMLinear
from ..selection import is_under
from .files import AdapterError

FACTORS = ("u", "s", "v", "u0", "s0", "v0")


@dataclass(frozen=True)
class LayerPlan:
    """The parts of one MASMLinear beside the weight and the bias of the base."""

    factors: dict[str, Tensor]
    offsets: tuple[int, ...]
    energy: float
    directions: tuple[int, ...]
    base_hash: str
    bias: Tensor | None
    mask: Tensor | None

    def build(self, linear: nn.Linear, config: MASMConfig) -> MASMLinear:
        device = linear.weight.device
        dtype = accumulate_dtype(linear.weight.dtype)
        u0, s0, v0 = (self.factors[f].to(device, dtype) for f in ("u0", "s0", "v0"))
        factors = u0, s0, v0, self.offsets, self.energy, self.directions, config.lift
        parts = Decomposition(principal(linear.weight.detach(), u0, s0, v0), *factors)
        layer = MASMLinear(parts, linear.bias, base_hash=self.base_hash, train_bias=config.train_bias)
        with torch.no_grad():
            for factor in ("u", "s", "v"):
                getattr(layer, factor).copy_(self.factors[factor])
            if self.bias is not None:
                layer.bias.copy_(self.bias)
            if self.mask is not None:
                layer.mask.copy_(self.mask)
        layer.restored_steps = ANY_STEP
        return layer


def plan_layers(
    record: dict[str, Any],
    tensors: Mapping[str, Tensor],
    linears: Mapping[str, nn.Linear],
    state: Mapping[str, Tensor],
) -> dict[str, LayerPlan]:
    """Check an adapter against the names, shapes and dtypes of layers and saved state. Raises AdapterError."""
    config = MASMConfig.from_dict(record["config"])
    inside = [name for name in linears if record["saved_modules"] and is_under(name, record["saved_modules"])]
    if inside:
        raise AdapterError(f"{inside[0]!r} is converted and lies under modules_to_save; it can only be one of these")
    expected: dict[str, list[int]] = {f"saved.{name}": list(value.shape) for name, value in state.items()}
    for name, linear in linears.items():
        entry, (N, D), R = record["layers"][name], linear.weight.shape, record["layers"][name]["offsets"][-1]
        if min(N, D) < R:
            raise AdapterError(f"{name}: the adapter has {R} directions, the layer only {min(N, D)}")
        if entry["bias"] not in (None, linear.bias is not None):
            had, has = ("a bias", "none") if entry["bias"] else ("no bias", "one")
            raise AdapterError(f"{name}: the adapter's base had {had}, this model has {has}: another architecture")
        for suffix in ("", "0"):
            shapes = {f"u{suffix}": [R, N], f"s{suffix}": [R], f"v{suffix}": [R, D]}
            expected |= {f"layers.{name}.{factor}": shape for factor, shape in shapes.items()}
        if config.train_bias and linear.bias is not None:
            expected[f"layers.{name}.bias"] = [N]
    directions = {
        name: _directions(name, record["layers"][name], min(linear.weight.shape), config)
        for name, linear in linears.items()
    }
    _check_keys(set(expected), set(tensors))
    for name, shape in expected.items():
        value = tensors[name]
        if list(value.shape) != shape:
            raise AdapterError(f"{name}: expected shape {shape}, the adapter holds {list(value.shape)}")
        floating = state[name[6:]].is_floating_point() if name.startswith("saved.") else True
        if value.is_floating_point() != floating:
            kind = "a floating-point" if floating else "an integer"
            raise AdapterError(f"{name}: expected {kind} tensor, the adapter holds {dtype_name(value.dtype)}")
    masks = record["masks"] or [None] * len(record["layers"])
    rows = dict(zip(record["layers"], masks))
    return {
        name: LayerPlan(
            {factor: tensors[f"layers.{name}.{factor}"] for factor in FACTORS},
            tuple(record["layers"][name]["offsets"]),
            record["layers"][name]["energy"],
            directions[name],
            record["layers"][name]["base_sha256"],
            tensors.get(f"layers.{name}.bias"),
            None if rows[name] is None else torch.tensor(rows[name]) != 0,
        )
        for name in linears
    }


def _directions(name: str, entry: dict[str, Any], q: int, config: MASMConfig) -> tuple[int, ...]:
    """The singular directions that a layer of an adapter was cut along, checked against its config."""
    recorded = entry.get("directions")
    if recorded is None:  # by a version without a choice
        if config.directions != "trailing":
            raise AdapterError(f"{name}: its config has directions={config.directions!r}, but the layer records none")
        return ()
    order = order_of(config.directions, q, entry["base_sha256"])
    if sorted(recorded) != sorted(order[: entry["offsets"][-1]]):
        raise AdapterError(
            f"{name}: its config has directions={config.directions!r}, but the layer was cut along others "
            f"({recorded[:4]} ...)"
        )
    return tuple(recorded)


def _check_keys(expected: set[str], got: set[str]) -> None:
    missing, left_over = sorted(expected - got), sorted(got - expected)
    if missing or left_over:
        raise AdapterError(
            f"the adapter's tensors do not fit: "
            f"{len(missing)} missing {missing[:3]}, {len(left_over)} unexpected {left_over[:3]}"
        )
