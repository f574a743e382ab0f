"""Loading refuses what does not fit, by name, and leaves the model alone then."""

import pytest
import torch
from torch import Tensor, nn

from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.int4.layers import quantize_
from dslib.architecture.moe import MoE
from dslib.architecture.sparse_decoder import SparseConfig
from dslib.architecture.weights.checkpoint import decoder_from_hf, load_hf_state_dict, to_hf_state_dict
from dslib.architecture.weights.twin import hf_twin

CONFIG = DecoderConfig(40, 16, 24, 2, 4, 2)
TIED = DecoderConfig(40, 16, 24, 2, 4, 2, tie_word_embeddings=True)
LLAMA = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
Q, K, UP = (f"model.layers.1.{part}.weight" for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"))
EMBED = "model.embed_tokens.weight"

SPARSE = SparseConfig(
    40, 16, 24, 3, 4, 2, num_experts=4, moe_intermediate_size=6, n_shared_experts=1, first_k_dense_replace=1,
    scoring_func="sigmoid", selection_bias=True, kv_lora_rank=5, q_lora_rank=7, qk_nope_head_dim=3, qk_rope_head_dim=4,
    v_head_dim=6,
)  # fmt: skip
MIXTRAL = SparseConfig(40, 16, 24, 2, 4, 2, num_experts=3, moe_intermediate_size=6)
HASHED = SparseConfig(40, 16, 24, 3, 4, 2, num_experts=4, moe_intermediate_size=6, num_hash_layers=2)
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"
STACKED = "model.layers.2.mlp.experts.gate_up_proj"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
ROTATED = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


def weights(config=CONFIG, layout="stacked", seed=1):
    model = build(config, seed=seed)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            nn.init.normal_(buffer)
    return {name: tensor.clone() for name, tensor in to_hf_state_dict(model, layout).items()}


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


# Models with experts


@pytest.mark.parametrize("config", [SPARSE, MIXTRAL, HASHED], ids=["latent", "Mixtral", "hash layers"])
@pytest.mark.parametrize("layout", ["stacked", "apart", "mixtral"])
def test_every_layout_of_experts_loads_to_the_same_model(config, layout):
    wanted = load_hf_state_dict(build(config, seed=0), weights(config)).state_dict()
    got = load_hf_state_dict(build(config, seed=0), weights(config, layout)).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in got.items())
    fresh = build(config, seed=0).state_dict()
    same = {name for name, tensor in got.items() if torch.equal(tensor, fresh[name])}
    assert all("norm" in name or "tid2eid" in name for name in same), "everything was loaded"


def test_single_experts_become_slices():
    state = weights(SPARSE, layout="apart")
    experts = load_hf_state_dict(build(SPARSE, seed=0), state).layers[2].mlp.experts
    assert torch.equal(experts.gate_up_proj[3, 6:], state[EXPERT])
    assert torch.equal(experts.gate_up_proj[3, :6], state[EXPERT.replace("up_proj", "gate_proj")])
    assert torch.equal(experts.down_proj[0], state["model.layers.2.mlp.experts.0.down_proj.weight"])


def test_rotary_pairs_side_by_side_go_half_a_head_apart():
    state = weights(SPARSE)
    state[ROTATED] = torch.arange(9.0).unsqueeze(1).expand(9, 16).clone()  # each row its own number
    queries = "model.layers.0.self_attn.q_b_proj.weight"
    state[queries] = torch.arange(28.0).unsqueeze(1).expand(28, 7).clone()
    attention = load_hf_state_dict(build(SPARSE, seed=0), state).layers[0].self_attn
    assert attention.kv_a_proj_with_mqa.weight[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 7, 6, 8]
    first_two_heads = [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 12, 11, 13]
    assert attention.q_b_proj.weight[:14, 0].tolist() == first_two_heads


