"""What a call of masm::subspace_linear, or masm::masked_adamw_, should cost on a GPU: a model, not a measurement.

    python benchmarks/gpu_model/model.py                       # the goal shapes on an H100: ratio over the frozen layer
    python benchmarks/gpu_model/model.py --gpu a100 --m 2056 --dtype float32 --r 16,256 --layers 3
    python benchmarks/gpu_model/model.py --launches kext       # every launch of a strategy
    python benchmarks/gpu_model/model.py --optimizer vit-l     # a step of MaskedAdamW, attention layers

A call is the list of launches that masm_ext/kernels makes for it; tests/benchmarks/test_model.py compares names and
grids with the real launch code. What a launch costs, and what is assumed for it, is in launches.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))  # the timer, the shapes and the providers

from cases import BOTH, DTYPES, FORWARD, LAYERS, MODELS, SUBSPACES
from gpus import GPUS
from launches import Costs, Launch, seconds
from shapes import Factors, Shape

from masm_ext.kernels import tiles
from masm_ext.ops.strategies import ADDMM, FOLDED, KEXT, REFERENCE, SINGLE, STRATEGIES, STREAM, choose

#: Modelled for comparison, as benchmarks/speed/providers.py has them.
PEERS = ("effort", "peft-lora")


@dataclass(frozen=True)
class Model(Costs):
    """Strategies, the frozen layers and peers as lists of launches."""

    def forward(self, s: Shape, strategy: str) -> list[Launch]:
        """y and, if something learns, P: masm_ext.kernels.products.forward_product."""
        J, M, N, D = s.layers, s.M, s.N, s.D
        if strategy == REFERENCE:
            return J * self.reference(s, D, N)
        if strategy == STREAM:
            return self.stream(s, D, N)
        p = self.skinny(s, D, J * s.R) if strategy in (KEXT, ADDMM) or (s.learning and strategy != SINGLE) else []
        if strategy == FOLDED:
            return [*p, *self.fold(s), *J * [self.cublas(s.kind, M, D, N)]]
        if strategy == ADDMM:
            return [*p, *self.gemm(s, 0, N, members=J), *J * [self.cublas(s.kind, M, D, N, beta=True)]]
        return [*p, *self.gemm(s, D, N, members=J, compute_t=strategy == SINGLE, store_t=s.learning)]

    def backward(self, s: Shape, strategy: str) -> list[Launch]:
        """dX and, if something learns, du, ds and dv: masm_ext.kernels.subspace_linear._backward."""
        J, M, N, D, R = s.layers, s.M, s.N, s.D, s.R
        live = s.R if s.live is None else s.live
        if strategy == REFERENCE:
            return J * [*self.reference(s, N, D), *(self.reference_sums(s) if s.learning else [])]
        strategy = SINGLE if strategy == STREAM else strategy
        q: list[Launch] = []
        most = tiles.both_max_rank(s.dtype, "tf32" if s.kind == "tf32" else "ieee")
        if s.learning and strategy != SINGLE and most >= R:
            q = du = self.both(s, N)
        else:
            if strategy in (KEXT, ADDMM) or (s.learning and strategy == FOLDED):
                q = J * self.skinny(s, N, R)
            du = self.reduce(s, N, R, live, J, need_ds=False) if s.learning else []
        if strategy == FOLDED:
            dx = [*self.fold(s), *(self.cublas(s.kind, M, N, D, beta=j > 0) for j in range(J))]
        elif strategy == ADDMM:
            dx = [*self.gemm(s, 0, D, parts=J), *J * [self.cublas(s.kind, M, N, D, beta=True)]]
        else:
            dx = self.gemm(s, N, D, parts=J, compute_t=strategy == SINGLE, store_t=s.learning)
        if not s.learning:
            return [*q, *dx]
        dv = self.reduce(s, D, J * R, J * live, 1, need_ds=True)
        return [*q, *(du if du is not q else []), *dx, *dv, *self.finish(s, du, dv)]

    def reference(self, s: Shape, IN: int, OUT: int) -> list[Launch]:
        """The eager formula for y or dX: half precision is widened to float32 first."""
        M, R, kind, half = s.M, s.R, "tf32" if s.tf32 else "ieee", s.size == 2
        casts = [self.torch(6 * n) for n in (M * IN, IN * OUT)] if half else []
        low = [self.cublas(kind, M, IN, R), self.torch(8 * M * R), self.cublas(kind, M, R, OUT)]
        rounding = half * [self.torch(6 * M * OUT)]
        return [*casts, *low, self.cublas(kind, M, IN, OUT), self.torch(12 * M * OUT), *rounding]

    def reference_sums(self, s: Shape) -> list[Launch]:
        M, R, kind = s.M, s.R, "tf32" if s.tf32 else "ieee"
        casts = [self.torch(6 * s.M * s.D)] if s.size == 2 else []
        sums = [self.cublas(kind, R, M, s.N), self.cublas(kind, R, M, s.D), *4 * [self.torch(8 * M * R)]]
        return [*casts, *sums, *3 * [self.torch(8 * R * (s.N + s.D))]]

    def frozen(self, s: Shape) -> tuple[list[Launch], list[Launch]]:
        """Forward and dX of plain linears; autograd adds the dX of several."""
        forward, dx = self.cublas(s.kind, s.M, s.D, s.N), self.cublas(s.kind, s.M, s.N, s.D)
        adds = (s.layers - 1) * [self.torch(3 * s.M * s.D * s.size)]
        return s.layers * [forward], [*s.layers * [dx], *adds]

    def peer(self, s: Shape, name: str) -> tuple[list[Launch], list[Launch]]:
        """Effort rebuilds the weight and has a dense gradient of it. PEFT's LoRA keeps float32 factors, so its products
        and sums with [M, N] and [M, D] are float32."""
        M, N, D, R, size, kind = s.M, s.N, s.D, s.R, s.size, s.kind
        forward, backward = self.frozen(s)
        if name == "effort":
            rebuild = [self.torch(2 * N * R * size), self.cublas(kind, N, R, D), self.torch(3 * N * D * size)]
            dense = [self.cublas(kind, N, M, D), self.cublas(kind, N, D, R), self.cublas(kind, R, N, D)]
            return forward + s.layers * rebuild, backward + s.layers * [*dense, *4 * [self.torch(2 * N * R * size)]]
        wide = "tf32" if s.tf32 else "ieee"
        low = [self.torch(M * D * (size + 4)), self.cublas(wide, M, D, R), self.cublas(wide, M, R, N)]
        low += [self.torch(8 * M * N), self.torch(M * N * (2 * size + 4))]
        back = [self.torch(M * N * (size + 4)), self.torch(8 * M * N), *2 * [self.torch(M * D * (2 * size + 4))]]
        back += [self.cublas(wide, *sizes) for sizes in ((M, N, R), (N, M, R), (M, R, D), (R, M, D))]
        return forward + s.layers * low, backward + s.layers * back

    def cost(self, s: Shape, name: str) -> tuple[float, float]:
        """Seconds of the forward pass, and of forward and backward, of a strategy, a peer or "frozen"."""
        if name == "frozen":
            forward, backward = self.frozen(s)
        elif name in PEERS:
            forward, backward = self.peer(s, name)
        else:
            forward, backward = self.forward(s, name), self.backward(s, name)
        return seconds(forward), seconds(forward) + seconds(backward)

    def ratio(self, s: Shape, name: str) -> tuple[float, float]:
        """`cost` over that of the frozen layers."""
        (f, b), (frozen_f, frozen_b) = self.cost(s, name), self.cost(s, "frozen")
        return f / frozen_f, b / frozen_b

    def chosen(self, s: Shape) -> tuple[str, str]:
        """Today's strategies of the forward pass and of the backward pass."""
        forward, backward = map(choose, s.calls(self.gpu.capability))
        return forward, backward

    def lower_bound(self, s: Shape) -> tuple[float, float, float]:
        """(seconds, FLOP, bytes) of the two dense products alone, without launches, tiles or waves."""
        flops, traffic = 0.0, 0.0
        for IN, OUT in ((s.D, s.N), (s.N, s.D)):
            flops += s.layers * 2 * s.M * IN * OUT
            traffic += s.layers * (s.M * IN + IN * OUT + s.M * OUT) * s.size
        rate = getattr(self.gpu, s.kind) * self.cublas_share
        return max(flops / rate, traffic / (self.gpu.memory * self.memory_share)), flops, traffic


