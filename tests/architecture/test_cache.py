"""Every cache gives the logits of the forward pass without one, and holds the bytes that arithmetic says."""

import copy
import pickle

import pytest
import torch

from dslib import fast
from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.generation import generate
from dslib.architecture.sparse_decoder import SparseConfig

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
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 9}


def noisy(window=None, sinks=0, dtype=torch.float32, config=None):
    """A small decoder whose logits have a spread of about one, so that a small mistake in attention shows."""
    model = build(config or DecoderConfig(**SHAPE, sliding_window=window, attention_sinks=sinks), seed=0)
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
    torch.testing.assert_close(got, model(ids), **CLOSE)
    assert cache.length == sum(chunks)


@torch.no_grad()
def test_the_window_matters_at_this_size():
    """Otherwise the comparison above would prove little."""
    ids = some_ids(1, 40)
    full, local, sink = (noisy(*setting)(ids) for setting in [(None, 0), (5, 0), (5, 3)])
    assert (full - local)[:, 5:].abs().max() > 0.1
    assert (sink - local)[:, 5:].abs().max() > 0.1
    torch.testing.assert_close(full[:, :5], local[:, :5], **CLOSE)


@pytest.mark.parametrize("sinks", [0, 2])
@torch.no_grad()
def test_rolling_goes_many_times_round_the_ring(sinks):
    model, ids = noisy(3, sinks), some_ids(1, 100)
    cache = model.make_cache("rolling")
    got = torch.cat([model(token, cache) for token in ids.split(1, dim=1)], dim=1)
    torch.testing.assert_close(got, model(ids), **CLOSE)


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
        torch.testing.assert_close(torch.cat(got[row]), model(text.unsqueeze(0))[0], **CLOSE)


@torch.no_grad()
def test_a_slot_can_be_used_again_for_another_sequence():
    """What a server does: sequence 0 ends, and a new prompt starts at position 0 in its row."""
    model, cache = noisy(), noisy().make_cache(batch_size=2, max_length=20)
    long, fresh = some_ids(1, 10, seed=1), some_ids(1, 4, seed=2)
    model(long.expand(2, -1), cache)
    for step in range(4):
        token = torch.stack((fresh[:, step], long[:, step]))
        logits = model(token, cache, torch.tensor([[step], [10 + step]]))
    torch.testing.assert_close(logits[0, 0], model(fresh)[0, -1], **CLOSE)
    torch.testing.assert_close(logits[1, 0], model(torch.cat((long, long[:, :4]), 1))[0, -1], **CLOSE)


