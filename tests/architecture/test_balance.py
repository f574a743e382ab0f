"""Balance losses, the selection bias and load statistics, against numbers worked out by hand."""

import math

import pytest
import torch
from torch import nn

from dslib.architecture import balance
from dslib.architecture.moe import MoE, Router, Routing
from dslib.performance.training import fit

SCORES = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.5, 0.2, 0.3]])
TOP_1 = SCORES.argmax(-1, keepdim=True)  # experts 0, 0, 1, 0


def layer(top_k=2, **rule):
    torch.manual_seed(0)
    return MoE(16, 8, Router(16, 4, top_k, **rule))


def run_without_gradients():
    moe = layer()
    with torch.no_grad():
        moe(torch.randn(3, 16))
    return moe


def even(experts=4, top_k=2):
    """Each token on the next ``top_k`` experts, equal scores."""
    indices = torch.arange(experts * top_k).view(-1, top_k) % experts
    return torch.full((experts, experts), 1 / experts), indices


def test_switch_loss_by_hand():
    # f = 3/4, 1/4, 0; P = 1.9/4, 1.5/4, 0.6/4
    want = 3 * (0.75 * 1.9 / 4 + 0.25 * 1.5 / 4)
    for scale in (1, 3):  # scores that do not sum to 1 are made to
        assert balance.switch_loss(scale * SCORES, TOP_1).item() == pytest.approx(want)


def test_sequence_loss_by_hand():
    # First sequence: f = 3 * (2/2, 0, 0), P = 0.65, ...; second: f = 3 * (1/2, 1/2, 0), P = 0.3, 0.5, 0.2
    want = (3 * 0.65 + 1.5 * 0.3 + 1.5 * 0.5) / 2
    for scale in (1, 3):
        assert balance.sequence_loss(scale * SCORES, TOP_1, 2).item() == pytest.approx(want)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_even_routing_gives_the_least_and_collapse_the_most(top_k):
    scores, indices = even(6, top_k)
    assert balance.switch_loss(scores, indices).item() == pytest.approx(top_k)
    assert balance.sequence_loss(scores, indices, 1).item() == pytest.approx(1)
    collapsed = torch.zeros(6, 6)
    collapsed[:, :top_k] = 1 / top_k
    everyone = torch.arange(top_k).expand(6, -1).contiguous()
    assert balance.switch_loss(collapsed, everyone).item() == pytest.approx(6)
    assert balance.sequence_loss(collapsed, everyone, 2).item() == pytest.approx(6 / top_k)


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), math.log(5)]])
    assert balance.z_loss(logits).item() == pytest.approx((math.log(2) ** 2 + math.log(8) ** 2) / 2)
    assert balance.z_loss(logits, torch.tensor([True, False])).item() == pytest.approx(math.log(2) ** 2)


@pytest.mark.parametrize("name", ["switch_loss", "sequence_loss", "z_loss"])
def test_padding_counts_for_nothing(name):
    """Tokens behind the mask may hold anything; the result is that of the real ones alone, gradients too."""
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]])

    def value(rows, mask=None):
        rows = rows.clone().requires_grad_()
        scores = rows.softmax(-1)
        rest = {"switch_loss": (scores.topk(2).indices,), "sequence_loss": (scores.topk(2).indices, 2), "z_loss": ()}
        loss = getattr(balance, name)(rows if name == "z_loss" else scores, *rest[name], mask=mask)
        return loss, torch.autograd.grad(loss, rows)[0]

    real = mask.flatten().bool()
    loss, gradient = value(logits, mask)
    wanted, wanted_gradient = value(logits[real])
    assert torch.allclose(loss, wanted)
    assert torch.allclose(gradient[real], wanted_gradient) and not gradient[~real].any()
    assert torch.allclose(loss, value(logits.masked_fill(~real.unsqueeze(1), 9.0), mask)[0])


def test_sequences_of_different_length_count_the_same():
    mask = torch.tensor([1, 1, 1, 0]).bool()
    first = balance.sequence_loss(SCORES[:2], TOP_1[:2], 1)
    second = balance.sequence_loss(SCORES[2:3], TOP_1[2:3], 1)
    assert torch.allclose(balance.sequence_loss(SCORES, TOP_1, 2, mask), (first + second) / 2)
    mask = torch.tensor([1, 1, 0, 0]).bool()  # the second sequence is padding alone
    assert torch.allclose(balance.sequence_loss(SCORES, TOP_1, 2, mask), first)


@pytest.mark.parametrize("weights", [{"switch": 1.0}, {"sequence": 1.0, "batch_size": 3}, {"z": 1.0}])
@pytest.mark.parametrize("rule", [{}, {"scoring_func": "sigmoid", "selection_bias": True}])
def test_gradients_reach_the_router_and_nothing_behind_it(rule, weights):
    moe = layer(**rule)
    moe(torch.randn(3, 10, 16))
    balance.total_balance_loss(moe, **weights).backward()
    assert moe.router.weight.grad.abs().max() > 1e-6
    assert moe.experts.gate_up_proj.grad is None and moe.experts.down_proj.grad is None


