"""Weights in four bits: sixteen levels for a weight, and a scale for every small group of them.

Decoding reads every weight once a token, so a quarter of the bytes can be up to four times the speed. The weights of a
row are cut into groups of 32, 64 or 128 neighbours. A group keeps one scale and, unless it is symmetric, one zero
point, both in bfloat16; a weight keeps a code q from 0 to 15::

    w = (q - 8) * scale + zero

so ``zero`` is the weight that code 8 stands for. This is what torch's packed kernels compute, and the format is theirs:
the codes lie two to a byte, see :func:`~dslib.architecture.int4.levels.pack`. How scales and zeros are chosen is the
business of :mod:`dslib.architecture.int4.levels`, too.

:class:`Int4Linear` unpacks all weights and multiplies. That saves memory and no time: :mod:`dslib.fast.int4` has the
kernels that unpack next to the multiplication, and ``fast.prepare(model)`` puts them in place.

Book: ``chapters/architecture/int4.ipynb``. Sources: ZeroQuant (arXiv 2206.01861, section 4.1) for groups.
"""

import dataclasses
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.config import DecoderConfig
from dslib.architecture.experts import Experts, Pairs, swiglu
from dslib.architecture.int4.levels import METHODS, check_group_size, pack, unpack
from dslib.architecture.int4.replace import replace_layers
from dslib.check import one_of, whole

ACTIVATIONS = ("bfloat16", "int8")


