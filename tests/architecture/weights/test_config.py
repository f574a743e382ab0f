"""Hugging Face configurations: read as they are, or refused by the field that differs."""

import pytest
from transformers import DeepseekV2Config, DeepseekV3Config, MistralConfig, MixtralConfig

from dslib.architecture.published import Yarn
from dslib.architecture.sparse_decoder import PRESETS, SparseConfig
from dslib.architecture.weights.config import config_from_hf

LLAMA = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
QWEN2 = {**LLAMA, "model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}
# In the form of the hub's config.json files, which were written for transformers 4.
_YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
V2 = {
    "model_type": "deepseek_v2", "attention_bias": False, "hidden_act": "silu", "vocab_size": 102400,
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
    "num_attention_heads": 128, "num_key_value_heads": 128, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "norm_topk_prob": False,
    "scoring_func": "softmax", "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3,
    "routed_scaling_factor": 16.0, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "tie_word_embeddings": False, "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "pretraining_tp": 1,
}  # fmt: skip
V2_LITE = {
    **V2, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "q_lora_rank": None,
    "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
}  # fmt: skip
V3 = {
    **V2, "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "first_k_dense_replace": 3, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": True, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "topk_group": 4, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
    "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "sliding_window": None, "router_aux_loss_coef": 0.02, "output_router_logits": False,
}  # fmt: skip


@pytest.mark.parametrize("file, name", [(V2_LITE, "deepseek-v2-lite"), (V2, "deepseek-v2"), (V3, "deepseek-v3")])
def test_published_files_are_the_presets(file, name):
    assert config_from_hf(file) == PRESETS[name]


@pytest.mark.parametrize("file, config_class", [(V2_LITE, DeepseekV2Config), (V2, DeepseekV2Config),
                                                (V3, DeepseekV3Config), (MIXTRAL, MixtralConfig)])  # fmt: skip
def test_a_config_object_of_transformers_5_reads_like_the_file(file, config_class):
    given = {key: value for key, value in file.items() if key not in ("model_type", "quantization_config")}
    config = config_class(**given)
    assert not hasattr(config, "rope_scaling") or "rope_parameters" in config.to_dict()
    assert config_from_hf(config) == config_from_hf(file) == config_from_hf(config.to_dict())


def test_mixtral():
    config = config_from_hf(MIXTRAL)
    assert config == SparseConfig(
        32000, 4096, 14336, 32, 32, 8, max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-5,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=14336, norm_topk_prob=True,
    )  # fmt: skip
    assert config_from_hf({**MIXTRAL, "sliding_window": 4096}).sliding_window == 4096
    without = {key: value for key, value in MIXTRAL.items() if key != "rope_theta"}
    assert config_from_hf(without).rope_theta == config_from_hf(MixtralConfig()).rope_theta == 1e6


def test_greedy_means_without_groups():
    assert config_from_hf({**V2, "topk_method": "greedy"}).n_group == 1
    assert (config_from_hf(V2).n_group, config_from_hf(V2).topk_group) == (8, 3)


def test_other_rope_of_deepseek():
    assert config_from_hf({**V2, "rope_scaling": None}).yarn is None
    linear = config_from_hf({**V2, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert (linear.yarn, linear.rope_scaling) == (None, 4.0)
    assert config_from_hf({**V2, "rope_scaling": _YARN}).yarn == Yarn(40, 4096, mscale=1.0, mscale_all_dim=0.0)


def test_config_json_written_by_transformers_4_and_by_5_read_alike():
    old = {**LLAMA, "rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}}
    assert config_from_hf(old) == config_from_hf(new)
    assert (config_from_hf(new).rope_theta, config_from_hf(new).rope_scaling) == (1e5, 4.0)
    assert config_from_hf({**old, "rope_scaling": None}).rope_scaling == 1.0


@pytest.mark.parametrize("first, window", [(0, 8), (2, None), (28, None)])
def test_qwen2_window_is_for_all_layers_or_for_none(first, window):
    config = {**QWEN2, "max_window_layers": first}
    assert config_from_hf({**config, "use_sliding_window": False}).sliding_window is None
    assert config_from_hf(config).sliding_window == window


def test_a_mistral_file_without_a_window_has_mistrals_default():
    file = MistralConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96).to_dict()
    assert config_from_hf(file).sliding_window == file.pop("sliding_window") == 4096
    assert config_from_hf(file).sliding_window == 4096
    assert config_from_hf({**file, "sliding_window": None}).sliding_window is None


def scaling(**changes):
    return {"rope_scaling": {**V3["rope_scaling"], **changes}}


@pytest.mark.parametrize(
    "message, file",
    [
        ("model_type: got 'gpt2', expected one of llama, mistral, qwen2", {**LLAMA, "model_type": "gpt2"}),
        ("model_type: got None", {**LLAMA, "model_type": None}),
        ("hidden_act: got 'gelu', expected 'silu'", {**LLAMA, "hidden_act": "gelu"}),
        ("mlp_bias: got True", {**LLAMA, "mlp_bias": True}),
        ("attention_bias: got True", {**LLAMA, "attention_bias": True}),
        ("rope_type: got 'dynamic'", {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("max_window_layers: got 1, expected 0 or 2", {**QWEN2, "model_type": "qwen3", "max_window_layers": 1}),
        ("attention_bias: got True", {**LLAMA, "model_type": "qwen3", "attention_bias": True}),
        ("vocab_size: got None", {**LLAMA, "vocab_size": None}),
        ("num_attention_heads: got None", {**LLAMA, "num_attention_heads": None, "num_key_value_heads": None}),
        ("max_window_layers: got 1, expected 0 or 2", {**QWEN2, "max_window_layers": 1}),
        ("model_type: got 'qwen3_moe', expected one of llama, ", {**MIXTRAL, "model_type": "qwen3_moe"}),
        ("scoring_func: got 'sigmoid', expected 'softmax' for deepseek_v2", {**V2, "scoring_func": "sigmoid"}),
        ("scoring_func: got 'softmax', expected 'sigmoid' for deepseek_v3", {**V3, "scoring_func": "softmax"}),
        ("norm_topk_prob: got True, expected False for deepseek_v2", {**V2, "norm_topk_prob": True}),
        ("topk_method: got 'noaux_tc', expected 'greedy' or", {**V2, "topk_method": "noaux_tc"}),
        ("topk_method: got 'greedy', expected 'noaux_tc' for deepseek_v3", {**V3, "topk_method": "greedy"}),
        ("moe_layer_freq: got 2, expected 1", {**V3, "moe_layer_freq": 2}),
        ("rope_interleave: got False, expected True", {**V3, "rope_interleave": False}),
        ("router_jitter_noise: got 0.1, expected 0.0 for mixtral", {**MIXTRAL, "router_jitter_noise": 0.1}),
        ("attention_bias: got True", {**V3, "attention_bias": True}),
        ("mlp_bias: got True", {**V2, "mlp_bias": True}),
        ("hidden_act: got 'gelu'", {**MIXTRAL, "hidden_act": "gelu"}),
        ("rope_type: got 'dynamic', expected 'default' or 'linear' or 'yarn'", {**V3, **scaling(type="dynamic")}),
        ("attention_factor: got 2.0, expected None", {**V3, **scaling(attention_factor=2.0)}),
        ("truncate: got False, expected True", {**V3, **scaling(truncate=False)}),
        ("mscale: got 0.7 without mscale_all_dim", {**V3, **scaling(mscale=0.7, mscale_all_dim=0)}),
        ("q_lora_rank: got 1536, expected None without kv_lora_rank", {**V3, "kv_lora_rank": None}),
        ("num_experts: got None, expected a whole number of at least 1", {**V3, "n_routed_experts": None}),
        ("num_experts: got None, expected a whole number of at least 1", {**MIXTRAL, "num_local_experts": None}),
        ("num_experts_per_tok: got None", {**V2, "num_experts_per_tok": None}),
        ("moe_intermediate_size: got 0", {**V2, "moe_intermediate_size": 0}),
        ("n_group: got 7, expected a divisor of num_experts=256", {**V3, "n_group": 7}),
    ],
)
def test_what_is_not_built_is_refused_by_name(message, file):
    with pytest.raises(ValueError, match=message):
        config_from_hf(file)
