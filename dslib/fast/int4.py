"""Weights of four bits at full speed: multiply by codes that are unpacked in registers, next to the multiplication.

:class:`~dslib.architecture.int4.layers.Int4Linear` unpacks a matrix to multiply by it. :class:`QuickInt4` stands in
for it where there is a kernel:

* a few rows: torch's packed product on a CPU with AVX-512 or a GPU from compute capability 8.0, ours of
  :mod:`dslib.fast.int4_rows` on other CPUs. One load brings codes that lie in different rows, so that no sums across a
  register are needed; our codes are stored in that order;
* up to four rows on a CPU, if the layer's ``activations`` are ``"int8"``: ours with rows in eight bits;
* many rows on a CPU: a slice of the matrix is unpacked, multiplied, and forgotten.

Without a kernel, unpacking at each product would make four bits many times slower than none. On a CPU the weights are
then unpacked once and kept in bfloat16, beside a copy of the codes that tells whether they are still the same; the
report says so, and that it takes memory.

Where torch's product or kept weights are used, activations and result are rounded to bfloat16, whatever the dtype of
the input: a relative error of about 0.3 %, next to about 8 % that four bits cost. Ours computes in float32. Dtype,
shape and errors are the same on every way, and gradients flow through the plain one.

Book: ``chapters/architecture/int4.ipynb``, section "How fast".
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dslib.architecture.int4.layers import Int4Linear, check_input
from dslib.architecture.int4.levels import BLOCK, pack, unpack
from dslib.fast import int4_rows
from dslib.fast.shortcut import Shortcut, autocast

OUT_AT_ONCE = 2048  # rows of W that are unpacked at a time: with as many columns, 8 MB
KERNEL_GROUPS = (32, 64, 128, 256)  # that torch's kernels know
# More rows than these are multiplied by unpacked weights: unpacking takes as long as that many rows in the kernel.
FEW_ROWS, FEW_ROWS_ON_CUDA = 48, 32
FEW_BFLOAT16_ROWS = 4  # that a CPU without instructions for bfloat16 multiplies sooner in it than in float32


class QuickInt4(Shortcut):
    """The product of :class:`~dslib.architecture.int4.layers.Int4Linear` by the quickest kernel for the rows."""

    kind = Int4Linear

    def __init__(self, module: Int4Linear):
        super().__init__(module)
        self._tiles: Tensor | None = None
        self._tiled: tuple | None = None  # what the tiles were made from
        self._unpacked: Tensor | None = None
        self._unpacked_from: tuple[Tensor, Tensor] | None = None

    @property
    def what(self) -> str:
        second = ", from a second copy in the GPU's order" if self.stands_for.packed.is_cuda else ""
        return f"codes unpacked in registers{second}"

    def why_not(self) -> str | None:
        layer = self.stands_for
        if not self.stands():
            return super().why_not()
        if not self._as_made():
            reason = "its codes or scales are of another dtype, shape or order than expected"
        elif layer.group_size not in KERNEL_GROUPS:
            reason = f"groups of {layer.group_size} have no kernel, expected one of {KERNEL_GROUPS}"
        else:
            reason = no_kernel(layer.packed.device, layer.out_features, layer.in_features)
        if reason is None or layer.packed.device.type != "cpu":
            return reason
        return f"{reason}; keeps its weights unpacked, about 2.6 bytes more for each, until released"

    def _as_made(self) -> bool:
        """Whether a kernel may read the buffers: a state that was loaded may have brought others."""
        layer = self.stands_for
        packed, scales, columns = layer.packed, layer.scales, layer.in_features
        return (
            (packed.dtype, scales.dtype) == (torch.uint8, torch.bfloat16)
            and packed.shape == (layer.out_features, columns // 2) and packed.is_contiguous()
            and scales.shape == (columns // layer.group_size, layer.out_features, 1 if layer.symmetric else 2)
            and scales.is_contiguous() and packed.device == scales.device
        )  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of ``x``."""
        layer = self.stands_for
        check_input(x, layer.in_features, layer.packed.device)
        gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (x, layer.scales))
        quick = x.numel() and x.dtype in (torch.float32, torch.bfloat16) and self.stands()
        if gradients or autocast() or not quick:
            return self.plain(x)
        rows = x.reshape(-1, layer.in_features).contiguous()
        if self.why_not() is not None:
            if x.device.type != "cpu":
                return self.plain(x)
            y = self.unpacked_product(rows)
        else:
            rounded = self.int8_product() if len(rows) <= int4_rows.FEW else None
            y = (rounded or self.product)(rows)
        y = y.to(x.dtype)
        return (y if layer.bias is None else y + layer.bias.to(x.dtype)).view(*x.shape[:-1], -1)

    def product(self, rows: Tensor) -> Tensor:
        """``x Wᵀ``: (N, in) -> (N, out), without the bias; torch's kernels compute in bfloat16, ours as x comes."""
        layer = self.stands_for
        if rows.device.type != "cpu" or cpu_kernel():
            rows = rows.bfloat16()
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
        multiply, packed, scales, size = int4_rows.rounded_product(), layer.packed, layer.scales, layer.group_size
        return lambda rows: multiply(rows, packed, with_zeros(scales), size)

    def row_product(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """One row of ``dtype`` times W on a CPU, with all looked up: for loops that count microseconds."""
        if (found := self.int8_product()) is not None:
            return found
        layer, multiply = self.stands_for, few_rows()
        packed, scales, size = layer.packed, layer.scales, layer.group_size
        if dtype is torch.bfloat16 or not cpu_kernel():
            return lambda row: multiply(row, packed, size, with_zeros(scales))
        return lambda row: multiply(row.bfloat16(), packed, size, with_zeros(scales)).to(dtype)

    def unpacked_product(self, rows: Tensor) -> Tensor:
        """The same on a CPU without a kernel: (N, in) -> (N, out), by weights that were unpacked once."""
        now = self.stands_for.packed, self.stands_for.scales
        if self._unpacked is None or not all(map(same_bits, now, self._unpacked_from)):
            with torch.inference_mode(False), torch.no_grad():  # what is made here has to serve in both modes
                self._unpacked_from = tuple(tensor.clone() for tensor in now)
                self._unpacked = self.stands_for.dequantize(torch.bfloat16)
        if len(rows) <= FEW_BFLOAT16_ROWS:
            return F.linear(rows.bfloat16(), self._unpacked)
        return F.linear(rows, self._unpacked.to(rows.dtype))

    def pairs(self) -> Tensor:
        """Scales and zeros as the kernel reads them, (groups, out, 2)."""
        return with_zeros(self.stands_for.scales)

    def tiles(self) -> Tensor:
        """On a GPU, whose kernel wants another order: a second copy of the codes, made anew when torch counts a write.

        torch counts no write through ``.data``; comparing all codes at each product would cost as much as the product.
        """
        layer = self.stands_for
        if torch.compiler.is_compiling():  # addresses cannot be traced; such a step is made for the weights as they are
            self._tiles = cuda_tiles(unpack(layer.packed)) if self._tiles is None else self._tiles
            return self._tiles
        if layer.packed.is_inference():  # for these torch counts nothing at all
            with torch.inference_mode(False):
                layer.packed = layer.packed.clone()
        codes, (held, alias, version) = layer.packed, self._tiled or (None, None, None)
        if codes is not held or codes.data_ptr() != alias.data_ptr() or codes._version != version:
            # What is held keeps its address: another tensor cannot come to lie there.
            self._tiles, self._tiled = cuda_tiles(unpack(codes)), (codes, codes.detach(), codes._version)
        return self._tiles


def with_zeros(scales: Tensor) -> Tensor:
    """Scales and zeros as kernels read them, (groups, out, 2); absent zeros are made anew, as kept ones go stale."""
    return F.pad(scales, (0, 1)) if scales.shape[-1] == 1 else scales


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit; eight bytes at a time, which is seven times as quick."""
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    size = one.element_size()
    words = torch.uint8 if size * one.numel() % 8 or size * one.storage_offset() % 8 else torch.int64
    return torch.equal(*(tensor.flatten().view(words) for tensor in (one, other)))


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

    bfloat16 or float32 (N, in), codes from :func:`pack`, (groups, out, 1 or 2) scales and perhaps zeros -> (N, out), in
    the format of x; ``out`` is a multiple of 64.
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
