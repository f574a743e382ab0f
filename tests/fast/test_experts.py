"""Every way to run experts against running them one token at a time; packing; and that nothing large is ever made."""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dslib import fast
from dslib.architecture.experts import Experts, can_group, one_by_one
from dslib.fast import linear
from dslib.fast.linear import FEW_WEIGHTS, pack, packed_product, product

pytestmark = pytest.mark.processor

E, K, H, I = 6, 2, 16, 24  # noqa: E741
WAYS = ("grouped", "padded", "loop", None)
CASES = {
    "some": lambda n: torch.rand(n, E).topk(K).indices,
    "all on one": lambda n: torch.tensor([[2, 4]]).repeat(n, 1),
    "some left out": lambda n: torch.rand(n, E + 1).topk(K).indices,
    "all left out": lambda n: torch.full((n, K), E),
    "half idle": lambda n: torch.rand(n, 3).topk(K).indices,
}
EACH_WAY = pytest.mark.parametrize("way", WAYS)
AUTOCAST = {None: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}  # dtype -> tolerance


def experts(hidden=H, inner=I, count=E, limit=None):
    torch.manual_seed(0)
    made = Experts(count, hidden, inner, limit)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def problem(case, count):
    torch.manual_seed(0)
    return torch.randn(count, H), CASES[case](count), torch.rand(count, K)


def close(got, wanted, tolerance=1e-5):
    torch.testing.assert_close(got.float(), wanted, atol=tolerance * max(1, wanted.abs().max().item()), rtol=0)


@pytest.fixture
def packable(monkeypatch):
    """Weights can be packed here, also where it would not pay."""
    monkeypatch.setattr(linear, "onednn", lambda: True)


@pytest.mark.usefixtures("packable")
@EACH_WAY
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("count", "limit", "inner"), [(1, None, I), (3, 0.5, I), (40, 0.5, 22), (40, None, 6)])
@torch.no_grad()
def test_all_ways_equal_one_token_at_a_time(way, case, count, limit, inner):
    """Rows of 22 numbers of four bytes, or of 6, are no multiple of 16 bytes: the grouped product refuses them."""
    layer, (x, indices, weights) = experts(inner=inner, limit=limit), problem(case, count)
    want = one_by_one(layer, x, indices, weights)
    if not can_group(layer, x.dtype) and way == "grouped":
        with pytest.raises(ValueError, match="way: got 'grouped', expected one of 'padded', None"):
            layer(x, indices, weights, way)
        return
    for dtype, tolerance in AUTOCAST.items():
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            fast.release(layer)
            if way != "loop" and not (dtype is torch.float16 and way == "grouped"):
                close(layer(x, indices, weights, way), want, tolerance)
            fast.prepare(layer)
            if not (dtype and way == "loop") and not (dtype is torch.float16 and way == "grouped"):
                got = layer(x, indices, weights, way)
                assert got.dtype is torch.float32
                close(got, want, tolerance)
            fast.prepare(layer, pack_experts=way is None)
            close(layer(x, indices, weights), want, tolerance)


@EACH_WAY
@pytest.mark.parametrize("count", [1, 40])
@torch.no_grad()
def test_bfloat16(way, count):
    layer, (x, indices, weights) = experts(), problem("some", count)
    layer.bfloat16().float()
    x = x.bfloat16()
    want = one_by_one(layer, x.float(), indices, weights)
    fast.prepare(layer.bfloat16())
    got = layer(x, indices, weights, way)
    assert got.dtype is torch.bfloat16
    close(got, want, 0.02)


@pytest.mark.parametrize("way", ["grouped", "padded", None])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("limit", [None, 0.5])
def test_gradients_equal_those_of_one_token_at_a_time(way, case, limit):
    x, indices, weights = problem(case, 12)

    def gradients(run, dtype=None):
        layer, a, b = experts(limit=limit), x.clone().requires_grad_(), weights.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            out = run(layer, a, b)
        if not out.requires_grad:  # everything left out
            return [torch.zeros_like(p) for p in (a, b, *layer.parameters())]
        (out * torch.linspace(-1, 1, H)).sum().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in (a, b, *layer.parameters())]

    want = gradients(lambda layer, a, b: one_by_one(layer, a, indices, b))
    for dtype, tolerance in [(None, 1e-5), (torch.bfloat16, 0.05)][: 2 if limit is None else 1]:  # a limit has an edge
        for got, wanted in zip(gradients(lambda m, a, b: m(a, indices, b, way), dtype), want, strict=True):
            close(got, wanted, tolerance)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@EACH_WAY
