"""The training loop: it learns, it repeats itself, its schedule and hooks do what they say, bad input is named."""

import itertools
import math

import pytest
import torch
from torch import nn

from dslib.architecture import decoder
from dslib.performance.loss_scaling import LossScaler
from dslib.performance.training import fit, next_token_loss, train

TOKENS = torch.arange(400) % 7  # the next token is certain
TINY = decoder.preset("tiny", vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                      num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
SHORT = {"batch_size": 4, "length": 8}


def tiny():
    return decoder.build(TINY, seed=0)


class Root(nn.Module):
    """Two numbers and nothing else."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))


def test_it_learns_and_repeats_itself_without_global_random_numbers():
    models = [tiny() for _ in range(3)]
    state = torch.get_rng_state()
    options = {"steps": 150, "learning_rate": 1e-2, **SHORT}
    losses = [train(model, TOKENS, seed=seed, **options) for model, seed in zip(models, (0, 0, 1), strict=True)]
    assert len(losses[0]) == 150 and losses[0][0] == pytest.approx(math.log(8), abs=0.1) and losses[0][-1] < 0.2
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("mode", [True, False])
def test_every_part_gets_its_mode_back(mode, stops):
    model, seen = tiny().train(mode), []
    model.layers[0].mlp.train(not mode)
    before = [part.training for part in model.modules()]

    def after_step(m):
        seen.extend(part.training for part in m.modules())
        if stops:
            raise KeyboardInterrupt

    try:
        train(model, TOKENS, steps=1, after_step=after_step, **SHORT)
    except KeyboardInterrupt:
        assert stops
    assert all(seen) and [part.training for part in model.modules()] == before != seen


def rates(steps, warmup):
    """The learning rates used, read off plain gradient signs: AdamW's first moves are as long as its rate."""
    model, used, before = Root(), [], [0.0]

    def note(_):
        used.append(round(abs(model.weight[0].item() - before[0]), 6))
        before[0] = model.weight[0].item()

    train(model, TOKENS, steps=steps, learning_rate=1.0, warmup=warmup, loss=lambda m, x, y: m.weight.sum(),
          after_step=note, **SHORT)  # fmt: skip
    return used


def test_the_rate_rises_along_a_line_and_falls_along_a_cosine_to_a_tenth():
    used = rates(14, 0.3)
    assert used[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1e-3)
    assert used[4:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * n / 9)) for n in range(10)], abs=1e-3)
    assert rates(1, 0.0) == pytest.approx([1.0], abs=1e-3)


def test_vectors_do_not_decay_and_frozen_parameters_stay():
    model = tiny()
    model.embed_tokens.weight.requires_grad_(False)
    frozen = model.embed_tokens.weight.clone()
    matrix, vector = model.layers[0].mlp.down_proj.weight, model.norm.weight
    before = matrix.detach().clone(), vector.detach().clone()

    def no_gradient(m, inputs, targets):
        return 0 * sum(p.sum() for p in m.parameters())

    train(model, TOKENS, steps=1, learning_rate=0.1, weight_decay=0.5, warmup=0.0, loss=no_gradient, **SHORT)
    assert torch.allclose(matrix, 0.95 * before[0]) and torch.equal(vector, before[1])
    assert torch.equal(model.embed_tokens.weight, frozen)


def test_the_hooks_see_the_batch_the_moved_weights_and_each_step():
    shapes, weights, seen, model = [], [], [], tiny()

    def loss(m, inputs, targets):
        shapes.append((inputs.shape, targets.shape))
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        return next_token_loss(m, inputs, targets)

    def after_step(m):
        assert m is model and not torch.is_grad_enabled()
        weights.append(m.norm.weight.clone())

    options = {"loss": loss, "after_step": after_step, "on_step": seen.append, "learning_rate": 1e-2}
    losses = train(model, TOKENS, steps=6, **options, **SHORT)
    assert shapes == [((4, 8), (4, 8))] * 6 and not torch.equal(weights[0], weights[1])
    assert [step.number for step in seen] == list(range(6)) and [step.loss for step in seen] == losses
    assert [seen[0].learning_rate, seen[-1].learning_rate] == pytest.approx([1e-2, 1e-3])
    assert all(step.gradient_norm > 0 and step.scale == 1.0 and not step.skipped for step in seen)


