"""Run folders in tests: what two of them have in common."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file


def adapter_weights(folder) -> dict[str, torch.Tensor]:
    return load_file(str(next((folder / "adapter").glob("*.safetensors"))))


def history(folder) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    measured = {"seconds", "waited", "peak_memory_bytes", "gpu_busy"}
    return [{key: value for key, value in entry.items() if key not in measured} for entry in entries]


def assert_same_run(first, second) -> None:
    left, right = adapter_weights(first), adapter_weights(second)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert history(first) == history(second)
