"""One thing asked of many pictures, the answers in a file. On Ray Data: `florence2_apps.label.ray`."""

from florence2_apps.label.job import Job
from florence2_apps.label.labelling import Labelled, label
from florence2_apps.label.sources import Source, open_source

__all__ = ["Job", "Labelled", "Source", "label", "open_source"]
