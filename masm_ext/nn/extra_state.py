"""What the ``state_dict`` of a MASMLinear holds beside its tensors: where its factors come from."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

#: Number of elements: hexadecimal digits of the five fields.
LENGTHS = (64, 16, 16, 16, 16)


class ExtraState(NamedTuple):
    """Identity of the factors of a layer.

    Attributes:
        base_hash: of the pretrained weight (:func:`masm_ext.hashing.weight_hash`); "" if it is not known.
        steps: of the optimizer that the factors have seen.
        directions_hash: of the singular directions, row by row; "" if they are not known.
        ranks_hash: of the ranks of the subspaces.
        lift: of the singular values at the start, in units of sigma_rms; decides rates, and whether penalties may act.
    """

    base_hash: str
    steps: int
    directions_hash: str
    ranks_hash: str
    lift: float

    def to_tensor(self) -> Tensor:
        """uint8 [128], a hexadecimal digit per element."""
        lift = struct.pack(">d", self.lift).hex()
        digits = f"{self.base_hash:0>64}{self.steps:016x}{self.directions_hash:0>16}{self.ranks_hash}{lift}"
        # 16 d + 8: loops that average a whole state_dict may move an element by a rounding error
        return torch.tensor([16 * int(digit, 16) + 8 for digit in digits], dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, state: Tensor) -> ExtraState:
        """The fields of what :meth:`to_tensor` returned.

        Raises:
            ValueError: ``state`` does not have this form.
        """
        digits = [int(value) // 16 for value in torch.as_tensor(state).double().round().flatten().tolist()]
        if len(digits) != sum(LENGTHS) or not all(0 <= digit < 16 for digit in digits):
            raise ValueError(
                f"expected an extra state of {sum(LENGTHS)} elements in [0, 255], got {len(digits)} elements"
                + (" outside of it" if len(digits) == sum(LENGTHS) else "")
                + ("; 96 elements are of an older version, whose adapters still load" if len(digits) == 96 else "")
            )
        text = "".join(f"{digit:x}" for digit in digits)
        fields = []
        for length in LENGTHS:
            fields.append(text[:length])
            text = text[length:]
        base_hash, steps, directions_hash, ranks_hash, lift = fields
        base_hash, directions_hash = ("" if set(part) == {"0"} else part for part in (base_hash, directions_hash))
        return cls(base_hash, int(steps, 16), directions_hash, ranks_hash, struct.unpack(">d", bytes.fromhex(lift))[0])
