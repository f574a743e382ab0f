"""What holds for every router and every layer, tried on generated sizes, rules and tokens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dslib.architecture.balance import limited, load_statistics
from dslib.architecture.moe import SCORES, MoE, Router

HIDDEN = 8
FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@st.composite
def rules(draw, hashed=True):
    """(experts, top_k, arguments of the router), all of them allowed."""
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    experts = groups * draw(st.integers(2, 6))
    open_groups = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, open_groups * (experts // groups)))
    rule = {
        "scoring_func": draw(st.sampled_from(sorted(SCORES))), "norm_topk_prob": draw(st.booleans()),
        "n_group": groups, "topk_group": open_groups, "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5, 16.0])),
        "selection_bias": draw(st.booleans()),
        "hash_vocab_size": draw(st.sampled_from([None, None, 20] if hashed else [None])),
    }  # fmt: skip
    return experts, top_k, rule


def make(drawn, seed):
    experts, top_k, rule = drawn
    torch.manual_seed(seed)
    router = Router(HIDDEN, experts, top_k, seed=seed, **rule)
    nn.init.normal_(router.weight)
    if router.e_score_correction_bias is not None:
        nn.init.normal_(router.e_score_correction_bias, std=0.3)
    return router


def some(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, HIDDEN, generator=generator), torch.randint(20, (tokens,), generator=generator)


SEEDS, COUNTS = st.integers(0, 1000), st.integers(1, 40)


@FEW
@given(rules(), COUNTS, SEEDS)
def test_each_token_has_k_distinct_experts_in_open_groups(drawn, count, seed):
    router, (x, ids) = make(drawn, seed), some(count, seed)
    routing = router(x, ids)
    assert routing.indices.shape == (count, router.top_k)
    assert 0 <= routing.indices.min() and routing.indices.max() < router.num_experts
    for row in routing.indices.tolist():
        assert len(set(row)) == router.top_k
        if router.tid2eid is None:
            size = router.num_experts // router.n_group
            assert len({expert // size for expert in row}) <= router.topk_group


@FEW
@given(rules(), COUNTS, SEEDS)
def test_weights_sum_as_the_rule_says(drawn, count, seed):
    router, (x, ids) = make(drawn, seed), some(count, seed)
    routing = router(x, ids)
    sums = routing.weights.sum(1) / router.routed_scaling_factor
    assert (routing.weights >= 0).all()
    if router.norm_topk_prob:
        assert torch.allclose(sums, torch.ones(count), atol=1e-5)
    else:
        assert torch.allclose(sums, routing.scores.gather(1, routing.indices).sum(1), atol=1e-5)
        if router.scoring_func == "softmax":
            assert (sums <= 1 + 1e-5).all()


@FEW
@given(rules(hashed=False), COUNTS, SEEDS)
def test_the_chosen_are_the_best_of_what_is_open(drawn, count, seed):
    """No expert of a chosen group that was left out scores higher than the last one chosen."""
    router, (x, _) = make(drawn, seed), some(count, seed)
    routing = router(x)
    choice = routing.scores + (router.e_score_correction_bias if drawn[2]["selection_bias"] else 0)
    size = router.num_experts // router.n_group
    for scores, row in zip(choice, routing.indices, strict=True):
        left = [e for e in range(router.num_experts) if e // size in (row // size) and e not in row]
        assert all(scores[e] <= scores[row].min() + 1e-6 for e in left)


@FEW
@given(rules(), COUNTS, SEEDS, st.integers(0, 2))
def test_permuting_tokens_permutes_outputs(drawn, count, seed, shared):
    moe = MoE(HIDDEN, 8, make(drawn, seed), n_shared_experts=shared).eval()
    x, ids = some(count, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        assert torch.allclose(moe(x[order], ids[order]), moe(x, ids)[order], atol=1e-5)


@FEW
@given(rules(), COUNTS, SEEDS, st.booleans())
def test_the_batch_does_not_change_a_token(drawn, count, seed, training):
    moe = MoE(HIDDEN, 8, make(drawn, seed), n_shared_experts=1).train(training)
    x, ids = some(count, seed)
    with torch.set_grad_enabled(training):
        together = moe(x, ids)
        alone = torch.cat([moe(x[i : i + 1], ids[i : i + 1]) for i in range(count)])
    assert torch.allclose(together, alone, atol=1e-5)


@FEW
@given(rules(hashed=False), COUNTS, SEEDS, st.integers(0, 50))
def test_capacity_is_never_exceeded_and_drops_no_more_than_it_must(drawn, count, seed, capacity):
    routing = make(drawn, seed)(some(count, seed)[0])
    before = load_statistics(routing.indices, routing.num_experts).counts
    kept = limited(routing, capacity)
    dropped = kept.indices == routing.num_experts
    after = load_statistics(kept.indices, routing.num_experts)
    assert torch.equal(after.counts, before.clamp(max=capacity))
    assert after.dropped == int((before - after.counts).sum()) == int(dropped.sum())
    assert (kept.weights[dropped] == 0).all()


@FEW
@given(COUNTS, SEEDS, st.floats(-20, 20))
def test_a_softmax_does_not_see_a_constant_on_all_logits(count, seed, constant):
    router, (x, _) = make((8, 3, {}), seed), some(count, seed)
    x = torch.cat((x[:, :-1], torch.full((count, 1), constant)), dim=1)
    with torch.no_grad():
        router.weight[:, -1] = 0.0
        plain = router(x)
        router.weight[:, -1] = 1.0  # adds the constant to every logit
        shifted = router(x)
    assert torch.allclose(shifted.scores, plain.scores, atol=1e-5)
    assert torch.allclose(shifted.weights, plain.weights, atol=1e-5)
