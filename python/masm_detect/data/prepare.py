"""From videos and images to aligned face crops, a DeepfakeBench JSON and a report of every skipped frame.

Source layout: `real/` and `fake-<method>/`, each holding video files, folders of frames, or images. From each video
`frames_per_video` frames are taken, evenly spread from the first to the last; the face is aligned and written as PNG
(`prepare_video`). Videos are cut side by side, on one machine or many.
"""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import joblib

from masm_detect.data.crop_recipe import CropRecipe, write_recipe
from masm_detect.data.deepfakebench import write_deepfakebench
from masm_detect.data.faces import FaceDetector
from masm_detect.data.groups import with_name_groups
from masm_detect.data.mtcnn import MtcnnDetector
from masm_detect.data.prepare_report import Loss, PrepareReport
from masm_detect.data.prepare_video import (
    PARTIAL,
    RECORD,
    fingerprint_of,
    finished,
    prepare_in_worker,
    prepare_video,
    read_record,
    remove_unfinished,
)
from masm_detect.data.sample import SPLITS, PrepareError, Sample
from masm_detect.data.splits import assign_splits
from masm_detect.data.tracking import Faces
from masm_detect.data.videos import VideoSource, find_videos
from masm_detect.results import check_output_folder, write_json
from masm_ext.progress import Progress

#: Of the crops: 2 reads videos by PyAV, 3 pairs masks by name and numbers frames of files without times anew.
RECORD_FORMAT = 3
_COUNTS = ("videos", "videos_lost", "frames_wanted", "frames_written", "several_faces")


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    dataset: str,
    frames_per_video: int = 32,
    size: int = 256,
    scale: float = 1.3,
    faces: Faces = "largest",
    masks: str | Path | None = None,
    detector: FaceDetector | None = None,
    splits: str | Path | Mapping[str, Sequence] | Sequence[float] | None = None,
    split_seed: int = 0,
    overwrite: bool = False,
    workers: int | None = None,
    dask: str | None = None,
    progress: bool = True,
) -> PrepareReport:
    """Cut the faces out of `source` into `out`.

    Writes `out/frames/<real|fake-method>/<video>/<frame>.png`, `out/<dataset>.json` (DeepfakeBench),
    `out/coverage.json`, and `out/crops.json`, which records how the faces were cut (`crop_recipe`). Videos that an
    earlier run with the same settings has finished are kept, if their source has not changed.

    Args:
        source: folder with `real/` and `fake-<method>/`.
        out: folder for the crops, the JSON and the report.
        dataset: name of the data set; its JSON file is `<dataset>.json`.
        frames_per_video: maximum number of frames per video, evenly spread over the video.
        size: side of a crop in pixels.
        scale: size of a crop relative to the face; 1.3 is a margin of 0.15 on each side (`faces.align_crop`).
        faces: which faces of a frame are cut out. largest: one; all: each of them, every person as a video of its own;
            mask: the one that the forgery's mask covers (of real videos: the largest). DeepFakeDetection needs it: its
            videos show several people, of whom one is forged.
        masks: for faces=mask: folder with `fake-<method>/` and a mask under the name of each forged video, as a video
            with as many frames, a folder of images, or one image; forged pixels are bright. Images of masks belong to
            images of frames by their names, or by their order if no name is shared.
        detector: the face detector; None: MTCNN (`mtcnn.MtcnnDetector`).
        splits: three shares for train, val and test (0.7,0.15,0.15), assigned at random to whole groups; or a table or
            JSON file {"train": [...], "val": [...], "test": [...]} of video names (or pairs of ids, as FaceForensics++
            publishes them); None: no split. A group, which is never divided, is a video with all videos of its name in
            other folders; a fake named target_source, as in FaceForensics++, is in one group with both originals.
        overwrite: replace crops in `out` that were made with other settings.
        split_seed: seed of the random assignment.
        workers: videos cut side by side, each by a process; None: one for each core. 1 starts no process.
        dask: address of the scheduler of a Dask cluster (tcp://host:8786), whose workers cut instead. They need this
            package, and the same paths.
        progress: show a progress bar.

    Returns:
        What was written, and every skipped frame and video with the reason.

    Raises:
        PrepareError: wrong settings or layout, or no face in any video. A single unreadable file, or one without a
            face, raises nothing; it is listed in the report.
    """
    source, out = Path(source).absolute(), Path(out).absolute()
    if frames_per_video < 1 or size < 16 or scale < 1:
        raise PrepareError(
            f"need frames_per_video >= 1, size >= 16, scale >= 1; got {frames_per_video}, {size}, {scale}"
        )
    if not dataset or "/" in dataset:
        raise PrepareError(f"dataset must be a plain name, got {dataset!r}")
    if (faces == "mask") != (masks is not None):
        raise PrepareError("faces=mask and masks (the folder of the masks) must be given together")
    if workers is not None and workers < 1:
        raise PrepareError(f"workers must be at least 1, got {workers}")
    if out == source or source in out.parents:
        raise PrepareError(
            f"the output folder {out} is inside the source {source}, where the next run would read the crops as source "
            "videos: give a folder outside"
        )
    check_output_folder(out)
    videos = find_videos(source)
    # Before the long work, so that a mistake in the splits or masks is reported early.
    split_of = assign_splits(dataset, [v.key for v in videos], splits, split_seed)
    mask_of = _masks(videos, masks)
    detector = detector if detector is not None else MtcnnDetector()
    settings = {
        "format": RECORD_FORMAT,
        "frames_per_video": frames_per_video,
        "size": size,
        "scale": scale,
        "faces": faces,
        "detector": detector.name,
    }
    if not overwrite:
        _refuse_other_settings(out, settings)
    run = uuid.uuid4().hex[:8]
    jobs, records = [], {}
    for video in videos:
        folder = out / "frames" / video.folder / video.name
        record = finished(folder, fingerprint_of(video, settings, mask_of.get(video.key)))
        if record is None:
            jobs.append((video, folder, settings, detector, mask_of.get(video.key), run))
        else:
            records[video.key] = record
    if any(folder.exists() for _, folder, *_ in jobs):
        # An interrupted run must not leave a list of crops that are partly replaced.
        for name in (f"{dataset}.json", "coverage.json"):
            (out / name).unlink(missing_ok=True)
    resumed, lost = len(records), sum(not record["crops"] for record in records.values())
    try:
        with Progress(total=len(videos), initial=resumed, desc=f"prepare {dataset}", unit="video",
                      disable=not progress) as bar:  # fmt: skip
            for key, record in _records(jobs, workers, dask):
                records[key] = record
                lost += not record["crops"]
                bar.update()
                bar.set_postfix(lost_videos=lost)
    finally:
        remove_unfinished(out / "frames", run)
    write_recipe(out, CropRecipe("face", size, scale, detector.name, faces))
    return _write_results(out, dataset, detector.name, videos, records, split_of, resumed)


