"""Random learning states and steps, for the tests of every implementation of masm::update_masks_."""

import torch

#: the arguments of the op that say how to select and probe, in its order
POLICIES = {
    # warmup, interval, hysteresis, keep, threshold, least, probe_interval, probe_steps, select
    "best layers": (2, 3, 0.1, 2, 0.0, 1, 4, 2, True),
    "one layer, no advantage": (0, 1, 0.0, 1, 0.0, 1, 0, 1, True),
    "threshold": (1, 2, 0.2, 0, 0.35, 1, 3, 1, True),
    "a threshold that no layer reaches": (5, 4, 0.0, 0, 1.0, 1, 2, 5, True),
    "every layer": (0, 5, 0.1, -1, 0.0, 1, 2, 2, True),
    "no selection": (0, 1, 0.1, 1, 0.0, 1, 2, 1, False),
}


def policy_of(name, L):
    warmup, interval, hysteresis, keep, *rest = POLICIES[name]
    return (warmup, interval, hysteresis, L if keep < 0 else min(keep, L), *rest)


def fresh(L, K, rows=5, device="cpu"):
    """The state that the op changes, in its order."""
    return [
        torch.zeros(2, L, K, dtype=torch.float64, device=device),
        torch.zeros(2, L, K, dtype=torch.int64, device=device),
        torch.ones(2, L, K, device=device),
        torch.ones(L, K, dtype=torch.bool, device=device),
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.zeros(rows, L, K, 4, dtype=torch.float64, device=device),
        torch.zeros(rows, dtype=torch.int64, device=device),
    ]


def step(L, K, generator, coarse=False, device="cpu"):
    """(stats, found, owned): one step in ten was not taken, one block in ten got no gradient. coarse: few values, so
    that layers tie."""
    stats = torch.rand(L * K + 3, 2, dtype=torch.float64, generator=generator)
    if coarse:
        stats = (3 * stats).round() / 3
    stats[:, 0] -= 0.3  # a signal may be negative
    stats[:, 1] += stats[:, 0].abs()
    found = (torch.rand(1, generator=generator) < 0.1).float()
    owned = torch.rand(L, K, generator=generator) < (1.0 if coarse else 0.9)
    return stats.to(device), found.to(device), owned.to(device)


def assert_same(got, want, rtol=1e-13):
    """Sums differ in the last bit between implementations; whatever is counted or chosen does not differ."""
    for a, b in zip(got, want):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=rtol, atol=0)
        else:
            assert torch.equal(a, b)
