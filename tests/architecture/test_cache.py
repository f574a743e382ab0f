"""Every cache gives the logits of the forward pass without one, and holds the bytes that arithmetic says."""

import pytest
import torch

from dslib.architecture.decoder import DecoderConfig, build

VOCAB = 50
KINDS = ("growing", "preallocated", "rolling")
# kind, window, sinks: every combination that exists
SETTINGS = [(kind, None, 0) for kind in KINDS[:2]] + [
    (kind, window, sinks) for kind in KINDS for window, sinks in [(1, 0), (5, 0), (5, 3), (1, 2), (64, 2)]
]
CHUNKS = {
    "steps of one": [1] * 40,
    "prefill, then steps": [9] + [1] * 31,
    "uneven chunks": [7, 3, 1, 2, 6, 1, 11, 4, 5],
    "chunks, then steps": [4, 10, 2] + [1] * 24,
    "a chunk longer than any window, then steps": [1, 1, 30] + [1] * 8,
}


def noisy(window=None, sinks=0, dtype=torch.float32, **changes):
    """A small decoder whose logits have a spread of about one, so that a small mistake in attention shows."""
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": window,
        "attention_sinks": sinks,
        **changes,
    }
    model = build(DecoderConfig(**config), seed=0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.to(dtype).eval()


def some_ids(batch, tokens, seed=0):
    return torch.randint(VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("kind, window, sinks", SETTINGS)
@torch.no_grad()
def test_equals_the_forward_pass_without_a_cache(kind, window, sinks, chunks):
    model, ids = noisy(window, sinks), some_ids(2, sum(chunks))
    cache = model.make_cache(kind, batch_size=2, max_length=sum(chunks))
    got = torch.cat([model(part, cache) for part in ids.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(got, model(ids), atol=2e-5, rtol=1e-4)
    assert cache.length == sum(chunks)


@torch.no_grad()
def test_the_window_matters_at_this_size():
    """Otherwise the comparison above would prove little."""
    ids = some_ids(1, 40)
    full, local, sink = (noisy(*setting)(ids) for setting in [(None, 0), (5, 0), (5, 3)])
    assert (full - local)[:, 5:].abs().max() > 0.1
    assert (sink - local)[:, 5:].abs().max() > 0.1
    torch.testing.assert_close(full[:, :5], local[:, :5], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sinks", [0, 2])
@torch.no_grad()
def test_rolling_goes_many_times_round_the_ring(sinks):
    model, ids = noisy(3, sinks), some_ids(1, 100)
    cache = model.make_cache("rolling")
    got = torch.cat([model(token, cache) for token in ids.split(1, dim=1)], dim=1)
    torch.testing.assert_close(got, model(ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window, sinks", [(None, 0), (4, 0), (4, 2)])
@torch.no_grad()
def test_each_sequence_at_its_own_position_equals_that_sequence_alone(window, sinks):
    model, lengths, new = noisy(window, sinks), [3, 11, 7], 6
    texts = [some_ids(1, length + new, seed)[0] for seed, length in enumerate(lengths)]
    cache = model.make_cache(batch_size=3, max_length=max(lengths) + new)
    padded = torch.full((3, max(lengths)), VOCAB - 1)  # any id will do on the right of a short prompt
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        padded[row, :length] = text[:length]
    logits = model(padded, cache, torch.arange(max(lengths)).expand(3, -1))
    got = [[logits[row, :length]] for row, length in enumerate(lengths)]
    for step in range(new):
        where = torch.tensor(lengths).unsqueeze(1) + step
        token = torch.stack([text[at] for text, at in zip(texts, where, strict=True)])
        for row, logit in enumerate(model(token, cache, where)):
            got[row].append(logit)
    for row, text in enumerate(texts):
        torch.testing.assert_close(torch.cat(got[row]), model(text.unsqueeze(0))[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_slot_can_be_used_again_for_another_sequence():
    """What a server does: sequence 0 ends, and a new prompt starts at position 0 in its row."""
    model, cache = noisy(), noisy().make_cache(batch_size=2, max_length=20)
    long, fresh = some_ids(1, 10, seed=1), some_ids(1, 4, seed=2)
    model(long.expand(2, -1), cache)
    for step in range(4):
        token = torch.stack((fresh[:, step], long[:, step]))
        logits = model(token, cache, torch.tensor([[step], [10 + step]]))
    torch.testing.assert_close(logits[0, 0], model(fresh)[0, -1], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits[1, 0], model(torch.cat((long, long[:, :4]), 1))[0, -1], atol=2e-5, rtol=1e-4)


# 2 (keys, values) x 2 layers x 2 key-value heads x 8 a head
ELEMENTS_PER_TOKEN = 64


@pytest.mark.parametrize("dtype, element", [(torch.float32, 4), (torch.bfloat16, 2)])
@torch.no_grad()
def test_bytes_growing_linear_preallocated_fixed_rolling_constant(dtype, element):
    model, ids = noisy(window=6, sinks=2, dtype=dtype), some_ids(3, 30)
    assert model.config.kv_elements_per_token == ELEMENTS_PER_TOKEN
    per_token = 3 * ELEMENTS_PER_TOKEN * element
    caches = {kind: model.make_cache(kind, batch_size=3, max_length=30) for kind in KINDS}
    held = {kind: [] for kind in KINDS}
    for token in ids.split(1, dim=1):
        for kind, cache in caches.items():
            model(token, cache)
            held[kind].append(cache.nbytes)
    assert held["growing"] == [per_token * (n + 1) for n in range(30)]
    assert held["preallocated"] == [per_token * 30] * 30
    assert held["rolling"] == [per_token * (2 + 6)] * 30
    for cache in caches.values():  # and nothing larger is held behind the views
        assert cache.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in cache.tensors())


@torch.no_grad()
def test_rolling_keeps_its_memory_when_a_long_prompt_comes_at_once():
    model = noisy(window=6)
    cache = model.make_cache("rolling")
    before, place = cache.nbytes, cache.buffer.data_ptr()
    model(some_ids(1, 500), cache)
    assert (cache.nbytes, cache.buffer.data_ptr()) == (before, place)


@torch.no_grad()
def test_a_full_cache_says_so_and_stays_usable():
    model, ids = noisy(), some_ids(1, 10)
    cache = model.make_cache(max_length=8)
    with pytest.raises(ValueError, match=r"max_length=8 positions: 9 new tokens after 0 do not fit"):
        model(ids[:, :9], cache)
    model(ids[:, :6], cache)
    with pytest.raises(ValueError, match=r"3 new tokens after 6 do not fit"):
        model(ids[:, 6:9], cache)
    torch.testing.assert_close(model(ids[:, 6:8], cache), model(ids[:, :8])[:, 6:], atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"1 new tokens after 8"):
        model(ids[:, 8:9], cache)


@pytest.mark.parametrize("positions", [[[0], [8]], [[-1], [0]]])
def test_positions_outside_a_preallocated_cache_are_refused(positions):
    model = noisy()
    with pytest.raises(ValueError, match=r"positions: got -?\d to \d, expected 0 to 7"):
        model(some_ids(2, 1), model.make_cache(batch_size=2, max_length=8), torch.tensor(positions))


def test_positions_of_another_batch_are_refused():
    model = noisy()
    with pytest.raises(ValueError, match=r"positions: got shape \(3, 1\), expected \(2, tokens\)"):
        model(some_ids(2, 1), model.make_cache(batch_size=2, max_length=8), torch.zeros(3, 1, dtype=torch.long))


@pytest.mark.parametrize("kind", ["growing", "rolling"])
def test_caches_with_one_position_refuse_several(kind):
    model = noisy(window=4)
    with pytest.raises(ValueError, match=r"positions: .* use PreallocatedCache"):
        model(some_ids(2, 1), model.make_cache(kind, batch_size=2), torch.zeros(2, 1, dtype=torch.long))


@pytest.mark.parametrize("window, sinks", [(None, 0), (5, 0), (4, 1)])
def test_a_cache_for_another_window_is_refused(window, sinks):
    with pytest.raises(ValueError, match=f"made for window={window}, sinks={sinks}, but the model has"):
        noisy(window=4)(some_ids(1, 2), noisy(window, sinks).make_cache("growing"))


def test_rolling_needs_a_window():
    with pytest.raises(ValueError, match="got 'rolling', but the model has no sliding_window"):
        noisy().make_cache("rolling")


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="kind: got 'paged', expected one of 'growing', 'preallocated', 'rolling'"):
        noisy().make_cache("paged")


@pytest.mark.parametrize("bad", [0, -1, 2.5, True])
@pytest.mark.parametrize(
    "named, make",
    [
        ("max_length", lambda n: noisy().make_cache(max_length=n)),
        ("batch_size", lambda n: noisy().make_cache(batch_size=n)),
        ("batch_size", lambda n: noisy(4).make_cache("rolling", batch_size=n)),
    ],
)
def test_sizes_below_one_or_not_whole_are_refused(named, make, bad):
    with pytest.raises(ValueError, match=f"^{named}: got {bad}, expected (a whole number of )?at least 1"):
        make(bad)


@pytest.mark.parametrize("kind", ["preallocated", "rolling"])
def test_a_cache_for_another_batch_is_refused(kind):
    model = noisy(sliding_window=4)
    with pytest.raises(ValueError, match="made for 3 sequences, input_ids has 2"):
        model(torch.zeros(2, 1, dtype=torch.long), model.make_cache(kind, batch_size=3, max_length=8))


@pytest.mark.parametrize("kind", ["preallocated", "growing"])
@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_going_back_is_as_if_the_tokens_had_never_been_fed(kind, window):
    model, ids = noisy(window), some_ids(1, 20)
    cache = model.make_cache(kind, batch_size=1, max_length=20)
    model(ids[:, :8], cache)
    model(some_ids(1, 6, seed=1), cache)  # guesses, one of which shall stay
    cache.truncate(8)
    assert cache.length == 8
    got = torch.cat([model(part, cache) for part in ids[:, 8:].split([3, 1, 8], dim=1)], dim=1)
    torch.testing.assert_close(got, model(ids)[:, 8:], atol=2e-5, rtol=1e-4)
    cache.truncate(0)
    torch.testing.assert_close(model(ids[:, :8], cache), model(ids[:, :8]), atol=2e-5, rtol=1e-4)


def test_going_back_too_far_or_in_a_ring_is_refused():
    cache = noisy().make_cache("preallocated", max_length=8)
    with pytest.raises(ValueError, match="length: got 1, expected 0 to 0"):
        cache.truncate(1)
    with pytest.raises(ValueError, match="rolling cache has overwritten"):
        noisy(5).make_cache("rolling").truncate(0)


@pytest.mark.parametrize("window", [None, 6])
@torch.no_grad()
def test_static_steps_have_one_shape_and_the_same_logits(window):
    model, ids, starts = noisy(window), some_ids(2, 14), torch.tensor([5, 3])
    cache = model.make_cache("preallocated", batch_size=2, max_length=16)
    model(ids[:, :5], cache)  # the second sequence will overwrite positions 3 and 4
    cache.static = True
    for count in range(6):
        at = starts + count
        token = torch.stack([ids[row, at[row]] for row in range(2)]).unsqueeze(1)
        got = model(token, cache, at.unsqueeze(1))
        for row in range(2):
            want = model(ids[row : row + 1, : at[row] + 1])[:, -1]
            torch.testing.assert_close(got[row], want, atol=2e-5, rtol=1e-4)
    assert cache.length == 5 and cache._stop == 16
