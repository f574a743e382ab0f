"""Whether a module still computes what its class says: only then may anything read its weights instead of calling it.

What a module does can be changed without its weights: by a subclass or a wrapper (an adapter such as LoRA), by hooks,
by a method set on the one instance or on the class, by a parametrisation, by a bias that was not there. Whoever stands
in for the module would leave all that out, silently. So it asks here, and where anything is unlike the class, the
module runs.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.overrides import TorchFunctionMode


def unlike(module: nn.Module, kinds: Collection[type], bias: bool = True) -> str | None:
    """How ``module`` differs from an unchanged one of ``kinds``; None if it does not.

    A shortcut that :func:`dslib.fast.prepare` put there is no change: it computes the same.

    Args:
        bias: whether the module may have one. A layer made without may have been given one since.
    """
    kind, own = type(module), vars(module).get("forward")
    if kind not in kinds:
        return f"is a {kind.__name__}"
    replaced = own is not None and getattr(own, "stands_for", None) is not module
    if replaced or module._forward_hooks or module._forward_pre_hooks or hooked():
        return "has hooks or a forward of its own"
    if (name := own_method(module)) is not None:
        return f"has a {name} of its own"
    if not as_written(kind):
        return f"is a {kind.__name__}, which is not as it was written"
    # A parameter of another class than Parameter (a tensor subclass) may multiply in another way.
    if any(type(value) is not nn.Parameter for value in module._parameters.values() if value is not None):
        return "has parameters of another class"
    return "has a bias" if not bias and getattr(module, "bias", None) is not None else None


def exactly(module: nn.Module, *kinds: type, bias: bool = True) -> bool:
    """Whether ``module`` is of one of ``kinds``, not of a subclass, and unchanged, see :func:`unlike`."""
    return unlike(module, kinds, bias) is None


def hooked() -> bool:
    """Whether somebody has set hooks for all modules at once; torch's own counters, which only watch, do not count."""
    held = {**torch_modules._global_forward_hooks, **torch_modules._global_forward_pre_hooks}
    return any(not str(getattr(hook, "__module__", None)).startswith("torch.") for hook in held.values())


def own_method(thing: object) -> str | None:
    """The name of a method, other than ``forward``, that was set on this one object; None if there is none."""
    kind = type(thing)
    return next((name for name in vars(thing) if name != "forward" and callable(getattr(kind, name, None))), None)


@cache
def written(kind: type) -> dict[str, Callable]:
    """The methods of a class as they are when this is first asked, which is when whoever stands in for it is loaded."""
    names = {"__call__"} if issubclass(kind, nn.Module) else set()
    for base in kind.__mro__:
        if base is not nn.Module:
            names |= {name for name, value in vars(base).items() if isinstance(value, FunctionType)}
    return {name: getattr(kind, name) for name in names}


def as_written(kind: type) -> bool:
    """Whether nobody has replaced a method of the class since."""
    return all(getattr(kind, name, None) is method for name, method in written(kind).items())


for _kind in (nn.Linear, nn.Embedding):
    written(_kind)


@contextmanager
def as_shapes() -> Iterator[None]:
    """Modules are made on device ``meta``, without first weights: to fill a shape would import torch's compiler."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        named = kwargs or {}
        return named["tensor"] if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **named)
