"""The embedded demo set: real photographs inside the wheels of other packages, and forgeries of them.

No photograph is in two splits. A fake and a real image go through one chain: photograph -> random scale, mirror,
tone -> crop -> (forgery) -> JPEG of a random quality -> decode. So they differ in the forgery only. Everything
lives in memory and is a function of the seed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from masm_detect.data.decode import encode_jpeg, read_image
from masm_detect.data.forgeries import FAMILIES, forge
from masm_detect.data.sample import Sample
from masm_detect.errors import UserError
from masm_ext.progress import Progress

DATASET = "demo"
TRAIN_FAMILIES = ("upsample", "poisson", "warp")

# Split -> files inside installed wheels: nothing is downloaded. Of the stereo pair motorcycle_left/right one is used.
# Photographs that may show one place (the flower beds, the campus) are in one split. Every photograph of the test shows
# a scene of its own.
_SKIMAGE = "skimage", "data/"
_FOOLBOX = "foolbox", "data/imagenet_"
_MVTB = "mvtbdata", "images/"
_SOURCES: dict[str, tuple[tuple[tuple[str, str], tuple[str, ...]], ...]] = {
    "train": (
        (_SKIMAGE, ("astronaut.png", "coffee.png", "motorcycle_left.png", "ihc.png", "retina.jpg", "camera.png",
                    "brick.png")),
        (("matplotlib", "mpl-data/sample_data/"), ("grace_hopper.jpg",)),
        (_MVTB, tuple(f"flowers{number}.png" for number in (1, 2, 3, 4, 5, 6, 7, 9))),
    ),
    "val": (
        (("sklearn", "datasets/images/"), ("flower.jpg",)),
        (_SKIMAGE, ("gravel.png", "coins.png")),
        (_MVTB, tuple(f"campus/P10704{number}.png" for number in (91, 96, 98))
              + tuple(f"campus/P10705{number}.png" for number in ("00", "07", "12"))),
    ),
    "test": (
        (_SKIMAGE, ("chelsea.png", "rocket.jpg", "grass.png")),
        (("sklearn", "datasets/images/"), ("china.jpg",)),
        (_FOOLBOX, ("00_243.jpg", "01_559.jpg", "02_438.jpg", "03_990.jpg", "04_949.jpg", "05_853.jpg", "06_609.jpg",
                    "07_609.jpg", "08_915.jpg", "09_455.jpg", "11_630.jpg", "12_741.jpg", "13_471.jpg", "14_129.jpg",
                    "15_99.jpg", "16_251.jpg", "17_22.jpg", "18_317.jpg", "19_305.jpg")),
        (_MVTB, ("building2-3.png", "butterfly.jpg", "castle.png", "church.png", "eiffel-1.png", "greenscreen.png",
                 "lab-scene.png", "notre-dame.png", "parks.png", "penguins.png", "road.png", "rocks2-l.png", "roof.png",
                 "street.png", "tomato_54.png", "walls-l.png", "arucoboard.png", "mosaic/aerialphoto.png",
                 "seq/im.001.png")),
    ),
}  # fmt: skip
#: Split -> (package, file in it) of each photograph.
PHOTOGRAPHS: dict[str, tuple[tuple[str, str], ...]] = {
    split: tuple((package, folder + name) for (package, folder), names in parts for name in names)
    for split, parts in _SOURCES.items()
}


class DemoSetError(UserError, RuntimeError):
    """A photograph of the demo set is missing from its wheel."""


@dataclass(frozen=True)
class DemoSet:
    """samples of all splits; images: encoded JPEG by `Sample.path` (for `FrameDataset(images=...)`)."""

    samples: list[Sample]
    images: dict[str, np.ndarray]

    def split(self, name: str) -> list[Sample]:
        """The samples of "train", "val" or "test"."""
        return [s for s in self.samples if s.split == name]


def build_demo_set(
    *,
    train_families: Sequence[str] = TRAIN_FAMILIES,
    test_families: Sequence[str] = tuple(FAMILIES),
    train_crops: int = 1200,
    val_crops: int = 240,
    test_crops: int = 120,
    size: int = 224,
    quality: tuple[int, int] = (82, 97),
    seed: int = 0,
    progress: bool = True,
) -> DemoSet:
    """Build the demo set.

    Args:
        train_families: forgeries of train and val (val is for model selection and sees no other family).
        test_families: forgeries of test, seen and unseen ones.
        train_crops, val_crops: images in all, half of them fake, families in turn.
        test_crops: real images; each family adds as many fakes of the same crops.
        size: side of a crop in pixels, at least 64. quality: range of the JPEG quality, the same for real and fake.

    The group of a sample is its photograph, its video one crop: intervals are clustered by photograph.
    """
    for name in (*train_families, *test_families):
        if name not in FAMILIES:
            raise ValueError(f"unknown forgery {name!r}; known: {', '.join(FAMILIES)}")
    if not 64 <= size <= 288:
        raise ValueError(f"size must be in 64..288 (the smallest photograph is 300 px high), got {size}")
    for name, value in (("train_crops", train_crops), ("val_crops", val_crops), ("test_crops", test_crops)):
        if value < 2:
            raise ValueError(f"{name} must be at least 2, got {value}")
    samples: list[Sample] = []
    images: dict[str, np.ndarray] = {}
    pairs = {"train": train_crops // 2, "val": val_crops // 2, "test": test_crops}
    bar = Progress(total=sum(pairs.values()), desc="demo set", unit="crop", disable=not progress)
    for split_index, (split, count) in enumerate(pairs.items()):
        # crop i is of photograph i, round and round
        photographs = {Path(file).stem: load_photograph(package, file) for package, file in PHOTOGRAPHS[split][:count]}
        names = list(photographs)
        for i in range(count):
            # One generator per crop: a crop depends neither on their number nor on the families.
            name = names[i % len(names)]
            rng = np.random.default_rng([seed, split_index, i])
            crop = draw_crop(photographs[name], size, rng)
            jpeg_quality = int(rng.integers(quality[0], quality[1] + 1))
            families = test_families if split == "test" else (train_families[i // len(names) % len(train_families)],)
            grey = bool((crop == crop[..., :1]).all())
            versions = {"real": crop}
            for family in families:
                family_rng = np.random.default_rng([seed, split_index, i, *family.encode()])
                forged, _ = forge(family, crop, family_rng)
                versions[family] = _to_grey(forged) if grey else forged
            for method, rgb in versions.items():
                label = int(method != "real")
                folder = f"fake-{method}" if label else "real"
                path = f"{DATASET}/{split}/{folder}/{name}-{i:05d}.jpg"
                images[path] = encode_jpeg(rgb, jpeg_quality)
                video, group = f"{DATASET}/{folder}/{name}-{split}-{i:05d}", f"{DATASET}/{name}"
                samples.append(Sample(path, label, DATASET, method, video, split, group))
            bar.update()
    bar.close()
    return DemoSet(samples, images)


def load_photograph(package: str, file: str) -> np.ndarray:
    """RGB uint8 [H, W, 3] of a file inside an installed package (which is not imported)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DemoSetError(f'the demo needs the photographs in the package {package}: pip install "masm_ext[demo]"')
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        raise DemoSetError(f"{path} is missing: this version of {package} does not ship it")
    return read_image(path)


