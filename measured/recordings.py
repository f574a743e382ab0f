"""Recorded results: what a function gave on a machine the reader does not have, with everything needed to judge it.

``data/recordings/<machine>.json`` is written by ``make record`` only. A page calls :func:`live_or_recorded`: with a
CUDA device it runs the function; without one it shows the recording of the *same* function and arguments, or says
honestly that there is none. Two hashes (:mod:`measured.provenance`) tell whether a recording still answers the
question: where the function itself has changed it does not, and counts as missing; where only what it calls has, the
page says so beside the commit.

Where nothing is recorded, the result is an :class:`Absent`, which is false, and whose first use raises
:class:`NotRecorded`. In a notebook the cell ends there with one line, and so does every later cell that needs what this
one would have made (:class:`Cells`): a page says what is missing, and the rest of it runs. Pages write nothing for it.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import datetime
import html
import importlib
import inspect
import json
import math
import os
import re
import symtable
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dslib.data.files import data_path
from dslib.html import html_table
from measured import provenance
from measured.recordings_file import Recording, machine_name, parse
from measured.timing import Timing

ORIGINS = ("live", "recorded", "absent")
STANDINGS = ("current", "older code", "stale")
OLDER = "; the function is as it was, code that it calls has changed since"
MACHINE = ("kind", "name", "isa", "cores", "threads", "memory_bytes")  # what a recording says of its machine


@dataclass(frozen=True)
class Shown:
    """What a page shows for a function: its ``result``, the ``origin``, a sentence. False when absent."""

    result: Any
    origin: str  # "live", "recorded" or "absent"
    note: str

    def __bool__(self) -> bool:
        return self.origin != "absent"

    def _repr_html_(self) -> str:
        note = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(self.note))
        note = re.sub(r"\*(.+?)\*", r"<em>\1</em>", re.sub(r"`(.+?)`", r"<code>\1</code>", note))
        if not self:
            return f"<p>{note}</p>"
        rows = self.result.items() if isinstance(self.result, Mapping) else [("result", self.result)]
        return f"<p>{note}</p>" + html_table("", [(str(name), _cell(value)) for name, value in rows])

    def _repr_markdown_(self) -> str:
        if not isinstance(self.result, Mapping):
            return f"{self.note}\n\n{_cell(self.result)}" if self else self.note
        rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in self.result.items())
        return f"{self.note}\n\n| quantity | value |\n|---|---|\n{rows}"

    __repr__ = _repr_markdown_


class NotRecorded(Exception):
    """Somebody has used a result that nobody has recorded; the message says which."""


class Absent:
    """Stands where a result would. It is false, and shows as the sentence that says why; any other use of it raises
    :class:`NotRecorded`, comparing included: nothing is true or false of what is not there."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return self._why

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # how Python and Jupyter ask what an object can do
            raise AttributeError(name)
        return self._used()

    def _used(self, *_: Any, **__: Any) -> Any:
        raise NotRecorded(self._why)


for _use in """getitem iter len contains call format float int index round abs neg eq ne lt le gt ge
    add radd sub rsub mul rmul truediv rtruediv floordiv mod pow matmul rmatmul or ror and""".split():
    setattr(Absent, f"__{_use}__", Absent._used)


class Cells:
    """Ends a notebook's cell where it uses what is absent, with one line, and makes absent what it would have made.

    IPython gives it each cell before it runs (``ast_transformers``). From the first cell on that names one of the two
    functions which fetch recordings, the cell's lines are put under a ``with`` that catches :class:`NotRecorded`.

    Args:
        namespace: the notebook's own.
    """

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.namespace, self.begun = namespace, False

    def visit(self, cell: ast.Module) -> ast.Module:
        named = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(cell)}
        self.begun = self.begun or not named.isdisjoint({"recorded", "live_or_recorded"})
        future = any(getattr(node, "module", None) == "__future__" for node in cell.body)  # has to be the first line
        if future or not (self.begun and cell.body):
            return cell
        scope = symtable.symtable(ast.unparse(cell), "cell", "exec")
        made = {name.get_name() for name in scope.get_symbols() if name.is_assigned() and not name.is_imported()}
        stores = (
            node for node in ast.walk(cell) if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
        )
        made |= {node.value.id for node in stores if isinstance(node.value, ast.Name)}  # results[name] = …
        begin, guard, show = ast.parse(f"_shown = None\nwith _until_absent({sorted(made)}): 0\n_shown").body
        last, guard.body = cell.body[-1], list(cell.body)
        if isinstance(last, ast.Expr):  # a `with` shows no value, so the last one is kept, and shown below it
            guard.body[-1] = ast.copy_location(ast.Assign([ast.Name("_shown", ast.Store())], last.value), last)
        self.namespace["_until_absent"] = self.until_absent
        return ast.fix_missing_locations(ast.Module([begin, guard, show], cell.type_ignores))

    @contextmanager
    def until_absent(self, made: list[str]) -> Iterator[None]:
        try:
            yield
        except NotRecorded as missing:
            print(f"Skipped from here on: {missing}")
            self.namespace |= dict.fromkeys(made, Absent(str(missing)))


