"""The page of `masm analyze`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from markupsafe import Markup
from matplotlib import colormaps

from .casework import VERDICTS
from .page import figure_svg, image_uri, render
from .plots import new_figure

#: Longest side of a picture and of a crop in the page, in pixels.
PICTURE, _CROP = 560, 180
_FAKE, _REAL = (213, 94, 0), (0, 114, 178)
_CLASSES = {"likely fake": "fake", "likely real": "real"}
#: States of Content Credentials, as c2pa-python names them.
_C2PA = {
    "Trusted": "valid, by a trusted signer: the file is as it was signed",
    "Valid": "valid: the file is as it was signed; who signed it was not compared with a list of trusted signers",
    "Invalid": "invalid: the file was changed after it was signed, or the signature is broken",
    "damaged": "damaged: they cannot be read",
}


def analysis_page(content: Mapping[str, Any], analyses: Sequence[Any]) -> str:
    """The page for the content of report.json and its `casework.analyze.FileAnalysis`."""
    calibration = content["run"]["calibration"]
    return render(
        "analysis.html",
        content=content,
        calibration=calibration,
        part="tile" if (content["run"]["recipe"] or {}).get("region") == "tile" else "image",
        c2pa_words=_C2PA,
        files=[_file(analysis, calibration) for analysis in analyses],
    )


def _file(analysis: Any, calibration: Mapping[str, Any] | None) -> dict[str, Any]:
    score = analysis.score
    return {
        "score": score,
        "name": score.file.replace("\\", "/").rsplit("/", 1)[-1],
        "words": VERDICTS[score.verdict],
        "color": _CLASSES.get(score.verdict, "unsure"),
        "why": verdict_reason(score, calibration),
        "media": analysis.media,
        "warnings": analysis.warnings,
        "timeline": _timeline(score, calibration) if score.kind == "video" and score.rows else None,
        "picture": _picture(analysis) if analysis.picture is not None else None,
        "tiles": any(row.box and row.track is None for row in score.rows),
        "boxes": any(row.box for row in score.rows),
        "tracks": sorted(((t, m, sum(r.track == t for r in score.rows)) for t, m in score.tracks.items() if t),
                         key=lambda item: -item[1]),
        "shown": [_shown(shown) for shown in analysis.shown],
    }  # fmt: skip


def verdict_reason(score: Any, calibration: Mapping[str, Any] | None) -> str:
    """Why the verdict is what it is, and what its threshold promises, in one or two sentences."""
    if score.p_fake is None:
        return f"Nothing was scored: {score.reason}."
    if calibration is None:
        return (
            f"The raw score is {score.p_fake:.3f}. Without a calibration this number only orders files: it is no "
            "probability, and has no limits. Run masm calibrate first."
        )
    fake, real = calibration["thresholds"]["fake"], calibration["thresholds"]["real"]
    value = score.calibrated
    if score.outside:
        return (
            f"The images are unlike those that the detector was calibrated on (distance {score.distance:.3f}; about "
            f"{100 - 100 * calibration['outside_rate']:.3g}% of it lie below {calibration['farthest']:.3f}). The "
            f"score {value:.3f} carries no meaning for them."
        )
    if score.verdict in ("likely fake", "likely real"):
        return f"The calibrated score {value:.3f} {_promise(score, calibration)}"
    if fake is None or real is None:
        few = " and ".join(n for n, t in (("real", fake), ("fake", real)) if t is None)
        return (
            f"The calibrated score is {value:.3f}. The validation data hold too few independent {few} groups for the "
            f"requested error rates ({_groups(calibration)})."
        )
    low, high = sorted((real, fake))
    return (
        f"The calibrated score {value:.3f} lies between two limits. Below {low:.3f} the verdict would be likely real, "
        f"as far as this detector can tell, and above {high:.3f} likely fake. They are set so that on average at most "
        f"{100 * calibration['false_alarm_rate']:.3g}% of real files are called fake, and at most "
        f"{100 * calibration['miss_rate']:.3g}% of fakes real, and rest on "
        f"{_groups(calibration)}.{_caveats(score, calibration)} Unsure is no sign of a forgery, and none of "
        "authenticity."
    )


def _promise(score: Any, calibration: Mapping[str, Any]) -> str:
    """Where a score lies, and what that threshold promises: nothing more than it can."""
    fake = score.verdict == "likely fake"
    kind, rate = ("fake", calibration["false_alarm_rate"]) if fake else ("real", calibration["miss_rate"])
    what = "real files" if fake else "fakes"
    where = "at or above" if fake else "at or below"
    text = f"is {where} {calibration['thresholds'][kind]:.3f}. "
    if _has_few_images(score, calibration):
        return text + _caveats(score, calibration).strip()
    times = score.deciding if fake else 1
    limit = min(1.0, times * calibration["rate_limits"][kind])
    text += (
        f"Of {what} like those of the validation data ({_groups(calibration)}), at most "
        f"{100 * min(1.0, times * rate):.3g}% score so on average, and with this calibration less than about "
        f"{100 * limit:.0f}% (with 95% confidence)"
    )
    text += f": {times} faces, each with a chance of {100 * rate:.3g}%." if times > 1 else "."
    return text + _caveats(score, calibration) + ("" if fake else " Forgeries of other kinds may score as low.")


def _has_few_images(score: Any, calibration: Mapping[str, Any]) -> bool:
    return len(score.deciding_rows) < calibration["images_per_video"][0]


def _caveats(score: Any, calibration: Mapping[str, Any]) -> str:
    """Why the rates of the thresholds do not hold for this file; each a sentence with a space before it."""
    text = ""
    if _has_few_images(score, calibration):
        text += (
            f" The limits were made for files with at least {calibration['images_per_video'][0]} images: how often "
            f"they err for one with {len(score.deciding_rows)} is unknown."
        )
    if calibration["selected_on"]:
        text += (
            " The detector was tuned on the same files that set the limits, so that the true rates may be higher than "
            "these estimates."
        )
    return text


def _groups(calibration: Mapping[str, Any]) -> str:
    return f"{calibration['n_real_groups']} independent groups of real and {calibration['n_fake_groups']} of fake files"


def _timeline(score: Any, calibration: Mapping[str, Any] | None) -> Markup:
    figure, ((axes,),) = new_figure(1, 1, (9.0, 2.9))
    timed = all(row.seconds is not None for row in score.rows)
    colors = colormaps["tab10"]
    for track in dict.fromkeys(row.track for row in score.rows):
        rows = [row for row in score.rows if row.track == track]
        x = [row.seconds if timed else row.frame for row in rows]
        name = f"face {track}" if track else "frame"
        axes.plot(x, [row.p_fake for row in rows], "o-", markersize=3, color=colors((track or 1) % 10 - 1), label=name)
    axes.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="time in seconds" if timed else "frame", ylabel="raw score", ylim=(-0.02, 1.02))
    axes.set_title(f"{score.scored} frames", fontsize="medium")
    axes.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure_svg(figure)


def _picture(analysis: Any) -> str:
    """The picture with its scored regions: boxes of faces, or tiles coloured by P(fake)."""
    rgb, zoom = analysis.picture
    canvas = rgb.copy()
    for row in analysis.score.rows:
        if row.box is None:
            continue
        x0, y0, x1, y1 = (round(value * zoom) for value in row.box)
        color = _FAKE if row.p_fake >= 0.5 else _REAL
        if row.track is None:
            part = canvas[max(y0, 0) : y1, max(x0, 0) : x1]
            weight = 0.75 * abs(row.p_fake - 0.5) * 2
            part[:] = (part * (1 - weight) + np.array(color) * weight).round().astype(np.uint8)
        cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), color, 1 if row.track is None else 2)
        text = f"{row.p_fake:.2f}" if row.track is None else f"face {row.track}: {row.p_fake:.2f}"
        _label(canvas, text, max(x0, 0) + 2, max(y0, 0) + 2)
    return image_uri(canvas)


def _label(canvas: np.ndarray, text: str, x: int, y: int) -> None:
    """Write `text` in black on white, with its upper left corner at (x, y)."""
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)
    cv2.rectangle(canvas, (x, y), (x + width + 3, y + height + 4), (255, 255, 255), -1)
    cv2.putText(canvas, text, (x + 2, y + height + 2), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)


def _shown(shown: Any) -> dict[str, Any]:
    crop = cv2.resize(shown.image, (_CROP, _CROP), interpolation=cv2.INTER_AREA)
    one = {
        "crop": shown.crop,
        "p_fake": shown.p_fake,
        "image": image_uri(crop),
        "map": None,
        "occlusion": shown.occlusion,
    }
    if shown.occlusion is not None:
        values = shown.occlusion.values / max(float(np.abs(shown.occlusion.values).max()), 1e-12)
        values = cv2.resize(values.astype(np.float32), (_CROP, _CROP), interpolation=cv2.INTER_NEAREST)[..., None]
        color = np.where(values > 0, np.array(_FAKE), np.array(_REAL))
        weight = 0.7 * np.abs(values)
        one["map"] = image_uri((crop * (1 - weight) + color * weight).round().astype(np.uint8))
    return one
