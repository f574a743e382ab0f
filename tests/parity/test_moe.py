"""The routers of published models: which arguments give them, held against transformers' block of each family.

``ROUTERS`` is the table: each row is compared in the experts chosen, outputs and gradients, with the published numbers
of groups and a factor at a tiny size. ``NOT_EXPRESSED`` names rules that no arguments give, and why.
"""

import importlib

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

from dslib import fast
from dslib.architecture.moe import MoE, Router
from dslib.architecture.weights.checkpoint import decoder_from_hf
from dslib.architecture.weights.config import config_from_hf
from measured.experiments.moe_speed import implementations

H, I, E, K, VOCAB = 32, 24, 16, 4, 50  # noqa: E741
PLAIN, NORMED = {}, {"norm_topk_prob": True}
SIGMOID = {"scoring_func": "sigmoid", "norm_topk_prob": True, "selection_bias": True}
V4 = {"scoring_func": "sqrtsoftplus", "norm_topk_prob": True, "routed_scaling_factor": 1.5}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
# name -> model_type, transformers' block, arguments of Router, arguments of MoE, what the tiny configuration needs
ROUTERS = {
    "Mixtral": ("mixtral", "MixtralSparseMoeBlock", NORMED, {}, {"intermediate_size": I}),
    "Granite MoE": ("granitemoe", "GraniteMoeMoE", NORMED, {}, {"intermediate_size": I}),
    "DBRX": ("dbrx", "DbrxFFN", NORMED, {}, {}),
    "OLMoE": ("olmoe", "OlmoeSparseMoeBlock", PLAIN, {}, {"intermediate_size": I}),
    "Qwen2-MoE": (
        "qwen2_moe", "Qwen2MoeSparseMoeBlock", PLAIN, {"n_shared_experts": 4, "shared_expert_gate": True},
        {"shared_expert_intermediate_size": 4 * I},
    ),
    "Qwen3-MoE": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", NORMED, {}, {}),
    "Qwen3-Next": (
        "qwen3_next", "Qwen3NextSparseMoeBlock", NORMED, {"n_shared_experts": 1, "shared_expert_gate": True},
        {"shared_expert_intermediate_size": I},
    ),
    "ERNIE 4.5": (
        "ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock", {**NORMED, "selection_bias": True}, {"n_shared_experts": 2},
        {"moe_num_experts": E, "moe_k": K, "moe_num_shared_experts": 2},
    ),
    "DeepSeek-V2-Lite": ("deepseek_v2", "DeepseekV2Moe", PLAIN, {"n_shared_experts": 2}, {"topk_method": "greedy"}),
    "DeepSeek-V2": (
        "deepseek_v2", "DeepseekV2Moe", {"n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0},
        {"n_shared_experts": 2}, {"topk_method": "group_limited_greedy"},
    ),
    "DeepSeek-V3": (
        "deepseek_v3", "DeepseekV3MoE", {**SIGMOID, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5},
        {"n_shared_experts": 1}, {},
    ),
    "DeepSeek-V3.2": (
        "deepseek_v32", "DeepseekV32MoE", {**SIGMOID, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5},
        {"n_shared_experts": 1}, {},
    ),
    "GLM-4 MoE": ("glm4_moe", "Glm4MoeMoE", {**SIGMOID, "routed_scaling_factor": 2.5}, {"n_shared_experts": 1}, {}),
    "dots.llm1": ("dots1", "Dots1MoE", {**SIGMOID, "routed_scaling_factor": 2.5}, {"n_shared_experts": 2}, {}),
    "MiniMax-M2": ("minimax_m2", "MiniMaxM2SparseMoeBlock", SIGMOID, {}, {"intermediate_size": I}),
    "LFM2 MoE": ("lfm2_moe", "Lfm2MoeSparseMoeBlock", {**SIGMOID, "routed_scaling_factor": 2.5}, {}, {}),
    "DeepSeek-V4": (
        "deepseek_v4", "DeepseekV4SparseMoeBlock", {**V4, "selection_bias": True},
        {"n_shared_experts": 1, "swiglu_limit": 0.4}, {"mlp_layer_types": ["moe"]},
    ),
    "DeepSeek-V4, first layers": (
        "deepseek_v4", "DeepseekV4SparseMoeBlock", {**V4, "hash_vocab_size": VOCAB},
        {"n_shared_experts": 1, "swiglu_limit": 0.4}, {"mlp_layer_types": ["hash_moe"]},
    ),
}  # fmt: skip
NOT_EXPRESSED = {
    "phimoe": "two draws one after the other (SparseMixer): each a softmax over the logits near the best one left",
    "gpt_oss": "biases in router and experts, and another function inside: (up + 1) x gate x sigmoid(1.702 gate)",
    "llama4": "the token is multiplied by the sigmoid before the expert, not the expert's output after it",
}
EACH = pytest.mark.parametrize("name", ROUTERS)


def theirs_of(name, implementation="eager"):
    family, block, rule, parts, needs = ROUTERS[name]
    fields = {
        "vocab_size": VOCAB, "hidden_size": H, "num_hidden_layers": 1, "moe_intermediate_size": I, **HEADS,
        "num_experts": E, "num_local_experts": E, "n_routed_experts": E, "num_experts_per_tok": K,
        "n_shared_experts": parts.get("n_shared_experts", 0), "norm_topk_prob": False, **rule, **parts, **needs,
    }  # fmt: skip
    if family == "dbrx":
        sizes = {"hidden_size": H, "ffn_hidden_size": I, "moe_num_experts": E, "moe_top_k": K}
        fields = {"d_model": H, "ffn_config": sizes}
    config = AutoConfig.for_model(family, **fields)
    config._experts_implementation = implementation
    made = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), block)
    return made(config, 0) if family == "deepseek_v4" else made(config)


