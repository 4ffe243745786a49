"""From videos and images to aligned face crops, a DeepfakeBench JSON and a report of every skipped frame.

Source layout: `real/` and `fake-<method>/`, each holding video files, folders of frames, or images. From each video
`frames_per_video` frames are taken, evenly spread from the first to the last; the largest face of each is aligned and
written as PNG. The folder of a video is renamed into place when it is complete, so a killed run can continue.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from masm_detect.data.decode import UnreadableImage, png_bytes
from masm_detect.data.deepfakebench import write_deepfakebench
from masm_detect.data.faces import FaceDetector, align_crop, largest_face
from masm_detect.data.groups import with_name_groups
from masm_detect.data.mtcnn import MtcnnDetector
from masm_detect.data.prepare_report import Loss, PrepareReport
from masm_detect.data.sample import PrepareError, Sample
from masm_detect.data.splits import assign_splits
from masm_detect.data.videos import VideoSource, count_note, find_videos, frames_of
from masm_detect.results import check_output_folder, write_json
from masm_ext.progress import Progress

RECORD = ".record.json"  # beside the crops of a finished video
RECORD_FORMAT = 1


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
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareReport:
    """Cut the faces out of `source` into `out`.

    Writes `out/frames/<real|fake-method>/<video>/<frame>.png`, `out/<dataset>.json` (DeepfakeBench) and
    `out/coverage.json`. Videos finished by an earlier run with the same settings and unchanged source are kept.

    Args:
        source: folder with `real/` and `fake-<method>/`.
        out: folder for the crops, the JSON and the report.
        dataset: name of the data set; its JSON file is `<dataset>.json`.
        frames_per_video: maximum number of frames per video, evenly spread over the video.
        size: side of a crop in pixels.
        scale: size of a crop relative to the face; 1.3 is a margin of 0.15 on each side (`faces.align_crop`).
        detector: the face detector; None: MTCNN (`mtcnn.MtcnnDetector`).
        splits: three shares for train, val and test (0.7,0.15,0.15), assigned at random to whole groups; or a table or
            JSON file {"train": [...], "val": [...], "test": [...]} of video names (or pairs of ids, as FaceForensics++
            publishes them); None: no split. A group, which is never divided, is a video with all videos of its name in
            other folders; a fake named target_source, as in FaceForensics++, is in one group with both originals.
        overwrite: replace crops in `out` that were made with other settings.
        split_seed: seed of the random assignment.
        progress: show a progress bar.

    Returns:
        What was written, and every skipped frame and video with the reason.

    Raises:
        PrepareError: wrong settings or layout, or no face in any video. A single unreadable file, or one without a
            face, raises nothing; it is listed in the report.
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
    # Before the long work, so that a mistake in the splits is reported early.
    split_of = assign_splits(dataset, [v.key for v in videos], splits, split_seed)
    detector = detector if detector is not None else MtcnnDetector()
    settings = {
        "format": RECORD_FORMAT,
        "frames_per_video": frames_per_video,
        "size": size,
        "scale": scale,
        "detector": detector.name,
    }
    if not overwrite:
        _refuse_other_settings(out, settings)
    records, resumed = {}, 0
    with Progress(videos, desc=f"prepare {dataset}", unit="video", disable=not progress) as bar:
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


def _refuse_other_settings(out: Path, settings: dict) -> None:
    """Raise PrepareError if `out` holds crops of other settings: a run may have been trained on them."""
    for file in sorted(out.glob(f"frames/*/*/{RECORD}")):
        try:
            made = json.loads(file.read_text())["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged record: the video is prepared again
        changed = [
            f"{name} was {made.get(name)!r}, is {settings[name]!r}"
            for name in settings
            if made.get(name) != settings[name]
        ]
        if changed:
            raise PrepareError(
                f"{out} holds crops that were made with other settings ({'; '.join(changed)}): give another folder, or "
                "--overwrite to replace them"
            )


def _prepare_video(video: VideoSource, folder: Path, fingerprint: dict, detector: FaceDetector) -> dict:
    """Cut one video. Its folder, with the crops and the record, appears by one rename."""
    if folder.exists() and not (folder / RECORD).is_file():
        raise PrepareError(f"{folder} exists and was not written by this command: choose another output folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    record: dict = {"fingerprint": fingerprint, "frames": [], "wanted": 0, "lost": [], "reason": None, "note": None}
    try:
        for number, total, rgb in frames_of(video, fingerprint["frames_per_video"]):
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
            record["note"] = count_note(video, total)
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


def _finished(folder: Path, fingerprint: dict) -> dict | None:
    """The record of a video that an earlier run finished with the same settings from the same files."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    if record.get("fingerprint") != fingerprint or not all((folder / name).is_file() for name in record["frames"]):
        return None
    return record


def _write_results(out: Path, dataset: str, detector: str, videos: list[VideoSource], records: dict[str, dict],
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
