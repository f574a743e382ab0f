"""Our configuration for a Hugging Face one: Llama, Mistral, Qwen2, Qwen3, Mixtral, DeepSeek-V2 and DeepSeek-V3.

A model that differs from ours in anything that changes its numbers is refused, by the name of the field.

Book: ``chapters/architecture/decoder.ipynb``, section "Real weights", and ``chapters/architecture/published.ipynb``.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dslib.architecture.config import DecoderConfig, Llama3, Yarn
from dslib.architecture.sparse_decoder import SparseConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "deepseek_v2", "deepseek_v3")
_DEEPSEEK = ("deepseek_v2", "deepseek_v3")
# Fields that say how experts are chosen: the one value for each that transformers' class of the family computes.
_FIXED = {
    "mixtral": {"router_jitter_noise": 0.0},
    "deepseek_v2": {"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_interleave": True},
}


def config_from_hf(config: Any) -> DecoderConfig:
    """Our configuration for a Hugging Face one (a config object, or the dict of a ``config.json``).

    Returns:
        A :class:`~dslib.architecture.sparse_decoder.SparseConfig` for the families with experts.

    Raises:
        ValueError: another model family, or a feature we do not build (another activation, dynamic or long RoPE,
            biases in the MLP, another way to choose experts).
    """
    get = config.get if isinstance(config, Mapping) else lambda key, default=None: getattr(config, key, default)
    family = get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type: got {family!r}, expected one of {', '.join(FAMILIES)}")
    if get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act: got {get('hidden_act')!r}, expected 'silu'")
    if get("mlp_bias", False):
        raise ValueError("mlp_bias: got True, expected False (SwiGLU without biases)")
    if family != "qwen2" and get("attention_bias", False):
        raise ValueError(
            "attention_bias: got True, expected False (only Qwen2's query, key and value biases are built)"
        )
    for name, expected in _FIXED.get(family, {}).items():
        if get(name, expected) != expected:
            raise ValueError(f"{name}: got {get(name)!r}, expected {expected!r} for {family}")
    common = {
        "vocab_size": get("vocab_size"),
        "hidden_size": get("hidden_size"),
        "intermediate_size": get("intermediate_size"),
        "num_hidden_layers": get("num_hidden_layers"),
        "num_attention_heads": get("num_attention_heads"),
        "num_key_value_heads": get("num_key_value_heads") or get("num_attention_heads"),
        "head_dim": get("head_dim", 128 if family == "qwen3" else None),  # Qwen3's default where a file has no key
        "max_position_embeddings": get("max_position_embeddings", 2048),
        "rms_norm_eps": get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": bool(get("tie_word_embeddings", False)),
        **_rope(family, get),
    }
    if family in _DEEPSEEK:
        return SparseConfig(**common, **_latent_attention(get), **_deepseek_experts(family, get))
    common["sliding_window"] = _window(family, get)
    if family == "mixtral":
        experts = {"num_experts": get("num_local_experts"), "num_experts_per_tok": get("num_experts_per_tok")}
        return SparseConfig(**common, **experts)
    return DecoderConfig(**common, qkv_bias=family == "qwen2", qk_norm=family == "qwen3")


def config_to_hf(config: SparseConfig) -> dict[str, Any]:
    """The fields of a ``config.json`` for transformers' DeepSeek-V3 class; all are set, as its defaults are V3's own.

    Those of the rule too, which that class does not read, but servers do: vLLM gives a router its bias by them.

    Raises ValueError for another rule of choice, or stretched positions.
    """
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps tie_word_embeddings kv_lora_rank q_lora_rank qk_nope_head_dim "
        "qk_rope_head_dim v_head_dim first_k_dense_replace num_experts_per_tok moe_intermediate_size n_shared_experts "
        "norm_topk_prob n_group topk_group routed_scaling_factor"
    ).split()
    if config.yarn is not None or config.scoring_func != "sigmoid" or not config.selection_bias:
        raise ValueError("config: got another rule of choice or stretched positions, expected DeepSeek-V3's, plain")
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16",
        **{name: getattr(config, name) for name in same}, "n_routed_experts": config.num_experts,
        "rope_theta": config.rope_theta, **_FIXED["deepseek_v3"], "hidden_act": "silu", "attention_bias": False,
        "num_nextn_predict_layers": 1, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip


def _rope(family: str, get: Callable) -> dict[str, Any]:
    theta = 1_000_000.0 if family == "mixtral" else 10_000.0  # the family's default where a file has no key
    # transformers 5 says rope_parameters; checkpoints written for 4.x say rope_theta and rope_scaling.
    rope = get("rope_parameters") or {"rope_theta": get("rope_theta", theta), **(get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    expected = ("default", "linear", "yarn") if family in _DEEPSEEK else ("default", "linear", "yarn", "llama3")
    if kind not in expected:
        raise ValueError(f"rope_type: got {kind!r}, expected {' or '.join(map(repr, expected))}")
    fields = {"rope_theta": float(rope.get("rope_theta") or get("rope_theta", theta))}
    if kind == "linear":
        fields["rope_scaling"] = float(rope.get("factor", 1.0))
    # Where a file does not say how long the old context was, transformers takes the new one.
    before = rope.get("original_max_position_embeddings") or get("max_position_embeddings", 2048)
    if kind == "yarn":
        fields["yarn" if family in _DEEPSEEK else "rope_scaling"] = _yarn(rope, before)
    if kind == "llama3":
        slow_and_fast = (float(rope[name]) for name in ("low_freq_factor", "high_freq_factor"))
        fields["rope_scaling"] = Llama3(float(rope["factor"]), before, *slow_and_fast)
    return fields


def _yarn(rope: Mapping[str, Any], before: int) -> Yarn:
    for name, expected in (("attention_factor", None), ("truncate", True)):
        if rope.get(name, expected) != expected:
            raise ValueError(f"{name}: got {rope[name]!r}, expected {expected!r} with rope_type 'yarn'")
    if rope.get("mscale") and not rope.get("mscale_all_dim") and rope["mscale"] != 1:
        # DeepSeek's code then scales by mscale, transformers' by 1; no published model has such a configuration.
        raise ValueError(f"mscale: got {rope['mscale']!r} without mscale_all_dim, expected both or neither")
    optional = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    return Yarn(
        rope.get("factor") or 1.0,
        before,
        **{name: float(rope[name]) for name in optional if rope.get(name)},
    )


def _window(family: str, get: Callable) -> int | None:
    window = get("sliding_window", 4096 if family == "mistral" else None)  # Mistral's default where a file has no key
    if family in ("qwen2", "qwen3"):
        # Their configs carry a window that is switched off, or that only the layers from max_window_layers on have.
        layers, full = get("num_hidden_layers"), get("max_window_layers", 28)
        if not get("use_sliding_window", False) or full >= layers:
            window = None
        elif window is not None and full > 0:
            raise ValueError(f"max_window_layers: got {full}, expected 0 or {layers} (one window for all layers)")
    return window


def _latent_attention(get: Callable) -> dict[str, Any]:
    names = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {name: get(name) for name in names}


def _deepseek_experts(family: str, get: Callable) -> dict[str, Any]:
    groups = {"n_group": get("n_group") or 1, "topk_group": get("topk_group") or 1}
    rule = {"scoring_func": "sigmoid", "selection_bias": True, "norm_topk_prob": bool(get("norm_topk_prob", True))}
    if family == "deepseek_v2":
        rule = {"norm_topk_prob": False}
        method = get("topk_method", "greedy")
        if method == "greedy":
            groups = {}
        elif method != "group_limited_greedy":
            raise ValueError(f"topk_method: got {method!r}, expected 'greedy' or 'group_limited_greedy'")
    return {
        "num_experts": get("n_routed_experts"),
        "num_experts_per_tok": get("num_experts_per_tok"),
        "moe_intermediate_size": get("moe_intermediate_size"),
        "n_shared_experts": get("n_shared_experts") or 0,
        "first_k_dense_replace": get("first_k_dense_replace") or 0,
        "routed_scaling_factor": get("routed_scaling_factor", 1.0),
        **rule,
        **groups,
    }
