"""One kind of table: header, units and alignment in a browser, the same cells as aligned text everywhere else.

``tables.show(data, caption)`` ends a cell. Browsers get HTML in a container that scrolls by itself and can be reached
by keyboard; terminals, and the comparison of notebooks, get plain text. Both come from the same strings, so what is
compared is what is read. Described in CONTRIBUTING, "Tables and figures".
"""

from __future__ import annotations

import html
import numbers
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from measured.claims_html import prose


@dataclass(frozen=True)
class Table:
    """A table of strings with its caption; the last line of a cell shows it."""

    caption: str
    columns: tuple[str, ...]
    units: tuple[str, ...]  # "" where a column has none
    numeric: tuple[bool, ...]  # a column of numbers stands to the right
    rows: tuple[tuple[str, ...], ...]  # the first cell of a row names it

    def to_html(self) -> str:
        head = "".join(
            f'<th scope="col" style="text-align:{self._side(i)}">{prose(name)}{_unit(self.units[i])}</th>'
            for i, name in enumerate(self.columns)
        )
        body = "\n".join(f"<tr>{''.join(self._cell(i, cell) for i, cell in enumerate(row))}</tr>" for row in self.rows)
        label = html.escape(self.caption.replace("`", ""))
        return (
            f'<div class="table-scroll" role="region" tabindex="0" aria-label="{label}" style="overflow-x:auto">\n'
            f'<table class="table measured"><caption>{prose(self.caption)}</caption>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
        )

    def _side(self, column: int) -> str:
        return "right" if self.numeric[column] else "left"

    def _cell(self, column: int, cell: str) -> str:
        kind = 'th scope="row"' if column == 0 else "td"
        return f'<{kind} style="text-align:{self._side(column)}">{prose(cell)}</{kind[:2]}>'

    def __repr__(self) -> str:
        head = [f"{name} ({unit})" if unit else name for name, unit in zip(self.columns, self.units, strict=True)]
        lines = [head, *self.rows]
        widths = [max(_width(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(_pad(cell, widths[i], self.numeric[i]) for i, cell in enumerate(line)).rstrip() for line in lines
        ]
        return "\n".join([self.caption, *text])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.to_html(), "text/plain": repr(self)}


def show(data: Any, caption: str, units: Mapping[str, str] | None = None, formats: Any = None) -> Table:
    """Make a :class:`Table`.

    Args:
        data: a pandas frame, or what makes one: a mapping from column to values, or a list of mappings. The first
            column names the rows; a frame's index is shown only if it has a name.
        caption: what the table shows, one phrase. Backticks here and in cells mark code.
        units: column -> unit, shown behind the column's name.
        formats: column -> format specification (``".2f"``, ``",.0f"``, ``".0%"``), or one for all columns of numbers.
            Without one, whole numbers get thousands separators and others three digits.

    Raises:
        ValueError: no caption, no rows, or a unit or format for a column that is not there.
    """
    frame = data if isinstance(data, pd.DataFrame) else pd.DataFrame(data)
    if frame.index.names != [None]:
        frame = frame.reset_index()
    columns = [str(name) for name in frame.columns]
    formats = dict.fromkeys(columns, formats) if isinstance(formats, str) else dict(formats or {})
    units = dict(units or {})
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"caption: got {caption!r}, wanted a phrase that says what the table shows")
    if not len(frame) or not columns:
        raise ValueError(f"data: got {len(frame)} rows and {len(columns)} columns, wanted at least one of each")
    if unknown := [name for name in [*units, *formats] if name not in columns]:
        raise ValueError(f"{unknown[0]!r}: not a column of this table, wanted one of {', '.join(columns)}")
    values = list(frame.astype(object).itertuples(index=False, name=None))
    return Table(
        caption=" ".join(caption.split()),
        columns=tuple(columns),
        units=tuple(units.get(name, "") for name in columns),
        numeric=tuple(all(_is_number(row[i]) or row[i] == "" for row in values) for i in range(len(columns))),
        rows=tuple(tuple(_text(v, formats.get(name)) for name, v in zip(columns, row, strict=True)) for row in values),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) and not isinstance(value, bool)


def _text(value: Any, spec: str | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not _is_number(value):
        return "" if value is None else " ".join(re.findall(r"[^ \t\n]+", str(value)))  # no-break spaces stay
    if spec is not None:
        return format(value, spec)
    return f"{value:,}" if isinstance(value, numbers.Integral) else f"{value:.3g}"


def _unit(unit: str) -> str:
    return f' <span class="unit">({html.escape(unit)})</span>' if unit else ""


def _width(text: str) -> int:
    """Columns on a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space
