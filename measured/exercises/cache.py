"""Exercises of ``chapters/architecture/cache.ipynb``."""

import itertools

import torch
from torch import Tensor

from measured.exercises import exercise, named, normal


def rope(x: Tensor, at: Tensor) -> Tensor:
    """(B, S, D) queries or keys at positions (B, S), as on the page: the pair (i, i + D/2) turns by its own angle."""
    size = x.shape[-1]
    angle = at[..., None] * 100_000.0 ** (-torch.arange(0, size, 2) / size)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


def _rows(new: int, *rows: str, seed: int) -> dict[str, Tensor]:
    """Sequences of one batch as text, ``.`` for padding; the last ``new`` places are those of the queries."""
    real = torch.tensor([[place != "." for place in row] for row in rows])
    q, k, v = normal(3, *real.shape, 8, seed=seed)
    return {"q": q[:, -new:], "k": k, "v": v, "real": real}


def _padded(q, k, v, real, at=None, hide=True, corner=False, future=False, zero=True, first=False) -> Tensor:
    """The reference and, by its options, the usual ways to get it wrong."""
    new, size = q.shape[1:]
    at = (real.cumsum(1) - 1).clamp(min=0) if at is None else at
    seen = torch.ones(new, real.shape[1]).tril(0 if corner else real.shape[1] - new + 10**6 * future).bool()
    seen = seen & ((real[:1] if first else real)[:, None] | (not hide))  # (B, T, S)
    scores = rope(q, at[:, -new:]) @ rope(k, at).mT / size**0.5
    out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return torch.where(real[:, -new:, None], out, 0) if zero else out


