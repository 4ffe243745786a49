"""The table of export formats. It imports none of them: each is loaded when it is used.

A new format is one file with a subclass of `format.ExportFormat`, and one line here.
"""

from __future__ import annotations

from importlib import import_module

from .format import ExportFormat

#: Name of a format -> "module:class", in the order of the help text.
FORMATS: dict[str, str] = {
    "onnx": "masm_detect.export.onnx_format:OnnxFormat",
    "hf": "masm_detect.export.hf_format:HfFormat",
    "adapter": "masm_detect.export.adapter_format:AdapterFormat",
}


def load(name: str) -> ExportFormat:
    """The format called `name`, a key of `FORMATS`."""
    module, _, attribute = FORMATS[name].partition(":")
    return getattr(import_module(module), attribute)()
