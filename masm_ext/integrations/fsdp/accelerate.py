"""The options of accelerate's FSDP2 plugin for :func:`masm_ext.integrations.fsdp.shard`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import MixedPrecisionPolicy

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerate_options(accelerator: Accelerator) -> dict[str, Any]:
    """Keyword arguments of :func:`shard` as the FSDP2 plugin of accelerate sets them.

    ``shard(model, **accelerate_options(accelerator))``, then ``accelerator.prepare(model, optimizer)``, which leaves a
    model alone that is sharded already.

    Args:
        accelerator: with a ``FullyShardedDataParallelPlugin(fsdp_version=2)``.

    Returns:
        ``mp_policy``, ``reshard_after_forward`` and ``offload_policy``, and ``mesh`` if accelerate has made one. The
        plugin's wrap policy and its ``cpu_ram_efficient_loading`` are not read.

    Raises:
        ValueError: accelerate is not set to FSDP2.
    """
    if not accelerator.is_fsdp2:
        raise ValueError(
            f"accelerate_options: accelerate runs {accelerator.distributed_type}, not FSDP2; pass "
            "Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)), or fsdp_version: 2 in its config"
        )
    plugin = accelerator.state.fsdp_plugin
    options = {
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
    }
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None:
        options["mesh"] = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    return options
