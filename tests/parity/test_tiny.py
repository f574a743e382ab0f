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
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dslib.architecture.config import DecoderConfig, Llama3, Yarn
from dslib.architecture.decoder import build
from dslib.architecture.weights.checkpoint import decoder_from_hf, to_hf_state_dict
from dslib.architecture.weights.config import config_from_hf

VOCAB = 70
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip
SHAPE = {**SIZES, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
LINEAR_4 = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100_000.0}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
LLAMA, MISTRAL = (LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM)
QWEN2 = (Qwen2Config, Qwen2ForCausalLM)
FAMILIES = {
    "multi-head": (*LLAMA, {"num_key_value_heads": 4}),
    "grouped": (*LLAMA, {"num_key_value_heads": 2}),
    "multi-query": (*LLAMA, {"num_key_value_heads": 1}),
    "tied": (*LLAMA, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "linear RoPE scaling": (*LLAMA, {"num_key_value_heads": 4, "rope_parameters": LINEAR_4}),
    "small RoPE base": (*LLAMA, {"num_key_value_heads": 2, "rope_parameters": PLAIN}),
    "large epsilon": (*LLAMA, {"num_key_value_heads": 2, "rms_norm_eps": 0.1}),
    "wide heads": (*LLAMA, {"num_key_value_heads": 2, "head_dim": 20}),
    "narrow heads": (*LLAMA, {"num_key_value_heads": 2, "head_dim": 6}),
    "Mistral without a window": (*MISTRAL, {"num_key_value_heads": 2, "sliding_window": None}),
    "Mistral, window": (*MISTRAL, {"num_key_value_heads": 2, "sliding_window": 9}),
    "Qwen2, biases": (*QWEN2, {"num_key_value_heads": 2}),
    "Qwen2, tied": (*QWEN2, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "Qwen2, window in all layers": (
        *QWEN2, {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}
    ),
}  # fmt: skip
# What our configuration has besides SIZES; the class of theirs, and what theirs has.
LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0, "beta_slow": 2.0}
SCALED = {"mscale": 0.8, "mscale_all_dim": 0.5}
NEWER = {
    "Llama 3.1": ({"rope_scaling": Llama3(**LLAMA3)}, LLAMA, {"rope_type": "llama3", **LLAMA3}),
    "Llama 3.1, narrow band": (
        {"rope_scaling": Llama3(2.0, 20, 0.5, 1.0)}, LLAMA, {
            "rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 20, "low_freq_factor": 0.5,
            "high_freq_factor": 1.0,
        },
    ),
    "YaRN": ({"rope_scaling": Yarn(**YARN)}, LLAMA, {"rope_type": "yarn", **YARN}),
    "YaRN, two scales": ({"rope_scaling": Yarn(**YARN, **SCALED)}, LLAMA, {"rope_type": "yarn", **YARN, **SCALED}),
    "YaRN, as written": (
        {"rope_scaling": Yarn(16.0, 8)}, LLAMA,
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8},
    ),
    "Qwen3": ({"qk_norm": True, "head_dim": 16, "rms_norm_eps": 1e-6}, (Qwen3Config, Qwen3ForCausalLM), {}),
    "Mistral, window": ({"sliding_window": 7}, MISTRAL, {}),
}  # fmt: skip


