"""A Sphinx extension: the bibliography lists its entries by key, the name by which the ledger and the data files cite.

Used by _config.yml. Entries are sorted by key, and each can be linked to as `bibliography.html#<key with dashes>`.
"""

from pybtex.plugin import register_plugin
from pybtex.style.formatting.unsrt import Style
from pybtex.style.labels import BaseLabelStyle
from pybtex.style.sorting import BaseSortingStyle


class KeyLabels(BaseLabelStyle):
    def format_labels(self, sorted_entries):
        return [entry.key for entry in sorted_entries]


class KeyOrder(BaseSortingStyle):
    def sorting_key(self, entry):
        return entry.key.lower()


class KeyStyle(Style):
    default_label_style = KeyLabels
    default_sorting_style = KeyOrder


def setup(_app):
    register_plugin("pybtex.style.formatting", "keys", KeyStyle)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
