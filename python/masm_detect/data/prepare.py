"""From videos and images to aligned face crops, a DeepfakeBench JSON and a report of everything that was lost.

Source layout: `real/` and `fake-<method>/`, each holding video files, folders of frames, or images. The largest face of
each of `frames_per_video` frames, evenly spread from the first to the last, is aligned and written as PNG. A video is
finished as a whole (its folder appears by one rename), so that a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
from tqdm.auto import tqdm

from masm_detect.data.faces import FaceDetector, MtcnnDetector, align_crop, largest_face
from masm_detect.data.images import UnreadableImage, png_bytes, read_image
from masm_detect.data.records import (
    IMAGE_SUFFIXES,
    SPLITS,
    VIDEO_SUFFIXES,
    Sample,
    natural_key,
    with_name_groups,
    write_deepfakebench,
)
from masm_detect.errors import UserError
from masm_detect.results import check_output_folder, write_json

RECORD = ".record.json"  # beside the crops of a finished video
RECORD_FORMAT = 1


class PrepareError(UserError, ValueError):
    """The source cannot be prepared: its layout, its split file, or no face in all of it."""


@dataclass(frozen=True)
class Loss:
    """A frame (or, with frame None, a whole video) that gave no crop, and why."""

    video: str
    frame: int | None
    reason: str


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did. `lost_videos`: no crop at all; `lost_frames`: frames of videos that gave other crops."""

    dataset: str
    json_path: str
    coverage_path: str
    detector: str
    videos: int
    videos_written: int
    videos_resumed: int
    frames_wanted: int
    frames_written: int
    lost_videos: list[Loss] = field(default_factory=list)
    lost_frames: list[Loss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    by_method: dict[str, dict[str, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{'method':<24} {'videos':>7} {'lost':>5} {'frames':>7} {'lost':>5}"]
        for method, n in self.by_method.items():
            lost = n["frames_wanted"] - n["frames_written"]
            lines.append(f"{method:<24} {n['videos']:>7} {n['videos_lost']:>5} {n['frames_written']:>7} {lost:>5}")
        reasons = Counter(loss.reason.split(":")[0] for loss in (*self.lost_videos, *self.lost_frames))
        lines += [f"lost, {reason}: {count}" for reason, count in reasons.most_common()]
        return "\n".join([*lines, f"wrote {self.json_path}", f"every loss is listed in {self.coverage_path}"])


@dataclass(frozen=True)
class _Source:
    """One video: a video file, or the images of a folder."""

    folder: str  # real or fake-<method>
    name: str
    files: tuple[Path, ...]

    @property
    def is_video(self) -> bool:
        return self.files[0].suffix.lower() in VIDEO_SUFFIXES

    @property
    def kind(self) -> str:
        return "images" if len(self.files) == 1 and not self.is_video else "videos"

    @property
    def key(self) -> str:
        return f"{self.folder}/{self.name}"


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    dataset: str,
    frames_per_video: int = 32,
    size: int = 256,
    scale: float = 1.3,
    detector: FaceDetector | None = None,
    splits: str | Path | Mapping[str, Sequence] | Sequence[float] | None = None,
    split_seed: int = 0,
    progress: bool = True,
) -> PrepareReport:
    """Cut the faces out of `source` into `out`.

    Writes `out/frames/<real|fake-method>/<video>/<frame>.png`, `out/<dataset>.json` (DeepfakeBench) and
    `out/coverage.json`. Videos finished by an earlier run with the same settings and unchanged source are kept.

    Args:
        source: folder with `real/` and `fake-<method>/`.
        frames_per_video: at most this many frames of a video, evenly spread over all of it.
        size, scale: side of a crop in pixels, and its margin (see `faces.align_crop`).
        detector: None = MTCNN (`faces.MtcnnDetector`).
        splits: None = no split; (train, val, test) shares, drawn by group with `split_seed`; or a table or JSON file
            {"train": [...], "val": [...], "test": [...]} of video names, or of pairs of ids as FaceForensics++ has
            it. Videos named target_source, as in FaceForensics++, are split by pair, together with both originals.

    Raises PrepareError; a file that cannot be read or has no face is no error but a listed loss, unless all are lost.
    """
    source, out = Path(source), Path(out)
    if frames_per_video < 1 or size < 16 or scale < 1:
        raise PrepareError(
            f"need frames_per_video >= 1, size >= 16, scale >= 1; got {frames_per_video}, {size}, {scale}"
        )
    if not dataset or "/" in dataset:
        raise PrepareError(f"dataset must be a plain name, got {dataset!r}")
    check_output_folder(out)
    videos = find_videos(source)
    split_of = assign_splits(
        dataset, [v.key for v in videos], splits, split_seed
    )  # before the long work: errors come early
    detector = detector if detector is not None else MtcnnDetector()
    settings = {
        "format": RECORD_FORMAT,
        "frames_per_video": frames_per_video,
        "size": size,
        "scale": scale,
        "detector": detector.name,
    }
    records, resumed = {}, 0
    with tqdm(videos, desc=f"prepare {dataset}", unit="video", disable=not progress) as bar:
        for video in bar:
            folder = out / "frames" / video.folder / video.name
            fingerprint = settings | {"source": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in video.files]}
            record = _finished(folder, fingerprint)
            resumed += record is not None
            if record is None:
                record = _prepare_video(video, folder, fingerprint, detector)
            records[video.key] = record
            bar.set_postfix(lost_videos=sum(not r["frames"] for r in records.values()))
    return _write_results(out, dataset, detector.name, videos, records, split_of, resumed)


def find_videos(source: Path) -> list[_Source]:
    """The videos, frame folders and images of `real/` and `fake-<method>/`, sorted; PrepareError on another layout."""
    if not source.is_dir():
        raise PrepareError(f"{source} is not a folder")
    classes = sorted(c for c in source.iterdir() if c.is_dir() and not c.name.startswith("."))
    strangers = [c.name for c in classes if c.name != "real" and not (c.name.startswith("fake-") and len(c.name) > 5)]
    if strangers or not classes:
        raise PrepareError(f"{source}: expected folders real/ and fake-<method>/, found {strangers or 'none'}")
    found: list[_Source] = []
    for c in classes:
        frames: dict[str, list[Path]] = defaultdict(list)
        for file in sorted((f for f in c.rglob("*") if f.is_file() and not f.name.startswith(".")), key=natural_key):
            suffix, place = file.suffix.lower(), file.relative_to(c)
            if suffix in IMAGE_SUFFIXES and place.parent != Path("."):
                frames[place.parent.as_posix()].append(file)
            elif suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                found.append(_Source(c.name, place.with_suffix("").as_posix(), (file,)))
            else:
                raise PrepareError(f"{file} is neither a video nor an image; move it out of {source}")
        found += [_Source(c.name, name, tuple(files)) for name, files in frames.items()]
    if not found:
        raise PrepareError(f"{source} holds no video and no image")
    twice = [key for key, n in Counter(v.key for v in found).items() if n > 1]
    if twice:
        raise PrepareError(
            f"{len(twice)} names occur twice (files that differ in their suffix only?), e.g. {twice[0]!r}"
        )
    return sorted(found, key=lambda v: v.key)


def read_frames(path: Path, count: int) -> Iterator[tuple[int, int, np.ndarray | None]]:
    """(frame number, frames in the video, RGB uint8 [H, W, 3] or None if undecodable) of `count` spread frames.

    Frames are counted by reading through the video once: the number in the container is often wrong, and seeking by it
    lands elsewhere. Raises UnreadableImage if there is no frame at all.
    """
    if path.stat().st_size == 0:
        raise UnreadableImage("empty file (0 bytes)")
    total = 0
    capture = _open(path)
    while capture.grab():
        total += 1
    capture.release()
    if total == 0:
        raise UnreadableImage("unreadable: no frame can be decoded")
    wanted = set(spread(total, count))
    capture = _open(path)
    for number in range(total):
        ok = capture.grab()
        if number in wanted:
            ok, bgr = capture.retrieve() if ok else (False, None)
            yield number, total, cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB) if ok and bgr is not None else None
    capture.release()


