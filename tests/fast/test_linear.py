"""A prepared linear layer is ``nn.Linear``; only the way in which it is computed differs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dslib import fast
from dslib.fast import linear
from dslib.fast.linear import one_row_linear

pytestmark = pytest.mark.processor


@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24)])
@pytest.mark.parametrize("rows", [1, 3, 6, 7, 8, 250])
def test_one_row_equals_f_linear(shape, rows):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(rows, 24)
    got = one_row_linear(x, weight)
    assert got.shape == (*shape[:-1], rows)
    torch.testing.assert_close(got, F.linear(x, weight), atol=1e-5, rtol=1e-5)


@pytest.fixture
def calls(monkeypatch):
    """Counts how often the one-row path is taken."""
    seen = []
    real = one_row_linear
    monkeypatch.setattr(linear, "one_row_linear", lambda x, w: seen.append(x.shape) or real(x, w))
    return seen


@pytest.mark.parametrize(
    "shape, bias, dtype, taken",
    [
        ((1, 1, 16), False, torch.float32, True),
        ((1, 16), False, torch.float32, True),
        ((1, 2, 16), False, torch.float32, False),
        ((2, 1, 16), False, torch.float32, False),
        ((1, 1, 16), True, torch.float32, True),
        ((1, 1, 16), False, torch.bfloat16, False),
    ],
)
def test_one_row_path_is_for_one_float32_row(calls, shape, bias, dtype, taken):
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 8, bias=bias).to(dtype), torch.randn(shape, dtype=dtype)
    fast.prepare(layer)
    with torch.no_grad():
        got = layer(x)
    assert bool(calls) is taken
    torch.testing.assert_close(got, F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


def test_training_takes_the_ordinary_path_and_has_its_gradients(calls):
    torch.manual_seed(0)
    ours, theirs = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)
    theirs.load_state_dict(ours.state_dict())
    fast.prepare(ours)
    x = torch.randn(1, 1, 16)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    assert not calls


@torch.no_grad()
def test_a_whole_model_is_prepared_and_released(calls):
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Sequential(nn.Linear(8, 4, bias=False)))
    model(torch.randn(1, 16))
    assert calls == []
    fast.prepare(model)
    model(torch.randn(1, 16))
    assert len(calls) == 2
    fast.prepare(model, quick_products=False)
    model(torch.randn(1, 16))
    assert len(calls) == 2


@pytest.mark.parametrize("rows", [1, 2, 70])
@torch.no_grad()
def test_large_layers_equal_torch(rows, monkeypatch):
    monkeypatch.setattr(linear, "onednn", lambda: True)
    layer, x = nn.Linear(512, 1024), torch.randn(rows, 512)
    want = layer(x)
    fast.prepare(layer)
    torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=1e-4)


def test_shapes_that_do_not_fit_are_torchs_own_error():
    layer = nn.Linear(16, 8)
    fast.prepare(layer)
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        layer(torch.randn(2, 8))
