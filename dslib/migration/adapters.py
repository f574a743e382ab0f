"""Adapters: a few new numbers beside frozen weights, nothing at the start, and gone without a trace.

*LoRA* adds a product of two thin matrices to a linear layer; a *bottleneck* adds a small network behind any layer::

    y = W x + alpha / r * B A x                 # A (r, in) random, B (out, r) zero
    y = f(x) + up(gelu(down(f(x))))             # down (inner, C) random, up (C, inner) zero

One of the two matrices begins at zero, so that the model computes at first what it did, bit for bit; the other does
not, so that the first step has a gradient. (Both at zero, nothing would ever move.)

An adapter here is no part of the model. It listens to modules (forward hooks) and adds to what they give; so the
model's files, names and classes stay what they are, and everything that reads weights instead of calling a module
(:mod:`dslib.exact`) sees that there is one. It works on any module that is called, ours or another library's::

    adapter = lora(model, r"(q_proj|v_proj)$", rank=8)      # attached, the model frozen
    train(adapter.parameters())
    with adapter.off(): ...                                 # the model as it was
    adapter.remove()

Files: :mod:`~dslib.migration.adapter_files`. Another adapter for each row of a batch:
:mod:`~dslib.migration.multi_lora`.

Shapes: B rows, T tokens, in and out of a layer, r the rank.

Book: ``chapters/migration/adapters.ipynb``. Sources: Houlsby et al. (arXiv 1902.00751) for bottlenecks, LoRA (arXiv
2106.09685, section 4.1) for its start and its scale.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib import check


class LoRA(nn.Module):
    """What is added to one linear layer: (..., in) and the layer's own (..., out) -> (..., out)."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, layer.in_features))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = alpha / rank

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        inner = F.linear(x.to(self.lora_A.dtype), self.lora_A)  # (..., r)
        return y + (self.scale * F.linear(inner, self.lora_B)).to(y.dtype)

    def delta(self) -> Tensor:
        """What merging adds to the layer's weight, (out, in)."""
        return self.scale * self.lora_B @ self.lora_A


