"""What 16 bits do to gradients and to a training: shares flushed to zero, the course of the loss scale, the loss.

All of it runs float16 for real, by autocast, also on a CPU (where most have no fast float16, so it is slow there). No
number is rounded by hand to stand for it.

Book: ``chapters/performance/training.ipynb``. Source: Mixed Precision Training (arXiv 1710.03740, section 3.2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dslib.architecture.decoder import Decoder, build, preset
from dslib.performance.loss_scaling import LossScaler
from dslib.performance.perplexity import token_losses
from dslib.performance.speed import attention_flops, matrix_flops
from dslib.performance.training import PRECISIONS, next_token_loss, train
from measured.experiments.moe import text_parts
from measured.machine import as_device
from measured.probes import product_rate
from measured.timing import measure

# Precision, and what scales the loss. The last one is what float16 gets without scaling when the loss is a mean over
# 4096 times as many tokens as our batches have: each token's gradient is then so much smaller.
ARMS: dict[str, tuple[str, Callable[[], LossScaler | None]]] = {
    "float32": ("float32", lambda: None),
    "bfloat16": ("bfloat16", lambda: None),
    "float16, dynamic scale": ("float16", LossScaler),
    "float16, no scale": ("float16", LossScaler.fixed),
    "float16, no scale, 4096 times the batch": ("float16", lambda: LossScaler.fixed(2.0**-12)),
}


@dataclass(frozen=True)
class Gradients:
    """Gradients of one batch, divided by the scale again: float32, 1-D."""

    activations: Tensor  # of all linear layers' outputs; they travel through the backward pass in its number format
    weights: Tensor  # of all parameters, where they arrive, in float32


def small_model(hidden_size: int = 64, layers: int = 2, seed: int = 0) -> Decoder:
    """The decoder that is trained here."""
    return build(
        preset("tiny", hidden_size=hidden_size, num_hidden_layers=layers, intermediate_size=2 * hidden_size), seed=seed
    )


def gradients(
    model: nn.Module, inputs: Tensor, targets: Tensor, precision: str = "float32", scale: float = 1.0
) -> Gradients:
    """One forward and backward pass with the loss times ``scale``; the model's own gradients are used and cleared."""
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: found.append(gradient.detach().float().flatten() / scale))

    hooks = [module.register_forward_hook(keep) for module in model.modules() if isinstance(module, nn.Linear)]
    model.zero_grad(set_to_none=True)
    try:
        with torch.autocast(inputs.device.type, dtype=PRECISIONS[precision], enabled=precision != "float32"):
            loss = next_token_loss(model, inputs, targets)
        (loss * scale).backward()
        weights = torch.cat([p.grad.detach().flatten() / scale for p in model.parameters() if p.grad is not None])
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return Gradients(torch.cat(found), weights)


def smallest(precision: str) -> float:
    """The smallest number above zero, subnormal ones included: 2**-24 in float16, 2**-133 in bfloat16."""
    info = torch.finfo(PRECISIONS[precision])
    return info.smallest_normal * info.eps


def flushed(exact: Tensor, rounded: Tensor, precision: str, scale: float = 1.0) -> float:
    """Share of the gradients that are not zero in float32 and were lost for being too small.

    Lost for being too small means: zero in ``rounded``, and below the smallest number that ``precision`` has even after
    scaling. (A few gradients come out as zero in any 16 bits because two rounded numbers cancel; they do not count.)
    """
    alive = exact != 0
    lost = alive & (rounded == 0) & (exact.abs() * scale < smallest(precision))
    return (lost.sum() / alive.sum()).item()


def relative_error(exact: Tensor, rounded: Tensor) -> float:
    """Length of the difference over the length of the exact gradient."""
    return ((rounded - exact).norm() / exact.norm()).item()


