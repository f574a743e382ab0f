"""An adapter's own files: its configuration and its few weights, and nothing of the model. A LoRA's are those of peft.

    save(adapter, "folder")                     # peft reads it
    adapter = load(model, "folder")             # also one that peft has written

Book: ``chapters/migration/adapters.ipynb``. Source: the checkpoint format of Hugging Face's peft.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dslib import check
from dslib.migration.adapters import Adapter, bottleneck, lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MADE_BY = {
    "lora": (lora, {"rank": "r", "alpha": "lora_alpha"}),
    "bottleneck": (bottleneck, {"size": "size", "inner": "inner"}),
}
# Fields of peft's configuration that make another computation of the same two matrices.
OTHER_RULES = (
    "use_rslora",
    "use_dora",
    "alpha_pattern",
    "rank_pattern",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
)


def save(adapter: Adapter, folder: str | Path) -> None:
    """Write configuration and weights. peft reads a LoRA's for a model whose modules have the same names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _, fields = MADE_BY[adapter.kind]
    config = {"peft_type": adapter.kind.upper(), "task_type": None, "bias": "none", "target_modules": adapter.names}
    config |= {stored: adapter.options[name] for name, stored in fields.items()}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tensors = {name: weight.detach().clone().contiguous() for name, weight in _named(adapter).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def load(model: nn.Module, folder: str | Path) -> Adapter:
    """Attach what :func:`save`, or peft's ``save_pretrained`` for a LoRA, wrote.

    Raises ValueError where it does not belong to this model, tensors are missing or too many, or peft's configuration
    asks for another rule (such as DoRA); nothing is attached.
    """
    folder = Path(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    kind, targets = str(config.get("peft_type")).lower(), config["target_modules"]
    targets = [targets] if isinstance(targets, str) else targets
    check.one_of(MADE_BY, peft_type=kind)
    if other := next((field for field in OTHER_RULES if config.get(field)), None):
        raise ValueError(f"{folder}: {other} is {config[other]!r}, expected none: that is another rule than LoRA's")
    found = {target: [name for name, _ in model.named_modules() if _means(target, name)] for target in targets}
    if missing := [target for target, names in found.items() if not names]:
        raise ValueError(f"{folder}: made for a model with {missing[0]}, which this one has not")
    names = sorted({name for some in found.values() for name in some})
    make, fields = MADE_BY[kind]
    pattern = "^(" + "|".join(map(re.escape, names)) + ")$"
    adapter = make(model, pattern, **{name: config[stored] for name, stored in fields.items()})
    try:
        _read(adapter, folder / WEIGHTS)
    except Exception:
        adapter.remove()
        raise
    return adapter


def _means(target: str, name: str) -> bool:
    """Whether a target is this module's name, whole (ours) or its last parts (peft's)."""
    return name == target or name.endswith(f".{target}")


def _read(adapter: Adapter, path: Path) -> None:
    with safe_open(path, "pt") as file:
        wanted, there = _named(adapter), set(file.keys())
        if unlike := sorted(there ^ set(wanted)):
            how = "has no" if unlike[0] in wanted else "has an extra"
            raise ValueError(f"{path}: {how} {unlike[0]}, expected what its configuration names")
        for name, weight in wanted.items():
            if (shape := tuple(file.get_slice(name).get_shape())) != weight.shape:
                raise ValueError(f"{path}: {name} is {shape}, expected {tuple(weight.shape)}: made for another base")
            with torch.no_grad():
                weight.copy_(file.get_tensor(name))


def _named(adapter: Adapter) -> dict[str, Tensor]:
    """Every weight by the name that it has in a file."""
    found = {}
    for name, part in zip(adapter.names, adapter.parts, strict=True):
        for own, weight in part.named_parameters():
            own = own if own.endswith((".weight", ".bias")) else f"{own}.weight"
            found[f"base_model.model.{name}.{own}"] = weight
    return found
