from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..masking import LayerMasks
from ..ops import masked_adamw_
from ..reference.precision import accumulate_dtype


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) over blocks: each (layer, subspace) is updated, scaled or left alone by its mask.

    One call of ``masm::masked_adamw_`` updates everything and sums the learning-state statistics in the same pass over
    memory. Without masks it is ``torch.optim.AdamW`` to a few units in the last place. A masked block keeps its
    parameters, moments and step count bit for bit (so its bias correction goes on where it stopped).

    Args:
        params: parameters or groups, e.g. from :func:`masm_ext.param_groups`.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        masks: the :class:`masm_ext.LayerMasks` of the model; read before, and fed after, every step. Parameters that
            belong to no MASMLinear are blocks that are never masked.

    Moments are float32 for half-precision parameters. Parameters must be contiguous and on one device.

    Non-finite gradients: if any gradient of an unmasked block is not finite, the whole step is skipped, nothing is
    written, and ``skipped_steps`` counts it. Works with ``torch.amp.GradScaler`` (the scale is divided out inside the
    op).
    """

    _step_supports_amp_scaling = True  # GradScaler then hands over grad_scale and found_inf instead of unscaling

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        masks: LayerMasks | None = None,
    ) -> None:
        for name, value, ok in (
            ("lr", lr, lr >= 0),
            ("betas", betas, all(0 <= b < 1 for b in betas)),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not ok:
                raise ValueError(f"MaskedAdamW: invalid {name}: {value!r}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.masks = masks
        self._skipped = 0
        self._blocks = _Blocks(masks)
        for group in self.param_groups:
            for p in group["params"]:
                self._blocks.add(p)
        self._check_beta1()
        self._steps = torch.zeros(self._blocks.count, dtype=torch.int64)

    @property
    def skipped_steps(self) -> int:
        """Steps that were not taken because a gradient was not finite."""
        return self._skipped

    def _check_beta1(self) -> None:
        if self.masks is not None and len({g["betas"][0] for g in self.param_groups}) > 1:
            raise ValueError("MaskedAdamW: with masks, all groups need one beta1 (the statistics are shared)")

    def __getstate__(self) -> dict[str, Any]:
        own = ("masks", "_blocks", "_steps", "_skipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if hasattr(self, "_blocks"):  # after construction
            for p in param_group["params"]:
                self._blocks.add(p)
            grown = self._blocks.count - self._steps.numel()
            self._steps = torch.cat([self._steps, self._steps.new_zeros(grown)])
            self._check_beta1()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take one step; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params: list[Tensor] = []
        hyper: list[tuple[float, ...]] = []
        for group in self.param_groups:
            row = (float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError("MaskedAdamW does not support sparse gradients")
                self._init_state(p)
                params.append(p)
                hyper.append(row)
        if not params:
            return loss
        device = params[0].device
        self._steps = self._steps.to(device)
        mask = self._blocks.mask().to(device)
        stats, found = masked_adamw_(
            params,
            [p.grad.contiguous() for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            self._steps,
            mask,
            self._blocks.segments(params).to(device),
            torch.tensor(hyper, dtype=torch.float64, device=device),
            _scalar(getattr(self, "grad_scale", None), device),
            _scalar(getattr(self, "found_inf", None), device),
        )
        if found.item():
            self._skipped += 1
        elif self.masks is not None:
            L, K = self.masks.masks.shape
            table = stats[: L * K].cpu().view(L, K, 2)
            with_gradient = self._blocks.with_segments(params)[: L * K].view(L, K)
            self.masks.observe(table[..., 0], table[..., 1], with_gradient & (self.masks.masks != 0), hyper[0][1])
        return loss

    def _init_state(self, p: Tensor) -> None:
        if not self.state[p]:
            if not p.is_contiguous():
                raise ValueError(f"MaskedAdamW: a parameter of shape {list(p.shape)} is not contiguous")
            kind = {"dtype": accumulate_dtype(p.dtype), "memory_format": torch.contiguous_format}
            self.state[p] = {"exp_avg": torch.zeros_like(p, **kind), "exp_avg_sq": torch.zeros_like(p, **kind)}

    def state_dict(self) -> dict[str, Any]:
        """torch's layout, plus "masked": the step count of every block and the number of skipped steps. The masks have
        a state of their own (:meth:`masm_ext.LayerMasks.state_dict`)."""
        return {**super().state_dict(), "masked": {"steps": self._steps.clone(), "skipped": self._skipped}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError if the state was saved over other blocks."""
        if "masked" not in state_dict:
            raise ValueError("MaskedAdamW: this state_dict was not written by MaskedAdamW (no 'masked' entry)")
        steps = state_dict["masked"]["steps"]
        if steps.shape != self._steps.shape:
            raise ValueError(
                f"MaskedAdamW: the state has {steps.numel()} blocks, this optimizer {self._steps.numel()}; "
                "same model, config and parameter groups?"
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "masked"})
        # torch casts float state to the parameter's dtype; the moments of half-precision parameters stay float32
        index = [i for g in state_dict["param_groups"] for i in g["params"]]
        own = [p for g in self.param_groups for p in g["params"]]
        for i, p in zip(index, own):
            for name, value in state_dict["state"].get(i, {}).items():
                kind = accumulate_dtype(p.dtype)
                self.state[p][name] = value.detach().to(p.device, kind).contiguous().clone()
        self._steps = steps.clone()
        self._skipped = int(state_dict["masked"]["skipped"])


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.detach().to(device, torch.float32).reshape(1)


class _Blocks:
    """The table of blocks: first the L * K (layer, subspace) pairs of the masks, then one for every other parameter."""

    def __init__(self, masks: LayerMasks | None) -> None:
        self.masks = masks
        self._rows: dict[Tensor, list[tuple[int, int, int]]] = {}  # parameter -> (begin, end, block), in elements
        self._segments: tuple[tuple[int, ...], Tensor] = ((), torch.empty(0, 4, dtype=torch.int64))
        self.count = 0
        if masks is None:
            return
        for row, layer in enumerate(masks.layers.values()):
            K = layer.num_subspaces
            for p in (layer.u, layer.s, layer.v):
                width = p[0].numel()
                self._rows[p] = [
                    (a * width, b * width, row * K + k) for k, (a, b) in enumerate(pairwise(layer.offsets))
                ]
        self.count = masks.masks.numel()

    def add(self, p: Tensor) -> None:
        if p not in self._rows:
            self._rows[p] = [(0, p.numel(), self.count)]
            self.count += 1

    def mask(self) -> Tensor:
        """float32 [B]."""
        mask = torch.ones(self.count)
        if self.masks is not None:
            mask[: self.masks.masks.numel()] = self.masks.masks.flatten()
        return mask

    def segments(self, params: list[Tensor]) -> Tensor:
        """int64 [S, 4]: (tensor, begin, end, block)."""
        key = tuple(id(p) for p in params)
        if self._segments[0] != key:
            rows = [(t, *row) for t, p in enumerate(params) for row in self._rows[p]]
            self._segments = (key, torch.tensor(rows, dtype=torch.int64).reshape(-1, 4))
        return self._segments[1]

    def with_segments(self, params: list[Tensor]) -> Tensor:
        """bool [B]: blocks that own a part of one of ``params``, the parameters that have a gradient."""
        owned = torch.zeros(self.count, dtype=torch.bool)
        owned[self.segments(params)[:, 3]] = True
        return owned
