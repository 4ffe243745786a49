import copy
import pickle

import pytest
import torch
from torch import nn

from masm_ext import LayerMasks, MaskedAdamW, MASMConfig, convert, param_groups
from masm_ext.optim import blocks, masked_adamw

#: "equal to torch.optim.AdamW to a few units in the last place": the bound after 100 steps, relative to the largest
#: element. The single-step bound is in test_one_step_is_within_two_ulp.
AFTER_100_STEPS = 1e-5


def build(policy=None, **fields):
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 1))
    config = MASMConfig(target_modules=["0", "2"], modules_to_save="4", num_subspaces=2, subspace_rank=[3, 2], **fields)
    convert(model, config, use_cache=False, progress=False)
    return model, LayerMasks(model, config, policy)


def train(model, optimizer, steps, generator, hook=lambda: None):
    for _ in range(steps):
        x = torch.randn(32, 12, generator=generator)
        optimizer.zero_grad()
        (model(x) - x[:, :1].sin()).square().mean().backward()
        optimizer.step()
        hook()


def test_one_step_is_within_two_ulp_of_torch():
    for dtype in (torch.float32, torch.float64):
        p = torch.randn(10_000, dtype=dtype)
        ours, theirs = nn.Parameter(p.clone()), nn.Parameter(p.clone())
        a = MaskedAdamW([ours], lr=1e-3, weight_decay=0.1)
        b = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.1, foreach=False)
        g = torch.randn_like(p)
        ours.grad, theirs.grad = g.clone(), g.clone()
        a.step()
        b.step()
        ulp = torch.finfo(dtype).eps * theirs.detach().abs()
        assert ((ours - theirs).detach().abs() <= 2 * ulp + torch.finfo(dtype).eps * 1e-3).all()


def test_an_unmasked_run_equals_adamw():
    model, _ = build()
    twin = copy.deepcopy(model)
    ours = MaskedAdamW(param_groups(model, 1e-3, weight_decay=0.01))
    theirs = torch.optim.AdamW(param_groups(twin, 1e-3, weight_decay=0.01), foreach=False)
    train(model, ours, 100, torch.Generator().manual_seed(1))
    train(twin, theirs, 100, torch.Generator().manual_seed(1))
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        assert (a - b).abs().max() <= AFTER_100_STEPS * b.abs().max(), name


def test_masks_of_one_equal_no_masks_bit_for_bit():
    model, masks = build(mask_policy="none")
    twin = copy.deepcopy(model)
    train(model, MaskedAdamW(param_groups(model, 1e-3), masks=masks), 20, torch.Generator().manual_seed(1))
    train(twin, MaskedAdamW(param_groups(twin, 1e-3)), 20, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_a_masked_block_is_bit_for_bit_unchanged_over_100_steps():
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    model, masks = build(lambda *_: mask, mask_warmup=1, mask_interval=1, mask_probe_interval=0)
    optimizer = MaskedAdamW(param_groups(model, 1e-2, weight_decay=0.1), masks=masks)
    generator = torch.Generator().manual_seed(2)
    train(model, optimizer, 5, generator)  # moments are not zero when the mask closes

    def blocks(active):
        out = []
        for layer, row in zip(masks.layers.values(), mask):
            for k in range(2):
                if (row[k] > 0) == active:
                    rows = slice(layer.offsets[k], layer.offsets[k + 1])
                    for p in (layer.u, layer.s, layer.v):
                        state = optimizer.state[p]
                        out += [t[rows].clone() for t in (p.detach(), state["exp_avg"], state["exp_avg_sq"])]
        return out

    frozen, moving = blocks(False), blocks(True)
    steps = optimizer.state_dict()["masked"]["steps"]
    train(model, optimizer, 100, generator)
    assert all(torch.equal(a, b) for a, b in zip(frozen, blocks(False)))
    assert not any(torch.equal(a, b) for a, b in zip(moving, blocks(True)))
    assert (optimizer.state_dict()["masked"]["steps"] - steps)[:4].tolist() == [100, 0, 0, 100]


def test_soft_masks_scale_the_update():
    results = []
    for value in (1.0, 0.25):
        torch.manual_seed(0)
        soft = torch.full((2, 2), value)
        model, masks = build(lambda *_, soft=soft: soft, mask_warmup=0, mask_interval=1, mask_probe_interval=0)
        owned = torch.zeros(2, 2, dtype=torch.bool)
        masks.observe(torch.ones(4, 2, dtype=torch.float64), torch.zeros(1), owned)
        before = model[0].s.detach().clone()
        train(model, MaskedAdamW(param_groups(model, 1e-3), masks=masks), 1, torch.Generator().manual_seed(3))
        results.append(model[0].s.detach() - before)
    assert torch.allclose(results[1], 0.25 * results[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_skip_the_step_and_are_counted(bad):
    model, masks = build()
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=masks)
    generator = torch.Generator().manual_seed(1)
    train(model, optimizer, 3, generator)
    state = copy.deepcopy(optimizer.state_dict())
    params = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(4, 12)).sum().backward()
    model[2].v.grad[1, 2] = bad
    optimizer.step()
    assert optimizer.skipped_steps == 1 and masks.step == 3
    assert all(torch.equal(a, b) for a, b in zip(params, model.parameters()))
    after = optimizer.state_dict()
    assert torch.equal(after["masked"]["steps"], state["masked"]["steps"])
    for key, value in state["state"].items():
        assert all(torch.equal(value[n], after["state"][key][n]) for n in value)
    train(model, optimizer, 1, generator)
    assert masks.step == 4 and optimizer.skipped_steps == 1


def test_state_dict_round_trip_goes_on_bit_for_bit():
    fields = dict(mask_warmup=2, mask_interval=2, mask_probe_interval=3, mask_probe_steps=2)
    torch.manual_seed(5)
    model, masks = build(**fields)
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=masks)
    generator = torch.Generator().manual_seed(1)
    train(model, optimizer, 9, generator)
    torch.manual_seed(5)
    other, other_masks = build(**fields)
    other.load_state_dict(model.state_dict())
    other_masks.load_state_dict(masks.state_dict())
    other_optimizer = MaskedAdamW(param_groups(other, 7.0), masks=other_masks)
    other_optimizer.load_state_dict(optimizer.state_dict())
    assert other_optimizer.param_groups[0]["lr"] == 1e-3
    rng = generator.get_state()
    train(model, optimizer, 12, generator)
    generator.set_state(rng)
    train(other, other_optimizer, 12, generator)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert torch.equal(masks.masks, other_masks.masks) and masks.history == other_masks.history


