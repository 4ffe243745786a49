"""Evaluation protocols by name: what a run must have been trained on, and the test sets that it is scored on.

A protocol is a YAML file of `masm_detect/protocols/`, or one of your own. Its keys are the fields of `Protocol`; the
data sets that it names are in `data_sets.yaml` there, or in its own `data_sets`. A word `{name}` is replaced by the
parameter of that name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from masm_detect.errors import UserError

_FOLDER = files("masm_detect") / "protocols"
_DATA_SETS = "data_sets.yaml"


class ProtocolError(UserError, ValueError):
    """A protocol that is not known or not valid, data that it lacks, or a run that was trained on something else."""


@dataclass(frozen=True)
class DataSet:
    """A data set of a protocol.

    Attributes:
        title: its name in texts
        short: its name in tables
        file: name of its JSON file, or folder, below the data root
        page: the official page
        terms: the terms under which it is given out
        json: the programs that write a JSON file of this name
        labels: {label name in the JSON: 0 real, 1 fake}
        parts: other data sets that hold the same real videos and one forgery each
    """

    title: str
    short: str
    file: str
    page: str
    terms: str
    json: str
    labels: dict[str, int] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """Where a protocol comes from: title and link of a paper or repository."""

    title: str
    link: str


@dataclass(frozen=True)
class Training:
    """What a run must have been trained on.

    Attributes:
        data: names of its data sets
        methods: exactly these forgery methods; None: any
        without: none of these methods
        compression: of the videos; None: any
        frames_per_video: one of these numbers; None: any
    """

    data: list[str]
    methods: list[str] | None = None
    without: list[str] | None = None
    compression: str | None = None
    frames_per_video: list[int] | None = None


@dataclass(frozen=True)
class TestSet:
    """One column of the results: a part of a data set.

    Attributes:
        data: name of the data set
        name: its name in the results; None: the short name of the data set
        split: the split that is read; None: all
        compression: of the videos, for JSON files with several; None: the only one
        methods: forgery methods that are read, beside the real images; None: all
        each_method: a test set for each of `methods`, each with all real images
        frames_per_video: frames kept per video, evenly spread; None: all
    """

    __test__ = False  # not a test of pytest

    data: str
    name: str | None = None
    split: str | None = None
    compression: str | None = None
    methods: list[str] | None = None
    each_method: bool = False
    frames_per_video: int | None = None


@dataclass(frozen=True)
class Protocol:
    """An evaluation protocol.

    Attributes:
        title: what it is
        source: papers or repositories that it comes from
        train: what a run must have been trained on
        test: the test sets
        metric: video_auc: AUC of videos, each scored by the mean of its frames
        data_sets: data sets that are not in the common list
        parameters: {name: what it means} of the words that the user gives
        notes: what to know
        name: of the file; not a key of it
    """

    title: str
    source: list[Source]
    train: Training
    test: list[TestSet]
    metric: Literal["video_auc"] = "video_auc"
    data_sets: dict[str, DataSet] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    name: str = ""

    def places(self, data: str) -> list[str]:
        """Files and folders below the data root in which a data set is looked for; the first that exists counts.

        Args:
            data: name of the data set.
        """
        file = self.data_sets[data].file
        stem = file.removesuffix(".json")
        json, inner = f"{stem}.json", f"{stem}/{Path(stem).name}.json"
        return [json, inner, f"{stem}/"] if file.endswith(".json") else [f"{stem}/", json, inner]

    def names(self) -> list[str]:
        """The names of the test sets, as they are in the results."""
        return [self.name_of(test) for test in self.test]

    def name_of(self, test: TestSet) -> str:
        """The name of a test set in the results.

        Args:
            test: one of `test`.
        """
        return test.name or self.data_sets[test.data].short

    def training_names(self) -> list[str]:
        """Names of data sets that count as the training data."""
        return [name for data in self.train.data for name in (data, *self.data_sets[data].parts)]


def protocol_names() -> list[str]:
    """The names of the protocols of the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in _FOLDER.iterdir()
        if entry.name.endswith(".yaml") and entry.name != _DATA_SETS
    )


def known_data_sets() -> dict[str, DataSet]:
    """The data sets of the package by name."""
    content = yaml.safe_load((_FOLDER / _DATA_SETS).read_text(encoding="utf-8"))
    return _parsed(_DataSets, {"data_sets": content}, _DATA_SETS).data_sets


