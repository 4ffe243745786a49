"""The masked optimizer step over torch's fused AdamW on the same parameters, and over masked AdamW in eager torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from bench import Call, GateError, Outcome, interleave, statistics
from cases import GIBIBYTE, MODELS, OPTIMIZER_GOALS, SUBSPACES, Case, Options
from providers import relative_error
from torch import Tensor, nn
from training import RANK, drawn_masks, fixed_masks

from masm_ext import MaskedAdamW, MASMConfig, MASMLinear
from masm_ext.decomposition import Decomposition
from masm_ext.reference import masked_adamw_

MASKED = (0.0, 0.5, 1.0)
LARGE = "1 GiB of moments"
CONTENDERS = ("torch-fused", "torch-foreach", "masm", "formula", "eager-loop")
HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
#: Relative error of the change of the parameters over the steps of the gate, float32.
TOLERANCE = 1e-4


def cases(options: Options) -> list[Case]:
    """Factors and moments are float32 whatever the dtype of the model, so there is one dtype."""
    models = ("vit-s",) if options.quick else ("vit-l",) if options.on_gpu else ("vit-s", "vit-l")
    out = []
    goal, gain = OPTIMIZER_GOALS["cuda" if options.on_gpu else "cpu"]
    for model in models:
        shapes = shapes_of(model, options)
        for share in MASKED:
            values = {"model": model, "R": RANK, "K": SUBSPACES, "linears": len(shapes), "masked": share}
            goals = {("step", "masm"): goal}
            if share < 1:  # with everything masked the loop does nothing at all
                goals["step over eager-loop", "masm"] = 1 / gain
            goals = goals if "masm" in options.chosen(CONTENDERS) else {}
            name, estimate = f"{model}/{share:.0%} masked", options.seconds / 2 + 4
            out.append(Case("optimizer", name, "float32", "torch-fused", values, goals, estimate))
    if options.on_gpu:
        shapes, rank = GIBIBYTE
        values = {"model": LARGE, "R": rank, "K": SUBSPACES, "linears": len(shapes), "masked": 0.0}
        out.append(Case("optimizer", LARGE, "float32", "torch-fused", values, estimate=options.seconds / 2 + 10))
    return out


def shapes_of(model: str, options: Options) -> list[tuple[int, int]]:
    """(N, D) of the layers whose factors are updated."""
    return GIBIBYTE[0] if model == LARGE else MODELS[model].converted(options.defaults.converted)


def names(options: Options, case: Case | None = None) -> list[str]:
    """The case that measures memory throughput leaves out the eager loops: they would take seconds per step."""
    large = case is not None and case.name == LARGE
    return options.chosen(("torch-fused", "masm") if large else CONTENDERS, "torch-fused")


def layers_of(shapes: list[tuple[int, int]], rank: int, subspaces: int, device: torch.device) -> nn.ModuleList:
    """MASMLinears with random factors; `weight` is one number seen as [N, D], because no optimizer reads it."""
    offsets = tuple(range(0, rank + 1, rank // subspaces))
    layers = nn.ModuleList()
    for N, D in shapes:
        u, v = torch.randn(rank, N, device=device) / N**0.5, torch.randn(rank, D, device=device) / D**0.5
        weight = torch.ones(1, 1, device=device).expand(N, D)
        layers.append(MASMLinear(Decomposition(weight, u, torch.rand(rank, device=device), v, offsets, 0.0)))
    return layers


class EagerLoop:
    """Masked AdamW as a user would write it: one block after another in eager torch, with the sums of the learning
    state. Blocks that are masked are left out.
    """

    def __init__(self, layers: nn.ModuleList, masks: Tensor) -> None:
        self.layers, self.masks, self.steps = layers, masks.tolist(), [[0] * masks.shape[1] for _ in layers]
        self.moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in layers.parameters()}
        device = layers[0].u.device
        self.signal, self.power = (torch.zeros(masks.shape, device=device) for _ in range(2))

    @torch.no_grad()
    def step(self) -> None:
        (beta1, beta2), lr, eps, decay = HYPER["betas"], HYPER["lr"], HYPER["eps"], HYPER["weight_decay"]
        for i, layer in enumerate(self.layers):
            for k, (a, b) in enumerate(pairwise(layer.offsets)):
                if not self.masks[i][k]:
                    continue
                self.steps[i][k] += 1
                t, signal, power = self.steps[i][k], 0.0, 0.0
                for p in (layer.u, layer.s, layer.v):
                    g, (m, v) = p.grad[a:b], (moment[a:b] for moment in self.moments[p])
                    if t > 1:  # before the first step there is no moment to compare with
                        signal, power = signal + (g * m).sum() / (1 - beta1 ** (t - 1)), power + g.square().sum()
                    m.lerp_(g, 1 - beta1)
                    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                    denominator = (v.sqrt() / (1 - beta2**t) ** 0.5).add_(eps)
                    p[a:b].mul_(1 - lr * decay).addcdiv_(m, denominator, value=-lr / (1 - beta1**t))
                self.signal[i, k], self.power[i, k] = signal, power


class Formula:
    """`masm_ext.reference.masked_adamw_` over the same blocks: the oracle as an optimizer."""

    def __init__(self, layers: nn.ModuleList, masks: Tensor) -> None:
        device, K = layers[0].u.device, masks.shape[1]
        self.params, rows = list(layers.parameters()), []
        index = {p: t for t, p in enumerate(self.params)}
        for i, layer in enumerate(layers):
            for p in (layer.u, layer.s, layer.v):
                width = p[0].numel()
                bounds = pairwise(layer.offsets)
                rows += [(index[p], a * width, b * width, i * K + k) for k, (a, b) in enumerate(bounds)]
        self.moments = [[torch.zeros_like(p) for p in self.params] for _ in range(2)]
        self.steps = torch.zeros(masks.numel(), dtype=torch.int64, device=device)
        self.mask, self.segments = masks.flatten().float().to(device), torch.tensor(rows, device=device)
        hyper = (HYPER["lr"], *HYPER["betas"], HYPER["eps"], HYPER["weight_decay"])
        self.hyper = torch.tensor([hyper] * len(self.params), dtype=torch.float64, device=device)

    @torch.no_grad()
    def step(self) -> None:
        grads = [p.grad for p in self.params]
        operands = (self.params, grads, *self.moments, [], self.steps, self.mask, self.segments, self.hyper)
        self.stats, _ = masked_adamw_(*operands)  # signal and power of every block


def contender(name: str, layers: nn.ModuleList, share: float):
    """An object with `step()`."""
    config = MASMConfig(num_subspaces=layers[0].num_subspaces, subspace_rank=layers[0].ranks[0])
    if name.startswith("torch"):
        return torch.optim.AdamW(layers.parameters(), **HYPER, **{name.removeprefix("torch-"): True})
    if name == "masm":
        return MaskedAdamW(layers.parameters(), **HYPER, masks=fixed_masks(layers, config, share))
    masks = drawn_masks(len(layers), config.num_subspaces, share)
    return (Formula if name == "formula" else EagerLoop)(layers, masks)


def _prepared(name: str, shapes: list, values: dict, rank: int, device: torch.device):
    """(layers with gradients, optimizer)."""
    torch.manual_seed(0)
    layers = layers_of(shapes, rank, values["K"], device)
    optimizer = contender(name, layers, values["masked"])
    for p in layers.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p)
    return layers, optimizer


def gate(name: str, shapes: list, values: dict, rank: int, device: torch.device) -> dict[str, float]:
    """Relative error of the change that three steps make, against AdamW in float64 (arXiv 1711.05101) written out here;
    masked blocks must not change at all. Raises GateError.
    """
    layers, optimizer = _prepared(name, shapes, values, rank, device)
    share = 0.0 if name.startswith("torch") else values["masked"]
    masks = drawn_masks(len(layers), values["K"], share)
    before = {p: p.detach().double() for p in layers.parameters()}
    for _ in range(3):
        optimizer.step()
    found, wanted, frozen_moved = [], [], 0.0
    (beta1, beta2), lr, eps, decay = HYPER["betas"], HYPER["lr"], HYPER["eps"], HYPER["weight_decay"]
    for layer, row in zip(layers, masks):
        live = torch.cat([bit.expand(r) for bit, r in zip(row, layer.ranks)]).to(layer.u.device)
        for p in (layer.u, layer.s, layer.v):
            exact, g = before[p].clone(), p.grad.double()
            m, v = torch.zeros_like(g), torch.zeros_like(g)
            for t in range(1, 4):
                m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
                step = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
                exact = exact * (1 - lr * decay) - lr * step
            change, mask = p.detach().double() - before[p], (live if p.dim() == 1 else live[:, None]).double()
            found.append((change * mask).flatten())
            wanted.append(((exact - before[p]) * mask).flatten())
            frozen_moved = max(frozen_moved, float((change * (1 - mask)).abs().max()))
    errors = {"change": relative_error(torch.cat(found), torch.cat(wanted)), "masked blocks moved": frozen_moved}
    if not errors["change"] <= TOLERANCE or frozen_moved != 0:
        raise GateError(f"differs from AdamW in float64: {errors}")
    return errors


def measure(case: Case, options: Options) -> Outcome:
    outcome, device, values = Outcome(case), torch.device(options.device), case.values
    shapes = shapes_of(values["model"], options)
    calls: dict[str, Call] = {}
    for name in names(options, case):
        with outcome.provider(name):
            small = MODELS["tiny"].linears if options.dry_run else shapes[:6]
            outcome.errors[name] = gate(name, small, values, SUBSPACES if options.dry_run else values["R"], device)
            if not options.dry_run:
                calls[name] = Call(_prepared(name, shapes, values, values["R"], device)[1].step)
    if calls:
        progress = case.key if options.progress else ""
        samples = interleave(calls, device, options.seconds / 2, progress=progress, on_failure=outcome.fail)
        entries = statistics(samples, case.baseline)
        elements = sum(values["R"] * (N + D + 1) for N, D in shapes)
        for name, entry in entries.items():
            # Parameter, gradient and two moments are read, three of them written: float32. Torch knows no masks.
            live = 1 if name.startswith("torch") else 1 - values["masked"]
            entry["bytes"] = 7 * 4 * elements * live / entry["median"]
        outcome.add("step", entries)
        if {"masm", "eager-loop"} <= set(samples):
            pair = {name: samples[name] for name in ("eager-loop", "masm")}
            outcome.add("step over eager-loop", statistics(pair, "eager-loop"), baseline="eager-loop")
    return outcome
