"""Exercises of ``chapters/performance/speculation.ipynb``. Costs are in plain steps."""

import math
from collections.abc import Callable, Sequence

from measured.exercises import exercise, named


def _tokens(histogram: Sequence[int], k: int) -> float:
    """Tokens a round of ``k`` guesses yields, from how many rounds accepted 0, 1, … of more guesses."""
    return 1 + sum(min(n, k) * rounds for n, rounds in enumerate(histogram)) / sum(histogram)


def _chance(histogram: Sequence[int]) -> float:
    """Of the guesses behind no failure, the share that was accepted."""
    accepted = sum(n * rounds for n, rounds in enumerate(histogram))
    return accepted / (accepted + sum(histogram[:-1]))


def _best(tokens: Callable[[int], float], costs: Sequence[float]) -> int:
    return max(range(len(costs)), key=lambda k: tokens(k) / costs[k])


def _round_costs(guess_cost: float, pass_cost: Sequence[float]) -> list[float]:
    return [k * guess_cost + cost for k, cost in enumerate(pass_cost)]


@exercise(
    "speculation/choose-k",
    cases=named(
        "histogram guess_cost pass_cost",
        ([10, 10, 60, 15, 5], 0.1, [1.0, 1.02, 1.04, 1.06, 1.08]),
        ([30, 30, 25, 10, 5], 0.05, [1.0, 1.02, 1.05, 1.4, 1.5]),
        ([5, 5, 10, 60, 60, 10, 5], 0.02, [1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3]),
        ([60, 10, 10, 10, 10], 0.3, [1.0, 1.2, 1.25, 1.3, 1.35]),
        ([10, 10, 10, 10, 160], 0.3, [1.0, 1.02, 1.04, 1.06, 1.08]),
        ([20, 10, 10, 10, 50], 0.0, [1.0, 1.3, 1.4, 1.5, 1.6]),
        ([10, 10, 10, 10, 60], 0.05, [1.0, 1.02, 2.0, 2.6, 3.2]),
        ([50, 5, 5, 5, 35], 0.1, [1.0, 1.05, 1.1, 1.15, 1.2]),
    ),
    mistakes="""
        _best(lambda k: _tokens(histogram, k), [1.0] * len(pass_cost))
            More guesses always yield more tokens. Divide by what the round costs.
        _best(lambda k: _tokens(histogram, k), pass_cost)
            The guesses have a price as well: guess_cost for each.
        _best(lambda k: _tokens(histogram, k), [guess_cost + cost for cost in pass_cost])
            guess_cost is the price of one guess, and a round makes k of them.
        _best(lambda k: _tokens(histogram, k) - 1, _round_costs(guess_cost, pass_cost))
            Every pass yields one token of the target's own besides the accepted guesses.
        _best(lambda k: sum(_chance(histogram) ** n for n in range(k + 1)), _round_costs(guess_cost, pass_cost))
            That takes one chance for every place. The histogram says more: how often each place was reached and right.
        _best(lambda k: 1 + sum(histogram[1 : k + 1]) / sum(histogram), _round_costs(guess_cost, pass_cost))
            A place counts in every round that accepted *at least* so many guesses, not exactly so many.
        _best(lambda k: 1 + sum(n * histogram[n] for n in range(k + 1)) / sum(histogram), _round_costs(guess_cost,\
 pass_cost))
            A round that accepted more than k guesses would still have accepted k of them.
    """,
    hint="With k guesses, a round that accepted n accepts min(n, k). Its mean plus one, over k guesses and the pass.",
)
def choose_k(histogram: Sequence[int], guess_cost: float, pass_cost: Sequence[float]) -> int:
    """The number of guesses, 0 to K, that is fastest; ``histogram[n]`` rounds accepted n of their K guesses."""
    return _best(lambda k: _tokens(histogram, k), _round_costs(guess_cost, pass_cost))


def _nucleus(row: Sequence[float], top_p: float) -> list[float]:
    powers = [math.exp(one - max(row)) for one in row]
    kept, total = [0.0] * len(row), 0.0
    for at in sorted(range(len(row)), key=lambda at: -row[at]):
        kept[at] = powers[at] / sum(powers)
        total += kept[at]
        if total >= top_p:
            break
    return [one / total for one in kept]


def _verify(
    logits, draft_logits, guesses, uniforms, top_p, held, p_cut=True, q_cut=True, behind=1,
    rest: Callable = lambda a, b: max(0.0, a - b), norm=True, stops=True,
) -> list[float]:  # fmt: skip
    """The reference and, by its options, the usual ways to get it wrong."""
    p = [_nucleus(row, top_p if p_cut else 1.0) for row in logits]
    q = [_nucleus(row, top_p if q_cut else 1.0) for row in draft_logits]
    stays = [one * q[n][x] < p[n][x] for n, (one, x) in enumerate(zip(uniforms, guesses, strict=True))]
    kept = [*stays, False].index(False) if stops else sum(stays)
    if kept == len(guesses):
        return [held + kept + behind, *p[kept]]
    left = [rest(a, b) for a, b in zip(p[kept], q[kept], strict=True)]
    whole = sum(left) if norm else 1.0
    return [held + kept + behind, *(one / (whole or 1.0) for one in left)]


