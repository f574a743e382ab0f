"""Weights in four bits: sixteen levels for a weight, and a scale for every small group of them.

Decoding reads every weight once a token, so a quarter of the bytes can be up to four times the speed. The weights of a
row are cut into groups of 32, 64 or 128 neighbours. A group keeps one scale and, unless it is symmetric, one zero
point, both in bfloat16; a weight keeps a code q from 0 to 15::

    w = (q - 8) * scale + zero

so ``zero`` is the weight that code 8 stands for. This is what torch's packed kernels compute, and the format is theirs:
the codes lie two to a byte, in the order of :mod:`dslib.fast.int4_kernels`. How scales and zeros
are chosen is the business of :mod:`dslib.architecture.int4`.

Three ways to multiply, and :class:`Int4Linear` picks one:

* a few rows, on a device with a kernel: codes are unpacked in registers, next to the multiplication;
* many rows on a CPU: a slice of the matrix is unpacked to bfloat16, multiplied, and forgotten;
* anything else: :meth:`Int4Linear.dequantize`, then ``F.linear``. This is the reference that the others must equal.

The first two compute with bfloat16 activations and round the result to bfloat16, whatever the dtype of the input. For
up to four rows on a CPU, ``activations="int8"`` chooses :mod:`dslib.fast.int4_rows`: faster, less exact.

Book: ``chapters/architecture/int4.ipynb``. Sources: ZeroQuant (arXiv 2206.01861, section 4.1) for groups.
"""

import dataclasses
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.decoder import DecoderConfig
from dslib.architecture.int4 import METHODS, check_group_size
from dslib.fast import int4_rows
from dslib.fast.exact import stamp
from dslib.fast.experts import Experts, Pairs
from dslib.fast.int4_kernels import KERNEL_GROUPS, cuda_tiles, many_rows, no_kernel, pack, say_once, unpack

ACTIVATIONS = ("bfloat16", "int8")

# More rows than these are multiplied by unpacked weights: unpacking takes as long as that many rows in the kernel.
FEW_ROWS, FEW_ROWS_ON_CUDA = 48, 32


