"""One thing asked of many pictures, the answers in a file. On Ray Data: `florence2_client.label.ray`."""

from florence2_client.label.job import Job
from florence2_client.label.labelling import Labelled, label
from florence2_client.label.sources import Source, open_source

__all__ = ["Job", "Labelled", "Source", "label", "open_source"]
