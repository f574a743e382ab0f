"""Exercises of ``chapters/architecture/fusion.ipynb``. Shapes: B sequences, T tokens, H hidden size, n pairs."""

import torch
from torch import Tensor

from measured.exercises import exercise, normal


@exercise(
    "fusion/gate",
    cases=[
        {"x": normal(2, 3, 4, seed=seed), "answer": normal(2, 3, 4, seed=seed + 1), "alpha": alpha}
        for seed, alpha in ((0, 0.0), (2, 0.5), (4, -1.2))
    ],
    mistakes="""
        x + torch.sigmoid(torch.tensor(alpha)) * answer
            A sigmoid is one half at zero: the model would begin with half of an untrained answer added to every token.
            The gate has to be shut at zero, and may also turn an answer round: tanh.
        x + alpha * answer
            Shut at zero, but without tanh nothing keeps the gate from growing beyond 1.
        torch.tanh(torch.tensor(alpha)) * answer
            The token's own state is gone. The answer is added to it.
        (1 - torch.tanh(torch.tensor(alpha))) * x + torch.tanh(torch.tensor(alpha)) * answer
            That mixes: the more of the picture, the less of the text. The text's state stays whole here.
        x + torch.tanh(alpha * answer)
            The gate is a factor: tanh of alpha, times the answer. You squashed the answer instead.
    """,
    hint="The state, plus the answer times tanh of alpha.",
)
def gated(x: Tensor, answer: Tensor, alpha: float) -> Tensor:
    """The state of every token after a gated look, (B, T, H); ``alpha`` is the learned number behind the gate."""
    return x + torch.tanh(torch.tensor(alpha)) * answer


@exercise(
    "fusion/matching",
    cases=[
        {"scores": torch.tensor([[[2.0, 1.0], [2.0, 1.0]], [[0.0, -1.0], [-3.0, -2.0]]])},
        {
            "scores": torch.tensor(
                [[[-5.0, -9.0], [-2.0, -3.0]], [[-6.0, -7.0], [-9.0, -8.0]], [[0.0, 1.0], [1.0, 2.0]]]
            )
        },
        {"scores": normal(40, 2, 2, seed=2)},
    ],
    mistakes="""
        (scores.argmax(1) == torch.arange(2)).double().mean().item()
            You chose a picture for each caption. Here each picture chooses a caption: along the last axis.
        (scores.argmax(-1) == torch.arange(2)).all(-1).double().mean().item()
            You count a pair only if both of its choices are right; chance is a quarter then. Count every choice.
        (scores.argmin(-1) == torch.arange(2)).double().mean().item()
            Higher scores are better: log-probabilities grow towards zero.
    """,
    hint="For each picture the caption with the higher score; right if it is the picture's own; mean over all.",
)
def right_choices(scores: Tensor) -> float:
    """Share of pictures for which their own caption has the higher score: (n, 2 pictures, 2 captions) -> 0 to 1."""
    return (scores.argmax(-1) == torch.arange(2)).double().mean().item()


@exercise(
    "fusion/gain",
    cases=[(78.0, 92.0), (50.0, 75.0), (80.0, 60.0)],
    mistakes="""
        (100 * (after - before) / before, after - before)
            Both numbers are there, in the wrong order: points first, then the relative change.
        (after - before, 100 * (after - before) / after)
            A relative change is relative to where it starts from: divide by the first.
        (after - before, (after - before) / before)
            Per cent are wanted: times 100.
        (after - before, 100 * after / before)
            That is the new value in per cent of the old one. How much was added?
        (after - before, after - before)
            Points and per cent are two things: fourteen points are 18 per cent of 78.
    """,
    hint="The difference, and 100 times the difference over the first.",
)
def gain(before: float, after: float) -> tuple[float, float]:
    """What two percentages differ by: percentage points, and per cent of the first."""
    return after - before, 100 * (after - before) / before
