"""What one launch costs on a GPU: a roofline with tiles and waves. `model.py` puts the launches of a call together.

Seconds of a launch:

    gap + latency * waits + max(waves * product, traffic / memory, scratch / L2)
    product = max(flop / rate, operands / port) + drain * steps

- waves: programs over multiprocessors, rounded up. cuBLAS splits the inner dimension of a product of less than a wave.
- flop: of one program, padding included. rate: of one multiprocessor by the data sheet, times the share that cuBLAS
  reaches, times Triton's share of cuBLAS. Beside half precision the low-rank part is tf32: half the rate.
- operands: bytes that a program takes in, through a port of 64 bytes a cycle.
- steps: steps of a program's loop that wait for all products, so that the tensor cores idle (these kernels are the
  exceptions in `keeps_multiplying`, tests/compile/test_compile.py).
- traffic: bytes from and to memory, each matrix once. scratch: T and partial sums, in L2 if they fit, else traffic.
- waits: loads one after another that nothing hides.

Every kernel uses the tile of masm_ext/kernels/tiles.py that is fastest in this model, as tuning would on a GPU. K costs
nothing (subspaces are rows of one factor), so it is no parameter. Letters as in docs/method.md; a product is [M, IN]
times [IN, OUT]: D and N forward, N and D for dX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import ceil

from gpus import GPUS, Gpu
from shapes import Factors, Shape

from masm_ext.kernels import tiles
from masm_ext.kernels.launch import Tile, padded
from masm_ext.kernels.products import shared_operands
from masm_ext.kernels.skinny_products import chunk_rows_of

#: Thread blocks of masked_adamw_kernel that a multiprocessor holds: 128 threads of 112 to 120 registers.
ADAMW_RESIDENT = 4
#: The same of the Triton kernels, by kernel: 128 threads of at most 56 and 168 registers (float32 parameters).
TRITON_RESIDENT = {"inspect_gradients": 9, "update_segments": 3}

#: Tiles that cuBLAS may choose from, and the fewest rows of the inner dimension that it splits off.
CUBLAS_TILES = ((128, 256), (128, 128), (64, 64), (128, 32), (32, 128))
SPLIT_ROWS = 256


@dataclass(frozen=True)
class Launch:
    """`kernel`: our function's name; "cublas" and "torch" are products and all else of torch. `chunks`: partial sums
    that it leaves."""

    kernel: str
    programs: int
    seconds: float
    flops: float
    traffic: float
    chunks: int = 0


def seconds(launches: Iterable[Launch]) -> float:
    return sum(launch.seconds for launch in launches)


@dataclass(frozen=True)
class Costs:
    """A GPU and what is assumed: the shares of the data sheet that cuBLAS and a pass over memory reach, Triton's share
    of cuBLAS by kind of product, seconds between two launches, of a load that nothing hides, of a barrier that a whole
    grid waits at, and of a step that rounds an operand in registers and stores it to shared memory: the products before
    it end, the warps meet, the tensor cores start anew (some 200 cycles)."""

    gpu: Gpu = GPUS["h100"]
    cublas_share: float = 0.8
    memory_share: float = 0.9
    triton: float = 1.0
    triton_tf32: float = 0.8
    triton_ieee: float = 0.5
    gap: float = 2e-6
    latency: float = 0.25e-6
    barrier: float = 1.5e-6
    drain: float = 0.1e-6

    def slower(self, share: float):
        """The same with Triton's products at `share` of their rate."""
        names = ("triton", "triton_tf32", "triton_ieee")
        return replace(self, **{name: share * getattr(self, name) for name in names})

    def waves(self, programs: int) -> int:
        return ceil(programs / self.gpu.processors)

    def launch(
        self, kernel: str, programs: int, rate: float, flop: float, operands: float, traffic: float,
        scratch: float = 0.0, waits: float = 0.0, chunks: int = 0, steps: int = 0,
    ) -> Launch:  # fmt: skip
        """The formula of this file: flop, operands and steps of one program, traffic and scratch of all."""
        gpu = self.gpu
        if scratch > gpu.l2:
            traffic, scratch = traffic + scratch, 0.0
        work = max(flop * gpu.processors / rate, operands / (64 * gpu.clock)) + self.drain * steps
        inside = self.waves(programs) * work
        busy = max(inside, traffic / (gpu.memory * self.memory_share), scratch / gpu.l2_speed)
        return Launch(kernel, programs, self.gap + self.latency * waits + busy, flop * programs, traffic, chunks)

    def torch(self, traffic: float) -> Launch:
        """A pass of plain torch, element by element."""
        return self.launch("torch", 0, 1.0, 0.0, 0.0, traffic)

    def cublas(self, kind: str, M: int, IN: int, OUT: int, beta: bool = False) -> Launch:
        """[M, IN] times [IN, OUT], with `beta` added to what is there."""
        size, rate = 2 if kind == "half" else 4, getattr(self.gpu, kind) * self.cublas_share
        traffic = (M * IN + IN * OUT + (1 + beta) * M * OUT) * size
        choices = []
        for BM, BN in CUBLAS_TILES:
            programs = ceil(M / BM) * ceil(OUT / BN)
            split = max(1, min(self.gpu.processors // programs, IN // SPLIT_ROWS))
            work = (2 * BM * BN * IN / split, (BM + BN) * IN * size / split, traffic, (split > 1) * 8 * split * M * OUT)
            choices.append(self.launch("cublas", programs * split, rate, *work))
        return min(choices, key=lambda choice: choice.seconds)

    def rate(self, s: Shape) -> float:
        """FLOP/s of Triton's products."""
        share = {"half": self.triton, "tf32": self.triton_tf32, "ieee": self.triton_ieee}[s.kind]
        return getattr(self.gpu, s.kind) * self.cublas_share * share

    def columns(self, s: Shape, rank: int) -> int:
        """How many columns `rank` of them cost. Without tensor cores there is nothing to feed them with."""
        return rank if s.kind == "ieee" else max(rank, self.gpu.narrow)

    def drains(self, s: Shape, BM: int) -> bool:
        """Does a float32 operand beside half precision cost a step of the loop its overlap? Not by mma.sync, which
        takes operands from registers: before sm_90, and where a product has fewer than 64 rows."""
        return s.kind == "half" and shared_operands(self.gpu.target) and BM >= 64

    def fastest(self, s: Shape, kernel: str, build: Callable[[Tile], list[Launch]]) -> list[Launch]:
        candidates = tiles.tiles(kernel, self.gpu.target, s.dtype, "tf32" if s.kind == "tf32" else "ieee")
        return min((build(tile) for tile in candidates), key=seconds)

    def gemm(
        self,
        s: Shape,
        IN: int,
        OUT: int,
        parts: int = 1,
        members: int = 1,
        compute_t: bool = False,
        store_t: bool = False,
    ) -> list[Launch]:
        """subspace_gemm; IN = 0 is the low-rank part alone. T is read, or (compute_t) computed by each column of tiles:
        `extra` more columns, behind a launch that rounds V. After the dense product a program waits for every chunk of
        T and C."""
        tma = 90 <= self.gpu.capability < 120 and s.kind != "ieee"
        if compute_t and s.M <= tiles.SMALL_ROWS:
            kernel = tiles.SMALL
        elif IN * s.size % 16 or OUT * s.size % 16 or (IN % tiles.INNER and (parts > 1 or not tma)):
            kernel = tiles.UNALIGNED
        else:
            kernel = tiles.GEMM_TMA if tma and IN > 0 else tiles.GEMM
        BR = padded(s.R) if compute_t else tiles.rank_tile(parts * s.R, 32)
        chunks = parts if compute_t else ceil(parts * s.R / BR)
        extra = self.columns(s, BR) if compute_t else 0
        dearer = self.gpu.half / self.gpu.tf32 if s.kind == "half" else 1.0
        inner, factor = parts * IN, 4 * parts * members * s.R
        traffic = (s.M * inner + inner * members * OUT + members * s.M * OUT) * s.size + factor * (OUT + IN * compute_t)
        scratch = factor * s.M * (store_t or not compute_t)
        rounded = compute_t and kernel != tiles.SMALL and s.kind == "half" and shared_operands(self.gpu.target)
        v_size = 2 if rounded else 4
        cast = rounded * [self.torch(6 * parts * members * s.R * IN)]

        def build(tile: Tile) -> list[Launch]:
            programs = ceil(s.M / tile.BM) * members * ceil(OUT / tile.BN)
            flop = 2 * tile.BM * (inner * (tile.BN + extra) + tile.BN * BR * chunks * dearer)
            operands = inner * ((tile.BM + tile.BN) * s.size + v_size * BR * compute_t)
            operands += 4 * BR * chunks * (tile.BN + tile.BM * (not compute_t))
            name = "subspace_gemm_tma" if kernel == tiles.GEMM_TMA else "subspace_gemm"
            waits = chunks * self.waves(programs)
            steps = ceil(inner / tile.BK) * (compute_t and not rounded and self.drains(s, tile.BM))
            work = (flop, operands, traffic, scratch, waits)
            return [*cast, self.launch(name, programs, self.rate(s), *work, steps=steps)]

        wide_t = kernel == tiles.GEMM_TMA and compute_t and BR > 32
        return self.fastest(s, tiles.WIDE_T if wide_t else kernel, build)

    def reads(self, s: Shape, W: int, times: int) -> float:
        """Bytes that [M, W] costs when it is read so often: once if L2 can hold it."""
        matrix = s.M * W * s.size
        return matrix if matrix < self.gpu.l2 / 2 else matrix * times

    def skinny(self, s: Shape, W: int, R: int) -> list[Launch]:
        """T [M, R] = Z [M, W] B^T, 64 columns at a time."""
        BR = tiles.rank_tile(R, 64)
        parts = ceil(R / BR)
        traffic = self.reads(s, W, parts) + 4 * R * W

        def build(tile: Tile) -> list[Launch]:
            flop, operands = 2 * tile.BM * W * self.columns(s, BR), W * (tile.BM * s.size + 4 * BR)
            programs, steps = ceil(s.M / tile.BM) * parts, ceil(W / tile.BK) * self.drains(s, tile.BM)
            work = (flop, operands, traffic, 4 * s.M * R)
            return [self.launch("skinny", programs, self.rate(s), *work, steps=steps)]

        return self.fastest(s, tiles.SKINNY, build)

    def reduce(self, s: Shape, W: int, R: int, live: int, times: int, need_ds: bool) -> list[Launch]:
        """`times` G [R, W] = T^T Z, in chunks of rows. T is read by every column of tiles, P for ds by the first;
        without a live direction nothing is."""
        BR = tiles.rank_tile(R, 64)
        parts, some = ceil(R / BR), live > 0

        def build(tile: Tile) -> list[Launch]:
            columns = max(1, ceil(W / tile.BN))
            rows = chunk_rows_of(s.M, tile.BM, columns * parts, self.gpu.target)
            chunks = ceil(s.M / rows)
            flop = some * 2 * rows * tile.BN * self.columns(s, BR)
            operands = some * rows * (tile.BN * s.size + 4 * BR)
            scratch = some * 4 * ((columns + need_ds) * s.M * R + chunks * live * W)
            work = (flop, operands, some * self.reads(s, W, parts), scratch)
            steps = some * ceil(rows / tile.BM) * self.drains(s, tile.BN)  # the product is G^T, of BN rows
            programs = columns * chunks * parts
            return times * [self.launch("skinny_reduce", programs, self.rate(s), *work, chunks=chunks, steps=steps)]

        return self.fastest(s, tiles.REDUCE, build)

    def both(self, s: Shape, W: int) -> list[Launch]:
        """Q and du of each layer from one reading of its dY. Q comes in parts, one a column of tiles; torch sums."""
        live, BR = s.R if s.live is None else s.live, padded(s.R)

        def build(tile: Tile) -> list[Launch]:
            columns = ceil(W / tile.BN)
            rows = chunk_rows_of(s.M, tile.BM, columns, self.gpu.target)
            chunks = ceil(s.M / rows)
            flop, operands = 4 * rows * tile.BN * self.columns(s, BR), rows * (tile.BN * s.size + 4 * BR)
            parts = 4 * columns * s.M * s.R
            work = (flop, operands, self.reads(s, W, 1) + 4 * s.R * W, 2 * parts + 4 * chunks * live * W)
            steps = ceil(rows / tile.BM) * (self.drains(s, tile.BM) + self.drains(s, tile.BN))
            product = self.launch("skinny_both", columns * chunks, self.rate(s), *work, chunks=chunks, steps=steps)
            total = self.launch("torch", 0, 1.0, 0.0, 0.0, 0.0, parts + 4 * s.M * s.R)
            return s.layers * [product, total]

        return self.fastest(s, tiles.BOTH, build)

    def finish(self, s: Shape, du: list[Launch], dv: list[Launch]) -> list[Launch]:
        """Adds the chunks, four loads at a time; the mask is two loads before. 16 programs share a multiprocessor."""
        rows, live = s.layers * s.R, s.layers * (s.R if s.live is None else s.live)
        programs = rows * (ceil(s.N / 256) + ceil(s.D / 256)) + 1
        chunks = max(launch.chunks for launch in du), dv[0].chunks
        waits = (2 + ceil(max(chunks) / 4)) * ceil(programs / (16 * self.gpu.processors))
        scratch = 4 * live * (chunks[0] * s.N + chunks[1] * s.D)
        return [self.launch("finish", programs, 1.0, 0.0, 0.0, 4 * rows * (s.N + s.D), scratch, waits)]

    def stream(self, s: Shape, IN: int, OUT: int) -> list[Launch]:
        """stream_linear.cuh, each layer: a block takes tiles of 8 rows of the weight and reads x from L2 once a pass,
        and v if it is small. Else P is a launch ahead. Tensor cores are assumed to reach half of their rate by
        mma.sync. A block waits for P, or for sums of its warps."""
        directions, v = ceil(s.R / 8), 4 * s.R * IN
        p_first = v > 128 << 10
        each = max(1, ceil(ceil(OUT / 8) / self.gpu.processors))
        product = self._stream("stream_linear_p", s, IN, directions, 1, v + 4 * s.M * s.R)
        traffic = (OUT * IN + s.M * OUT) * s.size + 4 * s.R * (OUT + s.M) + v * (not p_first)
        y = self._stream("stream_linear", s, IN, ceil(ceil(OUT / 8) / each), each, traffic, directions * (not p_first))
        return s.layers * [*p_first * [product], y]

    def _stream(
        self, name: str, s: Shape, IN: int, blocks: int, each: int, traffic: float, directions: int = 0
    ) -> Launch:
        """`each` tiles a block, beside `directions` tiles of v."""
        gpu, rows = self.gpu, 16 if s.M <= 16 else 64
        passes = max(1, ceil(directions / 2)) - 1 + ceil(each / (4 if each > 1 else 1))
        operands = passes * s.M * IN * s.size + 32 * directions * IN + 8 * each * IN * s.size
        rate = gpu.half / 2 / gpu.processors
        flop = 2 * rows * 8 * (each + directions) * IN
        inside = self.waves(blocks) * max(flop / rate, operands / (64 * gpu.clock))
        traffic += s.M * IN * s.size
        busy = max(inside, traffic / (gpu.memory * self.memory_share), blocks * operands / gpu.l2_speed)
        return Launch(name, blocks, self.gap + self.latency + busy, flop * blocks, traffic)

    def fold(self, s: Shape) -> list[Launch]:
        """The weight read and written, its low-rank part in exact float32."""
        chunks = ceil(s.R / 16)
        work = (2 * 64 * 64 * 16 * chunks, 64 * (64 * s.size + 8 * s.R), 2 * s.N * s.D * s.size)
        rate = self.gpu.ieee * self.cublas_share * self.triton_ieee
        programs = ceil(s.N / 64) * ceil(s.D / 64)
        return s.layers * [self.launch("fold_weight", programs, rate, *work, waits=chunks)]

    def masked_adamw(self, f: Factors) -> list[Launch]:
        """masked_adamw.cuh: one launch in three parts, its sweeps; the second and third begin with a barrier.

        Gradients come from memory once, and for the update from L2 as far as half of it holds them: the update begins
        with those read last. Parameters and both moments are read and written, gradients of penalties read. A segment's
        row (32 bytes) comes from memory once, later from L2, where the 88 bytes lie that are kept of it between the
        sweeps. Waits: for a row and its mask; for the flags of all thread blocks, a row, a row and its mask; in the
        third sweep for a block's mask and first row, that row, its sums and the step count. Arithmetic is not modelled:
        all hides behind memory."""
        segments, gradients = f.live * f.segments, 4 * f.live * f.elements
        behind, held = replace(self, gap=self.barrier), min(gradients, self.gpu.l2 / 2)
        rounds = ceil(f.blocks / (ADAMW_RESIDENT * self.gpu.processors))

        def sweep(costs: Costs, traffic: float, scratch: float, waits: float) -> Launch:
            return costs.launch("masked_adamw", 0, 1.0, 0.0, 0.0, traffic, scratch, waits)

        return [
            sweep(self, gradients + 32 * f.segments, 80 * segments, 2),
            sweep(behind, (7 + f.penalized) * gradients - held, held + 64 * f.segments + 80 * segments, 4),
            sweep(behind, 0.0, (32 + 24) * segments, 4 * rounds),
        ]

    def triton_adamw(self, f: Factors) -> list[Launch]:
        """adamw.py: torch zeroes the statistics and the counters of the blocks, then a program a segment looks at the
        gradients, and another updates.

        Memory is as in `masked_adamw`; per segment L2 holds a row of the table of addresses (56 bytes), the hyper-
        parameters (40) and 48 bytes of sums and counters. Waits of a program: for a row, for addresses and mask, for
        the gradient, for the counters; and for the flags before the update, for the powers of the betas in it (three
        loads' time), for the others' sums after it. The other programs of its multiprocessor hide them until all were
        started anew."""
        segments, gradients = f.live * f.segments, 4 * f.live * f.elements
        held = min(gradients, self.gpu.l2 / 2)

        def launch(kernel: str, traffic: float, scratch: float, waits: float) -> Launch:
            one = self.launch(kernel, f.segments, 1.0, 0.0, 0.0, traffic, scratch, waits)
            rounds = ceil(f.live * f.segments / (TRITON_RESIDENT[kernel] * self.gpu.processors))
            return replace(one, seconds=max(one.seconds, self.gap + rounds * waits * self.latency))

        zeros = [self.torch(4 * (1 + 4 * f.blocks)), self.torch(16 * f.blocks)]
        table = (56 + 40 + 48) * segments
        update = (7 + f.penalized) * gradients - held
        return [
            *zeros,
            launch("inspect_gradients", gradients + 32 * f.segments, table, 4),
            launch("update_segments", update, held + 32 * f.segments + table, 10),
        ]
