from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import chain, pairwise
from operator import is_
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
        self._last_plan: _Plan | None = None

    @property
    def skipped_steps(self) -> int:
        """Steps that were not taken because a gradient was not finite."""
        return self._skipped

    def _check_beta1(self) -> None:
        if self.masks is not None and len({g["betas"][0] for g in self.param_groups}) > 1:
            raise ValueError("MaskedAdamW: with masks, all groups need one beta1 (the statistics are shared)")

    def __getstate__(self) -> dict[str, Any]:
        own = ("masks", "_blocks", "_steps", "_skipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, "_last_plan": None}

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
        grads: list[Tensor] = []
        for p in self._blocks.parameters(self.param_groups):
            grad = p.grad
            if grad is not None:
                params.append(p)
                grads.append(grad if grad.is_contiguous() else _dense(grad))
        if not params:
            return loss
        plan = self._plan(params)
        device = plan.device
        self._steps = self._steps.to(device)
        hyper = [(float(g["lr"]), *g["betas"], g["eps"], g["weight_decay"]) for g in self.param_groups]
        stats, found = masked_adamw_(
            params,
            grads,
            [state["exp_avg"] for state in plan.states],
            [state["exp_avg_sq"] for state in plan.states],
            self._steps,
            self._blocks.mask().to(device),
            plan.segments,
            torch.tensor(hyper, dtype=torch.float64, device=device).index_select(0, plan.groups),
            _scalar(getattr(self, "grad_scale", None), device),
            _scalar(getattr(self, "found_inf", None), device),
        )
        if found.item():
            self._skipped += 1
        elif self.masks is not None:
            L, K = self.masks.masks.shape
            table = stats[: L * K].cpu().view(L, K, 2)
            updated = plan.with_segments[: L * K].view(L, K) & (self.masks.masks != 0)
            self.masks.observe(table[..., 0], table[..., 1], updated, hyper[0][1])
        return loss

    def _plan(self, params: list[Tensor]) -> _Plan:
        """The last plan, if it still fits: a model has hundreds of small parameters, and Python time is step time."""
        plan = self._last_plan
        if plan is None or not plan.fits(params, self.state, self.param_groups):
            for p in params:
                self._init_state(p)
            plan = self._last_plan = _Plan(params, self.state, self.param_groups, self._blocks)
        return plan

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
        self._last_plan = None
        self._steps = steps.clone()
        self._skipped = int(state_dict["masked"]["skipped"])


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.detach().to(device, torch.float32).reshape(1)


def _dense(grad: Tensor) -> Tensor:
    if grad.is_sparse:
        raise RuntimeError("MaskedAdamW does not support sparse gradients")
    return grad.contiguous()


class _Blocks:
    """The table of blocks: first the L * K (layer, subspace) pairs of the masks, then one for every other parameter."""

    def __init__(self, masks: LayerMasks | None) -> None:
        self.masks = masks
        self._rows: dict[Tensor, list[tuple[int, int, int]]] = {}  # parameter -> (begin, end, block), in elements
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

    @staticmethod
    def parameters(groups: list[dict[str, Any]]) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in groups)

    def segments(self, params: list[Tensor]) -> Tensor:
        """int64 [S, 4]: (tensor, begin, end, block)."""
        rows = [(t, *row) for t, p in enumerate(params) for row in self._rows[p]]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)


class _Plan:
    """What a step over the parameters that have gradients needs and the last step over them worked out: their states,
    groups and segments."""

    def __init__(
        self, params: list[Tensor], state: dict[Tensor, Any], groups: list[dict[str, Any]], blocks: _Blocks
    ) -> None:
        self.device = params[0].device
        self.params = params
        self.state = state
        self.states = [state[p] for p in params]
        self.all_states = list(state.values())
        self.grouped = [list(g["params"]) for g in groups]
        group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
        self.groups = torch.tensor([group_of[p] for p in params], device=self.device)  # [T]
        segments = blocks.segments(params)
        self.segments = segments.to(self.device)  # [S, 4]
        #: bool [B]: blocks that own a part of one of the parameters
        self.with_segments = torch.zeros(blocks.count, dtype=torch.bool)
        self.with_segments[segments[:, 3]] = True

    def fits(self, params: list[Tensor], state: dict[Tensor, Any], groups: list[dict[str, Any]]) -> bool:
        # by identity: a look-up by parameter would hash tensors, in Python code
        return (
            _same(params, self.params)
            and state is self.state
            and _same(state.values(), self.all_states)
            and params[0].device == self.device
            and len(groups) == len(self.grouped)
            and all(_same(g["params"], own) for g, own in zip(groups, self.grouped))
        )


def _same(a: Collection[Any], b: Collection[Any]) -> bool:
    """The same objects in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))
