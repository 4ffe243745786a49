"""The run of `masm demo`: three methods on an embedded data set, offline, in minutes.

The photographs ship in Python wheels; image operations make the forgeries (`data/demo_set.py`); DINOv2-S comes in a
wheel too. A linear probe, an Effort-style layer and MASM are trained on some photographs with some forgery families.
The best epoch is chosen on other photographs with the same families. The test uses further photographs, with the same
and with other families. The settings below were chosen on the validation split with one seed. MASM had more trials than
the other methods, and an earlier table of test results was known.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from masm_detect.config import (
    AugmentConfig,
    ConfigError,
    DataConfig,
    MasmOptions,
    MethodConfig,
    OptimConfig,
    RuntimeConfig,
)
from masm_detect.data.demo_set import DemoSet, build_demo_set
from masm_detect.data.frames import frame_dataset
from masm_detect.evaluation.metrics import evaluate_scores
from masm_detect.evaluation.predict import score_samples
from masm_detect.methods.build import build_method, resolve
from masm_detect.models.backbone import load_backbone
from masm_detect.models.detector import Detector
from masm_detect.provenance import provenance
from masm_detect.report.plots import plot_auc_dots, plot_drift, plot_history, plot_masks
from masm_detect.report.tables import auc_cells, auc_counts, format_cell, show
from masm_detect.results import check_output_folder, write_json
from masm_detect.runtime import process_settings, resolve_precision
from masm_detect.training.loop import fit
from masm_ext.files import write_atomically

SEEN = ("upsample", "poisson", "warp")
UNSEEN = ("inpaint", "resample", "blend")
BACKBONE = "bundled:dinov2-small"


@dataclass(frozen=True)
class DemoSize:
    """Size of a demo: images, epochs, pixels, methods."""

    train_crops: int = 1200
    val_crops: int = 180
    test_crops: int = 126
    image_size: int = 112
    epochs: int = 2
    methods: tuple[MethodConfig, ...] = field(
        default=(
            MethodConfig(name="probe"),
            MethodConfig(name="effort"),
            MethodConfig(name="masm"),
        )
    )


#: `--quick`: shows that the program works; the numbers mean nothing.
QUICK = DemoSize(
    train_crops=48,
    val_crops=16,
    test_crops=8,
    image_size=56,
    epochs=2,
    methods=(
        MethodConfig(name="probe"),
        MethodConfig(name="effort"),
        MethodConfig(name="masm", masm=MasmOptions(mask_warmup=2, mask_interval=1)),
    ),
)


def demo(out: str | Path = "runs/demo", *, quick: bool = False, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """Run the demo, print its table, write `results.json` and the plots to `out`; returns the results.

    torch's settings of the process (`runtime.process_settings`) are restored at the end.

    Args:
        out: folder for `results.json` and the plots; existing files are replaced.
        quick: run a tiny version, to check that the program works; its numbers mean nothing.
        seed: seed of the data and of the training.
        progress: show progress bars.

    Returns:
        The content of `results.json`.
    """
    started = time.perf_counter()
    out, size = Path(out), QUICK if quick else DemoSize()
    check_output_folder(out)
    runtime = RuntimeConfig(seed=seed, progress=progress, checkpoint_every=0)
    with process_settings(runtime) as device:
        results = _run_methods(size, runtime, device, out)
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_json(out / "results.json", results)
    cells = {
        name: {family: auc_cells(result)[family] for family in (*SEEN, *UNSEEN)}
        for name, result in results["methods"].items()
    }
    counts = auc_counts(next(iter(results["methods"].values())))
    plot_auc_dots(cells, out / "auc.png", title="AUC on unseen photographs", counts=counts, unseen=UNSEEN)
    show(demo_table(results))
    print(f"{results['seconds']:.0f} s in all; results.json and plots are in {out}")
    return results


def _run_methods(size: DemoSize, runtime: RuntimeConfig, device: torch.device, out: Path) -> dict[str, Any]:
    data = _demo_set(size, runtime.seed, runtime.progress)
    results: dict[str, Any] = {
        "provenance": provenance(str(device)),
        "backbone": BACKBONE,
        "precision": resolve_precision(runtime.precision, device),
        "size": {name: value for name, value in asdict(size).items() if name != "methods"},
        "seen": SEEN,
        "unseen": UNSEEN,
        "methods": {},
    }
    for config in size.methods:
        results["methods"][config.name] = _run(config, data, size, runtime, device, out)
    return results


def write_data(out: str | Path, *, quick: bool = False, seed: int = 0, progress: bool = True) -> Path:
    """Write the demo's data set as folders of images, `out/<split>/<real | fake-family>/<photograph>/<number>.jpg`.

    Args:
        out: the folder; it must not exist yet, or be empty.
        quick: write the small data set of the tiny version.
        seed: seed of the data.
        progress: show a progress bar.

    Returns:
        The folder. `masm train --data.paths` and `masm eval --data` read it.

    Raises:
        ConfigError: the folder holds files.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: give another --out")
    data = _demo_set(QUICK if quick else DemoSize(), seed, progress)
    for sample in data.samples:
        _, split, folder, name = sample.path.split("/")
        photograph, _, number = name.rpartition("-")
        file = out / split / folder / photograph / number
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, data.images[sample.path].tobytes())
    return out


