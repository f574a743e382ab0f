"""Routing rules against numbers worked out by hand, what a layer keeps, and what is refused."""

import copy
import functools
import io
import math

import pytest
import torch
from torch import nn

from dslib import fast
from dslib.architecture.balance import CapacityRouter, update_bias
from dslib.architecture.moe import SCORES, MoE, Router, route


def router(experts, top_k=2, bias=None, **rule):
    """A router whose logits are its input: the identity as gate."""
    made = Router(experts, experts, top_k, selection_bias=bias is not None, **rule)
    with torch.no_grad():
        made.weight.copy_(torch.eye(experts))
        if bias is not None:
            made.e_score_correction_bias.copy_(torch.tensor(bias))
    return made


def layer(top_k=2, shared=0, capacity=None, experts=4, seed=0, gate=False, limit=None, **rule):
    torch.manual_seed(seed)
    kind = Router if capacity is None else functools.partial(CapacityRouter, capacity_factor=capacity)
    made = kind(8, experts, top_k, **{"norm_topk_prob": True, **rule})
    moe = MoE(8, 12, made, n_shared_experts=shared, shared_expert_gate=gate, swiglu_limit=limit)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.5)
    return moe


def tokens(count=10, seed=1):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


LOGITS = [0.0, 2.0, -1.0, 1.0]
TOTAL = sum(math.exp(v) for v in LOGITS)
GROUPED = [3.0, -9.0, 0.0, 0.0, 2.0, 2.0]  # three groups: the best single expert is in the first, the best pair last
SIGMOID, BIAS = {"scoring_func": "sigmoid"}, [0.9, 0.0, 0.0, 0.0]
RULES = {
    "softmax": (LOGITS, {}, [1, 3], [math.exp(2) / TOTAL, math.exp(1) / TOTAL]),
    "a softmax over the chosen": (LOGITS, {"norm_topk_prob": True}, [1, 3], [1 / (1 + math.exp(-1)), 1 / (1 + math.e)]),
    "a factor": (LOGITS, {"routed_scaling_factor": 16.0}, [1, 3], [16 * math.exp(v) / TOTAL for v in (2, 1)]),
    "sigmoid": (LOGITS, SIGMOID, [1, 3], [1 / (1 + math.exp(-v)) for v in (2, 1)]),
    "V4": (LOGITS, {"scoring_func": "sqrtsoftplus"}, [1, 3], [math.log1p(math.exp(v)) ** 0.5 for v in (2, 1)]),
    "the best expert's group": (GROUPED, {"n_group": 3, "topk_group": 1}, [0, 1], None),
    "the two best experts' groups": (GROUPED, {"n_group": 3, "topk_group": 2}, [0, 4], None),
    "the best pair's group": (GROUPED, {**SIGMOID, "n_group": 3, "topk_group": 1}, [4, 5], None),
    "the bias decides who runs": (LOGITS, {**SIGMOID, "bias": BIAS}, [0, 1], [0.5, 1 / (1 + math.exp(-2))]),
    "the bias of a softmax": (LOGITS, {"bias": BIAS}, [0, 1], [1 / TOTAL, math.exp(2) / TOTAL]),
    "the bias decides on groups": (
        [0.0] * 4, {**SIGMOID, "bias": [0.0, 0.0, 0.1, 0.1], "n_group": 2, "topk_group": 1}, [2, 3], [0.5, 0.5]
    ),
}  # fmt: skip


def test_the_plain_rule_is_the_router_s():
    made = layer(top_k=3, scoring_func="sigmoid", selection_bias=True).router
    made.e_score_correction_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
    indices, weights = route(tokens(50), made.weight, made.e_score_correction_bias, 3)
    routing = made(tokens(50))
    assert torch.equal(indices, routing.indices) and torch.allclose(weights, routing.weights, atol=1e-6)


@pytest.mark.parametrize("logits, rule, chosen, weights", RULES.values(), ids=RULES)
def test_rules_by_hand(logits, rule, chosen, weights):
    routing = router(len(logits), **rule)(torch.tensor([logits]))
    indices, order = routing.indices[0].sort()
    assert indices.tolist() == chosen and routing.num_experts == len(logits)
    if weights is not None:
        assert routing.weights[0][order].tolist() == pytest.approx(weights)


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