def load_protocol(name: str, parameters: Mapping[str, str] | None = None) -> Protocol:
    """The protocol called `name`.

    Args:
        name: one of `protocol_names`, or a YAML file.
        parameters: the values of its parameters; None: none, and its words {parameter} stay as they are.

    Raises:
        ProtocolError: no such protocol, an unknown key, a value of the wrong type, a data set that is not known, or
            parameters that are not those of the protocol.
    """
    if name.endswith((".yaml", ".yml")):
        path, shown = Path(name), Path(name).stem
        if not path.is_file():
            raise ProtocolError(f"{path} does not exist: give a YAML file, or one of {', '.join(protocol_names())}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProtocolError(f"{path} cannot be read as UTF-8 ({error})") from error
    elif name in protocol_names():
        text, shown = (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), name
    else:
        raise ProtocolError(f"there is no protocol {name!r}: give a YAML file, or one of {', '.join(protocol_names())}")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ProtocolError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ProtocolError(f"{name} holds no protocol: it must have the keys title, source, train and test")
    if "name" in content:
        raise ProtocolError(f"{name} has the key name: a protocol has the name of its file")
    if not isinstance(content.get("parameters") or {}, dict):
        raise ProtocolError(f"{name}: parameters must be a mapping from a name to what it means")
    if parameters is not None:
        content = _filled(content, _checked(name, content.get("parameters") or {}, parameters))
    protocol = replace(_parsed(Protocol, content, name), name=shown)
    protocol = replace(protocol, data_sets={**known_data_sets(), **protocol.data_sets}, test=_expanded(protocol))
    used = {*protocol.train.data, *(test.data for test in protocol.test)}
    if unknown := sorted(used - set(protocol.data_sets)):
        raise ProtocolError(
            f"{name} names the data sets {', '.join(unknown)}, which are not known: describe them under data_sets"
        )
    names = protocol.names()
    if twice := sorted({one for one in names if names.count(one) > 1}):
        raise ProtocolError(f"{name} has two test sets called {twice[0]}: give them names")
    return protocol


def training_command(protocol: Protocol, root: str = "DATA_ROOT") -> str:
    """The `masm train` command that makes a run for the protocol, with other settings left at their defaults."""
    train = protocol.train
    paths = ", ".join(f"{root}/{protocol.data_sets[name].file}" for name in train.data)
    options = [f"--data.paths='[{paths}]'"]
    if train.methods is not None:
        options.append(f"--data.methods='[{', '.join(train.methods)}]'")
    if train.without is not None:
        options.append("--data.methods='[GENERATORS OF THE TRAINING]'")
    if train.compression is not None:
        options.append(f"--data.compression={train.compression}")
    if train.frames_per_video is not None:
        options.append(f"--data.frames_per_video={max(train.frames_per_video)}")
    return " ".join(("masm train", *options, f"--out runs/{protocol.name}"))


@dataclass(frozen=True)
class _DataSets:
    data_sets: dict[str, DataSet]


def _parsed(kind: type, content: dict[str, Any], name: str) -> Any:
    """`content` as the dataclass `kind`; a key that it does not have, or a value of another type, is an error."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        return kind(**vars(parser.instantiate(parser.parse_object(content))))
    except Exception as error:  # jsonargparse raises errors of several kinds
        raise ProtocolError(f"{name} is not a valid protocol: {' '.join(str(error).split())}") from error


def _checked(name: str, known: Mapping[str, str], given: Mapping[str, str]) -> dict[str, list[str]]:
    """Parameter -> its values, after a comparison of the given names with the known ones."""
    if set(given) != set(known):
        needs = ", ".join(f"{key} ({about})" for key, about in known.items()) or "no parameters"
        got = ", ".join(sorted(given)) or "none"
        hint = f": give {' '.join(f'--parameters.{key}=VALUE' for key in known)}" if known else ": leave them out"
        raise ProtocolError(f"the protocol {name} needs {needs}, and got {got}{hint}")
    values = {key: [part.strip() for part in str(value).split(",") if part.strip()] for key, value in given.items()}
    if empty := [key for key, value in values.items() if not value]:
        raise ProtocolError(f"the parameter {empty[0]} of the protocol {name} is empty: give a value")
    return values


def _filled(content: Any, values: Mapping[str, list[str]]) -> Any:
    """`content` with the words {parameter} replaced; one that is an item of a list becomes all its values."""
    if isinstance(content, dict):
        # what describes a parameter has its name as key
        return {
            _text(str(key), values): item if key == "parameters" else _filled(item, values)
            for key, item in content.items()
        }
    if isinstance(content, list):
        filled: list[Any] = []
        for item in content:
            word = re.fullmatch(r"\{(\w+)\}", item) if isinstance(item, str) else None
            filled += values[word[1]] if word and word[1] in values else [_filled(item, values)]
        return filled
    return _text(content, values) if isinstance(content, str) else content


def _text(text: str, values: Mapping[str, list[str]]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: ",".join(values.get(found[1], [found[0]])), text)


def _expanded(protocol: Protocol) -> list[TestSet]:
    """The test sets, with one for each method where `each_method` is set."""
    found = []
    for test in protocol.test:
        if test.each_method and test.methods:
            found += [replace(test, name=method, methods=[method], each_method=False) for method in test.methods]
        else:
            found.append(test)
    return found
