"""4-bit kernels against the layer that unpacks, on each way; and that no copy outlives a change."""

import copy

import pytest
import torch
from torch import nn

from dslib import fast
from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.int4 import layers
from dslib.architecture.int4.layers import Int4Linear, quantize_
from dslib.fast import int4, int4_rows
from dslib.fast.int4 import FEW_ROWS
from dslib.fast.shortcut import shortcut_of

pytestmark = pytest.mark.processor

KINDS = [("rtn", False), ("rtn", True), ("hqq", False)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(seed=0, symmetric=False, columns=64, bias=None):
    return Int4Linear.from_weight(random(64, columns, seed=seed), 32, symmetric=symmetric, bias=bias)


@pytest.fixture(params=["as here", "without torch's kernel", "without any"])
def kernels(request, monkeypatch):
    """With the kernels of this processor, with ours for one that has none in torch, and without a compiler besides."""
    if request.param != "as here":
        monkeypatch.setattr(int4, "cpu_kernel", lambda: False)
    if request.param == "without any":
        monkeypatch.setattr(int4_rows, "compiled", lambda: "no compiler here")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("method, symmetric", KINDS)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
def test_a_prepared_layer_equals_the_plain_one(method, symmetric, group_size, bias, dtype):
    """Values, dtype and shape, whatever this processor has."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 192, bias=bias is not None)
    layer = Int4Linear.from_linear(linear, group_size, method, symmetric)
    if bias is not None:
        layer.bias = layer.bias.to(bias)
    unpacked = bool(fast.prepare(layer).plain)
    columns = random(256, 6)
    for x in (random(256), *(random(*shape, 256) for shape in ((1,), (3, 5), (48,), (49,), (0,), (2, 0))), columns.T):
        x = x.to(dtype)
        with torch.no_grad():
            got, plain, want = layer(x), Int4Linear.forward(layer, x), Int4Linear.forward(layer, x.float())
        assert (got.dtype, got.shape) == (plain.dtype, plain.shape) == (dtype, (*x.shape[:-1], 192))
        # Unpacked, the weights are rounded to bfloat16 once more.
        slack = 2**-6 if unpacked or (len(x) > FEW_ROWS and x.ndim == 2) else 2**-7
        deviation = want.std().item() if want.numel() else 0.0
        torch.testing.assert_close(got.float(), want, rtol=slack, atol=slack * deviation)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("x, words", [
    (torch.tensor(1.0), r"x: got shape \(\), expected \(\.\.\., 64\)"),
    (torch.zeros(2, 32), r"x: got shape \(2, 32\)"),
    (torch.zeros(0), r"x: got shape \(0,\)"),
    (torch.zeros(2, 64, dtype=torch.int64), "x: got torch.int64"),
    (torch.zeros(2, 64, dtype=torch.bool), "x: got torch.bool"),
    (torch.zeros(2, 64, device="meta"), "x: got device meta, expected the layer's cpu"),
])  # fmt: skip
def test_errors_are_the_same_prepared_or_not(x, words):
    layer = layer_of()
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            layer(x)
        fast.prepare(layer)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", [torch.bfloat16, torch.float16])
def test_autocast_chooses_the_format(dtype, format):
    layer, x = layer_of(bias=random(64)), random(3, 64).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", format):
        plain = layer(x)
        fast.prepare(layer)
        assert torch.equal(layer(x), plain) and plain.dtype is layer(x).dtype


@pytest.mark.usefixtures("kernels")
def test_gradients_flow_to_the_input():
    layer, x = layer_of(), random(3, 64).requires_grad_()
    fast.prepare(layer)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0], layer.dequantize().sum(0))


@pytest.mark.parametrize("group_size, device", [(16, "cpu"), (32, "meta")])
def test_what_has_no_kernel_says_so_and_runs(group_size, device):
    layer = Int4Linear(64, 64, group_size, device=device)
    report = fast.prepare(layer)
    assert not report.fast and "expected" in report.plain[0][2]
    assert layer(torch.zeros(2, 64, device=device)).shape == (2, 64)


def test_without_a_kernel_the_report_says_that_weights_are_kept_and_nothing_warns(monkeypatch, recwarn):
    monkeypatch.setattr(int4, "cpu_kernel", lambda: False)
    monkeypatch.setattr(int4_rows, "compiled", lambda: "no compiler here")
    model = quantize_(build(DecoderConfig(64, 64, 96, 2, 4, 2), seed=0).eval())
    report = fast.prepare(model)
    (why,) = {why for _, kind, why in report.plain if kind == "Int4Linear"}
    assert "no compiler here; keeps its weights unpacked, about 2.6 bytes more" in why
    unpacked = []
    monkeypatch.setattr(layers, "unpack", lambda packed: unpacked.append(packed) or int4.unpack(packed))
    with torch.no_grad():
        ids = torch.arange(5).view(1, -1)
        got = [model(ids) for _ in range(3)]
        assert len(unpacked) == 2 * 4  # once for each layer
        fast.release(model)
        torch.testing.assert_close(got[-1], model(ids), rtol=0.02, atol=0.02 * got[0].std().item())
    assert not recwarn.list


# --- every way to change a layer that was used


def in_inference_mode(one, two):
    with torch.inference_mode():
        for name, buffer in one.named_buffers():
            buffer.copy_(getattr(two, name))


def through_data(one, two):
    for name, buffer in one.named_buffers():
        buffer.data.copy_(getattr(two, name))


def replaced(one, two):
    for name, _ in list(one.named_buffers()):
        setattr(one, name, getattr(two, name).clone())


def scales_only(one, two):
    one.scales.data.mul_(2)
    two.load_state_dict(one.state_dict())


def one_code(one, two):
    one.packed.data[-1, -1] ^= 1
    two.load_state_dict(one.state_dict())


def other_format(one, two):
    replaced(one, two)
    one.scales = two.scales.float()


def other_order(one, two):
    replaced(one, two)
    one.scales, one.packed = two.scales.mT.contiguous().mT, two.packed.T.contiguous().T


CHANGES = {
    "load_state_dict": lambda one, two: one.load_state_dict(two.state_dict()),
    "assign": lambda one, two: one.load_state_dict(copy.deepcopy(two.state_dict()), assign=True),
    "moved and converted": lambda one, two: one.load_state_dict(two.state_dict()) and one.double().half().float(),
    "away and back": lambda one, two: one.to("meta").to_empty(device="cpu").load_state_dict(two.state_dict()),
    **{change.__name__: change for change in (
        in_inference_mode, through_data, replaced, scales_only, one_code, other_format, other_order
    )},
}  # fmt: skip


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("made_in_inference_mode", [False, True])
def test_no_copy_outlives_a_change(change, symmetric, made_in_inference_mode):
    x = random(3, 64)
    with torch.inference_mode(made_in_inference_mode):
        one = layer_of(0, symmetric)
    two = layer_of(1, symmetric)
    with torch.inference_mode():
        fast.prepare(one)
        before = one(x)
    with torch.inference_mode() if made_in_inference_mode else torch.no_grad():
        change(one, two)
        got, want = one(x), Int4Linear.forward(two, x)
        assert (got - before).abs().max() > 1e-3
        torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-7 * want.std().item())
        fast.release(one)
        torch.testing.assert_close(one(x), want)


@pytest.mark.parametrize("change", ["load_state_dict", "assign", "in_inference_mode", "replaced", "away and back"])
@pytest.mark.parametrize("made_in_inference_mode", [False, True])
def test_the_order_for_a_gpu_is_made_anew(change, made_in_inference_mode, monkeypatch):
    """With a stand-in for the GPU's order. Writes through ``.data`` are not seen there, as the docstring says."""
    monkeypatch.setattr(int4, "cuda_tiles", lambda codes: codes.clone())
    with torch.inference_mode(made_in_inference_mode):
        one, two = layer_of(0), layer_of(1)
        fast.prepare(one)
        quick = shortcut_of(one)
        assert quick.tiles() is quick.tiles()
        CHANGES[change](one, two)
        assert torch.equal(quick.tiles(), int4.unpack(two.packed))


@pytest.mark.usefixtures("kernels")
def test_a_copy_of_a_prepared_layer_has_weights_of_its_own():
    one, x = layer_of(), random(2, 64)
    fast.prepare(one)
    with torch.no_grad():
        before = one(x)
        twin = copy.deepcopy(one)
        twin.load_state_dict(layer_of(1).state_dict())
        assert torch.equal(one(x), before) and not torch.allclose(twin(x), before)
