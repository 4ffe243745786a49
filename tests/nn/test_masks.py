import copy
import json
import warnings

import pytest
import torch
from torch import nn

from masm_ext import LayerMasks, MaskedAdamW, MASMConfig, convert, param_groups, select_layers
from masm_ext.convert import with_targets
from masm_ext.masks import bias_variance
from masm_ext.masks.history import HISTORY_ROWS
from masm_ext.selection import SelectedLayers


def build(policy=None, **fields):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    config = MASMConfig(target_modules="*", num_subspaces=2, subspace_rank=2, **fields)
    convert(model, config, target_modules=SelectedLayers("0123"), use_cache=False, progress=False)
    return model, LayerMasks(model, config, policy)


def observe(masks, signal, power):
    stats = torch.stack([signal.double(), power.double()], -1).view(-1, 2)
    masks.observe(stats, torch.zeros(1), torch.ones(masks.masks.shape, dtype=torch.bool))


def test_each_subspace_keeps_its_own_best_layers():
    config = MASMConfig(mask_active_fraction=0.5, mask_hysteresis=0.0)
    snr = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8]], dtype=torch.float64)
    assert bias_variance(snr, torch.zeros(4, 2), config).T.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_hysteresis_keeps_an_active_layer_until_it_is_clearly_beaten():
    config = MASMConfig(mask_active_fraction=0.25, mask_hysteresis=0.1)
    current = torch.tensor([[1.0], [0], [0], [0]])
    for challenger, winner in ((0.52, 0), (0.6, 1)):
        snr = torch.tensor([[0.5], [challenger], [0.1], [0.1]], dtype=torch.float64)
        assert bias_variance(snr, current, config)[:, 0].argmax() == winner


def test_threshold_and_min_active():
    config = MASMConfig(mask_threshold=0.5, mask_min_active=2)
    snr = torch.tensor([[0.9, 0.1], [0.6, 0.2], [0.55, 0.3], [0.2, 0.4]], dtype=torch.float64)
    chosen = bias_variance(snr, torch.zeros(4, 2), config)
    assert chosen.T.tolist() == [[1, 1, 1, 0], [0, 0, 1, 1]]


def test_warmup_interval_probe_and_history():
    _, masks = build(
        mask_warmup=3, mask_interval=4, mask_active_fraction=0.25, mask_probe_interval=3, mask_probe_steps=2
    )
    g = torch.ones(4, 2)
    rank = torch.tensor([[0.9], [0.3], [0.2], [0.1]]).expand(4, 2)
    seen = []
    for _ in range(14):
        observe(masks, rank, g)
        seen.append(masks.masks[:, 0].tolist())
        assert [layer.mask.tolist() for layer in masks.layers.values()] == (masks.masks != 0).tolist()
    only, every = [1, 0, 0, 0], [1, 1, 1, 1]
    assert seen[:2] == [every] * 2  # warm-up
    assert seen[2:5] == [only] * 3  # chosen at step 3
    assert seen[5:7] == [every] * 2  # probed for two steps
    assert seen[7:10] == [only] * 3
    assert seen[10:12] == [every] * 2
    assert [h["step"] for h in masks.history] == [3, 7, 11]
    json.dumps(masks.history)


def test_callable_policy_soft_masks_and_its_errors():
    soft = torch.linspace(0, 1, 8).reshape(4, 2)
    _, masks = build(policy=lambda snr, step, current: soft, mask_warmup=0, mask_interval=1, mask_probe_interval=0)
    observe(masks, torch.ones(4, 2), torch.ones(4, 2))
    assert torch.equal(masks.masks, soft)
    for bad in (torch.ones(3, 2), torch.full((4, 2), 1.5), torch.full((4, 2), float("nan"))):
        _, masks = build(policy=lambda snr, step, current, bad=bad: bad, mask_warmup=0, mask_interval=1)
        with pytest.raises(ValueError, match=r"values in \[0, 1\] of shape \[L, K\]"):
            observe(masks, torch.ones(4, 2), torch.ones(4, 2))


