"""Small trainings that ask what the design of a mixture is worth: balance, the size of its experts, and against dense.

All designs learn from the same batches of the same text for the same seed, so that differences can be taken in pairs.
They have equal attention; feed-forward sizes are such that sixteen experts of which two run, sixty-four of a quarter of
that size of which eight run, and the same with one of them shared, have equal total and equal active parameters (but
for the router, which has a row for each expert).

Book: ``chapters/architecture/moe.ipynb``. Sources: DeepSeekMoE (arXiv 2401.06066, section 4) for the comparison at
equal total and active size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dslib.architecture import balance
from dslib.architecture.decoder import Decoder, DecoderConfig, build, count_parameters, preset
from dslib.architecture.sparse_decoder import SparseConfig
from dslib.architecture.sparse_decoder import preset as sparse_preset
from dslib.data.text import moby_dick, slices, to_bytes
from dslib.performance.speed import active_parameters
from dslib.performance.training import next_token_loss, train

TRAINED = 0.9  # share of the text that is trained on; the rest is held out
HELD_OUT = (48, 257)  # slices of the rest, and their bytes


@dataclass(frozen=True)
class Design:
    """A feed-forward network, and what keeps it balanced.

    ``scaled``: the weights of the chosen experts sum to their number, so that the sum of their outputs is as large as
    the output of a dense network of their size; otherwise to 1.
    """

    experts: int = 16  # 0 for a dense network
    active: int = 2  # of them for a token
    shared: int = 0  # that always run, besides
    inner: float = 0.75  # inner size of an expert (or of the dense network) as a share of the hidden size
    scaled: bool = True
    switch: float = 0.0  # weights of the balance losses
    sequence: float = 0.0
    bias: float = 0.0  # speed of the selection bias

    def config(self, hidden_size: int, layers: int) -> DecoderConfig | SparseConfig:
        """The tiny decoder with this feed-forward network; scores are sigmoids, as in V3, whatever the cure."""
        common = {"hidden_size": hidden_size, "num_hidden_layers": layers}
        inner = int(self.inner * hidden_size)
        if not self.experts:
            return preset("tiny", **common, intermediate_size=inner)
        return sparse_preset(
            "tiny-moe", **common, num_experts=self.experts, num_experts_per_tok=self.active,
            moe_intermediate_size=inner, n_shared_experts=self.shared, scoring_func="sigmoid", selection_bias=True,
            routed_scaling_factor=float(self.active if self.scaled else 1),
        )  # fmt: skip


DESIGNS = {
    "no cure": Design(),
    "switch loss": Design(switch=0.01),
    "sequence loss": Design(sequence=0.03),
    "bias": Design(bias=0.005),
    "64, top 8": Design(experts=64, active=8, inner=0.1875, bias=0.005),
    "64, top 8, sum 1": Design(experts=64, active=8, inner=0.1875, bias=0.005, scaled=False),
    "63, top 7, 1 shared": Design(experts=63, active=7, shared=1, inner=0.1875, bias=0.005),
    "dense, active size": Design(experts=0, inner=1.5),
    "dense x 2": Design(experts=0, inner=3.0),
    "dense x 4": Design(experts=0, inner=6.0),
    "dense, total size": Design(experts=0, inner=12.0),
}


def text_parts() -> tuple[Tensor, Tensor]:
    """The novel's bytes: those trained on, 1-D, and slices of the rest, (slices, bytes), both int64."""
    tokens = to_bytes(moby_dick())
    cut = int(TRAINED * len(tokens))
    return tokens[:cut], slices(tokens[cut:], HELD_OUT[1], HELD_OUT[0])


