"""The tensors of a model that training changes: copied out, put back, and the hash of all others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from masm_detect.errors import CheckpointError
from masm_detect.hashes import tensors_sha256


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors that training changes, by name: trainable parameters, on the CPU."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_trainable_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into the trainable parameters of `model`; names and shapes must be exactly the same."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing, unexpected = sorted(set(parameters) - set(state)), sorted(set(state) - set(parameters))
    if missing or unexpected:
        raise CheckpointError(
            f"the saved weights do not fit this model: {len(missing)} missing (first: {missing[:3]}), "
            f"{len(unexpected)} unexpected (first: {unexpected[:3]})"
        )
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise CheckpointError(f"{name}: saved {list(state[name].shape)}, but the model has {list(parameter.shape)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def frozen_sha256(model: nn.Module) -> str:
    """Hash of everything that training leaves alone: a checkpoint fits only the very same frozen weights."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    return tensors_sha256({name: tensor for name, tensor in tensors.items() if id(tensor) not in trained})