def test_a_step_down_the_loss_evens_out_the_load():
    torch.manual_seed(0)
    moe, x = layer(), torch.randn(400, 16) + 1.0
    before = balance.load_statistics(moe.router(x).indices, 4)
    optimizer = torch.optim.SGD(moe.router.parameters(), lr=0.003)
    for _ in range(30):
        moe(x)
        optimizer.zero_grad()
        balance.total_balance_loss(moe, switch=1.0).backward()
        optimizer.step()
    after = balance.load_statistics(moe.router(x).indices, 4)
    assert after.max_vio < 0.1 < 0.3 < before.max_vio and after.entropy > before.entropy


def moved(load, speed=0.25):
    router = layer(selection_bias=True).router
    balance.update_bias(router, load, speed)
    return router.e_score_correction_bias.tolist()


@pytest.mark.parametrize("level", [0, 2**24, 2**30, 2**40, 2**50])
def test_the_bias_moves_by_its_speed_against_the_load(level):
    """In float32, loads beyond 2 ** 24 that differ by one would be the same number, or their mean another."""
    assert moved(level + torch.tensor([9, 2, 5, 4])) == [-0.25, 0.25, 0.0, 0.25]
    assert moved(level + torch.tensor([1, 0, 1, 1])) == [-0.25, 0.25, -0.25, -0.25]
    assert moved(level + torch.tensor([1, 1, 1, 1])) == moved(torch.full((4,), 0.25)) == [0.0] * 4


def test_parts_of_a_batch_are_added_up_in_the_loss():
    """What update_bias's docstring says to do where gradients are accumulated."""
    loads, results = {}, []
    batches = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(0))

    def loss(moe, x):
        y = moe(x)
        load = balance.expert_load(moe.last_routing.indices, 4)
        loads["all"] = loads.get("all", 0) + load
        return y.square().mean()

    for parts in (1, 4):
        moe = layer(selection_bias=True, scoring_func="sigmoid")
        fit(
            moe, lambda step: (batches,), steps=3, loss=loss, accumulate=parts,
            after_step=lambda moe: balance.update_bias(moe.router, loads.pop("all"), 0.01),
        )  # fmt: skip
        results.append(moe.router.e_score_correction_bias)
    assert torch.equal(*results) and results[0].any()


def test_the_bias_evens_out_the_load_and_leaves_the_weights_of_the_experts():
    torch.manual_seed(0)
    router, x = layer(scoring_func="sigmoid", selection_bias=True).router, torch.randn(400, 16) + 3.0
    before = balance.load_statistics(router(x).indices, 4).max_vio
    for _ in range(200):
        balance.update_bias(router, balance.expert_load(router(x).indices, 4), 0.005)
    routing = router(x)
    assert balance.load_statistics(routing.indices, 4).max_vio < 0.1 < 0.5 < before
    assert torch.equal(routing.weights, routing.scores.gather(1, routing.indices))
    assert not router.e_score_correction_bias.requires_grad


def test_the_sequence_loss_counts_scores_without_the_bias():
    moe = layer(scoring_func="sigmoid", selection_bias=True)
    x = torch.randn(20, 16)
    moe(x)
    before = balance.total_balance_loss(moe, sequence=1.0, batch_size=2)
    moe.router.e_score_correction_bias += torch.tensor([5.0, 5.0, 0.0, 0.0])  # everyone on the first two now
    moe(x)
    assert balance.expert_load(moe.last_routing.indices, 4).tolist() == [20, 20, 0, 0]
    assert torch.equal(balance.total_balance_loss(moe, sequence=1.0, batch_size=2), before)


def test_the_total_is_the_weighted_sum_over_layers():
    model = nn.Sequential(layer(), nn.LayerNorm(16), layer(top_k=1))
    model(torch.randn(2, 6, 16))
    mask = torch.rand(2, 6) > 0.3
    one, two = (moe.last_routing for moe in balance.moe_layers(model))
    wanted = sum(
        0.3 * balance.switch_loss(r.scores, r.indices, mask)
        + 0.2 * balance.sequence_loss(r.scores, r.indices, 2, mask)
        + 0.1 * balance.z_loss(r.logits, mask)
        for r in (one, two)
    )
    got = balance.total_balance_loss(model, switch=0.3, sequence=0.2, z=0.1, batch_size=2, mask=mask)
    assert torch.allclose(got, wanted)
    assert balance.total_balance_loss(model).item() == 0


def test_hash_routing_is_passed_over():
    plain, hashed = layer(), layer(hash_vocab_size=10)
    x, ids = torch.randn(6, 16), torch.arange(6)
    hashed(plain(x), ids)
    both = nn.ModuleList([plain, hashed])
    assert torch.equal(balance.total_balance_loss(both, switch=1.0), balance.total_balance_loss(plain, switch=1.0))