class Int4Linear(nn.Module):
    """``y = x Wᵀ + b`` with 4-bit weights. For inference: gradients flow to ``x``, not to the weights.

    Buffers, all in ``state_dict``:
        packed: uint8 (out, in / 2), see :func:`pack`.
        scales: bfloat16 (groups, out, 2), scale and zero of each group; (groups, out, 1) if symmetric.
        bias: (out,), or absent.

    Where a kernel is used, activations are rounded to bfloat16 before and after, so a float32 input gives a float32
    output of bfloat16 accuracy: a relative error of about 0.3 %, next to about 10 % that four bits cost. With
    ``activations = "int8"``, an attribute that may be set at any time, up to four rows are rounded to eight bits on a
    CPU that has a product for them: 0.6 %, and faster.

    Args:
        in_features, out_features: even numbers. group_size: weights that share a scale; divides ``in_features``.

    Raises:
        ValueError: sizes that do not fit.
    """

    activations = "bfloat16"

    def __init__(self, in_features: int, out_features: int, group_size: int = 32, symmetric: bool = False,
                 bias: bool = False, device=None, dtype=torch.float32):  # fmt: skip
        super().__init__()
        check_group_size(in_features, group_size)
        if out_features < 2 or out_features % 2:
            raise ValueError(f"out_features: got {out_features}, expected an even number of at least 2")
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.symmetric = symmetric
        groups = in_features // group_size
        self.register_buffer("packed", torch.zeros(out_features, in_features // 2, dtype=torch.uint8, device=device))
        scales = torch.zeros(groups, out_features, 1 if symmetric else 2, dtype=torch.bfloat16, device=device)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        # Holds nothing. It follows the model through .to(), and so knows what dtype the weights would have.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        # On a GPU, whose kernel wants another order: a second copy of the codes, made at the first use.
        self.register_buffer("tiles", None, persistent=False)
        self._pairs: Tensor | None = None  # symmetric scales with the zeros that the kernel wants to see
        self._made_from: dict[str, tuple] = {}  # what the two copies were made from, to see when that changes

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int = 32, method: str = "rtn", symmetric: bool = False):
        """The 4-bit version of a linear layer, on the same device. Errors as for :meth:`from_weight`."""
        return cls.from_weight(linear.weight, group_size, method, symmetric, linear.bias)

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight: Tensor, group_size: int = 32, method: str = "rtn", symmetric: bool = False,
                    bias: Tensor | None = None) -> "Int4Linear":  # fmt: skip
        """(out, in) weights, any float dtype -> a layer. On the meta device, shapes only.

        Args:
            method: ``"rtn"``, round to nearest, or ``"hqq"``, see :mod:`dslib.architecture.int4`.

        Raises:
            ValueError: a group size that does not divide, an unknown method, weights that are not finite.
        """
        if method not in METHODS:
            raise ValueError(f"method: got {method!r}, expected one of {', '.join(map(repr, METHODS))}")
        rows, columns = weight.shape
        options = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
        layer = cls(columns, rows, group_size, symmetric, **options)
        if weight.device.type == "meta":
            return layer
        groups = weight.detach().float().unflatten(1, (-1, group_size))  # (out, groups, group_size)
        if not (finite := groups.isfinite().all(-1)).all():
            row, group = (~finite).nonzero()[0].tolist()
            raise ValueError(f"weight: group {group} of row {row} holds NaN or an infinity, expected finite weights")
        found = METHODS[method](groups, symmetric)
        layer.packed = pack(found.codes.flatten(1))
        both = (found.scales,) if symmetric else (found.scales, found.zeros)
        layer.scales = torch.cat(both, dim=-1).transpose(0, 1).contiguous()  # (groups, out, 1 or 2)
        layer.bias = None if bias is None else bias.detach().clone()
        return layer

    def dequantize(self, dtype=torch.float32) -> Tensor:
        """The weights that the codes stand for, (out, in)."""
        codes = unpack(self.packed).float().unflatten(1, (-1, self.group_size)) - 8  # (out, groups, group_size)
        scales = self.scales.float().transpose(0, 1)  # (out, groups, 1 or 2)
        groups = codes * scales[..., :1]
        if not self.symmetric:
            groups = groups + scales[..., 1:]
        return groups.flatten(1).to(dtype)

    @property
    def weight(self) -> Tensor:
        """As :meth:`dequantize`, in the model's dtype, for code that reads a layer's weights. Made anew each time."""
        return self.dequantize(self.like.dtype)

    def why_slow(self, x: Tensor) -> str | None:
        """Why ``x`` has to take the reference path; None if there is a fast one."""
        if x.dtype not in (torch.float32, torch.bfloat16):
            return f"{x.dtype} has no kernel, expected torch.bfloat16 or torch.float32"
        if self.group_size not in KERNEL_GROUPS:
            return f"groups of {self.group_size} have no kernel, expected one of {KERNEL_GROUPS}"
        return no_kernel(x.device, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of ``x``.

        Raises:
            ValueError: a last dimension other than ``in_features``.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., {self.in_features})")
        gradients = torch.is_grad_enabled() and x.requires_grad
        if gradients or x.numel() == 0 or x.device.type == "meta":
            return self.reference(x)
        if (reason := self.why_slow(x)) is not None:
            say_once(f"no fast path, the reference is used: {reason}")
            return self.reference(x)
        rows = x.reshape(-1, self.in_features)
        multiply = self.int8_product() if self.activations == "int8" and len(rows) <= int4_rows.FEW else None
        y = multiply(rows.contiguous()) if multiply is not None else self.product(rows.bfloat16()).to(x.dtype)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], self.out_features)

    def product(self, rows: Tensor) -> Tensor:
        """``x Wᵀ`` on the fast path: bfloat16 (N, in) -> (N, out), without the bias."""
        if rows.device.type == "cpu":
            if len(rows) > FEW_ROWS:
                return many_rows(rows, self.packed, self.scales, self.group_size)
            return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group_size, self.pairs())
        if len(rows) > FEW_ROWS_ON_CUDA:
            return F.linear(rows, self.dequantize(torch.bfloat16))
        if self._changed("tiles", self.packed) or self.tiles is None:
            self.tiles = cuda_tiles(unpack(self.packed))
        return torch.ops.aten._weight_int4pack_mm(rows, self.tiles, self.group_size, self.pairs())

    def int8_product(self) -> Callable[[Tensor], Tensor] | None:
        """The product for a few rows in eight bits, (N, in) -> (N, out) in their dtype; None where there is none."""
        if (reason := int4_rows.why_not(self.packed, self.group_size)) is not None:
            say_once(f"activations stay in bfloat16: {reason}")
            return None
        multiply, args = int4_rows.compiled(), (self.packed, self.pairs(), self.group_size)
        return lambda rows: multiply(rows, *args)

    def row_product(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """One row of ``dtype`` times W as in :meth:`forward`, on a CPU, with all looked up: for loops that count
        microseconds."""
        if self.activations == "int8" and (multiply := self.int8_product()) is not None:
            return multiply
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        args = (self.packed, self.group_size, self.pairs())
        if dtype is torch.bfloat16:
            return lambda row: multiply(row, *args)
        return lambda row: multiply(row.bfloat16(), *args).to(dtype)

    def reference(self, x: Tensor) -> Tensor:
        """What :meth:`forward` must equal: unpack all, multiply. Works anywhere, in any dtype, with gradients."""
        return F.linear(x, self.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def pairs(self) -> Tensor:
        """Scales and zeros as the kernel reads them, (groups, out, 2)."""
        if not self.symmetric:
            return self.scales
        if self._changed("pairs", self.scales) or self._pairs is None:
            self._pairs = F.pad(self.scales, (0, 1))
        return self._pairs

    def _changed(self, copy: str, source: Tensor) -> bool:
        """Whether ``source`` is another than when this was last asked for a copy of it."""
        if torch.compiler.is_compiling():
            return False  # addresses cannot be traced; a compiled step is made for the weights as they are
        before, self._made_from[copy] = self._made_from.get(copy), stamp(source)
        return before != self._made_from[copy]

    def _apply(self, fn, recurse=True):
        """Moves with the model, but scales stay in bfloat16, which is what the kernel reads and codes were made for."""
        scales, self.tiles, self._pairs = self.scales, None, None
        super()._apply(fn, recurse)
        self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.in_features}, {self.out_features}, groups of {self.group_size}, {kind}"


class Int4Experts(nn.Module):
    """The experts of a mixture with 4-bit weights: called as :class:`~dslib.fast.experts.Experts`.

    Every expert's two matrices are layers of their own, ``gate_up_proj.0`` and so on, as each has its own groups.
    Tokens are sorted by expert, as there, and experts run one after the other.
    """

    def __init__(self, experts: Experts, group_size: int = 32, method: str = "rtn", symmetric: bool = False):
        super().__init__()
        self.num_experts, self.hidden_size = experts.num_experts, experts.hidden_size
        self.intermediate_size = experts.intermediate_size
        for name in ("gate_up_proj", "down_proj"):
            stack = (Int4Linear.from_weight(w, group_size, method, symmetric) for w in getattr(experts, name))
            setattr(self, name, nn.ModuleList(stack))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """(N, H) tokens, (N, k) expert ids and weights -> (N, H), as :meth:`Experts.forward`.

        Raises:
            ValueError: shapes that do not fit, ids out of range.
        """
        if x.ndim != 2 or x.shape[1] != self.hidden_size:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (tokens, {self.hidden_size})")
        if weights.shape != indices.shape or len(indices) != len(x):
            shapes = f"{tuple(indices.shape)} and {tuple(weights.shape)}"
            raise ValueError(f"indices, weights: got shapes {shapes}, expected both ({len(x)}, top_k)")
        if indices.numel() == 0:
            return x * 0
        pairs = Pairs(indices, self.num_experts)
        rows = x[pairs.tokens].split([*pairs.counts, len(pairs.order) - pairs.kept])  # by expert; last, those left out
        out = []
        for part, gate_up, down in zip(rows, self.gate_up_proj, self.down_proj, strict=False):
            if len(part):
                gate, up = gate_up(part).chunk(2, dim=-1)
                out.append(down(F.silu(gate) * up))
        return pairs.combine(torch.cat([*out, torch.zeros_like(rows[-1])]), weights.to(x.dtype))


def quantize_(model: nn.Module, group_size: int = 32, method: str = "rtn", symmetric: bool = False,
              skip: Collection[str] = ("embed_tokens", "lm_head"),
              activations: str = "bfloat16") -> nn.Module:  # fmt: skip
    """Replace every linear layer of ``model`` by an :class:`Int4Linear`, in place, and return the model.

    Works for our models and for any other made of ``nn.Linear``, such as transformers' classes. Experts become
    :class:`Int4Experts`; routers, norms and embeddings stay. A head that was tied to the embedding and is not skipped
    becomes a 4-bit copy, and the configuration then says that the two are no longer tied.

    Args:
        skip: names of modules to leave alone, with all that is in them: full names, or last parts of a name.
        activations: ``"bfloat16"``, or ``"int8"`` for the faster and less exact product of a few rows on a CPU.

    Raises:
        ValueError: as :meth:`Int4Linear.from_weight`, naming the layer; unknown activations. The model is then
            unchanged.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations: got {activations!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    made = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(part in skip for part in parts) or any(".".join(parts[: n + 1]) in skip for n in range(len(parts))):
            continue
        try:
            if isinstance(module, nn.Linear):
                made[name] = Int4Linear.from_linear(module, group_size, method, symmetric)
            elif isinstance(module, Experts):
                made[name] = Int4Experts(module, group_size, method, symmetric)
        except ValueError as error:
            raise ValueError(f"{name}: {error} (or name it in skip)") from error
    for name, layer in made.items():
        for module in layer.modules():
            if isinstance(module, Int4Linear):
                module.activations = activations
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    if "lm_head" in made and isinstance(getattr(model, "config", None), DecoderConfig):
        model.config = dataclasses.replace(model.config, tie_word_embeddings=False)
    return model


def nbytes(model: nn.Module) -> int:
    """Bytes of everything a model holds: parameters and buffers, scales and zeros among them, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
