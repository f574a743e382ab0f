"""Generating, training, evaluating and pricing, and the measurements that belong to them.

Book: ``chapters/performance``.
"""
