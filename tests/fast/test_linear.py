"""Our linear layer is ``nn.Linear``; only the way one row is computed differs."""

import pytest
import torch
import torch.nn.functional as F

from dslib.fast import linear
from dslib.fast.linear import Linear, one_row_linear, set_split_rows


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
        ((1, 1, 16), True, torch.float32, False),
        ((1, 1, 16), False, torch.bfloat16, False),
    ],
)
def test_one_row_path_is_for_one_float32_row_without_bias(calls, shape, bias, dtype, taken):
    torch.manual_seed(0)
    layer, x = Linear(16, 8, bias=bias).to(dtype), torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        got = layer(x)
    assert bool(calls) is taken
    torch.testing.assert_close(got, F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


def test_training_takes_the_ordinary_path_and_has_its_gradients(calls):
    torch.manual_seed(0)
    ours, theirs = Linear(16, 8, bias=False), torch.nn.Linear(16, 8, bias=False)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 1, 16)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    assert not calls


def test_set_split_rows_turns_a_whole_model_off_and_on(calls):
    model = torch.nn.Sequential(Linear(16, 8, bias=False), torch.nn.Sequential(Linear(8, 4, bias=False)))
    with torch.no_grad():
        set_split_rows(model, False)
        model(torch.randn(1, 16))
        assert calls == []
        set_split_rows(model, True)
        model(torch.randn(1, 16))
        assert len(calls) == 2
