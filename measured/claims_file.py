"""Reads ``data/claims.yml`` and says exactly where a faulty row is wrong: file, line, row, field.

Kept apart from :mod:`measured.claims` because it is about text and line numbers, not about claims. PyYAML's plain
``safe_load`` forgets where a value stood, so the document is composed into nodes first, which remember.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C where PyYAML has it: faster, and as safe


def read_rows(path: Path, kind: type) -> list[Any]:
    """Rows of the ledger file as instances of ``kind``, a dataclass of pydantic's, in file order.

    Raises:
        ValueError: e.g. ``claims.yml line 41, row 's1.1-04', field 'verdict': got 'bad', Input should be 'holds', …``.
    """
    raw = path.read_bytes()
    try:
        loader = _Loader(raw.decode("utf-8"))
        nodes = list(_row_nodes(path.name, loader.get_single_node()))
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


def _row_nodes(file: str, root: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    entries = root.value if isinstance(root, yaml.MappingNode) else []
    claims = next((value for key, value in entries if key.value == "claims"), None)
    if not isinstance(claims, yaml.SequenceNode):
        raise ValueError(f"{file} line 1, field 'claims': wanted a list of rows under the key 'claims'")
    for node in claims.value:
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{file} line {_line(node)}: got {node.value!r}, wanted a row of fields")
        yield node


def _row(file: str, node: yaml.MappingNode, loader: Any, kind: type) -> Any:
    row: dict[str, Any] = {}
    lines: dict[str, int] = {}
    name = next((v.value for k, v in node.value if k.value == "id"), None)

    def fail(field: str, message: str) -> None:
        where = lines.get(field, _line(node))
        raise ValueError(f"{file} line {where}, row {name!r}, field {field!r}: {message}")

    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            fail("?", "the name of a field has to be a word")
        if key.value in lines:
            fail(key.value, f"given twice, first at line {lines[key.value]}")
        lines[key.value] = _line(key)
        row[key.value] = loader.construct_object(value, deep=True)
    unknown = [field for field in row if field not in kind.__dataclass_fields__]
    if unknown:
        fail(unknown[0], f"unknown field, wanted one of {', '.join(kind.__dataclass_fields__)}")
    try:
        return kind(**row)
    except ValidationError as error:
        fault = error.errors()[0]
        field, *inside = map(str, fault["loc"])
        if fault["type"] == "missing":
            fail(field, "missing")
        message = fault["msg"].replace("tuple", "list")  # as the file has it
        fail(field, f"{': '.join([*inside, 'got'])} {fault['input']!r}, {message}")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
