"""Our layer and transformers' blocks with the same weights: choice, outputs and gradients; and padded batches."""

import pytest
import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config, DeepseekV4Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM, MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from dslib import fast
from dslib.architecture.moe import MoE, Router
from dslib.architecture.weights.checkpoint import decoder_from_hf
from measured.experiments.moe_speed import implementations

H, I, E, K = 32, 24, 8, 3  # noqa: E741
DEEPSEEK = {
    "hidden_size": H, "moe_intermediate_size": I, "n_routed_experts": E, "num_experts_per_tok": K,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
QWEN = {"hidden_size": H, "moe_intermediate_size": I, "num_experts": E, "num_experts_per_tok": K}
GROUPS = {"n_group": 4, "topk_group": 2}
# name -> transformers' block, its configuration, our rule, shared experts
BLOCKS = {
    "Mixtral": (
        MixtralSparseMoeBlock,
        MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K),
        {"norm_topk_prob": True},
        0,
    ),
    "Qwen3-MoE": (Qwen3MoeSparseMoeBlock, Qwen3MoeConfig(**QWEN, norm_topk_prob=True), {"norm_topk_prob": True}, 0),
    "Qwen3-MoE, as they are": (Qwen3MoeSparseMoeBlock, Qwen3MoeConfig(**QWEN, norm_topk_prob=False), {}, 0),
    "DeepSeek-V2, greedy": (
        DeepseekV2Moe,
        DeepseekV2Config(**DEEPSEEK, topk_method="greedy", n_shared_experts=2, routed_scaling_factor=1.0),
        {},
        2,
    ),
    "DeepSeek-V2, groups": (
        DeepseekV2Moe,
        DeepseekV2Config(
            **DEEPSEEK, **GROUPS, topk_method="group_limited_greedy", n_shared_experts=2, routed_scaling_factor=16.0
        ),
        {**GROUPS, "routed_scaling_factor": 16.0},
        2,
    ),
    "DeepSeek-V3": (
        DeepseekV3MoE,
        DeepseekV3Config(**DEEPSEEK, **GROUPS, n_shared_experts=1, routed_scaling_factor=2.5),
        {
            **GROUPS, "scoring_func": "sigmoid", "norm_topk_prob": True, "selection_bias": True,
            "routed_scaling_factor": 2.5,
        },
        1,
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", BLOCKS)


def pair(name, implementation="eager", seed=0):
    """Ours and theirs with the same random weights."""
    block, config, rule, shared = BLOCKS[name]
    torch.manual_seed(seed)
    config._experts_implementation = implementation
    theirs = block(config)
    for tensor in [*theirs.parameters(), *theirs.buffers()]:
        nn.init.normal_(tensor, std=0.3)
    ours = MoE(H, I, Router(H, E, K, **rule), n_shared_experts=shared)
    state = {
        "router.weight": theirs.gate.weight, "experts.gate_up_proj": theirs.experts.gate_up_proj,
        "experts.down_proj": theirs.experts.down_proj,
    }  # fmt: skip
    if ours.router.e_score_correction_bias is not None:
        state["router.e_score_correction_bias"] = theirs.gate.e_score_correction_bias
    if shared:
        mlp = theirs.shared_experts
        state["shared_experts.gate_up_proj.weight"] = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        state["shared_experts.down_proj.weight"] = mlp.down_proj.weight
    ours.load_state_dict(state)
    return ours, theirs


def tokens(batch=2, length=20, seed=1):
    return torch.randn(batch, length, H, generator=torch.Generator().manual_seed(seed))


def choice(theirs, x):
    """Experts that transformers' gate chooses, one row a token."""
    seen = []
    handle = theirs.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    theirs(x)
    handle.remove()
    return seen[0].sort(-1).values


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=1e-5 * max(1.0, wanted.abs().max().item()), rtol=0)


@EACH
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_same_experts_same_output_same_gradients(name, training):
    ours, theirs = pair(name)
    ours.train(training), theirs.train(training)
    grad = torch.randn(2, 20, H, generator=torch.Generator().manual_seed(2))
    results = []
    for block in (ours, theirs):
        x = tokens().requires_grad_()
        y = block(x)
        y.backward(grad)
        results.append((y.detach(), x.grad))
    assert torch.equal(ours.last_routing.indices.sort(-1).values, choice(theirs, tokens()))
    for got, wanted in zip(*results, strict=True):
        close(got, wanted)
    close(ours.router.weight.grad, theirs.gate.weight.grad)
    close(ours.experts.gate_up_proj.grad, theirs.experts.gate_up_proj.grad)
    close(ours.experts.down_proj.grad, theirs.experts.down_proj.grad)
    if ours.shared_experts is not None:
        mlp = theirs.shared_experts
        joined = torch.cat((mlp.gate_proj.weight.grad, mlp.up_proj.weight.grad))
        close(ours.shared_experts.gate_up_proj.weight.grad, joined)
        close(ours.shared_experts.down_proj.weight.grad, mlp.down_proj.weight.grad)


@EACH
@pytest.mark.parametrize("count", [1, 2, 300])
@torch.no_grad()
def test_inference_takes_other_ways_to_the_same_output(name, count):
    ours, theirs = pair(name, seed=3)
    x = tokens(1, count)
    wanted = theirs.eval()(x)
    close(ours.eval()(x), wanted)
    fast.prepare(ours)
    close(ours(x), wanted)
    fast.prepare(ours, pack_experts=True)
    close(ours(x), wanted)


@pytest.mark.parametrize(
    "implementation", [name for name in implementations() if name in ("eager", "grouped_mm", "batched_mm")]
)
@torch.no_grad()
def test_every_implementation_of_theirs_that_runs_on_a_cpu(implementation):
    ours, theirs = pair("DeepSeek-V3", implementation)
    close(ours(tokens()), theirs(tokens()))


@EACH
@torch.no_grad()
def test_bfloat16_chooses_the_same_experts(name):
    """The router computes in float32 on both sides, so that rounding the model does not change the choice."""
    ours, theirs = pair(name)
    x = tokens().bfloat16()
    ours, theirs = ours.bfloat16(), theirs.bfloat16()
    if ours.router.e_score_correction_bias is not None:
        ours.router.e_score_correction_bias.copy_(theirs.gate.e_score_correction_bias)
    y, wanted = ours(x), theirs(x)
    same = (ours.last_routing.indices.sort(-1).values == choice(theirs, x)).all(-1)
    assert same.float().mean() > 0.95
    gap = (y - wanted).float().flatten(0, 1)[same].abs().max()
    assert gap < 0.03 * wanted.float().abs().max()


@torch.no_grad()
def test_the_routers_of_v4():
    config = DeepseekV4Config(**DEEPSEEK, head_dim=16, vocab_size=50)
    rule = {"scoring_func": "sqrtsoftplus", "norm_topk_prob": True, "routed_scaling_factor": 1.5}
    assert (config.scoring_func, config.routed_scaling_factor) == ("sqrtsoftplus", 1.5)
    x, ids = tokens(), torch.arange(40).view(2, 20)
    torch.manual_seed(0)
    for theirs, ours, more in (
        (DeepseekV4TopKRouter(config), Router(H, E, K, **rule, selection_bias=True), ()),
        (DeepseekV4HashRouter(config), Router(H, E, K, **rule, hash_vocab_size=50), (ids,)),
    ):
        nn.init.normal_(theirs.weight)
        ours.weight.copy_(theirs.weight)
        if more:
            theirs.tid2eid.copy_(ours.tid2eid)
        else:
            nn.init.normal_(theirs.e_score_correction_bias, std=0.3)
            ours.e_score_correction_bias.copy_(theirs.e_score_correction_bias)
        logits, weights, indices = theirs(x, *more)
        routing = ours(x, *more)
        assert torch.equal(routing.indices.sort(-1).values, indices.reshape(-1, K).sort(-1).values)
        order, wanted = routing.indices.argsort(-1), indices.reshape(-1, K).argsort(-1)
        close(routing.weights.gather(1, order), weights.reshape(-1, K).float().gather(1, wanted))
        close(routing.logits, logits.reshape(-1, E).float())


@torch.no_grad()
def test_padding_on_the_right_does_not_change_the_tokens_before_it():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50, hidden_size=H, intermediate_size=I, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=E, num_experts_per_tok=K, max_position_embeddings=64,
    )  # fmt: skip
    theirs = MixtralForCausalLM(config).eval()
    ours = decoder_from_hf(config, theirs.state_dict())
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 7:], mask[1, 7:] = 0, 0
    logits, wanted = ours(ids), theirs(ids, attention_mask=mask).logits
    close(logits[0], wanted[0])
    close(logits[1, :7], wanted[1, :7])
    close(ours(ids[1:, :7])[0], logits[1, :7])
