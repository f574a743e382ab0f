"""Muon: a step for weight matrices whose directions all count alike.

A gradient of a matrix is usually dominated by a few directions (its largest singular values), and a step along it moves
little else. Muon keeps a momentum as SGD does, and makes it *orthogonal* before the step: every singular value becomes
about 1. No decomposition is needed for that, as a polynomial in X Xᵀ X does it in five rounds of products::

    X = M / |M|                                  # all singular values at most 1
    A = X Xᵀ;  X = a X + (b A + c A A) X         # five times: each singular value s becomes a s + b s³ + c s⁵
    W = W - rate * 0.2 sqrt(max(m, n)) * X       # a step as long as AdamW's usually is, so that one rate serves both

Embeddings, norms and routers stay with AdamW: their rows are looked up or few, and no map between spaces.

Book: ``chapters/architecture/whole.ipynb``. Sources: Muon (kellerjordan.github.io/posts/muon) for the method and its
coefficients, Moonlight (arXiv 2502.16982, section 2.2) for the length of the step; used for Kimi K2 (arXiv 2507.20534).
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dslib import check

_A, _B, _C = 3.4445, -4.7750, 2.0315  # steep at 0, so that small singular values rise quickly; they end near 1


def orthogonalised(matrices: Tensor, rounds: int = 5) -> Tensor:
    """(..., m, n) -> the same shape, float or bfloat16; singular values of each matrix end at about 0.7 to 1.2.

    Not those below a thousandth of the matrix's norm, by which it is divided: five rounds multiply by 3.4445⁵ = 485 at
    most.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the smaller Gram matrix of the two
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        gram = x @ x.mT  # (..., m, m)
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


def orthogonalising_flops(matrices: Iterable[Tensor], rounds: int = 5) -> float:
    """Operations of a step's products: 4 m² n + 2 m³ a round for each (m, n) matrix of each stack, m its smaller side.

    A step has them once, however many tokens it reads.
    """
    total = 0.0
    for stack in matrices:
        *_, rows, columns = stack.shape
        m, n = sorted((rows, columns))
        total += stack.numel() / (m * n) * rounds * (4 * m * m * n + 2 * m**3)
    return total


class Muon(torch.optim.Optimizer):
    """Muon for parameters that are matrices, or stacks of them (of experts: the first dimension counts matrices).

    torch's own takes single matrices only, and always computes in bfloat16, which most CPUs have to emulate.

    Args:
        lr: learning rate. weight_decay: decoupled, as AdamW's. momentum: with Nesterov's look ahead.
        dtype: in which to orthogonalise; bfloat16 is enough where the processor multiplies it quickly.

    Raises:
        ValueError: a parameter with fewer than two dimensions, numbers out of range.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float = 8e-3, weight_decay: float = 0.1, momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        check.above(0, lr=lr)
        check.at_least(0, weight_decay=weight_decay)
        check.below(0, 1, momentum=momentum)
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.ndim < 2:
                raise ValueError(f"parameters: got one of shape {tuple(parameter.shape)}, expected matrices")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                if not (state := self.state[parameter]):
                    state["momentum"] = torch.zeros_like(parameter)
                mean = state["momentum"].lerp_(gradient, 1 - group["momentum"])
                update = orthogonalised(gradient.lerp(mean, group["momentum"]).to(self.dtype))
                length = 0.2 * math.sqrt(max(parameter.shape[-2:]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * length)


class Optimizers:
    """Several optimisers that are stepped, saved and loaded as one."""

    def __init__(self, *members: torch.optim.Optimizer):
        self.members = members

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for member in self.members for group in member.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.members:
            member.zero_grad(set_to_none)

    def step(self) -> None:
        for member in self.members:
            member.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(number): member.state_dict() for number, member in enumerate(self.members)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, member in enumerate(self.members):
            member.load_state_dict(state[str(number)])


def matrices_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """A model's trained parameters for Muon, and for AdamW: embeddings, heads, routers, and all that is no matrix."""
    others = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    others |= {id(p) for name, p in model.named_parameters() if name.endswith(("router.weight", "lm_head.weight"))}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2 and id(p) not in others]
    kept = {id(p) for p in matrices}
    return matrices, [p for p in trained if id(p) not in kept]
