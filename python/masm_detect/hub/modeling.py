"""`DetectorForImageClassification`: a detector on any backbone of `masm train`, as a model of transformers."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from masm_detect.config import DataConfig, MasmOptions, MethodConfig
from masm_detect.evaluation.runs import load_run
from masm_detect.export.format import Run
from masm_detect.export.model_card import write_model_card
from masm_detect.export.plain import is_plain, make_plain
from masm_detect.export.preprocessing import preprocessing_of
from masm_detect.hashes import tensors_sha256
from masm_detect.methods import registry
from masm_detect.methods.adapters import base_sha256, load_method, save_method
from masm_detect.models.backbone import load_backbone
from masm_detect.models.description import build, describe
from masm_detect.models.detector import Detector, new_detector
from masm_detect.models.pretrained import without_folder
from masm_detect.results import write_json

from . import files
from .configuration import DetectorConfig, HubError
from .processing import DetectorImageProcessor
from .upload import push_folder

#: Arguments of `from_pretrained` that name a place on the hub.
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
#: Arguments that transformers' Auto classes and pipelines add; none of them changes what is loaded.
_OF_AUTO = ("_commit_hash", "_from_auto", "_from_pipeline", "adapter_kwargs", "code_revision")


class DetectorForImageClassification(PreTrainedModel):
    """Logits (0, z) for the labels real and fake, z the logit of the detector: softmax gives P(fake) = sigmoid(z).

    Args:
        config: of the detector.
        detector: with its weights; None: one with random weights, built from `config`.

    Attributes:
        detector: the `models.detector.Detector`; `masm_ext` converts it in place.
    """

    config_class = DetectorConfig
    main_input_name = "pixel_values"
    base_model_prefix = "detector"
    _supports_sdpa = True

    def __init__(self, config: DetectorConfig, detector: Detector | None = None):
        super().__init__(config)
        # transformers builds models on the meta device, where buffers that are in no checkpoint would have no values
        with torch.device("cpu"):
            self.detector = Detector(build(config.backbone)) if detector is None else detector
        self._run: Run | None = None
        self._weights_of_run: str | None = None
        self.post_init()

    def init_weights(self) -> None:
        """Nothing: the backbone has its weights, and transformers would draw those of replaced layers again."""

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing, as `init_weights`."""

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Logits of a batch, and its loss if labels are given.

        Args:
            pixel_values: [B, 3, side, side], normalised by `DetectorImageProcessor`, floating.
            labels: [B] of 0 (real) and 1 (fake), int64; None: no loss.
            return_dict: False: a tuple.
            **kwargs: none is used; False and None are accepted for what transformers adds.

        Returns:
            `logits` [B, 2], float32, and `loss`: the mean cross entropy, a scalar.

        Raises:
            HubError: an argument that the detector does not have.
        """
        requested = [name for name, value in kwargs.items() if value is not None and value is not False]
        if requested:
            raise HubError(f"a detector has no {', '.join(requested)}: leave it out")
        fake = self.detector(pixel_values.to(self.dtype))  # [B]
        logits = torch.stack([torch.zeros_like(fake), fake], dim=1)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def image_processor(self) -> DetectorImageProcessor:
        """The image processor with the preprocessing of the training."""
        return DetectorImageProcessor.for_model(self.config)

    @classmethod
    def from_detector(
        cls, detector: Detector, *, base_model: str | None = None, base_hash: str | None = None,
        method: MethodConfig | None = None, data: DataConfig | None = None
    ) -> DetectorForImageClassification:  # fmt: skip
        """A detector in memory as a model of transformers; the weights are shared, not copied.

        Args:
            detector: in any state of training.
            base_model: name of its pretrained backbone, for `save_pretrained(merged=False)`.
            base_hash: `methods.adapters.base_sha256`, taken before a method changed the backbone.
            method: what changed it; None: layers of masm_ext, or nothing.
            data: the preprocessing (`crop`, `normalize_first`); None: the defaults of `DataConfig`.
        """
        data = DataConfig() if data is None else data
        config = DetectorConfig(
            backbone=describe(detector.backbone),
            crop=data.crop,
            normalize_first=data.normalize_first,
            base_model=base_model,
            base_sha256=base_hash,
            method=None if method is None else asdict(method),
        )
        return cls(config, detector)

    @classmethod
    def from_run(cls, run: Path | str) -> DetectorForImageClassification:
        """The detector of a run folder written by `masm train`, on the CPU, in eval mode.

        Args:
            run: the run folder.

        Raises:
            ConfigError: the folder holds no finished run.
        """
        config, detector = load_run(run)
        model = cls.from_detector(
            detector.eval(),
            base_model=config.model.backbone,
            base_hash=base_sha256(new_detector(config.model)),
            method=config.method,
            data=config.data,
        )
        model._run = Run(Path(run), config, detector, model.config.base_sha256)
        model._weights_of_run = tensors_sha256(detector.state_dict())
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Path | str,
        *,
        config: DetectorConfig | None = None,
        base: str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> DetectorForImageClassification:
        """The model that `save_pretrained` wrote, in eval mode.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            config: in place of the one in the folder.
            base: folder or name of the pretrained backbone, in place of the saved name; for adapters only.
            dtype: of the weights; None or "auto": as saved.
            device_map: one device; None: the CPU.
            attn_implementation: "sdpa" (fused) or "eager", as runs compute on the CPU; None: the backbone's default.
            **kwargs: `cache_dir`, `force_download`, `local_files_only`, `proxies`, `revision`, `subfolder`, `token`,
                as of `transformers.PreTrainedModel.from_pretrained`.

        Raises:
            HubError: no detector is there, its files are incomplete, or an argument is not known.
            BackboneError: the backbone cannot be built or loaded.
            CheckpointError, masm_ext.AdapterError: the base is not the one that the adapter was trained on.
        """
        name = str(pretrained_model_name_or_path)
        dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
        if kwargs.pop("trust_remote_code", None):
            raise HubError("trust_remote_code is not needed: no code of a checkpoint is run; leave it out")
        attention = attn_implementation or getattr(config, "_attn_implementation", None)
        if attention not in (None, "sdpa", "eager"):
            raise HubError(f"attn_implementation is {attention!r}: give sdpa or eager")
        if kwargs.pop("use_safetensors", None) is False:
            raise HubError("use_safetensors=False: weights are read as safetensors only; leave it out")
        hub = {key: kwargs.pop(key) for key in _HUB if kwargs.get(key) is not None}
        unknown = sorted(key for key, value in kwargs.items() if key not in _OF_AUTO and value is not None)
        if unknown:
            raise HubError(f"a detector cannot be loaded with {', '.join(unknown)}: leave it out")
        if config is None:
            config = _config_of(name, hub)
        if config.merged:
            if base is not None:
                raise HubError(f"{name} holds merged weights and needs no base: leave out base={base!r}")
            model = cls._with_weights(config, files.read_weights(name, **hub))
        else:
            model = cls._with_adapter(config, name, base, hub)
        if attention is not None:
            model.detector.backbone.set_attention(attention)
        return model.to(device=_device(device_map), dtype=_dtype(dtype, config)).eval()

    @classmethod
    def _with_weights(cls, config: DetectorConfig, state: Mapping[str, Tensor]) -> DetectorForImageClassification:
        model = cls(config)
        try:
            model.detector.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise HubError(f"the weights do not fit the configuration: {' '.join(str(error).split())}") from error
        return model

    @classmethod
    def _with_adapter(
        cls, config: DetectorConfig, name: str, base: str | None, hub: dict[str, Any]
    ) -> DetectorForImageClassification:
        described, source = config.backbone, base or config.base_model
        if source is None:
            raise HubError(f"{name} holds an adapter and not the name of its base: give base=")
        backbone = load_backbone(
            source,
            image_size=described["image_size"],
            pool=described["pool"],
            local_files_only=bool(hub.get("local_files_only")),
            cache_dir=hub.get("cache_dir"),
        )
        backbone.mean, backbone.std = tuple(described["mean"]), tuple(described["std"])
        detector = Detector(backbone)
        found = base_sha256(detector)
        if config.base_sha256 is not None and found != config.base_sha256:
            raise HubError(
                f"the adapter in {name} was trained on another backbone than {source}: the SHA-256 of its weights is "
                f"{found[:12]}..., not {config.base_sha256[:12]}...; give the right one with base="
            )
        load_method(detector, _method_of(config), files.adapter_folder(name, **hub))
        return cls(config, detector)

    def save_pretrained(
        self,
        save_directory: Path | str,
        merged: bool = True,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write the configuration, the preprocessing, and the weights or the adapter; a run also gets its model card.

        Args:
            save_directory: the folder; files of an earlier save are replaced, others stay.
            merged: dense weights, which need nothing of masm_ext; False: the adapter and the head only, and the name
                and hash of the base.
            state_dict: weights in place of the model's own.
            max_shard_size: of a file of dense weights, in bytes or as "5GB".
            is_main_process: False: nothing is written.
            **kwargs: none is used; accepted is what transformers' Trainer adds.

        Raises:
            HubError: an argument that is not known, or an adapter of a model that has none.
        """
        unknown = sorted(key for key, value in kwargs.items() if value and key != "safe_serialization")
        if unknown:
            raise HubError(f"a detector cannot be saved with {', '.join(unknown)}: leave it out (push_to_hub uploads)")
        if not is_main_process:
            return
        detector = self._detector_with(state_dict)
        with files.written_together(save_directory) as folder:
            config = self._configuration(merged)
            config.save_pretrained(folder)
            self.image_processor().save_pretrained(folder)
            if merged:
                _write_weights(detector, folder, max_shard_size)
            else:
                _write_adapter(detector, config, folder)
            if self._run is not None:
                self._write_card(detector, folder, Path(save_directory).name, merged)

    def push_to_hub(self, repo_id: str, *, merged: bool = True, **options: Any) -> Any:
        """Upload what `save_pretrained` writes to a model repository of the Hugging Face Hub.

        Args:
            repo_id: "owner/name".
            merged: as of `save_pretrained`.
            **options: as of `upload.push_folder`: `private`, `token`, `revision`, `create_pr`, `commit_message`.

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            HubError: an adapter whose base is a folder of this machine, which no one else could load.
        """
        if not merged and self.config.base_model is not None and without_folder(self.config.base_model)[1]:
            raise HubError(
                f"the base model {self.config.base_model} is a folder of this machine: upload with merged=True, or "
                "upload the base and set config.base_model to its hub id"
            )
        with tempfile.TemporaryDirectory(prefix="hub-") as parent:
            folder = Path(parent) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder, merged)
            return push_folder(folder, repo_id, **options)

    def _configuration(self, merged: bool) -> DetectorConfig:
        """The configuration as it is saved: merged weights keep the name of a local base, not its folder."""
        config = copy.deepcopy(self.config)
        config.merged = merged
        config.architectures = [type(self).__name__]
        config.dtype = self.dtype
        config._name_or_path = ""  # a folder of this machine
        if merged:
            config.method = None
            if config.base_model is not None:
                config.base_model, _ = without_folder(config.base_model)
        elif config.method is None:
            config.method = {"name": "masm"}
        return config

    def _detector_with(self, state: Mapping[str, Tensor] | None) -> Detector:
        if state is None:
            return self.detector
        changed = copy.deepcopy(self)
        changed.load_state_dict(state)
        return changed.detector

    def _write_card(self, detector: Detector, folder: Path, name: str, merged: bool) -> None:
        if tensors_sha256(detector.state_dict()) != self._weights_of_run:
            warnings.warn(
                "the weights were changed since they were loaded from the run: no model card is written, for its "
                "numbers are those of the run",
                stacklevel=3,
            )
            return
        usage = "hub" if merged else "hub-adapter"
        write_model_card(self._run, folder, None, library="masm_ext", usage=usage, name=name, license=None)
        write_json(folder / "preprocessing.json", preprocessing_of(self._run))


