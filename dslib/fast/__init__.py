"""The same results sooner. Nothing here changes what is computed beyond rounding; tests hold each to the plain way.

*Kernels* know tensors only, and the architecture stands on them: ``exact``, ``linear``, ``experts``, ``int4_kernels``,
``int4_rows``, ``int8``. *Paths* know our models and stand above them: ``token_step``, ``cuda_graph``, ``fused_step``,
``scoring``.
"""
