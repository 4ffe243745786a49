"""The layers that are compared, each as a user of its library would have it, and the gate that all must pass.

A provider adapts named linear layers of a model in place, so that one definition serves a single layer and a whole
model. It also defines its formula, as a dense weight made of its trained tensors. From the formula the gate computes
the float64 output and gradients, and compares the layer with them. All providers train the same number R of directions,
except where their docstring names a difference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from bench import GateError, Unavailable
from masm_detect.methods.effort import EffortLinear
from masm_detect.methods.layers import replace_module
from torch import Tensor, nn

from masm_ext import MASMConfig, MASMLinear, convert
from masm_ext.ops import subspace_linear
from masm_ext.ops.strategies import ADDMM, FOLDED, KEXT, SINGLE, STREAM

#: Largest relative error against float64 by dtype: (output and dX, gradients of the trained tensors). float32: sums of
#: up to 4096 products. bfloat16: roundings of 2^-9 of the output, of a rebuilt weight and of its gradient.
TOLERANCE = {torch.float32: (1e-5, 5e-5), torch.bfloat16: (1e-2, 3e-2)}


@dataclass(frozen=True)
class Setting:
    """R directions in K subspaces, and the folder where the SVDs of a run are kept."""

    rank: int
    subspaces: int
    cache: Path | None = None


@dataclass(frozen=True)
class Formula:
    """What a layer computes: `y = x dense(trained)^T + bias`, `dense` working on float64 copies of `trained`.

    `project(name, gradient)`: what becomes of a gradient afterwards (masked rows are zero, OSF projects).
    """

    trained: dict[str, nn.Parameter]
    dense: Callable[[Mapping[str, Tensor]], Tensor]
    bias: Tensor | None
    project: Callable[[str, Tensor], Tensor] = lambda name, gradient: gradient


class Provider:
    """`adapt` changes the linears `names` of `model` in place; `formula` says what one of them now computes."""

    name: str
    compiled = False

    def adapt(self, model: nn.Module, names: list[str], setting: Setting) -> None:
        raise NotImplementedError

    def formula(self, layer: nn.Module) -> Formula:
        raise NotImplementedError


class Frozen(Provider):
    """The baseline: `nn.Linear` with nothing to train; forward and dX, two dense products."""

    name = "frozen"

    def adapt(self, model: nn.Module, names: list[str], setting: Setting) -> None:
        model.requires_grad_(False)

    def formula(self, layer: nn.Module) -> Formula:
        return Formula({}, lambda _: layer.weight.double(), layer.bias)


class Masm(Provider):
    """`masm_ext.convert`: K subspaces of together R directions, factors float32 also beside a bfloat16 weight."""

    name = "masm"

    def adapt(self, model: nn.Module, names: list[str], setting: Setting) -> None:
        config = MASMConfig(
            target_modules=names, num_subspaces=setting.subspaces, subspace_rank=setting.rank // setting.subspaces
        )
        convert(model, config, cache_dir=setting.cache, use_cache=setting.cache is not None, progress=False)

    def formula(self, layer: nn.Module) -> Formula:
        return _split(layer)


class MasmMasked(Masm):
    """The same with every block masked: dX only, no gradient of a factor."""

    name = "masm-masked"

    def adapt(self, model: nn.Module, names: list[str], setting: Setting) -> None:
        super().adapt(model, names, setting)
        for name in names:
            model.get_submodule(name).mask.fill_(False)


class ForcedLinear(nn.Module):
    """A MASMLinear whose calls are all computed by one strategy of `masm_ext.ops.strategies`."""

    def __init__(self, layer: MASMLinear, strategy: str) -> None:
        super().__init__()
        self.layer, self.strategy = layer, strategy

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        factors = (layer.principal, layer.u, layer.s, layer.v, layer.bias)
        try:
            return subspace_linear(x, *factors, offsets=layer.offsets, mask=layer.mask, strategy=self.strategy)
        except RuntimeError as error:
            if f"strategy '{self.strategy}'" not in str(error):
                raise
            raise Unavailable(str(error)) from error


class MasmForced(Masm):
    """masm with one strategy for every call, whatever the table would choose; on CUDA only."""

    def __init__(self, strategy: str) -> None:
        self.name, self.strategy = f"masm-{strategy}", strategy

    def adapt(self, model: nn.Module, names: list[str], setting: Setting) -> None:
        if not all(model.get_submodule(name).weight.is_cuda for name in names):
            raise Unavailable("needs an NVIDIA GPU: a strategy is a way to compute the call on CUDA")
        super().adapt(model, names, setting)
        for name in names:
            replace_module(model, name, ForcedLinear(model.get_submodule(name), self.strategy))

    def formula(self, layer: nn.Module) -> Formula:
        return _split(layer.layer)


class ReferenceLinear(nn.Module):
    """The formula of `masm_ext.reference` under plain autograd, as one would write it by hand: the dense product in the
    dtype of x, the low-rank part in that of the factors (float32 beside bfloat16).
    """

    def __init__(self, layer: MASMLinear) -> None:
        super().__init__()
        self.register_buffer("weight", layer.principal)
        self.bias, self.u, self.s, self.v = layer.bias, layer.u, layer.s, layer.v
        # The layer the factors are shared with, for the losses; in a tuple, so that it is no submodule.
        self._masm = (layer,)

    @property
    def parts(self) -> MASMLinear:
        return self._masm[0]

    def forward(self, x: Tensor) -> Tensor:
        low_rank = ((x.to(self.v.dtype) @ self.v.mT) * self.s) @ self.u
        return F.linear(x, self.weight, self.bias) + low_rank.to(x.dtype)


class Reference(Masm):
    """The same formula and the same factors as masm in plain PyTorch (`ReferenceLinear`), eager."""

    name = "reference"

    def adapt(self, model: nn.Module, names: list[str], setting: Setting) -> None:
        super().adapt(model, names, setting)
        for name in names:
            replace_module(model, name, ReferenceLinear(model.get_submodule(name)))


class Compiled(Reference):
    """The reference under `torch.compile`: what a compiler makes of it without our kernels."""

    name = "compiled"
    compiled = True


class Effort(Masm):
    """`masm_detect.methods.effort.EffortLinear`, our implementation of Effort (ICML 2025), on the factors of masm.

    Effort itself trains one direction; here R. Rebuilds the dense weight in each forward pass. Factors in the model's
    dtype.
    """

    name = "effort"

    def adapt(self, model: nn.Module, names: list[str], setting: Setting) -> None:
        super().adapt(model, names, setting)
        for name in names:
            layer = model.get_submodule(name)
            factors = (t.detach().to(layer.weight.dtype) for t in (layer.u, layer.s, layer.v))
            bias = None if layer.bias is None else layer.bias.detach()
            replace_module(model, name, EffortLinear(layer.weight, bias, *factors))


class PeftLora(Provider):
    """Hugging Face PEFT, LoRA: `W + B A` of rank R without singular values. Its default keeps A and B in float32 beside
    a bfloat16 weight.
    """

    name = "peft-lora"
    init: bool | str = True

    def adapt(self, model: nn.Module, names: list[str], setting: Setting) -> None:
        peft = _needs("peft")
        config = peft.LoraConfig(
            r=setting.rank, lora_alpha=setting.rank, target_modules=names, init_lora_weights=self.init
        )
        peft.get_peft_model(model, config)  # changes `model` in place; the wrapper it returns is not needed

    def formula(self, layer: nn.Module) -> Formula:
        base, scale = layer.base_layer, layer.scaling["default"]
        trained = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
        return Formula(trained, lambda t: base.weight.double() + scale * t["B"] @ t["A"], base.bias)


class PeftPissa(PeftLora):
    """PEFT's PiSSA: LoRA that starts as the R principal directions, taken out of the weight."""

    name = "peft-pissa"
    init = "pissa"


