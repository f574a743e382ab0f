"""Loading refuses what does not fit, by name, and leaves the model alone then."""

import pytest
import torch
from transformers import MistralConfig

from dslib.architecture.checkpoint import config_from_hf, decoder_from_hf, load_hf_state_dict, to_hf_state_dict
from dslib.architecture.decoder import DecoderConfig, build

CONFIG = DecoderConfig(40, 16, 24, 2, 4, 2)
TIED = DecoderConfig(40, 16, 24, 2, 4, 2, tie_word_embeddings=True)
LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Q, K, UP = (f"model.layers.1.{part}.weight" for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"))
EMBED = "model.embed_tokens.weight"


def weights(config=CONFIG, seed=1):
    return {name: tensor.clone() for name, tensor in to_hf_state_dict(build(config, seed=seed)).items()}


def without(name):
    return lambda state: state.pop(name)


def changed(name, shape):
    return lambda state: state.update({name: torch.zeros(shape)})


BAD = [
    ("1 missing: model.norm.weight", without("model.norm.weight")),
    (f"1 missing: {UP}", without(UP)),
    ("1 missing: lm_head.weight", without("lm_head.weight")),
    ("1 extra: model.layers.2.mlp.up_proj.weight", changed("model.layers.2.mlp.up_proj.weight", (24, 16))),
    (f"1 extra: {Q.replace('weight', 'bias')}", changed(Q.replace("weight", "bias"), (16,))),
    (f"1 misshapen: {K} (8, 15), expected (8, 16)", changed(K, (8, 15))),
    (
        "1 misshapen: model.embed_tokens.weight (41, 16), expected (40, 16)",
        changed("model.embed_tokens.weight", (41, 16)),
    ),
    ("1 misshapen: model.norm.weight (), expected (16,)", changed("model.norm.weight", ())),
]


@pytest.mark.parametrize("message, damage", BAD, ids=[message for message, _ in BAD])
def test_misfits_are_named_and_the_model_is_left_as_it_was(message, damage):
    model = build(CONFIG, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = weights()
    damage(state)
    with pytest.raises(ValueError) as error:
        load_hf_state_dict(model, state)
    assert str(error.value) == f"state dict does not fit the config: {message}"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_parts_are_checked_one_by_one():
    """One head moved from the queries to the keys: the rows still add up, and the result would be nonsense."""
    state = weights()
    state.update({Q: torch.zeros(12, 16), K: torch.zeros(12, 16)})
    with pytest.raises(ValueError) as error:
        load_hf_state_dict(build(CONFIG), state)
    assert f"2 misshapen: {Q} (12, 16), expected (16, 16), {K} (12, 16), expected (8, 16)" in str(error.value)


def test_missing_and_extra_are_reported_together_and_long_lists_cut():
    state = {name.replace("model.", "transformer."): tensor for name, tensor in weights().items()}
    with pytest.raises(ValueError, match=r"20 missing: .* and 14 more; 20 extra: transformer\..* and 14 more$"):
        load_hf_state_dict(build(CONFIG), state)


def test_a_tied_model_takes_an_equal_head_and_refuses_another():
    model, state = build(TIED, seed=0), weights(TIED)
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    load_hf_state_dict(model, state)
    assert torch.equal(model.lm_head.weight, state["model.embed_tokens.weight"])
    before = model.norm.weight.clone()
    state["lm_head.weight"] += 1
    state["model.norm.weight"] += 1
    with pytest.raises(ValueError, match=r"^lm_head.weight: differs from model.embed_tokens.weight"):
        load_hf_state_dict(model, state)
    assert torch.equal(model.norm.weight, before)


def test_rotary_buffers_of_old_checkpoints_are_passed_over():
    state = weights()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    model = load_hf_state_dict(build(CONFIG, seed=0), state)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


def test_rows_are_stacked_query_key_value_and_gate_up():
    state = weights()
    layer = load_hf_state_dict(build(CONFIG, seed=0), state).layers[1]
    assert torch.equal(layer.self_attn.qkv_proj.weight[:16], state[Q])
    assert torch.equal(layer.self_attn.qkv_proj.weight[16:24], state[K])
    assert torch.equal(layer.mlp.gate_up_proj.weight[24:], state[UP])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoder_from_hf_has_the_weights_and_the_tie(tied, dtype):
    state = weights(TIED if tied else CONFIG)
    model = decoder_from_hf({**LLAMA, "tie_word_embeddings": tied}, state, dtype=dtype)
    assert (model.lm_head.weight is model.embed_tokens.weight) is tied
    assert not model.training
    assert all(torch.equal(tensor, state[name].to(dtype)) for name, tensor in to_hf_state_dict(model).items())


def test_config_json_written_by_transformers_4_and_by_5_read_alike():
    old = {**LLAMA, "rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}}
    assert config_from_hf(old) == config_from_hf(new)
    assert (config_from_hf(new).rope_theta, config_from_hf(new).rope_scaling) == (1e5, 4.0)
    assert config_from_hf({**old, "rope_scaling": None}).rope_scaling == 1.0


@pytest.mark.parametrize(
    "message, changes",
    [
        ("model_type: got 'gpt2', expected one of llama, mistral, qwen2", {"model_type": "gpt2"}),
        ("model_type: got None", {"model_type": None}),
        ("hidden_act: got 'gelu', expected 'silu'", {"hidden_act": "gelu"}),
        ("mlp_bias: got True", {"mlp_bias": True}),
        ("attention_bias: got True", {"attention_bias": True}),
        (
            "rope_type: got 'yarn', expected 'default' or 'linear'",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        ),
        ("rope_type: got 'dynamic'", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("rope_type: got 'llama3'", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}),
        ("vocab_size: got None", {"vocab_size": None}),
        ("num_attention_heads: got None", {"num_attention_heads": None, "num_key_value_heads": None}),
    ],
)
def test_configs_that_we_do_not_build_are_refused(message, changes):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**LLAMA, **changes})


@pytest.mark.parametrize("first, window", [(0, 8), (2, None), (28, None)])
def test_qwen2_window_is_for_all_layers_or_for_none(first, window):
    config = {**LLAMA, "model_type": "qwen2", "sliding_window": 8, "max_window_layers": first}
    assert config_from_hf(config).sliding_window is None
    assert config_from_hf({**config, "use_sliding_window": True}).sliding_window == window


def test_a_window_on_some_layers_only_is_refused():
    config = {**LLAMA, "model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1, "use_sliding_window": True}
    with pytest.raises(ValueError, match="max_window_layers: got 1, expected 0 or 2"):
        config_from_hf(config)


def test_a_mistral_file_without_a_window_has_mistrals_default():
    file = MistralConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96).to_dict()
    assert config_from_hf(file).sliding_window == file.pop("sliding_window") == 4096
    assert config_from_hf(file).sliding_window == 4096
    assert config_from_hf({**file, "sliding_window": None}).sliding_window is None