def test_prediction_layers_and_old_buffers_are_passed_over_and_other_extra_layers_are_not():
    """As in DeepSeek-V3's files: the module for multi-token prediction has the number after the last layer."""
    state = weights(SPARSE, layout="apart") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    model = load_hf_state_dict(build(SPARSE, seed=0), state)
    extra = {name.replace("layers.2.", "layers.3."): tensor for name, tensor in state.items() if "layers.2." in name}
    with pytest.raises(ValueError, match=r"26 extra: model\.layers\.3\."):
        load_hf_state_dict(build(SPARSE, seed=0), {**state, **extra})
    module = {"eh_proj.weight": (16, 32), "enorm.weight": (16,), "shared_head.head.weight": (40, 16)}
    extra.update({f"model.layers.3.{name}": torch.zeros(shape) for name, shape in module.items()})
    got = load_hf_state_dict(build(SPARSE, seed=0), {**state, **extra}).state_dict()
    assert all(torch.equal(tensor, got[name]) for name, tensor in model.state_dict().items())


def test_the_selection_bias_keeps_its_precision_in_a_bfloat16_model():
    state = weights(SPARSE)
    model = load_hf_state_dict(build(SPARSE, dtype=torch.bfloat16), state)
    assert torch.equal(model.layers[1].mlp.router.e_score_correction_bias, state[BIAS])
    assert model.layers[1].mlp.router.weight.dtype is torch.bfloat16


# Bad input


def without(name):
    return lambda state: state.pop(name)


def changed(name, shape):
    return lambda state: state.update({name: torch.zeros(shape)})


def eight_bit(state):
    """V3's own files: matrices in float8, and a tensor of scales beside each."""
    state.update({EXPERT: state[EXPERT].to(torch.float8_e4m3fn), f"{EXPERT}_scale_inv": torch.ones(1, 1)})


def whole_numbers(state):
    state[Q] = state[Q].to(torch.int8)


def made(name, how):
    return lambda state: state.update({name: how(state[name])})


def on_meta(*names):
    return lambda state: state.update({name: state[name].to("meta") for name in names})


BAD = [
    (CONFIG, "stacked", "1 missing: model.norm.weight", without("model.norm.weight")),
    (CONFIG, "stacked", f"1 missing: {UP}", without(UP)),
    (CONFIG, "stacked", "1 missing: lm_head.weight", without("lm_head.weight")),
    (CONFIG, "stacked", "1 extra: model.layers.2.mlp.up_proj.weight",
     changed("model.layers.2.mlp.up_proj.weight", (24, 16))),
    (CONFIG, "stacked", f"1 extra: {Q.replace('weight', 'bias')}", changed(Q.replace("weight", "bias"), (16,))),
    (CONFIG, "stacked", f"1 misshapen: {K} (8, 15), expected (8, 16)", changed(K, (8, 15))),
    (CONFIG, "stacked", f"1 misshapen: {EMBED} (41, 16), expected (40, 16)", changed(EMBED, (41, 16))),
    (CONFIG, "stacked", "1 misshapen: model.norm.weight (), expected (16,)", changed("model.norm.weight", ())),
    (CONFIG, "stacked", f"1 without memory: {UP}", on_meta(UP)),
    (TIED, "stacked", f"1 without memory: {EMBED}", on_meta(EMBED)),
    *[(CONFIG, "stacked", f"1 that are no dense tensors of numbers: {name}", made(name, how))
      for name, how in ((UP, Tensor.to_sparse), (K, Tensor.numpy), (Q, lambda t: t + 1j), (EMBED, lambda t: None))],
    (CONFIG, "stacked", f"1 in 8 bits, to be multiplied out with their scales first: {Q}", whole_numbers),
    (SPARSE, "apart", f"1 missing: {EXPERT}", without(EXPERT)),
    (SPARSE, "apart", "1 extra: model.layers.2.mlp.experts.4.up_proj.weight",
     changed("model.layers.2.mlp.experts.4.up_proj.weight", (6, 16))),
    (SPARSE, "apart", f"1 misshapen: {EXPERT} (7, 16), expected (6, 16)", changed(EXPERT, (7, 16))),
    (SPARSE, "apart", f"2 without memory: {EXPERT}, lm_head.weight", on_meta("lm_head.weight", EXPERT)),
    (SPARSE, "apart", f"1 in 8 bits, to be multiplied out with their scales first: {EXPERT}", eight_bit),
    (SPARSE, "stacked", f"1 missing: {STACKED}", without(STACKED)),
    (SPARSE, "stacked", f"1 misshapen: {STACKED} (3, 12, 16), expected (4, 12, 16)", changed(STACKED, (3, 12, 16))),
    (SPARSE, "stacked", f"1 misshapen: {STACKED} (48, 16), expected (4, 12, 16)", changed(STACKED, (48, 16))),
    (SPARSE, "stacked", f"1 missing: {BIAS}", without(BIAS)),
    (SPARSE, "stacked", f"1 misshapen: {BIAS} (5,), expected (4,)", changed(BIAS, (5,))),
    (SPARSE, "stacked", f"1 misshapen: {ROTATED} (8, 16), expected (9, 16)", changed(ROTATED, (8, 16))),
    (SPARSE, "stacked", "1 extra: model.layers.0.mlp.gate.weight", changed("model.layers.0.mlp.gate.weight", (4, 16))),
]  # fmt: skip


