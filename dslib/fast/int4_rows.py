"""One row, or a few, times 4-bit weights: products that torch does not have, compiled at the first use.

*The row as it is.* torch's packed product reads our order of codes on CPUs with AVX-512 only. Elsewhere
``int4_product`` does the work: a code becomes a float in a register, next to the multiplication, in float32.

*The row in eight bits.* Turning every code into a float takes longer than reading it. If a row is integers too, codes
and inputs can be multiplied as they are, and what remains is to read the weights. ONNX Runtime calls this "accuracy
level 4". The price is an error of about 0.6 %, twice that of activations in bfloat16, see :mod:`dslib.fast.int4`.

Both are in ``int4_rows.cpp``, which :mod:`dslib.fast.kernels.compiled` compiles and keeps. :func:`plain` is the
arithmetic of the second in torch, and what the tests hold it against.

Book: ``chapters/architecture/int4.ipynb``, section "How fast".
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dslib.architecture.int4.levels import BLOCK, unpack
from dslib.fast.kernels.compiled import NotCompiled, function, load

SOURCE = Path(__file__).with_suffix(".cpp")
FEW = 4  # rows; each goes through the weights by itself, so that more are faster in torch's product
FUNCTIONS = {torch.float32: "int4_float32", torch.bfloat16: "int4_bfloat16"}
PLAIN, PORTABLE, ROUNDED = range(3)  # rows as they are, the same by loops for any processor, rows in eight bits


def plain(rows: Tensor, packed: Tensor, pairs: Tensor, group_size: int) -> Tensor:
    """What the compiled product computes, step by step: ``rows Wᵀ`` with rows rounded to eight bits in each group.

    (N, in) float32 or bfloat16, codes as from ``pack``, (groups, out, 2) scales and zeros -> (N, out), in the dtype of
    ``rows``. The zeros are multiplied by sums of the rows before rounding.
    """
    groups = rows.float().unflatten(1, (-1, group_size))  # (N, groups, group_size)
    largest = groups.abs().amax(-1, keepdim=True)
    codes = torch.where(largest > 0, groups * (127 / largest), 0.0).round()  # -127 to 127
    scales, zeros = pairs.float().transpose(0, 1).unbind(-1)  # (out, groups)
    weights = (unpack(packed).float().unflatten(1, (-1, group_size)) - 8) * scales.unsqueeze(-1)
    y = F.linear((codes * (largest / 127)).flatten(1), weights.flatten(1)) + F.linear(groups.sum(-1), zeros)
    return y.to(rows.dtype)


def why_not(packed: Tensor, group_size: int) -> str | None:
    """Why rows in eight bits cannot be multiplied by these weights; None if they can. The first call may compile."""
    if packed.device.type != "cpu":
        return f"device {packed.device.type!r} has no product of ours, expected 'cpu'"
    if len(packed) % BLOCK or group_size % 4:
        return f"{len(packed)} rows in groups of {group_size}, expected multiples of {BLOCK} and 4"
    reason = compiled()
    if reason is None and not load(SOURCE).int4_rounds():
        return "this CPU has neither AVX-512 with VNNI nor AVX2, which rows in eight bits need"
    return reason


def compiled() -> str | None:
    """Why the products cannot be had; None if they can. The first call compiles them, in about two seconds."""
    return f"our 4-bit products {found}" if isinstance(found := load(SOURCE), NotCompiled) else None


def product(portable: bool = False) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """``product()(rows, packed, pairs, group_size)``: rows as they are, for where :func:`compiled` is None."""
    return _product(PORTABLE if portable else PLAIN)


def rounded_product() -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """The same with rows in eight bits, for where :func:`why_not` is None."""
    return _product(ROUNDED)


@cache
def _product(how: int) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    functions = {dtype: function(SOURCE, name, addresses=4, numbers=5) for dtype, name in FUNCTIONS.items()}

    def multiply(x: Tensor, packed: Tensor, pairs: Tensor, group_size: int) -> Tensor:
        n, columns, out = *x.shape, len(packed)  # nothing below looks at shapes again
        fits = packed.shape == (out, columns // 2) and pairs.shape == (columns // group_size, out, 2)
        kinds = x.dtype in functions and packed.dtype is torch.uint8 and pairs.dtype is torch.bfloat16
        whole = out % BLOCK == 0 and group_size % 4 == 0 and columns % group_size == 0
        if not (fits and kinds and whole and x.is_contiguous() and packed.is_contiguous() and pairs.is_contiguous()):
            given = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (x, packed, pairs))
            raise ValueError(
                f"x, packed, pairs: got {given} in groups of {group_size}, expected contiguous (N, in) float32 or "
                f"bfloat16, (out, in / 2) uint8 and (groups, out, 2) bfloat16, out a multiple of {BLOCK}"
            )
        y = x.new_empty(n, out)
        addresses = (tensor.data_ptr() for tensor in (x, packed, pairs, y))
        functions[x.dtype](*addresses, n, columns, out, group_size, how)
        return y

    return multiply
