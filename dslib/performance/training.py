"""One training loop for all the small models of the book: AdamW, warm-up and cosine decay, clipped gradients.

The two hooks are what mixtures of experts need: ``loss`` may add balance terms to the loss of the next token, and
``after_step`` is where a selection bias is moved.

Book: ``chapters/architecture/moe.ipynb``; the training chapter will build on it. Sources: AdamW (arXiv 1711.05101),
cosine decay (arXiv 1608.03983).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.data.text import random_batch

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats: (B, T) inputs and (B, T) targets, int64 -> scalar."""
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())


def train(
    model: nn.Module, tokens: Tensor, *, steps: int, batch_size: int = 16, length: int = 64,
    learning_rate: float = 3e-3, seed: int = 0, loss: Loss = next_token_loss,
    after_step: Callable[[nn.Module], None] | None = None, weight_decay: float = 0.1, warmup: float = 0.1,
    clip: float = 1.0,
) -> list[float]:  # fmt: skip
    """Train ``model`` in place on random places of ``tokens``. Two models see the same batches for the same seed.

    Args:
        model: (B, T) ids -> (B, T, vocabulary) logits; anything, if ``loss`` knows how to call it.
        tokens: int64, 1-D.
        seed: of the batches. The model's weights are drawn by whoever built it.
        loss: called as ``loss(model, inputs, targets)`` with two (B, T) tensors on the model's device; a scalar.

    The other arguments, what is returned and what is raised: see :func:`fit`. Raises ValueError as well for tokens of
    another shape or dtype and for too short a text.
    """
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens: got {tokens.dtype} of shape {tuple(tokens.shape)}, expected int64, 1-D")
    _at_least_one(batch_size=batch_size, length=length)
    generator = torch.Generator().manual_seed(seed)
    return fit(
        model, lambda step: random_batch(tokens, length, batch_size, generator), steps=steps, loss=loss,
        learning_rate=learning_rate, after_step=after_step, weight_decay=weight_decay, warmup=warmup, clip=clip,
    )  # fmt: skip


def fit(
    model: nn.Module, batch: Callable[[int], tuple[Tensor, ...]], *, steps: int, loss: Callable[..., Tensor],
    learning_rate: float = 3e-3, after_step: Callable[[nn.Module], None] | None = None, weight_decay: float = 0.1,
    warmup: float = 0.1, clip: float = 1.0,
) -> list[float]:  # fmt: skip
    """Train ``model`` in place on batches of any kind.

    Args:
        model: put into training mode and afterwards back into the mode it had. Frozen parameters stay as they are.
        batch: called as ``batch(step)``, 0 to ``steps - 1`` in order; the tensors of one batch.
        loss: called as ``loss(model, *tensors)``, those moved to the model's device; a scalar.
        learning_rate: the highest; reached after ``warmup`` (a share of the steps) along a line, then along a cosine
            down to a tenth.
        after_step: called as ``after_step(model)`` when the optimiser has moved the weights, gradients off.
        weight_decay: of matrices; vectors (norms, biases) have none.
        clip: largest norm of all gradients together.

    Returns:
        The loss at every step, before its update.

    Raises:
        ValueError: numbers out of range, nothing to train, a loss that is no scalar.
        FloatingPointError: the loss is NaN or infinite, naming the step. The weights are those before that step.
    """
    _at_least_one(steps=steps)
    _check({"learning_rate": learning_rate, "clip": clip}, weight_decay, warmup)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: got no parameter that requires a gradient, expected at least one")
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), fused=True)
    device, was_training, losses = parameters[0].device, model.training, []
    model.train()
    try:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * _schedule(step, steps, warmup)
            value = loss(model, *(part.to(device) for part in batch(step)))
            if value.ndim:
                raise ValueError(f"loss: got a tensor of shape {tuple(value.shape)}, expected a scalar")
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"loss: got {losses[-1]} at step {step} of {steps}, expected a finite number")
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            if after_step is not None:
                with torch.no_grad():
                    after_step(model)
    finally:
        model.train(was_training)
    return losses


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the highest learning rate at ``step``: up along a line, then down along a cosine to a tenth."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, steps - 1 - rise)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _at_least_one(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")


def _check(positive: dict, weight_decay: float, warmup: float) -> None:
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: got {value}, expected a positive number")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay: got {weight_decay}, expected 0 or more")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup: got {warmup}, expected a share of the steps, at least 0 and below 1")
