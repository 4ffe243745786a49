"""The emulation itself: correct kernels give correct results in every order, and each kind of mistake is detected."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulated import FLAGS, call

#: As emulate.cpp numbers them.
NONE, NO_BARRIER, ONE_THREAD_WAITS, LANE_ENDED, PAST_SHARED, PAST_GLOBAL, UNWRITTEN_SHARED, NO_GRID_BARRIER = range(8)
NOT_COOPERATIVE, ENDED_BEFORE_THE_GRID_BARRIER, SCRATCH_USED_AGAIN = range(8, 11)


def row_sums(emulated, x, seed, fault=NONE, threads=96):
    out = torch.full((len(x),), torch.nan)
    call(emulated("emulate").row_sum_of, x, out, *x.shape, threads, fault, seed)
    return out


def test_right_kernels_are_right_in_every_order(emulated):
    x = torch.randint(-9, 10, (3, 333)).float()
    for seed in range(30):
        assert torch.equal(row_sums(emulated, x, seed), x.sum(1))
        out = torch.full((5,), torch.nan)
        call(emulated("emulate").grid_sum_of, torch.full((5,), torch.nan), out, 5, NONE, seed)
        assert out.tolist() == [15] * 5
        out = torch.full((2, 96), torch.nan)
        call(emulated("emulate").two_sums_of, out, 2, 96, NONE, seed)
        assert (out == 306).all()


def test_a_missing_barrier_is_seen(emulated):
    x = torch.ones(20, 96)
    assert not torch.equal(row_sums(emulated, x, 0, NO_BARRIER), x.sum(1))
    out = torch.full((5,), torch.nan)
    call(emulated("emulate").grid_sum_of, torch.full((5,), torch.nan), out, 5, NO_GRID_BARRIER, 0)
    assert out.tolist() != [15] * 5


def test_a_warp_that_runs_ahead_is_seen(emulated):
    """It writes what slower warps have yet to read: the barrier between two uses of the same memory is missing."""
    out = torch.full((4, 96), torch.nan)
    call(emulated("emulate").two_sums_of, out, 4, 96, SCRATCH_USED_AGAIN, 0)
    assert not (out == 306).all()


@pytest.mark.parametrize(
    "fault,message",
    [(NOT_COOPERATIVE, "not cooperative"), (ENDED_BEFORE_THE_GRID_BARRIER, "at a grid barrier, another has ended")],
)
def test_a_grid_barrier_that_cannot_open_is_an_error(fault, message, emulated):
    with pytest.raises(RuntimeError, match=message):
        call(emulated("emulate").grid_sum_of, torch.zeros(5), torch.zeros(5), 5, fault, 0)


def test_unwritten_shared_memory_is_nan(emulated):
    assert row_sums(emulated, torch.ones(2, 96), 0, UNWRITTEN_SHARED).isnan().all()


@pytest.mark.parametrize(
    "fault,message", [(ONE_THREAD_WAITS, "different barriers"), (LANE_ENDED, "lane that has ended")]
)
def test_threads_that_do_not_meet_are_an_error(fault, message, emulated):
    with pytest.raises(RuntimeError, match=message):
        row_sums(emulated, torch.ones(2, 96), 0, fault)


@pytest.mark.skipif(not FLAGS, reason="the sanitized run (test_sanitized.py) does this")
@pytest.mark.parametrize("fault", [PAST_SHARED, PAST_GLOBAL])
def test_the_sanitizer_sees_accesses_past_the_end(fault, emulated):
    """In a process of its own: it ends there."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from emulated import build, call; "
        "import tempfile, torch; from pathlib import Path; folder = tempfile.TemporaryDirectory(); "
        "f = build('emulate', Path(folder.name)).row_sum_of; x = torch.ones(2, 96); out = torch.zeros(2); "
        "call(f, x, out, 2, 96, 96, 0, 0); print('right', out.tolist(), flush=True); "
        f"call(f, x, out, 2, 96, 96, {fault}, 0); print('not seen')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert "right [96.0, 96.0]" in run.stdout and "not seen" not in run.stdout
    assert run.returncode != 0 and "heap-buffer-overflow" in run.stderr, run.stderr[-2000:]


def test_half_precision_is_rounded_as_torch_does(emulated):
    x = torch.cat(
        [torch.randn(2000), 1e-7 * torch.randn(500), 1e5 * torch.randn(500), torch.tensor([0.0, -0.0, torch.inf])]
    )
    x = torch.cat([x, (torch.randint(0, 2**15, (2000,)) * 2**16 + 2**15).int().view(torch.float32)])  # ties
    x = x[x.isfinite() | x.isinf()]
    bf16, fp16 = torch.empty_like(x), torch.empty_like(x)
    call(emulated("emulate").rounded, x, bf16, fp16, len(x))
    assert torch.equal(bf16, x.bfloat16().float()) and torch.equal(fp16, x.half().float())
