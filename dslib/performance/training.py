"""One training loop for all the small models of the book: AdamW, warm-up and cosine decay, clipped gradients.

It accumulates gradients over parts of a batch, computes in 16 bits where asked (:mod:`~dslib.performance.loss_scaling`
says what float16 needs for that), and goes on from a checkpoint as if it had never stopped
(:mod:`~dslib.performance.resume`). The hooks are what mixtures of experts need: ``loss`` may add balance terms to the
loss of the next token, and ``after_step`` is where a selection bias is moved.

Book: ``chapters/performance/training.ipynb`` takes it apart, with these two and :mod:`~dslib.performance.pretraining`.
Sources: AdamW (arXiv 1711.05101), cosine decay (arXiv 1608.03983), mixed precision (arXiv 1710.03740).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib import check
from dslib.data.text import random_batch
from dslib.performance.loss_scaling import LossScaler
from dslib.performance.resume import Checkpoint, fingerprint

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
IGNORED = -100  # a target that is not there
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TrainingStep:
    """What ``on_step`` is told."""

    number: int  # 0 to steps - 1
    loss: float  # before the update
    learning_rate: float
    gradient_norm: float  # of all gradients together, before clipping; NaN where they overflowed
    scale: float  # what the loss was multiplied by
    skipped: bool  # whether an overflow left the weights as they were


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats: (B, T) inputs and (B, T) targets, int64 -> scalar. Targets of -100 do not count."""
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def real_targets(inputs: Tensor, targets: Tensor) -> int:
    """Over how many terms :func:`next_token_loss` takes its mean."""
    return int((targets != IGNORED).sum())


def train(
    model: nn.Module, tokens: Tensor, *, steps: int, batch_size: int = 16, length: int = 64, seed: int = 0,
    loss: Loss = next_token_loss, **options: Any,
) -> list[float]:  # fmt: skip
    """Train ``model`` in place on random places of ``tokens``. Two models see the same batches for the same seed.

    Args:
        model: (B, T) ids -> (B, T, vocabulary) logits; anything, if ``loss`` knows how to call it.
        tokens: int64, 1-D.
        seed: of the batches. The model's weights are drawn by whoever built it.
        loss: called as ``loss(model, inputs, targets)`` with two (B, T) tensors on the model's device; a scalar.
        options: every other argument of :func:`fit`, such as ``learning_rate``.

    Returns and raises what :func:`fit` does; ValueError as well for tokens of another shape or dtype, or too few.
    """
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens: got {tokens.dtype} of shape {tuple(tokens.shape)}, expected int64, 1-D")
    check.whole(1, batch_size=batch_size, length=length)
    generator = torch.Generator().manual_seed(seed)
    if options.get("checkpoint") is not None:
        made = {"batch_size": batch_size, "length": length, "seed": seed, "tokens": fingerprint(tokens)}
        options["settings"] = made | options.get("settings", {})
    return fit(
        model, lambda step: random_batch(tokens, length, batch_size, generator), steps=steps, loss=loss,
        generator=generator, **options,
    )  # fmt: skip


