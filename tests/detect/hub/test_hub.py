"""Detectors as models of transformers: what is saved, loaded and refused, on a tiny run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import masm_detect.hub
import numpy as np
import pytest
import tiny
import torch
import transformers
from hub_models import PIXELS, fake_logits
from huggingface_hub import ModelCard
from masm_detect.config import DataConfig, MasmOptions, MethodConfig
from masm_detect.data.frames import frame_dataset, image_transform
from masm_detect.data.sources import read_dataset
from masm_detect.data.transforms import transform_image
from masm_detect.errors import CheckpointError
from masm_detect.evaluation.runs import load_run
from masm_detect.hub import (
    DetectorConfig,
    DetectorForImageClassification,
    DetectorImageProcessor,
    HubError,
    upload,
)
from masm_detect.methods.adapters import base_sha256
from masm_detect.methods.build import build_method
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import log_loss

from masm_ext import MASMLinear


def logits_of(run, pixels) -> torch.Tensor:
    _, detector = load_run(run)
    with torch.no_grad():
        return detector.eval()(pixels)


def on_a_hub(folder: Path, cache: Path, name: str) -> dict:
    """Puts `folder` into a cache of the hub as the repository `name`; the arguments that load it from there."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    return {"cache_dir": str(cache), "local_files_only": True}


def test_logits_loss_and_gradients(model, tiny_run, seed):
    pixels, labels = torch.randn(5, *PIXELS), torch.tensor([0, 1, 1, 0, 1])
    expected = logits_of(tiny_run, pixels)
    assert torch.equal(fake_logits(model, pixels), expected)
    output = model(pixels, labels=labels)
    probabilities = expected.double().sigmoid().numpy()
    assert output.loss.item() == pytest.approx(log_loss(labels.numpy(), probabilities, labels=[0, 1]), rel=1e-5)
    output.loss.backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any(name.endswith(".u") for name in trained)
    assert model.detector.head.weight.grad.abs().sum() > 0
    loss, logits = model(pixels, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    assert len(model(pixels, return_dict=False)) == 1
    with pytest.raises(HubError, match="has no output_attentions"):
        model(pixels, output_attentions=True)


def test_pipeline_gives_the_scores_of_the_run(model, tiny_run, tmp_path):
    model.save_pretrained(tmp_path)
    samples = read_dataset(tiny_run.parent / "data")
    config, detector = load_run(tiny_run)
    dataset = frame_dataset(samples, detector.backbone, config.data)
    pixels = torch.stack([dataset[at]["image"] for at in range(len(dataset))])
    expected = logits_of(tiny_run, pixels)
    raw = transformers.pipeline("image-classification", model=str(tmp_path), function_to_apply="none")
    found = raw([sample.path for sample in samples], batch_size=5)
    logits = [{entry["label"]: entry["score"] for entry in entries} for entries in found]
    gap = max(abs(entry["fake"] - entry["real"] - value) for entry, value in zip(logits, expected.tolist()))
    print(f"largest difference of a logit: {gap:.2g}")
    assert gap < 1e-5
    scores = transformers.pipeline("image-classification", model=str(tmp_path))(samples[0].path)
    assert {e["label"]: e["score"] for e in scores}["fake"] == pytest.approx(float(expected[0].sigmoid()), abs=1e-6)


def test_merged_folder_needs_no_layer_of_masm_ext(model, tmp_path, seed):
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "preprocessing.json", "README.md"
    }  # fmt: skip
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(tiny.detector().state_dict())
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is DetectorForImageClassification and not loaded.training
    assert not any(isinstance(m, MASMLinear) for m in loaded.modules())
    pixels = torch.randn(4, *PIXELS)
    assert (fake_logits(loaded, pixels) - fake_logits(model, pixels)).abs().max() < 1e-5
    # an empty model of the same configuration: random weights of the same shapes
    empty = transformers.AutoModelForImageClassification.from_config(loaded.config)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    # saved again: the same weights, bit for bit
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in names)


def test_adapter_folder_is_small_and_exact(model, tiny_run, tmp_path, seed):
    model.save_pretrained(tmp_path, merged=False)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < 2e6 and not list(tmp_path.glob("*.safetensors"))
    assert len(list((tmp_path / "adapter").glob("*.safetensors"))) == 1
    pixels = torch.randn(4, *PIXELS)
    load = transformers.AutoModelForImageClassification.from_pretrained
    loaded = load(tmp_path, local_files_only=True)
    assert (fake_logits(loaded, pixels) - logits_of(tiny_run, pixels)).abs().max() < 1e-5
    loaded = load(tmp_path, local_files_only=True, attn_implementation="eager")  # as runs do on the CPU
    assert torch.equal(fake_logits(loaded, pixels), logits_of(tiny_run, pixels))
    assert any(isinstance(m, MASMLinear) for m in loaded.modules())
    # training can go on: the same parameters learn, and no others
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == learning
    # one kind after the other in one folder: nothing of the first is left
    loaded.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter").exists()
    loaded.save_pretrained(tmp_path, merged=False)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("method", ["probe", "full", "bitfit", "lora", "effort", "masm-nomask"])
