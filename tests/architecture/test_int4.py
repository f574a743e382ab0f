"""4-bit layers: the packed order, the fast ways against the reference, whole models, and what can go wrong."""

import pytest
import torch
from torch import nn

from dslib.architecture import int4_format
from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.experts import Experts
from dslib.architecture.int4 import FEW_ROWS, Int4Experts, Int4Linear, nbytes, quantize_
from dslib.architecture.int4_format import pack, unpack
from dslib.architecture.sparse_decoder import SparseConfig

KINDS = [("rtn", False), ("rtn", True), ("hqq", False)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(64, 32), (128, 6), (2, 2), (96, 32), (200, 10)])
def test_packing_can_be_undone(shape):
    codes = torch.randint(16, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (shape[0], shape[1] // 2)
    assert torch.equal(unpack(packed), codes)


@pytest.mark.parametrize("method, symmetric", KINDS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bias", [False, True])
def test_the_kernel_equals_the_reference(method, symmetric, group_size, bias):
    layer = Int4Linear.from_linear(nn.Linear(256, 192, bias=bias), group_size, method, symmetric)
    for shape in [(256,), (1, 256), (3, 5, 256), (200, 256)]:
        x = random(*shape).bfloat16()
        with torch.no_grad():
            want = layer.reference(x.float())
            # Unpacked for many rows, the weights are rounded to bfloat16 once more.
            slack = 2**-6 if len(x) > FEW_ROWS and x.ndim == 2 else 2**-7
            torch.testing.assert_close(layer(x).float(), want, rtol=slack, atol=slack * want.std().item())


def test_a_decoder_and_its_experts_are_replaced():
    config = SparseConfig(64, 64, 96, 2, 4, 2, num_experts=4, moe_intermediate_size=64, n_shared_experts=1)
    model = build(config, seed=0).eval()
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids)
        assert quantize_(model) is model
        after = model(ids)
    kinds = {type(module) for module in model.modules()}
    assert {Int4Linear, Int4Experts} <= kinds
    assert Experts not in kinds
    assert not isinstance(model.lm_head, Int4Linear)
    assert 0.01 < (after - before).norm() / before.norm() < 0.3


def test_bytes_are_those_of_the_tensors():
    model = quantize_(build(DecoderConfig(64, 64, 96, 2, 4, 2), device="meta"), 32)
    rows = 2 * (64 * (128 + 64 + 192) + 96 * 64)
    assert nbytes(model) == rows // 2 + rows // 32 * 4 + 4 * (2 * 64 * 64 + 5 * 64)
    assert int4_format.KERNEL_GROUPS == (32, 64, 128, 256)
