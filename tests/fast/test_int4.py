"""4-bit kernels against the layer that unpacks, on each way; and that no copy outlives a change."""

import pytest
import torch
from torch import nn

from dslib import fast
from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.int4.layers import Int4Linear, quantize_
from dslib.fast import int4, int4_rows
from dslib.fast.int4 import FEW_ROWS
from dslib.fast.shortcut import shortcut_of

pytestmark = pytest.mark.processor

KINDS = [("rtn", False), ("rtn", True), ("hqq", False)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[True, False], ids=["as here", "without torch's kernel"])
def kernels(request, monkeypatch):
    """With the kernels of this processor, and with those of one that has no packed product in torch."""
    if not request.param:
        monkeypatch.setattr(int4, "cpu_kernel", lambda: False)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method, symmetric", KINDS)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
@pytest.mark.parametrize("bias", [False, True])
def test_a_prepared_layer_equals_the_plain_one(method, symmetric, group_size, bias, dtype):
    """Values, dtype and shape, whatever this processor has."""
    layer = Int4Linear.from_linear(nn.Linear(256, 192, bias=bias), group_size, method, symmetric)
    fast.prepare(layer)
    for shape in [(256,), (1, 256), (3, 5, 256), (200, 256), (0, 256)]:
        x = random(*shape).to(dtype)
        with torch.no_grad():
            got, plain, want = layer(x), Int4Linear.forward(layer, x), Int4Linear.forward(layer, x.float())
        assert (got.dtype, got.shape) == (plain.dtype, plain.shape) == (dtype, (*shape[:-1], 192))
        # Unpacked for many rows, the weights are rounded to bfloat16 once more.
        slack = 2**-6 if len(x) > FEW_ROWS and x.ndim == 2 else 2**-7
        deviation = want.std().item() if want.numel() else 0.0
        torch.testing.assert_close(got.float(), want, rtol=slack, atol=slack * deviation)


def test_gradients_flow_to_the_input():
    layer, x = Int4Linear.from_weight(random(64, 64)), random(3, 64).requires_grad_()
    fast.prepare(layer)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0], layer.dequantize().sum(0))


@pytest.mark.parametrize("group_size, device", [(16, "cpu"), (32, "meta")])
def test_what_has_no_kernel_says_so_and_runs_plain(group_size, device):
    layer = Int4Linear(64, 64, group_size, device=device)
    report = fast.prepare(layer)
    assert not report.fast and "expected" in report.plain[0][2]
    assert layer(torch.zeros(2, 64, device=device)).shape == (2, 64)


def test_without_a_kernel_the_report_says_so_and_nothing_warns(monkeypatch, recwarn):
    monkeypatch.setattr(int4, "cpu_kernel", lambda: False)
    monkeypatch.setattr(int4_rows, "compiled", lambda: "no compiler here")
    model = quantize_(build(DecoderConfig(64, 64, 96, 2, 4, 2), seed=0).eval())
    report = fast.prepare(model)
    assert {why for _, kind, why in report.plain if kind == "Int4Linear"} == {"no compiler here"}
    with torch.no_grad():
        ids = torch.arange(5).view(1, -1)
        got = model(ids)
        fast.release(model)
        assert torch.equal(got, model(ids))
    assert not recwarn.list


def test_the_groups_are_those_of_torch():
    assert int4.KERNEL_GROUPS == (32, 64, 128, 256)


def in_inference_mode(one, two):
    with torch.inference_mode():
        one.scales.copy_(two.scales)


def through_data(one, two):
    one.scales.data.copy_(two.scales)


def replaced(one, two):
    one.scales = two.scales.clone()


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [lambda one, two: one.load_state_dict(two.state_dict()), in_inference_mode, through_data, replaced]
)
def test_scales_that_the_kernel_reads_are_those_of_the_layer(change):
    """Symmetric scales lie between zeros for the kernel: there is one copy, whoever writes to it."""
    one, two = (Int4Linear.from_weight(random(64, 64, seed=seed), 32, symmetric=True) for seed in (0, 1))
    fast.prepare(one)
    quick, before = shortcut_of(one), one.scales.clone()
    assert torch.equal(quick.pairs()[..., :1], before) and not quick.pairs()[..., 1].any()
    change(one, two)
    assert torch.equal(quick.pairs()[..., 0], two.scales[..., 0]) and not torch.equal(one.scales, before)
    assert torch.equal(one.scales, two.scales)
    fast.release(one)
    assert one.scales.is_contiguous() and torch.equal(one.scales, two.scales)
