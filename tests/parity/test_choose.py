"""Bytes of weights and caches, as choosing counts them, are those of transformers' models of the same configuration."""

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dslib.scenarios.facts import cache_bytes, model

CODER = LlamaConfig(
    vocab_size=32256, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16,
    num_key_value_heads=16, tie_word_embeddings=False,
)  # fmt: skip
DISTILLED = Qwen2Config(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
# Sizes of DeepSeek's published configurations.
LITE = DeepseekV2Config(
    vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
    num_attention_heads=16, num_key_value_heads=16, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
    first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128,
    v_head_dim=128, n_group=1, topk_group=1,
)  # fmt: skip
V3 = DeepseekV3Config(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
    num_attention_heads=128, num_key_value_heads=128, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
    first_k_dense_replace=3, kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64, qk_nope_head_dim=128,
    v_head_dim=128,
)  # fmt: skip


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(config).to(torch.bfloat16)


def kept(network, config, tokens):
    """Bytes that transformers' cache holds after ``tokens`` tokens."""
    past = DynamicCache(config=config)
    network.model(torch.zeros(1, tokens, dtype=torch.long, device="meta"), past_key_values=past, use_cache=True)
    return sum(t.nbytes for layer in past.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize(
    ("name", "kind", "config", "near"),
    [
        ("coder_1_3b", LlamaForCausalLM, CODER, 0),
        ("r1_distill_1_5b", Qwen2ForCausalLM, DISTILLED, 0),
        ("v2_lite", DeepseekV2ForCausalLM, LITE, 1e-3),  # published as 15.7B
        ("v3", DeepseekV3ForCausalLM, V3, 1e-3),  # as 671B
    ],
)
def test_weights(name, kind, config, near):
    network = on_meta(kind, config)
    stored = model(name).stored("float16")
    assert stored.low == stored.high == pytest.approx(sum(p.nbytes for p in network.parameters()), rel=near, abs=0)


def test_weights_of_a_model_of_your_own():
    """What the page counts by hand for Mistral 7B, from the table of its paper."""
    config = MistralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    block = 2 * 4096 * (4096 + 8 * 128) + 3 * 4096 * 14336
    norms = (2 * 32 + 1) * 4096  # which the page leaves out
    assert on_meta(MistralForCausalLM, config).num_parameters() == 2 * 32_000 * 4096 + 32 * block + norms


def test_cache_of_heads_and_of_a_window():
    shape = model("coder_1_3b").facts["cache"].value
    assert cache_bytes(shape, 100) == kept(on_meta(LlamaForCausalLM, CODER), CODER, 100)
    shape = model("r1_distill_1_5b").facts["cache"].value
    assert cache_bytes(shape, 100) == kept(on_meta(Qwen2ForCausalLM, DISTILLED), DISTILLED, 100)
    grouped = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    shape = {"kind": "heads", "layers": 3, "kv_heads": 2, "head_dim": 8}
    assert cache_bytes(shape, 37) == kept(on_meta(LlamaForCausalLM, grouped), grouped, 37)
    windowed = MistralConfig(**grouped.to_dict() | {"sliding_window": 16, "model_type": "mistral"})
    network = on_meta(MistralForCausalLM, windowed)
    # Between two steps transformers keeps one token fewer: the next one brings its own.
    assert cache_bytes(shape | {"window": 16}, 37) == kept(network, windowed, 37) / 15 * 16
    assert cache_bytes(shape | {"window": 16}, 9) == kept(network, windowed, 9)


@pytest.mark.parametrize(
    ("name", "kind", "config"), [("v2_lite", DeepseekV2ForCausalLM, LITE), ("v3", DeepseekV3ForCausalLM, V3)]
)
def test_cache_of_latents(name, kind, config):
    """What the model's own layers make for the cache: a latent and one rotary key (transformers unfolds them first)."""
    network = on_meta(kind, config)
    a_token = sum(2 * layer.self_attn.kv_a_proj_with_mqa.out_features for layer in network.model.layers)
    assert model(name).cache(1000).low == 1000 * a_token
