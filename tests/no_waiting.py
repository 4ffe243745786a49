"""A mode in which every operation that waits for the device raises. With fake tensors on "cuda", no GPU is needed."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Waits(RuntimeError):
    pass


class NoWaiting(TorchDispatchMode):
    """Raises Waits if the host reads a value or copies between devices, except non-blocking copies from pinned memory,
    which it counts in `uploads`. Raises nothing while `warming_up`."""

    ASK = (
        aten._local_scalar_dense,
        aten.item,
        aten.equal,
        aten.nonzero,
        aten.is_nonzero,
        aten.masked_select,
        aten._unique2,
    )

    def __init__(self, warming_up=False):
        super().__init__()
        self.pinned, self.uploads, self.warming_up = [], 0, warming_up

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in (aten.pin_memory, aten._pin_memory):  # there is no pinned memory here
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if self.warming_up:
            return func(*args, **kwargs)
        if func.overloadpacket in self.ASK:
            raise Waits(str(func))
        out = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in tensors}) > 1:
            blocks = not (func is aten.copy_.default and (kwargs.get("non_blocking") or args[2:] == (True,)))
            if blocks or not any(args[1] is t for t in self.pinned):
                raise Waits(f"{func} between devices")
            self.uploads += 1
        return out
