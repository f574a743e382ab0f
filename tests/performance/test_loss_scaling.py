"""Our loss scaler takes the course of torch's, step by step, and its gradients are those of the unscaled loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dslib.performance.loss_scaling import LARGEST, LossScaler


def course_of_both(overflows, **rule):
    """(scale, skipped) after each step of our scaler and of torch's, and both weights, for the same gradients."""
    courses, weights = [], []
    for ours in (True, False):
        weight = nn.Parameter(torch.ones(3))
        optimizer, course = torch.optim.SGD([weight], lr=0.5), []
        scaler = LossScaler(**rule) if ours else torch.amp.GradScaler("cpu", init_scale=rule.pop("scale"), **rule)
        for overflow in overflows:
            optimizer.zero_grad()
            factor = math.inf if overflow else 0.25
            before = weight.detach().clone()
            if ours:
                (weight.sum() * factor * scaler.scale).backward()
                skipped = scaler.unscale([weight])
                if not skipped:
                    optimizer.step()
                scaler.update(skipped)
                course.append((scaler.scale, skipped))
            else:
                scaler.scale(weight.sum() * factor).backward()
                scaler.step(optimizer)
                scaler.update()
                course.append((scaler.get_scale(), torch.equal(weight, before)))
        courses.append(course)
        weights.append(weight.detach())
    return courses, weights


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 5), st.sampled_from([2.0, 4.0, 3.0]))
def test_the_course_is_that_of_torch(overflows, interval, growth):
    rule = {"scale": 2.0**40, "growth_factor": growth, "backoff_factor": 0.5, "growth_interval": interval}
    (ours, torchs), (weight, other) = course_of_both(overflows, **rule)
    assert [skipped for _, skipped in ours] == [skipped for _, skipped in torchs] == overflows
    assert [scale for scale, _ in ours] == pytest.approx([scale for scale, _ in torchs], rel=1e-6)
    assert torch.equal(weight, other)


def test_growth_ends_where_torchs_ends():
    rule = {"scale": 2.0**126, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 1}
    scaler, tracker = torch.full((), 2.0**126), torch.zeros((), dtype=torch.int32)
    ours = LossScaler(**rule)
    for _ in range(3):
        torch._amp_update_scale_(scaler, tracker, torch.zeros(()), 2.0, 0.5, 1)
        ours.update(False)
        assert ours.scale == scaler.item()
    assert ours.scale == LARGEST


def test_a_real_float16_training_takes_the_same_course_as_with_torchs_scaler():
    """A weight so large that the scaled gradient overflows at first; both halve until it does not."""
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
        nn.init.constant_(layer[1].weight, 30.0)
        optimizer, scales = torch.optim.AdamW(layer.parameters(), lr=1e-3), []
        scaler = LossScaler(growth_interval=3) if ours else torch.amp.GradScaler("cpu", growth_interval=3)
        for step in range(14):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = layer(x).float().mean()
            if ours:
                (loss * scaler.scale).backward()
                overflowed = scaler.unscale(layer.parameters())
                if not overflowed:
                    optimizer.step()
                scaler.update(overflowed)
                scales.append(scaler.scale)
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                scales.append(scaler.get_scale())
        results.append((scales, [p.detach().clone() for p in layer.parameters()]))
    assert results[0][0] == results[1][0]
    assert len(set(results[0][0])) > 2  # it fell and rose
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_number_anywhere_is_an_overflow(value):
    good, bad, none = (nn.Parameter(torch.ones(4)) for _ in range(3))
    good.grad, bad.grad = torch.ones(4), torch.ones(4)
    assert not LossScaler(scale=4.0).unscale([good, bad, none])
    assert torch.equal(good.grad, torch.full((4,), 0.25))
    bad.grad[2] = value
    assert LossScaler().unscale([good, bad, none])


def test_without_gradients_there_is_no_overflow():
    assert not LossScaler().unscale([nn.Parameter(torch.ones(2))])


def test_gradients_in_16_bits_are_refused():
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match=r"parameters: got a gradient in torch.float16, expected torch.float32"):
        LossScaler().unscale([weight])


def test_gradients_that_are_never_finite_end_in_an_error_and_not_in_a_scale_of_zero():
    scaler = LossScaler(scale=4.0, smallest=1.0)
    scaler.update(True)
    scaler.update(True)
    with pytest.raises(FloatingPointError, match="at every loss scale down to 1"):
        scaler.update(True)


def test_a_fixed_scale_stays():
    scaler = LossScaler.fixed(8.0)
    for overflowed in [True, False, True, True] + [False] * 3000:
        scaler.update(overflowed)
    assert scaler.scale == 8.0


def test_state_comes_back():
    scaler, other = LossScaler(growth_interval=10), LossScaler()
    for overflowed in (False, True, False, False):
        scaler.update(overflowed)
    other.load_state_dict(scaler.state_dict())
    assert other == scaler and other.clean_steps == 2
    assert set(scaler.settings()) == {"growth_factor", "backoff_factor", "growth_interval", "smallest"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.0}, "scale: got 0.0, expected a number above 0"),
        ({"scale": math.inf}, "scale: got inf"),
        ({"scale": math.nan}, "scale: got nan"),
        ({"growth_factor": 0.5}, "growth_factor: got 0.5, expected at least 1"),
        ({"backoff_factor": 2.0}, "backoff_factor: got 2.0, expected 0 to 1"),
        ({"growth_interval": 0}, "growth_interval: got 0"),
        ({"smallest": 2.0**20}, "smallest: got 1048576.0"),
        ({"clean_steps": -1}, "clean_steps: got -1"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        LossScaler(**change)
