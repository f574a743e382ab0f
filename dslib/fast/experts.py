"""The experts of a mixture: many SwiGLU networks, and a fast way to run each on the tokens that chose it.

The obvious code, :func:`one_by_one`, loops over tokens and their experts, or multiplies everything by a mask.
:class:`Experts` sorts the (token, expert) pairs by expert instead, so that each expert's tokens lie side by side and
its work is two matrix products on a slice. Nothing of size tokens x experts x hidden ever exists. What remains slow
is that the matrices are many and thin. There are three ways to run them, and :func:`way_to_run` chooses:

* ``"grouped"``: one grouped product for all experts. It has a backward pass, so it is the way to train, and on a GPU it
  never waits for the counts. (A loop that indexes a stacked parameter makes autograd write a gradient the size of *all*
  experts for each one.)
* ``"padded"``: when experts are small, one batched product, each slice padded to the longest.
* ``"loop"``: expert by expert, with the matrix product that suits the processor; :meth:`Experts.pack` makes it faster.

Shapes: N tokens, k experts a token, S = N k pairs, E experts, H hidden size, I intermediate size.

Book: ``chapters/architecture/moe.ipynb``. Sources: MegaBlocks (arXiv 2211.15841) for dropless grouped computation,
SwiGLU (arXiv 2002.05202).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.fast.exact import stamp
from dslib.fast.linear import packed, packed_product, product

# One padded batch pays while the experts' matrices and their slices are small and little of it is padding.
SMALL_MATRIX = 2**18  # weights
SHORT_SLICE = 128  # rows
MOST_PADDING = 2.0  # padded rows for each real one
FREE_ROWS = 16  # so few rows of a slice cost next to nothing: reading the expert's weights takes as long


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
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.num_experts, self.hidden_size, self.intermediate_size = sizes.values()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        for parameter in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(parameter, std=0.02)
        self._packed: tuple[list[Tensor], list[Tensor]] | None = None
        self._packed_from: tuple | None = None

    def pack(self) -> bool:
        """Keep a second copy of the weights, laid out for fast inference on this CPU; returns whether that is possible.

        It doubles the memory, so it is never done unasked. It is used while no gradients are recorded, and let go when
        the weights change or the layer is trained: with ``train()``, or by a pass that records gradients. Only writes
        through ``.data``, or in inference mode, go unseen; call :meth:`unpack` after them.
        """
        gate_up, down = ([packed(matrix) for matrix in stack] for stack in (self.gate_up_proj, self.down_proj))
        if gate_up[0] is None:
            return False
        self._packed, self._packed_from = (gate_up, down), self._state()
        return True

    def unpack(self) -> None:
        """Let the copy that :meth:`pack` made go."""
        self._packed = self._packed_from = None

    def __getstate__(self) -> dict:
        """Copies and files have no packed weights: oneDNN's layout has no storage that could be copied."""
        return self.__dict__ | {"_packed": None, "_packed_from": None}

    def _state(self) -> tuple:
        """Changes whenever a weight is replaced or written to."""
        return stamp(self.gate_up_proj), stamp(self.down_proj)

    def train(self, mode: bool = True) -> "Experts":
        if mode:
            self.unpack()  # fused optimisers write without a trace
        return super().train(mode)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, way: str | None = None) -> Tensor:
        """Run each token through its experts and add up what they give, weighted.

        Args:
            x: (N, H).
            indices: int64, (N, k), from 0 to E; E means that the pair is left out.
            weights: (N, k), any float dtype.
            way: "grouped", "padded" or "loop" (which records no gradients); None chooses the fastest.

        Returns:
            (N, H), in the dtype of x.

        Raises:
            ValueError: shapes or dtypes that do not fit, or an unknown way.
        """
        self._check(x, indices, weights, way)
        if indices.numel() == 0:
            return x * 0
        if self._packed is not None and (torch.is_grad_enabled() or self._packed_from != self._state()):
            self.unpack()
        if len(x) == 1 and x.device.type == "cpu" and way in (None, "loop") and not torch.is_grad_enabled():
            return self._one_token(x, indices, weights.to(x.dtype))
        pairs = Pairs(indices, self.num_experts)
        way = way or way_to_run(self, x, pairs)
        weights = weights.to(x.dtype)
        return {"loop": self._loop, "padded": self._padded, "grouped": self._grouped}[way](x, weights, pairs)

    def _loop(self, x: Tensor, weights: Tensor, pairs: "Pairs") -> Tensor:
        x, inner = x[pairs.tokens], self.intermediate_size  # (S, H)
        out = torch.empty_like(x)
        multiply = product if self._packed is None else packed_product
        gate_up, down = self._packed or (self.gate_up_proj.unbind(), self.down_proj.unbind())
        start = 0
        for expert, count in enumerate(pairs.counts):
            if count:
                stop = start + count
                gate, up = multiply(x[start:stop], gate_up[expert]).split(inner, dim=-1)
                out[start:stop] = multiply(F.silu(gate, inplace=True).mul_(up), down[expert])
                start = stop
        out[start:] = 0  # pairs that are left out
        return pairs.combine(out, weights)

    def _one_token(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The loop for a single token, (1, H): nothing to sort. Decoding spends its time here."""
        onednn_multiplies = x.dtype is not torch.float32 or torch.get_float32_matmul_precision() != "highest"
        if onednn_multiplies and self.gate_up_proj[0].numel() <= SMALL_MATRIX and indices.shape[1] > 2:
            # A call of oneDNN costs more than reading a small expert: copy the few matrices, multiply in two calls.
            chosen, weights = indices[0].clamp(max=self.num_experts - 1), weights * (indices < self.num_experts)
            gate, up = torch.bmm(x.expand(len(chosen), 1, -1), self.gate_up_proj[chosen].mT).chunk(2, dim=-1)
            return weights @ torch.bmm(F.silu(gate) * up, self.down_proj[chosen].mT).squeeze(1)
        multiply = product if self._packed is None else packed_product
        gate_up, down = self._packed or (self.gate_up_proj, self.down_proj)
        rows = []
        for expert in indices[0].tolist():
            if expert == self.num_experts:
                rows.append(torch.zeros_like(x))
                continue
            gate, up = multiply(x, gate_up[expert]).split(self.intermediate_size, dim=-1)
            rows.append(multiply(F.silu(gate, inplace=True).mul_(up), down[expert]))
        return weights @ torch.cat(rows)  # (1, k) x (k, H)

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
        return _weighted_sum(out, where.view_as(pairs.indices), weights * (pairs.indices < self.num_experts))

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

    def _check(self, x: Tensor, indices: Tensor, weights: Tensor, way: str | None) -> None:
        if x.ndim != 2 or x.shape[1] != self.hidden_size:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (tokens, {self.hidden_size})")
        if x.dtype != self.down_proj.dtype:
            raise ValueError(f"x: got {x.dtype}, expected the experts' {self.down_proj.dtype}")
        if indices.dtype != torch.int64 or indices.ndim != 2 or len(indices) != len(x):
            raise ValueError(f"indices: got {indices.dtype} {tuple(indices.shape)}, expected int64 ({len(x)}, top_k)")
        if weights.shape != indices.shape:
            raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected {tuple(indices.shape)}")
        ways = ("grouped", "padded") if torch.is_grad_enabled() else ("grouped", "padded", "loop")
        if way is not None and way not in ways:
            raise ValueError(f"way: got {way!r}, expected one of {', '.join(map(repr, ways))} or None")

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
        return _weighted_sum(rows, places.view_as(self.indices), weights)


def _weighted_sum(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    # embedding_bag looks up, multiplies and adds in one pass, without an (N, k, H) tensor in between.
    return F.embedding_bag(places, rows, mode="sum", per_sample_weights=weights)


def way_to_run(experts: Experts, x: Tensor, pairs: Pairs) -> str:
    """The fastest of the ways for these sizes on this device."""
    # The grouped product reads rows in units of 16 bytes.
    aligned = not any(size * x.element_size() % 16 for size in (experts.hidden_size, experts.intermediate_size))
    grouped = hasattr(F, "grouped_mm") and x.dtype in (torch.float32, torch.bfloat16) and aligned
    if torch.is_grad_enabled() or (grouped and x.device.type == "cuda"):
        return "grouped" if grouped else "padded"
    small = experts.gate_up_proj[0].numel() <= SMALL_MATRIX
    longest = max(pairs.counts)
    rows = max(MOST_PADDING * len(pairs.order), FREE_ROWS * experts.num_experts)
    little = longest <= SHORT_SLICE and experts.num_experts * longest <= rows
    return "padded" if small and little else "loop"
