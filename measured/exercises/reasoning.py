"""Exercises of ``chapters/scenarios/reasoning.ipynb``."""

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from measured.exercises import exercise, named, normal


def _smallest(chances: Sequence[float], wanted: float, differ) -> int:
    """The smallest group that reaches ``wanted``, by any rule for how often a group of some size differs."""
    sizes = range(2, 1025)
    return next((size for size in sizes if sum(differ(q, size) for q in chances) / len(chances) >= wanted), 0)


@exercise(
    "reasoning/group-size",
    cases=named(
        "chances wanted",
        ([0.5], 0.9),
        ([0.1, 0.9], 0.8),
        ([0.02, 0.3, 0.7, 0.98], 0.75),
        ([0.0, 0.2, 0.6], 0.6),
        ([0.01, 0.99, 0.5, 0.5, 0.9], 0.9),
        ([0.0, 1.0, 0.4], 0.5),
        ([0.05, 0.2, 0.1], 0.85),
    ),
    mistakes="""
        _smallest([sum(chances) / len(chances)], wanted, lambda q, size: 1 - q**size - (1 - q) ** size)
            You took the mean of the chances first. One question that is always solved and one that never is have a mean
            of a half, and neither ever has a gradient: average what each question gives.
        _smallest(chances, wanted, lambda q, size: 1 - (1 - q) ** size)
            That counts groups with a right answer (pass@k). A group in which *all* are right has no gradient either.
        _smallest(chances, wanted, lambda q, size: 1 - q**size)
            That counts groups with a wrong answer. A group in which *all* are wrong has no gradient either.
        _smallest([min(chances, key=lambda q: q * (1 - q))], wanted, lambda q, size: 1 - q**size - (1 - q) ** size)
            You ask it of the hardest (or easiest) question. Wanted is the share over all questions.
        _smallest(chances, wanted, lambda q, size: 1 - q ** (size - 1) - (1 - q) ** (size - 1))
            One answer too many. A group of G is all right with a chance of q to the power of G.
        _smallest(chances, wanted, lambda q, size: 4 * q * (1 - q) * (1 - 0.5 ** (size - 1)))
            q(1-q) is how hard a group pushes, not how often its answers differ.
    """,
    hint="A group of G is all right with chance q**G, all wrong with (1-q)**G; else it differs. Mean over questions.",
)
def group_size(chances: Sequence[float], wanted: float) -> int:
    """The smallest group, 2 to 1,024 answers, whose rewards differ for a share of ``wanted`` of the questions; else 0.

    ``chances``: how often an answer to each question is right.
    """
    return _smallest(chances, wanted, lambda q, size: 1 - q**size - (1 - q) ** size)


def _loss(
    new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, reference: Tensor, beta: float, pick=torch.minimum,
    all_tokens: bool = False, sign: int = 1, clip: float = 0.2, together: bool = False,
) -> float:  # fmt: skip
    """The reference and, by its options, the planted causes."""
    ratio, signal = (new - old).exp(), advantage.unsqueeze(1)
    gain = pick(ratio * signal, ratio.clamp(1 - clip, 1 + clip) * signal)
    away = sign * (reference - new)
    each = -gain + beta * (away.exp() - away - 1)
    counts = torch.ones_like(mask) if all_tokens else mask
    if together:
        return ((each * counts).sum() / counts.sum()).item()
    return ((each * counts).sum(1) / counts.sum(1)).mean().item()


def _batch(seed: int, rows: int, tokens: int, beta: float) -> tuple:
    draw = torch.Generator().manual_seed(seed)
    new, old, reference = (-torch.rand(rows, tokens, generator=draw) * 2 for _ in range(3))
    lengths = torch.randint(1, tokens + 1, (rows,), generator=draw)
    mask = torch.arange(tokens) < lengths.unsqueeze(1)
    return new, old, torch.randn(rows, generator=draw), mask.float(), reference, beta


def _faulty(new, old, advantage, mask, reference, beta, fault: int = 0, **rule) -> float:
    """The loss with the faults whose codes (1 maximum, 2 all tokens, 4 the sign of the KL term) sum to ``fault``."""
    pick = torch.maximum if fault & 1 else torch.minimum
    rule = {"all_tokens": bool(fault & 2), "sign": -1 if fault & 4 else 1, **rule}
    return _loss(new, old, advantage, mask, reference, beta, pick, **rule)


def _nearest(new, old, advantage, mask, reference, beta, value, codes: Sequence[int] = range(8), **rule) -> int:
    return min(codes, key=lambda n: abs(_faulty(new, old, advantage, mask, reference, beta, n, **rule) - value))


def _returned(seed: int, rows: int, tokens: int, beta: float, fault: int) -> tuple:
    batch = _batch(seed, rows, tokens, beta)
    return *batch, _faulty(*batch, fault)


