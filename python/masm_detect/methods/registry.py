"""The table of adaptation methods. It imports no method: each is loaded when a run uses it.

A new method is one file with a subclass of `method.MethodSpec`, and one line here.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: Name of a method -> "module:class". The order is that of tables and help texts.
METHODS: dict[str, str] = {
    "probe": "masm_detect.methods.probe:Probe",
    "full": "masm_detect.methods.full:Full",
    "ln": "masm_detect.methods.norms:LayerNormTuning",
    "bitfit": "masm_detect.methods.bitfit:BitFit",
    "lora": "masm_detect.methods.lora:Lora",
    "milora": "masm_detect.methods.milora:MiLora",
    "osf": "masm_detect.methods.osf:Osf",
    "effort": "masm_detect.methods.effort:Effort",
    "masm-nomask": "masm_detect.methods.masm:MasmWithoutMasks",
    "masm": "masm_detect.methods.masm:Masm",
}


def load(name: str) -> Any:
    """The `method.MethodSpec` called `name`, a key of `METHODS`."""
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)()
