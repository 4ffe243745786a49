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
    """The result of `prepare`. `lost_videos` have no crop; `lost_frames` are skipped frames of the other videos."""

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