def test_load_by_hand():
    indices = torch.tensor([[0, 1], [0, 2], [0, 4], [1, 0]])  # 4 of 4 experts: dropped
    assert balance.expert_load(indices, 4).tolist() == [4, 2, 1, 0]
    assert balance.expert_load(indices, 4, torch.tensor([True, True, False, False])).tolist() == [2, 1, 1, 0]
    stats = balance.load_statistics(indices, 4)
    assert stats.dropped == 1 and stats.idle == 0.25
    assert stats.share.tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])
    assert stats.max_vio == pytest.approx(4 / (7 / 4) - 1)
    want = -sum(p * math.log(p) for p in (4 / 7, 2 / 7, 1 / 7)) / math.log(4)
    assert stats.entropy == pytest.approx(want, rel=1e-5)


def test_extremes_of_the_statistics():
    stats = balance.load_statistics(even()[1], 4)
    assert (stats.max_vio, stats.entropy, stats.idle, stats.dropped) == (0, pytest.approx(1), 0, 0)
    stats = balance.load_statistics(torch.zeros(5, 1, dtype=torch.long), 4)
    assert (stats.max_vio, stats.entropy, stats.idle) == (3, 0, 0.75)
    assert balance.LoadStats(torch.tensor([2**30 + 2, 2**30 - 2, 2**30, 2**30])).max_vio == 2**-29
    stats = balance.load_statistics(torch.full((5, 1), 4), 4)  # everything dropped
    assert stats.dropped == 5 and stats.idle == 1 and stats.share.tolist() == [0] * 4 and stats.max_vio == 0


# Capacity


def test_capacity_serves_first_choices_first_and_earlier_tokens_first():
    weights = torch.tensor([[0.6, 0.4]]).repeat(4, 1)
    plain = Routing(torch.zeros(4, 4), torch.zeros(4, 4), torch.tensor([[0, 1], [0, 1], [1, 0], [1, 0]]), weights)
    routing = balance.limited(plain, 3)  # 4 assignments each: the later second choice of each expert finds no room
    assert routing.indices.tolist() == [[0, 1], [0, 4], [1, 0], [1, 4]]
    assert torch.equal(routing.weights, weights * torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]]))
    assert balance.limited(plain, 4).indices.tolist() == plain.indices.tolist()
    assert (balance.limited(plain, 0).indices == 4).all()


@pytest.mark.parametrize("hundredths", range(1, 201))
def test_capacity_is_rounded_down_from_what_was_written(hundredths):
    """0.29 of 100 is 29, though in floats it is 28.999…; all tokens want the same two experts."""
    router = balance.CapacityRouter(16, 4, 2, capacity_factor=hundredths / 100)
    routing = router(torch.ones(200, 16))
    counts = balance.expert_load(routing.indices, 4)
    assert counts.max() == min(200, hundredths) and (counts > 0).sum() == 2


ROUTING = (SCORES, TOP_1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: balance.switch_loss(SCORES[:2], TOP_1), r"scores: got shape \(2, 3\)"),
        (lambda: balance.switch_loss(SCORES, TOP_1 + 3), "indices: expected 0 to 3"),
        (lambda: balance.switch_loss(SCORES, TOP_1 - 1), "indices: expected 0 to 3"),
        (lambda: balance.switch_loss(SCORES, TOP_1.int()), "indices: got torch.int32"),
        (lambda: balance.switch_loss(SCORES[:0], TOP_1[:0]), "at least one token"),
        (lambda: balance.switch_loss(*ROUTING, torch.ones(3)), "mask: got shape"),
        (lambda: balance.switch_loss(*ROUTING, torch.zeros(4)), "mask: got no real token"),
        (lambda: balance.sequence_loss(*ROUTING, 3), "batch_size: got 3, expected a divisor of the 4 tokens"),
        (lambda: balance.sequence_loss(*ROUTING, 0), "batch_size: got 0"),
        (lambda: balance.z_loss(SCORES[0]), "logits: got shape"),
        (lambda: balance.expert_load(TOP_1[:, 0], 3), "indices: got torch.int64 of shape"),
        (lambda: balance.expert_load(TOP_1 + 3, 3), "indices: expected 0 to 3"),
        (lambda: balance.load_statistics(TOP_1, 3, torch.zeros(4)), "mask: got no real token"),
        (lambda: balance.update_bias(layer().router, torch.ones(4), 0.1), "router: got one without selection bias"),
        (lambda: moved(torch.ones(3), 0.1), "load: got shape"),
        (lambda: moved(torch.ones(4), -1), "speed: got -1"),
        (lambda: moved(torch.ones(4), math.nan), "speed: got nan"),
        (lambda: moved(torch.tensor([1.0, math.nan, 1, 1]), 0.1), "load: got nan"),
        (lambda: balance.total_balance_loss(nn.Linear(2, 2), z=1.0), "model: got no mixture"),
        (lambda: balance.total_balance_loss(layer(), z=1.0), "model: got a layer not yet run with gradients"),
        (lambda: balance.total_balance_loss(run_without_gradients(), z=1.0), "not yet run with gradients"),
        (lambda: balance.total_balance_loss(layer(hash_vocab_size=10), z=1.0), "no mixture of experts with a choice"),
        (lambda: balance.total_balance_loss(layer(), sequence=1.0), "batch_size: got None"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
