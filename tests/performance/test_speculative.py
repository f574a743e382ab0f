"""Guesses change the time and nothing else: greedy tokens are equal, sampled ones have the model's distribution."""

import dataclasses
import math

import pytest
import torch

from dslib.architecture import decoder, sparse_decoder
from dslib.architecture.generation import Sampling, generate
from dslib.performance import speculative
from dslib.performance.speculative import ModelDraft, PromptLookup, accept, speculate, with_layers

LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
CONFIGS = {
    "V1": decoder.preset("tiny"),
    "V1, window": decoder.preset("tiny", sliding_window=6),
    "V3": sparse_decoder.preset("tiny-moe"),
    "V3, latent": dataclasses.replace(sparse_decoder.preset("tiny-moe"), **LATENT),
}


def noisy(config, seed=0, std=0.2):
    """Weights with a spread of logits, so that greedy choices are clear."""
    model = decoder.build(config, seed=seed).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=std)
    return model


class Wrong:
    """Always wrong, always the same length: nothing may stay but what is right by chance."""

    def propose(self, text, count):
        return [(text[-1] + 1 + i) % 256 for i in range(count)], None


class Oracle:
    """Knows the text."""

    def __init__(self, tokens):
        self.tokens = tokens

    def propose(self, text, count):
        return self.tokens[len(text) : len(text) + count], None


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_the_ordinary_loop(name, count):
    model, prompt = noisy(CONFIGS[name]), [3, 1, 4, 1, 5]
    want = generate(model, [prompt], 40)[0].tokens
    drafts = {
        "wrong": Wrong(),
        "oracle": Oracle(prompt + want),
        "lookup": PromptLookup(),
        "layers": ModelDraft(with_layers(model, [0, 1]), 60),
        "itself": ModelDraft(model, 60),
    }
    for draft, made in ((draft, speculate(model, prompt, 40, drafts[draft], count)) for draft in drafts):
        assert made.tokens == want, draft
        assert made.accepted + made.passes + 1 == 40
        if draft in ("oracle", "itself"):
            assert made.acceptance == 1 and made.passes == math.ceil(39 / (count + 1))


def test_it_ends_where_it_should():
    model, prompt = noisy(CONFIGS["V1"]), [3, 1, 4, 1, 5]
    want = generate(model, [prompt], 40)[0].tokens
    end = want[17]
    short = want[: want.index(end) + 1]
    assert speculate(model, prompt, 40, Oracle(prompt + want), 5, eos_token_id=end).tokens == short
    assert generate(model, [prompt], 40, eos_token_id=end)[0].tokens == short
    assert speculate(model, prompt, 1, Wrong()).tokens == want[:1]


def test_lookup_finds_the_latest_place_of_the_longest_match():
    lookup = PromptLookup(longest=2)
    assert lookup.propose([1, 2, 9, 1, 2, 8, 5, 1, 2], 3)[0] == [8, 5, 1]
    assert lookup.propose([7, 2, 6, 2], 9)[0] == [6, 2]
    assert lookup.propose([1, 2, 3], 3)[0] == []
    assert lookup.propose([1], 3)[0] == []


def distribution(vocab, seed, rows):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)).mul(1.5).softmax(-1)


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


# 5 outcomes, 4 degrees of freedom: one run in a thousand lies above 18.5, and the seeds are fixed.
LIMIT, VOCAB, RUNS = 18.5, 5, 20_000


@pytest.mark.parametrize("certain", [False, True])
def test_accepted_tokens_have_the_models_distribution(certain):
    p, q = distribution(VOCAB, 1, 3), distribution(VOCAB, 2, 2)
    generator = torch.Generator().manual_seed(3)
    first, second = torch.zeros(VOCAB), torch.zeros(VOCAB)
    for _ in range(RUNS):
        guesses = [0, 3] if certain else torch.multinomial(q, 1, generator=generator).flatten().tolist()
        got = accept(p, guesses, None if certain else q, generator)
        first[got[0]] += 1
        if len(got) > 1:
            second[got[1]] += 1
    assert chi_square(first, RUNS * p[0]) < LIMIT
    assert second.sum() > 1000 and chi_square(second, second.sum() * p[1]) < LIMIT


