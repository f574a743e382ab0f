"""Exercises of ``chapters/architecture/decoder.ipynb``, each a variant of what the page builds.

Shapes: T queries, S keys, C hidden size, H query heads, K key/value heads, D head size, F feed-forward size.
"""

import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from measured.exercises import exercise, named, normal

_random = partial(normal, dtype=torch.float64)


def _count(vocabulary, hidden, layers, heads, kv_heads, inner, tables, attention=2, products=3, block=2, last=1) -> int:
    size = hidden // heads
    each = attention * hidden * heads * size + 2 * hidden * kv_heads * size + products * hidden * inner + block * hidden
    return tables * vocabulary * hidden + layers * each + last * hidden


@exercise(
    "decoder/parameters",
    cases=named(
        "vocabulary hidden layers heads kv_heads inner tied",
        (49_152, 576, 30, 9, 3, 1536, True),
        (32_256, 2048, 24, 16, 16, 5504, False),
        (102_400, 8192, 95, 64, 8, 22_016, False),
    ),
    mistakes="""
        _count(vocabulary, hidden, layers, heads, heads, inner, 2 - tied)
            Keys and values have fewer heads than queries: their matrices have K D rows.
        _count(vocabulary, hidden, layers, heads, kv_heads, inner, 1)
            A head that is not tied is a second matrix as large as the embedding.
        _count(vocabulary, hidden, layers, heads, kv_heads, inner, 2)
            A tied head is the embedding itself: it counts once.
        _count(vocabulary, hidden, layers, heads, kv_heads, inner, 2 - tied, products=2)
            SwiGLU has three matrices: gate, up and down.
        _count(vocabulary, hidden, layers, heads, kv_heads, inner, 2 - tied, attention=1)
            Attention has four matrices; W_o, which mixes the heads, is missing.
        _count(vocabulary, hidden, layers, heads, kv_heads, inner, 2 - tied, block=0, last=0)
            Only the gains of the norms are missing: two of C numbers a block, one at the end.
        _count(vocabulary, hidden, layers, heads, kv_heads, inner, 2 - tied, last=0)
            The last norm, before the head, has C gains too.
        _count(vocabulary, hidden, layers, heads, kv_heads, inner, 2 - tied, block=1)
            Two norms a block: one before attention, one before SwiGLU.
    """,
    hint="Add up the rows of the page's table of matrices: a block's, times the blocks, and what stands outside.",
)
def parameters(vocabulary: int, hidden: int, layers: int, heads: int, kv_heads: int, inner: int, tied: bool) -> int:
    """Parameters of a decoder; the size of a head is hidden / heads. ``tied``: the head is the embedding."""
    return _count(vocabulary, hidden, layers, heads, kv_heads, inner, 2 - tied)


@exercise(
    "decoder/rms-norm",
    cases=named(
        "x offset eps",
        (_random(3, 8, seed=0), 0.3 * _random(8, seed=1), 1e-5),
        (300 * normal(2, 2, 16, seed=2).to(torch.float16), 0.3 * _random(16, seed=3), 1e-3),
        (0.2 * _random(5, 4, seed=4), 0.3 * _random(4, seed=5), 0.1),
    ),
    tolerance=7e-4,  # an answer may be rounded to float16, as its input is
    mistakes="""
        _scaled(x, eps) * offset
            The gain is 1 + offset: with an offset of zero the norm only scales, here it gives zero.
        _scaled(x.double() - x.double().mean(-1, keepdim=True), eps) * (1 + offset)
            The mean is subtracted first: that is layer norm. RMSNorm leaves the mean where it is.
        x.double() / (x.double().square().mean(-1, keepdim=True).sqrt() + eps) * (1 + offset)
            eps stands outside the root. It is added to the mean of the squares, before the root is taken.
        x.double() / (x.double().square().sum(-1, keepdim=True) + eps).sqrt() * (1 + offset)
            Divided by the root of the sum of squares. The root of their mean is wanted: sqrt(C) times less.
        x.double() / (x.double().square().mean() + eps).sqrt() * (1 + offset)
            One mean over everything: then the states of other tokens change the size of this one. Take the mean along
            the last dimension only.
        x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + offset)
            Right in float32, but in float16 the square of 300 overflows and the result is zero. Widen x before you
            square it.
    """,
    hint="Widen x to float32, divide by sqrt(mean of squares along the last dimension + eps), multiply by 1 + offset.",
)
def rms_norm(x: Tensor, offset: Tensor, eps: float) -> Tensor:
    """RMSNorm whose gain is stored as its distance from one: (..., C), (C,) -> (..., C), safe for float16 inputs."""
    return _scaled(x, eps) * (1 + offset)