class PeftOsf(Provider):
    """PEFT's OSF: trains the last R directions, keeps their initial values and multiplies by both in every forward
    pass; gradients are projected off the frozen directions. Factors in the model's dtype: with PEFT's default
    (`autocast_adapter_dtype=True`) a bfloat16 model gets new float32 parameters and OSF's projection, a hook on the old
    ones, is lost (peft 0.21.2; the gate refused it).
    """

    name = "peft-osf"

    def adapt(self, model: nn.Module, names: list[str], setting: Setting) -> None:
        peft = _needs("peft")
        # OSF's rank is the number of directions kept frozen, so it depends on the shape of the layer.
        frozen = {name: min(model.get_submodule(name).weight.shape) - setting.rank for name in names}
        config = peft.OSFConfig(target_modules=names, rank_pattern=frozen)
        peft.get_peft_model(model, config, autocast_adapter_dtype=False)

    def formula(self, layer: nn.Module) -> Formula:
        base, trained = layer.base_layer, dict(layer.osf_svd_params["default"].items())
        start = {n: getattr(layer, f"_osf_{n}_init")["default"].double() for n in ("U_low", "S_low", "V_low")}
        high = {n: getattr(layer, f"_osf_{n}") for n in ("U_high", "V_high")}

        def product(t: Mapping[str, Tensor]) -> Tensor:
            return (t["U_low"] * t["S_low"]) @ t["V_low"]

        def project(name: str, gradient: Tensor) -> Tensor:
            if name == "S_low":
                return gradient
            kept = high[name.replace("low", "high")]
            rows = gradient if name == "U_low" else gradient.mT
            if "default" in kept:
                q = kept["default"].double()
                q = q if name == "U_low" else q.mT
                out = rows - q @ (q.mT @ rows)
            else:  # the complement of the frozen directions is spanned by the initial trained ones
                q = start[name] if name == "U_low" else start[name].mT
                out = q @ (q.mT @ rows)
            return out if name == "U_low" else out.mT

        return Formula(trained, lambda t: base.weight.double() + product(t) - product(start), base.bias, project)


