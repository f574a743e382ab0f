"""Exercises of ``chapters/performance/speculation.ipynb``. Costs are in plain steps."""

import math
from collections.abc import Callable, Sequence

from measured.exercises import exercise, named


def _tokens(histogram: Sequence[int], k: int) -> float:
    """Tokens a round of ``k`` guesses yields, from how many rounds accepted 0, 1, … of more guesses."""
    return 1 + sum(min(n, k) * rounds for n, rounds in enumerate(histogram)) / sum(histogram)


def _chance(histogram: Sequence[int]) -> float:
    """Of the guesses whose predecessors were all accepted, the share that was accepted."""
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
            That is the verifier as it stands. Follow one guess: what was it drawn from? And where does its cache end?
        _verify(logits, draft_logits, guesses, uniforms, top_p, held, q_cut=False)
            q has to be what the draft drew from, and it drew with top-p.
        _verify(logits, draft_logits, guesses, uniforms, top_p, held, behind=2)
            The cache keeps the guess that failed, and the next pass reads it as text.
        _verify(logits, draft_logits, guesses, uniforms, top_p, held, behind=0)
            The pass read the newest token before the guesses: the cache holds it too, and may keep it.
        _verify(logits, draft_logits, guesses, uniforms, top_p, held, p_cut=False, q_cut=False)
            Without top-p on both sides the text has the distribution of plain sampling, not of what was asked for.
        _verify(logits, draft_logits, guesses, uniforms, top_p, held, norm=False)
            What is left sums to the chance of a rejection. To draw from it, make it sum to one.
        _verify(logits, draft_logits, guesses, uniforms, top_p, held, rest=lambda a, b: a)
            After a rejection, drawing from p itself gives too much to what guesses already bring.
        _verify(logits, draft_logits, guesses, uniforms, top_p, held, stops=False)
            A guess after a rejected one was made for another text: the first rejection ends the round.
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


def _read(tokens: float, num_experts: int, top_k: int, used: float, routed: float, shared=True) -> float:
    """Billions of weights that a pass over so many tokens reads; without ``shared``, each token brings its own."""
    distinct = num_experts * (1 - (1 - top_k / num_experts) ** tokens) if shared else top_k * tokens
    return used - routed + routed * min(num_experts, distinct) / top_k


def _pays(num_experts, top_k, used, routed, guess, a, shared=True) -> list[bool]:
    """For 1, 2, … texts, whether a guess for each makes decoding faster; options are usual ways to get it wrong."""
    found = []
    for texts in range(1, 5000):
        one, two = (_read(n, num_experts, top_k, used, routed, shared) for n in (texts, 2 * texts))
        found.append((1 + a) * one > two + guess)
    return found


def _from(pays: Sequence[bool]) -> int:
    return max((n for n, one in enumerate(pays, 1) if not one), default=0) + 1


@exercise(
    "speculation/mixture",
    cases=named(
        "num_experts top_k used routed guess a",
        (256, 8, 36.62, 20.43, 1.61, 0.6),
        (256, 8, 36.62, 20.43, 1.61, 0.8),
        (16, 4, 3.0, 2.0, 0.3, 0.5),
        (128, 8, 3.3, 2.4, 0.2, 0.7),
        (128, 8, 3.3, 2.4, 1.5, 0.8),
        (64, 1, 2.0, 0.2, 1.5, 0.8),
        (60, 4, 2.7, 1.2, 0.4, 0.45),
    ),
    mistakes="""
        next(n for n, one in enumerate(_pays(num_experts, top_k, used, routed, guess, a), 1) if one)
            That is the first batch that pays. A fuller one may not: the cost of a second token rises before it falls.
        _from(_pays(num_experts, top_k, used, routed, 0.0, a))
            The guess has a price as well.
        _from(_pays(num_experts, top_k, used, routed, guess, a, shared=False))
            Tokens share experts: of E, a token misses each with chance 1 - k/E, and N tokens with that to the power N.
        _from(_pays(num_experts, top_k, used, used, guess, a))
            Only the experts' weights grow with the tokens; attention and the head are read once.
        _from(_pays(num_experts, top_k, used, routed, guess, 1.0))
            Not every guess is right: a round yields 1 + a tokens.
    """,
    hint="Reading N tokens: used - routed + routed · distinct / top_k. Compare (1 + a) steps with a round.",
)
def pays_from(num_experts: int, top_k: int, used: float, routed: float, guess: float, a: float) -> int:
    """The smallest batch from which on one guess a text pays in every larger batch too, if passes only read weights.

    ``used``: billions of weights that a token reads, ``routed`` of them in its ``top_k`` of ``num_experts`` experts;
    ``guess``: what a guess reads more, whatever the batch; ``a``: the chance that it is accepted.
    """
    return _from(_pays(num_experts, top_k, used, routed, guess, a))
