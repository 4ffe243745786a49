"""The factors of one adapter at one layer."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...config import MASMConfig
from ...contract import accumulate_dtype
from ...convert import split_along_spectra
from ...decomposition import Decomposition, bounds, choose_ranks, principal
from ...nn.extra_state import ExtraState
from ...nn.masm_linear import ANY_STEP, MASMLinear, squared_norm
from ...ops import fold
from ...spectra import SpectrumCache

#: The tensors that a saved adapter holds per layer.
VALUES = ("u", "s", "v", "u0", "s0", "v0", "mask")


class Holder(Protocol):
    """What an adapter reads of the layer that holds it, a :class:`MASMTunerLinear`."""

    active_adapters: list[str]

    def pretrained(self) -> tuple[Tensor, Tensor | None]:
        """Weight [N, D] and bias [N] of the base, without any merged adapter."""


class AdapterSubspaces(MASMLinear):
    """The subspaces of one adapter at one layer whose weight W belongs to the base model and is not changed.

    The adapter adds ``u^T diag(s) v - u0^T diag(s0) v0`` to W. Masks, penalties, optimizer and parameter groups treat
    it as any :class:`masm_ext.MASMLinear`. It holds no dense weight: :attr:`principal` is computed when a penalty
    needs it, and then kept.

    Args:
        tuner: the layer of PEFT that holds W.
        adapter: the name of the adapter.
        parts: the decomposition of W.
        bias: [N], the initial bias, copied and trained; None: the bias of the base stays.
        base_hash: :func:`masm_ext.hashing.weight_hash` of W.
        loaded: the factors have values; False: they are placeholders until a state_dict is loaded.
    """

    def __init__(
        self,
        tuner: Holder,
        adapter: str,
        parts: Decomposition,
        bias: Tensor | None,
        *,
        base_hash: str,
        loaded: bool,
    ) -> None:
        super().__init__(parts, bias, base_hash=base_hash, train_bias=True)
        self.adapter, self.loaded = adapter, loaded
        self.base_has_bias = tuner.pretrained()[1] is not None
        # not a submodule: it is the parent of this module
        self.__dict__["tuner"] = tuner
        self._principal: tuple[tuple, Tensor, Tensor] | None = None

    def _hold_principal(self, principal: Tensor) -> None:
        pass

    @property
    def is_adapter(self) -> bool:
        """True: the weight belongs to the base model."""
        return True

    @property
    def is_active(self) -> bool:
        """Whether the adapter is one of those selected by ``set_adapter``."""
        return self.adapter in self.tuner.active_adapters

    @property
    def base_weight(self) -> Tensor:
        """W [N, D], without gradient, without any merged adapter."""
        return self.tuner.pretrained()[0].detach()

    @property
    def principal(self) -> Tensor:  # type: ignore[override]
        """``W - u0^T diag(s0) v0`` [N, D]. The first access computes it in float64 and keeps it."""
        return self._of_principal()[0]

    @property
    def weight_norm2(self) -> Tensor:  # type: ignore[override]
        """``||principal||_F^2``, a scalar."""
        return self._of_principal()[1]

    def _of_principal(self) -> tuple[Tensor, Tensor]:
        sources = (self.base_weight, self.u0, self.s0, self.v0)
        state = tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in sources)
        if self._principal is None or self._principal[0] != state:
            weight = principal(*sources)
            self._principal = state, weight, squared_norm(weight)
        return self._principal[1:]

    def _apply(self, fn: Any, recurse: bool = True) -> AdapterSubspaces:
        self._principal = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_principal": None}

    def forward(self, x: Tensor) -> Tensor:
        """Not called: :class:`MASMTunerLinear` computes the sum of all active adapters at once.

        Args:
            x: not read.
        """
        raise NotImplementedError("call the MASMTunerLinear that holds this adapter")

    @torch.no_grad()
    def folded_weight(self) -> Tensor:
        """W with this adapter alone, [N, D] in the dtype of W."""
        return fold(self.base_weight, *difference([self]))

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` with W and this adapter alone, and the bias that it uses, frozen."""
        linear = super().to_linear()
        bias = self.tuner.pretrained()[1]
        if linear.bias is None and bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return linear

    def base_norm(self) -> float:
        """``||W||_F``."""
        return float(torch.linalg.vector_norm(self.base_weight, dtype=torch.float64))

    def extra_repr(self) -> str:
        """Shape and ranks, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"subspaces={self.num_subspaces}, ranks={list(self.ranks)}"
        )

    def set_extra_state(self, state: Tensor) -> None:
        """As :meth:`masm_ext.MASMLinear.set_extra_state`, but any optimizer may go on, as after load_adapter.

        Args:
            state: uint8 [128], as ``get_extra_state`` returns it.
        """
        super().set_extra_state(state)
        self.restored_steps = ANY_STEP

    def _check_extra_state(self, name: str, found: ExtraState, s: Tensor | None) -> None:
        if self.base_hash and found.base_hash and self.base_hash != found.base_hash:
            raise ValueError(
                f"adapter {self.adapter!r} was trained on a weight with SHA-256 {found.base_hash[:12]}..., the weight "
                f"here has {self.base_hash[:12]}...: load it on the same pretrained checkpoint, or with "
                "check_base=False in its config"
            )
        if found.lift != self.lift:
            raise ValueError(
                f"adapter {self.adapter!r} has lift={self.lift} in its config, but the state of {name!r} was trained "
                f"with {found.lift}: make the adapter with that lift"
            )
        super()._check_extra_state(name, found, s)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        found = {name for name in VALUES if prefix + name in state_dict}
        if found and found != set(VALUES):
            missing = ", ".join(sorted(set(VALUES) - found))
            args[-1].append(f"adapter {self.adapter!r}: {prefix.removesuffix('.')} lacks {missing}")  # error_msgs
        elif found:
            self.loaded = True

    def has_values(self) -> bool:
        """Whether the factors are no placeholders. Waits for the device, once, if another loader than PEFT's set them.

        The rows of all factors but s have a length, so a factor of zeros is a placeholder.
        """
        if not self.loaded:
            self.loaded = all(not t.is_meta and bool(t.any()) for t in (self.u, self.v, self.u0, self.v0))
        return self.loaded

    def record(self) -> dict[str, Any]:
        """What a saved config holds of this layer: row bounds, directions, and the identity of its weight."""
        return {
            "offsets": list(self.offsets),
            "energy": self.energy,
            "directions": list(self.directions),
            "base_sha256": self.base_hash,
            "dtype": str(self.base_dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
            "bias": self.base_has_bias,
        }


def difference(layers: list[AdapterSubspaces]) -> tuple[Tensor, Tensor, Tensor]:
    """The factors (u, s, v) of what adapters add to W together: [2R, N], [2R], [2R, D], R the sum over the adapters.

    Differentiable in the factors of the adapters.
    """
    u = torch.cat([t for layer in layers for t in (layer.u, layer.u0)])
    s = torch.cat([t for layer in layers for t in (layer.s, -layer.s0)])
    v = torch.cat([t for layer in layers for t in (layer.v, layer.v0)])
    return u, s, v


def decompose(weight: Tensor, digest: str, config: MASMConfig, name: str) -> Decomposition:
    """Split W [N, D] as :func:`masm_ext.convert` would, with its cache of SVDs."""
    if config.energy is None:
        choose_ranks(torch.empty(min(weight.shape)), config.ranks, None, name)  # before the SVD
    return split_along_spectra({name: weight}, {name: digest}, config, SpectrumCache(), False)[name]


def placeholder(
    weight: Tensor, offsets: tuple[int, ...], lift: float, energy: float = 0.0, directions: tuple[int, ...] = ()
) -> Decomposition:
    """Factors of the right shapes without values, for a state_dict to fill."""
    (N, D), R, dtype = weight.shape, offsets[-1], accumulate_dtype(weight.dtype)
    u, s, v = (weight.new_zeros(shape, dtype=dtype) for shape in ((R, N), (R,), (R, D)))
    return Decomposition(weight, u, s, v, offsets, energy, directions, lift)


def unfilled(weight: Tensor, config: MASMConfig, name: str) -> Decomposition:
    """A :func:`placeholder` with the ranks of a config without ``energy``."""
    ranks = choose_ranks(torch.empty(min(weight.shape)), config.ranks, None, name)
    return placeholder(weight, bounds(ranks), config.lift)


@torch.no_grad()
def randomize(layer: AdapterSubspaces, sigma_rms: float) -> None:
    """Random u, s, v with rows of about unit length and singular values of about ``sigma_rms``."""
    for factor in (layer.u, layer.v):
        factor.normal_().div_(factor.shape[1] ** 0.5)
    layer.s.normal_().mul_(sigma_rms)
