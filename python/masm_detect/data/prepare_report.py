"""The report of `masm prepare`: what was written, and every skipped frame and video with the reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Loss:
    """A skipped frame, or a skipped video if `frame` is None, with the reason."""

    video: str
    frame: int | None
    reason: str


@dataclass(frozen=True)
class PrepareReport:
    """The result of `prepare`.

    Attributes:
        dataset, detector: names of the data set and of the face detector
        json_path, coverage_path: the files that were written
        videos, videos_written, videos_resumed: all videos, those with a crop, and those of an earlier run
        frames_wanted, frames_written: frames that were to be cut, and those that have a crop
        lost_videos: videos without any crop
        lost_frames: skipped frames of the other videos
        notes: what is unusual about single videos
        readers: versions of PyAV and FFmpeg that read the video files
        by_method: "real" or forgery -> counts; `several_faces`: videos in which some frame has several
        by_split: split -> "real" or forgery -> videos with a crop; empty if the data is not divided
    """

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
    readers: list[str] = field(default_factory=list)
    by_method: dict[str, dict[str, int]] = field(default_factory=dict)
    by_split: dict[str, dict[str, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        splits = "".join(f" {split:>6}" for split in self.by_split)
        lines = [f"{'method':<24} {'videos':>7} {'lost':>5} {'frames':>7} {'lost':>5} {'several faces':>14}{splits}"]
        for method, n in self.by_method.items():
            lost = n["frames_wanted"] - n["frames_written"]
            lines.append(
                f"{method:<24} {n['videos']:>7} {n['videos_lost']:>5} {n['frames_written']:>7} {lost:>5} "
                f"{n['several_faces']:>14}" + "".join(f" {c.get(method, 0):>6}" for c in self.by_split.values())
            )
        for split, counts in self.by_split.items():
            fakes = sum(count for method, count in counts.items() if method != "real")
            for kind, count in (("real", counts.get("real", 0)), ("fake", fakes)):
                if not count:
                    lines.append(f"the split {split} has no {kind} video: try another split_seed, or name its videos")
        reasons = Counter(loss.reason.split(":")[0] for loss in (*self.lost_videos, *self.lost_frames))
        lines += [f"lost videos and frames, {reason}: {count}" for reason, count in reasons.most_common()]
        if len(self.readers) > 1:
            lines.append(
                f"read by {' and by '.join(self.readers)}: colours may differ; to avoid this, prepare all videos "
                "into a new folder"
            )
        if self.notes:
            lines.append(f"{len(self.notes)} notes, e.g. {self.notes[0]}")
        return "\n".join([*lines, f"wrote {self.json_path}", f"every loss is listed in {self.coverage_path}"])
