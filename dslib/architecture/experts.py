"""The experts of a mixture: many SwiGLU networks, each run on the tokens that chose it.

The obvious code, :func:`one_by_one`, loops over tokens and their experts. :class:`Experts` sorts the (token, expert)
pairs by expert instead, so that each expert's tokens lie side by side and its work is two matrix products on a slice.
Nothing of size tokens x experts x hidden ever exists.

All slices are multiplied in one call: a *grouped* product where torch has one for the format, else a batch in which
each slice is *padded* to the longest. (A loop that indexes a stacked parameter would make autograd write a gradient the
size of *all* experts for each one.) What is quicker on a CPU, where gradients are not wanted, is in
:mod:`dslib.fast.experts`.

Shapes: N tokens, k experts a token, S = N k pairs, E experts, H hidden size, I intermediate size.

Book: ``chapters/architecture/moe.ipynb``. Sources: MegaBlocks (arXiv 2211.15841) for dropless grouped computation,
SwiGLU (arXiv 2002.05202).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.check import one_of, whole


def one_by_one(experts: "Experts", x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """What a mixture computes, a token and an expert at a time; :class:`Experts` gives the same, sooner.

    Args:
        x: (N, H). indices: int64, (N, k), E for none. weights: (N, k).

    Returns:
        (N, H).
    """
    y = torch.zeros_like(x)
    for token, chosen in enumerate(indices.tolist()):
        for place, expert in enumerate(chosen):
            if expert < experts.num_experts:
                gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)  # (I,) each
                y[token] += weights[token, place] * (experts.down_proj[expert] @ (F.silu(gate) * up))  # (H,)
    return y


class Experts(nn.Module):
    """E SwiGLU networks, stacked by expert in the first dimension (the layout of transformers' classes).

    Parameters:
        gate_up_proj: (E, 2 I, H), rows of the gate first. down_proj: (E, H, I).

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        whole(1, **sizes)
        self.num_experts, self.hidden_size, self.intermediate_size = sizes.values()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        for parameter in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, way: str | None = None) -> Tensor:
        """Run each token through its experts and add up what they give, weighted.

        Args:
            x: (N, H).
            indices: int64, (N, k), from 0 to E; E means that the pair is left out.
            weights: (N, k), any float dtype.
            way: ``"grouped"`` or ``"padded"``; None is grouped where that is possible.

        Returns:
            (N, H), in the dtype of x.

        Raises:
            ValueError: shapes or dtypes that do not fit, or an unknown way.
        """
        check_pairs(self, x, indices, weights)
        one_of(("grouped", "padded", None), way=way)
        if indices.numel() == 0:
            return x * 0
        pairs, weights = Pairs(indices, self.num_experts), weights.to(x.dtype)
        grouped = way == "grouped" or (way is None and can_group(self, x))
        return (self._grouped if grouped else self._padded)(x, weights, pairs)

    def _grouped(self, x: Tensor, weights: Tensor, pairs: "Pairs") -> Tensor:
        ends, rows = pairs.load.cumsum(0, dtype=torch.int32), x[pairs.tokens]
        left_out = None
        if x.device.type == "cuda" or pairs.kept < len(rows):
            # Rows past the last end are passed over by the product: its results there, and in the backward pass its
            # gradients, are whatever was in memory. Zeros at both ends keep that out.
            left_out = (torch.arange(len(rows), device=x.device) >= ends[-1]).unsqueeze(-1)
            rows = rows.masked_fill(left_out, 0)
        gate, up = F.grouped_mm(rows, self.gate_up_proj.mT, offs=ends).chunk(2, dim=-1)
        out = F.grouped_mm(F.silu(gate) * up, self.down_proj.mT, offs=ends)
        if left_out is not None:
            out = out.masked_fill(left_out, 0)
        return pairs.combine(out, weights)

    def _padded(self, x: Tensor, weights: Tensor, pairs: "Pairs") -> Tensor:
        longest = max([1, *pairs.counts])
        # Row number of each sorted pair in the padded batch: its expert's block, and its place there.
        starts = pairs.load.cumsum(0) - pairs.load
        place = torch.arange(pairs.kept, device=x.device) - starts.repeat_interleave(pairs.load)
        row = pairs.experts[: pairs.kept] * longest + place
        batch = x.new_zeros(self.num_experts * longest, x.shape[1]).index_copy(0, row, x[pairs.tokens[: pairs.kept]])
        batch = batch.view(self.num_experts, longest, -1)
        gate, up = torch.bmm(batch, self.gate_up_proj.mT).chunk(2, dim=-1)
        out = torch.bmm(F.silu(gate) * up, self.down_proj.mT).flatten(0, 1)  # (E longest, H)
        where = row.new_full((len(pairs.order),), 0)
        where[pairs.order[: pairs.kept]] = row  # pairs left out keep row 0; their weight is 0
        return weighted_sum(out, where.view_as(pairs.indices), weights * (pairs.indices < self.num_experts))

    def extra_repr(self) -> str:
        return f"{self.num_experts} x SwiGLU({self.hidden_size}, {self.intermediate_size})"


