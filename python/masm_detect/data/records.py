"""A data set is a list of `Sample`s, read from a DeepfakeBench JSON or from plain `real/`, `fake-*/` folders."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from masm_detect.errors import UserError
from masm_detect.results import write_json

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})
SPLITS = ("train", "val", "test")
COMPRESSIONS = frozenset({"raw", "c0", "c23", "c40"})

# The label names of DeepfakeBench and its forks (FF-real, CelebDFv2_real, DFDCP_Real, DFDCP_FakeA, e4s_Fake, ...)
# and ours (real, fake-<method>). A name outside the table is an error: a typo must not become a label.
# A real name is anchored to the known sets, or to DF40's "<forgery>_Real" in just this writing: the name of a forgery
# may end in "real" too.
_REAL_NAME = re.compile(
    r"^(?:(?i:real|FF-real|(?:CelebDFv[123]|CelebDF|DFDC|DFDCP|DFD|DFo|UADFV|FFIW|WDF|FaceShifter)[_-]real)|\w[\w.-]*_Real)$"
)
_FAKE_NAME = re.compile(r"^(?:(?:.+[_-])?fake[AB]?|FF-(?:DF|F2F|FS|NT|FH|SH)|FaceShifter|fake-.+)$", re.IGNORECASE)

# FaceForensics++: a fake is named target_source, its original target; both ids of a pair appear in both roles.
_PAIR_NAME = re.compile(r"^(\d{3})_(\d{3})$")


class DatasetError(UserError, ValueError):
    """The data set cannot be used as it is; the message names what is wrong and where."""


@dataclass(frozen=True)
class Sample:
    """One image.

    path: file, or key of an in-memory image. label: 1 = fake. dataset: name. method: "real" or the forgery's name.
    video: "dataset/label-name/video", so that videos of equal names but of other labels or sets stay apart.
    split: "train", "val", "test" or "" (not split yet). group: the unit that is never split over train and test, and
    by which bootstraps are clustered; the video unless something larger is known.
    """

    path: str
    label: int
    dataset: str
    method: str
    video: str
    split: str = ""
    group: str = ""

    def __post_init__(self) -> None:
        if self.label not in (0, 1):
            raise DatasetError(f"label must be 0 (real) or 1 (fake), got {self.label!r} for {self.path}")
        if not self.group:
            object.__setattr__(self, "group", self.video)


def label_of(name: str, label_map: dict[str, int] | None = None, where: str = "") -> int:
    """0 (real) or 1 (fake) of a label name; `label_map` comes first, then `fake-...`, then DeepfakeBench's names."""
    if label_map and name in label_map:
        return label_map[name]
    if len(name) > 5 and name.lower().startswith("fake-"):
        return 1
    if _REAL_NAME.match(name):
        return 0
    if _FAKE_NAME.match(name):
        return 1
    raise DatasetError(
        f"{where + ': ' if where else ''}label {name!r} is not in the table of label names "
        "(real, FF-real, CelebDFv2_real, DFD_real, ..., <forgery>_Real -> 0; fake-<method>, ...fake, FF-DF, FF-F2F, "
        f'FF-FS, FF-NT, FF-FH -> 1); give label_map={{"{name}": 0 or 1}} (masm train: data.label_map)'
    )