def spread(total: int, count: int) -> list[int]:
    """`count` numbers (or all) of 0..total-1, evenly spread, first and last included (for count >= 2)."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def assign_splits(dataset: str, keys: Sequence[str], splits, seed: int = 0) -> dict[str, str]:
    """Split of every video key ("real/000", "fake-Deepfakes/000_003"); groups (FaceForensics++ pairs) stay together."""
    if splits is None:
        return dict.fromkeys(keys, "")
    samples = with_name_groups(
        [Sample(k, int(not k.startswith("real/")), dataset, k.split("/")[0], f"{dataset}/{k}") for k in keys]
    )
    groups = {s.path: s.group for s in samples}
    if isinstance(splits, (str, os.PathLike)):
        splits = _read_split_file(Path(splits))
    if isinstance(splits, Mapping):
        return _splits_by_name(groups, splits)
    return _splits_by_share(groups, splits, seed)


def _prepare_video(video: _Source, folder: Path, fingerprint: dict, detector: FaceDetector) -> dict:
    """Cut one video; its folder, with the crops and the record, appears at once or not at all."""
    if folder.exists() and not (folder / RECORD).is_file():
        raise PrepareError(f"{folder} exists and was not written by this command: choose another output folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    record: dict = {"fingerprint": fingerprint, "frames": [], "wanted": 0, "lost": [], "reason": None, "note": None}
    try:
        for number, total, rgb in _frames_of(video, fingerprint["frames_per_video"]):
            record["wanted"] += 1
            face, reason = None, rgb if isinstance(rgb, str) else "unreadable frame" if rgb is None else None
            if reason is None:
                face = largest_face(detector.detect(rgb))
                reason = None if face is not None else "no face"
            if face is None:
                record["lost"].append([number, reason])
                continue
            name = f"{number:06d}.png"
            (partial / name).write_bytes(png_bytes(align_crop(rgb, face, fingerprint["size"], fingerprint["scale"])))
            record["frames"].append(name)
            record["note"] = _count_note(video, total)
    except UnreadableImage as error:
        record["reason"] = str(error)
    if not record["frames"] and record["reason"] is None:
        reasons = {reason.split(":")[0] for _, reason in record["lost"]}
        record["reason"] = reasons.pop() if len(reasons) == 1 else "no face or unreadable in every frame"
    write_json(partial / RECORD, record)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return record


def _frames_of(video: _Source, count: int) -> Iterator[tuple[int, int, np.ndarray | str | None]]:
    if video.is_video:
        yield from read_frames(video.files[0], count)
        return
    for number in spread(len(video.files), count):
        try:
            yield number, len(video.files), read_image(video.files[number])
        except UnreadableImage as error:
            # The name alone: the report can be moved, and shown, without the folders of this machine.
            reason = str(error).replace(str(video.files[number]), video.files[number].name)
            yield number, len(video.files), f"unreadable image: {reason}"


def _count_note(video: _Source, total: int) -> str | None:
    if not video.is_video:
        return None
    capture = _open(video.files[0])
    said = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    capture.release()
    return f"the container says {said} frames, {total} can be read" if said != total else None


def _open(path: Path) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise UnreadableImage("unreadable: not a video that OpenCV can open, or truncated")
    return capture


def _finished(folder: Path, fingerprint: dict) -> dict | None:
    """The record of a video that an earlier run finished with the same settings from the same files."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    if record.get("fingerprint") != fingerprint or not all((folder / name).is_file() for name in record["frames"]):
        return None
    return record


