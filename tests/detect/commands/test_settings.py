"""The settings of `masm`: their help texts, config files, and wrong values."""

from __future__ import annotations

import re

import pytest
from command_line import assert_one_line, code_of
from masm_detect.commands.main import USER_ERROR, main
from masm_detect.methods.registry import METHODS, load

from masm_ext.optim.groups import S_LR


def options_of(command: str, capsys) -> dict[str, str]:
    """The options that `masm <command> --help` lists, each with its meaning."""
    assert code_of([command, "--help"]) == 0
    listed = capsys.readouterr().out.split("\noptions:\n")[1]
    # A name and its forms, two spaces or a new line, the meaning; (type: ..., default: ...) ends it.
    entries = re.findall(r"^  (--[\w.]+)[^\n]*?(?:  +|\n {24})(?=\S)(.*?)(?=\n\n|\n  -|\Z)", listed, re.M | re.S)
    return {option: re.sub(r"\((?:required, )?type:.*", "", " ".join(text.split())) for option, text in entries}


@pytest.mark.parametrize("command", ["train", "eval", "report", "export", "prepare", "demo"])
def test_help_explains_each_option(capsys, command):
    options = options_of(command, capsys)
    assert len(options) > {"train": 50, "eval": 20, "report": 20, "export": 15, "prepare": 8, "demo": 2}[command]
    assert [option for option, text in options.items() if not text] == []


def test_help_is_true_to_the_code(capsys):
    options = options_of("train", capsys)
    workers = options["--runtime.workers"]
    for part in (
        "processes that read the images; 0: the process that trains",
        "null: 0 on the CPU, on CUDA one less than the usable cores, at most 16; no result depends on it",
    ):
        assert part in workers
    defaults = [load(name).rates for name in METHODS]
    for name in ("lr", "head_lr", "weight_decay", "rank"):
        stated = set(re.findall(r"\d[\d.e-]*", options[f"--method.{name}"].split("null:")[1]))
        used = {f"{getattr(rates, name):g}" for rates in defaults if getattr(rates, name) is not None}
        assert stated == used, name
    assert f"null: {S_LR[True]:g} with a lift, {S_LR[False]:g} without" in options["--method.s_lr"]
    assert f"null: {load('masm').rates.v_lr_scale:g}" in options["--method.v_lr_scale"]


TRAINING = "data: {paths: [faces]}\nmodel: {image_size: 224}\nmethod: {name: masm}\noptim: {epochs: 3}\n"


@pytest.mark.parametrize(
    ("command", "text", "unknown"),
    [
        (["eval", "runs/a"], TRAINING, "data.paths, model, method, optim"),
        (["eval", "runs/a"], "data: {paths: [faces]}", "data.paths"),
        (["eval", "runs/a"], "{split: test, runtime: {worker: 2}}", "runtime.worker"),
        (["train"], "{data: {path: [faces]}, split: test}", "data.path, split"),
        (["train"], "data: {augment: {jpg: 1}}", "data.augment.jpg"),
        (["prepare", "a", "b"], "{dataset: x, optim: {epochs: 3}}", "optim"),
    ],
)
def test_config_of_another_command_is_named(tmp_path, capsys, command, text, unknown):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    assert main([*command, "--config", str(config)]) == USER_ERROR
    message = f"masm: error: {config} is not a config of `masm {command[0]}`, which has no setting {unknown} (see"
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    "command", [["train"], ["eval", "runs/none"], ["prepare", "/nowhere/at/all", "out", "--dataset=x"]]
)
def test_printed_config_is_read(tmp_path, capsys, command):
    assert code_of([*command, "--print_config"]) == 0
    config = tmp_path / "printed.yaml"
    config.write_text(capsys.readouterr().out)
    assert main([*command, "--config", str(config)]) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "is not a folder" if command[0] == "prepare" else "no data given")


@pytest.mark.parametrize("text", [
    "data.paths: [/nowhere/faces]",
    "data.paths: [/nowhere/faces]\nmethod.masm.subspace_rank: [4, 4, 4]",
    "data: {paths: [/nowhere/faces],\n"
    "augment: {class_path: masm_detect.config.AugmentConfig, init_args: {flip: 0}}}",
    "data: {paths: [/nowhere/faces], augment: null}\nmethod: {masm: {subspace_rank: [4, 4, 4]}}",
])  # fmt: skip
def test_every_form_of_a_config_is_read(tmp_path, capsys, text):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    for given in (str(config), text):  # a file, and YAML itself
        assert main(["train", "--config", given]) == USER_ERROR
        assert_one_line(capsys.readouterr().err, "masm train: error: /nowhere/faces: there is no such file or folder")


@pytest.mark.parametrize("text", ["optim: 3", "method: {masm: [1]}", "data: {paths: '[a'}", "data: {paths: [1, 2"])
def test_a_config_of_another_form_is_one_line(tmp_path, capsys, text):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    assert main(["train", "--config", str(config)]) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "error: ")


def test_moved_setting_is_named(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("data: {paths: [faces], workers: 2}")
    for arguments in (["--data.workers", "2"], ["--data.workers=2"], ["--config", str(config)]):
        assert main(["train", *arguments]) == USER_ERROR
        err = capsys.readouterr().err
        assert err.endswith("(data.workers is now runtime.workers)\n")
        assert_one_line(err, "data.workers")


def test_one_word_is_a_list_of_one(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("data: {paths: /nowhere/faces}")
    for arguments in (
        ["--data.paths", "/nowhere/faces"],
        ["--data.paths=[/nowhere/faces]"],
        ["--data.paths+", "/nowhere/faces"],
        ["--config", str(config)],
    ):
        assert main(["train", *arguments]) == USER_ERROR
        assert_one_line(capsys.readouterr().err, "masm train: error: /nowhere/faces: there is no such file or folder")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--runtime.workers=two", "runtime.workers is two; it must be int or null"),
        ("--method.lr=fast", "method.lr is fast; it must be float or null"),
        ("--method.masm.subspace_rank=x", "method.masm.subspace_rank is x; it must be int or list[int]"),
        ("--optim.epochs=three", "optim.epochs is three; it must be int"),
        ("--optim.select=first", "optim.select is first; it must be one of best, last"),
        ("--data.augment.jpeg=much", "data.augment: jpeg is much; it must be float"),
        ("--data.augment.jpg=1", "data.augment: Option 'jpg' is not accepted"),
    ],
)
def test_wrong_type_is_short(capsys, argument, message):
    assert main(["train", argument]) == USER_ERROR
    assert capsys.readouterr().err == f"masm: error: {message} (see masm --help, masm <command> --help)\n"


@pytest.mark.parametrize("arguments", ["train --optim.epoch 1", "train --res", "eval runs/a --spl test"])
def test_names_are_not_abbreviated(capsys, arguments):
    assert main(arguments.split()) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "unrecognized arguments: --")
