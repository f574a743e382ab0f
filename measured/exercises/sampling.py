"""Exercises of ``chapters/architecture/sampling.ipynb``. Shapes: B rows, V tokens of the vocabulary."""

import torch
from torch import Tensor

from measured.exercises import exercise, named, normal

# No two alike, and no sum near a p below: the same tokens stay on every machine, whatever order a sort gives to ties.
_EXACT = torch.tensor([[0.12, 0.5, 0.04, 0.26, 0.08], [0.5, 0.12, 0.08, 0.04, 0.26]]).log()


def _filtered(logits: Tensor, spare: Tensor, order: Tensor) -> Tensor:
    return logits.masked_fill(torch.zeros_like(spare).scatter(-1, order, spare), -torch.inf)


def _top_p(logits: Tensor, p: Tensor, keep: int, before: bool = True, first_only: bool = False) -> Tensor:
    ordered, order = logits.sort(dim=-1, descending=True)
    share = ordered.softmax(-1)
    spare = share.cumsum(-1) - (share if before else 0) >= (p[:1] if first_only else p)[:, None]
    spare[:, :keep] = False
    return _filtered(logits, spare, order)


def _unsorted(logits: Tensor, p: Tensor, keep: int) -> Tensor:
    share = logits.softmax(-1)
    spare = share.cumsum(-1) - share >= p[:, None]
    spare[:, :keep] = False
    return logits.masked_fill(spare, -torch.inf)


def _in_sorted_places(logits: Tensor, p: Tensor, keep: int) -> Tensor:
    ordered, _ = logits.sort(dim=-1, descending=True)
    share = ordered.softmax(-1)
    spare = share.cumsum(-1) - share >= p[:, None]
    spare[:, :keep] = False
    return logits.masked_fill(spare, -torch.inf)


@exercise(
    "sampling/top-p",
    cases=named(
        "logits p keep",
        (_EXACT, torch.tensor([0.7, 0.45]), 1),
        (_EXACT, torch.tensor([0.9, 0.05]), 2),
        (3 * normal(3, 40, seed=1), torch.tensor([0.8, 0.3, 0.95]), 4),
    ),
    mistakes="""
        _top_p(logits, p, keep, before=False)
            The token that crosses the line is gone. Top-p keeps the smallest set that *reaches* p, so what counts is
            the sum of the tokens before it.
        _top_p(logits, p, 0)
            Where one token alone reaches p, too few stay: at least `keep` of each row have to.
        _top_p(logits, p, keep, first_only=True)
            Every row has a p of its own: compare each row's sums with its own number, shape (B, 1).
        _unsorted(logits, p, keep)
            The sums run over the tokens as they stand in the vocabulary. Sort first: the most likely come first.
        _in_sorted_places(logits, p, keep)
            The right number of tokens, in the wrong places: what was found in sorted order has to go back to the
            tokens' own (scatter by the sort's indices).
        _top_p(logits, p, keep).softmax(-1)
            Those are probabilities. The logits are asked for, with minus infinity where a token is removed.
    """,
    hint="For each row: sort, softmax, add up what comes before each token, and compare that with the row's p.",
)
def top_p_rows(logits: Tensor, p: Tensor, keep: int) -> Tensor:
    """Logits (B, V) with minus infinity for what top-p removes; p is (B,), and ``keep`` of each row stay."""
    return _top_p(logits, p, keep)


