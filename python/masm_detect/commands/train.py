"""`masm train`."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser

from masm_detect.config_files import older_arguments

from .arguments import add_config_file, add_flag, options_of

HELP = "train a detector; writes a run folder"


def add_arguments(parser: ArgumentParser) -> None:
    """The fields of `config.TrainConfig`."""
    from masm_detect.config import TrainConfig

    add_config_file(parser)
    parser.add_argument(
        "--recipe",
        type=str | None,
        default=None,
        help="start from the published settings of a method (effort, gend, fmsd); give data.paths and out with it",
    )
    add_flag(parser, "list_recipes", "print the recipes, their sources and what differs from these, and stop")
    parser.add_class_arguments(TrainConfig, skip={"resume"})
    parser.add_argument(
        "--resume", action=ActionYesNo, nargs="?", default=False, help="continue the interrupted run in --out"
    )


def complete(arguments: list[str]) -> list[str]:
    """The arguments of `masm train`, with the config files that other options stand for.

    A recipe is a config file in the package. With `--resume`, the config file of the run in `--out` is inserted first,
    so that `--out` and `--resume` suffice; any other setting must equal that of the run.
    """
    arguments = _with_recipe(arguments)
    if not any(word.partition("=")[0] == "--resume" and word != "--resume=false" for word in arguments):
        return arguments
    places = [i for i, word in enumerate(arguments) if word.partition("=")[0] == "--out"]
    if not places:
        return arguments
    _, equals, out = arguments[places[-1]].partition("=")
    out = out if equals else (arguments[places[-1] + 1 : places[-1] + 2] or [""])[0]
    config = os.path.join(out, "config.yaml")
    if not os.path.isfile(config):
        return arguments
    return ["--config", config, *older_arguments(Path(config)), *arguments]


def _with_recipe(arguments: list[str]) -> list[str]:
    """`--recipe NAME` as `--config FILE`; what follows it on the command line is set over it."""
    out, rest = [], iter(arguments)
    for word in rest:
        option, equals, name = word.partition("=")
        if option == "--recipe":
            name = name if equals else next(rest, "")
            recipes = _recipes()
            if name not in recipes:
                raise ArgumentError(None, f"there is no recipe {name!r}; the recipes are {', '.join(recipes)}")
            out += ["--config", str(recipes[name])]
        else:
            out.append(word)
    return out


def _recipes() -> dict[str, Path]:
    """Name -> config file of the package, in alphabetical order."""
    return {path.stem: path for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))}


def recipes_text() -> str:
    """The recipes of the package: the comment at the head of each file, which names sources and differences."""
    lines = []
    for name, path in _recipes().items():
        head = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        lines += [f"{name}:", *(f"  {line[2:]}".rstrip() for line in head), f"  file: {path}", ""]
    return "\n".join(lines).rstrip()


def run(values: Any) -> None:
    """Train, and print the source-validation table and the throughput."""
    from masm_detect.config import TrainConfig
    from masm_detect.report.tables import masks_line, results_table, show, speed_line
    from masm_detect.training.run import train

    options = options_of(values)
    options.pop("recipe")  # `complete` has put its file in its place
    if options.pop("list_recipes"):
        print(recipes_text())
        return
    config = TrainConfig(**options)
    result = train(config)
    show(results_table({result.method.name: result.metrics["source_validation"]}))
    print(speed_line(result.metrics))
    if line := masks_line(result.metrics, config.method.masm):
        print(line)
    print(f"these numbers are of the validation split; run folder: {result.folder} (score it with masm eval)")
