"""Routing rules against numbers worked out by hand, capacity, what a layer keeps, and what is refused."""

import copy
import functools
import io
import math

import pytest
import torch
from torch import nn

from dslib import fast
from dslib.architecture.balance import CapacityRouter, limited, update_bias
from dslib.architecture.moe import MoE, Router


def router(scores_of, top_k=2, **rule):
    """A router of hidden size E whose logits are its input: the identity as gate."""
    experts = len(scores_of)
    made = Router(experts, experts, top_k, **rule)
    with torch.no_grad():
        made.weight.copy_(torch.eye(experts))
    return made


def routed(logits, top_k=2, **rule):
    return router(logits, top_k, **rule)(torch.tensor([logits]))


def layer(top_k=2, shared=0, capacity=None, experts=4, seed=0, **rule):
    torch.manual_seed(seed)
    kind = Router if capacity is None else functools.partial(CapacityRouter, capacity_factor=capacity)
    moe = MoE(8, 12, kind(8, experts, top_k, norm_topk_prob=True, **rule), n_shared_experts=shared)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.5)
    return moe


def tokens(count=10, seed=1):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


LOGITS = [0.0, 2.0, -1.0, 1.0]


def test_softmax_scores_are_used_as_they_are():
    routing = routed(LOGITS)
    total = sum(math.exp(v) for v in LOGITS)
    assert routing.indices.tolist() == [[1, 3]]
    assert routing.weights[0].tolist() == pytest.approx([math.exp(2) / total, math.exp(1) / total])
    assert routing.logits[0].tolist() == LOGITS and routing.num_experts == 4


def test_made_to_sum_to_one_is_a_softmax_over_the_chosen_logits():
    routing = routed(LOGITS, norm_topk_prob=True)
    assert routing.weights[0].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])


def test_the_factor_multiplies_at_the_end():
    plain, scaled = routed(LOGITS), routed(LOGITS, routed_scaling_factor=16.0)
    assert torch.allclose(scaled.weights, 16 * plain.weights) and torch.equal(scaled.scores, plain.scores)


def test_a_sigmoid_judges_each_expert_by_itself():
    routing = routed(LOGITS, scoring_func="sigmoid")
    assert routing.weights[0].tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))])


def test_the_square_root_of_a_softplus():
    routing = routed(LOGITS, scoring_func="sqrtsoftplus")
    assert routing.weights[0].tolist() == pytest.approx([math.sqrt(math.log1p(math.exp(v))) for v in (2, 1)])


def test_under_softmax_a_group_counts_as_its_best_expert():
    # Groups (0, 1), (2, 3), (4, 5). The best single expert is in the first, the best pair in the last.
    logits = [3.0, -9.0, 0.0, 0.0, 2.0, 2.0]
    assert routed(logits, n_group=3, topk_group=1).indices.tolist() == [[0, 1]]
    assert sorted(routed(logits, n_group=3, topk_group=2).indices[0].tolist()) == [0, 4]


def test_otherwise_a_group_counts_as_its_two_best_together():
    logits = [3.0, -9.0, 0.0, 0.0, 2.0, 2.0]
    routing = routed(logits, n_group=3, topk_group=1, scoring_func="sigmoid")
    assert sorted(routing.indices[0].tolist()) == [4, 5]


def test_the_bias_decides_who_runs_and_not_how_much_it_says():
    made = router(LOGITS, scoring_func="sigmoid", selection_bias=True, norm_topk_prob=True)
    made.e_score_correction_bias.copy_(torch.tensor([0.9, 0.0, 0.0, 0.0]))
    routing = made(torch.tensor([LOGITS]))
    assert routing.indices.tolist() == [[0, 1]]
    scores = [0.5, 1 / (1 + math.exp(-2))]
    assert routing.weights[0].tolist() == pytest.approx([s / sum(scores) for s in scores])
    assert not made.e_score_correction_bias.requires_grad


def test_the_bias_takes_part_in_the_choice_of_groups():
    made = router([0.0] * 4, top_k=2, scoring_func="sigmoid", selection_bias=True, n_group=2, topk_group=1)
    made.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 0.1, 0.1]))
    assert sorted(made(torch.zeros(1, 4)).indices[0].tolist()) == [2, 3]


