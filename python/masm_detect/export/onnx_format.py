"""`onnx`: one graph of standard ONNX operators, with the preprocessing beside it.

torch's exporter writes it (`torch.onnx.export` with torch.export below, through onnxscript), from a detector whose
subspaces are merged into plain linear layers.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from masm_detect.models.detector import Detector
from masm_detect.results import write_json

from . import standalone
from .format import ExportError, ExportFormat, Loaded, Run
from .plain import make_plain
from .preprocessing import preprocessing_of

#: Read by onnxruntime 1.14 and later.
OPSET = 18
#: A protobuf file holds 2 GiB; larger weights go to a file beside it.
_LARGEST = 2**31 - 2**26


class OnnxFormat(ExportFormat):
    """model.onnx, preprocessing.json and predict.py."""

    library = "onnx"
    usage = "onnx"
    compared = "onnxruntime (CPU)"
    packages = ("onnx", "onnxruntime", "onnxscript")

    def check(self, run: Run) -> None:
        if importlib.util.find_spec("onnxscript") is None:
            raise ExportError('torch writes ONNX through onnxscript, which is missing: pip install "masm_ext[detect]"')

    def write(self, run: Run, folder: Path) -> None:
        make_plain(run.detector)
        write_onnx(run.detector, folder / "model.onnx")
        write_json(folder / "preprocessing.json", preprocessing_of(run))
        shutil.copyfile(standalone.__file__, folder / "predict.py")

    def load(self, run: Run, folder: Path) -> Loaded:
        session, settings = standalone.load_model(folder)

        def logits(pixels: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["logits"], {"pixel_values": pixels.numpy()})[0])

        return Loaded(
            logits, {"predict.py": lambda path: standalone.logit_of(path, session, settings)}, ("predict.py",)
        )


def write_onnx(detector: Detector, path: Path) -> None:
    """Write a plain detector as ONNX: `pixel_values` [batch, 3, size, size] -> `logits` [batch].

    Args:
        detector: on the CPU, without layers of a method (`plain.make_plain`).
        path: the file to write; weights above 2 GiB go to a file beside it.

    Raises:
        ExportError: torch cannot export the backbone, or the graph has operators outside the ONNX standard.
    """
    side = detector.backbone.image_size
    large = sum(tensor.nbytes for tensor in detector.state_dict().values()) > _LARGEST
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")  # of torch's and onnxscript's own future
        try:
            program = torch.onnx.export(
                detector.eval(),
                (torch.zeros(2, 3, side, side),),
                dynamo=True,
                input_names=["pixel_values"],
                output_names=["logits"],
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:  # torch.onnx raises errors of many kinds
            cause = " ".join(str(error).split())[:300]
            raise ExportError(
                f"torch {torch.__version__} cannot export {type(detector.backbone.model).__name__} to ONNX: use "
                f"--format adapter ({cause})"
            ) from error
        program.save(path, external_data=large)
    _strip(path)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the warnings of a logger, such as that torchvision is not installed."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _strip(path: Path) -> None:
    """Remove the notes of the exporter, which hold paths of this machine; refuse operators that are not standard."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.ClearField("doc_string")
        del item.metadata_props[:]
    other = sorted({node.domain for node in graph.node} - {"", "ai.onnx"})
    if other or model.functions:
        raise ExportError(f"the ONNX graph would need operators of {', '.join(other) or 'functions'}: update torch")
    onnx.save(model, path)
    onnx.checker.check_model(str(path))