def _demo_set(size: DemoSize, seed: int, progress: bool) -> DemoSet:
    return build_demo_set(
        train_families=SEEN,
        test_families=(*SEEN, *UNSEEN),
        train_crops=size.train_crops,
        val_crops=size.val_crops,
        test_crops=size.test_crops,
        size=max(64, size.image_size),
        seed=seed,
        progress=progress,
    )


def demo_table(results: dict[str, Any]) -> Table:
    """AUC of every method and family, with its interval; unseen families last."""
    table = Table(title="AUC on unseen photographs", title_justify="left")
    table.add_column("method")
    for family in SEEN:
        table.add_column(family, justify="right")
    for family in UNSEEN:
        table.add_column(f"{family}\n(unseen)", justify="right")
    table.add_column("trained\nweights", justify="right")
    table.add_column("training\nimg/s", justify="right")
    for name, result in results["methods"].items():
        cells = auc_cells(result)
        table.add_row(
            name,
            *(format_cell(cells[family]) for family in (*SEEN, *UNSEEN)),
            f"{result['trainable_parameters']:,}",
            f"{result['images_per_second']:.1f}",
        )
    return table


def _run(
    config: MethodConfig, data: DemoSet, size: DemoSize, runtime: RuntimeConfig, device: torch.device, out: Path
) -> dict[str, Any]:
    detector = Detector(load_backbone(BACKBONE, image_size=size.image_size)).to(device)
    settings = DataConfig(augment=AugmentConfig(flip=0.5), crop="center")
    sets = {
        split: frame_dataset(
            data.split(split),
            detector.backbone,
            settings,
            augment=split == "train",
            seed=runtime.seed,
            images=data.images,
        )
        for split in ("train", "val", "test")
    }
    method = build_method(config.name, detector, config, runtime.seed)
    optim = OptimConfig(epochs=size.epochs, batch_size=16)
    result = fit(detector, method, sets["train"], sets["val"], optim=optim, runtime=runtime)
    scores = score_samples(
        detector,
        sets["test"],
        precision=resolve_precision(runtime.precision, device),
        progress=f"{config.name} test" if runtime.progress else None,
    )
    plot_history(result.history, out / f"history-{config.name}.png")
    if "drift" in result.history[-1]:
        plot_drift(result.history, out / f"drift-{config.name}.png")
    if result.mask_history:
        plot_masks(result.mask_history, method.masks.layer_names, out / f"masks-{config.name}.png")
    return {
        "config": asdict(resolve(config)),
        "optim": asdict(optim),
        "trainable_parameters": method.trainable_parameters,
        "images_per_second": round(result.images_per_second, 2),
        "chosen_epoch": result.best_epoch,
        "source_validation_auc": result.best_val_auc,
        "history": [{key: value for key, value in entry.items() if key != "drift"} for entry in result.history],
        **evaluate_scores(data.split("test"), scores),
    }
