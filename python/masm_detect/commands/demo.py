"""`masm demo`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser

HELP = "train and compare three methods on a small generated data set, offline"


def add_arguments(parser: ArgumentParser) -> None:
    """The parameters of `demo_run.demo`."""
    parser.add_argument("--out", type=str, default="runs/demo", help="folder for the results, or for the data set")
    parser.add_argument(
        "--quick", action=ActionYesNo, default=False, help="a tiny version of two minutes, to check that it works"
    )
    parser.add_argument(
        "--data-only",
        action=ActionYesNo,
        default=False,
        help="write the data set to --out as folders of images, and stop",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and the training")


def run(values: Any) -> None:
    """Run the demo, which prints its table."""
    from .demo_run import demo, write_data

    if values.data_only:
        print(f"written: {write_data(values.out, quick=values.quick, seed=values.seed)}")
        return
    demo(values.out, quick=values.quick, seed=values.seed)