@pytest.mark.parametrize("config, layout, message, damage", BAD, ids=[row[2] for row in BAD])
def test_misfits_are_named_and_the_model_is_left_as_it_was(config, layout, message, damage):
    model, state = build(config, seed=0), weights(config, layout)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    damage(state)
    with pytest.raises(ValueError) as error:
        load_hf_state_dict(model, state)
    assert str(error.value) == f"state dict does not fit the config: {message}"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def without_experts():
    """As experts are that were moved into another order."""
    model = build(MIXTRAL)
    model.layers[0].mlp.experts.down_proj.data = torch.empty(0)
    return model


class LowRank(nn.Linear):
    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.a = nn.Parameter(torch.zeros(1))


def adapted():
    model = build(CONFIG)
    model.layers[1].mlp.down_proj = LowRank(model.layers[1].mlp.down_proj)
    return model


@pytest.mark.parametrize("model, words", [
    (quantize_(build(CONFIG), 8), r"model: 8 missing, as in a quantised .*: layers\.0\.mlp\.down_proj\.weight"),
    (quantize_(build(MIXTRAL), 2), "model: .* missing, as in a quantised or wrapped model"),
    (nn.DataParallel(build(CONFIG)), "model: got a DataParallel, expected a Decoder"),
    (nn.Linear(2, 2), "model: got a Linear, expected a Decoder"),
    (build(CONFIG, device="meta"), r"model: .* without memory, expected to_empty\(\) before, .*: embed_tokens.weight"),
    (without_experts(), r"model: 1 without memory, .*, or fast\.release\(\) of packed ones: layers\.0\.mlp\.experts"),
])  # fmt: skip
def test_models_in_another_form_are_refused_in_both_directions(model, words):
    for call in (lambda: load_hf_state_dict(model, weights()), lambda: to_hf_state_dict(model)):
        with pytest.raises(ValueError, match=words):
            call()


def test_what_a_checkpoint_has_no_place_for_is_not_dropped():
    with pytest.raises(ValueError, match=r"1 that such a checkpoint has no place for: layers\.1\.mlp\.down_proj\.a"):
        to_hf_state_dict(adapted())
    for config in (SPARSE, DecoderConfig(40, 16, 24, 2, 4, 2, sliding_window=4)):
        with pytest.raises(ValueError, match="model: has experts, eyes, a window or biases, expected plain Llama"):
            hf_twin(build(config))
    for part, words in (
        ({"swiglu_limit": 10.0}, r"layers\.1\.mlp\.experts\.swiglu_limit is 10\.0, expected None"),
        ({"shared_expert_gate": True}, r"no place for: layers\.1\.mlp\.shared_expert_gate\.weight"),
    ):
        model = build(SPARSE)
        model.layers[1].mlp = MoE(16, 6, model.layers[1].mlp.router, n_shared_experts=1, **part)
        with pytest.raises(ValueError, match=words):
            to_hf_state_dict(model)
    with pytest.raises(ValueError, match="layout: got 'gguf', expected one of 'stacked', 'apart', 'mixtral'"):
        to_hf_state_dict(build(SPARSE), "gguf")


def test_a_compiled_model_has_the_names_of_the_plain_one():
    model = build(CONFIG, seed=0)
    inside = build(CONFIG, seed=0)
    inside.layers[0] = torch.compile(inside.layers[0], backend="eager")
    for compiled in (torch.compile(model, backend="eager"), inside):
        assert to_hf_state_dict(compiled).keys() == weights().keys()
        load_hf_state_dict(compiled, {f"_orig_mod.{name}": tensor for name, tensor in weights(seed=5).items()})
        assert all(torch.equal(tensor, weights(seed=5)[name]) for name, tensor in to_hf_state_dict(compiled).items())
