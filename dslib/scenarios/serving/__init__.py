"""A serving engine in three files, in reading order: blocks, scheduler, engine. See :mod:`dslib.scenarios.realtime`."""
