"""The training loop: it learns, it repeats itself, its schedule and hooks do what they say, bad input is named."""

import math

import pytest
import torch
from torch import nn

from dslib.architecture import decoder
from dslib.performance.training import next_token_loss, train

TOKENS = torch.arange(400) % 7  # the next token is certain
TINY = decoder.preset("tiny", vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                      num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
SHORT = {"batch_size": 4, "length": 8}


def tiny():
    return decoder.build(TINY, seed=0)


def test_it_learns():
    losses = train(tiny(), TOKENS, steps=150, learning_rate=1e-2, **SHORT)
    assert len(losses) == 150 and losses[0] == pytest.approx(math.log(8), abs=0.1) and losses[-1] < 0.2


def test_the_same_seed_gives_the_same_model_and_another_seed_other_batches():
    models = [tiny() for _ in range(3)]
    losses = [train(model, TOKENS, steps=4, seed=seed, **SHORT) for model, seed in zip(models, (0, 0, 1), strict=True)]
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_it_draws_no_global_random_numbers():
    state = torch.get_rng_state()
    train(tiny(), TOKENS, steps=2, **SHORT)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_is_put_back(mode):
    model, seen = tiny().train(mode), []
    train(model, TOKENS, steps=1, after_step=lambda m: seen.append(m.training), **SHORT)
    assert seen == [True] and model.training is mode


def rates(steps, warmup):
    """The learning rates used, read off plain gradient signs: AdamW's first moves are as long as its rate."""
    used, weight = [], nn.Parameter(torch.zeros(1))
    model = nn.Module()
    model.weight = weight
    before = [0.0]

    def note(_):
        used.append(round(abs(weight.item() - before[0]), 6))
        before[0] = weight.item()

    train(model, TOKENS, steps=steps, learning_rate=1.0, warmup=warmup, loss=lambda m, x, y: m.weight.sum(),
          after_step=note, **SHORT)  # fmt: skip
    return used


def test_the_rate_rises_along_a_line_and_falls_along_a_cosine_to_a_tenth():
    used = rates(14, 0.3)
    assert used[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1e-3)
    assert used[4:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * n / 9)) for n in range(10)], abs=1e-3)
    assert used[-1] == pytest.approx(0.1, abs=1e-3)
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


def test_the_hooks_see_the_batch_and_the_moved_weights():
    shapes, weights, model = [], [], tiny()

    def loss(m, inputs, targets):
        shapes.append((inputs.shape, targets.shape))
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        return next_token_loss(m, inputs, targets)

    def after_step(m):
        assert m is model and not torch.is_grad_enabled()
        weights.append(m.norm.weight.clone())

    train(model, TOKENS, steps=3, loss=loss, after_step=after_step, **SHORT)
    assert shapes == [((4, 8), (4, 8))] * 3
    assert not torch.equal(weights[0], weights[1])


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
        train(model.eval(), TOKENS, steps=5, loss=loss, **SHORT)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), seen[2], strict=True))
    assert not model.training


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
        ({"loss": lambda m, x, y: m(x).mean(-1)}, r"loss: got a tensor of shape \(4, 8\)"),
    ],
)
def test_bad_input_is_named(change, message):
    call = {"model": tiny(), "tokens": TOKENS, "steps": 2, **SHORT} | change
    with pytest.raises(ValueError, match=message):
        train(**call)