@pytest.mark.parametrize("policy", ["none", "static"])
def test_policies_that_mask_nothing(policy):
    _, masks = build(mask_policy=policy, mask_warmup=0, mask_interval=1)
    observe(masks, torch.rand(4, 2), torch.ones(4, 2))
    assert masks.masks.min() == 1 and masks.history == []


def test_state_round_trip_and_foreign_state():
    fields = dict(mask_warmup=1, mask_interval=2, mask_probe_interval=2, mask_probe_steps=1, mask_active_fraction=0.3)
    _, a = build(**fields)
    _, b = build(**fields)
    for _ in range(5):
        observe(a, torch.rand(4, 2), torch.ones(4, 2))
    b.load_state_dict(a.state_dict())
    for _ in range(9):
        signal, power = torch.rand(4, 2), torch.rand(4, 2) + 1
        observe(a, signal, power)
        observe(b, signal, power)
        assert torch.equal(a.masks, b.masks) and torch.equal(a.snr, b.snr)
    assert a.history == b.history
    state = a.state_dict()
    state["layer_names"] = ["x"]
    with pytest.raises(ValueError, match="belongs to 1 layers"):
        b.load_state_dict(state)
    state = a.state_dict()
    state["selected"] += 0.5
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        b.load_state_dict(state)
    assert torch.equal(a.masks, b.masks)


def test_unconverted_model():
    with pytest.raises(ValueError, match="call convert"):
        LayerMasks(nn.Linear(2, 2), MASMConfig())


def test_static_policy_chooses_the_layer_with_the_steady_gradient():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.steady, self.noisy = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, batch):
            x, noise = batch
            return (self.steady(torch.ones_like(x)) + noise * self.noisy(x)).sum()

    model = Two()
    model.noisy.bias.requires_grad_(False)
    batches = [(torch.randn(5, 4), torch.randn(())) for _ in range(30)]
    config = MASMConfig(target_modules="*", subspace_rank=1, mask_active_fraction=0.5, mask_calibration_batches=20)
    names = select_layers(model, config, iter(batches), lambda m, b: m(b))
    assert names == ["steady"]
    assert model.steady.weight.requires_grad and not model.noisy.bias.requires_grad and model.steady.weight.grad is None
    report = convert(model, with_targets(config, names), use_cache=False, progress=False)
    assert [r.name for r in report.layers] == ["steady"]
    with pytest.raises(ValueError, match="at least two batches"):
        select_layers(Two(), config, iter(batches[:1]), lambda m, b: m(b))


def test_masks_follow_real_gradients():
    """Two layers fed alike; one gets its gradient with a random sign: its snr is lower, and it is masked."""
    torch.manual_seed(0)
    model, masks = build(mask_warmup=20, mask_interval=5, mask_active_fraction=0.25, mask_probe_interval=0)
    optimizer = MaskedAdamW(param_groups(model, lr=1e-4), masks=masks)
    x = torch.randn(32, 8)
    for _ in range(25):
        loss = sum(m(x).sum() * (1.0 if i == 2 else torch.randn(())) for i, m in enumerate(model))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert masks.masks.argmax(0).tolist() == [2, 2] and masks.masks.sum() == 2


def test_a_probe_longer_than_its_interval_still_leaves_masked_steps():
    fields = dict(mask_warmup=1, mask_interval=100, mask_active_fraction=0.25)
    _, masks = build(**fields, mask_probe_interval=2, mask_probe_steps=5)
    rank = torch.tensor([[0.9], [0.3], [0.2], [0.1]]).expand(4, 2)
    active = []
    for _ in range(15):
        observe(masks, rank, torch.ones(4, 2))
        active.append(int(masks.masks[:, 0].sum()))
    assert active == [1, 1, 4, 4, 4, 4, 4] * 2 + [1]


def test_select_layers_leaves_batch_statistics_and_modes_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model[2].eval()
    config = MASMConfig(target_modules="*", subspace_rank=1)
    batches = [torch.randn(6, 4) for _ in range(3)]
    select_layers(model, config, batches, lambda m, x: m(x).square().mean())
    assert model[1].num_batches_tracked == 0 and model[1].training and not model[2].training


