"""A whole training step, the same for every provider: forward, loss, backward, optimizer step, gradients cleared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cases import VisionSize
from masm_detect.methods.layers import replace_module
from providers import PROVIDERS, Formula, Setting, check, relative_error, stir
from torch import Tensor, nn

from masm_ext import (
    LayerMasks,
    MaskedAdamW,
    MASMConfig,
    MASMLinear,
    group_projections,
    param_groups,
    recompute_inputs,
)


class Kind(NamedTuple):
    """What a program does: its provider, the share of the blocks that is masked, whether inputs are recomputed, whether
    query, key and value are one call."""

    provider: str
    masked: float = 0.0
    recompute: bool = False
    group: bool = False


#: Programs in the order of the tables.
PROGRAMS = {
    "frozen": Kind("frozen"),
    "masm": Kind("masm"),
    "masm-group": Kind("masm", group=True),
    "masm-half": Kind("masm", masked=0.5),
    "masm-recompute": Kind("masm", recompute=True),
    **{name: Kind(name) for name in ("reference", "compiled", "effort", "peft-lora", "peft-pissa", "peft-osf")},
    "eigentune": Kind("eigentune"),
}
#: 4 subspaces of rank 4 in every converted linear.
RANK, SUBSPACES = 16, 4
#: So small that the weights stay where they are while a step is timed.
LEARNING_RATE = 1e-6
#: As `providers.TOLERANCE`, after two blocks: layer norms and softmax between the products.
MODEL_TOLERANCE = {torch.float32: (2e-5, 5e-5), torch.bfloat16: (3e-2, 5e-2)}


class Classifier(nn.Module):
    """DINOv2 of random weights and a linear head on the class token. Embeddings ask for a gradient, so that dX flows
    through every layer whether or not anything in it is trained.
    """

    def __init__(self, size: VisionSize, depth: int | None = None) -> None:
        from transformers import Dinov2Config, Dinov2Model

        super().__init__()
        config = Dinov2Config(
            hidden_size=size.width,
            num_hidden_layers=size.depth if depth is None else depth,
            num_attention_heads=size.heads,
            image_size=size.image,
            patch_size=14,
        )
        self.vit = Dinov2Model(config)
        self.head = nn.Linear(size.width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> logits [B]."""
        return self.head(self.features(self.vit.embeddings(images).detach().requires_grad_()))[:, 0]

    def features(self, embeddings: Tensor) -> Tensor:
        """embeddings [B, tokens, width] -> the class token after the last layer norm [B, width]."""
        hidden = self.vit.encoder(embeddings)
        return self.vit.layernorm(hidden[0] if isinstance(hidden, tuple) else hidden.last_hidden_state)[:, 0]

    def targets(self, which: str = "all linears") -> list[str]:
        """Names of the linears of attention and MLP, or of "attention" only."""
        linears = [name for name, m in self.named_modules() if isinstance(m, nn.Linear) and name != "head"]
        return linears if which == "all linears" else [name for name in linears if ".attention." in name]


def build(size: VisionSize, dtype: torch.dtype, device: torch.device, depth: int | None = None) -> Classifier:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(size, depth)
    # The backward pass of torch's fused attention is slow on a CPU; masm_detect trains with plain attention there too.
    model.vit.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    return model.to(device, dtype).train()