def scale_figures(
    model: nn.Module, inputs: Tensor, targets: Tensor, scales: Sequence[float], precision: str = "float16"
) -> list[dict[str, float]]:
    """For each scale a mapping with ``scale``; ``flushed`` and ``flushed_weights``, the shares of gradients lost.

    And ``error`` (relative, of the weights' gradients; None with an overflow) and ``overflowed`` (one is not finite).
    """
    exact, rows = gradients(model, inputs, targets), []
    for scale in scales:
        found = gradients(model, inputs, targets, precision, scale)
        overflowed = not found.weights.isfinite().all().item()
        rows.append(
            {
                "scale": scale,
                "flushed": flushed(exact.activations, found.activations, precision, scale),
                "flushed_weights": flushed(exact.weights, found.weights, precision, scale),
                "error": None if overflowed else relative_error(exact.weights, found.weights),
                "overflowed": overflowed,
            }
        )
    return rows


def precision_runs(
    arms: Sequence[str] = tuple(ARMS), seeds: int = 5, steps: int = 150, hidden_size: int = 64, layers: int = 2,
    batch_size: int = 16, length: int = 32, learning_rate: float = 3e-3, seed: int = 0,
) -> dict[str, dict[str, list[float]]]:  # fmt: skip
    """Train the same models on the same batches in each arm, and measure them on held-out text in float32.

    Returns:
        For each arm ``loss`` (nats a byte, held out), ``skipped`` (steps) and ``scale`` (the last one), one a seed.

    Raises:
        ValueError: an unknown arm, or no seed.
    """
    if unknown := sorted(set(arms) - set(ARMS)):
        raise ValueError(f"arms: got {unknown[0]!r}, expected some of {', '.join(map(repr, ARMS))}")
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, expected at least 1")
    tokens, held_out = text_parts()
    results = {arm: {"loss": [], "skipped": [], "scale": []} for arm in arms}
    for arm, result in results.items():
        precision, scaler = ARMS[arm]
        for run_seed in range(seed, seed + seeds):
            model, told = small_model(hidden_size, layers, run_seed), []
            train(
                model, tokens, steps=steps, batch_size=batch_size, length=length, learning_rate=learning_rate,
                seed=run_seed, precision=precision, scaler=scaler(), on_step=told.append,
            )  # fmt: skip
            result["loss"].append(token_losses(model.eval(), held_out).mean().item())
            result["skipped"].append(sum(step.skipped for step in told))
            result["scale"].append(told[-1].scale)
    return results


def training_step(
    size: str = "1.3b", batch_size: int = 4, length: int = 1024, precisions: Sequence[str] = ("bfloat16", "float32"),
    rounds: int = 5, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """One step of training on the best device, by precision: forward, backward, clipping, AdamW; random tokens.

    Weights and optimiser state are float32 in either case, as :func:`dslib.performance.training.train` keeps them.

    Args:
        size: a preset of the decoder. precisions: of :data:`dslib.performance.training.PRECISIONS`, float16 aside.

    Returns:
        ``parameters``; ``rows``: for each precision ``seconds`` (a Timing of a step), ``tokens_per_second``, ``flops``
        (6 a parameter and token, and attention) and ``share_of_product``: of the rate of a matrix product in that
        format, measured in the same run; or ``failed``.
    """
    device, rows = as_device(None), []
    model = build(preset(size), seed=seed, device=device)
    config, parameters = model.config, list(model.parameters())
    tokens = torch.randint(config.vocab_size, (batch_size, length + 1), generator=torch.Generator().manual_seed(seed))
    inputs, targets = tokens[:, :-1].to(device), tokens[:, 1:].to(device)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")
    work = 3 * batch_size * (matrix_flops(config, length) + attention_flops(config, length))

    def step(precision: str) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "float32"):
            loss = next_token_loss(model, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    for precision in precisions:
        row = {"precision": precision}
        try:
            timing = measure(
                lambda precision=precision: step(precision), device=device, min_runs=rounds, max_runs=rounds
            )
        except Exception as error:  # too little memory, a format the device has not: it is the answer
            rows.append(row | {"failed": (str(error).splitlines() or [type(error).__name__])[0][:160]})
            continue
        rate = product_rate(precision, device, max_seconds=0.5)
        row |= {"seconds": timing, "tokens_per_second": batch_size * length / timing.median, "flops": work}
        rows.append(row | {"share_of_product": rate and work / timing.median / rate})
    return {"parameters": sum(p.numel() for p in parameters), "rows": rows}
