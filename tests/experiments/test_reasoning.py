"""The task of the page on reasoning, counted out, and one short run of each experiment."""

import itertools

import pytest
import torch

from dslib.scenarios.reasoning import Answers
from measured import record
from measured.experiments import reasoning as lab

GENERATOR = torch.Generator().manual_seed(0)


def answer(*ids):
    row = torch.tensor([ids])
    return Answers(row, torch.ones_like(row, dtype=torch.bool))


def test_who_leaves_out_one_digit_knows_nothing():
    """Over all sums of three digits: given any two of them, each result is as frequent as any other."""
    for left_out in range(3):
        seen = {}
        for digits in itertools.product(range(10), repeat=3):
            known = digits[:left_out] + digits[left_out + 1 :]
            seen.setdefault(known, []).append(sum(digits) % 10)
        assert all(sorted(results) == list(range(10)) for results in seen.values())


def test_written_answers_end_with_the_sum_and_only_they_are_learned():
    asked = lab.questions(50, GENERATOR)
    inputs, targets = lab.written(asked, torch.arange(50) % 2 == 0)
    for row in range(50):
        digits = asked[row, :-1].tolist()
        learned = [target for target in targets[row].tolist() if target >= 0]
        sums = [sum(digits[: place + 1]) % 10 for place in range(len(digits))]
        assert learned == ([lab.THINK, *sums, lab.END] if row % 2 == 0 else [sums[-1], lab.END])
        assert (targets[row, : len(digits)] == -100).all() and inputs[row, : len(digits) + 1].tolist() == [*digits, 10]


@pytest.mark.parametrize(
    ("ids", "result"),
    [
        ((7, lab.END), 7), ((lab.THINK, 3, 7, lab.END), 7), ((lab.END,), -1), ((lab.THINK, lab.END), -1),
        ((7, 7, 7), -1), ((10, lab.END), -1), ((3, lab.THINK, lab.END), -1),
    ],
)  # fmt: skip
def test_an_answer_is_the_digit_before_its_end_or_none(ids, result):
    assert lab.results(answer(*ids)).item() == result


def test_the_reward_is_for_the_right_digit_alone():
    asked = torch.tensor([[1, 2, 3, 4, 5, 9, 10]])  # 24
    for digit in range(10):
        assert lab.right(asked, answer(digit, lab.END)).item() == float(digit == 4)
        assert lab.right(asked, answer(lab.THINK, 0, digit, lab.END)).item() == float(digit == 4)
    assert lab.thinks(asked, answer(lab.THINK, 0)).item() == 1 and lab.thinks(asked, answer(4, lab.END)).item() == 0


def test_a_short_run_of_grpo_has_what_the_page_shows_and_repeats():
    made = lab.learned("stale, top-p kept", steps=2)
    assert made == lab.learned("stale, top-p kept", steps=2)
    assert {"taught", "start", "end", "rows"} == set(made) and len(made["rows"]) == 2
    assert made["taught"]["right"] > 0.9 * made["taught"]["asked"] and made["start"]["thought"] < 800
    assert made["rows"][0][3] > 0 and made["start"] == lab.learned("GRPO", steps=1)["start"]
    assert lab.learned("GRPO", steps=1, again=1)["rows"] != lab.learned("GRPO", steps=1)["rows"]


def test_answers_split_into_one_part_are_learned_from_as_fresh_ones():
    """With one part a rollout is one batch; with two, the second learns from answers one update old."""
    assert lab.split(steps=2, parts=1) == lab.learned(steps=2, learning_rate=1e-3)
    assert lab.split(steps=1, parts=2)["rows"][0][3] > 0


def test_the_recorded_arms_are_all_arms():
    assert sorted((*record.REWARDED, *record.CURES)) == sorted(lab.ARMS)


def test_short_distillations_count_what_the_student_has_learned_from(monkeypatch):
    monkeypatch.setattr(lab, "_teacher", lab.taught)  # it need not know much for this
    for way in lab.WAYS:
        made = lab.distilled(way, steps=2, every=1)
        (first, _), (both, share) = made["rows"]
        assert 0 < first < both and 0 <= share < 0.3 and made["weights"] < 1e5
