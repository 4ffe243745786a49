"""How training scales to many GPUs: a model on paper, with the measured numbers that it uses. No GPU is needed.

    python benchmarks/gpu_model/scaling.py                 # the tables
    python benchmarks/gpu_model/scaling.py --write         # into docs/scaling.md, and its figure

Data-parallel training as `masm train` does it in several processes: every GPU holds the model, and the gradients of the
trained parameters are averaged in each step by DistributedDataParallel. docs/scaling.md explains the terms.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "speed"))  # the sizes of the models

from cases import MODELS, VisionSize
from masm_detect.config import MasmOptions
from masm_detect.methods.lora import Lora
from masm_detect.report.plots import METHOD_COLORS, new_figure, save_figure
from matplotlib.figure import Figure

from masm_ext.files import write_atomically

PAGE, FIGURE = ROOT / "docs" / "scaling.md", ROOT / "docs" / "scaling.png"
RESULTS = ROOT / "benchmarks" / "speed" / "results"

#: What is compared: name -> (title, trained numbers of a model).
METHODS: dict[str, tuple[str, Callable[[VisionSize], int]]] = {}
#: Models of the tables, name in `cases.MODELS` -> title.
SIZES = {"vit-s": "ViT-S/14", "vit-l": "ViT-L/14"}
BYTES = 4  # gradients and moments are float32

#: Assumptions of the model: bytes/s each way of a GPU (NVLink 4) or of the network adapter of a machine, and seconds of
#: a hop between two processes.
LINKS = {
    "NVLink": (450e9, 5e-6),
    "400 Gbit/s": (50e9, 5e-6),
    "200 Gbit/s": (25e9, 5e-6),
    "25 Gbit/s": (3.125e9, 30e-6),
}
#: Share of these bandwidths that an all-reduce reaches.
REACHED = 0.8
#: Seconds of a hop between two hosts over TCP.
HOST_HOP = 30e-6
#: H100 SXM, bfloat16 (data sheet), and the share of it that a training step reaches.
PEAK, SHARE = 989e12, 0.4
#: Images of a GPU in one step.
IMAGES = 32
#: Sizes of DistributedDataParallel's buckets (torch 2.13): the first one, and the others.
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20
#: (GPUs, link) of the columns.
COLUMNS = (
    (8, "NVLink"),
    (64, "400 Gbit/s"),
    (512, "400 Gbit/s"),
    (512, "200 Gbit/s"),
    (64, "25 Gbit/s"),
    (512, "25 Gbit/s"),
)


def masm_numbers(size: VisionSize) -> int:
    """Trained numbers of masm, defaults of `masm train`: u [R, N], s [R], v [R, D] of the attention, and the head."""
    options = MasmOptions()
    R = options.num_subspaces * options.subspace_rank
    return R * sum(N + D + 1 for N, D in size.attention) + head_numbers(size)


def lora_numbers(size: VisionSize) -> int:
    """Trained numbers of LoRA at its default rank: A [r, D] and B [N, r] of the attention, the head."""
    return Lora.rates.rank * sum(N + D for N, D in size.attention) + head_numbers(size)


def full_numbers(size: VisionSize) -> int:
    """All parameters of a vision transformer of CLIP with patches of 14 px, and the head."""
    D, patches = size.width, size.tokens - 1
    block = 12 * D**2 + 13 * D  # six linear layers with biases, two norms
    embeddings = 3 * 14**2 * D + D + (patches + 1) * D + 4 * D  # patches, class token, positions, two norms
    return size.depth * block + embeddings + head_numbers(size)


def head_numbers(size: VisionSize) -> int:
    """Weight and bias of the linear head."""
    return size.width + 1


METHODS |= {
    "masm": ("masm, R = 12", masm_numbers),
    "lora": ("LoRA, r = 8", lora_numbers),
    "full": ("full fine-tuning", full_numbers),
}


def all_reduce(size: float, gpus: int, link: str) -> float:
    """Seconds of the average of `size` bytes over `gpus` processes: the faster of a ring and a double tree.

    A ring sends 2 (P - 1) / P of the bytes in 2 (P - 1) hops, trees send them twice in 2 log2(P) hops. The slowest link
    counts. NCCL has both: https://developer.nvidia.com/blog/massively-scale-deep-learning-training-nccl-2-4.
    """
    if gpus == 1:
        return 0.0
    bandwidth, hop = LINKS[link]
    bandwidth *= REACHED
    ring = 2 * (gpus - 1) / gpus * size / bandwidth + 2 * (gpus - 1) * hop
    tree = 2 * size / bandwidth + 2 * ceil(log2(gpus)) * hop
    return min(ring, tree)


def buckets(size: int) -> list[int]:
    """Bytes of the buckets of DistributedDataParallel, one all-reduce each, for gradients of `size` bytes."""
    first = min(size, FIRST_BUCKET)
    rest = size - first
    return [first, *(min(BUCKET, rest - start) for start in range(0, rest, BUCKET))]


def gradient_seconds(numbers: int, gpus: int, link: str) -> float:
    """Seconds of the all-reduces of the gradients of `numbers` parameters in a step."""
    return sum(all_reduce(bucket, gpus, link) for bucket in buckets(BYTES * numbers))


def host_seconds(gpus: int) -> float:
    """Seconds a step of the flag "stop after this step", which the hosts exchange through gloo: a ring of TCP.

    Above 8 processes they do so every P / 8 steps (`masm_detect.distributed.Processes.steps_between_flags`).
    """
    return 2 * (gpus - 1) * HOST_HOP / max(1, gpus // 8)


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of one step: computing, the all-reduces of gradients and loss, the flag of the hosts."""

    compute: float
    gradients: float
    flag: float

    @property
    def seconds(self) -> float:
        """Of the whole step: the gradients overlap with nothing; the hosts exchange the flag while the GPUs work."""
        return max(self.compute + self.gradients, self.flag)

    @property
    def efficiency(self) -> float:
        """Share of the time in which the GPUs compute."""
        return self.compute / self.seconds


