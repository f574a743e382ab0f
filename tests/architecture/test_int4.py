"""4-bit layers: the packed order, whole models, and what can go wrong."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.experts import Experts
from dslib.architecture.int4.layers import Int4Experts, Int4Linear, nbytes, quantize_
from dslib.architecture.int4.levels import half_quadratic, pack, round_to_nearest, unpack
from dslib.architecture.sparse_decoder import SparseConfig

KINDS = [("rtn", False), ("rtn", True), ("hqq", False)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(64, 32), (128, 6), (2, 2), (96, 32), (200, 10)])
def test_packing_can_be_undone(shape):
    codes = torch.randint(16, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (shape[0], shape[1] // 2)
    assert torch.equal(unpack(packed), codes)


def test_a_decoder_and_its_experts_are_replaced():
    config = SparseConfig(64, 64, 96, 2, 4, 2, num_experts=4, moe_intermediate_size=64, n_shared_experts=1)
    model = build(config, seed=0).eval()
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids)
        assert quantize_(model) is model
        after = model(ids)
    kinds = {type(module) for module in model.modules()}
    assert {Int4Linear, Int4Experts} <= kinds
    assert Experts not in kinds
    assert not isinstance(model.lm_head, Int4Linear)
    assert 0.01 < (after - before).norm() / before.norm() < 0.3


def test_bytes_are_those_of_the_tensors():
    model = quantize_(build(DecoderConfig(64, 64, 96, 2, 4, 2), device="meta"), 32)
    rows = 2 * (64 * (128 + 64 + 192) + 96 * 64)
    assert nbytes(model) == rows // 2 + rows // 32 * 4 + 4 * (2 * 64 * 64 + 5 * 64)


@pytest.mark.parametrize("group_size, words", [(48, "divisor of in_features=64"), (0, "at least 2"), (3, "even")])
def test_groups_must_divide(group_size, words):
    with pytest.raises(ValueError, match=f"group_size: got {group_size}.*{words}"):
        Int4Linear.from_weight(random(64, 64), group_size)
    with pytest.raises(ValueError, match=words):
        Int4Linear(64, 64, group_size)


def test_a_model_that_does_not_fit_is_named_and_unchanged():
    model = build(DecoderConfig(64, 64, 96, 2, 4, 2), seed=0)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj: group_size: got 64.*or name it in skip"):
        quantize_(model, 64)  # fits the rows of 64, not those of 96
    assert not any(isinstance(module, Int4Linear) for module in model.modules())
    quantize_(model, 64, skip=("down_proj", "lm_head"))
    assert isinstance(model.layers[0].mlp.gate_up_proj, Int4Linear)
    assert type(model.layers[0].mlp.down_proj) is type(model.lm_head) is not Int4Linear


def test_skip_takes_full_names_and_last_parts_only():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "ab": nn.Linear(64, 64)})
    quantize_(model, skip=("a.0",))
    kinds = {name: isinstance(m, Int4Linear) for name, m in model.named_modules() if name in ("a.0", "a.1", "ab")}
    assert kinds == {"a.0": False, "a.1": True, "ab": True}


@pytest.mark.parametrize("method, symmetric", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.375, -2.0])
def test_groups_of_equal_weights_are_exact(method, symmetric, value):
    weight = random(64, 64)
    weight[3, 32:] = value
    back = Int4Linear.from_weight(weight, 32, method, symmetric).dequantize()
    assert torch.equal(back[3, 32:], weight[3, 32:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_group_that_is_not_finite_is_named(value):
    weight = random(64, 128)
    weight[5, 70] = value
    with pytest.raises(ValueError, match="weight: group 2 of row 5 holds NaN or an infinity, expected finite"):
        Int4Linear.from_weight(weight, 32)
    linear = nn.Linear(128, 64)
    linear.weight.data = weight
    with pytest.raises(ValueError, match="0: weight: group 2 of row 5"):
        quantize_(nn.Sequential(linear))


def test_other_arguments_that_cannot_be_used():
    with pytest.raises(ValueError, match="method: got 'gptq', expected one of 'rtn', 'hqq'"):
        Int4Linear.from_weight(random(64, 64), method="gptq")
    with pytest.raises(ValueError, match="symmetric: got True with method 'hqq'"):
        Int4Linear.from_weight(random(64, 64), method="hqq", symmetric=True)
    with pytest.raises(ValueError, match="out_features: got 63"):
        Int4Linear.from_weight(random(63, 64))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 32\), expected \(\.\.\., 64\)"):
        Int4Linear.from_weight(random(64, 64))(random(2, 32))
    with pytest.raises(ValueError, match=r"codes: got shape \(3, 4\)"):
        pack(torch.zeros(3, 4, dtype=torch.uint8))


@pytest.mark.parametrize(
    "other",
    [
        {"in_features": 128},
        {"out_features": 128},
        {"group_size": 64},
        {"symmetric": True},
    ],
)
def test_a_state_of_another_shape_is_not_loaded(other):
    state = Int4Linear.from_weight(random(64, 64), 32).state_dict()
    into = Int4Linear(**({"in_features": 64, "out_features": 64, "group_size": 32} | other))
    with pytest.raises(RuntimeError, match=r"size mismatch for (packed|scales)"):
        into.load_state_dict(state)


@pytest.mark.parametrize("symmetric", [False, True])
def test_saved_and_loaded_to_the_bit(tmp_path, symmetric):
    config = SparseConfig(64, 64, 96, 2, 4, 2, num_experts=4, moe_intermediate_size=64, n_shared_experts=1)
    model = quantize_(build(config, seed=0), symmetric=symmetric).eval()
    save_file(model.state_dict(), tmp_path / "int4.safetensors")
    empty = quantize_(build(config, seed=1), symmetric=symmetric).eval()
    empty.load_state_dict(load_file(tmp_path / "int4.safetensors"))
    ids = torch.randint(64, (1, 7), generator=torch.Generator().manual_seed(0))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, empty.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(model(ids), empty(ids))


def test_a_tied_head_becomes_a_copy_in_four_bits():
    config = DecoderConfig(64, 64, 96, 2, 4, 2, tie_word_embeddings=True)
    model = build(config, seed=0)
    table = model.embed_tokens.weight.clone()
    quantize_(model, skip=("embed_tokens",))
    assert isinstance(model.lm_head, Int4Linear)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.embed_tokens.weight, table)
    want = Int4Linear.from_weight(table).dequantize()
    assert torch.equal(model.lm_head.dequantize(), want)
    kept = quantize_(build(config, seed=0))
    assert kept.lm_head.weight is kept.embed_tokens.weight
    assert kept.config.tie_word_embeddings


def test_a_model_of_transformers_is_quantised():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **shape)).eval()
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        quantize_(model)
        after = model(ids).logits
    layers = [name for name, module in model.named_modules() if isinstance(module, Int4Linear)]
    assert len(layers) == 2 * 7
    assert 0.005 < (after - before).norm() / before.norm() < 0.3


weights = st.lists(st.floats(-100, 100, width=32), min_size=64, max_size=64)


@given(weights, st.sampled_from([8, 16, 32]))
def test_rounding_moves_a_weight_by_half_a_step_at_most(values, group_size):
    groups = torch.tensor(values).view(-1, group_size)
    found = round_to_nearest(groups)
    # Scale and zero are stored in bfloat16, with a relative error of 2**-9 each; the scale's counts 8 times.
    size = groups.abs().amax(-1, keepdim=True)
    slack = 2**-9 * (8 * found.scales.float().abs() + found.zeros.float().abs() + size) + 1e-30
    error = (found.dequantize() - groups).abs()
    assert (error <= found.scales.float().abs() / 2 + slack).all()


@given(st.integers(0, 10_000), st.sampled_from([16, 32, 64]))
def test_hqq_is_no_worse_in_what_it_minimises(seed, group_size):
    groups = random(64, group_size, seed=seed) * (1 + 4 * (random(64, group_size, seed=seed + 1) > 2))
    loss = [
        ((method(groups).dequantize() - groups).abs() ** 0.7).sum() for method in (round_to_nearest, half_quadratic)
    ]
    assert loss[1] <= loss[0] * 1.001
