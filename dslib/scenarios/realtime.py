"""Serving in real time. Read in this order:

1. :mod:`dslib.scenarios.serving.blocks`: the cache in pieces, who holds which, and equal beginnings;
2. :mod:`dslib.scenarios.serving.scheduler`: who takes part in a step, and with how many tokens;
3. :mod:`dslib.scenarios.serving.engine`: requests in, tokens out;
4. :mod:`dslib.scenarios.serving.runner`, ``words``, ``protocol`` and ``server``: the engine in a thread, tokens as
   text, and the address that ``python -m dslib.serve`` opens. They need ``dslib[serve]`` and are not imported here.

Book: ``chapters/scenarios/realtime.ipynb``, where the same stands in forty plain lines.
"""

from dslib.scenarios.serving.blocks import BlockPool as BlockPool
from dslib.scenarios.serving.blocks import PagedCache as PagedCache
from dslib.scenarios.serving.engine import Engine as Engine
from dslib.scenarios.serving.engine import Event as Event
from dslib.scenarios.serving.engine import QueueFull as QueueFull
from dslib.scenarios.serving.engine import Request as Request
from dslib.scenarios.serving.scheduler import Scheduler as Scheduler
