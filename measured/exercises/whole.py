"""Exercises of ``chapters/architecture/whole.ipynb``. Shapes: B rows, T tokens; N positions, D documents, S orders."""

import math
from statistics import fmean, linear_regression

import torch
from torch import Tensor

from measured.exercises import exercise, named


def _ids(*shape: int, seed: int, below: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def _information(label: Tensor, chosen: Tensor) -> float:
    """Bits that labels (N,) tell about one of the experts chosen, (N, k)."""
    label = label.unique(return_inverse=True)[1]
    joint = torch.zeros(int(label.max()) + 1, int(chosen.max()) + 1, dtype=torch.float64)
    pairs = label.repeat_interleave(chosen.shape[1]), chosen.flatten()
    joint.index_put_(pairs, torch.ones(len(pairs[0]), dtype=torch.float64), accumulate=True)
    p = joint / joint.sum()
    return (p * (p / (p.sum(0) * p.sum(1, keepdim=True))).log2()).nansum().item()


def _pair(token: Tensor, source: Tensor, chosen: Tensor, at_least: int, more: int = 0) -> float:
    common = token.bincount()[token] >= at_least + more
    return _information((source * (int(token.max()) + 1) + token)[common], chosen[common])


def _drawn(token: Tensor, document: Tensor, sources: Tensor, chosen: Tensor, orders: Tensor, at_least: int) -> list:
    return [_pair(token, sources[order][document], chosen, at_least) for order in orders]


def _corpus(documents: int, sources: int, places: int, tokens: int, experts: int, k: int, at_least: int, seed: int):
    """Documents with a taste for some experts, of a few sources; tokens of which some are rare; four orders."""
    g = torch.Generator().manual_seed(seed)
    document = torch.randint(documents, (places,), generator=g).sort().values
    token = (torch.rand(places, generator=g) ** 2 * tokens).long()
    taste = torch.randn(documents, experts, generator=g)[document] + torch.randn(tokens, experts, generator=g)[token]
    chosen = (taste + torch.randn(places, experts, generator=g)).topk(k).indices
    orders = torch.stack([torch.randperm(documents, generator=g) for _ in range(4)])
    return token, document, torch.arange(documents) % sources, chosen, orders, at_least


@exercise(
    "whole/beyond",
    cases=named(
        "token document sources chosen orders at_least",
        (torch.tensor([0, 0, 1, 1, 0, 0, 1, 2]), torch.arange(8) // 2, torch.tensor([0, 1, 0, 1]),
         torch.tensor([0, 1, 0, 1, 0, 2, 1, 2])[:, None], torch.tensor([[1, 0, 2, 3], [3, 0, 1, 2]]), 3),
        _corpus(9, 3, 120, 12, 6, 2, 1, seed=2),
        _corpus(12, 4, 400, 20, 8, 2, 20, seed=3),
    ),
    tolerance=1e-3,  # who counts in float32 is right as well
    mistakes="""
        _pair(token, sources[document], chosen, at_least)
            That is what token and source tell together. Subtract what the same pairs tell with shuffled sources.
        _pair(token, sources[document], chosen, at_least) - _pair(token, 0 * document, chosen, at_least)
            That is I(token, source) - I(token) as counted. It holds chance as well: subtract the mean over the orders.
        fmean(_drawn(token, document, sources, chosen, orders, at_least))
            That is the chance alone. Subtract it from what the real sources tell.
        _pair(token, sources[document], chosen, 1) - fmean(_drawn(token, document, sources, chosen, orders, 1))
            Rare tokens are still in. Keep the positions whose token occurs at least `at_least` times among all.
        _pair(token, sources[document], chosen, at_least, 1) - fmean(
        _pair(token, sources[order][document], chosen, at_least, 1) for order in orders)
            A token that occurs exactly `at_least` times stays in.
        _pair(token, sources[document], chosen, at_least) - max(
        _drawn(token, document, sources, chosen, orders, at_least))
            You subtract the largest of the shuffles, which a test would use. Chance is their mean.
        _pair(0 * token, sources[document], chosen, 1) - fmean(
        _drawn(0 * token, document, sources, chosen, orders, 1))
            That is what the source tells by itself. Use a label of its own for every pair of token and source.
        0.693147 * beyond(token, document, sources, chosen, orders, at_least)
            That is in nats. A bit is ln 2 = 0.693 nats.
    """,
    hint="A label for each pair: source * 4096 + token. Its information with the real sources, less the mean of those "
    "with sources[order]; I(token) stands in both and cancels. Only positions with a common token count.",
)  # fmt: skip
def beyond(
    token: Tensor, document: Tensor, sources: Tensor, chosen: Tensor, orders: Tensor, at_least: int
) -> float:  # fmt: skip
    """Bits that the source tells beyond the token, above chance, at positions (N,) whose token is common."""
    drawn = _drawn(token, document, sources, chosen, orders, at_least)
    return _pair(token, sources[document], chosen, at_least) - fmean(drawn)


def _parts(rows: Tensor, depth: int) -> list[Tensor]:
    length = rows.shape[1] - depth - 1
    return [rows[:, k : k + length] for k in range(depth + 2)]


def _chain(rows: Tensor, depth: int, reads: int = 1, wanted: int = 1) -> Tensor:
    """Number k reads from place ``reads`` k on, and its targets lie ``wanted`` places behind k."""
    parts = _parts(rows, depth)
    return torch.stack([torch.stack((parts[reads * k], parts[k + wanted])) for k in range(depth + 1)])


@exercise(
    "whole/chain",
    cases=named(
        "rows depth",
        (torch.arange(100, 109)[None], 1),
        (torch.arange(20).view(2, 10), 2),
        (_ids(3, 12, seed=5, below=50), 3),
        (torch.arange(6)[None], 0),
    ),
    mistakes="""
        _chain(rows, depth, reads=0)
            Every module gets the same ids here. Module k reads the token that the one before it predicted: the ids move
            along by one with every module.
        _chain(rows, depth, wanted=0)
            Your targets are what is read. They have to lie one place further.
        _chain(rows, depth + 1)[:-1]
            That is a place fewer than there could be: the last target may be the last token of the row.
        _chain(rows, depth)[1:]
            The decoder itself is missing: it comes first, as number 0.
        _chain(rows, depth).flip(1)
            Ids and targets have changed places.
    """,
    hint="With D modules, B rows of L ids leave T = L - D - 1 places. Number k reads ids from place k on, and its "
    "targets are those from place k + 1 on.",
)
def chain(rows: Tensor, depth: int) -> Tensor:
    """(depth + 1, 2, B, T): ids and targets of the decoder and of ``depth`` prediction modules behind it."""
    return _chain(rows, depth)


def _reached(x: list[float], y: list[float], level: float) -> float:
    """Where the least-squares line through points (x, y) is at ``level``."""
    slope, start = linear_regression(x, y)
    return (level - start) / slope


@exercise(
    "whole/crossing",
    cases=named(
        "tokens bits line",
        ([1.0, 2.0, 4.0, 8.0], [4.0, 2.9, 2.2, 1.6], 1.0),
        ([1.0, 1.5, 2.5], [3.0, 2.8, 2.0], 1.2),
        ([0.8, 1.6, 2.4, 3.2, 4.1], [2.06, 1.84, 1.72, 1.66, 1.61], 1.5),
    ),
    mistakes="""
        _reached(tokens, bits, line)
            That is a straight line in tokens and bits. Take the logarithm of both.
        math.exp(_reached([math.log(x) for x in tokens], bits, line))
            Only the tokens are logarithms here. Take the logarithm of the bits as well, and of the line.
        _reached(tokens, [math.log(y) for y in bits], math.log(line))
            Only the bits are logarithms here. Take the logarithm of the tokens as well.
        _reached([math.log(x) for x in tokens], [math.log(y) for y in bits], math.log(line))
            That is the logarithm of the tokens. Undo it at the end.
        math.exp(_reached([math.log(x) for x in tokens], [math.log(y) for y in bits], line))
            The line is in bits, and your fit in their logarithm.
        math.exp(_reached([math.log(x) for x in tokens[::len(tokens) - 1]],
        [math.log(y) for y in bits[::len(bits) - 1]], math.log(line)))
            That goes through the first and the last point. Fit all of them, by least squares.
        math.exp(_reached([math.log(x) for x in tokens[-2:]], [math.log(y) for y in bits[-2:]], math.log(line)))
            That goes through the last two points. Fit all of them, by least squares.
    """,
    hint="Fit log(bits) = a + b log(tokens) by least squares (numpy.polyfit of degree 1), and solve for the tokens at "
    "which it is log(line).",
)
def crossing(tokens: list[float], bits: list[float], line: float) -> float:
    """Tokens at which a power law, fitted to a learning curve by least squares in logarithms, reaches ``line``."""
    return math.exp(_reached([math.log(x) for x in tokens], [math.log(y) for y in bits], math.log(line)))