_TARGET = [[2.0, 1.0, 0.0, -1.0], [0.5, 1.5, -0.5, 0.0], [-1.0, 0.2, 0.9, 0.4]]
_OTHER = [[0.3, 1.2, 0.8, -0.4], [1.1, -0.7, 0.6, 0.2], [0.1, 0.4, -0.2, 1.3]]
_DRAFT, _SURE = [[0.8, 1.4, 0.1, -0.6], [1.6, 0.3, -0.2, 0.9]], [[0.0, 2.1, 0.4, 0.5], [2.4, 0.1, 0.3, -0.2]]


@exercise(
    "speculation/verifier",
    cases=named(
        "logits draft_logits guesses uniforms top_p held",
        (_TARGET, _DRAFT, [1, 0], [0.5, 0.3], 0.8, 7),
        (_TARGET, _DRAFT, [0, 0], [0.9, 0.5], 0.8, 20),
        (_OTHER, _DRAFT, [1, 0], [0.3, 0.75], 0.7, 12),
        (_OTHER, _SURE, [1, 0], [0.3, 0.2], 0.9, 5),
        (_OTHER, _SURE, [3, 0], [0.1, 0.1], 0.9, 5),
        (_OTHER, _DRAFT, [0, 0], [0.6, 0.55], 0.8, 9),
        (_OTHER, _DRAFT, [1, 0], [0.95, 0.7], 0.9, 9),
        (_TARGET, _SURE, [1, 0], [0.2, 0.9], 0.95, 3),
    ),
    tolerance=1e-4,
    mistakes="""
        _verify(logits, draft_logits, guesses, uniforms, top_p, held, q_cut=False, behind=2)
            That is the verifier as it stands. It has two faults: one in what is compared, one in what the cache keeps.
        _verify(logits, draft_logits, guesses, uniforms, top_p, held, q_cut=False)
            One fault is left: q has to be what the draft drew from, and it drew with top-p.
        _verify(logits, draft_logits, guesses, uniforms, top_p, held, behind=2)
            One fault is left: the cache keeps the guess that failed, and the next pass reads it as text.
        _verify(logits, draft_logits, guesses, uniforms, top_p, held, behind=0)
            The pass read the newest token before the guesses: the cache holds it too, and may keep it.
        _verify(logits, draft_logits, guesses, uniforms, top_p, held, p_cut=False, q_cut=False)
            Without top-p on both sides the text has the distribution of plain sampling, not of what was asked for.
        _verify(logits, draft_logits, guesses, uniforms, top_p, held, norm=False)
            What is left sums to the chance of a rejection. To draw from it, make it sum to one.
        _verify(logits, draft_logits, guesses, uniforms, top_p, held, rest=lambda a, b: a)
            After a rejection, drawing from p itself gives too much to what guesses already bring.
        _verify(logits, draft_logits, guesses, uniforms, top_p, held, stops=False)
            A guess behind a rejected one was made for another text: the first rejection ends the round.
    """,
    hint="p and q both with top-p; accept with min(1, p/q), else the residual; the cache keeps what is in the text.",
)
def verifier(
    logits: Sequence[Sequence[float]], draft_logits: Sequence[Sequence[float]], guesses: Sequence[int],
    uniforms: Sequence[float], top_p: float, held: int,
) -> list[float]:  # fmt: skip
    """The length to which the target's cache is cut, then the probabilities from which the next token is drawn.

    ``uniforms`` decide; the draft drew with ``top_p``; the cache held ``held`` tokens before the pass, which read the
    newest token and the guesses.
    """
    return _verify(logits, draft_logits, guesses, uniforms, top_p, held)


def _comes_out(
    p: Sequence[float], q: Sequence[float], checked: Sequence[bool], residual=True, kept=False, drawn=True
) -> list[float]:
    """The first token's distribution; its options are the usual ways to get it wrong."""
    left = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
    failed = sum(max(0.0, b - a) for a, b, look in zip(p, q, checked, strict=True) if look)
    unseen = sum(b for b, look in zip(q, checked, strict=True) if not look)
    again = [one / sum(left) for one in left] if residual and sum(left) else list(p)
    own = [b * (not look) for b, look in zip(q, checked, strict=True)] if kept else [unseen * drawn * a for a in p]
    accepted = [min(a, b) * look for a, b, look in zip(p, q, checked, strict=True)]
    return [a + failed * b + c for a, b, c in zip(accepted, again, own, strict=True)]


_P, _Q = [0.50, 0.30, 0.15, 0.05], [0.20, 0.60, 0.15, 0.05]


