"""What the Makefile runs: set-up, notebooks, tests and the HTML book. Not part of dslib."""