def read_dataset(path: str | Path, **options) -> list[Sample]:
    """`read_deepfakebench` for a .json file, `read_folder` for a folder; `options` go to that reader."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path, **options)
    if path.suffix == ".json":
        return read_deepfakebench(path, **options)
    what = "" if path.exists() else "there is no such file or folder; "
    raise DatasetError(f"{path}: {what}expected a DeepfakeBench .json file or a folder with real/ and fake-<method>/")


def read_deepfakebench(
    path: str | Path,
    *,
    root: str | Path | None = None,
    prefix_map: dict[str, str] | None = None,
    splits: Sequence[str] | None = None,
    compression: str | None = None,
    label_map: dict[str, int] | None = None,
    missing: str = "error",
) -> list[Sample]:
    """Samples of a DeepfakeBench JSON: dataset -> label -> split -> [compression] -> video -> {"label", "frames"}.

    Args:
        root: folder of relative frame paths; None = the folder of the JSON. Backslashes are read as slashes.
        prefix_map: {prefix in the file: prefix here}, the longest match wins, applied before `root`.
        splits: which splits to read; None = all. Mind that the published files often repeat the test videos as val.
        compression: "c23", "c40", ... where the file has that level; None = the only one that there is.
        missing: "error" (a frame that does not exist is an error) or "skip" (left out, with a warning that counts
        them).
    """
    path = Path(path)
    if missing not in ("error", "skip"):
        raise ValueError(f'missing must be "error" or "skip", got {missing!r}')
    tree = _load_json(path)
    if compression is None and len(levels := _compressions(tree)) > 1:
        raise DatasetError(
            f"{path} has the compressions {levels}: choose one with compression= "
            f"(masm train: --data.compression={levels[0]}; masm eval: --compression={levels[0]})"
        )
    root = Path(root) if root is not None else path.parent
    samples: list[Sample] = []
    found_splits: set[str] = set()
    for dataset, labels in _items(tree, path, "data sets"):
        for label_name, by_split in _items(labels, path, f"labels of {dataset}"):
            label = label_of(label_name, label_map, where=str(path))
            method = "real" if label == 0 else re.sub(r"^fake-", "", label_name)
            for split, videos in _items(by_split, path, f"splits of {dataset}/{label_name}"):
                found_splits.add(split)
                if splits is not None and split not in splits:
                    continue
                where = f"{path}: {dataset}/{label_name}/{split}"
                for video, record in _items(_pick_compression(videos, compression, where), path, where):
                    frames, group = _check_record(record, label_name, f"{where}/{video}")
                    samples += [
                        Sample(
                            path=_resolve(frame, root, prefix_map), label=label, dataset=dataset, method=method,
                            video=f"{dataset}/{label_name}/{video}", split="" if split == "all" else split, group=group,
                        )
                        for frame in frames
                    ]  # fmt: skip
    if splits is not None and (unknown := sorted(set(splits) - found_splits)):
        raise DatasetError(
            f"{path} has no split {unknown}, it has {sorted(found_splits)}: leave it out, or prepare with --splits"
        )
    return with_pair_groups(_drop_missing(samples, missing, path))


def read_folder(
    path: str | Path, *, dataset: str | None = None, split: str = "", video_pattern: str | None = None
) -> list[Sample]:
    """Samples of a folder with `real/` and `fake-<method>/`, each holding images or one folder of images per video.

    The same below `train/`, `val/`, `test/` is read with those splits. `dataset`: name, the folder's by default.
    Videos (or loose images) of one name in several of the folders form one group, whatever their split: a picture and
    its forgeries must not stand on both sides of a split. So pictures that have nothing to do with each other need
    names of their own, also over train/ and test/.
    `video_pattern`: regex whose group 1 is the video's name in a loose image's stem, e.g. r"(.+)_\\d+$" for
    `video_frame.jpg`; without it each loose image is a video of its own.
    """
    path = Path(path)
    if not path.is_dir():
        raise DatasetError(f"{path} is not a folder")
    dataset = dataset or path.resolve().name
    children = sorted(c for c in path.iterdir() if c.is_dir() and not c.name.startswith("."))
    if children and all(c.name in SPLITS for c in children):
        nested = [read_folder(c, dataset=dataset, split=c.name, video_pattern=video_pattern) for c in children]
        return with_name_groups([sample for part in nested for sample in part])
    samples: list[Sample] = []
    strangers = [c.name for c in children if c.name != "real" and not c.name.startswith("fake-")]
    if strangers or not children:
        raise DatasetError(f"{path}: expected folders real/ and fake-<method>/, found {strangers or 'none'}")
    ignored: list[str] = []
    for child in children:
        label, method = (0, "real") if child.name == "real" else (1, child.name.removeprefix("fake-"))
        for file in sorted((f for f in child.rglob("*") if f.is_file()), key=natural_key):
            suffix = file.suffix.lower()
            if suffix in VIDEO_SUFFIXES:
                raise DatasetError(f"{file} is a video: run `masm prepare` first to cut the faces out of its frames")
            if suffix not in IMAGE_SUFFIXES:
                ignored += [] if file.name.startswith(".") else [str(file)]
                continue
            video = file.parent.relative_to(child).as_posix()
            if video == ".":
                video = _video_of(file.stem, video_pattern)
            samples.append(Sample(str(file), label, dataset, method, f"{dataset}/{child.name}/{video}", split))
    if ignored:
        warnings.warn(f"{path}: {len(ignored)} files are not images and were left out: {ignored[:5]}", stacklevel=2)
    if not samples:
        raise DatasetError(f"{path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return with_name_groups(samples)


def write_deepfakebench(samples: Sequence[Sample], path: str | Path, *, root: str | Path | None = None) -> None:
    """Write samples as a DeepfakeBench JSON, atomically; paths below `root` (None: the JSON's folder) become relative.

    Label names are "real" and "fake-<method>", unless the method already is a name of DeepfakeBench's table. A sample
    without a split goes to "all". Each record also keeps its "group", which DeepfakeBench ignores.
    """
    path = Path(path)
    root = Path(root) if root is not None else path.parent
    tree: dict = {}
    written: dict[tuple[str, ...], str] = {}
    for s in samples:
        known = s.label == 1 and _FAKE_NAME.match(s.method) and not s.method.lower().startswith("fake-")
        name = "real" if s.label == 0 else s.method if known else f"fake-{s.method}"
        video = s.video.split("/", 2)[-1]
        if (other := written.setdefault((s.dataset, name, s.split, video), s.video)) != s.video:
            raise DatasetError(f"{path}: the videos {other!r} and {s.video!r} would become one, {name}/{video}")
        record = (
            tree.setdefault(s.dataset, {})
            .setdefault(name, {})
            .setdefault(s.split or "all", {})
            .setdefault(video, {"label": name, "frames": [], "group": s.group})
        )
        record["frames"].append(_relative(s.path, root))
    write_json(path, tree)


def check_samples(samples: Sequence[Sample], need_both_classes: bool = True) -> None:
    """Raise DatasetError for an empty set, one class only, an image twice, or an image or a group in several splits."""
    if not samples:
        raise DatasetError("the data set is empty")
    labels = {s.label for s in samples}
    if need_both_classes and len(labels) == 1:
        only = "fake" if labels == {1} else "real"
        raise DatasetError(f"all {len(samples)} samples are {only}: both classes are needed")
    seen: dict[str, str] = {}
    splits_of: dict[tuple[str, str], set[str]] = defaultdict(set)
    for s in samples:
        if s.path in seen and seen[s.path] == s.split:
            raise DatasetError(f"{s.path} appears twice in split {s.split or '(none)'!r}")
        if seen.setdefault(s.path, s.split) != s.split:
            raise DatasetError(f"{s.path} is in the splits {seen[s.path]!r} and {s.split!r}: {_LEAK_HELP}")
        splits_of[s.dataset, s.group].add(s.split)
    leaks = [(group, sorted(splits)) for (_, group), splits in splits_of.items() if len(splits) > 1]
    if leaks:
        group, where = leaks[0]
        raise DatasetError(f"{len(leaks)} groups are in more than one split, e.g. {group!r} in {where}: {_LEAK_HELP}")


_LEAK_HELP = (
    "a score on them would leak. Published DeepfakeBench files often repeat the test videos as val: then read the "
    "splits that you need alone (splits=[\"train\"], masm train: --data.splits='[train]', which holds out "
    "data.val_fraction of its groups; masm eval: --split test). In plain folders one name means one picture: give "
    "other pictures other names"
)


def limit_frames(samples: Sequence[Sample], per_video: int | None) -> list[Sample]:
    """At most `per_video` frames of each video in each split, evenly spread (first and last included), in the given
    order; None keeps all.
    """
    if per_video is None:
        return list(samples)
    if per_video < 1:
        raise ValueError(f"per_video must be at least 1, got {per_video}")
    positions: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, s in enumerate(samples):
        positions[s.split, s.video].append(i)
    kept: set[int] = set()
    for indices in positions.values():
        picks = np.linspace(0, len(indices) - 1, min(per_video, len(indices))).round().astype(int)
        kept.update(indices[p] for p in picks)
    return [s for i, s in enumerate(samples) if i in kept]


def _load_json(path: Path):
    if not path.is_file():
        raise DatasetError(f"no such file: {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not valid JSON ({error})") from error


def _items(value, path: Path, what: str):
    if not isinstance(value, dict):
        raise DatasetError(f"{path}: expected a table of {what}, got {type(value).__name__}")
    return value.items()


def _pick_compression(videos, compression: str | None, where: str):
    levels = sorted(COMPRESSIONS & set(videos)) if isinstance(videos, dict) else []
    if not levels or _is_videos(videos):
        return videos  # this data set has no compression level
    if compression is not None and compression not in levels:
        raise DatasetError(f"{where} has no compression {compression!r}, it has {levels}")
    return videos[compression or levels[0]]


def _compressions(tree) -> list[str]:
    """The compression levels of the whole file: data set -> label -> split -> [compression] -> video."""
    nodes = [tree]
    for _ in range(3):
        nodes = [child for node in nodes if isinstance(node, dict) for child in node.values()]
    return sorted({name for node in nodes if isinstance(node, dict) and not _is_videos(node) for name in node}
                  & COMPRESSIONS)  # fmt: skip


def _is_videos(table: dict) -> bool:
    return any("frames" in value for value in table.values() if isinstance(value, dict))


def _check_record(record, label_name: str, where: str) -> tuple[list[str], str]:
    if not isinstance(record, dict) or not isinstance(record.get("frames"), list):
        raise DatasetError(f'{where}: expected {{"label": ..., "frames": [...]}}')
    strangers = [frame for frame in record["frames"] if not isinstance(frame, str)]
    if strangers:
        raise DatasetError(
            f"{where}: frames must be paths, got {strangers[0]!r} ({type(strangers[0]).__name__}); a JSON with frame "
            "numbers is not in DeepfakeBench's format"
        )
    if record.get("label", label_name) != label_name:
        raise DatasetError(f"{where}: the record says label {record['label']!r}, but it stands under {label_name!r}")
    # A video whose faces were all lost is still listed by some writers, with no frames: nothing to read, nothing
    # lost here.
    return sorted(record["frames"], key=natural_key), str(record.get("group") or "")


def _resolve(frame: str, root: Path, prefix_map: dict[str, str] | None) -> str:
    frame = frame.replace("\\", "/")
    for prefix in sorted(prefix_map or (), key=len, reverse=True):
        if frame.startswith(prefix.replace("\\", "/")):
            frame = prefix_map[prefix] + frame[len(prefix) :]
            break
    return str(Path(frame) if os.path.isabs(frame) else root / frame)


def _drop_missing(samples: list[Sample], missing: str, path: Path) -> list[Sample]:
    absent = {s.path for s in samples if not os.path.isfile(s.path)}
    if not absent:
        return samples
    listed = ", ".join(sorted(absent)[:3])
    message = f"{path} names {len(absent)} frames that do not exist (of {len(samples)}): {listed}"
    if missing == "error":
        raise DatasetError(
            f'{message}; check root= and prefix_map=, or leave them out with missing="skip" '
            "(masm train: --data.missing=skip; masm eval: --missing=skip)"
        )
    warnings.warn(f"{message}; they are left out", stacklevel=3)
    return [s for s in samples if s.path not in absent]


def _root(parent: dict[str, str], x: str) -> str:
    """The representative of x in a disjoint-set forest; a new x is its own."""
    while parent.setdefault(x, x) != x:
        x = parent[x]
    return x


def with_pair_groups(samples: list[Sample]) -> list[Sample]:
    """FaceForensics++: real `a`, real `b` and the fakes `a_b`, `b_a` of every method form one group."""
    parent: dict[str, str] = {}
    find = partial(_root, parent)
    names = {s.video: s.video.split("/", 2)[-1] for s in samples}
    for s in samples:
        if s.label == 1 and (pair := _PAIR_NAME.match(names[s.video])):
            parent[find(f"{s.dataset}/{max(pair.groups())}")] = find(f"{s.dataset}/{min(pair.groups())}")
    if not parent:
        return samples
    members = defaultdict(list)
    for key in sorted(parent):
        members[find(key)].append(key.rsplit("/", 1)[-1])

    def group(s: Sample) -> str:
        pair = _PAIR_NAME.match(names[s.video])
        key = f"{s.dataset}/{pair[1] if pair else names[s.video]}"
        return f"{s.dataset}/pair/{'_'.join(members[find(key)])}" if key in parent else s.group

    return [replace(s, group=group(s)) if s.group == s.video else s for s in samples]


def with_name_groups(samples: list[Sample]) -> list[Sample]:
    """`with_pair_groups`, and then one group for all groups that share a video name under several labels."""
    samples = with_pair_groups(samples)
    parent: dict[str, str] = {}
    find = partial(_root, parent)
    names = {s.video: s.video.split("/", 2)[-1] for s in samples}
    first: dict[tuple[str, str], str] = {}
    for s in samples:
        one, other = find(first.setdefault((s.dataset, names[s.video]), s.group)), find(s.group)
        parent[max(one, other)] = min(one, other)
    sizes = Counter(find(group) for group in parent)
    label = {}
    for s in samples:
        root = find(s.group)
        label.setdefault(root, f"{s.dataset}/name/{names[s.video]}" if sizes[root] > 1 else s.group)
    return [replace(s, group=label[find(s.group)]) for s in samples]


def _video_of(stem: str, pattern: str | None) -> str:
    if pattern is None:
        return stem
    match = re.match(pattern, stem)
    if not match:
        raise DatasetError(f"video_pattern {pattern!r} does not match the image name {stem!r}")
    return match[1]


def _relative(path: str, root: Path) -> str:
    try:
        return Path(path).resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        return Path(path).as_posix()


def natural_key(path: str | Path) -> tuple:
    """Sort key under which frame 10 comes after frame 9."""
    return tuple(
        (0, int(t), "") if t.isdigit() else (1, 0, t) for t in re.split(r"(\d+)", str(path).replace("\\", "/"))
    )


def count_table(samples: Iterable[Sample]) -> str:
    """A small text table: images, videos and groups per data set, split and method."""
    rows: dict[tuple[str, str, str], list[Sample]] = defaultdict(list)
    for s in samples:
        rows[s.dataset, s.split or "-", s.method].append(s)
    lines = [f"{'data set':<20} {'split':<6} {'method':<20} {'images':>7} {'videos':>7} {'groups':>7}"]
    for (dataset, split, method), part in sorted(rows.items()):
        videos, groups = len({s.video for s in part}), len({s.group for s in part})
        lines.append(f"{dataset:<20} {split:<6} {method:<20} {len(part):>7} {videos:>7} {groups:>7}")
    return "\n".join(lines)
