"""Score files: one row of scores.csv for each scored image, with or without a label.

`masm predict` and `masm eval` write them; `masm eval --scores` and `masm compare` read them, also those of other
programs. Columns of a file that is written:

    file, dataset, method, label, video, group, frame, time_s, track, box_x0, box_y0, box_x1, box_y1, logit, p_fake
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from masm_detect.data.sample import Sample
from masm_detect.errors import UserError
from masm_detect.results import write_text


class ScoreFileError(UserError, ValueError):
    """A score file that cannot be read; the message names the file, the line and what is expected."""


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One scored image.

    Attributes:
        file: the image or video
        logit: of the detector; above 0 is called fake
        p_fake: the sigmoid of the logit, before any calibration, in [0, 1]
        label: 0 real, 1 fake, None: unknown
        dataset: name of the data set; "": unknown
        method: name of the forgery ("real" for real images); "": unknown
        video: key of the video that the image belongs to; "": the file is the video
        group: images that are left out together by the intervals; "": the video
        frame: number of the frame in a video, from 0; None for a picture
        seconds: time of the frame from the start of the video; None: unknown
        track: number of the person in the file, from 1; None: the whole image was scored
        box: (x0, y0, x1, y1) of the scored region in pixels of the frame; None: the whole image
    """

    file: str
    logit: float
    p_fake: float
    label: int | None = None
    dataset: str = ""
    method: str = ""
    video: str = ""
    group: str = ""
    frame: int | None = None
    seconds: float | None = None
    track: int | None = None
    box: tuple[float, float, float, float] | None = None


_BOX = ("box_x0", "box_y0", "box_x1", "box_y1")
COLUMNS = (
    *("file", "dataset", "method", "label", "video", "group", "frame", "time_s", "track"),
    *_BOX,
    *("logit", "p_fake"),
)
VIDEO_COLUMNS = ("dataset", "method", "label", "video", "group", "frames", "p_fake")
#: Names of columns in files of other programs, in the order in which they are looked for; case does not matter.
_NAMES = {
    "file": ("file", "path", "image", "image_path", "filename", "img", "name", "id"),
    "label": ("label", "target", "y_true", "y", "is_fake", "gt"),
    "p_fake": ("p_fake", "prob", "probability", "fake_prob", "prob_fake", "score", "pred", "prediction", "y_score"),
    "logit": ("logit", "logits"),
    "dataset": ("dataset",),
    "method": ("method", "forgery", "generator"),
    "video": ("video", "video_id", "video_name"),
    "group": ("group", "identity", "source"),
}
_LABELS = {"0": 0, "0.0": 0, "real": 0, "false": 0, "1": 1, "1.0": 1, "fake": 1, "true": 1}


def scored_samples(samples: Sequence[Sample], logits: np.ndarray) -> list[ScoreRow]:
    """Rows for n samples and their logits [n], in the same order."""
    return [
        ScoreRow(
            s.path, float(logit), sigmoid(float(logit)), s.label, s.dataset, s.method, video=s.video, group=s.group
        )
        for s, logit in zip(samples, logits, strict=True)
    ]


def labelled(rows: Iterable[ScoreRow], name: str, dataset: str | None = None) -> tuple[list[Sample], np.ndarray]:
    """Samples and P(fake) [n] of rows with labels.

    Args:
        rows: n rows. Without a method a fake is of the method "fake", without a video the file is the video, and
            without a group the video is the group. Equal names of videos of two methods are two videos.
        name: of the file, for the error.
        dataset: data set of rows that have none; None: `name`.

    Raises:
        ScoreFileError: a row has no label.
    """
    samples, scores = [], []
    for row in rows:
        if row.label is None:
            raise ScoreFileError(f"{name} has no label for {row.file}: metrics need a column label (0 real, 1 fake)")
        method = "real" if row.label == 0 else row.method or "fake"
        owner = row.dataset or (name if dataset is None else dataset)
        # The key of a video of ours starts with its data set; in other files 000 may be a real video and its forgeries.
        own = not row.video or row.video.startswith(f"{owner}/")
        video = (row.video or row.file) if own else f"{owner}/{method}/{row.video}"
        samples.append(Sample(row.file, row.label, owner, method, video, group=row.group or row.video or row.file))
        scores.append(row.p_fake)
    return samples, np.array(scores)


def write_videos(path: Path | str, samples: Sequence[Sample], scores: np.ndarray) -> None:
    """Write videos.csv, atomically: dataset, method, label, video, group, frames, p_fake (the mean of its frames).

    samples: n samples; scores: P(fake) of each, [n].
    """
    videos: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        videos.setdefault(sample.video, []).append(place)
    lines = []
    for video, places in videos.items():
        first = samples[places[0]]
        mean = float(np.mean(scores[places]))
        lines.append([first.dataset, first.method, first.label, video, first.group, len(places), repr(mean)])
    write_table(path, VIDEO_COLUMNS, lines)