def fit(
    model: nn.Module, batch: Callable[[int], tuple[Tensor, ...]], *, steps: int, loss: Callable[..., Tensor],
    learning_rate: float = 3e-3, after_step: Callable[[nn.Module], None] | None = None, weight_decay: float = 0.1,
    warmup: float = 0.1, clip: float = 1.0, accumulate: int = 1, counts: Callable[..., int] | None = None,
    precision: str = "float32", scaler: LossScaler | None = None, on_step: Callable[[TrainingStep], Any] | None = None,
    checkpoint: str | Path | None = None, every: int = 100, generator: torch.Generator | None = None,
    settings: dict[str, Any] | None = None, optimizer: Any = None,
) -> list[float]:  # fmt: skip
    """Train ``model`` in place on batches of any kind.

    Args:
        model: put into training mode and afterwards back, part by part, into the modes it had. Frozen parameters stay
            as they are.
        batch: called as ``batch(step)``, 0 to ``steps - 1`` in order; the tensors of one batch.
        loss: called as ``loss(model, *tensors)``, those on the model's device; a scalar, the mean over the batch.
        learning_rate: the highest; reached after ``warmup`` (a share of the steps) along a line, then along a cosine
            down to a tenth.
        after_step: called as ``after_step(model)`` when the optimiser has moved the weights, gradients off. With
            ``accumulate``, what a module remembers of its last call (a mixture's ``last_routing``) is of the last part
            only: a rule that needs the load of the whole batch has to add it up in ``loss``.
        weight_decay: of matrices; vectors (norms, biases) have none.
        clip: largest norm of all gradients together.
        accumulate: cut each batch along its first dimension into so many equal parts, run them one after another and
            add up their gradients. The step is that of the whole batch, in the memory of one part. (Terms that are no
            mean over rows, such as balance losses, are then taken from each part.)
        counts: called as ``counts(*tensors)`` for each part: over how many terms ``loss`` takes its mean, where that
            differs from part to part (padding). A part then weighs as much as it has terms. For
            :func:`next_token_loss` that is known.
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"``, in which autocast runs the matrix products. Weights,
            their gradients and the optimiser stay in float32.
        scaler: for ``"float16"``; a new :class:`~dslib.performance.loss_scaling.LossScaler` by default. It is changed.
        on_step: called with a :class:`TrainingStep` after each. If it gives True, the run is saved and ends here.
        checkpoint: file to write after every ``every`` steps and at the end. If it is there already, the run goes on
            from it, bit for bit as if it had not stopped (same machine, threads and torch).
        generator: what ``batch`` draws from, kept in the checkpoint, as torch's, Python's and numpy's global ones are.
        settings: more numbers and texts that a resumed run has to share.
        optimizer: instead of AdamW, with ``weight_decay`` as it was made; a group's rate is the schedule's times its
            ``"times"``, where it has such an entry.

    Returns the loss at every step, before its update; those before a resumption included.

    Raises:
        ValueError: numbers out of range, nothing to train, a loss that is no scalar, a batch that cannot be cut into
            equal parts, a checkpoint that is damaged or of a run with other settings.
        FloatingPointError: the loss, or the norm of the gradients, is NaN or infinite, naming the step. The weights
            are those before that step. An overflow in float16 is no error unless no scale helps.
    """
    check.whole(1, steps=steps, accumulate=accumulate, every=every)
    check.above(0, learning_rate=learning_rate, clip=clip)
    check.at_least(0, weight_decay=weight_decay)
    check.below(0, 1, warmup=warmup)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: got no parameter that requires a gradient, expected at least one")
    scaler = _scaler(precision, scaler)
    if counts is None and loss is next_token_loss:
        counts = real_targets
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if optimizer is None:
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), fused=True)
    device, modes, losses, kept = parameters[0].device, {part: part.training for part in model.modules()}, [], None
    if checkpoint is not None:
        made = {"steps": steps, "learning_rate": learning_rate, "weight_decay": weight_decay, "warmup": warmup}
        made |= {"clip": clip, "accumulate": accumulate, "precision": precision}
        made |= {"loss": _name(loss), "counts": counts and _name(counts)}
        made |= {f"scaler.{name}": value for name, value in (scaler.settings() if scaler else {}).items()}
        held = {"model": model, "optimizer": optimizer, "scaler": scaler, "generator": generator}
        kept = Checkpoint(checkpoint, made | (settings or {}), **held)
        losses = kept.restore()
    model.train()
    try:
        for step in range(len(losses), steps):
            rate = learning_rate * _schedule(step, steps, warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("times", 1.0)
            optimizer.zero_grad(set_to_none=True)
            parts = _parts([part.to(device) for part in batch(step)], accumulate, counts)
            scale = scaler.scale if scaler else 1.0
            losses.append(_backward(model, loss, parts, precision, scale, f"at step {step} of {steps}"))
            skipped, norm = bool(scaler and scaler.unscale(parameters)), math.nan
            if not skipped:
                norm = nn.utils.clip_grad_norm_(parameters, clip).item()
                if not math.isfinite(norm):
                    raise FloatingPointError(f"gradients: got norm {norm} at step {step} of {steps}, expected a number")
                optimizer.step()
                if after_step is not None:
                    with torch.no_grad():
                        after_step(model)
            if scaler:
                scaler.update(skipped)
            told = TrainingStep(step, losses[-1], rate, norm, scale, skipped)
            last = (on_step is not None and on_step(told) is True) or step + 1 == steps
            if kept and ((step + 1) % every == 0 or last):
                kept.save(losses)
            if last:
                break
    finally:
        for part, mode in modes.items():
            part.training = mode
    return losses


Part = tuple[float, tuple[Tensor, ...]]  # its share in the mean of the batch, its tensors


def _parts(tensors: list[Tensor], accumulate: int, counts: Callable[..., int] | None) -> list[Part]:
    if accumulate == 1:
        return [(1.0, tuple(tensors))]
    rows = len(tensors[0])
    if rows % accumulate:
        raise ValueError(f"accumulate: got {accumulate}, expected a divisor of the batch's {rows} rows")
    parts = list(zip(*(tensor.split(rows // accumulate) for tensor in tensors), strict=True))
    if counts is None:
        return [(1 / accumulate, part) for part in parts]
    terms = [int(counts(*part)) for part in parts]
    if min(terms) < 0 or not sum(terms):
        raise ValueError(f"counts: got {terms}, expected numbers of terms, at least one in all")
    return [(count / sum(terms), part) for count, part in zip(terms, parts, strict=True) if count]


def _backward(
    model: nn.Module, loss: Callable[..., Tensor], parts: list[Part], precision: str, scale: float, where: str
) -> float:
    """Add the gradients of all parts, times ``scale``, and return the loss of the whole batch."""
    total = 0.0
    for share, part in parts:
        device = part[0].device.type
        with torch.autocast(device, dtype=PRECISIONS[precision], enabled=precision != "float32"):
            value = loss(model, *part)
        if value.ndim:
            raise ValueError(f"loss: got a tensor of shape {tuple(value.shape)}, expected a scalar")
        total += share * value.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"loss: got {total} {where}, expected a finite number")
        # A factor of 1 is left out, so that the loss keeps its own precision.
        (value if share * scale == 1 else value.float() * (share * scale)).backward()
    return total


def _scaler(precision: str, scaler: LossScaler | None) -> LossScaler | None:
    check.one_of(PRECISIONS, precision=precision)
    if precision == "float16":
        return scaler or LossScaler()
    if scaler is not None:
        raise ValueError(f"scaler: got one for precision {precision!r}, expected None; only 'float16' needs it")
    return None


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the highest learning rate at ``step``: up along a line, then down along a cosine to a tenth."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, steps - 1 - rise)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _name(function: Callable) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
