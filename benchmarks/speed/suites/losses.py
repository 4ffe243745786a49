"""The two penalties with their gradients: over plain PyTorch (stacked for speed), and as a share of a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from bench import Call, Outcome, interleave, statistics
from cases import DTYPES, MODELS, SUBSPACES, Case, Options
from providers import check, relative_error
from torch import Tensor, nn
from training import RANK, Program, plain_loss, stacked_loss

from masm_ext import MASMConfig, MASMLinear, regularization_loss
from masm_ext.decomposition import Decomposition
from masm_ext.losses import penalty_gradients, penalty_parameters

Loss = Callable[[nn.ModuleList, MASMConfig], Tensor]
#: What MaskedAdamW calls in each step: values and gradients without autograd. Sums over the layers, not means.
DECOUPLED = "masm-decoupled"
LOSSES: dict[str, Loss] = {"stacked": stacked_loss, "masm": regularization_loss, "formula": plain_loss}
#: Relative error of the value and of the gradients against the formula in float64. bfloat16: the frozen weight is
#: exact in both, the factors are float32.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}


def cases(options: Options) -> list[Case]:
    models = ("vit-s",) if options.quick else ("vit-l",) if options.on_gpu else ("vit-s", "vit-l")
    out = []
    for dtype in options.model_dtypes:
        for model in models:
            values = {"model": model, "R": RANK, "K": SUBSPACES, "linears": len(MODELS[model].linears)}
            chosen = names(options)
            goals = {("losses", name): 1.0 for name in ("masm", DECOUPLED) if name in chosen}
            out.append(Case("losses", model, dtype, "stacked", values, goals, options.seconds + 8))
        values = {"model": options.model, "batch": options.batch, "R": RANK, "K": SUBSPACES}
        values["converted"] = options.defaults.converted
        name, estimate = f"share of the step/{options.model}", options.seconds + 20
        out.append(Case("losses", name, dtype, "step without losses", values, estimate=estimate))
    return out


def names(options: Options, case: Case | None = None) -> list[str]:
    if case is not None and case.baseline != "stacked":
        return [case.baseline, "step with losses"]
    return options.chosen(("stacked", "masm", DECOUPLED, "formula"), "stacked")


def layers_of(
    shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device, subspaces: int, rank: int
) -> nn.ModuleList:
    """MASMLinears with random weights and orthonormal factors, moved a little, so that no term is zero."""
    offsets = tuple(range(0, rank + 1, rank // subspaces))
    layers = nn.ModuleList()
    for N, D in shapes:
        u, v = (torch.linalg.qr(torch.randn(n, rank, device=device))[0].mT.contiguous() for n in (N, D))
        s = torch.rand(rank, device=device) + 0.1
        weight = (torch.randn(N, D, device=device) / D**0.5).to(dtype)
        layer = MASMLinear(Decomposition(weight, u, s, v, offsets, 0.0))
        with torch.no_grad():
            for p in (layer.u, layer.s, layer.v):
                p.add_(torch.randn_like(p) * p.square().mean().sqrt(), alpha=0.05)
        layers.append(layer)
    return layers


def decoupled(layers: nn.ModuleList, config: MASMConfig) -> tuple[Tensor, list[Tensor]]:
    """The weighted mean of both penalties and its gradients, in the order of the layers and u, s and v of each."""
    values, [flat] = penalty_gradients(list(layers))
    [parameters] = penalty_parameters(list(layers))
    weights = (config.orthogonality / len(layers), config.spectral_consistency / len(layers))
    loss, weighted = (weights[0] * t[0] + weights[1] * t[1] for t in (values, flat))
    pieces = weighted.split([p.numel() for p in parameters])
    of = {id(p): piece.view(p.shape) for p, piece in zip(parameters, pieces)}
    return loss, [of[id(p)] for layer in layers for p in (layer.u, layer.s, layer.v)]


def by_autograd(function: Loss, layers: nn.ModuleList, config: MASMConfig) -> tuple[Tensor, Sequence[Tensor]]:
    """As :func:`decoupled`, of a loss."""
    loss = function(layers, config)
    return loss, torch.autograd.grad(loss, [p for layer in layers for p in (layer.u, layer.s, layer.v)])


def gate(layers: nn.ModuleList, name: str, config: MASMConfig, tolerance: float) -> dict[str, float]:
    """Relative errors of a contender's value and gradients against the formula in float64. Raises GateError."""
    if name == DECOUPLED:
        loss, found = decoupled(layers, config)
    else:
        loss, found = by_autograd(LOSSES[name], layers, config)
    exact_loss, exact = by_autograd(partial(plain_loss, dtype=torch.float64), layers, config)
    errors = {"loss": relative_error(loss, exact_loss)}
    for i, letter in enumerate("usv"):
        flat = [torch.cat([g.flatten().double() for g in grads[i::3]]) for grads in (found, exact)]
        errors[f"d{letter}"] = relative_error(*flat)
    check(errors, tolerance, tolerance)
    return errors


def measure(case: Case, options: Options) -> Outcome:
    if case.baseline == "step without losses":
        return _share(case, options)
    outcome, device, values = Outcome(case), torch.device(options.device), case.values
    torch.manual_seed(0)
    R = values["K"] if options.dry_run else values["R"]
    shapes = MODELS["tiny" if options.dry_run else values["model"]].linears
    layers = layers_of(shapes, DTYPES[case.dtype], device, values["K"], R)
    config = MASMConfig(num_subspaces=values["K"], subspace_rank=R // values["K"])
    calls: dict[str, Call] = {}
    for name in names(options, case):
        with outcome.provider(name):
            outcome.errors[name] = gate(layers[:12], name, config, TOLERANCE[case.dtype])
            calls[name] = Call(lambda name=name: _step(layers, name, config))
    if not options.dry_run:
        progress = case.key if options.progress else ""
        samples = interleave(
            calls, device, options.seconds, least=3, warm_up=1, progress=progress, on_failure=outcome.fail
        )
        outcome.add("losses", statistics(samples, case.baseline))
    return outcome


def _step(layers: nn.ModuleList, name: str, config: MASMConfig) -> None:
    if name == DECOUPLED:
        penalty_gradients(list(layers))
        return
    for p in layers.parameters():
        p.grad = None
    LOSSES[name](layers, config).backward()


def _share(case: Case, options: Options) -> Outcome:
    """The same training step with and without decoupled penalties: the ratio less one is their share."""
    outcome, device, values = Outcome(case), torch.device(options.device), case.values
    size = MODELS["tiny" if options.dry_run else values["model"]]
    batch = 2 if options.dry_run else values["batch"]
    calls: dict[str, Call] = {}
    for name, on in zip(names(options, case), (False, True)):
        with outcome.provider(name):
            which = case.values["converted"]
            program = Program("masm", size, DTYPES[case.dtype], device, batch, options.cache, losses=on, which=which)
            if options.dry_run:
                program()
            calls[name] = Call(program)
    if not options.dry_run:
        progress = case.key if options.progress else ""
        samples = interleave(calls, device, options.seconds, progress=progress, on_failure=outcome.fail)
        outcome.add("step", statistics(samples, case.baseline))
    return outcome
