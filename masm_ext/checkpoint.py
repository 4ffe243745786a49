"""The former name of :mod:`masm_ext.adapter`, kept for existing imports."""

from .adapter import AdapterError, load_adapter, save_adapter

__all__ = ["AdapterError", "load_adapter", "save_adapter"]