def test_hash_routing_follows_the_id_and_not_the_token():
    made = Router(8, 6, 3, hash_vocab_size=20, scoring_func="sqrtsoftplus", norm_topk_prob=True)
    ids = torch.tensor([5, 5, 7])
    routing = made(tokens(3), ids)
    assert torch.equal(routing.indices[0], routing.indices[1]) and torch.equal(routing.indices, made.tid2eid[ids])
    assert all(len(set(row)) == 3 for row in made.tid2eid.tolist())
    assert not torch.equal(routing.weights[0], routing.weights[1])  # weights still come from the scores
    chosen = routing.scores.gather(1, routing.indices)
    assert torch.allclose(routing.weights, chosen / chosen.sum(1, keepdim=True))
    same, other = (Router(8, 6, 3, hash_vocab_size=20, seed=seed) for seed in (0, 1))
    assert torch.equal(same.tid2eid, made.tid2eid) and not torch.equal(other.tid2eid, made.tid2eid)


def test_capacity_serves_first_choices_first_and_earlier_tokens_first():
    moe = layer()
    with torch.no_grad():
        moe.router.weight.zero_()
        # Tokens 0 and 1 want experts (0, 1), tokens 2 and 3 want (1, 0).
        moe.router.weight[:2, :2] = torch.eye(2)
    x = torch.zeros(4, 8)
    x[:2, 0], x[:2, 1], x[2:, 1], x[2:, 0] = 2.0, 1.0, 2.0, 1.0
    plain = moe.router(x)
    routing = limited(plain, 3)  # 4 assignments each: one second choice of each expert finds no room, the later one
    assert routing.indices.tolist() == [[0, 1], [0, 4], [1, 0], [1, 4]]
    dropped = routing.indices == 4
    assert dropped.tolist() == [[False, False], [False, True], [False, False], [False, True]]
    assert (routing.weights[dropped] == 0).all()
    assert torch.equal(routing.weights[~dropped], plain.weights[~dropped])
    assert limited(plain, 4).indices.tolist() == plain.indices.tolist()
    assert (limited(plain, 0).indices == 4).all()


@pytest.mark.parametrize("shared", [0, 2])
def test_with_no_room_at_all_only_the_shared_experts_speak(shared):
    moe = layer(shared=shared, capacity=0.01).eval()
    x = tokens()
    y = moe(x)
    assert (moe.last_routing.indices == 4).all()
    assert torch.equal(y, moe.shared_experts(x) if shared else torch.zeros_like(x))


def test_a_dropped_pair_changes_nothing_but_its_own_token():
    moe = layer(capacity=1.0).eval()
    x = tokens(16)
    y = moe(x)
    routing = moe.last_routing
    dropped = routing.indices == 4
    assert 0 < dropped.sum() < dropped.numel()
    moe.router.capacity_factor = 100.0
    free, untouched = moe(x), ~dropped.any(1)
    assert torch.allclose(y[untouched], free[untouched], atol=1e-6)
    assert not torch.allclose(y[~untouched], free[~untouched], atol=1e-4)


def test_shared_experts_are_added():
    moe = layer(shared=2).eval()
    x = tokens()
    routing = moe.router(x)
    want = moe.experts(x, routing.indices, routing.weights) + moe.shared_experts(x)
    assert torch.allclose(moe(x), want, atol=1e-6)
    assert moe.shared_experts.down_proj.weight.shape == (8, 24)


def test_the_routing_is_part_of_the_graph_only_while_gradients_are_recorded():
    moe, x = layer(), tokens()
    moe(x)
    assert moe.last_routing.weights.requires_grad and moe.last_routing.logits.requires_grad
    with torch.no_grad():
        moe(x)
    assert not moe.last_routing.weights.requires_grad


def test_any_leading_shape_and_an_empty_batch():
    moe = layer(shared=1).eval()
    x = tokens(12)
    assert torch.allclose(moe(x.view(3, 4, 8)).view(12, 8), moe(x), atol=1e-6)
    assert moe(x[:0]).shape == (0, 8) and moe(torch.zeros(2, 0, 8)).shape == (2, 0, 8)
    empty = x[:0].clone().requires_grad_()
    moe(empty).sum().backward()
    assert empty.grad.shape == (0, 8)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()])
def test_routing_stays_in_float32_whatever_the_model(cast):
    moe = cast(layer(scoring_func="sigmoid", selection_bias=True))
    assert moe.router.e_score_correction_bias.dtype is torch.float32
    update_bias(moe.router, torch.tensor([9.0, 0.0, 0.0, 0.0]), 0.001)
    assert moe.router.e_score_correction_bias.tolist() == pytest.approx([-0.001, 0.001, 0.001, 0.001])
    x = tokens().to(moe.router.weight.dtype)
    with torch.no_grad():
        assert moe(x).dtype is x.dtype and moe.last_routing.weights.dtype is torch.float32


