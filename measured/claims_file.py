"""Reads ``data/claims.yml`` and says exactly where a faulty row is wrong: file, line, row, field.

Kept apart from :mod:`measured.claims` because it is about text and line numbers, not about claims. PyYAML's plain
``safe_load`` forgets where a value stood, and lets the last of two equal keys win, so the document is composed into
nodes first, which remember.
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C where PyYAML has it: faster, and as safe
DEEPEST = 8  # claims, row, found, range are four; the loader in C would crash at some ten thousand


def read_rows(path: Path, kind: type) -> list[Any]:
    """Rows of the ledger file as instances of ``kind``, a dataclass of pydantic's, in file order.

    Raises:
        ValueError: e.g. ``claims.yml line 41, row 's1.1-04', field 'verdict': got 'bad', Input should be 'holds', …``.
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
        _check_depth(path.name, text)
        loader = _Loader(text)
        nodes = _row_nodes(path.name, loader.get_single_node())
        rows = [_row(path.name, node, loader, kind) for node in nodes]
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path.name} line {line}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path.name}{where}: not valid YAML: {problem or error}") from error
    first_at: dict[str, int] = {}
    for row, node in zip(rows, nodes, strict=True):
        if row.id in first_at:
            where = f"{path.name} line {_line(node)}, row {row.id!r}, field 'id'"
            raise ValueError(f"{where}: already used at line {first_at[row.id]}")
        first_at[row.id] = _line(node)
    return rows


def _check_depth(file: str, text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"{file} line {_line(event)}: nested {depth} deep, wanted at most {DEEPEST}")


def _row_nodes(file: str, root: yaml.Node | None) -> list[yaml.MappingNode]:
    entries = _entries(root, file) if isinstance(root, yaml.MappingNode) else {}
    claims = entries.get("claims", (None, None))[1]
    if list(entries) != ["claims"] or not isinstance(claims, yaml.SequenceNode):
        raise ValueError(f"{file} line 1, field 'claims': wanted a list of rows under the key 'claims', nothing else")
    for node in claims.value:
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{file} line {_line(node)}: got {node.value!r}, wanted a row of fields")
    return claims.value


def _row(file: str, node: yaml.MappingNode, loader: Any, kind: type) -> Any:
    name = next((value.value for key, value in node.value if key.value == "id"), None)
    entries = _entries(node, file, f", row {name!r}")

    def fail(field: str, message: str) -> None:
        line = _line(entries[field][0] if field in entries else node)
        raise ValueError(f"{file} line {line}, row {name!r}, field {field!r}: {message}")

    row = {}
    for field, (_, value) in entries.items():
        if field not in kind.__dataclass_fields__:
            fail(field, f"unknown field, wanted one of {', '.join(kind.__dataclass_fields__)}")
        try:
            row[field] = loader.construct_object(value, deep=True)
        except yaml.YAMLError:
            raise
        except Exception as error:  # PyYAML lets out what int(), date() and the like say: no such day, too many digits
            fail(field, f"got {value.value!r}: {error}")
        if isinstance(value, yaml.MappingNode):
            _entries(value, file, f", row {name!r}, field {field!r}")
    try:
        return kind(**row)
    except ValidationError as error:
        fault = error.errors()[0]
        field, *inside = map(str, fault["loc"])
        if fault["type"] == "missing":
            fail(field, "missing")
        message = fault["msg"].replace("tuple", "list")  # as the file has it
        fail(field, f"{': '.join([*inside, 'got'])} {fault['input']!r}, {message}")


def _entries(node: yaml.MappingNode, file: str, place: str = "") -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Key and value by the key's text. Raises for a key that is no word, or that comes twice."""
    found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        where = f"{file} line {_line(key)}{place}"
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{where}, field '?': the name of a field has to be a word")
        if key.value in found:
            raise ValueError(f"{where}, field {key.value!r}: given twice, first at line {_line(found[key.value][0])}")
        found[key.value] = key, value
    return found


def _line(node: yaml.Node | yaml.Event) -> int:
    return node.start_mark.line + 1
