"""Whether a module still computes what its class says: only then may anything read its weights instead of calling it.

What a module does can be changed without its weights: by a subclass or a wrapper (an adapter such as LoRA), by hooks,
by a ``forward`` set on the one instance, by a parametrisation, by a bias that was not there. Whoever stands in for the
module would leave all that out, silently. So it asks here, and where anything is unlike the class, the module runs.
"""

from collections.abc import Collection

from torch import nn


def hooks(module: nn.Module) -> int:
    """How many things were set on this one module that run with its ``forward`` or in place of it.

    Hooks for all modules at once do not count: counters and profilers set them to watch. Neither does a shortcut that
    :func:`dslib.fast.prepare` put there: it computes the same.
    """
    own = vars(module).get("forward")
    replaced = own is not None and getattr(own, "stands_for", None) is not module
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + replaced


def own_method(module: nn.Module) -> str | None:
    """The name of a method, other than ``forward``, that was set on this one module; None if there is none."""
    return next(
        (name for name in vars(module) if name != "forward" and callable(getattr(type(module), name, None))), None
    )


def unlike(module: nn.Module, kinds: Collection[type], bias: bool = True) -> str | None:
    """How ``module`` differs from an unchanged one of ``kinds``; None if it does not.

    Args:
        bias: whether the module may have one. A layer made without may have been given one since.
    """
    if type(module) not in kinds:
        return f"is a {type(module).__name__}"
    if hooks(module):
        return "has hooks or a forward of its own"
    if (own := own_method(module)) is not None:
        return f"has a {own} of its own"
    # A parameter of another class than Parameter (a tensor subclass) may multiply in another way.
    if any(type(value) is not nn.Parameter for value in module._parameters.values() if value is not None):
        return "has parameters of another class"
    if not bias and getattr(module, "bias", None) is not None:
        return "has a bias"
    return None


def exactly(module: nn.Module, *kinds: type, bias: bool = True) -> bool:
    """Whether ``module`` is of one of ``kinds``, not of a subclass, and unchanged, see :func:`unlike`."""
    return unlike(module, kinds, bias) is None


def first_unlike(
    model: nn.Module, kinds: Collection[type], biased: Collection[str] | None = None, skip: Collection[str] = ()
) -> str | None:
    """The first module inside ``model`` that is :func:`unlike` all ``kinds``, and how; None if there is none.

    Args:
        biased: last parts of the names of modules that may have a bias; None: all may. skip: first parts of names to
            leave out.
    """
    for name, module in model.named_modules():
        if name and name.partition(".")[0] not in skip:
            found = unlike(module, kinds, bias=biased is None or name.rpartition(".")[2] in biased)
            if found is not None:
                return f"{name} {found}"
    return None
