"""Experts trained apart and then mixed, against experts trained together: same seed model, same tokens, same size.

Branch-Train-MiX takes a dense model, trains a copy of it on each domain without the copies ever hearing of each other,
makes their feed-forward networks the experts of one mixture, averages everything else, and trains the mixture a little
so that the router learns. Gradients are isolated for most of the way. The joint training that it is held against makes
its experts from copies of the same dense model and trains the mixture from there on.

Book: ``chapters/performance/training.ipynb``. Source: Branch-Train-MiX (arXiv 2403.07816, section 3); the joint
baseline is sparse upcycling (arXiv 2212.05055).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dslib.architecture.balance import moe_layers, total_balance_loss
from dslib.architecture.decoder import Decoder, DecoderConfig, build, count_parameters, preset
from dslib.architecture.sparse_decoder import SparseConfig, SparseDecoder
from dslib.architecture.sparse_decoder import preset as sparse_preset
from dslib.data.domains import domains
from dslib.data.text import random_batch, slices
from dslib.performance.perplexity import token_losses
from dslib.performance.speed import active_parameters, matrix_parameters
from dslib.performance.training import fit, next_token_loss

ARMS = ("isolated, then mixed", "isolated to the end", "joint", "joint, equal compute", "joint from scratch")
HELD_OUT = (32, 257)  # slices of each domain, and their bytes
BALANCE = 0.01


def dense_config(hidden_size: int = 64, layers: int = 2) -> DecoderConfig:
    """The seed model, and each branch of it."""
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": layers, "intermediate_size": 2 * hidden_size}
    return preset("tiny", **sizes)


def mixed_config(dense: DecoderConfig, experts: int) -> SparseConfig:
    """The mixture: ``experts`` feed-forward networks of the dense model's size, two of which work on a token."""
    return sparse_preset(
        "tiny-moe", hidden_size=dense.hidden_size, num_hidden_layers=dense.num_hidden_layers, num_experts=experts,
        num_experts_per_tok=2, moe_intermediate_size=dense.intermediate_size,
    )  # fmt: skip


@torch.no_grad()
def mix(models: Sequence[Decoder], seed: int = 0) -> SparseDecoder:
    """One mixture from dense models of equal shape: each one's feed-forward networks become an expert.

    All other weights are averaged. The routers are new, at random from ``seed``. Mixing copies of one model gives a
    mixture that computes what the model computes, because a token's two weights sum to 1. Fewer than two models, or
    models of different shapes, are a ``ValueError``.
    """
    if len(models) < 2 or any(model.config != models[0].config for model in models):
        raise ValueError(f"models: got {len(models)} of them, expected at least two, all of one configuration")
    mixture = build(mixed_config(models[0].config, len(models)), seed=seed)
    states = [model.state_dict() for model in models]
    for name, value in mixture.state_dict().items():
        if ".mlp.experts." in name:
            piece = name.replace(".mlp.experts.", ".mlp.") + ".weight"
            value.copy_(torch.stack([state[piece] for state in states]))
        elif ".mlp.router." not in name:
            value.copy_(torch.stack([state[name] for state in states]).mean(0))
    return mixture


def run(model: Decoder, texts: dict[str, Tensor], steps: int, seed: int, **options: Any) -> Decoder:
    """Train on ``texts``, every batch with the same number of rows from each; mixtures with a balance loss."""
    rows, length = options.pop("batch_size") // len(texts), options.pop("length")
    generator, sparse = torch.Generator().manual_seed(seed), any(True for _ in moe_layers(model))

    def batch(_: int) -> tuple[Tensor, ...]:
        pairs = [random_batch(tokens, length, rows, generator) for tokens in texts.values()]
        return tuple(torch.cat(side) for side in zip(*pairs, strict=True))

    def loss(model: Decoder, inputs: Tensor, targets: Tensor) -> Tensor:
        value = next_token_loss(model, inputs, targets)
        return value + total_balance_loss(model, switch=BALANCE) if sparse else value

    if steps:
        fit(model, batch, steps=steps, loss=loss, **options)
    return model


