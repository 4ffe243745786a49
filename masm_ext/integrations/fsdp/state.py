"""The state of model and optimizer for ``torch.distributed.checkpoint``."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from ...optim import MaskedAdamW
from ...wrappers import own_state, unwrapped_modules


class TrainingState:
    """A converted model and its :class:`masm_ext.MaskedAdamW` as one entry of a distributed checkpoint.

    ::

        dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)
        dcp.load({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)

    A checkpoint can be loaded by another number of processes, and by one without sharding: weights, moments, masks and
    statistics are the same bit for bit. Moments are stored by the names of their parameters. ``dcp`` writes plain
    values with pickle: load only checkpoints that you trust.

    Args:
        model: a converted model, sharded by :func:`masm_ext.integrations.fsdp.shard` or not.
        optimizer: over parameters of ``model``.

    Raises:
        ValueError: the optimizer holds a parameter that is not one of the model.
    """

    def __init__(self, model: nn.Module, optimizer: MaskedAdamW) -> None:
        names = {id(p): n for prefix, module in unwrapped_modules(model) for n, p in own_state(prefix, module)}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        foreign = [list(p.shape) for p in params if id(p) not in names]
        if foreign:
            raise ValueError(
                f"TrainingState: {len(foreign)} parameters of the optimizer are not in the model, the first of shape "
                f"{foreign[0]}; make the optimizer from the sharded model"
            )
        self.model = model
        self.optimizer = optimizer
        self._params = params
        self._names = [names[id(p)] for p in params]

    def state_dict(self) -> dict[str, Any]:
        """The state, as ``dcp.save`` and ``dcp.load`` take it. Every process must call it."""
        for p in self._params:
            self.optimizer._init_state(p)  # zero moments are those of the first step
        state = self.optimizer.state_dict()
        masked = state["masked"]
        masks = masked["masks"] or {}
        # One value of bytes: the history of selections has another length in the checkpoint.
        tensors = {name: value.contiguous() for name, value in masks.items() if isinstance(value, Tensor)}
        return {
            "model": get_model_state_dict(self.model),
            "moments": {name: dict(self.optimizer.state[p]) for name, p in zip(self._names, self._params)},
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]],
            "names": self._names,
            "steps": masked["steps"],
            "skipped": masked["skipped"],
            "masks": {"tensors": save(tensors), "step": masks.get("step"), "layers": masks.get("layer_names")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, maybe in another number of processes.

        Args:
            state: the state.

        Raises:
            ValueError: it belongs to another model, config or set of parameter groups.
        """
        if state["names"] != self._names:
            raise ValueError(
                f"TrainingState: the checkpoint holds {len(state['names'])} parameters ({state['names'][:2]} ...), "
                f"this optimizer {len(self._names)} ({self._names[:2]} ...); make it as the saved one was made"
            )
        own = self.optimizer.state_dict()["param_groups"]
        if len(own) != len(state["groups"]):
            raise ValueError(
                f"TrainingState: the checkpoint holds {len(state['groups'])} parameter groups, this optimizer "
                f"{len(own)}; make it as the saved one was made"
            )
        masks = None
        if state["masks"]["step"] is not None:
            tensors = load(state["masks"]["tensors"])
            masks = {**tensors, "step": state["masks"]["step"], "layer_names": state["masks"]["layers"]}
        set_model_state_dict(self.model, state["model"])
        self.optimizer.load_state_dict(
            {
                "state": {i: state["moments"][name] for i, name in enumerate(self._names)},
                "param_groups": [
                    {**settings, "params": group["params"]} for settings, group in zip(state["groups"], own)
                ],
                "masked": {
                    "steps": torch.as_tensor(state["steps"]),
                    "skipped": state["skipped"],
                    "masks": masks,
                },
            }
        )
