"""Layers by name: replace one, check a rank against their shapes, measure how far their weights moved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from masm_detect.config import ConfigError, MethodConfig
from masm_ext.quantized_weight import dense_weight


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in place of the submodule called `name`."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def check_rank(model: nn.Module, names: list[str], config: MethodConfig) -> None:
    """Raise ConfigError if a linear layer of `names` has no `config.rank` directions to train beside a frozen one."""
    for name in names:
        q = min(model.get_submodule(name).weight.shape)
        if not 1 <= config.rank < q:
            raise ConfigError(f"method.rank is {config.rank}, but {name} has q = {q}: {config.name} needs 1..{q - 1}")


class WeightDrift:
    """||dW||_F / ||W||_F of each layer that keeps its trained part as factors `u` [R, N], `s` [R], `v` [R, D].

    Make it before training: it copies the factors. No dense matrix is built afterwards: with
    A = [u^T diag(s), -u0^T diag(s0)] and B = [v; v0], ||A B||^2 = sum((A^T A) * (B B^T)). In float64, because the two
    parts of the difference are nearly equal.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: dict[str, tuple[nn.Module, tuple[Tensor, Tensor, Tensor], float]] = {}
        for name, module in model.named_modules():
            factors = [getattr(module, part, None) for part in ("u", "s", "v")]
            if not all(isinstance(factor, nn.Parameter) for factor in factors):
                continue
            u, s, v = (factor.detach().double().clone() for factor in factors)
            dense = dense_weight(module.weight.detach(), torch.float64) + (u.T * s) @ v
            self._layers[name] = (module, (u, s, v), float(dense.norm()))

    def __bool__(self) -> bool:
        return bool(self._layers)

    @torch.no_grad()
    def ratios(self) -> dict[str, float]:
        """Layer name -> ||W_now - W_start||_F / ||W_start||_F."""
        out = {}
        for name, (module, (u0, s0, v0), norm) in self._layers.items():
            u, s, v = module.u.double(), module.s.double(), module.v.double()
            left = torch.cat([u * s[:, None], -u0 * s0[:, None]])  # [2R, N]
            right = torch.cat([v, v0])  # [2R, D]
            squared = float(((left @ left.T) * (right @ right.T)).sum())
            out[name] = max(squared, 0.0) ** 0.5 / norm if norm > 0 else 0.0
        return out
