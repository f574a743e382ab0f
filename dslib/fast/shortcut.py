"""What stands in for a module's ``forward``: the same results sooner, as long as the module is what it was made for.

A shortcut is set as ``forward`` on one instance. Hooks still run, as they run around ``forward``; a wrapper or another
module put in its place takes it out of the way. It may rely on its own module's parameters, which it looks up at each
call. One that stands for the modules *inside* takes a :class:`Snapshot` of them, and looks at each call whether all is
as it was.
"""

from collections.abc import Collection
from operator import is_

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from dslib.exact import as_written, written

NO_SETTINGS = ("training", "last_routing")  # attributes of modules that decide nothing about a result


class Shortcut:
    """Base of all: called as the ``forward`` of the module that it stands for.

    To add one: subclass this, with a ``__call__`` that takes what the module's ``forward`` takes and hands what it is
    not made for to :meth:`plain`, and name it in ``SHORTCUTS`` of :mod:`dslib.fast.prepared`.

    Attributes:
        kind: the class of module that this one is for. what: what it does, in a few words for a report.
        stands_for: the module.
    """

    kind: type[nn.Module]
    what: str

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "kind"):
            written(cls.kind)

    def __init__(self, module: nn.Module):
        self.stands_for = module

    def stands(self) -> bool:
        """Whether the module is still of that very class, with parameters of torch's own, and the class as written."""
        held = self.stands_for._parameters.values()
        unchanged = type(self.stands_for) is self.kind and as_written(self.kind)
        return unchanged and all(type(part) is nn.Parameter for part in held if part is not None)

    def plain(self, *args, **kwargs):
        """What the module's class computes."""
        return type(self.stands_for).forward(self.stands_for, *args, **kwargs)

    def why_not(self) -> str | None:
        """Why the plain way is taken for now; None if the quick one is, where it pays."""
        return None if self.stands() else f"is a {type(self.stands_for).__name__} now"

    def let_go(self) -> None:
        """Called before the shortcut is taken away."""

    def __getstate__(self) -> dict:
        """Copies and files have a shortcut of the same kind, which has looked at nothing yet."""
        return {"module": self.stands_for}

    def __setstate__(self, state: dict) -> None:
        # The module is being copied or loaded as well, and may have no weights yet: __init__ must not look at it.
        self.__init__(state["module"])


def shortcut_of(module: nn.Module) -> Shortcut | None:
    """The shortcut that stands for this module."""
    found = vars(module).get("forward")
    return found if isinstance(found, Shortcut) and found.stands_for is module else None


def autocast() -> bool:
    """Whether torch chooses the format of each operation by its kind, which is not that of a shortcut's operations."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def watched() -> bool:
    """Whether the plain way is the only right one: gradients, autocast, or a compiler that follows the operations."""
    return torch.is_grad_enabled() or autocast() or torch.compiler.is_compiling() or torch.jit.is_tracing()


class Snapshot:
    """What a model was made of when this was taken: modules, classes, hooks, settings, and where every tensor lies.

    What is *in* the tensors is not looked at: whoever takes a snapshot keeps views of weights and no copies. So a
    change is seen whatever made it, and looking takes a tenth of a millisecond for thirty layers.

    Args:
        kinds: of the modules whose settings matter. skip: first parts of the names of modules that do not.
    """

    def __init__(self, model: nn.Module, kinds: Collection[type], skip: Collection[str] = ()):
        named = model.named_modules(remove_duplicate=False)
        self._modules = [part for name, part in named if name.partition(".")[0] not in skip]
        owns = [vars(part) for part in self._modules if type(part) in kinds]
        # Where to look, as (dict, key): looking itself happens once a token.
        public = [(own, name) for own in owns for name in own if not name.startswith("_") and name not in NO_SETTINGS]
        self._places = public + [(vars(model.config), name) for name in vars(model.config)]
        self._places += [(part._modules, name) for part in self._modules for name in part._modules]
        self._tensors = [
            (held, name) for part in self._modules for held in (part._parameters, part._buffers) for name in held
        ]
        # A hook for all modules has a number of its own.
        self._global_hooks = [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
        self._sizes = owns + [held for part in self._modules for held in (part._forward_hooks, part._forward_pre_hooks)]
        self._sizes += [held for part in self._modules for held in (part._modules, part._parameters)]
        self._methods = [(kind, name) for kind in set(map(type, self._modules)) for name in written(kind)]
        self._was = self._look()

    def _look(self) -> tuple[list, list]:
        """Objects, which have to be the same ones, and numbers, which have to be equal."""
        tensors = [place.get(name) for place, name in self._tensors]
        objects = [*map(type, self._modules), *tensors, *[place.get(name) for place, name in self._places]]
        objects += [getattr(kind, name, None) for kind, name in self._methods]
        there = [tensor for tensor in tensors if tensor is not None]
        numbers = [*map(len, self._sizes), *map(Tensor.data_ptr, there), *map(Tensor.numel, there)]
        return objects, [*numbers, *map(Tensor.stride, there), *map(tuple, self._global_hooks)]

    def same(self) -> bool:
        """Whether all is as it was."""
        (objects, numbers), (before, were) = self._look(), self._was
        return numbers == were and all(map(is_, objects, before))
