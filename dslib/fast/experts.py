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

from functools import partial

import torch
from torch import Tensor, nn

from dslib.architecture.experts import Experts, Pairs, check_pairs, count, swiglu
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
        if self.packed and any(len(getattr(experts, name)) for name in NAMES):
            self.let_go()  # somebody has put other weights in place of those that were moved
        if self.packed:
            return self._packed(x, indices, weights)
        one_of(("grouped", "padded", "loop", None), way=way)
        if watched() or x.device.type != "cpu" or way in ("grouped", "padded") or not self.stands():
            return self.plain(x, indices, weights, way)
        check_pairs(experts, x, indices, weights)
        run = partial(loop, gate_up=experts.gate_up_proj, down=experts.down_proj, limit=experts.swiglu_limit)
        if len(x) == 1:
            return one_token(x, indices, weights, **run.keywords)
        if way is None and small(experts, indices):
            return self.plain(x, indices, weights, "padded")
        return self.plain(x, indices, weights, run)

    def _packed(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        check_pairs(self.stands_for, x, indices, weights)
        if torch.is_grad_enabled() or (x.dtype, x.device.type) != (self.dtype, "cpu"):
            raise ValueError(
                f"x: got {x.dtype} on {x.device}, gradients {torch.is_grad_enabled()}; these experts are packed for "
                f"{self.dtype} on cpu without gradients: fast.release(model) unpacks them"
            )
        gate_up, down = (self.packed[name] for name in NAMES)
        how = {"gate_up": gate_up, "down": down, "limit": self.stands_for.swiglu_limit, "multiply": packed_product}
        with torch.autocast("cpu", enabled=False):
            if len(x) == 1:
                return one_token(x, indices, weights, **how)
            return self.plain(x, indices, weights, partial(loop, **how))

    def why_not(self) -> str | None:
        weight = next(iter(self.packed.values()))[0] if self.packed else self.stands_for.down_proj
        return super().why_not() or (None if weight.device.type == "cpu" else f"is on {weight.device.type}")

    @torch.inference_mode(False)  # a parameter that is given a tensor of inference mode could not be trained again
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

    @torch.inference_mode(False)
    def let_go(self) -> None:
        """Put packed weights back where they were, unless others are there by now."""
        if not self.packed:
            return
        self.hook.remove()
        for name, stack in self.packed.items():
            if not len(parameter := getattr(self.stands_for, name)):
                parameter.data = torch.stack([matrix.to_dense() for matrix in stack]).to(parameter)
        del self.stands_for.packed_by
        self.packed, self.what = {}, QuickExperts.what

    def __getstate__(self) -> dict:
        if self.packed:
            raise ValueError("experts: packed, and cannot be copied so; expected fast.release(model) before")
        return super().__getstate__()


def _refuse_to_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise ValueError(f"{prefix or 'experts'}: packed, and cannot be saved so; expected fast.release(model) before")


def one_token(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up, down, limit: float | None = None, multiply=product
) -> Tensor:
    """A single token, (1, H), through its k experts: nothing to sort. Decoding spends its time here.

    Args:
        gate_up, down: E matrices each, as ``multiply`` takes them.
    """
    chosen, experts = indices[0].tolist(), len(gate_up)
    if not all(0 <= expert <= experts for expert in chosen):
        raise ValueError(f"indices: expected 0 to {experts} (left out), but got {chosen}")
    if experts in chosen:  # pairs that are left out
        kept = indices[0] < experts
        chosen, indices, weights = indices[0, kept].tolist(), indices[:, kept], weights[:, kept]
    if not chosen:
        return torch.zeros_like(x)
    weights = weights.to(x.dtype)
    onednn_multiplies = x.dtype is not torch.float32 or torch.get_float32_matmul_precision() != "highest"
    if multiply is product and onednn_multiplies and gate_up[0].numel() <= SMALL_MATRIX and len(chosen) > 2:
        # A call of oneDNN costs more than reading a small expert: copy the few matrices, multiply in two calls.
        at = indices[0]
        inner = swiglu(torch.bmm(x.expand(len(at), 1, -1), gate_up[at].mT), limit)  # (k, 1, I)
        return weights @ torch.bmm(inner, down[at].mT).squeeze(1)
    rows = [multiply(swiglu(multiply(x, gate_up[expert]), limit), down[expert]) for expert in chosen]  # (1, H) each
    return weights @ torch.cat(rows)  # (1, k) x (k, H)


def loop(rows: Tensor, pairs: Pairs, gate_up, down, limit: float | None = None, multiply=product) -> Tensor:
    """Sorted rows through their experts, expert by expert: (S, H) -> (S, H)."""
    out = torch.zeros_like(rows)
    start = 0
    for expert, load in enumerate(pairs.counts):
        if load:
            stop = start + load
            inner = swiglu(multiply(rows[start:stop], gate_up[expert]), limit)  # (load, I)
            out[start:stop] = multiply(inner, down[expert])
            start = stop
    return out


def small(experts: Experts, indices: Tensor) -> bool:
    """Whether one padded batch is quicker than a loop on a CPU for these sizes."""
    if experts.gate_up_proj[0].numel() > SMALL_MATRIX:
        return False
    longest = int(count(indices.flatten(), experts.num_experts + 1)[:-1].max())
    rows = max(MOST_PADDING * indices.numel(), FREE_ROWS * experts.num_experts)
    return longest <= SHORT_SLICE and experts.num_experts * longest <= rows
