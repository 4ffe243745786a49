"""Selective layer masks: the learning state of every (layer, subspace) and the policies that choose who may update.

After arXiv 2601.01041 in words (v1: masks from the learning state of each artifact subspace; v3: forgery-sensitive
layers by gradient bias-variance before the SVD); the formulas are ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .config import MASMConfig
from .nn.masm_linear import masm_layers
from .ops import update_masks_
from .reference import choose_layers, force_masks_, settle_masks_, snr_of, update_statistics_, variance_of
from .selection import SelectedLayers, matching_linears

#: Selections that the device remembers until the host reads them.
HISTORY_ROWS = 256

#: A policy of one's own: (snr [L, K], step, current mask [L, K]) -> mask [L, K] with values in [0, 1].
Policy = Callable[[Tensor, int, Tensor], Tensor]


def is_captured(device: torch.device) -> bool:
    """Is a CUDA graph of the current stream being made? Then nothing may wait, and copies are repeated by replays."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


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

    Everything is kept on the device of the model, and a step waits for nothing there (so it can be captured in a CUDA
    graph); reading what follows waits. With a callable policy every step waits: the host must know whether a selection
    is due.

    Args:
        model: a converted model.
        config: the mask fields are read.
        policy: a callable instead of ``config.mask_policy``.

    Attributes:
        masks: float32 [L, K] in force for the next step, on the device of the model. A view: the next step rewrites it.
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
        self._selects = policy is None and config.mask_policy == "bias_variance"
        L, K = len(self.layers), counts.pop()
        self._rules = (
            *(config.mask_warmup, config.mask_interval, *_ranking(config, L)),
            *(config.mask_probe_interval, config.mask_probe_steps, self._selects),
        )
        # The operands of masm::update_masks_, in its order.
        device = next(iter(self.layers.values())).mask.device
        rows = HISTORY_ROWS if self._selects else 1
        self._state = [
            torch.zeros(3, L, K, dtype=torch.float64, device=device),  # EMA of ||g||^2, bias2, second
            torch.zeros(3, L, K, dtype=torch.int64, device=device),  # updates, idle, probing
            torch.ones(2, L, K, device=device),  # what the policy wants; what is in force: the same, or probed
            torch.ones(L, K, dtype=torch.bool, device=device),  # in force and not 0
            torch.zeros(2, dtype=torch.int64, device=device),  # steps, selections
            torch.empty(rows, L, K, 4, dtype=torch.float64, device=device),  # a ring of selections
            torch.empty(rows, dtype=torch.int64, device=device),  # and their steps
        ]
        self._history: list[dict[str, Any]] = []
        self._read = 0  # selections that went from the ring into the list
        self._calls = 0  # since then
        self._published: tuple[Tensor, list[Tensor], list[int]] | None = None  # what the layers were given
        self._look()
        self._publish()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._look()  # pickle makes tensors of their own out of views
        self._published = None

    @property
    def step(self) -> int:
        """Steps that were taken."""
        return int(self._state[4][0])

    @property
    def snr(self) -> Tensor:
        """float64 [L, K]."""
        return snr_of(self.bias2, self.variance)

    @property
    def bias2(self) -> Tensor:
        """float64 [L, K]."""
        return self._state[0][1].clone()

    @property
    def variance(self) -> Tensor:
        """float64 [L, K]."""
        _, bias2, second = self._state[0]
        return variance_of(bias2, second)

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict per selection: step, mask, snr, bias2, var (nested lists, [L][K]).

        The last 256 are kept on the device and read from time to time (a step that does so waits). Replays of a CUDA
        graph cannot: read this property between them, or a warning says how many selections were not recorded.
        """
        self._drain()
        return self._history

    def observe(self, stats: Tensor, found: Tensor, owned: Tensor, beta1: float) -> None:
        """Take in one optimizer step and choose the masks of the next.

        stats float64 [B, 2] with B >= L * K and found float32 [1]: what ``masm::masked_adamw_`` returned (a step that
        was not taken changes nothing); owned bool [L, K]: blocks that own a part of a parameter that got a gradient;
        beta1: of the optimizer. All on one device, to which the state moves.
        """
        self.to(stats.device)
        if self._selects:
            self._make_room()
        if self.policy is not None and found.item() == 0 and self._selection_is_due():
            self._ask_policy(stats, owned, beta1)
        else:
            update_masks_(*self._state, stats, found, owned, beta1, *self._rules)
        self._publish()

    def to(self, device: torch.device) -> LayerMasks:
        """Move the state, in place."""
        if self._state[0].device != device:
            self._state = [t.to(device) for t in self._state]
            self._look()
            self._published = None
        return self

    def _look(self) -> None:
        _, self.masks = self._state[2].unbind()
        self._live_rows = self._state[3].unbind()

    def _selection_is_due(self) -> bool:
        after_warmup = self.step + 1 - self.config.mask_warmup
        return after_warmup >= 0 and after_warmup % self.config.mask_interval == 0

    def _ask_policy(self, stats: Tensor, owned: Tensor, beta1: float) -> None:
        """A step as masm::update_masks_ takes it, with a selection by the callable in its middle."""
        sums, counts, masks, live, counters, *_ = self._state
        update_statistics_(sums, counts, stats, owned & (self.masks != 0), beta1)
        counters[0] += 1
        step, snr = self.step, self.snr
        chosen = torch.as_tensor(self.policy(snr, step, masks[0].clone()), dtype=torch.float32, device=masks.device)
        if chosen.shape != snr.shape or not ((chosen >= 0) & (chosen <= 1)).all():
            raise ValueError(
                f"the mask policy must return values in [0, 1] of shape [L, K] = {list(snr.shape)}, "
                f"got shape {list(chosen.shape)}, values {chosen.min():.3g} to {chosen.max():.3g}"
            )
        masks[0].copy_(chosen)
        self._history.append(_entry(step, chosen, snr, self.bias2, self.variance))
        settle_masks_(counts, masks, live, self.config.mask_probe_interval, self.config.mask_probe_steps)

    def _make_room(self) -> None:
        """Read the ring while what the steps since the last reading may have selected is still in it."""
        self._calls += 1
        if self._calls // self.config.mask_interval + 1 >= HISTORY_ROWS and not is_captured(self._state[0].device):
            self._drain()

    def _drain(self) -> None:
        *_, counters, ring, steps = self._state
        made, rows = int(counters[1]), len(ring)
        first = max(self._read, made - rows)
        if first > self._read:
            warnings.warn(
                f"LayerMasks.history: {first - self._read} selections were made on the device and overwritten before "
                "they were read, so they are not recorded; read `history` between replays of a CUDA graph",
                stacklevel=3,
            )
        places = torch.arange(first, made, device=ring.device) % rows
        for step, record in zip(steps[places].tolist(), ring[places].cpu()):
            self._history.append(_entry(step, *record.unbind(-1)))
        self._read, self._calls = made, 0

    def _publish(self) -> None:
        live = self._state[3]
        held = [layer.mask for layer in self.layers.values()]
        if not live.is_cpu:  # to look whether something changed would be to wait
            torch._foreach_copy_(held, self._live_rows)
            return
        # Copying dozens of small masks would cost a good part of an optimizer step: only where something changed, here
        # or in a layer. (A write past autograd's version counter, as through `.data`, is not seen.)
        if self._published is not None:
            table, tensors, versions = self._published
            same = all(a is b and a._version == n for a, b, n in zip(held, tensors, versions))
            if same and torch.equal(live, table):
                return
        for mask, row in zip(held, self._live_rows):
            mask.copy_(row)
        self._published = (live.clone(), held, [mask._version for mask in held])

    def _parts(self) -> dict[str, Tensor]:
        """Views of the state that a resumed run needs, by their names in state_dict."""
        (grad2, bias2, second), (updates, idle, probing), (selected, _), *_ = self._state
        return {
            **{"selected": selected, "updates": updates, "bias2": bias2, "grad2": grad2},
            **{"second": second, "idle": idle, "probing": probing},
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors (on the CPU) and plain values: everything that a resumed run needs to go on bit for bit."""
        state: dict[str, Any] = {name: value.cpu().clone() for name, value in self._parts().items()}
        return {**state, "step": self.step, "layer_names": list(self.layer_names), "history": list(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state belongs to other layers."""
        if list(state["layer_names"]) != list(self.layer_names):
            raise ValueError(
                f"LayerMasks: the state belongs to {len(state['layer_names'])} layers "
                f"({state['layer_names'][:2]} ...), this model has {len(self.layer_names)} ({self.layer_names[:2]} ...)"
            )
        parts = self._parts()
        for name, own in parts.items():
            if state[name].shape != own.shape:
                shape = list(state[name].shape)
                raise ValueError(f"LayerMasks: {name} must have shape {list(own.shape)}, got {shape}")
        if not ((state["selected"] >= 0) & (state["selected"] <= 1)).all():
            raise ValueError("LayerMasks: selected must hold values in [0, 1]")
        for name, own in parts.items():  # in place: a captured step goes on with them
            own.copy_(state[name])
        _, counts, masks, live, counters, *_ = self._state
        counters[0].fill_(int(state["step"]))
        counters[1].zero_()
        self._history = list(state["history"])
        self._read = self._calls = 0
        force_masks_(counts, masks, live)
        self._publish()


def _entry(step: int, mask: Tensor, snr: Tensor, bias2: Tensor, variance: Tensor) -> dict[str, Any]:
    tables = {"mask": mask, "snr": snr, "bias2": bias2, "var": variance}
    return {"step": step, **{name: table.tolist() for name, table in tables.items()}}


def _ranking(config: MASMConfig, L: int) -> tuple[float, int, float, int]:
    """(hysteresis, keep, threshold, least) of :func:`masm_ext.reference.choose_layers` for L layers."""
    least = min(L, max(1, config.mask_min_active))
    if config.mask_threshold is not None:
        return config.mask_hysteresis, 0, config.mask_threshold, least
    keep = min(L, max(least, math.ceil(config.mask_active_fraction * L)))
    return config.mask_hysteresis, keep, 0.0, least


def bias_variance(snr: Tensor, current: Tensor, config: MASMConfig) -> Tensor:
    """The dynamic policy: per subspace, the layers of largest snr. snr, current [L, K] -> mask float32 [L, K]."""
    return choose_layers(snr, current, *_ranking(config, len(snr)))


def select_layers(
    model: nn.Module,
    config: MASMConfig,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
) -> SelectedLayers:
    """The static policy: which layers to decompose, ranked by the bias-variance of the gradient of their raw weights.

    One calibration pass over at most ``config.mask_calibration_batches`` batches of a model that is not yet converted.
    Per layer, with G_b the gradient of the weight on batch b: ``bias2 = ||mean_b G_b||^2``, ``var = mean_b ||G_b||^2 -
    bias2``, ``snr = bias2 / (bias2 + var)``. The layers of largest snr are returned, ``mask_active_fraction`` of those
    that ``target_modules`` matches (or those above ``mask_threshold``), in module order: pass them to
    :func:`masm_ext.convert` as ``target_modules=``. The pass runs in eval mode; the model's mode, ``requires_grad``
    flags and gradients are left as they were.

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
    snr = snr_of(bias2, variance_of(bias2, second))[:, None]
    chosen = bias_variance(snr, torch.zeros_like(snr), config)[:, 0]
    return SelectedLayers(name for name, keep in zip(linears, chosen) if keep)
