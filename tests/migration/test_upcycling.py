"""A mixture that begins as the dense model: for which rules, to how many digits, and what transformers says to it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from dslib.architecture.decoder import DecoderConfig, build, count_parameters
from dslib.architecture.weights.checkpoint import to_hf_state_dict
from dslib.architecture.whole import tiny_deepseek
from dslib.migration.upcycling import merge_experts, starts_equal, upcycle

DENSE = DecoderConfig(64, 32, 48, 2, 4, 2, max_position_embeddings=64, tie_word_embeddings=True)
LATENT = tiny_deepseek(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, first_k_dense_replace=2, kv_lora_rank=16,
    qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=16,
)  # fmt: skip
IDS = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))


def dense(config=DENSE, **kind):
    """Weights large enough that the feed-forward networks matter."""
    model = build(config, seed=0, **kind).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(10)
    return model


def error(model, mixture):
    with torch.no_grad():
        wanted = model(IDS)
        return ((mixture(IDS) - wanted).norm() / wanted.norm()).item()


RULES = [
    ({}, 1, True),
    ({"scoring_func": "sigmoid", "selection_bias": True}, 1, True),
    ({"top_k": 1}, 1, True),
    ({"top_k": 4, "norm_topk_prob": False, "scoring_func": "softmax"}, 1, True),  # all of them
    ({"split": 4}, 4, True),
    ({"split": 2, "scoring_func": "sigmoid"}, 2, True),
    ({"norm_topk_prob": False}, 1, False),  # the article's, and Switch's
    ({"routed_scaling_factor": 2.5}, 1, False),
    ({"scoring_func": "sigmoid", "norm_topk_prob": False}, 1, False),
    ({"split": 4, "routed_scaling_factor": 1.0}, 4, False),
]


@pytest.mark.parametrize("config", [DENSE, LATENT], ids=["grouped heads", "latent"])
@pytest.mark.parametrize("rule, split, equal", RULES)
def test_copies_start_equal_under_rules_whose_weights_sum_to_one_and_no_others(config, rule, split, equal):
    model = dense(config, dtype=torch.float64)
    mixture = upcycle(model, **rule)
    assert starts_equal(mixture.config, split) == equal
    with torch.no_grad():  # a router that has opinions, as long as it scores the slices of a copy alike
        for layer in mixture.layers:
            rows = layer.mlp.router.weight[::split]
            layer.mlp.router.weight.copy_(torch.randn_like(rows).repeat_interleave(split, 0))
    found = error(model, mixture)
    assert found < 1e-6 if equal else found > 1e-3  # a router computes in float32


@pytest.mark.parametrize("rule", [{}, {"norm_topk_prob": False}, {"split": 4, "routed_scaling_factor": 2.5}])
def test_a_shared_expert_beside_experts_that_give_zero_is_equal_under_any_rule(rule):
    model = dense(dtype=torch.float64)
    mixture = upcycle(model, way="shared", **rule)
    assert error(model, mixture) < 1e-12
    assert mixture.layers[0].mlp.experts.gate_up_proj.abs().sum() > 0  # so that the first step has a gradient
    mixture.train()
    F.cross_entropy(mixture(IDS).flatten(0, 1), IDS.flatten()).backward()
    assert mixture.layers[0].mlp.experts.down_proj.grad.abs().sum() > 0


def router_gradient(mixture):
    F.cross_entropy(mixture.train()(IDS).flatten(0, 1), IDS.flatten()).backward()
    return max(layer.mlp.router.weight.grad.abs().max().item() for layer in mixture.layers)


def test_a_router_learns_nothing_from_the_language_loss_while_experts_are_alike():
    model = dense(dtype=torch.float64)
    assert router_gradient(upcycle(model)) < 1e-7
    assert router_gradient(upcycle(model, noise=0.3)) > 1e-5
    assert router_gradient(upcycle(model, norm_topk_prob=False)) > 1e-5  # but then it does not start equal


def test_transformers_mixtral_computes_what_the_dense_model_did():
    model = dense()
    mixture = upcycle(model)
    config = mixture.config
    theirs = MixtralForCausalLM(MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_tok,
        max_position_embeddings=64, rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, sliding_window=None,
    )).eval()  # fmt: skip
    theirs.load_state_dict(to_hf_state_dict(mixture), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [DENSE, LATENT], ids=["grouped heads", "latent"])
def test_the_way_home_is_exact_while_experts_are_equal_and_a_mean_later(config):
    model = dense(config, dtype=torch.float64)
    mixture = upcycle(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    home = merge_experts(mixture)
    assert type(home.config) is type(config) and count_parameters(home) == count_parameters(model)
    assert error(model, home) < 1e-6
    noisy = upcycle(model, noise=0.3)
    assert error(model, noisy) > 0.01 and error(model, merge_experts(noisy)) > 0.01
    only = torch.tensor([0.0, 1.0, 0.0, 0.0])
    picked = merge_experts(noisy, [only, only])
    torch.testing.assert_close(
        picked.layers[1].mlp.down_proj.weight, noisy.layers[1].mlp.experts.down_proj[1], atol=1e-5, rtol=1e-5
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_are_copies_of_the_models_own_dtype():
    model = dense(dtype=torch.bfloat16)
    mixture = upcycle(model, noise=0.1)
    assert {weight.dtype for weight in mixture.parameters()} == {torch.bfloat16}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in mixture.parameters():
            weight.zero_()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("rule", [{"selection_bias": True}, {"way": "shared", "split": 2}, {"num_hash_layers": 1}])
def test_only_routers_are_drawn_by_the_seed_and_nothing_is_left_as_memory_had_it(rule):
    model = dense()
    one, same, other = (upcycle(model, seed=seed, **rule).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert {name.rpartition(".mlp.")[2] for name in one if not torch.equal(one[name], other[name])} == {"router.weight"}
    assert all((value == 0).all() for name, value in one.items() if name.endswith("correction_bias"))
    mixture = upcycle(model, **rule)
    assert mixture.lm_head.weight is mixture.embed_tokens.weight


BAD_CALLS = [
    (lambda: upcycle(upcycle(dense())), "experts already"),
    (lambda: upcycle(dense(), split=5), "split: got 5, expected a divisor of the inner size 48"),
    (lambda: upcycle(dense(), split=0), "split"),
    (lambda: upcycle(dense(), way="copy"), "way"),
    (lambda: upcycle(dense(), noise=-1.0), "noise"),
    (lambda: upcycle(dense(), num_experts=2, top_k=3), "top_k|num_experts_per_tok"),
    (lambda: merge_experts(upcycle(dense(), split=2)), "whole copies"),
    (lambda: merge_experts(upcycle(dense(), way="shared")), "without a shared expert"),
    (lambda: merge_experts(upcycle(dense()), [torch.ones(3)] * 2), "shares: got shape"),
]


@pytest.mark.parametrize("call, words", BAD_CALLS)
def test_bad_calls_are_refused_and_say_what_was_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()
