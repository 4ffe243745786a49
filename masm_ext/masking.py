"""Selective layer masks: the learning state of every (layer, subspace) and the policies that choose who may update.

After arXiv 2601.01041 in words (v1: masks from the learning state of each artifact subspace; v3: forgery-sensitive
layers by gradient bias-variance before the SVD); the formulas are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .config import MASMConfig
from .nn.masm_linear import masm_layers
from .selection import matching_linears

#: A policy of one's own: (snr [L, K], step, current mask [L, K]) -> mask [L, K] with values in [0, 1].
Policy = Callable[[Tensor, int, Tensor], Tensor]


def snr_of(bias2: Tensor, variance: Tensor) -> Tensor:
    """``bias2 / (bias2 + var)``, in [0, 1]: 1 where every batch pulls the same way, near 0 where it is noise."""
    return bias2 / (bias2 + variance).clamp_min(torch.finfo(bias2.dtype).tiny)


class LayerMasks:
    """Masks ``[L, K]`` of the L converted layers and K subspaces of a model, and the statistics they follow.

    Per block, with g the gradient of (u_k, s_k, v_k): ``bias2 = ||EMA(g)||^2``, ``var = EMA(||g||^2) - bias2``, both
    EMAs with the optimizer's beta1 and bias-corrected (the same weights in both, so that var >= 0),
    ``snr = bias2 / (bias2 + var)``. Policies: see :class:`masm_ext.MASMConfig`, or pass a callable.

    A new object starts with everything active, also over a model whose layers were loaded with masks.

    A mask of 0 leaves parameters, moments and decay of a block bit for bit as they are, and the backward pass does not
    compute its gradients. Because its statistics stand still meanwhile, a masked block is probed: every
    ``mask_probe_interval`` steps it is unmasked (and updated) for ``mask_probe_steps`` steps.

    :class:`masm_ext.MaskedAdamW` reads :attr:`masks` and calls :meth:`observe` in its step; nothing else is needed.

    Args:
        model: a converted model.
        config: the mask fields are read.
        policy: a callable instead of ``config.mask_policy``.

    Attributes:
        masks: float32 [L, K] on the CPU, in force for the next step.
        history: one dict per selection: step, mask, snr, bias2, var (nested lists, [L][K]).
        layer_names: the L module names.
    """

    def __init__(self, model: nn.Module, config: MASMConfig, policy: Policy | None = None) -> None:
        self.layers = masm_layers(model)
        if not self.layers:
            raise ValueError("LayerMasks: the model has no MASMLinear; call convert(model, config) first")
        counts = {layer.num_subspaces for layer in self.layers.values()}
        if len(counts) > 1:
            raise ValueError(f"LayerMasks: layers have different numbers of subspaces: {sorted(counts)}")
        self.config = config
        self.policy = policy
        self.layer_names = tuple(self.layers)
        L, K = len(self.layers), counts.pop()
        self.masks = torch.ones(L, K)
        self.history: list[dict[str, Any]] = []
        self.step = 0
        self._selected = torch.ones(L, K)  # what the policy wants; masks = selected, or probed
        self._updates = torch.zeros(L, K, dtype=torch.int64)
        self._bias2 = torch.zeros(L, K, dtype=torch.float64)
        self._grad2 = torch.zeros(L, K, dtype=torch.float64)  # EMA of ||g||^2, not yet bias-corrected
        self._second = torch.zeros(L, K, dtype=torch.float64)  # the same, bias-corrected
        self._idle = torch.zeros(L, K, dtype=torch.int64)  # steps a block has been masked without a break
        self._probing = torch.zeros(L, K, dtype=torch.int64)  # probe steps left
        self._published: tuple[Tensor, list[Tensor], list[int]] | None = None  # what the layers were given
        self._publish()

    @property
    def snr(self) -> Tensor:
        """float64 [L, K]."""
        return snr_of(self._bias2, self.variance)

    @property
    def bias2(self) -> Tensor:
        """float64 [L, K]."""
        return self._bias2.clone()

    @property
    def variance(self) -> Tensor:
        """float64 [L, K]."""
        return (self._second - self._bias2).clamp_min(0)

    def observe(self, ema_norm2: Tensor, grad_norm2: Tensor, updated: Tensor, beta1: float) -> None:
        """Take in one optimizer step and choose the masks of the next.

        ema_norm2, grad_norm2: float64 [L, K], ``||exp_avg||^2`` and ``||g||^2``; updated: bool [L, K], blocks whose
        gradient was applied; beta1: of the optimizer.
        """
        self.step += 1
        self._updates += updated
        correction = (1 - beta1 ** self._updates.double()).clamp_min(torch.finfo(torch.float64).tiny)
        self._grad2 = torch.where(updated, beta1 * self._grad2 + (1 - beta1) * grad_norm2, self._grad2)
        self._bias2 = torch.where(updated, ema_norm2 / correction.square(), self._bias2)
        self._second = torch.where(updated, self._grad2 / correction, self._second)
        after_warmup = self.step - self.config.mask_warmup
        if after_warmup >= 0 and after_warmup % self.config.mask_interval == 0:
            self._select()
        self._probe()
        self._publish()

    def _select(self) -> None:
        if self.policy is not None:
            chosen = torch.as_tensor(self.policy(self.snr, self.step, self._selected.clone()), dtype=torch.float32)
            if chosen.shape != self.masks.shape or not ((chosen >= 0) & (chosen <= 1)).all():
                raise ValueError(
                    f"the mask policy must return values in [0, 1] of shape [L, K] = {list(self.masks.shape)}, "
                    f"got shape {list(chosen.shape)}, values {chosen.min():.3g} to {chosen.max():.3g}"
                )
        elif self.config.mask_policy == "bias_variance":
            chosen = bias_variance(self.snr, self._selected, self.config)
        else:
            return
        self._selected = chosen
        self.history.append(
            {
                "step": self.step,
                "mask": chosen.tolist(),
                "snr": self.snr.tolist(),
                "bias2": self._bias2.tolist(),
                "var": self.variance.tolist(),
            }
        )

    def _probe(self) -> None:
        masked = self._selected == 0
        self._probing = torch.where(masked, (self._probing - 1).clamp_min(0), 0)
        resting = masked & (self._probing == 0)
        due = resting & (self._idle >= self.config.mask_probe_interval) & (self.config.mask_probe_interval > 0)
        self._probing[due] = self.config.mask_probe_steps
        self._idle = torch.where(resting & ~due, self._idle + 1, 0)

    def _publish(self) -> None:
        self.masks = torch.where(self._probing > 0, torch.ones_like(self._selected), self._selected)
        live = self.masks != 0
        # Copying dozens of small masks would cost a good part of an optimizer step: only where something changed, here
        # or in a layer. (A write past autograd's version counter, as through `.data`, is not seen.)
        held = [layer.mask for layer in self.layers.values()]
        if self._published is not None:
            table, tensors, versions = self._published
            same = all(a is b and a._version == n for a, b, n in zip(held, tensors, versions))
            if same and torch.equal(live, table):
                return
        for layer, row in zip(self.layers.values(), live):
            layer.mask.copy_(row)
        self._published = (live, held, [mask._version for mask in held])

    _STATE = ("_selected", "_updates", "_bias2", "_grad2", "_second", "_idle", "_probing")

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: everything that a resumed run needs to go on bit for bit."""
        state: dict[str, Any] = {name[1:]: getattr(self, name).clone() for name in self._STATE}
        return {**state, "step": self.step, "layer_names": list(self.layer_names), "history": list(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state belongs to other layers."""
        if list(state["layer_names"]) != list(self.layer_names):
            raise ValueError(
                f"LayerMasks: the state belongs to {len(state['layer_names'])} layers "
                f"({state['layer_names'][:2]} ...), this model has {len(self.layer_names)} ({self.layer_names[:2]} ...)"
            )
        for name in self._STATE:
            value, own = state[name[1:]], getattr(self, name)
            if value.shape != own.shape:
                raise ValueError(f"LayerMasks: {name[1:]} must have shape {list(own.shape)}, got {list(value.shape)}")
            setattr(self, name, value.to(own.dtype).clone())
        self.step = int(state["step"])
        self.history = list(state["history"])
        self._publish()


def bias_variance(snr: Tensor, current: Tensor, config: MASMConfig) -> Tensor:
    """The dynamic policy: per subspace, the layers of largest snr. snr, current [L, K] -> mask float32 [L, K]."""
    L = snr.shape[0]
    # A block that is active already is judged with an advantage, so that two near-equal layers do not take turns.
    score = torch.where(current > 0, snr * (1 + config.mask_hysteresis), snr)
    least = min(L, max(1, config.mask_min_active))
    if config.mask_threshold is None:
        keep = min(L, max(least, math.ceil(config.mask_active_fraction * L)))
        chosen = torch.zeros_like(score)
        return chosen.scatter_(0, score.topk(keep, dim=0).indices, 1.0).float()
    chosen = (score > config.mask_threshold).double()
    return chosen.scatter_(0, score.topk(least, dim=0).indices, 1.0).float()


def select_layers(
    model: nn.Module,
    config: MASMConfig,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
) -> list[str]:
    """The static policy: which layers to decompose, ranked by the bias-variance of the gradient of their raw weights.

    One calibration pass over at most ``config.mask_calibration_batches`` batches of a model that is not yet converted.
    Per layer, with G_b the gradient of the weight on batch b: ``bias2 = ||mean_b G_b||^2``, ``var = mean_b ||G_b||^2 -
    bias2``, ``snr = bias2 / (bias2 + var)``. The layers of largest snr are returned, ``mask_active_fraction`` of those
    that ``target_modules`` matches (or those above ``mask_threshold``), in module order: put them into
    ``target_modules`` and call :func:`masm_ext.convert`. The pass runs in eval mode; the model's mode,
    ``requires_grad`` flags and gradients are left as they were.

    loss_fn(model, batch) -> scalar loss. Raises ValueError if there are fewer than two batches.
    """
    linears = matching_linears(model, config.target_modules, config.exclude_modules, config.modules_to_save)
    modes = {m: m.training for m in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    weights = [layer.weight for layer in linears.values()]
    mean = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    second = torch.zeros(len(weights), dtype=torch.float64)
    count = 0
    try:
        model.eval()  # batch statistics and dropout are neither moved nor measured
        for p in flags:
            p.requires_grad_(False)
        for w in weights:
            w.requires_grad_(True)
        for count, batch in enumerate(batches, start=1):
            grads = torch.autograd.grad(loss_fn(model, batch), weights, allow_unused=True, materialize_grads=True)
            for i, g in enumerate(grads):
                mean[i] += (g.float() - mean[i]) / count
                second[i] += (float(g.double().square().sum()) - second[i]) / count
            if count == config.mask_calibration_batches:
                break
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
    if count < 2:
        raise ValueError(f"select_layers needs at least two batches to tell bias from variance, got {count}")
    bias2 = torch.tensor([float(m.double().square().sum()) for m in mean], dtype=torch.float64)
    snr = snr_of(bias2, (second - bias2).clamp_min(0))[:, None]
    chosen = bias_variance(snr, torch.zeros_like(snr), config)[:, 0]
    return [name for name, keep in zip(linears, chosen) if keep]
