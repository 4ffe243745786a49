"""What one step over a set of parameters needs, kept for the next step over the same set."""

from __future__ import annotations

import math
from collections.abc import Collection
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..losses import penalty_parameters
from .blocks import PIECE, Blocks


class StepPlan:
    """States, groups and segments of the parameters with gradients, computed by the last step over the same ones."""

    def __init__(
        self, params: list[Tensor], state: dict[Tensor, Any], groups: list[dict[str, Any]], blocks: Blocks
    ) -> None:
        self.device = params[0].device
        self.params = params
        self.state = state
        self.states = [state[p] for p in params]
        self.all_states = list(state.values())
        self.grouped = [list(g["params"]) for g in groups]
        group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
        self.group_of = [group_of[p] for p in params]
        self.groups = torch.tensor(self.group_of, device=self.device)  # [T]
        self.nothing = torch.empty(0, device=self.device)  # the penalty of a parameter without one
        ids = {id(p) for p in params}
        layers = [] if blocks.masks is None else blocks.masks.layers.values()
        #: layers that own one of the parameters: they have penalties
        self.layers = [x for x in layers if not ids.isdisjoint((id(x.u), id(x.s), id(x.v)))]
        lists = penalty_parameters(self.layers)
        self.lengths = [[p.numel() for p in own] for own in lists]
        places = {id(p): (dtype, i) for dtype, own in enumerate(lists) for i, p in enumerate(own)}
        #: place of the gradient of each parameter's penalties: (dtype of the factors, piece), or None
        self.places = [places.get(id(p)) for p in params]
        segments = blocks.segments(params, PIECE if self.device.type == "cuda" else None)
        self.segments = segments.to(self.device)  # [S, 4]
        self.codes = torch.tensor([1.0, 2.0], device=self.device)  # nonzero values of `found`
        shape = (0, 0) if blocks.masks is None else tuple(blocks.masks.masks.shape)
        self.unmasked = torch.ones(blocks.count - math.prod(shape), device=self.device)
        owned = torch.zeros(blocks.count, dtype=torch.bool)
        owned[segments[:, 3]] = True
        #: bool [L, K]: blocks that own a part of one of the parameters
        self.owned = owned[: math.prod(shape)].view(shape).to(self.device)

    def fits(self, params: list[Tensor], state: dict[Tensor, Any], groups: list[dict[str, Any]]) -> bool:
        # by identity: a look-up by parameter would hash tensors in Python
        return (
            _same(params, self.params)
            and state is self.state
            and _same(state.values(), self.all_states)
            and params[0].device == self.device
            and len(groups) == len(self.grouped)
            and all(_same(g["params"], own) for g, own in zip(groups, self.grouped))
        )


def _same(a: Collection[Any], b: Collection[Any]) -> bool:
    """The same objects in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))
