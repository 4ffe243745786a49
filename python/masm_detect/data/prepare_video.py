"""Cuts the faces out of one video: the part of `masm prepare` that runs on many cores or machines."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from masm_detect.data.cutting import cut_faces
from masm_detect.data.decode import UnreadableImage, png_bytes
from masm_detect.data.faces import FaceDetector
from masm_detect.data.sample import PrepareError
from masm_detect.data.tracking import FaceChooser, Person
from masm_detect.data.video_reader import READER, Frame, VideoFile
from masm_detect.data.videos import ImageFrames, VideoSource, open_video, spread
from masm_detect.results import write_json

RECORD = ".record.json"  # beside the crops of a finished video
#: Why a frame is lost that has no mask among those of its video.
NO_MASK = "no mask of this name"
#: Part of the names of unfinished folders, before the number of the run.
PARTIAL = ".partial-"
#: An unfinished folder in which nothing was written for so many seconds is of a run that was killed.
ABANDONED = 24 * 3600


def prepare_video(
    video: VideoSource,
    folder: Path,
    settings: dict[str, Any],
    detector: FaceDetector,
    masks: VideoSource | None,
    run: str,
) -> dict[str, Any]:
    """Cut one video; its folder, with the crops and the record, appears by one rename.

    Args:
        video: the source.
        folder: of the crops.
        settings: of the crops (`prepare` makes them), a part of the record.
        detector: the face detector.
        masks: the masks of a forged video, or None.
        run: the number of the run, a part of the names of unfinished folders (`remove_unfinished`).

    Returns:
        The record: {"fingerprint": settings and source files; "crops": [{"file", "person", "box", "score", "seconds"}];
        "wanted": frames; "lost": [[number, reason]]; "several": frames with several faces; "reason": why there is no
        crop, or None; "notes"; "reader": of a video file}. If an earlier call has finished the video, its record.

    Raises:
        PrepareError: `folder` exists, and was not written by this function.
    """
    fingerprint = fingerprint_of(video, settings, masks)
    record = finished(folder, fingerprint)
    if record is not None:
        return record
    if folder.exists() and not (folder / RECORD).is_file():
        raise PrepareError(f"{folder} exists and was not written by this command: choose another output folder")
    # A name of its own: where a lost machine comes back, two of them may work on one video.
    partial = folder.with_name(f".{folder.name}{PARTIAL}{run}-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        record = _cut(video, partial, fingerprint, detector, masks)
        write_json(partial / RECORD, record)
        _replace(partial, folder, fingerprint)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def prepare_in_worker(*arguments: Any) -> tuple[str, dict[str, Any]]:
    """`prepare_video` in a process beside others; returns the key of the video, too."""
    cv2.setNumThreads(1)
    return arguments[0].key, prepare_video(*arguments)


def fingerprint_of(video: VideoSource, settings: dict[str, Any], masks: VideoSource | None) -> dict[str, Any]:
    """What decides the crops of a video: the settings, and names, sizes and times of the source files."""
    files = (*video.files, *(masks.files if masks is not None else ()))
    return settings | {"source": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]}


def finished(folder: Path, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a video that was finished with the same settings from the same files."""
    record = read_record(folder / RECORD)
    if record is None or record["fingerprint"] != fingerprint:
        return None
    return record if all((folder / crop["file"]).is_file() for crop in record["crops"]) else None


