"""MASM under the Trainer of transformers: its optimizer, and a callback that logs masks and penalties.

Needs ``pip install 'masm_ext[peft]'``. For a model that ``convert`` or ``get_peft_model`` returned::

    trainer = Trainer(model, args, train_dataset=data, optimizers=(masm_optimizer(model, config), None))
    MASMCallback.install(trainer)
    trainer.train()
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import MASMConfig
from ..files import write_atomically
from ..masks import LayerMasks
from ..nn.masm_linear import MASMLinear
from ..optim import MaskedAdamW, scale_free_groups
from ..wrappers import modules_of, unwrap

#: What ``param_groups`` and ``scale_free_groups`` are.
Groups = Callable[..., list[dict[str, Any]]]
#: The selections of the masks, in every checkpoint and at the end in the output folder.
HISTORY_NAME = "masm_masks.json"


def masm_optimizer(
    model: nn.Module,
    config: MASMConfig,
    *,
    groups: Groups = scale_free_groups,
    terms: Mapping[str, float] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **rates: Any,
) -> MaskedAdamW:
    """The optimizer of a model, with its masks and penalties, for ``Trainer(optimizers=(optimizer, None))``.

    The Trainer makes its schedule of learning rates from these groups. It does not read ``learning_rate`` and
    ``weight_decay`` of its ``TrainingArguments`` then.

    Args:
        model: the model after ``convert`` or ``get_peft_model``, on any device.
        config: of the conversion; for a PEFT model ``MASMTunerConfig.masm_config()``. The mask fields,
            ``orthogonality`` and ``spectral_consistency`` are read.
        groups: makes the parameter groups: :func:`masm_ext.scale_free_groups` or :func:`masm_ext.param_groups`.
        terms: coefficients of further penalties, as for :class:`masm_ext.MaskedAdamW`.
        betas: decays of the two moments.
        eps: added to the root of the second moment.
        rates: further arguments of ``groups``, such as ``lr`` and ``head_lr``.

    Returns:
        The optimizer; its ``masks`` are the :class:`masm_ext.LayerMasks` of the model.

    Raises:
        ValueError: the model has no active MASMLinear, or the config has both a lift and a penalty.
    """
    if config.lift and (config.orthogonality or config.spectral_consistency):
        raise ValueError(
            f"masm_optimizer: config.lift is {config.lift}, with which the penalties cannot be used: set orthogonality "
            f"(now {config.orthogonality}) and spectral_consistency (now {config.spectral_consistency}) to 0"
        )
    return MaskedAdamW(
        groups(model, **rates),
        betas=betas,
        eps=eps,
        masks=LayerMasks(model, config),
        orthogonality=config.orthogonality,
        spectral_consistency=config.spectral_consistency,
        terms=terms,
    )


class MASMOptimizerFactory:
    """Makes :func:`masm_optimizer` when the Trainer has its model, for ``model_init`` and hyperparameter search.

    ``Trainer(model_init=..., optimizer_cls_and_kwargs=(MASMOptimizerFactory, {"config": config, "lr": 2e-2}))``: the
    dict holds the arguments of :func:`masm_optimizer` but for the model.
    """

    def __call__(self, model: nn.Module, **arguments: Any) -> MaskedAdamW:
        """The optimizer of a model.

        Args:
            model: the model of the Trainer.
            arguments: those of :func:`masm_optimizer`.
        """
        return masm_optimizer(model, **arguments)


class MASMCallback(TrainerCallback):
    """Logs masks and penalties, and writes the selections of the masks beside every checkpoint.

    Masks are updated by :class:`masm_ext.MaskedAdamW` itself, once per optimizer step: with gradient accumulation they
    see the accumulated gradient, and a step that the gradient scaler skips changes nothing. Their state is part of
    ``optimizer.pt``, so a resumed run goes on bit for bit. The callback adds to every entry of the log:

    - ``masm/active_share``: share of the blocks (layer, subspace) that the next step updates;
    - ``masm/orthogonality``, ``masm/spectral_consistency``: the penalties, means over the layers, before the last step;
    - ``masm/relative_update``: ``||W_hat - W||_F / ||W||_F``, mean over the layers;
    - ``masm/skipped_steps``: steps skipped because a gradient was not finite.

    ``masm_masks.json`` holds the names of the layers and the last 1,024 selections
    (:attr:`masm_ext.LayerMasks.history`).
    """

    def __init__(self) -> None:
        self.optimizer: MaskedAdamW | None = None

    @classmethod
    def install(cls, trainer: Trainer) -> MASMCallback:
        """Add the callback to a Trainer before all others, so that TensorBoard and other reporters get its values too.

        Args:
            trainer: the Trainer.

        Returns:
            The callback.
        """
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the optimizer, and make checkpoints of a converted model keep its names of tensors.

        Args:
            args: of the Trainer.
            state: of the Trainer.
            control: of the Trainer.
            kwargs: hold the model and the optimizer.

        Raises:
            ValueError: the Trainer has another optimizer than MaskedAdamW.
        """
        optimizer = kwargs.get("optimizer")
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, MaskedAdamW) or optimizer.masks is None:
            raise ValueError(
                f"MASMCallback: the optimizer of the Trainer is a {type(optimizer).__name__} without masks: pass "
                "optimizers=(masm_optimizer(model, config), None)"
            )
        self.optimizer = optimizer
        model = unwrap(kwargs["model"])
        if isinstance(model, PreTrainedModel) and modules_of(model, MASMLinear):
            # Some models save their tensors under the names of older checkpoints, and the Trainer does not translate
            # them back when it resumes (huggingface/transformers#43701). A converted model is not for from_pretrained,
            # so its checkpoints keep the names of the model.
            model.save_pretrained = functools.partial(type(model).save_pretrained, model, save_original_format=False)

    def values(self) -> dict[str, float]:
        """The values of the log entry of this moment, by their names."""
        assert self.optimizer is not None, "the training has not begun"
        masks = self.optimizer.masks
        layers = list(masks.layers.values())
        found = {
            "masm/active_share": float((masks.masks > 0).float().mean()),
            "masm/relative_update": sum(layer.relative_update() for layer in layers) / len(layers),
            "masm/skipped_steps": float(self.optimizer.skipped_steps),
        }
        if self.optimizer.penalties is not None:
            for name, value in zip(("orthogonality", "spectral_consistency"), self.optimizer.penalties):
                found[f"masm/{name}"] = float(value) / len(layers)
        return found

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the values to the entry, and to the history in ``trainer_state.json``.

        Args:
            args: of the Trainer.
            state: of the Trainer; its last entry of the history is changed.
            control: of the Trainer.
            logs: the entry; changed.
            kwargs: not read.
        """
        if self.optimizer is None or logs is None or "loss" not in logs:  # entries of evaluation, and the last summary
            return
        values = self.values()
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the selections into the checkpoint.

        Args:
            args: of the Trainer.
            state: of the Trainer.
            control: of the Trainer.
            kwargs: not read.
        """
        name = f"checkpoint-{state.global_step}"
        # a trial of a hyperparameter search has a folder of its own in output_dir
        output = Path(args.output_dir)
        written = [folder for folder in (output / name, *output.glob(f"*/{name}")) if folder.is_dir()]
        if written:
            self._write(max(written, key=lambda folder: folder.stat().st_mtime), state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the selections into the output folder.

        Args:
            args: of the Trainer.
            state: of the Trainer.
            control: of the Trainer.
            kwargs: not read.
        """
        self._write(Path(args.output_dir), state)

    def _write(self, folder: Path, state: TrainerState) -> None:
        if self.optimizer is None or not state.is_world_process_zero:
            return
        masks = self.optimizer.masks
        record = {"layers": list(masks.layer_names), "step": masks.step, "history": masks.history}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / HISTORY_NAME, json.dumps(record).encode())
