"""How fast images get into a batch, and what a set of samples costs. CPU only; nothing else should run meanwhile.

    python benchmarks/speed/data.py                  # 5 minutes on 2 cores; results/data-cpu.json and a table
    python benchmarks/speed/data.py --quick --out quick.json   # seconds, to see that it works

Loader: images/s of `data.loading.Batches` (decode, resize, normalise, collate; worker processes started for each pass)
against decoding alone in one process, over the same generated files in the same rounds. Samples: bytes of a list of
`Sample` objects and of `Samples`, and the seconds from a DeepfakeBench file to training and validation samples.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from bench import Call, interleave, statistics
from machine import describe
from masm_detect.config import DataConfig
from masm_detect.data.decode import encode_jpeg, png_bytes, read_image
from masm_detect.data.frames import FrameDataset
from masm_detect.data.loading import Batches, in_order
from masm_detect.data.sample import Sample
from masm_detect.data.samples import Samples
from masm_detect.data.sources import source_splits
from masm_detect.data.transforms import ImageTransform
from masm_detect.results import write_json

RESULTS = Path(__file__).resolve().parent / "results"
#: Kind of file -> (side in pixels, how it is encoded).
FILES: dict[str, tuple[int, Callable[[np.ndarray], bytes]]] = {
    "png-256": (256, png_bytes),
    "jpeg-1024": (1024, lambda rgb: encode_jpeg(rgb, 90).tobytes()),
}
CPU = torch.device("cpu")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 if the result file exists."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.images, options.seconds, options.samples, options.frames = 24, 0.1, 2_000, 640
    if options.out.exists() and not options.overwrite:
        print(f"{options.out} exists: give another --out, or --overwrite", file=sys.stderr)
        return 2
    content: dict[str, Any] = {
        "settings": {k: v for k, v in vars(options).items() if k not in ("out", "overwrite", "quick")},
        "machine": describe(CPU),
    }
    with tempfile.TemporaryDirectory() as folder:
        content["loader"] = {kind: loader(Path(folder) / kind, kind, options) for kind in FILES}
        content["samples"] = {"bytes_each": sample_bytes(options.samples), "reading": reading(Path(folder), options)}
    write_json(options.out, content)
    print(table(content))
    return 0


def write_images(folder: Path, kind: str, count: int) -> list[Path]:
    """`count` files of a kind: noise at several scales, which compresses like a photograph."""
    folder.mkdir()
    side, encode = FILES[kind]
    paths = []
    for index in range(count):
        random = np.random.default_rng(index)
        rgb = np.zeros((side, side, 3), np.float32)
        for scale in (4, 16, 64, side):
            noise = random.normal(0, 96 / scale**0.4, (scale, scale, 3)).astype(np.float32)
            rgb += cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)
        paths.append(folder / f"{index:04d}.{kind.split('-')[0]}")
        paths[-1].write_bytes(encode((128 + rgb).clip(0, 255).astype(np.uint8)))
    return paths


def loader(folder: Path, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a pass over the files (`bench.statistics`), by decoding alone and by the loader with each number of
    workers. `ratio` is over decoding alone: 1 is a loader that costs nothing beside the decoder of one process.
    """
    paths = write_images(folder, kind, options.images)
    transform = ImageTransform(options.size, (0.5,) * 3, (0.25,) * 3)
    samples = [Sample(str(p), i % 2, "d", "m" if i % 2 else "real", f"d/x/{p.stem}") for i, p in enumerate(paths)]
    dataset, batches = FrameDataset(samples, transform), in_order(len(paths), options.batch)

    def decode() -> None:
        for path in paths:
            read_image(path)

    def load(workers: int) -> Callable[[], None]:
        def run() -> None:
            count = sum(len(labels) for _, labels in Batches(dataset, batches, CPU, workers))
            assert count == len(paths)

        return run

    calls = {"decode": Call(decode)} | {f"workers-{n}": Call(load(n)) for n in options.workers}
    times = interleave(calls, CPU, options.seconds, least=3, warm_up=1, progress=kind if sys.stderr.isatty() else "")
    return {
        "images": len(paths),
        "bytes": sum(path.stat().st_size for path in paths),
        "seconds": statistics(times, "decode"),
    }


