"""The command `masm`. Reads settings, calls one function a subcommand, and turns a user's mistake into one clear
line.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser

from .config import EvalConfig, TrainConfig
from .errors import UserError

#: Exit code of a mistake that the user can mend.
USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `masm` with `arguments` (default: those of the process); returns the exit code."""
    # An unknown model type or a missing chat template of transformers is not about us; its progress bars hide ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser, commands = _parser()
    try:
        values = parser.parse_args(None if arguments is None else list(arguments))
    except ArgumentError as error:
        print(f"masm: error: {' '.join(str(error).split())} (see masm --help, masm <command> --help)", file=sys.stderr)
        return USER_ERROR
    command = values.subcommand
    try:
        commands[command](_instantiate(parser, values)[command])
    except KeyboardInterrupt:
        print("masm: interrupted; a training run goes on with --resume", file=sys.stderr)
        return 130
    except _user_errors() as error:
        print(f"masm {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    return 0


def _instantiate(parser: ArgumentParser, values: Any) -> Any:
    try:
        return parser.instantiate(values)
    except UserError:
        raise
    except ValueError as error:
        # A setting that may also be null: jsonargparse lists what went wrong with each type, our own error among it.
        raise UserError(str(error.__cause__ if isinstance(error.__cause__, UserError) else error)) from error


def _parser() -> tuple[ArgumentParser, dict[str, Callable[[Any], None]]]:
    # Not exit_on_error: it prints the usage, 60 lines for train, in front of what was wrong.
    parser = ArgumentParser(
        prog="masm",
        description="Deepfake detection with multi-artifact subspace fine-tuning.",
        exit_on_error=False,
    )
    subcommands = parser.add_subcommands(required=True, dest="subcommand")
    commands: dict[str, Callable[[Any], None]] = {}
    for name, help_text, add, run in (
        ("env", "print versions, devices and which op runs where", lambda parser: None, _env),
        ("prepare", "cut faces out of videos or images, write a DeepfakeBench JSON", _add_prepare, _prepare),
        ("train", "train a detector; writes a run folder", _add_train, _train),
        ("eval", "score trained runs on data sets", _add_eval, _eval),
        ("demo", "train and compare three methods on embedded data, offline", _add_demo, _demo),
    ):
        child = ArgumentParser(description=help_text[0].upper() + help_text[1:] + ".", exit_on_error=False)
        add(child)
        subcommands.add_subcommand(name, child, help=help_text)
        commands[name] = run
    return parser, commands


def _add_train(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_class_arguments(TrainConfig, skip={"resume"})
    parser.add_argument(
        "--resume", action=ActionYesNo, nargs="?", default=False, help="go on with the interrupted run in --out"
    )


def _add_eval(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_argument("runs", nargs="+", type=str, help="run folders written by `masm train`")
    parser.add_argument(
        "--data",
        nargs="+",
        type=str,
        default=[],
        help="DeepfakeBench JSON files, or folders with real/ and fake-<method>/",
    )
    parser.add_class_arguments(EvalConfig, skip={"runs", "paths"})


def _add_prepare(parser: ArgumentParser) -> None:
    from .data.prepare import prepare

    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_argument("source", type=str, help="folder with real/ and fake-<method>/")
    parser.add_argument("out", type=str, help="folder for the crops, the JSON and the report")
    parser.add_function_arguments(prepare, skip={"source", "out"})


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
    from .report.tables import results_table, show, speed_line
    from .train import train

    options = {key: value for key, value in vars(values).items() if key != "config"}
    result = train(TrainConfig(**options))
    show(results_table({result.method.name: result.metrics["source_validation"]}))
    print(speed_line(result.metrics))
    print(f"source validation only; run folder: {result.folder}")


def _eval(values: Any) -> None:
    from .evaluate import evaluate
    from .report.tables import results_table, show

    options = {key: value for key, value in vars(values).items() if key != "config"}
    config = EvalConfig(paths=options.pop("data"), **options)
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

    files = (FileNotFoundError, PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError)
    return (UserError, AdapterError, *files)


if __name__ == "__main__":
    warnings.filterwarnings("default", category=UserWarning)
    sys.exit(main())