def noisy(model):
    """Biases and norms included: nothing is left at its easy default."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    return model.eval()


def pair(config_class, model_class, changes, attention="sdpa"):
    """(ours, theirs) with the same noisy weights."""
    theirs = noisy(model_class(config_class(**SHAPE, **changes, attn_implementation=attention)))
    return decoder_from_hf(theirs.config, theirs.state_dict()), theirs


@torch.no_grad()
def newer_pair(name, dtype=torch.float64):
    """(ours, theirs) for what is in NEWER, in any format; ours is read from theirs, and is what NEWER says."""
    fields, (config_class, model_class), rope = NEWER[name]
    wanted = DecoderConfig(**SIZES, num_key_value_heads=2, rope_theta=500.0, **fields)
    shared = {key: getattr(wanted, key) for key in ("head_dim", "rms_norm_eps", "num_key_value_heads")}
    window = {"sliding_window": 7} if model_class is MistralForCausalLM else {}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, **rope}}
    theirs = noisy(model_class(config_class(**SHAPE, **shared, **window, **rope, attn_implementation="sdpa"))).to(dtype)
    ours = decoder_from_hf(theirs.config, theirs.state_dict(), dtype=dtype)
    assert ours.config == wanted
    return ours, theirs


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


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", NEWER)
@torch.no_grad()
def test_logits_of_newer_families(name, dtype, close):
    """Beyond the length of pre-training; in one go and in pieces. Theirs takes norms and angles in float32 always."""
    ours, theirs = newer_pair(name, dtype)
    ids = some_ids(250)
    wanted = theirs(ids).logits
    assert wanted.std() > 0.5
    torch.testing.assert_close(ours(ids), wanted, atol=close, rtol=0)
    cache = ours.make_cache(batch_size=2, max_length=250)
    got = torch.cat([ours(part, cache) for part in ids.split([200, 1, 40, *[1] * 9], dim=1)], dim=1)
    torch.testing.assert_close(got, wanted, atol=close, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [None, "growing", "preallocated"])
@pytest.mark.parametrize("name", NEWER)
@torch.no_grad()
def test_padded_batches(name, kind, side):
    """An attention mask, and positions from its running sum: whole, or a prompt and then token by token (left only)."""
    ours, theirs = newer_pair(name)
    ids, mask = some_ids(24, batch=3), torch.ones(3, 24, dtype=torch.int64)
    mask[0, :9], mask[2, :1] = 0, 0
    mask = mask if side == "left" else mask.flip(1)
    at = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    cache = kind and ours.make_cache(kind, batch_size=3, max_length=24)
    past, seen = None, 0
    for tokens in (24,) if kind is None or side == "right" else (15, *[1] * 6, 3):
        new, seen = slice(seen, seen + tokens), seen + tokens
        out = theirs(
            ids[:, new], attention_mask=mask[:, :seen], position_ids=at[:, new], past_key_values=past, use_cache=True
        )
        past, real = out.past_key_values, mask[:, new].bool()
        got = ours(ids[:, new], cache, attention_mask=mask[:, :seen])
        torch.testing.assert_close(got[real], out.logits[real], atol=1e-5, rtol=0)
    also = ours(ids, None, at, attention_mask=mask.bool())  # positions may be said as well, and the mask be of bools
    assert torch.equal(also[mask.bool()], ours(ids, attention_mask=mask)[mask.bool()])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "window, tokens", [(1, 37), (2, 1), (5, 37), (16, 61), (36, 37), (37, 37), (200, 37), (33, 131)]
)
@torch.no_grad()
def test_windowed_logits_equal_mistral(window, tokens, attention):
    ours, theirs = pair(*MISTRAL, {"num_key_value_heads": 2, "sliding_window": window}, attention)
    assert ours.config.sliding_window == window
    torch.testing.assert_close(ours(some_ids(tokens)), theirs(some_ids(tokens)).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_windowed_logits_differ_from_those_without():
    """So that the comparison above cannot pass with the window ignored on both sides."""
    local, full = (pair(*MISTRAL, {"num_key_value_heads": 2, "sliding_window": size})[1] for size in (16, None))
    difference = (local(some_ids(61)).logits - full(some_ids(61)).logits).abs().amax((0, 2))
    assert difference[:16].max() < 1e-4
    assert difference[20:].min() > 1e-2


@pytest.mark.parametrize("kind", ["preallocated", "rolling"])
@torch.no_grad()
def test_decoding_with_a_window_equals_mistral_with_its_own_cache(kind):
    ours, theirs = pair(*MISTRAL, {"num_key_value_heads": 2, "sliding_window": 8})
    ids, cache, past = some_ids(40), ours.make_cache(kind, batch_size=2, max_length=40), None
    for part in ids.split([13] + [1] * 27, dim=1):
        wanted = theirs(part, past_key_values=past, use_cache=True)
        past = wanted.past_key_values
        torch.testing.assert_close(ours(part, cache), wanted.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["grouped", "tied", "Qwen2, biases", "Mistral, window"])
def test_gradients(name):
    ours, theirs = pair(*FAMILIES[name])
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


def test_gradients_of_head_norms():
    ours, theirs = newer_pair("Qwen3")
    ids, gradients = some_ids(33), []
    for model, attentions in (
        (ours, [block.self_attn for block in ours.layers]),
        (theirs, [layer.self_attn for layer in theirs.model.layers]),
    ):
        logits = model(ids) if model is ours else model(ids).logits
        norms = [norm.weight for attention in attentions for norm in (attention.q_norm, attention.k_norm)]
        gradients.append(torch.autograd.grad(F.cross_entropy(logits.transpose(1, 2), ids), norms))
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_weights_go_to_transformers_and_give_the_same_logits(family):
    config_class, model_class, changes = family
    hf_config = config_class(**SHAPE, **changes)
    ours = noisy(build(config_from_hf(hf_config)))
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
