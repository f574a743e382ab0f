"""Two 4-bit codes to a byte, in the order in which a vector unit wants them, and the products that read this order.

A kernel that multiplies by 4-bit weights unpacks them in registers. It is fast if one load brings codes that lie in
different rows, so that no sums across a register are needed. torch's packed product for CPUs with AVX-512 reads such an
order; :func:`pack` writes it, so that the stored weights are those that are multiplied, and no second copy is kept.

Book: ``chapters/architecture/int4.ipynb``, section "Two to a byte".
"""

import warnings
from functools import cache

import torch
from torch import Tensor

BLOCK = 64  # rows that lie together
OUT_AT_ONCE = 2048  # rows of W that are unpacked at a time: with as many columns, 8 MB
KERNEL_GROUPS = (32, 64, 128, 256)  # that torch's kernels know


def pack(codes: Tensor) -> Tensor:
    """Codes (out, in), 0 to 15 -> uint8 (out, in / 2), two to a byte; both sizes even.

    The rows come in blocks of 64, a last block may be shorter. Within a block, column after column: a byte holds the
    code of row i in its low half and that of row i + 32 (half a block on) in its high half. So one load brings the same
    column of 64 rows, which is what a vector unit wants.

    Raises:
        ValueError: an odd number of rows (two share a byte) or columns.
    """
    rows, columns = codes.shape
    if rows % 2 or columns % 2:
        raise ValueError(f"codes: got shape {(rows, columns)}, expected two even numbers")
    codes, full = codes.to(torch.uint8), rows - rows % BLOCK
    parts = []
    for part, size in ((codes[:full], BLOCK), (codes[full:], rows - full)):
        if len(part):
            low, high = part.view(-1, 2, size // 2, columns).unbind(1)
            parts.append((low | (high << 4)).transpose(1, 2).reshape(-1))
    return torch.cat(parts).view(rows, columns // 2)


def unpack(packed: Tensor) -> Tensor:
    """What :func:`pack` was given: (out, in / 2) -> uint8 (out, in)."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    full = rows - rows % BLOCK
    parts = []
    for part, size in ((packed[:full], BLOCK), (packed[full:], rows - full)):
        if len(part):
            both = part.reshape(-1, columns, size // 2).transpose(1, 2)  # (blocks, size / 2, in)
            parts.append(torch.cat((both & 15, both >> 4), dim=1).reshape(-1, columns))
    return torch.cat(parts)


def many_rows(x: Tensor, packed: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """``x Wᵀ`` by unpacking W to bfloat16, some columns of the result at a time, so that it never is there as a whole.

    The zero of a group is added once for all its weights: ``sum x (c s + z) = sum x (c s) + z sum x``. So W gets one
    more input for each group, which holds the zeros, and x the sums over its groups.

    Args:
        x: bfloat16 (N, in). packed: from :func:`pack`, its rows a multiple of 64.
        scales: bfloat16 (groups, out, 1 or 2), scales and perhaps zeros.

    Returns:
        bfloat16 (N, out).
    """
    if scales.shape[-1] == 2:
        x = torch.cat((x, x.view(len(x), -1, group_size).sum(-1)), dim=1)  # (N, in + groups)
    out = x.new_empty(len(x), len(packed))
    for start in range(0, len(packed), OUT_AT_ONCE):
        part = slice(start, start + OUT_AT_ONCE)
        torch.mm(x, _columns(packed[part], scales[:, part], group_size), out=out[:, part])
    return out


def _columns(packed: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """(out, in / 2) -> W transposed in bfloat16, (in, out), followed by the zeros if there are any, (groups, out).

    In this orientation 32 codes that lie together stay together: the order of :func:`pack` costs nothing to undo.
    """
    rows, columns, groups = len(packed), 2 * packed.shape[1], len(scales)
    out = torch.empty(columns + (groups if scales.shape[-1] == 2 else 0), rows, dtype=torch.bfloat16)
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
        if not cpu_kernel():
            return "this CPU has no packed product that reads our order"
        return f"{rows} rows have no kernel, expected a multiple of {BLOCK}" if rows % BLOCK else None
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "this GPU has no packed product, expected compute capability 8.0 or newer"
        good = rows % 8 == 0 and columns % 32 == 0
        return None if good else f"{rows} x {columns} has no kernel, expected multiples of 8 and 32"
    return f"device {device.type!r} has no kernel, expected 'cpu' or 'cuda'"


@cache
def say_once(what: str) -> None:
    """Warn, the first time that this comes up."""
    warnings.warn(f"int4: {what}", stacklevel=5)