def _watch_cells() -> None:
    python = sys.modules.get("IPython")  # None as well where a test blocks it
    shell = python.get_ipython() if python is not None else None
    if shell is not None and not any(isinstance(one, Cells) for one in shell.ast_transformers):
        shell.ast_transformers.append(Cells(shell.user_ns))


_watch_cells()


def record(fn: Callable[..., Any], origin: tuple[str, str] | None = None, /, **arguments: Any) -> Recording:
    """Run ``fn(**arguments)`` here and wrap its result with all that is needed to judge it.

    Args:
        origin: commit and fingerprint of the code, see :func:`measured.provenance.origin`; None when trying things out:
            the recording is then of an unknown commit.

    Raises:
        ValueError: ``fn`` cannot be found again by name, or its arguments or result are not plain JSON.
    """
    from measured.machine import describe

    name, bound = function_name(fn), _bind(fn, arguments)
    machine = describe()
    return Recording(
        function=name,
        arguments=bound,
        result=_plain("result", fn(**arguments)),
        machine={key: getattr(machine, key) for key in MACHINE if getattr(machine, key) is not None},
        versions=machine.versions(),
        commit=origin[0] if origin else "unknown",
        command=_command(),
        seed=bound.get("seed"),
        date=datetime.date.today().isoformat(),
        protocol=provenance.protocol(fn),
        code=provenance.code(fn),
        tree=origin[1] if origin else None,
    )


