"""Which samples make a batch: functions of the samples, the batch size, the seed and the epoch alone.

An order is one function and one line in `ORDERS`; `optim.batches` names it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from masm_detect.config import ConfigError
from masm_detect.data.sample import Sample

#: (samples, batch size, generator) -> indices of the samples of each batch of one epoch.
Order = Callable[[Sequence[Sample], int, np.random.Generator], list[list[int]]]


def epoch_batches(
    samples: Sequence[Sample], batch_size: int, seed: int, epoch: int, order: str = "random"
) -> list[list[int]]:
    """The batches of epoch `epoch` in their order, as indices into `samples`. Every epoch has the same number."""
    return ORDERS[order](samples, batch_size, np.random.default_rng([seed, epoch]))


def random_batches(samples: Sequence[Sample], batch_size: int, rng: np.random.Generator) -> list[list[int]]:
    """Every sample once, shuffled."""
    return _cut(rng.permutation(len(samples)).tolist(), batch_size)


def paired_batches(samples: Sequence[Sample], batch_size: int, rng: np.random.Generator) -> list[list[int]]:
    """Every sample once; a real sample and a fake of the same group are in one batch, as far as groups hold both.

    A batch of a pair shows the network the same scene twice, once forged, so that the scene does not explain the label.
    """
    if batch_size < 2:
        raise ConfigError(f"optim.batches=paired needs optim.batch_size of at least 2, got {batch_size}")
    groups: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for index, sample in enumerate(samples):
        groups[sample.group][sample.label].append(index)
    pairs: list[list[int]] = []
    singles: list[int] = []
    for members in groups.values():
        real, fake = (rng.permutation(part).tolist() for part in members)
        paired = min(len(real), len(fake))
        pairs += [list(pair) for pair in zip(real, fake)]
        singles += real[paired:] + fake[paired:]
    if not pairs:
        raise ConfigError(
            "optim.batches=paired needs real and fake samples of one group (a source and its forgery), and this data "
            "set has none: use random"
        )
    batches = _pack([pairs[i] for i in rng.permutation(len(pairs))], rng.permutation(singles).tolist(), batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


def alternating_batches(samples: Sequence[Sample], batch_size: int, rng: np.random.Generator) -> list[list[int]]:
    """Half of a batch is real, the other half of one forgery; the forgeries take turns.

    Every fake is there once. Real samples are shuffled again when all have been there.
    """
    real = [index for index, sample in enumerate(samples) if sample.label == 0]
    fakes: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        if sample.label == 1:
            fakes[sample.method].append(index)
    if not real or not fakes or batch_size < 2:
        raise ConfigError(
            "optim.batches=alternating needs real and fake samples and optim.batch_size of at least 2, got "
            f"{len(real)} real, {sum(map(len, fakes.values()))} fake, batch_size {batch_size}"
        )
    half = batch_size // 2
    queues = [_cut(rng.permutation(indices).tolist(), half) for _, indices in sorted(fakes.items())]
    turns = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
    out, rest = [], []
    for part in turns:
        while len(rest) < len(part):
            rest += rng.permutation(real).tolist()
        out.append(part + rest[: len(part)])
        rest = rest[len(part) :]
    return out


ORDERS: dict[str, Order] = {
    "random": random_batches,
    "paired": paired_batches,
    "alternating": alternating_batches,
}


def forgery_of(samples: Sequence[Sample], batch: Sequence[int]) -> str | None:
    """The one forgery of a batch; None if it holds several, or none."""
    found = {samples[index].method for index in batch if samples[index].label == 1}
    return found.pop() if len(found) == 1 else None


def _cut(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _pack(pairs: Sequence[list[int]], singles: Sequence[int], batch_size: int) -> list[list[int]]:
    """Pairs and singles in batches of at most `batch_size`, the pairs spread evenly over the batches. The number of
    batches depends on the numbers of pairs and singles only.
    """
    count = max(-(-len(pairs) // (batch_size // 2)), -(-(2 * len(pairs) + len(singles)) // batch_size))
    batches: list[list[int]] = [[] for _ in range(count)]
    for number, pair in enumerate(pairs):
        batches[number % count] += pair
    left = list(singles)
    for batch in batches:
        room = batch_size - len(batch)
        batch += left[:room]
        left = left[room:]
    return batches + _cut(left, batch_size)
