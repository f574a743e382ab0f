"""Cards of the front page and plans for workshops, from the chapters themselves: ``python -m tools.plans``.

Minutes are those of the opening blocks (tools/opening.py). Writes between markers in `index.md` and in
`chapters/start/teach.md`; `chapters/pages.yml` says what a part is about, and which sections a plan takes.
"""

from pathlib import Path

import yaml

from measured import exercises
from tools import draw_curve, notebooks, opening

ROOT = Path(__file__).resolve().parents[1]


def notebook(page):
    return notebooks.read(notebooks.CHAPTERS / f"{page}.ipynb")


def hours(minutes):
    return f"{5 * round(minutes / 5)} minutes" if minutes < 90 else f"{minutes / 60:.0f} hours"


def cards():
    """One card for each part that pages.yml describes: chapters, time, difficulty."""
    toc, parts = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")), opening.settings()["parts"]
    lines = ["::::{grid} 1 1 2 2", ":gutter: 3"]
    for part in toc["parts"]:
        about = parts.get(part["caption"])
        if not about:
            continue
        pages = [chapter["file"].removeprefix("chapters/") for chapter in part["chapters"]]
        time = sum(sum(opening.minutes(notebook(page).cells)) for page in pages)
        titles = ", ".join(f"[{opening.title_of(page)[0]}](chapters/{page}.ipynb)" for page in pages)
        count = f"{len(pages)} chapter{'s' * (len(pages) > 1)}"
        lines += ["", f":::{{grid-item-card}} {part['caption']}", about["about"], "", titles + ".", ""]
        lines += [f"*{count}, about {hours(time)} with exercises. {about['level']}*", ":::"]
    return "\n".join([*lines, "::::"])


def plan(name):
    """A table of the sections that a plan takes, with minutes, and their sum."""
    lines, total = ["| chapter | section | minutes |", "|---|---|---:|"], 0
    for page, wanted in opening.settings()["plans"][name].items():
        title, found = opening.title_of(page)[0], dict(opening.sections(notebook(page)))
        for section in wanted:
            if section not in found:
                raise ValueError(f"chapters/pages.yml, plan {name!r}: {page} has no section {section!r}")
            minutes = max(1, round(found[section]))
            total += minutes
            chapter = f"[{title}](../{page}.ipynb)" if section == wanted[0] else ""
            lines.append(f"| {chapter} | {section} | {minutes} |")
    return "\n".join([*lines, f"| | all | {total} |"]), total


def mistakes():
    """What the graders of the planned chapters know: exercise, and the hints for two usual mistakes."""
    plans = opening.settings()["plans"].values()
    chapters = {page.split("/")[1] for plan in plans for page in plan}
    lines = ["| exercise | who makes a usual mistake is told |", "|---|---|"]
    for exercise in exercises.all_exercises():
        if exercise.name.split("/")[0] in chapters:
            hints = [hint for _, hint in exercise.wrong_answers()][:2]
            lines.append(f"| `{exercise.name}` | {' — '.join(hints)} |".replace("$", "\\$"))
    return "\n".join(lines)


def written():
    """Path -> what it should hold."""
    index, teach = ROOT / "index.md", ROOT / "chapters" / "start" / "teach.md"
    text = teach.read_text(encoding="utf-8")
    for name in opening.settings()["plans"]:
        text = opening.between(text, name, plan(name)[0])
    text = opening.between(text, "mistakes", mistakes())
    front = opening.between(index.read_text(encoding="utf-8"), "parts", cards())
    return {index: opening.between(front, "model", draw_curve.said()), teach: text}


def main():
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