@pytest.mark.parametrize("fields", [dict(mask_active_fraction=0.3), dict(mask_threshold=0.4)], ids=str)
def test_a_callable_is_treated_as_the_policy_of_the_config(fields):
    """The host calls a policy in the middle of a step; statistics, probes and history are the same as without."""
    fields |= dict(mask_warmup=2, mask_interval=3, mask_probe_interval=2, mask_probe_steps=2)
    _, own = build(**fields)
    _, asked = build(policy=lambda snr, step, current: bias_variance(snr, current, own.config), **fields)
    for _ in range(60):
        signal = torch.rand(4, 2)
        for masks in (own, asked):
            observe(masks, signal, signal + 0.5)
        assert torch.equal(own.masks, asked.masks) and own.step == asked.step
        assert all(torch.equal(a.mask, b.mask) for a, b in zip(own.layers.values(), asked.layers.values()))
    for a, b in zip(own.history, asked.history, strict=True):
        assert (a["step"], a["mask"]) == (b["step"], b["mask"])
        assert torch.allclose(torch.tensor(a["snr"]), torch.tensor(b["snr"]), rtol=1e-12)


def test_a_step_that_was_not_taken_is_not_one():
    for policy in (None, lambda snr, step, current: pytest.fail("asked at a step that was not taken")):
        _, masks = build(policy, mask_warmup=1, mask_interval=1)
        stats, owned = torch.ones(8, 2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.bool)
        masks.observe(stats, torch.ones(1), owned)
        assert masks.step == 0 and masks.history == [] and (masks.power == 0).all()


def test_more_selections_than_the_ring_holds_are_all_in_the_history():
    for interval in (1, 2):
        _, masks = build(mask_warmup=1, mask_interval=interval)
        steps = (2 * HISTORY_ROWS + 10) * interval
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(steps):
                observe(masks, torch.rand(4, 2), torch.ones(4, 2))
            assert [entry["step"] for entry in masks.history] == list(range(1, steps + 1, interval))