class Pairs:
    """The (token, expert) pairs of a call, sorted by expert.

    Attributes:
        indices: int64, (N, k), as given.
        order: int64, (S,): the sorted list's entry s is pair number ``order[s]``, counted row by row.
        tokens, experts: int64, (S,): token and expert of each sorted entry.
        load: int64, (E,): pairs of each expert; pairs with index E are at the end of the list and in no load.
    """

    def __init__(self, indices: Tensor, num_experts: int):
        flat = indices.reshape(-1)
        self.indices = indices
        self.experts, self.order = flat.sort(stable=True)
        self.tokens = self.order.div(indices.shape[1], rounding_mode="floor")
        # Not bincount: on a GPU it would wait for the largest index.
        load = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
        try:
            self.load = load.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"indices: expected 0 to {num_experts} (left out), but {error}") from error
        self._counts: list[int] | None = None

    @property
    def counts(self) -> list[int]:
        """``load`` on the CPU; on a GPU this waits for the router."""
        if self._counts is None:
            self._counts = self.load.tolist()
        return self._counts

    @property
    def kept(self) -> int:
        """Pairs that are not left out."""
        return sum(self.counts)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """(S, H) sorted rows, (N, k) weights -> (N, H), each token's rows weighted and added up."""
        places = torch.empty_like(self.order)  # where in the sorted list each pair is
        places[self.order] = torch.arange(len(self.order), device=self.order.device)
        return weighted_sum(rows, places.view_as(self.indices), weights)


def weighted_sum(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    # embedding_bag looks up, multiplies and adds in one pass, without an (N, k, H) tensor in between.
    return F.embedding_bag(places, rows, mode="sum", per_sample_weights=weights)


def can_group(experts: Experts, x: Tensor) -> bool:
    """Whether torch's grouped product takes these sizes: it reads rows in units of 16 bytes."""
    aligned = not any(size * x.element_size() % 16 for size in (experts.hidden_size, experts.intermediate_size))
    return hasattr(F, "grouped_mm") and x.dtype in (torch.float32, torch.bfloat16) and aligned


def check_pairs(experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> None:
    """Raise a ValueError unless these tokens, choices and weights fit together and to the experts."""
    if x.ndim != 2 or x.shape[1] != experts.hidden_size:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (tokens, {experts.hidden_size})")
    if x.dtype != experts.down_proj.dtype:
        raise ValueError(f"x: got {x.dtype}, expected the experts' {experts.down_proj.dtype}")
    if indices.dtype != torch.int64 or indices.ndim != 2 or len(indices) != len(x):
        raise ValueError(f"indices: got {indices.dtype} {tuple(indices.shape)}, expected int64 ({len(x)}, top_k)")
    if weights.shape != indices.shape:
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected {tuple(indices.shape)}")
