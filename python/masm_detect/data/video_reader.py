"""Frames of a video file in one decoding pass, upright, with square pixels, and without damaged ones.

PyAV reads the files: its wheels carry FFmpeg, and it tells the time of a frame, whether it is damaged, the shape of its
pixels and its rotation. OpenCV hides the first three; TorchCodec needs an FFmpeg that is installed beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType

from masm_detect.data.decode import UnreadableImage

#: Other versions may decode damage, or convert colours, differently.
READER = f"PyAV {av.__version__}, " + ", ".join(
    f"{name} {'.'.join(map(str, av.library_versions[name]))}" for name in ("libavcodec", "libswscale")
)

DAMAGED = "damaged frame"
UNDECODABLE = "frame cannot be decoded"
UNCONVERTIBLE = "frame cannot be converted to RGB"

#: Most frames that H.264 and HEVC decode before one that is shown earlier: a frame that came out is judged after as
#: many others, when everything that it was predicted from has come out as well.
_REORDERED = 16
#: Transfer functions of high dynamic range: PQ (SMPTE 2084) and HLG, as numbers of ITU-T H.273.
_HDR = (16, 18)


@dataclass(frozen=True)
class Frame:
    """One frame of a video.

    Attributes:
        number: its place in the order in which frames are shown, from 0
        seconds: when it is shown, counted from the first frame; None if the file does not say
        rgb: uint8 [H, W, 3], or None if it cannot be used
        problem: why it cannot be used, or None
    """

    number: int
    seconds: float | None
    rgb: np.ndarray | None
    problem: str | None = None


@dataclass(frozen=True)
class _Packet:
    """A compressed frame.

    pts: when it is shown, in units of the stream's time base. key: it is predicted from no other frame. shown: it
    becomes a frame. Others may be predicted from one that is not: the container cuts it off (an edit list), or the
    stream hides it.
    """

    pts: int | None
    key: bool
    shown: bool


class VideoFile:
    """A video file, opened and indexed; no frame is decoded yet.

    Attributes:
        total: number of frames. The number that the container lists is often wrong; this one counts the packets.
        notes: what a user should know of the file: a wrong number of frames in its header, damage to the container,
            high dynamic range, an impossible shape of the pixels
    """

    def __init__(self, path: Path) -> None:
        """Read the packets of `path` once, without decoding.

        Raises:
            UnreadableImage: the file is empty, is no video, or has no video stream or no packet in it.
        """
        if path.stat().st_size == 0:
            raise UnreadableImage("empty file (0 bytes)")
        self._path = path
        self.notes: list[str] = []
        with self._open() as container:
            stream = _video_stream(container)
            self._packets: list[_Packet] = []
            try:
                for packet in container.demux(stream):
                    if packet.size:  # the last one is empty
                        shown = not packet.is_discard and not _is_hidden(packet, stream.codec_context.name)
                        self._packets.append(_Packet(packet.pts, packet.is_keyframe, shown))
            except av.FFmpegError as error:
                self.notes.append(f"the container is damaged behind frame {len(self._packets)} ({error.strerror})")
            listed, hdr = stream.frames, stream.codec_context.color_trc in _HDR
            self._time_base, self._aspect = stream.time_base, stream.sample_aspect_ratio or 1
            avi = container.format.name == "avi"
            self._rate = stream.average_rate if avi else None
        times = [packet.pts for packet in self._packets if packet.shown]
        if not times:
            raise UnreadableImage("unreadable: no frame can be decoded")
        self.total = len(times)
        # AVI stores no time stamps, only a constant rate: what FFmpeg gives are the times of decoding.
        self._timed = not avi and None not in times and len(set(times)) == len(times)
        if listed and listed not in (self.total, len(self._packets)):
            self.notes.append(f"the container lists {listed} frames, {self.total} can be read")
        if hdr:
            self.notes.append("high dynamic range, converted to 8 bits without tone mapping: colours look pale")
        if not 1 / 4 <= self._aspect <= 4:
            self.notes.append(f"pixels of shape {self._aspect} are impossible: taken as square")
            self._aspect = 1

    def frames(self, numbers: Collection[int]) -> Iterator[Frame]:
        """The frames with these numbers (of 0 to total - 1), in order, in one pass.

        Where a packet is damaged, so are all frames up to the next one that is coded by itself, since they are
        predicted from it. A damaged frame is reported, and never returned as a picture.
        """
        wanted = deque(sorted(set(numbers)))
        for frame in (self._by_time if self._timed else self._by_count)(set(wanted)):
            while wanted and wanted[0] < frame.number:
                yield Frame(wanted.popleft(), None, None, UNDECODABLE)
            if wanted and wanted[0] == frame.number:  # a broken stream may give a frame twice, or out of order
                wanted.popleft()
                yield frame
        yield from (Frame(number, None, None, UNDECODABLE) for number in wanted)

    def _by_time(self, wanted: set[int]) -> Iterator[Frame]:
        """Frames of a file with time stamps. An unwanted frame is skipped if no other frame is predicted from it."""
        order = sorted(packet.pts for packet in self._packets if packet.shown)
        number_of = {pts: number for number, pts in enumerate(order)}
        place_of = {packet.pts: place for place, packet in enumerate(self._packets)}
        damaged: set[int | None] = set()  # times
        held: deque[tuple[int, av.VideoFrame]] = deque()  # (how many had come out, frame)
        out = 0
        for event in self._decoded({pts for pts, number in number_of.items() if number not in wanted}):
            if isinstance(event, int):
                self._mark(event, damaged)
                continue
            if event.pts not in number_of:
                continue  # the decoder made up a time, after damage
            out += 1
            if event.is_corrupt:
                self._mark(place_of[event.pts], damaged)
            if number_of[event.pts] in wanted:
                held.append((out, event))
            while held and held[0][0] + _REORDERED <= out:
                frame = held.popleft()[1]
                yield self._judged(number_of[frame.pts], frame, order[0], damaged)
        for _, frame in held:
            yield self._judged(number_of[frame.pts], frame, order[0], damaged)

    def _mark(self, place: int, damaged: set[int | None]) -> None:
        """Note as damaged the packet at `place` and all that may be predicted from it.

        These are the packets up to the next one that is coded by itself, and those decoded behind that one but shown
        before it, which may be predicted from both sides.
        """
        if self._packets[place].pts in damaged:
            return  # and so are those behind it
        damaged.add(self._packets[place].pts)
        key: int | None = None
        for packet in islice(self._packets, place + 1, None):
            if packet.key and key is None:
                key = packet.pts
            elif key is None or (packet.pts is not None and packet.pts < key):
                damaged.add(packet.pts)
            else:
                return

    def _judged(self, number: int, frame: av.VideoFrame, first: int, damaged: set[int]) -> Frame:
        seconds = float((frame.pts - first) * self._time_base)
        return self._frame(number, seconds, frame, frame.pts in damaged)

    def _by_count(self, wanted: set[int]) -> Iterator[Frame]:
        """Frames of a file without time stamps, numbered in the order in which they come out.

        It is not known which frame was predicted from which: damage affects all frames from one key frame to the next.
        """
        group: list[tuple[int, int, av.VideoFrame]] = []  # (number, place, frame) from one key frame to the next
        bad: list[int] = []  # places of packets that are damaged or lost
        lost: deque[int] = deque()  # those without a frame, until the frames behind them come out
        key, place, number = 0, 0, -1
        for event in self._decoded(skip=set()):
            if isinstance(event, int):
                bad.append(event)
                lost.append(event)
                continue
            made_up = event.pts is None  # by the decoder, for no packet
            place = place if made_up else event.pts  # of its packet
            if place in lost:  # an error, and yet a frame
                lost.remove(place)
            while lost and lost[0] < place:  # the frames behind a lost one keep their numbers
                lost.popleft()
                number += 1
            number += 1
            if event.is_corrupt or made_up:
                bad.append(place)
            elif event.key_frame:
                yield from self._group(group, bad, key, place)
                group, key = [], place
            if number in wanted:
                group.append((number, place, event))
        yield from self._group(group, bad, key, len(self._packets))

    def _group(
        self, group: list[tuple[int, int, av.VideoFrame]], bad: list[int], key: int, end: int
    ) -> Iterator[Frame]:
        """The frames between the key frames at `key` and `end`. Some may be decoded behind the second one."""
        for number, place, frame in group:
            damaged = any(key <= other < max(end, place + 1) for other in bad)
            yield self._frame(number, float(number / self._rate) if self._rate else None, frame, damaged)

    def _frame(self, number: int, seconds: float | None, frame: av.VideoFrame, damaged: bool) -> Frame:
        if damaged:
            return Frame(number, seconds, None, DAMAGED)
        try:
            return Frame(number, seconds, self._rgb(frame))
        except (av.FFmpegError, ValueError) as error:
            # a pixel format that FFmpeg cannot convert, or an impossible size
            return Frame(number, seconds, None, f"{UNCONVERTIBLE}: {error}")

    def _decoded(self, skip: set[int | None]) -> Iterator[av.VideoFrame | int]:
        """Every decoded frame, or the place of a packet that cannot be decoded.

        Where the file has no times, the pts of a frame is the place of its packet.

        skip: times of frames that may be left out if no other frame is predicted from them.
        """
        with self._open() as container:
            stream = _video_stream(container)
            context = stream.codec_context
            context.thread_count = 1  # several threads report an error at another packet; videos run side by side
            if context.name in ("hevc", "mjpeg"):  # without it FFmpeg reports less damage; H.264 does not need it
                context.options = {"err_detect": "crccheck+explode"}
            place = -1
            try:
                for packet in container.demux(stream):
                    if not packet.size:
                        continue
                    place += 1
                    if not self._timed:
                        packet.pts = packet.dts = place  # frames carry it (PyAV 18 loses some of `opaque`)
                    context.skip_frame = "NONREF" if packet.pts in skip else "DEFAULT"
                    try:
                        yield from packet.decode()
                    except av.FFmpegError:
                        yield place
            except av.FFmpegError:
                pass  # the container is damaged from here on, as a note says
            try:
                yield from context.decode(None)
            except av.FFmpegError:
                yield place

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """The picture as it is shown: square pixels, upright, not mirrored."""
        width, height, aspect = frame.width, frame.height, self._aspect
        # enlarged, never shrunk
        width, height = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
        rgb = frame.to_ndarray(format="rgb24", width=width, height=height)
        matrix = _display_matrix(frame)
        if matrix is None:
            return rgb
        (a, b), (c, d) = matrix
        if abs(b) > abs(a):  # rows become columns
            rgb, a, d = rgb.swapaxes(0, 1), c, b
        return np.ascontiguousarray(rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])

    def _open(self) -> av.container.InputContainer:
        try:
            # a title in another encoding must not make a video unreadable
            return av.open(str(self._path), metadata_errors="replace")
        except (av.FFmpegError, OSError) as error:
            raise UnreadableImage(
                f"unreadable: not a video that FFmpeg can open, or truncated ({error.strerror})"
            ) from error


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The main video stream, which is not a picture of the cover."""
    stream = container.streams.best("video")
    if stream is None:
        raise UnreadableImage("unreadable: the file has no video stream")
    if stream.codec_context is None:
        raise UnreadableImage("unreadable: truncated, or of a codec that FFmpeg does not know")
    return stream


def _is_hidden(packet: av.Packet, codec: str) -> bool:
    """Whether a packet is a frame of VP8 that is only predicted from (bit show_frame, RFC 6386, section 9.1).

    VP9 and AV1 pack such frames together with the next one that is shown.
    """
    return codec in ("vp8", "libvpx") and not bytes(packet)[0] & 0x10


def _display_matrix(frame: av.VideoFrame) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The linear part ((a, b), (c, d)) of a frame's display matrix: a pixel (x, y) is shown at (ax + cy, bx + dy)."""
    data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return None
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()
    return (a, b), (c, d)
