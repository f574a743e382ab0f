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

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.layers import SwiGLU
from dslib.check import above, one_of, whole


def one_by_one(experts: Sequence[Callable], x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """What a mixture computes, a token and an expert at a time; :class:`Experts` gives the same, sooner.

    (N, H) tokens, (N, k) ids of experts (E for none) and weights -> (N, H).
    """
    y = torch.zeros_like(x)
    for token, chosen in enumerate(indices.tolist()):
        for place, expert in enumerate(chosen):
            if expert < len(experts):
                y[token] += weights[token, place] * experts[expert](x[token])  # (H,)
    return y


class Experts(nn.Module):
    """E SwiGLU networks, stacked by expert in the first dimension (the layout of transformers' classes).

    Parameters:
        gate_up_proj: (E, 2 I, H), rows of the gate first. down_proj: (E, H, I).

    Raises:
        ValueError: a size below 1, a limit that is not above 0.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, swiglu_limit: float | None = None):
        super().__init__()
        whole(1, num_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size)
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.swiglu_limit = swiglu_limit
        if swiglu_limit is not None:
            above(0, swiglu_limit=swiglu_limit)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        for parameter in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(parameter, std=0.02)

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, expert: int) -> Callable[[Tensor], Tensor]:
        """One expert by itself, (..., H) -> (..., H)."""
        gate_up, down = self.gate_up_proj[expert], self.down_proj[expert]
        return lambda x: F.linear(swiglu(F.linear(x, gate_up), self.swiglu_limit), down)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, way: str | Callable | None = None) -> Tensor:
        """Run each token through its experts and add up what they give, weighted: (N, H) -> (N, H), the dtype of x.

        Under autocast the products run in its dtype, whatever the way.

        Args:
            indices: int64, (N, k), from 0 to E; E means that the pair is left out. weights: (N, k), any float dtype.
            way: ``"grouped"`` or ``"padded"``; None is grouped where that is possible. Or a function of sorted rows,
                (S, H), and their :class:`Pairs` that gives what the experts make of the rows, (S, H).

        Raises:
            ValueError: shapes or dtypes that do not fit, or a way that is unknown or that these sizes do not allow.
        """
        check_pairs(self, x, indices, weights)
        dtype = autocast_dtype(x) or x.dtype
        groups = can_group(self, dtype)
        if not callable(way):
            one_of(("grouped", "padded", None) if groups else ("padded", None), way=way)
        if indices.numel() == 0:
            return x * 0
        pairs = Pairs(indices, self.num_experts)  # sorted by expert
        rows = x.to(dtype)[pairs.tokens]  # (S, H)
        if pairs.some_left_out:  # the grouped product writes neither results nor gradients of these rows
            rows = rows.masked_fill(pairs.left_out, 0)
        if callable(way):
            rows = way(rows, pairs)
        elif way == "padded" or not groups:
            rows = self.padded(rows, pairs)
        else:
            ends = pairs.load.cumsum(0, dtype=torch.int32)  # (E,), the row at which each expert's slice ends
            inner = swiglu(F.grouped_mm(rows, self.gate_up_proj.to(dtype).mT, offs=ends), self.swiglu_limit)  # (S, I)
            rows = F.grouped_mm(inner, self.down_proj.to(dtype).mT, offs=ends)  # (S, H)
        return pairs.combine(rows, weights).to(x.dtype)  # y[token] += weight * row

    def padded(self, rows: Tensor, pairs: "Pairs") -> Tensor:
        """Sorted rows through their experts, (S, H) -> (S, H), as a batch of E slices of one length."""
        longest, kept = max([1, *pairs.counts]), pairs.kept
        expert, starts = pairs.experts[:kept], pairs.load.cumsum(0) - pairs.load
        # Row number of each pair in the batch: its expert's slice, and its place there.
        where = expert * longest + torch.arange(kept, device=rows.device) - starts[expert]
        batch = rows.new_zeros(self.num_experts * longest, rows.shape[1]).index_copy(0, where, rows[:kept])
        batch = batch.view(self.num_experts, longest, -1)
        inner = swiglu(torch.bmm(batch, self.gate_up_proj.to(rows.dtype).mT), self.swiglu_limit)  # (E, longest, I)
        out = torch.bmm(inner, self.down_proj.to(rows.dtype).mT).flatten(0, 1)  # (E longest, H)
        return F.pad(out[where], (0, 0, 0, len(rows) - kept))


def swiglu(gate_up: Tensor, limit: float | None = None) -> Tensor:
    """``silu(gate) * up``, (..., 2 I) -> (..., I); with a limit, of gates at most and of ups between -limit and limit.

    DeepSeek-V4 bounds both so that no expert's numbers grow without end.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


class ClampedSwiGLU(SwiGLU):
    """The feed-forward network of a shared expert whose inside has a limit, see :func:`swiglu`."""

    def __init__(self, hidden_size: int, intermediate_size: int, limit: float):
        super().__init__(hidden_size, intermediate_size)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x), self.limit))


