"""OSF: the last singular directions of each layer are trained, with gradients kept orthogonal to the frozen ones.

The layers are those of Hugging Face PEFT.
"""

from __future__ import annotations

import re

from torch import nn

from masm_detect.config import MethodConfig

from .layers import check_rank
from .method import MethodSpec, Rates
from .peft_layers import inject, peft


class Osf(MethodSpec):
    """Trains the last `rank` singular directions of the target layers, and the head."""

    rates = Rates(lr=1e-3, rank=12)

    def adapt(self, model: nn.Module, names: list[str], config: MethodConfig) -> None:
        check_rank(model, names, config)
        # PEFT's `effective_rank` is the number of frozen directions, so it depends on the layer's shape.
        frozen = {re.escape(name) + "$": min(model.get_submodule(name).weight.shape) - config.rank for name in names}
        inject(model, peft().OSFConfig(target_modules=names, rank_pattern=frozen))
