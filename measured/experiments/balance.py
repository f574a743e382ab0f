"""What balance costs and what a lack of it costs: cures of every strength on the same runs, and a layer under load.

The model and its training are those of :mod:`measured.experiments.moe`; only the gate and its cure differ.

Book: ``chapters/architecture/balance.ipynb``. Sources: Switch (arXiv 2101.03961, section 2.2), loss-free balancing
(arXiv 2408.15664), DeepSeek-V3 (arXiv 2412.19437, sections 2.1.2 and 4.2) for the losses, the bias and their weights.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dslib.architecture.balance import load_statistics, moe_layers
from dslib.architecture.experts import Experts
from dslib.architecture.layers import SwiGLU
from dslib.check import between, whole
from dslib.performance.training import next_token_loss
from measured.experiments import moe
from measured.machine import as_device
from measured.timing import compare


@dataclass(frozen=True)
class Gate(moe.Design):
    """Sixteen experts of which two run, a rule that scores them, and what keeps them balanced.

    ``normalised``: divide the two weights by their sum. ``factor``: multiply them by this at the end.
    """

    scoring: str = "sigmoid"
    normalised: bool = True
    factor: float = 2.0

    def config(self, hidden_size: int, layers: int):
        rule = {"scoring_func": self.scoring, "norm_topk_prob": self.normalised, "routed_scaling_factor": self.factor}
        return dataclasses.replace(super().config(hidden_size, layers), **rule)


# All but the last three have V3's gate: sigmoids, made to sum to one.
ARMS = {
    "no cure": Gate(),
    **{f"switch {alpha:g}": Gate(switch=alpha) for alpha in (1e-4, 1e-3, 1e-2, 1e-1)},
    **{f"sequence {alpha:g}": Gate(sequence=alpha) for alpha in (1e-4, 1e-3, 1e-2, 1e-1)},
    **{f"bias {speed:g}": Gate(bias=speed) for speed in (1e-3, 5e-3, 2e-2)},
    "bias 0.001 and sequence 0.0001": Gate(bias=1e-3, sequence=1e-4),  # as V3
    "softmax": Gate(scoring="softmax", normalised=False, factor=1.0),  # scores are weights: DeepSeekMoE, Switch
    "softmax, halved": Gate(scoring="softmax", normalised=False, factor=0.5),  # as the article writes it
    "softmax, sum 1": Gate(scoring="softmax", factor=1.0),  # Mixtral
}


def train_gate(gate: Gate, **settings: Any) -> dict[str, Any]:
    """Train one model and measure it on text that was held out; ``settings`` are those of :func:`moe.train_design`.

    Returns:
        ``loss`` (nats a byte), ``max_vio`` and ``idle`` of each layer, ``within``: MaxVio within a slice of 256 bytes,
        mean of slices and layers, and ``trace``: MaxVio of the batch at every step of training, mean of the layers.
    """
    model, trace = moe.train_design(gate, **settings)
    _, held_out = moe.text_parts()
    with torch.no_grad():
        loss = next_token_loss(model, held_out[:, :-1], held_out[:, 1:]).item()
    found = moe.loads(model)
    loads = [_by_slice(layer.last_routing.indices, len(held_out), gate.experts) for layer in moe_layers(model)]
    within = [(load.amax(1) / load.mean(1) - 1).mean().item() for load in loads]  # load: (slices, E)
    return {
        "loss": loss, "max_vio": [stats.max_vio for stats in found], "idle": [stats.idle for stats in found],
        "within": sum(within) / len(within), "trace": [round(value, 3) for value in trace],
    }  # fmt: skip


def balance_runs(
    arms: Sequence[str] = tuple(ARMS), steps: int = 400, hidden_size: int = 64, layers: int = 2, batch_size: int = 16,
    length: int = 64, learning_rate: float = 1.5e-3, seed: int = 0,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """:func:`train_gate` for several of ``ARMS``: the same first weights and the same batches, those of ``seed``.

    ``trace`` is thinned to some 25 steps. Raises ValueError for an unknown arm.
    """
    if unknown := sorted(set(arms) - set(ARMS)):
        raise ValueError(f"arms: got {unknown[0]!r}, expected some of {', '.join(map(repr, ARMS))}")
    sizes = {"hidden_size": hidden_size, "layers": layers, "batch_size": batch_size, "length": length}
    settings = sizes | {"steps": steps, "learning_rate": learning_rate, "seed": seed}
    runs = {arm: train_gate(ARMS[arm], **settings) for arm in arms}
    return {arm: run | {"trace": run["trace"][:: max(1, steps // 25)]} for arm, run in runs.items()}


def count_loss(longest: int) -> float:
    """Held-out loss, nats a byte, of counting which byte follows the last ``longest - 1``: a baseline without a model.

    Shorter contexts are mixed in as by Witten and Bell: the more kinds of byte follow a context, the more they weigh.
    Raises ValueError for ``longest`` outside 1 to 3 (the table has ``256 ** longest`` entries).
    """
    whole(1, longest=longest)
    between(1, 3, longest=longest)
    text, held_out = moe.text_parts()
    chance = torch.full(held_out.shape, 1 / 256, dtype=torch.float64)  # (slices, bytes)
    for size in range(1, longest + 1):
        places = 256 ** torch.arange(size).flip(0)
        code, here = ((part.unfold(-1, size, 1) * places).sum(-1) for part in (text, held_out))
        counts = torch.bincount(code, minlength=256**size)
        table, context = counts.view(-1, 256), here // 256  # a row for each context; (slices, bytes - size + 1)
        seen, kinds = table.sum(1)[context], (table > 0).sum(1)[context]
        shorter = chance[:, size - 1 :]
        longer = (counts[here] + kinds * shorter) / (seen + kinds)
        chance[:, size - 1 :] = torch.where(seen > 0, longer, shorter)
    return -chance[:, 1:].log().mean().item()


def skewed(tokens: int, num_experts: int, top_k: int, max_vio: float, seed: int = 0) -> Tensor:
    """Choices, int64 (tokens, top_k), with the first ``top_k`` experts equally busy at about this MaxVio, others even.

    Raises ValueError for a MaxVio that no choice can have, or fewer than ``2 * top_k`` experts.
    """
    whole(1, tokens=tokens, top_k=top_k)
    whole(2 * top_k, num_experts=num_experts)
    between(0, num_experts / top_k - 1, max_vio=max_vio)
    busy = round(tokens * top_k * (1 + max_vio) / num_experts)  # tokens that choose the first experts
    others = torch.arange((tokens - busy) * top_k) % (num_experts - top_k) + top_k
    rows = torch.cat([torch.arange(top_k).expand(busy, top_k), others.view(-1, top_k)])
    return rows[torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))]


@torch.no_grad()
def load_cost(
    hidden_size: int = 256, inner: int = 352, num_experts: int = 16, top_k: int = 2, tokens: int = 2048,
    dtype: str = "float32", loads: Sequence[float] = (0.0, 1.0, 3.0, 7.0), rounds: int = 5, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Time one layer of experts, without router, under even and uneven load, on the best device here.

    Returns:
        ``rows``, one for each MaxVio asked for: ``max_vio`` as it came out, ``busiest`` (tokens of the busiest expert),
        and a Timing each of ``together`` (all experts on this device, in one grouped product
        where there is one), ``padded`` (each expert's
        tokens padded to the longest) and ``alone``: the busiest expert by itself, as the slowest of many devices with
        an expert each would have it (sending tokens to and fro is left out).
    """
    torch.manual_seed(seed)
    device, kind = as_device(None), getattr(torch, dtype)
    layer = Experts(num_experts, hidden_size, inner).to(device, kind)
    expert = SwiGLU(hidden_size, inner).to(device, kind)
    x = torch.randn(tokens, hidden_size, device=device, dtype=kind)
    weights = torch.full((tokens, top_k), 1 / top_k, device=device)
    rows, ways = [], {}
    for number, wanted in enumerate(loads):
        indices = skewed(tokens, num_experts, top_k, wanted, seed)
        stats = load_statistics(indices, num_experts)
        busiest, indices = int(stats.counts.max()), indices.to(device)
        rows.append({"max_vio": stats.max_vio, "busiest": busiest})
        ways[number, "together"] = partial(layer, x, indices, weights)
        ways[number, "padded"] = partial(layer, x, indices, weights, "padded")
        ways[number, "alone"] = partial(expert, x[:busiest])
    seconds = compare(ways, rounds=rounds, warmup=1, device=device)
    for number, row in enumerate(rows):
        row |= {way: seconds[number, way] for way in ("together", "padded", "alone")}
    return {"rows": rows, "tokens": tokens}


def _by_slice(indices: Tensor, slices: int, experts: int) -> Tensor:
    """How many choices each expert has in each slice: (slices x length, k) -> float32, (slices, E)."""
    return F.one_hot(indices.view(slices, -1), experts).sum(1).float()