def test_state_of_another_optimizer_is_refused():
    model, masks = build()
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=masks)
    with pytest.raises(ValueError, match="not written by MaskedAdamW"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    small = MaskedAdamW([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="the state has 1 blocks"):
        optimizer.load_state_dict(small.state_dict())


def test_half_precision_parameters_have_float32_moments_after_a_round_trip():
    p = nn.Parameter(torch.randn(5).bfloat16())
    optimizer = MaskedAdamW([p], lr=1e-2)
    p.grad = torch.randn(5).bfloat16()
    optimizer.step()
    again = MaskedAdamW([p], lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    assert again.state[p]["exp_avg"].dtype == torch.float32
    assert torch.equal(again.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])


def test_grad_scaler():
    model, masks = build(mask_policy="none")
    twin = copy.deepcopy(model)
    plain = MaskedAdamW(param_groups(twin, 1e-3))
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=masks)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    x = torch.randn(16, 12)
    for m, step in ((twin, None), (model, scaler)):
        loss = m(x).square().mean()
        (loss if step is None else step.scale(loss)).backward()
    plain.step()
    scaler.step(optimizer)
    scaler.update()
    for a, b in zip(model.parameters(), twin.parameters()):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)
    optimizer.zero_grad()
    scaler.scale(model(x).square().mean()).backward()
    model[0].s.grad[0] = float("inf")
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9 and optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_param_groups_rates():
    model, _ = build()
    groups = {
        g["name"]: g
        for g in param_groups(model, 1e-3, s_lr_scale=20, head_lr_scale=3, weight_decay=0.1, head_weight_decay=0.2)
    }
    assert groups["uv"]["lr"] == 1e-3 and groups["s"]["lr"] == 0.02 and groups["head"]["lr"] == pytest.approx(3e-3)
    assert (groups["uv"]["weight_decay"], groups["s"]["weight_decay"], groups["head"]["weight_decay"]) == (0.1, 0, 0.2)
    assert sum(len(g["params"]) for g in groups.values()) == sum(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3)


def test_closure_schedule_added_group_and_missing_gradients():
    model, masks = build()
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=masks)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], total_steps=5, cycle_momentum=False
    )

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 12)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    schedule.step()
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.1})
    extra.grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=True)
    extra.grad = torch.ones(3)
    before = model[0].u.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].u, before) and (extra < 1).all()


@pytest.mark.parametrize("fields", [dict(lr=-1), dict(betas=(1.0, 0.9)), dict(eps=-1), dict(weight_decay=-1)])
def test_bad_hyperparameters(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        MaskedAdamW([nn.Parameter(torch.ones(2))], **fields)


def test_works_inside_torch_compile_of_the_forward():
    torch._dynamo.reset()  # other tests compile nn.Sequential, too, and may have used up its recompilations
    model, masks = build()
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=masks)
    train(torch.compile(model, backend="aot_eager", fullgraph=True), optimizer, 3, torch.Generator().manual_seed(0))
    assert masks.step == 3


def test_blocks_without_a_gradient_keep_their_statistics():
    model, masks = build(mask_policy="none")
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=masks)
    train(model, optimizer, 3, torch.Generator().manual_seed(0))
    snr = masks.snr[1].clone()
    optimizer.zero_grad()
    model[0](torch.randn(4, 12)).sum().backward()  # layer 2 takes no part
    optimizer.step()
    assert torch.equal(masks.snr[1], snr)
    assert optimizer.state_dict()["masked"]["steps"][:4].tolist() == [4, 4, 3, 3]


