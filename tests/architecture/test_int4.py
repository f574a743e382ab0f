"""4-bit layers: the packed order, whole models, and what can go wrong."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from dslib import fast
from dslib.architecture.decoder import DecoderConfig, build, with_layers
from dslib.architecture.experts import Experts
from dslib.architecture.int4.layers import Int4Experts, Int4Linear, nbytes, quantize_
from dslib.architecture.int4.levels import METHODS, half_quadratic, pack, round_to_nearest, unpack
from dslib.architecture.moe import MoE, Router
from dslib.architecture.sparse_decoder import SparseConfig

DENSE = DecoderConfig(64, 64, 96, 2, 4, 2)
SPARSE = SparseConfig(64, 64, 96, 2, 4, 2, num_experts=4, moe_intermediate_size=64, n_shared_experts=1)
IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def broken(value):
    weight = random(64, 128)
    weight[5, 70] = value
    return weight


@pytest.mark.parametrize("shape", [(64, 32), (128, 6), (2, 2), (96, 32), (200, 10)])
def test_packing_can_be_undone(shape):
    codes = torch.randint(16, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (shape[0], shape[1] // 2)
    assert torch.equal(unpack(packed), codes) and torch.equal(pack(codes.long()), packed)


def test_bytes_are_those_of_the_tensors():
    model = quantize_(build(DENSE, device="meta"), 32)
    rows = 2 * (64 * (128 + 64 + 192) + 96 * 64)
    assert nbytes(model) == rows // 2 + rows // 32 * 4 + 4 * (2 * 64 * 64 + 5 * 64)


# --- levels


@pytest.mark.parametrize("method, symmetric", [("rtn", False), ("rtn", True), ("hqq", False)])
@pytest.mark.parametrize("value", [0.0, 0.375, -2.0])
def test_groups_of_equal_weights_are_exact(method, symmetric, value):
    weight = random(64, 64)
    weight[3, 32:] = value
    back = Int4Linear.from_weight(weight, 32, method, symmetric).dequantize()
    assert torch.equal(back[3, 32:], weight[3, 32:])


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=64, max_size=64),
    st.sampled_from([8, 16, 32]),
)
def test_rounding_moves_a_weight_by_half_a_step_at_most(values, group_size):
    groups = torch.tensor(values).view(-1, group_size)
    found = round_to_nearest(groups)
    # Scale and zero are stored in bfloat16, with a relative error of 2**-9 each; the scale's counts 8 times.
    size = groups.abs().amax(-1, keepdim=True)
    slack = 2**-9 * (8 * found.scales.float().abs() + found.zeros.float().abs() + size) + 1e-30
    error = (found.dequantize() - groups).abs()
    assert (error <= found.scales.float().abs() / 2 + slack).all()


@given(st.integers(0, 10_000), st.sampled_from([8, 16, 32, 64]), st.sampled_from([1e-4, 1.0, 300.0]))
def test_hqq_makes_no_group_worse_in_what_it_minimises(seed, group_size, size):
    groups = size * random(64, group_size, seed=seed) * (1 + 4 * (random(64, group_size, seed=seed + 1) > 2))
    before, after = (
        ((method(groups).dequantize() - groups).abs() ** 0.7).sum(-1) for method in (round_to_nearest, half_quadratic)
    )
    assert (after <= before).all() and after.sum() < before.sum()


# --- whole models


def test_a_decoder_and_its_experts_are_replaced():
    model = build(SPARSE, seed=0).eval()
    with torch.no_grad():
        before = model(IDS)
        assert quantize_(model) is model
        after = model(IDS)
    kinds = {type(module) for module in model.modules()}
    assert {Int4Linear, Int4Experts} <= kinds and Experts not in kinds
    assert type(model.lm_head) is nn.Linear and not any(module.training for module in model.modules())
    assert 0.01 < (after - before).norm() / before.norm() < 0.3


def test_a_model_of_transformers_is_quantised():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **shape)).eval()
    with torch.no_grad():
        before = model(IDS).logits
        after = quantize_(model)(IDS).logits
    assert sum(isinstance(module, Int4Linear) for module in model.modules()) == 2 * 7
    assert 0.005 < (after - before).norm() / before.norm() < 0.3


def test_skip_takes_full_names_and_last_parts_only():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "ab": nn.Linear(64, 64)})
    quantize_(model, skip=("a.0",))
    kinds = {name: isinstance(m, Int4Linear) for name, m in model.named_modules() if name in ("a.0", "a.1", "ab")}
    assert kinds == {"a.0": False, "a.1": True, "ab": True}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@torch.no_grad()
def test_experts_multiply_nothing_that_is_left_out(bad):
    layer, x, weights = Int4Experts(Experts(3, 64, 64)), torch.randn(4, 64), torch.rand(4, 2)
    indices = torch.tensor([[3, 3], [0, 3], [3, 2], [1, 2]])  # 3: none
    want = layer(x, indices, weights.masked_fill(indices == 3, 0))
    x[0], weights[1, 1], weights[2, 0] = bad, bad, bad
    got = layer(x, indices, weights)
    assert torch.equal(got, want) and (got[0] == 0).all()


def test_what_has_two_names_is_replaced_once_and_under_both():
    model = nn.Module()
    model.first = model.second = nn.Linear(64, 64)
    model.experts = model.others = Experts(2, 64, 64)
    model.block = model.again = nn.Sequential(nn.Linear(64, 64))
    model.kept = model.left = nn.Linear(64, 64)
    quantize_(model, skip=("left",))
    assert model.first is model.second and isinstance(model.first, Int4Linear)
    assert model.experts is model.others and isinstance(model.experts, Int4Experts)
    assert model.block is model.again and isinstance(model.block[0], Int4Linear)
    assert model.kept is model.left and type(model.kept) is nn.Linear


def test_a_draft_that_shares_its_layers_is_quantised_with_them_and_a_copy_alone():
    model = build(DENSE, seed=0)
    draft = quantize_(copy.deepcopy(with_layers(model, [0])))
    assert isinstance(draft.layers[0].mlp.down_proj, Int4Linear)
    assert not any(isinstance(module, Int4Linear) for module in model.modules())
    quantize_(with_layers(model, [0]))
    assert [isinstance(layer.mlp.down_proj, Int4Linear) for layer in model.layers] == [True, False]


def test_a_tied_head_becomes_a_copy_in_four_bits():
    config = DecoderConfig(64, 64, 96, 2, 4, 2, tie_word_embeddings=True)
    model = build(config, seed=0)
    table = model.embed_tokens.weight.clone()
    quantize_(model, skip=("embed_tokens",))
    assert not model.config.tie_word_embeddings and torch.equal(model.embed_tokens.weight, table)
    assert torch.equal(model.lm_head.dequantize(), Int4Linear.from_weight(table).dequantize())
    kept = quantize_(build(config, seed=0))
    assert kept.lm_head.weight is kept.embed_tokens.weight and kept.config.tie_word_embeddings


# --- states


def through_memory(empty, state):
    empty.to_empty(device="cpu").load_state_dict(state)


def assigned(empty, state):
    empty.load_state_dict(state, assign=True)


@pytest.mark.parametrize("device, load", [
    ("cpu", lambda empty, state: empty.load_state_dict(state)), ("cpu", assigned), ("meta", through_memory),
    ("meta", assigned),
])  # fmt: skip
@pytest.mark.parametrize("symmetric", [False, True])
def test_saved_and_loaded_to_the_bit(tmp_path, symmetric, device, load):
    """Also into a model that had no memory, and after a prepared one was saved."""
    model = quantize_(build(SPARSE, seed=0), symmetric=symmetric).eval()
    with torch.no_grad():
        want = model(IDS)
        fast.prepare(model)
        model(IDS)
    save_file(model.state_dict(), tmp_path / "int4.safetensors")
    empty = quantize_(build(SPARSE, device=device), symmetric=symmetric).eval()
    load(empty, load_file(tmp_path / "int4.safetensors"))
    with torch.no_grad():
        assert torch.equal(empty(IDS), want)
        assert empty.to("cpu", torch.bfloat16)(IDS).dtype is torch.bfloat16
    scales = {module.scales.dtype for module in empty.modules() if isinstance(module, Int4Linear)}
    assert scales == {torch.bfloat16} and empty.layers[0].self_attn.qkv_proj.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("other", [{"in_features": 128}, {"out_features": 128}, {"group_size": 64},
                                   {"symmetric": True}])  # fmt: skip
def test_a_state_of_another_shape_is_not_loaded(other):
    state = Int4Linear.from_weight(random(64, 64), 32).state_dict()
    into = Int4Linear(**({"in_features": 64, "out_features": 64, "group_size": 32} | other))
    with pytest.raises(RuntimeError, match=r"size mismatch for (packed|scales)"):
        into.load_state_dict(state)


# --- bad input


class LowRank(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def hooked():
    linear = nn.Linear(64, 64)
    linear.register_forward_hook(lambda *_: None)
    return nn.Sequential(linear)


def packed_experts():
    model = nn.Sequential(Experts(2, 64, 64))
    model[0].down_proj.data = torch.empty(0)  # as fast.prepare(pack_experts=True) leaves them
    return model


from_weight = Int4Linear.from_weight
BAD = {
    "no divisor": (lambda: from_weight(random(64, 64), 48), "group_size: got 48, expected a divisor of in_features=64"),
    "odd groups": (lambda: Int4Linear(64, 64, 3), "group_size: got 3, expected an even"),
    "no groups": (lambda: Int4Linear(64, 64, 0), "group_size: got 0, expected at least 2"),
    "odd rows": (lambda: from_weight(random(63, 64)), "out_features: got 63, expected an even"),
    "no columns": (lambda: Int4Linear(0, 64), "in_features: got 0"),
    "one dimension": (lambda: from_weight(random(64)), r"weight: got torch.float32 \(64,\), expected floats"),
    "integers": (lambda: from_weight(torch.ones(64, 64, dtype=torch.int8)), "weight: got torch.int8"),
    **{
        str(value): (lambda value=value: from_weight(broken(value)), "group 2 of row 5 holds NaN or an infinity")
        for value in (float("nan"), float("inf"), float("-inf"))
    },
    "method": (lambda: from_weight(random(64, 64), method="gptq"), "method: got 'gptq', expected one of 'rtn', 'hqq'"),
    "hqq": (lambda: METHODS["hqq"](random(4, 32), True), "symmetric: got True with method 'hqq'"),
    "codes, odd": (lambda: pack(torch.zeros(3, 4, dtype=torch.uint8)), r"codes: got shape \(3, 4\)"),
    "codes, none": (lambda: pack(torch.zeros(0, 4, dtype=torch.uint8)), r"codes: got shape \(0, 4\)"),
    "codes, one row": (lambda: pack(torch.zeros(4, dtype=torch.uint8)), r"codes: got shape \(4,\)"),
    "codes above": (lambda: pack(torch.full((2, 2), 16, dtype=torch.uint8)), "codes: got torch.uint8 from 16 to 16"),
    "codes below": (lambda: pack(torch.tensor([[0, 1], [-1, 2]])), "from -1 to 2, expected integers from 0 to 15"),
    "codes, floats": (lambda: pack(torch.full((2, 2), 0.5)), "codes: got torch.float32"),
    "a layer alone": (lambda: quantize_(nn.Linear(64, 64)), "model: is itself a Linear"),
    "adapter": (lambda: quantize_(nn.Sequential(LowRank(64, 64))), "0: is a LowRank, which would be lost.*skip"),
    "hook": (lambda: quantize_(hooked()), "0: has hooks or a forward of its own, which would be lost"),
    "packed": (lambda: quantize_(packed_experts()), "0: experts: packed .*release"),
    "activations": (lambda: quantize_(build(DENSE), activations="int4"), "activations: got 'int4', expected one of"),
}  # fmt: skip


@pytest.mark.parametrize("call, words", BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_model_that_does_not_fit_is_named_and_unchanged():
    model = build(DENSE, seed=0)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj: group_size: got 64.*or name it in skip"):
        quantize_(model, 64)  # fits the rows of 64, not those of 96
    assert not any(isinstance(module, Int4Linear) for module in model.modules())
    quantize_(model, 64, skip=("down_proj", "lm_head"))
    assert isinstance(model.layers[0].mlp.gate_up_proj, Int4Linear)
    assert type(model.layers[0].mlp.down_proj) is type(model.lm_head) is nn.Linear


def test_a_mixture_keeps_its_limit_and_the_gate_of_its_shared_experts():
    router = Router(64, 4, 2)
    layer = MoE(64, 64, router, n_shared_experts=1, shared_expert_gate=True, swiglu_limit=0.4)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, plain = torch.randn(1, 9, 64), copy.deepcopy(layer)
    quantize_(layer, 32)
    assert type(layer.shared_expert_gate) is nn.Linear
    for name in ("gate_up_proj", "down_proj"):
        weights = torch.stack([expert.dequantize() for expert in getattr(layer.experts, name)])
        getattr(plain.experts, name).data = weights
        linear = plain.shared_experts.get_submodule(name)
        linear.weight.data = layer.shared_experts.get_submodule(name).dequantize()
    torch.testing.assert_close(layer(x), plain(x), atol=1e-4, rtol=1e-4)
