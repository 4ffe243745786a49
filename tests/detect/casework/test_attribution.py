"""The occlusion map finds what a network looks at, and its test rejects a map that finds nothing."""

from __future__ import annotations

import numpy as np
import torch
from masm_detect.casework.attribution import GRID, PASSES, occlusion_map


class Corner(torch.nn.Module):
    """A network that sees the upper left quarter only; counts its passes."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(self, pixels):
        self.passes += len(pixels)
        half = pixels.shape[-1] // 2
        return pixels[..., :half, :half].mean((1, 2, 3)) * 10


def test_map_of_a_network_that_sees_one_corner(seed):
    torch.manual_seed(seed)
    network = Corner()
    found = occlusion_map(network, torch.rand(3, 56, 56) + 0.5, batch_size=7)
    assert found.values.shape == (GRID, GRID) and network.passes == PASSES
    assert (found.values[:4, :4] > 0).all()
    assert np.abs(found.values[4:]).max() == np.abs(found.values[:, 4:]).max() == 0
    assert found.better_than_random
    assert found.deletion < found.random_deletion and found.insertion > found.random_insertion


def test_sizes_that_squares_do_not_divide(seed):
    torch.manual_seed(seed)
    found = occlusion_map(Corner(), torch.rand(3, 30, 30))  # squares of 4: 8 a side, the last one of 2
    assert found.values.shape == (8, 8) and np.isfinite(found.values).all()


def test_a_network_that_sees_nothing_fails_the_test():
    found = occlusion_map(lambda pixels: torch.zeros(len(pixels)), torch.ones(3, 56, 56))
    assert not found.better_than_random and np.abs(found.values).max() == 0