def test_the_bias_moves_with_the_model():
    moe = layer(scoring_func="sigmoid", selection_bias=True).to("meta")
    assert moe.router.e_score_correction_bias.device.type == "meta"
    assert moe.to_empty(device="cpu").router.e_score_correction_bias.dtype is torch.float32


@pytest.mark.parametrize("rule", [{}, {"scoring_func": "sigmoid", "selection_bias": True}, {"hash_vocab_size": 9}])
def test_saved_and_copied_layers_are_the_same_layer(rule):
    moe, x, ids = layer(shared=1, **rule).eval(), tokens(), torch.arange(10) % 9
    if moe.router.e_score_correction_bias is not None:
        nn.init.normal_(moe.router.e_score_correction_bias)
    other = layer(shared=1, seed=5, **rule).eval()
    other.load_state_dict(moe.state_dict())
    file = io.BytesIO()
    with torch.no_grad():
        fast.prepare(moe)
        want = moe(x, ids)
        torch.save(moe, file)
        file.seek(0)
        for twin in (other, copy.deepcopy(moe), torch.load(file, weights_only=False)):
            assert torch.allclose(twin(x, ids), want, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Router(8, 4, 0), "top_k: got 0, expected 1 to num_experts=4"),
        (lambda: Router(8, 4, 5), "top_k: got 5, expected 1 to num_experts=4"),
        (lambda: Router(8, 0, 1), "num_experts: got 0"),
        (lambda: Router(8, 6, 2, n_group=4), "n_group: got 4, expected a divisor of num_experts=6"),
        (lambda: Router(8, 6, 2, n_group=0), "n_group: got 0"),
        (lambda: Router(8, 6, 2, n_group=3, topk_group=4), "topk_group: got 4, expected 1 to n_group=3"),
        (lambda: Router(8, 6, 3, n_group=3, topk_group=1), "top_k: got 3, expected at most 2"),
        (lambda: Router(8, 4, 1, n_group=4, topk_group=2, scoring_func="sigmoid"), "groups of at least 2 experts"),
        (lambda: Router(8, 4, 2, scoring_func="tanh"), "scoring_func: got 'tanh', expected one of 'softmax'"),
        (lambda: Router(8, 4, 2)(torch.zeros(3, 7)), "x: got hidden size 7, expected 8"),
        (lambda: layer()(torch.zeros(3, 7)), "x: got hidden size 7, expected 8"),
        (lambda: MoE(9, 12, Router(8, 4, 2)), "router: made for hidden size 8, expected hidden_size=9"),
        (lambda: layer(shared=-1), "n_shared_experts: got -1"),
        (lambda: layer(capacity=0.0), "capacity_factor: got 0.0"),
        (lambda: layer(capacity=math.nan), "capacity_factor: got nan"),
        (lambda: Router(8, 4, 2, hash_vocab_size=9)(tokens()), "input_ids: got None, expected one id for each of 10"),
        (lambda: Router(8, 4, 2, hash_vocab_size=9)(tokens(), torch.zeros(3).long()), r"input_ids: got \(3,\)"),
        (lambda: Router(8, 4, 2, hash_vocab_size=9)(tokens(), torch.arange(10)), "got 0 to 9, expected 0 to 8"),
        (lambda: Router(8, 4, 2, hash_vocab_size=9)(tokens(), torch.arange(10) - 1), "got -1 to 8"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [{}, {"scoring_func": "sigmoid"}, {"n_group": 2, "topk_group": 1}])
def test_hidden_states_that_are_not_finite_are_refused_with_their_token(value, rule):
    moe, x = layer(**rule), tokens()
    x[6, 3] = x[8, 0] = value
    with pytest.raises(ValueError, match="router logits: NaN or infinite for 2 of 10 tokens, first at 6"):
        moe(x)
    assert moe.last_routing is None


def test_router_weights_that_are_not_finite_are_refused():
    moe = layer()
    moe.router.weight.data[1, 1] = math.nan
    with pytest.raises(ValueError, match="for 10 of 10 tokens, first at 0"):
        moe(tokens())


def test_a_token_whose_groups_are_all_closed_is_refused():
    made = Router(8, 4, 2, scoring_func="sigmoid", selection_bias=True, n_group=2, topk_group=1)
    made.e_score_correction_bias[:] = -math.inf
    with pytest.raises(ValueError, match="fewer than top_k experts are open to 10 of 10 tokens, first at 0"):
        made(tokens())
    made.e_score_correction_bias[2:] = 0.0
    assert set(made(tokens()).indices.flatten().tolist()) == {2, 3}
