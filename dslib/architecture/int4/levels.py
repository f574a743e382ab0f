"""How codes, scales and zeros are chosen: round to nearest, and something better; and two codes to a byte.

All methods work on groups of weights, (..., group_size), each group by itself, and return what
:mod:`dslib.architecture.int4.layers` stores: codes 0 to 15, and a scale and a zero so that
``w = (q - 8) * scale + zero``.

Book: ``chapters/architecture/int4.ipynb``. Of that chapter are also, in reading order:
:mod:`~dslib.architecture.int4.layers`, :mod:`dslib.fast.int4` and
:mod:`dslib.fast.int4_rows`. Sources: ZeroQuant (arXiv 2206.01861) for rounding group by group, HQQ
(mobiusml.github.io/hqq_blog) for the half-quadratic search.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dslib.check import whole

LEVELS = 16
CENTRE = 8  # the code whose weight is the group's zero
BLOCK = 64  # rows whose codes lie together


@dataclass(frozen=True)
class Groups:
    """Quantised groups.

    Attributes:
        codes: uint8 (..., group_size), 0 to 15.
        scales, zeros: bfloat16 (..., 1); zeros are 0 where the method is symmetric.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def dequantize(self) -> Tensor:
        """The weights that the codes stand for, float32 (..., group_size)."""
        return (self.codes.float() - CENTRE) * self.scales.float() + self.zeros.float()


def round_to_nearest(groups: Tensor, symmetric: bool = False) -> Groups:
    """The levels lie evenly between the smallest and the largest weight of a group; each weight takes the nearest.

    Args:
        groups: (..., group_size), finite.
        symmetric: the levels are multiples of the scale, -8 to 7 times, and there is no zero point. The weight that is
            largest in size gets the code 0, so its sign decides that of the scale.
    """
    groups = groups.float()
    low, high = groups.aminmax(dim=-1, keepdim=True)
    if symmetric:
        scales, zeros = torch.where(high > -low, high, low) / -CENTRE, torch.zeros_like(low)
    else:
        scales = (high - low) / (LEVELS - 1)
        zeros = low + CENTRE * scales
    return encode(groups, scales, zeros)


def encode(groups: Tensor, scales: Tensor, zeros: Tensor) -> Groups:
    """The nearest codes for given scales and zeros (..., 1), which are rounded to bfloat16 first.

    A group of equal weights has a scale of 0. All its codes are 8, and its zero is the weight.
    """
    scales, zeros = scales.bfloat16(), zeros.bfloat16()
    steps = (groups.float() - zeros.float()) / scales.float().where(scales != 0, 1.0)
    codes = (steps.masked_fill(scales == 0, 0.0).round() + CENTRE).clamp(0, LEVELS - 1)
    return Groups(codes.to(torch.uint8), scales, zeros)


def half_quadratic(groups: Tensor, symmetric: bool = False, steps: int = 20, p: float = 0.7) -> Groups:
    """Move the zeros of :func:`round_to_nearest` to where most weights fit well, whatever the few outliers say (HQQ).

    Wanted is the zero with the smallest sum of ``|error|**p``, which for p < 1 forgives large errors. There is no
    formula for it. So each error is split into a part that is excused as an outlier and a rest, and two steps that do
    have a formula take turns: excuse, by shrinking the errors, and move the zero to the mean of what is left. Looks at
    the weights only, no data.

    The search may end worse than it began: of groups of 32 normal weights, a fifth do. Those stay as they were.

    Raises:
        ValueError: symmetric groups, which have no zero to move.
    """
    if symmetric:
        raise ValueError("symmetric: got True with method 'hqq', which moves the zero point; expected False")
    groups, start = groups.float(), round_to_nearest(groups)
    scales = start.scales.float().where(start.scales != 0, 1.0)
    steps_from_zero, zeros = groups / scales, start.zeros.float() / scales  # in units of the scale
    strictness = 10.0
    for _ in range(steps):
        levels = (steps_from_zero - zeros).round().clamp(-CENTRE, LEVELS - 1 - CENTRE)
        error = steps_from_zero - zeros - levels
        size = error.abs().clamp(min=1e-6)
        excused = error.sign() * (size - size ** (p - 1) / strictness).clamp(min=0)
        zeros = (steps_from_zero - excused - levels).mean(-1, keepdim=True)
        strictness *= 1.01
    found = encode(groups, start.scales, zeros * scales)
    before, after = (
        (tried.dequantize() - groups).abs().pow(p).sum(-1, keepdim=True)  # (..., 1)
        for tried in (start, found)
    )
    better = after < before
    return Groups(found.codes.where(better, start.codes), start.scales, found.zeros.where(better, start.zeros))


METHODS = {"rtn": round_to_nearest, "hqq": half_quadratic}


def check_group_size(in_features: int, group_size: int) -> None:
    """Raises ValueError unless rows of ``in_features`` can be cut into groups of ``group_size``."""
    whole(2, group_size=group_size)
    if group_size % 2:
        raise ValueError(f"group_size: got {group_size}, expected an even number of at least 2")
    if in_features % group_size:
        raise ValueError(f"group_size: got {group_size}, expected a divisor of in_features={in_features}")


def pack(codes: Tensor) -> Tensor:
    """Codes (out, in), integers 0 to 15 -> uint8 (out, in / 2), two to a byte; both sizes even.

    The rows come in blocks of 64, a last block may be shorter. Within a block, column after column: a byte holds the
    code of row i in its low half and that of row i + 32 (half a block on) in its high half. So one load brings the same
    column of 64 rows, which is what a vector unit wants.

    Raises:
        ValueError: an odd number of rows (two share a byte) or columns; codes that four bits cannot hold.
    """
    if codes.ndim != 2 or not codes.numel() or codes.shape[0] % 2 or codes.shape[1] % 2:
        raise ValueError(f"codes: got shape {tuple(codes.shape)}, expected two even numbers of at least 2")
    low, high = codes.aminmax()
    if codes.is_floating_point() or low < 0 or high >= LEVELS:
        raise ValueError(f"codes: got {codes.dtype} from {low} to {high}, expected integers from 0 to {LEVELS - 1}")
    rows, columns = codes.shape
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