@exercise(
    "sampling/gumbel",
    cases=named(
        "logits temperature u",
        (2 * normal(64, 6, seed=2), 1.0, torch.rand(64, 6, generator=torch.Generator().manual_seed(3))),
        (2 * normal(64, 6, seed=4), 0.3, torch.rand(64, 6, generator=torch.Generator().manual_seed(5))),
        (2 * normal(8, 6, seed=6), 0.0, torch.rand(8, 6, generator=torch.Generator().manual_seed(7))),
    ),
    mistakes="""
        (logits - (-u.log()).log()).argmax(-1)
            The temperature has no effect here: it divides the logits, and not the noise.
        logits.argmax(-1) if temperature == 0 else (logits / temperature + (-u.log()).log()).argmax(-1)
            The sign of the noise: it is minus the logarithm of minus the logarithm.
        logits.argmax(-1) if temperature == 0 else (logits / temperature + u).argmax(-1)
            Uniform noise gives other probabilities. It has to be Gumbel noise, made of u by two logarithms.
        logits.argmax(-1) if temperature == 0 else (logits / temperature - u.log()).argmax(-1)
            That is one logarithm; Gumbel noise takes two.
        logits.argmax(-1) if temperature == 0 else ((logits / temperature).softmax(-1) - (-u.log()).log()).argmax(-1)
            The noise is added to logits, not to probabilities.
        logits.argmax(-1)
            That is greedy at every temperature.
    """,
    hint="Divide the logits by the temperature, add the noise made of u, take the largest; at 0, greedy.",
)
def gumbel(logits: Tensor, temperature: float, u: Tensor) -> Tensor:
    """Token ids (B,) drawn from softmax(logits / temperature) by Gumbel noise made of uniform ``u`` (B, V)."""
    return logits.argmax(-1) if temperature == 0 else (logits / temperature - (-u.log()).log()).argmax(-1)


@exercise(
    "sampling/penalty",
    cases=named(
        "logits written theta",
        (torch.tensor([[2.0, -1.0, 0.0, -3.0, 1.5]]), torch.tensor([[True, True, True, False, False]]), 1.3),
        (2 * normal(3, 7, seed=8), normal(3, 7, seed=9) > 0, 2.0),
    ),
    mistakes="""
        torch.where(written, logits / theta, logits)
            A negative logit divided by a number above 1 comes nearer to 0: it gets *larger*, and the token likelier.
        torch.where(written, logits * theta, logits)
            Now positive logits grow. Which way is down depends on the sign.
        torch.where(logits < 0, logits * theta, logits / theta)
            Every token is penalised. Only those that the text has are to be.
        torch.where(written, logits - theta, logits)
            That makes written tokens less likely, but it is another penalty (a presence penalty): this one multiplies.
        torch.where(written, torch.where(logits < 0, logits / theta, logits * theta), logits)
            Just the other way round: written tokens get more likely.
    """,
    hint="Look at a written token with a negative logit: does dividing make it smaller?",
)
def penalise(logits: Tensor, written: Tensor, theta: float) -> Tensor:
    """Logits (B, V) in which every token that is in ``written`` (bool, (B, V)) is less likely."""
    return torch.where(written, torch.where(logits < 0, logits * theta, logits / theta), logits)


@exercise(
    "sampling/stop",
    cases=named(
        "pieces stops",
        (["Hel", "lo", " wor", "ld", "!"], ["low", "lo w"]),
        (["a", "b", "END", "c"], ["END"]),
        (["one", " two", " th", "ree, four", " five"], ["three"]),
        (["a stop here", " and", " on"], ["stop"]),
        (["x", "yz", "w"], ["q"]),
        (["to ", "be or", " not"], ["or", "be"]),
    ),
    mistakes="""
        next((i for i, piece in enumerate(pieces, 1) if any(stop in piece for stop in stops)), len(pieces))
            A stop string may be spread over several pieces: search the text so far, not the newest piece.
        next((i for i in range(1, len(pieces) + 1) if "".join(pieces[:i]).endswith(tuple(stops))), len(pieces))
            A stop string may end in the middle of a piece; then the text so far does not end in it, but contains it.
        next((i for i, piece in enumerate(pieces, 1) if piece in stops), len(pieces))
            A piece need not be a stop string: it may hold a part of one, or more than one.
        next((i for i in range(1, len(pieces) + 1) if any(s in "".join(pieces[:i]) for s in stops)), 0)
            Where no stop string comes, all pieces are kept.
        next((i - 1 for i in range(1, len(pieces) + 1) if any(s in "".join(pieces[:i]) for s in stops)), len(pieces))
            One too few: the piece that completes the string has been written, and counts.
    """,
    hint="Join the first n pieces and look whether one of the strings is in them; the smallest such n is asked for.",
)
def pieces_until(pieces: list[str], stops: list[str]) -> int:
    """After how many pieces one of ``stops`` stands in the text; all of them if none does."""
    reached = (n for n in range(1, len(pieces) + 1) if any(stop in "".join(pieces[:n]) for stop in stops))
    return next(reached, len(pieces))
