"""Distortions of the frames of a video, which are encoded and decoded as one clip."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np

from masm_detect.errors import UserError

#: Frames a second of an encoded clip. With a constant rate factor it decides little.
_RATE = 25


class CodecError(UserError, RuntimeError):
    """A video encoder that this installation of PyAV does not have, or that fails on these frames."""


def h264(frames: Sequence[np.ndarray], value: float) -> list[np.ndarray]:
    """H.264 by libx264, preset medium, constant rate factor `value`: T frames RGB uint8 [H, W, 3] -> the same."""
    return _encoded(frames, "libx264", {"preset": "medium", "crf": f"{value:g}"})


def hevc(frames: Sequence[np.ndarray], value: float) -> list[np.ndarray]:
    """HEVC by libx265, preset medium, constant rate factor `value`: T frames RGB uint8 [H, W, 3] -> the same."""
    # one thread: otherwise the result depends on the number of cores
    settings = "log-level=none:pools=none:frame-threads=1"
    return _encoded(frames, "libx265", {"preset": "medium", "crf": f"{value:g}", "x265-params": settings})


#: Distortion -> encoder of FFmpeg.
ENCODERS = {h264: "libx264", hevc: "libx265"}


def check_encoder(name: str) -> None:
    """Raise CodecError if PyAV was built without the encoder `name`."""
    try:
        av.codec.Codec(name, "w")
    except (av.FFmpegError, ValueError) as error:
        raise CodecError(
            f"PyAV {av.__version__} has no encoder {name}: install PyAV from its wheel on PyPI (pip install "
            "--force-reinstall --no-deps av), or leave the distortion out with --cells"
        ) from error


def _encoded(frames: Sequence[np.ndarray], encoder: str, options: dict[str, str]) -> list[np.ndarray]:
    check_encoder(encoder)
    height, width = frames[0].shape[:2]
    # 4:2:0 needs even sides: a border pixel is repeated and cut off again
    padding = ((0, height % 2), (0, width % 2), (0, 0))
    file = io.BytesIO()
    try:
        with av.open(file, "w", format="matroska") as container:
            stream = container.add_stream(encoder, rate=_RATE, options=options)
            stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
            stream.codec_context.thread_count = 1  # as for libx265
            for number, rgb in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.pad(rgb, padding, "edge"), format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        file.seek(0)
        with av.open(file) as container:
            decoded = [frame.to_ndarray(format="rgb24")[:height, :width] for frame in container.decode(video=0)]
    except av.FFmpegError as error:
        raise CodecError(
            f"{encoder} cannot encode {len(frames)} frames of {width}x{height} pixels ({error}): leave the distortion "
            "out with --cells"
        ) from error
    if len(decoded) != len(frames):
        raise CodecError(f"{encoder} gave {len(decoded)} frames back for {len(frames)}: leave it out with --cells")
    return decoded
