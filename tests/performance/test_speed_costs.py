"""Costs from the configuration, against counts from real tensors and plain loops."""

import dataclasses

import pytest
import torch

from dslib.architecture import decoder
from dslib.architecture.cache import visible
from dslib.performance import speed


@pytest.mark.parametrize("name", ["tiny", "smollm2-135m", "1.3b"])
def test_matrix_parameters_are_those_of_the_model(name):
    model = decoder.build(decoder.preset(name), device="meta")
    matrices = sum(p.numel() for key, p in model.layers.named_parameters() if p.ndim == 2)
    assert speed.matrix_parameters(model.config) == matrices + model.lm_head.weight.numel()


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (5, 0), (5, 2), (8, 8), (30, 3)])
@pytest.mark.parametrize("length", [1, 4, 5, 6, 23])
def test_visible_pairs_are_the_ones_in_the_mask(length, window, sinks):
    at = torch.arange(length)
    assert speed.visible_pairs(length, window, sinks) == int(visible(at, at, window, sinks).sum())


def test_kv_bytes_are_those_of_the_caches():
    config = decoder.preset("tiny", sliding_window=16, attention_sinks=4)
    model = decoder.build(config, seed=0).eval()
    cache = model.make_cache("rolling", batch_size=3)
    assert cache.nbytes == speed.kv_bytes(config, 500, bytes_per_number=4, batch_size=3)
    full = decoder.build(dataclasses.replace(config, sliding_window=None, attention_sinks=0))
    cache = full.make_cache("growing")
    with torch.inference_mode():
        full(torch.zeros(1, 37, dtype=torch.long), cache)
    assert cache.nbytes == speed.kv_bytes(full.config, 37, bytes_per_number=4)


def test_the_coder_keeps_what_its_configuration_says():
    assert speed.kv_bytes(decoder.preset("1.3b"), 1) == 196_608


def test_operations_by_hand():
    config = decoder.DecoderConfig(10, 8, 16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1)
    # 3 tokens see 1 + 2 + 3 keys; scores and sums: 2 heads of 4, 2 operations each, twice, 3 layers
    assert speed.attention_flops(config, 3) == 6 * (2 * 4) * 2 * 2 * 3
    assert speed.matrix_flops(config, 3) == 2 * 3 * (3 * (8 * (8 + 8 + 4 + 4) + 3 * 8 * 16) + 80)
