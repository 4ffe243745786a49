"""Which face is cut out: the largest, all of them, the forged one."""

from __future__ import annotations

import numpy as np
import pytest
from masm_detect.data.faces import Face
from masm_detect.data.tracking import NO_FACE, NO_MASKED_FACE, FaceChooser, Tracker, covered_pixels

FRAME = np.zeros((400, 600, 3), np.uint8)


def face(x, y, side):
    return Face((x - side / 2, y - side / 2, x + side / 2, y + side / 2), None, 0.9)


class Scripted:
    """A detector that finds the faces of a script, frame by frame, but none below the size that is asked for."""

    name = "scripted"

    def __init__(self, *frames):
        self.frames, self.number, self.asked = frames, -1, []

    def detect(self, rgb, smallest=None):
        self.asked.append(smallest)
        return [f for f in self.frames[self.number] if f.area**0.5 >= (smallest or 0)]


def chosen(faces, *frames, mask=None):
    detector = Scripted(*frames)
    chooser = FaceChooser(detector, faces)
    out = []
    for detector.number in range(len(frames)):
        people = chooser.choose(FRAME, lambda: mask)
        out.append(people if isinstance(people, str) else [(p.number, p.face.box[0]) for p in people])
    return out, detector.asked


def test_people_keep_their_number():
    tracker = Tracker()
    numbers = [
        [p.number for p in tracker.update(faces)]
        for faces in (
            [face(100, 100, 80), face(400, 100, 80)],
            [face(420, 110, 80), face(130, 100, 85)],  # in another order, and moved
            [face(140, 100, 85)],
            [face(150, 100, 85), face(430, 120, 80), face(150, 300, 80)],  # one is back, one is new
            [face(160, 100, 30)],  # too small to be the same
        )
    ]
    assert numbers == [[1, 2], [2, 1], [1], [1, 2, 3], [4]]


def test_forgotten_after_some_frames():
    tracker = Tracker()
    tracker.update([face(100, 100, 80)])
    for _ in range(3):
        tracker.update([])
    assert [p.number for p in tracker.update([face(100, 100, 80)])] == [2]


def test_largest_stays_with_a_person():
    left, right = face(100, 100, 100), face(400, 100, 90)
    grown, huge, back = face(400, 100, 130), face(400, 100, 190), face(400, 100, 110)
    got, _ = chosen("largest", [left, right], [left, grown], [left, huge], [left, back], [back])
    assert [people[0][0] for people in got] == [1, 1, 2, 2, 2]
    assert all(len(people) == 1 for people in got)


def test_largest_searches_the_small_copy_first():
    far = face(300, 200, 70)
    got, asked = chosen("largest", [face(300, 200, 200)], [face(300, 200, 180)], [far], [], [face(300, 200, 20)])
    assert got[3] == NO_FACE and got[2][0][1] == far.box[0] and got[4][0][1] == 290
    assert asked[0] == 200  # half of the shorter side of the frame
    assert asked[1] == 100  # half of the last face
    assert asked[2:4] == [90, None]  # then, not below 64 pixels, all sizes
    assert asked[-1] is None


def test_all():
    left, right = face(100, 100, 100), face(400, 100, 50)
    got, asked = chosen("all", [left, right], [right], [])
    assert got == [[(1, 50), (2, 375)], [(2, 375)], NO_FACE]
    assert asked == [None, None, None]


def test_mask():
    left, right = face(100, 100, 100), face(450, 300, 50)
    mask = np.zeros((200, 300, 3), np.uint8)  # of half the size
    mask[140:160, 215:235] = (0, 255, 0)
    got, _ = chosen("mask", [left, right], [left], mask=mask)
    assert got == [[(2, 425)], NO_MASKED_FACE]
    got, _ = chosen("mask", [left, right], mask=None)  # a real video has none: the largest
    assert got == [[(1, 50)]]
    got, _ = chosen("mask", [left, right], mask=np.full((200, 300, 3), 20, np.uint8))  # noise of compression
    assert got == [NO_MASKED_FACE]


@pytest.mark.parametrize("box, pixels", [((0, 0, 600, 400), 100), ((-50, -50, 20, 20), 25), ((300, 0, 600, 400), 0)])
def test_covered_pixels(box, pixels):
    mask = np.zeros((200, 300, 3), np.uint8)
    mask[5:15, 5:15] = 255
    assert covered_pixels(Face(box, None, 1.0), mask, FRAME.shape) == pixels
