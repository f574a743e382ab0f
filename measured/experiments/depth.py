"""Small trainings that ask what early exit is worth: with exits that were trained, and with exits that were not.

Book: ``chapters/architecture/depth.ipynb``. Source: CALM (arXiv 2207.07061) for the measure, loss against mean depth.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dslib.architecture.decoder import Decoder, build, preset
from dslib.architecture.depth import ExitRule, early_exit, exit_loss, exit_losses
from dslib.performance.training import next_token_loss, train
from measured.experiments.moe import text_parts

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
BATCHES = (1, 2, 4, 8, 16, 32)


def train_exits(
    trained: bool, *, seed: int = 0, steps: int = 120, layers: int = 8, min_layers: int = 2, hidden_size: int = 64,
    batch_size: int = 16, length: int = 32, learning_rate: float = 2e-3,
) -> Decoder:  # fmt: skip
    """A small decoder trained on the novel, at all of its exits (``trained``) or at its last layer only."""
    rule = ExitRule(0.5, min_layers)
    shape = {"num_hidden_layers": layers, "hidden_size": hidden_size, "intermediate_size": 2 * hidden_size}
    model = build(preset("tiny", **shape), seed=seed)

    def loss(model: Decoder, inputs: Tensor, targets: Tensor) -> Tensor:
        return exit_loss(model, inputs, targets, rule) if trained else next_token_loss(model, inputs, targets)

    tokens, _ = text_parts()
    batches = {"steps": steps, "batch_size": batch_size, "length": length, "learning_rate": learning_rate}
    train(model, tokens, **batches, seed=seed, loss=loss)
    return model.eval()


@torch.no_grad()
def exit_figures(model: Decoder, tokens: Tensor, min_layers: int, thresholds: Sequence[float]) -> dict[str, Any]:
    """What early exit does on some text, (B, T + 1) ids.

    Returns:
        ``by_exit``: mean loss at each exit, in nats. ``curve``: for each threshold, mean depth and mean loss.
        ``harder``: for each threshold, the mean depth of the tokens in each quarter of the text, from what the whole
        model finds easiest (by its loss) to what it finds hardest, and Spearman's correlation of loss and depth (0 if
        all depths are the same). ``waiting``: for each threshold, the mean depth of the deepest of 1, 2, … 32 tokens.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    losses = exit_losses(model, inputs, targets, ExitRule(0.5, min_layers))  # (exits, B, T)
    last = losses[-1].flatten()
    quarters = last.argsort().chunk(4)
    figures = {"by_exit": losses.mean((1, 2)).tolist(), "curve": [], "harder": [], "waiting": []}
    shuffled = torch.randperm(len(last), generator=torch.Generator().manual_seed(0))
    for threshold in thresholds:
        result = early_exit(model, inputs, ExitRule(threshold, min_layers))
        depths = result.depths.flatten().float()
        loss = F.cross_entropy(result.logits.flatten(0, 1), targets.flatten()).item()
        figures["curve"].append([result.mean_depth, loss])
        by_quarter = [depths[quarter].mean().item() for quarter in quarters]
        figures["harder"].append({"quarters": by_quarter, "correlation": spearman(last, depths)})
        figures["waiting"].append([_deepest(depths[shuffled], size) for size in BATCHES])
    return figures


def exit_runs(
    seeds: int = 3, steps: int = 600, layers: int = 8, min_layers: int = 2, hidden_size: int = 128, length: int = 64,
    learning_rate: float = 1.5e-3, seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """:func:`exit_figures` on held-out text for ``"all exits"`` and ``"last layer only"``, one entry a seed.

    Raises:
        ValueError: no seed.
    """
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, expected at least 1")
    _, held_out = text_parts()
    sizes = {"layers": layers, "min_layers": min_layers, "hidden_size": hidden_size}
    results = {}
    for name, trained in (("all exits", True), ("last layer only", False)):
        results[name] = []
        for run_seed in range(seed, seed + seeds):
            model = train_exits(
                trained, seed=run_seed, steps=steps, length=length, learning_rate=learning_rate, **sizes
            )
            results[name].append(exit_figures(model, held_out, min_layers, THRESHOLDS))
    return results


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of two 1-D tensors, ties at their mean rank; 0 if one of them does not vary."""
    from scipy.stats import spearmanr

    varied = all(bool((part != part[0]).any()) for part in (x, y))
    return float(spearmanr(x.numpy(), y.numpy()).statistic) if varied else 0.0


def _deepest(depths: Tensor, size: int) -> float:
    """Mean over groups of ``size`` tokens of the largest depth in the group."""
    groups = len(depths) // size
    return depths[: groups * size].view(groups, size).amax(1).mean().item()