@torch.no_grad()
def test_what_is_left_out_is_never_multiplied(way, bad):
    """A token that overflows must not reach the others through pairs of weight 0, nor a weight that is no number."""
    layer, (x, indices, weights) = experts(), problem("some left out", 12)
    indices[0], x[0] = torch.tensor([0, 1]), bad
    indices[-1], weights[-1] = E, bad
    for count in (1, 12):
        part = x[-count:], indices[-count:], weights[-count:]
        for prepared in (False, True):
            if prepared:
                fast.prepare(layer)
            elif way == "loop":
                continue
            got = layer(*part, way)
            assert got[1 - count :].isfinite().all() and (got[-1] == 0).all()
            fast.release(layer)


@torch.no_grad()
def test_rows_need_not_lie_side_by_side_and_there_may_be_none():
    layer, (x, indices, weights) = experts(), problem("some", 20)
    strided = torch.stack((x, x), dim=1)[:, 0]
    assert not strided.is_contiguous()
    close(layer(strided, indices, weights), layer(x, indices, weights))
    assert layer(x[:0], indices[:0], weights[:0]).shape == (0, H)


def fused_step(layer):
    """The fused optimiser writes without a trace."""
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()


def in_inference_mode(layer):
    with torch.inference_mode():
        layer.down_proj[1].mul_(2)


NEW_WEIGHTS = {
    "new data": lambda layer: setattr(layer.down_proj, "data", torch.ones(E, H, I)),
    "replaced": lambda layer: setattr(layer, "gate_up_proj", torch.nn.Parameter(torch.ones(E, 2 * I, H) / 9)),
}
CHANGES = {
    "data": lambda layer: layer.down_proj.data.mul_(2),
    "in place": lambda layer: layer.down_proj.mul_(2),
    "inference mode": in_inference_mode,
    "fused optimiser": fused_step,
    "loaded": lambda layer: layer.load_state_dict({name: p * 2 for name, p in layer.state_dict().items()}),
    "cast": lambda layer: layer.to(torch.bfloat16),
    **NEW_WEIGHTS,
}


@pytest.mark.usefixtures("packable")
@pytest.mark.parametrize(
    ("name", "packed"), [*[(name, False) for name in CHANGES], *[(name, True) for name in NEW_WEIGHTS]]
)
@pytest.mark.parametrize("count", [1, 20])
@torch.no_grad()
def test_no_change_goes_unseen(name, packed, count):
    layer, (x, indices, weights) = experts(), problem("some", count)
    fast.prepare(layer, pack_experts=packed)
    before = layer(x, indices, weights)
    CHANGES[name](layer)
    x = x.to(layer.down_proj.dtype)
    got = layer(x, indices, weights)
    fast.release(layer)
    want = one_by_one(layer, x, indices, weights)
    assert name == "cast" or (got - before).abs().max() > 0.01
    close(got, want.float(), 0.02 if name == "cast" else 1e-5)


@pytest.mark.usefixtures("packable")
@pytest.mark.parametrize("inference", [False, True])
def test_packed_weights_are_in_one_place_and_come_back(inference):
    layer, (x, indices, weights) = experts(), problem("some", 20)
    before, known = copy.deepcopy(layer.state_dict()), [id(parameter) for parameter in layer.parameters()]
    with torch.inference_mode() if inference else torch.no_grad():
        report = fast.prepare(layer, pack_experts=True)
        assert report.fast[0][2].endswith("packed")
        assert sum(parameter.numel() for parameter in layer.parameters()) == 0
        layer(x, indices, weights)
        fast.prepare(layer)  # without packing
    assert all(torch.equal(layer.state_dict()[name], kept) for name, kept in before.items())
    assert [id(parameter) for parameter in layer.parameters()] == known  # an optimiser would still know them
    layer(x, indices, weights).sum().backward()  # and they can be trained


