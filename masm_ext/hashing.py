"""SHA-256 of tensors: the identity that SVD caches and adapters are bound to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .sharded import is_sharded, whole_tensor


def weight_hash(weight: Tensor) -> str:
    """SHA-256 over shape, dtype and bytes of a tensor; of a wrapper subclass, over the tensors that it holds."""
    data = weight.detach()
    digest = hashlib.sha256(f"{list(data.shape)} {data.dtype}".encode())
    if is_traceable_wrapper_subclass(data):
        names, _ = data.__tensor_flatten__()
        for name in names:
            digest.update(f" {type(data).__name__}.{name} {weight_hash(getattr(data, name))}".encode())
    elif data.numel():
        digest.update(data.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def list_hash(numbers: Sequence[int]) -> str:
    """16 hexadecimal digits that differ between lists of integers, in their order; "" for an empty one."""
    text = ",".join(map(str, numbers))
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""


def tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """:func:`weight_hash` of named tensors. A tensor with several names is hashed once.

    A DTensor is gathered from all processes and hashed as a whole, one after another: all processes must call this.
    """
    gathered = {id(t): weight_hash(whole_tensor(t)) for t in tensors.values() if is_sharded(t)}
    distinct = {id(t): t for t in tensors.values() if id(t) not in gathered}
    # Hashing releases the interpreter lock. Large tensors first: no thread is left with one at the end.
    order = sorted(distinct, key=lambda i: distinct[i].numel() * distinct[i].element_size(), reverse=True)
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        hashes = gathered | dict(zip(order, pool.map(weight_hash, (distinct[i] for i in order))))
    return {name: hashes[id(t)] for name, t in tensors.items()}
