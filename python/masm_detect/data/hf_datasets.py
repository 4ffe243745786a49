"""Reads a Hugging Face data set (`hf:FOLDER` or `hf:NAME`): columns become samples, the images stay where they are.

Only data sets with rows in a fixed order are read, from disk: the order of an epoch and a resumed run need every row by
its number. A data set of the hub is therefore downloaded once, and streaming is not offered.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from masm_detect.config import HfConfig
from masm_detect.data.deepfakebench import label_of, split_of
from masm_detect.data.groups import with_name_groups
from masm_detect.data.hf_images import PREFIX, Source, images_of, open_source
from masm_detect.data.sample import DatasetError, Sample

#: label_map of truth values, and of numbers.
_EXAMPLE = ('{"True": 1, "False": 0}', '{"0": 0, "1": 1}')


def read_huggingface(
    path: str,
    columns: HfConfig | None = None,
    label_map: dict[str, int] | None = None,
    *,
    dataset: str | None = None,
) -> list[Sample]:
    """Samples of a Hugging Face data set, in the order of its rows.

    An image that is a file of its own keeps its path; one that is stored in the data set gets a key
    (`hf_images.Source.key`).

    Args:
        path: "hf:" and a folder (images, parquet or arrow files, or what `save_to_disk` wrote) or a hub name.
        columns: which columns to read; None: the defaults of `HfConfig`.
        label_map: {label: 0 (real) or 1 (fake)}, used before the known label names.
        dataset: name of the data set; None: that of the folder, or the hub name without its owner.

    Raises:
        DatasetError: it cannot be opened, a column or a value is missing, or a label or split is not known.
    """
    columns = columns or HfConfig()
    name = path.removeprefix(PREFIX)
    if not name or "?" in name:
        raise DatasetError(f"{path}: expected hf: and a folder or the name of a data set, without a question mark")
    source = Source(name, columns.subset, columns.image)
    dataset = dataset or (Path(name).resolve().name if Path(name).is_dir() else Path(name).name)
    samples: list[Sample] = []
    known: set[str] = set()
    for split, rows in open_source(source).items():
        where = f"{path}, split {split}"
        table = _columns(rows, columns, where)
        known |= set(table)
        samples += _samples(table, source, split, dataset, label_map, where)
    if "video" in known and "group" not in known:
        return with_name_groups(samples)
    if not known & {"video", "group"}:
        warnings.warn(
            f"{path} has neither a column video nor a column group: every image counts as a video and a group of its "
            "own, so that images of one video or person may be in training and in validation; name the column with "
            "--data.hf.group or --data.hf.video (masm eval: --hf.group, --hf.video)",
            stacklevel=3,
        )
    return samples


def _columns(rows: Any, columns: HfConfig, where: str) -> dict[str, list[Any]]:
    """Role (label, method, video, group, split) -> the values of its column; roles without a column are left out."""
    names = {role: getattr(columns, role) for role in ("image", "label", "method", "video", "group", "split")}
    for role, name in names.items():
        if name is not None and name not in rows.column_names:
            raise DatasetError(
                f"{where} has no column {name!r}, it has {rows.column_names}: name the column of the {role} with "
                f"--data.hf.{role} (masm eval: --hf.{role})"
            )
    for role in ("method", "video", "group"):
        if names[role] is None and role in rows.column_names:
            names[role] = role
    used = {role: name for role, name in names.items() if name is not None and role != "image"}
    table = rows.select_columns(sorted(set(used.values()))).with_format(None)[:]
    values = {role: table[name] for role, name in used.items()}
    for role, name in used.items():
        if class_names := getattr(rows.features[name], "names", None):  # of a ClassLabel
            values[role] = [None if n is None or n < 0 else class_names[n] for n in values[role]]
    for role, column in values.items():
        if role != "method" and None in column:  # a real image needs no method
            raise DatasetError(f"{where}, row {column.index(None)} has no value in the column {used[role]!r}")
    return values


def _samples(
    table: dict[str, list[Any]],
    source: Source,
    split: str,
    dataset: str,
    label_map: dict[str, int] | None,
    where: str,
) -> list[Sample]:
    """The samples of one split of the data set; `table`: as of `_columns`."""
    labels = {name: _label(name, label_map, where) for name in dict.fromkeys(map(str, table["label"]))}
    splits = dict.fromkeys(map(str, table.get("split", [split])))
    splits = {name: split_of(name, where, "name it so in a column (--data.hf.split)") for name in splits}
    try:
        files = images_of(source, split).files
    except (ValueError, TypeError, NotImplementedError, KeyError) as error:  # of pyarrow
        raise DatasetError(f"{where}: the column {source.image!r} holds no images ({error})") from error
    samples = []
    for row, name in enumerate(map(str, table["label"])):
        label, method, kind = labels[name], "real", "real"
        if label == 1:
            method = _method(name) if "method" not in table else table["method"][row]
            if method is None:
                raise DatasetError(f"{where}, row {row} is fake and has no value in the column of the method")
            kind = f"fake-{method}".replace("/", "_")  # as the folder of such images would be called
        video = table["video"][row] if "video" in table else f"{split}-{row:07d}"
        samples.append(
            Sample(
                path=files.get(row) or source.key(split, row),
                label=label,
                dataset=dataset,
                method=str(method),
                video=f"{dataset}/{kind}/{video}",
                split=splits[str(table["split"][row]) if "split" in table else split],
                group=f"{dataset}/{table['group'][row]}" if "group" in table else "",
            )
        )
    return samples


def _method(label: str) -> str:
    """The forgery method that the label of a fake names: "fake" if it is a number or a truth value."""
    return "fake" if _says_nothing(label) else label.removeprefix("fake-")


def _says_nothing(label: str) -> bool:
    return label.lstrip("-").isdigit() or label in ("True", "False")


def _label(name: str, label_map: dict[str, int] | None, where: str) -> int:
    """0 or 1 of a label; a number or truth value says nothing without `label_map`."""
    if not (label_map and name in label_map) and _says_nothing(name):
        raise DatasetError(
            f"{where}: the labels are numbers or truth values such as {name}, which do not say what is real: give "
            f"label_map with every label and 0 (real) or 1 (fake), e.g. {_EXAMPLE[name.isdigit()]} (masm train: "
            "--data.label_map, masm eval: --label_map)"
        )
    return label_of(name, label_map, where)