def draw_crop(photograph: np.ndarray, size: int, rng: np.random.Generator, tries: int = 20) -> np.ndarray:
    """A random crop [size, size, 3]: scaled down by up to 0.6, mirrored, toned; with some texture if there is any.

    The scale never exceeds 1: enlarging would put the trace of `resample` into real images.
    """
    h, w = photograph.shape[:2]
    lowest = max(0.6, (size + 8) / min(h, w)) if min(h, w) < 1000 else 0.35
    best, best_texture = None, -1.0
    for _ in range(tries):
        scale = rng.uniform(min(lowest, 1.0), 1.0)
        side = min(round(size / scale), h, w)
        top, left = int(rng.integers(h - side + 1)), int(rng.integers(w - side + 1))
        crop = photograph[top : top + side, left : left + side]
        crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
        texture = float(np.abs(cv2.Laplacian(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.CV_32F)).mean())
        if texture > best_texture:
            best, best_texture = crop, texture
        if texture >= 4.0:
            break
    if rng.random() < 0.5:
        best = best[:, ::-1]
    # Gamma and exposure of the whole crop, one curve for all channels, so that grey stays grey.
    levels = 255 * (np.arange(256) / 255) ** rng.uniform(0.8, 1.25) * rng.uniform(0.9, 1.08)
    return cv2.LUT(np.ascontiguousarray(best), np.clip(np.rint(levels), 0, 255).astype(np.uint8))


def _to_grey(rgb: np.ndarray) -> np.ndarray:
    """A forgery of a grey photograph stays grey; colour would reveal it."""
    return np.repeat(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
