"""The choice among a kernel's tiles: kept on disk, shared between processes, not made where timing is impossible."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it has no build for this platform?)")

from triton.runtime.errors import OutOfResources

from masm_ext.kernels import tuning
from masm_ext.kernels.launch import Target, Tile

GPU = Target(90, 132, "NVIDIA H100 80GB HBM3")
TILES = (Tile(1, 1, 1, 1, 1), Tile(2, 2, 2, 2, 2))


@pytest.fixture
def timed(monkeypatch):
    """Stands in for a GPU whose fastest tile is the last; counts its calls."""
    asked = []
    monkeypatch.setattr(tuning, "measure", lambda key, tiles, launch: asked.append(tiles) or tiles[-1])
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


class Backward(torch.autograd.Function):
    """Calls `choose` in its backward pass."""

    @staticmethod
    def forward(ctx, x, call):
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.call(), None


def test_nothing_is_timed_in_a_backward_pass(timed, tmp_path):
    """Other ranks may be waiting for this one: a known choice or the first tile is used."""
    x = torch.ones(1, requires_grad=True)
    seen = []
    for _ in range(2):
        Backward.apply(x, lambda: seen.append(choose(tmp_path)) or 1.0).backward()
        assert len(timed) == len(seen) - 1
        assert choose(tmp_path) == TILES[1] and len(timed) == 1
    assert seen == [TILES[0], TILES[1]]


def test_a_plan_is_recorded_in_a_backward_pass(timed, tmp_path, monkeypatch):
    """Even if its tiles were never timed: a backward pass never times them."""
    rejected = []
    monkeypatch.setattr(tuning, "recording", lambda: SimpleNamespace(reject=lambda *_, **__: rejected.append(1)))
    Backward.apply(torch.ones(1, requires_grad=True), lambda: float(choose(tmp_path).BM)).backward()
    assert rejected == [] and choose(tmp_path) == TILES[1] and rejected == [1]


def test_deterministic_mode_takes_the_first_tile(timed, tmp_path):
    """In deterministic mode earlier times are ignored."""
    assert choose(tmp_path) == TILES[1]
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(tmp_path) == choose(tmp_path, "another key") == TILES[0] and len(timed) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert choose(tmp_path) == TILES[1]


def test_a_plan_belongs_to_a_mode():
    """What is recorded in deterministic mode is not replayed outside, nor the other way round."""
    from masm_ext.kernels import launch_plan

    def key():
        return launch_plan._key(choose, (torch.ones(2),), {})[0]

    before = key()
    torch.use_deterministic_algorithms(True)
    try:
        assert key() != before
    finally:
        torch.use_deterministic_algorithms(False)
    assert key() == before


def test_a_tile_that_does_not_run_is_left_out(monkeypatch):
    def bench(launch, **_):
        launch()
        return 1.0

    def launch(tile):
        if tile == TILES[0]:
            raise ValueError("PassManager::run failed")
        if tile == TILES[2]:
            raise OutOfResources(300_000, 232_448, "shared memory")

    TILES = (Tile(1, 1, 1, 1, 1), Tile(2, 2, 2, 2, 2), Tile(3, 3, 3, 3, 3))
    monkeypatch.setattr(tuning.triton.testing, "do_bench", bench)
    assert tuning.measure("gemm 16 1024", TILES, launch) == TILES[1]
    with pytest.raises(RuntimeError, match=r"none of 2 tiles of kernel 'gemm' runs here \(16 1024\).*PassManager") as e:
        tuning.measure("gemm 16 1024", (TILES[0], TILES[2]), launch)
    assert isinstance(e.value.__cause__, ValueError)