def flops(size: VisionSize, method: str) -> float:
    """Floating-point operations of a training step for one image: forward and dX, and for `full` the weights, too."""
    T, D = size.tokens, size.width
    forward = size.depth * (24 * T * D**2 + 4 * T**2 * D) + 2 * (T - 1) * 3 * 14**2 * D
    return forward * (3 if method == "full" else 2)


def step(size: VisionSize, method: str, gpus: int, link: str, compute: float | None = None) -> Step:
    """A step of a method. `compute`: its seconds on one GPU; None: as modelled for `IMAGES` images on an H100."""
    if compute is None:
        compute = IMAGES * flops(size, method) / (PEAK * SHARE)
    loss = all_reduce(BYTES, gpus, link)
    gradients = gradient_seconds(METHODS[method][1](size), gpus, link) + loss
    return Step(compute, gradients, host_seconds(gpus) if gpus > 1 else 0.0)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def milliseconds(seconds: float) -> str:
    """Two digits, without an exponent."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def sent_table() -> str:
    """Trained numbers and bytes of their gradients."""
    rows = []
    for title, count in METHODS.values():
        row = [title]
        for name in SIZES:
            numbers = count(MODELS[name])
            row += [f"{numbers:,}", f"{BYTES * numbers / 1e6:,.1f} MB"]
        rows.append(row)
    return table(
        ["model", *(cell for title in SIZES.values() for cell in (f"{title}: trained numbers", "sent in a step"))], rows
    )


def time_table() -> str:
    """Milliseconds of the all-reduces of a step; bold where they take more than a tenth of the step."""
    rows = []
    for size, title in SIZES.items():
        for method in METHODS:
            parts = [step(MODELS[size], method, gpus, link) for gpus, link in COLUMNS]
            cells = [mark(milliseconds(p.gradients), 9 * p.gradients > p.compute) for p in parts]
            rows.append([f"{title.partition('/')[0]}, {method}", milliseconds(parts[0].compute), *cells])
    rows.append(["flag of the hosts", "", *(milliseconds(host_seconds(gpus)) for gpus, _ in COLUMNS)])
    return table(["ms", "t", *(f"{gpus} GPUs, {link}" for gpus, link in COLUMNS)], rows)


def mark(text: str, bold: bool) -> str:
    """Bold text in Markdown, or as it is."""
    return f"**{text}**" if bold else text


def core_rates() -> dict[str, float]:
    """Images/s that one core reads, decodes, resizes and normalises, measured: two worker processes on two cores."""
    loader = json.loads((RESULTS / "data-cpu.json").read_text())["loader"]
    return {kind: entry["images"] / entry["seconds"]["workers-2"]["median"] / 2 for kind, entry in loader.items()}


def data_table() -> str:
    """Cores that feed one GPU."""
    rates, rows = core_rates(), []
    for size, title in SIZES.items():
        need = 1 / (flops(MODELS[size], "masm") / (PEAK * SHARE))
        rows.append([title, f"{need:,.0f}", *(f"{need / rate:.0f}" for rate in rates.values())])
    names = {"png-256": "PNG of 256 px", "jpeg-1024": "JPEG of 1024 px"}
    heads = [f"cores, {names[kind]} ({rate:.0f} images/s a core, measured)" for kind, rate in rates.items()]
    return table(["model", "images/s of one H100, modelled", *heads], rows)


#: Method -> what benchmarks/speed measured it as.
MEASURED = {"masm": "masm", "lora": "peft-lora"}


def activation_bytes(size: VisionSize, method: str, dtype: str) -> float:
    """Bytes that autograd keeps for one image: measured for ViT-S, scaled by depth x width to other sizes."""
    case = json.loads((RESULTS / "all-cpu.json").read_text())["cases"][f"memory/{dtype}/vit-s"]
    small = MODELS["vit-s"]
    scale = size.depth * size.width / (small.depth * small.width)
    return case["measures"]["saved"]["providers"][MEASURED[method]]["median"] / case["values"]["batch"] * scale


def memory(size: VisionSize, method: str) -> dict[str, float]:
    """Bytes on one GPU by kind, without activations.

    Per trained number: its gradient, the same in a bucket of DistributedDataParallel, two moments; masm also keeps
    start values in float32, and in float64 for the drift.
    """
    numbers = METHODS[method][1](size)
    return {
        "parameters": BYTES * (full_numbers(size) + (0 if method == "full" else numbers - head_numbers(size))),
        "training state": numbers * (4 * BYTES + (BYTES + 8 if method == "masm" else 0)),
    }


def memory_table() -> str:
    """GB on one GPU."""
    rows = []
    for size, title in SIZES.items():
        for method, (name, _) in METHODS.items():
            parts = memory(MODELS[size], method)
            activations = "not measured"
            if method in MEASURED:
                kept = [activation_bytes(MODELS[size], method, dtype) for dtype in ("bfloat16", "float32")]
                activations = " to ".join(f"{IMAGES * part / 1e9:.1f}" for part in kept)
            rows.append([f"{title}, {name}", *(f"{part / 1e9:.2f}" for part in parts.values()), activations])
    return table(
        ["GB", "parameters", "gradients, moments, start values", f"activations of {IMAGES} images, bf16 to float32"],
        rows,
    )


TABLES: dict[str, Callable[[], str]] = {
    "sent": sent_table,
    "time": time_table,
    "data": data_table,
    "memory": memory_table,
}


def filled(page: str) -> str:
    """The page with today's tables between its marks `<!-- table: NAME -->` and `<!-- end -->`."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = pattern.subn(lambda match, make=make: f"{match[1]}\n{make()}\n\n{match[2]}", page)
        if count != 1:
            raise ValueError(f"docs/scaling.md has {count} places for the table {name!r}; it must have one")
    return page


