"""What comes next, and how far one may trust who says so.

Book: ``chapters/roadmap``.
"""
