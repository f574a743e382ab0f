"""Exercises of ``chapters/performance/speculation.ipynb``. Costs are in plain steps."""

from collections.abc import Callable, Sequence

from measured.exercises import exercise, named


@exercise(
    "speculation/tokens-per-pass",
    cases=named("acceptance count", (0.8, 4), (0.5, 1), (0.25, 6)),
    mistakes="""
        1 + acceptance * count
            A guess behind one that failed is lost too. The second stays only if the first does, with chance acceptance
            squared, and so on.
        sum(acceptance**power for power in range(1, count + 1))
            The pass yields one token of its own besides the guesses that stay.
        1 / (1 - acceptance)
            That is the limit for endlessly many guesses. Here there are only so many.
        1 + count * acceptance**count
            You counted passes in which all guesses stay. Those in which only the first few do count as well.
    """,
    hint="Add the chances that at least one, at least two, … guesses stay; the pass itself gives one more token.",
)
def tokens_per_pass(acceptance: float, count: int) -> float:
    """Tokens that one checking pass yields on average, if every guess stays with chance ``acceptance``."""
    return sum(acceptance**power for power in range(count + 1))


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


def _residual(p, q, part: Callable = lambda a, b: max(0.0, a - b), stays: Callable = min, norm=True) -> list[float]:
    """The reference and, by its options, the usual ways to get it wrong."""
    rest = [part(a, b) for a, b in zip(p, q, strict=True)]
    whole = sum(rest) if norm else 1.0
    return [sum(stays(a, b) for a, b in zip(p, q, strict=True)), *(one / (whole or 1.0) for one in rest)]


@exercise(
    "speculation/residual",
    cases=named(
        "p q",
        ([0.5, 0.3, 0.2], [0.2, 0.7, 0.1]),
        ([0.1, 0.1, 0.2, 0.6], [0.4, 0.3, 0.2, 0.1]),
        ([0.25, 0.75], [0.5, 0.5]),
    ),
    mistakes="""
        _residual(p, q, norm=False)
            What is left sums to the chance that a guess fails. To draw from it, make it sum to one.
        _residual(p, q, part=lambda a, b: abs(a - b))
            Where the draft gave too much, nothing is missing: those tokens get nothing, not the difference.
        _residual(p, q, part=lambda a, b: max(0.0, b - a))
            That is what the draft gave too much. What it gave too little has to be supplied.
        _residual(p, q, part=lambda a, b: a)
            Drawn from the model itself, the tokens that guesses already bring would come out too often.
        _residual(p, q, stays=lambda a, b: b * a)
            That would be the chance that two independent draws agree. A guess also stays if the model likes it more
            than the draft does.
        _residual(p, q, stays=lambda a, b: min(1.0, a / b) / len(p))
            The chance for one token is min(1, p/q); the draft proposes tokens with probability q, so weigh by that.
    """,
    hint="A guess x is proposed with q(x) and stays with min(1, p(x)/q(x)): together min(p(x), q(x)).",
)
def residual(p: Sequence[float], q: Sequence[float]) -> list[float]:
    """The chance that a guess drawn from ``q`` stays, then the probabilities of the token drawn when it does not."""
    return _residual(p, q)


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