def name_of(path: Path | str) -> str:
    """The name of a score file's detector: that of the file, or of the folder of a file called scores.csv."""
    path = Path(path)
    return path.resolve().parent.name if path.stem == "scores" else path.stem


def write_scores(path: Path | str, rows: Iterable[ScoreRow]) -> None:
    """Write scores.csv, atomically."""
    write_table(path, COLUMNS, map(score_fields, rows))


def score_fields(row: ScoreRow) -> list[object]:
    """A row as the fields of a score file, in the order of `COLUMNS`."""
    box = [""] * 4 if row.box is None else [f"{value:.1f}" for value in row.box]
    time = "" if row.seconds is None else f"{row.seconds:.3f}"
    fields = [row.file, row.dataset, row.method, row.label, row.video, row.group, row.frame, time, row.track]
    return [*("" if v is None else v for v in fields), *box, f"{row.logit:.9g}", repr(float(row.p_fake))]


def write_table(path: Path | str, columns: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Write a CSV file, atomically; one line for each of `lines`, in the order of `columns`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    write_text(path, text.getvalue())


def read_scores(path: Path | str) -> list[ScoreRow]:
    """Read a score file of this or of another program.

    Needed are a column with the file and one with the score: P(fake) in [0, 1] (p_fake, score, prob, ...) or a logit.
    Labels may be 0 and 1, real and fake.

    Args:
        path: the CSV file.

    Raises:
        ScoreFileError: absent, no CSV file, a column is missing, or a value is not what its column holds.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ScoreFileError(
            f"cannot read the score file {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = {name.strip().lower(): name for name in reader.fieldnames or () if name}
    place = {key: next((columns[n] for n in names if n in columns), None) for key, names in _NAMES.items()}
    if place["file"] is None or (place["p_fake"] is None and place["logit"] is None):
        raise ScoreFileError(
            f"{path} has the columns {', '.join(columns) or '(none)'}; a score file needs `file`, and `p_fake` (in "
            "[0, 1], 1 = fake) or `logit`"
        )
    rows = [_row(path, reader.line_num, record, place, columns) for record in reader]
    if not rows:
        raise ScoreFileError(f"{path} holds no score: it has a header and no line below it")
    return rows


def _row(path: Path, line: int, record: dict, place: dict[str, str | None], columns: dict[str, str]) -> ScoreRow:
    def text(key: str) -> str:
        return (record.get(place[key]) or "").strip() if place[key] else ""

    def number(column: str) -> float | None:
        value = (record.get(columns.get(column, "")) or "").strip()
        return None if not value else _number(value, column, path, line)

    logit = _number(text("logit"), "logit", path, line) if text("logit") else None
    p_fake = _number(text("p_fake"), place["p_fake"] or "p_fake", path, line) if text("p_fake") else None
    if logit is None and p_fake is None:
        raise ScoreFileError(f"{path}, line {line}: {text('file') or 'a row'} has no score")
    if p_fake is not None and not 0 <= p_fake <= 1:
        raise ScoreFileError(
            f"{path}, line {line}: {place['p_fake']} is {p_fake:g}; P(fake) must be in [0, 1]. If these are logits, "
            "name the column logit"
        )
    label = text("label").lower()
    if label and label not in _LABELS:
        raise ScoreFileError(f"{path}, line {line}: the label is {label!r}; it must be 0 (real) or 1 (fake)")
    box = tuple(number(name) for name in _BOX)
    frame, track = number("frame"), number("track")
    return ScoreRow(
        file=text("file"),
        logit=log_odds(p_fake) if logit is None else logit,
        p_fake=sigmoid(logit) if p_fake is None else p_fake,
        label=_LABELS[label] if label else None,
        dataset=text("dataset"),
        method=text("method"),
        video=text("video"),
        group=text("group"),
        frame=None if frame is None else int(frame),
        seconds=number("time_s"),
        track=None if track is None else int(track),
        box=None if None in box else box,
    )


def sigmoid(logit: float) -> float:
    """P(fake) of a logit."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def log_odds(p: float, smallest: float = 1e-7) -> float:
    """The logit of P(fake), which is kept away from 0 and 1 by `smallest`."""
    p = min(max(p, smallest), 1 - smallest)
    return math.log(p / (1 - p))


def _number(value: str, column: str, path: Path, line: int) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ScoreFileError(f"{path}, line {line}: {column} is {value!r}; it must be a finite number")
    return number
