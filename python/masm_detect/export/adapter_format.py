"""`adapter`: what training changed, a small folder that needs masm_ext and the base model.

`evaluation.runs.load_run` reads it, and so do the commands that take a run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from masm_detect.config_files import save_config
from masm_detect.data.frames import frame_dataset
from masm_detect.data.sample import Sample
from masm_detect.evaluation.calibration import load_calibration, save_calibration
from masm_detect.evaluation.runs import load_run
from masm_detect.results import read_json

from .format import ExportFormat, Loaded, Run
from .preprocessing import CALIBRATION, CROPS, copy_json


class AdapterFormat(ExportFormat):
    """adapter/, config.yaml and, if the run has them, crops.json and the calibration."""

    library = "masm_ext"
    usage = "adapter"
    compared = "masm_detect (load_run: load_adapter on the base model)"

    def write(self, run: Run, folder: Path) -> None:
        shutil.copytree(run.folder / "adapter", folder / "adapter")
        save_config(run.config_without_paths(), folder / "config.yaml")
        copy_json(CROPS, run.folder, folder)
        calibration = load_calibration(run.folder)
        if calibration is not None:
            save_calibration(folder, calibration, read_json(run.folder / CALIBRATION)["provenance"])

    def load(self, run: Run, folder: Path) -> Loaded:
        config, detector = load_run(folder)
        detector.eval()

        @torch.inference_mode()
        def file_logit(path: str) -> float:
            dataset = frame_dataset([Sample(path, 0, "", "real", "")], detector.backbone, config.data)
            return float(detector(dataset[0]["image"][None]))

        @torch.inference_mode()
        def logits(pixels: Tensor) -> Tensor:
            return detector(pixels)

        return Loaded(logits, {"masm_detect": file_logit}, ("masm_detect",))
