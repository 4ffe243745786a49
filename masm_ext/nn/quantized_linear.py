"""A frozen linear layer with a weight of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import quantized_linear
from ..quantized_weight import dense_weight


class QuantizedLinear(nn.Linear):
    """``nn.Linear`` with a frozen weight of 8 bits, whose dense values exist only during a product.

    Args:
        linear: the layer to replace; its bias is shared, not copied, and may be trained.
        weight: its weight [N, D] as a tensor type of torchao.

    Attributes:
        weight: buffer, the quantised weight.
        bias: the parameter of ``linear``, or None.
        base_dtype: dtype of the weight before.
    """

    weight: Tensor

    def __init__(self, linear: nn.Linear, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.base_dtype = linear.weight.dtype
        self.register_buffer("weight", weight)
        self.bias = linear.bias
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., N] in the dtype of x."""
        return quantized_linear(x, self.weight, self.bias)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with the dense values of the weight, frozen."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(dense_weight(self.weight, self.base_dtype), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)
