"""One decoding pass: every codec, damaged streams, pixels that are not square, rotation, odd containers."""

from __future__ import annotations

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from masm_detect.data.decode import UnreadableImage
from masm_detect.data.video_reader import DAMAGED, UNCONVERTIBLE, VideoFile
from video_files import damage, encode_video, striped

X264 = {"crf": "18", "threads": "1"}
CODECS = {
    "h264.mp4": ("libx264", {**X264, "bf": "3"}),
    "h264.mkv": ("libx264", {**X264, "bf": "3"}),
    "open-gop.mp4": ("libx264", {**X264, "x264-params": "open-gop=1:bframes=3"}),
    "no-times.h264": ("libx264", {**X264, "bf": "3"}),
    "h264.avi": ("libx264", {**X264, "bf": "3"}),  # whose times are those of decoding
    "mpeg4.avi": ("mpeg4", {"bf": "2"}),
    "mjpeg.avi": ("mjpeg", {}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:pools=none:frame-threads=1"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
}


def written(folder, name, frames=40, **options):
    codec, settings = CODECS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    return encode_video(folder / name, frames, codec, fmt=fmt, options=settings, **options)


def decoded(path):
    """All frames, by PyAV alone."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def decoded_with_errors(path):
    """The frames that come out of a damaged file."""
    frames = []
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for packet in container.demux(video=0):
            try:
                frames += packet.decode()
            except av.FFmpegError:
                continue
    return frames


@pytest.mark.parametrize("name", CODECS)
def test_chosen_frames_are_those_of_a_whole_decode(tmp_path, name):
    path = written(tmp_path, name, gop=15)
    whole = decoded(path)
    file = VideoFile(path)
    assert file.total == len(whole) == 40 and file.notes == []
    for numbers in (range(40), [0, 1, 13, 16, 29, 39], [38], []):
        frames = list(file.frames(numbers))
        assert [frame.number for frame in frames] == list(numbers)
        for frame in frames:
            assert frame.problem is None
            np.testing.assert_array_equal(frame.rgb, whole[frame.number])
            assert (
                frame.seconds is None if name == "no-times.h264" else frame.seconds == pytest.approx(frame.number / 25)
            )


def test_frames_that_no_other_needs_are_not_decoded(tmp_path, monkeypatch):
    file = VideoFile(written(tmp_path, "h264.mp4"))
    out = []
    whole = VideoFile._decoded
    monkeypatch.setattr(VideoFile, "_decoded", lambda self, skip: (out.append(f) or f for f in whole(self, skip)))
    list(file.frames([0, 39]))
    assert len(out) < 38  # of 40


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "open-gop.mp4", "no-times.h264", "mpeg4.avi", "mjpeg.avi"])
def test_damaged_frames_are_told(tmp_path, name):
    """Also those that are predicted from a damaged one, which the decoder does not flag."""
    path = written(tmp_path, name, frames=60, size=(160, 120), gop=20)
    whole = decoded(path)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.pts, p.is_keyframe) for p in container.demux(video=0) if p.size]
    # damage ends at the next key frame
    keys = [pts for pos, pts, key in packets if key and pos > 0.6 * path.stat().st_size]
    intact = [n for n, (_, pts, _) in enumerate(sorted(packets, key=lambda p: p[1] or 0)) if pts and pts >= min(keys)]
    told = shown = wrong = 0
    for seed in range(8):
        broken = damage(path, tmp_path / f"broken-{name}", 0.35, 0.6, 2, seed)
        try:
            file = VideoFile(broken)
        except UnreadableImage:
            continue  # the container itself is hit
        if file.total != 60:
            continue
        frames = list(file.frames(range(60)))
        assert len(frames) == 60
        usable = [frame for frame in frames if frame.rgb is not None]
        told += len(frames) - len(usable)
        shown += len(usable)
        wrong += sum(np.abs(f.rgb.astype(int) - whole[f.number]).mean() > 1 for f in usable)
        if name.endswith(("mp4", "mkv")):  # in the others, damage to the container loses frames and shifts the rest
            assert intact and all(frames[n].problem is None for n in intact)
    assert told >= 8 and shown > 100
    assert wrong <= 0.1 * told


def test_a_frame_shown_before_the_damaged_one_that_it_needs(tmp_path):
    """B-frames are shown before, and predicted from, a later frame: they are damaged with it."""
    path = written(tmp_path, "h264.mp4", frames=30)
    whole = decoded(path)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size, p.pts) for p in container.demux(video=0) if p.size]
    step = sorted(pts for _, _, pts in packets)[1] - min(pts for _, _, pts in packets)
    # a packet that is decoded before frames that are shown earlier
    place = next(i for i in range(4, len(packets) - 1) if packets[i + 1][2] < packets[i][2])
    position, size, pts = packets[place]
    data = bytearray(path.read_bytes())
    data[position + size // 3 : position + size // 3 + 30] = bytes(range(7, 37))
    path.write_bytes(data)
    number = round((pts - min(p for _, _, p in packets)) / step)
    frames = list(VideoFile(path).frames(range(30)))
    assert frames[number].problem == frames[number - 1].problem == DAMAGED
    early = [
        n for n, (_, _, p) in enumerate(sorted(packets, key=lambda k: k[2])) if p in {k[2] for k in packets[:place]}
    ]
    for n in early:
        np.testing.assert_array_equal(frames[n].rgb, whole[n])


@pytest.mark.parametrize(
    "aspect, size", [(Fraction(2), (96, 32)), (Fraction(1, 2), (48, 64)), (Fraction(16, 11), (70, 32))]
)
def test_pixels_become_square(tmp_path, aspect, size):
    path = encode_video(tmp_path / "a.mp4", 3, size=(48, 32), aspect=aspect, options=X264)
    assert next(VideoFile(path).frames([0])).rgb.shape == (size[1], size[0], 3)


def test_impossible_pixels_are_noted(tmp_path):
    path = encode_video(tmp_path / "a.mp4", 3, size=(48, 32), aspect=Fraction(8), options=X264)
    file = VideoFile(path)
    assert "impossible" in file.notes[0] and next(file.frames([0])).rgb.shape == (32, 48, 3)


@pytest.mark.parametrize("matrix, turned", [
    ((1, 0, 0, 1), lambda x: x),
    ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),  # a phone held upright
    ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
    ((-1, 0, 0, 1), lambda x: x[:, ::-1]),  # a mirrored front camera
    ((1, 0, 0, -1), lambda x: x[::-1]),
    ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    ((0, -1, -1, 0), lambda x: x[::-1, ::-1].swapaxes(0, 1)),
])  # fmt: skip
def test_rotation_and_mirroring(tmp_path, matrix, turned):
    path = encode_video(tmp_path / "a.mp4", 3, size=(48, 32), options=X264)
    straight = next(VideoFile(path).frames([0])).rgb
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version 0: the matrix is behind 40 bytes
    a, b, c, d = (65536 * value for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    np.testing.assert_array_equal(next(VideoFile(path).frames([0])).rgb, turned(straight))


def test_what_an_edit_list_cuts_off_is_not_counted(tmp_path):
    path = written(tmp_path, "h264.mp4", frames=30)
    whole = decoded(path)
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 4 + 8 + 4  # of the start in the media, in its time base
    start, rate = (
        struct.unpack(">i", data[place : place + 4])[0],
        struct.unpack(">I", data[data.index(b"mdhd") + 16 :][:4])[0],
    )
    data[place : place + 4] = struct.pack(">i", start + 7 * rate // 25)
    path.write_bytes(data)
    file = VideoFile(path)
    assert file.total == 23
    frames = list(file.frames([0, 22]))
    np.testing.assert_array_equal(frames[0].rgb, whole[7])
    np.testing.assert_array_equal(frames[1].rgb, whole[29])


def test_other_tracks_and_high_dynamic_range(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        stream = container.add_stream("libx264", rate=25, options={"x264-params": "transfer=smpte2084"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        wave.sample_rate = 44100
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(striped((64, 48), number), format="rgb24").reformat(format="yuv420p10le")
            frame.pts = number
            container.mux(stream.encode(frame))
            container.mux(sound.encode(wave))
        container.mux(stream.encode(None))
        container.mux(sound.encode(None))
    file = VideoFile(path)
    assert file.total == 5 and any("dynamic range" in note for note in file.notes)
    assert next(file.frames([4])).rgb.shape == (48, 64, 3)


def test_frames_that_change_size_and_format(tmp_path):
    """Two H.264 streams behind each other, as broadcasts and screen sharing have them."""
    small = encode_video(tmp_path / "a.h264", 5, size=(48, 32), options=X264)
    large = encode_video(tmp_path / "b.h264", 5, size=(64, 64), fmt="yuv444p", options=X264)
    both = tmp_path / "both.h264"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    shapes = [frame.rgb.shape for frame in VideoFile(both).frames(range(10))]
    assert shapes == [(32, 48, 3)] * 5 + [(64, 64, 3)] * 5


@pytest.mark.parametrize("content, message", [
    (b"", "empty"), (b"no video" * 500, "not a video"), ("sound", "no video stream"), ("cut", "truncated"),
])  # fmt: skip
def test_what_is_no_video(tmp_path, content, message):
    path = tmp_path / "a.mp4"
    if content == "sound":
        with av.open(str(path), "w") as container:
            sound = container.add_stream("aac", rate=44100)
            wave = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            wave.sample_rate = 44100
            container.mux(sound.encode(wave))
            container.mux(sound.encode(None))
    elif content == "cut":
        encode_video(path, 10, options=X264)
        path.write_bytes(path.read_bytes()[:-500])  # without its index
    else:
        path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=message):
        VideoFile(path)


def test_a_title_in_another_encoding(tmp_path):
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Cafe12345"
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(striped((64, 48), 0), format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"Cafe12345", b"Caf\xe912345"))
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path))
    assert next(VideoFile(path).frames([0])).rgb.shape == (48, 64, 3)


def test_a_wrong_number_of_frames_in_the_header(tmp_path):
    path = written(tmp_path, "mjpeg.avi", frames=20)
    data = bytearray(path.read_bytes())
    place = data.index(b"strh") + 8 + 32  # the length of the stream
    assert struct.unpack("<I", data[place : place + 4])[0] == 20
    data[place : place + 4] = struct.pack("<I", 300)
    path.write_bytes(data)
    file = VideoFile(path)
    assert file.total == 20 and file.notes == ["the container lists 300 frames, 20 can be read"]


def test_hidden_frames_of_vp8_are_not_counted(tmp_path):
    """They are only predicted from. One is made by the bit of its header; an encoder needs two passes for it."""
    if "libvpx" not in av.codecs_available:
        pytest.skip("this PyAV has no libvpx")
    path = encode_video(tmp_path / "a.ivf", 30, "libvpx", options={"deadline": "realtime", "cpu-used": "8"})
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    header = places[12] + 12  # of the frame, behind that of the container
    assert data[header] & 0x10
    data[header] &= ~0x10
    path.write_bytes(data)
    whole = decoded(path)
    file = VideoFile(path)
    assert len(places) == 30 and file.total == len(whole) == 29
    for frame in file.frames(range(29)):
        np.testing.assert_array_equal(frame.rgb, whole[frame.number])


def test_a_packet_that_gives_an_error_and_a_frame_counts_once(tmp_path, monkeypatch):
    path = written(tmp_path, "no-times.h264", frames=40, gop=10)
    whole = decoded(path)
    decode = VideoFile._decoded

    def with_an_error(self, skip):
        for event in decode(self, skip):
            if event.pts == 22:
                yield 22
            yield event

    monkeypatch.setattr(VideoFile, "_decoded", with_an_error)
    frames = list(VideoFile(path).frames(range(40)))
    assert frames[22].problem and not frames[39].problem
    for frame in frames:
        if frame.rgb is not None:
            np.testing.assert_array_equal(frame.rgb, whole[frame.number])


@pytest.mark.parametrize("lost", [10, 12, 17])
def test_a_lost_packet_of_a_file_without_times(tmp_path, lost):
    """It affects the frames up to the next key frame, which come out later; those behind it keep their numbers."""
    path = written(tmp_path, "no-times.h264", frames=40, gop=10)
    whole = decoded(path)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size, p.is_keyframe) for p in container.demux(video=0) if p.size]
    keys = [place for place, (_, _, key) in enumerate(packets) if key]
    start, end = max(key for key in keys if key <= lost), min(key for key in keys if key > lost)
    data = bytearray(path.read_bytes())
    position, size, _ = packets[lost]
    data[position : position + size] = b"\x00\x00\x00\x01\x65" + b"\xff" * (size - 5)
    path.write_bytes(data)
    assert len(decoded_with_errors(path)) < 40
    frames = list(VideoFile(path).frames(range(40)))
    assert all(frame.problem for frame in frames[start:end])
    for frame in frames[:start] + frames[end:]:
        np.testing.assert_array_equal(frame.rgb, whole[frame.number])


def test_a_frame_that_cannot_be_converted_is_reported(tmp_path, monkeypatch):
    path = written(tmp_path, "h264.mp4", frames=3)

    def refuse(self, frame):
        raise ValueError("Conversion to rgb24 from bayer is not supported")

    monkeypatch.setattr(VideoFile, "_rgb", refuse)
    frames = list(VideoFile(path).frames(range(3)))
    assert [frame.rgb for frame in frames] == [None] * 3
    assert all(frame.problem.startswith(UNCONVERTIBLE) and "bayer" in frame.problem for frame in frames)