def write(path: Path | str | None, recordings: Iterable[Recording]) -> Path:
    """Add recordings to a machine's file; one of the same function and arguments replaces the older one.

    Args:
        path: the file; ``None`` for ``data/recordings/<this machine>.json``.

    Raises:
        ValueError: an invalid recording, or recordings of more than one machine in the file.
    """
    if path is None:
        from measured.machine import describe

        path = data_path("recordings") / f"{describe().slug()}.json"
    path = Path(path)
    kept = {_key(old): old for old in (read(path) if path.exists() else [])}
    kept |= {_key(new): new for new in recordings}
    rows = [dataclasses.asdict(kept[key]) for key in sorted(kept)]
    names = sorted({machine_name(row["machine"]) for row in rows})
    if len(names) > 1:
        raise ValueError(f"{path.name}: got recordings of {', '.join(names)}, wanted one machine a file")
    text = json.dumps({"recordings": rows}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    parse(path.name, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".json.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)  # whole or not at all
    return path


def read(path: Path | str) -> list[Recording]:
    """The recordings in one file.

    Raises:
        ValueError: naming file, line and field, e.g. ``a.json line 7, recording 1, field 'date': got 'May', wanted …``.
    """
    path = Path(path)
    return list(_parsed(path.name, path.read_bytes()))


_parsed = lru_cache(maxsize=16)(
    parse
)  # a page asks for dozens of recordings, and checking a file takes a tenth of a second


def read_all() -> list[Recording]:
    """Every recording of every machine in ``data/recordings/``."""
    try:
        folder = data_path("recordings")
    except FileNotFoundError:
        return []
    return [recording for path in sorted(folder.glob("*.json")) for recording in read(path)]


def standing(recording: Recording) -> str:
    """How a recording stands to the code here.

    Returns:
        ``"current"``; ``"older code"`` where something that the function calls has changed since, or nobody knows what
        it was; ``"stale"`` where the function itself has changed, or is gone.
    """
    module, _, name = recording.function.partition(":")
    try:
        fn = getattr(importlib.import_module(module), name)
        if provenance.protocol(fn) != recording.protocol:
            return "stale"
        return "current" if provenance.code(fn) == recording.code else "older code"
    except (ImportError, AttributeError, OSError, TypeError):
        return "stale"


def best_standing(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """How the best recording of a call stands, see :func:`standing`; ``"absent"`` without one."""
    name, bound = function_name(fn), _bind(fn, arguments)
    found = [standing(r) for r in read_all() if (r.function, r.arguments) == (name, bound)]
    return min(found, key=STANDINGS.index, default="absent")


def difference(old: Any, new: Any, relative: float = 1e-3, place: str = "result") -> str | None:
    """Where two plain results differ, and how; None if they agree, numbers within ``relative`` (and 1e-6)."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        found = (difference(old[key], new[key], relative, f"{place}[{key!r}]") for key in old)
        return next((one for one in found if one), None)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = (difference(a, b, relative, f"{place}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True)))
        return next((one for one in found if one), None)
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (old, new))
    same = math.isclose(old, new, rel_tol=relative, abs_tol=1e-6) if numbers else (type(old), old) == (type(new), new)
    return None if same else f"{place}: {old!r} was recorded, {new!r} now"


def live_or_recorded(fn: Callable[..., Any], **arguments: Any) -> Shown:
    """Run ``fn(**arguments)`` on a CUDA device; without one, show what was recorded for the same call.

    Raises:
        ValueError: as :func:`record`, and for a recordings file that does not parse.
    """
    import torch

    if torch.cuda.is_available():
        from measured.machine import describe

        result = _plain("result", fn(**arguments))
        return Shown(result, "live", f"*Measured here, on {describe('cuda').name}.*")
    return recorded(fn, kind="cuda", **arguments)


def recorded(fn: Callable[..., Any], *, kind: str | None = None, **arguments: Any) -> Shown:
    """Show what was recorded for ``fn(**arguments)`` without running it: for what takes longer than a page should.

    Among several recordings the newest counts, one by the present code first. A stale one answers another question than
    the one that the page asks, so it is not shown.

    Args:
        kind: ``"cuda"`` or ``"cpu"`` for recordings of such machines only; None for any.

    Raises:
        ValueError: as :func:`live_or_recorded`.
    """
    name, bound = function_name(fn), _bind(fn, arguments)
    found = [r for r in read_all() if kind in (None, r.machine["kind"]) and (r.function, r.arguments) == (name, bound)]
    usable = [(how, recording) for recording in found if (how := standing(recording)) != "stale"]
    if not usable:
        lack = "No GPU here, and no recording" if kind == "cuda" else "No recording"
        older = f"; the one of {max(r.date for r in found)} is of an older version of it" if found else ""
        words = f"{lack} of `{name}` with these arguments exists yet{older}."
        return Shown(Absent(words), "absent", f"*{words}*")
    how, best = max(usable, key=lambda pair: (pair[0] == "current", pair[1].date))
    since = "" if how == "current" else OLDER
    return Shown(copy.deepcopy(best.result), "recorded", f"*Recorded on {best.where}{since}.*")


def function_name(fn: Callable[..., Any]) -> str:
    """``"package.module:name"``. Raises ``ValueError`` for what cannot be found again by such a name."""
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", "")
    if not module or module == "__main__" or not name.isidentifier():
        raise ValueError(f"fn: got {fn!r}, wanted a function of a module, such as measured.experiments.decoder:decode")
    return f"{module}:{name}"


def _bind(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of the call, defaults included, so that a changed default is another call."""
    try:
        bound = inspect.signature(fn).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"arguments: {error}") from error
    bound.apply_defaults()
    return {name: _plain(name, value) for name, value in bound.arguments.items()}


def _plain(name: str, value: Any) -> Any:
    """``value`` as JSON would give it back, so that a live and a recorded result have one shape."""

    def simplify(item: Any) -> Any:
        if isinstance(item, Timing):
            facts = {key: getattr(item, key) for key in ("median", "low", "high")}
            return facts | {"n": item.n, "settled": item.settled}
        raise TypeError(f"{type(item).__name__} is not plain data")

    try:
        return json.loads(json.dumps(value, default=simplify, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: wanted numbers, text, lists, mappings or a Timing ({error})") from error


def _key(recording: Recording) -> str:
    return json.dumps([recording.function, recording.arguments], sort_keys=True)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping) and "median" in value:
        scale, unit = (1e3, "ms") if value["median"] < 1 else (1, "s")
        low, median, high = (f"{value[key] * scale:.3g}" for key in ("low", "median", "high"))
        return f"{median} {unit} ({low} to {high}, n={value['n']})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _command() -> str:
    """How this process was started, without paths of the machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {Path(sys.argv[0]).name}"
    return " ".join([start, *(Path(word).name if os.sep in word else word for word in sys.argv[1:])])
