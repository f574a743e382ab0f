"""Checkpoints of a training run, from which it goes on as if it had never stopped.

The next step depends on the weights, the optimiser's two moments, the place in the schedule, the loss scale, and on
what the random generators (torch's, Python's and numpy's) will draw next. All of it is in one file, with the settings
of the run: one that went on with another learning rate would be neither the old run nor a new one, so it is refused.
Whoever pulls the plug at any moment finds the last whole file.

Book: ``chapters/performance/training.ipynb``.
"""

import hashlib
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

KIND = "dslib training checkpoint, format 2"
PARTS = ("kind", "settings", "losses", "model", "optimizer", "scaler", "generator", "random")


class Checkpoint:
    """The file of one run, and the objects whose state it keeps.

    ``settings`` (name -> number or text) all have to be the same when a run is resumed. Model, optimiser and scaler are
    whatever has ``state_dict`` and ``load_state_dict``; ``generator`` draws the batches. Raises ValueError for a path
    that is a folder, or in none.
    """

    def __init__(
        self, path: str | Path, settings: dict[str, Any], *, model: nn.Module, optimizer: torch.optim.Optimizer,
        scaler: Any = None, generator: torch.Generator | None = None,
    ):  # fmt: skip
        self.path = Path(path)
        # Said now, and not after the first hundred steps.
        if not self.path.parent.is_dir() or self.path.is_dir():
            raise ValueError(f"checkpoint: got {str(path)!r}, expected a file in a folder that exists")
        self.settings = {**settings, "model": fingerprint(model)}
        self.model, self.optimizer, self.scaler, self.generator = model, optimizer, scaler, generator

    def save(self, losses: list[float]) -> None:
        """Write the state after ``len(losses)`` steps, whole or not at all."""
        state = {
            "kind": KIND,
            "settings": self.settings,
            "losses": losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "generator": None if self.generator is None else self.generator.get_state(),
            "random": random_state(),
        }
        write_whole(self.path, state)

    def restore(self) -> list[float]:
        """Load the file into model, optimiser, scaler and generators; nothing happens if there is no file.

        Returns the losses of the steps already taken, so their number is the next step. Raises ValueError for a file
        that is damaged or something else, or of a run with other settings, naming which.
        """
        if not self.path.exists():
            return []
        state = read_whole(self.path)
        self._compare(state["settings"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        set_random_state(state["random"])
        return state["losses"]

    def _compare(self, found: dict[str, Any]) -> None:
        pairs = {name: (self.settings.get(name), found.get(name)) for name in {**self.settings, **found}}
        other = [f"{name}: got {own}, expected {kept}" for name, (own, kept) in pairs.items() if own != kept]
        if other:
            where = f"as in checkpoint {self.path.name}. A resumed run keeps its settings; for others name another file"
            raise ValueError(f"{'; '.join(other)}, {where}")


def random_state() -> dict[str, Any]:
    """States of all global generators: dropout draws from torch's, a ``batch`` perhaps from Python's or numpy's."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    own = {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}
    return own | {"numpy": (kind, keys.tolist(), *rest)}


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`random_state` gave; of GPUs, as many as there are here."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def write_whole(path: Path, state: dict[str, Any]) -> None:
    """``torch.save`` that leaves either the new file or the old one, whenever the process or the machine stops."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before it gets its name
    os.replace(part, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # and the name as well
        finally:
            os.close(folder)


def read_whole(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint; tensors and plain values only, so a foreign file can run nothing.

    Raises ValueError for what is no checkpoint of ours, or not a whole one.
    """
    wanted = "expected a whole training checkpoint; remove it to begin anew"
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch does not compare the checksums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # several unrelated types, depending on where the readers stumble
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"checkpoint {path.name}: cannot be read ({reason}), {wanted}") from error
    if damaged:
        raise ValueError(f"checkpoint {path.name}: its part {damaged} is damaged, {wanted}")
    if not isinstance(state, dict) or state.get("kind") != KIND:
        raise ValueError(f"checkpoint {path.name}: got something else, {wanted} ({KIND})")
    if missing := [name for name in PARTS if name not in state]:
        raise ValueError(f"checkpoint {path.name}: has no {missing[0]!r}, {wanted}")
    return state


def fingerprint(value: nn.Module | Tensor) -> str:
    """What tells one model's shape, or one text, from another: a size and a few hexadecimal digits."""
    if isinstance(value, Tensor):
        return f"{value.numel()} tokens, {_digest(value.cpu().contiguous().numpy().tobytes())}"
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in value.state_dict().items()]
    return f"{type(value).__name__}, {len(shapes)} tensors, {_digest(repr(shapes).encode())}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
