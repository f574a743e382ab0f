"""Weights of four bits at full speed: multiply by codes that are unpacked in registers, next to the multiplication.

:class:`~dslib.architecture.int4.layers.Int4Linear` unpacks a matrix to multiply by it. :class:`QuickInt4` stands in
for it where there is a kernel:

* a few rows: torch's packed product on a CPU with AVX-512 or a GPU from compute capability 8.0, ours of
  :mod:`dslib.fast.int4_rows` on other CPUs. One load brings codes that lie in different rows, so that no sums across a
  register are needed; our codes are stored in that order;
* many rows on a CPU: a slice of the matrix is unpacked, multiplied, and forgotten;
* up to four rows on a CPU, if the layer's ``activations`` are ``"int8"``: rows rounded to eight bits, faster and less
  exact.

Where torch's product is used, activations and result are rounded to bfloat16, whatever the dtype of the input: a
relative error of about 0.3 %, next to about 8 % that four bits cost. Ours computes in float32; rows in eight bits cost
0.6 %. Dtype and shape are the same on every way, and gradients flow through the plain one.

Book: ``chapters/architecture/int4.ipynb``, section "How fast".
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dslib.architecture.int4.layers import Int4Linear
from dslib.architecture.int4.levels import BLOCK, pack, unpack
from dslib.fast import int4_rows
from dslib.fast.shortcut import Shortcut, autocast

OUT_AT_ONCE = 2048  # rows of W that are unpacked at a time: with as many columns, 8 MB
KERNEL_GROUPS = (32, 64, 128, 256)  # that torch's kernels know
# More rows than these are multiplied by unpacked weights: unpacking takes as long as that many rows in the kernel.
FEW_ROWS, FEW_ROWS_ON_CUDA = 48, 32


class QuickInt4(Shortcut):
    """The product of :class:`~dslib.architecture.int4.layers.Int4Linear` by the quickest kernel for the rows."""

    kind, what = Int4Linear, "codes unpacked in registers"

    def __init__(self, module: Int4Linear):
        super().__init__(module)
        self._pairs: Tensor | None = None
        self._tiles: Tensor | None = None
        self._tiled: tuple | None = None  # what the tiles were made from

    def why_not(self) -> str | None:
        layer = self.stands_for
        if not self.stands():
            return super().why_not()
        if layer.group_size not in KERNEL_GROUPS:
            return f"groups of {layer.group_size} have no kernel, expected one of {KERNEL_GROUPS}"
        return no_kernel(layer.packed.device, layer.out_features, layer.in_features)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of ``x``."""
        layer = self.stands_for
        gradients = torch.is_grad_enabled() and x.requires_grad
        fits = x.numel() and x.shape[-1] == layer.in_features and x.device == layer.packed.device
        if gradients or autocast() or not fits or x.dtype not in (torch.float32, torch.bfloat16):
            return self.plain(x)
        if self.why_not() is not None:
            return self.plain(x)
        rows = x.reshape(-1, layer.in_features).contiguous()
        multiply = self.int8_product() if len(rows) <= int4_rows.FEW else None
        if multiply is None:
            multiply, rows = self.product, rows.to(internal(x.device, x.dtype))
        y = multiply(rows).to(x.dtype)
        return (y if layer.bias is None else y + layer.bias.to(x.dtype)).view(*x.shape[:-1], -1)

    def product(self, rows: Tensor) -> Tensor:
        """``x Wᵀ``: (N, in) in the :func:`internal` format -> (N, out), without the bias."""
        layer = self.stands_for
        if rows.device.type == "cpu":
            if len(rows) > FEW_ROWS:
                return many_rows(rows, layer.packed, layer.scales, layer.group_size)
            return few_rows()(rows, layer.packed, layer.group_size, self.pairs())
        if len(rows) > FEW_ROWS_ON_CUDA:
            return F.linear(rows, layer.dequantize(torch.bfloat16))
        return torch.ops.aten._weight_int4pack_mm(rows, self.tiles(), layer.group_size, self.pairs())

    def int8_product(self) -> Callable[[Tensor], Tensor] | None:
        """The product for a few rows in eight bits, (N, in) -> (N, out), same dtype; None unless wanted and there."""
        layer = self.stands_for
        if layer.activations != "int8" or int4_rows.why_not(layer.packed, layer.group_size) is not None:
            return None
        multiply, args = int4_rows.rounded_product(), (layer.packed, self.pairs(), layer.group_size)
        return lambda rows: multiply(rows, *args)

    def row_product(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """One row of ``dtype`` times W on a CPU, with all looked up: for loops that count microseconds."""
        if (found := self.int8_product()) is not None:
            return found
        multiply, args = few_rows(), (self.stands_for.packed, self.stands_for.group_size, self.pairs())
        if dtype is torch.bfloat16 or not cpu_kernel():
            return lambda row: multiply(row, *args)
        return lambda row: multiply(row.bfloat16(), *args).to(dtype)

    def pairs(self) -> Tensor:
        """Scales and zeros as the kernel reads them, (groups, out, 2).

        Symmetric scales have no zeros. They are moved to where zeros lie between them, so that there is no second copy
        that could go stale; ``layer.scales`` is a view of that.
        """
        layer = self.stands_for
        if not layer.symmetric:
            return layer.scales
        if self._pairs is None or layer.scales.data_ptr() != self._pairs.data_ptr():
            with torch.inference_mode(False):
                self._pairs = F.pad(layer.scales.detach(), (0, 1))
            layer.scales = self._pairs[..., :1]
        return self._pairs

    def tiles(self) -> Tensor:
        """On a GPU, whose kernel wants another order: a second copy of the codes, made anew when torch counts a write.

        torch counts no write through ``.data`` or in inference mode; codes are written by loading a state only.
        """
        codes = self.stands_for.packed
        if torch.compiler.is_compiling():  # addresses cannot be traced; such a step is made for the weights as they are
            self._tiles = cuda_tiles(unpack(codes)) if self._tiles is None else self._tiles
            return self._tiles
        found = codes.data_ptr(), None if codes.is_inference() else codes._version
        if self._tiles is None or found != self._tiled:
            self._tiles, self._tiled = cuda_tiles(unpack(codes)), found
        return self._tiles

    def let_go(self) -> None:
        if self._pairs is not None:
            self.stands_for.scales = self.stands_for.scales.contiguous()


def internal(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What kernels compute in: torch's in bfloat16, our own in the format of the input."""
    return torch.bfloat16 if device.type != "cpu" or cpu_kernel() else dtype


def few_rows() -> Callable[[Tensor, Tensor, int, Tensor], Tensor]:
    """The product of a few rows on this CPU: ``(rows, packed, group_size, pairs)`` -> rows Wᵀ."""
    if cpu_kernel():
        return torch.ops.aten._weight_int4pack_mm_for_cpu.default
    multiply = int4_rows.product()
    return lambda rows, packed, group_size, pairs: multiply(rows, packed, pairs, group_size)


def many_rows(x: Tensor, packed: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """``x Wᵀ`` by unpacking W to the format of x, some columns of the result at a time, never as a whole.

    The zero of a group is added once for all its weights: ``sum x (c s + z) = sum x (c s) + z sum x``. So W gets one
    more input for each group, which holds the zeros, and x the sums over its groups.

    Args:
        x: bfloat16 or float32 (N, in). packed: from :func:`pack`, its rows a multiple of 64.
        scales: bfloat16 (groups, out, 1 or 2), scales and perhaps zeros.

    Returns:
        (N, out), in the format of x.
    """
    if scales.shape[-1] == 2:
        x = torch.cat((x, x.view(len(x), -1, group_size).sum(-1)), dim=1)  # (N, in + groups)
    out = x.new_empty(len(x), len(packed))
    for start in range(0, len(packed), OUT_AT_ONCE):
        part = slice(start, start + OUT_AT_ONCE)
        torch.mm(x, _columns(packed[part], scales[:, part], group_size, x.dtype), out=out[:, part])
    return out


def _columns(packed: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """(out, in / 2) -> W transposed in ``dtype``, (in, out), followed by the zeros if there are any, (groups, out).

    In this orientation 32 codes that lie together stay together: the order of :func:`pack` costs nothing to undo.
    """
    rows, columns, groups = len(packed), 2 * packed.shape[1], len(scales)
    out = torch.empty(columns + (groups if scales.shape[-1] == 2 else 0), rows, dtype=dtype)
    codes = packed.view(-1, columns, BLOCK // 2)  # (blocks, in, 32)
    halves = out[:columns].view(columns, -1, 2, BLOCK // 2)  # (in, blocks, 2, 32)
    halves[:, :, 0].copy_((codes & 15).view(torch.int8).sub_(8).transpose(0, 1))
    halves[:, :, 1].copy_((codes >> 4).view(torch.int8).sub_(8).transpose(0, 1))
    out[:columns].view(groups, group_size, rows).mul_(scales[..., 0].contiguous().unsqueeze(1))
    if scales.shape[-1] == 2:
        out[columns:] = scales[..., 1]
    return out


@cache
def cpu_kernel() -> bool:
    """Whether this CPU has torch's packed product, reading the order that :func:`pack` writes (with AVX-512 it does).

    Operator and order are private to torch, so both are tried out, never assumed.
    """
    ops = torch.ops.aten
    if not hasattr(ops, "_weight_int4pack_mm_for_cpu") or not hasattr(ops, "_convert_weight_to_int4pack_for_cpu"):
        return False
    codes = torch.arange(2 * BLOCK * 32).mul(7).bitwise_and(15).view(2 * BLOCK, 32)
    try:
        theirs = ops._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except RuntimeError:
        return False
    return theirs.dtype is torch.uint8 and torch.equal(theirs.view_as(pack(codes)), pack(codes))


def cuda_tiles(codes: Tensor) -> Tensor:
    """Codes (out, in) on a CUDA device in the order of torch's kernel for tensor cores; see :func:`no_kernel`."""
    inner = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
    return torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], inner)


def no_kernel(device: torch.device, rows: int, columns: int) -> str | None:
    """Why there is no packed product for such a matrix on this device; None if there is one."""
    if device.type == "cpu":
        if rows % BLOCK:
            return f"{rows} rows have no kernel, expected a multiple of {BLOCK}"
        return None if cpu_kernel() else int4_rows.compiled()
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "this GPU has no packed product, expected compute capability 8.0 or newer"
        good = rows % 8 == 0 and columns % 32 == 0
        return None if good else f"{rows} x {columns} has no kernel, expected multiples of 8 and 32"
    return f"device {device.type!r} has no kernel, expected 'cpu' or 'cuda'"