def train_design(
    design: Design, *, steps: int, hidden_size: int = 64, layers: int = 2, batch_size: int = 16, length: int = 32,
    learning_rate: float = 1e-3, seed: int = 0,
) -> tuple[Decoder, list[float]]:  # fmt: skip
    """Build and train one model on the novel; it comes in evaluation mode, with MaxVio at every step.

    That is of the training batch, mean of the layers (dense: empty).
    """
    tokens, _ = text_parts()
    model, trace = build(design.config(hidden_size, layers), seed=seed), []
    weights = {"switch": design.switch, "sequence": design.sequence}

    def loss(model: Decoder, inputs: Tensor, targets: Tensor) -> Tensor:
        value = next_token_loss(model, inputs, targets)
        if not any(weights.values()):
            return value
        return value + balance.total_balance_loss(model, **weights, batch_size=len(inputs))

    def after_step(model: Decoder) -> None:
        found = loads(model)
        trace.extend([sum(stats.max_vio for stats in found) / len(found)] if found else [])
        for layer, stats in zip(balance.moe_layers(model), found, strict=True):
            balance.update_bias(layer.router, stats.counts, design.bias)

    train(
        model, tokens, steps=steps, batch_size=batch_size, length=length, learning_rate=learning_rate, seed=seed,
        loss=loss, after_step=after_step,
    )  # fmt: skip
    return model.eval(), trace


def loads(model: Decoder) -> list[balance.LoadStats]:
    """Load statistics of each mixture in ``model`` for the tokens that it has just seen."""
    return [
        balance.load_statistics(layer.last_routing.indices, layer.router.num_experts)
        for layer in balance.moe_layers(model)
    ]


def train_designs(
    designs: Sequence[str] = tuple(DESIGNS), seeds: int = 3, steps: int = 100, hidden_size: int = 64, layers: int = 2,
    batch_size: int = 16, length: int = 64, learning_rate: float = 1e-2, seed: int = 0,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Train each design with several seeds, ``seed`` the first, and measure it on text that was held out.

    Args:
        designs: names from ``DESIGNS``.

    Returns:
        For each name ``total`` and ``active`` parameters, and a list with one entry a seed of ``loss`` (nats a byte,
        held out), ``max_vio``, ``entropy`` and ``idle`` (held out, mean of the layers; not for dense designs), and
        ``trace``: MaxVio over training, at some fifty steps.

    Raises:
        ValueError: an unknown design, or no seed.
    """
    if unknown := sorted(set(designs) - set(DESIGNS)):
        raise ValueError(f"designs: got {unknown[0]!r}, expected some of {', '.join(map(repr, DESIGNS))}")
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, expected at least 1")
    sizes = {"hidden_size": hidden_size, "layers": layers}
    batches = {"steps": steps, "batch_size": batch_size, "length": length, "learning_rate": learning_rate}
    _, held_out = text_parts()
    results = {}
    for name in designs:
        config = DESIGNS[name].config(**sizes)
        total = count_parameters(build(config, device="meta"))
        result = {"total": total, "active": active_parameters(config)}
        runs = []
        for run_seed in range(seed, seed + seeds):
            model, trace = train_design(DESIGNS[name], **sizes, **batches, seed=run_seed)
            with torch.no_grad():
                logits = model(held_out[:, :-1])
            run = {"loss": F.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()).item()}
            if found := loads(model):
                for figure in ("max_vio", "entropy", "idle"):
                    run[figure] = sum(getattr(stats, figure) for stats in found) / len(found)
                run["trace"] = [round(value, 3) for value in trace[:: max(1, steps // 50)]]
            runs.append(run)
        results[name] = result | {figure: [run[figure] for run in runs] for figure in runs[0]}
    return results


@torch.no_grad()
def choices_by_byte(model: Decoder, tokens: Tensor) -> Tensor:
    """Which experts the mixtures choose for which byte: (B, T) ids -> counts (layers, 256, E), int64."""
    model(tokens)
    counts = []
    for layer in balance.moe_layers(model):
        indices, experts = layer.last_routing.indices, layer.router.num_experts
        cell = (tokens.reshape(-1, 1) * experts + indices).flatten()
        counts.append(torch.bincount(cell, minlength=256 * experts).view(256, experts))
    return torch.stack(counts)


def explained(counts: Tensor) -> float:
    """Share of the uncertainty about the expert that goes when the byte is known: (256, E) counts -> 0 to 1.

    Mutual information over the expert's entropy; a little above 0 by chance too: shuffle the choices to see how much.
    """
    joint = counts.double() / counts.sum()
    expert, byte = joint.sum(0), joint.sum(1)
    entropy = torch.special.entr(expert).sum()
    information = entropy + torch.special.entr(byte).sum() - torch.special.entr(joint).sum()
    return float(information / entropy) if entropy > 0 else 0.0
