"""Alignment against scikit-image, crops, and the choice of a face."""

from __future__ import annotations

import numpy as np
import pytest
from masm_detect.data.faces import ARCFACE_TEMPLATE, Face, align_crop, fit_similarity


def test_similarity_equals_scikit_image():
    transform = pytest.importorskip("skimage.transform").SimilarityTransform
    rng = np.random.default_rng(0)
    for _ in range(20):
        source = rng.uniform(0, 500, (5, 2))
        target = rng.uniform(0, 200, (5, 2))
        expected = transform.from_estimate(source, target).params[:2]
        np.testing.assert_allclose(fit_similarity(source, target), expected, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="coincide"):
        fit_similarity(np.ones((5, 2)), source)


def test_template_crop_is_the_template():
    """A face that already lies on the template comes out unchanged at scale 1, and centred in its margin at 1.3."""
    rgb = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    face = Face((0, 0, 112, 112), ARCFACE_TEMPLATE.astype(np.float32), 1.0)
    np.testing.assert_array_equal(align_crop(rgb, face, size=112, scale=1.0), rgb)
    wide = align_crop(rgb, face, size=112, scale=1.3)
    rim = int(112 * 0.15 / 1.3) - 1
    assert not wide[:rim].any() and not wide[:, -rim:].any() and wide[rim + 3 : -rim - 3].any()


def test_turned_face_comes_out_upright():
    angle = np.deg2rad(30)
    turn = 2 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = ARCFACE_TEMPLATE @ turn.T + (200, 20)
    rgb = np.zeros((600, 600, 3), np.uint8)
    for number, (x, y) in enumerate(points):
        rgb[int(y) - 4 : int(y) + 5, int(x) - 4 : int(x) + 5] = 50 * (number + 1)
    crop = align_crop(rgb, Face((0, 0, 1, 1), points, 1.0), size=112, scale=1.0)
    for number, (x, y) in enumerate(ARCFACE_TEMPLATE):
        assert abs(int(crop[round(y), round(x), 0]) - 50 * (number + 1)) < 10


def test_crop_without_points_uses_the_box():
    rgb = np.zeros((200, 300, 3), np.uint8)
    rgb[50:150, 100:200] = 255
    crop = align_crop(rgb, Face((100, 50, 200, 150), None, 1.0), size=130, scale=1.3)
    assert crop[16:-16, 16:-16].min() == 255 and crop[:13].max() == 0 and crop[:, :13].max() == 0
