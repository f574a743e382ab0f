"""Adapters' experiments, at a size of seconds: what is compared is what the page says it is."""

import functools

import pytest
import torch

from dslib.architecture.whole import load
from dslib.data import corpus
from dslib.data.text import slices
from measured.experiments import adapters as lab

SHORT = {"steps": 2, "rows": 1, "every": 1, "windows": 2}


@pytest.fixture(autouse=True, scope="module")
def _read_once():
    with pytest.MonkeyPatch.context() as patch:  # for all runs together: it takes longer than a run
        patch.setattr(lab, "new_domain", functools.cache(lab.new_domain))
        yield


def test_the_new_domain_is_split_by_document_and_strange_to_the_model():
    documents = lab.numpy_documents()
    assert len(documents) == len(set(documents)) > 500
    train, test = lab.new_domain()
    assert 5 < len(train) / len(test) < 12
    old = torch.from_numpy(corpus.token_stream("validation")[0].astype("int64"))
    model, sizes = load()[0], lab.byte_lengths(corpus.tokenizer())
    new, known = (lab.bits_per_byte(model, slices(text, 257, 8), sizes) for text in (test, old))
    assert new > known + 0.2


def test_arms_differ_in_their_start_and_in_what_moves():
    runs = {arm: lab.forgetting(arm, **SHORT) for arm in lab.ARMS}
    before = runs["all weights"]["rows"][0]
    for arm, made in runs.items():
        assert [row["tokens"] for row in made["rows"]] == [0, 256, 512]
        assert (made["rows"][0] == before) == (arm not in ("the article's", "frozen base"))
    assert runs["the article's"]["rows"][0] == runs["frozen base"]["rows"][0]
    assert runs["the article's"]["rows"][0]["old"] > before["old"] + 0.01
    trained = {arm: made["trained"] for arm, made in runs.items()}
    assert trained["LoRA"] == pytest.approx(trained["frozen base"], rel=0.15) and trained["LoRA"] < 0.2e6
    assert trained["frozen base"] == trained["zero start, frozen base"]
    assert trained["the article's"] == trained["zero start"] > trained["all weights"] > 4.5e6


def test_windows_that_pick_a_rate_are_not_those_that_compare():
    rows = lab.forgetting(**SHORT)["rows"]
    assert all(row["new"] != row["pick"] for row in rows)
    assert len({row["new"] for row in rows}) == len(rows)  # it has moved


def test_old_text_at_an_equal_loss_on_the_new_one_is_read_between_two_looks():
    made = {"rows": [{"new": new, "old": old} for new, old in ((2.0, 1.0), (1.5, 1.2), (1.0, 1.3))]}
    assert lab.old_at(made, 1.75) == pytest.approx(1.1) and lab.old_at(made, 1.0) == pytest.approx(1.3)
    assert lab.old_at(made, 0.9) is None and lab.old_at(made, 2.1) is None


@pytest.mark.parametrize("call, words", [
    (lambda: lab.forgetting("IA3"), "arm"),
    (lambda: lab.forgetting(steps=0), "steps"),
    (lambda: lab.forgetting(rate=0.0), "rate"),
])  # fmt: skip
def test_bad_calls_are_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_two_loras_start_from_one_loss():
    made = lab.beside_peft(rank=2, rows=1, length=8, rounds=2)
    assert made["difference"] < 1e-4 and made["ratio"][1] <= made["ratio"][0] <= made["ratio"][2]