def test_adapter_of_every_method(method, tiny_backbone, tmp_path, seed):
    if method in ("lora", "effort"):
        pytest.importorskip("peft")
    config = MethodConfig(name=method, rank=None if method.startswith("masm") else 2,
                          masm=MasmOptions(num_subspaces=2, subspace_rank=2))  # fmt: skip
    detector = tiny.detector()
    base = base_sha256(detector)
    build_method(method, detector, config, seed=seed % 1000)
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model = DetectorForImageClassification.from_detector(
        detector.eval(), base_model=str(tiny_backbone), base_hash=base, method=config
    )
    pixels = torch.randn(3, *PIXELS)
    for merged, limit in ((False, 0.0), (True, 1e-4)):
        folder = tmp_path / str(merged)
        model.save_pretrained(folder, merged=merged)
        loaded = DetectorForImageClassification.from_pretrained(folder)
        assert (fake_logits(loaded, pixels) - fake_logits(model, pixels)).abs().max() <= limit


def test_base_is_checked(model, tiny_run, tmp_path, seed):
    model.save_pretrained(tmp_path / "adapter", merged=False)
    torch.manual_seed(seed)
    other = tiny.detector(seed=seed % 1000 + 1)
    other.backbone.model.save_pretrained(tmp_path / "other")
    with pytest.raises(HubError, match=r"trained on another backbone than .*other: .* give the right one with base="):
        DetectorForImageClassification.from_pretrained(tmp_path / "adapter", base=str(tmp_path / "other"))
    shutil.copytree(tiny_run.parent / "backbone", tmp_path / "moved")
    loaded = DetectorForImageClassification.from_pretrained(tmp_path / "adapter", base=str(tmp_path / "moved"))
    loaded.detector.backbone.set_attention("eager")  # as runs do on the CPU
    pixels = torch.randn(2, *PIXELS)
    assert torch.equal(fake_logits(loaded, pixels), fake_logits(model, pixels))
    # masm_ext checks the weights, too, where the configuration does not hold their hash
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(config | {"base_sha256": None}))
    with pytest.raises(ValueError, match="base model does not fit the adapter"):
        DetectorForImageClassification.from_pretrained(tmp_path / "adapter", base=str(tmp_path / "other"))


@pytest.mark.parametrize("merged", [True, False])
def test_from_the_hub(model, tmp_path, seed, merged):
    model.save_pretrained(tmp_path / "saved", merged=merged)
    hub = on_a_hub(tmp_path / "saved", tmp_path / "cache", "someone/detector")
    # not through AutoModelForImageClassification: it asks the hub for an adapter of PEFT, with local_files_only, too
    assert type(transformers.AutoConfig.from_pretrained("someone/detector", **hub)) is DetectorConfig
    loaded = DetectorForImageClassification.from_pretrained("someone/detector", **hub)
    processor = transformers.AutoImageProcessor.from_pretrained("someone/detector", **hub)
    pixels = torch.randn(2, *PIXELS)
    assert (fake_logits(loaded, pixels) - fake_logits(model, pixels)).abs().max() < 1e-5
    assert type(processor) is DetectorImageProcessor and processor.size == {"height": 28, "width": 28}


def test_model_card(model, tmp_path):
    model.save_pretrained(tmp_path / "detector", merged=True)
    card = ModelCard.load(tmp_path / "detector" / "README.md")
    assert card.data.library_name == "masm_ext" and card.data.pipeline_tag == "image-classification"
    assert "import masm_detect.hub" in card.text and 'model="detector"' in card.text
    assert "None: these files were not compared with the run" in card.text
    assert model.config.base_sha256 in card.text and str(tmp_path.parent) not in card.text
    with torch.no_grad():
        model.detector.head.bias.add_(1)
    with pytest.warns(UserWarning, match="no model card is written"):
        model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed" / "README.md").exists()


@pytest.mark.long
def test_code_of_the_card_runs_alone(model, tmp_path):
    """In a new process, from the folder that holds the model, as a reader of the card copies it."""
    model.save_pretrained(tmp_path / "detector")
    random = np.random.default_rng(0)
    assert cv2.imwrite(str(tmp_path / "face.png"), random.integers(0, 256, (60, 50, 3), dtype=np.uint8))
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / "detector" / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'label': 'fake'" in done.stdout and "'label': 'real'" in done.stdout


