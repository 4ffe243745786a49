"""Reads and writes the JSON files of DeepfakeBench: data set -> label -> split -> [compression] -> video -> frames."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from masm_detect.data.crop_recipe import FILE as RECIPE_FILE
from masm_detect.data.groups import with_pair_groups
from masm_detect.data.sample import SPLITS, DatasetError, Sample, natural_key
from masm_detect.data.walk import absent_files
from masm_detect.results import write_json

COMPRESSIONS = frozenset({"raw", "c0", "c23", "c40"})
# The label names of DeepfakeBench and its forks (FF-real, CelebDFv2_real, DFDCP_Real, DFDCP_FakeA, e4s_Fake, ...)
# and ours (real, fake-<method>). A name outside the table is an error, so that a typo is not read as a label.
# A real name is anchored to the known sets, or to DF40's "<forgery>_Real" in just this writing: the name of a forgery
# may end in "real" too.
_REAL_NAME = re.compile(
    r"^(?:(?i:real|FF-real|(?:CelebDFv[123]|CelebDF|DFDC|DFDCP|DFD|DFo|DF|UADFV|FFIW|WDF|FaceShifter)[_-]real)|\w[\w.-]*_Real)$"
)
_FAKE_NAME = re.compile(r"^(?:(?:.+[_-])?fake[AB]?|FF-(?:DF|F2F|FS|NT|FH|SH)|FaceShifter|fake-.+)$", re.IGNORECASE)
#: Names of splits in files of this format -> ours; "all": not divided.
_SPLIT_NAMES = {
    **{name: "train" for name in ("train", "training")},
    **{name: "val" for name in ("val", "valid", "validation", "dev")},
    **{name: "test" for name in ("test", "testing")},
    "all": "",
}

#: What `Path` would take out of a path; to ask is ten times as fast as to make a `Path` of each frame.
_UNTIDY = re.compile(r"//|/\.(?:/|$)|/$|^\./")


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
        f'FF-FS, FF-NT, FF-FH -> 1); give label_map={{"{name}": 0 or 1}} (0: real, 1: fake; masm train: '
        "--data.label_map, masm eval: --label_map)"
    )


def split_of(name: str, where: str, remedy: str) -> str:
    """The split "train", "val", "test" or "" (not divided) of a name; `remedy`: what to do about an unknown one."""
    if name.lower() not in _SPLIT_NAMES:
        raise DatasetError(
            f"{where} has a split {name!r}, which is not known: {remedy}; known are train, val, test, all (not "
            f"divided) and {', '.join(n for n in _SPLIT_NAMES if n not in (*SPLITS, 'all'))}"
        )
    return _SPLIT_NAMES[name.lower()]


def read_deepfakebench(path: str | Path, **options: Any) -> list[Sample]:
    """`read_ungrouped`, with the groups that `groups.with_pair_groups` reads in the names of the videos."""
    return with_pair_groups(read_ungrouped(path, **options))


def read_ungrouped(
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

    The group of a sample is the one that its record has, else its video.

    Args:
        root: folder of relative frame paths; None = the folder of the JSON. Backslashes are read as slashes.
        prefix_map: {prefix in the file: prefix here}, the longest match wins, applied before `root`.
        splits: which splits to read; None = all. The published files often repeat the test videos as val.
        compression: "c23", "c40", ... if the file has several; None = the only one.
        missing: frames that do not exist: "error" raises for them, "skip" leaves them out with a warning that counts
            them, "keep" does not look.
    """
    path = Path(path)
    if missing not in ("error", "skip", "keep"):
        raise ValueError(f'missing must be "error", "skip" or "keep", got {missing!r}')
    tree = _load_json(path)
    if isinstance(tree, dict) and isinstance(tree.get("format"), str):  # a file of this program, not a list of videos
        hint = f": name the folder {path.parent} instead" if path.name == RECIPE_FILE else ""
        raise DatasetError(f"{path} is of the format {tree['format']}, and lists no images{hint}")
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
            for split_name, videos in _items(by_split, path, f"splits of {dataset}/{label_name}"):
                split = split_of(split_name, f"{path}: {dataset}/{label_name}", "rename it in the file")
                found_splits.add(split or "all")
                if splits is not None and (split or "all") not in splits:
                    continue
                where = f"{path}: {dataset}/{label_name}/{split_name}"
                videos = _as_videos(videos)
                for video, record in _items(_pick_compression(videos, compression, where), path, where):
                    frames, group = _check_record(record, label_name, f"{where}/{video}")
                    name = f"{dataset}/{label_name}/{video}"
                    paths = [_resolve(frame, root, prefix_map) for frame in frames]
                    samples += [Sample(path, label, dataset, method, name, split, group) for path in paths]
    if splits is not None and (unknown := sorted(set(splits) - found_splits)):
        raise DatasetError(
            f"{path} has no split {unknown}, it has {sorted(found_splits)} (all: not divided): name another split, or "
            "none, or make the splits with `masm prepare --splits`"
        )
    return samples if missing == "keep" else _drop_missing(samples, missing, path)


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


def _load_json(path: Path):
    if not path.is_file():
        raise DatasetError(f"no such file: {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte-order mark
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not valid JSON ({error})") from error


def _items(value, path: Path, what: str):
    if not isinstance(value, dict):
        raise DatasetError(f"{path}: expected a table of {what}, got {type(value).__name__}")
    return value.items()


def _as_videos(videos: Any) -> Any:
    """The videos of a split. DeepfakeBench's script writes one record in place of the val split of DFDC: it becomes a
    video, named after the folder of its frames.
    """
    if isinstance(videos, dict) and isinstance(videos.get("frames"), list):
        first = next((frame for frame in videos["frames"] if isinstance(frame, str)), "")
        return {Path(first.replace("\\", "/")).parent.name or "video": videos}
    return videos


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
        raise DatasetError(f"{where}: the record has label {record['label']!r}, but is listed under {label_name!r}")
    # Some writers list a video without faces, with no frames: there is nothing to read.
    return sorted(record["frames"], key=natural_key), str(record.get("group") or "")


def _resolve(frame: str, root: Path, prefix_map: dict[str, str] | None) -> str:
    frame = frame.replace("\\", "/")
    for prefix in sorted(prefix_map or (), key=len, reverse=True):
        if frame.startswith(prefix.replace("\\", "/")):
            frame = prefix_map[prefix] + frame[len(prefix) :]
            break
    path = os.path.join(root, frame)
    return str(Path(path)) if _UNTIDY.search(path) else path  # one spelling for one file


def _drop_missing(samples: list[Sample], missing: str, path: Path) -> list[Sample]:
    absent = absent_files([s.path for s in samples])
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


def _relative(path: str, root: Path) -> str:
    try:
        return Path(path).resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        return Path(path).as_posix()
