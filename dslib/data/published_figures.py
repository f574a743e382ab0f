"""Quote a published figure together with its source, so that no chapter carries one by hand.

``data/published.yml`` holds what DeepSeek published; :func:`figure` returns one entry::

    >>> figure("deepseek_v3", "params_total")
    671B parameters [deepseek_v3, p. 1, primary]

Plain Python and PyYAML only.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from dslib.data.files import data_path

TIERS = ("primary", "secondary", "derived", "unverified")


@dataclass(frozen=True)
class Figure:
    """A published value: a number, text, truth value, None, or a tuple of them (one for each variant of the model).

    ``source`` are keys of references.bib; ``tier`` says how close to DeepSeek the source is (:data:`TIERS`).
    """

    value: Any
    unit: str
    source: tuple[str, ...]
    tier: str
    at: str = ""
    note: str = ""

    def __str__(self) -> str:
        """The value as one writes it: ``671B parameters``, ``30 / 95``."""
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        return " / ".join(_short(value) for value in values) + (f" {self.unit}" if self.unit else "")

    def __repr__(self) -> str:
        where = ", ".join([*self.source, *([self.at] if self.at else []), self.tier])
        return f"{self} [{where}]"

    def _repr_markdown_(self) -> str:
        return (
            f"{self} ({', '.join(f'`{key}`' for key in self.source)}{', ' + self.at if self.at else ''}; {self.tier})"
        )


def figure(entry: str, name: str) -> Figure:
    """The figure ``name`` of a model, e.g. ``("deepseek_v3", "layers")``, or of ``serving``, ``sampling_advice``.

    Raises:
        ValueError: naming the unknown entry or figure and the nearest known ones.
    """
    known = entries()
    figures = known[entry] if entry in known else _unknown("entry", entry, known)
    return figures[name] if name in figures else _unknown(f"figure of {entry}", name, figures)


def entries() -> dict[str, dict[str, Figure]]:
    """Every figure, by entry and name. Read once."""
    return _read(data_path("published.yml"))


def hub_ids() -> dict[str, tuple[str, ...]]:
    """Names on the Hugging Face hub under which each model is published, by entry (if it has any)."""
    models = _document(data_path("published.yml"))["models"]
    return {entry: tuple(model["hub_ids"]) for entry, model in models.items() if model.get("hub_ids")}


@lru_cache(maxsize=4)
def _document(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=4)
def _read(path: Path) -> dict[str, dict[str, Figure]]:
    try:
        document = _document(path)
        raw = {**document["models"], **{key: value for key, value in document.items() if key != "models"}}
        figures = {entry: dict(fields["figures"]) for entry, fields in raw.items()}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"{path.name} line {line}: not valid YAML: {error.problem}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name}: wanted 'models' and entries with 'figures' each; {error!r}") from error
    return {
        entry: {name: _figure(f"{path.name}, {entry}, figure {name!r}", row) for name, row in rows.items()}
        for entry, rows in figures.items()
    }


def _figure(where: str, row: Any) -> Figure:
    if not isinstance(row, dict) or not {"value", "source", "tier"} <= set(row):
        raise ValueError(f"{where}: got {row!r}, wanted value, source and tier")
    if row["tier"] not in TIERS:
        raise ValueError(f"{where}, field 'tier': got {row['tier']!r}, wanted one of {', '.join(TIERS)}")
    value = tuple(row["value"]) if isinstance(row["value"], list) else row["value"]
    source = row["source"] if isinstance(row["source"], list) else [row["source"]]
    return Figure(value, row.get("unit", ""), tuple(source), row["tier"], str(row.get("at", "")), row.get("note", ""))


def _short(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "not stated" if value is None else str(value)
    for factor, letter in ((1e12, "T"), (1e9, "B")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{letter}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.10g}"


def _unknown(what: str, name: str, known: dict[str, Any]) -> Any:
    near = get_close_matches(str(name), known, n=3, cutoff=0.3) or sorted(known)[:8]
    raise ValueError(f"{what}: got {name!r}, which data/published.yml does not have; nearest: {', '.join(near)}")
