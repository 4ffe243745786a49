"""Finds the query, key and value projections of a model and groups them."""

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

    Siblings under one parent become a group (:meth:`masm_ext.MASMLinear.group`) owned by their parent if they are
    MASMLinears of one shape with at most 256 directions together. For attentions that read one x only: if key and value
    read another input (cross-attention), each call would compute projections that are not used.

    Args:
        model: a converted model. Layers that are grouped already stay as they are.
        names: the names of sibling modules, one entry for each naming scheme.

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