def test_image_processor_is_that_of_training(model, seed):
    random = np.random.default_rng(seed)
    rgb = random.integers(0, 256, (41, 53, 3), dtype=np.uint8)
    for data in (DataConfig(), DataConfig(crop="center"), DataConfig(normalize_first=(30, 70))):
        described = DetectorForImageClassification.from_detector(model.detector, data=data)
        processor = described.image_processor()
        expected = transform_image(rgb, image_transform(model.detector.backbone, data))
        tensor = torch.from_numpy(rgb)
        for image in (Image.fromarray(rgb), rgb, tensor, tensor.permute(2, 0, 1)):
            assert torch.equal(processor(image)["pixel_values"][0], expected)
        batch = processor([rgb, Image.fromarray(rgb)], return_tensors="np")["pixel_values"]
        assert isinstance(batch, np.ndarray) and batch.shape == (2, *PIXELS)
    grey = processor(rgb[:, :, 0])["pixel_values"]
    assert torch.equal(grey, processor(np.repeat(rgb[:, :, :1], 3, 2))["pixel_values"])
    for image, message in (
        (rgb.astype(np.float32) / 255, r"float32 \[41, 53, 3\]: give PIL images"),
        (np.zeros((5, 6, 4), np.uint8), r"shape \[5, 6, 4\]: it needs 3 channels"),
        ("face.png", "is str: give PIL images"),
    ):
        with pytest.raises(HubError, match=message):
            processor(image)
    with pytest.raises(HubError, match="do_resize: the preprocessing is that of the training"):
        processor(rgb, do_resize=False)


def test_files_and_dtypes(model, tmp_path, seed):
    pixels = torch.randn(2, *PIXELS)
    expected = fake_logits(model, pixels)
    model.save_pretrained(tmp_path / "shards", max_shard_size=4000)
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded = DetectorForImageClassification.from_pretrained(tmp_path / "shards")
    assert (fake_logits(loaded, pixels) - expected).abs().max() < 1e-5
    shards[1].unlink()
    with pytest.raises(HubError, match=f"lacks {shards[1].name}"):
        DetectorForImageClassification.from_pretrained(tmp_path / "shards")

    half = loaded.to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert load_file(tmp_path / "half" / "model.safetensors")["head.weight"].dtype == torch.bfloat16
    for dtype, stored in ((None, torch.bfloat16), ("auto", torch.bfloat16), ("float32", torch.float32)):
        again = DetectorForImageClassification.from_pretrained(tmp_path / "half", dtype=dtype, device_map="cpu")
        assert again.dtype == stored and again(pixels).logits.dtype == torch.float32
        assert torch.equal(fake_logits(again, pixels), fake_logits(half.to(stored), pixels))
        half.to(torch.bfloat16)

    changed = {name: torch.zeros_like(value) for name, value in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path / "state", state_dict=changed)
    assert load_file(tmp_path / "state" / "model.safetensors")["head.weight"].abs().sum() == 0


def test_a_failed_save_leaves_the_folder_as_it_was(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.config.base_sha256 = None
    with pytest.raises(HubError, match=r"an adapter needs config\.base_sha256.*merged=True"):
        model.save_pretrained(tmp_path, merged=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_mistakes_name_what_to_do(model, tiny_run, tmp_path):
    model.save_pretrained(tmp_path / "good")
    load = DetectorForImageClassification.from_pretrained
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    for name, options, message in (
        (tmp_path / "bert", {}, "is of a 'bert' model, not of a 'masm_detector'"),
        (tmp_path / "empty", {}, "has no config.json"),
        (tmp_path / "nowhere" / "x" / "y", {"local_files_only": True}, "neither a local folder nor a hub id|has no"),
        (tmp_path / "good", {"trust_remote_code": True}, "no code of a checkpoint is run"),
        (tmp_path / "good", {"quantization_config": {"load_in_8bit": True}}, "loaded with quantization_config"),
        (tmp_path / "good", {"use_safetensors": False}, "weights are read as safetensors only"),
        (tmp_path / "good", {"attn_implementation": "flash_attention_2"}, "give sdpa or eager"),
        (tmp_path / "good", {"base": "bundled:dinov2-small"}, "needs no base"),
        (tmp_path / "good", {"device_map": "auto"}, "device_map is 'auto': a detector is on one device"),
        (tmp_path / "good", {"dtype": "int8"}, "dtype is 'int8': give a floating dtype"),
    ):
        with pytest.raises(HubError, match=message):
            load(name, **options)
    state = load_file(tmp_path / "good" / "model.safetensors")
    save_file({**state, "extra": torch.zeros(1)}, tmp_path / "good" / "model.safetensors")
    with pytest.raises(HubError, match=r"do not fit the configuration.*extra"):
        load(tmp_path / "good")
    (tmp_path / "good" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(HubError, match="cannot be read as safetensors"):
        load(tmp_path / "good")
    (tmp_path / "good" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "good" / "pytorch_model.bin")  # never read
    with pytest.raises(HubError, match="weights in other formats are not read"):
        load(tmp_path / "good")
    with pytest.raises(HubError, match="cannot be saved with push_to_hub"):
        model.save_pretrained(tmp_path / "x", push_to_hub=True)

    model.save_pretrained(tmp_path / "adapter", merged=False)
    [tensors] = (tmp_path / "adapter" / "adapter").glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    with pytest.raises((CheckpointError, ValueError), match=r"damaged|SHA-256|hash"):
        load(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter" / "adapter")
    with pytest.raises(HubError, match=r"has no adapter/adapter\.json"):
        load(tmp_path / "adapter")


def test_public_names():
    for name in masm_detect.hub.__all__:
        assert getattr(masm_detect.hub, name).__doc__
    assert upload.push_folder.__doc__


def test_loading_warns_of_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
        transformers.AutoImageProcessor.from_pretrained(tmp_path)
