"""The rounding that is judged is the one that is stored, and what is said of it means what its name says."""

import copy

import pytest
import torch

from dslib.architecture import whole
from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.int4.layers import Int4Linear, quantize_
from measured.experiments import int4
from measured.experiments.int4 import BLOCKS, layer_quality, round_, rounded, same_start, smollm2_quality

SHAPE = DecoderConfig(64, 64, 128, 2, 4, 2, tie_word_embeddings=True)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method, symmetric", [("rtn", False), ("rtn", True), ("hqq", False)])
def test_rounded_is_what_a_layer_stores(method, symmetric):
    weight = random(64, 128)
    layer = Int4Linear.from_weight(weight, 32, method, symmetric)
    assert torch.equal(rounded(weight, 32, method, symmetric), layer.dequantize())


def test_another_order_of_columns_is_another_choice_of_groups():
    weight = random(64, 128)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(5))
    want = torch.empty_like(weight)
    want[:, order] = rounded(weight[:, order])
    assert torch.equal(rounded(weight, shuffle=5), want)
    assert not torch.equal(rounded(weight), want)
    # Weights that were in four bits lose little until their groups are broken.
    again, other = (rounded(want, shuffle=shuffle) - want for shuffle in (5, 0))
    assert again.norm() < 0.01 * want.norm() < 0.05 * want.norm() < other.norm()


def test_coarser_groups_lose_more():
    weight = random(64, 128) * (1 + 5 * (random(64, 128, seed=1) > 2.5))
    errors = [(rounded(weight, size) - weight).norm() for size in (16, 32, 64, "row", "tensor")]
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: rounded(random(64, 128), method="awq"), "method: got 'awq'"),
        (lambda: rounded(random(64, 128), "column"), "group_size: got 'column'"),
        (lambda: rounded(random(64, 128), 48), "group_size: got 48"),
        (lambda: round_(build(SHAPE), ("router",)), "parts: got 'router'"),
    ],
)
def test_what_cannot_be_rounded(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_only_the_parts_that_are_named_change():
    model = build(SHAPE, seed=0)
    old = copy.deepcopy(model)
    found = round_(model, ("head",))
    assert found["weights"] == 64 * 64
    assert torch.equal(model.embed_tokens.weight, old.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, rounded(old.embed_tokens.weight))
    for a, b in zip(model.layers.parameters(), old.layers.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_kernel_adds_little_to_the_rounding():
    """What is measured in float32 holds for the layers that run: bfloat16 activations are a tenth of the effect."""
    model = build(SHAPE, seed=0).eval()
    ids = torch.arange(32).view(1, -1)
    simulated, real = copy.deepcopy(model), quantize_(copy.deepcopy(model))
    round_(simulated, BLOCKS)
    with torch.no_grad():
        plain, wanted, got = model(ids), simulated(ids), real(ids)
    assert (got - wanted).norm() < 0.25 * (wanted - plain).norm()


def test_same_start():
    assert [same_start(a, b) for a, b in (([1, 2, 3], [1, 2, 4]), ([1], [1]), ([2], [1]))] == [2, 1, 0]


@pytest.fixture
def small(monkeypatch):
    """In place of SmolLM2: a small model of random weights, and random text."""
    ids = torch.randint(64, (3, 40), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(int4, "_smollm2", lambda passages, length: (build(SHAPE, seed=0).eval(), ids))


def test_figures_of_a_model(small):
    result = smollm2_quality(group_sizes=(32, "tensor"), new_tokens=4)
    assert [(row["group_size"], row["shuffle"]) for row in result["rows"]] == [
        (32, None), (32, 0), ("tensor", None), ("tensor", 0),
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["ratio"]["n"] == row["agree"]["n"] == row["run"]["n"] == 3
        assert row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"]
        assert 0 <= row["agree"]["value"] <= 1 and 0 <= row["run"]["value"] <= 4
    assert result["rows"][2]["error"] == pytest.approx(result["rows"][3]["error"])  # one group, whatever the order
    # With random weights and a tied head the shown token is the likeliest, whatever is lost: only the losses tell.
    assert result["rows"][0]["ratio"]["value"] != 1


def test_nothing_lost_is_said_to_be_nothing(small, monkeypatch):
    monkeypatch.setattr(int4, "rounded", lambda weight, **options: weight.clone())
    (row,) = smollm2_quality(group_sizes=(32,), shuffles=(None,), new_tokens=4)["rows"]
    assert (row["error"], row["ratio"]["value"], row["agree"]["value"], row["run"]["value"]) == (0, 1, 1, 4)


def test_figures_of_single_parts_and_of_a_model_trained_here(small):
    rows = layer_quality(group_size=32)["rows"]
    assert [row["parts"] for row in rows[:2]] == [["attention"], ["gate and up"]]
    by_name = {"+".join(row["parts"]): row["weights"] for row in rows}
    assert by_name["+".join(BLOCKS)] == sum(by_name[part] for part in BLOCKS)
    assert all("run" not in row for row in rows)


def test_four_bits_on_the_courses_own_model_experts_included():
    result = int4.trained_quality(passages=3, length=48, group_sizes=(32, "row"))
    assert len(result["rows"]) == 3 * 2 and all(row["ratio"]["n"] == 3 for row in result["rows"])
    assert 0.8 < result["bits_per_byte"] < 2
    for fine, coarse in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        assert 0.05 < fine["error"] < coarse["error"] < 0.2
    model, before = whole.load()[0].decoder, whole.load()[0].decoder
    int4._round_blocks_(model, 32)
    experts = model.layers[1].mlp.experts
    torch.testing.assert_close(experts.gate_up_proj[3], int4.rounded(before.layers[1].mlp.experts.gate_up_proj[3], 32))
    torch.testing.assert_close(experts.down_proj[3], int4.rounded(before.layers[1].mlp.experts.down_proj[3], "row"))
    torch.testing.assert_close(model.layers[1].mlp.router.weight, before.layers[1].mlp.router.weight)
