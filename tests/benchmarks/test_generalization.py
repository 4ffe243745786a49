"""The studies keep people, images and forgeries apart, and go on where they stopped."""

import subprocess
import sys
from itertools import product

import numpy as np
import pytest

pytest.importorskip("masm_detect.evaluation.metrics", reason="needs the extra masm_ext[detect]")
from masm_detect.data.sample import Sample

METHODS = ("real", "Deepfakes", "NeuralTextures", "Face2Face", "FaceSwap")
PAIRS = (("183", "253"), ("469", "481"), ("866", "878"), ("585", "599"), ("672", "720"))


@pytest.fixture(scope="module")
def studies(request):
    folder = request.config.rootpath / "benchmarks" / "generalization"
    sys.path.insert(0, str(folder))
    import studies

    yield studies
    sys.path.remove(str(folder))


def ffpp_samples():
    for method, (a, b), swap in product(METHODS, PAIRS, (False, True)):
        target, source = (b, a) if swap else (a, b)
        name = target if method == "real" else f"{target}_{source}"
        for frame in range(64):
            label = int(method != "real")
            video = f"ffpp-c40/{method}/{name}"
            yield Sample(f"{method}/{name}/{frame:03d}.png", label, "ffpp-c40", method, video, "", f"{a}_{b}")


def test_ffpp_tests_unseen_pairs_and_unseen_methods(studies):
    study = studies.STUDIES["ffpp"]
    split = study.split(list(ffpp_samples()), study.directions["Deepfakes+NeuralTextures"], 0)
    people = [{s.video.rsplit("/", 1)[-1].split("_")[0] for s in part} for part in (split.train, split.val, split.test)]
    assert people[0] == people[1] and not people[0] & people[2] and len(people[2]) == 4
    assert {s.method for s in split.train} == {"real", "Deepfakes", "NeuralTextures"}
    assert {s.method for s in split.test} == set(METHODS)
    paths = [{s.path for s in part} for part in (split.train, split.val, split.test)]
    assert not paths[0] & paths[1] and not paths[1] & paths[2]
    real = sum(s.label == 0 for s in split.train)
    assert real == len(split.train) - real  # balanced
    # validation frames lie well after the training frames of the same video
    frame = lambda s: int(s.path[-7:-4])  # noqa: E731
    assert max(map(frame, split.train)) + 1 < min(map(frame, split.val))


@pytest.mark.parametrize("seed", [0, 1])
def test_gan_faces_splits_by_image_and_keeps_the_other_generator_out(studies, seed):
    study = studies.STUDIES["gan-faces"]
    samples = [
        Sample(f"{m}/{i}-{t}.png", int(m != "real"), "gan-faces", m, f"gan-faces/{m}/{i}")
        for m, i, t in product(("real", "stylegan3", "boredhumans-gan"), range(200), range(4))
    ]
    split = study.split(samples, ("stylegan3",), seed)
    images = [{s.video for s in part} for part in (split.train, split.val, split.test)]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]
    assert {s.method for s in split.train} == {s.method for s in split.val} == {"real", "stylegan3"}
    assert {s.method for s in split.test} == {"real", "stylegan3", "boredhumans-gan"}
    assert images[2] == {s.video for s in study.split(samples, ("boredhumans-gan",), seed + 1).test}


def test_absent_data_is_skipped_with_a_clear_line(request, tmp_path):
    program = request.config.rootpath / "benchmarks" / "generalization" / "run.py"
    for study in ("ffpp", "gan-faces"):
        command = [sys.executable, program, "--study", study, "--data", tmp_path, "--work", tmp_path / "w"]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert run.returncode == 0 and f"skipped: study {study}" in run.stdout, run.stderr


@pytest.fixture(scope="module")
def report(studies):
    import report

    yield report
    sys.modules.pop("report")


def units(auc_shift, groups=60, seed=0):
    """Real units and fakes of two forgeries, a group each; fakes of "B" are harder."""
    rng = np.random.default_rng(seed)
    label = np.repeat([0, 1, 1], groups)
    method = np.repeat(["real", "A", "B"], groups)
    group = np.arange(3 * groups).astype(str)
    score = rng.normal(size=3 * groups) + auc_shift * (method == "A") + 0.5 * auc_shift * (method == "B")
    return {"label": label, "method": method, "group": group, "score": score}


@pytest.mark.parametrize("shift", [1.0, 6.0], ids=["in the middle", "near 1"])
def test_the_interval_of_one_seed_and_forgery_is_that_of_its_auc(report, shift):
    from masm_detect.evaluation.intervals import auc_interval

    rows = units(shift)
    rows["score"][0] = 10  # one real unit above all fakes, so that the AUC is not 1
    keep = rows["method"] != "B"
    expected = auc_interval(rows["group"][keep], rows["label"][keep], rows["score"][keep])
    assert report._interval_of_mean([rows], ["A"]) == pytest.approx(expected)


def test_the_interval_of_a_mean_is_narrower_than_those_of_its_parts(report):
    seeds = [units(1.0, seed=seed) for seed in range(3)]
    low, high = report._interval_of_mean(seeds, ["A", "B"])
    one = report._interval_of_mean(seeds[:1], ["B"])
    assert 0.5 < low < high < 1 and high - low < one[1] - one[0]
    assert report._interval_of_mean([units(1.0, groups=19)], ["A"]) is None
