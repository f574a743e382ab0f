"""Every closed form against counting all hands; rules against `Sampling`'s own order; checkers that misbehave."""

import itertools
import math
import threading
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dslib.architecture.generation import Sampling
from dslib.scenarios import complex as hard

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def by_hands(n, k, score):
    """The mean of ``score`` over all hands of k places of n."""
    hands = list(itertools.combinations(range(n), k))
    return float(sum(map(score, hands)) / len(hands))


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_hands_with_a_right_answer(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        wanted = by_hands(n, k, lambda hand, right=right: any(place < right for place in hand))
        assert hard.pass_at_k(n, right, k) == pytest.approx(wanted, abs=1e-12)


def test_pass_at_k_has_no_bias_and_the_usual_estimate_has():
    """Draw n answers from a known chance of success, again and again: the mean is what k fresh answers would give."""
    p, n, k = 0.2, 8, 4
    dice = np.random.default_rng(0)
    right = dice.binomial(n, p, 20_000)
    truth = 1 - (1 - p) ** k
    unbiased = np.mean([hard.pass_at_k(n, int(c), k) for c in right])
    plugged_in = np.mean(1 - (1 - right / n) ** k)
    assert abs(unbiased - truth) < 0.006 < truth - plugged_in


def test_large_numbers_stay_exact():
    assert hard.pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert hard.pass_at_k(400, 0, 7) == 0 and hard.pass_at_k(400, 394, 7) == 1


ANSWERS = st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=1, max_size=8)


@FEW
@given(ANSWERS, st.data())
def test_a_vote_is_what_counting_all_hands_gives(answers, data):
    k = data.draw(st.integers(1, len(answers)))

    def won(hand):
        votes = Counter(answers[place] for place in hand if answers[place] is not None)
        level = [answer for answer, count in votes.items() if count == max(votes.values())]
        return Fraction("a" in level, max(1, len(level)))

    assert hard.vote(answers, "a", k) == pytest.approx(by_hands(len(answers), k, won), abs=1e-12)


@FEW
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=8), st.data())
def test_the_best_of_k_is_what_counting_all_hands_gives(pairs, data):
    right, scores = zip(*pairs, strict=True)
    k = data.draw(st.integers(1, len(right)))

    def best(hand):
        top = [place for place in hand if scores[place] == max(scores[p] for p in hand)]
        return Fraction(sum(right[place] for place in top), len(top))

    found = hard.best_of(right, scores, k)
    assert found == pytest.approx(by_hands(len(right), k, best), abs=1e-12)
    assert hard.best_of(right, list(map(float, right)), k) == pytest.approx(hard.pass_at_k(len(right), sum(right), k))
    assert hard.best_of(right, [1.0] * len(right), k) == pytest.approx(sum(right) / len(right))
    assert found <= hard.pass_at_k(len(right), sum(right), k) + 1e-12, "no score does better than the truth"


def test_one_answer_votes_for_itself_and_the_unreadable_for_nothing():
    assert hard.vote([7, 7, 3, None], 7, 1) == 0.5
    assert hard.vote([None, None, None], 7, 2) == 0
    assert hard.vote([None, 7, None], 7, 3) == 1, "one vote is a majority of one"
    assert hard.majority([None, 3, 7, 7, None, None]) == 7
    assert hard.majority(["b", "a", "a", "b"]) == "b", "the earliest of those that are level"
    assert hard.majority([None, None]) is None and hard.majority([]) is None


@pytest.mark.parametrize("voters", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.7, 1.0])
def test_condorcet_counts_all_ways_to_vote(p, voters):
    wanted = 0.0
    for ballots in itertools.product((0, 1), repeat=min(voters, 7)) if voters <= 7 else ():
        margin = 2 * sum(ballots) - voters
        wanted += math.prod(p if one else 1 - p for one in ballots) * (margin > 0 or (margin == 0) / 2)
    if voters <= 7:
        assert hard.condorcet(p, voters) == pytest.approx(wanted)
    assert hard.condorcet(0.5, voters) == pytest.approx(0.5), "a vote cannot lift a coin"
    assert hard.condorcet(p, voters) + hard.condorcet(1 - p, voters) == pytest.approx(1)
    if voters % 2 == 0:
        assert hard.condorcet(p, voters) == pytest.approx(hard.condorcet(p, voters - 1))


def test_an_interval_over_problems_stays_within_0_and_1():
    found = hard.over_problems([1.0, 1.0, 1.0, 0.2])
    assert found.high == 1 and 0 <= found.low < found.value == pytest.approx(0.8) and found.n == 4


# ---------------------------------------------------------------- checkers


def never(answer):
    while True:
        answer += 1


@pytest.mark.parametrize(
    ("checker", "right", "fault"),
    [
        (lambda x: x == 3, True, None),
        (lambda x: x == 4, False, None),
        (lambda x: np.bool_(x == 3), True, None),
        (lambda x: torch.tensor(x == 3), True, None),
        (lambda x: 1 / 0, False, "ZeroDivisionError: division by zero"),
        (lambda x: {}[x], False, "KeyError: 3"),
        (lambda x: "yes", False, "gave 'yes', expected True or False"),
        (lambda x: None, False, "gave None, expected True or False"),
        (lambda x: 1, False, "gave 1, expected True or False"),
        (never, False, "no verdict within 0.2 s"),
    ],
)
def test_what_a_checker_may_do(checker, right, fault):
    assert hard.judge(checker, 3, seconds=0.2) == (right, fault)


