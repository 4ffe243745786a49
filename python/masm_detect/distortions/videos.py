"""Distortions of the frames of a video, which are encoded and decoded as one clip."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np

from masm_detect.errors import UserError

#: Smallest side that libx265 gets. Below 64 pixels it takes smaller blocks; its tables, which all clips of a process
#: share, are then overwritten out of bounds, and the process died after some clips of different sizes. With sides of 64
#: pixels it gave other pixels each time, from 96 on the same ones (x265 in PyAV 18.1, 12 frames encoded eight times).
_HEVC_SIDE = 128
#: Frames a second of an encoded clip. With a constant rate factor it decides little.
_RATE = 25


class CodecError(UserError, RuntimeError):
    """A video encoder that this installation of PyAV does not have, or that fails on these frames."""


def h264(frames: Sequence[np.ndarray], value: float) -> list[np.ndarray]:
    """H.264 by libx264, preset medium, constant rate factor `value`.

    frames: T of RGB uint8 [H, W, 3]; as many come back.
    """
    # Without it, other pixels came out in up to half of 25 encodings of one clip (AVX-512 code of the lookahead).
    settings = "cpu-independent=1"
    return _encoded(frames, "libx264", {"preset": "medium", "crf": f"{value:g}", "x264-params": settings})


def hevc(frames: Sequence[np.ndarray], value: float) -> list[np.ndarray]:
    """HEVC by libx265, preset medium, constant rate factor `value`.

    frames: T of RGB uint8 [H, W, 3]; as many come back.
    """
    # one thread: otherwise the result depends on the number of cores
    settings = "log-level=none:pools=none:frame-threads=1"
    return _encoded(frames, "libx265", {"preset": "medium", "crf": f"{value:g}", "x265-params": settings}, _HEVC_SIDE)


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


def _encoded(
    frames: Sequence[np.ndarray], encoder: str, options: dict[str, str], smallest: int = 2
) -> list[np.ndarray]:
    check_encoder(encoder)
    height, width = frames[0].shape[:2]
    # 4:2:0 needs even sides: border pixels are repeated and cut off again
    rows, columns = (max(smallest, side + side % 2) for side in (height, width))
    padding = ((0, rows - height), (0, columns - width), (0, 0))
    file = io.BytesIO()
    try:
        with av.open(file, "w", format="matroska") as container:
            stream = container.add_stream(encoder, rate=_RATE, options=options)
            stream.width, stream.height, stream.pix_fmt = columns, rows, "yuv420p"
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
