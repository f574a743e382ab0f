"""A migration in stages, each with a gate: what fails it is undone, and the model is what it was before.

    stages = [
        Stage("router", r"router", train_router, limit=0.0),
        Stage("expert 0", r"experts", train_first, limit=0.0),
    ]
    outcomes = run(model, stages, held_out_loss, "folder")

Before a stage the weights are written down. Then only its own parameters train, ``work`` is called, and ``judge`` gives
a loss on text held out. If that rose by more than ``limit``, the weights come back bit for bit, and the run ends there.
Every file is named with its hash in ``manifest.json``; :func:`rollback` goes back further by it.

Book: ``chapters/migration/upcycling.ipynb``.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dslib import check

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Stage:
    """One step: ``work(model)`` moves the parameters that ``trains`` is found in the names of; ``limit`` in nats."""

    name: str
    trains: str
    work: Callable[[nn.Module], Any]
    limit: float


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: the loss ``before`` and ``after`` it, and whether it stayed. ``file`` holds what was."""

    name: str
    before: float
    after: float
    accepted: bool
    file: str
    sha256: str


def run(
    model: nn.Module, stages: Sequence[Stage], judge: Callable[[nn.Module], float], folder: str | Path
) -> list[Outcome]:
    """Run the stages in order, in place, until one fails its gate.

    A loss that is no number fails the gate. Whatever ``work`` raises is raised, with the weights as before the stage.

    Raises:
        ValueError: no stage, two of one name, a pattern that no parameter's name has, a folder that holds a migration.
    """
    folder = Path(folder)
    names = [stage.name for stage in stages]
    if not stages or len(set(names)) < len(names):
        raise ValueError(f"stages: got {names}, expected at least one, each with a name of its own")
    for stage in stages:
        if not any(re.search(stage.trains, name) for name, _ in model.named_parameters()):
            raise ValueError(f"stage {stage.name!r}: {stage.trains!r} is in no parameter's name")
    if outcomes_in(folder):
        raise ValueError(f"{folder}: holds a migration already, expected a folder for this one")
    folder.mkdir(parents=True, exist_ok=True)
    outcomes, before = [], judge(model)
    for number, stage in enumerate(stages):
        file = f"{number}-{re.sub(r'[^a-z0-9]+', '-', stage.name.lower())}.safetensors"
        kept = _write(model, folder / file)
        flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
        try:
            for name, weight in model.named_parameters():
                weight.requires_grad_(re.search(stage.trains, name) is not None)
            stage.work(model)
            after = judge(model)
        except BaseException:
            _read(model, folder / file, kept)
            raise
        finally:
            for name, weight in model.named_parameters():
                weight.requires_grad_(flags[name])
        accepted = math.isfinite(after) and after <= before + stage.limit
        outcomes.append(Outcome(stage.name, before, after, accepted, file, kept))
        _list(folder, outcomes)
        if not accepted:
            _read(model, folder / file, kept)
            break
        before = after
    return outcomes


def outcomes_in(folder: str | Path) -> list[Outcome]:
    """What was run in this folder so far."""
    path = Path(folder) / MANIFEST
    return [Outcome(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def rollback(model: nn.Module, folder: str | Path, name: str) -> None:
    """Bring back the weights from before stage ``name``, bit for bit; it and what came after it count no longer.

    Raises:
        ValueError: no such stage, a file that is gone or not the one that was written; nothing is changed then.
    """
    outcomes = outcomes_in(folder)
    check.one_of([one.name for one in outcomes], name=name)
    at = next(number for number, one in enumerate(outcomes) if one.name == name)
    _read(model, Path(folder) / outcomes[at].file, outcomes[at].sha256)
    _list(Path(folder), outcomes[:at])


def _list(folder: Path, outcomes: Sequence[Outcome]) -> None:
    (folder / MANIFEST).write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n", encoding="utf-8")


def _write(model: nn.Module, path: Path) -> str:
    # A tied weight is stored by each of its names: a copy of a migration need not be small.
    save_file({name: value.detach().cpu().clone() for name, value in model.state_dict().items()}, path)
    return _sha256(path)


def _read(model: nn.Module, path: Path, sha256: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: gone, expected the weights from before the stage; nothing was changed")
    if (found := _sha256(path)) != sha256:
        raise ValueError(f"{path}: altered (sha256 {found[:12]}…, expected {sha256[:12]}…); nothing was changed")
    with torch.no_grad():
        model.load_state_dict(load_file(path))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
