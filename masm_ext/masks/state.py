"""Gradient statistics of every (layer, subspace) block, and the masks selected from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MASMConfig
from ..nn.masm_linear import ANY_STEP, MASMLinear, masm_layers
from ..ops import update_masks_
from ..reference import force_masks_, settle_masks_, snr_of, update_statistics_
from ..registry import MASK_POLICIES
from .agreement import GradientAgreement
from .history import HISTORY_ROWS, SelectionHistory
from .policies import FUSED_POLICY, ROUTED_POLICY, UNPROBED, ranking

#: A custom policy: (snr [L, K], step, current mask [L, K]) -> mask [L, K] with values in [0, 1].
Policy = Callable[[Tensor, int, Tensor], Tensor]


class LayerMasks:
    """Masks ``[L, K]`` for the L converted layers and K subspaces of a model, and the statistics behind them.

    A block is one subspace of one layer. Per block, with g the gradient of (u_k, s_k, v_k) in a step, m AdamW's first
    moment before that step and t the number of steps before it: ``signal = EMA(<g, m> / (1 - beta1^t))``, ``power =
    EMA(||g||^2)``, both with decay ``mask_decay``, and ``snr = signal / power``. A constant gradient has snr 1. White
    noise has snr 0 on average, because the noise of g is independent of m.

    A new object starts with the current masks of the layers: all active after :func:`masm_ext.convert`, those of the
    adapter after :func:`masm_ext.load_adapter`. Once an optimizer uses it, ``layer.mask`` is a row of its table, and an
    in-place change of that row (not through ``.data``) counts as a selection. All rows share one version counter: after
    such a change, a backward pass through an older graph raises. On CUDA a selection by the policy does not advance the
    counter, because detecting it would synchronize with the device.

    A block with mask 0 is not updated: its parameters, moments and step count stay the same bit for bit, no weight
    decay is applied, and the backward pass does not compute its gradients. Its statistics do not change either.
    Therefore each masked block is probed: after ``mask_probe_interval`` steps it is unmasked, and updated, for
    ``mask_probe_steps`` steps.

    :class:`masm_ext.MaskedAdamW` reads :attr:`masks`, calls :meth:`observe` in its step, and includes all state in its
    ``state_dict``; no other call is needed, but for policies and statistics that work by domains (:attr:`domain`).

    The state is on the device of the model and a step does not synchronize, so it can be captured in a CUDA graph.
    Reading an attribute synchronizes. With a policy that runs on the host (a callable, or a registered policy other
    than "bias_variance") every step synchronizes, to find out whether a selection is due.

    Args:
        model: a converted model, or its MASMLinears.
        config: only the mask fields are read.
        policy: a callable (snr [L, K], step, current mask [L, K]) -> mask [L, K] in [0, 1], instead of
            ``config.mask_policy``.

    Attributes:
        masks: float32 [L, K], the masks of the next step, on the device of the model. A view, overwritten by each step.
        layer_names: the names of the L modules.

    Raises:
        ValueError: the model has no MASMLinear, or its layers differ in the number of subspaces.
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
        named = MASK_POLICIES[config.mask_policy]
        self._selects = policy is None and config.mask_policy == FUSED_POLICY  # by the op, on the device
        self._calls_named = policy is None and not self._selects and named is not None  # on the host
        L, K = len(self.layers), counts.pop()
        self._chooses = self._selects or self._calls_named or policy is not None
        # no probes without a policy: no selection would mask the block again
        probed = self._chooses and (policy is not None or config.mask_policy not in UNPROBED)
        probe_interval = config.mask_probe_interval if probed else 0
        self._rules = (
            *(config.mask_decay, config.mask_warmup, config.mask_interval, *ranking(config, L)),
            *(probe_interval, config.mask_probe_steps, self._selects),
        )
        # The operands of masm::update_masks_, in its order.
        live = torch.stack([layer.mask.detach() for layer in self.layers.values()])
        device = live.device
        rows = HISTORY_ROWS if self._selects else 1
        self._state = [
            torch.zeros(2, L, K, dtype=torch.float64, device=device),  # signal, power
            torch.zeros(2, L, K, dtype=torch.int64, device=device),  # idle, probing
            live.float().repeat(2, 1, 1),  # selected; in force: as selected, or 1 in a probe
            live,  # mask in force is not 0; rows are the masks of the layers
            torch.zeros(2, dtype=torch.int64, device=device),  # steps, selections
            torch.zeros(rows, L, K, 4, dtype=torch.float64, device=device),  # a ring of selections
            torch.zeros(rows, dtype=torch.int64, device=device),  # and their steps
        ]
        self._history = SelectionHistory()
        compares = self._chooses and config.mask_statistic == "agreement"
        self._agreement = GradientAgreement(list(self.layers.values()), K) if compares else None
        self._routes = policy is None and config.mask_policy == ROUTED_POLICY
        self._domain: int | None = None
        self._owner: object | None = None  # the optimizer that steps these masks
        self._views()

    def __getstate__(self) -> dict[str, Any]:
        views = ("masks", "_rows", "_steps", "_probing")  # pickle would copy views into separate tensors
        return {name: value for name, value in self.__dict__.items() if name not in views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._views()
        if self._owner is not None:
            self._attach()

    @property
    def domain(self) -> int | None:
        """Number of the domain (in deepfake detection: the forgery) of the next step.

        The training loop sets it before each step, on all ranks the same, if ``mask_statistic`` is "agreement" or
        ``mask_policy`` is "specialists". Raises RuntimeError for another one before the step was taken.
        """
        return self._domain

    @domain.setter
    def domain(self, number: int | None) -> None:
        if None not in (number, self._domain) and number != self._domain:
            raise RuntimeError(f"LayerMasks: domain was set to {self._domain} and {number} for one optimizer step")
        self._domain = number
        if self._routes and number is not None:
            self.in_force()
            _, counts, masks, live, *_ = self._state
            masks[0].zero_()
            masks[0][:, number % masks.shape[-1]] = 1
            force_masks_(counts, masks, live)
            self._version = live._version

    @property
    def step(self) -> int:
        """Steps taken."""
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
        """One dict per selection: step, mask, snr, signal, power (each but step a list of L lists of K numbers).

        The last 1,024 selections are kept. The device stores up to 256. A step copies them to the host before they are
        overwritten, and synchronizes to do so. A replayed CUDA graph does not copy: read this property between replays;
        otherwise a warning reports how many selections were lost.
        """
        self._history.read(*self._state[4:])
        return self._history.as_dicts()

    def observe(self, stats: Tensor, found: Tensor, owned: Tensor, grad_scale: Tensor | None = None) -> None:
        """Update the statistics after an optimizer step, and select the masks of the next step.

        All arguments are on the device of the layers.

        Args:
            stats: float64 [B, 2] with B >= L * K, the (signal, power) returned by ``masm::masked_adamw_``.
            found: float32 [1], from the same call; if it is not 0, the step was skipped and nothing changes.
            owned: bool [L, K], True for blocks with a gradient in this step.
            grad_scale: float32 [1], the factor of a GradScaler that is still in the gradients; None: 1.
        """
        self.in_force()
        if self._selects:
            self._history.make_room(self.config.mask_interval, *self._state[4:])
        if self._agreement is not None:
            stats, owned = self._agreement.observe(self._domain, owned & (self.masks != 0), found, grad_scale)
        self._domain = None
        before = self._state[3].clone() if self._chooses and self._state[3].is_cpu else None
        on_host = self._calls_named or self.policy is not None
        if on_host and found.item() == 0 and self._selection_is_due():
            self._select_on_host(stats, owned)
        else:
            update_masks_(*self._state, stats, found, owned, *self._rules)
            if before is not None and not torch.equal(before, self._state[3]):
                torch.autograd.graph.increment_version(self._state[3])
        self._version = self._state[3]._version

    def claim(self, owner: object) -> None:
        """Make the masks and step counts of the layers rows of this table. A new optimizer calls it.

        If these layers, or this object, had another owner before, its next step raises.

        Args:
            owner: the new optimizer.
        """
        self._owner = owner
        self._attach()

    def in_force(self, owner: object | None = None) -> Tensor:
        """:attr:`masks` on the device of the layers, including changes made through ``layer.mask``.

        Args:
            owner: the optimizer that asks; None: do not check the owner.

        Raises:
            RuntimeError: the layers belong to another optimizer or LayerMasks.
        """
        if self._owner is None:
            self.claim(self)
        if owner is not None and owner is not self._owner:
            raise RuntimeError(
                "MaskedAdamW: another optimizer was made with the same masks, and one table counts the steps of one "
                "optimizer; use parameter groups of one optimizer instead"
            )
        if any(layer.__dict__["_steps"] is not self._steps for layer in self.layers.values()):
            raise RuntimeError(
                "LayerMasks: another optimizer was made over these layers. Masks and step counts of a layer have one "
                "owner: use parameter groups of one optimizer, or continue with the new optimizer only"
            )
        self._bind()
        return self.masks

    def _views(self) -> None:
        """Views of the state by name."""
        self._rows, (self._steps, _) = self._state[3].unbind(), self._state[4].unbind()
        self._probing = self._state[1].unbind()[1].unbind()
        self.masks = self._state[2].unbind()[1]
        self._version = self._state[3]._version

    def _attach(self) -> None:
        for layer, probing in zip(self.layers.values(), self._probing):
            layer.__dict__["_steps"], layer.__dict__["_probing"] = self._steps, probing
        self._bind()

    def _bind(self) -> None:
        """Move to the device of the layers, make their masks rows of the table, and adopt changes made in them.

        Attributes bypass ``nn.Module.__setattr__``, which would cost more than the rest of a small step."""
        device = next(iter(self.layers.values())).s.device
        if self._state[0].device != device:
            self._state = [t.to(device) for t in self._state]
            self._views()
            self._attach()
            return
        for layer, row in zip(self.layers.values(), self._rows):
            if layer._buffers["mask"] is not row:
                row.copy_(layer._buffers["mask"])
                layer._buffers["mask"] = row
        if self._state[3]._version != self._version:
            self._adopt()
            self._version = self._state[3]._version

    def _adopt(self) -> None:
        """Masks changed in the layers, by a state_dict or in place, become the selected ones."""
        _, counts, masks, live, *_ = self._state
        changed = live != (self.masks != 0)
        masks.copy_(torch.where(changed, live.float(), masks))
        counts.masked_fill_(changed, 0)

    def check_domain(self) -> None:
        """Called before a step: raises RuntimeError if it needs :attr:`domain`, and has none."""
        if (self._agreement is not None or self._routes) and self._domain is None:
            raise RuntimeError(
                f"LayerMasks: {self.config.mask_policy!r} with {self.config.mask_statistic!r}: set masks.domain before "
                "each step, to the number of the domain (the forgery) of its batch"
            )

    def check_restored(self) -> None:
        """Called before a step: raises RuntimeError unless layers and optimizer were restored from the same step."""
        restored = {layer.__dict__["restored_steps"] for layer in self.layers.values()} - {None}
        if not restored:
            return
        own = self.step
        if restored - {ANY_STEP, own}:
            raise RuntimeError(
                f"LayerMasks: the model's layers are at step {sorted(restored)}, the optimizer and its masks at {own}: "
                "only one of the two was restored. Load the state_dict of both, saved at the same step; to go on from "
                "these weights with this optimizer on purpose, call optimizer.masks.accept_layers() first"
            )
        self.accept_layers()

    def accept_layers(self) -> None:
        """Continue with the current values of the layers, even if they are of another step than this optimizer."""
        for layer in self.layers.values():
            layer.restored_steps = None

    def _selection_is_due(self) -> bool:
        after_warmup = self.step + 1 - self.config.mask_warmup
        return after_warmup >= 0 and after_warmup % self.config.mask_interval == 0

    def _chosen(self, snr: Tensor, step: int, current: Tensor) -> Tensor:
        if self.policy is not None:
            return self.policy(snr, step, current)
        return MASK_POLICIES[self.config.mask_policy](snr, current, self.config, step)

    def _select_on_host(self, stats: Tensor, owned: Tensor) -> None:
        """A step as masm::update_masks_ takes it, with a selection by a function in its middle."""
        sums, counts, masks, live, counters, *_ = self._state
        averages = sums.clone()
        update_statistics_(averages, stats, owned & (self.masks != 0), self.config.mask_decay)
        step, snr = self.step + 1, snr_of(*averages)
        chosen = torch.as_tensor(self._chosen(snr, step, masks[0].clone()), dtype=torch.float32, device=masks.device)
        if chosen.shape != snr.shape or not ((chosen >= 0) & (chosen <= 1)).all():
            raise ValueError(
                f"the mask policy must return values in [0, 1] of shape [L, K] = {list(snr.shape)}, "
                f"got shape {list(chosen.shape)}, values {chosen.min():.3g} to {chosen.max():.3g}"
            )
        if not chosen.any():
            warnings.warn("the mask policy selected no block: nothing is trained", stacklevel=4)
        sums.copy_(averages)
        counters[0] += 1
        masks[0].copy_(chosen)
        self._history.entries.append((step, torch.stack([chosen.double(), snr, *averages], -1).cpu()))
        now = live.clone()
        settle_masks_(counts, masks, now, *self._rules[-3:-1])
        if not torch.equal(now, live):
            live.copy_(now)

    def _parts(self) -> dict[str, Tensor]:
        """Views of the state that a resumed run needs, by name in state_dict."""
        (signal, power), (idle, probing), (selected, _), *_ = self._state
        return {"selected": selected, "signal": signal, "power": power, "idle": idle, "probing": probing}

    def state_dict(self) -> dict[str, Any]:
        """Tensors (on the CPU) and plain values that resume a run bit for bit.

        :class:`masm_ext.MaskedAdamW` includes it in its own ``state_dict``."""
        self._history.read(*self._state[4:])
        if self._owner is not None:
            self._bind()
        state: dict[str, Any] = {name: value.cpu().clone() for name, value in self._parts().items()}
        history = self._history.state(*self.masks.shape)
        agreement = {} if self._agreement is None else self._agreement.state()
        return {**state, "step": self.step, "layer_names": list(self.layer_names), **history, **agreement}

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that a state can be loaded; changes nothing.

        Args:
            state: a state from :meth:`state_dict`.

        Raises:
            ValueError: the state belongs to other layers or to another version.
        """
        parts = self._parts()
        further = () if self._agreement is None else ("domains", "gradients")
        missing = {*parts, "step", "layer_names", "history", "history_steps", *further} - set(state)
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
        if self._agreement is not None:
            self._agreement.check(state["domains"], state["gradients"])
        if not ((state["selected"] >= 0) & (state["selected"] <= 1)).all():
            raise ValueError("LayerMasks: selected must hold values in [0, 1]")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state.

        Args:
            state: as :meth:`state_dict` returns it.

        Raises:
            ValueError: as :meth:`check_state`, before anything changes.
        """
        self.check_state(state)
        self.in_force()
        parts = self._parts()
        for layer in self.layers.values():
            if layer.restored_steps is None:  # see check_restored
                layer.restored_steps = self.step
        for name, own in parts.items():  # in place: a captured graph reads these tensors
            own.copy_(state[name])
        _, counts, masks, live, counters, *_ = self._state
        counters[0].fill_(int(state["step"]))
        counters[1].zero_()
        self._history.restore(state["history"], state["history_steps"])
        if self._agreement is not None:
            self._agreement.restore(state["domains"], state["gradients"])
        force_masks_(counts, masks, live)
        self._version = live._version
