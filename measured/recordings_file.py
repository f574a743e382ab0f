"""What a recording is, and the reading of a recordings file: a fault is named by file, line, recording and field.

Apart from :mod:`measured.recordings` because it is about the file, not about recording and showing.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import json
import math
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
        protocol, code: hashes of the function and of all that it calls, see :mod:`measured.provenance`; ``code`` is
            None where it is not known, as the checkout had changes.
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
    protocol: str
    code: str | None = None
    tree: str | None = None

    @property
    def where(self) -> str:
        """Machine, date, versions and commit in one phrase."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        commit, changed = self.commit[:10], " with changes" if self.commit.endswith("-changed") else ""
        return f"{machine_name(self.machine)}, {self.date} ({versions}; commit {commit}{changed})"


def machine_name(machine: dict[str, Any]) -> str:
    """The chip's name, with the instruction set where the recording has one."""
    return " with ".join(str(machine[key]) for key in ("name", "isa") if machine.get(key))


def parse(file: str, content: str | bytes) -> list[Recording]:
    """The recordings in the content of a file.

    Raises:
        ValueError: naming file, line and field, e.g. ``a.json line 7, recording 1, field 'date': got 'May', wanted …``.
    """
    try:
        text = content if isinstance(content, str) else content.decode()
        document = json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is no UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} line {error.lineno}: not valid JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{file}: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    rows = document.get("recordings") if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{file} line 1, field 'recordings': wanted a list")
    for index, row in enumerate(rows):
        fault = _fault(row)
        if fault:
            field, message = fault
            raise ValueError(f"{file} line {_line(text, index, field)}, recording {index}, field {field!r}: {message}")
    return [Recording(**row) for row in rows]


def _no_number(name: str) -> None:
    raise ValueError(f"got {name}, wanted numbers only")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, n in collections.Counter(key for key, _ in pairs).items() if n > 1]
    if twice:
        raise ValueError(f"key {twice[0]!r} twice in one mapping")
    return dict(pairs)


HASH = r"[0-9a-f]{16}"
TEXTS = {"function": r"[\w.]+:\w+", "commit": r".+", "command": r".+", "date": r"\d{4}-\d\d-\d\d", "protocol": HASH}
OPTIONAL = ("code", "tree")  # hashes that older recordings lack


def _fault(row: Any) -> tuple[str, str] | None:
    """The first field at fault and what is wrong with it."""
    names = [field.name for field in dataclasses.fields(Recording)]
    if not isinstance(row, dict):
        return "recording", f"got {row!r}, wanted a mapping"
    for name in names:
        if name not in row and name not in OPTIONAL:
            return name, "missing"
    for name in row:
        if name not in names:
            return name, f"unknown, wanted one of {', '.join(names)}"
    for name, pattern in TEXTS.items():
        if not isinstance(row[name], str) or not re.fullmatch(pattern, row[name]):
            return name, f"got {row[name]!r}, wanted text like {pattern}"
    for name in OPTIONAL:
        if row.get(name) is not None and not re.fullmatch(HASH, str(row[name])):
            return name, f"got {row[name]!r}, wanted 16 hexadecimal digits or null"
    try:
        datetime.date.fromisoformat(row["date"])
    except ValueError:
        return "date", f"got {row['date']!r}, wanted a day that exists"
    for name, needed in (("arguments", ()), ("machine", ("kind", "name")), ("versions", ("python", "torch"))):
        if not isinstance(row[name], dict) or any(key not in row[name] for key in needed):
            return name, f"got {row[name]!r}, wanted a mapping" + (f" with {', '.join(needed)}" if needed else "")
    if row["seed"] is not None and (isinstance(row["seed"], bool) or not isinstance(row["seed"], int)):
        return "seed", f"got {row['seed']!r}, wanted a whole number or null"
    if row["result"] is None:
        return "result", "got null, wanted the result"
    return _timing_fault(row["result"])


def _timing_fault(result: Any) -> tuple[str, str] | None:
    """A median without its spread and count says too little to be shown; some say what cannot be."""
    inside = list(result.values()) if isinstance(result, dict) else result if isinstance(result, list) else []
    if isinstance(result, dict) and "median" in result:
        numbers = [result.get(key) for key in ("low", "median", "high", "n")]
        if any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in numbers):
            return "result", f"got {result!r}, wanted a timing with low, median, high and n"
        low, median, high, n = numbers
        if not (0 < low <= median <= high < math.inf and n >= 1 and n == int(n)):
            return "result", f"got {result!r}, wanted 0 < low <= median <= high and a whole n from 1"
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