@exercise(
    "reasoning/faults",
    cases=named(
        "new old advantage mask reference beta value",
        _returned(0, 4, 5, 0.1, 3),
        _returned(1, 3, 4, 0.4, 0),
        _returned(2, 6, 3, 1.0, 6),
        _returned(3, 2, 7, 0.5, 1),
        _returned(4, 5, 6, 0.2, 7),
        _returned(5, 4, 4, 0.3, 2),
        _returned(6, 5, 5, 0.7, 4),
        _returned(7, 6, 6, 0.6, 5),
    ),
    mistakes="""
        _nearest(new, old, advantage, mask, reference, beta, value, codes=(0, 1, 2, 4))
            You look for one fault at a time. A loss may have several: try all eight combinations.
        _nearest(new, old, advantage, mask, reference, beta, value, codes=(1, 2, 4))
            You look for one fault at a time, and a loss may have several, or none.
        _nearest(new, old, advantage, mask, reference, beta, value, codes=range(1, 8))
            A loss may have no fault: then return 0.
        _nearest(new, old, advantage, mask, reference, beta, value, together=True)
            You take one mean over all tokens of the batch. Here each answer counts alike: mean over its tokens first.
        _nearest(new, old, advantage, mask, reference, beta, value, clip=100.0)
            You left the clip out.
        7 - _nearest(new, old, advantage, mask, reference, beta, value)
            Sum the codes of the faults that are there, not of the parts that are sound.
        bin(_nearest(new, old, advantage, mask, reference, beta, value)).count("1")
            That is how many faults there are. Sum their codes.
    """,
    hint="Write the loss with a switch for each fault, try the eight combinations, return the code of the nearest.",
)
def faults(
    new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, reference: Tensor, beta: float, value: float
) -> int:
    """Which faults a loss has that returned ``value``: 1 maximum for minimum, 2 no mask, 4 the KL term's sign; summed.

    The clip is 0.2; (B, T) log-probabilities, (B,) advantages, float (B, T) mask, each answer counts alike.
    """
    return _nearest(new, old, advantage, mask, reference, beta, value)


def _allowed(p: Tensor, top_p: float, crossing: bool = True) -> Tensor:
    """bool (B, V): the tokens that top-p leaves; the one that crosses the line is among them."""
    ranked, order = p.sort(dim=1, descending=True)
    reached = ranked.cumsum(1) - (ranked if crossing else 0)
    return torch.zeros_like(p, dtype=torch.bool).scatter(1, order, (reached < top_p) | (order == order[:, :1]))


def _ratios(new: Tensor, old: Tensor, drawn: Sequence[int], mine: Tensor, theirs: Tensor) -> list[float]:
    """Ratios of the drawn tokens, where the policies are shared out among ``mine`` and ``theirs``."""
    a, b = ((p * allowed / (p * allowed).sum(1, keepdim=True)) for p, allowed in ((new, mine), (old, theirs)))
    return [(a[row, token] / b[row, token]).item() for row, token in enumerate(drawn)]


def _drawn(seed: int, rows: int, top_p: float) -> tuple:
    old = normal(rows, 6, seed=seed).softmax(1)
    new = (old.log() + normal(rows, 6, seed=seed + 1)).softmax(1)
    draw = torch.Generator().manual_seed(seed)
    return new, old, _allowed(old, top_p).float().multinomial(1, generator=draw).flatten().tolist(), top_p


@exercise(
    "reasoning/kept",
    cases=named(
        "new old drawn top_p",
        (torch.tensor([[0.3, 0.5, 0.15, 0.05]]), torch.tensor([[0.6, 0.3, 0.07, 0.03]]), [1], 0.8),
        _drawn(20, 4, 0.6),
        _drawn(30, 3, 0.9),
        _drawn(40, 5, 0.7),
        _drawn(50, 4, 0.5),
    ),
    mistakes="""
        _ratios(new, old, drawn, torch.ones_like(new), torch.ones_like(old))
            That is the ratio without `keep`. Divide by the mass of the tokens that could be drawn, now and then.
        _ratios(new, old, drawn, torch.ones_like(new), _allowed(old, top_p))
            Only the old policy is shared out. The new one has to be compared over the same tokens.
        _ratios(new, old, drawn, _allowed(new, top_p), _allowed(old, top_p))
            You cut the new policy by its own top-p. The set is the one that the answers were drawn from: the old one's.
        _ratios(new, old, drawn, _allowed(new, top_p), _allowed(new, top_p))
            You take the set from the new policy. The answers were drawn by the old one.
        _ratios(new, old, drawn, _allowed(old, top_p, crossing=False), _allowed(old, top_p, crossing=False))
            The token with which the mass reaches top_p is among those that can be drawn.
        [1 / one for one in _ratios(new, old, drawn, _allowed(old, top_p), _allowed(old, top_p))]
            The ratio is new over old.
    """,
    tolerance=1e-4,
    hint="Keep a token if the old mass of those before it is below top_p; both policies divide by their mass there.",
)
def kept(new: Tensor, old: Tensor, drawn: Sequence[int], top_p: float) -> list[float]:
    """The importance ratio of each of B drawn tokens, both policies shared out among what the old one's top-p left.

    ``new``, ``old``: probabilities (B, V). ``drawn``: B ids.
    """
    allowed = _allowed(old, top_p)
    return _ratios(new, old, drawn, allowed, allowed)


