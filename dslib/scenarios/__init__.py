"""Putting models to use: pictures in, answers out, and what goes wrong on the way.

Book: ``chapters/scenarios``.
"""