def as_ours(tensors):
    """Theirs by our names: weights, buffers or gradients of a block."""
    named = {}
    for name, tensor in tensors.items():
        if name.endswith(("gate.weight", "router.weight", "router.layer.weight")) and "shared" not in name:
            named["router.weight"] = tensor
        elif name.endswith(("e_score_correction_bias", "expert_bias")):
            named["router.e_score_correction_bias"] = tensor.flatten()
        elif name.endswith("tid2eid"):
            named["router.tid2eid"] = tensor
        elif ".mlp." in name:  # DBRX: all experts' rows in one matrix
            named[name.rpartition(".")[2]] = tensor.view(E, I, H)
        else:
            named[name.replace("shared_expert.", "shared_experts.")] = tensor
    if "v1" in named:
        named["experts.gate_up_proj"] = torch.cat((named.pop("w1"), named.pop("v1")), dim=1)
        named["experts.down_proj"] = named.pop("w2").transpose(1, 2)
    if "shared_experts.gate_proj.weight" in named:
        both = [named.pop(f"shared_experts.{part}_proj.weight") for part in ("gate", "up")]
        named["shared_experts.gate_up_proj.weight"] = torch.cat(both)
    return named


def pair(name, implementation="eager", seed=0):
    """Ours and theirs with the same random weights."""
    torch.manual_seed(seed)
    theirs = theirs_of(name, implementation)
    ours = MoE(H, I, Router(H, E, K, **ROUTERS[name][2]), **ROUTERS[name][3])
    for key, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
        if key.endswith("tid2eid"):
            tensor.copy_(ours.router.tid2eid)
        else:
            nn.init.normal_(tensor, std=0.3)
    ours.load_state_dict(as_ours(theirs.state_dict()))
    return ours, theirs


def tokens(batch=2, length=20, seed=1):
    return torch.randn(batch, length, H, generator=torch.Generator().manual_seed(seed))


def run(block, x):
    """(output, chosen experts, one sorted row a token), with ids for tables."""
    ids, chosen = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) % VOCAB, []
    if isinstance(block, MoE):
        return block(x, ids), block.last_routing.indices.sort(-1).values
    handle = block.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    y = block(x, ids) if getattr(block, "is_hash", False) else block(x)
    handle.remove()
    return y, chosen[0].reshape(-1, K).sort(-1).values


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=1e-5 * max(1.0, wanted.abs().max().item()), rtol=0)


