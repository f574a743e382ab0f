"""The laboratory of *DeepSeek, Measured*: what produced a number of the book, or checks an answer of its reader.

Instruments: ``timing``, ``machine``, ``probes``. The ledger: ``claims``. Results of other machines: ``recordings``,
made by ``record`` (``make record``). ``plots`` draws, ``bench`` prints side-by-side timings. ``experiments`` holds
what the chapters and ``record`` run, ``exercises`` the graders, each under the name of its chapter.

It imports :mod:`dslib`, never the other way. Importing ``measured`` alone loads no torch.
"""