def _write_results(out: Path, dataset: str, detector: str, videos: list[_Source], records: dict[str, dict],
                   split_of: dict[str, str], resumed: int) -> PrepareReport:  # fmt: skip
    samples, lost_videos, lost_frames, notes = [], [], [], []
    by_method: dict[str, Counter] = defaultdict(Counter)
    for video in videos:
        record, label = records[video.key], int(video.folder != "real")
        method = video.folder.removeprefix("fake-")
        count = by_method[method]
        count.update(videos=1, frames_wanted=record["wanted"], frames_written=len(record["frames"]))
        count["videos_lost"] += not record["frames"]
        losses = [Loss(video.key, number, reason) for number, reason in record["lost"]]
        if record["frames"]:
            lost_frames += losses
        else:
            lost_videos.append(Loss(video.key, None, record["reason"]))
        if record["note"]:
            notes.append(f"{video.key}: {record['note']}")
        for name in record["frames"]:
            path = str(out / "frames" / video.folder / video.name / name)
            samples.append(Sample(path, label, dataset, method, f"{dataset}/{video.key}", split_of[video.key]))
    samples = with_name_groups(samples)
    totals = sum(by_method.values(), Counter())
    report = PrepareReport(
        dataset=dataset, detector=detector,
        json_path=str(out / f"{dataset}.json"), coverage_path=str(out / "coverage.json"),
        videos=len(videos), videos_written=len(videos) - len(lost_videos), videos_resumed=resumed,
        frames_wanted=totals["frames_wanted"], frames_written=totals["frames_written"],
        lost_videos=lost_videos, lost_frames=lost_frames, notes=notes,
        by_method={m: {k: c[k] for k in ("videos", "videos_lost", "frames_wanted", "frames_written")}
                   for m, c in sorted(by_method.items())},
    )  # fmt: skip
    # Paths inside the report are relative, so that the folder can be moved.
    write_json(
        report.coverage_path, asdict(replace(report, json_path=f"{dataset}.json", coverage_path="coverage.json"))
    )
    if not samples:
        kinds = " and ".join(sorted({video.kind for video in videos}, reverse=True))
        raise PrepareError(
            f"no face was found in any of the {len(videos)} {kinds}; the reasons are in {report.coverage_path}"
        )
    write_deepfakebench(samples, report.json_path)
    return report