@pytest.mark.usefixtures("packable")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda layer: layer.state_dict(), "cannot be saved so; expected fast.release"),
        (lambda layer: copy.deepcopy(layer), "cannot be copied so; expected fast.release"),
        (lambda layer: layer(*problem("some", 3)), "gradients True; these experts are packed"),
        (lambda layer: layer(problem("some", 3)[0].bfloat16(), *problem("some", 3)[1:]), "x: got torch.bfloat16"),
        (lambda layer: layer(torch.zeros(1, H), torch.zeros(1, 1).int(), torch.ones(1, 1)), "indices: got torch.int32"),
        (lambda layer: layer(torch.zeros(1, H), torch.zeros(1, 2).long(), torch.ones(1, 1)), "weights: got shape"),
    ],
    ids=["save", "copy", "train", "other dtype", "other indices", "other weights"],
)
def test_what_packed_experts_refuse(call, words):
    layer = experts()
    fast.prepare(layer, pack_experts=True)
    with pytest.raises(ValueError, match=words):
        call(layer)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, torch.Tensor):
                self.numel = max(self.numel, item.numel())
        return out


@pytest.mark.parametrize(("way", "training"), [*[(way, False) for way in WAYS], ("grouped", True), ("padded", True)])
def test_nothing_as_large_as_tokens_times_experts_times_hidden_is_made(way, training):
    count, many, hidden = 256, 32, 64
    layer = experts(hidden, 32, many)
    fast.prepare(layer)
    x = torch.randn(count, hidden, requires_grad=training)
    indices, weights = torch.rand(count, many).topk(K).indices, torch.rand(count, K)
    with Largest() as largest, torch.set_grad_enabled(training):
        out = layer(x, indices, weights, way)
        if training:
            out.sum().backward()
    longest = int(torch.bincount(indices.flatten()).max())
    assert largest.numel < count * many * hidden / 3
    assert largest.numel <= max(layer.gate_up_proj.numel(), many * longest * 2 * 32, count * K * hidden)


ONE = {"x": torch.zeros(1, H), "weights": torch.ones(1, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, H + 1)}, r"x: got shape \(4, 17\), expected \(tokens, 16\)"),
        ({"x": torch.zeros(2, 2, H)}, "x: got shape"),
        ({"x": torch.zeros(4, H, dtype=torch.float64)}, "x: got torch.float64"),
        ({"indices": torch.zeros(4, K)}, "indices: got torch.float32"),
        ({"indices": torch.zeros(3, K, dtype=torch.long)}, r"indices: got torch.int64 \(3, 2\)"),
        ({"indices": torch.full((4, K), E + 1)}, "indices: expected 0 to 6"),
        ({"indices": torch.full((4, K), -1)}, "indices: expected 0 to 6"),
        ({**ONE, "indices": torch.tensor([[0, 1, E + 1]])}, "indices: expected 0 to 6"),
        ({**ONE, "indices": torch.tensor([[0, 1, -1]])}, "indices: expected 0 to 6"),
        ({"weights": torch.zeros(4, K + 1)}, r"weights: got shape \(4, 3\)"),
        ({"way": "fast"}, "way: got 'fast', expected one of 'grouped', 'padded'"),
    ],
)
@torch.no_grad()
def test_bad_input_is_named(change, message):
    call = {"x": torch.zeros(4, H), "indices": torch.zeros(4, K, dtype=torch.long), "weights": torch.zeros(4, K)}
    layer = experts()
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            layer(**call | change)
        fast.prepare(layer)


@pytest.mark.parametrize(("sizes", "words"), [
    ((0, 4, 4), "num_experts: got 0"), ((4, 0, 4), "hidden_size: got 0"), ((4, 4, 0), "intermediate_size: got 0"),
    ((4, 4, 4, 0.0), "swiglu_limit: got 0.0"), ((4, 4, 4, math.nan), "swiglu_limit: got nan"),
])  # fmt: skip
def test_bad_sizes_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        Experts(*sizes)


@pytest.mark.parametrize("rows", [1, 3, 64, 100])
@pytest.mark.parametrize("shape", [(8, 12), (7, 5), (1024, 512)])
@pytest.mark.parametrize("precision", ["highest", "medium"])
@torch.no_grad()
def test_the_products_are_products(rows, shape, precision):
    assert 7 * 5 < FEW_WEIGHTS < 1024 * 512
    torch.manual_seed(0)
    x, weight = torch.randn(rows, shape[1]), torch.randn(shape)
    want = (x.double() @ weight.double().T).float()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        tolerance = 1e-4 * math.sqrt(shape[1]) * (1 if precision == "highest" else 400)
        assert torch.allclose(product(x, weight), want, atol=tolerance)
        if (made := pack(weight)) is not None:
            assert torch.allclose(packed_product(x, made), want, atol=tolerance)
    finally:
        torch.set_float32_matmul_precision(before)
