"""The compiled product of a few rows is what float64 says, on every kind of loop, and refuses what it cannot see."""

import pytest
import torch

from dslib.fast.kernels import compiled, rows

pytestmark = [
    pytest.mark.processor,
    pytest.mark.skipif(rows.why_not(torch.zeros(1, 1)) is not None, reason=str(rows.why_not(torch.zeros(1, 1)))),
]


@pytest.mark.parametrize("kind", rows.KINDS)
@pytest.mark.parametrize("dtype", rows.FUNCTIONS)
@pytest.mark.parametrize(
    "n, columns, out",
    [(1, 576, 960), (4, 1536, 577), (8, 100, 67), (3, 33, 7), (2, 1, 1), (1, 31, 3), (0, 8, 5), (2, 8, 15)],
)
def test_equals_the_product_in_float64(n, columns, out, dtype, kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, columns, generator=generator).to(dtype)
    weight = torch.randn(out, columns, generator=generator).to(dtype)
    exact = x.double() @ weight.double().mT
    got = rows.few_rows(x, weight, kind)
    assert got.dtype is dtype
    # Sums in float32, at least as near as torch's own; a bfloat16 result is the exact one rounded, up to that.
    near = 1e-6 * columns**0.5 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(got.double(), exact, atol=near * 4, rtol=near)


def test_rounds_to_the_nearest_and_keeps_what_is_no_number():
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(0)).int()
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e-40, -0.0, 3.4e38])
    values = torch.cat([bits.view(torch.float32), special])
    one = torch.ones(1, 1)
    assert torch.equal(rows.few_rows(one, values[:, None]).nan_to_num(7), (values + 0)[None].nan_to_num(7))
    halves = values.bfloat16()
    got = rows.few_rows(one.bfloat16(), halves[:, None])
    assert torch.equal(got.nan_to_num(7), (halves + 0)[None].nan_to_num(7))
    sums = rows.few_rows(torch.ones(1, 2).bfloat16(), torch.stack([halves, halves.roll(1)], 1))
    assert torch.equal(sums.nan_to_num(7), (halves.float() + halves.roll(1).float()).bfloat16()[None].nan_to_num(7))


@pytest.mark.parametrize(
    "x, weight, words",
    [
        (torch.zeros(1, 3), torch.zeros(2, 4), ["(1, 3)", "(N, 4)"]),
        (torch.zeros(4), torch.zeros(2, 4), ["(4,)", "(N, 4)"]),
        (torch.zeros(1, 4).double(), torch.zeros(2, 4), ["float64", "float32"]),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, words):
    with pytest.raises(ValueError) as error:
        rows.few_rows(x, weight)
    assert all(word in str(error.value) for word in words)


def test_why_not():
    assert "meta" in rows.why_not(torch.zeros(2, 2, device="meta"))
    assert "float64" in rows.why_not(torch.zeros(2, 2).double())
    assert "strides" in rows.why_not(torch.zeros(2, 3).mT)


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found = compiled.load.__wrapped__(rows.SOURCE)
    assert isinstance(found, compiled.NotCompiled) and "no-such-compiler" in str(found)
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text("this is no C++")
    monkeypatch.delenv("CXX")
    assert "cannot be compiled" in str(compiled.load.__wrapped__(wrong))
    assert not list(tmp_path.glob("dslib/*"))
