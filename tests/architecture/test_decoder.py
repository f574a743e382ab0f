"""The decoder's shape: published parameter counts, presets, what is refused, and that it trains."""

import math

import pytest
import torch
import torch.nn.functional as F

from dslib import fast
from dslib.architecture.config import PRESETS, Llama3, Yarn
from dslib.architecture.decoder import Decoder, DecoderConfig, build, count_parameters, preset
from dslib.architecture.generation import generate

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "name, published, elements",
    [("1.3b", 1_346_471_936, 2 * 24 * 2048), ("smollm2-135m", 134_515_008, 2 * 30 * 3 * 64)],
)
def test_presets_have_the_published_sizes(name, published, elements):
    """Parameters from the safetensors headers on the hub, counted without memory; cached numbers by hand."""
    model = build(preset(name), device="meta")
    assert count_parameters(model) == published
    assert all(parameter.is_meta for parameter in model.parameters())
    assert preset(name).kv_elements_per_token == elements


def test_parameters_by_hand():
    model = Decoder(DecoderConfig(**SMALL, qkv_bias=True))
    layer = 16 * 32 + 32 + 16 * 16 + 3 * 16 * 24 + 2 * 16  # qkv (4 + 2 + 2 heads of 4), its bias, o, SwiGLU, norms
    assert count_parameters(model) == 2 * layer + 16 + 2 * 50 * 16
    tied = Decoder(DecoderConfig(**SMALL, qkv_bias=True, tie_word_embeddings=True))
    assert count_parameters(tied) == 2 * layer + 16 + 50 * 16
    assert tied.lm_head.weight is tied.embed_tokens.weight


def test_deepseek_coder_preset_has_the_published_shape():
    config = preset("1.3b")
    assert (config.max_position_embeddings, config.rope_theta, config.rope_scaling) == (16384, 100_000.0, 4.0)
    assert (config.head_dim, config.rms_norm_eps, config.tie_word_embeddings) == (128, 1e-6, False)


@pytest.mark.parametrize("field, value", [("hidden_size", 64), ("num_attention_heads", 8)])
def test_a_changed_preset_derives_its_head_size_anew(field, value):
    config = preset("tiny", **{field: value})
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    assert preset("tiny", **{field: value}, head_dim=20).head_dim == 20


@pytest.mark.parametrize(
    "message, call",
    [
        (f"preset: got '7b', expected one of {', '.join(map(repr, PRESETS))}", lambda: preset("7b")),
        (r"unknown field 'n_layers', expected one of .*num_hidden_layers", lambda: preset("tiny", n_layers=3)),
        ("factor: got 0.5, expected at least 1", lambda: Llama3(0.5, 64)),
        ("original_max_position_embeddings: got 0", lambda: Yarn(2.0, 0)),
        ("high_freq_factor: got 1.0, expected a number above 1.0", lambda: Llama3(2.0, 64, 1.0, 1.0)),
        ("low_freq_factor: got 0", lambda: Llama3(2.0, 64, 0, 1.0)),
        ("beta_slow, beta_fast: got 4.0 and 2.0", lambda: Yarn(2.0, 64, beta_fast=2.0, beta_slow=4.0)),
        ("mscale: got -1", lambda: Yarn(2.0, 64, mscale=-1)),
        (r"input_ids: got shape \(3,\)", lambda: build(DecoderConfig(**SMALL))(torch.zeros(3, dtype=torch.long))),
        (r"input_ids: got shape \(1, 0\)", lambda: build(DecoderConfig(**SMALL))(torch.zeros(1, 0).long())),
        ("input_ids: got dtype torch.float32", lambda: build(DecoderConfig(**SMALL))(torch.zeros(1, 3))),
    ],
)
def test_bad_calls_are_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


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
        ("rope_scaling: got 0", {"rope_scaling": 0.0}),
        ("rope_scaling: got {'factor': 2.0}", {"rope_scaling": {"factor": 2.0}}),
        ("rope_theta: got -1.0", {"rope_theta": -1.0}),
    ],
)
def test_bad_configurations_name_the_field(message, changes):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**SMALL, **changes})


@pytest.mark.parametrize("cache", [None, "growing", "preallocated"])
@pytest.mark.parametrize("bad", [50, -1])
def test_ids_outside_the_vocabulary_raise_and_leave_the_cache_as_it_was(cache, bad):
    model = build(DecoderConfig(**SMALL))
    held = cache and model.make_cache(cache)
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


@pytest.mark.parametrize(
    "changes",
    [{"qk_norm": True}, {"rope_scaling": Llama3(4.0, 8)}, {"rope_scaling": Yarn(4.0, 8)}, {"rope_scaling": 3.0}],
    ids=str,
)
def test_a_prepared_model_computes_what_the_modules_compute(changes):
    """A shortcut that does not know a feature has to stand aside."""
    model = build(DecoderConfig(**SMALL, **changes, qkv_bias=True), seed=0).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.4)
    ids, cache = torch.arange(30).view(1, 30), model.make_cache(max_length=30)
    with torch.no_grad():
        wanted, text = model(ids), generate(model, [[1, 2]], 30)[0].tokens
        fast.prepare(model)
        got = torch.cat([model(part, cache) for part in ids.split([7] + [1] * 23, dim=1)], dim=1)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert generate(model, [[1, 2]], 30)[0].tokens == text


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_changes_nothing_in_a_model_with_a_dtype(default):
    plain = build(DecoderConfig(**SMALL), seed=0)
    text = generate(plain, [[1, 2, 3], [4]], 12)
    torch.set_default_dtype(default)
    try:
        model = build(DecoderConfig(**SMALL), dtype=torch.float32)
        model.load_state_dict(plain.state_dict())
        assert generate(model, [[1, 2, 3], [4]], 12) == text
        assert model(torch.tensor([[1]])).dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
