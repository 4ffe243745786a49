from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from itertools import chain, pairwise
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from ..config import MASMConfig
from ..contract import accumulate_dtype
from ..cuda_graphs import is_captured
from ..losses import penalty_gradients, penalty_parameters
from ..masks import LayerMasks
from ..nn.masm_linear import LAYERS, MASMLinear
from ..ops import masked_adamw_

#: Elements of a segment at most, on a GPU: one piece is what a thread block updates at a time. Small enough that the
#: pieces of a ViT-L/14's factors are several times as many as thread blocks on a large GPU, which evens out the ends.
PIECE = 2048

#: What a parameter group may hold: the optimizer's own settings, and what torch and its schedulers keep there.
SETTINGS = ("lr", "betas", "eps", "weight_decay", "orthogonality", "spectral_consistency")
KNOWN = {"params", "param_names", "name", *SETTINGS}
SCHEDULED = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) over blocks: each (layer, subspace) is updated, scaled or left alone by its mask.

    One call of ``masm::masked_adamw_`` updates everything and sums the learning-state statistics in the same pass over
    memory. Without masks and penalties it is ``torch.optim.AdamW`` to a few units in the last place. A masked block
    keeps its parameters, moments and step count bit for bit (so its bias correction goes on where it stopped).

    The penalties of the artifact subspaces (:func:`masm_ext.orthogonality_loss`,
    :func:`masm_ext.spectral_consistency_loss`) are decoupled, as weight decay is: ``p -= lr * mask * coefficient *
    gradient`` with the gradient of the layer's own penalty (not of the mean over layers, so that a coefficient means
    the same in a model of any depth). Moments and learning-state statistics see the gradient of the task alone.

    Args:
        params: parameters or groups, e.g. from :func:`masm_ext.param_groups`. A key of a group that is not a setting of
            this optimizer (``amsgrad``) is a ValueError.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``. The ``lr`` of a group may be a 0-dimensional tensor:
            on the device of the parameters it is read there, and a CUDA graph replays with the value of the moment.
        orthogonality, spectral_consistency: coefficients of the decoupled penalties, of every MASMLinear that owns a
            parameter; settings of a group, as ``weight_decay`` is. 0 turns a penalty off.
        masks: the :class:`masm_ext.LayerMasks` of the model; read before, and fed after, every step. Without it the
            masks of the layers hold as they are. Parameters that belong to no MASMLinear are blocks that are never
            masked.

    Moments are float32 for half-precision parameters. Parameters must be contiguous and on one device.

    ``state_dict()`` holds everything: moments, step counts, masks and their statistics. Restoring it together with the
    model's state_dict continues a run bit for bit; a step after only one of the two was restored is refused.

    Non-finite gradients: if any gradient of an unmasked block is not finite, the whole step is skipped, nothing is
    written, and ``skipped_steps`` counts it. Works with ``torch.amp.GradScaler`` (the scale is divided out inside the
    op).

    On CUDA a step waits for nothing from the second on (but once in about 254 selections, when the history of the masks
    is read), and can be captured in a CUDA graph after one or more as a warm-up. Capture again after
    ``load_state_dict``, ``add_param_group``, or a step outside the graph for which other parameters had gradients. What
    the host would have refused at once, such as a mask outside [0, 1], is raised as a RuntimeError when
    ``skipped_steps`` or ``state_dict()`` is next read; those steps wrote nothing.

    Attributes:
        masks: the LayerMasks, also where none was given; None if no parameter belongs to a MASMLinear.
        penalties: (orthogonality, spectral consistency) before the last step, summed over the layers, or None.
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
        orthogonality: float = 0.0,
        spectral_consistency: float = 0.0,
    ) -> None:
        values = (lr, betas, eps, weight_decay, orthogonality, spectral_consistency)
        super().__init__(params, dict(zip(SETTINGS, values, strict=True)))
        every = list(chain.from_iterable(group["params"] for group in self.param_groups))
        layers = _layers_of(every, {id(layer) for layer in masks.layers.values()} if masks is not None else set())
        if masks is None and layers:  # the masks of the layers, as they are
            masks = LayerMasks(layers, MASMConfig(num_subspaces=layers[0].num_subspaces, mask_policy="none"))
        self.masks = masks
        self._check_covered(every)
        self._claim = object()
        if masks is not None:
            masks.claim(self._claim)
        self.penalties: tuple[Tensor, Tensor] | None = None
        self._blocks = _Blocks(masks)
        for p in every:
            self._blocks.add(p)
        self._steps = torch.zeros(self._blocks.count, dtype=torch.int64)
        self._outcomes = torch.zeros(2, dtype=torch.int64)  # steps for which the op found something: 1, 2
        self._hyper = _Hyper()
        self._last_plan: _Plan | None = None

    @property
    def skipped_steps(self) -> int:
        """Steps that were not taken because a gradient was not finite. Waits for the device.

        Raises RuntimeError if the device refused a step.
        """
        skipped, refused = self._outcomes.tolist()
        if refused:
            self._outcomes[1] = 0  # raised once: a state can be saved then
            raise RuntimeError(
                f"MaskedAdamW: {refused} steps were refused on {self._outcomes.device} and wrote nothing: a mask "
                "outside [0, 1], or a segment outside its tensor or the blocks"
            )
        return skipped

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("masks", "_claim", "penalties", "_blocks", "_steps", "_outcomes")}
        return {**super().__getstate__(), **own, "_hyper": _Hyper(), "_last_plan": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a state that was written before a setting existed
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        unknown = sorted(set(param_group) - KNOWN - SCHEDULED)
        if unknown:
            raise ValueError(
                f"MaskedAdamW: a parameter group holds {unknown}, which this optimizer does not know; it knows "
                + ", ".join(SETTINGS)
            )
        for name in SETTINGS:
            value = param_group.get(name, self.defaults[name])
            if not _is_valid(name, value):
                raise ValueError(f"MaskedAdamW: invalid {name}: {value!r}")
        params = param_group["params"]
        param_group = {**param_group, "params": [params] if isinstance(params, Tensor) else list(params)}
        if hasattr(self, "_blocks"):  # after construction
            self._check_covered([p for p in param_group["params"] if isinstance(p, Tensor)])
        super().add_param_group(param_group)
        if hasattr(self, "_blocks"):
            for p in self.param_groups[-1]["params"]:
                self._blocks.add(p)
            grown = self._blocks.count - self._steps.numel()
            self._steps = torch.cat([self._steps, self._steps.new_zeros(grown)])

    def _check_covered(self, params: list[Tensor]) -> None:
        """Raises ValueError if a layer that owns one of the parameters is not in the masks."""
        own = {id(layer) for layer in self.masks.layers.values()} if self.masks is not None else set()
        left_out = [layer for layer in _layers_of(params, own) if id(layer) not in own]
        if left_out:
            raise ValueError(
                f"MaskedAdamW: {len(left_out)} layers that own parameters are not in masks=, for example "
                f"{left_out[0]}; build LayerMasks over the whole model"
            )

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
        if self.masks is not None:
            self.masks.check_restored()
        plan = self._plan(params)
        device = plan.device
        if self._steps.device != device:
            self._steps, self._outcomes = self._steps.to(device), self._outcomes.to(device)
        penalties, not_finite = self._penalty_gradients(plan)
        found_inf = _scalar(getattr(self, "found_inf", None), device)
        if not_finite is not None:
            found_inf = not_finite if found_inf is None else torch.maximum(found_inf, not_finite)
        stats, found = masked_adamw_(
            params,
            grads,
            [state["exp_avg"] for state in plan.states],
            [state["exp_avg_sq"] for state in plan.states],
            penalties,
            self._steps,
            self._blocks.mask(plan.unmasked, self._claim),
            plan.segments,
            self._hyper.table(self.param_groups, device).index_select(0, plan.groups),
            _scalar(getattr(self, "grad_scale", None), device),
            found_inf,
        )
        self._outcomes += found == plan.codes
        if self.masks is not None:
            self.masks.observe(stats, found, plan.owned)
        return loss

    def _penalty_gradients(self, plan: _Plan) -> tuple[list[Tensor], Tensor | None]:
        """Per parameter of the plan the weighted gradient of the penalties (without elements where there is none), or
        an empty list; and whether the penalties are not finite, float32 [1], or None."""
        self.penalties = None
        weights = [(g["orthogonality"], g["spectral_consistency"]) for g in self.param_groups]
        if not plan.layers or not any(map(any, weights)):
            return [], None
        values, gradients = penalty_gradients(plan.layers)
        self.penalties = values.unbind()
        pieces: dict[tuple, tuple[Tensor, ...]] = {}  # by the weights of a group and the dtype of the factors
        penalties = []
        for p, group, place in zip(plan.params, plan.group_of, plan.places):
            own = weights[group]
            if place is None or not any(own):
                penalties.append(plan.nothing)
                continue
            dtype, index = place
            if (own, dtype) not in pieces:
                orthogonality, spectral = gradients[dtype].unbind()
                weighted = torch.add(orthogonality * own[0], spectral, alpha=own[1])
                pieces[own, dtype] = weighted.split(plan.lengths[dtype])
            penalties.append(pieces[own, dtype][index].view(p.shape))
        return penalties, torch.logical_not(torch.isfinite(values).all()).to(torch.float32).reshape(1)

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
        """torch's layout, plus "masked": the step count of every block, the number of skipped steps, and the state of
        the masks (:meth:`masm_ext.LayerMasks.state_dict`)."""
        masked = {"steps": self._steps.clone(), "skipped": self.skipped_steps}
        masked["masks"] = None if self.masks is None else self.masks.state_dict()
        return {**super().state_dict(), "masked": masked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError if the state was saved over other blocks."""
        if "masked" not in state_dict:
            raise ValueError("MaskedAdamW: this state_dict was not written by MaskedAdamW (no 'masked' entry)")
        steps, masks = state_dict["masked"]["steps"], state_dict["masked"].get("masks")
        if steps.shape != self._steps.shape:
            raise ValueError(
                f"MaskedAdamW: the state has {steps.numel()} blocks, this optimizer {self._steps.numel()}; "
                "same model, config and parameter groups?"
            )
        if (masks is None) != (self.masks is None):
            raise ValueError(
                "MaskedAdamW: the state "
                + ("holds no masks, this optimizer has some" if masks is None else "holds masks, this optimizer none")
                + "; was it written by another masm_ext, or over another model?"
            )
        if self.masks is not None:
            self.masks.check_state(masks)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "masked"})
        if self.masks is not None:
            self.masks.load_state_dict(masks)
        # torch casts float state to the parameter's dtype; the moments of half-precision parameters stay float32
        index = [i for g in state_dict["param_groups"] for i in g["params"]]
        own = [p for g in self.param_groups for p in g["params"]]
        for i, p in zip(index, own):
            for name, value in state_dict["state"].get(i, {}).items():
                kind = accumulate_dtype(p.dtype)
                self.state[p][name] = value.detach().to(p.device, kind).contiguous().clone()
        self._last_plan = None
        self._steps = steps.clone()
        self._outcomes = torch.tensor([int(state_dict["masked"]["skipped"]), 0], device=steps.device)


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.detach().to(device, torch.float32).reshape(1)


def _is_valid(name: str, value: Any) -> bool:
    try:
        if name == "betas":
            return len(value) == 2 and all(0 <= beta < 1 for beta in value)
        return bool(value >= 0)
    except TypeError:
        return False


def _layers_of(params: list[Tensor], preferred: set[int]) -> list[MASMLinear]:
    """The MASMLinears that own parameters, in the order of these. Where a shallow copy owns them, too: the one whose id
    is ``preferred``, or a ValueError."""
    owners: dict[int, list[MASMLinear]] = {}
    for layer in list(LAYERS):
        for p in (layer.u, layer.s, layer.v):
            owners.setdefault(id(p), []).append(layer)
    found: dict[int, MASMLinear] = {}
    for p in params:
        own = owners.get(id(p), [])
        own = [layer for layer in own if id(layer) in preferred] or own
        if len(own) > 1:
            raise ValueError(
                f"MaskedAdamW: a parameter of shape {list(p.shape)} belongs to {len(own)} layers, of which one is a "
                "shallow copy, and their masks may differ; pass masks=LayerMasks(model, config)"
            )
        for layer in own:
            found[id(layer)] = layer
    return list(found.values())


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
                width = math.prod(p.shape[1:])
                self._rows[p] = [
                    (a * width, b * width, row * K + k) for k, (a, b) in enumerate(pairwise(layer.offsets))
                ]
        self.count = masks.masks.numel()

    def add(self, p: Tensor) -> None:
        if p not in self._rows:
            self._rows[p] = [(0, p.numel(), self.count)]
            self.count += 1

    def mask(self, unmasked: Tensor, claim: object) -> Tensor:
        """float32 [B] on the device of ``unmasked``, ones for the blocks that the masks do not know."""
        if self.masks is None:
            return unmasked
        return torch.cat([self.masks.in_force(claim).view(-1), unmasked])

    @staticmethod
    def parameters(groups: list[dict[str, Any]]) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in groups)

    def segments(self, params: list[Tensor], piece: int | None) -> Tensor:
        """int64 [S, 4]: (tensor, begin, end, block). With ``piece``, as a GPU wants them: in even pieces of at most so
        many elements, and sorted by block."""
        rows = [(t, *row) for t, p in enumerate(params) for row in self._rows[p]]
        if piece is not None:
            rows = [(t, a, b, block) for t, *bounds, block in rows for a, b in _pieces(*bounds, piece)]
            rows.sort(key=itemgetter(3))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)


def _pieces(begin: int, end: int, most: int) -> list[tuple[int, int]]:
    """[begin, end) in pieces of one size but for the last; a multiple of 8, so that 16-byte accesses stay aligned."""
    count = max(1, -(-(end - begin) // most))
    size = max(8, -(-(end - begin) // count // 8) * 8)
    return [(a, min(end, a + size)) for a in range(begin, end, size)] or [(begin, end)]


class _Hyper:
    """lr, beta1, beta2, eps and weight decay of every group, float64 [G, 5] on the device, uploaded where a value
    changed."""

    def __init__(self) -> None:
        self._values: list[tuple[float, ...]] = []
        self._table = self._host = torch.empty(0, 5, dtype=torch.float64)

    def table(self, groups: list[dict[str, Any]], device: torch.device) -> Tensor:
        own = [(i, g["lr"]) for i, g in enumerate(groups) if isinstance(g["lr"], Tensor) and not g["lr"].is_cpu]
        there = {i for i, _ in own}  # a rate that lies on the device is copied there
        values = [
            (-1.0 if i in there else float(g["lr"]), *g["betas"], g["eps"], g["weight_decay"])
            for i, g in enumerate(groups)
        ]
        if values != self._values or self._table.device != device:
            if is_captured(device):
                raise RuntimeError(
                    "MaskedAdamW: a rate, beta, eps or weight decay changed since the last step, and replays would put "
                    "the value of now back; take one step before the capture, or make lr a tensor on the device"
                )
            # The copy from pinned memory does not wait. The attribute keeps that memory until the next one.
            host = torch.tensor(values, dtype=torch.float64)
            self._host = host.pin_memory() if device.type == "cuda" else host
            if self._table.shape != self._host.shape or self._table.device != device:
                self._table = torch.empty_like(self._host, device=device)
            self._table.copy_(self._host, non_blocking=True)
            self._values = values
        for i, lr in own:
            self._table.select(0, i).narrow(0, 0, 1).copy_(lr)
        return self._table


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
        self.group_of = [group_of[p] for p in params]
        self.groups = torch.tensor(self.group_of, device=self.device)  # [T]
        self.nothing = torch.empty(0, device=self.device)  # the penalty of a parameter that has none
        ids = {id(p) for p in params}
        layers = [] if blocks.masks is None else blocks.masks.layers.values()
        #: those that own one of the parameters: the penalties are theirs
        self.layers = [x for x in layers if not ids.isdisjoint((id(x.u), id(x.s), id(x.v)))]
        lists = penalty_parameters(self.layers)
        self.lengths = [[p.numel() for p in own] for own in lists]
        places = {id(p): (dtype, i) for dtype, own in enumerate(lists) for i, p in enumerate(own)}
        #: where the gradient of each parameter's penalties lies: (dtype of the factors, piece), or None
        self.places = [places.get(id(p)) for p in params]
        segments = blocks.segments(params, PIECE if self.device.type == "cuda" else None)
        self.segments = segments.to(self.device)  # [S, 4]
        self.codes = torch.tensor([1.0, 2.0], device=self.device)  # what `found` may say
        shape = (0, 0) if blocks.masks is None else tuple(blocks.masks.masks.shape)
        self.unmasked = torch.ones(blocks.count - math.prod(shape), device=self.device)
        owned = torch.zeros(blocks.count, dtype=torch.bool)
        owned[segments[:, 3]] = True
        #: bool [L, K]: blocks that own a part of one of the parameters
        self.owned = owned[: math.prod(shape)].view(shape).to(self.device)

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