@pytest.mark.parametrize("padding", [(4, 0, 9), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window, sinks", [(None, 0), (4, 0), (4, 2), ("latent", 0)])
@pytest.mark.parametrize("kind", [None, *KINDS[:2]])
@torch.no_grad()
def test_padded_texts_equal_each_alone(kind, window, sinks, side, padding):
    """An attention mask over a prompt, then over each further token and over three at once; the ids of padding vary."""
    latent = SparseConfig(**SHAPE, **LATENT) if window == "latent" else None
    model = noisy(window if latent is None else None, sinks, config=latent)
    texts = [some_ids(1, 14 + 5 - count, seed)[0] for seed, count in enumerate(padding)]
    ids, mask = some_ids(3, 19, seed=9), torch.ones(3, 19, dtype=torch.int64)
    for row, count in enumerate(padding):
        hidden = slice(0, count) if side == "left" else slice(14 - count, 14)
        mask[row, hidden] = 0
        ids[row, mask[row].bool()] = texts[row]
    if kind is None:
        got = model(ids, attention_mask=mask)
    else:
        cache = model.make_cache(kind, batch_size=3, max_length=19)
        parts = [(0, 14), (14, 15), (15, 16), (16, 19)]
        got = torch.cat([model(ids[:, a:b], cache, attention_mask=mask[:, :b]) for a, b in parts], dim=1)
    for row, text in enumerate(texts):
        torch.testing.assert_close(got[row, mask[row].bool()], model(text.unsqueeze(0))[0], **CLOSE)


@pytest.mark.parametrize("dtype, element", [(torch.float32, 4), (torch.bfloat16, 2)])
@torch.no_grad()
def test_bytes_growing_linear_preallocated_fixed_rolling_constant(dtype, element):
    model, ids = noisy(window=6, sinks=2, dtype=dtype), some_ids(3, 30)
    assert model.config.kv_elements_per_token == 2 * 2 * 2 * 8  # keys and values, layers, key/value heads, their size
    per_token = 3 * 64 * element
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
    torch.testing.assert_close(model(ids[:, 6:8], cache), model(ids[:, :8])[:, 6:], **CLOSE)
    with pytest.raises(ValueError, match=r"1 new tokens after 8"):
        model(ids[:, 8:9], cache)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_gradients_are_those_without_a_cache_or_refused_before_anything_is_written(kind, frozen):
    model, ids = noisy(window=6), some_ids(2, 12)
    model.embed_tokens.requires_grad_(not frozen)  # what comes in then needs no gradient, what is kept does
    cache = model.make_cache(kind, batch_size=2, max_length=12)
    with torch.no_grad():
        model(ids[:, :3], cache)
    if kind == "growing":
        cache = model.make_cache(kind)
        torch.cat([model(part, cache) for part in ids.split(4, dim=1)], dim=1).square().sum().backward()
        got = model.layers[0].self_attn.qkv_proj.weight.grad.clone()
        model.zero_grad()
        model(ids).square().sum().backward()
        torch.testing.assert_close(got, model.layers[0].self_attn.qkv_proj.weight.grad, atol=1e-3, rtol=1e-4)
        return
    with pytest.raises(ValueError, match=r"written in place.* torch.no_grad.*make_cache\('growing'\)"):
        model(ids[:, 3:6], cache)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, 3:], cache), model(ids)[:, 3:], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_under_autocast_every_cache_does_what_the_growing_one_does(kind, dtype):
    model, ids = noisy(window=5, sinks=2, dtype=dtype), some_ids(2, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        caches = [model.make_cache(one, batch_size=2, max_length=20) for one in (kind, "growing")]
        got, wanted = (
            torch.cat([model(part, cache) for part in ids.split([9, 3, 1, 1, 6], dim=1)], dim=1) for cache in caches
        )
    torch.testing.assert_close(got, wanted, atol=0.06, rtol=0.02)  # SDPA adds up in another order


@torch.no_grad()
def test_under_autocast_sequences_may_differ_in_position():
    model = noisy()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        padded = generate(model, [[3, 5, 7, 9], [3, 5]], 4)
        assert [text.tokens for text in padded] == [
            generate(model, [ids], 4)[0].tokens for ids in ([3, 5, 7, 9], [3, 5])
        ]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_copied_or_pickled_cache_goes_on_alone(kind, copied):
    model, ids = noisy(window=5), some_ids(1, 16)
    fast.prepare(model)  # the quick step writes to the buffer, the modules read its views
    cache = model.make_cache(kind, max_length=16)
    model(ids[:, :6], cache)
    twin = copied(cache)
    model(some_ids(1, 3, seed=1), cache)  # not seen by the twin
    got = torch.cat([model(part, twin) for part in ids[:, 6:].split([1, 1, 3, 1, 4], dim=1)], dim=1)
    torch.testing.assert_close(got, model(ids)[:, 6:], **CLOSE)
    assert (cache.length, twin.length) == (9, 16)


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
    torch.testing.assert_close(got, model(ids)[:, 8:], **CLOSE)
    cache.truncate(0)
    torch.testing.assert_close(model(ids[:, :8], cache), model(ids[:, :8]), **CLOSE)


@pytest.mark.parametrize("made_in", [torch.no_grad, torch.inference_mode])
def test_a_text_that_overflowed_leaves_nothing_behind(made_in):
    """A slot behind a mask counts with weight zero, and zero times NaN is NaN."""
    model, ids = noisy(), some_ids(2, 4) % (VOCAB - 1)
    model.embed_tokens.weight.data[VOCAB - 1] = torch.nan
    with made_in():
        cache = model.make_cache(batch_size=2, max_length=9)
        model(torch.full((2, 9), VOCAB - 1), cache)
    cache.truncate(0)
    with torch.inference_mode():
        model(ids[:, :3], cache)
        got = model(ids[:, 3:], cache, torch.tensor([[3], [1]]))
        torch.testing.assert_close(got[0], model(ids[:1])[0, 3:], **CLOSE)
        torch.testing.assert_close(got[1], model(ids[1:, [0, 3]])[0, 1:], **CLOSE)


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
            torch.testing.assert_close(got[row], want, **CLOSE)
    assert cache.length == 5


def two(kind="preallocated", window=None, **positions_or_mask):
    """One token for each of two sequences into a cache for 8 positions."""
    model = noisy(window)
    return model(some_ids(2, 1), model.make_cache(kind, batch_size=2, max_length=8), **positions_or_mask)


def ints(*values, **options):
    return torch.tensor(values, **options)


BAD = [
    (r"positions: got 0 to 8, expected 0 to 7", lambda: two(positions=ints([0], [8]))),
    (r"positions: got -1 to 0, expected 0 to 7", lambda: two(positions=ints([-1], [0]))),
    (r"positions: got shape \(3, 1\), expected \(2, tokens\)", lambda: two(positions=ints([0], [0], [0]))),
    (r"positions: got shape \(2, 2\), expected .* here \(2, 1\)", lambda: two(positions=ints([0, 1], [0, 1]))),
    (r"positions: got shape \(2, 1\).* of whole numbers", lambda: two(positions=ints([0.0], [1.0]))),
    *[
        (r"positions: got shape .*, expected \(2, tokens\), here \(2, 3\), of whole",
         lambda bad=bad: noisy()(some_ids(2, 3), positions=bad))
        for bad in (torch.arange(3), torch.arange(2).expand(2, -1), torch.zeros(3, 3).long(), torch.zeros(2, 3))
    ],
    (r"positions: .* use PreallocatedCache", lambda: two("growing", positions=ints([0], [0]))),
    (r"positions: .* use PreallocatedCache", lambda: two("rolling", 4, positions=ints([0], [0]))),
    (r"attention_mask: got shape \(2,\), expected \(2, 1\) of 0 and 1", lambda: two(attention_mask=ints(1, 1))),
    (r"attention_mask: got shape \(2, 1\), expected \(2, 1\) of 0 and 1", lambda: two(attention_mask=ints([0], [-9]))),
    (r"attention_mask: a rolling cache", lambda: two("rolling", 4, attention_mask=ints([0], [1]))),
    ("made for window=None, sinks=0, but the model", lambda: noisy(4)(some_ids(1, 2), noisy().make_cache("growing"))),
    ("made for window=5, sinks=0, but", lambda: noisy(4)(some_ids(1, 2), noisy(5).make_cache("growing"))),
    ("made for window=4, sinks=1, but", lambda: noisy(4)(some_ids(1, 2), noisy(4, 1).make_cache("growing"))),
    ("made for 3 sequences, input_ids has 1", lambda: noisy()(some_ids(1, 1), noisy().make_cache(batch_size=3))),
    ("made for 3 sequences", lambda: noisy(4)(some_ids(1, 1), noisy(4).make_cache("rolling", batch_size=3))),
    ("got 'rolling', but the model has no sliding_window", lambda: noisy().make_cache("rolling")),
    ("kind: got 'paged', expected one of 'growing', 'preallocated', 'rolling'", lambda: noisy().make_cache("paged")),
    ("length: got 1, expected 0 to 0", lambda: noisy().make_cache(max_length=8).truncate(1)),
    ("rolling cache has overwritten", lambda: noisy(5).make_cache("rolling").truncate(0)),
]  # fmt: skip


@pytest.mark.parametrize("message, call", BAD)
def test_bad_calls_are_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bad", [0, -1, 2.5, True])
@pytest.mark.parametrize("kind, name", [(None, "max_length"), (None, "batch_size"), ("rolling", "batch_size")])
def test_sizes_below_one_or_not_whole_are_refused(kind, name, bad):
    with pytest.raises(ValueError, match=f"^{name}: got {bad}, expected"):
        noisy(4).make_cache(kind or "preallocated", **{name: bad})
