"""Products with a weight matrix, and the kernels behind them on a CPU.

Decoding multiplies one row by every weight matrix, so its speed is the speed at which weights are read. On a CPU,
``F.linear`` hands a single float32 row to a matrix-vector routine that runs on *one* thread (measured in the chapter).
Cutting the weight's rows into a few chunks turns the same sum into a batch of products, which torch does spread over
the threads. It is a view: no weight is copied.

Where a C++ compiler is at hand, :mod:`dslib.fast.kernels.rows` reads the weights once for up to eight rows.
With more, as an expert of a mixture has them, :func:`product` asks oneDNN where that is the quicker library, and
:func:`pack` lays a matrix out once in the order in which oneDNN reads it.

Book: ``chapters/performance/speed.ipynb``, section "Where the time of one token goes", and
``chapters/architecture/moe.ipynb``.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.fast.kernels import rows
from dslib.fast.shortcut import Shortcut, watched


def row_product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """What multiplies one row, (1, in_features) -> (1, out_features), by the quickest way there is: for loops."""
    if rows.why_not(weight) is None:
        return rows.multiplier(weight)
    chunks = row_chunks(len(weight)) if weight.dtype is torch.float32 else 1
    if chunks == 1:
        return partial(F.linear, weight=weight)
    cut = cut_rows(weight, chunks)
    return lambda row: torch.bmm(row.expand(chunks, 1, -1), cut).view(1, -1)


def one_row_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` for a single row x, (..., in_features) -> (..., out_features), with the rows of W over the threads."""
    chunks = row_chunks(len(weight))
    if chunks == 1:
        return F.linear(x, weight)
    return torch.bmm(x.reshape(1, 1, -1).expand(chunks, 1, -1), cut_rows(weight, chunks)).view(*x.shape[:-1], -1)


def row_chunks(rows: int) -> int:
    """Into how many chunks a matrix with so many rows is cut: 4 or 2 if that divides them, else 1.

    More chunks than threads even out the load; 4 was best or equal best from 576x576 to 49152x576 with two threads.
    """
    return 4 if rows % 4 == 0 else 2 if rows % 2 == 0 else 1


def cut_rows(weight: Tensor, chunks: int) -> Tensor:
    """(out_features, in_features) -> a view (chunks, in_features, out_features / chunks), ready for ``torch.bmm``."""
    return weight.unflatten(0, (chunks, -1)).transpose(1, 2)


# Below this many weights, a call of oneDNN costs more than it saves (measured at 256 x 704 and at 1024 x 2816).
FEW_WEIGHTS = 2**18


@cache
def onednn() -> bool:
    """Whether oneDNN's float32 products are there and quicker than what ``F.linear`` calls: on CPUs with AVX-512.

    The operators are private to torch, so they are looked up, never assumed. They compute in float32 throughout.
    """
    ops = torch.ops.mkldnn
    there = torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise")
    return there and hasattr(ops, "_reorder_linear_weight") and "AVX512" in torch.backends.cpu.get_cpu_capability()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` by the quickest kernel for the size, without gradients.

    x: (rows, in_features). weight: (out_features, in_features), contiguous.
    """
    count, chunks = len(x), row_chunks(len(weight))
    if count <= rows.FEW.get(weight.dtype, 0) and x.dtype is weight.dtype and rows.why_not(weight) is None:
        return rows.few_rows(x, weight)
    if x.dtype is torch.float32 and x.device.type == "cpu" and weight.numel() > FEW_WEIGHTS:
        # At another precision than the default, every product below goes to oneDNN anyway.
        default = torch.get_float32_matmul_precision() == "highest"
        if onednn() and (count > 1 or not default):
            return packed_product(x, weight)  # takes a plain matrix too, and then rearranges it itself
        if default and count <= 64 and chunks > 1:
            return torch.bmm(x.expand(chunks, *x.shape), cut_rows(weight, chunks)).transpose(0, 1).flatten(1)
    return torch.mm(x, weight.mT)


def pack(weight: Tensor) -> Tensor | None:
    """A copy of (out_features, in_features) in oneDNN's own order for :func:`packed_product`; None if it has none.

    Reading a matrix in rows, oneDNN first rearranges it, at every call. For a handful of rows that costs more than the
    product does. ``.to_dense()`` of the copy gives the matrix back.
    """
    usable = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and onednn()
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().clone(), None) if usable else None


def packed_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` for a matrix from :func:`pack`: (rows, in_features) -> (rows, out_features), without gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class QuickLinear(Shortcut):
    """``nn.Linear`` on a CPU where no gradient is recorded: a few rows as memory gives the weights, more by oneDNN."""

    kind, what = nn.Linear, "a few rows over the threads"

    def why_not(self) -> str | None:
        weight = self.stands_for.weight
        if weight.dtype is torch.float32 and weight.device.type == "cpu":
            return super().why_not()
        return super().why_not() or rows.why_not(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        weight, bias = self.stands_for.weight, self.stands_for.bias
        fits = x.numel() and x.shape[-1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])
        formats = {(part.dtype, part.device.type) for part in (x, weight, bias) if part is not None}
        known = formats == {(weight.dtype, "cpu")} and weight.dtype in rows.FUNCTIONS
        if watched() or not self.stands() or not fits or not known:
            return self.plain(x)
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) <= rows.FEW[weight.dtype] and rows.why_not(weight) is None:
            y = rows.few_rows(flat, weight)
        elif weight.dtype is not torch.float32:
            return self.plain(x)
        elif len(flat) == 1:
            y = one_row_linear(flat, weight)
        elif onednn() and weight.numel() > FEW_WEIGHTS:
            y = packed_product(flat, weight)
        else:
            return self.plain(x)
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)
