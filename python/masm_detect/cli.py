"""The command `masm`. Reads settings, calls one function a subcommand, and turns a user's mistake into one clear
line.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentError, ArgumentParser

from .errors import UserError

# What imports torch is imported in functions, inside the try of `main`: it takes a second, and Ctrl-C comes in it too.

#: Exit code of a mistake that the user can mend.
USER_ERROR = 2

#: Settings that have moved, old name to new.
MOVED = {"data.workers": "runtime.workers"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `masm` with `arguments` (default: those of the process); returns the exit code."""
    # An unknown model type or a missing chat template of transformers is not about us; its progress bars hide ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    command = values = None
    try:
        parser, commands = _parser()
        try:
            values = parser.parse_args(None if arguments is None else list(arguments))
        except ArgumentError as error:
            print(f"masm: error: {_in_short(str(error))}", file=sys.stderr)
            return USER_ERROR
        command = values.subcommand
        try:
            commands[command](_instantiate(parser, values)[command])
        except Exception as error:
            if not isinstance(error, _user_errors()):
                raise
            print(f"masm {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
            return USER_ERROR
    except BaseException as error:
        # Some modules whose import is interrupted raise an error of their own, with the interrupt as its cause.
        if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        what = str(error) if isinstance(error, KeyboardInterrupt) else ""
        begun = command == "train" and os.path.isfile(os.path.join(values.train.out, "config.yaml"))
        hint = "; the run goes on with --resume" if begun else ""
        print(f"masm: {what or 'interrupted'}{hint}", file=sys.stderr)
        return 130
    return 0


def _in_short(message: str) -> str:
    """What jsonargparse says of a wrong argument, in one line: of a type that is a union it tells all that it tried."""
    message = _wrong_value(" ".join(message.split()))
    hints = [f"{old} is now {new}" for old, new in MOVED.items() if old in message]
    return f"{message} ({'; '.join(hints) or 'see masm --help, masm <command> --help'})"


def _wrong_value(message: str) -> str:
    part = re.fullmatch(r"""Parser key "(.+?)": .* Problem with given class_path \S+: (.*) - Expected a .*""", message)
    if part:
        return f"{part[1]}: {_wrong_value(part[2])}"
    found = re.fullmatch(r"""Parser key "(.+?)": .*?(?:Subtypes: \[|Expected an? )(.*?)"""
                         r"""(?:\] Errors: .*Given value|\. Got value): (.*)""", message)  # fmt: skip
    if not found:
        return message
    key, types, value = found.groups()
    # <class 'int'>, list[str] or typing.Literal['a', 'b']
    names = [name.split(".")[-1] for name in re.findall(r"[\w.]+\[.*?\]|(?<=<class ')[\w.]+", types)]
    allowed = " or ".join(re.sub(r"^Literal\[(.*)\]", r"one of \1", name) for name in names).replace("'", "")
    if not allowed or allowed.count("[") != allowed.count("]"):
        return message
    return f"{key} is {value}; it must be {allowed.replace('NoneType', 'null')}"


class _ConfigFile(ActionConfigFile):
    """`--config`: a file with settings that the command lacks is refused by its name. jsonargparse would name the
    setting alone, and die of a mapping where a list of words is meant.
    """

    def __call__(self, parser: ArgumentParser, cfg: Any, values: Any, option_string: str | None = None) -> None:
        import yaml

        content = None
        if os.path.isfile(values):  # it may also be YAML itself
            with suppress(OSError, ValueError, yaml.YAMLError):  # jsonargparse says what is wrong
                content = yaml.safe_load(Path(values).read_text())
        if isinstance(content, dict) and (unknown := list(_unknown(content, parser.get_defaults().as_dict()))):
            command = f"masm {parser.prog.split()[-1]}"
            raise ArgumentError(
                None, f"{values} is not a config of `{command}`, which has no setting {', '.join(unknown)}"
            )
        try:
            super().__call__(parser, cfg, values, option_string)
        except (AttributeError, TypeError) as error:  # jsonargparse, of a word where a mapping is meant
            raise ArgumentError(None, f"{values} does not have the form of a config ({error})") from error


def _unknown(content: dict[Any, Any], defaults: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The settings in `content` that are not in `defaults`: names, and values where settings are meant."""
    for name, value in content.items():
        key, dot, rest = str(name).partition(".")
        value = {rest: value} if dot else value
        if key not in defaults:
            yield f"{prefix}{key}"
        elif isinstance(default := defaults[key], dict) and isinstance(value, (int, float, list)):
            yield f"{prefix}{key} = {value}"
        elif isinstance(value, dict) and isinstance(default, (dict, list)):
            # a class that may be null stands with its path
            inner = {} if isinstance(default, list) else default.get("init_args", default)
            value = value.get("init_args", {}) if "class_path" in value else value
            yield from _unknown(value, inner, f"{prefix}{key}.")


def _instantiate(parser: ArgumentParser, values: Any) -> Any:
    try:
        return parser.instantiate(values)
    except UserError:
        raise
    except ValueError as error:
        # A setting that may also be null: jsonargparse lists what went wrong with each type, our own error among it.
        raise UserError(str(error.__cause__ if isinstance(error.__cause__, UserError) else error)) from error


def _parser() -> tuple[ArgumentParser, dict[str, Callable[[Any], None]]]:
    # exit_on_error prints the usage, 60 lines for train, in front of what was wrong. allow_abbrev takes a mistyped name
    # for another setting.
    options = {"exit_on_error": False, "allow_abbrev": False}
    parser = ArgumentParser(
        prog="masm", description="Deepfake detection with multi-artifact subspace fine-tuning.", **options
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
        child = ArgumentParser(description=help_text[0].upper() + help_text[1:] + ".", **options)
        add(child)
        subcommands.add_subcommand(name, child, help=help_text)
        commands[name] = run
    return parser, commands


def _add_train(parser: ArgumentParser) -> None:
    from .config import TrainConfig

    parser.add_argument("--config", action=_ConfigFile, help="YAML file with any of the settings below")
    parser.add_class_arguments(TrainConfig, skip={"resume"})
    parser.add_argument(
        "--resume", action=ActionYesNo, nargs="?", default=False, help="go on with the interrupted run in --out"
    )


def _add_eval(parser: ArgumentParser) -> None:
    from .config import EvalConfig

    parser.add_argument("--config", action=_ConfigFile, help="YAML file with any of the settings below")
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

    parser.add_argument("--config", action=_ConfigFile, help="YAML file with any of the settings below")
    parser.add_argument("source", type=str, help="folder with real/ and fake-<method>/")
    parser.add_argument("out", type=str, help="folder for the crops, the JSON and the report")
    parser.add_function_arguments(prepare, skip={"source", "out"})
    for action in parser._actions:  # those that need no word in the docstring of prepare
        action.help = _PREPARE_HELP.get(action.dest, action.help)


_PREPARE_HELP = {
    "dataset": "name of the data set, and of its JSON file",
    "size": "side of a crop in pixels",
    "scale": "size of a crop relative to the face, 1.3: a margin of 0.15 on each side",
    "detector": "class of the face detector; null: MTCNN",
    "split_seed": "seed that draws the shares in splits",
    "progress": "show a progress bar",
}


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
    from .config import TrainConfig
    from .report.tables import masks_line, results_table, show, speed_line
    from .train import train

    options = {key: value for key, value in vars(values).items() if key != "config"}
    config = TrainConfig(**options)
    result = train(config)
    show(results_table({result.method.name: result.metrics["source_validation"]}))
    print(speed_line(result.metrics))
    if line := masks_line(result.metrics, config.method.masm):
        print(line)
    print(f"source validation only; run folder: {result.folder}")


def _eval(values: Any) -> None:
    from .config import EvalConfig
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
    from masm_ext.adapter import AdapterError

    files = (FileNotFoundError, PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError)
    return (UserError, AdapterError, *files)


if __name__ == "__main__":
    warnings.filterwarnings("default", category=UserWarning)
    sys.exit(main())
