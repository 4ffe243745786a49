"""The exports of a run of bundled:dinov2-small, used as their model cards say, in processes without masm_ext."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import tiny
import torch
from masm_detect.config import ModelConfig
from masm_detect.data import content_cache
from masm_detect.data.decode import read_image
from masm_detect.data.transforms import ImageTransform, transform_image
from masm_detect.evaluation.runs import load_run
from masm_detect.export.export import export_run

pytestmark = pytest.mark.long
#: Makes an import of our packages fail.
ALONE = "import sys\nfor name in ('masm_ext', 'masm_detect'):\n    sys.modules[name] = None\n"


@pytest.fixture(scope="module")
def bundled_run(tmp_path_factory):
    """A run of masm on bundled:dinov2-small at 56 px, its data, and face.png beside it."""
    from masm_detect.training.run import train

    folder = tmp_path_factory.mktemp("bundled-run")
    config = tiny.run_config(tiny.write_data(folder / "data"), folder, folder / "run")
    config = replace(
        config,
        model=ModelConfig(backbone="bundled:dinov2-small", image_size=56),
        optim=replace(config.optim, epochs=1),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content_cache, "default_cache_file", lambda: folder / "contents.sqlite")
        train(config)
    return folder / "run"


@pytest.fixture
def faces(tmp_path, seed):
    """Three image files of other sizes than the input: a JPEG, a grey PNG, and the face.png of the model cards."""
    random = np.random.default_rng(seed)
    paths = []
    for name, shape in (("a.jpg", (91, 70, 3)), ("grey.png", (40, 64)), ("face.png", (200, 150, 3))):
        image = cv2.GaussianBlur(random.integers(0, 256, shape, dtype=np.uint8), (0, 0), 3)
        image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
        assert cv2.imwrite(str(tmp_path / name), image)
        paths.append(str(tmp_path / name))
    return paths


def logits_of(run, paths) -> list[float]:
    _, detector = load_run(run)
    transform = ImageTransform(56, detector.backbone.mean, detector.backbone.std)
    with torch.inference_mode():
        pixels = torch.stack([transform_image(read_image(path), transform) for path in paths])
        return detector.eval()(pixels).tolist()


def in_a_process(code: str, folder) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def export(run, folder, format) -> float:
    """Export to folder/model; returns the largest difference in the certificate."""
    data = [str(run.parent / "data")]
    options = {"data": data, "allow_fewer": True, "progress": False}
    certificate = export_run(str(run), format=format, out=str(folder / "model"), **options)
    found = [certificate["difference_on_the_same_pixels"], *certificate["difference_from_image_files"].values()]
    return max(part["largest"] for part in found)


def code_of_card(folder) -> str:
    """The Python code of the model card."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "model" / "README.md").read_text(), re.DOTALL)
    return code


def test_onnxruntime_alone(bundled_run, tmp_path, faces):
    largest = export(bundled_run, tmp_path, "onnx")
    assert largest < 5e-5
    code = ALONE + code_of_card(tmp_path)
    code += f"\nimport json\nprint(json.dumps([logit] + [logit_of(path, session, preprocessing) for path in {faces}]))"
    code += "\nassert 'torch' not in sys.modules"
    first, *logits = json.loads(in_a_process(code, tmp_path))
    gaps = np.abs(np.subtract(logits, logits_of(bundled_run, faces)))
    # The certificate is of other crops: rounding may be a little larger on these.
    assert gaps.max() <= max(3 * largest, 5e-5) and first == logits[-1]
    script = [sys.executable, "model/predict.py", *faces]
    printed = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert [float(value) for value in re.findall(r"logit (\S+),", printed)] == [round(value, 4) for value in logits]
    # programs that compare detectors load a file and call its `predict`
    code = f"""
import importlib.util, json
spec = importlib.util.spec_from_file_location("detector", "model/predict.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps([module.predict(path) for path in {faces}]))"""
    scores = json.loads(in_a_process(code, tmp_path))
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-np.array(logits))), rtol=1e-6)


def test_transformers_alone(bundled_run, tmp_path, faces):
    largest = export(bundled_run, tmp_path, "hf")
    assert largest < 5e-5
    code = ALONE + code_of_card(tmp_path)
    code += f"""
import json
from transformers import pipeline
assert {{entry["label"] for entry in classify("face.png")}} == {{"real", "fake"}}
scores = lambda pipe, path: {{e["label"]: e["score"] for e in pipe(path, function_to_apply="none")}}
default = pipeline("image-classification", model="model")
found = [[scores(pipe, path) for path in {faces}] for pipe in (classify, default)]
print("FOUND" + json.dumps(found))
"""
    pil, default = json.loads(in_a_process(code, tmp_path).partition("FOUND")[2])
    expected = logits_of(bundled_run, faces)
    gaps = np.abs(np.subtract([entry["fake"] - entry["real"] for entry in pil], expected))
    assert gaps.max() <= max(3 * largest, 5e-5)
    # The default processor rounds some pixels differently where torchvision is installed.
    assert np.abs(np.subtract([entry["fake"] - entry["real"] for entry in default], expected)).max() < 0.1


def test_masm_loads_the_adapter(bundled_run, tmp_path, faces):
    assert export(bundled_run, tmp_path, "adapter") < 1e-5
    size = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*") if path.is_file())
    assert size < 5e6  # the backbone has 88 MB
    code = code_of_card(tmp_path) + "\nprint(logit)"
    assert abs(float(in_a_process(code, tmp_path).split()[-1]) - logits_of(bundled_run, faces)[-1]) < 1e-5
