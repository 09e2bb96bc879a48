"""The task table: what a client writes, what the encoder reads, and what the answer looks like.

Prompts and answer kinds are those of `Florence2Processor` (identical in Microsoft's and transformers' code).
"""

from dataclasses import dataclass
from enum import Enum


class Takes(Enum):
    """What stands after the task token."""

    NOTHING = "nothing"
    TEXT = "text"
    REGION = "region"
    """`<loc_x1><loc_y1><loc_x2><loc_y2>`"""


class AnswerKind(Enum):
    """The value under the task's key in the answer; the names are those of HF's post-processor."""

    PURE_TEXT = "pure_text"
    OCR = "ocr"
    DESCRIPTION_WITH_BBOXES = "description_with_bboxes"
    BBOXES = "bboxes"
    PHRASE_GROUNDING = "phrase_grounding"
    POLYGONS = "polygons"
    DESCRIPTION_WITH_BBOXES_OR_POLYGONS = "description_with_bboxes_or_polygons"


@dataclass(frozen=True)
class Task:
    token: str
    prompt: str
    takes: Takes
    answer: AnswerKind


_TABLE = """
<OCR>                             | nothing | pure_text                           | What is the text in the image?
<OCR_WITH_REGION>                 | nothing | ocr                                 | What is the text in the image, with regions?
<CAPTION>                         | nothing | pure_text                           | What does the image describe?
<DETAILED_CAPTION>                | nothing | pure_text                           | Describe in detail what is shown in the image.
<MORE_DETAILED_CAPTION>           | nothing | pure_text                           | Describe with a paragraph what is shown in the image.
<OD>                              | nothing | description_with_bboxes             | Locate the objects with category name in the image.
<DENSE_REGION_CAPTION>            | nothing | description_with_bboxes             | Locate the objects in the image, with their descriptions.
<REGION_PROPOSAL>                 | nothing | bboxes                              | Locate the region proposals in the image.
<CAPTION_TO_PHRASE_GROUNDING>     | text    | phrase_grounding                    | Locate the phrases in the caption: {input}
<REFERRING_EXPRESSION_SEGMENTATION> | text  | polygons                            | Locate {input} in the image with mask
<REGION_TO_SEGMENTATION>          | region  | polygons                            | What is the polygon mask of region {input}
<OPEN_VOCABULARY_DETECTION>       | text    | description_with_bboxes_or_polygons | Locate {input} in the image.
<REGION_TO_CATEGORY>              | region  | pure_text                           | What is the region {input}?
<REGION_TO_DESCRIPTION>           | region  | pure_text                           | What does the region {input} describe?
<REGION_TO_OCR>                   | region  | pure_text                           | What text is in the region {input}?
"""  # noqa: E501


def _read(row: str) -> Task:
    token, takes, answer, prompt = (cell.strip() for cell in row.split("|"))
    return Task(token, prompt, Takes(takes), AnswerKind(answer))


TASKS: dict[str, Task] = {task.token: task for task in map(_read, _TABLE.strip().splitlines())}
"""All 15 tasks by token."""
