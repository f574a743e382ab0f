"""The lean step computes what the decoder computes."""

import functools
import inspect

import pytest
import torch
from torch import nn

from dslib import fast
from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.int4.layers import Int4Linear, quantize_
from dslib.architecture.sparse_decoder import SparseConfig, SparseDecoder
from dslib.fast.lean_step import LeanStep
from dslib.fast.token_step import why_not

pytestmark = pytest.mark.processor

SIZES = {
    # vocab, hidden, intermediate, layers, heads, kv heads, head_dim; cut in 4, in 2, or not at all
    "chunks of 4": (64, 32, 48, 2, 4, 2, None),
    "chunks of 2": (50, 36, 50, 2, 3, 1, 12),
    "no chunks": (51, 33, 25, 2, 3, 3, 10),
    "heads larger than hidden": (40, 16, 24, 2, 4, 2, 20),
}


def noisy(size, dtype=torch.float32, **changes):
    model = build(DecoderConfig(*size, rope_scaling=2.0, **changes), seed=0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.to(dtype).eval()


def text(model):
    return torch.randint(model.config.vocab_size, (1, 25), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def both(model, kind, prompt=5, release=True, **options):
    """Logits of the lean step and of the decoder on one text, token by token after a prompt; (steps, vocab) each.

    ``release=False`` leaves the decoder's layers prepared: both then multiply by the same kernels.
    """
    ids = text(model)
    caches = [model.make_cache(kind, max_length=ids.shape[1]) for _ in range(2)]
    if prompt:
        for cache in caches:
            model(ids[:, :prompt], cache)
    fast.prepare(model, **options)
    assert why_not(model) is None
    step = LeanStep(model)
    lean = torch.cat([step(token, caches[0]) for token in ids[0, prompt:].tolist()])
    if release:
        fast.release(model)
    full = torch.cat([type(model).forward(model, one, caches[1])[:, 0] for one in ids[:, prompt:].split(1, dim=1)])
    assert caches[0].length == caches[1].length == ids.shape[1]
    torch.testing.assert_close(
        *(cache.buffer for cache in caches), atol=3e-5 if lean.dtype.itemsize == 4 else 1, rtol=0
    )
    return lean, full, model(ids)[0, prompt:]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind, window", [("preallocated", None), ("preallocated", 7), ("rolling", 7), ("rolling", 1)])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_equals_the_decoder_in_float32(size, kind, window, bias, tied):
    model = noisy(size, sliding_window=window, qkv_bias=bias, tie_word_embeddings=tied)
    lean, full, uncached = both(model, kind)
    assert full.std() > 0.3
    torch.testing.assert_close(lean, full, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(lean, uncached, atol=3e-5, rtol=1e-4)


OTHERWISE = {  # what else may be asked for: of the model, and of both ways
    "no prompt": ({}, {"kind": "preallocated", "prompt": 0}),
    "sinks": ({"sliding_window": 4, "attention_sinks": 2}, {"kind": "rolling"}),
    "torch's products": ({}, {"kind": "preallocated", "quick_products": False}),
}


@pytest.mark.parametrize("changes, options", OTHERWISE.values(), ids=OTHERWISE)
def test_equals_the_decoder_otherwise_too(changes, options):
    lean, full, _ = both(noisy(SIZES["chunks of 4"], **changes), **options)
    torch.testing.assert_close(lean, full, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind, window", [("preallocated", None), ("rolling", 7)])
def test_is_as_near_to_float32_as_the_decoder_in_bfloat16(size, kind, window):
    """bfloat16 rounds to 1 part in 256, in another order here and there: compare both errors, not the values."""
    changes = {"sliding_window": window, "qkv_bias": True}
    lean, full, _ = both(noisy(size, torch.bfloat16, **changes), kind)
    exact = both(noisy(size, torch.bfloat16, **changes).float(), kind)[1]
    assert lean.dtype is torch.bfloat16
    lean_error, full_error = ((t.float() - exact).norm() / exact.norm() for t in (lean, full))
    assert full_error < 0.05
    assert lean_error < 1.5 * full_error


LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 8}
V3 = {"scoring_func": "sigmoid", "selection_bias": True, "n_shared_experts": 1, "routed_scaling_factor": 2.5}
SPARSE = {
    "V3": LATENT | V3 | {"first_k_dense_replace": 1},
    "V2": LATENT | {"q_lora_rank": 9, "norm_topk_prob": False, "n_shared_experts": 2},
    "groups of experts": LATENT | V3 | {"n_group": 2, "topk_group": 1},
    "plain attention": {"sliding_window": 7},
}


def sparse(name, dtype=torch.float32):
    sizes = (60, 32, 48, 3, 4, 2)
    model = build(SparseConfig(*sizes, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=16, **SPARSE[name]))
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.normal_(tensor, mean=float(tensor.ndim == 1), std=0.3, generator=generator)
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", SPARSE)
def test_equals_the_decoder_with_latents_and_experts(name):
    lean, full, uncached = both(sparse(name), "preallocated")
    assert full.std() > 0.3
    torch.testing.assert_close(lean, full, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lean, uncached, atol=1e-4, rtol=1e-4)


def test_a_mixture_tells_its_routing_and_what_is_wrong_with_it():
    model = sparse("V3")
    fast.prepare(model)
    with torch.inference_mode():
        cache = model.make_cache(max_length=4)
        model(torch.tensor([[1]]), cache)
        told = model.layers[1].mlp.last_routing
        SparseDecoder.forward(model, torch.tensor([[1]]))
        again = model.layers[1].mlp.last_routing
        assert torch.equal(told.indices, again.indices)
        for name in ("logits", "scores", "weights"):
            torch.testing.assert_close(getattr(told, name), getattr(again, name), atol=1e-5, rtol=1e-5)
        for tensor, words in ((model.layers[2].mlp.router.weight, "NaN"), (model.embed_tokens.weight, "NaN")):
            before = tensor.clone()
            tensor[:] = float("nan")
            with pytest.raises(ValueError, match=words):
                model(torch.tensor([[1]]), cache)
            tensor.copy_(before)
        model.layers[1].mlp.router.e_score_correction_bias[2:] = -torch.inf
        with pytest.raises(ValueError, match="fewer than top_k experts"):
            model(torch.tensor([[1]]), model.make_cache(max_length=4))


def tensors_of(thing):
    """All tensors that a function, or what it is made of, holds on to."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from tensors_of(part)
    elif isinstance(thing, functools.partial):
        yield from tensors_of((*thing.args, *thing.keywords.values()))
    elif inspect.isfunction(thing):
        yield from tensors_of([cell.cell_contents for cell in thing.__closure__ or ()])


def test_keeps_views_of_the_weights_not_copies():
    model = noisy(SIZES["chunks of 4"], tie_word_embeddings=True)
    kept, step = {p.untyped_storage().data_ptr() for p in model.parameters()}, LeanStep(model)
    found = {t.untyped_storage().data_ptr() for t in tensors_of([*step.layers, step.head])}
    assert found <= kept and len(found) == 2 * 4 + 1
    model = sparse("V3")
    held = (*model.parameters(), *model.buffers())
    kept, step = {p.untyped_storage().data_ptr() for p in held}, LeanStep(model)
    found = {t.untyped_storage().data_ptr() for t in tensors_of([*step.layers, step.head])}
    assert found <= kept and len(found) == 3 * 4 + 2 + 2 * 6 + 1


ONE = torch.tensor([[1]])


def filled(model, length):
    cache = model.make_cache(max_length=length)
    model(ONE.expand(1, length), cache)
    return cache


CALLS = {  # what the lean step is not for: the model answers, or says what is wrong
    "a full cache": (lambda m: m(ONE, filled(m, 1)), "max_length=1 positions: 1 new tokens after 1 do not fit"),
    "below the vocabulary": (lambda m: m(-ONE, m.make_cache(max_length=4)), "index out of range"),
    "above the vocabulary": (lambda m: m(64 * ONE, m.make_cache(max_length=4)), "index out of range"),
    "a cache for two": (lambda m: m(ONE, m.make_cache(batch_size=2, max_length=4)), "made for 2 sequences"),
    "another window": (lambda m: m(ONE, m.with_window(3).make_cache(max_length=4)), "made for window=3"),
    "no token": (lambda m: m(ONE[:, :0], m.make_cache(max_length=4)), "input_ids: got shape"),
    "no integer": (lambda m: m(ONE.float(), m.make_cache(max_length=4)), "input_ids: got dtype torch.float32"),
}


@pytest.mark.parametrize("call, words", CALLS.values(), ids=CALLS)
@torch.no_grad()
def test_wrong_calls_have_the_errors_of_the_model(call, words):
    model = noisy(SIZES["chunks of 4"])
    with pytest.raises((ValueError, IndexError), match=words) as plain:
        call(model)
    fast.prepare(model)
    with pytest.raises(type(plain.value), match=words):
        call(model)


@torch.no_grad()
def test_a_cache_of_more_layers_is_for_the_modules():
    model, larger = noisy(SIZES["chunks of 4"]), noisy((64, 32, 48, 3, 4, 2, None))
    caches = [larger.make_cache(max_length=4) for _ in range(2)]
    plain = model(ONE, caches[0])
    fast.prepare(model)
    torch.testing.assert_close(model(ONE, caches[1]), plain)


def test_elsewhere_than_on_a_cpu_the_modules_run():
    model = build(DecoderConfig(*SIZES["chunks of 4"]), device="meta")
    assert fast.prepare(model).plain[0] == ("", "Decoder", "is on meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [("embed_tokens", "lm_head"), ("embed_tokens",), ("o_proj",)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_of_four_bits(dtype, skip, symmetric):
    """The kernel computes in bfloat16, so both are compared with the same codes, unpacked and multiplied in float32."""
    size, changes = (128, 64, 64, 2, 4, 2, 32), {"qkv_bias": True, "tie_word_embeddings": True}
    model = quantize_(noisy(size, **changes), 32, symmetric=symmetric, skip=skip).to(dtype)
    exact = noisy(size, **changes)
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            parent, _, last = name.rpartition(".")
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(module.dequantize())
            plain.bias = None if module.bias is None else nn.Parameter(module.bias.float())
            setattr(exact.get_submodule(parent), last, plain)
    with torch.no_grad():
        want = exact(text(exact))[0, 5:]
    fast.prepare(model)
    if why_not(model) is None:  # there is a kernel
        lean, full, _ = both(model, "preallocated", release=False)
        errors = [(got.float() - want).norm() / want.norm() for got in (lean, full)]
        assert errors[0] < 1.5 * errors[1] + 1e-3
        assert errors[0] < 0.05


def test_four_bits_without_a_kernel_take_the_decoder():
    model = quantize_(noisy((128, 64, 96, 2, 4, 2, None)), 16)  # no kernel knows groups of 16
    fast.prepare(model)
    assert "groups of 16 have no kernel" in why_not(model)
