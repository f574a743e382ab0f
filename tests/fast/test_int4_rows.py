"""Rows in eight bits times 4-bit weights: the compiled product against the same steps in torch, and what has none."""

import pytest
import torch

from dslib import fast
from dslib.architecture.decoder import Decoder, DecoderConfig, build
from dslib.architecture.int4.layers import Int4Linear, quantize_
from dslib.architecture.sparse_decoder import SparseConfig
from dslib.fast import int4_rows
from dslib.fast.kernels.compiled import load
from dslib.fast.lean_step import LeanStep

pytestmark = pytest.mark.processor


@pytest.fixture(scope="module")
def multiply():
    reason = int4_rows.why_not(torch.empty(64, 16, dtype=torch.uint8), 32)
    if reason is not None:
        pytest.skip(reason)
    return int4_rows.rounded_product()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_and_rows(group_size=32, symmetric=False, count=3, out=192):
    layer = Int4Linear.from_weight(random(out, 768) * 0.02, group_size, symmetric=symmetric)
    return layer, random(count, 768, seed=1)


def pairs(layer):
    """Scales and zeros as the kernel reads them."""
    return torch.cat((layer.scales, torch.zeros_like(layer.scales)), -1) if layer.symmetric else layer.scales


def distance(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [4, 12, 32, 64, 128, 256])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_compiled_product_equals_the_same_steps_in_torch(multiply, group_size, symmetric, threads):
    layer, rows = layer_and_rows(group_size, symmetric)
    rows[1] *= 1e3  # each row and group has a scale of its own
    rows[2, 256:512] = 0
    args = (layer.packed, pairs(layer), group_size)
    torch.set_num_threads(threads)
    try:
        for some in (rows, rows[:1], rows[:0]):
            y = multiply(some, *args)
            assert y.shape == (len(some), 192)
            for got, want in zip(y, int4_rows.plain(some, *args), strict=True):
                assert distance(got, want) < 2e-6
            # In bfloat16 the inputs are what they are, and only the result is rounded.
            half = multiply(some.bfloat16(), *args)
            assert half.dtype is torch.bfloat16
            assert torch.equal(half, multiply(some.bfloat16().float(), *args).bfloat16())
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [4, 12, 32, 64, 128, 256, 768])
def test_a_row_as_it_is_gives_the_exact_product(multiply, group_size, symmetric, portable):
    layer, rows = layer_and_rows(group_size, symmetric)
    rows[1] *= 1e3
    product, args = int4_rows.product(portable), (layer.packed, pairs(layer), group_size)
    for some in (rows, rows[:1], rows[:0]):
        want = Int4Linear.forward(layer, some)
        torch.testing.assert_close(
            product(some, *args), want, rtol=1e-4, atol=1e-5 * (some.abs().max().item() if len(some) else 1)
        )
        half = product(some.bfloat16(), *args)
        assert half.dtype is torch.bfloat16
        assert torch.equal(half, product(some.bfloat16().float(), *args).bfloat16())


def test_rounding_the_row_costs_less_than_a_hundredth():
    layer, rows = layer_and_rows()
    rounded = int4_rows.plain(rows, layer.packed, pairs(layer), 32)
    assert 1e-3 < distance(rounded, layer(rows)) < 1e-2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(multiply, value):
    layer, rows = layer_and_rows()
    rows[1, 5] = value
    y = multiply(rows, layer.packed, pairs(layer), 32)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], multiply(rows[::2].contiguous(), layer.packed, pairs(layer), 32))


def test_a_layer_rounds_a_few_rows_and_no_more(multiply):
    layer, rows = layer_and_rows(count=int4_rows.FEW + 1)
    layer.bias = random(192)
    fast.prepare(layer)
    exact = layer(rows)
    layer.activations = "int8"
    with torch.no_grad():
        assert torch.equal(layer(rows), exact)
        few = layer(rows[:-1].view(2, 2, -1))
        assert torch.equal(few.view(4, -1), multiply(rows[:-1], layer.packed, pairs(layer), 32) + layer.bias)
        assert torch.equal(layer(rows.t().contiguous().t()[:1]), few[0, :1])  # not contiguous
    needs_gradient = rows[:1].clone().requires_grad_()
    layer(needs_gradient).sum().backward()
    torch.testing.assert_close(needs_gradient.grad[0], layer.dequantize().sum(0))


def test_a_decoder_takes_its_steps_with_them(multiply):
    model = build(DecoderConfig(64, 64, 96, 2, 4, 2), seed=0).eval()
    quantize_(model, skip=("embed_tokens",), activations="int8")
    fast.prepare(model)
    step = LeanStep(model)
    caches = [model.make_cache(max_length=8) for _ in range(2)]
    with torch.no_grad():
        for token in (3, 5, 7):
            want = Decoder.forward(model, torch.tensor([[token]]), caches[0])[:, 0]
            assert want.std() > 0.1
            # A sum in another order can move an input across the border of two codes.
            assert distance(step(token, caches[1]), want) < 0.01


def test_experts_are_reached_too_and_shapes_without_a_product_named():
    assert "in groups of 6" in int4_rows.why_not(Int4Linear.from_weight(random(64, 96), 6).packed, 6)
    config = SparseConfig(64, 64, 96, 2, 4, 2, num_experts=4, moe_intermediate_size=64, n_shared_experts=1)
    model = quantize_(build(config, seed=0), activations="int8")
    kinds = {module.activations for module in model.modules() if isinstance(module, Int4Linear)}
    assert kinds == {"int8"}


@pytest.fixture
def nothing_remembered():
    """Whether there is a product is found out anew in this test, and again after it, however it ends."""
    load.cache_clear()
    yield
    load.cache_clear()


@pytest.mark.usefixtures("nothing_remembered")
def test_without_a_compiler_activations_are_not_rounded(monkeypatch, tmp_path, recwarn):
    layer, rows = layer_and_rows(out=192)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert "cannot be compiled" in int4_rows.why_not(layer.packed, 32)
    fast.prepare(layer)
    exact = layer(rows)
    layer.activations = "int8"
    with torch.no_grad():
        assert torch.equal(layer(rows), exact)
    assert not recwarn.list


@pytest.mark.usefixtures("nothing_remembered")
def test_it_is_compiled_once_and_then_found_again(multiply, monkeypatch, tmp_path):
    """As on a new machine: the first call compiles, and a later one, without a compiler, takes what is there."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert int4_rows.compiled() is None
    made = [path.suffix for path in (tmp_path / "dslib").iterdir()]
    load.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert int4_rows.compiled() is None and made == [".so"]


def test_the_compiled_product_checks_what_it_is_given(multiply):
    layer, rows = layer_and_rows()
    good = {"x": rows, "packed": layer.packed, "pairs": pairs(layer), "group": 32}
    for change, words in (
        ({"x": rows.double()}, "float64"),
        ({"x": rows[:, :700].contiguous()}, r"\(3, 700\)"),
        ({"packed": layer.packed[:100]}, r"\(100, 384\)"),
        ({"group": 48}, "groups of 48"),
        ({"group": 50}, "groups of 50"),
        ({"pairs": pairs(layer).float()}, "float32 in groups"),
        ({"x": rows.t()}, "contiguous"),
    ):
        with pytest.raises(ValueError, match=words):
            multiply(*(good | change).values())
