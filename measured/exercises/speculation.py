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


@exercise(
    "speculation/break-even",
    cases=named("guess check", (0.15, 1.05), (0.3, 1.2), (0.02, 1.0), (0.6, 1.5), (0.0, 1.4)),
    mistakes="""
        guess + check
            That is the cost of a round. It yields one token for sure, and one more with the chance that is asked for.
        guess + check - 1 if guess + check <= 2 else 1.0
            Above 1 it never pays; say so with None.
        guess
            A pass over two tokens costs more than one over one.
        check - 1
            The guess has to be paid for as well.
        1 / (guess + check)
            With the chance a, a round yields 1 + a tokens and costs guess + check; plain, each token costs 1.
    """,
    hint="A round costs guess + check and yields 1 + a tokens. Plain decoding takes 1 + a for them. Set the two equal.",
)
def break_even(guess: float, check: float) -> float | None:
    """The acceptance from which one guess a pass pays, in times of a plain step; None where none would do."""
    needed = guess + check - 1
    return needed if needed <= 1 else None


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


def _best(acceptance, guess_cost, pass_cost, tokens: Callable | None = None, last=True) -> int:
    tokens = tokens or (lambda k: sum(acceptance**n for n in range(k + 1)))
    costs = [k * guess_cost + (pass_cost[k] if last else 1.0) for k in range(len(pass_cost))]
    return max(range(len(costs)), key=lambda k: tokens(k) / costs[k])


@exercise(
    "speculation/best-count",
    cases=named(
        "acceptance guess_cost pass_cost",
        (0.8, 0.1, [1.0, 1.02, 1.05, 1.1, 1.3, 1.7, 2.4]),
        (0.55, 0.05, [1.0, 1.3, 1.5, 1.6]),
        (0.6, 0.45, [1.0, 1.2, 1.4, 1.6]),
        (0.95, 0.02, [1.0, 1.4, 1.5, 1.55, 1.6, 1.62]),
        (0.7, 0.25, [1.0, 1.01, 1.02, 1.03, 1.04]),
        (0.5, 0.4, [1.0, 1.3, 1.35, 1.4]),
    ),
    mistakes="""
        _best(acceptance, 0.0, pass_cost)
            Guesses are not free: each costs guess_cost, whether it stays or not.
        _best(acceptance, guess_cost, pass_cost, last=False)
            A pass over more tokens takes longer: use pass_cost.
        _best(acceptance, guess_cost, pass_cost, tokens=lambda k: 1 + k * acceptance)
            A guess behind one that failed is lost too: the second stays with acceptance squared.
        _best(acceptance, guess_cost, pass_cost, tokens=lambda k: sum(acceptance**n for n in range(1, k + 1)))
            The pass yields one token of the model's own besides the guesses that stay.
        len(pass_cost) - 1
            More guesses are not always better: each further one stays less often and costs as much.
        max(1, _best(acceptance, guess_cost, pass_cost))
            Plain decoding may be the fastest: then the answer is 0.
    """,
    hint="For each number of guesses: tokens of a round over its cost. Plain decoding is 0 guesses.",
)
def best_count(acceptance: float, guess_cost: float, pass_cost: Sequence[float]) -> int:
    """The number of guesses with the most tokens a step; 0 is plain decoding."""
    return _best(acceptance, guess_cost, pass_cost)
