"""Pretraining: what a step reads, a run in pieces that is the run in one, and what stops it."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from dslib.architecture.balance import moe_layers
from dslib.architecture.whole import Whole, tiny_deepseek
from dslib.performance.pretrain import Plan, bits_per_byte, byte_lengths, pretrain, rows_at

SMALL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "kv_lora_rank": 12,
    "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip
PLAN = Plan(steps=8, tokens=96, length=12, late_length=24, late_from=0.5)
TOKENS = (np.arange(3000) * 7 % 11 + np.arange(3000) % 3).astype(np.uint16)


def model():
    torch.manual_seed(0)
    return Whole(tiny_deepseek(**SMALL))


def run(made, checkpoint=None, plan=PLAN, tokens=TOKENS, **options):
    return pretrain(made, tokens, 3.6, plan, checkpoint, compiled=False, **options)


def test_an_epoch_reads_every_window_once_and_the_next_one_in_another_order():
    tokens, plan = np.arange(1202), Plan(steps=1000, tokens=40, length=20, late_length=20)
    rows = torch.cat([rows_at(tokens, step, plan) for step in range(59)])  # 59 windows an epoch, two a step
    assert rows.shape == (118, 22)
    assert torch.equal(rows - rows[:, :1], torch.arange(22).expand(118, -1))
    first, second = rows[:59, 0].tolist(), rows[59:, 0].tolist()
    for starts in (first, second):
        assert sorted(starts) == list(range(min(starts), min(starts) + 20 * 59, 20))
    assert first != second
    assert torch.equal(rows_at(tokens, 7, plan), rows[14:16])  # the step alone decides


def test_rows_become_longer_late_in_the_run():
    shapes = [tuple(rows_at(TOKENS, step, PLAN).shape) for step in (0, 3, 4, 7)]
    assert shapes == [(8, 14), (8, 14), (4, 26), (4, 26)]


def test_it_learns_and_the_bias_evens_out_the_load():
    made, told = model(), []
    losses = run(made, plan=dataclasses.replace(PLAN, steps=60), on_progress=told.append)
    assert len(losses) == len(told) == 60
    assert told[-1].bits < 0.6 * told[0].bits
    assert told[-1].after_next < told[0].after_next
    assert told[0].bits == pytest.approx(math.log2(60) / 3.6, rel=0.05)
    assert all(layer.router.e_score_correction_bias.abs().max() > 0.01 for layer in moe_layers(made))
    assert told[-1].busiest >= 1


@pytest.mark.parametrize("stops", [(3,), (1, 6)])
def test_a_run_in_pieces_is_the_run_in_one(tmp_path, stops):
    whole = model()
    losses = run(whole)
    for stop in stops:
        made = model()
        run(made, tmp_path / "c.pt", every=100, on_progress=lambda at, stop=stop: at.step == stop)
    made = model()
    assert run(made, tmp_path / "c.pt") == losses
    assert all(map(torch.equal, made.state_dict().values(), whole.state_dict().values()))


def test_a_loss_that_is_no_number_stops_and_leaves_the_last_good_state(tmp_path):
    class Spoilt:
        """Ids outside the vocabulary would raise; a weight that is NaN does what a diverged run does."""

        def __init__(self, made):
            self.made = made

        def __call__(self, at):
            if at.step == 5:
                with torch.no_grad():
                    self.made.decoder.norm.weight.fill_(math.nan)

    made = model()
    with pytest.raises((FloatingPointError, ValueError), match=r"step 5|NaN"):
        run(made, tmp_path / "c.pt", every=2, on_progress=Spoilt(made))
    assert len(run(model(), tmp_path / "c.pt", on_progress=lambda at: True)) == 5  # it goes on behind step 4
    assert run(model(), tmp_path / "c.pt") == run(model())


BAD = {
    "another plan": ({"plan": dataclasses.replace(PLAN, seed=1)}, ("plan.seed", "expected 0")),
    "another text": ({"tokens": TOKENS[:-1]}, ("text", "2999 tokens")),
}


@pytest.mark.parametrize("name", BAD)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, name):
    run(model(), tmp_path / "c.pt", on_progress=lambda at: True)
    changes, words = BAD[name]
    with pytest.raises(ValueError) as error:
        run(model(), tmp_path / "c.pt", **changes)
    assert all(word in str(error.value) for word in words)


PLANS = {
    "length": {"length": 100},
    "late_from": {"late_from": 1.5},
    "steps": {"steps": 0},
    "matrix_rate": {"matrix_rate": 0},
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_that_cannot_be_are_named(name):
    with pytest.raises(ValueError, match=name):
        Plan(**PLANS[name])


def test_a_text_shorter_than_a_row_is_refused():
    with pytest.raises(ValueError, match="got 20, expected more than"):
        rows_at(TOKENS[:20], 0, PLAN)


def test_bits_a_byte_are_nats_over_ln_2_and_bytes():
    made = model().eval()
    rows = torch.randint(1, 60, (3, 12))
    lengths = torch.arange(60) % 4
    losses = torch.nn.functional.cross_entropy(made(rows[:, :-1]).mT, rows[:, 1:], reduction="none")
    wanted = losses.sum() / math.log(2) / lengths[rows[:, 1:]].sum()
    assert bits_per_byte(made, rows, lengths) == pytest.approx(wanted.item(), rel=1e-5)
    later = losses[:, 4:].sum() / math.log(2) / lengths[rows[:, 5:]].sum()
    assert bits_per_byte(made, rows, lengths, context=4) == pytest.approx(later.item(), rel=1e-5)


def test_special_tokens_stand_for_no_bytes():
    class Named(list):
        all_special_ids = (0,)

        def convert_ids_to_tokens(self, ids):
            return [self[i] for i in ids]

    assert byte_lengths(Named(["<|end|>", "a", "Ġthe"])).tolist() == [0, 1, 4]
