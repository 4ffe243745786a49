"""The optimizer: AdamW over blocks, with masks and decoupled penalties."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..config import MASMConfig
from ..contract import accumulate_dtype
from ..losses import penalty_gradients, term_gradients
from ..masks import LayerMasks
from ..ops import masked_adamw_
from ..registry import PENALTIES
from ..sharded import check_not_divided
from .blocks import Blocks, layers_of
from .hyper_table import HyperTable
from .step_plan import StepPlan

#: What a parameter group may hold: the optimizer's own settings, and what torch and its schedulers keep there.
SETTINGS = ("lr", "betas", "eps", "weight_decay", "orthogonality", "spectral_consistency")
KNOWN = {"params", "param_names", "name", *SETTINGS}
SCHEDULED = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) over blocks. The mask of a block (layer, subspace) switches or scales its update.

    One call of ``masm::masked_adamw_`` updates all parameters and, in the same pass over memory, computes the gradient
    statistics of the masks. Without masks and penalties it equals ``torch.optim.AdamW`` to a few units in the last
    place. A masked block keeps its parameters, moments and step count bit for bit; its bias correction continues where
    it stopped.

    The penalties of the artifact subspaces (:func:`masm_ext.orthogonality_loss`,
    :func:`masm_ext.spectral_consistency_loss`) are decoupled, as weight decay is: ``p -= lr * mask * coefficient *
    gradient``. The gradient is that of the layer's own penalty, not of the mean over layers, so a coefficient means the
    same in a model of any depth. Moments and statistics use the gradients in ``.grad`` alone.

    Args:
        params: parameters or groups, e.g. from :func:`masm_ext.param_groups`. A group with an unknown key (``amsgrad``)
            raises ValueError.
        lr: learning rate. In a group it may be a 0-dimensional tensor; if that is on the device of the parameters, a
            CUDA graph replays with its current value.
        betas: decays of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in ``torch.optim.AdamW``.
        orthogonality: coefficient of the decoupled orthogonality penalty, for every MASMLinear that has a parameter
            here. Like ``weight_decay`` it can be set per group. 0: off. ``MASMConfig.orthogonality`` is not read.
        spectral_consistency: likewise, of the spectral consistency penalty.
        terms: coefficients of further penalties by their names in :data:`masm_ext.registry.PENALTIES`, decoupled in the
            same way. Autograd computes their gradients layer by layer, with many small launches per step.
        masks: the :class:`masm_ext.LayerMasks` of the model, read before and updated after every step. None: the
            current masks of the layers are kept. A parameter outside every MASMLinear is never masked.

    Moments are float32 for half-precision parameters. Parameters must be contiguous and on one device.

    ``state_dict()`` holds moments, step counts, masks and their statistics. Restored together with the model's
    state_dict, it continues a run bit for bit. If only one of the two was restored, the next step raises RuntimeError.

    If a gradient of an unmasked block is not finite, the whole step is skipped: nothing is written, and
    ``skipped_steps`` is increased by one. ``torch.amp.GradScaler`` is supported; the op divides by the scale.

    On CUDA, from the second step on, a step does not synchronize, except once in about 254 selections, when the history
    of the masks is read. The step can be captured in a CUDA graph after at least one warm-up step. Capture it again
    after ``load_state_dict``, after ``add_param_group``, and after a step outside the graph in which other parameters
    had gradients. On an invalid mask or segment a CUDA step writes nothing; the next read of ``skipped_steps`` or
    ``state_dict()`` raises RuntimeError.

    Attributes:
        masks: the LayerMasks, made by the optimizer if none was given; None if no parameter belongs to a MASMLinear.
        penalties: (orthogonality, spectral consistency) summed over the layers, as of before the last step; None if
            the penalties are off.

    Raises:
        ValueError: an invalid or unknown setting, or a layer that has a parameter here but is not in ``masks``.
    """

    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf instead of unscaling

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
        terms: Mapping[str, float] | None = None,
    ) -> None:
        values = (lr, betas, eps, weight_decay, orthogonality, spectral_consistency)
        super().__init__(params, dict(zip(SETTINGS, values, strict=True)))
        every = list(chain.from_iterable(group["params"] for group in self.param_groups))
        check_not_divided(every, "MaskedAdamW")
        layers = layers_of(every, {id(layer) for layer in masks.layers.values()} if masks is not None else set())
        if masks is None and layers:  # the masks of the layers stay as they are
            masks = LayerMasks(layers, MASMConfig(num_subspaces=layers[0].num_subspaces, mask_policy="none"))
        self.masks = masks
        self._check_covered(every)
        self._claim = object()
        if masks is not None:
            masks.claim(self._claim)
        self.penalties: tuple[Tensor, Tensor] | None = None
        self._blocks = Blocks(masks)
        for p in every:
            self._blocks.add(p)
        self._steps = torch.zeros(self._blocks.count, dtype=torch.int64)
        self._outcomes = torch.zeros(2, dtype=torch.int64)  # steps with found == 1 and found == 2
        self.terms = {name: float(coefficient) for name, coefficient in (terms or {}).items() if coefficient}
        for name, coefficient in self.terms.items():
            PENALTIES[name]  # raises for an unknown name
            if not coefficient > 0:
                raise ValueError(f"MaskedAdamW: invalid terms[{name!r}]: {coefficient!r}")
        self._hyper = HyperTable()
        self._last_plan: StepPlan | None = None

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped because a gradient was not finite. Synchronizes with the device.

        Raises RuntimeError if a CUDA step found an invalid mask or segment.
        """
        skipped, refused = self._outcomes.tolist()
        if refused:
            self._outcomes[1] = 0  # raised once, so that a state can be saved afterwards
            raise RuntimeError(
                f"MaskedAdamW: {refused} steps were refused on {self._outcomes.device} and wrote nothing: a mask "
                "outside [0, 1], or a segment outside its tensor or the blocks"
            )
        return skipped

    def __getstate__(self) -> dict[str, Any]:
        own = {
            name: getattr(self, name)
            for name in ("masks", "_claim", "penalties", "_blocks", "_steps", "_outcomes", "terms")
        }
        return {**super().__getstate__(), **own, "_hyper": HyperTable(), "_last_plan": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state from before a setting existed
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as :meth:`torch.optim.Optimizer.add_param_group`.

        Args:
            param_group: a dict with "params" and any settings of this optimizer.

        Raises:
            ValueError: an unknown setting.
        """
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
        left_out = [layer for layer in layers_of(params, own) if id(layer) not in own]
        if left_out:
            raise ValueError(
                f"MaskedAdamW: {len(left_out)} layers that own parameters are not in masks=, for example "
                f"{left_out[0]}; build LayerMasks over the whole model"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take one step.

        Args:
            closure: a function that computes the gradients and returns the loss; None: the gradients are already set.

        Returns:
            The closure's loss, if there is one.
        """
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
            self.masks.check_domain()
        plan = self._plan(params)
        device = plan.device
        if self._steps.device != device:
            self._steps, self._outcomes = self._steps.to(device), self._outcomes.to(device)
        penalties, not_finite = self._penalty_gradients(plan)
        found_inf = _scalar(getattr(self, "found_inf", None), device)
        if not_finite is not None:
            found_inf = not_finite if found_inf is None else torch.maximum(found_inf, not_finite)
        grad_scale = _scalar(getattr(self, "grad_scale", None), device)
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
            grad_scale,
            found_inf,
        )
        self._outcomes += found == plan.codes
        if self.masks is not None:
            self.masks.observe(stats, found, plan.owned, grad_scale)
        return loss

    def _penalty_gradients(self, plan: StepPlan) -> tuple[list[Tensor], Tensor | None]:
        """Per parameter of the plan the weighted gradient of the penalties (empty if it has none), or an empty list.

        Also 1 if the penalties or the gradients of ``terms`` are not finite, else 0, float32 [1]; None without any."""
        self.penalties = None
        weights = [(g["orthogonality"], g["spectral_consistency"]) for g in self.param_groups]
        is_fused = any(map(any, weights))
        if not plan.layers or not (is_fused or self.terms):
            return [], None
        finite = []
        if is_fused:
            values, gradients = penalty_gradients(plan.layers)
            self.penalties = values.unbind()
            finite.append(torch.isfinite(values).all())
        if self.terms:
            value, further = term_gradients(plan.layers, self.terms)
            finite += [torch.isfinite(value), *(torch.isfinite(flat).all() for flat in further)]
        pieces: dict[tuple, tuple[Tensor, ...]] = {}  # by the weights of a group and the dtype of the factors
        penalties = []
        for p, group, place in zip(plan.params, plan.group_of, plan.places):
            own = weights[group]
            if place is None or not (any(own) or self.terms):
                penalties.append(plan.nothing)
                continue
            dtype, index = place
            if (own, dtype) not in pieces:
                weighted = further[dtype] if self.terms else None
                if any(own):
                    orthogonality, spectral = gradients[dtype].unbind()
                    fused = torch.add(orthogonality * own[0], spectral, alpha=own[1])
                    weighted = fused if weighted is None else fused + weighted
                pieces[own, dtype] = weighted.split(plan.lengths[dtype])
            penalties.append(pieces[own, dtype][index].view(p.shape))
        all_finite = finite[0] if len(finite) == 1 else torch.stack(finite).all()
        return penalties, torch.logical_not(all_finite).to(torch.float32).reshape(1)

    def _plan(self, params: list[Tensor]) -> StepPlan:
        """The last plan if it still fits: hundreds of small parameters make Python time step time."""
        plan = self._last_plan
        if plan is None or not plan.fits(params, self.state, self.param_groups):
            check_not_divided(params, "MaskedAdamW.step")  # accelerate replaces parameters after the constructor
            for p in params:
                self._init_state(p)
            plan = self._last_plan = StepPlan(params, self.state, self.param_groups, self._blocks)
        return plan

    def _init_state(self, p: Tensor) -> None:
        if not self.state[p]:
            if not p.is_contiguous():
                raise ValueError(f"MaskedAdamW: a parameter of shape {list(p.shape)} is not contiguous")
            kind = {"dtype": accumulate_dtype(p.dtype), "memory_format": torch.contiguous_format}
            self.state[p] = {"exp_avg": torch.zeros_like(p, **kind), "exp_avg_sq": torch.zeros_like(p, **kind)}

    def state_dict(self) -> dict[str, Any]:
        """The state_dict of torch, with a further entry "masked": the step count of every block, the number of skipped
        steps, and the state of the masks (:meth:`masm_ext.LayerMasks.state_dict`)."""
        masked = {"steps": self._steps.clone(), "skipped": self.skipped_steps}
        masked["masks"] = None if self.masks is None else self.masks.state_dict()
        return {**super().state_dict(), "masked": masked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state.

        Args:
            state_dict: as :meth:`state_dict` returns it.

        Raises:
            ValueError: the state belongs to another model, config or set of parameter groups.
        """
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


def _dense(grad: Tensor) -> Tensor:
    if grad.is_sparse:
        raise RuntimeError("MaskedAdamW does not support sparse gradients")
    return grad.contiguous()
