"""Where a result comes from."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch
from masm_detect import provenance as provenance_module
from masm_detect.provenance import provenance


def test_provenance_is_json_without_paths():
    content = json.dumps(provenance())
    assert torch.__version__.split("+")[0] in content
    assert "triton" in provenance_module._PACKAGES
    assert "/home" not in content and "/root" not in content and "/work" not in content


def test_provenance_of_a_gpu(monkeypatch):
    properties = SimpleNamespace(name="a GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        provenance_module, "Meter", lambda device: SimpleNamespace(driver=lambda: f"driver of {device}")
    )
    expected = {"type": "cuda", "name": "a GPU", "capability": "9.0", "cuda": "13.0", "driver": "driver of cuda:1"}
    assert provenance("cuda:1")["device"] == expected
