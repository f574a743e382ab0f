"""The routers of published models: which arguments give them, and transformers' block of each to hold them against.

``ROUTERS`` is the one table: the page shows one row of each kind (``KINDS``), its appendix all of them, and
``tests/parity/test_moe.py`` compares every row in the experts chosen, outputs and gradients. ``NOT_EXPRESSED`` names
rules that no arguments give, and why.

Book: ``chapters/architecture/moe.ipynb`` and ``chapters/reference/experts_grid.ipynb``.
"""

import importlib

import torch
from torch import Tensor, nn

from dslib.architecture.moe import MoE, Router

H, I, E, K, VOCAB = 32, 24, 16, 4, 50  # noqa: E741
PLAIN, NORMED = {}, {"norm_topk_prob": True}
SIGMOID = {"scoring_func": "sigmoid", "norm_topk_prob": True, "selection_bias": True}
V4 = {"scoring_func": "sqrtsoftplus", "norm_topk_prob": True, "routed_scaling_factor": 1.5}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
# name -> model_type, transformers' block, arguments of Router, arguments of MoE, what the tiny configuration needs. The
# numbers of groups and shared experts are published ones. So are the factors of V2, V3 and V4-Flash; V3.2 has the
# default of transformers' configuration of the family; GLM-4.5's (of 355 billion) and dots.llm1's stand in the
# configurations of their checkpoints, where transformers' default is 1. LFM2 has 1. V4's limit is 10, here a smaller
# one that this size meets. Qwen1.5-MoE (A2.7B) has 4 shared experts, 5,632 over 1,408; its family has other sizes too.
ROUTERS = {
    "Mixtral": ("mixtral", "MixtralSparseMoeBlock", NORMED, {}, {"intermediate_size": I}),
    "Granite MoE": ("granitemoe", "GraniteMoeMoE", NORMED, {}, {"intermediate_size": I}),
    "DBRX": ("dbrx", "DbrxFFN", NORMED, {}, {}),
    "OLMoE": ("olmoe", "OlmoeSparseMoeBlock", PLAIN, {}, {"intermediate_size": I}),
    "Qwen1.5-MoE": (
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
    "GLM-4.5": ("glm4_moe", "Glm4MoeMoE", {**SIGMOID, "routed_scaling_factor": 2.5}, {"n_shared_experts": 1}, {}),
    "dots.llm1": ("dots1", "Dots1MoE", {**SIGMOID, "routed_scaling_factor": 2.5}, {"n_shared_experts": 2}, {}),
    "MiniMax-M2": ("minimax_m2", "MiniMaxM2SparseMoeBlock", SIGMOID, {}, {"intermediate_size": I}),
    "LFM2 MoE": ("lfm2_moe", "Lfm2MoeSparseMoeBlock", SIGMOID, {}, {}),
    "DeepSeek-V4-Flash": (
        "deepseek_v4", "DeepseekV4SparseMoeBlock", {**V4, "selection_bias": True},
        {"n_shared_experts": 1, "swiglu_limit": 0.4}, {"mlp_layer_types": ["moe"]},
    ),
    "DeepSeek-V4-Flash, first layers": (
        "deepseek_v4", "DeepseekV4SparseMoeBlock", {**V4, "hash_vocab_size": VOCAB},
        {"n_shared_experts": 1, "swiglu_limit": 0.4}, {"mlp_layer_types": ["hash_moe"]},
    ),
}  # fmt: skip
# One row of each kind: every way to score, to choose, to weigh, and every extra.
KINDS = (
    "Mixtral", "OLMoE", "Qwen1.5-MoE", "ERNIE 4.5", "DeepSeek-V2", "DeepSeek-V3", "DeepSeek-V4-Flash",
    "DeepSeek-V4-Flash, first layers",
)  # fmt: skip
NOT_EXPRESSED = {
    "phimoe": "two draws one after the other (SparseMixer): each a softmax over the logits near the best one left",
    "gpt_oss": "biases in router and experts, and another function inside: (up + 1) x gate x sigmoid(1.702 gate)",
    "llama4": "the token is multiplied by the sigmoid before the expert, not the expert's output after it",
}


def words(name: str) -> dict[str, str]:
    """A row of ``ROUTERS`` as a reader sees it: how scores, choice and weights are made, and the extras."""
    *_, rule, parts, _ = ROUTERS[name]
    scores = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrtsoftplus": "√softplus"}[
        rule.get("scoring_func", "softmax")
    ]
    choice = "score + bias" if rule.get("selection_bias") else "score"
    if "n_group" in rule:
        choice += f", in {rule['topk_group']} of {rule['n_group']} groups"
    if "hash_vocab_size" in rule:
        choice = "a table, by token id"
    weights = "sum to 1" if rule.get("norm_topk_prob") else "the scores"
    if "routed_scaling_factor" in rule:
        weights += f", ×\u00a0{rule['routed_scaling_factor']:g}"
    shared = f"{parts['n_shared_experts']} shared" if "n_shared_experts" in parts else ""
    shared += ", × a sigmoid" if "shared_expert_gate" in parts else ""
    shared += ", a limit inside" if "swiglu_limit" in parts else ""
    said = {"model": name, "scores": scores, "top k by": choice, "weights": weights}
    return said | {"shared experts and extras": shared}


def agree(name: str) -> bool:
    """Whether ours and theirs choose the same experts for 40 tokens and give the same output and the same gradient."""
    grad = torch.randn(2, 20, H, generator=torch.Generator().manual_seed(2))
    results = []
    for block in pair(name):
        x = tokens().requires_grad_()
        y, chosen = run(block, x)
        y.backward(grad)
        results.append((y.detach(), x.grad, chosen.float()))
    return all(
        (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())
        for ours, theirs in zip(*results, strict=True)
    )


def theirs_of(name: str, implementation: str = "eager") -> nn.Module:
    """transformers' block of a row, tiny, with its own random weights."""
    from transformers import AutoConfig

    family, block, rule, parts, needs = ROUTERS[name]
    fields = {
        "vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "hidden_size": H, "num_hidden_layers": 1,
        "moe_intermediate_size": I, **HEADS,
        "num_experts": E, "num_local_experts": E, "n_routed_experts": E, "num_experts_per_tok": K,
        "n_shared_experts": parts.get("n_shared_experts", 0), "norm_topk_prob": False, **rule, **parts, **needs,
    }  # fmt: skip
    if family == "dbrx":
        sizes = {"hidden_size": H, "ffn_hidden_size": I, "moe_num_experts": E, "moe_top_k": K}
        fields = {"d_model": H, "ffn_config": sizes, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(family, **fields)
    config._experts_implementation = implementation
    made = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), block)
    return made(config, 0) if family == "deepseek_v4" else made(config)


def as_ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
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


def pair(name: str, implementation: str = "eager", seed: int = 0) -> tuple[MoE, nn.Module]:
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


def tokens(batch: int = 2, length: int = 20, seed: int = 1) -> Tensor:
    """(batch, length, H), normal."""
    return torch.randn(batch, length, H, generator=torch.Generator().manual_seed(seed))


def run(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(output, chosen experts, one sorted row a token), with ids for tables."""
    ids, chosen = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) % VOCAB, []
    if isinstance(block, MoE):
        return block(x, ids), block.last_routing.indices.sort(-1).values
    handle = block.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    y = block(x, ids) if getattr(block, "is_hash", False) else block(x)
    handle.remove()
    return y, chosen[0].reshape(-1, K).sort(-1).values
