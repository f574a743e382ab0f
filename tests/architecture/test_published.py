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


def run(module, x, cache=None, positions=None):
    step = step_for(x, cache, positions, config())
    return module(x, rope_angles(step.positions, module.rope, 100.0, dtype=x.dtype), step, cache, 0)


def states(batch, tokens, size=32, seed=1):
    return torch.randn(batch, tokens, size, generator=torch.Generator().manual_seed(seed))


def in_form(module, form):
    module.form = form
    return module


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 17), (1, 64)], ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"q_lora_rank": None}, {"v_head_dim": 40}, {"num_attention_heads": 1}], ids=str
)
@torch.no_grad()
def test_both_forms_give_the_same(shape, changes):
    module, x = attention(**changes), states(*shape)
    naive, absorbed, auto = (run(in_form(module, form), x) for form in ("naive", "absorbed", "auto"))
    assert naive.shape == x.shape
    torch.testing.assert_close(absorbed, naive, atol=1e-5 * naive.abs().max().item(), rtol=0)
    assert torch.equal(auto, naive) or torch.equal(auto, absorbed)


@torch.no_grad()
def test_both_forms_give_the_same_in_bfloat16_up_to_its_rounding():
    module, x = attention(torch.bfloat16), states(2, 17).bfloat16()
    naive, absorbed = (run(in_form(module, form), x) for form in ("naive", "absorbed"))
    exact = run(in_form(module.float(), "naive"), x.float())
    for got in (naive, absorbed):
        assert got.dtype is torch.bfloat16
        assert (got - exact).abs().max() < 0.03 * exact.abs().max()


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


@pytest.mark.parametrize("form", ["naive", "absorbed"])
@torch.no_grad()
def test_only_the_distance_between_positions_counts(form):
    module, x = in_form(attention(), form), states(1, 9)
    at = torch.arange(9).unsqueeze(0)
    first = run(module, x, positions=at)
    torch.testing.assert_close(run(module, x, positions=at + 40), first, atol=1e-4, rtol=0)
    assert (run(module, x, positions=at * 2) - first).abs().max() > 1e-2


@pytest.mark.parametrize("form", ["naive", "absorbed"])
@torch.no_grad()
def test_later_tokens_do_not_change_earlier_ones(form):
    module, x = in_form(attention(), form), states(2, 12)
    torch.testing.assert_close(run(module, x)[:, :7], run(module, x[:, :7]), atol=1e-5, rtol=1e-5)


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


@torch.no_grad()
def test_at_published_sizes_prompts_are_naive_and_steps_absorbed():
    with torch.device("meta"):
        module = MultiHeadLatentAttention(preset("deepseek-v2"))
    assert [module._cheaper(n, n) for n in (1, 2, 100, 4096)] == ["naive"] * 4
    assert [module._cheaper(1, n) for n in (2, 100, 4096, 163840)] == ["absorbed"] * 4


@pytest.mark.parametrize("bad", ["fast", None, ""])
def test_an_unknown_form_is_refused(bad):
    with pytest.raises(ValueError, match=r"form: got .*, expected one of 'naive', 'absorbed', 'auto'"):
        attention().form = bad
    with pytest.raises(ValueError, match="form: got"):
        MultiHeadLatentAttention(config(), bad)


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


@torch.no_grad()
def test_the_cache_holds_the_normalised_latent_and_the_rotated_key():
    module, x = attention(), states(1, 5)
    cache = PreallocatedCache(config(), 1, 5)
    run(module, x, cache)
    latent, key = module.kv_a_proj_with_mqa(x).split((12, 6), -1)
    torch.testing.assert_close(cache.buffer[0, 0, 0, 0, :, :12], module.kv_a_layernorm(latent)[0])
    kept_key = cache.buffer[0, 0, 0, 0, :, 12:]
    torch.testing.assert_close(kept_key[0], key[0, 0])  # position 0 is not turned
    assert (kept_key[1:] - key[0, 1:]).abs().max() > 0.1
    torch.testing.assert_close(kept_key.norm(dim=-1), key[0].norm(dim=-1))  # and turning changes no length


@torch.no_grad()
def test_a_full_cache_says_so_and_stays_usable():
    module, x = attention(), states(1, 9)
    cache = PreallocatedCache(config(), 1, 8)
    with pytest.raises(ValueError, match=r"max_length=8 positions: 9 new tokens after 0 do not fit"):
        run(module, x, cache)
    run(module, x[:, :6], cache)
    with pytest.raises(ValueError, match=r"3 new tokens after 6 do not fit"):
        run(module, x[:, 6:9], cache)
    torch.testing.assert_close(run(module, x[:, 6:8], cache), run(module, x[:, :8])[:, 6:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"positions: got 8 to 8, expected 0 to 7"):
        run(module, x[:, :1], cache, torch.tensor([[8]]))


# YaRN


def test_without_stretching_yarn_is_plain_rope():
    yarn, positions = Yarn(1.0, 64, mscale=0.7, mscale_all_dim=0.3), torch.arange(50).unsqueeze(0)
    assert yarn.magnitude == yarn.softmax_factor == 1.0
    for got, wanted in zip(yarn.angles(positions, 16, 100.0), rope_angles(positions, 16, 100.0), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_fast_pairs_keep_their_frequency_and_slow_ones_lose_the_factor():
    plain = 10_000.0 ** (-torch.arange(32) / 32)
    change = Yarn(40.0, 4096).frequencies(64, 10_000.0) / plain
    turns = 4096 * plain / (2 * torch.pi)  # within the context of pre-training
    torch.testing.assert_close(change[turns > 36], torch.ones_like(change[turns > 36]))
    torch.testing.assert_close(change[turns < 0.7], torch.full_like(change[turns < 0.7], 1 / 40))
    assert (change.diff() < 1e-6).all()
    assert int(((change < 0.99) & (change > 1.01 / 40)).sum()) >= 10  # and many are blended


def test_scores_grow_by_both_scales():
    yarn = Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=0.5)
    assert yarn.magnitude == pytest.approx(1.36889 / 1.18444, rel=1e-4)  # 0.1 ln 40 = 0.36889
    assert yarn.softmax_factor == pytest.approx(1.18444**2, rel=1e-4)
    scaled, plain = (attention(yarn=yarn).scale for yarn in (yarn, None))
    assert scaled / plain == pytest.approx(yarn.softmax_factor)


@pytest.mark.parametrize("message, changes", [
    ("factor: got 0.5, expected at least 1", {"factor": 0.5}),
    ("factor: got inf", {"factor": float("inf")}),
    ("factor: got nan", {"factor": float("nan")}),
    ("original_max_position_embeddings: got 0", {"original_max_position_embeddings": 0}),
    ("mscale: got -1", {"mscale": -1}),
    ("mscale_all_dim: got -0.1", {"mscale_all_dim": -0.1}),
    ("beta_slow, beta_fast: got 1 and 1, expected 0 < beta_slow < beta_fast", {"beta_fast": 1, "beta_slow": 1}),
    ("beta_slow, beta_fast: got 0 and 32", {"beta_slow": 0}),
])  # fmt: skip
def test_bad_yarn_is_refused(message, changes):
    with pytest.raises(ValueError, match=message):
        Yarn(**{"factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 32, **changes})