class MasmPeft(Provider):
    """MASM as a method of PEFT (`masm_ext.integrations.peft`): the weight of the base stays as it is, so a forward pass
    multiplies by the initial factors too, 2R directions in one call.
    """

    name = "masm-peft"

    def adapt(self, model: nn.Module, names: list[str], setting: Setting) -> None:
        peft = _needs("peft")
        from masm_ext.integrations.peft import MASMTunerConfig

        rank = setting.rank // setting.subspaces
        config = MASMTunerConfig(target_modules=names, num_subspaces=setting.subspaces, subspace_rank=rank)
        peft.get_peft_model(model, config)

    def formula(self, layer: nn.Module) -> Formula:
        own = layer.masm_subspaces["default"]
        start = (own.u0.double().mT * own.s0.double()) @ own.v0.double()

        def dense(t: Mapping[str, Tensor]) -> Tensor:
            return layer.base_layer.weight.double() - start + (t["u"].mT * t["s"]) @ t["v"]

        return Formula({"u": own.u, "s": own.s, "v": own.v}, dense, layer.base_layer.bias)


class EigenTune(Provider):
    """eigentune, `method="diagonal"`: frozen bases of the R *principal* directions, only R scales trained, so it has no
    gradient of u and v to compute. Its Triton and CUDA kernels run on CUDA only; on a CPU it runs its torch formula.
    """

    name = "eigentune"

    def adapt(self, model: nn.Module, names: list[str], setting: Setting) -> None:
        eigentune = _needs("eigentune")
        config = eigentune.EigenTuneConfig(rank=setting.rank, target_modules=names, svd_backend="exact")
        eigentune.get_eigentune_model(model, config)

    def formula(self, layer: nn.Module) -> Formula:
        def dense(t: Mapping[str, Tensor]) -> Tensor:
            return layer.base.weight.double() + (layer.U.double() * t["delta"]) @ layer.Vh.double()

        return Formula({"delta": layer.delta}, dense, layer.base.bias)


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        *(Frozen(), Masm(), MasmMasked()),
        *(MasmForced(strategy) for strategy in (KEXT, SINGLE, STREAM, ADDMM, FOLDED)),
        *(Reference(), Compiled()),
        *(Effort(), PeftLora(), PeftPissa(), PeftOsf(), MasmPeft(), EigenTune()),
    )
}


