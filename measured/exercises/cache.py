"""Exercises of ``chapters/architecture/cache.ipynb``."""

import torch
from torch import Tensor

from measured.exercises import exercise, named, normal


def rope(x: Tensor, at: Tensor) -> Tensor:
    """(S, D) queries or keys at positions (S,), as on the page: the pair (i, i + D/2) turns by an angle of its own."""
    size = x.shape[-1]
    angle = at[:, None] * 100_000.0 ** (-torch.arange(0, size, 2) / size)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


def _piece(new: int, held: int, seed: int) -> dict[str, Tensor]:
    x = normal(5, new + held, 8, seed=seed)
    return {"q": x[0, :new], "k": x[1, :new], "v": x[2, :new], "held_k": x[3, :held], "held_v": x[4, :held]}


def _attend(q, k, v, held_k, held_v, start=None, again=False, diagonal=None) -> Tensor:
    """The reference and, by its options, the usual ways to get it wrong."""
    held = len(held_k)
    at = torch.arange(len(q)) + (held if start is None else start)
    keys = rope(torch.cat((held_k, k)), torch.arange(held + len(k))) if again else torch.cat((held_k, rope(k, at)))
    scores = rope(q, at) @ keys.T / q.shape[-1] ** 0.5
    hidden = torch.ones_like(scores).triu(held + 1 if diagonal is None else diagonal).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ torch.cat((held_v, v))


@exercise(
    "cache/piece",
    cases=[_piece(3, 4, 0), _piece(1, 6, 1), _piece(5, 2, 2)],
    mistakes="""
        _attend(q, k, v, held_k, held_v, again=True, diagonal=1)
            Both faults are still there. Neither shows when nothing is held: compare a text in one piece with the same
            text in two.
        _attend(q, k, v, held_k, held_v, diagonal=1)
            The keys are right now, the mask is not: the first new token may see all held keys and itself, and its
            diagonal must begin there.
        _attend(q, k, v, held_k, held_v, again=True)
            The mask is right now, the keys are not: held keys were rotated when they came, and you turn them again.
        _attend(q, k, v, held_k, held_v, diagonal=10**6)
            Without any mask, a token of the piece sees the ones after it.
        _attend(q, k, v, held_k, held_v, diagonal=len(held_k))
            One key too few: a token may look at itself.
        _attend(q, k, v, held_k, held_v, start=0)
            The new tokens stand behind the held ones: their positions begin at the number of held keys, not at 0.
    """,
    tolerance=1e-4,
)
def attend_piece(q: Tensor, k: Tensor, v: Tensor, held_k: Tensor, held_v: Tensor) -> Tensor:
    """Causal attention of T new tokens behind S held ones, one head: (T, D) three times, (S, D) twice -> (T, D).

    Args:
        q, k, v: not rotated yet. held_k: rotated, each at its own position 0 … S - 1.
    """
    return _attend(q, k, v, held_k, held_v)


def _ring(tokens: int, window: int, sinks: int, turn: int = 0) -> list[int | None]:
    slots = [*range(sinks), *[None] * window]
    for position in range(sinks, tokens):
        slots[sinks + (position - sinks + turn) % window] = position
    return slots[: max(tokens, sinks)]


@exercise(
    "cache/rolling-positions",
    cases=named("tokens window sinks", (3, 4, 0), (9, 4, 0), (13, 4, 2), (1, 4, 2), (14, 5, 3), (8, 2, 1)),
    mistakes="""
        [*range(min(sinks, tokens)), *range(max(sinks, tokens - window), tokens)]
            The right positions in the order of the text. In the ring the newest stands where the oldest stood, so say
            which slot holds which.
        _ring(tokens, window + sinks, 0)
            One ring over all slots overwrites the sinks after one round. They need slots of their own.
        _ring(tokens, window, 0)
            The sinks are missing: the first positions keep their slots after the window has moved on.
        _ring(tokens, window, sinks, sinks)[:tokens]
            Nearly: the ring begins where the sinks end, so count positions from there before taking the remainder.
        _ring(tokens, window, sinks)
            At the very beginning some sinks have not come yet. A slot that was never written is left out.
        rolling_positions(tokens + 1, window, sinks)
            One token too many: after n tokens the last position is n - 1.
    """,
)
def rolling_positions(tokens: int, window: int, sinks: int) -> list[int]:
    """The position held in each slot of a rolling cache after ``tokens`` tokens, in the order of slots."""
    return _ring(tokens, window, sinks)[:tokens]


def _kept(layers: int, full_every: int, kv_heads: int, head_dim: int, full: int, others: int) -> int:
    return 2 * kv_heads * head_dim * (layers // full_every * full + (layers - layers // full_every) * others)


@exercise(
    "cache/kv-bytes",
    cases=named(
        "layers full_every heads kv_heads head_dim tokens window bytes_per_number",
        (24, 6, 16, 16, 128, 16_384, 1024, 2),
        (30, 5, 9, 3, 64, 500, 1024, 4),
        (62, 4, 32, 8, 128, 131_072, 4096, 1),
    ),
    mistakes="""
        _kept(layers, full_every, kv_heads, head_dim, tokens, min(tokens, window)) // 2 * bytes_per_number
            Half of it: keys are counted, values are not. Both are kept.
        _kept(layers, full_every, heads, head_dim, tokens, min(tokens, window)) * bytes_per_number
            You counted query heads. Queries are used once and dropped; only the key-value heads are kept.
        _kept(layers, full_every, kv_heads, head_dim, tokens, window) * bytes_per_number
            A window longer than the text holds no more than the text.
        2 * layers * kv_heads * head_dim * tokens * bytes_per_number
            Every layer counted in full: most of them have a window, and keep no more than that.
        2 * layers * kv_heads * head_dim * min(tokens, window) * bytes_per_number
            Every layer counted with a window: some of them keep the whole text.
        _kept(layers, full_every, kv_heads, head_dim, min(tokens, window), tokens) * bytes_per_number
            The other way round: one layer in so many is the full one.
        kv_bytes(layers, full_every, heads, kv_heads, head_dim, tokens, window, bytes_per_number) * 8
            Eight times too much: that is in bits, and the question asks for bytes.
    """,
)
def kv_bytes(
    layers: int, full_every: int, heads: int, kv_heads: int, head_dim: int, tokens: int, window: int,
    bytes_per_number: int,
) -> int:  # fmt: skip
    """Bytes of keys and values where of each ``full_every`` layers the last sees all, the others a window."""
    return _kept(layers, full_every, kv_heads, head_dim, tokens, min(tokens, window)) * bytes_per_number
