"""A study from its YAML file: what is trained on which forgeries, with which settings and seeds, and in which order.

A run is one training of one variant (a method with its settings) in one direction (the forgeries that it is trained
on) with one seed. Its key names all of that and holds a hash of the settings that differ from `unnamed_settings.json`.
So a changed setting is another run, a new option of the program is not, and runs that have a result file are not
computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from masm_detect.config import AugmentConfig, ConfigError, DataConfig, MasmOptions, MethodConfig, OptimConfig
from masm_detect.methods.build import resolve
from masm_detect.methods.registry import load
from masm_detect.results import read_json
from study_data import DATASETS

HERE = Path(__file__).resolve().parent


STAGES = ("grid", "final", "factorial", "controls")
#: The baseline without a network: logistic regression on the image's radial spectrum.
SPECTRUM = "spectrum"


class GridIncomplete(ConfigError):
    """Settings cannot be chosen yet: runs of the grid are missing."""


@dataclass(frozen=True)
class Direction:
    """Forgeries that are trained on and validated (`seen`), and forgeries of the test only (`unseen`)."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How many images and tiles a run takes; a seed draws them from the pool.

    Attributes:
        train, val: real images, and as many fakes, shared among the seen forgeries
        train_tiles, test_tiles: tiles of an image, in training and validation, and in the test
        self_blended: fakes of training and validation are made from the real images by self-blending
        shuffled: labels of training are shuffled: nothing can be learned
    """

    train: int
    val: int
    train_tiles: int = 1
    test_tiles: int = 1
    self_blended: bool = False
    shuffled: bool = False


@dataclass(frozen=True)
class Study:
    """A study as its file describes it.

    Attributes:
        variants: name -> settings by their names in `masm train`; `like` starts from another variant
        grid: the direction and seed, and for every variant the settings to choose from
        stages: name -> the directions, seeds and variants of a stage
        precision: of training and scoring, "fp32" or "bf16"
        settings_from: the study whose variants are known here too, and whose grid chooses; None: this one
        reference: the variant that is compared with all others; None: no comparison
    """

    name: str
    title: str
    caution: str
    dataset: str
    backbone: str
    image_size: int
    sampling: Sampling
    augment: AugmentConfig
    optim: OptimConfig
    directions: dict[str, Direction]
    variants: dict[str, dict[str, Any]]
    grid: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    precision: str = "fp32"
    settings_from: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Run:
    """One training run, with everything that decides its outcome."""

    study: str
    dataset: str
    backbone: str
    image_size: int
    direction: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    variant: str
    seed: int
    method: MethodConfig | None
    sampling: Sampling
    augment: AugmentConfig
    optim: OptimConfig
    precision: str

    @property
    def key(self) -> str:
        """`direction--variant--hash--seedN`, the name of the result file."""
        settings = json.dumps(_without(self.settings(), UNNAMED), sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        return f"{self.direction}--{self.variant}--{digest}--seed{self.seed}"

    def settings(self) -> dict[str, Any]:
        """All settings that the run reads, as JSON holds them."""
        values = {name: value for name, value in asdict(self).items() if name not in ("variant", "seed")}
        if self.method is not None and not load(self.method.name).uses_masm_ext:
            del values["method"]["masm"]
        return json.loads(json.dumps(values))


#: What a setting is where a key or an older result does not name it. Unlike the defaults of the program these never
#: change; a new setting is added with the value at which it does nothing.
UNNAMED: dict[str, Any] = read_json(HERE / "unnamed_settings.json")


def _without(settings: Any, defaults: Any) -> Any:
    """The settings that are not those of `defaults`."""
    if not isinstance(settings, dict) or not isinstance(defaults, dict):
        return settings
    kept = {name: _without(value, defaults.get(name)) for name, value in settings.items()}
    return {name: value for name, value in kept.items() if value != {} and settings[name] != defaults.get(name, ...)}


def changed(stored: Any, now: Any, defaults: Any = UNNAMED, name: str = "") -> list[str]:
    """The settings in which a stored result and a run differ. One that the result does not have is that of UNNAMED."""
    if isinstance(stored, dict) and isinstance(now, dict):
        below = defaults if isinstance(defaults, dict) else {}
        parts = (
            changed(stored.get(key, below.get(key)), value, below.get(key), f"{name}.{key}" if name else key)
            for key, value in now.items()
        )
        return [line for part in parts for line in part]
    return [] if stored == now else [f"{name} was {stored!r}, is {now!r}"]


def read_study(name: str, folder: Path = HERE / "studies") -> Study:
    """The study in `folder/name.yaml`.

    Raises:
        ConfigError: the file is absent, or holds an unknown or impossible setting.
    """
    file = folder / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"there is no study {name!r} ({file} is absent); there are {known}")
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        directions = {
            key: Direction(**{side: tuple(names) for side, names in value.items()})
            for key, value in content.pop("directions").items()
        }
        parts = {"sampling": Sampling, "augment": AugmentConfig, "optim": OptimConfig}
        values = {key: made(**content.pop(key, {})) for key, made in parts.items()}
        if content.get("settings_from"):
            theirs, own = read_study(content["settings_from"], folder).variants, content.get("variants", {})
            if both := sorted(set(theirs) & set(own)):
                raise ConfigError(f"{file}: {content['settings_from']} has variants {', '.join(both)} too: rename them")
            content["variants"] = theirs | own
        study = Study(name=name, directions=directions, **values, **content)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{file}: {error}") from error
    if study.precision not in ("fp32", "bf16"):
        raise ConfigError(f"{file}: precision is {study.precision!r}, not fp32 or bf16")
    if study.dataset not in DATASETS:
        raise ConfigError(f"{file}: there is no data set {study.dataset!r}; there are {', '.join(DATASETS)}")
    _check_names(study, file)
    return study


def _check_names(study: Study, file: Path) -> None:
    """Every name that a study uses is known: a misspelled one would be a run that is never made."""
    used = [("stage", name, STAGES) for name in study.stages]
    used += [("part of a grid", name, ("direction", "seed", "settings")) for name in study.grid]
    used += [("direction", study.grid["direction"], study.directions)] if "direction" in study.grid else []
    used += [("variant", name, study.variants) for name in study.grid.get("settings", {})]
    for stage, plan in study.stages.items():
        if not plan or not plan.get("seeds") or not plan.get("variants"):
            raise ConfigError(f"{file}: the stage {stage!r} needs seeds and variants, got {plan}")
        own = [settings.get("seeds", ()) for settings in plan["variants"].values() if settings]
        used += [(f"seed of the stage {stage!r}", seed, plan["seeds"]) for seeds in own for seed in seeds]
        used += [("part of a stage", name, ("seeds", "directions", "variants")) for name in plan]
        used += [("direction", name, study.directions) for name in plan.get("directions", ())]
        used += [("variant", name, study.variants) for name in plan.get("variants", ())]
    used += [("variant", study.reference, study.variants)] if study.reference is not None else []
    for kind, name, known in used:
        if name not in known:
            raise ConfigError(f"{file}: there is no {kind} {name!r}; there are {', '.join(map(str, known))}")


def runs_of(study: Study, stage: str, results: Path, waiting: set[str] | None = None) -> Iterator[Run]:
    """The runs of a stage, in their order. Settings that the grid chooses come from the results it has so far.

    waiting: receives the variants whose grid is not complete, and which are left out; None: they raise GridIncomplete.
    """
    if stage == "grid":
        for variant, settings in study.grid.get("settings", {}).items():
            for one in settings:
                yield make_run(study, study.grid["direction"], variant, study.grid["seed"], one)
        return
    plan = study.stages.get(stage, {})
    for seed in plan.get("seeds", ()):
        for direction in plan.get("directions", study.directions):
            for variant, settings in plan.get("variants", {}).items():
                settings = dict(settings or {})
                if seed not in settings.pop("seeds", [seed]):
                    continue
                try:
                    yield make_run(study, direction, variant, seed, settings, chosen=results)
                except GridIncomplete:
                    if waiting is None:
                        raise
                    waiting.add(variant)


def make_run(
    study: Study, direction: str, variant: str, seed: int, settings: Mapping[str, Any], chosen: Path | None = None
) -> Run:
    """One run: the study's defaults, then the variant's settings, then (`chosen`: the folder of results) those that the
    grid chose for it, then `settings`.
    """
    if variant not in study.variants:
        raise ConfigError(f"study {study.name}: there is no variant {variant!r}")
    own = dict(study.variants[variant])
    base = own.pop("like", variant)
    if base not in study.variants:
        raise ConfigError(f"study {study.name}: {variant} is like {base!r}, and there is no such variant")
    if direction not in study.directions:
        raise ConfigError(f"study {study.name}: there is no direction {direction!r}")
    merged = dict(study.variants[base])
    if "like" in merged:
        raise ConfigError(f"study {study.name}: {variant} is like {base}, which is like another itself: name that one")
    if chosen is not None:
        merged |= chosen_settings(study, base, chosen)
    merged |= own if base != variant else {}
    merged |= settings
    parts: dict[str, dict[str, Any]] = {"method": {}, "masm": {}, "optim": {}, "sampling": {}, "augment": {}}
    for name, value in merged.items():
        part, _, field_name = name.rpartition(".")
        if part not in parts:
            raise ConfigError(f"study {study.name}, {variant}: unknown setting {name!r}; parts are {', '.join(parts)}")
        parts[part][field_name] = value
    try:
        return _run(study, direction, variant, seed, parts)
    except TypeError as error:  # an unknown field, or a text where a number belongs (YAML reads 1e-3 as a text)
        raise ConfigError(f"study {study.name}, {variant}: {error}; settings are {merged}") from error


def _run(study: Study, direction: str, variant: str, seed: int, parts: Mapping[str, dict[str, Any]]) -> Run:
    method = None
    if parts["method"].get("name") != SPECTRUM:
        method = resolve(MethodConfig(**parts["method"], masm=MasmOptions(**parts["masm"])))
    where = study.directions[direction]
    return Run(
        study=study.name,
        dataset=study.dataset,
        backbone=study.backbone,
        image_size=study.image_size,
        direction=direction,
        seen=where.seen,
        unseen=where.unseen,
        variant=variant,
        seed=seed,
        method=method,
        sampling=replace(study.sampling, **parts["sampling"]),
        augment=replace(study.augment, **parts["augment"]),
        optim=replace(study.optim, **parts["optim"]),
        precision=study.precision,
    )


def chosen_settings(study: Study, variant: str, results: Path) -> dict[str, Any]:
    """The settings of the grid with the best source validation of `variant`; none if it has no grid.

    Raises:
        ConfigError: the grid of this variant is not complete.
    """
    source = study if study.settings_from is None else read_study(study.settings_from)
    settings = source.grid.get("settings", {}).get(variant)
    if not settings:
        return {}
    found = []
    for one in settings:
        run = make_run(source, source.grid["direction"], variant, source.grid["seed"], one)
        result = stored_result(run, results)
        if result is None:
            raise GridIncomplete(
                f"the grid of {variant} in study {source.name} is not complete: run its stage grid first"
            )
        found.append((result["val_auc"], one))
    return max(found, key=lambda pair: pair[0])[1]


def result_file(run: Run, results: Path) -> Path:
    """Where the result of a run is, or will be."""
    return results / run.study / f"{run.key}.json"


def stored_result(run: Run, results: Path, tested: bool = False) -> dict[str, Any] | None:
    """The result of a run; None if there is none, or, with `tested`, if the run was not tested.

    Raises:
        ConfigError: its settings are not those that its key stands for.
    """
    file = result_file(run, results)
    if not file.is_file():
        return None
    result = read_json(file)
    if differences := changed(result["settings"], run.settings()):
        raise ConfigError(f"{file} was made with other settings than its key says: {'; '.join(differences)}")
    return None if tested and "auc" not in result else result


def data_config(run: Run) -> DataConfig:
    """How the tiles of a run become tensors."""
    return DataConfig(crop="center", augment=run.augment)
