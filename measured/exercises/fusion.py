"""Exercises of ``chapters/architecture/fusion.ipynb``. Shapes: B sequences, T tokens, H hidden size, n pairs."""

import torch
from torch import Tensor

from measured.exercises import Exercise, Mistake


def gated(x: Tensor, answer: Tensor, alpha: float) -> Tensor:
    """The state of every token after a gated look, (B, T, H); ``alpha`` is the learned number behind the gate."""
    return x + torch.tanh(torch.tensor(alpha)) * answer


def right_choices(scores: Tensor) -> float:
    """Share of pictures for which their own caption has the higher score: (n, 2 pictures, 2 captions) -> 0 to 1."""
    return (scores.argmax(-1) == torch.arange(2)).double().mean().item()


def gain(before: float, after: float) -> tuple[float, float]:
    """What two percentages differ by: percentage points, and per cent of the first."""
    return after - before, 100 * (after - before) / before


def _across_pictures(scores: Tensor) -> float:
    return (scores.argmax(1) == torch.arange(2)).double().mean().item()


def _whole_pairs(scores: Tensor) -> float:
    return (scores.argmax(-1) == torch.arange(2)).all(-1).double().mean().item()


def _lowest(scores: Tensor) -> float:
    return (scores.argmin(-1) == torch.arange(2)).double().mean().item()


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EXERCISES = [
    Exercise(
        name="fusion/gate",
        cases=[
            {"x": _random(2, 3, 4, seed=0), "answer": _random(2, 3, 4, seed=1), "alpha": alpha}
            for alpha in (0.0, 0.5, -1.2)
        ],
        reference=gated,
        mistakes=[
            Mistake(
                lambda x, answer, alpha: x + torch.sigmoid(torch.tensor(alpha)) * answer,
                "A sigmoid is one half at zero: the model would begin with half of an untrained answer added to every "
                "token. The gate has to be shut at zero, and may also turn an answer round: tanh.",
            ),
            Mistake(
                lambda x, answer, alpha: x + alpha * answer,
                "Shut at zero, but without tanh nothing keeps the gate from growing beyond 1.",
            ),
            Mistake(
                lambda x, answer, alpha: torch.tanh(torch.tensor(alpha)) * answer,
                "The token's own state is gone. The answer is added to it.",
            ),
            Mistake(
                lambda x, answer, alpha: (
                    (1 - torch.tanh(torch.tensor(alpha))) * x + torch.tanh(torch.tensor(alpha)) * answer
                ),
                "That mixes: the more of the picture, the less of the text. The text's state stays whole here.",
            ),
            Mistake(
                lambda x, answer, alpha: x + torch.tanh(alpha * answer),
                "The gate is a factor: tanh of alpha, times the answer. You squashed the answer instead.",
            ),
        ],
        hint="The state, plus the answer times tanh of alpha.",
    ),
    Exercise(
        name="fusion/matching",
        cases=[
            {"scores": torch.tensor([[[2.0, 1.0], [2.0, 1.0]], [[0.0, -1.0], [-3.0, -2.0]]])},
            {
                "scores": torch.tensor(
                    [[[-5.0, -9.0], [-2.0, -3.0]], [[-6.0, -7.0], [-9.0, -8.0]], [[0.0, 1.0], [1.0, 2.0]]]
                )
            },
            {"scores": _random(40, 2, 2, seed=2)},
        ],
        reference=right_choices,
        mistakes=[
            Mistake(
                _across_pictures,
                "You chose a picture for each caption. Here each picture chooses a caption: along the last axis.",
            ),
            Mistake(
                _whole_pairs,
                "You count a pair only if both of its choices are right; chance is a quarter then. Count every choice.",
            ),
            Mistake(_lowest, "Higher scores are better: log-probabilities grow towards zero."),
        ],
        hint="For each picture the caption with the higher score; right if it is the picture's own; mean over all.",
    ),
    Exercise(
        name="fusion/gain",
        cases=[(78.0, 92.0), (50.0, 75.0), (80.0, 60.0)],
        reference=gain,
        mistakes=[
            Mistake(
                lambda before, after: (100 * (after - before) / before, after - before),
                "Both numbers are there, in the wrong order: points first, then the relative change.",
            ),
            Mistake(
                lambda before, after: (after - before, 100 * (after - before) / after),
                "A relative change is relative to where it starts from: divide by the first.",
            ),
            Mistake(
                lambda before, after: (after - before, (after - before) / before),
                "Per cent are wanted: times 100.",
            ),
            Mistake(
                lambda before, after: (after - before, 100 * after / before),
                "That is the new value in per cent of the old one. How much was added?",
            ),
            Mistake(
                lambda before, after: (after - before, after - before),
                "Points and per cent are two things: fourteen points are 18 per cent of 78.",
            ),
        ],
        hint="The difference, and 100 times the difference over the first.",
    ),
]
