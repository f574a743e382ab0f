"""Exercises of ``chapters/scenarios/reasoning.ipynb``."""

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from measured.exercises import exercise, named


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


@exercise(
    "reasoning/mended",
    cases=named(
        "new old advantage mask reference beta",
        _batch(0, 4, 5, 0.1),
        _batch(1, 3, 4, 0.0),
        _batch(2, 6, 3, 1.0),
        _batch(3, 2, 7, 0.5),
        _batch(4, 5, 6, 0.02),
    ),
    mistakes="""
        _loss(new, old, advantage, mask, reference, beta, pick=torch.maximum, all_tokens=True, sign=-1)
            All three causes are still there.
        _loss(new, old, advantage, mask, reference, beta, pick=torch.maximum, all_tokens=True)
            Two causes are left. What does the clip do when the ratio is 3 and the advantage positive, and which tokens
            does the mean count?
        _loss(new, old, advantage, mask, reference, beta, pick=torch.maximum, sign=-1)
            Two causes are left. What does the clip do when the ratio is 3 and the advantage positive, and what does the
            KL term weigh by?
        _loss(new, old, advantage, mask, reference, beta, all_tokens=True, sign=-1)
            Two causes are left: which tokens does the mean count, and what does the KL term weigh by?
        _loss(new, old, advantage, mask, reference, beta, pick=torch.maximum)
            One cause is left: with a ratio of 3 and a positive advantage, your loss still pushes. Take the smaller of
            the two gains, so that the clip ends the push and never the way back.
        _loss(new, old, advantage, mask, reference, beta, all_tokens=True)
            One cause is left: tokens behind the end count. They were never judged, and a short answer is diluted by
            them.
        _loss(new, old, advantage, mask, reference, beta, sign=-1)
            One cause is left: the estimate is exp(d) - d - 1 with d = log(reference / new). With the sign turned it
            grows where the *policy* is likelier, and explodes there.
        _loss(new, old, advantage, mask, reference, beta, together=True)
            You take one mean over all tokens of the batch. Here each answer counts alike: mean over its tokens first.
        _loss(new, old, advantage, mask, reference, beta, clip=100.0)
            You left the clip out.
    """,
    tolerance=1e-4,
    hint="min of the two gains; d = reference - new in exp(d) - d - 1; masked mean of each answer, then over answers.",
)
def mended(new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, reference: Tensor, beta: float) -> float:
    """GRPO's loss with a clip of 0.2: (B, T) log-probabilities, (B,) advantages, float (B, T) mask."""
    return _loss(new, old, advantage, mask, reference, beta)


