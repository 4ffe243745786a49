"""Detectors and exports are uploaded to a hub that keeps them in a folder."""

from __future__ import annotations

import shutil

import pytest
import torch
from hub_models import PIXELS, fake_logits
from masm_detect.hub import (
    DetectorForImageClassification,
    HubError,
    push_export,
)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A hub that keeps what is uploaded in a folder, with the calls."""
    calls = []

    class FakeHub:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("create_repo", repo_id, private, exist_ok))
            return type("RepoUrl", (), {"repo_id": repo_id})()

        def upload_folder(self, *, repo_id, folder_path, **options):
            calls.append(("upload_folder", repo_id, options))
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
            return "commit"

    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    return tmp_path / "hub", calls


def test_push_to_hub(model, tmp_path, fake_hub, seed):
    folder, calls = fake_hub
    assert model.push_to_hub("someone/detector", private=True, token="secret", create_pr=True) == "commit"
    assert calls[:2] == [("token", "secret"), ("create_repo", "someone/detector", True, True)]
    assert calls[2][2] == {"revision": None, "create_pr": True, "commit_message": "Upload detector"}
    uploaded = folder / "someone" / "detector"
    pixels = torch.randn(2, *PIXELS)
    loaded = DetectorForImageClassification.from_pretrained(uploaded)
    assert (fake_logits(loaded, pixels) - fake_logits(model, pixels)).abs().max() < 1e-5
    everything = b"".join(path.read_bytes() for path in uploaded.rglob("*") if path.is_file())
    assert b"secret" not in everything and str(tmp_path.parent).encode() not in everything
    # its base is a folder of this machine
    with pytest.raises(HubError, match="is a folder of this machine: upload with merged=True"):
        model.push_to_hub("someone/adapter", merged=False)
    model.config.base_model = "someone/backbone"
    model.push_to_hub("someone/adapter", merged=False)
    assert (folder / "someone" / "adapter" / "adapter" / "adapter.json").is_file()


def test_push_of_an_export(tiny_run, tmp_path, fake_hub):
    from masm_detect.export.export import export_run

    folder, _ = fake_hub
    options = {"data": [str(tiny_run.parent / "data")], "allow_fewer": True, "progress": False}
    export_run(str(tiny_run), format="hf", out=str(tmp_path / "export"), **options)
    push_export(tmp_path / "export", "someone/export")
    names = {path.name for path in (folder / "someone" / "export").iterdir()}
    assert names == {path.name for path in (tmp_path / "export").iterdir()} >= {"README.md", "certificate.json"}
    with pytest.raises(HubError, match=r"has no certificate.json.*`masm export` wrote"):
        push_export(tmp_path, "someone/nothing")
