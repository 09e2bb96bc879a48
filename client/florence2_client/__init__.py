"""Call a Florence-2 server.

The command, the applications, release and evaluation import it; it imports florence2.
"""

from florence2.coco_writer import Coco
from florence2_client.async_client import AsyncFlorence2Client
from florence2_client.client import Florence2Client
from florence2_client.errors import ServerRefused
from florence2_client.pictures import Image
from florence2_client.results import CaptionedInstances, Instance, Instances, Result, Text
from florence2_client.task_methods import Settings

__all__ = [
    "AsyncFlorence2Client",
    "CaptionedInstances",
    "Coco",
    "Florence2Client",
    "Image",
    "Instance",
    "Instances",
    "Result",
    "ServerRefused",
    "Settings",
    "Text",
]
