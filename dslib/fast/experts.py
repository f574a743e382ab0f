"""A mixture's experts on a CPU, sooner: without gradients, the processor's own products can be chosen one by one.

:class:`~dslib.architecture.experts.Experts` multiplies all slices in one call. What is slow about that is that the
matrices are many and thin. :class:`QuickExperts` stands in for it and chooses among

* one token: nothing to sort, a product for each of its few experts;
* ``"padded"``: when experts are small, one batched product;
* ``"loop"``: expert by expert, with the product that suits the processor, see :mod:`dslib.fast.linear`.

With ``pack``, the weights are moved into the order in which oneDNN reads them (AVX-512 only). They are then in one
place only, so that nothing can go stale, and can be neither read, saved nor trained until they are released.

Shapes: N tokens, k experts a token, S = N k pairs, E experts, H hidden size, I intermediate size.

Book: ``chapters/architecture/moe.ipynb``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.experts import Experts, Pairs, check_pairs
from dslib.check import one_of
from dslib.fast.linear import pack, packed_product, product
from dslib.fast.shortcut import Shortcut, watched

# One padded batch pays while the experts' matrices and their slices are small and little of it is padding.
SMALL_MATRIX = 2**18  # weights
SHORT_SLICE = 128  # rows
MOST_PADDING = 2.0  # padded rows for each real one
FREE_ROWS = 16  # so few rows of a slice cost next to nothing: reading the expert's weights takes as long
NAMES = ("gate_up_proj", "down_proj")


class QuickExperts(Shortcut):
    """The forward pass of :class:`~dslib.architecture.experts.Experts`, by the quickest way for the sizes."""

    kind, what = Experts, "expert by expert, with the processor's own products"

    def __init__(self, module: Experts):
        super().__init__(module)
        self.packed: dict[str, list[Tensor]] = {}

    def __call__(self, x: Tensor, indices: Tensor, weights: Tensor, way: str | None = None) -> Tensor:
        """As :meth:`Experts.forward`; ``way`` may also be ``"loop"``."""
        experts = self.stands_for
        one_of(("grouped", "padded", "loop", None), way=way)
        if self.packed:
            return self._packed_loop(x, indices, weights)
        if watched() or x.device.type != "cpu" or way in ("grouped", "padded") or not self.stands():
            return self.plain(x, indices, weights, way)
        check_pairs(experts, x, indices, weights)
        if indices.numel() == 0:
            return x * 0
        weights, matrices = weights.to(x.dtype), (experts.gate_up_proj, experts.down_proj)
        if len(x) == 1:
            return one_token(x, indices, weights, *matrices)
        pairs = Pairs(indices, experts.num_experts)
        if way != "loop" and way_to_run(experts, pairs) == "padded":
            return self.plain(x, indices, weights, "padded")
        return loop(x, weights, pairs, *matrices)

    def _packed_loop(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        if torch.is_grad_enabled() or (x.dtype, x.device.type) != (self.dtype, "cpu"):
            raise ValueError(
                f"x: got {x.dtype} on {x.device}, gradients {torch.is_grad_enabled()}; these experts are packed for "
                f"{self.dtype} on cpu without gradients: fast.release(model) unpacks them"
            )
        matrices, weights = (self.packed[name] for name in NAMES), weights.to(x.dtype)
        if len(x) == 1:
            return one_token(x, indices, weights, *matrices, multiply=packed_product)
        return loop(x, weights, Pairs(indices, self.stands_for.num_experts), *matrices, multiply=packed_product)

    def why_not(self) -> str | None:
        weight = next(iter(self.packed.values()))[0] if self.packed else self.stands_for.down_proj
        return super().why_not() or (None if weight.device.type == "cpu" else f"is on {weight.device.type}")

    def pack(self) -> bool:
        """Move the weights into oneDNN's order; returns whether that is possible."""
        found = {name: [pack(matrix) for matrix in getattr(self.stands_for, name)] for name in NAMES}
        if found[NAMES[0]][0] is None:
            return False
        self.dtype = self.stands_for.down_proj.dtype
        for name in NAMES:  # empty, but the same parameters, so that an optimiser knows them afterwards
            getattr(self.stands_for, name).data = torch.empty(0, dtype=self.dtype)
        self.stands_for.packed_by = self
        self.hook = self.stands_for.register_state_dict_pre_hook(_refuse_to_save)
        self.packed, self.what = found, "expert by expert, packed"
        return True

    def let_go(self) -> None:
        """Put packed weights back where they were."""
        if not self.packed:
            return
        self.hook.remove()
        for name, stack in self.packed.items():
            getattr(self.stands_for, name).data = torch.stack([matrix.to_dense() for matrix in stack])
        del self.stands_for.packed_by
        self.packed, self.what = {}, QuickExperts.what

    def __getstate__(self) -> dict:
        if self.packed:
            raise ValueError("experts: packed, and cannot be copied so; expected fast.release(model) before")
        return super().__getstate__()


