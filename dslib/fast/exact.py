"""Whether a module still computes what its class says: only then may a shortcut read its weights instead of calling it.

What a module does can be changed without its weights: by a subclass or a wrapper (an adapter such as LoRA), by hooks,
by a ``forward`` set on the one instance, by a parametrisation, by a bias that was not there. A shortcut that stands
for the module would leave all that out, silently. So it asks here, and where anything is unlike the class, the
modules run.
"""

from collections.abc import Collection

from torch import Tensor, nn


def hooks(module: nn.Module) -> int:
    """How many things were set on this one module that run with its ``forward`` or in place of it."""
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))


def exactly(module: nn.Module, *kinds: type, bias: bool = True) -> bool:
    """Whether ``module`` is of one of ``kinds``, not of a subclass, and unchanged.

    Hooks for all modules at once do not count: counters and profilers set them to watch.

    Args:
        bias: whether the module may have one. A layer made without may have been given one since.
    """
    if type(module) not in kinds or hooks(module):
        return False
    own = [value for value in module._parameters.values() if value is not None]
    # A parameter of another class than Parameter (a tensor subclass) may multiply in another way.
    return all(type(value) is nn.Parameter for value in own) and (bias or getattr(module, "bias", None) is None)


def stamp(tensor: Tensor) -> tuple:
    """Differs when a tensor was replaced, moved or written to, as far as torch counts writes.

    It does not count those of fused optimisers, through ``.data``, and in inference mode: a copy that has to notice
    these too needs to be let go where they can happen.
    """
    return tensor.data_ptr(), tensor.dtype, tensor.device, None if tensor.is_inference() else tensor._version


def all_exactly(
    model: nn.Module, kinds: Collection[type], biased: Collection[str] = (), skip: Collection[str] = ()
) -> bool:
    """Whether ``model`` and everything in it is of one of ``kinds`` and unchanged.

    Args:
        biased: last parts of the names of modules that may have a bias. skip: first parts of names to leave out.
    """
    return all(
        exactly(module, *kinds, bias=name.rpartition(".")[2] in biased)
        for name, module in model.named_modules()
        if name.partition(".")[0] not in skip
    )