def read_record(file: Path) -> dict[str, Any] | None:
    """The record of a video; None if there is none or it is damaged, and the video is to be cut again."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("fingerprint"), dict) else None


def _cut(video: VideoSource, out: Path, fingerprint: dict[str, Any], detector: FaceDetector,
         masks: VideoSource | None) -> dict[str, Any]:  # fmt: skip
    record: dict[str, Any] = {
        "fingerprint": fingerprint, "reader": READER if video.is_video else None, "crops": [], "wanted": 0, "lost": [],
        "several": 0, "reason": None, "notes": [],
    }  # fmt: skip
    chooser = FaceChooser(detector, fingerprint["faces"])
    try:
        opened = open_video(video)
        record["notes"] += opened.notes
        numbers = spread(opened.total, fingerprint["frames_per_video"])
        pictures = _mask_pictures(masks, opened, numbers, record["notes"])
        faces = cut_faces(opened.frames(numbers), chooser, pictures, fingerprint["size"], fingerprint["scale"])
        for frame, people in faces:
            record["wanted"] += 1
            if isinstance(people, str):
                record["lost"].append([frame.number, people])
                continue
            record["several"] += chooser.found > 1
            record["crops"] += [
                _written(crop, person, frame.number, frame.seconds, out, fingerprint["faces"])
                for person, crop in people
            ]
    except UnreadableImage as error:
        record["reason"] = str(error)
    if not record["crops"] and record["reason"] is None:
        reasons = {reason.split(":")[0] for _, reason in record["lost"]}
        record["reason"] = reasons.pop() if len(reasons) == 1 else "no face or unreadable in every frame"
    return record


def _written(crop: np.ndarray, person: Person, number: int, seconds: float | None, out: Path,
             faces: str) -> dict[str, Any]:  # fmt: skip
    file = f"{number:06d}.png" if faces != "all" else f"face{person.number}/{number:06d}.png"
    if faces == "all":
        (out / file).parent.mkdir(exist_ok=True)
    (out / file).write_bytes(png_bytes(crop))
    return {
        "file": file,
        "person": person.number,
        "box": [round(float(x), 1) for x in person.face.box],
        "score": round(person.face.score, 4),
        "seconds": seconds,
    }


def _mask_pictures(
    masks: VideoSource | None, video: VideoFile | ImageFrames, numbers: list[int], notes: list[str]
) -> Iterator[Callable[[], np.ndarray | None] | str]:
    """For each frame a function that returns its mask, uint8 [h, w, 3], or None where there are no masks; or a reason
    why the frame has none.

    Where frames and masks are both images, a mask belongs to the frame of its name (007 and 7 are one name). Where no
    name is shared, and in videos, they are paired by their order.

    Raises UnreadableImage if the masks cannot be read or paired.
    """
    if masks is None:
        yield from (lambda: None for _ in numbers)
        return
    opened = open_video(masks)
    notes += [f"its masks: {note}" for note in opened.notes]
    if opened.total == 1 and masks.kind == "images":
        frame = next(opened.frames([0]))
        if frame.rgb is None:
            raise UnreadableImage(f"unreadable mask: {frame.problem}")
        yield from (lambda: frame.rgb for _ in numbers)
        return
    if isinstance(opened, ImageFrames) and isinstance(video, ImageFrames) and set(opened.names) & set(video.names):
        if twice := sorted({n for f in (opened, video) for n in f.names if f.names.count(n) > 1}):
            raise UnreadableImage(f"its masks cannot be paired: two images are called {twice[0]!r}")
        if opened.total == video.total and set(opened.names) != set(video.names):
            raise UnreadableImage(
                f"its masks cannot be paired: as many as frames, but of other names (frames {video.names[0]!r} to "
                f"{video.names[-1]!r}; masks {opened.names[0]!r} to {opened.names[-1]!r})"
            )
        place_of = {name: place for place, name in enumerate(opened.names)}
        for number in numbers:
            place = place_of.get(video.names[number])
            yield NO_MASK if place is None else _picture(next(opened.frames([place])))
        return
    if opened.total != video.total:
        raise UnreadableImage(f"its masks cannot be paired: {opened.total} masks for {video.total} frames")
    yield from (_picture(frame) for frame in opened.frames(numbers))


def _picture(frame: Frame) -> Callable[[], np.ndarray] | str:
    return f"unreadable mask: {frame.problem}" if frame.rgb is None else lambda: frame.rgb


def _replace(partial: Path, folder: Path, fingerprint: dict[str, Any]) -> None:
    """Put a finished folder in its place. The old one is moved away first, so that none lacks its record."""
    old = partial.with_name(f"{partial.name}-old")
    with suppress(FileNotFoundError):
        os.replace(folder, old)
    try:
        os.replace(partial, folder)
    except OSError:
        # it exists again: another process has finished the same video meanwhile
        if finished(folder, fingerprint) is None:
            raise
    shutil.rmtree(old, ignore_errors=True)


def remove_unfinished(frames: Path, run: str) -> None:
    """Remove the unfinished folders of this run, and those of runs that were killed; those of others stay."""
    for folder in list(frames.glob(f"**/.*{PARTIAL}*")):
        with suppress(FileNotFoundError):  # its owner has finished it
            if f"{PARTIAL}{run}" in folder.name or time.time() - folder.stat().st_mtime > ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)
