"""Weights in and out: Hugging Face Llama, Mistral and Qwen2 checkpoints <-> our decoder.

The layouts differ in two places only: ours keeps query, key and value (and gate and up) as one matrix, theirs apart.

Book: ``chapters/architecture/decoder.ipynb``, section "Real weights".
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dslib.architecture.decoder import Decoder, DecoderConfig, build

_FAMILIES = ("llama", "mistral", "qwen2")
# Where each of our fused matrices comes from, rows in this order.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_PLAIN = (
    "self_attn.o_proj.weight",
    "mlp.down_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)


def config_from_hf(config: Any) -> DecoderConfig:
    """Our configuration for a Hugging Face one (a config object, or the dict of a ``config.json``).

    Raises:
        ValueError: another model family, or a feature we do not build (another activation, RoPE other than plain or
            linearly scaled, biases in the MLP).
    """
    get = config.get if isinstance(config, Mapping) else lambda key, default=None: getattr(config, key, default)
    family = get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"model_type: got {family!r}, expected one of {', '.join(_FAMILIES)}")
    if get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act: got {get('hidden_act')!r}, expected 'silu'")
    if get("mlp_bias", False):
        raise ValueError("mlp_bias: got True, expected False (SwiGLU without biases)")
    if family != "qwen2" and get("attention_bias", False):
        raise ValueError(
            "attention_bias: got True, expected False (only Qwen2's query, key and value biases are built)"
        )
    # transformers 5 says rope_parameters; checkpoints written for 4.x say rope_theta and rope_scaling.
    rope = get("rope_parameters") or {"rope_theta": get("rope_theta", 10_000.0), **(get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(f"rope_type: got {kind!r}, expected 'default' or 'linear'")
    window = get("sliding_window", 4096 if family == "mistral" else None)  # Mistral's default where a file has no key
    if family == "qwen2":
        # Qwen2 configs carry a window that is switched off, or that only the layers from max_window_layers on have.
        layers, full = get("num_hidden_layers"), get("max_window_layers", 28)
        if not get("use_sliding_window", False) or full >= layers:
            window = None
        elif window is not None and full > 0:
            raise ValueError(f"max_window_layers: got {full}, expected 0 or {layers} (one window for all layers)")
    return DecoderConfig(
        vocab_size=get("vocab_size"),
        hidden_size=get("hidden_size"),
        intermediate_size=get("intermediate_size"),
        num_hidden_layers=get("num_hidden_layers"),
        num_attention_heads=get("num_attention_heads"),
        num_key_value_heads=get("num_key_value_heads") or get("num_attention_heads"),
        head_dim=get("head_dim"),
        max_position_embeddings=get("max_position_embeddings", 2048),
        rope_theta=float(rope.get("rope_theta") or get("rope_theta", 10_000.0)),
        rope_scaling=float(rope.get("factor", 1.0)) if kind == "linear" else 1.0,
        rms_norm_eps=get("rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(get("tie_word_embeddings", False)),
        sliding_window=window,
        qkv_bias=family == "qwen2",
    )


def _sources(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """Our tensor name -> the Hugging Face names whose rows it stacks."""
    names = {"embed_tokens.weight": ("model.embed_tokens.weight",), "norm.weight": ("model.norm.weight",)}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        for fused, parts in _FUSED.items():
            kinds = ("weight", "bias") if config.qkv_bias and fused == "self_attn.qkv_proj" else ("weight",)
            for kind in kinds:
                names[f"{ours}{fused}.{kind}"] = tuple(f"{theirs}{part}.{kind}" for part in parts)
        for name in _PLAIN:
            names[ours + name] = (theirs + name,)
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = ("lm_head.weight",)
    return names


def _rows(config: DecoderConfig, parts: tuple[str, ...], ours: Tensor) -> list[int]:
    """How many rows of our tensor come from each of the Hugging Face tensors that it stacks."""
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {3: [query, key, key], 2: [config.intermediate_size] * 2, 1: [ours.shape[0]]}[len(parts)]


def load_hf_state_dict(model: Decoder, state_dict: Mapping[str, Tensor]) -> Decoder:
    """Copy the weights of a Llama, Mistral or Qwen2 ``ForCausalLM`` into ``model``, in place; returns ``model``.

    A tied model may come with or without ``lm_head.weight``; if it comes, it must equal the embedding. Buffers of old
    checkpoints (``rotary_emb.inv_freq``) are passed over.

    Raises:
        ValueError: naming the missing, the extra and the misshapen tensors. The model is then left as it was.
    """
    config = model.config
    sources = _sources(config)
    given = {name: tensor for name, tensor in state_dict.items() if not name.endswith("rotary_emb.inv_freq")}
    wanted = {part for parts in sources.values() for part in parts}
    extra = sorted(set(given) - wanted)
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        embedding = given.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(given["lm_head.weight"], embedding):
            raise ValueError("lm_head.weight: differs from model.embed_tokens.weight, but the config ties them")
    problems = _listed("missing", sorted(wanted - set(given))) + _listed("extra", extra)
    ours = dict(model.named_parameters())
    if not problems:
        misshapen = []
        for name, parts in sources.items():
            for part, rows in zip(parts, _rows(config, parts, ours[name]), strict=True):
                expected = (rows, *ours[name].shape[1:])
                if given[part].shape != expected:
                    misshapen.append(f"{part} {tuple(given[part].shape)}, expected {expected}")
        problems = _listed("misshapen", misshapen)
    if problems:
        raise ValueError("state dict does not fit the config: " + "; ".join(problems))
    with torch.no_grad():
        for name, parts in sources.items():
            ours[name].copy_(torch.cat([given[part] for part in parts]))
    return model


def to_hf_state_dict(model: Decoder) -> dict[str, Tensor]:
    """The model's weights under the names of a Hugging Face ``ForCausalLM`` (views of the same memory)."""
    parameters, out = dict(model.named_parameters()), {}
    for name, parts in _sources(model.config).items():
        pieces = parameters[name].split(_rows(model.config, parts, parameters[name]))
        out.update(zip(parts, (piece.detach() for piece in pieces), strict=True))
    return out


def decoder_from_hf(config: Any, state_dict: Mapping[str, Tensor], *, dtype=torch.float32, device="cpu") -> Decoder:
    """A decoder with the shape of a Hugging Face config and the weights of its state dict, in eval mode."""
    model = build(config_from_hf(config), device="meta", dtype=dtype).to_empty(device=device)
    model.tie_weights()  # to_empty gave each its own memory
    return load_hf_state_dict(model, state_dict).eval()


def _listed(what: str, names: list[str], most: int = 6) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{len(names)} {what}: {', '.join(names[:most])}{more}"]
