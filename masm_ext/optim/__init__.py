"""The optimizer and its parameter groups."""

from .groups import param_groups, scale_free_groups
from .masked_adamw import MaskedAdamW

__all__ = ["MaskedAdamW", "param_groups", "scale_free_groups"]
