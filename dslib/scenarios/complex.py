"""What helps on hard tasks without another training: several answers instead of one, and which tokens may be drawn.

A model is asked n times, and c of its answers are right. How good is a system that asks k times? That depends on who
picks one of the k answers::

    a checker   pass@k = 1 - C(n - c, k) / C(n, k)                    all subsets of k, less those without a right one
    a score     sum over ranks r: right[r] C(n - r, k - 1) / C(n, k)  the answer of rank r is the best of a subset
    a vote      right where the right answer is the most frequent     nobody looks into the answers at all

Each is the mean over *every* subset of k of the n answers, so it has no bias and wastes no answer. The number of
problems is what an interval is of; more answers to the same problem do not replace another problem.

Book: ``chapters/scenarios/complex.ipynb``. Sources: Codex (arXiv 2107.03374, section 2.1) for pass@k,
self-consistency (arXiv 2203.11171), Holtzman et al. (arXiv 1904.09751) and min-p (arXiv 2407.01082) for truncation, Li
et al. (arXiv 1510.03055) for distinct-n. The rules that cut a distribution are those of
:class:`~dslib.architecture.generation.Sampling`; here they are only looked at.
"""

import ctypes
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from math import comb
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dslib.architecture.generation import Sampling
from dslib.check import above, between, whole
from dslib.performance.statistics import Mean, mean_interval


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of n answers, drawn without replacement, hold a right one if ``right`` of the n are right.

    Raises ValueError for k above n: from n answers nothing is known about more.
    """
    _counts(n, right, k)
    return 1 - comb(n - right, k) / comb(n, k)  # comb is 0 where fewer than k are wrong


def best_of(right: Sequence[bool], scores: Sequence[float], k: int) -> float:
    """The chance that the answer with the highest score, of k drawn from all n, is right; ties are settled by lot.

    With the truth as the score this is :func:`pass_at_k`, with equal scores the share of right answers.
    """
    if len(right) != len(scores):
        raise ValueError(f"scores: got {len(scores)}, expected {len(right)}, one for each answer")
    between(float("-inf"), float("inf"), **{f"scores[{number}]": value for number, value in enumerate(scores)})
    n, before, found = len(right), 0, 0.0
    _counts(n, sum(map(bool, right)), k)
    for score in sorted(set(scores), reverse=True):
        tied = [bool(one) for one, value in zip(right, scores, strict=True) if value == score]
        below = n - before - len(tied)
        # The best of k has this score: all k are at or below it, and not all below.
        chance = (comb(below + len(tied), k) - comb(below, k)) / comb(n, k)
        found += chance * sum(tied) / len(tied)
        before += len(tied)
    return found


def vote(answers: Sequence[Hashable], truth: Hashable, k: int) -> float:
    """The chance that k of n answers, drawn without replacement, name the truth most often; ties are settled by lot.

    None is an answer that could not be read: it takes a place among the k and has no vote. Where nobody has one, the
    vote is lost. Exact, by counting subsets with so many votes for the truth and so many other answers level with it.
    """
    _hashable(answers)
    if truth is None:
        raise ValueError("truth: got None, expected an answer; None stands for one that could not be read")
    sizes = Counter(answers)
    silent, mine, n = sizes.pop(None, 0), sizes.pop(truth, 0), len(answers)
    _counts(n, mine, k)
    won = 0.0
    for votes in range(1, min(mine, k) + 1):
        hands = {(votes, 0): comb(mine, votes)}  # (answers taken, others with as many votes) -> ways
        for size in sizes.values():
            hands = _taken(hands, size, min(votes, k), k, level=votes)
        hands = _taken(hands, silent, k, k)
        won += sum(ways / (1 + ties) for (taken, ties), ways in hands.items() if taken == k)
    return won / comb(n, k)


def majority(answers: Iterable[Hashable]) -> Hashable | None:
    """The answer named most often, the earliest of those that are level; None where nothing could be read (None)."""
    answers = list(answers)
    _hashable(answers)
    votes = Counter(answer for answer in answers if answer is not None)  # keeps the order in which they came
    return max(votes, key=votes.__getitem__) if votes else None


def condorcet(p: float, voters: int) -> float:
    """The chance that a majority of ``voters`` is right if each is, on its own, with probability p; two answers.

    A tie is settled by lot, so an even number is as good as the odd one before it. Above p = 1/2 it rises to 1, below
    it falls to 0, and at 1/2 it stays: a vote cannot lift a coin.
    """
    between(0, 1, p=p)
    whole(1, voters=voters)
    exactly = [comb(voters, i) * p**i * (1 - p) ** (voters - i) for i in range(voters + 1)]
    tie = exactly[voters // 2] / 2 if voters % 2 == 0 else 0.0
    return min(1.0, sum(exactly[voters // 2 + 1 :]) + tie)


def over_problems(values: Iterable[float]) -> Mean:
    """The mean over problems of one of the figures above, with its 95 % interval, which stays within 0 to 1."""
    found = mean_interval(values)
    return Mean(found.value, max(0.0, found.low), min(1.0, found.high), found.n)


class Verdict(NamedTuple):
    """Of a checker: ``right``, or what went wrong with the checker itself, which is no verdict on the answer."""

    right: bool
    fault: str | None = None


def judge(checker: Callable[[Any], bool], answer: Any, seconds: float = 2.0) -> Verdict:
    """Ask a checker, which may raise or never come back: an answer that breaks it does not count as right.

    It runs in a thread of its own and is stopped after so many seconds, at its next line of Python. A call that never
    returns to Python (in a C library, or to the system) is left behind. Code from strangers needs a sandbox besides.
    """
    above(0, seconds=seconds)
    said: list[Verdict] = []

    def ask() -> None:
        try:
            found = checker(answer)
            plain = found.item() if getattr(found, "shape", None) == () else found
            wrong_kind = None if isinstance(plain, bool) else f"gave {found!r:.60}, expected True or False"
            said.append(Verdict(plain is True, wrong_kind))
        except (Exception, SystemExit) as error:  # a checker may raise anything
            said.append(Verdict(False, f"{type(error).__name__}: {error}"))

    asked = threading.Thread(target=ask, name="checker", daemon=True)
    asked.start()
    asked.join(seconds)
    if asked.is_alive():  # SystemExit is none of the errors that checkers catch, and ends a thread without a word
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(asked.ident), ctypes.py_object(SystemExit))
    return said[0] if said else Verdict(False, f"no verdict within {seconds:g} s")


# ---------------------------------------------------------------- what a rule leaves of a distribution


class Kept(NamedTuple):
    """Of B steps, (B,) each: the ``mass`` that the model itself gave to what stays, and the ``count`` of tokens."""

    mass: Tensor
    count: Tensor


def stays(logits: Tensor, rules: Sequence[Sampling]) -> Tensor:
    """Which tokens may be drawn after these rules, one after the other: (B, V) logits -> bool (B, V).

    Each rule sees what the one before has left, shared out anew, as in an engine; a temperature is a rule like others.
    So ``[Sampling(1, top_k=40), Sampling(1, top_p=0.95)]`` and the reverse are the two orders of the same settings.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected (steps, vocabulary)")
    if not rules:
        raise ValueError("rules: got none, expected at least one Sampling")
    for rule in rules:
        logits = rule.probabilities(logits).log()  # a token that is out has a logarithm of minus infinity
    return logits > -torch.inf