def _refuse_to_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise ValueError(f"{prefix or 'experts'}: packed, and cannot be saved so; expected fast.release(model) before")


def one_token(x: Tensor, indices: Tensor, weights: Tensor, gate_up, down, multiply=product) -> Tensor:
    """A single token, (1, H), through its k experts: nothing to sort. Decoding spends its time here.

    Args:
        gate_up, down: E matrices each, as ``multiply`` takes them.
    """
    chosen = indices[0].tolist()
    if not all(0 <= expert <= len(gate_up) for expert in chosen):
        raise ValueError(f"indices: expected 0 to {len(gate_up)} (left out), but got {chosen}")
    plain = multiply is product
    onednn_multiplies = x.dtype is not torch.float32 or torch.get_float32_matmul_precision() != "highest"
    if plain and onednn_multiplies and gate_up[0].numel() <= SMALL_MATRIX and indices.shape[1] > 2:
        # A call of oneDNN costs more than reading a small expert: copy the few matrices, multiply in two calls.
        at, weights = indices[0].clamp(max=len(gate_up) - 1), weights * (indices < len(gate_up))
        gate, up = torch.bmm(x.expand(len(at), 1, -1), gate_up[at].mT).chunk(2, dim=-1)
        return weights @ torch.bmm(F.silu(gate) * up, down[at].mT).squeeze(1)
    rows = []
    for expert in chosen:
        if expert == len(gate_up):  # left out
            rows.append(torch.zeros_like(x))
            continue
        gate, up = multiply(x, gate_up[expert]).chunk(2, dim=-1)
        rows.append(multiply(F.silu(gate, inplace=True).mul_(up), down[expert]))
    return weights @ torch.cat(rows)  # (1, k) x (k, H)


def loop(x: Tensor, weights: Tensor, pairs: Pairs, gate_up, down, multiply=product) -> Tensor:
    """Expert by expert: (N, H) tokens, (N, k) weights -> (N, H)."""
    x = x[pairs.tokens]  # (S, H)
    out = torch.empty_like(x)
    start = 0
    for expert, count in enumerate(pairs.counts):
        if count:
            stop = start + count
            gate, up = multiply(x[start:stop], gate_up[expert]).chunk(2, dim=-1)
            out[start:stop] = multiply(F.silu(gate, inplace=True).mul_(up), down[expert])
            start = stop
    out[start:] = 0  # pairs that are left out
    return pairs.combine(out, weights)


def way_to_run(experts: Experts, pairs: Pairs) -> str:
    """``"padded"`` or ``"loop"``: the faster of the two for these sizes on a CPU."""
    small = experts.gate_up_proj[0].numel() <= SMALL_MATRIX
    longest = max(pairs.counts)
    rows = max(MOST_PADDING * len(pairs.order), FREE_ROWS * experts.num_experts)
    return "padded" if small and longest <= SHORT_SLICE and experts.num_experts * longest <= rows else "loop"
