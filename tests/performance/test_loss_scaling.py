"""Our loss scaler takes the course of torch's, step by step, and a training with it is the one with torch's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dslib.performance.loss_scaling import LARGEST, LossScaler
from dslib.performance.training import fit


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
    scale, tracker = torch.full((), 2.0**126), torch.zeros((), dtype=torch.int32)
    ours = LossScaler(2.0**126, growth_interval=1)
    for _ in range(3):
        torch._amp_update_scale_(scale, tracker, torch.zeros(()), 2.0, 0.5, 1)
        ours.update(False)
        assert ours.scale == scale.item()
    assert ours.scale == LARGEST


def float16_problem():
    """A weight so large that the scaled gradient overflows at first; the scale halves until it does not."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    nn.init.constant_(layers[1].weight, 30.0)
    return layers, lambda step: (torch.randn(16, 8, generator=torch.Generator().manual_seed(step)),)


def test_a_float16_training_is_the_one_with_torchs_scaler():
    """``fit`` against the loop of torch's own examples: scale, backward, unscale, clip, step, update."""
    (ours, batch), seen = float16_problem(), []
    fit(ours, batch, steps=14, loss=lambda m, x: m(x).float().mean(), learning_rate=1e-3, weight_decay=0.01,
        precision="float16", scaler=LossScaler(growth_interval=3), on_step=seen.append)  # fmt: skip
    torchs, batch = float16_problem()
    groups = [{"params": [p for p in torchs.parameters() if (p.ndim > 1) is matrix], "weight_decay": 0.01 * matrix}
              for matrix in (True, False)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    scaler, scales = torch.amp.GradScaler("cpu", growth_interval=3), []
    for step in range(14):
        for group in optimizer.param_groups:
            group["lr"] = seen[step].learning_rate
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = torchs(*batch(step)).float().mean()
        scales.append(scaler.get_scale())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(torchs.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert [step.scale for step in seen] == scales and len(set(scales)) > 2  # it fell and rose
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), torchs.parameters(), strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_number_anywhere_is_an_overflow(value):
    good, bad, none = (nn.Parameter(torch.ones(4)) for _ in range(3))
    good.grad, bad.grad = torch.ones(4), torch.ones(4)
    assert not LossScaler(scale=4.0).unscale([good, bad, none]) and not LossScaler().unscale([none])
    assert torch.equal(good.grad, torch.full((4,), 0.25))
    bad.grad[2] = value
    assert LossScaler().unscale([good, bad, none])


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


def in_16_bits():
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    weight.grad = torch.ones_like(weight)
    LossScaler().unscale([weight])


def never_finite():
    scaler = LossScaler(scale=4.0, smallest=1.0)
    for _ in range(3):
        scaler.update(True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LossScaler(scale=0.0), ValueError, "scale: got 0.0, expected a number above 0"),
        (lambda: LossScaler(scale=math.inf), ValueError, "scale: got inf"),
        (lambda: LossScaler(scale=math.nan), ValueError, "scale: got nan"),
        (lambda: LossScaler(growth_factor=0.5), ValueError, "growth_factor: got 0.5, expected at least 1"),
        (lambda: LossScaler(backoff_factor=2.0), ValueError, "backoff_factor: got 2.0, expected 0 to 1"),
        (lambda: LossScaler(growth_interval=0), ValueError, "growth_interval: got 0"),
        (lambda: LossScaler(smallest=2.0**20), ValueError, "smallest: got 1048576.0"),
        (lambda: LossScaler(clean_steps=-1), ValueError, "clean_steps: got -1"),
        (in_16_bits, ValueError, "parameters: got a gradient in torch.float16, expected torch.float32"),
        (never_finite, FloatingPointError, "at every loss scale down to 1"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
