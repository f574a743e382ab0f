"""What the Makefile runs: set-up, notebooks, tests and the HTML book. Part of neither package."""
