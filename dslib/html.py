"""Small HTML tables for notebook output. (The built book does not render Markdown tables in outputs.)"""

from __future__ import annotations

import html
from collections.abc import Sequence


def html_table(caption: str, rows: Sequence[tuple[str, str]]) -> str:
    """A captioned table of label and value; the labels are row headings, for a screen reader too."""
    cell = 'style="text-align:left;padding:.15em .9em"'
    body = "".join(
        f'<tr><th scope="row" {cell}>{html.escape(label)}</th><td {cell}>{html.escape(value)}</td></tr>'
        for label, value in rows
    )
    title = f'<caption style="caption-side:top;text-align:left">{html.escape(caption)}</caption>' if caption else ""
    # The class is the one pandas uses: notebooks and the book's theme style it in light and dark mode.
    return f'<table class="dataframe" style="margin-left:0">{title}<tbody>{body}</tbody></table>'