@exercise(
    "speculation/scheduler",
    cases=named(
        "p q checked",
        (_P, _Q, [False, True, False, False]),
        (_P, _Q, [True] * 4),
        (_P, _Q, [False] * 4),
        (_P, _Q, [True, False, True, True]),
        ([0.1, 0.2, 0.3, 0.25, 0.15], [0.3, 0.3, 0.2, 0.1, 0.1], [True, False, True, False, True]),
    ),
    mistakes="""
        list(p)
            So it is if all tokens are checked, or none. Else follow each token x: with chance q(x) it is the guess;
            then it is checked, or dropped unseen.
        _comes_out(p, q, checked, residual=False)
            A rejected guess is replaced by a draw from the residual, not from p.
        _comes_out(p, q, checked, kept=True)
            A guess that is not checked is not kept: the pass yields the target's own token, drawn from p.
        _comes_out(p, q, checked, drawn=False)
            Those do not sum to one. A guess that is not checked leaves a plain step: a draw from p.
        [min(a, b) * look for a, b, look in zip(p, q, checked)]
            That is the accepted part alone. Add what a rejection brings, and what a plain step brings.
    """,
    hint="Three ways to a token: guessed, checked and accepted; the draw after a rejection; a plain step.",
)
def scheduled(p: Sequence[float], q: Sequence[float], checked: Sequence[bool]) -> list[float]:
    """The distribution of the token that comes out if a guess x, drawn from q, is checked only where ``checked[x]``."""
    return _comes_out(p, q, checked)


def _seen(tokens: Sequence[int], confidences: Sequence[Sequence[float]], ahead: int = 0) -> list[float]:
    """Each guess's confidence given the token before it; ``ahead`` 1 looks at the guess itself."""
    return [row[tokens[n + ahead]] for n, row in enumerate(confidences)]


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


_SHORT, _LONG = [1.0, 1.05, 1.5, 1.52, 1.54], [1.0, 1.4, 1.8, 2.2, 2.6, 3.0]


@exercise(
    "speculation/confidence",
    cases=named(
        "tokens confidences draft_cost pass_cost",
        ([0, 1, 0, 1, 1], [[0.9, 0.3], [0.3, 0.8], [0.7, 0.2], [0.4, 0.6]], 0.2, [1.0, 1.02, 1.05, 1.1, 1.2]),
        ([1, 1, 0, 0, 1], [[0.2, 0.9], [0.1, 0.6], [0.98, 0.5], [0.98, 0.3]], 0.1, _SHORT),
        ([0, 1, 1], [[0.3, 0.9], [0.9, 0.2]], 0.05, [1.0, 1.5, 1.9]),
        ([1, 0, 1, 0, 0, 1], [[0.3, 0.85], [0.8, 0.2], [0.1, 0.7], [0.5, 0.9], [0.4, 0.9]], 0.1, _LONG),
        ([0, 0, 1, 0], [[0.8, 0.5], [0.7, 0.2], [0.9, 0.6]], 1.0, [1.0, 1.4, 1.9, 2.4]),
    ),
    mistakes="""
        _first_fall(_speeds(_seen(tokens, confidences, 1), draft_cost, pass_cost))
            That looks at the guess itself to decide whether it is checked: an unlikely token would come out too seldom
            or too often. Let each confidence see only the token before.
        (lambda speeds: speeds.index(max(speeds)))(_speeds(_seen(tokens, confidences), draft_cost, pass_cost))
            The best of all looks too far: whether a guess is checked would depend on guesses behind it, and the text
            would no longer have the target's distribution. Stop at the first that does not make it faster.
        _first_fall(_speeds(_seen(tokens, confidences), draft_cost, pass_cost, chained=False))
            A guess counts only if those before it are accepted too: multiply the confidences.
        _first_fall(_speeds(_seen(tokens, confidences), 0.0, pass_cost))
            The block has been guessed, and its cost belongs to the round.
        _first_fall(_speeds(_seen(tokens, confidences), draft_cost, pass_cost, each=True))
            The block is guessed whole: checking fewer of its guesses does not make it cheaper.
        _first_fall(_speeds(_seen(tokens, confidences), draft_cost, pass_cost, own=0.0))
            Every pass yields one token of the target's own, also if no guess is checked.
        next((n for n, one in enumerate(_seen(tokens, confidences)) if one < 0.5), len(confidences))
            A fixed threshold knows nothing of what checking costs: on a full server it checks too many.
    """,
    hint="Tokens: 1 + c₁ + c₁c₂ + …. Cost: the block and the pass. Go on while the quotient of the two grows.",
)
def to_check(
    tokens: Sequence[int], confidences: Sequence[Sequence[float]], draft_cost: float, pass_cost: Sequence[float]
) -> int:
    """How many guesses of a block to check: one after another, until one does not make the round faster.

    ``tokens`` are the newest of the text and the guesses; ``confidences[n][y]`` is that of guess n behind a token y.
    """
    return _first_fall(_speeds(_seen(tokens, confidences), draft_cost, pass_cost))