@pytest.mark.parametrize("score", SCORES)
def test_no_logit_breaks_the_gradient(score):
    """Softplus rounds to 0 below -104, and the square root has no slope there."""
    values = [-300.0, -150.0, -104.5, -104.0, -60.0, -20.0, -19.99, 0.0, 90.0, 300.0]
    logits, exact = (torch.tensor([values], dtype=kind, requires_grad=True) for kind in (torch.float32, torch.float64))
    wanted = exact.softmax(-1) if score == "softmax" else exact.sigmoid()
    if score == "sqrtsoftplus":
        wanted = torch.where(exact > 30, exact.clamp(min=1e-9), torch.log1p(exact.clamp(max=30).exp())).sqrt()
    got = SCORES[score](logits)
    torch.testing.assert_close(got.double()[0, 1:], wanted[0, 1:], atol=1e-37, rtol=2e-6)
    slopes = [torch.autograd.grad(y[0, 1:].sum(), x)[0][0, 1:].double() for y, x in ((got, logits), (wanted, exact))]
    torch.testing.assert_close(*slopes, atol=1e-7, rtol=2e-6)
    routing = router(10, 10, scoring_func=score, norm_topk_prob=True)(logits)
    assert torch.autograd.grad(routing.weights[0, :3].sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("shared", [0, 2])
def test_with_no_room_at_all_only_the_shared_experts_speak(shared):
    moe, x = layer(shared=shared, capacity=0.01).eval(), tokens()
    y = moe(x)
    assert (moe.last_routing.indices == 4).all()
    assert torch.equal(y, moe.shared_experts(x) if shared else torch.zeros_like(x))


@pytest.mark.parametrize("x_0", [0.0, math.inf])
def test_a_dropped_pair_changes_nothing_but_its_own_token(x_0):
    """Whatever its own token holds: experts of a huge token overflow, and 0 times that would be NaN."""
    moe, x = layer(capacity=1.0).eval(), tokens(16)
    moe.experts.down_proj.data[:, :, :] *= 1e20 if x_0 else 1
    x[0] *= 1e18 if x_0 else 1
    y = moe(x)
    dropped = moe.last_routing.indices == 4
    assert 0 < dropped.sum() < dropped.numel() and not dropped[0].any()
    moe.router.capacity_factor = 100.0
    free, untouched = moe(x), ~dropped.any(1)
    assert torch.allclose(y[untouched], free[untouched], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert y[1:].isfinite().all()
    assert not torch.allclose(y[~untouched], free[~untouched], atol=1e-4)


def test_shared_experts_are_added():
    moe, x = layer(shared=2, gate=True, limit=0.3), tokens()
    routing = moe.router(x)
    gate, up = moe.shared_experts.gate_up_proj(x).chunk(2, -1)
    shared = moe.shared_experts.down_proj(nn.functional.silu(gate.clamp(max=0.3)) * up.clamp(-0.3, 0.3))
    want = moe.experts(x, routing.indices, routing.weights) + torch.sigmoid(moe.shared_expert_gate(x)) * shared
    assert torch.allclose(moe(x), want, atol=1e-6)
    assert moe.shared_experts.down_proj.weight.shape == (8, 24)


def test_any_leading_shape_and_an_empty_batch():
    moe, x = layer(shared=1).eval(), tokens(12)
    assert torch.allclose(moe(x.view(3, 4, 8)).view(12, 8), moe(x), atol=1e-6)
    assert moe(x[:0]).shape == (0, 8) and moe(torch.zeros(2, 0, 8)).shape == (2, 0, 8)
    empty = x[:0].clone().requires_grad_()
    layer()(empty).sum().backward()
    assert empty.grad.shape == (0, 8)


# In float32, whatever is around it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_changes_no_number(dtype):
    """Servers build models under such a default. Steps of 0.001 would stop having an effect at 0.5 in bfloat16."""
    results = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            made = Router(16, 2, 1, scoring_func="sigmoid", selection_bias=True)
            for _ in range(600):
                update_bias(made, torch.tensor([10, 0]), 0.001)
            table = Router(16, 64, 4, hash_vocab_size=500).tid2eid
        finally:
            torch.set_default_dtype(torch.float32)
        results.append((made.e_score_correction_bias, table))
    (bias, table), (wanted, wanted_table) = results
    assert bias.dtype is torch.float32 and torch.equal(bias, wanted) and torch.equal(table, wanted_table)
    assert wanted.tolist() == pytest.approx([-0.6, 0.6], abs=1e-4)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.half()])
def test_routing_stays_in_float32_whatever_the_model(cast):
    moe = cast(layer(scoring_func="sigmoid", selection_bias=True))
    update_bias(moe.router, torch.tensor([9.0, 0.0, 0.0, 0.0]), 0.001)
    assert moe.router.e_score_correction_bias.dtype is torch.float32
    assert moe.router.e_score_correction_bias.tolist() == pytest.approx([-0.001, 0.001, 0.001, 0.001])
    x = tokens().to(moe.router.weight.dtype)
    y = moe(x)
    y.sum().backward()
    assert y.dtype is x.dtype and moe.last_routing.weights.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("count", [1, 3, 200])
