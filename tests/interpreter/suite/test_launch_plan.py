"""A call that was made before is replayed: other values at other addresses, and the results are right."""

import dataclasses
import weakref

import pytest
import torch
from inputs import POINTERS, TMA, check, draw
from torch.utils._python_dispatch import _disable_current_modes

from masm_ext.kernels import launch_plan
from masm_ext.kernels import subspace_linear as kernels

SHAPES = {"odd": (37, 33, 35, (3, 5)), "aligned": (70, 48, 64, (8, 8)), "wide": (33, 72, 40, (1, 2, 3, 4, 7))}


@pytest.fixture
def replayed(monkeypatch):
    """How many calls were replayed."""
    count = []
    replay = launch_plan.LaunchPlan.replay
    monkeypatch.setattr(launch_plan.LaunchPlan, "replay", lambda self, inputs: count.append(1) or replay(self, inputs))
    return count


def rehearse(make, replayed, *arguments, **options):
    """The third call and every later one is replayed; each has inputs of its own."""
    for i in range(4):
        check(make(), *arguments, **options)
        assert len(replayed) == 2 * max(0, i - 1)


@pytest.mark.parametrize("strategy", ["kext", "single", "addmm", "folded", "reference"])
@pytest.mark.parametrize(("shape", "target"), [("odd", POINTERS), ("aligned", TMA), ("wide", TMA)], ids=str)
def test_strategies(shape, strategy, target, replayed):
    rehearse(lambda: draw(*SHAPES[shape], torch.bfloat16), replayed, strategy, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_types(dtype, replayed):
    rehearse(lambda: draw(*SHAPES["odd"], dtype, factor_dtype=dtype), replayed, "kext")


@pytest.mark.parametrize("strategy", ["kext", "single", "addmm"])
@pytest.mark.parametrize("adjacent", [True, False], ids=["adjacent", "scattered"])
def test_groups(adjacent, strategy, replayed):
    def make():
        call = draw(*SHAPES["aligned"], torch.bfloat16, layers=3, masks=[[True, False], [True, True], [False, True]])
        if not adjacent:
            return call
        names = ("weight", "u", "s", "v", "bias", "mask")
        return dataclasses.replace(call, **{n: list(torch.stack(getattr(call, n)).unbind(0)) for n in names})

    rehearse(make, replayed, strategy, TMA)


@pytest.mark.parametrize("needs", [(True, False, False, False, False), (False, True, True, True, True)], ids=str)
@pytest.mark.parametrize("strategy", ["kext", "single"])
def test_some_gradients(strategy, needs, replayed):
    rehearse(lambda: draw(*SHAPES["odd"], torch.float32), replayed, strategy, needs=needs)


def test_masks_are_read_when_a_plan_is_replayed(replayed):
    for mask in ([True, True], [True, True], [True, False], [False, True]):
        check(draw(*SHAPES["odd"], torch.bfloat16, masks=[mask]), "kext")
    assert len(replayed) == 4


def test_strides_alignment_and_precision_are_calls_of_their_own(replayed):
    """What a plan depends on is in the key."""

    def moved(t):
        memory = torch.empty(t.numel() + 1, dtype=t.dtype)
        memory[1:] = t.flatten()
        return memory[1:].view(t.shape)

    def transposed(t):
        return t.mT.contiguous().mT if t.dim() == 2 else t

    def draw_one():
        return draw(*SHAPES["aligned"], torch.float32)

    for make in (draw_one, lambda: draw_one().map(moved), lambda: draw_one().map(transposed)):
        for _ in range(3):
            check(make(), "kext", TMA)
    assert len(replayed) == 6
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        check(draw_one(), "kext", TMA, precision="tf32")
        assert len(replayed) == 6
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def test_results_are_new_memory(replayed):
    call = draw(*SHAPES["odd"], torch.bfloat16)
    results = [call.forward("kext") for _ in range(4)]
    assert len({y[0].data_ptr() for y, _ in results}) == 4 and len({p.data_ptr() for _, p in results}) == 4
    assert all(torch.equal(y[0], results[0][0][0]) for y, _ in results) and len(replayed) == 2


def test_what_a_step_no_longer_needs_is_given_back():
    """Temporary memory of the plan is temporary in the plan."""
    call = draw(*SHAPES["odd"], torch.bfloat16)
    _, p = call.forward("kext")
    for _ in range(2):
        call.backward(p, "kext")
    [recorded] = [t for t in launch_plan._plans.values() if isinstance(t, launch_plan.LaunchPlan)]
    released = [slot for step in recorded._steps if isinstance(step, launch_plan.Release) for slot in step.slots]
    allocated = {step.slot for step in recorded._steps if isinstance(step, launch_plan.Allocate)}
    returned = {ref.slot for ref in recorded._outputs if isinstance(ref, launch_plan.Ref)}
    assert len(released) == len(set(released)) and set(released) == allocated - returned and released
    last = {}
    for i, step in enumerate(recorded._steps):
        if isinstance(step, launch_plan.Release):
            assert all(last[slot] == i - 1 for slot in step.slots)  # at once
        else:
            last |= dict.fromkeys(step.uses, i)


def test_arguments_that_share_elements_are_never_recorded(replayed):
    def shared():
        call = draw(24, 32, 32, (4,), torch.bfloat16)
        return dataclasses.replace(call, dy=[call.x])

    for i in range(4):
        check(shared(), "kext")
        assert len(replayed) == max(0, i - 1)  # the forward pass only


def test_arguments_that_lie_interleaved_are_told_apart(replayed):
    """Columns of one matrix, as the gradients of what was concatenated: their memory overlaps, no element is shared."""

    def make():
        call = draw(*SHAPES["aligned"], torch.bfloat16, layers=3)
        return dataclasses.replace(call, dy=list(torch.cat(call.dy, -1).chunk(3, -1)))

    rehearse(make, replayed, "kext", TMA)


def test_which_elements_a_tensor_has():
    matrix = torch.arange(48.0).view(4, 12)
    for t in (matrix, matrix[:, 3:7], matrix[1::2, ::3], matrix.mT, matrix[:2].expand(3, 2, 12), matrix[2:3]):
        inside = {int(value - t.flatten()[0]) * 4 for value in t.flatten()}
        assert {offset for offset in range(200) if launch_plan._is_element(t, offset)} == inside


def test_another_device_is_another_call(replayed):
    """What was checked when the call was planned is not checked when it is replayed."""
    call = draw(*SHAPES["odd"], torch.bfloat16, masks=[[True, True]])
    for _ in range(3):
        _, p = call.forward("kext")
        call.backward(p, "kext")
    assert len(replayed) == 2
    for name, message in (("s", "must be on one device"), ("mask", "mask is on meta, weight on cpu")):
        elsewhere = dataclasses.replace(call, **{name: [t.to("meta") for t in getattr(call, name)]})
        with pytest.raises(RuntimeError, match=message):
            elsewhere.forward("kext")
        with pytest.raises(RuntimeError, match=message):
            elsewhere.backward(p, "kext")
    assert len(replayed) == 2


def test_arguments_by_name(replayed):
    @launch_plan.repeated
    def plus(x, by=None, to=None):
        return (x + (by if to is None else to),)

    for name in ("by", "to"):
        for _ in range(4):
            x, y = torch.randn(3), torch.randn(3)
            alive = weakref.ref(y)
            assert torch.equal(plus(x, **{name: y})[0], x + y)
        del x, y
        assert alive() is None
    assert len(replayed) == 4


def test_a_call_that_reads_values_is_never_recorded(replayed, monkeypatch):
    chosen = []
    original = kernels._choose

    def reads(x, *arguments, **options):
        chosen.append(float(x.sum()))
        return original(x, *arguments, **options)

    monkeypatch.setattr(kernels, "_choose", reads)
    call = draw(*SHAPES["odd"], torch.bfloat16)
    for _ in range(4):
        call.forward("")
    assert len(chosen) == 4 and not replayed


def test_what_something_else_writes_is_never_recorded(replayed, monkeypatch):
    """A kernel that neither the launch code nor torch starts is in no plan: its output would stay unwritten."""
    original = kernels.forward_product

    def unseen(*arguments):
        ys, p = original(*arguments)
        written = [y.new_empty(y.shape) for y in ys]
        with _disable_current_modes():
            for y, out in zip(ys, written):
                out.copy_(y)
        return written, p

    monkeypatch.setattr(kernels, "forward_product", unseen)
    for _ in range(4):
        check(draw(*SHAPES["odd"], torch.bfloat16), "kext")
    assert len(replayed) == 2  # the backward passes


def test_what_depends_on_values_is_never_recorded(replayed):
    @launch_plan.repeated
    def chosen(x, mask):
        return (x[mask].sum(0),)

    x = torch.randn(5, 2)
    for n in (1, 3, 5, 2, 0):
        mask = torch.arange(5) < n
        torch.testing.assert_close(chosen(x, mask)[0], x[:n].sum(0))
    assert not replayed


def test_memory_that_something_else_wrote_and_a_step_reads(replayed):
    @launch_plan.repeated
    def through(x):
        between = torch.empty_like(x)
        with _disable_current_modes():
            between.copy_(x)
        return (between + 1,)

    for _ in range(4):
        x = torch.randn(7)
        assert torch.equal(through(x)[0], x + 1)
    assert not replayed


def test_an_error_while_recording_is_raised_and_forgotten(replayed, monkeypatch):
    call = draw(*SHAPES["odd"], torch.bfloat16)
    call.forward("kext")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(kernels, "forward_product", lambda *a: 1 / 0)
        call.forward("kext")
    for _ in range(2):
        call.forward("kext")
    assert len(replayed) == 1
    with pytest.raises(RuntimeError, match="offsets that rise"):
        dataclasses.replace(call, offsets=[0, 2]).forward("kext")


def test_tiles_that_are_still_to_be_chosen_are_not_recorded(replayed, monkeypatch):
    from masm_ext.kernels import tuning

    torch.use_deterministic_algorithms(False)  # in which nothing is timed
    measured = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: len(measured) < 2)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_write", lambda *a: None)
    monkeypatch.setattr(tuning, "measure", lambda key, tiles, launch: measured.append(launch(tiles[1])) or tiles[1])
    call = draw(*SHAPES["aligned"], torch.bfloat16)
    call.forward("kext", TMA, None)  # in a graph that is being captured: the first tile
    call.forward("kext", TMA, None)
    assert not measured and not replayed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    call.forward("kext", TMA, None)  # measured now
    assert measured
    call.forward("kext", TMA, None)  # recorded
    assert not replayed
    call.forward("kext", TMA, None)
    assert len(replayed) == 1
    tuning.set_enabled(True)
    call.forward("kext", TMA, None)
    assert len(replayed) == 1


def test_the_number_of_plans_is_bounded(monkeypatch):
    monkeypatch.setattr(launch_plan, "MOST", 3)
    for M in range(1, 9):
        draw(M, 8, 8, (2,), torch.bfloat16).forward("reference")
    assert len(launch_plan._plans) <= 3
