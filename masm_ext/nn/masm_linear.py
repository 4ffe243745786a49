"""The layer: a frozen weight and K learnable subspaces."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MASMConfig
from ..contract import HALF, accumulate_dtype
from ..decomposition import (
    Decomposition,
    choose_ranks,
    order_of,
    split,
    split_along_gradient,
)
from ..hashing import list_hash, weight_hash
from ..ops import fold, quantized_subspace_linear, subspace_linear
from ..quantized_weight import dense_weight
from ..sharded import check_not_divided
from ..spectra import check_finite, compute_spectra
from ..wrappers import modules_of
from .extra_state import ExtraState
from .layer_group import LayerGroup, check_group

#: `restored_steps` of a layer whose values came from an adapter: any optimizer may go on with them.
ANY_STEP = -1
#: All live layers. An optimizer looks up here which layers own its parameters.
LAYERS: weakref.WeakSet[MASMLinear] = weakref.WeakSet()


class MASMLinear(nn.Module):
    """A linear layer with a frozen principal subspace and K trainable artifact subspaces.

    ``y = x principal^T + ((x v^T) * s) u + bias``. At init the output is that of the ``nn.Linear`` it was made from, up
    to rounding. The decomposition follows the text of arXiv 2601.01041; the formulas are ours. Make one with
    :meth:`from_linear`, or convert a whole model with :func:`masm_ext.convert`.

    Args:
        parts: the decomposition of the weight.
        bias: [N], copied; None: no bias.
        base_hash: :func:`masm_ext.hashing.weight_hash` of the pretrained weight; needed to save an adapter.
        train_bias: train the bias.

    Attributes:
        principal: buffer [N, D]: W without its artifact part. It is not called ``weight``, so that a converted
            state_dict cannot be loaded into the pretrained model by mistake; the property ``weight`` returns it. After
            :func:`masm_ext.quantize` it is a tensor of 8 bits.
        u, s, v: parameters [R, N], [R], [R, D]; rows ``offsets[k]:offsets[k + 1]`` belong to subspace k. Beside a
            half-precision weight they are float32, and stay float32 after ``.to(torch.bfloat16)``, because bfloat16
            would round small updates away.
        bias: parameter [N] or None; frozen unless ``train_bias``.
        offsets: K + 1 row bounds.
        mask: buffer bool [K]. For a subspace with entry False, gradients are zero and :class:`masm_ext.MaskedAdamW`
            makes no update. With :class:`masm_ext.LayerMasks` it is a row of the table of masks.
        u0, s0, v0: buffers, the initial factors; :func:`masm_ext.load_adapter` rebuilds ``principal`` from them without
            an SVD.
        base_hash, base_dtype: SHA-256 (hexadecimal) and dtype of the pretrained weight. The state_dict holds the hash
            as extra state, not as a buffer, so that averaging or casting a model does not change it.
        directions: indices of the singular directions of W (0 = largest sigma) that the rows of u, s and v started
            from, negative for those of its gradient (-1 = the leading one); empty after loading a state_dict of another
            conversion.
        lift: what was added to the singular values at the start, in units of sigma_rms (``MASMConfig.lift``).
        layer_group: the group that the layer belongs to, or None; see :meth:`group`.
    """

    principal: Tensor
    mask: Tensor
    u0: Tensor
    s0: Tensor
    v0: Tensor
    weight_norm2: Tensor
    directions: tuple[int, ...] = ()
    #: Whether `principal` is a tensor of 8 bits; a flag, because torch.compile cannot look at the type.
    quantized: bool = False

    def __init__(
        self, parts: Decomposition, bias: Tensor | None = None, *, base_hash: str = "", train_bias: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = parts.weight.shape
        self.offsets = tuple(parts.offsets)
        self.base_dtype = parts.weight.dtype
        self.layer_group: LayerGroup | None = None
        self.energy = parts.energy
        self.lift = parts.lift
        self.directions = tuple(parts.directions)
        self.directions_hash = list_hash(self.directions)
        self.base_hash = base_hash
        #: Set by LayerMasks: optimizer steps taken, and probe steps left per subspace.
        self._steps: Tensor | None = None
        self._probing: Tensor | None = None
        #: Steps read from a state_dict, until the optimizer has compared them with its own.
        self.restored_steps: int | None = None
        self._hold_principal(parts.weight.detach())
        self.u = nn.Parameter(parts.u.detach().clone())
        self.s = nn.Parameter(parts.s.detach().clone())
        self.v = nn.Parameter(parts.v.detach().clone())
        self.register_buffer("u0", parts.u.detach().clone())
        self.register_buffer("s0", parts.s.detach().clone())
        self.register_buffer("v0", parts.v.detach().clone())
        self.register_buffer("mask", torch.ones(self.num_subspaces, dtype=torch.bool, device=parts.weight.device))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=train_bias)
        LAYERS.add(self)

    def _hold_principal(self, principal: Tensor) -> None:
        """Keep the principal part [N, D], and its squared norm for the losses. A PEFT adapter keeps neither."""
        self.register_buffer("principal", principal)
        self.register_buffer("weight_norm2", squared_norm(principal))

    def __setstate__(self, state: dict) -> None:  # copies and pickles
        super().__setstate__(state)
        LAYERS.add(self)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: MASMConfig, *, name: str = "linear", gradient: Tensor | None = None
    ) -> MASMLinear:
        """Decompose one layer, by an uncached SVD.

        Args:
            linear: a plain ``nn.Linear``; it is not changed.
            config: ranks, directions, partition and ``train_bias`` are read.
            name: name of the layer, for error messages.
            gradient: [N, D], of the loss with respect to the weight; needed if ``config.directions`` is "gradient".

        Returns:
            The layer, in the training mode of ``linear``.

        Raises:
            TypeError: ``linear`` is not exactly an ``nn.Linear``.
            ValueError: the ranks do not fit; the weight has NaN or infinite elements, or is on the meta device; the
                gradient is missing, not needed, of another shape, or not finite.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"{name}: expected an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight.detach()
        if weight.is_meta:
            raise ValueError(f"{name}: the weight is on the meta device; load the pretrained weights first")
        check_finite(weight, name)
        q = min(weight.shape)
        digest = weight_hash(weight)
        if config.needs_gradients != (gradient is not None):
            raise ValueError(
                f"{name}: directions 'gradient' need a gradient, and only they; got directions={config.directions!r} "
                f"and {'no' if gradient is None else 'a'} gradient"
            )
        dtype = accumulate_dtype(weight.dtype)
        if gradient is not None:
            ranks = choose_ranks(torch.empty(q), config.ranks, None, name)
            parts = split_along_gradient(weight, gradient, ranks, config.partition, dtype, config.lift)
        else:
            count = q if config.energy is not None else max(1, min(q, sum(config.ranks)))
            [spectrum] = compute_spectra([weight], count, [order_of(config.directions, q, digest)])
            ranks = choose_ranks(spectrum.sigma, config.ranks, config.energy, name, spectrum.order)
            parts = split(weight, spectrum, ranks, config.partition, dtype, config.lift)
        layer = cls(parts, linear.bias, base_hash=digest, train_bias=config.train_bias)
        return layer.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """:attr:`principal`. Not W: the dense weight is :meth:`folded_weight`."""
        return self.principal

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # the mask may be a row of a table, whose whole storage would be saved
        destination[prefix + "mask"] = self.mask.detach().clone()

    def get_extra_state(self) -> Tensor:
        """uint8 [128]: :class:`masm_ext.nn.extra_state.ExtraState`."""
        steps = self.restored_steps
        if steps is None or steps == ANY_STEP:
            steps = 0 if self._steps is None else int(self._steps)
        return ExtraState(self.base_hash, steps, self.directions_hash, list_hash(self.ranks), self.lift).to_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the identity of base weight and directions, the lift, and the step count, from a ``state_dict``.

        Args:
            state: uint8 [128], as :meth:`get_extra_state` returns it.

        Raises:
            ValueError: ``state`` does not have this form.
        """
        found = ExtraState.from_tensor(state)
        if (found.base_hash, found.directions_hash) != (self.base_hash, self.directions_hash):  # of another conversion
            self.base_hash, self.directions_hash, self.directions = found.base_hash, found.directions_hash, ()
        self.lift, self.restored_steps = found.lift, found.steps

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        state, s = state_dict.get(prefix + "_extra_state"), state_dict.get(prefix + "s")
        if state is not None:  # checked before a tensor is copied
            self._check_extra_state(prefix.removesuffix("."), ExtraState.from_tensor(state), s)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_extra_state(self, name: str, found: ExtraState, s: Tensor | None) -> None:
        """Raises ValueError if a state with these singular values cannot be that of this layer."""
        # other shapes are refused by torch, which lists them all
        if s is not None and s.shape == self.s.shape and found.ranks_hash != list_hash(self.ranks):
            raise ValueError(
                f"the state of {name!r} is that of subspaces of other ranks than the {list(self.ranks)} here: convert "
                "the model with the ranks of the saved one"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MASMLinear:
        wide = [self.u, self.s, self.v, self.u0, self.s0, self.v0]
        wide += [t for t in [self._buffers.get("weight_norm2")] if t is not None]
        wide += [p.grad for p in (self.u, self.s, self.v) if p.grad is not None]
        keep = {id(t) for t in wide}

        def keep_wide(t: Tensor) -> Tensor:
            out = fn(t)
            if id(t) in keep and out.dtype in HALF:
                return t.to(out.device, accumulate_dtype(out.dtype))
            return out

        super()._apply(keep_wide, recurse)
        if self.layer_group is not None:
            self.layer_group.lay_out()
        return self

    @staticmethod
    def group(layers: Sequence[MASMLinear], owner: nn.Module) -> None:
        """Run 2 to 4 layers that read the same x (query, key, value) as one call.

        Up to rounding, outputs and gradients are those of the single layers. On CUDA, x is read once for all layers,
        dX is summed over the layers before it is rounded, and there are fewer launches. On a CPU the layers run one
        after another. The first call computes the outputs of all layers, so group only layers that are always called
        with the same tensor. Under torch.compile and in inference mode the layers run one by one; in inference mode an
        in-place change of x could not be detected.

        Args:
            layers: layers with the same shape, ranks, dtype and device, all with or all without bias.
            owner: the module whose forward calls them, such as their attention. Only inside its forward they run as one
                call; outputs that it does not use are freed when it returns.

        Raises:
            ValueError: the layers differ, or one of them is already in a group.
        """
        check_group(layers)
        group = LayerGroup(layers, owner)
        group.lay_out()
        for layer in layers:
            layer.layer_group = group

    @staticmethod
    def ungroup(layers: Sequence[MASMLinear]) -> None:
        """Undo :meth:`group`.

        Args:
            layers: MASMLinears; every group that contains one of them is dissolved.
        """
        for layer in layers:
            if layer.layer_group is not None:
                layer.layer_group.dissolve()

    @property
    def selected_mask(self) -> Tensor:
        """bool [K]: the selected mask: ``mask``, but False for subspaces that are unmasked only for a probe."""
        return self.mask if self._probing is None else self.mask & (self._probing.to(self.mask.device) == 0)

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter of PEFT, whose weight belongs to the base model; False for a converted layer."""
        return False

    @property
    def is_active(self) -> bool:
        """Whether the layer takes part in the forward pass; False for a PEFT adapter that is not selected."""
        return True

    @property
    def num_subspaces(self) -> int:
        return len(self.offsets) - 1

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in pairwise(self.offsets))

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer, ``x W_hat^T + bias``, with ``W_hat`` the current weight.

        Args:
            x: [..., D], in the dtype of ``principal`` or under autocast.

        Returns:
            [..., N], in the dtype of ``x``.
        """
        if self.layer_group is not None:
            y = self.layer_group.output(self, x)
            if y is not None:
                return y
        product = quantized_subspace_linear if self.quantized else subspace_linear
        bias = self.own_bias()
        return product(x, self.principal, self.u, self.s, self.v, bias, offsets=self.offsets, mask=self.mask)

    def own_bias(self) -> Tensor | None:
        """The bias, in the dtype of a ``principal`` that FSDP2 gathers in half precision: a bias that learns stays
        float32 under its mixed-precision policy."""
        bias, sharded = self.bias, self._parameters.get("principal")
        return bias if bias is None or sharded is None else bias.to(sharded.dtype)

    @torch.no_grad()
    def folded_weight(self) -> Tensor:
        """The current dense weight, [N, D] in the dtype of ``weight``."""
        return fold(dense_weight(self.principal, self.principal.dtype), self.u, self.s, self.v)

    def base_norm(self) -> float:
        """``||W||_F`` of the pretrained weight: the root of ``||principal||^2 + 2 <principal, A> + ||A||^2``.

        A is the initial artifact part. It is not orthogonal to the principal part where it has a lift.
        """
        u0, s0, v0 = self.u0.double(), self.s0.double(), self.v0.double()
        wide = dense_weight(self.principal, accumulate_dtype(self.principal.dtype))
        cross = ((self.u0.to(wide.dtype) @ wide).double() * v0).sum(1) @ s0
        own = ((u0 @ u0.mT) * (v0 @ v0.mT) * s0[:, None] * s0).sum()
        return math.sqrt(max(0.0, float(self.weight_norm2.double() + 2 * cross + own)))

    @torch.no_grad()
    def relative_update(self) -> float:
        """``||W_hat - W||_F / ||W||_F``, with ``W_hat`` the current weight; the difference is that of the factors."""
        a = torch.cat([self.u, self.u0]).double()  # [2R, N]
        b = torch.cat([self.v, self.v0]).double()  # [2R, D]
        c = torch.cat([self.s, -self.s0]).double()
        change = (c[:, None] * c * (a @ a.mT) * (b @ b.mT)).sum().clamp_min(0)
        base = self.base_norm()
        return float(change.sqrt()) / base if base > 0 else 0.0

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the folded weight, frozen."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(self.folded_weight(), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Shape, ranks and dtype, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"subspaces={self.num_subspaces}, ranks={list(self.ranks)}, dtype={self.principal.dtype}"
        )


def squared_norm(weight: Tensor) -> Tensor:
    """``||weight||_F^2``, summed in float64, a scalar in the dtype of the factors beside ``weight``."""
    norm = torch.linalg.vector_norm(weight, dtype=torch.float64)
    return norm.square().to(accumulate_dtype(weight.dtype))


def masm_layers(model: nn.Module | Sequence[MASMLinear]) -> dict[str, MASMLinear]:
    """The active MASMLinears of a model by module name, in module order; names are those inside wrappers such as DDP.

    Given a sequence, its layers by their index. Raises ValueError if their factors are divided among processes.
    """
    if isinstance(model, nn.Module):
        layers = {name: layer for name, layer in modules_of(model, MASMLinear).items() if layer.is_active}
    else:
        layers = {str(i): layer for i, layer in enumerate(model)}
    check_not_divided((p for x in layers.values() for p in (x.u, x.s, x.v)), "MASMLinear")
    return layers
