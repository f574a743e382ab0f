"""Muon: matrices with all singular values near 1, the step of torch's own, and which parameters it is for."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dslib.architecture.whole import Whole, tiny_deepseek
from dslib.performance.muon import Muon, Optimizers, matrices_and_rest, orthogonalised, orthogonalising_flops


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (3, 16, 16)])
def test_orthogonalised_keeps_directions_and_evens_out_their_sizes(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x + 5 * x[..., :1] @ x[..., :1, :]  # one direction stands out
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    found = u.mT @ orthogonalised(x) @ v.mT  # in the basis of x: diagonal
    sizes = found.diagonal(dim1=-2, dim2=-1)
    assert s.max() / s.min() > 10
    assert sizes.min() > 0.3 and sizes.max() < 1.3
    torch.testing.assert_close(found, torch.diag_embed(sizes), atol=1e-6, rtol=0)


def test_steps_are_those_of_torchs_own_but_for_its_rounding():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40, 100, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    own = Muon([ours], lr=0.02, weight_decay=0.1, dtype=torch.bfloat16)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(6):
        ours.grad = torch.randn(40, 100, generator=generator)
        theirs.grad = ours.grad.clone()
        own.step(), other.step()
    moved, wanted = (ours - start).detach().flatten(), (theirs - start).detach().flatten()
    assert torch.cosine_similarity(moved, wanted, dim=0) > 0.99
    assert float(moved.norm() / wanted.norm()) == pytest.approx(1, abs=0.02)


def test_a_stack_of_matrices_moves_as_each_by_itself():
    stack = nn.Parameter(torch.randn(3, 8, 20))
    alone = [nn.Parameter(part.detach().clone()) for part in stack]
    together, apart = Muon([stack]), Muon(alone)
    for _ in range(3):
        stack.grad = torch.randn(3, 8, 20)
        for part, gradient in zip(alone, stack.grad, strict=True):
            part.grad = gradient.clone()
        together.step(), apart.step()
    torch.testing.assert_close(stack, torch.stack(tuple(alone)))


def test_embeddings_norms_and_routers_are_left_to_the_other_one():
    model = Whole(tiny_deepseek(num_hidden_layers=2))
    matrices, rest = matrices_and_rest(model)
    names = {id(p): name for name, p in model.named_parameters()}
    left = {names[id(p)] for p in rest}
    assert {"decoder.embed_tokens.weight", "decoder.layers.1.mlp.router.weight", "prediction.enorm.weight"} <= left
    assert all("_proj" in names[id(p)] for p in matrices)
    assert len(matrices) + len(rest) == len(list(model.parameters()))


def test_two_optimisers_are_saved_and_loaded_as_one():
    def pair():
        torch.manual_seed(0)
        a, b = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(5))
        return (a, b), Optimizers(Muon([a]), torch.optim.AdamW([{"params": [b], "times": 0.5}]))

    def run(parameters, optimiser, steps):
        for step in steps:
            for p in parameters:
                p.grad = torch.full_like(p, 1.0 + step) * p.detach()
            optimiser.step()
            optimiser.zero_grad()
        return [p.detach().clone() for p in parameters]

    whole = run(*pair(), range(4))
    first, optimiser = pair()
    run(first, optimiser, range(2))
    again, other = pair()
    for p, q in zip(again, first, strict=True):
        p.data = q.detach().clone()
    other.load_state_dict(optimiser.state_dict())
    assert all(map(torch.equal, run(again, other, range(2, 4)), whole))
    assert [group.get("times") for group in other.param_groups] == [None, 0.5]


BAD = [
    (lambda: Muon([nn.Parameter(torch.zeros(3))]), ("shape (3,)", "matrices")),
    (lambda: Muon([nn.Parameter(torch.zeros(3, 3))], lr=0), ("lr", "above 0")),
    (lambda: Muon([nn.Parameter(torch.zeros(3, 3))], momentum=1), ("momentum", "below 1")),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, words = BAD[case]
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words)


def test_operations_are_those_of_the_products_that_run():
    for shape in ((6, 10), (10, 6), (3, 8, 5)):
        matrices = torch.randn(shape)
        with FlopCounterMode(display=False) as counted:
            orthogonalised(matrices)
        assert orthogonalising_flops([matrices]) == counted.get_total_flops()
