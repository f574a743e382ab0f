"""The library behind the notebook book *DeepSeek, Measured*: what a reader studies, and can take into another project.

One package a part of the book, one module a chapter, with the same names; where a chapter has more than one, the
first one's docstring lists the others. Who measured what, and with what, is in :mod:`measured`. Importing ``dslib``
alone loads no torch: the roofline, the cost model and the selector have to work where torch is absent.
"""

__version__ = "0.1.0"