def _drift(new: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    return ((old - new) * mask).sum(1) / mask.sum(1)


def _answers(seed: int, limit: float) -> tuple:
    new, old, advantage, mask, _, _ = _batch(seed, 24, 5, 0.0)
    return new, old, advantage, mask, limit


@exercise(
    "reasoning/mask",
    cases=named(
        "new old advantage mask limit",
        _answers(10, 0.1),
        _answers(11, 0.5),
        _answers(12, 0.0),
        _answers(13, 0.3),
        _answers(14, 0.2),
    ),
    mistakes="""
        (_drift(new, old, mask) <= limit).long().tolist()
            You leave out good answers, too. Only answers with a negative advantage are left out.
        ((advantage >= 0) | (_drift(old, new, mask) <= limit)).long().tolist()
            The sign is turned round: an answer is stale when it has become *rarer*, when old is above new.
        ((advantage >= 0) | (((old - new) * mask).sum(1) <= limit)).long().tolist()
            Take the mean over the answer's tokens, not the sum: long answers would be left out for their length.
        ((advantage >= 0) | ((old - new).mean(1) <= limit)).long().tolist()
            Tokens behind the end count in your mean.
        ((advantage >= 0) | (((old - new).abs() * mask).sum(1) / mask.sum(1) <= limit)).long().tolist()
            You take the distance of each token. Tokens that became likelier make up for those that became rarer.
        ((advantage <= 0) | (_drift(new, old, mask) <= limit)).long().tolist()
            The good answers are left out, and the bad ones kept.
    """,
    hint="Keep an answer if its advantage is not negative, or the masked mean of old - new is at most the limit.",
)
def kept(new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, limit: float) -> list[int]:
    """1 for each of B answers that V3.2's mask keeps, else 0: (B, T) log-probabilities and mask, (B,) advantages."""
    return ((advantage >= 0) | (_drift(new, old, mask) <= limit)).long().tolist()


def _log(reward: str, length: str, telling: str, ratio: str) -> list[tuple[float, ...]]:
    """Every fourth step of a recorded run, in hundredths (of a token: tenths)."""
    columns = [[int(word) / unit for word in text.split()] for text, unit in
               ((reward, 100), (length, 10), (telling, 100), (ratio, 100))]  # fmt: skip
    return list(zip(*columns, strict=True))


def _verdict(log: Sequence, drift: float = 0.15, last: int = 5, solved: float = 0.85, coin: float = 0.35) -> int:
    reward, moved = (fmean(row[n] for row in log[-last:]) for n in (0, 3))
    if moved > drift:
        return 2
    return 0 if reward > solved else 3 if reward < coin else 1


NONE = "0 0 0 0 0 0 0 0 0 0"


@exercise(
    "reasoning/diagnose",
    cases=named(
        "log",
        (
            _log(
                "52 97 95 93 94 97 99 99 98 98", "55 80 80 80 80 80 80 80 80 80", "75 38 38 38 50 25 19 12 38 25", NONE
            ),
        ),
        (
            _log(
                "15 17 16 11 9 14 5 16 4 4",
                "29 58 83 62 65 79 66 62 38 75",
                "44 25 50 19 50 50 25 25 6 31",
                "63 93 54 47 35 44 77 77 40 60",
            ),
        ),
        (_log("46 52 57 46 47 46 49 50 51 50", "39 47 50 60 70 56 62 60 50 63", " ".join(["100"] * 10), NONE),),
        (_log("11 13 9 11 5 12 9 12 10 10", "33 40 53 67 76 78 77 78 78 79", "100 88 81 94 75 81 81 88 75 88", NONE),),
        (
            _log(
                "27 27 68 89 95 99 92 97 93 98",
                "40 45 66 77 80 80 80 80 80 80",
                "56 38 62 31 50 12 44 25 44 25",
                "28 32 20 13 2 1 5 2 3 1",
            ),
        ),
        (
            _log(
                "50 50 46 33 32 39 32 21 8 14",
                "67 77 80 81 84 81 77 79 79 82",
                "88 81 75 50 44 50 44 38 25 25",
                "48 47 41 50 29 45 42 60 45 62",
            ),
        ),
        (_log("54 51 50 47 52 50 48 50 49 45", "24 20 20 20 20 17 14 13 11 10", " ".join(["100"] * 10), NONE),),
        (_log("10 11 7 14 11 11 9 8 9 11", "21 21 22 21 21 23 21 20 20 20", "75 88 62 81 88 81 81 81 75 81", NONE),),
    ),
    mistakes="""
        _verdict(log, drift=9)
            You look at the reward alone. A run at a guess may have nothing to strengthen, or may have been pushed off
            its own answers: the last column tells them apart.
        2 if max(row[3] for row in log) > 0.15 else _verdict(log)
            A sound run with eight steps a batch may start far from its answers, and come back. Look at the later half.
        _verdict(log, coin=0.6)
            Every log at a half or below is "nothing to strengthen" for you. Coins pay every second answer, for ever.
        0 if _verdict(log) == 3 and log[-1][1] > 1.5 * log[0][1] else _verdict(log)
            Longer answers are no learning: look at the reward.
        2 if _verdict(log) == 3 else _verdict(log)
            A run that stays at a guess, with every step on fresh answers, has not gone off its own answers.
    """,
    hint="Later half: a mean |log ratio| above 0.15 is 2; else the reward decides: near 1, near 1/2, near a guess.",
)
def diagnose(log: Sequence[Sequence[float]]) -> int:
    """What a run's log says, from rows of reward, tokens, share of groups with a gradient, mean |log ratio|.

    0: it learns and ends sound. 1: the rewards say nothing (coins). 2: it has gone off its own answers. 3: nothing to
    strengthen is ever drawn.
    """
    return _verdict(log)
