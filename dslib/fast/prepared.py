"""The one way to a fast path: :func:`prepare` puts it in place, :func:`describe` says what runs how, :func:`release`.

Without it, every model runs as its chapter shows it: module by module. A prepared model computes the same, up to
rounding (see :mod:`dslib.fast.int4` for how much that is with four bits), by the same call ``model(...)``, so that
generating, speculating and scoring are all quicker and none of them has to know. Whatever is changed afterwards has its
effect: a shortcut looks, and stands aside.
"""

from dataclasses import dataclass

from torch import nn

from dslib.architecture.published import MultiHeadLatentAttention
from dslib.fast.experts import QuickExperts
from dslib.fast.int4 import QuickInt4
from dslib.fast.linear import QuickLinear
from dslib.fast.shortcut import Shortcut, shortcut_of
from dslib.fast.token_step import MODELS, TokenStep


def prepare(model: nn.Module, *, quick_products: bool = True, pack_experts: bool = False) -> "Report":
    """Let everything in ``model`` that has a faster way run by it, in place. May be called again after changes.

    Nothing is copied that could go stale. Training works as before: shortcuts stand aside where gradients are recorded.
    ``copy.deepcopy`` of a prepared model is prepared. ``copy.copy`` runs as the model that it was made from, whatever
    attributes it is given since, until it is prepared or released itself.

    Args:
        quick_products: False leaves ``nn.Linear`` to torch, to see what the rest brings.
        pack_experts: move the weights of experts into oneDNN's order, where the processor has one (AVX-512). Until
            :func:`release` they can be neither read, saved, moved nor trained.

    Raises:
        ValueError: not a module.
    """
    release(model)
    for module in model.modules():
        shortcut = SHORTCUTS.get(type(module))
        if shortcut is None or "forward" in vars(module) or (shortcut is QuickLinear and not quick_products):
            continue
        module.forward = shortcut(module)
        if pack_experts and isinstance(module.forward, QuickExperts):
            module.forward.pack()
    return describe(model)


def describe(model: nn.Module) -> "Report":
    """Which modules of ``model`` run fast as things stand, and why others do not. Raises as :func:`prepare`."""
    fast, plain = [], []
    for name, module in _checked(model).named_modules():
        shortcut, kind = shortcut_of(module), type(module).__name__
        if shortcut is not None:
            reason = shortcut.why_not()
            (fast if reason is None else plain).append((name, kind, reason or shortcut.what))
        elif type(module) in SHORTCUTS:
            own = vars(module).get("forward")
            reason = "is not prepared" if own is None else "has a forward of its own"
            if isinstance(own, Shortcut):
                reason = "runs as the module that it was copied from"
            plain.append((name, kind, reason))
        elif known := [known for known in SHORTCUTS if isinstance(module, known)]:
            plain.append((name, kind, f"is not exactly a {known[0].__name__}"))
    return Report(tuple(fast), tuple(plain))


def release(model: nn.Module) -> None:
    """Take every shortcut out of ``model`` again. Raises as :func:`prepare`."""
    for module in _checked(model).modules():
        shortcut = shortcut_of(module)
        held = shortcut or vars(module).get("packed_by")  # the latter under a forward that was set afterwards
        if held is not None:
            held.let_go()
        if isinstance(vars(module).get("forward"), Shortcut):  # of this module, or of the one that this is a copy of
            del module.forward


def is_prepared(model: nn.Module) -> bool:
    """Whether :func:`prepare` was called for this model. Raises as :func:`prepare`."""
    return shortcut_of(_checked(model)) is not None


class QuickLatent(Shortcut):
    """Latent attention in the form that multiplies less: naive for a prompt, absorbed for a new token."""

    kind, what = MultiHeadLatentAttention, "absorbed where that multiplies less"

    def __init__(self, module: MultiHeadLatentAttention):
        super().__init__(module)
        self.before, module.form = module.form, "auto"

    def __call__(self, *args, **kwargs):
        return self.plain(*args, **kwargs)  # the form is an attribute; whether it may be absorbed is asked there

    def let_go(self) -> None:
        if self.stands_for.form == "auto":  # unless somebody has chosen since
            self.stands_for.form = self.before

    def __getstate__(self) -> dict:
        return vars(self)

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)


SHORTCUTS: dict[type[nn.Module], type[Shortcut]] = {
    shortcut.kind: shortcut for shortcut in (QuickLinear, QuickExperts, QuickInt4, QuickLatent)
} | dict.fromkeys(MODELS, TokenStep)


@dataclass(frozen=True)
class Report:
    """Which modules of a model run fast, and why others do not.

    Attributes:
        fast: (name, class, what is done) of each. plain: (name, class, why not) of each that could be, or has one that
            stands aside.
    """

    fast: tuple[tuple[str, str, str], ...]
    plain: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[str]] = {}
        for title, rows in (("fast", self.fast), ("plain", self.plain)):
            for name, kind, text in rows:
                groups.setdefault((title, kind, text), []).append(name or "the model")
        lines = []
        for (title, kind, text), names in groups.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"{title:5}  {len(names):4} x {kind}: {text} ({names[0]}{more})")
        return "\n".join(lines) or "nothing here has a faster way"


def _checked(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    return model
