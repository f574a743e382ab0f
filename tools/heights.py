"""What a built page is made of: ``python -m tools.heights [page …]``, part of ``make lint`` after ``make book``.

A browser lays each page out at 1,280 pixels, and a script adds up the heights that pictures, open code and printed text
take. A page that teaches shows: below 15 % pictures or above 40 % open code, whoever wrote it says why.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools import notebooks

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
LEAST_PICTURES, MOST_CODE = 0.15, 0.40
SCRIPT = """
<script>addEventListener("load", () => {
  const article = document.querySelector("article");
  const height = (selector) => [...article.querySelectorAll(selector)]
    .filter((e) => e.checkVisibility() && !e.parentElement.closest(selector))
    .reduce((sum, e) => sum + e.getBoundingClientRect().height, 0);
  const heights = {all: article.getBoundingClientRect().height, code: height(".cell_input, div.highlight"),
    pictures: height("img, svg, figure"), print: height(".cell_output .output pre, .cell_output table")};
  heights.code -= height(".cell_output div.highlight");
  document.documentElement.setAttribute("data-heights", JSON.stringify(heights));
});</script>"""


def browser():
    """Path of a Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


def heights(page, program, html=HTML):
    """Pixels of a built page by kind: all, code, pictures, print."""
    source = html / f"{page}.html"
    # Beside the page, for its relative links; gone again whatever happens.
    with tempfile.NamedTemporaryFile("w", suffix=".html", dir=source.parent, encoding="utf-8") as copy:
        copy.write(source.read_text(encoding="utf-8").replace("</body>", SCRIPT + "</body>"))
        copy.flush()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1280,1000",
            "--virtual-time-budget=8000",
        ]
        command = [program, *options, "--dump-dom", Path(copy.name).as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'data-heights="([^"]+)"', shown)
    if not found:
        raise RuntimeError(f"{program} did not lay out {source}")
    return json.loads(found[1].replace("&quot;", '"'))


def line(page, found):
    """One line of the report; it ends in what is out of bounds."""
    share = {kind: found[kind] / found["all"] for kind in ("pictures", "code", "print")}
    text = f"{page:28}" + "".join(f" {kind} {value:4.0%}," for kind, value in share.items())
    faults = [f"pictures below {LEAST_PICTURES:.0%}"] * (share["pictures"] < LEAST_PICTURES)
    faults += [f"open code above {MOST_CODE:.0%}"] * (share["code"] > MOST_CODE)
    return f"{text} {found['all']:,.0f} px high" + "".join(f"; {fault}" for fault in faults)


def main(arguments=None):
    names = sys.argv[1:] if arguments is None else arguments
    chapters = notebooks.CHAPTERS
    pages = names or [path.relative_to(chapters).with_suffix("").as_posix() for path in notebooks.find()]
    program = browser()
    if program is None or not HTML.is_dir():
        print("heights of pages: not measured,", "no Chromium here" if program is None else "no built book (make book)")
        return 0
    for page in pages:
        if (HTML / "chapters" / f"{page}.html").is_file():
            print(line(page, heights(f"chapters/{page}", program)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
