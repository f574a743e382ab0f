"""Guesses change the time and nothing else: greedy tokens are equal, sampled ones have the model's distribution."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from dslib.architecture import decoder, sparse_decoder
from dslib.architecture.decoder import with_layers
from dslib.architecture.generation import Sampling, generate
from dslib.architecture.whole import Whole, tiny_deepseek
from dslib.performance import speculative
from dslib.performance.speculative import ModelDraft, PredictionDraft, PromptLookup, accept, speculate

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
    for draft, guesses in drafts.items():
        made = speculate(model, prompt, 40, guesses, count)
        assert made.tokens == want, draft
        assert made.accepted + made.passes + 1 == 40
        if draft in ("oracle", "itself"):
            assert made.acceptance == 1 and made.passes == math.ceil(39 / (count + 1))


def ids_in_any_form(end):
    return [end, [end], {end, 255}, (end,), torch.tensor(end), torch.tensor([end, 255]), np.int64(end),
            np.array(end), np.array([end]), [torch.tensor(end)], iter([end])]  # fmt: skip


def test_it_ends_where_it_should():
    model, prompt = noisy(CONFIGS["V1"]), [3, 1, 4, 1, 5]
    want = generate(model, [prompt], 40)[0].tokens
    end = want[17]
    short = want[: want.index(end) + 1]
    for ends in ids_in_any_form(end):
        assert speculate(model, prompt, 40, Oracle(prompt + want), 5, eos_token_id=ends).tokens == short
    assert generate(model, [prompt], 40, eos_token_id=end)[0].tokens == short
    for same in (torch.tensor(prompt), np.array(prompt), [torch.tensor(token) for token in prompt]):
        assert speculate(model, same, 1, Wrong()).tokens == want[:1]


def test_a_text_may_fill_the_model_and_no_more():
    model = noisy(decoder.preset("tiny", max_position_embeddings=12))
    assert len(speculate(model, [1, 2, 3, 4], 8, Wrong()).tokens) == 8
    with pytest.raises(ValueError, match=r"4 tokens and 9 new ones make 13, more than .*max_position_embeddings=12"):
        speculate(model, [1, 2, 3, 4], 9, Wrong())
    windowed = noisy(decoder.preset("tiny", max_position_embeddings=12, sliding_window=4))
    assert len(speculate(windowed, [1, 2, 3, 4], 9, Wrong()).tokens) == 9


@pytest.mark.parametrize("sampling", [None, Sampling(), Sampling(temperature=0.0, top_k=3), Sampling(0.7)])
def test_how_a_draft_draws_does_not_change_a_greedy_text(sampling):
    model, prompt = noisy(CONFIGS["V1"]), [3, 1, 4, 1, 5]
    made = speculate(model, prompt, 20, ModelDraft(model, 40, sampling), 3, sampling=Sampling())
    assert made.tokens == generate(model, [prompt], 20)[0].tokens


@pytest.mark.parametrize("layers", [[0], [1], [0, 2], [0, 1, 2, 3, 4], [2, 4]])
def test_drafts_of_some_layers_whatever_the_first_ones_are(layers):
    """Embedding, those layers, norm and head; nothing is copied, and nothing else changes, not even a mode."""
    config = sparse_decoder.preset("tiny-moe", num_hidden_layers=5, first_k_dense_replace=2, num_hash_layers=1)
    model, ids = noisy(config), torch.tensor([[3, 1, 4, 1, 5]])
    model.layers[0].train()
    twin = with_layers(model, layers)
    assert model.layers[0].training and not model.layers[1].training and not twin.training
    plain = copy.deepcopy(model)
    plain.layers = torch.nn.ModuleList(plain.layers[layer] for layer in layers)
    torch.testing.assert_close(twin(ids), plain(ids))
    assert {id(p) for p in twin.parameters()} <= {id(p) for p in model.parameters()}
    assert twin.config.first_k_dense_replace == sum(layer < 2 for layer in layers)
    assert len(speculate(model, [3, 1], 6, ModelDraft(twin, 16)).tokens) == 6


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_no_draw(default):
    model, before, texts = noisy(CONFIGS["V1"]), torch.get_default_dtype(), []
    for dtype in (before, default):
        torch.set_default_dtype(dtype)
        try:
            draft = ModelDraft(with_layers(model, [0, 1]), 40, Sampling(1.0))
            texts.append(speculate(model, [3, 1], 20, draft, sampling=Sampling(1.0)).tokens)
        finally:
            torch.set_default_dtype(before)
    assert texts[0] == texts[1]


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


def plain_rule(p, guesses, q):
    """The rule as the page writes it."""
    for n, x in enumerate(guesses):
        one = q[n] if q is not None else torch.nn.functional.one_hot(torch.tensor(x), p.shape[1])
        if torch.rand(()) < p[n, x] / one[x]:
            continue
        return [*guesses[:n], int(torch.multinomial((p[n] - one).clamp(min=0), 1))]
    return [*guesses, int(torch.multinomial(p[-1], 1))]


@pytest.mark.parametrize("certain", [False, True])
def test_the_rule_in_a_few_lines_makes_the_same_draws(certain):
    for case in range(100):
        p, q = distribution(6, case, 5), distribution(6, 1000 + case, 4)
        torch.manual_seed(case)
        guesses = torch.multinomial(q, 1)[:, 0].tolist()
        state, made = torch.get_rng_state(), []
        for rule in (plain_rule, accept):
            torch.set_rng_state(state)
            made.append(rule(p, guesses, None if certain else q))
        assert made[0] == made[1]


def test_a_whole_text_has_the_models_distribution():
    config = decoder.DecoderConfig(3, 16, 16, 1, 2, 1, max_position_embeddings=16)
    model, small, sampling = noisy(config, 1, 0.25), noisy(config, 2, 0.25), Sampling(temperature=1.0)
    with torch.no_grad():
        pairs = torch.zeros(3, 3, dtype=torch.double)
        first = sampling.probabilities(model(torch.tensor([[0, 1]]))[:, -1])[0]
        for a in range(3):
            pairs[a] = first[a] * sampling.probabilities(model(torch.tensor([[0, 1, a]]))[:, -1])[0]
    runs, counts, stayed = 2000, torch.zeros(3, 3), 0
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


def broken(value=math.nan):
    model = noisy(CONFIGS["V1"])
    model.norm.weight.data[0] = value
    return model


def other_vocabulary(model):
    other = noisy(decoder.preset("tiny", vocab_size=300))
    return speculate(model, [1], 9, ModelDraft(other, 20, Sampling(1.0)), sampling=Sampling(1.0), seed=1)


FAR = Oracle([1, 2] + [999] * 7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: speculate(m, [], 4, Wrong()), "an empty prompt"),
        (lambda m: speculate(m, [1, 256], 4, Wrong()), "token id 256 is outside the vocabulary, 0 to 255"),
        (lambda m: speculate(m, [1.5], 4, Wrong()), "token id 1.5 is outside"),
        (lambda m: speculate(m, [[1, 2]], 4, Wrong()), r"token id \[1, 2\] is outside"),
        (lambda m: speculate(m, [1], 0, Wrong()), "max_new_tokens: got 0"),
        (lambda m: speculate(m, [1], 4, Wrong(), 0), "count: got 0"),
        (lambda m: speculate(m, [1], 4, Wrong(), eos_token_id=1.5), "eos_token_id: token id 1.5 is outside"),
        (lambda m: speculate(m, [1], 4, Wrong(), eos_token_id="</s>"), "eos_token_id: token id '</s>' is"),
        (lambda m: speculate(m, [1], 9, FAR), "draft: guessed"),
        (other_vocabulary, r"got \d rows for \d guesses drawn from \(\d, 300\)"),
        (lambda m: speculate(broken(), [1], 4, Wrong()), "logits: .*not a number"),
        (lambda m: speculate(broken(), [1], 4, Wrong(), sampling=Sampling(1.0)), "logits: .*not a number"),
        (lambda m: speculate(m, [1], 4, ModelDraft(broken(), 9, Sampling(1.0))), "logits: .*not a number"),
        (lambda m: speculate(broken(math.inf), [1], 4, Wrong(), sampling=Sampling(1.0)), "logits: .*infinite"),
        (lambda m: accept(torch.ones(2, 4), [1, 2]), "probabilities: got 2 rows for 2 guesses"),
        (lambda m: with_layers(m, [4]), r"layers: got \[4\], expected some of 0 to 3"),
        (lambda m: with_layers(m, []), r"layers: got \[\]"),
        (lambda m: PromptLookup(2, 3), "shortest: got 3, expected 1 to 2"),
        (lambda m: PromptLookup(2, 0), "shortest: got 0"),
        (lambda m: speculative.expected_gain(1.1, 2, 0.1), "acceptance: got 1.1"),
        (lambda m: speculative.expected_gain(0.5, 2, 0.0, 0.0), "pass_cost: got 0.0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(noisy(CONFIGS["V1"]))


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


def test_it_runs_in_evaluation_mode_as_generate_does_and_leaves_every_mode():
    model, prompt = noisy(CONFIGS["V1"]), [3, 1, 4, 1, 5]
    model.layers[1].mlp = torch.nn.Sequential(model.layers[1].mlp, torch.nn.Dropout(0.5))
    want = generate(model, [prompt], 20)[0].tokens
    model.train().layers[0].eval()
    before = [part.training for part in model.modules()]
    assert speculate(model, prompt, 20, ModelDraft(model, 40), 3).tokens == want
    assert [part.training for part in model.modules()] == before


def test_a_models_own_prediction_module_drafts_without_changing_the_text():
    config = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "kv_lora_rank": 12,
              "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 8, "num_experts": 6,
              "num_experts_per_tok": 2, "moe_intermediate_size": 16, "max_position_embeddings": 64}  # fmt: skip
    torch.manual_seed(0)
    model = Whole(tiny_deepseek(**config)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    prompt = [5, 9, 30, 2, 2]
    wanted = generate(model.decoder, [prompt], 30)[0].tokens
    for count in (1, 3):
        draft = PredictionDraft(model, 60)
        assert speculate(model.decoder, prompt, 30, draft, count).tokens == wanted
        draft.close()
    assert not model.decoder.norm._forward_hooks
    # What it guesses is what a whole pass of the module says, whatever stayed of what it guessed before.
    draft, guessed, propose = PredictionDraft(model, 60), {}, PredictionDraft.propose

    def noted(text, count):
        guesses, _ = propose(draft, text, count)
        guessed[len(text)] = guesses[0]
        return (guesses if len(text) % 3 else [wanted[len(text) - len(prompt)]]), None  # every third is right

    draft.propose = noted
    made = speculate(model.decoder, prompt, 30, draft, 1)
    draft.close()
    assert made.tokens == wanted and made.accepted > 5
    text = torch.tensor([prompt + wanted])
    with torch.no_grad():
        states = model.prediction(model.decoder, model.states(text[:, :-1]), text[:, 1:])
        guesses = model.decoder.lm_head(states).argmax(-1)[0].tolist()  # from tokens up to i + 1, the one behind them
    assert guessed == {length: guesses[length - 2] for length in guessed}
