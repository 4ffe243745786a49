"""Groups the query, key and value projections of a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..ops.strategies import MAX_RANK
from .masm_linear import MASMLinear

#: Sibling modules that are the projections of one attention, by the names that libraries give them.
PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)


def group_projections(model: nn.Module, names: Sequence[Sequence[str]] = PROJECTIONS) -> int:
    """Group the query, key and value projections of every self-attention of a converted model.

    Layers with sibling names form a group (:meth:`masm_ext.MASMLinear.group`) if they are MASMLinears of the same shape
    with at most 256 directions in total; the owner is their parent module. Use it only for self-attention, where the
    three layers read one x: in cross-attention, where key and value read another input, each call would also compute
    outputs that are not used.

    Args:
        model: a converted model. Layers that are already grouped are left alone.
        names: the names of sibling modules, one tuple per naming scheme.

    Returns:
        The number of new groups.
    """
    count = 0
    for parent in model.modules():
        for siblings in names:
            layers = [getattr(parent, name, None) for name in siblings]
            if not all(isinstance(m, MASMLinear) and m.layer_group is None for m in layers):
                continue
            same = len({(m.principal.shape, m.offsets) for m in layers}) == 1
            if same and len(layers) * layers[0].offsets[-1] <= MAX_RANK:
                MASMLinear.group(layers, parent)
                count += 1
    return count