@exercise(
    "cache/padded",
    cases=[
        _rows(6, "..abcd", "abcdef", ".....a", seed=0),
        _rows(2, "abc..de", "abcdefg", "a....bc", seed=1),
        _rows(3, ".ab.c.d", "..abcd.", seed=2),
    ],
    mistakes="""
        _padded(q, k, v, real, hide=False)
            Padding is seen: a query may look at real tokens only.
        _padded(q, k, v, real, at=torch.arange(real.shape[1]).expand(real.shape))
            The mask is right. Positions count places, and so padding too: where it stands between two tokens, it moves
            them apart. Count real tokens only.
        _padded(q, k, v, real, future=True)
            A token sees the ones after it: hide padding *and* the future.
        _padded(q, k, v, real, corner=True)
            The queries are the last T of S places; your mask takes them for the first.
        _padded(q, k, v, real, first=True)
            One mask for all rows: each sequence has padding of its own.
        _padded(q, k, v, real, zero=False)
            The rows of real tokens are right. A query that is padding has nothing to say: give zeros. (One that may see
            no key at all divides zero by zero.)
    """,
    tolerance=1e-4,
    hint="Take one row, drop its padding, and run it alone: the outputs of its real tokens must be these.",
)
def attend_padded(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    """Causal attention in a padded batch, one head: (B, T, D), (B, S, D) twice, (B, S) of bool -> (B, T, D).

    Args:
        q: of the last T places. k, v: of all S. Not rotated yet.
        real: False where padding stands, on any side or in between.

    Returns:
        For a real token what it would get without padding, zeros for padding.
    """
    return _padded(q, k, v, real)


def _ring(new: int, start: int, window: int, seed: int) -> dict:
    """A piece at positions start, start + 1 … and the ring that holds what came before; unwritten slots are zeros."""
    x = normal(5, max(new, window), 8, seed=seed)
    held = x[3:, :window] * (torch.arange(window) < start)[:, None]
    return {"q": x[0, :new], "k": x[1, :new], "v": x[2, :new], "start": start, "held_k": held[0], "held_v": held[1]}


def _through_ring(
    q, k, v, start, held_k, held_v, first=0, reach=0, future=False, write=True, restart=False, early=False
):
    """The reference and, by its options, the usual ways to get it wrong."""
    window = len(held_k)
    at = start + torch.arange(len(q))
    old = torch.arange(max(first, start - window), start)
    after = held_k.clone(), held_v.clone()
    for position, *new in zip(at - start * restart, k, v, strict=True) if write else ():
        after[0][position % window], after[1][position % window] = new
    keys, values, where = (
        torch.cat((held_k[old % window], k)),
        torch.cat((held_v[old % window], v)),
        torch.cat((old, at)),
    )
    if early:
        where = torch.arange(max(0, start + len(q) - window), start + len(q))
        keys, values = after[0][where % window], after[1][where % window]
    back = at[:, None] - where
    seen = ((back >= 0) | future) & (back < window + reach)
    scores = (q @ keys.T / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return torch.cat((scores.softmax(-1).nan_to_num() @ values, *after))


@exercise(
    "cache/ring-piece",
    cases=[_ring(3, 6, 4, 0), _ring(1, 9, 4, 1), _ring(2, 2, 5, 2), _ring(7, 5, 3, 3), _ring(4, 0, 6, 4)],
    mistakes="""
        _through_ring(q, k, v, start, held_k, held_v, early=True)
            You write before you look: the last tokens of a piece overwrite keys that its first ones still need.
        _through_ring(q, k, v, start, held_k, held_v, reach=10**6)
            Causal, but without the window: a later token of the piece must not see the oldest held keys any more.
        _through_ring(q, k, v, start, held_k, held_v, reach=1)
            One key too many: a window of W is the token itself and the W - 1 before it.
        _through_ring(q, k, v, start, held_k, held_v, reach=-1)
            One key too few: a window of W is the token itself and the W - 1 before it.
        _through_ring(q, k, v, start, held_k, held_v, future=True)
            A token of the piece sees the ones after it.
        _through_ring(q, k, v, start, held_k, held_v, first=-(10**6))
            A slot that was never written takes part: its key of zeros has a score of 0, and so gets weight.
        _through_ring(q, k, v, start, held_k, held_v, write=False)
            What you return as the ring is the old one: the piece has to be written, too.
        _through_ring(q, k, v, start, held_k, held_v, restart=True)
            Slots go by the position in the text, so count from `start`, and not from 0 in each piece.
        _through_ring(q, k, v, start, held_k, held_v)[: len(q)]
            The outputs are right. The ring's keys and values after the piece belong below them.
    """,
    tolerance=1e-4,
    hint="Feed the piece one token at a time to the class Ring of the page, and compare outputs and slots.",
)
def ring_piece(q: Tensor, k: Tensor, v: Tensor, start: int, held_k: Tensor, held_v: Tensor) -> Tensor:
    """A piece of T tokens through a ring of W slots, one head: (T + 2 W, D), outputs, then the ring's keys and values.

    Args:
        q, k, v: (T, D), rotated already; the first token stands at position ``start``.
        held_k, held_v: (W, D), where slot p mod W holds position p, for the last W positions before ``start``.
    """
    return _through_ring(q, k, v, start, held_k, held_v)


def _slots(window: int, steps: list[int], capped: bool = True) -> int:
    """The reference in closed form (for W of 2 or more) and, by its options, usual ways to get it wrong."""
    length = written = needed = 0
    for step in steps:
        for at in range(length, length + step):
            written = max(written, at + 1)  # the furthest that the ring was ever written
            oldest = at - window + 1
            needed = max(needed, written - (max(0, oldest) if capped else oldest))
        length += step
    return needed


def _longest(steps: list[int]) -> int:
    return max(itertools.accumulate(steps))


@exercise(
    "cache/slots",
    cases=named(
        "window steps",
        (4, [9, -3, 2]),
        (4, [20]),
        (5, [30, -3, 1, -4, 6, -2, 1]),
        (8, [3, -1, 2]),
        (3, [12, -1, 1, -1, 1, -1, 1]),
        (6, [10, -2, 40]),
    ),
    mistakes="""
        window
            W slots are enough as long as nothing is forgotten. What forgotten tokens overwrote may be needed again.
        window + max(0, -min(steps))
            One too many: the first token behind the gap brings its own key, and needs only W - 1 old ones.
        window + max(0, -min(steps) - 1)
            Nearly. Forgetting twice with few tokens between reaches further back than either step, and a text that
            never fills the ring needs no more slots than it has tokens.
        window + max(0, -sum(step for step in steps if step < 0) - 1)
            Not the sum of all that was forgotten: what is fed again in between fills the gap.
        _longest(steps)
            So many slots lose nothing at all. That is a list; a window needs fewer.
        _slots(window, steps, capped=False)
            A text that is shorter than the window needs no slot for positions before its first.
        _slots(window, steps) + 1
            One too many: count the positions from the oldest key that is needed to the newest that was written.
    """,
    hint="Keep a dictionary from slot to position, feed the steps, and look whether each token finds all its keys.",
)
def slots_needed(window: int, steps: list[int]) -> int:
    """The smallest ring in which no token misses a key, where tokens may also be forgotten.

    Args:
        window: W, a token's own position included; 2 or more.
        steps: a number above 0 feeds so many tokens, one by one; one below 0 forgets so many of the last.
    """
    return _slots(window, steps)
