"""Exercises of ``chapters/scenarios/reasoning.ipynb``."""

import random
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from dslib.scenarios.reasoning import advantages
from measured.exercises import exercise, named


def _rewards(seed: int, groups: int, size: int) -> Tensor:
    return torch.rand(groups * size, generator=torch.Generator().manual_seed(seed)).round(decimals=2)


def _over(rows: Tensor, spread, mean: float = 1.0) -> Tensor:
    """Other deviations than the reference's, and no mean taken away."""
    return ((rows - mean * rows.mean(1, keepdim=True)) / (spread(rows) + 1e-4)).flatten()


@exercise(
    "reasoning/advantages",
    cases=named(
        "rewards size",
        (torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]), 4),
        (_rewards(0, 3, 2), 2),
        (_rewards(1, 2, 5), 5),
        (torch.tensor([1.0, 1.0, 1.0, 0.0, 0.5, 0.25]), 3),
        (_rewards(2, 4, 3), 3),
        (_rewards(2, 4, 3), 4),
    ),
    mistakes="""
        advantages(rewards.view(1, -1)).flatten()
            You compare each answer with all answers of the batch. Then every answer to an easy question looks good.
            Take mean and deviation within each group of `size`.
        advantages(rewards.view(size, -1).T).T.flatten()
            You put answers to different questions into one group: the answers to a question stand one after the other.
        _over(rewards.view(-1, size), lambda r: r.std(1, keepdim=True), mean=0.0)
            There is no baseline. Take the mean of the group away, or all answers that are rewarded at all get likelier.
        advantages(rewards.view(-1, size), scaled=False).flatten()
            That is the difference to the mean only. Divide by the deviation of the group as well.
        _over(rewards.view(-1, size), lambda r: r.std(1, correction=0, keepdim=True))
            Your deviation divides by the number of answers. Divide by one less, as torch's `std` does.
        _over(rewards.view(-1, size), lambda r: r.var(1, keepdim=True))
            You divide by the variance. The deviation is its root.
    """,
    tolerance=1e-3,
    hint="Shape rewards into (questions, size); take each row's mean away; divide by its deviation plus 1e-4.",
)
def group_advantages(rewards: Tensor, size: int) -> Tensor:
    """(B,) rewards, ``size`` answers to each question one after the other -> (B,) advantages."""
    return advantages(rewards.view(-1, size)).flatten()


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


def _asked(seed: int, count: int) -> list[tuple[float, float, int]]:
    """(right at once, right after thinking, tokens more) of some questions."""
    dice = random.Random(seed)
    return [
        (round(dice.uniform(0.05, 0.9), 2), round(dice.uniform(0.2, 1.0), 2), dice.randint(2, 12)) for _ in range(count)
    ]


def _plans(questions: Sequence, budget: int):
    """Expected right answers of every set that the budget pays."""
    for size in range(len(questions) + 1):
        for chosen in combinations(range(len(questions)), size):
            if sum(questions[n][2] for n in chosen) <= budget:
                yield sum(q[n in chosen] for n, q in enumerate(questions))


def _greedy(questions: Sequence, budget: int, order) -> float:
    total = sum(q[0] for q in questions)
    for short, thought, more in sorted(questions, key=order):
        if more <= budget and thought > short:
            budget, total = budget - more, total + thought - short
    return total


@exercise(
    "reasoning/think",
    cases=named(
        "questions budget",
        ([(0.5, 0.9, 10), (0.1, 0.35, 5), (0.1, 0.34, 5)], 10),
        ([(0.9, 0.5, 4), (0.2, 0.6, 4)], 20),
        (_asked(0, 7), 20),
        (_asked(1, 8), 12),
        (_asked(2, 6), 60),
        (_asked(3, 9), 25),
        ([(0.1, 0.4, 3), (0.1, 0.8, 8)], 8),
    ),
    mistakes="""
        _greedy(questions, budget, order=lambda q: q[0] - q[1])
            You let the questions think that gain most. One that gains much may cost more than two that gain a little
            less each.
        _greedy(questions, budget, order=lambda q: (q[0] - q[1]) / q[2])
            You let the questions think that gain most per token. Near the end of the budget that leaves tokens over: a
            dearer one may use them better.
        _greedy(questions, budget, order=lambda q: 0)
            You let them think in the order in which they come, until the budget is used up.
        sum(max(short, thought) for short, thought, more in questions)
            You forgot the budget.
        sum(short for short, thought, more in questions)
            Nobody thinks in your plan.
        sum(sorted(thought for short, thought, more in questions))
            Everybody thinks in your plan, whatever it costs, also where it hurts.
    """,
    tolerance=1e-6,
    hint="Go through every set of questions that the budget pays, and take the one with the most right answers.",
)
def best_plan(questions: Sequence[tuple[float, float, int]], budget: int) -> float:
    """The most answers that can be expected to be right if thinking costs at most ``budget`` tokens more in all."""
    return max(_plans(questions, budget))
