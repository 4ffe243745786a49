"""The run of `masm demo`: three methods on an embedded data set, offline, in minutes.

It uses the commands that a user would: it writes a data set, trains each method (`masm train`), scores all of them
(`masm eval`), calibrates one (`masm calibrate`) and analyzes two photographs with it (`masm analyze`). Everything stays
in the output folder, so that each command can be tried on it.

The photographs ship in Python wheels; image operations make the forgeries (`data/demo_set.py`); DINOv2-S comes in a
wheel too. A linear probe, LoRA and MASM are trained on some photographs with some forgery families. The best epoch is
chosen on other photographs with the same families. The test uses further photographs, with the same and with other
families. Every method has its default rates. Those of masm were chosen in studies of other data (docs/evidence.md); an
earlier table of test results of this demo was known when its size was chosen.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from masm_detect.casework.analyze import analyze
from masm_detect.casework.calibrate import calibrate
from masm_detect.config import (
    AugmentConfig,
    ConfigError,
    DataConfig,
    EvalConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)
from masm_detect.data.crop_recipe import CropRecipe, write_recipe
from masm_detect.data.decode import encode_jpeg
from masm_detect.data.demo_set import PHOTOGRAPHS, DemoSet, build_demo_set, load_photograph
from masm_detect.data.forgeries import forge
from masm_detect.evaluation.calibration import CalibrationError
from masm_detect.evaluation.evaluate import evaluate
from masm_detect.report.casework import VERDICTS
from masm_detect.report.plots import plot_auc_dots
from masm_detect.report.tables import auc_cells, auc_counts, format_cell, show
from masm_detect.results import check_output_folder, read_json, write_json
from masm_detect.training.run import train
from masm_ext.files import write_atomically

SEEN = ("upsample", "poisson", "warp")
UNSEEN = ("inpaint", "resample", "blend")
BACKBONE = "bundled:dinov2-small"
#: The method that is calibrated and analyzes photographs.
ANALYZED = "masm"
#: The test photograph that is analyzed, as it is and forged by a family of the training.
PHOTOGRAPH, FORGERY = "china.jpg", "upsample"
#: Largest share of real photographs called fake, and of fakes called real: the validation split has 9 photographs, and
#: a rate r needs 1 / r - 1.
ERROR_RATE = 0.1
#: What a demo writes into its folder, and replaces when it runs again.
PARTS = ("data", "runs", "eval", "photographs", "analysis", "results.json", "auc.png")


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
            MethodConfig(name="lora"),
            MethodConfig(name="masm"),
        )
    )


#: `--quick`: shows that the program works; the numbers mean nothing.
QUICK = DemoSize(
    train_crops=72,  # three forged crops of each of the 12 photographs: one of each family that is seen
    val_crops=20,
    test_crops=8,
    image_size=56,
    epochs=2,
    methods=(
        MethodConfig(name="probe"),
        MethodConfig(name="lora"),
        MethodConfig(name="masm"),
    ),
)


def demo(out: str | Path = "runs/demo", *, quick: bool = False, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """Run the demo, print its table, and write everything to `out`; returns the results.

    Args:
        out: folder for `PARTS`: the data set, a run folder for each method, the evaluation, two photographs and their
            analysis, `results.json` and `auc.png`. Those of an earlier demo are replaced.
        quick: run a tiny version, to check that the program works; its numbers mean nothing.
        seed: seed of the data and of the training.
        progress: show progress bars.

    Returns:
        The content of `results.json`.

    Raises:
        ConfigError: `out` holds files that are not those of a demo.
    """
    started = time.perf_counter()
    out, size = Path(out), QUICK if quick else DemoSize()
    _make_room(out)
    runtime = RuntimeConfig(seed=seed, progress=progress, checkpoint_every=0)
    write_data(out / "data", quick=quick, seed=seed, progress=progress)
    for method in size.methods:
        train(_train_config(method, size, runtime, out))
    runs = [str(out / "runs" / method.name) for method in size.methods]
    scored = evaluate(
        EvalConfig(runs=runs, paths=[str(out / "data")], split="test", out=str(out / "eval"), runtime=runtime)
    )
    results = _results(scored, size, out)
    run = out / "runs" / ANALYZED
    try:
        rates = dict.fromkeys(("false_alarm_rate", "miss_rate", "outside_rate"), ERROR_RATE)
        calibrate(run, **rates, progress=progress)
    except CalibrationError as error:  # the tiny version may be no better than chance
        print(f"not calibrated: {error}")
    photographs = write_photographs(out / "photographs", seed)
    verdicts = analyze(run, photographs, out / "analysis", progress=progress)
    results["analyzed"] = {
        Path(file["file"]).stem: {name: file[name] for name in ("p_fake", "calibrated", "verdict", "outside")}
        for file in verdicts["files"]
    }
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_json(out / "results.json", results)
    cells = {name: _family_cells(result) for name, result in results["methods"].items()}
    counts = auc_counts(next(iter(results["methods"].values())))
    plot_auc_dots(cells, out / "auc.png", title="AUC on unseen photographs", counts=counts, unseen=UNSEEN)
    show(demo_table(results))
    print("one seed: which method is better, these numbers cannot show")
    for name, result in results["analyzed"].items():
        print(f"{name} photograph: {VERDICTS[result['verdict']]} (raw score {result['p_fake']:.3f})")
    print(
        f"{results['seconds']:.0f} s in all. In {out}: analysis/report.html (start there), eval/, runs/, results.json"
    )
    program = sys.argv[0] if Path(sys.argv[0]).name == "masm" else "masm"
    data = _quoted(out / "data")
    print(f"score the test set again: {program} eval {_quoted(run)} --data {data} --split test --out my-eval")
    print(f"a photograph of your own: {program} analyze {_quoted(run)} PHOTOGRAPH --out my-analysis")
    if quick:
        print("this tiny version is too small to learn anything: its numbers and verdicts mean nothing")
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
    out, size = Path(out), QUICK if quick else DemoSize()
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: give another --out")
    data = _demo_set(size, seed, progress)
    for sample in data.samples:
        _, split, folder, name = sample.path.split("/")
        photograph, _, number = name.rpartition("-")
        file = out / split / folder / photograph / number
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, data.images[sample.path].tobytes())
    write_recipe(out, CropRecipe("tile", _side(size)))
    return out


def write_photographs(out: Path, seed: int) -> list[Path]:
    """Write a test photograph to `out`, as it is and forged as a whole; returns both files."""
    (source,) = [(package, file) for package, file in PHOTOGRAPHS["test"] if Path(file).name == PHOTOGRAPH]
    authentic = load_photograph(*source)
    forged = _forged_whole(authentic, np.random.default_rng(seed))
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, rgb in (("authentic", authentic), ("forged", forged)):
        files.append(out / f"{name}.jpg")
        write_atomically(files[-1], encode_jpeg(rgb, 92).tobytes())
    return files


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
        cells = _family_cells(result)
        table.add_row(
            name,
            *(format_cell(cells[family]) for family in (*SEEN, *UNSEEN)),
            f"{result['trainable_parameters']:,}",
            f"{result['images_per_second']:.1f}",
        )
    return table


def _family_cells(result: dict[str, Any]) -> dict[str, Any]:
    cells = auc_cells(result)
    return {family: cells[family] for family in (*SEEN, *UNSEEN)}


def _train_config(method: MethodConfig, size: DemoSize, runtime: RuntimeConfig, out: Path) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(
            paths=[str(out / "data")], splits=["train", "val"], augment=AugmentConfig(flip=0.5), crop="center"
        ),
        model=ModelConfig(backbone=BACKBONE, image_size=size.image_size),
        method=method,
        optim=OptimConfig(epochs=size.epochs, batch_size=16),
        runtime=runtime,
        out=str(out / "runs" / method.name),
    )


def _results(scored: dict[str, Any], size: DemoSize, out: Path) -> dict[str, Any]:
    """The content of results.json: what `masm eval` found, and a few numbers of each training."""
    names = ("precision", "trainable_parameters", "images_per_second", "chosen_epoch")
    methods = {}
    for name, result in scored["runs"].items():
        metrics = read_json(out / "runs" / name / "metrics.json")
        validation = metrics["source_validation"]["datasets"]["data"]["all"]["auc"]
        methods[name] = {**{n: metrics[n] for n in names}, "source_validation_auc": validation, **result}
    return {
        "provenance": scored["provenance"],
        "backbone": BACKBONE,
        "size": {name: value for name, value in asdict(size).items() if name != "methods"},
        "seen": SEEN,
        "unseen": UNSEEN,
        "methods": methods,
    }


def _forged_whole(rgb: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A photograph whose every pixel went through the forgery, as the training images of it did."""
    for _ in range(100):
        forged, mask = forge(FORGERY, rgb, random)
        if (mask > 0).all():
            return forged
    raise RuntimeError(f"{FORGERY} never changed the whole photograph")


def _make_room(out: Path) -> None:
    """Remove the parts of an earlier demo. Raises ConfigError if `out` holds anything else."""
    check_output_folder(out)
    others = [path.name for path in out.iterdir() if path.name not in PARTS] if out.is_dir() else []
    if others:
        raise ConfigError(
            f"{out} holds files that are not of a demo ({', '.join(sorted(others)[:3])}): give another --out"
        )
    found = [out / name for name in PARTS if os.path.lexists(out / name)]
    if found:
        print(f"replacing the demo in {out}")
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _side(size: DemoSize) -> int:
    """Side of a crop in pixels: that of the network's input, or the smallest that the forgeries need."""
    return max(64, size.image_size)


def _demo_set(size: DemoSize, seed: int, progress: bool) -> DemoSet:
    return build_demo_set(
        train_families=SEEN,
        test_families=(*SEEN, *UNSEEN),
        train_crops=size.train_crops,
        val_crops=size.val_crops,
        test_crops=size.test_crops,
        size=_side(size),
        seed=seed,
        progress=progress,
    )