def test_gradients_are_clipped():
    """Adam does not care for the size of a constant gradient, but for one that jumps: with clipping it cannot."""
    model, steps = nn.Linear(1, 1, bias=False), iter([1.0, 1e6])
    nn.init.zeros_(model.weight)
    train(model, TOKENS, steps=2, learning_rate=1.0, warmup=0.0, weight_decay=0.0, clip=1.0, **SHORT,
          loss=lambda m, x, y: m.weight.sum() * next(steps))  # fmt: skip
    assert model.weight.item() == pytest.approx(-1.1, abs=1e-3)  # two equal steps: rates 1 and 0.1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_leaves_the_weights(value):
    model, seen = tiny(), []

    def loss(m, inputs, targets):
        seen.append([p.clone() for p in m.parameters()])
        return next_token_loss(m, inputs, targets) * (value if len(seen) == 3 else 1.0)

    with pytest.raises(FloatingPointError, match=f"loss: got {value} at step 2 of 5"):
        train(model, TOKENS, steps=5, loss=loss, **SHORT)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), seen[2], strict=True))


def test_gradients_that_are_not_finite_stop_before_the_update():
    model, loss = Root(), lambda m, x, y: m.weight.sqrt().sum()
    with pytest.raises(FloatingPointError, match="gradients: got norm inf at step 0 of 2"):
        train(model, TOKENS, steps=2, loss=loss, **SHORT)
    with pytest.raises(FloatingPointError, match="NaN or infinite at every loss scale"):
        train(model, TOKENS, steps=99, loss=loss, precision="float16", **SHORT)
    assert torch.equal(model.weight, torch.zeros(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": TOKENS.view(2, -1)}, r"tokens: got torch.int64 of shape \(2, 200\)"),
        ({"tokens": TOKENS.int()}, "tokens: got torch.int32"),
        ({"length": 400}, "length: got 400, expected less than the text's 400 tokens"),
        ({"steps": 0}, "steps: got 0"),
        ({"length": 0}, "length: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate: got nan"),
        ({"clip": -1.0}, "clip: got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1"),
        ({"warmup": 1.0}, "warmup: got 1.0"),
        ({"model": nn.Identity()}, "model: got no parameter"),
        ({"accumulate": 3}, "accumulate: got 3, expected a divisor of the batch's 4 rows"),
        ({"accumulate": 0}, "accumulate: got 0, expected at least 1"),
        ({"accumulate": 2, "counts": lambda x, y: 0}, r"counts: got \[0, 0\], expected numbers of terms"),
        ({"every": 0}, "every: got 0, expected at least 1"),
        ({"precision": "int8"}, "precision: got 'int8', expected one of 'float32', 'bfloat16', 'float16'"),
        ({"precision": torch.float16}, "precision: got torch.float16"),
        ({"scaler": LossScaler()}, "scaler: got one for precision 'float32'"),
        ({"loss": lambda m, x, y: m(x).mean(-1)}, r"loss: got a tensor of shape \(4, 8\)"),
    ],
)
def test_bad_input_is_named(change, message):
    call = {"model": tiny(), "tokens": TOKENS, "steps": 2, **SHORT} | change
    with pytest.raises(ValueError, match=message):
        train(**call)


# ---------------------------------------------------------------- parts of a batch


