"""The decoder with experts: published sizes, caches, hash routing, and configurations that are refused."""

import dataclasses

import pytest
import torch

from dslib.architecture import balance, decoder
from dslib.architecture.decoder import build, count_parameters
from dslib.architecture.depth import ExitRule, early_exit, exit_loss
from dslib.architecture.generation import generate
from dslib.architecture.layers import Attention, SwiGLU
from dslib.architecture.moe import MoE
from dslib.architecture.published import MultiHeadLatentAttention, Yarn
from dslib.architecture.sparse_decoder import PRESETS, SparseConfig, SparseDecoder, preset
from dslib.data.published_figures import figure
from dslib.performance import speed

VOCAB = 50
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
}  # fmt: skip
LATENT = {"kv_lora_rank": 12, "q_lora_rank": 14, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 9}
KINDS = {
    "plain": {},
    "window": {"sliding_window": 5, "attention_sinks": 1},
    "latent": LATENT,
    "latent, YaRN": {**LATENT, "yarn": Yarn(4.0, 16, mscale_all_dim=1.0)},
    "V3's rule": {
        **LATENT, "first_k_dense_replace": 1, "n_shared_experts": 2, "scoring_func": "sigmoid", "selection_bias": True,
        "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5,
    },
    "hash layers": {"num_hash_layers": 2, "scoring_func": "sqrtsoftplus", "selection_bias": True},
}  # fmt: skip
EACH_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def noisy(dtype=torch.float32, **changes):
    """A small decoder whose logits have a spread of about one, so that a small mistake shows."""
    model = build(SparseConfig(**{**SMALL, **changes}), seed=0)
    for name, parameter in model.named_parameters():
        std = 1.0 if name.endswith("router.weight") else 0.2
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=std)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):
            torch.nn.init.normal_(buffer, std=0.2)
    return model.to(dtype).eval()


