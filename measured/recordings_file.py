"""What a recording is, and the reading of a recordings file: a fault is named by file, line, recording and field.

Apart from :mod:`measured.recordings` because it is about the file, not about recording and showing.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recording:
    """One result and where it comes from.

    Attributes:
        function: ``"package.module:name"``.
        arguments: all of them, defaults included; plain JSON.
        result: plain JSON; a timing is a mapping with ``median``, ``low``, ``high`` (seconds), ``n`` and ``settled``.
        machine: kind, name, cores, threads, memory_bytes; for a CPU with AVX-512 or newer, isa.
        versions: of python, torch and whatever else decides the result.
        commit, command: the code that ran, and how it was called.
        tree: fingerprint of its files, see :mod:`measured.provenance`; None in recordings older than that.
        seed: the ``seed`` argument, if the function has one.
        date: day of the run, ISO.
        source_hash: of the function's source at that time.
    """

    function: str
    arguments: dict[str, Any]
    result: Any
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    command: str
    seed: int | None
    date: str
    source_hash: str
    tree: str | None = None

    @property
    def where(self) -> str:
        """Machine, date and versions in one phrase."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{machine_name(self.machine)}, {self.date} ({versions}; commit {self.commit[:10]})"


def machine_name(machine: dict[str, Any]) -> str:
    """The chip's name, with the instruction set where the recording has one."""
    return " with ".join(str(machine[key]) for key in ("name", "isa") if machine.get(key))


def parse(file: str, text: str) -> list[Recording]:
    """The recordings in the text of a file.

    Raises:
        ValueError: naming file, line and field, e.g. ``a.json line 7, recording 1, field 'date': got 'May', wanted …``.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} line {error.lineno}: not valid JSON: {error.msg}") from error
    rows = document.get("recordings") if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{file} line 1, field 'recordings': wanted a list")
    for index, row in enumerate(rows):
        fault = _fault(row)
        if fault:
            field, message = fault
            raise ValueError(f"{file} line {_line(text, index, field)}, recording {index}, field {field!r}: {message}")
    return [Recording(**row) for row in rows]


def _fault(row: Any) -> tuple[str, str] | None:
    """The first field at fault and what is wrong with it."""
    names = [field.name for field in dataclasses.fields(Recording)]
    if not isinstance(row, dict):
        return "recording", f"got {row!r}, wanted a mapping"
    for name in names:
        if name not in row and name != "tree":
            return name, "missing"
    for name in row:
        if name not in names:
            return name, f"unknown, wanted one of {', '.join(names)}"
    text = {"function": r"[\w.]+:\w+", "commit": r".+", "command": r".+", "date": r"\d{4}-\d\d-\d\d"}
    for name, pattern in (text | {"source_hash": r"[0-9a-f]{16}"}).items():
        if not isinstance(row[name], str) or not re.fullmatch(pattern, row[name]):
            return name, f"got {row[name]!r}, wanted text like {pattern}"
    for name, needed in (("arguments", ()), ("machine", ("kind", "name")), ("versions", ("python", "torch"))):
        if not isinstance(row[name], dict) or any(key not in row[name] for key in needed):
            return name, f"got {row[name]!r}, wanted a mapping" + (f" with {', '.join(needed)}" if needed else "")
    if row["seed"] is not None and (isinstance(row["seed"], bool) or not isinstance(row["seed"], int)):
        return "seed", f"got {row['seed']!r}, wanted a whole number or null"
    if row.get("tree") is not None and not re.fullmatch(r"[0-9a-f]{16}", str(row["tree"])):
        return "tree", f"got {row['tree']!r}, wanted 16 hexadecimal digits or null"
    if row["result"] is None:
        return "result", "got null, wanted the result"
    return _timing_fault(row["result"])


def _timing_fault(result: Any) -> tuple[str, str] | None:
    """A median without its spread and count says too little to be shown."""
    inside = list(result.values()) if isinstance(result, dict) else result if isinstance(result, list) else []
    if isinstance(result, dict) and "median" in result:
        numbers = [result.get(key) for key in ("low", "median", "high", "n")]
        if any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in numbers):
            return "result", f"got {result!r}, wanted a timing with low, median, high and n"
    return next((fault for fault in map(_timing_fault, inside) if fault), None)


def _line(text: str, index: int, field: str) -> int:
    """Line of a field, or of its recording where the field is missing. JSON keeps no lines; as YAML it has them."""
    import yaml

    rows = next(value for key, value in yaml.compose(text, Loader=yaml.SafeLoader).value if key.value == "recordings")
    node = rows.value[index]
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == field:
            return key.start_mark.line + 1
    return node.start_mark.line + 1
