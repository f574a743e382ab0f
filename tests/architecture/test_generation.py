"""Generation: the tokens of a loop written by hand, whatever the cache; where it stops; what it refuses."""

import numpy as np
import pytest
import torch

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
    assert tokens_of(generate(model, [prompt], 20, cache=kind)) == [wanted]


@pytest.mark.parametrize("window, sinks", [(None, 0), (4, 0), (4, 2)])
def test_prompts_of_different_lengths_each_get_the_text_they_get_alone(window, sinks):
    model = noisy(sliding_window=window, attention_sinks=sinks)
    assert tokens_of(generate(model, PROMPTS, 15)) == [argmax_loop(model, prompt, 15) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_equal_lengths_works_with_every_cache(kind):
    model, prompts = noisy(sliding_window=5), [[1, 2, 3], [4, 5, 6]]
    wanted = [argmax_loop(model, prompt, 15) for prompt in prompts]
    assert tokens_of(generate(model, prompts, 15, cache=kind)) == wanted
    assert tokens_of(generate(model, torch.tensor(prompts), 15, cache=kind)) == wanted


def test_qkv_bias_and_bfloat16_have_a_way_through():
    results = generate(noisy(qkv_bias=True).bfloat16(), [[1, 2]], 9)
    assert [result.new_tokens for result in results] == [9]


def test_a_window_and_a_ring_go_beyond_the_maximal_position():
    model = noisy(sliding_window=6, max_position_embeddings=16)
    assert tokens_of(generate(model, [[1, 2, 3]], 60, cache="rolling")) == [argmax_loop(model, [1, 2, 3], 60)]


def test_counts():
    results = generate(noisy(), PROMPTS, 5)
    assert [(r.prompt_tokens, r.new_tokens, r.finish) for r in results] == [(n, 5, "length") for n in (3, 1, 9)]


@pytest.mark.parametrize("kind", KINDS)
def test_stops_at_the_end_token_and_counts_it(kind):
    model = noisy(sliding_window=6)
    text = argmax_loop(model, PROMPTS[0], 20)
    end = text[7]
    first = text.index(end)
    (result,) = generate(model, PROMPTS[:1], 20, eos_token_id=end, cache=kind)
    assert result == Generation(3, text[: first + 1], "eos")
    (result,) = generate(model, PROMPTS[:1], first + 1, eos_token_id=end, cache=kind)
    assert result.finish == "eos"  # also if it comes as the last token allowed
    if first:
        (result,) = generate(model, PROMPTS[:1], first, eos_token_id=end, cache=kind)
        assert result == Generation(3, text[:first], "length")


def test_in_a_batch_one_ends_early_and_the_others_go_on():
    model = noisy()
    texts = [argmax_loop(model, prompt, 15) for prompt in PROMPTS]
    end = next(token for token in texts[0] if token not in texts[1] + texts[2])
    results = generate(model, PROMPTS, 15, eos_token_id=end)
    assert [r.finish for r in results] == ["eos", "length", "length"]
    assert tokens_of(results) == [texts[0][: texts[0].index(end) + 1], *texts[1:]]


@pytest.mark.parametrize("collection", [list, set, tuple])
def test_any_of_several_end_tokens_ends(collection):
    model = noisy()
    text = argmax_loop(model, PROMPTS[0], 15)
    ends = {text[4], text[9]}
    first = min(text.index(end) for end in ends)
    (result,) = generate(model, PROMPTS[:1], 15, eos_token_id=collection(ends))
    assert (result.tokens, result.finish) == (text[: first + 1], "eos")


def test_stops_computing_when_all_have_ended(monkeypatch):
    model = noisy()
    text = argmax_loop(model, PROMPTS[0], 1)
    passes = []
    real = model.forward
    monkeypatch.setattr(model, "forward", lambda *args: passes.append(1) or real(*args))
    generate(model, [PROMPTS[0], PROMPTS[0]], 50, eos_token_id=text[0])
    assert len(passes) == 1


@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_streaming_yields_the_same_tokens_one_by_one(kind, sampling):
    model = noisy(sliding_window=6)
    (whole,) = generate(model, PROMPTS[:1], 12, sampling=sampling, seed=3)
    pieces = stream(model, PROMPTS[0], 12, sampling=sampling, seed=3, cache=kind)
    assert [next(pieces) for _ in range(5)] == whole.tokens[:5]  # without waiting for the rest
    assert list(pieces) == whole.tokens[5:]
    assert list(stream(model, torch.tensor(PROMPTS[0]), 12, sampling=sampling, seed=3)) == whole.tokens


def test_streaming_stops_at_the_end_token():
    text = argmax_loop(noisy(), PROMPTS[0], 12)
    assert list(stream(noisy(), PROMPTS[0], 12, eos_token_id=text[5])) == text[: text.index(text[5]) + 1]


def test_between_two_tokens_the_caller_can_still_train():
    """A generator suspended inside ``with inference_mode()`` would leave the mode on here."""
    weight = torch.ones(2, requires_grad=True)
    for _ in stream(noisy(), PROMPTS[0], 4):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        (weight * 2).sum().backward()
    assert weight.grad.tolist() == [8.0, 8.0]


def test_on_token_hears_every_token_in_order():
    heard = []
    results = generate(noisy(), PROMPTS, 4, on_token=lambda index, token: heard.append((index, token)))
    assert heard == [(index, results[index].tokens[step]) for step in range(4) for index in range(3)]


def test_generation_leaves_the_model_trainable():
    model = noisy()
    generate(model, PROMPTS, 3)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    model = noisy()
    texts = [tokens_of(generate(model, PROMPTS, 20, sampling=SAMPLED, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert all(a != b for a, b in zip(texts[0], texts[2], strict=True))


def test_a_seed_leaves_the_global_generator_alone():
    model = noisy()
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    generate(model, PROMPTS, 5, sampling=SAMPLED, seed=1)
    assert torch.equal(torch.rand(1), wanted)


def test_without_a_seed_the_global_generator_decides():
    model = noisy()
    texts = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        texts.append(tokens_of(generate(model, PROMPTS, 10, sampling=SAMPLED)))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("kind", ["growing", "rolling"])
def test_sampled_text_is_the_same_with_every_cache(kind):
    model = noisy(sliding_window=6)
    wanted = tokens_of(generate(model, [[1, 2, 3]], 20, sampling=SAMPLED, seed=2))
    assert tokens_of(generate(model, [[1, 2, 3]], 20, sampling=SAMPLED, seed=2, cache=kind)) == wanted


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=1e-9)])
def test_keeping_one_token_is_greedy(sampling):
    model = noisy()
    assert tokens_of(generate(model, PROMPTS, 8, sampling=sampling)) == tokens_of(generate(model, PROMPTS, 8))


@pytest.mark.parametrize(
    "message, prompts, new",
    [
        ("prompts: got none", [], 3),
        (r"prompts\[1\]: got an empty prompt", [[1], []], 3),
        (r"prompts\[0\]: got an empty prompt", torch.zeros(1, 0, dtype=torch.long), 3),
        (r"prompts: got a tensor of shape \(3,\), expected \(batch, tokens\)", torch.tensor([1, 2, 3]), 3),
        (r"prompts\[1\]: token id 40 is outside the vocabulary, 0 to 39", [[1], [2, 40]], 3),
        (r"prompts\[0\]: token id -1 is outside", [[-1]], 3),
        (r"prompts\[0\]: token id 1.5 is outside", [[1.5]], 3),
        ("max_new_tokens: got 0, expected at least 1", [[1]], 0),
        ("max_new_tokens: got -2", [[1]], -2),
        (r"prompts\[1\]: 60 tokens and 5 new ones make 65, .*max_position_embeddings=64", [[1], [1] * 60], 5),
    ],
)
def test_bad_requests_are_refused(message, prompts, new):
    with pytest.raises(ValueError, match=message):
        generate(noisy(), prompts, new)


def test_a_prompt_may_fill_the_model_to_the_last_position():
    assert generate(noisy(), [[1] * 60], 4)[0].new_tokens == 4


@pytest.mark.parametrize("kind", ["growing", "rolling"])
def test_different_lengths_need_the_preallocated_cache(kind):
    with pytest.raises(ValueError, match="use PreallocatedCache for sequences at different positions"):
        generate(noisy(sliding_window=4), PROMPTS, 3, cache=kind)


def test_unknown_caches_and_options_are_named():
    with pytest.raises(ValueError, match="kind: got 'paged'"):
        generate(noisy(), PROMPTS, 3, cache="paged")
    with pytest.raises(TypeError, match="unknown option 'temperature', expected one of eos_token_id, sampling"):
        next(stream(noisy(), PROMPTS[0], 3, temperature=1.0))


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
    ],
)
def test_bad_sampling_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got {value}, expected"):
        Sampling(**{field: value})


def test_numpy_ids_are_ids():
    model = noisy()
    assert generate(model, [np.array([1, 2, 3])], 4)[0].tokens == generate(model, [[1, 2, 3]], 4)[0].tokens
    with pytest.raises(ValueError, match=r"token id 1\.5"):
        generate(model, [[1.5]], 1)
