"""Time of MASMLinear (forward and backward) against M, R, K and the number of layers, and its distance from a line."""

from __future__ import annotations

from dataclasses import asdict

import torch
from bench import Call, Clock, Outcome, fit_line, interleave, statistics
from cases import DTYPES, STRAIGHT, Case, Options
from providers import PROVIDERS, Setting, gate, stir
from torch import nn

from suites.layer import forward_backward

BASE = {"M": 2056, "N": 768, "D": 768, "R": 16, "K": 4, "layers": 1}
SWEEPS = {
    "M": (257, 514, 1028, 2056, 4112, 8224),
    "R": (4, 8, 16, 32, 64, 128),
    "K": (1, 2, 4, 8, 16),
    "layers": (1, 2, 4, 8, 16),
}


def cases(options: Options) -> list[Case]:
    dtypes = options.model_dtypes[:1] if options.quick else options.model_dtypes
    # on a GPU without R, each of which has kernels of its own to compile
    sweeps = {letter: SWEEPS[letter] for letter in (("M", "layers") if options.on_gpu else SWEEPS)}
    estimate = options.seconds + 15
    return [
        Case("scale", letter, dtype, "frozen", {**BASE, letter: list(points)}, estimate=estimate)
        for dtype in dtypes
        for letter, points in sweeps.items()
    ]


def names(options: Options, case: Case | None = None) -> list[str]:
    return ["frozen", "masm"]


def measure(case: Case, options: Options) -> Outcome:
    """Every point is a measure of its own ("M = 257") with its ratio over the frozen layers at that point; all points
    of a sweep run in the same rounds. `extra` holds the lines.
    """
    outcome, letter, points = Outcome(case), case.name, case.values[case.name]
    device, dtype = torch.device(options.device), DTYPES[case.dtype]
    calls: dict[tuple[int, str], Call] = {}
    for point in points:
        values = {**case.values, letter: point}
        if options.dry_run:
            values |= {"M": min(values["M"], 33), "N": 160, "D": 160}
        for name in names(options):
            with outcome.provider(name):
                calls[point, name] = _chain(name, values, device, dtype, options, outcome)
    if options.dry_run:
        return outcome
    progress = case.key if options.progress else ""
    samples = interleave(calls, device, options.seconds, progress=progress, clock=Clock(device, ahead=True))
    points = [point for point in points if all((point, name) in samples for name in names(options))]
    medians: dict[str, list[float]] = {"frozen": [], "masm": []}
    for point in points:
        entries = statistics({name: samples[point, name] for name in medians}, case.baseline)
        outcome.add(f"{letter} = {point}", entries)
        for name, entry in entries.items():
            medians[name].append(entry["median"])
    outcome.extra["lines"] = {}
    for name, values in medians.items():
        line = asdict(fit_line(points, values))
        outcome.extra["lines"][name] = {**line, "straight": line["residual"] <= STRAIGHT}
    return outcome


def _chain(
    name: str, values: dict, device: torch.device, dtype: torch.dtype, options: Options, outcome: Outcome
) -> Call:
    """Forward and backward through `layers` layers after one another; the first has passed the gate."""
    M, N, D = (values[letter] for letter in "MND")
    torch.manual_seed(0)
    model = nn.Sequential()
    for _ in range(values["layers"]):
        linear = nn.Linear(D, N, device=device)
        nn.init.normal_(linear.weight, std=D**-0.5)
        model.append(linear)
    model.to(dtype)
    provider = PROVIDERS[name]
    provider.adapt(model, [str(i) for i in range(len(model))], Setting(values["R"], values["K"], options.cache))
    x = torch.randn(M, D, device=device).to(dtype).requires_grad_()
    dy = torch.randn(M, N, device=device).to(dtype)
    point = f"{name}, {values['layers']} layers, M {M}, R {values['R']}, K {values['K']}"
    # On a layer of its own: stirred factors would let the numbers grow from layer to layer.
    single = nn.Sequential(nn.Linear(D, N, device=device).to(dtype))
    provider.adapt(single, ["0"], Setting(values["R"], values["K"], options.cache))
    stir(provider.formula(single[0]))
    outcome.errors[point] = gate(provider, single[0], x, dy)
    return Call(forward_backward(model, x, dy))
