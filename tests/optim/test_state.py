"""One owner of the adaptation state: model and optimizer state_dict are enough, and half of them is refused."""

import copy
import dataclasses

import pytest
import torch
from optimizer_runs import CONFIG, base, build, same, through_a_file, train

from masm_ext import (
    LayerMasks,
    MaskedAdamW,
    convert,
    load_adapter,
    param_groups,
    regularization_loss,
    save_adapter,
    scale_free_groups,
)


@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("named", [True, False])
def test_two_state_dicts_continue_a_run_bit_for_bit(first, named):
    model, optimizer = build(named)
    train(model, optimizer, 11, 1)
    states = through_a_file(model.state_dict()), through_a_file(optimizer.state_dict())
    train(model, optimizer, 11, 2)
    again, its_optimizer = build(named)
    loads = [lambda: again.load_state_dict(states[0]), lambda: its_optimizer.load_state_dict(states[1])]
    for load in loads if first == "model" else loads[::-1]:
        load()
    train(again, its_optimizer, 11, 2)
    assert same(model, again)
    assert torch.equal(optimizer.masks.masks, its_optimizer.masks.masks)
    assert torch.equal(optimizer.masks.snr, its_optimizer.masks.snr)
    assert optimizer.masks.history == its_optimizer.masks.history


@pytest.mark.parametrize("half", ["model", "optimizer"])
def test_half_a_restore_is_refused(half):
    model, optimizer = build()
    train(model, optimizer, 5, 1)
    again, its_optimizer = build()
    if half == "model":
        again.load_state_dict(model.state_dict())
        message = r"layers are at step \[5\], the optimizer and its masks at 0"
    else:
        its_optimizer.load_state_dict(optimizer.state_dict())
        message = r"layers are at step \[0\], the optimizer and its masks at 5"
    before = copy.deepcopy(again.state_dict())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            train(again, its_optimizer, 1, 1)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), again.state_dict().values()))
    its_optimizer.masks.accept_layers()  # on purpose
    train(again, its_optimizer, 1, 1)


def test_states_of_two_steps_are_refused():
    model, optimizer = build()
    train(model, optimizer, 5, 1)
    state = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1, 1)
    again, its_optimizer = build()
    again.load_state_dict(state)
    its_optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"at step \[5\], the optimizer and its masks at 6"):
        train(again, its_optimizer, 1, 1)


def test_a_round_trip_of_the_optimizer_alone_is_no_restore():
    """As accelerate's prepare makes one."""
    model, optimizer = build()
    train(model, optimizer, 3, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3, 1)


def test_an_adapter_starts_a_run_of_its_own(tmp_path):
    model, optimizer = build()
    train(model, optimizer, 5, 1)
    masks = [layer.mask.tolist() for layer in optimizer.masks.layers.values()]
    assert masks != [[True, True]] * 2
    save_adapter(model, tmp_path)
    fresh = base()
    load_adapter(fresh, tmp_path)
    own = LayerMasks(fresh, CONFIG)
    assert [layer.mask.tolist() for layer in own.layers.values()] == masks == (own.masks != 0).tolist()
    train(fresh, MaskedAdamW(param_groups(fresh, 1e-3), masks=own), 2, 1)


def test_a_masked_block_stays_with_any_optimizer():
    """Also without LayerMasks, and beyond the interval of probes."""
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    model[0].mask[1] = False
    held = model[0].u[2:].clone(), model[0].s[2:].clone(), model[0].v[2:].clone()
    for params in (param_groups(model, 1e-2, weight_decay=0.1), [p for p in model.parameters() if p.requires_grad]):
        train(model, MaskedAdamW(params, weight_decay=0.1), 120, 1)
        assert all(torch.equal(a, b) for a, b in zip(held, (model[0].u[2:], model[0].s[2:], model[0].v[2:])))
    assert model[0].mask.tolist() == [True, False]


def test_a_mask_that_is_changed_by_hand_counts_as_selected():
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    optimizer = MaskedAdamW(param_groups(model, 1e-2))
    train(model, optimizer, 2, 1)
    model[2].mask[0] = False
    held = model[2].u[:2].clone()
    train(model, optimizer, 3, 1)
    assert torch.equal(held, model[2].u[:2]) and optimizer.masks.masks.tolist() == [[1, 1], [0, 1]]
    model[2].mask.fill_(True)
    train(model, optimizer, 2, 1)
    assert not torch.equal(held, model[2].u[:2])


