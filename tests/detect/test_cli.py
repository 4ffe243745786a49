"""The command `masm`: a whole life of a run through the command line, and one clear line for each mistake."""

from __future__ import annotations

import json

import pytest
from masm_detect.cli import USER_ERROR, main


def train_arguments(data, backbone, out) -> list[str]:
    return [
        "train",
        f"--data.paths=[{data}]",
        f"--model.backbone={backbone}",
        "--model.image_size=28",
        "--model.local_files_only=true",
        "--optim.epochs=1",
        "--optim.batch_size=8",
        "--method.masm.subspace_rank=2",
        "--runtime.progress=false",
        f"--out={out}",
    ]


def test_train_then_eval(tiny_data, tiny_backbone, tmp_path, capsys):
    for method in ("probe", "masm"):
        arguments = train_arguments(tiny_data, tiny_backbone, tmp_path / method)
        assert main([*arguments, f"--method.name={method}"]) == 0
    assert "stripes" in capsys.readouterr().out
    runs = f"--runs=[{tmp_path}/probe,{tmp_path}/masm]"
    options = ["--n_bootstrap=20", "--runtime.progress=false", f"--out={tmp_path}/eval"]
    assert main(["eval", runs, f"--paths=[{tiny_data}]", *options]) == 0
    out = capsys.readouterr().out
    assert "probe" in out and "masm" in out and "AUC" in out
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert set(results["runs"]) == {"probe", "masm"}
    assert results["runs"]["masm"]["datasets"]["data"]["methods"]["stripes"]["n_fake"] == 12
    assert (tmp_path / "eval" / "auc.png").read_bytes().startswith(b"\x89PNG")


def test_config_file_with_override(tiny_data, tiny_backbone, tmp_path):
    arguments = train_arguments(tiny_data, tiny_backbone, tmp_path / "first")
    assert main([*arguments, "--method.name=probe"]) == 0
    config = tmp_path / "first" / "config.yaml"
    assert main(["train", f"--config={config}", f"--out={tmp_path}/second", "--runtime.seed=3"]) == 0
    saved = (tmp_path / "second" / "config.yaml").read_text()
    assert "seed: 3" in saved and "name: probe" in saved


def test_env(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "masm::subspace_linear" in out and "torch" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--data.paths=[/nowhere/at/all]", "/nowhere/at/all"),
        ("--data.paths=[]", "no data given"),
        ("--data.methods=[morph]", "morph"),
        ("--model.backbone=/nowhere/model", "/nowhere/model"),
        ("--model.image_size=30", "multiple of the patch size"),
        ("--runtime.device=cuda:99", "device"),
        ("--runtime.device=abacus", "abacus"),
        ("--method.masm.subspace_rank=99", "rank"),
        ("--method={name: effort, rank: 16}", "method.rank is 16"),
        ("--resume=true", "nothing to resume"),
        ("--optim.epochs=0", "optim.epochs"),
    ],
)
def test_mistakes_of_train_are_one_line(tiny_data, tiny_backbone, tmp_path, capsys, change, message):
    arguments = train_arguments(tiny_data, tiny_backbone, tmp_path / "run")
    assert code_of([*arguments, change]) == USER_ERROR
    assert_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize("damage", ["zero-byte", "one class"])
def test_bad_data_is_one_line(tiny_data, tiny_backbone, tmp_path, capsys, damage):
    if damage == "zero-byte":
        (tiny_data / "real" / "03.png").write_bytes(b"")
    else:
        for file in (tiny_data / "fake-stripes").iterdir():
            file.unlink()
    assert code_of(train_arguments(tiny_data, tiny_backbone, tmp_path / "run")) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "03.png" if damage == "zero-byte" else "fake")


def test_eval_of_a_missing_or_damaged_run(tiny_data, tiny_backbone, tmp_path, capsys):
    assert code_of(["eval", f"--runs=[{tmp_path}/none]", f"--paths=[{tiny_data}]"]) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "none")
    assert code_of(["eval", f"--paths=[{tiny_data}]"]) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "--runs")
    assert main(train_arguments(tiny_data, tiny_backbone, tmp_path / "run")) == 0
    capsys.readouterr()
    tensors = next((tmp_path / "run" / "adapter").glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-4])
    assert code_of(["eval", f"--runs=[{tmp_path}/run]", f"--paths=[{tiny_data}]"]) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "adapter")


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train", "--optim.epochs=three"], ["train", "--nonsense=1"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == USER_ERROR
    assert "Traceback" not in capsys.readouterr().err


def code_of(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code)


def assert_one_line(err: str, message: str) -> None:
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0], err
    assert "Traceback" not in err