def test_a_backward_pass_through_updated_parameters_is_noticed():
    model, masks = build()
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=masks)
    loss = model(torch.randn(4, 12)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_deepcopy():
    model, masks = build()
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=masks)
    train(model, optimizer, 2, torch.Generator().manual_seed(0))
    twin_model, twin = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin_model, twin)):
        train(m, o, 3, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin_model.parameters()))


@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_another_rate_counts_from_the_next_step_on(kind):
    ours, theirs = (nn.Parameter(torch.arange(5.0)) for _ in range(2))
    rate = torch.tensor(0.1, dtype=torch.float64) if kind == "tensor" else 0.1
    a, b = MaskedAdamW([ours], lr=rate), torch.optim.AdamW([theirs], lr=0.1, foreach=False)
    for new in (0.1, 0.1, 0.01, 1.0):
        b.param_groups[0]["lr"] = new
        a.param_groups[0]["lr"] = rate.fill_(new) if kind == "tensor" else new
        for p, o in ((ours, a), (theirs, b)):
            p.grad = torch.arange(5.0).cos()
            o.step()
        assert torch.allclose(ours, theirs, rtol=1e-6)
    a.param_groups[0]["weight_decay"] = b.param_groups[0]["weight_decay"] = 0.5
    a.step(), b.step()
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_steps_that_the_device_refused_are_told(monkeypatch):
    """The host cannot check masks on a GPU without waiting: the op returns found = 2 and writes nothing."""
    model, masks = build()
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=masks)
    train(model, optimizer, 1, torch.Generator().manual_seed(0))
    op = masked_adamw.masked_adamw_
    monkeypatch.setattr(masked_adamw, "masked_adamw_", lambda *a: (op(*a)[0], torch.full((1,), 2.0)))
    for _ in range(2):
        optimizer.step()
    assert masks.step == 1
    with pytest.raises(RuntimeError, match="2 steps were refused on cpu"):
        optimizer.state_dict()
    assert optimizer.skipped_steps == 0 and optimizer.state_dict()["masked"]["skipped"] == 0  # raised once
    optimizer.step()
    with pytest.raises(RuntimeError, match="1 steps were refused on cpu"):
        optimizer.skipped_steps  # noqa: B018


def test_pieces_cover_their_segments():
    """On a GPU long segments are cut evenly and sorted by block."""
    model, masks = build()
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=masks)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    whole, cut = (optimizer._blocks.segments(params, piece) for piece in (None, 8))
    assert len(cut) > len(whole) and ((cut[:, 2] - cut[:, 1]) <= 8).all()
    starts = {tuple(row) for row in whole[:, [0, 1, 3]].tolist()}
    joined = []
    for tensor, begin, end, block in cut.tolist():
        if (tensor, begin, block) in starts:
            joined.append([tensor, begin, end, block])
        else:
            last = joined[-1]
            assert [last[0], last[2], last[3]] == [tensor, begin, block] and (begin - last[1]) % 8 == 0
            last[2] = end
    assert joined == sorted(whole.tolist(), key=lambda row: row[3])
    assert blocks.pieces_of(8, 24, 100) == [(8, 24)] and blocks.pieces_of(5, 5, 8) == [(5, 5)]
    assert blocks.pieces_of(16, 16 + 2500, 2048) == [(16, 1272), (1272, 2516)]


def test_masks_and_optimizer_travel_by_pickle():
    """A pickled optimizer keeps its views of the state as views."""
    model, masks = build(mask_warmup=1, mask_interval=2, mask_active_fraction=0.5, mask_probe_interval=3)
    optimizer = MaskedAdamW(param_groups(model, 1e-2), masks=masks)
    train(model, optimizer, 4, torch.Generator().manual_seed(1))
    model_, masks_, optimizer_ = pickle.loads(pickle.dumps((model, masks, optimizer)))
    seen = []
    for m, k, o in ((model, masks, optimizer), (model_, masks_, optimizer_)):
        train(m, o, 20, torch.Generator().manual_seed(2), lambda k=k: seen.append(k.masks.clone()))
        assert [layer.mask.tolist() for layer in k.layers.values()] == (k.masks != 0).tolist()
    assert all(torch.equal(a, b) for a, b in zip(seen[:20], seen[20:])) and not all(s.all() for s in seen)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), model_.parameters()))


def test_skipped_steps_travel_with_the_state():
    p = nn.Parameter(torch.ones(3))
    optimizer, other = MaskedAdamW([p]), MaskedAdamW([p])
    p.grad = torch.full((3,), float("nan"))
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    assert copy.deepcopy(other).skipped_steps == 1
    other.step()
    assert (optimizer.skipped_steps, other.skipped_steps) == (1, 2)
