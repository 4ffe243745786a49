"""One good call of every op: its arguments by name, in the order of its schema."""

import torch
from mask_states import fresh, policy_of, step

from masm_ext import reference

M, N, D, R, K, L, J = 4, 6, 5, 3, 2, 3, 2
OFFSETS = [0, 2, 3]


def linear():
    return {
        "x": torch.randn(M, D),
        "weight": torch.randn(N, D),
        "u": torch.randn(R, N),
        "s": torch.rand(R),
        "v": torch.randn(R, D),
        "bias": torch.randn(N),
        "mask": torch.ones(K, dtype=torch.bool),
        "offsets": OFFSETS,
        "need_p": True,
        "strategy": "",
    }


def linear_backward():
    args = linear()
    forward = {name: args[name] for name in ("x", "weight", "u", "s", "v")}
    return {
        "dy": torch.randn(M, N),
        **forward,
        "p": torch.randn(M, R),
        "mask": args["mask"],
        "offsets": OFFSETS,
        **dict.fromkeys(("need_dx", "need_du", "need_ds", "need_dv", "need_dbias"), True),
        "strategy": "",
    }


def of_layers(args, names):
    return {name: [value.clone() for _ in range(J)] if name in names else value for name, value in args.items()}


def group():
    return of_layers(linear(), ("weight", "u", "s", "v", "bias", "mask"))


def group_backward():
    args = of_layers(linear_backward(), ("dy", "weight", "u", "s", "v", "mask"))
    return args | {"p": torch.randn(M, J * R)}


def fold():
    return {name: linear()[name] for name in ("weight", "u", "s", "v")}


def penalty():
    args = of_layers(fold(), ("weight", "u", "s", "v"))
    return {
        "weights": args["weight"],
        **{name: args[name] for name in ("u", "s", "v")},
        "s0": [torch.rand(R) for _ in range(J)],
        "weight_norm2": [torch.rand(1) for _ in range(J)],
        "offsets": OFFSETS * J,
        "subspaces": [K] * J,
        "need_gradients": True,
    }


def adamw():
    shapes = [(4, 3), (7,)]
    tensors = {
        name: [torch.rand(s) for s in shapes] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "penalties")
    }
    return {
        **tensors,
        "steps": torch.zeros(3, dtype=torch.int64),
        "mask": torch.ones(3),
        "segments": torch.tensor([[0, 0, 12, 0], [1, 0, 7, 2]]),
        "hyper": torch.tensor([[0.1, 0.9, 0.99, 1e-8, 0.0]] * 2, dtype=torch.float64),
        "grad_scale": torch.ones(1),
        "found_inf": torch.zeros(1),
    }


def update():
    names = ("sums", "counts", "masks", "live", "counters", "history", "history_steps", "stats", "found", "owned")
    stats, _, owned = step(L, K, torch.Generator().manual_seed(0))
    state = (*fresh(L, K), stats, torch.zeros(1), owned)
    rules = ("decay", "warmup", "interval", "hysteresis", "keep", "threshold", "least", "probe_interval", "probe_steps")
    return dict(zip(names, state)) | dict(zip((*rules, "select"), (0.9, *policy_of("best layers", L))))


OPS = {
    "subspace_linear": linear,
    "subspace_linear_backward": linear_backward,
    "subspace_linear_group": group,
    "subspace_linear_group_backward": group_backward,
    "fold": fold,
    "subspace_penalty": penalty,
    "masked_adamw_": adamw,
    "update_masks_": update,
}


def kernel(op):
    return getattr(torch.ops.masm, op)


def formula(op):
    function = getattr(reference, op)
    return lambda *args: function(*args[:-1]) if op.startswith("subspace_linear") else function(*args)
