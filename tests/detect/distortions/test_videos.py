"""The video codecs: real encoders, one clip, deterministic."""

from __future__ import annotations

import subprocess
import sys

import av
import numpy as np
import pytest
from command_line import assert_one_line, code_of
from masm_detect.distortions import videos
from masm_detect.distortions.registry import choose_cells
from skimage.data import astronaut
from video_files import striped

CODECS = [videos.h264, videos.hevc]


def error(frames, made):
    return np.mean([np.square(a.astype(float) - b).mean() for a, b in zip(frames, made)])


@pytest.mark.parametrize("codec", CODECS)
def test_frames_come_back_in_order_and_worse(codec):
    frames = [striped((64, 48), 9 * number) for number in range(6)]
    mild, strong = codec(frames, 20), codec(frames, 45)
    assert [one.shape for one in strong] == [one.shape for one in frames]
    assert error(frames, mild) < error(frames, strong)
    for number, one in enumerate(mild):  # each is nearest to its own frame
        assert number == np.argmin([np.square(one.astype(float) - frame).mean() for frame in frames])
    assert all(np.array_equal(a, b) for a, b in zip(mild, codec(frames, 20)))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [(33, 47), (28, 28), (16, 19)])
def test_odd_and_small_frames(codec, size):
    frames = [striped(size, number) for number in range(3)]
    made = codec(frames, 23)
    assert [one.shape for one in made] == [(size[1], size[0], 3)] * 3
    assert np.sqrt(error(frames, made)) < 30


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_bytes_whatever_the_memory_holds(codec, seed):
    """The lookahead of libx264 in AVX-512 gave other pixels in up to half of the encodings; other CPUs pass anyway."""
    random, junk, found = np.random.default_rng(seed), [], set()
    picture = astronaut()
    frames = [picture[y : y + 160, x : x + 160] for x, y in random.integers(100, 130, (12, 2))]
    for _ in range(10):
        junk.append(np.full(random.integers(1e3, 3e6), random.integers(0, 255), np.uint8))
        if len(junk) > 4:
            junk.pop(random.integers(0, 4))
        found.add(b"".join(frame.tobytes() for frame in codec([frame.copy() for frame in frames], 33)))
    assert len(found) == 1


def test_clips_of_many_sizes_in_one_process():
    """libx265 writes out of bounds when a clip has smaller coding blocks than the one before: the process would die."""
    code = """
import numpy as np
from masm_detect.distortions.videos import hevc
for _ in range(4):
    for width, height in ((64, 48), (33, 47), (28, 28), (16, 19), (300, 200), (8, 70)):
        hevc([np.full((height, width, 3), 20 * number, np.uint8) for number in range(3)], 28)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("codec", "name"), [(videos.h264, "h264"), (videos.hevc, "hevc")])
def test_it_is_the_codec_that_it_is_called(codec, name, monkeypatch):
    opened, real = [], av.open

    def watch(*arguments, **options):
        container = real(*arguments, **options)
        if container.__class__.__name__ == "InputContainer":
            opened.append(container.streams.video[0].codec_context.name)
        return container

    monkeypatch.setattr(videos.av, "open", watch)
    codec([striped((32, 32), 0)] * 2, 30)
    assert opened == [name]


def test_a_missing_encoder_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(videos.av.codec, "Codec", lambda *_: (_ for _ in ()).throw(ValueError("no such codec")))
    with pytest.raises(videos.CodecError, match="no encoder libx265"):
        videos.hevc([striped((32, 32), 0)], 28)
    assert code_of(["robustness", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert_one_line(capsys.readouterr().err, "has no encoder libx26")


def test_every_video_cell_has_an_encoder():
    assert {c.distortion.apply for c in choose_cells() if c.video} == set(videos.ENCODERS)