def some_ids(batch, tokens, seed=0):
    return torch.randint(VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


# Shapes


PUBLISHED = {"deepseek-v2-lite": "deepseek_v2_lite", "deepseek-v2": "deepseek_v2", "deepseek-v3": "deepseek_v3"}


@pytest.mark.parametrize(
    "name, total, active, with_embedding",
    [
        ("deepseek-v2-lite", "15.7", "2.45", "2.66"),  # published as 2.4: cut off, not rounded
        ("deepseek-v2", "236", "20.9", "21.4"),
        ("deepseek-v3", "671", "36.6", "37.6"),
    ],
)
def test_published_models_have_the_published_parameters(name, total, active, with_embedding):
    """In billions. Only the count without the embedding gives 2.4 and 37 as well as 21."""
    model, entry = build(preset(name), device="meta"), PUBLISHED[name]
    assert all(parameter.is_meta for parameter in model.parameters())  # counted without memory
    counted = speed.active_parameters(model.config)
    assert f"{count_parameters(model) / 1e9:.3g}" == total
    assert f"{counted / 1e9:.3g}" == active
    assert f"{(counted + model.embed_tokens.weight.numel()) / 1e9:.3g}" == with_embedding
    assert float(total) == figure(entry, "params_total").value / 1e9
    published = figure(entry, "params_active").value / 1e9
    assert published in (round(counted / 1e9), int(counted / 1e8) / 10)


@pytest.mark.parametrize("name, entry", PUBLISHED.items())
def test_published_presets_agree_with_the_data_file(name, entry):
    config, names = preset(name), {
        "layers": "num_hidden_layers", "hidden_size": "hidden_size", "heads": "num_attention_heads",
        "kv_rank": "kv_lora_rank", "rope_dim": "qk_rope_head_dim", "experts_routed": "num_experts",
        "experts_active": "num_experts_per_tok", "experts_shared": "n_shared_experts",
        "expert_dim": "moe_intermediate_size",
    }  # fmt: skip
    for published, ours in names.items():
        assert getattr(config, ours) == figure(entry, published).value, published
    if name != "deepseek-v2-lite":
        assert config.q_lora_rank == figure(entry, "q_rank").value
        assert config.qk_nope_head_dim == config.v_head_dim == figure(entry, "head_dim").value


def test_the_articles_model_is_the_sibling_of_the_coder():
    """16 experts, 2 for a token, 24 layers, and as much work a token as V1 but for the router."""
    config, dense = preset("article"), decoder.preset("1.3b")
    assert (config.num_experts, config.num_experts_per_tok, config.num_hidden_layers) == (16, 2, 24)
    for field in dataclasses.fields(dense):
        assert getattr(config, field.name) == getattr(dense, field.name), field.name
    routers = config.num_hidden_layers * config.num_experts * config.hidden_size
    assert speed.active_parameters(config) == speed.active_parameters(dense) + routers
    experts = 3 * config.num_hidden_layers * config.hidden_size * config.moe_intermediate_size * 16
    unchanged = count_parameters(build(dense, device="meta")) - 3 * 24 * 2048 * 5504
    assert count_parameters(build(config, device="meta")) == unchanged + experts + routers


def test_parameters_by_hand():
    model = build(SparseConfig(**{**SMALL, **KINDS["V3's rule"], "num_experts": 9}))
    attention = 32 * 14 + 14 + 14 * 4 * 16 + 32 * 18 + 12 + 12 * 4 * 19 + 4 * 9 * 32
    expert, shared, dense = 3 * 32 * 20, 3 * 32 * 40, 3 * 32 * 48
    always = 3 * (attention + 2 * 32) + dense + 2 * (shared + 9 * 32) + 32 + VOCAB * 32  # head included, embedding not
    assert count_parameters(model) == always + VOCAB * 32 + 2 * 9 * expert
    assert speed.active_parameters(model.config) == always + 2 * 2 * expert
    vectors = 3 * (14 + 12 + 2 * 32) + 32
    assert speed.matrix_parameters(model.config) == always + 2 * 2 * expert - vectors


@pytest.mark.parametrize("tied", [False, True])
def test_active_parameters_of_a_dense_decoder_are_all_but_the_embedding(tied):
    config = decoder.preset("tiny", tie_word_embeddings=tied)
    expected = count_parameters(build(config)) - (0 if tied else 256 * 128)
    assert speed.active_parameters(config) == expected


def test_operations_of_latent_attention():
    config = SparseConfig(**{**SMALL, **LATENT})
    # 4 tokens see 1 + 2 + 3 + 4 keys: scores of 10 + 6 numbers and values of 9, 4 heads, 3 layers, 2 operations each
    assert speed.attention_flops(config, 4) == 10 * (16 + 9) * 4 * 3 * 2
    assert speed.kv_bytes(config, 100, bytes_per_number=2) == 100 * 3 * 18 * 2
    assert speed.kv_bytes(SparseConfig(**SMALL), 100, bytes_per_number=2) == 100 * 3 * 2 * 2 * 8 * 2


def test_blocks_are_dense_first_then_sparse():
    model, plain = noisy(**LATENT, first_k_dense_replace=2), noisy()
    assert [type(layer.mlp) for layer in model.layers] == [SwiGLU, SwiGLU, MoE]
    assert {type(layer.self_attn) for layer in model.layers} == {MultiHeadLatentAttention}
    assert {type(layer.self_attn) for layer in plain.layers} == {Attention}
    assert (model.layers[0].mlp.down_proj.in_features, model.layers[2].mlp.experts.intermediate_size) == (48, 20)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_changed(name):
    changed = preset(name, num_hidden_layers=4, first_k_dense_replace=1)
    assert (changed.num_hidden_layers, changed.num_experts) == (4, preset(name).num_experts)
    with pytest.raises(ValueError, match=f"preset '{name}': unknown field 'n_experts'"):
        preset(name, n_experts=4)


# Running


@EACH_KIND
@pytest.mark.parametrize("cache", ["growing", "preallocated", "rolling"])
@torch.no_grad()
def test_steps_equal_the_forward_pass_without_a_cache(kind, cache):
    model, ids = noisy(**kind), some_ids(2, 24)
    if cache == "rolling" and "sliding_window" not in kind:
        return
    held = model.make_cache(cache, batch_size=2, max_length=24)
    got = torch.cat([model(part, held) for part in ids.split([9] + [1] * 10 + [5], dim=1)], dim=1)
    torch.testing.assert_close(got, model(ids), atol=5e-5, rtol=1e-4)


@EACH_KIND
@torch.no_grad()
def test_each_sequence_of_a_batch_is_as_alone(kind):
    """Other sequences share the experts' products, and must not show in the result; nor does where a sequence is."""
    model, prompts = noisy(**kind), [some_ids(1, length, seed)[0] for seed, length in enumerate([3, 11, 7])]
    together = generate(model, prompts, 9)
    assert [result.tokens for result in together] == [generate(model, [p], 9)[0].tokens for p in prompts]
    ids = some_ids(3, 10)
    torch.testing.assert_close(model(ids)[1:2], model(ids[1:2]), atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_hash_layers_choose_by_token_id_alone():
    model = noisy(**KINDS["hash layers"], first_k_dense_replace=1, num_hidden_layers=4)
    ids = some_ids(2, 30)
    model(ids)
    first, second, third = (layer.mlp for layer in model.layers[1:])
    for layer in (first, second):
        assert torch.equal(layer.last_routing.indices, layer.router.tid2eid[ids.flatten()])
        assert layer.router.e_score_correction_bias is None
    assert not torch.equal(first.router.tid2eid, second.router.tid2eid), "another table in every layer"
    assert third.router.tid2eid is None
    assert third.router.e_score_correction_bias is not None
    again = build(model.config, seed=9)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(ids), model(ids))


@EACH_KIND
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_the_state_dict_is_complete(kind, tied):
    model = noisy(**kind, tie_word_embeddings=tied)
    again = build(model.config, device="meta")
    again.load_state_dict(model.state_dict(), assign=True)
    again.tie_weights()
    assert torch.equal(again.eval()(some_ids(1, 12)), model(some_ids(1, 12)))


@torch.no_grad()
def test_in_bfloat16_the_selection_bias_stays_in_float32():
    model = build(SparseConfig(**{**SMALL, **KINDS["V3's rule"]}), seed=0, dtype=torch.bfloat16).eval()
    assert model.layers[1].mlp.router.e_score_correction_bias.dtype is torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    cache = model.make_cache(max_length=8)
    assert (cache.buffer.dtype, model(some_ids(1, 8), cache).dtype) == (torch.bfloat16, torch.bfloat16)


@EACH_KIND
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_no_number(kind, default):
    """Neither those of the model nor those about it."""
    model, ids, rule = noisy(**kind, num_hidden_layers=4), some_ids(2, 12), ExitRule(0.5, 2)

    def numbers():
        logits, routing = model(ids), model.layers[-1].mlp.last_routing
        stats = balance.load_statistics(routing.indices, 6)
        found = [balance.total_balance_loss(model, switch=1.0, sequence=1.0, z=1.0, batch_size=2)]
        found += [balance.switch_loss(routing.scores, routing.indices), exit_loss(model, ids, ids, rule)]
        found += [stats.share, torch.tensor([stats.max_vio, stats.entropy, stats.idle], dtype=torch.float32)]
        return [*found, logits, early_exit(model, ids, rule).confidence]

    wanted = numbers()
    torch.set_default_dtype(default)
    try:
        got = numbers()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)  # dtypes too


