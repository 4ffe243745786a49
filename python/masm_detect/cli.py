"""The command `masm`. Reads settings, calls one function a subcommand, and turns a user's mistake into one clear
line.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser

from .config import EvalConfig, TrainConfig

#: Exit code of a mistake that the user can mend.
USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `masm` with `arguments` (default: those of the process); returns the exit code."""
    # An unknown model type or a missing chat template of transformers is not about us; its progress bars hide ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser, commands = _parser()
    values = parser.parse_args(None if arguments is None else list(arguments))
    command = values.subcommand
    try:
        commands[command](parser.instantiate(values)[command])
    except KeyboardInterrupt:
        print("masm: interrupted; a training run goes on with --resume true", file=sys.stderr)
        return 130
    except _user_errors() as error:
        print(f"masm {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    return 0


def _parser() -> tuple[ArgumentParser, dict[str, Callable[[Any], None]]]:
    parser = ArgumentParser(prog="masm", description="Deepfake detection with multi-artifact subspace fine-tuning.")
    subcommands = parser.add_subcommands(required=True, dest="subcommand")
    commands: dict[str, Callable[[Any], None]] = {}
    for name, help_text, add, run in (
        ("env", "print versions, devices and which op runs where", lambda parser: None, _env),
        ("prepare", "cut faces out of videos or images, write a DeepfakeBench JSON", _add_prepare, _prepare),
        ("train", "train a detector; writes a run folder", _add_train, _train),
        ("eval", "score trained runs on data sets", _add_eval, _eval),
        ("demo", "train and compare three methods on embedded data, offline", _add_demo, _demo),
    ):
        child = ArgumentParser(description=help_text[0].upper() + help_text[1:] + ".")
        add(child)
        subcommands.add_subcommand(name, child, help=help_text)
        commands[name] = run
    return parser, commands


def _add_train(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_class_arguments(TrainConfig)


def _add_eval(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_class_arguments(EvalConfig)


def _add_prepare(parser: ArgumentParser) -> None:
    from .data.prepare import prepare

    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_function_arguments(prepare)


def _add_demo(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, default="runs/demo", help="folder for results.json and the plots")
    parser.add_argument(
        "--quick", action=ActionYesNo, default=False, help="a tiny version of under 40 s, to see it work"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and the training")


def _env(_: Any) -> None:
    from masm_ext import build_info

    from .report.tables import mapping_table, show
    from .results import provenance

    show(mapping_table("masm_ext", build_info()))
    show(mapping_table("this machine", provenance()))


def _prepare(values: Any) -> None:
    from .data.prepare import prepare

    options = {key: value for key, value in vars(values).items() if key != "config"}
    print(prepare(**options))


def _train(values: Any) -> None:
    from .report.tables import results_table, show
    from .train import train

    options = {key: value for key, value in vars(values).items() if key != "config"}
    result = train(TrainConfig(**options))
    show(results_table({result.method.name: result.metrics["source_validation"]}))
    print(f"source validation only; run folder: {result.folder}")


def _eval(values: Any) -> None:
    from .evaluate import evaluate
    from .report.tables import results_table, show

    options = {key: value for key, value in vars(values).items() if key != "config"}
    config = EvalConfig(**options)
    show(results_table(evaluate(config)["runs"]))
    print(f"written: {config.out}/results.json, {config.out}/auc.png")


def _demo(values: Any) -> None:
    from .demo import demo

    demo(values.out, quick=values.quick, seed=values.seed)


def _user_errors() -> tuple[type[BaseException], ...]:
    """Errors whose message already says what to do: settings, data, files, checkpoints. Anything else is a bug:
    traceback.
    """
    from masm_ext.checkpoint import AdapterError

    from .checkpoint import CheckpointError
    from .config import ConfigError
    from .data.demo_set import DemoSetError
    from .data.images import UnreadableImage
    from .data.records import DatasetError
    from .loop import TrainingError
    from .metrics import MetricsError
    from .models.backbone import BackboneError
    from .models.bundled import BundledWeightsError
    from .results import ResultError

    known = (
        AdapterError,
        CheckpointError,
        ConfigError,
        UnreadableImage,
        DatasetError,
        TrainingError,
        BackboneError,
        BundledWeightsError,
    )
    return (*known, MetricsError, DemoSetError, ResultError, FileNotFoundError, PermissionError, NotADirectoryError)


if __name__ == "__main__":
    warnings.filterwarnings("default", category=UserWarning)
    sys.exit(main())
