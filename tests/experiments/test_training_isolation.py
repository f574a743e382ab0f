"""Mixing keeps what it should, arms get equal tokens and sizes, domains are read and kept apart, figures repeat."""

import sys

import pytest
import torch

from dslib.architecture.balance import moe_layers
from dslib.architecture.decoder import build
from dslib.data import domains as texts
from dslib.data import text as text_module
from measured import record, recordings
from measured.experiments import training_isolation as isolation
from measured.experiments.training_isolation import ARMS, dense_config, isolation_runs, mix

TINY = {"seeds": 2, "seed_steps": 3, "steps": 6, "mix_steps": 3, "hidden_size": 32, "layers": 1, "batch_size": 3,
        "length": 16, "learning_rate": 3e-3}  # fmt: skip
IDS = torch.arange(60).view(2, 30)


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    monkeypatch.setattr(isolation, "HELD_OUT", (3, 33))


def dense(seed):
    return build(dense_config(32, 2), seed=seed)


def test_a_mixture_of_copies_computes_what_the_model_computes():
    model = dense(0)
    with torch.no_grad():
        torch.testing.assert_close(mix([model] * 4)(IDS), model(IDS), rtol=1e-4, atol=1e-5)


def test_each_models_feed_forward_network_becomes_the_expert_of_its_number_and_the_rest_is_averaged():
    models = [dense(seed) for seed in range(3)]
    mixture = mix(models)
    for number, model in enumerate(models):
        for layer, other in zip(mixture.layers, model.layers, strict=True):
            assert torch.equal(layer.mlp.experts.gate_up_proj[number], other.mlp.gate_up_proj.weight)
            assert torch.equal(layer.mlp.experts.down_proj[number], other.mlp.down_proj.weight)
    mean = torch.stack([m.layers[1].self_attn.o_proj.weight for m in models]).mean(0)
    assert torch.equal(mixture.layers[1].self_attn.o_proj.weight, mean)
    assert mixture.lm_head.weight is mixture.embed_tokens.weight
    routers = [layer.router.weight for layer in moe_layers(mixture)]
    assert all(weight.std() > 0.01 for weight in routers)
    assert not torch.equal(routers[0], next(moe_layers(mix(models, seed=1))).router.weight)


def test_arms_have_equal_sizes_and_tokens_and_the_compute_they_say():
    runs = isolation_runs(**TINY | {"seeds": 1})
    assert set(runs) == set(ARMS)
    assert len({(r["total"], r["active"]) for r in runs.values()}) == 1
    equal = {r["tokens"] for arm, r in runs.items() if arm != "joint, equal compute"}
    assert equal == {3 * 16 * (3 + 6 + 3)}
    flops = {arm: run["flops"] for arm, run in runs.items()}
    assert flops["isolated, then mixed"] < flops["joint"] < flops["joint from scratch"]
    longer = isolation_runs(["joint, equal compute", "isolated, then mixed"], **TINY | {"seeds": 1, "steps": 60})
    ratio = longer["joint, equal compute"]["flops"] / longer["isolated, then mixed"]["flops"]
    assert ratio == pytest.approx(1, abs=0.02)  # whole steps


def test_figures_repeat_and_seeds_differ():
    arms = ["isolated, then mixed", "joint"]
    once, again = isolation_runs(arms, **TINY), isolation_runs(arms, **TINY)
    assert once == again
    for run in once.values():
        assert set(run["loss"]) == set(texts.NAMES)
        assert all(len(losses) == 2 and losses[0] != losses[1] for losses in run["loss"].values())
        assert all(sum(shares) == pytest.approx(1, abs=1e-5) and len(shares) == 4 for shares in run["routing"].values())
    later = isolation_runs(arms, **TINY | {"seeds": 1, "seed": 1})
    assert [later[arm]["loss"]["code"] for arm in arms] == [once[arm]["loss"]["code"][1:] for arm in arms]
    alone = isolation_runs(["joint"], **TINY)
    assert alone["joint"]["loss"] == once["joint"]["loss"]  # an arm does not depend on the others


