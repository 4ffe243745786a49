"""A protocol applied: its data sets found and read, runs compared with its training, results of its test sets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from masm_detect.config import EvalConfig, TrainConfig
from masm_detect.data.checks import check_samples
from masm_detect.data.sample import DatasetError, Sample, limit_frames
from masm_detect.data.samples import Samples
from masm_detect.data.sources import load_samples
from masm_detect.results import read_json

from .metrics import evaluate_scores
from .protocols import DataSet, Protocol, ProtocolError, TestSet, training_command


@dataclass(frozen=True)
class ProtocolData:
    """The samples of a protocol.

    Attributes:
        samples: of all test sets that were found; a file that several of them read is there once
        sources: where the samples of each file or folder begin and end
        places: test set -> its places among the samples
        found: test set -> its file or folder; None: missing
    """

    samples: Samples
    sources: list[slice]
    places: dict[str, np.ndarray]
    found: dict[str, Path | None]

    @property
    def paths(self) -> list[str]:
        """The files and folders that were read."""
        return list(dict.fromkeys(str(path) for path in self.found.values() if path is not None))

    @property
    def missing(self) -> list[str]:
        """The test sets that were not found."""
        return [name for name, path in self.found.items() if path is None]


def read_protocol_data(protocol: Protocol, config: EvalConfig) -> ProtocolData:
    """Read the test sets of `protocol` that are below `config.data_root`.

    Args:
        protocol: with its parameters.
        config: data_root, and root, prefix_map, missing and hf, which hold for all test sets.

    Raises:
        ProtocolError: data_root is no folder, no test set was found, or a test set lacks one of its methods.
        DatasetError: a data set cannot be read, or a test set has one class only.
    """
    root = Path(config.data_root or "")
    if not root.is_dir():
        raise ProtocolError(f"data_root is {config.data_root}, which is not a folder: give the folder of the data sets")
    found = {protocol.name_of(test): _find(root, protocol.places(test.data)) for test in protocol.test}
    if not any(found.values()):
        raise ProtocolError(
            f"no test set of the protocol {protocol.name} is in {root}: "
            + "; ".join(missing_text(protocol, name) for name in found)
        )
    sources: dict[tuple[Any, ...], list[TestSet]] = {}
    for test in protocol.test:
        if (path := found[protocol.name_of(test)]) is not None:
            key = (path, test.split, test.compression, test.frames_per_video)
            sources.setdefault(key, []).append(test)
    samples: list[Sample] = []
    slices, places, taken = [], {}, set()
    for (path, *_), tests in sources.items():
        part = _read(path, tests[0], protocol.data_sets[tests[0].data], config)
        if shared := taken & {sample.dataset for sample in part}:  # the same data set in another compression or split
            part = [
                _renamed(sample, protocol.name_of(tests[0])) if sample.dataset in shared else sample for sample in part
            ]
        taken |= {sample.dataset for sample in part}
        chosen = {protocol.name_of(test): _chosen(part, test, path) for test in tests}
        kept = np.flatnonzero(np.any(list(chosen.values()), axis=0))
        start = len(samples)
        samples += [part[place] for place in kept]
        slices.append(slice(start, len(samples)))
        places |= {name: start + np.flatnonzero(mask[kept]) for name, mask in chosen.items()}
    return ProtocolData(Samples(samples), slices, places, found)


def missing_text(protocol: Protocol, name: str) -> str:
    """Where the missing test set `name` was looked for, and what to do."""
    test = next(test for test in protocol.test if protocol.name_of(test) == name)
    data, (*others, last) = protocol.data_sets[test.data], protocol.places(test.data)
    return (
        f"{name}: looked for {', '.join(others)} and {last}; get {data.title} from {data.page} ({data.terms}), and "
        f"list its faces with {data.json}"
    )


def training_differences(protocol: Protocol, folder: Path | str, config: TrainConfig) -> list[str]:
    """How the training data of a run differ from what the protocol requires, one line each; empty: they do not.

    Args:
        protocol: with its parameters.
        folder: the run folder, whose groups.json names data sets and methods.
        config: the settings of the run.
    """
    required, trained = protocol.train, _trained_on(Path(folder), config)
    found = []
    names = "|".join(map(re.escape, sorted(protocol.training_names(), key=len, reverse=True)))
    # FF-DF.json and FF-F2F.json read together are the data set FF-DF+FF-F2F
    others = [name for name in trained.datasets if not re.fullmatch(rf"(?:{names})(?:\+(?:{names}))*", name)]
    used = {part for name in trained.datasets if name not in others for part in re.findall(names, name)}
    unused = [name for name in required.data if not used & {name, *protocol.data_sets[name].parts}]
    if others:
        place = f" instead of {_listed(unused)}" if unused else ", too"
        found.append(f"trained on the data set {_listed(others)}{place}")
    elif unused:
        found.append(f"not trained on the data set {_listed(unused)}")
    if config.data.self_blended:
        found.append("trained on self-blended images instead of the forgeries of the data")
    elif trained.methods is None:
        found.append("groups.json of the run, which an earlier version wrote, does not name its methods")
    else:
        if required.methods is not None and (extra := sorted(set(trained.methods) - set(required.methods))):
            found.append(f"trained on the methods {_listed(extra)}, too")
        if required.methods is not None and (lacking := sorted(set(required.methods) - set(trained.methods))):
            found.append(f"not trained on the methods {_listed(lacking)}")
        if required.without is not None and (seen := sorted(set(trained.methods) & set(required.without))):
            found.append(f"trained on the methods {_listed(seen)}, which are to be unseen")
    if required.compression is not None and trained.compression != [required.compression]:
        levels = _listed(trained.compression) if trained.compression else "an unknown compression"
        found.append(f"trained on {levels} instead of {required.compression}")
    if required.frames_per_video is not None and trained.frames not in required.frames_per_video:
        frames = "an unknown number of" if trained.frames is None else trained.frames
        allowed = " or ".join(map(str, required.frames_per_video))
        found.append(f"trained on {frames} frames per video instead of {allowed}")
    return found


def require_training(protocol: Protocol, differences: Mapping[str, Sequence[str]]) -> None:
    """Raise ProtocolError if a run, by its name, was not trained as the protocol requires."""
    for run, different in differences.items():
        if different:
            raise ProtocolError(
                f"{run} does not fit the protocol {protocol.name}: {'; '.join(different)}. Train a run for it "
                f"(`{training_command(protocol)}`), or evaluate this one with --other_training, which marks its results"
            )


def protocol_results(
    protocol: Protocol,
    data: ProtocolData,
    scores: Mapping[str, np.ndarray],
    differences: Mapping[str, Sequence[str]],
    video_key: str,
) -> dict[str, Any]:
    """The part "protocol" of results.json.

    Args:
        protocol: with its parameters.
        data: its samples, n of them.
        scores: run -> P(fake) of each sample, [n].
        differences: run -> `training_differences`.
        video_key: as of `metrics.evaluate_scores`.

    Returns:
        {"name", "title", "source", "metric", "train", "notes", "test_sets": {name: {"data", "split", "compression",
        "methods", "frames_per_video", "page", "terms", "found": its file or folder below the data root, or None}},
        "missing": {name: what to do}, "complete": no test set is missing, "runs": {run: {"differences", "test_sets":
        {name: numbers of `metrics.evaluate_scores`, or None}, "mean": mean of the metric over the test sets that were
        evaluated, "n_test_sets": how many these are, "of_test_sets": how many the protocol has}}}. The mean is None
        where the metric of no test set is defined.
    """
    names = protocol.names()
    runs = {}
    for run, values in scores.items():
        numbers = {name: _numbers(name, data, values, video_key) if name in data.places else None for name in names}
        defined = [n[protocol.metric] for n in numbers.values() if n is not None and n[protocol.metric] is not None]
        runs[run] = {
            "differences": list(differences[run]),
            "test_sets": numbers,
            "mean": float(np.mean(defined)) if defined else None,
            "n_test_sets": len(defined),
            "of_test_sets": len(names),
        }
    tests = {}
    for test in protocol.test:
        about, path = protocol.data_sets[test.data], data.found[protocol.name_of(test)]
        tests[protocol.name_of(test)] = {
            **{name: value for name, value in asdict(test).items() if name not in ("name", "each_method")},
            "page": about.page,
            "terms": about.terms,
            "found": None if path is None else path.name,
        }
    return {
        "name": protocol.name,
        "title": protocol.title,
        "source": [asdict(source) for source in protocol.source],
        "metric": protocol.metric,
        "train": asdict(protocol.train),
        "notes": protocol.notes,
        "test_sets": tests,
        "missing": {name: missing_text(protocol, name) for name in data.missing},
        "complete": not data.missing,
        "runs": runs,
    }


def _numbers(name: str, data: ProtocolData, scores: np.ndarray, video_key: str) -> dict[str, Any]:
    """The metrics of one test set, all its data sets and methods together."""
    places = data.places[name]
    samples = [replace(data.samples[int(place)], dataset=name) for place in places]
    return evaluate_scores(samples, scores[places], video_key)["datasets"][name]["all"]


def _find(root: Path, places: Sequence[str]) -> Path | None:
    for place in places:
        path = root / place
        if path.is_dir() if place.endswith("/") else path.is_file():
            return path
    return None


def _read(path: Path, test: TestSet, about: DataSet, config: EvalConfig) -> list[Sample]:
    samples = load_samples(
        [str(path)],
        splits=None if test.split is None else [test.split],
        root=config.root,
        prefix_map=config.prefix_map,
        compression=test.compression,
        label_map=about.labels or None,
        missing=config.missing,
        hf=config.hf,
    )
    samples = limit_frames(samples, test.frames_per_video)
    check_samples(samples)
    return samples


def _chosen(samples: Sequence[Sample], test: TestSet, path: Path) -> np.ndarray:
    """Which samples belong to a test set, bool [n]."""
    present = {sample.method for sample in samples if sample.label == 1}
    if absent := sorted(set(test.methods or ()) - present):
        raise ProtocolError(
            f"{path} has no forgery {_listed(absent)} in its test set; it has {_listed(sorted(present))}"
        )
    chosen = np.array([s.label == 0 or test.methods is None or s.method in test.methods for s in samples])
    if len({sample.label for sample, keep in zip(samples, chosen) if keep}) == 1:
        raise DatasetError(f"{path} holds one class only, and an AUC needs both")
    return chosen


def _renamed(sample: Sample, dataset: str) -> Sample:
    """`sample` in a data set of another name; its group, by which training data are known, stays."""
    return replace(sample, dataset=dataset, video=f"{dataset}/{sample.video.split('/', 1)[1]}", group=sample.group)


@dataclass(frozen=True)
class _Trained:
    datasets: list[str]
    methods: list[str] | None
    compression: list[str]
    frames: int | None


def _trained_on(folder: Path, config: TrainConfig) -> _Trained:
    """Data sets, methods (None: unknown), compressions and frames per video of the training of a run."""
    path = folder / "groups.json"
    recorded = read_json(path).get("train_data") if path.is_file() else None
    data = config.data
    given = [] if data.compression is None else [data.compression]
    if recorded is None:  # a run of an earlier version
        return _Trained([Path(p).stem for p in data.paths], data.methods, given, data.frames_per_video)
    return _Trained(
        list(recorded),
        sorted({method for entry in recorded.values() for method in entry["methods"]}),
        given or sorted({level for entry in recorded.values() for level in entry["compression"]}),
        data.frames_per_video or max(entry["images_per_video"] for entry in recorded.values()),
    )


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words)
