import torch

import masm_ext
from masm_ext.ops import subspace_linear
from masm_ext.ops.dispatch import IMPLEMENTATIONS

OPS = (
    *("subspace_linear", "subspace_linear_backward", "subspace_linear_group", "subspace_linear_group_backward"),
    *("subspace_penalty", "masked_adamw_", "update_masks_", "fold"),
)
KEY = {"cpu": "CPU", "cuda": "CUDA"}


def test_every_op_has_one_implementation_on_every_device():
    assert set(IMPLEMENTATIONS) == {(op, device) for op in OPS for device in KEY}
    for (op, device), (_, file) in IMPLEMENTATIONS.items():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"masm::{op}", KEY[device]), (op, device)
        assert file.endswith((".cpp", ".cu", ".py"))


def test_implementations_are_where_the_table_says(repo):
    for _, file in IMPLEMENTATIONS.values():
        assert (repo / file).is_file(), file
    dump = {op: torch._C._dispatch_dump(f"masm::{op}") for op in OPS}
    for op in OPS:
        # a Python implementation over a C++ one would be listed as a second, deactivated kernel
        assert "(inactive)" not in dump[op], dump[op]


def test_meta_is_served_by_the_fake_kernel():
    x = torch.randn(2, 3, device="meta")
    y = torch.ops.masm.fold(
        x, torch.randn(1, 2, device="meta"), torch.randn(1, device="meta"), torch.randn(1, 3, device="meta")
    )
    assert y.is_meta and y.shape == (2, 3)


def test_meta_through_the_public_function():
    x, weight = torch.randn(2, 3, device="meta"), torch.randn(5, 3, device="meta")
    u, s, v = torch.randn(1, 5, device="meta"), torch.randn(1, device="meta"), torch.randn(1, 3, device="meta")
    assert subspace_linear(x, weight, u, s, v).shape == (2, 5)


def test_nodes_of_a_graph_are_named_after_the_op():
    x, weight = torch.randn(2, 3), torch.randn(5, 3)
    y = subspace_linear(x, weight, torch.randn(1, 5), torch.randn(1, requires_grad=True), torch.randn(1, 3))
    assert "subspace_linear" in y.grad_fn.name()


def test_build_info_is_plain_json():
    import json

    info = masm_ext.build_info()
    assert json.loads(json.dumps(info)) == info
    assert set(info["ops"]) == {f"masm::{op}" for op in OPS}
    assert info["libraries"]["libmasm_cpu"] == "loaded"