def test_autocast_changes_no_choice(dtype, training, count):
    moe, x = layer(shared=1, gate=True, experts=16, scoring_func="sigmoid", selection_bias=True), tokens(count)
    wanted, routing = moe(x), moe.last_routing
    for given in (x, x.to(dtype)):
        with torch.autocast("cpu", dtype=dtype), torch.set_grad_enabled(training):
            got = moe(given)
        if given is x:
            assert got.dtype is torch.float32
            for before, now in zip(vars(routing).values(), vars(moe.last_routing).values(), strict=True):
                assert torch.equal(before, now)
            torch.testing.assert_close(got, wanted, atol=0.02 * wanted.abs().max().item(), rtol=0)
        assert moe.last_routing.logits.dtype is torch.float32
        if training:
            got.sum().backward()
            assert moe.experts.down_proj.grad.dtype is torch.float32


def test_the_bias_moves_with_the_model():
    moe = layer(scoring_func="sigmoid", selection_bias=True).to("meta")
    assert moe.router.e_score_correction_bias.device.type == "meta"
    assert moe.to_empty(device="cpu").router.e_score_correction_bias.dtype is torch.float32


# Copies


@pytest.mark.parametrize("rule", [{}, {"scoring_func": "sigmoid", "selection_bias": True}, {"hash_vocab_size": 9}])
def test_saved_and_copied_layers_are_the_same_layer(rule):
    """Also after a training step, when the last routing is part of a graph, which cannot be copied."""
    moe, x, ids = layer(shared=1, **rule), tokens(), torch.arange(10) % 9
    if moe.router.e_score_correction_bias is not None:
        nn.init.normal_(moe.router.e_score_correction_bias)
    moe(x, ids).sum().backward()
    assert moe.last_routing.weights.requires_grad and moe.last_routing.logits.requires_grad
    other, file = layer(shared=1, seed=5, **rule), io.BytesIO()
    other.load_state_dict(moe.state_dict())
    twins = [other, copy.deepcopy(moe)]
    assert torch.equal(twins[1].last_routing.weights, moe.last_routing.weights)
    assert moe.last_routing.weights.requires_grad and not twins[1].last_routing.weights.requires_grad
    with torch.no_grad():
        fast.prepare(moe)
        want = moe(x, ids)
        assert not moe.last_routing.weights.requires_grad
        torch.save(moe, file)
        file.seek(0)
        for twin in (*twins, copy.deepcopy(moe), torch.load(file, weights_only=False)):
            assert torch.allclose(twin(x, ids), want, atol=1e-6)


# What is refused


def hashed(ids):
    return Router(8, 4, 2, hash_vocab_size=9)(tokens(), ids)


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
        (lambda: layer()(torch.zeros(3, 7)), "x: got hidden size 7, expected 8"),
        (lambda: MoE(9, 12, Router(8, 4, 2)), "router: made for hidden size 8, expected hidden_size=9"),
        (lambda: layer(shared=-1), "n_shared_experts: got -1"),
        (lambda: layer(gate=True), "shared_expert_gate: got True without shared experts"),
        (lambda: layer(limit=-1.0), "swiglu_limit: got -1.0"),
        (lambda: layer(capacity=0.0), "capacity_factor: got 0.0"),
        (lambda: layer(capacity=math.nan), "capacity_factor: got nan"),
        (lambda: hashed(None), "input_ids: got None, expected one id for each of 10"),
        (lambda: hashed(torch.zeros(3).long()), r"input_ids: got \(3,\)"),
        (lambda: hashed(torch.arange(10)), "got 0 to 9, expected 0 to 8"),
        (lambda: hashed(torch.arange(10) - 1), "got -1 to 8"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [{}, {"scoring_func": "sigmoid"}, {"n_group": 2, "topk_group": 1}])
def test_what_is_not_finite_is_refused_with_its_token(value, rule):
    moe, x = layer(**rule), tokens()
    x[6, 3] = x[8, 0] = value
    with pytest.raises(ValueError, match="router logits: NaN or infinite for 2 of 10 tokens, first at 6"):
        moe(x)
    assert moe.last_routing is None
    moe.router.weight.data[1, 1] = value
    with pytest.raises(ValueError, match="for 10 of 10 tokens, first at 0"):
        moe(tokens())


def test_a_token_whose_groups_are_all_closed_is_refused():
    made = Router(8, 4, 2, scoring_func="sigmoid", selection_bias=True, n_group=2, topk_group=1)
    made.e_score_correction_bias[:] = -math.inf
    with pytest.raises(ValueError, match="fewer than top_k experts are open to 10 of 10 tokens, first at 0"):
        made(tokens())
    made.e_score_correction_bias[2:] = 0.0
    assert set(made(tokens()).indices.flatten().tolist()) == {2, 3}


@torch.no_grad()
def test_a_compiled_mixture_is_the_plain_one():
    """In float32 too, whose grouped product torch cannot trace."""
    plain = MoE(32, 16, Router(32, 4, 2))
    x = torch.randn(1, 10, 32)
    torch.testing.assert_close(torch.compile(plain, backend="eager")(x), plain(x))