def isolation_runs(
    arms: Sequence[str] = ARMS, seeds: int = 5, seed_steps: int = 100, steps: int = 300, mix_steps: int = 100,
    hidden_size: int = 64, layers: int = 2, batch_size: int = 12, length: int = 64, learning_rate: float = 2e-3,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Train each arm with several seeds, ``seed`` the first, and measure it on held-out text of each domain.

    Args:
        seed_steps: of the dense seed model on all domains, the same for every arm but the one from scratch.
        steps: of the branches together (a third on each domain), or of the joint mixture.
        mix_steps: of the mixture at the end; in "isolated to the end" only its routers move.
        batch_size: rows of a batch; a multiple of three.

    Every arm sees ``(seed_steps + steps + mix_steps) * batch_size * length`` tokens, but for "joint, equal compute",
    which stops when it has done as many operations as the isolated arms.

    Returns:
        For each arm ``total`` and ``active`` parameters, ``tokens``, ``flops`` of its matrix products (6 for each
        parameter and token), ``loss`` (domain -> one mean a seed, nats a byte) and ``routing`` (domain -> share of the
        choices that fall on each expert, mean of layers and seeds; the experts are novel, code, manual, seed model).

    Raises:
        ValueError: an unknown arm, no seed, a batch that does not divide.
    """
    if unknown := sorted(set(arms) - set(ARMS)):
        raise ValueError(f"arms: got {unknown[0]!r}, expected some of {', '.join(map(repr, ARMS))}")
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, expected at least 1")
    texts, kept = domains()
    if batch_size % len(texts):
        raise ValueError(f"batch_size: got {batch_size}, expected a multiple of {len(texts)}, one share a domain")
    held_out = {name: slices(tokens, HELD_OUT[1], HELD_OUT[0]) for name, tokens in kept.items()}
    dense = dense_config(hidden_size, layers)
    sparse = mixed_config(dense, len(texts) + 1)
    small, large = matrix_parameters(dense), matrix_parameters(sparse)
    options = {"batch_size": batch_size, "length": length, "learning_rate": learning_rate}
    shorter = round(steps * small / large)
    plan = {  # steps of the dense model, and of the mixture
        "isolated, then mixed": (seed_steps + steps, mix_steps),
        "isolated to the end": (seed_steps + steps, mix_steps),
        "joint": (seed_steps, steps + mix_steps),
        "joint, equal compute": (seed_steps, shorter + mix_steps),
        "joint from scratch": (0, seed_steps + steps + mix_steps),
    }
    sizes = {"total": count_parameters(build(sparse, device="meta")), "active": active_parameters(sparse)}
    results = {
        arm: sizes
        | {"tokens": batch_size * length * sum(plan[arm])}
        | {"flops": 6 * batch_size * length * (plan[arm][0] * small + plan[arm][1] * large)}
        | {"loss": {name: [] for name in texts}, "routing": {name: torch.zeros(len(texts) + 1) for name in texts}}
        for arm in arms
    }
    for run_seed in range(seed, seed + seeds):
        seed_model = run(build(dense, seed=run_seed), texts, seed_steps, 1000 + run_seed, **options)
        branches = [seed_model]
        if any(arm.startswith("isolated") for arm in arms):
            branches = [
                run(_copy(seed_model), {name: texts[name]}, steps // len(texts), 2000 + run_seed, **options)
                for name in texts
            ] + branches
        for arm in arms:
            if arm == "joint from scratch":
                model = build(sparse, seed=run_seed)
            else:
                model = mix(branches if arm.startswith("isolated") else [seed_model] * (len(texts) + 1), run_seed)
            if arm == "isolated to the end":
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(".router." in name)
            run(model, texts, plan[arm][1], 3000 + run_seed, **options).eval()
            for name, tokens in held_out.items():
                results[arm]["loss"][name].append(token_losses(model, tokens).mean().item())
                results[arm]["routing"][name] += choices(model, tokens) / seeds
    for result in results.values():
        result["routing"] = {name: share.tolist() for name, share in result["routing"].items()}
    return results


@torch.no_grad()
def choices(model: SparseDecoder, tokens: Tensor) -> Tensor:
    """Share of the choices that fall on each expert for (B, T) ids, mean of the layers: (E,)."""
    model(tokens)
    shares = [
        torch.bincount(layer.last_routing.indices.flatten(), minlength=layer.router.num_experts).float()
        / layer.last_routing.indices.numel()
        for layer in moe_layers(model)
    ]
    return torch.stack(shares).mean(0)


def _copy(model: Decoder) -> Decoder:
    twin = build(model.config)
    twin.load_state_dict(model.state_dict())
    return twin
