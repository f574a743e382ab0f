"""Exercises of ``chapters/performance/speculation.ipynb``. Costs are in plain steps."""

import math
from collections.abc import Callable, Sequence

from measured.exercises import exercise, named


@exercise(
    "speculation/tokens-per-round",
    cases=named("acceptance count empty", (0.8, 4, 0.25), (0.5, 1, 0.6), (0.25, 6, 0.1), (0.7, 2, 0.5)),
    mistakes="""
        sum(acceptance**power for power in range(count + 1))
            In a share of the rounds nothing is guessed: they yield one token, the model's own.
        (1 - empty) * sum(acceptance**power for power in range(count + 1))
            A round without a guess is a plain step, and a plain step yields one token, not none.
        1 + (1 - empty) * acceptance * count
            A guess behind one that failed is lost too. The second stays only if the first does, with chance acceptance
            squared, and so on.
        (1 - empty) * sum(acceptance**power for power in range(1, count + 1))
            Every pass yields one token of its own besides the guesses that stay.
        sum(((1 - empty) * acceptance)**power for power in range(count + 1))
            A round is empty once, not once for each guess: inside a round with guesses the chance is acceptance.
    """,
    hint="Two kinds of rounds: the empty ones yield 1 token, the others 1 + a + a² + …. Weigh them by their shares.",
)
def tokens_per_round(acceptance: float, count: int, empty: float) -> float:
    """Tokens a round yields on average, if a share ``empty`` of the rounds has no guess and the others ``count``."""
    return 1 + (1 - empty) * sum(acceptance**power for power in range(1, count + 1))


def _fitted(lengths: Sequence[int], k: int) -> float:
    """The chance for which 1 + a + … + a^k is the mean number of tokens."""
    low, high, tokens = 0.0, 1.0, 1 + sum(lengths) / len(lengths)
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**n for n in range(k + 1)) < tokens else (low, middle)
    return high


@exercise(
    "speculation/acceptance",
    cases=named(
        "lengths k", ([2, 2, 1, 2, 0, 3, 3, 3, 3, 3], 3), ([0, 1, 0, 0, 1], 1), ([1, 0, 2, 1], 4), ([2, 2, 2], 2),
        ([4, 4, 2, 0, 1, 4], 4), ([4, 4, 2, 0, 1, 4], 6), ([0, 0], 5),
    ),
    mistakes="""
        sum(lengths) / (k * len(lengths))
            That is accepted ÷ proposed. It also counts the guesses behind a failure, which no pass has looked at.
        sum(lengths) / (sum(lengths) + len(lengths))
            A round in which all k were accepted has no failure.
        sum(n > 0 for n in lengths) / len(lengths)
            That looks at the first guess of each round. Others count as well, where those before them were accepted.
        _fitted(lengths, k)
            That fits the formula to the mean, which is right only if the chance is the same at every place. Count.
        sum(n == k for n in lengths) / len(lengths)
            That is the share of the rounds without a failure. Count guesses.
        1 + sum(lengths) / len(lengths)
            Those are tokens a round. A chance lies between 0 and 1.
    """,
    hint="Count the guesses that were looked at: those accepted, and in a round that failed the one that failed.",
)  # fmt: skip
def accepted_chance(lengths: Sequence[int], k: int) -> float:
    """The chance that a guess is accepted if those before it were, from how many each round of ``k`` accepted."""
    failures = sum(n < k for n in lengths)
    return sum(lengths) / (sum(lengths) + failures)


def _softmax(row: Sequence[float], temperature: float) -> list[float]:
    powers = [math.exp((one - max(row)) / temperature) for one in row]
    return [one / sum(powers) for one in powers]


def _verify(
    logits, draft_logits, guesses, uniforms, temperature, draft: float | None = None,
    rest: Callable = lambda a, b: max(0.0, a - b), norm=True, stops=True, upside_down=False,
) -> list[float]:  # fmt: skip
    """The reference and, by its options, the usual ways to get it wrong."""
    p = [_softmax(row, temperature) for row in logits]
    q = [_softmax(row, draft or temperature) for row in draft_logits]
    chances = [(q[n][x] / p[n][x]) if upside_down else (p[n][x] / q[n][x]) for n, x in enumerate(guesses)]
    stays = [uniform < chance for uniform, chance in zip(uniforms, chances, strict=True)]
    kept = [*stays, False].index(False) if stops else sum(stays)
    if kept == len(guesses):
        return [kept, *p[kept]]
    left = [rest(a, b) for a, b in zip(p[kept], q[kept], strict=True)]
    whole = sum(left) if norm else 1.0
    return [kept, *(one / (whole or 1.0) for one in left)]


_TARGET = [[2.0, 1.0, 0.0, -1.0], [0.5, 1.5, -0.5, 0.0], [-1.0, 0.2, 0.9, 0.4]]
_OTHER = [[0.3, 1.2, 0.8, -0.4], [1.1, -0.7, 0.6, 0.2], [0.1, 0.4, -0.2, 1.3]]
_DRAFT, _SURE = [[0.8, 1.4, 0.1, -0.6], [1.6, 0.3, -0.2, 0.9]], [[0.0, 2.1, 0.4, 0.5], [2.4, 0.1, 0.3, -0.2]]