def _scaled(x: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@exercise(
    "decoder/rope",
    cases=named(
        "x positions base",
        (_random(3, 2, 8, seed=0), torch.tensor([5, 0, 2]), 100.0),
        (_random(4, 1, 6, seed=1), torch.tensor([7, 8, 9, 10]), 10_000.0),
        (_random(2, 3, 2, seed=2), torch.tensor([1, 3]), 50.0),
    ),
    tolerance=1e-4,
    mistakes="""
        torch.cat(_turn(*x.chunk(2, -1), _angles(x, positions, base)), -1)
            Here the pairs are halves, (i, i + D/2), as on the page. This exercise pairs neighbours, (2i, 2i + 1).
        torch.cat(_turn(x[..., ::2], x[..., 1::2], _angles(x, positions, base)), -1)
            The right numbers in another order: each pair has to go back to the places that it came from.
        _neighbours(x, -_angles(x, positions, base))
            Turned the wrong way round: (a, b) becomes (a cos - b sin, a sin + b cos).
        _neighbours(x, _angles(x, torch.arange(len(x)), base))
            `positions` has no effect. A token's position need not be its row number.
        _neighbours(x, _angles(x, positions, base**0.5))
            Pair i turns by base ** (-2 i / D) a position; yours by the root of that. Is there a 2 missing?
        _neighbours(x, _angles(x, positions, 1 / base))
            The angles grow from pair to pair. The first pair turns fastest: base ** (-2 i / D).
    """,
    hint="Pair i, (x[..., 2i], x[..., 2i + 1]), turns by position * base ** (-2 i / D), and goes back to its place.",
)
def rope(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions for neighbouring pairs: (T, H, D), (T,) -> (T, H, D)."""
    return _neighbours(x, _angles(x, positions, base))


def _angles(x: Tensor, positions: Tensor, base: float) -> Tensor:
    size = x.shape[-1]
    return positions[:, None, None] * float(base) ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


def _turn(a: Tensor, b: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    return a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()


def _neighbours(x: Tensor, angle: Tensor) -> Tensor:
    return torch.stack(_turn(x[..., ::2], x[..., 1::2], angle), -1).flatten(-2)


@exercise(
    "decoder/grouped-attention",
    cases=named(
        "q k v",
        (_random(5, 4, 8, seed=0), _random(5, 2, 8, seed=1), _random(5, 2, 8, seed=2)),
        (_random(2, 6, 4, seed=3), _random(6, 2, 4, seed=4), _random(6, 2, 4, seed=5)),
        (_random(3, 3, 4, seed=6), _random(4, 3, 4, seed=7), _random(4, 3, 4, seed=8)),
        (_random(1, 4, 8, seed=9), _random(7, 2, 8, seed=10), _random(7, 2, 8, seed=11)),
    ),
    tolerance=1e-4,
    mistakes="""
        _attend(q, k, v, shared=lambda t, times: t.repeat(1, times, 1))
            The key/value heads are repeated in the order 0, 1, 0, 1. Neighbouring query heads share one: 0, 0, 1, 1.
        _attend(q, k, v, scale=1.0)
            The scores are not divided by the root of the head size.
        _attend(q, k, v, scale=q.shape[-1])
            The scores are divided by the head size. It is the root of the head size.
        _attend(q, k, v, see=lambda query, key, before: key <= query)
            The mask takes the first query for the first token of the text. The queries are the last T of S tokens, so
            query t stands at position S - T + t.
        _attend(q, k, v, see=lambda query, key, before: key <= query + len(k))
            No mask: a token sees tokens that come after it.
        _attend(q, k, v, see=lambda query, key, before: key < query + before)
            A token does not see itself. Its own key is the last one that it may look at.
        _attend(q, k, v, along=0)
            The softmax runs along the queries. The weights of one query, over all keys, sum to one.
    """,
    hint="Query t stands at position S - T + t. Query head h reads key/value head h // (H / K). Divide by sqrt(D).",
)
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last T of S tokens, tokens first: (T, H, D), (S, K, D) twice -> (T, H, D)."""
    return _attend(q, k, v)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale=None, along=-1,
    shared=lambda t, times: t.repeat_interleave(times, 1), see=lambda query, key, before: key <= query + before,
) -> Tensor:  # fmt: skip
    times, before = q.shape[1] // k.shape[1], len(k) - len(q)
    scores = torch.einsum("thd,shd->hts", q, shared(k, times)) / (scale or math.sqrt(q.shape[-1]))
    hidden = ~see(torch.arange(len(q))[:, None], torch.arange(len(k)), before)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1 if along else -2)
    return torch.einsum("hts,shd->thd", weights, shared(v, times))