def _read_split_file(path: Path) -> dict:
    try:
        table = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise PrepareError(f"cannot read the split file {path} ({error})") from error
    if not isinstance(table, dict):
        raise PrepareError(f'{path}: expected {{"train": [...], "val": [...], "test": [...]}}')
    return table


def _splits_by_name(groups: dict[str, str], table: Mapping[str, Sequence]) -> dict[str, str]:
    unknown = set(table) - set(SPLITS)
    if unknown:
        raise PrepareError(f"split names must be among {', '.join(SPLITS)}, got {sorted(unknown)}")
    split_of_id: dict[str, str] = {}
    for split, entries in table.items():
        for name in (str(n) for entry in entries for n in (entry if isinstance(entry, (list, tuple)) else [entry])):
            if split_of_id.setdefault(name, split) != split:
                raise PrepareError(f"{name!r} is in two splits, {split_of_id[name]} and {split}")
    result = {}
    for key in groups:
        name = key.split("/", 1)[1]
        splits = {split_of_id[n] for n in (key, name, *name.split("_")) if n in split_of_id}
        if len(splits) != 1:
            raise PrepareError(
                f"{key} is in {'no split' if not splits else f'the splits {sorted(splits)}'} of the split file"
            )
        result[key] = splits.pop()
    _refuse_leak(groups, result)
    return result


def _splits_by_share(groups: dict[str, str], shares: Sequence[float], seed: int) -> dict[str, str]:
    shares = [float(s) for s in shares]
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise PrepareError(f"splits as shares must be three numbers (train, val, test) that sum to 1, got {shares}")
    names = sorted(set(groups.values()))
    used = [i for i in range(3) if shares[i] > 0]
    if len(names) < len(used):
        raise PrepareError(f"{len(names)} groups cannot fill {len(used)} splits: each split needs a group of its own")
    counts = {i: 1 for i in used}  # no split stays empty; the rest goes where most is missing
    while sum(counts.values()) < len(names):
        counts[max(used, key=lambda i: shares[i] * len(names) - counts[i])] += 1
    order = np.random.default_rng(seed).permutation(names).tolist()
    plan = [SPLITS[i] for i in used for _ in range(counts[i])]
    split_of_group = dict(zip(order, plan))
    return {key: split_of_group[group] for key, group in groups.items()}


def _refuse_leak(groups: dict[str, str], result: dict[str, str]) -> None:
    seen: dict[str, str] = {}
    for key, group in groups.items():
        if seen.setdefault(group, result[key]) != result[key]:
            raise PrepareError(
                f"group {group!r} is in two splits, {seen[group]} and {result[key]}: originals and fakes would leak"
            )