class Bottleneck(nn.Module):
    """What is added behind one module: its input, unused, and what it gave, (..., C) -> (..., C)."""

    def __init__(self, size: int, inner: int):
        super().__init__()
        self.down, self.up = nn.Linear(size, inner), nn.Linear(inner, size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.up(F.gelu(self.down(y.to(self.up.weight.dtype)))).to(y.dtype)


class Adapter(nn.Module):
    """Parts beside the modules of a frozen model, each adding to what its module gives; :func:`lora` makes one.

    Attributes:
        model: what it is attached to; None after :meth:`remove`. kind, options: how it was made.
        names: of the model's modules, in the order of ``parts``.
    """

    def __init__(self, model: nn.Module, kind: str, options: dict[str, Any], parts: dict[str, nn.Module]):
        super().__init__()
        self.kind, self.options, self.names = kind, options, list(parts)
        self.parts = nn.ModuleList(parts.values())
        self._base, self._on, self._merged = [model], True, {}  # in a list: the model is no part of the adapter
        self._trained = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in self._trained:
            weight.requires_grad_(False)
        self._listen()
        if floats := [weight for weight in model.parameters() if weight.is_floating_point()]:
            self.to(floats[0].device, floats[0].dtype)

    @property
    def model(self) -> nn.Module | None:
        return self._base[0] if self._base else None

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model as it was, inside the block; also where the adapter is merged."""
        before, merged, self._on = self._on, bool(self._merged), False
        if merged:
            self.unmerge()
        try:
            yield
        finally:
            self._on = before
            if merged:
                self.merge()

    def merge(self) -> None:
        """Add every LoRA to its layer's weight, which then costs nothing; :meth:`unmerge` puts back what was there.

        The layers are then plain ones again, without hooks, and run as fast as before.

        Raises ValueError where it would be wrong: merged already, a bottleneck (it is no matrix), a weight that is
        quantised or shared with another module. Nothing is changed then.
        """
        layers = self._layers()
        if self._merged:
            raise ValueError("merge: this adapter is merged already; a second time would count it twice")
        if self.kind != "lora":
            raise ValueError(f"merge: got a {self.kind}, expected LoRA: what stands behind a nonlinearity is no matrix")
        owners = [id(weight) for module in self.model.modules() for weight in module._parameters.values()]
        for name, layer in layers.items():
            if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
                raise ValueError(f"merge: {name} is a {type(layer).__name__}, expected a layer with a float weight")
            if owners.count(id(layer.weight)) > 1:
                raise ValueError(f"merge: {name} shares its weight with another module, which would change as well")
        for (name, layer), part in zip(layers.items(), self.parts, strict=True):
            self._merged[name] = layer.weight.detach().clone()
            with torch.no_grad():
                layer.weight += part.delta().to(layer.weight.dtype)
        self._deafen()

    def unmerge(self) -> None:
        """Put the weights from before :meth:`merge` back, bit for bit. Raises ValueError if it was not merged."""
        if not self._merged:
            raise ValueError("unmerge: this adapter is not merged")
        layers = self._layers()
        for name, before in self._merged.items():
            with torch.no_grad():
                layers[name].weight.copy_(before)
        self._merged = {}
        self._listen()

    def remove(self) -> None:
        """Take it off the model, which is then as it was before, trainable parts included."""
        if self._merged:
            self.unmerge()
        self._deafen()
        for weight in self._trained:
            weight.requires_grad_(True)
        self._trained, self._base = [], []

    def _listen(self) -> None:
        pairs = zip(self._layers().values(), self.parts, strict=True)
        self._hooks = [layer.register_forward_hook(_listener(self, part), with_kwargs=True) for layer, part in pairs]

    def _deafen(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _layers(self) -> dict[str, nn.Module]:
        if self.model is None:
            raise ValueError("adapter: it has been removed from its model")
        return {name: self.model.get_submodule(name) for name in self.names}


def _listener(adapter: Adapter, part: nn.Module) -> Callable:
    def listen(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not adapter._on or adapter._merged or adapter.model is None:  # the last: in a copy of the model
            return None
        x, first, *rest = args[0] if args else next(iter(kwargs.values())), *_several(output)
        return (part(x, first), *rest) if isinstance(output, tuple) else part(x, first)

    return listen


def _several(output: Any) -> tuple:
    return output if isinstance(output, tuple) else (output,)  # other libraries' attention gives its scores as well


def lora(model: nn.Module, pattern: str, rank: int = 8, alpha: float | None = None, seed: int = 0) -> Adapter:
    """LoRA beside every linear layer of ``model`` whose name ``pattern`` is found in; the model is frozen.

    ``alpha`` is twice the rank by default. Raises ValueError for a pattern that finds nothing, or another module than a
    linear layer, and a rank that is above what a layer has.
    """
    check.whole(1, rank=rank)
    alpha = 2.0 * rank if alpha is None else alpha
    check.above(0, alpha=alpha)
    found = _found(model, pattern)
    for name, layer in found.items():
        if not (hasattr(layer, "in_features") and hasattr(layer, "out_features")):
            raise ValueError(f"pattern: {name} is a {type(layer).__name__}, expected a linear layer")
        if rank > (most := min(layer.in_features, layer.out_features)):
            raise ValueError(f"rank: got {rank}, expected at most {most}, the rank of {name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {name: LoRA(layer, rank, alpha) for name, layer in found.items()}
    return Adapter(model, "lora", {"rank": rank, "alpha": alpha}, parts)


def bottleneck(model: nn.Module, pattern: str, size: int, inner: int = 16, seed: int = 0) -> Adapter:
    """A bottleneck of ``inner`` numbers behind every module whose name ``pattern`` is found in; the model is frozen.

    ``size`` is that of what the modules give: the hidden size behind attention or an MLP (Houlsby's two places are
    ``r"(self_attn|mlp)$"``). Raises ValueError for a pattern that finds nothing.
    """
    check.whole(1, size=size, inner=inner)
    found = _found(model, pattern)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {name: Bottleneck(size, inner) for name in found}
    return Adapter(model, "bottleneck", {"size": size, "inner": inner}, parts)


def _found(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    found = {name: module for name, module in model.named_modules() if name and re.search(pattern, name)}
    if not found:
        some = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:3]
        raise ValueError(f"pattern: {pattern!r} is in no module's name; there are such as {', '.join(some)}")
    return found