def figure() -> Figure:
    """Scaling efficiency of ViT-L against the number of GPUs, one panel a network."""
    links, counts = ("400 Gbit/s", "25 Gbit/s"), [2**power for power in range(11)]
    result, (axes,) = new_figure(1, len(links), (9.5, 4))
    for axis, link in zip(axes, links):
        for method, (title, _) in METHODS.items():
            parts = [step(MODELS["vit-l"], method, gpus, link if gpus > 8 else "NVLink") for gpus in counts]
            color, shares = METHOD_COLORS[method], [part.efficiency for part in parts]
            axis.plot(counts, shares, marker="o", markersize=3, label=title, color=color)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.set_ylim(0, 1.03)
        axis.set_xlabel("GPUs (8 a machine)")
        axis.set_title(f"{link} between machines", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of the time spent computing")
    axes[0].legend(loc="lower left", fontsize=8)
    result.suptitle(f"ViT-L/14, {IMAGES} images a GPU and step, H100: modelled, not measured", fontsize=10)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, or write them and the figure into docs/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/scaling.md and docs/scaling.png")
    if parser.parse_args(arguments).write:
        write_atomically(PAGE, filled(PAGE.read_text()).encode())
        save_figure(figure(), FIGURE)
        return 0
    for name, make in TABLES.items():
        print(f"{name}\n\n{make()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
