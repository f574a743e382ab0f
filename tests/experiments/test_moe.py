"""The small trainings: equal sizes, equal batches, figures that mean what they say; and that each can be recorded."""

import pytest
import torch

from dslib.architecture.balance import moe_layers
from dslib.architecture.depth import ExitRule, early_exit
from dslib.data import text as text_module
from measured import record, recordings
from measured.experiments import depth, moe
from measured.experiments.moe import DESIGNS, explained, train_designs

TINY = {"steps": 3, "seeds": 2, "hidden_size": 32, "length": 16, "batch_size": 2, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    monkeypatch.setattr(moe, "HELD_OUT", (3, 33))


def test_designs_that_are_compared_have_equal_sizes_but_for_the_router():
    results = train_designs(["bias", "64, top 8", "63, top 7, 1 shared", "dense, total size"], **TINY | {"steps": 1})
    rows = {"bias": 16, "64, top 8": 64, "63, top 7, 1 shared": 63, "dense, total size": 0}
    for figure in ("total", "active"):
        bare = {name: results[name][figure] - 2 * 32 * rows[name] for name in rows}
        if figure == "active":
            del bare["dense, total size"]
        assert len(set(bare.values())) == 1, bare
    assert results["dense, total size"]["active"] == results["dense, total size"]["total"]


def test_each_seed_gives_one_figure_and_the_same_one_again():
    once, again = train_designs(["bias", "dense x 2"], **TINY), train_designs(["bias", "dense x 2"], **TINY)
    assert once == again
    assert len(once["bias"]["loss"]) == len(once["bias"]["max_vio"]) == 2
    assert once["bias"]["loss"][0] != once["bias"]["loss"][1]
    assert [len(trace) for trace in once["bias"]["trace"]] == [3, 3]
    assert "max_vio" not in once["dense x 2"]
    later = train_designs(["bias"], **TINY | {"seeds": 1, "seed": 1})
    assert later["bias"]["loss"] == once["bias"]["loss"][1:]


def test_only_the_bias_moves_the_bias():
    for name in ("no cure", "switch loss", "bias"):
        model, trace = moe.train_design(DESIGNS[name], steps=3, hidden_size=32, batch_size=2, length=16)
        moved = [layer.router.e_score_correction_bias.abs().max() > 0 for layer in moe_layers(model)]
        assert all(moved) == any(moved) == (name == "bias")
        assert len(trace) == 3 and not model.training


def test_held_out_text_is_not_trained_on():
    trained, held_out = moe.text_parts()
    tail = text_module.to_bytes(text_module.moby_dick())[len(trained) :]
    assert len(trained) / (len(trained) + len(tail)) == pytest.approx(0.9, abs=1e-4)
    assert held_out.shape == (3, 33) and torch.equal(held_out[0], tail[:33])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train_designs(["bias", "nothing"], **TINY), "designs: got 'nothing'"),
        (lambda: train_designs(["bias"], **TINY | {"seeds": 0}), "seeds: got 0, expected at least 1"),
        (lambda: depth.exit_runs(seeds=0), "seeds: got 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_choices_are_counted_for_each_byte():
    model, _ = moe.train_design(DESIGNS["bias"], steps=1, hidden_size=32, batch_size=2, length=16)
    tokens = torch.tensor([[65, 66, 65, 67]])
    counts = moe.choices_by_byte(model, tokens)
    assert counts.shape == (2, 256, 16)
    assert counts.sum((0, 2))[[65, 66, 67, 68]].tolist() == [8, 4, 4, 0]
    first = next(moe_layers(model)).last_routing.indices
    assert counts[0, 66].nonzero().flatten().tolist() == sorted(first[1].tolist())


def test_explained_is_one_when_the_byte_settles_the_expert_and_zero_when_it_says_nothing():
    settled, nothing, one_expert = torch.zeros(3, 256, 4)
    settled[[1, 2, 3, 4], [0, 1, 2, 3]] = 10
    nothing[10:20] = 5
    one_expert[:, 2] = 1
    assert [explained(counts) for counts in (settled, nothing, one_expert)] == pytest.approx([1, 0, 0], abs=1e-9)


def test_rank_correlation():
    rank = depth.spearman
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank(x, x.exp()) == pytest.approx(1) and rank(x, -x) == pytest.approx(-1)
    assert rank(x, torch.tensor([1.0, 3.0, 3.0, 9.0])) == pytest.approx(0.9486833)  # ranks 1, 2.5, 2.5, 4
    assert rank(x, torch.ones(4)) == 0.0


def test_figures_of_early_exit_agree_with_early_exit():
    model = depth.train_exits(True, steps=2, layers=4, hidden_size=32, length=16, batch_size=2)
    _, text = moe.text_parts()
    figures = depth.exit_figures(model, text, 2, [0.0, 0.05, 1.0])
    assert len(figures["by_exit"]) == 3
    (shallow, first), _, (deep, last) = figures["curve"]
    assert (shallow, deep) == (2, 4)
    assert (first, last) == pytest.approx((figures["by_exit"][0], figures["by_exit"][-1]), rel=1e-5)
    with torch.no_grad():
        depths = early_exit(model, text[:, :-1], ExitRule(0.05, 2)).depths.float()
    middle = figures["harder"][1]
    assert sum(middle["quarters"]) / 4 == pytest.approx(depths.mean().item(), abs=1e-5)
    waiting = figures["waiting"][1]
    assert waiting[0] == pytest.approx(depths.mean().item(), abs=1e-5) and waiting == sorted(waiting)


def test_runs_have_both_trainings_and_a_figure_for_each_seed():
    runs = depth.exit_runs(seeds=2, steps=1, layers=3, hidden_size=32, length=16)
    assert {name: len(seeds) for name, seeds in runs.items()} == {"all exits": 2, "last layer only": 2}
    assert runs["all exits"][0] != runs["last layer only"][0]


@pytest.mark.parametrize("part", ["experts", "experts-training", "training", "depth"])
def test_the_long_parts_are_recorded(part):
    """Pages show them; whoever changes what they measure has to record them again (``make record PART=...``)."""
    kept = [(r.function, r.arguments) for r in recordings.read_all()]
    for name, call in record.PARTS[part]:
        function = record.find(name)
        assert (recordings.function_name(function), recordings._bind(function, call)) in kept
