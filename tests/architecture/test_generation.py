"""Generation: the tokens of a loop written by hand, whatever the cache; where it stops; what it refuses."""

import numpy as np
import pytest
import torch
from torch import nn

from dslib import fast
from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.generation import Generation, Sampling, generate, stream

VOCAB = 40
KINDS = ("growing", "preallocated", "rolling")
PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1]]  # three lengths
SAMPLED = Sampling(temperature=1.0, top_k=20, top_p=0.95)


def noisy(**changes):
    """Random, but loud enough that greedy text varies and no two logits are nearly equal."""
    config = DecoderConfig(VOCAB, 32, 48, 2, 4, 2, **{"max_position_embeddings": 64, **changes})
    model = build(config, seed=0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.4)
    return model.eval()


@torch.no_grad()
def argmax_loop(model, prompt, new):
    """No cache: the whole text again for every token."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def tokens_of(results):
    return [result.tokens for result in results]


@pytest.mark.parametrize(
    "kind, window, sinks",
    [(kind, None, 0) for kind in KINDS[:2]] + [(kind, 4, sinks) for kind in KINDS for sinks in (0, 2)],
)
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_equals_the_argmax_loop_with_every_cache(kind, window, sinks, prompt):
    model = noisy(sliding_window=window, attention_sinks=sinks)
    wanted = argmax_loop(model, prompt, 20)
    assert len(set(wanted)) > 3  # not one token over and over
    assert tokens_of(generate(model, [prompt, prompt], 20, cache=kind)) == [wanted, wanted]
    assert generate(model, torch.tensor([prompt]), 20, cache=kind) == [Generation(len(prompt), wanted, "length")]


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}, {"sliding_window": 4, "attention_sinks": 2}], ids=str)
def test_prompts_of_different_lengths_each_get_the_text_they_get_alone(changes):
    model = noisy(**changes)
    assert tokens_of(generate(model, PROMPTS, 15)) == [argmax_loop(model, prompt, 15) for prompt in PROMPTS]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_formats_have_a_way_through(dtype, prepared):
    model = noisy(qkv_bias=True).to(dtype)
    wanted = argmax_loop(model, [1, 2], 9)
    if prepared:
        fast.prepare(model)
    one, two = generate(model, [[1, 2]], 9)[0].tokens, generate(model, [[1, 2], [3]], 9)[0].tokens
    assert [len(one), len(two)] == [9, 9]
    assert dtype is torch.bfloat16 or one == two == wanted  # bfloat16 has ties


def test_the_padding_of_a_prompt_is_none_of_its_business():
    model = noisy(tie_word_embeddings=False)
    model.embed_tokens.weight.data[0] = torch.nan  # the numbers of a token that no prompt has
    assert tokens_of(generate(model, PROMPTS, 3)) == [argmax_loop(model, prompt, 3) for prompt in PROMPTS]


def test_a_window_and_a_ring_go_beyond_the_maximal_position():
    model = noisy(sliding_window=6, max_position_embeddings=16)
    assert tokens_of(generate(model, [[1, 2, 3]], 60, cache="rolling")) == [argmax_loop(model, [1, 2, 3], 60)]


@pytest.mark.parametrize("kind", KINDS)
def test_stops_at_the_end_token_and_counts_it(kind):
    model = noisy(sliding_window=6)
    text = argmax_loop(model, PROMPTS[0], 20)
    end = text[7]
    first = text.index(end)
    (result,) = generate(model, PROMPTS[:1], 20, eos_token_id=end, cache=kind)
    assert result == Generation(3, text[: first + 1], "eos")
    assert list(stream(model, PROMPTS[0], 20, eos_token_id=end, cache=kind)) == result.tokens
    (result,) = generate(model, PROMPTS[:1], first + 1, eos_token_id=end, cache=kind)
    assert result.finish == "eos"  # also if it comes as the last token allowed
    (result,) = generate(model, PROMPTS[:1], first, eos_token_id=end, cache=kind)
    assert result == Generation(3, text[:first], "length")


def test_in_a_batch_one_ends_early_and_the_others_go_on():
    model = noisy()
    texts = [argmax_loop(model, prompt, 15) for prompt in PROMPTS]
    end = next(token for token in texts[0] if token not in texts[1] + texts[2])
    results = generate(model, PROMPTS, 15, eos_token_id=end)
    assert [r.finish for r in results] == ["eos", "length", "length"]
    assert tokens_of(results) == [texts[0][: texts[0].index(end) + 1], *texts[1:]]


FORMS = [int, np.int64, np.array, torch.tensor, lambda i: torch.tensor([i]), lambda i: torch.tensor([0, i]).int()]
FORMS += [lambda i: [i], lambda i: (torch.tensor(i), 0), lambda i: {np.int32(i)}, lambda i: np.array([i, 0])]


@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
def test_numbers_may_come_in_any_sensible_form(form):
    """An end token, one or several; and the other numbers where there is one."""
    model = noisy()
    text = argmax_loop(model, PROMPTS[0], 4)
    assert 0 not in text and text[3] not in text[:3]
    assert generate(model, PROMPTS[:1], 15, eos_token_id=form(text[3])) == [Generation(3, text, "eos")]
    if form in FORMS[:4]:
        options = {"max_new_tokens": form(9), "min_new_tokens": form(2), "seed": form(3), "eos_token_id": text[0]}
        prompt = [form(token) for token in PROMPTS[0]]
        same = {**options, "max_new_tokens": 9, "min_new_tokens": 2, "seed": 3}
        for prompts in ([prompt], [np.array(PROMPTS[0])], np.array(PROMPTS[:1]), [torch.tensor(PROMPTS[0])]):
            assert generate(model, prompts, sampling=SAMPLED, **options) == generate(
                model, PROMPTS[:1], sampling=SAMPLED, **same
            )


@pytest.mark.parametrize("none", [None, [], (), set(), torch.tensor([], dtype=torch.long)])
def test_without_an_end_token_nothing_ends_early(none):
    assert generate(noisy(), PROMPTS[:1], 15, eos_token_id=none)[0].finish == "length"


@pytest.mark.parametrize("least", [0, 1, 3, 9])
def test_an_end_token_cannot_come_before_the_least_number_of_tokens(least):
    """All but one token are end tokens, so that the text ends as soon as it may."""
    ends = [token for token in range(VOCAB) if token != 7]
    for result in generate(noisy(), PROMPTS, 9, eos_token_id=ends, min_new_tokens=least):
        assert result.tokens[:least] == [7] * least
        assert result.finish == "length" if least == 9 else result.new_tokens == least + 1


def test_stops_computing_when_all_have_ended(monkeypatch):
    model = noisy()
    text = argmax_loop(model, PROMPTS[0], 1)
    passes = []
    real = model.forward
    monkeypatch.setattr(model, "forward", lambda *args: passes.append(1) or real(*args))
    generate(model, [PROMPTS[0], PROMPTS[0]], 50, eos_token_id=text[0])
    assert len(passes) == 1


class Letters:
    """A tokenizer whose token i stands for two characters, or for half of one of four bytes."""

    def decode(self, ids):
        return b"".join(self.bytes_of(i) for i in ids).decode(errors="replace")

    def bytes_of(self, i):
        return "🐳".encode()[2 * (i % 2) :][:2] if i >= 30 else f"{chr(97 + i // 2)}{'.' if i % 2 else ' '}".encode()


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_a_stop_string_ends_a_text_as_soon_as_it_stands_there(prompt):
    """Every string of one to six characters in the text, with whole and half characters before and behind it."""
    model, letters = noisy(), Letters()
    tokens = argmax_loop(model, prompt, 12)
    found = 0
    for start in range(len(letters.decode(tokens))):
        for length in (1, 2, 3, 6):
            end = letters.decode(prompt + tokens)[len(letters.decode(prompt)) + start :][:length]
            if len(end) < length or "\ufffd" in end:
                continue
            at = next(n for n in range(1, 13) if end in _after(letters, prompt, tokens[:n], end))
            results = generate(model, [prompt, prompt], 12, stop=["never", end], tokenizer=letters)
            assert results == [Generation(len(prompt), tokens[:at], "stop")] * 2, end
            found += 1
    assert found > 20


def _after(letters, prompt, tokens, end):
    """The text, from where a string that ends in a new token may begin."""
    return letters.decode(prompt + tokens)[max(0, len(letters.decode(prompt)) - len(end) + 1) :]


@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_streaming_yields_the_same_tokens_one_by_one(kind, sampling):
    model = noisy(sliding_window=6)
    (whole,) = generate(model, PROMPTS[:1], 12, sampling=sampling, seed=3)
    pieces = stream(model, PROMPTS[0], 12, sampling=sampling, seed=3, cache=kind)
    assert [next(pieces) for _ in range(5)] == whole.tokens[:5]  # without waiting for the rest
    assert list(pieces) == whole.tokens[5:]
    assert list(stream(model, torch.tensor(PROMPTS[0]), 12, sampling=sampling, seed=[3])) == whole.tokens


def test_the_model_runs_in_evaluation_mode_and_is_left_as_it_was():
    """A generator suspended inside its modes would leave them on here, between two tokens."""
    model = noisy()
    model.norm = nn.Sequential(model.norm, nn.Dropout(0.5)).eval()
    wanted = argmax_loop(model, PROMPTS[0], 4)
    model.train()
    model.layers[0].eval()
    assert generate(model, PROMPTS[:1], 4)[0].tokens == wanted
    text = []
    for token in stream(model, PROMPTS[0], 4):
        text.append(token)
        assert [model.training, model.norm[1].training, model.layers[0].mlp.training] == [True, True, False]
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert text == wanted
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_on_token_hears_every_token_in_order():
    heard = []
    results = generate(noisy(), PROMPTS, 4, on_token=lambda index, token: heard.append((index, token)))
    assert heard == [(index, results[index].tokens[step]) for step in range(4) for index in range(3)]


def test_the_same_seed_gives_the_same_text_and_leaves_the_global_generator_alone():
    model = noisy()
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    texts = [tokens_of(generate(model, PROMPTS, 20, sampling=SAMPLED, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert all(a != b for a, b in zip(texts[0], texts[2], strict=True))
    assert torch.equal(torch.rand(1), wanted)


def test_with_a_seed_each_a_text_does_not_depend_on_its_batch():
    model, seeds = noisy(), [4, 0, 9]
    alone = [generate(model, [p], 12, sampling=SAMPLED, seed=s)[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert generate(model, PROMPTS, 12, sampling=SAMPLED, seed=seeds) == alone
    assert generate(model, PROMPTS[::-1], 12, sampling=SAMPLED, seed=torch.tensor(seeds[::-1])) == alone[::-1]


def test_without_a_seed_the_global_generator_decides():
    model = noisy()
    texts = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        texts.append(tokens_of(generate(model, PROMPTS, 10, sampling=SAMPLED)))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-9), Sampling(1.0, min_p=1.0), Sampling(1e-4)], ids=str
)
def test_keeping_one_token_is_greedy(sampling):
    model = noisy()
    assert tokens_of(generate(model, PROMPTS, 8, sampling=sampling)) == tokens_of(generate(model, PROMPTS, 8))


def test_a_prompt_may_fill_the_model_to_the_last_position():
    assert generate(noisy(), [[1] * 60], 4)[0].new_tokens == 4


def broken(value, layer="norm"):
    model = noisy()
    with torch.no_grad():
        getattr(model, layer).weight[0] = value
    return model


NAN, INF = float("nan"), float("inf")
ONE = PROMPTS[:1]
BAD = [
    ("prompts: got none", lambda: generate(noisy(), [], 3)),
    (r"prompts\[1\]: got an empty prompt", lambda: generate(noisy(), [[1], []], 3)),
    (r"prompts\[0\]: got an empty prompt", lambda: generate(noisy(), torch.zeros(1, 0, dtype=torch.long), 3)),
    (r"prompts: got a tensor of shape \(3,\), expected \(batch", lambda: generate(noisy(), torch.tensor([1, 2, 3]), 3)),
    (r"prompts: got a tensor of shape \(3,\), expected \(batch", lambda: generate(noisy(), np.array([1, 2, 3]), 3)),
    (r"prompts\[0\]: got 1, expected a sequence of token ids", lambda: generate(noisy(), [1, 2], 3)),
    (r"prompts\[0\]: got 'a', expected a sequence of token ids", lambda: generate(noisy(), "a b", 3)),
    (r"prompts\[1\]: token id 40 is outside the vocabulary, 0 to 39", lambda: generate(noisy(), [[1], [2, 40]], 3)),
    (r"prompts\[0\]: token id -1 is outside", lambda: generate(noisy(), [[-1]], 3)),
    (r"prompts\[0\]: token id 1.5 is outside", lambda: generate(noisy(), [[1.5]], 3)),
    (r"prompts\[0\]: token id True is outside", lambda: generate(noisy(), [[True]], 3)),
    (r"prompts\[0\]: token id 1.0 is outside", lambda: generate(noisy(), torch.ones(1, 2), 3)),
    ("max_new_tokens: got 0, expected at least 1", lambda: generate(noisy(), ONE, 0)),
    ("max_new_tokens: got 2.5, expected a whole number", lambda: generate(noisy(), ONE, torch.tensor(2.5))),
    (r"prompts\[1\]: 60 tokens and 5 new ones make 65, .*embeddings=64", lambda: generate(noisy(), [[1], [1] * 60], 5)),
    ("min_new_tokens: got -1, expected at least 0", lambda: generate(noisy(), ONE, 3, min_new_tokens=-1)),
    ("eos_token_id: token id '2' is outside", lambda: generate(noisy(), ONE, 3, eos_token_id="2")),
    ("eos_token_id: token id 2.0 is outside", lambda: generate(noisy(), ONE, 3, eos_token_id=torch.tensor([2.0]))),
    (r"eos_token_id: token id \[2\] is outside", lambda: generate(noisy(), ONE, 3, eos_token_id=torch.tensor([[2]]))),
    ("eos_token_id: token id 40 is outside", lambda: generate(noisy(), ONE, 3, eos_token_id=[1, 40])),
    ("seed: got 1.5, expected a whole number, or one for each of 1", lambda: generate(noisy(), ONE, 3, seed=1.5)),
    (r"seed: got \[1, 2\], expected", lambda: generate(noisy(), ONE, 3, seed=[1, 2])),
    (r"seed: got \['a'\], expected", lambda: generate(noisy(), ONE, 3, seed=["a"])),
    ("temperature: got '1', expected", lambda: Sampling("1")),
    ("temperature: got 0.0, expected a number above 0", lambda: Sampling().probabilities(torch.ones(1, 3))),
    ("sampling: got a float, expected Sampling or None", lambda: generate(noisy(), ONE, 3, sampling=0.7)),
    ("image: got a Tensor, expected ImageContext", lambda: generate(noisy(), ONE, 3, image=torch.ones(1, 3, 8, 8))),
    (r"stop: got \('',\), expected", lambda: generate(noisy(), ONE, 3, stop="", tokenizer=Letters())),
    (r"stop: got \(5,\), expected", lambda: generate(noisy(), ONE, 3, stop=[5], tokenizer=Letters())),
    (r"stop: got \('a',\), expected .* and a tokenizer", lambda: generate(noisy(), ONE, 3, stop="a")),
    ("kind: got 'paged'", lambda: generate(noisy(), PROMPTS, 3, cache="paged")),
    ("use PreallocatedCache for sequences", lambda: generate(noisy(sliding_window=4), PROMPTS, 3, cache="growing")),
    ("use PreallocatedCache for sequences", lambda: generate(noisy(sliding_window=4), PROMPTS, 3, cache="rolling")),
    (r"prompts\[0\]: token id 99 is outside", lambda: stream(noisy(), [99], 3)),  # before the first token is asked for
    *[(
        r"logits: not a number .* in rows \[0, 1, 2\]",
        lambda v=value, s=sampling: generate(broken(v), PROMPTS, 3, sampling=s))
      for value in (NAN, INF) for sampling in (None, SAMPLED)],
    ("logits: not a number", lambda: next(stream(broken(NAN, "lm_head"), [1], 3))),
    ("logits: not a number", lambda: Sampling().choose(torch.tensor([[0.0, NAN]]))),
    (
        r"logits: not a number .NaN or infinite. in rows \[1\]",
        lambda: Sampling().choose(torch.tensor([[0.0, 1.0], [-INF, -INF]])),
    ),
    ("repetition_penalty: needs the", lambda: Sampling(1.0, repetition_penalty=2.0).probabilities(torch.ones(1, 2))),
    ("repetition_penalty: needs the", lambda: Sampling(repetition_penalty=2.0).choose(torch.ones(1, 2))),
    *[(f"^{name}: got {value}, expected", lambda n=name, v=value: Sampling(**{n: v})) for name, value in [
        ("temperature", -0.1), ("temperature", NAN), ("temperature", INF), ("top_k", 0),
        ("top_k", -1), ("top_k", 2.5), ("top_p", 0.0), ("top_p", 1.1), ("top_p", NAN), ("min_p", -0.1), ("min_p", NAN),
        ("repetition_penalty", 0.0), ("repetition_penalty", INF),
    ]],
]  # fmt: skip


@pytest.mark.parametrize("message, call", BAD)
def test_bad_requests_are_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match="unknown option 'temperature', expected one of eos_token_id, sampling"):
        stream(noisy(), PROMPTS[0], 3, temperature=1.0)
