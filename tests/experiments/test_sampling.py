import pytest
import torch

from dslib.architecture.decoder import DecoderConfig, build
from measured.experiments import sampling

SHAPE = DecoderConfig(300, 64, 128, 2, 4, 2, tie_word_embeddings=True)


class Characters:
    def __call__(self, text, **_):
        return type("Encoded", (), {"input_ids": [ord(letter) % 300 for letter in text[:5000]]})


@pytest.fixture
def small(monkeypatch):
    model = build(SHAPE, seed=0)
    monkeypatch.setattr(sampling, "load_smollm2", lambda: (model, Characters()))
    sampling._loaded.cache_clear()
    yield model
    sampling._loaded.cache_clear()


def test_times_name_every_rule_and_the_sort():
    found = sampling.sampling_times(vocab_size=500, batch=2, rounds=2)
    assert set(found) == {*sampling.RULES, "one sort"} and all(run.median > 0 and run.n == 2 for run in found.values())


def test_repeats_are_runs_that_were_there_before():
    assert sampling.repeats([1, 2, 1, 2, 1, 2], 2) == [False, False, True, True, True]
    assert sampling.repeats([7] * 6) == [False, True, True]
    ids = torch.randint(3, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    runs = [tuple(ids[i : i + 4]) for i in range(57)]
    assert sum(sampling.repeats(ids)) == 57 - len(set(runs))


def test_texts_by_rule(small):
    found = {rule: sampling.rule_text(rule, passages=2, prompt_tokens=4, new_tokens=20) for rule in sampling.TEXTS}
    for one in found.values():
        assert [len(one[key]) for key in ("repeats", "tens", "log_p")] == [2, 2, 2] and len(one["tens"][0]) == 2
        assert one["repeats"][0] == pytest.approx((7 * one["tens"][0][0] + 10 * one["tens"][0][1]) / 17)
    assert max(found["greedy"]["log_p"]) > max(found["T 1"]["log_p"])


def test_a_silenced_head_is_one_whose_columns_are_nought(small):
    ids = torch.arange(10)[None]
    before = small(ids)
    with sampling.without(small, [(1, 2)]):
        silent = small(ids)
    assert torch.equal(small(ids), before) and not torch.allclose(silent, before)
    size = small.config.hidden_size // 4
    with torch.no_grad():
        small.layers[1].self_attn.o_proj.weight[:, 2 * size : 3 * size] = 0
    torch.testing.assert_close(small(ids), silent)


def test_scores_are_the_weights_that_attention_gives(small, monkeypatch):
    """Values that say whose they are: what attention then returns are its weights."""
    scores, seen = sampling.induction_scores(small, length=6, lists=2), []
    assert scores.shape == (2, 4) and 0 < scores.min() and scores.max() < 1

    def weights(q, k, v, step, *_):
        everyone = torch.eye(12).expand(2, 2, 12, 12)
        found = torch.nn.functional.scaled_dot_product_attention(q, k, everyone, is_causal=True, enable_gqa=True)
        seen.append(torch.stack([found[:, :, 6 + i, 1 + i] for i in range(6)]).mean((0, 1)))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    monkeypatch.setattr("dslib.architecture.layers.attend", weights)
    sampling.induction_scores(small, length=6, lists=2)
    torch.testing.assert_close(torch.stack(seen), scores)


def test_heads_and_as_many_others(small, monkeypatch):
    scores = torch.tensor([[0.9, 0.1, 0.3, 0.0], [0.0, 0.0, 0.4, 0.0]])
    monkeypatch.setattr(sampling, "induction_scores", lambda model: scores)
    sizes = {"passages": 2, "prompt_tokens": 4, "new_tokens": 8}
    found = {silent: sampling.loop_heads(silent, **sizes) for silent in ("none", "induction", "others")}
    places = {silent: [tuple(head[:2]) for head in one["heads"]] for silent, one in found.items()}
    assert places["none"] == [] and places["induction"] == [(0, 0), (0, 2), (1, 2)]
    assert sorted(places["others"])[:2] == [(0, 1), (0, 3)] and places["others"][2] in [(1, 0), (1, 1), (1, 3)]
    assert found["none"]["loss"] != found["induction"]["loss"] != found["others"]["loss"]
    assert all(len(one[key]) == 2 for one in found.values() for key in ("repeats", "copied", "loss"))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: sampling.sampling_times(rounds=0), "rounds"),
        (lambda: sampling.loop_heads("all"), "silent"),
        (lambda: sampling.rule_text("T 0.6", passages=0), "count"),
        (lambda: sampling.rule_text("T 7"), "rule"),
    ],
)
def test_bad_input(call, word, small):
    with pytest.raises(ValueError, match=word):
        call()
