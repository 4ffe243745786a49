"""Adapters on disk: what was learned, and what rebuilds the model from its pretrained base without an SVD."""

from .files import AdapterError
from .load import load_adapter
from .save import save_adapter

__all__ = ["AdapterError", "load_adapter", "save_adapter"]