class Int4Linear(nn.Module):
    """``y = x Wᵀ + b`` with 4-bit weights. For inference: gradients flow to ``x``, not to the weights.

    Buffers, all in ``state_dict``:
        packed: uint8 (out, in / 2), see :func:`pack`.
        scales: bfloat16 (groups, out, 2), scale and zero of each group; (groups, out, 1) if symmetric.
        bias: (out,), or absent.

    Attributes:
        activations: ``"bfloat16"``, or ``"int8"`` where a prepared layer may round a few rows to eight bits.
        dtype: what dtype the weights would have; it follows the model through ``.to()``.

    Args:
        in_features, out_features: even numbers. group_size: weights that share a scale; divides ``in_features``.

    Raises:
        ValueError: sizes that do not fit.
    """

    activations = "bfloat16"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of ``x``: unpack all, multiply.

        Raises:
            ValueError: as :func:`check_input`.
        """
        check_input(x, self.in_features, self.packed.device)
        return F.linear(x, self.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def dequantize(self, dtype=torch.float32) -> Tensor:
        """The weights that the codes stand for, (out, in)."""
        codes = unpack(self.packed).float().unflatten(1, (-1, self.group_size)) - 8  # (out, groups, group_size)
        scales = self.scales.float().transpose(0, 1)  # (out, groups, 1 or 2)
        groups = codes * scales[..., :1]
        if not self.symmetric:
            groups = groups + scales[..., 1:]
        return groups.flatten(1).to(dtype)

    def __init__(self, in_features: int, out_features: int, group_size: int = 32, symmetric: bool = False,
                 bias: bool = False, device=None, dtype=torch.float32):  # fmt: skip
        super().__init__()
        whole(2, in_features=in_features, out_features=out_features)
        check_group_size(in_features, group_size)
        if out_features % 2:
            raise ValueError(f"out_features: got {out_features}, expected an even number of at least 2")
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.symmetric, self.dtype = symmetric, dtype
        self.register_buffer("packed", torch.zeros(out_features, in_features // 2, dtype=torch.uint8, device=device))
        shape = in_features // group_size, out_features, 1 if symmetric else 2
        self.register_buffer("scales", torch.zeros(shape, dtype=torch.bfloat16, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @property
    def weight(self) -> Tensor:
        """As :meth:`dequantize`, in the model's dtype, for code that reads a layer's weights. Made anew each time."""
        return self.dequantize(self.dtype)

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
            method: ``"rtn"``, round to nearest, or ``"hqq"``, see :mod:`dslib.architecture.int4.levels`.

        Raises:
            ValueError: a group size that does not divide, an unknown method, weights that are not finite.
        """
        one_of(METHODS, method=method)
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(f"weight: got {weight.dtype} {tuple(weight.shape)}, expected floats (out, in)")
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

    def _apply(self, fn, recurse=True):
        """Moves with the model, but scales stay in bfloat16, which is what the kernel reads and codes were made for."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype is not scales.dtype:
            self.scales = scales.to(self.scales.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.in_features}, {self.out_features}, groups of {self.group_size}, {kind}"


def check_input(x: Tensor, in_features: int, device: torch.device) -> None:
    """Raise a ValueError unless ``x`` is of shape (..., in_features), of floats, on ``device``."""
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., {in_features})")
    if not x.is_floating_point():
        raise ValueError(f"x: got {x.dtype}, expected floating-point numbers")
    if x.device != device:
        raise ValueError(f"x: got device {x.device}, expected the layer's {device}")


class Int4Experts(nn.Module):
    """The experts of a mixture with 4-bit weights: called as :class:`~dslib.architecture.experts.Experts`.

    Every expert's two matrices are layers of their own, ``gate_up_proj.0`` and so on, as each has its own groups.
    Tokens are sorted by expert, as there, and experts run one after the other.
    """

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
                out.append(down(swiglu(gate_up(part), self.swiglu_limit)))
        return pairs.combine(torch.cat([*out, torch.zeros_like(rows[-1])]), weights.to(x.dtype))

    def __init__(self, experts: Experts, group_size: int = 32, method: str = "rtn", symmetric: bool = False):
        super().__init__()
        self.num_experts, self.hidden_size = experts.num_experts, experts.hidden_size
        self.intermediate_size, self.swiglu_limit = experts.intermediate_size, experts.swiglu_limit
        if len(experts.down_proj) != self.num_experts:
            raise ValueError("experts: packed by fast.prepare, expected fast.release(model) before")
        for name in ("gate_up_proj", "down_proj"):
            stack = (Int4Linear.from_weight(w, group_size, method, symmetric) for w in getattr(experts, name))
            setattr(self, name, nn.ModuleList(stack))


def quantize_(model: nn.Module, group_size: int = 32, method: str = "rtn", symmetric: bool = False,
              skip: Collection[str] = ("embed_tokens", "lm_head"),
              activations: str = "bfloat16") -> nn.Module:  # fmt: skip
    """Replace every linear layer of ``model`` by an :class:`Int4Linear`, in place, and return the model.

    Works for our models and for any other made of ``nn.Linear``, such as transformers' classes. Experts become
    :class:`Int4Experts`; routers, gates of shared experts, norms and embeddings stay. A head that was tied to the
    embedding and is not skipped becomes a 4-bit copy, and the configuration then says that the two are no longer tied.

    In place means in every model that has these layers: a draft made by ``with_layers`` *is* some layers of its target,
    which are quantised with it. That is what sharing promises, one copy of the weights; a draft in four bits beside a
    target in sixteen needs layers of its own, ``quantize_(copy.deepcopy(draft))``.

    Args:
        skip: names of modules to leave alone, with all that is in them: full names, or last parts of a name. One of
            several names is enough.
        activations: ``"int8"`` lets prepared layers take the faster and less exact product of a few rows on a CPU.

    Raises:
        ValueError: as :meth:`Int4Linear.from_weight`, naming the layer; a layer that does something else than its class
            (a subclass, hooks), which would be lost; unknown activations. The model is then unchanged.
    """
    one_of(ACTIVATIONS, activations=activations)

    def make(layer: nn.Linear | Experts) -> nn.Module:
        kind = Int4Experts if isinstance(layer, Experts) else Int4Linear.from_linear
        made = kind(layer, group_size, method, symmetric)
        for module in made.modules():
            if isinstance(module, Int4Linear):
                module.activations = activations
        return made

    names = replace_layers(model, (nn.Linear, Experts), make, {*skip, "shared_expert_gate"})
    if "lm_head" in names and isinstance(getattr(model, "config", None), DecoderConfig):
        model.config = dataclasses.replace(model.config, tie_word_embeddings=False)
    return model


def nbytes(model: nn.Module) -> int:
    """Bytes of everything a model holds: parameters and buffers, scales and zeros among them, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
