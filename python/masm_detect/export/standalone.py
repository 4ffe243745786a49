"""Scores image files with model.onnx: python predict.py IMAGE ..., or `from predict import predict`.

Needs numpy, Pillow and onnxruntime. The images must be crops like those that the model was trained on ("crops" in
preprocessing.json). A logit above 0 is called fake.
"""

import functools
import io
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def load_pixels(path, settings):
    """The image file as the model's input, float32 [3, size, size]; `settings` is preprocessing.json."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    if settings["normalize_first"]:
        side, quality = settings["normalize_first"]
        data = io.BytesIO()
        resized(image, side).save(data, "JPEG", quality=quality, subsampling="4:2:0")
        image = Image.open(data).convert("RGB")
    size = settings["size"]
    if settings["crop"] == "resize":
        image = resized(image, size)
    else:
        left, top = (image.width - size) // 2, (image.height - size) // 2
        if left < 0 or top < 0:
            raise ValueError(f"{path} has {image.width}x{image.height} pixels, less than the centre crop of {size}")
        image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image, np.float32) / np.float32(255)
    pixels = (pixels - np.float32(settings["mean"])) / np.float32(settings["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def resized(image, size):
    """`image` with size x size pixels."""
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def load_model(folder):
    """The session of model.onnx and the content of preprocessing.json in `folder`."""
    settings = json.loads((Path(folder) / "preprocessing.json").read_text(encoding="utf-8"))
    return onnxruntime.InferenceSession(Path(folder) / "model.onnx", providers=["CPUExecutionProvider"]), settings


def logit_of(path, session, settings):
    """The logit of one image file."""
    pixels = load_pixels(path, settings)[None]
    return float(session.run(["logits"], {"pixel_values": pixels})[0][0])


@functools.lru_cache(maxsize=1)
def own_model():
    """The model beside this file, loaded once."""
    return load_model(Path(__file__).resolve().parent)


def predict(path):
    """P(fake) of one image file, by the model beside this file, as programs that compare detectors call it."""
    return 1 / (1 + float(np.exp(-logit_of(path, *own_model()))))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        value = logit_of(name, *own_model())
        print(f"{name}: logit {value:.4f}, P(fake) {1 / (1 + np.exp(-value)):.4f}")