def _config_of(name: str, hub: dict[str, Any]) -> DetectorConfig:
    path = files.find(name, files.CONFIG, **hub)
    if path is None:
        raise HubError(f"{name} has no {files.CONFIG}: give a folder that save_pretrained wrote, or a hub id")
    values = files.read_json(path)
    if values.get("model_type") != DetectorConfig.model_type:
        raise HubError(f"{path} is of a {values.get('model_type')!r} model, not of a {DetectorConfig.model_type!r}")
    return DetectorConfig.from_dict(values)


def _method_of(config: DetectorConfig) -> MethodConfig:
    values = dict(config.method)
    return MethodConfig(**values | {"masm": MasmOptions(**values.get("masm", {}))})


def _write_weights(detector: Detector, folder: Path, max_shard_size: int | str) -> None:
    from huggingface_hub import save_torch_state_dict

    plain = detector
    if not is_plain(detector):
        plain = copy.deepcopy(detector)
        make_plain(plain)
    save_torch_state_dict(plain.state_dict(), folder, max_shard_size=max_shard_size, metadata={"format": "pt"})


def _write_adapter(detector: Detector, config: DetectorConfig, folder: Path) -> None:
    method = registry.load(config.method["name"])
    missing = [key for key in ("base_model", "base_sha256") if getattr(config, key) is None]
    if missing:
        raise HubError(
            f"an adapter needs config.{' and config.'.join(missing)}, which this model does not have: save it with "
            "merged=True"
        )
    save_method(detector, method, _method_of(config), folder / files.ADAPTER, base=config.base_sha256)


def _device(device_map: Any) -> torch.device:
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return torch.device("cpu")
    try:
        return torch.device(device_map)
    except (TypeError, RuntimeError) as error:
        raise HubError(f'device_map is {device_map!r}: a detector is on one device; give it, as "cuda:0"') from error


def _dtype(dtype: torch.dtype | str | None, config: DetectorConfig) -> torch.dtype:
    wanted = getattr(config, "dtype", None) if dtype in (None, "auto") else dtype
    wanted = getattr(torch, wanted.removeprefix("torch."), None) if isinstance(wanted, str) else wanted
    if wanted is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise HubError(f"dtype is {dtype!r}: give a floating dtype of torch, such as torch.float32")
    return wanted or torch.float32