def _needs(package: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f'needs the package {package}: pip install "masm_ext[peers]" ({error})') from error


def _split(layer: nn.Module) -> Formula:
    """`weight + u^T diag(s) v`, the form of masm, of its reference and of Effort."""

    def project(name: str, gradient: Tensor) -> Tensor:
        if not isinstance(layer, MASMLinear) or layer.mask.all():
            return gradient
        live = torch.cat([bit.expand(rank) for bit, rank in zip(layer.mask, layer.ranks)])  # [R]
        return torch.where(live if gradient.dim() == 1 else live[:, None], gradient, 0)

    def dense(t: Mapping[str, Tensor]) -> Tensor:
        return layer.weight.double() + (t["u"].mT * t["s"]) @ t["v"]

    return Formula({"u": layer.u, "s": layer.s, "v": layer.v}, dense, layer.bias, project)


@torch.no_grad()
def stir(formula: Formula) -> None:
    """Move the trained tensors off their start, so that a layer that ignores them fails the gate: at the start LoRA's B
    is zero, and the last singular values are so small that the output hardly shows them.
    """
    size = formula.dense({name: p.double() for name, p in formula.trained.items()}).norm()  # ||W||
    for p in formula.trained.values():
        if p.dim() == 1:
            # Orthonormal directions scaled like this hold about half the norm of the weight.
            p.copy_((0.5 + torch.rand_like(p)) * (size / 2 / p.numel() ** 0.5).to(p))
        elif not p.any():
            p.copy_(torch.randn_like(p) * (size / p.numel() ** 0.5).to(p))
        else:
            p.add_(torch.randn_like(p), alpha=0.05 * float(p.square().mean().sqrt()))


def gate(provider: Provider, layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, float]:
    """Relative errors of y, dX and the gradients of `layer` against float64: {name: error}.

    x [M, D], dy [M, N] in the dtype of the layer. Raises GateError if one is above TOLERANCE, or if a gradient is
    missing or there where none should be.
    """
    formula = provider.formula(layer)
    x = x.detach().requires_grad_()
    _clear(formula)
    y = layer(x)
    y.backward(dy)
    exact = {name: p.detach().double().requires_grad_() for name, p in formula.trained.items()}
    x64 = x.detach().double().requires_grad_()
    bias = None if formula.bias is None else formula.bias.detach().double()
    y64 = F.linear(x64, formula.dense(exact), bias)
    y64.backward(dy.double())
    errors = {"y": relative_error(y, y64), "dX": relative_error(x.grad, x64.grad)}
    for name, p in formula.trained.items():
        errors[f"d{name}"] = relative_error(p.grad, formula.project(name, exact[name].grad))
    _clear(formula)
    check(errors, *TOLERANCE[x.dtype])
    return errors


def check(errors: Mapping[str, float], tolerance: float, gradient_tolerance: float) -> None:
    """Raises GateError naming every error above its tolerance; NaN is above every one."""
    limits = {name: tolerance if name in ("y", "dX") else gradient_tolerance for name in errors}
    wrong = [f"{name} {value:.2g} > {limits[name]:.0e}" for name, value in errors.items() if not value <= limits[name]]
    if wrong:
        raise GateError(f"differs from the float64 reference: {', '.join(wrong)} (relative)")


def relative_error(out: Tensor | None, exact: Tensor) -> float:
    """||out - exact|| / ||exact||. A missing `out` counts as zeros; anything else than zeros for zeros is infinite."""
    norm, out = float(exact.detach().norm()), torch.zeros_like(exact) if out is None else out.detach().double()
    distance = float((out - exact.detach()).norm())
    return distance / norm if norm > 0 else (0.0 if distance == 0 else float("inf"))


def _clear(formula: Formula) -> None:
    for p in formula.trained.values():
        p.grad = None
