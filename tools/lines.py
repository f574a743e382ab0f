"""Lines of Python beside their budgets: ``python -m tools.lines``, part of ``make lint``.

Budgets make us choose. A line counts wherever it stands, docstrings included; none may get denser for them.
"""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = {"dslib": 7_000, "dslib/architecture": 3_000, "measured": 6_000, "tests": 9_500}
MOST = 260  # of a module that a chapter teaches from


def lines(folder: str) -> dict[str, int]:
    """Lines of each tracked Python file below a folder of the repository."""
    listed = subprocess.run(["git", "ls-files", f"{folder}/*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name: (ROOT / name).read_text(encoding="utf-8").count("\n") for name in listed.stdout.split()}


def main() -> None:
    for folder, budget in BUDGETS.items():
        print(f"{folder:20} {sum(lines(folder).values()):6,} lines, budget {budget:6,}")
    for name, count in lines("dslib").items():
        if count > MOST:
            print(f"{name}: {count} lines, more than {MOST}")


if __name__ == "__main__":
    main()