def test_selections_that_were_overwritten_unread_are_told():
    from masm_ext.ops import update_masks_

    _, masks = build(mask_warmup=1, mask_interval=1)
    arguments = torch.ones(8, 2, dtype=torch.float64), torch.zeros(1), torch.ones(4, 2, dtype=torch.bool)
    for _ in range(HISTORY_ROWS + 3):  # as replays of a CUDA graph, which run no Python
        update_masks_(*masks._state, *arguments, *masks._rules)
    with pytest.warns(UserWarning, match="3 selections"):
        history = masks.history
    assert [entry["step"] for entry in history] == list(range(4, HISTORY_ROWS + 4))
    observe(masks, torch.rand(4, 2), torch.ones(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [entry["step"] for entry in masks.history][-2:] == [HISTORY_ROWS + 3, HISTORY_ROWS + 4]


def test_a_copy_goes_its_own_way():
    model, masks = build(mask_warmup=1, mask_interval=1, mask_active_fraction=0.25, mask_decay=0.0)
    rank = torch.tensor([[0.9], [0.3], [0.2], [0.1]]).expand(4, 2)
    observe(masks, rank, torch.ones(4, 2))
    _, twin = copy.deepcopy((model, masks))
    before = masks.masks.clone()
    assert before.argmax(0).tolist() == [0, 0]
    for _ in range(3):  # the first selection masked all but one layer: its own statistics now move alone
        observe(twin, 0.1 * rank, torch.ones(4, 2))
    assert torch.equal(masks.masks, before) and not torch.equal(twin.masks, before)
    assert torch.equal(torch.stack([layer.mask for layer in twin.layers.values()]), twin.masks != 0)


@pytest.mark.parametrize(
    ("share", "layers", "kept"), [(0.28, 25, 7), (0.07, 100, 7), (0.5, 5, 3), (1.0, 9, 9), (1e-9, 4, 1), (0.1, 30, 3)]
)
def test_the_share_of_active_layers_is_exact(share, layers, kept):
    """0.28 * 25 is 7.000000000000001 in floating point."""
    chosen = bias_variance(torch.rand(layers, 2), torch.zeros(layers, 2), MASMConfig(mask_active_fraction=share))
    assert chosen.sum(0).tolist() == [kept] * 2
    _, masks = build(mask_active_fraction=share)
    assert masks._rules[4] == min(4, -(-round(share * 400) // 100) or 1)


def test_a_mask_that_changed_is_noticed_by_an_older_graph():
    """Its backward pass would compute gradients of other blocks than the forward pass kept memory for."""
    model, masks = build(mask_warmup=1, mask_interval=1, mask_active_fraction=0.25, mask_probe_interval=0)
    rank = torch.tensor([[0.9], [0.3], [0.2], [0.1]]).expand(4, 2)
    observe(masks, rank, torch.ones(4, 2))
    y = model(torch.randn(3, 8)).sum()
    observe(masks, rank, torch.ones(4, 2))  # a selection of the same masks
    y.backward(retain_graph=True)
    observe(masks, torch.tensor([[-5.0], [9.0], [0.0], [0.0]]).expand(4, 2), torch.ones(4, 2))
    assert masks.masks[:, 0].tolist() == [0, 1, 0, 0]
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|mask has changed since"):
        y.backward()


def test_the_masks_of_the_layers_are_rows_of_the_table():
    model, masks = build()
    model.double()
    observe(masks, torch.ones(4, 2), torch.ones(4, 2))
    held = [layer.mask for layer in masks.layers.values()]
    observe(masks, torch.ones(4, 2), torch.ones(4, 2))
    again = [layer.mask for layer in masks.layers.values()]
    assert all(a is b for a, b in zip(held, again))
    model[0].mask = torch.tensor([True, False])  # another tensor: taken over, and a row again
    observe(masks, torch.ones(4, 2), torch.ones(4, 2))
    assert model[0].mask.tolist() == [True, False] and masks.masks[0].tolist() == [1, 0]
    assert model[0].mask.untyped_storage().data_ptr() == model[1].mask.untyped_storage().data_ptr()


def test_a_table_that_is_only_looked_at_takes_nothing_over():
    model, masks = build(mask_warmup=1, mask_interval=1, mask_active_fraction=0.25)
    observe(masks, torch.rand(4, 2), torch.ones(4, 2))
    other = LayerMasks(model, masks.config)
    assert torch.equal(other.masks != 0, masks.masks != 0)
    observe(masks, torch.rand(4, 2), torch.ones(4, 2))  # still the owner
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=other)
    with pytest.raises(RuntimeError, match="another optimizer was made over these layers"):
        observe(masks, torch.rand(4, 2), torch.ones(4, 2))
    assert optimizer.masks is other


def test_a_callable_that_changes_nothing_leaves_older_graphs_alone():
    same = torch.tensor([[1.0, 0.0]] * 4)
    model, masks = build(lambda *_: same, mask_warmup=0, mask_interval=1, mask_probe_interval=0)
    observe(masks, torch.ones(4, 2), torch.ones(4, 2))
    y = model(torch.randn(3, 8)).sum()
    observe(masks, torch.ones(4, 2), torch.ones(4, 2))
    y.backward()


def test_a_policy_that_raises_leaves_the_state_as_it_was():
    def policy(snr, step, current):
        raise KeyError("not today")

    _, masks = build(policy, mask_warmup=0, mask_interval=1)
    with pytest.raises(KeyError, match="not today"):
        observe(masks, torch.ones(4, 2), torch.ones(4, 2))
    assert masks.step == 0 and masks.power.abs().max() == 0


def test_the_history_is_bounded(monkeypatch):
    from masm_ext.masks import history

    monkeypatch.setattr(history, "HISTORY_KEPT", 5)
    _, masks = build(mask_warmup=1, mask_interval=1)
    for _ in range(12):
        observe(masks, torch.rand(4, 2), torch.ones(4, 2))
    assert [entry["step"] for entry in masks.history] == [8, 9, 10, 11, 12]
    assert len(masks.state_dict()["history"]) == 5


def test_the_table_follows_the_layers_to_their_device():
    """Also where a state_dict is the first to notice, as in accelerate's prepare; meta stands for a GPU."""
    model, masks = build()
    observe(masks, torch.ones(4, 2), torch.ones(4, 2))
    model.to("meta")
    masks._bind()
    assert masks.masks.is_meta and all(layer.mask.is_meta for layer in masks.layers.values())
    assert masks._state[0].is_meta and model[0]._steps.is_meta
