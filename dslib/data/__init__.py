"""What the chapters run on: real weights and real text, found without a network where possible.

Book: used by every chapter. Origins and licences: ``data/README.md``.
"""
