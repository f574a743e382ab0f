"""Rotary positions and local attention, against the plain formulas."""

import pytest
import torch

from dslib.architecture.cache import Step, visible
from dslib.architecture.layers import RMSNorm, apply_rope, attend, causal_attention, plain_attention, rope_angles
from dslib.architecture.window import window_attention

CLOSE = {"atol": 2e-6, "rtol": 1e-5}


def masked_attention(q, k, v, mask):
    """Softmax attention written out in float64; every key/value head repeated for its query heads."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1).double() for t in (k, v))
    scores = q.double() @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def band_mask(tokens, window, sinks=0):
    """Row by row, so that it shares no line with ``visible``."""
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for query in range(tokens):
        mask[query, max(0, query - window + 1) : query + 1] = True
        mask[query, : min(sinks, query + 1)] = True
    return mask


def qkv(tokens, *, batch=1, heads=2, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, h, tokens, dim, generator=generator) for h in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_keeps_the_dtype_and_says_nothing_beside_weights_of_another(dtype, recwarn):
    norm, x = RMSNorm(6, 1e-5), torch.randn(4, 6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        for on in (False, True):
            with torch.autocast("cpu", enabled=on):
                got = norm(x)
            assert got.dtype is dtype
            torch.testing.assert_close(got.double(), want, atol=0, rtol=2 * torch.finfo(dtype).eps)
    finally:
        torch.set_warn_always(always)
    assert not recwarn.list


@pytest.mark.parametrize("theta, scaling", [(10_000.0, 1.0), (100_000.0, 4.0)])
@pytest.mark.parametrize("dim", [2, 6, 64])
def test_rope_equals_the_rotate_half_formula(dim, theta, scaling):
    """As Llama writes it, in float64."""
    positions = torch.tensor([[0, 1, 2, 500], [7, 3, 100, 0]])  # in any order, other ones in each sequence
    x = torch.randn(2, 4, 3, dim, generator=torch.Generator().manual_seed(0))
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = (positions.double() / scaling)[..., None] * frequency
    cos, sin = (torch.cat((f(angle), f(angle)), -1).unsqueeze(2) for f in (torch.cos, torch.sin))
    first, second = x.double().chunk(2, dim=-1)
    wanted = x.double() * cos + torch.cat((-second, first), dim=-1) * sin
    got = apply_rope(x, *rope_angles(positions, dim, theta, scaling))
    # angles up to 500 are kept in float32: half a unit in the last place of 500 is 1.5e-5
    torch.testing.assert_close(got.double(), wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("shift", [1, 17, 300])
def test_rope_scores_depend_only_on_relative_position(shift):
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0))

    def scores(first):
        angles = rope_angles(torch.arange(first, first + 12).unsqueeze(0), 32, 10_000.0)
        rotated_q, rotated_k = (apply_rope(t.expand(1, 12, 1, 32), *angles)[0, :, 0] for t in (q, k))
        return rotated_q @ rotated_k.T

    torch.testing.assert_close(scores(shift), scores(0), atol=2e-3, rtol=0)
    assert (scores(0)[0] - scores(0)[5]).abs().max() > 0.1  # and they do depend on it


@pytest.mark.parametrize(
    "window, sinks, table",  # one string a query (positions 0..5), one digit a key
    [
        (None, 0, ["100000", "110000", "111000", "111100", "111110", "111111"]),
        (1, 0, ["100000", "010000", "001000", "000100", "000010", "000001"]),
        (3, 0, ["100000", "110000", "111000", "011100", "001110", "000111"]),
        (2, 1, ["100000", "110000", "111000", "101100", "100110", "100011"]),
        (1, 2, ["100000", "110000", "111000", "110100", "110010", "110001"]),
        (6, 3, ["100000", "110000", "111000", "111100", "111110", "111111"]),
    ],
)
def test_visible_by_a_table_written_by_hand(window, sinks, table):
    at = torch.arange(6)
    wanted = torch.tensor([[digit == "1" for digit in row] for row in table])
    assert torch.equal(visible(at, at, window, sinks), wanted)
    some = torch.tensor([[4], [1]])  # positions that differ within a batch
    assert torch.equal(visible(some, at.unsqueeze(0), window, sinks), wanted[some])


@pytest.mark.parametrize("sinks", [0, 1, 4, 50])
@pytest.mark.parametrize(
    "tokens, window, block",
    [
        (1, 1, None), (7, 1, 2), (33, 5, 4), (33, 5, 1), (40, 8, 8), (70, 40, None), (65, 3, None), (20, 64, 16),
        (9, 4, 100),
    ],
)  # fmt: skip
def test_window_attention_equals_a_band_mask(tokens, window, block, sinks):
    q, k, v = qkv(tokens, batch=2, heads=4, kv_heads=2)
    wanted = masked_attention(q, k, v, band_mask(tokens, window, sinks))
    torch.testing.assert_close(window_attention(q, k, v, window, sinks, block).double(), wanted, **CLOSE)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_plain_attention_is_what_the_fused_calls_compute(heads, kv_heads, batch):
    q, k, v = qkv(50, batch=batch, heads=heads, kv_heads=kv_heads)
    plain = plain_attention(q, k, v, band_mask(50, 12, 2))
    torch.testing.assert_close(plain.double(), masked_attention(q, k, v, band_mask(50, 12, 2)), **CLOSE)
    torch.testing.assert_close(window_attention(q, k, v, 12, 2, block=7), plain, **CLOSE)
    last = q[:, :, -1:]
    torch.testing.assert_close(attend(last, k, v, Step(torch.tensor([[49]]))), plain_attention(last, k, v), **CLOSE)


@pytest.mark.parametrize("sinks", [0, 2])
def test_window_attention_has_the_gradients_of_a_band_mask(sinks):
    inputs = [t.requires_grad_() for t in qkv(29, batch=2, heads=4, kv_heads=2)]
    weight = torch.randn(2, 4, 29, 8)
    got = torch.autograd.grad((window_attention(*inputs, 6, sinks, 4) * weight).sum(), inputs)
    wanted = torch.autograd.grad((masked_attention(*inputs, band_mask(29, 6, sinks)) * weight).sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 1, 5, 19, 20, 21, 1000])
def test_causal_attention_takes_any_window(window):
    q, k, v = qkv(20, heads=4, kv_heads=2)
    wanted = masked_attention(q, k, v, band_mask(20, window or 20))
    torch.testing.assert_close(causal_attention(q, k, v, window).double(), wanted, **CLOSE)


def test_window_attention_needs_memory_for_blocks_not_for_length_squared():
    """The largest tensor of one call, from the profiler's shapes: 8 times the length, 8 times the elements."""

    def largest(tokens):
        q, k, v = qkv(tokens, heads=1, kv_heads=1, dim=4)
        with torch.profiler.profile(profile_memory=True) as profile:
            window_attention(q, k, v, 16)
        return max(event.self_cpu_memory_usage for event in profile.events())

    assert largest(2048) <= 8.5 * largest(256)


@pytest.mark.parametrize("name, value", [("window", 0), ("window", -3), ("sinks", -1), ("block", 0)])
def test_window_attention_refuses(name, value):
    with pytest.raises(ValueError, match=f"^{name}: got {value}, expected at least"):
        window_attention(*qkv(4), **{"window": 2, name: value})
