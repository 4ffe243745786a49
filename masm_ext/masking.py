"""Selective layer masks: the learning state of every (layer, subspace) and the policies that choose who may update.

After arXiv 2601.01041 in words (v1: masks from the learning state of each artifact subspace; v3: forgery-sensitive
layers by gradient bias-variance before the SVD); the formulas are ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from .config import MASMConfig
from .nn.masm_linear import ANY_STEP, MASMLinear, masm_layers
from .ops import update_masks_
from .reference import choose_layers, force_masks_, settle_masks_, snr_of, update_statistics_
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

    Per block, with g the gradient of (u_k, s_k, v_k) in a step and m its first moment before that step:
    ``signal = EMA(<g, m> / (1 - beta1^t))``, ``power = EMA(||g||^2)`` with ``mask_decay``, ``snr = signal / power``.
    The noise of g is independent of m, so that white noise gives 0 (not the share of it that an average keeps), a
    constant gradient 1. Policies: see :class:`masm_ext.MASMConfig`, or pass a callable.

    A new object starts with the masks that the layers have: all active after :func:`masm_ext.convert`, those of the
    adapter after :func:`masm_ext.load_adapter`. From then on ``layer.mask`` is a row of its table; a mask that is
    changed there, in place, counts as selected.

    A mask of 0 leaves parameters, moments and decay of a block bit for bit as they are, and the backward pass does not
    compute its gradients. Because its statistics stand still meanwhile, a masked block is probed: every
    ``mask_probe_interval`` steps it is unmasked (and updated) for ``mask_probe_steps`` steps.

    :class:`masm_ext.MaskedAdamW` reads :attr:`masks`, calls :meth:`observe` in its step and keeps all of it in its
    ``state_dict``; nothing else is needed.

    Everything is kept on the device of the model, and a step waits for nothing there (so it can be captured in a CUDA
    graph); reading what follows waits. With a callable policy every step waits: the host must know whether a selection
    is due.

    Args:
        model: a converted model, or its MASMLinears.
        config: the mask fields are read.
        policy: a callable instead of ``config.mask_policy``.

    Attributes:
        masks: float32 [L, K] in force for the next step, on the device of the model. A view: the next step rewrites it.
        layer_names: the L module names.
    """

    def __init__(
        self, model: nn.Module | Sequence[MASMLinear], config: MASMConfig, policy: Policy | None = None
    ) -> None:
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
        self._chooses = self._selects or policy is not None
        # without a policy that may mask it again, a masked block is not probed: it stays as it is
        probe_interval = config.mask_probe_interval if self._chooses else 0
        self._rules = (
            *(config.mask_decay, config.mask_warmup, config.mask_interval, *_ranking(config, L)),
            *(probe_interval, config.mask_probe_steps, self._selects),
        )
        # The operands of masm::update_masks_, in its order.
        live = torch.stack([layer.mask.detach() for layer in self.layers.values()])
        device = live.device
        rows = HISTORY_ROWS if self._selects else 1
        self._state = [
            torch.zeros(2, L, K, dtype=torch.float64, device=device),  # signal, power
            torch.zeros(2, L, K, dtype=torch.int64, device=device),  # idle, probing
            live.float().repeat(2, 1, 1),  # what the policy wants; what is in force: the same, or probed
            live,  # in force and not 0: the rows are the masks of the layers
            torch.zeros(2, dtype=torch.int64, device=device),  # steps, selections
            torch.zeros(rows, L, K, 4, dtype=torch.float64, device=device),  # a ring of selections
            torch.zeros(rows, dtype=torch.int64, device=device),  # and their steps
        ]
        self._history: list[tuple[int, Tensor]] = []  # (step, record [L, K, 4])
        self._read = 0  # selections that went from the ring into the list
        self._calls = 0  # since then
        self._steps_of_model: int | None = None  # after load_state_dict: the steps that the layers had seen before
        self._bind()

    def __getstate__(self) -> dict[str, Any]:
        views = ("masks", "_rows", "_steps", "_bound")  # pickle makes tensors of their own out of views
        return {name: value for name, value in self.__dict__.items() if name not in views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()

    @property
    def step(self) -> int:
        """Steps that were taken."""
        return int(self._state[4][0])

    @property
    def snr(self) -> Tensor:
        """float64 [L, K]."""
        return snr_of(*self._state[0])

    @property
    def signal(self) -> Tensor:
        """float64 [L, K], an average that starts at zero."""
        return self._state[0][0].clone()

    @property
    def power(self) -> Tensor:
        """float64 [L, K], an average that starts at zero."""
        return self._state[0][1].clone()

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict per selection: step, mask, snr, signal, power (nested lists, [L][K]).

        The last 256 are kept on the device and read from time to time (a step that does so waits). Replays of a CUDA
        graph cannot: read this property between them, or a warning says how many selections were not recorded.
        """
        self._drain()
        return [
            {"step": step, **dict(zip(("mask", "snr", "signal", "power"), record.movedim(-1, 0).tolist()))}
            for step, record in self._history
        ]

    def observe(self, stats: Tensor, found: Tensor, owned: Tensor) -> None:
        """Take in one optimizer step and choose the masks of the next.

        stats float64 [B, 2] with B >= L * K and found float32 [1]: what ``masm::masked_adamw_`` returned (a step that
        was not taken changes nothing); owned bool [L, K]: blocks that own a part of a parameter that got a gradient.
        All on one device, to which the state moves.
        """
        self.to(stats.device)
        self._bind()
        if self._selects:
            self._make_room()
        before = self._state[3].clone() if self._chooses and self._state[3].is_cpu else None
        if self.policy is not None and found.item() == 0 and self._selection_is_due():
            self._ask_policy(stats, owned)
        else:
            update_masks_(*self._state, stats, found, owned, *self._rules)
        if before is not None and not torch.equal(before, self._state[3]):
            # a backward pass through an older forward pass is then refused; elsewhere to look would be to wait
            torch.autograd.graph.increment_version(self._state[3])
        self._version = self._state[3]._version

    def in_force(self, device: torch.device) -> Tensor:
        """:attr:`masks` on the device, with what was changed in the masks of the layers."""
        self.to(device)._bind()
        return self.masks

    def to(self, device: torch.device) -> LayerMasks:
        """Move the state, in place."""
        if self._state[0].device != device:
            self._state = [t.to(device) for t in self._state]
            self._bind()
        return self

    def _bind(self) -> None:
        """Make the masks of the layers rows of the table, and take over what was changed in them."""
        live, counters = self._state[3], self._state[4]
        if getattr(self, "_bound", None) is not live:
            self._bound, self._version = live, live._version
            self._rows, (self._steps, _) = live.unbind(), counters.unbind()
            _, self.masks = self._state[2].unbind()
        for layer, row in zip(self.layers.values(), self._rows):
            if layer.mask is not row:
                row.copy_(layer.mask)
                layer.mask = row
            layer._steps = self._steps
        if live._version != self._version:
            self._adopt()
            self._version = live._version

    def _adopt(self) -> None:
        """Masks that were changed in the layers (by a state_dict, or by hand) are the selected ones."""
        _, counts, masks, live, *_ = self._state
        changed = live != (self.masks != 0)
        masks.copy_(torch.where(changed, live.float(), masks))
        counts.masked_fill_(changed, 0)

    def check_restored(self) -> None:
        """Called before a step: layers and optimizer must have been restored together.

        Raises RuntimeError if the state_dict of one was loaded and that of the other, of the same step, was not.
        """
        restored = [layer.restored_steps for layer in self.layers.values()]
        if self._steps_of_model is None and not any(steps is not None for steps in restored):
            return
        own = self.step
        model = own if self._steps_of_model is None else self._steps_of_model
        steps = {model if steps is None else steps for steps in restored} - {ANY_STEP}
        if steps - {own}:
            raise RuntimeError(
                f"LayerMasks: the model's layers are at step {sorted(steps)}, the optimizer and its masks at {own}: "
                "only one of the two was restored. Load the state_dict of both, saved at the same step; to go on from "
                "these weights with this optimizer on purpose, call optimizer.masks.accept_layers() first"
            )
        self.accept_layers()

    def accept_layers(self) -> None:
        """Declare that the values the layers have now belong to this optimizer, wherever they were loaded from."""
        self._steps_of_model = None
        for layer in self.layers.values():
            layer.restored_steps = None

    def _selection_is_due(self) -> bool:
        after_warmup = self.step + 1 - self.config.mask_warmup
        return after_warmup >= 0 and after_warmup % self.config.mask_interval == 0

    def _ask_policy(self, stats: Tensor, owned: Tensor) -> None:
        """A step as masm::update_masks_ takes it, with a selection by the callable in its middle."""
        sums, counts, masks, live, counters, *_ = self._state
        update_statistics_(sums, stats, owned & (self.masks != 0), self.config.mask_decay)
        counters[0] += 1
        step, snr = self.step, self.snr
        chosen = torch.as_tensor(self.policy(snr, step, masks[0].clone()), dtype=torch.float32, device=masks.device)
        if chosen.shape != snr.shape or not ((chosen >= 0) & (chosen <= 1)).all():
            raise ValueError(
                f"the mask policy must return values in [0, 1] of shape [L, K] = {list(snr.shape)}, "
                f"got shape {list(chosen.shape)}, values {chosen.min():.3g} to {chosen.max():.3g}"
            )
        masks[0].copy_(chosen)
        self._history.append((step, torch.stack([chosen.double(), snr, *sums], -1).cpu()))
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
        self._history += zip(steps[places].tolist(), ring[places].cpu())
        self._read, self._calls = made, 0

    def _parts(self) -> dict[str, Tensor]:
        """Views of the state that a resumed run needs, by their names in state_dict."""
        (signal, power), (idle, probing), (selected, _), *_ = self._state
        return {"selected": selected, "signal": signal, "power": power, "idle": idle, "probing": probing}

    def state_dict(self) -> dict[str, Any]:
        """Tensors (on the CPU) and plain values: everything that a resumed run needs to go on bit for bit.
        :class:`masm_ext.MaskedAdamW` keeps it in its own."""
        self._drain()
        self._bind()
        state: dict[str, Any] = {name: value.cpu().clone() for name, value in self._parts().items()}
        L, K = self.masks.shape
        records = [record for _, record in self._history]
        return {
            **state,
            "step": self.step,
            "layer_names": list(self.layer_names),
            "history": torch.stack(records) if records else torch.empty(0, L, K, 4, dtype=torch.float64),
            "history_steps": torch.tensor([step for step, _ in self._history], dtype=torch.int64),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state belongs to other layers, or is of another version."""
        parts = self._parts()
        missing = {*parts, "step", "layer_names", "history", "history_steps"} - set(state)
        if missing:
            raise ValueError(f"LayerMasks: the state lacks {sorted(missing)}; was it written by another masm_ext?")
        if list(state["layer_names"]) != list(self.layer_names):
            raise ValueError(
                f"LayerMasks: the state belongs to {len(state['layer_names'])} layers "
                f"({state['layer_names'][:2]} ...), this model has {len(self.layer_names)} ({self.layer_names[:2]} ...)"
            )
        for name, own in parts.items():
            if state[name].shape != own.shape:
                shape = list(state[name].shape)
                raise ValueError(f"LayerMasks: {name} must have shape {list(own.shape)}, got {shape}")
        if not ((state["selected"] >= 0) & (state["selected"] <= 1)).all():
            raise ValueError("LayerMasks: selected must hold values in [0, 1]")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError as :meth:`check_state` does; nothing is changed then."""
        self.check_state(state)
        parts = self._parts()
        if self._steps_of_model is None:
            self._steps_of_model = self.step
        for name, own in parts.items():  # in place: a captured step goes on with them
            own.copy_(state[name])
        _, counts, masks, live, counters, *_ = self._state
        counters[0].fill_(int(state["step"]))
        counters[1].zero_()
        self._history = list(zip(state["history_steps"].tolist(), state["history"].cpu().unbind()))
        self._read = self._calls = 0
        force_masks_(counts, masks, live)
        self._version = live._version
        self._bind()


def _ranking(config: MASMConfig, L: int) -> tuple[float, int, float, int]:
    """(hysteresis, keep, threshold, least) of :func:`masm_ext.reference.choose_layers` for L layers."""
    least = min(L, max(1, config.mask_min_active))
    if config.mask_threshold is not None:
        return config.mask_hysteresis, 0, config.mask_threshold, least
    keep = min(L, max(least, math.ceil(Fraction(repr(config.mask_active_fraction)) * L)))
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
    Per layer, with G_b the gradient of the weight on batch b of n: ``power = mean_b ||G_b||^2``, ``signal =
    (n ||mean_b G_b||^2 - power) / (n - 1)`` (the mean over pairs of different batches, so that noise gives 0),
    ``snr = signal / power``. The layers of largest snr are returned, ``mask_active_fraction`` of those that
    ``target_modules`` matches (or those above ``mask_threshold``), in module order: pass them to
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
    of_mean = torch.tensor([float(m.double().square().sum()) for m in mean], dtype=torch.float64)
    snr = snr_of((count * of_mean - second) / (count - 1), second)[:, None]
    chosen = bias_variance(snr, torch.zeros_like(snr), config)[:, 0]
    return SelectedLayers(name for name, keep in zip(linears, chosen) if keep)
