"""Where in an image the score comes from, by occlusion, and a test of that map.

Squares of the input are covered, one at a time, and the change of the logit is noted (Zeiler and Fergus, ECCV 2014; the
implementation is captum's). Deletion and insertion (Petsiuk et al., BMVC 2018) test the map: squares are covered, or
uncovered, in the order of the map; the logit must change faster than in a random order. A map shows what the network
reacts to. It is no proof that something was forged there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from captum.attr import Occlusion
from torch import Tensor, nn

#: Squares per side of an image.
GRID = 8
#: Random orders that the map is compared with, and steps in which an image is covered or uncovered.
_ORDERS, _STEPS = 4, 8
#: Passes of the network for a map and its test.
PASSES = GRID**2 + 1 + 2 * (_ORDERS + 1) * (_STEPS + 1)


@dataclass(frozen=True)
class OcclusionMap:
    """The map of one image.

    Attributes:
        values: change of the logit when a square is covered, positive where it speaks for fake, [GRID, GRID]
        deletion: mean logit while squares are covered, largest values first; a good map gives a low one
        insertion: mean logit while squares are uncovered in the same order; a good map gives a high one
        random_deletion, random_insertion: the same in random orders, mean
        better_than_random: whether both beat every one of the random orders
    """

    values: np.ndarray
    deletion: float
    insertion: float
    random_deletion: float
    random_insertion: float
    better_than_random: bool


def occlusion_map(detector: nn.Module, pixels: Tensor, batch_size: int = 32, seed: int = 0) -> OcclusionMap:
    """The map of one image.

    Args:
        detector: pixels [B, 3, H, W] -> logits [B], in eval mode.
        pixels: float32 [3, H, W], as the network takes it, on the detector's device; covered squares become 0, which is
            the mean colour.
        batch_size: images in a batch.
        seed: of the random orders.
    """
    pixels = pixels[None]
    side = -(-pixels.shape[-1] // GRID)  # rounded up: squares cover the whole image
    with torch.inference_mode():
        change = Occlusion(detector).attribute(
            pixels,
            sliding_window_shapes=(3, side, side),
            strides=(3, side, side),
            baselines=0,
            perturbations_per_eval=batch_size,
        )
        squares = _squares(pixels.shape[-1], side, pixels.device)  # [G, H, W]
        values = torch.stack([change[0, 0][square].mean() for square in squares])
        order = values.argsort(descending=True)
        random = np.random.default_rng(seed)
        orders = [order, *(torch.from_numpy(random.permutation(len(squares))) for _ in range(_ORDERS))]
        deletion = [_mean_logit(detector, pixels, squares[o], batch_size, covered_first=False) for o in orders]
        insertion = [_mean_logit(detector, pixels, squares[o], batch_size, covered_first=True) for o in orders]
    per_side = round(len(squares) ** 0.5)
    return OcclusionMap(
        values=values.reshape(per_side, per_side).float().cpu().numpy(),
        deletion=deletion[0],
        insertion=insertion[0],
        random_deletion=float(np.mean(deletion[1:])),
        random_insertion=float(np.mean(insertion[1:])),
        better_than_random=deletion[0] < min(deletion[1:]) and insertion[0] > max(insertion[1:]),
    )


def _squares(size: int, side: int, device: torch.device) -> Tensor:
    """One mask for each square, bool [G, size, size], in rows."""
    place = torch.arange(size, device=device) // side
    number = place[:, None] * (int(place[-1]) + 1) + place[None, :]
    return number[None] == torch.arange(int(number.max()) + 1, device=device)[:, None, None]


def _mean_logit(detector: nn.Module, pixels: Tensor, squares: Tensor, batch_size: int, covered_first: bool) -> float:
    """Mean logit over `_STEPS` + 1 images, in which none, a part, and all of the squares are covered (or uncovered, if
    all are covered at first).
    """
    first = torch.cat([torch.zeros_like(squares[:1]), squares]).cumsum(0) > 0  # [G + 1, H, W]
    first = first[torch.linspace(0, len(squares), _STEPS + 1).round().long()]
    shown = first if covered_first else ~first
    images = pixels * shown[:, None]
    return float(torch.cat([detector(part) for part in images.split(batch_size)]).float().mean())
