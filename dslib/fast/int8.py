"""Weights in eight bits: one scale a row, activations as they are. Half the bytes of 16 bits, next to no loss.

``w = code * scale`` with codes from -127 to 127 and the scale of each output row from its largest weight (weight-only
quantisation, symmetric, round to nearest). What matters for speed is where the codes become numbers: multiplied out
into a 16-bit matrix first, they cost more than they save; read as bytes by the kernel that multiplies, they save half
of the traffic. torch has such a kernel for bfloat16 on a CPU. On CUDA, a single row goes through a product that
``torch.compile`` fuses.

Book: ``chapters/performance/speed.ipynb``. Source: LLM.int8() (arXiv 2208.07339, section 2.1) for one scale a row.
"""

from collections.abc import Collection
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.int4.layers import check_input
from dslib.architecture.int4.replace import replace_layers
from dslib.fast.shortcut import autocast

FEW_ROWS = 4  # up to which torch's CPU kernel is the quicker way (measured at 2048 x 5632)


class Int8Linear(nn.Module):
    """A linear layer without bias whose weights are bytes.

    Attributes:
        codes: int8, (out_features, in_features). scales: (out_features,), in the dtype that the layer was made from.
        way: how a few rows are multiplied: ``"packed"`` (torch's own kernel, bfloat16 on CPU), ``"fused"``
            (torch.compile, CUDA, one row) or ``"plain"`` (multiplied out first). Many rows, and rows whose gradients
            are wanted, are always multiplied out.
    """

    def __init__(self, codes: Tensor, scales: Tensor, way: str = "plain"):
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.out_features, self.in_features = codes.shape
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of ``x``. Errors as ``check_input``."""
        check_input(x, self.in_features, self.codes.device)
        rows, scales = x.numel() // self.in_features, self.scales.to(x.dtype)
        if not (autocast() or (torch.is_grad_enabled() and x.requires_grad)):
            if self.way == "fused" and rows == 1:
                return _fused()(x.reshape(1, -1), self.codes, scales).view(*x.shape[:-1], -1)
            if self.way == "packed" and 0 < rows <= FEW_ROWS and x.dtype is torch.bfloat16:
                y = torch._weight_int8pack_mm(x.reshape(rows, -1), self.codes, scales)
                return y.view(*x.shape[:-1], -1)
        y = F.linear(x, self.codes.to(x.dtype))  # autocast chooses the format of the result
        return y * scales.to(y.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights that the codes stand for, (out_features, in_features)."""
        return self.codes.to(dtype or self.scales.dtype) * self.scales.to(dtype or self.scales.dtype).unsqueeze(1)

    @classmethod
    def from_linear(cls, linear: nn.Linear, way: str | None = None) -> "Int8Linear":
        """Quantise a layer; ``way`` None is :func:`quickest_way`.

        Raises:
            ValueError: a bias, or weights that are not finite.
        """
        if linear.bias is not None:
            raise ValueError("linear: has a bias, expected none")
        weight = linear.weight.detach().float()
        if not weight.is_meta and not weight.isfinite().all():
            raise ValueError("linear: has NaN or infinite weights, expected finite ones")
        # A row of zeros gets any scale: its codes are zero.
        scales = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        codes = (weight / scales.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
        return cls(codes, scales.to(linear.weight.dtype), way or quickest_way(weight.device.type, linear.weight.dtype))

    def _apply(self, fn, recurse=True):
        before = self.codes.device.type
        super()._apply(fn, recurse)
        if self.codes.device.type != before:  # another device has other products
            self.way = quickest_way(self.codes.device.type, self.scales.dtype)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, way={self.way!r}"


def quantize_int8_(model: nn.Module, skip: Collection[str] = ("lm_head",)) -> nn.Module:
    """Replace every linear layer without bias by its 8-bit form, in place, and return the model.

    ``skip`` and errors are those of :func:`~dslib.architecture.int4.layers.quantize_`, as is what *in place* means.
    """

    def make(layer: nn.Linear) -> nn.Module:
        return Int8Linear.from_linear(layer) if layer.bias is None else layer

    replace_layers(model, (nn.Linear,), make, skip)
    return model


@cache
def quickest_way(device: str, dtype: torch.dtype) -> str:
    """``"fused"`` on CUDA if ``torch.compile`` works, ``"packed"`` where torch has its kernel, else ``"plain"``."""
    x, codes = torch.ones(1, 64, dtype=dtype, device=device), torch.ones(64, 64, dtype=torch.int8, device=device)
    ways = {"fused": _fused() if device == "cuda" else None, "packed": torch._weight_int8pack_mm}
    for way, product in ways.items():
        if product is None or (way == "packed" and dtype is not torch.bfloat16):
            continue
        try:
            if (product(x, codes, x[0]) == 64).all():
                return way
        except Exception:  # no compiler, no kernel: whatever it is, another way is needed
            continue
    return "plain"


def one_row_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """(1, in) x (out, in) -> (1, out), summed in float32: written as a sum, so that a compiler reads bytes only."""
    return ((codes.float() * x.float()).sum(1) * scales.float()).to(x.dtype).unsqueeze(0)


@cache
def _fused():
    return torch.compile(one_row_product, dynamic=False)
