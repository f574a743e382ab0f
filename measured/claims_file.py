"""Reads ``data/claims.yml`` and says exactly where a faulty row is wrong: file, line, row, field.

Kept apart from :mod:`measured.claims` because it is about text and line numbers, not about claims. PyYAML's plain
``safe_load`` forgets where a value stood, so the document is composed into nodes first, which remember.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C where PyYAML has it: faster, and as safe
_REQUIRED = ("id", "chapter", "said", "value", "checks", "verdict", "because", "evidence", "sources")
_OPTIONAL = ("found",)


def read_rows(path: Path, words: Mapping[str, Collection[str]]) -> list[dict[str, Any]]:
    """Rows of the ledger file as keyword arguments of :class:`measured.claims.Claim`, in file order.

    ``words`` are the words that the fields ``verdict``, ``checks`` and ``part`` (of the chapter) may use.

    Raises:
        ValueError: e.g. ``claims.yml line 41, row 's1.1-04', field 'verdict': got 'false', wanted one of ...``.
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path.name} line {line}: not UTF-8 text") from error
    try:
        loader = _Loader(text)
        rows = [_row(path.name, node, loader, words) for node in _row_nodes(path.name, loader.get_single_node())]
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path.name}{where}: not valid YAML: {problem or error}") from error
    first_at: dict[str, int] = {}
    for row in rows:
        if row["id"] in first_at:
            where = f"{path.name} line {row['line']}, row {row['id']!r}, field 'id'"
            raise ValueError(f"{where}: already used at line {first_at[row['id']]}")
        first_at[row["id"]] = row["line"]
    return rows


def _row_nodes(file: str, root: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    entries = root.value if isinstance(root, yaml.MappingNode) else []
    claims = next((value for key, value in entries if key.value == "claims"), None)
    if not isinstance(claims, yaml.SequenceNode):
        raise ValueError(f"{file} line 1, field 'claims': wanted a list of rows under the key 'claims'")
    for node in claims.value:
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{file} line {_line(node)}: got {node.value!r}, wanted a row of fields")
        yield node


def _row(file: str, node: yaml.MappingNode, loader: Any, words: Mapping[str, Collection[str]]) -> dict[str, Any]:
    row: dict[str, Any] = {"line": _line(node)}
    lines: dict[str, int] = {}
    name = next((v.value for k, v in node.value if k.value == "id"), None)

    def fail(field: str, message: str) -> None:
        where = lines.get(field, row["line"])
        raise ValueError(f"{file} line {where}, row {name!r}, field {field!r}: {message}")

    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            fail("?", "the name of a field has to be a word")
        if key.value in lines:
            fail(key.value, f"given twice, first at line {lines[key.value]}")
        lines[key.value] = _line(key)
        if key.value not in _REQUIRED + _OPTIONAL:
            fail(key.value, f"unknown field, wanted one of {', '.join(_REQUIRED + _OPTIONAL)}")
        row[key.value] = loader.construct_object(value, deep=True)
    for field in _REQUIRED:
        if field not in row:
            fail(field, "missing")
    _check_fields(row, fail, words)
    return row


def _check_fields(row: dict[str, Any], fail: Any, words: Mapping[str, Collection[str]]) -> None:
    for field in ("id", "chapter", "said", "verdict", "because", "evidence"):
        if not isinstance(row[field], str) or not row[field].strip():
            fail(field, f"got {row[field]!r}, wanted text")
    if row["value"] is not None and not isinstance(row["value"], str):
        fail("value", f"got {row['value']!r}, wanted text in quotes, or null")
    if not re.fullmatch(r"[a-z0-9][A-Za-z0-9.-]*", row["id"]):
        fail("id", f"got {row['id']!r}, wanted letters, digits, dots and dashes")
    if not re.fullmatch(rf"({'|'.join(words['part'])})/[a-z0-9_]+", row["chapter"]):
        fail("chapter", f"got {row['chapter']!r}, wanted part/chapter with part one of {', '.join(words['part'])}")
    if row["verdict"] not in words["verdict"]:
        fail("verdict", f"got {row['verdict']!r}, wanted one of {', '.join(words['verdict'])}")
    if not re.fullmatch(r"pending|claim-[A-Za-z0-9-]+", row["evidence"]):
        fail("evidence", f"got {row['evidence']!r}, wanted 'pending' or a cell id such as 'claim-s1-1-04'")
    for field in ("checks", "sources"):
        if not isinstance(row[field], list) or not all(isinstance(item, str) for item in row[field]):
            fail(field, f"got {row[field]!r}, wanted a list of names")
        row[field] = tuple(row[field])
    unknown = [item for item in row["checks"] if item not in words["checks"]]
    if unknown or not row["checks"]:
        fail("checks", f"got {list(row['checks'])}, wanted one or more of {', '.join(words['checks'])}")
    if "found" in row:
        row["found"] = _found(row["found"], fail)


def _found(found: Any, fail: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or not found:
        fail("found", f"got {found!r}, wanted quantity: value pairs")
    result = {}
    for name, value in found.items():
        if not isinstance(name, str) or not name.isidentifier():
            fail("found", f"got the quantity name {name!r}, wanted a Python name")
        if isinstance(value, list):
            numbers = [v for v in value if isinstance(v, int | float) and not isinstance(v, bool)]
            if len(value) != 2 or len(numbers) != 2 or value[0] > value[1]:
                fail("found", f"{name}: got {value!r}, wanted [low, high]")
            value = tuple(value)
        elif not isinstance(value, bool | int | float | str):
            fail("found", f"{name}: got {value!r}, wanted a number, a truth value, text or [low, high]")
        result[name] = value
    return result


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
