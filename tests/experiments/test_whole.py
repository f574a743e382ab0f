"""The whole model's experiments, at a size of seconds: against plain lines, and that what they compare is the same."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dslib.architecture.whole import load
from dslib.data import corpus
from dslib.performance.pretrain import Plan
from measured.experiments import whole as lab


@pytest.fixture(scope="module")
def shipped():
    return load()[0]


def test_bits_of_a_document_are_those_of_one_pass_and_beyond_a_window_of_halves(shipped):
    document = corpus.encode(["The people of the United States elect a President. " * 12])[0]
    ids = torch.from_numpy(np.concatenate([document[-1:], document]).astype(np.int64))
    with torch.no_grad():
        nats = F.cross_entropy(shipped(ids[None, :-1])[0], ids[1:], reduction="none")
    assert lab.document_bits(shipped, document) == pytest.approx(nats.sum().item() / math.log(2), rel=1e-5)
    # With windows of 16, tokens 16 to 23 are predicted from what begins at token 8.
    short = np.append(document[:22], document[-1])
    ids = torch.from_numpy(np.concatenate([short[-1:], short]).astype(np.int64))
    with torch.no_grad():
        early = F.cross_entropy(shipped(ids[None, :15])[0], ids[1:16], reduction="sum")
        late = F.cross_entropy(shipped(ids[None, 8:23])[0, 7:], ids[16:24], reduction="sum")
    assert lab.document_bits(shipped, short, 16) == pytest.approx((early + late).item() / math.log(2), rel=1e-5)


def test_every_document_is_judged_and_counted_in_bytes(shipped):
    made = lab.model_bits("validation", every=40)
    documents = corpus.load("validation")[::40]
    assert made["documents"] == [f"{one.source}/{one.id}" for one in documents]
    assert made["bytes"] == [len(one.text.encode()) for one in documents]
    rate = sum(made["bits"]) / sum(made["bytes"])
    assert 0.8 < rate < 1.46  # below what any n-gram reaches on all of it


def test_the_model_is_compared_with_counting_document_by_document():
    ours = {"documents": ["a/1", "b/1", "a/2"], "bytes": [10, 30, 10], "bits": [10.0, 60.0, 20.0]}
    counted = {"documents": ours["documents"], "bits": {"6": [15.0, 60.0, 30.0]}}
    every, first, second = lab.beside_counting(ours, counted)
    assert (every["source"], first["source"], second["source"]) == ("all", "a", "b")
    assert (every["documents"], every["ours"], every["counted"]) == (3, 90 / 50, 105 / 50)
    assert every["better"][0] == pytest.approx(15 / 50) and first["better"][0] == pytest.approx(15 / 20)
    assert second["better"] == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="other documents"):
        lab.beside_counting(ours, counted | {"documents": ["a/1"]})


def test_drafts_write_the_same_text_and_some_guesses_stay():
    made = lab.module_drafts(prompts=2, new_tokens=16, rounds=1)
    assert [(row["count"], row["prompt"]) for row in made["rows"]] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(row["same_tokens"] for row in made["rows"])
    assert 0.1 < np.mean([row["acceptance"] for row in made["rows"]]) < 1
    assert set(made["times"]) == {"1", "2"} and made["tokens_per_second"] > 0


def test_drawn_text_is_drafted_as_well():
    made = lab.sampled_drafts(prompts=2, new_tokens=16, rounds=1)
    assert [row["count"] for row in made["rows"]] == [1, 1, 2, 2] and set(made["times"]) == {"1", "2"}
    assert 0.05 < np.mean([row["acceptance"] for row in made["rows"]]) < 1


def test_the_ways_to_train_compute_one_loss(shipped):
    rows = torch.from_numpy(corpus.token_stream("validation")[0][:132].astype(np.int64)).view(4, 33)
    losses = {name: loss(rows) for name, (loss, _) in lab._steps(False).items()}
    assert set(losses) == {"quick", "plain", "transformers eager", "transformers grouped_mm"}
    for loss in losses.values():
        torch.testing.assert_close(loss, losses["plain"], rtol=1e-4, atol=1e-4)


def test_steps_are_compared_at_the_rows_that_are_best_for_each(monkeypatch):
    monkeypatch.setattr(lab, "Plan", partial(Plan, late_length=16))  # a batch of 512 tokens would be the least
    made = lab.step_speed(length=16, rows=(2, 4), rounds=2, compiled=False, precision="bfloat16")
    assert made["compiled"] is False
    assert set(made["ratios"]) == set(made["tokens_per_second"]) - {"quick"}
    assert all(set(rates) == {"2", "4"} for rates in made["tokens_per_second"].values())
    assert all(low <= median <= high for median, low, high in made["ratios"].values())


def test_parts_of_a_step_are_shares():
    made = lab.step_parts(length=16, rows=32, rounds=1, compiled=False)
    assert sum(made.values()) == pytest.approx(1) and made["fused"] == 0 and 0 < made["products"] < 1


def test_training_speed_counts_every_token():
    made = lab.training_speed("tiny", steps=2, tokens=128, precision="float32")
    median, low, high = made["tokens_per_second"]
    assert 0 < low <= median <= high and not made["full_size"]
    assert made["minutes_for_the_plan"] == pytest.approx(Plan.steps * Plan.tokens / median / 60)


def test_texts_begin_after_their_prompts_and_are_the_same_again(shipped):
    once = lab.texts(new_tokens=6)
    assert list(once) == list(lab.PROMPTS) and once == lab.texts(new_tokens=6)


BAD_CALLS = [
    (lambda: lab.model_bits("validation", every=0), "every"),
    (lambda: lab.model_bits("dev"), "split"),
    (lambda: lab.training_speed("large"), "size"),
    (lambda: lab.step_parts(rounds=0), "rounds"),
    (lambda: lab.sampled_drafts(temperature=0.0), "temperature"),
]


@pytest.mark.parametrize("call, name", BAD_CALLS)
def test_what_cannot_be_measured_is_refused_by_name(call, name):
    with pytest.raises(ValueError, match=name):
        call()
