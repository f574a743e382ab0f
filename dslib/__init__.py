"""The library behind the notebook book *DeepSeek, Measured*.

One package a part of the book, one module a chapter, with the same names. Importing ``dslib`` alone loads no torch:
the ledger, the cost model and the selector have to work where torch is absent.
"""

__version__ = "0.1.0"
