"""The quick training step is the plain one: losses, and the gradient of every parameter."""

import pytest
import torch

from dslib.architecture.balance import moe_layers
from dslib.architecture.experts import Pairs
from dslib.architecture.whole import Whole, tiny_deepseek
from dslib.fast.training_step import Filled, HeadLoss, QuickLosses, compiler

SMALL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "kv_lora_rank": 12,
    "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip


def made(**changes):
    torch.manual_seed(0)
    model = Whole(tiny_deepseek(**SMALL | changes))
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.double()


def losses_and_gradients(model, compute, rows, predicted):
    model.zero_grad()
    found = compute(rows, predicted)
    (found.next_token + 0.3 * found.after_next + 0.1 * found.balance).backward()
    loads = [layer.last_routing.indices for layer in moe_layers(model)]
    return found, {name: p.grad.clone() for name, p in model.named_parameters()}, loads


@pytest.mark.parametrize("changes", [{}, {"n_shared_experts": 0}, {"num_experts_per_tok": 6}], ids=str)
@pytest.mark.parametrize("predicted", [1, None])
def test_losses_gradients_and_choices_are_the_plain_ones(changes, predicted, monkeypatch):
    monkeypatch.setattr(HeadLoss, "ROWS", 24)  # several parts, and a short one at the end
    model, rows = made(**changes), torch.randint(60, (3, 14), generator=torch.Generator().manual_seed(1))
    plain, gradients, loads = losses_and_gradients(model, model.losses, rows, predicted)
    quick, others, others_loads = losses_and_gradients(model, QuickLosses(model, compiled=False), rows, predicted)
    for name in ("next_token", "after_next", "balance"):
        # the loss is summed in float32
        torch.testing.assert_close(getattr(quick, name).double(), getattr(plain, name).double(), atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert all(map(torch.equal, loads, others_loads))


def test_rows_are_filled_up_so_that_few_shapes_occur():
    pairs = Pairs(torch.tensor([[0, 2], [2, 0], [2, 3]] * 30), 4)  # 60, 0, 90 and 30 rows
    filled = Filled(pairs)
    assert [(expert, at.stop - at.start) for expert, at in filled.slices] == [(0, 64), (2, 128), (3, 64)]
    assert torch.equal(filled.tokens[filled.rows], pairs.tokens)
    assert torch.equal(filled.tokens[filled.places], torch.arange(90).unsqueeze(1).expand(90, 2))


def test_an_expert_that_nobody_chose_gets_a_gradient_of_zero():
    model, rows = made(), torch.randint(60, (2, 10))
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.e_score_correction_bias[4] = -100.0
    _, gradients, _ = losses_and_gradients(model, QuickLosses(model, compiled=False), rows, None)
    experts = gradients["decoder.layers.1.mlp.experts.down_proj"]
    assert not experts[4].any() and experts[3].any()


@pytest.mark.benchmark
@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_fused_by_a_compiler_it_is_the_same():
    model, rows = made().float(), torch.randint(60, (3, 14), generator=torch.Generator().manual_seed(1))
    plain, gradients, _ = losses_and_gradients(model, model.losses, rows, 1)
    quick, others, _ = losses_and_gradients(model, QuickLosses(model, compiled=True), rows, 1)
    torch.testing.assert_close(quick.next_token, plain.next_token, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-4, rtol=1e-3)
