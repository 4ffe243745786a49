"""The choice among a kernel's tiles: kept on disk, shared between processes, never made where nothing can be timed."""

import json
import warnings

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it has no build for this platform?)")

from masm_ext.kernels import tuning
from masm_ext.kernels.launch import Target, Tile

GPU = Target(90, 132, "NVIDIA H100 80GB HBM3")
TILES = (Tile(1, 1, 1, 1, 1), Tile(2, 2, 2, 2, 2))


@pytest.fixture
def timed(monkeypatch):
    """Stands in for a GPU whose fastest tile is the last; counts how often it was asked."""
    asked = []
    monkeypatch.setattr(tuning, "measure", lambda tiles, launch: asked.append(tiles) or tiles[-1])
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_chosen", {})
    return asked


def choose(folder, key="gemm 16 torch.float32", tiles=TILES, target=GPU):
    return tuning.choose(target, key, tiles, lambda tile: None, folder)


def test_timed_once_and_kept_for_other_processes(timed, tmp_path, monkeypatch):
    folder = tmp_path / "not yet there"
    assert choose(folder) == choose(folder) == TILES[1] and len(timed) == 1
    monkeypatch.setattr(tuning, "_chosen", {})  # another process
    assert choose(folder) == TILES[1] and len(timed) == 1
    assert choose(folder, "another key") == TILES[1] and len(timed) == 2
    kept = json.loads(tuning.cache_file(GPU, folder).read_text())
    assert set(kept) == {"gemm 16 torch.float32", "another key"}


def test_each_gpu_has_a_file_of_its_own(tmp_path):
    other = GPU._replace(name="NVIDIA A100", capability=80)
    files = {tuning.cache_file(target, tmp_path) for target in (GPU, other)}
    assert len(files) == 2 and all("h100" in str(f) or "a100" in str(f) for f in files)


def test_a_tile_that_left_the_list_is_not_used(timed, tmp_path):
    choose(tmp_path)
    assert choose(tmp_path, tiles=(TILES[0], Tile(3, 3, 3, 3, 3))) == Tile(3, 3, 3, 3, 3) and len(timed) == 2


def test_nothing_is_timed_where_it_cannot_be(timed, tmp_path, monkeypatch):
    assert choose(tmp_path, tiles=TILES[:1]) == TILES[0]
    with monkeypatch.context() as patch:
        patch.setattr(tuning.torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choose(tmp_path) == TILES[0]
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_enabled", True)
        tuning.set_enabled(False)
        assert choose(tmp_path) == TILES[0]
    assert timed == [] and choose(tmp_path) == TILES[1]


def test_a_broken_or_unwritable_file_is_told(timed, tmp_path):
    file = tuning.cache_file(GPU, tmp_path)
    file.write_text("{")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert choose(tmp_path) == TILES[1]
    with pytest.warns(UserWarning, match="cannot be written"):
        choose(file)  # a file where the folder should be


def test_two_processes_do_not_lose_each_others_choices(timed, tmp_path, monkeypatch):
    choose(tmp_path, "mine")
    file = tuning.cache_file(GPU, tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), "theirs": [1, 1, 1, 1, 1]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(tmp_path, "mine too")
    assert set(json.loads(file.read_text())) == {"mine", "theirs", "mine too"}


def test_a_batch_of_nearly_the_same_size_has_the_same_key():
    assert tuning.key_of("gemm", 8224, 1024) == tuning.key_of("gemm", 16384, 1024) != tuning.key_of("gemm", 8192, 1024)


def test_a_tile_that_does_not_fit_is_left_out(monkeypatch):
    def bench(launch, **_):
        launch()
        return 1.0

    def launch(tile):
        if tile == TILES[0]:
            raise tuning.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(tuning.triton.testing, "do_bench", bench)
    assert tuning.measure(TILES, launch) == TILES[1]
    with pytest.raises(tuning.OutOfResources):
        tuning.measure(TILES[:1], launch)


def test_stream_is_not_chosen_for_dx_alone(monkeypatch):
    """It has no kernel for it: the product would be that of another strategy, chosen by nobody."""
    from masm_ext.kernels import small_batch, subspace_linear

    monkeypatch.setattr(small_batch, "available", lambda t: True)
    x, weight = torch.empty(16, 4096), [torch.empty(4096, 4096)]
    arguments = (x, 4096, 4096, 64, weight, Target(90, 132), False)
    assert subspace_linear._choose(*arguments) == "stream"  # inference
    assert subspace_linear._choose(*arguments, small=False) == "reference"
