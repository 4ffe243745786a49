"""The policies of masks, and the agreement of gradients between domains that they may rank layers by."""

import copy

import pytest
import torch
from optimizer_runs import base, through_a_file

from masm_ext import LayerMasks, MaskedAdamW, MASMConfig, convert, param_groups
from masm_ext.registry import MASK_POLICIES

L, K = 6, 2


def config(**fields):
    return MASMConfig(num_subspaces=K, subspace_rank=2, mask_active_fraction=0.5, mask_warmup=2, **fields)


def snr(seed=0):
    return torch.randn(L, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["bias_variance", "inverted", "random", "fixed"])
def test_policies_keep_the_same_number_of_layers(name):
    mask = MASK_POLICIES[name](snr(), torch.ones(L, K), config(), 2)
    assert mask.sum(0).tolist() == [3, 3] and set(mask.flatten().tolist()) == {0, 1}


def test_inverted_is_the_complement_at_one_half():
    start = torch.zeros(L, K)
    kept, others = (MASK_POLICIES[name](snr(), start, config(), 2) for name in ("bias_variance", "inverted"))
    assert torch.equal(kept + others, torch.ones(L, K))


def test_random_depends_on_the_step_only():
    draw = MASK_POLICIES["random"]
    first = draw(snr(0), torch.ones(L, K), config(), 10)
    assert torch.equal(first, draw(snr(1), torch.zeros(L, K), config(), 10))
    assert not torch.equal(first, draw(snr(0), torch.ones(L, K), config(mask_seed=1), 10))
    assert any(not torch.equal(first, draw(snr(0), torch.ones(L, K), config(), step)) for step in (20, 30, 40))


def test_fixed_stays_after_the_first_selection():
    current = MASK_POLICIES["fixed"](snr(0), torch.ones(L, K), config(), 2)
    assert torch.equal(MASK_POLICIES["fixed"](snr(1), current, config(), 2 + config().mask_interval), current)


@pytest.mark.parametrize(("policy", "warmup"), [("fixed", 0), ("fixed", 3), ("random", 0)])
def test_controls_keep_their_masks_between_selections(policy, warmup):
    """No probe trains a block that they masked; a first selection is made without a warm-up too."""
    model, _, _ = build(statistic="snr")
    made = MASMConfig(
        num_subspaces=2, subspace_rank=[3, 2], mask_policy=policy, mask_warmup=warmup, mask_interval=4,
        mask_probe_interval=2, mask_probe_steps=1,
    )  # fmt: skip
    masks = LayerMasks(model, made)
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=masks)
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(16):
        give_gradients(model, 0, generator, False)
        optimizer.step()
        seen.append(masks.masks.clone())
    first = warmup or 4
    assert seen[first - 1].sum() == 2 and (first == 1 or seen[first - 2].sum() == 4)
    chosen = {str(mask.tolist()) for mask in seen[first - 1 :]}
    assert len(chosen) == 1 if policy == "fixed" else len(chosen) <= 4
    assert all(mask.sum() == 2 for mask in seen[first - 1 :])


@pytest.mark.parametrize("policy", ["inverted", "random", "soft"])
def test_a_threshold_is_refused_where_it_has_no_meaning(policy):
    with pytest.raises(ValueError, match=r"mask_threshold is 0\.5, but mask_policy"):
        MASMConfig(mask_policy=policy, mask_threshold=0.5)


def test_soft_scales_by_the_snr():
    values = torch.tensor([[4.0, 1.0], [2.0, -1.0], [1.0, 0.5], [-3.0, 0.2], [0.0, 0.0], [0.5, 2.0]]).double()
    mask = MASK_POLICIES["soft"](values, torch.ones(L, K), config(), 2)
    assert mask[:, 0].tolist() == [1, 1, 1, 0, 0, 0.5]  # full from the third largest on
    assert mask[:, 1].tolist() == pytest.approx([1, 0, 1, 0.4, 0, 1])


def build(policy="bias_variance", statistic="agreement"):
    model = base()
    made = MASMConfig(
        target_modules=["0", "2"],
        modules_to_save="4",
        num_subspaces=2,
        subspace_rank=[3, 2],
        mask_statistic=statistic,
        mask_policy=policy,
        mask_warmup=4,
        mask_interval=4,
        mask_probe_interval=5,
        mask_probe_steps=2,
        mask_active_fraction=0.5,
        mask_decay=0.9,
    )
    convert(model, made, use_cache=False, progress=False)
    masks = LayerMasks(model, made)
    return model, masks, MaskedAdamW(param_groups(model, 0.0 + 1e-6), masks=masks)


def give_gradients(model, domain, generator, conflict):
    """Layer 0: the same gradient in all domains, plus noise. Layer 2: opposed between domains 0 and 1 (`conflict`)."""
    for index in (0, 2):
        sign = -1.0 if conflict and index == 2 and domain == 1 else 1.0
        for p in (model[index].u, model[index].s, model[index].v):
            direction = torch.linspace(-1, 1, p.numel()).reshape(p.shape) + 0.3
            p.grad = sign * direction + 0.3 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("policy", ["bias_variance", "inverted"])
