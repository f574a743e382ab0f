"""Stages: what is accepted stays, what fails its gate is undone bit for bit, and the way back is written down."""

import math

import pytest
import torch
from torch import nn

from dslib.migration.stages import MANIFEST, Stage, outcomes_in, rollback, run


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def shift(by):
    def work(model):
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += by

    return work


def judge(model):
    """Small is good: the largest weight of the second layer."""
    return model[1].weight.abs().max().item()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_stages_move_only_their_own_weights_and_a_failing_one_is_undone(model, tmp_path):
    before = state(model)
    stages = [
        Stage("first", r"^0\.", shift(1.0), 0.0),
        Stage("second", r"^1\.", shift(0.25), 0.5),
        Stage("third", r"^1\.", shift(5.0), 0.5),
        Stage("never", r"^0\.", shift(9.0), 0.0),
    ]
    outcomes = run(model, stages, judge, tmp_path)
    assert [(one.name, one.accepted) for one in outcomes] == [("first", True), ("second", True), ("third", False)]
    assert outcomes[2].before == outcomes[1].after and outcomes[2].after > outcomes[2].before + 0.5
    torch.testing.assert_close(model[0].weight, before["0.weight"] + 1)
    torch.testing.assert_close(model[1].weight, before["1.weight"] + 0.25)
    assert all(weight.requires_grad for weight in model.parameters())
    assert outcomes_in(tmp_path) == outcomes

    rollback(model, tmp_path, "second")
    assert torch.equal(model[1].weight, before["1.weight"])
    torch.testing.assert_close(model[0].weight, before["0.weight"] + 1)
    assert [one.name for one in outcomes_in(tmp_path)] == ["first"]
    rollback(model, tmp_path, "first")
    assert same(state(model), before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_fails_the_gate(model, tmp_path, value):
    before, judged = state(model), iter([1.0, value])
    [outcome] = run(model, [Stage("a", "0", shift(1.0), 9.0)], lambda _: next(judged), tmp_path)
    assert not outcome.accepted and same(state(model), before)


def test_a_stage_that_raises_leaves_the_weights_as_they_were(model, tmp_path):
    before = state(model)

    def half(model):
        shift(1.0)(model)
        raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"):
        run(model, [Stage("a", "0", half, 0.0)], judge, tmp_path)
    assert same(state(model), before) and all(weight.requires_grad for weight in model.parameters())


def test_a_checkpoint_that_is_gone_or_altered_is_refused_and_nothing_changes(model, tmp_path):
    [outcome] = run(model, [Stage("a", "0", shift(1.0), 0.0)], judge, tmp_path)
    after, file = state(model), tmp_path / outcome.file
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + b"x")
    with pytest.raises(ValueError, match="altered"):
        rollback(model, tmp_path, "a")
    file.unlink()
    with pytest.raises(ValueError, match="gone"):
        rollback(model, tmp_path, "a")
    assert same(state(model), after) and (tmp_path / MANIFEST).exists()


A = Stage("a", "0", shift(0.0), 0.0)
BAD_CALLS = [
    (lambda model, path: run(model, [], judge, path), "at least one"),
    (lambda model, path: run(model, [A, A], judge, path), "a name of its own"),
    (lambda model, path: run(model, [Stage("b", "router", shift(0.0), 0.0)], judge, path), "'router' is in no"),
    (lambda model, path: (run(model, [A], judge, path), run(model, [A], judge, path)), "already"),
    (lambda model, path: (run(model, [A], judge, path), rollback(model, path, "z")), "name"),
]


@pytest.mark.parametrize("call, words", BAD_CALLS)
def test_bad_calls_are_refused_and_say_what_was_wrong(call, words, model, tmp_path):
    with pytest.raises(ValueError, match=words):
        call(model, tmp_path)
