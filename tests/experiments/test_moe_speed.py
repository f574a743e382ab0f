"""The comparison times what it says, on the same weights, and its ratios are the right way round."""

import pytest
import torch

from dslib.architecture.moe import MoE, Router
from measured import bench
from measured.experiments import moe_speed
from measured.timing import Timing


def test_one_point_has_every_way_with_equal_outputs():
    point = moe_speed.moe_speed(hidden_size=64, tokens=4, rounds=1)
    ways, theirs = set(point["seconds"]), moe_speed.implementations()
    assert {"dense", "ours", "transformers, grouped_mm", "transformers, eager"} <= ways
    assert all(isinstance(run, Timing) and run.median > 0 for run in point["seconds"].values())
    assert len(ways & {f"transformers, {name}" for name in theirs}) + len(point["failed"]) == len(theirs)
    assert point["largest_difference"] < 1e-4
    assert point["expert_bytes"] == 16 * 3 * 64 * 88 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_has_gradients_and_no_packed_weights(dtype):
    point = moe_speed.moe_speed(hidden_size=64, num_experts=64, top_k=6, tokens=8, dtype=dtype, training=True, rounds=1)
    assert "ours" in point["seconds"] and "ours, packed" not in point["seconds"]
    assert set(moe_speed.ratios(point)) == {"default", "best", "unpacked_best", "eager", "bound"}


def test_the_matmul_setting_is_put_back_even_after_an_error(monkeypatch):
    before = torch.get_float32_matmul_precision()

    def fail(*_, **__):
        raise RuntimeError("stop")

    monkeypatch.setattr(moe_speed, "compare", fail)
    with pytest.raises(RuntimeError, match="stop"):
        moe_speed.moe_speed(hidden_size=64, tokens=2, precision="medium")
    assert torch.get_float32_matmul_precision() == before


def test_transformers_block_holds_our_weights_and_agrees():
    torch.manual_seed(0)
    ours = MoE(16, 24, Router(16, 4, 2, norm_topk_prob=True))
    block = moe_speed.transformers_block(ours)
    assert block.experts.down_proj is ours.experts.down_proj and block.gate.weight is ours.router.weight
    x = torch.randn(1, 5, 16)
    assert torch.allclose(block(x), ours(x), atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "shared"),
    [
        ({"norm_topk_prob": False}, 0),
        ({"scoring_func": "sigmoid"}, 0),
        ({"n_group": 2, "topk_group": 1}, 0),
        ({"routed_scaling_factor": 2.0}, 0),
        ({}, 1),
    ],
)
def test_another_rule_or_shape_is_refused(rule, shared):
    router = Router(16, 4, 2, **{"norm_topk_prob": True} | rule)
    with pytest.raises(ValueError, match="expected Mixtral's rule"):
        moe_speed.transformers_block(MoE(16, 24, router, n_shared_experts=shared))
    with pytest.raises(ValueError, match=r"got \(8, 2\), expected one of"):
        moe_speed.moe_speed(num_experts=8)


@pytest.mark.parametrize("plain", [False, True], ids=["timings", "as recorded"])
def test_ratios(plain):
    medians = {
        "dense": 1.0, "dense, oneDNN": 0.8, "ours": 2.0, "ours, packed": 1.6, "transformers, grouped_mm": 4.0,
        "transformers, batched_mm": 3.2, "transformers, eager": 80.0,
    }  # fmt: skip
    seconds = {name: {"median": value} if plain else Timing((value,)) for name, value in medians.items()}
    assert moe_speed.ratios({"seconds": seconds}) == pytest.approx(
        {"default": 2.5, "best": 2.0, "unpacked_best": 1.6, "eager": 50.0, "bound": 2.0}
    )


def test_the_command_prints_a_row_for_each_point(capsys, monkeypatch):
    monkeypatch.setattr(bench, "TOKENS", (1, 4))
    for command in (["moe", "--hidden", "32"], ["window"]):
        assert bench.main([*command, "--rounds", "1", "--threads", str(torch.get_num_threads())]) == 0
    printed = capsys.readouterr().out
    assert printed.count("transformers' default over ours") == 4 and "times as fast as a band mask" in printed
    assert "hidden 32, 64 experts, top 6, tokens 4:" in printed