def test_agreement_tells_layers_whose_gradients_conflict(policy):
    model, masks, optimizer = build(policy)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        give_gradients(model, step % 2, generator, conflict=True)
        masks.domain = step % 2
        optimizer.step()
    values = masks.snr
    assert (values[0] > 0.5).all() and (values[1] < -0.5).all()
    row = 0 if policy == "bias_variance" else 1
    assert masks.masks[row].tolist() == [1, 1] and masks.masks[1 - row].tolist() == [0, 0]


def test_noise_does_not_agree():
    model, masks, optimizer = build()
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        for index in (0, 2):
            for p in (model[index].u, model[index].s, model[index].v):
                p.grad = torch.randn(p.shape, generator=generator)
        masks.domain = step % 3
        optimizer.step()
    assert masks.snr.abs().max() < 0.25  # single blocks of 60 to 90 elements, about ten steps in the average


def test_agreement_needs_a_domain():
    model, _, optimizer = build()
    give_gradients(model, 0, torch.Generator().manual_seed(0), False)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"set masks\.domain before"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    masks = optimizer.masks
    masks.domain = 0
    with pytest.raises(RuntimeError, match="set to 0 and 1 for one optimizer step"):
        masks.domain = 1


def test_agreement_continues_from_a_file():
    def steps(model, masks, optimizer, generator, count, first):
        for step in range(first, first + count):
            give_gradients(model, step % 3, generator, True)
            masks.domain = step % 3
            optimizer.step()

    model, masks, optimizer = build()
    generator = torch.Generator().manual_seed(0)
    steps(model, masks, optimizer, generator, 7, 0)
    saved, weights = through_a_file(optimizer.state_dict()), through_a_file(model.state_dict())
    state = generator.get_state()
    steps(model, masks, optimizer, generator, 8, 7)
    again, its_masks, its_optimizer = build()
    again.load_state_dict(weights)
    its_optimizer.load_state_dict(saved)
    generator.set_state(state)
    steps(again, its_masks, its_optimizer, generator, 8, 7)
    assert torch.equal(masks.snr, its_masks.snr) and torch.equal(masks.masks, its_masks.masks)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_a_skipped_step_is_not_remembered():
    model, masks, optimizer = build()
    generator = torch.Generator().manual_seed(0)
    for domain, bad in ((0, False), (1, True), (1, False), (0, False)):
        give_gradients(model, domain, generator, False)
        if bad:
            model[0].u.grad[0, 0] = float("inf")
        masks.domain = domain
        optimizer.step()
    assert optimizer.skipped_steps == 1 and masks.step == 3
    assert masks.snr.isfinite().all() and (masks.snr > 0.5).all()


def test_a_copy_and_another_number_of_gradients():
    model, masks, optimizer = build()
    generator = torch.Generator().manual_seed(0)
    for domain in (0, 1):
        give_gradients(model, domain, generator, False)
        masks.domain = domain
        optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert torch.equal(twin.masks.snr, masks.snr)
    assert all(torch.equal(twin.masks._agreement.last[d], masks._agreement.last[d]) for d in (0, 1))
    state = masks.state_dict()
    state["gradients"] = state["gradients"][:, :-1]
    with pytest.raises(ValueError, match="gradients must have shape"):
        masks.load_state_dict(state)


@pytest.mark.parametrize("policy", ["none", "static", "specialists", "random"])
def test_agreement_needs_a_policy_that_ranks(policy):
    with pytest.raises(ValueError, match="needs a policy that ranks blocks"):
        MASMConfig(mask_policy=policy, mask_statistic="agreement")


def test_an_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match=r'mask_statistic must be "snr" or "agreement", got \'luck\''):
        MASMConfig(mask_statistic="luck")


def test_specialists_learn_from_their_own_domain():
    model, masks, optimizer = build("specialists", "snr")
    generator = torch.Generator().manual_seed(0)
    for step, domain in enumerate((0, 1, 2, 0)):  # domain 2 has subspace 0, as there are two
        before = {index: model[index].u.detach().clone() for index in (0, 2)}
        masks.domain = domain
        assert all(model[index].mask.tolist() == [domain % 2 == 0, domain % 2 == 1] for index in (0, 2))
        x = torch.randn(16, 12, generator=generator)
        (model(x) - x[:, :1].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for index, u in before.items():
            first, second = model[index].u[:3], model[index].u[3:]
            moved = [not torch.equal(a, b) for a, b in ((first, u[:3]), (second, u[3:]))]
            assert moved == [domain % 2 == 0, domain % 2 == 1], step
    with pytest.raises(RuntimeError, match=r"'specialists' with 'snr': set masks\.domain"):
        give_gradients(model, 0, generator, False)
        optimizer.step()


def test_a_policy_that_selects_nothing_is_warned_of():
    model, _, _ = build(statistic="snr")
    made = MASMConfig(num_subspaces=2, subspace_rank=[3, 2], mask_warmup=0, mask_interval=1)
    masks = LayerMasks(model, made, policy=lambda snr, step, current: torch.zeros_like(current))
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=masks)
    give_gradients(model, 0, torch.Generator().manual_seed(0), False)
    with pytest.warns(UserWarning, match="selected no block"):
        optimizer.step()
