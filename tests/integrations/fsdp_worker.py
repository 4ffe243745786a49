"""One of several processes of test_fsdp.py: SCENARIO,... FOLDER RANK SIZE SEED. Results are written to FOLDER."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from masm_ext import (
    LayerMasks,
    MaskedAdamW,
    MASMConfig,
    convert,
    merge,
    orthogonality_loss,
    param_groups,
    save_adapter,
    spectral_consistency_loss,
)
from masm_ext.integrations.fsdp import TrainingState, accelerate_options, shard
from masm_ext.nn.projections import group_projections

STEPS = 20
ROWS = 16  # of a batch over all processes
CONFIG = MASMConfig(
    target_modules=["*.fc1", "*.fc2"], modules_to_save="head", num_subspaces=2, subspace_rank=2,
    mask_warmup=4, mask_interval=4, mask_probe_interval=5, mask_probe_steps=1, train_bias=True,
)  # fmt: skip


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(self.norm(x))))


class Net(nn.Module):
    """Three blocks between layers that are not converted; 31 wide, so that rows do not divide evenly."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Linear(12, 31)
        self.blocks = nn.ModuleList(Block(31) for _ in range(3))
        self.head = nn.Linear(31, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def converted(seed, rank=0):
    model = Net(seed)
    convert(model, CONFIG, use_cache=False, progress=False)
    with torch.no_grad():  # shard gives every process the values of the first one
        model.blocks[0].fc1.u += rank
        model.blocks[0].norm.bias += rank
    return model


def optimizer_of(model):
    groups = param_groups(model, 1e-2, weight_decay=0.1)
    masks = LayerMasks(model, CONFIG)
    return MaskedAdamW(groups, masks=masks, orthogonality=1e-2, spectral_consistency=1e-3)


def batch(seed, step):
    x = torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(1000 * seed + step))
    return x, x[:, :1].sin()


def train(model, optimizer, seed, steps, rank=0, size=1, parts=1):
    """Steps on the rows of this process, in `parts` backward passes."""
    for step in steps:
        x, y = (t.chunk(size)[rank].chunk(parts) for t in batch(seed, step))
        for part, (own_x, own_y) in enumerate(zip(x, y)):
            if parts > 1:
                model.set_requires_gradient_sync(part == parts - 1)
            loss = (model(own_x).float() - own_y).square().mean() / parts
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def outcome(model, optimizer):
    """Everything that training changes, whole, by name."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    learned = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    masks = {k: v for k, v in optimizer.masks.state_dict().items() if isinstance(v, torch.Tensor)}
    moments = {f"moment.{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    penalties = {
        "orthogonality": orthogonality_loss(model).detach(),
        "spectral": spectral_consistency_loss(model).detach(),
    }
    update = {"update": torch.tensor([layer.relative_update() for layer in optimizer.masks.layers.values()])}
    return learned | masks | moments | penalties | update | {"steps": optimizer._steps}


def frozen_bytes(model):
    """Bytes of the frozen parameters in this process."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in frozen]
    return sum(t.untyped_storage().nbytes() for t in local)


def several(folder, rank, size, seed, name="several", parts=1, mesh=None, **options):
    mesh = init_device_mesh("cpu", (size,)) if mesh is None else mesh
    model = shard(converted(seed, rank), mesh, **options)
    optimizer = optimizer_of(model)
    torch.save(frozen_bytes(model), folder / f"bytes-{name}-{rank}.pt")
    train(model, optimizer, seed, range(STEPS), rank, size, parts)
    torch.save(outcome(model, optimizer), folder / f"{name}-{rank}.pt")
    with torch.no_grad():  # leaves the root gathered
        y = model(batch(seed, 0)[0])
    save_adapter(model, folder / f"adapter-{name}")
    torch.save(y, folder / f"output-{name}-{rank}.pt")
    return model, optimizer


def accumulated(folder, rank, size, seed):
    several(folder, rank, size, seed, "accumulated", parts=2)


def bf16(folder, rank, size, seed):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    model, _ = several(folder, rank, size, seed, "bf16", mp_policy=policy)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    seen = []
    for layer in (model.blocks[1].fc1, model.head):
        layer.register_forward_hook(lambda m, args, y: seen.append((args[0].dtype, y.dtype)))
    assert model(batch(seed, 0)[0]).dtype == torch.float32
    # a module that learns computes in its own dtype
    assert seen == [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], seen


def replicas(folder, rank, size, seed):
    """Two replicas, each in one process: the other dimension of a mesh."""
    several(folder, rank, size, seed, "replicas", mesh=init_device_mesh("cpu", (size, 1), mesh_dim_names=("a", "b")))


def gradients(folder, rank, size, seed):
    """Parameters with a gradient in one process only or in none, and a backward pass that raised."""
    model = shard(converted(seed), init_device_mesh("cpu", (size,)))
    head, layer = model.head, model.blocks[0].fc1
    value = head.bias.sum() * (rank + 1)
    if rank == 1:
        value = value + (layer.s * torch.arange(4.0)).sum()
    value.backward()
    found = {"both": head.bias.grad, "one": layer.s.grad, "none": head.weight.grad}
    head.bias.grad = layer.s.grad = None
    raising = head.bias * 1

    def fail(_):
        raise ZeroDivisionError

    raising.register_hook(fail)
    try:
        (raising.sum() + head.weight.sum()).backward()
    except ZeroDivisionError:
        head.weight.grad = None
    (head.bias.sum() * (rank + 1)).backward()
    torch.save(found | {"after": head.bias.grad}, folder / f"gradients-{rank}.pt")


