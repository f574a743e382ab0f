"""Latent attention by itself: two forms with one result, the cheaper one chosen, a cache of the size it should have."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dslib.architecture.cache import PreallocatedCache, step_for
from dslib.architecture.decoder import build
from dslib.architecture.layers import rope_angles
from dslib.architecture.published import MultiHeadLatentAttention, Yarn
from dslib.architecture.sparse_decoder import SparseConfig, preset

LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 9}


def config(**changes):
    return SparseConfig(**{
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "q_lora_rank": 14, **LATENT, **changes,
    })  # fmt: skip


def attention(dtype=torch.float32, **changes):
    """An attention layer whose weights make scores of size one."""
    torch.manual_seed(0)
    module = MultiHeadLatentAttention(config(**changes)).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return module


def run(module, x):
    step = step_for(x, None, None, config())
    return module(x, rope_angles(step.positions, module.rope, 100.0, dtype=x.dtype), step)


def states(batch, tokens, size=32, seed=1):
    return torch.randn(batch, tokens, size, generator=torch.Generator().manual_seed(seed))


def in_form(module, form):
    module.form = form
    return module


@pytest.mark.parametrize("form", ["naive", "absorbed", "auto"])
@torch.no_grad()
def test_both_forms_give_the_same_in_bfloat16_up_to_its_rounding(form):
    module, x = attention(torch.bfloat16), states(2, 17).bfloat16()
    got, wanted = run(in_form(module, form), x), run(in_form(module.float(), "naive"), x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(in_form(module, form), x.float())
    assert got.dtype is cast.dtype is torch.bfloat16
    assert max((got - wanted).abs().max(), (cast - wanted).abs().max()) < 0.03 * wanted.abs().max()


def test_both_forms_give_the_same_gradients():
    module, gradients = attention(), []
    for form in ("naive", "absorbed"):
        module.zero_grad()
        x = states(2, 17).requires_grad_()
        run(in_form(module, form), x).square().sum().backward()
        gradients.append({"x": x.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}})
    for name, wanted in gradients[0].items():
        scale = wanted.abs().max().item()
        assert scale > 1e-3, name
        torch.testing.assert_close(gradients[1][name], wanted, atol=2e-5 * scale, rtol=0)


def multiplications(module, shape, tokens, keys):
    """All of one call with ``tokens`` new tokens as the last of ``keys``, counted by torch."""
    cache, rope = PreallocatedCache(shape, 1, keys, device="meta"), shape.qk_rope_head_dim
    if keys > tokens:
        cache.advance(keys - tokens, None, "meta")
    x = torch.empty(1, tokens, shape.hidden_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        step = cache.advance(tokens, None, "meta")
        module(x, rope_angles(step.positions, rope, 1e4), step, cache, 0)
    return counter.get_total_flops()


@pytest.mark.parametrize("history", [0, 1, 100, 4000])
@pytest.mark.parametrize("tokens", [1, 8, 100, 200, 1000])
@torch.no_grad()
def test_auto_takes_the_form_with_fewer_multiplications(tokens, history):
    for shape in (preset("deepseek-v2"), config(), config(kv_lora_rank=4), config(v_head_dim=60)):
        with torch.device("meta"):
            module = MultiHeadLatentAttention(shape)
        counted = {
            form: multiplications(in_form(module, form), shape, tokens, tokens + history)
            for form in ("naive", "absorbed", "auto")
        }
        assert counted["naive"] != counted["absorbed"] or tokens == 1
        assert counted["auto"] == min(counted["naive"], counted["absorbed"])
        if shape.kv_lora_rank == 512 and tokens in (1, 1000):  # published sizes: prompts naive, steps absorbed
            assert module._absorbs(tokens, tokens + history) == (tokens == 1 and history > 0)


# What is cached


@pytest.mark.parametrize("dtype, element", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_are_those_of_latent_and_shared_key(dtype, element):
    cache = build(config(), dtype=dtype).make_cache(batch_size=3, max_length=20)
    assert cache.nbytes == 2 * 3 * 20 * (12 + 6) * element
    assert cache.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in cache.tensors())
    growing = build(config(), dtype=dtype).make_cache("growing")
    growing.advance(7, None, "cpu")
    for layer in range(2):
        (kept,) = growing.update(layer, torch.zeros(1, 1, 7, 18, dtype=dtype))
        assert kept.shape == (1, 1, 7, 18)
    assert growing.nbytes == 2 * 7 * 18 * element


@pytest.mark.parametrize(
    "name, elements", [("deepseek-v2", 34_560), ("deepseek-v3", 35_136), ("deepseek-v2-lite", 15_552)]
)
def test_published_models_keep_what_they_are_said_to_keep(name, elements):
    """Counted from the tensors of a cache for one token, on the meta device; 60 layers x (512 + 64) for V2."""
    model = build(preset(name), device="meta")
    cache = model.make_cache(max_length=1)
    assert cache.buffer.shape[1:4] == (1, 1, 1)  # one vector, for all heads
    assert sum(tensor.numel() for tensor in cache.tensors()) == elements == model.config.kv_elements_per_token


# YaRN


@pytest.mark.parametrize("message, changes", [
    ("form: got 'fast', expected one of 'naive', 'absorbed', 'auto'", "fast"),
    ("form: got None", None),
    ("factor: got 0.5, expected at least 1", {"factor": 0.5}),
    ("factor: got inf", {"factor": float("inf")}),
    ("factor: got nan", {"factor": float("nan")}),
    ("original_max_position_embeddings: got 0", {"original_max_position_embeddings": 0}),
    ("mscale: got -1", {"mscale": -1}),
    ("mscale_all_dim: got -0.1", {"mscale_all_dim": -0.1}),
    ("beta_slow, beta_fast: got 1 and 1, expected 0 < beta_slow < beta_fast", {"beta_fast": 1, "beta_slow": 1}),
    ("beta_slow, beta_fast: got 0 and 32", {"beta_slow": 0}),
])  # fmt: skip
def test_bad_input_is_named(message, changes):
    if isinstance(changes, dict):
        with pytest.raises(ValueError, match=message):
            Yarn(**{"factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 32, **changes})
        return
    for call in (lambda: in_form(attention(), changes), lambda: MultiHeadLatentAttention(config(), changes)):
        with pytest.raises(ValueError, match=message):
            call()