@exercise(
    "speculation/verifier",
    cases=named(
        "logits draft_logits guesses uniforms temperature",
        (_TARGET, _DRAFT, [0, 0], [0.9, 0.18], 0.5),
        (_TARGET, _SURE, [1, 1], [0.7, 0.2], 0.6),
        (_OTHER, _DRAFT, [1, 0], [0.3, 0.75], 2.0),
        (_OTHER, _SURE, [2, 0], [0.5, 0.6], 1.5),
        (_OTHER, _SURE, [2, 0], [0.5, 0.8], 1.5),
    ),
    mistakes="""
        _verify(logits, draft_logits, guesses, uniforms, temperature, draft=1.0, rest=lambda a, b: a)
            That is the verifier as it stands. It has two faults: one in what is compared, one in what is drawn.
        _verify(logits, draft_logits, guesses, uniforms, temperature, rest=lambda a, b: a)
            One fault is left: after a rejection, drawing from p itself gives too much to what guesses already bring.
        _verify(logits, draft_logits, guesses, uniforms, temperature, draft=1.0)
            One fault is left: q has to be what the draft drew from, and it drew at this temperature.
        _verify(logits, draft_logits, guesses, uniforms, temperature, norm=False)
            What is left sums to the chance of a rejection. To draw from it, make it sum to one.
        _verify(logits, draft_logits, guesses, uniforms, temperature, rest=lambda a, b: abs(a - b))
            Where the draft gave too much nothing is missing: those tokens get 0, not the difference.
        _verify(logits, draft_logits, guesses, uniforms, temperature, rest=lambda a, b: max(0.0, b - a))
            That is what the draft gave too much. What it gave too little has to be supplied.
        _verify(logits, draft_logits, guesses, uniforms, temperature, stops=False)
            A guess behind a rejected one was made for another text: the first rejection ends the round.
        _verify(logits, draft_logits, guesses, uniforms, temperature, upside_down=True)
            The guess stays with chance p over q: the more the model likes it, the better.
    """,
    hint="For each guess: both distributions at the temperature, stay with min(1, p/q), else the residual, then stop.",
)
def verifier(
    logits: Sequence[Sequence[float]], draft_logits: Sequence[Sequence[float]], guesses: Sequence[int],
    uniforms: Sequence[float], temperature: float,
) -> list[float]:  # fmt: skip
    """How many guesses stay, then the probabilities from which the token behind them is drawn.

    ``uniforms`` are the random numbers between 0 and 1 that decide; the draft drew its guesses at ``temperature``.
    """
    return _verify(logits, draft_logits, guesses, uniforms, temperature)


def _speeds(
    confidences: Sequence[float], draft_cost: float, pass_cost: Sequence[float], chained=True, own=1.0, each=False
) -> list[float]:
    """Tokens a step for 0, 1, … checked guesses; its options are the usual ways to get it wrong."""
    tokens, alive, found = own, 1.0, []
    for n, cost in enumerate(pass_cost[: len(confidences) + 1]):
        if n:
            alive = confidences[n - 1] * (alive if chained else 1.0)
            tokens += alive
        found.append(tokens / (cost + draft_cost * (n / len(confidences) if each else 1.0)))
    return found


def _first_fall(speeds: Sequence[float]) -> int:
    return next((n for n in range(len(speeds) - 1) if speeds[n + 1] <= speeds[n]), len(speeds) - 1)


@exercise(
    "speculation/confidence",
    cases=named(
        "confidences draft_cost pass_cost",
        ([0.9, 0.8, 0.7, 0.6], 0.2, [1.0, 1.02, 1.05, 1.1, 1.2]),
        ([0.9, 0.6, 0.98, 0.98], 0.1, [1.0, 1.05, 1.5, 1.52, 1.54]),
        ([0.3, 0.2], 0.05, [1.0, 1.5, 1.9]),
        ([0.85, 0.8, 0.7, 0.5, 0.4], 0.1, [1.0, 1.4, 1.8, 2.2, 2.6, 3.0]),
        ([0.8, 0.7, 0.6], 1.0, [1.0, 1.4, 1.9, 2.4]),
    ),
    mistakes="""
        (lambda speeds: speeds.index(max(speeds)))(_speeds(confidences, draft_cost, pass_cost))
            The best of all looks too far: whether a guess is checked would depend on guesses behind it, and the text
            would no longer have the target's distribution. Stop at the first that does not make it faster.
        _first_fall(_speeds(confidences, draft_cost, pass_cost, chained=False))
            A guess counts only if those before it are accepted too: multiply the confidences.
        _first_fall(_speeds(confidences, 0.0, pass_cost))
            The block has been guessed, and its cost belongs to the round.
        _first_fall(_speeds(confidences, draft_cost, pass_cost, each=True))
            The block is guessed whole: checking fewer of its guesses does not make it cheaper.
        _first_fall(_speeds(confidences, draft_cost, pass_cost, own=0.0))
            Every pass yields one token of the target's own, also if no guess is checked.
        next((n for n, one in enumerate(confidences) if one < 0.5), len(confidences))
            A fixed threshold knows nothing of what checking costs: on a full server it checks too many.
    """,
    hint="Tokens: 1 + c₁ + c₁c₂ + …. Cost: the block and the pass. Go on while the quotient of the two grows.",
)
def to_check(confidences: Sequence[float], draft_cost: float, pass_cost: Sequence[float]) -> int:
    """How many guesses of a block to check: one after another, until one does not make the round faster."""
    return _first_fall(_speeds(confidences, draft_cost, pass_cost))
