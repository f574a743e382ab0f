"""What stands under a chapter's title: number, minutes, what one can do afterwards, what one needs first, run time.

`make refresh` writes it from `chapters/pages.yml`, from the order of the contents and from the page itself, between the
run markers of the title cell; the plan for workshops on the page for teachers is made of the same figures.
"""

import datetime
import os
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
MARKERS = "<!-- run:begin --><!-- run:end -->"
BLOCK = re.compile(r"<!-- run:begin -->.*?<!-- run:end -->", re.DOTALL)
RUN = re.compile(r"Runs in (\d+) s with ([\d.]+) GiB on a (\d+)-core CPU\. Last executed: (\d{4}-\d\d-\d\d)\.")
FOLDED = {"setup", "hide-input", "hide-cell", "remove-cell", "exercise", "solution"}
# What a reader who follows takes; measured on nobody, so pages say "about" and round to five minutes.
WORDS, LINES, DISPLAYS, EXERCISE = 200, 12, 3, 5  # words, lines of code, formulas and outputs a minute; minutes for one


def settings():
    """`chapters/pages.yml`: pages, parts and plans."""
    return yaml.safe_load((ROOT / "chapters" / "pages.yml").read_text(encoding="utf-8"))


def pages():
    """The pages of `chapters/pages.yml`, page -> {"able": [...], "needs": [...]}."""
    return settings()["pages"]


def numbers():
    """Chapter numbers by page, in the order of the contents; the parts Start and Reference have none."""
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    chapters = [c["file"] for part in parts if part["caption"] not in ("Start", "Reference") for c in part["chapters"]]
    return {page.removeprefix("chapters/"): number for number, page in enumerate(chapters, 1)}


def source_of(root, page):
    """The source file of `page`, a notebook before Markdown, or None."""
    candidates = [root / f"{page}{suffix}" for suffix in (".ipynb", ".md")]
    return next((path for path in candidates if path.is_file()), None)


def title_of(page):
    """The title of a page, from its first line, and the suffix of its file."""
    path = source_of(ROOT / "chapters", page)
    if path is None:
        raise ValueError(f"chapters/pages.yml names {page!r}, but there is no such page below chapters/")
    return re.search(r"# ([^\n\"\\]+)", path.read_text(encoding="utf-8")).group(1).strip(), path.suffix


def minutes(cells):
    """Minutes for reading these cells, and for their exercises, as two numbers."""
    reading = exercises = 0.0
    for cell in cells:
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type == "markdown":
            text = re.sub(r"<!--.*?-->|\]\([^)]*\)", " ", BLOCK.sub(" ", cell.source), flags=re.DOTALL)
            reading += len(re.findall(r"\w+", text)) / WORDS + text.count("$$") / 2 / DISPLAYS
        elif "exercise" in tags:
            exercises += EXERCISE
        else:
            reading += 0 if tags & FOLDED else len(cell.source.splitlines()) / LINES
            reading += bool(cell.get("outputs") and not tags & {"solution", "hide-output", "hide-cell"}) / DISPLAYS
    return reading, exercises


def sections(notebook):
    """(heading, minutes with exercises) of each second-level section, the title's own first."""
    found = [["", []]]
    for cell in notebook.cells:
        heading = re.search(r"^## (.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
        if heading:
            found.append([heading.group(1).strip(), []])
        found[-1][1].append(cell)
    return [(heading, sum(minutes(cells))) for heading, cells in found]


def run_of(notebook):
    """(seconds, GiB, cores, date) as the title cell has them, or None."""
    found = RUN.search(notebook.cells[0].source if notebook.cells else "")
    return (int(found[1]), float(found[2]), int(found[3]), found[4]) if found else None


def block(notebook, run, page=None):
    """The text between the markers. `run` as `run_of` gives it; `page` as in pages.yml, if it is a page of the book."""
    seconds, gib, cores, date = run
    line = f"Runs in {seconds:.0f} s with {gib:.1f} GiB on a {cores}-core CPU. Last executed: {date}."
    entry = pages().get(page)
    if not entry:
        return f"*{line}*"
    reading, exercises = (max(5, 5 * round(value / 5)) for value in minutes(notebook.cells))
    number = f"Chapter {numbers()[page]}. " if page in numbers() else ""
    lines = [
        f"*{number}About {reading} minutes, exercises {exercises} more. {line}*",
        "",
        "**You will be able to**",
        "",
    ]
    lines += [f"- {text}" for text in entry["able"]]
    if needs := [_link(need, page) for need in entry["needs"]]:
        lines += ["", f"**You need first:** {'; '.join(needs)}."]
    return "\n".join(lines)


def between(text, name, block):
    """`text` with `block` between the markers called `name`."""
    markers = re.compile(rf"(<!-- {name}:begin -->).*?(<!-- {name}:end -->)", re.DOTALL)
    if not markers.search(text):
        raise ValueError(f"no markers <!-- {name}:begin --> and <!-- {name}:end -->")
    return markers.sub(lambda found: f"{found[1]}\n{block}\n{found[2]}", text)


def title_cell(notebook, run, page=None):
    """The source of the title cell with the block in it."""
    source = notebook.cells[0].source
    source = source if BLOCK.search(source) else f"{source.rstrip()}\n\n{MARKERS}"
    return between(source, "run", block(notebook, run, page))


def fill(notebook, run, page=None):
    """Write the block into the title cell, in place."""
    notebook.cells[0].source = title_cell(notebook, run, page)


def page_of(path):
    """`architecture/cache` for its notebook; None for a notebook that lies elsewhere."""
    path = Path(path).resolve()
    chapters = ROOT / "chapters"
    return path.relative_to(chapters).with_suffix("").as_posix() if path.is_relative_to(chapters) else None


def today():
    return datetime.date.today().isoformat()


def _link(need, page):
    if not re.fullmatch(r"[a-z]+/\w+", need):
        return need  # words, and not a page
    title, suffix = title_of(need)
    return f"[{title}]({os.path.relpath(need + suffix, os.path.dirname(page))})"