def test_isolated_to_the_end_moves_only_the_routers(monkeypatch):
    before, after, plain = [], [], isolation.run

    def spy(model, *arguments, **options):
        if list(moe_layers(model)):
            before.append({name: value.clone() for name, value in model.state_dict().items()})
        result = plain(model, *arguments, **options)
        if list(moe_layers(model)):
            after.append(model.state_dict())
        return result

    monkeypatch.setattr(isolation, "run", spy)
    isolation_runs(["isolated to the end", "isolated, then mixed"], **TINY | {"seeds": 1})
    moved = [{name for name in b if not torch.equal(a[name], b[name])} for b, a in zip(before, after, strict=True)]
    assert moved[0] and all(".router." in name for name in moved[0])
    assert moved[0] < moved[1]


def test_branches_see_their_own_domain_only(monkeypatch):
    seen, plain = [], isolation.run
    monkeypatch.setattr(isolation, "run", lambda m, t, *a, **o: seen.append(list(t)) or plain(m, t, *a, **o))
    isolation_runs(["isolated, then mixed"], **TINY | {"seeds": 1})
    everything = list(texts.NAMES)
    assert seen == [everything, ["novel"], ["code"], ["manual"], everything]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: isolation_runs(["joint", "apart"], **TINY), "arms: got 'apart', expected some of"),
        (lambda: isolation_runs(**TINY | {"seeds": 0}), "seeds: got 0, expected at least 1"),
        (lambda: isolation_runs(**TINY | {"batch_size": 4}), "batch_size: got 4, expected a multiple of 3"),
        (
            lambda: mix([dense(0), build(dense_config(64, 2))]),
            "models: got 2 of them, expected at least two, all of one",
        ),
        (lambda: mix([dense(0)]), "models: got 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- the texts


def test_domains_have_equal_lengths_and_keep_what_is_held_out():
    trained, kept = texts.domains()
    again, _ = texts.domains()
    assert tuple(trained) == tuple(kept) == texts.NAMES
    assert {len(t) for t in trained.values()} == {216_000} and {len(t) for t in kept.values()} == {24_000}
    assert all(torch.equal(trained[name], again[name]) for name in texts.NAMES)
    whole = text_module.to_bytes(text_module.moby_dick())[: texts.BYTES]
    assert torch.equal(torch.cat([trained["novel"], kept["novel"]]), whole)
    text = bytes(trained["code"].tolist()).decode(errors="ignore")
    assert text.count("def ") > 100 and "self." in text


def test_a_python_without_the_texts_is_named(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(texts, "MODULES", ("textwrap", "no_such_module"))
        with pytest.raises(ValueError, match=r"code: got \d+ bytes in this Python, expected at least 240000"):
            texts.domains()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match=r"manual: this Python has no module pydoc_data.topics"):
        texts.domains()


@pytest.mark.parametrize("part", ["isolation-rates", "isolation", "precision"])
def test_the_long_runs_are_recorded_as_they_are_now(part):
    """The page shows them; whoever changes what they measure has to record them again (``make record PART=...``)."""
    for name, call in record.PARTS[part]:
        shown = recordings.recorded(record.find(name), **call)
        assert shown.origin == "recorded"


def test_each_arm_runs_at_the_rate_that_served_it_best():
    rates = {call["learning_rate"]: call for _, call in record.PARTS["isolation-rates"]}
    losses = {
        rate: {
            arm: sum(sum(values) for values in run["loss"].values())
            for arm, run in recordings.recorded(isolation_runs, **call).result.items()
        }
        for rate, call in rates.items()
    }
    used = {arm: call["learning_rate"] for _, call in record.PARTS["isolation"] for arm in call["arms"]}
    assert used == {arm: min(rates, key=lambda rate: losses[rate][arm]) for arm in ARMS}
