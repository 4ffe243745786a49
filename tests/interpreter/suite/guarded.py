"""Tensors at the edge of protected memory, or inside it: a stray read or write ends the process."""

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_kept = []


def untouchable(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor that may not be read at all."""
    count = torch.Size(shape).numel()
    size = -(-count * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size)
    t = torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
    _protect(t.data_ptr(), size)
    _kept.append(memory)
    return t


def _protect(address: int, size: int) -> None:
    if _libc.mprotect(address, size, 0):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(t: Tensor, at_end: bool) -> Tensor:
    """A contiguous copy of `t`; the byte after its last (at_end), or before its first, is on a protected page."""
    page, size = mmap.PAGESIZE, t.numel() * t.itemsize
    inside = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for wall in (base, base + page + inside):
        _protect(wall, page)
    _kept.append(memory)
    if size == 0:
        return t.clone()
    offset = page + inside - size if at_end else page
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset).view(t.shape)
    copy.copy_(t)
    return copy
