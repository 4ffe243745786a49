"""Which face of a frame is cut out: the largest, every one, or the one that a forgery's mask covers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from masm_detect.data.faces import Face, FaceDetector

Faces = Literal["largest", "all", "mask"]

NO_FACE = "no face"
NO_MASKED_FACE = "no face under the mask"

#: A face is the same person's as one in an earlier frame if its centre moved by less than this many of its widths.
_NEAR = 1.0
#: ... and its size changed by less than this factor.
_SIZES = 2.0
#: A person who was not seen in so many frames is forgotten.
_FORGET = 3
#: `largest` keeps to a person until another face is so many times as wide: two people of one size do not alternate.
_WIDER = 1.5
#: Share of the width of the last face (at first, of the frame's shorter side) from which on `largest` looks for faces.
#: Large ones are found in a small copy of the frame, in a fraction of the time.
_LARGE = 0.5
#: Where there is none, it looks for faces of half that size, and so on down to this one, and at last for the smallest.
_SMALL = 64
#: Brightness (of 255) from which on a pixel of a mask counts: below are traces of video compression.
_MASKED = 32


@dataclass(frozen=True)
class Person:
    """A face of a frame; `number` is the same in all frames in which the same person was followed, from 1."""

    number: int
    face: Face


class Tracker:
    """Follows people through the frames of a video by place and size of their faces.

    It does not recognise people: after a cut, a face at the same place counts as the same person.
    """

    def __init__(self) -> None:
        self._last: dict[int, tuple[Face, int]] = {}  # number of a person -> (face, frame in which it was seen)
        self._people = 0
        self._frame = 0

    def update(self, faces: list[Face]) -> list[Person]:
        """The people of the next frame, in the order of `faces`."""
        self._frame += 1
        known = [n for n, (_, frame) in self._last.items() if self._frame - frame <= _FORGET]
        costs = np.array([[_distance(face, self._last[n][0]) for n in known] for face in faces])
        costs = costs.reshape(len(faces), len(known))
        pairs = zip(*linear_sum_assignment(np.minimum(costs, 1e3)))
        same = {int(i): known[j] for i, j in pairs if costs[i, j] < _NEAR}
        people = []
        for i, face in enumerate(faces):
            if i not in same:
                self._people += 1
                same[i] = self._people
            self._last[same[i]] = (face, self._frame)
            people.append(Person(same[i], face))
        return people


class FaceChooser:
    """Finds and chooses the faces of one video, frame by frame.

    Args:
        detector: finds the faces.
        faces: "largest": one face a frame, the largest, or that of the person chosen before as long as no other is half
            as wide again; "all": every face; "mask": the face that the mask covers most.
        smallest_share: for "all" and "mask": look for faces from this share of the frame's shorter side on, if that is
            more than the detector's own limit. In large pictures the search for small faces takes most of the time.
    """

    def __init__(self, detector: FaceDetector, faces: Faces, smallest_share: float = 0.0) -> None:
        self._detector, self._faces, self._smallest_share = detector, faces, smallest_share
        self._tracker = Tracker()
        self._chosen: Person | None = None
        #: Faces that were found in the last frame. For "largest": those at least half as wide as the last one chosen.
        self.found = 0

    def choose(self, rgb: np.ndarray, mask: Callable[[], np.ndarray | None]) -> list[Person] | str:
        """The faces to cut out of a frame, or why there is none.

        Args:
            rgb: the frame, uint8 [H, W, 3].
            mask: returns the mask of the frame, uint8 [h, w, 3] of any size, or None where nothing is forged; called
                for "mask" only.
        """
        people = self._tracker.update(self._detect(rgb))
        self.found = len(people)
        if not people:
            return NO_FACE
        if self._faces == "all":
            return people
        if self._faces == "mask" and (masked := mask()) is not None:
            covered = [covered_pixels(person.face, masked, rgb.shape) for person in people]
            return [people[int(np.argmax(covered))]] if max(covered) else NO_MASKED_FACE
        self._chosen = self._largest(people)
        return [self._chosen]

    def _detect(self, rgb: np.ndarray) -> list[Face]:
        if self._faces == "largest":
            side = min(rgb.shape[:2]) if self._chosen is None else _width(self._chosen.face)
            while (side := side * _LARGE) >= _SMALL:
                if large := self._detector.detect(rgb, int(side)):
                    return large
        smallest = int(self._smallest_share * min(rgb.shape[:2]))
        return self._detector.detect(rgb, smallest) if smallest else self._detector.detect(rgb)

    def _largest(self, people: list[Person]) -> Person:
        largest = max(people, key=lambda person: person.face.area)
        before = self._chosen.number if self._chosen is not None else None
        for person in people:
            if person.number == before and _width(largest.face) < _WIDER * _width(person.face):
                return person
        return largest


def covered_pixels(face: Face, mask: np.ndarray, shape: tuple[int, ...]) -> int:
    """Bright pixels of a mask uint8 [h, w, 3] within the box of a face in a frame of `shape` (H, W, ...)."""
    scale = np.array([mask.shape[1] / shape[1], mask.shape[0] / shape[0]] * 2)
    x0, y0, x1, y1 = np.rint(np.maximum(np.array(face.box) * scale, 0)).astype(int)
    return int((mask[y0:y1, x0:x1].max(axis=-1, initial=0) > _MASKED).sum())


def _width(face: Face) -> float:
    return max(face.area, 1.0) ** 0.5


def _distance(face: Face, other: Face) -> float:
    """Distance of the centres in widths of the face; infinite if the sizes differ too much."""
    sizes = _width(face), _width(other)
    if max(sizes) > _SIZES * min(sizes):
        return np.inf
    centres = [np.array([f.box[0] + f.box[2], f.box[1] + f.box[3]]) / 2 for f in (face, other)]
    return float(np.linalg.norm(centres[0] - centres[1])) / (sum(sizes) / 2)