@EACH
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_same_experts_same_output_same_gradients(name, training):
    ours, theirs = (block.train(training) for block in pair(name))
    grad = torch.randn(2, 20, H, generator=torch.Generator().manual_seed(2))
    results = []
    for block in (ours, theirs):
        x = tokens().requires_grad_()
        y, chosen = run(block, x)
        y.backward(grad)
        results.append((y.detach(), x.grad, chosen))
    for got, wanted in zip(*results, strict=True):
        close(got, wanted)
    wanted = as_ours({key: p.grad for key, p in theirs.named_parameters() if p.grad is not None})
    got = {key: p.grad for key, p in ours.named_parameters()}
    assert set(got) == set(wanted)
    for key, gradient in wanted.items():
        assert gradient.abs().max() > 1e-3
        close(got[key], gradient)


@EACH
@pytest.mark.parametrize("count", [1, 2, 300])
@torch.no_grad()
def test_inference_takes_other_ways_to_the_same_output(name, count):
    ours, theirs = (block.eval() for block in pair(name, seed=3))
    x = tokens(1, count)
    wanted = run(theirs, x)[0]
    close(run(ours, x)[0], wanted)
    for pack in (False, True):
        fast.prepare(ours, pack_experts=pack)
        close(run(ours, x)[0], wanted)


@EACH
@torch.no_grad()
def test_each_part_of_the_rule_matters_at_this_size(name):
    """So that no row can pass with an argument left out on both sides."""
    ours, theirs = pair(name)
    wanted, _ = run(theirs, tokens())
    *_, rule, parts, _ = ROUTERS[name]
    for left_out in {*rule, *parts} - {"topk_group", "hash_vocab_size", "n_shared_experts"}:
        without = (left_out, "topk_group") if left_out == "n_group" else (left_out,)
        changed = {key: value for key, value in rule.items() if key not in without}
        other = MoE(H, I, Router(H, E, K, **changed), **{k: v for k, v in parts.items() if k != left_out})
        other.load_state_dict(ours.state_dict(), strict=False)
        assert (run(other, tokens())[0] - wanted).abs().max() > 1e-3, left_out


@pytest.mark.parametrize("family", NOT_EXPRESSED)
def test_what_is_not_expressed_is_refused_by_name(family):
    with pytest.raises(ValueError, match=f"model_type: got '{family}', expected one of"):
        config_from_hf(AutoConfig.for_model(family))


def test_jitter_is_refused_by_name():
    with pytest.raises(ValueError, match="router_jitter_noise: got 0"):
        config_from_hf(AutoConfig.for_model("mixtral", router_jitter_noise=0.1))


@pytest.mark.parametrize(
    "implementation", [name for name in implementations() if name in ("eager", "grouped_mm", "batched_mm")]
)
@torch.no_grad()
def test_every_implementation_of_theirs_that_runs_on_a_cpu(implementation):
    ours, theirs = pair("DeepSeek-V3", implementation)
    close(ours(tokens()), theirs(tokens()))


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V2", "DeepSeek-V3"])
@torch.no_grad()
def test_bfloat16_chooses_the_same_experts(name):
    """The router computes in float32 on both sides, so that rounding the model does not change the choice."""
    ours, theirs = pair(name)
    x = tokens().bfloat16()
    ours, theirs = ours.bfloat16(), theirs.bfloat16()
    if ours.router.e_score_correction_bias is not None:
        ours.router.e_score_correction_bias.copy_(theirs.gate.e_score_correction_bias)
    (y, chosen), (wanted, theirs_chosen) = run(ours, x), run(theirs, x)
    same = (chosen == theirs_chosen).all(-1)
    assert same.float().mean() > 0.95
    gap = (y - wanted).float().flatten(0, 1)[same].abs().max()
    assert gap < 0.03 * wanted.float().abs().max()


@torch.no_grad()
def test_padding_on_the_right_does_not_change_the_tokens_before_it():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", vocab_size=VOCAB, hidden_size=H, intermediate_size=I, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=E, num_experts_per_tok=K, max_position_embeddings=64,
    )  # fmt: skip
    theirs = MixtralForCausalLM(config).eval()
    ours = decoder_from_hf(config, theirs.state_dict())
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 7:], mask[1, 7:] = 0, 0
    logits, wanted = ours(ids), theirs(ids, attention_mask=mask).logits
    close(logits[0], wanted[0])
    close(logits[1, :7], wanted[1, :7])
    close(ours(ids[1:, :7])[0], logits[1, :7])
