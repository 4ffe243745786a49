"""A long-lived set of samples in arrays: about 40 bytes a frame, where a list of `Sample` objects takes 400.

Runs and evaluations hold one for as long as they last, and every worker process has a copy of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

from masm_detect.data.sample import Sample

#: Words of a column up to this number are kept as strings, too: decoding them again for every sample takes longer.
_CACHED = 4096


class Samples(Sequence[Sample]):
    """An immutable sequence of samples. An index makes a `Sample`, a slice a list of them.

    Args:
        samples: the samples; an iterator need not hold them all at once.
    """

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self._labels = array("B")
        self._folders, self._names = _Words(), _Texts()
        self._datasets, self._methods, self._videos, self._splits, self._groups = (_Words() for _ in range(5))
        for sample in samples:
            self._labels.append(sample.label)
            end = sample.path.rfind("/") + 1
            self._folders.append(sample.path[:end])
            self._names.append(sample.path[end:])
            self._datasets.append(sample.dataset)
            self._methods.append(sample.method)
            self._videos.append(sample.video)
            self._splits.append(sample.split)
            self._groups.append("" if sample.group == sample.video else sample.group)
        for column in vars(self).values():
            if isinstance(column, (_Texts, _Words)):
                column.freeze()

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Samples:
        """`samples` itself if it is a `Samples` already, else a new one.

        Args:
            samples: any samples.
        """
        return samples if isinstance(samples, cls) else cls(samples)

    @property
    def labels(self) -> np.ndarray:
        """0 real, 1 fake; uint8 [n]."""
        return np.frombuffer(self._labels, np.uint8)

    def __len__(self) -> int:
        return len(self._labels)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._make(place) for place in range(*index.indices(len(self)))]
        return self._make(range(len(self))[index])  # negative indices; IndexError

    def __iter__(self) -> Iterator[Sample]:
        return map(self._make, range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Whether `other` is a sequence of equal samples."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} samples, {sum(self._labels)} fake)"

    def _make(self, place: int) -> Sample:
        return Sample(
            self._folders[place] + self._names[place],
            self._labels[place],
            self._datasets[place],
            self._methods[place],
            self._videos[place],
            self._splits[place],
            self._groups[place],
        )


class _Texts:
    """Strings in one buffer: UTF-8, with the surrogates of file names that are not."""

    def __init__(self) -> None:
        self._ends, self._buffer = array("Q", [0]), bytearray()

    def append(self, text: str) -> None:
        self._buffer += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._buffer))

    def freeze(self) -> None:
        """Give back the room for more."""
        self._ends, self._buffer = _smallest(self._ends, len(self._buffer)), bytes(self._buffer)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._buffer[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")


class _Words:
    """Strings with many repetitions. Each different string is stored once, and each place holds its number."""

    def __init__(self) -> None:
        self._known: dict[str, int] | None = {}
        self._codes = array("Q")

    def append(self, word: str) -> None:
        self._codes.append(self._known.setdefault(word, len(self._known)))

    def freeze(self) -> None:
        """Give back the table for more, and make the codes as small as their number allows."""
        self._words: list[str] | _Texts = list(self._known)
        self._known = None
        self._codes = _smallest(self._codes, len(self._words))
        if len(self._words) > _CACHED:
            texts = _Texts()
            for word in self._words:
                texts.append(word)
            texts.freeze()
            self._words = texts

    def __getitem__(self, index: int) -> str:
        return self._words[self._codes[index]]


def _smallest(numbers: array, largest: int) -> array:
    """The same numbers, none above `largest`, in the smallest unsigned type that holds them."""
    return array(next(code for code in "BHIQ" if largest < 1 << 8 * array(code).itemsize), numbers)