def kept(logits: Tensor, rules: Sequence[Sampling]) -> Kept:
    """What these rules leave, in order, of the model's own distribution: (B, V) -> mass and count, (B,) each."""
    left = stays(logits, rules)
    return Kept((logits.float().softmax(-1) * left).sum(-1), left.sum(-1))


# ---------------------------------------------------------------- what a text repeats


def distinct(ids: Sequence[int], n: int = 2) -> float:
    """Distinct-n: of a text's runs of n tokens, the share that differ. 1: nothing comes twice.

    It falls with length in any text, so compare texts of equal length. Raises ValueError for a text shorter than n.
    """
    whole(1, n=n)
    if len(ids) < n:
        raise ValueError(f"ids: got {len(ids)} tokens, expected at least n={n}")
    runs = [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
    return len(set(runs)) / len(runs)


def loop(ids: Sequence[int], rounds: int = 3) -> int | None:
    """The length of the circle in which a text ends: its last tokens are the same piece ``rounds`` times; or None."""
    whole(2, rounds=rounds)
    ids = list(ids)
    for length in range(1, len(ids) // rounds + 1):
        if ids[-length * rounds :] == ids[-length:] * rounds:
            return length
    return None


# ---------------------------------------------------------------- checks, and subsets of answers


def _counts(n: int, right: int, k: int) -> None:
    whole(1, n=n, k=k)
    whole(0, right=right)
    for name, value in (("right", right), ("k", k)):
        if value > n:
            raise ValueError(f"{name}: got {value}, expected at most {n}, the number of answers")


def _hashable(answers: Sequence[Hashable]) -> None:
    for number, answer in enumerate(answers):
        if not isinstance(answer, Hashable):
            raise ValueError(f"answers[{number}]: got {answer!r:.60}, expected text or a number, which can be compared")


def _taken(hands: dict, size: int, most: int, k: int, level: int | None = None) -> Counter:
    """These subsets, each with up to ``most`` of ``size`` equal answers more; ``level`` of them make another tie."""
    grown: Counter = Counter()
    for (taken, ties), ways in hands.items():
        for more in range(min(size, most, k - taken) + 1):
            grown[taken + more, ties + (more == level)] += ways * comb(size, more)
    return grown