def test_state_of_another_kind_is_refused():
    _, optimizer = build()
    state = optimizer.state_dict()
    masks = state["masked"]["masks"]
    for change, message in (
        ({"masks": None}, "the state holds no masks, this optimizer has some"),
        ({"masks": {**masks, "power": torch.zeros(1)}}, r"power must have shape \[2, 2\], got \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict({**state, "masked": {**state["masked"], **change}})
    missing = {k: v for k, v in state["masked"]["masks"].items() if k != "signal"}
    with pytest.raises(ValueError, match=r"the state lacks \['signal'\]"):
        optimizer.load_state_dict({**state, "masked": {**state["masked"], "masks": missing}})


def test_a_converted_state_is_not_that_of_the_pretrained_model():
    model, _ = build()
    result = base(1).load_state_dict(model.state_dict(), strict=False)
    assert {"0.weight", "2.weight"} <= set(result.missing_keys)
    assert model[0].weight.dtype == torch.float32 and model[0].weight is model[0].principal


def test_a_foreign_extra_state_is_refused():
    model, _ = build()
    for bad, message in (
        (torch.zeros(3, dtype=torch.uint8), "got 3 elements$"),
        (torch.zeros(96, dtype=torch.uint8), "96 elements are of an older version"),
        (torch.full((128,), 300.0), "got 128 elements outside of it"),
    ):
        with pytest.raises(ValueError, match=f"extra state of 128 elements.*{message}"):
            model[0].set_extra_state(bad)


def converted(**changes):
    model = base()
    convert(model, dataclasses.replace(CONFIG, **changes), use_cache=False, progress=False)
    return model


def test_a_state_brings_its_lift(tmp_path):
    model = converted(lift=0.1)
    again = converted()
    assert again[0].lift == 0
    again.load_state_dict(through_a_file(model.state_dict()))
    assert again[0].lift == 0.1
    with pytest.raises(ValueError, match="the penalties take the frozen part"):
        regularization_loss(again, dataclasses.replace(CONFIG, orthogonality=0.1))
    rates = [[group["lr"] for group in scale_free_groups(one)] for one in (model, again)]
    assert rates[0] == rates[1] != [group["lr"] for group in scale_free_groups(converted())]
    with pytest.raises(ValueError, match=r"config.lift is 0.0, but '0' has 0.1"):
        save_adapter(again, tmp_path)


def test_a_state_of_other_ranks_is_refused_before_it_changes_a_layer():
    model, other = converted(subspace_rank=[3, 1]), converted(subspace_rank=[1, 3])
    before = {name: value.clone() for name, value in other[0].state_dict().items()}
    with pytest.raises(ValueError, match=r"the state of '0' is that of subspaces of other ranks than the \[1, 3\]"):
        other.load_state_dict(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in other[0].state_dict().items())
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.u"):  # torch's list of shapes
        converted(subspace_rank=[3, 3]).load_state_dict(model.state_dict())


def test_a_state_of_another_partition_is_not_recorded_as_ours(tmp_path):
    model, other = converted(partition="contiguous"), converted(partition="interleaved")
    assert sorted(model[0].directions) == sorted(other[0].directions)
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"config\.partition='interleaved'"):
        save_adapter(other, tmp_path / "other")
    model.load_state_dict(converted(partition="contiguous").state_dict())
    save_adapter(model, tmp_path / "own")


def test_a_state_that_does_not_fit_changes_nothing():
    model, optimizer = build()
    train(model, optimizer, 3, 1)
    before, masks = copy.deepcopy(optimizer.state_dict()), optimizer.masks.masks.clone()
    other = copy.deepcopy(before)
    other["param_groups"] = other["param_groups"][:1]
    other["masked"]["masks"]["selected"].zero_()
    with pytest.raises(ValueError, match="parameter groups"):
        optimizer.load_state_dict(other)
    assert torch.equal(optimizer.masks.masks, masks)
    train(model, optimizer, 1, 1)


@pytest.mark.parametrize("half", ["model", "optimizer"])
def test_half_a_restore_stays_one_when_it_is_saved_again(half):
    model, optimizer = build()
    train(model, optimizer, 5, 1)
    again, its_optimizer = build()
    if half == "model":
        again.load_state_dict(model.state_dict())
    else:
        its_optimizer.load_state_dict(optimizer.state_dict())
    states = through_a_file(again.state_dict()), through_a_file(its_optimizer.state_dict())
    third, last = build()
    third.load_state_dict(states[0])
    last.load_state_dict(states[1])
    with pytest.raises(RuntimeError, match="only one of the two was restored"):
        train(third, last, 1, 1)


def test_an_adapter_holds_what_the_policy_chose_not_a_probe(tmp_path):
    model, optimizer = build()
    for step in range(40):
        train(model, optimizer, 1, step)
        selected, in_force = (t != 0 for t in optimizer.masks._state[2])
        if not torch.equal(selected, in_force):
            break
    else:
        pytest.fail("no probe")
    save_adapter(model, tmp_path)
    fresh = base()
    load_adapter(fresh, tmp_path)
    assert torch.equal(torch.stack([fresh[0].mask, fresh[2].mask]), selected)
