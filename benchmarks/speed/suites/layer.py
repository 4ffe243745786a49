"""One layer over the frozen `nn.Linear`: forward, and forward and backward with dX and the trained tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from bench import Call, Clock, Outcome, interleave, saved_bytes, statistics
from cases import BOTH, DTYPES, FORWARD, LAYERS, SUBSPACES, Case, Options, over
from masm_detect.gpu import Meter
from providers import PROVIDERS, Setting, gate, stir
from torch import Tensor, nn

from masm_ext.ops.strategies import STREAM_ROWS


def cases(options: Options) -> list[Case]:
    out, compiled = [], set()
    for row in LAYERS["cuda" if options.on_gpu else "cpu"]:
        N, D, R, M = row.N, row.D, row.R, row.M or options.defaults.tokens
        if row.dtype not in options.dtypes or (options.quick and (N, D, R, row.M) != (1024, 1024, 16, 0)):
            continue
        values = {"M": M, "N": N, "D": D, "R": R, "K": SUBSPACES}
        goals = {key: limit for key, limit in row.goals.items() if key[1] in names(options)}
        name = f"{N}x{D}/R{R}" + (f"/M{M}" if row.M else "")
        case = Case("layer", name, row.dtype, "frozen", values, goals)
        # kernels for one token are compiled apart
        kernels = (row.dtype, R, min(M, 2))
        estimate = 2 * options.seconds + len(names(options, case)) * (1.0 if options.on_gpu else 2.0)
        estimate += options.compile_seconds * (kernels not in compiled)
        compiled.add(kernels)
        out.append(replace(case, estimate=estimate))
    return out


def names(options: Options, case: Case | None = None) -> list[str]:
    """A case of few tokens leaves out what the device leaves out, for its set-up would take longer than the case; one
    of many what serves few only."""
    chosen = options.chosen(tuple(PROVIDERS), "frozen")
    streams = case is None or (case.values["M"] <= STREAM_ROWS and case.dtype != "float32")
    if options.providers is None and not streams:
        chosen.remove("masm-stream")
    if case is None or options.providers is not None or case.values["M"] == options.defaults.tokens:
        return chosen
    return [name for name in chosen if name not in options.defaults.left_out]


class OneLayer(nn.Module):
    """A model of one linear, for libraries that adapt models."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        self.linear.weight, self.linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def measure(case: Case, options: Options) -> Outcome:
    outcome, device, dtype = Outcome(case), torch.device(options.device), DTYPES[case.dtype]
    M, N, D, R, K = (case.values[name] for name in "MNDRK")
    if options.dry_run:
        M, N, D, R = 33, max(16, N // 64), max(16, D // 64), max(K, R // 8)
    torch.manual_seed(0)
    x = torch.randn(M, D, device=device).to(dtype).requires_grad_()
    dy = torch.randn(M, N, device=device).to(dtype)
    weight, bias = (torch.randn(N, D, device=device) / D**0.5).to(dtype), torch.randn(N, device=device).to(dtype)

    layers: dict[str, nn.Module] = {}
    for name in names(options, case):
        with outcome.provider(name):
            provider, model = PROVIDERS[name], OneLayer(weight, bias)
            provider.adapt(model, ["linear"], Setting(R, K, options.cache))
            stir(provider.formula(model.linear))
            if provider.compiled:
                torch.compiler.reset()  # past a number of shapes the compiler would go back to eager without a word
                model.linear.compile(dynamic=False)
            outcome.errors[name] = gate(provider, model.linear, x, dy)
            layers[name] = model.linear
    if options.dry_run:
        return outcome

    calls = {name: (Call(_forward(layer, x)), Call(forward_backward(layer, x, dy))) for name, layer in layers.items()}
    clock = Clock(device, ahead=True)
    for index, measure_name in enumerate((FORWARD, BOTH)):
        samples = interleave(
            {name: pair[index] for name, pair in calls.items()},
            device,
            options.seconds,
            progress=f"{case.key} {measure_name}" if options.progress else "",
            on_failure=outcome.fail,
            clock=clock,
        )
        entries = statistics(samples, case.baseline)
        for name, entry in entries.items():
            work = useful_work(measure_name, name, M, N, D, R, dtype.itemsize)
            entry |= {"flops": work[0] / entry["median"], "bytes": work[1] / entry["median"]}
        outcome.add(measure_name, entries)
        for peer in PROVIDERS:
            name = over(measure_name, peer)
            if any(name == measure for measure, _ in case.goals) and {peer, "masm"} <= set(samples):
                outcome.add(name, statistics({n: samples[n] for n in (peer, "masm")}, peer), baseline=peer)
    kept = {n: saved_bytes(lambda f=f: f(x), [x, *f.parameters(), *f.buffers()]) for n, f in layers.items()}
    outcome.extra["saved_bytes"] = kept
    outcome.extra["flop_per_byte"] = {
        m: (lambda work: work[0] / work[1])(useful_work(m, "masm", M, N, D, R, dtype.itemsize)) for m in (FORWARD, BOTH)
    }
    if device.type == "cuda":
        meter = Meter(device)
        outcome.extra["host_seconds"] = {
            name: clock.host[pair[1]] for name, pair in calls.items() if pair[1] in clock.host
        }
        outcome.extra["peak_bytes"] = {name: _peak(pair[1].run, device) for name, pair in calls.items()}
        outcome.extra["joules"] = {name: meter.joules(pair[1].run, device, 0.3) for name, pair in calls.items()}
        outcome.extra["clocks"] = meter.clocks()
    return outcome


def useful_work(measure: str, provider: str, M: int, N: int, D: int, R: int, itemsize: int) -> tuple[float, float]:
    """(FLOP, bytes) that the formula needs, whatever a provider really does: the dense products and, but for the frozen
    layer, the skinny ones; every operand read and every result written once.
    """
    rank = 0 if provider == "frozen" else R
    flops, traffic = 2 * M * N * D + 2 * M * rank * (N + D), (M * D + N * D + M * N) * itemsize + 4 * rank * (N + D)
    if measure == BOTH:
        # Backward: dX needs as much again; du and dv two more skinny products, for which x is read again.
        learns = 0 if provider in ("masm-masked", "eigentune") else rank
        flops += 2 * M * N * D + 2 * M * rank * (N + D) + 2 * M * learns * (N + D)
        traffic += (M * D + N * D + M * N) * itemsize + 4 * rank * (N + D)
        traffic += M * D * itemsize + 4 * learns * (N + D) if learns else 0
    return float(flops), float(traffic)


def _forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: layer(x)


def forward_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], object]:
    """Both passes, the gradients made anew each time."""
    leaves = [x, *layer.parameters()]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        layer(x).backward(dy)

    return run


def _peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes allocated at the highest point of a call, over what is there before it."""
    run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