@torch.no_grad()
def test_with_window_works_for_plain_attention():
    model = noisy()
    local = model.with_window(4)
    assert isinstance(local, SparseDecoder)
    assert (local(some_ids(1, 20)) - model(some_ids(1, 20))).abs().max() > 0.1
    with pytest.raises(ValueError, match="sliding_window, attention_sinks, qkv_bias: expected none of them"):
        noisy(**LATENT).with_window(4)


# What is refused


@pytest.mark.parametrize("message, changes", [
    ("num_experts: got 0, expected at least 1", {"num_experts": 0}),
    ("num_experts: got None, expected a whole number of at least 1", {"num_experts": None}),
    ("num_experts_per_tok: got 0, expected at least 1", {"num_experts_per_tok": 0}),
    ("top_k: got 7, expected 1 to num_experts=6", {"num_experts_per_tok": 7}),
    ("moe_intermediate_size: got 0", {"moe_intermediate_size": 0}),
    ("n_shared_experts: got -1, expected at least 0", {"n_shared_experts": -1}),
    (r"first_k_dense_replace: got 4, expected 0 to 3", {"first_k_dense_replace": 4}),
    (r"first_k_dense_replace: got -1", {"first_k_dense_replace": -1}),
    (r"num_hash_layers: got 3, expected 0 to 2", {"first_k_dense_replace": 1, "num_hash_layers": 3}),
    ("scoring_func: got 'relu'", {"scoring_func": "relu"}),
    ("n_group: got 4, expected a divisor of num_experts=6", {"n_group": 4}),
    ("topk_group: got 4, expected 1 to n_group=3", {"n_group": 3, "topk_group": 4}),
    ("top_k: got 3, expected at most 2", {"n_group": 3, "topk_group": 1, "num_experts_per_tok": 3}),
    ("n_group: got 6, expected groups of at least 2", {"n_group": 6, "topk_group": 3, "scoring_func": "sigmoid"}),
    ("q_lora_rank: got 8, expected None without kv_lora_rank", {"q_lora_rank": 8}),
    ("v_head_dim: got 8, expected None without kv_lora_rank", {"v_head_dim": 8}),
    ("yarn: got Yarn.*, expected None without kv_lora_rank", {"yarn": Yarn(2.0, 16)}),
    ("kv_lora_rank: got 0, expected at least 1", {**LATENT, "kv_lora_rank": 0}),
    ("q_lora_rank: got 0, expected at least 1", {**LATENT, "q_lora_rank": 0}),
    ("qk_nope_head_dim: got None, expected a whole number of at least 1", {**LATENT, "qk_nope_head_dim": None}),
    ("v_head_dim: got 0", {**LATENT, "v_head_dim": 0}),
    ("qk_rope_head_dim: got 5, expected an even number", {**LATENT, "qk_rope_head_dim": 5}),
    ("sliding_window, attention_sinks, qkv_bias: expected none", {**LATENT, "sliding_window": 8}),
    ("sliding_window, attention_sinks, qkv_bias: expected none", {**LATENT, "qkv_bias": True}),
    ("qk_norm: got True", {**LATENT, "qk_norm": True}),
    ("rope_scaling: got Yarn.*, expected a number with latent attention, or yarn", {
        **LATENT, "rope_scaling": Yarn(2.0, 16)}),
    ("rope_scaling: got 2.0, expected 1.0 beside yarn", {**LATENT, "yarn": Yarn(2.0, 16), "rope_scaling": 2.0}),
    ("hidden_size: got 0", {"hidden_size": 0}),
    ("num_attention_heads: got None", {**LATENT, "num_attention_heads": None}),
])  # fmt: skip
def test_bad_configurations_name_the_field(message, changes):
    with pytest.raises(ValueError, match=f"^{message}"):
        SparseConfig(**{**SMALL, **changes})


@pytest.mark.parametrize("layers, dense, hashed", [
    ([0], 1, 0), ([0, 1, 2], 2, 1), ([2, 3, 4], 0, 2), ([5], 0, 0), ([4, 0], 1, 0), (range(6), 2, 2),
])  # fmt: skip
def test_the_configuration_of_some_layers_counts_them(layers, dense, hashed):
    config = SparseConfig(**{**SMALL, "num_hidden_layers": 6, "first_k_dense_replace": 2, "num_hash_layers": 2})
    some = config.of_layers(layers)
    got = some.num_hidden_layers, some.first_k_dense_replace, some.num_hash_layers
    assert got == (len(layers), dense, hashed) and (some == config) == (len(layers) == 6)
