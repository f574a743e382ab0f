"""Build the HTML book and make sure that what was built is whole.

    python -m tools.book check     before: every page of the contents is written and run, no chapter is left out
    python -m tools.book build     check, build with every Sphinx warning an error, verify the HTML, name the page

`verify` reads the HTML that came out: pages, internal links and anchors, text alternatives, requests to other hosts.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from bs4 import BeautifulSoup

from tools import notebooks
from tools.opening import source_of

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
MIN_WORDS = 120  # of prose: less is a heading with an intention under it
UNWRITTEN = re.compile(r"\b(?:TODO|FIXME|TBD|XXX|lorem ipsum|placeholder|to be written|coming soon)\b", re.IGNORECASE)
# Hosts a page may fetch from while it loads. Empty: the book reads the same offline. Links a reader clicks are free.
ALLOWED_HOSTS = frozenset()
# Elements that make a browser fetch something as the page loads, and the attribute that says what.
FETCHING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src",
            "embed": "src", "object": "data", "image": "href", "use": "href"}  # fmt: skip
FETCHING_LINKS = {"stylesheet", "preload", "modulepreload", "prefetch", "icon", "shortcut", "manifest", "preconnect"}
WIDGET_STATE = "application/vnd.jupyter.widget"


# ---------------------------------------------------------------- before the build


def toc_pages(toc):
    """Page names of a parsed _toc.yml, in reading order, root first."""
    pages = [toc["root"]]
    stack = [*toc.get("parts", []), *toc.get("chapters", []), *toc.get("sections", [])]
    while stack:
        entry = stack.pop(0)
        if "file" in entry:
            pages.append(entry["file"])
        stack = [*entry.get("chapters", []), *entry.get("sections", []), *stack]
    return pages


def prose_of(path):
    """The text of a page without code, mark-up comments and directive lines."""
    if path.suffix == ".ipynb":
        text = "\n\n".join(cell.source for cell in notebooks.read(path).cells if cell.cell_type == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    text = re.sub(r"<!--.*?-->|^(```+|~~~+).*?^\1", " ", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^\s*(?::{3,}|```).*$", " ", text, flags=re.MULTILINE)


def check_sources(root=ROOT):
    """Yield what is wrong with the book's sources below `root`, one sentence each."""
    pages = toc_pages(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8")))
    sources = {page: source_of(root, page) for page in pages}
    for page in sorted({page for page in pages if pages.count(page) > 1}):
        yield f"_toc.yml names {page} more than once"
    for page, path in sources.items():
        if path is None:
            yield f"_toc.yml names {page}, but there is no {page}.ipynb or {page}.md"
            continue
        prose = prose_of(path)
        if len(re.findall(r"\w+", prose)) < MIN_WORDS:
            yield f"{page} is not written: fewer than {MIN_WORDS} words of prose"
        if found := UNWRITTEN.search(prose):
            yield f"{page} is not finished: it says {found.group()!r}"
        if path.suffix == ".ipynb":
            notebook = notebooks.read(path)
            for problem in [*notebooks.check_executed(notebook), *notebooks.check_outputs_present(notebook)]:
                yield f"{page}: {problem}"
    known = {path for path in sources.values() if path}
    for path in sorted([*(root / "chapters").rglob("*.ipynb"), *(root / "chapters").rglob("*.md")]):
        if path not in known and ".ipynb_checkpoints" not in path.parts:
            yield f"{path.relative_to(root)} is not in _toc.yml"


# ---------------------------------------------------------------- the build


def run_jupyter_book(root=ROOT):
    """Build from nothing, so that no warning hides in a cache. Returns (exit status, log)."""
    shutil.rmtree(root / "_build" / "html", ignore_errors=True)
    shutil.rmtree(root / "_build" / ".doctrees", ignore_errors=True)
    # Not the jupyter-book script: its first line names the folder it was installed in, which may have been moved.
    start = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "build", str(root), "--all", "-W", "-n", "--keep-going"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def warnings_in(log):
    """Warning and error lines of a build log: jupyter-book has returned 0 with some of them."""
    log = re.sub(r"\x1b\[[0-9;]*m", "", log)
    return [line for line in log.splitlines() if re.search(r"\b(?:WARNING|ERROR|CRITICAL):", line)]


# ---------------------------------------------------------------- after the build


def check_html(html=HTML, pages=()):
    """Yield what is wrong with the built book in folder `html`; `pages` have to be in it."""
    for page in pages:
        if not (html / f"{page}.html").is_file():
            yield f"{page}.html was not built"
    soups = {path.resolve(): BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
             for path in sorted(html.rglob("*.html")) if "_static" not in path.relative_to(html).parts}  # fmt: skip
    anchors = {path: {tag[key] for key in ("id", "name") for tag in soup.find_all(attrs={key: True})}
               for path, soup in soups.items()}  # fmt: skip
    for path, soup in soups.items():
        name = path.relative_to(html.resolve())
        yield from (f"{name}: {problem}" for problem in _check_images(soup))
        yield from (f"{name}: {problem}" for problem in _check_requests(soup))
        yield from (f"{name}: {problem}" for problem in _check_links(soup, path, html.resolve(), anchors))
        if WIDGET_STATE in str(soup):
            yield f"{name}: holds widget state"
    for path in sorted(html.rglob("*.css")):
        css = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8", errors="replace"), flags=re.DOTALL)
        for address in re.findall(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", css):
            if urlsplit(address).hostname not in ALLOWED_HOSTS:
                yield f"{path.relative_to(html)}: fetches {address}"


def _check_images(soup):
    for image in soup.find_all("img"):
        if not (image.get("alt") or "").strip() or re.fullmatch(r"(?:\.\./)*_images/\S+", image["alt"]):
            yield f"an image has no text alternative: {str(image)[:90]}"
    for drawing in soup.find_all("svg"):
        hidden = drawing.get("aria-hidden") == "true" or drawing.find_parent(attrs={"aria-hidden": "true"})
        if not (hidden or drawing.get("aria-label") or drawing.get("aria-labelledby") or drawing.find("title")):
            yield f"a drawing has no text alternative: {str(drawing)[:90]}"


def _check_requests(soup):
    for tag in soup.find_all([*FETCHING, "link"]):
        if tag.name == "link":
            address = tag.get("href") if FETCHING_LINKS & set(tag.get("rel", [])) else None
        else:
            address = tag.get(FETCHING[tag.name]) or tag.get("xlink:href")
        host = urlsplit(address or "").hostname
        if host and host not in ALLOWED_HOSTS:
            yield f"fetches {address}"
    for script in soup.find_all("script", src=False):
        kind = script.get("type", "text/javascript")
        for address in re.findall(r"""["'](https?://[^"']+\.js[^"']*)["']""", script.string or ""):
            if "javascript" in kind or kind == "module":
                yield f"a script names {address}"


def _check_links(soup, path, html, anchors):
    for link in soup.find_all("a", href=True):
        target = urlsplit(link["href"])
        if target.scheme or target.netloc or link["href"] in ("", "#"):
            continue
        file = (path.parent / unquote(target.path)).resolve() if target.path else path
        if not file.is_relative_to(html) or not file.is_file():
            yield f"broken link: {link['href']}"
        elif target.fragment and file in anchors and unquote(target.fragment) not in anchors[file]:
            yield f"broken link, no such anchor: {link['href']}"


def complain(title, problems):
    """Print `problems` under `title`; returns how many there are."""
    if problems:
        print(f"{title}:", *(f"  - {problem}" for problem in problems), sep="\n", file=sys.stderr)
    return len(problems)


def build(root=ROOT):
    """Check, build, verify. Returns the exit status."""
    start = time.perf_counter()
    if complain("The book was not built; its sources are not ready", list(check_sources(root))):
        return 1
    print("building the book ...", flush=True)
    status, log = run_jupyter_book(root)
    found = warnings_in(log)
    if status or found:
        print(log[-6000:], file=sys.stderr)
        complain("Sphinx warned", found)
        print(f"The book was not built: jupyter-book ended with status {status}.", file=sys.stderr)
        return status or 1
    pages = toc_pages(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8")))
    html = root / "_build" / "html"
    if complain("The book was built, but not whole", list(check_html(html, pages))):
        return 1
    print(f"built and checked {len(pages)} pages in {time.perf_counter() - start:.0f} s")
    print(f"open {(html / 'index.html').as_uri()}")
    return 0


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["check"]:
        return min(1, complain("The sources are not ready", list(check_sources())))
    if arguments == ["build"]:
        return build()
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