def vit(seed):
    """A vision transformer of transformers, with grouped projections, that learns norms too."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 28}
    backbone = Dinov2Model(Dinov2Config(**sizes, patch_size=14, hidden_dropout_prob=0.0, drop_path_rate=0.0))
    config = MASMConfig(
        target_modules="re:.*(attention.*|fc1)", modules_to_save="*.norm2",
        num_subspaces=2, subspace_rank=1, mask_warmup=2, mask_interval=2,
    )  # fmt: skip
    convert(backbone, config, use_cache=False, progress=False)
    assert group_projections(backbone) == 3
    enable = getattr(backbone, "activation_checkpointing_enable", backbone.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    return backbone, config


def train_vit(model, config, seed, rank=0, size=1):
    model.train()
    optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=LayerMasks(model, config), orthogonality=1e-2)
    for step in range(8):
        images = torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(100 * seed + step))
        own = images.chunk(size)[rank]
        model(own).last_hidden_state[:, 0].float().square().mean(1).sub(own.mean((1, 2, 3))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return outcome(model, optimizer)


def transformer(folder, rank, size, seed):
    for name, dtype in (("vit", None), ("vit-bf16", torch.bfloat16)):
        model, config = vit(seed)
        shard(model, init_device_mesh("cpu", (size,)), mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        assert [type(block).__name__ for block in model.encoder.layer] == 3 * ["FSDPDinov2Layer"]
        torch.save(train_vit(model, config, seed, rank, size), folder / f"{name}-{rank}.pt")


def checkpoint(folder, rank, size, seed):
    """Trains half of the steps, saves, and goes on."""
    model = shard(converted(seed, rank), init_device_mesh("cpu", (size,)))
    optimizer = optimizer_of(model)
    train(model, optimizer, seed, range(STEPS // 2), rank, size)
    dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder / "dcp")
    torch.save(outcome(model, optimizer), folder / f"half-{rank}.pt")
    train(model, optimizer, seed, range(STEPS // 2, STEPS), rank, size)
    torch.save(outcome(model, optimizer), folder / f"whole-{rank}.pt")
    again = shard(converted(seed + 1), init_device_mesh("cpu", (size,)))
    its_optimizer = optimizer_of(again)
    train(again, its_optimizer, seed + 1, range(3), rank, size)
    dcp.load({"training": TrainingState(again, its_optimizer)}, checkpoint_id=folder / "dcp")
    train(again, its_optimizer, seed, range(STEPS // 2, STEPS), rank, size)
    torch.save(outcome(again, its_optimizer), folder / f"resumed-{rank}.pt")


def accelerator_with_fsdp2():
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # accelerate turns FSDP on for GPUs only; its code for FSDP2 runs on the CPU, too
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    assert accelerator.is_fsdp2
    return accelerator


def accelerated(folder, rank, size, seed):
    accelerator = accelerator_with_fsdp2()
    model = shard(converted(seed, rank), init_device_mesh("cpu", (size,)), **accelerate_options(accelerator))
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    assert type(model).__name__ == "FSDPNet"
    for step in range(STEPS):
        x, y = (t.chunk(size)[rank] for t in batch(seed, step))
        for part, (own_x, own_y) in enumerate(zip(x.chunk(2), y.chunk(2))):
            with accelerator.no_sync(model) if part == 0 else torch.enable_grad():
                accelerator.backward((model(own_x) - own_y).square().mean() / 2)
        optimizer.step()
        optimizer.zero_grad()
    torch.save(outcome(model, optimizer), folder / f"accelerated-{rank}.pt")


def accelerated_without_shard(folder, rank, size, seed):
    model = converted(seed)
    model, optimizer = accelerator_with_fsdp2().prepare(model, optimizer_of(model))
    try:
        train(model, optimizer, seed, range(1), rank, size)
    except ValueError as error:
        (folder / f"refused-{rank}.txt").write_text(str(error))


def refused(folder, rank, size, seed):
    """What happens without shard; the messages are written."""
    mesh = init_device_mesh("cpu", (size,))
    messages = []
    model = fully_shard(converted(seed), mesh=mesh)
    sharded = shard(converted(seed), mesh)
    (folder / "file").touch()
    for call in (
        lambda: LayerMasks(model, CONFIG),
        lambda: MaskedAdamW(model.parameters()),
        lambda: orthogonality_loss(model),
        lambda: shard(model, mesh),
        lambda: save_adapter(model, folder / "none"),
        lambda: shard(Net(seed), mesh),
        lambda: shard(converted(seed), mesh, ignored_params=set()),
        lambda: shard(converted(seed).to("meta"), mesh),
        lambda: merge(sharded),
        lambda: save_adapter(sharded, folder / "file"),
    ):
        try:
            call()
            messages.append("nothing raised")
        except (ValueError, RuntimeError, OSError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    torch.save(messages, folder / f"messages-{rank}.pt")


if __name__ == "__main__":
    scenarios, folder, rank, size, seed = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{scenarios}", rank=rank, world_size=size)
    for scenario in scenarios.split(","):
        globals()[scenario](folder, rank, size, seed)
    dist.destroy_process_group()