#: (N, D) and R of the tables.
SHAPES, RANKS = ((1024, 1024), (4096, 1024), (1024, 4096), (3072, 1024)), (16, 48, 64)


def main(arguments: list[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    model = Model(GPUS[asked.gpu], triton=asked.triton)
    if asked.optimizer:
        shapes = tuple(MODELS[asked.optimizer].attention)
        factors = Factors(shapes, asked.r[0], SUBSPACES, 1 - asked.masked, asked.penalized)
        _print_optimizer(model, asked.optimizer, factors)
        return 0
    shapes = [(n, d) for n, d in SHAPES if asked.n in (None, n) and asked.d in (None, d)]
    if asked.n and asked.d:
        shapes = [(asked.n, asked.d)]
    settings = dict(layers=asked.layers, dtype=DTYPES[asked.dtype], tf32=asked.tf32, learning=not asked.inference)
    print(f"{model.gpu.name}, {asked.dtype}{', tf32' if asked.tf32 else ''}, M = {asked.m}: modelled, not measured")
    for N, D in shapes:
        s = Shape(asked.m, N, D, asked.r[0], **settings)
        if asked.launches:
            _print_launches(model, s, asked.launches)
        else:
            _print_table(model, s, asked.r)
    return 0


def _print_table(model: Model, s: Shape, ranks: Iterable[int]) -> None:
    """Ratios over the frozen layers, forward / forward and backward; in brackets with Triton at 0.9 of what is assumed.
    Today's choice has a star."""
    (bound, flops, traffic), (forward, both) = model.lower_bound(s), model.cost(s, "frozen")
    names, slower = [*STRATEGIES, *PEERS], model.slower(0.9)
    work = f"{flops / 1e9:.0f} GFLOP and {traffic / 1e6:.0f} MB, {bound * 1e6:.0f} us at least"
    print(f"\n{s.layers} layers of " * (s.layers > 1) or "\n", end="")
    print(f"{s.N} x {s.D}: {work}; frozen {forward * 1e6:.0f} / {both * 1e6:.0f} us")
    for case in LAYERS["cuda"]:
        same = (case.N, case.D, case.M, DTYPES[case.dtype]) == (s.N, s.D, 0, s.dtype) and s.layers == 1
        if same and (FORWARD, "masm") in case.goals:
            goals = [case.goals[measure, "masm"] for measure in (FORWARD, BOTH)]
            print(f"goal for R = {case.R}: {goals[0]:.2f} / {goals[1]:.2f}")
    print("R".rjust(5), *(name.center(24) for name in names))
    for R in ranks:
        shape, cells = replace(s, R=R), []
        for name in names:
            if name in STRATEGIES and not shape.serves(name):
                cells.append("-".center(24))
                continue
            marks = ["*" if name == chosen else "" for chosen in model.chosen(shape)]
            one, other = model.ratio(shape, name), slower.ratio(shape, name)
            text = f"{one[0]:.2f}{marks[0]} / {one[1]:.2f}{marks[1]}"
            cells.append(f"{text} ({other[0]:.2f} / {other[1]:.2f})".center(24))
        print(f"{R:5}", *cells)


def _print_launches(model: Model, s: Shape, strategy: str) -> None:
    print(f"\n{s.N} x {s.D}, R = {s.R}, {strategy}")
    for name, launches in (("forward", model.forward(s, strategy)), ("backward", model.backward(s, strategy))):
        print(f"{name}: {seconds(launches) * 1e6:.1f} us")
        for launch in launches:
            grid = f"{launch.programs} programs" if launch.programs else ""
            numbers = f"{launch.flops / 1e9:9.2f} GFLOP {launch.traffic / 1e6:8.1f} MB"
            print(f"  {launch.kernel:18} {launch.seconds * 1e6:7.1f} us {numbers}  {grid}")


def _print_optimizer(model: Model, name: str, f: Factors) -> None:
    sweeps, memory = model.masked_adamw(f), model.gpu.memory * model.memory_share
    names = ("gradients are looked at", "update", "sums of the blocks")
    starts = (("launch", model.gap), *2 * [("barrier", model.barrier)])
    print(f"{model.gpu.name}: modelled, not measured\n")
    penalized = ", with penalties" * f.penalized
    layers = f"{len(f.shapes)} attention layers, R = {f.R}, K = {f.K}, {1 - f.live:.0%} of the blocks masked{penalized}"
    print(f"{name}, {layers}: {f.segments} segments, {f.elements} elements, {4 * f.elements / 1e6:.1f} MB")
    print(f"{seconds(sweeps) * 1e6:.1f} us, {sum(sweep.traffic for sweep in sweeps) / 1e6:.1f} MB from and to memory")
    for what, (start, first), sweep in zip(names, starts, sweeps):
        busy = sweep.traffic / memory
        terms = f"{start} {first * 1e6:.1f}, memory {busy * 1e6:.1f}, waits {(sweep.seconds - first - busy) * 1e6:.1f}"
        print(f"  {what:24} {sweep.seconds * 1e6:6.1f} us {sweep.traffic / 1e6:7.1f} MB  ({terms})")
    launches = model.triton_adamw(f)
    print(f"{seconds(launches) * 1e6:.1f} us in Triton, where the CUDA library was not built")
    for launch in launches:
        print(f"  {launch.kernel:24} {launch.seconds * 1e6:6.1f} us {launch.traffic / 1e6:7.1f} MB")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=list(GPUS), default="h100")
    parser.add_argument("--m", type=int, default=8224, help="tokens (default: 32 images of 257)")
    parser.add_argument("--n", type=int, help="out_features")
    parser.add_argument("--d", type=int, help="in_features")
    parser.add_argument("--r", type=lambda text: [int(r) for r in text.split(",")], default=list(RANKS), metavar="R,R")
    parser.add_argument("--layers", type=int, default=1, help="layers that read the same x, in one call (default 1)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--tf32", action="store_true", help="float32 products in tf32")
    parser.add_argument("--inference", action="store_true", help="no gradient of u, s or v is needed")
    parser.add_argument("--optimizer", choices=list(MODELS), help="print a step of MaskedAdamW, R = the first of --r")
    parser.add_argument("--masked", type=float, default=0.0, metavar="SHARE", help="--optimizer: masked blocks")
    parser.add_argument("--penalized", action="store_true", help="with gradients of penalties, with --optimizer")
    parser.add_argument("--triton", type=float, default=1.0, help="half precision: Triton's speed over cuBLAS")
    parser.add_argument("--launches", choices=STRATEGIES, help="print every launch of a strategy, R = the first of --r")
    return parser


if __name__ == "__main__":
    sys.exit(main())
