"""The decoder's shape: published parameter counts, presets, bad configurations, and that it trains."""

import math

import pytest
import torch
import torch.nn.functional as F

from dslib.architecture.config import PRESETS
from dslib.architecture.decoder import Decoder, DecoderConfig, build, count_parameters, preset

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "name, published",
    [("1.3b", 1_346_471_936), ("smollm2-135m", 134_515_008)],  # from the safetensors headers on the hub
)
def test_presets_have_the_published_number_of_parameters(name, published):
    model = build(preset(name), device="meta")
    assert count_parameters(model) == published
    assert all(parameter.is_meta for parameter in model.parameters())  # counted without memory


def test_parameters_by_hand():
    model = Decoder(DecoderConfig(**SMALL, qkv_bias=True))
    layer = 16 * 32 + 32 + 16 * 16 + 3 * 16 * 24 + 2 * 16  # qkv (4 + 2 + 2 heads of 4), its bias, o, SwiGLU, norms
    assert count_parameters(model) == 2 * layer + 16 + 2 * 50 * 16
    tied = Decoder(DecoderConfig(**SMALL, qkv_bias=True, tie_word_embeddings=True))
    assert count_parameters(tied) == 2 * layer + 16 + 50 * 16
    assert tied.lm_head.weight is tied.embed_tokens.weight


@pytest.mark.parametrize("name, elements", [("1.3b", 2 * 24 * 2048), ("smollm2-135m", 2 * 30 * 3 * 64)])
def test_kv_elements_per_token(name, elements):
    assert preset(name).kv_elements_per_token == elements


def test_deepseek_coder_preset_has_the_published_shape():
    config = preset("1.3b")
    assert (config.max_position_embeddings, config.rope_theta, config.rope_scaling) == (16384, 100_000.0, 4.0)
    assert (config.head_dim, config.rms_norm_eps, config.tie_word_embeddings) == (128, 1e-6, False)


@pytest.mark.parametrize("field, value", [("hidden_size", 64), ("num_attention_heads", 8)])
def test_a_changed_preset_derives_its_head_size_anew(field, value):
    config = preset("tiny", **{field: value})
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    assert preset("tiny", **{field: value}, head_dim=20).head_dim == 20


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="preset: got '7b'") as error:
        preset("7b")
    assert all(name in str(error.value) for name in PRESETS)


def test_unknown_field_is_named():
    with pytest.raises(ValueError, match=r"unknown field 'n_layers', expected one of .*num_hidden_layers"):
        preset("tiny", n_layers=3)


@pytest.mark.parametrize(
    "message, changes",
    [
        ("sliding_window: got 0, expected at least 1", {"sliding_window": 0}),
        ("sliding_window: got -4", {"sliding_window": -4}),
        ("attention_sinks: got -1", {"attention_sinks": -1}),
        ("vocab_size: got 0", {"vocab_size": 0}),
        ("num_hidden_layers: got 0", {"num_hidden_layers": 0}),
        ("num_attention_heads: got 0", {"num_attention_heads": 0}),
        ("num_key_value_heads: got 0", {"num_key_value_heads": 0}),
        ("max_position_embeddings: got 0", {"max_position_embeddings": 0}),
        ("hidden_size: got None", {"hidden_size": None}),
        ("hidden_size: got 18, expected a multiple of num_attention_heads=4", {"hidden_size": 18}),
        ("num_key_value_heads: got 3, expected a divisor of num_attention_heads=4", {"num_key_value_heads": 3}),
        ("head_dim: got 5, expected an even number", {"head_dim": 5}),
        ("head_dim: got 3, expected an even number", {"hidden_size": 12}),
    ],
)
def test_bad_configurations_name_the_field(message, changes):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**SMALL, **changes})


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.zeros(3, dtype=torch.long), r"input_ids: got shape \(3,\)"),
        (torch.zeros(1, 0, dtype=torch.long), r"input_ids: got shape \(1, 0\)"),
        (torch.zeros(1, 3), "input_ids: got dtype torch.float32"),
    ],
)
def test_bad_input_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        build(DecoderConfig(**SMALL))(ids)


@pytest.mark.parametrize("cache", [None, "growing", "preallocated"])
def test_ids_outside_the_vocabulary_raise_and_leave_the_cache_as_it_was(cache):
    model = build(DecoderConfig(**SMALL))
    held = cache and model.make_cache(cache)
    for bad in (50, -1):
        with pytest.raises(IndexError):
            model(torch.tensor([[1, bad]]), held)
    assert not held or held.length == 0


@pytest.mark.parametrize("window", [None, 8])
def test_trains(window):
    """Four short texts are learnt by heart in 40 steps, starting from the loss of a blind guess, ln(16)."""
    model = build(DecoderConfig(16, 32, 64, 2, 4, 2, tie_word_embeddings=True, sliding_window=window), seed=0)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    text = torch.randint(16, (4, 24), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(16), abs=0.2)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("tied", [False, True])
def test_with_window_shares_the_weights_and_changes_what_is_seen(tied):
    model = build(DecoderConfig(**SMALL, tie_word_embeddings=tied), seed=0).eval()
    local = model.with_window(3, sinks=1)
    built = Decoder(DecoderConfig(**SMALL, tie_word_embeddings=tied, sliding_window=3, attention_sinks=1))
    built.load_state_dict(model.state_dict())
    ids = torch.arange(12).unsqueeze(0)
    assert torch.equal(local(ids), built(ids))
    assert torch.equal(local.with_window(None)(ids), model(ids))
    assert (local(ids) - model(ids)).abs().max() > 1e-5
    assert not local.training
    pairs = zip(local.parameters(), model.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert (local.lm_head.weight is local.embed_tokens.weight) is tied