def test_a_training_in_parts_ends_where_the_whole_one_ends_and_sees_a_part_at_a_time():
    found, sizes = {}, []

    def loss(m, inputs, targets):
        sizes.append(len(inputs))
        return next_token_loss(m, inputs, targets)

    for accumulate in (1, 4):
        options = {"steps": 20, "batch_size": 8, "length": 8, "accumulate": accumulate}
        found[accumulate] = train(tiny(), TOKENS, loss=loss, **options)
    assert found[4] == pytest.approx(found[1], rel=1e-3) and sizes == [8] * 20 + [2] * 80


def padded(real):
    """Eight rows, of which a row keeps so many targets at its end."""
    rows = torch.stack([TOKENS[start : start + 9] for start in range(8)])
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].clone()
    for row, kept in enumerate(real):
        targets[row, : 8 - kept] = -100
    return lambda step: (inputs, targets)


def one_step(batch, accumulate, **options):
    """The loss and all gradients before clipping."""
    model = tiny()
    losses = fit(model, batch, steps=1, **{"loss": next_token_loss, "clip": 1e9} | options, accumulate=accumulate)
    return losses[0], torch.cat([p.grad.flatten() for p in model.parameters()])


def other_loss(model, inputs, targets):
    return next_token_loss(model, inputs, targets)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
@pytest.mark.parametrize("real", [[8] * 8, [1, 3, 5, 7, 8, 8, 8, 8], [0, 0, 0, 0, 3, 3, 0, 2]])
@pytest.mark.parametrize(
    "options", [{}, {"loss": other_loss, "counts": lambda x, y: (y != -100).sum()}], ids=["known", "told"]
)
def test_parts_weigh_as_much_as_they_have_terms(real, accumulate, options):
    """A part without any is left out: its mean is not a number."""
    loss, whole = one_step(padded(real), 1)
    loss_of_parts, parts = one_step(padded(real), accumulate, **options)
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_the_test_sees_a_mean_of_means():
    batch = padded([1, 3, 5, 7, 8, 8, 8, 8])
    assert not torch.allclose(one_step(batch, 1)[1], one_step(batch, 4, loss=other_loss)[1], rtol=1e-2, atol=1e-4)


# ---------------------------------------------------------------- 16 bits


@pytest.mark.parametrize(("precision", "scale"), [("float32", 1.0), ("bfloat16", 1.0), ("float16", 2.0**16)])
def test_products_are_in_16_bits_weights_stay_in_32_and_learn_as_well(precision, scale):
    model, seen, dtypes = tiny(), [], set()

    def loss(m, inputs, targets):
        dtypes.add(m(inputs).dtype)
        return next_token_loss(m, inputs, targets)

    options = {"steps": 60, "learning_rate": 1e-2, **SHORT}
    losses = train(model, TOKENS, precision=precision, on_step=seen.append, loss=loss, **options)
    exact = train(tiny(), TOKENS, **options)
    assert dtypes == {getattr(torch, precision)} and {step.scale for step in seen} == {scale}
    assert losses[-1] == pytest.approx(exact[-1], abs=0.1) and (losses == exact) is (precision == "float32")
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_an_overflow_skips_the_step_and_halves_the_scale():
    model, seen, norms, called = tiny(), [], [], []
    scaler = LossScaler(2.0**40, growth_interval=2)

    def on_step(step):
        seen.append(step)
        norms.append(model.norm.weight.detach().clone())

    train(model, TOKENS, steps=40, precision="float16", scaler=scaler, on_step=on_step,
          after_step=lambda m: called.append(1), **SHORT)  # fmt: skip
    skipped = [step.skipped for step in seen]
    assert skipped[0] and not all(skipped) and len(called) == skipped.count(False)
    assert [torch.equal(a, b) for a, b in itertools.pairwise(norms)] == skipped[1:]
    for step, after in itertools.pairwise(seen):
        assert math.isnan(step.gradient_norm) == step.skipped
        assert after.scale in ({step.scale / 2} if step.skipped else {step.scale, 2 * step.scale})
    assert scaler.scale in (seen[-1].scale / 2, seen[-1].scale, 2 * seen[-1].scale)
