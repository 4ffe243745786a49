"""Names are those of the model inside its wrappers: in adapters and for patterns."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from masm_ext import MASMConfig, MASMLinear, convert, load_adapter, merge, save_adapter, unmerge
from masm_ext.adapter.files import AdapterError, read_record
from masm_ext.wrappers import modules_of, unwrap, unwrapped_modules

CONFIG = MASMConfig(target_modules=["backbone.q", "k"], modules_to_save="head", num_subspaces=2, subspace_rank=2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.backbone = nn.Sequential()
        self.backbone.q, self.backbone.k, self.backbone.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.backbone(x))


class ShardedLike(nn.Module):
    """Holds the module inside where FullyShardedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, x):
        return self._fsdp_wrapped_module(x)


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_backbone(model):
    model.backbone = torch.compile(model.backbone, backend="eager")
    return model


def compiled_head(model):
    model.head = torch.compile(model.head, backend="eager")
    return model


def prepared(model):
    """As accelerate leaves a model in mixed precision: a forward of its own, on the model and not on a layer."""
    model._original_forward = model.forward
    model.forward = model.forward
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "compiled part": compiled_backbone,
    "compiled head": compiled_head,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "compiled DistributedDataParallel": lambda m: torch.compile(DistributedDataParallel(m), backend="eager"),
    "activation checkpointing": checkpoint_wrapper,
    "average": AveragedModel,
    "accelerate": prepared,
}


def converted():
    model = Net()
    convert(model, CONFIG, use_cache=False, progress=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.usefixtures("gloo")
def test_a_wrapped_model_is_saved_under_the_names_of_the_model_inside(wrap, tmp_path):
    model = converted()
    want = model(x := torch.randn(4, 8))
    save_adapter(wrap(model), tmp_path)
    assert list(read_record(tmp_path)["layers"]) == ["backbone.q", "backbone.k"]
    fresh = Net()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), want)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.filterwarnings("ignore:the model is inside DistributedDataParallel")
@pytest.mark.usefixtures("gloo")
def test_an_adapter_loads_into_a_wrapped_model(wrap, tmp_path):
    model, x = converted(), torch.randn(4, 8)
    save_adapter(model, tmp_path)
    wrapped = wrap(Net())
    with torch.no_grad():
        wrapped(x)  # torch.compile must not reuse its cache of the plain layers
        report = load_adapter(wrapped, tmp_path)
        assert torch.equal(wrapped(x), model(x))
    assert [layer.name for layer in report.layers] == ["backbone.q", "backbone.k"]
    assert [name for name, _ in report.other_trainable] == ["head.weight", "head.bias"]
    save_adapter(wrapped, tmp_path)
    load_adapter(Net(), tmp_path)


@pytest.mark.parametrize("wrap", [WRAPPERS["compile"], compiled_backbone, nn.DataParallel, checkpoint_wrapper])
def test_a_wrapped_model_can_be_converted_merged_and_unmerged(wrap):
    wrapped, x = wrap(Net()), torch.randn(4, 8)
    want = wrapped(x).detach()
    report = convert(wrapped, CONFIG, use_cache=False, progress=False)
    assert [layer.name for layer in report.layers] == ["backbone.q", "backbone.k"]
    out = wrapped(x)
    torch.testing.assert_close(out, want)
    out.sum().backward()
    assert all(layer.u.grad is not None for layer in modules_of(wrapped, MASMLinear).values())
    assert merge(wrapped) == 2 and not modules_of(wrapped, MASMLinear)
    torch.testing.assert_close(wrapped(x), want)
    assert unmerge(wrapped) == 2 and torch.equal(wrapped(x), out)


@pytest.mark.usefixtures("gloo")
def test_conversion_inside_distributed_data_parallel_warns():
    with pytest.warns(UserWarning, match="wrap the converted model again"):
        convert(DistributedDataParallel(Net()), CONFIG, use_cache=False, progress=False)


def test_inside_fsdp_a_model_is_saved_but_not_converted(tmp_path):
    save_adapter(ShardedLike(converted()), tmp_path)
    load_adapter(Net(), tmp_path)
    for call in (
        lambda m: convert(m, CONFIG, use_cache=False, progress=False),
        lambda m: load_adapter(m, tmp_path),
    ):
        with pytest.raises(ValueError, match="convert first, then wrap"):
            call(ShardedLike(Net()))


def test_a_shard_is_not_saved(tmp_path):
    """FSDP shows a parameter as the flat part that this rank holds."""
    model = converted()
    model.backbone.q.u = nn.Parameter(model.backbone.q.u.detach().flatten()[:5])
    with pytest.raises(ValueError, match=r"layers\.backbone\.q\.u: expected shape .*gather it first"):
        save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("gloo")
def test_a_distributed_tensor_is_named(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    def spread(p):
        return nn.Parameter(distribute_tensor(p.detach(), init_device_mesh("cpu", (1,)), [Replicate()]))

    model = converted()
    model.head.weight = spread(model.head.weight)
    with pytest.raises(ValueError, match=r"saved\.head\.weight is a DTensor"):
        save_adapter(model, tmp_path / "x")
    model = Net()
    model.backbone.q.weight = spread(model.backbone.q.weight)
    with pytest.raises(TypeError, match=r"backbone\.q\.weight is a DTensor"):
        convert(model, CONFIG, use_cache=False, progress=False)
    save_adapter(converted(), tmp_path)
    with pytest.raises(AdapterError, match=r"backbone\.q\.weight is a DTensor"):
        load_adapter(model, tmp_path)


def test_an_average_is_an_adapter_of_the_same_base(tmp_path):
    model = converted()
    average = AveragedModel(model)
    for _ in range(3):
        with torch.no_grad():
            model.backbone.q.s.add_(1)
        average.update_parameters(model)
    save_adapter(average, tmp_path)
    fresh = Net()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.backbone.q.s, average.module.backbone.q.s)


def test_layers_that_are_wrapped_on_their_own_are_not_merged_unnoticed():
    model = converted()
    model.backbone.q = torch.compile(model.backbone.q, backend="eager")
    with pytest.raises(ValueError, match="a MASMLinear is wrapped on its own in a OptimizedModule"):
        merge(model)
    assert len(modules_of(model, MASMLinear)) == 2


def test_names_are_those_of_named_modules_without_wrappers():
    model = Net()
    model.again = model.backbone.q  # a second name
    plain = [(name, id(m)) for name, m in model.named_modules()]
    assert [(name, id(m)) for name, m in unwrapped_modules(model)] == plain
    twice = torch.compile(nn.DataParallel(compiled_backbone(model)), backend="eager")
    assert [(name, id(m)) for name, m in unwrapped_modules(twice)] == plain
    assert unwrap(twice) is model and unwrap(model) is model


def test_a_child_called_module_is_no_wrapper():
    model = nn.ModuleDict({"module": nn.Linear(3, 3)})
    assert [name for name, _ in unwrapped_modules(model)] == ["", "module"] and unwrap(model) is model


def test_the_saved_model_itself_is_left_as_it_was(tmp_path):
    model = compiled_backbone(converted())
    state = copy.deepcopy(model.state_dict())
    save_adapter(model, tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
