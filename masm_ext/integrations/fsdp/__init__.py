"""Converted models under FSDP2 (``torch.distributed.fsdp.fully_shard``): frozen weights are divided among processes.

::

    convert(model, config)
    shard(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=LayerMasks(model, config))

:class:`TrainingState` saves and restores both with ``torch.distributed.checkpoint``.
"""

from .accelerate import accelerate_options
from .shard import shard
from .state import TrainingState

__all__ = ["TrainingState", "accelerate_options", "shard"]
