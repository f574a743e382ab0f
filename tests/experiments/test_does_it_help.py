"""The harness: arms differ in what their line says and in nothing else, and cuts are what they are called."""

import pytest
import torch

from dslib.architecture.balance import moe_layers
from dslib.architecture.decoder import count_parameters
from dslib.performance.speed import matrix_parameters
from measured import record
from measured.experiments import does_it_help as lab

SMALL = {"hidden_size": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 16}
SHORT = {"tokens": 128, "length": 32, "precision": "float32", "compiled": False, "changes": SMALL}


def test_dense_arms_are_as_large_as_they_say():
    used = {arm: matrix_parameters(lab.make(arm, 0).config) for arm in lab.ARMS}
    total = {arm: count_parameters(lab.make(arm, 0)) for arm in lab.ARMS}
    for arm in ("dense, active size", "16 experts, top 2"):
        assert used[arm] == pytest.approx(used[lab.BASE], rel=2e-3)
    assert total["dense, total size"] == pytest.approx(total[lab.BASE], rel=2e-3)
    assert used["frozen router"] == used["auxiliary loss"] == used[lab.BASE]


def test_arms_of_a_seed_share_the_weights_that_they_have_in_common():
    base, dense, other = lab.make(lab.BASE, 1), lab.make("dense, active size", 1), lab.make(lab.BASE, 2)
    for name in ("embed_tokens.weight", "layers.4.self_attn.o_proj.weight"):
        assert torch.equal(base.decoder.get_parameter(name), dense.decoder.get_parameter(name))
        assert not torch.equal(base.decoder.get_parameter(name), other.decoder.get_parameter(name))


@pytest.mark.parametrize("arm", lab.ARMS)
def test_every_arm_trains_and_tells_what_it_used(arm):
    made = lab.run(arm, **SHORT, steps=5, windows=2, every=2)
    assert [row["tokens"] for row in made["rows"]] == [256, 512, 640]
    steps = [row["flops"] / row["tokens"] for row in made["rows"]]
    assert steps[0] == pytest.approx(steps[-1]) and steps[0] > 0
    assert made["rows"][-1]["bits"] < made["rows"][0]["bits"]


def test_a_frozen_router_keeps_its_weights_and_moves_its_bias(monkeypatch):
    kept = {}
    monkeypatch.setattr(lab, "make", lambda *a, make=lab.make, **k: kept.setdefault("model", make(*a, **k)))
    lab.run("frozen router", **SHORT, steps=3, windows=2)
    monkeypatch.undo()
    again = [layer.router for layer in moe_layers(lab.make("frozen router", 0, **SMALL))]
    now = [layer.router for layer in moe_layers(kept["model"])]
    assert len(again) == len(now) == 4
    for before, after in zip(again, now, strict=True):
        assert torch.equal(before.weight, after.weight)
        assert after.e_score_correction_bias.abs().sum() > 0


def test_the_auxiliary_loss_leaves_the_bias_alone_and_enters_the_loss():
    model = lab.make("auxiliary loss", 0, **SMALL).train()
    rows = torch.randint(4096, (2, 18), generator=torch.Generator().manual_seed(0))
    scale = model.losses(rows).balance.item() / 0.01
    assert 4 * 4 * 0.99 < scale < 4 * 16  # four layers; even routing of 4 of 16 gives 4 in each
    base = lab.make(lab.BASE, 0, **SMALL).train()
    assert torch.equal(base.losses(rows).next_token, model.losses(rows).next_token)


def test_the_average_is_of_the_last_steps_and_leaves_the_weights_alone():
    model = torch.nn.Linear(1, 1, bias=False)
    average = lab.Average(model)
    for value in range(1, 61):
        model.weight.data.fill_(value)
        average.step()
        if value == 25:  # all so far count the same
            assert average.average[0].item() == pytest.approx(13.0)
    with average():
        assert 60 - 30 < model.weight.item() < 60 - 20  # 60 less 24, and what is left of the beginning
    assert model.weight.item() == 60 and isinstance(model.weight, torch.nn.Parameter)


def test_all_arms_are_timed_in_every_round_and_each_begins_one(monkeypatch):
    begun, pretrain = [], lab.pretrain
    monkeypatch.setattr(lab, "pretrain", lambda model, *a, **k: begun.append(model) or pretrain(model, *a, **k))
    found = lab.token_seconds(("dense, active size", lab.BASE), rounds=2, steps=1, **SHORT)
    assert list(found) == ["dense, active size", lab.BASE]
    assert all(len(times) == 2 and min(times) > 0 for times in found.values())
    dense, base = begun[:2]
    assert begun == [dense, base, base, dense, dense, base]