class Program:
    """A provider's training step. Call it to take one; `model`, `optimizer` and `masks` may be looked into.

    Peers and the baseline use torch's fused AdamW; masm its MaskedAdamW under LayerMasks. With `losses`, masm and the
    reference in plain PyTorch (without masks) have both penalties.
    """

    def __init__(
        self,
        name: str,
        size: VisionSize,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        cache: Path | None = None,
        depth: int | None = None,
        losses: bool = True,
        which: str = "all linears",
    ) -> None:
        self.kind = PROGRAMS[name]
        self.provider = PROVIDERS[self.kind.provider]
        self.model = build(size, dtype, device, depth)
        self.names = self.model.targets(which)
        self.provider.adapt(self.model, self.names, Setting(RANK, SUBSPACES, cache))
        if self.kind.group:
            group_projections(self.model)
        self.model.head.requires_grad_(True)
        self.config = MASMConfig(num_subspaces=SUBSPACES, subspace_rank=RANK // SUBSPACES, mask_policy="none")
        self.penalty: Callable[[], Tensor] | None = None
        self.masks = None
        if self.provider.name == "masm":
            self.masks = fixed_masks(self.model, self.config, self.kind.masked)
            groups = param_groups(self.model, lr=LEARNING_RATE)
            # What is compared is the cost of a step with both penalties, not where training ends. Ours are decoupled:
            # the optimizer computes their gradients. The reference adds them to its loss, as plain PyTorch would.
            # Both compute the same two sums over the layers, and the gradients of u, s and v.
            names = ("orthogonality", "spectral_consistency")
            coefficients = {name: getattr(self.config, name) for name in names if losses}
            self.optimizer: torch.optim.Optimizer = MaskedAdamW(groups, masks=self.masks, **coefficients)
        else:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
            if losses and self.provider.name in ("reference", "compiled"):
                parts = [self.model.get_submodule(n).parts for n in self.names]
                self.penalty = lambda: stacked_loss(parts, self.config)
        if self.provider.compiled:
            torch.compiler.reset()  # past a number of models the compiler would go back to eager without a word
            self.model.vit.encoder.compile(dynamic=False)
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(batch, 3, size.image, size.image, generator=generator).to(device, dtype)
        self.labels = torch.randint(0, 2, (batch,), generator=generator).to(device, torch.float32)

    def loss(self) -> Tensor:
        with recompute_inputs(self.model) if self.kind.recompute else nullcontext():
            logits = self.model(self.images)
        loss = F.binary_cross_entropy_with_logits(logits.float(), self.labels)
        return loss if self.penalty is None else loss + self.penalty()

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def fixed_masks(model: nn.Module, config: MASMConfig, share: float) -> LayerMasks:
    """Masks as the dynamic policy would leave them between two selections, of which there is none: those of
    :func:`drawn_masks`.
    """
    never = {"mask_policy": "bias_variance", "mask_warmup": 1 << 40, "mask_probe_interval": 0}
    masks = LayerMasks(model, MASMConfig(**{**config.to_dict(), **never}))
    for layer, row in zip(masks.layers.values(), drawn_masks(*masks.masks.shape, share)):
        layer.mask.copy_(row)
    return masks


def drawn_masks(layers: int, subspaces: int, share: float) -> Tensor:
    """bool [L, K]: `share` of the layers masked for each subspace, drawn apart for each."""
    order = torch.rand(layers, subspaces, generator=torch.Generator().manual_seed(2)).argsort(0)
    return order >= round(share * layers)


def plain_loss(layers: Sequence[MASMLinear], config: MASMConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """`masm_ext.regularization_loss` word by word from docs/method.md: layer by layer, subspace by subspace, under
    plain autograd.
    """
    total = torch.zeros((), dtype=dtype, device=layers[0].u.device)
    for layer in layers:
        u, s, v, s0, weight = (t.to(dtype) for t in (layer.u, layer.s, layer.v, layer.s0, layer.weight))
        bounds = list(zip(layer.offsets, layer.offsets[1:]))
        weight2 = weight.square().sum()
        orthogonality = ((u @ weight).square().sum() + (v @ weight.mT).square().sum()) / weight2
        for j, (a, b) in enumerate(bounds):
            eye = torch.eye(b - a, dtype=dtype, device=u.device)
            for factor in (u, v):
                orthogonality = orthogonality + (factor[a:b] @ factor[a:b].mT - eye).square().sum()
                for c, d in bounds[j + 1 :]:
                    orthogonality = orthogonality + (factor[a:b] @ factor[c:d].mT).square().sum()
        base = weight2 + s0.square().sum()
        gram = (u @ u.mT) * (v @ v.mT)
        change = 2 * (s * ((u @ weight) * v).sum(-1)).sum() + s @ gram @ s - s0.square().sum()
        spectral = (change / base).square()
        sigma2 = base / min(weight.shape)  # the mean square of W's singular values
        for a, b in bounds:
            spectral = spectral + (s[a:b] - s0[a:b]).square().sum() / ((b - a) * sigma2)
        total = total + config.orthogonality * orthogonality + config.spectral_consistency * spectral
    return total / len(layers)


def stacked_loss(layers: Sequence[MASMLinear], config: MASMConfig) -> Tensor:
    """The same value in plain PyTorch as one would write it for speed: layers of one shape stacked, plain autograd. All
    subspaces must have one rank. The weights are not stacked: that would hold the frozen model twice.
    """
    groups: dict[tuple[int, ...], list[MASMLinear]] = {}
    for layer in layers:
        groups.setdefault(tuple(layer.weight.shape), []).append(layer)
    total = torch.zeros((), device=layers[0].u.device)
    for (N, D), group in groups.items():
        K, R = group[0].num_subspaces, group[0].u.shape[0]
        u, s, v, s0 = (torch.stack([getattr(layer, name) for layer in group]) for name in ("u", "s", "v", "s0"))
        uw = torch.stack([layer.u @ layer.weight.to(u.dtype) for layer in group])  # [L, R, D]
        vw = torch.stack([layer.v @ layer.weight.to(v.dtype).mT for layer in group])  # [L, R, N]
        weight2 = torch.stack([layer.weight_norm2 for layer in group])  # [L]
        gram_u, gram_v = u @ u.mT, v @ v.mT  # [L, R, R]
        block = torch.block_diag(*[torch.ones(R // K, R // K)] * K).to(u)  # [R, R]
        eye = torch.eye(R, device=u.device)
        # Between subspaces every pair is seen twice, inside of one every element once.
        share = block + (1 - block) / 2
        orthogonality = sum((share * (gram - eye).square()).sum((-2, -1)) for gram in (gram_u, gram_v))
        orthogonality = orthogonality + (uw.square().sum((-2, -1)) + vw.square().sum((-2, -1))) / weight2
        start2 = s0.square().sum(-1)  # [L]
        base = weight2 + start2
        change = 2 * (s * (uw * v).sum(-1)).sum(-1) + (s[:, :, None] * s[:, None] * gram_u * gram_v).sum((-2, -1))
        sigma2 = base / min(N, D)  # the mean square of W's singular values
        spectral = ((change - start2) / base).square() + (s - s0).square().sum(-1) / (R // K * sigma2)
        total = total + (config.orthogonality * orthogonality + config.spectral_consistency * spectral).sum()
    return total / len(layers)


class ExactLinear(nn.Module):
    """What an adapted layer stands for, in float64."""

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.formula = formula
        self.trained = nn.ParameterDict({name: p.detach().double() for name, p in formula.trained.items()})
        self.bias = None if formula.bias is None else formula.bias.detach().double()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.formula.dense(self.trained), self.bias)


def gate_step(
    name: str,
    size: VisionSize,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    cache: Path | None = None,
    which: str = "all linears",
) -> dict[str, float]:
    """The first two blocks of the model of a program after one step of its own, against the same in float64: relative
    errors of the class token (y), of the gradient at the embeddings (dX) and of all trained tensors together.

    Raises GateError if one is above MODEL_TOLERANCE.
    """
    program = Program(name, size, dtype, device, batch, cache, depth=2, which=which)
    formulas = {n: program.provider.formula(program.model.get_submodule(n)) for n in program.names}
    for formula in formulas.values():
        stir(formula)
    program()
    exact = build(size, dtype, device, depth=2).double().requires_grad_(False)
    exact.head.load_state_dict(program.model.head.state_dict())
    for target, formula in formulas.items():
        replace_module(exact, target, ExactLinear(formula))
    start = program.model.vit.embeddings(program.images).detach()
    found, wanted = [], []
    for model in (program.model, exact):
        embeddings = start.detach().to(model.head.weight.dtype).clone().requires_grad_()
        recompute = model is program.model and program.kind.recompute
        with recompute_inputs(model) if recompute else nullcontext():
            features = model.features(embeddings)
        logits = model.head(features)[:, 0]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        F.binary_cross_entropy_with_logits(wide, program.labels.to(wide.dtype)).backward()
        (found if model is program.model else wanted).extend((features, embeddings.grad))
    errors = {"y": relative_error(found[0], wanted[0]), "dX": relative_error(found[1], wanted[1])}
    pairs = []
    for target, formula in formulas.items():
        trained = exact.get_submodule(target).trained
        for key, p in formula.trained.items():
            gradient = formula.project(key, trained[key].grad)
            pairs.append((torch.zeros_like(gradient) if p.grad is None else p.grad, gradient))
    if pairs:
        both = [torch.cat([pair[i].double().flatten() for pair in pairs]) for i in range(2)]
        errors["trained"] = relative_error(*both)
    check(errors, *MODEL_TOLERANCE[dtype])
    return errors
