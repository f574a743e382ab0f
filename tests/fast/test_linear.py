"""A prepared linear layer is ``nn.Linear``; only the way in which it is computed differs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dslib import fast
from dslib.fast import linear
from dslib.fast.kernels import rows
from dslib.fast.linear import one_row_linear

pytestmark = pytest.mark.processor


@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24)])
@pytest.mark.parametrize("out", [1, 3, 6, 7, 8, 250])
def test_one_row_equals_f_linear(shape, out):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(out, 24)
    got = one_row_linear(x, weight)
    assert got.shape == (*shape[:-1], out)
    torch.testing.assert_close(got, F.linear(x, weight), atol=1e-5, rtol=1e-5)


class Calls(list):
    compiled = False


@pytest.fixture(params=["compiled", "no compiler"])
def calls(monkeypatch, request):
    """Counts how often a few rows take the way of their own, with a compiler and without one."""
    seen, few_rows = Calls(), rows.few_rows
    monkeypatch.setattr(linear, "one_row_linear", lambda x, w: seen.append(x.shape) or one_row_linear(x, w))
    monkeypatch.setattr(rows, "few_rows", lambda x, w: seen.append(x.shape) or few_rows(x, w))
    if request.param == "no compiler":
        monkeypatch.setattr(rows, "why_not", lambda weight: "there is no compiler")
    elif rows.why_not(torch.zeros(1, 1)):
        pytest.skip(rows.why_not(torch.zeros(1, 1)))
    seen.compiled = request.param == "compiled"
    return seen


@pytest.mark.parametrize("shape, bias, dtype, gradients, taken", [  # taken: 1 compiled, 2 without a compiler too
    ((1, 1, 16), False, torch.float32, False, 2),
    ((1, 16), False, torch.float32, False, 2),
    ((16,), True, torch.float32, False, 2),
    ((1, 2, 16), False, torch.float32, False, 1),
    ((2, 2, 16), True, torch.float32, False, 1),
    ((8, 1, 16), False, torch.float32, False, 1),
    ((9, 1, 16), False, torch.float32, False, 0),
    ((5, 1, 16), False, torch.bfloat16, False, 0),
    ((1, 1, 16), True, torch.bfloat16, False, 1),
    ((1, 1, 16), True, torch.float16, False, 0),
    ((1, 1, 16), True, torch.float32, True, 0),
])  # fmt: skip
def test_which_rows_take_a_way_of_their_own(calls, shape, bias, dtype, gradients, taken):
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 8, bias=bias).to(dtype), torch.randn(shape, dtype=dtype)
    fast.prepare(layer)
    with torch.set_grad_enabled(gradients):
        got, want = layer(x), F.linear(x, layer.weight, layer.bias)
        if gradients:
            torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), layer.weight) for y in (got, want)))
    assert bool(calls) is (taken > 1 or (taken == 1 and calls.compiled))
    assert got.shape == want.shape and got.dtype is want.dtype
    close = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(got, want, atol=close, rtol=close)


@torch.no_grad()
def test_a_whole_model_is_prepared_and_released(calls):
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Sequential(nn.Linear(8, 4, bias=False)))
    for step, taken in ((fast.release, 0), (fast.prepare, 2), (lambda m: fast.prepare(m, quick_products=False), 2)):
        step(model)
        model(torch.randn(1, 16))
        assert len(calls) == taken


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 70])
@torch.no_grad()
def test_large_layers_equal_torch(count, transposed, monkeypatch):
    monkeypatch.setattr(linear, "onednn", lambda: True)
    layer, x = nn.Linear(512, 1024), torch.randn(count, 512)
    if transposed:
        layer.weight.data = layer.weight.data.t().contiguous().t()
    want = layer(x)
    fast.prepare(layer)
    torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=1e-4)


BAD = {  # what is wrong with the layer or the input, and two words of torch's own error
    "another width": (lambda layer: torch.ones(2, 8), "cannot be multiplied"),
    "another dtype": (lambda layer: torch.ones(1, 16, dtype=torch.float64), "same dtype"),
    "a number": (lambda layer: torch.ones(()), "at least 1D"),
    "a bias of another dtype": (lambda layer: setattr(layer.bias, "data", layer.bias.data.double()) or ROW, "dtype"),
    "a bias of another size": (lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(3, 8))) or ROW, "expand"),
}
ROW = torch.ones(1, 16)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("spoil, words", BAD.values(), ids=BAD)
@torch.no_grad()
def test_what_does_not_fit_is_torchs_own_error(spoil, words, prepared):
    layer = nn.Linear(16, 8)
    if prepared:
        fast.prepare(layer)
    with pytest.raises(RuntimeError, match=words):
        layer(spoil(layer))
