"""A file that has not changed is read once; a cache that cannot be used costs time only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings

import pytest
from masm_detect.data import contents as contents_module
from masm_detect.data.contents import read_contents
from masm_detect.data.folders import read_folder


@pytest.fixture
def samples(tiny_data):
    """The tiny data set, as if written a minute ago."""
    found = read_folder(tiny_data)
    for sample in found:
        age(sample.path)
    return found


@pytest.fixture
def opened(monkeypatch):
    """The paths of the files that are opened, in order of their names."""
    paths, read = [], contents_module.read_bytes
    monkeypatch.setattr(contents_module, "read_bytes", lambda path: paths.append(path) or read(path))
    return paths


def age(path: str, seconds: float = 60) -> None:
    os.utime(path, ns=(time.time_ns(), time.time_ns() - int(seconds * 1e9)))


def test_a_second_start_opens_no_image(samples, opened):
    first = read_contents(samples)
    assert len(opened) == 24
    opened.clear()
    assert read_contents(samples) == first and opened == []


def test_a_changed_file_is_read_again(samples, opened):
    first = read_contents(samples)
    opened.clear()
    with open(samples[0].path, "ab") as file:  # another size
        file.write(b"more")
    age(samples[0].path)
    age(samples[1].path, 30)  # another time
    changed = read_contents(samples)
    assert sorted(opened) == sorted(sample.path for sample in samples[:2])
    assert changed[0].fingerprint != first[0].fingerprint and changed[1:] == first[1:]
    opened.clear()
    assert read_contents(samples) == changed and opened == []


def test_a_file_that_changed_just_now_is_not_trusted(samples, opened):
    """A second change within the resolution of the time stamp would go unseen."""
    age(samples[0].path, 0.5)
    age(samples[1].path, -3600)  # the clock of another machine
    read_contents(samples)
    opened.clear()
    read_contents(samples)
    assert sorted(opened) == sorted(sample.path for sample in samples[:2])


def test_slow_reading_does_not_make_a_new_file_trusted(samples, opened, monkeypatch):
    """What counts is how long ago the file had changed when it was looked at, not when its content is stored."""
    monkeypatch.setattr("masm_detect.data.content_cache._SETTLED", 200_000_000)
    age(samples[0].path, 0)
    counted = contents_module.read_bytes
    monkeypatch.setattr(contents_module, "read_bytes", lambda path: time.sleep(0.1) or counted(path))
    read_contents(samples)  # three rounds of 8 threads: 0.3 s
    opened.clear()
    read_contents(samples)
    assert opened == [samples[0].path]


def test_a_damaged_file_is_found_each_time(samples):
    with open(samples[0].path, "wb"):
        pass
    age(samples[0].path)
    for _ in range(2):
        with pytest.raises(contents_module.UnreadableImage, match="is empty"):
            read_contents(samples)


@pytest.mark.parametrize("damage", ["no database", "no folder", "another table"])
def test_a_broken_cache_is_one_warning(samples, own_content_cache, damage):
    expected = read_contents(samples)
    if damage == "no database":
        own_content_cache.write_bytes(b"something else" * 1000)
    elif damage == "no folder":
        own_content_cache.unlink()
        own_content_cache.parent.rmdir()
        own_content_cache.parent.write_text("a file")
    else:
        own_content_cache.unlink()
        import sqlite3

        with sqlite3.connect(own_content_cache) as database:
            database.execute("CREATE TABLE contents_1 (path TEXT)")
        database.close()
    with pytest.warns(UserWarning, match="cannot be used .* delete the file") as caught:
        assert read_contents(samples) == expected
    assert len(caught) == 1


def test_a_name_that_is_no_text(samples, tiny_data, opened):
    odd = os.fsencode(tiny_data / "real") + b"/\xff.png"
    os.rename(samples[-1].path, odd)
    samples = read_folder(tiny_data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_contents(samples)
        opened.clear()
        read_contents(samples)
    assert opened == [os.fsdecode(odd)]


def test_two_processes_use_one_cache(samples, tiny_data, own_content_cache, opened):
    code = (
        "import sys, warnings; warnings.simplefilter('error');"
        "from pathlib import Path; from masm_detect.data import content_cache, contents;"
        f"content_cache.default_cache_file = lambda: Path({str(own_content_cache)!r});"
        "from masm_detect.data.folders import read_folder; contents._SLICE = 2;"
        f"[contents.read_contents(read_folder({str(tiny_data)!r})) for _ in range(20)]"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
    read_contents(samples)
    assert opened == []