def _records(jobs: list[tuple], workers: int | None, dask: str | None) -> Iterator[tuple[str, dict]]:
    """(key, record) of each video, as they are finished."""
    workers = min(workers or joblib.cpu_count(), max(1, len(jobs)))
    if workers == 1 and dask is None:
        yield from ((job[0].key, prepare_video(*job)) for job in jobs)
        return
    with ExitStack() as stack:
        if dask is not None:
            stack.enter_context(_dask_client(dask))
            stack.enter_context(joblib.parallel_config(backend="dask"))
            workers = -1
        parallel = joblib.Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)
        try:
            yield from parallel(joblib.delayed(prepare_in_worker)(*job) for job in jobs)
        except BrokenProcessPool as error:
            raise PrepareError(
                f"a process was killed, perhaps because the {workers} of them had too little memory: give fewer "
                "workers, and run the command again to continue"
            ) from error
        except Exception as error:
            if not type(error).__module__.startswith("distributed."):
                raise
            raise PrepareError(
                f"the Dask cluster at {dask} gave up ({type(error).__name__}: {error}): look at the logs of its "
                "workers, and run the command again to continue"
            ) from error


def _dask_client(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise PrepareError("dask needs the package distributed: pip install 'masm_ext[dask]'") from error
    try:
        return Client(address)
    except (OSError, ValueError) as error:
        raise PrepareError(f"no Dask scheduler answers at {address} ({error})") from error


def _masks(videos: Sequence[VideoSource], folder: str | Path | None) -> dict[str, VideoSource]:
    """The masks of the forged videos, by the key of the video; PrepareError if one has none."""
    if folder is None:
        return {}
    masks = {mask.key: mask for mask in find_videos(Path(folder).absolute()) if mask.folder != "real"}
    lacking = [video.key for video in videos if video.folder != "real" and video.key not in masks]
    if lacking:
        raise PrepareError(
            f"{folder} has no mask for {len(lacking)} forged videos, e.g. {lacking[0]!r}: a mask has the folder and "
            "the name of its video"
        )
    return masks


def _refuse_other_settings(out: Path, settings: dict) -> None:
    """Raise PrepareError if `out` holds crops of other settings: a run may have been trained on them."""
    for file in sorted(out.glob(f"frames/*/**/{RECORD}")):
        record = read_record(file)
        if record is None or any(PARTIAL in part for part in file.relative_to(out).parts):
            continue
        made = record["fingerprint"]
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


def _write_results(out: Path, dataset: str, detector: str, videos: list[VideoSource], records: dict[str, dict],
                   split_of: dict[str, str], resumed: int) -> PrepareReport:  # fmt: skip
    lost_videos, lost_frames, notes = [], [], []
    readers = sorted({record["reader"] for record in records.values() if record.get("reader")})
    by_method: dict[str, Counter] = defaultdict(Counter)
    by_split: dict[str, Counter] = defaultdict(Counter)
    for video in videos:
        record, method = records[video.key], _method(video)
        wanted, lost = record["wanted"], len(record["lost"])
        by_method[method].update(videos=1, frames_wanted=wanted, frames_written=wanted - lost)
        by_method[method].update(videos_lost=not record["crops"], several_faces=record["several"] > 0)
        by_split[split_of[video.key]][method] += bool(record["crops"])
        if record["crops"]:
            lost_frames += [Loss(video.key, number, reason) for number, reason in record["lost"]]
        else:
            lost_videos.append(Loss(video.key, None, record["reason"]))
        notes += [f"{video.key}: {note}" for note in record["notes"]]
    notes += _left_behind(out, dataset, videos)
    totals = sum(by_method.values(), Counter())
    report = PrepareReport(
        dataset=dataset, detector=detector,
        json_path=str(out / f"{dataset}.json"), coverage_path=str(out / "coverage.json"),
        videos=len(videos), videos_written=len(videos) - len(lost_videos), videos_resumed=resumed,
        frames_wanted=totals["frames_wanted"], frames_written=totals["frames_written"],
        lost_videos=lost_videos, lost_frames=lost_frames, notes=notes, readers=readers,
        by_method={m: {k: c[k] for k in _COUNTS} for m, c in sorted(by_method.items())},
        by_split={split: dict(sorted(by_split[split].items())) for split in SPLITS if split in by_split},
    )  # fmt: skip
    # Paths inside the report are relative, so that the folder can be moved.
    write_json(
        report.coverage_path, asdict(replace(report, json_path=f"{dataset}.json", coverage_path="coverage.json"))
    )
    if not totals["frames_written"]:
        kinds = " and ".join(sorted({video.kind for video in videos}, reverse=True))
        raise PrepareError(
            f"no face was found in any of the {len(videos)} {kinds}; the reasons are in {report.coverage_path}"
        )
    write_deepfakebench(_samples(out, dataset, videos, records, split_of), report.json_path)
    return report


def _left_behind(out: Path, dataset: str, videos: list[VideoSource]) -> list[str]:
    """A note about crops of videos that were in the source of an earlier run."""
    known = {out / "frames" / video.folder / video.name for video in videos}
    left = sorted({file.parent for file in (out / "frames").glob(f"*/**/{RECORD}")} - known)
    if not left:
        return []
    return [
        f"frames/ still holds crops of {len(left)} videos that are not in the source, e.g. "
        f"{left[0].relative_to(out)}: {dataset}.json leaves them out; remove their folders if you read frames/ itself"
    ]


def _samples(out: Path, dataset: str, videos: list[VideoSource], records: dict[str, dict],
             split_of: dict[str, str]) -> list[Sample]:  # fmt: skip
    """The crops. Groups go by the names of the source videos, also where each person becomes a video of its own."""
    samples, people = [], []
    for video in videos:
        for crop in records[video.key]["crops"]:
            path = out / "frames" / video.folder / video.name / crop["file"]
            label, name = int(video.folder != "real"), f"{dataset}/{video.key}"
            samples.append(Sample(str(path), label, dataset, _method(video), name, split_of[video.key]))
            people.append("/".join([name, *Path(crop["file"]).parent.parts]))
    return [replace(sample, video=person) for sample, person in zip(with_name_groups(samples), people)]


def _method(video: VideoSource) -> str:
    return video.folder.removeprefix("fake-")
