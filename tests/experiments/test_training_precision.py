"""What is said of 16-bit gradients is measured on real ones, and each figure means what its name says."""

import pytest
import torch

from dslib.data.text import random_batch
from dslib.performance import training
from measured.experiments import moe
from measured.experiments import training_precision as precision
from measured.experiments.training_precision import flushed, gradients, precision_runs, scale_figures, small_model


@pytest.fixture(scope="module")
def model():
    return small_model(32, 1)


@pytest.fixture(scope="module")
def batch():
    tokens, _ = moe.text_parts()
    return random_batch(tokens, 32, 4, torch.Generator().manual_seed(0))


def test_the_smallest_numbers_are_those_of_the_formats():
    for name, power in (("float16", -24), ("bfloat16", -133), ("float32", -149)):
        assert precision.smallest(name) == 2.0**power
        dtype = training.PRECISIONS[name]
        assert torch.tensor(2.0**power, dtype=torch.float64).to(dtype) > 0
        assert torch.tensor(2.0 ** (power - 2), dtype=torch.float64).to(dtype) == 0


def test_gradients_of_the_weights_are_those_of_a_plain_backward_pass(model, batch):
    found = gradients(model, *batch)
    assert all(p.grad is None for p in model.parameters())
    loss = training.next_token_loss(model, *batch)
    plain = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.equal(found.weights, torch.cat([g.flatten() for g in plain]))
    # qkv, o, gate and up, down, head: outputs of the linear layers, for 4 x 32 tokens
    assert len(found.activations) == 4 * 32 * (32 + 2 * 16 + 32 + 2 * 64 + 32 + 256)


def test_the_scale_is_taken_out_again_and_16_bits_differ_a_little(model, batch):
    exact, same = gradients(model, *batch), gradients(model, *batch, scale=2.0**10)
    torch.testing.assert_close(same.weights, exact.weights, rtol=1e-5, atol=1e-9)
    half = gradients(model, *batch, "float16", 2.0**10)
    error = precision.relative_error(exact.weights, half.weights)
    assert 1e-5 < error < 0.02
    assert precision.relative_error(exact.weights, gradients(model, *batch, "bfloat16").weights) > 2 * error


def test_flushed_counts_only_what_was_too_small():
    exact = torch.tensor([0.0, 1e-9, 1e-9, 1e-3, 2.0])
    rounded = torch.tensor([0.0, 0.0, 6e-8, 0.0, 2.0])
    assert flushed(exact, rounded, "float16") == 0.25  # 1e-3 became zero for another reason; 0 was not alive
    assert flushed(exact, rounded, "float16", scale=2.0**20) == 0.0
    assert flushed(exact, rounded, "bfloat16") == 0.0


def test_scaling_saves_gradients_until_they_overflow(model, batch):
    low, none, good, high = scale_figures(model, *batch, [2.0**-12, 1.0, 2.0**12, 2.0**30])
    assert low["flushed"] > 0.5 > none["flushed"] > good["flushed"]
    assert low["error"] > good["error"] and not good["overflowed"]
    assert high["overflowed"] and high["error"] is None
    (bfloat,) = scale_figures(model, *batch, [1.0], "bfloat16")
    assert bfloat["flushed"] == 0.0 and not bfloat["overflowed"]


def test_hooks_are_removed_also_after_an_error(model, batch):
    with pytest.raises(KeyError):
        gradients(model, *batch, "float8")
    assert all(not module._forward_hooks for module in model.modules())


def test_runs_repeat_and_too_small_gradients_do_not_learn(monkeypatch):
    monkeypatch.setattr(moe, "HELD_OUT", (3, 33))
    options = {"seeds": 1, "steps": 30, "hidden_size": 32, "layers": 1, "batch_size": 4, "length": 16}
    runs = precision_runs(**options)
    assert runs == precision_runs(**options)
    loss = {arm: run["loss"][0] for arm, run in runs.items()}
    for arm in ("bfloat16", "float16, dynamic scale"):
        assert loss[arm] == pytest.approx(loss["float32"], abs=0.05) and loss[arm] != loss["float32"]
    assert runs["float16, dynamic scale"]["skipped"] == [0] and runs["float32"]["scale"] == [1.0]
    for bad, words in (({"arms": ["float8"]}, "arms: got 'float8'"), ({"seeds": 0}, "seeds: got 0")):
        with pytest.raises(ValueError, match=words):
            precision_runs(**bad)


def test_the_picture_is_what_its_program_draws():
    """Its ends come from torch.finfo, so that the picture cannot say something else than the formats."""
    from tools import draw_number_formats

    text = draw_number_formats.draw()
    assert draw_number_formats.PATH.read_text(encoding="utf-8") == text
    assert all(ends in text for ends in ("2⁻¹⁴⁹, 24 binary", "2⁻¹³³, 8 binary", "2⁻²⁴, 11 binary"))
