"""Times `masm prepare` against an earlier version of it and against decoding alone, and compares the faces found.

    python benchmarks/speed/prepare.py VIDEOS                                   # results/prepare-cpu.json
    python benchmarks/speed/prepare.py VIDEOS --baseline old/bin/masm           # beside an earlier version, in one run
    python benchmarks/speed/prepare.py VIDEOS --faces-only                      # only what is found, no time

VIDEOS holds `real/` and `fake-<method>/`. In each round every contender cuts the same videos once, in a random order,
as a process of its own, its start included. `decode` is one OpenCV pass over the files in one thread, which nothing
that reads every frame can beat on one core. Faces: those of `masm prepare`, which searches a reduced frame, against a
search of the whole frame for all sizes, on the same frames.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import joblib
import numpy as np
import torch
from bench import statistics
from machine import describe
from masm_detect.data.mtcnn import MtcnnDetector
from masm_detect.data.prepare_video import prepare_video
from masm_detect.data.video_reader import VideoFile
from masm_detect.data.videos import VideoSource, find_videos, spread
from masm_detect.results import write_json

from masm_ext.progress import Progress

RESULTS = Path(__file__).resolve().parent / "results"
#: Least overlap (intersection over union) of two boxes of one face.
SAME_FACE = 0.6


def main() -> int:
    """The program; returns its exit code."""
    options = _parser().parse_args()
    videos = [video for video in find_videos(options.videos.absolute()) if video.is_video]
    timed = [videos[i] for i in np.unique(np.linspace(0, len(videos) - 1, options.count).round().astype(int))]
    result: dict[str, Any] = {
        "machine": describe(torch.device("cpu")),
        "videos": len(videos),
        "frames_per_video": options.frames,
    }
    if not options.faces_only:
        result["time"] = time_all(timed, options)
    result["faces"] = total_counts(
        joblib.Parallel(n_jobs=-1)(joblib.delayed(compare_faces)(video, options.frames) for video in videos)
    )
    write_json(options.out, result)
    print(table(result))
    print(f"written: {options.out}")
    return 0


def time_all(videos: list[VideoSource], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a video of every contender, and ratios to `decode`."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        for video in videos:
            link = source / video.folder / video.files[0].name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(video.files[0])
        command = [str(Path(sys.executable).with_name("masm"))]
        contenders: dict[str, Callable[[], None]] = {"decode": lambda: [decode(v.files[0]) for v in videos]}
        for workers in sorted({1, joblib.cpu_count()}):
            arguments = [*command, "--workers", str(workers)]
            contenders[f"prepare, {workers} worker(s)"] = lambda a=arguments: _prepare(
                a, source, folder, options.frames
            )
        if options.baseline is not None:
            contenders["baseline"] = lambda: _prepare([str(options.baseline)], source, folder, options.frames)
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        with Progress(total=options.rounds * len(contenders), desc="timing", unit="run") as bar:
            for _ in range(options.rounds):
                for name in random.sample(list(contenders), len(contenders)):
                    started = time.perf_counter()
                    contenders[name]()
                    samples[name].append((time.perf_counter() - started) / len(videos))
                    bar.update()
    return {"videos": len(videos), "contenders": statistics(samples, "decode")}


def _prepare(command: list[str], source: Path, folder: str, frames: int) -> None:
    program, *more = command
    with tempfile.TemporaryDirectory(dir=folder) as out:
        arguments = [program, "prepare", str(source), out, "--dataset", "set", "--frames_per_video", str(frames)]
        subprocess.run([*arguments, "--progress=false", *more], check=True, stdout=subprocess.DEVNULL)


def decode(path: Path) -> int:
    """Decode every frame in one thread, convert none; returns their number."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames = 0
    while capture.grab():
        frames += 1
    return frames


def compare_faces(video: VideoSource, frames: int) -> dict[str, Any]:
    """Faces of `masm prepare` against the largest face that a search of the whole frame finds."""
    detector = MtcnnDetector()
    settings = {"frames_per_video": frames, "size": 32, "scale": 1.3, "faces": "largest"}
    with tempfile.TemporaryDirectory() as out:
        record = prepare_video(video, Path(out) / "video", settings, detector, None, "")
    found = {int(Path(crop["file"]).stem): crop["box"] for crop in record["crops"]}
    counts = {"frames": 0, "whole_frame": 0, "prepare": len(found), "same": 0, "overlaps": []}
    opened = VideoFile(video.files[0])
    for frame in opened.frames(spread(opened.total, frames)):
        counts["frames"] += 1
        faces = detector.detect(frame.rgb) if frame.rgb is not None else []
        if faces:
            counts["whole_frame"] += 1
            largest = max(faces, key=lambda face: face.area)
            if frame.number in found:
                counts["overlaps"].append(overlap(largest.box, found[frame.number]))
                counts["same"] += counts["overlaps"][-1] > SAME_FACE
    return counts


def total_counts(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of all videos, and quantiles of the overlaps."""
    overlaps = np.array([value for part in parts for value in part["overlaps"]])
    counts = {name: int(sum(part[name] for part in parts)) for name in ("frames", "whole_frame", "prepare", "same")}
    quantiles = {f"p{100 * q:g}": round(float(np.quantile(overlaps, q)), 4) for q in (0.01, 0.1, 0.5)}
    return counts | {"overlap": quantiles}


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    common = np.prod(np.maximum(high - low, 0))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return float(common / (areas - common))


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = []
    for name, entry in result.get("time", {}).get("contenders", {}).items():
        ratio = entry["ratio"]
        lines.append(
            f"{name:<24} {entry['median']:6.2f} s a video ({entry['p20']:.2f} to {entry['p80']:.2f}), "
            f"{ratio['median']:5.2f} times decode ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
        )
    faces = result["faces"]
    lines.append(
        f"{faces['frames']} frames: a face in {faces['whole_frame']} by the whole frame, in {faces['prepare']} by "
        f"prepare; the same in {faces['same']} (overlap above {SAME_FACE}), overlap {faces['overlap']}"
    )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("videos", type=Path, help="folder with real/ and fake-<method>/")
    parser.add_argument("--baseline", type=Path, help="the command masm of an earlier version")
    parser.add_argument("--frames", type=int, default=32, help="frames of a video")
    parser.add_argument(
        "--count", type=int, default=20, help="videos to time, evenly spread; faces are compared on all"
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that each contender runs")
    parser.add_argument("--faces-only", action="store_true", help="compare the faces only")
    parser.add_argument("--out", type=Path, default=RESULTS / "prepare-cpu.json", help="the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