def test_a_checker_that_never_returns_is_stopped():
    hard.judge(never, 3, seconds=0.1)
    for _ in range(50):  # it ends at its next line
        left = [one for one in threading.enumerate() if one.name == "checker"]
        if not left:
            break
        time.sleep(0.1)
    assert not left


# ---------------------------------------------------------------- rules


def drawn(seed=0, rows=6, vocabulary=300):
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


K, P, M = Sampling(1.0, top_k=40), Sampling(1.0, top_p=0.9), Sampling(1.0, min_p=0.05)


def test_rules_in_the_order_of_sampling_are_sampling():
    logits = drawn()
    together = Sampling(0.7, top_k=40, top_p=0.9, min_p=0.05).probabilities(logits) > 0
    assert torch.equal(hard.stays(logits, [Sampling(0.7), K, P, M]), together)


def test_mass_and_count_are_of_the_models_own_distribution():
    logits = drawn()
    p = logits.softmax(-1)
    for rules in ([K], [P], [M], [K, P], [P, K], [Sampling(2.0), P]):
        mass, count = hard.kept(logits, rules)
        for row in range(len(logits)):  # what stays are the most likely ones: a beginning of the ranking
            best = p[row].sort(descending=True).values[: int(count[row])]
            assert mass[row].item() == pytest.approx(best.sum().item(), abs=1e-5)
    assert (hard.kept(logits, [K]).count == 40).all() and (hard.kept(logits, [P]).mass >= 0.9 - 1e-6).all()


def test_what_the_order_changes():
    """Behind top-k, top-p reaches its share sooner, because what it shares out is less; never the other way round."""
    logits = drawn(1)
    first, second = hard.kept(logits, [K, P]), hard.kept(logits, [P, K])
    assert (first.count <= second.count).all() and (first.count < second.count).any()
    warm, cold = hard.kept(logits, [Sampling(1.5), P]).count, hard.kept(logits, [P, Sampling(1.5)]).count
    assert (warm > cold).all()


# ---------------------------------------------------------------- texts


def test_distinct_and_loop():
    assert hard.distinct([1, 2, 1, 2, 1], 2) == 0.5 and hard.distinct([1, 2, 3], 3) == 1
    assert hard.distinct([5] * 9, 1) == pytest.approx(1 / 9)
    assert hard.loop([9, 1, 2, 1, 2, 1, 2]) == 2 and hard.loop([4, 4, 4]) == 1 and hard.loop([1, 2, 1, 2]) is None
    assert hard.loop([1, 2, 1, 2], rounds=2) == 2 and hard.loop([]) is None
    assert hard.loop([3, 3, 3, 1]) is None, "it went round, and then on"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: hard.pass_at_k(4, 2, 5), "k: got 5, expected at most 4"),
        (lambda: hard.pass_at_k(4, 5, 2), "right: got 5, expected at most 4"),
        (lambda: hard.pass_at_k(0, 0, 1), "n: got 0"),
        (lambda: hard.pass_at_k(4, 2, 0), "k: got 0"),
        (lambda: hard.pass_at_k(4, 0.5, 2), "right: got 0.5"),
        (lambda: hard.vote(["a"], "a", 2), "k: got 2, expected at most 1"),
        (lambda: hard.vote([], "a", 1), "n: got 0"),
        (lambda: hard.vote(["a"], None, 1), "truth: got None"),
        (lambda: hard.vote(["a", [1]], "a", 1), r"answers\[1\]: got \[1\], expected text or a number"),
        (lambda: hard.majority([{}]), r"answers\[0\]: got {}"),
        (lambda: hard.best_of([True], [], 1), "scores: got 0, expected 1"),
        (lambda: hard.best_of([True, False], [0.0, math.nan], 1), r"scores\[1\]: got nan"),
        (lambda: hard.best_of([True], [1.0], 3), "k: got 3"),
        (lambda: hard.condorcet(1.2, 3), "p: got 1.2, expected 0 to 1"),
        (lambda: hard.condorcet(0.5, 0), "voters: got 0"),
        (lambda: hard.over_problems([]), "values: got"),
        (lambda: hard.judge(lambda x: True, 1, seconds=0), "seconds: got 0"),
        (lambda: hard.stays(torch.ones(5), [K]), r"logits: got shape \(5,\), expected \(steps, vocabulary\)"),
        (lambda: hard.kept(torch.ones(1, 5), []), "rules: got none"),
        (lambda: hard.kept(torch.ones(1, 5), [Sampling()]), "temperature: got 0.0"),
        (lambda: hard.distinct([1], 2), "ids: got 1 tokens, expected at least n=2"),
        (lambda: hard.loop([1, 2], rounds=1), "rounds: got 1"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