def frames(count: int, per_video: int = 32) -> Iterator[Sample]:
    """Frames with the paths of DeepfakeBench's folders, one at a time."""
    for index in range(count):
        video, frame = divmod(index, per_video)
        label = video % 2
        kind = ("original_sequences/youtube", "manipulated_sequences/Deepfakes")[label]
        name = f"{video:05d}_{video + 1:05d}"
        yield Sample(
            path=f"/datasets/deepfakebench/rgb/FaceForensics++/{kind}/c23/frames/{name}/{frame:03d}.png",
            label=label,
            dataset="FaceForensics++",
            method=("real", "FF-DF")[label],
            video=f"FaceForensics++/{('FF-real', 'FF-DF')[label]}/{name}",
            split="train",
            group=f"FaceForensics++/pair/{name}",
        )


def sample_bytes(count: int) -> dict[str, float]:
    """Bytes a sample that Python's allocator holds, in a list of objects and in arrays (tracemalloc)."""
    out = {}
    for name, make in (("list", list), ("Samples", Samples)):
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        kept = make(frames(count))
        after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        out[name], out[f"{name}, peak"] = (after - before) / len(kept), (peak - before) / len(kept)
    return out


def reading(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from a DeepfakeBench file to training and validation samples, for `frames` and a tenth of them."""
    out = {}
    for count in (options.frames // 10, options.frames):
        place = folder / f"frames-{count}"
        tree: dict[str, Any] = {"FF-real": {"train": {}}, "FF-DF": {"train": {}}}
        videos = max(2, count // 32 // 2)
        for label, split in tree.items():
            for video in range(videos):
                name = f"{video:05d}" if label == "FF-real" else f"{video:05d}_{video ^ 1:05d}"
                inside = place / label / name
                inside.mkdir(parents=True)
                listed = [f"{label}/{name}/{frame:03d}.png" for frame in range(32)]
                for path in listed:
                    (place / path).touch()
                split["train"][name] = {"label": label, "frames": listed}
        (place / "FF.json").write_text(json.dumps({"FaceForensics++": tree}))
        started = time.perf_counter()
        parts = source_splits(DataConfig(paths=[str(place / "FF.json")]))
        out[str(sum(map(len, parts)))] = {"seconds": time.perf_counter() - started}
    return out


def table(content: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    rows = ["| files | provider | images/s | time over decoding alone, median [p20, p80] |", "|---|---|---|---|"]
    for kind, found in content["loader"].items():
        for name, entry in found["seconds"].items():
            ratio = entry["ratio"]
            rows.append(
                f"| {kind} | {name} | {found['images'] / entry['median']:,.0f} | "
                f"{ratio['median']:.2f} [{ratio['p20']:.2f}, {ratio['p80']:.2f}] |"
            )
    held = ", ".join(f"{name} {value:.0f}" for name, value in content["samples"]["bytes_each"].items())
    read = ", ".join(f"{n} frames {e['seconds']:.2f} s" for n, e in content["samples"]["reading"].items())
    return "\n".join([*rows, "", f"Bytes a sample: {held}", f"From a JSON file to samples: {read}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512, help="files of each kind")
    parser.add_argument("--size", type=int, default=224, help="side of the loaded images in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each kind of file")
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples whose memory is measured")
    parser.add_argument("--frames", type=int, default=100_000, help="frames of the file that is read")
    parser.add_argument("--quick", action="store_true", help="small counts, to see that it works")
    parser.add_argument("--out", type=Path, default=RESULTS / "data-cpu.json")
    parser.add_argument("--overwrite", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
