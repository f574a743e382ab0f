"""Runs with cures of every strength, and the layer under load: what the figures mean, that the load is as asked."""

import math

import pytest
import torch

from dslib.architecture.balance import load_statistics, moe_layers
from measured.experiments import balance, moe

TINY = {"steps": 3, "hidden_size": 16, "length": 16, "batch_size": 2, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    monkeypatch.setattr(moe, "HELD_OUT", (3, 33))


@pytest.mark.parametrize("max_vio", [0, 1, 2.5, 7])
def test_the_load_is_as_uneven_as_asked_and_no_token_has_an_expert_twice(max_vio):
    choices = balance.skewed(512, 16, 2, max_vio)
    stats = load_statistics(choices, 16)
    assert choices.shape == (512, 2) and (choices[:, 0] != choices[:, 1]).all()
    assert stats.max_vio == pytest.approx(max_vio, abs=0.02)
    assert stats.counts[2:].max() - stats.counts[2:].min() <= 1


def test_arms_start_alike_and_differ_in_their_cure_only():
    runs = balance.balance_runs(["no cure", "switch 0.1", "bias 0.02"], **TINY)
    assert len({run["trace"][0] for run in runs.values()}) == 1
    assert len({run["loss"] for run in runs.values()}) == 3
    assert balance.balance_runs(["switch 0.1"], **TINY)["switch 0.1"] == runs["switch 0.1"]
    for run in runs.values():
        assert len(run["trace"]) == 3 and len(run["max_vio"]) == len(run["idle"]) == 2
        assert 0 <= run["within"] <= 7


def test_each_gate_is_the_rule_that_it_names():
    routers = {
        name: next(moe_layers(moe.train_design(balance.ARMS[name], **TINY | {"steps": 1})[0])).router
        for name in ("no cure", "softmax", "softmax, halved", "softmax, sum 1")
    }
    sums = {name: router(torch.randn(5, 16)).weights.sum(1) for name, router in routers.items()}
    whole = routers["softmax"](torch.ones(5, 16)).scores.sum(1)
    assert torch.allclose(sums["no cure"], torch.tensor(2.0)) and torch.allclose(
        sums["softmax, sum 1"], torch.tensor(1.0)
    )
    assert (
        (sums["softmax"] < 1).all()
        and torch.allclose(whole, torch.tensor(1.0))
        and (sums["softmax, halved"] < 0.5).all()
    )


def test_within_a_slice_the_load_is_that_of_its_own_tokens():
    indices = torch.tensor([[0, 1], [0, 2], [3, 1], [3, 2]])  # two slices of two tokens
    assert balance._by_slice(indices, 2, 4).tolist() == [[2, 1, 1, 0], [0, 1, 1, 2]]


def test_the_cost_of_a_load_is_measured_for_each():
    found = balance.load_cost(16, 8, 4, 1, tokens=64, loads=[0, 3], rounds=1)
    assert [row["busiest"] for row in found["rows"]] == [16, 64]
    assert all(row[way].median > 0 for row in found["rows"] for way in ("together", "padded", "alone"))


def test_counting_bytes_is_the_slow_way_done_fast(monkeypatch):
    text, held_out = torch.tensor([*b"abracadabra abra"]), torch.tensor([[*b"abrax"], [*b"cadab"]])
    monkeypatch.setattr(moe, "text_parts", lambda: (text, held_out))

    def chance(row, size):  # of the last byte of ``row`` after the ``size - 1`` before it
        if size == 0:
            return 1 / 256
        shorter, context = chance(row, size - 1), row[len(row) - size : -1]
        follow = [
            text[i + size - 1].item() for i in range(len(text) - size + 1) if text[i : i + size - 1].tolist() == context
        ]
        kinds = len(set(follow))
        return (follow.count(row[-1]) + kinds * shorter) / (len(follow) + kinds) if follow else shorter

    for longest in (1, 2, 3):
        slow = [-math.log(chance(row[: i + 1], min(longest, i + 1))) for row in held_out.tolist() for i in range(1, 5)]
        assert balance.count_loss(longest) == pytest.approx(sum(slow) / len(slow))


def test_a_longer_context_predicts_better():
    assert 3 > balance.count_loss(2) > balance.count_loss(3) > 1.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: balance.balance_runs(["bias 7"], **TINY), "arms: got 'bias 7'"),
        (lambda: balance.count_loss(4), "longest: got 4"),
        (lambda: balance.skewed(8, 16, 2, 7.5), "max_vio: got 7.5"),
        (lambda: balance.skewed(8, 3, 2, 0.1), "num_experts: got 3"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
