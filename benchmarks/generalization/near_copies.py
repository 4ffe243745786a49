"""How far perceptual hashes tell copies of a picture from other pictures: the measurement behind `perceptual.NEAR`.

    python benchmarks/generalization/near_copies.py SET... [--pairs SET/pairs.csv] [--limit 500]

SET is a folder with real/ and fake-<method>/. For each kind of change (JPEG, size, crop): how many copies are found.
For all pairs of pictures of different groups in each SET: how many are taken for copies. `--pairs`: a table with the
columns real and fake, which names files in real/ and fake-*/ of its folder, one made from the other: these pairs are
counted apart.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from masm_detect.data.contents import describe, survey
from masm_detect.data.decode import UnreadableImage, read_image
from masm_detect.data.folders import read_folder
from masm_detect.data.perceptual import BITS, NEAR, differing_bits, stack_hashes
from PIL import Image

Change = Callable[[Image.Image], Image.Image]
RADII = (8, 16, 20, NEAR, 28, 32, 40, 48)


def scaled(factor: float) -> Change:
    """The picture at `factor` of its size."""
    return lambda image: image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC)


def cropped(share: float) -> Change:
    """The picture without `share` of its width and height at each side."""

    def crop(image: Image.Image) -> Image.Image:
        x, y = (max(1, round(share * side)) for side in image.size)
        return image.crop((x, y, image.width - x, image.height - y))

    return crop


#: Name -> change of the picture, and quality of the JPEG that it is saved as.
CHANGES: dict[str, tuple[Change, int]] = {
    "JPEG 90": (scaled(1), 90),
    "JPEG 50": (scaled(1), 50),
    "JPEG 20": (scaled(1), 20),
    "half the size, JPEG 75": (scaled(0.5), 75),
    "a quarter of the size, JPEG 30": (scaled(0.25), 30),
    "1.5 times the size, JPEG 60": (scaled(1.5), 60),
    "1% cropped at each side, JPEG 75": (cropped(0.01), 75),
    "3% cropped at each side, JPEG 75": (cropped(0.03), 75),
}


def distances_of_copies(path: str) -> list[int]:
    """Bits in which the hash of each changed copy differs from that of the file."""
    image = Image.fromarray(read_image(path))
    hashes = [describe(Path(path).read_bytes(), path).perceptual]
    for change, quality in CHANGES.values():
        data = io.BytesIO()
        change(image).save(data, "JPEG", quality=quality)
        hashes.append(describe(data.getvalue(), path).perceptual)
    stacked, places = stack_hashes(hashes)
    assert len(places) == len(hashes), f"{path} has one colour"
    return differing_bits(stacked[1:], stacked[:1].repeat(len(CHANGES), axis=0)).tolist()


def distances_of_others(hashes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """How many pairs of different groups differ in 0, 1, ..., 256 bits."""
    counts = np.zeros(BITS + 1, dtype=np.int64)
    for i in range(len(hashes) - 1):
        others = hashes[i + 1 :][groups[i + 1 :] != groups[i]]
        counts += np.bincount(differing_bits(hashes[i : i + 1].repeat(len(others), axis=0), others), minlength=BITS + 1)
    return counts


def main() -> None:
    """Print one line for each change, and one for each set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", type=Path)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--limit", type=int, default=500, help="pictures of each set that are changed and copied")
    arguments = parser.parse_args()
    pairs = list(csv.DictReader(arguments.pairs.open())) if arguments.pairs else []
    made_from = {row[kind]: f"pair {i}" for i, row in enumerate(pairs) for kind in ("real", "fake")}
    random = np.random.default_rng(0)
    copies, total = [], np.zeros(BITS + 1, dtype=np.int64)
    for folder in arguments.sets:
        samples = read_folder(folder)
        contents = survey([sample.path for sample in samples])
        good = [i for i, content in enumerate(contents) if not isinstance(content, UnreadableImage)]
        hashes, places = stack_hashes([contents[i].perceptual for i in good])
        samples = [samples[good[i]] for i in places]
        names = [Path(sample.path).name for sample in samples]
        in_pairs = arguments.pairs is not None and folder.resolve() == arguments.pairs.resolve().parent
        groups = [made_from.get(name, name) if in_pairs else sample.group for name, sample in zip(names, samples)]
        numbers = np.unique(groups, return_inverse=True)[1]
        counts = distances_of_others(hashes, numbers)
        total += counts
        print(f"{folder.name}: {line(counts)}; nearest {int(np.flatnonzero(counts)[0])}")
        if in_pairs:
            place = {name: i for i, name in enumerate(names)}
            rows = [
                (place[row["real"]], place[row["fake"]]) for row in pairs if {row["real"], row["fake"]} <= set(place)
            ]
            made = differing_bits(*(hashes[list(side)] for side in zip(*rows)))
            print(f"  fakes and the pictures they were made from: {line(np.bincount(made, minlength=BITS + 1))}")
        chosen = random.permutation(len(samples))[: arguments.limit]
        with ThreadPoolExecutor(2) as pool:
            copies += pool.map(distances_of_copies, [samples[i].path for i in chosen])
    print(f"all sets: {line(total)}")
    for name, column in zip(CHANGES, np.array(copies).T):
        share, middle = (column <= NEAR).mean(), np.median(column)
        print(f"{name}: {share:.1%} of {len(column)} copies within {NEAR} bits, median {middle:.0f}")


def line(counts: np.ndarray) -> str:
    """The number of pairs, and of those within each of `RADII`."""
    return f"{counts.sum():,} pairs, " + ", ".join(
        f"{counts[: radius + 1].sum():,} within {radius}" for radius in RADII
    )


if __name__ == "__main__":
    main()
