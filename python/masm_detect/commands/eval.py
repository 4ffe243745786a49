"""`masm eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser

from .arguments import add_config_file, options_of

HELP = "score trained runs on data sets, or evaluate score files"


def add_arguments(parser: ArgumentParser) -> None:
    """The runs, the data, and the other fields of `config.EvalConfig`."""
    from masm_detect.config import EvalConfig

    add_config_file(parser)
    # by another name than the setting: a positional argument that is not given would empty the list of a config file
    parser.add_argument("run", nargs="*", type=str, default=[], help="run folders written by `masm train`")
    parser.add_argument(
        "--data",
        nargs="+",
        type=str,
        default=[],
        help="DeepfakeBench JSON files, folders with real/ and fake-<method>/, or Hugging Face data sets (hf:...)",
    )
    parser.add_argument(
        "--scores",
        nargs="+",
        type=str,
        default=[],
        help="score files (CSV) of any program, with the columns file, label and p_fake or logit; need no run, no data",
    )
    parser.add_argument(
        "--overwrite", action=ActionYesNo, nargs="?", default=False, help="replace the results that out already holds"
    )
    parser.add_argument(
        "--list_protocols",
        "--list-protocols",
        action=ActionYesNo,
        nargs="?",
        default=False,
        help="print the protocols, with the training that each requires and where its data come from, and stop",
    )
    parser.add_argument(
        "--data_root",
        "--data-root",
        type=str | None,
        default=None,
        help="with a protocol: the folder that holds its data sets, each as a JSON file or folder of its name",
    )
    switches = {
        "as_is": "do not compare how the images were cut with how the training images of the run were (crops.json)",
        "other_training": "with a protocol: evaluate a run that was not trained as the protocol requires, too; its "
        "results are marked",
    }
    for name, about in switches.items():
        parser.add_argument(f"--{name}", action=ActionYesNo, nargs="?", default=False, help=about)
    parser.add_class_arguments(EvalConfig, skip={"paths", "scores", "overwrite", "data_root", *switches})


def run(values: Any) -> int:
    """Evaluate, and print the results table; 3 if a test set of the protocol is missing."""
    from masm_detect.commands.main import FILES_SKIPPED
    from masm_detect.config import EvalConfig
    from masm_detect.evaluation.evaluate import evaluate
    from masm_detect.report.protocol import missing_lines, protocol_table, protocol_warnings
    from masm_detect.report.tables import results_table, show

    options = options_of(values)
    if options.pop("list_protocols"):
        print(protocols_text())
        return 0
    # `--data X RUN` gives --data both: a folder with a run's files is no data set
    data = options.pop("data")
    options["runs"] = [*options["runs"], *options.pop("run"), *(path for path in data if _is_run(path))]
    config = EvalConfig(paths=[path for path in data if not _is_run(path)], **options)
    content = evaluate(config)
    show(results_table(content["runs"]))
    protocol = content["protocol"]
    if protocol is not None:
        print(f"protocol {protocol['name']}: {protocol['title']}; AUC of videos")
        show(protocol_table(protocol))
        for line in (*protocol_warnings(protocol), *missing_lines(protocol)):
            print(line)
    print(f"written: {config.out}/report.html, results.json, auc.png, and scores.csv and videos.csv of each run")
    return FILES_SKIPPED if protocol is not None and not protocol["complete"] else 0


def protocols_text() -> str:
    """The protocols of the package: training, command, test sets, sources, and where the data come from."""
    from masm_detect.evaluation.protocols import known_data_sets, load_protocol, protocol_names, training_command

    lines = []
    for name in protocol_names():
        protocol = load_protocol(name)
        lines += [f"{name}: {protocol.title}", f"  train: {training_command(protocol)}"]
        lines.append(f"  test: {', '.join(protocol.names())}; mean AUC of videos")
        lines += [f"  parameter {key}: {about}" for key, about in protocol.parameters.items()]
        lines += [f"  source: {source.title}, {source.link}" for source in protocol.source]
        lines += [f"  note: {note}" for note in protocol.notes]
    lines += ["", "data sets, which are not downloaded:"]
    lines += [f"  {data.short}: {data.file}; {data.page} ({data.terms})" for data in known_data_sets().values()]
    return "\n".join(lines)


def _is_run(path: str) -> bool:
    return (Path(path) / "config.yaml").is_file() and not (Path(path) / "real").exists()
