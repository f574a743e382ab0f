"""Every way to run experts against running them one token at a time; packing; and that nothing large is ever made."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dslib import fast
from dslib.architecture.experts import Experts, can_group
from dslib.architecture.experts import one_by_one as plain_loop
from dslib.fast import linear
from dslib.fast.linear import FEW_WEIGHTS, pack, packed_product, product

pytestmark = pytest.mark.processor

E, K, H, I = 6, 2, 16, 24  # noqa: E741
WAYS = ("grouped", "padded", "loop")
CASES = {
    "some": lambda n: torch.rand(n, E).topk(K).indices,
    "all on one": lambda n: torch.tensor([[2, 4]]).repeat(n, 1),
    "some left out": lambda n: torch.rand(n, E + 1).topk(K).indices,
    "all left out": lambda n: torch.full((n, K), E),
    "half idle": lambda n: torch.rand(n, 3).topk(K).indices,
}


def experts(hidden=H, inner=I, count=E, seed=0):
    torch.manual_seed(seed)
    made = Experts(count, hidden, inner)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def one_by_one(layer, x, indices, weights):
    rows = []
    for token, ids, shares in zip(x, indices.tolist(), weights, strict=True):
        total = torch.zeros_like(token)
        for expert, share in zip(ids, shares, strict=True):
            if expert < layer.num_experts:
                gate, up = (layer.gate_up_proj[expert] @ token).chunk(2)
                total = total + share.to(token.dtype) * (layer.down_proj[expert] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def problem(case, count, seed=0):
    torch.manual_seed(seed)
    indices = CASES[case](count)
    return torch.randn(count, H), indices, torch.rand(count, K)


@pytest.mark.parametrize("way", [*WAYS, None])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [1, 3, 40])
@torch.no_grad()
def test_all_ways_equal_one_token_at_a_time(way, case, count):
    layer = experts()
    x, indices, weights = problem(case, count)
    want = one_by_one(layer, x, indices, weights)
    assert torch.allclose(plain_loop(layer, x, indices, weights), want, atol=1e-5)
    if way != "loop":
        assert torch.allclose(layer(x, indices, weights, way), want, atol=1e-5)
    fast.prepare(layer)
    assert torch.allclose(layer(x, indices, weights, way), want, atol=1e-5)
    if way is None:
        fast.prepare(layer, pack_experts=True)
        assert torch.allclose(layer(x, indices, weights), want, atol=1e-5)


@pytest.mark.parametrize("way", [*WAYS, None])
@pytest.mark.parametrize("count", [1, 40])
@torch.no_grad()
def test_bfloat16(way, count):
    layer = experts().to(torch.bfloat16)
    fast.prepare(layer)
    x, indices, weights = problem("some", count)
    x = x.to(torch.bfloat16)
    want = one_by_one(layer.float(), x.float(), indices, weights)
    got = layer.to(torch.bfloat16)(x, indices, weights, way)
    assert got.dtype is torch.bfloat16 and torch.allclose(got.float(), want, atol=0.02 * want.abs().max().item())


@pytest.mark.parametrize("way", ["grouped", "padded", None])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_one_token_at_a_time(way, case):
    x, indices, weights = problem(case, 12)

    def gradients(run):
        layer, a, b = experts(), x.clone().requires_grad_(), weights.clone().requires_grad_()
        (run(layer, a, b) * torch.linspace(-1, 1, H)).sum().backward()
        return [a.grad, b.grad, *[p.grad for p in layer.parameters()]]

    got = gradients(lambda layer, a, b: layer(a, indices, b, way))
    if case == "all left out":  # nothing to differentiate: no gradient or zeros
        assert all(g is None or not g.any() for g in got)
        return
    want = gradients(lambda layer, a, b: one_by_one(layer, a, indices, b))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@torch.no_grad()
def test_sizes_that_the_grouped_product_refuses():
    """Rows of 22 numbers of four bytes are no multiple of 16 bytes; also where gradients are recorded."""
    layer, (x, indices, weights) = experts(inner=22), problem("some", 20)
    want = one_by_one(layer, x, indices, weights)
    assert torch.allclose(layer(x, indices, weights), want, atol=1e-5)
    with torch.enable_grad():
        assert torch.allclose(layer(x, indices, weights), want, atol=1e-5)
    assert not can_group(layer, x)


@torch.no_grad()
def test_rows_need_not_lie_side_by_side():
    layer, (x, indices, weights) = experts(), problem("some", 20)
    strided = torch.stack((x, x), dim=1)[:, 0]
    assert not strided.is_contiguous()
    assert torch.allclose(layer(strided, indices, weights), layer(x, indices, weights), atol=1e-6)


def test_no_tokens():
    layer = experts()
    out = layer(torch.zeros(0, H), torch.zeros(0, K, dtype=torch.long), torch.zeros(0, K))
    assert out.shape == (0, H)


def fused_step(layer):
    """The fused optimiser writes without a trace."""
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()


def in_inference_mode(layer):
    with torch.inference_mode():
        layer.down_proj[1].mul_(2)


CHANGES = {
    "data": lambda layer: layer.down_proj.data.mul_(2),
    "new data": lambda layer: setattr(layer.down_proj, "data", layer.down_proj * 2),
    "in place": lambda layer: layer.down_proj.mul_(2),
    "inference mode": in_inference_mode,
    "fused optimiser": fused_step,
    "loaded": lambda layer: layer.load_state_dict(experts(seed=9).state_dict()),
    "replaced": lambda layer: setattr(layer, "gate_up_proj", torch.nn.Parameter(layer.gate_up_proj.detach() * 2)),
    "cast": lambda layer: layer.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("count", [1, 20])
@torch.no_grad()
def test_no_change_goes_unseen(change, count):
    layer = experts()
    x, indices, weights = problem("some", count)
    fast.prepare(layer)
    layer(x, indices, weights)
    change(layer)
    x = x.to(layer.down_proj.dtype)
    want = one_by_one(layer, x, indices, weights)
    assert torch.allclose(layer(x, indices, weights), want, atol=1e-5 if want.dtype is torch.float32 else 0.1)


@pytest.mark.parametrize("expert", [-1, E + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_expert_that_is_not_there_is_refused_for_one_token_too(expert, dtype):
    layer = experts().to(dtype)
    call = torch.zeros(1, H, dtype=dtype), torch.tensor([[0, 1, expert]]), torch.ones(1, 3)
    for _ in range(2):
        with pytest.raises(ValueError, match="indices: expected 0 to 6"):
            layer(*call)
        fast.prepare(layer)


@pytest.fixture
def packable(monkeypatch):
    """Weights can be packed here, also where it would not pay."""
    monkeypatch.setattr(linear, "onednn", lambda: True)


@pytest.mark.usefixtures("packable")
@torch.no_grad()
def test_packed_weights_are_in_one_place_and_come_back():
    layer, (x, indices, weights) = experts(), problem("some", 20)
    before, want = copy.deepcopy(layer.state_dict()), layer(x, indices, weights)
    known = [id(parameter) for parameter in layer.parameters()]
    report = fast.prepare(layer, pack_experts=True)
    assert report.fast[0][2].endswith("packed")
    assert sum(parameter.numel() for parameter in layer.parameters()) == 0
    assert torch.allclose(layer(x, indices, weights), want, atol=1e-5)
    assert torch.allclose(layer(x[:1], indices[:1], weights[:1]), want[:1], atol=1e-5)
    fast.prepare(layer)  # without packing
    assert all(torch.equal(layer.state_dict()[name], kept) for name, kept in before.items())
    assert [id(parameter) for parameter in layer.parameters()] == known  # an optimiser would still know them
    assert torch.allclose(layer(x, indices, weights), want, atol=1e-5)


@pytest.mark.usefixtures("packable")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda layer: layer.state_dict(), "cannot be saved so; expected fast.release"),
        (lambda layer: copy.deepcopy(layer), "cannot be copied so; expected fast.release"),
        (lambda layer: layer(*problem("some", 3)), "gradients True; these experts are packed"),
        (lambda layer: layer(problem("some", 3)[0].bfloat16(), *problem("some", 3)[1:]), "x: got torch.bfloat16"),
    ],
    ids=["save", "copy", "train", "other dtype"],
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


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("way", [*WAYS, None])
def test_nothing_as_large_as_tokens_times_experts_times_hidden_is_made(way, training):
    if training and way == "loop":
        pytest.skip("the loop records no gradients")
    count, many, hidden = 256, 32, 64
    layer = experts(hidden, 32, many)
    fast.prepare(layer)
    x = torch.randn(count, hidden, requires_grad=training)
    indices, weights = torch.rand(count, many).topk(K).indices, torch.rand(count, K)
    with Largest() as largest, torch.set_grad_enabled(training):
        out = layer(x, indices, weights, way)
        if training:
            out.sum().backward()
    stacked = layer.gate_up_proj.numel()
    longest = int(torch.bincount(indices.flatten()).max())
    assert largest.numel < count * many * hidden / 3
    assert largest.numel <= max(stacked, many * longest * 2 * 32, count * K * hidden)


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
        ({"weights": torch.zeros(4, K + 1)}, r"weights: got shape \(4, 3\)"),
        ({"way": "fast"}, "way: got 'fast'"),
        ({"way": "loop"}, "way: got 'loop', expected one of 'grouped', 'padded'"),
    ],
)
def test_bad_input_is_named(change, message):
    call = {"x": torch.zeros(4, H), "indices": torch.zeros(4, K, dtype=torch.long), "weights": torch.zeros(4, K)}
    with pytest.raises(ValueError, match=message):
        experts()(**call | change)


@pytest.mark.parametrize("sizes", [(0, 4, 4), (4, 0, 4), (4, 4, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="got 0, expected at least 1"):
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
