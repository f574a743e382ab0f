"""Bytes and operations of a step: by hand, against real tensors, torch's counter and dslib.roofline's own shape."""

import dataclasses
import math

import pytest
import torch

from dslib.architecture import decoder, sparse_decoder
from dslib.architecture.cache import visible
from dslib.architecture.fusion import FusionConfig
from dslib.architecture.int4.layers import quantize_
from dslib.performance import speed
from dslib.roofline import CODER_1_3B


def meta(config, dtype=torch.float16):
    return decoder.build(config, device="meta", dtype=dtype)


# ---------------------------------------------------------------- from the configuration


@pytest.mark.parametrize("name", ["tiny", "smollm2-135m", "1.3b"])
def test_matrix_parameters_are_those_of_the_model(name):
    model = meta(decoder.preset(name))
    matrices = sum(p.numel() for key, p in model.layers.named_parameters() if p.ndim == 2)
    assert speed.matrix_parameters(model.config) == matrices + model.lm_head.weight.numel()


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (5, 0), (5, 2), (8, 8), (30, 3)])
@pytest.mark.parametrize("length", [1, 4, 5, 6, 23])
def test_visible_pairs_are_the_ones_in_the_mask(length, window, sinks):
    at = torch.arange(length)
    assert speed.visible_pairs(length, window, sinks) == int(visible(at, at, window, sinks).sum())


def test_kv_bytes_are_those_of_the_caches():
    config = decoder.preset("tiny", sliding_window=16, attention_sinks=4)
    cache = decoder.build(config, seed=0).make_cache("rolling", batch_size=3)
    assert cache.nbytes == speed.kv_bytes(config, 500, bytes_per_number=4, batch_size=3)
    full = decoder.build(dataclasses.replace(config, sliding_window=None, attention_sinks=0))
    cache = full.make_cache("growing")
    with torch.inference_mode():
        full(torch.zeros(1, 37, dtype=torch.long), cache)
    assert cache.nbytes == speed.kv_bytes(full.config, 37, bytes_per_number=4)
    assert speed.kv_bytes(decoder.preset("1.3b"), 1) == 196_608  # as the coder's own configuration says


def test_operations_by_hand():
    config = decoder.DecoderConfig(10, 8, 16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1)
    # 3 tokens see 1 + 2 + 3 keys; scores and sums: 2 heads of 4, 2 operations each, twice, 3 layers
    assert speed.attention_flops(config, 3) == 6 * (2 * 4) * 2 * 2 * 3
    assert speed.matrix_flops(config, 3) == 2 * 3 * (3 * (8 * (8 + 8 + 4 + 4) + 3 * 8 * 16) + 80)


# ---------------------------------------------------------------- from the model


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(16, 2, 1), (16, 2, 5), (8, 3, 4), (4, 4, 3), (6, 1, 0)])
def test_expected_experts_against_a_draw(experts, top_k, tokens):
    generator = torch.Generator().manual_seed(0)
    keys = torch.rand(20_000, tokens, experts, generator=generator)
    used = keys.argsort(-1) < top_k  # a random order has each set of k places equally often
    mean = used.any(1).sum(-1).double().mean().item() if tokens else 0.0
    assert speed.expected_experts(experts, top_k, tokens) == pytest.approx(mean, rel=0.01)


def test_one_token_reads_exactly_its_experts_and_all_tokens_all():
    model = meta(sparse_decoder.preset("tiny-moe"), torch.float32)
    experts = sum(p.nbytes for layer in model.layers for p in layer.mlp.experts.parameters())
    rest = 4 * decoder.count_parameters(model) - experts
    assert speed.weight_bytes(model) == pytest.approx(rest + experts * 2 / 8)
    assert speed.weight_bytes(model) == 4 * speed.active_parameters(model.config)
    assert speed.weight_bytes(model, 10_000) == pytest.approx(rest + experts)


def test_a_picture_costs_the_text_its_keys_and_values_only():
    config = FusionConfig(256, 128, 352, 4, 4, 2, tie_word_embeddings=True, cross_attention_every=2)
    model = decoder.build(config, seed=0)
    named = [pair for block in model.seeing() for pair in block.cross.named_parameters()]
    cross = sum(p.nbytes for name, p in named if "kv_proj" not in name)
    assert speed.weight_bytes(model) == speed.weight_bytes(meta(decoder.preset("tiny"), torch.float32)) + cross
    assert speed.active_parameters(config) == speed.active_parameters(decoder.preset("tiny")) + cross // 4
    with torch.no_grad():
        image = model.encode_image(torch.randn(3, 3, 64, 64))
    # two blocks, keys and values, two heads of 32, 64 places of a 64-pixel picture, four bytes
    assert speed.cache_bytes(model, 0, image) == 2 * 2 * 2 * 32 * 64 * 4
    assert speed.cache_bytes(model, 7, image) - speed.cache_bytes(model, 0, image) == 7 * 4 * 2 * 2 * 32 * 4


def test_four_bits_are_counted_as_they_lie():
    model = decoder.build(decoder.preset("tiny"), seed=0)
    before = speed.weight_bytes(model)
    quantize_(model, group_size=32, skip=("lm_head",))
    linear = 4 * sum(128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 352 for _ in range(4))
    saved = linear - linear / 4 * (0.5 + 4 / 32)  # half a byte a weight; scale and zero, two bytes each, a group
    assert before - speed.weight_bytes(model) == pytest.approx(saved)


def test_the_same_shape_as_in_the_first_chapter():
    """roofline's DecoderShape, from four published numbers, and this, from the model, agree on what they both count."""
    model = meta(decoder.preset("1.3b"))
    head = 2 * 32256 * 2048 * 1023  # which works on the last token of a prompt alone
    for ours, theirs, less in (
        (speed.decode_work(model, 1024), CODER_1_3B.decode(1024), 0),
        (speed.decode_work(model, 1024, 64), CODER_1_3B.decode(1024, 64), 0),
        (speed.prefill_work(model, 1024), CODER_1_3B.prefill(1024), head),
    ):
        assert ours.bytes == pytest.approx(theirs.bytes, rel=0.02)
        assert ours.flops == pytest.approx(theirs.flops - less, rel=0.03 if less else 0.02)


def test_operations_against_torchs_own_counter():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = decoder.build(decoder.preset("tiny"), seed=0)
    ids = torch.zeros(2, 20, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, logits_at=torch.full((2, 1), 19))
    # Spelt out, attention multiplies the full square; a causal kernel does half of it and half the diagonal.
    hidden = 2 * 2 * 4 * model.config.multiplications_per_pair * (20 * 20 - 210)
    assert speed.prefill_work(model, 20, 2).flops == counter.get_total_flops() - hidden


def test_a_window_ends_the_growth_of_a_step():
    model = meta(decoder.preset("tiny", sliding_window=16))
    assert speed.decode_work(model, 100) == speed.decode_work(model, 400)
    assert speed.decode_work(model, 8).bytes < speed.decode_work(model, 100).bytes


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((4, 5, 1), "top_k: got 5, expected 1 to 4"),
        ((4, 2, -1), "tokens: got -1"),
        ((4, 2, math.nan), "tokens: got nan"),
    ],
)
def test_bad_numbers_are_named(numbers, message):
    with pytest.raises(ValueError, match=message):
        speed.expected_experts(*numbers)
