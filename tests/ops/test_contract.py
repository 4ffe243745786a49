"""One contract per op: a mistake in an argument gives the same error from the kernel, the formula, the fake (meta
tensors, FakeTensorMode), torch.compile and torch.export."""

import re

import pytest
import torch
from op_calls import OFFSETS, OPS, J, K, L, M, N, R, formula, kernel, penalty
from torch._subclasses.fake_tensor import FakeTensorMode

from masm_ext.ops import subspace_penalty

KINDS = {
    "device": lambda t: t.to("meta"),
    "dtype": lambda t: t.to({torch.float32: torch.float64, torch.bool: torch.uint8}.get(t.dtype, torch.float32)),
    "shape": lambda t: t.new_ones(*t.shape[:-1], t.shape[-1] + 1),
    "missing dimension": lambda t: t[0].clone(),
}
#: no mistakes: x may be one row [D]; a scalar has one element, too
FINE = {
    ("subspace_linear", "x", "missing dimension"),
    ("subspace_linear_group", "x", "missing dimension"),
    ("subspace_penalty", "weight_norm2", "missing dimension"),
}


def tensor_arguments(op):
    return [name for name, value in OPS[op]().items() if torch.is_tensor(value) or torch.is_tensor(first(value))]


def first(value):
    return value[0] if isinstance(value, list) and value else value


CASES = [(op, name) for op in OPS for name in tensor_arguments(op)]


def spoil(op, name, kind):
    """The arguments of `op` with a mistake in `name` (in the last tensor of a list)."""
    args = OPS[op]()
    if isinstance(args[name], list):
        args[name][-1] = KINDS[kind](args[name][-1])
    else:
        args[name] = KINDS[kind](args[name])
    return args


def error_of(call):
    """The message of masm, without the text that torch adds."""
    with pytest.raises(Exception) as caught:
        call()
    found = re.search(r"masm::[^\n'\"]*", str(caught.value))
    assert found, repr(caught.value)
    return found.group()


def in_fake_mode(op, args):
    with FakeTensorMode() as mode:
        fake = [
            [mode.from_tensor(t) if torch.is_tensor(t) else t for t in value]
            if isinstance(value, list)
            else mode.from_tensor(value)
            if torch.is_tensor(value)
            else value
            for value in args.values()
        ]
        return kernel(op)(*fake)


@pytest.mark.parametrize("op", OPS)
def test_good_arguments_pass_everywhere(op):
    kernel(op)(*OPS[op]().values())
    formula(op)(*OPS[op]().values())
    in_fake_mode(op, OPS[op]())
    meta = {
        name: [t.to("meta") for t in value]
        if torch.is_tensor(first(value))
        and isinstance(value, list)
        else value.to("meta")
        if torch.is_tensor(value)
        else value
        for name, value in OPS[op]().items()
    }  # fmt: skip
    kernel(op)(*meta.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("op", "name"), CASES)
def test_the_kernel_the_formula_and_the_fake_agree(op, name, kind):
    if (op, name, kind) in FINE:
        return
    want = error_of(lambda: in_fake_mode(op, spoil(op, name, kind)))
    assert want.startswith(f"masm::{op}: ") and ("got" in want or "one device" in want)
    assert error_of(lambda: kernel(op)(*spoil(op, name, kind).values())) == want
    assert error_of(lambda: formula(op)(*spoil(op, name, kind).values())) == want


@pytest.mark.parametrize(("op", "name"), CASES)
def test_compile_and_export_give_the_same_error(op, name):
    """For the mistakes that the tracers do not refuse before they call the op."""
    for kind in ("shape", "device") if name in ("u", "v", "grads", "stats") else ("shape",):
        args = list(spoil(op, name, kind).values())
        want = error_of(lambda args=args: kernel(op)(*args))

        class Call(torch.nn.Module):
            def forward(self, *args):
                return kernel(op)(*args)

        torch._dynamo.reset()
        compiled = torch.compile(Call(), backend="eager", fullgraph=True)
        assert error_of(lambda args=args, compiled=compiled: compiled(*args)) == want
        assert error_of(lambda args=args: torch.export.export(Call(), tuple(args))) == want


