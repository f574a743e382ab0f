"""Other layers in the place of a model's own: under every name, and only where nothing else would be lost.

Book: ``chapters/architecture/int4.ipynb``; eight bits are put in place by it, too.
"""

from collections.abc import Callable, Collection

from torch import nn

from dslib.exact import unlike


def replace_layers(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], make: Callable[[nn.Module], nn.Module], skip: Collection[str]
) -> set[str]:
    """Put ``make(layer)`` in the place of every layer of ``kinds``, under each of its names, and return the names.

    Args:
        skip: names of layers to leave alone, with all that is in them: full names, or last parts of a name.

    Raises:
        ValueError: what ``make`` raises, or a layer that does something else than its class, by name; a model that is
            such a layer itself. The model is then unchanged.
    """
    named: dict[nn.Module, list[str]] = {}  # a layer may have several names, or be in a block that has
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            named.setdefault(module, []).append(name)
    if model in named:
        raise ValueError(f"model: is itself a {type(model).__name__}, expected a module that holds some")
    made = {}
    for layer, names in named.items():
        if any(_skipped(name, skip) for name in names):
            continue
        try:
            if (reason := unlike(layer, kinds)) is not None:
                raise ValueError(f"{reason}, which would be lost, expected a plain {kinds[0].__name__}")
            made[layer] = make(layer).train(layer.training)
        except ValueError as error:
            raise ValueError(f"{names[0]}: {error} (or name it in skip)") from error
    for layer, new in made.items():
        for name in named[layer]:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    return {name for layer in made for name in named[layer]}


def _skipped(name: str, skip: Collection[str]) -> bool:
    parts = name.split(".")
    return any(part in skip or ".".join(parts[: n + 1]) in skip for n, part in enumerate(parts))
