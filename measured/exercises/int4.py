"""Exercises of ``chapters/architecture/int4.ipynb``. A group is a row of weights; codes are whole numbers, 0 to 15."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from measured.exercises import exercise, normal

_random = partial(normal, dtype=torch.float64)


def _codes(*shape: int, seed: int, high: int = 16) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def _case(seed: int) -> dict[str, Tensor]:
    scale, zero = _random(3, 1, seed=seed).abs() + 0.1, _random(3, 1, seed=seed + 1)
    return {"codes": _codes(3, 8, seed=seed), "scale": scale, "zero": zero}


@exercise(
    "int4/levels",
    cases=[_case(0), _case(2)],
    mistakes="""
        (codes - 8) * scale - zero
            The sign of the zero: it is the weight that code 8 stands for, so it is added.
        codes * scale + zero
            Here the zero belongs to code 0. In this format it belongs to code 8, so 8 is taken off first.
        (codes - 8 - zero) * scale
            Here the zero is a code, as in some formats, and is multiplied by the scale. In this one it is a weight,
            added at the end.
        (codes - 8) * scale
            The zero is missing.
    """,
    hint="w = (q - 8) * scale + zero, each group with its own scale and zero.",
)
def levels(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Weights that the codes stand for: (G, n) codes, (G, 1) scales and zeros -> (G, n)."""
    return (codes - 8) * scale + zero


@exercise(
    "int4/encode",
    cases=[{"groups": _random(4, 32, seed=4)}, {"groups": _random(3, 8, seed=5) * torch.tensor([[1], [5], [0.2]])}],
    mistakes="""
        _between(groups, *groups.aminmax())
            One scale for the whole tensor: smallest and largest are taken over all groups. Each group has its own; keep
            the last axis apart.
        _between(groups, *groups.aminmax(dim=-1, keepdim=True), steps=16)
            Sixteen levels have fifteen steps between them: divide the range by 15. With 16 the largest weight has no
            level of its own.
        _between(groups, *groups.aminmax(dim=-1, keepdim=True), rounded=torch.floor)
            Rounded down, the error is up to a whole step. To the nearest, it is half a step.
        _between(groups, *groups.aminmax(dim=0, keepdim=True))
            Smallest and largest along the wrong axis: a group is a row.
        encode(groups) - 8
            Those are signed codes, -8 to 7. What is stored has no sign: 0 to 15.
    """,
    hint="low and high of each row, a step of (high - low) / 15, and each weight's distance from low in steps.",
)
def encode(groups: Tensor) -> Tensor:
    """Codes of round to nearest between the smallest and the largest weight of each group: (G, n) -> (G, n)."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    return ((groups - low) / ((high - low) / 15)).round().clamp(0, 15)


@exercise(
    "int4/unpack",
    cases=[
        {"packed": torch.tensor([0x1F, 0xA0, 0x73], dtype=torch.uint8)},
        {"packed": _codes(16, seed=7, high=256).to(torch.uint8)},
    ],
    mistakes="""
        torch.stack((packed >> 4, packed & 15), dim=-1).flatten()
            The halves are swapped: the first code lies in the low four bits.
        torch.where(unpack(packed) > 7, unpack(packed).int() - 16, unpack(packed).int())
            Those codes have a sign: above 7 they turn negative. Ours run from 0 to 15, and the 8 is taken off when
            weights are made.
        torch.cat((packed & 15, packed >> 4))
            All low halves first, then all high ones: the two codes of a byte are neighbours here. Stack them along a
            new last axis and flatten.
        torch.stack((packed & 7, packed >> 4), dim=-1).flatten()
            A mask of 7 keeps three bits. Four bits are 15.
    """,
    hint="packed & 15 is the low half, packed >> 4 the high one.",
)
def unpack(packed: Tensor) -> Tensor:
    """Bytes (n,), the first of two codes in the low half -> codes (2n,)."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten()


@exercise(
    "int4/bytes",
    cases=[(2048, 5504, 32), (576, 1536, 64), (64, 128, 128)],
    mistakes="""
        rows * columns // 2
            Those are the codes alone. Every group also stores a scale and a zero.
        rows * columns // 2 + rows * (columns // group_size) * 2
            A scale or a zero, but not both: each takes two bytes.
        rows * columns // 2 + rows * 4
            One scale and zero for each row. There is one for each group, and a row has columns / group_size.
        rows * columns + rows * (columns // group_size) * 4
            A byte for each code. Two codes share one.
    """,
    hint="Half a byte a weight, and four bytes a group.",
)
def size(rows: int, columns: int, group_size: int) -> int:
    """Bytes of an asymmetric 4-bit matrix with a 16-bit scale and a 16-bit zero for each group."""
    return rows * columns // 2 + rows * (columns // group_size) * 4


def _between(groups: Tensor, low: Tensor, high: Tensor, steps: int = 15, rounded: Callable = torch.round) -> Tensor:
    """As :func:`encode`, but between other ends, in another number of steps, or rounded in another way."""
    return rounded((groups - low) / ((high - low) / steps)).clamp(0, 15)