@exercise(
    "decoder/swiglu",
    cases=named(
        "x gate_up down",
        (_random(3, 4, seed=0), _random(12, 4, seed=1), _random(4, 6, seed=2)),
        (_random(2, 2, 6, seed=3), _random(8, 6, seed=4), _random(6, 4, seed=5)),
        (_random(1, 3, seed=6), _random(4, 3, seed=7), _random(3, 2, seed=8)),
    ),
    tolerance=1e-4,
    mistakes="""
        (F.silu(x @ gate_up[: len(gate_up) // 2].mT) * (x @ gate_up[len(gate_up) // 2 :].mT)) @ down.mT
            The rows are taken as two halves. In this checkpoint they alternate: gate, up, gate, up.
        (F.silu(x @ gate_up[1::2].mT) * (x @ gate_up[::2].mT)) @ down.mT
            Gate and up are exchanged: the gate's rows come first.
        ((x @ gate_up[::2].mT) * (x @ gate_up[1::2].mT)) @ down.mT
            The gate has no silu.
        ((x @ gate_up[::2].mT).sigmoid() * (x @ gate_up[1::2].mT)) @ down.mT
            That is a sigmoid as gate (GLU). silu(z) is z times sigmoid(z).
        (F.gelu(x @ gate_up[::2].mT) * (x @ gate_up[1::2].mT)) @ down.mT
            That is GeGLU. The gate of SwiGLU is a silu.
        F.silu((x @ gate_up[::2].mT) * (x @ gate_up[1::2].mT)) @ down.mT
            The silu is taken of the product. Only the gate goes through it.
    """,
    hint="One product with gate_up; every second result is the gate. silu(gate) * up, then down.",
)
def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU from one matrix whose rows alternate gate, up: (..., C), (2 F, C), (C, F) -> (..., C)."""
    both = x @ gate_up.mT
    return (F.silu(both[..., ::2]) * both[..., 1::2]) @ down.mT


def _weights(hidden: int, heads: int, kv_heads: int, size: int, inner: int, seed: int) -> dict[str, Tensor]:
    shapes = {
        "input_layernorm": (hidden,), "q_norm": (size,), "k_norm": (size,), "post_attention_layernorm": (hidden,),
        "q": (heads * size, hidden), "k": (kv_heads * size, hidden), "v": (kv_heads * size, hidden),
        "o": (hidden, heads * size), "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    return {
        name: _random(*shape, seed=seed + i) / shape[-1] ** 0.5 + ("norm" in name)
        for i, (name, shape) in enumerate(shapes.items())
    }


# What is wrong with the block that the reader is given, in the order of its lines. The hints say where to look: the
# given block is checked as it stands, so the first of them is on the page before the reader has begun.
FAULTS = {
    "late": "The scores depend on where the text begins: with every position one higher they differ. Which "
    "line brings that in?",
    "mixed": "After attention, numbers of different tokens stand in one row. Follow the shape of `y`.",
    "branch": "The feed-forward network sees only what attention has just found. It should see the whole state.",
    "lost": "A block adds to the residual stream. This one hands on only what it would have added.",
}
# The reader mends one fault after another, so every selection of them is somebody's answer; its first one is named.
_LEFT = [left for count in range(1, len(FAULTS) + 1) for left in itertools.combinations(FAULTS, count)]


@exercise(
    "decoder/block",
    cases=named(
        "x w head_dim",
        (_random(4, 12, seed=0), _weights(12, 3, 3, 4, 10, seed=1), 4),
        (_random(5, 8, seed=20), _weights(8, 4, 2, 2, 6, seed=21), 2),
    ),
    tolerance=1e-4,
    mistakes="\n".join(
        [f"_block(x, w, head_dim, {left})\n    {FAULTS[left[0]]}" for left in _LEFT]
        + [
            "_block(x, w, head_dim, ('bare',))\n    Queries and keys are not normalised. This block has `q_norm` and "
            "`k_norm`, over each head, before the rotation.",
            "_block(x, w, head_dim, ('shared',))\n    The feed-forward network reads its state through the norm of "
            "attention. It has a norm of its own, `post_attention_layernorm`.",
            "_block(x, w, head_dim, ('turned',))\n    Values are rotated too. A value is handed over as it is.",
        ]
    ),
    hint="Follow the shapes line by line. Ask what each part reads, what it adds to, and what a score may depend on.",
)
def block(x: Tensor, w: dict[str, Tensor], head_dim: int) -> Tensor:
    """A decoder's block that also normalises queries and keys: (T, C) -> (T, C), RoPE's base 100,000, eps 1e-5."""
    return _block(x, w, head_dim)


def _block(x: Tensor, w: dict[str, Tensor], head_dim: int, faults: tuple[str, ...] = ()) -> Tensor:
    def norm(t: Tensor, name: str) -> Tensor:
        return t if name[1:] == "_norm" and "bare" in faults else _scaled(t, 1e-5) * w[name]

    def turn(t: Tensor) -> Tensor:  # (heads, T, D), pairs in halves
        angle = _angles(t, torch.arange(t.shape[1]), 100_000.0)[:, 0]
        return torch.cat(_turn(*t.chunk(2, -1), angle), -1)

    h = norm(x, "input_layernorm")
    q, k, v = ((h @ w[name].mT).unflatten(-1, (-1, head_dim)).transpose(0, 1) for name in "qkv")
    if "late" in faults:
        q, k = norm(turn(q), "q_norm"), norm(turn(k), "k_norm")
    else:
        q, k = turn(norm(q, "q_norm")), turn(norm(k, "k_norm"))
    v = turn(v) if "turned" in faults else v
    y = _attend(*(t.transpose(0, 1) for t in (q, k, v)))  # (T, H, D)
    y = (y.transpose(0, 1).reshape(len(x), -1) if "mixed" in faults else y.flatten(1)) @ w["o"].mT
    h = norm(y if "branch" in faults else x + y, f"{'input' if 'shared' in faults else 'post_attention'}_layernorm")
    return (0 if "lost" in faults else x) + y + (F.silu(h @ w["gate"].mT) * (h @ w["up"].mT)) @ w["down"].mT
