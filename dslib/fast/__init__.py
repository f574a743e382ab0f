"""The same results sooner: ``report = fast.prepare(model)``, ``print(fast.describe(model))``, ``fast.release(model)``.

Everything here computes what a module of :mod:`dslib.architecture` computes, and is tested against it. Nothing in
``architecture`` knows of it.
"""

from dslib.fast.prepared import Report as Report
from dslib.fast.prepared import describe as describe
from dslib.fast.prepared import is_prepared as is_prepared
from dslib.fast.prepared import prepare as prepare
from dslib.fast.prepared import release as release
