"""Our decoder and transformers' own classes, with the same random weights: the same logits, the same gradients."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dslib.architecture.decoder import build
from dslib.architecture.weights.checkpoint import decoder_from_hf, to_hf_state_dict
from dslib.architecture.weights.config import config_from_hf

VOCAB = 70
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LINEAR_4 = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100_000.0}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}

FAMILIES = {
    "multi-head": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "grouped": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2}),
    "multi-query": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1}),
    "tied": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "linear RoPE scaling": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4, "rope_parameters": LINEAR_4}),
    "small RoPE base": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "rope_parameters": PLAIN}),
    "large epsilon": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "rms_norm_eps": 0.1}),
    "wide heads": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "head_dim": 20}),
    "narrow heads": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "head_dim": 6}),
    "Mistral without a window": (MistralConfig, MistralForCausalLM, {"num_key_value_heads": 2, "sliding_window": None}),
    "Qwen2, biases": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2}),
    "Qwen2, tied": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "Qwen2, window in all layers": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ),
}


def pair(config_class, model_class, changes, attention="sdpa"):
    """(ours, theirs) with the same noisy weights, biases and norms included: nothing is left at its easy default."""
    torch.manual_seed(0)
    theirs = model_class(config_class(**SHAPE, **changes, attn_implementation=attention)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    return decoder_from_hf(theirs.config, theirs.state_dict()), theirs


def some_ids(tokens, batch=2):
    return torch.randint(VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_logits(family, attention):
    ours, theirs = pair(*family, attention)
    wanted = theirs(some_ids(61)).logits
    assert wanted.std() > 0.5
    torch.testing.assert_close(ours(some_ids(61)), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "window, tokens", [(1, 37), (2, 1), (5, 37), (16, 61), (36, 37), (37, 37), (200, 37), (33, 131)]
)
@torch.no_grad()
def test_windowed_logits_equal_mistral(window, tokens, attention):
    changes = {"num_key_value_heads": 2, "sliding_window": window}
    ours, theirs = pair(MistralConfig, MistralForCausalLM, changes, attention)
    assert ours.config.sliding_window == window
    torch.testing.assert_close(ours(some_ids(tokens)), theirs(some_ids(tokens)).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_windowed_logits_differ_from_those_without():
    """So that the comparison above cannot pass with the window ignored on both sides."""
    changes = {"num_key_value_heads": 2, "sliding_window": 16}
    _, local = pair(MistralConfig, MistralForCausalLM, changes)
    _, full = pair(MistralConfig, MistralForCausalLM, {**changes, "sliding_window": None})
    difference = (local(some_ids(61)).logits - full(some_ids(61)).logits).abs().amax((0, 2))
    assert difference[:16].max() < 1e-4
    assert difference[20:].min() > 1e-2


@pytest.mark.parametrize("kind", ["preallocated", "rolling"])
@torch.no_grad()
def test_decoding_with_a_window_equals_mistral_with_its_own_cache(kind):
    ours, theirs = pair(MistralConfig, MistralForCausalLM, {"num_key_value_heads": 2, "sliding_window": 8})
    ids, cache, past = some_ids(40), ours.make_cache(kind, batch_size=2, max_length=40), None
    for part in ids.split([13] + [1] * 27, dim=1):
        wanted = theirs(part, past_key_values=past, use_cache=True)
        past = wanted.past_key_values
        torch.testing.assert_close(ours(part, cache), wanted.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "family",
    [
        FAMILIES["grouped"],
        FAMILIES["tied"],
        FAMILIES["Qwen2, biases"],
        (MistralConfig, MistralForCausalLM, {"num_key_value_heads": 2, "sliding_window": 9}),
    ],
    ids=["grouped", "tied", "Qwen2, biases", "Mistral, window"],
)
def test_gradients(family):
    ours, theirs = pair(*family)
    ids = some_ids(33)
    for logits in (ours(ids), theirs(ids).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    with torch.no_grad():  # put the gradients where the weights are, and let the export name them
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
    got = to_hf_state_dict(ours)
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        assert scale > 1e-4, name
        torch.testing.assert_close(
            got[name], gradient, atol=1e-4 * scale, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_weights_go_to_transformers_and_give_the_same_logits(family):
    config_class, model_class, changes = family
    hf_config = config_class(**SHAPE, **changes)
    ours = build(config_from_hf(hf_config), seed=3).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    theirs = model_class(hf_config).eval()
    result = theirs.load_state_dict(to_hf_state_dict(ours), strict=False)
    theirs.tie_weights()
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= ({"lm_head.weight"} if hf_config.tie_word_embeddings else set())
    torch.testing.assert_close(ours(some_ids(29)), theirs(some_ids(29)).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_saved_checkpoint_folder_loads(tmp_path, monkeypatch):
    """What save_pretrained writes, in several files: the path that a real checkpoint takes (tokenizer aside)."""
    import transformers

    from dslib.architecture.weights.pretrained import load_folder

    _, theirs = pair(*FAMILIES["linear RoPE scaling"])
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: f"tokenizer of {folder}")
    ours, tokenizer = load_folder(tmp_path)
    assert tokenizer == f"tokenizer of {tmp_path}"
    torch.testing.assert_close(ours(some_ids(29)), theirs(some_ids(29)).logits, atol=1e-4, rtol=0)
