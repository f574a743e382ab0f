"""Eight-bit weights: the values they stand for, and every way to multiply them."""

import pytest
import torch
from torch import nn

from dslib.architecture import decoder
from dslib.fast import int8
from dslib.fast.int8 import Int8Linear, quantize_int8_

pytestmark = pytest.mark.processor


def layer(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(64, 48, bias=False).to(dtype)


def test_no_weight_is_off_by_more_than_half_a_step():
    linear = layer()
    linear.weight.data[3] = 0
    made = Int8Linear.from_linear(linear)
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert ((made.dequantize() - linear.weight).abs() <= step / 2 + 1e-7).all()
    assert made.codes.abs().max() == 127 and not made.dequantize()[3].any()


@pytest.mark.parametrize("way", ["packed", "plain", "fused"])
@pytest.mark.parametrize("made_from", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(64,), (0, 64), (1, 1, 64), (2, 1, 64), (2, 3, 64), (2, 40, 64)])
def test_every_way_gives_the_product_with_those_weights(way, made_from, dtype, shape, monkeypatch):
    """``"fused"`` by the sum that a GPU compiles."""
    monkeypatch.setattr(int8, "_fused", lambda: int8.one_row_product)
    made = Int8Linear.from_linear(layer(made_from), way)
    x = torch.randn(shape).to(dtype)
    want = x.float() @ made.dequantize(torch.float32).T
    with torch.inference_mode():
        got = made(x)
    exact = made_from is torch.float32 and dtype in (torch.float32, torch.float64)
    assert got.dtype is dtype
    torch.testing.assert_close(got.float(), want, atol=1e-5 if exact else 0.03, rtol=0.02)


@pytest.mark.parametrize("way", ["packed", "plain"])
@pytest.mark.parametrize("rows", [1, 40])
def test_gradients_and_autocast_do_not_depend_on_the_rows(way, rows):
    made = Int8Linear.from_linear(layer(torch.bfloat16), way)
    x = torch.randn(rows, 64).bfloat16().requires_grad_()
    made(x).sum().backward()
    torch.testing.assert_close(x.grad[0], made.dequantize().sum(0), atol=0.03, rtol=0.02)
    with torch.autocast("cpu", torch.float16):
        assert made(x).dtype is torch.float16


def test_the_way_is_one_that_works_here(monkeypatch):
    assert int8.quickest_way("cpu", torch.bfloat16) == "packed"
    assert int8.quickest_way("cpu", torch.float32) == "plain"
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *_: 1 / 0)
    int8.quickest_way.cache_clear()
    assert int8.quickest_way("cpu", torch.bfloat16) == "plain"
    int8.quickest_way.cache_clear()


def test_a_model_keeps_its_head_and_nearly_its_logits():
    model = decoder.build(decoder.preset("tiny"), seed=0).eval()
    model.again = model.layers[0].mlp.down_proj
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        before = model(ids)
        after = quantize_int8_(model)(ids)
    assert type(model.lm_head) is not Int8Linear and type(model.layers[0].mlp.down_proj) is Int8Linear
    assert model.again is model.layers[0].mlp.down_proj
    assert 0 < (after - before).norm() / before.norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_without_memory_is_filled_afterwards(dtype):
    config, ids = decoder.preset("tiny", tie_word_embeddings=False), torch.arange(20).unsqueeze(0)
    full = quantize_int8_(decoder.build(config, seed=0, dtype=dtype))
    empty = quantize_int8_(decoder.build(config, device="meta", dtype=dtype)).to_empty(device="cpu")
    empty.load_state_dict(full.state_dict())
    for tokens in (ids, ids[:, :1]):
        assert torch.equal(empty(tokens), full(tokens))


def test_what_cannot_be_quantised_or_multiplied_is_refused():
    bad = layer()
    bad.weight.data[0, 0] = torch.nan
    made = Int8Linear.from_linear(layer(torch.bfloat16), "packed")
    for call, words in (
        (lambda: Int8Linear.from_linear(nn.Linear(4, 4)), "has a bias"),
        (lambda: Int8Linear.from_linear(bad), "NaN or infinite"),
        (lambda: made(torch.zeros(2, 32).bfloat16()), r"x: got shape \(2, 32\), expected \(\.\.\., 64\)"),
        (lambda: made(torch.zeros(1, 64, dtype=torch.int64)), "x: got torch.int64"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_compiled_sum_on_a_gpu():
    made = Int8Linear.from_linear(layer(torch.bfloat16).cuda())
    x = torch.randn(1, 1, 64, device="cuda", dtype=torch.bfloat16)
    want = x.float() @ made.dequantize(torch.float32).T
    with torch.inference_mode():
        torch.testing.assert_close(made(x).float(), want, atol=0.03, rtol=0.02)