def test_the_runs_that_count_are_those_that_are_recorded():
    for seed in range(5):
        asked = [arguments for _, arguments in record.PARTS[f"help-{seed}"]]
        assert asked == [{"arm": arm, "seed": seed, **lab.LONG} for arm in record.HELP_ARMS]


def made_up(*bits, each=(100, 10.0, 1.0)):
    tokens, flops, seconds = each
    return {"rows": [
        {"tokens": n * tokens, "flops": n * flops, "seconds": n * seconds, "bits": value}
        for n, value in enumerate(bits, 1)
    ]}  # fmt: skip


def test_three_cuts_through_the_same_runs_give_three_answers():
    # The arm is better a token, costs twice the FLOPs and three times the seconds.
    base, arm = made_up(3.0, 2.0, 1.0), made_up(2.9, 1.9, 0.9, each=(100, 20.0, 3.0))
    twice = lambda cut: lab.difference([arm, arm], [base, base], cut)  # noqa: E731
    assert twice("tokens").value == pytest.approx(-0.1)
    assert twice("flops").value == pytest.approx(lab.bits_at(arm, "flops", 30) - 1.0) == pytest.approx(1.4)
    assert twice("seconds").value == pytest.approx(2.9 - 1.0)
    slower = lab.with_seconds(arm, 0.06)
    assert [row["seconds"] for row in slower["rows"]] == pytest.approx([6.0, 12.0, 18.0])
    assert twice("tokens").low == pytest.approx(-0.1) and twice("tokens").n == 2


def test_the_optimizer_counts_every_expert_and_the_model_the_chosen():
    base, few, dense = (lab.token_flops(arm) for arm in (lab.BASE, "16 experts, top 2", "dense, active size"))
    assert few["model"] == pytest.approx(base["model"], rel=0.01) == pytest.approx(dense["model"], rel=0.01)
    assert few["optimizer"] > 3 * base["optimizer"] and few["optimizer"] == pytest.approx(few["model"], rel=0.01)
    assert lab.token_flops(lab.BASE, tokens=4096)["optimizer"] == base["optimizer"] / 2
    runs = lab.recorded_runs(lab.BASE)[lab.BASE]
    assert all(row["flops"] / row["tokens"] == pytest.approx(sum(base.values())) for row in runs[0]["rows"])


def test_at_the_level_pace_equal_seconds_are_level():
    for arm, base in ((made_up(2.0, 1.4, 1.0), made_up(2.2, 1.6, 1.3)), (made_up(2.0, 1.9), made_up(1.9, 1.7))):
        for one, other in ((arm, base), (base, arm)):
            pace = lab.level_pace([one, one], [other, other]).value
            slower = lab.with_seconds(one, 0.01 * pace)
            assert lab.difference([slower], [lab.with_seconds(other, 0.01)], "seconds").value == pytest.approx(0)


BAD_CALLS = [
    (lambda: lab.run("sparse"), "arm"),
    (lambda: lab.run(steps=0), "steps"),
    (lambda: lab.run(rate=0.0), "rate"),
    (lambda: lab.run(every=0), "every"),
    (lambda: lab.token_seconds(("sparse",)), "arm"),
    (lambda: lab.token_seconds(rounds=0), "rounds"),
    (lambda: lab.bits_at(made_up(2.0, 1.0), "joules", 1), "cut"),
    (lambda: lab.saving([made_up(2.0)], [made_up(2.0)], "joules"), "cut"),
    (lambda: lab.bits_at(made_up(2.0, 1.0), "tokens", 50), "100 to 200"),
    (lambda: lab.bits_at(made_up(2.0, 1.0), "tokens", 500), "100 to 200"),
]


def test_what_is_saved_is_read_where_the_base_has_the_arms_last_bits():
    def made(*looks):
        return {"rows": [{"flops": flops, "bits": bits} for flops, bits in looks]}

    base = [made((1, 2.0), (2, 1.5), (3, 1.6)), made((1, 2.0), (2, 1.0))]
    arm = [made((2, 1.9), (3, 1.75)), made((2, 1.9), (3, 1.5))]
    found = lab.saving(arm, base)
    assert found.value == pytest.approx(1 - 1.5 / 3) and found.low == pytest.approx(found.high)
    assert lab.saving([*arm, made((1, 0.5))], [*base, made((1, 0.6))]) is None  # it never comes there
    slow = made_up(2.0, 1.0, each=(100, 10.0, 4.0))  # as good a token, at four times the seconds
    assert lab.saving([slow, slow], [made_up(2.0, 1.0)] * 2, "seconds").value == pytest.approx(0.75)


@pytest.mark.parametrize("call, words", BAD_CALLS)
def test_bad_calls_are_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()
