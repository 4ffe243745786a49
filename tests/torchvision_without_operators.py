"""A pytest plugin: makes `import torchvision` work beside a torch that its compiled operators were not built for.

The torchvision of PyPI is built for CUDA. Beside a CPU build of torch its operators do not load, and its import stops
where it describes the first of them. timm and open_clip use torchvision's Python code only, so the tests declare these
operators, without implementations. Nothing is declared where torchvision's own operators load.
"""

from __future__ import annotations

import sys

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
