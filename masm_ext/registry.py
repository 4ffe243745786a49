"""Named choices of the method: one function and one ``register`` line add one.

A registry maps a name to what a config may select by it. Adding one from outside the package works the same way::

    from masm_ext.registry import MASK_POLICIES

    @MASK_POLICIES.register("above_median")
    def above_median(snr, current, config, step):
        return (snr >= snr.median(0).values).float()

    MASMConfig(mask_policy="above_median")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Entries by name, in the order in which they were registered.

    Args:
        kind: what an entry is, for messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that enters a function under ``name``, an identifier. Raises ValueError if it is taken."""
        if not name.isidentifier():
            raise ValueError(f"the name of a {self.kind} must be an identifier, got {name!r}")
        if name in self._entries:
            raise ValueError(f"a {self.kind} {name!r} is registered already")

        def enter(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise ValueError(f"there is no {self.kind} {name!r}; there are {', '.join(self._entries)}")
        return self._entries[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The entry called ``name``, or ``default``."""
        return self._entries.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


#: (q, digest) -> all q singular directions (0 = largest sigma) in the order in which a layer takes them as artifact
#: directions: the first R of them. ``digest``: the hash of the weight. None in place of a function: the directions are
#: not those of the weight, but of its gradient. Entries: masm_ext/decomposition.py.
DIRECTIONS: Registry[Callable[[int, str], Sequence[int]] | None] = Registry("choice of directions")

#: ranks (r_1, ..., r_K) -> for each subspace its places among the R artifact directions (0 = largest sigma). Entries:
#: masm_ext/decomposition.py.
PARTITIONS: Registry[Callable[[Sequence[int]], list[list[int]]]] = Registry("partition")

#: (snr [L, K], current mask [L, K], config, step) -> mask [L, K] with values in [0, 1]; None in place of a function:
#: the masks stay as they are. Entries: masm_ext/masks/policies.py.
MASK_POLICIES: Registry[Callable[[Tensor, Tensor, Any, int], Tensor] | None] = Registry("mask policy")

#: A MASMLinear -> its penalty, a scalar that flows gradients into u, s or v. Entries: masm_ext/losses.py.
PENALTIES: Registry[Callable[[Any], Tensor]] = Registry("penalty")