@pytest.mark.parametrize("op", ["masked_adamw_", "update_masks_"])
def test_operands_must_be_contiguous(op):
    for name in tensor_arguments(op):
        args = OPS[op]()
        t = args[name][0] if isinstance(args[name], list) else args[name]
        if t.dim() < 2:
            continue
        odd = t.mT.contiguous().mT
        if isinstance(args[name], list):
            args[name][0] = odd
        else:
            args[name] = odd
        want = error_of(lambda args=args: in_fake_mode(op, args))
        assert "must be contiguous, got strides" in want
        assert error_of(lambda args=args: kernel(op)(*args.values())) == want


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        *(
            (op, {"offsets": bad}, "expected K + 1 offsets that rise from 0 to R = 3")
            for op in list(OPS)[:4]
            for bad in ([0, 2], [1, 3], [0, 2, 1, 3], [0], [0, 2, 4])
        ),
        ("subspace_linear", {"offsets": [0, 3]}, "expected mask of shape [1], got [2]"),
        ("subspace_linear_group", {"u": []}, "expected 2 tensors in u, one a layer, got 0"),
        ("subspace_linear_group", {"bias": [torch.ones(N)]}, "expected 2 tensors in bias, one a layer, got 1"),
        ("subspace_linear_group_backward", {"dy": [torch.ones(M, N)]}, "expected 2 tensors in dy, one a layer, got 1"),
        ("subspace_penalty", {"s0": [torch.ones(R)]}, "expected 2 entries in s0, one a layer, got 1"),
        ("subspace_penalty", {"offsets": [0, 2, 3, 0, 3]}, "expected K + 1 offsets for each of the subspaces [2, 2]"),
        ("subspace_penalty", {"subspaces": [0, 4]}, "expected K + 1 offsets for each of the subspaces [0, 4]"),
        ("subspace_penalty", {"offsets": [0, 2, 3, 0, 3, 2]}, "layer 1: expected K + 1 offsets that rise from 0 to R"),
        ("masked_adamw_", {"grads": [torch.ones(4, 3)]}, "expected 2 tensors in grads, one a parameter, got 1"),
        ("masked_adamw_", {"penalties": [torch.ones(0)]}, "expected 2 tensors in penalties, one a parameter, got 1"),
        ("masked_adamw_", {"found_inf": torch.ones(0)}, "expected found_inf of shape [1], got [0]"),
        ("update_masks_", {"stats": torch.zeros(5, 2).double()}, "expected stats of L * K = 6 rows or more, got 5"),
        (
            "update_masks_",
            {"history": torch.zeros(0, L, K, 4).double(), "history_steps": torch.zeros(0).long()},
            "expected history of one row or more, got none",
        ),
        ("update_masks_", {"interval": 0}, "expected an interval of 1 or more, got 0"),
        ("update_masks_", {"keep": 4}, "expected keep and least between 0 and L = 3, got 4 and 1"),
        ("update_masks_", {"least": -1}, "expected keep and least between 0 and L = 3, got 2 and -1"),
    ],
)
def test_lists_and_numbers(op, change, message):
    args = OPS[op]() | change
    want = error_of(lambda: in_fake_mode(op, args))
    assert message in want
    assert error_of(lambda: kernel(op)(*args.values())) == want
    assert error_of(lambda: formula(op)(*args.values())) == want


def test_losses_have_a_meta_result():
    args = {name: [t.to("meta") for t in value] for name, value in penalty().items() if torch.is_tensor(first(value))}
    for loss in subspace_penalty(*args.values(), [OFFSETS] * J):
        assert loss.shape == () and loss.is_meta