def test_the_test_sees_a_wrong_rule():
    """Drawing again from the whole distribution, instead of what is left of it, is the likely mistake."""
    p, q = distribution(VOCAB, 1, 1)[0], distribution(VOCAB, 2, 1)[0]
    generator = torch.Generator().manual_seed(3)
    counts = torch.zeros(VOCAB)
    for _ in range(RUNS):
        guess = int(torch.multinomial(q, 1, generator=generator))
        stays = torch.rand((), generator=generator) < p[guess] / q[guess]
        counts[guess if stays else int(torch.multinomial(p, 1, generator=generator))] += 1
    assert chi_square(counts, RUNS * p) > 10 * LIMIT


def test_a_whole_text_has_the_models_distribution():
    config = decoder.DecoderConfig(3, 16, 16, 1, 2, 1, max_position_embeddings=16)
    model, small, sampling = noisy(config, 1, 0.25), noisy(config, 2, 0.25), Sampling(temperature=1.0)
    with torch.no_grad():
        pairs = torch.zeros(3, 3, dtype=torch.double)
        first = sampling.probabilities(model(torch.tensor([[0, 1]]))[:, -1])[0]
        for a in range(3):
            pairs[a] = first[a] * sampling.probabilities(model(torch.tensor([[0, 1, a]]))[:, -1])[0]
    runs, counts, stayed = 4000, torch.zeros(3, 3), 0
    for seed in range(runs):
        made = speculate(model, [0, 1], 4, ModelDraft(small, 8, sampling, seed), 2, sampling=sampling, seed=runs + seed)
        counts[made.tokens[0], made.tokens[1]] += 1
        stayed += made.accepted
    assert 0.2 * runs < stayed < 2.5 * runs, "some guesses stay and some do not"
    assert chi_square(counts, runs * pairs) < 26.1  # 8 degrees of freedom, one in a thousand


def test_the_gain_is_a_sum_over_lengths():
    assert speculative.expected_gain(0.0, 4, 0.1) == pytest.approx(1 / 1.4)
    assert speculative.expected_gain(1.0, 4, 0.0) == pytest.approx(5)
    assert speculative.expected_gain(0.5, 2, 0.25, 1.5) == pytest.approx(1.75 / 2)


def test_bad_input_is_named():
    model = noisy(CONFIGS["V1"])
    for arguments, message in (
        (([], 4, Wrong()), "prompt: got 0"),
        (([1], 0, Wrong()), "max_new_tokens: got 0"),
        (([1], 4, Wrong(), 0), "count: got 0"),
        (([1], 9, Oracle([1, 2, 999, 999, 999, 999, 999, 999, 999])), "draft: guessed"),
    ):
        with pytest.raises(ValueError, match=message):
            speculate(model, *arguments)
    with pytest.raises(ValueError, match="got 2 rows for 2 guesses"):
        accept(torch.ones(2, 4), [1, 2])
    with pytest.raises(ValueError, match=r"layers: got \[4\], expected some of 0 to 3"):
        with_layers(model, [4])
    with pytest.raises(ValueError, match="got 3 and 2"):
        PromptLookup(2, 3)


def test_the_table_of_drafts_adds_up(monkeypatch):
    from types import SimpleNamespace

    from measured.experiments import speed_speculative

    model = noisy(CONFIGS["V1"])
    tokenizer = lambda text: SimpleNamespace(input_ids=list(text.encode()[:20]))  # noqa: E731
    monkeypatch.setattr(speed_speculative, "load_smollm2", lambda dtype: (model, tokenizer))
    found = speed_speculative.speculative_speed("float32", new_tokens=12, counts=(3,), rounds=1)
    rows = found["rows"]
    assert len(rows) == 2 * 4 and all(row["same_tokens"] for row in rows)
    assert all(1 <= row["tokens_per_pass"] <= 4 and row["times"] > 0 for row in rows)
    assert {row["draft_cost"] for row in rows if row["draft"] == "prompt lookup"} == {0.0}
    assert type(model.layers[0].mlp.down_proj).__name__ == "Linear", "the model itself keeps its weights"
