"""Query, key and value: three layers on one x, one after another or as one call, over three frozen `nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from bench import Call, Clock, Outcome, interleave, statistics
from cases import BOTH, DTYPES, FORWARD, GROUPS, SUBSPACES, Case, Options
from providers import PROVIDERS, TOLERANCE, Formula, Setting, check, relative_error, stir
from torch import Tensor, nn

from masm_ext import group_projections

NAMES = ("query", "key", "value")
#: Name in the tables -> provider, and whether its layers are grouped.
CONTENDERS = {"frozen": ("frozen", False), "masm": ("masm", False), "masm-group": ("masm", True)}


def cases(options: Options) -> list[Case]:
    out = []
    for dtype, N, D, R in GROUPS:
        if dtype not in options.dtypes or (options.on_gpu and dtype not in options.model_dtypes):
            continue
        values = {"M": options.defaults.tokens, "N": N, "D": D, "R": R, "K": SUBSPACES, "layers": len(NAMES)}
        estimate = 2 * options.seconds + 10 + options.compile_seconds / 2
        out.append(Case("group", f"{len(NAMES)} x {N}x{D}/R{R}", dtype, "frozen", values, estimate=estimate))
    return out


def names(options: Options, case: Case | None = None) -> list[str]:
    return options.chosen(tuple(CONTENDERS), "frozen")


class Projections(nn.Module):
    """x [M, D] -> three [M, N], as an attention calls its projections."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
        super().__init__()
        for name, weight, bias in zip(NAMES, weights, biases):
            linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name)(x) for name in NAMES)


def gate(model: Projections, formulas: Sequence[Formula], x: Tensor, dys: Sequence[Tensor]) -> dict[str, float]:
    """Relative errors against float64: of the outputs, of dX (a sum over the layers) and of the gradients of each kind
    of trained tensor, all layers together. x [M, D], dys three [M, N]. Raises GateError."""
    x = x.detach().requires_grad_()
    ys = model(x)
    torch.autograd.backward(ys, list(dys))
    exact = [{name: p.detach().double().requires_grad_() for name, p in f.trained.items()} for f in formulas]
    x64 = x.detach().double().requires_grad_()
    ys64 = [F.linear(x64, f.dense(trained), f.bias.detach().double()) for f, trained in zip(formulas, exact)]
    torch.autograd.backward(ys64, [dy.double() for dy in dys])
    errors = {"y": relative_error(torch.cat(ys), torch.cat(ys64)), "dX": relative_error(x.grad, x64.grad)}
    for name in formulas[0].trained:
        found = torch.cat([f.trained[name].grad.flatten() for f in formulas])
        errors[f"d{name}"] = relative_error(found, torch.cat([trained[name].grad.flatten() for trained in exact]))
    for f in formulas:
        for p in f.trained.values():
            p.grad = None
    check(errors, *TOLERANCE[x.dtype])
    return errors


def measure(case: Case, options: Options) -> Outcome:
    outcome, device, dtype = Outcome(case), torch.device(options.device), DTYPES[case.dtype]
    M, N, D, R, K = (case.values[name] for name in "MNDRK")
    if options.dry_run:
        M, N, D, R = 33, N // 64, D // 64, max(K, R // 2)
    torch.manual_seed(0)
    x = torch.randn(M, D, device=device).to(dtype).requires_grad_()
    dys = [torch.randn(M, N, device=device).to(dtype) for _ in NAMES]
    weights = [(torch.randn(N, D, device=device) / D**0.5).to(dtype) for _ in NAMES]
    biases = [torch.randn(N, device=device).to(dtype) for _ in NAMES]
    models: dict[str, Projections] = {}
    for name in names(options):
        with outcome.provider(name):
            provider, grouped = PROVIDERS[CONTENDERS[name][0]], CONTENDERS[name][1]
            model = Projections(weights, biases)
            provider.adapt(model, list(NAMES), Setting(R, K, options.cache))
            if grouped:
                group_projections(model)
            formulas = [provider.formula(getattr(model, layer)) for layer in NAMES]
            for formula in formulas:
                stir(formula)
            outcome.errors[name] = gate(model, formulas, x, dys)
            models[name] = model
    if options.dry_run:
        return outcome
    clock = Clock(device, ahead=True)
    calls = {
        FORWARD: {name: Call(lambda model=model: model(x)) for name, model in models.items()},
        BOTH: {name: Call(_forward_backward(model, x, dys)) for name, model in models.items()},
    }
    for measure_name, of_measure in calls.items():
        progress = f"{case.key} {measure_name}" if options.progress else ""
        samples = interleave(
            of_measure, device, options.seconds, progress=progress, on_failure=outcome.fail, clock=clock
        )
        outcome.add(measure_name, statistics(samples, case.baseline))
    if device.type == "cuda":
        outcome.extra["host_seconds"] = {n: clock.host[call] for n, call in calls[BOTH].items() if call in clock.host}
    return outcome


def _forward_backward(model: Projections, x: Tensor, dys: Sequence[Tensor]) -> Callable[[], object]:
    """Both passes, the gradients made anew each time."""
    leaves = [x, *model.parameters()]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(model(x), list(dys))

    return run