# Recorded stale runs: right at the end, and mean |log ratio| of every fourth step, in hundredths.
RUNS = (
    (0.09, "63 93 54 47 35 44 77 77 40 60"),
    (0.66, "30 19 37 37 57 23 46 35 7 26"),
    (0.73, "63 43 25 27 14 29 37 27 25 37"),
    (0.09, "39 23 18 26 33 18 25 19 41 24"),
    (0.77, "27 26 24 7 24 17 11 16 11 20"),
    (0.68, "27 20 23 30 24 20 26 10 21 13"),
    (0.72, "42 46 77 27 18 20 31 27 34 26"),
    (0.10, "51 112 55 74 24 16 29 46 21 0"),
    (0.91, "28 31 50 32 45 19 13 14 27 18"),
    (0.81, "55 82 59 52 66 36 68 75 27 10"),
    (0.53, "51 56 40 64 72 29 49 36 31 24"),
    (0.73, "58 56 16 25 33 32 40 27 11 14"),
    (0.10, "40 23 51 42 79 54 36 33 25 28"),
    (0.09, "52 44 44 32 61 55 79 19 21 50"),
    (0.76, "35 12 7 22 27 34 12 34 13 12"),
)


def _seen(*which: int) -> tuple[list[list[float]], list[float]]:
    picked = [RUNS[n] for n in which]
    return [[int(word) / 100 for word in text.split()] for _, text in picked], [end for end, _ in picked]


def _late(log: Sequence[float], last: int | None = None) -> float:
    return fmean(log[-(last or len(log) // 2) :])


def _threshold(
    logs: Sequence, ends: Sequence[float], miss: float, false_alarm: float, late=_late, lost: float = 0.2, side: int = 1
) -> float:
    """The run's mean with the least cost as a threshold, of equal ones the highest (``side`` -1: the lowest)."""
    means = [late(log) for log in logs]

    def cost(line: float) -> float:
        rings = [mean >= line for mean in means]
        pairs = list(zip(rings, (end < lost for end in ends), strict=True))
        return miss * pairs.count((False, True)) + false_alarm * pairs.count((True, False))

    return min(means, key=lambda line: (cost(line), -side * line))


@exercise(
    "reasoning/alarm",
    cases=named(
        "logs ends miss false_alarm",
        (*_seen(*range(15)), 1, 1),
        (*_seen(*range(15)), 10, 1),
        (*_seen(*range(15)), 3, 3),
        (*_seen(*range(15)), 2, 1),
        (*_seen(0, 2, 3, 5, 6, 7, 9, 10), 3, 1),
        (*_seen(1, 3, 4, 7, 8, 11, 12, 14), 1, 4),
        (*_seen(0, 1, 3, 6, 7, 9, 12, 13), 2, 1),
    ),
    mistakes="""
        _threshold(logs, ends, false_alarm, miss)
            The two costs are exchanged: a miss is a lost run for which the monitor stays silent.
        _threshold(logs, ends, 1, 1)
            You count errors. A miss and a false alarm have costs of their own.
        _threshold(logs, ends, miss, false_alarm, late=fmean)
            You take the mean of the whole log. Runs may start far off and come back: the later half counts.
        _threshold(logs, ends, miss, false_alarm, late=lambda log: log[-1])
            You take the last step alone. The mean of the later half counts.
        _threshold(logs, ends, miss, false_alarm, late=max)
            You take the largest value. The mean of the later half counts.
        _threshold(logs, ends, miss, false_alarm, side=-1)
            Of thresholds that cost the same the highest is wanted.
        _threshold(logs, ends, miss, false_alarm, lost=0.7)
            A run is lost below 0.2; one that ends at a half is not.
    """,
    hint="Try each run's late mean as the threshold (it rings at or above it) and sum the costs over all runs.",
)
def alarm(logs: Sequence[Sequence[float]], ends: Sequence[float], miss: float, false_alarm: float) -> float:
    """The threshold of a monitor with the least cost, of the runs' own late means; of equal ones the highest.

    ``logs``: mean |log ratio| by step; the mean over the later half is compared. ``ends``: share right at the end, lost
    below 0.2. ``miss``: what a lost run costs that does not ring, ``false_alarm``: another run that does.
    """
    return _threshold(logs, ends, miss, false_alarm)