class Pairs:
    """The (token, expert) pairs of a call, sorted by expert.

    Attributes:
        order: int64, (S,): the sorted list's entry s is pair number ``order[s]``, counted row by row.
        places: int64, (N, k): where in the sorted list each pair is.
        tokens, experts: int64, (S,): token and expert of each sorted entry.
        load: int64, (E,): pairs of each expert; pairs with index E are at the end of the list and in no load.
        left_out: bool, (S, 1): which entries those are. some_left_out: whether there are any (on a GPU always True:
            asking would wait for the router).
    """

    def __init__(self, indices: Tensor, num_experts: int):
        flat = indices.reshape(-1)
        self.experts, self.order = flat.sort(stable=True)
        self.tokens = self.order.div(indices.shape[1], rounding_mode="floor")
        self.places = torch.empty_like(self.order).scatter_(0, self.order, torch.arange(len(flat), device=flat.device))
        self.places = self.places.view_as(indices)
        self.left_out = (self.experts == num_experts).unsqueeze(1)
        self.some_left_out = flat.device.type == "cuda" or bool(self.left_out.any())
        self.load = count(flat, num_experts + 1)[:num_experts]

    @cached_property
    def counts(self) -> list[int]:
        """``load`` on the CPU; on a GPU this waits for the router."""
        return self.load.tolist()

    @property
    def kept(self) -> int:
        """Pairs that are not left out."""
        return sum(self.counts)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """(S, H) sorted rows, (N, k) weights -> (N, H): each token's rows, weighted and added up.

        All pairs in one pass, without an (N, k, H) tensor in between. Whatever the rows of left-out pairs hold is 0.
        """
        if self.some_left_out:
            rows, weights = rows.masked_fill(self.left_out, 0), weights.masked_fill(self.left_out[self.places, 0], 0)
        return F.embedding_bag(self.places, rows, mode="sum", per_sample_weights=weights.to(rows.dtype))


def count(indices: Tensor, size: int, real: Tensor | None = None) -> Tensor:
    """How often 0 to ``size - 1`` occur in flat int64 ``indices``, int64, (size,); only where ``real``."""
    ones = torch.ones_like(indices) if real is None else real.long()
    try:  # not bincount: on a GPU that would wait for the largest index
        return torch.zeros(size, dtype=torch.int64, device=indices.device).scatter_add_(0, indices, ones)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"indices: expected 0 to {size - 1} (left out), but {error}") from error


def no_autocast(x: Tensor):
    """A context in which operations on x run in the dtypes that they are given."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast has products of x run, as for ``nn.Linear``; None where it is off."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype is not torch.float64
    return torch.get_autocast_dtype(kind) if on else None


def can_group(experts: Experts, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product takes these sizes: it reads rows in units of 16 bytes."""
    aligned = not any(size * dtype.itemsize % 16 for size in (experts.hidden_size, experts.intermediate_size))
    known = dtype is torch.bfloat16 or (dtype is torch.float32 and not torch.compiler.is_compiling())  # cannot trace it
    return hasattr(F, "grouped_mm") and known and aligned


def check_pairs(experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> None:
    """Raise a ValueError unless these tokens, choices and weights fit together and to the experts."""
    if x.ndim != 2 or x.shape[1] != experts.hidden_size:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (tokens, {experts.hidden_size})")
    if x.dtype != experts.down_proj.dtype and autocast_dtype(x) is None:
        raise ValueError(f"x: got {x.dtype}, expected the experts' {experts.down_proj.dtype}")
    if indices.dtype != torch.int64 or indices.ndim != 2 or len(indices) != len(x):
        raise ValueError(f"indices: got {indices.dtype} {tuple(indices.shape)}, expected int64 ({len(x)}, top_k)")
    if weights.shape != indices.shape:
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected {tuple(indices.shape)}")
