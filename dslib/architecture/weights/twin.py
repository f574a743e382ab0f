"""The same weights in transformers' own class: what our decoders are compared with, in numbers and in speed.

Book: ``chapters/architecture/decoder.ipynb``.
"""

from typing import Any

import torch

from dslib.architecture.config import DecoderConfig, RopeScaling
from dslib.architecture.decoder import Decoder
from dslib.architecture.weights.checkpoint import to_hf_state_dict


def hf_twin(model: Decoder) -> Any:
    """The same weights in transformers' ``LlamaForCausalLM``, with the same dtype, on the same device, in eval mode.

    Raises:
        ValueError: the model has something that a plain Llama has not, such as experts or a window; as
            :func:`to_hf_state_dict`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    if type(config) is not DecoderConfig or config.sliding_window is not None or config.qkv_bias:
        raise ValueError("model: has experts, eyes, a window or biases, expected plain Llama")
    if config.qk_norm or isinstance(config.rope_scaling, RopeScaling):
        raise ValueError("model: has head norms or a rule of rope_scaling, expected plain Llama")
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling != 1.0:
        rope |= {"rope_type": "linear", "factor": config.rope_scaling}
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    )  # fmt: skip
    weight = model.embed_tokens.weight
    with torch.device("meta"):
        twin = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in names}, rope_parameters=rope))
    twin = twin.to(weight.dtype).to_empty(device=weight.device)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(twin.config).to(weight.device)  # its buffers were on meta
    twin.load_state_dict(to_hf_state_dict(model), strict=False)
    twin.tie_weights()
    return twin.eval()
