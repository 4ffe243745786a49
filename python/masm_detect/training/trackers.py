"""Experiment trackers (TensorBoard, Weights & Biases, Trackio), through `accelerate.tracking`; off by default.

`loop.fit` calls `Trackers`; only the first process has any. What is sent after an epoch is computed from its entry in
`history.jsonl` alone. A tracker that fails is dropped with one warning: training does not depend on it.
"""

from __future__ import annotations

import json
import os
import re
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from masm_detect.errors import ConfigError
from masm_detect.results import ResultError, read_json, write_json

from .step_losses import StepLoss

#: Name of the project that the run belongs to, where a tracker has projects; WANDB_PROJECT goes before it.
PROJECT = "masm"
#: Holds the identity under which a resumed run continues in the trackers.
RECORD = "trackers.json"
#: Scalar of an epoch -> its field in `history.jsonl`.
EPOCH_FIELDS = {
    "train/loss": "train_loss",
    "train/penalty": "penalty",
    "val/auc": "val_auc",
    "val/loss": "val_loss",
    "masks/active": "active_fraction",
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if a tracker has no class in accelerate, or its package is not installed."""
    if not names:
        return
    known, installed = _tracker_classes()
    for name in names:
        if name not in known:
            raise ConfigError(
                f"runtime.trackers has {name!r}, which is no tracker of the installed accelerate; give some of "
                f"{', '.join(sorted(known))}"
            )
        if name not in installed:
            raise ConfigError(f"runtime.trackers has {name!r}, whose package is not installed: pip install {name}")


def _tracker_classes() -> tuple[dict[str, Any], set[str]]:
    """Name -> class of all trackers of accelerate, and the names of those whose package is installed."""
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
        from accelerate.utils import LoggerType
    except ImportError as error:
        raise ConfigError("runtime.trackers needs accelerate 1.10 or newer: pip install accelerate") from error
    installed = {LoggerType(kind).value for kind in get_available_trackers()}
    # A class of the user's own (accelerate.tracking.register_tracker_class) needs no package that accelerate knows.
    own = set(LOGGER_TYPE_TO_CLASS) - {kind.value for kind in LoggerType}
    return dict(LOGGER_TYPE_TO_CLASS), installed | own


def epoch_scalars(entry: dict[str, Any]) -> dict[str, float]:
    """The scalars of one epoch.

    Args:
        entry: one line of `history.jsonl`.

    Returns:
        Name -> number; what the method does not have (masks, drift) is absent.
    """
    scalars = {name: entry[field] for name, field in EPOCH_FIELDS.items() if field in entry}
    for number, share in enumerate(entry.get("active_by_subspace", ())):
        scalars[f"masks/active/subspace-{number}"] = share
    if drift := list(entry.get("drift", {}).values()):
        scalars |= {"drift/mean": sum(drift) / len(drift), "drift/largest": max(drift)}
    if entry["seconds"]:
        scalars["train/images_per_second"] = entry["images"] / entry["seconds"]
    return scalars


def hyperparameters(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of `config.yaml` as one flat dict, as trackers take them.

    Lists become JSON. Absolute paths are reduced to their last part; relative paths are kept.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= hyperparameters({_without_folders(k): v for k, v in value.items()}, f"{name}.")
        elif isinstance(value, (dict, list, tuple)):
            flat[name] = json.dumps([_without_folders(item) for item in value])
        else:
            flat[name] = _without_folders(value)
    return flat


def _without_folders(value: Any) -> Any:
    """The last part of an absolute path (of a path after `hf:`, too), also inside lists and mappings."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(item) for item in value]
    kind, path = (
        re.fullmatch(r"(hf:|open_clip:)?(.*)", value, re.DOTALL).groups("") if isinstance(value, str) else ("", "")
    )
    if not path.startswith(("/", "~", "\\\\")) and not re.match(r"[A-Za-z]:[\\/]", path):
        return value
    return kind + re.split(r"[\\/]", path.rstrip("\\/"))[-1]


class Trackers:
    """The trackers of a run; without names, no call does anything.

    Args:
        names: of `accelerate.tracking`, checked by `check_trackers`.
        every: steps between two entries of the training loss.
        folder: the run folder.
        config: the settings of the run, as plain dicts.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        every: int = 50,
        folder: Path | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self._names, self._every, self._folder, self._config = names, every, folder, config or {}
        self._running: dict[str, Any] = {}

    @contextmanager
    def running(self, step: int) -> Iterator[None]:
        """Context in which the trackers are open. A resumed run continues what it tracked before.

        Args:
            step: number of completed steps.
        """
        if not self._names:
            yield
            return
        try:
            resumed, identity = self._identity()
        except (ResultError, KeyError, TypeError) as error:
            resumed, identity = False, uuid.uuid4().hex[:8]
            warnings.warn(
                f"{self._folder / RECORD} cannot be read ({error}); the trackers start a new run", stacklevel=2
            )
        with _accelerate_state():
            classes, _ = _tracker_classes()
            for name in self._names:
                self._guarded(name, self._start, classes[name], resumed, identity, step)
            try:
                yield
            finally:
                self._each(lambda tracker: tracker.finish())
                self._running.clear()

    def steps(self, losses: Iterable[StepLoss], rates: Callable[[int], dict[str, float]]) -> None:
        """Send task loss, penalty and learning rates of every `every`-th step.

        Args:
            losses: of the steps whose losses have arrived.
            rates: number of a step -> name of a parameter group -> its learning rate.
        """
        for loss in losses:
            if self._running and (loss.step + 1) % self._every == 0:
                scalars = {"step/loss": loss.task, "step/penalty": loss.penalty}
                scalars |= {f"lr/{name}": rate for name, rate in rates(loss.step).items()}
                self._log(scalars, loss.step + 1)

    def epoch(self, entry: dict[str, Any]) -> None:
        """Send the scalars of an epoch; `entry` is its line of `history.jsonl`."""
        if self._running:
            self._log(epoch_scalars(entry), entry["step"])

    def _identity(self) -> tuple[bool, str]:
        """Whether this run was tracked before, and its identity there."""
        path = self._folder / RECORD
        if path.is_file():
            return True, read_json(path)["id"]
        identity = uuid.uuid4().hex[:8]
        write_json(path, {"id": identity})
        return False, identity

    def _start(self, name: str, kind: Any, resumed: bool, identity: str, step: int) -> None:
        project, options = PROJECT, {}
        if name == "tensorboard":  # the files lie in tensorboard/ itself; entries after the checkpoint are discarded
            project, options = "", {"purge_step": step + 1} if resumed else {}
        elif name == "wandb":
            project = os.environ.get("WANDB_PROJECT", PROJECT)
            options = {"id": identity, "name": self._folder.name, "dir": str(self._folder), "resume": "allow"}
        elif name == "trackio":  # runs are known by their name
            options = {"name": f"{self._folder.name}-{identity}", "resume": "allow"}
        elif resumed:
            warnings.warn(f"runtime.trackers: {name} shows the resumed part of the run as a new run", stacklevel=2)
        place = [str(self._folder / name)] if kind.requires_logging_directory else []
        tracker = kind(project, *place, **options)
        tracker.start()
        self._running[name] = tracker
        if name != "tensorboard" or not resumed:  # it would add another table entry for the same settings
            tracker.store_init_configuration(hyperparameters(self._config))

    def _log(self, scalars: dict[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(scalars, step=step))

    def _each(self, call: Callable[[Any], None]) -> None:
        for name, tracker in list(self._running.items()):
            self._guarded(name, lambda _, tracker=tracker: call(tracker))

    def _guarded(self, name: str, call: Callable[..., None], *arguments: Any) -> None:
        """Call; a tracker that fails is dropped with a warning."""
        try:
            call(name, *arguments)
        except Exception as error:
            self._running.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            warnings.warn(f"{name} failed ({reason}); training goes on without this tracker", stacklevel=2)


@contextmanager
def _accelerate_state() -> Iterator[None]:
    """Context with the state of processes that accelerate's trackers ask for; that of several processes exists."""
    from accelerate import PartialState
    from accelerate.utils import patch_environment

    if PartialState._shared_state:
        yield
        return
    # torchrun with one process sets LOCAL_RANK, and accelerate would start a process group and change torch's threads.
    with patch_environment(local_rank="-1"):
        PartialState(cpu=True)
    try:
        yield
    finally:
        PartialState._reset_state()  # or an Accelerator that this process makes later would stay on the CPU
