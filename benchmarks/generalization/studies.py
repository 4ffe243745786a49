"""The two studies: which real data, how it is normalised and split, what is trained on and what is tested.

In both, forgeries are "seen" (trained on) or "unseen" (never trained on), and no person or image of the test is in
training or validation. The test part is the same for every method and seed. In gan-faces `seed` redraws training and
validation; in ffpp validation holds later frames of the training videos, the same for every seed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from masm_detect.config import AugmentConfig, DataConfig, OptimConfig
from masm_detect.data.decode import decode_image, encode_jpeg, png_bytes, read_image
from masm_detect.data.deepfakebench import read_deepfakebench
from masm_detect.data.prepare import prepare
from masm_detect.data.sample import Sample, limit_frames
from masm_detect.data.transforms import resize_image


class StudyDataMissing(FileNotFoundError):
    """The data of a study is not where it was looked for."""


@dataclass(frozen=True)
class Split:
    """The samples of one run. `test` holds real images and the fakes of seen and unseen forgeries."""

    train: list[Sample]
    val: list[Sample]
    test: list[Sample]


@dataclass(frozen=True)
class Study:
    """A study: how its data is made ready in a work folder, its directions, its splits, and its one schedule for all
    methods.

    `directions`: name -> the forgeries trained on. `headline`: the metric of the summary, "auc" (frames) or
    "video_auc". `cluster`: what its intervals leave out as one. `caution`: what a reader must know beside the numbers.
    """

    name: str
    forgeries: tuple[str, ...]
    directions: dict[str, tuple[str, ...]]
    headline: str
    cluster: str
    caution: str
    image_size: int
    data: DataConfig
    optim: OptimConfig
    prepare: Callable[[Path, Path], list[Sample]]
    split: Callable[[list[Sample], tuple[str, ...], int], Split]

    def unseen(self, direction: str) -> tuple[str, ...]:
        """The forgeries of the study that `direction` does not train on."""
        return tuple(method for method in self.forgeries if method not in self.directions[direction])


# FaceForensics++, H.264 crf 40 --------------------------------------------------------------------------------------

# Pairs of target and source. The first three are in neither the official validation nor test list, the others in the
# former.
TRAIN_PAIRS = (("183", "253"), ("469", "481"), ("866", "878"))
TEST_PAIRS = (("585", "599"), ("672", "720"))
FRAMES_PER_VIDEO = 64
FFPP_FAKE_FRAMES, FFPP_VAL_FRAMES, FFPP_TEST_FRAMES = 20, 6, 16


def prepare_ffpp(data: Path, work: Path) -> list[Sample]:
    """Face crops of the 50 videos, cut once into `work`."""
    source = data / "ffpp-c40-videos"
    if not source.is_dir():
        raise StudyDataMissing(f"{source} is absent")
    report = prepare(source, work / "ffpp", dataset="ffpp-c40", frames_per_video=FRAMES_PER_VIDEO)
    return read_deepfakebench(report.json_path)


def split_ffpp(samples: list[Sample], seen: tuple[str, ...], seed: int) -> Split:
    """Test: the two test pairs, all methods. Training: the three other pairs, the first three quarters of each video.

    Validation is the last fifth of the training videos: six identities are too few to hold one pair back, so it
    watches the fit, chooses nothing, and says little about new people. There is one real video for two fakes of one
    person, so it gives twice the frames. `seed` does not change the split here.
    """
    source = [s for s in samples if s.label == 0 or s.method in seen]
    train, val, test = [], [], [s for s in samples if _target(s) in _ids(TEST_PAIRS)]
    for video in dict.fromkeys(s.video for s in source if _target(s) in _ids(TRAIN_PAIRS)):
        frames = [s for s in source if s.video == video]
        share = 1 if frames[0].label == 1 else len(seen)
        # The gap between the two keeps neighbouring, nearly equal frames apart.
        train += limit_frames(frames[: len(frames) * 3 // 4], FFPP_FAKE_FRAMES * share)
        val += limit_frames(frames[len(frames) * 4 // 5 :], FFPP_VAL_FRAMES * share)
    return Split(
        train=[replace(s, split="train") for s in train],
        val=[replace(s, split="val") for s in val],
        # Intervals are clustered by video: with two pairs of people, clusters of people could not carry one.
        test=[replace(s, split="test", group=s.video) for s in limit_frames(test, FFPP_TEST_FRAMES)],
    )


def _ids(pairs: tuple[tuple[str, str], ...]) -> set[str]:
    return {name for pair in pairs for name in pair}


def _target(sample: Sample) -> str:
    """Id of the video that was forged, or of the real video: `183` of `183_253` and of `183`."""
    return sample.video.rsplit("/", 1)[-1].split("_")[0]


# GAN faces ----------------------------------------------------------------------------------------------------------

GAN_SIDE, GAN_QUALITY, GAN_CROP, GAN_TILE = 256, 90, 224, 112
GAN_TEST, GAN_VAL, GAN_TRAIN = 60, 20, 80


def prepare_gan(data: Path, work: Path) -> list[Sample]:
    """Every image at 256 px and JPEG quality 90 first, whatever it was; then the middle 224 px, cut into tiles of
    112 px.

    A tile is a frame and an image is a video here: the score of an image is the mean of its four tiles. No pixel is
    resampled after the normalisation, so the traces of a generator's upsampling stay.
    """
    source = data / "gan-faces"
    if not source.is_dir():
        raise StudyDataMissing(f"{source} is absent")
    samples = []
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        method = folder.name.removeprefix("fake-")
        for file in sorted(folder.iterdir()):
            tiles = [work / "gan-faces" / folder.name / f"{file.stem}-{number}.png" for number in range(4)]
            if not all(tile.is_file() for tile in tiles):
                _write_tiles(file, tiles)
            video = f"gan-faces/{folder.name}/{file.stem}"
            samples += [Sample(str(tile), int(method != "real"), "gan-faces", method, video) for tile in tiles]
    return samples


def split_gan(samples: list[Sample], seen: tuple[str, ...], seed: int) -> Split:
    """Test: GAN_TEST fixed images of each folder. Of the other real and seen ones, GAN_VAL each validate and GAN_TRAIN
    each train, redrawn with the seed.
    """
    parts: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    for method in sorted({s.method for s in samples}):
        mine = [s for s in samples if s.method == method]
        images = sorted({s.video for s in mine})
        # crc32: a stable number of a name; the built-in hash changes with every process.
        order = np.random.default_rng(zlib.crc32(method.encode())).permutation(images).tolist()
        test, rest = set(order[:GAN_TEST]), order[GAN_TEST:]
        rest = np.random.default_rng([seed, zlib.crc32(method.encode())]).permutation(rest).tolist()
        side_of = dict.fromkeys(test, "test") | dict.fromkeys(rest[:GAN_VAL], "val")
        side_of |= dict.fromkeys(rest[GAN_VAL : GAN_VAL + GAN_TRAIN], "train")
        for s in mine:
            side = side_of.get(s.video)
            if side == "test" or (side and (method == "real" or method in seen)):
                parts[side].append(replace(s, split=side))
    return Split(**parts)


def _write_tiles(file: Path, tiles: list[Path]) -> None:
    normal = decode_image(encode_jpeg(resize_image(read_image(file), GAN_SIDE), GAN_QUALITY), str(file))
    margin = (GAN_SIDE - GAN_CROP) // 2
    for number, tile in enumerate(tiles):
        top, left = margin + GAN_TILE * (number // 2), margin + GAN_TILE * (number % 2)
        tile.parent.mkdir(parents=True, exist_ok=True)
        temporary = tile.with_suffix(".tmp")
        temporary.write_bytes(png_bytes(normal[top : top + GAN_TILE, left : left + GAN_TILE]))
        os.replace(temporary, tile)


STUDIES = {
    "ffpp": Study(
        name="ffpp",
        forgeries=("Deepfakes", "NeuralTextures", "Face2Face", "FaceSwap"),
        directions={"Deepfakes+NeuralTextures": ("Deepfakes", "NeuralTextures")},
        headline="auc",
        cluster="video",
        caution="Ten identities in all, four of them (two pairs) in the test: it need not hold for others.",
        image_size=112,
        data=DataConfig(augment=AugmentConfig(flip=0.5)),
        # Validation frames are of the training people here: they watch the fit, and choose nothing.
        optim=OptimConfig(epochs=3, batch_size=16, select="last"),
        prepare=prepare_ffpp,
        split=split_ffpp,
    ),
    "gan-faces": Study(
        name="gan-faces",
        forgeries=("stylegan3", "boredhumans-gan"),
        directions={"stylegan3": ("stylegan3",), "boredhumans-gan": ("boredhumans-gan",)},
        headline="video_auc",
        cluster="image",
        caution="The three sources had been resized and compressed differently before they were made alike here, so "
        "a part of the measured difference may be that history and not the generator.",
        image_size=112,
        data=DataConfig(crop="center", augment=AugmentConfig(flip=0.5)),
        optim=OptimConfig(epochs=2, batch_size=16),
        prepare=prepare_gan,
        split=split_gan,
    ),
}
