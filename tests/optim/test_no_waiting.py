"""A step on CUDA must not wait for the device. Tested without one: fake tensors on "cuda", under a mode that raises for
every operation that would wait."""

from contextlib import contextmanager

import pytest
import torch
from mask_states import fresh, policy_of, step
from no_waiting import NoWaiting, Waits
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from masm_ext import LayerMasks, MaskedAdamW, MASMConfig, MASMLinear, reference
from masm_ext.decomposition import Decomposition
from masm_ext.optim import masked_adamw

aten = torch.ops.aten


def build(device, **fields):
    layers = nn.ModuleList()
    for _ in range(3):
        u, s, v = (torch.ones(*shape, device=device) for shape in ((3, 8), (3,), (3, 8)))
        layers.append(MASMLinear(Decomposition(torch.ones(8, 8, device=device), u, s, v, (0, 1, 2, 3), 0.0)))
    masks = LayerMasks(layers, MASMConfig(num_subspaces=3, subspace_rank=1, mask_warmup=0, mask_interval=1, **fields))
    groups = [{"params": layers.parameters()}, {"params": [nn.Parameter(torch.ones(9, device=device))], "lr": 1e-2}]
    return groups, masks


@contextmanager
def warm(**options):
    """An optimizer on "cuda" after its first step, and the mode that its next steps must pass."""
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        # The methods check for a real device before they call the op.
        patch.setattr(
            torch.Tensor, "copy_", lambda to, source, non_blocking=False: aten.copy_(to, source, non_blocking)
        )
        groups, masks = build("cuda")
        optimizer = MaskedAdamW(groups, masks=masks, **options)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        with NoWaiting(warming_up=True):
            optimizer.step()
        with NoWaiting() as watch:
            yield optimizer, watch


def test_a_step_waits_for_nothing():
    with warm() as (optimizer, watch):
        held = [layer.mask for layer in optimizer.masks.layers.values()]
        versions = [mask._version for mask in held]
        for _ in range(3):
            optimizer.step()
        assert watch.uploads == 0
        # a graph of an earlier forward pass stays valid: detecting a changed mask would mean waiting
        assert all(layer.mask is mask for layer, mask in zip(optimizer.masks.layers.values(), held))
        assert [mask._version for mask in held] == versions
        assert all(t.device.type == "cuda" for t in (optimizer.masks.masks, optimizer._steps, optimizer._outcomes))


def test_decoupled_penalties_wait_for_nothing():
    with warm(orthogonality=1e-2, spectral_consistency=1e-3) as (optimizer, watch):
        for _ in range(2):
            optimizer.step()
        assert watch.uploads == 0 and [t.shape for t in optimizer.penalties] == [(), ()]


def test_new_rates_go_up_without_waiting_and_once():
    with warm() as (optimizer, watch):
        for rate, uploads in ((1e-4, 1), (1e-4, 1), (1e-5, 2)):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            assert watch.uploads == uploads


def test_a_rate_that_changed_is_not_captured(monkeypatch):
    """A replay would put back the value that was captured."""
    with warm() as (optimizer, _):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 1e-4
        with pytest.raises(RuntimeError, match="take one step before the capture"):
            optimizer.step()


def test_zero_after_a_rate_on_the_device_is_uploaded():
    with warm() as (optimizer, watch):
        for rate, uploads in ((torch.zeros((), device="cuda"), 1), (0.0, 2)):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            assert watch.uploads == uploads


def test_a_rate_that_lies_on_the_device_stays_there():
    with warm() as (optimizer, watch):
        optimizer.param_groups[0]["lr"] = torch.zeros((), device="cuda")
        for _ in range(3):
            optimizer.step()
        assert watch.uploads == 1  # the table of rates, now without this one


def test_a_scaler_is_used_where_it_lies():
    with warm() as (optimizer, watch):
        optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
        optimizer.step()
        assert watch.uploads == 0


@pytest.mark.parametrize(
    "inserted",
    [
        lambda stats, found: found.item(),
        lambda stats, found: bool(found),
        lambda stats, found: stats.cpu(),
        lambda stats, found: stats.sum().tolist(),
        lambda stats, found: torch.zeros(1).to(found.device),
        lambda stats, found: torch.equal(found, found),
        lambda stats, found: aten.nonzero(stats),
        lambda stats, found: torch.ones(2, dtype=torch.float64).to(stats.device, non_blocking=True),  # not pinned
    ],
    ids=["item", "bool", "cpu", "tolist", "to", "equal", "nonzero", "unpinned"],
)
def test_this_test_sees_waiting(inserted, monkeypatch):
    op = masked_adamw.masked_adamw_

    def waiting(*arguments):
        stats, found = op(*arguments)
        inserted(stats, found)
        return stats, found

    with warm() as (optimizer, _):
        monkeypatch.setattr(masked_adamw, "masked_adamw_", waiting)
        with pytest.raises(Waits):
            optimizer.step()


def test_a_callable_policy_waits():
    """The host must know whether a selection is due (LayerMasks)."""
    with warm() as (optimizer, _):
        optimizer.masks.policy = lambda snr, step, current: current
        with pytest.raises(Waits):
            optimizer.step()


def test_the_formula_of_the_masks_waits_for_nothing():
    """Triton implements the op on CUDA without the CUDA library."""
    state, arguments = fresh(5, 2), step(5, 2, torch.Generator().manual_seed(0))
    for name in ("best layers", "threshold", "no selection"):
        with NoWaiting():
            reference.update_masks_(*state, *arguments, 0.9, *policy_of(name, 5))
