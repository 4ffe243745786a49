"""Writes small videos and images for tests."""

from __future__ import annotations

import av
import cv2
import numpy as np


def write_video(path, frames, dark=(), fourcc="MJPG"):
    """Frames whose grey level is 120 + 2 * number, or 0 where `dark`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), 25, (64, 48))
    assert writer.isOpened()
    for i in range(frames):
        writer.write(np.full((48, 64, 3), 0 if i in dark else 120 + 2 * i, np.uint8))
    writer.release()
    return path


def write_image(path, level=200):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((48, 64, 3), level, np.uint8))
    return path


def encode_video(path, frames, codec="libx264", size=(64, 48), fmt="yuv420p", aspect=None, options=None, gop=250):
    """A video of moving stripes, 25 frames a second; frame n is moved by n pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, fmt, gop
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(striped(size, number), format="rgb24").reformat(format=fmt)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def striped(size, number):
    """RGB uint8 [H, W, 3]: stripes, and noise that is hard to compress."""
    x = np.arange(size[0]) + number
    stripes = np.stack([x * 4 % 256, x * 2 % 256, 255 - x * 4 % 256], axis=-1)
    noise = np.random.default_rng(number).integers(0, 64, (size[1], size[0], 3))
    return np.clip(np.broadcast_to(stripes, (size[1], size[0], 3)) * 0.75 + noise, 0, 255).astype(np.uint8)


def damage(source, target, start, end, count, seed=0, width=40):
    """A copy of a file with `count` spans of `width` random bytes between the shares `start` and `end` of it."""
    random = np.random.default_rng(seed)
    data = bytearray(source.read_bytes())
    for place in random.integers(int(start * len(data)), int(end * len(data)) - width, count):
        data[place : place + width] = random.bytes(width)
    target.write_bytes(data)
    return target
