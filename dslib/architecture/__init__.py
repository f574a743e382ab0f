"""The systems the book builds: the V1 decoder and, chapter by chapter, what the article calls V2 and V3.

Book: ``chapters/architecture``.
"""
